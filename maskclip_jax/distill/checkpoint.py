"""Checkpoints of a run: written in the background, whole or not at all; the last few and the best stay.

The only orbax import of training. A checkpoint is a folder `checkpoints/<step>`; orbax writes it under another name
and renames it, so a killed process leaves either a whole checkpoint or a temporary folder that the next run removes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from maskclip_jax.errors import UserError

FOLDER = "checkpoints"
SCORE = "mIoU"


class Checkpoints:
    """The checkpoints of one run's folder. Use as a context manager: leaving it waits for what is being written.

    On several hosts every method is called on all of them, and the folder is on a file system that all see.
    """

    def __init__(self, workdir: str | Path, *, keep_last: int = 3, read_only: bool = False):
        self.folder = Path(workdir).absolute() / FOLDER
        score = lambda metrics: metrics[SCORE]  # noqa: E731
        kept = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep_last),
                preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        with _quiet():  # it warns of what read_only means
            options = ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                best_fn=score,  # without it orbax would not store scores
                step_format_fixed_length=8,
                read_only=read_only,
                create=not read_only,
            )
        try:
            if not read_only and jax.process_index() == 0:
                _remove_remains(self.folder)
            with _quiet():
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:  # orbax raises what it meets: a file in the way, no permission, a full disk
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoints need a folder, but {self.folder} is not usable ({reason})") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step with a checkpoint, None where there is none."""
        return self.steps[-1] if self.steps else None

    @property
    def best(self) -> int | None:
        """The step with the best score, None where none has one."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Copies `state` and returns; writing goes on in the background.

        Args:
          step: optimiser steps taken.
          state: a pytree of arrays, the same on all devices.
          score: mIoU in 0..1, if it was measured at this step; the best one's checkpoint is kept.
        """
        metrics = None if score is None or math.isnan(score) else {SCORE: float(score)}
        with _writing(self.folder):
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def wait(self) -> None:
        """Until everything is written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state at a step (None: the latest), with the structure, shapes, types and placement of `like`.

        Raises:
          UserError: there is no such checkpoint, or it is another state's.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise UserError(f"a checkpoint of step {step} was asked for, but {self.folder} has {self.steps or 'none'}")
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))
        except Exception as error:  # orbax and tensorstore raise what they meet
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {self.folder}/{step:08d} does not fit this run, or is damaged ({reason}): "
                "remove its folder to go on from the one before"
            ) from error
        return state


def _remove_remains(folder: Path) -> None:
    """What a killed process left half written. Orbax overlooks those that were killed just before their renaming."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    sharding = x.sharding if isinstance(x, jax.Array) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except OSError as error:
        raise UserError(f"a checkpoint must be writable, but {folder} is not ({error}): make room and go on") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns about steps without a score, about reading only, and about remains that it then removes."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
