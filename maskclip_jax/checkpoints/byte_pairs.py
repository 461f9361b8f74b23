"""CLIP's byte-pair encoding, from its own files or from OpenAI's vocabulary, which ships with the project."""

from __future__ import annotations

import gzip
import html
import re
from typing import Any

from maskclip_jax.data.whole_files import shipped

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # in which the last piece of a word ends, in CLIP's byte-pair encoding and in no other's
OPENAI_WORDS = 49408
_OPENAI_MERGES = 48894
# As in OpenAI's, where letters count as small and large alike: the long s after an apostrophe is an s.
_PATTERN = rf"{re.escape(START)}|{re.escape(END)}|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


def openai_byte_pairs() -> Any:
    """OpenAI's own tokenizer as a `tokenizers.Tokenizer`."""
    file = shipped("assets", "openai_vocabulary", "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _OPENAI_MERGES]]
    letters = _byte_letters()
    words = [*letters, *(letter + WORD_END for letter in letters), *map("".join, pairs), START, END]
    return byte_pairs({word: i for i, word in enumerate(words)}, pairs)


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


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order of OpenAI's vocabulary: printable bytes are their own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [*map(chr, printable), *(chr(256 + i) for i in range(others))]


def byte_pairs(ids: dict[str, int], pairs: list[tuple[str, ...]]) -> Any:
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
