"""A plain folder of a student: what it holds, what is read back, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_distill import trained_student
from tiny_run import same

from maskclip_jax.data.whole_files import read_json
from maskclip_jax.distill import is_run, is_student
from maskclip_jax.distill.student_folder import load_student, save_student
from maskclip_jax.errors import UserError


def flat(trained):
    from flax.traverse_util import flatten_dict

    return flatten_dict(trained.variables, sep="/") | {"text": trained.text}


@pytest.fixture(scope="module")
def trained():
    data = {"train_data": "/home/alice/secret/voc.npz", "eval_data": "tfds:voc?split=val"}
    return trained_student(7, "the latest", {"mIoU": 12.5}, **data)


@pytest.fixture
def folder(trained, tmp_path):
    return save_student(trained, tmp_path / "student")


def test_what_is_written_is_read(trained, folder):
    assert is_student(folder)
    assert not is_run(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    found = load_student(folder)
    same(flat(found), flat(trained))
    assert all(value.dtype == np.float32 for value in flat(found).values())
    assert (found.step, found.chosen, found.scores) == (7, "the latest", {"mIoU": 12.5})
    assert found.config.label_names == trained.config.label_names
    content = read_json(folder / "config.json")
    assert content["classes"] == list(trained.config.label_names)
    assert content["run"]["train_data"] == "voc.npz"
    assert content["run"]["eval_data"] == "tfds:voc?split=val"
    assert "alice" not in (folder / "config.json").read_text()


def test_float16_is_half_the_size(trained, folder, tmp_path):
    half = save_student(trained, tmp_path / "half", dtype="float16")
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] < 0.7 * sizes[1]
    for name, value in flat(load_student(half)).items():
        np.testing.assert_array_equal(value, flat(trained)[name].astype(np.float16).astype(np.float32))
    large = trained._replace(text=trained.text * 1e6)
    with pytest.raises(UserError, match="must be finite in float16, but text's are not"):
        save_student(large, tmp_path / "large", dtype="float16")
    with pytest.raises(UserError, match="exists: choose another name"):
        save_student(trained, half)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "student"]


def changed(folder, **values):
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))


def rewritten(folder, change, *, sign=True):
    """The weights after `change`, as if they had been written so."""
    import hashlib

    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    if sign:
        changed(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def deep(folder):
    run = read_json(folder / "config.json")["run"]
    return run | {"student": run["student"] | {"layers": [900] * 4}}


DAMAGES = {
    "one bit": (lambda f: rewritten(f, lambda a: a["text"].__setitem__((0, 0), 0.5), sign=False), "is not the one"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a new version": (lambda f: changed(f, version=2), "version is a whole number from 1 to 1, got 2"),
    "other classes": (lambda f: changed(f, classes=["a", "b"]), "names other classes than its run"),
    "an array more": (lambda f: rewritten(f, lambda a: a.update(more=a["text"])), r"does not hold .*\(more\)"),
    "an array less": (lambda f: rewritten(f, lambda a: a.pop("params/head/aspp_0/conv/kernel")), "aspp_0/conv/kernel"),
    "900 layers": (lambda f: changed(f, run=deep(f)), "a student of 3600 blocks has more arrays than"),
    "NaN": (lambda f: rewritten(f, lambda a: a["text"].fill(np.nan)), "text holds NaN"),
    "negative variance": (
        lambda f: rewritten(f, lambda a: a["batch_stats/backbone/bn1/var"].fill(-1)),
        "bn1/var is a negative variance",
    ),
    "whole numbers": (lambda f: rewritten(f, lambda a: a.update(text=a["text"].astype(np.int32))), "type int32"),
    "text of other classes": (lambda f: rewritten(f, lambda a: a.update(text=a["text"][:3].copy())), r"is \[5, E\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(folder, damage):
    do, words = DAMAGES[damage]
    do(folder)
    with pytest.raises(UserError, match=words) as error:
        load_student(folder)
    assert "\n" not in str(error.value)


def test_a_choice_needs_a_run(folder):
    with pytest.raises(UserError, match="holds one checkpoint, none of a choice, got best"):
        load_student(folder, "best")
