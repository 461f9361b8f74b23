"""A student, or a CLIP read densely, as one function of 8-bit pixels: what the files of `formats.py` hold.

Pixels are normalised inside, and scores are brought to pixels there, so that nothing of this package is needed. Images
are resized before (`about["resize"]` says how), because the filters that decide a mask's last percent are Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.distill.evaluation import student_reader
from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.distill.teacher import image_tower
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import teacher_reader
from maskclip_jax.evaluate.engine import Reader
from maskclip_jax.ops.matmul import portable
from maskclip_jax.segment.options import Options
from maskclip_jax.students.layers import apply_separable, bilinear_matrix

MOST_SIDE = 2**13
READ = ("method", "prompt_denoising", "key_smoothing", "templates", "short_side", "within", "cache")
Size = tuple[int, int] | None  # height and width in pixels; None: any multiples of `Deployed.multiple`


class Deployed(NamedTuple):
    """A model as a function, and what its user has to know.

    Fields:
      function: (image uint8 [1, H, W, 3] in RGB, for a segmenter also classifier float32 [C, E], unit rows) -> labels
        int32 [1, H, W] and probabilities float32 [1, H, W, C].
      multiple: of pixels, of sides.
      size: the one size it takes, or None.
      width: E of a segmenter's classifier; None for a student.
      about: JSON: classes and palette (of a student), resize, what it is.
    """

    function: Callable[..., tuple[Array, Array]]
    multiple: int
    size: Size
    width: int | None
    about: dict[str, Any]

    def shapes(self, height: Any, width: Any, classes: Any) -> list[jax.ShapeDtypeStruct]:
        """The inputs for these sides and, for a segmenter, that many classes; numbers or symbols."""
        image = jax.ShapeDtypeStruct((1, height, width, 3), np.uint8)
        if self.width is None:
            return [image]
        return [image, jax.ShapeDtypeStruct((classes, self.width), np.float32)]


def deployed_student(trained: TrainedStudent, size: Size = None) -> Deployed:
    """A student for one size or any. Raises UserError for a size that it cannot take."""
    config = trained.config
    reader, names = student_reader(config), list(config.label_names)
    multiple = max(config.student.output_stride, 8)  # of symbolic sides: all its grids then divide them
    _check_size(size, 1, config.student.output_stride)
    about = {"kind": "student", "classes": names, "palette": class_palette(names).tolist(), "origin": trained.origin}
    variables = jax.tree.map(jnp.asarray, {"student": trained.variables, "text": trained.text})

    def function(image: UInt8[Array, "1 H W 3"]) -> tuple[Int[Array, "1 H W"], Float[Array, "1 H W C"]]:
        return _labels(reader, variables, image)

    return Deployed(function, multiple, size, None, about | _resize(reader))


def deployed_segmenter(pretrained: Pretrained, options: Options | None = None, size: Size = None) -> Deployed:
    """A CLIP's image tower with its refinement, for a text classifier that comes as the second argument.

    Raises UserError for a size that it cannot take, and for a method that needs one.
    """
    o, config = Options() if options is None else options, pretrained.config
    if unread := [name for name in o.changed() if name not in READ]:
        raise UserError(f"a file reads a whole image once, by {', '.join(READ)}, got {unread[0]}: leave it out")
    reader = teacher_reader(pretrained, o)
    if size is None and reader.method.attention == "kk+gaussian":
        raise UserError(f"{o.method} weighs neighbours on one grid, got any size: give --size, or another method")
    _check_size(size, config.stride, config.stride)
    tower = jax.tree.map(jnp.asarray, image_tower(pretrained.variables))
    about = {"kind": "segmenter", "method": str(o.method), "embedding": config.embed_dim}
    about |= {"prompt_denoising": o.prompt_denoising, "key_smoothing": o.key_smoothing}

    def function(
        image: UInt8[Array, "1 H W 3"], classifier: Float[Array, "C E"]
    ) -> tuple[Int[Array, "1 H W"], Float[Array, "1 H W C"]]:
        return _labels(reader, {"clip": tower, "text": classifier}, image)

    return Deployed(function, config.stride, size, config.embed_dim, about | _resize(reader))


def _labels(reader: Reader, variables: Any, image: Array) -> tuple[Array, Array]:
    """Labels and probabilities of every pixel: what `segment` does with an image that needs no resize."""
    mean, std = (np.asarray(x, np.float32) for x in (reader.preprocess.mean, reader.preprocess.std))
    with portable():
        pixels = (image.astype(jnp.float32) / np.float32(255) - mean) / std
        scores = reader.scores(variables, pixels, None)
        # whole sides: cells lie where pixels say, whatever the habits; one size: the matrices that `segment` takes
        rows, columns = (
            reader.axis_matrix(cells, side, side, side) if isinstance(side, int) else bilinear_matrix(cells, side)
            for cells, side in zip(scores.values.shape[1:3], image.shape[1:3], strict=True)
        )
        scores = scores._replace(values=apply_separable(scores.values, rows, columns))
        found = reader.probabilities(variables, scores)
    return jnp.argmax(scores.values, axis=-1).astype(jnp.int32), found.astype(jnp.float32)


def _check_size(size: Size, multiple: int, least: int) -> None:
    if size is not None and not all(least <= side <= MOST_SIDE and side % multiple == 0 for side in size):
        raise UserError(
            f"a size is two multiples of {multiple} from {least} to {MOST_SIDE} pixels, got {size}: correct it"
        )


def _resize(reader: Reader) -> dict[str, Any]:
    p = reader.preprocess
    sides = {"short_side": p.short_side, "long_side": p.long_side, "within": p.within}
    return {"resize": sides | {"interpolation": p.interpolation}, "normalised": {"mean": p.mean, "std": p.std}}
