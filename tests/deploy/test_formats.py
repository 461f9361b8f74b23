"""A file of each format, run by its own runtime, says what `segment` says."""

import json
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from doc_pages import run_page
from tiny_distill import CLASSES, pretrained_clip, text_rows

from maskclip_jax import cli
from maskclip_jax.deploy.formats import write_model
from maskclip_jax.deploy.functions import deployed_segmenter, deployed_student
from maskclip_jax.distill.predict import iter_student_segmentations
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.predict import segment_images

BAR = 1e-4
READING = {"prompt_denoising": 0.25, "key_smoothing": 0.9}
ALONE = """
import sys
from pathlib import Path
import jaxtyping
import numpy as np
from jax import export
assert not any("maskclip" in name for name in sys.modules)
inputs, out = np.load(sys.argv[2]), {}
model = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for key in inputs:
    if key.startswith("image"):
        rows = [inputs["rows"]] if "rows" in inputs else []
        out["labels" + key], out["probabilities" + key] = model.call(inputs[key], *rows)
try:
    import maskclip_jax
except ImportError:
    np.savez(sys.argv[3], **out)
"""


@pytest.fixture(autouse=True)
def symbolic_sizes():
    """They are no `int`, as signatures say."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def run_stablehlo(file, images, rows=None):
    """Its results in a process that cannot import this package."""
    inputs = {f"image{i}": image[None] for i, image in enumerate(images)} | ({} if rows is None else {"rows": rows})
    np.savez(file.with_suffix(".in.npz"), **inputs)
    names = [file, file.with_suffix(".in.npz"), file.with_suffix(".out.npz")]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, names)], check=True, cwd=file.parent)
    found = np.load(names[2])
    return [(found[f"labelsimage{i}"], found[f"probabilitiesimage{i}"]) for i in range(len(images))]


def run_onnx(file, images, rows=None):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file)
    more = {} if rows is None else {"classifier": rows}
    return [session.run(["labels", "probabilities"], {"image": image[None]} | more) for image in images]


RUNTIMES = [("stablehlo", run_stablehlo), pytest.param("onnx", run_onnx, marks=pytest.mark.slow)]


def check(found, expected):
    for (labels, probabilities), ours in zip(found, expected, strict=True):
        assert labels.dtype == np.int32
        np.testing.assert_allclose(probabilities[0], ours.probabilities, atol=BAR)
        differ = labels[0] != ours.labels
        best = np.sort(ours.probabilities, axis=-1)
        assert (best[..., -1] - best[..., -2])[differ].max(initial=0) < BAR  # near a tie a pixel may fall either way
        assert len(np.unique(ours.labels)) > 1


@pytest.mark.parametrize(
    ("to", "run"), [("stablehlo", run_stablehlo), pytest.param("onnx", run_onnx, marks=pytest.mark.slow)]
)
def test_a_student(trained, tmp_path, to, run):
    if to == "onnx":
        pytest.importorskip("jax2onnx")
    any_size = to == "stablehlo"
    images = [picture(64, 96), picture(32, 40)] if any_size else [picture(32, 40)]
    about = write_model(deployed_student(trained, None if any_size else (32, 40)), tmp_path / "model", to)
    ours = [
        next(iter_student_segmentations([one], trained, short_side=min(one.shape[:2]), return_probabilities=True))
        for one in images
    ]
    check(run(tmp_path / "model", images), ours)
    written = json.loads((tmp_path / "model.json").read_text())
    assert written.keys() == about.keys()
    assert about["classes"] == list(CLASSES)
    assert written["inputs"]["image"]["shape"] == [1, "8*h", "8*w", 3] if any_size else [1, 32, 40, 3]
    assert about["resize"]["short_side"] == trained.config.augmentation.short_side
    assert {p.name for p in tmp_path.iterdir() if p.suffix in ("", ".json")} == {"model", "model.json"}


@pytest.mark.parametrize(
    ("to", "run"), [("stablehlo", run_stablehlo), pytest.param("onnx", run_onnx, marks=pytest.mark.slow)]
)
def test_words_that_come_later(tmp_path, to, run):
    if to == "onnx":
        pytest.importorskip("jax2onnx")
    clip, size = pretrained_clip(), (48, 64)
    model = deployed_segmenter(clip, Options(**READING), None if to == "stablehlo" else size)
    if to == "onnx":
        with pytest.raises(UserError, match="an ONNX file has one number of classes"):
            write_model(model, tmp_path / "m", to)
        model = model._replace(about=model.about | {"classes": list("abcde")})
    write_model(model, tmp_path / "m", to)
    for words in (5, 3 if to == "stablehlo" else 5):
        rows = text_rows(words)[::-1].copy()
        options = Options(**READING, short_side=48, return_probabilities=True)
        expected = segment_images([picture(*size)], list(CLASSES[:words]), clip, options, classifier=rows)
        check(run(tmp_path / "m", [picture(*size)], rows), expected)


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"method": "naclip"}, None, "naclip weighs neighbours on one grid"),
        ({"window": 32}, (48, 64), "reads a whole image once, .* got window"),
        ({}, (50, 64), "two multiples of 8 from 8 to 8192"),
    ],
)
def test_what_a_segmenter_cannot(options, size, words):
    with pytest.raises(UserError, match=words):
        deployed_segmenter(pretrained_clip(), Options(**options), size)


def test_the_command(student_folder, tmp_path, capsys, monkeypatch):
    def run(*options):
        code = cli.run_command(["export-model", str(student_folder), "--no-compile-cache", *map(str, options)])
        return code, *capsys.readouterr()

    out = tmp_path / "out" / "student.onnx"
    code, _, errors = run("--to", "onnx", "--out", out)
    assert (code, errors) == (2, "error: an ONNX file has one size of images, got none: give --size HEIGHT WIDTH\n")
    code, _, errors = run("--to", "stablehlo", "--out", out, "--key-smoothing")
    assert code == 2
    assert "a student is read as it was trained, got --key-smoothing" in errors
    assert not list(out.parent.glob("*"))
    fitting = out.with_suffix(".stablehlo")
    code, _, errors = run("--to", "stablehlo", "--out", fitting, "--size", 32, 5)
    assert code == 2
    assert "a size is two multiples of 1 from 8 to 8192 pixels, got (32, 5)" in errors
    with monkeypatch.context() as patched:  # before anything is loaded
        patched.setattr("maskclip_jax.cli.common.load_run", None)
        code, _, errors = run("--to", "stablehlo", "--out", out, "--size", 32, 40)
    assert code == 2
    assert "a file is called as its format is, got student.onnx for stablehlo: take --to onnx" in errors
    code, printed, _ = run("--to", "stablehlo", "--out", fitting, "--size", 32, 40)
    assert code == 0
    assert "inputs: image uint8 [1, 32, 40, 3]" in printed
    with pytest.raises(SystemExit) as stop:
        run("--to", "tflite", "--out", out)
    assert stop.value.code == 2
    assert (
        "stablehlo or onnx, not 'tflite': no converter from JAX was seen to work; write onnx" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_what_the_documentation_shows(student_folder, monkeypatch, capsys):
    """Its commands and its snippet; the classifier that is written beside a CLIP's file is that of its words."""
    monkeypatch.chdir(student_folder.parent)
    found = run_page("deploy.md", capsys)
    assert np.shape(found["probabilities"]) == (1, 64, 96, 5)
    about, rows = json.loads(Path("words.stablehlo.json").read_text()), np.load("words.stablehlo.classifier.npy")
    assert about["classes"] == ["dog", "sofa"]
    assert rows.shape == (2, about["embedding"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
