"""Weight files -> named NumPy arrays: safetensors and PyTorch's files (both also sharded), Flax msgpack, `.npz`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maskclip_jax.checkpoints.memory import ArrayFile, array_shapes
from maskclip_jax.checkpoints.msgpack_files import read_msgpack
from maskclip_jax.checkpoints.npz import NpzFile
from maskclip_jax.checkpoints.torch_files import TorchFile
from maskclip_jax.data import schema
from maskclip_jax.data.whole_files import cut, read_json
from maskclip_jax.errors import UserError

SUFFIXES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth", ".npz")
INDICES = (".safetensors.index.json", ".bin.index.json")
_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{
        f"{sign}{bits}": np.dtype(f"{name}{bits}")
        for sign, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


def read_arrays(path: Path) -> Mapping[str, Any]:
    """The arrays of one weight file, or of the shards that a `….safetensors.index.json` or `….bin.index.json` names.

    Raises:
      UserError: missing, empty, truncated or not the kind of file its name says.
    """
    if path.name.lower().endswith(INDICES):
        return _read_shards(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"weights are a file of {', '.join(SUFFIXES)}, got {path}: give one of these")
    with _opened(path) as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if suffix in (".safetensors", ".npz"):
        return SafetensorsFile(path) if suffix == ".safetensors" else NpzFile(path)
    return read_msgpack(path) if suffix == ".msgpack" else TorchFile(path)


class SafetensorsFile(ArrayFile):
    """The arrays of a safetensors file, each a view of the file's pages; bfloat16 and fp8 are `ml_dtypes`' types."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:  # the library checks that names, shapes and places fit each other and the file
            with safe_open(str(path), "np"):
                pass
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (SafetensorError, ValueError, RecursionError) as error:
            reason = cut(str(error))
            raise UserError(f"{path} is not a whole safetensors file ({reason}): copy or download it again") from error
        header.pop("__metadata__", None)
        self._path, self._header = path, header
        self._numbers = np.asarray(np.memmap(path, np.uint8, "r"))[8 + size :]
        self._shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self._header[key]
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            known = ", ".join(_SAFETENSORS_DTYPES)
            raise UserError(f"{self._path}: {cut(key, 80)} is of type {entry['dtype']}, not {known}: save it as F32")
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), self._shapes[key]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return self._numbers[slice(*entry["data_offsets"])].view(dtype).reshape(shape)


class Shards(ArrayFile):
    """The arrays of several files as one mapping."""

    def __init__(self, files: Mapping[str, Mapping[str, Any]]):
        """`files`: name of the array -> the opened file that holds it."""
        self._files = files
        known = {file: array_shapes(opened) for file, opened in {id(x): x for x in files.values()}.items()}
        self._shapes = {key: known[id(file)][key] for key, file in files.items()}

    def __getitem__(self, key: str) -> Any:
        return self._files[key][key]


def shard_map(index: Path) -> dict[str, str]:
    """Name of every array -> the file that holds it, from an index; files are its neighbours, of the kind it names."""
    rules = {"weight_map": schema.OBJECT}
    files = schema.fields(read_json(index), rules, str(index), needed=rules)["weight_map"]
    suffix = Path(index.name[: -len(".index.json")]).suffix.lower()
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not name.lower().endswith(suffix):
            raise UserError(f"a shard is a file in the folder of {index}, not {cut(name, 60)}: take the original file")
    return files


def _read_shards(index: Path) -> Shards:
    where = shard_map(index)
    opened = {name: read_arrays(index.parent / name) for name in sorted(set(where.values()))}
    for key, name in where.items():
        if key not in opened[name]:
            raise UserError(f"{index} says that {name} holds {cut(key, 80)}, but it does not: download both again")
    # Arrays the index does not name must not pass unseen: they count as unknown in the two-sided check.
    unnamed = {key: file for file in opened.values() for key in file if key not in where}
    return Shards({key: opened[name] for key, name in where.items()} | unnamed)


def _opened(path: Path):
    if path.is_dir() or not path.exists():
        came = "a folder" if path.is_dir() else "missing"
        raise UserError(f"{path} must be a file, but is {came}: check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    return path.open("rb")
