"""A font for labels on pictures: Pillow's own, one of the system's, or a transliteration to ASCII.

Pillow's font (Aileron) draws the same on every machine, but has hardly more than ASCII, and shows a box for the rest.
A font for all scripts is tens of megabytes, so none is shipped: one that the machine has and that holds every letter
of the text is taken. Where there is none, é becomes e, ß ss, к k, か ka, and what has no reading its number, U+72AC.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont

# Wide coverage first; every other font of the system after them.
_PREFERRED = ("notosanscjk", "dejavusans", "notosans-", "notosans[", "arialunicode", "pingfang", "hiragino", "segoeui")
_PREFERRED += ("msgothic", "msyh", "malgun", "liberationsans", "arial", "freesans", "unifont", "wqy")
_NO_LETTER = "\U0010ffff"  # what no font has: its picture is the font's box

_CYRILLIC = "a b v g d e zh z i y k l m n o p r s t u f kh ts ch sh shch ' y ' e yu ya".split()  # а … я
_GREEK = "a b g d e z i th i k l m n x o p r s s t y f ch ps o".split()  # α … ω
_READINGS = {chr(0x430 + i): text for i, text in enumerate(_CYRILLIC)}
_READINGS |= {chr(0x3B1 + i): text for i, text in enumerate(_GREEK)}
_READINGS |= {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i", "і": "i"}
_READINGS |= {"є": "ye", "ґ": "g", "ђ": "dj", "ј": "j", "љ": "lj", "њ": "nj", "ћ": "c", "џ": "dz"}
_READINGS |= {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "…": "...", "，": ",", "、": ","}


def lettering(text: str, size: int) -> tuple[str, Font]:
    """What to draw and the font to draw it with, `size` in pixels: every letter of it is in that font."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    own = default_font(size)
    for file in (None, *_system_fonts()):
        if all(_has(file, letter) for letter in text):
            return text, own if file is None else _loaded(file, size)
    return readable(text), own


def readable(text: str) -> str:
    """A text in ASCII that a person recognises; letters without a reading become U+ and their number."""
    return " ".join("".join(map(_reading, unicodedata.normalize("NFC", text))).split())


@functools.cache
def default_font(size: int) -> Font:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


def _reading(letter: str) -> str:
    if letter.isascii():
        return letter if letter.isprintable() else " "
    small = letter.lower()
    if (reading := _READINGS.get(letter) or _READINGS.get(small)) is not None:
        return reading.capitalize() if letter != small else reading
    name = unicodedata.name(letter, "")
    for script in ("HIRAGANA LETTER ", "KATAKANA LETTER ", "HANGUL SYLLABLE "):
        if name.startswith(script):
            return name.removeprefix(script).removeprefix("SMALL ").lower()
    parts = unicodedata.normalize("NFKD", letter)
    if parts != letter:
        return "".join(_reading(part) for part in parts if not unicodedata.combining(part))
    if unicodedata.category(letter) == "So":  # 🐕 is "dog"
        return f" {name.lower()} "
    return "" if unicodedata.category(letter) in ("Mn", "Me", "Cf") else f" U+{ord(letter):04X} "


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    """Font files of this machine, those likely to have many letters first; always in the same order."""
    found = {path for folder in _font_folders() for path in _fonts_below(folder)}

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.name.lower().replace(" ", "")
        preferred = [i for i, start in enumerate(_PREFERRED) if name.startswith(start)]
        # of a family the plain cut: its name is the shortest
        return (min(preferred, default=len(_PREFERRED)), len(name), str(path))

    return tuple(sorted(found, key=rank))


def _font_folders() -> list[Path]:
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), Path(home, "Library/Fonts")]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path(home, ".local/share/fonts")]


def _fonts_below(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        yield from (Path(parent, file) for file in files if file.lower().endswith((".ttf", ".otf", ".ttc")))


@functools.cache
def _loaded(file: Path, size: int) -> Font:
    return ImageFont.truetype(str(file), size)


@functools.lru_cache(maxsize=2**16)
def _has(file: Path | None, letter: str) -> bool:
    """Whether a font (None: Pillow's own) has a picture of its own for a letter."""
    try:
        font = default_font(16) if file is None else _loaded(file, 16)
        return letter.isspace() or _picture(font, letter) not in (_picture(font, _NO_LETTER), b"")
    except (OSError, ValueError):  # a damaged font, or one with bitmaps of one size alone
        return False


def _picture(font: Font, letter: str) -> bytes:
    mask = font.getmask(letter)
    return bytes(mask) + bytes(str(mask.size), "ascii") if mask.size[0] and mask.size[1] else b""
