"""Compiling the usual programs when the server starts: the image tower at common shapes, the scoring of some words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from maskclip_jax.data.vocabulary import as_classes
from maskclip_jax.segment.feature_cache import class_probability, keep_features, read_features
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.settings import prediction_settings
from maskclip_jax.web.models import Reader
from maskclip_jax.web.session import Session, shown_size

ASPECTS = ((1, 1), (3, 4), (4, 3), (9, 16), (16, 9))  # a shape bucket each (data.buckets: sides grow by 3^(1/3))
COLUMNS = (8, 16)  # words there is room for


def steps(session: Session) -> Iterator[Callable[[], None]]:
    """What is to be run once, in turn, for the first model of the models."""
    reader = session.models.reader(None)
    if not isinstance(reader, Reader):  # a student
        image = np.zeros((*shown_size((480, 640)), 3), np.uint8)
        yield lambda: list(reader.iter_segmentations([image], None, Options()))
        return
    short = reader.pretrained.preprocess.short_side or reader.pretrained.preprocess.image_size
    assert short is not None  # every encoder's file says one of the two
    words = as_classes(["dog", "grass", "sky"])

    def one(aspect: tuple[int, int]) -> None:
        rows = reader.classifier(words[:1], None), reader.classifier(words, None)  # one word's batch, and a full one
        settings = prediction_settings(words, reader.pretrained, classifier=rows[1], cache=False)
        size = tuple(round(short * side / min(aspect)) for side in aspect)
        kept = keep_features(np.zeros((*size, 3), np.uint8), settings)
        for columns in COLUMNS:
            read_features(kept, settings, size=shown_size(size), columns=columns)
            if aspect == (1, 1):
                class_probability(kept, settings, 0, size=shown_size(size), columns=columns)
        if aspect == (1, 1):
            smoothed = prediction_settings(words, reader.pretrained, classifier=rows[1], key_smoothing=1.0, cache=False)
            read_features(kept, smoothed, size=shown_size(size), columns=COLUMNS[0])

    for aspect in ASPECTS:
        yield lambda aspect=aspect: one(aspect)
