"""The dense-value head: how the last attention is read (MaskCLIP and its training-free successors).

MaskCLIP reads values alone; its successors let patches look at those that are like them. Every attention here is one
pure function `(q, k, v, around) -> [B, T, N, d]` of the last block's own queries, keys and values, class tokens
first (in a ResNet's attention pool, the mean token). `s` is `d ** -0.5`, d the width of a head. What a method does to
the rest of the block (residual, MLP, how many blocks) are switches of `DenseMethod`; published ones are in `METHODS`.

    clip           softmax(q kᵀ s)                             as trained: the paper's baseline
    maskclip       v                                           Zhou et al., ECCV 2022, equation 4
    values         v, no residual, no MLP                      MaskCLIP as FeatUp reads it (Fu et al., ICLR 2024)
    sclip          softmax(q qᵀ s) + softmax(k kᵀ s)           Wang et al., ECCV 2024, equation 5
    clearclip      softmax(q qᵀ s), no residual, no MLP        Lan et al., ECCV 2024
    naclip         softmax(k kᵀ s + ω), no residual, no MLP    Hajimiri et al., WACV 2025
    clip_surgery   softmax(v vᵀ s), 6 blocks, no MLP           Li et al., 2023
    gem            self-self attention of q, k and v, 6 blocks, no MLP   Bousselham et al., CVPR 2024
    resclip_rcs    2 (0.6 naclip's + 0.4 C), no residual, no MLP; C is the mean of softmax(q kᵀ s) in blocks 6 to 9:
                   ResCLIP's cross-correlation (Yang et al., CVPR 2025), without its feedback by a first segmentation
    sc_clip        ½ softmax(3 (S − S̄)₊) + ½ softmax(k kᵀ s), S the cosines of block 9's patches; see `calibrated.py`
                   (Bai et al., 2024)
    proxyclip      softmax(γ (S − β S̄))₊, no residual, no MLP  Lan et al., ECCV 2024
    clip_dinoiser  v, features pooled by S ≥ 0.2               Wysoczańska et al., ECCV 2024
    lposs          v, features spread over a graph by S        Stojnić et al., CVPR 2025

A pooling head (SigLIP) is one attention behind the last block, with an MLP and without a residual: the methods read it
by its own projections, each token a query, and blocks are left as they were trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.encoders.layers import attend
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import attention_matrix, in_full_precision, mixed

Heads = Float[Array, "B T N d"]
POOL_SHARPNESS = 8  # CLIP Surgery: an attention pool's values are normalised, and their scale is this much larger


class Around(NamedTuple):
    """Context of an attention besides q, k and v: grid, mask, mean token norm, sigma.

    Fields:
      shape: rows and columns of the patch grid; T is rows · columns and the class tokens before them.
      mask: True where a token is image (class tokens included), of shape [B, 1, 1, T]; None: all are.
      norm: mean length of the tokens that q, k and v were made from, per image [B] (GEM's temperature).
      sigma: width of NACLIP's Gaussian, in patches.
      middle: mean attention of middle blocks, where the method asks for it.
      share: how much of ResCLIP's attention that is.
      affinity: what of the patches is alike, where the method asks for it; L is rows · columns.
    """

    shape: tuple[int, int]
    mask: Bool[Array, "B 1 1 T"] | None = None
    norm: Float[Array, " B"] | None = None
    sigma: float = 5.0
    middle: Float[Array, "B N T T"] | None = None
    share: float = 0.4
    affinity: Float[Array, "B L L"] | None = None


def value(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """The identity: each position's own value (MaskCLIP, paper equation 4)."""
    return v


def query_key(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """softmax(q kᵀ): the attention CLIP was trained with (the paper's naive baseline)."""
    return attend(q, k, v, around.mask)


def query_query(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """softmax(q qᵀ): ClearCLIP."""
    return attend(q, q, v, around.mask)


def key_key(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """softmax(k kᵀ): NACLIP without its Gaussian bias."""
    return attend(k, k, v, around.mask)


def query_query_key_key(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """SCLIP's correlative self-attention: a sum of two softmaxes, not their mean."""
    return attend(q, q, v, around.mask) + attend(k, k, v, around.mask)


def value_value(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """CLIP Surgery, as it reads a ViT."""
    return attend(v, v, v, around.mask)


def pool_value_value(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """CLIP Surgery, as it reads a ResNet's attention pool: values of unit length, and a sharper softmax."""
    unit = _unit(v)
    return attend(unit * POOL_SHARPNESS, unit, v, around.mask)


def key_key_gaussian(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """NACLIP: key-key attention with a Gaussian bias towards near patches."""
    return _mixed(_near_keys(k, around), v)


def key_key_gaussian_middle(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """ResCLIP's residual cross-correlation self-attention: NACLIP's, mixed with what middle blocks look at."""
    assert around.middle is not None
    return _mixed(2 * ((1 - around.share) * _near_keys(k, around) + around.share * around.middle), v)


def calibrated(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """SC-CLIP: half by which patches are alike (more than two are on the mean), half by their keys."""
    assert around.affinity is not None
    alike, both = around.affinity, None
    if around.mask is not None:
        both = around.mask[:, 0] & around.mask[:, 0].swapaxes(1, 2)
    above = 3 * (alike - alike.mean(axis=(1, 2), keepdims=True, where=both))
    seen = above >= 0 if both is None else both & (above >= 0)
    above = jax.nn.softmax(jnp.where(seen, above, jnp.finfo(above.dtype).min), axis=-1)
    return _mixed((above[:, None] + attention_matrix(k, k, around.mask)) / 2, v)


def gem(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """GEM: q, k and v are each clustered by one step of attention to themselves, and then each reads the values.

    The inverse temperature is the mean length of the tokens times s: it follows the model's scale.
    """
    assert around.norm is not None
    temperature = around.norm[:, None, None, None].astype(v.dtype)  # times s, which `attend` brings
    out = jnp.zeros_like(v)
    for p in (q, k, v):
        p = _unit(p)
        p = _unit(attend(p * temperature, p, p, around.mask))
        out += attend(p * temperature, p, v, around.mask)
    return out / 3


def mean_length(tokens: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"] | None) -> Float[Array, " B"]:
    """The mean norm of each image's tokens; padding does not count."""
    length = jnp.linalg.norm(in_full_precision(tokens), axis=-1)
    return length.mean(axis=1) if mask is None else length.mean(axis=1, where=mask[:, 0, 0])


def gaussian_neighbourhood(shape: tuple[int, int], sigma: float, tokens: int) -> Float[Array, "T T"]:
    """NACLIP's ω: `exp(−d² / 2σ²)` for patches d apart, and 0 from and to class tokens."""
    along = (np.exp(-((np.arange(n)[:, None] - np.arange(n)) ** 2) / (2 * sigma**2)) for n in shape)
    first = tokens - shape[0] * shape[1]  # only the two factors are constants of a compiled program
    return jnp.pad(jnp.kron(*(jnp.asarray(a, jnp.float32) for a in along)), ((first, 0), (first, 0)))


def by_affinity(q: Heads, k: Heads, v: Heads, around: Around) -> Heads:
    """ProxyCLIP: patches look where a second backbone says (its rows sum to one); class tokens at themselves."""
    assert around.affinity is not None
    first = v.shape[1] - around.affinity.shape[-1]
    return jnp.concatenate([v[:, :first], mixed(around.affinity, v[:, first:])], axis=1)


def _near_keys(k: Heads, around: Around) -> Float[Array, "B N T T"]:
    return attention_matrix(k, k, around.mask, gaussian_neighbourhood(around.shape, around.sigma, k.shape[1]))


def _mixed(weights: Float[Array, "B N T T"], v: Heads) -> Heads:
    return jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)


ATTENTIONS: dict[str, Callable[[Heads, Heads, Heads, Around], Heads]] = {
    "value": value,
    "qk": query_key,
    "qq": query_query,
    "kk": key_key,
    "qq+kk": query_query_key_key,
    "vv": value_value,
    "kk+gaussian": key_key_gaussian,
    "gem": gem,
    "kk+gaussian+middle": key_key_gaussian_middle,
    "calibrated": calibrated,
    "affinity": by_affinity,
}
# What is asked of earlier blocks: whose attention is averaged, whose tokens are kept. Counted from 1, of twelve.
MAPS: dict[str, tuple[int, ...]] = {"kk+gaussian+middle": (6, 7, 8, 9)}
KEPT: dict[str, tuple[int, ...]] = {"calibrated": tuple(range(4, 11))}  # all that `calibrated.py` reads


@dataclasses.dataclass(frozen=True)
class DenseMethod:
    """How the last blocks are read. The default is MaskCLIP.

    Fields:
      attention: one of `ATTENTIONS`.
      residual: keep the block's residual connection.
      mlp: keep the block's MLP.
      blocks: how many of the last blocks are read this way, on a path of their own beside the tower as it was trained,
        whose tokens go on making q, k and v.
      sigma: of "kk+gaussian", in patches.
      share: of the middle blocks' attention in "kk+gaussian+middle", 0..1 (its paper: 0.2 to 0.6, by data set).
      pool: features are means over what a second backbone finds alike (CLIP-DINOiser), before they are normalised.
      propagate: features spread over a graph of patches that it finds alike (LPOSS), after they are.

    A ResNet has one attention (its pool), without residual or MLP: there only `attention` and `sigma` count. A pooling
    head has no residual and is one block.

    Raises:
      UserError: an unknown attention, or numbers that mean nothing.
    """

    attention: str = "value"
    residual: bool = True
    mlp: bool = True
    blocks: int = 1
    sigma: float | int = 5.0
    share: float | int = 0.4
    pool: bool = False
    propagate: bool = False

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise UserError(f"an attention is one of {', '.join(ATTENTIONS)}, not {self.attention!r}: choose one")
        if self.blocks < 1 or self.sigma <= 0:
            raise UserError(f"blocks is at least 1 and sigma above 0, got {self.blocks} and {self.sigma}")
        if not 0 <= self.share <= 1:
            raise UserError(f"a share of attention is 0 to 1, got {self.share}: try 0.4")
        if self.earlier and self.blocks > 1:
            raise UserError(f"{self.attention!r} reads the last block alone, got {self.blocks}: use 1")

    @property
    def earlier(self) -> bool:
        """Whether it asks for tokens or attention of earlier blocks, which a ResNet's pool does not have."""
        return self.attention in MAPS or self.attention in KEPT

    @property
    def affinity(self) -> bool:
        """Whether it asks a second backbone which patches are alike."""
        return self.attention == "affinity" or self.pool or self.propagate

    @property
    def tower(self) -> DenseMethod:
        """What of it the tower sees."""
        return dataclasses.replace(self, pool=False, propagate=False)

    def asked(self, blocks: int, layers: int) -> tuple[dict[int, int], dict[int, int]]:
        """The `MAPS` and `KEPT` of this method -> blocks of a tower of so many `layers`, the first `blocks` of which
        are walked. A tower of less than twelve is asked at the same fractions of its depth."""
        place = lambda n: min(max(1, n if layers > 12 else round(n * layers / 12)), blocks)  # noqa: E731
        maps, kept = ({n: place(n) for n in table.get(self.attention, ())} for table in (MAPS, KEPT))
        return maps, kept


MASKCLIP = DenseMethod()
METHODS = {
    "maskclip": MASKCLIP,
    "clip": DenseMethod("qk"),
    "values": DenseMethod("value", residual=False, mlp=False),
    "sclip": DenseMethod("qq+kk"),
    "clearclip": DenseMethod("qq", residual=False, mlp=False),
    "naclip": DenseMethod("kk+gaussian", residual=False, mlp=False),
    "clip_surgery": DenseMethod("vv", mlp=False, blocks=6),
    "gem": DenseMethod("gem", mlp=False, blocks=6),
    "resclip_rcs": DenseMethod("kk+gaussian+middle", residual=False, mlp=False),
    "sc_clip": DenseMethod("calibrated", residual=False, mlp=False),
    "proxyclip": DenseMethod("affinity", residual=False, mlp=False),
    "clip_dinoiser": DenseMethod(pool=True),
    "lposs": DenseMethod(propagate=True),
}

ALONE = {name: method for name, method in METHODS.items() if not method.affinity}  # without a second backbone


def dense_method(method: str | DenseMethod, config: CLIPConfig) -> DenseMethod:
    """A preset's name, or a `DenseMethod` as it is, checked against the tower it is to read.

    Six blocks are half of the tower that CLIP Surgery and GEM were made for; a preset takes no more than half of a
    smaller one, and of a pooling head the one there is. Raises UserError for an unknown name, or more blocks than that.
    """
    check_method(method)
    if isinstance(method, DenseMethod):
        check_blocks(method, config.vision)
        return method
    preset = METHODS[method]
    check_blocks(dataclasses.replace(preset, blocks=1), config.vision)
    if isinstance(config.vision, ViTConfig) and preset.blocks > 1:
        most = 1 if config.vision.head == "map" else max(1, config.vision.layers // 2)
        preset = dataclasses.replace(preset, blocks=min(preset.blocks, most))
    return preset


def check_method(method: str | DenseMethod) -> None:
    """Raises UserError for what is neither a preset's name nor a `DenseMethod`."""
    if not isinstance(method, DenseMethod) and not (isinstance(method, str) and method in METHODS):
        raise UserError(f"a method is one of {', '.join(METHODS)}, not {method!r}: choose one of them")


def check_affinity(method: str | DenseMethod, affinity: object) -> None:
    """Raises UserError for a method that asks a second backbone where there is none, or the other way round."""
    asks = (METHODS[method] if isinstance(method, str) else method).affinity
    if asks and affinity is None:
        raise UserError(
            f"{method!r} asks a second backbone which patches are alike, got none: add --affinity, for example "
            "facebook/dinov2-base, or take another method"
        )
    if affinity is not None and not asks:
        asking = ", ".join(name for name, preset in METHODS.items() if preset.affinity)
        raise UserError(
            f"a second backbone (--affinity) is asked by the methods {asking}, got {method!r}: take one of them, "
            "or leave it out"
        )


def check_blocks(method: DenseMethod, vision: object) -> None:
    """Raises UserError where a tower has fewer blocks than the method reads, or no earlier ones to ask."""
    if method.earlier and (not isinstance(vision, ViTConfig) or vision.layers < 2):
        methods = ", ".join(name for name, preset in ALONE.items() if not preset.earlier)
        name = next((name for name, preset in METHODS.items() if preset.attention == method.attention), method)
        raise UserError(f"{name!r} asks a ViT's earlier blocks, which this tower does not have: take one of {methods}")
    if isinstance(vision, ViTConfig) and vision.head == "map" and method.blocks > 1:
        raise UserError(f"a pooling head (SigLIP) is read as one block, got {method.blocks}: use 1")
    if isinstance(vision, ViTConfig) and method.blocks > vision.layers:
        raise UserError(f"the tower has {vision.layers} blocks, got the last {method.blocks}: use fewer")


def _unit(x: Heads) -> Heads:
    length = jnp.linalg.norm(in_full_precision(x), axis=-1, keepdims=True)
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)
