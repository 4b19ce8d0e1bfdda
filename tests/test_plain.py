"""The plain model, which all others are held equal to: its gradients, and the packed model beside it."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, assert_gradient, log_of

from minirec import decompose, model, optimizer, plain
from minirec.attention import known_weightings
from minirec.data.split import leave_one_out
from minirec.lesson import gradcheck
from minirec.lesson.gradcheck import central_differences
from minirec.packing import make_buckets, pack_list
from minirec.parameters import parameter_count, parameter_shapes, sub_dict, unflatten
from minirec.training import ranking, runs

MIXED = ("softmax", "recency")  # one weighting a block
ATTN = [*known_weightings(), MIXED]


@pytest.fixture(params=ATTN, ids=str)
def example(request):
    """Config, float64 parameters and ragged sequences, some of them longer than max_length."""
    return gradcheck.example(request.param)


def shape_of(config):
    """How plain takes the heads and the weightings."""
    return config.n_heads, config.weightings


def masks_of(batch, cache, config):
    """The dropout masks of a packed forward, as plain takes them: one dict a sequence, in the order given."""
    masks, start = [{} for _ in batch.lengths], 0
    for sequence, length in zip(batch.order, batch.lengths, strict=True):
        rows, start = slice(start, start + length), start + length
        masks[sequence]["embedding"] = cache["dropout"][rows]
        for i, block in enumerate(cache["blocks"]):
            for name in ("o", "ffn_1", "ffn_2"):
                masks[sequence][f"blocks.{i}.{name}"] = block[f"{name}_dropout"][rows]
    for i, block in enumerate(cache["blocks"]):
        row = 0
        for bucket, attention in zip(batch.buckets, block["attention"], strict=True):
            a = np.broadcast_to(attention.weights, attention.weights_dropped.shape)
            mask = np.where(a > 0, attention.weights_dropped / np.where(a > 0, a, 1), 0)  # [B, H, L, L]
            for b in range(bucket.count):
                length = batch.lengths[row]
                for h in range(config.n_heads):
                    masks[batch.order[row]][f"blocks.{i}.attention.{h}"] = mask[b, h, :length, :length]
                row += 1
    return masks


def test_loss_and_every_gradient_of_the_packed_model_are_those_of_the_plain_one(example):
    config, parameters, sequences = example
    loss, gradients = model.loss_and_gradients(parameters, config, sequences)
    expected, plain_gradients = plain.loss_and_gradients(sequences, parameters, *shape_of(config))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert list(gradients) == list(plain_gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, plain_gradients[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("n_buckets", [None, 1, 2, 4])  # dense ones, and ones that are padded
def test_with_dropout_and_in_any_buckets_the_packed_model_equals_the_plain_one(example, n_buckets):
    config, parameters, sequences = example
    batch = pack_list(sequences, config, with_targets=True)
    batch = batch._replace(buckets=make_buckets(batch.lengths, n_buckets, np))
    _, cache = model.forward(parameters, config, batch, np.random.default_rng(3))
    gradients = unflatten(np.zeros(parameter_count(config)), config)
    scale = 1 / len(batch.items)
    loss = model.add_gradients(parameters, config, batch, scale, gradients, np.random.default_rng(3))
    masks = masks_of(batch, cache, config)
    assert any((mask == 0).any() for mask in masks[0].values())
    expected, plain_gradients = plain.loss_and_gradients(sequences, parameters, *shape_of(config), masks)
    assert loss == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, plain_gradients[name], atol=1e-12, err_msg=name)


def test_representations_and_attention_of_the_packed_model_are_those_of_the_plain_one(example):
    config, parameters, sequences = example
    for sequence, x in zip(sequences, model.encode(parameters, config, sequences), strict=True):
        expected, cache = plain.forward(sequence[-config.max_length :], parameters, *shape_of(config))
        np.testing.assert_allclose(x, expected, atol=1e-12)
        matrices = model.attention_matrices(parameters, config, sequence)
        assert len(matrices) == config.n_blocks
        for a, block in zip(matrices, cache["blocks"], strict=True):
            np.testing.assert_allclose(a, block["a"], atol=1e-12)


@pytest.mark.parametrize("n_buckets", [None, 1, 2, 4])
def test_kept_and_mixed_parts_are_right_in_any_buckets(example, n_buckets):
    config, parameters, sequences = example
    batch = pack_list(sequences, config)
    batch = batch._replace(buckets=make_buckets(batch.lengths, n_buckets, np))
    _, cache = model.forward(parameters, config, batch)
    for i, block in enumerate(cache["blocks"]):
        p = sub_dict(parameters, f"blocks.{i}.")
        keep, mix = decompose.keep_and_mix(block, p, batch.buckets)
        ends = np.cumsum(batch.lengths)
        for sequence, end, length in zip(batch.order, ends, batch.lengths, strict=True):
            _, plain_cache = plain.forward(sequences[sequence][-config.max_length :], parameters, *shape_of(config))
            block_cache, expected = plain_cache["blocks"][i], []
            v_heads = np.split(block_cache["v"], config.n_heads, axis=1)
            for part in ("keep", "mix"):
                select = np.eye(length) if part == "keep" else 1 - np.eye(length)
                heads = [(a * select) @ v for a, v in zip(block_cache["a"], v_heads, strict=True)]
                expected.append(np.hstack(heads) @ p["attention.w_o"])
            np.testing.assert_allclose(keep[end - length : end], expected[0], atol=1e-12)
            np.testing.assert_allclose(mix[end - length : end], expected[1], atol=1e-12)


def test_the_plain_gradients_are_those_of_central_differences(example):
    config, parameters, (_, short, longer, *_) = example  # two of them will do: every entry costs two losses
    sequences = [short, longer]
    rng, sizes = np.random.default_rng(1), (config.hidden_size, config.n_heads, config.n_blocks)
    lengths = [min(len(s) - 1, config.max_length) for s in sequences]
    masks = [plain.draw_masks(length, *sizes, 0.3, rng) for length in lengths]

    def loss():
        return plain.loss_and_gradients(sequences, parameters, *shape_of(config), masks)[0]

    _, gradients = plain.loss_and_gradients(sequences, parameters, *shape_of(config), masks)
    for name, value in parameters.items():
        if gradcheck.identically_zero(config, name):
            assert np.abs(gradients[name]).max() < 1e-15
        else:
            assert_gradient(gradients[name], central_differences(loss, value), 1e-6)


def test_both_models_start_from_the_same_weights_and_take_the_same_steps():
    config = model.Config(n_items=20, hidden_size=8, max_length=6)
    p = plain.init_parameters(20, d=8, n_blocks=2, max_length=6, seed=3)
    flat = np.concatenate([v.reshape(-1) for v in model.init_parameters(config, 3, np.float64).values()])
    parameters = unflatten(flat, config)
    assert list(p) == list(parameters) and all((p[name] == parameters[name]).all() for name in p)
    m, v = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    flat_m, flat_v = np.zeros_like(flat), np.zeros_like(flat)
    sequences = [(np.arange(n) * 3 + n) % 20 for n in (3, 5, 5, 7, 9)]
    for step in range(1, 11):
        plain_loss, g = plain.loss_and_gradients(sequences, p, 2, ("softmax", "softmax"))
        plain.adam_step(p, g, m, v, step, 0.01)
        loss, gradients = model.loss_and_gradients(parameters, config, sequences)
        flat_g = np.concatenate([x.reshape(-1) for x in gradients.values()])
        optimizer.adam_step(flat, flat_g, flat_m, flat_v, step, 0.01)
        assert loss == pytest.approx(plain_loss, rel=1e-10)


def test_a_checkpoint_of_one_model_serves_the_other(trained):
    config = runs.model_config(runs.load_settings(trained))
    parameters = runs.load_parameters(trained, config)
    items = np.array([3, 1, 4, 1, 5])
    x, _ = plain.forward(items, {name: value.astype(float) for name, value in parameters.items()}, *shape_of(config))
    np.testing.assert_allclose(model.encode(parameters, config, [items])[0], x, atol=1e-4)
    own = plain.init_parameters(config.n_items)
    assert {name: value.shape for name, value in own.items()} == parameter_shapes(config)


def test_the_plain_hit_rate_is_that_of_the_ranking(example):
    config, parameters, _ = example
    rng = np.random.default_rng(0)
    histories = [rng.integers(config.n_items, size=n) for n in (3, 5, 9, 4, 12, 3, 7)]
    log = log_of(histories)
    targets = leave_one_out(log).test
    ranks = np.concatenate(list(ranking.rank_targets(parameters, config, log.sequence, targets)))
    for k in (1, 3, 10):
        assert plain.hit_rate(histories, parameters, *shape_of(config), k) == pytest.approx((ranks < k).mean())


def test_training_the_plain_model_lowers_its_loss(capsys):
    sequences = [(np.arange(n) + n) % 12 for n in (5, 6, 7, 8, 9, 5, 6, 7)]
    p = plain.init_parameters(12, d=8, n_blocks=1, max_length=9)
    plain.train(sequences, p, 2, ("softmax",), epochs=20, batch_size=3, rate=0.1, lr=0.02)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0] / 3
    assert plain.hit_rate(sequences, p, 2, ("softmax",), k=1) == 1


def test_the_core_needs_numpy_and_nothing_else(tmp_path):
    """Every other package, and what else of minirec is not the core, is kept from being imported."""
    code = """
import sys
from importlib.abc import MetaPathFinder

import numpy

class Nothing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        core = "plain errors backend ops packing attention loss parameters model optimizer decompose".split()
        core += ["gpu", "kernels"]
        first, *rest = name.split(".")
        allowed = first in sys.stdlib_module_names or first == "numpy"
        if not allowed and not (first == "minirec" and (not rest or rest[0] in core)):
            raise ImportError(f"{name} is not there")
        if first in ("multiprocessing", "concurrent", "mmap"):
            raise ImportError(f"{name}: the core starts no processes")

sys.meta_path.insert(0, Nothing())
from minirec import decompose, model, optimizer, plain

config = model.Config(n_items=9, hidden_size=4, max_length=5)
parameters = model.init_parameters(config, 0)
loss, gradients = model.loss_and_gradients(parameters, config, [numpy.arange(5), numpy.arange(3)])
print(len(gradients), len(decompose.decompose(parameters, config, [numpy.arange(5)])["blocks"]))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["36", "2"]


def test_the_plain_model_trains_on_sequences_longer_than_it_can_hold(capsys):
    sequences = [np.arange(10) % 7, np.arange(12) % 5, np.arange(3)]
    p = plain.init_parameters(7, d=4, n_blocks=1, max_length=5)
    plain.train(sequences, p, 2, ("softmax",), epochs=1, batch_size=2)
    assert "epoch 1 of 1: loss " in capsys.readouterr().out
