from __future__ import annotations

import pytest
import torch
from medsr.engines.joint_segmentation import JointInferer, PrepareFramePair
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.superres_segmentation import SuperResSegmentation


def test_a_frame_becomes_a_pair_of_equal_views_and_both_truths():
    batch = {
        "low": torch.rand(2, 3, 4, 5),
        "image": torch.rand(2, 3, 8, 10),
        "label": torch.ones(2, 1, 8, 10),
    }
    pair, target = PrepareFramePair()(batch, "cpu", non_blocking=True)
    for view, truth in zip(pair.chunk(2, 1), target["image"].chunk(2, 1), strict=True):
        assert torch.equal(view, batch["low"])
        assert torch.equal(truth, batch["image"])
    assert torch.equal(target["label"], batch["label"])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_segmenter_keeps_its_statistics(frozen):
    torch.manual_seed(0)
    superres = SEGSRNet(2, features=8, growth=4, fusion_growth=4, blocks=1, reduction=4, rates=[1])
    segmenter = SPPLinkNet(encoder="resnet18", width=8).requires_grad_(not frozen)
    network = SuperResSegmentation(superres, segmenter, views="left").train()
    before = segmenter.encoder.bn1.running_mean.clone()
    found = JointInferer()(torch.rand(2, 6, 16, 16), network)
    assert torch.equal(segmenter.encoder.bn1.running_mean, before) == frozen
    assert segmenter.training is not frozen
    assert superres.training
    found.logits.sum().backward()
    assert any(one.grad is not None and one.grad.abs().max() > 0 for one in superres.parameters())
    assert all(one.grad is None for one in segmenter.parameters()) == frozen
