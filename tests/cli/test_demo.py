"""`run.py demo`: its table, its sheet, its record; the student that ships, and one that is trained here."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from maskclip_jax import cli
from maskclip_jax.cli import demo
from maskclip_jax.distill import folder_of, is_student
from maskclip_jax.distill.student_folder import load_student


@pytest.fixture
def few_scenes(monkeypatch):
    """Four scenes are scored and two shown, instead of all."""
    images, labels, names = demo.load_scenes()
    monkeypatch.setattr(demo, "load_scenes", lambda: (images[:4], labels[:4], names))
    monkeypatch.setattr(demo, "SHOWN", (1, 3))


def run(capsys, out, *options: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--out", str(out), *options])
    assert stop.value.code == 0, capsys.readouterr().err
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 6 * 264 + 8
    return json.loads((out / "scores.json").read_text())


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    scores = run(capsys, tmp_path / "demo")
    naive, mask, denoised, student = (found["mIoU"] for found in scores.values())
    assert mask > naive + 25  # the paper's point: the last values know where, the last attention forgets it
    assert denoised > mask
    assert student > mask + 3  # MaskCLIP+ is better than what taught it
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["settings"]["model"] == "embedded"


@pytest.mark.slow
def test_a_student_trained_here(few_scenes, tmp_path, capsys, monkeypatch):
    from maskclip_jax.distill import experiment

    loaded = experiment.load_experiment
    short = {"steps": 2, "batch_size": 2, "crop_size": 64, "eval_data": "", "checkpoint_every": 2}
    monkeypatch.setattr(experiment, "load_experiment", lambda name: dataclasses.replace(loaded(name), **short))
    run(capsys, tmp_path / "demo", "--train")
    assert load_student(tmp_path / "demo" / "student").step == 2


def test_the_shipped_student_is_small_and_known_by_name():
    assert is_student("embedded-student")
    files = list(folder_of("embedded-student").iterdir())
    assert sum(file.stat().st_size for file in files) < 2e6
    student = load_student("embedded-student")
    assert list(student.config.label_names) == demo.load_scenes()[2]
    assert student.config.teacher.model == "embedded"


def test_a_row_of_the_sheet_shows_each_mask_with_the_truths_borders():
    image, truth = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), np.uint8)
    truth[:, 4:] = 1
    palette = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    plain, wrong, right = demo.sheet_row(image, truth, [np.zeros_like(truth)], palette)
    assert plain.shape == wrong.shape == right.shape == (16, 16, 3)
    assert (plain == 100).all()
    for picture in (wrong, right):
        assert (picture[:, 7:9] == 255).all()
    assert (wrong[:, :6] == wrong[:, 10:]).all()
    assert right[0, 0, 0] > right[0, 0, 2]
    assert right[0, 15, 0] < right[0, 15, 2]
