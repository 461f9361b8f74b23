"""What `label` writes is what training reads: masks of a tree of images, or records, the same batches and a run."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from tiny_distill import CLASSES, SIDE, config_of, pretrained_clip, text_rows
from tiny_run import run_config, train

from maskclip_jax.data.images import read_label_png
from maskclip_jax.data.sources import ArraySource, open_source
from maskclip_jax.distill.input_pipeline import train_batch, train_example
from maskclip_jax.distill.run_log import read_metrics
from maskclip_jax.errors import UserError
from maskclip_jax.label import folder as label_files
from maskclip_jax.label import records as label_records
from maskclip_jax.label import run as label
from maskclip_jax.label.corpus import FileCorpus
from maskclip_jax.segment.settings import prediction_settings

COUNT = 6


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(images, masks, records): a tree of images, labelled by the tiny teacher in both forms."""
    root = tmp_path_factory.mktemp("labelled")
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        path = root / "images" / ("x", "y")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    corpus = FileCorpus(root / "images")
    settings = prediction_settings(CLASSES, pretrained_clip(), classifier=text_rows(), short_side=40, batch_size=2)
    for form in ("png", "records"):
        out, options = root / form, label.LabelOptions(form, shard_size=4)
        shards = label.shard_count(corpus, options)
        for shard in range(shards):
            label.label_shard(corpus, settings, options, out, shard)
        if form == "records":
            label_records.write_tfds_metadata(out, shards, label.record_features(settings, options), settings.names)
        assert label_files.finish(out, shards, {})["counts"]["images"] == COUNT
    records = f"tfds:labelled?split=train&label=label&name=name&data_dir={root / 'records' / 'records'}"
    return root / "images", root / "png" / "labels", records


def test_masks_and_records_make_the_same_batches(labelled):
    images, masks, records = labelled
    config = config_of(batch_size=COUNT, labels_from=str(masks))
    source = open_source(str(images))
    assert [source.names[i] for i in range(COUNT)] == ["x/0", "x/2", "x/4", "y/1", "y/3", "y/5"]
    from_masks = train_batch(config, source, 0, devices=1, local=range(1))
    from_records = train_batch(
        dataclasses.replace(config, labels_from="data"), open_source(records), 0, devices=1, local=range(1)
    )
    assert set(from_masks) == {"image", "label", "pseudo"}
    for name in from_masks:
        np.testing.assert_array_equal(from_masks[name], from_records[name])
    assert from_masks["pseudo"].shape == (1, COUNT, SIDE, SIDE)
    assert len(np.unique(from_masks["pseudo"])) > 2
    assert set(np.unique(from_masks["label"])) <= {254, 255}  # nothing but pseudo labels


def test_labels_of_the_data_need_labels_and_no_annotation(labelled):
    images, _, _ = labelled
    with pytest.raises(UserError, match="there is none"):
        config_of(labels_from="data", mode="zero-shot", unseen=("cat",))
    with pytest.raises(UserError, match="there is none"):
        config_of(labels_from="data", foreground="annotation")
    for name in ("labels_from", "backbone_weights", "init_from"):
        with pytest.raises(UserError, match=f"{name} has a name or a path, got nothing"):
            config_of(**{name: ""})
    other = ArraySource(np.zeros((1, 40, 48, 3), np.uint8), np.full((1, 40, 48), 77, np.uint8))
    with pytest.raises(UserError, match=r"^the mask of 000000 in train_data has label 77"):
        train_example(config_of(labels_from="data"), other, 0)
    with pytest.raises(UserError, match=r"needs labels, but 000000 has none"):
        train_example(config_of(labels_from="data"), ArraySource(np.zeros((1, 40, 48, 3), np.uint8)), 0)
    manifest = json.loads((images.parent / "png" / "manifest.json").read_text())
    masks = [read_label_png(path) for path in (images.parent / "png" / "labels").rglob("*.png")]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=len(CLASSES))
    assert list(manifest["pixels"].values()) == counts.tolist()


@pytest.mark.slow
def test_a_student_trains_from_them(labelled, tmp_path):
    images, masks, _ = labelled
    config = run_config(
        images, mode="annotation-free", labels_from=str(masks), eval_data="", steps=3, batch_size=2, guided_steps=3
    )
    train(config, tmp_path)
    losses = [record["train/loss"] for record in read_metrics(tmp_path) if "train/loss" in record]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
