"""MaskCLIP and its successors on the embedded scenes: methods × (raw, denoised, smoothed, PAMR), mIoU in %.

    python -m experiments.attention_methods

scores both embedded models on the first held-out scenes, all 66 names as prompts, each image whole at the model's own
size, and writes `experiments/results/attention_methods.json` after every row. Rows that are there for the same weights
and scenes are kept, so that the command goes on where it stopped. The papers' windows and sizes are for photographs of
500 pixels; what is compared here is the attention alone, everything else equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from experiments.embedded.score import load_split, read_scenes
from maskclip_jax import load_clip
from maskclip_jax.clip.attentions import METHODS, dense_method
from maskclip_jax.clip.config import ResNetConfig
from maskclip_jax.data.images import write_json
from maskclip_jax.segment.classifier import text_classifier

OUT = Path(__file__).with_name("results") / "attention_methods.json"
MODELS = ("embedded", "embedded-vit")
READINGS = {"raw": {}, "PD": {"prompt_denoising": None}, "KS": {"key_smoothing": True}, "PAMR": {"pamr": 10}}


def weights_digest(pretrained) -> str:
    """Changes whenever the shipped weights do."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(pretrained.variables):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def score_model(name: str, count: int, methods: list[str], out: Path, results: dict) -> None:
    """Fills `results[name]`, and writes it after every row."""
    pretrained = load_clip(name)
    threshold = pretrained.reading.prompt_denoising or 0.5
    protocol = {
        "scenes": count,
        "names": 66,
        "templates": pretrained.reading.templates,
        "short side": pretrained.preprocess.short_side,
        "stride": pretrained.config.stride,
        "PD": threshold,
        "KS": 1.0,
        "PAMR steps": 10,
        "weights": weights_digest(pretrained),
    }
    before = results.get(name, {})
    rows = before["rows"] if before.get("protocol") == protocol else {}
    scenes = load_split("heldout", count)
    classifier = text_classifier(pretrained, scenes[2])
    resnet = isinstance(pretrained.config.vision, ResNetConfig)
    for method in methods:
        if method == "values" and resnet:
            continue  # a pool has neither residual nor MLP: this is MaskCLIP
        blocks = 1 if resnet else dense_method(method, pretrained.config).blocks
        row = rows.setdefault(method, {})
        for reading, options in READINGS.items():
            if reading in row:
                continue
            options = {"prompt_denoising": threshold} if reading == "PD" else options
            began = time.monotonic()
            options = {"method": method, **options}
            row[reading] = read_scenes(pretrained, scenes, classifier, str(options), **options)["mIoU"]
            seconds = time.monotonic() - began
            print(
                f"{name:<14} {method:<14} {reading:<5} {row[reading]:5.1f}   {blocks} block(s)   {seconds:.0f} s",
                flush=True,
            )
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
            results[name] = {"protocol": protocol, "commit": commit, "rows": rows}
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, results)


def table(results: dict) -> str:
    """Markdown, a row for each method."""
    lines = []
    for name, result in results.items():
        lines += [f"`{name}`, {result['protocol']['scenes']} held-out scenes, mIoU in %:", ""]
        lines += ["| method | " + " | ".join(READINGS) + " |", "|---" * (1 + len(READINGS)) + "|"]
        for method, row in result["rows"].items():
            lines.append(f"| {method} | " + " | ".join(f"{row[r]:.1f}" if r in row else "–" for r in READINGS) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="embedded, embedded-vit, or a checkpoint")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--count", type=int, default=100, help="scenes, of 500")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.models:
        score_model(name, args.count, args.methods, args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
