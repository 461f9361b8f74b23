"""PyTorch's files -> named NumPy arrays, without PyTorch and without running anything that a file holds.

Three forms: the zip of `torch.save`; that of `torch.jit.save` (OpenAI's `.pt`), whose code is never more than text;
and the bare pickles of before PyTorch 1.6. Arrays are views of the file's own pages.
"""

from __future__ import annotations

import io
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maskclip_jax.checkpoints.memory import ArrayFile, let_go, read_whole, stored_at
from maskclip_jax.checkpoints.pickles import Machine, Storage, Tensor, Thing
from maskclip_jax.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the state dict
_AGAIN = "copy or download it again"
_PICKLE_BYTES = 2**24  # of a pickle without its numbers: 100,000 tensors, far more than any model here has
_REPEATS = 2**20  # elements a tensor may have beyond its storage's (expanded buffers): views are free, copies are not
_MODULES = 2**17  # of a TorchScript archive
_SQUEEZED = 100  # how many times smaller a compressed storage may be: weights are noise, bombs are not
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, Any] = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
_UNTYPED_DTYPES: dict[str, Any] = {  # of untyped storages: the tensor says
    **{
        name: getattr(ml_dtypes, name)
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    },
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64")},
}


class Place(NamedTuple):
    """Where a storage's bytes are: from `start` in the file, or (None) compressed in `member`."""

    start: int | None
    size: int
    member: zipfile.ZipInfo | None = None


class TorchFile(ArrayFile):
    """The tensors of a PyTorch file, each read from disk when asked for.

    Attributes:
      activation: "quick_gelu" or "gelu" where a TorchScript archive's text names it, else None.

    Raises:
      UserError: damaged, of another form, holding objects, or not named tensors.
    """

    def __init__(self, path: Path):
        self._path, self._archive, self._checked = path, None, set()
        self.activation: str | None = None
        try:
            self._tensors, find, order = self._open()
            self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
            self._views = {name: _view(name, tensor, find, order) for name, tensor in self._tensors.items()}
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from error
        except Exception as error:  # a damaged zip or pickle can trip any step
            raise UserError(f"{path} is not a whole PyTorch file: {_AGAIN}") from error

    def __getitem__(self, key: str) -> np.ndarray:
        dtype, offset, strides, place = self._views[key]
        shape = self._shapes[key]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.ndarray(shape, dtype, self._bytes(place), offset, strides)

    def _open(self) -> tuple[dict[str, Tensor], Callable[[Storage, int], Place], str]:
        if zipfile.is_zipfile(self._path):
            self._archive = archive = _Archive(self._path)
            content = Machine().read(archive.pickle())
            if isinstance(content, Thing):
                self.activation = archive.activation()
            return _named_tensors(content), archive.find, archive.order
        if tarfile.is_tarfile(self._path):
            raise UserError("it has the tar format of before PyTorch 0.2: save it again with PyTorch 1.6 or later")
        with self._path.open("rb") as file:
            content, places = _read_legacy(io.BytesIO(file.read(_PICKLE_BYTES)), self._path.stat().st_size)
        return _named_tensors(content), lambda storage, size: _of_size(places[storage.key], size), "<"

    def _bytes(self, place: Place) -> np.ndarray:
        member = place.member
        if place.start is None:
            assert self._archive is not None
            return self._archive.inflate(member, place.size)
        data = np.memmap(self._path, np.uint8, "r", place.start, (place.size,))
        if member is not None and member.CRC and place.start not in self._checked:  # 0: written without checksums
            if zlib.crc32(data) != member.CRC:
                raise UserError(f"{self._path} is damaged in {member.filename}: {_AGAIN}")
            let_go(data)
            self._checked.add(place.start)
        return data


class _Archive:
    """The zip of `torch.save` or `torch.jit.save`: one folder with data.pkl, data/KEY and perhaps code/."""

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in self._members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("it is a zip without a data.pkl, not PyTorch's: give the weights themselves")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._members.get(f"{self._root}byteorder")
        self.order = ">" if order is not None and self.inflate(order, 16).tobytes().strip() == b"big" else "<"

    def pickle(self) -> io.BytesIO:
        return io.BytesIO(self.inflate(self._members[f"{self._root}data.pkl"], _PICKLE_BYTES))

    def activation(self) -> str | None:
        """QuickGELU is `x * sigmoid(1.702 * x)`: its number stands in the code's text or among the constants."""
        for name in [name for name in self._members if name.startswith(f"{self._root}constants/")][:1000]:
            form = {2: "e", 4: "f", 8: "d"}.get(self._members[name].file_size)
            if form and abs(struct.unpack(self.order + form, self.inflate(self._members[name], 8))[0] - 1.702) < 1e-3:
                return "quick_gelu"
        names = [name for name in self._members if name.startswith(f"{self._root}code/") and name.endswith(".py")]
        code = b"\n".join(self.inflate(self._members[name], 2**20) for name in names[:1000])
        return "quick_gelu" if b"1.702" in code else "gelu" if b"gelu(" in code else None

    def find(self, storage: Storage, size: int) -> Place:
        """The place of a storage that has `size` bytes."""
        member = self._members.get(f"{self._root}data/{storage.key}")
        if member is None or member.file_size != size or member.flag_bits & 1:
            raise UserError(f"its data/{storage.key[:40]} is missing, cut or encrypted: {_AGAIN}")
        if member.compress_type != zipfile.ZIP_STORED:
            if size > 2**20 and size > _SQUEEZED * member.compress_size:
                raise UserError(f"its data/{storage.key[:40]} is compressed over {_SQUEEZED} times: {_AGAIN}")
            return Place(None, size, member)
        return Place(stored_at(self._path, member), size, member)

    def inflate(self, member: zipfile.ZipInfo, limit: int) -> np.ndarray:
        """A member's bytes [n]. Raises UserError when they are more than `limit`."""
        if member.file_size > limit:
            raise UserError(
                f"its {member.filename[:40]} has {member.file_size} bytes, over {limit}: give plain weights"
            )
        if not member.CRC:  # written without checksums
            member.CRC = None  # pyright: ignore[reportAttributeAccessIssue]: what zipfile takes for unknown
        with zipfile.ZipFile(self._path) as archive, archive.open(member) as file:
            return read_whole(file, member.file_size)


def _read_legacy(file: io.BytesIO, file_size: int) -> tuple[Any, dict[str, Place]]:
    """The object in a file of before PyTorch 1.6, and where its storages lie: five pickles, then the numbers."""
    if Machine().read(file) != _LEGACY_MAGIC:
        raise UserError("it is a pickle, but not PyTorch's: save `model.state_dict()`")
    Machine().read(file)  # the protocol's version
    if Machine().read(file)["little_endian"] is not True:
        raise UserError("its numbers are big-endian: save it again with PyTorch 1.6 or later")
    machine = Machine()
    content, keys, places = machine.read(file), Machine().read(file), {}
    start = file.tell()
    for key in keys:
        size = machine.storages[key].count * _width(machine.storages[key])
        places[key] = Place(start + 8, size)  # behind the number of its elements
        start += 8 + size
    if start > file_size:
        raise ValueError("cut")
    return content, places


def _view(
    name: str, tensor: Tensor, find: Callable[[Storage, int], Place], order: str
) -> tuple[np.dtype, int, tuple[int, ...], Place]:
    """A tensor's dtype, first byte in its storage, strides in bytes, and the storage's place; all within the file."""
    storage, size = tensor.storage, math.prod(tensor.shape)
    known = _UNTYPED_DTYPES.get(tensor.dtype) if tensor.dtype else _DTYPES.get(storage.kind)
    if known is None:
        raise UserError(f"{name[:80]} is of type {(tensor.dtype or storage.kind)[:40]}, not read here: save as float32")
    dtype = np.dtype(known)
    count = storage.count * _width(storage) // dtype.itemsize
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if size and tensor.offset + last >= count:
        raise UserError(f"{name[:80]} reaches beyond its numbers: {_AGAIN}")
    if size > count + _REPEATS or len(tensor.shape) > 32:
        raise UserError(f"{name[:80]} is expanded from {count} numbers to {size}: save `model.state_dict()`")
    strides = tuple(dtype.itemsize * s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.strides, strict=True))
    place = find(storage, storage.count * _width(storage))
    return dtype.newbyteorder(order), tensor.offset * dtype.itemsize, strides, place


def _width(storage: Storage) -> int:
    """Bytes of a storage's element."""
    return np.dtype(_DTYPES[storage.kind]).itemsize if storage.kind in _DTYPES else 1


def _of_size(place: Place, size: int) -> Place:
    if place.size != size:
        raise ValueError("a storage of two sizes")
    return place


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """The state dict in `content`: itself, under a training checkpoint's key, or a TorchScript module's tensors."""
    if isinstance(content, Thing) and content.name.startswith("__torch__"):
        content = _module_tensors(content)
    for _ in range(2):
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content:
        raise UserError("it holds no named tensors (a state dict): save `model.state_dict()`")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"it must hold named tensors alone, but {str(key)[:80]} is none: save `model.state_dict()`")
    return content


def _module_tensors(root: Thing) -> dict[str, Tensor]:
    """A TorchScript module's parameters and buffers as a state dict names them."""
    out, waiting, seen = {}, [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        if not isinstance(module.state, dict):
            raise UserError(
                f"its {module.name[:80]} is restored by code of its own (__setstate__), which is not run: "
                "save `model.state_dict()`"
            )
        if seen > _MODULES or len(prefix) > 1000:
            raise UserError("its modules hold one another without end: save `model.state_dict()`")
        for name, value in module.state.items():
            if isinstance(value, Tensor):
                out[f"{prefix}{name}"] = value
            elif isinstance(value, Thing):
                waiting.append((f"{prefix}{name}.", value))
    return out
