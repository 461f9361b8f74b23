"""The folder of a run: which config it belongs to, and a trained student read back from it.

config.json     what the run is (`DistillConfig`); another config is refused
text.npy        the classifier [C, E] that teacher and student share: a student needs no teacher afterwards
checkpoints/    `checkpoint.py`       metrics.jsonl, events/    `metrics.py`       scores.json    the last evaluation
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maskclip_jax.data.images import atomic_path, write_json
from maskclip_jax.distill import hosts
from maskclip_jax.distill.checkpoint import FOLDER, Checkpoints
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.layout import CONFIG, TEXT
from maskclip_jax.distill.step import TrainState, create_train_state
from maskclip_jax.distill.students import Student, create_student
from maskclip_jax.errors import UserError


class TrainedStudent(NamedTuple):
    """A student out of a run's folder: `student.apply(variables, images, text)` gives logits."""

    config: DistillConfig
    student: Student
    variables: dict[str, Any]  # "params" and "batch_stats", float32, on the host
    text: Float[np.ndarray, "C E"]
    step: int
    chosen: str = ""  # how the step was chosen, in words

    @property
    def origin(self) -> str:
        """Which checkpoint it is, and how it was chosen, for a line."""
        return f"checkpoint: step {self.step} of {self.config.steps}" + f", {self.chosen}" * bool(self.chosen)


def claim(config: DistillConfig, workdir: Path, *, resume: bool) -> bool:
    """Makes the folder this run's (True), or makes sure that it is already (False); all hosts call it.

    Raises:
      UserError: it holds another config, something else, or (without `resume`) this run already.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        content = sorted(path.name for path in workdir.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"a run needs a folder, but {workdir} cannot be one ({error.strerror}): choose another"
        ) from error
    if CONFIG in content:
        different = _differences(read_config(workdir).to_dict(), config.to_dict())
        if different:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in different[:4])
            raise UserError(f"{workdir} belongs to a run of another config ({shown}): choose another folder")
        if not resume:
            raise UserError(f"{workdir} holds this run already: resume it, or choose another folder")
    elif content:
        raise UserError(
            f"a run starts in an empty folder, but {workdir} holds {', '.join(content[:4])}: choose another"
        )
    hosts.wait_for_all("folder checked")  # nobody writes before everybody has looked
    if hosts.is_first_host() and CONFIG not in content:
        write_json(workdir / CONFIG, config.to_dict())
    hosts.wait_for_all("folder claimed")
    return CONFIG not in content


def abandon(workdir: Path) -> None:
    """Takes back what `claim` and `keep_text` made for a run that never took a step."""
    if hosts.is_first_host():
        for name in (CONFIG, TEXT):
            (workdir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is not empty is not ours alone
            for folder in (workdir / FOLDER, workdir):
                if folder.is_dir():
                    folder.rmdir()


def keep_text(workdir: Path, text: Float[Array | np.ndarray, "C E"]) -> None:
    """Stores the classifier, or makes sure that it is the one that the run began with (UserError)."""
    path, text = workdir / TEXT, np.asarray(text, np.float32)
    if path.is_file():
        before = np.load(path, allow_pickle=False)
        if before.shape != text.shape or not np.allclose(before, text, atol=1e-3):
            raise UserError(
                f"the teacher's text embeddings must be those that the run began with, but {path} holds others: "
                "use the same checkpoint, or another folder"
            )
    elif hosts.is_first_host():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, text)


def read_config(workdir: str | Path) -> DistillConfig:
    """The config of a run's folder. Raises UserError where there is none, or it does not fit this version."""
    path = Path(workdir) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"a run's folder holds {CONFIG}, but {path} cannot be read ({error}): check the path"
        ) from error
    return DistillConfig.from_dict(values)


def load_student(workdir: str | Path, which: str | int = "latest") -> TrainedStudent:
    """The student of a run.

    Args:
      workdir: its folder.
      which: "latest", a step, or "best" (by mIoU on the run's evaluation data, which then chose what is scored on it;
        the latest where none was measured).

    Raises:
      UserError: no run, no checkpoint, or not that one.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    if not (workdir / TEXT).is_file() or not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoint yet: let the run get to its first one")
    text = np.load(workdir / TEXT, allow_pickle=False)
    student = create_student(config.student_config)
    like = abstract_state(config, student, text, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    with Checkpoints(workdir, keep_last=config.keep_last, read_only=True) as checkpoints:
        best = checkpoints.best if which == "best" else None
        step = best or (checkpoints.latest if which in ("best", "latest") else which)
        state = checkpoints.restore(like, step)
    variables = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    by_score = f"the best on its evaluation data, {config.eval_data}, which chose it"
    chosen = {"latest": "the latest", "best": by_score if best else "the latest, for none has a score"}
    return TrainedStudent(config, student, variables, text, int(state.step), chosen.get(which, "as asked for"))


def is_finite(tree: Any) -> bool:
    """Whether all floating point arrays of a tree are finite."""
    return bool(_all_finite([x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]))


@jax.jit
def _all_finite(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def abstract_state(
    config: DistillConfig, student: Student, text: Float[Array | np.ndarray, "C E"], sharding: jax.sharding.Sharding
) -> TrainState:
    """Shapes, types and placement of a run's state: what a checkpoint is restored to, nothing computed or read."""
    plain: dict[str, Any] = {"backbone_weights": None}  # weights to start from change no shape
    if config.mode == "finetuned-clip":
        plain |= {"mode": "supervised", "mapper": None, "unseen": ()}
    config = dataclasses.replace(config, **plain)
    state = jax.eval_shape(lambda: create_train_state(config, student, text, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found
