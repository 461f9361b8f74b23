"""What a prediction is asked to do, checked once and kept for any number of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from maskclip_jax.checkpoints.load import Pretrained
from maskclip_jax.data.preprocess import PreparedImage, Preprocess, prepare, sized
from maskclip_jax.data.vocabulary import ClassName, as_classes
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod, dense_method
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import Classes, Templates, named_classes, text_classifier
from maskclip_jax.segment.window_layout import check_windows

BACKGROUND = "background"
MOST_PAMR = 1000
MOST_SCALE = 16
MOST_LOGIT_SCALE = 1e6  # float32's exponentials of more are one class's or none's


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionSettings:
    """Everything about a prediction but the images. Made by `prediction_settings`.

    Fields:
      model, variables, preprocess: the checkpoint's; variables lie on the device.
      classifier: [words, E], on the device.
      names: classes to display.
      word_class: the class of each of the classifier's words.
      scale: what logits are multiplied by before a softmax.
      denoising, smoothing: thresholds; None is off.
      naive: read the unmodified last layer.
      windows: (window, stride) in pixels of the resized image; None is whole images.
      least: below this probability a pixel is class 0; 0 is never.
      batch_size: images or windows at once, at most.
      return_probabilities: keep the probability of every class.
      method: how the last blocks are read.
      synonyms: a class's words are one row ("mean"), or a row each, of which the most probable counts ("max").
      pamr: steps of PAMR on the pixels.
      scales, flip: views whose probabilities are averaged.
    """

    model: CLIP
    variables: Any
    preprocess: Preprocess
    classifier: Any
    names: tuple[str, ...]
    word_class: tuple[int, ...]
    scale: np.float32
    denoising: np.float32 | None
    smoothing: np.float32 | None
    naive: bool
    windows: tuple[int, int] | None
    least: float
    batch_size: int
    return_probabilities: bool
    method: DenseMethod = MASKCLIP
    synonyms: str = "mean"
    pamr: int = 0
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def config(self) -> CLIPConfig:
        """The model's."""
        return self.model.config

    def prepare(self, image: UInt8[np.ndarray, "H W 3"]) -> PreparedImage:
        """A whole image as the tower takes it."""
        return prepare(image, self.preprocess, self.config.multiple, least=self.config.stride)


def prediction_settings(
    classes: Classes,
    pretrained: Pretrained,
    *,
    templates: Templates = None,
    classifier: Float[np.ndarray | Array, "words E"] | None = None,
    prompt_denoising: float | int | None = None,
    key_smoothing: float | int | bool | None = None,
    naive: bool = False,
    short_side: int | None = None,
    within: Sequence[int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    background: Classes | None = None,
    background_threshold: float | int | None = None,
    batch_size: int = 8,
    return_probabilities: bool = False,
    cache: bool | str | Path = True,
    method: str | DenseMethod = "maskclip",
    synonyms: str = "mean",
    probability_scale: float | int | None = None,
    pamr: int = 0,
    scales: Sequence[float | int] = (1.0,),
    flip: bool = False,
) -> PredictionSettings:
    """Checks the options of `segment_images` (see there) and makes the text classifier. Raises UserError."""
    names, words, word_class = _words(named_classes(classes), background, background_threshold is not None)
    if synonyms not in ("mean", "max"):
        raise UserError(f"synonyms are taken by their 'mean' or their 'max', not {synonyms!r}: choose one")
    if synonyms == "max":
        word_class = tuple(c for c, entry in zip(word_class, words, strict=True) for _ in entry)
        words = tuple(ClassName.of((word,)) for entry in words for word in entry)
    reading = dense_method(method, pretrained.config)
    if naive and reading != MASKCLIP:
        raise UserError("--naive is the unmodified last layer, but another method came too: give one of the two")
    if not 0 <= pamr <= MOST_PAMR:
        raise UserError(f"PAMR takes 0 to {MOST_PAMR} steps, but {pamr} came: the paper's are 10")
    check_scales(scales)
    if probability_scale is not None and not 0 < probability_scale <= MOST_LOGIT_SCALE:
        raise UserError(
            f"a probability scale is above 0 and up to {MOST_LOGIT_SCALE:g}, but {probability_scale} came: try 40"
        )
    if isinstance(key_smoothing, bool):
        key_smoothing = 1.0 if key_smoothing else None
    for name, value in (
        ("prompt denoising", prompt_denoising),
        ("key smoothing", key_smoothing),
        ("a background threshold", background_threshold),
    ):
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{name} takes a probability above 0 and up to 1, but {value} came: try 0.5")
    if batch_size < 1:
        raise UserError(f"a batch holds at least one image, but {batch_size} came: use 1 or more")
    windows = check_windows(window, stride)
    preprocess = sized(pretrained.preprocess, short_side, within)
    if classifier is None:
        classifier = text_classifier(pretrained, words, templates, cache=cache)
    classifier = np.asarray(classifier, np.float32)
    wanted = (len(words), pretrained.config.embed_dim)
    if classifier.shape != wanted:
        raise UserError(
            f"a classifier has a row for each of the {wanted[0]} words (background first) and {wanted[1]} columns, "
            f"but {list(classifier.shape)} came: make it with text_classifier"
        )
    model = pretrained.model
    if probability_scale is not None:  # where the fidelity keeps it, so that every softmax there is takes it
        fidelity = dataclasses.replace(model.config.fidelity, probability_scale=float(probability_scale))
        model = CLIP(dataclasses.replace(model.config, fidelity=fidelity), model.dtype)
    fixed = model.config.fidelity.probability_scale
    scale = np.exp(np.asarray(pretrained.variables["params"]["logit_scale"])) if fixed is None else fixed
    return PredictionSettings(
        model,
        jax.device_put(pretrained.variables),
        preprocess,
        jax.device_put(classifier),
        names,
        word_class,
        np.float32(scale),
        None if prompt_denoising is None else np.float32(prompt_denoising),
        None if key_smoothing is None else np.float32(key_smoothing),
        naive,
        windows,
        float(background_threshold or 0),
        batch_size,
        return_probabilities,
        reading,
        synonyms,
        pamr,
        tuple(map(float, scales)),
        flip,
    )


def check_scales(scales: Sequence[float | int]) -> None:
    """Raises UserError unless there are scales, of a size that an image may have."""
    if not scales or not all(1 / MOST_SCALE <= scale <= MOST_SCALE for scale in scales):  # NaN neither
        least = 1 / MOST_SCALE
        raise UserError(f"scales are {least} to {MOST_SCALE}, but {cut(list(scales))} came: try 0.75 1 1.25")


def _words(
    classes: Sequence[ClassName], background: Classes | None, with_background: bool
) -> tuple[tuple[str, ...], tuple[ClassName, ...], tuple[int, ...]]:
    """Names to display, what the classifier has rows for, and the class of each row."""
    names = tuple(str(entry) for entry in classes)
    if background is None and not with_background:
        return names, tuple(classes), tuple(range(len(classes)))
    if BACKGROUND in (name.casefold() for name in names):
        raise UserError(
            f"the class {BACKGROUND!r} is added by itself, but it is among the classes too: leave it out there"
        )
    unwanted = () if background is None else named_classes(background)
    words = as_classes([*unwanted, *classes])
    return (BACKGROUND, *names), words, (0,) * len(unwanted) + tuple(range(1, len(classes) + 1))
