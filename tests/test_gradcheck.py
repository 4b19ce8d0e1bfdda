"""The gradient check finds what is wrong, and names the first operation in the backward pass that is."""

import numpy as np
import pytest

from minirec import model, ops
from minirec.attention import known_weightings
from minirec.lesson import gradcheck


@pytest.mark.parametrize("weighting", known_weightings())
def test_every_operation_alone_has_the_right_gradients(weighting):
    found = list(gradcheck.check_operations(weighting))
    assert {operation.split("_backward")[0] for operation, _, _ in found} >= {
        "layer_norm",
        "linear",
        "relu",
        "attention",
    }
    assert all(error < 1e-8 for _, _, error in found)
    assert gradcheck.first_fault(found, [("item_embedding", 1e-9)]) is None


def test_a_wrong_operation_is_named_and_not_what_inherits_its_fault(monkeypatch):
    def without_its_last_term(d_out, cache, d_gamma, d_beta):
        normed, sigma, gamma = cache
        d_gamma += (d_out * normed).sum(axis=0)
        d_beta += d_out.sum(axis=0)
        d_normed = d_out * gamma
        return (d_normed - d_normed.mean(axis=1, keepdims=True)) / sigma

    monkeypatch.setattr(ops, "layer_norm_backward", without_its_last_term)
    monkeypatch.setattr(model, "layer_norm_backward", without_its_last_term)
    parameters = [(name, error) for name, error, _ in gradcheck.check("softmax", only=["item_embedding"])]
    assert parameters[0][1] > 0.01  # it inherits the fault
    fault = gradcheck.first_fault(list(gradcheck.check_operations("softmax")), parameters)
    assert fault.startswith("layer_norm_backward: d_x off by 0.")
    assert fault.endswith("everything before it in the backward pass inherits that")


def test_a_fault_between_the_operations_is_named_by_the_first_parameter_that_is_off(monkeypatch):
    monkeypatch.setattr(model, "relu_backward", lambda d_out, out: d_out)
    parameters = [(name, error) for name, error, _ in gradcheck.check("softmax")]
    fault = gradcheck.first_fault(list(gradcheck.check_operations("softmax")), parameters)
    assert fault.startswith("blocks.1.ffn.b_1: off by ") and "every operation is right alone" in fault


def test_a_gradient_that_is_no_number_is_off():
    assert gradcheck.first_fault([("linear_backward", "d_x", np.nan)], []).startswith("linear_backward: d_x off by nan")
