"""Attention against a naive loop, its gradient, and the rectangles that hold the packed rows."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_gradient, numeric_gradient

from minirec.attention import (
    FIXED,
    attention,
    attention_backward,
    fixed_part,
    from_heads,
    known_weightings,
    make_groups,
    to_heads,
)
from minirec.ops import dropout_mask

LENGTHS = np.array([1, 3, 3, 4, 6])
N, D, H = LENGTHS.sum(), 6, 2


def naive_attention(q, k, v, lengths, n_heads, weighting):
    """One sequence, head, query and key at a time."""
    out, start, size = np.zeros_like(v), 0, v.shape[1] // n_heads
    for length in lengths:
        for h in range(n_heads):
            columns = slice(h * size, (h + 1) * size)
            for i in range(length):
                past = slice(start, start + i + 1)
                if weighting == "softmax":
                    scores = k[past, columns] @ q[start + i, columns] / np.sqrt(size)
                    a = np.exp(scores) / np.exp(scores).sum()
                elif weighting == "uniform":
                    a = np.full(i + 1, 1 / (i + 1))
                elif weighting == "recency":
                    a = np.array([1 / (1 + i - j) for j in range(i + 1)])
                    a /= a.sum()
                else:
                    a = np.eye(i + 1)[i]
                out[start + i, columns] = a @ v[past, columns]
        start += length
    return out


@pytest.fixture
def qkv(rng):
    return [rng.normal(size=(N, D)) for _ in range(3)]


@pytest.mark.parametrize("rectangles", [None, 1, 2])
@pytest.mark.parametrize("weighting", known_weightings())
def test_attention_equals_the_naive_loop(qkv, weighting, rectangles):
    groups = make_groups(LENGTHS, rectangles, np)
    out, _ = attention(*qkv, groups, H, weighting, 0, None)
    np.testing.assert_allclose(out, naive_attention(*qkv, LENGTHS, H, weighting), atol=1e-12)


@pytest.mark.parametrize("rectangles", [None, 2])
@pytest.mark.parametrize("weighting", known_weightings())
def test_attention_gradients_with_dropout(qkv, weighting, rectangles, rng):
    groups = make_groups(LENGTHS, rectangles, np)
    d_out = rng.normal(size=(N, D))

    def loss():
        out, _ = attention(*qkv, groups, H, weighting, 0.3, np.random.default_rng(1))
        return (out * d_out).sum()

    _, cache = attention(*qkv, groups, H, weighting, 0.3, np.random.default_rng(1))
    gradients = attention_backward(d_out, cache, groups, weighting)
    for x, gradient in zip(qkv, gradients, strict=True):
        if gradient is None:
            assert weighting != "softmax" and np.abs(numeric_gradient(loss, x)).max() == 0
        else:
            assert_gradient(gradient, numeric_gradient(loss, x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighting", FIXED)
def test_fixed_weights_are_causal_and_each_row_sums_to_one(weighting, dtype):
    a = fixed_part(weighting, 50, np.empty(0, dtype))
    assert a.dtype == dtype and (a >= 0).all() and (np.triu(a, 1) == 0).all()
    np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(a[:7, :7], fixed_part(weighting, 7, a), rtol=1e-6)  # shorter sequences use the corner


@pytest.mark.parametrize("weighting", known_weightings())
def test_dropout_draws_do_not_depend_on_the_weighting(qkv, weighting):
    groups = make_groups(LENGTHS, None, np)
    generator, expected = np.random.default_rng(3), np.random.default_rng(3)
    attention(*qkv, groups, H, weighting, 0.3, generator)
    for group in groups:
        dropout_mask((group.count, H, group.length, group.length), 0.3, expected, qkv[0])
    assert generator.random() == expected.random()


def test_groups_without_padding_are_views(rng):
    x = rng.normal(size=(N, D))
    groups = make_groups(LENGTHS, None, np)
    assert [(g.count, g.length) for g in groups] == [(1, 1), (2, 3), (1, 4), (1, 6)]
    assert all(np.shares_memory(to_heads(x, group, H), x) for group in groups)


@pytest.mark.parametrize("rectangles", [None, 1, 2, 9])
def test_from_heads_undoes_to_heads(rng, rectangles):
    x = rng.normal(size=(N, D))
    out = np.zeros_like(x)
    for group in make_groups(LENGTHS, rectangles, np):
        from_heads(to_heads(x, group, H), group, out)
    np.testing.assert_array_equal(out, x)


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
    assert "position 3 with another A" in process.stdout
    assert "last_two" in (tmp_path / "study" / "study.csv").read_text()
    assert '"last_two"' in (tmp_path / "learned" / "report.html").read_text()
    assert set(json.loads((tmp_path / "study" / "study.json").read_text())["datasets"]["log"]["metrics"]) == {
        *known_weightings(),
        "last_two",
    }
