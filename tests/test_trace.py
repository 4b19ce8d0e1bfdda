"""The printed walk: what it shows is what the model does, each line of it, and it fits a terminal."""

import inspect

import numpy as np
import pytest
from click.testing import CliRunner

from minirec import attention, decompose, loss, model, ops
from minirec.attention import known_weightings
from minirec.cli import main
from minirec.lesson import gradcheck, recording, trace


@pytest.fixture(scope="module", params=known_weightings())
def walked(request):
    """Under one weighting: its name, and the lines printed."""
    return request.param, "\n".join(trace.lines(request.param)).split("\n")


def printed(lines, name, after):
    """The rows of numbers below the first line that begins with a name, after the first that begins with a title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(after))
    start = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {name} ["))
    rows = []
    for line in lines[start + 1 :]:
        try:
            rows.append([float(cell) for cell in line.split()])
        except ValueError:
            break
        if not rows[-1]:
            break
    return np.array([row for row in rows if row])


def test_all_parameters_are_printed(walked):
    attn, lines = walked
    for name, value in recording.example(attn)[1].items():
        np.testing.assert_allclose(printed(lines, name, "== the param"), np.atleast_2d(value), atol=6e-5)


def test_the_numbers_are_the_models(walked):
    attn, lines = walked
    config, p = recording.example(attn)
    value, gradients = model.loss_and_gradients(p, config, recording.SEQUENCES)
    assert f"{attn:<12}{value:.4f}" in lines
    (x,) = model.encode(p, config, [recording.SEQUENCES[0][:-1]])
    out = printed(lines, "out", "-- ops.layer_norm, for block: out, c")  # of its lines, the first before beta
    np.testing.assert_allclose(out[-4:] + p["blocks.0.ffn_norm.beta"], x, atol=2e-4)
    d_e = printed(lines, '[1]["item_embedding"]', "return float(loss)")
    np.testing.assert_allclose(d_e, gradients["item_embedding"], atol=6e-5)


def test_each_line_that_writes_numbers_stands_above_them(walked):
    attn, lines = walked
    config, p = recording.example(attn)
    events = recording.record(lambda: model.loss_and_gradients(p, config, recording.SEQUENCES))
    shown, text = 0, "".join(line.strip().replace(" ", "") for line in lines)
    for call, line, name, value in events:
        if call.module in (ops, attention, loss, model) and line != call.start and name != "return":
            if isinstance(value, np.ndarray):
                source = inspect.getsource(call.module).splitlines()[line - 1]
                assert "".join(source.split()) in text, source
                shown += 1
    assert shown > 80


def test_the_gradients_stand_beside_their_central_differences(walked):
    attn, lines = walked
    table = lines[lines.index(f"{'parameter':<40}{'largest entry':>20}{'off by':>20}") + 1 :][:20]
    assert [row.split()[0] for row in table] == list(recording.example(attn)[1])
    assert all(float(row.split()[-1]) < 1e-8 for row in table)
    assert "all agree; so does every operation alone" in lines


def test_the_operation_whose_gradient_is_off_is_named(monkeypatch):
    wrong = lambda d_out, out: d_out.copy()
    monkeypatch.setattr(ops, "relu_backward", wrong)
    monkeypatch.setattr(model, "relu_backward", wrong)
    lines = list(trace.lines())
    assert any(line.startswith("relu_backward: d_x off by ") for line in lines)
    assert "all agree; so does every operation alone" not in lines


def test_the_mixing_ratios_are_those_of_decompose(walked):
    attn, lines = walked
    config, p = recording.example(attn)
    history = recording.SEQUENCES[0][:-1]
    (block,) = decompose.decompose(p, config, [history])["blocks"]
    ratio = "attn" if attn == "identity" else "attn_res_ln"  # all are 0, and printed once
    ratios = printed(lines, f'["{ratio}"]', "return {name: mixes")
    np.testing.assert_allclose(ratios[0], block[ratio], atol=6e-5)
    (square,) = decompose.contributions(p, config, history)
    np.testing.assert_allclose(printed(lines, "[0]", "return [to_host(square)"), square, atol=6e-5)


def test_it_fits_a_terminal_and_says_the_same_again(walked):
    attn, lines = walked
    assert lines == "\n".join(trace.lines(attn)).split("\n")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("wrong", [["--attn", "linear"], ["--seed", "-1"], ["--seed", "1.5"], ["--seed", ""], ["run"]])
def test_the_command_refuses_what_is_no_option(wrong):
    result = CliRunner().invoke(main, ["trace", *wrong])
    assert result.exit_code == 2 and "Error" in result.output


def test_the_command_prints_the_walk():
    result = CliRunner().invoke(main, ["trace", "--attn", "identity", "--seed", "3"])
    assert result.exit_code == 0
    assert result.output.rstrip("\n") == "\n".join(trace.lines("identity", 3))
    assert gradcheck.TOLERANCE == 1e-6
