"""Convert any supported checkpoint into a folder that loads memory-mapped and fast.

    python run.py convert openai/clip-vit-base-patch16 clip-b16
    python run.py segment photo.jpg --classes "dog, sofa" --model clip-b16 --out out

Reads Hugging Face and open_clip folders or hub ids, OpenAI's .pt files, Google's .npz (SigLIP, TIPS), and single weight
files. Pickled ones need no PyTorch, and nothing in them is run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="hub id, folder or file of a checkpoint")
    parser.add_argument("out", type=common.place, help="folder to write; must not exist")
    parser.add_argument(
        "--activation", choices=("quick_gelu", "gelu"), help="of weights that come without a config (quick_gelu)"
    )
    parser.add_argument("--tokenizer", help="folder, hub id or .model file of a tokenizer, where a checkpoint has none")


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.checkpoints.load import load_clip
    from maskclip_jax.checkpoints.orbax_io import save_converted
    from maskclip_jax.distill.run_layout import is_run

    if os.path.lexists(os.path.expanduser(args.out)):  # before the source is fetched, which may be gigabytes
        raise UserError(f"a checkpoint is written to a new folder, but {args.out} exists: choose another name")
    if is_run(args.source):
        raise UserError(
            f"a checkpoint is a CLIP's, but {args.source} is a run of distill: segment --model takes it as it is"
        )
    common.say_notes()
    pretrained = load_clip(args.source, tokenizer=args.tokenizer, activation=args.activation, fold=False)
    path = save_converted(pretrained, args.out)
    size = sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()) / 2**20
    print(f"wrote {path} ({size:.1f} MiB)")
