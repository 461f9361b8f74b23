"""SigLIP's and TIPS' tokenizers: ids equal those of SentencePiece, transformers and `tokenizers` on odd strings."""

import json
import re
import string

import numpy as np
import pytest
from sentence_pieces import trained_pieces

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.pieces import ascii_lower, canonical, lower
from maskclip_jax.checkpoints.tokenizer import MissingTokenizer, load_sentencepiece, load_tokenizer
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders.config import SIGLIP_TEXT, TIPS_TEXT, TextConfig
from maskclip_jax.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")


def text_config(count, fields, context=16):
    return TextConfig(count, context, 32, 1, 2, 32, **fields)


def odd_strings():
    """Some 250: what class lists hold, and what they should not."""
    words = [
        "a",
        "A photo of a Cat.",
        "sky, (blue)",
        "",
        " ",
        "\t\n",
        "  two   spaces ",
        "ALL CAPS",
        "e-mail",
        "50%",
        "#tag",
    ]
    words += [
        "naïve Café",
        "ÜBERRASCHUNG",
        "ΣΊΣΥΦΟΣ",
        "İstanbul",
        "Straße",
        "ǅ",
        "ﬁsh",
        "Ｆｕｌｌ",
        "½",
        "²",
        "北京の猫",
        "ПРИВЕТ",
    ]
    words += [
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "\u200b",
        "\ufeff",
        "\x07bell",
        "a\u00a0b",
        "‘quotes’",
        "—",
        "…",
        "▁",
        "a▁b",
        "\u3000",
    ]
    words += [
        "person's",
        "don't",
        "<b>",
        "&amp;",
        "</s>x",
        "a/b",
        "C++",
        "x" * 300,
        "cat " * 40,
        "a.b.c",
        "1,000.5",
        "０１",
    ]
    rng = np.random.default_rng(0)
    letters = list(string.ascii_letters + string.digits + string.punctuation + "   äÖßéñ猫犬я\u0301🙂▁")
    words += ["".join(rng.choice(letters, rng.integers(1, 30))) for _ in range(200)]
    return [word for word in words if "</s>" not in word] + ["s>", "<", "/s"]


ODD = odd_strings()


def reference(model, texts, ids, context=16):
    """SentencePiece's own ids of `texts`, cut and padded by `ids` (end, pad)."""
    end, pad = ids
    rows = np.full((len(texts), context), pad, np.int32)
    for row, pieces in zip(rows, sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts), strict=True):
        pieces = pieces if end is None else [*pieces[: context - 1], end]
        row[: len(pieces[:context])] = pieces[:context]
    return rows


def of_model(tmp_path, model, fields, name="tokenizer.model"):
    (tmp_path / name).write_bytes(model)
    count = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    return load_tokenizer(tmp_path, text_config(count, fields))


def test_there_are_enough_odd_strings():
    assert len(set(ODD)) >= 200


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_siglip(tmp_path, name):
    """Small letters, no punctuation; the end (id 1) at the end, and as padding: no cut takes it away."""
    model = trained_pieces("unigram")
    found = of_model(tmp_path, model, SIGLIP_TEXT, name)
    texts = [re.sub(r"\s+", " ", re.sub(f"[{re.escape(string.punctuation)}]", "", t.lower())).strip() for t in ODD]
    np.testing.assert_array_equal(found(ODD), reference(model, texts, (1, 1)))
    assert (found(["cat " * 40])[0, -1], found(["cat"])[0, -1]) == (1, 1)
    assert found.lengths(["", "cat " * 40])[0] == 1


@pytest.mark.slow
def test_siglip_as_transformers_has_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = trained_pieces("unigram")
    found = of_model(tmp_path, model, SIGLIP_TEXT, "spiece.model")
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    rows = theirs(ODD, padding="max_length", max_length=16, truncation=True)["input_ids"]
    differ = [text for text, a, b in zip(ODD, found(ODD), rows, strict=True) if list(a) != b]
    assert differ == []


def test_siglip_2(tmp_path):
    """Gemma's pieces: small letters alone, the end (1), then padding (0); bytes for unknown letters."""
    model = trained_pieces("bpe")
    found = of_model(tmp_path, model, SIGLIP_TEXT)
    np.testing.assert_array_equal(found(ODD), reference(model, [lower(text) for text in ODD], (1, 0)))
    assert list(found(["cat"])[0, -3:]) == [0, 0, 0]
    assert found(["cat " * 40])[0, -1] == 1
    assert lower("ΣΊΣΥΦΟΣ İ") == "σίσυφοσ i̇"


def test_tips(tmp_path):
    """TensorFlow's `lower` knows ASCII alone; no end; zeros behind."""
    model = trained_pieces("unigram")
    found = of_model(tmp_path, model, TIPS_TEXT)
    np.testing.assert_array_equal(found(ODD), reference(model, [ascii_lower(text) for text in ODD], (None, 0)))
    assert ascii_lower("Über CAT") == "Über cat"
    assert list(found([""])[0]) == [0] * 16


def gemma_json(model):
    """The same pieces as transformers' Siglip2Tokenizer would save them: byte-pair encoding with merges they imply."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    normal = {
        piece for piece, i in vocab.items() if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i))
    }
    merges = []
    for piece in sorted(normal, key=lambda piece: -pieces.get_score(vocab[piece])):
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in normal and piece[n:] in normal]
        merges += sorted(splits, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    around = [("<bos>", 2), ("<eos>", 1)]
    backend.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=around)
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<bos>", "<unk>")])
    backend.enable_padding(length=40)  # what a file says of padding and ends is not asked
    backend.enable_truncation(3)
    return backend


def test_siglip_2_from_tokenizer_json(tmp_path):
    model = trained_pieces("bpe")
    backend = gemma_json(model)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path, text_config(backend.get_vocab_size(), SIGLIP_TEXT))
    backend.no_padding()
    backend.no_truncation()
    for text, row in zip(ODD, found(ODD), strict=True):
        own = [*backend.encode(text, add_special_tokens=False).ids[:15], 1]
        assert list(row) == own + [0] * (16 - len(own)), text
    (tmp_path / "again").mkdir()
    found.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again", text_config(backend.get_vocab_size(), SIGLIP_TEXT))
    np.testing.assert_array_equal(again(ODD), found(ODD))


def test_siglip_from_a_t5_like_tokenizer_json(tmp_path):
    """A unigram model with SentencePiece's own normaliser inside, as transformers.js has SigLIP's."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    model = trained_pieces("unigram")
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    backend = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], 2))
    charsmap = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    backend.normalizer = normalizers.Sequence([charsmap, normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path, text_config(backend.get_vocab_size(), SIGLIP_TEXT))
    plain = [text for text in ODD if text.isascii() and text.isprintable() and text.strip()]
    assert len(plain) > 30
    np.testing.assert_array_equal(found(plain), reference(model, [canonical(text) for text in plain], (1, 1)))


def test_tokenizers_of_others(tmp_path, checkpoints):
    model = trained_pieces("unigram")
    (tmp_path / "tokenizer.model").write_bytes(model)
    count = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    for fields, message in (
        (text_config(count - 1, SIGLIP_TEXT), "ids go up to"),
        (text_config(600, TIPS_TEXT), "only"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path, fields)
    assert isinstance(load_tokenizer(tmp_path, text_config(count, {})), MissingTokenizer)  # CLIP's is another kind
    with pytest.raises(UserError, match="is SentencePiece's, but this text tower reads CLIP's"):
        load_sentencepiece(tmp_path / "tokenizer.model", text_config(count, {}))
    (tmp_path / "clip").mkdir()
    checkpoints.write_tokenizer(tmp_path / "clip")
    with pytest.raises(UserError, match="a SigLIP's tokenizer has </s>, or <eos> and"):
        load_tokenizer(tmp_path / "clip", text_config(10, SIGLIP_TEXT))
    for content in (b"", b"\x00" * 40, model[:-7], model[:100], json.dumps({}).encode()):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=r"is not a whole SentencePiece model|ids go up to|only") as error:
            load_tokenizer(tmp_path, text_config(count, SIGLIP_TEXT))
        assert "\n" not in str(error.value)


def test_another_tokenizer_than_a_wrong_one(tmp_path, checkpoints):
    """What lies beside the weights is not read where `tokenizer=` gives another."""
    config, variables = checkpoints.random_clip("siglip")
    folder, words = tmp_path / "model", tmp_path / "words.model"
    folder.mkdir()
    np.savez(folder / "siglip.npz", **to_names(variables, config, "big_vision"))
    words.write_bytes(trained_pieces("unigram"))
    for content in (b"rubbish", b""):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="not a whole SentencePiece model"):
            load_clip(folder)
        assert load_clip(folder, tokenizer=words).tokenizer(["a cat"]).shape == (1, 16)


def test_a_tokenizer_by_its_path(tmp_path, checkpoints):
    config, variables = checkpoints.random_clip("siglip")
    arrays = to_names(variables, config, "big_vision")
    (tmp_path / "any_name.model").write_bytes(trained_pieces("unigram"))
    found = load_clip(arrays, tokenizer=tmp_path / "any_name.model", fold=False).tokenizer
    assert found(["a cat"]).shape == (1, config.text.context_length)
    with pytest.raises(UserError, match=r"has no tokenizer\.json \(or tokenizer\.model"):
        load_clip(arrays, tokenizer=tmp_path)
