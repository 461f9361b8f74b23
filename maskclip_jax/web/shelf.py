"""The models that can be picked, loaded when first wanted, and the words each has read already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float32

from maskclip_jax.clip.load import Pretrained
from maskclip_jax.data.vocabulary import ClassName
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import filled_templates, text_classifier
from maskclip_jax.web.memory import Memory

WORD_BYTES = 2**25  # of classifier rows kept per model


class Reader:
    """A model with its variables on the device, and a row of the classifier for every class it was asked for.

    Rows are kept by class, not by list: one more word costs the text tower one word's prompts.
    """

    def __init__(self, pretrained: Pretrained):
        self.pretrained = dataclasses.replace(pretrained, variables=jax.device_put(pretrained.variables))
        self._rows: Memory[np.ndarray] = Memory(WORD_BYTES)

    def classifier(self, words: Sequence[ClassName], templates: str | None) -> Float32[np.ndarray, "words E"]:
        """`text_classifier`, without its cache on disk: what visitors type is not kept there."""
        sentences = filled_templates(self.pretrained, templates)
        known = {word: self._rows.get((sentences, word)) for word in words}
        missing = [word for word, row in known.items() if row is None]
        if missing:
            rows = text_classifier(self.pretrained, missing, sentences, cache=False)
            for word, row in zip(missing, rows, strict=True):
                known[word] = self._rows.put((sentences, word), row, row.nbytes)
        return np.stack([known[word] for word in words])


class Shelf:
    """`names` of models, and `load` that makes a `Pretrained` of one."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Pretrained]):
        self.names = tuple(dict.fromkeys(names))
        self._load = load
        self._readers: dict[str, Reader] = {}

    def reader(self, name: str | None) -> Reader:
        """The model of that name (None: the first). Raises UserError for one that is not on the shelf."""
        name = self.names[0] if name is None else name
        if name not in self.names:
            raise UserError(f"a model is one of {', '.join(self.names)}, but {name!r} came: choose one of them")
        if name not in self._readers:
            self._readers[name] = Reader(self._load(name))
        return self._readers[name]

    def recommended_denoising(self, name: str) -> float | None:
        """The checkpoint's own threshold, once it is loaded."""
        reader = self._readers.get(name)
        return None if reader is None else reader.pretrained.reading.prompt_denoising
