"""The smallest run of MaskCLIP+ there is: a random ViT teacher, a student of a few thousand parameters, 32 px crops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from random_clip import random_pretrained

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.optimizer import descent_direction
from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.distill.step import TrainState, make_train_step
from maskclip_jax.distill.teacher import teacher_from
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import StudentConfig, create_student

SIDE, WIDTH = 32, 12
CLASSES = ("dog", "cat", "grass", "sky", "road")
VISION = {
    "vit": ViTConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_width=16),
    "resnet": ResNetConfig(image_size=64, width=4, layers=(1, 1, 1, 1), heads=4, dense_stride=16),
}
STUDENT = StudentConfig(
    WIDTH, layers=(1, 1, 1, 1), base_width=4, expansion=2, rates=(1, 2), dropout=0.0, zero_init_residual=False
)
ZERO_SHOT = {
    "mode": "zero-shot",
    "unseen": ("cat", "sky"),
    "self_training": True,
    "guided_steps": 2,
    "background": True,
}


def config_of(**changes) -> DistillConfig:
    fields = {
        "classes": CLASSES,
        "student": STUDENT,
        "batch_size": 8,
        "crop_size": SIDE,
        "steps": 10,
        "learning_rate": 0.05,
        "augmentation": AugmentConfig(),
    }
    return DistillConfig(**(fields | changes))


def pretrained_clip(kind: str = "vit") -> Pretrained:
    config = CLIPConfig(VISION[kind], TextConfig(8, 4, 8, 1, 1, 8), WIDTH)
    return random_pretrained(config, lambda prompts: None, logit_scale=10.0)


def drawn(shapes, seed: int = 0):
    """Random values for a tree of shapes, a student's (initialisers would take longer to compile than any test)."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "logit_scale":
            return np.log(10).astype(leaf.dtype)
        if name in ("scale", "var"):
            return rng.uniform(0.8, 1.2, leaf.shape).astype(leaf.dtype)
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 16
        return (rng.normal(size=leaf.shape) * np.sqrt(1 / fan_in)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def dense(clip: Pretrained, images, **options):
    """`encode_dense` as one program."""
    return jax.jit(functools.partial(clip.model.apply, method="encode_dense"))(clip.variables, images, **options)


def text_rows(classes: int = len(CLASSES), width: int = WIDTH) -> np.ndarray:
    text = np.random.default_rng(1).normal(size=(classes, width)).astype(np.float32)
    return text / np.linalg.norm(text, axis=1, keepdims=True)


def batch_of(config: DistillConfig, seed: int = 0, label=254) -> dict[str, np.ndarray]:
    """One batch without a device axis; the lower right is padding (0, 255)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (config.batch_size, SIDE, SIDE, 3), np.uint8)
    labels = np.full((config.batch_size, SIDE, SIDE), label, np.int32)
    for i in range(config.batch_size):
        cut = SIDE - int(rng.integers(0, 12))
        images[i, cut:], labels[i, cut:] = 0, 255
    return {"image": images, "label": labels}


def on_devices(batch: dict, devices: int = 1) -> dict:
    return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}


def setup(config: DistillConfig, kind: str = "vit"):
    """Teacher, frozen arrays, student, and a state of drawn parameters."""
    teacher, frozen = teacher_from(config, pretrained_clip(kind), text_rows())
    student = create_student(config.student_config)
    shapes = shapes_of(student, jnp.zeros((1, SIDE, SIDE, 3)), frozen.text)
    variables = drawn(shapes, seed=2)
    params = variables["params"]
    opt_state = jax.tree.map(np.asarray, descent_direction(config).init(params))
    return teacher, frozen, student, TrainState(np.int32(0), params, variables["batch_stats"], opt_state)


def trained_student(step: int = 0, chosen: str = "", scores: dict | None = None, **changes) -> TrainedStudent:
    """The student of `setup`, as `load_student` has it."""
    config = config_of(mode="supervised", **changes)
    _, _, student, state = setup(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return TrainedStudent(config, student, variables, text_rows(), step, chosen, scores)


@functools.cache
def compiled(config: DistillConfig):
    """(frozen, state, step): configs are hashable, so tests that share one share its program."""
    teacher, frozen, student, state = setup(config)
    batch = on_devices(batch_of(config), jax.device_count())
    batch |= {} if config.labels_from == "online" else {"pseudo": batch["label"]}
    return frozen, state, quickly(make_train_step(config, student, teacher), state, frozen, batch)


def quickly(step, *arguments):
    """`step` compiled for arrays like these by an LLVM that optimises nothing: nearly half the time."""
    return step.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})


def run_steps(config: DistillConfig, batches: list, devices: int = 1):
    """State and metrics after the batches."""
    frozen, state, step = compiled(config)
    metrics = []
    for batch in batches:
        state, values = step(state, frozen, on_devices(batch, devices))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def seen_annotation(config, seed=0):
    """Seen classes, unlabelled pixels and padding."""
    batch = batch_of(config, seed)
    seen = [label for label in range(config.num_classes) if label not in config.unseen_labels]
    drawn_labels = np.random.default_rng(seed).choice(np.array([*seen, 254, 254, 255]), batch["label"].shape)
    return batch | {"label": np.where(batch["label"] == 255, 255, drawn_labels).astype(np.int32)}


def distance(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
