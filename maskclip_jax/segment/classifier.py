"""Words -> text classifier [C, E]: prompts embedded, averaged per class, cached on disk (docs/method.md, section 4)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.names import shown
from maskclip_jax.data.vocabulary import ClassName, as_classes, parse_classes, prompt_templates
from maskclip_jax.data.whole_files import atomic_path, cache_folder
from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.encoders.model import CLIP, IMAGE_TOWER_ALONE
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import unit

_FORMAT = "maskclip_jax text classifier 2"  # part of the fingerprint: change it whenever the computation changes
_LENGTH_STEP = 16  # prompts are cut to a multiple of this many tokens, so that few lengths are ever compiled


class LostWords(UserWarning):
    """Words that the text tower does not see, or classes that are one to it."""


# What people hand over here may be of any type: `named_classes` and `filled_templates` say in one line what is wrong.
Classes = Any  # str | os.PathLike | Iterable[str | Sequence[str]]
Templates = Any  # str | Sequence[str] | None


def text_classifier(
    pretrained: Pretrained,
    classes: Classes,
    templates: Templates = None,
    *,
    batch_size: int = 256,
    cache: bool | str | Path = True,
    progress: Callable[[int, int], None] | None = None,
) -> Float32[np.ndarray, "C E"]:
    """One unit vector per class: every prompt of the class embedded, normalised, averaged, normalised again.

    Args:
      pretrained: its text tower and tokenizer are used.
      classes: names, a name with synonyms being "sofa,couch" or ("sofa", "couch"); or what a person would type, as
        `parse_classes` takes it ("voc20", "dog, cat"). All prompts of all synonyms count alike.
      templates: sentences with one "{}", or the name of a set of them (`prompt_templates`); None takes the
        checkpoint's recommendation, else the published 85.
      batch_size: prompts embedded at once; the last batch is filled up, so that one program serves all.
      cache: whether and where to keep the result: True is `data.whole_files.cache_folder()`. The file's
        name is a fingerprint of the text tower's parameters and the token ids. A damaged file is computed again.
      progress: called with (prompts done, prompts in all).

    Raises:
      UserError: a class or a template is not usable, or the checkpoint came without a tokenizer.
    """
    classes = named_classes(classes)
    if not pretrained.config.has_text:
        raise UserError(IMAGE_TOWER_ALONE)
    templates = filled_templates(pretrained, templates)
    prompts = [[template.replace("{}", word) for word in entry for template in templates] for entry in classes]
    counts = [len(entry) for entry in prompts]
    flat = [prompt for entry in prompts for prompt in entry]
    ids = np.asarray(pretrained.tokenizer(flat))
    _warn_of_lost_words(pretrained, classes, flat, ids, counts)
    ids = trimmed(ids, pretrained.config.text)

    path = None
    folder = cache_folder() if cache is True else Path(cache) if cache is not False else None
    if folder is not None:
        path = folder / f"{fingerprint(pretrained, ids, counts)}.npy"
        stored = _stored(path, (len(classes), pretrained.config.embed_dim))
        if stored is not None:
            return stored

    embeddings = _embed_all(pretrained, ids, batch_size, progress)
    starts = np.cumsum([0, *counts[:-1]])
    classifier = _unit(np.add.reduceat(embeddings, starts, axis=0))
    if path is not None:
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, classifier, allow_pickle=False)
        except UserError as error:  # a read-only home is no reason to fail: only to be slow again next time
            warnings.warn(f"the text classifier is not cached: {error}", stacklevel=2)
    return classifier


def classifier_from_embeddings(embeddings: Float[Array, "C N E"]) -> Float[Array, "C E"]:
    """Embeddings of N prompts per class -> unit vectors: normalised, averaged, normalised again. Pure."""
    return unit(unit(embeddings.astype(jnp.float32)).mean(axis=1))


def same_prompts(ids: Int[np.ndarray, "N t"], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Classes whose prompts have the same token ids, each with the first that has them: cut, or unknown letters."""
    first: dict[bytes, int] = {}
    starts = np.cumsum([0, *counts])
    owners = [
        first.setdefault(np.unique(ids[start:stop], axis=0).tobytes(), index)
        for index, (start, stop) in enumerate(itertools.pairwise(starts))
    ]
    return [(owner, index) for index, owner in enumerate(owners) if owner != index]


def named_classes(classes: Classes) -> tuple[ClassName, ...]:
    """`as_classes` for lists, `parse_classes` for text and for the path of a file."""
    if isinstance(classes, os.PathLike):
        if not os.path.isfile(classes):
            raise UserError(f"a class file must exist, but there is no {os.fspath(classes)}: check the path")
        return parse_classes(os.path.abspath(classes))
    return parse_classes(classes) if isinstance(classes, str) else as_classes(classes)


def filled_templates(pretrained: Pretrained, templates: Templates) -> tuple[str, ...]:
    """The sentences that `templates` stands for. Raises UserError when one is no text with exactly one "{}"."""
    if templates is None:
        templates = "maskclip" if pretrained.reading.templates is None else pretrained.reading.templates
    templates = prompt_templates(templates) if isinstance(templates, str) and "{" not in templates else templates
    templates = (templates,) if isinstance(templates, str) else templates
    if not isinstance(templates, list | tuple):
        raise UserError(f"prompt templates are a list of texts, got {shown(templates)}: try ['a photo of a {{}}.']")
    if not templates:
        raise UserError("at least one prompt template is needed, but none was given: try 'a photo of a {}.'")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise UserError(
                f"a prompt template is a text with one {{}} for the name, but {shown(template)} is not: write it once"
            )
        if not template.isascii() and any("\ud800" <= letter <= "\udfff" for letter in template):
            raise UserError(
                f"a prompt template is made of characters, but {shown(template)} is not UTF-8: type it again"
            )
    return tuple(templates)


def trimmed(ids: Int[np.ndarray, "N T"], config: TextConfig) -> Int[np.ndarray, "N t"]:
    """`ids` without the columns that lie behind every prompt's end, where a tower does not look at those.

    Class names are short and contexts long (77 tokens): this is most of the arithmetic.
    """
    eot = config.eot_token_id
    if config.pool != "eot":  # TIPS' end is the last that is not 0; SigLIP's tower reads padding too
        ends = (ids != 0).cumsum(axis=1).argmax(axis=1) if config.pool == "mean" else np.array(ids.shape[1] - 1)
    else:
        ends = ids.argmax(axis=1) if eot is None else (ids == eot).argmax(axis=1)
    length = -(-(int(ends.max()) + 1) // _LENGTH_STEP) * _LENGTH_STEP
    return ids[:, :length]


def fingerprint(pretrained: Pretrained, ids: Int[np.ndarray, "N T"], counts: Sequence[int]) -> str:
    """Hash of all that the classifier depends on: parameters, architecture and dtype of the text tower, token ids.

    The ids stand for names, templates and tokenizer at once; `counts` are prompts per class.
    """
    config = pretrained.config
    digest = hashlib.sha256()  # processors have instructions for it: a third of the time of BLAKE2
    digest.update(repr((_FORMAT, config.text, config.embed_dim, jnp.dtype(pretrained.model.dtype).name)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(pretrained.variables["params"]["text"]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    digest.update(repr((ids.shape, list(counts))).encode())
    digest.update(np.ascontiguousarray(ids, np.int32).data)
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="model")
def _embed(model: CLIP, variables: Any, ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
    return unit(jnp.asarray(model.apply(variables, ids, method="encode_text"), jnp.float32))


def _embed_all(
    pretrained: Pretrained, ids: Int[np.ndarray, "N T"], batch_size: int, progress: Callable[[int, int], None] | None
) -> Float32[np.ndarray, "N E"]:
    variables = jax.device_put({"params": pretrained.variables["params"]})
    batch = min(batch_size, 1 << (len(ids) - 1).bit_length())  # three words need no batch of 256
    out = []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        out.append(np.asarray(_embed(pretrained.model, variables, filled))[: len(part)])
        if progress is not None:
            progress(start + len(part), len(ids))
    return np.concatenate(out)


def _warn_of_lost_words(
    pretrained: Pretrained,
    classes: Sequence[ClassName],
    prompts: Sequence[str],
    ids: Int[np.ndarray, "N T"],
    counts: Sequence[int],
) -> None:
    """Says which prompts are cut to the context length, and which classes are the same to the model."""
    from maskclip_jax.checkpoints.tokenizer import Tokenizer  # here: loaded by then, if the tokenizer is one of ours

    if not isinstance(pretrained.tokenizer, Tokenizer):  # a function of the caller's
        return
    full = np.flatnonzero(ids[:, -1])
    lengths = pretrained.tokenizer.lengths([prompts[i] for i in full]) if len(full) else []
    if cut := [(length, prompts[i]) for i, length in zip(full, lengths, strict=True) if length > ids.shape[1]]:
        length, prompt = max(cut)
        warnings.warn(
            f"a prompt has at most {ids.shape[1]} tokens, but {len(cut)} of {len(prompts)} have more and are cut, the "
            f"longest ({length}) {shown(prompt)}: use shorter names",
            LostWords,
            stacklevel=3,
        )
    if cut and (alike := same_prompts(ids, counts)):  # a small tokenizer's unknown words are its own affair
        first, second = (shown(str(classes[index])) for index in alike[0])
        warnings.warn(
            f"{first} and {second} are the same tokens to this model, so that the second is never found "
            f"(such pairs: {len(alike)}): name one of them otherwise",
            LostWords,
            stacklevel=3,
        )


def _stored(path: Path, shape: tuple[int, int]) -> Float32[np.ndarray, "C E"] | None:
    """The classifier in a cache file; None when there is none or when it is not what we would have written."""
    with contextlib.suppress(Exception):  # a damaged header raises what Python's own parser does
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == shape:
            lengths = np.linalg.norm(found, axis=1)
            if np.abs(lengths - 1).max() < 1e-4:  # NaN fails too
                return found
    return None


def _unit(x: Float32[np.ndarray, "C E"]) -> Float32[np.ndarray, "C E"]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
