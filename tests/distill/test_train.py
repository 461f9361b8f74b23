"""The loop: what a run writes, exact resume after a crash and after Ctrl-C, and its one-line stops."""

import argparse
import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import pretrained_clip, text_rows
from tiny_run import arrays_of, failing_at, same, shared_step, train

from maskclip_jax.cli import common, run_command
from maskclip_jax.data.images import read_label_png
from maskclip_jax.data.sources import open_source
from maskclip_jax.distill import is_run
from maskclip_jax.distill import train as loop
from maskclip_jax.distill.checkpoint import Checkpoints
from maskclip_jax.distill.devices import unpack
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.predict import iter_student_segmentations
from maskclip_jax.distill.run_folder import read_config
from maskclip_jax.distill.run_log import read_metrics
from maskclip_jax.distill.student_folder import load_student
from maskclip_jax.distill.teacher import teacher_from
from maskclip_jax.distill.train import train_and_evaluate
from maskclip_jax.errors import UserError
from maskclip_jax.ops import hosts


def test_what_a_run_writes(whole):
    config, workdir, state = whole
    assert read_config(workdir) == config
    assert is_run(workdir)
    assert int(state[".step"]) == 8
    records = read_metrics(workdir)
    losses = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
    assert [step for step, _ in losses] == list(range(1, 9))
    assert losses[-1][1] < losses[0][1]
    scores = [r for r in records if "eval/mIoU" in r]
    assert [r["step"] for r in scores] == [4, 8]
    assert len(scores[0]["eval/per_class"]) == 5
    assert json.loads((workdir / "scores.json").read_text())["mIoU"] == pytest.approx(scores[-1]["eval/mIoU"])
    events = list((workdir / "events").iterdir())
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()
    assert b"eval/mIoU" in events[0].read_bytes()


def test_a_finished_run_is_left_alone(whole):
    config, workdir, state = whole
    again = train(config, workdir, wrap=lambda step: None)  # there is no step to take
    same(arrays_of(again), state)


def test_the_trained_student_comes_back(whole, caplog):
    config, workdir, state = whole
    latest = load_student(workdir, "latest")
    assert not caplog.records  # orbax has nothing to say to who reads
    assert latest.step == 8
    for part in ("params", "batch_stats"):
        same(arrays_of(latest.variables[part]), arrays_of_part(state, part))
    scores = evaluate_student(config, latest.variables, latest.text, open_source(config.eval_data))
    records = [r for r in read_metrics(workdir) if "eval/mIoU" in r]
    assert 100 * scores.mean_iou == pytest.approx(records[-1]["eval/mIoU"], rel=1e-6)
    best = max(records, key=lambda r: r["eval/mIoU"])
    assert load_student(workdir, "best").step == best["step"]
    with pytest.raises(UserError, match="got 3: choose one of them"):
        load_student(workdir, 3)


@pytest.mark.parametrize(
    ("asked", "step", "words"),
    [
        (None, 8, "step 8 of 8, the latest"),
        ("latest", 8, "step 8 of 8, the latest"),
        (4, 4, "step 4 of 8, as asked for"),
        ("best", None, "which chose it"),
    ],
)
def test_commands_take_the_latest_unless_asked_otherwise(whole, capsys, asked, step, words):
    """What the evaluation data chose must say so: its score on these data is too good."""
    config, workdir, _ = whole
    trained = common.load_run(argparse.Namespace(model=str(workdir), checkpoint=asked))
    said = capsys.readouterr().out
    assert words in said
    assert said.count("\n") == 1
    assert step in (None, trained.step)
    if asked == "best":
        records = [r for r in read_metrics(workdir) if "eval/mIoU" in r]
        assert trained.step == max(records, key=lambda r: r["eval/mIoU"])["step"]
        assert config.eval_data in said


def test_a_checkpoint_of_what_is_no_run():
    for text, value in (("latest", "latest"), ("best", "best"), ("0400", 400)):
        assert common.checkpoint(text) == value
    for text in ("newest", "-1", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="latest, best, or a step, not"):
            common.checkpoint(text)
    with pytest.raises(UserError, match="--checkpoint chooses among a run's, but embedded is no run"):
        common.load_model(argparse.Namespace(model="embedded", checkpoint="best"))


def arrays_of_part(state, part):
    prefix = f".{part}"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def test_a_run_starts_from_another_runs_student(whole, tmp_path, monkeypatch, capsys):
    config, workdir, state = whole
    seen = {}

    def look(_, state, *rest):
        seen.update(arrays_of(unpack(state)))
        raise RuntimeError("seen")

    monkeypatch.setattr(loop, "make_train_step", lambda *_: failing_at(1, look)(None))
    loaded = teacher_from(config, pretrained_clip(), text_rows())
    config = dataclasses.replace(config, init_from=str(workdir))
    with pytest.raises(RuntimeError, match="seen"):
        train_and_evaluate(config, tmp_path / "next", loaded=loaded)
    assert f"starts from {workdir}: 8 steps" in capsys.readouterr().err
    assert seen[".step"] == 0
    for part in ("params", "batch_stats"):
        same(*(arrays_of_part(found, part) for found in (seen, state)))
    bad = {"init_from": str(tmp_path / "nobody")}, {"image_mean": (0.5, 0.5, 0.5)}
    for changes, words in zip(bad, ("nobody", "set image_mean to the first"), strict=True):
        with pytest.raises(UserError, match=words):
            train_and_evaluate(dataclasses.replace(config, **changes), tmp_path / "last", loaded=loaded, quiet=True)
        assert not (tmp_path / "last").exists()


def test_a_crash_costs_nothing(whole, tmp_path):
    """Killed after step 6 (last checkpoint 4, metrics up to 5): the rest of the run is the uninterrupted one."""
    config, workdir, state = whole

    def crash(*_):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(config, tmp_path, wrap=failing_at(6, crash))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    same(arrays_of(train(config, tmp_path)), state)
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(whole, tmp_path):
    config, _, state = whole

    def interrupted(compiled, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return compiled(*arguments)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, wrap=failing_at(3, interrupted))
    assert signal.getsignal(signal.SIGINT) is before
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == 3
    same(arrays_of(train(config, tmp_path)), state)


def test_sigterm_in_an_evaluation_loses_nothing(whole, tmp_path, monkeypatch):
    """The checkpoint is there already; the run goes on with the evaluation, and its score is the checkpoint's."""
    config, workdir, state = whole

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_student(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_student", interrupted)
        with pytest.raises(KeyboardInterrupt, match="in the evaluation after step 4, checkpoint written"):
            train(config, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.latest, checkpoints.score(4)) == (4, None)
    same(arrays_of(train(config, tmp_path)), state)
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()
    with Checkpoints(tmp_path, read_only=True) as checkpoints, Checkpoints(workdir, read_only=True) as others:
        assert checkpoints.best == others.best
        assert [checkpoints.score(step) for step in (4, 8)] == [others.score(step) for step in (4, 8)]
        assert checkpoints.score(8) is not None


def test_a_student_labels_a_corpus(whole, tmp_path):
    """`label --model RUN` writes the masks that `segment` finds, mends them, and refuses options of a CLIP."""
    config, workdir, _ = whole
    arguments = [
        "label",
        config.train_data,
        "--model",
        str(workdir),
        "--out",
        str(tmp_path / "out"),
        "--batch-size",
        "2",
    ]
    for _ in range(2):
        assert run_command(arguments) == 0
        images = [open_source(config.train_data)[i].image for i in range(11)]
        found = list(iter_student_segmentations(images, load_student(workdir), batch_size=2))
        for i, segmentation in enumerate(found):
            labels = read_label_png(tmp_path / "out" / "labels" / f"{i:06d}.png")
            assert (labels == segmentation.labels).mean() > 0.99
        assert len(np.unique([s.labels for s in found])) > 1
        (tmp_path / "out" / "labels" / "000003.png").write_bytes(b"")
    settings = json.loads((tmp_path / "out" / "label.json").read_text())
    assert settings["classes"] == list(config.label_names)
    assert run_command([*arguments, "--classes", "dog, cat"]) == 2
    assert run_command([*arguments, "--features"]) == 2


def times(state, factor):
    """A state, however it is packed, whose numbers are none any more; its step counter is left."""
    return jax.tree.map(lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


@pytest.mark.parametrize("log_every", [1, 8])
def test_a_loss_that_is_no_number_stops(whole, tmp_path, log_every):
    """However rarely metrics are read: before a checkpoint is written."""
    config, _, _ = whole
    compiled = shared_step(config)

    def poisoned(compiled, state, frozen, batch):
        return compiled(times(state, np.nan), frozen, batch)

    wanted = r"the loss \(nan\) is not at step 7 .*the last good checkpoint is step 6 in .*lower learning_rate"
    rarely = dataclasses.replace(config, log_every=log_every)
    with pytest.raises(UserError, match=wanted) as error:
        train(rarely, tmp_path, wrap=lambda _: failing_at(7, poisoned)(compiled))
    assert "\n" not in str(error.value)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest == 6


def test_parameters_that_are_no_numbers_are_not_saved(whole, tmp_path):
    """The loss of step 4 is still fine; what the step made of the parameters is not."""
    config, _, _ = whole

    def poisoned(compiled, state, frozen, batch):
        state, metrics = compiled(state, frozen, batch)
        return times(state, np.inf), metrics

    with pytest.raises(UserError, match=r"a parameter is not at step 4 .*checkpoint is step 2"):
        train(config, tmp_path, wrap=failing_at(4, poisoned))


def test_leaked_annotation_stops(whole, tmp_path):
    config, _, _ = whole

    def leaking(compiled, *arguments):
        state, metrics = compiled(*arguments)
        return state, metrics | {"leaked": metrics["leaked"] + 12}

    with pytest.raises(UserError, match="refuse to train: at step 1 the annotation holds 12 pixels"):
        train(config, tmp_path, wrap=failing_at(1, leaking))


def test_bfloat16_on_a_cpu_is_refused(whole, tmp_path):
    slow = dataclasses.replace(whole[0], dtype="bfloat16")
    with pytest.raises(UserError, match=r"bfloat16 is for training on a GPU or TPU, .* train with dtype=float32"):
        train_and_evaluate(slow, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"MASKCLIP_HOSTS": "2"}, "MASKCLIP_COORDINATOR, MASKCLIP_HOST is missing"),
        ({"MASKCLIP_COORDINATOR": "a:1", "MASKCLIP_HOSTS": "two", "MASKCLIP_HOST": "0"}, "whole numbers"),
        ({"MASKCLIP_COORDINATOR": "a:1", "MASKCLIP_HOSTS": "2", "MASKCLIP_HOST": "2"}, r"is 0\.\.1, got 2"),
    ],
)
def test_hosts_that_cannot_be(variables, why):
    with pytest.raises(UserError, match=why):
        hosts.join_hosts(variables)


def test_one_host_needs_no_others():
    hosts.join_hosts({})
    hosts.join_hosts({"MASKCLIP_COORDINATOR": "a:1", "MASKCLIP_HOSTS": "1", "MASKCLIP_HOST": "0"})
    assert hosts.is_first_host()
    assert hosts.any_host(True)
    assert not hosts.any_host(False)
    counts = np.array([[2**40, 1]])
    np.testing.assert_array_equal(hosts.sum_over_hosts(counts), counts)
