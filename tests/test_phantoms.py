"""Phantoms are real files of a known body: geometry, physics, headers, splits, and nothing left to chance."""
import csv
import os
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
    """A folder of four test and five training phantoms a modality, and the rows of its labels.csv."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, n=5, seed=3)
    with open(folder / "labels.csv", newline="") as file:
        return folder, list(csv.DictReader(file))


def paths_of(demo, modality):
    folder, rows = demo
    return [folder / row["path"] for row in rows if row["modality"] == modality]


def shape(tissue, start, end, radii):
    return Shape(tissue, np.float32(start), np.float32(end), np.float32(np.broadcast_to(radii, 3)))


# ---- geometry and physics -------------------------------------------------------------------------
@pytest.mark.parametrize("start, end, radii, volume", [
    ((1, 2, 3), (1, 2, 3), (10, 12, 8), 4 / 3 * np.pi * 960),
    ((0, 0, -9), (0, 0, 9), 5, np.pi * (25 * 18 + 4 / 3 * 125)),
    ((-20, -33, 20), (-20, -33, 20), 2, 4 / 3 * np.pi * 8)])  # a small one in a corner
def test_shapes_have_the_volume_of_the_text_book(start, end, radii, volume):
    points = np.float32(box((181, 181, 181), (90, 90, 90)))  # 8 a cubic millimetre
    image = paint([shape("bone", start, end, radii)], points, {"air": 0, "bone": 1}, .5)
    assert image.sum() / 8 == pytest.approx(volume, rel=.02)


def test_a_shape_is_drawn_alike_however_few_points_are_looked_at_first():
    """Small, thin, slanted and ribbed shapes in thick slices, each point looked at: the very same picture."""
    points = np.float32(box((40, 36, 9), (80, 72, 60)))
    small = shape("bone", (3, 2, 1), (3, 2, 1), 1.5)
    slanted = shape("bone", (-30, -20, -25), (30, 20, 25), (2, 6, 3))
    ribbed = shape("bone", (0, 0, 0), (0, 0, 0), (30, 25, 28))._replace(gap=11)
    for one in (small, slanted, ribbed):
        pictures = [paint([one], points, {"air": 0, "bone": 1}, 2, step) for step in (1, 3, 5)]
        assert pictures[0].max() > .2
        assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("part", PARTS)
def test_ct_shows_air_fat_flesh_and_bone(part):
    image, voxel, _ = ct(part, np.random.default_rng(5))
    assert image.dtype == np.int16 and np.all(voxel > .5)
    assert 48 <= image.shape[0] == image.shape[1] <= 64 and 12 <= image.shape[2] <= 24
    for low, high in ((-1025, -900), (-200, -20), (0, 350), (500, 3072)):
        assert ((image > low) & (image < high)).mean() > .002


def test_most_lesions_are_seen_in_ct(monkeypatch):
    """The same patients drawn again without their lesion: some voxel changes by more than 100 HU."""
    patients = [ct("abdomen", np.random.default_rng(seed)) for seed in range(16)]
    whole_body = phantoms.body

    def healthy_body(part, rng):
        shapes, kind = whole_body(part, rng)
        return [one for one in shapes if one.tissue not in phantoms.LESIONS], kind

    monkeypatch.setattr(phantoms, "body", healthy_body)
    seen = []
    for seed, patient in enumerate(patients):
        healthy = ct("abdomen", np.random.default_rng(seed))
        change = np.abs(patient.image.astype(int) - healthy.image).max()
        if patient.lesion:
            seen.append(change > 100)
        else:
            assert change == 0
    assert 8 <= len(seen) < 16 and np.mean(seen) > .8


def test_an_xray_is_bright_where_much_bone_is_passed():
    """The middle of a head is behind two skull walls and the brain; the corners are behind nothing."""
    image, _, _ = xray("head", np.random.default_rng(0))
    assert image.dtype == np.uint16 and image.max() < 4096
    assert np.median(image[28:36, 20:36]) > 4 * np.median(image[:4, :4])


def test_bone_throws_a_shadow_in_ultrasound(monkeypatch):
    """The same probe on the same ball of flesh, without and with a marble of bone in it."""
    flesh = shape("muscle", (0, 0, 0), (0, 0, 0), 90)
    bone = shape("bone", (0, 0, 0), (0, 0, 0), 25)
    for seed in (0, 2, 4):  # in these the sector is not cut off below the marble
        pictures = []
        for shapes in ([flesh], [flesh, bone]):
            monkeypatch.setattr(phantoms, "body", lambda part, rng, shapes=shapes: (shapes, None))
            pictures.append(ultrasound("neck", np.random.default_rng(seed)).image / 255)
        free, shadow = pictures
        y, x = np.nonzero(free)
        change = shadow.mean(0)[x.min():x.max()] - free.mean(0)[x.min():x.max()]
        assert change.min() < -.1 and np.abs(change).min() < .01  # columns behind the bone, and beside it
        assert np.abs(shadow - free)[y.min():y.min() + 20].mean() < .05  # above it


# ---- files ----------------------------------------------------------------------------------------
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


def test_xrays_are_12_bit_dicom_of_both_photometric_kinds(demo):
    folder, rows = demo
    kinds = set()
    for row in rows:
        if row["modality"] == "xray":
            ds = pydicom.dcmread(folder / row["path"])
            assert ds.Modality in ("DX", "CR") and ds.BitsStored == 12 and ds.BitsAllocated == 16
            assert ds.pixel_array.max() < 4096 and ds.WindowWidth > 0
            assert ds.PatientID == row["patient"] and str(ds.PatientName).startswith("PHANTOM^")
            kinds.add(ds.PhotometricInterpretation)
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


def test_endoscopies_are_videos_of_flesh_that_moves(demo):
    for path in paths_of(demo, "endoscopy"):
        frames = iio.imread(path, plugin="pyav")
        assert path.suffix == ".avi" and frames.shape[1:] == (160, 160, 3) and 12 <= len(frames) <= 16
        assert np.abs(np.diff(frames.astype(float), axis=0)).mean() > 1
        assert frames[..., 0].mean() > frames[..., 2].mean() > 10  # red, not grey


def test_ultrasounds_are_grey_png(demo):
    for path in paths_of(demo, "ultrasound"):
        assert path.suffix == ".png" and Image.open(path).mode == "L"


def test_volumes_are_nifti_and_every_other_ct_a_series(demo):
    series = [path for path in paths_of(demo, "ct") if path.is_dir()]
    packed = [path for path in paths_of(demo, "ct") if path.name.endswith(".nii.gz")]
    assert len(series) == 4 and len(packed) == 5
    assert all(12 <= len(list(path.iterdir())) <= 24 for path in series)
    for path in packed + paths_of(demo, "mri"):
        assert path.name.endswith(".nii.gz") and nib.load(path).get_fdata().ndim == 3


def test_splits_labels_and_patients(demo):
    _, rows = demo
    count = Counter((row["modality"], row["split"]) for row in rows)
    expected = {(modality, "test"): 4 for modality in MODALITIES}
    expected |= {(modality, "train"): 5 for modality in MODALITIES if modality != "mri"}
    assert count == expected
    assert len({row["patient"] for row in rows}) == len({row["path"] for row in rows}) == len(rows)

    names = {modality: set() for modality in MODALITIES}
    for row in rows:
        names[row["modality"]].add(row["labels"].split("|")[0].removeprefix("part:"))
        assert not any(label.split(":")[1] in row["path"] for label in row["labels"].split("|"))
    assert names["ct"] == names["xray"] == {*PARTS}  # so they can be compared
    assert names["ultrasound"] == {*ECHO_PARTS} and names["endoscopy"] == {*ORGANS}
    assert {"lesion:" in row["labels"] for row in rows} == {True, False}


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    """Patients do not depend on how many others there are, nor on which process made them."""
    folder, _ = demo
    write_demo(tmp_path, n=1, seed=3)
    made = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".csv"]
    assert len(made) >= 9
    for path in made:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    write_sample(tmp_path / "other", "xray", 0, "test", 4)
    assert (tmp_path / "other/xray/0000.dcm").read_bytes() != (folder / "xray/0000.dcm").read_bytes()


def test_the_number_of_cores_changes_no_byte(demo, tmp_path):
    """An encoder of video with a thread a core would write other bytes."""
    folder, _ = demo
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        write_sample(tmp_path, "endoscopy", 0, "test", 3)
    finally:
        os.sched_setaffinity(0, cores)
    assert (tmp_path / "endoscopy/0000.avi").read_bytes() == (folder / "endoscopy/0000.avi").read_bytes()
