"""Attention against a naive loop, its gradient, and the n_buckets that hold the packed rows."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, assert_gradient

from minirec.attention import FIXED, attention, attention_backward, fixed_weights, known_weightings
from minirec.lesson.gradcheck import central_differences
from minirec.ops import dropout_mask
from minirec.packing import make_buckets

LENGTHS = np.array([1, 3, 3, 4, 6])
N, D, H = LENGTHS.sum(), 6, 2


@pytest.fixture
def qkv(rng):
    return [rng.normal(size=(N, D)) for _ in range(3)]


@pytest.mark.parametrize("n_buckets", [None, 2])
@pytest.mark.parametrize("weighting", known_weightings())
def test_attention_gradients_with_dropout(qkv, weighting, n_buckets, rng):
    buckets = make_buckets(LENGTHS, n_buckets, np)
    d_out = rng.normal(size=(N, D))

    def loss():
        out, _ = attention(*qkv, buckets, H, weighting, 0.3, np.random.default_rng(1))
        return (out * d_out).sum()

    _, cache = attention(*qkv, buckets, H, weighting, 0.3, np.random.default_rng(1))
    gradients = attention_backward(d_out, cache, buckets, weighting)
    for x, gradient in zip(qkv, gradients, strict=True):
        if gradient is None:
            assert weighting != "softmax" and np.abs(central_differences(loss, x)).max() == 0
        else:
            assert_gradient(gradient, central_differences(loss, x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighting", FIXED)
def test_fixed_weights_are_causal_and_each_row_sums_to_one(weighting, dtype):
    a = fixed_weights(weighting, 50, np.empty(0, dtype))
    assert a.dtype == dtype and (a >= 0).all() and (np.triu(a, 1) == 0).all()
    np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(a[:7, :7], fixed_weights(weighting, 7, a), rtol=1e-6)  # shorter sequences use the corner


@pytest.mark.parametrize("weighting", known_weightings())
def test_dropout_draws_do_not_depend_on_the_weighting(qkv, weighting):
    buckets = make_buckets(LENGTHS, None, np)
    generator, expected = np.random.default_rng(3), np.random.default_rng(3)
    attention(*qkv, buckets, H, weighting, 0.3, generator)
    for bucket in buckets:
        dropout_mask((bucket.count, H, bucket.length, bucket.length), 0.3, expected, qkv[0])
    assert generator.random() == expected.random()


REGISTERED_FROM_OUTSIDE = """
from minirec import attention
attention.FIXED["last_two"] = lambda i, j: i - j < 2

from cli import main

def run(*words):
    main(words, standalone_mode=False)

log = ["--data", "log.txt", "--epochs", "1", "--max-length", "4"]
run("train", *log, "--attn", "last_two", "--out", "run")
run("train", *log, "--out", "learned")
run("evaluate", "learned", "--attn", "last_two")
run("gradcheck", "--attn", "last_two")
run("trace", "--attn", "last_two")
run("lesson")
run("decompose", "run", "--out", "arrays")
run("report", "learned")
run("study", *log, "--seeds", "1", "--workers", "1", "--out", "study")
"""


def test_a_weighting_registered_from_outside_in_one_line_is_known_everywhere(tmp_path):
    users = [f"u{u} " + " ".join(f"i{(u * k + k) % 9}" for k in range(1, 7)) for u in range(12)]
    (tmp_path / "log.txt").write_text("\n".join(users) + "\n")
    (tmp_path / "fifth.py").write_text(REGISTERED_FROM_OUTSIDE)
    paths = {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "fifth.py"], cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert "one step, forwards and backwards, last_two weighting" in process.stdout
    assert (
        '"weightings":["softmax","uniform","identity","recency","last_two"]' in (tmp_path / "lesson.html").read_text()
    )
    assert "last_two" in (tmp_path / "study" / "study.csv").read_text()
    assert '"last_two"' in (tmp_path / "learned" / "report.html").read_text()
    assert set(json.loads((tmp_path / "study" / "study.json").read_text())["datasets"]["log"]["metrics"]) == {
        *known_weightings(),
        "last_two",
    }
