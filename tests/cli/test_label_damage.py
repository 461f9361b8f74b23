"""`label` after damage, odd names and full disks: the same command ends in what a quiet run leaves, or one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_outputs import WORDS
from label_outputs import COUNT, Killed, check_manifest, tree

from maskclip_jax.errors import UserError
from maskclip_jax.label import store as label_store
from maskclip_jax.label.corpus import open_corpus
from maskclip_jax.label.folder import begin


def damaged(path: Path, kind: str) -> bytes:
    content = path.read_bytes()
    middle = len(content) // 2
    return {
        "zero bytes": b"",
        "half": content[:middle],
        "without the end": content[:-2],
        "zeros": bytes(len(content)),
        "not UTF-8": b"\xff" + content,
        "another type": b"[1, 2]\n",
        "random": np.random.default_rng(0).bytes(len(content)),
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[kind]


DAMAGES = ("one bit", "zero bytes", "half", "without the end", "zeros", "not UTF-8", "another type", "random")
ALL_KINDS = ("--confidence", "--top-k", "2", "--features")


@pytest.fixture
def finished(label, photos, tmp_path):
    """What quiet runs leave, as files and as records."""
    assert label(photos, *ALL_KINDS, out="png").code == 0
    assert label(photos, "--format", "records", "--confidence", out="records").code == 0
    return {"png": ALL_KINDS, "records": ("--format", "records", "--confidence")}


@pytest.mark.parametrize("form", ["png", "records"])
def test_whatever_is_damaged_is_made_again(label, photos, tmp_path, finished, form):
    """A file of every sort, in every way: while the folder says that all is done, and when its shards are torn too."""
    out = tmp_path / form
    before = tree(out)
    sorts = {"png": ("labels/b/c/05.png", "confidence/b/c/05.png", "cells/b/c/05.safetensors"), "records": ()}[form]
    sorts += (*tuple(path for path in before if "array_record" in path)[-1:], "manifest.json")
    shards = [path for path in before if path.startswith("shards/")]
    assert len(shards) == 2
    for place, kind in enumerate(DAMAGES):
        victims = (*sorts, *((), shards[1:], ("label.json",), (shards[0], "label.json"))[place % 4])
        for victim in victims:
            (out / victim).write_bytes(damaged(out / victim, kind))
        result = label(photos, *finished[form], out=form)
        assert (result.code, result.errors) == (0, []), (kind, victims)
        assert tree(out) == before, (kind, victims)


def test_settings_that_are_others_now_are_refused(label, photos, tmp_path):
    """A bit of label.json has changed, and it is JSON all the same."""
    assert label(photos).code == 0
    path = tmp_path / "out" / "label.json"
    path.write_text(path.read_text().replace('"shard_size": 6', '"shard_size": 7'))
    result = label(photos)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "shard_size was 7 and is 6" in result.errors[0]


def test_a_setting_that_is_not_there_differs_from_none(tmp_path):
    """Another version knows other settings; long values are told apart, though messages cut them."""
    names = [f"class {i}" for i in range(500)]
    for before, now, words in (
        ({"a": 1}, {"a": 1, "short_side": None}, "short_side was not there and is None"),
        ({"a": 1, "b": None}, {"a": 1}, "b was None and is not there"),
        ({"a": names}, {"a": [*names[:-1], "x"]}, r"a was \['class 0'.* and is \['class 0'"),
    ):
        (tmp_path / "label.json").write_text(json.dumps(before))
        with pytest.raises(UserError, match=words):
            begin(tmp_path, now)


def test_damaged_settings_are_refused_where_nothing_tells(label, photos, tmp_path):
    assert label(photos).code == 0
    (tmp_path / "out" / "label.json").write_bytes(b"")
    result = label(photos, classes="sky, dog")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "nothing tells that all in" in result.errors[0]
    assert (tmp_path / "out" / "label.json").read_bytes() == b""


def test_waiting_records_that_are_damaged_are_made_again(label, photos, tmp_path, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(label_store.RecordStore, "seal", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            label(photos, *finished["records"])
    parts = sorted((tmp_path / "out" / ".partial" / "shard-00000").iterdir())
    assert len(parts) == 6
    for part, kind in zip(parts[1:], ("zero bytes", "half", "without the end", "random", "one bit"), strict=True):
        part.write_bytes(damaged(part, kind))
    saved, save = [], label_store.RecordStore.save
    monkeypatch.setattr(
        label_store.RecordStore, "save", lambda self, found: saved.append(found.name) or save(self, found)
    )
    assert label(photos, *finished["records"]).code == 0
    assert len(saved) == COUNT - 1  # what was whole is not made again
    assert tree(tmp_path / "out") == tree(tmp_path / "records")


def copied(photos: Path, data: Path) -> Path:
    for image in photos.rglob("*.*"):
        target = data / image.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
    return data


@pytest.mark.parametrize("form", ["png", "records"])
def test_skipped_images_are_tried_again(label, photos, tmp_path, finished, form):
    """Not repaired, they are skipped again; repaired, the folder becomes what it would have been."""
    data = copied(photos, tmp_path / "data")
    whole = (data / "a" / "02.jpg").read_bytes()
    (data / "a" / "02.jpg").write_bytes(whole[:50])
    assert label(data, *finished[form]).code == 0
    check_manifest(tmp_path / "out", COUNT - 1, 1)
    torn = tree(tmp_path / "out")
    assert label(data, *finished[form]).code == 0
    assert tree(tmp_path / "out") == torn
    (data / "a" / "02.jpg").write_bytes(whole)
    result = label(data, *finished[form])
    assert (result.code, result.errors) == (0, [])
    check_manifest(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / form)


@pytest.mark.filterwarnings("always:.* changed since their masks")
@pytest.mark.parametrize("form", ["png", "records"])
def test_images_that_have_changed_are_labelled_again(label, photos, tmp_path, form, monkeypatch):
    """Written anew, or put there with an older time of their own; what was only copied, touched or moved is not.

    Where nothing has changed nothing is written: a finished folder may lie on a disk that can only be read.
    """
    data, options, out = copied(photos, tmp_path / "data"), ("--format", form), tmp_path / "out"
    other, start = tmp_path / "other.jpg", 10**18

    def older(path, content):
        path.write_bytes(content)
        os.utime(path, ns=(start, start))

    assert label(data, *options).code == 0
    before = tree(out)
    for path in data.rglob("*.*"):
        path.touch()
    with monkeypatch.context() as patch:
        patch.delattr("maskclip_jax.label.folder.write_made")
        result = label(data, *options)
    assert (result.code, result.errors) == (0, [])
    assert tree(out) == before
    seen = [before]
    for place, picture in enumerate(("a/00.jpg", "a/04.jpg", "a/06.jpg")):
        content = (photos / picture).read_bytes()
        if place == 0:
            (data / "a" / "02.jpg").write_bytes(content)
        elif place == 1:
            older(other, content)
            other.rename(data / "a" / "02.jpg")
        else:  # a folder takes another's place: no file in it has changed, but for its size
            copied(data, tmp_path / "new")
            older(tmp_path / "new" / "a" / "02.jpg", content + bytes(8))
            for path in out.rglob("*"):
                os.utime(path)
            shutil.rmtree(data)
            (tmp_path / "new").rename(data)
        result = label(data, *options)
        warning = "warning: 1 images have changed since their masks were made, the first a/02: labelled again"
        assert (result.code, result.errors) == (0, [warning])
        seen.append(tree(out))
        assert label(data, *options).errors == []
        assert tree(out) == seen[-1]
        changed = {name for name in seen[-1] if seen[-1][name] != seen[-2][name] and not name.endswith(".json")}
        assert changed == {"labels/a/02.png"} if form == "png" else len(changed) == 1


@pytest.mark.parametrize("form", ["png", "records"])
def test_names_that_are_not_utf_8(label, photos, tmp_path, finished, form):
    data = copied(photos, tmp_path / "data")
    odd = os.fsdecode(b"caf\xe9")
    (data / "a" / "02.jpg").rename(data / "a" / f"{odd}.jpg")
    (data / "a" / f"{odd}2.jpg").write_bytes(b"no image")
    result = label(data, *finished[form])
    assert (result.code, len(result.errors)) == (0, 1)
    assert "skipped a/caf\\xe92" in result.errors[0].replace("\\udce9", "\\xe9")
    before = tree(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["images"] == COUNT
    if form == "png":
        assert f"labels/a/{odd}.png" in before
    assert label(data, *finished[form]).code == 0
    assert tree(tmp_path / "out") == before


def test_a_full_disk_is_one_line(label, photos, tmp_path, monkeypatch):
    """While records are sealed (array_record says RuntimeError) and while masks are written."""

    class Full:
        def __init__(self, path, options):
            Path(path).write_bytes(b"half")

        def write(self, record):
            raise RuntimeError("Failed to write: No space left on device")

        def close(self):
            raise RuntimeError("Failed to flush: No space left on device; writing at ...\n" * 30)

    with monkeypatch.context() as patch:
        patch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Full)
        result = label(photos, "--format", "records")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "(No space left on device): make room, run again" in result.errors[0]
    assert {path.name for path in (tmp_path / "out" / ".partial").iterdir()} == {"shard-00000"}
    assert label(photos, "--format", "records").code == 0
    check_manifest(tmp_path / "out")


@pytest.mark.slow
def test_records_are_the_same_bytes_in_another_process(label, photos, model, tmp_path):
    """Protobuf orders a map by a hash that changes from process to process."""
    assert label(photos, "--format", "records", "--confidence", "--top-k", "2").code == 0
    options = ["--classes", WORDS, "--model", model, "--format", "records", "--confidence", "--top-k", "2"]
    options += ["--out", tmp_path / "other", "--batch-size", "1", "--shard-size", "6"]
    run = [sys.executable, str(Path(__file__).parents[2] / "run.py"), "label", photos, *options]
    subprocess.run([str(part) for part in run], check=True, capture_output=True)
    assert tree(tmp_path / "other") == tree(tmp_path / "out")


def test_a_folder_without_sums_of_its_images_tells_by_their_times(photos, tmp_path):
    """As folders that were begun before there were sums do."""
    corpus = open_corpus(str(copied(photos, tmp_path)))
    written = corpus.changed_at(0)
    assert corpus.is_still(0, None, written)
    assert not corpus.is_still(0, None, written - 10**9)
