"""A CLIP as an orbax checkpoint folder, which loads memory-mapped: what `run.py convert` writes.

`arrays/` is an ordinary orbax checkpoint of float32 arrays, one uncompressed file each, so that on a CPU the model's
parameters *are* the files' pages, read when first touched and shared between processes. Beside it lie `clip.json` (the
architecture), `preprocess.json`, `maskclip.json` (the reading) and `tokenizer.json`, and `sums.json` with the SHA-256
of them all: loading reads every file once to compare, so that no byte that has changed goes unnoticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maskclip_jax.checkpoints.config_rules import from_json, to_json
from maskclip_jax.checkpoints.folders import Parts, read_reading
from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from maskclip_jax.checkpoints.weights import abstract_variables, check_depth, check_scale
from maskclip_jax.data import schema
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.data.sums import SUMS, damaged_files, write_sums
from maskclip_jax.data.whole_files import cut, is_count, new_folder, read_json
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.errors import UserError

_CHUNK = schema.Rule("a whole number", lambda x: x if is_count(x) else schema.UNFIT)
_ZARR = {  # of an array's `.zarray`
    "shape": schema.several(_CHUNK, 0, 32),
    "chunks": schema.several(_CHUNK, 0, 32),
    "dtype": schema.one_of("<f4", "<f2", "<f8", "bfloat16"),
    "order": schema.one_of("C", "F"),
    "compressor": schema.optional(schema.OBJECT),
    "filters": schema.optional(schema.several(schema.OBJECT, 0, 8)),
}


def is_converted(path: Path) -> bool:
    """Whether `path` is a folder that `save_converted` wrote."""
    return (path / "clip.json").is_file()


def save_converted(pretrained: Pretrained, path: str | Path) -> Path:
    """Writes a checkpoint folder at `path`, whole or not at all, and returns it.

    Fidelity is how a checkpoint is read, not what it is, so it is not stored: load with the default first.

    Raises:
      UserError: `path` exists or cannot be written, or `pretrained` has other image statistics than its checkpoint.
    """
    path = Path(os.path.expanduser(path)).absolute()
    fidelity = pretrained.config.fidelity
    if (fidelity.image_statistics, fidelity.image_resize) != ("checkpoint", "checkpoint"):
        raise UserError("a checkpoint is converted with its own image statistics: load it with fidelity='clip'")
    if not pretrained.config.has_text:
        raise UserError("a checkpoint is converted whole, got an image tower alone: load both towers")
    with new_folder(path, "a checkpoint") as temporary:
        needed, free = 4 * sum(map(np.size, jax.tree.leaves(_kept(pretrained)))), shutil.disk_usage(temporary).free
        if free < needed:
            raise UserError(f"{path} takes {needed / 2**20:.1f} MiB, but {free / 2**20:.1f} are free: make room")
        _write_arrays(temporary / "arrays", _kept(pretrained))
        _write_json(temporary / "clip.json", to_json(pretrained.config))
        _write_json(temporary / "preprocess.json", dataclasses.asdict(pretrained.preprocess))
        _write_json(temporary / "maskclip.json", dataclasses.asdict(pretrained.reading))
        if isinstance(pretrained.tokenizer, Tokenizer):
            pretrained.tokenizer.save(temporary)
        write_sums(temporary)
    return path


def load_converted(path: Path) -> tuple[Parts, dict[str, Any]]:
    """What `save_converted` wrote: its parts (without `arrays`) and its variables."""
    if damage := damaged_files(path):
        raise UserError(
            f"{path} has changed since it was converted ({damage}): convert again, or remove its {SUMS} if that was you"
        )
    config = _fitting(from_json, path / "clip.json")
    preprocess = _fitting(Preprocess.from_json, path / "preprocess.json")
    variables = load_variables(path / "arrays", config)
    check_scale(variables["params"]["logit_scale"])
    tokenizer = functools.partial(load_tokenizer, path, config.text)
    return Parts({}, config, tokenizer, preprocess, read_reading(path)), variables


def _fitting(read: Callable[[Any, str], Any], path: Path) -> Any:
    content = read_json(path)
    try:
        return read(content, path.name)
    except UserError as error:
        raise UserError(f"{path} does not fit this version ({error}): convert again") from error


def load_variables(path: Path, config: CLIPConfig) -> dict[str, Any]:
    """The variables in an orbax checkpoint, memory-mapped where its arrays are plain files, else through orbax.

    Raises UserError when they are not this architecture's.
    """
    if not (path / "_METADATA").is_file():
        raise UserError(f"{path} is not a whole orbax checkpoint: convert the model again")
    if not (path / "manifest.ocdbt").is_file():  # a folder for every array
        check_depth(config, sum(entry.is_dir() for entry in path.iterdir()))
    wanted = abstract_variables(config)
    filled = {name: _mapped(path / name.replace("/", "."), expected.shape) for name, expected in wanted.items()}
    if any(array is None for array in filled.values()):
        filled = _restored(path, wanted)
    misfit = sorted(set(wanted) ^ set(filled)) or [k for k in wanted if np.shape(filled[k]) != wanted[k].shape]
    if misfit:
        raise UserError(f"{path} does not hold this architecture's arrays ({', '.join(misfit[:4])}): convert again")
    # On a CPU this copies nothing: a file's pages are aligned as XLA wants its buffers.
    return unflatten_dict({name: jax.device_put(array) for name, array in filled.items()}, sep="/")


def _mapped(folder: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The one uncompressed float32 chunk of a zarr array of this shape; None when it is stored in another way."""
    header, chunk = folder / ".zarray", folder / (".".join("0" * len(shape)) or "0")
    if not header.is_file():
        return None
    zarr = schema.fields(read_json(header), _ZARR, str(header), needed=_ZARR)
    # Sizes first, whoever reads the array: a chunk is allocated whole.
    if zarr["shape"] != shape or len(zarr["chunks"]) != len(shape) or any(map(_beyond, zarr["chunks"], shape)):
        raise UserError(
            f"{folder} holds {cut(zarr['shape'], 40)} in {cut(zarr['chunks'], 40)}, not {shape}: convert again"
        )
    plain = {"chunks": shape, "dtype": "<f4", "order": "C", "compressor": None, "filters": None}
    if any(zarr[key] != value for key, value in plain.items()):
        chunks = math.prod(-(-side // size) for side, size in zip(shape, zarr["chunks"], strict=True))
        if sum(file.is_file() for file in folder.rglob("[0-9]*")) < chunks:  # orbax would take zeros for those
            raise UserError(f"{folder} lacks some of its {chunks} chunks: convert the model again")
        return None
    if not chunk.is_file() or chunk.stat().st_size != 4 * int(np.prod(shape)):
        raise UserError(f"{chunk} is missing or truncated: convert the model again")
    return np.asarray(np.memmap(chunk, np.float32, "r", shape=shape or (1,))).reshape(shape)


def _beyond(chunk: int, side: int) -> bool:
    return not 1 <= chunk <= max(side, 1)


def _restored(path: Path, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    as_numpy = unflatten_dict({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}, sep="/")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # orbax and tensorstore raise what they meet
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a whole orbax checkpoint ({reason}): convert the model again") from error
    return {name: np.asarray(array, np.float32) for name, array in flatten_dict(tree, sep="/").items()}


def _kept(pretrained: Pretrained) -> dict[str, Any]:
    return {name: tree for name, tree in pretrained.variables.items() if name in ("params", "batch_stats")}


def _write_arrays(path: Path, variables: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    variables = jax.tree.map(lambda array: np.asarray(array, np.float32), variables)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(variables))


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax warns of what is meant so, logs every error that it raises, and goes on writing after the first one,
    whose threads then find their event loop closed and say so on stderr."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook

    def speak(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and "Event loop is closed" in str(what.exc_value)):
            hook(what)

    level = log.level
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = speak
    try:
        yield
    except BaseException:
        time.sleep(0.5)
        raise
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
