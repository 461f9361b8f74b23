"""One optimiser step of MaskCLIP+ over all devices: teacher, labels, student, SGD, in one program (paper, section 3.3).

The modes differ in what the target is and in nothing else: `_target` makes it, `_loss` compares.

    p_step = make_train_step(config, student, teacher)
    state, metrics = p_step(state, frozen, batch)

`batch` holds, per local device (first axis): "image" uint8 [n, b, S, S, 3], augmented, not normalised; "label" integers
[n, b, S, S], label values, 254 unlabelled, 255 ignored or padding; where `labels_from` is a folder, "pseudo" integers
[n, b, S, S], the labels made before (255 where there are none); and, if you like, "stop" float32 [n], which says to all
hosts that one was asked to stop. State and frozen arrays have no device axis: give them to `replicate` once, so that no
step copies them (`devices.py`); a state that was packed there as well comes back packed, and is handed over faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.data.augment import UNLABELLED
from maskclip_jax.distill import pseudo_labels
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.devices import AXIS, over_devices, takes_packed
from maskclip_jax.distill.losses import LossSum, cross_entropy, feature_l1, has_loss, valid_positions
from maskclip_jax.distill.optimizer import descent_direction, learning_rate, scaled_step
from maskclip_jax.distill.teacher import Frozen, Teacher, normalise
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.ops.matmul import full_precision
from maskclip_jax.segment.refine import Logits
from maskclip_jax.students import Student
from maskclip_jax.students.layers import resize_bilinear
from maskclip_jax.students.weights import backbone_from_clip, load_backbone_weights, start_from_student

_NEVER = -1e9  # logit of a class that is no answer


class TrainState(NamedTuple):
    """All that a checkpoint holds; the teacher is not in it."""

    step: Int32[Array | np.ndarray, ""]  # optimiser steps taken: phases and the schedule count these
    params: Any
    batch_stats: Any
    opt_state: Any


class Outputs(NamedTuple):
    """A student's training forward pass at its own grid."""

    features: Float[Array, "B h w E"]
    logits: Float[Array, "B h w C"]
    steady_logits: Float[Array, "B h w C"]  # without dropout: the student's own predictions


class Tally(NamedTuple):
    """Sums over pixels (feature distillation: positions), added up over micro-batches and devices."""

    loss: LossSum
    labelled: Float[Array, ""]
    pseudo: Float[Array, ""]
    right: Float[Array, ""]
    leaked: Float[Array, ""]
    pixels: Float[Array, ""]
    stop: Float[Array, ""] | None = None  # not of pixels: it goes the same way


def create_train_state(
    config: DistillConfig,
    student: Student,
    text: Float[Array | np.ndarray, "C E"],
    key: PRNGKeyArray,
    *,
    clip: Any = None,
    start: Any = None,
) -> TrainState:
    """Step 0: random parameters; the backbone's from `backbone_weights` or, for finetuned-clip, CLIP's image tower; or
    those of another student.

    Args:
      student: `create_student(config.student_config)`.
      text: classifier rows of the named classes.
      clip: variables of the CLIP to start from (finetuned-clip); None loads that of `config.teacher`.
      start: variables of the student that `config.init_from` names, or None.

    Raises:
      UserError: text embeddings of another width than the student's, or weights that do not fit it.
    """
    side = min(config.crop_size, 64)  # no parameter depends on the image's size
    pixels = jnp.zeros((1, side, side, 3), full_precision(config.dtype))
    variables = dict(jax.jit(student.init)(key, pixels, jnp.asarray(text)))
    if config.backbone_weights is not None:
        variables = load_backbone_weights(config.backbone_weights, variables)
    if config.mode == "finetuned-clip":
        clip = load_clip(config.teacher.model).variables if clip is None else clip
        tower = {name: clip[name]["visual"] for name in ("params", "batch_stats") if name in clip}
        tower = jax.tree.map(jnp.array, tower)  # copies: the first step uses up the state, and `clip` is the caller's
        variables = backbone_from_clip(tower, variables)
    if start is not None:
        variables = start_from_student(start, variables)
    variables = jax.tree.map(jnp.asarray, variables)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, variables["batch_stats"], descent_direction(config).init(params)
    )


def make_train_step(config: DistillConfig, student: Student, teacher: Teacher | None) -> Callable:
    """`p_step(state, frozen, batch) -> (state, metrics)`, compiled for all devices of all hosts.

    The state given is used up: its memory becomes that of the state returned. JAX raises where it is read again, and
    leaves alone what a NumPy view of it still holds (a checkpoint that is being written, on CPUs).

    Metrics are scalars over the global batch: loss; labelled, pseudo (shares of all pixels that have a loss,
    that are pseudo-labelled); accuracy (of the student on labelled pixels); learning_rate; phase (1 guided, 2
    self-training); leaked (pixels of classes that must have no annotation: anything but 0 is an error); and, where the
    batch has "stop", its sum over all devices.
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Mapping[str, Array]) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), jax.lax.axis_index(AXIS))
        batch = {name: x if name in ("image", "stop") else x.astype(jnp.int32) for name, x in batch.items()}
        stop = batch.pop("stop", None)

        def forward_backward(batch_stats: Any, part: Mapping[str, Array], index: Any) -> tuple[Any, Any, Tally]:
            target = _target(config, teacher, frozen, part, state.step)

            def loss(params: Any) -> tuple[Array, tuple[Any, Tally]]:
                outputs, updates = student.apply(
                    {"params": params, "batch_stats": batch_stats},
                    normalise(part["image"], config.image_mean, config.image_std, config.dtype),
                    frozen.text,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.fold_in(key, index)},
                    method=_forward,
                )
                tally = _loss(config, outputs, target, part["label"], state.step)
                # The gradient of a local *sum*: its psum, divided by the count of all devices, is that of the mean.
                return tally.loss.total, (updates["batch_stats"], tally)

            (_, (batch_stats, tally)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            return grads, batch_stats, tally

        grads, batch_stats, tally = _accumulate(forward_backward, state.batch_stats, batch, config.accumulate)
        grads, tally = _over_all((grads, tally._replace(stop=stop)))
        if config.bn_group_size is not None:  # running statistics stay one on all devices: the groups' mean
            batch_stats = jax.lax.pmean(batch_stats, AXIS)
        count = jnp.maximum(tally.loss.count, 1)
        direction, opt_state = descent_direction(config).update(
            jax.tree.map(lambda g: g / count, grads), state.opt_state, state.params
        )
        rate = learning_rate(state.step, config)
        params = optax.apply_updates(state.params, scaled_step(direction, rate, config))
        state_after = TrainState(state.step + 1, params, batch_stats, opt_state)
        guided = pseudo_labels.is_guided(state.step, config)
        metrics = {
            "loss": tally.loss.total / count,
            "labelled": tally.labelled / tally.pixels,
            "pseudo": tally.pseudo / tally.pixels,
            "accuracy": tally.right / jnp.maximum(tally.labelled, 1),
            "learning_rate": rate,
            "phase": jnp.where(guided, 1.0, 2.0),
            "leaked": tally.leaked,
        }
        return state_after, metrics if stop is None else metrics | {"stop": tally.stop}

    return over_devices(takes_packed(train_step), in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=0)


def make_eval_step(config: DistillConfig, student: Student) -> Callable:
    """`p_eval(state, frozen, images uint8 [n, b, H, W, 3], labels [n, b, H, W]) -> confusion int32 [C, C]`.

    Labels outside 0..C-1 (255 among them) do not count. Reads the state and changes nothing: no phase advances.
    """

    def eval_step(state: TrainState, frozen: Frozen, images: Array, labels: Array) -> Int[Array, "C C"]:
        logits = student.apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            normalise(images, config.image_mean, config.image_std, config.dtype),
            frozen.text,
        )
        predicted = resize_bilinear(logits, labels.shape[1:]).argmax(axis=-1)
        return _over_all(confusion_matrix(labels, predicted, config.num_classes))

    return over_devices(eval_step, in_axes=(None, None, 0, 0), out_axes=None)


def _over_all(tree: Any) -> Any:
    """Sums over the devices; of a single one it is no copy (XLA's CPU backend makes one: 45 ms for a ResNet-101)."""
    return tree if jax.lax.psum(1, AXIS) == 1 else jax.lax.psum(tree, AXIS)


def _accumulate(
    forward_backward: Callable, batch_stats: Any, batch: Mapping[str, Array], parts: int
) -> tuple[Any, Any, Tally]:
    """Gradients and tallies summed over micro-batches; batch statistics go from one to the next, as in PyTorch."""
    if parts == 1:
        return forward_backward(batch_stats, batch, 0)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), dict(batch))
    carry = forward_backward(batch_stats, jax.tree.map(lambda x: x[0], split), 0)
    rest = jax.tree.map(lambda x: x[1:], split), jnp.arange(1, parts)

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        (grads, stats, tally), (part, index) = jax.lax.optimization_barrier((carry, numbered))  # one after the other
        more, stats, tally_more = forward_backward(stats, part, index)
        grads, tally = jax.tree.map(jnp.add, (grads, tally), (more, tally_more))
        return (grads, stats, tally), None

    if jax.default_backend() != "cpu":
        return jax.lax.scan(add, carry, rest)[0]
    for i in range(parts - 1):  # XLA's CPU backend computes convolutions inside a loop eight times slower
        carry, _ = add(carry, jax.tree.map(lambda x, i=i: x[i], rest))
    return carry


def _forward(student: Student, images: Float[Array, "B H W 3"], text: Float[Array, "C E"]) -> Outputs:
    features = student.features(images, True)
    arguments = (features,) if student.config.classifier == "learned" else (features, text)
    return Outputs(features, student.classifier(*arguments, True), student.classifier(*arguments, False))


def _target(config: DistillConfig, teacher: Teacher | None, frozen: Frozen, part: Mapping[str, Array], step: Array):
    """The teacher's features or labels (computed here or read from the batch); None where the mode has no teacher."""
    images = part["image"]
    if config.mode == "feature":
        assert teacher is not None
        return teacher.features(frozen.teacher, images)
    if not config.uses_pseudo_labels:
        return None
    if config.labels_from != "online":
        return part["pseudo"]
    assert teacher is not None
    rows = np.asarray(config.candidates) - int(config.background)

    def labels() -> Int[Array, "B H W"]:
        scores = teacher.scores(frozen.teacher, images, jnp.asarray(frozen.text)[rows])
        return pseudo_labels.best_candidate(
            scores,
            config.candidates,
            scale=teacher.scale(frozen.teacher),
            threshold=config.conf_thresh,
        )

    if not config.self_training:
        return labels()
    none = lambda: jnp.full(images.shape[:-1], UNLABELLED, jnp.int32)  # noqa: E731
    return jax.lax.cond(pseudo_labels.is_guided(step, config), labels, none)


def _loss(config: DistillConfig, outputs: Outputs, target: Any, annotation: Int[Array, "B H W"], step: Array) -> Tally:
    """The loss of the config's mode, and the sums that metrics are made of."""
    leaked = pseudo_labels.leaked_pixels(annotation, config)
    none = jnp.zeros(())
    if config.mode == "feature":
        features = outputs.features
        valid = valid_positions(annotation, features.shape[1:3])
        loss = feature_l1(features, resize_bilinear(target, features.shape[1:3]), valid)
        return Tally(loss, loss.count, none, none, leaked, jnp.asarray(valid.size, jnp.float32))
    labels = annotation
    if config.uses_pseudo_labels:
        labels = pseudo_labels.fill_unlabelled(annotation, _own_or(config, outputs, target, step))
    logits = outputs.logits
    if config.mode == "finetuned-clip":  # unseen classes are no negatives: they do not take part at all
        logits = logits.at[..., np.asarray(config.unseen_labels)].set(_NEVER)
    logits = resize_bilinear(logits, labels.shape[1:])
    counted = has_loss(labels)
    count = lambda mask: mask.sum().astype(jnp.float32)  # noqa: E731
    return Tally(
        cross_entropy(logits, labels, config.loss_mean),
        count(counted),
        count(counted & (annotation == UNLABELLED)),
        count(counted & (logits.argmax(axis=-1) == labels)),
        leaked,
        jnp.asarray(labels.size, jnp.float32),
    )


def _own_or(config: DistillConfig, outputs: Outputs, target: Array, step: Array) -> Int[Array, "B H W"]:
    """Pseudo labels: the teacher's in the guided phase, the student's own in self-training."""
    if not config.self_training:
        return target

    def own() -> Int[Array, "B H W"]:
        scores = jax.lax.stop_gradient(outputs.steady_logits)[..., np.asarray(config.candidates)]
        scores = Logits(resize_bilinear(scores, target.shape[1:]))
        return pseudo_labels.best_candidate(scores, config.candidates, threshold=config.conf_thresh)

    return jax.lax.cond(pseudo_labels.is_guided(step, config), lambda: target, own)
