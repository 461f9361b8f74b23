"""A request to the page's JSON endpoint, checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from maskclip_jax.data.names import shown
from maskclip_jax.data.vocabulary import ClassName, as_classes, parse_classes
from maskclip_jax.encoders import dense
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options

MOST_CLASSES = 256  # what an indexed label PNG holds; more are unreadable on a page
MOST_WORDS = 512  # synonyms and background included: the text tower reads some 85 sentences for each
LONGEST_WORD = 200  # characters
LONGEST_TEMPLATE = 300
LONGEST_TEXT = 1000  # of any other field
MOST_PIXELS = 4096  # of a window's side or stride
MOST_PAMR = 50  # steps
MOST_SCALES = 4


# what the page offers, and the method of `Options` that each is
METHODS = {"maskclip": "maskclip", "naive": "clip"} | {name: name for name in dense.ALONE}
ASKING = {name: name for name in dense.METHODS if name not in dense.ALONE}  # with a second backbone only
ASKED = (
    *("method", "prompt_denoising", "key_smoothing", "window", "stride", "background", "background_threshold"),
    *("templates", "pamr", "scales", "flip"),
)


@dataclasses.dataclass(frozen=True)
class SegmentRequest:
    """One question. Its JSON has `image`, `classes` and maybe `model`, and of `Options` what `ASKED` names.

    Fields:
      image: the number of a shipped scene ("0005"), or what /api/images answered.
      classes: what to look for, as after `--classes`: text or class set, or a list (["dog", "sofa, couch"]).
      model: one of the models served; None is the first.
      options: how the image is read; in JSON, a method is one of `METHODS`.
    """

    image: str
    classes: tuple[ClassName, ...]
    model: str | None = None
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def words(self) -> tuple[ClassName, ...]:
        """Background words, then classes."""
        return (*(self.options.background or ()), *self.classes)

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        words = [word for entry in self.words for word in entry]
        return 2000 + sum(100 + 4 * len(word) for word in words) + 4 * len(self.options.templates or "")


def read_request(body: bytes, affinity: str | None = None) -> SegmentRequest:
    """The question in a request's JSON; `affinity` is the server's backbone. Raises UserError."""
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a question is JSON, but this is not ({error}): see docs/guides/serve.md") from error
    if not isinstance(fields, dict):
        raise UserError(f"a question is a JSON object, got {_kind(fields)}: see docs/guides/serve.md")
    known = ["image", "classes", "model", *ASKED]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"a question has {', '.join(known)}, got {', '.join(unknown)}: check the spelling")
    if missing := [name for name in ("image", "classes") if fields.get(name) is None]:
        raise UserError(f"a question needs an image and classes, but has no {' and no '.join(missing)}: add it")
    for name in ("image", "model", "method", "templates"):
        _checked(fields, name, str, "text")
        _check_text(fields.get(name), name, LONGEST_TEMPLATE if name == "templates" else LONGEST_TEXT)
    for name in ("window", "stride"):
        _checked(fields, name, int, "a whole number of pixels")
        if not 1 <= fields.get(name, 1) <= MOST_PIXELS:
            raise UserError(f"{name} is 1 to {MOST_PIXELS} pixels here, got {_kind(fields[name])}: change it")
    for name in ("prompt_denoising", "key_smoothing", "background_threshold"):
        _checked(fields, name, (int, float), "a number above 0 and up to 1")
        if abs(fields.get(name, 0)) > MOST_PIXELS:  # 10^400 is a whole number in JSON, and no float
            raise UserError(f"{name} is a number above 0 and up to 1, got {_kind(fields[name])}: change it")
    _checked(fields, "pamr", int, "a whole number of steps")
    _checked(fields, "scales", list, "a list of sizes")
    for scale in fields.get("scales", ()):
        _checked({"a size": scale}, "a size", (int, float), "a number")
    if not isinstance(fields.get("flip", False), bool):
        raise UserError(f"flip is true or false, got {_kind(fields['flip'])}: change it or leave it out")
    if fields.get("pamr", 0) > MOST_PAMR or len(fields.get("scales", ())) > MOST_SCALES:
        raise UserError(
            f"the page takes at most {MOST_PAMR} steps of PAMR and {MOST_SCALES} sizes: use fewer, or "
            "`python run.py segment`"
        )
    methods = METHODS if affinity is None else METHODS | ASKING
    if (method := fields.get("method", "maskclip")) not in methods:
        raise UserError(f"a method is one of {', '.join(methods)}, got {method!r}: choose one")
    classes, background = _words(fields["classes"]), fields.get("background")
    empty = background is None or (isinstance(background, str) and not background.strip())
    background = None if empty else _words(background)
    _check_amount(classes, background or ())
    given = {name: fields[name] for name in ASKED if name in fields}
    given |= {"method": methods[method], "affinity": affinity if method in ASKING else None}
    options = Options(**given | {"background": background, "cache": False})
    return SegmentRequest(fields["image"], classes, fields.get("model"), options)


def _checked(fields: dict[str, Any], name: str, kind: type | tuple[type, ...], wanted: str) -> None:
    value = fields.get(name)
    if value is None:
        fields.pop(name, None)
    elif not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{name} is {wanted}, got {_kind(value)}: change it or leave it out")


def _check_text(text: str | None, name: str, most: int) -> None:
    if text is None:
        return
    if len(text) > most:
        raise UserError(f"{name} has at most {most} characters here, got {len(text):,}: make it shorter")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{name} is made of characters, but {shown(text)} has half of one: type it again")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number there")


def _words(value: Any) -> tuple[ClassName, ...]:
    """Classes from text or a list. The server's own files are none of a visitor's business: names only."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError("at least one word is needed, got none: type what to look for, like dog, grass, sky")
        return parse_classes(value, files=False)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return as_classes(value)
    raise UserError(f"words are text or a list of texts, got {_kind(value)}: write 'dog, grass, sky'")


def _check_amount(classes: tuple[ClassName, ...], background: tuple[ClassName, ...]) -> None:
    if len(classes) + bool(background) > MOST_CLASSES:
        raise UserError(
            f"the page takes at most {MOST_CLASSES} classes, got {len(classes)}: use fewer, "
            "or `python run.py segment`, which takes any number"
        )
    words = [word for entry in (*classes, *background) for word in entry]
    if len(words) > MOST_WORDS:
        raise UserError(f"the page takes at most {MOST_WORDS} words in all, got {len(words)}: use fewer")
    longest = max(words, key=len)
    if len(longest) > LONGEST_WORD:
        raise UserError(
            f"a name has at most {LONGEST_WORD} letters, but {longest[:30]}… has {len(longest)}: put commas between"
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "null"}
    text = f"the text {shown(value, 40)}" if isinstance(value, str) else names.get(type(value)) or json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
