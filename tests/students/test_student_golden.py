"""The students against the released PyTorch code: stages, features and logits of the same weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import StudentConfig, create_student
from maskclip_jax.students.weights import convert_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"width": 32, "backbone": "resnet50", "base_width": 8, "classifier": "learned", "num_classes": 5}
CASES = {
    "deeplabv2": ("official_deeplabv2_tiny.npz", "head", {}),
    "deeplabv3plus": ("official_deeplabv3plus_psp_tiny.npz", "deeplabv3plus", {"low_level_width": 12}),
    "pspnet": ("official_deeplabv3plus_psp_tiny.npz", "psp", {}),
}


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.fixture(params=CASES)
def golden(request):
    """The head's name, its arrays, the student, its converted variables."""
    file, prefix, options = CASES[request.param]
    with np.load(GOLDEN / file) as archive:
        arrays = dict(archive)
    state = {}
    for key, value in arrays.items():
        part, _, name = key.partition("/")
        if part == "backbone":
            state[f"backbone.{name}"] = value
        elif part == prefix:
            state[f"decode_head.{name}"] = value
    student = create_student(StudentConfig(head=request.param, **TINY, **options))
    ours = shapes_of(student, nhwc(arrays["image_nchw"]))
    return prefix, arrays, student, convert_state_dict(state, ours, ("backbone", "head", "classifier"))


def test_matches_the_released_code(golden):
    prefix, arrays, student, variables = golden
    images = nhwc(arrays["image_nchw"])
    compared = 0

    def run(variables, images):
        """Stages, features, logits: one program, so that what they share is compiled once."""
        stages = student.apply(variables, images, method="stages")
        return stages, student.apply(variables, images, method="features"), student.apply(variables, images)

    with jax.default_matmul_precision("highest"):
        stages, features, logits = jax.jit(run)(variables, images)
        for i, stage in enumerate(stages, start=1):
            if f"stage{i}_nchw" in arrays:
                assert_close(stage, nhwc(arrays[f"stage{i}_nchw"]))
                compared += 1
        for name in ("features_nchw" if prefix == "head" else f"{prefix}_features_nchw",):
            if name in arrays:
                assert_close(features, nhwc(arrays[name]))
                compared += 1
        if f"{prefix}_logits_nchw" in arrays:
            assert_close(logits, nhwc(arrays[f"{prefix}_logits_nchw"]))
            compared += 1
    assert compared == {"head": 5, "deeplabv3plus": 2, "psp": 1}[prefix]


@pytest.mark.parametrize("scene", ["square", "wide"])
def test_clip_stem_matches_the_released_clip_resnet(scene):
    with np.load(GOLDEN / "official_rn_tiny.npz") as archive:
        arrays = dict(archive)
    state = {key.removeprefix("w/"): value for key, value in arrays.items() if key.startswith("w/")}
    config = StudentConfig(width=8, backbone="resnet50", base_width=8, stem="clip", output_stride=32)
    student = create_student(config)
    images = nhwc(arrays[f"{scene}/image_nchw"])
    variables = shapes_of(student, images, jnp.ones((2, 8)))
    converted = convert_state_dict(state, variables)
    backbone = {collection: {"backbone": tree["backbone"]} for collection, tree in converted.items()}
    with jax.default_matmul_precision("highest"):
        stages = jax.jit(lambda v, x: student.apply(v, x, method="stages"))(backbone, images)
    assert_close(stages.stage4, nhwc(arrays[f"{scene}/stage4_nchw"]))
