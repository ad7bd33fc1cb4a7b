import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

from bert_jax import losses
from bert_jax.errors import InputError


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (4, 5, 7)) * 3


def test_cross_entropy_ignores(logits):
    labels = np.random.RandomState(0).randint(0, 7, (4, 5))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), each.mean(), rtol=1e-6)
    counts = np.zeros((4, 5), bool)
    counts[1, 2] = counts[3, 0] = True
    ignoring = np.where(counts, labels, losses.IGNORE)
    np.testing.assert_allclose(losses.cross_entropy(logits, ignoring), each[counts].mean(), rtol=1e-6)


def test_cross_entropy_of_nothing_is_zero_with_a_finite_gradient(logits):
    nothing = np.full((4, 5), losses.IGNORE)
    loss, gradient = jax.value_and_grad(losses.cross_entropy)(logits, nothing)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_cross_entropy_is_float32_for_bfloat16(logits):
    loss = losses.cross_entropy(logits.astype(jnp.bfloat16), np.zeros((4, 5), int))
    assert loss.dtype == jnp.float32


def test_binary_cross_entropy(logits):
    labels = np.random.RandomState(0).randint(0, 2, logits.shape)
    expected = optax.sigmoid_binary_cross_entropy(logits, jnp.asarray(labels)).mean()
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, labels), expected, rtol=1e-6)
    assert jnp.isfinite(losses.binary_cross_entropy(jnp.full((2, 2), 1e4), jnp.zeros((2, 2))))


def test_squared_error(logits):
    np.testing.assert_allclose(losses.squared_error(logits, logits + 2), 4.0, rtol=1e-6)


def test_span_cross_entropy(logits):
    start, end = logits[:, :, 0], logits[:, :, 1]
    expected = (losses.cross_entropy(start, np.array([0, 1, 2, 3])) + losses.cross_entropy(end, np.full(4, 2))) / 2
    got = losses.span_cross_entropy(start, end, np.array([0, 1, 2, 3]), np.full(4, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_losses_of_extreme_logits_are_finite(gamma):
    for logits in (jnp.array([[300.0, -300.0]]), jnp.array([[-300.0, 300.0]])):
        for loss in (
            lambda x: losses.cross_entropy(x, np.array([0]), focal_gamma=gamma),
            lambda x: losses.binary_cross_entropy(x, np.array([[1, 0]]), focal_gamma=gamma),
        ):
            assert all(jnp.isfinite(value).all() for value in jax.value_and_grad(loss)(logits))


def test_labels_whose_class_has_no_weight_are_left_out(logits):
    labels = np.array([[0, 1, 1, 0, 1]] * 4)
    weights = jnp.array([1.0] + [0.0] * 6)
    found = losses.cross_entropy(logits, labels, class_weights=weights)
    np.testing.assert_allclose(found, losses.cross_entropy(logits, np.where(labels == 0, 0, losses.IGNORE)), rtol=1e-6)
    assert losses.cross_entropy(logits, np.ones((4, 5), int), class_weights=weights) == 0


@pytest.mark.parametrize("count", [6, 8])
def test_class_weights_of_another_number_of_classes_are_refused(logits, count):
    for loss, labels in ((losses.cross_entropy, np.zeros((4, 5), int)), (losses.binary_cross_entropy, logits)):
        with pytest.raises(InputError, match=rf"class_weights has the shape \({count},\); there are 7 classes"):
            loss(logits, labels, class_weights=np.ones(count))


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0, 0, 0, 1, 2, 2, losses.IGNORE, -1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels[:6])
    np.testing.assert_allclose(losses.balanced(labels, 3), expected, rtol=1e-6)
    assert np.isinf(losses.balanced(labels, 4)[3])


def test_balanced_weights_of_several_labels_are_absent_over_present():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(losses.balanced(labels, 3), [3, 0, np.inf])


def test_the_total_weight_is_the_divisor_of_the_mean(logits):
    labels = np.array([[0, 1, losses.IGNORE, 3, 6]] * 4)
    weights = np.arange(7, dtype=np.float32)
    assert losses.total_weight(labels) == 16
    assert losses.total_weight(labels, weights) == 4 * (0 + 1 + 3 + 6)
    one_by_one = [losses.cross_entropy(logits[i, j], labels[i, j]) * weights[labels[i, j]]
                  for i in range(4) for j in range(5) if labels[i, j] != losses.IGNORE]  # fmt: skip
    mean = losses.cross_entropy(logits, labels, class_weights=weights)
    np.testing.assert_allclose(mean * losses.total_weight(labels, weights), sum(one_by_one), rtol=1e-5)
