"""659 odd strings tokenise as OpenAI's own tokenizer does (ids computed by openai/CLIP d05afc4 with ftfy 6.3.1)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from maskclip_jax.checkpoints import tokenizer as tokenizers
from maskclip_jax.encoders.config import variant

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "openai_token_ids.json").read_text(encoding="utf-8"))
TEXT = variant("ViT-B/16").text


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.openai_tokenizer(TEXT)


def padded(ids):
    """OpenAI's `tokenize(…, truncate=True)` of these ids."""
    row = [49406, *ids, 49407][: TEXT.context_length]
    row[-1] = 49407
    return row + [0] * (TEXT.context_length - len(row))


def test_odd_strings(tokenizer):
    assert len(GOLDEN["strings"]) == len(GOLDEN["ids"]) == 659
    found = tokenizer(GOLDEN["strings"])
    wrong = [s for s, row, ids in zip(GOLDEN["strings"], found, GOLDEN["ids"], strict=True) if list(row) != padded(ids)]
    assert wrong == []


def test_odd_strings_by_the_files_that_transformers_writes(tokenizer, tmp_path):
    """Saved as tokenizer.json and read back, and from vocab.json and merges.txt, it is the same."""
    tokenizer.save(tmp_path)
    strings = GOLDEN["strings"][::5]
    expected = tokenizer(strings)
    np.testing.assert_array_equal(tokenizers.load_tokenizer(tmp_path, TEXT)(strings), expected)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in content["merges"])])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    np.testing.assert_array_equal(tokenizers.load_tokenizer(tmp_path, TEXT)(strings), expected)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a “good” dog", 'a "good" dog'),
        ("fish &amp;amp; chips", "fish & chips"),
        ("ﬁsh", "fish"),
        ("ＤＯＧ", "dog"),
        ("\ufeffdog", "dog"),
        ("itâ€™s", "it's"),
        ("cafe\u0301", "café"),
        ("  a\u3000\u00a0dog \n", "a dog"),
    ],
)
def test_cleaning(text, same):
    assert tokenizers.clean(text) == tokenizers.clean(same) == same


def test_a_vocabulary_of_another_size_has_no_openai_tokenizer():
    assert tokenizers.openai_tokenizer(dataclasses.replace(TEXT, vocab_size=49409)) is None
    assert tokenizers.openai_tokenizer(dataclasses.replace(TEXT, eot_token_id=7)) is None
