"""`prepare`: what it prints is what the other commands take."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.cli.prepare import DATASETS
from maskclip_jax.data.sources import open_source


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.full((5, 6, 3), 99, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(np.full((5, 6), 20, np.uint8)).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\n")
    return tmp_path / "VOCdevkit"


def test_every_builder_is_offered():
    from maskclip_jax.data.datasets import BUILDERS

    assert tuple(BUILDERS) == DATASETS


def test_what_is_printed_opens(call, voc, tmp_path):
    result = call("prepare", "voc2012", voc, "--data-dir", tmp_path / "data", "--config", "voc21")
    assert result.code == 0
    (line,) = [line for line in result.lines if line.startswith("2 examples: ")]
    assert not any("ownload" in line for line in result.lines)  # TFDS's own words
    source = open_source(line.removeprefix("2 examples: "))
    assert [source[i].name for i in range(2)] == ["a", "b"]
    assert (source[0].labels == 20).all()
    again = call("prepare", "voc2012", voc, "--data-dir", tmp_path / "data", "--config", "voc21")
    assert again.code == 2
    assert "is there already" in again.errors[-1]


def test_what_is_printed_opens_wherever_it_lies(call, voc, tmp_path):
    data = tmp_path / "c++ & 100%20 = [0:1] #é?"
    result = call("prepare", "voc2012", voc, "--data-dir", data)
    (line,) = [line for line in result.lines if line.startswith("2 examples: ")]
    assert len(open_source(line.removeprefix("2 examples: "))) == 2
    by_hand = open_source(f"tfds:voc2012/voc20?split=val&data_dir={tmp_path}/c++ %26 100%2520 = %5B0:1] #é?")
    assert len(by_hand) == 2


def test_damaged_images(call, voc, tmp_path):
    (voc / "VOC2012" / "JPEGImages" / "a.jpg").write_bytes(b"")
    stopped = call("prepare", "voc2012", voc, "--data-dir", tmp_path / "data")
    assert stopped.code == 2
    assert "a.jpg is empty" in stopped.errors[-1]
    skipping = call("prepare", "voc2012", voc, "--data-dir", tmp_path / "data", "--on-error", "skip")
    assert skipping.code == 0
    assert skipping.errors[-1].startswith("warning: 1 skipped, listed in ")
    (listed,) = json.loads(Path(skipping.errors[-1].split("listed in ")[1]).read_text())
    assert listed["name"] == "a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["voc2012", "{tmp}/nowhere"], "get it from http"),
        (
            ["voc2012", "{voc}", "--config", "voc22"],
            "has no config 'voc22': choose among voc20, voc21",
        ),
        (
            ["image_corpus", "{voc}", "--config", "x"],
            "has no config 'x': there are none",
        ),
        (["image_corpus", "{voc}", "--classes", ""], "empty"),
        (["voc2012", "{voc}", "--splits", "train"], "split train of Pascal VOC 2012 needs ImageSets"),
        (["voc2012", "{voc}", "--classes", "dog"], "--classes names the values of image_corpus"),
        (["emoji_scenes", "{voc}", "--splits", "val"], "--splits chooses"),
        (["imagenet", "{voc}"], "invalid choice"),
    ],
)
def test_refused(call, voc, tmp_path, arguments, words):
    filled = [text.format(tmp=tmp_path, voc=voc) for text in arguments]
    result = call("prepare", *filled, "--data-dir", tmp_path / "data")
    assert result.code == 2
    assert not (tmp_path / "data").exists()
    assert len(result.errors) == 1
    assert words in result.errors[0]


def test_a_file_where_the_data_shall_go(call, voc, tmp_path):
    (tmp_path / "data").write_text("mine")
    result = call("prepare", "voc2012", voc, "--data-dir", tmp_path / "data")
    assert (result.code, len(result.errors)) == (2, 1)
    assert result.errors[0].startswith("error: --data-dir is a folder, but ")
    assert (tmp_path / "data").read_text() == "mine"
