"""The whole model: gradients of every named tensor, causality, company in a batch, a trajectory."""

from dataclasses import replace

import numpy as np
import pytest

from minirec import model
from minirec.attention import known_weightings
from minirec.errors import UserError
from minirec.lesson import gradcheck
from minirec.parameters import parameter_count, parameter_shapes, unflatten


@pytest.mark.parametrize("attn", known_weightings())
def test_gradients_of_every_named_tensor(attn):
    seen = []
    for name, error, _ in gradcheck.check(attn):
        assert error < gradcheck.TOLERANCE, name
        seen.append(name)
    config, _, _ = gradcheck.example(attn)
    assert seen == list(reversed(parameter_shapes(config)))


@pytest.mark.parametrize("attn", known_weightings())
def test_gradients_that_are_zero_by_construction(attn):
    config, parameters, sequences = gradcheck.example(attn)
    _, gradients = model.loss_and_gradients(parameters, config, sequences)
    for name, gradient in gradients.items():
        if gradcheck.identically_zero(config, name):
            assert np.abs(gradient).max() < 1e-15
        else:
            assert np.abs(gradient).max() > 1e-6, name


@pytest.mark.parametrize("attn", known_weightings())
def test_a_later_item_never_changes_an_earlier_output(attn):
    config, parameters, _ = gradcheck.example(attn)
    first, second = model.encode(parameters, config, [np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 9, 8])])
    np.testing.assert_allclose(first[:3], second[:3], atol=1e-14)
    assert np.abs(first[3:] - second[3:]).max() > 1e-3


def test_the_company_in_a_batch_changes_nothing():
    config, parameters, sequences = gradcheck.example("softmax")
    together = model.encode(parameters, config, sequences)
    for sequence, x in zip(sequences, together, strict=True):
        (alone,) = model.encode(parameters, config, [sequence])
        assert x.shape == (min(len(sequence), config.max_length), config.hidden_size)
        np.testing.assert_allclose(x, alone, atol=1e-14)


def test_only_the_last_max_length_items_count():
    config, parameters, _ = gradcheck.example("softmax")
    long = np.arange(12)
    for a, b in zip(*(model.encode(parameters, config, [s]) for s in (long, long[-config.max_length :])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows_the_parameters_alone(dtype):
    config = model.Config(n_items=9, hidden_size=8, max_length=5)
    parameters = dict(model.init_parameters(config, 0, dtype))  # any mapping will do
    rng = np.random.default_rng(0)
    loss, gradients = model.loss_and_gradients(parameters, config, [np.arange(6), np.arange(3)], rng)
    assert isinstance(loss, float)
    assert {g.dtype for g in gradients.values()} == {np.dtype(dtype)}
    assert model.encode(parameters, config, [[1, 2]])[0].dtype == dtype


def test_all_arms_start_from_the_same_weights():
    config = model.Config(n_items=9, hidden_size=8)
    drawn = [model.init_parameters(replace(config, attn=attn), 3) for attn in known_weightings()]
    for name, value in drawn[0].items():
        assert value.flags.writeable
        assert all((other[name] == value).all() for other in drawn)
    assert (drawn[0]["blocks.1.ffn_norm.gamma"] == 1).all() and (drawn[0]["blocks.1.ffn.b_1"] == 0).all()


def test_query_key_and_value_start_xavier_uniform_and_the_rest_normal():
    parameters = model.init_parameters(model.Config(n_items=500, n_blocks=1), 0, np.float64)
    bound = np.sqrt(6 / (4 * 64))
    for name in "qkv":
        w = parameters[f"blocks.0.attention.w_{name}"]
        assert bound * 0.999 < np.abs(w).max() <= bound
        assert w.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    for name in ("item_embedding", "position_embedding", "blocks.0.attention.w_o", "blocks.0.ffn.w_1"):
        assert parameters[name].std() == pytest.approx(0.02, rel=0.03)


def test_parameters_are_views_on_one_flat_vector():
    config = model.Config(n_items=9, hidden_size=8)
    flat = np.zeros(parameter_count(config))
    parameters = unflatten(flat, config)
    for value in parameters.values():
        value += 1
    assert (flat == 1).all()


RECORDED = [  # of these ten steps, when the gradient check had passed, and the plain model agreed
    2.9804645715,
    2.8932582093,
    2.8322666130,
    2.7726668450,
    2.7117104489,
    2.6498854245,
    2.5872232946,
    2.5236593323,
    2.4592019097,
    2.3940780814,
]


def test_ten_steps_of_training_follow_the_recorded_losses():
    """A change of any sign, scale or order shows here; recorded in float64 without dropout."""
    from minirec.optimizer import adam_step

    config = model.Config(n_items=20, hidden_size=8, max_length=6)
    flat = np.concatenate([v.reshape(-1) for v in model.init_parameters(config, 0, np.float64).values()])
    parameters, m, v = unflatten(flat, config), np.zeros_like(flat), np.zeros_like(flat)
    sequences = [(np.arange(n) * 3 + n) % 20 for n in (3, 5, 5, 7, 9)]
    losses = []
    for step in range(1, 11):
        loss, g = model.loss_and_gradients(parameters, config, sequences)
        adam_step(flat, np.concatenate([x.reshape(-1) for x in g.values()]), m, v, step, 0.01)
        losses.append(loss)
    np.testing.assert_allclose(losses, RECORDED, rtol=1e-9)


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"hidden_size": 10, "n_heads": 3}, "3 heads do not divide"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"n_blocks": 0}, "n_blocks"),
        ({"attn": "linear"}, "softmax, uniform, identity, recency"),
        ({"attn": ("softmax",)}, "1 blocks"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes, named):
    with pytest.raises(UserError, match=named):
        model.Config(n_items=5, **sizes)


@pytest.mark.parametrize("sequence", [[0, 5], [-1, 2], [0.5, 1.0], [[0, 1], [2, 3]]])
def test_items_out_of_range_are_refused(sequence):
    config = model.Config(n_items=5, hidden_size=4)
    parameters = model.init_parameters(config, 0)
    for call in (model.loss_and_gradients, model.encode):
        with pytest.raises(UserError, match=r"0\.\.4"):
            call(parameters, config, [np.array(sequence)])


def test_sequences_that_leave_nothing_to_compute_are_refused():
    config = model.Config(n_items=5, hidden_size=4)
    parameters = model.init_parameters(config, 0)
    with pytest.raises(UserError, match="2 or more items"):
        model.loss_and_gradients(parameters, config, [np.array([3]), np.array([], int)])
    with pytest.raises(UserError, match="empty"):
        model.encode(parameters, config, [np.array([3]), np.array([], int)])
