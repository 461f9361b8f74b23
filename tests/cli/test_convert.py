"""`convert`: the folder it writes segments exactly as its source does, or is not written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TORCH_FILES = Path(__file__).parents[1] / "golden" / "torch_files"


def test_same_masks(call, model, photo, tmp_path):
    converted = tmp_path / "deep" / "converted"
    result = call("convert", model, converted)
    assert (result.code, result.errors) == (0, [])
    assert result.lines[0].startswith(f"wrote {converted} (")
    assert [p.name for p in converted.parent.iterdir()] == ["converted"]
    for name, source in (("a", model), ("b", converted)):
        options = ("--classes", "dog, cat, grass, sky", "--key-smoothing", "--out", tmp_path / name)
        assert call("segment", photo, "--model", source, *options).code == 0
    with Image.open(tmp_path / "a" / "photo_labels.png") as a, Image.open(tmp_path / "b" / "photo_labels.png") as b:
        np.testing.assert_array_equal(np.array(a), np.array(b))
        assert len(np.unique(np.array(a))) > 1
    assert (tmp_path / "a" / "photo.json").read_bytes() == (tmp_path / "b" / "photo.json").read_bytes()


def test_bare_weights(call, tmp_path):
    """A `.safetensors` alone: what is assumed of it is said; what is given is not assumed."""
    from safetensors.numpy import save_file

    from maskclip_jax.checkpoints.torch_files import TorchFile

    save_file(dict(TorchFile(TORCH_FILES / "openai_traced.pt")), tmp_path / "bare.safetensors")
    result = call("convert", tmp_path / "bare.safetensors", tmp_path / "assumed")
    assert result.code == 0
    (note,) = result.errors
    assert note.startswith("note: bare.safetensors does not say its activation: QuickGELU was assumed")
    result = call("convert", tmp_path / "bare.safetensors", tmp_path / "given", "--activation", "gelu")
    assert (result.code, result.errors) == (0, [])
    for name, activation in (("assumed", "quick_gelu"), ("given", "gelu")):
        content = json.loads((tmp_path / name / "clip.json").read_text())
        assert (content["vision"]["activation"], content["text"]["activation"]) == (activation, activation)


def test_a_hostile_file(call, tmp_path, monkeypatch):
    """PyTorch would write a file of this archive's choosing while loading it."""
    monkeypatch.chdir(tmp_path)
    result = call("convert", TORCH_FILES / "hostile.pt", "out")
    assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
    assert "which is not run" in result.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(call, model, tmp_path, monkeypatch):
    """And it is noticed before the source is fetched, which may be gigabytes."""
    monkeypatch.setattr("maskclip_jax.checkpoints.load._located", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        result = call("convert", model, tmp_path / name)
        assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
        assert "exists: choose another name" in result.errors[0]
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "link"]


@pytest.mark.parametrize(
    "broken", ["truncated", "no weights", "no config", "missing", "other tokenizer", "under a file", "a run"]
)
def test_nothing_is_left_of_a_failure(call, model, tmp_path, broken):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    weights = source / "model.safetensors"
    if broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif broken == "no weights":
        weights.unlink()
    elif broken == "no config":
        (source / "config.json").unlink()
    elif broken == "missing":
        shutil.rmtree(source)
    elif broken == "a run":
        (source / "text.npy").touch()
    elif broken == "under a file":
        out = tmp_path / "file" / "out"
        (tmp_path / "file").write_text("mine")
    options = ("--tokenizer", tmp_path / "nowhere") if broken == "other tokenizer" else ()
    before = sorted(tmp_path.rglob("*"))
    result = call("convert", source, out, *options)
    assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
    assert result.errors[0].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["x" * 255, "of \udcff bytes"])
def test_any_name_of_a_folder_will_do(call, model, tmp_path, name):
    assert call("convert", model, tmp_path / name).code == 0
    assert (tmp_path / name / "sums.json").is_file()
    assert len(list(tmp_path.iterdir())) == 1
