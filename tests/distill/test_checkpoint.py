"""Checkpoints: whole, the last few and the best, and only for the state they were made of."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.distill.checkpoint import FOLDER, Checkpoints
from maskclip_jax.distill.step import TrainState, replicate
from maskclip_jax.errors import UserError


def state_of(value) -> TrainState:
    params = {"w": jnp.full((3, 4), float(value)), "b": {"c": jnp.arange(5) + float(value)}}
    return replicate(TrainState(jnp.asarray(int(value), jnp.int32), params, {"mean": jnp.ones(2)}, (params, ())))


def test_what_comes_back_is_what_was_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.best is None
        checkpoints.save(7, state_of(7.25), 0.5)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([7], 7)
        back = checkpoints.restore(state_of(0))
    assert isinstance(back, TrainState)
    assert jax.tree.structure(back) == jax.tree.structure(state_of(0))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state_of(7.25)), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def test_the_last_few_and_the_best_stay(tmp_path):
    scores = {1: 0.1, 2: 0.5, 3: None, 4: 0.2, 5: float("nan"), 6: 0.3}
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_of(step), score)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert float(checkpoints.restore(state_of(0), 2).params["w"][0, 0]) == 2
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:  # the scores outlive the process
        assert checkpoints.best == 2
        checkpoints.save(7, state_of(7), 0.9)
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([6, 7], 7)


def test_saving_copies(tmp_path):
    """Writing goes on in the background: the state may change meanwhile."""
    state = jax.tree.map(np.array, state_of(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state.params["w"][:] = -1
        checkpoints.wait()
        assert float(checkpoints.restore(state_of(0)).params["w"][0, 0]) == 1


def test_remains_of_a_killed_write_are_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
    shutil.copytree(tmp_path / FOLDER / "00000001", tmp_path / FOLDER / "00000002.orbax-checkpoint-tmp-17")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [1]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["00000001"]


def test_a_deletion_cut_short_does_no_harm(tmp_path):
    """Old checkpoints are deleted file by file: whichever is missing, the newest one is what counts."""
    with Checkpoints(tmp_path / "whole", keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), 0.1 * step)
    old = tmp_path / "whole" / FOLDER / "00000001"
    victims = [path.relative_to(tmp_path / "whole") for path in (old, *old.rglob("*"))]
    names = {Path(*path.parts[2:]) for path in victims if len(path.parts) <= 4 and "ocdbt" not in path.name}
    assert len(names) > 5
    for name in sorted(names)[1:]:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        target = copy / FOLDER / "00000001" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        with Checkpoints(copy, keep_last=2) as checkpoints:
            assert (checkpoints.latest, checkpoints.best) == (2, 2)
            assert float(checkpoints.restore(state_of(0)).params["w"][0, 0]) == 2
            checkpoints.save(3, state_of(3))
            checkpoints.save(4, state_of(4))
            checkpoints.wait()
            assert checkpoints.steps == [2, 3, 4]
        shutil.rmtree(copy)


def test_one_line_for_what_is_not_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="step None was asked for"):
            checkpoints.restore(state_of(0))
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        with pytest.raises(UserError, match=r"step 5 was asked for.*\[1\]"):
            checkpoints.restore(state_of(0), 5)
        other = state_of(0)._replace(params={"w": jnp.zeros((3, 4)), "b": {"d": jnp.zeros(5)}})
        with pytest.raises(UserError, match="does not fit this run") as error:
            checkpoints.restore(other)
        assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoints need a folder"):
        Checkpoints(tmp_path / "file")
