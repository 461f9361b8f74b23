"""The frozen teacher, MaskCLIP, as the training step calls it: uint8 crops in, scores of every pixel out.

Its arrays travel beside the train state (`Frozen`), never in it: they are in no optimiser and no checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod, dense_method
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.ops.matmul import full_precision
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.grid import cells_of_image, pixel_matrix
from maskclip_jax.segment.refine import Scale, Scores, dense_features, predict_scores, probability_scale
from maskclip_jax.segment.settings import with_backbone
from maskclip_jax.students.layers import apply_separable


class Frozen(NamedTuple):
    """Arrays that a step reads and never changes."""

    teacher: Any  # the image tower's variables; {} where no teacher runs
    text: Float[Array | np.ndarray, "C E"]  # unit vectors of the named classes: teacher's and student's classifier


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """MaskCLIP with the run's refinement. Holds no arrays.

    Fields:
      model: its `config` has the fidelity and the dense stride.
      mean, std: of its images, per RGB channel in units of 0..1.
      denoising, smoothing: thresholds; None is off.
      method: how the tower's last blocks are read.
      probability: "softmax", or "sigmoid" of a model that was trained with one.
    """

    model: CLIP
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    denoising: float | None = None
    smoothing: float | None = None
    method: DenseMethod = MASKCLIP
    probability: str = "softmax"

    def features(self, variables: Any, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w E"]:
        """Dense features of unit norm, at the teacher's own grid (of the padded image)."""
        padded, grid = self._prepared(images)
        return dense_features(self.model, variables, padded, grid, self.method)[0]

    def scores(self, variables: Any, images: UInt8[Array, "B H W 3"], classifier: Float[Array, "K E"]) -> Scores:
        """Refined scores of the given classes alone, upsampled to pixels (bilinear, aligned as the fidelity says).

        Their values are [B, H, W, K].
        """
        padded, grid = self._prepared(images)
        refinement = {"denoising": self.denoising, "smoothing": self.smoothing, "scale": self.scale(variables)}
        scores = predict_scores(self.model, variables, padded, classifier, grid=grid, method=self.method, **refinement)
        config, sizes = self.model.config, images.shape[1:3]
        matrices = (
            pixel_matrix(config, cells, size, size, columns=columns)
            for cells, size, columns in zip(cells_of_image(config, sizes), sizes, scores.values.shape[1:3], strict=True)
        )
        return scores._replace(values=apply_separable(scores.values, *matrices))

    def scale(self, variables: Any) -> Scale:
        """What scores are multiplied by before a softmax (when they are not smoothed probabilities already)."""
        return probability_scale(self.model, variables, self.probability)

    def _prepared(self, images: UInt8[Array, "B H W 3"]) -> tuple[Float[Array, "B Hp Wp 3"], Int[Array, "B 2"] | None]:
        """Normalised, padded to the tower's multiple with zeros, and the valid grid (None when nothing is padded)."""
        config = self.model.config
        sizes = images.shape[1:3]
        padding = [config.padded(size) - size for size in sizes]
        pixels = normalise(images, self.mean, self.std, self.model.dtype)
        if not any(padding):
            return pixels, None
        pixels = jnp.pad(pixels, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
        grid = jnp.asarray([[config.padded(size) // config.multiple for size in sizes]], jnp.int32)
        return pixels, jnp.broadcast_to(grid, (len(images), 2))


def normalise(
    images: UInt8[Array, "B H W 3"], mean: Sequence[float], std: Sequence[float], dtype: DTypeLike = jnp.float32
) -> Float[Array, "B H W 3"]:
    """`(x − 255 mean) / 255 std`, rounded to float32 as data pipelines round it, in the full precision of `dtype`."""
    shift, scale = (np.asarray(255 * np.asarray(each, np.float64), np.float32) for each in (mean, std))
    centred = (images.astype(jnp.float32) - shift).astype(full_precision(dtype))
    return jax.lax.reduce_precision(centred / scale.astype(centred.dtype), exponent_bits=8, mantissa_bits=23)


def load_teacher(config: DistillConfig) -> tuple[Teacher | None, Frozen]:
    """The teacher that a config names and the arrays beside the train state; None where the mode runs no teacher."""
    t = config.teacher
    pretrained = load_clip(t.model, fidelity=t.fidelity, dense_stride=t.dense_stride, activation=t.activation)
    return teacher_from(config, pretrained)


def teacher_from(
    config: DistillConfig, pretrained: Pretrained, text: Float[Array | np.ndarray, "C E"] | None = None
) -> tuple[Teacher | None, Frozen]:
    """`load_teacher` for a CLIP that is loaded already; `text` replaces the classifier made from the class names."""
    if text is None:
        text = text_classifier(pretrained, config.class_names, config.teacher.templates)
    if not config.uses_teacher:
        return None, Frozen({}, text)
    pretrained = with_backbone(pretrained, config.teacher)
    variables = image_tower(pretrained.variables)
    if full_precision(config.dtype) != jnp.float32:
        unfolded = {name: tree for name, tree in variables.items() if name != "folded"}  # a product, rounded before
        variables, text = jax.tree.map(lambda x: jnp.asarray(x, config.dtype), (unfolded, text))
    teacher = Teacher(
        pretrained.model.clone(dtype=jnp.dtype(config.dtype)),  # the text classifier was made in full precision
        pretrained.preprocess.mean,
        pretrained.preprocess.std,
        config.teacher.prompt_denoising,
        config.teacher.key_smoothing,
        dense_method(config.teacher.method, pretrained.config),
        config.teacher.probability,
    )
    return teacher, Frozen(variables, text)


def image_tower(variables: Any) -> Any:
    """`variables` without the text tower, which no step needs."""
    return {**variables, "params": {name: x for name, x in variables["params"].items() if name != "text"}}
