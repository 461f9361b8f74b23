"""SentencePiece models, trained on the spot: no published one may be fetched."""

import functools
import io

CORPUS = """a photo of a cat. a photo of the dog! a picture of green grass, and the sky: blue.
an itap of a car; the large train in a video game. art of the small bird? many people's houses
Überraschung naïve café résumé Größe 北京 猫 犬 東京 привет мир кошка собака 12345 67890 3.14 1,000
the quick brown fox jumps over the lazy dog (and again) "quoted" 'single' [brackets] {braces} 50% #tag @name"""


@functools.cache
def trained_pieces(kind):
    """The file of a unigram model as SigLIP 1 and TIPS have it, or ("bpe") of byte pairs as Gemma's (SigLIP 2)."""
    import sentencepiece

    out = io.BytesIO()
    siglip = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # as T5's and SigLIP's
    gemma = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>"}
    gemma |= {"bos_piece": "<bos>", "byte_fallback": True, "add_dummy_prefix": False, "split_digits": True}
    gemma |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "bpe"}
    options = {"unigram": siglip | {"model_type": "unigram"}, "bpe": gemma}[kind]
    lines = [line for line in CORPUS.lower().splitlines() for _ in range(20)]
    sizes = {"vocab_size": {"unigram": 200, "bpe": 420}[kind], "character_coverage": 1.0, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, num_threads=1, **sizes, **options
    )
    return out.getvalue()
