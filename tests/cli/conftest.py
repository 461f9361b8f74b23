"""A tiny checkpoint folder, and the command line called in this process."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from command_outputs import WORDS
from label_outputs import COUNT
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from maskclip_jax.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
START, END = 97, 98  # the golden checkpoint's special tokens
KNOWN = "a photo of the in scene dog cat grass sky tree sofa couch person car red blue green".split()


class Result(NamedTuple):
    """What one command did."""

    code: int
    lines: list[str]  # on stdout
    errors: list[str]  # on stderr


def write_model(folder: Path) -> Path:
    """The golden HF CLIP (a random ViT) with a tokenizer of `KNOWN` words, read at 48 pixels."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "hf_clip_tiny" / name, folder)
    vocab = {"<unk>": 0, **{word: i for i, word in enumerate(KNOWN, 1)}, "<start>": START, "<end>": END}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "maskclip.json").write_text(json.dumps({"short_side": 48, "templates": "single"}))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint folder that loads in a moment. Its masks mean nothing, but they follow the image."""
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MASKCLIP_JAX_CACHE", str(cache))


@pytest.fixture
def call(capsys):
    """`call("segment", …)` -> exit code and lines; anything but SystemExit is a failure of the command line."""

    def command(*argv) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Result(stopped.value.code, out.splitlines(), err.splitlines())

    return command


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 RGB: a few flat rectangles and a little noise, different on every side."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.int64) + rng.integers(0, 256, 3)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        out[top : top + 1 + height // 2, left : left + 1 + width // 2] = rng.integers(0, 256, 3)
    return np.clip(out + rng.integers(-8, 9, out.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def draw():
    """`draw(height, width, seed)`: a random picture as an array."""
    return picture


@pytest.fixture
def photo(tmp_path) -> Path:
    """One ordinary PNG of 40 × 60."""
    path = tmp_path / "photo.png"
    Image.fromarray(picture(40, 60)).save(path)
    return path


@pytest.fixture
def segment(call, model, tmp_path):
    """`segment(images, classes=…, …)` with the tiny model into `tmp_path/out`."""

    def run(*images, classes=WORDS, out=None, options=()):
        return call(
            "segment", *images, "--classes", classes, "--model", model, "--out", out or tmp_path / "out", *options
        )

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A tree of JPEGs and PNGs: two buckets, three sizes."""
    sizes = [(40, 60), (60, 40), (50, 75)]
    root = tmp_path_factory.mktemp("corpus") / "photos"
    for i in range(COUNT):
        height, width = sizes[i % 3]
        rng = np.random.default_rng(i)
        blocks = rng.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        path = root / ("a", "b/c")[i % 2] / f"{i:02d}.{('jpg', 'png')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).save(path)
    return root


@pytest.fixture
def label(call, model, tmp_path):
    """`label(data, …options, out=…)` with the tiny model, blocks of 8 and shards of 6 images."""

    def run(data, *options, out="out", classes=WORDS):
        small = ("--batch-size", "1", "--shard-size", "6")
        given = ("--classes", classes, "--model", model, "--out", tmp_path / out)
        return call("label", data, *given, *small, *options)

    return run
