"""The report's plots, drawn with matplotlib when they are asked for; a `Figure` is a name, a caption and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskclip_jax.data.images import write_image
from maskclip_jax.data.whole_files import atomic_path
from maskclip_jax.errors import UserError

INK, PAPER = "#222222", "white"
COLOURS = ("#2a6f97", "#e07a1f", "#5a8f3d", "#8a4f9e", "#b5382a", "#3c9d9b", "#9a7d2e", "#66727f")
DASHES = ("-", "--", ":")  # of a series whose colour another has already


class Figure(NamedTuple):
    """A picture of the report: `draw(path)` writes a PNG."""

    name: str
    caption: str
    draw: Callable[[Path], None]


def bars(
    name: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], axis: str, caption: str = ""
) -> Figure:
    """A bar for every series in every group; what is None is left out."""

    def draw(path: Path) -> None:
        figure, axes = _axes(8, 3.6)
        full = {label: values for label, values in series.items() if any(v is not None for v in values)}
        width = 0.8 / max(len(full), 1)
        for i, (label, values) in enumerate(full.items()):
            known = [(g, v) for g, v in enumerate(values) if v is not None]
            at = [g + (i - (len(full) - 1) / 2) * width for g, _ in known]
            shown = axes.bar(at, [v for _, v in known], width, label=label, color=COLOURS[i % len(COLOURS)])
            axes.bar_label(shown, fmt="%.1f", fontsize=6, padding=1)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylabel(axis)
        if full:
            axes.legend(fontsize=7, frameon=False)
        _save(figure, path)

    return Figure(name, caption, draw)


def curves(
    name: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    labels: tuple[str, str],
    caption: str = "",
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Lines over x; `marks` are dotted vertical lines with a name."""

    def draw(path: Path) -> None:
        figure, axes = _axes(6.5, 3.8)
        for i, (label, values) in enumerate(series.items()):
            known = [(a, v) for a, v in zip(x, values, strict=True) if v is not None]
            colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            axes.plot(*zip(*known, strict=True), marker="o", ms=3, lw=1.4, label=label, color=colour, ls=dashes)
        for label, at in (marks or {}).items():
            axes.axvline(at, color=INK, lw=0.8, ls=":")
            axes.annotate(
                label, (at, axes.get_ylim()[1]), fontsize=7, va="top", xytext=(3, 0), textcoords="offset points"
            )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(fontsize=7, frameon=False, ncols=2)
        _save(figure, path)

    return Figure(name, caption, draw)


def heat(
    name: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[Any],
    columns: Sequence[Any],
    labels: tuple[str, str],
    caption: str = "",
) -> Figure:
    """A table of numbers as colours, the numbers written in; `labels` of columns and rows."""

    def draw(path: Path) -> None:
        array = np.asarray(values, float)
        figure, axes = _axes(1.2 + 0.75 * len(columns), 0.9 + 0.42 * len(rows))
        axes.imshow(array, cmap="viridis", aspect="auto")
        middle = (np.nanmin(array) + np.nanmax(array)) / 2
        for (i, j), value in np.ndenumerate(array):
            axes.text(
                j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=PAPER if value < middle else INK
            )
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.tick_params(length=0)
        _save(figure, path)

    return Figure(name, caption, draw)


def sheet(name: str, caption: str, make: Callable[[], np.ndarray]) -> Figure:
    """A qualitative sheet: an RGB array, made when it is asked for."""
    return Figure(name, caption, lambda path: write_image(path, make()))


def _axes(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure as Canvas  # no pyplot: no state, no window system
    except ImportError as error:
        raise UserError(
            "plots need matplotlib, and it is missing: pip install -r experiments/requirements.txt"
        ) from error
    figure = Canvas((width, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
