from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError, SettingError
from medsr.io.cases import (
    case_name,
    find_cases,
    find_labelled_cases,
    input_digest,
    inspect_case,
    read_case,
    refuse_marked,
    warn_once,
)


def refused(source, fragment):
    with pytest.raises(DataError, match=fragment) as caught:
        refuse_marked(find_cases(source))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def names(source):
    return [item["case"] for item in find_cases(source)]


def test_one_file(nifti, monkeypatch, tmp_path):
    path = nifti(name="T1 weighted.nii.gz")
    assert find_cases(path) == [{"image": str(path), "case": "T1_weighted"}]
    monkeypatch.chdir(tmp_path)
    assert find_cases("T1 weighted.nii.gz")[0]["image"] == str(path)


def test_folder_of_files_and_series(nifti, series, tmp_path):
    nifti(name="b.nii")
    nifti(name="a.nii.gz")
    nifti(name=".hidden.nii")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    folder = series(name="c")
    assert names(tmp_path) == ["a", "b", "c"]
    assert names(str(folder)) == ["c"]
    assert names([folder, tmp_path / "a.nii.gz"]) == ["c", "a"]


def test_nothing_to_process(tmp_path):
    refused(tmp_path / "none", "no such file or folder")
    refused([], "list of inputs is empty")
    refused(tmp_path, "no .nii or .nii.gz file and no DICOM series")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path, "no .nii or .nii.gz file")
    refused(tmp_path / "a.txt", "not a NIfTI file")


def test_one_name_for_two_inputs(nifti, tmp_path):
    nifti(name="a.nii")
    nifti(name="a.nii.gz")
    refused(tmp_path, r"a.nii and a.nii.gz have the same case name a")
    refused([tmp_path / "a.nii", tmp_path / "a.nii"], "a.nii: given twice")
    nifti(name="B c.nii")
    nifti(name="b_c.nii")
    refused([tmp_path / "B c.nii", tmp_path / "b_c.nii"], "B c.nii and b_c.nii have the same case name b_c")
    (tmp_path / "two").mkdir()
    (tmp_path / "a.nii").rename(tmp_path / "two" / "a.nii.gz")
    refused(
        [tmp_path / "a.nii.gz", tmp_path / "two" / "a.nii.gz"], r"\w+/a.nii.gz and two/a.nii.gz have the same"
    )


def test_series_beside_other_cases_is_ambiguous(series, nifti):
    folder = series()
    nifti(name="a.nii").rename(folder / "a.nii")
    refused(folder, "DICOM images beside other cases")


def test_links_that_leave_the_folder(nifti, series, tmp_path):
    path = nifti(name="a.nii")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "b.nii").symlink_to(path)
    refused(inner, "leaves the folder inner; name the file itself instead$")
    with pytest.raises(DataError, match=r"itself instead, or set follow_links to true$"):
        find_cases(inner, follow_links=False)
    assert [item["case"] for item in find_cases(inner, follow_links=True)] == ["b"]
    with pytest.raises(SettingError, match="follow_links must be true or false, got 'yes'"):
        find_cases(inner, follow_links="yes")
    assert names(inner / "b.nii") == ["b"]
    (inner / "b.nii").unlink()
    (inner / "s").symlink_to(series(), target_is_directory=True)
    refused(inner, "leaves the folder")
    assert [item["case"] for item in find_cases(inner, follow_links=True)] == ["s"]


def test_a_broken_link_is_a_case_that_fails(nifti, tmp_path):
    nifti(name="a.nii")
    (tmp_path / "fetched_not.nii.gz").symlink_to("store/key")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    assert names(tmp_path) == ["a", "fetched_not", "loop"]
    for name in ("fetched_not.nii.gz", "loop.nii"):
        with pytest.raises(DataError, match="a link to a file that is not there"):
            inspect_case(tmp_path / name)


def test_what_cannot_be_read_is_a_case_that_fails(nifti, series, tmp_path, monkeypatch):
    nifti(name="a.nii")
    (tmp_path / "notes.txt").write_text("x" * 200)
    folder = series(name="secret")
    opened, listed = Path.open, Path.iterdir

    def forbidden(path, *args, **settings):
        if path.name == "notes.txt" or path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **settings)

    monkeypatch.setattr(Path, "open", forbidden)
    assert names(tmp_path) == ["a", "secret"]
    with pytest.raises(DataError, match="cannot be read"):
        inspect_case(folder)

    def unlisted(path):
        if path == folder:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", unlisted)
    assert names(tmp_path) == ["a", "secret"]
    with pytest.raises(DataError, match="secret: cannot be read"):
        inspect_case(folder)
    refused("n" * 300, "cannot be read")


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".hidden",
        "a/../..",
        "x" * 300 + ".nii.gz",
        "CON.nii",
        "nul",
        "Müller, $(rm)",
        "..nii",
        "日本.nii.gz",
        "眼" * 200,
        "a\u202e\ud800\x00\u00a0b",
    ],
)
def test_case_names_are_safe(name):
    safe = case_name(Path(name))
    assert re.fullmatch(r"[\w-][\w.-]{0,99}", safe)
    # With the longest ending and the mark of an unfinished file.
    assert len(safe.encode()) <= 200
    assert safe.casefold() not in ("con", "nul")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ασθενής 1", "Ασθενής_1"),
        ("пациент-2", "пациент-2"),
        ("眼底（左）", "眼底（左）"),
        # Vowels of this script are marks, not letters.
        ("रोगी", "रोगी"),
        ("e\u0301cran", "écran"),
        ("a'b\"c$d;e", "a_b_c_d_e"),
        ("می\u200cخواهم", "می_خواهم"),
    ],
)
def test_letters_of_any_script_stay_in_the_name(name, expected):
    assert case_name(f"{name}.nii") == expected


def test_only_inputs_of_one_name_fail_where_others_go_on(nifti, tmp_path):
    for name in ("a.nii", "a.nii.gz", "b.nii"):
        nifti(name=name)
    found = find_cases(tmp_path)
    assert [item["case"] for item in found] == ["a.nii", "a.nii.gz", "b"]
    reason = "a.nii and a.nii.gz have the same case name a; rename one of them"
    assert [item.get("error") for item in found] == [reason, reason, None]
    with pytest.raises(DataError, match=r"b\.nii: given twice"):
        find_cases([tmp_path / "b.nii", tmp_path])


def test_names_in_another_script_do_not_clash(nifti, tmp_path):
    for name in ("Άννα.nii", "Ελένη.nii", "李雷.nii", "韩梅.nii"):
        nifti(name=name)
    assert len(set(names(tmp_path))) == 4
    # One name on a Mac.
    (tmp_path / "two").mkdir()
    paths = [nifti(name="e\u0301.nii"), nifti(name="\u00e9.nii")]
    refused(paths, "have the same case name \u00e9")


def test_the_folder_above_has_its_own_name(series, tmp_path, monkeypatch):
    folder = series(name="t2")
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    assert names("..") == ["t2"]


def test_dispatch(nifti, series, expected_law):
    path, folder = nifti(), series()
    assert inspect_case(path).shape == (8, 9, 10)
    assert inspect_case(folder).shape == (40, 32, 12)
    np.testing.assert_array_equal(read_case(path)[0], expected_law(8, 9, 10))
    np.testing.assert_array_equal(read_case(folder)[0], expected_law(40, 32, 12))
    constant = nifti(array=np.zeros((3, 3, 3), np.uint8), name="mask.nii")
    with pytest.raises(DataError, match="constant"):
        read_case(constant)
    assert read_case(constant, allow_constant=True)[0].max() == 0


# --- images with masks ------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> Path:
    for part in ("images", "labels"):
        (tmp_path / "study" / part).mkdir(parents=True)
        for name in ("a.nii.gz", "b.nii"):
            (tmp_path / "study" / part / name).touch()
    return tmp_path / "study"


def test_images_and_masks_of_one_name_are_a_case(labelled):
    items = find_labelled_cases(labelled)
    assert [item["case"] for item in items] == ["a", "b"]
    assert [Path(item["label"]).relative_to(labelled).as_posix() for item in items] == [
        "labels/a.nii.gz",
        "labels/b.nii",
    ]
    assert [item["case"] for item in find_labelled_cases(labelled, ["a"])] == ["b"]


@pytest.mark.parametrize(
    ("spoil", "leave_out", "fragment"),
    [
        (lambda f: (f / "labels" / "b.nii").unlink(), [], "b has no partner in labels/"),
        (lambda f: (f / "images" / "a.nii.gz").unlink(), [], "a has no partner in images/"),
        (lambda f: (f / "labels").rename(f / "masks"), [], "no folder 'labels'"),
        (lambda f: None, ["c"], "c is to be left out, but there is no such case"),
        (lambda f: None, ["a", "b"], "no case is left after 2 were left out"),
    ],
)
def test_a_labelled_folder_that_does_not_fit_is_refused(labelled, spoil, leave_out, fragment):
    spoil(labelled)
    with pytest.raises(DataError, match=fragment) as caught:
        find_labelled_cases(labelled, leave_out)
    assert str(labelled.parent) not in str(caught.value)


def test_a_further_folder_is_used_if_it_is_there(labelled):
    assert "uncertainty" not in find_labelled_cases(labelled, optional=["uncertainty"])[0]
    (labelled / "uncertainty").mkdir()
    (labelled / "uncertainty" / "a.nii.gz").touch()
    with pytest.raises(DataError, match="b has no partner in uncertainty/"):
        find_labelled_cases(labelled, optional=["uncertainty"])
    (labelled / "uncertainty" / "b.nii.gz").touch()
    items = find_labelled_cases(labelled, optional=["uncertainty"])
    assert [Path(item["uncertainty"]).name for item in items] == ["a.nii.gz", "b.nii.gz"]


def test_a_series_is_known_by_all_of_its_slices(tmp_path):
    def digest(**slices: bytes) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in slices.items():
            (tmp_path / name).write_bytes(bytes(128) + b"DICM" + content)
        return input_digest({"case": "a", "image": str(tmp_path)})

    found = [digest(a=b"1", b=b"2"), digest(a=b"1", b=b"3"), digest(a=b"1"), digest(a=b"1", c=b"2")]
    assert len(set(found)) == 4
    assert digest(b=b"2", a=b"1") == found[0]


def test_a_file_is_known_by_its_middle_too_and_not_by_where_it_lies(tmp_path):
    def digest(folder: str, content: bytes) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "scan.nii"
        path.write_bytes(content)
        return input_digest({"case": "scan", "image": str(path)})

    air = bytes(400_000)
    head = air[:200_000] + b"head" + air[200_004:]
    assert digest("one", head) == digest("other", head)
    assert digest("one", head) != digest("one", air)
    assert digest("one", air) != digest("one", air + b"0")


def test_a_case_is_known_by_all_of_its_files(tmp_path):
    image, label = tmp_path / "image.nii", tmp_path / "label.nii"
    image.write_bytes(b"1")
    label.write_bytes(b"2")
    item = {"case": "a", "image": str(image), "label": str(label)}
    before = input_digest(item)
    label.write_bytes(b"3")
    assert input_digest(item) != before


def test_what_a_file_browser_leaves_in_a_series_does_not_make_it_another(series):
    folder = series()
    before = input_digest({"case": "a", "image": str(folder)})
    for name in (".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    assert input_digest({"case": "a", "image": str(folder)}) == before
    next(folder.glob("*.dcm")).unlink()
    assert input_digest({"case": "a", "image": str(folder)}) != before


def test_volumes_that_are_not_read_are_not_left_out_silently(nifti, series, tmp_path, caplog):
    warn_once.cache_clear()
    folder = tmp_path / "study"
    folder.mkdir()
    nifti(name="a.nii").rename(folder / "a.nii")
    for name in ("c.hdr", "c.img", "d.mgz", "E.NRRD", "notes.txt", ".hidden.mgz"):
        (folder / name).write_bytes(b"x")
    (folder / "sub").mkdir()
    nifti(name="b.nii").rename(folder / "sub" / "b.nii")
    series().rename(folder / "s")
    (folder / "patient").mkdir()
    series().rename(folder / "patient" / "series")
    (folder / "empty").mkdir()
    # Results of an earlier run are not missed.
    (folder / "superres").mkdir()
    for name in ("a_superres.nii.gz", "report.json"):
        (folder / "superres" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [item["case"] for item in find_cases(folder)] == ["a", "s"]
    assert [record.getMessage() for record in caplog.records] == [
        "study: 3 volumes are left out, E.NRRD first; convert them to NIfTI",
        "study: 2 folders with NIfTI files or DICOM series inside are left out, patient first; run them by name",
    ]


@pytest.mark.parametrize("name", ["c.hdr", "C.IMG"])
def test_half_of_a_pair_of_files_is_told_what_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, r"part of a \.hdr/\.img pair; convert it to a single \.nii file first$")
