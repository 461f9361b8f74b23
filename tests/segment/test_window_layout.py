"""Window geometry, and two matrices against windows stitched pixel by pixel."""

import numpy as np
import pytest

from maskclip_jax.data.preprocess import interpolation_matrix, upsample_matrix
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import MOST_OVERLAP, Options
from maskclip_jax.segment.pixels import CELLS
from maskclip_jax.segment.windows import axis_windows, side_by_side, window_matrix


def test_the_last_window_ends_at_the_border():
    assert axis_windows(512, 224, 112) == ((0, 112, 224, 288), 224)
    assert axis_windows(224, 224, 112) == ((0,), 224)
    assert axis_windows(225, 224, 112) == ((0, 1), 224)
    assert axis_windows(100, 224, 112) == ((0,), 100)
    assert axis_windows(448, 224, 224) == ((0, 224), 224)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("original", [(37, 60), (20, 81)])
def test_two_matrices_are_the_loop_over_windows(original, aligned):
    """mmsegmentation's slide inference: add up logits in pixels, divide by the count, resize."""
    valid, window, stride, patch = (37, 60), 22, 10, 8
    rng = np.random.default_rng(0)
    axes = [axis_windows(n, window, stride) for n in valid]
    cells = 3  # 22 px = 2.75 cells
    scores = rng.normal(size=(len(axes[0].starts) * len(axes[1].starts), cells, cells, 2)).astype(np.float32)

    total, count = np.zeros((*valid, 2)), np.zeros((*valid, 1))
    up = upsample_matrix(cells, patch, window, window, aligned=aligned)
    i = 0
    for y in axes[0].starts:
        for x in axes[1].starts:
            total[y : y + window, x : x + window] += np.einsum("yh,xw,hwc->yxc", up, up, scores[i])
            count[y : y + window, x : x + window] += 1
            i += 1
    assert count.min() == 1
    assert count.max() > 4
    resize = [interpolation_matrix(n, m) for n, m in zip(valid, original, strict=True)]
    expected = np.einsum("yh,xw,hwc->yxc", *resize, total / count)

    matrices = [window_matrix(a, up, v, o) for a, v, o in zip(axes, valid, original, strict=True)]
    together = side_by_side(scores, *(len(a.starts) for a in axes))
    np.testing.assert_allclose(np.einsum("yh,xw,hwc->yxc", *matrices, together), expected, atol=1e-5)


def test_the_most_overlap_allowed_fits_a_tile():
    matrix = window_matrix(axis_windows(500, 64, 64 // MOST_OVERLAP), upsample_matrix(8, 8, 64, 64), 500, 480)
    assert (matrix != 0).sum(axis=1).max() <= CELLS


def test_options():
    assert Options().windows is None
    assert Options(window=224).windows == (224, 112)
    assert Options(window=224, stride=100).windows == (224, 100)
    assert Options(window=1).windows == (1, 1)
    for window, stride in ((None, 112), (224, 225), (224, 0), (0, None), (-3, 1), (224, 27)):
        with pytest.raises(UserError) as error:
            Options(window=window, stride=stride)
        assert "\n" not in str(error.value)
