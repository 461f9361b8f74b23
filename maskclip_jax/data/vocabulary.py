"""Words: class sets, prompt templates, zero-shot splits and label maps (all in `class_sets.json`), and class colours.

The names and templates are those of the published numbers (Zhou et al., "Extract Free Dense Labels from CLIP").
"""

import difflib
import functools
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from maskclip_jax.data.names import MAX_CLASSES as MAX_CLASSES
from maskclip_jax.data.names import ClassName as ClassName
from maskclip_jax.data.names import as_classes as as_classes
from maskclip_jax.data.names import read_list, shown
from maskclip_jax.errors import UserError

TCL_TEMPLATES = (  # Cha et al., CVPR 2023
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)
_FILE_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".names", ".lst")
_MOST_BYTES = 2**24  # of a class file
_BENCHMARKS = ("voc20", "context59", "coco-stuff171", "ade20k150", "cityscapes19", "scenes66", "pascal_voc20")
_ALIASES = {  # after `_key`; the right side is the name in class_sets.json
    "voc": "pascal_voc20",
    "voc20": "pascal_voc20",
    "context59": "pascal_context59",
    "context459": "pascal_context459",
    "cocostuff": "coco_stuff171",
    "cityscapes": "cityscapes19",
    "ade150": "ade20k150",
    "ade20k": "ade20k150",
    "scenes": "scenes66",
}

# The 66 names of the emoji scenes: 60 objects, then six kinds of stuff. The index of a name is its label.
SCENE_OBJECTS: tuple[str, ...] = tuple(
    "dog cat horse cow sheep pig bird fish elephant giraffe lion monkey rabbit turtle snake frog "
    "car bus truck train bicycle motorcycle airplane boat ship rocket tractor house castle tree palm flower "
    "cactus mushroom apple banana pizza cake bottle chair sofa bed television laptop clock umbrella ball guitar book "
    "person child robot ghost sun moon star cloud snowman key hat".split()
)
SCENE_STUFF: tuple[str, ...] = ("grass", "sky", "sand", "water", "snow", "road")
SCENE_CLASSES: tuple[str, ...] = SCENE_OBJECTS + SCENE_STUFF

_NATURAL = {  # a green sky would only confuse; everything else has no colour of its own
    "grass": (60, 170, 60),
    "sky": (110, 190, 255),
    "water": (30, 110, 220),
    "sea": (20, 90, 200),
    "river": (40, 130, 230),
    "sand": (225, 195, 120),
    "snow": (235, 245, 255),
    "road": (120, 115, 125),
    "ground": (150, 115, 80),
    "background": (80, 80, 80),
}


def parse_classes(text: Any, *, files: bool = True) -> tuple[ClassName, ...]:
    """What a person types after `--classes`.

    In this order: the name of a class set (`voc20`, `coco-stuff171` …); the path of a text file; a list, as `read_list`
    takes it: "dog, cat", or with synonyms "sofa, couch; dog", or a class on each line. A file holds such a list.

    `files=False` is for text from another machine: no file is opened, and there are no warnings.

    Warns where the one class that was read is much like a class set's name: every pixel would be of it.

    Raises:
      UserError: as `read_list`; also for a file that is missing or not UTF-8 text.
    """
    if not isinstance(text, str):
        raise UserError(f"classes are text here, got {shown(text)} ({type(text).__name__}): write 'dog, cat'")
    if is_class_set(text):
        return class_set(text)
    if not files:
        return read_list(text, quiet=True)
    file = os.path.expanduser(text.strip())
    looks_like_path = file.lower().endswith(_FILE_SUFFIXES) or os.sep in file
    if (looks_like_path or "." in file) and _is(os.path.isfile, file):
        return read_list(_read_text(file), file=True)
    one_word = not re.search(r"[,;\n]", file)
    if one_word and looks_like_path and (file.lower().endswith(_FILE_SUFFIXES) or _is(os.path.isdir, file)):
        raise UserError(f"a class file must exist, but there is no {shown(file)}: check the path, or list the names")
    classes = read_list(text)
    _warn_of_likeness(classes)
    return classes


def is_class_set(name: str) -> bool:
    """Whether `class_set` takes the name."""
    return _key(name) in _names()


def class_set_names() -> tuple[str, ...]:
    """The names that `class_set` takes, aliases left out."""
    return (*_data()["class_sets"], "scenes66")


def class_set(name: str) -> tuple[ClassName, ...]:
    """The classes of a data set in label order: "voc20", "context59", "context459", "coco-stuff171", "cityscapes19",
    "ade20k150", "scenes66" (the embedded scenes), or one of the paper's web vocabularies ("batman", "car-color" …).

    Case, spaces, hyphens and underscores do not matter. Raises UserError for an unknown name.
    """
    key = _canonical(name)
    return as_classes(SCENE_CLASSES if key == "scenes66" else _data()["class_sets"][key])


def unseen_classes(name: str) -> tuple[str, ...]:
    """The unseen classes of the zero-shot split of "voc20" (5), "context59" (10) or "coco-stuff171" (15)."""
    splits = _data()["zero_shot_unseen"]
    key = _canonical(name)
    if key not in splits:
        raise UserError(f"a zero-shot split exists for {', '.join(splits)}, but not for {shown(name)}: list the names")
    return tuple(splits[key])


def prompt_templates(kind: Any = "maskclip") -> tuple[str, ...]:
    """Sentences with one `{}` for the class name.

    Args:
      kind: "imagenet" (CLIP's 80), "scene" (5, "there is a {} in the scene."), "maskclip" (all 85, as published),
        "tcl" (9, which TIPSv2's scores are made with) or "single" ("a photo of a {}.").
    """
    templates = tuple(_data()["prompt_templates"])
    kinds = {
        "imagenet": templates[:80],
        "scene": templates[80:],
        "maskclip": templates,
        "tcl": TCL_TEMPLATES,
        "single": ("a photo of a {}.",),
    }
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"prompt templates must be one of {', '.join(kinds)}, got {shown(kind)}: choose one")
    return kinds[kind]


def coco_stuff_label_map() -> UInt8[np.ndarray, "256"]:
    """Pixel value of a stuffthingmaps PNG (COCO-Stuff 164k) -> class index 0..170; 255 (ignore) for all others."""
    table = np.full(256, 255, np.uint8)
    for value, index in _data()["coco_stuff164k_png_value_to_index"].items():
        table[int(value)] = index
    return table


def context_label_map(*, background: bool) -> UInt8[np.ndarray, "460"]:
    """Value of Pascal Context's 459-class LabelMap -> class index.

    With `background` the indices are 0..59 and 0 is everything outside the 59 classes; without it they are 0..58 and
    the background is 255 (ignore).
    """
    table = np.zeros(460, np.uint8)
    for index, value in enumerate(_data()["pascal_context_459_value_to_60_sorted"]):
        table[value] = index
    return table if background else (table - 1).astype(np.uint8)  # uint8: 0 - 1 wraps to 255, the ignore value


def palette(count: int) -> UInt8[np.ndarray, "count 3"]:
    """`count` RGB colours, class by class the one farthest from all before it (in Oklab), so the first are the most
    distinct. Black, white and grey are kept free: they are shadows, skies and roads. `palette(n)[:m] == palette(m)`.
    """
    if not 0 < count <= MAX_CLASSES:
        raise UserError(f"a palette has 1 to {MAX_CLASSES} colours, got {count}: use fewer")
    colours = _colours()
    if count <= len(colours):
        return colours[:count].copy()
    # More than some hundred colours are not told apart by eye: beyond them it is enough that neighbours differ.
    index = np.arange(len(colours), count)[:, None]
    more = 256 * np.modf(index * np.array([0.8191725, 0.6710436, 0.5497005]))[0]  # the R3 low-discrepancy sequence
    return np.concatenate([colours, more.astype(np.uint8)])


def class_palette(names: Sequence[str | ClassName]) -> UInt8[np.ndarray, "C 3"]:
    """One colour per class name: grass, sky, water and the like in their own, the others from `palette`, in order,
    less what looks like a colour already given away. Takes strings or `ClassName`s (their display names)."""
    names = [str(name) for name in names]
    natural = np.array([_NATURAL[name] for name in names if name in _NATURAL], int).reshape(-1, 3)
    # half a palette is lost to its neighbours at worst, so twice the classes are enough to choose from
    colours = palette(min(2 * len(names) + 32, MAX_CLASSES))
    distance = np.linalg.norm(_oklab(colours)[:, None] - _oklab(natural)[None], axis=-1)
    free = itertools.cycle(colours[(distance > 0.1).all(-1)])
    return np.array([_NATURAL[name] if name in _NATURAL else next(free) for name in names], np.uint8)


@functools.cache
def _colours() -> UInt8[np.ndarray, "n 3"]:
    levels = np.array([0, 64, 112, 160, 208, 255])
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    spread = candidates.max(-1) - candidates.min(-1)
    candidates = candidates[(spread >= 112) & (candidates.max(-1) >= 160)]  # vivid: neither greyish nor dark
    lab = _oklab(candidates)
    distance = np.linalg.norm(lab[:, None] - _oklab(np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255]])), axis=-1)
    nearest = distance.min(-1)
    chosen = []
    following = int(np.argmin(np.abs(candidates - np.array([255, 64, 64])).sum(-1)))  # start with a red
    for _ in range(len(candidates)):
        chosen.append(following)
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[following], axis=-1))
        nearest[following] = -1
        following = int(np.argmax(nearest))
    return candidates[chosen].astype(np.uint8)


def _oklab(rgb: Integer[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """sRGB 0..255 -> Oklab (Ottosson 2020), in which equal distances look equally different."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970],
                               [0.0883025, 0.2817188, 0.6299787]]).T  # fmt: skip
    return np.cbrt(cones) @ np.array([[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937],
                                      [0.0259040, 0.7827718, -0.8086758]]).T  # fmt: skip


def _warn_of_likeness(classes: Sequence[ClassName]) -> None:
    """Warns of one class called "voc21", or "voc20" among others: hardly a name."""
    if len(classes) > 1:
        sets = [entry for entry in classes if is_class_set(entry.name) and re.search(r"\d", entry.name)]
        if sets:
            warnings.warn(
                f"{shown(sets[0].name)} is one class in this list: for its classes give it alone", stacklevel=3
            )
        return
    name, key = classes[0].name, _key(classes[0].name)
    stem = key.rstrip("0123456789")
    near = [known for known in _BENCHMARKS if len(stem) > 2 and _key(known).startswith(stem)]
    near = near or difflib.get_close_matches(key, _names(), 1, 0.75)
    if near:
        best = max(near, key=lambda known: difflib.SequenceMatcher(None, key, _key(known)).ratio())
        warnings.warn(f"{shown(name)} is one class, and every pixel is of it: did you mean {best}?", stacklevel=3)
    elif re.search(r"[|&+/\\]|\.\s| and | or ", name):
        warnings.warn(f"{shown(name)} is one class: if several are meant, put commas between", stacklevel=3)


def _is(kind: Callable[[str], bool], path: str) -> bool:
    """`os.path.isfile` or `isdir`, of what may be a bad name instead of a path."""
    try:
        return kind(path)
    except ValueError:  # a zero byte, or a surrogate
        return False


def _read_text(file: str) -> str:
    path = Path(file)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"a class file has at most {_MOST_BYTES:,} bytes, but {path} has more: choose another")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a class file must be UTF-8 text, but {path} is not ({error}): save it as text") from error


@functools.cache
def _data() -> dict:
    return json.loads(Path(__file__).with_name("class_sets.json").read_text(encoding="utf-8"))


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")


@functools.cache
def _names() -> dict[str, str]:
    return {_key(name): name for name in class_set_names()} | _ALIASES


def _canonical(name: str) -> str:
    names = _names()
    if _key(name) not in names:
        raise UserError(f"a class set is one of {', '.join(class_set_names())}, got {shown(name)}: choose one")
    return names[_key(name)]
