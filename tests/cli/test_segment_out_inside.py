"""Results beside images: they are no images to the next run, and replace neither an image nor anybody's file."""

import json
from pathlib import Path

import pytest
from command_outputs import NAMES, TRAILS, check, written
from PIL import Image

from maskclip_jax.cli.segment import find_images
from maskclip_jax.errors import UserError
from maskclip_jax.segment.files import output_names

OURS = json.dumps({"image": "a.jpg", "height": 1, "width": 1, "classes": []})


def test_what_lies_below_out_is_left_out(tmp_path, capsys):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "outer").mkdir()
    for name in ("a.png", "out/a_overlay.png", "out/deep/b.png", "outer/c.png"):
        (tmp_path / name).touch()
    images = list(find_images([tmp_path], tmp_path / "out"))
    assert images == [tmp_path / "a.png", tmp_path / "outer" / "c.png"]
    assert capsys.readouterr().err == f"note: 2 results of earlier runs in {tmp_path} are no images\n"
    assert len(list(find_images([tmp_path]))) == 4


def test_results_are_known_by_the_record_beside_them(tmp_path):
    files = {"a.png": "", "a_overlay.png": "", "a_labels.png": "", "a.json": OURS}  # a result of an earlier run
    files |= {
        "dog_overlay.png": "",
        "dog.json": '{"shapes": []}',
        "cat_labels.png": "",
        "b_overlay.png": "",
        "b.json": "x",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = [path.name for path in find_images([tmp_path], tmp_path)]
    assert names == ["a.png", "b_overlay.png", "cat_labels.png", "dog_overlay.png"]
    (tmp_path / "only").mkdir()
    for name in ("a_overlay.png", "a.json"):
        (tmp_path / name).rename(tmp_path / "only" / name)
    with pytest.raises(UserError, match="has only results of an earlier run"):
        list(find_images([tmp_path / "only"]))


def test_names_that_are_taken(tmp_path):
    """By an image, by a file of the user's own (even one that the system takes for the same), or by another result."""
    for name in ("p_overlay.png", "q.json", "r.json", "r_overlay.png", "s_labels.png"):
        (tmp_path / name).write_text(OURS if name == "r.json" else "mine")
    given = [tmp_path / name for name in ("p.jpg", "p_overlay.png", "q.jpg", "r.jpg", "s.jpg", "t.jpg", "T.png")]
    names = output_names(given, tmp_path)
    assert list(names.values()) == ["p-2", "p_overlay", "q-2", "r", "s-2", "t", "T-2"]
    results = {tmp_path / (name + trail) for name in names.values() for trail in TRAILS}
    assert not results & {*given, tmp_path / "q.json", tmp_path / "s_labels.png"}
    assert list(output_names([Path("e\u0301.jpg"), Path("\u00e9.jpg")]).values()) == ["e\u0301", "\u00e9-2"]


def test_a_folder_of_images_may_take_its_results(segment, tmp_path, draw):
    """Two runs make what one makes, and the images stay as they are."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("photo.png", "photo_overlay.png"):
        Image.fromarray(draw(20, 30, len(name))).save(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    results = [segment(folder, out=folder) for _ in range(2)]
    assert [result.code for result in results] == [0, 0]
    assert [result.lines[-1] for result in results] == [f"wrote 2 of 2 images to {folder}"] * 2
    names = {"photo.png": "photo-2", "photo_overlay.png": "photo_overlay"}
    expected = {name + trail for name in names.values() for trail in TRAILS}
    assert written(folder) == {*names, *expected, "segment.json"}
    assert before == {path: path.read_bytes() for path in before}
    for name, stem in names.items():
        check(folder, stem, folder / name, NAMES)


def test_a_record_of_another_program_is_kept(segment, photo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "segment.json").write_text("{}")
    result = segment(photo)
    assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
    assert "segment.json" in result.errors[0]
    assert written(tmp_path / "out") == {"segment.json"}
