"""Lists of classes as people and programs give them: what is read, what is refused, and what is said."""

import re

import numpy as np
import pytest

from maskclip_jax.data.names import as_classes, read_list, shown
from maskclip_jax.data.vocabulary import parse_classes
from maskclip_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("dog\ncat\nsky", "dog cat sky"),
        ("dog\r\ncat\r\n", "dog cat"),
        (r"dog\ncat", "dog cat"),
        ("dog\tcat, sky", "dog cat sky"),
        ("\ufeffdog, \u200bcat", "dog cat"),
        ("dog,\ncat,\nsky", "dog cat sky"),
        ("dog; cat;", "dog cat"),
        ("sofa, couch;\ndog", "sofa+couch dog"),
        ('"dog, big", cat', "dog,_big cat"),
        ("'dog, big', cat", "dog,_big cat"),
        ("“dog, big”, cat", "dog,_big cat"),
        ('"a; b"; c, d', "a;_b c+d"),
        ('"say ""hi""", c', 'say_"hi" c'),
        ('5" pipe, 6" pipe', '5"_pipe 6"_pipe'),
        ("it's, 'tis, dog's", "it's 'tis dog's"),
        ('["dog", "cat"]', "dog cat"),
        ('[["sofa", "couch"], "dog"]', "sofa+couch dog"),
        ("['dog', 'cat']", "dog cat"),
        ("[dog, cat]", "dog cat"),
        ("- dog\n- cat", "dog cat"),
        ("names:\n  - dog\n  - cat", "dog cat"),
        ("# mine\ndog  # a pet\n\ncat", "dog cat"),
        ("#1 fan, dog", "#1_fan dog"),
        ("1, 2, 3", "1 2 3"),
        ("2 dogs\n3 cats", "2_dogs 3_cats"),
        ("狗，猫、天空", "狗 猫 天空"),
        ("狗，犬；猫", "狗+犬 猫"),
        ("e\u0301clair, dog", "\xe9clair dog"),
    ],
)
def test_lists(text, read):
    found = read_list(text)
    assert [tuple(word.replace("_", " ") for word in entry.split("+")) for entry in read.split(" ")] == list(found)
    assert parse_classes(text, files=False) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"dog, cat', "ends with a quote"),
        ("0: dog, 1: cat", "are numbered, '0: dog': remove the numbers"),
        ("0,dog\n1,cat", "are numbered"),
        ("id,name\n1,dog\n2,cat", "are numbered"),
        ("names:\n 0: dog\n 1: cat", "are numbered"),
        ('{"0": "dog"}', "is an object"),
        ("[[[1]]]", r"a class is a text or a list of texts, got \[1\]"),
        ("[]", "at least one class"),
        ("dog\udc80, cat", "has one that is none"),
        ("\x1b[31mdog", "has one that is none"),
        ("dog\x00", "has one that is none"),
        ("e\u0301clair, \xe9clair", "one class only"),
        ("Dog , dog", "one class only"),
        ("\uff24\uff4f\uff47, dog", "one class only"),
        ("\uff76\uff92\uff97, \u30ab\u30e1\u30e9", "one class only"),
        ("dog\n \ndog", "one class only"),
        ("dog\n,\ncat", "empty"),
        ("a" * 5000 + ",", None),
        ("a" * 5000 + ",b," + "A" * 5000, "one class only"),
    ],
)
def test_refused_in_one_short_line(text, message):
    if message is None:
        assert len(read_list(text)) == 1
        return
    with pytest.raises(UserError, match=message) as error:
        read_list(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    str(error.value).encode()  # whatever came, every terminal takes the message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("voc21", "'voc21' is one class, and every pixel is of it: did you mean voc20?"),
        ("VOC-2012", "did you mean voc20"),
        ("context60", "did you mean context59"),
        ("coco", "did you mean coco-stuff171"),
        ("cityscape", "did you mean cityscapes19"),
        ("ade20k", None),
        ("voc20, dog", "'voc20' is one class in this list"),
        ("dog | cat", "put commas between"),
        ("dog and cat", "put commas between"),
        ("dog, cat\nsky", "'dog', 'cat' are synonyms, as in 1 of 2"),
        ("0 dog\n1 cat", "these are part of them"),
        ("dog", None),
        ("car", None),
        ("traffic light", None),
        ("a man riding a horse", None),
    ],
)
def test_what_was_hardly_meant_is_said(text, message):
    if message is None:
        assert len(parse_classes(text)) >= 1  # a warning would be an error here
    else:
        with pytest.warns(UserWarning, match=re.escape(message)):
            parse_classes(text)
    parse_classes(text, files=False)  # a visitor of the page is in the middle of a word


@pytest.mark.parametrize("name", ["x.csv", "nowhere/x.names", "x.JSON", "~/no.yaml", "{tmp}/"])
def test_a_file_that_is_not_there_is_no_class(name, tmp_path):
    with pytest.raises(UserError, match="a class file must exist"):
        parse_classes(name.format(tmp=tmp_path))


def test_files_hold_lists(tmp_path):
    for name, text in {
        "a.csv": '"dog, big",hound\r\ncat\r\n',
        "b.txt": '\ufeff"dog, big", hound; cat',
        "c.json": '[["\\"dog, big\\"", "hound"], "cat"]'.replace('\\"', ""),
        "d.yaml": 'classes:\n- "dog, big", hound\n- cat\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert parse_classes(str(tmp_path / name)) == (("dog, big", "hound"), ("cat",)), name
    (tmp_path / "one line, with a comma.txt").write_text("dog, cat, sky")
    assert len(parse_classes(str(tmp_path / "one line, with a comma.txt"))) == 3


@pytest.mark.parametrize(
    "classes",
    [None, 5, 1.5, b"dog", {"dog": 1}, {"dog"}, object(), np.array("dog"), np.array([["dog"]]), np.array([1, 2]),
     [None], [1], [b"dog"], [["a", ["b"]]], [["a", None]], [{"a": 1}], [np.nan], range(3), [[]], [""], ["\udcff"]],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_wrong_types_are_one_line(classes):
    with pytest.raises(UserError) as error:
        as_classes(classes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_what_has_an_order_is_a_list():
    wanted = (("dog",), ("sofa", "couch"))
    for classes in (
        ["dog", "sofa,couch"],
        ("dog", ("sofa", "couch")),
        (entry for entry in ["dog", "sofa, couch"]),
        np.array(["dog", "sofa,couch"]),
        np.array(["dog", "sofa,couch"], object),
        ["dog\n", " sofa\t,couch"],
        ["dog", np.array(["sofa", "couch"])],
    ):
        assert as_classes(classes) == wanted
    assert as_classes(['"dog, big", hound']) == (("dog, big", "hound"),)
    with pytest.raises(UserError, match="at most 65535 classes"):
        as_classes(f"c{i}" for i in range(10**9))  # never read to its end


def test_values_in_messages_have_an_end():
    assert shown("x" * 100) == f"'{'x' * 59}…'"
    assert shown("\ud800") == r"'\ud800'"
    assert len(shown(list(range(1000)))) < 70
