"""Turn medical image files and public data sets into a cache of small arrays (paper Sec. 3.1 and 4.1).

In:  DICOM, NIfTI, PNG / JPEG / TIFF / GIF and AVI / MP4 / MOV files in any folder, or a public data set as downloaded.
Out: cache/NAME/ID.npy, (C, H, W, S): image (1 or 3, 256, 256, 1), video (3, 256, 256, 16), volume (1, 256, 256, 64);
     uint8 (value / 255) from 8-bit sources, float16 in [0, 1] from deeper ones; samples.csv says what each sample is,
     rejected.csv which files were left out and why, sources.csv where each sample came from. Only the last two name files.
Volumes: H runs anterior to posterior, W from the patient's right to left (right on the image's left), S upwards.

    python prepare.py folder /data/mr --name hospital_mr --modality mri --labels labels.csv --key-file key
"""
import argparse
import contextlib
import csv
import fcntl
import hashlib
import hmac
import io
import json
import os
import random
import re
import resource
import secrets
import signal
import stat
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe, connection
from pathlib import Path

import av
import nibabel as nib
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydicom.encaps import generate_fragments
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder, pixel_array
from torch.utils.data import Dataset
from tqdm import tqdm

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
DICOM_MODALITIES = {"CR": "xray", "DX": "xray", "DR": "xray", "RG": "xray", "MG": "xray", "RF": "xray", "XA": "xray", "PX": "xray",
                    "IO": "xray", "US": "ultrasound", "IVUS": "ultrasound", "ES": "endoscopy", "CT": "ct", "MR": "mri"}
VOLUMES = ("ct", "mri")                       # DICOM files of these are slices of a series
HU_RANGE = (-1000.0, 1000.0)                  # Sec. 4.1
MIN_SLICES = 8                                # CHOICE: a DICOM series of fewer slices is no volume
CAP = 2 << 30                                 # bytes one decoded file may take
PIXEL_CAP = 50_000_000                        # pixels of one image or frame
SECONDS, SECONDS_PER_MB = 60, 1.0             # time one sample may take to decode
MEMORY = 6 << 30                              # address space of a child beyond what the parent already maps
PUBLIC_KEY = b"M3Ret public data"             # ids of public data sets are the same on every machine
RECIPE = 1                                    # raise when the pixels of a cached sample change
VIDEO_FORMATS = {"format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,asf,h264,hevc", "protocol_whitelist": "file,pipe"}


class UserError(Exception):
    """What a user can cause and mend: one line naming the file and the remedy."""


class Refused(Exception):
    """Why one file is left out; never quotes a header value."""


class Note(UserWarning):
    """Something a kept sample's owner should know; counted and printed at the end."""


@contextlib.contextmanager
def atomic_write(path, mode=0o666):
    """Yield a binary handle whose bytes replace `path` all at once when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_RDWR, mode), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- pixels: everything becomes float32 in [0, 1], then (C, H, W, S) -------------------------------------------------

def luma(rgb):
    """Grey values (h, w) of colours (h, w, 3), weights of ITU-R BT.601."""
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


def stretch(x, valid=None):
    """Stretch the 0.5 to 99.5 percentile of `x` (of its `valid` part) to [0, 1]."""
    low, high = np.percentile(x if valid is None or not valid.any() else x[valid], (0.5, 99.5))
    return np.clip((x - low) / max(high - low, 1e-6), 0, 1, dtype=np.float32)


def resize(x, size, spacing=(1.0, 1.0)):
    """Planes (S, C, H, W) -> (S, C, h, w), antialiased: the longer side in mm becomes `size`, the aspect is kept (Sec. 4.1)."""
    sides = [length * mm for length, mm in zip(x.shape[-2:], spacing)]
    h, w = (max(1, round(side * size / max(sides))) for side in sides)
    return F.interpolate(x, (h, w), mode="bilinear", antialias=True)                    # (S, C, h, w)


def pad(x, size):
    """(S, C, h, w) -> (C, size, size, S), centred in zeros (Sec. 4.1)."""
    top, left = (size - x.shape[2]) // 2, (size - x.shape[3]) // 2
    x = F.pad(x, (left, size - x.shape[3] - left, top, size - x.shape[2] - top))        # (S, C, size, size)
    return x.permute(1, 2, 3, 0)                                                        # (C, size, size, S)


def frames_to_array(frames, colour, size):
    """Frames (h, w) or (h, w, 3) in [0, 1] -> (3 if colour else 1, size, size, number of frames)."""
    planes = []
    for frame in frames:
        frame = luma(frame) if frame.ndim == 3 and not colour else frame                # (h, w) or (h, w, 3)
        frame = np.atleast_3d(frame).transpose(2, 0, 1)                                 # (1 or 3, h, w)
        frame = torch.from_numpy(np.ascontiguousarray(frame, np.float32))[None]         # (1, 1 or 3, h, w)
        planes.append(pad(resize(frame, size), size))                                   # (1 or 3, size, size, 1)
    return torch.cat(planes, dim=3).expand(3 if colour else 1, -1, -1, -1)              # (C, size, size, S)


def volume_to_array(voxels, affine, modality, size, slices, slope=1.0, intercept=0.0):
    """Voxels (i, j, k) with RAS+ `affine` in mm -> (1, size, size, slices), H to posterior, W to the left, S upwards.

    CT is clipped to HU_RANGE before any averaging, other volumes are stretched between percentiles at the end. Output
    slices are made one by one, so that beside the source no more than the result and a few slices are in memory.
    """
    axes = nib.io_orientation(affine)
    if not (np.isfinite(affine).all() and np.isfinite(axes).all()):
        raise Refused("singular affine: the header gives no orientation")
    to_lps = nib.orientations.ornt_transform(axes, nib.orientations.axcodes2ornt("LPS"))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(to_lps[:, 0])]                 # mm along W, H, S
    voxels = nib.apply_orientation(voxels, to_lps).T                                    # (S, H, W), a view
    low, high = HU_RANGE if modality == "ct" else (-np.inf, np.inf)
    weights = F.interpolate(torch.eye(len(voxels))[None, None], (slices, len(voxels)), mode="bilinear", antialias=True)[0, 0]
    planes, broken = [], False
    for row in weights:                                                                 # one output slice, few inputs
        first, last = row.nonzero()[[0, -1], 0].tolist()
        x = np.ascontiguousarray(voxels[first:last + 1], dtype=np.float32)              # (few, H, W)
        x = torch.from_numpy(x).mul_(slope).add_(intercept)
        if voxels.dtype.kind == "f" and not (finite := x.isfinite()).all():
            broken, x = True, x.where(finite, torch.tensor(max(low, -1000.0)))
        x = x.clamp_(low, high)                                                         # HU for CT
        plane = torch.tensordot(row[first:last + 1], x, dims=1)                         # (H, W)
        planes.append(resize(plane[None, None], size, spacing[1::-1]))                  # (1, 1, h, w)
    if broken:
        warnings.warn("NaN or infinite voxels set to the background", Note)
    x = torch.cat(planes)                                                               # (slices, 1, h, w)
    x = ((x - low) / (high - low)).clamp_(0, 1) if modality == "ct" else torch.from_numpy(stretch(x.numpy()))
    return pad(x, size)                                                                 # (1, size, size, slices)


def quantize(x, deep):
    """[0, 1] float32 -> float16 if the source was deeper than 8 bits, else uint8 (value * 255)."""
    return x.half().numpy() if deep else x.mul(255).round().clamp(0, 255).byte().numpy()


def in_order(items, k, seed):
    """k of the items, each equally likely, in their order, in one pass of unknown length (Sec. 3.4); too few are repeated evenly."""
    kept, rng = [], random.Random(seed)
    for n, item in enumerate(items):
        slot = n if n < k else rng.randrange(n + 1)                                     # reservoir sampling
        if slot < k:
            kept[slot:slot + 1] = [(n, item)]
    if not kept:
        raise Refused("no frame could be decoded")
    if len(kept) < k:
        warnings.warn("fewer frames than asked for: repeated evenly", Note)
    kept.sort(key=lambda pair: pair[0])
    return [kept[i * len(kept) // k][1] for i in range(k)]


# ---- images and videos ------------------------------------------------------------------------------------------------

def image_frame(image):
    """An open Pillow image -> ((h, w) or (h, w, 3) float32 in [0, 1], deeper than 8 bits?)."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                                    # 16 or 32 bit grey; convert("L") would clip it
        x = np.asarray(image).astype(np.float32)
        if image.mode == "F":
            return (x if x.min() >= 0 and x.max() <= 1 else stretch(x)), True
        return np.clip(x / (4095 if x.max() <= 4095 else 65535), 0, 1), True            # CHOICE: 12 bits where they suffice
    if image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    grey = image.mode in ("1", "L")
    return np.asarray(image.convert("L" if grey else "RGB"), np.float32) / 255, False


def read_image(path, count, seed):
    """PNG, JPEG, TIFF or GIF -> (frames, deep); more than one page makes `count` frames of a video."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "MPO", "TIFF", "GIF"))
    except Image.UnidentifiedImageError as error:
        raise Refused("not a PNG, JPEG, TIFF or GIF file") from error
    if image.width * image.height > PIXEL_CAP:
        raise Refused(f"{image.width * image.height / 1e6:.0f} megapixels, the limit is {PIXEL_CAP / 1e6:.0f}")
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages == 1:
        frame, deep = image_frame(image)
        return [frame], deep
    frames = []
    for page in in_order(range(pages), count, seed):
        image.seek(page)
        frames.append(image_frame(image))
    return [frame for frame, _ in frames], frames[0][1]


def decode_video(container, tally):
    """Yield every frame of the first video stream, undamaged ones counted in tally["decoded"]; one pass, no seeking."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            tally["corrupt"] += 1
            continue
        for frame in frames:
            if frame.width * frame.height > PIXEL_CAP:
                raise Refused("frames over the pixel limit")
            tally["decoded"] += 1
            tally["corrupt"] += frame.is_corrupt
            yield frame


def read_video(source, count, seed):
    """AVI, MP4, MOV, ... (a path or a binary file) -> `count` frames (h, w, 3) in [0, 1]."""
    source = source if hasattr(source, "read") else os.path.abspath(source)             # a relative name could be a protocol
    try:
        container = av.open(source, options=VIDEO_FORMATS, metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise Refused("not a readable video: unknown or forbidden format, or cut") from error
    with container:
        if not container.streams.video:
            raise Refused("no video stream")
        tally, declared = Counter(), container.streams.video[0].frames
        frames = in_order(decode_video(container, tally), count, seed)
        if tally["decoded"] < 0.9 * declared or tally["corrupt"] > 0.1 * tally["decoded"]:
            raise Refused(f"damaged video: {tally['decoded']} of {declared} frames decoded, {tally['corrupt']} corrupt")
        if tally["decoded"] < declared or tally["corrupt"]:
            warnings.warn("video with some missing or damaged frames", Note)
        return [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90).astype(np.float32) / 255 for f in frames]


# ---- NIfTI --------------------------------------------------------------------------------------------------------------

def inflate(data, limit):
    """Uncompress gzip members up to `limit` bytes; zlib checks every CRC and length, which nibabel leaves unread."""
    out = bytearray()
    while data.strip(b"\0"):
        member = zlib.decompressobj(wbits=31)
        try:
            out += member.decompress(data, limit + 1 - len(out))
        except zlib.error as error:
            raise Refused("damaged gzip data (CRC or length check failed)") from error
        if len(out) > limit:
            break
        if not member.eof:
            raise Refused("truncated gzip data")
        data = member.unused_data
    return out


def read_nifti(path):
    """NIfTI-1 or 2 -> voxels (i, j, k), RAS+ affine in mm, slope, intercept; the header is checked before memory is taken."""
    data = Path(path).read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    try:
        head = zlib.decompressobj(wbits=31).decompress(data, 544) if packed else data[:544]
    except zlib.error as error:
        raise Refused("damaged gzip data") from error
    size = next((n for n in (348, 540) if head[:4] in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), 0)
    if not size or b"n+" not in head[4:348]:
        raise Refused("not a NIfTI file (.hdr/.img pairs: convert to .nii)")
    header = (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(head[:size])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    need = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not (2 <= len(shape) <= 4 and all(1 <= n <= 4096 for n in shape) and dtype.kind in "iuf" and 0 < need <= CAP):
        raise Refused(f"cannot use voxels of shape {shape}, type {dtype}")
    data = inflate(data, offset + need + 65536) if packed else data
    if not header.sizeof_hdr < offset <= len(data) - need:
        raise Refused(f"truncated: {max(len(data) - offset, 0)} of {need} bytes of voxels")
    voxels = np.frombuffer(data, dtype, need // dtype.itemsize, offset).reshape(shape, order="F")
    if len(shape) == 4 and shape[3] > 1:
        warnings.warn("4D NIfTI: first volume kept", Note)
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        warnings.warn("NIfTI header without orientation", Note)
    voxels = voxels.reshape(shape + (1,) * (4 - len(shape)), order="F")[..., 0]          # (i, j, k)
    slope, intercept = header.get_slope_inter()
    return voxels, header.get_best_affine(), 1.0 if slope is None else slope, intercept or 0.0


# ---- DICOM --------------------------------------------------------------------------------------------------------------

SKIPPED = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "DOC", "ECG", "AU", "PLAN"}
DEFLATED, MPEG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.10"                     # .100 to .108: MPEG-2, H.264, HEVC


def open_dicom(path, **options):
    """pydicom.dcmread for files of any origin: no blind force, no deflated bomb, every refusal named."""
    with open(path, "rb") as file:
        head = file.read(1024)
    preamble = head[128:132] == b"DICM"
    if not preamble and head[:4] not in (b"\x08\0\0\0", b"\x08\0\5\0", b"\x08\0\x08\0", b"\x08\0\x16\0", b"\2\0\0\0"):
        raise Refused("not a DICOM file")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            meta = pydicom.filereader.read_file_meta_info(path) if preamble else {}
            if str(meta.get("TransferSyntaxUID", "")) == DEFLATED:
                start = 144 + int(meta.get("FileMetaInformationGroupLength", 0))
                if len(zlib.decompressobj(-15).decompress(Path(path).read_bytes()[start:], CAP // 4)) >= CAP // 4:
                    raise Refused("deflated, over the size limit when inflated")
            ds = pydicom.dcmread(path, force=not preamble, **options)
    except (struct.error, OSError, EOFError, AttributeError, zlib.error, pydicom.errors.BytesLengthException) as error:
        raise Refused("truncated or damaged DICOM header") from error
    ds.cut = any("before delimiter" in str(w.message) for w in caught)
    return ds


def number(value, default):
    """First number of a DICOM value, or the default where it is empty."""
    if value is None or value == "":
        return default
    return float(value[0] if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else value)


def per_frame(ds, frame, sequence, tag, default=None):
    """A frame's value: per-frame functional group, else shared group, else the data set itself (PS3.3 C.7.6.16)."""
    groups = [ds.get("PerFrameFunctionalGroupsSequence", [])[frame:frame + 1], ds.get("SharedFunctionalGroupsSequence", [])]
    for group in groups:
        for item in group:
            for inner in item.get(sequence, [])[:1]:
                if tag in inner:
                    return inner[tag].value
    return ds.get(tag, default)


def frame_count(ds):
    try:
        return max(1, int(ds.get("NumberOfFrames", 1) or 1))
    except (TypeError, ValueError) as error:
        raise Refused("NumberOfFrames is no number") from error


def check_pixels(ds, whole):
    """Refuse, before any decoding, pixel data that are absent, cut, too large or in a syntax nothing here decodes."""
    if "PixelData" not in ds:
        kind = pydicom.uid.UID_dictionary.get(str(ds.get("SOPClassUID", "")), ("unknown SOP class",))[0]
        raise Refused("truncated before the sequence delimiter" if ds.cut else f"no pixel data ({kind})")
    if "TransferSyntaxUID" not in ds.file_meta:
        raise Refused("TransferSyntaxUID (0002,0010) is missing")
    syntax, frames = ds.file_meta.TransferSyntaxUID, frame_count(ds)
    plane = ds.Rows * ds.Columns * ds.SamplesPerPixel * ds.BitsAllocated // 8
    if plane > CAP // 4 or whole and plane * frames > CAP or frames > 100_000:
        raise Refused(f"claims {plane * frames / 1e9:.1f} GB of pixels, the limit is {CAP / 1e9:.1f}")
    need = plane * frames * 2 // 3 if ds.PhotometricInterpretation == "YBR_FULL_422" else plane * frames
    if not syntax.is_compressed or syntax.is_deflated:
        if len(ds.PixelData) < need:
            raise Refused(f"truncated: {len(ds.PixelData)} of {need} bytes of pixels")
    elif not syntax.startswith(MPEG):
        plugins = get_decoder(syntax)
        if not plugins.is_available:
            raise Refused(f"{syntax.name} needs one of: {', '.join(plugins.missing_dependencies)}")


def padding(ds, stored):
    """True where a stored value is padding outside the image (PS3.3 C.7.5.1.1.2)."""
    if "PixelPaddingValue" not in ds:
        return np.zeros(stored.shape, bool)
    ends = [int(ds.PixelPaddingValue), int(ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue))]
    if ds.PixelRepresentation:                                   # written as unsigned though the pixels are signed
        ends = [end - (1 << 16) if end >= 1 << 15 else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def voi(x, ds, frame):
    """The display window of the file (PS3.3 C.11.2) -> values in [0, 1], or None where it has no usable one."""
    if ds.get("VOILUTSequence"):
        bits = ds.VOILUTSequence[0].LUTDescriptor[2]
        return (apply_voi_lut(x.astype(np.int32), ds) / np.float32((1 << bits) - 1)).astype(np.float32)
    centre, width = (number(per_frame(ds, frame, "FrameVOILUTSequence", tag), None) for tag in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or not width > 0:
        return None
    function = str(ds.get("VOILUTFunction", "LINEAR")).upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    return np.clip((x - centre) / width + 0.5, 0, 1)


def dicom_frame(ds, frame, modality):
    """One frame -> (h, w) or (h, w, 3) float32 in [0, 1]: colours as RGB, CT in HU_RANGE, X-ray through its window."""
    stored = pixel_array(ds, index=frame)                                               # YBR is RGB already
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        rgb = apply_color_lut(stored, ds)
        return rgb / np.float32(np.iinfo(rgb.dtype).max)
    full = np.float32((1 << ds.BitsStored) - 1)
    if stored.ndim == 3:
        return stored / full
    pad = padding(ds, stored)
    slope, intercept = (number(per_frame(ds, frame, "PixelValueTransformationSequence", tag), default)
                        for tag, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)))
    x = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if modality == "ct":
        x = (np.clip(x, *HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
    else:
        if ds.get("ModalityLUTSequence"):
            x = apply_modality_lut(stored, ds).astype(np.float32)
        window = voi(x, ds, frame) if modality == "xray" else None
        if window is not None and window[~pad].size and np.ptp(window[~pad]) > 0:
            x = window
        elif ds.BitsStored <= 8 and not ds.PixelRepresentation and modality != "mri":
            x = stored / full
        else:
            x = stretch(x, ~pad)
        if ds.PhotometricInterpretation == "MONOCHROME1":
            x = 1 - x
            warnings.warn("MONOCHROME1: inverted", Note)
    return np.where(pad, np.float32(0), x.astype(np.float32))


def read_dicom_frames(path, modality, count, seed):
    """A DICOM file -> (frames in [0, 1], deep): one, or `count` of a multi-frame object."""
    ds = open_dicom(path)
    check_pixels(ds, whole=False)
    if ds.file_meta.TransferSyntaxUID.startswith(MPEG):
        return read_video(io.BytesIO(b"".join(list(generate_fragments(ds.PixelData))[1:])), count, seed), False
    frames = frame_count(ds)
    chosen = in_order(range(frames), count, seed) if frames > 1 else [0]
    return [dicom_frame(ds, frame, modality) for frame in chosen], ds.BitsStored > 8


def slice_order(positions):
    """Slice positions along the normal (mm, any order) -> (order, one kept of each position, even positions or None)."""
    order = np.argsort(positions, kind="stable")
    gaps = np.diff(positions[order])
    step = np.median(gaps)
    tolerance = max(0.05 * step, 0.1)
    if np.abs(gaps - step).max() <= tolerance:
        return order, None
    runs = np.split(gaps, np.flatnonzero(np.abs(np.diff(gaps)) > tolerance) + 1)
    if min(map(len, runs)) < 3:                                   # a thick and a thin part have runs of equal gaps
        worst = int(np.abs(gaps - step).argmax())
        raise Refused(f"gap of {gaps[worst]:.1f} mm after slice {worst + 1} of {len(positions)}, spacing {step:.1f} mm: missing slice?")
    warnings.warn("uneven slice spacing: made even", Note)
    return order, np.linspace(positions[order[0]], positions[order[-1]], len(positions))


def read_series(files, modality):
    """Files of a DICOM series, or one multi-frame file -> voxels (i, j, k), RAS+ affine in mm, slope, intercept.

    Slices are sorted by position along their normal, never by name or number (PS3.3 C.7.6.2).
    """
    planes, place, scales = [], [], []
    for path in files:
        try:
            ds = open_dicom(path)
            check_pixels(ds, whole=True)
            stored = pixel_array(ds)
        except Refused as reason:
            raise Refused(f"slice {Path(path).name}: {reason}" if len(files) > 1 else str(reason)) from reason
        for frame, plane in enumerate(stored.reshape(-1, ds.Rows, ds.Columns)):
            position = per_frame(ds, frame, "PlanePositionSequence", "ImagePositionPatient")
            orientation = per_frame(ds, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
            pixel = per_frame(ds, frame, "PixelMeasuresSequence", "PixelSpacing")
            if position is None or orientation is None or pixel is None:
                raise Refused("slices without ImagePositionPatient, ImageOrientationPatient or PixelSpacing")
            slope, intercept = (number(per_frame(ds, frame, "PixelValueTransformationSequence", tag), default)
                                for tag, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)))
            pad = padding(ds, plane)
            if pad.any() and not pad.all():
                plane = np.where(pad, min(plane[~pad].min(), plane.dtype.type(0)), plane)
            planes.append(plane)
            scales.append((slope, intercept))
            place.append([*map(float, orientation), *map(float, pixel), *map(float, position)])
    place = np.array(place)                                                             # (n, 6 + 2 + 3)
    if np.abs(place[:, :8] - place[0, :8]).max() > 1e-2:
        raise Refused("slices differ in orientation or pixel spacing")
    along_row, along_column, (row_mm, column_mm), corners = place[0, :3], place[0, 3:6], place[0, 6:8], place[:, 8:]
    positions = corners @ np.cross(along_row, along_column)                             # (n,) mm
    keep = unique_slices(positions, planes)
    order, even = slice_order(positions[keep])
    order = keep[order]
    if len(set(scales)) > 1:                                                            # rescale differs by slice (PET, MR)
        planes = [plane.astype(np.float32) * np.float32(a) + np.float32(b) for plane, (a, b) in zip(planes, scales)]
        scales = [(1.0, 0.0)]
    voxels = np.stack([planes[i] for i in order])                                       # (k, rows, columns)
    if even is not None:
        where = np.interp(even, positions[order], np.arange(len(order)))
        below, part = np.floor(where).astype(int), (where % 1).astype(np.float32)[:, None, None]
        voxels = voxels[below] * (1 - part) + voxels[np.minimum(below + 1, len(order) - 1)] * part
    affine = np.eye(4)                                                                  # index (column, row, k) to LPS mm
    step = (corners[order[-1]] - corners[order[0]]) / (len(order) - 1)
    affine[:3] = np.stack([along_row * column_mm, along_column * row_mm, step, corners[order[0]]], axis=1)
    return voxels.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine, *scales[0]


def unique_slices(positions, planes):
    """Indices of one slice per position; two different slices at one position are two volumes in one."""
    kept = {}
    for i, z in enumerate(np.round(positions, 2)):
        if z in kept and not np.array_equal(planes[kept[z]], planes[i]):
            raise Refused("two different slices at one position")
        kept.setdefault(z, i)
    if len(kept) < len(planes):
        warnings.warn("duplicate slices dropped", Note)
    if len(kept) < MIN_SLICES:
        raise Refused(f"{len(kept)} slices, a volume needs {MIN_SLICES}")
    return np.array(list(kept.values()))


def dicom_header(path):
    """What grouping needs of one DICOM file, as plain types."""
    ds = open_dicom(path, stop_before_pixels=True)
    kind = pydicom.uid.UID_dictionary.get(str(ds.get("SOPClassUID", "")), ("unknown SOP class",))[0]
    if ds.get("Modality") in SKIPPED or not ds.get("Rows") or not ds.get("Columns"):
        raise Refused(f"no pixel data ({kind})")
    image_type = [str(part).upper() for part in ds.get("ImageType") or []]
    text = lambda tag: str(ds.get(tag, "") or "")
    floats = lambda tag, digits: [round(float(x), digits) for x in ds.get(tag) or []]
    return {"series": text("SeriesInstanceUID"), "object": text("SOPInstanceUID"), "modality": DICOM_MODALITIES.get(text("Modality")),
            "patient": text("PatientID"), "frames": frame_count(ds), "size": [int(ds.Rows), int(ds.Columns)],
            "position": floats("ImagePositionPatient", 2), "orientation": floats("ImageOrientationPatient", 2),
            "phase": [text(tag) for tag in ("AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime", "EchoTime", "ImageType")],
            "scout": bool({"LOCALIZER", "SCOUT"} & set(image_type)), "burned": text("BurnedInAnnotation") != "NO",
            "parts": body_parts(*(text(tag) for tag in ("BodyPartExamined", "ProtocolName", "SeriesDescription", "StudyDescription")))}


def body_parts(*texts):
    return []


# ---- one sample, in a guarded child -----------------------------------------------------------------------------------

@dataclass
class Job:
    """One future sample: where its pixels are and what is known about it."""
    path: str                                  # shown in sources.csv
    files: list                                # one file, the slices of a series or the frames of a clip
    kind: str                                  # image, video, nifti, dicom, series or clip
    modality: str = ""
    labels: tuple = ()
    patient: str = ""
    split: str = ""
    key: str = ""                              # what the id is made of: relative path or SeriesInstanceUID
    header: dict = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Recipe:
    """The options that decide a cached sample's pixels."""
    size: int = 256
    slices: int = 64
    frames: int = 16
    version: int = RECIPE


def decode(job, recipe):
    """Read one job -> (modality, array (C, H, W, S) uint8 or float16)."""
    modality, deep, seed = job.modality, False, int(job.id, 16)
    if job.kind in ("nifti", "series"):
        voxels, affine, slope, intercept = read_nifti(job.files[0]) if job.kind == "nifti" else read_series(job.files, modality)
        deep = voxels.dtype.itemsize > 1
        x = volume_to_array(voxels, affine, modality, recipe.size, recipe.slices, slope, intercept)
        return modality, quantize(x, deep)
    if job.kind == "video":
        frames = read_video(job.files[0], recipe.frames, seed)
    elif job.kind == "dicom":
        frames, deep = read_dicom_frames(job.files[0], modality, recipe.frames, seed)
    elif job.kind == "clip":
        frames = [read_image(path, 1, seed)[0][0] for path in in_order(job.files, recipe.frames, seed)]
    else:
        frames, deep = read_image(job.files[0], recipe.frames, seed)
    return modality, quantize(frames_to_array(frames, len(frames) > 1 or modality == "endoscopy", recipe.size), deep)


def cache_sample(job, recipe, folder):
    """Decode a job and write its array; returns the journal's record of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        modality, array = decode(job, recipe)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with atomic_write(Path(folder) / f"{job.id}.npy") as file:
        file.write(buffer.getbuffer())
    return {"modality": modality, "shape": "x".join(map(str, array.shape)), "crc": zlib.crc32(buffer.getbuffer()),
            "notes": sorted({str(w.message) for w in caught if w.category is Note})}


def explain(error):
    """An unforeseen error as a reason: its type and the DICOM tag or element it names, never its text (it may quote values)."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, (MemoryError, RecursionError)):
        return "over memory" if isinstance(error, MemoryError) else "nested too deeply"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    named = re.findall(r"\([0-9A-Fa-f]{4}, ?[0-9A-Fa-f]{4}\)", str(error)) or [getattr(error, "name", None) or ""]
    return f"cannot be decoded: {type(error).__name__} {named[0]}".strip()


def child(task, items, pipe, seconds, parent):
    """Answer each item through the pipe, under a memory limit and an alarm; never returns (io.md 9.1)."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)             # decoders print what files say
        os.dup2(1, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)            # the default action ends a native hang as well
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.path.exists("/proc/self/statm"):
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        torch.set_num_threads(1)
        for item in items:
            signal.alarm(seconds(item))
            try:
                answer = {"ok": task(item)}
            except UserError as error:
                answer = {"fatal": str(error)}
            except BaseException as error:
                answer = {"refused": explain(error)}
            signal.alarm(0)
            if os.getppid() != parent:
                break
            pipe.send_bytes(json.dumps(answer).encode())
    finally:
        os._exit(0)


def guarded(task, batches, workers, seconds):
    """Yield (item, answer) of task(item) run in forked children, a batch each; no file can end or hang the run.

    An answer is {"ok": result} or {"refused": reason}. The first unanswered item of a dead child is tried once more alone.
    """
    waiting, running = list(map(list, reversed(batches))), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                batch, (reader, writer), parent = waiting.pop(), Pipe(duplex=False), os.getpid()
                pid = os.fork()
                if not pid:
                    child(task, batch, writer, seconds, parent)
                writer.close()
                running[reader] = pid, batch, len(batch)
            for reader in connection.wait(list(running)):
                pid, batch, size = running[reader]
                try:
                    answer = json.loads(reader.recv_bytes())
                except EOFError:
                    del running[reader]
                    status = os.waitpid(pid, 0)[1]
                    if batch and size > 1:
                        waiting += [batch[1:], batch[:1]] if batch[1:] else [batch]
                    elif batch:
                        yield batch[0], {"refused": cause_of_death(status)}
                    continue
                if "fatal" in answer:
                    raise UserError(answer["fatal"])
                yield batch.pop(0), answer
    finally:
        for pid, *_ in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def cause_of_death(status):
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "timed out" if name == "SIGALRM" else "over memory" if name == "SIGKILL" else f"decoder crashed ({name})"
    return f"decoder left with exit code {os.WEXITSTATUS(status)}"


# ---- sources: which samples a folder or a public data set holds --------------------------------------------------------

def walk(source):
    """Regular files below `source` -> ({relative path: stat}, [(path, why it is none)]), sorted; links to folders stay shut."""
    files, refused = {}, []
    for root, folders, names in os.walk(source, onerror=lambda e: refused.append((e.filename, "folder cannot be read"))):
        folders.sort()
        for name in sorted(names + [f for f in folders if os.path.islink(os.path.join(root, f))]):
            path = os.path.join(root, name)
            relative = os.path.relpath(path, source)
            try:
                info = os.stat(path)
            except OSError as error:
                refused.append((relative, f"cannot be read: {error.strerror}"))
                continue
            if not stat.S_ISREG(info.st_mode):
                refused.append((relative, "link to a folder: not followed" if stat.S_ISDIR(info.st_mode) else "not a regular file"))
            elif not info.st_size:
                refused.append((relative, "empty file"))
            elif name.startswith(".") or "__MACOSX" in Path(relative).parts:
                refused.append((relative, "hidden file"))
            elif info.st_size > 2 * CAP:
                refused.append((relative, "over the file size limit"))
            else:
                files[relative] = info
    return files, refused


SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif"), "nifti": (".nii", ".nii.gz"), "dicom": (".dcm", ".dicom", ".ima"),
            "video": (".avi", ".mp4", ".mov", ".mpg", ".mpeg", ".mkv", ".wmv", ".m4v", ".webm")}


def kind_of(path):
    """image, nifti, dicom or video by content, else by name; "" for anything else."""
    with open(path, "rb") as file:
        head = file.read(352)
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")):
        return "image"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "nifti"
    if head[:4] + head[8:12] == b"RIFFAVI " or head[4:8] == b"ftyp":
        return "video"
    name = str(path).lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)),
                "dicom" if head[:2] == b"\x08\0" else "")


def dicom_jobs(headers, source, modality, allow_2d):
    """Headers {relative path: header} -> (jobs, refused): single images, multi-frame files, and series as volumes."""
    jobs, refused, stacks = [], [], defaultdict(dict)
    for path, head in headers.items():
        kind = modality(path) or head["modality"]
        job = Job(path, [path], "dicom", kind, tuple(head["parts"]), head["patient"], key=path, header=head)
        if kind is None:
            refused.append((path, "modality is none of the five: give --modality"))
        elif head["scout"]:
            refused.append((path, "localizer"))
        elif kind not in VOLUMES:
            jobs.append(job)
        elif head["frames"] > 1:
            jobs.append(replace(job, kind="series"))
        elif allow_2d and not head["series"]:
            jobs.append(job)
        elif not head["series"]:
            refused.append((path, "no SeriesInstanceUID (0020,000E)"))
        else:
            stacks[head["series"]].setdefault((kind, *head["size"], *head["orientation"]), []).append(job)
    for uid, groups in sorted(stacks.items()):
        for n, group in enumerate(sorted(groups.values(), key=lambda group: (-len(group), group[0].path))):
            group = sorted(group, key=lambda job: job.path)
            if len(group) >= MIN_SLICES:
                files = [job.path for job in group]
                folder = os.path.commonpath([os.path.dirname(path) for path in files])
                jobs.append(replace(group[0], path=folder or ".", files=files, kind="series", key=uid + f"/{n}" * (n > 0)))
            elif allow_2d:
                jobs += group
            else:
                refused += [(job.path, f"{len(group)} slices of this size and orientation, a volume needs {MIN_SLICES} "
                             "(--allow-2d keeps slices as images)") for job in group]
    return jobs, refused


def read_labels(path):
    """labels.csv -> {path: row}; columns path, labels and, if wanted, patient, split and modality."""
    rows = table(path)
    if not {"path", "labels"} <= set(rows[0]):
        raise UserError(f"{path}: needs the columns path and labels")
    return {os.path.normpath(row["path"]): row for row in rows}


def table(path):
    """Rows of a CSV file with , or ; as dicts; header and cells stripped, BOM and broken bytes survived."""
    try:
        text = Path(path).read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it belongs to the data set") from error
    first = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text), delimiter=";" if first.count(";") > first.count(",") else ",")
    head = [cell.strip() for cell in next(rows, [])]
    rows = [dict(zip(head, map(str.strip, row))) for row in rows if any(row)]
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def scan_folder(source, options, only=None, otherwise=None):
    """Any tree of image files, with labels.csv if there is one -> (jobs, refused)."""
    files, refused = walk(source) if only is None else ({only: os.stat(os.path.join(source, only))}, [])
    labels = read_labels(options.labels) if options.labels else {}
    if options.labels:
        files.pop(os.path.relpath(options.labels, source), None)
    modality = lambda path: labels.get(path, labels.get(os.path.dirname(path), {})).get("modality") or options.modality
    kinds = {path: kind_of(os.path.join(source, path)) for path in files}
    names = [path for path in files if kinds[path] == "dicom"]
    headers = {}
    for path, answer in guarded(lambda path: dicom_header(os.path.join(source, path)),
                                [names[i:i + 256] for i in range(0, len(names), 256)], options.workers, lambda path: SECONDS):
        if "ok" in answer:
            headers[path] = answer["ok"]
        else:
            refused.append((path, answer["refused"]))
    jobs, unused = dicom_jobs({path: headers[path] for path in names if path in headers}, source, modality, options.allow_2d)
    refused += unused
    for path in files:
        if kinds[path] == "":
            refused.append((path, "not a DICOM, NIfTI, PNG, JPEG, TIFF, GIF, AVI, MP4 or MOV file"))
        elif kinds[path] != "dicom":
            kind = modality(path) or (otherwise or {}).get(kinds[path])
            if kind in MODALITIES:
                jobs.append(Job(path, [path], kinds[path], kind))
            else:
                refused.append((path, "modality unknown: give --modality"))
    for job in jobs:
        row = labels.get(job.path, {})
        job.labels = tuple(filter(None, row.get("labels", "").split("|"))) or job.labels
        job.patient, job.split = row.get("patient") or job.patient, row.get("split", "")
    return jobs, refused


def scan_chestxray14(source, options):
    """NIH ChestX-ray14 in any of its trees (images/ or images_001/images/ ...) -> (jobs, refused)."""
    files, refused = walk(source)
    images = {os.path.basename(path): path for path in files if path.endswith(".png")}
    csv_file = next((path for path in files if os.path.basename(path).startswith("Data_Entry_2017")), "Data_Entry_2017_v2020.csv")
    rows, jobs = table(Path(source, csv_file)), []
    split = {}
    for name, part in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        path = next((path for path in files if os.path.basename(path) == name), name)
        try:
            split.update(dict.fromkeys(Path(source, path).read_text().split(), part))
        except OSError as error:
            raise UserError(f"{Path(source, path)}: {error.strerror}; the official split belongs to the data set") from error
    for row in rows:
        path = images.pop(row["Image Index"], None)
        if path:
            labels = tuple(label for label in row["Finding Labels"].split("|") if label != "No Finding")
            jobs.append(Job(path, [path], "image", "xray", labels, row["Patient ID"], split.get(row["Image Index"], "")))
    refused += [(path, "not in the data set's table") for path in images.values()]
    found = sum(job.split == "test" and len(job.labels) == 1 for job in jobs)
    print(f"single-label test images: found {found}, paper 7,992")
    return jobs, refused


SCANS = {"folder": scan_folder, "chestxray14": scan_chestxray14}


# ---- the run: resume, journal, tables -------------------------------------------------------------------------------------

def pseudonym(key, text):
    """16 hex digits of HMAC-SHA256, "" for nothing."""
    return hmac.new(key, os.fsencode(text), hashlib.sha256).hexdigest()[:16] if text else ""


def time_limit(job):
    """Seconds a job may take: more for more bytes."""
    return SECONDS + int(SECONDS_PER_MB * sum(os.path.getsize(path) for path in job.files) / 1e6)


def read_journals(folder):
    """{id: record} of every shard's journal; the torn last line of a killed run is no record."""
    records = {}
    for path in sorted(Path(folder).glob(".journal-*")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if "shape" in record or "shape" not in records.get(record["id"], {}):
                    records[record["id"]] = record
    return records


def write_csv(path, header, rows, mode=0o666):
    with atomic_write(path, mode) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        text.flush()
        text.detach()


def write_tables(folder, jobs, refused, records):
    """samples.csv, sources.csv and rejected.csv, in an order that depends on the sources alone."""
    kept = sorted((job for job in jobs if "shape" in records.get(job.id, {})), key=lambda job: job.id)
    lost = [(path, records[job.id]["refused"]) for job in jobs if "refused" in records.get(job.id, {}) for path in job.files]
    write_csv(folder / "samples.csv", ("id", "modality", "labels", "patient", "split", "shape"),
              [(job.id, records[job.id]["modality"], "|".join(job.labels), job.patient, job.split, records[job.id]["shape"])
               for job in kept])
    write_csv(folder / "sources.csv", ("id", "path"), [(job.id, job.path) for job in kept], 0o600)
    write_csv(folder / "rejected.csv", ("path", "reason"), sorted({*refused, *lost}), 0o600)
    return len(kept), len(set(refused) | set(lost))


def run(source, folder, jobs, refused, options, key):
    """Cache what is missing, write the tables, print what happened."""
    recipe = Recipe(options.size, options.slices, options.frames)
    for job in jobs:
        job.id = pseudonym(key, job.key or job.path)
        job.patient = pseudonym(key, job.patient)
        job.files = [os.path.join(source, path) for path in job.files]
    folder.mkdir(parents=True, exist_ok=True)
    records = read_journals(folder)
    todo = [job for job in jobs if "shape" not in records.get(job.id, {}) or not (folder / f"{job.id}.npy").exists()]
    batches = []                                 # a fork costs 10 ms: small files share one
    for job in todo:
        if batches and len(batches[-1]) < 32 and job.kind in ("image", "dicom") and batches[-1][0].kind == job.kind:
            batches[-1].append(job)
        else:
            batches.append([job])
    with open(folder / ".journal-0", "ab", buffering=0) as journal, tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="sample") as bar:
        for job, answer in guarded(lambda job: cache_sample(job, recipe, folder), batches, options.workers, time_limit):
            record = {"id": job.id, **answer.get("ok", {"refused": answer.get("refused")})}
            journal.write(b"\n" + json.dumps(record).encode())
            records[job.id] = record
            bar.update()
    for job in jobs:
        job.files = [os.path.relpath(path, source) for path in job.files]
    kept, lost = write_tables(folder, jobs, refused, records)
    print(f"{folder}: {kept} samples, {lost} files rejected" + f", see {folder / 'rejected.csv'}" * (lost > 0))
    if not kept:
        raise UserError(f"nothing could be read in {source}; see {folder / 'rejected.csv'}")


# ---- reading the cache ----------------------------------------------------------------------------------------------------

def read_samples(folder):
    """Rows of folder/samples.csv: id, modality, labels (tuple), patient, split, shape (4 ints) and folder."""
    path = Path(folder) / "samples.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make the cache with prepare.py first")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path}: holds no samples; run prepare.py on a folder with images")
    try:
        return [row | {"labels": tuple(filter(None, row["labels"].split("|"))), "folder": str(folder),
                       "shape": tuple(map(int, row["shape"].split("x")))} for row in rows]
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is no sample table of this program; run prepare.py again") from error


def load_sample(folder, row):
    """The cached array (C, H, W, S), uint8 or float16, of a row of read_samples."""
    path = Path(folder) / f"{row['id']}.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or damaged; run prepare.py --verify, then prepare.py again") from error
    if array.shape != tuple(row["shape"]) or array.dtype not in (np.uint8, np.float16):
        raise UserError(f"{path}: {array.dtype} {array.shape} is not what samples.csv says; run prepare.py --verify")
    return array


class CachedDataset(Dataset):
    """Rows of read_samples (of any folders) as tensors (C, H, W, S), uint8 or float16 as stored."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return torch.from_numpy(load_sample(row["folder"], row))


def read_any(path, modality=None, size=256, slices=64, frames=16):
    """(modality, array (C, H, W, S)) of one file or one series folder, read and guarded as the cache is.

    Where neither `modality` nor a DICOM tag says it: a video is endoscopy, a NIfTI volume ct, any other image xray.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    options = argparse.Namespace(modality=modality, labels=None, workers=1, allow_2d=not os.path.isdir(path))
    source, only = (path, None) if os.path.isdir(path) else os.path.split(path)
    jobs, refused = scan_folder(source, options, only, {"video": "endoscopy", "nifti": "ct", "image": "xray"})
    if len(jobs) != 1:
        raise UserError(f"{path}: " + (f"holds {len(jobs)} samples; name one" if jobs else min(refused, default=("", "is empty"))[1]))
    job = replace(jobs[0], id=pseudonym(PUBLIC_KEY, os.path.basename(path)), files=[os.path.join(source, f) for f in jobs[0].files])
    with tempfile.TemporaryDirectory() as folder:
        task = lambda job: cache_sample(job, Recipe(size, slices, frames), folder)
        for job, answer in guarded(task, [[job]], 1, time_limit):
            if "refused" in answer:
                raise UserError(f"{path}: {answer['refused']}")
            return answer["ok"]["modality"], np.load(os.path.join(folder, f"{job.id}.npy"), allow_pickle=False)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", choices=sorted(SCANS))
    parser.add_argument("source", nargs="?")
    parser.add_argument("--out", default="cache")
    parser.add_argument("--name")
    parser.add_argument("--modality", choices=MODALITIES)
    parser.add_argument("--labels")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--allow-2d", action="store_true")
    return parser.parse_args()


def main():
    options = parse_arguments()
    if not options.source or not os.path.isdir(options.source):
        raise UserError(f"{options.source}: no such folder; give the folder that holds the data")
    jobs, refused = SCANS[options.dataset](options.source, options)
    if not jobs and not refused:
        raise UserError(f"{options.source}: holds no files; give the folder that holds the data")
    run(options.source, Path(options.out, options.name or options.dataset), jobs, refused, options, PUBLIC_KEY)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
