"""The phantoms are real files of a known body: geometry, physics, file headers, splits, and nothing left to chance."""
import csv
from collections import Counter

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from tests.phantoms import (ECHO_PARTS, MODALITIES, ORGANS, PARTS, TISSUES, ball, bones, ct, endoscopy, head,
                            lattice, layer, paint, rod, ultrasound, write_demo, write_nifti, write_sample,
                            write_series, xray)

HU = {tissue: row[0] for tissue, row in TISSUES.items()}


def grid(extent=40, count=41):
    """Points (3, n, n, n) one millimetre apart."""
    axis = np.linspace(-extent / 2, extent / 2, count, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, n=5, seed=3)
    with open(folder / "labels.csv", newline="") as file:
        return folder, list(csv.DictReader(file))


def volume_of(shape):
    """Millilitres of a shape, counted on the grid."""
    return paint([shape], grid(), {"air": 0, shape.tissue: 1}, .5).sum() / 1000


def test_shapes_have_the_volume_of_the_text_book():
    assert volume_of(ball("bone", (1, 2, 3), (10, 12, 8))) == pytest.approx(4 / 3 * np.pi * .96, rel=.02)
    pill = np.pi * (.5 ** 2 * 1.8 + 4 / 3 * .5 ** 3)
    assert volume_of(rod("bone", (0, 0, -9), (0, 0, 9), 5)) == pytest.approx(pill, rel=.02)
    assert volume_of(layer(ball("bone", (0, 0, 0), 10), "bone", 4)) == pytest.approx(4 / 3 * np.pi * .216, rel=.02)
    flat = volume_of(ball("bone", (0, 0, 0), (12, 4, 6)))
    assert volume_of(ball("bone", (0, 0, 0), (12, 4, 6), turn=30)) == pytest.approx(flat, rel=.02)


def test_marrow_lies_inside_the_shell_and_joined_bones_share_it():
    shafts = rod("bone", (0, 0, -15), (0, 0, 0), 6), rod("bone", (0, 0, 0), (0, 0, 15), 6)
    image = paint(bones(*shafts, wall=2), grid(), HU, .5)
    assert np.allclose(image[20, 20, 8:33], HU["marrow"], atol=1)          # no wall where the two meet
    assert image[25, 20, 20] == pytest.approx(HU["bone"]) and image[32, 20, 20] == HU["air"]


def test_looking_only_where_a_shape_can_be_loses_nothing():
    """The coarse search of `paint` must not clip a shape, on a turned and zoomed grid, and in a single slice."""
    rng = np.random.default_rng(0)
    shapes = [ball("bone", rng.uniform(-60, 60, 3), rng.uniform(2, 30, 3)) for _ in range(20)]
    everywhere = [s._replace(low=s.low - 1e4, high=s.high + 1e4) for s in shapes]
    for shape in ((30, 29, 31), (64, 50, 1)):
        points = lattice(shape, np.array([150, 150, 90]), rng, (10, 20, 70))
        assert np.array_equal(paint(shapes, points, HU, 2), paint(everywhere, points, HU, 2))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_ct_shows_air_fat_flesh_and_bone(part):
    image, voxel, _ = ct(part, np.random.default_rng(5))
    assert image.dtype == np.int16 and np.all(voxel > .5)
    assert 96 <= image.shape[0] == image.shape[1] <= 128 and 24 <= image.shape[2] <= 48
    for low, high in ((-1025, -900), (-200, -20), (0, 350), (500, 3072)):
        assert ((image > low) & (image < high)).mean() > .002


def test_an_xray_is_bright_where_much_bone_is_passed():
    """The middle of a head is behind two skull walls and the brain; the corners are behind nothing."""
    image, _, _ = xray(head, np.random.default_rng(0))
    assert image.dtype == np.uint16 and image.max() < 4096
    assert np.median(image[image.shape[0] // 2 - 8:, 56:72][:16]) > 4 * np.median(image[:8, :8])


def test_bone_throws_a_shadow_in_ultrasound(monkeypatch):
    """The same probe on the same ball of flesh, with and without a marble of bone in it."""
    def flesh(rng):
        return [ball("muscle", (0, 0, 0), 90)]

    def marble(rng):
        return [*flesh(rng), ball("bone", (0, 0, 0), 25)]
    for part in (flesh, marble):
        monkeypatch.setitem(PARTS, part, 160)  # sees past the marble
    for seed in range(5):
        free, shadow = (ultrasound(part, np.random.default_rng(seed))[0] / 255. for part in (flesh, marble))
        left = []                                                                     # share of the light at the bottom
        for column in range(0, 192, 16):
            rows = np.flatnonzero((free[:, column:column + 16] > .02).all(1))         # the sector lies anywhere
            if len(rows) > 40:
                far = np.s_[rows[-10:], column:column + 16]
                left.append(shadow[far].mean() / free[far].mean())
        assert min(left) < .5 and max(left) > .9, left                                # behind the bone, and beside it
        top = np.flatnonzero((free > .02).any(1))[0]
        assert np.abs(shadow - free)[top:top + 30].mean() < .05                       # above it
        assert np.all(free[:4, :8] == 0) and np.all(free[:4, -8:] == 0)               # beside the sector


@pytest.mark.parametrize("organ", ORGANS)
def test_an_endoscopy_moves_through_a_coloured_tube(organ):
    frames, _, _ = endoscopy(organ, np.random.default_rng(1))
    assert frames.shape[1:] == (160, 160, 3) and 24 <= len(frames) <= 28 and frames.dtype == np.uint8
    assert np.abs(np.diff(frames.astype(float), axis=0)).mean() > 1        # something happens
    assert frames[..., 0].mean() > frames[..., 2].mean() > 10              # flesh, not grey


def test_both_ct_formats_hold_the_same_volume(tmp_path):
    """Whatever the axis order or file order: positions and affines lead back to the array and its voxel size."""
    image = np.random.default_rng(0).integers(-1000, 2000, (9, 8, 7)).astype(np.int16)
    voxel = np.array([1.5, 1.5, 4])
    for seed in range(6):
        write_nifti(tmp_path / "a.nii.gz", image, voxel, np.random.default_rng(seed))
        scan = nib.as_closest_canonical(nib.load(tmp_path / "a.nii.gz"))   # right to left, back to front
        assert np.array_equal(scan.get_fdata()[::-1, ::-1], image) and np.allclose(scan.header.get_zooms(), voxel)
        write_series(tmp_path / str(seed), image, voxel, "P1", np.random.default_rng(seed))
        slices = [pydicom.dcmread(path) for path in (tmp_path / str(seed)).iterdir()]
        slices.sort(key=lambda ds: ds.ImagePositionPatient[2])
        stack = np.stack([ds.pixel_array.T * ds.RescaleSlope + ds.RescaleIntercept for ds in slices], -1)
        assert np.array_equal(stack, image) and len({ds.SOPInstanceUID for ds in slices}) == 7
        assert np.allclose(np.diff([float(ds.ImagePositionPatient[2]) for ds in slices]), 4, atol=1e-3)


def test_every_row_is_a_readable_file_of_its_modality(demo):
    folder, rows = demo
    for row in rows:
        path = folder / row["path"]
        if row["modality"] == "xray":
            ds = pydicom.dcmread(path)
            assert ds.Modality in ("DX", "CR") and ds.pixel_array.max() < 4096
            assert ds.PatientID == row["patient"] and str(ds.PatientName).startswith("PHANTOM^")
        elif row["modality"] == "endoscopy":
            assert iio.imread(path, plugin="pyav").shape[1:] == (160, 160, 3)
        elif row["modality"] == "ultrasound":
            assert Image.open(path).mode == "L"
        elif path.is_dir():
            assert row["modality"] == "ct" and len(list(path.iterdir())) >= 24
        else:
            assert path.name.endswith(".nii.gz") and nib.load(path).shape
    kinds = {pydicom.dcmread(folder / r["path"]).PhotometricInterpretation for r in rows if r["modality"] == "xray"}
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}
    assert {(folder / r["path"]).is_dir() for r in rows if r["modality"] == "ct"} == {True, False}


def test_splits_labels_and_patients(demo):
    _, rows = demo
    count = Counter((r["modality"], r["split"]) for r in rows)
    assert count == {(m, s): k for m in MODALITIES for s, k in (("test", 4), ("train", 5)) if m != "mri" or k == 4}
    assert len({r["patient"] for r in rows}) == len({r["path"] for r in rows}) == len(rows)  # nobody is in both splits
    names = {m: {r["labels"].split("|")[0] for r in rows if r["modality"] == m} for m in MODALITIES}
    assert names["ct"] == names["xray"] == {f"part:{part.__name__}" for part in PARTS}        # so they can be compared
    assert names["ultrasound"] == {f"part:{part.__name__}" for part in ECHO_PARTS}
    assert names["endoscopy"] == {f"part:{organ}" for organ in ORGANS}
    assert any("lesion:" in r["labels"] for r in rows) and any("lesion:" not in r["labels"] for r in rows)
    assert not any(label.split(":")[1] in r["path"] for r in rows for label in r["labels"].split("|"))


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    """Patients do not depend on how many others there are, nor on which process made them."""
    folder, _ = demo
    write_demo(tmp_path, n=1, seed=3)
    paths = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file() and p.name != "labels.csv"]
    assert len(paths) >= 9 and all((tmp_path / p).read_bytes() == (folder / p).read_bytes() for p in paths)
    write_sample(tmp_path / "other", "xray", 0, "test", 4)
    assert (tmp_path / "other/xray/0000.dcm").read_bytes() != (folder / "xray/0000.dcm").read_bytes()
