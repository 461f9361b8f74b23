"""MaskCLIP+: training a segmentation network on MaskCLIP's masks (paper, section 3.3)."""

from __future__ import annotations

import os
from pathlib import Path

from maskclip_jax.data.whole_files import read_json, shipped
from maskclip_jax.errors import UserError

CONFIG, TEXT = "config.json", "text.npy"  # of a run's folder
EMBEDDED = {"embedded-student": "student_scenes"}  # the students in maskclip_jax/assets
WEIGHTS, FORMAT = "model.safetensors", "maskclip_jax.student"  # of a plain one, and what its config.json says it is


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / TEXT).is_file()


def is_plain(folder: str | Path) -> bool:
    """Whether a folder is a plain one of a student (`student_folder.py`)."""
    try:
        return read_json(Path(folder) / CONFIG).get("format") == FORMAT
    except UserError:
        return False


def folder_of(source: str | Path, files: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Path:
    """The folder that a student's name means: the shipped one's, one on disk, or what a hub id's `files` came to.
    Raises UserError where the hub has none."""
    if str(source) in EMBEDDED:
        return shipped("assets", EMBEDDED[str(source)])
    folder = Path(os.path.expanduser(source))
    if not os.path.exists(folder) and str(source).count("/") == 1:
        from maskclip_jax.checkpoints.hub import snapshot

        return snapshot(str(source), files)
    return folder


def is_student(source: str | Path) -> bool:
    """Whether `--model` is a student: the shipped one, a run's folder, a plain one, or a hub id of such a one; else it
    is a CLIP."""
    try:
        folder = folder_of(source, (CONFIG,))
    except UserError:  # who loads it says why
        return False
    return is_run(folder) or is_plain(folder)
