"""Regions by hand, and as supervision takes them."""

import numpy as np
import pytest

from maskclip_jax.errors import UserError
from maskclip_jax.segment.predict import Segmentation
from maskclip_jax.segment.regions import find_regions

LABELS = np.array([[0, 0, 1, 255], [2, 1, 1, 1], [2, 1, 2, 2]], np.uint8)
SURE = np.array([[0.5, 0.7, 0.2, 0.9], [0.4, 0.4, 0.4, 0.4], [0.6, 0.6, 0.1, 0.3]], np.float32)


def test_by_hand():
    found = [(r.index, r.xywh, r.area, round(r.confidence, 6)) for r in find_regions(LABELS, ["a", "b", "c"], SURE)]
    assert found == [
        (0, [0, 0, 2, 1], 2, 0.6),
        (1, [1, 0, 3, 3], 5, 0.4),
        (2, [0, 1, 1, 2], 2, 0.5),
        (2, [2, 2, 2, 1], 2, 0.2),
    ]
    assert [r.area for r in find_regions(LABELS, ["background", "b", "c"], SURE, per="class")] == [5, 4]
    assert [r.index for r in find_regions(LABELS, ["a", "b", "c"], SURE, min_area=3)] == [1]
    assert [r.index for r in find_regions(LABELS, ["a", "b", "c"], SURE, min_confidence=0.45)] == [0, 2]
    assert find_regions(LABELS, ["a", "b", "c"], np.full_like(SURE, np.nan), min_confidence=0.1) == []
    with pytest.raises(UserError, match="per region or class, got 'pixel'"):
        find_regions(LABELS, ["a"], per="pixel")


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_takes_the_detections():
    import supervision

    found = supervision.Detections(**Segmentation(LABELS, {}, ("a", "b", "c"), SURE, None).to_detections())
    assert found.xyxy.tolist() == [[0, 0, 2, 1], [1, 0, 4, 3], [0, 1, 1, 3], [2, 2, 4, 3]]
    assert found.area.tolist() == [2, 5, 2, 2]
    assert found.data["class_name"].tolist() == ["a", "b", "c", "c"]
    np.testing.assert_allclose(found.confidence, [0.6, 0.4, 0.5, 0.2], rtol=1e-6)
    labels = np.full(LABELS.shape, 255)
    for mask, index in zip(found.mask, found.class_id, strict=True):
        labels[mask] = index
    np.testing.assert_array_equal(labels, LABELS)
    assert len(supervision.Detections(**Segmentation(LABELS + 3, {}, ("a",), SURE, None).to_detections())) == 0
