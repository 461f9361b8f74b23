"""A student sees its images alone, whatever lies beside them in a padded batch: every head and stem."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import STUDENT, drawn

from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import create_student

SIZES = np.array([(45, 61), (64, 72), (50, 33)], np.int32)
CASES = [
    ("deeplabv2", "v1c", 8, {}),
    ("deeplabv2", "clip", 8, {}),
    ("deeplabv2", "clip", 16, {"decoder_width": 4}),
    ("deeplabv3plus", "clip", 16, {}),
    ("pspnet", "v1", 32, {}),
]


@pytest.mark.parametrize(("head", "stem", "stride", "more"), CASES)
def test_logits_of_a_padded_batch_are_those_of_each_image_alone(head, stem, stride, more):
    """In float64, with noise for padding: what is not masked shows."""
    with jax.enable_x64(True):
        fields = {"head": head, "stem": stem, "output_stride": stride, "rates": None, "dtype": "float64"} | more
        config = dataclasses.replace(STUDENT, **fields)
        student, text = create_student(config), np.eye(config.width)[:5]
        rng = np.random.default_rng(0)
        images, text = jnp.asarray(rng.normal(size=(3, 64, 72, 3))), jnp.asarray(text)
        variables = drawn(shapes_of(student, images, text))
        logits = jax.jit(lambda *arrays, sizes=None: student.apply(*arrays, sizes=sizes))
        padded, unmasked = (
            np.asarray(logits(variables, images, text, sizes=sizes)) for sizes in (SIZES, np.full_like(SIZES, (64, 72)))
        )
        rows, columns = map(config.cells, SIZES[0].tolist())
        alone = np.asarray(logits(variables, images[:1, :45, :61], text))[0]
        assert alone.shape[:2] == (rows, columns)
        assert padded.shape[1:3] == tuple(map(config.cells, (64, 72)))
        assert np.ptp(alone) > 0.1
        np.testing.assert_allclose(padded[0, :rows, :columns], alone, atol=1e-10)
        assert np.abs(unmasked[0, :rows, :columns] - alone).max() > 1e-3  # without masks it is seen
