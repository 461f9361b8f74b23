"""Evaluation: one engine, the same answers as the plain ways, whatever the batch, the shapes and the views."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_flags import with_devices
from tiny_distill import CLASSES, STUDENT, config_of, pretrained_clip, setup, text_rows
from tiny_run import HERE

from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.data.buckets import bucket_shape
from maskclip_jax.data.preprocess import Preprocess, interpolation_matrix
from maskclip_jax.data.sources import ArraySource, Example
from maskclip_jax.distill.config import TeacherConfig
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.step import make_eval_step
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate import engine as views
from maskclip_jax.evaluate.encoder import evaluate, evaluate_teacher, teacher_reader
from maskclip_jax.evaluate.engine import MOST_WAITING, Counter, Reader, batches, canvas_shape
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment.grid import usual_sides
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.predict import segment_images
from maskclip_jax.segment.refine import Logits
from maskclip_jax.students import create_student

RNG = np.random.default_rng(2)


class Mixed:
    """Images of different sizes."""

    SIZES = ((32, 32), (40, 56), (32, 32), (21, 33), (40, 56), (64, 32), (32, 32))

    def __init__(self):
        self.examples = []
        for i, (height, width) in enumerate(self.SIZES):
            image = RNG.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
            image = image.repeat(4, 0).repeat(4, 1)[:height, :width]
            labels = RNG.integers(0, 5, (height, width)).astype(np.uint8)
            labels[:2] = 255
            self.examples.append(Example(image, labels, str(i)))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


MIXED = Mixed()


def test_a_teacher_scores_as_its_masks_do():
    """The same pixels as `segment_images`, which knows nothing of this engine: sizes, buckets and padding included."""
    clip = pretrained_clip()
    clip = dataclasses.replace(clip, preprocess=dataclasses.replace(clip.preprocess, short_side=48))
    options = {"prompt_denoising": 0.3}
    found = segment_images(
        [e.image for e in MIXED.examples], CLASSES, clip, classifier=text_rows(), cache=False, **options
    )
    expected = sum(confusion_matrix(e.labels, f.labels, 5) for e, f in zip(MIXED.examples, found, strict=True))
    scores = evaluate_teacher(clip, text_rows(), CLASSES, MIXED, unseen=(1, 3), batch_size=2, **options)
    assert scores.confusion.sum() == expected.sum() == sum((e.labels != 255).sum() for e in MIXED.examples)
    moved = np.abs(scores.confusion - expected).sum() / expected.sum()
    assert moved < 2e-3  # sums in another order: pixels on the fence
    assert scores.zero_shot is not None
    values = scores.to_dict()
    json.dumps(values)
    assert values["protocol"]["prompt denoising"] == 0.3
    assert set(values["per class"]) == set(CLASSES)
    assert np.count_nonzero(scores.confusion.sum(0)) > 1  # not one class everywhere


def test_a_counter_reads_at_the_size_of_its_options():
    clip = pretrained_clip()
    options = Options(short_side=24)
    expected = evaluate_teacher(clip, text_rows(), CLASSES, MIXED, options)
    assert expected.protocol["short side"] == 24
    counter = Counter(teacher_reader(clip, options), 5)
    kept = evaluate_teacher(clip, text_rows(), CLASSES, MIXED, options, counter=counter)
    np.testing.assert_array_equal(kept.confusion, expected.confusion)
    other = evaluate_teacher(clip, text_rows(), CLASSES, MIXED, short_side=40)
    assert (other.confusion != expected.confusion).any()
    with pytest.raises(UserError, match="sizes images otherwise"):
        evaluate_teacher(clip, text_rows(), CLASSES, MIXED, short_side=40, counter=counter)


def test_what_only_a_protocol_reads_is_refused(monkeypatch):
    monkeypatch.setattr("maskclip_jax.evaluate.encoder.with_backbone", lambda *_: pytest.fail("fetched first"))
    for options in (Options(pamr=1), Options(window=32)):
        with pytest.raises(UserError, match=f"got {next(iter(options.changed()))}: call evaluate_protocol"):
            teacher_reader(pretrained_clip(), options)
        with pytest.raises(UserError, match="call evaluate_protocol"):
            evaluate_teacher(pretrained_clip(), text_rows(), CLASSES, MIXED, options)


def test_a_student_scores_as_its_logits_do():
    config = config_of()
    _, frozen, student, state = setup(config)
    images = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    labels = RNG.integers(0, 5, (5, 32, 32)).astype(np.int32)
    p_eval = make_eval_step(config, student)
    expected = np.asarray(p_eval(state, frozen, images[None], labels[None]))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    scores = evaluate_student(config, variables, frozen.text, ArraySource(images, labels), batch_size=2)
    assert np.abs(scores.confusion - expected).sum() <= 4
    assert scores.images == 5
    assert scores.zero_shot is None
    again = evaluate_student(config, variables, frozen.text, ArraySource(images, labels), batch_size=4)
    assert np.abs(scores.confusion - again.confusion).sum() <= 4


def brightness_reader(short_side=None):
    """A 'network' that can be worked by hand: class 1 where a 4×4 cell is bright, class 0 elsewhere."""

    def scores(variables, pixels, grid):
        cells = pixels.mean(-1).reshape(pixels.shape[0], pixels.shape[1] // 4, 4, pixels.shape[2] // 4, 4)
        bright = cells.mean((2, 4))
        return Logits(jnp.stack([jnp.full_like(bright, variables["threshold"]), bright], -1))

    preprocess = Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", short_side, None, multiple=8)
    return Reader(scores, lambda v, s: jax.nn.softmax(20 * s.values, axis=-1), preprocess)


def halves():
    """A dark left and a bright right half, the truth being just that: 20 × 24 pixels, padded to 24 × 24."""
    image = np.zeros((20, 24, 3), np.uint8)
    image[:, 12:] = 255
    labels = np.zeros((20, 24), np.uint8)
    labels[:, 12:] = 1
    return ArraySource(image[None], labels[None])


def test_a_last_batch_takes_the_program_of_the_full_ones():
    images = np.zeros((7, 16, 16, 3), np.uint8)
    images[2, 4:8] = 255
    source = ArraySource(images, np.zeros((7, 16, 16), np.uint8))
    counter = Counter(brightness_reader(), 2)
    variables = {"threshold": np.float32(0.5)}
    for _ in range(2):
        scores = evaluate(counter, variables, source, ("dark", "bright"), batch_size=3, protocol={})
        assert scores.confusion.sum() == 7 * 256  # an image that only fills a batch does not count
        assert 0 < scores.confusion[0, 1] < 256
    assert counter._count._cache_size() == 1


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("flip", [False, True])
def test_views_land_where_they_came_from(scales, flip):
    """A flip that is not undone, or a scale that is off, would put bright on the dark side."""
    counter, source = Counter(brightness_reader(), 2), halves()
    variables = {"threshold": np.float32(0.5)}
    scores = evaluate(counter, variables, source, ("dark", "bright"), scales=scales, flip=flip, protocol={})
    assert scores.confusion.sum() == 480
    assert scores.pixel_accuracy == 1.0
    np.testing.assert_array_equal(scores.per_class, [1.0, 1.0])


def test_views_are_averaged():
    """A threshold that one scale passes and the mean of both does not, against the same sum in NumPy."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    labels = np.zeros((16, 16), np.uint8)
    source = ArraySource(image[None], labels[None])
    counter = Counter(brightness_reader(), 2)
    flipped = evaluate(
        counter, {"threshold": np.float32(0.5)}, source, ("a", "b"), scales=(1.0,), flip=True, protocol={}
    )
    # by hand: cells are 4 × 4 means; the flip of this network is the same network, so both views agree exactly
    plain = evaluate(counter, {"threshold": np.float32(0.5)}, source, ("a", "b"), protocol={})
    np.testing.assert_array_equal(plain.confusion, flipped.confusion)
    coarse = evaluate(counter, {"threshold": np.float32(0.5)}, source, ("a", "b"), scales=(0.5,), protocol={})
    both = evaluate(counter, {"threshold": np.float32(0.5)}, source, ("a", "b"), scales=(0.5, 1.0), protocol={})
    assert not np.array_equal(plain.confusion, coarse.confusion)
    bright = sorted(s.confusion[0, 1] for s in (plain, coarse))
    assert bright[0] - 60 < both.confusion[0, 1] < bright[1] + 60


@pytest.mark.parametrize("most", [2**27, 300 * 8 * 24])
def test_more_classes_than_a_byte_holds(monkeypatch, most):
    """255 is a class like any other there and 65535 is ignored; what does not fit at once is counted in strips."""

    def scores(variables, pixels, grid):
        cells = pixels.mean(-1).reshape(pixels.shape[0], pixels.shape[1] // 4, 4, pixels.shape[2] // 4, 4).mean((2, 4))
        return Logits(-jnp.square(300 * cells[..., None] - jnp.arange(300)))

    monkeypatch.setattr(views, "MOST_SCORES", most)
    reader = dataclasses.replace(brightness_reader(), scores=scores)
    image = np.zeros((20, 24, 3), np.uint8)
    image[:, 12:] = 217  # class 255
    labels = np.where(image[..., 0] == 217, 255, 299).astype(np.uint16)
    labels[:2] = 65535
    options = {"flip": True, "protocol": {}}
    names = [f"c{i}" for i in range(300)]
    found = evaluate(Counter(reader, 300), {}, ArraySource(image[None], labels[None]), names, **options)
    assert found.confusion.sum() == 18 * 24
    assert found.confusion[255, 255] > 150
    assert found.confusion[299, 0] > 150
    assert found.protocol["ignored label"] == 65535
    labels[0, 0] = 300
    with pytest.raises(UserError, match=r"labels are 0..299 or 65535, but 000000 has 300"):
        evaluate(Counter(reader, 300), {}, ArraySource(image[None], labels[None]), names, **options)
    with pytest.raises(UserError, match="at most 10,000 classes are scored"):
        Counter(reader, 10_001)


def test_one_line_for_data_without_truth():
    clip = pretrained_clip()
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="scores need annotation, but 000000 has none"):
        evaluate_teacher(clip, text_rows(), CLASSES, ArraySource(images))
    with pytest.raises(UserError, match=r"labels are 0\.\.4 or 255, but 000000 has 9"):
        evaluate_teacher(clip, text_rows(), CLASSES, ArraySource(images, np.full((1, 32, 32), 9)))
    with pytest.raises(UserError, match=r"scales are 0.0625 to 16"):
        evaluate_teacher(clip, text_rows(), CLASSES, MIXED, scales=(0.0, 1.0))


def test_the_short_side_of_training_is_that_of_scoring():
    config = config_of(augmentation=AugmentConfig(short_side=64))
    _, frozen, _, state = setup(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    source = ArraySource(RNG.integers(0, 256, (1, 32, 48, 3), np.uint8), np.zeros((1, 32, 48), np.uint8))
    scores = evaluate_student(config, variables, frozen.text, source)
    assert scores.confusion.sum() == 32 * 48  # counted on the annotation's own pixels
    assert scores.protocol["short side"] == 64


@pytest.mark.parametrize("stem", ["v1c", "clip"])
@pytest.mark.parametrize("fidelity", ["clip", "released"])
def test_students_see_no_padding(stem, fidelity):
    """An image of odd sides, by hand: the student's own cells of just its pixels, brought to them as its habits say."""
    config = config_of(teacher=TeacherConfig(fidelity=fidelity), student=dataclasses.replace(STUDENT, stem=stem))
    _, frozen, _, state = setup(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    image = RNG.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)[:45, :61]
    labels = RNG.integers(0, 5, (45, 61)).astype(np.int32)
    pixels = (image.astype(np.float32) / 255 - config.image_mean) / np.asarray(config.image_std)
    plain = create_student(dataclasses.replace(config.student_config, bn_axis_name=None))
    logits = np.asarray(jax.jit(plain.apply)(variables, jnp.asarray(pixels[None], jnp.float32), frozen.text))[0]
    cells = (6, 8) if stem == "v1c" else (5, 7)  # CLIP's pools drop what is left over
    assert logits.shape == (*cells, 5)
    if fidelity == "released":
        rows, columns = (interpolation_matrix(n, side) for n, side in zip(cells, (45, 61), strict=True))
    else:  # cell i is in the middle of pixels 8 i … 8 i + 7
        rows, columns = (interpolation_matrix(n, 8 * n) for n in cells)
        rows, columns = (
            np.concatenate([m, m[-1:].repeat(8, 0)])[:side] for m, side in zip((rows, columns), (45, 61), strict=True)
        )
    expected = np.einsum("yh,hwc,xw->yxc", rows, logits, columns).argmax(-1)
    found = evaluate_student(config, variables, frozen.text, ArraySource(image[None], labels[None]))
    assert np.abs(found.confusion - np.asarray(confusion_matrix(labels, expected, 5))).sum() <= 4


def test_few_programs_serve_many_sizes_of_images():
    """Nine sizes, two programs; each image by itself takes the same ones, and counts the same pixels."""
    config = config_of(augmentation=AugmentConfig(short_side=32), learning_rate=0.03)  # a counter of its own
    _, frozen, _, state = setup(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sizes = [(32, 33 + n) for n in range(6)] + [(27, 30), (20, 23), (45, 32)]
    examples = [
        Example(RNG.integers(0, 256, (*size, 3), np.uint8), RNG.integers(0, 5, size).astype(np.uint8), f"{n}")
        for n, size in enumerate(sizes)
    ]
    score = functools.partial(evaluate_student, config, variables, frozen.text, batch_size=4)
    with count_compiles() as count:
        scores = score(examples)
    assert count.programs == 2
    with count_compiles() as count:
        alone = sum(score([example]).confusion for example in examples)
    assert count.programs == 0
    np.testing.assert_array_equal(alone, scores.confusion)
    assert scores.confusion.sum() == sum(h * w for h, w in sizes)


def test_vocs_sizes_need_eight_programs():
    """Long side 500, a short side of every length up to 1:3, short side 512: padded shape and canvas."""
    preprocess = Preprocess((0.5,) * 3, (0.5,) * 3, "opencv", 512, 2048)
    sizes = [(500, side) for side in range(167, 501)] + [(side, 500) for side in range(167, 501)]
    needed = set()
    for size in sizes:
        padded = bucket_shape(*preprocess.resized(size), 8, **usual_sides(preprocess))
        canvas = canvas_shape(size, padded)
        assert canvas >= size
        assert canvas[1] >= size[1]
        needed.add((padded, canvas))
    assert len(needed) <= 8
    assert canvas_shape((1000, 600), (512, 744)) == (1024, 1504)
    assert canvas_shape((700, 700), (512, 744)) == (736, 1056)


def test_many_sizes_do_not_wait_for_ever():
    """Images of which no two are alike leave before all of them are in memory, each once."""
    read = []

    def examples():
        for n in range(2 * MOST_WAITING):
            read.append(n)
            yield (np.full(n, n),)

    found = batches(examples(), lambda example: 8)
    first = next(found)
    assert len(read) == MOST_WAITING + 1
    assert sorted(len(one[0]) for batch in (first, *found) for one in batch) == read


def test_all_devices_count(tmp_path):
    """Three devices and seven images: shares that do not divide, in another process; the same matrix."""
    code = f"""
import sys; sys.path[:0] = [{str(HERE.parent / "evaluate")!r}, {str(HERE)!r}, {str(HERE.parents[1])!r}]
import jax, numpy as np
from test_encoder import MIXED, brightness_reader
from maskclip_jax.evaluate.encoder import evaluate
from maskclip_jax.evaluate.engine import Counter
assert jax.local_device_count() == 3
names = tuple("abcde")
found = evaluate(Counter(brightness_reader(), 5), {{"threshold": np.float32(0.5)}}, MIXED, names, protocol={{}})
np.save({str(tmp_path / "three.npy")!r}, found.confusion)
"""
    environment = os.environ | {"XLA_FLAGS": with_devices(3), "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    one = evaluate(Counter(brightness_reader(), 5), {"threshold": np.float32(0.5)}, MIXED, tuple("abcde"), protocol={})
    np.testing.assert_array_equal(np.load(tmp_path / "three.npy"), one.confusion)
    assert one.confusion.sum() == sum((e.labels != 255).sum() for e in MIXED.examples)
