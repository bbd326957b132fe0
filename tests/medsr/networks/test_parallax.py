from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.networks import parallax
from medsr.networks.parallax import PARALLAX_PATHS, BiPAM, parallax_attention
from torch import Tensor


def drawn(width: int, *, batch: int = 1, height: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What is compared on the left and on the right, and features of both views."""
    made = torch.Generator().manual_seed(width)
    shapes = [(batch, 8, height, width), (batch, 8, height, width), (2 * batch, 5, height, width)]
    return [torch.randn(shape, generator=made, dtype=dtype) for shape in shapes]


def by_loops(query: Tensor, key: Tensor, features: Tensor, band: tuple[int, int] | None) -> list[Tensor]:
    """The definition, pixel by pixel, of one row of one pair: features, masks and disparities of both views."""
    width = query.shape[1]
    scores = query.T @ key
    to_left, to_right = torch.zeros(2, width, width, dtype=query.dtype)
    low, high = band or (-width, width)
    allowed = torch.tensor([[low <= u - v <= high for v in range(width)] for u in range(width)])
    for u in range(width):
        if allowed[u].any():
            to_left[u, allowed[u]] = scores[u, allowed[u]].softmax(0)
        if allowed[:, u].any():
            to_right[u, allowed[:, u]] = scores[allowed[:, u], u].softmax(0)
    both = []
    for mine, other, own, theirs, sign in (
        (to_left, to_right, features[0], features[1], 1),
        (to_right, to_left, features[1], features[0], -1),
    ):
        new, valid, disparity = torch.zeros_like(own), torch.zeros(width), torch.zeros(width)
        weight, back = mine.tolist(), other.tolist()
        for u in range(width):
            near = range(max(0, u - 2), min(width, u + 3))
            raw = sum(weight[k][v] * back[v][u] for k in near for v in range(width))
            valid[u] = math.tanh(5 * raw)
            new[:, u] = valid[u] * (theirs @ mine[u]) + (1 - valid[u]) * own[:, u]
            disparity[u] = sign * sum(weight[u][v] * (u - v) for v in range(width))
        both.append((new, valid, disparity))
    return [torch.stack(one) for one in zip(*both, strict=True)]


@pytest.mark.parametrize("band", [None, (-2, 3), (4, 6)])
@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_it_is_its_definition(path, band):
    query, key, features = drawn(9, batch=2, height=2, dtype=torch.float64)
    found = parallax_attention(query, key, features, path=path, band=band, disparity=True)
    for pair in range(2):
        views = [pair, pair + 2]
        for row in range(2):
            expected = by_loops(query[pair, :, row], key[pair, :, row], features[views, :, row], band)
            for one, what in zip((found.features, found.valid, found.disparity), expected, strict=True):
                torch.testing.assert_close(
                    one[views, :, row].squeeze(1), what.to(one.dtype), atol=1e-6, rtol=0
                )


@pytest.mark.parametrize("band", [None, (2, 9), (-3, 4), (300, 400)])
@pytest.mark.parametrize("width", [1, 3, 64, 65, 131])
def test_the_paths_have_one_result(width, band):
    given = drawn(width)
    expected = parallax_attention(*given, path="reference", band=band, disparity=True)
    for path, settings in (("fused", {}), ("chunked", {"chunk_bytes": 2 * 24 * width**2}), ("chunked", {})):
        found = parallax_attention(*given, path=path, band=band, disparity=True, **settings)
        assert float((found.features - expected.features).abs().max()) < 1e-5
        assert float((found.valid - expected.valid).abs().max()) < 1e-5
        assert float((found.disparity - expected.disparity).abs().max()) < 1e-3


def test_the_chunks_are_as_large_as_the_memory_allows(monkeypatch):
    seen: list[int] = []
    attended = parallax._attended
    monkeypatch.setattr(
        parallax, "_attended", lambda given, *a, **k: seen.append(len(given[0])) or attended(given, *a, **k)
    )
    given = drawn(10, height=7)
    parallax_attention(*given, chunk_bytes=3 * 6 * 4 * 10**2)
    parallax_attention(*given, chunk_bytes=1)
    parallax_attention(*given)
    assert seen == [3, 3, 1, *[1] * 7, 7]


def codes(width: int = 24, sharpness: float = 12.0) -> Tensor:
    """A code that no two columns share, ``(1, width, 1, width)``."""
    return sharpness * torch.eye(width).reshape(1, width, 1, width)


@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_a_view_that_equals_the_other_is_valid_everywhere(path):
    features = torch.randn(2, 4, 1, 24)
    found = parallax_attention(codes(), codes(), features, path=path, disparity=True)
    assert float(found.valid.min()) > 0.9998
    torch.testing.assert_close(found.features, features.flip(0), atol=1e-3, rtol=0)
    assert float(found.disparity.abs().max()) < 1e-3


@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_without_any_match_the_mask_depends_on_the_width(path):
    nothing = torch.zeros(1, 4, 1, 90)
    found = parallax_attention(nothing, nothing, torch.randn(2, 4, 1, 90), path=path)
    torch.testing.assert_close(found.valid[..., 2:-2], torch.full((2, 1, 1, 86), math.tanh(5 * 5 / 90)))


@pytest.mark.parametrize("shift", [4, -3])
@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_the_disparity_and_what_only_one_view_sees_are_found(path, shift):
    # Column u on the left is column u - shift on the right; what leaves the row comes in as noise on the other side.
    left, right = codes(), codes().roll(-shift, 3)
    edge = slice(-shift, None) if shift > 0 else slice(None, -shift)
    right[..., edge] = 0
    found = parallax_attention(left, right, torch.randn(2, 4, 1, 24), path=path, disparity=True)
    matched = slice(shift, None) if shift > 0 else slice(None, shift)
    hidden = slice(None, shift) if shift > 0 else slice(shift, None)
    torch.testing.assert_close(
        found.disparity[0, ..., matched], torch.full((1, 1, 24 - abs(shift)), float(shift)), atol=1e-2, rtol=0
    )
    assert float(found.valid[0, ..., matched].min()) > 0.99
    assert float(found.valid[0, ..., hidden].max()) < 0.3


def test_the_band_leaves_out_what_is_not_in_it():
    features = torch.randn(2, 4, 1, 24)
    found = parallax_attention(
        codes(), codes(), features, band=(3, 5), path="reference", maps=True, disparity=True
    )
    columns = torch.arange(24)
    outside = (columns[:, None] - columns < 3) | (columns[:, None] - columns > 5)
    assert not found.to_left[0, 0][outside].any()
    assert not found.to_right[0, 0].T[outside].any()
    # Those without a partner keep what they have.
    assert torch.equal(found.features[0, ..., :3], features[0, ..., :3])
    assert torch.equal(found.features[1, ..., -3:], features[1, ..., -3:])
    assert not found.valid[0, ..., :3].any()
    assert not found.disparity[1, ..., -3:].any()
    assert float(found.to_left[0, 0, 3:].sum(1).min()) == pytest.approx(1)


@pytest.mark.parametrize("band", [None, (1, 3)])
@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_gradients_are_those_of_the_features_and_not_of_the_masks(path, band):
    given = [one.double().requires_grad_() for one in drawn(7, height=1)]
    assert not parallax_attention(*given, path=path).valid.requires_grad

    def features(*tensors: Tensor) -> Tensor:
        return parallax_attention(*tensors, path=path, band=band).features.sum()

    gradients = torch.autograd.grad(features(*given), given)
    # The same with the masks held fast, by the definition.
    found = parallax_attention(*given, path="reference", maps=True, band=band)
    valid = found.valid
    left, right = given[2].chunk(2)
    brought = torch.cat(
        [
            torch.einsum("byuv,bcyv->bcyu", found.to_left, right),
            torch.einsum("byvu,bcyu->bcyv", found.to_right, left),
        ]
    )
    expected = torch.autograd.grad((valid * brought + (1 - valid) * given[2]).sum(), given)
    for one, what in zip(gradients, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, what, atol=1e-9, rtol=1e-7)


def test_large_scores_stay_finite():
    query, key, features = drawn(20)
    for path in PARALLAX_PATHS:
        found = parallax_attention(1e3 * query, 1e3 * key, features, path=path)
        assert found.features.isfinite().all()
        assert found.valid.isfinite().all()


@pytest.mark.parametrize("path", PARALLAX_PATHS)
def test_scores_stay_exact_where_the_features_are_bfloat16(path):
    # Scores of about 400 that differ by 1: bfloat16 could not tell them apart.
    query, key = torch.full((1, 4, 1, 2), 10.0), torch.full((1, 4, 1, 2), 10.0)
    key[..., 1] += 0.025
    features = torch.tensor([0.0, 1.0]).expand(2, 3, 1, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = parallax_attention(query, key, features, path=path, disparity=True)
    assert found.features.dtype == torch.bfloat16
    assert found.valid.dtype == found.disparity.dtype == torch.float32
    expected = parallax_attention(query, key, features.float(), path=path)
    assert float((found.features.float() - expected.features).abs().max()) < 0.01
    assert float(parallax_attention(query, key, features.float(), path=path).valid.min()) > 0.99
    assert float(found.disparity[0, 0, 0, 0]) == pytest.approx(-1 / (1 + math.exp(-1)), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "flash"}, "path must be one of chunked, fused, reference, got 'flash'"),
        ({"band": (3, 2)}, "band must be the smallest and the largest disparity"),
        ({"maps": True}, "the chunked path has no maps to return; use path='reference'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        parallax_attention(*drawn(4), **settings)


# --- the module ----------------------------------------------------------------------------------------------------


def exchange(**settings: Any) -> BiPAM:
    torch.manual_seed(0)
    module = BiPAM(**{"channels": 8, "levels": 2, **settings}).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


def extracted(height: int = 9, width: int = 12, batch: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2 * batch, c, height, width, generator=made) for c in (16, 8))


def test_the_size_is_that_of_the_publication():
    with torch.device("meta"):
        assert sum(p.numel() for p in BiPAM().parameters()) == 304_256
        assert sum(p.numel() for p in BiPAM(tied=True).parameters()) == 304_256 - 4_160


def test_levels_are_compared_in_groups_of_their_own():
    module, (levels, _) = exchange(), extracted()
    query, _ = module.project(levels)
    changed = levels.clone()
    changed[:, :8] += torch.randn_like(changed[:, :8])
    other, _ = module.project(changed)
    assert torch.equal(query[:, 4:], other[:, 4:])
    assert not torch.allclose(query[:, :4], other[:, :4], atol=1e-2)


@torch.no_grad()
def test_rows_are_whitened():
    for one in exchange().project(extracted()[0]):
        assert float(one.mean(3).abs().max()) < 1e-5
        assert float(one.mean(2).abs().max()) > 1e-2


@pytest.mark.parametrize("path", ["chunked", "fused"])
@torch.no_grad()
def test_strips_of_rows_change_nothing(path, monkeypatch):
    module, given = exchange(path=path), extracted(height=23)
    with torch.enable_grad():
        expected = module(*given, disparity=True)
    seen: list[int] = []
    monkeypatch.setattr(parallax, "_STRIP", 7)
    project = module.project
    monkeypatch.setattr(module, "project", lambda one: seen.append(one.shape[2]) or project(one))
    found = module(*given, disparity=True)
    assert seen == [9, 11, 11, 4]
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.valid, expected.valid, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.disparity, expected.disparity, atol=1e-3, rtol=0)


@torch.no_grad()
def test_in_training_batch_norm_sees_the_whole_image_of_both_views(monkeypatch):
    monkeypatch.setattr(parallax, "_STRIP", 2)
    module, (levels, features) = exchange().train(), extracted()
    before = module.norm.running_mean.clone()
    module(levels, features)
    expected = 0.9 * before + 0.1 * levels.mean(dim=(0, 2, 3))
    torch.testing.assert_close(module.norm.running_mean, expected)


@torch.no_grad()
def test_tied_projections_are_symmetric_and_others_are_not():
    levels, features = extracted(batch=2)

    def swapped(one: Tensor) -> Tensor:
        return torch.cat(one.chunk(2)[::-1])

    for tied in (True, False):
        module = exchange(tied=tied)
        here = module(levels, features, disparity=True)
        there = module(swapped(levels), swapped(features), disparity=True)
        same = torch.allclose(swapped(there.features), here.features, atol=1e-5)
        assert same is tied
        if tied:
            torch.testing.assert_close(swapped(there.disparity), -here.disparity, atol=1e-4, rtol=0)


@torch.no_grad()
def test_maps_take_the_reference_whatever_the_path():
    module, given = exchange(path="fused"), extracted(batch=2)
    found = module(*given, maps=True)
    assert found.to_left.shape == found.to_right.shape == (2, 9, 12, 12)
    torch.testing.assert_close(found.to_left.sum(3), torch.ones(2, 9, 12))
    torch.testing.assert_close(found.to_right.sum(3), torch.ones(2, 9, 12))
    plain = module(*given)
    assert plain.to_left is plain.to_right is plain.disparity is None
    torch.testing.assert_close(found.features, plain.features, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter():
    module, given = exchange().train(), extracted()
    module(*given).features.square().mean().backward()
    silent = [k for k, p in module.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    # What a projection adds to all pixels alike is whitened away, up to rounding.
    assert [name for name in silent if name not in ("project_left.bias", "project_right.bias")] == []


def test_unusable_settings_are_explained():
    with pytest.raises(SettingError, match="channels must be a multiple of levels, got 8 and 3"):
        BiPAM(8, 3)
    with pytest.raises(SettingError, match="path must be one of"):
        BiPAM(8, 2, path="fast")
    with pytest.raises(SettingError, match="band must be"):
        BiPAM(8, 2, band=(1, 0))
