"""A student by itself, and the one door to every student: a plain folder for other people's programs and for the hub.

config.json        FORMAT, the classes, `run` (the `DistillConfig`), which step it is, its scores if it was evaluated,
                   and the SHA-256 of the weights
model.safetensors  `params/…`, `batch_stats/…` and `text`, the classifier [C, E], in float32 or float16

It needs neither orbax nor optax, is read like a run's folder, and holds no path of the machine that it was made on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maskclip_jax.checkpoints.files import SafetensorsFile
from maskclip_jax.checkpoints.weights import why_unusable
from maskclip_jax.data import schema
from maskclip_jax.data.sums import digest_of
from maskclip_jax.data.whole_files import cut, is_count, new_folder, read_json, write_json
from maskclip_jax.distill import CONFIG, FORMAT, WEIGHTS, folder_of, is_plain, is_run
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import full_precision
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import create_student
from maskclip_jax.version import __version__

VERSION = 1  # of the folder's format
_PER_BLOCK = 15  # arrays of a bottleneck: three convolutions, three norms
DTYPES = ("float32", "float16")
_RULES = {
    "format": schema.one_of(FORMAT),
    "version": schema.whole(1, VERSION),
    "library": schema.text(),
    "classes": schema.several(schema.text(10_000), 1, 254),
    "step": schema.Rule("a whole number", lambda x: x if is_count(x) else schema.UNFIT),
    "chosen": schema.text(1000),
    "scores": schema.optional(schema.OBJECT),
    "sha256": schema.text(64),
    "run": schema.OBJECT,
}


def load_student(source: str | Path, which: str | int = "latest") -> TrainedStudent:
    """The student of a run, of a plain folder, or of the hub.

    Args:
      source: "embedded-student", which ships; a run's folder; one that `save_student` wrote; or a hub id, "owner/name",
        of such a one.
      which: of a run, "latest", a step, or "best" (by mIoU on the run's evaluation data, which then chose what is
        scored on it; the latest where none was measured). The others hold one checkpoint.

    Raises:
      UserError: no student there, no checkpoint, not that one, a damaged one.
    """
    folder = folder_of(source)
    if is_run(folder) or not is_plain(folder):
        from maskclip_jax.distill.run_folder import load_run

        return load_run(folder, which)
    if which != "latest":
        raise UserError(f"{source} holds one checkpoint, none of a choice, got {which}: leave the choice out")
    return read_student(folder)


def save_student(trained: TrainedStudent, path: str | Path, *, dtype: str = "float32") -> Path:
    """Writes a student as a plain folder at `path`, whole or not at all, and returns it.

    Args:
      path: must not exist.
      dtype: of the arrays, "float32" or "float16" (half the size; each number is rounded to 11 bits).

    Raises:
      UserError: `path` exists or cannot be written; numbers that float16 does not hold.
    """
    from safetensors.numpy import save_file

    path = Path(os.path.expanduser(path)).absolute()
    if dtype not in DTYPES:
        raise UserError(f"a student's dtype is {' or '.join(DTYPES)}, got {cut(dtype)}: choose one of them")
    with np.errstate(over="ignore"):
        arrays = {name: np.ascontiguousarray(value, dtype) for name, value in _arrays(trained).items()}
    if lost := [name for name, value in arrays.items() if not np.isfinite(value).all()]:
        raise UserError(f"a student's numbers must be finite in {dtype}, but {lost[0]}'s are not: use another dtype")
    with new_folder(path, "a student") as temporary:
        save_file(arrays, temporary / WEIGHTS, {"format": FORMAT})
        write_json(
            temporary / CONFIG,
            {
                "format": FORMAT,
                "version": VERSION,
                "library": __version__,
                "classes": trained.config.label_names,
                "step": trained.step,
                "chosen": trained.chosen,
                "scores": trained.scores,
                "sha256": digest_of(temporary / WEIGHTS),
                "run": _without_paths(trained.config).to_dict(),
            },
        )
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode)  # safetensors' file is its owner's alone
    return path


def read_about(folder: Path) -> dict[str, Any]:
    """The config.json of a plain folder, `run` as a `DistillConfig`. Raises UserError where it is none, or damaged."""
    found = schema.fields(read_json(folder / CONFIG), _RULES, str(folder / CONFIG), needed=_RULES)
    found["run"] = config = DistillConfig.from_dict(found["run"])
    if found["classes"] != config.label_names:
        raise UserError(f"{folder / CONFIG} names other classes than its run: take the original file")
    return found


def read_student(folder: Path) -> TrainedStudent:
    """The student of a plain folder. Raises UserError where it is damaged, or its arrays are not its config's."""
    about = read_about(folder)
    config, file = about["run"], folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}: copy or download it again")
    if digest_of(file) != about["sha256"]:
        raise UserError(f"{file} is not the one that {CONFIG} was written with: copy or download both again")
    arrays, student = SafetensorsFile(file), create_student(config.student_config)
    wanted = _shapes(config, arrays)
    misfit = sorted(set(wanted) ^ set(arrays)) or [k for k, v in wanted.items() if v.shape != arrays.shapes()[k]]
    if misfit:
        raise UserError(f"{file} does not hold the arrays of its {CONFIG} ({cut(', '.join(misfit[:4]))}): take another")
    filled = {}
    for name, like in wanted.items():
        value = arrays[name]
        filled[name] = number = np.asarray(value, like.dtype)
        kind = name.replace("/var", "/running_var") if name.startswith("batch_stats") else name
        if why := why_unusable(kind, value.dtype, [number]):
            raise UserError(f"weights are finite floating-point numbers, but {name} {why}: take the original file")
    text = filled.pop("text")
    made = about["step"], about["chosen"], about["scores"]
    return TrainedStudent(config, student, unflatten_dict(filled, sep="/"), text, *made)


def _arrays(trained: TrainedStudent) -> dict[str, np.ndarray]:
    variables = {name: trained.variables[name] for name in ("params", "batch_stats")}
    return flatten_dict(variables, sep="/") | {"text": trained.text}


def _shapes(config: DistillConfig, arrays: SafetensorsFile) -> dict[str, Any]:
    """Name -> shape and type of what the weights must hold."""
    dtype = full_precision(config.dtype)
    shape = arrays.shapes().get("text", ())
    if len(shape) != 2 or shape[0] != len(config.class_names):
        raise UserError(f"a student's text is [{len(config.class_names)}, E], got {shape}: take the original file")
    if (layers := sum(config.student_config.variant.layers)) * _PER_BLOCK > len(arrays):  # before any is built
        raise UserError(f"a student of {layers} blocks has more arrays than {len(arrays)}: take the original folder")
    text, student = jax.ShapeDtypeStruct(shape, np.float32), create_student(config.student_config)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.dtype(dtype))
    return flatten_dict(dict(shapes_of(student, image, text)), sep="/") | {"text": text}


def _without_paths(config: DistillConfig) -> DistillConfig:
    """The config with the last parts of this machine's paths alone: a student goes to other people."""

    def last(value: str) -> str:
        return PurePath(value).name if PurePath(value).is_absolute() or value.startswith(("~", "..")) else value

    with contextlib.suppress(UserError):  # a path of which no name is left
        places = ("train_data", "eval_data", "labels_from", "backbone_weights", "init_from")
        found = {name: last(value) for name in places if (value := getattr(config, name))}
        teacher = dataclasses.replace(config.teacher, model=last(config.teacher.model))
        return dataclasses.replace(config, **found, teacher=teacher)
    return config
