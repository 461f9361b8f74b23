"""Checkpoints: whole, the last few and the best, and only for the state they were made of."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.distill.checkpoint import FOLDER, Checkpoints, DamagedCheckpoint, about_of
from maskclip_jax.distill.devices import replicate
from maskclip_jax.distill.step import TrainState
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


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    flipped = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
    wrong = {
        "zero bytes": b"",
        "half": content[: len(content) // 2],
        "zeros": bytes(len(content)),
        "random": np.random.default_rng(0).bytes(len(content)),
        "one bit": flipped,
    }
    path.unlink() if kind == "gone" else path.write_bytes(wrong[kind])


KINDS = ("zero bytes", "half", "zeros", "random", "one bit", "gone")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three checkpoints, whose last is the best."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, about={"config.json": "abc"}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), 0.1 * step)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_left_out_and_said(three, tmp_path, kind):
    """Whichever file of the newest checkpoint it is: never other values, never a traceback; and the run goes on."""
    newest = three / FOLDER / "00000003"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    last = {newest / "_CHECKPOINT_METADATA", newest / "commit_success.txt", newest / "default" / "commit_success.txt"}
    assert len(files) > 8
    for place, file in enumerate(files):
        if file.name != "sums.json" and file.parent.name == "d" and place % 2:
            continue  # half of the many data files will do
        copy = tmp_path / str(place)
        shutil.copytree(three, copy)
        damage(copy / file.relative_to(three), kind)
        harmless = file in last or (file.name == "sums.json" and kind == "gone")  # then it is taken as it is
        with Checkpoints(copy) as checkpoints:
            if harmless:
                back = checkpoints.restore_newest(state_of(0))
            else:
                with pytest.raises(DamagedCheckpoint, match="damaged"):
                    checkpoints.restore(state_of(0), 3)
                with pytest.warns(UserWarning, match="left out, and moved to .*step 2 is taken"):
                    back = checkpoints.restore_newest(state_of(0))
                assert (checkpoints.steps, checkpoints.best) == ([1, 2], 2)
                assert (copy / "damaged" / "00000003").is_dir()
            if place % 5 == 0:
                checkpoints.save(3 + harmless, state_of(9), 0.01)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state_of(2 + harmless)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_reader_moves_nothing(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    damage(tmp_path / "copy" / FOLDER / "00000003" / "default" / "manifest.ocdbt", "one bit")
    with Checkpoints(tmp_path / "copy", read_only=True) as checkpoints:
        with pytest.warns(UserWarning, match="left out; step 2 is taken"):
            assert int(checkpoints.restore_newest(state_of(0)).step) == 2
        assert checkpoints.steps == [1, 2, 3]


def test_where_none_is_whole_nothing_is_moved(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    for step in (1, 2, 3):
        damage(tmp_path / "copy" / FOLDER / f"{step:08d}" / "default" / "_METADATA", "half")
    with Checkpoints(tmp_path / "copy") as checkpoints:
        with pytest.raises(UserError, match=r"none of 3 checkpoints can be used.*00000003.*_METADATA is not what"):
            checkpoints.restore_newest(state_of(0))
        assert checkpoints.steps == [1, 2, 3]


def test_checkpoints_of_the_version_before(three, tmp_path):
    """They have no sums, and orbax kept their scores."""
    shutil.copytree(three, tmp_path / "copy")
    for step in (1, 2, 3):
        folder = tmp_path / "copy" / FOLDER / f"{step:08d}"
        (folder / "sums.json").unlink()
        (folder / "metrics").mkdir()
        (folder / "metrics" / "metrics").write_text(f'{{"mIoU": {1 - 0.1 * step}}}')
    with Checkpoints(tmp_path / "copy") as checkpoints:
        assert checkpoints.best == 1
        assert int(checkpoints.restore_newest(state_of(0)).step) == 3
    assert about_of(tmp_path / "copy") == {}
    assert about_of(three) == {"config.json": "abc"}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capfd):
    """What was whole stays, what was half written goes."""

    def full(folder, *_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "params.w/0" ...\nTraceback\nNo space left on device')

    def until_it_is_full():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state_of(1))
            checkpoints.wait()
            monkeypatch.setattr("maskclip_jax.distill.checkpoint.write_sums", full)
            checkpoints.save(2, state_of(2))

    with pytest.raises(UserError, match=r"must be writable, .* \(No space left on device\): make room") as error:
        until_it_is_full()
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["00000001"]
    assert "Traceback" not in "".join(capfd.readouterr())
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore_newest(state_of(0)).step) == 1


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
        with pytest.raises(UserError, match="are of steps none, got None"):
            checkpoints.restore(state_of(0))
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        with pytest.raises(UserError, match=r"are of steps \[1\], got 5"):
            checkpoints.restore(state_of(0), 5)
        other = state_of(0)._replace(params={"w": jnp.zeros((3, 4)), "b": {"d": jnp.zeros(5)}})
        with pytest.raises(UserError, match="does not fit this run") as error:
            checkpoints.restore(other)
        assert "\n" not in str(error.value)
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "file", tmp_path / "run" / FOLDER):
        path.write_text("")
        with pytest.raises(UserError, match="checkpoints need a folder"):
            Checkpoints(path if path.name == "file" else path.parent)
