"""Questions as they come: read, or one line that says what is wrong."""

import json

import pytest

from maskclip_jax.errors import UserError
from maskclip_jax.web.request import MOST_CLASSES, MOST_WORDS, read_request


def ask(**fields):
    return read_request(json.dumps({"image": "0005", "classes": "dog, grass"} | fields).encode())


def names(entries):
    return [", ".join(entry) for entry in entries]


def test_what_may_be_left_out():
    asked = ask()
    assert (asked.image, asked.model, asked.options.method) == ("0005", None, "maskclip")
    assert names(asked.classes) == ["dog", "grass"]
    assert set(asked.options.changed()) == {"cache"}
    assert ask(prompt_denoising=None, model=None, background=" ") == asked


@pytest.mark.parametrize(
    ("classes", "read"),
    [
        ("sofa, couch; dog", ["sofa, couch", "dog"]),
        ("dog,", ["dog"]),
        (["dog", "sofa,couch"], ["dog", "sofa, couch"]),
    ],
)
def test_words(classes, read):
    assert names(ask(classes=classes).classes) == read
    assert names(ask(classes="car", background=classes).options.background) == read


def test_a_class_set_by_name():
    assert len(ask(classes="voc20").classes) == 20


def test_the_servers_files_are_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("a password\n")
    assert names(ask(classes=str(tmp_path / "secret.txt")).classes) == [str(tmp_path / "secret.txt")]
    assert names(ask(background=str(tmp_path / "secret.txt")).options.background) == [str(tmp_path / "secret.txt")]


def test_options():
    asked = ask(method="naive", prompt_denoising=0.3, key_smoothing=1, window=96, stride=48, background_threshold=0.5)
    assert asked.options.method == "clip"
    assert (asked.options.prompt_denoising, asked.options.key_smoothing) == (0.3, 1)
    assert asked.options.windows == (96, 48)
    asked = ask(pamr=10, scales=[0.75, 1], flip=True)
    assert (asked.options.pamr, len(asked.options.views)) == (10, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": ""}, "at least one word is needed, got none"),
        ({"pamr": 51}, "at most 50 steps of PAMR"),
        ({"pamr": 1.5}, "pamr is a whole number of steps"),
        ({"scales": [1] * 5}, "and 4 sizes"),
        ({"scales": 1}, "scales is a list of sizes"),
        ({"scales": [1e400]}, "is no number"),
        ({"scales": ["1"]}, "a size is a number, got the text '1'"),
        ({"scales": [99]}, "scales are 0.0625 to 16"),
        ({"flip": 1}, "flip is true or false, got 1"),
        ({"classes": " \n"}, "at least one word is needed"),
        ({"classes": "dog,,cat"}, "has an empty one"),
        ({"classes": "dog, Dog"}, "in one class only"),
        ({"classes": None}, "needs an image and classes, but has no classes"),
        ({"classes": 5}, "text or a list of texts, got 5"),
        ({"classes": ["dog", 5]}, "text or a list of texts, got a list"),
        ({"classes": []}, "at least one class is needed"),
        ({"classes": "a" * 201}, "at most 200 letters, but aaa"),
        ({"classes": [f"w{i}" for i in range(500)]}, f"at most {MOST_CLASSES} classes, got 500"),
        ({"classes": ["a"], "background": [f"w{i}" for i in range(MOST_WORDS)]}, f"at most {MOST_WORDS} words"),
        ({"classes": [f"w{i}" for i in range(MOST_CLASSES)], "background": "sea"}, f"at most {MOST_CLASSES} classes"),
        ({"image": 5}, "image is text, got 5"),
        ({"method": "magic"}, "a method is one of maskclip, naive"),
        ({"prompt_denoising": "high"}, "prompt_denoising is a number above 0 and up to 1, got the text 'high'"),
        ({"prompt_denoising": True}, "prompt_denoising is a number above 0 and up to 1, got true"),
        ({"window": 9.5}, "window is a whole number of pixels, got 9.5"),
        ({"clases": "dog"}, "got clases: check the spelling"),
        ({"\ud800": 1}, "check the spelling"),
        ({"classes": "dog\udc80"}, "has one that is none"),
        ({"background": ["\ud800"]}, "has one that is none"),
        ({"image": "\ud800"}, r"image is made of characters, but '\\ud800' has half of one"),
        ({"templates": "\ud800 {}"}, "templates is made of characters"),
        ({"templates": "a {}" + "b" * 240_000}, "templates has at most 300 characters here, got 240,004"),
        ({"model": "x" * 1001}, "model has at most 1000 characters"),
        ({"window": 0}, "window is 1 to 4096 pixels here, got 0"),
        ({"window": 10**400}, "window is 1 to 4096 pixels here, got 1000"),
        ({"stride": -(10**20)}, "stride is 1 to 4096 pixels here"),
        ({"window": 1e20}, r"window is a whole number of pixels, got 1e\+20"),
        ({"prompt_denoising": 10**400}, "prompt_denoising is a number above 0 and up to 1, got 1000"),
        ({"key_smoothing": -(10**400)}, "key_smoothing is a number above 0 and up to 1, got -1000"),
    ],
)
def test_one_line_for_what_cannot_be_read(fields, message):
    with pytest.raises(UserError, match=message) as error:
        ask(**fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"dog",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        b'{"image": NaN}',
        b'"\\ud800"',
        b"1e20",
        b'{"window": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_question(body):
    with pytest.raises(UserError, match="a question"):
        read_request(body)
