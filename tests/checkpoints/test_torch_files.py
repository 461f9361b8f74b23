"""PyTorch's files without PyTorch: every form of tensor, OpenAI's archives, and nothing that a file holds is run."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import make_torch_files
import numpy as np
import pytest

from maskclip_jax.checkpoints.files import read_arrays
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.torch_files import TorchFile
from maskclip_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = GOLDEN / "torch_files"


@pytest.mark.parametrize("name", ["state", "legacy", "no_checksums", "training"])
def test_every_form_of_tensor(name):
    """Strides, offsets, shared and expanded storages, parameters, half, bfloat16 and fp8, as torch 2.13 saved them."""
    arrays = TorchFile(FILES / f"{name}.pt")
    prefix = "module." if name == "training" else ""
    expected = make_torch_files.forms()
    others = {"bfloat16", "fp8"} if name == "state" else {"bfloat16"}
    assert {*arrays} == {prefix + key for key in {*expected, *others}}
    for key, array in expected.items():
        found = arrays[prefix + key]
        assert (found.dtype, found.shape) == (array.dtype, array.shape) == (found.dtype, arrays.shapes()[prefix + key])
        np.testing.assert_array_equal(found, array)
    base = jnp.asarray(make_torch_files.BASE)
    np.testing.assert_array_equal(arrays[f"{prefix}bfloat16"].astype(np.float32), base.astype(jnp.bfloat16))
    if "fp8" in others:
        np.testing.assert_array_equal(arrays["fp8"].astype(np.float32), base.astype(jnp.float8_e4m3fn))


def test_shards(tmp_path):
    """`pytorch_model.bin.index.json`, as transformers wrote it before safetensors; what it does not name is kept."""
    expected = make_torch_files.forms()
    for place, name in enumerate(("state", "training")):
        shutil.copy(FILES / f"{name}.pt", tmp_path / f"pytorch_model-0000{place + 1}-of-00002.bin")
    where = dict.fromkeys(list(expected)[:2], "pytorch_model-00001-of-00002.bin")
    where |= {f"module.{key}": "pytorch_model-00002-of-00002.bin" for key in expected}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    arrays = read_arrays(index)
    assert {*expected} < {*arrays}
    for key, array in expected.items():
        np.testing.assert_array_equal(arrays[key], array)
        np.testing.assert_array_equal(arrays[f"module.{key}"], array)
    for name in ("pytorch_model-00003-of-00002.bin", "../a.bin", "a.safetensors", 3):
        index.write_text(json.dumps({"weight_map": where | {"x": name}}))
        with pytest.raises(UserError, match=r"must be a file, but is missing|a shard is a file in the folder"):
            read_arrays(index)


@pytest.mark.parametrize(("name", "activation"), [("traced", "quick_gelu"), ("gelu", "gelu")])
def test_openai_archives(name, activation, caplog):
    """Half-precision TorchScript with OpenAI's names; the activation is read off its code, so that nobody need ask."""
    pretrained = load_clip(FILES / f"openai_{name}.pt", fold=False)
    config = pretrained.config
    assert (config.vision.activation, config.text.activation) == (activation, activation)
    assert (config.vision.image_size, config.vision.width, config.text.vocab_size, config.embed_dim) == (16, 64, 10, 8)
    expected = make_torch_files.openai_arrays()
    visual = pretrained.variables["params"]["visual"]
    np.testing.assert_array_equal(visual["proj"], expected["visual.proj"].astype(np.float32))
    kernel = expected["visual.conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(visual["conv1"], kernel)
    assert caplog.records == []
    assert load_clip(FILES / "openai_gelu.pt", activation="quick_gelu").config.text.activation == "quick_gelu"


def test_a_hostile_archive_runs_nothing(tmp_path, monkeypatch):
    """`torch.jit.load` of this file writes another one: its `__setstate__` saves a tensor."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"restored by code of its own .__setstate__., which is not run"):
        load_clip(FILES / "hostile.pt")
    assert list(tmp_path.iterdir()) == []


class Call:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def zipped(path, content, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


CODE = "open('written', 'w').write('x')"
HOSTILE = {
    "system": pickle.dumps({"a": Call(os.system, "touch written")}, protocol=2),
    "eval": pickle.dumps({"state_dict": {"a": Call(eval, CODE)}}, protocol=4),
    "exec, protocol 0": pickle.dumps({"a": Call(exec, CODE)}, protocol=0),
    "getattr": pickle.dumps([Call(getattr, Path("written"), "touch")], protocol=5),
    "instance": b"(Vtouch written\nios\nsystem\n.",
    "object": b"(cos\nsystem\nVtouch written\no.",
    "behind a container": b"ccollections\nOrderedDict\n((cos\nsystem\n(Vtouch written\ntRtR.",
    "rebuilt": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(Vtouch written\ntNtR.",
    "persistent": b"Ptouch written\n.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "bare"])
def test_hostile_pickles(tmp_path, monkeypatch, kind, form):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    if form == "zip":
        zipped(path, HOSTILE[kind])
    else:
        path.write_bytes(HOSTILE[kind])
    with pytest.raises(UserError) as caught:
        TorchFile(path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def tensor(kind="FloatStorage", count=4, offset=0, shape=(4,), strides=(1,), key="0"):
    """The opcodes of one tensor."""
    integers = lambda xs: b"(" + b"".join(b"L%dL\n" % x for x in xs) + b"t"  # noqa: E731
    storage = b"(Vstorage\nctorch\n%s\nV%s\nVcpu\nL%dL\ntQ" % (kind.encode(), key.encode(), count)
    rest = b"L%dL\n" % offset + integers(shape) + integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"I00\nNtR"


def state(tensor):
    return b"(dVa\n" + tensor + b"s."


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (tensor(shape=(5,)), "reaches beyond"),
        (tensor(offset=1), "reaches beyond"),
        (tensor(shape=(2, 2), strides=(4, 1)), "reaches beyond"),
        (tensor(shape=(10**9, 10**9), strides=(0, 0)), "expanded"),
        (tensor(offset=-1), "not a whole PyTorch file"),
        (tensor(shape=(4,), strides=(1, 1)), "not a whole PyTorch file"),
        (tensor(count=10**15), "missing, cut or encrypted"),
        (tensor(count=5), "missing, cut or encrypted"),
        (tensor(key="../../etc/passwd"), "missing, cut or encrypted"),
        (tensor(kind="QInt8Storage"), "of type QInt8"),
        (b"N", "a is none"),
        (b"(dVb\nI1\ns", "a is none"),
    ],
)
def test_tensors_that_do_not_fit_their_file(tmp_path, opcodes, message):
    path = zipped(tmp_path / "x.pt", state(opcodes), **{"0": np.arange(4, dtype=np.float32).tobytes()})
    with pytest.raises(UserError, match=message):
        TorchFile(path)


def test_tensors_that_fit(tmp_path):
    """The opcodes above are right where the sizes are; and compressed archives are read."""
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.pt", "w", compression) as archive:
            archive.writestr("x/data.pkl", state(tensor(shape=(2, 2), strides=(1, 2))))
            archive.writestr("x/data/0", np.arange(4, dtype=">f4").tobytes())
            archive.writestr("x/byteorder", "big")
        np.testing.assert_array_equal(TorchFile(tmp_path / "x.pt")["a"], [[0, 2], [1, 3]])


def test_damage_is_noticed(tmp_path):
    content = bytearray((FILES / "openai_traced.pt").read_bytes())
    with zipfile.ZipFile(FILES / "openai_traced.pt") as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    name, extra = struct.unpack("<2H", content[member.header_offset + 26 : member.header_offset + 30])
    content[member.header_offset + 30 + name + extra + 100] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged in .*data"):
        load_clip(tmp_path / "flipped.pt")
    for keep in (0.5, 0.99):
        (tmp_path / "cut.pt").write_bytes(content[: int(keep * len(content))])
        with pytest.raises(UserError, match="not a whole PyTorch file"):
            load_clip(tmp_path / "cut.pt")


def test_other_archives(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(UserError, match="tar format of before PyTorch"):
        TorchFile(tmp_path / "old.pth")
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a/b.jpg", b"x")
    with pytest.raises(UserError, match="not PyTorch's"):
        TorchFile(tmp_path / "photos.pt")
    bomb = zipped(tmp_path / "bomb.pt", b"x")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**25))
    with pytest.raises(UserError, match="over 16777216"):
        TorchFile(bomb)
    nested = b"(" * 100 + b"N" + b"\x85" * 20_000 + b"."
    with pytest.raises(UserError, match="no named tensors"):
        TorchFile(zipped(tmp_path / "deep.pt", nested))
