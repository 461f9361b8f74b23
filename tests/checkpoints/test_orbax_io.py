"""A converted checkpoint is the same model, memory-mapped; written whole or not at all."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from maskclip_jax.checkpoints import orbax_io
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.errors import UserError


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(params=["vit", "resnet"])
def original(request, tmp_path, checkpoints):
    folder = checkpoints.write_folder(tmp_path / "original", request.param, "open_clip")
    if request.param == "resnet":
        (folder / "maskclip.json").write_text(
            json.dumps({"dense_stride": 8, "short_side": 96, "prompt_denoising": 0.6})
        )
    return load_clip(folder)


def test_there_and_back(tmp_path, original):
    path = orbax_io.save_converted(original, tmp_path / "out" / "converted")
    back = load_clip(path)
    assert back.config == original.config
    assert back.preprocess == original.preprocess
    assert back.reading == original.reading
    assert same(back.variables, original.variables)
    np.testing.assert_array_equal(back.tokenizer(["a cat"]), original.tokenizer(["a cat"]))
    assert [p.name for p in path.parent.iterdir()] == ["converted"]
    assert load_clip(path, fidelity="released").preprocess.mean == (0.485, 0.456, 0.406)


def test_the_arrays_are_the_files_pages(tmp_path, original, monkeypatch):
    path = orbax_io.save_converted(original, tmp_path / "converted")
    mapped = []
    mapper = np.memmap

    def remember(*args, **kwargs):
        mapped.append(mapper(*args, **kwargs))
        return mapped[-1]

    monkeypatch.setattr(np, "memmap", remember)
    monkeypatch.setattr(orbax_io, "_restored", None)  # orbax itself is not asked
    variables = load_clip(path, fold=False).variables
    leaves = flatten_dict(variables).values()
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == {array.ctypes.data for array in mapped}


def test_orbax_reads_what_was_written_and_what_orbax_writes_is_read(tmp_path, original):
    path = orbax_io.save_converted(original, tmp_path / "converted")
    kept = {name: tree for name, tree in original.variables.items() if name != "folded"}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        assert same(checkpointer.restore(path / "arrays"), kept)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "compressed", args=ocp.args.PyTreeSave(kept))
    assert same(orbax_io.load_variables(tmp_path / "compressed", original.config), kept)


def test_refusals(tmp_path, original, checkpoints):
    path = orbax_io.save_converted(original, tmp_path / "converted")
    with pytest.raises(UserError, match=r"written to a new folder, but .*converted exists"):
        orbax_io.save_converted(original, path)
    with pytest.raises(UserError, match="load it with fidelity='clip'"):
        orbax_io.save_converted(load_clip(path, fidelity="released"), tmp_path / "other")

    (path / "sums.json").unlink()  # as an earlier version left it: what it is made of is checked all the same
    chunk = max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-4])
    with pytest.raises(UserError, match="missing or truncated: convert the model again"):
        load_clip(path)
    chunk.unlink()
    with pytest.raises(UserError, match="missing or truncated: convert the model again"):
        load_clip(path)
    (path / "arrays" / "_METADATA").unlink()
    with pytest.raises(UserError, match="not a whole orbax checkpoint"):
        load_clip(path)
    (path / "clip.json").write_text(json.dumps({"vision": {"kind": "mlp"}}))
    with pytest.raises(UserError, match="does not fit this version"):
        load_clip(path)


@pytest.mark.parametrize("kind", ["zero bytes", "half", "one bit", "gone"])
def test_no_changed_byte_is_read(tmp_path, original, kind):
    """Whichever file of the folder it is; a bit of an array would be another model, and nobody would notice."""
    path = orbax_io.save_converted(original, tmp_path / "converted")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    small = [p for p in files if p.parent == path]
    assert {"clip.json", "preprocess.json", "maskclip.json", "sums.json"} <= {p.name for p in small}
    for file in (*small, *files[:: max(1, len(files) // 8)]):
        if (file.name, kind) == ("sums.json", "gone"):
            continue  # as an earlier version left it
        content = file.read_bytes()
        middle = len(content) // 2
        if kind == "gone" or not content:
            file.unlink()
        else:
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            file.write_bytes({"zero bytes": b"", "half": content[:middle], "one bit": flipped}[kind])
        with pytest.raises(UserError) as error:
            load_clip(path)
        assert "\n" not in str(error.value)
        file.write_bytes(content)
    assert same(load_clip(path).variables, original.variables)


def test_a_failure_leaves_nothing_behind(tmp_path, original, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(orbax_io, "_write_json", fail)
    with pytest.raises(UserError, match=r"must be writable, but .*converted is not \(disk full\): make room"):
        orbax_io.save_converted(original, tmp_path / "out" / "converted")
    assert list((tmp_path / "out").iterdir()) == []
