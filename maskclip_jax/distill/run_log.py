"""The log of a training run: metrics.jsonl, TensorBoard files, and a progress bar with rate and ETA.

All of it is the first host's. After a resume both files hold each step once: what a killed run wrote beyond its last
checkpoint is taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskclip_jax.data.whole_files import is_count, parse_json, read_bytes, write_bytes
from maskclip_jax.errors import UserError

FILE, EVENTS = "metrics.jsonl", "events"
LINE_EVERY = 20.0  # seconds between lines where there is no terminal


class StepMeans:
    """Means of the steps' metrics since the last report; of `phase`, `learning_rate` and `step` the last value."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._count = 0

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._last, self._count = dict(metrics), self._count + 1

    def take(self) -> dict[str, float]:
        """The means, and starts again; {} when nothing was added.

        The loss appears twice, as "loss" and as that of its phase ("loss_guided", "loss_self"): their targets differ.
        """
        if not self._count:
            return {}
        means = {name: total / self._count for name, total in self._sums.items()}
        means |= {name: self._last[name] for name in ("phase", "learning_rate")}
        means["loss_guided" if means["phase"] == 1 else "loss_self"] = means["loss"]
        self._sums, self._count = {}, 0
        return means


class MetricsFile:
    """One JSON object a line, each with its "step": appended, and cut back to a step on resume."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / FILE
        kept = [json.dumps(record) for record in read_metrics(folder) if record["step"] <= start]
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {name: _rounded(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # before the checkpoint of this step: a resume takes back lines, it makes none

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; lines that are damaged (a kill cuts the last one short) are left out.

    Warns where more than the last line is damaged. Raises UserError where the file cannot be read.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    records, lines = [], read_bytes(path).splitlines()
    for line in lines:
        with contextlib.suppress(UserError):
            record = parse_json(line, path)
            if is_count(record.get("step")):
                records.append(record)
    if len(records) < len(lines) - 1:
        warnings.warn(f"{path} was damaged: {len(lines) - len(records)} of its lines are left out", stacklevel=2)
    return records


class RunLog:
    """All three channels. On hosts other than the first it does nothing."""

    def __init__(self, folder: Path, start: int, steps: int, *, active: bool, quiet: bool = False):
        self._active, self._quiet, self._steps, self._start = active, quiet, steps, start
        self._began = self._spoke = time.monotonic()
        self._bar = self._task = None
        if not active:
            return
        from tensorboardX import SummaryWriter

        self._file = MetricsFile(folder, start)
        # TensorBoard drops what earlier event files of the folder hold from this step on.
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=start + 1)
        if not quiet and sys.stderr.isatty():
            self._bar, self._task = _progress_bar(start, steps)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._active:
            return
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._events.close()

    def advance(self, step: int) -> None:
        """A step was dispatched."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, Any], *, kind: str = "train") -> None:
        """Values measured at a step: numbers go to both files, lists only to metrics.jsonl."""
        if not self._active or not values:
            return
        self._file.write(step, {f"{kind}/{name}": value for name, value in values.items()})
        for name, value in values.items():
            if isinstance(value, int | float) and np.isfinite(value):
                self._events.add_scalar(f"{kind}/{name}", value, step)
        self._events.flush()
        if kind == "train":
            self._say_progress(step, values)

    def say(self, line: str) -> None:
        """Prints a line on stderr."""
        if not self._active or self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _say_progress(self, step: int, values: Mapping[str, Any]) -> None:
        text = f"loss {values['loss']:.4f}  labelled {100 * values['labelled']:.0f}%  phase {values['phase']:.0f}"
        if self._bar is not None:
            self._bar.update(self._task, values=text)
        elif time.monotonic() - self._spoke > LINE_EVERY:
            self._spoke = time.monotonic()
            rate = (step - self._start) / (self._spoke - self._began)
            left = (self._steps - step) / max(rate, 1e-9)
            self.say(f"step {step}/{self._steps}  {text}  {rate:.2f} steps/s  {left / 60:.1f} min left")


def _progress_bar(start: int, steps: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.2f} steps/s" if task.speed else "")

    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), TextColumn("{task.fields[values]}"))
    bar = Progress(*columns, console=Console(stderr=True))
    bar.start()
    return bar, bar.add_task("", total=steps, completed=start, values="compiling …")


def _rounded(value: Any) -> Any:
    """JSON has no NaN: null. Eight digits are readable and lose next to nothing of a float32."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.8g}") if np.isfinite(value) else None
    return value
