"""SGD as PyTorch's, and the polynomial schedule of the published runs (method, section 7)."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from maskclip_jax.distill.config import DistillConfig


def polynomial(step: Int[ArrayLike, ""], *, initial: float, final: float, steps: int, power: float) -> Float[Array, ""]:
    """`(initial − final)(1 − t/T)^power + final` at optimiser step t (from 0); `final` from T on."""
    left = 1 - jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0, 1)
    return (initial - final) * left**power + final


def learning_rate(step: Int[ArrayLike, ""], config: DistillConfig) -> Float[Array, ""]:
    """The config's, at an optimiser step."""
    return polynomial(
        step,
        initial=config.learning_rate,
        final=config.min_learning_rate,
        steps=config.steps,
        power=config.power,
    )


def sgd_direction(config: DistillConfig) -> optax.GradientTransformation:
    """`v ← m v + (g + λ p)`, coupled as PyTorch couples it: the decay goes through the momentum.

    The step is `p ← p − lr v`: the rate multiplies outside, from the one step counter that the train state has.
    """
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))
