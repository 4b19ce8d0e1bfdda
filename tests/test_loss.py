"""The chunked, fused cross-entropy against the formula written out."""

import numpy as np
import pytest
from conftest import assert_gradient, numeric_gradient

from minirec import backend
from minirec.loss import cross_entropy


def plain_cross_entropy(x, items, targets, scale):
    z = x @ items.T
    return scale * (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(x)), targets]).sum()


@pytest.fixture
def example(rng):
    return rng.normal(size=(40, 4)), rng.normal(size=(9, 4)), rng.integers(9, size=40), 1 / 40


@pytest.mark.parametrize("loss_bytes", [1, 4 << 20])  # chunks of 16 rows, of all rows
def test_value_and_gradients(example, loss_bytes, monkeypatch):
    monkeypatch.setattr(backend, "CPU_PLAN", backend.CPU_PLAN._replace(loss_bytes=loss_bytes))
    x, items, targets, scale = example
    d_items = np.zeros_like(items)
    loss, d_x = cross_entropy(x, items, targets, scale, d_items)
    np.testing.assert_allclose(loss, plain_cross_entropy(*example), rtol=1e-13)
    assert_gradient(d_x, numeric_gradient(lambda: plain_cross_entropy(*example), x))
    assert_gradient(d_items, numeric_gradient(lambda: plain_cross_entropy(*example), items))


def test_large_logits_do_not_overflow(example):
    x, items, targets, scale = example
    loss, d_x = cross_entropy(x * 1e4, items, targets, scale, np.zeros_like(items))
    assert np.isfinite(loss) and np.isfinite(d_x).all()


def test_float32_stays_float32(example):
    x, items, targets, _ = example
    d_items = np.zeros_like(items, np.float32)
    _, d_x = cross_entropy(x.astype(np.float32), items.astype(np.float32), targets, np.float64(0.1), d_items)
    assert d_x.dtype == d_items.dtype == np.float32
