"""Convert any supported checkpoint into a folder that loads memory-mapped and fast, or a run into a plain student.

    python run.py convert openai/clip-vit-base-patch16 clip-b16
    python run.py segment photo.jpg --classes "dog, sofa" --model clip-b16 --out out
    python run.py convert runs/scenes student --dtype float16

Reads Hugging Face and open_clip folders or hub ids, OpenAI's .pt files, Google's .npz (SigLIP, TIPS), and single weight
files. Pickled ones need no PyTorch, and nothing in them is run. Of a run of `distill` comes model.safetensors and
config.json, which `segment`, `label` and `evaluate` take as they take the run, and `push` sends to the hub.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="hub id, folder or file of a checkpoint, or a run's folder")
    parser.add_argument("out", type=common.place, help="folder to write; must not exist")
    common.add_checkpoint_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of a student's arrays (float32)")


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.distill import is_student

    if os.path.lexists(os.path.expanduser(args.out)):  # before the source is fetched, which may be gigabytes
        raise UserError(f"a checkpoint is written to a new folder, but {args.out} exists: choose another name")
    path = _student(args) if is_student(args.source) else _clip(args)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
    print(f"wrote {path} ({size:.1f} MiB)")


def _student(args: argparse.Namespace) -> Path:
    from maskclip_jax.distill.student_folder import save_student

    common.refuse_for_students(args, ())
    args.model = args.source
    return save_student(common.load_run(args), args.out, dtype=args.dtype or "float32")


def _clip(args: argparse.Namespace) -> Path:
    from maskclip_jax.checkpoints.load import load_clip
    from maskclip_jax.checkpoints.orbax_io import save_converted

    for name in ("checkpoint", "dtype"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for students, but {args.source} is none: leave it out")
    common.print_notes()
    pretrained = load_clip(args.source, tokenizer=args.tokenizer, activation=args.activation, fold=False)
    return save_converted(pretrained, args.out)
