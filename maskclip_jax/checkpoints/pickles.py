"""Pickled data -> tensors (as descriptions), dicts, lists, strings and numbers, without running anything.

`pickle` calls what a file names. This reader interprets the opcodes itself and calls nothing: a name becomes a `Name`,
a tensor is known by the name of torch's function that would rebuild it, an object of another class stays an inert
`Thing`, and any other call is refused. The worst a hostile file can be is refused.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from maskclip_jax.errors import UserError


class Name(NamedTuple):
    """A class or a function that a pickle names, "torch.FloatStorage". Never looked up."""

    path: str


class Storage(NamedTuple):
    """A run of numbers that tensors are views of: `count` elements of `kind` ("Float", …), bytes when "Untyped"."""

    kind: str
    key: str
    count: int


class Tensor(NamedTuple):
    """A view of a storage; `offset` and `strides` are in elements. `dtype` is torch's name when the kind is untyped."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None


class Thing:
    """An object of a class that is not known here: the class's name, and the object's state."""

    def __init__(self, name: str, state: Any = None):
        self.name, self.state = name, state


_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_LISTS = ("torch.Size", *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")))
_INERT = (  # small objects that training checkpoints hold beside their weights: read as nothing in particular
    "torch.device",
    "builtins.set",
    "__builtin__.set",
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "collections.defaultdict",
    "pathlib.PosixPath",
)
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """The stack that a pickle's opcodes work on. `storages` collects those that were met, by key.

    `read` raises UserError for a call of anything but a tensor or a container, and ValueError, IndexError, KeyError,
    TypeError or AttributeError for damage.
    """

    def __init__(self):
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, file: io.BytesIO) -> Any:
        """The object that the pickle at `file`'s position describes; `file` is left just behind it."""
        stack = self._stack
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return stack.pop()
            if name in _LITERALS:
                stack.append(argument)
            elif name in _NEW:
                stack.append(_NEW[name]())
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self._memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(self._memo[argument])
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name == "MARK":
                self._marks.append(len(stack))
            elif name in _TUPLES:
                items = self._pop(_TUPLES[name])
                stack.append(tuple(items))
            elif name == "GLOBAL":
                stack.append(Name(str(argument).replace(" ", ".", 1)))
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"_{name.lower()}")(argument)
        raise ValueError("no end")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError("empty stack")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _since_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _list(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    _frozenset = _list

    def _dict(self, _: Any) -> None:
        self._stack.append(_as_dict(self._since_mark()))

    def _setitem(self, _: Any) -> None:
        self._set(self._pop(2))

    def _setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], Thing):  # a subclass of dict, whose items say nothing here
            self._stack[-1].update(_as_dict(items))

    def _append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], Thing):
            self._stack[-1].extend(items)

    def _build(self, _: Any) -> None:
        (state,) = self._pop(1)
        if isinstance(self._stack[-1], Thing):
            self._stack[-1].state = state
        elif not isinstance(self._stack[-1], dict | Tensor):  # an OrderedDict's attributes (`_metadata`) say nothing
            raise ValueError("the state of no object")

    def _newobj(self, _: Any) -> None:
        name, _ = self._pop(2)
        self._stack.append(Thing(_named(name)))

    def _newobj_ex(self, _: Any) -> None:
        name, _, _ = self._pop(3)
        self._stack.append(Thing(_named(name)))

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        self._stack.append(Name(f"{module}.{name}"))

    def _reduce(self, _: Any) -> None:
        name, arguments = self._pop(2)
        self._stack.append(_called(_named(name), arguments))

    def _inst(self, argument: str) -> None:
        self._stack.append(_called(argument.replace(" ", ".", 1), tuple(self._since_mark())))

    def _obj(self, _: Any) -> None:
        name, *arguments = self._since_mark()
        self._stack.append(_called(_named(name), tuple(arguments)))

    def _binpersid(self, _: Any) -> None:
        ((tag, kind, key, _, count, *view),) = self._pop(1)
        kind = _named(kind).rpartition(".")[2]
        if tag != "storage" or not isinstance(key, str) or not _whole([count]) or any(v is not None for v in view):
            raise ValueError("no storage")
        self.storages[key] = Storage(kind.removesuffix("Storage"), key, count)
        self._stack.append(self.storages[key])

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])


def _called(name: str, arguments: tuple) -> Any:
    """What a call gives, for the calls that tensors and containers are written as."""
    if name in _TENSORS:
        storage, offset, shape, strides = arguments[:4]
        whole = _whole([offset, *shape, *strides]) and len(shape) == len(strides)
        if not isinstance(storage, Storage) or not whole:
            raise ValueError("no tensor")
        dtype = _named(arguments[6]).removeprefix("torch.") if name.endswith("_v3") else None
        return Tensor(storage, offset, tuple(shape), tuple(strides), dtype)
    if name in _PARAMETERS and isinstance(arguments[0], Tensor):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2" and _named(arguments[0]) in (*_TENSORS, *_PARAMETERS):
        return _called(_named(arguments[0]), arguments[2])
    if name == "collections.OrderedDict":
        return _as_dict([item for pair in arguments[0] for item in pair]) if arguments else {}
    if name in _LISTS:
        return list(arguments[0]) if arguments else []
    if name == "torch.jit._pickle.restore_type_tag":
        return arguments[0]
    if name in _INERT:
        return Thing(name)
    raise UserError(
        f"it calls {name[:80]}, which is not run: weights are tensors, dicts, lists and numbers, so save "
        "`model.state_dict()`"
    )


def _as_dict(items: Sequence[Any]) -> dict[Any, Any]:
    """Keys and values in turn; keys that are no text or number (which nest, and hash without end) are left out."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if isinstance(key, str | int | float | None)}


def _named(value: Any) -> str:
    if not isinstance(value, Name):
        raise ValueError("no name")
    return value.path


def _whole(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
