"""What the tests of `clip.products` and `clip.convolutions` share: one computation by several routes."""

import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def value_and_gradients(function, *arrays):
    """The function's value, and the gradients of a sum that weighs every entry differently."""

    def weighed(*arrays):
        out = function(*arrays)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighed, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *gradients
