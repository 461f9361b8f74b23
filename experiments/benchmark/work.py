"""Ours: each case makes a function that does the work once and waits for it, and says how much work that is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import flops
from maskclip_jax.checkpoints.folders import OPENAI_MEAN, OPENAI_STD
from maskclip_jax.checkpoints.pretrained import Pretrained, Reading
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.encoders import config as families
from maskclip_jax.encoders.config import CLIPConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.dense import dense_method
from maskclip_jax.encoders.model import CLIP, fold
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import portable, unit
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.segment.paired import paired
from maskclip_jax.segment.refine import dense_logits, key_smoothing

CLASSES = 59  # Pascal Context's
_B = (768, 12, 12, 3072)
KIN = {  # with the least of text towers, which nothing here reads
    "SigLIP B/16": CLIPConfig(
        ViTConfig(256, 16, *_B, **families.SIGLIP_VIT), TextConfig(8, 4, 8, 1, 1, 8, **families.SIGLIP_TEXT), 768
    ),
    "TIPS B/14": CLIPConfig(
        ViTConfig(448, 14, *_B, **families.TIPS_VIT), TextConfig(8, 4, 768, 1, 1, 8, **families.TIPS_TEXT), 768
    ),
    "DINOv2 B/14": CLIPConfig(
        ViTConfig(518, 14, *_B, activation="gelu", layer_norm_eps=1e-6, layer_scale=True, **families.DINO_VIT),
        TextConfig(8, 4, 8, 1, 1, 8),
        768,
    ),
}


class Case(NamedTuple):
    """Work to be timed.

    Fields:
      run: does it once, to the end.
      flops: operations that it must do.
      images: how many it handles.
      facts: what else is worth telling once it has run, e.g. the memory that the program asks for.
    """

    run: Callable[[], Any]
    flops: float
    images: int
    facts: dict[str, Any]


def variant(name: str) -> CLIPConfig:
    """One of OpenAI's architectures, or of its kin, by name. Raises UserError for another."""
    if name not in (*families.VARIANTS, *KIN):
        known = ", ".join((*families.VARIANTS, *KIN))
        raise UserError(f"a model is one of {known} (first-mask: embedded ones too), got {name!r}: choose one of them")
    return KIN[name] if name in KIN else families.variant(name)


def random_clip(name: str, dtype: str) -> tuple[CLIP, Any]:
    """The image tower of an architecture with random weights of the real shapes, value path folded as `load_clip` does.

    Each array exists once, as after loading."""
    model = CLIP(variant(name), jnp.dtype(dtype))
    return model, fold(model.config, random_variables(model))


def random_variables(model: CLIP, *, text: bool = False) -> Any:
    side = model.config.vision.image_size
    shapes = shapes_of(model, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 4), jnp.int32))
    if not text:
        shapes = {**shapes, "params": {name: shape for name, shape in shapes["params"].items() if name != "text"}}
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name == "logit_scale":
            return jnp.float32(np.log(100))
        if name in ("scale", "var", "bias", "mean"):
            return jnp.full(leaf.shape, float(name in ("scale", "var")))
        drawn = rng.standard_normal(leaf.shape, np.float32)
        drawn /= np.sqrt(max(1, np.prod(leaf.shape[:-1])), dtype=np.float32)
        return jax.device_put(drawn)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_pretrained(model: str, dtype: str) -> Pretrained:
    """`random_clip` as loading gives it, with a tokenizer that knows no word."""
    clip, variables = random_clip(model, dtype)
    preprocess = Preprocess(OPENAI_MEAN, OPENAI_STD, multiple=clip.config.multiple)
    return Pretrained(clip, variables, clip.config, lambda prompts: None, preprocess, Reading())


def unit_rows(rows: int, width: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((rows, width), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def compiled(function: Callable, *args: Any) -> tuple[Callable[[], None], dict[str, Any]]:
    """The function on these arguments, compiled when it is first run, and facts that are known from then on."""
    lowered, facts, held = jax.jit(function).lower(*args), {}, []

    def run() -> None:
        if not held:
            held.append(lowered.compile())
            memory = held[0].memory_analysis()
            if memory is not None:
                facts["temporaries_mib"] = memory.temp_size_in_bytes / 2**20
        jax.block_until_ready(held[0](*args))

    return run, facts


def dense(
    model: str = "ViT-B/16", batch: int = 1, size: int = 512, dtype: str = "float32", *, width: int | None = None
) -> Case:
    """MaskCLIP's dense logits of a batch of images, padded to whole patches: image tower and classifier."""
    clip, variables = random_clip(model, dtype)
    size, width = (clip.config.padded(side) for side in (size, width or size))
    images = jnp.asarray(np.random.default_rng(2).standard_normal((batch, size, width, 3), np.float32))
    text = jnp.asarray(unit_rows(CLASSES, clip.config.embed_dim))
    run, facts = compiled(lambda v, x, t: dense_logits(clip, v, x, t).logits, variables, images, text)
    return Case(run, batch * flops.dense(clip.config, size, width, CLASSES), batch, facts)


def beside(method: str, model: str = "ViT-B/16", size: int = 512, dtype: str = "float32") -> Case:
    """`dense` of one image by a method that asks DINOv2 B/14 which patches are alike. Operations as XLA counts them."""
    pair = paired(random_pretrained(model, dtype), method, random_pretrained("DINOv2 B/14", dtype))
    reading = dense_method(method, pair.config)
    images = jnp.asarray(np.random.default_rng(2).standard_normal((1, size, size, 3), np.float32))
    text = jnp.asarray(unit_rows(CLASSES, pair.config.embed_dim))

    def scores(variables: Any, images: jax.Array, text: jax.Array) -> jax.Array:
        return dense_logits(pair.model, variables, images, text, method=reading).logits

    with portable():  # the plain program: what is counted is no loop
        counted = jax.jit(scores).lower(pair.variables, images, text).cost_analysis() or {}
    jax.clear_caches()
    run, facts = compiled(scores, pair.variables, images, text)
    return Case(run, counted.get("flops", 0.0), 1, facts)


def smoothing(length: int = 4096, width: int = 768, order: str = "cheaper", times: int = 1) -> Case:
    """Key smoothing of one image, in the cheaper order of products or by way of the L×L matrix of all pairs."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((1, length, width), np.float32))
    p = jax.nn.softmax(jnp.asarray(rng.standard_normal((1, length, CLASSES), np.float32)))
    function = functools.partial(key_smoothing, threshold=1.0) if order == "cheaper" else all_pairs
    once, facts = compiled(function, p, keys)

    def run() -> None:
        for _ in range(times):
            once()

    return Case(run, times * flops.smoothing(length, width, CLASSES), times, facts)


def all_pairs(p: jax.Array, keys: jax.Array) -> jax.Array:
    """The same sum as the paper writes it: every position's cosine with every other."""
    keys = unit(keys)
    mixed = jnp.einsum("bld,bmd->blm", keys, keys) @ p
    return jnp.where(p.max(-1, keepdims=True) < 1, mixed, p)


def train(
    backbone: str = "resnet101", batch: int = 2, size: int = 256, width: int = 512, dtype: str = "float32"
) -> Case:
    """One optimiser step of the student, by the program that `distill` runs; labels are given, so no teacher works."""
    from maskclip_jax.distill.config import DistillConfig
    from maskclip_jax.distill.devices import pack, replicate
    from maskclip_jax.distill.step import create_train_state, make_train_step
    from maskclip_jax.distill.teacher import Frozen
    from maskclip_jax.students import StudentConfig, create_student

    config = DistillConfig(
        "context59",
        StudentConfig(width, backbone=backbone),
        mode="supervised",
        batch_size=batch,
        crop_size=size,
        steps=1000,
        dtype=dtype,
    )
    student = create_student(config.student_config)
    text = unit_rows(CLASSES, width)
    state = pack(replicate(create_train_state(config, student, text, jax.random.key(0))))
    frozen = replicate(Frozen({}, jnp.asarray(text)))
    rng = np.random.default_rng(3)
    data = {
        "image": rng.integers(0, 256, (1, batch, size, size, 3), np.uint8),
        "label": rng.integers(0, CLASSES, (1, batch, size, size)).astype(np.uint8),
    }
    step = make_train_step(config, student, None)
    held = [state]

    def run() -> None:
        held[0], metrics = step(held[0], frozen, data)
        jax.block_until_ready((held[0], metrics))

    return Case(run, batch * flops.deeplab_v2(config.student_config, size, size, CLASSES)[1], batch, {})


def nothing(dtype: str = "float32") -> Case:
    """No work: only the machine's rate is of interest."""
    return Case(lambda: None, 0, 0, {})
