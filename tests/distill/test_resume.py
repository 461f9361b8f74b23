"""Kill −9 in the middle of a checkpoint write, ten times: the run always goes on, and ends as if nothing had been."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import HERE, arrays_of, child_environment, run_config, write_data

from maskclip_jax.distill.checkpoint import FOLDER, Checkpoints
from maskclip_jax.distill.run_log import read_metrics
from maskclip_jax.distill.step import TrainState
from maskclip_jax.distill.student_folder import load_student

KILLS = 10
STEPS = 40  # more than the kills can use up: each child gets two or three steps further


class Child:
    """A process that trains in `workdir`."""

    def __init__(self, folder: Path, workdir: Path):
        command = [sys.executable, str(HERE / "tiny_run.py"), str(folder / "config.json"), str(workdir)]
        self.out = folder / f"{workdir.name}.npz"
        self.log = (folder / f"{workdir.name}.log").open("a")
        environment = child_environment(folder / "cache")
        self.process = subprocess.Popen(
            [*command, str(self.out)], env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def finish(self) -> dict[str, np.ndarray]:
        assert self.process.wait(timeout=500) == 0, Path(self.log.name).read_text()[-2000:]
        with np.load(self.out) as arrays:
            return dict(arrays)


def half_written(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob("*.orbax-checkpoint-tmp*"))


def kill_while_writing(child: Child, checkpoints: Path, later_than: int, delay: float) -> int:
    """Kills the child `delay` seconds into a write; returns the last step that was whole a moment before."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert child.process.poll() is None, Path(child.log.name).read_text()[-2000:]
        whole = max((int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()), default=0)
        if whole > later_than and half_written(checkpoints):
            time.sleep(delay)
            child.process.kill()
            child.process.wait()
            return whole
        time.sleep(0.0005)
    raise AssertionError("no checkpoint write was seen")


@pytest.mark.slow
def test_ten_kills_cost_nothing(tmp_path):
    config = run_config(
        write_data(tmp_path), steps=STEPS, checkpoint_every=1, evaluate_every=STEPS, keep_last=2, log_every=1
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with Child(tmp_path, tmp_path / "whole") as child:
        whole = child.finish()

    workdir, luck, torn, last = tmp_path / "killed", random.Random(0), 0, 0
    for _ in range(KILLS):
        with Child(tmp_path, workdir) as child:
            seen = kill_while_writing(child, workdir / FOLDER, last + 1, luck.uniform(0, 0.02))
        torn += bool(half_written(workdir / FOLDER))
        with Checkpoints(workdir, read_only=True) as checkpoints:
            assert checkpoints.latest >= seen > last  # nothing that was whole is lost
            last = checkpoints.latest
            assert last < STEPS
        student = load_student(workdir, "latest")  # and the newest is whole
        assert student.step == last
    print(f"{torn} of {KILLS} kills left a half-written checkpoint; the last one at step {last}")
    assert torn >= KILLS // 2

    with Child(tmp_path, workdir) as child:
        killed = child.finish()
    assert killed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name], err_msg=name)
    assert not half_written(workdir / FOLDER)
    steps = [record["step"] for record in read_metrics(workdir) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert read_metrics(workdir) == read_metrics(tmp_path / "whole")


def test_the_arrays_of_a_state_are_all_of_it():
    """What the comparison above looks at."""
    state = TrainState(np.int32(3), {"a": np.ones(2)}, {"b": np.zeros(1)}, ({"a": np.ones(2)},))
    assert len(arrays_of(state)) == 4
