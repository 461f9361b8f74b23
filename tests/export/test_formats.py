"""Every format, read back, is the masks pixel by pixel."""

import hashlib
import json
import os
import tarfile
from pathlib import Path

import export_readers
import exports
import numpy as np
import pytest
import yaml
from PIL import Image

from maskclip_jax.errors import UserError
from maskclip_jax.export.objects import finish_yolo
from maskclip_jax.export.picture import export_names
from maskclip_jax.export.run import FORMATS, split_images

MAPS = exports.label_maps()
ORIGINAL = {file: MAPS[os.path.splitext(file)[0]] for file in exports.FILES}
READ = json.loads((Path(__file__).parents[1] / "golden" / "exports_read.json").read_text())


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, labels in wanted.items():
        np.testing.assert_array_equal(found[name], labels, err_msg=name)


@pytest.mark.parametrize("per", ["region", "class"])
def test_coco(made, per):
    out, notes = made("coco", per=per)
    same(export_readers.coco(out / "instances.json"), ORIGINAL)
    content = json.loads((out / "instances.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(exports.CLASSES)
    assert (len(content["annotations"]) < 20) == (per == "class")
    assert notes == ["1 images are stored turned (EXIF), masks are upright: --media copy turns images"]


def test_coco_panoptic(made):
    out, _ = made("coco-panoptic")
    same(export_readers.panoptic(out), ORIGINAL)
    assert (out / "panoptic" / "sub" / "b_c (1) ü.png").is_file()  # panopticapi cuts names at the first dot


def test_label_studio(made):
    out, _ = made("label-studio")
    same(export_readers.label_studio(out), ORIGINAL)


def test_yolo(made):
    out, notes = made("yolo")
    renamed = {"sub/images/d": "sub/images_/d"}  # readers put labels/ for the last images/ in a path
    same(export_readers.yolo(out), {renamed.get(name, name): labels for name, labels in MAPS.items()})
    assert len(notes) == 1
    names = ["\U0001f600 \\ud83d", 'a: "b"', "Küche 台所"]  # beyond 16 bits, and what only looks like it
    finish_yolo(out, [""], names)
    assert list(yaml.safe_load((out / "data.yaml").read_text())["names"].values()) == names


def test_cvat(made):
    out, _ = made("cvat", media="copy")
    maps, objects = export_readers.cvat(out / "annotations.zip")
    same(maps, MAPS)
    for name, labels in MAPS.items():
        assert ((objects[name] == 0) == (labels == 255)).all()
        for number in np.unique(objects[name])[1:]:
            assert len(np.unique(labels[objects[name] == number])) == 1


def test_cvat_of_more_regions_than_colours(made, monkeypatch):
    monkeypatch.setattr("maskclip_jax.export.maps.OBJECTS", 5)
    out, notes = made("cvat")
    maps, objects = export_readers.cvat(out / "annotations.zip")
    same(maps, MAPS)
    assert {len(np.unique(numbers)) for numbers in objects.values()} <= {1, 2, 3, 4, 5, 6}
    assert "over 5 regions" in notes[0]


@pytest.mark.parametrize(("case", "form"), [(case, form) for case, forms in READ["given"].items() for form in forms])
def test_what_heavy_tools_have_read(made, many, case, form):
    """Label Studio's, Datumaro's (CVAT's), Ultralytics', FiftyOne's and panopticapi's readers had these very files."""
    out, _ = made(form, "labels" if case == "given" else many)
    assert exports.digest(out) == READ["given"][case][form], "read back again: tests/golden/make_exports_read.py"


def test_fiftyone(made):
    out, _ = made("fiftyone")
    same(export_readers.fiftyone(out), MAPS)


def test_voc(made, place):
    out, _ = made("voc", media="copy")
    same(export_readers.voc(out), MAPS)
    assert (out / "classes.txt").read_text().splitlines() == list(exports.CLASSES)
    for name, pixels in exports.upright(place / "photos").items():
        with Image.open(out / "JPEGImages" / f"{name}.jpg") as image:
            assert image.size == pixels.shape[1::-1]


def test_webdataset_shards_go_on(made, place, monkeypatch):
    """Stopped after a shard, the same call writes the rest, and the same bytes as one that was not."""
    out, _ = made("webdataset", shard_size=2)
    found = export_readers.webdataset(out)
    renamed = {"sub/b.c (1) ü": "sub/b_c (1) ü"}
    same({name: entry[0] for name, entry in found.items()}, {renamed.get(n, n): m for n, m in MAPS.items()})
    for name, pixels in exports.upright(place / "photos").items():
        _, image, about = found[renamed.get(name, name)]
        np.testing.assert_array_equal(image, pixels)
        assert sum(one["area"] for one in about["objects"]) == (MAPS[name] != 255).sum()
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(out.with_name("first"))
    from maskclip_jax.export.picture import Picture

    content, count = Picture.content, [0]

    def stopping(self):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return content(self)

    monkeypatch.setattr(Picture, "content", stopping)
    with pytest.raises(KeyboardInterrupt):
        made("webdataset", shard_size=2)
    assert not out.exists()
    made("webdataset", shard_size=2)
    assert count[0] == 4 + 3  # the first shard was there
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.mark.parametrize("form", FORMATS)
def test_records_and_segments_too(made, place, form, tmp_path):
    """The background is no object; records bring their images along."""
    out, _ = made(form, "segments", split=(("train", 0.6), ("val", 0.4)), shard_size=10**30)
    text = "".join(path.read_text() for path in out.rglob("*.[jty][sxa][otm]*") if path.suffix != ".png")
    assert form in ("cvat", "voc", "webdataset") or "background" not in text
    assert {path.name for path in tmp_path.iterdir()} == {form}  # nothing of its making is left
    names = dict.fromkeys(("coco", "coco-panoptic", "label-studio"), 2)
    assert len(list(out.glob("*.json"))) == {**names, "fiftyone": 1}.get(form, 0)


def test_coco_of_segments_is_the_masks_without_background(made):
    out, _ = made("coco", "segments")
    wanted = {file: np.where(np.minimum(m, 2) == 0, 255, np.minimum(m, 2)) for file, m in ORIGINAL.items()}
    same(export_readers.coco(out / "instances.json"), wanted)


def test_fiftyone_of_segments_shows_no_background(made):
    out, _ = made("fiftyone", "segments")
    found = export_readers.fiftyone(out)
    same(found, {name: np.where(np.minimum(m, 2) == 0, 255, np.minimum(m, 2) - 1) for name, m in MAPS.items()})


@pytest.mark.slow  # imports TFDS
def test_records(place, made, tmp_path):
    exports.write_labels(place / "records", place / "photos", records=True)
    out, _ = made("yolo", "records")
    same(export_readers.yolo(out), {{"sub/images/d": "sub/images_/d"}.get(n, n): m for n, m in MAPS.items()})
    assert (out / "images" / "a.jpg").read_bytes() == (place / "photos" / "a.jpg").read_bytes()
    out, _ = made("voc", "records")
    same(export_readers.voc(out), MAPS)


def test_small_and_unsure_objects_are_no_class(made):
    out, _ = made("voc", min_area=9, min_confidence=0.5)
    left = 0
    for name, labels in export_readers.voc(out).items():
        known = exports.confidences()[name] / 255
        kept = labels != 255
        assert (labels[kept] == MAPS[name][kept]).all()
        left += (MAPS[name][~kept] != 255).sum()
        for index in range(3):
            for region in export_regions(MAPS[name], index):
                assert (labels[region] == index).all() == (region.sum() >= 9 and known[region].mean() >= 0.5)
    assert left > 100


def export_regions(labels: np.ndarray, index: int):
    from scipy import ndimage

    numbers, count = ndimage.label(labels == index)
    return [numbers == number for number in range(1, count + 1)]


def test_links_lead_to_the_images(made, place):
    out, _ = made("yolo", media="link")
    assert os.readlink(out / "images" / "a.jpg") == str(place / "photos" / "a.jpg")
    assert not os.path.islink(out / "images" / "sub" / "a.png")  # stored turned: a copy is upright


def test_more_than_255_classes(made, many):
    """Here 255 is a class, 65535 is none: what other tools read of it is above."""
    for form in ("voc", "cvat"):
        with pytest.raises(UserError, match="255 classes"):
            made(form, many)
    out, _ = made("webdataset", many)
    with tarfile.open(out / "all-000000.tar") as archive:
        for file, labels in exports.maps_of_many().items():
            with Image.open(archive.extractfile(f"{os.path.splitext(file)[0]}.seg.png")) as image:
                np.testing.assert_array_equal(np.asarray(image), labels)


def test_two_images_of_one_stem_and_one_of_background(place, made, tmp_path):
    """As `segment` takes them (`label` does not): both are there, the second by another name; nothing is an object."""
    maps = {"a.jpg": MAPS["a"], "a.png": np.zeros((7, 300), np.uint8)}
    exports.write_photos(place / "pair", {file: labels.shape for file, labels in maps.items()})
    exports.write_segments(place / "two", place / "pair", maps)
    out, notes = made("voc", "two")
    wanted = np.minimum(MAPS["a"], 2)
    same(export_readers.voc(out), {"a": wanted, "a-2": maps["a.png"]})
    assert "'a' is 'a-2' there" in notes[0]
    out, notes = made("coco", "two")
    nothing = np.full((7, 300), 255)
    same(export_readers.coco(out / "instances.json"), {"a.jpg": np.where(wanted, wanted, 255), "a.png": nothing})
    assert notes == []
    for form in ("label-studio", "coco-panoptic", "yolo", "cvat", "fiftyone"):
        made(form, "two")
    assert {path.name for path in (tmp_path / "yolo" / "labels").iterdir()} == {"a.txt", "a-2.txt"}
    assert (tmp_path / "yolo" / "labels" / "a-2.txt").read_text() == ""
    maps, objects = export_readers.cvat(tmp_path / "cvat" / "annotations.zip")
    assert (maps["a-2"] == 255).all()
    assert not objects["a-2"].any()


def test_names_that_nothing_can_hold():
    odd = [" a/#b", "_a/_b", "x\ny", "c\\d", "e\udcff", "e_"]
    assert export_names(odd, ("$.", "")) == ["_a/_b", "_a/_b-2", "x_y", "c_d", "e_", "e_-2"]
    assert export_names(["a.b/c.d", "a.b/c_d", "__x__"], FORMATS["webdataset"].avoid) == ["a.b/c_d", "a.b/c_d-2", "_x_"]


def test_parts_are_cut_from_the_images_by_their_names_digests():
    names = [f"{i}" for i in range(10)]
    order = sorted(range(10), key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    parts = split_images(names, (("train", 0.7), ("val", 0.2), ("test", 0.1)))
    assert parts == {"train": sorted(order[:7]), "val": sorted(order[7:9]), "test": order[9:]}
    assert split_images(names, ()) == {"": list(range(10))}


def test_commands_know_the_formats():
    from maskclip_jax.cli import export as command

    assert tuple(FORMATS) == command.FORMATS
    assert all(f"`{form}`" in (Path(__file__).parents[2] / "docs" / "export.md").read_text() for form in FORMATS)
