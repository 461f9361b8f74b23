"""Arrays of a file -> arrays of this process, a block at a time: a checkpoint is in memory once while it is loaded.

XLA's CPU backend takes an array as it is where it starts at a multiple of 64 bytes, and copies it otherwise: what is
loaded is therefore written into memory of that alignment, and the file's pages are let go behind it.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

BLOCK = 2**24  # bytes that are copied before the file's pages are let go
_ALIGNMENT = 64  # bytes: of XLA's buffers
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name and extra field


class ArrayFile(Mapping):
    """Named arrays that are read when they are asked for; their names and shapes are known before."""

    _shapes: Mapping[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every name's shape, without reading its array."""
        return self._shapes


def array_shapes(arrays: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Every name's shape, from the file's header where there is one."""
    return arrays.shapes() if isinstance(arrays, ArrayFile) else {k: np.shape(v) for k, v in arrays.items()}


def stored_at(path: Path, member: zipfile.ZipInfo) -> int:
    """The file's byte at which a zip's uncompressed member begins. Raises ValueError where it is cut."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        signature, name, extra = struct.unpack("<4s22x2H", file.read(_LOCAL_HEADER))
    start = member.header_offset + _LOCAL_HEADER + name + extra
    if signature != b"PK\x03\x04" or start + member.file_size > path.stat().st_size:
        raise ValueError("cut")
    return start


class Owned(np.ndarray):
    """An array that the loader made for itself, in memory aligned for XLA: it may be handed on without a copy."""


def aligned(shape: tuple[int, ...], dtype: Any) -> Owned:
    """An array without values, in C order."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape).view(Owned)


def read_whole(file: io.BufferedIOBase, size: int) -> Owned:
    """The next `size` bytes of an open file or a zip's member. Raises ValueError where there are fewer."""
    out, done = aligned((size,), np.uint8), 0
    for start in range(0, size, BLOCK):
        part = file.read(min(BLOCK, size - start))
        out[start : start + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    if done < size:
        raise ValueError("cut")
    return out


def as_float32(array: np.ndarray | np.generic) -> np.ndarray:
    """`array` as float32 in C order, aligned: itself where it is `Owned` and so already, else a copy made in blocks."""
    array = np.asanyarray(array)
    usable = array.dtype == np.float32 and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0
    if usable and isinstance(array, Owned):
        return np.asarray(array)
    pages = _mapped(array)
    transposed = array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous
    if transposed and array.dtype == np.float32 and array.nbytes <= BLOCK:
        with contextlib.suppress(RuntimeError):  # JAX without its CPU backend
            turned = jax.device_put(np.asarray(array), jax.local_devices(backend="cpu")[0])
            out = np.asarray(turned)  # in XLA's own memory; it transposes twice as fast as NumPy
            let_go(pages)
            return out
    out = aligned(array.shape, np.float32)
    if array.nbytes <= BLOCK:
        out[...] = array
    else:  # along the axis whose steps are the largest in the file, so that every page is visited once
        axis = max(range(array.ndim), key=lambda n: abs(array.strides[n]) if array.shape[n] > 1 else -1)
        step = max(1, array.shape[axis] * BLOCK // array.nbytes)
        for start in range(0, array.shape[axis], step):
            block = (slice(None),) * axis + (slice(start, start + step),)
            out[block] = array[block]
            let_go(pages)
    let_go(pages)
    return np.asarray(out)


def let_go(pages: mmap.mmap | np.ndarray | None) -> None:
    """Tells the system that a mapped file's pages are not needed in memory now; they stay in its cache."""
    pages = _mapped(pages) if isinstance(pages, np.ndarray) else pages
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _mapped(array: np.ndarray) -> mmap.mmap | None:
    """The file that an array is a view of, where it is one that cannot be written to."""
    base: Any = array
    while isinstance(base, np.ndarray) and not base.flags.writeable:
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) else None
