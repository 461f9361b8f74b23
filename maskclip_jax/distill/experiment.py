"""Experiment files and `--set key=value`: Python that ends in a `DistillConfig`, and typed changes to it.

An experiment file defines `config(name="…") -> DistillConfig`; `FILE.py:NAME` is one of its variants. The file is
executed, with all the user's rights.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskclip_jax.data.schema import config_types, typed
from maskclip_jax.data.whole_files import cut, reason
from maskclip_jax.distill.config import DistillConfig, current_key
from maskclip_jax.errors import UserError


def load_experiment(source: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """The config of an experiment file, with changes.

    Args:
      source: "FILE.py", or "FILE.py:NAME" for a variant. The file is run as Python: use files you trust.
      overrides: "key=value", keys as in `DistillConfig`, dotted inside ("student.backbone=resnet50",
        "teacher.method=naclip", "augmentation.scale=0.5,1.5"); values are parsed by the field's type, null is None,
        commas make tuples. The teacher's keys of older versions ("teacher=embedded", "key_smoothing=1") are
        "teacher.model", "teacher.key_smoothing" ….

    Raises:
      UserError: no such file or variant, an unknown key, or a value of another type.
    """
    file, colon, name = str(source).partition(".py:")
    path = Path(os.path.expanduser(f"{file}.py" if colon else file))
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"an experiment is a Python file, but there is no {path}: see the experiments folder")
    with _running(path):
        module = _run_file(path)
    if not callable(getattr(module, "config", None)):
        raise UserError(f"an experiment defines config(), but {path} does not: add it")
    with _running(path):
        made = module.config(name) if name else module.config()
    if not isinstance(made, DistillConfig):
        raise UserError(f"config() returns a DistillConfig, but that of {path} returns {type(made).__name__}")
    return with_overrides(made, overrides)


def with_overrides(config: DistillConfig, overrides: Sequence[str]) -> DistillConfig:
    """`config` with "key=value" changes, in order; all of them together must make a valid config."""
    values = config.to_dict()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"a change is key=value, got {cut(override)!r}: for example batch_size=8")
        key = current_key(key.strip())
        _assign(DistillConfig, values, key, key, text.strip())
    return DistillConfig.from_dict(values)


def _assign(cls: type, values: dict[str, Any], key: str, where: str, text: str) -> None:
    name, dot, rest = key.partition(".")
    hints = config_types(cls)
    if name not in hints:
        raise UserError(f"{cut(where)} is no key of the config: known are {', '.join(hints)}")
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
        if not dot:
            inner = ", ".join(f"{name}.{field}" for field in list(config_types(hint))[:4])
            raise UserError(f"{cut(where)} has keys of its own: set one of {inner}, …")
        _assign(hint, values[name], rest, where, text)
    elif dot:
        raise UserError(f"{cut(where)} is no key of the config: {cut(name)} has no keys of its own")
    else:
        values[name] = _parsed(hint, text, where)


def _parsed(hint: Any, text: str, where: str) -> Any:
    """`text` as a value of the type: names as they are typed, null, true, false, numbers, tuples with commas."""
    arms = (hint,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
    if str in arms:  # a field that takes a name takes what is typed: `classes=dog, cat` is one text
        return None if type(None) in arms and text == "null" else text
    items = next((typing.get_args(arm) for arm in arms if typing.get_origin(arm) is tuple), None)
    if items is None or text == "null":
        return typed(hint, _literal(text), where)
    parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    texts = [part.strip("'\"") for part in parts]  # a list as JSON writes it
    return typed(hint, texts if str in items else list(map(_literal, parts)), where)


def _literal(text: str) -> Any:
    """null, true, false, a number, or else the text."""
    words = {"null": None, "true": True, "false": False}
    try:
        return words[text] if text in words else ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # "((((…"
        return text


def _run_file(path: Path) -> Any:
    path = path.resolve()
    name = f"_maskclip_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there for their module
    root = str(next(folder for folder in path.parents if not (folder / "__init__.py").exists()))
    before = list(sys.path)
    try:
        sys.path.insert(0, root)  # `from experiments.… import …` works from a checkout, wherever one stands
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """Whatever that file raises, on one line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the experiment {path} does not run ({type(error).__name__}: {reason(error)}): correct it"
        ) from error
