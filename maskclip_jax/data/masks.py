"""The masks that data sets come with -> class indices: what each pixel value means, one table for all of them.

Masks are indexed PNGs (VOC), 8-bit grey (ADE20K, COCO-Stuff, Cityscapes), 16-bit grey, or MATLAB 5 files with a
variable `LabelMap` (Pascal Context). Indices are 0 … C−1 and 255 = ignore, as everywhere here; beyond 255 classes masks
are 16-bit and 65535 = ignore.
"""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Int, Integer

from maskclip_jax.data.images import IGNORE, IGNORE_16, ignored_label, read_content, read_label_png
from maskclip_jax.data.vocabulary import coco_stuff_label_map, context_label_map
from maskclip_jax.data.walk import File
from maskclip_jax.data.whole_files import reason
from maskclip_jax.errors import UserError

MAT_VARIABLE = "LabelMap"  # Pascal Context's files
# Cityscapes' labels.py: label id -> train id, in the order of the 19 classes.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_REFUSED = -1  # a value that no mask of its kind holds: the file is of another kind
_REDUCED = -2  # a value that only masks of another kind have


class OtherMasks(UserError):
    """The masks are whole but mean something else, so that those without a sign of it would be misread."""


def value_table(values: str, *, background: bool = False) -> Int[np.ndarray, " 65536"]:
    """Pixel value -> class index; below 0 for values that such masks do not hold.

    Args:
      values: what the pixels mean: "background+N" (0 is the background, 1 … N the classes, 255 is ignored),
        "other+N" (the same, where 0 is what is not labelled, and 255 marks masks that are reduced already: ADE20K),
        "classes+N" (0 … N−1 the classes, 65535 is ignored and with up to 255 classes 255: "train ids"), "only+N" (the
        same, and nothing is ignored), "context459", "coco-stuff", "cityscapes".
      background: whether the background is class 0, and the first class 1; else it is ignored.
    """
    table = np.full(65536, _REFUSED, np.int32)
    kind, _, count = values.partition("+")
    if kind in ("background", "other"):
        keep = background and kind == "background"
        table[0] = 0 if keep else IGNORE
        table[1 : int(count) + 1] = np.arange(int(count)) + keep
        table[IGNORE] = IGNORE if kind == "background" else _REDUCED
    elif kind in ("classes", "only"):
        table[: int(count)] = np.arange(int(count))
        if kind == "classes":
            ignore = ignored_label(int(count))
            table[ignore] = table[IGNORE_16] = ignore
    elif values == "context459":
        known = context_label_map(background=background)
        table[: len(known)] = known
    elif values == "coco-stuff":
        known = coco_stuff_label_map().astype(np.int32)
        table[:256] = np.where(known == IGNORE, _REFUSED, known)
        table[IGNORE] = IGNORE
    elif values == "cityscapes":
        table[:34] = table[IGNORE] = IGNORE
        table[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    else:
        raise ValueError(f"no such meaning of pixel values: {values}")
    return table


def read_mask(file: File, table: Int[np.ndarray, " 65536"], *, remedy: str) -> Integer[np.ndarray, "H W"]:
    """One mask as class indices: uint8, or uint16 where `table` has indices beyond 255.

    Args:
      file: a PNG, or a `.mat` of version 5.
      table: of `value_table`.
      remedy: what to do where a value is in none of its places.

    Raises:
      UserError: the file cannot be read, or holds a value that `table` refuses.
      OtherMasks: a value that shows that the masks here are not what `table` is for.
    """
    data = read_content(file)
    raw = _read_mat(file, data) if file.name.lower().endswith(".mat") else read_label_png(file, data)
    labels = table[raw]
    if (labels == _REDUCED).any():
        raise OtherMasks(
            f"raw masks hold classes from 1 and no {IGNORE}, but {file} has it, as reduced masks do, where 0 is the "
            "first class: take the masks as downloaded, or use these with `prepare image_corpus --classes …`"
        )
    if (labels == _REFUSED).any():
        raise UserError(f"{file} has the value {raw[labels == _REFUSED][0]}, which is no label here: {remedy}")
    return labels.astype(np.uint8 if table.max() <= IGNORE else np.uint16)


def _read_mat(file: File, data: bytes) -> Integer[np.ndarray, "H W"]:
    from scipy.io import loadmat  # only where such a mask is read

    try:
        content = loadmat(io.BytesIO(data), variable_names=[MAT_VARIABLE])
    except Exception as error:  # a damaged file raises anything, and version 7.3 (HDF5) NotImplementedError
        raise UserError(
            f"a .mat mask is a MATLAB 5 file, but {file} is not readable ({reason(error)}): download it again"
        ) from error
    labels = content.get(MAT_VARIABLE)
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "uif":
        raise UserError(f"a .mat mask holds a matrix {MAT_VARIABLE}, but {file} does not: take Pascal Context's files")
    if labels.size == 0 or labels.min() < 0 or labels.max() > 65535 or (labels != np.floor(labels)).any():
        raise UserError(f"labels are whole numbers 0..65535, but {file} has others: download it again")
    return labels.astype(np.uint16)
