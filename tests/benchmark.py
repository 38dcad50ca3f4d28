"""How fast the stages are, on files made here; nothing is downloaded and no test depends on it.

    python tests/benchmark.py prepare     # beside MONAI's transforms, where MONAI is installed (pip install monai)

prepare: one core; CPU seconds a sample from file to cached array, and the memory of the process that does it.
"""
import gzip
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare  # noqa: E402


# ---- prepare --------------------------------------------------------------------------------------------------------
def write_ct(folder, slices=300, side=512):
    """A noisy ball in air as a DICOM series and as a compressed NIfTI file of the same orientation."""
    rng, axis = np.random.default_rng(0), np.linspace(-1, 1, side, dtype=np.float32)
    plane = axis[:, None] ** 2 + axis[None] ** 2  # (side, side)
    z = np.linspace(-1, 1, slices)[:, None, None]
    hu = np.where(plane + z ** 2 < 0.8, 40, -1000) + rng.integers(-20, 20, (slices, side, side))
    series = generate_uid()
    (folder / "series").mkdir()
    for k, values in enumerate(hu.astype(np.int16)):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.SOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", series, k + 1
        ds.Rows = ds.Columns = side
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.RescaleSlope, ds.RescaleIntercept, ds.PixelSpacing = 15, 1, -1024, [0.7, 0.7]
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, float(k)]
        ds.PixelData = (values + 1024).astype("<i2").tobytes()
        pydicom.dcmwrite(folder / "series" / f"{k:04d}.dcm", ds, enforce_file_format=True)
    image = nib.Nifti1Image(hu.astype(np.int16).transpose(2, 1, 0), np.diag([-0.7, -0.7, 1, 1]))
    (folder / "ct.nii.gz").write_bytes(gzip.compress(image.to_bytes(), 6))


def ours(path):
    """One file or series through the cache's own pipeline -> (C, H, W, S)."""
    files = sorted(str(file) for file in path.iterdir()) if path.is_dir() else [str(path)]
    kind = "series" if path.is_dir() else prepare.kind_of(path)
    if kind == "series":
        for file in files:  # the pass over the headers that groups a folder into series
            prepare.dicom_header(file)
    job = prepare.Job(path.name, files, kind, "xray" if kind == "image" else "ct", id="0" * 16)
    return prepare.decode(job, files, 256, 64, 16)


def monai(path):
    """The same with MONAI's transforms -> (C, x, y, z)."""
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Resize, ScaleIntensityRange
    volume = path.is_dir() or path.name.endswith(".nii.gz")
    reader = "PydicomReader" if path.is_dir() else "NibabelReader" if volume else "PILReader"
    steps = [LoadImage(image_only=True, reader=reader), EnsureChannelFirst()]
    steps += [Orientation("LPS")] * volume
    steps += [ScaleIntensityRange(*((-1000, 1000) if volume else (0, 255)), 0, 1, clip=True)]
    return Compose([*steps, Resize((256, 256, 64) if volume else (256, 256))])(path)


def measure(read, path, repeat):
    """(CPU seconds a call, peak MiB of the process) in a child with one thread."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        read(path)  # imports and first-call costs are not the files'
        start = time.process_time()
        for _ in range(repeat):
            read(path)
        seconds = (time.process_time() - start) / repeat
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        os.write(writer, f"{seconds} {peak}".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read().split()
    os.waitpid(pid, 0)
    return tuple(map(float, answer)) or (float("nan"),) * 2


def benchmark_prepare():
    try:
        import monai as _  # noqa: F401
        beside = True
    except ImportError:
        beside = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_ct(folder)
        noise = np.random.default_rng(0).integers(0, 40, (1024, 1024)) + np.arange(1024) // 5
        Image.fromarray(noise.astype(np.uint8)).save(folder / "xray.png")
        print("one core, CPU seconds a sample (peak MiB)       ours           MONAI       ratio")
        for name, title, repeat in (("xray.png", "PNG 1024 x 1024", 20),
                                    ("series", "300 raw DICOM slices 512 x 512", 2),
                                    ("ct.nii.gz", "NIfTI .nii.gz 512 x 512 x 300", 2)):
            own = measure(ours, folder / name, repeat)
            other = measure(monai, folder / name, repeat) if beside else (float("nan"),) * 2
            print(f"{title:40} {own[0]:9.3f} ({own[1]:5.0f}) {other[0]:9.3f} ({other[1]:5.0f}) "
                  f"{other[0] / own[0]:7.1f}")


if __name__ == "__main__":
    {"prepare": benchmark_prepare}[sys.argv[1] if len(sys.argv) > 1 else "prepare"]()
