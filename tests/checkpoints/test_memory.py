"""A checkpoint is in memory once while it is loaded, whatever its file's form."""

import dataclasses
import functools
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from clip_checkpoints import random_clip
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from maskclip_jax.checkpoints import google, memory, torch_files
from maskclip_jax.checkpoints.files import read_arrays
from maskclip_jax.checkpoints.weights import to_names, to_variables

WORDS = 120_000  # 22 MiB of them, in a model whose other arrays have 0.5
BLOCK = 2**18
FORMS = ("model.npz", "compressed.npz", "fortran.npz", "model.safetensors", "half.safetensors", "model.msgpack")


@functools.cache
def model():
    config, variables = random_clip("siglip")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=WORDS))
    words = np.resize(np.random.default_rng(0).standard_normal(2**16 + 1, np.float32), (WORDS, config.text.width))
    text = variables["params"]["text"] | {"token_embedding": words}
    return config, {"params": variables["params"] | {"text": text}}


def write(folder: Path, form: str) -> Path:
    config, variables = model()
    naming = {"npz": "big_vision", "safetensors": "hf", "msgpack": "flax"}[form.split(".")[1]]
    arrays, path = to_names(variables, config, naming), folder / form
    if form == "compressed.npz":
        np.savez_compressed(path, **arrays)
    elif form == "fortran.npz":
        np.savez(path, **{name: np.asfortranarray(array) for name, array in arrays.items()})
    elif form == "half.safetensors":
        save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}, path)
    elif form == "model.msgpack":
        path.write_bytes(msgpack_serialize(unflatten_dict(arrays, sep=".")))
    else:
        {"npz": lambda: np.savez(path, **arrays), "safetensors": lambda: save_file(arrays, path)}[form[6:]]()
    return path


def mapped() -> int:
    """Bytes of files that this process has in memory now."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


@pytest.mark.parametrize("form", FORMS)
def test_one_copy_and_a_block(tmp_path, monkeypatch, form):
    """NumPy's memory by tracemalloc; the file's pages where they are let go; XLA takes the arrays as they are."""
    monkeypatch.setattr(memory, "BLOCK", BLOCK)
    path, config, pages_seen, taken = write(tmp_path, form), model()[0], [], []
    let_go, as_float32 = memory.let_go, memory.as_float32

    def seen(pages):
        pages_seen.append(mapped() - before)
        let_go(pages)

    monkeypatch.setattr(memory, "let_go", seen)
    monkeypatch.setattr(
        "maskclip_jax.checkpoints.weights.as_float32", lambda x: taken.append(as_float32(x)) or taken[-1]
    )
    before = mapped()
    tracemalloc.start()
    try:
        arrays = google.read_npz(path) if path.suffix == ".npz" else read_arrays(path)
        found = to_variables(arrays, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(array.nbytes for array in taken)
    assert size < peak < 1.2 * size
    assert max(pages_seen, default=0) < 0.3 * size  # the system maps some 4 MiB at a time
    table = found["params"]["text"]["token_embedding"]
    np.testing.assert_allclose(table, model()[1]["params"]["text"]["token_embedding"], rtol=0.01 * ("half" in form))
    assert table.unsafe_buffer_pointer() in [array.ctypes.data for array in taken]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_blocks_in_any_order(monkeypatch, axes):
    """Views with negative steps, axes of one and an order of their own: the numbers, in aligned memory of their own."""
    monkeypatch.setattr(memory, "BLOCK", 64)
    for shape in ((7, 5, 3), (1, 40, 2), (1, 1, 1)):
        array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape).transpose(axes)[::-1]
        found = memory.as_float32(array)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.ctypes.data % 64 == 0
    assert memory.as_float32(np.float32(3)).shape == ()
    assert memory.as_float32(np.zeros((0, 3))).shape == (0, 3)
    mine = np.zeros(100, np.float32)
    assert not np.shares_memory(memory.as_float32(mine), mine)  # a user's array may change after it was loaded


def test_a_pytorch_file_is_let_go(monkeypatch):
    """Its checksum is over every page."""
    seen, let_go = [], torch_files.let_go
    monkeypatch.setattr(torch_files, "let_go", lambda pages: seen.append(len(pages)) or let_go(pages))
    arrays = torch_files.TorchFile(Path(__file__).parents[1] / "golden" / "torch_files" / "state.pt")
    assert all(np.asarray(arrays[name]).shape == arrays.shapes()[name] for name in arrays)
    assert seen
