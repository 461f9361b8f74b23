"""Prompts -> ids: start, tokens, end-of-text, zeros; long prompts cut with their end kept."""

import dataclasses
import json

import numpy as np
import pytest

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.tokenizer import MissingTokenizer, load_tokenizer
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.errors import UserError


@pytest.fixture
def folder(tmp_path, checkpoints):
    checkpoints.write_tokenizer(tmp_path)
    return tmp_path


def test_padding_and_truncation(folder, checkpoints):
    tokenizer = load_tokenizer(folder, checkpoints.TEXT)
    ids = tokenizer(["a cat", "a photo of the dog the cat a a a", ""])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[8, 1, 4, 9, 0, 0, 0, 0], [8, 1, 2, 3, 7, 5, 7, 9], [8, 9, 0, 0, 0, 0, 0, 0]])
    assert tokenizer([]).shape == (0, 8)
    with pytest.raises(UserError, match="prompts are a list of strings"):
        tokenizer("a cat")


def test_half_a_character(folder, checkpoints):
    with pytest.raises(UserError, match="one holds half of a character: remove it"):
        load_tokenizer(folder, checkpoints.TEXT)(["a cat", "a \udc80 dog"])


def test_openai_style_vocabulary_files(tmp_path):
    """`vocab.json` and `merges.txt` with byte-pair merges; lower-cased, spaces collapsed, as CLIP's are."""
    tokens = ["a", "c", "t", "a</w>", "c</w>", "t</w>", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = load_tokenizer(tmp_path, TextConfig(10, 6, 64, 1, 1, 256))
    np.testing.assert_array_equal(tokenizer(["A   Cat", "act"]), [[8, 3, 7, 9, 0, 0], [8, 0, 1, 5, 9, 0]])


def test_a_tokenizer_of_another_model(folder, checkpoints):
    with pytest.raises(UserError, match="knows 9 tokens, but the tokenizer's ids go up to 9"):
        load_tokenizer(folder, dataclasses.replace(checkpoints.TEXT, vocab_size=9))
    with pytest.raises(UserError, match="reads its feature at token 7, but the tokenizer ends prompts with 9"):
        load_tokenizer(folder, dataclasses.replace(checkpoints.TEXT, eot_token_id=7))
    with pytest.raises(UserError, match="knows 11 tokens, but the tokenizer only 10, whose ids would mean other words"):
        load_tokenizer(folder, dataclasses.replace(checkpoints.TEXT, vocab_size=11))
    with pytest.raises(UserError, match="the tokenizer only 10"):
        load_tokenizer(folder, dataclasses.replace(checkpoints.TEXT, vocab_size=49408, eot_token_id=9))
    padded = dataclasses.replace(checkpoints.TEXT, vocab_size=64, eot_token_id=9)  # rows of nobody at the end
    assert load_tokenizer(folder, padded).eot_token_id == 9
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(folder, checkpoints.TEXT)


def test_no_tokenizer_is_an_error_only_when_one_is_needed(tmp_path, folder, checkpoints):
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    bare = load_clip(arrays)
    assert isinstance(bare.tokenizer, MissingTokenizer)
    with pytest.raises(UserError, match=r"put tokenizer\.json .* beside the weights, or give load_clip"):
        bare.tokenizer(["a cat"])
    assert load_clip(arrays, tokenizer=folder).tokenizer(["a cat"])[0, 1] == 1
    own = load_clip(arrays, tokenizer=lambda prompts: np.zeros((len(prompts), 8), np.int32))
    assert own.tokenizer(["a"]).shape == (1, 8)
    for ids, message in (([[10] * 8], "knows 10 tokens, got ids 10 to 10"), ([[-1] * 8], "ids -1"), ([0.5], "float64")):
        with pytest.raises(UserError, match=message):
            load_clip(arrays, tokenizer=lambda prompts, ids=ids: ids).tokenizer(["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="give another tokenizer"):
        load_clip(arrays, tokenizer=tmp_path / "empty")
    with pytest.raises(UserError, match="a tokenizer is a folder, a hub id or a function"):
        load_clip(arrays, tokenizer="nowhere")


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 10**30, "x", [], {}, "x" * 10**5])
@pytest.mark.parametrize("where", ["truncation", "padding", "added_tokens", "normalizer", "post_processor", "model"])
def test_absurd_tokenizer_files(folder, checkpoints, where, value):
    """One line, or the tokens as they were (what cuts and pads is not the file's to say)."""
    before = load_tokenizer(folder, checkpoints.TEXT)(["a cat"])
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {where: value}))
    if where in ("truncation", "padding") or (where, value) in (("added_tokens", []), ("normalizer", None)):
        np.testing.assert_array_equal(load_tokenizer(folder, checkpoints.TEXT)(["a cat"]), before)
    else:
        with pytest.raises(UserError, match=r"^.{1,400}$"):
            load_tokenizer(folder, checkpoints.TEXT)


@pytest.mark.parametrize("value", [None, -1, 1.5, 10**30, "x", [], True])
def test_absurd_vocabularies(tmp_path, value):
    tokens = ["a", "a</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    for place in ("a", "<|endoftext|>"):
        ids = {token: i for i, token in enumerate(tokens)} | {place: value}
        (tmp_path / "vocab.json").write_text(json.dumps(ids))
        with pytest.raises(UserError, match=r"^.{1,400}$"):
            load_tokenizer(tmp_path, TextConfig(4, 6, 64, 1, 1, 256))
