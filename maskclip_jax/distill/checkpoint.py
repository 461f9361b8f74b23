"""Checkpoints of a run: written in the background, whole or not at all; the last few and the best stay.

The only orbax import of training. A checkpoint is a folder `checkpoints/<step>`; orbax writes it under another name
and renames it, so a killed process leaves either a whole checkpoint or a temporary folder that the next run removes.
Before that, the SHA-256 of each of its files is put beside them (`sums.json`): what was damaged since is found out
before anything of it is restored. A checkpoint without sums (an older version wrote it) is taken as it is.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import options as ocp_options

from maskclip_jax.checkpoints.orbax_io import quiet_orbax
from maskclip_jax.data.sums import SUMS, damaged_files, read_sums, with_digest, write_sums
from maskclip_jax.data.whole_files import read_json, reason, remove_surely, write_json
from maskclip_jax.errors import UserError
from maskclip_jax.ops import hosts

FOLDER, DAMAGED = "checkpoints", "damaged"
SCORE = "mIoU"
_REMAINS = "*.orbax-checkpoint-tmp*"
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes times to these last of all, and reads neither


class DamagedCheckpoint(UserError):
    """A checkpoint that is there, but is not what was written, or is another state's."""


class Checkpoints:
    """The checkpoints of one run's folder. Use as a context manager: leaving it waits for what is being written.

    On several hosts every method is called on all of them, and the folder is on a file system that all of them share.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep_last: int = 3,
        read_only: bool = False,
        about: Mapping[str, str] = MappingProxyType({}),
    ):
        """`about` is kept with every checkpoint that is saved (`about_of`)."""
        self.folder, self._about = Path(workdir).absolute() / FOLDER, dict(about)
        self._keep_last, self._read_only = keep_last, read_only
        self._scores: dict[int, float | None] = {}
        with contextlib.ExitStack() as quiet:
            quiet.enter_context(quiet_orbax())
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                step_format_fixed_length=8,
                read_only=read_only,
                create=not read_only,
                async_options=ocp_options.AsyncOptions(post_finalization_callback=self._written),
            )
            try:
                if not read_only and jax.process_index() == 0:
                    self.folder.mkdir(parents=True, exist_ok=True)  # a file in the way: orbax tells with the first one
                    _remove_remains(self.folder)
                self._manager = ocp.CheckpointManager(self.folder, options=options)
            except Exception as error:  # orbax raises what it meets: a file in the way, no permission, a full disk
                why = reason(error)
                raise UserError(f"checkpoints need a folder, but {self.folder} is not usable ({why})") from error
            self._quiet = quiet.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        with self._quiet:
            try:
                with _writing(self.folder):
                    self._manager.close()  # waits for what is being written
            except UserError:
                if kind is None:
                    raise  # else the first error is raised

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
        """The step with the best score (of equal ones the last), None where none has one."""
        return self._best(self.steps)

    def _best(self, steps: Sequence[int]) -> int | None:
        scored = [(score, step) for step in steps if (score := self.score(step)) is not None]
        return max(scored)[1] if scored else None

    def score(self, step: int) -> float | None:
        """The score of a step's checkpoint, None where it has none."""
        if step not in self._scores:
            self._scores[step] = _stored_score(self.folder / f"{step:08d}")
        return self._scores[step]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Called by orbax after saving: which checkpoints stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep_last :], self._best(steps)}
        return [step in kept for step in steps]

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Copies `state` and returns; writing goes on in the background. Of scores see `set_score`.

        Args:
          step: optimiser steps taken.
          state: a pytree of arrays, the same on all devices.
        """
        self._scores[step] = None if score is None or math.isnan(score) else float(score)
        with _writing(self.folder):
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def set_score(self, step: int, score: float) -> None:
        """The score (mIoU in 0..1) of a checkpoint, which may be measured after it was saved; the best one is kept."""
        self.wait()
        self._scores[step] = None if math.isnan(score) else float(score)
        path = self.folder / f"{step:08d}"
        if jax.process_index() == 0 and (path / SUMS).exists():  # older checkpoints have none
            write_json(path / SUMS, with_digest(read_sums(path) | {SCORE: self._scores[step]}))

    def wait(self) -> None:
        """Until everything is written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state at a step (None: the latest), with the structure, shapes, types and placement of `like`.

        Raises:
          DamagedCheckpoint: it is not what was written, or another state's.
          UserError: there is no such checkpoint.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise UserError(
                f"checkpoints in {self.folder} are of steps {self.steps or 'none'}, got {step}: choose one of them"
            )
        path = self.folder / f"{step:08d}"
        state, damage = None, damaged_files(path)
        if not damage:
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))
            except Exception as error:  # orbax and tensorstore raise what they meet
                damage = reason(error, 300)
        if hosts.any_host(bool(damage)):
            raise DamagedCheckpoint(
                f"checkpoint {path} does not fit this run, or is damaged ({damage or 'on another host'}): "
                "remove its folder to go on from the one before"
            )
        return state

    def restore_newest(self, like: Any) -> Any:
        """The state of the newest checkpoint that is whole, or None where there is no checkpoint at all.

        Newer ones that are damaged are named in a warning and moved to `damaged/` (unless this is read-only).

        Raises:
          UserError: there are checkpoints, but none can be used; nothing was moved.
        """
        failed: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps):
            try:
                state = self.restore(like, step)
            except DamagedCheckpoint as error:
                failed[step] = error
                continue
            for bad, error in failed.items():
                moved = "" if self._read_only else f", and moved to {self._set_aside(bad)}"
                what = str(error).removesuffix(": remove its folder to go on from the one before")
                warnings.warn(f"{what}: left out{moved}; step {step} is taken instead", stacklevel=2)
            return state
        if failed:
            newest = failed[max(failed)]
            raise UserError(f"none of {len(failed)} checkpoints can be used: {newest}") from newest
        return None

    def _set_aside(self, step: int) -> Path:
        path, target = self.folder / f"{step:08d}", self.folder.with_name(DAMAGED) / f"{step:08d}"
        if jax.process_index() == 0:
            with _writing(self.folder):
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.rename(path, target)
        hosts.wait_for_all("damaged checkpoint moved")
        self._manager.reload()
        self._scores.pop(step, None)
        return target

    def _written(self) -> None:
        """For orbax, which calls it (in its thread) when all is written and nothing is renamed yet: the sums."""
        if jax.process_index() == 0:
            for path in self.folder.glob(_REMAINS):
                if not (path / SUMS).exists():
                    score = self._scores[int(path.name.partition(".")[0])]
                    write_sums(path, {SCORE: score, "about": self._about}, skip=_LATER)


def about_of(workdir: Path, step: int | None = None) -> dict[str, str]:
    """What was kept `about` the checkpoint of a step (None: the newest that has it); {} where none has."""
    steps = [step] if step is not None else sorted(_steps_of(workdir), reverse=True)
    for number in steps:
        with contextlib.suppress(UserError):
            about = read_sums(workdir / FOLDER / f"{number:08d}").get("about")
            if isinstance(about, dict) and all(isinstance(digest, str) for digest in about.values()):
                return about
    return {}


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run's folder holds a checkpoint, whole or not."""
    return bool(_steps_of(workdir))


def _steps_of(workdir: Path) -> list[int]:
    return [int(path.name) for path in (workdir / FOLDER).glob("*") if path.name.isdecimal() and path.is_dir()]


def _stored_score(path: Path) -> float | None:
    """The score kept with a checkpoint's sums (before there were any: by orbax); None where it has none."""
    with contextlib.suppress(UserError, KeyError):
        value = read_sums(path)[SCORE] if (path / SUMS).exists() else read_json(path / "metrics" / "metrics")[SCORE]
        if isinstance(value, int | float) and 0 <= value <= 1:
            return float(value)
    return None


def _remove_remains(folder: Path) -> None:
    """What a killed process left half written. Orbax overlooks those that were killed just before their renaming."""
    for path in folder.glob(_REMAINS):
        remove_surely(path)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    sharding = x.sharding if isinstance(x, jax.Array) else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What cannot be written is one line, and leaves nothing half written behind."""
    try:
        yield
    except Exception as error:  # OSError, and of tensorstore ValueError (RESOURCE_EXHAUSTED, PERMISSION_DENIED …)
        if jax.process_index() == 0:
            _remove_remains(folder)
        raise UserError(
            f"a checkpoint must be writable, but {folder} is not ({reason(error)}): make room, run again to go on"
        ) from error
