from __future__ import annotations

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.terms import TermLoss, refuse_other_shape


class Errors(TermLoss):
    def forward(self, pred, target):
        refuse_other_shape(pred, target)
        error = pred - target
        return self.summed({"l1": error.abs().mean(), "mse": 0.5 * error.pow(2).mean()})


def test_the_sum_is_that_of_what_is_remembered_and_carries_the_gradient():
    loss, pred = Errors(), torch.tensor([1.0, 3.0], requires_grad=True)
    assert loss.last_terms == {}
    total = loss(pred, torch.zeros(2))
    assert loss.last_terms == {"l1": 2.0, "mse": 2.5}
    assert total.item() == 4.5
    total.backward()
    assert pred.grad.tolist() == [1.0, 2.0]


def test_shapes_that_would_be_broadcast_are_refused():
    with pytest.raises(SettingError, match=r"one shape, got \(1, 3\) and \(2, 3\)"):
        Errors()(torch.zeros(1, 3), torch.zeros(2, 3))
