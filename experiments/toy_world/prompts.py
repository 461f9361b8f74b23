"""The embedded CLIP's words: its tokenizer, and the prompts its training contrasts with images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments.toy_world.scenes import TINTABLE, TINTS, caption
from maskclip_jax.data.vocabulary import SCENE_CLASSES

CONTEXT_LENGTH = 64
PHRASE_TOKENS, CAPTION_TOKENS = 24, 40  # longest prompts seen in training
CLASSES = list(SCENE_CLASSES)
COLOURED = [f"{tint} {noun}" for noun in sorted(TINTABLE) for tint in TINTS]
PHRASES = CLASSES + COLOURED


def make_tokenizer(out: Path, texts: Iterable[str], merges: int = 1200) -> None:
    """Trains a byte-level BPE with CLIP's conventions on `texts` and writes it as CLIP's tokenizer files.

    CLIP's own vocabulary of 49,408 tokens would outweigh this model several times. As in CLIP's, every byte has two
    tokens (inside and at the end of a word), so any word can be spelled, and the end-of-text token has the highest id.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in learned]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
        merge_file.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in learned) + "\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
        tokenizer.save_pretrained(out)
        for file in (vocab, merge_file):
            Path(out, file.name).write_bytes(file.read_bytes())


def load_tokenizer(folder: Path):
    """`tokenize(texts, length)` → int32 [N, length], padded with the end-of-text token as OpenAI's is."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)

    def tokenize(texts: list[str], length: int) -> np.ndarray:
        out = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        return out["input_ids"].astype(np.int32)

    return tokenize


def corpus(scenes: list[dict], templates: list[str], names: list[str], seed: int = 0) -> Iterator[str]:
    """What the tokenizer learns from: captions, the templates, and the names of the published class sets."""
    rng = np.random.default_rng(seed)
    for scene in scenes[:20000]:
        yield caption(tuple(scene["phrases"]), rng)
    for template in templates:
        for phrase in PHRASES:
            yield template.format(phrase)
    for _ in range(20):
        yield from names


class Mentions:
    """Which phrases each scene's caption mentions, as two boolean tables [scenes, len(PHRASES)].

    `named`: the phrase stands in the caption ("car" stands in "a red car" too). `unknown`: a caption that says "car"
    does not tell its colour, so "red car" is neither right nor wrong there.
    """

    def __init__(self, scenes: list[dict]):
        index = {phrase: i for i, phrase in enumerate(PHRASES)}
        self.named = np.zeros((len(scenes), len(PHRASES)), bool)
        self.unknown = np.zeros_like(self.named)
        for row, scene in enumerate(scenes):
            for phrase in scene["phrases"]:
                noun = phrase.split()[-1]
                self.named[row, [index[phrase], index[noun]]] = True
                if phrase == noun and noun in TINTABLE:
                    self.unknown[row, [index[f"{tint} {noun}"] for tint in TINTS]] = True
