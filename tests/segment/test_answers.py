"""Answers of any number of images: few are held at a time, each comes when those before it have, and is saved."""

import numpy as np
import pytest
from PIL import Image
from pixel_loops import CLASSES

from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.predict import chunks, in_order, segment_images


def test_few_pixels_are_held_at_a_time():
    """Chunks end at a number of images or of pixels; nothing is read ahead of the chunk that is asked for."""
    read = []

    def images():
        for i, side in enumerate((10, 10, 10, 20, 50, 10, 10)):
            read.append(i)
            yield np.zeros((side, 10, 3), np.uint8)

    found = chunks(images(), most=3, pixels=400)
    assert len(next(found)) == 3
    assert read == [0, 1, 2]
    assert [len(chunk) for chunk in found] == [2, 2]
    assert read == list(range(7))


def test_answers_come_as_soon_as_those_before_have():
    """What comes early waits, and nothing else does."""
    pulled = []

    def found():
        for index in (0, 3, 1, 2, 4):
            pulled.append(index)
            yield index, str(index)

    answers = in_order(found())
    assert [(next(answers), list(pulled)) for _ in range(2)] == [("0", [0]), ("1", [0, 3, 1])]
    assert list(answers) == ["2", "3", "4"]


def test_an_answer_is_drawn_and_saved_as_segment_does(pretrained, images, tmp_path):
    (picture,) = images((40, 50))
    Image.fromarray(picture).save(tmp_path / "photo.png")
    options = Options(templates="single", prompt_denoising=0.3)
    (found,) = segment_images([picture], CLASSES, pretrained("vit"), options)
    assert found.overlay(picture).shape[2] == 3
    found.save(tmp_path / "new" / "out", tmp_path / "photo.png")
    found.save(tmp_path / "bare", name="mine")
    names = {
        str(path.relative_to(tmp_path)) for folder in ("new/out", "bare") for path in (tmp_path / folder).iterdir()
    }
    written = {f"new/out/photo{trail}" for trail in ("_overlay.png", "_labels.png", ".json")}
    assert names == written | {"bare/mine_labels.png", "bare/mine.json"}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "bare" / "mine_labels.png")), found.labels)
    with pytest.raises(UserError, match="of 50×40 pixels, got one of 40×40"):
        found.overlay(picture[:, :40])
    with pytest.raises(UserError, match="must be writable"):
        found.save(tmp_path / "photo.png")
