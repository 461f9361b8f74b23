"""Every full-size config of the paper: built, initialised in the abstract, and stepped once at a reduced size."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import SIDE, WIDTH, drawn, on_devices, pretrained_clip, quickly, text_rows

from experiments.configs import paper as paper_configs
from experiments.configs import scenes as distill_scenes
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.distill.config import DistillConfig, TeacherConfig
from maskclip_jax.distill.experiment import load_experiment
from maskclip_jax.distill.optimizer import descent_direction
from maskclip_jax.distill.pseudo_labels import training_annotation
from maskclip_jax.distill.step import TrainState, create_train_state, make_train_step
from maskclip_jax.distill.teacher import teacher_from
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import StudentConfig, create_student

ROOT = Path(__file__).resolve().parents[2]

NAMES = paper_configs.names()
STEPPED = ("voc20/zero_shot/r50", "cocostuff171/annotation_free/r50")
# A data set changes the number of classes (and in zero-shot, Context's background), a teacher the widths, which are
# reduced: these are a step of every kind.
KINDS = [name for name in NAMES if name.startswith("voc20/") and name.endswith("/r50") and name not in STEPPED]
KINDS += ["context59/zero_shot/r50"]
TEACHERS = {
    "r50": (ResNetConfig(image_size=224, width=64, layers=(3, 4, 6, 3), heads=32, dense_stride=32), 1024),
    "r50x16": (ResNetConfig(image_size=384, width=96, layers=(6, 8, 18, 8), heads=48, dense_stride=32), 768),
    "vit_b16": (ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072), 512),
}


def test_every_config_is_built_and_read_back():
    assert len(NAMES) == 63
    for name in NAMES:
        config = paper_configs.config(name)
        assert DistillConfig.from_dict(config.to_dict()) == config, name
    for name in paper_configs.TARGETS:
        assert name in NAMES


@pytest.mark.parametrize("name", ["voc20/zero_shot", "voc21/zero_shot/r50", "voc20/finetuned_mlp/vit_b16"])
def test_one_line_for_what_is_none(name):
    with pytest.raises(UserError, match="a paper config is one of") as error:
        paper_configs.config(name)
    assert "\n" not in str(error.value)


@functools.cache
def student_shapes(student: StudentConfig, classes: int) -> dict:
    text = jax.ShapeDtypeStruct((classes, student.width), jnp.float32)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return shapes_of(create_student(student), images, text)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplabv2", "deeplabv3plus"])
def test_students_of_full_size(head):
    """One abstract initialisation serves all configs with the same student: parameters know no classes but widths."""
    configs = [paper_configs.config(name) for name in NAMES]
    students = {dataclasses.replace(c.student_config, bn_axis_name=None) for c in configs if c.student.head == head}
    assert students
    for student in students:
        params = student_shapes(student, 20)["params"]
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
        assert 25e6 < count < 150e6, student


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_of_full_size(name):
    """Dense features of a crop as wide as the student's embedding, at full size in the abstract."""
    vision, width = TEACHERS[name]
    model = CLIP(CLIPConfig(vision, TextConfig(49408, 77, 512, 12, 8, 2048), width))
    side = vision.image_size
    shapes = shapes_of(model, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 77), jnp.int32))
    crop = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
    found = jax.eval_shape(functools.partial(model.apply, method="encode_dense"), shapes, crop)
    assert found.features.shape == (1, 512 // model.config.stride, 512 // model.config.stride, width)
    assert paper_configs.config(f"voc20/annotation_free/{name}").student.width == width


def reduced(config: DistillConfig) -> DistillConfig:
    """The same run with a student of a few thousand parameters and small crops."""
    student = dataclasses.replace(
        config.student, width=WIDTH, layers=(1, 1, 1, 1), base_width=4, expansion=2, rates=(1, 2), low_level_width=4
    )
    changes = {"student": student, "batch_size": 2, "crop_size": SIDE, "backbone_weights": None}
    return dataclasses.replace(config, teacher=TeacherConfig(), **changes)


@functools.cache
def tiny_clip():
    return pretrained_clip()


def prepared(config: DistillConfig):
    """(step, state, frozen, batch) of a reduced config."""
    teacher, frozen = teacher_from(config, tiny_clip(), text_rows(len(config.class_names)))
    student = create_student(config.student_config)
    variables = drawn(shapes_of(student, jnp.zeros((1, SIDE, SIDE, 3)), frozen.text))
    params = variables["params"]
    opt_state = jax.tree.map(np.asarray, descent_direction(config).init(params))
    rng = np.random.default_rng(0)
    labels = training_annotation(rng.integers(0, config.num_classes, (2, SIDE, SIDE)), config)
    batch = {"image": rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8), "label": labels}
    state = TrainState(np.int32(0), params, variables["batch_stats"], opt_state)
    return make_train_step(config, student, teacher), state, frozen, on_devices(batch)


def step_once(name: str) -> None:
    step, state, frozen, batch = prepared(reduced(paper_configs.config(name)))
    after, metrics = quickly(step, state, frozen, batch)(state, frozen, batch)
    assert int(after.step) == 1
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["loss"]) > 0
    assert float(metrics["leaked"]) == 0
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), after.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("name", STEPPED)
def test_a_step(name):
    step_once(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_every_other_kind(name):
    step_once(name)


def test_every_variant_of_the_scenes_is_built():
    text = distill_scenes.__doc__
    variants = "large refined large_resnet second_round zero_shot zero_shot_guided supervised ablation".split()
    variants += [f"ablation_{name}" for name in ("denoised", "raw", "feature", "resnet", "sclip", "psp", "v3plus")]
    for variant in [*variants, "finetuned_identity", "finetuned_linear", "finetuned_mlp"]:
        config = load_experiment(f"{ROOT / 'experiments' / 'configs' / 'scenes.py'}:{variant}")
        assert config.num_classes == 66
        assert variant in text


@pytest.mark.parametrize("variant", ["finetuned_mlp", "ablation_v3plus", "ablation_psp"])
def test_the_scenes_students_start_from_clips_tower(variant):
    """The weights that each variant names fit its student."""
    config = load_experiment(f"{ROOT / 'experiments' / 'configs' / 'scenes.py'}:{variant}")
    student, clip = create_student(config.student_config), load_clip("embedded-resnet").variables
    text = np.ones((66, 128), np.float32)
    state = create_train_state(config, student, text, jax.random.key(0), clip=clip)
    kernel = np.asarray(state.params["backbone"]["conv1"]["kernel"])
    np.testing.assert_allclose(kernel, clip["params"]["visual"]["stem"]["conv1"]["kernel"], atol=1e-3)
