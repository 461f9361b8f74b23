"""About a thousand damaged model files, seeded: what cannot be used is a UserError on one line, in bounded memory."""

import json
import random
import resource
import shutil
import warnings
from pathlib import Path

import clip_checkpoints
import numpy as np
import pytest

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.orbax_io import save_converted
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.errors import UserError

TESTS = Path(__file__).parents[1]
ROUNDS = 80  # of every file
MEMORY = 2**30  # bytes that all of them together may take
ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e-30, 1e308, 64, 4096, 2**16, 10**9, 10**30, 2**31, 2**63),
    *("", "x", "\ud800", "x" * 5000, [], {}, [[]], [0], [1, 2], [1e9, 1e9], [None] * 3, {"a": {"b": []}}, [10**12] * 4),
)


def mutated_json(text: str, rng: random.Random) -> bytes:
    """One value replaced or removed, or the bytes damaged."""
    if rng.random() < 0.15:
        return mutated_bytes(text.encode(), rng)
    content = json.loads(text)
    place, key = content, None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        parent, key = place, rng.choice(keys)
        place = place[key]
        if not isinstance(place, dict | list) or rng.random() < 0.25:
            break
    if key is None:
        return json.dumps(rng.choice(ODD)).encode()
    if rng.random() < 0.15:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return json.dumps(content).encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped near the start, anywhere or near the end; cut; something put in."""
    out, kind = bytearray(content), rng.randrange(4)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    if kind == 1:
        at = rng.randrange(len(out))
        out[at:at] = rng.randbytes(rng.randint(1, 8))
        return bytes(out)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        region = rng.choice(((0, 64), (0, 2000), (0, len(out)), (len(out) - 2000, len(out))))
        out[rng.randrange(max(0, region[0]), max(1, min(region[1], len(out))))] = rng.randrange(256)
    return bytes(out)


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"
