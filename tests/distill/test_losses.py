"""Losses against NumPy transcriptions, their gradients against the formulas, and sums that do not mind being split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.distill.losses import cross_entropy, feature_l1, valid_positions


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 5)).astype(np.float32) * 3
    labels = rng.choice(np.array([0, 1, 2, 3, 4, 254, 255], np.int32), (2, 3, 4))
    labels[1] = 255
    labels[1, 0, 0] = 2
    return logits, labels


def by_hand(logits, labels):
    """Every pixel's loss and gradient in float64; zeros where it has none."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    losses, gradient = np.zeros(labels.shape), np.zeros_like(p)
    for at in np.ndindex(labels.shape):
        if labels[at] < 254:
            losses[at] = -np.log(p[at][labels[at]])
            gradient[at] = p[at]
            gradient[at][labels[at]] -= 1
    return losses, gradient


def test_cross_entropy(case):
    logits, labels = case
    losses, gradient = by_hand(logits, labels)
    (total, count), vjp = jax.vjp(lambda x: cross_entropy(x, jnp.asarray(labels)), jnp.asarray(logits))
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    assert count == (labels < 254).sum()
    found = vjp(type(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))(jnp.ones(()), jnp.zeros(())))[0]
    np.testing.assert_allclose(found, gradient, atol=1e-6)


def test_a_case_worked_by_hand():
    """Two pixels, two classes: -log(1/2) and -log(e²/(e² + 1)); a third without a label."""
    logits = jnp.asarray([[[[0.0, 0.0], [2.0, 0.0], [9.0, 0.0]]]])
    total, count = cross_entropy(logits, jnp.asarray([[[1, 0, 255]]]))
    np.testing.assert_allclose(total, 0.6931472 + 0.1269280, rtol=1e-6)
    assert count == 2
    assert cross_entropy(logits, jnp.asarray([[[1, 0, 255]]]), "all").count == 3  # the released code's divisor


def test_nothing_labelled_is_no_loss_and_no_gradient(case):
    logits = jnp.asarray(case[0])
    labels = jnp.full(logits.shape[:3], 255)
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, labels).total)(logits)
    assert value == 0
    assert not np.asarray(gradient).any()


def test_sums_of_parts_are_the_whole(case):
    """The second image has one labelled pixel, so a mean of two means would be another number."""
    logits, labels = map(jnp.asarray, case)
    whole = cross_entropy(logits, labels)
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in (0, 1)]
    total, count = (sum(values) for values in zip(*parts, strict=True))
    np.testing.assert_allclose(total / count, whole.total / whole.count, rtol=1e-6)
    mean_of_means = np.mean([part.total / part.count for part in parts])
    assert abs(mean_of_means - float(whole.total / whole.count)) > 0.05


def test_feature_distillation_trains_the_student_and_not_the_teacher():
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(1, 2, 3, 4)).astype(np.float32) for _ in range(2))
    valid = np.array([[[True, True, False], [True, False, False]]])
    loss = lambda s, t: feature_l1(s, t, jnp.asarray(valid)).total  # noqa: E731
    value, (to_student, to_teacher) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(value, np.abs(student - teacher).mean(-1)[valid].sum(), rtol=1e-6)
    assert feature_l1(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(valid)).count == 3
    np.testing.assert_allclose(to_student, np.sign(student - teacher) / 4 * valid[..., None], rtol=1e-6)
    assert not np.asarray(to_teacher).any()


def test_positions_are_valid_where_their_centre_is():
    labels = np.full((1, 8, 8), 254)
    labels[:, 5:] = 255  # of centres at rows 2 and 6, the second is padding
    labels[:, :, 6:] = 255  # of centres at columns 1, 3, 5 and 7, the last
    found = valid_positions(jnp.asarray(labels), (2, 4))
    assert found.tolist() == [[[True, True, True, False], [False] * 4]]
