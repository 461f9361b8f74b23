"""Arrays on all devices, and the training state in few of them."""

import jax
import numpy as np
import pytest

from maskclip_jax.distill.devices import pack, replicate, takes_packed, unpack
from maskclip_jax.distill.step import TrainState


def state_of(*, float64=False):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float64 if float64 else np.float32)  # noqa: E731
    params = {
        "w": draw(3, 4),
        "scale": draw(4),
        "none": draw(0),
        "bias": draw(5),
        "count": np.arange(3, dtype=np.int32),
    }
    return replicate(TrainState(np.int32(7), params, {"mean": draw(4)}, (params, ())))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_replicated_arrays_are_on_every_device():
    state = replicate({"a": np.ones(3, np.float32)})
    assert state["a"].sharding.is_fully_replicated
    assert set(state["a"].devices()) == set(jax.devices())


@pytest.mark.parametrize("float64", [False, True])
def test_what_is_packed_is_unpacked_as_it_was(float64):
    """Bit for bit, by itself and in a program; matrices are not copied, and parts outlive what they were part of."""
    with jax.enable_x64(float64):
        state = state_of(float64=float64)
        packed = pack(state)
        assert len(jax.tree.leaves(packed)) == 5  # two dtypes of vectors, the matrix twice, the step
        assert packed.others[1] is state.params["w"]
        again = unpack(packed)
        same(again, state)
        assert all(x.sharding == state.step.sharding for x in jax.tree.leaves(again))
        same(jax.jit(unpack)(packed), state)
        traced = jax.jit(pack)(state)
        same(traced, packed)
        jax.tree.map(lambda x: x.delete(), packed.vectors)
        same(again.params["scale"], state.params["scale"])


def test_a_step_gives_what_it_was_given():
    def step(state, by):
        return state._replace(step=state.step + 1, params=jax.tree.map(lambda x: x * by, state.params)), state.step

    plain = state_of()
    step = jax.jit(takes_packed(step))
    (after, _), (packed, count) = step(plain, 3), step(pack(plain), 3)
    same(unpack(packed), after)
    assert jax.tree.structure(packed) == jax.tree.structure(pack(plain))  # or each step would compile
    assert (int(count), int(packed.others[0])) == (7, 8)
