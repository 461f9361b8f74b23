"""The models that the page offers, loaded when first used, with the text classifiers computed for each."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.names import ClassName, shown
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import LostWords, filled_templates, text_classifier
from maskclip_jax.web.cache import Memory

WORD_BYTES = 2**25  # of classifier rows kept per model
OVERHEAD = 500  # bytes of a row's key and place, beside its letters


class Reader:
    """A model with its variables on the device, and a row of the classifier for every class requested.

    Rows are kept by class, not by list: one more word costs the text tower one word's prompts.
    """

    def __init__(self, pretrained: Pretrained):
        self.pretrained = dataclasses.replace(pretrained, variables=jax.device_put(pretrained.variables))
        self._rows: Memory[np.ndarray] = Memory(WORD_BYTES)

    def classifier(self, words: Sequence[ClassName], templates: str | None) -> Float32[np.ndarray, "words E"]:
        """`text_classifier`, without its cache on disk: what visitors type is not kept there."""
        sentences = filled_templates(self.pretrained, templates)
        digest = hashlib.blake2b(repr(sentences).encode(), digest_size=16).digest()  # a key of its own size
        known = {word: self._rows.get((digest, word)) for word in words}
        missing = [word for word, row in known.items() if row is None]
        if missing:
            with warnings.catch_warnings():  # one thread at a time: `server.Turns`
                warnings.simplefilter("error", LostWords)
                try:
                    rows = text_classifier(self.pretrained, missing, sentences, cache=False)
                except LostWords as warning:
                    raise UserError(str(warning)) from warning
            for word, row in zip(missing, rows, strict=True):
                size = row.nbytes + OVERHEAD + 4 * sum(map(len, word))
                known[word] = self._rows.put((digest, word), row.copy(), size)  # a view would keep all rows
        found = np.stack([known[word] for word in words])
        _, first, owners = np.unique(found, axis=0, return_index=True, return_inverse=True)
        for index, owner in enumerate(first[owners.reshape(-1)]):
            if words[owner] != words[index]:
                raise UserError(
                    f"{shown(str(words[owner]))} and {shown(str(words[index]))} are the same to this model: "
                    "name one of them otherwise"
                )
        return found


class Models:
    """`names` of models, and `load` that makes a `Pretrained` of one, or a trained student; maybe a backbone's name."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Any], affinity: str | None = None):
        self.affinity = affinity
        self.names = tuple(dict.fromkeys(names))
        self._load = load
        self._readers: dict[str, Any] = {}

    def reader(self, name: str | None) -> Any:
        """The model of that name (None: the first): a `Reader`, or a student. Raises UserError for another name."""
        name = self.names[0] if name is None else name
        if name not in self.names:
            raise UserError(f"a model is one of {', '.join(self.names)}, got {name!r}: choose one of them")
        if name not in self._readers:
            loaded = self._load(name)
            self._readers[name] = Reader(loaded) if isinstance(loaded, Pretrained) else loaded
        return self._readers[name]

    def recommended_denoising(self, name: str) -> float | None:
        """The checkpoint's own threshold, once it is loaded."""
        reader = self._readers.get(name)
        return reader.pretrained.reading.prompt_denoising if isinstance(reader, Reader) else None

    def students(self) -> dict[str, list[str]]:
        """The classes of every student that is loaded, without the background."""
        students = {name: one for name, one in self._readers.items() if not isinstance(one, Reader)}
        return {name: list(one.config.label_names[bool(one.config.background) :]) for name, one in students.items()}
