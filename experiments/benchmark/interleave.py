"""The parent's side: a process for each rival, rounds in which each works once, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from maskclip_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PAUSE = 0.25  # seconds between turns: thread pools spin on for a while after their work


@dataclasses.dataclass(frozen=True)
class Rival:
    """One way to do the work.

    Fields:
      name: of its row.
      kind, options: the case and its arguments (functions of `cases`, `labelling`, `torch_worker`).
      python: the interpreter, where PyTorch does it; None is ours.
      threads: cores it may use; 0 is all.
      keep_memory: as our commands do (`commands.memory`); PyTorch has no use for it.
      side: of the square matrices whose product is the machine's rate.
    """

    name: str
    kind: str
    options: dict[str, Any]
    python: str | None = None
    threads: int = 0
    keep_memory: bool = True
    side: int = 2048


class Worker:
    """The process of a rival, from here to `close`."""

    def __init__(self, rival: Rival):
        wanted = {name: getattr(rival, name) for name in ("kind", "options", "threads", "keep_memory", "side")}
        spec = json.dumps(wanted)
        if rival.python is None:
            command = [sys.executable, "-m", "experiments.benchmark.worker", spec]
        else:
            command = [rival.python, str(Path(__file__).with_name("torch_worker.py")), spec]
        self.rival, self.seconds, self.cpu_seconds, self.rates = rival, [], [], []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.questions, self.answers = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)

    def start(self) -> None:
        """Waits until it has done the work for the first time, which compiles."""
        self.facts = self._answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.questions.close()
        self.answers.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def turn(self) -> None:
        """The work once; where it is ours, the machine's rate just before and after."""
        ours = self.rival.python is None
        if ours:
            self.rates.append(self._ask("rate")["rate"])
        answer = self._ask("run")
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        if ours:
            self.rates.append(self._ask("rate")["rate"])

    def result(self) -> dict[str, Any]:
        """The row: times, rates, and what the worker says of itself."""
        row = {"name": self.rival.name, **self.facts, **self._ask("end"), "rounds": len(self.seconds)}
        row |= {"min_seconds": min(self.seconds), "median_seconds": statistics.median(self.seconds)}
        row |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "min_cpu_seconds": min(self.cpu_seconds)}
        if self.rates:
            row["matrix_flops"], row["cpu_matrix_flops"] = (max(rate) for rate in zip(*self.rates, strict=True))
            if row["flops"]:
                row["share"] = row["flops"] / row["min_seconds"] / row["matrix_flops"]
                row["cpu_share"] = row["flops"] / row["min_cpu_seconds"] / row["cpu_matrix_flops"]
        return row

    def _ask(self, what: str) -> dict[str, Any]:
        try:
            print(what, file=self.questions, flush=True)
        except BrokenPipeError as error:
            raise self._died() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> UserError:
        status = self.process.wait()
        return UserError(
            f"the process of {self.rival.name!r} ended with status {status} before its work was done "
            "(its own words are above; -9 is out of memory): use a smaller batch"
        )


def interleave(rivals: Sequence[Rival], *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Rounds in turn until each rival has `rounds` of them, or `seconds` have passed (at least two).

    Returns a row for each rival, in order. `times_first`: how often the first one's work fits into this one's time,
    the median over rounds of the ratio within a round, so that a load on the machine cancels.
    """
    workers: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for rival in rivals:
            workers.append(Worker(rival))
            stack.callback(workers[-1].close)
            workers[-1].start()
        began = time.monotonic()
        for n in range(rounds):
            if n >= 2 and time.monotonic() - began > seconds:
                break
            for worker in workers:
                worker.turn()
                time.sleep(PAUSE)
        rows = [worker.result() for worker in workers]
    for row in rows:
        row["times_first"] = statistics.median(
            t / first for t, first in zip(row["seconds"], rows[0]["seconds"], strict=True)
        )
    return rows
