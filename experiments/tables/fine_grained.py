"""Fine-grained and novel prompts (paper, Figures 3 and 4): a colour and a noun on the scenes; the paper's own prompt
sets for web images of the user's.

    python -m experiments.tables.fine_grained                                 no download; the records hold the seconds
    python run.py segment photo.jpg --classes car_color --background "road, building, sky" --model … --out out

Published: pictures, no numbers. Ours: experiments/README.md, from results/fine_grained.embedded.json. A quarter of the
tintable things in the scenes are tinted; a caption then says "red car". Two questions:

    colour      given its mask and its noun: which of six colours? (chance: 16.7%)
    segmentation  241 prompts at once, 210 of them colour and noun; things in their own colours are left out
"""

from __future__ import annotations

import functools
import json
import sys
import zipfile
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import records
from experiments.harness.figures import Figure, sheet
from experiments.harness.records import Cell, Found, Settings, table
from experiments.harness.scoring import ARCHIVE, inputs_of, open_data, pretrained
from maskclip_jax.cli.common import progress
from maskclip_jax.data.images import IGNORE
from maskclip_jax.data.vocabulary import SCENE_CLASSES, SCENE_STUFF, class_palette, class_set
from maskclip_jax.evaluate.metrics import confusion_matrix, mean_iou
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.predict import iter_segmentations, prediction_settings

NAME = "fine_grained"
TITLE = "Fine-grained classes and novel prompts"
SCENES = 200
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
# The paper's prompts for web images and what stands beside them; the last column is what to look for.
PROMPTS = {
    "car_color": ("car colours", "a yellow, a red, a blue car side by side"),
    "car_brands": ("car brands", "cars of several makers"),
    "blurry_car": ("blurry car", "a sharp and a motion-blurred car"),
    "batman": ("Batman, Joker", "a film still with both"),
    "batman_extended": ("Batman, Joker, more distractors", "the same"),
    "mickey": ("Mickey Mouse", "a photograph from a theme park"),
    "mario": ("Mario", "a screenshot"),
    "gates": ("Bill Gates, Steve Jobs", "a photograph with both"),
    "sports": ("players of several sports", "a match"),
}
FULL_MODEL = "openai/clip-vit-base-patch16"


class Coloured(NamedTuple):
    """A scene and the colours of its tinted things."""

    image: np.ndarray  # uint8 [H, W, 3]
    labels: np.ndarray  # [H, W], classes
    phrases: dict[int, str]  # class -> "red car"
    plain: tuple[int, ...]  # tintable classes that are there in their own colours


@functools.cache
def tintable() -> tuple[str, ...]:
    """Nouns that are ever tinted."""
    return tuple(sorted({p.split()[1] for scene in _phrases() for p in scene if " " in p}))


@functools.cache
def _phrases() -> list[tuple[str, ...]]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        return [tuple(scene["phrases"]) for scene in json.loads(archive.read("scenes.json"))["heldout"]]


def coloured_scenes(count: int) -> list[Coloured]:
    """Those of the first `count` scenes that hold a tinted thing."""
    source, out = open_data("scenes", count), []
    for index, phrases in enumerate(_phrases()[:count]):
        tinted = {SCENE_CLASSES.index(p.split()[1]): p for p in phrases if " " in p}
        if tinted:
            plain = tuple(SCENE_CLASSES.index(p) for p in phrases if p in tintable())
            example = source[index]
            out.append(Coloured(example.image, example.labels, tinted, plain))
    return out


def prompts() -> list[str]:
    """Every colour and tintable noun, then the classes that have no tint."""
    return [f"{c} {n}" for n in tintable() for c in COLOURS] + [n for n in SCENE_CLASSES if n not in tintable()]


def truth(scene: Coloured, names: list[str]) -> np.ndarray:
    """Labels into `prompts()`; things in their own colours are ignored (a tomato is a red one anyway). int32 [H, W]."""
    table = np.array([names.index(n) if n in names else -1 for n in SCENE_CLASSES])
    for label, phrase in scene.phrases.items():
        table[label] = names.index(phrase)
    table[list(scene.plain)] = -1
    return table[scene.labels]


def scores(model: str, count: int) -> dict[str, Any]:
    """Both questions for one model."""
    clip, names, scenes = pretrained(model), prompts(), coloured_scenes(count)
    classifier = text_classifier(clip, names)
    settings = prediction_settings(names, clip, classifier=classifier, return_probabilities=True)
    nouns = prediction_settings(list(SCENE_CLASSES), clip)  # what the same things are called without colours
    confusion, pixels = np.zeros((len(names),) * 2, np.int64), np.zeros(4, np.int64)
    plain_right = 0
    right, things = 0, 0
    with progress(f"{NAME} {model}", len(scenes)) as report:
        found = iter_segmentations((scene.image for scene in scenes), settings, report)
        plain = iter_segmentations((scene.image for scene in scenes), nouns)
        for scene, result, by_noun in zip(scenes, found, plain, strict=True):
            log_p = np.log(np.maximum(result.probabilities, 1e-30))
            for label, phrase in scene.phrases.items():
                mask = scene.labels == label
                noun = phrase.split()[1]
                candidates = [names.index(f"{c} {noun}") for c in COLOURS]
                answer = COLOURS[int(log_p[mask][:, candidates].mean(0).argmax())]
                right, things = right + (answer == phrase.split()[0]), things + 1
                plain_right += int((by_noun.labels[mask] == label).sum())
                pixels += _agreement(phrase, [names[i] for i in result.labels[mask]])
            labels = truth(scene, names)
            counted = labels >= 0
            confusion += confusion_matrix(labels[counted], result.labels[counted].astype(np.int64), len(names), -1)
    iou = np.asarray(mean_iou(confusion).per_class)[: len(tintable()) * len(COLOURS)]
    there = confusion.sum(1)[: len(iou)] > 0
    return {
        "colour given the noun": 100 * right / things,
        "mIoU, colour and noun": 100 * float(iou[there].mean()),
        "pixels: both right": 100 * pixels[1] / pixels[0],
        "pixels: noun right": 100 * pixels[2] / pixels[0],
        "pixels: colour right": 100 * pixels[3] / pixels[0],
        "pixels: noun right, 66 plain names": 100 * plain_right / pixels[0],
        "things": things,
        "phrases": int(there.sum()),
        "prompts": len(names),
    }


def _agreement(phrase: str, answers: list[str]) -> np.ndarray:
    colour, noun = phrase.split()
    words = [answer.split() for answer in answers]
    nouns = np.array([w[-1] == noun for w in words])
    colours = np.array([w[0] == colour and len(w) == 2 for w in words])
    return np.array([len(words), (nouns & colours).sum(), nouns.sum(), colours.sum()])


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        return []
    count = settings.scenes(SCENES)
    return [
        Cell(
            f"scenes/{short}",
            {"model": model, "data": "scenes", "count": count, "colours": list(COLOURS), "inputs": inputs_of(model)},
            functools.partial(scores, model, count),
        )
        for short, model in MODELS.items()
    ]


def segment_command(name: str) -> str:
    """What segments a web image by one of the paper's prompt sets."""
    background = ", ".join(str(c) for c in class_set("web_background"))
    return (
        f'python run.py segment photo.jpg --classes {name} --background "{background}" '
        f"--model {FULL_MODEL} --fidelity released --out out/{name}"
    )


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """Scores of both models, a sheet; at full size the commands for web images."""
    if settings.scale == "full":
        rows = [(what, look, f"`{segment_command(name)}`") for name, (what, look) in PROMPTS.items()]
        return [
            "The paper shows pictures of web images; with an image of your own:\n",
            table([("", "image", "command"), *rows]),
        ]
    known = {key.split("/")[1]: f.scores for key, f in found.items() if f.scores is not None}
    if not known:
        return []
    some = next(iter(known.values()))
    note = (
        f"{some['things']} tinted things in {SCENES if settings.count is None else settings.count} scenes, "
        f"{some['prompts']} prompts; in %. Chance is {100 / len(COLOURS):.1f} for the colour given the noun.\n"
    )
    rows = [(name, *(s[name] for s in known.values())) for name, value in some.items() if isinstance(value, float)]
    return [note, table([("", *known), *rows]), sheet(f"{NAME}_sheet", "Colours and nouns (ResNet)", examples)]


def examples(shown: int = 6) -> np.ndarray:
    """Scenes with the largest tinted things: every one of the six colours competes, for its noun."""
    from maskclip_jax.segment.predict import segment_images
    from maskclip_jax.visualize import comparison_sheet, overlay

    clip, scenes = pretrained(MODELS["resnet"]), coloured_scenes(120)
    scenes.sort(key=lambda scene: -max((scene.labels == label).sum() for label in scene.phrases))
    large = lambda x: np.repeat(np.repeat(x, 2, 0), 2, 1)  # noqa: E731
    rows, captions = [], []
    for scene in scenes[:shown]:
        others = list(SCENE_STUFF)
        names = [f"{c} {p.split()[1]}" for p in scene.phrases.values() for c in COLOURS] + others
        (found,) = segment_images([scene.image], names, clip)
        palette = class_palette(names)
        palette[: -len(others)] = [_SWATCHES[n.split()[0]] for n in names[: -len(others)]]
        labels = np.full(scene.labels.shape, IGNORE)
        for label, phrase in scene.phrases.items():
            labels[scene.labels == label] = names.index(phrase)
        masks = [overlay(large(scene.image), large(m), palette) for m in (found.labels, labels)]
        rows.append([large(scene.image), *masks])
        top = sorted((s.area, n) for n, s in found.scores.items() if n not in others)[-1][1]
        captions.append(["", f"most: {top}", ", ".join(scene.phrases.values())])
    return comparison_sheet(["image", "MaskCLIP", "truth (tinted things)"], rows, captions=captions, panel=224)


_SWATCHES = {
    "red": (230, 30, 40), "green": (30, 170, 60), "blue": (40, 90, 240), "yellow": (250, 215, 20),
    "white": (250, 250, 250), "black": (15, 15, 20),
}  # fmt: skip

if __name__ == "__main__":
    records.main(sys.modules[__name__])
