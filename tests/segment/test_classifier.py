"""The text classifier against a prompt-by-prompt loop, and the cache against everything that may happen to a file."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.errors import UserError
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment import classifier as module
from maskclip_jax.segment.classifier import classifier_from_embeddings, text_classifier, trimmed

TEMPLATES = ("a photo of a {}.", "there is a {} in the scene.", "{} at night in a street with many other things")
CLASSES = ["dog", "sofa,couch", ("fire truck", "engine", "red car")]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_loop(p, classes, templates):
    """Every prompt at full length; normalise, average, normalise."""
    encode = jax.jit(lambda v, ids: p.model.apply(v, ids, method="encode_text"))
    rows = []
    for entry in classes:
        words = entry.split(",") if isinstance(entry, str) else entry
        embeddings = [
            unit(np.asarray(encode(p.variables, p.tokenizer([template.format(word)])))[0])
            for word in words
            for template in templates
        ]
        rows.append(unit(np.mean(embeddings, axis=0)))
    return np.stack(rows)


def test_prompts_are_averaged_as_the_method_says(pretrained):
    p = pretrained("vit")
    expected = by_loop(p, CLASSES, TEMPLATES)
    for batch_size in (4, 256):  # 18 prompts: four batches and a remainder, or one batch
        ours = text_classifier(p, CLASSES, TEMPLATES, batch_size=batch_size, cache=False)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, atol=1e-5)  # of unit rows; other prompts differ by 1e-3


def test_batches_and_their_remainder_share_one_program(pretrained):
    p = pretrained("resnet")
    seen = []
    with count_compiles() as count:
        text_classifier(p, CLASSES, TEMPLATES, batch_size=7, cache=False, progress=lambda *a: seen.append(a))
    assert count.programs <= 1
    assert seen == [(7, 18), (14, 18), (18, 18)]


@pytest.mark.slow
def test_the_pure_function_says_the_same(pretrained):
    p = pretrained("vit")
    prompts = [[t.format(name) for t in TEMPLATES] for name in ("dog", "cat")]
    ids = jnp.asarray([p.tokenizer(row) for row in prompts]).reshape(6, -1)
    embeddings = p.model.apply(p.variables, ids, method="encode_text").reshape(2, 3, -1)
    ours = jax.jit(classifier_from_embeddings)(embeddings)
    np.testing.assert_allclose(ours, text_classifier(p, ["dog", "cat"], TEMPLATES, cache=False), atol=1e-5)
    gradient = jax.grad(lambda e: classifier_from_embeddings(e)[0, 0])(jnp.zeros_like(embeddings))
    assert np.isfinite(gradient).all()


def test_templates_by_name_and_from_the_checkpoint(pretrained):
    p = pretrained("vit")
    single = by_loop(p, ["dog"], ["a photo of a {}."])
    np.testing.assert_allclose(text_classifier(p, ["dog"], "single", cache=False), single, atol=1e-5)
    advised = dataclasses.replace(p, reading=dataclasses.replace(p.reading, templates="single"))
    np.testing.assert_allclose(text_classifier(advised, ["dog"], cache=False), single, atol=1e-5)
    np.testing.assert_allclose(text_classifier(p, "dog", "a photo of a {}.", cache=False), single, atol=1e-5)
    assert np.abs(text_classifier(p, ["dog"], cache=False) - single).max() > 1e-3  # the default is all 85


def test_trimming_keeps_the_end_of_every_prompt(pretrained):
    config = pretrained("vit").config.text
    ids = np.zeros((2, 40), np.int32)
    ids[0, 17], ids[1, 3] = 63, 63
    assert trimmed(ids, config).shape == (2, 32)
    named = dataclasses.replace(config, eot_token_id=5)
    ids[0, :], ids[0, 2], ids[1, 15] = 7, 5, 5
    assert trimmed(ids, named).shape == (2, 16)
    ids[1, 15], ids[1, 39] = 0, 5
    assert trimmed(ids, named).shape == (2, 40)


@pytest.fixture
def no_tower(monkeypatch):
    """From here on the text tower fails: only a cache can answer."""

    def refuse():
        def fail(*_):
            raise AssertionError("the text tower ran")

        monkeypatch.setattr(module, "_embed", fail)

    return refuse


def test_the_cache_answers_the_second_time(pretrained, cache_folder, no_tower):
    p = pretrained("vit")
    first = text_classifier(p, CLASSES, TEMPLATES)
    assert [f.suffix for f in cache_folder.iterdir()] == [".npy"]  # and no temporary file left
    no_tower()
    np.testing.assert_array_equal(text_classifier(p, CLASSES, TEMPLATES), first)


@pytest.mark.parametrize("change", ["classes", "grouping", "templates", "parameters", "tokenizer"])
def test_the_cache_knows_what_it_is_of(pretrained, no_tower, change):
    p = pretrained("vit")
    text_classifier(p, ["dog", "cat,kitten"], TEMPLATES)
    no_tower()
    classes, templates = ["dog", "cat,kitten"], TEMPLATES
    if change == "classes":
        classes = ["dog", "cow,kitten"]
    if change == "grouping":
        classes = ["dog,cat", "kitten"]
    if change == "templates":
        templates = TEMPLATES[:2]
    if change == "parameters":
        p = pretrained("vit", seed=1)
    if change == "tokenizer":
        p = dataclasses.replace(p, tokenizer=lambda prompts: pretrained("vit").tokenizer(prompts)[:, ::-1].copy())
    with pytest.raises(AssertionError, match="text tower ran"):
        text_classifier(p, classes, templates)


@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "nan", "shape", "dtype", "pickle", "archive"])
def test_a_damaged_cache_file_is_computed_again(pretrained, cache_folder, damage):
    p = pretrained("vit")
    first = text_classifier(p, CLASSES, TEMPLATES)
    (path,) = cache_folder.iterdir()
    good = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(good[:-7])
    elif damage == "noise":
        path.write_bytes(b"\x00noise" * 9)
    elif damage == "archive":
        with open(path, "wb") as file:
            np.savez(file, first)
    else:
        wrong = {
            "nan": np.full_like(first, np.nan),
            "shape": first[:2],
            "dtype": first.astype(np.float64),
            "pickle": np.array([{}], object),
        }
        np.save(path, wrong[damage])
    np.testing.assert_array_equal(text_classifier(p, CLASSES, TEMPLATES), first)
    assert path.read_bytes() == good


def test_where_the_cache_is(pretrained, cache_folder, tmp_path):
    p = pretrained("vit")
    text_classifier(p, ["dog"], "single", cache=tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert not cache_folder.exists()
    text_classifier(p, ["dog"], "single", cache=False)
    assert not cache_folder.exists()
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):  # slow next time, but an answer now
        text_classifier(p, ["dog"], "single", cache=tmp_path / "file" / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_classifier(p, ["dog"], "single")
    assert len(list(cache_folder.iterdir())) == 1


@pytest.mark.parametrize("templates", [[], ["no place"], ["{} and {}"], "no-such-set"])
def test_templates_that_cannot_be_used(pretrained, templates):
    with pytest.raises(UserError) as error:
        text_classifier(pretrained("vit"), ["dog"], templates)
    assert "\n" not in str(error.value)
