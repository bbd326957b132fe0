"""Images of all formats: listed, told apart by their content, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.cases import refuse_marked
from medsr.io.images import find_images, read_image, read_image_header
from PIL import Image, ImageFile

ROWS, COLUMNS = 6, 9
GREY = (np.arange(ROWS * COLUMNS, dtype=np.uint8) * 4).reshape(ROWS, COLUMNS)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def planes(stored, top: float) -> np.ndarray:
    stored = np.asarray(stored)
    stored = stored[..., None] if stored.ndim == 2 else stored
    return np.moveaxis(stored, -1, 0).astype(np.float32) / np.float32(top)


def save(path: Path, pixels, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def test_content_decides_the_format(tmp_path, accepted):
    path = save(tmp_path / "a.jpg", RGB, format="PNG")
    assert accepted(path, planes(RGB, 255)).encoding.file_format == "PNG"


def test_no_image(tmp_path, refused):
    refused(tmp_path / "none.png", "no such file")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty file")
    (tmp_path / "text.png").write_text("a report on ZZMARKER" * 20)
    assert "ZZMARKER" not in refused(tmp_path / "text.png", "not a PNG, JPEG, TIFF, BMP or DICOM image")
    refused(save(tmp_path / "a.gif", GREY), "not a PNG, JPEG")


def test_locked_file(tmp_path, monkeypatch, refused):
    path = save(tmp_path / "a.png", GREY)

    def locked(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", locked)
    refused(path, "cannot be read .Permission denied")


@pytest.mark.parametrize("limit", [ROWS * COLUMNS - 1, ROWS * COLUMNS // 2 - 1], ids=["warning", "error"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_decompression_bombs(tmp_path, monkeypatch, limit, suffix, refused):
    path = save(tmp_path / f"a{suffix}", RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    refused(path, f"^a.{suffix[1:]}: 54 pixels, more than the {limit} up to which .*; cut it into parts$")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    read_image(path)


def test_headers_are_read_without_decoding(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"a{suffix}", RGB) for suffix in (".png", ".jpg", ".tif", ".bmp")]

    def decoded(self):
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert {read_image_header(path).size for path in paths} == {(ROWS, COLUMNS)}


def listing_refused(source, fragment):
    with pytest.raises(DataError, match=fragment) as caught:
        refuse_marked(find_images(source))
    assert "\n" not in str(caught.value)


def names(source):
    return [item["case"] for item in find_images(source)]


def test_images_of_a_folder(photo, tmp_path, monkeypatch):
    for name in ("b 2.PNG", "a.v1.jpeg", "c.tif", "d.bmp", ".hidden.png"):
        save(tmp_path / name, RGB)
    photo(name="IM000001")
    photo(name="z.dcm").rename(tmp_path / "DICOMDIR")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "e_superres.png", RGB)
    assert names(tmp_path) == ["IM000001", "a.v1", "b_2", "c", "d"]
    path = tmp_path / "b 2.PNG"
    assert find_images(path) == [{"image": str(path), "case": "b_2"}]
    assert names([tmp_path / "c.tif", str(tmp_path / "out")]) == ["c", "e_superres"]
    monkeypatch.chdir(tmp_path)
    assert find_images("c.tif")[0]["image"] == str(tmp_path / "c.tif")


def test_nothing_to_list(tmp_path):
    listing_refused([], "list of inputs is empty")
    listing_refused(tmp_path / "none", "no such file or folder")
    listing_refused(
        tmp_path, "no PNG, JPEG, TIFF, BMP or DICOM file in this folder; sub-folders are not searched"
    )
    (tmp_path / "a.nii.gz").touch()
    listing_refused(tmp_path / "a.nii.gz", "not a PNG, JPEG, TIFF, BMP or DICOM file")


def test_one_name_for_two_images(tmp_path):
    save(tmp_path / "a.png", RGB)
    save(tmp_path / "A.jpg", RGB)
    listing_refused(tmp_path, "A.jpg and a.png have the same case name a; rename one")
    save(tmp_path / "a.tif", RGB)
    save(tmp_path / "b.png", RGB)
    found = find_images(tmp_path)
    assert [(item["case"], "error" in item) for item in found] == [
        ("A.jpg", True),
        ("a.png", True),
        ("a.tif", True),
        ("b", False),
    ]


def test_links_that_leave_the_folder(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "b.png").symlink_to(path)
    listing_refused(inner, "leaves the folder inner; name the file itself instead$")
    assert names(inner / "b.png") == ["b"]


def test_pictures_that_are_not_read_are_named_once(tmp_path, caplog):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    for name in ("second.webp", "First.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [item["case"] for item in find_images(tmp_path)] == ["good"]
    find_images(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 pictures are left out, First.HEIC first" in line


def test_a_broken_link_and_a_file_that_cannot_be_opened_are_cases_that_fail_alone(
    tmp_path, monkeypatch, refused
):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("ok.png", "other.jfif", "third.JPE"):
        Image.fromarray(RGB).save(folder / name, "PNG" if name == "ok.png" else "JPEG")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    (folder / "notes").write_text("locked")
    (folder / "gone").symlink_to(folder / "nowhere.txt")
    (folder / "unfetched.png").symlink_to(tmp_path / "annex" / "nowhere.png")
    real = Path.open

    def locked(self, *args, **settings):
        if self.name == "notes":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **settings)

    monkeypatch.setattr(Path, "open", locked)
    assert [item["case"] for item in find_images(folder)] == [
        *("lost", "notes", "ok", "other", "third", "unfetched")
    ]
    refused(folder / "lost.png", "a link to a file that is not there")
    refused(folder / "notes", r"cannot be read \(Permission denied\)")
    assert read_image(folder / "other.jfif").encoding.file_format == "JPEG"
