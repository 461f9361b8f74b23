"""Class sets, templates, splits, label maps, what people type after --classes, and colours."""

import numpy as np
import pytest

from maskclip_jax.data import vocabulary as vo
from maskclip_jax.errors import UserError


@pytest.mark.parametrize(
    ("names", "count", "first", "last"),
    [
        ("voc20 VOC pascal_voc20 pascal-voc20", 20, "airplane", "tv monitor"),
        ("context59 pascal-context59", 59, "airplane", "wood"),
        ("context459", 459, "accordion", "wool"),
        ("coco-stuff171 coco_stuff171 CocoStuff", 171, "person", "wood"),
        ("cityscapes cityscapes19", 19, "road", "bicycle"),
        ("ade20k150 ade150 ade20k", 150, "wall", "flag"),
        ("scenes66 scenes", 66, "dog", "road"),
        ("car-color", 24, "white car", "background"),
    ],
)
def test_class_sets(names, count, first, last):
    for name in names.split():
        classes = vo.class_set(name)
        assert len(classes) == count
        assert classes[0].name == first
        if name.startswith(("voc", "context59", "scenes", "city")):
            assert classes[-1].name == last


def test_every_class_set_is_well_formed():
    assert len(vo.class_set_names()) == 17
    for name in vo.class_set_names():
        for entry in vo.class_set(name):
            assert entry == (entry.name,)
            assert entry.name == entry.name.strip()  # ADE's list says "bed "


def test_scene_names_are_sixty_objects_then_stuff():
    names = [entry.name for entry in vo.class_set("scenes66")]
    assert names[60:] == ["grass", "sky", "sand", "water", "snow", "road"]
    assert names[:3] + names[57:60] == ["dog", "cat", "horse", "snowman", "key", "hat"]


def test_templates():
    assert [len(vo.prompt_templates(kind)) for kind in ("imagenet", "scene", "maskclip", "single")] == [80, 5, 85, 1]
    assert all("scene" in text for text in vo.prompt_templates("scene"))
    assert all(text.count("{}") == 1 for text in vo.prompt_templates())
    assert vo.prompt_templates("maskclip") == vo.prompt_templates("imagenet") + vo.prompt_templates("scene")
    assert "a photo of a {}." in vo.prompt_templates("imagenet")
    with pytest.raises(UserError, match="imagenet, scene"):
        vo.prompt_templates("cifar")


def test_unseen_classes():
    assert vo.unseen_classes("voc20") == ("potted plant", "sheep", "sofa", "train", "tv monitor")
    for name, count in (("voc20", 5), ("context59", 10), ("coco-stuff171", 15)):
        assert len(vo.unseen_classes(name)) == count
        assert set(vo.unseen_classes(name)) <= {entry.name for entry in vo.class_set(name)}
    with pytest.raises(UserError, match="zero-shot split"):
        vo.unseen_classes("ade20k150")


def test_label_maps():
    table = vo.coco_stuff_label_map()
    assert (table[0], table[10], table[11], table[12], table[181], table[255]) == (0, 10, 255, 11, 170, 255)
    assert sorted(set(table.tolist())) == [*range(171), 255]
    with_background, without = vo.context_label_map(background=True), vo.context_label_map(background=False)
    # 459 values: 2 is the first of the 59 (airplane), 1 and 0 are background
    assert with_background[[0, 1, 2, 9]].tolist() == [0, 0, 1, 2]
    assert without[[0, 1, 2, 9]].tolist() == [255, 255, 0, 1]
    assert sorted(set(with_background.tolist())) == list(range(60))
    assert sorted(set(without.tolist())) == [*range(59), 255]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog, cat, grass", [("dog",), ("cat",), ("grass",)]),
        ("dog", [("dog",)]),
        (" traffic   light ,dog,", [("traffic light",), ("dog",)]),
        ("sofa, couch; dog", [("sofa", "couch"), ("dog",)]),
        ("sofa,couch;", [("sofa", "couch")]),
        ("a/b, c", [("a/b",), ("c",)]),
        ("собака, 犬", [("собака",), ("犬",)]),
    ],
)
def test_parse_lists(text, expected):
    classes = vo.parse_classes(text)
    assert list(classes) == expected
    assert [str(entry) for entry in classes] == [entry[0] for entry in expected]


def test_parse_a_class_set_by_name():
    assert vo.parse_classes(" VOC20 ") == vo.class_set("voc20")


def test_parse_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeff# my classes\nsofa, couch\r\n\n  dog \n", encoding="utf-8")
    assert vo.parse_classes(str(path)) == (("sofa", "couch"), ("dog",))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        vo.parse_classes(str(path))
    path.write_text("\n# nothing\n")
    with pytest.raises(UserError, match="at least one class"):
        vo.parse_classes(str(path))
    with pytest.raises(UserError, match="there is no"):
        vo.parse_classes(str(tmp_path / "other.txt"))


def test_a_file_named_like_a_class_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").write_text("wolf\n")
    assert vo.parse_classes("dog") == (("dog",),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("dog,,cat", "empty"),
        ("dog; ,cat", "empty"),
        ("dog, cat, Dog", "one class only"),
        ("sofa,couch; bed,Couch", "'sofa, couch'.*'bed, Couch'"),
        ("sofa,sofa; dog", "twice"),
    ],
)
def test_parse_refuses_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        vo.parse_classes(text)
    assert "\n" not in str(error.value)


def test_as_classes():
    assert vo.as_classes(["dog", "sofa,couch", ("tv", "television")]) == (
        ("dog",),
        ("sofa", "couch"),
        ("tv", "television"),
    )
    assert vo.as_classes(vo.class_set("voc20")) == vo.class_set("voc20")
    for bad, message in (
        ([], "at least one"),
        ("dog", "must be a list"),
        ([f"c{i}" for i in range(65536)], "at most 65535"),
        ([()], "empty"),
    ):
        with pytest.raises(UserError, match=message):
            vo.as_classes(bad)


def test_unknown_class_set_lists_the_known():
    with pytest.raises(UserError, match=r"pascal_voc20.*scenes66"):
        vo.class_set("voc2012")


def test_palette_is_distinct_vivid_and_a_prefix():
    colours = vo.palette(66)
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(vo.palette(10), colours[:10])
    assert len({tuple(c) for c in vo.palette(1000).tolist()}) > 990
    first = colours[:20].astype(int)
    distance = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert distance.min() >= 80
    assert (first.max(-1) - first.min(-1)).min() >= 100  # no greys
    for bad in (0, 65536):
        with pytest.raises(UserError, match="palette"):
            vo.palette(bad)


def test_oklab_of_known_colours():
    # Ottosson's published values: white (1, 0, 0); sRGB red (0.62796, 0.22486, 0.12585)
    lab = vo._oklab(np.array([[255, 255, 255], [255, 0, 0]]))
    np.testing.assert_allclose(lab, [[1, 0, 0], [0.62796, 0.22486, 0.12585]], atol=1e-4)


def test_class_palette_gives_grass_its_green():
    names = ["dog", "grass", "cat", "sky"]
    colours = vo.class_palette(vo.as_classes(names)).astype(int)
    np.testing.assert_array_equal(colours, vo.class_palette(names))
    assert colours[1].argmax() == 1
    assert colours[3].argmax() == 2
    assert len({tuple(c) for c in vo.class_palette(vo.class_set("context459")).tolist()}) > 440
    assert vo.class_palette(["sky"]).shape == (1, 3)
