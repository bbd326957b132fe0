from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.geometry import rescaled_size, slice_positions
from medsr.networks.position_readout import PositionReadout, slabs_and_conditions


@pytest.mark.parametrize("ratio", [1.5, 2, 2.5, 3, 4, 5.3])
def test_every_thin_slice_lies_in_its_slab(ratio):
    positions = slice_positions(7, rescaled_size(7, ratio), ratio)
    slabs, conditions = slabs_and_conditions(positions, 7, scale=ratio, thickness=0.8)
    assert (np.diff(slabs) >= 0).all()
    assert set(slabs.tolist()) == set(range(7)), "a thick slice without thin ones would not be seen"
    assert float(conditions[:, 0].abs().max()) <= 1.2
    assert np.allclose(slabs + conditions[:, 0].numpy() / 2, positions, atol=1e-6)
    assert torch.allclose(conditions[:, 1], torch.tensor(1 / ratio))
    assert torch.allclose(conditions[:, 2], torch.tensor(0.8))


def test_an_integer_ratio_repeats_the_same_conditions_in_every_slab():
    positions = slice_positions(5, 20, 4)
    _, conditions = slabs_and_conditions(positions, 5, scale=4, thickness=1)
    assert torch.allclose(conditions.view(5, 4, 3), conditions[:4].expand(5, 4, 3), atol=1e-6)


def test_a_read_out_without_gain_is_zero_and_with_gain_depends_on_the_position():
    conditions = torch.tensor([[-0.5, 0.25, 1.0], [0.5, 0.25, 1.0]])
    weights, bias = PositionReadout(6, 2)(conditions)
    assert not weights.any()
    assert not bias.any()
    torch.manual_seed(0)
    weights, _ = PositionReadout(6, 2, gain=1.0)(conditions)
    assert weights.shape == (2, 6, 2)
    assert not torch.allclose(weights[0], weights[1])
