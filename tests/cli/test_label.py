"""`label`: what is on disk after any interruption, on any number of workers, is what one quiet run leaves."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_outputs import NAMES, WORDS, labels_of, written
from label_outputs import COUNT, Killed, check_manifest, tree

from maskclip_jax.data.images import read_image, read_label_png
from maskclip_jax.data.sources import open_source
from maskclip_jax.label import folder as label_files
from maskclip_jax.label import store as label_store


def test_masks_are_those_of_segment(label, segment, photos, tmp_path):
    result = label(photos)
    assert (result.code, result.errors) == (0, [])
    manifest = check_manifest(tmp_path / "out")
    assert result.lines[-1].endswith("holds the masks of 11 images (0 skipped): " + str(tmp_path / "out/manifest.json"))
    assert segment(photos, out=tmp_path / "one", options=["--batch-size", "1"]).code == 0
    pixels = np.zeros(4, int)
    for image in photos.rglob("*.*"):
        name = image.relative_to(photos).with_suffix(".png")
        labels = read_label_png(tmp_path / "out" / "labels" / name)
        assert labels.shape == read_image(image).shape[:2]
        assert (labels == labels_of(tmp_path / "one", image.stem)).mean() > 0.999
        pixels += np.bincount(labels.ravel(), minlength=4)
    assert manifest["pixels"] == dict(zip(NAMES, pixels.tolist(), strict=True))
    assert (pixels > 0).sum() > 1  # else equality would say little


def test_another_method(label, segment, photos, tmp_path):
    """`--method` reaches the tower, stands in the record, and cannot change half-way."""
    assert label(photos).code == 0
    assert label(photos, "--method", "naclip", out="other").code == 0
    options = ["--batch-size", "1", "--method", "naclip"]
    assert segment(photos, out=tmp_path / "one", options=options).code == 0
    same, changed = [], []
    for image in photos.rglob("*.*"):
        name = Path("labels") / image.relative_to(photos).with_suffix(".png")
        labels = read_label_png(tmp_path / "other" / name)
        same.append((labels == labels_of(tmp_path / "one", image.stem)).mean())
        changed.append((labels != read_label_png(tmp_path / "out" / name)).mean())
    assert min(same) > 0.999
    assert max(changed) > 0.05
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())["settings"]["method"] == "naclip"
    result = label(photos, out="other")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "method was 'naclip' and is None" in result.errors[0]


@pytest.mark.parametrize(
    ("form", "kills"), [((), (3, 8, 5)), (("--format", "records"), (3, 4, 3))], ids=["png", "records"]
)
def test_killed_three_times_is_as_if_never_killed(label, photos, tmp_path, monkeypatch, form, kills):
    more = (*form, "--confidence", "--top-k", "2", "--features")
    write_whole, left, writes = label_files.write_whole, [10**6], [0]

    def until_killed(out, path, content):
        left[0] -= 1
        if left[0] < 0:
            (out / label_files.PARTIAL / "half").write_bytes(content[: len(content) // 2])
            raise Killed
        writes[0] += 1
        return write_whole(out, path, content)

    for module in (label_files, label_store):
        monkeypatch.setattr(module, "write_whole", until_killed)
    assert label(photos, *more, out="quiet").code == 0
    check_manifest(tmp_path / "quiet")
    quiet, writes[0] = writes[0], 0
    before: dict[str, str] = {}
    for left[0] in kills:
        with pytest.raises(Killed):
            label(photos, *more)
        after = tree(tmp_path / "out")
        kept = {(p, d) for p, d in before.items() if not p.startswith(label_files.PARTIAL)}
        assert kept <= after.items()
        assert not (tmp_path / "out" / "manifest.json").exists()
        before = after
    left[0] = 10**6
    assert label(photos, *more).code == 0
    twice = len(kills) * 2 * min(os.cpu_count() or 1, 16)  # of an image that lacked one of three files, all are written
    assert writes[0] <= quiet + (0 if form else twice)
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")


def test_what_is_done_is_not_computed_again(label, photos, tmp_path, monkeypatch):
    assert label(photos).code == 0
    before = tree(tmp_path / "out")
    monkeypatch.setattr("maskclip_jax.label.run.label_shard", lambda *_, **__: pytest.fail("computed again"))
    assert label(photos).code == 0
    assert tree(tmp_path / "out") == before


def test_one_image_that_is_lost_is_made_again(label, photos, tmp_path, monkeypatch):
    assert label(photos).code == 0
    before = tree(tmp_path / "out")
    for lost in ("labels/b/c/05.png", "shards/00001-of-00002.json", "manifest.json"):
        (tmp_path / "out" / lost).unlink()
    saved = []
    save = label_store.FileStore.save
    monkeypatch.setattr(
        label_store.FileStore, "save", lambda self, found: saved.append(found.name) or save(self, found)
    )
    assert label(photos).code == 0
    assert saved == ["b/c/05"]
    assert tree(tmp_path / "out") == before


def test_workers_share_shards_and_may_get_the_same_one(label, photos, tmp_path):
    assert label(photos, out="quiet").code == 0
    first = label(photos, "--shard", "1/2")
    assert first.lines == ["labelled 5 images in 1 shards, skipped 0", first.lines[1]]
    assert first.lines[1].startswith("1 of 2 shards are left")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert label(photos, "--shard", "0/1").code == 0  # does the rest
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")
    (tmp_path / "out" / "shards" / "00001-of-00002.json").unlink()  # as it was when both were at it
    assert label(photos, "--shard", "1/2").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")


@pytest.mark.parametrize("form", [(), ("--format", "records")], ids=["png", "records"])
def test_two_on_one_shard_at_once(label, photos, tmp_path, monkeypatch, form):
    """A second worker, of another part, begins and ends while the first is between two images."""
    assert label(photos, *form, out="quiet").code == 0
    written_whole, calls = label_files.write_whole, [0]

    def with_another(out, path, content):
        calls[0] += 1
        if calls[0] == 4:
            refused = label(photos, *form)
            assert (refused.code, len(refused.errors)) == (2, 1)
            assert f"part 0/1 of {tmp_path / 'out'} is worked on by one run at a time, but process" in refused.errors[0]
            for part in ("0/2", "1/2"):
                assert label(photos, *form, "--shard", part).code == 0
        return written_whole(out, path, content)

    monkeypatch.setattr(label_store, "write_whole", with_another)
    assert label(photos, *form).code == 0
    assert calls[0] > COUNT
    assert tree(tmp_path / "out") == tree(tmp_path / "quiet")


def test_damaged_images_are_skipped_or_stop(label, photos, tmp_path):
    data = tmp_path / "data"
    for image in photos.rglob("*.*"):
        target = data / image.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
    (data / "a" / "02.jpg").write_bytes(b"")
    (data / "b" / "c" / "07.png").write_bytes((data / "b" / "c" / "07.png").read_bytes()[:100])
    result = label(data, "--on-error", "stop", out="stop")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "a/02 cannot be labelled" in result.errors[0]
    result = label(data)
    assert result.code == 0
    assert [line.split(":")[1].strip() for line in result.errors] == ["skipped a/02", "skipped b/c/07"]
    manifest = check_manifest(tmp_path / "out", COUNT - 2, 2)
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["name"] for entry in skipped] == ["a/02", "b/c/07"]
    assert "0 bytes" in skipped[0]["reason"]
    assert manifest["counts"]["skipped"] == 2
    assert label(photos, out="quiet").code == 0
    kept, quiet = tree(tmp_path / "out"), tree(tmp_path / "quiet")
    assert {p: kept.get(p) for p in quiet if p.startswith("labels/a/00")} == {
        p: d for p, d in quiet.items() if p.startswith("labels/a/00")
    }


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.flax import load_file

    return {name: np.asarray(array) for name, array in load_file(path).items()}


def test_confidence_top_classes_and_features(label, photos, tmp_path, model):
    from maskclip_jax import load_clip, segment_images

    assert label(photos, "--confidence", "--top-k", "2", "--features").code == 0
    image = photos / "a" / "00.jpg"
    (found,) = segment_images([read_image(image)], NAMES, load_clip(model), batch_size=1, cache=False)
    confidence = read_label_png(tmp_path / "out" / "confidence" / "a" / "00.png")
    assert np.abs(confidence - 255 * found.confidence).max() < 1
    cells = read_tensors(tmp_path / "out" / "cells" / "a" / "00.safetensors")
    height, width = cells["classes"].shape[:2]
    assert cells["probabilities"].shape == (height, width, 2)
    assert cells["probabilities"].dtype == np.float16
    assert (cells["probabilities"][..., 0] >= cells["probabilities"][..., 1]).all()
    features = cells["features"].astype(np.float32)
    assert cells["features"].dtype.name == "bfloat16"
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=0.02)
    # cells, enlarged by hand, agree with the labels almost everywhere
    rows, columns = np.arange(40) * height // 40, np.arange(60) * width // 60
    assert (cells["classes"][..., 0][np.ix_(rows, columns)] == found.labels).mean() > 0.7
    from maskclip_jax.segment.classifier import text_classifier

    cosines = features @ np.asarray(text_classifier(load_clip(model), [(n,) for n in NAMES], cache=False)).T
    assert (cosines.argmax(-1) == cells["classes"][..., 0]).mean() > 0.95


def test_records_are_a_tfds_data_set(label, photos, tmp_path):
    assert label(photos).code == 0
    assert label(photos, "--format", "records", "--confidence", "--features", out="records").code == 0
    check_manifest(tmp_path / "records")
    source = open_source(f"tfds:labelled?split=train&label=label&name=name&data_dir={tmp_path / 'records' / 'records'}")
    assert len(source) == COUNT
    for i in range(COUNT):
        example = source[i]
        (image,) = photos.rglob(f"{Path(example.name).name}.*")
        np.testing.assert_array_equal(example.image, read_image(image))
        np.testing.assert_array_equal(
            example.labels, read_label_png(tmp_path / "out" / "labels" / f"{example.name}.png")
        )
    record = source.source[0]
    assert record["features"].dtype == np.uint16
    assert record["confidence"].shape == record["label"].shape


def test_records_wait_where_they_are_told(label, photos, tmp_path, monkeypatch):
    """A killed run's records are in the scratch folder, and gone when their shard is whole."""
    scratch = ("--format", "records", "--scratch", tmp_path / "scratch")
    with monkeypatch.context() as patch:
        patch.setattr(label_store.RecordStore, "seal", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            label(photos, *scratch)
    assert len([p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]) == 6
    assert label(photos, *scratch).code == 0
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    check_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "32", "--features"], "those of whole images"),
        (["--top-k", "5"], "at most the 4 classes"),
        (["--shard", "2/2"], "I/N with I from 0 to N-1"),
        (["--shard", "one"], "I/N with I from 0 to N-1"),
        (["--format", "jpeg"], "invalid choice"),
        (["--out", "{photos}/out"], "lies outside of the images"),
    ],
)
def test_refused(label, photos, tmp_path, options, words):
    result = label(photos, *[option.replace("{photos}", str(photos)) for option in options])
    assert (result.code, len(result.errors)) == (2, 1)
    assert words in result.errors[0]
    assert written(tmp_path) == set()


def test_another_command_in_the_same_folder_is_refused(label, photos, tmp_path):
    assert label(photos).code == 0
    before = tree(tmp_path / "out")
    for change, words in (
        ({"classes": "dog, cat, grass, tree"}, "classes was"),
        ({"options": ["--prompt-denoising", "0.5"]}, "prompt_denoising was None and is 0.5"),
        ({"options": ["--shard-size", "7"]}, "shard_size was 6 and is 7"),
        ({"data": photos / "a"}, "images was '11 images"),
    ):
        options = change.get("options", [])
        result = label(change.get("data", photos), *options, classes=change.get("classes", WORDS))
        assert (result.code, len(result.errors)) == (2, 1)
        assert words in result.errors[0]
    assert tree(tmp_path / "out") == before


def test_windows_and_other_sources(label, photos, tmp_path):
    """Sliding windows; arrays, whose images are numbered."""
    assert label(photos, "--window", "32", "--stride", "16").code == 0
    check_manifest(tmp_path / "out")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images)
    assert label(tmp_path / "some.npz", out="numbered").code == 0
    assert {p for p in tree(tmp_path / "numbered") if p.startswith("labels")} == {
        f"labels/00000{i}.png" for i in range(3)
    }
    check_manifest(tmp_path / "numbered", 3)
