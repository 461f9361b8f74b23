"""Class names: one class and its synonyms, lists of them as Python gives them, and lists as people write them."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np

from maskclip_jax.errors import UserError

MAX_CLASSES = 65535  # what a 16-bit label file can hold beside its ignore value

_LINES = re.compile(r"\r\n|[\r\n\u0085\u2028\u2029]|\\r\\n|\\n")  # also as a shell hands on "\n" between quotes
_TABS = re.compile(r"[^\S\n]*(?:\t|\\t)[^\S\n]*")
_COMMAS, _SEMICOLONS = ",\uff0c\u3001\u060c", ";\uff1b\u061b"  # also full-width, ideographic and Arabic
_QUOTES = {'"': '"', "\u201c": "\u201d", "'": "'"}
# Byte order marks, soft hyphens, zero-width spaces and marks of direction are invisible and never intended.
_UNSEEN = re.compile("[\ufeff\u00ad\u200b\u200e\u200f\u2060\u202a-\u202e\u2066-\u2069]")
_WIDE = re.compile("[\uff01-\uffee]+")  # full-width Latin and half-width Japanese: tokenizers narrow and widen them
_BULLET = re.compile(r"[-*\u2022]\s+")
_HEADER = re.compile(r"\w+:")  # of a YAML list
_NUMBERED = re.compile(r"(\d+)\s*([.:,;)\t]|\s)\s*\S")


class ClassName(tuple[str, ...]):
    """One class: its synonyms in order. It prints as the first of them, the name that is displayed."""

    __slots__ = ()

    @classmethod
    def of(cls, entry: Any) -> ClassName:
        """From "sofa, couch" or ["sofa", "couch"]; '"dog, big"' is one name with a comma.

        Names are made NFC (a composed é and a decomposed one are one letter), white space is one space.

        Raises:
          UserError: a synonym is empty, given twice, no text, or holds what is no character.
        """
        if isinstance(entry, str):
            words: list[Any] = [word.text for word in _words(entry, ",")]
        elif isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray) and entry.ndim == 1):
            words = list(entry)
        else:
            words = [entry]
        if strangers := [word for word in words if not isinstance(word, str)]:
            kind = type(strangers[0]).__name__
            raise UserError(f"a class is a text or a list of texts, got {shown(strangers[0])} ({kind}): name it")
        words = [_clean(word) for word in words]
        if not words or not all(words):
            raise UserError(f"a class needs a name, but {shown(entry)} has an empty one: remove the extra comma")
        folded = [_folded(word) for word in words]
        for index, word in enumerate(folded):
            if word in folded[:index]:
                raise UserError(
                    f"a class's synonyms must differ, but {shown(entry)} has {shown(words[index])} twice: keep one"
                )
        return cls(words)

    @property
    def name(self) -> str:
        """The name to display."""
        return self[0]

    def __str__(self) -> str:
        return self[0]


def as_classes(entries: Any) -> tuple[ClassName, ...]:
    """Class entries of a Python caller, e.g. `["dog", "sofa,couch"]`: any iterable of texts and lists of texts that has
    an order. It takes whatever comes, and checks it.

    Raises:
      UserError: no entry, an empty name, more than 65,535 entries, one word in two classes (in any case), or anything
        but texts and lists of texts.
    """
    if isinstance(entries, str):
        raise UserError(f"classes must be a list of names, but it is the text {shown(entries)}: use parse_classes")
    unordered = isinstance(entries, bytes | bytearray | Mapping | AbstractSet)
    if unordered or not isinstance(entries, Iterable) or (isinstance(entries, np.ndarray) and entries.ndim != 1):
        raise UserError(
            f"classes must be a list of names, got {shown(entries)} ({type(entries).__name__}): write ['dog', 'cat']"
        )
    classes = tuple(ClassName.of(entry) for entry in itertools.islice(entries, MAX_CLASSES + 1))
    if not classes:
        raise UserError("at least one class is needed, but none was given: name one, for example 'dog'")
    if len(classes) > MAX_CLASSES:
        count = f"{len(entries)}" if hasattr(entries, "__len__") else "more"
        raise UserError(f"at most {MAX_CLASSES} classes fit a label file, got {count}: use fewer")
    owner: dict[str, ClassName] = {}
    for entry in classes:
        for word in entry:
            if _folded(word) in owner:
                raise UserError(
                    f"a name may be in one class only, but {shown(word)} is in "
                    f"{shown(', '.join(owner[_folded(word)]))} and in {shown(', '.join(entry))}: keep one"
                )
        owner.update(dict.fromkeys(map(_folded, entry), entry))
    return classes


def read_list(text: str, *, file: bool = False, quiet: bool = False) -> tuple[ClassName, ...]:
    """A list as people write it, on the command line or in a file.

    One line: commas (or tabs) separate classes; where there are semicolons these do, and commas separate synonyms.
    Several lines: each is a class (or several, with semicolons), commas separate synonyms, lines that start with #
    and empty ones are skipped, bullets ("- dog") are taken off. A name in quotes may hold commas, and a JSON list is
    what it says.

    Args:
      file: it was one, which has comments, however many lines there are, and synonyms on lines.
      quiet: warn of nothing.

    Raises:
      UserError: as `as_classes`; an open quote, numbered lines, an object.
    """
    text = _UNSEEN.sub("", text).strip()
    if text.startswith("{"):
        raise UserError(f'classes are a list, but {shown(text)} is an object: write ["dog", "cat"] or dog, cat')
    if text.startswith("[") and text.endswith("]"):
        return as_classes(_bracketed(text))
    lines = [_TABS.sub(",", line.strip()) for line in _LINES.split(text)]
    if file or len(lines) > 1:
        lines = [re.sub(r"\s#\s.*", "", line) for line in lines if line and not line.startswith("#")]
    if len(lines) > 1 and _HEADER.fullmatch(lines[0]):
        lines = lines[1:]
    if lines and all(_BULLET.match(line) for line in lines) and (file or len(lines) > 1):
        lines = [_BULLET.sub("", line, count=1) for line in lines]
        as_lines = True
    else:
        as_lines = len(lines) > 1
    read = [_words(line, _COMMAS + _SEMICOLONS) for line in lines]
    _check_numbers(lines if as_lines else [word.text for line in read for word in line], quiet)
    marked = any(word.after in _SEMICOLONS for line in read for word in line if word.after)
    if not as_lines and not marked:
        return as_classes((word.text,) for line in read for word in line)
    classes: list[list[str]] = []
    for line in read:
        new = True
        for word in line:
            if new:
                classes.append([])
            classes[-1].append(word.text)
            new = bool(word.after) and word.after in _SEMICOLONS
    several = [entry for entry in classes if len(entry) > 1]
    if as_lines and several and not (marked or file or quiet):
        warnings.warn(
            f"each line is one class: {', '.join(map(shown, several[0][:4]))} are synonyms, as in "
            f"{len(several)} of {len(classes)} (separate classes by lines or semicolons)",
            stacklevel=3,
        )
    return as_classes(classes)


def shown(value: Any, most: int = 60) -> str:
    """A value in a message: on one line, cut, and whatever it holds, characters that every output takes."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    text = text if len(text) <= most + 2 else f"{text[:most]}\u2026{text[0] if text[0] in _QUOTES else ''}"
    return text.encode(errors="backslashreplace").decode()


class _Word(NamedTuple):
    text: str
    after: str  # the separator behind it; empty at the end


def _words(line: str, separators: str) -> list[_Word]:
    """The words of a line between separators; one in quotes may hold them. A trailing separator is no word."""
    words, rest, end = [], line, re.compile(f"[{separators}]|$")
    while True:
        rest = rest.lstrip()
        text, after = _quoted(rest, separators)
        if text is None:
            after = next(end.finditer(rest)).start()
            text = rest[:after].strip()
        mark = rest[after : after + 1]
        words.append(_Word(text, mark))
        if not mark:
            break
        rest = rest[after + 1 :]
    return words[:-1] if len(words) > 1 and not words[-1].text else words


def _quoted(rest: str, separators: str) -> tuple[str | None, int]:
    """A word in quotes at the start of `rest` and where what follows it begins; None where there is none."""
    close = _QUOTES.get(rest[:1])
    if close is None:
        return None, 0
    inside = f"(?:{close}{close}|[^{close}])*" if close == '"' else ".*?"
    found = re.match(rf"{rest[0]}({inside}){close}\s*(?=[{separators}]|$)", rest, re.DOTALL)
    if found:
        return (found[1].replace('""', '"') if close == '"' else found[1]), found.end()
    if close == '"' and rest.count('"') == 1:
        raise UserError(f"a quoted name ends with a quote, but {shown(rest)} does not: add it, or leave both out")
    return None, 0


def _bracketed(text: str) -> list[Any]:
    """The entries of a JSON list, or of one with single or no quotes (Python's, YAML's)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        inside = " ".join(text[1:-1].split())
        if "[" in inside or "{" in inside:
            raise UserError(f"a list in brackets is JSON, but {shown(text)} is not: write dog, cat") from None
        return [(word.text,) for word in _words(inside, _COMMAS)] if inside else []


def _check_numbers(lines: Sequence[str], quiet: bool) -> None:
    """Raises UserError for "0: dog", "1: cat" …, and warns of "0 dog", "1 cat" …: would numbers be part of names?"""
    for part in (lines, lines[1:]):  # a table has a head
        found = [match for line in part if (match := _NUMBERED.match(line))]
        if len(part) < 2 or len(found) < len(part):
            continue
        numbers = [int(match[1]) if len(match[1]) < 6 else -1 for match in found]
        if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            continue
        if found[0][2].isspace():
            if not quiet:
                warnings.warn(f"the names begin with numbers, {shown(part[0])}: these are part of them", stacklevel=4)
        else:
            raise UserError(f"classes are names in order, but they are numbered, {shown(part[0])}: remove the numbers")
        return


def _clean(word: str) -> str:
    word = " ".join(_UNSEEN.sub("", unicodedata.normalize("NFC", word)).split())
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in word):
        raise UserError(
            f"a name is made of characters, but {shown(word)} has one that is none (a control code, or bytes that are "
            "not UTF-8): type it again"
        )
    return word


def _folded(word: str) -> str:
    """A name without what tells it from another by its looks alone: case, and the width of Asian fonts."""
    narrow = _WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), word)
    return unicodedata.normalize("NFC", narrow.casefold())
