"""Weight files -> named NumPy arrays: safetensors (also sharded), Flax msgpack, and, with torch, PyTorch's pickles."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from maskclip_jax.errors import UserError

SUFFIXES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth")


def read_arrays(path: Path) -> Mapping[str, Any]:
    """The arrays of one weight file, or of the shards that a `….safetensors.index.json` names.

    Raises:
      UserError: missing, empty, truncated or not the kind of file its name says; or torch is needed and absent.
    """
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"weights are a file of {', '.join(SUFFIXES)}, but {path} came: give one of these")
    with _opened(path) as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return _read_msgpack(path) if path.suffix == ".msgpack" else _read_torch(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when it is missing or holds anything else."""
    try:
        with _opened(path) as file:
            value = json.loads(file.read().decode("utf-8"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}: take the original file")
    return value


class SafetensorsFile(Mapping):
    """The arrays of a safetensors file, each read from disk when asked for. bfloat16 comes as `ml_dtypes`' type."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(str(path), "np")
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name's shape, without reading its array."""
        return {key: tuple(self._file.get_slice(key).get_shape()) for key in self._keys}


class Shards(Mapping):
    """The arrays of several files as one mapping."""

    def __init__(self, files: Mapping[str, Mapping[str, Any]]):
        """`files`: name of the array -> the opened file that holds it."""
        self._files = files

    def __getitem__(self, key: str) -> Any:
        return self._files[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every name's shape, from the file's header where there is one."""
    return arrays.shapes() if isinstance(arrays, SafetensorsFile) else {k: np.shape(v) for k, v in arrays.items()}


def shard_map(index: Path) -> dict[str, str]:
    """Name of every array -> the file that holds it, from a `….safetensors.index.json`; files are its neighbours."""
    content = read_json(index)
    if "weight_map" not in content or not isinstance(content["weight_map"], dict):
        raise UserError(f"{index} must hold a weight_map from names to files: take the original file")
    for name in set(content["weight_map"].values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"a shard is a file in the folder of {index}, not {name!r}: take the original file")
    return content["weight_map"]


def _read_shards(index: Path) -> Shards:
    where = shard_map(index)
    opened = {name: read_arrays(index.parent / name) for name in sorted(set(where.values()))}
    for key, name in where.items():
        if key not in opened[name]:
            raise UserError(f"{index} says that {name} holds {key}, but it does not: download both again")
    # Arrays the index does not name must not pass unseen: they count as unknown in the two-sided check.
    unnamed = {key: file for file in opened.values() for key in file if key not in where}
    return Shards({key: opened[name] for key, name in where.items()} | unnamed)


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(path.read_bytes())
        flat = flatten_dict(tree, sep=".")
    except Exception as error:  # msgpack has its own exceptions, and a wrong file can trip any step of the decoding
        raise UserError(f"{path} is not a whole Flax msgpack file: copy or download it again") from error
    return {key.removeprefix("params."): value for key, value in flat.items()}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """A state dict, a training checkpoint that holds one, or OpenAI's TorchScript archive. Pickles: weights only."""
    with path.open("rb") as file:
        start = file.read(2)
    zipped = zipfile.is_zipfile(path)
    if not zipped and start[:1] != b"\x80":  # neither PyTorch's archive nor its older bare pickle
        raise UserError(f"{path} is not a whole PyTorch file: copy or download it again")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{path.name} is a PyTorch file, which needs torch: pip install "maskclip-jax[torch]", '
            "or use the checkpoint's safetensors"
        ) from error
    try:
        if zipped and _is_torchscript(path):
            with warnings.catch_warnings():  # newer torch deprecates TorchScript, which OpenAI's files are
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            state = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets, and then advises to unpickle unsafely
        raise UserError(
            f"{path} is not a whole PyTorch file of plain tensors (damaged, or it holds other objects): "
            "download it again, or save `model.state_dict()`"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} must hold named tensors (a state dict): save `model.state_dict()`")
    return {key: _numpy(value, torch) for key, value in state.items()}


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _opened(path: Path):
    if path.is_dir() or not path.exists():
        came = "a folder" if path.is_dir() else "missing"
        raise UserError(f"{path} must be a file, but is {came}: check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    return path.open("rb")
