"""Some four hundred damaged model files, seeded: what cannot be used is a UserError on one line, in bounded memory."""

import json
import random
import shutil
import warnings
from pathlib import Path

import clip_checkpoints
import numpy as np
import pytest
from mutations import most_memory, mutated_bytes, mutated_json
from sentence_pieces import trained_pieces

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.orbax_io import save_converted
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.errors import UserError

TESTS = Path(__file__).parents[1]
ROUNDS = 28  # of every file
MEMORY = 2**30  # bytes that all of them together may take


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every kind of model file there is, tiny."""
    root = tmp_path_factory.mktemp("models")
    for name, kind, form in (
        ("hf", "vit", "hf"),
        ("sharded", "vit", "hf-sharded"),
        ("flax", "vit", "hf-flax"),
        ("open_clip", "resnet", "open_clip"),
    ):
        clip_checkpoints.write_folder(root / name, kind, form)
    (root / "open_clip" / "maskclip.json").write_text(json.dumps({"dense_stride": 8, "short_side": 64}))
    save_converted(load_clip(root / "hf", fold=False), root / "converted")
    shutil.copytree(TESTS / "golden" / "torch_files", root / "torch")
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (root / "bpe").mkdir()
    (root / "bpe" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "bpe" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    config, variables = clip_checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    arrays["token_embedding.weight"] = arrays["token_embedding.weight"][:7]
    from safetensors.numpy import save_file

    save_file(arrays, root / "bpe" / "bare.safetensors")
    config, variables = clip_checkpoints.random_clip("siglip")
    (root / "npz").mkdir()
    np.savez(root / "npz" / "siglip.npz", **to_names(variables, config, "big_vision"))
    (root / "npz" / "tokenizer.model").write_bytes(trained_pieces("unigram"))
    return root


FILES = (
    ("hf", "config.json"),
    ("hf", "preprocessor_config.json"),
    ("hf", "tokenizer.json"),
    ("hf", "model.safetensors"),
    ("sharded", "model.safetensors.index.json"),
    ("flax", "flax_model.msgpack"),
    ("open_clip", "open_clip_config.json"),
    ("open_clip", "maskclip.json"),
    ("converted", "clip.json"),
    ("converted", "preprocess.json"),
    ("converted", "arrays/params.logit_scale/.zarray"),
    ("converted", "arrays/params.visual.proj/.zarray"),
    ("torch", "openai_traced.pt"),
    ("bpe", "vocab.json"),
    ("bpe", "merges.txt"),
    ("npz", "siglip.npz"),
    ("npz", "tokenizer.model"),
)


def outcome(target: Path, content: bytes) -> str | None:
    """Loads `target`, whose file now holds `content`, and reads words with it: None, or why it was refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_clip(target, fold=False)
            ids = loaded.tokenizer(["a photo of a cat", "Ünïcode &amp; “quotes” 犬"])
        assert ids.max() < loaded.config.text.vocab_size
        assert all(np.isfinite(leaf).all() for leaf in loaded.variables["params"]["text"]["ln_final"].values())
    except UserError as error:
        return str(error)
    except BaseException as error:  # panics of Rust's are no Exception
        raise AssertionError(f"{type(error).__name__}: {error}\n{content[:3000]!r}") from error
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "name"), FILES)
def test_nothing_but_user_errors(sources, folder, name):
    rng = random.Random(f"{folder}/{name}")
    file = sources / folder / name
    original = file.read_bytes()
    target = sources / folder
    if folder == "torch":
        target = file
    if folder == "bpe":
        target = target / "bare.safetensors"
    load_clip(target, fold=False)
    before = most_memory()
    refused = 0
    try:
        for _ in range(ROUNDS):
            is_json = name.endswith((".json", ".zarray", "_METADATA"))
            content = mutated_json(original.decode(), rng) if is_json else mutated_bytes(original, rng)
            file.write_bytes(content)
            message = outcome(target, content)
            refused += message is not None
            assert message is None or ("\n" not in message and len(message) < 900), message
    finally:
        file.write_bytes(original)
    assert refused > ROUNDS // 10
    grown = most_memory() - before
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"
