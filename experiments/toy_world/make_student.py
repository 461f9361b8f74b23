"""The student that ships, by one command: scenes, labels by the embedded ViT, two runs per seed, scores, the folder.

    python -m experiments.toy_world.make_student --show                    # the commands, and runs none
    python -m experiments.toy_world.make_student --workers 4               # minutes on one H100
    python -m experiments.toy_world.make_student --steps 12000 --workers 4 --runs runs/longer

The runs of all seeds share the device; the first one's progress is shown, the others' go to RUNS/logs. What is there is
kept, and what was stopped goes on: call it again. The student is written to RUNS/student, and takes the place of the
shipped one by hand: `maskclip_jax/assets/student_scenes`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.harness.records import with_errors
from maskclip_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA, LABELS = ROOT / "data" / "scenes" / "train", ROOT / "data" / "labels"
# Chosen on validation scenes (experiments/README.md); `configs/scenes.py:large` and `:refined` read what they write.
LABEL = "--pamr 8 --balance 0.5 --keep 0.8 --keep-stuff 0.9"
LOOK_EVERY = 1.0  # seconds
Command = list[str]


def stages(args: argparse.Namespace) -> Iterator[list[Command]]:
    """Commands in their order; those of one stage run side by side."""
    python = [sys.executable, "-m"]
    if _scenes_there() < args.scenes:
        made = ["--train", str(args.scenes), "--workers", str(os.cpu_count()), "--out", str(DATA.parent)]
        yield [[*python, "experiments.toy_world.make_scenes", *made]]
    label = ["--scenes", str(DATA), "--count", str(args.scenes), "--out", str(LABELS)]
    yield [[*python, "experiments.toy_world.label_scenes", *LABEL.split(), *label]]
    workers = ["--workers", str(args.workers)] if args.workers else []

    def distill(variant: str, seed: int, *changes: str) -> Command:
        change = ["--set", f"train_data={DATA}[0:{args.scenes}]", *changes, f"seed={seed}"]
        experiment = f"experiments/configs/scenes.py:{variant}"
        out = str(args.runs / f"{variant}-{seed}")
        return [sys.executable, "run.py", "distill", *workers, experiment, *change, "--out", out]

    steps = [f"steps={args.steps}"] if args.steps else []
    yield [distill("large", seed, *steps) for seed in args.seeds]
    yield [distill("refined", seed, f"init_from={args.runs / f'large-{seed}'}") for seed in args.seeds]
    scored = ["--runs", str(args.runs), "--results", str(args.runs / "results"), "--only", "MaskCLIP"]
    yield [[*python, "experiments.tables.annotation_free", *scored]]
    student = args.runs / "student"
    if not student.exists():
        source = str(args.runs / f"refined-{args.seeds[0]}")
        yield [[sys.executable, "run.py", "convert", source, str(student), "--dtype", "float16"]]


def _scenes_there() -> int:
    """How many training scenes are drawn."""
    file = DATA / "images.npy"
    return len(np.load(file, mmap_mode="r")) if file.is_file() else 0


def run_side_by_side(commands: Sequence[Command], logs: Path) -> None:
    """Runs them to their end; all but the first write to `logs`. Raises UserError where one fails, having stopped the
    others by SIGTERM, on which they save what they have."""
    # Of a GPU's memory each takes what it needs, not three quarters.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with contextlib.ExitStack() as stack:
        running: dict[subprocess.Popen, Command] = {}
        for place, command in enumerate(commands):
            out = None
            if place:
                logs.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(open(logs / f"{place}.log", "ab"))
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
            running[process] = command
        try:
            while running:
                time.sleep(LOOK_EVERY)
                for process in [p for p in running if p.poll() is not None]:
                    command = running.pop(process)
                    if process.returncode:
                        raise UserError(f"{shlex.join(command)} ended with {process.returncode}: see {logs} or above")
        except UserError:
            for process in running:
                process.terminate()
            raise
        except KeyboardInterrupt:  # which they heard too: a second signal would end them before they have saved
            for process in running:
                process.wait()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40000, help="how many the student learns from")
    parser.add_argument("--steps", type=int, help="of the first run, instead of the config's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one's student is written")
    parser.add_argument("--workers", type=int, help="processes that prepare batches, of each run")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--show", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    with_errors(lambda: make_student(args))


def make_student(args: argparse.Namespace) -> None:
    """Runs or shows the stages. Raises UserError for a number that is none, or a stage that fails."""
    for name in ("scenes", "steps", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is at least 1, got {value}: give another number")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds are different ones, got {args.seeds}: give each once")
    if args.runs.exists() and not args.runs.is_dir():
        raise UserError(f"--runs is a folder, but {args.runs} is a file: choose another name")
    for commands in stages(args):
        for command in commands:
            print(shlex.join(command), flush=True)
        if not args.show:
            run_side_by_side(commands, args.runs / "logs")


if __name__ == "__main__":
    main()
