"""Prompts -> token ids, with the tokenizer files that came with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32

from maskclip_jax.checkpoints.byte_pairs import OPENAI_WORDS, WORD_END, byte_pairs, clean, openai_byte_pairs
from maskclip_jax.checkpoints.pieces import JSONPieces, SentencePieces, ascii_lower, canonical, lower
from maskclip_jax.data import schema
from maskclip_jax.data.whole_files import cut, parse_json, read_bytes, read_json
from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.model", "gemma_tokenizer.model")
_PADDING = 128  # rows of nobody that a vocabulary may have at its end, rounded up for the machine


class Tokenizer:
    """A transformers tokenizer as CLIP uses it: `tokenizer(prompts)` -> ids [N, T], T the context length.

    Every prompt is start, tokens, end-of-text, then zeros (as in OpenAI's own `tokenize`; the text tower is causal and
    reads its feature at end-of-text, so what follows never counts). A longer prompt is cut, its end-of-text kept.
    """

    pad_id = 0
    eot_token_id: int | None

    def __init__(self, backend: Any, text: TextConfig):
        """`backend` is a `tokenizers.Tokenizer`. Raises UserError when it does not belong to the text tower."""
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        self._clean = getattr(backend.model, "end_of_word_suffix", None) == WORD_END
        self.context_length = text.context_length
        ends = {ids[-1] for ids in self._encode(["", "a"]) if ids}
        if len(ends) != 1:
            raise UserError("a CLIP tokenizer ends every prompt with end-of-text, this one does not: take CLIP's own")
        self.eot_token_id = ends.pop()
        count = 1 + max(backend.get_vocab().values())
        # Where the config names its end-of-text, and it is this one, further rows are padding.
        _check_count(count, text, 1 if text.eot_token_id is None else _PADDING)
        expected = count - 1 if text.eot_token_id is None else text.eot_token_id
        if self.eot_token_id != expected:
            raise UserError(
                f"the text tower reads its feature at token {expected}, but the tokenizer ends prompts with "
                f"{self.eot_token_id}: take the tokenizer of this checkpoint"
            )

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Token ids of every prompt. Raises UserError for a single string or for anything but strings."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts are a list of strings, got {cut(prompts, 60)}: write ['a photo of a cat']")
        out = np.full((len(prompts), self.context_length), self.pad_id, np.int32)
        for row, ids in zip(out, self._encode(list(prompts)), strict=True):
            if len(ids) > self.context_length:
                end = [] if self.eot_token_id is None else [self.eot_token_id]
                ids = [*ids[: self.context_length - len(end)], *end]
            row[: len(ids)] = ids
        return out

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of every prompt, uncut, start and end-of-text included."""
        return [len(ids) for ids in self._encode(list(prompts))]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into `folder`: everything `load_tokenizer` needs."""
        self._backend.save(str(folder / "tokenizer.json"))

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if not prompts:
            return []
        try:
            "".join(prompts).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as in a file name that is not UTF-8
            raise UserError("prompts are text, but one holds half of a character: remove it") from error
        return self._ids(prompts)

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        if self._clean:
            prompts = [clean(prompt) for prompt in prompts]
        return [encoding.ids for encoding in self._backend.encode_batch(prompts)]


class PaddedTokenizer(Tokenizer):
    """A tokenizer as SigLIP or TIPS use it; their text towers see every place, so that padding is part of the prompt.

    SigLIP: small letters, no ASCII punctuation, single spaces; then end-of-text, and more of it up to the context
    length. SigLIP 2 (Gemma's pieces, told by their "<eos>"): small letters alone, end-of-text, then "<pad>". TIPS:
    small ASCII letters (TensorFlow's `lower`), no end, then 0. A longer prompt is cut, its end-of-text kept.
    """

    def __init__(self, pieces: SentencePieces | JSONPieces, text: TextConfig):
        """Raises UserError when the pieces do not belong to the text tower."""
        self._pieces, self.context_length = pieces, text.context_length
        _check_count(pieces.count, text, _PADDING)
        self.eot_token_id = None
        if text.pool == "mean":
            self._normal = ascii_lower
            return
        gemma = pieces.find("<eos>") is not None
        self._normal = lower if gemma else canonical
        self.eot_token_id = pieces.find("<eos>" if gemma else "</s>")
        pad = pieces.find("<pad>") if gemma else self.eot_token_id
        if self.eot_token_id is None or pad is None:
            raise UserError(
                "a SigLIP's tokenizer has </s>, or <eos> and <pad>, but this one has not: take the tokenizer of this "
                "checkpoint"
            )
        self.pad_id = pad

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model` or `tokenizer.json` into `folder`: everything `load_tokenizer` needs."""
        self._pieces.save(folder)

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        end = [] if self.eot_token_id is None else [self.eot_token_id]
        return [[*ids, *end] for ids in self._pieces.encode([self._normal(prompt) for prompt in prompts])]


def _check_count(count: int, text: TextConfig, spare: int) -> None:
    """Raises UserError unless `count` tokens are the text tower's, less than `spare` rows short of it."""
    if count > text.vocab_size:
        raise UserError(
            f"the text tower knows {text.vocab_size} tokens, but the tokenizer's ids go up to {count - 1}: "
            "take the tokenizer of this checkpoint"
        )
    if text.vocab_size - count >= spare:
        raise UserError(
            f"the text tower knows {text.vocab_size} tokens, but the tokenizer only {count}, whose ids would mean "
            "other words: take the tokenizer of this checkpoint"
        )


class OwnTokenizer:
    """A function prompts -> ids, whose answers are checked: JAX would read ids that are too high as the highest."""

    def __init__(self, function: Callable, text: TextConfig):
        self._function, self._text = function, text

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Token ids of every prompt. Raises UserError where they are not the text tower's."""
        ids, most = np.asarray(self._function(prompts)), self._text.vocab_size
        shape = (len(prompts), self._text.context_length)
        if ids.dtype.kind not in "iu" or ids.ndim != 2 or len(ids) != shape[0] or ids.shape[1] > shape[1]:
            raise UserError(f"a tokenizer gives whole numbers [{shape[0]}, {shape[1]}], got {ids.dtype} {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < most:
            raise UserError(f"the text tower knows {most} tokens, got ids {ids.min()} to {ids.max()}: take its own")
        return ids.astype(np.int32)


class MissingTokenizer:
    """Stands where a checkpoint has no tokenizer files: an error only once a text is to be encoded."""

    def __init__(self, source: str, text: TextConfig):
        self.source, self._text = source, text

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        other = {"eot": '"openai/clip-vit-base-patch32"', "last": '"google/siglip2-base-patch16-256"'}
        raise UserError(
            f"texts need a tokenizer, and {self.source} has none: put {wanted_files(self._text)} beside the weights, "
            f"or give load_clip(…, tokenizer={other.get(self._text.pool, 'a tokenizer.model')})"
        )


def wanted_files(text: TextConfig) -> str:
    """The names of files that a tokenizer for this text tower may have, for messages."""
    if text.pool == "eot":
        return "tokenizer.json (or vocab.json and merges.txt)"
    return f"tokenizer.json (or {', '.join(SENTENCEPIECE_FILES)})"


def load_tokenizer(folder: Path, text: TextConfig) -> Tokenizer | MissingTokenizer:
    """The tokenizer in `folder`: `tokenizer.json`, else `vocab.json` and `merges.txt`, else OpenAI's if it can be.

    For SigLIP and TIPS: a SentencePiece file of one of the usual names, else `tokenizer.json`.
    """
    if text.pool != "eot":
        found = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
        if found is not None:
            return load_sentencepiece(found, text)
    file, vocab, merges = (folder / name for name in TOKENIZER_FILES)
    if file.is_file():
        data = read_bytes(file)
        content = parse_json(data, file)
        rules = {"model": schema.OBJECT}
        model = schema.fields(content, rules, f"{file} cannot be read: it", needed=rules)["model"]
        # What changes ids at random, or pads and cuts them, is none of a checkpoint's business.
        plain = content | {"truncation": None, "padding": None, "model": model | {"dropout": None}}
        written = data.decode("utf-8-sig") if plain == content else json.dumps(plain)
        return _guarded(folder, lambda tokenizers: tokenizers.Tokenizer.from_str(written), text)
    if vocab.is_file() and merges.is_file() and text.pool == "eot":
        ids = read_json(vocab)
        token = schema.whole(0, 2**24)
        for word, number in ids.items():
            schema.value(number, token, f"{vocab}: {cut(word, 40)}")
        try:
            lines = read_bytes(merges).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"the tokenizer files in {folder} cannot be read ({cut(str(error))}): copy them again"
            ) from error
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return _guarded(folder, lambda tokenizers: byte_pairs(ids, pairs), text)
    return (openai_tokenizer(text) if text.pool == "eot" else None) or MissingTokenizer(str(folder), text)


def load_sentencepiece(path: Path, text: TextConfig) -> PaddedTokenizer:
    """The tokenizer in a SentencePiece file. Raises UserError for another file, or where it is not the text tower's."""
    if text.pool == "eot":
        raise UserError(f"{path} is SentencePiece's, but this text tower reads CLIP's: give {wanted_files(text)}")
    return PaddedTokenizer(SentencePieces(path), text)


def openai_tokenizer(text: TextConfig) -> Tokenizer | None:
    """OpenAI's own tokenizer, whose vocabulary ships with the project; None where the text tower has another size."""
    if text.vocab_size != OPENAI_WORDS or text.eot_token_id not in (None, OPENAI_WORDS - 1):
        return None
    return Tokenizer(openai_byte_pairs(), text)


def _guarded(folder: Path, build: Callable[[ModuleType], Any], text: TextConfig) -> Tokenizer:
    """The tokenizer that `build` makes; whatever the Rust library meets, a panic included, is a UserError."""
    import tokenizers

    try:
        backend = build(tokenizers)
        return Tokenizer(backend, text) if text.pool == "eot" else PaddedTokenizer(JSONPieces(backend), text)
    except UserError:
        raise
    except BaseException as error:  # its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = cut(f"{error}", 120)
        raise UserError(f"the tokenizer files in {folder} cannot be read ({reason}): copy them again") from error
