"""The step: its loss and gradients against independent ones, its phases, its modes, and what it leaves alone.

In float64: what is compared then differs by no processor's rounding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import (
    SIDE,
    STUDENT,
    ZERO_SHOT,
    batch_of,
    compiled,
    dense,
    distance,
    drawn,
    on_devices,
    pretrained_clip,
    run_steps,
    seen_annotation,
    text_rows,
)
from tiny_distill import config_of as float32_config

from maskclip_jax.data.preprocess import interpolation_matrix
from maskclip_jax.distill.losses import LossSum
from maskclip_jax.distill.step import (
    Tally,
    _accumulate,
    create_train_state,
    make_eval_step,
)
from maskclip_jax.distill.teacher import normalise
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.students import create_student

config_of = functools.partial(float32_config, dtype="float64")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def upsampled(x, side=SIDE):
    matrix = interpolation_matrix(x.shape[1], side)
    return np.einsum("hi,bijc,wj->bhwc", matrix, np.asarray(x, np.float64), matrix)


@functools.cache
def student_logits(config):
    """The student's training forward pass, on one device and without any axis."""
    student = create_student(dataclasses.replace(config.student_config, bn_axis_name=None))
    mean, std = config.image_mean, config.image_std

    @jax.jit
    def forward(state, images, text):
        x = normalise(images, mean, std, config.dtype)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return student.apply(variables, x, text, train=True, mutable=["batch_stats"])

    return forward


def by_hand(config, state, frozen, batch):
    """Loss and labels of one step, written out in NumPy around the two networks."""
    clip = pretrained_clip()
    x = normalise(jnp.asarray(batch["image"]), clip.preprocess.mean, clip.preprocess.std, config.dtype)
    model = CLIP(clip.config, jnp.dtype(config.dtype))
    features = dense(dataclasses.replace(clip, model=model, variables=frozen.teacher), x).features
    teacher = upsampled(np.einsum("bhwe,ce->bhwc", features, text_rows()[[1, 3]]))  # cat and sky
    teacher = np.array([2, 4])[teacher.argmax(-1)]  # behind the background
    labels = np.where(batch["label"] == 254, teacher, batch["label"])
    logits, updates = student_logits(config)(state, batch["image"], frozen.text)
    z = upsampled(logits)
    log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    counted = labels < 254
    losses = -np.take_along_axis(log_p, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return {
        "loss": losses[counted].mean(),
        "accuracy": (z.argmax(-1) == labels)[counted].mean(),
        "labelled": counted.mean(),
        "pseudo": (batch["label"] == 254).mean(),
        "leaked": 0.0,
        "phase": 1.0,
        "learning_rate": config.learning_rate,
    }, updates["batch_stats"]


def test_one_step_against_numpy():
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    batch = seen_annotation(config)
    after, metrics = step(state, frozen, on_devices(batch))
    expected, batch_stats = by_hand(config, state, frozen, batch)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)  # shares are float32
    assert distance(after.batch_stats, batch_stats) < 1e-10
    assert distance(after.batch_stats, state.batch_stats) > 1e-2
    assert int(after.step) == 1


def test_the_state_given_is_used_up_but_for_what_is_still_looked_at():
    """A NumPy view, as a checkpoint that is being written holds one, is not written over."""
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    batch = on_devices(seen_annotation(config))
    first, _ = step(state, frozen, batch)
    views = jax.tree.map(np.asarray, first)
    kept = jax.tree.map(np.copy, views)
    second, _ = step(first, frozen, batch)
    assert distance(second.params, views.params) > 1e-4
    assert distance(kept, views) == 0
    third, _ = step(second, frozen, batch)
    assert all(array.is_deleted() for array in jax.tree.leaves(second))
    assert not any(array.is_deleted() for array in jax.tree.leaves(third))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(second.step)


def test_gradients_against_finite_differences():
    """The first step moves by -lr (g + λp), so it tells g; the slope of the loss along a direction must be g · d."""
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    batch = on_devices(seen_annotation(config))
    after, _ = step(state, frozen, batch)
    gradient = jax.tree.map(
        lambda p, q: (np.asarray(p) - q) / config.learning_rate - config.weight_decay * np.asarray(p),
        state.params,
        after.params,
    )
    moved = jax.jit(lambda params, along, by: jax.tree.map(lambda p, d: p + by * d, params, along))
    for seed in (5, 6):
        rng = np.random.default_rng(seed)
        size = lambda g: np.sqrt((np.asarray(g) ** 2).mean())  # noqa: E731
        # half along the gradient, half at random: the slope is then neither tiny nor the trivial one
        direction = jax.tree.map(lambda g: np.asarray(g + size(g) * rng.normal(size=g.shape)), gradient)  # noqa: B023
        length = np.sqrt(sum(float((d**2).sum()) for d in jax.tree.leaves(direction)))
        slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        epsilon = 1e-7 / length  # small, for ReLUs turn at every larger step
        losses = [
            float(step(state._replace(params=moved(state.params, direction, sign * epsilon)), frozen, batch)[1]["loss"])
            for sign in (1, -1)
        ]
        np.testing.assert_allclose((losses[0] - losses[1]) / (2 * epsilon), slope, rtol=1e-5)


def test_phases_change_at_guided_steps_and_the_teacher_then_falls_silent():
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    batch = on_devices(seen_annotation(config))
    other = frozen._replace(teacher=drawn(frozen.teacher, seed=9))
    for at, phase in ((0, 1), (1, 1), (2, 2), (9, 2)):
        start = state._replace(step=np.int32(at))
        _, metrics = step(start, frozen, batch)
        _, otherwise = step(start, other, batch)
        assert metrics["phase"] == phase
        assert (float(metrics["loss"]) != float(otherwise["loss"])) == (phase == 1)
    # in phase 2 the student is right about all that it labels itself, unless upsampling is not the same
    everything_unlabelled = on_devices(batch_of(config))
    _, metrics = step(state._replace(step=np.int32(2)), frozen, everything_unlabelled)
    logits = upsampled(student_logits(config)(state, everything_unlabelled["image"][0], frozen.text)[0])
    own = np.asarray(config.unseen_labels)[logits[..., list(config.unseen_labels)].argmax(-1)]
    inside = everything_unlabelled["label"][0] == 254
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == own)[inside].mean())


def test_a_leak_is_counted():
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    batch = seen_annotation(config)
    batch["label"][2, 3, :5] = config.unseen_labels[1]
    assert step(state, frozen, on_devices(batch))[1]["leaked"] == 5


def test_nothing_labelled_leaves_only_decay():
    config = config_of(**ZERO_SHOT)
    frozen, state, step = compiled(config)
    after, metrics = step(state, frozen, on_devices(batch_of(config, label=255)))
    assert metrics["loss"] == metrics["labelled"] == 0
    shrunk = jax.tree.map(lambda p: p * (1 - config.learning_rate * config.weight_decay), state.params)
    assert distance(after.params, shrunk) < 1e-12


def test_the_teacher_is_not_in_the_state():
    config = config_of(**ZERO_SHOT)
    frozen, state, _ = compiled(config)
    assert jax.tree.leaves(frozen.teacher)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert not any("visual" in name or "logit_scale" in name or "folded" in name for name in names)
    mine = {id(leaf) for leaf in jax.tree.leaves(state)}
    assert not mine & {id(leaf) for leaf in jax.tree.leaves(frozen)}
    assert "text" not in frozen.teacher["params"]  # no step embeds text


def test_evaluation_counts_and_changes_nothing():
    config = config_of(**ZERO_SHOT)
    frozen, state, _ = compiled(config)
    state = state._replace(step=np.int32(1))
    student = create_student(config.student_config)
    batch = on_devices(seen_annotation(config))
    before = jax.tree.map(np.array, state)
    confusion = make_eval_step(config, student)(state, frozen, batch["image"], batch["label"])
    assert distance(before, state) == 0
    assert int(state.step) == 1
    labels = batch["label"][0]
    images = normalise(jnp.asarray(batch["image"][0]), config.image_mean, config.image_std, config.dtype)
    logits = jax.jit(student.apply)(
        {"params": state.params, "batch_stats": state.batch_stats}, images, jnp.asarray(frozen.text)
    )
    expected = confusion_matrix(np.where(labels > 5, 255, labels), upsampled(logits).argmax(-1), 6)
    np.testing.assert_array_equal(confusion, expected)
    assert np.asarray(confusion).sum() == (labels < 6).sum()


def test_labels_made_before_are_the_same_labels():
    """A folder of masks in place of the teacher: what the step sees is what the folder says."""
    config = config_of(labels_from="masks/")
    batch = batch_of(config)
    pseudo = np.random.default_rng(3).choice(np.array([0, 1, 2, 3, 4, 255]), batch["label"].shape).astype(np.int32)
    frozen, state, step = compiled(config)
    assert frozen.teacher == {}
    after, metrics = step(state, frozen, on_devices(batch | {"pseudo": pseudo}))
    as_annotated, same = step(
        state, frozen, on_devices({**batch, "label": np.where(batch["label"] == 254, pseudo, 255), "pseudo": pseudo})
    )
    assert distance(after.params, as_annotated.params) == 0
    assert metrics["pseudo"] == metrics["labelled"] == same["labelled"] > same["pseudo"] == 0


def test_accumulation_is_the_large_batch():
    """The same images in both halves (batch statistics agree), unequal label counts (a mean of means would differ)."""
    config = config_of(mode="supervised")
    batch = seen_annotation(config)
    half = config.batch_size // 2
    batch["image"][half:] = batch["image"][:half]
    batch["label"] = np.where(batch["label"] == 254, 255, batch["label"])
    batch["label"][half:, :20] = 255
    whole, whole_metrics = run_steps(config, [batch])
    summed, metrics = run_steps(dataclasses.replace(config, accumulate=2), [batch])
    start = compiled(config)[1]
    assert distance(whole.params, start.params) > 1e-2
    assert distance(whole.params, summed.params) < 1e-10
    assert int(summed.step) == 1
    for name, value in whole_metrics[0].items():
        np.testing.assert_allclose(metrics[0][name], value, rtol=1e-10)
    # two micro-batches take two steps of the running statistics
    assert distance(whole.batch_stats, summed.batch_stats) > 1e-2


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_both_ways_to_accumulate(backend, monkeypatch):
    """Unrolled on CPU, a loop elsewhere: sums over the parts, statistics from one to the next, parts numbered."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def forward_backward(stats, part, index):
        total = part["x"].sum() * (1 + index)
        return total * 10, stats / 2 + index, Tally(LossSum(total, stats), *[total] * 5)

    batch = {"x": jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}
    grads, stats, tally = jax.jit(lambda s: _accumulate(forward_backward, s, batch, 3))(jnp.asarray(8.0))
    # totals 3·1, 7·2, 11·3; statistics 8 -> 4 -> 3 -> 3.5
    assert (float(grads), float(stats), float(tally.loss.total), float(tally.loss.count)) == (500, 3.5, 50, 15)


def test_a_student_of_another_width():
    config = config_of(student=dataclasses.replace(STUDENT, width=16))
    with pytest.raises(UserError, match="width 16"):
        create_train_state(config, create_student(config.student_config), text_rows(), jax.random.key(0))
