"""The schedule against its formula, the optimiser against PyTorch's written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_distill import config_of

from maskclip_jax.distill.optimizer import descent_direction, learning_rate, polynomial, scaled_step


@pytest.mark.parametrize("step", [0, 1, 7, 1999, 3999, 4000, 5000])
def test_polynomial(step):
    expected = (0.01 - 1e-4) * max(0.0, 1 - step / 4000) ** 0.9 + 1e-4
    found = polynomial(step, initial=0.01, final=1e-4, steps=4000, power=0.9)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_a_value_worked_by_hand():
    """Half-way: 2^-0.9 = 0.53589; 0.0099 · 0.53589 + 0.0001."""
    found = learning_rate(5, config_of(learning_rate=0.01, min_learning_rate=1e-4, power=0.9, steps=10))
    np.testing.assert_allclose(found, 0.00540529, rtol=1e-5)


def test_a_rate_in_proportion_to_the_batch():
    """Both rates are those of a batch of 16; without the option they are the config's whatever the batch."""
    config = config_of(learning_rate=0.02, min_learning_rate=0.002, power=1.0, steps=10, batch_size=64)
    scaled = dataclasses.replace(config, scale_learning_rate=True)
    for step in (0, 5, 10):
        assert float(learning_rate(step, scaled)) == pytest.approx(4 * float(learning_rate(step, config)))
    halved = dataclasses.replace(scaled, batch_size=8)
    assert float(learning_rate(0, halved)) == pytest.approx(0.01)


def test_sgd_is_pytorchs():
    """torch.optim.SGD(weight_decay=λ, momentum=m): g += λp; v = g, then v = m v + g; p -= lr v."""
    config = config_of(learning_rate=0.1, min_learning_rate=0.05, steps=4, momentum=0.9, weight_decay=0.01)
    rng = np.random.default_rng(0)
    p = rng.normal(size=3)
    gradients = rng.normal(size=(4, 3))
    params = {"p": p.astype(np.float32)}
    optimiser = descent_direction(config)
    state = optimiser.init(params)
    buffer = None
    for step, gradient in enumerate(gradients):
        rate = 0.05 * (1 - step / 4) ** 0.9 + 0.05
        coupled = gradient + 0.01 * p
        buffer = coupled if buffer is None else 0.9 * buffer + coupled
        p = p - rate * buffer
        direction, state = optimiser.update({"p": gradient.astype(np.float32)}, state, params)
        lr = learning_rate(step, config)
        params = optax.apply_updates(params, jax.tree.map(lambda d, lr=lr: -lr * d, direction))
        np.testing.assert_allclose(params["p"], p, rtol=1e-5)


def test_adamw_by_hand():
    """m = β₁m + (1−β₁)g, v = β₂v + (1−β₂)g², both corrected; decay beside it, and for matrices alone."""
    config = config_of(optimizer="adamw", momentum=0.9, weight_decay=0.1)
    rng = np.random.default_rng(1)
    params = {"matrix": rng.normal(size=(2, 2)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    optimiser = descent_direction(config)
    state = optimiser.init(params)
    m = v = 0
    for t in (1, 2, 3):
        g = rng.normal(size=(2, 2)).astype(np.float32)
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
        found, state = optimiser.update({"matrix": g, "bias": g[0]}, state, params)
        np.testing.assert_allclose(found["matrix"], adam + 0.1 * params["matrix"], rtol=1e-4)
        np.testing.assert_allclose(found["bias"], adam[0], rtol=1e-4)


def test_the_backbone_learns_at_its_own_rate():
    direction = {"backbone": {"kernel": np.ones(2)}, "head": {"kernel": np.ones(2)}}
    step = scaled_step(direction, jnp.asarray(0.5), config_of(backbone_rate=0.1))
    np.testing.assert_allclose(step["backbone"]["kernel"], -0.05)
    np.testing.assert_allclose(step["head"]["kernel"], -0.5)
