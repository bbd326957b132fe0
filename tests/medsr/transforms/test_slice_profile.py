from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medsr.errors import DataError, SettingError
from medsr.resampling import keys_matrix
from medsr.transforms.slice_profile import (
    PROFILES,
    acquisition_matrix,
    as_profile,
    fwhm_in_voxels,
    read_taps,
)

CONTINUOUS = ("slr", "gaussian", "box")

# Symmetric taps from the centre to the edge, for slices without gap: made with a Bloch simulation of the pulse of
# sigpy's slr.dzrf and resampled by radifox-utils 1.0.3, the code that REHRSeg calls.
PUBLISHED_TAPS = {
    2: [0.9535, 0.0201, 0.0031],
    2.5: [0.3327, 0.3327, 0.0009],
    3: [0.3321, 0.3318, 0.0011, 0.0010],
    3.5: [0.3317, 0.3317, 0.0017, 0.0008],
    4: [0.2733, 0.2733, 0.0878, 0.0010, 0.0012],
    5: [0.1989, 0.1990, 0.1987, 0.0014, 0.0010, 0.0005],
    6: [0.1688, 0.1688, 0.1687, 0.0755, 0.0019, 0.0005, 0.0002],
    8: [0.1248, 0.1248, 0.1248, 0.1248, 0.0614, 0.0012, 0.0003, 0.0001, 0.0001],
}


def centroids(matrix: np.ndarray) -> np.ndarray:
    return matrix @ np.arange(matrix.shape[1])


def fwhm_of(row: np.ndarray) -> float:
    """Width at half the maximum, between voxels by linear interpolation."""
    half = row.max() / 2
    inside = np.flatnonzero(row >= half)
    first, last = inside[0], inside[-1]
    left = first - (row[first] - half) / (row[first] - row[first - 1])
    right = last + (row[last] - half) / (row[last] - row[last + 1])
    return float(right - left)


@given(
    st.integers(1, 60),
    st.floats(1.2, 8),
    st.floats(0.3, 1.5),
    st.floats(-0.5, 0.5),
    st.sampled_from([*PROFILES, (1.0, 3.0, 1.0)]),
)
def test_rows_sum_to_one(size, ratio, thickness, phase, profile):
    count = max(1, int(size / ratio))
    fwhm = fwhm_in_voxels(ratio * thickness, 1.0)
    matrix = acquisition_matrix(size, count, ratio=ratio, fwhm=fwhm, profile=profile, phase=phase)
    assert matrix.shape == (count, size)
    assert np.isfinite(matrix).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-9)
    if profile in CONTINUOUS:
        assert matrix.min() >= 0


@pytest.mark.parametrize("profile", CONTINUOUS)
@pytest.mark.parametrize("fwhm", [40.0, 87.3])
def test_fwhm_on_a_fine_grid(profile, fwhm):
    row = acquisition_matrix(401, 1, ratio=100, fwhm=fwhm, profile=profile)[0]
    assert fwhm_of(row) == pytest.approx(fwhm, abs=1.0)
    np.testing.assert_allclose(row, row[::-1], atol=1e-9)


def test_profiles_differ_in_shape_at_one_width():
    rows = {p: acquisition_matrix(401, 1, ratio=100, fwhm=100, profile=p)[0] for p in CONTINUOUS}
    flat = {p: float(np.ptp(row[170:231]) / row.max()) for p, row in rows.items()}
    tails = {p: float(row[:140].sum() + row[261:].sum()) for p, row in rows.items()}
    # The excitation pulse is nearly rectangular with a little outside; the Gaussian is neither.
    assert flat["box"] < 1e-9 < flat["slr"] < 0.1 < flat["gaussian"]
    assert tails["box"] == 0 < tails["slr"] < 0.03 < tails["gaussian"]
    np.testing.assert_allclose(
        rows["gaussian"] / rows["gaussian"].max(),
        np.exp(-4 * np.log(2) * ((np.arange(401) - 200) / 100) ** 2) * (np.abs(np.arange(401) - 200) <= 150),
        atol=1e-3,
    )


@pytest.mark.parametrize("ratio", PUBLISHED_TAPS)
def test_legacy_taps_are_those_of_the_published_code(ratio):
    # One thick slice centred on a thin one: the bicubic picks the taps themselves.
    size = 41
    fwhm = fwhm_in_voxels(ratio, 1.0)
    row = acquisition_matrix(size, 1, ratio=ratio, fwhm=fwhm, profile="slr-legacy")[0]
    published = PUBLISHED_TAPS[ratio]
    assert np.count_nonzero(row) <= 2 * round(fwhm) + 1 == 2 * len(published) - 1
    np.testing.assert_allclose(row[20 : 20 + len(published)], published, atol=0.012)
    np.testing.assert_allclose(row, row[::-1], atol=1e-12)


def test_integration_does_not_snap_to_odd_widths_as_the_legacy_taps_do():
    def spread(profile, ratio):
        row = acquisition_matrix(81, 1, ratio=ratio, fwhm=fwhm_in_voxels(ratio, 1), profile=profile)[0]
        return float(row @ (np.arange(81) - 40) ** 2)

    ratios = np.array([2.5, 3, 3.5])
    legacy, exact = ([spread(p, r) for r in ratios] for p in ("slr-legacy", "slr"))
    assert np.ptp(legacy) < 0.02
    assert (np.diff(exact) > 0.08).all()


def test_box_of_four_is_the_mean_of_four():
    matrix = acquisition_matrix(20, 5, ratio=4, fwhm=4, profile="box")
    np.testing.assert_allclose(matrix, np.kron(np.eye(5), np.full((1, 4), 0.25)), atol=1e-12)


def test_box_weighs_cut_slices_by_what_lies_inside():
    row = acquisition_matrix(9, 1, ratio=3, fwhm=2.5, profile="box")[0]
    np.testing.assert_allclose(row[2:7], np.array([0, 0.75, 1, 0.75, 0]) / 2.5, atol=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("ratio", [3, 4, 3.5, 2.75])
@pytest.mark.parametrize("thickness", [0.6, 1.0, 1.2])
def test_the_stride_is_the_spacing_whatever_the_thickness(profile, ratio, thickness):
    size = 66
    count = int(size / ratio)
    fwhm = fwhm_in_voxels(ratio * thickness, 1)
    matrix = acquisition_matrix(size, count, ratio=ratio, fwhm=fwhm, profile=profile)
    centres = (size - 1) / 2 + (np.arange(count) - (count - 1) / 2) * ratio
    inner = slice(2, -2)
    # Sampled profiles wander around their centre by some hundredths of a voxel; the stride is exact on average.
    np.testing.assert_allclose(centroids(matrix)[inner], centres[inner], atol=0.08)
    slope = np.polyfit(np.arange(count)[inner], centroids(matrix)[inner], 1)[0]
    assert slope == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("profile", CONTINUOUS)
def test_a_gap_leaves_slices_between_unseen(profile):
    def least_seen(thickness):
        matrix = acquisition_matrix(48, 8, ratio=6, fwhm=fwhm_in_voxels(thickness, 1), profile=profile)
        return float(matrix.sum(axis=0)[12:36].min() * 6)

    assert least_seen(6) > 0.7
    assert least_seen(3) < 0.35


def test_field_of_view_is_centred_for_sizes_that_do_not_divide():
    matrix = acquisition_matrix(31, 8, ratio=3.5, fwhm=fwhm_in_voxels(3.5, 1), profile="slr")
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-9)
    assert centroids(matrix).mean() == pytest.approx(15, abs=1e-9)


def test_weight_beyond_the_ends_comes_back_to_the_slices_inside():
    matrix = acquisition_matrix(8, 2, ratio=4, fwhm=8, profile="box")
    # Centred at 1.5, the slab reaches from -2.5 to 5.5: six slices are there to share the weight.
    np.testing.assert_allclose(matrix[0], [1 / 6] * 6 + [0, 0], atol=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_factor_of_one_changes_next_to_nothing(profile):
    matrix = acquisition_matrix(9, 9, ratio=1, fwhm=fwhm_in_voxels(1, 1), profile=profile)
    assert np.diag(matrix).min() > (0.7 if profile == "gaussian" else 0.95)
    np.testing.assert_allclose(matrix[1:-1], matrix[1:-1][::-1, ::-1], atol=1e-9)


@pytest.mark.parametrize("phase", [-1.0, 1.0, 2.0])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_phase_of_whole_slices_shifts_what_is_seen(profile, phase):
    settings = {"ratio": 4.0, "fwhm": fwhm_in_voxels(4, 1), "profile": profile}
    still = acquisition_matrix(48, 12, **settings)
    moved = acquisition_matrix(48, 12, phase=phase, **settings)
    np.testing.assert_allclose(moved[3:9], np.roll(still, int(phase), axis=1)[3:9], atol=1e-9)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("phase", [-0.4, 0.9])
def test_a_fraction_of_a_phase_moves_a_source_the_other_way(profile, phase):
    # A source as wide as a slice: a rectangular profile cannot tell where inside a slab a point lies.
    source = np.exp(-0.5 * ((np.arange(61) - 30) / 3) ** 2)
    settings = {"ratio": 3.0, "fwhm": fwhm_in_voxels(3, 1), "profile": profile}

    def seen(phase):
        image = acquisition_matrix(61, 20, phase=phase, **settings) @ source
        return float(image @ np.arange(20) / image.sum())

    assert (seen(phase) - seen(0)) * 3 == pytest.approx(-phase, abs=0.045)


def test_fwhm_in_voxels_subtracts_in_quadrature_and_stops_at_one():
    assert fwhm_in_voxels(5.0, 1.0) == pytest.approx(np.sqrt(24))
    assert fwhm_in_voxels(6.0, 2.0) == pytest.approx(np.sqrt(8))
    assert fwhm_in_voxels(1.0, 1.0) == fwhm_in_voxels(0.5, 1.0) == 1
    for thickness, voxel in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(SettingError, match="> 0 mm"):
            fwhm_in_voxels(thickness, voxel)


def test_taps_are_applied_on_the_thin_grid_in_their_direction():
    row = acquisition_matrix(11, 1, ratio=3, fwhm=3, profile=(0.0, 1.0, 3.0))[0]
    np.testing.assert_allclose(row[5:7], [0.25, 0.75], atol=1e-12)
    assert np.abs(np.delete(row, (5, 6))).max() < 1e-12
    # Between slices the bicubic of the published code takes over.
    halved = acquisition_matrix(12, 1, ratio=3, fwhm=3, profile=[1.0])
    np.testing.assert_allclose(halved, keys_matrix(12, [5.5], a=-0.75), atol=1e-12)


@pytest.mark.parametrize("taps", [(1.0, 1.0), (0.0, 0.0, 0.0), (np.nan,), ((1.0, 2.0, 1.0),)])
def test_unusable_taps_are_refused(taps):
    with pytest.raises(SettingError, match="odd number"):
        acquisition_matrix(8, 2, ratio=4, fwhm=4, profile=taps)


def test_bad_settings_are_refused():
    good = {"ratio": 4.0, "fwhm": 4.0}
    with pytest.raises(SettingError, match="slr, gaussian, box, slr-legacy or taps, got 'rect'"):
        acquisition_matrix(8, 2, profile="rect", **good)
    for name in good:
        with pytest.raises(SettingError, match="> 0"):
            acquisition_matrix(8, 2, **{**good, name: 0.0})
    with pytest.raises(SettingError, match="do not lie inside 8 thin slices"):
        acquisition_matrix(8, 9, profile="box", **good)


@pytest.mark.parametrize("text", ["1\n2\n1\n", "0.5 1 0.5", "# measured\n10 20 10\n"])
def test_taps_are_read_in_any_scale(tmp_path, text):
    file = tmp_path / "profile.txt"
    file.write_text(text, encoding="utf-8")
    np.testing.assert_allclose(read_taps(file), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(read_taps(str(file)), read_taps(file))


def test_one_tap_is_a_profile(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("7", encoding="utf-8")
    assert read_taps(file).tolist() == [1.0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"1 2\n", "odd number"),
        (b"1 nan 1\n", "finite"),
        (b"1 inf 1\n", "finite"),
        (b"-1 -2 -1\n", "positive sum"),
        (b"0 0 0\n", "positive sum"),
        (b"a b c\n", "not a readable list"),
        (b"1 2\n3\n", "not a readable list"),
        (b"\xff\xfe\x00\x81", "not a readable list"),
    ],
)
def test_faults_of_a_taps_file_are_named(tmp_path, content, reason):
    file = tmp_path / "profile.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"profile\.txt: .*{reason}") as caught:
        read_taps(file)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data:UserWarning")
def test_an_empty_taps_file_is_refused(tmp_path):
    file = tmp_path / "empty.txt"
    file.touch()
    with pytest.raises(DataError, match=r"empty\.txt: .*odd number"):
        read_taps(file)


def test_a_missing_taps_file_is_named_without_its_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: not a readable list") as caught:
        read_taps(tmp_path / "none.txt")
    assert str(tmp_path) not in str(caught.value)


def test_a_profile_is_a_name_a_list_or_a_file(tmp_path):
    file = tmp_path / "measured"
    file.write_text("1 2 1", encoding="utf-8")
    assert [as_profile(name) for name in PROFILES] == list(PROFILES)
    assert as_profile([1, 2, 1]) == (1.0, 2.0, 1.0)
    assert as_profile(str(file)) == (0.25, 0.5, 0.25)
    with pytest.raises(SettingError, match="got 'rect'"):
        as_profile("rect")
    with pytest.raises(DataError, match=r"none\.txt"):
        as_profile(str(tmp_path / "none.txt"))
