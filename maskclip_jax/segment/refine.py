"""Scores of a grid's cells: cosines with the text classifier, denoised and smoothed, and the probabilities they mean.

Equation 4 of the paper, prompt denoising and key smoothing (its section 3.3; docs/method.md, section 3).

Pure functions, safe under `jit`, `vmap` and `grad`, denoising and smoothing compiled by themselves where they are
called alone; thresholds may be traced, so a whole grid of them is one `vmap`.
Where images of different sizes share a padded batch, `grid` or `valid` says which positions are image.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.encoders.positions import valid_mask
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import in_full_precision, is_portable, jitted, unit

Arrays = Array | np.ndarray
DROPPED = -100.0  # the logit of a denoised class; a cosine is never below -1


class Logits(NamedTuple):
    """Scores that a softmax makes probabilities of, once they are multiplied by a scale: cosines, as a rule."""

    values: Float[Arrays, "*b C"]


class Probabilities(NamedTuple):
    """Scores that are probabilities already, or were before key smoothing mixed them: then they need not sum to one."""

    values: Float[Arrays, "*b C"]


class Sigmoid(NamedTuple):
    """In a softmax scale's place: each class is judged by itself, with `sigmoid(scale · cosine + bias)`, as SigLIP is
    trained. Classes may then overlap, or none be there."""

    scale: ArrayLike
    bias: ArrayLike


Scores = Logits | Probabilities  # whatever the kind, values are upsampled alike, and the largest entry is the answer
Scale = ArrayLike | Sigmoid  # how logits become probabilities; either may be traced


def to_probabilities(scores: Scores, scale: Scale) -> Float[Array, "*b C"]:
    """The one place that knows how scores become probabilities: a softmax of `scale` times logits (or the sigmoid);
    smoothed probabilities, cosines being what they are, are clipped at zero and divided by their sum (all alike where
    nothing is left), or where classes are judged one by one, clipped to 0..1."""
    if isinstance(scale, Sigmoid):
        if isinstance(scores, Logits):
            return jax.nn.sigmoid(scale.scale * scores.values + scale.bias)
        return jnp.clip(scores.values, 0, 1)
    if isinstance(scores, Logits):
        return jax.nn.softmax(scale * scores.values, axis=-1)
    positive = jnp.maximum(scores.values, 0)
    total = positive.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1), 1 / positive.shape[-1])


def class_probabilities(
    words: Float[Array, "*b C"], word_class: Int[Arrays, " C"], classes: int, *, best: bool
) -> Float[Array, "*b K"]:
    """Probabilities of words -> of `classes` classes: the sum over a class's words, or the `best` of them."""
    if best:
        largest = jax.ops.segment_max(jnp.moveaxis(words, -1, 0), word_class, classes)
        return jnp.moveaxis(jnp.maximum(largest, 0), 0, -1)  # a class without words has none
    return jnp.einsum("...c,ck->...k", words, jax.nn.one_hot(word_class, classes), precision="highest")


probabilities = jax.jit(to_probabilities)


def probability_scale(
    model: CLIP, variables: Any, probability: str = "softmax", fixed: float | int | None = None
) -> Scale:
    """What logits are multiplied by before the softmax: `fixed`, the fidelity's constant, or the model's own scale.

    `probability="sigmoid"` adds the model's bias (`Sigmoid`). Raises UserError for a model that has none.
    """
    params, fixed = variables["params"], fixed or model.config.fidelity.probability_scale
    scale = jnp.exp(params["logit_scale"]) if fixed is None else fixed
    if probability == "softmax":
        return scale
    if "logit_bias" not in params:
        raise UserError(
            "a sigmoid needs a model that was trained with one (SigLIP), whose logits have a bias, got one without: "
            "leave --probability out"
        )
    return Sigmoid(scale, params["logit_bias"])


class DenseLogits(NamedTuple):
    """Cosines of every position with every class, and the keys that smoothing wants."""

    logits: Float[Array, "B h w C"]
    keys: Float[Array, "B L D"]


def dense_features(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
    """Unit features of every position, and the last attention's keys; arguments as in `dense_logits`."""
    images, grid = jnp.asarray(images), None if grid is None else jnp.asarray(grid)
    reading = dataclasses.asdict(method)
    return tuple(model.apply(variables, images, grid=grid, method="encode_dense", **reading))


def cosines(features: Float[Array, "B h w E"], classifier: Float[Arrays, "C E"]) -> Float[Array, "B h w C"]:
    """Logits of unit features, in full precision."""
    return jnp.einsum("bhwe,ce->bhwc", features, classifier, precision="highest")


def dense_logits(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
) -> DenseLogits:
    """MaskCLIP (paper, equation 4): the text classifier applied to the value features of every position.

    Args:
      model, variables: as in `Pretrained`.
      images: normalised, sides multiples of `config.multiple`.
      classifier: unit vectors, as `text_classifier` makes them. Logits are differentiable in them.
      grid: valid rows and columns of each image inside a padded batch, in units of `config.multiple` (`encode_dense`).
      method: how the last blocks are read (`maskclip_jax.encoders.dense.METHODS`).
    """
    features, keys = dense_features(model, variables, images, grid, method)
    return DenseLogits(cosines(features, classifier), keys)


def predict_scores(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
    scale: Scale | None = None,
    denoising: ArrayLike | None = None,
    smoothing: ArrayLike | None = None,
) -> Scores:
    """What is upsampled and whose largest entry is the answer: logits, or with smoothing, probabilities [B, h, w, C].

    Args:
      scale: of the softmax, or a `Sigmoid`; None is `probability_scale(model, variables)`. This and both thresholds may
        be traced.
      denoising: threshold of `prompt_denoising`; None is off.
      smoothing: threshold of `key_smoothing`; None is off.
      The others are those of `dense_logits`; the habits are those of `model.config.fidelity`.
    """
    scale = probability_scale(model, variables) if scale is None else scale
    logits, keys = dense_logits(model, variables, images, classifier, grid=grid, method=method)
    return refined(logits, keys, model.config, scale=scale, denoising=denoising, smoothing=smoothing, grid=grid)


def predict_probabilities(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    scale: Scale | None = None,
    **options: Any,
) -> Float[Array, "B h w C"]:
    """`predict_scores` (and its options) as probabilities that sum to one at every position of the grid."""
    scale = probability_scale(model, variables) if scale is None else scale
    return to_probabilities(predict_scores(model, variables, images, classifier, scale=scale, **options), scale)


def refined(
    logits: Float[Arrays, "B h w C"],
    keys: Float[Arrays, "B L D"] | None,
    config: CLIPConfig,
    *,
    scale: Scale,
    denoising: ArrayLike | None = None,
    smoothing: ArrayLike | None = None,
    grid: Int[Arrays, "B 2"] | None = None,
    confidence: Float[Arrays, "B C"] | None = None,
) -> Scores:
    """Denoised, then smoothed (docs/method.md, section 3).

    Args:
      keys: only smoothing needs them.
      confidence: that of `grid_confidence`, over whatever counts as one image; None: these grids are whole images.
      The others are those of `predict_scores`.
    """
    fidelity, valid = config.fidelity, flat_mask(grid, logits.shape[1:3], config)
    flat = jnp.reshape(logits, (logits.shape[0], -1, logits.shape[-1]))
    if denoising is not None:
        confidence = class_confidence(flat, scale=scale, valid=valid) if confidence is None else confidence
        flat = drop_classes(flat, confidence, threshold=denoising, all_denoised=fidelity.all_denoised)
    if smoothing is None:
        return Logits(flat.reshape(logits.shape))
    p = to_probabilities(Logits(flat), scale)
    p = key_smoothing(p, keys, threshold=smoothing, normalize=fidelity.key_normalization, valid=valid)
    return Probabilities(p.reshape(logits.shape))


def grid_confidence(
    logits: Float[Array, "B h w C"], grid: Int[Arrays, "B 2"] | None, config: CLIPConfig, scale: Scale
) -> Float[Array, "B C"]:
    """`class_confidence` over a padded grid."""
    flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])
    return class_confidence(flat, scale=scale, valid=flat_mask(grid, logits.shape[1:3], config))


def flat_mask(grid: Int[Arrays, "B 2"] | None, shape: tuple[int, int], config: CLIPConfig) -> Bool[Array, "B L"] | None:
    """True at the positions (flattened, of a feature grid of this shape) that hold image; None when all do."""
    mask = valid_mask(None if grid is None else config.cells(jnp.asarray(grid)), shape)
    return None if mask is None else mask.reshape(mask.shape[0], -1)


@functools.partial(jitted, static_argnames="all_denoised")
def prompt_denoising(
    logits: Float[Arrays, "B L C"],
    *,
    scale: Scale,
    threshold: ArrayLike,
    all_denoised: Literal["keep_best", "drop_all"] = "keep_best",
    valid: Bool[Arrays, "B L"] | None = None,
) -> Float[Array, "B L C"]:
    """Drops every class that no position of its image is confident of: its logits become -100.

    Args:
      logits: cosines of features and classifier.
      scale: the probabilities are `softmax(scale · logits)`.
      threshold: a class is dropped when its largest probability over the image is below this (strictly; paper: 0.5).
      all_denoised: when that would drop every class, keep the most confident one, or drop all (the released code,
        which then answers class 0 everywhere).
      valid: True where a position is image; the others have no say. None: all are.
    """
    confidence = class_confidence(logits, scale=scale, valid=valid)
    return drop_classes(logits, confidence, threshold=threshold, all_denoised=all_denoised)


def class_confidence(
    logits: Float[Arrays, "B L C"], *, scale: Scale, valid: Bool[Arrays, "B L"] | None = None
) -> Float[Array, "B C"]:
    """The largest probability that each class reaches in each image, `max_i softmax(scale · logits)_ic`."""
    probabilities = to_probabilities(Logits(in_full_precision(jnp.asarray(logits))), scale)
    if valid is not None:
        probabilities = jnp.where(valid[..., None], probabilities, 0)
    return probabilities.max(axis=1)


def drop_classes(
    logits: Float[Arrays, "B L C"],
    confidence: Float[Arrays, "B C"],
    *,
    threshold: ArrayLike,
    all_denoised: Literal["keep_best", "drop_all"] = "keep_best",
) -> Float[Array, "B L C"]:
    """The second half of `prompt_denoising`, for a confidence that was gathered elsewhere (over several windows)."""
    keep = confidence >= jnp.asarray(threshold, confidence.dtype)
    if all_denoised == "keep_best":
        best = jnp.arange(confidence.shape[-1]) == confidence.argmax(axis=-1, keepdims=True)
        keep |= best & ~keep.any(axis=-1, keepdims=True)
    return jnp.where(keep[:, None], logits, DROPPED)


@functools.partial(jitted, static_argnames="normalize")
def key_smoothing(
    probabilities: Float[Arrays, "B L C"],
    keys: Float[Arrays, "B L D"],
    *,
    threshold: ArrayLike = 1.0,
    normalize: Literal["channels", "positions"] = "channels",
    valid: Bool[Arrays, "B L"] | None = None,
) -> Float[Array, "B L C"]:
    """`p_i ← Σ_j cos(k_i, k_j) p_j` wherever p_i is not certain. The result does not sum to one (nor need it).

    The sum is linear in p, so `K̂(K̂ᵀP)` is the same as `(K̂K̂ᵀ)P`: whichever takes fewer multiplications by the shapes,
    2·L·D·C or L²(D+C), is computed. In the first order no L×L array exists.

    Args:
      probabilities: after denoising, if any.
      keys: of the last attention layer, as `encode_dense` gives them.
      threshold: positions whose largest probability is below this (strictly) are replaced; at 1.0 these are all but
        those saturated at exactly 1 (`saturated`).
      normalize: keys of unit length over "channels" (D: a cosine) or over "positions" (L: the released code).
      valid: True where a position is image; the others lend nothing to it. None: all are.
    """
    p, k = in_full_precision(jnp.asarray(probabilities)), in_full_precision(jnp.asarray(keys))
    source = p
    if valid is not None:
        source, k = (jnp.where(valid[..., None], x, 0) for x in (p, k))
    k = unit(k, -1 if normalize == "channels" else 1)  # has a gradient at zero, where padding is
    _, length, width = k.shape
    classes = p.shape[-1]
    with jax.default_matmul_precision("highest"):
        if is_portable() or 2 * width * classes <= length * (width + classes):
            mixed = jnp.einsum("bld,bdc->blc", k, jnp.einsum("bld,blc->bdc", k, source))
        else:
            mixed = jnp.einsum("blm,bmc->blc", jnp.einsum("bld,bmd->blm", k, k), source)
    threshold = jnp.asarray(threshold, p.dtype)
    low, below = threshold < 1, p.max(axis=-1, keepdims=True) < threshold
    uncertain = (low & below) | (~low & ~saturated(p)[..., None])  # no `where` of flags, which onnxruntime has not
    return jnp.where(uncertain, mixed, p)


def saturated(probabilities: Float[Arrays, "*b C"]) -> Bool[Array, "*b"]:
    """Where the largest probability is exactly 1 in a softmax that adds its exponentials class by class.

    The released code's does so; asking `p == 1` would leave it to each processor's order of addition.

    The largest exponential is 1, so that its sum with what came before rounds to 1 up to half an epsilon, and each that
    follows is lost by itself up to that.
    """
    p = jnp.asarray(probabilities)
    best, place = p.argmax(axis=-1, keepdims=True), jnp.arange(p.shape[-1])
    exponential = p / p.max(axis=-1, keepdims=True)
    before = jnp.where(place < best, exponential, 0).sum(axis=-1)
    after = jnp.where(place > best, exponential, 0).max(axis=-1)
    return jnp.maximum(before, after) <= jnp.finfo(p.dtype).eps / 2
