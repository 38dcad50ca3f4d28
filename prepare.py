"""Turn medical image files and public data sets into a cache of small arrays (paper Sec. 3.1 and 4.1).

In:  any folder of DICOM, NIfTI, PNG, JPEG, TIFF, GIF, AVI, MP4, MOV files, or a public data set as it is downloaded.
Out: cache/NAME/ID.npy, (C, H, W, S): image (1 or 3, 256, 256, 1), video (3, 256, 256, 16), volume (1, 256, 256, 64),
     uint8 (value / 255) from 8-bit sources, float16 in [0, 1] from deeper ones; samples.csv says what each sample is,
     rejected.csv which files were left out and why, sources.csv where samples came from. Only the last two name files.
Volumes: H runs from anterior to posterior, W from the patient's right (image left) to left, S from feet to head.

    python prepare.py folder /data/mr --name hospital_mr --modality mri --labels labels.csv --key-file my.key
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
import time
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
from PIL import Image, ImageOps, ImageSequence
from pydicom.encaps import generate_fragments
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder, pixel_array
from torch.utils.data import Dataset
from tqdm import tqdm

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
DICOM_MODALITIES = {"US": "ultrasound", "IVUS": "ultrasound", "ES": "endoscopy", "CT": "ct", "MR": "mri",
                    **dict.fromkeys(("CR", "DX", "DR", "RG", "MG", "RF", "XA", "PX", "IO"), "xray")}
NO_IMAGES = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "DOC", "ECG", "AU", "PLAN"}
VOLUMES = ("ct", "mri")  # their single-frame DICOM files are slices of a series
HU_RANGE = (-1000.0, 1000.0)  # Sec. 4.1
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
MIN_SLICES = 8  # CHOICE: fewer slices of a DICOM series are no volume
CAP, PIXEL_CAP = 2 << 30, 50_000_000  # bytes of one decoded file, pixels of one image or frame
SECONDS, MEMORY = 60, 6 << 30  # a sample may take this long (and 1 s per MB), a child this much address space
PUBLIC_KEY = b"M3Ret public data"  # the ids of public data sets are the same on every machine
VERSION = 1  # raise when the pixels of a cached sample change
VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,asf,h264,hevc",
                 "protocol_whitelist": "file,pipe"}  # an .avi can be a script that opens other files
DEFLATED, MPEG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.10"  # MPEG-2, H.264, HEVC: .100 to .108
SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif"), "nifti": (".nii", ".nii.gz"),
            "video": (".avi", ".mp4", ".mov", ".mpg", ".mpeg", ".mkv", ".wmv", ".m4v", ".webm"),
            "dicom": (".dcm", ".dicom", ".ima")}


class UserError(Exception):
    """What a user can cause and mend: one line naming the file and the remedy."""

    def __str__(self):  # from a loader process it comes wrapped in a traceback, as the last line of it
        return super().__str__().splitlines()[-1].removeprefix("prepare.UserError: ")


def cli(main):
    """Run a script: what a user can cause is one line on standard error, exit code 1."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).splitlines()[-1].removeprefix('prepare.UserError: ')}")


class Refused(Exception):
    """Why one file is left out; never quotes a header value."""


class Note(UserWarning):
    """Something to know about a kept sample; counted and printed at the end."""


def explain(error):
    """An error as a reason: for unforeseen ones the type and tag only, since their text may quote what a file says."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, MemoryError):
        return "over memory"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {os.strerror(error.errno)}"
    tags = re.findall(r"\([0-9A-Fa-f]{4}, ?[0-9A-Fa-f]{4}\)", str(error)) + [getattr(error, "name", None) or ""]
    return f"cannot be decoded: {type(error).__name__} {tags[0]}".strip()


@contextlib.contextmanager
def atomic_write(path, mode=0o666):
    """Yield a binary handle whose bytes replace `path` all at once when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


# ---- pixels: everything becomes float32 in [0, 1], then (C, H, W, S) ------------------------------------------------
def stretch(x, valid=...):
    """The 0.5 to 99.5 percentile of x (of its valid part) becomes [0, 1]."""
    low, high = np.percentile(x[valid], (0.5, 99.5)) if x[valid].size else (0, 1)
    return np.clip((x - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def resize(x, size, spacing=(1.0, 1.0)):
    """Planes (S, C, H, W) -> (S, C, h, w), antialiased: longer side in mm to `size`, aspect kept (Sec. 4.1)."""
    sides = [length * mm for length, mm in zip(x.shape[-2:], spacing)]
    h, w = (max(1, round(side * size / max(sides))) for side in sides)
    return F.interpolate(x, (h, w), mode="bilinear", antialias=True)  # (S, C, h, w)


def pad(x, size):
    """(S, C, h, w) -> (C, size, size, S), centred in zeros (Sec. 4.1)."""
    top, left = (size - x.shape[2]) // 2, (size - x.shape[3]) // 2
    x = F.pad(x, (left, size - x.shape[3] - left, top, size - x.shape[2] - top))  # (S, C, size, size)
    return x.permute(1, 2, 3, 0)  # (C, size, size, S)


def frames_to_array(frames, colour, size):
    """Frames (h, w[, 3]), float32 in [0, 1] or uint8 -> (3 if colour else 1, size, size, number of frames)."""
    planes = []
    for frame in frames:
        frame = frame.astype(np.float32) / 255 if frame.dtype == np.uint8 else frame
        frame = frame @ LUMA if frame.ndim == 3 and not colour else frame  # (h, w) or (h, w, 3)
        frame = np.ascontiguousarray(np.atleast_3d(frame).transpose(2, 0, 1))  # (1 or 3, h, w)
        planes.append(pad(resize(torch.from_numpy(frame)[None], size), size))  # (1 or 3, size, size, 1)
    return torch.cat(planes, dim=3).expand(3 if colour else 1, -1, -1, -1)  # (C, size, size, S)


def volume_to_array(voxels, affine, slope, intercept, modality, size, slices):
    """Voxels (i, j, k) with a RAS+ affine in mm -> (1, size, size, slices), oriented as the file header says.

    CT is clipped to HU_RANGE before any averaging, other volumes are stretched between percentiles at the end. Output
    slices are made one by one: beside the source, only the result and a few slices are in memory.
    """
    axes = nib.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if np.isnan(axes).any():
        raise Refused("singular affine: the header gives no orientation")
    to_lps = nib.orientations.ornt_transform(axes, nib.orientations.axcodes2ornt("LPS"))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(-to_lps[:, 0])]  # mm along S, H, W
    voxels = nib.apply_orientation(voxels, to_lps).T  # (S, H, W), a view
    if 1 in voxels.shape:  # a single slice of any direction is an image, head up
        thin = voxels.shape.index(1)
        voxels = np.moveaxis(voxels, thin, 0)[:, ::-1 if thin else 1]  # (1, rows, columns)
        slices, spacing = 1, np.r_[spacing[thin], np.delete(spacing, thin)]
    low, high = HU_RANGE if modality == "ct" else (-np.inf, np.inf)
    weights = F.interpolate(torch.eye(len(voxels))[None, None], (slices, len(voxels)), mode="bilinear", antialias=True)
    planes, broken, lowest = [], False, np.inf
    for row in weights[0, 0]:  # (S,): an output slice is the weighted mean of a few neighbours
        first, last = row.nonzero()[[0, -1], 0].tolist()
        x = torch.from_numpy(np.ascontiguousarray(voxels[first:last + 1], np.float32))  # (few, H, W)
        x = x.mul_(slope).add_(intercept)  # HU for CT
        if voxels.dtype.kind == "f" and not (finite := x.isfinite()).all():
            broken, x = True, x.where(finite, torch.tensor(low if modality == "ct" else 0.0))
        x = torch.tensordot(row[first:last + 1], x.clamp_(low, high), dims=1)  # (H, W)
        lowest = min(lowest, x.min().item())
        planes.append(resize(x[None, None], size, spacing[1:]))  # (1, 1, h, w)
    if broken:
        warnings.warn("NaN or infinite voxels set to the background", Note)
    if modality == "ct" and lowest > -500:
        warnings.warn("CT without air: are these Hounsfield units?", Note)
    x = torch.cat(planes)  # (slices, 1, h, w)
    x = (x - low) / (high - low) if modality == "ct" else torch.from_numpy(stretch(x.numpy()))
    return pad(x, size)  # (1, size, size, slices)


def in_order(items, k, seed):
    """k of the items at random, in their order (Sec. 3.4); one pass, any length; too few are repeated evenly."""
    kept, rng = [], random.Random(seed)
    for n, item in enumerate(items):
        slot = n if n < k else rng.randrange(n + 1)  # reservoir sampling: each item is equally likely
        if slot < k:
            kept[slot:slot + 1] = [(n, item)]
    if not kept:
        raise Refused("no frame could be decoded")
    if len(kept) < k:
        warnings.warn("fewer frames than asked for: repeated evenly", Note)
    kept.sort(key=lambda pair: pair[0])
    return [kept[i * len(kept) // k][1] for i in range(k)]


# ---- images and videos ----------------------------------------------------------------------------------------------
def image_frame(image):
    """An open Pillow image -> (h, w) or (h, w, 3), uint8, or float32 in [0, 1] if it is deeper."""
    if image.width * image.height > PIXEL_CAP:
        raise Refused(f"{image.width * image.height / 1e6:.0f} megapixels, the limit is {PIXEL_CAP / 1e6:.0f}")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bit grey, which convert("L") would clip
        x = np.asarray(image).astype(np.float32)
        low, high = x.min(), x.max()
        top = 1 if image.mode == "F" and high <= 1 else 4095 if high <= 4095 else 65535  # CHOICE: 12 bits if they do
        return x / top if low >= 0 and high <= top and (image.mode[0] == "I" or top == 1) else stretch(x)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def read_image(path, count=1, seed=0):
    """PNG, JPEG, TIFF or GIF -> (frames, deeper than 8 bits?); several pages make `count` frames of a video."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "TIFF", "GIF"))
    except Image.UnidentifiedImageError as error:
        raise Refused("not a PNG, JPEG, TIFF or GIF file") from error
    deep = image.mode[0] in "IF"
    if not deep and ";16" in str(image.tile):
        warnings.warn("16-bit colour reduced to 8 bits", Note)
    if getattr(image, "n_frames", 1) == 1 or image.format == "MPO":
        return [image_frame(image)], deep
    pages = ImageSequence.Iterator(image)
    return in_order((image_frame(page) for page in pages), count, seed), deep


def read_video(source, count, seed):
    """AVI, MP4, MOV ... (path or binary file) -> `count` frames (h, w, 3) uint8, in one decoding pass."""
    tally = Counter()

    def decode(stream):
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                frames, tally["corrupt"] = [], tally["corrupt"] + 1
            for frame in frames:
                if frame.width * frame.height > PIXEL_CAP:
                    raise Refused(f"frames of more than {PIXEL_CAP / 1e6:.0f} megapixels")
                tally["decoded"] += 1
                tally["corrupt"] += frame.is_corrupt
                yield frame

    try:
        source = source if hasattr(source, "read") else os.path.abspath(source)  # a relative name could be a protocol
        container = av.open(source, options=VIDEO_OPTIONS, metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise Refused("not a readable video: unknown or forbidden format, or cut off") from error
    with container:
        if not container.streams.video:
            raise Refused("no video stream")
        declared = container.streams.video[0].frames
        frames = in_order(decode(container.streams.video[0]), count, seed)
        if tally["decoded"] < 0.9 * declared or tally["corrupt"] > 0.1 * tally["decoded"]:
            raise Refused(f"damaged: {tally['decoded']} of {declared} frames decoded, {tally['corrupt']} corrupt")
        if tally["decoded"] < declared or tally["corrupt"]:
            warnings.warn("video with missing or corrupt frames", Note)
        return [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames]


# ---- NIfTI ----------------------------------------------------------------------------------------------------------
def inflate(data, limit):
    """Uncompress gzip members up to `limit` bytes; zlib checks each CRC and length, which nibabel leaves unread."""
    parts, left = [], limit
    while data.strip(b"\0") and left > 0:
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(data, left))
        except zlib.error as error:
            raise Refused("damaged gzip data (CRC check failed)") from error
        left -= len(parts[-1])
        if not member.eof and left > 0:
            raise Refused("truncated gzip data")
        data = member.unused_data
    if not left:
        raise Refused("holds more than its header says")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_nifti(path):
    """NIfTI-1 or 2 -> voxels (i, j, k), RAS+ affine in mm, slope, intercept; judged by the header first."""
    data = Path(path).read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    try:
        head = zlib.decompressobj(wbits=31).decompress(data, 544) if packed else data[:544]
    except zlib.error as error:
        raise Refused("damaged gzip data") from error
    length = next((n for n in (348, 540) if head[:4] in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), 0)
    if not length or not (head[344:347] == b"n+1" or head[4:7] == b"n+2"):
        raise Refused("not a NIfTI file (.hdr/.img pairs: convert them to .nii)")
    header = (nib.Nifti1Header if length == 348 else nib.Nifti2Header)(head[:length])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    need = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not (2 <= len(shape) <= 4 and all(1 <= n <= 4096 for n in shape) and dtype.kind in "iuf" and need <= CAP):
        raise Refused(f"voxels of shape {shape} and type {dtype} cannot be used")
    if packed:
        data = inflate(data, offset + need + (1 << 16))
    if not length < offset <= len(data) - need:
        raise Refused(f"truncated: {max(len(data) - offset, 0)} of {need} bytes of voxels")
    voxels = np.frombuffer(data, dtype, need // dtype.itemsize, offset).reshape(shape, order="F")
    if shape[3:] not in ((), (1,)):
        warnings.warn("4D NIfTI: first volume kept", Note)
    if not header["sform_code"] and not header["qform_code"]:
        warnings.warn("NIfTI header without orientation", Note)
    slope, intercept = header.get_slope_inter()
    voxels = voxels.reshape(shape + (1,) * (4 - len(shape)), order="F")[..., 0]  # (i, j, k)
    return voxels, header.get_best_affine(), 1.0 if slope is None else slope, intercept or 0.0


# ---- DICOM ----------------------------------------------------------------------------------------------------------
# Coarse parts of the body by the defined terms of BodyPartExamined (PS3.16 annex L) and other words met in the tag.
BODY_PARTS = {
    "head": "HEAD BRAIN SKULL FACE ORBIT JAW MAXILLA NOSE EAR EYE IAC TMJ CEREBELLUM CIRCLEOFWILLIS ZYGOMA FACIAL "
            "ORBITS CRANIUM SCHAEDEL TETE CRANEO PITUITARY SINUS PNS",
    "neck": "NECK LARYNX PHARYNX THYROID CAROTID PAROTID HALS COLLO CUELLO",
    "chest": "CHEST LUNG MEDIASTINUM BRONCHUS TRACHEA RIB RIBS STERNUM ESOPHAGUS THORAX TORAX CXR CAP TAP CHESTLUNG PE"
             " PECHEST CHESTPE CHESTXWISE CHES CHST",
    "heart": "HEART CORONARYARTERY AORTA CARDIO CARDIAC CORONARY", "breast": "BREAST MAMMA",
    "abdomen": "ABDOMEN LIVER KIDNEY PANCREAS SPLEEN STOMACH COLON GALLBLADDER ADRENAL BILEDUCT DUODENUM JEJUNUM ILEUM"
               " ABD ABDO AB KUB KIDNEYURETERBL BABYGRAM CAP TAP",
    "pelvis": "PELVIS BLADDER PROSTATE RECTUM UTERUS OVARY CERVIX VAGINA SCROTUM ILIUM COCCYX PELV PEL BECKEN BASSIN"
              " CAP TAP",
    "cspine": "CSPINE CTSPINE CERVICALSPINE CERVICAL HWS", "tspine": "TSPINE TLSPINE THORACICSPINE DORSAL BWS",
    "lspine": "LSPINE LSSPINE SSPINE LUMBARSPINE LUMBOSACRAL LWS LS", "spine": "SPINE BACK RACHIS", "hip": "HIP",
    "shoulder": "SHOULDER SCAPULA AXILLA CLAVICLE SHOULDERSCAPULA SCHULTER", "upper arm": "HUMERUS ARM UPEXM OBERARM",
    "elbow": "ELBOW", "forearm": "RADIUS ULNA RADIUSULNA FOREARM UNTERARM", "wrist": "WRIST",
    "hand": "HAND FINGER THUMB", "thigh": "FEMUR THIGH", "knee": "KNEE PATELLA", "ankle": "ANKLE FOOTANKLE",
    "foot": "FOOT TOE CALCANEUS FOOTANKLE",
    "lower leg": "LEG TIBIA TIBIAFIBULA CALF TBFBCALF LOWEXM LOWEREXTREMITY", "whole body": "WHOLEBODY BODY"}
REGIONS = re.compile("HEAD|NECK|CHEST|CHES|CHST|THORAX|ABDOMEN|ABD|AB|PELVIS|PELV|PEL")
FILLERS = set("AND TO AP PA LAT LATERAL LEFT RIGHT PORT PORTABLE PEDIATRIC CT MR XR CTA WITHOUT WITH CONTRAST".split())


def body_parts(*texts):
    """Coarse parts named by the first of the texts that is, as a whole, a body part or a row of regions."""
    for text in texts:
        words = re.sub("[^A-Z0-9]+", " ", text.upper()).split()
        for word in ("".join(words), "".join(word for word in words if word not in FILLERS)):
            roots = REGIONS.findall(word) if word and not REGIONS.sub("", word) else [word]
            found = [part for part, known in BODY_PARTS.items() if set(roots) & set(known.split())]
            if found:
                return found
    return []


def open_dicom(path, **options):
    """pydicom.dcmread for files of any origin: no blind force, no deflated bomb, the reason of every refusal."""
    with open(path, "rb") as file:
        head = file.read(1024)
    preamble = head[128:132] == b"DICM"
    if not preamble and not (head[:2] in (b"\x08\0", b"\2\0") or head[:4] in (b"\0\x08\0\5", b"\0\x08\0\x08")):
        raise Refused("not a DICOM file")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if DEFLATED.encode() in head and preamble:
                start = 144 + pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
                if len(zlib.decompressobj(-15).decompress(Path(path).read_bytes()[start:], CAP // 4)) == CAP // 4:
                    raise Refused(f"deflated, over {CAP / 4e9:.1f} GB when inflated")
            ds = pydicom.dcmread(path, force=not preamble, **options)
    except (struct.error, OSError, EOFError, AttributeError, zlib.error, pydicom.errors.BytesLengthException) as error:
        raise Refused("truncated or damaged DICOM header") from error
    ds.cut = any("before delimiter" in str(warning.message) for warning in caught)  # pydicom drops such pixels
    if not preamble and "TransferSyntaxUID" not in ds.file_meta and "SOPClassUID" in ds:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2" + {
            (True, True): "", (False, True): ".1", (False, False): ".2"}[ds.original_encoding])
    return ds


def sop_class(ds):
    return pydicom.uid.UID_dictionary.get(str(ds.get("SOPClassUID", "")), ["unknown SOP class"])[0]


def frame_count(ds):
    try:
        return max(1, int(ds.get("NumberOfFrames", 1) or 1))
    except (TypeError, ValueError) as error:
        raise Refused("NumberOfFrames is no number") from error


def per_frame(ds, frame, sequence, tag, default=None):
    """A value of one frame: its functional group, else the shared group, else the data set (PS3.3 C.7.6.16)."""
    own = ds.get("PerFrameFunctionalGroupsSequence", [])[frame:frame + 1]
    for item in (*own, *ds.get("SharedFunctionalGroupsSequence", [])):
        for inner in item.get(sequence, []):
            if inner.get(tag) is not None:
                return inner.get(tag)
    value = ds.get(tag)
    return default if value is None or value == "" else value


def rescale(ds, frame):
    """(slope, intercept) of a frame; pydicom's apply_rescale would miss functional groups and a lone intercept."""
    return tuple(float(per_frame(ds, frame, "PixelValueTransformationSequence", tag, default))
                 for tag, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)))


def check_pixels(ds, whole):
    """Refuse, before any decoding, pixel data that are absent, cut, too large or in a syntax nothing here decodes."""
    if "PixelData" not in ds:
        raise Refused("truncated before the sequence delimiter" if ds.cut else f"no pixel data ({sop_class(ds)})")
    if "TransferSyntaxUID" not in ds.file_meta:
        raise Refused("TransferSyntaxUID (0002,0010) is missing")
    if ds.get("HighBit", ds.BitsStored - 1) != ds.BitsStored - 1:
        raise Refused("HighBit is not BitsStored - 1")
    syntax, frames = ds.file_meta.TransferSyntaxUID, frame_count(ds)
    plane = ds.Rows * ds.Columns * ds.SamplesPerPixel * ds.BitsAllocated / 8
    if plane > CAP / 4 or whole and plane * frames > CAP or frames > 100_000:
        raise Refused(f"claims {plane * frames / 1e9:.1f} GB of pixels, the limit is {CAP / 1e9:.1f}")
    if not syntax.is_encapsulated:
        need = int(plane * frames * (2 / 3 if ds.PhotometricInterpretation == "YBR_FULL_422" else 1))
        if len(ds.PixelData) < need:
            raise Refused(f"truncated: {len(ds.PixelData)} of {need} bytes of pixels")
    elif not syntax.startswith(MPEG) and not get_decoder(syntax).is_available:
        raise Refused(f"{syntax.name} needs a decoder: pip install python-gdcm")


def stored_values(ds, **options):
    """pydicom's pixel_array; colours come as RGB."""
    try:
        return pixel_array(ds, **options)
    except RuntimeError as error:  # every plugin failed
        raise Refused(f"{ds.file_meta.TransferSyntaxUID.name}, {ds.BitsStored} bits: no decoder reads it") from error


def is_padding(ds, stored):
    """True where a stored value lies in the padding outside the image (PS3.3 C.7.5.1.1.2)."""
    if "PixelPaddingValue" not in ds:
        return np.zeros(stored.shape, bool)
    ends = [int(ds.PixelPaddingValue), int(ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue))]
    if ds.PixelRepresentation:  # some writers store the signed value as unsigned
        ends = [end - (1 << 16) if end >= 1 << 15 else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def display_window(x, ds, frame):
    """x through the file's VOI LUT or first window (PS3.3 C.11.2), in [0, 1]; None if it has no usable one."""
    if ds.get("VOILUTSequence"):
        bits = ds.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi_lut(x.astype(np.int32), ds) / np.float32((1 << bits) - 1)
    pair = [per_frame(ds, frame, "FrameVOILUTSequence", tag) for tag in ("WindowCenter", "WindowWidth")]
    if None in pair:
        return None
    centre, width = (float(value) if np.isscalar(value) else float(value[0]) for value in pair)
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    if not width > 0:
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    return np.clip((x - centre) / width + 0.5, 0, 1)


def dicom_frame(ds, frame, modality):
    """One frame -> (h, w) or (h, w, 3) in [0, 1]: colour as RGB, CT by HU_RANGE, X-ray as displayed, MR stretched."""
    stored = stored_values(ds, index=frame)
    full = np.float32((1 << ds.BitsStored) - 1)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, ds)  # (h, w, 3)
        full = np.float32(np.iinfo(stored.dtype).max)
    if stored.ndim == 3:
        return stored / full
    outside, (slope, intercept) = is_padding(ds, stored), rescale(ds, frame)
    x = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if ds.get("ModalityLUTSequence"):
        x = apply_modality_lut(stored, ds).astype(np.float32)
    if modality == "ct":
        x = (np.clip(x, *HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
        return np.where(outside, np.float32(0), x)
    shown = display_window(x, ds, frame) if modality == "xray" else None
    if shown is not None and not outside.all() and np.ptp(shown[~outside]) > 0:
        x = shown
    elif modality != "mri" and ds.BitsStored <= 8 and not ds.PixelRepresentation:
        x = stored / full
    else:
        x = stretch(x, ~outside)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        warnings.warn("MONOCHROME1: inverted", Note)
        x = 1 - x
    return np.where(outside, 0, x).astype(np.float32)


def read_dicom(path, modality, count, seed):
    """A DICOM file -> (frames (h, w[, 3]) in [0, 1], deeper than 8 bits?): one, or `count` of a multi-frame object."""
    ds = open_dicom(path)
    check_pixels(ds, whole=False)
    if ds.file_meta.TransferSyntaxUID.startswith(MPEG):
        stream = b"".join(list(generate_fragments(ds.PixelData))[1:])  # after the offset table
        return read_video(io.BytesIO(stream), count, seed), False
    frames = frame_count(ds)
    chosen = in_order(range(frames), count, seed) if frames > 1 else [0]
    return [dicom_frame(ds, frame, modality) for frame in chosen], ds.BitsStored > 8


def read_slices(files, modality):
    """Yield (plane (rows, columns), orientation, spacing and position (11,), (slope, intercept)) of every frame."""
    for number, path in enumerate(files):
        try:
            ds = open_dicom(path)
            check_pixels(ds, whole=True)
            if ds.SamplesPerPixel > 1:
                raise Refused("colour image in a series")
            stored = stored_values(ds).reshape(-1, ds.Rows, ds.Columns)  # (frames, rows, columns)
        except Exception as error:  # the journal holds no file name: write_tables fills {number} in
            raise Refused((f"slice {{{number}}}: " if len(files) > 1 else "") + explain(error)) from error
        sign = -1 if ds.PhotometricInterpretation == "MONOCHROME1" and modality != "ct" else 1
        for frame, plane in enumerate(stored):
            place = [per_frame(ds, frame, sequence, tag) for sequence, tag in (
                ("PlaneOrientationSequence", "ImageOrientationPatient"), ("PixelMeasuresSequence", "PixelSpacing"),
                ("PlanePositionSequence", "ImagePositionPatient"))]
            if None in place:
                raise Refused("no ImageOrientationPatient, PixelSpacing or ImagePositionPatient")
            outside = is_padding(ds, plane)
            if outside.any() and not outside.all():
                plane = np.where(outside, min(plane[~outside].min(), np.array(0, plane.dtype)), plane)
            yield plane, [float(x) for values in place for x in values], tuple(sign * x for x in rescale(ds, frame))


def read_series(files, modality):
    """A DICOM series, or one multi-frame file -> voxels (i, j, k), RAS+ affine in mm, slope, intercept.

    Slices are sorted by their position along the normal, never by name or number (PS3.3 C.7.6.2.1.1).
    """
    planes, places, scales = zip(*read_slices(files, modality))
    places = np.array(places)  # (n, 6 + 2 + 3)
    if np.ptp(places[:, :8], axis=0).max() > 1e-2:
        raise Refused("slices differ in orientation or pixel spacing")
    along_row, along_column, (row_mm, column_mm) = places[0, :3], places[0, 3:6], places[0, 6:8]
    corners = places[:, 8:]  # (n, 3) mm
    z = corners @ np.cross(along_row, along_column)  # (n,) mm
    order = slice_order(z, planes)
    step = (corners[order[-1]] - corners[order[0]]) / (len(order) - 1)  # (3,) mm
    if np.ptp(z) < np.cos(np.radians(5)) * np.linalg.norm(step) * (len(order) - 1):
        warnings.warn("gantry tilt over 5 degrees: kept as stored", Note)
    if len(set(scales)) > 1:  # PET and some MR change it from slice to slice
        planes = [plane.astype(np.float32) * np.float32(a) + np.float32(b) for plane, (a, b) in zip(planes, scales)]
        scales = [(1.0, 0.0)]
    voxels = even_slices(np.stack([planes[i] for i in order]), z[order])  # (k, rows, columns)
    affine = np.diag([-1.0, -1, 1, 1])  # DICOM counts to the left and back, RAS+ to the right and front
    axes = [along_row * column_mm, along_column * row_mm, step, corners[order[0]]]
    affine[:3] = affine[:3, :3] @ np.stack(axes, axis=1)  # (3, 4)
    return voxels.transpose(2, 1, 0), affine, *scales[0]


def slice_order(z, planes):
    """Positions z (n,) in mm and their planes -> indices in rising order, one per position; refuses a gap."""
    order = np.argsort(z, kind="stable")
    same = np.flatnonzero(np.diff(z[order]) < 1e-2)
    if any(not np.array_equal(planes[order[i]], planes[order[i + 1]]) for i in same):
        raise Refused("two different slices at one position")
    if len(same):
        warnings.warn("duplicate slices dropped", Note)
    order = np.delete(order, same + 1)
    if len(order) < MIN_SLICES:
        raise Refused(f"{len(order)} slices, a volume needs {MIN_SLICES}")
    gaps = np.diff(z[order])
    step = np.median(gaps)
    odd = np.abs(gaps - step) > max(0.05 * step, 0.1)
    runs = np.split(odd, np.flatnonzero(np.diff(odd)) + 1)
    if odd.any() and min(map(len, runs)) < 3:  # a thin and a thick part are long runs, a missing slice is not
        at = int(np.abs(gaps - step).argmax())
        raise Refused(f"gap of {gaps[at]:.1f} mm after slice {at + 1} of {len(order)}, others {step:.1f} mm")
    return order


def even_slices(voxels, z):
    """Planes (k, ...) at rising positions z: where the spacing really varies, interpolated to an even one."""
    even = np.linspace(z[0], z[-1], len(z))
    if np.abs(even - z).max() < 0.5 * np.diff(z).min():
        return voxels
    warnings.warn("uneven slice spacing made even", Note)
    place = np.interp(even, z, np.arange(len(z)))
    below, part = place.astype(int), (place % 1).astype(np.float32)[:, None, None]
    return voxels[below] * (1 - part) + voxels[np.minimum(below + 1, len(z) - 1)] * part


def dicom_header(path):
    """What grouping and labelling need of one DICOM file, as plain types."""
    ds = open_dicom(path, stop_before_pixels=True)
    if ds.get("Modality") in NO_IMAGES or not ds.get("Rows") or not ds.get("Columns"):
        raise Refused(f"no pixel data ({sop_class(ds)})")
    text = {tag: str(ds.get(tag) or "") for tag in (
        "SeriesInstanceUID", "SOPInstanceUID", "Modality", "PatientID", "BurnedInAnnotation", "BodyPartExamined",
        "ProtocolName", "SeriesDescription", "StudyDescription", "ImageType", "AcquisitionNumber", "TriggerTime",
        "TemporalPositionIdentifier", "EchoTime")}
    region = [str(item.get("CodeMeaning") or "") for item in ds.get("AnatomicRegionSequence", [])[:1]]
    return text | {"frames": frame_count(ds), "size": [int(ds.get(tag) or 1) for tag in (
                       "Rows", "Columns", "SamplesPerPixel")],
                   "orientation": [round(float(x), 2) for x in ds.get("ImageOrientationPatient") or []],
                   "position": [round(float(x), 2) for x in ds.get("ImagePositionPatient") or []],
                   "parts": body_parts(text["BodyPartExamined"], *region, *(text[tag] for tag in (
                       "ProtocolName", "SeriesDescription", "StudyDescription")))}


# ---- one sample, decoded in a guarded child -------------------------------------------------------------------------
@dataclass
class Job:
    """One future sample: where its pixels are and what is known about it."""
    path: str  # relative to the source, what sources.csv shows
    files: list  # relative: one file, the slices of a series, the frames of a clip
    kind: str  # image, video, nifti, dicom, series or clip
    modality: str
    labels: tuple = ()
    patient: str = ""
    split: str = ""
    key: str = ""  # what the id is made of, where it is not the path
    blank: dict = field(default_factory=dict)  # what a blank NIfTI header should say: spacing, slope, intercept
    id: str = ""


def decode(job, files, size, slices, frames):
    """Read a job's files -> array (C, H, W, S), uint8 from 8-bit sources and float16 from deeper ones."""
    seed, deep = int(job.id, 16), False
    if job.kind in ("nifti", "series"):
        volume = read_nifti(files[0]) if job.kind == "nifti" else read_series(files, job.modality)
        voxels, affine, slope, intercept = fill_blank(*volume, **job.blank) if job.blank else volume
        x = volume_to_array(voxels, affine, slope, intercept, job.modality, size, slices)
        deep = voxels.dtype.itemsize > 1
    else:
        if job.kind == "image":
            planes, deep = read_image(files[0], frames, seed)
        elif job.kind == "video":
            planes = read_video(files[0], frames, seed)
        elif job.kind == "dicom":
            planes, deep = read_dicom(files[0], job.modality, frames, seed)
        else:
            planes = [read_image(path)[0][0] for path in in_order(files, frames, seed)]
        x = frames_to_array(planes, len(planes) > 1 or job.modality == "endoscopy", size)  # (C, H, W, S)
    return x.clamp(0, 1).half().numpy() if deep else x.mul(255).round().clamp(0, 255).byte().numpy()


def fill_blank(voxels, affine, slope, intercept, spacing, scale=None):
    """Volumes published with a blank header lie as LPS; their scale is needed unless they are HU."""
    sample = voxels[::4, ::4, ::4] * slope + intercept
    if scale and np.mean((sample > -1100) & (sample < -600)) < 0.05:  # no air or lung: not yet HU
        slope, intercept = scale
    return voxels, np.diag([-spacing[0], -spacing[1], spacing[2], 1]), slope, intercept


def cache_sample(job, source, folder, size, slices, frames):
    """Decode a job and write its array; returns the journal's record of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        array = decode(job, [os.path.join(source, path) for path in job.files], size, slices, frames)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with atomic_write(Path(folder) / f"{job.id}.npy") as file:
        file.write(buffer.getbuffer())
    return {"shape": "x".join(map(str, array.shape)), "crc": zlib.crc32(buffer.getbuffer()),
            "notes": sorted({str(warning.message) for warning in caught if warning.category is Note})}


def child(task, items, pipe, seconds, parent):
    """Answer each item through the pipe, under a memory limit and an alarm; never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders print what files say
        os.dup2(1, 2)
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the default action ends a native hang as well
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.path.exists("/proc/self/statm"):
            limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        for item in items:
            try:
                signal.alarm(seconds(item))
                answer = {"ok": task(item)}
            except UserError as error:  # the cache cannot be written: no file's fault
                answer = {"fatal": str(error)}
            except BaseException as error:  # decoders raise all there is, PanicException and KeyboardInterrupt included
                answer = {"refused": explain(error)}
            signal.alarm(0)
            if os.getppid() != parent:
                break
            pipe.send_bytes(json.dumps(answer).encode())
    finally:
        os._exit(0)


def guarded(task, batches, workers, seconds):
    """Yield (item, {"ok": task(item)} or {"refused": reason}) from forked children, one a batch, as they come.

    No file can end or hang the run: the item a child died at is tried again alone, and only then refused.
    """
    waiting, running = [list(batch) for batch in reversed(batches)], {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                batch, (reader, writer), parent = waiting.pop(), Pipe(duplex=False), os.getpid()
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # numpy has threads
                    pid = os.fork()
                if not pid:
                    child(task, batch, writer, seconds, parent)
                writer.close()
                running[reader] = pid, batch, len(batch)
            for reader in connection.wait(list(running)):
                pid, batch, size = running[reader]
                with contextlib.suppress(EOFError, OSError):  # the child is gone, maybe in the middle of a word
                    answer = json.loads(reader.recv_bytes())
                    if "fatal" in answer:
                        raise UserError(answer["fatal"])
                    yield batch.pop(0), answer
                    continue
                del running[reader]
                reader.close()
                status = os.waitpid(pid, 0)[1]
                if batch and size > 1:
                    waiting += [batch[1:], batch[:1]] if len(batch) > 1 else [batch]
                elif batch:
                    yield batch[0], {"refused": cause_of_death(status)}
    finally:
        for pid, *_ in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def cause_of_death(status):
    if not os.WIFSIGNALED(status):
        return f"decoder ended with exit code {os.waitstatus_to_exitcode(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    return {"SIGALRM": "timed out", "SIGKILL": "killed, out of memory?"}.get(name, f"decoder crashed ({name})")


# ---- sources: which files make samples (jobs), and (path, reason) of those left out ---------------------------------
def walk(source):
    """Relative paths of the regular files below `source`, sorted, and (path, why it is not used) of everything else."""
    files, refused = [], []

    def unreadable(error):
        refused.append((os.path.relpath(error.filename, source), f"cannot be read: {os.strerror(error.errno)}"))

    for root, folders, names in os.walk(source, onerror=unreadable):
        caches = [name for name in folders if os.path.exists(os.path.join(root, name, "recipe.json"))]
        folders[:] = sorted(set(folders) - set(caches))
        for name in sorted(names + [folder for folder in folders if os.path.islink(os.path.join(root, folder))]):
            path = os.path.relpath(os.path.join(root, name), source)
            try:
                info = os.stat(os.path.join(root, name))
            except OSError as error:
                refused.append((path, f"cannot be read: {os.strerror(error.errno)}"))
                continue
            reason = ("link to a folder, not followed" if stat.S_ISDIR(info.st_mode) else
                      "not a regular file" if not stat.S_ISREG(info.st_mode) else
                      "empty file" if not info.st_size else
                      "hidden file" if name.startswith(".") or "__MACOSX" in Path(path).parts else
                      f"larger than {2 * CAP / 1e9:.1f} GB" if info.st_size > 2 * CAP else "")
            refused.append((path, reason)) if reason else files.append(path)
    return files, refused


def table(path):
    """Rows of a CSV file with , or ; as dicts: header and cells stripped, byte order mark and broken bytes survived."""
    try:
        text = Path(path).read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {os.strerror(error.errno)}; the data set needs this table") from error
    first = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text), delimiter=";" if first.count(";") > first.count(",") else ",")
    head = [cell.strip() for cell in next(lines, [])]
    rows = [dict(zip(head, (cell.strip() for cell in line))) for line in lines if any(line)]
    if not rows:
        raise UserError(f"{path}: holds no rows; download it again")
    return rows


def named(paths, pattern, needed=True):
    """The paths whose file name matches; UserError if a needed one is absent."""
    found = [path for path in paths if re.fullmatch(pattern, os.path.basename(path))]
    if needed and not found:
        raise UserError(f"no file named like {pattern} there; it belongs to the data set, download it too")
    return found


def kind_of(path):
    """dicom, image, nifti or video by the file's first bytes, else by its name; "" for anything else."""
    with open(path, "rb") as file:
        head = file.read(352)
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")):
        return "image"
    if head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return "nifti"
    if head[:4] + head[8:12] == b"RIFFAVI " or head[4:8] == b"ftyp":
        return "video"
    name = str(path).lower()
    found = [kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)]
    return found[0] if found else "dicom" if head[:2] in (b"\x08\0", b"\2\0", b"\0\x08") else ""


def dicom_jobs(headers, modality, allow_2d):
    """Headers {path: dicom_header} -> single images, multi-frame files and series as jobs, the rest refused."""
    series = defaultdict(list)  # SeriesInstanceUID: [(size, direction, jobs)]
    for path, head in headers.items():
        kind = modality(path) or DICOM_MODALITIES.get(head["Modality"])
        job = Job(path, [path], "dicom", kind, tuple(head["parts"]), head["PatientID"])
        if kind is None:
            yield path, "modality is none of the five: give --modality"
        elif kind not in VOLUMES:
            yield job
        elif {"LOCALIZER", "SCOUT"} & set(re.findall("[A-Z]+", head["ImageType"])):
            yield path, "localizer"
        elif head["frames"] > 1:
            yield replace(job, kind="series")
        elif not head["SeriesInstanceUID"] and not allow_2d:
            yield path, "no SeriesInstanceUID (0020,000E)"
        else:
            size, direction, stacks = (kind, *head["size"]), head["orientation"], series[head["SeriesInstanceUID"]]
            fits = (jobs for other, along, jobs in stacks if other == size and len(along) == len(direction)
                    and np.allclose(along, direction, atol=0.05))
            if (jobs := next(fits, None)) is None:
                stacks.append((size, direction, jobs := []))
            jobs.append(job)
    for uid, stacks in series.items():
        for n, (*_, jobs) in enumerate(sorted(stacks, key=lambda stack: -len(stack[-1]))):
            jobs, others = one_stack(jobs, headers)
            yield from others
            if len(jobs) >= MIN_SLICES:
                files = sorted((job.path for job in jobs), key=lambda path: (headers[path]["position"], path))
                folder = os.path.commonpath([os.path.dirname(path) for path in files]) or "."
                yield replace(jobs[0], path=folder, files=files, kind="series", key=uid + f" {n}" * (n > 0))
            elif allow_2d:
                yield from jobs
            else:
                reason = f"slices of this series, size and orientation: {len(jobs)}, a volume needs {MIN_SLICES}"
                yield from ((job.path, reason + " (--allow-2d keeps each as an image)") for job in jobs)


def one_stack(jobs, headers):
    """Slices of one size and orientation -> (jobs of one pass through the body, [(path, reason)] of the others)."""
    objects, others = {}, []
    for job in jobs:
        head = headers[job.path]
        if objects.setdefault(head["SOPInstanceUID"] or job.path, job) is not job:
            others.append((job.path, "copy of another slice of its series"))
    jobs, phases = list(objects.values()), defaultdict(list)
    if len({tuple(headers[job.path]["position"]) for job in jobs}) < len(jobs):
        for job in jobs:
            phases[tuple(headers[job.path][tag] for tag in (
                "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime", "EchoTime", "ImageType"))].append(job)
        best, *rest = sorted(phases.values(), key=len, reverse=True)
        if len(best) >= MIN_SLICES:
            others += [(job.path, "another phase or echo of a kept series") for phase in rest for job in phase]
            jobs = best
    return jobs, others


def read_headers(source, paths, workers):
    """dicom_header of each path, in guarded children -> ({path: header} in the paths' order, [(path, reason)])."""
    headers, refused = dict.fromkeys(paths), []
    batches = [paths[i:i + 256] for i in range(0, len(paths), 256)]
    answers = guarded(lambda path: dicom_header(os.path.join(source, path)), batches, workers, lambda path: SECONDS)
    for path, answer in tqdm(answers, total=len(paths), unit="header", disable=len(paths) < 1000):
        headers[path] = answer.get("ok")
        if "refused" in answer:
            refused.append((path, answer["refused"]))
    burned = [head["BurnedInAnnotation"] or ("unknown" if head["Modality"] in ("US", "SC", "XA", "ES") else "NO")
              for head in headers.values() if head]
    if set(burned) - {"NO"}:
        print(f"warning: {len(burned) - burned.count('NO')} DICOM files may show names or dates in their pixels "
              "(BurnedInAnnotation is not NO)")
    return {path: head for path, head in headers.items() if head}, refused


def any_folder(source, files, options):
    """Any tree of files; labels.csv (path, labels and perhaps patient, split, modality) goes before DICOM headers."""
    rows = {os.path.normpath(row.get("path", "")): row for row in table(options.labels)} if options.labels else {}
    if not all({"path", "labels"} <= {*row} and row.get("modality", "") in ("", *MODALITIES) for row in rows.values()):
        raise UserError(f"{options.labels}: needs columns path and labels; modality is one of {', '.join(MODALITIES)}")

    def modality(path):
        row = rows.get(path) or rows.get(os.path.dirname(path) or ".") or {}
        return row.get("modality") or options.modality

    kinds, found = {}, []
    for path in files:
        full = os.path.join(source, path)
        try:
            if not options.labels or os.path.realpath(full) != os.path.realpath(options.labels):
                kinds[path] = kind_of(full)
        except OSError as error:
            found.append((path, explain(error)))
    headers, unread = read_headers(source, [path for path in kinds if kinds[path] == "dicom"], options.workers)
    found += [*unread, *dicom_jobs(headers, modality, options.allow_2d)]
    for path, kind in kinds.items():
        if not kind:
            found.append((path, "not a DICOM, NIfTI, image or video file"))
        elif kind != "dicom":
            told = modality(path) or options.guess.get(kind)
            found.append(Job(path, [path], kind, told) if told else (path, "modality unknown: give --modality"))
    for job in found:
        if isinstance(job, Job) and (row := rows.get(job.path)):
            job.labels, job.split = tuple(filter(None, row["labels"].split("|"))), row.get("split", "")
            job.patient = row.get("patient") or job.patient
    unused = set(rows) - {job.path for job in found if isinstance(job, Job)}
    if unused:
        print(f"warning: {len(unused)} paths of {options.labels} are no sample below {source}")
    return found


def chestxray14(source, files, options):
    """images/*.png or images_001/images/*.png ...; labels by Data_Entry, split by the official lists."""
    rows = {row["Image Index"]: row for row in table(Path(source, named(files, r"Data_Entry_2017.*\.csv")[0]))}
    split = {name: part for part, listed in (("train", "train_val_list.txt"), ("test", "test_list.txt"))
             for name in Path(source, named(files, listed)[0]).read_text().split()}
    for path in files:
        name = os.path.basename(path)
        if name in rows:
            row = rows.pop(name)
            labels = tuple(label for label in row["Finding Labels"].split("|") if label != "No Finding")
            yield Job(path, [path], "image", "xray", labels, row["Patient ID"], split.get(name, ""))
        elif name.endswith(".png"):
            yield path, "not in the data set's table, or twice here"


def fetal_planes(source, files, options):
    """Images/*.png; plane, patient and split by FETAL_PLANES_DB_data.csv (; separated, blanks in header and cells)."""
    rows = {row["Image_name"]: row for row in table(Path(source, named(files, r"FETAL_PLANES_DB_data\.csv")[0]))}
    for path in files:
        row = rows.get(Path(path).stem)
        if path.endswith(".png"):
            yield Job(path, [path], "image", "ultrasound", (row["Plane"],), row["Patient_num"],
                      "train" if row["Train"] == "1" else "test") if row else (path, "not in the data set's table")


KVASIR_CLASSES = {re.sub("[^a-z]", "", name.lower()): name for name in (
    "Ampulla of vater", "Angiectasia", "Blood - fresh", "Blood - hematin", "Erosion", "Erythema", "Foreign body",
    "Polyp", "Ileocecal valve", "Lymphangiectasia", "Normal clean mucosa", "Pylorus", "Reduced mucosal view", "Ulcer")}


def kvasir_capsule(source, files, options):
    """CLASS/VIDEO_FRAME.jpg: runs of consecutive frames of one class in one video are clips (Appendix C).

    DEVIATION: the paper reports 344 clips; its rule as written, at least 16 frames, gives 261 on the 11 larger classes.
    """
    frames = defaultdict(dict)  # some frames are in two classes: the class is part of the key
    for path in files:
        label = KVASIR_CLASSES.get(re.sub("[^a-z]", "", os.path.basename(os.path.dirname(path)).lower()))
        name = re.fullmatch(r"([0-9a-f]+)_(\d+)\.(jpg|png)", os.path.basename(path))
        if label and name:
            frames[label, name[1]][int(name[2])] = path
    if not frames and any(path.endswith(".tar.gz") for path in files):
        raise UserError(f"{source}: holds packed *.tar.gz; unpack each of them in its place first")
    for (label, video), numbered in sorted(frames.items()):
        numbers = np.array(sorted(numbered))
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > options.max_gap) + 1):
            paths = [numbered[number] for number in run.tolist()]
            if len(paths) < options.min_run:
                reason = f"in a run of {len(paths)} frames, a clip needs {options.min_run}"
                yield from ((path, reason) for path in paths)
            else:
                yield Job(paths[0], paths, "clip", "endoscopy", (label,), video, "test")


# DEVIATION: the paper's 13 categories come from a language model, unpublished; ours hold as many of its videos, 364.
HYPER_KVASIR = {finding: category for category, findings in {
    "polyps": "polyps", "dyed lifted polyps": "dyed lifted polyps", "dyed resection margins": "dyed resection margins",
    "BBPS 0-1": "bbps 0-1", "BBPS 2-3": "bbps 2-3", "ulcer": "ulcer", "colitis": "colitis",
    "polypectomy": "snare resection/clip placement", "cancer": "cancer/cancer, colorectal",
    "anastomosis": "anastomosis/cavity of anastomotic leak", "stent": "self-expanding stent",
    "landmark": "cecum/pylorus/retroflex stomach/z-line",
    "other pathology": "barrett's oesophagus/esophagitis/varices/gave/parasites/hemorrhoids"}.items()
    for finding in findings.split("/")}


def hyper_kvasir(source, files, options):
    """labeled-videos/**/UUID.avi; category by Finding 1 of video-labels.csv, none where no category fits."""
    rows = {row["Video file"]: row for row in table(Path(source, named(files, r"video-labels\.csv")[0]))}
    for path in files:
        if path.lower().endswith(SUFFIXES["video"]):
            finding = rows.get(Path(path).stem, {}).get("Finding 1", "").lower()
            label = (HYPER_KVASIR[finding],) if finding in HYPER_KVASIR else ()
            yield Job(path, [path], "video", "endoscopy", label, "", "test") if finding else (
                path, "not in the data set's table")


SCAN = re.compile(r"((train|valid)_\d+)_([a-z]+)_(\d+)\.nii\.gz")  # 1 patient, 2 split, 3 scan, 4 reconstruction


def ct_rate(source, files, options):
    """(train|valid)[_fixed]/**/*.nii.gz: one reconstruction of each scan, 18 abnormalities as finding:NAME labels.

    Volumes of *_fixed hold HU under a true header; scale and spacing of the others are in the metadata tables;
    RadGenome's *_preprocessed are HU at 1 x 1 x 3 mm. The last two lie as LPS under a blank header.
    """
    tables = [os.path.join(source, path) for path in files]
    if options.labels:
        tables += [os.path.join(options.labels, path) for path in walk(options.labels)[0]]
    labels = chest_labels(tables, options.dataset)
    absent = {line.strip().split("/")[-1].removesuffix(".nii.gz") for path in tables
              if re.search(r"no_chest_\w+\.txt$", path) for line in Path(path).read_text().splitlines()}
    volumes = sorted((not re.search("_fixed|_preprocessed", path), int(match[4]), match[1], match[3], path)
                     for path in files if (match := SCAN.fullmatch(os.path.basename(path))))
    metadata = {}
    if any(original for original, *_ in volumes):
        paths = named(tables, r"(train|validation)_metadata\.csv")
        metadata = {row["VolumeName"]: row for path in paths for row in table(path)}
    seen = set()
    for original, _, patient, scan, path in volumes:
        name = os.path.basename(path)
        row, blank = metadata.get(name, {}), {"spacing": (1.0, 1.0, 3.0)} if "_preprocessed" in path else {}
        if original and row.get("XYSpacing") and row.get("ZSpacing") and row.get("RescaleSlope"):
            xy = [float(number) for number in re.findall(r"[\d.]+", row["XYSpacing"])]
            blank = {"spacing": (xy[0], xy[-1], float(row["ZSpacing"])),
                     "scale": (float(row["RescaleSlope"]), float(row["RescaleIntercept"]))}
        if name.removesuffix(".nii.gz") in absent:
            yield path, "no chest CT (no_chest list)"
        elif (patient, scan) in seen:
            yield path, "another reconstruction of a kept scan"
        elif original and not blank:
            yield path, "no spacing or rescale in the metadata table"
        else:
            seen.add((patient, scan))
            yield Job(path, [path], "nifti", "ct", tuple(labels.get(name.removesuffix(".nii.gz"), ())), patient,
                      "train" if name.startswith("train") else "test", blank=blank)


def chest_labels(tables, dataset):
    """{volume: labels} by the tables of CT-RATE and, for radgenome, of RadGenome-ChestCT: finding:, status:, size:."""
    labels = defaultdict(list)
    for path in named(tables, r"\w*predicted_labels\.csv", needed=dataset != "radgenome"):
        for row in table(path):
            labels[row.pop("VolumeName").removesuffix(".nii.gz")] += [
                f"finding:{name}" for name, value in row.items() if value and float(value) > 0]
    if dataset != "radgenome":
        return {volume: dict.fromkeys(names) for volume, names in labels.items()}
    status = {}
    for path in named(tables, r"(train|validation)_vqa_abnormality\.csv"):
        for row in table(path):
            region = row["Volumename"].removesuffix(".nii.gz"), row["Anatomy"].split("/")[0]
            status[region] = status.get(region, False) or row["Abnormality"].lower() != "no findings"
    for (volume, region), abnormal in status.items():
        labels[volume].append(f"status:{region}:{'abnormal' if abnormal else 'normal'}")
    for path in named(tables, r"(train|validation)_vqa_size\.csv"):
        for row in table(path):
            size = re.match(r"[\d.]+(?:\s*[x-]\s*[\d.]+)*\s*(mm|cm)", row["Size"])  # "170 in" is an image number
            if size:
                mm = max(map(float, re.findall(r"\d+\.?\d*", size[0]))) * {"mm": 1, "cm": 10}[size[1]]
                labels[row["Volumename"].removesuffix(".nii.gz")].append(
                    f"size:{row['Anatomy'].split('/')[0]}:{row['Abnormality'].replace('|', '/')}:{mm:g}")
    return {volume: dict.fromkeys(names) for volume, names in labels.items()}


# scanner, what the paper counts, how many of them
DATASETS = {
    "demo": (any_folder, None, ""), "folder": (any_folder, None, ""),
    "chestxray14": (chestxray14, lambda job: job.split == "test" and len(job.labels) == 1, "7,992 (one finding, test)"),
    "fetal_planes": (fetal_planes, lambda job: job.labels != ("Other",), "8,188 images of 5 planes"),
    "kvasir_capsule": (kvasir_capsule, lambda job: True, "344 clips"),
    "hyper_kvasir": (hyper_kvasir, lambda job: job.labels, "364 videos with a category"),
    "ct_rate": (ct_rate, lambda job: job.split == "test", "1,564 test volumes (and 24,123 for training)"),
    "radgenome": (ct_rate, lambda job: True, "25,687 volumes")}


# ---- the run: what is missing is made, then the tables are written ---------------------------------------------------
def pseudonym(key, text):
    """16 hex digits of HMAC-SHA256, "" of nothing."""
    return hmac.new(key, os.fsencode(text), hashlib.sha256).hexdigest()[:16] if text else ""


def read_key(path):
    """The bytes of a key file, made with random ones if it does not exist; the public key if none is named."""
    if not path:
        return PUBLIC_KEY
    if not os.path.exists(path):
        with atomic_write(path, 0o600) as file:
            file.write(secrets.token_hex(32).encode())
        print(f"made the new key {path}: keep it, and keep it apart from the cache")
    key = Path(path).read_bytes().strip()
    if len(key) < 16:
        raise UserError(f"{path}: a key needs at least 16 bytes; name a file that does not exist to have one made")
    return key


def read_journals(folder):
    """{id: record} of all shards' journals, for arrays that are there; the torn last line of a killed run is none."""
    records, here = {}, {entry.name for entry in os.scandir(folder)}
    for path in sorted(Path(folder).glob(".journal-*")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                name, made = record["id"], "shape" in record
                if made and f"{name}.npy" in here or not made and "shape" not in records.get(name, {}):
                    records[name] = record
    return records


def write_csv(path, header, rows, mode=0o666):
    with atomic_write(path, mode) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="", write_through=True)
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        text.detach()


def name_slice(reason, job):
    """The reason with the file name of slice {number}, which the journal must not hold."""
    return re.sub(r"\{(\d+)\}", lambda match: os.path.basename(job.files[int(match[1])]), reason)


def write_tables(folder, jobs, refused):
    """samples.csv, sources.csv and rejected.csv from the journals, in an order that depends on the sources alone.

    Another shard may end meanwhile and replace its journal: then this is done again.
    """
    def finished():
        return {path.name: path.stat().st_ino for path in folder.glob(".journal-*")}

    before = None
    while before != finished():
        before, records = finished(), read_journals(folder)
        kept = sorted((job for job in jobs if "shape" in records.get(job.id, {})), key=lambda job: job.id)
        lost = {(path, name_slice(records[job.id]["refused"], job))
                for job in jobs if "refused" in records.get(job.id, {}) for path in job.files}
        rejected = sorted({*refused, *lost})
        write_csv(folder / "samples.csv", ("id", "modality", "labels", "patient", "split", "shape"),
                  [(job.id, job.modality, "|".join(job.labels), job.patient, job.split, records[job.id]["shape"])
                   for job in kept])
        write_csv(folder / "sources.csv", ("id", "path"), [(job.id, job.path) for job in kept], 0o600)
        write_csv(folder / "rejected.csv", ("path", "reason"), rejected, 0o600)
    return kept, rejected, Counter(note for job in kept for note in records[job.id]["notes"])


def check_recipe(folder, dataset, recipe, key):
    """One cache, one data set, recipe and key: different shapes, or ids of different keys, are never mixed."""
    path = folder / "recipe.json"
    wanted = {**recipe, "version": VERSION, "dataset": dataset, "key": pseudonym(key, "which key")}
    if not path.exists():
        with atomic_write(path) as file:
            file.write(json.dumps(wanted).encode())
    try:
        made = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged; choose another --name, or delete {folder} and start again") from error
    if made != wanted:
        differs = ", ".join(f"{name} {made.get(name)}" for name in wanted if made.get(name) != wanted[name])
        raise UserError(f"{folder} was made with {differs}; give the same options and key, or another --name")


def batches_of(jobs):
    """Small files share a child (a fork costs as much as a small image), anything else has its own."""
    batches = []
    for job in jobs:
        small = job.kind in ("image", "dicom")
        if batches and small and batches[-1][0].kind == job.kind and len(batches[-1]) < 32:
            batches[-1].append(job)
        else:
            batches.append([job])
    return batches


def size_and_time(job, source):
    """Bytes of a job's files and the time the last of them changed; (0, 0) if one is gone."""
    try:
        infos = [os.stat(os.path.join(source, path)) for path in job.files]
    except OSError:
        return 0, 0
    return sum(info.st_size for info in infos), max(info.st_mtime_ns for info in infos)


def run(source, folder, jobs, recipe, options):
    """Make the arrays this shard lacks; each is written, then journalled: a kill loses only what was in work."""
    part, parts = options.shard
    mine = {job.id: job for job in jobs if int(job.id, 16) % parts == part % parts}
    about, path = {}, folder / f".journal-{part % parts}-of-{parts}.jsonl"
    with open(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600), "ab", buffering=0) as journal:
        fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        records, todo = read_journals(folder), []
        for job in mine.values():
            about[job.id] = size, changed = size_and_time(job, source)
            record = records.get(job.id, {})
            if record.get("bytes") != size or os.stat(folder / f"{job.id}.npy").st_mtime_ns < changed < time.time_ns():
                todo.append(job)  # not yet made, or the source is newer
        answers = guarded(lambda job: cache_sample(job, source, folder, *recipe.values()), batches_of(todo),
                          options.workers, lambda job: SECONDS + about[job.id][0] // 1_000_000)
        bar, refused = tqdm(answers, total=len(todo), unit="sample", desc=folder.name, disable=not todo), 0
        for job, answer in bar:
            refused += "refused" in answer
            bar.set_postfix(refused=refused, refresh=False)
            if "ok" in answer:
                records[job.id] = {"id": job.id, "bytes": about[job.id][0], **answer["ok"]}
            else:
                records[job.id] = {"id": job.id, **answer}
                (folder / f"{job.id}.npy").unlink(missing_ok=True)
            journal.write(b"\n" + json.dumps(records[job.id]).encode())
        for leftover in folder.glob(".*.npy.*.tmp"):  # of a killed child
            if leftover.name.split(".")[1] in mine:
                leftover.unlink(missing_ok=True)
        with atomic_write(path, 0o600) as file:  # the same bytes however often the run was interrupted
            file.writelines(json.dumps(records[name]).encode() + b"\n" for name in sorted(set(mine) & set(records)))


def verify(folder):
    """Compare every array with its checksum in the journal; damaged ones are removed, the next run makes them again."""
    read_samples(folder)
    records = {name: record for name, record in read_journals(folder).items() if "shape" in record}
    damaged = [path for path in (folder / f"{name}.npy" for name in records)
               if zlib.crc32(path.read_bytes()) != records[path.stem]["crc"]]
    for path in damaged:
        print(f"{path}: damaged, removed")
        path.unlink()
    lost = sum(not (folder / f"{row['id']}.npy").exists() or row["id"] not in records for row in read_samples(folder))
    if lost:
        raise UserError(f"{folder}: {len(damaged)} arrays damaged, {lost} to make again: run prepare.py as before")
    print(f"{folder}: {len(records)} arrays, all whole")


# ---- reading the cache ----------------------------------------------------------------------------------------------
def read_samples(folder):
    """Rows of folder/samples.csv as dicts: id, modality, labels (tuple), patient, split, shape (4 ints), folder."""
    path = Path(folder) / "samples.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make the cache with prepare.py first")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row | {"labels": tuple(filter(None, row["labels"].split("|"))), "folder": str(folder),
                           "shape": tuple(map(int, row["shape"].split("x")))} for row in csv.DictReader(file)]
    except (KeyError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path}: no table of this program, or damaged; run prepare.py again") from error
    if not rows:
        raise UserError(f"{path}: holds no samples; run prepare.py on a folder with images")
    return rows


def load_sample(folder, row):
    """The cached array (C, H, W, S), uint8 or float16, of a row of read_samples."""
    path = Path(folder) / f"{row['id']}.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or damaged; run prepare.py with --verify, then without") from error
    if array.shape != tuple(row["shape"]) or array.dtype not in (np.uint8, np.float16):
        raise UserError(f"{path}: {array.dtype} {array.shape} is not what samples.csv says; run prepare.py --verify")
    return array


class CachedDataset(Dataset):
    """Rows of read_samples, of any folders, as tensors (C, H, W, S), uint8 or float16 as stored."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.from_numpy(load_sample(self.rows[index]["folder"], self.rows[index]))  # (C, H, W, S)


def read_any(path, modality=None, likely=None, size=256, slices=64, frames=16):
    """(modality, array (C, H, W, S)) of one file or one series folder, through the readers and guards of the cache.

    Where neither `modality` nor a DICOM tag says it, a video is endoscopy, a NIfTI file CT, another image an X-ray.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    source, only = (path, None) if os.path.isdir(path) else os.path.split(path)
    options = argparse.Namespace(modality=modality, labels=None, workers=1, allow_2d=bool(only),
                                 guess={"video": "endoscopy", "nifti": "ct", "image": "xray"})
    files, left_out = ([only], []) if only else walk(source)
    found = left_out + any_folder(source, files, options)
    jobs = [job for job in found if isinstance(job, Job)]
    if len(jobs) != 1:
        reason = f"holds {len(jobs)} samples, name one of them" if jobs else min(found, default=("", "is empty"))[1]
        raise UserError(f"{path}: {reason}")
    job = replace(jobs[0], id=pseudonym(PUBLIC_KEY, os.path.basename(path)))
    with tempfile.TemporaryDirectory() as folder:
        task = lambda job: cache_sample(job, source, folder, size, slices, frames)
        _, answer = next(guarded(task, [[job]], 1, lambda job: 10 * SECONDS))
        if "refused" in answer:
            raise UserError(f"{path}: {name_slice(answer['refused'], job)}")
        return job.modality, np.load(os.path.join(folder, f"{job.id}.npy"), allow_pickle=False)


# ---- command line ---------------------------------------------------------------------------------------------------
def shard(text):
    part, parts = map(int, text.split("/"))
    if not 0 <= part <= parts or parts < 1:
        raise ValueError
    return part, parts


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=DATASETS)
    add("source", nargs="?", help="folder that holds the data (demo: where to write them, default ./demo)")
    add("--out", default="cache", help="folder of the caches (default cache)")
    add("--name", help="name of this cache (default: the data set's)")
    add("--modality", choices=MODALITIES, help="folder: what the files are; DICOM says it itself, other formats do not")
    add("--labels", help="folder: labels.csv with path, labels (joined by |), and if wanted patient, split, modality; "
        "ct_rate, radgenome: folder of the tables, if they lie apart from the volumes")
    add("--key-file", help="secret key of the ids, made if absent; give one for patients' data")
    add("--allow-2d", action="store_true", help="keep single CT and MR slices as images")
    add("--size", type=positive, default=256, help="longer side in pixels (paper: 256)")
    add("--slices", type=positive, default=64, help="slices of a volume (paper: 64)")
    add("--frames", type=positive, default=16, help="frames of a video (paper: 16); 64 lets training draw 16 afresh")
    add("--min-run", type=positive, default=16, help="kvasir_capsule: least frames of a clip")
    add("--max-gap", type=positive, default=1, help="kvasir_capsule: largest step between frames of a clip")
    add("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    add("--shard", type=shard, default=(0, 1), help="i/n: part i of n, counted from 0 or from 1; one --out for all")
    add("--verify", action="store_true", help="only check the arrays of this cache; damaged ones are removed")
    return parser.parse_args()


def main():
    options = parse_arguments()
    options.guess, tqdm.monitor_interval = {}, 0  # no thread beside the forks
    folder = Path(options.out, options.name or options.dataset)
    if options.verify:
        return verify(folder)  # needs no source
    source = options.source or ("demo" if options.dataset == "demo" else "")
    if options.dataset == "demo":  # phantoms, written as real files and then read like any others
        options.labels = os.path.join(source, "labels.csv")
        if not os.path.exists(options.labels):
            from tests.phantoms import write_demo
            write_demo(Path(source))
    if not os.path.isdir(source):
        raise UserError(f"{source or 'SOURCE'}: no such folder; give the folder that holds the data")
    scan, counts, paper = DATASETS[options.dataset]
    key = read_key(options.key_file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({os.strerror(error.errno)}); choose another --out") from error
    recipe = {"size": options.size, "slices": options.slices, "frames": options.frames}
    check_recipe(folder, options.dataset, recipe, key)
    files, left_out = walk(source)
    try:
        found = left_out + list(scan(source, files, options))
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: not laid out as {options.dataset} is published ({error!r})") from error
    jobs, refused = [job for job in found if isinstance(job, Job)], {row for row in found if not isinstance(row, Job)}
    if counts:
        print(f"found {sum(map(bool, map(counts, jobs)))}, paper {paper}")
    if not found:
        raise UserError(f"{source}: holds no files; give the folder that holds the data")
    if options.dataset == "folder" and not options.key_file:
        print("note: ids are made with the public key, so that anyone can test a guess; patients' data need --key-file")
    for job in jobs:
        job.id, job.patient = pseudonym(key, job.key or job.path), pseudonym(key, job.patient)
    try:
        run(source, folder, jobs, recipe, options)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another prepare.py is at work here; wait for it or use --shard") from error
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}); free space or choose another --out") from error
    kept, rejected, notes = write_tables(folder, jobs, refused)
    for note, count in sorted(notes.items()):
        print(f"note: {count} samples: {note}")
    print(f"{folder}: {len(kept)} samples; {len(rejected)} files left out" + ", see rejected.csv" * bool(rejected))
    if not kept:
        reason = Counter(reason for _, reason in rejected).most_common(1)[0][0]
        raise UserError(f"nothing in {source} could be read (mostly: {reason}); see {folder / 'rejected.csv'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command goes on from here")
