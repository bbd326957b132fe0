from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medsr.errors import DataError, MedsrError, SettingError
from medsr.inferers import precision
from medsr.inferers import tiles as tiles_module
from medsr.inferers.tiles import TileInferer
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn
from torch.nn import functional as F


class Facts(nn.Module):
    """What a network states, and a note of what it was given."""

    scale: int = 2
    size_multiple: int | Sequence[int] = 1
    exact_halo: int | None = None
    half_precision_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[tuple[int, ...]] = []


class Enlarged(Facts):
    """Repeats every pixel: a pixel that is lost, doubled or misplaced shows as a wrong value."""

    def __init__(self, scale: int = 2, multiple: int | Sequence[int] = 1, halo: int = 0) -> None:
        super().__init__()
        self.scale, self.size_multiple, self.exact_halo = scale, multiple, halo

    def forward(self, image: Tensor) -> Tensor:
        multiples = [self.size_multiple] * 2 if isinstance(self.size_multiple, int) else self.size_multiple
        assert not any(size % one for size, one in zip(image.shape[-2:], multiples, strict=True))
        self.windows.append(tuple(image.shape))
        return image.repeat_interleave(self.scale, -2).repeat_interleave(self.scale, -1)


class Local(Facts):
    """Three convolutions without global pooling: each pixel depends on three around it."""

    exact_halo = 3

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4 * channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        self.windows.append(tuple(image.shape))
        features = torch.relu(self.second(torch.relu(self.first(image))))
        return F.pixel_shuffle(self.last(features), 2)


class Gated(Facts):
    """A chain of gated convolutions, and one more gate on the fine grid; the gates are strong.

    Each gate is ``2 sigmoid(strength (mean - 0.3))``: a change of the mean by 0.1 changes what follows by a third.
    """

    gated_halo = 5

    def __init__(self, strength: float = 6.0) -> None:
        super().__init__()
        self.strength = strength
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        for layer in (self.head, self.body, self.up, self.last):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, image: Tensor, statistics: Sequence[Tensor] | None = None) -> Tensor:
        self.windows.append(tuple(image.shape))
        return self.last(self._features(image, statistics, (0, 0, 0, 0), []))

    def squeeze(
        self,
        image: Tensor,
        statistics: Sequence[Tensor] | None = None,
        *,
        border: int | Sequence[int] = 0,
    ) -> list[Tensor]:
        found: list[Tensor] = []
        self._features(image, statistics, [border] * 4 if isinstance(border, int) else border, found)
        return found

    def _features(
        self, image: Tensor, statistics: Sequence[Tensor] | None, border: Sequence[int], found: list[Tensor]
    ) -> Tensor:
        def gated(x: Tensor, factor: int) -> Tensor:
            top, bottom, left, right = (factor * one for one in border)
            found.append(x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right].mean((-2, -1)))
            mean = found[-1] if statistics is None else statistics[len(found) - 1]
            return x * 2 * torch.sigmoid(self.strength * (mean - 0.3))[..., None, None]

        x = gated(torch.relu(self.head(image)), 1)
        x = gated(x + torch.relu(self.body(x)), 1)
        return gated(F.pixel_shuffle(torch.relu(self.up(x)), 2), 2)


def photograph(height: int = 70, width: int = 93, *, channels: int = 3) -> Tensor:
    """A bright disk with texture on black, so that the means of tiles differ widely."""
    texture = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return (0.5 + 0.5 * texture) * ((rows - 0.3) ** 2 + (columns - 0.2) ** 2 < 0.7)


def tiles(tile: int = 16, **settings: Any) -> TileInferer:
    """Too little memory for anything but tiles."""
    return TileInferer(tile, **{"amp": "float32", "max_whole": 1, **settings})


def whole(image: Tensor, network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(image)


@pytest.fixture
def local() -> Local:
    torch.manual_seed(0)
    return Local()


@pytest.fixture
def gated() -> Gated:
    torch.manual_seed(0)
    return Gated()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    tile=st.integers(8, 40),
    scale=st.sampled_from([1, 2, 4]),
    multiple=st.sampled_from([1, 2, 3, (4, 1), [1, 8]]),
    halo=st.integers(0, 9),
    batch=st.integers(1, 3),
    max_whole=st.sampled_from([1, 2000, 10**9]),
)
def test_every_pixel_is_written_at_its_place(size, tile, scale, multiple, halo, batch, max_whole):
    image = torch.arange(float(size[0] * size[1])).reshape(1, 1, *size)
    run = TileInferer(tile, max_whole=max_whole, batch=batch, amp="float32")
    network = Enlarged(scale, multiple, halo)
    found = run(image, network)
    assert torch.equal(found, image.repeat_interleave(scale, -2).repeat_interleave(scale, -1))
    assert found.dtype == torch.float32
    assert sum(shape[0] for shape in network.windows) == run.facts["tiles"]
    assert len({shape[1:] for shape in network.windows}) == 1


def test_tiles_with_equal_margins_share_batches():
    network = Enlarged(halo=3)
    run = tiles(16, batch=4)
    run(torch.rand(1, 1, 230, 230), network)
    assert max(shape[0] for shape in network.windows) == 4
    assert len(network.windows) < 0.4 * run.facts["tiles"]


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)), tile=st.integers(8, 30), batch=st.integers(1, 3)
)
@settings(max_examples=20, deadline=None)
def test_a_stream_hands_out_every_pixel_once(size, tile, batch):
    count = torch.zeros(2 * size[0], 2 * size[1])

    def sink(row: int, column: int, part: Tensor) -> None:
        assert part.dtype == torch.float32
        count[row : row + part.shape[-2], column : column + part.shape[-1]] += 1
        # What lies outside would be cut off by the slice.
        assert row + part.shape[-2] <= len(count)
        assert column + part.shape[-1] <= count.shape[1]

    tiles(tile, batch=batch).stream(torch.rand(1, 3, *size), Enlarged(2, 4, 2), sink)
    assert torch.equal(count, torch.ones_like(count))


def test_a_stream_fills_integers_without_the_result_in_float32(local):
    image, network = photograph(), local
    array = torch.zeros(140, 186, 3, dtype=torch.uint8)

    def sink(row: int, column: int, part: Tensor) -> None:
        place = array[row : row + part.shape[-2], column : column + part.shape[-1]]
        place[:] = (part[0].clamp(0, 1) * 255).round().permute(1, 2, 0)

    tiles().stream(image, network, sink)
    expected = (whole(image, network)[0].clamp(0, 1) * 255).round().permute(1, 2, 0)
    assert int((array.int() - expected.int()).abs().max()) <= 1
    assert float((array == expected).float().mean()) > 0.999


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("tile", "size"), [(8, (33, 70)), (16, (70, 93)), (20, (41, 16)), (16, (1, 90))])
def test_with_an_exact_halo_tiles_equal_the_whole_image(tile, size, batch, local):
    image = photograph(*size)
    run = tiles(tile, batch=batch)
    found = run(image, local)
    assert torch.allclose(found, whole(image, local), atol=1e-5, rtol=0)
    assert run.facts["mode"] == "tiles"
    assert run.facts["passes"] == 1
    assert run.facts["tiles"] > 1


def test_one_pixel_less_than_the_halo_shows_seams(local):
    image = photograph()
    local.exact_halo = 2
    assert float((tiles()(image, local) - whole(image, local)).abs().max()) > 1e-4


def test_blended_windows_are_not_exact(local):
    image = photograph()
    expected = whole(image, local)
    with torch.no_grad():
        blended = SlidingWindowInferer((32, 32), 2, overlap=0.5, mode="gaussian")(image, local)
    assert float((blended - expected).abs().max()) > 1e-2
    assert float((tiles(32 - 2 * 3)(image, local) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(70, 93), (64, 92)])
def test_networks_that_want_a_multiple_get_one_whole_and_in_tiles(size):
    class Unshuffled(Local):
        """Works on squares of four pixels: where a window starts matters."""

        size_multiple = 4
        exact_halo = 12

        def __init__(self) -> None:
            super().__init__(48)

        def forward(self, image: Tensor) -> Tensor:
            return F.pixel_shuffle(super().forward(F.pixel_unshuffle(image, 4)), 4)

    torch.manual_seed(0)
    network, image = Unshuffled(), photograph(*size)
    found = TileInferer(amp="float32")(image, network)
    assert found.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert torch.allclose(tiles(18)(image, network), found, atol=1e-5, rtol=0)
    assert network.windows[-1] != network.windows[0]


def test_what_is_missing_to_a_multiple_is_mirrored():
    seen: list[Tensor] = []

    class Looks(Enlarged):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return super().forward(image)

    TileInferer(amp="float32")(torch.arange(3.0).reshape(1, 1, 1, 3), Looks(2, (2, 8)))
    # Farther than the image is long: to and fro.
    assert seen[0][0, 0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 2


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("tile", "size"), [(12, (33, 70)), (16, (70, 93)), (30, (70, 93))])
def test_gated_tiles_equal_the_whole_image(tile, size, batch, gated):
    image = photograph(*size)
    run = tiles(tile, batch=batch, max_passes=8)
    found, expected = run(image, gated), whole(image, gated)
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.std())
    assert run.facts["mode"] == "gated tiles"
    assert run.facts["warnings"] == []
    # Three gates in a chain: the third is known after the third pass, and the fourth changes nothing.
    assert run.facts["passes"] <= 5
    assert run.facts["statistics_error"] <= 1e-4


def test_a_gate_that_looks_at_its_tile_only_shows_seams(gated):
    image = photograph()
    expected = whole(image, gated)
    gated.exact_halo = gated.gated_halo
    # The comparison above can tell: the tiles' own means are far off.
    assert float((tiles()(image, gated) - expected).abs().max()) > 0.1 * float(expected.std())


def test_each_pass_comes_nearer(gated):
    image, errors, stated = photograph(), [], []
    expected = whole(image, gated)
    for passes in (2, 3):
        run = tiles(max_passes=passes, tolerance=1e-9)
        errors.append(float((run(image, gated) - expected).abs().max()) / float(expected.std()))
        stated.append(run.facts["statistics_error"])
        assert f"after {passes} passes" in run.facts["warnings"][0]
        assert run.facts["passes"] == passes + 1
    assert errors[1] < 0.1 * errors[0]
    # What the facts state is no promise of less than there is, but near it.
    for error, statement in zip(errors, stated, strict=True):
        assert error < 3 * statement


def test_weak_gates_need_no_more_than_two_passes():
    torch.manual_seed(0)
    run, network, image = tiles(), Gated(strength=0.0), photograph()
    assert torch.allclose(run(image, network), whole(image, network), atol=1e-4)
    assert run.facts["passes"] == 3
    assert run.facts["statistics_error"] < 1e-5


def test_a_small_image_runs_whole(gated):
    image, run = photograph(), TileInferer(amp="float32", max_whole=140 * 186)
    assert torch.equal(run(image, gated), whole(image, gated))
    assert run.facts == {"mode": "whole", "tiles": 1, "passes": 1, "precision": "float32", "warnings": []}
    assert gated.windows[0] == (1, 3, 70, 93)
    TileInferer(amp="float32", max_whole=140 * 186 - 1)(image, gated)
    assert max(shape[-1] for shape in gated.windows[2:]) < 93


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("scale", "halo"), [(2, 3), (4, 9)])
def test_no_more_is_computed_at_once_than_there_is_memory(scale, halo, batch):
    limit = 200_000
    network = Enlarged(scale, halo=halo)
    run = TileInferer(max_whole=limit, batch=batch, amp="float32")
    run(torch.rand(1, 1, 250, 400), network)
    largest = max(shape[0] * shape[2] * shape[3] for shape in network.windows) * scale**2
    assert 0.3 * limit < largest <= limit
    # Where even that is not enough, tiles do not get smaller than their use.
    network.windows.clear()
    TileInferer(max_whole=100, amp="float32")(torch.rand(1, 1, 64, 96), network)
    assert {shape[2] for shape in network.windows} == {min(64, 32 + 2 * halo)}


def test_a_network_that_cannot_run_in_tiles_is_named_with_the_size():
    network = Local()
    network.exact_halo = None
    with pytest.raises(SettingError, match=r"^Local cannot .* 70 x 93 pixels has 26040: .*max_whole=26040"):
        tiles()(photograph(), network)
    assert TileInferer(amp="float32")(photograph(), network).shape == (1, 3, 140, 186)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["local", "gated"])
def test_results_that_are_not_finite_are_refused(name, value, request):
    network = request.getfixturevalue(name)
    image = photograph()
    image[0, 1, 30, 40] = value
    parts: list[Tensor] = []
    with pytest.raises(MedsrError, match="not finite") as error:
        tiles().stream(image, network, lambda row, column, part: parts.append(part))
    assert "\n" not in str(error.value)
    assert all(torch.isfinite(part).all() for part in parts)


def test_only_one_image_with_pixels_is_taken(local):
    with pytest.raises(SettingError, match=r"batch of one is needed, got \(2, 3, 70, 93\)"):
        tiles()(photograph().expand(2, -1, -1, -1), local)
    with pytest.raises(SettingError, match=r"got \(3, 70, 93\)"):
        tiles()(photograph()[0], local)
    with pytest.raises(DataError, match=r"no pixels: its shape is \(3, 0, 93\)"):
        tiles()(photograph()[:, :, :0], local)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"tile": 7}, "tile"),
        ({"tile": 9.5}, "tile"),
        ({"tile": "abc"}, "tile"),
        ({"max_whole": "4e6"}, "max_whole"),
        ({"max_whole": 0}, "max_whole"),
        ({"batch": 0}, "batch"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"max_passes": 1}, "max_passes"),
        ({"amp": "half"}, "amp"),
    ],
)
def test_settings_out_of_range_are_named(setting, name):
    with pytest.raises(SettingError, match=name) as error:
        TileInferer(**setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image_type", [MetaTensor, Tensor.half, Tensor.double])
def test_the_result_is_a_plain_float32_tensor_that_can_be_changed(image_type, local):
    local.train()
    found = tiles()(image_type(photograph()), local)
    assert type(found) is Tensor
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    found += 1
    assert not local.training


@pytest.mark.parametrize("name", ["local", "gated"])
def test_bfloat16_is_used_where_it_is_safe_and_native(name, request, monkeypatch):
    network, image = request.getfixturevalue(name), photograph()
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: True)
    # These networks round the image itself.
    monkeypatch.setattr(tiles_module, "_TOLERANCE", 0.01)
    run = TileInferer(16, max_whole=1)
    found, exact = run(image, network), tiles()(image, network)
    assert run.facts["precision"] == "bfloat16"
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).abs().mean()) < 0.01 * float(exact.std())
    network.half_precision_safe = False
    assert torch.equal(run(image, network), exact)
    assert run.facts["precision"] == "float32"
    assert run.facts["warnings"] == []


def test_bfloat16_is_not_used_where_a_part_of_the_image_differs(local, monkeypatch):
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: True)
    monkeypatch.setattr(tiles_module, "_TOLERANCE", 1e-6)
    run = tiles(amp="auto")
    assert torch.equal(run(photograph(), local), tiles()(photograph(), local))
    assert run.facts["precision"] == "float32"


def test_unsafe_bfloat16_on_request_is_refused_with_a_warning(local, monkeypatch):
    monkeypatch.setattr(tiles_module, "_TOLERANCE", 0.01)
    local.half_precision_safe = False
    run = tiles(amp="bfloat16")
    run(photograph(), local)
    assert run.facts["precision"] == "float32"
    assert run.facts["warnings"] == ["Local is not safe in bfloat16: float32 was used"]
    run(photograph(), Local())
    assert run.facts["precision"] == "bfloat16"
    assert run.facts["warnings"] == []


@pytest.mark.parametrize("progress", [False, True])
def test_a_progress_bar_is_shown_on_request_only(progress, gated, capsys):
    tiles(progress=progress)(photograph(), gated)
    shown = capsys.readouterr().err
    assert ("super-resolution" in shown) == ("gate statistics, pass 2" in shown) == progress
