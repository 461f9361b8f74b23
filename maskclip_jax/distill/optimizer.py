"""SGD as PyTorch's or AdamW, and the polynomial schedule of the published runs (docs/method.md, section 7)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from maskclip_jax.distill.config import DistillConfig

PUBLISHED_BATCH = 16  # images of a step in every published run


def polynomial(step: Int[ArrayLike, ""], *, initial: float, final: float, steps: int, power: float) -> Float[Array, ""]:
    """`(initial − final)(1 − t/T)^power + final` at optimiser step t (from 0); `final` from T on."""
    left = 1 - jnp.clip(jnp.asarray(step, float) / steps, 0, 1)
    return (initial - final) * left**power + final


def learning_rate(step: Int[ArrayLike, ""], config: DistillConfig) -> Float[Array, ""]:
    """The config's, at an optimiser step; if it says so, in proportion to the batch (Goyal et al. 2017, 1706.02677)."""
    times = config.batch_size / PUBLISHED_BATCH if config.scale_learning_rate else 1
    return polynomial(
        step,
        initial=times * config.learning_rate,
        final=times * config.min_learning_rate,
        steps=config.steps,
        power=config.power,
    )


def descent_direction(config: DistillConfig) -> optax.GradientTransformation:
    """What the learning rate multiplies: `p ← p − lr v`, the rate from the one step counter that the train state has.

    "sgd" is PyTorch's, as published: `v ← m v + (g + λ p)`, the decay goes through the momentum. "adamw" is Adam's
    direction (β₁ the momentum, β₂ 0.98) `+ λ p`, the decay for matrices alone (Loshchilov & Hutter 2019): for small
    students and short runs.
    """
    if config.optimizer == "sgd":
        return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.scale_by_adam(config.momentum, 0.98), optax.add_decayed_weights(config.weight_decay, matrices)
    )


def scaled_step(direction: Any, rate: Float[Array, ""], config: DistillConfig) -> Any:
    """What is added to the parameters: `−rate · v`, for the backbone's `−rate · backbone_rate · v`."""
    scale = lambda path: config.backbone_rate if path[0].key == "backbone" else 1.0  # noqa: E731

    def step(path: Any, d: Array | np.ndarray) -> Array:  # the rate is a 64-bit number where JAX has those
        return -jnp.asarray(rate * scale(path), jnp.asarray(d).dtype) * d

    return jax.tree_util.tree_map_with_path(step, direction)
