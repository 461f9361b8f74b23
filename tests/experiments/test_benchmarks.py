"""The benchmark's counts against programs, its table, and a tiny run of it from end to end."""

import ast
import inspect
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmarks
from experiments.benchmark import cases, flops, gpu, interleave, labelling, table, work, worker_pipe
from maskclip_jax.encoders.config import SIGLIP_VIT, TIPS_VIT, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP, fold
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.segment.refine import dense_logits
from maskclip_jax.students import StudentConfig, create_student

ROOT = Path(__file__).resolve().parents[2]

TEXT = TextConfig(8, 4, 8, 1, 1, 8)


def program_flops(function, *args) -> float:
    """What XLA counts in a program before it optimises anything (elementwise operations too)."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


_SIZES = (32, 8, 64, 2, 2, 256)
TOWERS = {
    "vit": ViTConfig(*_SIZES),
    "siglip": ViTConfig(*_SIZES, **SIGLIP_VIT),
    "tips": ViTConfig(*_SIZES, **TIPS_VIT),
    "tips, swiglu": ViTConfig(*_SIZES, **TIPS_VIT | {"activation": "swiglu", "class_tokens": 40}),
    "resnet": ResNetConfig(64, 32, (1, 2, 1, 1), 4),
}


@pytest.mark.parametrize("name", TOWERS)
def test_dense_counts_are_those_of_a_program(name):
    vision = TOWERS[name]
    config = CLIPConfig(vision, TEXT, 64)
    model = CLIP(config)
    variables = fold(config, work.random_variables(model))
    images, text = jnp.zeros((1, 128, 96, 3)), jnp.zeros((11, 64))
    counted = flops.dense(config, 128, 96, 11)
    program = program_flops(lambda v, x, t: dense_logits(model, v, x, t).logits, variables, images, text)
    assert counted < program < 1.25 * counted  # norms, activations, softmax, and the keys come on top


def test_student_counts_are_those_of_a_program():
    config = StudentConfig(16, layers=(1, 2, 1, 1), base_width=16, expansion=4, rates=(1, 2))
    student = create_student(config)
    shapes = shapes_of(student, jnp.zeros((1, 64, 64, 3)), jnp.zeros((5, 16)))
    program = program_flops(student.apply, shapes, jnp.zeros((1, 64, 64, 3)), jnp.zeros((5, 16)))
    forward, both = flops.deeplab_v2(config, 64, 64, 5)
    assert 0.85 * forward < program < 1.35 * forward
    assert 2 * forward < both < 3 * forward


def test_torchs_process_finds_its_neighbour():
    """PyTorch is not installed here, but what its process imports beside it must be there."""
    code = ast.parse((ROOT / "experiments" / "benchmark" / "torch_worker.py").read_text())
    found = [node for node in code.body if isinstance(node, ast.ImportFrom) and node.module != "torch"]
    assert [node.module for node in found] == ["worker_pipe"]
    assert all(hasattr(worker_pipe, alias.name) for alias in found[0].names)


def test_taps_by_hand():
    assert flops.taps(5, 3, 1, 1) == 13  # 2 + 3 + 3 + 3 + 2
    assert flops.taps(5, 3, 2, 1) == 7  # positions 0, 2, 4: 2 + 3 + 2
    assert flops.taps(5, 3, 1, 4) == 7  # only the ends have a neighbour four away
    assert flops.conv(2, 2, 3, 7) == 2 * 4 * 21
    assert flops.smoothing(1000, 100, 10) == 4_000_000
    assert flops.smoothing(10, 100, 20) == 24_000


def test_both_orders_of_smoothing_agree():
    rng = np.random.default_rng(0)
    p = jax.nn.softmax(jnp.asarray(rng.standard_normal((1, 30, 4)), jnp.float32))
    keys = jnp.asarray(rng.standard_normal((1, 30, 5)), jnp.float32)
    np.testing.assert_allclose(work.all_pairs(p, keys), work.key_smoothing(p, keys), atol=1e-5)


def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    tiny = {
        "smoothing": [
            interleave.Rival("ours", "smoothing", {"length": 64, "width": 8}, side=128),
            interleave.Rival("all | pairs", "smoothing", {"length": 64, "width": 8, "order": "all pairs"}, side=128),
        ]
    }
    monkeypatch.setattr(benchmarks, "groups", lambda section, **_: tiny)
    monkeypatch.setattr(benchmarks, "machine_rates", lambda dtypes: [])
    assert benchmarks.main(["smoothing", "--rounds", "2", "--out", str(tmp_path / "b")]) == 0
    assert "smoothing" in capsys.readouterr().out
    ours, other = json.loads((tmp_path / "b.json").read_text())["groups"]["smoothing"]
    assert ours["compiles"] == other["compiles"] == 1
    assert ours["rounds"] == len(ours["seconds"]) == 2
    assert ours["times_first"] == 1
    assert 0 < ours["min_seconds"] <= ours["median_seconds"]
    assert ours["share"] == pytest.approx(ours["flops"] / ours["min_seconds"] / ours["matrix_flops"])
    assert ours["peak_mib"] > ours["loaded_mib"] / 2 > 0


def test_a_worker_that_dies_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(
        benchmarks, "groups", lambda section, **_: {"x": [interleave.Rival("a", "smoothing", {"no": 1})]}
    )
    monkeypatch.setattr(benchmarks, "machine_rates", lambda dtypes: [])
    assert benchmarks.main(["smoothing", "--out", str(tmp_path / "b")]) == 2
    assert "the process of 'a' ended with status 1" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    assert benchmarks.main(["dense", "--model", "ViT-Z", "--out", str(tmp_path / "b")]) == 2
    assert "a model is one of" in capsys.readouterr().err
    assert benchmarks.main(["dense", "--torch-python", str(tmp_path / "no"), "--out", str(tmp_path / "b")]) == 2
    assert "--torch-python is an interpreter" in capsys.readouterr().err


def test_every_section_has_rivals_and_a_table():
    options = {"torch": "python", "dtypes": ["float32", "bfloat16"], "model": None, "batch": None, "images": 500}
    for section in cases.SECTIONS:
        quick, full = (cases.groups(section, quick=q, **options) for q in (True, False))
        assert set(quick) <= set(full)
        assert all(group[0].python is None for group in full.values())
    row = {"name": "ours", "min_seconds": 0.5, "median_seconds": 1.0, "rounds": 3, "images": 2, "times_first": 1.0}
    text = table.markdown({"machine": "here", "rates": [], "groups": {"dense": [row]}})
    assert "| ours | 0.5 | 1 | 3 | 1.00 | 4 |" in text


def test_labelling_and_its_bare_model(monkeypatch):
    """Both parts run, and count the same work."""
    monkeypatch.setattr(work, "variant", lambda _: CLIPConfig(ViTConfig(64, 32, 64, 1, 2, 128), TEXT, 48))
    whole, bare = (labelling.label(part, images=5, batch=2) for part in ("all", "bare"))
    whole.run()
    whole.run()  # nothing of the first is left to find
    bare.run()
    assert whole.flops == bare.flops > 0


@pytest.mark.parametrize(
    ("case", "asked", "wanted"),
    [
        (gpu.dense, "dense", {"model": "ViT-B/16", "batch": 8, "size": 512, "dtype": "bfloat16"}),
        (gpu.step, "train", {"backbone": "resnet101", "batch": 8, "size": 512, "dtype": "bfloat16"}),
    ],
)
def test_a_gpu_case_asks_for_what_it_is_called(monkeypatch, case, asked, wanted):
    """There is no GPU here, and the case is drawn by `work`: what it is asked for, by name."""
    for module in ("torch", "torch_worker"):
        monkeypatch.setitem(sys.modules, module, mock.MagicMock())
    signature = inspect.signature(getattr(work, asked))
    with mock.patch.object(work, asked) as drawn:
        runs, _ = case("ViT-B/16", 8, "bfloat16", False)
    assert "ours" in runs
    assert signature.bind(*drawn.call_args.args, **drawn.call_args.kwargs).arguments == wanted
