"""The printed walk: what it shows is what the model does, its parts add up, and it fits a terminal."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from minirec import model
from minirec.attention import known_weightings, softmax
from minirec.cli import main
from minirec.decompose import RATIOS, decompose
from minirec.lesson import trace
from minirec.lesson.gradcheck import central_differences

LAST = trace.LENGTH - 1


@pytest.fixture(scope="module", params=known_weightings())
def walked(request):
    """Under one weighting: the walk, and the steps by title, first up to the loss, then from it on."""
    steps = list(trace.steps(request.param))
    cut = [step.title for step in steps].index("backward: loss")
    forward, later = ({step.title: step for step in part} for part in (steps[:cut], steps[cut:]))
    assert len(forward) + len(later) == len(steps)
    return trace.record(*trace.example(request.param)), forward, later


def text_of(steps):
    return [line for step in steps for line in trace.lines(step)]


def test_the_walk_is_the_models_own_step(walked):
    walk, forward, _ = walked
    loss, gradients = model.loss_and_gradients(walk.parameters, walk.config, trace.SEQUENCES)
    assert walk.loss == loss and f"= {loss:.4f}" in forward["logits and loss"].says
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(walk.gradients[name], gradient)
    (x,) = model.encode(walk.parameters, walk.config, [trace.SEQUENCES[0][:-1]])
    np.testing.assert_allclose(forward["block 5. layer norm"].arrays["x = LN(z)"], x, atol=1e-12)
    logits = x @ walk.parameters["item_embedding"].T
    np.testing.assert_allclose(forward["logits and loss"].arrays["logits"], logits, atol=1e-12)


def test_printed_gradients_are_the_models_and_agree_with_central_differences(walked):
    walk, _, later = walked
    table = later["every parameter's gradient"]
    assert [row.split()[0] for row in table.rows] == list(walk.gradients)
    for gradient, hand, numeric, (off,) in zip(walk.gradients.values(), *table.arrays.values(), strict=True):
        np.testing.assert_array_equal(hand, gradient.ravel()[: trace.SHOWN])
        np.testing.assert_allclose(numeric, hand, atol=1e-8)
        assert float(off) < 1e-8
    embedding = later["backward 1. E, which serves twice"].arrays["d_E"]
    np.testing.assert_array_equal(embedding, walk.gradients["item_embedding"])


def test_the_last_gradient_on_the_way_back_is_that_of_the_positions(walked):
    walk, _, later = walked
    d_z = later["backward 1. layer norm"].arrays["d_z"]
    np.testing.assert_allclose(d_z[LAST], walk.gradients["position_embedding"][LAST], atol=1e-15)  # no other user's


def test_gradients_of_the_logits_agree_with_central_differences(walked):
    walk, _, later = walked
    logits, p = trace.probabilities(walk)
    targets, each = walk.batch.targets, np.arange(len(p))
    numeric = central_differences(lambda: -np.log(softmax(logits.copy(), 0)[each, targets]).mean(), logits)
    np.testing.assert_allclose(later["backward: loss"].arrays["d_logits"], trace.own(numeric), atol=1e-9)


def test_gradients_through_the_weights_agree_with_central_differences(walked):
    walk, forward, later = walked
    if walk.config.attn != "softmax":
        assert list(later["block 2. mix positions"].arrays) == ["d_mixed", "d_v"]
        return
    v, backward = forward["block 1. query, key, value"].arrays["v"], later["block 2. A"].arrays
    s, a = (forward["block 2. A"].arrays[name].copy() for name in "sA")

    def loss_of(weights):
        return (weights @ v * backward["d_mixed"]).sum()

    np.testing.assert_allclose(backward["d_A"], central_differences(lambda: loss_of(a), a), atol=1e-9)
    s[np.isinf(s)] = -1e3  # no weight either, but with differences
    np.testing.assert_allclose(
        backward["d_s"], central_differences(lambda: loss_of(softmax(s.copy(), 0)), s), atol=1e-9
    )


def test_each_weighting_put_in_is_the_model_with_that_weighting(walked):
    walk, _, later = walked
    step = later[f"position {LAST} with another A"]
    assert step.rows == known_weightings()
    for attn, (_, loss) in zip(known_weightings(), step.arrays["p[5], loss"], strict=True):
        assert loss == model.loss_and_gradients(walk.parameters, replace(walk.config, attn=attn), trace.SEQUENCES)[0]


def test_the_parts_add_up_to_what_was_printed_forwards(walked):
    _, forward, later = walked
    mixing, normed = forward["block 2. mix positions, then heads"].arrays, forward["block 3. layer norm"].arrays
    totals = mixing["o"], mixing["z = x + o"], normed["y = LN(z)"]
    for table, total in zip(later[f"position {LAST} taken apart"].arrays.values(), totals, strict=True):
        *parts, whole, bias, shift, end = table
        np.testing.assert_allclose(sum(parts), whole, atol=1e-12)
        np.testing.assert_allclose(whole + bias + shift, end, atol=1e-12)
        np.testing.assert_allclose(end, total[LAST], atol=1e-12)


def test_the_printed_digits_add_up_as_they_stand(walked):
    _, _, later = walked
    rows = {line[:5].strip(): line[6:].split() for line in trace.lines(later[f"position {LAST} taken apart"])}
    parts = np.array([numbers for label, numbers in rows.items() if label.startswith("j =")], float)
    whole, bias, shift, end = (np.array(rows[label], float) for label in ("sum", "b_o", "beta", "total"))
    assert parts.shape == (trace.LENGTH, 12)
    np.testing.assert_allclose(parts.sum(axis=0), whole, atol=0.0005 * (trace.LENGTH + 1))
    np.testing.assert_allclose(whole + bias + shift, end, atol=0.0005 * 4)


def test_the_mixing_ratios_are_those_of_decompose(walked):
    walk, _, later = walked
    (block,) = decompose(walk.parameters, walk.config, [trace.SEQUENCES[0][:-1]])["blocks"]
    *_, ratio = later[f"how much position {LAST} mixes"].arrays["|keeps|, |mixes|, ratio"].T
    np.testing.assert_allclose(ratio, [block[name][LAST] for name in RATIOS], atol=1e-12)


def test_it_fits_a_terminal_and_says_the_same_again(walked):
    walk, forward, later = walked
    text = text_of([*forward.values(), *later.values()])
    assert text == text_of(trace.steps(walk.config.attn))
    assert max(map(len, text)) <= trace.WIDTH
    assert not any("nan" in line or "-0.000 " in f"{line} " for line in text)


def test_a_line_that_differs_from_the_model_is_refused():
    with pytest.raises(AssertionError):
        trace.same(np.ones(3), np.ones(3) + 1e-9)


def test_the_profiler_hook_is_taken_off_again(monkeypatch):
    before = sys.getprofile()
    trace.record(*trace.example())
    assert sys.getprofile() is before
    monkeypatch.setattr(model, "loss_and_gradients", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace.record(*trace.example())
    assert sys.getprofile() is before


@pytest.mark.parametrize("wrong", [["--attn", "linear"], ["--seed", "-1"], ["--seed", "1.5"], ["--seed", ""], ["run"]])
def test_the_command_refuses_what_is_no_option(wrong, monkeypatch):
    result = CliRunner().invoke(main, ["trace", *wrong])
    assert result.exit_code == 2 and "Error" in result.output


def test_the_command_prints_the_steps(monkeypatch):
    result = CliRunner().invoke(main, ["trace", "--attn", "identity", "--seed", "3"])
    assert result.exit_code == 0
    assert result.output.splitlines() == text_of(trace.steps("identity", 3))
