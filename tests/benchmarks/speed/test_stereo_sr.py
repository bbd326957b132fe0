from __future__ import annotations

import pytest
import torch
from medsr.networks.layout import channels_last
from medsr.networks.parallax import PARALLAX_PATHS, parallax_attention
from medsr.networks.segsrnet import SEGSRNet
from torch import nn

from benchmarks.measure import giga_multiplications
from benchmarks.speed import stereo_sr

PAIR = (1, 6, 8, 12)


def small() -> SEGSRNet:
    return channels_last(SEGSRNet(2, features=8, growth=4, fusion_growth=4, blocks=2, reduction=4).eval())


def multiplications(call: stereo_sr.Convolution) -> float:
    weight, _, stride, *_ = call.arguments
    assert list(stride) == [1, 1]
    batch, _, height, width = call.shape
    return batch * height * width * weight.numel()


def test_the_convolutions_of_a_network_are_all_found() -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    calls = stereo_sr.convolutions_of(network, torch.rand(PAIR))
    assert [call.shape for call in calls] == [PAIR, (1, 8, 8, 12)]
    assert sum(map(multiplications, calls)) / 1e9 == pytest.approx(giga_multiplications(network, *PAIR))
    assert not calls[0].channels_last
    assert stereo_sr.convolutions_of(channels_last(network), torch.rand(PAIR))[1].channels_last
    # Both views run through all of them, the last one included.
    found = stereo_sr.convolutions_of(small(), torch.rand(PAIR))
    assert found[-1].shape == (2, 8, 16, 24)
    names = [name for name, module in small().named_modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == len(names)


def test_they_run_on_the_shapes_that_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    calls = stereo_sr.convolutions_of(network, torch.rand(PAIR))
    seen: list[tuple[tuple[int, ...], bool]] = []
    convolution = torch.convolution

    def watched(image: torch.Tensor, *arguments: object) -> torch.Tensor:
        seen.append((tuple(image.shape), image.is_contiguous(memory_format=torch.channels_last)))
        return convolution(image, *arguments)

    monkeypatch.setattr(torch, "convolution", watched)
    with torch.inference_mode():
        stereo_sr.run_convolutions(calls, torch.rand(max(torch.Size(call.shape).numel() for call in calls)))
    assert [shape for shape, _ in seen] == [call.shape for call in calls]
    assert all(layout for (_, layout), call in zip(seen, calls, strict=True) if call.channels_last)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("path", PARALLAX_PATHS)
@pytest.mark.parametrize("width", [3, 40])
def test_the_published_formulation_has_our_result(path: str, width: int, sharpness: float) -> None:
    seeded = torch.Generator().manual_seed(0)
    query, key = sharpness * torch.randn(2, 2, 8, 3, width, generator=seeded)
    # Some columns have a match, and some have none.
    key[..., : width // 2] = query[..., width - width // 2 :]
    features = torch.rand(4, 5, 3, width, generator=seeded)
    ours = parallax_attention(query, key, features, path=path)
    published = stereo_sr.published_attention(query, key, features)
    assert float((ours.features - published.features).abs().max()) < 1e-5
    assert float((ours.valid - published.valid).abs().max()) < 1e-5


def test_attention_alone_is_compared_with_the_published_formulation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = stereo_sr.attention_times((6, 20), 2, features=8)
    assert set(times) == {"chunked", "reference", "published"}
    shown = capsys.readouterr().out
    assert "published formulation / chunked (goal 5)" in shown
    assert "nan" not in shown


def test_each_is_given_the_same_rows_for_the_memory_of_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measured(call: str, *arguments: object) -> float:
        calls.append((call, *arguments))
        return 2.0

    monkeypatch.setattr(stereo_sr, "peak_of", measured)
    found = stereo_sr.attention_memory((64, 20))
    paths = ["chunked", "reference", "published"]
    assert calls == [("benchmarks.speed.stereo_sr:attention", path, 64, 20) for path in paths]
    assert found == pytest.approx(dict.fromkeys(paths, 2 * 2**20 / 1e6))
    assert "published takes 2 MB" in capsys.readouterr().out


def test_all_paths_of_the_exchange_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    times = stereo_sr.exchange_times((6, 20), 2, features=8)
    assert set(times) == {"chunked", "fused", "reference", "published"}
    shown = capsys.readouterr().out
    assert "time of the reference / fused" in shown
    assert "time of the published / chunked" in shown
    assert "nan" not in shown


def test_the_network_is_compared_with_its_convolutions(capsys: pytest.CaptureFixture[str]) -> None:
    times = stereo_sr.network_times(small(), torch.rand(PAIR), 2)
    assert set(times) == {"network", "convolutions"}
    assert "goal 1.5" in capsys.readouterr().out


def test_the_memory_of_the_reference_is_scaled_to_all_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {"reference": 10.0, "chunked": 4.0, "fused": 2.0}
    rows = {}

    def measured(call: str, path: str, height: int, width: int) -> float:
        rows[path] = (height, width)
        return peaks[path]

    monkeypatch.setattr(stereo_sr, "peak_of", measured)
    found = stereo_sr.exchange_memory((64, 20), reference_rows=16)
    assert rows == {"reference": (16, 20), "chunked": (64, 20), "fused": (64, 20)}
    mebibyte = 2**20 / 1e6
    assert found == pytest.approx(
        {"reference": 40 * mebibyte, "chunked": 4 * mebibyte, "fused": 2 * mebibyte}
    )
    shown = capsys.readouterr().out
    assert "10.0 times less than the reference" in shown
    assert "scaled from 16 rows" in shown


@pytest.mark.parametrize("name", stereo_sr.NETWORKS)
def test_a_whole_network_is_measured_as_the_bundle_runs_it(name: str) -> None:
    assert stereo_sr.whole(name, 8, 12, 2)().shape == (1, 6, 16, 24)


@pytest.mark.parametrize("path", ["reference", "chunked", "published"])
def test_what_is_measured_elsewhere_runs(path: str) -> None:
    for run in (stereo_sr.exchange, stereo_sr.attention):
        assert run(path, 4, 12, 8)().shape == (2, 8, 4, 12)


def test_where_the_system_does_not_tell_there_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stereo_sr, "peak_of", lambda *call: None)
    assert stereo_sr.exchange_memory((8, 8), reference_rows=4) == {}
    assert stereo_sr.attention_memory((8, 8)) == {}
    assert stereo_sr.network_memory("SEGSRNet", (8, 8), 2) is None
    assert not capsys.readouterr().out
