"""A student to the Hugging Face hub, with a model card.

    python run.py push runs/scenes owner/scenes-student --license apache-2.0
    python run.py segment photo.jpg --model owner/scenes-student --out out

FOLDER is a run of `distill`, of which the latest checkpoint goes, or a plain one that `convert` made (of another
checkpoint, in float16, with a README.md of yours). The card says classes, teacher, training, scores and licence; paths
of this machine stay here. Needs a token that may write: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import sys

from maskclip_jax.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=common.place, metavar="FOLDER", help="a run's folder, or a plain student's")
    parser.add_argument("name", metavar="OWNER/NAME", help="where on the hub")
    parser.add_argument("--license", default="unknown", help="of the weights, as the hub names it: apache-2.0, …")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from maskclip_jax.deploy.hub import push

    if not sys.stderr.isatty():
        disable_progress_bars()
    print(f"wrote {push(args.folder, args.name, license=args.license, private=args.private)}")
