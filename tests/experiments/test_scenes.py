"""Emoji scenes with glyphs of one colour, so that every pixel can be worked out by hand. No font, no tarball."""

import io
import itertools
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.toy_world import make_scenes, other_scenes
from experiments.toy_world.backgrounds import SIDE, Ground, draw_ground, sample_ground
from experiments.toy_world.glyphs import EMOJI, GLYPH_SIDE, IN_STYLE, STYLES, TRAIN_STYLES
from experiments.toy_world.scenes import (
    TINTS,
    VISIBLE_PX,
    Layout,
    Painter,
    Thing,
    caption,
    restyled,
    sample_layout,
    tint_glyph,
)
from maskclip_jax.data.vocabulary import SCENE_CLASSES, SCENE_OBJECTS, SCENE_STUFF

ROOT = Path(__file__).resolve().parents[2]

DOG, CAR, GRASS, SKY = (SCENE_CLASSES.index(name) for name in ("dog", "car", "grass", "sky"))
PLAIN = (0.0, 1.0, 0.0, 0.0)  # a finish that changes nothing
ON_GRASS = Ground((SCENE_STUFF.index("grass"),), (0.5, 0.0, 0.0, 1.0, 0.0), 3)


@pytest.fixture(scope="module")
def painter() -> Painter:
    """Every glyph a full square: grey in Noto, orange in Fluent, and a half-height bar in Twemoji."""
    square = np.full((GLYPH_SIDE, GLYPH_SIDE, 4), 255, np.uint8)
    styles = {"noto": square * 1, "fluent": square * 1, "twemoji": square[: GLYPH_SIDE // 2] * 1}
    styles["noto"][..., :3] = 128
    styles["fluent"][..., :3] = (230, 120, 30)
    drawn = {style: dict.fromkeys(SCENE_OBJECTS, styles.get(style, square)) for style in STYLES}
    del drawn["emojione"]["dog"]  # not every artist has drawn everything
    return Painter(drawn)


def thing(label: int, side: float, centre=(0.5, 0.5), style="noto", tint="") -> Thing:
    return Thing(label, style, tint, side, centre, 0.0, False, (1.0, 1.0, 1.0), 1.0)


def nearest(things) -> float:
    """The least distance of two things, in means of their sides."""
    pairs = itertools.combinations(things, 2)
    return min(np.hypot(*np.subtract(a.centre, b.centre)) / ((a.side + b.side) / 2) for a, b in pairs)


def box(labels: np.ndarray, label: int) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(labels == label)
    assert len(rows) == (rows.max() + 1 - rows.min()) * (columns.max() + 1 - columns.min())  # a full rectangle
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_there_are_66_names_and_60_emoji():
    assert len(SCENE_CLASSES) == len(set(SCENE_CLASSES)) == 66
    assert (EMOJI["dog"], EMOJI["ball"], EMOJI["hat"]) == ("🐕", "⚽", "🎩")
    # Both ends and the middle of the list could agree and its inside still be shifted by one.
    assert (EMOJI["cake"], EMOJI["bottle"], EMOJI["pizza"]) == ("🎂", "🍾", "🍕")


def test_the_other_generator_composes_otherwise(painter):
    """Things overlap more than in a training scene, up to three stuffs meet, and a scene is a function of its index."""
    scenes = [other_scenes.draw(painter, index) for index in range(40)]
    again = other_scenes.draw(painter, 7)
    np.testing.assert_array_equal(again.image, scenes[7].image)
    np.testing.assert_array_equal(again.labels, scenes[7].labels)
    stuffs = [sum(c >= len(SCENE_OBJECTS) for c in scene.classes) for scene in scenes]
    assert {1, 2, 3} <= set(stuffs)
    heaps = [other_scenes.heap(np.random.default_rng(index)) for index in range(200)]
    scattered = [sample_layout("train", index).things for index in range(200)]
    assert np.mean([nearest(t) for t in heaps]) < 0.6 * np.mean([nearest(t) for t in scattered if len(t) > 1])
    shares = [np.mean(scene.labels < len(SCENE_OBJECTS)) for scene in scenes]
    assert 0.2 < np.mean(shares) < 0.5


def test_a_layout_is_a_function_of_split_and_index():
    assert sample_layout("train", 5) == sample_layout("train", 5)
    assert len({sample_layout(s, i).seed for s in ("train", "heldout", "closeup") for i in range(50)}) == 150


def test_layouts_keep_to_the_description():
    layouts = [sample_layout("train", i) for i in range(400)]
    counts = np.bincount([len(layout.things) for layout in layouts], minlength=5)
    assert counts[0] == 0
    assert (counts[1:] > 40).all()
    assert len(counts) == 5
    things = [t for layout in layouts for t in layout.things]
    assert {t.style for t in things} == set(IN_STYLE)
    assert all(0.16 <= t.side <= 0.75 and abs(t.angle) <= 25 for t in things)
    assert min(t.side for t in things) < 0.2
    assert max(t.side for t in things) > 0.65
    assert all(len({t.label for t in layout.things}) == len(layout.things) for layout in layouts)
    assert all(0 < c < 1 for t in things for c in t.centre)
    assert {t.tint for t in things} == {"", *TINTS}


def test_training_scenes_are_wider_than_the_held_out_ones():
    layouts = [sample_layout("wide", i) for i in range(400)]
    counts = np.bincount([len(layout.things) for layout in layouts], minlength=7)
    assert counts[0] == 0
    assert (counts[1:] > 10).all()
    things = [t for layout in layouts for t in layout.things]
    assert {t.style for t in things} == set(TRAIN_STYLES) == set(STYLES) - {"twemoji"}  # Twemoji never
    assert min(t.side for t in things) < 0.16
    assert max(t.side for t in things) > 0.9
    near = [sample_layout("wide_closeup", i).things for i in range(50)]
    assert all(len(one) == 1 and 0.4 <= one[0].side <= 1.05 for one in near)


def test_an_artist_who_has_not_drawn_a_thing_leaves_it_to_noto(painter):
    layout = Layout(ON_GRASS, (thing(DOG, 0.5),), PLAIN, 1)
    ours, lacking = painter.draw_scene(layout), painter.draw_scene(restyled(layout, "emojione"))
    np.testing.assert_array_equal(ours.image, lacking.image)


def test_a_closeup_is_one_large_thing():
    for i in range(50):
        (only,) = sample_layout("closeup", i).things
        assert 0.45 <= only.side <= 0.95


def test_the_sky_is_above_and_horizons_are_in_three_of_five():
    rng = np.random.default_rng(0)
    grounds = [sample_ground(rng) for _ in range(2000)]
    assert np.mean([len(g.stuffs) == 2 for g in grounds]) == pytest.approx(0.6, abs=0.04)
    sky = SCENE_STUFF.index("sky")
    assert not any(len(g.stuffs) == 2 and g.stuffs[1] == sky for g in grounds)
    assert all(len(set(g.stuffs)) == len(g.stuffs) for g in grounds)
    assert {s for g in grounds for s in g.stuffs} == set(range(6))


@pytest.mark.parametrize("below", ["grass", "sand", "water", "snow", "road"])
def test_a_horizon_divides_the_labels(below):
    ground = Ground((SCENE_STUFF.index("sky"), SCENE_STUFF.index(below)), (0.25, 0.1, 0.0, 1.0, 0.0), 9)
    image, stuff = draw_ground(ground)
    assert image.shape == (SIDE, SIDE, 3)
    assert np.isfinite(image).all()
    for x in (0, 40, SIDE - 1):  # a straight line, tilted by 0.1 of the side from edge to edge
        line = 0.25 + 0.1 * (x / (SIDE - 1) - 0.5)
        expected = [ground.stuffs[0] if y / (SIDE - 1) < line else ground.stuffs[1] for y in range(SIDE)]
        np.testing.assert_array_equal(stuff[:, x], expected)


def test_a_glyph_covers_its_square(painter):
    scene = painter.draw_scene(Layout(ON_GRASS, (thing(DOG, 0.5),), PLAIN, 0))
    assert box(scene.labels, DOG) == (32, 96, 32, 96)
    assert (scene.image[33:95, 33:95] == 128).all()
    assert set(np.unique(scene.labels)) == {DOG, GRASS}
    assert scene.phrases == ("dog", "grass")
    assert scene.classes == (DOG, GRASS)


@pytest.mark.parametrize(
    ("centre", "expected"),
    [((0.0, 0.0), (0, 32, 0, 32)), ((1.0, 1.0), (96, 128, 96, 128)), ((1.0, 0.25), (0, 64, 96, 128))],
)
def test_glyphs_are_cut_at_the_edges(painter, centre, expected):
    scene = painter.draw_scene(Layout(ON_GRASS, (thing(DOG, 0.5, centre),), PLAIN, 0))
    assert box(scene.labels, DOG) == expected


def test_later_things_lie_on_top_and_the_hidden_are_not_named(painter):
    large, small = thing(CAR, 0.5), thing(DOG, 0.25)
    seen = painter.draw_scene(Layout(ON_GRASS, (large, small), PLAIN, 0))
    assert (seen.labels == DOG).sum() == 32 * 32
    assert (seen.labels == CAR).sum() == 64 * 64 - 32 * 32
    assert seen.phrases == ("car", "dog", "grass")
    hidden = painter.draw_scene(Layout(ON_GRASS, (small, large), PLAIN, 0))
    assert hidden.phrases == ("car", "grass")


def test_what_shows_on_no_more_than_60_pixels_is_not_named(painter):
    for width, named in ((7, False), (8, True)):  # 49 and 64 px
        scene = painter.draw_scene(Layout(ON_GRASS, (thing(DOG, width / SIDE),), PLAIN, 0))
        assert (scene.labels == DOG).sum() == width**2
        assert (width**2 > VISIBLE_PX) == named == ("dog" in scene.phrases)


def test_a_tinted_thing_keeps_its_class_and_says_its_colour(painter):
    scene = painter.draw_scene(Layout(ON_GRASS, (thing(CAR, 0.5, style="fluent", tint="blue"),), PLAIN, 0))
    assert scene.phrases == ("blue car", "grass")
    assert scene.classes == (CAR, GRASS)
    red, green, blue = scene.image[64, 64].astype(int)
    assert blue > red + 60
    assert blue > green + 60


def test_a_restyled_scene_differs_only_in_its_glyphs(painter):
    layout = sample_layout("heldout", 4)
    ours, theirs = painter.draw_scene(layout), painter.draw_scene(restyled(layout, "twemoji"))
    assert {t.style for t in restyled(layout, "twemoji").things} == {"twemoji"}
    outside = (ours.labels >= len(SCENE_OBJECTS)) & (theirs.labels == ours.labels)
    assert outside.sum() > 1000
    assert not np.array_equal(ours.labels, theirs.labels)
    assert restyled(layout, "twemoji")._replace(things=()) == layout._replace(things=())


def test_the_finish_is_brightness_and_contrast(painter):
    plain = painter.draw_scene(Layout(ON_GRASS, (thing(DOG, 0.5),), PLAIN, 0)).image.astype(float)
    done = painter.draw_scene(Layout(ON_GRASS, (thing(DOG, 0.5),), (10.0, 0.9, 0.0, 0.0), 0)).image
    np.testing.assert_array_equal(done, ((plain - 128) * 0.9 + 138).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("tint", TINTS)
def test_tints_look_like_their_names_and_spare_the_tyres(tint):
    car = np.zeros((20, 20, 4), np.uint8)
    car[:15] = (240, 140, 20, 255)  # a body
    car[15:] = (30, 30, 30, 255)  # tyres
    car[0, :, 3] = 90
    tinted = tint_glyph(car, tint)
    np.testing.assert_array_equal(tinted[15:], car[15:])
    np.testing.assert_array_equal(tinted[..., 3], car[..., 3])
    red, green, blue = tinted[7, 7, :3].astype(int)
    assert {
        "red": red > 150 and green < 100 and blue < 100,
        "green": green > 120 and red < 100 and blue < 100,
        "blue": blue > 150 and red < 100 and green < 130,
        "yellow": red > 180 and green > 150 and blue < 100,
        "white": min(red, green, blue) > 190,
        "black": max(red, green, blue) < 80,
    }[tint]


@pytest.mark.parametrize("tint", TINTS)
def test_tints_keep_shading_and_change_luminance(tint):
    """Ten shades of orange come out in the same order of luminance, but not with the luminance they had."""
    shades = np.linspace(0.35, 1, 10)[:, None] * np.array([240, 120, 10])
    glyph = np.full((10, 3, 4), 255, np.uint8)
    glyph[..., :3] = shades[:, None]
    weights = np.array([0.299, 0.587, 0.114])
    before, after = (x[:, 0, :3] @ weights for x in (glyph, tint_glyph(glyph, tint)))
    assert (np.diff(before) > 0).all()
    assert (np.diff(after) >= -1).all()  # colours are whole numbers
    assert after[-1] - after[0] > 20
    assert abs(after - before).max() > 20


def test_captions_name_everything_once_with_the_right_article():
    phrases = ("red car", "apple", "umbrella", "grass", "sky")
    rng, orders, sentences = np.random.default_rng(0), set(), set()
    for _ in range(400):
        text = caption(phrases, rng)
        assert all(len(re.findall(rf"\b{p}\b", text)) == 1 for p in phrases), text
        assert not re.search(r"\ba (apple|umbrella)|\ban (red car|grass|sky)|  |\{", text), text
        assert not any(name in re.findall(r"[a-z]+", text) for name in ("dog", "water", "key")), text
        orders.add(tuple(sorted(phrases, key=text.index)))
        sentences.add(text)
    assert len(orders) > 20
    assert len(sentences) > 200
    assert any("an apple" in text for text in sentences)


def test_captions_of_stuff_alone_and_of_a_part():
    rng = np.random.default_rng(1)
    assert {"grass"} == {w for _ in range(50) for w in re.findall(r"grass|sky|dog", caption(("grass",), rng))}
    named = [set(re.findall(r"dog|car|sky", caption(("dog", "car", "sky"), rng, subset=True))) for _ in range(300)]
    assert {frozenset(n) for n in named} == {
        frozenset(part) for part in (["dog"], ["car"], ["sky"], ["dog", "car"], ["dog", "sky"], ["car", "sky"])
    } | {frozenset(("dog", "car", "sky"))}


def test_masks_survive_png_and_images_nearly_survive_jpeg():
    labels = np.random.default_rng(0).integers(0, 66, (SIDE, SIDE), dtype=np.uint8)
    stored = Image.open(io.BytesIO(make_scenes.encode_png(labels)))
    assert stored.mode == "P"
    np.testing.assert_array_equal(np.asarray(stored), labels)
    # Pascal VOC's own first colours.
    assert stored.getpalette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    image = draw_ground(ON_GRASS)[0].clip(0, 255).astype(np.uint8)
    again = Image.open(io.BytesIO(make_scenes.encode_jpeg(image)))
    assert np.abs(np.asarray(again, float) - image).mean() < 4


@pytest.fixture(scope="module")
def shipped():
    with zipfile.ZipFile(make_scenes.ZIP) as pack:
        yield pack


@pytest.mark.parametrize("split", ["heldout", "heldout_twemoji"])
def test_the_shipped_scenes_are_the_generators(shipped, split):
    """Without the fonts: names, styles and backgrounds of the shipped scenes follow from the seeds."""
    assert json.loads(shipped.read("classes.json")) == list(SCENE_CLASSES)
    records = json.loads(shipped.read("scenes.json"))[split]
    assert len(records) == 500
    for i, record in enumerate(records):  # all of them: a changed probability shows in a few scenes only
        layout = sample_layout("heldout", i)
        styles = {t.label: "twemoji" if split == "heldout_twemoji" else t.style for t in layout.things}
        names = {t.label: f"{t.tint} {SCENE_OBJECTS[t.label]}".strip() for t in layout.things}
        for phrase, label, style in zip(*(record[k] for k in ("phrases", "classes", "styles")), strict=True):
            assert phrase == names.get(label, SCENE_CLASSES[label])
            assert style == styles.get(label, "procedural")
        if i % 50:
            continue
        labels = np.asarray(Image.open(io.BytesIO(shipped.read(f"{split}/labels/{i:04d}.png"))))
        stuff = draw_ground(layout.ground)[1] + len(SCENE_OBJECTS)
        bare = labels >= len(SCENE_OBJECTS)
        np.testing.assert_array_equal(labels[bare], stuff[bare])
        assert set(labels[~bare].tolist()) <= set(styles)
        counts = np.bincount(labels.ravel(), minlength=66)
        assert set(record["classes"]) == set(np.flatnonzero(counts > VISIBLE_PX).tolist())


def test_the_package_carries_the_first_64_of_them(shipped):
    assert json.loads((make_scenes.ASSETS / "classes.json").read_text()) == list(SCENE_CLASSES)
    for part, suffix in (("images", "jpg"), ("labels", "png")):
        files = sorted(path.name for path in (make_scenes.ASSETS / part).iterdir())
        assert files == [f"{i:04d}.{suffix}" for i in range(64)]
        for name in files:
            assert (make_scenes.ASSETS / part / name).read_bytes() == shipped.read(f"heldout/{part}/{name}")
