"""The PyTorch references compute what minirec computes: else comparing their speed would say nothing."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pytorch_sasrec import REFERENCES, build, differences, example, reference_loss_and_gradients  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from training import (  # noqa: E402
    TOLERANCE,
    Problem,
    train_minirec,
    train_tuned,
    train_usual,
    training_flops,
)

from minirec.model import Config, init_parameters, loss_and_gradients  # noqa: E402
from minirec.ops import dropout_mask  # noqa: E402
from minirec.parameters import parameter_shapes  # noqa: E402

WEIGHTINGS = ("softmax", "uniform", ("uniform", "softmax"))


@pytest.mark.parametrize("attn", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_same_loss_and_gradients(reference, attn):
    errors = differences(reference, attn)
    assert set(errors) == {"loss", *parameter_shapes(example(attn)[1])}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("attn", WEIGHTINGS, ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_same_dropout(reference, attn, monkeypatch):
    """Given the same draws, the same gradients: dropout sits in the same places, at the same rate.

    One sequence of full length, whose rows are the same packed and padded, so that masks can be shared.
    """
    parameters, config, sequences = example(attn, dropout=0.5)
    sequences = [s for s in sequences if len(s) > config.max_length][:1]
    loss, gradients = loss_and_gradients(parameters, config, sequences, np.random.default_rng(0))
    rng = np.random.default_rng(0)

    def drop(x, p, training, inplace=False):
        return x * torch.from_numpy(dropout_mask(x.shape, p, rng, parameters["item_embedding"]))

    def attend(q, k, v, is_causal, dropout_p):
        """PyTorch's fused attention by its documentation, with dropout that can be replayed."""
        assert is_causal
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, H, L, L]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return drop(scores.masked_fill(future, -torch.inf).softmax(-1), dropout_p, True) @ v

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    other_loss, other = reference_loss_and_gradients(reference, parameters, config, sequences, dropout=True)
    assert other_loss == pytest.approx(loss, rel=TOLERANCE)
    for name, g in gradients.items():
        np.testing.assert_allclose(other[name], g, rtol=0, atol=TOLERANCE * max(np.abs(g).max(), 1e-4), err_msg=name)


@pytest.mark.parametrize("attn", WEIGHTINGS, ids=str)
def test_the_count_of_operations(attn):
    """Without padding, PyTorch's own counter of matrix products finds what training_flops says."""
    config = Config(n_items=40, hidden_size=8, max_length=6, dropout=0.0, attn=attn)
    lengths = np.full(5, config.max_length)
    flat = np.arange(5 * 7) % config.n_items
    model = build("usual", config, init_parameters(config, 0))
    with FlopCounterMode(display=False) as counter:
        model(flat, np.arange(5) * 7, lengths).backward()
    assert training_flops(config, lengths) == counter.get_total_flops()


@pytest.mark.parametrize("attn", WEIGHTINGS[:2])
def test_the_same_training(attn, monkeypatch):
    """The benchmark's trainers, without dropout: the same losses step after step, on the same batches."""
    monkeypatch.setattr("training.LEARNING_RATE", 0.01)  # for a loss that moves within ten steps
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, size=200)
    starts = np.cumsum(lengths + 1) - lengths - 1
    sequence = rng.integers(50, size=int((lengths + 1).sum()))
    config = Config(50, hidden_size=16, max_length=8, dropout=0.0, attn=attn)
    problem = Problem(config, sequence, starts, lengths, [rng.permutation(200)[:128] for _ in range(10)])
    losses = {}
    for trainer in (train_minirec, train_usual, train_tuned):
        with trainer(problem) as step:
            losses[trainer] = [float(step(number, 1)) for number in range(10)]
    assert losses[train_minirec][-1] < losses[train_minirec][0]
    assert losses[train_usual] == pytest.approx(losses[train_minirec], rel=1e-5)
    assert losses[train_tuned] == pytest.approx(losses[train_minirec], rel=1e-5)
