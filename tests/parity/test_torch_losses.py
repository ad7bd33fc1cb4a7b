"""Losses and their gradients beside torch's; softmax's focal loss, which torch lacks, beside its formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bert_jax import losses

WEIGHTS = np.array([0.2, 1.0, 3.0, 0.7, 1.5], np.float32)
COMBINATIONS = list(itertools.product([None, WEIGHTS], [0.0, 0.1], [0.0, 0.5, 2.0]))


@pytest.fixture(scope="module")
def random():
    return np.random.RandomState(0)


def numbers(function, logits):
    value, gradient = jax.jit(jax.value_and_grad(function))(jnp.asarray(logits))
    return float(value), np.asarray(gradient)


def theirs(function, logits):
    tensor = torch.tensor(logits, requires_grad=True)
    loss = function(tensor)
    loss.backward()
    return loss.item(), tensor.grad.numpy()


def check(ours, expected):
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-6)


@pytest.mark.parametrize(("weights", "smoothing", "gamma"), COMBINATIONS)
def test_cross_entropy(random, weights, smoothing, gamma):
    logits = random.normal(0, 3, (8, 6, 5)).astype(np.float32)
    labels = random.randint(0, 5, (8, 6))
    labels[random.random((8, 6)) < 0.3] = losses.IGNORE
    weight = None if weights is None else torch.tensor(weights)
    flat = torch.tensor(labels.ravel())

    def reference(tensor):
        tensor = tensor.reshape(-1, 5)
        if not gamma:
            return torch.nn.functional.cross_entropy(tensor, flat, weight=weight, label_smoothing=smoothing)
        log_p = torch.log_softmax(tensor, -1)[flat >= 0]
        kept = flat[flat >= 0]
        of_label = log_p.gather(1, kept[:, None])[:, 0]
        each = torch.ones(5) if weight is None else weight
        focal = -each[kept] * (1 - of_label.exp()) ** gamma * of_label
        return ((1 - smoothing) * focal - smoothing * (each * log_p).mean(-1)).sum() / each[kept].sum()

    def ours(x):
        return losses.cross_entropy(x, labels, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma)

    check(numbers(ours, logits), theirs(reference, logits))


@pytest.mark.parametrize(("weights", "smoothing", "gamma"), COMBINATIONS)
def test_binary_cross_entropy(random, weights, smoothing, gamma):
    logits = random.normal(0, 3, (8, 5)).astype(np.float32)
    labels = random.randint(0, 2, (8, 5)).astype(np.float32)
    target = torch.tensor(labels) * (1 - smoothing) + smoothing / 2
    weight = None if weights is None else torch.tensor(weights)

    def reference(tensor):
        if not gamma:
            return torch.nn.functional.binary_cross_entropy_with_logits(tensor, target, pos_weight=weight)
        p = torch.sigmoid(tensor)  # as in torchvision.ops.sigmoid_focal_loss
        yes = (1 - p) ** gamma * torch.nn.functional.softplus(-tensor)
        no = p**gamma * torch.nn.functional.softplus(tensor)
        return (target * (1 if weight is None else weight) * yes + (1 - target) * no).mean()

    def ours(x):
        return losses.binary_cross_entropy(
            x, labels, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma
        )

    check(numbers(ours, logits), theirs(reference, logits))
