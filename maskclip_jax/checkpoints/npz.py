"""NumPy's `.npz` files as named arrays: memory-mapped where nothing is compressed, and never unpickled."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from maskclip_jax.checkpoints.memory import ArrayFile, read_whole, stored_at
from maskclip_jax.data.whole_files import cut
from maskclip_jax.errors import UserError

_DTYPES = {2: np.dtype(ml_dtypes.bfloat16)}  # NumPy writes bfloat16 as two bytes of no type


class Array(NamedTuple):
    """Where an array lies: its type and shape, its order ("C" or "F"), and the bytes before it in the member."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: str
    start: int


class NpzFile(ArrayFile):
    """The arrays of an `.npz` file; those that are stored as they are, as views of the file's pages."""

    def __init__(self, path: Path):
        """Reads names, types and shapes. Raises UserError for what is no whole `.npz`, or holds Python objects."""
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            members = {member.filename.removesuffix(".npy"): member for member in self._zip.infolist()}
            self._arrays = {name: self._header(name, member) for name, member in members.items()}
        except UserError:
            raise
        except Exception as error:  # a damaged file trips any step of zipfile and of NumPy's own parser
            reason = cut(str(error), 80)
            raise UserError(f"{path} is not a whole .npz file ({reason}): copy or download it again") from error
        self._members, self._shapes = members, {name: array.shape for name, array in self._arrays.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        array, member = self._arrays[key], self._members[key]
        if 0 in array.shape:
            return np.zeros(array.shape, array.dtype)
        try:
            if member.compress_type == zipfile.ZIP_STORED:
                return self._mapped(array, member)
            with self._zip.open(member) as file:
                file.read(array.start)
                data = read_whole(file, array.dtype.itemsize * math.prod(array.shape)).view(array.dtype)
            return data.reshape(array.shape, order=array.order)  # pyright: ignore[reportArgumentType]: "C" or "F"
        except Exception as error:  # as above
            reason = cut(str(error), 80)
            raise UserError(f"{self._path}: {cut(key, 80)} is damaged ({reason}): copy or download it again") from error

    def _header(self, name: str, member: zipfile.ZipInfo) -> Array:
        with self._zip.open(member) as file:
            array = read_header(file, name)
        if array.start + array.dtype.itemsize * math.prod(array.shape) != member.file_size:
            raise ValueError(f"{cut(name, 60)} is not as long as its shape says")
        return array

    def _mapped(self, array: Array, member: zipfile.ZipInfo) -> np.ndarray:
        start, order = stored_at(self._path, member) + array.start, cast(Any, array.order)
        return np.memmap(self._path, array.dtype, "r", start, array.shape or (1,), order).reshape(array.shape)


def read_header(file: io.BufferedIOBase, name: str) -> Array:
    """The header of an `.npy` file. Raises UserError where it holds Python objects, ValueError where it is none."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{cut(name, 60)} has version {version} of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UserError(
            f"{cut(name, 80)} holds Python objects, which are never unpickled: save numbers, as np.savez does of arrays"
        )
    if dtype.kind == "V":
        dtype = _DTYPES.get(dtype.itemsize, dtype)
    return Array(dtype, tuple(shape), "F" if fortran else "C", file.tell())
