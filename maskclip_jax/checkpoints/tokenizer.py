"""Prompts -> token ids, with the tokenizer files that came with a checkpoint."""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32

from maskclip_jax.data import schema
from maskclip_jax.data.whole_files import cut, read_bytes, read_json
from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # in which the last piece of a word ends, in CLIP's byte-pair encoding and in no other's
_OPENAI_MERGES, _OPENAI_WORDS = 48894, 49408
_PADDING = 128  # rows of nobody that a vocabulary may have at its end, rounded up for the machine
# As in OpenAI's, where letters count as small and large alike: the long s after an apostrophe is an s.
_PATTERN = rf"{re.escape(START)}|{re.escape(END)}|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


class Tokenizer:
    """A transformers tokenizer as CLIP uses it: `tokenizer(prompts)` -> ids [N, T], T the context length.

    Every prompt is start, tokens, end-of-text, then zeros (as in OpenAI's own `tokenize`; the text tower is causal and
    reads its feature at end-of-text, so what follows never counts). A longer prompt is cut, its end-of-text kept.
    """

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
        if count > text.vocab_size:
            raise UserError(
                f"the text tower knows {text.vocab_size} tokens, but the tokenizer's ids go up to {count - 1}: "
                "take the tokenizer of this checkpoint"
            )
        # Where the config names its end-of-text, and it is this one, further rows are padding.
        if text.vocab_size - count >= (1 if text.eot_token_id is None else _PADDING):
            raise UserError(
                f"the text tower knows {text.vocab_size} tokens, but the tokenizer only {count}, whose ids would mean "
                "other words: take the tokenizer of this checkpoint"
            )
        expected = count - 1 if text.eot_token_id is None else text.eot_token_id
        if self.eot_token_id != expected:
            raise UserError(
                f"the text tower reads its feature at token {expected}, but the tokenizer ends prompts with "
                f"{self.eot_token_id}: take the tokenizer of this checkpoint"
            )

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Token ids of every prompt. Raises UserError for a single string or for anything but strings."""
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts are a list of strings, but {cut(prompts, 60)} came: write ['a photo of a cat']")
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
        self._backend.save(str(folder / "tokenizer.json"))

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if not prompts:
            return []
        if self._clean:
            prompts = [clean(prompt) for prompt in prompts]
        try:
            "".join(prompts).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as in a file name that is not UTF-8
            raise UserError("prompts are text, but one holds half of a character: remove it") from error
        return [encoding.ids for encoding in self._backend.encode_batch(prompts)]


def clean(text: str) -> str:
    """A text as OpenAI's and open_clip's tokenizers see it, whose models were trained on such text.

    Mojibake, typographic quotes, ligatures and full-width letters are mended (`ftfy`), HTML's entities are undone
    twice, white space becomes one space, and letters small. (The fast tokenizer of transformers
    leaves the first two out, for the same weights; here what they were trained with goes first.)
    """
    if not (text.isascii() and text.isprintable()) or "&" in text:  # nothing to mend in others
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


class OwnTokenizer:
    """A function prompts -> ids, whose answers are checked: JAX would read ids that are too high as the highest."""

    def __init__(self, function: Callable, text: TextConfig):
        self._function, self._text = function, text

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Token ids of every prompt. Raises UserError where they are not the text tower's."""
        ids, most = np.asarray(self._function(prompts)), self._text.vocab_size
        shape = (len(prompts), self._text.context_length)
        if ids.dtype.kind not in "iu" or ids.ndim != 2 or len(ids) != shape[0] or ids.shape[1] > shape[1]:
            raise UserError(
                f"a tokenizer gives whole numbers [{shape[0]}, {shape[1]}], but {ids.dtype} {ids.shape} came"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < most:
            raise UserError(
                f"the text tower knows {most} tokens, but ids {ids.min()} to {ids.max()} came: take its own"
            )
        return ids.astype(np.int32)


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
    """The tokenizer in `folder`: `tokenizer.json`, else `vocab.json` and `merges.txt`, else OpenAI's if it can be."""
    file, vocab, merges = (folder / name for name in TOKENIZER_FILES)
    if file.is_file():
        content = read_json(file)
        rules = {"model": schema.OBJECT}
        model = schema.fields(content, rules, f"{file} cannot be read: it", needed=rules)["model"]
        # What changes ids at random, or pads and cuts them, is none of a checkpoint's business.
        plain = content | {"truncation": None, "padding": None, "model": model | {"dropout": None}}
        return _guarded(folder, lambda tokenizers: tokenizers.Tokenizer.from_str(json.dumps(plain)), text)
    if vocab.is_file() and merges.is_file():
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
        return _guarded(folder, lambda tokenizers: _byte_pairs(ids, pairs), text)
    return openai_tokenizer(text) or MissingTokenizer(str(folder))


def openai_tokenizer(text: TextConfig) -> Tokenizer | None:
    """OpenAI's own tokenizer, whose vocabulary ships with the project; None where the text tower has another size."""
    if text.vocab_size != _OPENAI_WORDS or text.eot_token_id not in (None, _OPENAI_WORDS - 1):
        return None
    file = Path(str(resources.files("maskclip_jax") / "assets/openai_vocabulary/bpe_simple_vocab_16e6.txt.gz"))
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _OPENAI_MERGES]]
    letters = _byte_letters()
    words = [*letters, *(letter + WORD_END for letter in letters), *map("".join, pairs), START, END]
    return Tokenizer(_byte_pairs({word: i for i, word in enumerate(words)}, pairs), text)


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order of OpenAI's vocabulary: printable bytes are their own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [*map(chr, printable), *(chr(256 + i) for i in range(others))]


def _byte_pairs(ids: dict[str, int], pairs: list[tuple[str, ...]]) -> Any:
    """CLIP's byte-pair encoding as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    model = models.BPE(ids, pairs, unk_token=END, continuing_subword_prefix="", end_of_word_suffix=WORD_END)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in (START, END)])
    backend.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]), False, False)
    return backend


def _guarded(folder: Path, build: Callable[[ModuleType], Any], text: TextConfig) -> Tokenizer:
    """The tokenizer that `build` makes; whatever the Rust library meets, a panic included, is a UserError."""
    import tokenizers

    try:
        return Tokenizer(build(tokenizers), text)
    except UserError:
        raise
    except BaseException as error:  # its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = cut(f"{error}", 120)
        raise UserError(f"the tokenizer files in {folder} cannot be read ({reason}): copy them again") from error
