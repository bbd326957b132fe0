from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from medsr.errors import GeometryError, OutputError
from medsr.io import writing as module
from medsr.io.nifti import read_nifti
from medsr.io.writing import atomic_path, probe_folder, write_figure, write_json, write_nifti


def refused(fragment, call, *arguments, kind=OutputError, **options):
    with pytest.raises(kind, match=fragment) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# --- Folder and rename ------------------------------------------------------------------------------------


def test_probe_creates_the_folder_and_leaves_nothing(tmp_path):
    folder = probe_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert listing(folder) == []


def test_a_folder_that_is_only_tried_is_not_created(tmp_path):
    assert probe_folder(tmp_path / "a" / "b", create=False) == tmp_path / "a" / "b"
    assert listing(tmp_path) == []
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/below", "link", "link/below", "n" * 300):
        refused("cannot write", probe_folder, tmp_path / name, create=False)
    assert listing(tmp_path) == ["file", "link"]


def test_probe_refuses_a_file_and_a_read_only_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    refused("file: cannot write", probe_folder, tmp_path / "file")
    refused("cannot write", probe_folder, tmp_path / "file" / "below")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        refused("cannot write", probe_folder, tmp_path / "locked")


def test_probe_removes_only_old_temporaries_of_ours(tmp_path):
    old, new, other = (tmp_path / n for n in (".medsr-1-aa.tmp.a.nii", ".medsr-2-bb.tmp.b.nii", ".other.tmp"))
    for path in (old, new, other):
        path.write_text("x")
    long_ago = time.time() - 2 * 86400
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    probe_folder(tmp_path)
    assert listing(tmp_path) == [new.name, other.name]


def test_atomic_path_shows_the_file_only_when_whole(tmp_path):
    final = tmp_path / "a.nii.gz"
    final.write_text("old")
    with atomic_path(final) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".medsr-")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"
    assert listing(tmp_path) == ["a.nii.gz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_cleans_up_after_any_exception(tmp_path, error):
    final = tmp_path / "a.txt"
    final.write_text("old")

    def interrupted():
        with atomic_path(final) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert final.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_atomic_path_turns_system_errors_into_one_line(tmp_path):
    refused("no such folder", write_figure, tmp_path / "none" / "a.png", None)
    (tmp_path / "a.json").mkdir()
    refused("a.json: cannot be written", write_json, tmp_path / "a.json", {})
    refused("cannot be written", write_json, tmp_path / ("x" * 300 + ".json"), {})
    with pytest.raises(OutputError, match="cannot be written"), atomic_path(tmp_path / "b"):
        pass  # nothing was written
    assert listing(tmp_path) == ["a.json"]


# --- NIfTI ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_round_trip(tmp_path, expected_law, name, dtype, oblique):
    affine = np.eye(4)
    affine[:3, :3] = oblique @ np.diag([0.5, 0.6, 1.25])
    affine[:3, 3] = -90.123, 40, 12.5
    array = expected_law(7, 8, 9) % 200
    path = write_nifti(tmp_path / name, array, affine=affine, dtype=dtype, sform_code=4, qform_code=0)
    got, header = read_nifti(path)
    np.testing.assert_array_equal(got, array)
    np.testing.assert_allclose(header.affine, affine, atol=1e-5)
    assert (header.dtype, header.sform_code, header.qform_code, header.notes) == (dtype, 4, 1, ())
    np.testing.assert_allclose(nib.load(path).get_qform(), affine, atol=1e-4)
    assert listing(tmp_path) == [name]


def test_four_axes_and_single_slice(tmp_path):
    for shape in ((3, 4, 5, 2), (3, 4, 1)):
        array = np.random.default_rng(0).random(shape).astype(np.float32)
        path = write_nifti(tmp_path / "a.nii.gz", array, affine=np.eye(4))
        np.testing.assert_array_equal(nib.load(path).get_fdata(dtype=np.float32), array)


def test_equal_input_gives_equal_bytes(tmp_path, expected_law):
    first = write_nifti(tmp_path / "a.nii.gz", expected_law(5, 6, 7), affine=np.eye(4)).read_bytes()
    second = write_nifti(tmp_path / "b.nii.gz", expected_law(5, 6, 7), affine=np.eye(4)).read_bytes()
    assert first == second


def test_rounds_to_integers_and_refuses_overflow(tmp_path):
    array = np.array([0.4, 0.6, -1.2, 99.5001]).reshape(2, 2, 1)
    path = write_nifti(tmp_path / "a.nii", array, affine=np.eye(4), dtype=np.int16)
    assert np.asarray(nib.load(path).dataobj).ravel().tolist() == [0, 1, -1, 100]
    refused("do not fit into uint8", write_nifti, tmp_path / "b.nii", array, affine=np.eye(4), dtype=np.uint8)
    refused("do not fit", write_nifti, tmp_path / "b.nii", array * 1e300, affine=np.eye(4))
    mask = array > 0.5
    path = write_nifti(tmp_path / "a.nii", mask, affine=np.eye(4), dtype=bool)
    assert nib.load(path).get_data_dtype() == np.uint8


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_what_is_not_finite(tmp_path, value):
    array = np.ones((2, 2, 2))
    array[0, 0, 0] = value
    refused("1 of 8 voxels are NaN", write_nifti, tmp_path / "a.nii", array, affine=np.eye(4))
    assert listing(tmp_path) == []


def test_refuses_what_nifti_cannot_hold(tmp_path):
    good = np.ones((2, 2, 2))
    refused("3 or 4 axes", write_nifti, tmp_path / "a.nii", np.ones((2, 2)), affine=np.eye(4))
    refused("at least one voxel", write_nifti, tmp_path / "a.nii", np.ones((2, 0, 2)), affine=np.eye(4))
    refused("real numbers", write_nifti, tmp_path / "a.nii", good * 1j, affine=np.eye(4))
    refused("as .nii or .nii.gz", write_nifti, tmp_path / "a.img", good, affine=np.eye(4))
    refused("at most 32767 voxels", write_nifti, tmp_path / "a.nii", np.ones((40000, 1, 1)), affine=np.eye(4))
    bad = np.diag([1, 1, np.nan, 1])
    refused("NaN", write_nifti, tmp_path / "a.nii", good, affine=bad, kind=GeometryError)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("damage", ["flip", "cut", "more", "crc"])
def test_damage_while_writing_is_noticed(tmp_path, monkeypatch, name, damage, expected_law):
    """Stands for a storage that loses or changes bytes without reporting it."""
    real = module._verify

    def damaged(temporary, *arguments, zipped, **options):
        data = temporary.read_bytes()
        content = bytearray(gzip.decompress(data) if zipped else data)
        if damage == "flip":
            content[-1] ^= 1
        elif damage == "cut":
            content = content[:-5]
        elif damage == "more":
            content += b"x"
        data = gzip.compress(bytes(content)) if zipped else bytes(content)
        if damage == "crc":
            data = data[:-6] if zipped else data[:-6] + b"\1" * 6
        temporary.write_bytes(data)
        real(temporary, *arguments, zipped=zipped, **options)

    monkeypatch.setattr(module, "_verify", damaged)
    refused("nothing was saved", write_nifti, tmp_path / name, expected_law(5, 6, 7), affine=np.eye(4))
    assert listing(tmp_path) == []


DISK_FULL = """
import resource, sys
import numpy as np
from medsr.errors import OutputError
from medsr.io.writing import write_json, write_nifti
import nibabel
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).random((32, 32, 32), dtype=np.float32)
for name in ("a.nii", "b.nii.gz"):
    try:
        write_nifti(sys.argv[1] + "/" + name, noise, affine=np.eye(4))
    except OutputError as error:
        print(error)
try:
    write_json(sys.argv[1] + "/c.json", list(range(20000)))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_nothing_behind(tmp_path):
    (tmp_path / "b.nii.gz").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.nii", "b.nii.gz", "c.json"]
    assert all("cannot be written" in line for line in lines)
    assert listing(tmp_path) == ["b.nii.gz"]
    assert (tmp_path / "b.nii.gz").read_text() == "old"


# A shell ignores SIGINT for its background jobs, and children inherit that: here Ctrl-C is to be heard.
KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from medsr.io.writing import atomic_path
with atomic_path(sys.argv[1] + "/a.nii.gz") as temporary:
    temporary.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(("number", "left"), [("SIGINT", 0), ("SIGKILL", 1)])
def test_killed_process_leaves_no_final_file(tmp_path, number, left):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(getattr(signal, number))
        assert child.wait(timeout=20) != 0
    names = listing(tmp_path)
    assert "a.nii.gz" not in names
    assert len(names) == left
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    probe_folder(tmp_path)
    assert listing(tmp_path) == []


# --- JSON and figures -------------------------------------------------------------------------------------


def test_json(tmp_path):
    content = {"psnr": 31.5, "case": "é", "list": [1, None, True]}
    path = write_json(tmp_path / "a.json", content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert path.read_bytes().endswith(b"}\n")
    for bad in ({"a": float("nan")}, {"a": np.float32(1)}, {"a": object()}):
        refused("not expressible in JSON", write_json, tmp_path / "a.json", bad)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert listing(tmp_path) == ["a.json"]


def test_json_comes_with_its_folder(tmp_path):
    assert json.loads(write_json(tmp_path / "a" / "b" / "c.json", [1]).read_text()) == [1]
    (tmp_path / "file").write_text("x")
    refused("below: cannot be created", write_json, tmp_path / "file" / "below" / "c.json", [1])


def test_json_of_a_name_that_is_not_utf_8(tmp_path):
    content = {"input": os.fsdecode(b"M\xfcller.nii.gz"), "case": "é"}
    path = write_json(tmp_path / "a.json", content)
    assert json.loads(path.read_text(encoding="utf-8")) == content


def test_figure(tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2, 3])
    # In a script that the font of the figure does not have.
    figure.suptitle("眼底")
    path = write_figure(tmp_path / "a.png", figure, dpi=50)
    with Image.open(path) as image:
        assert image.size == (100, 50)
    refused("written as .png", write_figure, tmp_path / "a.jpg", figure)

    class Broken:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    refused("No space left", write_figure, tmp_path / "b.png", Broken())
    assert listing(tmp_path) == ["a.png"]
