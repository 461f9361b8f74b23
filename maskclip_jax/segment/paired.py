"""A CLIP beside a second, image-only backbone: one module with both towers, so that what reads a CLIP reads the pair.

`paired` makes it of two checkpoints. Its `encode_dense` shows the backbone the same picture, at the size at which its
grid is the values' grid (a DINOv2 of patches of 14 reads 448² where a CLIP of 16 reads 512²), and uses what it finds
alike as the method asks: as the last attention (ProxyCLIP), to pool features (CLIP-DINOiser), to spread them (LPOSS).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskclip_jax.checkpoints.load import load_backbone
from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.encoders.dense import DenseMethod, check_affinity
from maskclip_jax.encoders.model import CLIP, DenseFeatures
from maskclip_jax.encoders.vit import VisionTransformer
from maskclip_jax.errors import UserError
from maskclip_jax.segment.affinity import pooling_weights, proxy_attention, resampled
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.propagation import lposs

Triple = tuple[float, float, float]


class PairedCLIP(CLIP):
    """CLIP, and `affinity`, another image tower: `backbone` is its config; `scale` and `shift` take images that are
    normalised for CLIP to its statistics."""

    backbone: CLIPConfig | None = None
    scale: Triple = (1.0, 1.0, 1.0)
    shift: Triple = (0.0, 0.0, 0.0)

    def setup(self):
        assert self.backbone is not None
        c = self.backbone
        self.affinity = VisionTransformer(c.vision, c.embed_dim, c.fidelity, self.dtype)
        super().setup()

    def encode_dense(
        self, images: Float[Array, "B H W 3"], *, grid: Int[Array, "B 2"] | None = None, **reading: Any
    ) -> DenseFeatures:
        """As CLIP's. What is propagated has no unit norm any more: it is a mean of features that had.

        LPOSS is solved for the features instead of the scores: the solution is linear in them, so that scores come out
        the same, and features that are kept serve any words.
        """
        method = DenseMethod(**reading)
        if not method.affinity:
            return super().encode_dense(images, grid=grid, **reading)
        cells = None if grid is None else self.config.cells(grid)
        tokens = self.affinity.tokens(self._pictures(images, grid, cells), cells)
        matrix = None
        if method.attention == "affinity":
            matrix = proxy_attention(tokens, cells)
        elif method.pool:
            matrix = pooling_weights(tokens, cells)
        kept = dataclasses.asdict(dataclasses.replace(method, propagate=False))
        features, keys = super().encode_dense(images, grid=grid, affinity=matrix, **kept)
        if method.propagate:
            features = lposs(features, tokens, cells, cell=self.config.stride)
        return DenseFeatures(features, keys)

    def _pictures(self, images: Array, grid: Array | None, cells: Array | None) -> Float[Array, "B H2 W2 3"]:
        """The same images for the backbone, a patch of it for every cell; padding stays padding."""
        assert self.backbone is not None
        c, patch = self.config, self.backbone.vision.stride
        h, w = (c.cells(side // c.multiple) for side in images.shape[1:3])
        pictures = images * jnp.asarray(self.scale, images.dtype) + jnp.asarray(self.shift, images.dtype)
        if patch == c.stride and images.shape[1:3] == (h * patch, w * patch):
            return pictures
        before, after = (None, None) if grid is None or cells is None else (grid * c.multiple, cells * patch)
        return resampled(pictures, (h * patch, w * patch), before, after).astype(images.dtype)


def paired(pretrained: Pretrained, method: str | DenseMethod, affinity: Pretrained | str | Path | None) -> Pretrained:
    """`pretrained` with the backbone beside it, or as it came where `affinity` is None.

    Args:
      method: that of the options, which must be one that asks a backbone, or not, as `affinity` has it.
      affinity: a hub id or folder as `load_backbone` takes it, or a ViT that is loaded already.

    Raises:
      UserError: a backbone and a method that do not go together, or a checkpoint that is none.
    """
    check_affinity(method, affinity)
    if affinity is None:
        return pretrained
    other = affinity if isinstance(affinity, Pretrained) else loaded_backbone(str(affinity))
    if not isinstance(other.config.vision, ViTConfig):
        raise UserError("an affinity is a Vision Transformer's, got a ResNet: take another")
    ours, theirs = pretrained.preprocess, other.preprocess
    scale = tuple(float(a) / float(b) for a, b in zip(ours.std, theirs.std, strict=True))
    shift = tuple(float(a - b) / float(c) for a, b, c in zip(ours.mean, theirs.mean, theirs.std, strict=True))
    model = PairedCLIP(pretrained.config, pretrained.model.dtype, other.config, scale, shift)
    params = {**pretrained.variables["params"], "affinity": other.variables["params"]["visual"]}
    return dataclasses.replace(pretrained, model=model, variables={**pretrained.variables, "params": params})


def named_method(options: Options) -> dict[str, Any]:
    """Method and second backbone by name, for a record."""
    method, other = options.method, options.affinity
    name = "loaded before" if isinstance(other, Pretrained) else None if other is None else str(other)
    return {"method": method if isinstance(method, str) else dataclasses.asdict(method), "affinity": name}


@functools.lru_cache(maxsize=1)
def loaded_backbone(source: str) -> Pretrained:
    """`load_backbone`, kept on the device for the next time."""
    found = load_backbone(source)
    return dataclasses.replace(found, variables=jax.device_put(found.variables))
