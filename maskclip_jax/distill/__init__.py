"""MaskCLIP+: training a segmentation network on MaskCLIP's masks (paper, section 3.3)."""

from __future__ import annotations

from pathlib import Path

CONFIG, TEXT = "config.json", "text.npy"  # of a run's folder


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run: then `--model` is a student, else a CLIP."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / TEXT).is_file()
