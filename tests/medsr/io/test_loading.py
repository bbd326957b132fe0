from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from medsr.errors import DataError, GeometryError, SettingError
from medsr.io.image_encoding import ImageEncoding
from medsr.io.loading import LoadImageFiled, LoadVolumed, loaded_name
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Orientationd
from PIL import Image


def test_image_and_metadata(nifti, expected_law):
    path = nifti(sform_code=2, qform_code=3)
    path.with_name("vol.json").write_text(json.dumps({"SliceThickness": 2.5}))
    item = LoadVolumed(keys="image")({"image": str(path), "case": "vol"})
    image = item["image"]
    assert item["case"] == "vol"
    assert isinstance(image, MetaTensor)
    assert (image.dtype, image.shape) == (torch.float32, (1, 8, 9, 10))
    assert image.is_contiguous()
    np.testing.assert_array_equal(image[0].numpy(), expected_law(8, 9, 10))
    assert image.affine.dtype == torch.float64
    np.testing.assert_allclose(image.affine, np.diag([1, 2, 3, 1]))
    np.testing.assert_array_equal(image.meta["original_affine"], image.affine)
    assert image.meta["spatial_shape"].tolist() == [8, 9, 10]
    assert image.meta["filename_or_obj"] == str(path)
    assert image.meta["slice_thickness_mm"] == 2.5
    assert (image.meta["sform_code"], image.meta["qform_code"]) == (2, 3)
    assert image.meta["notes"] == ""


def test_fourth_axis_becomes_channels(nifti):
    array = np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    image = LoadVolumed(keys="image")({"image": nifti(array=array)})["image"]
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(array, -1, 0))
    assert image.meta["spatial_shape"].tolist() == [2, 3, 4]


def test_the_distance_of_the_volumes_is_kept_for_the_writer(nifti):
    def edit(header):
        header["pixdim"][4], header["xyzt_units"] = 2.5, 10

    load, array = LoadVolumed(keys="image"), np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    meta = load({"image": nifti(edit, array=array)})["image"].meta
    assert (meta["step"], meta["step_unit"]) == (2.5, "sec")
    assert not {"step", "step_unit"} & set(load({"image": nifti(edit)})["image"].meta)


def test_series_without_patient_data(series, marker, expected_affine):
    def edit(index, ds):
        ds.SliceThickness = 3

    image = LoadVolumed(keys="image")({"image": series(edit)})["image"]
    np.testing.assert_allclose(image.affine, expected_affine(), atol=1e-6)
    assert image.meta["notes"].splitlines() == ["slices are 3 mm thick every 5 mm: gap of 2 mm"]
    assert marker not in repr(image.meta)


def test_one_of_two_series_in_a_folder_is_chosen(series):
    series()
    folder = series(uid="1.2.3.222222", prefix="other", count=7)
    shapes = [
        LoadVolumed(keys="image", series_uid=uid)({"image": folder})["image"].shape[-1]
        for uid in ("111111", "222222")
    ]
    assert shapes == [12, 7]


def test_a_mask_that_is_called_like_its_image_is_told_from_it(nifti, tmp_path):
    item = {}
    for key in ("image", "label"):
        (tmp_path / key).mkdir()
        item[key] = nifti().rename(tmp_path / key / "a.nii.gz")
    for key, expected in (("label", "label a.nii.gz: empty file"), ("image", "a.nii.gz: empty file")):
        item[key].write_bytes(b"")
        with pytest.raises(DataError) as caught:
            LoadVolumed(keys=["image", "label"])(item)
        assert str(caught.value) == expected
    with pytest.raises(GeometryError, match=r"^label vol\.nii\.gz: "):
        LoadVolumed(keys="label")({"label": nifti(lambda header: header["pixdim"].fill(0))})


def test_several_keys(nifti):
    mask = nifti(array=np.zeros((8, 9, 10), np.uint8), name="mask.nii")
    load = LoadVolumed(keys=["image", "label"], allow_constant=True, allow_missing_keys=True)
    item = load({"image": nifti(), "label": mask})
    assert item["label"].max() == 0
    assert set(load({"image": nifti()})) == {"image"}
    with pytest.raises(KeyError):
        LoadVolumed(keys=["image", "label"])({"image": nifti()})
    with pytest.raises(DataError, match="constant"):
        LoadVolumed(keys="label")({"label": mask})


def test_faults_pass_through_a_pipeline_by_name(nifti):
    path = nifti()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="truncated gzip"):
        LoadVolumed(keys="image")({"image": path})
    # Compose wraps what it did not expect; the reason must survive.
    with pytest.raises(RuntimeError) as caught:
        Compose([LoadVolumed(keys="image")])({"image": path})
    assert isinstance(caught.value.__cause__, DataError)


def test_batches_of_unequal_metadata(nifti, series):
    """Default collation must survive a missing thickness and a different number of notes."""
    plain = nifti(name="a.nii")
    noted = nifti(name="b.nii", sform_code=0, qform_code=0)
    plain.with_name("a.json").write_text(json.dumps({"SliceThickness": 2.5}))
    data = Dataset([{"image": str(plain)}, {"image": str(noted)}], LoadVolumed(keys="image"))
    batch = next(iter(DataLoader(data, batch_size=2)))["image"]
    assert batch.shape == (2, 1, 8, 9, 10)
    first, second = decollate_batch(batch)
    assert first.meta["notes"] == ""
    assert "both 0" in second.meta["notes"]
    assert first.meta.get("slice_thickness_mm") is None
    single = decollate_batch(next(iter(DataLoader(data, batch_size=1)))["image"])[0]
    assert float(single.meta["slice_thickness_mm"]) == 2.5


def test_orientation_can_be_inverted(nifti, expected_law):
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    orient = Orientationd(keys="image", axcodes="RAS", labels=None)
    item = orient(LoadVolumed(keys="image")({"image": nifti(affine=affine)}))
    np.testing.assert_array_equal(item["image"][0].numpy(), expected_law(8, 9, 10)[::-1])
    back = orient.inverse(item)["image"]
    np.testing.assert_array_equal(back[0].numpy(), expected_law(8, 9, 10))
    np.testing.assert_allclose(back.affine, affine)


# --- Photographs ------------------------------------------------------------------------------------------

RGB = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def photograph(path, pixels=RGB, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def test_photograph_and_metadata(tmp_path):
    path = photograph(tmp_path / "a.png", icc_profile=b"profile", dpi=(300, 300))
    item = LoadImageFiled(keys="image")({"image": path, "case": "a"})
    assert set(item) == {"image", "case"}
    image = item["image"]
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(RGB, -1, 0) / np.float32(255))
    np.testing.assert_array_equal(image.affine, np.eye(4))
    assert image.meta["spatial_shape"].tolist() == [4, 5]
    assert (image.meta["filename_or_obj"], image.meta["notes"]) == (path, "")
    encoding = ImageEncoding.from_meta(image.meta)
    assert (encoding.file_format, encoding.bits, encoding.icc_profile) == ("PNG", 8, b"profile")


def test_a_mixed_folder_can_be_given_one_number_of_channels(tmp_path):
    colour, grey = photograph(tmp_path / "a.png"), photograph(tmp_path / "b.png", RGB[..., 1])
    for channels in (1, 3):
        load = LoadImageFiled(keys=["one", "two"], channels=channels)
        item = load({"one": colour, "two": grey})
        assert item["one"].shape == item["two"].shape == (channels, 4, 5)
        assert all(torch.equal(plane, item["two"][0]) for plane in item["two"])
    with Image.open(colour) as image:
        luma = np.asarray(image.convert("L")) / 255
    found = LoadImageFiled(keys="one", channels=1)({"one": colour})["one"]
    np.testing.assert_allclose(found[0].numpy(), luma, atol=1 / 255)
    with pytest.raises(SettingError, match="1 or 3, got 2"):
        LoadImageFiled(keys="one", channels=2)


def test_alpha_has_its_own_key(tmp_path):
    opaque = photograph(tmp_path / "a.png")
    clear = photograph(tmp_path / "b.png", np.dstack([RGB, RGB[..., 0]]))
    item = LoadImageFiled(keys=["image", "label"])({"image": clear, "label": opaque})
    assert set(item) == {"image", "image_alpha", "label"}
    assert (item["image"].shape, item["image_alpha"].shape) == ((3, 4, 5), (1, 4, 5))
    np.testing.assert_array_equal(item["image_alpha"][0].numpy(), RGB[..., 0] / np.float32(255))
    assert item["image_alpha"].meta["filename_or_obj"] == clear


def test_encoding_survives_a_loader(tmp_path):
    paths = [
        photograph(tmp_path / "a.tif", dpi=(300.5, 150), icc_profile=b"profile"),
        photograph(tmp_path / "b.png"),
    ]
    transform = LoadImageFiled(keys="image")
    alone = [transform({"image": path})["image"] for path in paths]
    loader = DataLoader(Dataset([{"image": path} for path in paths], transform), batch_size=2, num_workers=0)
    together = [item["image"] for item in decollate_batch(next(iter(loader)))]
    for one, two in zip(alone, together, strict=True):
        assert ImageEncoding.from_meta(two.meta) == ImageEncoding.from_meta(one.meta)
        assert two.meta["notes"] == one.meta["notes"]
    assert ImageEncoding.from_meta(together[0].meta).dpi == (300.5, 150)


def test_photographs_that_fail_say_why(tmp_path):
    transform = LoadImageFiled(keys=["image", "label"], allow_missing_keys=True)
    assert transform({"case": "a"}) == {"case": "a"}
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a.png: not a PNG"):
        transform({"image": tmp_path / "a.png"})


def test_an_image_is_called_by_its_file_else_by_its_key():
    meta = {"filename_or_obj": "C:\\scans\\jane_doe\\a.png"}
    assert loaded_name(MetaTensor(torch.zeros(1), meta=meta), "image") == "a.png"
    assert loaded_name(torch.zeros(1), "image") == loaded_name(MetaTensor(torch.zeros(1)), "image") == "image"
