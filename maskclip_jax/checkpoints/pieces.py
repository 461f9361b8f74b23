"""Pieces of words by Google's SentencePiece or by `tokenizer.json`, and the text that SigLIP and TIPS cut into them."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

from maskclip_jax.data.whole_files import cut, read_bytes
from maskclip_jax.errors import UserError


class SentencePieces:
    """A SentencePiece model (`tokenizer.model`), read by Google's own library."""

    def __init__(self, path: Path):
        """Raises UserError for what is no such file."""
        from sentencepiece import SentencePieceProcessor

        self._content = read_bytes(path)
        try:
            if not self._content:  # which the library would complain of on stderr
                raise ValueError("it is empty")
            self._model = SentencePieceProcessor(model_proto=self._content)
            self.count = self._model.get_piece_size()
            if not self.count:
                raise ValueError("no pieces")
            self.encode(["a word"])
        except Exception as error:  # the library's own, of many types
            raise UserError(
                f"{path} is not a whole SentencePiece model ({cut(str(error), 80)}): copy or download it again"
            ) from error

    def find(self, piece: str) -> int | None:
        """A piece's id, or None."""
        found = self._model.piece_to_id(piece)
        return None if found == self._model.unk_id() else found

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text, without beginning and end."""
        return self._model.encode(texts, add_bos=False, add_eos=False)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model`."""
        (folder / "tokenizer.model").write_bytes(self._content)


class JSONPieces:
    """A `tokenizer.json` without what it puts around a text."""

    def __init__(self, backend: Any):
        """`backend` is a `tokenizers.Tokenizer`."""
        backend.no_padding()
        backend.no_truncation()
        self._backend, self.count = backend, 1 + max(backend.get_vocab().values())

    def find(self, piece: str) -> int | None:
        """A piece's id, or None."""
        return self._backend.token_to_id(piece)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text, without beginning and end."""
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`."""
        self._backend.save(str(folder / "tokenizer.json"))


def canonical(text: str) -> str:
    """A text as SigLIP was asked: small letters, no ASCII punctuation, single spaces."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", plain).strip()


def lower(text: str) -> str:
    """Small letters, one by one: a final sigma is a sigma, as to `tokenizers` (SigLIP 2)."""
    return "".join(map(str.lower, text))


def ascii_lower(text: str) -> str:
    """Small ASCII letters alone, as TensorFlow's `lower` has it (TIPS)."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in text)
