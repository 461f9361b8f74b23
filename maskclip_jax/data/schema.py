"""Rules for values in JSON: what each accepts, in words for the message.

`fields(content, RULES, where)` reads an object of another program's file by its rules before anything is built or
allocated from it. `read_config(cls, values, where)` reads one of this project's frozen configs by its types, and
`check_choices` and `check_ranges` are what such a config checks its fields with.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from maskclip_jax.data.whole_files import cut, is_count
from maskclip_jax.errors import UserError


class Rule(NamedTuple):
    """`words` end the sentence "KEY is …"; `read` returns the value as it is used, or `UNFIT`."""

    words: str
    read: Callable[[Any], Any]


UNFIT = object()


def fields(
    content: Any, rules: Mapping[str, Rule], where: str, needed: Collection[str] = (), only: bool = False
) -> dict[str, Any]:
    """The values of `rules`' keys that `content` holds, as their rules read them.

    Args:
      content: a value from JSON; anything but an object is refused.
      rules: key -> rule.
      where: file and part, for the message.
      needed: keys that must be there.
      only: refuse keys without a rule (else they are left alone).

    Raises:
      UserError: one line with the rule, what came, and the remedy.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be an object of keys, got {cut(repr(content), 60)}: take the original file")
    missing = [key for key in needed if key not in content]
    if missing:
        raise UserError(
            f"{where} must hold {', '.join(needed)}, but lacks {', '.join(missing)}: take the original file"
        )
    unknown = sorted(set(content) - set(rules)) if only else ()
    if unknown:
        raise UserError(f"{where} holds {', '.join(rules)}, got {cut(', '.join(unknown), 80)}: remove it")
    return {key: value(content[key], rule, f"{where}: {key}") for key, rule in rules.items() if key in content}


def value(came: Any, rule: Rule, name: str) -> Any:
    """`came` as `rule` reads it. Raises UserError, which calls it `name`."""
    found = rule.read(came)
    if found is UNFIT:
        raise UserError(f"{name} is {rule.words}, got {cut(repr(came), 60)}: take the original file")
    return found


def whole(low: int, high: int) -> Rule:
    """A whole number within low..high; true and false are none."""
    return Rule(f"a whole number from {low} to {high}", lambda x: x if is_count(x, high) and x >= low else UNFIT)


def number(low: float | int, high: float | int) -> Rule:
    """A number within low..high, read as a float."""

    def read(x: Any) -> Any:  # an int may be too large for a float: the bounds go first
        return float(x) if isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high else UNFIT

    return Rule(f"a number from {low:g} to {high:g}", read)


def one_of(*options: str) -> Rule:
    """One of a few words."""
    return Rule(" or ".join(options), lambda x: x if isinstance(x, str) and x in options else UNFIT)


def text(most: int = 200) -> Rule:
    """A short text."""
    return Rule(f"a text of at most {most} characters", lambda x: x if isinstance(x, str) and len(x) <= most else UNFIT)


FLAG = Rule("true or false", lambda x: x if isinstance(x, bool) else UNFIT)
OBJECT = Rule("an object of keys", lambda x: x if isinstance(x, Mapping) else UNFIT)


def optional(rule: Rule) -> Rule:
    """The rule, or null."""
    return Rule(f"{rule.words}, or null", lambda x: None if x is None else rule.read(x))


def several(rule: Rule, least: int, most: int) -> Rule:
    """A list of least..most values that fit `rule`, read as a tuple."""

    def read(x: Any) -> Any:
        if not isinstance(x, list | tuple) or not least <= len(x) <= most:
            return UNFIT
        items = tuple(rule.read(item) for item in x)
        return UNFIT if UNFIT in items else items

    count = str(least) if least == most else f"{least} to {most}"
    return Rule(f"a list of {count}, each {rule.words}", read)


def square(rule: Rule) -> Rule:
    """A side, or a list of two equal ones, read as the side."""

    def read(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return rule.read(x[0]) if len(x) == 2 and x[0] == x[1] else UNFIT
        return rule.read(x)

    return Rule(f"{rule.words}, or two equal ones (a square)", read)


Number = int | float


def check_choices(config: Any, choices: Mapping[str, tuple], prefix: str = "") -> None:
    """Raises UserError unless each of these fields has one of its values."""
    for name, allowed in choices.items():
        if (came := getattr(config, name)) not in allowed:
            options = ", ".join(map(str, allowed))
            raise UserError(f"{prefix}{name} is one of {options}, got {cut(came)}: choose one of them")


def check_ranges(config: Any, ranges: Mapping[str, tuple[Number, Number]], prefix: str = "") -> None:
    """Raises UserError unless every number of these fields (None and numbers in tuples too) is within its range."""
    for name, (least, most) in ranges.items():
        came = getattr(config, name)
        numbers = came if isinstance(came, tuple | list) else () if came is None else (came,)
        if any(isinstance(x, bool) or not isinstance(x, Number) or not least <= x <= most for x in numbers):
            raise UserError(f"{prefix}{name} is within {least:g}..{most:g}, got {cut(came)}: correct it")


def config_types(cls: type) -> dict[str, Any]:
    """Field -> type of a config: what its JSON and `--set` hold. A class may name fewer fields, in `JSON_FIELDS`."""
    hints = typing.get_type_hints(cls)
    names = getattr(cls, "JSON_FIELDS", [field.name for field in dataclasses.fields(cls)])
    return {name: str | None if hints[name] is Any else hints[name] for name in names}


def read_config(cls: type, values: Any, where: str) -> Any:
    """The inverse of `dataclasses.asdict`, also after JSON (lists become tuples).

    Raises UserError for unknown keys, missing ones and values of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is an object of keys, got {cut(values)}: correct it")
    types = config_types(cls)
    if unknown := sorted(set(values) - set(types)):
        raise UserError(f"{where} has unknown keys {cut(unknown)}: known are {', '.join(types)}")
    fields = dataclasses.fields(cls)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    if needed:
        raise UserError(f"{where} lacks {', '.join(needed)}: add it")
    return cls(**{name: typed(types[name], given, f"{where}.{name}") for name, given in values.items()})


def typed(hint: Any, given: Any, where: str) -> Any:
    """`given`, as it comes from JSON or the command line, as the type that the field has. Raises UserError."""
    if dataclasses.is_dataclass(hint):
        return given if isinstance(given, hint) else read_config(hint, given, where)
    arms = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    for arm in arms or (hint,):
        items = typing.get_args(arm)
        if typing.get_origin(arm) is tuple and isinstance(given, list | tuple):
            kinds = [items[0]] * len(given) if items[-1] is Ellipsis else items
            if len(kinds) == len(given):
                return tuple(typed(kind, item, where) for kind, item in zip(kinds, given, strict=True))
        elif arm is float and type(given) is int and abs(given) < 1e308:
            return float(given)
        elif isinstance(arm, type) and isinstance(given, arm) and (arm is bool or not isinstance(given, bool)):
            return given
    words = (
        "null" if arm is type(None) else str(arm) if typing.get_args(arm) else arm.__name__ for arm in arms or (hint,)
    )
    raise UserError(f"{where} is {' or '.join(words)}, got {cut(given)}: correct it")
