"""The teacher inside the step against the training-free pipeline's own matrices and refinement."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import CLASSES, config_of, dense, pretrained_clip, text_rows

from maskclip_jax.data.preprocess import interpolation_matrix
from maskclip_jax.distill.config import TeacherConfig
from maskclip_jax.distill.teacher import load_teacher, teacher_from
from maskclip_jax.encoders.config import Fidelity
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.segment import refine


def images_of(side, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def prepared(clip, images, side):
    x = (images / 255.0 - clip.preprocess.mean) / np.asarray(clip.preprocess.std)
    pad = side - images.shape[1]
    return jnp.asarray(np.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0))), jnp.float32)


@pytest.mark.parametrize("side", [32, 36])
def test_scores_of_a_vit(side):
    """Sides that are no multiple of the patch are padded, and the padding cropped away after upsampling."""
    clip = pretrained_clip()
    teacher, frozen = teacher_from(
        config_of(teacher=TeacherConfig(prompt_denoising=0.3, key_smoothing=1.0)), clip, text_rows()
    )
    images, rows = images_of(side), text_rows()[[1, 3]]
    padded = -(-side // 8) * 8
    features, keys = dense(clip, prepared(clip, images, padded))
    logits = np.einsum("bhwe,ce->bhwc", features, rows).reshape(2, -1, 2)
    logits = refine.prompt_denoising(logits, scale=10.0, threshold=0.3)
    p = np.exp(10.0 * logits) / np.exp(10.0 * logits).sum(-1, keepdims=True)
    smooth = np.asarray(refine.key_smoothing(p, keys)).reshape(2, padded // 8, padded // 8, 2)
    matrix = interpolation_matrix(padded // 8, padded)[:side]
    expected = np.einsum("hi,bijc,wj->bhwc", matrix, smooth, matrix)
    found = jax.jit(teacher.scores)(frozen.teacher, jnp.asarray(images), jnp.asarray(rows)).values
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(float(teacher.scale(frozen.teacher)), 10, rtol=1e-6)


def test_a_resnet_never_sees_the_padding():
    """48 px in a tower of multiple 32, stride 16: padded to 64 px, 3×3 positions are image, the fourth is masked."""
    clip = pretrained_clip("resnet")
    teacher, frozen = teacher_from(config_of(), clip, text_rows())
    images = images_of(48)
    found = jax.jit(teacher.scores)(frozen.teacher, jnp.asarray(images), jnp.asarray(text_rows())).values
    assert found.shape == (2, 48, 48, len(CLASSES))
    grid = jnp.full((2, 2), 3, jnp.int32)
    features = dense(clip, prepared(clip, images, 64), grid=grid).features
    logits = np.einsum("bhwe,ce->bhwc", features, text_rows())[:, :3, :3]
    matrix = interpolation_matrix(3, 48)
    expected = np.einsum("hi,bijc,wj->bhwc", matrix, logits, matrix)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_released_code_stretches():
    clip = pretrained_clip()
    config = dataclasses.replace(clip.config, fidelity=Fidelity(upsample="stretched"))
    clip = dataclasses.replace(clip, model=CLIP(config), config=config)
    teacher, frozen = teacher_from(config_of(), clip, text_rows())
    images = images_of(36)
    features = dense(clip, prepared(clip, images, 40)).features
    matrix = interpolation_matrix(5, 36)
    expected = np.einsum("hi,bije,ce,wj->bhwc", matrix, features, text_rows(), matrix)
    found = jax.jit(teacher.scores)(frozen.teacher, jnp.asarray(images), jnp.asarray(text_rows())).values
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_teacher_where_none_is_asked():
    for config in (config_of(mode="supervised"), config_of(labels_from="masks/")):
        teacher, frozen = teacher_from(config, pretrained_clip(), text_rows())
        assert teacher is None
        assert frozen.teacher == {}


def test_bfloat16_is_the_towers_alone():
    clip = pretrained_clip()
    teacher, _ = teacher_from(config_of(dtype="bfloat16"), clip, text_rows())
    assert (teacher.model.dtype, clip.model.dtype) == (jnp.dtype("bfloat16"), jnp.float32)


def test_the_activation_of_a_teacher_without_a_config():
    """`teacher.activation` goes before what the file says (here, its code) or what is assumed of bare weights."""
    folder = Path(__file__).parents[1] / "golden" / "torch_files"
    for asked, found in ((None, "quick_gelu"), ("gelu", "gelu")):
        config = config_of(teacher=TeacherConfig(model=str(folder / "openai_traced.pt"), activation=asked))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("maskclip_jax.distill.teacher.text_classifier", lambda *_: text_rows())
            teacher, _ = load_teacher(config)
        assert teacher.model.config.vision.activation == found
    with pytest.raises(UserError, match=r"teacher\.activation is one of None, quick_gelu, gelu, got relu"):
        TeacherConfig(activation="relu")


def test_a_teacher_of_another_method():
    """`teacher.method` reaches the tower: scores and features are NACLIP's, not MaskCLIP's."""
    clip, images = pretrained_clip(), images_of(32)
    teacher, frozen = teacher_from(config_of(teacher=TeacherConfig(method="naclip")), clip, text_rows())
    assert teacher.method == METHODS["naclip"]
    options = dataclasses.asdict(METHODS["naclip"])
    read = jax.jit(lambda v, x: clip.model.apply(v, x, method="encode_dense", **options))
    features = read(clip.variables, prepared(clip, images, 32)).features
    found = jax.jit(teacher.features)(frozen.teacher, jnp.asarray(images))
    np.testing.assert_allclose(found, features, atol=1e-5)
    assert np.abs(found - dense(clip, prepared(clip, images, 32)).features).max() > 1e-3
    matrix = interpolation_matrix(4, 32)
    expected = np.einsum("hi,bijc,wj->bhwc", matrix, np.einsum("bhwe,ce->bhwc", features, text_rows()), matrix)
    np.testing.assert_allclose(
        jax.jit(teacher.scores)(frozen.teacher, jnp.asarray(images), jnp.asarray(text_rows())).values,
        expected,
        atol=1e-5,
    )
    with pytest.raises(UserError, match="a method is one of maskclip"):
        TeacherConfig(method="slip")
