"""What `segment` writes, read back and held against itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data.images import read_image

WORDS = "dog, cat, grass, sky"
NAMES = ["dog", "cat", "grass", "sky"]
TRAILS = ("_overlay.png", "_labels.png", ".json")


def written(out: Path) -> set[str]:
    """Every file in the output folder, hidden ones too."""
    return {str(p.relative_to(out)) for p in out.rglob("*")}


def labels_of(out: Path, name: str) -> np.ndarray:
    with Image.open(out / f"{name}_labels.png") as image:
        assert image.mode == "P"
        return np.array(image)


def check(out: Path, name: str, source: Path, names: list[str]) -> np.ndarray:
    """The three files of one image agree with each other and with the image; returns the labels."""
    labels, pixels = labels_of(out, name), read_image(source)
    assert labels.shape == pixels.shape[:2]
    assert labels.max() < len(names)
    content = json.loads((out / f"{name}.json").read_text())
    assert [content["height"], content["width"]] == list(labels.shape)
    assert [entry["class"] for entry in content["classes"]] == names
    for index, entry in enumerate(content["classes"]):
        assert entry["index"] == index
        assert entry["area"] == pytest.approx((labels == index).mean(), abs=1e-9)
        assert (entry["confidence"] is None) == (entry["area"] == 0)
        assert entry["confidence"] is None or 0 < entry["confidence"] <= 1
    assert sum(entry["area"] for entry in content["classes"]) == pytest.approx(1)
    return labels
