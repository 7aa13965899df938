# SPDX-License-Identifier: Apache-2.0
"""The terms of a loss: weighted, summed and named as DETR logs them."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.loss_terms import loss_weights, scalars_of, weighted_losses


def test_weighted_sum_names_and_gradients():
    values = torch.tensor([2.0, 3.0, 5.0, 7.0], requires_grad=True)
    names = ["class_error", "loss_ce", "cardinality_error", "loss_ce_0"]
    losses = dict(zip(names, values.unbind(), strict=True))
    total, terms = weighted_losses(losses, {"loss_ce": 2, "loss_ce_0": 0.5, "loss_ce_1": 9})
    assert_close(total, torch.tensor(9.5))
    assert {name: term.item() for name, term in terms.items()} == {
        "loss_ce": 6,
        "loss_ce_0": 3.5,
        "class_error_unscaled": 2,
        "loss_ce_unscaled": 3,
        "cardinality_error_unscaled": 5,
        "loss_ce_0_unscaled": 7,
    }
    assert list(terms)[2:] == [f"{name}_unscaled" for name in names]
    assert not any(term.requires_grad for term in terms.values())
    total.backward()
    assert_close(values.grad, torch.tensor([0, 2, 0, 0.5]))


def test_a_term_that_is_only_logged_does_not_spoil_the_total():
    losses = {"loss_ce": torch.tensor(1.0), "class_error": torch.tensor(torch.nan)}
    assert weighted_losses(losses, {"loss_ce": 3})[0] == 3


def test_losses_of_different_types_add_up():
    losses = {"loss_ce": torch.tensor(1.0), "loss_own": torch.tensor(2.0, dtype=torch.float64)}
    total, _ = weighted_losses(losses, {"loss_ce": 1, "loss_own": 1})
    assert_close(total.double(), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 3])
def test_scalars_have_the_gradient_of_their_place(rows):
    table = torch.randn(rows, 5, requires_grad=True)
    scalars = scalars_of(table, 3)
    assert_close(torch.stack([value for row in scalars for value in row]), table.flatten())
    assert [[value.requires_grad for value in row] for row in scalars] == [
        [True, True, True, False, False]
    ] * rows
    (2 * scalars[-1][1]).backward()
    expected = torch.zeros(rows, 5)
    expected[-1, 1] = 2
    assert_close(table.grad, expected)


def test_differentiable_twice():
    table = torch.randn(1, 5, requires_grad=True)
    total, _ = weighted_losses({"loss_ce": scalars_of(table, 3)[0][0] ** 3}, {"loss_ce": 2})
    [grad] = torch.autograd.grad(total, table, create_graph=True)
    grad.sum().backward()
    assert_close(table.grad[0, 0], 12 * table[0, 0].detach())


def test_losses_may_be_changed_in_place():
    """As the loops of detectron2 do it."""
    table = torch.ones(2, 5, requires_grad=True)
    losses = [[*row] for row in scalars_of(table, 3)]
    losses[1][2] *= 7
    losses[0][4] *= 2
    assert_close(losses[1][1], torch.tensor(1.0))
    (losses[1][2] + losses[1][1]).backward()
    assert_close(table.grad, torch.tensor([[0.0] * 5, [0, 1, 7, 0, 0]]))


def test_after_a_total_that_was_not_trained_on():
    losses = {"loss_ce": torch.tensor(1.0, requires_grad=True)}
    with torch.inference_mode():
        weighted_losses({"loss_ce": torch.tensor(1.0)}, {"loss_ce": 0.7})
    weighted_losses(losses, {"loss_ce": 0.7})[0].backward()
    assert_close(losses["loss_ce"].grad, torch.tensor(0.7))


def test_types_do_not_round_each_others_weights():
    losses = {"a": torch.tensor(1.0, dtype=torch.bfloat16), "b": torch.tensor(1.0)}
    _, terms = weighted_losses(losses, {"a": 1, "b": 0.3})
    assert_close(terms["b"], torch.tensor(0.3))
    assert weighted_losses({"n": torch.tensor(3), "b": torch.tensor(1.0)}, {"n": 0.5, "b": 0.3})[
        0
    ] == pytest.approx(1.8)


def test_names_losses_without_a_weight():
    with pytest.raises(ValueError, match=r"none of the losses \['loss_own'\] has a weight"):
        weighted_losses({"loss_own": torch.tensor(1.0)}, {"loss_ce": 1})


def test_weights_of_all_layers():
    weights = loss_weights(3, ce_loss_coef=1.5)
    assert len(weights) == 9
    assert weights["loss_ce"] == weights["loss_ce_0"] == weights["loss_ce_1"] == 1.5
