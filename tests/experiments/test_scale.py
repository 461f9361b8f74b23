"""The figures of docs/scale.md: operations by hand, the bottleneck where it must be, the document as generated."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments.tables import scale
from maskclip_jax import cli
from maskclip_jax.distill.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[2]

MEASURED = {"decode": 0.004, "resize": 0.006, "call": 3e-5, "encode": 0.002, "mask bytes": 4000.0}


def test_operations_of_the_tower_by_hand():
    """ViT-B/16 at 224²: the whole tower is 35.1 G with all of its last block (17.6 G multiply-adds, as published)."""
    job = scale.Job(height=224, width=224, short_side=224, classes=1)
    tokens = 14 * 14
    left_out = 4 * 768**2 * tokens + 4 * tokens**2 * 768  # q, k and attention of the last block
    assert job.grid == (14, 14)
    assert scale.tower_operations(job) + left_out == pytest.approx(35.1e9, rel=0.02)


def test_grid_and_tiles_of_a_photo():
    job = scale.Job()
    assert job.grid == (32, 43)
    assert job.tiles == 12  # 480 / 128 = 4 rows, 640 / 256 = 3 columns


def test_the_slowest_stage_is_found():
    slow_disk = dataclasses.replace(scale.Pod(), storage=1e9)
    assert "Bottleneck: **images from storage**, 44.4 hours." in scale.table(MEASURED, pod=slow_disk)
    fast_chips = dataclasses.replace(scale.Pod(), share=10.0)
    hours = scale.stages(scale.Job(), fast_chips, MEASURED)
    assert hours["decode, resize (all vCPUs)"] == pytest.approx(1e9 * 0.01 / 64 / 112 / 3600)
    assert hours["calls of the tiles' program, 1 process a host"] == pytest.approx(1e9 * 12 * 3e-5 / 64 / 3600)


def test_the_document_holds_the_figures_of_the_results():
    text = scale.DOC.read_text()
    assert scale.with_table(text, scale.table(json.loads(scale.RESULTS.read_text()))) == text


def test_commands_of_the_document_are_commands():
    """Every `run.py label` and `run.py distill` there, its line breaks joined, is understood."""
    text = scale.DOC.read_text().replace("\\\n", " ")
    commands = re.findall(r"run\.py ((?:label|distill) [^\n]*?)(?: > |\"\n|\n)", text)
    assert len(commands) == 4
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', re.sub(r"\$\(\([^)]*\)\)|\$\w+", "3", command))
        args = cli.build_parser().parse_args([word.strip('"') for word in words])
        assert args.out
        if args.command == "distill":
            config = load_experiment(str(ROOT / args.experiment), args.set)
            assert config.labels_from == "data"
            assert config.per_device(16) == 1
