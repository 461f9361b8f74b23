"""`Session`: the tower once per image, the files that `segment` writes, an image for whoever sent it alone."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from tiny_distill import trained_student
from web_calls import same_record

from maskclip_jax import cli
from maskclip_jax.data.vocabulary import as_classes
from maskclip_jax.errors import UserError
from maskclip_jax.segment.predict import segment_images
from maskclip_jax.web import warmup
from maskclip_jax.web.models import Models
from maskclip_jax.web.request import SegmentRequest, read_request
from maskclip_jax.web.session import SHOWN, Gone, Session, scene_names, shown_size

WORDS = "sheep, ball, sun, person, sand, sky"


def asking(image="0005", classes=WORDS, **options) -> SegmentRequest:
    return read_request(json.dumps({"image": image, "classes": classes, "templates": "scene"} | options).encode())


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def decoded(file) -> np.ndarray:
    with Image.open(io.BytesIO(file.data)) as image:
        return np.array(image)


def token(answer) -> str:
    return answer["files"]["labels"].split("/")[3]


def test_the_tower_runs_once_for_an_image(session):
    first = session.segment(asking())
    assert first["image_tower_ran"]
    for options in ({"classes": "dog, sand"}, {"prompt_denoising": 0.9}, {"key_smoothing": 0.9}, {"background": "sky"}):
        again = session.segment(asking(**({"classes": "sheep, sand"} | options)))
        assert not again["image_tower_ran"]
    assert session.tower_runs == 1
    assert session.segment(asking(method="naive"))["image_tower_ran"]
    assert session.segment(asking("0038"))["image_tower_ran"]
    assert session.tower_runs == 3


def test_the_answer(session):
    answer = session.segment(asking())
    assert (answer["image"], answer["height"], answer["width"]) == ("0005.jpg", 128, 128)
    assert [entry["class"] for entry in answer["classes"]] == WORDS.split(", ")
    assert sum(entry["area"] for entry in answer["classes"]) == pytest.approx(1)
    assert set(answer["seconds"]) == {"words", "image", "masks", "all"}
    shown, labels = (decoded(session.file(token(answer), kind)) for kind in ("shown.png", "labels.png"))
    assert shown.shape == (128, 128, 3)
    np.testing.assert_array_equal(shown[..., 0] + 256 * shown[..., 1].astype(int), labels)
    for entry in answer["classes"]:
        here = labels == entry["index"]
        assert entry["area"] == pytest.approx(here.mean())
        if entry["area"]:
            assert shown[..., 2][here].mean() / 255 == pytest.approx(entry["confidence"], abs=1 / 255)


def test_the_files_are_those_of_segment(session, tmp_path, monkeypatch, capsys):
    """Pixel for pixel, larger than what is shown, features kept from another question; means to rounding."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((SHOWN + 40, 600), Image.Resampling.BICUBIC))
    (tmp_path / "a photo.png").write_bytes(png(pixels))
    monkeypatch.chdir(tmp_path)
    arguments = ["segment", "a photo.png", "--classes", WORDS, "--templates", "scene", "--prompt-denoising", "0.2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--out", "out"])
    assert stopped.value.code == 0, capsys.readouterr().err

    image = session.receive(png(pixels), "a photo.png")["image"]
    session.segment(asking(image, "dog, sun"))
    answer = session.segment(asking(image, prompt_denoising=0.2))
    assert session.tower_runs == 1
    for kind, name in {"labels.png": "_labels.png", "result.json": ".json", "overlay.png": "_overlay.png"}.items():
        file = session.file(token(answer), kind)
        assert file.name == f"a photo{name}"
        written = (tmp_path / "out" / file.name).read_bytes()
        if kind != "result.json":
            assert file.data == written, kind
            continue
        assert same_record(file.data, written)
    areas = {
        entry["class"]: entry["area"]
        for entry in json.loads(session.file(token(answer), "result.json").data)["classes"]
    }
    assert sum(area > 0 for area in areas.values()) > 1
    for entry in answer["classes"]:  # of the size shown
        assert entry["area"] == pytest.approx(areas[entry["class"]], abs=0.01)


@pytest.mark.parametrize("options", [{"pamr": 2}, {"flip": True, "scales": [1, 1.25]}])
def test_pamr_and_views_are_those_of_segment(session, options):
    """Nothing is kept of them: the tower runs for every question."""
    answer = session.segment(asking(**options))
    reader = session.models.reader(None)
    classifier = reader.classifier(as_classes(WORDS.split(", ")), "scene")
    pixels = decoded(session.picture("0005"))
    (found,) = segment_images([pixels], WORDS, reader.pretrained, classifier=classifier, **options)
    np.testing.assert_array_equal(decoded(session.file(token(answer), "labels.png")), found.labels)
    np.testing.assert_array_equal(decoded(session.file(token(answer), "shown.png"))[..., 0], found.labels)
    assert session.segment(asking(**options))["image_tower_ran"]
    assert decoded(session.heat(token(answer), 1)).shape[1] == 512


def test_a_student_answers_with_its_own_classes(models):
    student = trained_student()
    names = list(student.config.label_names)
    shelf = Models(["a student"], lambda name: student)
    own = Session(shelf, most_pixels=1_000_000)
    for step in warmup.steps(own):
        step()
    assert shelf.students() == {"a student": names}
    assert shelf.recommended_denoising("a student") is None
    answer = own.segment(asking(classes=", ".join(names), templates=None))
    (found,) = segment_images([decoded(own.picture("0005"))], None, student)
    np.testing.assert_array_equal(decoded(own.file(token(answer), "labels.png")), found.labels)
    assert [entry["class"] for entry in answer["classes"]] == names
    assert decoded(own.heat(token(answer), 0)).shape[1] == 512
    for classes, options, message in (
        ("no such class", {}, "a student has the"),
        (names[0], {"method": "naive"}, "a student is read as it was trained, got method"),
        (names[0], {"pamr": 3}, "a student is read as it was trained, got pamr"),
    ):
        with pytest.raises(UserError, match=message):
            own.segment(asking(classes=classes, templates=None, **options))


def test_files_for_other_tools(session):
    """What `export` writes of the one image, image included."""
    answer = session.segment(asking(background="dog"))
    labels = decoded(session.file(token(answer), "labels.png"))
    for form, path in answer["files"]["exports"].items():
        file = session.file(token(answer), path.rsplit("/", 1)[1])
        assert file.name == f"0005_{form}.zip"
        with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
            assert archive.testzip() is None
            assert any(name.endswith(".jpg") for name in archive.namelist()), archive.namelist()
            if form == "coco":
                found = json.loads(archive.read("instances.json"))
    assert sum(entry["area"] for entry in found["annotations"]) == (labels > 0).sum()
    with pytest.raises(Gone, match=r"an answer has .*coco.zip.*, got stl.zip"):
        session.file(token(answer), "stl.zip")


def test_heat_is_the_probability(session):
    answer = session.segment(asking())
    for index in (1, 4):
        heat = decoded(session.heat(token(answer), index))
        assert heat.shape[1] == 512  # enlarged, with a scale below
        labels = decoded(session.file(token(answer), "labels.png")).repeat(4, 0).repeat(4, 1)
        bright = heat[:512].astype(float).sum(-1)
        assert bright[labels == index].mean() > bright[labels != index].mean() + 100
    with pytest.raises(Gone, match="classes 0 to 5, got 6"):
        session.heat(token(answer), 6)


def test_visitors_images_do_not_mix(session):
    red, blue = (np.full((40, 50, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
    tokens = [session.receive(png(pixels), "photo.png")["image"] for pixels in (red, blue, red)]
    assert len(set(tokens)) == 3
    for name, pixels in zip(tokens, (red, blue, red), strict=True):
        np.testing.assert_array_equal(decoded(session.picture(name)), pixels)


def test_what_is_forgotten_says_so(models):
    session = Session(models, keep=4)
    old = session.receive(png(np.zeros((8, 8, 3), np.uint8)), "old.png")["image"]
    session.receive(png(np.ones((8, 8, 3), np.uint8)), "new.png")
    with pytest.raises(Gone, match="this one is gone: load it again"):
        session.segment(asking(old))
    with pytest.raises(Gone, match="this one is gone: send the request again"):
        session.file("nothing", "labels.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "photo.png is empty"),
        (b"hello", "photo.png is none of them"),
        (
            png(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))[:4000],
            "photo.png is damaged or truncated",
        ),
        (png(np.zeros((1001, 1000, 3), np.uint8)), "at most 1,000,000 pixels here, but photo.png has 1,001,000"),
    ],
)
def test_what_is_no_image(session, data, message):
    with pytest.raises(UserError, match=message):
        session.receive(data, "photo.png")


def test_what_the_settings_refuse(session):
    for options, message in [
        ({"prompt_denoising": 1.5}, "prompt denoising takes a probability"),
        ({"stride": 8}, "stride"),
        ({"window": 8, "stride": 4}, "at most 256 windows, got 1225: make the stride larger"),
        ({"window": 8, "stride": 1}, "at most 4096 windows, but windows of 8 every 1 pixels make 18769"),
        ({"model": "other"}, "a model is one of embedded, embedded-resnet, got 'other'"),
        ({"background": "sun"}, "in one class only"),
        ({"templates": "no place for the name"}, "prompt templates must be one of"),
    ]:
        with pytest.raises(UserError, match=message):
            session.segment(asking(**options))


def test_the_scenes_are_there(session):
    names = scene_names()
    assert len(names) > 20
    assert session.scene(names[0]).data[:2] == b"\xff\xd8"
    for name in ("9999", "../labels/0005"):
        with pytest.raises(Gone, match="a scene is one of"):
            session.scene(name)


def test_sizes():
    assert shown_size((128, 128)) == (128, 128)
    assert shown_size((3000, 4000)) == (576, 768)
    assert shown_size((1, 9000)) == (1, 768)


def test_an_upload_is_read_as_a_file_is():
    """Turned as it says, in every format; too many pixels are told before anything is decoded."""
    session, pixels = (
        Session(Models(["none"], pytest.fail), most_pixels=1000),
        np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3),
    )
    for kind, options in (
        ("TIFF", {"tiffinfo": {274: 6}}),
        ("PNG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        found = session.receive(file.getvalue(), "a")
        assert (found["height"], found["width"]) == (30, 20)
        np.testing.assert_array_equal(decoded(session.picture(found["image"])), pixels[::-1].swapaxes(0, 1))
