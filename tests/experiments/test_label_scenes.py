"""Class-balanced selection of pseudo labels."""

import numpy as np

from experiments.label_scenes import surest


def test_of_every_class_the_surest_share_stays():
    labels = np.array([[[0, 0, 0, 0], [7, 7, 7, 7]]], np.uint8)
    sure = np.array([[[250, 240, 230, 220], [10, 40, 20, 30]]], np.uint8)  # class 7 is never as sure as class 0
    keep = [0.5] * 8
    found = surest(labels, sure, keep)
    np.testing.assert_array_equal(found, [[[0, 0, 255, 255], [255, 7, 255, 7]]])
    np.testing.assert_array_equal(surest(labels, sure, [1.0] * 8), labels)
    np.testing.assert_array_equal(surest(labels, sure, [1.0, *keep[1:]])[0, 0], labels[0, 0])
