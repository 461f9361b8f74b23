"""A training run's folder: its config, one run at a time, and the trained student read back from it.

config.json     what the run is (`DistillConfig`); another config is refused
text.npy        the classifier [C, E] that teacher and student share: a student needs no teacher afterwards
checkpoints/    `checkpoint.py`       metrics.jsonl, events/    `run_log.py`       scores.json    the last evaluation
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maskclip_jax.data.whole_files import cut, json_bytes, locked, read_bytes, read_json, write_bytes
from maskclip_jax.distill import CONFIG, TEXT
from maskclip_jax.distill.checkpoint import FOLDER, Checkpoints, DamagedCheckpoint, about_of, has_checkpoints
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.distill.step import TrainState, create_train_state
from maskclip_jax.errors import UserError
from maskclip_jax.ops import hosts
from maskclip_jax.students import Student, create_student

LOCK = ".lock"
MOST_TEXT = 2**30  # bytes of a classifier


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """No other run works in this folder meanwhile; all hosts call it, the first one locks. Raises UserError."""
    with contextlib.ExitStack() as stack:
        refused = None
        if hosts.is_first_host():
            try:
                stack.enter_context(locked(workdir / LOCK, f"{workdir}"))
            except UserError as error:
                refused = error
        if hosts.any_host(refused is not None):
            raise refused or UserError(f"{workdir} is worked on by one run at a time: see the first host's message")
        yield


def claim(config: DistillConfig, workdir: Path, *, resume: bool) -> bool:
    """Makes the folder this run's (True), or makes sure that it is already (False); all hosts call it.

    A folder whose run never came to a step (it was killed before, or another host's data did not fit) is free again.

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
    written = json_bytes(config.to_dict())
    ours = CONFIG in content and not _anothers_config(workdir)
    free = set(content) <= {CONFIG, TEXT, FOLDER} and not has_checkpoints(workdir) and (ours or CONFIG not in content)
    torn = not free and ours and _torn_config(workdir, written)
    if not free and ours and not torn:
        different = _differences(read_config(workdir).to_dict(), config.to_dict())
        if different:
            shown = "; ".join(f"{key}: {cut(old, 60)} there, {cut(new, 60)} now" for key, old, new in different[:4])
            raise UserError(f"{workdir} belongs to a run of another config ({shown}): choose another folder")
        if not resume:
            raise UserError(f"{workdir} holds this run already: resume it, or choose another folder")
    elif not free and not torn:
        raise UserError(
            f"a run starts in an empty folder, but {workdir} holds {', '.join(content[:4])}: choose another"
        )
    hosts.wait_for_all("folder checked")  # no host writes before all have checked
    if hosts.is_first_host() and (free or torn):
        if free:
            (workdir / TEXT).unlink(missing_ok=True)
        write_bytes(workdir / CONFIG, written)
    hosts.wait_for_all("folder claimed")
    return free


def _anothers_config(workdir: Path) -> bool:
    """Whether config.json is whole and no run's: a checkpoint's, for instance."""
    try:
        content = read_json(workdir / CONFIG)
    except UserError:
        return False  # damaged: `_torn_config` decides
    return not (isinstance(content, dict) and {"classes", "student"} <= content.keys())


def _torn_config(workdir: Path, written: bytes) -> bool:
    """Whether config.json is damaged (a power loss, a full disk) and known to have been `written`.

    Raises UserError where it is damaged and no sums name the config that the checkpoints belong to.
    """
    try:
        read_config(workdir)
    except UserError as error:
        if not has_checkpoints(workdir) or about_of(workdir).get(CONFIG) == hashlib.sha256(written).hexdigest():
            return True
        raise UserError(f"{error}; its checkpoints may be another run's: choose another folder") from error
    return False


def about(workdir: Path) -> dict[str, str]:
    """SHA-256 of the files that define a run's checkpoints, stored with each, so that a change is noticed."""
    return {name: hashlib.sha256(read_bytes(workdir / name, MOST_TEXT)).hexdigest() for name in (CONFIG, TEXT)}


def abandon(workdir: Path) -> None:
    """Takes back what `claim` and `keep_text` made for a run that never took a step."""
    if hosts.is_first_host():
        for name in (CONFIG, TEXT, LOCK):
            (workdir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is not empty is not ours alone
            for folder in (workdir / FOLDER, workdir):
                if folder.is_dir():
                    folder.rmdir()


def keep_text(workdir: Path, text: Float[Array | np.ndarray, "C E"]) -> None:
    """Stores the classifier, or makes sure that it is the one that the run began with (UserError).

    A damaged file is made again, where that gives the very bytes that the last checkpoint was saved beside.
    """
    path, text = workdir / TEXT, np.asarray(text, np.float32)
    buffer = io.BytesIO()
    np.save(buffer, text)
    kept, digest = about_of(workdir).get(TEXT), hashlib.sha256(buffer.getvalue()).hexdigest()
    before = None
    if path.exists():
        with contextlib.suppress(UserError):
            before = read_text(workdir)
        if before is not None and kept not in (None, about(workdir)[TEXT]):
            before = None  # readable, but not what was written
    if before is not None:
        same = before.shape == text.shape and np.allclose(before, text, atol=1e-3)
    else:
        same = kept in (None, digest)
    if not same:
        raise UserError(
            f"the teacher's text embeddings must be those that the run began with, but {path} holds others"
            f"{' or is damaged' * (before is None)}: use the same checkpoint, or another folder"
        )
    if before is None and hosts.is_first_host():
        write_bytes(path, buffer.getvalue())
    hosts.wait_for_all("text kept")


def read_text(workdir: Path) -> Float[np.ndarray, "C E"]:
    """The classifier of a run's folder. Raises UserError where it is missing or damaged."""
    path = workdir / TEXT
    try:
        text = np.load(io.BytesIO(read_bytes(path, MOST_TEXT)), allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # a damaged header raises what Python's own parser does
        raise UserError(f"{path} is damaged ({cut(str(error))}): run the same `distill` again, it mends it") from error
    if not isinstance(text, np.ndarray) or text.dtype != np.float32 or text.ndim != 2 or not np.isfinite(text).all():
        raise UserError(f"{path} must hold finite float32 [C, E], but does not: run the same `distill` again")
    return text


def read_config(workdir: str | Path) -> DistillConfig:
    """The config of a run's folder. Raises UserError where there is none, or it does not fit this version."""
    path = Path(workdir) / CONFIG
    try:
        return DistillConfig.from_dict(read_json(path))
    except UserError as error:
        raise UserError(f"a run's folder holds its {CONFIG}, but {path} cannot be read ({error})") from error


def load_run(workdir: str | Path, which: str | int = "latest") -> TrainedStudent:
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
    if not (workdir / TEXT).is_file() or not has_checkpoints(workdir):
        raise UserError(f"{workdir} holds no checkpoint yet: let the run get to its first one")
    text = read_text(workdir)
    student = create_student(config.student_config)
    like = abstract_state(config, student, text, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    with Checkpoints(workdir, keep_last=config.keep_last, read_only=True) as checkpoints:
        state, best = None, checkpoints.best if which == "best" else None
        if best is not None:
            try:
                state = checkpoints.restore(like, best)
            except DamagedCheckpoint as error:
                warnings.warn(f"{error}; the latest is taken instead of the best", stacklevel=2)
                best = None
        elif which not in ("best", "latest"):
            state = checkpoints.restore(like, which)
        state = checkpoints.restore_newest(like) if state is None else state
    written, found = about_of(workdir, int(state.step)), about(workdir)
    if changed := [name for name in written if found.get(name) != written[name]]:
        raise UserError(f"{workdir / changed[0]} is not the one that its checkpoints were written with: put it back")
    variables = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    by_score = f"the best on its evaluation data, {config.eval_data}, which chose it"
    chosen = {"latest": "the latest", "best": by_score if best else "the latest, for none has a score"}
    words = chosen.get(which, "as asked for")
    return TrainedStudent(config, student, variables, text, int(state.step), words, _scores(workdir, int(state.step)))


def _scores(workdir: Path, step: int) -> dict[str, Any] | None:
    """What the run's last evaluation found, where that was of this step."""
    with contextlib.suppress(UserError):
        found = read_json(workdir / "scores.json")
        return found if found.get("step") == step else None
    return None


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
