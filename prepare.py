"""Turn medical images and public data sets into a cache of small arrays (paper Sec. 3.1, 3.4).

In:  any folder of DICOM, NIfTI, PNG, JPEG, TIFF, GIF, AVI, MP4, MOV files, or a public data set.
Out: cache/NAME/ID.npy, (C, H, W, S): image (1 or 3, 256, 256, 1), video (3, 256, 256, 64), volume
     (1, 256, 256, 64); uint8 (value / 255) from 8-bit sources, else float16 in [0, 1].
     samples.csv says what each is, sources.csv where it came from, rejected.csv what was left out
     and why. Only the last two name files.
Volumes: H runs from front to back, W from the patient's right (image left) to left, S from feet up.

    python prepare.py folder /data/mr --name my_mr --modality mri --labels labels.csv

A sample is done when its .npy exists. The same command again makes what is missing or has changed.

The sections, in the order in which a file passes through them:

    errors and records   what can go wrong, and what one section hands to the next
    DICOM headers        what a DICOM file is, and which files are one volume
    find samples         all files of a folder -> samples
    public data sets     the same for the data sets of the paper, by their own tables
    read one file        images, videos, NIfTI; then DICOM: the pixels of a sample
    arrays               pixels of any size and depth -> (C, H, W, S) in [0, 1]
    workers              all of this in child processes, which may crash or hang
    the cache            ids, tables, and how the other programs read them
    command line         arguments, and main, which calls the others
"""
import csv
import dataclasses
import gc
import gzip
import hashlib
import hmac
import io
import json
import math
import multiprocessing.connection
import os
import random
import re
import resource
import secrets
import signal
import stat
import sys
import tempfile
import time
import unicodedata
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from torch.utils.data import Dataset
from tqdm import tqdm

# To add a modality, append its name here; if DICOM headers say it, also to DICOM_MODALITIES and, if
# its files are slices, to VOLUME_MODALITIES. Its volumes, and its images of more than 8 bits, are
# stretched by percentiles.
MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
ABOUT_MODALITIES = (f"one of {', '.join(MODALITIES)}; for another add the word to MODALITIES "
                    "in prepare.py")
DICOM_MODALITIES = {
    "CR": "xray", "DX": "xray", "DR": "xray", "RG": "xray", "MG": "xray", "RF": "xray",
    "XA": "xray", "PX": "xray", "IO": "xray", "US": "ultrasound", "IVUS": "ultrasound",
    "ES": "endoscopy", "CT": "ct", "MR": "mri"}
# DICOM files of these modalities are slices of a series, not images of their own.
VOLUME_MODALITIES = ("ct", "mri")
SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}

# Pixels and slices are those of Sec. 3.4. CHOICE: 64 frames of a video, of which training draws 16
# (Sec. 3.1), others each time.
SIZES = {"size": 256, "slices": 64, "frames": 64}
DEMO_SIZES = {"size": 32, "slices": 4, "frames": 4}
HU_RANGE = (-1000.0, 1000.0)  # Sec. 3.4
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# CHOICE: fewer slices than this are no volume.
MIN_SLICES = 8
# A run of fewer frames is no clip of Kvasir-Capsule (Appendix C).
MIN_RUN = 16

# What one sample may take of the machine, so that a broken file cannot hold up the run.
SECONDS = 60  # of processor time, and one more for each MB of its files
PATIENCE = 10  # times as long on the clock: a busy machine is no fault of the file
MEMORY = 6 * 2**30  # bytes, beyond those of the parent process
PIXELS = 50_000_000  # of one image
# Decoders leak memory: after this many samples a child process ends, and a new one takes its place.
SAMPLES_PER_WORKER = 1000

# The ids of public data are made with this key, and depend on the path below SOURCE alone.
PUBLIC_KEY = b"M3Ret public data"
# Raise this number when the pixels of a cached sample change.
VERSION = 4
# An .avi can be a script that makes the decoder open other files: only real containers are opened.
VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,asf,h264,hevc",
                 "protocol_whitelist": "file,pipe"}
UNKNOWN_FILE = "not a DICOM, NIfTI, image or video file"
BURNED_IN = "may show names or dates in its pixels (BurnedInAnnotation is not NO)"


# ---- errors and records --------------------------------------------------------------------------
class UserError(Exception):
    """What a user can cause and mend: one line naming the file and the remedy."""


class Rejected(Exception):
    """Why one file is left out: a reason, which never quotes the file, and a detail, which may.

    Both go to rejected.csv, which is for the owner alone; only the reason goes to the screen.
    """

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self):
        if self.detail:
            return f"{self.reason}: {self.detail}"
        return self.reason


@dataclass
class Sample:
    """One future sample of the cache."""
    files: list  # paths below the source: one file, or those of a series or of a clip
    kind: str  # image, video, nifti, dicom, series or clip: which reader opens it
    modality: str = ""  # one of MODALITIES, "" if nobody says it
    labels: tuple = ()
    patient: str = ""
    split: str = ""
    key: str = ""  # what the id is made of, where it is not the path of the first file
    id: str = ""
    slices: list = field(default_factory=list)  # of a series: the Slice records of its volume


class Frames(NamedTuple):
    """What a reader of images and videos gives."""
    planes: list  # (h, w) or (h, w, 3) each, uint8 or float32 in [0, 1]
    high_bit_depth: bool = False  # deeper than 8 bits: the cache keeps float16
    spacing: tuple = (1.0, 1.0)  # from row to row, from column to column; only their ratio counts
    notes: tuple = ()  # sentences for sources.csv, which never quote the file


class Volume(NamedTuple):
    """What a reader of volumes gives; voxels * slope + intercept are values in the file's unit."""
    voxels: np.ndarray  # (i, j, k) as stored
    affine: np.ndarray  # (4, 4) from (i, j, k) to RAS+ mm
    slope: float = 1.0
    intercept: float = 0.0
    hounsfield: object = None  # True or False by the header, None: the values decide
    notes: tuple = ()


def cli(main):
    """Run main(). What a user can cause ends as one line on stderr and exit code 1."""
    try:
        return main()
    except (UserError, OSError) as error:
        # torch hands on an error of a loader process as the text of its traceback. The last line
        # of that is what the error says.
        last_line = str(error).strip().split("\n")[-1]
        message = last_line.removeprefix("prepare.UserError: ")
    except torch.OutOfMemoryError:
        message = "out of GPU memory; train.py takes a smaller --batch-size"
    except KeyboardInterrupt:
        message = "interrupted; prepare.py and train.py go on from here, the same command again"

    # Inside the except block the traceback would keep the progress bar alive, in the middle of its
    # line. Here it has ended.
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


@contextmanager
def atomic_write(path, mode=0o666):
    """Yield a binary file that replaces `path` if the block ends well; UserError if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

        # The bytes are on the disk, so that the name can only lead to a whole file.
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}); free some space or choose another folder"
                        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # it is there if something failed


# ---- DICOM headers: what a file is, and which files are one volume -------------------------------
# Coarse parts of the body, by the defined terms of BodyPartExamined (PS3.16 annex L) and the short
# forms that people write.
BODY_PARTS = {
    "head": ("HEAD", "BRAIN", "SKULL", "FACE", "ORBIT", "JAW", "MAXILLA", "NOSE", "EAR", "EYE",
             "IAC", "TMJ", "CEREBELLUM", "CIRCLEOFWILLIS", "SINUS"),
    "neck": ("NECK", "LARYNX", "PHARYNX", "THYROID", "CAROTID", "PAROTID"),
    "chest": ("CHEST", "LUNG", "MEDIASTINUM", "BRONCHUS", "TRACHEA", "RIB", "STERNUM", "ESOPHAGUS",
              "THORAX", "CHES", "CHST", "CXR", "CAP", "TAP"),
    "heart": ("HEART", "CORONARYARTERY", "AORTA", "CARDIAC"),
    "breast": ("BREAST",),
    "abdomen": ("ABDOMEN", "LIVER", "KIDNEY", "PANCREAS", "SPLEEN", "STOMACH", "COLON",
                "GALLBLADDER", "ADRENAL", "BILEDUCT", "DUODENUM", "JEJUNUM", "ILEUM", "ABD",
                "ABDO", "AB", "KUB", "CAP", "TAP"),
    "pelvis": ("PELVIS", "BLADDER", "PROSTATE", "RECTUM", "UTERUS", "OVARY", "CERVIX", "SCROTUM",
               "ILIUM", "COCCYX", "PELV", "PEL", "CAP", "TAP"),
    "spine": ("SPINE", "BACK"),
    "cspine": ("CSPINE", "CERVICALSPINE", "CERVICAL"),
    "tspine": ("TSPINE", "TLSPINE", "THORACICSPINE"),
    "lspine": ("LSPINE", "LSSPINE", "SSPINE", "LUMBARSPINE", "LUMBOSACRAL"),
    "shoulder": ("SHOULDER", "SCAPULA", "AXILLA", "CLAVICLE"),
    "upper arm": ("HUMERUS", "ARM"),
    "elbow": ("ELBOW",),
    "forearm": ("RADIUS", "ULNA", "RADIUSULNA", "FOREARM"),
    "wrist": ("WRIST",),
    "hand": ("HAND", "FINGER", "THUMB"),
    "hip": ("HIP",),
    "thigh": ("FEMUR", "THIGH"),
    "knee": ("KNEE", "PATELLA"),
    "lower leg": ("LEG", "TIBIA", "TIBIAFIBULA", "CALF"),
    "ankle": ("ANKLE",),
    "foot": ("FOOT", "TOE", "CALCANEUS"),
}
# Words that may stand beside these and name no part.
FILLER_WORDS = ("AND", "TO", "AP", "PA", "LAT", "LATERAL", "LEFT", "RIGHT", "PORT", "PORTABLE",
                "CT", "MR", "XR", "CTA", "WITHOUT", "WITH", "CONTRAST")
PARTS_OF_WORD = {word: [] for word in FILLER_WORDS}  # {word: parts}
for part, words in BODY_PARTS.items():
    for word in words:
        PARTS_OF_WORD.setdefault(word, []).append(part)
LONGEST_FIRST = sorted(PARTS_OF_WORD, key=len, reverse=True)

# What may differ between two passes over the same places: what sort of picture a slice is (echoes,
# b-values, phases, kernels), then the number of its acquisition, then the time.
PASS_TAGS = (
    "EchoTime", "EffectiveEchoTime", "DiffusionBValue", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "TriggerTime", "NominalCardiacTriggerDelayTime", "ConvolutionKernel",
    "ImageType", "FrameType", "ComplexImageComponent",
    "AcquisitionNumber", "AcquisitionTime", "ContentTime")
ACQUISITION_NUMBER = PASS_TAGS.index("AcquisitionNumber")
DIRECTION_TOLERANCE = 0.01  # of the numbers of unit vectors: half a degree
SPACING_TOLERANCE = 0.01  # a hundredth of it
PLACE_TOLERANCE = 0.02  # mm along the normal
ANOTHER_PASS = "another echo, b-value, phase or time of a kept series"
NOT_TOLD_APART = "no tag tells it from a kept slice of its place: a copy, or another pass"
NO_GEOMETRY = "no ImageOrientationPatient, PixelSpacing or ImagePositionPatient"
# What a value that is not as the standard wants it can raise.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, OverflowError)


class Slice(NamedTuple):
    """What the header says of one plane of a volume; of an enhanced file, of one of its frames."""
    file: str  # path below the source
    frame: int
    uid: str  # SOPInstanceUID of the file
    size: tuple  # rows, columns
    direction: tuple  # (6,) unit vectors along a row and along a column; () if it is not told
    spacing: tuple  # (2,) mm from row to row, from column to column
    position: tuple  # (3,) mm, the centre of the first pixel
    number: int  # InstanceNumber, if there is one, plus the frame
    values: tuple  # of PASS_TAGS, as text


def split_words(text):
    """Letters without spaces -> the known words that they are made of; None if they are not.

    Of several ways the one with the longest words first is taken: CTABDOMEN is CT ABDOMEN, since
    after CTA comes no word.
    """
    if not text:
        return []
    for word in LONGEST_FIRST:
        if text.startswith(word):
            rest = split_words(text[len(word):])
            if rest is not None:
                return [word, *rest]
    return None


def body_parts(*texts):
    """Coarse parts named by the first of the texts that consists of known words only."""
    for text in texts:
        # Words may be joined or apart, by whatever sign.
        letters = re.sub("[^A-Z0-9]+", "", str(text or "").upper())  # CHEST/ABD as CHESTABD
        parts = []
        for word in split_words(letters[:64]) or []:
            parts += PARTS_OF_WORD[word]
        if parts:
            return tuple(part for part in BODY_PARTS if part in parts)
    return ()


def open_dicom(path, notes, **options):
    """pydicom.dcmread for files of any origin, those without a preamble included."""
    with open(path, "rb") as file:
        head = file.read(132)
    has_preamble = head[128:] == b"DICM"
    begins_as_dataset = head[:2] in (b"\x08\0", b"\2\0")  # with group 8 or 2
    if not has_preamble and not begins_as_dataset:
        raise Rejected(UNKNOWN_FILE)

    ds = pydicom.dcmread(path, force=not has_preamble, **options)
    if not has_preamble and "TransferSyntaxUID" not in ds.file_meta:
        is_implicit, _ = ds.original_encoding
        syntax = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = syntax

    # Where nothing is said, these modalities often have text in the picture.
    burned_in = ds.get("BurnedInAnnotation")
    if not burned_in:
        burned_in = "YES" if ds.get("Modality") in ("US", "SC", "XA", "ES") else "NO"
    if burned_in != "NO":
        notes.add(BURNED_IN)
    return ds


def functional_groups(ds, frame):
    """What an enhanced file says of one frame, and of all: data sets, the frame's own first.

    It keeps them in sequences of sequences (PS3.3 C.7.6.16). Other files have none.
    """
    items = [*ds.get("PerFrameFunctionalGroupsSequence", [])[frame:frame + 1],
             *ds.get("SharedFunctionalGroupsSequence", [])]
    groups = []
    for item in items:
        for macro in item:
            if macro.VR == "SQ":
                groups += macro.value
    return groups


def value_of(ds, tag):
    """The value of a tag; None if there is none or it is empty. Malformed numbers come as text."""
    try:
        value = ds.get(tag)
    except MALFORMED:
        raw = ds.get_item(tag).value  # bytes of the file
        value = bytes(raw).decode("latin-1")
    return None if value == "" else value


def first_value(datasets, tag, default=None):
    """The value of a tag in the first data set that has one."""
    for ds in datasets:
        value = value_of(ds, tag)
        if value is not None:
            return value
    return default


def per_frame(ds, frame, tag, default=None):
    """A value of one frame: of its functional groups, else of the file."""
    return first_value([*functional_groups(ds, frame), ds], tag, default)


def numbers_of(value):
    """A DICOM value of one or more numbers -> a tuple of finite floats, () if it is none.

    A decimal comma is read as a point: some programs write numbers as their country does.
    """
    if isinstance(value, str):
        value = value.split("\\")
    numbers = []
    try:
        for number in np.atleast_1d(value):
            numbers.append(float(str(number).replace(",", ".")))
    except ValueError:
        return ()
    if not np.isfinite(numbers).all():
        return ()
    return tuple(numbers)


def slice_of(ds, path, frame):
    """The header of one frame of a file as a Slice."""
    places = [*functional_groups(ds, frame), ds]  # where its values can stand
    number = numbers_of(value_of(ds, "InstanceNumber"))
    values = []
    for tag in PASS_TAGS:
        values.append(str(first_value(places, tag, "")))
    return Slice(
        file=path,
        frame=frame,
        uid=str(ds.get("SOPInstanceUID", "")),
        size=(int(ds.Rows), int(ds.Columns)),
        direction=numbers_of(first_value(places, "ImageOrientationPatient")),
        spacing=numbers_of(first_value(places, "PixelSpacing")),
        position=numbers_of(first_value(places, "ImagePositionPatient")),
        number=int(number[0]) + frame if number else frame,
        values=tuple(values),
    )


def why_no_image(ds):
    """Why a header is of no image that can be decoded, as Rejected; None if it is of one."""
    if not ds.get("Rows") or not ds.get("Columns") or ds.get("Modality") in ("SEG", "RTDOSE"):
        sop_class = pydicom.uid.UID(ds.get("SOPClassUID", ""))
        if sop_class.name == sop_class:  # the standard knows no such class
            return Rejected("no image", sop_class)
        return Rejected(f"no image ({sop_class.name})")
    if not ds.get("BitsStored"):
        return Rejected("no BitsStored: floating-point pixels, or a damaged header")
    if ds.get("HighBit", ds.BitsStored - 1) != ds.BitsStored - 1:
        return Rejected("HighBit is not BitsStored - 1")
    return None


def read_header(source, path, modality, allow_2d):
    """The sample of one DICOM file by its header: an image or a video, or the slices of CT and MR.

    modality is what the user says, or "". Slices go to group_series. Rejected: what is no image.
    """
    ds = open_dicom(os.path.join(source, path), set(), stop_before_pixels=True)
    problem = why_no_image(ds)
    if problem:
        raise problem

    modality = modality or DICOM_MODALITIES.get(str(ds.get("Modality")), "")
    parts = body_parts(ds.get("BodyPartExamined"), ds.get("ProtocolName"),
                       ds.get("SeriesDescription"), ds.get("StudyDescription"))
    patient = str(ds.get("PatientID") or "")
    # Body parts are the labels, unless the user gives others.
    sample = Sample([path], "dicom", modality, labels=parts, patient=patient)
    if modality not in VOLUME_MODALITIES:
        return sample

    # Files of CT and MR are slices of a volume, but for scouts and colour maps.
    series = str(ds.get("SeriesInstanceUID") or "")
    if re.search("LOCALIZER|SCOUT", str(ds.get("ImageType"))):
        raise Rejected("localizer")
    has_palette = ds.get("PhotometricInterpretation") == "PALETTE COLOR"
    if has_palette or int(ds.get("SamplesPerPixel") or 1) > 1:
        if not allow_2d:
            raise Rejected("a colour map, no grey values (--allow-2d keeps it as an image)")
        return sample
    if not series and not allow_2d:
        raise Rejected("no SeriesInstanceUID (0020,000E) (--allow-2d keeps it as an image)")

    sample.kind = "series"
    sample.key = repr((patient, series or path))
    for frame in range(int(ds.get("NumberOfFrames") or 1)):
        sample.slices.append(slice_of(ds, path, frame))
    return sample


def are_close(numbers, others, tolerances):
    """True if two tuples have as many numbers, and no two differ by more than the tolerance."""
    if len(numbers) != len(others):
        return False
    pairs = zip(numbers, others, tolerances)
    return all(abs(number - other) <= tolerance for number, other, tolerance in pairs)


def can_share_volume(one, other):
    """True if two slices are of one size, direction and spacing.

    Numbers are compared with tolerances: scanners and converters round them, slice by slice. What
    does not say where it lies is apart from what does.
    """
    if one.size != other.size or len(one.position) != len(other.position):
        return False
    if not are_close(one.direction, other.direction, [DIRECTION_TOLERANCE] * 6):
        return False
    return are_close(one.spacing, other.spacing, [SPACING_TOLERANCE * mm for mm in other.spacing])


def split_by_geometry(slices):
    """Slices of one series -> lists of those that can share a volume, the longest first."""
    groups = []
    for one in slices:
        for group in groups:
            if can_share_volume(one, group[0]):
                group.append(one)
                break
        else:
            groups.append([one])
    return sorted(groups, key=len, reverse=True)


def positions_along_normal(slices):
    """Where each slice lies along the normal of the first, (n,) mm (PS3.3 C.7.6.2.1.1)."""
    direction = slices[0].direction
    normal = np.cross(direction[:3], direction[3:])
    return np.array([one.position for one in slices]) @ normal


def group_by_place(slices):
    """Slices of one direction -> a list for each place, in order along the normal."""
    positions = positions_along_normal(slices)  # (n,) mm
    places = []
    last = None  # mm, where the last place begins
    for i in np.argsort(positions, kind="stable"):
        if last is None or positions[i] - last > PLACE_TOLERANCE:
            places.append([])
            last = positions[i]
        places[-1].append(slices[i])
    return places


def values_in_order(slices, tag):
    """The different values of a tag: numbers by size, words as their InstanceNumbers come."""
    first_number = {}  # {value: the lowest InstanceNumber}
    for one in slices:
        value = one.values[tag]
        first_number[value] = min(one.number, first_number.get(value, one.number))
    if all(len(numbers_of(value)) == 1 for value in first_number):
        return sorted(first_number, key=lambda value: numbers_of(value)[0])
    return sorted(first_number, key=lambda value: first_number[value])


def pass_by_tag(places):
    """Slices at each place -> those of the first value of a tag that is at all places.

    The tags are asked in their order. If none has such a value: None, and the most places that a
    value is at.
    """
    every_slice = [one for slices in places for one in slices]
    largest = 0
    for tag in range(len(PASS_TAGS)):
        values = values_in_order(every_slice, tag)
        if len(values) == 1:
            continue

        # A pass has a slice with its value at each place.
        for value in values:
            part = []
            for slices in places:
                part.append([one for one in slices if one.values[tag] == value])
            covered = sum(len(slices) > 0 for slices in part)
            if covered == len(places):
                return part, covered
            largest = max(largest, covered)
    return None, largest


def have_own_numbers(slices, tag):
    """True if each of the slices of one place has a number of its own for a tag."""
    values = {one.values[tag] for one in slices}
    return len(values) == len(slices) and all(len(numbers_of(value)) == 1 for value in values)


def pass_by_rank(places):
    """The first slice of each of the places, which have as many slices.

    So the n-th slice of each place is of the n-th pass. A cine gives each slice a time of its own:
    such a tag says which is the first. Else InstanceNumber does, then the time, then the name.
    """
    for tag in range(ACQUISITION_NUMBER):
        if all(have_own_numbers(slices, tag) for slices in places):
            return [min(slices, key=lambda one: numbers_of(one.values[tag])) for slices in places]
    return [min(slices, key=lambda one: (one.number, one.values[ACQUISITION_NUMBER:], one.file))
            for slices in places]


def agree_before(places, tag):
    """True if the slices of each place have the same values of PASS_TAGS[:tag]."""
    return all(len({one.values[:tag] for one in slices}) == 1 for slices in places)


def acquisitions_meet(places):
    """True if acquisitions follow each other along the body and share no place but where they meet.

    A head may be scanned in two parts, with one slice of both.
    """
    covered = {}  # {AcquisitionNumber: its places, counted from one end of the body}
    for n, slices in enumerate(places):
        for one in slices:
            covered.setdefault(one.values[ACQUISITION_NUMBER], []).append(n)

    # Each lies in one piece. n pieces have n - 1 joints; no more places than that may be shared.
    for numbers in covered.values():
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            return False
    shared = sum(len(slices) > 1 for slices in places)
    return shared < len(covered)


def choose_pass(places):
    """Slices at each place -> those of the first pass that covers all places, in order.

    Passes are told apart by what differs between the slices of one place: by a tag that has one
    value all over a pass, or by several of them, one after the other (2 echoes x 3 phases are 6
    passes), or by the rank of a slice at its place. What may be copies stays: read_series compares
    the pixels.

    Rejected if no pass covers all places: a part of a body is no volume.
    """
    if all(len(slices) == 1 for slices in places):
        return [slices[0] for slices in places]

    # As a rule a pass covers the whole body. What one tag selects may hold several passes, which
    # another tag tells apart.
    part, largest = pass_by_tag(places)
    if part:
        return choose_pass(part)
    if len({len(slices) for slices in places}) == 1:
        return pass_by_rank(places)

    # Else only some places have more than one slice: where acquisitions meet one of them is taken.
    doubled = [slices for slices in places if len(slices) > 1]
    if agree_before(doubled, ACQUISITION_NUMBER) and acquisitions_meet(places):
        return [min(slices, key=lambda one: one.number) for slices in places]

    # What differs in no tag may be a copy. At half of the places or less, times may differ too.
    compared = len(PASS_TAGS)
    if len(doubled) <= len(places) // 2:
        compared = ACQUISITION_NUMBER + 1
    if agree_before(doubled, compared):
        return [one for slices in places for one in slices]
    raise Rejected(f"no pass covers the {len(places)} places of this series, the largest {largest}")


def choose_slices(slices):
    """Slices of one series, size, direction and spacing -> those that make a volume, in order.

    Rejected: too few, or as choose_pass says.
    """
    one = slices[0]  # the others are like it
    if len(one.direction) != 6 or len(one.spacing) != 2 or len(one.position) != 3:
        raise Rejected(NO_GEOMETRY)

    places = group_by_place(slices)
    if len(places) < MIN_SLICES:
        where = ""
        if len(places) < len(slices):
            where = f" at {len(places)} places"
        if len(places) == 1 < len(slices):
            where = " at one place"
        raise Rejected(f"{len(slices)} slices{where} of this series, size and direction, "
                       f"a volume needs {MIN_SLICES}")
    return choose_pass(places)


def make_volume(slices, header_of, key, allow_2d):
    """Slices of one geometry -> samples and left_out.

    samples: one volume, if they make one; else, with allow_2d, an image for each file of one slice.
    left_out: [(path, reason)]. header_of: {file: its sample}.
    """
    # Of a file that was sent twice, under two names, one is read.
    originals = {}  # {header without the name: the first slice}
    for one in slices:
        originals.setdefault(one._replace(file=""), one)

    files = list(dict.fromkeys(one.file for one in slices))
    are_single = all(len(header_of[path].slices) == 1 for path in files)
    try:
        kept = choose_slices(list(originals.values()))
    except Rejected as error:
        if are_single and allow_2d:
            images = []
            for path in files:
                header = header_of[path]
                images.append(dataclasses.replace(header, kind="dicom", key="", slices=[]))
            return images, []
        hint = " (--allow-2d keeps each as an image)" if are_single else ""
        return [], [(path, error.reason + hint) for path in files]

    # Copies of what is read are files of the volume, too.
    read = set(kept)
    used = {one.file for one in slices if originals[one._replace(file="")] in read}
    header = header_of[min(used)]
    volume = dataclasses.replace(header, files=sorted(used), slices=kept, key=key)

    # The rest is another pass, as far as one can tell.
    like_kept = {one._replace(file="", uid="") for one in kept}
    left_out = {}  # {file: reason}
    for one in slices:
        if one.file not in used:
            is_like = one._replace(file="", uid="") in like_kept
            left_out[one.file] = NOT_TOLD_APART if is_like else ANOTHER_PASS
    return [volume], list(left_out.items())


def group_series(samples, allow_2d):
    """Samples of headers -> samples, of slices one a volume, and [(path, reason)] left out.

    Slices of one series that differ in size, direction or spacing are several volumes.
    """
    found = []
    slices_of = {}  # {series: slices}
    header_of = {}  # {file: its sample}
    for sample in sorted(samples, key=lambda sample: sample.files):
        if sample.kind == "series":
            header_of[sample.files[0]] = sample
            slices_of.setdefault(sample.key, []).extend(sample.slices)
        else:
            found.append(sample)

    left_out = []
    for series, slices in slices_of.items():
        # The id of a volume is of its series, and of its first file if there are several.
        groups = split_by_geometry(slices)
        for group in groups:
            key = series
            if len(groups) > 1:
                key = f"{series} {min(one.file for one in group)}"
            volumes, others = make_volume(group, header_of, key, allow_2d)
            found += volumes
            left_out += others

    # A file whose frames have two directions can be in one volume and out of another.
    used = {path for sample in found for path in sample.files}
    return found, [(path, reason) for path, reason in left_out if path not in used]


# ---- find samples: which files make them, and why others are left out ----------------------------
def is_cache(folder):
    """True if a folder is a cache that this program made."""
    recipe = os.path.join(folder, "recipe.json")
    return os.path.exists(recipe) and any(Path(folder).glob("*.npy"))


def why_not_entered(folder):
    """Why the files of a folder are not read, or "" if they are."""
    name = os.path.basename(folder)
    if name.startswith(".") or name == "__MACOSX":
        return "hidden, not read"
    if os.path.islink(folder):
        return "link to a folder, not followed"
    if is_cache(folder):
        return "cache of this program, not read"
    return ""


def why_not_read(path):
    """Why a file is not read, or "" if it is."""
    if os.path.basename(path).startswith("."):
        return "hidden, not read"
    try:
        status = os.stat(path)
    except OSError:  # it is a link to nowhere, or has vanished
        return "no regular file"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    if status.st_size == 0:
        return "empty file"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    return ""


def list_files(source):
    """Paths of the files below source, and {path: Rejected} of all that is not read."""
    source = os.path.join(source, "")  # it ends with a /, and what follows is the path below it
    files = []
    rejected = {}

    def unreadable(error):
        rejected[error.filename[len(source):]] = Rejected("folder cannot be read", error.strerror)

    for folder, subfolders, names in os.walk(source, onerror=unreadable):
        below = folder[len(source):]

        # os.walk goes on into those subfolders that are left in its list.
        for name in sorted(subfolders):
            reason = why_not_entered(os.path.join(folder, name))
            if reason:
                subfolders.remove(name)
                rejected[os.path.join(below, name)] = Rejected(reason)
        subfolders.sort()

        for name in sorted(names):
            reason = why_not_read(os.path.join(folder, name))
            if reason:
                rejected[os.path.join(below, name)] = Rejected(reason)
            else:
                files.append(os.path.join(below, name))
    return files, rejected


def read_table(path, remedy="download or write it again", errors="replace", columns=None):
    """[(line number, {column: cell})] of a table with commas or semicolons.

    The first row names the columns, unless `columns` does. A row may be shorter or longer than
    that. UserError, ending in the remedy, if it is no such table or has no rows.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {remedy}")
    rows = []
    try:
        text = Path(path).read_text("utf-8-sig", errors)

        # Spreadsheets write semicolons in countries where the comma is the decimal sign.
        first_line = text.partition("\n")[0]
        delimiter = ";" if first_line.count(";") > first_line.count(",") else ","

        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if columns is None:
                columns = cells
            elif any(cells):
                rows.append((reader.line_num, dict(zip(columns, cells))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); {remedy}") from error
    if not rows:
        raise UserError(f"{path}: holds no rows; {remedy}")
    return rows


def comparable(path):
    """A path as it can be compared: / for the backslash of Windows, accents as one letter (NFC).

    File systems and tables spell accents in two ways, as one letter or as a letter and an accent.
    """
    return unicodedata.normalize("NFC", os.path.normpath(path.replace("\\", "/")))


class Row(NamedTuple):
    """What a user says of a file, of a series by any of its files, or of the files in a folder."""
    labels: tuple
    split: str = ""
    patient: str = ""
    modality: str = ""
    line: int = 0  # of the table


def read_labels(path):
    """labels.csv -> {comparable path: Row}; UserError naming the line and what is wrong with it."""
    rows = {}
    for line, cells in read_table(path, errors="strict"):
        place = f"{path}, line {line}"
        if not cells.get("path") or "labels" not in cells:
            raise UserError(f"{place}: needs the columns path and labels, and a path")
        name = comparable(cells["path"])
        if name in rows:
            raise UserError(f"{place}: {name} again; one row says it all")

        split = cells.get("split", "")
        if split and split.lower() not in SPLITS:
            raise UserError(f"{place}: split {split!r} is none of train, val, test")
        modality = cells.get("modality", "")
        if modality and modality not in MODALITIES:
            raise UserError(f"{place}: modality {modality!r} is not known: {ABOUT_MODALITIES}")

        labels = [label.strip() for label in cells["labels"].split("|")]
        rows[name] = Row(tuple(label for label in labels if label), SPLITS.get(split.lower(), ""),
                         cells.get("patient", ""), modality, line)
    return rows


def rows_of_table(files, table):
    """{path: Row} of the files of which a labels.csv says something, or of whose folder it does."""
    said = read_labels(table)
    rows = {}
    names = set()
    for path in files:
        name = comparable(path)
        folder = comparable(os.path.dirname(path))
        names.update((name, folder))
        if name in said:
            rows[path] = said[name]
        elif folder in said:
            rows[path] = said[folder]

    unused = [row.line for name, row in said.items() if name not in names]
    if unused:
        print(f"warning: {len(unused)} rows of {table} name no file (line {unused[0]} ...)")
    return rows


def rows_of_folders(files):
    """{path: Row} by names of folders. The innermost is the label.

    In a tree of one level that is what torchvision's ImageFolder does; it takes the outermost.
    Folders named train, val, valid or test, above or below that of the label, are splits.
    """
    rows = {}
    for path in files:
        labels = ()
        split = ""
        for name in Path(path).parent.parts:  # from SOURCE down
            if name.lower() in SPLITS:
                split = SPLITS[name.lower()]
            else:
                labels = (name,)
        rows[path] = Row(labels, split)
    return rows


def find_samples(source, files, modality_of, allow_2d, workers):
    """Samples made of any mix of files, and {path: Rejected} of the rest.

    modality_of(path) is the modality that a user gives, or "": then a DICOM header may say it, and
    any other sample has none.
    """
    # The kind of most files is plain. Of the others each may be a DICOM file.
    samples = []
    others = []
    for path in files:
        kind = kind_of(os.path.join(source, path))
        if kind:
            samples.append(Sample([path], kind, modality_of(path)))
        else:
            others.append(path)

    # Headers are read in child processes, as pixels are.
    def header(path):
        return read_header(source, path, modality_of(path), allow_2d)

    found = []
    rejected = {}
    answers = run_in_workers(header, others, workers)
    few = len(others) < 1000
    for path, answer in tqdm(answers, total=len(others), unit="header", disable=few):
        if isinstance(answer, Rejected):
            rejected[path] = answer
        else:
            found.append(answer)

    grouped, left_out = group_series(found, allow_2d)
    for path, reason in left_out:
        rejected[path] = Rejected(reason)
    return samples + grouped, rejected


def find_in_folder(source, files, options):
    """Samples of any tree of files, and {path: Rejected} of the rest.

    What the user says goes before what a DICOM header says. A row of labels.csv may name a file,
    any file of a series, or a folder.
    """
    rows = {}  # {path: Row}
    if options.labels == "folders":
        rows = rows_of_folders(files)
    elif options.labels:
        # The table itself may lie in the folder.
        table = os.path.relpath(os.path.realpath(options.labels), os.path.realpath(source))
        files = [path for path in files if path != table]
        rows = rows_of_table(files, options.labels)

    def modality_of(path):
        if path in rows and rows[path].modality:
            return rows[path].modality
        return options.modality or ""

    samples, rejected = find_samples(source, files, modality_of, options.allow_2d, options.workers)
    for sample in samples:
        named = [path for path in sample.files if path in rows]
        if not named:
            continue

        # Of a series the first file that has a row speaks for all.
        row = rows[named[0]]
        if row.modality and row.modality != sample.modality:
            raise UserError(f"{options.labels}, line {row.line}: modality of one file of a series; "
                            "name the folder of the series, or give --modality")
        sample.labels = row.labels
        sample.split = row.split
        sample.patient = row.patient or sample.patient
    return samples, rejected


# ---- public data sets, as published --------------------------------------------------------------
def read_tables(folder, files, pattern, columns=None, needed=True):
    """Rows of all tables below `folder` of such a name; UserError if a needed one is missing."""
    rows = []
    for path in files:
        if re.fullmatch(pattern, os.path.basename(path)):
            table = read_table(os.path.join(folder, path), columns=columns)
            rows += [row for _, row in table]
    if needed and not rows:
        raise UserError(f"{folder}: no file named like {pattern}; download all of the data set")
    return rows


def join_with_table(source, files, kind, rows, column):
    """[(path, row)] of the files of one kind that a row names in that column, suffix or not.

    Each row is used once: a second file of the same name is a copy.
    """
    unused = {row[column]: row for row in rows}
    pairs = []
    for path in files:
        for name in (os.path.basename(path), Path(path).stem):
            if name in unused and kind_of(os.path.join(source, path)) == kind:
                pairs.append((path, unused.pop(name)))
                break
    return pairs


# Each function below gives the samples of a data set, and {path: Rejected} of files left out.
def chestxray14(source, files, options):
    """images/*.png or images_001/images/*.png ...: labels by Data_Entry, split by the two lists."""
    entries = read_tables(source, files, r"Data_Entry_2017.*\.csv")
    splits = {}
    for row in read_tables(source, files, r"train_val_list\.txt", columns=["name"]):
        splits[row["name"]] = "train"
    for row in read_tables(source, files, r"test_list\.txt", columns=["name"]):
        splits[row["name"]] = "test"

    samples = []
    for path, row in join_with_table(source, files, "image", entries, "Image Index"):
        labels = tuple(name for name in row["Finding Labels"].split("|") if name != "No Finding")
        split = splits.get(row["Image Index"], "")
        samples.append(Sample([path], "image", "xray", labels, row["Patient ID"], split))
    return samples, {}


def fetal_planes(source, files, options):
    """Images/*.png: plane and patient by the table. The task queries all of them: test."""
    table = read_tables(source, files, r"FETAL_PLANES_DB_data\.csv")
    samples = []
    for path, row in join_with_table(source, files, "image", table, "Image_name"):
        labels = (row["Plane"],)
        samples.append(Sample([path], "image", "ultrasound", labels, row["Patient_num"], "test"))
    return samples, {}


# DEVIATION: the paper's 13 categories come from a language model and are not published. Ours hold
# as many videos, 364. A finding that is not in this table has no category.
HYPER_KVASIR = {
    "anastomosis": "anastomosis",
    "barrett's oesophagus": "other pathology",
    "bbps 0-1": "BBPS 0-1",
    "bbps 2-3": "BBPS 2-3",
    "cancer": "cancer",
    "cancer, colorectal": "cancer",
    "cavity of anastomotic leak": "anastomosis",
    "cecum": "landmark",
    "clip placement": "polypectomy",
    "colitis": "colitis",
    "dyed lifted polyps": "dyed lifted polyps",
    "dyed resection margins": "dyed resection margins",
    "esophagitis": "other pathology",
    "gave": "other pathology",
    "hemorrhoids": "other pathology",
    "parasites": "other pathology",
    "polyps": "polyps",
    "pylorus": "landmark",
    "retroflex stomach": "landmark",
    "self-expanding stent": "stent",
    "snare resection": "polypectomy",
    "ulcer": "ulcer",
    "varices": "other pathology",
    "z-line": "landmark",
}


def hyper_kvasir(source, files, options):
    """labeled-videos/**/UUID.avi: category by Finding 1. The task queries all of them: test."""
    table = read_tables(source, files, r"video-labels\.csv")
    samples = []
    for path, row in join_with_table(source, files, "video", table, "Video file"):
        labels = ()
        finding = row["Finding 1"].lower()
        if finding in HYPER_KVASIR:
            labels = (HYPER_KVASIR[finding],)
        samples.append(Sample([path], "video", "endoscopy", labels, split="test"))
    return samples, {}


def kvasir_capsule(source, files, options):
    """CLASS/VIDEO_FRAME.jpg: runs of consecutive frames of a class in a video are clips (App. C).

    DEVIATION: the paper reports 344 clips; its rule as written gives 261 on the 11 larger classes.
    """
    # Some frames are in two classes: each class of a video has a numbering of its own.
    videos = defaultdict(dict)  # {(class, video): {frame number: path}}
    name = re.compile(r"(?P<video>[0-9a-f]{16})_(?P<frame>\d+)\.(jpg|png)")
    for path in files:
        match = name.fullmatch(os.path.basename(path))
        if match:
            label = Path(path).parent.name
            videos[label, match["video"]][int(match["frame"])] = path
    if not videos:
        raise UserError(f"{source}: holds no CLASS/VIDEO_FRAME.jpg; unpack each *.tar.gz in its "
                        "place first")

    samples = []
    for (label, video), frames in sorted(videos.items()):
        run = []
        for number in sorted(frames):
            run.append(frames[number])
            if number + 1 not in frames:  # the run ends here
                samples.append(Sample(run, "clip", "endoscopy", (label,), video, "test"))
                run = []
    return samples, {}


def finding_labels(source, tables, needed):
    """{volume: [finding:NAME ...]} by the tables of CT-RATE."""
    labels = defaultdict(list)
    for row in read_tables(source, tables, r"\w*predicted_labels\.csv", needed=needed):
        volume = row.pop("VolumeName").removesuffix(".nii.gz")
        for finding, value in row.items():
            if float(value or 0):
                labels[volume].append(f"finding:{finding}")
    return labels


def add_status_labels(labels, source, tables):
    """Add status:REGION:normal or abnormal to each volume, by the tables of RadGenome-ChestCT."""
    abnormal = {}  # {(volume, region): whether any part of it is}
    for row in read_tables(source, tables, r"(train|validation)_vqa_abnormality\.csv"):
        volume = row["Volumename"].removesuffix(".nii.gz")
        region = row["Anatomy"].split("/")[0]  # left and right lung are one
        found = row["Abnormality"].lower() != "no findings"
        abnormal[volume, region] = found or abnormal.get((volume, region), False)

    for (volume, region), found in abnormal.items():
        status = "abnormal" if found else "normal"
        labels[volume].append(f"status:{region}:{status}")


def add_size_labels(labels, source, tables):
    """Add size:REGION:FINDING:MILLIMETRES to each volume, by the tables of RadGenome-ChestCT.

    CHOICE: the size of a lesion is its largest side; the paper does not say how it is measured.
    """
    # "6x4 mm", "2.7 cm", "2-3 mm", but not "170 in", which is the number of an image.
    size = re.compile(r"(?P<sides>[\d.]+(?:\s*[x-]\s*[\d.]+)*)\s*(?P<unit>mm|cm)")
    for row in read_tables(source, tables, r"(train|validation)_vqa_size\.csv"):
        match = size.match(row["Size"])
        if not match:
            continue
        largest = max(float(side) for side in re.findall(r"\d*\.?\d+", match["sides"]))
        if match["unit"] == "cm":
            largest *= 10

        volume = row["Volumename"].removesuffix(".nii.gz")
        region = row["Anatomy"].split("/")[0]
        finding = row["Abnormality"].replace("|", "/")  # a | would end the label
        labels[volume].append(f"size:{region}:{finding}:{largest:g}")


# A volume is a reconstruction of a scan, of which there are several.
CT_RATE_VOLUME = re.compile(
    r".*/(?P<part>train|valid)_fixed/(?:.*/)?"
    r"(?P<volume>(?P<scan>(?P<patient>(?P=part)_\d+)_[a-z]+)_\d+)\.nii\.gz")


def ct_rate(source, files, options):
    """(train|valid)_fixed/**/*.nii.gz, one volume of each scan. Tables may also lie in --labels.

    RadGenome has labels of the same volumes. Its task queries all of them: test.
    """
    radgenome = options.dataset == "radgenome"
    tables = [os.path.abspath(os.path.join(source, path)) for path in files]
    if options.labels:
        beside, _ = list_files(options.labels)
        tables += [os.path.abspath(os.path.join(options.labels, path)) for path in beside]

    labels = finding_labels(source, tables, needed=not radgenome)
    if radgenome:
        add_status_labels(labels, source, tables)
        add_size_labels(labels, source, tables)
    no_chest = set()
    for row in read_tables(source, tables, r"no_chest_\w+\.txt", columns=["name"], needed=False):
        no_chest.add(os.path.basename(row["name"]).removesuffix(".nii.gz"))

    # The shortest names come first: of a scan the volume _2 before _10.
    samples = []
    rejected = {}
    scans = set()
    for path in sorted(files, key=len):
        match = CT_RATE_VOLUME.fullmatch(os.path.abspath(os.path.join(source, path)))
        if match and match["volume"] in no_chest:
            rejected[path] = Rejected("no chest CT by its list")
        elif match and match["scan"] in scans:
            rejected[path] = Rejected("another reconstruction of a kept scan")
        elif match:
            split = "train" if match["part"] == "train" and not radgenome else "test"
            found = tuple(dict.fromkeys(labels[match["volume"]]))  # each label once
            samples.append(Sample([path], "nifti", "ct", found, match["patient"], split))
            scans.add(match["scan"])
        elif path.endswith(".nii.gz"):
            rejected[path] = Rejected("not of train_fixed or valid_fixed, whose headers are true")
    return samples, rejected


DATASETS = {"demo": find_in_folder, "folder": find_in_folder, "chestxray14": chestxray14,
            "fetal_planes": fetal_planes, "kvasir_capsule": kvasir_capsule,
            "hyper_kvasir": hyper_kvasir, "ct_rate": ct_rate, "radgenome": ct_rate}
LABELLED_BY_FLAG = ("folder", "ct_rate", "radgenome")  # which --labels is for


# ---- read one file: images, videos, NIfTI --------------------------------------------------------
# What the name of a file says it is. A DICOM file often has no suffix at all.
KINDS = {
    ".png": "image", ".jpg": "image", ".jpeg": "image", ".jpe": "image", ".jfif": "image",
    ".tif": "image", ".tiff": "image", ".gif": "image", ".bmp": "image", ".webp": "image",
    ".avi": "video", ".mp4": "video", ".mov": "video", ".mpg": "video", ".mpeg": "video",
    ".mkv": "video", ".wmv": "video", ".m4v": "video", ".webm": "video", ".nii": "nifti"}
# What its first bytes say: (where, bytes, kind).
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image"), (0, b"\xff\xd8\xff", "image"), (0, b"GIF8", "image"),
    (0, b"II*\0", "image"), (0, b"MM\0*", "image"), (8, b"WEBP", "image"),
    (8, b"AVI ", "video"), (4, b"ftyp", "video"), (0, b"\x1a\x45\xdf\xa3", "video"),
    (0, b"\0\0\1\xba", "video"), (0, b"\0\0\1\xb3", "video"),
    (344, b"n+1\0", "nifti"), (4, b"n+2\0", "nifti"))
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")
# Tags of TIFF (baseline TIFF 6.0).
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262  # 0: white is zero
SAMPLE_FORMAT = 339  # 1: unsigned
NOT_FINITE = "NaN or infinite values set to the background"
# CHOICE: a video that ends before this share of its declared length is damaged.
LEAST_LENGTH = 0.9


def kind_of(path):
    """image, video or nifti, by the first bytes, else by the name; "" if it may be DICOM."""
    with open(path, "rb") as file:
        head = file.read(352)
    if head[128:132] == b"DICM":
        return ""
    for start, signature, kind in SIGNATURES:
        if head[start:start + len(signature)] == signature:
            return kind
    name = os.path.basename(path).lower()
    if name.endswith(".nii.gz"):
        return "nifti"
    return KINDS.get(os.path.splitext(name)[1], "")


def is_deep(image):
    """True if a Pillow image has 16 or 32 bits of grey; how many of them are used is not told."""
    return image.mode == "F" or image.mode.startswith("I")


def deep_values(image, notes):
    """A deep Pillow image -> (h, w) float32, white above black; lowest what is not finite."""
    tags = getattr(image, "tag_v2", {})
    pixels = np.asarray(ImageOps.exif_transpose(image))  # (h, w)
    is_unsigned = tags.get(SAMPLE_FORMAT, (1,))[0] == 1
    if pixels.dtype == np.int32 and tags.get(BITS_PER_SAMPLE) == (32,) and is_unsigned:
        pixels = pixels.view(np.uint32)  # Pillow has no such mode
    values = pixels.astype(np.float32)
    if tags.get(PHOTOMETRIC) == 0:  # Pillow exchanges black and white in 1 and 8 bits only
        values = 1 - values  # of integers negative, until read_image stretches them to [0, 1]
    finite = np.isfinite(values)
    if not finite.any():
        raise Rejected("blank, no pixel has a value")
    if not finite.all():
        notes.add(NOT_FINITE)
        values = np.where(finite, values, values[finite].min())
    return values


def shallow_pixels(image):
    """A Pillow image of 8 bits -> (h, w) or (h, w, 3) uint8; what is transparent lies on black."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def choose_pages(image, count, seed, notes):
    """Numbers of the pages of an open image that are read: one, or `count` if it is a video.

    Pages smaller than the largest are previews. So are the other pages of a JPEG photo (MPO).
    """
    areas = [page.width * page.height for page in ImageSequence.Iterator(image)]
    pages = [n for n, area in enumerate(areas) if area == max(areas)]
    if len(pages) == 1 or image.format == "MPO":
        return pages[:1]
    return [pages[n] for n in sample_frames(len(pages), count, seed, notes)]


def read_image(paths, sample, count, seed):
    """PNG, JPEG, TIFF, GIF, BMP or WebP -> Frames; several pages are a video: `count` of them."""
    notes = set()
    planes = []
    deep = []  # numbers of the planes with more than 8 bits

    # Pillow gets the file, not its name: given a name it maps the file into memory, and then turns
    # some TIFF files wrongly.
    with open(paths[0], "rb") as file:
        image = Image.open(file, formats=IMAGE_FORMATS)
        for page in choose_pages(image, count, seed, notes):
            image.seek(page)
            if is_deep(image):
                deep.append(len(planes))
                planes.append(deep_values(image, notes))  # (h, w)
            else:
                planes.append(shallow_pixels(image))  # (h, w) or (h, w, 3)
        is_float = image.mode == "F"

    # How many bits of deep pages are used is not told: percentiles say it, one stretch for all.
    if deep:
        values = np.stack([planes[n] for n in deep])  # (pages, h, w)
        already_scaled = is_float and 0 <= values.min() and values.max() <= 1
        if not already_scaled:
            values = normalize_percentiles(values)
        for n, plane in zip(deep, values):
            planes[n] = plane
    return Frames(planes, bool(deep), notes=tuple(notes))


def read_clip(paths, sample, count, seed):
    """Still images in the order of time -> Frames, `count` of them."""
    if len(paths) < MIN_RUN:
        raise Rejected(f"in a run of {len(paths)} frames, a clip needs {MIN_RUN}")
    notes = set()
    planes = []
    for n in sample_frames(len(paths), count, seed, notes):
        frames = read_image([paths[n]], sample, 1, seed)
        planes.append(frames.planes[0])
    return Frames(planes, notes=tuple(notes))


def open_video(source):
    """A path or bytes -> an open imageio video, of which `_container` is PyAV's container.

    imageio's own functions show neither the rotation nor the shape of pixels nor a second stream.
    """
    return iio.imopen(source, "r", plugin="pyav", options=VIDEO_OPTIONS, metadata_errors="ignore")


def measure_streams(source):
    """Find the longest video stream -> its number, and how many of its packets hold a frame.

    Nothing is decoded. Frames are counted, since capture cards drop some of those that the file
    declares. Rejected if the last one comes long before the end that the file declares.
    """
    with open_video(source) as video:
        streams = video._container.streams.video
        if not streams:
            raise Rejected("no video in it")
        packets = [0] * len(streams)
        last_starts = [0] * len(streams)  # of a packet, in units of the stream's clock
        for packet in video._container.demux(*streams):
            if packet.size == 0:  # a dropped frame
                continue
            n = streams.index(packet.stream)
            packets[n] += 1
            if packet.pts is not None:
                start = packet.pts - (packet.stream.start_time or 0)
                last_starts[n] = max(last_starts[n], start)
        longest = int(np.argmax(packets))
        duration = streams[longest].duration

    length = packets[longest]
    if duration and length > 1:
        one_frame = duration / length
        if last_starts[longest] + one_frame < LEAST_LENGTH * duration:
            declared = round(length * duration / max(last_starts[longest], 1))
            raise Rejected(f"damaged, ends before frame {length} of its {declared}")
    return longest, length


def decode_frames(source, stream, wanted):
    """Decode the wanted frames of a stream -> {number: (h, w, 3) uint8}, frames seen, spacing.

    They are as displayed: turned, and of pixels that may not be square. Frames between them are
    decoded too, but not converted to RGB, which takes longer.
    """
    frames = {}
    number = 0
    with open_video(source) as video:
        selected = video._container.streams.video[stream]
        selected.thread_type = "SLICE"
        selected.codec_context.thread_count = 1
        pixel_aspect = float(selected.sample_aspect_ratio or 1)  # width : height of a pixel
        spacing = (1.0, pixel_aspect)
        for frame in video._container.decode(selected):
            if number in wanted:
                quarter_turns = round(frame.rotation / 90)  # counter-clockwise
                frames[number] = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
                if quarter_turns % 2:
                    spacing = (pixel_aspect, 1.0)
            number += 1
            if number > max(wanted):
                break
    return frames, number, spacing


def read_video(paths, sample, count, seed):
    """AVI, MP4, MOV ... (a path, or bytes) -> Frames, `count` of those that exist, as displayed."""
    stream, length = measure_streams(paths[0])
    notes = set()
    chosen = sample_frames(length, count, seed, notes)
    frames, decoded, spacing = decode_frames(paths[0], stream, set(chosen))
    if decoded <= max(chosen):  # some packets gave no frame
        if decoded == 0:
            raise Rejected("no frame of it can be decoded")
        chosen = sample_frames(decoded, count, seed, notes)
        frames, _, spacing = decode_frames(paths[0], stream, set(chosen))
    return Frames([frames[n] for n in chosen], spacing=spacing, notes=tuple(notes))


def nifti_affine(image, notes):
    """(4, 4) from (i, j, k) to RAS+ mm: the header's sform, else its qform (NIfTI-1 standard)."""
    header = image.header
    has_qform = header["qform_code"] > 0
    if header["sform_code"] == 0 and not has_qform:
        notes.add("its header names no orientation: left and right may be exchanged")
    affine = image.affine
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9 and has_qform:  # an sform of zeros
        affine = header.get_qform()
    return affine


def read_nifti(paths, sample, count, seed):
    """NIfTI-1 or 2, packed or not -> Volume; of several volumes the first."""
    data = Path(paths[0]).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)  # checks the CRC, nibabel.load does not
        except gzip.BadGzipFile as error:
            raise Rejected("damaged gzip data, or other bytes behind them", str(error)) from error
    is_second = data[4:7] == b"n+2"
    if not is_second and data[344:347] != b"n+1":
        raise Rejected("not a NIfTI file (convert .hdr/.img pairs to .nii)")

    image_class = nib.Nifti2Image if is_second else nib.Nifti1Image
    image = image_class.from_bytes(data)
    kind = image.get_data_dtype()
    shape = image.shape  # (i, j[, k[, volumes[, 1 ...]]])
    is_usable = 2 <= len(shape) and min(shape) > 0 and all(n == 1 for n in shape[4:])
    offset = int(image.dataobj.offset)  # of the voxels, behind the header
    if not is_usable or kind.kind not in "iuf" or offset < 348:
        raise Rejected(f"voxels of shape {shape} and type {kind} cannot be used")
    if offset + math.prod(shape) * kind.itemsize > len(data):
        raise Rejected("damaged, ends before its last voxel")

    # The bytes are taken as they are, without a copy. Axes behind the third count volumes.
    notes = set()
    voxels = np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape, order="F")
    if voxels.ndim == 2:
        voxels = voxels[:, :, None]  # (i, j, 1)
    if voxels[0, 0, 0].size > 1:
        notes.add("4D NIfTI: first volume kept")
    while voxels.ndim > 3:
        voxels = voxels[..., 0]  # (i, j, k) at last
    return Volume(voxels, nifti_affine(image, notes), image.dataobj.slope, image.dataobj.inter,
                  notes=tuple(notes))


# ---- read one file: DICOM ------------------------------------------------------------------------
# X-ray angiography and fluoroscopy: for display their modality LUT is not applied (PS3.4 N.2.5).
NO_MODALITY_LUT = ("1.2.840.10008.5.1.4.1.1.12.1", "1.2.840.10008.5.1.4.1.1.12.1.1",
                   "1.2.840.10008.5.1.4.1.1.12.2", "1.2.840.10008.5.1.4.1.1.12.2.1",
                   "1.2.840.10008.5.1.4.1.1.12.3")
COPIES = "duplicate slices dropped"
NO_WINDOW = "window or VOI LUT cannot be read: not used"
# CHOICE: a window that leaves so few pixels between black and white is that of another image.
LEAST_SHOWN = 0.1
# CHOICE: of frames with more pixels than this in all, every n-th pixel gives the percentiles.
MOST_ASKED = 2**24


@lru_cache(maxsize=1)
def no_padding(shape):
    """A mask of nothing, which all slices of a volume share: hundreds would fill the memory."""
    return np.zeros(shape, bool)


def padding_mask(ds, stored):
    """Where pixels are padding, as bool of the shape of `stored` (PS3.3 C.7.5.1.1.2).

    Padding is one value, or all from one value to another. A tag may have a sign where the pixels
    have none, so bits are compared: of 16 bits 63536 is -2000.
    """
    if stored.dtype.kind == "f":
        return ~np.isfinite(stored)
    bits = 8 * stored.itemsize
    ends = []
    for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        numbers = numbers_of(value_of(ds, tag))
        # A value that the pixels cannot have, with or without a sign, means nothing.
        if not numbers or not -2**(bits - 1) <= numbers[0] < 2**bits:
            continue
        value = int(numbers[0]) % 2**bits  # the bits, as a number without a sign
        if stored.dtype.kind == "i" and value >= 2**(bits - 1):
            value -= 2**bits
        ends.append(value)
    if not ends:
        return no_padding(stored.shape)
    return (stored >= min(ends)) & (stored <= max(ends))


def rescale_of(ds, frame):
    """Slope and intercept from stored values to the unit of the file, HU for CT.

    Rejected if they are no numbers.
    """
    slope = numbers_of(per_frame(ds, frame, "RescaleSlope", 1))
    intercept = numbers_of(per_frame(ds, frame, "RescaleIntercept", 0))
    if not slope or not intercept:
        raise Rejected("rescale cannot be read")
    return np.float32(slope[0]), np.float32(intercept[0])


def says_hounsfield(ds):
    """True if the header says that values are HU, False if it says another unit, None if neither.

    Another RescaleType is another unit: MGML is iodine, for example (PS3.3 C.11.1.1.2).
    """
    # US means unspecified.
    unit = str(per_frame(ds, 0, "RescaleType", "")).upper()
    if unit not in ("", "US"):
        return unit == "HU"

    # CT stores HU + 1024 as unsigned numbers, so a negative intercept means HU.
    intercept = numbers_of(per_frame(ds, 0, "RescaleIntercept", 0))
    if intercept and intercept[0] < 0:
        return True
    return None


def read_lut(ds, descriptor, data):
    """A LUT of the file ds -> the input of its first entry, and its entries (n,) (PS3.3 C.11.1.1).

    Entries of 8 bits come in bytes or in words, whatever the descriptor says.
    """
    count, first, _ = (int(number) for number in descriptor)
    count = count % 65536 or 65536  # two bytes cannot say 65536, and are read with a sign at times

    # Words come as numbers, or as the bytes of the file in its order.
    _, is_little_endian = ds.original_encoding
    word = np.dtype("<u2" if is_little_endian else ">u2")
    if not isinstance(data, bytes):
        data = np.atleast_1d(data).astype(word).tobytes()
    entries = np.frombuffer(data, np.uint8 if len(data) < 2 * count else word)[:count]
    if len(entries) < 2:
        raise ValueError("a LUT of one entry")
    return first, entries.astype(np.float32)


def look_up(values, first, entries):
    """Whole values through a LUT; those before its first entry or behind its last take that one."""
    if first > 32767 and values.max() < first:
        first -= 65536  # the descriptor lost its sign
    index = values.astype(np.int64) - first
    return entries[np.clip(index, 0, len(entries) - 1)]


def apply_modality(ds, frame, stored, notes):
    """Stored values -> float32 values in the file's unit, by a LUT or a line (PS3.3 C.11.1)."""
    # A LUT takes the place of slope and intercept.
    luts = ds.get("ModalityLUTSequence")
    if luts and ds.get("SOPClassUID") not in NO_MODALITY_LUT:
        try:
            first, entries = read_lut(ds, luts[0].LUTDescriptor, luts[0].LUTData)
            return look_up(stored, first, entries)
        except MALFORMED:
            notes.add("modality LUT cannot be read: not used")

    try:
        slope, intercept = rescale_of(ds, frame)
    except Rejected:
        slope = 0
    if slope == 0:
        notes.add("rescale cannot be read: not used")
        return stored.astype(np.float32)
    return stored * slope + intercept


def apply_window(values, center, width, function):
    """Values -> [0, 1] by a window (PS3.3 C.11.2.1.2, C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80)))
    if function == "LINEAR_EXACT":
        shown = (values - center) / width + 0.5
    elif width == 1:
        shown = (values > center - 0.5).astype(np.float32)
    else:
        shown = (values - (center - 0.5)) / (width - 1) + 0.5
    return np.clip(shown, 0, 1)


def apply_voi(ds, frame, values, notes):
    """Values -> float32 in [0, 1] by the file's VOI LUT, else its first window (PS3.3 C.11.2).

    None if it has neither, or what it has cannot be used.
    """
    luts = per_frame(ds, frame, "VOILUTSequence")
    if luts:
        try:
            first, entries = read_lut(ds, luts[0].LUTDescriptor, luts[0].LUTData)
            shown = look_up(np.rint(values), first, entries) - entries.min()
            return shown / max(np.ptp(entries), 1)
        except MALFORMED:
            notes.add(NO_WINDOW)

    center = per_frame(ds, frame, "WindowCenter")
    width = per_frame(ds, frame, "WindowWidth")
    if center is None or width is None:
        return None

    # Any other function counts as linear, whose width is at least 1.
    function = str(per_frame(ds, frame, "VOILUTFunction", "LINEAR")).upper()
    least_width = 1e-6 if function in ("SIGMOID", "LINEAR_EXACT") else 1
    # Of several windows the first is meant for the first look.
    center = numbers_of(center)
    width = numbers_of(width)
    if not center or not width or width[0] < least_width:
        notes.add(NO_WINDOW)
        return None
    return apply_window(values, center[0], width[0], function)


class Grey(NamedTuple):
    """One grey frame, (h, w), on its way to the screen."""
    stored: np.ndarray  # as in the file
    padding: np.ndarray  # bool, no part of the picture
    values: np.ndarray  # float32, in the unit of the file
    windowed: object  # X-ray only: float32 in [0, 1] by the file's window or VOI LUT; else None


class Scale(NamedTuple):
    """How grey frames are shown."""
    source: str  # which picture of a Grey: stored, values or windowed
    low: float  # what becomes black in it
    high: float  # what becomes white
    hounsfield: bool = False


def grey_frames(ds, stored, modality, notes):
    """Yield frames {n: stored pixels (h, w)} as Grey, one at a time: all would fill the memory."""
    for n, pixels in stored.items():
        padding = padding_mask(ds, pixels)
        values = apply_modality(ds, n, pixels, notes)
        windowed = None
        if modality == "xray":
            windowed = apply_voi(ds, n, values, notes)
        yield Grey(pixels, padding, values, windowed)


def window_is_useful(frames, notes):
    """True if every Grey frame has a window, and these leave enough between black and white."""
    pixels = 0
    between = 0
    for frame in frames:
        if frame.windowed is None:
            return False
        shown = frame.windowed[~frame.padding]  # (n,)
        pixels += shown.size
        between += np.count_nonzero((shown > 0.01) & (shown < 0.99))
    if between < LEAST_SHOWN * pixels:
        notes.add("window shows nearly nothing: not used")
        return False
    return True


def frames_are_hounsfield(ds, frames):
    """True if the values of Grey frames of CT are HU, by the header or by the values of one."""
    said = says_hounsfield(ds)
    if said is not None:
        return said
    for frame in frames:
        valid = frame.values[~frame.padding]  # (n,)
        if valid.size and is_hounsfield(valid):
            return True
    return False


def percentile_scale(frames, pixels):
    """The Scale from the 0.5 to the 99.5 percentile of Grey frames, which have `pixels` in all."""
    step = pixels // MOST_ASKED + 1
    asked = [frame.values[~frame.padding][::step] for frame in frames]
    low, high = percentile_range(np.concatenate(asked))
    return Scale("values", float(low), float(high))  # so that frames stay float32


def choose_scale(ds, stored, modality, notes):
    """One Scale for all frames {n: stored pixels (h, w)}, which keeps how brightness changes.

    X-ray by the file's window, CT by HU_RANGE if its values are HU, other images of 8 bits as they
    are, the rest by percentiles.
    """
    def frames():
        return grey_frames(ds, stored, modality, notes)

    if modality == "xray" and window_is_useful(frames(), notes):
        return Scale("windowed", 0.0, 1.0)
    if modality == "ct":
        if frames_are_hounsfield(ds, frames()):
            return Scale("values", *HU_RANGE, hounsfield=True)
        notes.add(NOT_HU)
    if modality not in VOLUME_MODALITIES and ds.BitsStored <= 8 and not ds.PixelRepresentation:
        return Scale("stored", 0.0, 2.0**ds.BitsStored - 1)
    return percentile_scale(frames(), sum(pixels.size for pixels in stored.values()))


def display(ds, stored, modality, notes):
    """Grey frames {n: stored pixels (h, w)} -> {n: (h, w) float32 in [0, 1]} as on a screen.

    In this order: padding found, modality LUT or rescale, window or VOI LUT (or another Scale),
    MONOCHROME1 inverted, padding made black. A step whose tags are malformed is left out.
    """
    scale = choose_scale(ds, stored, modality, notes)
    # HU mean the same whatever a screen makes of them.
    inverted = ds.PhotometricInterpretation == "MONOCHROME1" and not scale.hounsfield
    if inverted:
        notes.add("MONOCHROME1: inverted")

    width = scale.high - scale.low or 1.0  # 0 where all values are the same
    shown = {}
    for n, frame in zip(stored, grey_frames(ds, stored, modality, notes)):
        plane = getattr(frame, scale.source).astype(np.float32)
        plane = np.clip((plane - scale.low) / width, 0, 1)
        if inverted:
            plane = 1 - plane
        shown[n] = np.where(frame.padding, np.float32(0), plane)
    return shown


def apply_palette(ds, stored):
    """Stored values (h, w) -> (h, w, 3) in [0, 1] by the file's palette (PS3.3 C.7.6.3.1.5)."""
    if "SegmentedRedPaletteColorLookupTableData" in ds:
        coloured = apply_color_lut(stored, ds)[:, :, :3]  # uint8 or uint16, without transparency
        return coloured / np.float32(np.iinfo(coloured.dtype).max)

    channels = []
    largest = 0
    for colour in ("Red", "Green", "Blue"):
        descriptor = ds[f"{colour}PaletteColorLookupTableDescriptor"].value
        first, entries = read_lut(ds, descriptor, ds[f"{colour}PaletteColorLookupTableData"].value)
        channels.append(look_up(stored, first, entries))  # (h, w)
        largest = max(largest, entries.max())

    # Entries of 8 bits are sometimes declared as 16, and the other way round.
    full = 255
    if largest > full:
        full = max(largest, 2**int(descriptor[2]) - 1)
    return np.stack(channels, axis=2) / np.float32(full)


def colour_frame(ds, stored, notes):
    """A frame (h, w[, 3]) as stored -> (h, w, 3) float32 in [0, 1]; None if it is grey."""
    if stored.ndim == 3:
        return stored / np.float32(2**ds.BitsStored - 1)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        try:
            return apply_palette(ds, stored)
        except MALFORMED:
            notes.add("palette cannot be read: shown grey")
    return None


def pixel_spacing(ds):
    """Distance from row to row and from column to column, in any unit: only their ratio counts."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        spacing = numbers_of(per_frame(ds, 0, tag))
        if len(spacing) == 2 and 0 < min(spacing) <= max(spacing) < np.inf:
            return spacing
    return 1.0, 1.0


def read_dicom(paths, sample, count, seed):
    """A DICOM file -> Frames: its one, or `count` of its frames."""
    notes = set()
    ds = open_dicom(paths[0], notes)
    is_mpeg = ds.file_meta.TransferSyntaxUID.startswith("1.2.840.10008.1.2.4.10")
    if is_mpeg and "PixelData" in ds:
        fragments = list(pydicom.encaps.generate_fragments(ds.PixelData))
        stream = b"".join(fragments[1:])  # the first is a table of offsets
        video = read_video([stream], sample, count, seed)
        return video._replace(notes=(*video.notes, *notes))

    # A file of one frame is an image, of more a video.
    frames = int(ds.get("NumberOfFrames") or 1)
    chosen = [0]
    if frames > 1:
        chosen = sample_frames(frames, count, seed, notes)
    stored = {}  # a short clip takes a frame more than once
    for frame in chosen:
        if frame not in stored:
            stored[frame] = pixel_array(ds, index=frame)  # (h, w) or (h, w, 3)

    # All frames of a file are of colour, or all are grey and are scaled together.
    shown = {frame: colour_frame(ds, pixels, notes) for frame, pixels in stored.items()}
    if shown[chosen[0]] is None:
        shown = display(ds, stored, sample.modality, notes)
    planes = [shown[frame] for frame in chosen]
    return Frames(planes, ds.BitsStored > 8, pixel_spacing(ds), tuple(notes))


class Plane(NamedTuple):
    """The pixels of one slice of a volume."""
    header: Slice
    pixels: np.ndarray  # (rows, columns) as stored
    padding: np.ndarray  # (rows, columns) bool
    scale: tuple  # slope and intercept, both times -1 in an inverted file (MONOCHROME1)


def load_planes(path, slices, modality, notes):
    """The wanted slices of one file -> [Plane], and whether its header says that values are HU."""
    try:
        ds = open_dicom(path, notes)
        stored = pixel_array(ds).reshape(-1, ds.Rows, ds.Columns)  # (frames, rows, columns)
    except BaseException as error:  # decoders raise all there is; this is a guarded child
        what = f"{Path(path).name}, {type(error).__name__} {error}"
        raise Rejected("a slice is damaged", what) from error

    # MONOCHROME1 shows low values bright. Volumes of CT are never inverted.
    inverted = ds.PhotometricInterpretation == "MONOCHROME1" and modality != "ct"
    planes = []
    for one in slices:
        pixels = stored[one.frame]
        slope, intercept = rescale_of(ds, one.frame)
        scale = (-slope, -intercept) if inverted else (slope, intercept)
        planes.append(Plane(one, pixels, padding_mask(ds, pixels), scale))
    return planes, says_hounsfield(ds)


def drop_copies(planes, notes):
    """Planes, one at each place, in order. Rejected if two of one place differ: a wrong anatomy.

    choose_pass has taken one pass, so the others can only be copies. Where SOPInstanceUID and frame
    are the same, pixels are not compared: compression may have changed them.
    """
    of_slice = {plane.header: plane for plane in planes}
    kept = []
    for place in group_by_place(list(of_slice)):
        first, *others = [of_slice[one] for one in place]
        for other in others:
            is_same_file = first.header.uid != "" and first.header.uid == other.header.uid
            is_same_frame = is_same_file and first.header.frame == other.header.frame
            if not is_same_frame and not np.array_equal(first.pixels, other.pixels):
                raise Rejected("two different slices at one position")
            notes.add(COPIES)
        kept.append(first)
    return kept


def fill_padding(planes, modality):
    """Planes whose padding has the darkest value of the volume, so that it is background."""
    if not any(plane.padding.any() for plane in planes):
        return planes

    # A slice may be padding from edge to edge: the background is that of all slices.
    lowest = []
    highest = []
    for plane in planes:
        valid = plane.pixels[~plane.padding]  # (n,)
        if valid.size:
            lowest.append(int(valid.min()))
            highest.append(int(valid.max()))
    if not lowest:
        return planes
    darkest = min(lowest)
    if modality == "ct":
        darkest = min(darkest, 0)  # a tight crop may hold no air, which is stored as 0 or less
    if planes[0].scale[0] < 0:  # of an inverted file
        darkest = max(highest)

    filled = []
    for plane in planes:
        pixels = np.where(plane.padding, np.array(darkest, plane.pixels.dtype), plane.pixels)
        filled.append(plane._replace(pixels=pixels))
    return filled


def check_gaps(slices):
    """Rejected if a gap differs from the median by more than 5 % and more than .1 mm.

    Then a slice is missing, or one is too many.
    """
    gaps = np.diff(positions_along_normal(slices))  # (n - 1,) mm
    usual = np.median(gaps)
    worst = np.abs(gaps - usual).argmax()
    if abs(gaps[worst] - usual) > max(0.05 * usual, 0.1):
        raise Rejected(f"gap of {gaps[worst]:.1f} mm after slice {worst + 1} of {len(slices)}, "
                       f"others {usual:.1f} mm")


def affine_of(slices):
    """(4, 4) from indices (column, row, slice) to RAS+ mm."""
    first = slices[0]
    last = slices[-1]
    between_rows, between_columns = first.spacing
    # From the first slice to the last, so that the tilt of a gantry stays.
    step = np.subtract(last.position, first.position) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.direction[:3]) * between_columns  # along a row lie its columns
    affine[:3, 1] = np.array(first.direction[3:]) * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return np.diag([-1, -1, 1, 1]) @ affine  # DICOM counts to the left and back, RAS+ does not


def read_series(paths, sample, count, seed):
    """The slices of a volume, of any number of files -> Volume."""
    notes = set()
    # Each file is read once, whatever slices of it are wanted.
    wanted = {}  # {file: slices}
    for one in sample.slices:
        wanted.setdefault(one.file, []).append(one)

    planes = []
    said = set()
    for file, path in zip(sample.files, paths):
        if file not in wanted:
            notes.add(COPIES)
            continue
        found, hounsfield = load_planes(path, wanted[file], sample.modality, notes)
        planes += found
        said.add(hounsfield)
    planes = fill_padding(drop_copies(planes, notes), sample.modality)
    check_gaps([plane.header for plane in planes])

    # Stored values stay as they are, but for PET and some MR, whose scale changes with the slice.
    pixels = [plane.pixels for plane in planes]
    slope, intercept = planes[0].scale
    if len({plane.scale for plane in planes}) > 1:
        for n, plane in enumerate(planes):
            pixels[n] = plane.pixels.astype(np.float32) * plane.scale[0] + plane.scale[1]
        slope, intercept = 1.0, 0.0
    voxels = np.stack(pixels).transpose(2, 1, 0)  # (columns, rows, slices)
    affine = affine_of([plane.header for plane in planes])
    hounsfield = said.pop() if len(said) == 1 else None
    return Volume(voxels, affine, slope, intercept, hounsfield, tuple(notes))


# Which reader opens which kind of sample: (paths, sample, count, seed) -> Frames or Volume.
READERS = {"image": read_image, "clip": read_clip, "video": read_video, "nifti": read_nifti,
           "dicom": read_dicom, "series": read_series}


# ---- arrays: everything becomes float32 in [0, 1], then (C, H, W, S) -----------------------------
BLANK_VOLUME = "blank, no voxel has a value, or all the same"
NOT_HU = "values are not Hounsfield units: stretched by percentiles"
AIR = -200  # HU; only air and lung lie below
FAT = -20  # HU
LEAST_FAT = 0.001  # CHOICE: of all voxels
# CHOICE: a volume of so few different whole numbers is a mask.
MASK_VALUES = 16


def percentile_range(values):
    """What becomes black and white: the 0.5 and the 99.5 percentile of values of any shape.

    CHOICE: the paper asks for [0, 1] and does not say how; nnU-Net clips CT by these percentiles.
    """
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    return low, high


def normalize_percentiles(x):
    """Values of any shape -> float32: their percentile_range becomes [0, 1]."""
    low, high = percentile_range(x)
    if high == low:
        return np.zeros(x.shape, np.float32)
    return np.clip((x - low) / (high - low), 0, 1).astype(np.float32)


def resize(x, size, spacing=(1.0, 1.0)):
    """Planes (S, C, H, W) -> (S, C, h, w), antialiased; the longer side in mm is `size` (3.4)."""
    height = x.shape[-2] * spacing[0]
    width = x.shape[-1] * spacing[1]
    scale = size / max(height, width)
    h = max(1, round(height * scale))
    w = max(1, round(width * scale))
    return F.interpolate(x, (h, w), mode="bilinear", antialias=True)  # (S, C, h, w)


def pad(x, size):
    """(S, C, h, w) -> (C, size, size, S), centred in zeros (Sec. 3.4)."""
    top = (size - x.shape[2]) // 2
    left = (size - x.shape[3]) // 2
    bottom = size - x.shape[2] - top
    right = size - x.shape[3] - left
    x = F.pad(x, (left, right, top, bottom))  # (S, C, size, size)
    return x.permute(1, 2, 3, 0)  # (C, size, size, S)


def sample_frames(n, k, seed, notes):
    """k of n places at random, in order (Sec. 3.4); too few are repeated evenly."""
    if n < k:
        notes.add("fewer frames than asked for: repeated evenly")
        return [i * n // k for i in range(k)]
    return sorted(random.Random(seed).sample(range(n), k))


def to_channels(frame, colour):
    """A frame (h, w[, 3]), uint8 or float32 in [0, 1] -> (3 if colour else 1, h, w) float32."""
    if frame.dtype == np.uint8:
        frame = frame.astype(np.float32) / 255
    if frame.ndim == 3 and not colour:
        frame = frame @ LUMA  # (h, w)
    if frame.ndim == 2:
        frame = frame[:, :, None]  # (h, w, 1)
    frame = np.ascontiguousarray(frame.transpose(2, 0, 1), np.float32)  # (1 or 3, h, w)
    x = torch.from_numpy(frame)
    return x.expand(3 if colour else 1, -1, -1)


def frames_to_array(frames, colour, size, spacing):
    """Frames (h, w[, 3]), uint8 or float in [0, 1] -> (3 if colour else 1, size, size, frames)."""
    planes = []
    low, high = np.inf, -np.inf
    for frame in frames:
        scale = 255 if frame.dtype == np.uint8 else 1
        low = min(low, frame.min() / scale)
        high = max(high, frame.max() / scale)
        x = to_channels(frame, colour)  # (C, h, w)
        planes.append(pad(resize(x[None], size, spacing), size))  # (C, size, size, 1)
    if low == high:
        raise Rejected("blank, one value only")
    return torch.cat(planes, dim=3)  # (C, size, size, frames)


def orient(voxels, affine):
    """Voxels (i, j, k) -> a view (S, H, W), and mm along S, H, W.

    S runs from the feet up, H from front to back, W from the patient's right to the left.
    A single slice, of whatever direction, is an image (1, rows, columns) with the head up.
    """
    axes = nib.io_orientation(affine)  # along which axis of the body i, j, k run, and which way
    if np.isnan(axes).any():
        raise Rejected("singular affine, the header gives no orientation")
    to_lps = nib.orientations.ornt_transform(axes, nib.orientations.axcodes2ornt("LPS"))
    spacing = nib.affines.voxel_sizes(affine)  # mm along i, j, k
    spacing = spacing[np.argsort(to_lps[:, 0])][::-1]  # mm along S, P, L
    voxels = nib.apply_orientation(voxels, to_lps).T  # (S, H, W)
    if 1 not in voxels.shape:
        return voxels, spacing

    # The thin axis comes first. In coronal and sagittal slices row 0 is at the feet: they are
    # flipped.
    thin = voxels.shape.index(1)
    voxels = np.moveaxis(voxels, thin, 0)  # (1, rows, columns)
    if thin > 0:
        voxels = voxels[:, ::-1]
    rows_mm, columns_mm = np.delete(spacing, thin)
    return voxels, np.array([spacing[thin], rows_mm, columns_mm])


def is_hounsfield(stored, slope=1.0, intercept=0.0):
    """True if CT values, stored * slope + intercept, can only be HU: some are air, or many are fat.

    CHOICE: 0..1, 0..255 and HU + 1024 have nothing below zero, but for what interpolation leaves
    there. A tight crop of HU without any air still has fat.
    """
    lowest = min(float(stored.min()) * slope, float(stored.max()) * slope) + intercept
    if lowest < AIR:
        return True
    if lowest >= FAT:
        return False
    return (stored * slope + intercept < FAT).mean() > LEAST_FAT


def is_mask(voxels):
    """True if voxels (any shape) are a handful of whole numbers, as a mask of organs has them."""
    # Most volumes show at a glance that they are none.
    some = np.unique(voxels.reshape(-1, order="A")[::64])
    if len(some) > MASK_VALUES:
        return False
    values = np.unique(voxels)
    return len(values) <= MASK_VALUES and bool((values == np.round(values)).all())


def clip_range(volume, modality, notes):
    """The lowest and highest value of a volume that count: HU_RANGE of HU, else all numbers."""
    everything = (-np.inf, np.inf)
    if modality != "ct":
        return everything
    if volume.hounsfield:
        return HU_RANGE
    if volume.hounsfield is False:
        notes.add(NOT_HU)
        return everything

    # The header does not say it. The lowest values tell.
    voxels = volume.voxels
    if voxels.dtype.kind == "f":
        voxels = voxels[np.isfinite(voxels)]
    if voxels.size == 0:
        raise Rejected(BLANK_VOLUME)
    if is_hounsfield(voxels, volume.slope, volume.intercept):
        return HU_RANGE
    if voxels.min() == voxels.max():
        raise Rejected(BLANK_VOLUME)
    if is_mask(voxels):
        raise Rejected("a mask: its voxels are a handful of whole numbers")
    notes.add(NOT_HU)
    return everything


def resampling_weights(n_in, n_out):
    """(n_out, n_in) weights by which n_in slices become n_out, each row of sum one.

    They are antialiased, since plain interpolation of 300 slices to 64 leaves out half of them.
    F.interpolate gives them: it is shown each slice alone, a one among zeros.
    """
    alone = torch.eye(n_in)[None, None]  # (1, 1, n_in, n_in)
    weights = F.interpolate(alone, (n_out, n_in), mode="bilinear", antialias=True)
    return weights[0, 0]  # (n_out, n_in)


def volume_to_array(volume, modality, size, slices, notes):
    """Volume -> (1, size, size, slices) in [0, 1], oriented as the file header says (Sec. 3.4).

    HU are clipped to HU_RANGE before any averaging. Other values are stretched by percentiles.
    """
    low, high = clip_range(volume, modality, notes)
    voxels, spacing = orient(volume.voxels, volume.affine)  # (S, H, W); mm along S, H, W
    if len(voxels) == 1:
        slices = 1

    # A new slice is a mean of a few old ones. Only these are in memory as floats.
    background = low if np.isfinite(low) else 0.0
    planes = []
    for weights in resampling_weights(len(voxels), slices):  # (S,)
        used = weights.nonzero()[:, 0]
        first, last = used[0].item(), used[-1].item()
        few = np.ascontiguousarray(voxels[first:last + 1], np.float32)  # (few, H, W)
        x = torch.from_numpy(few)
        x = x.mul_(volume.slope).add_(volume.intercept)
        if voxels.dtype.kind == "f" and not x.sum().isfinite():
            notes.add(NOT_FINITE)
            x = torch.where(x.isfinite(), x, background)
        x = torch.tensordot(weights[first:last + 1], x.clamp_(low, high), dims=1)  # (H, W)
        planes.append(resize(x[None, None], size, spacing[1:]))  # (1, 1, h, w)
    x = torch.cat(planes)  # (slices, 1, h, w)

    if x.max() - x.min() <= 1e-5 * x.abs().max():
        raise Rejected(BLANK_VOLUME)
    if (low, high) == HU_RANGE:
        x = (x - low) / (high - low)
    else:
        x = torch.from_numpy(normalize_percentiles(x.numpy()))
    return pad(x, size)  # (1, size, size, slices)


# ---- workers: one sample, decoded in a guarded child ---------------------------------------------
def limit_time(seconds):
    """End this process by a signal after so much processor time; 0 takes the limit away.

    On the clock it may take PATIENCE times as long.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)  # sends SIGPROF
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)  # sends SIGALRM


def content_seed(path):
    """A number that follows from a file's content: from its size and its first 64 KiB.

    CHOICE: it seeds the choice of frames (Sec. 3.1), so that a long video, as a query, shows the
    frames that a cache holds of it.
    """
    with open(path, "rb") as file:
        head = file.read(2**16)
    size = os.path.getsize(path)
    digest = hashlib.sha256(head + str(size).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def decode(sample, source, size, slices, frames):
    """Read a sample -> its array (C, H, W, S), and its notes.

    The array is uint8 from 8-bit sources and float16 in [0, 1] from deeper ones.
    """
    paths = [os.path.join(source, path) for path in sample.files]
    megabytes = sum(os.path.getsize(path) for path in paths) / 1e6
    limit_time(SECONDS + megabytes)

    content = READERS[sample.kind](paths, sample, frames, content_seed(paths[0]))
    notes = set(content.notes)
    if isinstance(content, Volume):
        x = volume_to_array(content, sample.modality, size, slices, notes)  # (1, H, W, slices)
        high_bit_depth = content.voxels.itemsize > 1
    else:
        # Videos and endoscopy are RGB. model.sample_kind tells videos from volumes by that.
        colour = len(content.planes) > 1 or sample.modality == "endoscopy"
        x = frames_to_array(content.planes, colour, size, content.spacing)  # (C, H, W, frames)
        high_bit_depth = content.high_bit_depth

    if high_bit_depth:
        x = x.clamp(0, 1).half()
    else:
        x = x.mul(255).round().clamp(0, 255).byte()
    return x.numpy(), sorted(notes)


def limit_process():
    """In a child process: print nothing, die of a signal, limit memory and threads."""
    # Decoders print what files say, and those in C know nothing of sys.stdout.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    # A handler in Python would wait for a decoder that hangs in C. The default action does not.
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    # Linux limits addresses, of which torch has taken many that it never uses: count from there.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    # Pillow warns from this number of pixels on, and refuses twice as many.
    Image.MAX_IMAGE_PIXELS = PIXELS // 2
    # The processes share the cores.
    torch.set_num_threads(1)
    # imageio collects garbage after every video: 50 ms, unless what was imported is left out of it.
    gc.freeze()


def answer_to(task, item):
    """task(item), or the Rejected that it raises, or a UserError, which is no fault of the item."""
    limit_time(SECONDS)  # decode allows more to large files
    try:
        answer = task(item)
    except (Rejected, UserError) as error:
        # A copy: the traceback of the original holds the pixels.
        answer = type(error)(*error.args)
    except BaseException as error:  # decoders raise all there is, KeyboardInterrupt included
        answer = Rejected("cannot be decoded", f"{type(error).__name__} {error}")
    limit_time(0)
    return answer


def worker_loop(task, item, pipe, parent_ends):
    """In a child process: answer a first item, then all that come through the pipe."""
    # The fork copied the parent's ends of all pipes. Open here, they would outlive the parent.
    for end in parent_ends:
        end.close()
    limit_process()

    for _ in range(SAMPLES_PER_WORKER):
        pipe.send(answer_to(task, item))
        # The item of the last round is not answered. The parent sees that this process has ended,
        # and gives the item to a new one.
        try:
            item = pipe.recv()
        except (EOFError, OSError):  # nothing is left to do, or the parent is gone
            return


class Work(NamedTuple):
    """What a child process is doing."""
    item: object
    process: object
    is_first: bool  # of the items that this process was given


def start_worker(task, item, running):
    """Fork a child process that begins with `item`, and add it to running {pipe: Work}."""
    fork = multiprocessing.get_context("fork")
    pipe, child_end = fork.Pipe()
    arguments = (task, item, child_end, [pipe, *running])
    process = fork.Process(target=worker_loop, args=arguments, daemon=True)
    process.start()

    # From now on the child alone holds its end: when it dies, the pipe is closed.
    child_end.close()
    running[pipe] = Work(item, process, is_first=True)


def why_it_died(exit_code):
    """The Rejected of an item whose process died of it."""
    if exit_code == -signal.SIGPROF:
        return Rejected("timed out: too much processor time")
    if exit_code == -signal.SIGALRM:
        return Rejected("timed out: too long on the clock")
    return Rejected(f"decoder crashed (exit code {exit_code})")


def run_in_workers(task, items, workers):
    """Yield (item, task(item)) or (item, Rejected), in any order; a UserError ends the run.

    No file can end or hang it. A process may die of its item, or of what an earlier one left
    behind: the item is tried again in a new process, and rejected if that dies too.
    """
    waiting = deque(items)
    running = {}  # {pipe: Work}
    while waiting and len(running) < workers:
        start_worker(task, waiting.popleft(), running)

    while running:
        for pipe in multiprocessing.connection.wait(list(running)):
            work = running.pop(pipe)
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                pipe.close()
                work.process.join()
                if not work.is_first:
                    start_worker(task, work.item, running)
                    continue
                answer = why_it_died(work.process.exitcode)
            if isinstance(answer, UserError):
                raise answer

            # The process goes on with the next item while this answer is used.
            if not waiting:
                pipe.close()
            else:
                item = waiting.popleft()
                try:
                    pipe.send(item)
                    running[pipe] = Work(item, work.process, is_first=False)
                except OSError:  # it is dead
                    start_worker(task, item, running)
            yield work.item, answer


# ---- the cache -----------------------------------------------------------------------------------
def pseudonym(key, text):
    """16 hex digits of HMAC-SHA256, "" of nothing."""
    if not text:
        return ""
    return hmac.digest(key, os.fsencode(text), "sha256").hex()[:16]


def make_key(path):
    """Write a random key, mode 0600. Of runs that start together the first one's counts."""
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(secrets.token_hex(32).encode())
        file.flush()
        os.fsync(file.fileno())

        # A link is made whole or not at all, and never in place of another file.
        with suppress(FileExistsError):
            os.link(file.name, path)
            print(f"made the new key {path}: keep it, and keep it apart from the cache")


def read_key(path):
    """The bytes of a key file, which is made if there is none; without a path the public key."""
    if not path:
        return PUBLIC_KEY
    if not os.path.lexists(path):
        make_key(path)

    key = b""
    if os.path.isfile(path):
        key = Path(path).read_bytes().strip()
    if len(key) < 16:
        raise UserError(f"{path}: no file of at least 16 bytes; name one that does not exist to "
                        "have it made")
    return key


def key_of_cache(key, name, own_files):
    """The key that makes the ids and patients of a cache, from the user's key.

    A user's own files have another key in each cache, by its name, so that equal paths in two
    caches have two ids. Public data have one key, so that their ids are the same everywhere.
    """
    if not own_files:
        return key
    return hmac.digest(key, os.fsencode(name), "sha256")


def possible_ids(sample, key, own_files):
    """{modality: id} of a sample: the id that it has, or would have, with each modality.

    An id is made of the sample's key, or of the path of its first file. Of a user's own files the
    modality goes into it too, so that a sample of another modality gets another array.
    """
    what = sample.key or sample.files[0]
    if not own_files:
        return {sample.modality: pseudonym(key, what)}  # its data set says what it is
    return {modality: pseudonym(key, f"{modality}\0{what}") for modality in MODALITIES}


def read_recipe(folder):
    """What a cache was made with; UserError if recipe.json is damaged or of another version."""
    try:
        recipe = json.loads(Path(folder, "recipe.json").read_bytes())
        recipe |= {name: int(recipe[name]) for name in SIZES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder}/recipe.json: missing or damaged; make the cache again"
        raise UserError(message) from error
    # One that names no version was written by hand, beside arrays of one's own.
    if recipe.get("version", VERSION) != VERSION:
        raise UserError(f"{folder}: made by another version; delete the folder and prepare again")
    return recipe


def read_sizes(folder):
    """{"size", "slices", "frames"} that a cache was made with."""
    recipe = read_recipe(folder)
    return {name: recipe[name] for name in SIZES}


def check_recipe(folder, recipe, moved):
    """UserError if a cache was made otherwise. As long as it has no sample, nothing is settled."""
    if not any(folder.glob("*.npy")):
        return
    made = read_recipe(folder)
    differences = []
    for name in ("dataset", "name", *SIZES):
        if made.get(name) != recipe[name]:
            differences.append(f"{name} {made.get(name)}")

    # The source is a hash by the key: under another key it cannot be compared.
    if made.get("key") != recipe["key"]:
        differences.append("another key")
    elif made.get("source") != recipe["source"] and not moved:
        differences.append("another source (--moved if the same data lie in a new place)")
    if differences:
        raise UserError(f"{folder} was made with {', '.join(differences)}; give the same, or "
                        "another --name")


def save_sample(sample, source, folder, sizes):
    """Make folder/ID.npy: the array, then the number of files that it is made of, and the notes.

    numpy.load ignores what follows the array. All is in one file, so that nothing is lost without
    the rest when a run is killed.
    """
    array, notes = decode(sample, source, **sizes)
    lines = [str(len(sample.files)), *notes]
    with atomic_write(folder / f"{sample.id}.npy") as file:
        np.save(file, array, allow_pickle=False)
        file.write("\n".join(lines).encode())


class Made(NamedTuple):
    """What an array file says of itself."""
    shape: tuple  # (C, H, W, S)
    files: int  # how many it is made of
    notes: list


def read_made(folder, name):
    """The Made of an id, without reading the array itself."""
    array = load_sample(folder, {"id": name}, mmap_mode="r")  # (C, H, W, S)
    with open(array.filename, "rb") as file:
        file.seek(array.offset + array.nbytes)
        lines = file.read().decode().split("\n")
    return Made(array.shape, files=int(lines[0] or 0), notes=lines[1:])


def write_csv(path, columns, rows, mode=0o666):
    """A table with commas, whole or not at all. What is not UTF-8 in names of files is escaped."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    with atomic_write(path, mode) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def write_tables(folder, samples, rejected):
    """samples.csv of the samples that have an array, sources.csv, rejected.csv -> {id: notes}."""
    table = []
    sources = []
    kept = {}
    for sample in samples:
        if not (folder / f"{sample.id}.npy").exists():
            continue
        made = read_made(folder, sample.id)
        shape = "x".join(str(length) for length in made.shape)
        labels = "|".join(sample.labels)
        table.append((sample.id, sample.modality, labels, sample.patient, sample.split, shape))
        sources.append((sample.id, sample.files[0], "; ".join(made.notes)))
        kept[sample.id] = made.notes

    # Only samples.csv may be shared. The other two name files, and are for the owner alone.
    columns = ["id", "modality", "labels", "patient", "split", "shape"]
    write_csv(folder / "samples.csv", columns, table)
    write_csv(folder / "sources.csv", ["id", "path", "notes"], sources, 0o600)
    reasons = [(path, str(rejected[path])) for path in sorted(rejected)]
    write_csv(folder / "rejected.csv", ["path", "reason"], reasons, 0o600)
    return kept


def read_samples(folder):
    """Rows of samples.csv as dicts: id, modality, labels, patient, split, shape, folder.

    labels is a tuple of texts, shape one of four numbers (C, H, W, S). UserError naming the line
    if the table is not as write_tables makes it.
    """
    path = Path(folder, "samples.csv")
    columns = {"id", "modality", "labels", "patient", "split", "shape"}
    number = "([1-9][0-9]*)"
    rows = {}
    for line, row in read_table(path, "make the cache with prepare.py"):
        name = re.fullmatch("[0-9a-f]{16}", row.get("id", ""))
        shape = re.fullmatch(f"{number}x{number}x{number}x{number}", row.get("shape", ""))
        if not columns <= row.keys() or not name or not shape or row["id"] in rows:
            raise UserError(f"{path}, line {line}: not as prepare.py wrote it; run it again")

        row["labels"] = tuple(label for label in row["labels"].split("|") if label)
        row["shape"] = tuple(int(length) for length in shape.groups())
        row["folder"] = str(folder)
        rows[row["id"]] = row
    return list(rows.values())


def read_last_tables(folder):
    """Rows of samples.csv as the run before left it, each with its `path` of sources.csv."""
    try:
        rows = read_samples(folder)
        paths = {row["id"]: row["path"] for _, row in read_table(folder / "sources.csv")}
        return [row | {"path": paths[row["id"]]} for row in rows]
    except (UserError, KeyError):
        # It is the first run, or nothing was kept, or this run mends what is damaged.
        return []


def load_sample(folder, row, **options):
    """The array (C, H, W, S), uint8 or float16, of a row of read_samples; else a UserError."""
    path = Path(folder, f"{row['id']}.npy")
    message = f"{path}: not the array of samples.csv; delete it and run prepare.py again"
    try:
        array = np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(message) from error
    if array.dtype not in (np.uint8, np.float16) or array.ndim != 4:
        raise UserError(message)
    if "shape" in row and array.shape != row["shape"]:
        raise UserError(message)
    return array


class CachedDataset(Dataset):
    """Rows of read_samples, of any folders, as tensors (C, H, W, S), uint8 or float16 as stored."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return torch.from_numpy(load_sample(row["folder"], row))  # (C, H, W, S)


def find_query(path, modality):
    """The one sample that a file, a file of a series or a folder stands for, and its source."""
    def modality_of(_):
        return modality or ""

    if path.is_dir():
        source = path
        files, _ = list_files(source)
        samples, rejected = find_samples(source, files, modality_of, allow_2d=False, workers=1)
    elif path.is_file():
        source = path.parent
        files = [path.name]
        samples, rejected = find_samples(source, files, modality_of, allow_2d=True, workers=1)

        # It may be a slice: the others of its series are among the files beside it.
        if samples and samples[0].kind == "dicom" and samples[0].modality in VOLUME_MODALITIES:
            files = sorted(entry.name for entry in os.scandir(source) if entry.is_file())
            found, left_out = find_samples(source, files, modality_of, allow_2d=True, workers=1)
            samples = [sample for sample in found if path.name in sample.files]
            rejected = {name: left_out[name] for name in left_out if name == path.name}
    else:
        raise UserError(f"{path}: no such file or folder")

    if not samples:
        # The reason that is told is that of a medical file, if there is any beside other files.
        answers = sorted(rejected.values(), key=lambda answer: answer.reason == UNKNOWN_FILE)
        raise UserError(f"{path}: {answers[0] if answers else 'holds no file that is read'}")
    if len(samples) > 1:
        names = ", ".join(sample.files[0] for sample in samples[:9])
        raise UserError(f"{path}: holds {len(samples)} samples; name one, {names}")
    return samples[0], source


def read_any(path, modality=None, likely=None, size=256, slices=64, frames=64):
    """One medical image, video or volume, read as for a cache -> modality, array (C, H, W, S).

    `path` is a file, any file of a DICOM series, or a folder that holds one series. Sizes must be
    those of the cache that the array is compared with (read_sizes).

    The array is uint8 in 0..255 from 8-bit sources, else float16 in [0, 1]; model.unit makes both
    float32 in [0, 1]. Of an image it is (1, size, size, 1), of an endoscopic one (3, size, size,
    1), of a video (3, size, size, frames), of a volume (1, size, size, slices).

    The modality, by which values are scaled, is `modality`, one of MODALITIES, else what a DICOM
    tag says, else `likely`, else what such files mostly are. A line on stderr says so where it was
    neither told nor tagged.

    UserError if there is no such file, or with the reason that prepare.py writes to rejected.csv:
    it cannot be decoded, is blank, or is a slice that is in no volume, as a scout is. Also if a
    folder holds several samples.
    """
    path = Path(path).absolute()
    sample, source = find_query(path, modality)
    if not sample.modality:
        usual = {"video": "endoscopy", "nifti": "ct"}.get(sample.kind, "xray")
        sample.modality = likely or usual
        print(f"{path}: taken as {sample.modality} (--modality says otherwise)", file=sys.stderr)

    def read(sample):
        return decode(sample, source, size, slices, frames)

    _, answer = next(run_in_workers(read, [sample], 1))
    if isinstance(answer, Rejected):
        raise UserError(f"{path}: {answer}")
    array, _ = answer
    return sample.modality, array


# ---- command line --------------------------------------------------------------------------------
def make_parser():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=DATASETS)
    add("source", nargs="?", metavar="SOURCE",
        help="folder that holds the data (demo: where to write them, default demo)")
    add("--out", default="cache", help="folder of the caches (default cache)")
    add("--name", help="name of this cache (default: the data set's)")
    add("--modality", help="folder: what the files are, where DICOM does not say it")
    add("--labels",
        help="folder: a table of path (from SOURCE on), labels (joined by |), if wanted patient, "
        "split, modality; or the word folders: the folder is the label. ct_rate, radgenome: "
        "folder of tables")
    add("--key-file", help="secret key of the ids, made if absent; give one for patients' data")
    add("--allow-2d", action="store_true", help="keep single CT and MR slices as images")
    meanings = {"size": "longer side, pixels", "slices": "of a volume", "frames": "of a video"}
    for name, meaning in meanings.items():
        defaults = f"default {SIZES[name]}, demo {DEMO_SIZES[name]}"
        add(f"--{name}", type=int, help=f"{meaning} ({defaults})")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)),
        help="processes (default: all cores)")
    add("--shard", metavar="I/N",
        help="make part I of N only, counted from 0; after the last, run once without it")
    add("--moved", action="store_true", help="SOURCE is a new place of the same data")
    add("--prune", action="store_true", help="delete arrays whose files are gone")
    return parser


def parse_arguments():
    """The command line, and what follows from it: own_files, folder, part (a slice)."""
    parser = make_parser()
    options = parser.parse_args()
    demo = options.dataset == "demo"
    options.own_files = options.dataset in ("folder", "demo")
    for name, default in (DEMO_SIZES if demo else SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if min(options.size, options.slices, options.frames, options.workers) < 1:
        parser.error("sizes and workers are at least 1")
    if options.modality and options.modality not in MODALITIES:
        parser.error(f"--modality {options.modality} is not known: {ABOUT_MODALITIES}")

    # The samples of a public data set are labelled by its own tables.
    if options.labels and options.dataset not in LABELLED_BY_FLAG:
        parser.error(f"--labels has no use with {options.dataset}, which has its own")
    if options.dataset != "folder" and (options.modality or options.allow_2d):
        parser.error("--modality and --allow-2d go with folder only")

    if demo and options.source is None:
        options.source = "demo"
    if options.source is None:
        parser.error("SOURCE is missing: the folder that holds the data")
    if options.name is None:
        options.name = options.dataset
    if options.name != os.path.basename(options.name) or options.name.startswith("."):
        parser.error("--name is a plain name; --out says where its folder lies")
    options.folder = Path(options.out, options.name)

    shard = re.fullmatch(r"(?P<part>\d+)/(?P<parts>\d+)", options.shard or "0/1")
    if not shard or int(shard["part"]) >= int(shard["parts"]):
        parser.error("--shard is I/N, and I counts from 0 to N - 1")
    if options.shard and options.prune:
        parser.error("--prune goes with the run without --shard, which knows all samples")
    options.part = slice(int(shard["part"]), None, int(shard["parts"]))
    return options


def make_recipe(options, key):
    """What a cache remembers once it holds a sample. Key and paths are hashes that tell nothing."""
    recipe = {"version": VERSION, "dataset": options.dataset}
    # The ids of own files depend on the name: under another one all would be made again.
    recipe["name"] = options.name if options.own_files else ""
    for name in SIZES:
        recipe[name] = getattr(options, name)
    recipe["key"] = pseudonym(key, "key")
    recipe["source"] = pseudonym(key, os.path.realpath(options.source))
    return recipe


def find_all(options):
    """All samples of the source, and {path: Rejected} of the files that are in none."""
    files, rejected = list_files(options.source)
    try:
        samples, left_out = DATASETS[options.dataset](options.source, files, options)
    except (KeyError, ValueError) as error:
        if options.own_files:
            raise
        # A table lacks a column, or has a word where a number belongs.
        raise UserError(f"{options.source}: not laid out as {options.dataset} is published "
                        f"({error!r})") from error
    rejected |= left_out

    taken = set()
    for sample in samples:
        taken.update(sample.files)
        if not sample.modality:
            for path in sample.files:
                rejected[path] = Rejected("modality unknown; give --modality")

    # No file of a known kind disappears without a word.
    for path in files:
        unexplained = path not in taken and path not in rejected
        if unexplained and kind_of(os.path.join(options.source, path)):
            rejected[path] = Rejected("not in the tables, not named as published, or a copy")
    if not samples and not rejected:
        raise UserError(f"{options.source}: holds no files of {options.dataset}")
    return samples, rejected


def name_samples(found, options, key):
    """Give samples their ids, and patients theirs -> those samples whose modality is known."""
    named = []
    for sample in found:
        sample.patient = pseudonym(key, sample.patient)
        if sample.modality:
            sample.id = possible_ids(sample, key, options.own_files)[sample.modality]
            named.append(sample)

    # The order of ids tells nothing, and gives each part of --shard files of every kind.
    return sorted(named, key=lambda sample: sample.id)


def last_change(paths):
    """When the newest of the files was written, copied or put in its place, in ns."""
    now = time.time_ns()
    latest = 0
    for path in paths:
        with suppress(OSError):  # it has vanished: reading it will say so
            for status in (os.stat(path), os.lstat(path)):  # of the file, and of a link to it
                for change in (status.st_mtime_ns, status.st_ctime_ns):
                    if change <= now:  # a wrong clock sets times to come
                        latest = max(latest, change)
    return latest


def is_outdated(sample, source, folder, made_at):
    """True if files of a sample have changed, come or gone since its array was made."""
    paths = [os.path.join(source, path) for path in sample.files]
    if last_change(paths) > made_at:
        return True
    may_have_several = sample.kind in ("series", "clip")
    return may_have_several and read_made(folder, sample.id).files != len(paths)


def remove_outdated(samples, options, key):
    """Delete the arrays of samples whose files have changed, or that were of another modality."""
    folder = options.folder
    made_at = {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    for sample in samples:
        for modality, name in possible_ids(sample, key, options.own_files).items():
            if name not in made_at:
                continue
            other = modality != sample.modality
            if other or is_outdated(sample, options.source, folder, made_at[name]):
                (folder / f"{name}.npy").unlink(missing_ok=True)


def make_arrays(samples, options):
    """Make the arrays that are missing -> {path: Rejected} of the files that cannot be read."""
    folder = options.folder
    sizes = {name: getattr(options, name) for name in SIZES}
    missing = [sample for sample in samples if not (folder / f"{sample.id}.npy").exists()]

    def save(sample):
        save_sample(sample, options.source, folder, sizes)

    rejected = {}
    answers = run_in_workers(save, missing, options.workers)
    for sample, answer in tqdm(answers, total=len(missing), unit="sample", desc=folder.name,
                               disable=not missing):
        if isinstance(answer, Rejected):
            for path in sample.files:  # of a series every slice
                rejected[path] = answer
    return rejected


def warn_of_losses(options, last, kept):
    """Say if samples or labels of the last tables (rows) are not among those kept now, and why."""
    ids = {sample.id for sample in kept}
    paths = {sample.files[0] for sample in kept}
    gone = [row for row in last if row["id"] not in ids and row["path"] not in paths]
    without_file = 0
    for row in gone:
        if not os.path.exists(os.path.join(options.source, row["path"])):
            without_file += 1

    labelled_before = sum(row["labels"] != () for row in last)
    labelled_now = sum(sample.labels != () for sample in kept)
    can_be_given = options.dataset in LABELLED_BY_FLAG
    forgotten = can_be_given and not options.labels and labelled_now < labelled_before
    if gone:
        if 2 * without_file > len(gone):
            reason = "so are their files"
        elif forgotten:
            reason = "that table had labels: was --labels forgotten?"
        else:
            reason = "rejected.csv says why"
        print(f"warning: {len(gone)} of the {len(last)} samples of the last table are gone; "
              f"{reason}")
    elif forgotten:
        print(f"warning: {labelled_before} samples of the last table had labels, {labelled_now} "
              "have some now: was --labels forgotten?")


def report(options, kept, rejected):
    """The closing lines, which quote no file; UserError if no sample was kept."""
    # Texts and tables lie in every archive: that reason comes after all others.
    reasons = Counter(answer.reason for answer in rejected.values())
    unknown = reasons.pop(UNKNOWN_FILE, 0)
    commonest = reasons.most_common(3)
    if unknown:
        commonest.append((UNKNOWN_FILE, unknown))
    if not kept:
        raise UserError(f"nothing in {options.source} could be read (mostly: {commonest[0][0]}); "
                        f"see {options.folder}/rejected.csv")

    noted = 0
    counts = Counter()
    for notes in kept.values():
        noted += len(notes) > 0
        counts.update(notes)
    if counts[BURNED_IN]:
        print(f"warning: {counts[BURNED_IN]} samples of DICOM files: each {BURNED_IN}")
    print(f"{options.folder}: {len(kept)} samples, {noted} with notes (sources.csv); "
          f"{len(rejected)} files left out (rejected.csv)")
    for note, count in counts.most_common(5):
        print(f"  {count} samples: {note}")
    for reason, count in commonest[:3]:
        print(f"  {count} files left out: {reason}")


def prune(options, samples, key):
    """Name the arrays that are of no sample in the source, and delete them if asked to.

    Arrays of samples whose modality is not known stay: --modality may be forgotten this time.
    """
    ids = set()
    for sample in samples:
        ids.update(possible_ids(sample, key, options.own_files).values())
    orphans = []
    for path in sorted(options.folder.glob("*.npy")):
        is_ours = re.fullmatch("[0-9a-f]{16}", path.stem)
        if is_ours and path.stem not in ids:
            orphans.append(path)
    if not orphans:
        return

    names = " ".join(path.stem for path in orphans[:20])
    if len(orphans) > 20:
        names += " ..."
    if options.prune:
        for path in orphans:
            path.unlink(missing_ok=True)
        print(f"deleted {len(orphans)} arrays of no file in {options.source}: {names}")
    else:
        print(f"warning: {len(orphans)} arrays are of no file in {options.source} (--prune "
              f"deletes them): {names}")


def main():
    options = parse_arguments()
    tqdm.monitor_interval = 0  # no thread beside the forks
    if options.dataset == "demo":
        # Phantoms, written as files and then read like any others. The tests make them too.
        from tests.phantoms import write_demo
        print(f"prepare.py demo --size {options.size} --slices {options.slices} "
              f"--frames {options.frames}")
        options.labels = write_demo(options.source)
    if not os.path.isdir(options.source):
        raise UserError(f"{options.source}: no such folder; give the folder that holds the data")
    key = read_key(options.key_file)
    recipe = make_recipe(options, key)
    check_recipe(options.folder, recipe, options.moved)

    found, rejected = find_all(options)
    if options.dataset == "folder" and not options.key_file:
        print("note: ids are made with a public key: anyone can test a guess; patients' data "
              "need --key-file")
    cache_key = key_of_cache(key, options.name, options.own_files)
    samples = name_samples(found, options, cache_key)

    # The recipe is there before the first array, whenever a run is killed.
    with atomic_write(options.folder / "recipe.json") as file:
        file.write(json.dumps(recipe).encode())
    part = samples[options.part]
    remove_outdated(part, options, cache_key)
    rejected |= make_arrays(part, options)
    if options.shard:
        print(f"{options.folder}: part {options.shard} is made; after the last part, run once "
              "without --shard")
        return

    last = read_last_tables(options.folder)
    kept = write_tables(options.folder, samples, rejected)
    warn_of_losses(options, last, [sample for sample in samples if sample.id in kept])
    report(options, kept, rejected)
    prune(options, found, cache_key)


if __name__ == "__main__":
    cli(main)
