"""Linen modules that take their stored parameters as they are.

Flax compares a stored parameter's shape with what its initializer would give, and traces the initializer to know: more
than half of the time that tracing a tower takes. Checkpoints are compared with the model once, when they are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Module(nn.Module):
    """`flax.linen.Module`, but that a parameter which is there already is returned without running its initializer, and
    that without a random key missing parameters are zeros, for which `shapes_of` has no need to trace random bits."""

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **options: Any) -> Any:
        """As flax's; `init_args` are the shape, and after it (optional) the dtype."""
        assert self.scope is not None
        if self.scope.has_variable("params", name):
            return self.scope.get_variable("params", name)
        if self.is_initializing() and not self.has_rng("params"):
            value = jnp.zeros(*init_args)
            self.scope.put_variable("params", name, value)
            return value
        return super().param(name, init_fn, *init_args, **options)


class LayerNorm(Module, nn.LayerNorm):
    """`flax.linen.LayerNorm` with stored parameters taken as they are."""


class BatchNorm(Module, nn.BatchNorm):
    """`flax.linen.BatchNorm` with stored parameters taken as they are."""


class Dense(Module, nn.Dense):
    """`flax.linen.Dense` with stored parameters taken as they are."""


def shapes_of(module: nn.Module, *inputs: Any) -> Any:
    """The variables of a module that takes these inputs, as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(functools.partial(module.init, {}), *inputs)
