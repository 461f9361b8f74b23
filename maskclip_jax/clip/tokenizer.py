"""Prompts -> token ids, with the tokenizer files that came with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from maskclip_jax.clip.config import TextConfig
from maskclip_jax.clip.transformers_quietly import transformers
from maskclip_jax.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


class Tokenizer:
    """A transformers tokenizer as CLIP uses it: `tokenizer(prompts)` -> ids [N, T], T the context length.

    Every prompt is start, tokens, end-of-text, then zeros (as in OpenAI's own `tokenize`; the text tower is causal and
    reads its feature at end-of-text, so what follows never counts). A longer prompt is cut, its end-of-text kept.
    """

    def __init__(self, tokenizer: Any, text: TextConfig):
        """`tokenizer` is a transformers fast tokenizer. Raises UserError when it does not belong to the text tower."""
        self._tokenizer = tokenizer
        self.context_length = text.context_length
        ends = {ids[-1] for ids in self._encode(["", "a"]) if ids}
        if len(ends) != 1:
            raise UserError("a CLIP tokenizer ends every prompt with end-of-text, this one does not: take CLIP's own")
        self.eot_token_id = ends.pop()
        highest = max(tokenizer.get_vocab().values())
        if highest >= text.vocab_size:
            raise UserError(
                f"the text tower knows {text.vocab_size} tokens, but the tokenizer's ids go up to {highest}: "
                "take the tokenizer of this checkpoint"
            )
        expected = highest if text.eot_token_id is None else text.eot_token_id
        if self.eot_token_id != expected:
            raise UserError(
                f"the text tower reads its feature at token {expected}, but the tokenizer ends prompts with "
                f"{self.eot_token_id}: take the tokenizer of this checkpoint"
            )

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Token ids of every prompt. Raises UserError for a single string or for anything but strings."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts are a list of strings, but {prompts!r} came: write ['a photo of a cat']")
        out = np.zeros((len(prompts), self.context_length), np.int32)
        for row, ids in zip(out, self._encode(list(prompts)), strict=True):
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], self.eot_token_id]
            row[: len(ids)] = ids
        return out

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of every prompt, uncut, start and end-of-text included."""
        return [len(ids) for ids in self._encode(list(prompts))]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into `folder`: everything `load_tokenizer` needs."""
        self._tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if not prompts:
            return []
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return [encoding.ids for encoding in backend.encode_batch(prompts)]


class MissingTokenizer:
    """Stands where a checkpoint has no tokenizer files: an error only once a text is to be encoded."""

    def __init__(self, source: str):
        self.source = source

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        raise UserError(
            f"texts need a tokenizer, and {self.source} has none: put tokenizer.json (or vocab.json and merges.txt) "
            'beside the weights, or give load_clip(…, tokenizer="openai/clip-vit-base-patch32")'
        )


def load_tokenizer(folder: Path, text: TextConfig) -> Tokenizer | MissingTokenizer:
    """The tokenizer in `folder`: `tokenizer.json` as it is, else `vocab.json` and `merges.txt`."""
    file, vocab, merges = (folder / name for name in TOKENIZER_FILES)
    try:
        if file.is_file():
            tokenizer = transformers().PreTrainedTokenizerFast(tokenizer_file=str(file))
        elif vocab.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
            ids = json.loads(vocab.read_text(encoding="utf-8"))
            tokenizer = transformers().CLIPTokenizer(vocab=ids, merges=pairs)
        else:
            return MissingTokenizer(str(folder))
    except Exception as error:  # the Rust tokenizers raise bare Exception
        raise UserError(f"the tokenizer files in {folder} cannot be read ({error}): copy them again") from error
    return Tokenizer(tokenizer, text)
