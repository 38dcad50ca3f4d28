"""prepare.py: real files and broken ones, every public layout, orientation, resume, and no patient's name."""
import contextlib
import csv
import faulthandler
import gzip
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

import prepare
from prepare import UserError, load_sample, read_any, read_samples
from tests import phantoms

ROOT = Path(__file__).parents[1]
SPOT = np.eye(9, dtype=np.uint8)  # a picture that is not blank
WHEEL = Path(pydicom.__file__).parent / "data/test_files"
SOP = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "CR": "1.2.840.10008.5.1.4.1.1.1",
       "DX": "1.2.840.10008.5.1.4.1.1.1.1", "US": "1.2.840.10008.5.1.4.1.1.6.1", "USM": "1.2.840.10008.5.1.4.1.1.3.1"}


# ---- makers of small files ------------------------------------------------------------------------------------------
def dicom(path, pixels, modality="CR", syntax=ExplicitVRLittleEndian, **tags):
    """A DICOM file of a patient whose name must never be seen anywhere."""
    secret = {"PatientName": "SECRETNAME^ANNA", "PatientID": "SECRETID77", "PatientBirthDate": "19610503",
              "Modality": modality, "BodyPartExamined": "CHEST", "BurnedInAnnotation": "NO"}
    return phantoms.dicom(path, pixels, SOP.get(modality, SOP["CR"]), syntax, **secret | tags)


def series(folder, hu, affine, slope=1.0, intercept=-1024.0, modality="CT", skip=(), uid="", **tags):
    """Voxels (i, j, k) with a RAS+ affine as a DICOM series along k: shuffled names, misleading InstanceNumber."""
    lps, own = np.diag([-1, -1, 1, 1]) @ affine, generate_uid()
    names = np.random.default_rng(0).permutation(hu.shape[2])
    for k in range(hu.shape[2]):
        if k in skip:
            continue
        stored = np.round((hu[:, :, k].T - intercept) / slope).astype(np.int16)  # (rows = j, columns = i)
        place = lps @ [0, 0, k, 1]
        spacing = np.linalg.norm(lps[:3, :2], axis=0)
        dicom(folder / f"IM{names[k]:04d}", stored, modality, RescaleSlope=str(slope), RescaleIntercept=str(intercept),
              SeriesInstanceUID=uid or own, InstanceNumber=str(int(names[k])), PixelSpacing=[float(x) for x in spacing[::-1]],
              ImageOrientationPatient=[*map(float, lps[:3, 0] / spacing[0]), *map(float, lps[:3, 1] / spacing[1])],
              ImagePositionPatient=[float(f"{x:.6f}") for x in place[:3]], **tags)
    return folder


def nifti(path, voxels, affine, packed=True):
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), 1) if packed else image.to_bytes())
    return path


def video(path, frames=20, size=(64, 48), codec="mjpeg"):
    """A clip whose grey level is its frame number times 10."""
    levels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10 % 250
    iio.imwrite(path, np.broadcast_to(levels, (frames, size[1], size[0], 3)), plugin="pyav", codec=codec, fps=25,
                out_pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p")
    return path


def phantom(n=(24, 20, 16)):
    """HU voxels (x, y, z), RAS+: x to the patient's right, y to the front, z to the head; a bright ball at each end."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, k) for k in n), indexing="ij")
    hu = np.where(x ** 2 + y ** 2 + z ** 2 < 0.9, 0.0, -1000.0)
    for centre, value in (((0.6, 0, 0), 900), ((0, 0.6, 0), 600), ((0, 0, 0.6), 300)):
        hu[sum((a - c) ** 2 for a, c in zip((x, y, z), centre)) < 0.03] = value
    return np.round(hu).astype(np.int16), np.diag([2.0, 2.5, 3.0, 1.0])


def command(monkeypatch, *args):
    """Run prepare.py in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    prepare.main()


def prepare_main(monkeypatch, tmp, *args, name="x", code=0):
    """Run prepare.py into tmp/cache/name -> ({path: row of samples.csv}, {path: reason})."""
    with pytest.raises(UserError) if code else contextlib.nullcontext():
        command(monkeypatch, *args, "--out", tmp / "cache", "--workers", 2, "--name", name)
    folder = tmp / "cache" / name
    with open(folder / "rejected.csv", newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    with open(folder / "sources.csv", newline="") as file:
        paths = {row["id"]: row["path"] for row in csv.DictReader(file)}
    rows = read_samples(folder) if not code else []
    return {paths[row["id"]]: row for row in rows}, rejected


def load(row):
    return load_sample(row["folder"], row)


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
        x = prepare.volume_to_array(voxels - 1000, np.eye(4), 1.0, 0.0, "ct", 4, 64)
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


def test_hounsfield_units_of_a_known_file(tmp_path):
    ds = pydicom.dcmread(WHEEL / "CT_small.dcm")
    hu = ds.pixel_array.astype(float) * ds.RescaleSlope + ds.RescaleIntercept
    ds.PhotometricInterpretation, ds.WindowWidth = "MONOCHROME1", ["", "400"]  # which change no Hounsfield unit
    ds.save_as(tmp_path / "inverse.dcm")
    for path in (WHEEL / "CT_small.dcm", tmp_path / "inverse.dcm"):
        modality, x = read_any(path, size=128)  # 128 x 128 already
        assert modality == "ct" and np.abs(x[0, :, :, 0] * 2000.0 - 1000 - hu.clip(-1000, 1000)).max() < 1


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

    files = [pydicom.dcmread(path) for path in sorted(series(tmp_path / "plain", hu, affine).iterdir())]  # shuffled
    frames = np.stack([ds.pixel_array for ds in files])
    shared, per_frame = Dataset(), []
    pixel, plane = Dataset(), Dataset()
    pixel.PixelSpacing, plane.ImageOrientationPatient = files[0].PixelSpacing, files[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([pixel]), Sequence([plane])
    for ds in files:
        item, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, scale.RescaleSlope, scale.RescaleIntercept = ds.ImagePositionPatient, 1, -1024
        item.PlanePositionSequence, item.PixelValueTransformationSequence = Sequence([place]), Sequence([scale])
        per_frame.append(item)
    path = dicom(tmp_path / "enhanced.dcm", frames, "CT", SeriesInstanceUID=generate_uid(),
                 SharedFunctionalGroupsSequence=Sequence([shared]),
                 PerFrameFunctionalGroupsSequence=Sequence(per_frame))
    assert np.array_equal(read_any(path, size=32, slices=16)[1], want)


def test_xray_windows_inversion_padding_and_depth(tmp_path):
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    window = {"WindowCenter": "2048", "WindowWidth": "1024", "BitsStored": 12, "HighBit": 11}

    def show(pixels=ramp, **tags):
        return read_any(dicom(tmp_path / "a.dcm", pixels, **tags), size=64)[1][0, :, :, 0].astype(float)

    want = np.clip((ramp - 2047.5) / 1023 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert np.abs(show(**window) - want).max() < 1e-3
    assert np.abs(show(**window, PhotometricInterpretation="MONOCHROME1") - (1 - want)).max() < 1e-3
    assert np.abs(show(**window, syntax=ExplicitVRBigEndian) - want).max() < 1e-3
    low, high = np.percentile(ramp, (0.5, 99.5))
    assert np.abs(show(BitsStored=12, HighBit=11) - np.clip((ramp - low) / (high - low), 0, 1)).max() < 1e-3
    padded = np.where(np.arange(64) < 8, 65535, ramp).astype(np.uint16)
    x = show(pixels=padded, PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    assert (x[:, :8] == 0).all(), "padding stays black"
    assert x[:, 8:].max() == 1 and x[-1, 8:].max() < 0.1, "the rest is inverted"
    assert read_any(dicom(tmp_path / "b.dcm", (ramp // 16).astype(np.uint8)))[1].dtype == np.uint8


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
    draws = np.array([prepare.draw(50, 5, seed) for seed in range(2000)])
    assert np.abs(np.bincount(draws.ravel(), minlength=50) / 200 - 1).max() < 0.35, "each frame as likely as any other"
    assert prepare.draw(3, 7, 0) == [0, 0, 0, 1, 1, 2, 2]
    assert read_any(video(tmp_path / "b.mp4", 3, codec="mpeg4"), frames=6, size=32)[1].shape == (3, 32, 32, 6)


# ---- bad inputs, each with its reason ------------------------------------------------------------------------------------
def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    return path


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def nifti_with(path, **fields):
    header = nib.Nifti1Header()
    header.set_data_shape((10, 10, 10))
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"], header["sform_code"] = 352, b"n+1", 1
    header["srow_x"], header["srow_y"], header["srow_z"] = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + bytes(4) + np.arange(1000, dtype="<i2").tobytes())


def png_claiming(path, side):
    """A PNG of side x side pixels in a few bytes: the image decompression bomb."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    body = zlib.compress(bytes((side + 1) * 16))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def deflated_bomb(path):
    ds = pydicom.dcmread(WHEEL / "image_dfl.dcm")
    meta = (WHEEL / "image_dfl.dcm").read_bytes()[:144 + ds.file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, wbits=-15)
    path.write_bytes(meta + b"".join(packer.compress(bytes(1 << 24)) for _ in range(2)) + packer.flush())


NOISE = np.random.default_rng(0).integers(0, 99, (20, 40, 40), np.int16)
BAD = {  # name: (maker, expected reason; "" = kept)
    "empty.dcm": (lambda p: p.touch(), "empty, locked"),
    "empty.nii.gz": (lambda p: p.touch(), "empty, locked"),
    "page.dcm": (lambda p: p.write_text("<html>login</html>" * 99), "not a DICOM"),
    "page.nii.gz": (lambda p: p.write_text("<html>login</html>" * 99), "not a NIfTI file"),
    "page.png": (lambda p: p.write_text("<html>login</html>" * 99), "UnidentifiedImageError"),
    "page.mp4": (lambda p: p.write_text("<html>login</html>" * 99), "cannot be decoded: .*pyav"),
    "text.txt": (lambda p: p.write_text("notes"), "not a DICOM, NIfTI, image or video file"),
    "cutpixels.dcm": (lambda p: cut(dicom(p, np.zeros((64, 64), np.uint16)), 0.7), r"less than expected \(\d+ vs 8192 bytes"),
    "cutjpeg.dcm": (lambda p: (shutil.copy(WHEEL / "MR_small_RLE.dcm", p), cut(p, 0.9)),
                    "no pixel data to decode"),
    "cutheader.dcm": (lambda p: p.write_bytes((WHEEL / "CT_small.dcm").read_bytes()[:401]), "cannot be decoded|no image"),
    "nosyntax.dcm": (lambda p: shutil.copy(WHEEL / "meta_missing_tsyntax.dcm", p),
                     "TransferSyntaxUID|no image"),
    "plan.dcm": (lambda p: shutil.copy(WHEEL / "rtplan.dcm", p), r"no image \(RT Plan Storage\)"),
    "report.dcm": (lambda p: shutil.copy(WHEEL / "reportsi.dcm", p), "no image"),
    "DICOMDIR": (lambda p: shutil.copy(WHEEL / "dicomdirtests/DICOMDIR", p), "no image"),
    "huge.dcm": (lambda p: dicom(p, np.zeros((8, 8), np.uint16), Rows=65535, Columns=65535), "less than expected"),
    "frames.dcm": (lambda p: dicom(p, np.zeros((2, 8, 8), np.uint8), "US", NumberOfFrames=str(2 ** 31 - 1)),
                   "timed out|cannot be decoded"),
    "noframes.dcm": (lambda p: dicom(p, SPOT, "US", NumberOfFrames="0"), ""),
    "bomb.dcm": (deflated_bomb, "timed out|no image|cannot be decoded"),
    "deflated.dcm": (lambda p: shutil.copy(WHEEL / "image_dfl.dcm", p), ""),
    "oneslice.dcm": (lambda p: shutil.copy(WHEEL / "CT_small.dcm", p), "1 slices of this series, size and direction, a volume needs 8"),
    "crc.nii.gz": (lambda p: flip(nifti(p, NOISE, np.eye(4)), 3000), "CRC|error: Error -3"),
    "cut.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4))), "ended before"),
    "trailer.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4)), 0.9995), "ended before|EOFError|struct.error|error"),
    "giant.nii": (lambda p: nifti_with(p, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "buffer is too small"),
    "zero.nii": (lambda p: nifti_with(p, dim=[3, 10, 0, 10, 1, 1, 1, 1]), "cannot be used"),
    "negative.nii": (lambda p: nifti_with(p, dim=[3, 10, -10, 10, 1, 1, 1, 1]), "cannot be"),
    "5d.nii": (lambda p: nifti_with(p, dim=[5, 10, 10, 2, 1, 5, 1, 1]), "cannot be used"),
    "rgb.nii": (lambda p: nifti_with(p, datatype=128, bitpix=24), "cannot be used"),
    "complex.nii": (lambda p: nifti_with(p, datatype=32, bitpix=64), "cannot be used"),
    "offset.nii": (lambda p: nifti_with(p, vox_offset=0), "cannot be used"),
    "singular.nii": (lambda p: nifti_with(p, srow_x=(0, 0, 0, 0)), "singular affine"),
    "slope.nii": (lambda p: nifti_with(p, scl_slope=np.nan, scl_inter=np.nan), ""),
    "nan.nii.gz": (lambda p: nifti(p, np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), "blank"),
    "4d.nii.gz": (lambda p: nifti(p, NOISE[:12].reshape(20, 20, 16, 3), np.eye(4)), ""),
    "half.jpg": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)), "image file is truncated"),
    "half.png": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)),
                 "image file is truncated|broken"),
    "bomb.png": (lambda p: png_claiming(p, 13000), "169000000 pixels"),
    "half.avi": (lambda p: cut(video(p, 60)), "Invalid data|ends before frame"),
    "half.mp4": (lambda p: cut(video(p, 60, codec="mpeg4")), "cannot be decoded"),
    "three.avi": (lambda p: video(p, 3), ""),
    "script.avi": (lambda p: p.write_text("ffconcat version 1.0\nfile three.avi\n"), "cannot be decoded"),
    "one.gif": (lambda p: Image.fromarray(SPOT).save(p), ""),
    "many.gif": (lambda p: Image.fromarray(SPOT).save(
        p, save_all=True, append_images=[Image.fromarray(SPOT * 40 * i) for i in range(2, 6)]), ""),
    "fifo.dcm": (lambda p: os.mkfifo(p), "no regular file"),
    "folder.dcm": (lambda p: p.mkdir(), None),  # an empty folder is no file
    "dangling.dcm": (lambda p: p.symlink_to("nowhere"), "no regular file"),
    "loop": (lambda p: p.symlink_to(p.parent), "link to a folder"),
    'odd,"name\n.png': (lambda p: Image.fromarray(SPOT).save(p, "PNG"), ""),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """All bad files in one folder, and what one run made of them."""
    tmp = tmp_path_factory.mktemp("bad")
    for name, (make, _) in BAD.items():
        (tmp / "data").mkdir(exist_ok=True)
        make(tmp / "data" / name)
    (tmp / "data" / os.fsdecode(b"latin\xe9.txt")).write_text("no UTF-8 in this name")
    with open(tmp / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("path", "labels", "modality"), ("deflated.dcm", "", "xray"), ("cutjpeg.dcm", "", "xray"),
            *((name, "", "ct") for name in BAD if not name.endswith(".dcm"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SECONDS", 4)
        return tmp, prepare_main(patch, tmp, "folder", tmp / "data", "--labels", tmp / "labels.csv")


@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_is_kept_or_named(bad, name):
    kept, rejected = bad[1]
    expected = BAD[name][1]
    if expected is None:
        assert name not in kept and name not in rejected
    elif expected:
        assert name not in kept and re.search(expected, rejected[name]), rejected.get(name, "kept")
    else:
        assert name in kept and name not in rejected, rejected.get(name)


def test_no_file_disappears(bad):
    tmp, (kept, rejected) = bad
    files = {os.path.join(root, name) for root, _, names in os.walk(tmp / "data") for name in names}
    assert {os.path.relpath(path, tmp / "data") for path in files if "latin" not in path} <= {*kept, *rejected}
    assert any("latin" in path for path in rejected)
    assert load(kept["many.gif"]).shape == (3, 256, 256, 64)


@pytest.mark.parametrize("trouble, expected", [
    ("abort", "decoder crashed (exit code -6)"), ("crash", "decoder crashed (exit code -11)"), ("hang", "timed out (exit code -14)"),
    ("memory", "cannot be decoded: MemoryError"), ("exit", "decoder crashed (exit code 0)"),
    ("panic", "cannot be decoded: KeyboardInterrupt")])
def test_no_decoder_can_end_or_hang_the_run(tmp_path, monkeypatch, trouble, expected):
    real = prepare.decode

    def decode(job, *args, **sizes):
        if job.files == ["3.png"]:
            faulthandler.disable()
            if trouble == "memory":
                np.ones(4 * prepare.MEMORY, np.uint8)
            elif trouble == "panic":
                raise KeyboardInterrupt("SECRETNAME")
            {"abort": os.abort, "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV), "hang": lambda: time.sleep(60),
             "exit": lambda: os._exit(0)}[trouble]()
        return real(job, *args, **sizes)

    monkeypatch.setattr(prepare, "decode", decode)
    monkeypatch.setattr(prepare, "SECONDS", 1)
    monkeypatch.setattr(prepare, "MEMORY", 1 << 29)
    for n in range(6):
        Image.fromarray(SPOT).save(tmp_path / f"{n}.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    assert sorted(kept) == ["0.png", "1.png", "2.png", "4.png", "5.png"] and list(rejected) == ["3.png"]
    assert rejected["3.png"].startswith(expected)


def test_a_full_disk_ends_the_run_and_blames_no_file(tmp_path, monkeypatch):
    Image.fromarray(SPOT).save(tmp_path / "a.png")
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        command(monkeypatch, "folder", tmp_path, "--modality", "xray", "--out", tmp_path / "c")
    left = [name for _, _, names in os.walk(tmp_path / "c") for name in names]
    assert not [name for name in left if "npy" in name or name.endswith("csv")]


def test_guarded_blames_the_item_at_work_and_ends_with_its_parent():
    """Item 2 leaves a thread that kills the process later; 5 kills each child at once."""
    def task(item):
        if item == 2:
            threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGSEGV)), daemon=True).start()
        elif item == 5:
            os._exit(0)
        time.sleep(0.1 * (item == 3))
        return item

    faulthandler.disable()
    answers = dict(prepare.guarded(task, list(range(100)), 1))
    assert {item for item, answer in answers.items() if answer != item} == {5} and len(answers) == 100
    assert isinstance(answers[5], prepare.Refused)
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reader)
        for item, _ in prepare.guarded(lambda item: os.write(writer, b"x") and time.sleep(0.02), list(range(800)), 1):
            if item == 10:
                os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(parent, 0)
    with open(reader, "rb") as made:
        assert len(made.read()) < 20, "an orphan ends at its next answer; read() returns when no writer is left"


# ---- DICOM series ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil, expected", [
    ("gap", "gap of 6.0 mm after slice 7 of 15, others 3.0 mm"), ("few", "5 slices .*, a volume needs 8"), ("none", ""),
    ("duplicate", ""), ("different", "two different slices at one position"), ("cut", "a slice is damaged: IM.* less than expected"),
    ("unplaced", "no ImageOrientationPatient"), ("nouid", "no SeriesInstanceUID")])
def test_a_series_is_whole_or_refused(tmp_path, monkeypatch, spoil, expected):
    hu, affine = phantom()
    folder = series(tmp_path / "data/s", hu, affine, skip={"gap": [7], "few": range(5, 16)}.get(spoil, ()))
    files = sorted(folder.iterdir())
    ds = pydicom.dcmread(files[4])
    if spoil in ("duplicate", "different"):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.PixelData = ds.PixelData if spoil == "duplicate" else bytes(len(ds.PixelData))
        ds.save_as(folder / "again")
    elif spoil == "cut":
        cut(files[4], 0.8)
    elif spoil in ("unplaced", "nouid"):
        for path in files:
            ds = pydicom.dcmread(path)
            del ds["ImageOrientationPatient" if spoil == "unplaced" else "SeriesInstanceUID"]
            ds.save_as(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=int(bool(expected)))
    assert list(kept) == ([] if expected else [f"s/{min(path.name for path in folder.iterdir())}"])
    assert len(rejected) == (len(list(folder.iterdir())) if expected else 0), "every slice of a refused series is named"
    assert all(re.search(expected, reason) for reason in rejected.values())


def test_scouts_other_sizes_phases_and_copies_are_named_and_two_series_are_two_volumes(tmp_path, monkeypatch):
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine)
    for path in list(data.iterdir()):
        path.rename(data / f"a{path.name}")
    series(data, hu // 2, affine, modality="MR")
    some = pydicom.dcmread(data / "aIM0003")
    shutil.copy(data / "aIM0003", data / "copy")
    some.SOPInstanceUID, some.AcquisitionNumber, some.PixelData = generate_uid(), 2, bytes(len(some.PixelData))
    some.save_as(data / "phase")
    some.Rows = some.Rows // 2
    some.save_as(data / "small")
    some.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    some.save_as(data / "scout")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data)
    with open(tmp_path / "cache/x/samples.csv") as file:
        assert sorted(row["modality"] for row in csv.DictReader(file)) == ["ct", "mri"]
    assert set(rejected) == {"phase", "small", "scout"} and rejected["scout"] == "localizer"
    assert "phase" in rejected["phase"] and "needs 8" in rejected["small"]
    assert "aIM0000,duplicate slices dropped" in (tmp_path / "cache/x/sources.csv").read_text()


def test_body_parts_of_messy_tags():
    for text, parts in {"CT ABDOMEN": ["abdomen"], "CT ABD/PEL": ["abdomen", "pelvis"], "CTA CHEST": ["chest"], "CT ANKLE LEFT": ["ankle"],
                        "CHEST": ["chest"], "PORT CHEST": ["chest"], "Abdomen_Pelvis": ["abdomen", "pelvis"],
                        "C_A_P": ["chest", "abdomen", "pelvis"], "CHEST/ABD/PELVIS": ["chest", "abdomen", "pelvis"],
                        "EAR": ["head"],
                        "T SPINE": ["tspine"], "CERVIX": ["pelvis"], "CERVICAL_SPINE": ["cspine"], "RESEARCH": [],
                        "CT Thorax with contrast": ["chest"], "LOCATOR": [], "": [], "EXTREMITY": []}.items():
        assert sorted(prepare.body_parts(text)) == sorted(parts), text
    assert prepare.body_parts("", "UNKNOWN", "MR KNEE LEFT") == ("knee",)


# ---- the whole wheels -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("package, folder", [("pydicom", "data"), ("data_store", "data"), ("nibabel", "tests/data")])
def test_every_file_of_the_wheels_is_kept_or_named(tmp_path, monkeypatch, package, folder):
    source = Path(pytest.importorskip(package).__file__).parent / folder
    monkeypatch.setattr(prepare, "SECONDS", 20)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", source, "--allow-2d", "--modality", "mri",
                                  "--size", "32", "--slices", "8", "--frames", "4")
    for root, _, names in os.walk(source):
        for name in names:
            path = os.path.relpath(os.path.join(root, name), source)
            above = {os.path.dirname(name) for name in kept}  # a series is kept under the name of its first file
            assert path in rejected or path in kept or os.path.dirname(path) in above, path
    assert len(kept) > {"pydicom": 55, "data_store": 24, "nibabel": 4}[package]
    assert not [reason for reason in rejected.values() if not reason]
    for row in kept.values():
        x = load(row)
        assert x.dtype in (np.uint8, np.float16) and np.isfinite(x).all() and x.min() >= 0


# ---- privacy, resume, shards -----------------------------------------------------------------------------------------
SECRETS = (b"SECRETNAME", b"SECRETID77", b"19610503", b"1961", b"Meyer")


def test_nothing_written_names_a_patient(tmp_path, monkeypatch, capfd):
    hu, affine = phantom((12, 10, 9))
    data = tmp_path / "data"
    series(data / "Meyer_1961/ct", hu, affine, StudyDate="19610503", PatientComments="SECRETNAME")
    dicom(data / "Meyer.dcm", SPOT, StudyDescription="SECRETNAME", BurnedInAnnotation="YES")
    path = dicom(data / "bad.dcm", SPOT)
    path.write_bytes(path.read_bytes().replace(b"DA\x08\x0019610503", b"DA\x08\x00SECRETNA").replace(b"PI", b"ZZ"))
    dicom(data / "frames.dcm", SPOT, NumberOfFrames="1")
    path = data / "frames.dcm"
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x001 ", b"IS\x02\x001A"))
    Image.fromarray(SPOT).save(data / "Meyer_19610503.png")
    (tmp_path / "my.key").write_text("0123456789abcdef0123")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--key-file", tmp_path / "my.key")
    out = "".join(capfd.readouterr()).encode()
    assert b"may show names" in out
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.name not in ("sources.csv", "rejected.csv"):
            out += path.name.encode() + path.read_bytes()
    assert not [secret for secret in SECRETS if secret in out]
    rejected = (tmp_path / "cache/x/rejected.csv").read_bytes()
    assert b"Meyer_19610503.png,modality unknown" in rejected
    for name in ("sources.csv", "rejected.csv"):
        assert stat.S_IMODE((tmp_path / "cache/x" / name).stat().st_mode) == 0o600


def test_ids_depend_on_the_key_and_patients_are_hashed(tmp_path, monkeypatch):
    for n in range(2):
        dicom(tmp_path / f"data/{n}.dcm", SPOT)
    ids = {}
    key = ["--key-file", tmp_path / "keys/new.key"]
    for name, args in {"a": [], "b": key, "c": key}.items():
        kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args, name=name)
        assert len({row["patient"] for row in kept.values()}) == 1 and kept["0.dcm"]["labels"] == ("chest",)
        ids[name] = [row["id"] for row in kept.values()] + [kept["0.dcm"]["patient"]]
    assert ids["a"] != ids["b"] == ids["c"] and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids["b"])
    assert stat.S_IMODE((tmp_path / "keys/new.key").stat().st_mode) == 0o600


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".tmp"}


def many(folder, n=60):
    folder.mkdir()
    for k in range(n):
        noise = np.random.default_rng(k).integers(0, 255, (150, 200), np.uint8)
        Image.fromarray(noise).save(folder / f"{k:03d}.png")
    hu, affine = phantom()
    for k in range(6):
        nifti(folder / f"{k}.nii.gz", hu + k, affine)
    (folder / "broken.png").write_bytes(b"no image")


def start(source, out):
    """A child process that prepares `source`, as the command line would."""
    pid = os.fork()
    if not pid:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            prepare.tqdm.set_lock(threading.RLock())  # its own one is shared: who is killed with it stops all
            sys.argv = ["prepare.py", "folder", str(source), "--modality", "ct", "--out", str(out), "--name", "x"]
            prepare.main()
        finally:
            os._exit(0)
    return pid


def test_kill_at_random_moments_then_resume_is_byte_for_byte_the_same(tmp_path):
    many(tmp_path / "data")
    os.waitpid(start(tmp_path / "data", tmp_path / "whole"), 0)
    cache, made, kills = tmp_path / "cut/x", {}, 0
    for k in range(9):
        pid, rng = start(tmp_path / "data", tmp_path / "cut"), random.Random(k)
        while k < 8 and len(list(cache.glob("*.npy"))) < 7 * (k + 1):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        if k < 8:
            os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        time.sleep(0.3)  # children notice that they are orphans
        done = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
        assert made.items() <= done.items(), "finished work was lost, or done again"
        made = done
    assert kills >= 6 and len(made) == 66 and tree(cache) == tree(tmp_path / "whole/x")


def test_shards_together_are_the_whole(tmp_path, monkeypatch, capsys):
    many(tmp_path / "data", 12)
    args = ["folder", tmp_path / "data", "--modality", "ct"]
    prepare_main(monkeypatch, tmp_path, *args, name="whole")
    for name, shards in (("zero", ["0/2", "1/2"]), ("one", ["1/3", "2/3", "3/3"])):
        for part in shards:
            command(monkeypatch, *args, "--name", name, "--out", tmp_path / "cache", "--shard", part)
            assert not (tmp_path / "cache" / name / "samples.csv").exists()
        kept, rejected = prepare_main(monkeypatch, tmp_path, *args, name=name)
        assert len(kept) == 18 and list(rejected) == ["broken.png"]
        assert tree(tmp_path / "cache" / name) == tree(tmp_path / "cache/whole")


def test_reading_a_cache_names_the_file_and_the_remedy(tmp_path, monkeypatch):
    Image.fromarray(SPOT).save(tmp_path / "a.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    row, path = kept["a.png"], tmp_path / "cache/x" / f"{kept['a.png']['id']}.npy"
    assert prepare.CachedDataset([row])[0].shape == (1, 256, 256, 1)
    for spoil in (lambda: np.save(path, np.zeros((1, 2, 2, 1), np.uint8)), lambda: cut(path),
                  lambda: np.save(path, np.array([{}]), allow_pickle=True), path.unlink):
        spoil()
        with pytest.raises(UserError, match=f"{row['id']}.*delete it and run prepare.py again"):
            load(row)
    for table in (None, "", "id,shape\n", "a,b\n1,2\n", "id,modality,labels,patient,split,shape\n1,x,,,,axb\n"):
        (tmp_path / "samples.csv").unlink(missing_ok=True)
        if table is not None:
            (tmp_path / "samples.csv").write_text(table)
        with pytest.raises(UserError, match="samples.csv.*prepare.py"):
            read_samples(tmp_path)


@pytest.mark.parametrize("args, message", [
    (["folder", "nowhere"], "nowhere: no such folder"), (["folder", "empty"], "holds no files"),
    (["folder"], "no such folder"), (["chestxray14", "empty"], "Data_Entry_2017"),
    (["folder", "text"], "nothing in text could be read"),
    (["folder", "text", "--labels", "no.csv"], "no.csv: no such file"),
    (["kvasir_capsule", "text"], "holds no CLASS/VIDEO_FRAME.jpg"),
    (["folder", "text", "--out", "text/a.txt"], "cannot write"), (["folder", "text", "--key-file", "text"], "16 bytes"),
    (["folder", "text", "--key-file", "fifo"], "16 bytes"), (["folder", "text", "--labels", "fifo"], "no such file"),
    (["folder", "fifo"], "no such folder")])
def test_wrong_usage_names_the_thing_and_the_remedy(tmp_path, monkeypatch, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        command(monkeypatch, *args)


def test_exit_codes_and_one_line_on_stderr(tmp_path):
    (tmp_path / "a.txt").write_text("a")

    def run(*args):
        program = [sys.executable, str(ROOT / "prepare.py"), *args]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)

    done = run("folder", ".")
    assert done.returncode == 1 and done.stderr.startswith("prepare.py: nothing in") and done.stderr.count("\n") == 1
    for wrong in (["--shard", "3/2"], ["--shard", "0/0"], ["--name", "../../etc"], ["--name", ".x"], ["--size", "0"]):
        done = run("folder", ".", *wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr, wrong


# ---- the public data sets, in the layouts users have, dirt included -------------------------------------------------
def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((12, 16), value, np.uint8)
    image[0, 0] = 255  # else it would be blank
    Image.fromarray(image).save(path)


@pytest.mark.parametrize("folder", ["images", "images_001/images"])
def test_chestxray14_layouts(tmp_path, monkeypatch, folder):
    """The header holds bare commas inside brackets and each line a comma too many; lists end without a newline."""
    data = tmp_path / "data"
    for n in range(4):
        png(data / folder / f"0000000{n}_000.png")
    png(data / folder / "stray.png")
    (data / "Data_Entry_2017_v2020.csv").write_text(
        "\ufeffImage Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\r\n"
        "00000000_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000001_000.png,No Finding,0,1,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000002_000.png,Hernia,0,2,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000003_000.png,Pleural_Thickening,0,3,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000009_000.png,Mass,0,3,58,M,PA,2682,2749,0.143,0.143,\r\n")
    (data / "train_val_list.txt").write_text("00000000_000.png\n00000001_000.png\n00000002_000.png")
    (data / "test_list.txt").write_text("00000003_000.png\n00000009_000.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "chestxray14", data)
    rows = [kept[f"{folder}/0000000{n}_000.png"] for n in range(4)]
    assert [row["labels"] for row in rows] == [("Cardiomegaly", "Emphysema"), (), ("Hernia",), ("Pleural_Thickening",)]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"] and list(rejected) == [f"{folder}/stray.png"]
    assert rows[0]["patient"] == rows[1]["patient"] != rows[2]["patient"]


def test_fetal_planes(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for n in range(3):
        png(data / f"Images/Patient0000{n}_Plane1_1_of_15.png")
    (data / "FETAL_PLANES_DB_data.csv").write_text(
        "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
        "Patient00000_Plane1_1_of_15;1;Other;Not A Brain;Op. 1;Aloka;1 \n"
        "Patient00001_Plane1_1_of_15;2;Fetal brain;Trans-thalamic;Op. 1;Aloka;0 \n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "fetal_planes", data)
    rows = [kept[f"Images/Patient0000{n}_Plane1_1_of_15.png"] for n in range(2)]
    assert [row["labels"] for row in rows] == [("Other",), ("Fetal brain",)]
    assert [row["split"] for row in rows] == ["test", "test"]
    assert rows[0]["modality"] == "ultrasound" and len(rejected) == 1


def test_kvasir_capsule_clips(tmp_path, monkeypatch):
    """Frame numbers are not padded; one frame is in two classes; one folder has the packed spelling."""
    data = tmp_path / "data"
    for n in [*range(90, 110), *range(200, 210)]:
        png(data / f"labelled_images/Normal clean mucosa/bca26705313a4644_{n}.jpg", n)
    for n in range(18):
        png(data / f"labelled_images/blood_fresh/Blood - fresh/bca26705313a4644_{n}.jpg", n)
    png(data / "labelled_images/Pylorus/bca26705313a4644_90.jpg")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "kvasir_capsule", data)
    clip = kept["labelled_images/Normal clean mucosa/bca26705313a4644_90.jpg"]
    assert clip["labels"] == ("Normal clean mucosa",) and clip["split"] == "test" and clip["shape"] == (3, 256, 256, 64)
    levels = load(clip)[0, 128, 128].astype(int)
    assert (np.diff(levels) >= 0).all() and len(set(levels)) > 15 and levels[0] >= 88 and levels[-1] <= 111
    assert len(rejected) == 11 and "in a run of 10 frames, a clip needs 16" in rejected.values()
    shutil.rmtree(data / "labelled_images")
    (data / "polyp.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack"):
        command(monkeypatch, "kvasir_capsule", data, "--out", tmp_path / "c")


def test_hyper_kvasir(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name, place in {"8f9e4085": "lower-gi-tract/pathological-findings/anastomotic-leakage", "aaaa": "lower/x",
                        "bbbb": "upper-gi-tract/y", "cccc": "z"}.items():
        (data / place).mkdir(parents=True)
        video(data / place / f"{name}.avi")
    png(data / "8f9e4085.png")  # a thumbnail
    (data / "video-labels.csv").write_bytes(
        b"Video file,Organ,Finding 1,Classification 1,Detailed description of finding,Finding 2,Classification 2\n"
        b"8f9e4085,Lower GI,anastomosis,Pathological findings,,stent,Therapeutic interventions\n"
        b'aaaa,Lower GI,"cancer, colorectal ",Pathological findings,\xa8,,\n'
        b"bbbb,Upper GI,ERCP,Therapeutic interventions,,,\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "hyper_kvasir", data)
    assert sorted(rejected) == ["8f9e4085.png", "z/cccc.avi"]
    assert [row["labels"] for row in kept.values()].count(()) == 1 and kept["lower/x/aaaa.avi"]["labels"] == ("cancer",)
    assert len(set(prepare.HYPER_KVASIR.values())) == 13


def chest_ct(data):
    """CT-RATE's tree: two reconstructions, a second scan, a valid volume and a head CT; HU in an LPS array."""
    hu, _ = phantom()
    for name in ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1"):
        split, patient, scan, _ = name.split("_")
        path = data / f"dataset/{split}_fixed/{split}_{patient}/{split}_{patient}_{scan}/{name}.nii.gz"
        nifti(path, hu[::-1, ::-1], np.diag([-2.0, -2.5, 3.0, 1.0]))
    shutil.copytree(data / "dataset/valid_fixed", data / "dataset/valid")  # as first published: blank headers
    nifti(data / "dataset/valid_preprocessed/valid_7/valid_7a/valid_7_a_1.nii.gz", hu, np.eye(4))  # RadGenome's
    names = ["Lung nodule", "Hiatal hernia"]
    (data / "dataset/labels").mkdir()
    tables = {"train": "train_1_a_1.nii.gz,1,0\ntrain_1_b_1.nii.gz,,1\n", "valid": "valid_1_a_1,1.0,1\n"}
    for part, rows in tables.items():
        (data / f"dataset/labels/{part}_predicted_labels.csv").write_text(f"VolumeName,{','.join(names)}\n{rows}")
    (data / "dataset/labels/no_chest_train.txt").write_text("train_2/train_2_a/train_2_a_1.nii.gz\n")
    return hu


def test_ct_rate_takes_one_reconstruction_of_the_fixed_volumes(tmp_path, monkeypatch):
    hu = chest_ct(tmp_path / "data")
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, np.diag([2.0, 2.5, 3.0, 1.0])), "ct", size=48, slices=16)[1]
    kept, rejected = prepare_main(monkeypatch, tmp_path, "ct_rate", tmp_path / "data", "--size", 48, "--slices", 16)
    kept = {os.path.basename(path): row for path, row in kept.items()}
    assert set(kept) == {"train_1_a_1.nii.gz", "train_1_b_1.nii.gz", "valid_1_a_1.nii.gz"}
    assert np.abs(load(kept["train_1_a_1.nii.gz"]).astype(float) - want).max() < 2e-3, "HU and orientation"
    assert kept["train_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule",)
    assert kept["valid_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule", "finding:Hiatal hernia")
    assert [kept[f"{part}_1_a_1.nii.gz"]["split"] for part in ("train", "valid")] == ["train", "test"]
    reasons = {path.partition("/")[2]: reason for path, reason in rejected.items()}
    assert "another reconstruction" in reasons["train_fixed/train_1/train_1_a/train_1_a_2.nii.gz"]
    assert "no chest" in reasons["train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"]
    assert "whose headers are true" in reasons["valid/valid_1/valid_1_a/valid_1_a_1.nii.gz"]
    kept, _ = prepare_main(monkeypatch, tmp_path, "ct_rate", tmp_path / "data/dataset/valid_fixed", "--labels",
                           tmp_path / "data/dataset/labels", name="part")
    assert list(kept) == ["valid_1/valid_1_a/valid_1_a_1.nii.gz"], "SOURCE may be one of the folders itself"


def test_radgenome_labels_of_ct_rate_volumes(tmp_path, monkeypatch):
    data, tables = tmp_path / "data", tmp_path / "radgenome_files"
    chest_ct(data)
    tables.mkdir()
    for part, volume in (("train", "train_1_a_1.nii.gz"), ("validation", "valid_1_a_1.nii.gz")):
        (tables / f"{part}_vqa_abnormality.csv").write_text(
            f'Volumename,Anatomy,Abnormality\n{volume},lung/lung/right lung,"ground glass areas, wider than normal"\n'
            f"{volume},lung/lung/left lung,no findings\n{volume},heart/heart,no findings\n")
        (tables / f"{part}_vqa_size.csv").write_text(
            "Volumename,Anatomy,Abnormality,Size\n" + "".join(
                f"{volume},abdomen/abdomen/liver,hypodense lesion,{size}\n" for size in (
                    "13 mm", "1 cm", "6x4 mm", "2.7x2.8 cm", "120x87mm", "2-3 mm", "170 in", "")))
    for path in (data / "dataset/labels").glob("valid_predicted*"):
        path.unlink()
    kept, rejected = prepare_main(monkeypatch, tmp_path, "radgenome", data, "--labels", tables)
    kept = {os.path.basename(path): row for path, row in kept.items()}
    sizes = tuple(f"size:abdomen:hypodense lesion:{mm}" for mm in ("13", "10", "6", "28", "120", "3"))
    status = {"status:lung:abnormal", "status:heart:normal"}
    assert set(kept["train_1_a_1.nii.gz"]["labels"]) == {"finding:Lung nodule", *status, *sizes}
    assert set(kept["valid_1_a_1.nii.gz"]["labels"]) == {*status, *sizes}
    assert {row["split"] for row in kept.values()} == {"test"}, "the task queries them all"
    assert "headers" in rejected["dataset/valid_preprocessed/valid_7/valid_7a/valid_7_a_1.nii.gz"]


# ---- labels ----------------------------------------------------------------------------------------------------------
def test_labels_of_files_series_and_folders(tmp_path, monkeypatch, capsys):
    """A row may name any file of a series, of a flat folder too, or the folder; labels are stripped, splits any case."""
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data / "p1/ct", hu, affine)
    series(data / "flat", hu // 2, affine)
    dicom(data / "flat/x.dcm", SPOT)
    png(data / "p2/us.png")
    (data / "labels.csv").write_text("\ufeffpath;labels;patient;split;modality\np1/ct; lesion | cyst;1;Test;\n"
                                     "flat/IM0007;mass|cyst;1;VALID;\nflat/x.dcm;;1;train;\n"
                                     "p2/us.png;kidney;2;;ultrasound\nnone.png;a;;;\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--labels", data / "labels.csv")
    assert kept["p1/ct/IM0000"]["labels"] == ("lesion", "cyst") and kept["p1/ct/IM0000"]["split"] == "test"
    assert kept["flat/IM0000"]["labels"] == ("mass", "cyst") and kept["flat/IM0000"]["split"] == "val"
    assert kept["p1/ct/IM0000"]["patient"] == kept["flat/x.dcm"]["patient"] != kept["p2/us.png"]["patient"]
    assert kept["flat/x.dcm"]["labels"] == () and kept["p2/us.png"]["modality"] == "ultrasound" and not rejected
    assert "1 rows of" in (out := capsys.readouterr().out) and "(line 6 ...)" in out


@pytest.mark.parametrize("text, message", [
    (b"path,labels,split\na.png,x,train\n\nb.png,x,holdout\n", "line 4: split 'holdout' is none of train, val, test"),
    (b"path,labels,modality\na.png,x,CT\n", "line 2: modality 'CT' is not known"),
    (b"path,labels\na.png,x\nb.png,x\n./a.png,y\n", "line 4: a.png again"),
    (b"file,labels\na.png,x\n", "line 2: needs the columns path and labels"),
    (b"path,labels\nb.png,x\na.png\n", "line 3: needs the columns path and labels"),
    (b"path,labels\na.png,l\xe9sion\n", "not a table in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 19"), (b"path,labels\n", "holds no rows"),
    pytest.param(b"path,labels\na.png," + bytes([120]) * 200_000, "not a table", id="a cell without end")])
def test_a_wrong_labels_table_is_an_error_with_line_and_value(tmp_path, monkeypatch, text, message):
    png(tmp_path / "data/a.png")
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)):
        command(monkeypatch, "folder", tmp_path / "data", "--modality", "xray", "--labels", tmp_path / "labels.csv",
                "--out", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_folders_are_labels_and_splits(tmp_path, monkeypatch):
    data = tmp_path / "data"
    paths = {"train/benign/a.png": ("benign", "train"), "valid/benign/b.png": ("benign", "val"),
             "malignant/Test/c.png": ("malignant", "test"), "normal/d.png": ("normal", ""), "e.png": (None, "")}
    for path in paths:
        png(data / path)
    dicom(data / "normal/f.dcm", SPOT)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray", "--labels", "folders")
    assert {path: ((*row["labels"], None)[0], row["split"]) for path, row in kept.items()} == {
        **paths, "normal/f.dcm": ("normal", "")}


# ---- what a cache remembers ------------------------------------------------------------------------------------------
def test_another_modality_makes_a_sample_again(tmp_path, monkeypatch):
    hu, affine = phantom()
    nifti(tmp_path / "data/a.nii.gz", hu, affine)
    png(tmp_path / "data/b.png")
    args = ["folder", tmp_path / "data", "--size", 32, "--slices", 8]
    arrays = []
    for modality in ("ct", "mri"):
        kept, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", modality)
        assert kept["a.nii.gz"]["modality"] == modality
        arrays.append(load(kept["a.nii.gz"]))
    fresh, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", "mri", name="fresh")
    assert not np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[1], load(fresh["a.nii.gz"]))
    nifti(tmp_path / "data/c.nii.gz", hu - 5000, affine)  # below all HU: as CT it is blank
    kept, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", "mri")
    array = Path(kept["c.nii.gz"]["folder"], f"{kept['c.nii.gz']['id']}.npy")
    kept, rejected = prepare_main(monkeypatch, tmp_path, *args, "--modality", "ct")
    assert set(kept) == {"a.nii.gz", "b.png"} and rejected["c.nii.gz"].startswith("blank") and not array.exists()


def test_another_modality_after_a_run_that_wrote_no_tables(tmp_path, monkeypatch):
    """Stopped because the modality was wrong, and started again with the right one."""
    hu, affine = phantom()
    for n in range(4):
        nifti(tmp_path / f"data/{n}.nii.gz", hu + n, affine)
    args = ["folder", tmp_path / "data", "--size", 32, "--slices", 8, "--modality"]
    command(monkeypatch, *args, "mri", "--name", "x", "--out", tmp_path / "cache", "--shard", "0/1")
    kept, _ = prepare_main(monkeypatch, tmp_path, *args, "ct")
    fresh, _ = prepare_main(monkeypatch, tmp_path, *args, "ct", name="fresh")
    assert len(kept) == 4 and all(np.array_equal(load(kept[path]), load(fresh[path])) for path in kept)


def test_a_forgotten_modality_loses_no_array(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    array = Path(kept["a.png"]["folder"], f"{kept['a.png']['id']}.npy")
    made = array.stat().st_mtime_ns
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=1)
    assert rejected["a.png"] == "modality unknown; give --modality" and array.stat().st_mtime_ns == made
    again, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert again == kept and not rejected and array.stat().st_mtime_ns == made


def test_another_source_key_or_size_is_refused_once_a_sample_is_kept(tmp_path, monkeypatch):
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"no image")
    cache = ["--modality", "xray", "--name", "x", "--out", tmp_path / "cache"]
    for args in ([data, "--size", 64], [other, "--size", 32], [data, "--key-file", tmp_path / "k"]):
        with pytest.raises(UserError, match="could be read"):  # nothing is kept, so nothing is remembered
            command(monkeypatch, "folder", *args, *cache)
    png(data / "a.png")
    command(monkeypatch, "folder", data, *cache)
    assert prepare.read_recipe(tmp_path / "cache/x")[0] == {"size": 256, "slices": 64, "frames": 64}
    before = tree(tmp_path / "cache/x")
    for args, message in {(other,): "another source", (data, "--size", 64): "size 256", (data, "--frames", 8): "frames 64",
                          (data, "--slices", 32): "slices 64", (data, "--key-file", tmp_path / "k"): "another key"}.items():
        with pytest.raises(UserError, match=f"was made with.*{message}"):
            command(monkeypatch, "folder", *args, *cache)
    assert tree(tmp_path / "cache/x") == before
    text = (tmp_path / "cache/x/recipe.json").read_text()
    assert str(tmp_path) not in text and "data" not in text.replace("dataset", "")
    (tmp_path / "cache/x/recipe.json").write_text("{")
    with pytest.raises(UserError, match="recipe.json: missing or damaged"):
        prepare.read_recipe(tmp_path / "cache/x")


def test_runs_that_start_together_take_the_key_of_the_first(tmp_path):
    """Each child makes its key at the same moment; all must read the same one."""
    for attempt in range(5):
        path, gate = tmp_path / f"{attempt}.key", time.monotonic() + 0.2
        children = []
        for n in range(4):
            pid = os.fork()
            if not pid:
                try:
                    sys.stdout = open(os.devnull, "w")
                    while time.monotonic() < gate:
                        pass
                    (tmp_path / f"{attempt}-{n}").write_bytes(prepare.read_key(path))
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        assert {(tmp_path / f"{attempt}-{n}").read_bytes() for n in range(4)} == {path.read_bytes()}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(list(tmp_path.glob(f"{attempt}.key*"))) == 1


def test_temporary_files_of_another_run_are_left_alone(tmp_path, monkeypatch):
    """The other run is at the very sample that this one makes too."""
    png(tmp_path / "data/a.png")
    name = prepare.pseudonym(prepare.PUBLIC_KEY, "a.png")
    other = tmp_path / f"cache/x/.{name}.npy.12345678.tmp"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert other.read_bytes() == b"half" and len(kept) == 1


def test_own_caches_and_hidden_folders_are_not_read_and_said(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for path in ("a.png", ".Trash/b.png", "recipes/c.png", "sub/.snapshot/d.png", "__MACOSX/e.png"):
        png(data / path)
    (data / "recipes/recipe.json").write_text('{"cake": 1}')
    command(monkeypatch, "folder", data, "--modality", "xray", "--name", "own", "--out", data / "cache")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray")
    assert set(kept) == {"a.png", "recipes/c.png"}
    assert {path: reason.split(",")[0] for path, reason in rejected.items()} == {
        ".Trash": "hidden", "sub/.snapshot": "hidden", "__MACOSX": "hidden", "cache/own": "empty",
        "recipes/recipe.json": "not a DICOM"}


def test_notes_stand_beside_the_sample_also_after_an_interrupted_run(tmp_path, monkeypatch, capsys):
    dicom(tmp_path / "data/a.dcm", SPOT, PhotometricInterpretation="MONOCHROME1")
    dicom(tmp_path / "data/b.dcm", SPOT, "US")
    dicom(tmp_path / "data/c.dcm", SPOT, "US", BurnedInAnnotation="YES")
    command(monkeypatch, "folder", tmp_path / "data", "--name", "x", "--out", tmp_path / "cache", "--shard", "0/1")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data")
    with open(tmp_path / "cache/x/sources.csv", newline="") as file:
        notes = {row["path"]: row["notes"] for row in csv.DictReader(file)}
    assert notes["a.dcm"] == "MONOCHROME1: inverted" and not notes["b.dcm"] and "may show names" in notes["c.dcm"]
    out = capsys.readouterr().out
    assert "warning: 1 samples" in out and "3 samples, 2 with notes (sources.csv)" in out


def test_the_commonest_reason_is_that_of_files_of_a_known_kind(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    for n in range(3):
        (tmp_path / f"data/{n}.txt").write_text("notes")
    with pytest.raises(UserError, match=r"mostly: modality unknown; give --modality\)"):
        command(monkeypatch, "folder", tmp_path / "data", "--out", tmp_path / "cache")


@pytest.mark.parametrize("table, line", [
    ("id,modality,labels,patient,split\n0123456789abcdef,ct,,,\n", 2),  # no shape
    ("id,labels,patient,split,shape\n0123456789abcdef,,,,1x8x8x1\n", 2),  # no modality
    ("{head}{row}{row}", 3), ("{head}../../x,ct,,,,1x8x8x1\n", 2), ("{head}0123456789abcdef,ct,,,,1x8x8\n", 2),
    ("{head}0123456789abcdef,ct,,,,1x8xAx1\n", 2), ("{head}0123456789abcdef,ct\n", 2)])
def test_a_broken_samples_table_names_its_line(tmp_path, table, line):
    head, row = "id,modality,labels,patient,split,shape\n", "0123456789abcdef,ct,a|b,,test,1x8x8x1\n"
    (tmp_path / "samples.csv").write_text(table.format(head=head, row=row))
    with pytest.raises(UserError, match=f"samples.csv, line {line}: "):
        read_samples(tmp_path)
    (tmp_path / "samples.csv").write_text("\ufeff" + head + row)  # as a spreadsheet saves it
    assert read_samples(tmp_path) == [{"id": "0123456789abcdef", "modality": "ct", "labels": ("a", "b"), "patient": "",
                                       "split": "test", "shape": (1, 8, 8, 1), "folder": str(tmp_path)}]


def test_the_fatal_line_stands_alone_below_the_bar(tmp_path):
    """A disk that fills up in the middle of a run: the bar is there, and the message is a line of its own."""
    for n in range(40):
        png(tmp_path / f"data/{n}.png", n)
    code = f"""if True:
        import sys, os, errno; sys.path.insert(0, {str(ROOT)!r})
        import prepare
        real = os.replace
        def full(source, target):
            if str(target).endswith(".npy") and len(os.listdir(os.path.dirname(target))) > 34:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)
        os.replace = full
        sys.argv = ["prepare.py", "folder", "data", "--modality", "xray", "--workers", "1"]
        prepare.cli(prepare.main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.split("\n")
    assert done.returncode == 1 and lines[-2].startswith("prepare.py: cannot write cache/folder/"), done.stderr
    assert "No space left on device" in lines[-2] and lines[-1] == "" and "sample/s" in lines[-3]


# ---- two-dimensional pixels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tags", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2]},
                                  {"ImagerPixelSpacing": [0.4, 0.2]}], ids=lambda tags: [*tags][0])
def test_images_keep_their_aspect_in_mm(tmp_path, tags):
    """20 rows of 2 units are as long as 40 columns of 1: the square is filled. Without the tag it is half of it."""
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


# ---- series, once more -----------------------------------------------------------------------------------------------
def edit(folder, change):
    """Apply change(dataset, n) to each file of a folder, in the order of the positions."""
    files = sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    for n, path in enumerate(files):
        ds = pydicom.dcmread(path)
        change(ds, n)
        ds.save_as(path)


def test_two_patients_who_share_a_series_uid_are_two_volumes(tmp_path, monkeypatch):
    """Copied phantoms and careless exports share them; interleaved, they would be one body."""
    hu, affine = phantom()
    for patient, values in (("one", hu), ("two", -hu)):
        edit(series(tmp_path / "data" / patient, values, affine),
             lambda ds, n: ds.update({"PatientID": patient, "SeriesInstanceUID": "1.2.3"}))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 32, "--slices", 16)
    assert set(kept) == {"one/IM0000", "two/IM0000"} and not rejected
    assert len({row["patient"] for row in kept.values()}) == len({row["id"] for row in kept.values()}) == 2
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]
    assert np.array_equal(load(kept["one/IM0000"]), want)


@pytest.mark.parametrize("tag, values", [
    ("DiffusionBValue", (0.0, 1000.0)), ("AcquisitionTime", ("101010", "101110")), ("ContentTime", ("101010", "101110")),
    ("TriggerTime", ("0", "400")), ("EchoTime", ("2", "5")), ("TemporalPositionIdentifier", ("1", "2"))])
def test_of_passes_over_one_place_a_complete_one_is_kept(tmp_path, monkeypatch, tag, values):
    """DWI, perfusion and cine: the same slices again, told apart by one tag. The second pass here lacks two slices."""
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine, modality="MR", uid="1.2.3")
    edit(data, lambda ds, n: ds.update({tag: values[0]}))
    series(tmp_path / "again", hu // 2, affine, modality="MR", skip=(0, 15), uid="1.2.3")
    edit(tmp_path / "again", lambda ds, n: ds.update({tag: values[1]}))
    for path in (tmp_path / "again").iterdir():
        path.rename(data / f"x{path.name}")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--size", 32, "--slices", 16)
    assert list(kept) == ["IM0000"] and len(rejected) == 14
    assert all(path.startswith("x") and "echo, b-value, phase or time" in why for path, why in rejected.items())
    want = read_any(series(tmp_path / "one", hu, affine, modality="MR"), size=32, slices=16)[1]
    assert np.array_equal(load(kept["IM0000"]), want)


def test_slices_with_one_sop_uid_are_slices_and_empty_padding_is_none(tmp_path, monkeypatch):
    hu, affine = phantom()
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]

    def share(ds, n):
        ds.SOPInstanceUID = "1.2"
        ds.add_new("PixelPaddingValue", "SS", None)

    edit(series(tmp_path / "data", hu, affine), share)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 32, "--slices", 16)
    assert np.array_equal(load(kept["IM0000"]), want) and not rejected


# ---- one file, as a query ----------------------------------------------------------------------------------------
def test_any_file_of_a_series_stands_for_it(tmp_path):
    hu, affine = phantom()
    want = read_any(series(tmp_path / "a", hu, affine), size=32, slices=16)[1]
    assert np.array_equal(read_any(tmp_path / "a/IM0005", size=32, slices=16)[1], want)
    for path in series(tmp_path / "b", -hu, affine).iterdir():
        path.rename(tmp_path / f"a/x{path.name}")
    with pytest.raises(UserError, match="holds 2 samples; name one, IM0000, xIM0000"):
        read_any(tmp_path / "a")
    assert np.array_equal(read_any(tmp_path / "a/IM0005", size=32, slices=16)[1], want)
    alone = dicom(tmp_path / "c/one.dcm", hu[:, :, 8], "CT", SeriesInstanceUID="1.2")
    assert read_any(alone, size=32)[1].shape == (1, 32, 32, 1)


def test_what_a_query_is_taken_for(tmp_path, capsys):
    """Told, else tagged, else likely, else by kind; the last two are said."""
    hu, affine = phantom()
    volume, tagged = nifti(tmp_path / "a.nii.gz", hu, affine), dicom(tmp_path / "a.dcm", SPOT, "DX")
    png(tmp_path / "a.png")
    for path, told, likely, want, said in [
            (volume, None, None, "ct", True), (volume, None, "mri", "mri", True), (volume, "mri", "ct", "mri", False),
            (tagged, None, "ultrasound", "xray", False), (tagged, "ultrasound", None, "ultrasound", False),
            (tmp_path / "a.png", None, None, "xray", True), (video(tmp_path / "a.avi"), None, None, "endoscopy", True)]:
        modality, x = read_any(path, told, likely, size=16, slices=4, frames=4)
        assert modality == want and x.shape[1:3] == (16, 16)
        assert capsys.readouterr().err == f"{path}: taken as {want} (--modality says otherwise)\n" * said
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("fifo", "no such file"), ("none", "no such file"), ("broken.png", "cannot be decoded")):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_any(tmp_path / name)


def test_a_stream_that_does_not_say_its_length_is_drawn_from_too(tmp_path):
    """An MPEG program stream declares no number of frames; the drawn ones are those of any other clip."""
    video(tmp_path / "a.mpg", 25, codec="mpeg2video")
    x = read_any(tmp_path / "a.mpg", frames=8, size=32)[1]
    assert x.shape == (3, 32, 32, 8) and (np.diff(x[0, 16, 16].astype(int)) > 3).all()


# ---- the demo --------------------------------------------------------------------------------------------------------
def test_demo_is_written_as_files_and_read_back(tmp_path, monkeypatch, capsys):
    write = phantoms.write_demo
    monkeypatch.setattr(phantoms, "write_demo", lambda folder: write(folder, n=2))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "demo", tmp_path / "demo", "--slices", 16)
    assert "prepare.py demo --size 32 --slices 16 --frames 4\n" in capsys.readouterr().out
    assert {row["modality"] for row in kept.values()} == set(prepare.MODALITIES) and not rejected
    assert {row["shape"] for row in kept.values()} == {(1, 32, 32, 1), (3, 32, 32, 4), (1, 32, 32, 16)}
    assert all(row["labels"] and row["patient"] and row["split"] for row in kept.values())
