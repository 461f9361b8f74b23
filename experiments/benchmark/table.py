"""Rows as one markdown table a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("", "min s", "median s", "n", "× first", "images/s", "GFLOP", "share", "CPU s", "share of CPU time",
           "peak MiB", "temporaries MiB", "compiles")  # fmt: skip
LEGEND = """`× first`: median over rounds of this row's time over the first row's, both of one round. `share`: counted
operations per second over the machine's matrix products per second in the row's dtype, measured between the rounds by
the same process (best of each). `CPU s` and its share: the same in CPU time, which another load disturbs less. Peak:
the process's largest resident memory, its weights and inputs included (GPU: the device's). Compiles: programs, from
the first call on."""


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report: the machine, then a table for every group."""
    parts = [f"{report['machine']}\n"]
    if report["rates"]:
        rows = [(r["dtype"], str(r["threads"]), f"{r['matrix_flops'] / 1e9:.0f}") for r in report["rates"]]
        parts.append(_table(("matrix product", "cores", "GFLOP/s"), rows))
    for title, rows in report["groups"].items():
        parts.append(f"**{title}**\n\n" + _table(COLUMNS, [_cells(row) for row in rows]))
    return "\n".join(parts) + f"\n{LEGEND}\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    def cell(name: str, pattern: str, scale: float = 1.0) -> str:
        return pattern.format(row[name] * scale) if row.get(name) is not None else ""

    return [
        row["name"],
        cell("min_seconds", "{:.3g}"),
        cell("median_seconds", "{:.3g}"),
        cell("rounds", "{}", 1),
        cell("times_first", "{:.2f}"),
        f"{row['images'] / row['min_seconds']:.3g}" if "images" in row else "",
        cell("flops", "{:.4g}", 1e-9),
        cell("share", "{:.0%}"),
        cell("min_cpu_seconds", "{:.3g}"),
        cell("cpu_share", "{:.0%}"),
        cell("peak_mib", "{:.0f}"),
        cell("temporaries_mib", "{:.0f}"),
        cell("compiles", "{}", 1),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
