"""What all experiments share: cells of a table, computed once, recorded as JSON, computed again only when they must be.

An experiment is a module with `NAME`, `TITLE`, `cells(settings)` and `blocks(settings, found)`. A cell has a key, the
config that its scores depend on (checkpoint's fingerprint, data, number of scenes, options, seed) and a function. Its
record has that config, the scores, the seconds, the commit and the versions; a record with another config is stale.

    python -m experiments.tables.robustness                          what is missing of one experiment, here
    python -m experiments.tables.robustness --scale full             the same at full size: data and checkpoints needed
    python -m experiments.tables.robustness --only embedded/jpeg     some cells
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from maskclip_jax.cli.common import complain
from maskclip_jax.cli.process import program_settings
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
SCALES = ("embedded", "full")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the experiments are run.

    Fields:
      scale: "embedded" (this machine) or "full" (the paper's).
      count: scenes that are scored, at most; None takes each experiment's own number.
      runs: folder of trained students, each DIR/VARIANT-SEED as `run.py distill` writes it.
      look: read `runs`; False takes the records of students as they are (what is committed must not depend on a folder
        that is not).
      train: train the students that are missing (an hour or more each).
      results: folder of the records.
      fresh: compute again what is recorded.
      only: keys, or parts of keys; other cells stay as they are. () is all.
    """

    scale: str = "embedded"
    count: int | None = None
    runs: Path = ROOT / "runs"
    look: bool = True
    train: bool = False
    results: Path = RESULTS
    fresh: bool = False
    only: tuple[str, ...] = ()

    def scenes(self, own: int) -> int:
        """The number of scenes of an experiment that takes `own` by itself."""
        return own if self.count is None else min(self.count, own)


class Cell(NamedTuple):
    """One entry (or a few that are computed together) of a table.

    `config["inputs"]` says what was read (fingerprints); None where it is not here, and then any record will do.
    """

    key: str
    config: dict[str, Any]
    compute: Callable[[], dict[str, Any]]
    published: float | str | None = None
    command: str = ""  # what fills it, where it stays empty


class Found(NamedTuple):
    """A cell and what is known of it."""

    cell: Cell
    record: dict[str, Any] | None

    @property
    def scores(self) -> dict[str, Any] | None:
        return None if self.record is None else self.record["scores"]


class Missing(UserError):
    """A cell's input (run, data, checkpoint) is not here: the cell stays empty."""


def path_of(settings: Settings, name: str) -> Path:
    """The file of an experiment's records."""
    return settings.results / f"{name}.{settings.scale}.json"


def recorded(settings: Settings, name: str) -> dict[str, Any]:
    """The records of an experiment, by key."""
    path = path_of(settings, name)
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of results ({error}): remove it or restore it") from error


def holds(cell: Cell, record: dict[str, Any] | None) -> bool:
    """Whether a record is of this cell as it is now configured."""
    if record is None:
        return False
    now, then = dict(cell.config), dict(record["config"])
    if now["inputs"] is None:
        del now["inputs"]
        then.pop("inputs", None)
    return now == then


def find(settings: Settings, experiment: ModuleType) -> list[Found]:
    """The cells of an experiment with the records that hold."""
    records = recorded(settings, experiment.NAME)
    found = []
    for cell in experiment.cells(settings):
        record = records.get(cell.key)
        if not cell.command:
            module, key = experiment.NAME, shlex.quote(cell.key)
            scale = "" if settings.scale == "embedded" else f" --scale {settings.scale}"
            cell = cell._replace(command=f"python -m experiments.tables.{module}{scale} --only {key}")
        found.append(Found(cell, record if holds(cell, record) else None))
    return found


def run(settings: Settings, experiment: ModuleType) -> list[Found]:
    """Computes what is missing, writing every result as soon as it is there; Ctrl-C loses one cell at most."""
    found = find(settings, experiment)
    wanted = chosen(settings, [f.cell.key for f in found])
    todo = [f.cell for f in found if f.cell.key in wanted and (settings.fresh or f.record is None)]
    if settings.scale == "full" and not settings.only:
        todo = []  # hours each, and none of it is here: asked for by name
    began, done = time.monotonic(), 0
    for cell in todo:
        start = time.monotonic()
        print(f"{experiment.NAME} {cell.key} …", flush=True)
        try:
            scores = cell.compute()
        except Missing as missing:
            complain(missing, f"empty: {cell.key}")
            continue
        seconds, done = time.monotonic() - start, done + 1
        _write(settings, experiment.NAME, cell, scores, seconds)
        shown = "  ".join(f"{k} {v:.1f}" for k, v in scores.items() if isinstance(v, float))
        left = (time.monotonic() - began) / done * (len(todo) - done)
        print(f"  {shown}  ({seconds:.0f} s, about {left / 60:.0f} min left here)", flush=True)
    return find(settings, experiment)


def chosen(settings: Settings, keys: list[str]) -> set[str]:
    """The keys that `only` names, each a whole key or (where it is none) a part of several."""
    parts = [part for part in settings.only if part not in keys]
    return {key for key in keys if not settings.only or key in settings.only or any(part in key for part in parts)}


def _write(settings: Settings, name: str, cell: Cell, scores: dict[str, Any], seconds: float) -> None:
    cells = recorded(settings, name)
    cells[cell.key] = {"config": cell.config, "scores": scores, "seconds": round(seconds, 1)} | provenance()
    settings.results.mkdir(parents=True, exist_ok=True)
    write_json(path_of(settings, name), {"experiment": name, "scale": settings.scale, "cells": cells})


@functools.cache
def provenance() -> dict[str, Any]:
    """Commit ("+" where the tree differs from it) and versions."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    commit = git("rev-parse", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "maskclip_jax", "experiments/*.py").returncode == 1
    versions = {name: metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {"commit": (commit or "unknown") + "+" * changed, "versions": versions | {"device": _device()}}


def _device() -> str:
    return jax.devices()[0].device_kind


def percent(scores: Any) -> dict[str, Any]:
    """`Scores` as a record keeps them: percentages with two digits, classes that were there, the protocol."""
    found = scores.to_dict()
    per_class = {k: round(v, 2) for k, v in found.pop("per class").items() if v == v}
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()} | {"per class": per_class}


def table(rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table of texts and numbers (one digit); the first row is the head."""
    lines = ["| " + " | ".join(map(text, row)) + " |" for row in rows]
    columns = lines[0].count(" | ") + 1
    return "\n".join([lines[0], "|" + "---|" * columns, *lines[1:]]) + "\n"


def text(value: Any) -> str:
    """A number with one digit, an empty cell as –."""
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def score(found: dict[str, Found], key: str, name: str = "mIoU") -> float | None:
    """One score of one cell, None where it is empty."""
    scores = found[key].scores if key in found else None
    return None if scores is None else scores[name]


def seeded(key: str, seed: int) -> str:
    """The key of a student's cell: the plain one is seed 0's."""
    return key + f", seed {seed}" * bool(seed)


def spread(scores: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1) of the seeds that are there; None where there are too few."""
    there = [x for x in scores if x is not None]
    return statistics.fmean(there) if there else None, statistics.stdev(there) if len(there) > 1 else None


def beside(found: dict[str, Found], key: str, name: str = "mIoU") -> str:
    """Published value and ours, "41.5 / –"."""
    return f"{text(found[key].cell.published)} / {text(score(found, key, name))}" if key in found else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=SCALES, default="embedded", help="this machine's, or the paper's")
    parser.add_argument("--count", type=int, help="scenes scored, at most (then --results must be another folder)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="trained students: DIR/VARIANT-SEED")
    parser.add_argument("--train", action="store_true", help="train the students that are missing: hours")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--fresh", action="store_true", help="compute again what is recorded")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KEY", help="cells of these keys, or whose keys hold one"
    )


def settings_from(args: argparse.Namespace) -> Settings:
    """Raises UserError where a smaller count would replace the committed results."""
    if args.count is not None and args.count < 1:
        raise UserError(f"at least one scene is scored, but --count {args.count} came")
    if args.count is not None and args.results.resolve() == RESULTS:
        raise UserError(
            "--count makes other results than the committed ones: name another folder, --results out/results"
        )
    names = {f.name for f in dataclasses.fields(Settings)}
    values = {k: v for k, v in vars(args).items() if k in names}
    return Settings(**(values | {"only": tuple(args.only)}))


def keep_programs() -> None:
    """Compiled programs are kept on disk: cells that differ in data alone, and later runs, compile nothing."""
    for name, value in program_settings().items():
        jax.config.update(name, str(value) if isinstance(value, Path) else value)


def main(experiment: ModuleType) -> None:
    """The command line of one experiment: computes, then prints its tables."""
    parser = argparse.ArgumentParser(
        description=experiment.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    with_errors(lambda: _print_tables(settings_from(args), experiment))


def _print_tables(settings: Settings, experiment: ModuleType) -> None:
    keep_programs()
    found = run(settings, experiment)
    print(f"\n{experiment.TITLE}\n")
    for block in experiment.blocks(settings, {f.cell.key: f for f in found}):
        if isinstance(block, str):
            print(block)


def with_errors(action: Callable[[], None]) -> None:
    """One line and exit code 2 for a UserError, 130 for Ctrl-C."""
    try:
        action()
    except UserError as error:
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
