"""Shared by all tests: the repository on the path, one thread, makers of small files and of small caches."""
import contextlib
import csv
import gzip
import sys
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

import prepare  # noqa: E402
from prepare import UserError, load_sample, read_samples  # noqa: E402
from tests import phantoms  # noqa: E402

ROOT = Path(__file__).parents[1]
SPOT = np.eye(9, dtype=np.uint8)  # a picture that is not blank
WHEEL = Path(pydicom.__file__).parent / "data/test_files"
SOP = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4",
       "CR": "1.2.840.10008.5.1.4.1.1.1", "DX": "1.2.840.10008.5.1.4.1.1.1.1",
       "US": "1.2.840.10008.5.1.4.1.1.6.1", "USM": "1.2.840.10008.5.1.4.1.1.3.1"}


# ---- makers of small files ----------------------------------------------------------------------
def dicom(path, pixels, modality="CR", syntax=ExplicitVRLittleEndian, **tags):
    """A DICOM file of a patient whose name must never be seen anywhere."""
    secret = {"PatientName": "SECRETNAME^ANNA", "PatientID": "SECRETID77", "PatientBirthDate": "19610503",
              "Modality": modality, "BodyPartExamined": "CHEST", "BurnedInAnnotation": "NO"}
    return phantoms.dicom(path, pixels, SOP.get(modality, SOP["CR"]), syntax, **secret | tags)


def series(folder, hu, affine, slope=1.0, intercept=-1024.0, modality="CT", skip=(), uid="", **tags):
    """Voxels (i, j, k) with a RAS+ affine as a DICOM series along k: shuffled names, wrong InstanceNumber."""
    lps, own = np.diag([-1, -1, 1, 1]) @ affine, generate_uid()
    names = np.random.default_rng(0).permutation(hu.shape[2])
    for k in range(hu.shape[2]):
        if k in skip:
            continue
        stored = np.round((hu[:, :, k].T - intercept) / slope).astype(np.int16)  # (rows = j, columns = i)
        place = lps @ [0, 0, k, 1]
        spacing = np.linalg.norm(lps[:3, :2], axis=0)
        directions = np.concatenate([lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]])
        dicom(folder / f"IM{names[k]:04d}", stored, modality, SeriesInstanceUID=uid or own,
              RescaleSlope=str(slope), RescaleIntercept=str(intercept), InstanceNumber=str(int(names[k])),
              PixelSpacing=[float(x) for x in spacing[::-1]],
              ImageOrientationPatient=[float(x) for x in directions],
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
    pictures = np.broadcast_to(levels, (frames, size[1], size[0], 3))
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    iio.imwrite(path, pictures, plugin="pyav", codec=codec, fps=25, out_pixel_format=pixel_format)
    return path


def phantom(n=(24, 20, 16)):
    """HU voxels (x, y, z), RAS+: x to the patient's right, y to the front, z up; a ball at each end."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, k) for k in n), indexing="ij")
    hu = np.where(x ** 2 + y ** 2 + z ** 2 < 0.9, 0.0, -1000.0)
    for centre, value in (((0.6, 0, 0), 900), ((0, 0.6, 0), 600), ((0, 0, 0.6), 300)):
        hu[sum((a - c) ** 2 for a, c in zip((x, y, z), centre)) < 0.03] = value
    return np.round(hu).astype(np.int16), np.diag([2.0, 2.5, 3.0, 1.0])


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    return path


def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((12, 16), value, np.uint8)
    image[0, 0] = 255  # else it would be blank
    Image.fromarray(image).save(path)


def item(**tags):
    """A DICOM data set of a sequence. A dict among the tags stands for a sequence of one item."""
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, Sequence([item(**value)]) if isinstance(value, dict) else value)
    return dataset


def enhanced(path, planes, groups, modality="MR", **tags):
    """Planes (rows, columns) of 2.5 x 2 mm pixels as one enhanced file; `groups`: tags of each frame."""
    shared = item(PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
                  PixelMeasuresSequence={"PixelSpacing": [2.5, 2.0]})
    return dicom(path, np.stack(planes).astype(np.int16), modality,
                 **{"SeriesInstanceUID": generate_uid(), "SharedFunctionalGroupsSequence": Sequence([shared]),
                    "PerFrameFunctionalGroupsSequence": Sequence([item(**tags) for tags in groups])} | tags)


def edit(folder, change):
    """Apply change(dataset, n) to each file of a folder, in the order of the positions."""
    files = sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    for n, path in enumerate(files):
        ds = pydicom.dcmread(path)
        change(ds, n)
        ds.save_as(path)
    return folder


def add_series(folder, path, prefix):
    """Move the files of a folder into another one, each under its name behind a prefix."""
    path.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.rename(path / f"{prefix}{file.name}")
    return path


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


# ---- caches without any reader ------------------------------------------------------------------

def write_cache(folder, shapes, per_shape=8, seed=0, split="train"):
    """A cache folder with random samples: shapes {modality: (C, H, W, S)}; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with open(folder / "samples.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "modality", "labels", "patient", "split", "shape"])
        for modality, shape in shapes.items():
            for i in range(per_shape):
                name = f"{rng.integers(2**63):016x}"
                sides = "x".join(map(str, shape))
                table.writerow([name, modality, f"kind{i % 2}", f"p{i // 2}", split, sides])
                np.save(folder / f"{name}.npy", rng.integers(0, 256, shape, dtype=np.uint8))
    return folder


@pytest.fixture
def mixed_cache(tmp_path):
    """Eight images, eight videos and eight volumes of 32 pixels."""
    shapes = {"xray": (1, 32, 32, 1), "endoscopy": (3, 32, 32, 16), "ct": (1, 32, 32, 8)}
    return write_cache(tmp_path / "cache" / "mixed", shapes)
