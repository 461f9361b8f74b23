"""Batches are a function of the step: of no host, device, thread, or what came before."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_distill import CLASSES, config_of

from maskclip_jax.data.augment import AugmentConfig, augment, example_rng
from maskclip_jax.data.images import write_label_png
from maskclip_jax.data.sources import ArraySource
from maskclip_jax.distill.input_pipeline import (
    device_positions,
    epoch_order,
    on_devices,
    stream_example,
    train_batch,
    train_batches,
    train_example,
)
from maskclip_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 40, 44, 3), np.uint8)
LABELS = RNG.integers(0, 5, (7, 10, 11)).repeat(4, 1).repeat(4, 2)
SOURCE = ArraySource(IMAGES, LABELS)
PINNED = [4, 9, 8, 7, 5, 3, 0, 1, 2, 6]
STILL = AugmentConfig(scale=(1.0, 1.0), flip=0.0, category_max_ratio=1.0, photometric=False)


def test_an_epoch_shows_every_example_once_in_its_own_order():
    epochs = [[stream_example(3, position, 7) for position in range(e * 7, e * 7 + 7)] for e in range(3)]
    for e, shown in enumerate(epochs):
        assert {epoch for epoch, _ in shown} == {e}
        assert sorted(index for _, index in shown) == list(range(7))
    orders = [tuple(index for _, index in shown) for shown in epochs]
    assert len(set(orders)) == 3
    assert tuple(epoch_order(4, 0, 7)) != orders[0]


def test_the_order_of_an_epoch_is_pinned():
    """Data order is part of a run: a NumPy that shuffles otherwise must be noticed."""
    assert epoch_order(0, 0, 10).tolist() == PINNED


def test_a_batch_spans_epochs_and_is_the_examples_augmented():
    config = config_of(batch_size=4, mode="supervised", augmentation=AugmentConfig())
    batch = train_batch(config, SOURCE, 1, devices=1, local=range(1))  # positions 4..7: the last is of epoch 1
    assert (batch["image"].shape, batch["image"].dtype) == ((1, 4, 32, 32, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((1, 4, 32, 32), np.uint8)
    for place, position in enumerate(range(4, 8)):
        epoch, index = stream_example(config.seed, position, 7)
        assert epoch == position // 7
        image, label = augment(
            IMAGES[index],
            LABELS[index],
            example_rng(config.seed, epoch, index),
            config.augmentation,
            crop_size=32,
            fill=(124, 116, 104),  # ImageNet's mean colour: zero once normalised
        )
        np.testing.assert_array_equal(batch["image"][0, place], image)
        np.testing.assert_array_equal(batch["label"][0, place], label)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_and_hosts_share_the_same_micro_batches(accumulate):
    config = config_of(batch_size=8, accumulate=accumulate)
    one = device_positions(config, 3, 1).reshape(accumulate, -1)
    four = device_positions(config, 3, 4)
    np.testing.assert_array_equal(np.sort(four.ravel()), np.arange(24, 32))
    micro = four.reshape(4, accumulate, -1)
    for i in range(accumulate):
        np.testing.assert_array_equal(np.sort(micro[:, i].ravel()), np.sort(one[i]))
    whole = train_batch(config, SOURCE, 3, devices=4, local=range(4))
    parts = [train_batch(config, SOURCE, 3, devices=4, local=range(h * 2, h * 2 + 2)) for h in range(2)]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_reading_ahead_changes_nothing_and_starts_anywhere():
    config = config_of(batch_size=4, steps=6, mode="supervised")
    place = {"devices": 1, "local": range(1)}
    ahead = list(train_batches(config, SOURCE, 2, threads=4, **place))
    placed = list(on_devices(iter(ahead)))
    assert len(placed) == len(ahead)
    for before, after in zip(ahead, placed, strict=True):
        for name, array in after.items():
            assert isinstance(array, jax.Array)
            np.testing.assert_array_equal(array, before[name])
    assert len(ahead) == 4
    for step, batch in enumerate(ahead, 2):
        for name, value in train_batch(config, SOURCE, step, **place).items():
            np.testing.assert_array_equal(batch[name], value)


@pytest.fixture
def on_disk(tmp_path):
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=LABELS.astype(np.uint8))
    return str(tmp_path / "data.npz")


def test_worker_processes_change_nothing(on_disk):
    """Two of them, whose batches come in the steps' order, from the source opened by its name."""
    config = config_of(batch_size=4, steps=7, mode="supervised", train_data=on_disk)
    place = {"devices": 1, "local": range(1)}
    found = list(train_batches(config, SOURCE, 2, workers=2, **place))
    assert len(found) == 5
    for step, batch in enumerate(found, 2):
        for name, value in train_batch(config, SOURCE, step, **place).items():
            np.testing.assert_array_equal(batch[name], value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_ahead_is_said_in_one_line(on_disk, workers):
    config = config_of(mode="supervised", classes=("dog", "cat"), train_data=on_disk)
    with pytest.raises(UserError, match=r"\Aannotation is 0\.\.1 or 255, but 0000.* has .: check classes and \w+\Z"):
        list(train_batches(config, SOURCE, 0, workers=workers, devices=1, local=range(1)))


def test_annotation_free_never_looks_at_the_annotation():
    free = config_of(batch_size=4)
    with_labels = train_batch(free, SOURCE, 0, devices=1, local=range(1))
    without = train_batch(free, ArraySource(IMAGES), 0, devices=1, local=range(1))
    for name in with_labels:
        np.testing.assert_array_equal(with_labels[name], without[name])
    assert set(np.unique(with_labels["label"])) <= {254, 255}


def test_zero_shot_hides_the_unseen():
    config = config_of(mode="zero-shot", unseen=("cat",), augmentation=STILL, crop_size=44)
    for position in range(7):
        example = train_example(config, SOURCE, position)
        truth = LABELS[stream_example(config.seed, position, 7)[1]]
        np.testing.assert_array_equal(example["label"][:40], np.where(truth == CLASSES.index("cat"), 254, truth))


def test_labels_made_before_share_the_geometry(tmp_path):
    """The mask is a function of the image: it must still be, wherever the crop fell."""
    images = IMAGES.copy()
    images[..., 0] = LABELS * 10
    source = ArraySource(images)
    for i in range(7):
        write_label_png(tmp_path / f"{i:06d}.png", LABELS[i], np.zeros((5, 3), np.uint8))
    still = dataclasses.replace(STILL, flip=0.5)
    config = config_of(labels_from=str(tmp_path), augmentation=still, crop_size=20)
    for position in range(14):
        example = train_example(config, source, position)
        np.testing.assert_array_equal(example["pseudo"], example["image"][..., 0] // 10)
        assert (example["label"] == 254).all()
    write_label_png(tmp_path / "000002.png", LABELS[2][:8], np.zeros((5, 3), np.uint8))
    with pytest.raises(UserError, match="its image's size"):
        [train_example(config, source, position) for position in range(7)]
    (tmp_path / "000002.png").unlink()
    with pytest.raises(UserError, match=r"000002\.png is missing"):
        list(train_batches(config, source, 0))


def test_one_line_for_data_that_do_not_fit():
    with pytest.raises(UserError, match="needs annotation, but 00000"):
        train_example(config_of(mode="supervised"), ArraySource(IMAGES), 0)
    with pytest.raises(UserError, match=r"annotation is 0\.\.1 or 255"):
        train_example(config_of(mode="supervised", classes=("dog", "cat")), SOURCE, 0)
    with pytest.raises(UserError, match=r"annotation is 0\.\.4 or 255, but .* has -1"):
        train_example(config_of(mode="supervised"), ArraySource(IMAGES, LABELS.astype(np.int16) - 1), 0)
    with pytest.raises(UserError, match="use 6 or 9"):
        train_batch(config_of(batch_size=8), SOURCE, 0, devices=3, local=range(3))
