"""`export`: one line and exit code 2 for what cannot be, and nothing left behind."""

import errno
import shutil

import exports
import pytest

from maskclip_jax import cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    photos = exports.write_photos(folder / "photos")
    exports.write_labels(folder / "labels", photos)
    exports.write_labels(folder / "unsure", photos, sure=False)
    exports.write_labels(folder / "colons", photos, classes=("a:b", "a_b", "c"))
    exports.write_segments(folder / "segments", photos)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch, capsys):
    def call(*words: str):
        if not (tmp_path / "here").exists():
            shutil.copytree(finished, tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        before = set((tmp_path / "here").rglob("*"))
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", *words])
        made = set((tmp_path / "here").rglob("*")) - before
        output = capsys.readouterr()
        return stop.value.code, output.out.splitlines(), output.err.splitlines(), made

    return call


def test_it_says_what_it_wrote(run):
    code, lines, errors, _ = run("labels", "--to", "coco", "--images", "photos", "--out", "new/coco")
    assert (code, lines) == (0, ["new/coco holds the masks of 5 images for coco"])
    assert errors == ["warning: 1 images are stored turned (EXIF), masks are upright: --media copy turns images"]


IMAGES = ("--images", "photos")
WRONG = {
    "no format": (("labels", "--to", "lmdb", "--out", "x"), "invalid choice: 'lmdb'"),
    "nothing there": (("gone", "--to", "voc", "--out", "x"), "gone is not there"),
    "another folder": (("photos", "--to", "voc", "--out", "x"), "has neither label.json nor segment.json"),
    "no images": (("labels", "--to", "coco", "--out", "x"), "add --images FOLDER"),
    "other images": (("labels", "--to", "coco", "--images", "photos/sub", "--out", "x"), "has none called 'a'"),
    "out is taken": (("labels", "--to", "voc", "--out", "photos"), "photos holds something"),
    "out is a file": (("labels", "--to", "voc", "--out", "photos/a.jpg"), "holds something"),
    "out among images": (("labels", "--to", "yolo", *IMAGES, "--out", "photos/x"), "photos/x is in photos"),
    "unsure": (("unsure", "--to", "voc", "--min-confidence", "0.5", "--out", "x"), "label with --confidence"),
    "names that meet": (("colons", "--to", "cvat", "--out", "x"), "two become 'a_b'"),
    "empty part": (("labels", "--to", "voc", "--split", "a=0.95,b=0.05", "--out", "x"), "b has none of 5"),
    "shares": (("labels", "--to", "voc", "--split", "a=0.5,b=0.6", "--out", "x"), "shares that add up to 1"),
    "parts of yolo": (("labels", "--to", "yolo", *IMAGES, "--split", "a=1", "--out", "x"), "`train`"),
    "yolo per class": (("labels", "--to", "yolo", *IMAGES, "--per", "class", "--out", "x"), "got --per class"),
    "media": (("labels", "--to", "webdataset", *IMAGES, "--media", "link", "--out", "x"), "--media is copy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(run, name):
    words, message = WRONG[name]
    code, lines, errors, made = run(*words)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert message in errors[0]
    assert not made


def damaged(folder):
    (folder / "labels" / "labels" / "a.png").write_bytes((folder / "labels" / "labels" / "e.png").read_bytes())


def unfinished(folder):
    (folder / "labels" / "manifest.json").unlink()


def undone(folder):
    next((folder / "labels" / "shards").iterdir()).unlink()


def other_size(folder):
    shutil.copy(folder / "photos" / "e.png", folder / "photos" / "a.jpg")


def lost(folder):
    next((folder / "labels" / "labels").rglob("*.png")).unlink()


def emptied(folder):
    next((folder / "labels" / "labels").rglob("*.png")).write_bytes(b"")


def torn(folder):
    (folder / "segments" / "3.json").write_text("")


def gone(folder):
    (folder / "photos" / "a.jpg").unlink()


STATES = {
    damaged: ("labels", "masks are as they were written"),
    lost: ("labels", "is not: run the same `label` command again"),
    emptied: ("labels", "is not: run the same `label` command again"),
    unfinished: ("labels", "is not finished: run the same `label` command again"),
    undone: ("labels", "is not finished"),
    other_size: ("labels", "'a' are 53×37 and 130×9"),
    gone: ("labels", "has none called 'a'"),
    torn: ("segments", "3.json is not as `segment` writes it: segment that image again"),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("form", ["coco", "webdataset"])
def test_wrong_states(run, finished, tmp_path, state, form):
    shutil.copytree(finished, tmp_path / "broken")
    state(tmp_path / "broken")
    source, message = STATES[state]
    images = str(tmp_path / "broken" / "photos")
    code, _, errors, made = run(str(tmp_path / "broken" / source), "--to", form, "--images", images, "--out", "x")
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not made


def test_images_of_segment_that_were_moved(run, finished, tmp_path):
    run("labels", "--to", "voc", "--out", "x")  # copies the finished folders
    here = tmp_path / "here"
    for path in (here / "segments").glob("?.json"):
        path.write_text(path.read_text().replace(str(finished), "/nowhere"))
    code, _, errors, made = run("segments", "--to", "yolo", "--out", "y")
    assert (code, len(errors), made) == (2, 1, set())
    assert "say where with --images" in errors[0]
    assert run("segments", "--to", "yolo", "--images", "photos", "--out", "y")[0] == 0


def test_segments_of_two_lists_of_classes(run, tmp_path):
    run("labels", "--to", "voc", "--out", "x")
    path = tmp_path / "here" / "segments" / "3.json"
    path.write_text(path.read_text().replace("dog", "cat"))
    code, _, errors, made = run("segments", "--to", "voc", "--out", "y")
    assert (code, len(errors), made) == (2, 1, set())
    assert "several lists of them" in errors[0]


def test_a_full_disk(run, monkeypatch):
    """Whatever file it is that has no room."""
    from maskclip_jax.data import whole_files

    sync, left = whole_files.sync, [4]

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(whole_files, "sync", full)
    for form in ("voc", "cvat", "yolo"):
        left[0] = 1 if form == "cvat" else 4
        code, _, errors, made = run("labels", "--to", form, *IMAGES, "--out", "x")
        assert (code, len(errors), made) == (2, 1, set())
        assert "No space left on device" in errors[0]
