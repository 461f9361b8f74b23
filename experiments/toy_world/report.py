"""Writes the README's table of the embedded models from the committed results, so that the two can't drift.

python -m experiments.toy_world.report
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from maskclip_jax.data.whole_files import atomic_path

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- scores: written by `python -m experiments.toy_world.report` -->\n"
END = "<!-- end of scores -->"


def table(results: list[dict]) -> str:
    """One row per model: naive, MaskCLIP, the best denoising, smoothing, and MaskCLIP on Twemoji."""
    lines = [
        "| `--model` | naive | MaskCLIP | + denoising (best threshold) | + key smoothing | MaskCLIP, Twemoji |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        scores = {name: row["mIoU"] for name, row in result["heldout"].items()}
        best = max((name for name in scores if re.fullmatch(r"PD [\d.]+", name)), key=scores.get)
        cells = (
            f"`{result['model']}`",
            f"{scores['naive']:.1f}",
            f"{scores['MaskCLIP']:.1f}",
            f"{scores[best]:.1f} ({best.split()[1]})",
            f"{scores['KS']:.1f}",
            f"{result['heldout_twemoji']['MaskCLIP']['mIoU']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, results: list[dict]) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


def load_results() -> list[dict]:
    """The committed results, the default model first."""
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("vit", "resnet")]


def main() -> None:
    text = with_table(README.read_text(), load_results())
    with atomic_path(README) as temporary:
        temporary.write_text(text)
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
