from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.cases import warn_once
from medsr.io.stereo import StereoCalibration, find_stereo_cases, find_stereo_pairs, read_calibration
from PIL import Image
from scipy.spatial.transform import Rotation

ENDOVIS = """\
Width: 1280
Height: 1024
Camera-0-F: 1084.21 1083.05   // left camera x,y focal dist in pixels
Camera-0-C: 580.02 506.79     // left camera x,y center in pixels
Camera-0-Alpha: 0.0           // skew
Camera-0-K: -0.00069 0.00195 0.00018 0.00010 0.00001
Camera-1-F: 1083.43 1083.22
Camera-1-C: 680.91 505.81
Camera-1-Alpha: 0.0
Camera-1-K: -0.00085 0.00245 0.00004 0.00000 0.00000
Extrinsic-Omega: -0.0002 -0.0011 0.0300  // left to right camera rotation
Extrinsic-T: -4.3499 0.0333 -0.0369
"""

MATRICES = {
    "M1": [[1000.0, 0, 310], [0, 1001, 240], [0, 0, 1]],
    "D1": [[0.1, -0.2, 0.001, 0.002, 0.05]],
    "M2": [[990.0, 0, 330], [0, 991, 250], [0, 0, 1]],
    "D2": [[0.01, -0.02, 0, 0]],
    "R": Rotation.from_rotvec([0.01, 0.02, -0.03]).as_matrix().tolist(),
    "T": [[-5.0], [0.1], [0.2]],
}


def as_yaml(matrices: dict[str, list[list[float]]]) -> str:
    lines = ["%YAML:1.0", "---", "image_width: 640", "image_height: 480"]
    for name, rows in matrices.items():
        values = ", ".join(repr(float(value)) for row in rows for value in row)
        lines += [f"{name}: !!opencv-matrix", f"   rows: {len(rows)}", f"   cols: {len(rows[0])}"]
        # OpenCV breaks long lines.
        lines += ["   dt: d", f"   data: [ {values.replace(', ', ',' + chr(10) + '       ', 2)} ]"]
    return "\n".join(lines)


def as_xml(matrices: dict[str, list[list[float]]]) -> str:
    lines = ['<?xml version="1.0"?>', "<opencv_storage>", "<image_width>640</image_width>"]
    lines.append("<image_height>480</image_height>")
    for name, rows in matrices.items():
        values = "\n    ".join(repr(float(value)) for row in rows for value in row)
        lines.append(
            f'<{name} type_id="opencv-matrix">\n  <rows>{len(rows)}</rows>\n  <cols>{len(rows[0])}</cols>\n'
            f"  <dt>d</dt>\n  <data>\n    {values}</data></{name}>"
        )
    return "\n".join([*lines, "</opencv_storage>"])


def as_json(matrices: dict[str, list[list[float]]]) -> str:
    return json.dumps({**matrices, "camera": "endoscope", "image_width": 640, "image_height": 480})


def as_opencv_json(matrices: dict[str, list[list[float]]]) -> str:
    wrapped = {
        name: {
            "type_id": "opencv-matrix",
            "rows": len(rows),
            "cols": len(rows[0]),
            "dt": "d",
            "data": [v for row in rows for v in row],
        }
        for name, rows in matrices.items()
    }
    return json.dumps({**wrapped, "image_width": 640, "image_height": 480})


# --- pairs ----------------------------------------------------------------------------------------------------------


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)
    return path


@pytest.mark.parametrize(("left", "right"), [("left", "right"), ("left_frames", "right_frames")])
def test_pairs_in_two_folders(tmp_path, left, right):
    for name in ("b.png", "a.bmp"):
        save(tmp_path / left / name)
    save(tmp_path / right / "a.png")
    save(tmp_path / right / "b.png")
    expected = [
        {
            "image": str(tmp_path / left / "a.bmp"),
            "image_right": str(tmp_path / right / "a.png"),
            "case": "a",
        },
        {
            "image": str(tmp_path / left / "b.png"),
            "image_right": str(tmp_path / right / "b.png"),
            "case": "b",
        },
    ]
    assert find_stereo_pairs(tmp_path) == expected
    assert find_stereo_pairs(tmp_path / left, tmp_path / right) == expected


def test_pairs_by_their_names(tmp_path):
    folder = tmp_path / "scene"
    for name in ("x_left.png", "x_right.png", "y-Left.png", "y-RIGHT.png", "left.png", "right.png"):
        save(folder / name)
    items = find_stereo_pairs(folder)
    assert [item["case"] for item in items] == ["scene", "x", "y"]
    assert [Path(item["image_right"]).name for item in items] == ["right.png", "x_right.png", "y-RIGHT.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a_left.png", "a_right.png", "b_left.png"], "b: there is no right view$"),
        (["a_right.png", "b_left.png"], r"a: there is no left view \(and 1 more without a partner\)"),
        (["a_left.png", "a_right.png", "mask.png"], "mask.png is neither left nor right"),
        (
            ["a_left.png", "a-left.png", "a_right.png"],
            r"a has two left views, a-left.png and a_left.png; keep",
        ),
        ([], "no PNG, JPEG"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, names, message):
    for name in names:
        save(tmp_path / name)
    with pytest.raises(DataError, match=message) as error:
        find_stereo_pairs(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_partner_in_a_folder_is_named(tmp_path):
    save(tmp_path / "left" / "a.png")
    save(tmp_path / "left" / "b.png")
    save(tmp_path / "right" / "b.png")
    with pytest.raises(DataError, match="a: there is no right view"):
        find_stereo_pairs(tmp_path)


def test_two_views_of_a_side_are_one_bad_case(tmp_path):
    for name in ("x_left.png", "x-left.png", "x_right.png", "b_left.png", "b_right.png"):
        save(tmp_path / name)
    good, bad = find_stereo_cases(tmp_path)
    assert (good["case"], Path(good["image_right"]).name) == ("b", "b_right.png")
    assert "error" not in good
    assert (bad["case"], bad["error"]) == (
        "x",
        "x has two left views, x-left.png and x_left.png; keep one of them",
    )


def test_pictures_beside_the_folders_of_views_are_not_left_out_silently(tmp_path, caplog):
    warn_once.cache_clear()
    for name in ("left/1.png", "right/1.png", "b_left.png", "b_right.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert [item["case"] for item in find_stereo_cases(tmp_path)] == ["1"]
        shutil.rmtree(tmp_path / "right")
        assert [item["case"] for item in find_stereo_cases(tmp_path)] == ["b"]
    name = tmp_path.name
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: 2 pictures beside left and right are left out, b_left.png first",
        f"{name}: there is a folder left, but no right beside it; its views are left out",
    ]


# --- calibration ----------------------------------------------------------------------------------------------------


def test_the_text_of_endovis(tmp_path):
    (tmp_path / "camera_calibration.txt").write_text(ENDOVIS)
    found = read_calibration(tmp_path / "camera_calibration.txt")
    assert found.size == (1024, 1280)
    np.testing.assert_allclose(found.left, [[1084.21, 0, 580.02], [0, 1083.05, 506.79], [0, 0, 1]])
    np.testing.assert_allclose(found.right[:2, 2], [680.91, 505.81])
    np.testing.assert_allclose(found.left_distortion, [-0.00069, 0.00195, 0.00018, 0.0001, 0.00001])
    np.testing.assert_allclose(found.translation, [-4.3499, 0.0333, -0.0369])
    np.testing.assert_allclose(found.rotation, Rotation.from_rotvec([-0.0002, -0.0011, 0.03]).as_matrix())


@pytest.mark.parametrize("written", [as_yaml, as_xml, as_json, as_opencv_json])
def test_the_files_of_opencv(tmp_path, written):
    (tmp_path / "calibration").write_text(written(MATRICES))
    found = read_calibration(tmp_path / "calibration")
    assert found.size == (480, 640)
    np.testing.assert_allclose(found.left, MATRICES["M1"])
    np.testing.assert_allclose(found.right, MATRICES["M2"])
    np.testing.assert_allclose(found.left_distortion, MATRICES["D1"][0])
    np.testing.assert_allclose(found.right_distortion, [0.01, -0.02, 0, 0, 0])
    np.testing.assert_allclose(found.rotation, MATRICES["R"])
    np.testing.assert_allclose(found.translation, [-5, 0.1, 0.2])


def test_other_names_and_a_rotation_vector(tmp_path):
    renamed = {"M1": "K1", "M2": "cameraMatrix2", "D1": "distCoeffs1"}
    matrices = {renamed.get(name, name): value for name, value in MATRICES.items()}
    matrices["R"] = [[0.01], [0.02], [-0.03]]
    (tmp_path / "a.yml").write_text(as_yaml(matrices))
    np.testing.assert_allclose(read_calibration(tmp_path / "a.yml").rotation, MATRICES["R"], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENDOVIS.replace("Extrinsic-T", "Extrinsic"), "a.txt: Extrinsic-T with 3 numbers is missing"),
        (ENDOVIS.replace("-0.00069 ", ""), "a.txt: Camera-0-K with 5 numbers is missing"),
        (ENDOVIS.replace("1084.21", "wide"), "a.txt: an entry cannot be read"),
        (ENDOVIS.replace("1084.21", "-3"), "a.txt: calibration: a focal length is not positive"),
        (ENDOVIS.replace("-4.3499 0.0333 -0.0369", "0 0 0"), "both cameras stand at one place"),
        (as_yaml({k: v for k, v in MATRICES.items() if k != "D2"}), "a.txt: no entry D2 or distCoeffs2"),
        (as_yaml({**MATRICES, "R": [[1.0, 0, 0], [0, 2, 0], [0, 0, 1]]}), "is no rotation"),
        (
            as_yaml({**MATRICES, "M1": [[1000.0, 310.0, 240.0]]}),
            r"left must be finite numbers of shape \(3, 3\)",
        ),
        (as_yaml({**MATRICES, "D1": [[0.0] * 5 + [1.0]]}), "distortion beyond k3 is not supported"),
        (as_xml(MATRICES).replace("310.0", "nan"), "left must be finite"),
        ("hello", "a.txt: no entry R; EndoVis text or OpenCV YAML, XML or JSON is needed"),
        ("{", "an entry cannot be read"),
    ],
)
def test_what_is_wrong_with_a_calibration_is_said_in_one_line(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_calibration(tmp_path / "a.txt")
    assert "\n" not in str(error.value)


def test_bytes_are_no_calibration(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match=r"a\.txt: not a text file"):
        read_calibration(tmp_path / "a.txt")


def test_a_calibration_can_be_made_in_code():
    camera = np.array(MATRICES["M1"])
    made = StereoCalibration(camera, camera, np.zeros(5), np.zeros(5), np.eye(3), np.array([-1.0, 0, 0]))
    assert made.size is None


# --- cases ----------------------------------------------------------------------------------------------------------


def test_cases_are_pairs_single_images_and_views_without_partner(tmp_path):
    for name in ("a_left", "a_right", "b_left", "c-right", "mono"):
        save(tmp_path / f"{name}.png")
    found = {item.pop("case"): item for item in find_stereo_cases(tmp_path)}
    assert {case: set(item) for case, item in found.items()} == {
        "a": {"image", "image_right"},
        "b": {"image", "error"},
        "c": {"image", "error"},
        "mono": {"image"},
    }
    assert found["a"]["image"].endswith("a_left.png")
    assert found["a"]["image_right"].endswith("a_right.png")
    assert found["b"]["error"] == "b: there is no right view"
    assert found["c"]["error"] == "c: there is no left view"


def test_folders_of_views_lose_no_case_to_a_missing_partner(tmp_path):
    for name in ("left/a", "right/a", "left/b"):
        save(tmp_path / f"{name}.png")
    whole, alone = find_stereo_cases([tmp_path])
    assert (whole["case"], alone["error"]) == ("a", "b: there is no right view")
    with pytest.raises(DataError, match="b: there is no right view"):
        find_stereo_pairs(tmp_path)


def test_views_may_be_named_one_by_one(tmp_path):
    paths = [save(tmp_path / f"{name}.png") for name in ("x_right", "y", "x_left")]
    assert [(item["case"], "image_right" in item) for item in find_stereo_cases(paths)] == [
        ("x", True),
        ("y", False),
    ]
    with pytest.raises(DataError, match="the list of inputs is empty"):
        find_stereo_cases([])


def test_two_cases_of_one_name_fail_and_others_go_on(tmp_path):
    for folder in ("one", "two"):
        save(tmp_path / folder / "left" / "a.png")
        save(tmp_path / folder / "right" / "a.png")
    first, second = find_stereo_cases([tmp_path / "one", tmp_path / "two"])
    assert (first["case"], second["case"]) == ("one/left/a.png", "two/left/a.png")
    reason = "one/left/a.png and two/left/a.png have the same case name a; rename one of them"
    assert first["error"] == second["error"] == reason
    paths = [save(tmp_path / name) for name in ("b_left.png", "b_right.png", "B.png", "c.png")]
    assert [(item["case"], "error" in item) for item in find_stereo_cases(paths)] == [
        ("B.png", True),
        ("b_left.png", True),
        ("c", False),
    ]


def test_views_of_one_name_in_a_folder_fail_and_others_go_on(tmp_path):
    for name in ("left/a.png", "left/a.tif", "right/a.png", "left/b.png", "right/b.png"):
        save(tmp_path / name)
    found = {item["case"]: item.get("error", "") for item in find_stereo_cases(tmp_path)}
    assert found == {
        "a": "a: there is no left view",
        "a.png": "a.png and a.tif have the same case name a; rename one of them",
        "a.tif": "a.png and a.tif have the same case name a; rename one of them",
        "b": "",
    }
    with pytest.raises(DataError, match=r"a\.png and a\.tif have the same case name a"):
        find_stereo_pairs(tmp_path)


def test_a_folder_lends_its_name_as_a_file_would(tmp_path):
    folder = tmp_path / "Fall 'Nr. 3'; 左"
    for name in ("left.png", "right.png"):
        save(folder / name)
    assert [item["case"] for item in find_stereo_cases(folder)] == ["Fall_Nr._3_左"]


@pytest.mark.parametrize(("there", "missing"), [("left", "right"), ("right_frames", "left_frames")])
def test_one_folder_of_views_without_the_other_is_said(tmp_path, there, missing):
    (tmp_path / "pairs" / there).mkdir(parents=True)
    for find in (find_stereo_cases, find_stereo_pairs):
        with pytest.raises(
            DataError, match=f"^pairs: there is a folder {there}, but no {missing} beside it$"
        ):
            find(tmp_path / "pairs")
