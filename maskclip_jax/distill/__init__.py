"""MaskCLIP+: training a segmentation network on MaskCLIP's masks (paper, section 3.3)."""
