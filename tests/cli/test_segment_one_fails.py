"""One image that fails takes no other along; records of any argument; limits and paths that are refused."""

import argparse
import itertools
import json
import os
from pathlib import Path

import pytest
from command_outputs import TRAILS, written
from jax.errors import JaxRuntimeError
from PIL import Image

from maskclip_jax.cli.common import record
from maskclip_jax.cli.segment import Unanswered, answers
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.errors import UserError
from maskclip_jax.segment.files import write_result

LATIN = os.fsdecode(b"latin-\xe9")
OUT_OF_DEVICE_MEMORY = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


class Segmenter:
    """Doubles numbers in order, all of them together until one fails; alone, some fail still."""

    def __init__(self, together, alone):
        self.together, self.alone = together, alone

    def __call__(self, images):
        chunk = list(images) if isinstance(images, list) else list(itertools.islice(images, 4))
        while chunk:
            for image in chunk:
                if error := (self.alone if len(chunk) == 1 else self.together).get(image):
                    raise error
                yield 2 * image
            chunk = [] if isinstance(images, list) else list(itertools.islice(images, 4))


@pytest.mark.parametrize("error", [MemoryError("of the host"), UserError("too large"), OUT_OF_DEVICE_MEMORY])
def test_an_image_that_fails_takes_no_other_along(error):
    """Every answer comes, in order and once, but that of the image which fails alone."""
    images = [(Path(f"{i}.png"), i) for i in range(10)]
    segmenter = Segmenter({2: error, 5: error, 9: error}, {5: error, 9: error})
    found = list(answers(segmenter, iter(images)))
    assert [(path, image) for path, image, _ in found] == images
    assert [i for i, (_, _, result) in enumerate(found) if isinstance(result, Unanswered)] == [5, 9]
    assert [result for _, _, result in found if not isinstance(result, Exception)] == [0, 2, 4, 6, 8, 12, 14, 16]
    message = str(found[5][2])
    assert "5.png" in message
    assert str(error).split(": ")[-1] in message


def test_what_is_no_images_fault_stops():
    with pytest.raises(ZeroDivisionError):
        list(answers(Segmenter({1: ZeroDivisionError()}, {}), [(Path("a"), 0), (Path("b"), 1)]))


def test_an_overlay_too_large_for_memory_is_skipped(segment, tmp_path, draw, monkeypatch):
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file in files:
        Image.fromarray(draw(20, 30)).save(file)

    def write(out, name, *rest):
        if name == "b":
            raise MemoryError
        return write_result(out, name, *rest)

    monkeypatch.setattr("maskclip_jax.segment.files.write_result", write)
    result = segment(*files)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "b.png does not (MemoryError" in result.errors[0].replace("out of memory", "MemoryError")
    assert written(tmp_path / "out") == {n + t for n in "ac" for t in TRAILS} | {"segment.json"}
    assert json.loads((tmp_path / "out" / "segment.json").read_text())["skipped"] == [str(files[1])]


def test_records_hold_any_argument(tmp_path):
    """Numbers, lists and pairs of them, paths and names that are not UTF-8."""
    given = {"command": "x", "scales": [0.75, 1.0], "shard": (0, 4), "out": Path("a"), "images": [Path("b"), LATIN]}
    write_json(tmp_path / "r.json", record(argparse.Namespace(**given, classes=LATIN, flip=True, unseen=None)))
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    plain = {"out": "a", "images": ["b", "latin-\\xe9"], "classes": "latin-\\xe9", "shard": [0, 4]}
    assert settings == given | plain | {"flip": True, "unseen": None}
    write_json(tmp_path / "r.json", LATIN)  # such a name may come from elsewhere
    assert json.loads((tmp_path / "r.json").read_text()) == LATIN


def test_more_pixels_on_demand(segment, photo, tmp_path):
    assert "at most 2,399 pixels" in segment(photo, options=["--max-pixels", "2399"]).errors[0]
    assert segment(photo, options=["--max-pixels", "2400"]).code == 0


@pytest.mark.parametrize(
    "argv",
    [("segment", ""), ("segment", "a", "--out", ""), ("label", " "), ("evaluate", ""), ("evaluate", "a", "--out", "")],
)
def test_an_empty_path_is_not_the_working_folder(call, model, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in argv else ("--out", "o")
    result = call(*argv, *out, "--classes", "dog", "--model", model)
    assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
    assert "''" in result.errors[0] or "' '" in result.errors[0]
    assert written(tmp_path) == set()
