from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from medsr.errors import OutputError
from medsr.io import image_writing as module
from medsr.io.image_encoding import ImageEncoding
from medsr.io.image_writing import write_image
from medsr.io.images import read_image
from PIL import Image, PngImagePlugin

RAMP = np.linspace(0, 1, 70, dtype=np.float32).reshape(1, 7, 10)
PLAIN = ImageEncoding("PNG", 8, 1)


def refused(fragment, *arguments, **options):
    with pytest.raises(OutputError, match=fragment) as caught:
        write_image(*arguments, **options)
    assert "\n" not in str(caught.value)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# --- What is written --------------------------------------------------------------------------------------


@st.composite
def stored_pixels(draw):
    bits, channels, alpha = draw(st.sampled_from([(8, 1, 0), (8, 1, 1), (8, 3, 0), (8, 3, 1), (16, 1, 0)]))
    shape = (channels + alpha, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return bits, alpha, draw(arrays(np.uint8 if bits == 8 else np.uint16, shape))


@given(stored_pixels(), st.sampled_from([".png", ".tif", ".TIFF"]))
@settings(max_examples=15, deadline=None)
def test_what_is_written_comes_back(pixels, suffix):
    bits, alpha, stored = pixels
    values = (stored / np.float32(2**bits - 1)).astype(np.float32)
    channels = len(stored) - alpha
    with tempfile.TemporaryDirectory() as folder:
        opacity = values[channels:] if alpha else None
        path = Path(folder) / f"a{suffix}"
        write_image(path, values[:channels], ImageEncoding("PNG", bits, channels), alpha=opacity)
        image = read_image(path)
        assert listing(Path(folder)) == [path.name]
    assert (image.encoding.bits, image.encoding.channels) == (bits, channels)
    assert image.encoding.file_format == ("PNG" if suffix == ".png" else "TIFF")
    np.testing.assert_array_equal(image.values, values[:channels])
    if alpha:
        np.testing.assert_array_equal(image.alpha, values[channels:])
    else:
        assert image.alpha is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_level_comes_back(tmp_path, suffix, bits):
    stored = np.arange(2**bits).reshape(1, -1, 16)
    values = (stored / (2**bits - 1)).astype(np.float32)
    path = write_image(tmp_path / f"a{suffix}", values, ImageEncoding("PNG", bits, 1))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), stored[0])
    np.testing.assert_array_equal(read_image(path).values, values)


def test_values_are_clipped_and_rounded_to_even(tmp_path):
    values = np.array([[[-1, -0.2, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1.001, 9]]])
    path = write_image(tmp_path / "a.png", values, PLAIN)
    assert np.asarray(Image.open(path)).tolist() == [[0, 0, 0, 2, 2, 255, 255]]


@pytest.mark.parametrize(("bits", "top"), [(1, 255), (8, 255), (10, 65535), (12, 65535), (16, 65535)])
def test_bit_depth_follows_the_input(tmp_path, bits, top):
    path = write_image(tmp_path / "a.png", RAMP, ImageEncoding("DICOM", bits, 1))
    written = np.asarray(Image.open(path))
    assert written.dtype == (np.uint8 if top == 255 else np.uint16)
    np.testing.assert_array_equal(written, np.rint(RAMP[0].astype(np.float64) * top))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_any_floating_point_type(tmp_path, dtype):
    values = np.repeat((RAMP > 0.5).astype(dtype), 3, axis=0)
    path = write_image(tmp_path / "a.png", values, PLAIN)
    np.testing.assert_array_equal(read_image(path).values, values)


def test_more_rows_than_are_converted_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 3)
    stored = np.random.default_rng(0).integers(0, 256, (3, 10, 4), dtype=np.uint8)
    values = stored / np.float32(255)
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_image(write_image(tmp_path / name, values, PLAIN)).values, values)
    values[0, 8, 1] = np.nan
    refused("1 of 120 values", tmp_path / "b.png", values, PLAIN)


def test_a_result_may_be_larger_than_the_limit_for_foreign_files(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, RAMP, PLAIN)
    monkeypatch.undo()
    for name in ("a.png", "a.tif"):
        assert read_image(tmp_path / name).values.shape == RAMP.shape


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_profile_and_resolution_are_kept_and_nothing_else(tmp_path, suffix, marker):
    block = Image.Exif()
    block[0x010E] = block[0x9286] = marker
    source = tmp_path / "source.jpg"
    Image.new("RGB", (10, 7)).save(
        source, exif=block, icc_profile=b"profile", dpi=(100, 50), comment=marker.encode()
    )
    assert marker.encode() in source.read_bytes()
    encoding = read_image(source).encoding.magnified(4)
    path = write_image(tmp_path / f"a{suffix}", np.repeat(RAMP, 3, axis=0), encoding)
    assert marker.encode() not in path.read_bytes()
    with Image.open(path) as image:
        assert image.info["icc_profile"] == b"profile"
        assert image.info["dpi"] == pytest.approx((400, 200), abs=0.02)
        assert not set(image.info) & {"exif", "comment", "Software", "Description"}
    # A colour profile does not fit a grey map of the same case.
    write_image(path, RAMP, encoding)
    assert read_image(path).encoding.icc_profile is None


def test_gamma_and_primaries_of_a_png_are_kept_in_a_png(tmp_path):
    colours = {"cHRM": bytes(range(32)), "gAMA": (100000).to_bytes(4, "big"), "cICP": bytes([9, 16, 0, 1])}
    info = PngImagePlugin.PngInfo()
    for name, content in colours.items():
        info.add(name.encode(), content)
    info.add(b"sBIT", bytes([5, 5, 5]))
    Image.new("RGB", (10, 7)).save(tmp_path / "source.png", pnginfo=info)
    encoding = read_image(tmp_path / "source.png").encoding
    assert dict(encoding.png_colour) == colours
    values = np.repeat(RAMP, 3, axis=0)
    assert (
        read_image(write_image(tmp_path / "a.png", values, encoding)).encoding.png_colour
        == encoding.png_colour
    )
    with Image.open(write_image(tmp_path / "a.png", values, encoding)) as image:
        assert image.info["gamma"] == 1
    # TIFF has no such entries, and a grey map of the case has other colours.
    assert not read_image(write_image(tmp_path / "a.tif", values, encoding)).encoding.png_colour
    assert not read_image(write_image(tmp_path / "a.png", RAMP, encoding)).encoding.png_colour


def test_equal_input_gives_equal_bytes(tmp_path):
    for suffix in (".png", ".tif"):
        first, second = (write_image(tmp_path / f"{n}{suffix}", RAMP, PLAIN).read_bytes() for n in ("a", "b"))
        assert first == second


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(tmp_path, value):
    bad = RAMP.copy()
    bad[0, 1, 1] = value
    (tmp_path / "a.png").write_text("old")
    refused("1 of 70 values are NaN or infinite", tmp_path / "a.png", bad, PLAIN)
    refused("1 of 140 values are NaN or infinite", tmp_path / "a.png", RAMP, PLAIN, alpha=bad)
    assert listing(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_refuses_what_the_file_cannot_hold(tmp_path):
    deep = ImageEncoding("PNG", 16, 1)
    refused("written as .png, .tif or .tiff", tmp_path / "a.jpg", RAMP, PLAIN)
    refused("has shape", tmp_path / "a.png", RAMP[0], PLAIN)
    refused("has shape", tmp_path / "a.png", np.repeat(RAMP, 2, axis=0), PLAIN)
    refused("has shape", tmp_path / "a.png", RAMP[:, :0], PLAIN)
    refused("alpha has shape", tmp_path / "a.png", RAMP, PLAIN, alpha=RAMP[:, 1:])
    refused("must be floating-point", tmp_path / "a.png", (RAMP * 255).astype(np.uint8), PLAIN)
    refused("only for grey without alpha", tmp_path / "a.png", np.repeat(RAMP, 3, axis=0), deep)
    refused("only for grey without alpha", tmp_path / "a.png", RAMP, deep, alpha=RAMP)
    refused("no such folder", tmp_path / "none" / "a.png", RAMP, PLAIN)
    huge = ImageEncoding("PNG", 8, 1, dpi=(1e30, 1e30))
    refused("PNG cannot hold this image", tmp_path / "a.png", RAMP, huge)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("damage", ["flip", "cut", "other", "smaller"])
def test_damage_while_writing_is_noticed(tmp_path, monkeypatch, name, damage):
    """Stands for a storage that loses or changes bytes without reporting it."""
    real = module._verify

    def damaged(temporary, *arguments):
        data = bytearray(temporary.read_bytes())
        if damage == "flip":
            place = data.index(b"IDAT") + 12 if name == "a.png" else 12
            data[place] ^= 1
        elif damage == "cut":
            data = data[: len(data) // 2]
        else:
            other = Image.new("L", (10, 7 if damage == "other" else 6))
            other.save(temporary, format="PNG" if name == "a.png" else "TIFF")
            data = temporary.read_bytes()
        temporary.write_bytes(data)
        real(temporary, *arguments)

    monkeypatch.setattr(module, "_verify", damaged)
    refused("nothing was saved", tmp_path / name, RAMP, PLAIN)
    assert listing(tmp_path) == []


DISK_FULL = """
import resource, sys
import numpy as np
from medsr.errors import OutputError
from medsr.io.image_writing import write_image
from medsr.io.image_encoding import ImageEncoding
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).random((3, 200, 200), dtype=np.float32)
for name in ("a.png", "b.tif"):
    try:
        write_image(sys.argv[1] + "/" + name, noise, ImageEncoding("PNG", 8, 3))
    except OutputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_nothing_behind(tmp_path):
    (tmp_path / "b.tif").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.png", "b.tif"]
    assert all("cannot be written" in line for line in lines)
    assert listing(tmp_path) == ["b.tif"]
    assert (tmp_path / "b.tif").read_text() == "old"
