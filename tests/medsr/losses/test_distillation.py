from __future__ import annotations

import math

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.distillation import PairwiseAffinityLoss, SpatialCosineLoss
from torch import Tensor
from torch.nn import functional as F


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def identity(channels: int) -> SpatialCosineLoss:
    """With an adapter that hands the student's channels on."""
    loss = SpatialCosineLoss(channels, channels)
    with torch.no_grad():
        loss.adapter.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1, 1))
        loss.adapter.bias.zero_()
    return loss


# Pair-wise affinity


@pytest.mark.parametrize("nodes", [(1, 1), (2, 2), (8, 8), (3, 5)])
def test_equal_features_have_no_pairwise_loss(nodes):
    x = features(2, 4, 16, 16, 3)
    assert PairwiseAffinityLoss(nodes)(x, x.clone()).item() == 0


def test_affinities_know_neither_order_nor_number_nor_strength_of_channels():
    x = features(2, 4, 16, 16, 3)
    loss = PairwiseAffinityLoss()
    assert loss(x, x[:, [2, 0, 3, 1]]).item() == pytest.approx(0, abs=1e-12)
    assert loss(x, torch.cat([x, x], 1)).item() == pytest.approx(0, abs=1e-12)
    assert loss(x, 7 * x).item() == pytest.approx(0, abs=1e-12)
    assert loss(x, features(2, 4, 16, 16, 3, seed=1)).item() > 1e-2


def quarters(values: list[list[float]]) -> Tensor:
    """A 4 x 4 slice whose quarters hold these channel vectors at one pixel and less elsewhere."""
    small = torch.tensor(values).T.reshape(1, len(values[0]), 2, 2)
    weights = torch.tensor([[1.0, 0.5], [0.25, 0.5]])
    return torch.kron(small.contiguous(), weights).unsqueeze(-1)


def test_two_by_two_nodes_by_hand():
    student = quarters([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0], [0.0, 1.0]])
    teacher = quarters([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
    # Six pairs of different nodes; the student's cosines are 0 or 1, the teacher's 0, 1 or sqrt(1/2).
    h = math.sqrt(0.5)
    pairs = [(0, h), (1, h), (0, 1), (0, 0), (1, h), (0, h)]
    expected = 2 * sum((a - b) ** 2 for a, b in pairs) / 16
    assert PairwiseAffinityLoss((2, 2))(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_over_pairs_slices_and_batch_is_taken_once():
    student, teacher = features(1, 4, 16, 16, 1), features(1, 4, 16, 16, 1, seed=1)
    loss = PairwiseAffinityLoss((4, 4))
    once = loss(student, teacher).item()
    assert loss(student.expand(3, -1, -1, -1, 5), teacher.expand(3, -1, -1, -1, 5)).item() == pytest.approx(
        once
    )
    # A slice that agrees halves the mean of two.
    both = torch.cat([student, student], -1), torch.cat([teacher, student], -1)
    assert loss(*both).item() == pytest.approx(once / 2)
    # Pixels that are repeated in-plane are one node.
    doubled = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (student, teacher))
    assert loss(*doubled).item() == pytest.approx(once)


def test_slices_are_compared_one_by_one():
    x = features(1, 4, 8, 8, 4)
    loss = PairwiseAffinityLoss((4, 4))
    assert loss(x, x.flip(-1)).item() > 1e-2
    assert loss(x.flip(-1), x.flip(-1)).item() == 0


def test_a_finer_grid_sees_what_a_coarse_one_cannot():
    # Exchanging pixels inside a quarter leaves its maximum where it is.
    x = features(1, 4, 8, 8, 2).relu()
    moved = x.unflatten(2, (2, 4)).flip(3).flatten(2, 3)
    assert PairwiseAffinityLoss((2, 2))(x, moved).item() == 0
    assert PairwiseAffinityLoss((8, 8))(x, moved).item() > 1e-2


def test_a_map_smaller_than_the_grid_has_a_node_per_pixel():
    student, teacher = features(1, 4, 6, 3, 2), features(1, 4, 6, 3, 2, seed=1)
    found = PairwiseAffinityLoss((8, 8))(student, teacher)
    assert found.item() == PairwiseAffinityLoss((6, 3))(student, teacher).item()


def test_the_gradient_takes_the_length_of_a_node_for_given():
    # One pair of nodes with cosine 0.6 that should have 1, and two silent nodes.
    student = quarters([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).requires_grad_()
    teacher = quarters([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    PairwiseAffinityLoss((2, 2))(student, teacher).backward()
    # The pair stands twice among sixteen; the gradient points along the other node, not across the own direction.
    along = 2 * 2 * (0.6 - 1) / 16 / 5
    assert student.grad[0, :, 0, 0, 0].tolist() == pytest.approx([along, 0], abs=1e-7)


@pytest.mark.parametrize("silent", ["student", "teacher"])
def test_a_node_without_activation_gives_no_gradient_and_hurts_no_other(silent):
    student, teacher = features(1, 4, 8, 8, 1), features(1, 4, 8, 8, 1, seed=1)
    (student if silent == "student" else teacher)[:, :, :4, :4] = 0
    student.requires_grad_()
    PairwiseAffinityLoss((2, 2))(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert 0 < student.grad.abs().max() < 1
    assert (student.grad[:, :, :4, :4] == 0).all() or silent == "teacher"


@pytest.mark.parametrize("nodes", [(0, 4), (4,), (2, 2, 2)])
def test_a_grid_without_nodes_is_refused(nodes):
    with pytest.raises(SettingError, match="nodes must be"):
        PairwiseAffinityLoss(nodes)


# Spatial cosine


def test_equal_features_have_no_cosine_loss():
    x = features(2, 4, 6, 5, 3)
    assert identity(4)(x, x.clone()).item() == pytest.approx(0, abs=1e-6)
    assert identity(4)(x, -x).item() == pytest.approx(2, abs=1e-6)


def test_the_cosine_by_hand():
    # Two channels, two voxels. Unit length over the channels first, then one cosine per channel.
    student = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 2, 1, 1)
    teacher = torch.tensor([[1.0, 5.0], [0.0, 0.0]]).view(1, 2, 2, 1, 1)
    first = (0.6 * 1 + 0 * 1) / (0.6 * math.sqrt(2))
    # The teacher's second channel is silent: no cosine.
    assert identity(2)(student, teacher).item() == pytest.approx(((1 - first) + 1) / 2, rel=1e-6)


def test_strength_does_not_count_but_place_does():
    x = features(1, 4, 6, 6, 2)
    assert identity(4)(100 * x, x).item() == pytest.approx(0, abs=1e-6)
    voxelwise = torch.rand(1, 1, 6, 6, 2) + 0.1
    assert identity(4)(voxelwise * x, x).item() == pytest.approx(0, abs=1e-6)
    assert identity(4)(x.roll(1, 2), x).item() > 0.5


def test_the_adapter_learns_to_translate_channels():
    torch.manual_seed(0)
    student = features(1, 6, 8, 8, 3)
    mixed = F.conv3d(student, features(4, 6, 1, 1, 1, seed=1))
    loss = SpatialCosineLoss(6, 4)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    first = loss(student, mixed).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss(student, mixed).backward()
        optimiser.step()
    assert first > 0.5
    assert loss(student, mixed).item() < 0.01


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(SettingError, match="expects 4 student and 8 teacher channels, got 4 and 6"):
        SpatialCosineLoss(4, 8)(features(1, 4, 4, 4, 2), features(1, 6, 4, 4, 2))


# Both


LOSSES = {"pairwise": lambda: PairwiseAffinityLoss((4, 4)), "cosine": lambda: SpatialCosineLoss(3, 5)}


@pytest.fixture(params=LOSSES)
def loss(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return LOSSES[request.param]()


def test_the_student_learns_and_the_teacher_does_not(loss):
    student = features(2, 3, 8, 8, 2).requires_grad_()
    teacher = features(2, 5, 8, 8, 2, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters() if p.ndim > 1)


def test_a_teacher_of_another_grid_covers_the_same_field_of_view(loss):
    # Linear along every axis: interpolation on the same field of view changes nothing inside.
    def ramp(height: int, width: int, depth: int) -> Tensor:
        axes = ((torch.arange(n) + 0.5) / n for n in (height, width, depth))
        x, y, z = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([x, y, z, x + y, y - z])[None]

    student = features(1, 3, 16, 12, 4)
    same = loss(student, ramp(16, 12, 4)).item()
    finer, coarser = loss(student, ramp(32, 24, 8)).item(), loss(student, ramp(8, 6, 4)).item()
    assert finer == pytest.approx(same, rel=1e-2)
    assert coarser == pytest.approx(same, rel=6e-2)


def test_half_precision_is_compared_in_float32(loss):
    student, teacher = features(1, 3, 8, 8, 2), features(1, 5, 8, 8, 2, seed=1)
    exact = loss(student.bfloat16().float(), teacher.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == exact.item()


@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 3, 8, 8), (1, 5, 8, 8, 2)), ((2, 3, 8, 8, 2), (1, 5, 8, 8, 2))]
)
def test_features_of_another_batch_are_refused(loss, student, teacher):
    with pytest.raises(SettingError, match=r"feature maps \(B, C, H, W, D\) of one batch"):
        loss(features(*student), features(*teacher))
