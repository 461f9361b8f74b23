"""MaskCLIP: training-free segmentation (paper, sections 3.1 and 3.2)."""
