"""Flax's msgpack files -> named NumPy arrays, each a view of the file's pages.

Such a file is maps within maps, and arrays as `flax.serialization` packs them: an extension that holds shape, name of
the type and bytes. What else msgpack knows is left to Flax's own reader, which takes the whole file into memory: arrays
of over a gigabyte, which are cut into several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maskclip_jax.checkpoints.memory import ArrayFile
from maskclip_jax.errors import UserError

_SIZED = {  # first byte of an object whose length follows -> kind, bytes of that length
    **{0xD9 + n: ("text", 2**n) for n in range(3)},
    **{0xDE + n: ("map", 2 ** (n + 1)) for n in range(2)},
    **{0xC7 + n: ("array", 2**n) for n in range(3)},
    **{0xC4 + n: ("bytes", 2**n) for n in range(3)},
}
_ARRAY = 1  # Flax's number of an extension
_CHUNKED = "__msgpack_chunked_array__"
_HEAD = 512  # bytes that are enough for an array's shape and type


def read_msgpack(path: Path) -> Mapping[str, Any]:
    """The arrays of a Flax msgpack file, by their names with dots. Raises UserError where it is none, or cut."""
    try:
        found = MsgpackFile(path)
        return found if found.whole else _read_at_once(path)
    except Exception as error:  # a wrong file can trip any step of the decoding
        raise UserError(f"{path} is not a whole Flax msgpack file: copy or download it again") from error


class MsgpackFile(ArrayFile):
    """The arrays of a file. `whole` is False where it holds something else too."""

    def __init__(self, path: Path):
        self._data = np.memmap(path, np.uint8, "r")
        self._bytes, self._arrays, self.whole = memoryview(self._data), {}, True
        end = self._walk("", 0)
        if self.whole and end != len(self._data):
            raise ValueError("cut, or more than one object")
        self._shapes = {key: shape for key, (_, _, shape) in self._arrays.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        start, dtype, shape = self._arrays[key]
        return np.ndarray(shape, dtype, self._data, start)

    def _walk(self, name: str, at: int) -> int:
        """Notes the arrays of the object at byte `at`; where it ends."""
        kind, length, at = self._head(at)
        if kind == "array" and self._bytes[at] == _ARRAY:
            self._arrays[name.removeprefix("params.")] = self._array(at + 1, length)
            return at + 1 + length
        self.whole = self.whole and kind == "map"
        for _ in range(length if self.whole else 0):
            kind, size, at = self._head(at)
            key = str(self._bytes[at : at + size], "utf-8")
            self.whole = self.whole and kind == "text" and key != _CHUNKED
            at = self._walk(f"{name}.{key}" if name else key, at + size) if self.whole else at
        return at

    def _head(self, at: int) -> tuple[str, int, int]:
        """The kind and length of an object, and where what it holds begins."""
        first = self._bytes[at]
        if first >> 4 == 0x8:
            return "map", first & 0xF, at + 1
        if first >> 5 == 0b101:
            return "text", first & 0x1F, at + 1
        if 0xD4 <= first <= 0xD8:
            return "array", 2 ** (first - 0xD4), at + 1
        kind, width = _SIZED.get(first, ("other", 0))
        return kind, int.from_bytes(self._bytes[at + 1 : at + 1 + width], "big"), at + 1 + width

    def _array(self, at: int, length: int) -> tuple[int, np.dtype, tuple[int, ...]]:
        from msgpack import Unpacker

        reader = Unpacker()
        reader.feed(self._bytes[at : at + min(_HEAD, length)])
        if reader.read_array_header() != 3:
            raise ValueError("no array")
        shape, name = tuple(reader.unpack()), reader.unpack()
        kind, size, start = self._head(at + reader.tell())
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        if (kind, start + size) != ("bytes", at + length) or size != math.prod(shape) * dtype.itemsize:
            raise ValueError("an array of another size than it says")
        if start + size > len(self._data) or dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError("cut")
        return start, dtype, shape


def _read_at_once(path: Path) -> dict[str, Any]:
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(msgpack_restore(path.read_bytes()), sep=".")
    return {key.removeprefix("params."): value for key, value in flat.items()}
