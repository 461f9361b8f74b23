"""The step's other modes and students: feature distillation, bfloat16, finetuned CLIP with its mappers, other heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import (
    CLASSES,
    STUDENT,
    VISION,
    ZERO_SHOT,
    batch_of,
    compiled,
    config_of,
    dense,
    distance,
    on_devices,
    pretrained_clip,
    quickly,
    run_steps,
    seen_annotation,
    setup,
    text_rows,
)

from maskclip_jax.distill.config import TeacherConfig
from maskclip_jax.distill.step import create_train_state, make_train_step
from maskclip_jax.distill.teacher import teacher_from
from maskclip_jax.students import create_student

LEARNED = dataclasses.replace(STUDENT, classifier="learned", num_classes=len(CLASSES))


def test_feature_distillation_trains_the_student():
    """The released code detaches the student's features in this loss, which then trains nothing."""
    config = config_of(mode="feature", weight_decay=0.0)
    batch = batch_of(config)
    state, metrics = run_steps(config, [batch] * 4)
    before = compiled(config)[1]
    for part in ("backbone", "head"):
        moved = [float(np.abs(a - b).max()) for a, b in zip(
            *(jax.tree.leaves(s.params[part]) for s in (state, before)), strict=True
        )]  # fmt: skip
        assert min(moved) > 0  # every array of it
    losses = [values["loss"] for values in metrics]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    clip = pretrained_clip()
    x = (batch["image"] / 255.0 - clip.preprocess.mean) / np.asarray(clip.preprocess.std)
    teacher = dense(clip, jnp.asarray(x, jnp.float32)).features
    np.testing.assert_allclose(np.linalg.norm(teacher, axis=-1), 1, rtol=1e-5)


def test_bfloat16_computes_and_float32_keeps():
    """Also the supervised student with a classifier of its own."""
    config = config_of(mode="supervised", student=LEARNED, dtype="bfloat16")
    batch = seen_annotation(config)
    state, metrics = run_steps(config, [batch] * 2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    assert 0 < metrics[1]["loss"] < metrics[0]["loss"] < 4
    assert "conv_seg" in state.params["classifier"]


CLIP_STUDENT = dataclasses.replace(
    STUDENT, stem="clip", layers=VISION["resnet"].layers, base_width=VISION["resnet"].width, expansion=4
)


@pytest.mark.slow
def test_finetuned_clip_starts_from_clip_and_learns_seen_classes_only():
    config = config_of(mode="finetuned-clip", unseen=("cat", "sky"), mapper="linear", student=CLIP_STUDENT)
    clip = pretrained_clip("resnet")
    teacher, frozen = teacher_from(config, clip, text_rows())
    assert teacher is None
    student = create_student(config.student_config)
    key = jax.random.key(0, impl="rbg")  # compiles three times faster here
    state = create_train_state(config, student, frozen.text, key, clip=clip.variables)
    tower = clip.variables["params"]["visual"]
    np.testing.assert_array_equal(state.params["backbone"]["layer4_0"]["conv2"]["kernel"],
                                  tower["layer4_0"]["conv2"]["kernel"])  # fmt: skip
    np.testing.assert_array_equal(state.params["backbone"]["conv1"]["kernel"], tower["stem"]["conv1"]["kernel"])
    np.testing.assert_array_equal(
        state.batch_stats["backbone"]["bn1"]["mean"], clip.variables["batch_stats"]["visual"]["stem"]["bn1"]["mean"]
    )
    batch = seen_annotation(config)
    batch["label"] = np.where(batch["label"] == 254, 255, batch["label"])
    step = quickly(make_train_step(config, student, None), state, frozen, on_devices(batch))
    after, metrics = step(jax.tree.map(jnp.copy, state), frozen, on_devices(batch))
    for part in ("backbone", "head", "classifier"):
        assert distance(after.params[part], state.params[part]) > 1e-4
    # unseen classes take no part: whatever their embeddings are, the loss and the step are the same
    text = np.array(frozen.text)
    text[list(config.unseen_labels)] *= -50
    otherwise, same = step(jax.tree.map(jnp.copy, state), frozen._replace(text=text), on_devices(batch))
    assert distance(after.params, otherwise.params) == 0
    assert metrics["loss"] == same["loss"]
    step(state, frozen, on_devices(batch))
    assert jax.tree.leaves(state)[-1].is_deleted()
    assert np.isfinite(tower["stem"]["conv1"]["kernel"]).all()  # the CLIP it came from is still there


@pytest.mark.parametrize("mapper", ["identity", "mlp"])
def test_other_mappers(mapper):
    config = config_of(mode="finetuned-clip", unseen=("cat",), mapper=mapper, student=CLIP_STUDENT)
    _, frozen, student, state = setup(config)
    assert ("hidden" in state.params.get("classifier", {}).get("mapper", {})) == (mapper == "mlp")
    after, metrics = jax.eval_shape(make_train_step(config, student, None), state, frozen, on_devices(batch_of(config)))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("head", ["deeplabv3plus", "pspnet"])
def test_other_heads_and_background(head):
    student = dataclasses.replace(STUDENT, head=head, rates=None)
    config = config_of(
        **ZERO_SHOT, student=student, accumulate=2, conf_thresh=0.4, teacher=TeacherConfig(key_smoothing=1.0)
    )
    teacher, frozen, student, state = setup(config)
    assert state.params["classifier"]["background"].shape == (1, STUDENT.width)
    after, _ = jax.eval_shape(make_train_step(config, student, teacher), state, frozen, on_devices(batch_of(config)))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
