"""Shared by all tests: the repository on the path, one thread, makers of small files and of small caches."""
import contextlib
import csv
import gzip
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import prepare  # noqa: E402
from prepare import UserError, load_sample, read_samples  # noqa: E402
from tests import phantoms  # noqa: E402

ROOT = Path(__file__).parents[1]
SPOT = np.eye(9, dtype=np.uint8)  # a picture that is not blank
WHEEL = Path(pydicom.__file__).parent / "data/test_files"
SOP = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4",
       "CR": "1.2.840.10008.5.1.4.1.1.1", "DX": "1.2.840.10008.5.1.4.1.1.1.1",
       "US": "1.2.840.10008.5.1.4.1.1.6.1", "USM": "1.2.840.10008.5.1.4.1.1.3.1",
       "XA": "1.2.840.10008.5.1.4.1.1.12.1", "RF": "1.2.840.10008.5.1.4.1.1.12.2"}


# ---- makers of small files -----------------------------------------------------------------------
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


def item(**tags):
    """A data set without a file, as sequences hold them."""
    ds = Dataset()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def lut(descriptor, data, vr="OW"):
    """A VOI or modality LUT: data is bytes (OW) or a list of numbers (US)."""
    ds = item(LUTDescriptor=descriptor, ModalityLUTType="US")
    ds.add_new("LUTData", vr, data)
    return Sequence([ds])


# Where an enhanced file keeps what differs between its frames.
MACROS = {"ImagePositionPatient": "PlanePositionSequence", "DiffusionBValue": "MRDiffusionSequence",
          "ImageOrientationPatient": "PlaneOrientationSequence", "EffectiveEchoTime": "MREchoSequence",
          "TemporalPositionIndex": "FrameContentSequence", "RescaleType": "PixelValueTransformationSequence",
          "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence",
          "RescaleSlope": "PixelValueTransformationSequence",
          "RescaleIntercept": "PixelValueTransformationSequence"}


def enhanced(path, files, values=(), modality="MR", **tags):
    """Files of a series as the frames of one, with the tags of values[n] in the groups of frame n."""
    slices = [pydicom.dcmread(file) for file in files]
    per_frame = []
    for n, ds in enumerate(slices):
        groups = {}
        frame_tags = {"ImagePositionPatient": ds.ImagePositionPatient}
        frame_tags |= {"RescaleSlope": ds.RescaleSlope, "RescaleIntercept": ds.RescaleIntercept}
        for name, value in (frame_tags | dict(values[n] if values else {})).items():
            setattr(groups.setdefault(MACROS[name], Dataset()), name, value)
        per_frame.append(item(**{macro: Sequence([group]) for macro, group in groups.items()}))

    measures = Sequence([item(PixelSpacing=slices[0].PixelSpacing)])
    direction = Sequence([item(ImageOrientationPatient=slices[0].ImageOrientationPatient)])
    shared = item(PixelMeasuresSequence=measures, PlaneOrientationSequence=direction)
    tags = {"SeriesInstanceUID": slices[0].SeriesInstanceUID} | tags
    return dicom(path, np.stack([ds.pixel_array for ds in slices]), modality,
                 SharedFunctionalGroupsSequence=Sequence([shared]),
                 PerFrameFunctionalGroupsSequence=Sequence(per_frame), **tags)


def tiff(path, pages, photometric=1, orientation=1):
    """An uncompressed grey TIFF: of each page the pixels, then its table of tags (TIFF 6.0)."""
    out = bytearray(b"II*\0" + bytes(4))
    link = 4  # where the place of the next table is written
    for page in pages:
        height, width = page.shape
        pixels = page.astype(page.dtype.newbyteorder("<")).tobytes()
        tags = {256: width, 257: height, 258: 8 * page.itemsize, 259: 1, 262: photometric,
                273: len(out), 274: orientation, 277: 1, 278: height, 279: len(pixels),
                339: "uif".index(page.dtype.kind) + 1}
        out += pixels
        struct.pack_into("<I", out, link, len(out))
        out += struct.pack("<H", len(tags))
        for tag, value in tags.items():
            out += struct.pack("<HHII", tag, 4, 1, value)
        link = len(out)
        out += bytes(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return path


def film(path, *streams, aspect=(1, 1)):
    """A video file: each stream a list of pictures (h, w, 3), with pixels of aspect width : height."""
    with av.open(str(path), "w") as container:
        opened = []
        for pictures in streams:
            stream = container.add_stream("mjpeg", rate=25)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuvj420p"
            stream.codec_context.qmin = stream.codec_context.qmax = 1
            stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
            opened.append(stream)
        for stream, pictures in zip(opened, streams):
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode())
    return path


def turn(path, quarters):
    """Write into an MP4 or MOV that it is to be shown turned clockwise by quarter turns."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    data = bytearray(path.read_bytes())
    one = 1 << 16
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
    path.write_bytes(data)
    return path


def drop_frames(path, numbers):
    """Leave the chunks of these frames of an AVI empty, as capture cards do where a frame is lost."""
    data = bytearray(path.read_bytes())
    index = data.rindex(b"idx1") + 8
    place = data.index(b"movi") + 4
    number = 0
    while data[place:place + 4] == b"00dc":
        size = struct.unpack_from("<I", data, place + 4)[0]
        room = size + size % 2
        if number in numbers:
            data[place + 4:place + 16] = struct.pack("<I4sI", 0, b"JUNK", room - 8)
            struct.pack_into("<I", data, index + 16 * number + 12, 0)
        place += 8 + room
        number += 1
    path.write_bytes(data)
    return path


# ---- caches without any reader -------------------------------------------------------------------

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
