"""A polygon holds its region's pixels and no others, holes within holes and corners that touch included."""

import numpy as np
import pytest
from export_readers import filled

from maskclip_jax.export.polygons import INSET, polygon
from maskclip_jax.segment.regions import find_regions

RING = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], np.uint8)


def maps():
    random = np.random.default_rng(1)
    yield RING
    yield np.kron(RING, np.ones((3, 2), np.uint8))
    for share in (0.3, 0.5, 0.7, 0.9):
        for _ in range(3):
            yield (random.random(tuple(random.integers(1, 26, 2))) < share).astype(np.uint8)


def test_by_pixel_centres_it_is_the_region():
    holes = 0
    for labels in maps():
        for region in find_regions(labels, ["a", "b"]):
            points = polygon(region)
            mask = np.zeros(labels.shape, bool)
            mask[region.box] = region.mask
            np.testing.assert_array_equal(filled(points, *labels.shape), mask)
            holes += len(points) > 12
    assert holes > 10


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_by_truncated_coordinates_it_is_the_region():
    """cv2.fillPoly of whole coordinates, as Ultralytics' polygon2mask: supervision has it without OpenCV."""
    import supervision

    for labels in maps():
        height, width = labels.shape
        for region in find_regions(labels, ["a", "b"]):
            shares = np.round(polygon(region) / [width, height], 7).astype(np.float32)
            points = (shares * np.array([width, height], np.float32)).astype(np.int32)
            mask = np.zeros(labels.shape, bool)
            mask[region.box] = region.mask
            drawn = supervision.polygon_to_mask(points, (width, height)).astype(bool)
            np.testing.assert_array_equal(drawn, mask)


def test_area_is_that_of_the_pixels():
    (region,) = find_regions(np.zeros((10, 20), np.uint8), ["a"])
    x, y = polygon(region).T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert area == pytest.approx((20 - 2 * INSET) * (10 - 2 * INSET))
