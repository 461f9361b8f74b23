"""`Options` resolved for one model and its classes: sizes, thresholds, text classifier and weights on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.preprocess import PreparedImage, Preprocess, ResizedImage, prepare, resize, sized
from maskclip_jax.data.vocabulary import ClassName, as_classes
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import DenseMethod, dense_method
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import Classes, named_classes, text_classifier
from maskclip_jax.segment.options import BACKGROUND, Options, with_overrides
from maskclip_jax.segment.refine import Sigmoid, probability_scale


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionSettings:
    """Options, and what follows from them for one model and its words. Made by `prediction_settings`.

    Fields:
      options: as they came.
      model, variables, preprocess: the checkpoint's, with the options' sizes; variables lie on the device.
      classifier: [words, E], on the device.
      names: classes to display.
      word_class: the class of each of the classifier's words.
      scale: what logits are multiplied by before a softmax, or a `Sigmoid`.
      method: how the last blocks are read.
      times: an image is resized to this many times the size that `preprocess` gives (of several views).
    """

    options: Options
    model: CLIP
    variables: Any
    preprocess: Preprocess
    classifier: Any
    names: tuple[str, ...]
    word_class: tuple[int, ...]
    scale: np.float32 | Sigmoid
    method: DenseMethod
    times: float = 1.0

    @property
    def config(self) -> CLIPConfig:
        """The model's."""
        return self.model.config

    @property
    def refinement(self) -> dict[str, Any]:
        """The scale of the softmax, and the thresholds of prompt denoising and key smoothing; None is off."""
        o = self.options
        return {"scale": self.scale, "denoising": _single(o.prompt_denoising), "smoothing": _single(o.key_smoothing)}

    @property
    def naming(self) -> dict[str, Any]:
        """What `label_pixels` wants to know: how scores become classes and probabilities."""
        return {
            "word_class": np.asarray(self.word_class, np.int32),
            "scale": self.scale,
            "least": np.float32(self.options.background_threshold or 0),
            "synonyms": self.options.synonyms,
        }

    def resized(self, original: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of that size is read at, in pixels."""
        return self.preprocess.resized(original, self.times)

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> ResizedImage:
        """An image at the size that it is read at; `prepare` takes it too."""
        return resize(image, self.preprocess, self.times)

    def prepare(self, image: UInt8[np.ndarray, "H W 3"] | ResizedImage, multiple: int | None = None) -> PreparedImage:
        """An image as the tower takes it (to be cut into windows: with a `multiple` of 1)."""
        if multiple is not None:
            return prepare(image, self.preprocess, multiple, scale=self.times)
        return prepare(image, self.preprocess, self.config.multiple, least=self.config.stride, scale=self.times)


def prediction_settings(
    classes: Classes,
    pretrained: Pretrained,
    options: Options | None = None,
    *,
    classifier: Float[np.ndarray | Array, "words E"] | None = None,
    **overrides: Any,
) -> PredictionSettings:
    """The options of `segment_images` (see there) for one model, and the text classifier. Raises UserError."""
    o = with_overrides(options, overrides)
    pair = with_backbone(pretrained, o)
    names, words, word_class = _words(named_classes(classes), o.background, o.background_threshold is not None)
    if o.synonyms == "max":
        word_class = tuple(c for c, entry in zip(word_class, words, strict=True) for _ in entry)
        words = tuple(ClassName.of((word,)) for entry in words for word in entry)
    method = dense_method(o.method, pretrained.config)
    preprocess = sized(pretrained.preprocess, o.short_side, o.within)
    if classifier is None:
        classifier = text_classifier(pretrained, words, o.templates, cache=o.cache)
    classifier = np.asarray(classifier, np.float32)
    wanted = (len(words), pretrained.config.embed_dim)
    if classifier.shape != wanted:
        raise UserError(
            f"a classifier has a row for each of the {wanted[0]} words (background first) and {wanted[1]} columns, "
            f"got {list(classifier.shape)}: make it with text_classifier"
        )
    scale = probability_scale(pretrained.model, pretrained.variables, o.probability, o.probability_scale)
    scale = jax.tree.map(np.float32, scale)
    variables, rows = jax.device_put((pair.variables, classifier))
    return PredictionSettings(o, pair.model, variables, preprocess, rows, names, word_class, scale, method)


def with_backbone(pretrained: Pretrained, options: Options) -> Pretrained:
    """`pretrained` with the second backbone that the options name beside it, if they do."""
    if options.affinity is None:
        return pretrained
    from maskclip_jax.segment.paired import paired  # few ask for it

    return paired(pretrained, options.method, options.affinity)


def _single(value: float | None) -> np.float32 | None:
    return None if value is None else np.float32(value)


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
