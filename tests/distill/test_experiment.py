"""Experiment files and typed changes to them."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import config_of

from maskclip_jax.data.sources import open_source
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.experiment import load_experiment, with_overrides
from maskclip_jax.errors import UserError
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import create_student
from maskclip_jax.students.weights import load_backbone_weights

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CONFIG = config_of()


@pytest.mark.parametrize("variant", ["", ":from_clip", ":demo", ":second_round", ":ablation_feature"])
def test_the_scenes(variant):
    before = list(sys.path)
    config = load_experiment(f"{EXPERIMENTS / 'configs' / 'scenes.py'}{variant}")
    assert DistillConfig.from_dict(config.to_dict()) == config
    assert config.num_classes == 66
    assert sys.path == before


def test_the_teachers_backbone_fits_the_student():
    """No weights of the embedded CLIP's tower are left over, and none of the student's backbone is left unfilled."""
    config = load_experiment(f"{EXPERIMENTS / 'configs' / 'scenes.py'}:demo")
    student = create_student(config.student_config)
    images, text = jnp.zeros((1, 64, 64, 3)), jnp.zeros((66, 128))
    shapes = shapes_of(student, images, text)
    filled = load_backbone_weights(config.backbone_weights, dict(shapes))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(filled["params"]["backbone"]))


def test_no_scene_is_both_trained_on_and_scored():
    """The 64 scored scenes are the archive's first 64."""
    config = load_experiment(EXPERIMENTS / "configs" / "scenes.py")
    train, scored = open_source(config.train_data), open_source(config.eval_data)
    assert (len(train), len(scored)) == (436, 64)
    archive = open_source(config.train_data.split("[")[0])
    np.testing.assert_array_equal(archive[0].labels, scored[0].labels)
    np.testing.assert_array_equal(archive[63].labels, scored[63].labels)
    np.testing.assert_array_equal(archive[64].image, train[0].image)


def test_the_papers_runs():
    """docs/method.md, section 7: steps, crops, rates and protocols as published."""
    load = lambda name: load_experiment(f"{EXPERIMENTS / 'configs' / 'paper.py'}:{name}")  # noqa: E731
    voc = load("voc20/annotation_free/r50")
    assert (voc.steps, voc.crop_size, voc.batch_size, voc.num_classes) == (2000, 512, 16, 20)
    assert (voc.learning_rate, voc.min_learning_rate, voc.momentum, voc.weight_decay) == (0.01, 1e-4, 0.9, 5e-4)
    assert (voc.foreground, voc.student.width, voc.student.head) == ("annotation", 1024, "deeplabv2")
    zero = load("voc20/zero_shot/r50")
    assert (zero.steps, zero.guided_steps, zero.self_training, zero.num_classes) == (20_000, 1999, True, 20)
    assert (len(zero.unseen), zero.mode) == (5, "zero-shot")
    context = load("context59/zero_shot/r50")
    assert (context.steps, context.crop_size, context.learning_rate, context.weight_decay) == (40_000, 480, 0.004, 1e-4)
    assert (context.student.head, len(context.unseen), context.guided_steps) == ("deeplabv3plus", 10, 3999)
    stuff = load("cocostuff171/annotation_free/vit_b16")
    assert (stuff.steps, stuff.foreground, stuff.student.width) == (8000, "none", 512)
    assert len(load("cocostuff171/zero_shot/r50x16").unseen) == 15


def test_every_target_has_a_config():
    from experiments.configs.paper import TARGETS, config

    assert all(config(name).steps > 0 for name in TARGETS)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("batch_size=4", "batch_size", 4),
        ("learning_rate=1", "learning_rate", 1.0),
        ("learning_rate = 2e-2", "learning_rate", 0.02),
        ("teacher.prompt_denoising=0.5", "teacher.prompt_denoising", 0.5),
        ("teacher.key_smoothing=1", "teacher.key_smoothing", 1.0),
        ("teacher.method=naclip", "teacher.method", "naclip"),
        ("prompt_denoising=null", "teacher.prompt_denoising", None),
        ("templates=null", "teacher.templates", None),
        ("dense_stride=16", "teacher.dense_stride", 16),
        ("teacher_fidelity=released", "teacher.fidelity", "released"),
        ("unseen=dog, cat", "unseen", ("dog", "cat")),
        ('unseen=["dog", "cat"]', "unseen", ("dog", "cat")),
        ("classes=dog, cat", "classes", "dog, cat"),
        ("dtype=bfloat16", "dtype", "bfloat16"),
        ("train_data=/a=b", "train_data", "/a=b"),
        ("teacher=17", "teacher.model", "17"),
        ("image_mean=0.1,0.2,0.3", "image_mean", (0.1, 0.2, 0.3)),
        ("student.rates=(1, 2, 4)", "student.rates", (1, 2, 4)),
        ("student.dropout=0", "student.dropout", 0.0),
        ("student.backbone=resnet50", "student.backbone", "resnet50"),
        ("augmentation.scale=[0.5, 2]", "augmentation.scale", (0.5, 2.0)),
        ("augmentation.photometric=false", "augmentation.photometric", False),
    ],
)
def test_changes_have_the_fields_type(change, key, value):
    found = with_overrides(CONFIG, [change])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("batchsize=4", "batchsize is no key of the config: known are classes,"),
        ("student.depth=3", "student.depth is no key"),
        ("steps.more=3", "steps has no keys of its own"),
        ("student=small", "student has keys of its own: set one of student.width"),
        ("batch_size=four", "batch_size is int, got four"),
        ("batch_size=4.5", "batch_size is int"),
        ("batch_size=true", "batch_size is int"),
        ("self_training=1", "self_training is bool, got 1"),
        ("augmentation.scale=1", r"augmentation\.scale is tuple"),
        ("prompt_denoising=often", r"teacher\.prompt_denoising is float or int or null, got often"),
        ("teacher.window=224", "teacher.window is no key"),
        ("batch_size", "a change is key=value"),
        ("=4", "a change is key=value"),
        ("mode=magic", "mode is one of"),
        ("seed=-1", r"seed is within 0\.\."),
        ("seed=99999999999999999999999", r"seed is within 0\.\."),
        ("steps=-5", "steps is within 1"),
        ("batch_size=0", "batch_size is within 1"),
        ("batch_size=1000000000", "batch_size is within 1..65536, got 1000000000"),
        ("crop_size=1000000000", "crop_size is within"),
        ("accumulate=-1", "accumulate is within 1"),
        ("learning_rate=1e999", "learning_rate is within"),
        ("learning_rate=1" + "0" * 400, "learning_rate is float"),
        ("learning_rate=-1", "learning_rate is within"),
        ("weight_decay=-0.1", "weight_decay is within"),
        ("momentum=7", "momentum is within"),
        ("image_std=0,1,1", "image_std is within"),
        ("keep_last=0", "keep_last is within"),
        ("dense_stride=-8", "dense_stride is within"),
        ("guided_steps=-1", "guided_steps is within"),
        ("student.width=-1", "student.width is within 1..65536, got -1"),
        ("student.width=10000000", "student.width is within"),
        ("student.layers=1,1,1,0", "student.layers is within"),
        ("student.layers=1000000000,1,1,1", "student.layers is within"),
        ("student.rates=0", "student.rates is within"),
        ("student.rates=()", "student.rates is 1 to 64 numbers"),
        ("student.base_width=0", "student.base_width is within"),
        ("student.dropout=1.5", "dropout"),
        ("augmentation.short_side=0", "augmentation.short_side is within"),
        ("augmentation.crop_retries=1000000000", "augmentation.crop_retries is within"),
        ("augmentation.hue=-1", "augmentation.hue is within"),
        ("batch_size=" + "(" * 5000, "batch_size is int"),
        ("batch_size=" + "9" * 5000, "batch_size is (int|within)"),
        ("x" * 100_000 + "=1", "x … is no key of the config"),
        ("mode=" + "x" * 100_000, "mode is one of .*x …"),
        ("y" * 100_000, "a change is key=value"),
    ],
    ids=lambda text: text[:40],
)
def test_one_line_for_changes_that_cannot_be(change, why):
    with pytest.raises(UserError, match=why) as error:
        with_overrides(CONFIG, [change])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_batches_that_fit_nowhere_are_refused_together():
    with pytest.raises(UserError, match="a micro-batch has at most 17,179,869,184 pixels, but batch_size 65536"):
        with_overrides(CONFIG, ["batch_size=65536", "crop_size=1024"])
    assert with_overrides(CONFIG, ["batch_size=65536", "crop_size=1024", "accumulate=16"]).batch_size == 65536


def test_config_files_with_wrong_types():
    values = CONFIG.to_dict()
    for key, wrong in (
        ("student", None), ("student", []), ("student", {"width": "a"}), ("student", {"width": 1.5}),
        ("student", {"width": True}), ("student", {"width": 8, "layers": [1, 2]}),
        ("student", {"width": 8, "rates": 3}),
        ("student", {"width": 8, "dtype": 7}), ("student", {"width": 8, "backbone": ["small"]}),
        ("augmentation", 3), ("augmentation", {"scale": "ab"}), ("augmentation", {"flip": None}),
        ("classes", 5), ("classes", [1, 2]), ("steps", "8"), ("steps", None), ("steps", 1e30), ("seed", [0]),
        ("image_mean", [1, 2]), ("image_std", ["a", "b", "c"]), ("mode", {}), ("x" * 10**5, 1),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            DistillConfig.from_dict(values | {key: wrong})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1500


def test_changes_are_made_together():
    """Each alone would be refused: finetuned-clip needs its mapper, its stem and unseen classes."""
    changes = ["mode=finetuned-clip", "mapper=linear", "student.stem=clip", "unseen=cat"]
    assert with_overrides(CONFIG, changes).mapper == "linear"
    with pytest.raises(UserError):
        with_overrides(CONFIG, changes[:1])


def test_one_line_for_files_that_cannot_be(tmp_path):
    files = {"empty": "", "wrong": "def config():\n    return 3\n", "broken": "import nothing_of_the_kind\n"}
    files |= {
        "key": "def config(name=''):\n    return {}[name]\n",
        "exit": "def config(name):\n    raise SystemExit(3)\n",
    }
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    for source, why in (
        (tmp_path / "none.py", "there is no"),
        (tmp_path / "empty", "there is no"),
        (tmp_path / "empty.py", "defines config"),
        (tmp_path / "wrong.py", "returns int"),
        (tmp_path / "broken.py", "does not run .ModuleNotFoundError"),
        (f"{tmp_path / 'key.py'}:small", "does not run .KeyError: 'small'"),
        (f"{tmp_path / 'key.py'}:", "does not run .KeyError: ''"),
        (tmp_path / "exit.py", "does not run .TypeError"),
        (f"{tmp_path / 'exit.py'}:a", "does not run .SystemExit: 3"),
        ("~nobody of that name/e.py", "there is no ~nobody of that name/e.py"),
        (f"{EXPERIMENTS / 'configs' / 'scenes.py'}:tiny", "have the variants annotation_free, from_clip"),
        (f"{EXPERIMENTS / 'configs' / 'paper.py'}:voc20", "for example voc20/zero_shot/r50"),
    ):
        with pytest.raises(UserError, match=why) as error:
            load_experiment(source)
        assert "\n" not in str(error.value)


def test_an_experiment_may_define_classes_of_its_own(tmp_path):
    """`dataclasses` looks up the module that a class says it is from."""
    code = "import dataclasses, tiny_distill\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
    (tmp_path / "own.py").write_text(code + "config = tiny_distill.config_of\n")
    assert load_experiment(tmp_path / "own.py") == CONFIG
