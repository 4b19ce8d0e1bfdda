"""The losses and their fused gradients against the formulas written out."""

import numpy as np
import pytest
from helpers import assert_gradient

from minirec import packing
from minirec.lesson.gradcheck import central_differences
from minirec.loss import binary_cross_entropy, cross_entropy, sampled_cross_entropy


def plain_cross_entropy(x, items, targets, scale):
    z = x @ items.T
    return scale * (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(x)), targets]).sum()


@pytest.fixture
def example(rng):
    return rng.normal(size=(33, 4)), rng.normal(size=(9, 4)), rng.integers(9, size=33), 1 / 33


@pytest.mark.parametrize("loss_bytes", [1, 4 << 20])  # chunks of 16, 16 and 1 rows, of all rows
def test_value_and_gradients(example, loss_bytes, monkeypatch):
    monkeypatch.setattr(packing, "CPU_PLAN", packing.CPU_PLAN._replace(loss_bytes=loss_bytes, loss_rows=1))
    x, items, targets, scale = example
    d_items = np.zeros_like(items)
    loss, d_x = cross_entropy(x, items, targets, scale, d_items)
    np.testing.assert_allclose(loss, plain_cross_entropy(*example), rtol=1e-13)
    assert_gradient(d_x, central_differences(lambda: plain_cross_entropy(*example), x))
    assert_gradient(d_items, central_differences(lambda: plain_cross_entropy(*example), items))


def test_large_logits_do_not_overflow(example):
    x, items, targets, scale = example
    loss, d_x = cross_entropy(x * 1e4, items, targets, scale, np.zeros_like(items))
    assert np.isfinite(loss) and np.isfinite(d_x).all()


def test_float32_stays_float32(example):
    x, items, targets, _ = example
    d_items = np.zeros_like(items, np.float32)
    _, d_x = cross_entropy(x.astype(np.float32), items.astype(np.float32), targets, np.float64(0.1), d_items)
    assert d_x.dtype == d_items.dtype == np.float32


def plain_sampled(x, items, targets, negatives, scale):
    """One token at a time: softmax over the target and the negatives that are not the target."""
    total = 0
    for row, target in zip(x, targets, strict=True):
        z = items[[target, *(n for n in negatives if n != target)]] @ row
        total += np.log(np.exp(z).sum()) - z[0]
    return scale * total


def plain_binary(x, items, targets, negatives, scale):
    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    positive, negative = ((x * items[index]).sum(axis=1) for index in (targets, negatives))
    return -scale * (np.log(sigmoid(positive)) + np.log(1 - sigmoid(negative))).sum()


@pytest.mark.parametrize(
    "loss, plain, negatives",
    [
        (sampled_cross_entropy, plain_sampled, np.array([3, 0, 3, 7, 5])),  # repeats and accidental hits
        (binary_cross_entropy, plain_binary, np.arange(33) % 9),
    ],
)
def test_sampled_losses_and_gradients(example, loss, plain, negatives):
    x, items, targets, scale = example
    d_items = np.zeros_like(items)
    value, d_x = loss(x, items, targets, negatives, scale, d_items)

    def plainly():
        return plain(x, items, targets, negatives, scale)

    np.testing.assert_allclose(value, plainly(), rtol=1e-13)
    assert_gradient(d_x, central_differences(plainly, x))
    assert_gradient(d_items, central_differences(plainly, items))
    for dtype in (np.float32, np.float64):
        value, d_x = loss(x.astype(dtype) * 1e4, items.astype(dtype), targets, negatives, scale, d_items.astype(dtype))
        assert np.isfinite(value) and np.isfinite(d_x).all() and d_x.dtype == dtype


def test_all_items_as_negatives_give_the_full_cross_entropy(example):
    x, items, targets, scale = example
    gradients = np.zeros_like(items), np.zeros_like(items)
    full, d_x = cross_entropy(x, items, targets, scale, gradients[0])
    sampled, d_x_sampled = sampled_cross_entropy(x, items, targets, np.arange(9), scale, gradients[1])
    np.testing.assert_allclose(sampled, full, rtol=1e-13)
    np.testing.assert_allclose(d_x_sampled, d_x, atol=1e-14)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-14)
