"""What `load_clip` returns: a model with its variables, tokenizer, preprocessing and recommended settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.model import CLIP


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a checkpoint is best read, from its optional `maskclip.json`; every key may be left out.

    Fields:
      dense_stride: pixels from one dense feature to the next (for ResNets to choose: 8, 16 or 32).
      short_side: pixels that the image's short side is resized to.
      prompt_denoising: threshold in 0..1, or None for none.
      templates: name of a template set, or None for the library's default.
    """

    dense_stride: int | None = None
    short_side: int = 512
    prompt_denoising: float | int | None = None
    templates: str | None = None


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint, ready: `p.model.apply(p.variables, images, method="encode_dense")`.

    Fields:
      model: the module; holds no arrays.
      variables: `params` (float32), for ResNets `batch_stats`, and (unless `fold=False`) `folded`.
      config: architecture and fidelity.
      tokenizer: prompts -> int32 ids [N, T].
      preprocess: statistics and sizes for `maskclip_jax.data.preprocess.prepare`.
      reading: the checkpoint's recommended settings; its `dense_stride` is the one the model has.
    """

    model: CLIP
    variables: dict[str, Any]
    config: CLIPConfig
    tokenizer: Callable
    preprocess: Preprocess
    reading: Reading
