"""Run lengths against pycocotools and against the definition of Label Studio's brush."""

import numpy as np
import pytest
from export_readers import rle_pack
from pycocotools import mask as coco_mask

from maskclip_jax.export.rle import brush, coco_counts
from maskclip_jax.segment.regions import PER, find_regions


def cases():
    random = np.random.default_rng(0)
    yield np.zeros((1, 1), np.uint8)
    yield np.zeros((7, 300), np.uint8)  # one run to the end
    yield np.eye(5, dtype=np.uint8)
    yield np.pad(np.zeros((300, 200), np.uint8), 3, constant_values=1)  # brush runs beyond 65,536
    for _ in range(8):
        yield random.choice(3, tuple(random.integers(1, 24, 2)), p=[0.6, 0.2, 0.2]).astype(np.uint8)


@pytest.mark.parametrize("per", PER)
def test_strings_are_pycocotools_own_and_brushes_decode(per):
    for labels in cases():
        for region in find_regions(labels, ["a", "b", "c"], per=per):
            mask = np.zeros(labels.shape, np.uint8)
            mask[region.box] = region.mask
            assert mask.sum() == region.area
            counts = coco_counts(region, *labels.shape)
            assert counts == coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
            if labels.size < 10_000 or region.index:
                decoded = rle_pack(brush(region, *labels.shape))
                np.testing.assert_array_equal(decoded, np.repeat(mask.ravel() * 255, 4))
