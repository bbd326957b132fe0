from __future__ import annotations

import torch
from medsr.networks.layout import channels_last
from medsr.networks.slice_sr import SliceSRNet


def test_planes_and_volumes_each_get_their_order_and_the_result_stays():
    torch.manual_seed(0)
    network = SliceSRNet(0.125, prior=True).eval()
    image = torch.rand(2, 1, 16, 16, 5)
    with torch.inference_mode():
        before = network(image)
    assert channels_last(network) is network
    assert network.prior.head.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.detail.weight.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        assert torch.allclose(network(image), before, atol=1e-5)
