"""All tables of the paper in one report: runs what is missing, then writes one HTML and one Markdown file with figures.

    python -m experiments.report                            the embedded models: no download
    python -m experiments.report --runs runs --train        trains the students that are missing too: hours
    python -m experiments.report --collect                  runs nothing: what is recorded, in seconds
    python -m experiments.report --write                    also writes the tables into experiments/README.md
    python -m experiments.report --scale full --collect     the paper's values beside empty cells, with commands

Records lie in experiments/results/, one file per experiment and scale, and are committed: config, scores, seconds,
commit. A record is computed again when its config no longer holds (another checkpoint, number of scenes, option).
Ctrl-C loses one cell at most; the same command goes on.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.harness.figures import Figure
from experiments.harness.records import (
    ROOT,
    Found,
    Settings,
    add_arguments,
    find,
    keep_programs,
    run,
    settings_from,
    with_errors,
)
from experiments.tables import (
    ablations,
    annotation_free,
    encoders,
    fine_grained,
    robustness,
    successors,
    transforms,
    zero_shot,
)
from maskclip_jax.cli.common import output_folder, progress
from maskclip_jax.data.whole_files import atomic_path

EXPERIMENTS: tuple[ModuleType, ...] = (
    annotation_free,
    zero_shot,
    robustness,
    fine_grained,
    ablations,
    successors,
    encoders,
    transforms,
)
README = Path(__file__).with_name("README.md")
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}th,td{padding:.2rem .6rem;"
    "border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}"
    "img{max-width:100%}figcaption{color:#666;font-size:.9em}figure{margin:1rem 0}code{font-size:.85em}"
)

Part = tuple[str, list[str | Figure]]  # title, Markdown and figures


def parts(settings: Settings, experiments: Sequence[ModuleType] = EXPERIMENTS, *, compute: bool = True) -> list[Part]:
    """Every experiment's title and blocks, after computing what is missing."""
    out: list[Part] = []
    everything: dict[str, dict[str, Found]] = {}
    for experiment in experiments:
        cells = run(settings, experiment) if compute else find(settings, experiment)
        everything[experiment.NAME] = found = {f.cell.key: f for f in cells}
        out.append((experiment.TITLE, [*experiment.blocks(settings, found), summary(cells)]))
    if settings.scale == "embedded" and (text := what_does_not_reproduce(everything)):
        out.append(("What does not reproduce", [text]))
    return out


def summary(cells: Sequence[Found]) -> str:
    """How many cells are filled, how long they took, and at which commits."""
    filled = [f.record for f in cells if f.record is not None]
    if not filled:
        return f"{len(cells)} cells, all empty: nothing of this was run here.\n" if cells else ""
    short = [record["commit"][:10] + "+" * record["commit"].endswith("+") for record in filled]
    commits = ", ".join(dict.fromkeys(short))
    seconds = sum(record["seconds"] for record in filled)
    return f"{len(filled)} of {len(cells)} cells filled, {seconds / 60:.0f} minutes in all, at {commits}.\n"


def what_does_not_reproduce(found: dict[str, dict[str, Found]]) -> str:
    """The paper's findings that fail on the small models, with the measured reason; "" where nothing was measured."""
    tables, keys = found.get("annotation_free", {}), found.get("ablations", {})
    lines = []
    for short in ("resnet", "vit"):
        cells = [tables.get(f"scenes/{short}/{name}") for name in ("MaskCLIP", "+KS")] + [keys.get(f"keys/{short}")]
        if len(scores := _scores(cells)) < len(cells):
            continue
        plain, smoothed, similar = scores
        before, after = plain["mIoU"], smoothed["mIoU"]
        verdict = "hurts" if after < before else "helps"
        same, other = similar["cosine, same class"], similar["cosine, other class"]
        weight, share = 100 * similar["weight on the same class"], 100 * similar["share of the same class"]
        lines.append(
            f"- **Key smoothing {verdict} the {short}**: {before:.1f} -> {after:.1f} mIoU. Two of its keys have a "
            f"cosine of {same:.2f} where their classes are the same and of {other:.2f} where they differ; a position's "
            f"own class gets {weight:.0f}% of its weight, and would get {share:.0f}% without any keys."
        )
        both = [keys.get(f"templates/{short}/maskclip"), keys.get(f"chosen smoothing/{short}")]
        if len(scores := _scores(both)) == len(both):
            row, (plain, changed) = ablations.OURS[short], scores
            lines[-1] += f" Ours ({row}), on {changed['scenes']} scenes: {plain['mIoU']:.1f} -> {changed[row]:.1f}."
    return "\n".join(lines) + "\n" if lines else ""


def _scores(cells: Sequence[Found | None]) -> list[dict[str, Any]]:
    """Of the cells that were measured."""
    return [cell.record["scores"] for cell in cells if cell is not None and cell.record is not None]


def to_markdown(made: Sequence[Part], figures: str = "figures") -> str:
    """The report; figures are links."""
    out = []
    for title, blocks in made:
        out.append(f"## {title}\n")
        out += [f"![{b.caption}]({figures}/{b.name}.png)\n" if isinstance(b, Figure) else b for b in blocks]
    return "\n".join(out)


def to_html(made: Sequence[Part], folder: Path, title: str) -> str:
    """The report in one file; figures are inside."""
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    out.append(f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>")
    for heading, blocks in made:
        out.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if isinstance(block, Figure):
                data = base64.b64encode((folder / f"{block.name}.png").read_bytes()).decode()
                caption = html.escape(block.caption)
                out.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">')
                out.append(f"<figcaption>{caption}</figcaption></figure>")
            else:
                out.append(block_to_html(block))
    return "\n".join(out) + "</html>\n"


def block_to_html(block: str) -> str:
    """The little Markdown that blocks use: paragraphs, lists, tables, code, bold."""
    lines = [_inline(line) for line in block.strip().splitlines()]
    if block.startswith("| "):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:1] + lines[2:]]
        cells = [["<th>" + c for c in rows[0]], *(["<td>" + c for c in row] for row in rows[1:])]
        return "<table>" + "".join("<tr>" + "".join(row) for row in cells) + "</table>"
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{line[2:]}" for line in lines) + "</ul>"
    return f"<p>{'<br>'.join(lines)}</p>"


def _inline(line: str) -> str:
    line = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", line)


def with_blocks(document: str, contents: dict[str, str]) -> str:
    """`document` with what stands between `<!-- NAME: … -->` and `<!-- end of NAME -->` replaced."""
    for name, content in contents.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        document, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}{m[2]}", document, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"a document has one block {name}, this one {count}")
    return document


def readme_contents() -> dict[str, str]:
    """The blocks of experiments/README.md, from the committed records alone."""
    settings = Settings(look=False)
    made = parts(settings, compute=False)
    shown = [(title, [b for b in blocks if isinstance(b, str) and b]) for title, blocks in made]
    return {"tables": "\n" + to_markdown(shown) + "\n"}


def write_report(
    settings: Settings, out: Path, experiments: Sequence[ModuleType] = EXPERIMENTS, *, compute: bool = True
) -> None:
    """report.md, report.html and figures/ in `out`."""
    made = parts(settings, experiments, compute=compute)
    folder = output_folder(out) / "figures"
    drawings = [b for _, blocks in made for b in blocks if isinstance(b, Figure)]
    with progress("drawing", len(drawings)) as report:
        for number, figure in enumerate(drawings, 1):
            figure.draw(folder / f"{figure.name}.png")
            report(number)
    title = {"embedded": "MaskCLIP on the embedded scenes", "full": "MaskCLIP at full size"}[settings.scale]
    files = {"report.md": f"# {title}\n\n{to_markdown(made)}", "report.html": to_html(made, folder, title)}
    for name, content in files.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"wrote {out / 'report.html'}, report.md and {len(drawings)} figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--collect", action="store_true", help="run nothing: what is recorded")
    parser.add_argument("--write", action="store_true", help="also write the tables of experiments/README.md")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "report", help="folder of the report")
    args = parser.parse_args()

    def action() -> None:
        settings = settings_from(args)
        keep_programs()
        write_report(settings, args.out, compute=not args.collect)
        if args.write:
            document = with_blocks(README.read_text(encoding="utf-8"), readme_contents())
            with atomic_path(README) as temporary:
                temporary.write_text(document, encoding="utf-8")
            print(f"wrote {README}")

    with_errors(action)


if __name__ == "__main__":
    main()
