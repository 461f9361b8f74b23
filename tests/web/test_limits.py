"""What a question may cost, told before anything is allocated; few programs; rows of the text tower counted whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.data.vocabulary import as_classes
from maskclip_jax.errors import UserError
from maskclip_jax.ops.memory import resident_bytes
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.settings import prediction_settings
from maskclip_jax.segment.windows import plan_windows, window_side
from maskclip_jax.web.limits import Programs, check_cost
from maskclip_jax.web.models import OVERHEAD, WORD_BYTES, Reader

WORDS = as_classes(["dog", "sand"])


def settings_of(models, window=None, stride=None, model="embedded", short_side=144):
    """As `segment` takes them, for a model that knows no longest side."""
    reader = models.reader(model)
    rows = reader.classifier(WORDS, "single")
    options = {"classifier": rows, "window": window, "stride": stride, "short_side": short_side, "cache": False}
    settings = prediction_settings(WORDS, reader.pretrained, **options)
    return dataclasses.replace(settings, preprocess=dataclasses.replace(settings.preprocess, long_side=None))


@pytest.mark.parametrize("size", [(128, 128), (3000, 4000), (1, 1), (500, 2000)])
def test_usual_images_are_read(models, size):
    for window in (None, 64):
        check_cost(size, settings_of(models, window), 2**29)


@pytest.mark.parametrize(
    ("size", "window", "stride", "short_side", "message"),
    [
        (
            (1, 50_000_000),
            None,
            None,
            144,
            r"to at most 8192 pixels, but this one of 50000000 × 1 would become 7200000000",
        ),
        ((1, 50_000_000), 64, None, 144, "to at most 8192 pixels"),
        ((128, 128), 8, 4, 144, "at most 256 windows, got 1225"),
        ((1000, 50_000), 140, 70, 144, "windows are for images of usual shapes"),
        ((1000, 1000), None, None, 2000, r"the page reads at most 8192 positions at once, and fewer .*: cut the image"),
        ((4000, 4000), 2048, 2048, 4000, r"the page reads at most 8192 positions at once, .*: take a smaller window"),
        ((1000, 1000), 256, 64, 1000, r"keeps 128 MB of features, but these would be .* MB: take a smaller window"),
    ],
)
def test_what_costs_too_much(models, size, window, stride, short_side, message):
    settings = settings_of(models, window, stride, "embedded", short_side)
    with pytest.raises(UserError, match=message):
        check_cost(size, settings, 2**20)


def test_windows_of_every_size_have_few_programs(models):
    """No larger than the image, four sides to an octave, and never smaller than the window."""
    sides = set()
    settings = settings_of(models)
    for window in range(8, 4096, 8):
        plan = plan_windows((1000, 1500), dataclasses.replace(settings, options=Options(window=window, stride=window)))
        multiple = settings.config.multiple
        sides.add(side := window_side(plan, multiple))
        assert side % multiple == 0
        assert max(plan.rows.size, plan.columns.size) <= side <= 1.5 * max(window, multiple)
    assert len(sides) < 24


def test_programs_are_forgotten_when_there_are_many():
    programs = Programs(most=2)
    try:
        for size in range(1, 7):
            jax.jit(lambda x: x * 2 + 1)(jnp.zeros(size))
            programs.make_room()
        assert programs.cleared >= 1
        assert programs.count <= 2
    finally:
        programs.close()


@pytest.mark.skipif(resident_bytes() is None, reason="memory is read from Linux's /proc")
def test_programs_are_forgotten_when_memory_has_grown_by_more_than_is_kept():
    """What is kept on purpose does not count, and what stays after all are gone is the new beginning."""
    kept, grown = [], []
    programs = Programs(room=2**25, kept=lambda: sum(array.nbytes for array in kept))
    try:
        for array, cleared in ((kept, 0), (grown, 1), (kept, 1)):
            jax.jit(lambda x: x * 2 + 1)(jnp.zeros(7))
            array.append(np.ones(2**26, np.uint8))
            programs.make_room()
            assert programs.cleared == cleared
    finally:
        programs.close()


def test_rows_are_counted_with_their_keys(models):
    reader = Reader(models.reader("embedded").pretrained)
    for number in range(5):
        reader.classifier(WORDS, f"picture {number} of a {{}}")
    rows = reader._rows
    assert len(rows) == 10
    assert 10 * (OVERHEAD + 4 * reader.pretrained.config.embed_dim) < rows.nbytes <= WORD_BYTES
    assert all(len(key[0]) == 16 for key in rows._values)  # not the template itself, which may be long
    assert all(row.base is None for row, _ in rows._values.values())  # no view of a larger array


def test_words_that_are_one_to_the_model(models):
    reader = models.reader("embedded")
    with pytest.raises(UserError, match="a prompt has at most 64 tokens, but 1 of 1 have more and are cut"):
        reader.classifier(as_classes(["9" * 200]), "single")
    assert reader.classifier(as_classes(["dog", "cat"]), "single").shape[0] == 2
