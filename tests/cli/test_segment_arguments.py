"""The arguments of `segment`: what is refused, and that the others reach the prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_outputs import NAMES, WORDS, check, labels_of, written
from PIL import Image

from maskclip_jax.data.vocabulary import class_set

REFUSED = {
    "a folder without images": ({"images": ["{tmp}/none"]}, "a folder of images holds"),
    "no such model": ({"options": ["--model", "nonsense"]}, "a model is embedded"),
    "no such model path": ({"options": ["--model", "/no/such/model"]}, "a model is embedded"),
    "model that is no checkpoint": ({"options": ["--model", "{tmp}/none"]}, "config.json"),
    "model that is an image": ({"options": ["--model", "{photo}"]}, "weights are a file"),
    "model of an endless name": ({"options": ["--model", "m" * 300]}, "m" * 300),
    "a hub id without network": ({"options": ["--model", "no-such/model"]}, "no-such/model"),
    "no such tokenizer": ({"options": ["--tokenizer", "nonsense"]}, "tokenizer"),
    "ViTs have one stride": ({"options": ["--dense-stride", "16"]}, "patch size"),
    "no class": ({"classes": ""}, "a class needs a name"),
    "an empty class": ({"classes": "dog,,cat"}, "a class needs a name"),
    "duplicate classes": ({"classes": "dog, cat, Dog"}, "one class only"),
    "duplicate synonyms": ({"classes": "dog, Dog; cat"}, "must differ"),
    "missing class file": ({"classes": "{tmp}/words.txt"}, "class file must exist"),
    "empty class file": ({"classes": "{tmp}/empty.txt"}, "at least one class"),
    "binary class file": ({"classes": "{tmp}/binary.txt"}, "UTF-8"),
    "out is a file": ({"out": "{photo}"}, "--out is a folder"),
    "out lies in a file": ({"out": "{photo}/out"}, "--out is a folder"),
    "threshold above 1": ({"options": ["--prompt-denoising", "1.5"]}, "above 0 and up to 1"),
    "threshold 0": ({"options": ["--prompt-denoising", "0"]}, "above 0 and up to 1"),
    "threshold nan": ({"options": ["--key-smoothing", "nan"]}, "above 0 and up to 1"),
    "threshold of words": ({"options": ["--background-threshold", "half"]}, "above 0 and up to 1, not 'half'"),
    "no window": ({"options": ["--window", "0"]}, "at least 1"),
    "half a pixel": ({"options": ["--window", "22.5"]}, "whole number of at least 1, not '22.5'"),
    "stride without window": ({"options": ["--stride", "16"]}, "got no window"),
    "stride beyond window": ({"options": ["--window", "16", "--stride", "32"]}, "at most the window"),
    "stride too small": ({"options": ["--window", "320", "--stride", "1"]}, "larger stride"),
    "no batch": ({"options": ["--batch-size", "0"]}, "at least 1"),
    "background is a class": ({"options": ["--background", "sky, wall"]}, "one class only"),
    "a class named background": ({"classes": "dog, Background", "options": ["--background", "wall"]}, "by itself"),
    "empty background": ({"options": ["--background", ""]}, "a class needs a name"),
    "no such templates": ({"options": ["--templates", "haiku"]}, "templates must be"),
    "a template without a place": ({"options": ["--templates", "a {photo"]}, "one {}"),
    "no such option": ({"options": ["--colour", "red"]}, "--colour"),
    "two readings": ({"options": ["--naive", "--method", "sclip"]}, "not allowed with"),
    "no such method": ({"options": ["--method", "slip"]}, "a method is one of"),
    "no such protocol": ({"options": ["--protocol", "slip"]}, "a protocol is one of"),
    "two sizes": ({"options": ["--short-side", "32", "--within", "32", "32"]}, "not allowed with"),
    "no such dtype": ({"options": ["--dtype", "int8"]}, "int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(segment, photo, tmp_path, case):
    """Exit code 2, one line, and no output folder."""
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00dog")
    before = written(tmp_path)
    arguments, words = REFUSED[case]
    fill = lambda text: text.replace("{tmp}", str(tmp_path)).replace("{photo}", str(photo))  # noqa: E731
    options = [fill(text) if case != "a template without a place" else text for text in arguments.get("options", ())]
    result = segment(
        *map(fill, arguments.get("images", ["{photo}"])),
        classes=fill(arguments.get("classes", WORDS)),
        out=fill(arguments["out"]) if "out" in arguments else None,
        options=options,
    )
    assert result.code == 2
    assert result.lines == []
    assert len(result.errors) == 1
    assert result.errors[0].startswith("error: ")
    assert words in result.errors[0]
    assert written(tmp_path) == before


def class_names(out: Path) -> list[str]:
    return [entry["class"] for entry in json.loads((out / "photo.json").read_text())["classes"]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("dog", ["dog"]),
        (" dog ,cat, ", ["dog", "cat"]),
        ("sofa, couch; dog", ["sofa", "dog"]),
        ("{file}", ["sofa", "größter Hund", "red car"]),
        ("voc20", [str(entry) for entry in class_set("voc20")]),
    ],
)
def test_forms_of_classes(segment, photo, tmp_path, text, names):
    file = tmp_path / "words.txt"
    file.write_text("# furniture\nsofa, couch\n\ngrößter Hund\nred car\n", encoding="utf-8")
    assert segment(photo, classes=text.replace("{file}", str(file))).code == 0
    assert class_names(tmp_path / "out") == names
    check(tmp_path / "out", "photo", photo, names)


def test_many_classes_make_a_deep_label_file(segment, photo, tmp_path):
    """Beyond 256 classes a palette is too small: 16-bit grey."""
    assert segment(photo, classes="context459").code == 0
    with Image.open(tmp_path / "out" / "photo_labels.png") as image:
        assert image.mode == "I;16"
        assert np.array(image).max() < 459


@pytest.mark.parametrize(
    ("options", "names", "changes"),
    [
        (["--naive"], NAMES, True),
        (["--key-smoothing"], NAMES, True),
        (["--key-smoothing", "0.5"], NAMES, None),
        (["--prompt-denoising", "0.9"], NAMES, None),
        (["--window", "32", "--stride", "16"], NAMES, True),
        (["--window", "24"], NAMES, True),
        (["--background", "tree, person"], ["background", *NAMES], True),
        (["--background-threshold", "1"], ["background", *NAMES], True),
        (["--short-side", "32"], NAMES, True),
        (["--templates", "the red {}"], NAMES, True),
        (["--fidelity", "released"], NAMES, True),
        (["--dtype", "bfloat16"], NAMES, None),
        (["--batch-size", "1"], NAMES, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_options_reach_the_prediction(segment, photo, tmp_path, options, names, changes):
    """Each runs, and those that must change something do (None: on this random model it need not)."""
    assert segment(photo, out=tmp_path / "plain").code == 0
    result = segment(photo, options=options)
    assert (result.code, result.errors) == (0, [])
    check(tmp_path / "out", "photo", photo, names)
    plain, other = ((tmp_path / f / "photo.json").read_text() for f in ("plain", "out"))
    assert changes is None or (plain != other) == changes
    if "--background-threshold" in options:
        assert (labels_of(tmp_path / "out", "photo") == 0).all()  # nothing is entirely sure


def test_smoothing_without_a_number_is_smoothing_by_1(segment, photo, tmp_path):
    for out, options in (("a", ["--key-smoothing"]), ("b", ["--key-smoothing", "1"])):
        assert segment(photo, out=tmp_path / out, options=options).code == 0
    assert (tmp_path / "a" / "photo.json").read_bytes() == (tmp_path / "b" / "photo.json").read_bytes()
