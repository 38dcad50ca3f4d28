"""prepare.py: images, videos, NIfTI and arrays: orientation, aspect, depth and intensities."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import load, nifti, phantom, prepare_main, series, video
from PIL import Image

import prepare
from prepare import read_any


# ---- pixels ---------------------------------------------------------------------------------------------------------
def test_longer_side_fills_the_square_and_the_rest_is_centred_zeros(tmp_path):
    image = np.full((100, 50), 200, np.uint8)
    image[:20] = 100
    Image.fromarray(image).save(tmp_path / "a.png")
    modality, x = read_any(tmp_path / "a.png", size=64)
    assert modality == "xray" and x.shape == (1, 64, 64, 1) and x.dtype == np.uint8
    assert (x[0, 16:, 16:48, 0] == 200).all() and not x[0, :, :16].any() and not x[0, :, 48:].any()


def test_every_slice_of_a_volume_reaches_the_result():
    """Plain trilinear 300 -> 64 would read 128 slices; the antialiased one gives each slice the same share."""
    for k in (0, 1, 77, 150, 299):
        voxels = np.zeros((4, 4, 300), np.float32)
        voxels[:, :, k] = 1000.0
        x = prepare.volume_to_array(prepare.Volume(voxels - 1000, np.eye(4)), "ct", 4, 64, set())
        assert x.sum().item() == pytest.approx(16 * 0.5 * 64 / 300, rel=0.5 if k in (0, 1, 299) else 0.15)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "PIR", "ASL", "SRA", "IPL"])
def test_one_orientation_for_every_axis_order(tmp_path, codes):
    """H to the back, W to the patient's left, S to the head: the ball at the right lies at small W, and so on."""
    hu, affine = phantom()
    image = nib.Nifti1Image(hu, affine)
    order = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    image = image.as_reoriented(order)
    _, x = read_any(nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine), "ct", size=48, slices=16)
    x = x[0].astype(np.float32) * 2000 - 1000  # (H, W, S) in HU
    right, front, top = (np.argwhere(np.abs(x - value) < 30).mean(axis=0) for value in (900, 600, 300))
    middle = np.array([23.5, 23.5, 7.5])
    assert right[1] < middle[1] - 8 and abs(right[0] - middle[0]) < 3, "patient's right is the image's left"
    assert front[0] < middle[0] - 8 and abs(front[2] - middle[2]) < 2, "the front is up"
    assert top[2] > middle[2] + 3 and abs(top[1] - middle[1]) < 3, "the head is the last slice"
    _, plain = read_any(nifti(tmp_path / "b.nii.gz", hu, affine), "ct", size=48, slices=16)
    assert np.array_equal(plain, (x + 1000).astype(np.float16) / 2000) or np.abs(plain[0] * 2000.0 - 1000 - x).max() < 2


@pytest.mark.parametrize("codes", ["LPS", "RAI", "LSA", "LIP", "PSL", "AIR"], ids=str)
def test_a_series_and_its_nifti_twin_give_the_same_array(tmp_path, codes):
    """Axial, coronal and sagittal, both directions; file names and InstanceNumber lie about the order."""
    hu, affine = phantom()
    image = nib.Nifti1Image(hu, affine)
    order = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    image = image.as_reoriented(order)
    voxels = np.asarray(image.dataobj)
    _, twin = read_any(nifti(tmp_path / "a.nii.gz", voxels, image.affine), "ct", size=32, slices=16)
    modality, x = read_any(series(tmp_path / "series", voxels, image.affine), size=32, slices=16)
    assert modality == "ct" and np.array_equal(x, twin)


def test_a_single_slice_is_an_image_with_the_head_up(tmp_path):
    hu, affine = phantom()
    for name, voxels in {"axial": hu[:, :, 8:9], "coronal": hu[:, 10:11], "flat": hu[:, :, 8]}.items():
        x = read_any(nifti(tmp_path / f"{name}.nii.gz", voxels, affine), "ct", size=64)[1]
        assert x.shape == (1, 64, 64, 1)
        right = np.argwhere(np.abs(x[0, :, :, 0] * 2000.0 - 1900) < 30).mean(axis=0)
        assert right[1] < 20 and abs(right[0] - 31.5) < 4, name
        top = np.argwhere(np.abs(x[0, :, :, 0] * 2000.0 - 1300) < 30)
        assert name != "coronal" or top.mean(axis=0)[0] < 24


def test_pixels_keep_their_aspect_in_mm(tmp_path):
    hu = np.zeros((40, 20, 10), np.int16)
    hu[:, :, 0] = -500
    _, x = read_any(nifti(tmp_path / "a.nii", hu, np.diag([1.0, 2.0, 5.0, 1.0]), packed=False), "ct", size=32, slices=8)
    assert (x[..., 4:] == 0.5).all() and (x[..., 0] > 0.2).all(), "20 rows of 2 mm are as long as 40 columns of 1 mm: no padding"


def test_nifti_scale_byte_order_version_and_mr_window(tmp_path):
    hu, affine = phantom()
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, affine), "ct", size=32, slices=16)[1]
    image = nib.Nifti1Image(((hu + 3000) / 2).astype(">i2"), affine)
    header = image.header.as_byteswapped(">")
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = 2.0, -3000.0, 352, b"n+1"
    (tmp_path / "big.nii").write_bytes(header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F"))
    (tmp_path / "two.nii").write_bytes(nib.Nifti2Image(hu, affine).to_bytes())
    for name in ("big.nii", "two.nii"):
        assert np.abs(read_any(tmp_path / name, "ct", size=32, slices=16)[1].astype(float) - want).max() < 1e-3, name
    ramp = np.linspace(0, 5000, 16 ** 3).reshape(16, 16, 16).astype(np.float32)
    ramp[3, 3, 3] = np.nan
    x = read_any(nifti(tmp_path / "mr.nii.gz", ramp, np.eye(4)), "mri", size=16, slices=16)[1]
    assert 0.003 < (x == 0).mean() < 0.01 and 0.003 < (x == 1).mean() < 0.01, "0.5 % on each side is clipped"


def stretched(x):
    low, high = np.percentile(x, (0.5, 99.5))
    return np.clip((x - low) / (high - low), 0, 1)


def test_sixteen_bit_alpha_palette_cmyk_and_rotated_images(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    x = read_any(tmp_path / "deep.png", size=64)[1]
    assert x.dtype == np.float16 and np.abs(x[0, :, :, 0] - stretched(ramp)).max() < 1e-3
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[:32] = (200, 100, 50)
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    image = Image.fromarray(rgb)
    rgba = np.dstack([rgb, np.where(np.arange(64) < 32, 255, 0) * np.ones((64, 1))]).astype(np.uint8)
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


def test_frames_of_a_video_are_drawn_at_random_but_reproducibly_and_in_order(tmp_path):
    x = read_any(video(tmp_path / "a.avi", 25), frames=8, size=32)[1]
    levels = x[0, 16, 16].astype(int) / 10  # the frame numbers drawn
    assert x.shape == (3, 32, 32, 8) and (np.diff(levels) > 0.5).all() and levels.max() > 12
    assert np.array_equal(x, read_any(tmp_path / "a.avi", frames=8, size=32)[1])
    draws = np.array([prepare.sample_frames(50, 5, seed, set()) for seed in range(2000)])
    assert np.abs(np.bincount(draws.ravel(), minlength=50) / 200 - 1).max() < 0.35, "each frame as likely as any other"
    assert prepare.sample_frames(3, 7, 0, set()) == [0, 0, 0, 1, 1, 2, 2]
    assert read_any(video(tmp_path / "b.mp4", 3, codec="mpeg4"), frames=6, size=32)[1].shape == (3, 32, 32, 6)


# ---- two-dimensional pixels ------------------------------------------------------------------------------------------
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
    nifti(tmp_path / "data/below.nii.gz", np.arange(-3000, -3000 + 729, dtype=np.int16).reshape(9, 9, 9), np.eye(4))
    hu, affine = phantom()
    for path in series(tmp_path / "data/nan", hu, affine).iterdir():
        ds = pydicom.dcmread(path)
        ds.RescaleSlope = "nan"
        ds.save_as(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct")
    x = load(kept["one.tif"])
    assert list(kept) == ["one.tif"] and np.isfinite(x).all() and x[0, 56, 56, 0] < 0.1
    assert "set to the background" in (tmp_path / "cache/x/sources.csv").read_text()
    assert all(reason.startswith("blank") for path, reason in rejected.items() if "nan/" not in path)
    assert all(reason == "rescale is not finite" for path, reason in rejected.items() if "nan/" in path)
    assert len(rejected) == 4 + 16


def test_a_thumbnail_is_no_second_frame(tmp_path):
    pages = [Image.fromarray(np.eye(size, dtype=np.uint8) * 200) for size in (64, 16)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert read_any(tmp_path / "a.tif", size=64)[1].shape == (1, 64, 64, 1)
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[:1] * 3)
    assert read_any(tmp_path / "b.tif", size=64, frames=4)[1].shape == (3, 64, 64, 4)


