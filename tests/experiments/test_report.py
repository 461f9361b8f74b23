"""Cells are computed once and resumed; the report is written; what the README says is what is committed."""

import json
import shlex
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import report
from experiments.configs.paper import TARGETS
from experiments.harness import records, scoring
from experiments.harness.records import Cell, Found, Missing, Settings, find, run, table
from experiments.tables import ablations, annotation_free, encoders, fine_grained, transforms
from maskclip_jax import cli
from maskclip_jax.checkpoints.pretrained import Pretrained, Reading
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.data.sources import ArraySource
from maskclip_jax.distill.experiment import load_experiment
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.refine import predict_scores

ROOT = Path(__file__).resolve().parents[2]
TIPS_V2 = {"b14": 17.4, "l14": 24.7, "so400m14": 23.3, "g14": 17.8}  # mIoU on ADE20K, as published


def test_readme_says_what_is_committed():
    document = report.README.read_text(encoding="utf-8")
    assert report.with_blocks(document, report.readme_contents()) == document


def experiment_of(*made: Cell) -> types.SimpleNamespace:
    return types.SimpleNamespace(NAME="toy", TITLE="Toy", cells=lambda settings: list(made), blocks=lambda *_: [])


def test_cells_are_computed_once_and_again_when_their_config_changes(tmp_path):
    computed = []

    def cell(key: str, **config) -> Cell:
        return Cell(key, {"inputs": {"checkpoint": "a"}} | config, lambda: computed.append(key) or {"mIoU": 1.0})

    settings = Settings(results=tmp_path)
    run(settings, experiment_of(cell("a"), cell("b")))
    assert computed == ["a", "b"]
    run(settings, experiment_of(cell("a"), cell("b", count=3), cell("c")))
    assert computed == ["a", "b", "b", "c"]
    record = json.loads((tmp_path / "toy.embedded.json").read_text())["cells"]["b"]
    assert record["config"] == {"inputs": {"checkpoint": "a"}, "count": 3}
    assert len(record["commit"]) >= 7
    assert record["seconds"] >= 0
    run(Settings(results=tmp_path, fresh=True, only=("a",)), experiment_of(cell("a"), cell("b", count=3)))
    assert computed[4:] == ["a"]
    # Without the input that was read (a run, a checkpoint) a record is taken as it is.
    (found,) = find(settings, experiment_of(cell("b", count=3, inputs=None)))
    assert found.scores == {"mIoU": 1.0}


def test_what_stops_leaves_what_was_done(tmp_path):
    def stop() -> dict:
        raise KeyboardInterrupt

    done = Cell("done", {"inputs": None}, lambda: {"mIoU": 2.0})
    with pytest.raises(KeyboardInterrupt):
        run(Settings(results=tmp_path), experiment_of(done, Cell("stopped", {"inputs": None}, stop)))
    found = find(Settings(results=tmp_path), experiment_of(done))
    assert found[0].scores == {"mIoU": 2.0}


def test_what_is_missing_stays_empty(tmp_path, capsys):
    def missing() -> dict:
        raise Missing("no run at X: python run.py distill …")

    (found,) = run(Settings(results=tmp_path), experiment_of(Cell("a", {"inputs": None}, missing)))
    assert found.record is None
    assert "empty: a: no run at X" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_report(tmp_path, monkeypatch):
    """Two scenes through the real model; the second report computes nothing."""
    only = ("scenes/resnet/MaskCLIP", "keys/resnet")
    settings = Settings(count=2, results=tmp_path / "results", runs=tmp_path / "runs", only=only)
    report.write_report(settings, tmp_path / "out", (annotation_free, ablations))
    text = (tmp_path / "out" / "report.md").read_text()
    cells_of = json.loads((tmp_path / "results" / "annotation_free.embedded.json").read_text())["cells"]
    scores = cells_of["scenes/resnet/MaskCLIP"]["scores"]
    assert scores["images"] == 2
    assert f"| MaskCLIP | {scores['mIoU']:.1f} | – |" in text
    assert "experiments/configs/scenes.py:large --out" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<td>{scores['mIoU']:.1f}" in page
    assert "data:image/png;base64," in page
    for picture in (tmp_path / "out" / "figures").iterdir():
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 5
    similar = json.loads((tmp_path / "results" / "ablations.embedded.json").read_text())["cells"]["keys/resnet"][
        "scores"
    ]
    assert -1 <= similar["cosine, other class"] <= similar["cosine, same class"] <= 1
    monkeypatch.setattr(scoring, "evaluate_teacher", None)  # a call would be an error
    monkeypatch.setattr(ablations, "key_similarity", lambda *_: pytest.fail("computed again"))
    report.write_report(settings, tmp_path / "again", (annotation_free, ablations))
    assert (tmp_path / "again" / "report.md").read_text() == text


def test_the_full_report_shows_what_was_published(tmp_path):
    report.write_report(Settings(scale="full", results=tmp_path / "none"), tmp_path / "out", compute=False)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "41.5 / –" in text
    assert all(f"| tips_v2_{size} | {value} / – |" in text for size, value in TIPS_V2.items())
    for value in TARGETS.values():
        assert f"{value} / –" in text
    assert (
        "python run.py distill experiments/configs/paper.py:voc20/zero_shot/r50 --out runs/voc20_zero_shot_r50-0"
        in text
    )


def test_every_encoder_by_every_method_at_full_size():
    """A row's command fills that row, a cell's that cell, though "clip" is a part of other methods' names."""
    settings = Settings(scale="full")
    found = {f.cell.key: f.cell for f in find(settings, encoders)}
    rows = [(data, encoder) for data in encoders.DATA for encoder in encoders.ENCODERS]
    none = [m for m, method in METHODS.items() if m == "values" or method.earlier]  # of a ResNet's pool
    assert set(found) == {f"{d}/{e}/{m}" for d, e in rows for m in METHODS if e != "clip_rn50" or m not in none}
    for key, cell in found.items():
        (only,) = shlex.split(cell.command)[-1:]
        assert records.chosen(Settings(only=(only,)), list(found)) == {key}
        Options(**cell.config["options"])
    text = "".join(b for b in encoders.blocks(settings, {key: Found(cell, None) for key, cell in found.items()}))
    for data, encoder in rows:
        command = f"python -m experiments.tables.encoders --scale full --only {data}/{encoder}/"
        assert f"`{command}` |\n" in text
        filled = records.chosen(Settings(only=(command.split()[-1],)), list(found))
        assert filled == {key for key in found if key.startswith(f"{data}/{encoder}/")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "kind"), [("ade150/tips_v2_b14/maskclip", "tips"), ("ade150/siglip2_b16/gem", "siglip")]
)
def test_a_full_cell_on_a_tiny_encoder(monkeypatch, checkpoints, key, kind):
    """With random weights and one image: the cell's own protocol, windows and templates."""
    config, variables = checkpoints.random_clip(kind)
    ids = lambda prompts: np.full((len(prompts), config.text.context_length), 1, np.int32)  # noqa: E731
    clip = Pretrained(CLIP(config), variables, config, ids, Preprocess((0.5,) * 3, (0.5,) * 3, multiple=8), Reading())
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 40, 3), np.uint8)
    monkeypatch.setattr(scoring, "pretrained", lambda model: clip)
    monkeypatch.setattr(scoring, "open_data", lambda *_: ArraySource(image, np.ones((1, 24, 40), np.uint8)))
    (cell,) = [cell for cell in encoders.cells(Settings(scale="full")) if cell.key == key]
    scores = cell.compute()
    assert scores["images"] == 1
    assert 0 <= scores["mIoU"] <= 100


def test_every_command_that_is_shown_can_be_given():
    settings = {scale: Settings(scale=scale) for scale in records.SCALES}
    for scale in records.SCALES:
        for experiment in report.EXPERIMENTS:
            for cell in experiment.cells(settings[scale]):
                if cell.command.startswith("python run.py"):
                    args = cli.build_parser("distill").parse_args(shlex.split(cell.command)[2:])
                    assert load_experiment(ROOT / args.experiment, args.set).steps > 0
    for name in fine_grained.PROMPTS:
        args = cli.build_parser("segment").parse_args(shlex.split(fine_grained.segment_command(name))[2:])
        assert args.classes == name


def test_another_count_does_not_replace_what_is_committed():
    import argparse

    parser = argparse.ArgumentParser()
    records.add_arguments(parser)
    with pytest.raises(UserError, match="name another folder"):
        records.settings_from(parser.parse_args(["--count", "4"]))
    assert records.settings_from(parser.parse_args(["--count", "4", "--results", "x"])).scenes(500) == 4


def test_tables_and_their_html():
    made = table([("", "a b"), ("x", 1.26), ("y", None)])
    assert made == "|  | a b |\n|---|---|\n| x | 1.3 |\n| y | – |\n"
    assert report.block_to_html("| a | b |\n|---|---|\n| `c<d` | 2 |\n") == (
        "<table><tr><th>a<th>b<tr><td><code>c&lt;d</code><td>2</table>"
    )


def test_the_grid_is_what_single_calls_give():
    """The vmapped program against one pair of thresholds at a time."""
    clip, classifier = transforms._loaded("embedded-resnet")
    ((images, labels),) = list(transforms._batches(1, 1))
    up, pixels = transforms.to_pixels(clip, 128), transforms.pixels_of(clip, images)
    found = transforms.grid_confusions(clip.model, clip.variables, pixels, labels, classifier, up)

    @jax.jit
    def single(denoising: float, smoothing: float) -> jax.Array:
        pair = {"denoising": denoising, "smoothing": smoothing}
        scores = predict_scores(clip.model, clip.variables, jnp.asarray(pixels), classifier, **pair)
        return transforms.count(labels[0], transforms.predict(scores.values[0], up))

    for i, j in ((3, 5), (5, 2)):
        expected = single(transforms.DENOISING[i], transforms.SMOOTHING[j])
        assert float(jnp.abs(found[i, j] - expected).sum()) <= 4  # pixels on a border between two classes
    assert int(found[0, 0].sum()) == 128 * 128
