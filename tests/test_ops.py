"""Every token-wise operation: its value, and its gradient against central differences."""

import numpy as np
import pytest
from helpers import assert_gradient

from minirec import ops
from minirec.backend import scatter_add
from minirec.lesson.gradcheck import central_differences


def check(forward, backward, inputs, rng):
    """Check d_x and all parameter gradients of one operation under a random d_out.

    forward(*inputs) -> out, cache; backward(d_out, cache) -> the gradients of all inputs.
    """
    out, cache = forward(*inputs)
    d_out = rng.normal(size=out.shape)
    gradients = backward(d_out, cache)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert_gradient(gradient, central_differences(lambda: (forward(*inputs)[0] * d_out).sum(), x))


def test_linear_gradients(rng):
    x, w, b = rng.normal(size=(5, 4)), rng.normal(size=(4, 3)), rng.normal(size=3)

    def backward(d_out, cache):
        d_w, d_b = np.zeros_like(w), np.zeros_like(b)
        return ops.linear_backward(d_out, cache, d_w, d_b), d_w, d_b

    check(ops.linear, backward, (x, w, b), rng)


def test_layer_norm_gradients(rng):
    x, gamma, beta = 3 + 2 * rng.normal(size=(5, 4)), rng.normal(size=4), rng.normal(size=4)

    def backward(d_out, cache):
        d_gamma, d_beta = np.zeros_like(gamma), np.zeros_like(beta)
        return ops.layer_norm_backward(d_out, cache, d_gamma, d_beta), d_gamma, d_beta

    check(ops.layer_norm, backward, (x, gamma, beta), rng)


def test_layer_norm_is_exact_far_from_zero(rng):
    x = rng.normal(size=(3, 64))
    out, _ = ops.layer_norm(x + 1e6, np.ones(64), np.zeros(64))
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    np.testing.assert_allclose(out, expected, atol=1e-8)


def test_relu_gradient(rng):
    check(ops.relu, lambda d_out, cache: (ops.relu_backward(d_out, cache),), (rng.normal(size=(5, 4)),), rng)


def test_dropout_gradient_with_the_same_mask(rng):
    def forward(x):
        return ops.dropout(x, 0.4, np.random.default_rng(7))

    check(forward, lambda d_out, cache: (ops.dropout_backward(d_out, cache),), (rng.normal(size=(5, 4)),), rng)


def test_dropout_keeps_the_mean_and_drops_the_rate(rng):
    mask = ops.dropout_mask((1000, 1000), 0.2, rng, np.empty(0, np.float32))
    assert mask.dtype == np.float32
    assert (mask == 0).mean() == pytest.approx(0.2, abs=2e-3)
    assert mask.max() == pytest.approx(1.25, rel=1e-5)
    assert mask.mean() == pytest.approx(1, abs=2e-3)


def test_dropout_without_a_generator_is_the_identity(rng):
    x = rng.normal(size=(3, 4))
    out, cache = ops.dropout(x, 0.5, None)
    assert out is x
    assert ops.dropout_backward(x, cache) is x


def test_embedding_gradient_with_repeated_rows(rng):
    table, index = rng.normal(size=(6, 3)), np.array([4, 0, 4, 4, 5, 0])

    def backward(d_out, cache):
        d_table = np.zeros_like(table)
        ops.embedding_backward(d_out, cache, d_table)
        return (d_table,)

    check(lambda table: ops.embedding(table, index), backward, (table,), rng)


def test_scatter_add_equals_numpy_add_at(rng):
    target, index, rows = rng.normal(size=(7, 3)), rng.integers(7, size=50), rng.normal(size=(50, 3))
    expected = target.copy()
    np.add.at(expected, index, rows)
    scatter_add(target, index, rows)
    np.testing.assert_allclose(target, expected, atol=1e-12)
