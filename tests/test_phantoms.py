"""Phantoms are real files of a known body: geometry, physics, headers, splits, and nothing left to chance."""
import csv
from collections import Counter

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from tests import phantoms
from tests.phantoms import (ECHO_PARTS, MODALITIES, ORGANS, PARTS, Shape, box, ct, paint, ultrasound,
                            write_demo, write_nifti, write_sample, write_series, xray)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, n=5, seed=3)
    with open(folder / "labels.csv", newline="") as file:
        return folder, list(csv.DictReader(file))


def shape(tissue, start, end, radii):
    return Shape(tissue, np.float32(start), np.float32(end), np.float32(np.broadcast_to(radii, 3)))


@pytest.mark.parametrize("start, end, radii, volume", [
    ((1, 2, 3), (1, 2, 3), (10, 12, 8), 4 / 3 * np.pi * 960),
    ((0, 0, -9), (0, 0, 9), 5, np.pi * (25 * 18 + 4 / 3 * 125)),
    ((-20, -33, 20), (-20, -33, 20), 2, 4 / 3 * np.pi * 8)])  # a small one in a corner
def test_shapes_have_the_volume_of_the_text_book(start, end, radii, volume):
    points = np.float32(box((181, 181, 181), (90, 90, 90)))
    image = paint([shape("bone", start, end, radii)], points, {"air": 0, "bone": 1}, .5)
    assert image.sum() / 8 == pytest.approx(volume, rel=.02)


@pytest.mark.parametrize("part", PARTS)
def test_ct_shows_air_fat_flesh_and_bone(part):
    image, voxel, _ = ct(part, np.random.default_rng(5))
    assert image.dtype == np.int16 and np.all(voxel > .5)
    assert 48 <= image.shape[0] == image.shape[1] <= 64 and 12 <= image.shape[2] <= 24
    for low, high in ((-1025, -900), (-200, -20), (0, 350), (500, 3072)):
        assert ((image > low) & (image < high)).mean() > .002


def test_an_xray_is_bright_where_much_bone_is_passed():
    """The middle of a head is behind two skull walls and the brain; the corners are behind nothing."""
    image, _, _ = xray("head", np.random.default_rng(0))
    assert image.dtype == np.uint16 and image.max() < 4096
    assert np.median(image[28:36, 20:36]) > 4 * np.median(image[:4, :4])


def test_bone_throws_a_shadow_in_ultrasound(monkeypatch):
    """The same probe on the same ball of flesh, without and with a marble of bone in it."""
    flesh, bone = shape("muscle", (0, 0, 0), (0, 0, 0), 90), shape("bone", (0, 0, 0), (0, 0, 0), 25)
    for seed in (0, 2, 4):  # in these the sector is not cut off below the marble
        pictures = []
        for shapes in ([flesh], [flesh, bone]):
            monkeypatch.setattr(phantoms, "body", lambda part, rng, shapes=shapes: (shapes, None))
            pictures.append(ultrasound("neck", np.random.default_rng(seed))[0] / 255)
        free, shadow = pictures
        y, x = np.nonzero(free)
        change = shadow.mean(0)[x.min():x.max()] - free.mean(0)[x.min():x.max()]
        assert change.min() < -.1 and np.abs(change).min() < .01  # columns behind the bone, and beside it
        assert np.abs(shadow - free)[y.min():y.min() + 20].mean() < .05  # above it


def test_both_ct_formats_hold_the_same_volume(tmp_path):
    """Whatever the order of axes or files: positions and affines lead back to the array and its voxels."""
    image = np.random.default_rng(0).integers(-1000, 2000, (9, 8, 7)).astype(np.int16)
    voxel = np.array([1.5, 1.5, 4])
    for seed in range(6):
        write_nifti(tmp_path / "a.nii.gz", image, voxel, np.random.default_rng(seed))
        scan = nib.as_closest_canonical(nib.load(tmp_path / "a.nii.gz"))  # right to left, back to front
        assert np.array_equal(scan.get_fdata()[::-1, ::-1], image)
        assert np.allclose(scan.header.get_zooms(), voxel)
        write_series(tmp_path / str(seed), image, voxel, "P1", np.random.default_rng(seed))
        slices = [pydicom.dcmread(path) for path in (tmp_path / str(seed)).iterdir()]
        slices.sort(key=lambda ds: ds.ImagePositionPatient[2])
        stack = np.stack([ds.pixel_array.T * ds.RescaleSlope + ds.RescaleIntercept for ds in slices], -1)
        assert np.array_equal(stack, image) and len({ds.SOPInstanceUID for ds in slices}) == 7
        assert np.allclose(np.diff([float(ds.ImagePositionPatient[2]) for ds in slices]), 4, atol=1e-3)


def test_every_row_is_a_readable_file_of_its_modality(demo):
    folder, rows = demo
    seen = set()
    for row in rows:
        path, modality = folder / row["path"], row["modality"]
        if modality == "xray":
            ds = pydicom.dcmread(path)
            assert ds.Modality in ("DX", "CR") and ds.pixel_array.max() < 4096 and ds.WindowWidth > 0
            assert ds.PatientID == row["patient"] and str(ds.PatientName).startswith("PHANTOM^")
            seen.add(ds.PhotometricInterpretation)
        elif modality == "endoscopy":
            frames = iio.imread(path, plugin="pyav")
            assert frames.shape[1:] == (160, 160, 3) and 12 <= len(frames) <= 16
            assert np.abs(np.diff(frames.astype(float), axis=0)).mean() > 1  # something happens
            assert frames[..., 0].mean() > frames[..., 2].mean() > 10  # flesh, not grey
        elif modality == "ultrasound":
            assert Image.open(path).mode == "L"
        elif path.is_dir():
            assert modality == "ct" and len(list(path.iterdir())) >= 12
            seen.add("series")
        else:
            assert nib.load(path).get_fdata().ndim == 3
            seen.add(f"{modality} {path.name[4:]}")
    assert seen == {"MONOCHROME1", "MONOCHROME2", "series", "ct .nii.gz", "mri .nii.gz"}


def test_splits_labels_and_patients(demo):
    _, rows = demo
    count = Counter((r["modality"], r["split"]) for r in rows)
    assert count == {(m, "test"): 4 for m in MODALITIES} | {(m, "train"): 5 for m in MODALITIES if m != "mri"}
    assert len({r["patient"] for r in rows}) == len({r["path"] for r in rows}) == len(rows)
    names = {m: {r["labels"].split("|")[0][5:] for r in rows if r["modality"] == m} for m in MODALITIES}
    assert names["ct"] == names["xray"] == {*PARTS}  # so they can be compared
    assert names["ultrasound"] == {*ECHO_PARTS} and names["endoscopy"] == {*ORGANS}
    assert {"lesion:" in r["labels"] for r in rows} == {True, False}
    assert not any(label.split(":")[1] in r["path"] for r in rows for label in r["labels"].split("|"))


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    """Patients do not depend on how many others there are, nor on which process made them."""
    folder, _ = demo
    write_demo(tmp_path, n=1, seed=3)
    paths = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file() and p.name != "labels.csv"]
    assert len(paths) >= 9 and all((tmp_path / p).read_bytes() == (folder / p).read_bytes() for p in paths)
    write_sample(tmp_path / "other", "xray", 0, "test", 4)
    assert (tmp_path / "other/xray/0000.dcm").read_bytes() != (folder / "xray/0000.dcm").read_bytes()
