"""Pictures: colours where the masks are, legends that tell the truth, sheets whose panels lie where they should."""

from pathlib import Path

import numpy as np
import pytest

from maskclip_jax import visualize as vi
from maskclip_jax.data import fonts
from maskclip_jax.errors import UserError

PALETTE = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 255]], np.uint8)


def test_overlay_tints_masks_and_leaves_the_ignored():
    rgb = np.full((20, 30, 3), 100, np.uint8)
    labels = np.zeros((20, 30), int)
    labels[:, 20:] = 1
    labels[15:, :10] = 255
    picture = vi.overlay(rgb, labels, PALETTE, opacity=0.5, border=1)
    assert picture.shape == rgb.shape
    assert picture[5, 5].tolist() == [178, 50, 50]  # (100 + 255)/2 = 177.5 rounded to even, 100/2
    assert picture[5, 25].tolist() == [50, 150, 50]
    assert picture[18, 3].tolist() == [100, 100, 100]
    assert picture[5, 19].tolist() == picture[5, 20].tolist() == [255, 255, 255]  # the border, on both sides
    assert picture[5, 18].tolist() == PALETTE[0].tolist()  # inside it each class's own colour
    assert picture[5, 21].tolist() == PALETTE[1].tolist()
    assert picture[0, 0].tolist() == [178, 50, 50]  # the image's edge is no border


def test_overlay_keeps_texture():
    rgb = np.zeros((4, 4, 3), np.uint8)
    rgb[0] = 200
    picture = vi.overlay(rgb, np.zeros((4, 4), int), PALETTE)
    assert (picture[0].astype(int) - picture[1] > 50).all()


def test_overlay_does_not_mutate_and_takes_255_as_a_class():
    rgb = np.zeros((2, 2, 3), np.uint8)
    palette = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 3))
    picture = vi.overlay(rgb, np.full((2, 2), 255), palette, opacity=1.0)
    assert (picture == 255).all()
    assert not rgb.any()


@pytest.mark.parametrize("bad", [3, -1, 254])
def test_a_label_without_a_colour_is_refused(bad):
    with pytest.raises(UserError, match=f"got {bad} with 3 colours"):
        vi.overlay(np.zeros((2, 2, 3), np.uint8), np.array([[0, bad], [1, 255]]), PALETTE)


def test_an_outline_is_drawn_in_place_of_the_masks_own_borders():
    rgb, mask, truth = np.full((9, 9, 3), 100, np.uint8), np.zeros((9, 9), int), np.zeros((9, 9), int)
    mask[:, 6:], truth[:, 3:] = 1, 2
    picture = vi.overlay(rgb, mask, PALETTE, outline=truth)
    assert (picture[:, 2:4] == 255).all()
    assert (picture[:, :2] == picture[0, 5]).all()  # no border where the mask changes, none of its colours inside
    assert (picture[:, 6:] == picture[0, 8]).all()


def test_enlarged_masks_are_the_same_with_round_corners():
    rgb, labels = np.zeros((12, 16, 3), np.uint8), np.zeros((12, 16), np.uint16)
    labels[:, 8:] = 300
    image, large = vi.enlarge(rgb, labels, 3)
    assert image.shape == (36, 48, 3)
    assert large.dtype == labels.dtype
    np.testing.assert_array_equal(large, labels.repeat(3, 0).repeat(3, 1))  # a straight border stays where it is
    corner = np.zeros((8, 8), np.uint8)
    corner[:4, :4] = 1
    corner[:4, 4:] = 255
    large = vi.enlarge(rgb[:8, :8], corner, 4)[1]
    assert set(np.unique(large)) == {0, 1, 255}
    assert (large[0, 0], large[0, -1], large[-1, -1]) == (1, 255, 0)
    assert (large != corner.repeat(4, 0).repeat(4, 1)).mean() < 0.02


def test_area_legend_is_sorted_and_honest():
    labels = np.array([[0, 2, 2, 2], [255, 255, 0, 2], [2, 2, 2, 2]])
    entries = vi.area_legend(labels, ["a", "b", "c"], PALETTE)
    assert entries == [("c", (0, 0, 255), "66.7%"), ("a", (255, 0, 0), "16.7%")]
    many = np.arange(12).reshape(3, 4)
    entries = vi.area_legend(many, [f"n{i}" for i in range(12)], np.zeros((12, 3), np.uint8), most=3)
    assert [(e.name, e.note) for e in entries] == [("n0", "8.3%"), ("n1", "8.3%"), ("and 10 more", "83.3%")]
    rare = np.zeros((100, 100), int)
    rare[0, 0] = 1
    assert vi.area_legend(rare, ["a", "b"], PALETTE)[1].note == "<0.1%"


@pytest.mark.parametrize("shape", [(1, 1), (37, 501), (501, 37), (96, 96), (900, 1200)])
def test_overlay_with_legend_at_any_size(shape):
    labels = np.zeros(shape, int)
    labels[:, shape[1] // 2 :] = 2
    picture = vi.overlay_with_legend(np.zeros((*shape, 3), np.uint8), labels, ["dog", "cat", "sky"], PALETTE)
    factor = max(1, 512 // max(shape))
    height = shape[0] * factor
    assert picture.shape[1] >= max(shape[1] * factor, 280)  # room for text under any image
    legend = picture[height:]
    assert (legend < 100).all(-1).sum() > 20  # there is ink
    for index in set(labels.ravel().tolist()):
        assert (legend == PALETTE[index]).all(-1).sum() > 50  # and a swatch per class present
    assert not (legend == PALETTE[1]).all(-1).any()


def test_a_picture_is_not_mirrored():
    rgb = np.zeros((60, 90, 3), np.uint8)
    labels = np.zeros((60, 90), int)
    labels[:20, :30] = 1  # top left only
    picture = vi.overlay_with_legend(rgb, labels, ["a", "b", "c"], PALETTE, smallest=1)
    green = (picture[:60, :90, 1] > picture[:60, :90, 0]) & (picture[:60, :90, 2] < 50)
    rows, columns = np.nonzero(green)
    assert rows.max() < 21
    assert columns.max() < 31


def test_names_and_colours_must_match():
    with pytest.raises(UserError, match="2 names and 3 colours"):
        vi.overlay_with_legend(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), ["a", "b"], PALETTE)


def test_long_legends_stay_inside():
    entries = [vi.LegendEntry("a name that never ends " * 9, (1, 2, 3), "99.9%")] * 3
    assert vi.draw_legend(entries, 200).shape[1] == 200
    assert (vi.draw_legend(entries, 200)[:, -1] == 255).all()
    assert (vi.draw_legend([], 50) == 255).all()


def test_comparison_sheet_puts_panels_in_reading_order():
    def flat(value):
        return np.full((10, 10, 3), value, np.uint8)

    rows = [[flat(10), flat(20)], [flat(30), flat(40)]]
    sheet = vi.comparison_sheet(["left", "right"], rows, panel=50)
    centres = {}
    for value in (10, 20, 30, 40):
        where = np.argwhere((sheet == value).all(-1))
        assert len(where) >= 2500
        centres[value] = np.median(where, axis=0)
    assert centres[10][1] < centres[20][1]
    assert centres[10][0] == centres[20][0]
    assert centres[10][0] < centres[30][0]
    assert centres[10][1] == centres[30][1]
    more = vi.comparison_sheet(
        ["left", "right"],
        rows,
        captions=[["", "4.1"], ["x", "y"]],
        legend=[vi.LegendEntry("dog", (250, 1, 2))],
        heading="a heading",
        panel=50,
    )
    assert more.shape[0] > sheet.shape[0]
    assert more.shape[1] == sheet.shape[1]
    assert (more == np.array([250, 1, 2])).all(-1).any()


def test_notes_are_broken_to_the_columns_width():
    panel = np.full((50, 50, 3), 9, np.uint8)
    plain = vi.comparison_sheet(["a", "b"], [[panel, panel]], panel=50)
    noted = vi.comparison_sheet(["a", "b"], [[panel, panel]], notes=["1.0\nwords that need lines", ""], panel=50)
    assert noted.shape[1] == plain.shape[1]
    above = noted[: noted.shape[0] - 58]
    ink = np.argwhere((above[plain.shape[0] - 58 :] < 200).all(-1))
    assert len(ink) > 20
    assert ink[:, 1].max() < 8 + 50 + 4  # none of it in the other column
    first, *lines = vi._wrap("1.0\nwords that need lines", 11, 90)
    assert first == "1.0"
    assert " ".join(lines) == "words that need lines"
    assert 1 < len(lines) < 4


def test_comparison_sheet_keeps_the_aspect_and_refuses_gaps():
    wide = np.full((10, 40, 3), 7, np.uint8)
    where = np.argwhere((vi.comparison_sheet(["a"], [[wide]], panel=80) == 7).all(-1))
    assert (where.max(0) - where.min(0) + 1).tolist() == [20, 80]
    with pytest.raises(UserError, match="one picture per column"):
        vi.comparison_sheet(["a", "b"], [[wide]])
    with pytest.raises(UserError, match="captions"):
        vi.comparison_sheet(["a"], [[wide]], captions=[])


def test_heat_map_is_brightest_where_the_score_is():
    scores = np.zeros((40, 60), np.float32)
    scores[5:15, 40:55] = 0.8
    scores[0, 0] = np.nan
    picture = vi.heat_map(np.full((40, 60, 3), 128, np.uint8), scores, name="dog", smallest=1)[:40, :60].astype(int)
    assert picture[10, 48].sum() > picture[30, 10].sum() + 100
    assert picture[10, 48, 0] > picture[10, 48, 2]  # yellow there,
    assert picture[30, 10, 2] > picture[30, 10, 1]  # violet elsewhere
    flat = vi.heat_map(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32))
    assert flat.dtype == np.uint8
    with pytest.raises(UserError, match="finite"):
        vi.heat_map(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), np.nan, np.float32))


@pytest.mark.parametrize("count", [0, 1, 9, 20_000])
def test_long_names_are_shortened_to_what_fits(count):
    font = fonts.default_font(20)
    found = vi._shorten("dog" * count, font, 200)
    assert found == "dog" * count if count < 9 else found[-1] == "…"
    assert font.getlength(found) <= 200 < font.getlength(f"{found[:-1]}dog…") or count < 9


READ = {
    "größter Hund": "grosster Hund",
    "e\u0301lan, Łódź, Ænima": "elan, Lodz, Aenima",
    "собака Ёлка": "sobaka Elka",
    "σκύλος": "skylos",
    "いぬ": "inu",
    "개": "gae",
    "犬": "U+72AC",
    "🐕 wow": "dog wow",
    "“q” – a\u200bb\n c": '"q" - ab c',
}


@pytest.mark.parametrize("text", READ)
def test_names_are_readable_without_a_font_for_them(monkeypatch, text):
    """Never a box: what is drawn has a picture in the font for each of its letters."""
    monkeypatch.setattr(fonts, "_system_fonts", tuple)
    drawn, font = fonts.lettering(text, 20)
    assert drawn == READ[text]
    box = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(letter)) != box for letter in drawn if letter != " ")
    same = [vi.LegendEntry(text, (1, 2, 3), "5%")], [vi.LegendEntry(READ[text], (1, 2, 3), "5%")]
    first, second = (vi.draw_legend(entries, 400) for entries in same)
    np.testing.assert_array_equal(first, second)


def test_a_font_of_the_system_is_taken_where_it_has_the_letters(monkeypatch):
    """The first that has them all; ASCII and the numbers stay in Pillow's own."""
    letters = {None: "", "no": "", "latin": "é", "all": "é犬"}
    sizes = {"latin": 11, "all": 12}  # to tell them apart

    def has(file, wanted):
        return all(letter.isascii() or letter in letters[file and file.stem] for letter in wanted)

    monkeypatch.setattr(fonts, "_system_fonts", lambda: (Path("no.ttf"), Path("latin.ttf"), Path("all.ttf")))
    monkeypatch.setattr(fonts, "_has", has)
    monkeypatch.setattr(fonts, "_loaded", lambda file, size: fonts.default_font(sizes[file.stem]))
    for text, drawn, size in (("e\u0301te", "éte", 11), ("é犬", "é犬", 12), ("dog", "dog", 20), ("猫", "U+732B", 20)):
        found, font = fonts.lettering(text, 20)
        assert (found, font.size) == (drawn, size)


def test_a_damaged_font_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_system_fonts", lambda: (tmp_path / "a.ttf",))
    assert fonts.lettering("é", 20)[0] == "e"
