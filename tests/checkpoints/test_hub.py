"""From the hub comes what a checkpoint needs, and one kind of weights only (the hub here is a folder)."""

import fnmatch
import shutil

import pytest

from maskclip_jax.checkpoints import hub
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.errors import UserError


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(folder)` makes `folder` the hub; the function returns the list of what gets fetched."""

    def start(folder):
        cache, fetched = tmp_path / "cache", []
        cache.mkdir()

        def snapshot(name, patterns):
            for file in sorted(folder.iterdir()):
                if any(fnmatch.fnmatch(file.name, p) for p in patterns) and not (cache / file.name).exists():
                    shutil.copy(file, cache)
                    fetched.append(file.name)
            return cache

        monkeypatch.setattr(hub, "snapshot", snapshot)
        return fetched

    return start


@pytest.mark.parametrize(
    ("kind", "form", "weights"),
    [
        ("vit", "hf", ["model.safetensors"]),
        ("vit", "hf-flax", ["flax_model.msgpack"]),
        ("vit", "hf-sharded", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("resnet", "open_clip", ["open_clip_model.safetensors"]),
    ],
)
def test_only_one_kind_of_weights(tmp_path, checkpoints, serve, kind, form, weights):
    folder = checkpoints.write_folder(tmp_path / "remote", kind, form)
    (folder / "pytorch_model.bin").write_bytes(b"big")
    (folder / "tf_model.h5").write_bytes(b"big")
    fetched = serve(folder)
    assert load_clip("someone/some-clip").config == checkpoints.CONFIGS[kind]
    assert [name for name in fetched if not name.endswith(".json")] == weights
    assert "tokenizer.json" in fetched


def test_no_weights(tmp_path, checkpoints, serve, monkeypatch):
    folder = checkpoints.write_folder(tmp_path / "remote", "vit", "hf")
    (folder / "model.safetensors").unlink()
    serve(folder)
    # HF_HUB_OFFLINE is set for tests: that the hub holds no weights is more than anybody knows
    with pytest.raises(UserError, match=r"weights of 'someone/some-clip' are not in the cache, and the hub cannot be"):
        load_clip("someone/some-clip")
    monkeypatch.setattr(hub, "_unreachable", lambda name: None)
    with pytest.raises(UserError, match=r"holds none of model\.safetensors"):
        load_clip("someone/some-clip")
