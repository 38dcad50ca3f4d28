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
import time
import zlib
from pathlib import Path

import av
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

import prepare
from prepare import UserError, load_sample, read_any, read_samples

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/realdata/chestxray14"
WHEEL = Path(pydicom.__file__).parent / "data/test_files"
SOP = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "CR": "1.2.840.10008.5.1.4.1.1.1",
       "DX": "1.2.840.10008.5.1.4.1.1.1.1", "US": "1.2.840.10008.5.1.4.1.1.6.1", "USM": "1.2.840.10008.5.1.4.1.1.3.1"}


# ---- makers of small files ------------------------------------------------------------------------------------------
def dicom(path, pixels, modality="CR", syntax=ExplicitVRLittleEndian, **tags):
    """A DICOM file of integer pixels (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SOP.get(modality, SOP["CR"])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "SECRETNAME^ANNA", "SECRETID77", "19610503"
    ds.Modality, ds.BodyPartExamined, ds.BurnedInAnnotation = modality, "CHEST", "NO"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    ds.Rows, ds.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    swap = syntax == ExplicitVRBigEndian
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if swap else "<")).tobytes()
    ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 else "OB"
    for tag, value in tags.items():
        setattr(ds, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True, little_endian=not swap, implicit_vr=False)
    return path


def series(folder, hu, affine, slope=1.0, intercept=-1024.0, modality="CT", skip=(), **tags):
    """Voxels (i, j, k) with a RAS+ affine as a DICOM series along k: shuffled names, misleading InstanceNumber."""
    lps, uid = np.diag([-1, -1, 1, 1]) @ affine, generate_uid()
    names = np.random.default_rng(0).permutation(hu.shape[2])
    for k in range(hu.shape[2]):
        if k in skip:
            continue
        stored = np.round((hu[:, :, k].T - intercept) / slope).astype(np.int16)  # (rows = j, columns = i)
        place = lps @ [0, 0, k, 1]
        spacing = np.linalg.norm(lps[:3, :2], axis=0)
        dicom(folder / f"IM{names[k]:04d}", stored, modality, RescaleSlope=str(slope), RescaleIntercept=str(intercept),
              SeriesInstanceUID=uid, InstanceNumber=str(int(names[k])), PixelSpacing=[float(x) for x in spacing[::-1]],
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
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n in range(frames):
            picture = np.full((size[1], size[0], 3), n * 10 % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
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
    Image.fromarray(np.full((100, 50), 200, np.uint8)).save(tmp_path / "a.png")
    modality, x = read_any(tmp_path / "a.png", size=64)
    assert modality == "xray" and x.shape == (1, 64, 64, 1) and x.dtype == np.uint8
    assert (x[0, :, 16:48, 0] == 200).all() and not x[0, :, :16].any() and not x[0, :, 48:].any()


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
    hu = np.full((40, 20, 10), 0, np.int16)
    _, x = read_any(nifti(tmp_path / "a.nii", hu, np.diag([1.0, 2.0, 5.0, 1.0]), packed=False), "ct", size=32, slices=8)
    assert (x == 0.5).all(), "20 rows of 2 mm are as long as 40 columns of 1 mm: no padding"


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


def test_hounsfield_units_of_a_known_file():
    ds = pydicom.dcmread(WHEEL / "CT_small.dcm")
    hu = ds.pixel_array.astype(float) * ds.RescaleSlope + ds.RescaleIntercept
    modality, x = read_any(WHEEL / "CT_small.dcm", size=128)  # 128 x 128 already
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


def test_uneven_spacing_is_made_even(tmp_path):
    """A head CT, thin at the base and thick above: each slice lands at its true height."""
    z = np.concatenate([np.arange(0, 20, 2.0), np.arange(20, 60, 4.0)])
    hu = np.broadcast_to((z * 10).astype(np.int16), (8, 8, len(z)))
    folder = series(tmp_path / "s", hu, np.eye(4))
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], float(z[int(round(ds.ImagePositionPatient[2]))])]
        ds.save_as(path)
    x = read_any(folder, size=8, slices=len(z))[1][0, 4, 4].astype(float) * 2000 - 1000  # (S,)
    assert np.abs(np.diff(x)[2:-2] - 10 * 56 / (len(z) - 1)).max() < 3


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


def test_sixteen_bit_alpha_palette_cmyk_and_rotated_images(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    x = read_any(tmp_path / "deep.png", size=64)[1]
    assert x.dtype == np.float16 and np.abs(x[0, :, :, 0] - ramp / 65535).max() < 1e-3
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
    draws = np.array([prepare.in_order(range(50), 5, seed) for seed in range(2000)])
    assert np.abs(np.bincount(draws.ravel(), minlength=50) / 200 - 1).max() < 0.35, "each frame as likely as any other"
    assert prepare.in_order(range(3), 7, 0) == [0, 0, 0, 1, 1, 2, 2]
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
    "empty.dcm": (lambda p: p.touch(), "empty file"),
    "empty.nii.gz": (lambda p: p.touch(), "empty file"),
    "page.dcm": (lambda p: p.write_text("<html>login</html>" * 99), "not a DICOM file"),
    "page.nii.gz": (lambda p: p.write_text("<html>login</html>" * 99), "not a NIfTI file"),
    "page.png": (lambda p: p.write_text("<html>login</html>" * 99), "not a PNG"),
    "page.mp4": (lambda p: p.write_text("<html>login</html>" * 99), "not a readable video"),
    "text.txt": (lambda p: p.write_text("notes"), "not a DICOM, NIfTI, image or video file"),
    "cutpixels.dcm": (lambda p: cut(dicom(p, np.zeros((64, 64), np.uint16)), 0.7), r"truncated: \d+ of 8192 bytes"),
    "cutjpeg.dcm": (lambda p: (shutil.copy(WHEEL / "MR_small_RLE.dcm", p), cut(p, 0.9)),
                    "truncated before the sequence delimiter"),
    "cutheader.dcm": (lambda p: p.write_bytes((WHEEL / "CT_small.dcm").read_bytes()[:401]), "truncated|no pixel data"),
    "nosyntax.dcm": (lambda p: shutil.copy(WHEEL / "meta_missing_tsyntax.dcm", p),
                     "TransferSyntaxUID|no pixel data"),
    "plan.dcm": (lambda p: shutil.copy(WHEEL / "rtplan.dcm", p), r"no pixel data \(RT Plan Storage\)"),
    "report.dcm": (lambda p: shutil.copy(WHEEL / "reportsi.dcm", p), "no pixel data"),
    "DICOMDIR": (lambda p: shutil.copy(WHEEL / "dicomdirtests/DICOMDIR", p), "no pixel data"),
    "huge.dcm": (lambda p: dicom(p, np.zeros((8, 8), np.uint16), Rows=65535, Columns=65535), r"claims 8\.6 GB"),
    "frames.dcm": (lambda p: dicom(p, np.zeros((2, 8, 8), np.uint8), "US", NumberOfFrames=str(2 ** 31 - 1)), "claims"),
    "noframes.dcm": (lambda p: dicom(p, np.zeros((8, 8), np.uint8), "US", NumberOfFrames="0"), ""),
    "bomb.dcm": (deflated_bomb, "deflated, over"),
    "deflated.dcm": (lambda p: shutil.copy(WHEEL / "image_dfl.dcm", p), ""),
    "oneslice.dcm": (lambda p: shutil.copy(WHEEL / "CT_small.dcm", p), "1, a volume needs 8"),
    "crc.nii.gz": (lambda p: flip(nifti(p, NOISE, np.eye(4)), 3000), "CRC|damaged gzip"),
    "cut.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4))), "truncated"),
    "trailer.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4)), 0.9995), "truncated"),
    "giant.nii": (lambda p: nifti_with(p, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "shape"),
    "zero.nii": (lambda p: nifti_with(p, dim=[3, 10, 0, 10, 1, 1, 1, 1]), "shape"),
    "negative.nii": (lambda p: nifti_with(p, dim=[3, 10, -10, 10, 1, 1, 1, 1]), "shape"),
    "5d.nii": (lambda p: nifti_with(p, dim=[5, 10, 10, 2, 1, 5, 1, 1]), "shape"),
    "rgb.nii": (lambda p: nifti_with(p, datatype=128, bitpix=24), "cannot be used"),
    "complex.nii": (lambda p: nifti_with(p, datatype=32, bitpix=64), "cannot be used"),
    "offset.nii": (lambda p: nifti_with(p, vox_offset=0), "truncated|offset"),
    "singular.nii": (lambda p: nifti_with(p, srow_x=(0, 0, 0, 0)), "singular affine"),
    "slope.nii": (lambda p: nifti_with(p, scl_slope=np.nan, scl_inter=np.nan), ""),
    "nan.nii.gz": (lambda p: nifti(p, np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), ""),
    "4d.nii.gz": (lambda p: nifti(p, np.zeros((9, 9, 9, 3), np.int16), np.eye(4)), ""),
    "half.jpg": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)), "cannot be decoded: OSError"),
    "half.png": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)),
                 "cannot be decoded: (OSError|SyntaxError)"),
    "bomb.png": (lambda p: png_claiming(p, 13000), "169 megapixels"),
    "half.avi": (lambda p: cut(video(p, 60)), "damaged: 2?[0-9] of 60|damaged: 3[0-9] of 60"),
    "half.mp4": (lambda p: cut(video(p, 60, codec="mpeg4")), "not a readable video"),
    "three.avi": (lambda p: video(p, 3), ""),
    "script.avi": (lambda p: p.write_text("ffconcat version 1.0\nfile three.avi\n"), "not a readable video"),
    "one.gif": (lambda p: Image.fromarray(np.zeros((9, 9), np.uint8)).save(p), ""),
    "many.gif": (lambda p: Image.fromarray(np.zeros((9, 9), np.uint8)).save(
        p, save_all=True, append_images=[Image.fromarray(np.full((9, 9), 40 * i, np.uint8)) for i in range(1, 5)]), ""),
    "fifo.dcm": (lambda p: os.mkfifo(p), "not a regular file"),
    "folder.dcm": (lambda p: p.mkdir(), None),  # an empty folder is no file
    "dangling.dcm": (lambda p: p.symlink_to("nowhere"), "cannot be read"),
    "loop": (lambda p: p.symlink_to(p.parent), "link to a folder"),
    'odd,"name\n.png': (lambda p: Image.fromarray(np.zeros((9, 9), np.uint8)).save(p, "PNG"), ""),
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
        patch.setattr(prepare, "CAP", 1 << 26)
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


def test_no_file_disappears_and_nan_is_air(bad):
    tmp, (kept, rejected) = bad
    files = {os.path.join(root, name) for root, _, names in os.walk(tmp / "data") for name in names}
    assert {os.path.relpath(path, tmp / "data") for path in files if "latin" not in path} <= {*kept, *rejected}
    assert any("latin" in path for path in rejected)
    assert (load(kept["nan.nii.gz"]) == 0).all()
    assert load(kept["many.gif"]).shape == (3, 256, 256, 16)


@pytest.mark.parametrize("trouble, expected", [
    ("abort", "decoder crashed (SIGABRT)"), ("crash", "decoder crashed (SIGSEGV)"), ("hang", "timed out"),
    ("memory", "over memory"), ("exit", "decoder ended with exit code 0"),
    ("panic", "cannot be decoded: KeyboardInterrupt")])
def test_no_decoder_can_end_or_hang_the_run(tmp_path, monkeypatch, trouble, expected):
    real = prepare.decode

    def decode(job, *args):
        if job.path == "3.png":
            faulthandler.disable()
            if trouble == "memory":
                np.ones(4 * prepare.MEMORY, np.uint8)
            elif trouble == "panic":
                raise KeyboardInterrupt("SECRETNAME")
            {"abort": os.abort, "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV), "hang": lambda: time.sleep(60),
             "exit": lambda: os._exit(0)}[trouble]()
        return real(job, *args)

    monkeypatch.setattr(prepare, "decode", decode)
    monkeypatch.setattr(prepare, "SECONDS", 1)
    monkeypatch.setattr(prepare, "MEMORY", 1 << 29)
    for n in range(6):
        Image.fromarray(np.full((9, 9), n, np.uint8)).save(tmp_path / f"{n}.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    assert sorted(kept) == ["0.png", "1.png", "2.png", "4.png", "5.png"] and rejected == {"3.png": expected}


def test_a_full_disk_ends_the_run_and_blames_no_file(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        command(monkeypatch, "folder", tmp_path, "--modality", "xray", "--out", tmp_path / "c")
    left = [name for _, _, names in os.walk(tmp_path / "c") for name in names]
    assert not [name for name in left if "npy" in name or name.endswith("csv")]


# ---- DICOM series ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil, expected", [
    ("gap", "gap of 6.0 mm after slice 7 of 15, others 3.0 mm"), ("few", "5, a volume needs 8"), ("none", ""),
    ("duplicate", ""), ("different", "two different slices at one position"), ("cut", "slice IM.*: truncated"),
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
    assert list(kept) == ([] if expected else ["s"])
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
    assert set(rejected) == {"copy", "phase", "small", "scout"} and rejected["scout"] == "localizer"
    assert "phase" in rejected["phase"] and "copy" in rejected["copy"] and "needs 8" in rejected["small"]


def test_body_parts_of_messy_tags():
    for text, parts in {"CHEST": ["chest"], "PORT CHEST": ["chest"], "Abdomen_Pelvis": ["abdomen", "pelvis"],
                        "C_A_P": ["chest", "abdomen", "pelvis"], "CHEST/ABD/PELVIS": ["chest", "abdomen", "pelvis"],
                        "EAR": ["head"],
                        "T SPINE": ["tspine"], "CERVIX": ["pelvis"], "CERVICAL_SPINE": ["cspine"], "RESEARCH": [],
                        "CT Thorax with contrast": ["chest"], "LOCATOR": [], "": [], "EXTREMITY": []}.items():
        assert sorted(prepare.body_parts(text)) == sorted(parts), text
    assert prepare.body_parts("", "UNKNOWN", "MR KNEE LEFT") == ["knee"]


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
            above = {os.path.dirname(path)}
            assert path in rejected or path in kept or above & set(kept), path
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
    dicom(data / "Meyer.dcm", np.zeros((9, 9), np.uint8), StudyDescription="SECRETNAME", BurnedInAnnotation="YES")
    path = dicom(data / "bad.dcm", np.zeros((9, 9), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"DA\x08\x0019610503", b"DA\x08\x00SECRETNA").replace(b"PI", b"ZZ"))
    dicom(data / "frames.dcm", np.zeros((9, 9), np.uint8), NumberOfFrames="1")
    path = data / "frames.dcm"
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x001 ", b"IS\x02\x001A"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(data / "Meyer_19610503.png")
    (tmp_path / "my.key").write_text("0123456789abcdef0123")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--key-file", tmp_path / "my.key")
    out = "".join(capfd.readouterr()).encode()
    assert b"burned" in out.lower() or b"may show names" in out
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.name not in ("sources.csv", "rejected.csv"):
            out += path.name.encode() + path.read_bytes()
    assert not [secret for secret in SECRETS if secret in out]
    rejected = (tmp_path / "cache/x/rejected.csv").read_bytes()
    assert b"SECRET" not in rejected and b"Meyer_19610503.png,modality unknown" in rejected
    for name in ("sources.csv", "rejected.csv", ".journal-0-of-1.jsonl"):
        assert stat.S_IMODE((tmp_path / "cache/x" / name).stat().st_mode) == 0o600


def test_ids_depend_on_the_key_and_patients_are_hashed(tmp_path, monkeypatch):
    for n in range(2):
        dicom(tmp_path / f"data/{n}.dcm", np.zeros((9, 9), np.uint8))
    ids = {}
    key = ["--key-file", tmp_path / "new.key"]
    for name, args in {"a": [], "b": key, "c": key}.items():
        kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args, name=name)
        assert len({row["patient"] for row in kept.values()}) == 1 and kept["0.dcm"]["labels"] == ("chest",)
        ids[name] = [row["id"] for row in kept.values()] + [kept["0.dcm"]["patient"]]
    assert ids["a"] != ids["b"] == ids["c"] and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids["b"])
    assert stat.S_IMODE((tmp_path / "new.key").stat().st_mode) == 0o600


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


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
        done = prepare.read_journals(cache)
        for name in made:
            assert name in done, "finished work was lost"
            assert (cache / f"{name}.npy").stat().st_mtime_ns == made[name], "finished work was done again"
        made = {name: (cache / f"{name}.npy").stat().st_mtime_ns for name in done if "shape" in done[name]}
    assert kills >= 6 and len(made) == 66 and tree(cache) == tree(tmp_path / "whole/x")


def test_shards_together_are_the_whole_and_torn_journals_heal(tmp_path, monkeypatch):
    many(tmp_path / "data", 12)
    for name, shards in (("whole", ["0/1"]), ("zero", ["0/2", "1/2"]), ("one", ["1/3", "2/3", "3/3"])):
        for part in shards:
            kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct",
                                          "--shard", part, name=name)
        assert len(kept) == 18 and list(rejected) == ["broken.png"]
    tables = [(tmp_path / "cache" / name / "samples.csv").read_bytes() for name in ("whole", "zero", "one")]
    assert tables[0] == tables[1] == tables[2]
    journal = tmp_path / "cache/whole/.journal-0-of-1.jsonl"
    before = tree(tmp_path / "cache/whole")
    journal.write_bytes(journal.read_bytes()[:-30])  # a torn last line
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct", name="whole")
    assert tree(tmp_path / "cache/whole") == before


def test_a_changed_source_is_made_again_and_other_options_are_refused(tmp_path, monkeypatch):
    picture = tmp_path / "data/a.png"
    picture.parent.mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(picture)
    prepare_main(monkeypatch, tmp_path, "folder", picture.parent, "--modality", "xray")
    Image.fromarray(np.full((9, 9), 9, np.uint8)).save(picture)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", picture.parent, "--modality", "xray")
    assert (load(kept["a.png"]) == 9).all()
    for other in (["--size", "64"], ["--frames", "8"], ["--slices", "32"], ["--key-file", tmp_path / "k"]):
        with pytest.raises(UserError, match="was made with"):
            command(monkeypatch, "folder", picture.parent, "--modality", "xray", "--name", "x",
                    "--out", tmp_path / "cache", *other)


def test_verify_finds_a_flipped_bit_and_the_next_run_mends_it(tmp_path, monkeypatch, capsys):
    many(tmp_path / "data", 3)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct")
    before = tree(tmp_path / "cache/x")
    path = tmp_path / "cache/x" / f"{kept['001.png']['id']}.npy"
    flip(path, -5)
    verify = ["folder", "--verify", "--out", tmp_path / "cache", "--name", "x"]
    with pytest.raises(UserError, match="1 arrays damaged, 1 to make again"):
        command(monkeypatch, *verify)
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "ct")
    assert tree(tmp_path / "cache/x") == before
    command(monkeypatch, *verify)


def test_reading_a_cache_names_the_file_and_the_remedy(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    row, path = kept["a.png"], tmp_path / "cache/x" / f"{kept['a.png']['id']}.npy"
    assert prepare.CachedDataset([row])[0].shape == (1, 256, 256, 1)
    for spoil in (lambda: np.save(path, np.zeros((1, 2, 2, 1), np.uint8)), lambda: cut(path),
                  lambda: np.save(path, np.array([{}]), allow_pickle=True), path.unlink):
        spoil()
        with pytest.raises(UserError, match=f"{row['id']}.*--verify"):
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
    (["folder", "--verify"], "samples.csv: no such file"), (["folder", "text", "--labels", "no.csv"], "no.csv"),
    (["folder", "text", "--out", "text/a.txt"], "cannot make")])
def test_wrong_usage_names_the_thing_and_the_remedy(tmp_path, monkeypatch, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
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
    assert run("folder", ".", "--shard", "3/2").returncode == 2


# ---- the public data sets, in the layouts users have, dirt included -------------------------------------------------
def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16), value, np.uint8)).save(path)


@pytest.mark.parametrize("folder", ["images", "images_001/images"])
def test_chestxray14_layouts(tmp_path, monkeypatch, capsys, folder):
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
    assert "found 1, paper 7,992" in capsys.readouterr().out
    rows = [kept[f"{folder}/0000000{n}_000.png"] for n in range(4)]
    assert [row["labels"] for row in rows] == [("Cardiomegaly", "Emphysema"), (), ("Hernia",), ("Pleural_Thickening",)]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"] and list(rejected) == [f"{folder}/stray.png"]
    assert rows[0]["patient"] == rows[1]["patient"] != rows[2]["patient"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real X-rays are not here")
def test_real_xrays(tmp_path, monkeypatch):
    (tmp_path / "data/images").mkdir(parents=True)
    for path in sorted(REAL.glob("images/*"))[::25]:
        (tmp_path / "data/images" / path.name).symlink_to(path)
    for path in REAL.glob("*.*"):
        (tmp_path / "data" / path.name).symlink_to(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "chestxray14", tmp_path / "data")
    assert len(kept) == 40 and not rejected
    for path, row in kept.items():
        x = load(row)[0, :, :, 0].astype(float)
        full = np.asarray(Image.open(tmp_path / "data" / path), float)
        assert abs(x.mean() - full.mean()) < 1 and x.std() > 20


def test_fetal_planes(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    for n in range(3):
        png(data / f"Images/Patient0000{n}_Plane1_1_of_15.png")
    (data / "FETAL_PLANES_DB_data.csv").write_text(
        "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
        "Patient00000_Plane1_1_of_15;1;Other;Not A Brain;Op. 1;Aloka;1 \n"
        "Patient00001_Plane1_1_of_15;2;Fetal brain;Trans-thalamic;Op. 1;Aloka;0 \n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "fetal_planes", data)
    assert "found 1, paper 8,188" in capsys.readouterr().out
    rows = [kept[f"Images/Patient0000{n}_Plane1_1_of_15.png"] for n in range(2)]
    assert [row["labels"] for row in rows] == [("Other",), ("Fetal brain",)]
    assert [row["split"] for row in rows] == ["train", "test"]
    assert rows[0]["modality"] == "ultrasound" and len(rejected) == 1


def test_kvasir_capsule_clips(tmp_path, monkeypatch, capsys):
    """Frame numbers are not padded; one frame is in two classes; one folder has the packed spelling."""
    data = tmp_path / "data"
    for n in [*range(90, 110), *range(200, 210)]:
        png(data / f"labelled_images/Normal clean mucosa/bca26705313a4644_{n}.jpg", n)
    for n in range(18):
        png(data / f"labelled_images/blood_fresh/Blood - fresh/bca26705313a4644_{n}.jpg", n)
    png(data / "labelled_images/Erosion/bca26705313a4644_90.jpg")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "kvasir_capsule", data)
    assert "found 2, paper 344" in capsys.readouterr().out
    clip = kept["labelled_images/Normal clean mucosa/bca26705313a4644_90.jpg"]
    assert clip["labels"] == ("Normal clean mucosa",) and clip["split"] == "test" and clip["shape"] == (3, 256, 256, 16)
    levels = load(clip)[0, 128, 128].astype(int)
    assert (np.diff(levels) > 0).all() and levels[0] >= 88 and levels[-1] <= 111
    assert len(rejected) == 11 and "in a run of 10 frames, a clip needs 16" in rejected.values()
    kept, _ = prepare_main(monkeypatch, tmp_path, "kvasir_capsule", data, "--min-run", 8, "--max-gap", 100, name="y")
    assert len(kept) == 2
    shutil.rmtree(data / "labelled_images")
    (data / "polyp.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack"):
        command(monkeypatch, "kvasir_capsule", data, "--out", tmp_path / "c")


def test_hyper_kvasir(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    for name, place in {"8f9e4085": "lower-gi-tract/pathological-findings/anastomotic-leakage", "aaaa": "lower/x",
                        "bbbb": "upper-gi-tract/y", "cccc": "z"}.items():
        (data / place).mkdir(parents=True)
        video(data / place / f"{name}.avi")
    (data / "video-labels.csv").write_bytes(
        b"Video file,Organ,Finding 1,Classification 1,Detailed description of finding,Finding 2,Classification 2\n"
        b"8f9e4085,Lower GI,anastomosis,Pathological findings,,stent,Therapeutic interventions\n"
        b'aaaa,Lower GI,"cancer, colorectal ",Pathological findings,\xa8,,\n'
        b"bbbb,Upper GI,ERCP,Therapeutic interventions,,,\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "hyper_kvasir", data)
    assert "found 2, paper 364" in capsys.readouterr().out and list(rejected) == ["z/cccc.avi"]
    assert [row["labels"] for row in kept.values()].count(()) == 1 and kept["lower/x/aaaa.avi"]["labels"] == ("cancer",)
    assert len(set(prepare.HYPER_KVASIR.values())) == 13


def chest_ct(data, fixed=True):
    """CT-RATE's tree: two reconstructions, a second scan, a valid volume and a head CT; HU in an LPS array."""
    hu, _ = phantom()
    lps = hu[::-1, ::-1]  # array axes to the left, back and head
    for name in ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1"):
        split, patient, scan, _ = name.split("_")
        path = data / f"dataset/{split}{'_fixed' * fixed}/{split}_{patient}/{split}_{patient}_{scan}/{name}.nii.gz"
        if fixed:
            nifti(path, lps, np.diag([-2.0, -2.5, 3.0, 1.0]))
        else:  # blank header, values before the rescale
            header = nib.Nifti1Image(((lps + 8192) / 2).astype(np.float32), None)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(header.to_bytes(), 1))
    names = ["Lung nodule", "Hiatal hernia"]
    (data / "dataset/labels").mkdir()
    tables = {"train": "train_1_a_1.nii.gz,1,0\ntrain_1_b_1.nii.gz,,1\n", "valid": "valid_1_a_1,1.0,1\n"}
    for part, rows in tables.items():
        (data / f"dataset/labels/{part}_predicted_labels.csv").write_text(f"VolumeName,{','.join(names)}\n{rows}")
    (data / "dataset/labels/no_chest_train.txt").write_text("train_2/train_2_a/train_2_a_1.nii.gz\n")
    for part in ("train", "validation"):
        (data / f"dataset/labels/{part}_metadata.csv").write_text(
            "VolumeName,RescaleIntercept,RescaleSlope,XYSpacing,ZSpacing\n" + "".join(
                f'{name}.nii.gz,-8192,2,"[2.0, 2.5]",3.0\n' for name in ("train_1_a_1", "valid_1_a_1")))
    return hu


def test_ct_rate_with_both_headers(tmp_path, monkeypatch, capsys):
    for fixed in (True, False):
        data = tmp_path / f"data{fixed}"
        hu = chest_ct(data, fixed)
        want = read_any(nifti(tmp_path / "a.nii.gz", hu, np.diag([2.0, 2.5, 3.0, 1.0])), "ct", size=48, slices=16)[1]
        kept, rejected = prepare_main(monkeypatch, tmp_path, "ct_rate", data, "--size", 48, "--slices", 16,
                                      name=str(fixed))
        kept = {os.path.basename(path): row for path, row in kept.items()}
        assert set(kept) == {"train_1_a_1.nii.gz", "valid_1_a_1.nii.gz"} | ({"train_1_b_1.nii.gz"} if fixed else set())
        assert np.abs(load(kept["train_1_a_1.nii.gz"]).astype(float) - want).max() < 2e-3, "HU and orientation"
        assert kept["train_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule",)
        assert kept["valid_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule", "finding:Hiatal hernia")
        assert [kept[f"{part}_1_a_1.nii.gz"]["split"] for part in ("train", "valid")] == ["train", "test"]
        reasons = {os.path.basename(path): reason for path, reason in rejected.items()}
        assert "another reconstruction" in reasons["train_1_a_2.nii.gz"] and "no chest" in reasons["train_2_a_1.nii.gz"]
        assert fixed or "metadata" in reasons["train_1_b_1.nii.gz"], "a blank header and no row: no spacing, no volume"
        assert "found 1, paper 1,564" in capsys.readouterr().out


def test_radgenome_labels_on_ct_rate_and_on_its_own_volumes(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    hu = chest_ct(data)
    nifti(data / "dataset/valid_preprocessed/valid_7/valid_7a/valid_7_a_1.nii.gz",
          hu[::-1, ::-1].astype(np.float32), np.eye(4))
    tables = tmp_path / "radgenome_files"
    tables.mkdir()
    for part, volume in (("train", "train_1_a_1.nii.gz"), ("validation", "valid_7_a_1.nii.gz")):
        (tables / f"{part}_vqa_abnormality.csv").write_text(
            f'Volumename,Anatomy,Abnormality\n{volume},lung/lung/right lung,"ground glass areas, wider than normal"\n'
            f"{volume},lung/lung/left lung,no findings\n{volume},heart/heart,no findings\n")
        (tables / f"{part}_vqa_size.csv").write_text(
            "Volumename,Anatomy,Abnormality,Size\n" + "".join(
                f"{volume},abdomen/abdomen/liver,hypodense lesion,{size}\n" for size in (
                    "13 mm", "1 cm", "6x4 mm", "2.7x2.8 cm", "120x87mm", "2-3 mm", "170 in", "")))
    shutil.copy(data / "dataset/labels/train_predicted_labels.csv", tables)
    kept, _ = prepare_main(monkeypatch, tmp_path, "radgenome", data, "--labels", tables, "--size", 48, "--slices", 16)
    kept = {os.path.basename(path): row for path, row in kept.items()}
    sizes = tuple(f"size:abdomen:hypodense lesion:{mm}" for mm in ("13", "10", "6", "28", "120", "3"))
    status = {"status:lung:abnormal", "status:heart:normal"}
    assert set(kept["train_1_a_1.nii.gz"]["labels"]) == {"finding:Lung nodule", *status, *sizes}
    assert set(kept["valid_7_a_1.nii.gz"]["labels"]) == {*status, *sizes}
    assert kept["valid_7_a_1.nii.gz"]["split"] == "test" and "found 4, paper 25,687" in capsys.readouterr().out
    want = read_any(nifti(tmp_path / "a.nii.gz", hu, np.diag([1.0, 1.0, 3.0, 1.0])), "ct", size=48, slices=16)[1]
    assert np.abs(load(kept["valid_7_a_1.nii.gz"]).astype(float) - want).max() < 2e-3, "LPS under an identity header"


def test_folder_labels(tmp_path, monkeypatch):
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data / "p1/ct", hu, affine)
    dicom(data / "p1/x.dcm", np.zeros((9, 9), np.uint8))
    png(data / "p2/us.png")
    (data / "labels.csv").write_text("path,labels,patient,split,modality\np1/ct,lesion|cyst,1,test,\n"
                                     "p1/x.dcm,,1,train,\np2/us.png,kidney,2,,ultrasound\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--labels", data / "labels.csv")
    assert kept["p1/ct"]["labels"] == ("lesion", "cyst") and kept["p1/ct"]["split"] == "test" and not rejected
    assert kept["p1/ct"]["patient"] == kept["p1/x.dcm"]["patient"] != kept["p2/us.png"]["patient"]
    assert kept["p1/x.dcm"]["labels"] == () and kept["p2/us.png"]["modality"] == "ultrasound"


def test_demo_is_written_as_files_and_read_back(tmp_path, monkeypatch):
    phantoms = pytest.importorskip("tests.phantoms")
    write = phantoms.write_demo
    monkeypatch.setattr(phantoms, "write_demo", lambda folder: write(folder, n=2))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "demo", tmp_path / "demo", "--size", 64, "--slices", 16)
    assert {row["modality"] for row in kept.values()} == set(prepare.MODALITIES) and set(rejected) <= {"labels.csv"}
    assert all(row["labels"] and row["patient"] and row["split"] for row in kept.values())
