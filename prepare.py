"""Turn medical image files and public data sets into a cache of small arrays (Sec. 3.1, 3.4, Appendix C).

In:  any folder of DICOM, NIfTI, PNG, JPEG, TIFF, GIF, AVI, MP4, MOV files, or a public data set as published.
Out: cache/NAME/ID.npy, (C, H, W, S): image (1 or 3, 256, 256, 1), video (3, 256, 256, 64), volume (1, 256,
     256, 64), uint8 (value / 255) from 8-bit sources, else float16 in [0, 1]; samples.csv says what each is,
     sources.csv where it came from, rejected.csv what was left out and why. Only the last two name files.
Volumes: H runs from anterior to posterior, W from the patient's right (image left) to left, S from feet up.

    python prepare.py folder /data/mr --name hospital_mr --modality mri --labels labels.csv --key-file my.key

A sample is done when its .npy exists: a run makes what is missing, then writes the tables. To make a sample
again, delete its .npy. Children decode the files, short of time and memory: no file can end or hang a run.
"""
import csv
import gc
import gzip
import hmac
import io
import json
import multiprocessing.connection
import os
import random
import re
import resource
import secrets
import signal
import sys
import tempfile
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from torch.utils.data import Dataset
from tqdm import tqdm

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
DICOM_MODALITIES = {"US": "ultrasound", "IVUS": "ultrasound", "ES": "endoscopy", "CT": "ct", "MR": "mri",
                    **dict.fromkeys(("CR", "DX", "DR", "RG", "MG", "RF", "XA", "PX", "IO"), "xray")}
VOLUMES = ("ct", "mri")  # their single-frame DICOM files are slices of a series
SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
SIZES = {"size": 256, "slices": 64, "frames": 64}  # Sec. 3.4; of 64 frames training draws 16, ever others
DEMO = {"size": 32, "slices": 4, "frames": 4, "source": "demo"}  # what `prepare.py demo` takes
HU_RANGE = (-1000.0, 1000.0)  # Sec. 3.4
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
MIN_SLICES, MIN_RUN = 8, 16  # CHOICE: fewer slices are no volume; frames of a Kvasir clip (Appendix C)
SECONDS, MEMORY = 60, 6 << 30  # that a sample may take, and 1 s per MB; bytes beyond the parent's own
PIXELS = 50_000_000  # of the largest image
PUBLIC_KEY = b"M3Ret public data"  # of public data: ids are the same wherever SOURCE is laid out so
VERSION = 3  # raise when the pixels of a cached sample change
VIDEO_OPTIONS = {"format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,asf,h264,hevc",
                 "protocol_whitelist": "file,pipe"}  # an .avi can be a script that opens other files
SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif"), "nifti": (".nii", ".nii.gz"),
            "video": (".avi", ".mp4", ".mov", ".mpg", ".mpeg", ".mkv", ".wmv", ".m4v", ".webm")}
UNKNOWN_FILE = "not a DICOM, NIfTI, image or video file"
BURNED_IN = "may show names or dates in its pixels (BurnedInAnnotation is not NO)"
# One future sample. files: relative to the source, one or the slices or frames; kind: image, video, nifti,
# dicom, series or clip; key: what the id is made of, where it is not the path; the last two: of one slice.
Sample = namedtuple("Sample", "files kind modality labels patient split key id place passes",
                 defaults=((), "", "", "", "", (), ()))


class UserError(Exception):
    """What a user can cause and mend: one line naming the file and the remedy."""


class Rejected(Exception):
    """Why one file is left out. What follows the first colon may quote the file: for rejected.csv only."""


class Note(UserWarning):
    """Something to know about a kept sample, for sources.csv; never quotes the file."""


def refuse(bad, reason):
    """Leave a file out if it is bad."""
    if bad:
        raise Rejected(reason)


def stop(bad, message):
    """End the run if it cannot go on."""
    if bad:
        raise UserError(message)


def cli(main):
    """Run main(). What a user can cause ends as one line on stderr and exit code 1, without a traceback."""
    try:
        return main()
    except (UserError, OSError) as error:  # from a loader process it comes as the last line of a traceback
        message = str(error).strip().split("\n")[-1].removeprefix("prepare.UserError: ")
    except torch.OutOfMemoryError:
        message = "out of GPU memory; train.py takes a smaller --batch-size"
    except KeyboardInterrupt:
        message = "interrupted; prepare.py and train.py go on from here, the same command again"
    # The error is gone by now, and with it the frames that held a progress bar: the bar has ended its line.
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


@contextmanager
def atomic_write(path, mode=0o666):
    """Yield a binary file that replaces `path` if the block ends well; UserError if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # its bytes are on the disk before its name is
        os.replace(temporary, path)  # whole or not at all
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}); free some space or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # of a block that failed


# ---- DICOM headers: what a file is, and which files are one volume -------------------------------
# Coarse parts of the body: the defined terms of BodyPartExamined (PS3.16 annex L), short forms and fillers.
BODY_PARTS = {
    "head": "HEAD BRAIN SKULL FACE ORBIT JAW MAXILLA NOSE EAR EYE IAC TMJ CEREBELLUM CIRCLEOFWILLIS SINUS",
    "neck": "NECK LARYNX PHARYNX THYROID CAROTID PAROTID", "breast": "BREAST", "hip": "HIP", "elbow": "ELBOW",
    "chest": "CHEST LUNG MEDIASTINUM BRONCHUS TRACHEA RIB STERNUM ESOPHAGUS THORAX CHES CHST CXR CAP TAP",
    "abdomen": "ABDOMEN LIVER KIDNEY PANCREAS SPLEEN STOMACH COLON GALLBLADDER ADRENAL BILEDUCT DUODENUM "
               "JEJUNUM ILEUM ABD ABDO AB KUB CAP TAP", "heart": "HEART CORONARYARTERY AORTA CARDIAC",
    "pelvis": "PELVIS BLADDER PROSTATE RECTUM UTERUS OVARY CERVIX SCROTUM ILIUM COCCYX PELV PEL CAP TAP",
    "cspine": "CSPINE CTSPINE CERVICALSPINE CERVICAL", "tspine": "TSPINE TLSPINE THORACICSPINE",
    "lspine": "LSPINE LSSPINE SSPINE LUMBARSPINE LUMBOSACRAL", "spine": "SPINE BACK", "thigh": "FEMUR THIGH",
    "shoulder": "SHOULDER SCAPULA AXILLA CLAVICLE", "upper arm": "HUMERUS ARM", "wrist": "WRIST",
    "forearm": "RADIUS ULNA RADIUSULNA FOREARM", "hand": "HAND FINGER THUMB", "knee": "KNEE PATELLA",
    "lower leg": "LEG TIBIA TIBIAFIBULA CALF", "ankle": "ANKLE", "foot": "FOOT TOE CALCANEUS",
    "": "AND TO AP PA LAT LATERAL LEFT RIGHT PORT PORTABLE CT MR XR CTA WITHOUT WITH CONTRAST"}
WORD = "|".join(sorted(" ".join(BODY_PARTS.values()).split(), key=len, reverse=True))
WORDS = re.compile(f"(?:{WORD})(?=(?:{WORD})*$)")  # a word, the longest after which only known words follow


def body_parts(*texts):
    """Coarse parts named by the first of the texts that consists of known words only, CHESTABDPELVIS too."""
    for text in texts:
        text = re.sub("[^A-Z0-9]+", "", str(text or "").upper())  # CHEST/ABD as CHESTABD
        words = WORDS.findall(text)  # CTABDOMEN is CT ABDOMEN, not CTA ...
        found = tuple(part for part, known in BODY_PARTS.items() if part and set(words) & set(known.split()))
        if found and "".join(words) == text:
            return found
    return ()


def open_dicom(path, **options):
    """pydicom.dcmread for files of any origin, those without a preamble included."""
    with open(path, "rb") as file:
        head = file.read(132)
    bare = head[128:] != b"DICM"
    refuse(bare and head[:2] not in (b"\x08\0", b"\2\0"), UNKNOWN_FILE)  # group 8 or 2, as data sets begin
    ds = pydicom.dcmread(path, force=bare, **options)
    if bare and "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.AllTransferSyntaxes[0 if ds.original_encoding[0] else 1]
    risky = ds.get("Modality") in ("US", "SC", "XA", "ES")  # where nothing is said
    if (ds.get("BurnedInAnnotation") or ("YES" if risky else "NO")) != "NO":
        warnings.warn(BURNED_IN, Note)
    return ds


PASS_TAGS = ("EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber",
             "ImageType", "AcquisitionTime", "ContentTime")  # what tells two slices of one place apart


def dicom_header(path, source="", modality=None, allow_2d=True):
    """The job of one DICOM file, by its header; a single CT or MR image is one of a stack of slices."""
    ds = open_dicom(os.path.join(source, path), stop_before_pixels=True)
    refuse(not ds.get("Rows") or not ds.get("Columns") or ds.get("Modality") in ("SEG", "RTDOSE"),
           f"no image ({pydicom.uid.UID(ds.get('SOPClassUID', '')).name})")
    refuse(ds.get("HighBit", ds.BitsStored - 1) != ds.BitsStored - 1, "HighBit is not BitsStored - 1")
    patient, uid, *passes = (str(ds.get(tag) or "") for tag in ("PatientID", "SeriesInstanceUID", *PASS_TAGS))
    texts = "BodyPartExamined", "ProtocolName", "SeriesDescription", "StudyDescription"
    modality = modality or DICOM_MODALITIES.get(str(ds.get("Modality")))
    job = Sample([path], "dicom", modality, body_parts(*map(ds.get, texts)), patient)
    if modality not in VOLUMES:
        return job
    refuse(re.search("LOCALIZER|SCOUT", str(ds.get("ImageType"))), "localizer")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        return job._replace(kind="series")  # an enhanced file
    refuse(not uid and not allow_2d, "no SeriesInstanceUID (0020,000E) (--allow-2d keeps it as an image)")
    direction, place = (tuple(round(float(x), 2) + 0.0 for x in ds.get(tag) or ()) for tag in (
        "ImageOrientationPatient", "ImagePositionPatient"))  # + 0.0, since -0.0 is another text
    stack = patient, uid or path, int(ds.Rows), int(ds.Columns), direction
    return job._replace(kind="slice", key=repr(stack), place=place, passes=passes)


def one_pass(slices):
    """Jobs of slices -> where they repeat places (echoes, b-values, phases), the most of one value of a tag,
    one a place. Copies, and what no tag tells apart, are left to read_series."""
    def places(group):
        return len({job.place for job in group})

    groups = defaultdict(list)  # {(tag, value): slices}
    for job in slices:
        for tag in zip(PASS_TAGS, job.passes):
            groups[tag].append(job)
    smaller = [group for group in groups.values() if len(group) < len(slices)]  # what splits them
    best = max(smaller, key=lambda group: (places(group), -len(group)), default=[])
    return one_pass(best) if places(slices) < len(slices) and places(best) >= MIN_SLICES else slices


# ---- find samples: which files make them, and (path, reason) of those left out ---------------------------
def walk(source):
    """Relative paths of the regular files below source, and (path, reason) of everything else."""
    files, left_out, folders = [], [], [""]
    for folder in folders:  # grows on the way
        for entry in sorted(os.scandir(os.path.join(source, folder)), key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out.append((path, "hidden, not read"))
            elif os.path.isfile(entry) and os.path.getsize(entry):
                files.append(path)
            elif (entry.is_dir(follow_symlinks=False) and os.access(entry, os.R_OK | os.X_OK)
                  and not (Path(entry, "recipe.json").exists() and any(Path(entry).glob("*.npy")))):
                folders.append(path)
            else:
                left_out.append((path, "empty, locked, no regular file, link to a folder or cache: not read"))
    return files, left_out


def read_csv(path, remedy="download or write it again", errors="replace", head=None):
    """Rows of a table with , or ; as dicts of stripped cells and their "line"; UserError if none."""
    stop(not os.path.isfile(path), f"{path}: no such file; {remedy}")
    try:
        text = Path(path).read_text("utf-8-sig", errors)
        comma = max(",;", key=text.partition("\n")[0].count)  # spreadsheets of half of Europe write ;
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma)
        head = ["line", *map(str.strip, head or next(lines, []))]
        rows = [dict(zip(head, [lines.line_num, *map(str.strip, row)])) for row in lines if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); {remedy}") from error
    stop(not rows, f"{path}: holds no rows; {remedy}")
    return rows


def read_labels(path):
    """labels.csv -> {path: row}, with `labels` as a tuple; UserError naming the line and what is wrong."""
    rows = {}
    for row in read_csv(path, errors="strict"):
        name, place = os.path.normpath(row.get("path", "")), f"{path}, line {row['line']}"
        split, modality = row.get("split", "").lower(), row.get("modality", "")
        stop(not {"path", "labels"} <= row.keys(), f"{place}: needs the columns path and labels")
        stop(name in rows, f"{place}: {name} again; one row says it all")
        stop(split not in ("", *SPLITS), f"{place}: split {row.get('split')!r} is none of train, val, test")
        stop(modality not in ("", *MODALITIES), f"{place}: modality {modality!r} is not known")
        labels = tuple(label.strip() for label in row["labels"].split("|") if label.strip())
        rows[name] = row | {"labels": labels, "split": SPLITS.get(split, "")}
    return rows


def kind_of(path):
    """image, nifti or video; "" where the name does not say it, as of most DICOM files."""
    return "".join(kind for kind, ends in SUFFIXES.items() if path.lower().endswith(ends))


def find_samples(source, files, allow_2d, workers, told):
    """Jobs of any mix of files, (path, reason) of the rest. told(path) is the modality a user gave, if any;
    that of a job is None where neither the user nor a DICOM header says it."""
    jobs = [Sample([path], kind_of(path), told(path)) for path in files if kind_of(path)]
    others = [path for path in files if not kind_of(path)]  # they may be DICOM
    left_out, stacks = [], defaultdict(list)  # {(patient, series ...): jobs of slices}
    answers = run_in_workers(lambda path: dicom_header(path, source, told(path), allow_2d), others, workers)
    for path, job in tqdm(answers, total=len(others), unit="header", disable=len(others) < 1000):
        if isinstance(job, Rejected):  # no image, or no DICOM file at all
            left_out.append((path, str(job)))
        elif job.kind == "slice":
            stacks[job.key].append(job)
        else:
            jobs.append(job)
    for slices in stacks.values():
        kept = one_pass(sorted(slices))
        if len(kept) >= MIN_SLICES:
            names = [job.files[0] for job in kept]
            jobs.append(kept[0]._replace(files=names, kind="series"))
            reason = "another echo, b-value, phase or time of a kept series"
            left_out += [(name, reason) for name in {job.files[0] for job in slices}.difference(names)]
        elif allow_2d:
            jobs += [job._replace(kind="dicom", key="") for job in slices]
        else:
            reason = f"{len(slices)} slices of this series, size and direction, a volume needs {MIN_SLICES}"
            left_out += [(job.files[0], f"{reason} (--allow-2d keeps each as an image)") for job in slices]
    return jobs, left_out


def folder(source, files, options):
    """Any tree of files; labels.csv goes before DICOM headers. A row names a file, any of a series, a folder.

    `--labels folders`: the name of its folder is a file's label, as torchvision's ImageFolder has it; folders
    named train, val, valid or test, above or below, are splits.
    """
    rows, jobs = {}, []
    if options.labels == "folders":
        for path in files:
            names = Path(path).parent.parts  # from SOURCE down
            splits = [SPLITS[name.lower()] for name in names if name.lower() in SPLITS]
            labels = [name for name in names if name.lower() not in SPLITS]
            rows[path] = {"labels": tuple(labels[-1:]), "split": "".join(splits[-1:])}
    elif options.labels:
        rows = read_labels(options.labels)
        files = [path for path in files if not os.path.samefile(os.path.join(source, path), options.labels)]
        names = {*files, *(os.path.dirname(path) or "." for path in files)}
        unused = [row["line"] for name, row in rows.items() if name not in names]
        if unused:
            print(f"warning: {len(unused)} rows of {options.labels} name no file (line {unused[0]} ...)")
    rows = {path: rows.get(path) or rows.get(os.path.dirname(path) or ".") or {} for path in files}
    found, left_out = find_samples(source, files, options.allow_2d, options.workers,
                                   lambda path: rows[path].get("modality") or options.modality)
    for job in found:
        row = next(filter(None, map(rows.get, job.files)), {})  # of a series the first file that has one
        jobs.append(job._replace(labels=row.get("labels", job.labels), split=row.get("split", ""),
                                 patient=row.get("patient") or job.patient))
    return jobs, left_out


# ---- public data sets, as published --------------------------------------------------------------
def table(folder, files, pattern, needed=True, **options):
    """Rows of the files below `folder` whose name matches; UserError if there must be one and is none."""
    found = [os.path.join(folder, path) for path in files if re.fullmatch(pattern, os.path.basename(path))]
    stop(needed and not found, f"{folder}: no file named like {pattern}; download all of the data set")
    return [row for path in found for row in read_csv(path, **options)]


# DEVIATION: the paper's 13 categories come from a language model, unpublished; ours hold as many videos, 364.
HYPER_KVASIR = {finding: (category,) for category, findings in {
    "polyps": "polyps", "dyed lifted polyps": "dyed lifted polyps", "BBPS 0-1": "bbps 0-1",
    "BBPS 2-3": "bbps 2-3", "dyed resection margins": "dyed resection margins", "ulcer": "ulcer",
    "polypectomy": "snare resection/clip placement", "cancer": "cancer/cancer, colorectal",
    "anastomosis": "anastomosis/cavity of anastomotic leak", "stent": "self-expanding stent",
    "colitis": "colitis", "landmark": "cecum/pylorus/retroflex stomach/z-line",
    "other pathology": "barrett's oesophagus/esophagitis/varices/gave/parasites/hemorrhoids"}.items()
    for finding in findings.split("/")}


def matched(source, files, pattern, kind):
    """[(path, row)] of the files of a kind whose name or stem is the first cell of a row of the table."""
    rows = {list(row.values())[1]: row for row in table(source, files, pattern)}  # after its "line"
    files = [path for path in files if kind_of(path) == kind]
    names = [(path, name) for path in files for name in (os.path.basename(path), Path(path).stem)]
    return [(path, rows.pop(name)) for path, name in names if name in rows]


def chestxray14(source, files, options):
    """images/*.png or images_001/images/*.png ...; labels by Data_Entry, split by the official lists."""
    pairs, jobs = matched(source, files, r"Data_Entry_2017.*\.csv", "image"), []
    parts = {row["name"]: part for part, listed in (("train", "train_val"), ("test", "test"))
             for row in table(source, files, rf"{listed}_list\.txt", head=["name"])}
    for path, row in pairs:
        labels = tuple(label for label in row["Finding Labels"].split("|") if label != "No Finding")
        split = parts.get(row["Image Index"], "")
        jobs.append(Sample([path], "image", "xray", labels, row["Patient ID"], split))
    return jobs, []


def fetal_planes(source, files, options):
    """Images/*.png; plane and patient by FETAL_PLANES_DB_data.csv. The task queries all of them: test."""
    return [Sample([path], "image", "ultrasound", (row["Plane"],), row["Patient_num"], "test")
            for path, row in matched(source, files, r"FETAL_PLANES_DB_data\.csv", "image")], []


def hyper_kvasir(source, files, options):
    """labeled-videos/**/UUID.avi; category by Finding 1 of video-labels.csv, none where no category fits."""
    return [Sample([path], "video", "endoscopy", HYPER_KVASIR.get(row["Finding 1"].lower(), ()), "", "test")
            for path, row in matched(source, files, r"video-labels\.csv", "video")], []


def kvasir_capsule(source, files, options):
    """CLASS/VIDEO_FRAME.jpg: runs of consecutive frames of one class in one video are clips (Appendix C).

    DEVIATION: the paper reports 344 clips; its rule as written gives 261 on the 11 larger classes.
    """
    frames, jobs = defaultdict(dict), []  # some frames are in two classes
    for path in files:
        name = re.fullmatch(r"([0-9a-f]{16})_(\d+)\.(jpg|png)", os.path.basename(path))
        if name:
            frames[Path(path).parent.name, name[1]][int(name[2])] = path
    stop(not frames, f"{source}: holds no CLASS/VIDEO_FRAME.jpg; unpack each *.tar.gz in its place first")
    for (label, video), numbered in sorted(frames.items()):
        numbers = np.array(sorted(numbered))  # 9 before 10
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
            paths = [numbered[number] for number in run.tolist()]
            jobs.append(Sample(paths, "clip", "endoscopy", (label,), video, "test"))
    return jobs, []


def ct_rate(source, files, options):
    """(train|valid)_fixed/**/*.nii.gz: one reconstruction of each scan; the tables may lie in --labels.

    The headers of *_fixed are true, elsewhere they are blank. RadGenome's task queries all of them: test.
    """
    beside = walk(options.labels)[0] if options.labels else []
    place = source, [*files, *(os.path.abspath(os.path.join(options.labels, path)) for path in beside)]
    labels, jobs, left_out, seen = chest_labels(place, options.dataset), [], [], set()
    for row in table(*place, r"no_chest_\w+\.txt", needed=False, head=["name"]):
        seen.add(os.path.basename(row["name"]).removesuffix(".nii.gz"))
    pattern = re.compile(r".*/(train|valid)_fixed/(?:.*/)?(((\1_\d+)_[a-z]+)_\d+)\.nii\.gz")
    for path in sorted(files, key=len):  # of a scan by number, _2 before _10
        name = pattern.fullmatch(os.path.abspath(os.path.join(source, path)))
        if name and not seen & {name[2], name[3]}:
            split, volume, scan, patient = name.groups()
            split = "train" if split == "train" and options.dataset == "ct_rate" else "test"
            jobs.append(Sample([path], "nifti", "ct", tuple(labels[volume]), patient, split))
            seen.add(scan)  # of a scan one volume is enough
        elif kind_of(path):
            left_out.append((path, "another reconstruction of a kept scan, no chest CT by its list, "
                             "or not of train_fixed or valid_fixed, whose headers are true"))
    return jobs, left_out


def chest_labels(place, dataset):
    """{volume: labels} by the tables of CT-RATE, finding:, and of RadGenome-ChestCT, status: and size:."""
    labels, status = defaultdict(dict), defaultdict(list)  # {volume: {label: None}}, {region: abnormal?}
    for row in table(*place, r"\w*predicted_labels\.csv", needed=dataset == "ct_rate"):
        volume, _ = row.pop("VolumeName").removesuffix(".nii.gz"), row.pop("line")
        labels[volume] |= {f"finding:{name}": None for name, value in row.items() if float(value or 0)}
    if dataset == "ct_rate":
        return labels
    for row in table(*place, r"(train|validation)_vqa_abnormality\.csv"):
        region = row["Volumename"].removesuffix(".nii.gz"), row["Anatomy"].split("/")[0]
        status[region].append(row["Abnormality"].lower() != "no findings")  # left and right lung are one
    for (volume, region), abnormal in status.items():
        labels[volume][f"status:{region}:{'abnormal' if any(abnormal) else 'normal'}"] = None
    for row in table(*place, r"(train|validation)_vqa_size\.csv"):
        size = re.match(r"[\d.]+(?:\s*[x-]\s*[\d.]+)*\s*(mm|cm)", row["Size"])  # "170 in" is an image number
        if size:
            mm = max(map(float, re.findall(r"\d+\.?\d*", size[0]))) * {"mm": 1, "cm": 10}[size[1]]
            what = f"{row['Anatomy'].split('/')[0]}:{row['Abnormality'].replace('|', '/')}:{mm:g}"
            labels[row["Volumename"].removesuffix(".nii.gz")][f"size:{what}"] = None
    return labels


DATASETS = dict(demo=folder, folder=folder, chestxray14=chestxray14, fetal_planes=fetal_planes,
                kvasir_capsule=kvasir_capsule, hyper_kvasir=hyper_kvasir, ct_rate=ct_rate, radgenome=ct_rate)


# ---- readers: frames (h, w[, 3]) and whether they are deeper than 8 bits, or a volume ----------------------
def image_frame(image):
    """An open Pillow image -> (h, w) or (h, w, 3), uint8, or float32 in [0, 1] if it is deeper."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bit grey; how many bits are used is not told
        x = np.asarray(image).astype(np.float32)  # (h, w)
        finite = np.isfinite(x)
        if not finite.all():
            warnings.warn("NaN or infinite pixels set to the background", Note)
            x = np.where(finite, x, x[finite].min() if finite.any() else 0)
        return x if image.mode == "F" and 0 <= x.min() <= x.max() <= 1 else normalize_percentiles(x)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def read_image(path, count=1, seed=0):
    """PNG, JPEG, TIFF or GIF; several pages are a video: `count` of them."""
    image = Image.open(path, formats=("PNG", "JPEG", "TIFF", "GIF"))
    size, deep = image.size, image.mode[0] in "IF"
    pages = [n for n, page in enumerate(ImageSequence.Iterator(image)) if page.size == size]  # no thumbnails
    one = len(pages) == 1 or image.format == "MPO"  # a photo and its previews
    chosen = [0] if one else sample_frames(len(pages), count, seed)
    return [image_frame(ImageSequence.Iterator(image)[pages[n]]) for n in chosen], deep


def read_video(source, count, seed):
    """AVI, MP4, MOV ... (or bytes) -> `count` frames (h, w, 3) uint8, in one pass if a length is told."""
    with iio.imopen(source, "r", plugin="pyav", options=VIDEO_OPTIONS, metadata_errors="ignore") as video:
        length = video.properties(index=...).n_images or sum(1 for _ in video.iter(thread_count=1))
        numbers, frames = sample_frames(length, count, seed), {}
        try:
            for n in sorted(set(numbers)):  # what lies between is decoded but not converted, the longer part
                frames[n] = video.read(index=n, constant_framerate=False, thread_count=1)
        except StopIteration:
            raise Rejected(f"damaged, ends before frame {n} of its {length}") from None
        return [frames[n] for n in numbers]


def read_nifti(path):
    """NIfTI-1 or 2, packed or not -> voxels (i, j, k), RAS+ affine in mm, slope, intercept."""
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data  # checks the CRC, nib.load does not
    second = data[4:7] == b"n+2"
    refuse(not second and data[344:347] != b"n+1", "not a NIfTI file (convert .hdr/.img pairs to .nii)")
    image = (nib.Nifti2Image if second else nib.Nifti1Image).from_bytes(data)
    shape, kind, proxy = image.shape, image.get_data_dtype(), image.dataobj  # (i, j[, k[, volumes]])
    usable = proxy.offset >= 348 and kind.kind in "iuf" and 2 <= len(shape) <= 4 and min(shape) > 0
    refuse(not usable, f"voxels of shape {shape} and type {kind} cannot be used")
    if shape[3:] not in ((), (1,)):
        warnings.warn("4D NIfTI: first volume kept", Note)
    voxels = np.ndarray(shape + (1,) * (4 - len(shape)), kind, data, int(proxy.offset), order="F")
    return voxels[..., 0], image.affine, proxy.slope, proxy.inter


def per_frame(ds, frame, tag, default=None):
    """A value of one frame: its functional group, else the shared one, else the data set (PS3.3 C.7.6.16)."""
    own = ds.get("PerFrameFunctionalGroupsSequence", [])[frame:frame + 1]
    macros = [macro for item in (*own, *ds.get("SharedFunctionalGroupsSequence", [])) for macro in item]
    groups = [group for macro in macros if macro.VR == "SQ" for group in macro.value]
    values = (place.get(tag) for place in (*groups, ds))  # the first that is there
    return next((value for value in values if value not in (None, "")), default)


def rescale(ds, frame, stored):
    """Slope and intercept to the unit of the file, HU for CT; where it is padding (PS3.3 C.7.5.1.1.2)."""
    pair = np.float32([per_frame(ds, frame, "RescaleSlope", 1), per_frame(ds, frame, "RescaleIntercept", 0)])
    refuse(not np.isfinite(pair).all(), "rescale is not finite")
    ends = [ds.get(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [int(end) for end in ends if end not in (None, "")] or [np.inf]  # no value is infinite
    return *pair, (stored >= min(ends)) & (stored <= max(ends))


def dicom_frame(ds, frame, modality):
    """One frame -> (h, w[, 3]) in [0, 1]: colour as RGB, CT by HU_RANGE, X-ray as displayed, MR stretched."""
    stored, full = pixel_array(ds, index=frame), np.float32((1 << ds.BitsStored) - 1)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        stored, full = apply_color_lut(stored, ds), np.float32(65535)  # (h, w, 3)
    if stored.ndim == 3:
        return stored / full  # (h, w, 3)
    slope, intercept, outside = rescale(ds, frame, stored)
    lut = ds.get("ModalityLUTSequence")  # goes before slope and intercept
    x = (apply_modality_lut(stored, ds) if lut else stored * slope + intercept).astype(np.float32)  # (h, w)
    shown, width = np.zeros_like(x), np.atleast_1d(ds.get("WindowWidth") or 0)[0]  # some hold an empty one
    windowed = ds.get("VOILUTSequence") or ds.get("WindowCenter") is not None and float(width or 0) >= 1
    if modality == "xray" and windowed:  # PS3.3 C.11.2; two appended extremes come back as black and white
        padded = np.append(x, np.float32([-2 ** 16, 2 ** 16 - 1]))  # (h w + 2,)
        padded = apply_voi_lut(padded.astype(np.int32) if ds.get("VOILUTSequence") else padded, ds)
        shown = ((padded[:-2] - padded[-2]) / (padded[-1] - padded[-2])).reshape(x.shape)
    if modality == "ct":
        x = (np.clip(x, *HU_RANGE) - HU_RANGE[0]) / (HU_RANGE[1] - HU_RANGE[0])
    elif not outside.all() and np.ptp(shown[~outside]) > 0:  # a window that shows nothing is a wrong one
        x = shown
    elif modality != "mri" and ds.BitsStored <= 8 and not ds.PixelRepresentation:
        x = stored / full  # 8 bits as they are
    else:
        x = normalize_percentiles(x, ~outside)
    if modality != "ct" and ds.PhotometricInterpretation == "MONOCHROME1":  # HU are never inverted
        warnings.warn("MONOCHROME1: inverted", Note)
        x = 1 - x
    return np.where(outside, 0, x).astype(np.float32)


def read_dicom(path, modality, count, seed):
    """A DICOM file -> one or `count` frames (h, w[, 3]) in [0, 1], deeper than 8 bits?, size of a pixel."""
    ds, spacing = open_dicom(path), (1.0, 1.0)  # of the size only the ratio counts, in whatever unit it is
    if "PixelData" in ds and ds.file_meta.TransferSyntaxUID.startswith("1.2.840.10008.1.2.4.10"):  # MPEG
        stream = b"".join(list(pydicom.encaps.generate_fragments(ds.PixelData))[1:])  # after the offset table
        return read_video(stream, count, seed), False, spacing
    for tag in ("PixelAspectRatio", "ImagerPixelSpacing", "PixelSpacing"):  # the last that is there counts
        values = np.array(per_frame(ds, 0, tag, ()), float)
        if values.shape == (2,) and 0 < values.min() <= values.max() < np.inf:
            spacing = tuple(values)
    frames = int(ds.get("NumberOfFrames") or 1)
    chosen = sample_frames(frames, count, seed) if frames > 1 else [0]  # one frame is an image
    return [dicom_frame(ds, frame, modality) for frame in chosen], ds.BitsStored > 8, spacing


def read_series(files, modality):
    """A DICOM series, or one multi-frame file -> voxels (i, j, k), RAS+ affine in mm, slope, intercept.

    Slices are sorted by their position along the normal, never by name or number (PS3.3 C.7.6.2.1.1). Of
    copies one is kept; two different slices at one place, or a gap, are refused: a wrong anatomy.
    """
    planes, places, scales = [], [], []  # (rows, columns), 6 + 2 + 3 numbers, 2 numbers of each slice
    for path in files:
        try:
            ds = open_dicom(path)
            stored = pixel_array(ds).reshape(-1, ds.Rows, ds.Columns)  # (frames, rows, columns)
        except BaseException as error:  # decoders raise all there is; this is a guarded child
            raise Rejected(f"a slice is damaged: {Path(path).name}, {type(error).__name__} {error}") from error
        sign = -1 if ds.PhotometricInterpretation == "MONOCHROME1" and modality != "ct" else 1
        for n, plane in enumerate(stored):
            place = [per_frame(ds, n, tag) for tag in (
                "ImageOrientationPatient", "PixelSpacing", "ImagePositionPatient")]
            refuse(None in place, "no ImageOrientationPatient, PixelSpacing or ImagePositionPatient")
            places.append([float(value) for values in place for value in values])
            slope, intercept, outside = rescale(ds, n, plane)
            if outside.any() and not outside.all():  # padding becomes the lowest value, or 0
                plane = np.where(outside, min(plane[~outside].min(), np.array(0, plane.dtype)), plane)
            planes.append(plane)
            scales.append((sign * slope, sign * intercept))
    places = np.array(places)  # (n, 6 + 2 + 3)
    along_row, along_column, (row_mm, column_mm) = places[0, :3], places[0, 3:6], places[0, 6:8]
    corners = places[:, 8:]  # (n, 3) mm
    z = (corners @ np.cross(along_row, along_column)).round(2)  # (n,) mm along the normal
    z, order, which = np.unique(z, return_index=True, return_inverse=True)  # (k,), (k,), (n,)
    if len(order) < len(planes):
        same = all(np.array_equal(plane, planes[order[at]]) for plane, at in zip(planes, which))
        refuse(not same, "two different slices at one position")
        warnings.warn("duplicate slices dropped", Note)
    refuse(len(order) < MIN_SLICES or np.ptp(places[:, :8], axis=0).max() > 1e-2,
           f"{len(order)} slices, a volume needs {MIN_SLICES} of one direction and spacing")
    gaps, usual = np.diff(z), np.median(np.diff(z))  # mm
    at = np.abs(gaps - usual).argmax()
    refuse(abs(gaps[at] - usual) > max(0.05 * usual, 0.1),
           f"gap of {gaps[at]:.1f} mm after slice {at + 1} of {len(order)}, others {usual:.1f} mm")
    affine = np.eye(4)  # between the first slice and the last, so that a tilted gantry stays as it is
    affine[:3, 2] = (corners[order[-1]] - corners[order[0]]) / (len(order) - 1)
    affine[:3, [0, 1, 3]] = np.transpose([along_row * column_mm, along_column * row_mm, corners[order[0]]])
    affine = np.diag([-1, -1, 1, 1]) @ affine  # DICOM counts to the left and back, RAS+ does not
    if len(set(scales)) > 1:  # PET and some MR change it from slice to slice
        planes = [plane.astype(np.float32) * a + b for plane, (a, b) in zip(planes, scales)]
        scales = [(1.0, 0.0)]
    return np.stack([planes[i] for i in order]).transpose(2, 1, 0), affine, *scales[0]  # (columns, rows, k)


# ---- pixels: everything becomes float32 in [0, 1], then (C, H, W, S) ---------------------------------------
def normalize_percentiles(x, valid=...):
    """The 0.5 to 99.5 percentile of x (of its valid part) becomes [0, 1]."""
    low, high = np.percentile(x[valid], (0.5, 99.5)) if x[valid].size else (0, 1)
    return np.clip((x - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def resize(x, size, spacing=(1.0, 1.0)):
    """Planes (S, C, H, W) -> (S, C, h, w), antialiased: longer side in mm to `size` (Sec. 3.4)."""
    sides = [length * mm for length, mm in zip(x.shape[-2:], spacing)]
    h, w = (max(1, round(side * size / max(sides))) for side in sides)
    return F.interpolate(x, (h, w), mode="bilinear", antialias=True)  # (S, C, h, w)


def pad(x, size):
    """(S, C, h, w) -> (C, size, size, S), centred in zeros (Sec. 3.4)."""
    top, left = (size - x.shape[2]) // 2, (size - x.shape[3]) // 2
    x = F.pad(x, (left, size - x.shape[3] - left, top, size - x.shape[2] - top))  # (S, C, size, size)
    return x.permute(1, 2, 3, 0)  # (C, size, size, S)


def frames_to_array(frames, colour, size, spacing):
    """Frames (h, w[, 3]), float32 in [0, 1] or uint8 -> (3 if colour else 1, size, size, frames)."""
    refuse(min(x.min() for x in frames) == max(x.max() for x in frames), "blank, one value only")
    planes = []
    for frame in frames:
        frame = frame.astype(np.float32) / 255 if frame.dtype == np.uint8 else frame
        frame = frame @ LUMA if frame.ndim == 3 and not colour else frame  # (h, w) or (h, w, 3)
        frame = np.ascontiguousarray(np.atleast_3d(frame).transpose(2, 0, 1))  # (1 or 3, h, w)
        planes.append(pad(resize(torch.from_numpy(frame)[None], size, spacing), size))  # (C, size, size, 1)
    return torch.cat(planes, dim=3).expand(3 if colour else 1, -1, -1, -1)  # (C, size, size, S)


def volume_to_array(voxels, affine, slope, intercept, modality, size, slices):
    """Voxels (i, j, k) with a RAS+ affine in mm -> (1, size, size, slices), oriented as the file header says.

    CT is clipped to HU_RANGE before any averaging, other volumes are stretched by percentiles at the end.
    """
    axes = nib.io_orientation(affine)  # (3, 2): along which axis of the body i, j, k run, and which way
    refuse(np.isnan(axes).any(), "singular affine, the header gives no orientation")
    to_lps = nib.orientations.ornt_transform(axes, nib.orientations.axcodes2ornt("LPS"))
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(-to_lps[:, 0])]  # mm along S, H, W
    voxels = nib.apply_orientation(voxels, to_lps).T  # (S, H, W), a view
    if 1 in voxels.shape:  # a single slice of any direction is an image, head up
        thin = voxels.shape.index(1)
        voxels = np.moveaxis(voxels, thin, 0)[:, ::-1 if thin else 1]  # (1, rows, columns)
        slices, spacing = 1, np.r_[spacing[thin], np.delete(spacing, thin)]
    low, high = HU_RANGE if modality == "ct" else (-np.inf, np.inf)  # only HU are clipped
    eye = torch.eye(len(voxels))[None, None]  # antialiased: plain interpolation skips some of many slices
    weights = F.interpolate(eye, (slices, len(voxels)), mode="bilinear", antialias=True)[0, 0]  # (slices, S)
    planes = []
    for row in weights:  # (S,): a weighted mean of a few slices, which are all that is in memory as floats
        first, last = row.nonzero()[[0, -1], 0].tolist()
        x = torch.from_numpy(np.ascontiguousarray(voxels[first:last + 1], np.float32))  # (few, H, W)
        x = x.mul_(slope).add_(intercept)  # HU for CT
        if voxels.dtype.kind == "f" and not x.sum().isfinite():
            warnings.warn("NaN or infinite voxels set to the background", Note)
            x = torch.where(x.isfinite(), x, low if modality == "ct" else 0.0)
        x = torch.tensordot(row[first:last + 1], x.clamp_(low, high), dims=1)  # (H, W)
        planes.append(resize(x[None, None], size, spacing[1:]))  # (1, 1, h, w)
    x = torch.cat(planes)  # (slices, 1, h, w)
    refuse(x.max() - x.min() <= 1e-5 * x.abs().max(), "blank, no voxel has a value, or all the same")
    x = (x - low) / (high - low) if modality == "ct" else torch.from_numpy(normalize_percentiles(x.numpy()))
    return pad(x, size)  # (1, size, size, slices)


def sample_frames(n, k, seed):
    """k of n places at random, in order (Sec. 3.4); too few are repeated evenly."""
    if n < k:
        warnings.warn("fewer frames than asked for: repeated evenly", Note)
        return [i * n // k for i in range(k)]
    return sorted(random.Random(seed).sample(range(n), k))


# ---- one sample, decoded in a guarded child ----------------------------------------------------------------
def decode(job, source, size, slices, frames):
    """Read a job -> array (C, H, W, S), uint8 from 8-bit sources and float16 from deeper ones, and notes."""
    files = [os.path.join(source, path) for path in job.files]
    signal.alarm(SECONDS + sum(map(os.path.getsize, files)) // 1_000_000)  # a large one may take longer
    seed, deep, spacing = int(job.id, 16), False, (1.0, 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if job.kind in ("nifti", "series"):  # a volume
            voxels, *where = read_nifti(files[0]) if job.kind == "nifti" else read_series(files, job.modality)
            x, deep = volume_to_array(voxels, *where, job.modality, size, slices), voxels.itemsize > 1
        else:
            if job.kind == "image":
                planes, deep = read_image(files[0], frames, seed)
            elif job.kind == "video":
                planes = read_video(files[0], frames, seed)
            elif job.kind == "dicom":
                planes, deep, spacing = read_dicom(files[0], job.modality, frames, seed)
            else:
                refuse(len(files) < MIN_RUN, f"in a run of {len(files)} frames, a clip needs {MIN_RUN}")
                planes = [read_image(files[n])[0][0] for n in sample_frames(len(files), frames, seed)]
            x = frames_to_array(planes, len(planes) > 1 or job.modality == "endoscopy", size, spacing)
    x = x.clamp(0, 1).half() if deep else x.mul(255).round().clamp(0, 255).byte()  # (C, H, W, S)
    return x.numpy(), sorted({str(note.message) for note in caught if note.category is Note})


def cache_sample(job, source, folder, recipe):
    """Make folder/ID.npy of a job, and first ID.txt: the modality it was made as, and notes."""
    refuse(not job.modality, "modality unknown; give --modality")
    array, notes = decode(job, source, **{name: recipe[name] for name in SIZES})
    if not (folder / "recipe.json").exists():  # from its first sample on a cache is of one recipe
        with atomic_write(folder / "recipe.json") as file:
            file.write(json.dumps(recipe).encode())
    with atomic_write(folder / f"{job.id}.txt") as file:
        file.write("; ".join([job.modality, *notes]).encode())
    with atomic_write(folder / f"{job.id}.npy") as file:  # last: it says that the sample is done
        np.save(file, array, allow_pickle=False)


def worker_loop(task, batch, reader, writer):
    """In a child: send task(item) of each item, or why there is none; short of time and memory."""
    reader.close()  # the parent's alone, so that the next answer of an orphan ends it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders print what files say
    os.dup2(1, 2)
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the default action ends a native hang as well
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")  # by torch
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    torch.set_num_threads(1)  # the processes share the cores
    # imageio collects garbage at the end of every video: 50 ms, unless what was imported is left out of it.
    gc.freeze()
    Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow warns from here, and refuses from twice as many
    for item in batch:
        signal.alarm(SECONDS)  # decode sets its own
        try:
            answer = task(item)
        except (Rejected, UserError) as error:  # a UserError: the cache cannot be written
            answer = type(error)(*error.args)  # without its frames, which hold the pixels
        except BaseException as error:  # decoders raise all there is, KeyboardInterrupt included
            answer = Rejected(f"cannot be decoded: {type(error).__name__} {error}")
        signal.alarm(0)  # the parent may take its time
        writer.send(answer)


def run_in_workers(task, items, workers):
    """Yield (item, task(item)), or (item, Rejected), in any order. No file can end or hang the run: the rest
    of a batch whose child died gets another; what a fresh child dies of is refused. A UserError ends all."""
    step = max(1, min(256, len(items) // (8 * workers)))  # a fork costs as much as a few images
    waiting = [items[i:i + step] for i in range(0, len(items), step)]  # batches
    fork, running = multiprocessing.get_context("fork"), {}
    while waiting or running:
        while waiting and len(running) < workers:
            batch, (reader, writer) = waiting.pop(0), fork.Pipe(duplex=False)
            child = fork.Process(target=worker_loop, args=(task, batch, reader, writer), daemon=True)
            child.start()
            writer.close()
            running[reader] = child, batch, len(batch)
        for reader in multiprocessing.connection.wait(list(running)):
            child, batch, size = running[reader]
            try:
                answer = reader.recv()
            except EOFError:  # it has ended, or died of the item at work, or of what one before it did
                del running[reader]
                child.join()
                waiting += [batch] if batch else []
                if not batch or len(batch) < size:
                    continue
                cause = "timed out" if child.exitcode == -signal.SIGALRM else "decoder crashed"
                answer = Rejected(f"{cause} (exit code {child.exitcode})")
            stop(isinstance(answer, UserError), answer)
            yield batch.pop(0), answer


# ---- the cache ---------------------------------------------------------------------------------------------
def pseudonym(key, text):
    """16 hex digits of HMAC-SHA256, "" of nothing."""
    return hmac.digest(key, os.fsencode(text), "sha256").hex()[:16] if text else ""


def read_key(path):
    """The bytes of a key file, made with random ones if it does not exist; else the public key."""
    if not path:
        return PUBLIC_KEY
    if not os.path.lexists(path):
        folder = Path(path).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as new, suppress(FileExistsError):
            new.write(secrets.token_hex(32).encode())
            new.flush()
            os.fsync(new.fileno())
            os.link(new.name, path)  # whole, mode 0600; runs that start together take the first's
            print(f"made the new key {path}: keep it, and keep it apart from the cache")
    key = Path(path).read_bytes().strip() if os.path.isfile(path) else b""
    stop(len(key) < 16, f"{path}: no file of at least 16 bytes; name one that does not exist to have it made")
    return key


def read_recipe(folder):
    """What a cache was made with: its sizes, and all else that must not change."""
    try:
        recipe = json.loads(Path(folder, "recipe.json").read_bytes())
        return recipe | {name: int(recipe[name]) for name in SIZES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/recipe.json: missing or damaged; make the cache again") from error


def read_sizes(folder):
    """{"size", "slices", "frames"} that a cache was made with."""
    recipe = read_recipe(folder)
    return {name: recipe[name] for name in SIZES}


def write_csv(path, header, rows, mode=0o666):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header.split(), *rows])
    with atomic_write(path, mode) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def write_tables(folder, jobs, left_out):
    """samples.csv of the arrays there are, and what only their owner may see -> notes, {path: reason}."""
    samples, sources, rejected = [], [], dict(sorted(left_out))
    for job in jobs:
        path, beside = folder / f"{job.id}.npy", folder / f"{job.id}.txt"
        if job.modality and path.exists():
            shape = "x".join(map(str, load_sample(folder, {"id": job.id}, mmap_mode="r").shape))  # C, H, W, S
            samples.append((job.id, job.modality, "|".join(job.labels), job.patient, job.split, shape))
            sources.append((job.id, job.files[0], beside.read_text().partition("; ")[2]))
    write_csv(folder / "samples.csv", "id modality labels patient split shape", samples)
    write_csv(folder / "sources.csv", "id path notes", sources, 0o600)
    write_csv(folder / "rejected.csv", "path reason", rejected.items(), 0o600)
    return [notes for *_, notes in sources], rejected


def read_samples(folder):
    """Rows of samples.csv as dicts: id, modality, labels (tuple), patient, split, shape (4 ints), folder."""
    path, rows = Path(folder, "samples.csv"), {}
    for row in read_csv(path, "make the cache with prepare.py"):
        line, name = row.pop("line"), row.get("id", "")
        shape = re.fullmatch("([1-9][0-9]*)" + "x([1-9][0-9]*)" * 3, row.get("shape", ""))
        whole = {"modality", "labels", "patient", "split"} <= row.keys()
        stop(not shape or not whole or not re.fullmatch("[0-9a-f]{16}", name) or name in rows,
             f"{path}, line {line}: not as prepare.py wrote it; run it again")
        labels = tuple(filter(None, row["labels"].split("|")))
        rows[name] = row | {"labels": labels, "shape": tuple(map(int, shape.groups())), "folder": str(folder)}
    return list(rows.values())


def load_sample(folder, row, **options):
    """The cached array (C, H, W, S), uint8 or float16, of a row of read_samples; UserError if it is not."""
    path = Path(folder, f"{row['id']}.npy")
    try:
        array = np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError):
        array = np.empty(0)
    known = array.dtype in (np.uint8, np.float16) and array.ndim == 4
    stop(not known or array.shape != row.get("shape", array.shape),
         f"{path}: not the array of samples.csv; delete it and run prepare.py again")
    return array


class CachedDataset(Dataset):
    """Rows of read_samples, of any folders, as tensors (C, H, W, S), uint8 or float16 as stored."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.from_numpy(load_sample(self.rows[index]["folder"], self.rows[index]))  # (C, H, W, S)


def read_any(path, modality=None, likely=None, size=256, slices=64, frames=64):
    """(modality, array (C, H, W, S)) of a file, any file of a series or a series folder, read as for a cache.

    The modality is `modality`, else what a DICOM tag says, else `likely`, else what such files mostly are; a
    line on stderr says so where it was neither told nor tagged. UserError if it is not one readable sample.
    """
    path = Path(path).absolute()
    single, source = path.is_file(), path if path.is_dir() else path.parent
    stop(not single and not path.is_dir(), f"{path}: no such file or folder")
    files, how = [path.name] if single else walk(path)[0], (single, 1, lambda _: modality)
    jobs, left_out = find_samples(source, files, *how)
    if single and jobs and jobs[0].kind == "dicom" and jobs[0].modality in VOLUMES:  # of which series?
        files = sorted(entry.name for entry in os.scandir(source) if entry.is_file())
        jobs = [job for job in find_samples(source, files, *how)[0] if path.name in job.files]
    reason = left_out[0][1] if left_out and not jobs else f"holds {len(jobs)} samples; name one"
    stop(len(jobs) != 1, ", ".join([f"{path}: {reason}", *(job.files[0] for job in jobs[:9])]))
    job = jobs[0]
    told = job.modality or likely or {"video": "endoscopy", "nifti": "ct"}.get(job.kind, "xray")
    if not job.modality:
        print(f"{path}: taken as {told} (--modality says otherwise)", file=sys.stderr)
    job = job._replace(id=pseudonym(PUBLIC_KEY, path.name), modality=told)
    _, answer = next(run_in_workers(lambda job: decode(job, source, size, slices, frames), [job], 1))
    stop(isinstance(answer, Rejected), f"{path}: {answer}")
    return told, answer[0]


# ---- command line ------------------------------------------------------------------------------------------
def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=DATASETS)
    add("source", nargs="?", help="folder that holds the data (demo: where to write them, default demo)")
    add("--out", default="cache", help="folder of the caches (default cache)")
    add("--name", help="name of this cache (default: the data set's)")
    add("--modality", choices=MODALITIES, help="folder: what the files are, where DICOM does not say it")
    add("--labels", help="folder: a table of path (from SOURCE on), labels (joined by |), if wanted patient, "
        "split, modality; or the word folders: the folder is the label. ct_rate, radgenome: folder of tables")
    add("--key-file", help="secret key of the ids, made if absent; give one for patients' data")
    add("--allow-2d", action="store_true", help="keep single CT and MR slices as images")
    for name, what in (("size", "longer side, pixels"), ("slices", "of a volume"), ("frames", "of a video")):
        add(f"--{name}", type=int, help=f"{what} (default {SIZES[name]}, demo {DEMO[name]})")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    add("--shard", default="", help="i/n: make part i of n only; after the last, run once without it")
    demo = parser.parse_known_args()[0].dataset == "demo"
    parser.set_defaults(**(DEMO if demo else SIZES | {"source": "SOURCE"}))
    options = parser.parse_args()
    name, part = options.name or options.dataset, re.fullmatch(r"(\d+)/(\d+)", options.shard or "0/1")
    if min(options.size, options.slices, options.frames, options.workers) < 1:
        parser.error("sizes and workers are at least 1")
    if name != os.path.basename(name) or name.startswith("."):
        parser.error("--name is a plain name; --out says where its folder lies")
    if not part or not int(part[1]) <= int(part[2]) != 0:
        parser.error("--shard is i/n, counted from 0 or from 1")
    return options, Path(options.out, name), slice(int(part[1]) % int(part[2]), None, int(part[2]))


def main():
    options, target, part = parse_arguments()
    tqdm.monitor_interval = 0  # no thread beside the forks
    source, sizes = options.source, {name: getattr(options, name) for name in SIZES}
    if options.dataset == "demo":  # phantoms, written as real files and then read like any others
        from tests.phantoms import write_demo  # the tests' own files, which only the demo needs
        print("prepare.py demo", *(f"--{name} {value}" for name, value in sizes.items()))
        options.labels = write_demo(source)  # a table like anyone's
    stop(not os.path.isdir(source), f"{source}: no such folder; give the folder that holds the data")
    key = read_key(options.key_file)  # of all ids and patients
    recipe = sizes | {"version": VERSION, "dataset": options.dataset, "another key": pseudonym(key, "key"),
                      "another source": pseudonym(key, os.path.realpath(source))}
    made = read_recipe(target) if (target / "recipe.json").exists() else recipe  # no sample was kept yet
    differs = [f"{name} {made.get(name)}" for name in recipe if made.get(name) != recipe[name]]
    stop(differs, f"{target} was made with {', '.join(differs)}; give the same, or another --name")
    files, left_out = walk(source)
    try:
        jobs, others = DATASETS[options.dataset](source, files, options)
    except (LookupError, ValueError) as error:
        raise UserError(f"{source}: not laid out as {options.dataset} is published ({error!r})") from error
    left_out += others
    known = {path for job in jobs for path in job.files}.union(dict(left_out))  # no file disappears
    left_out += [(path, "no sample by its name and the data set's tables, or twice here")
                 for path in files if kind_of(path) and path not in known]
    stop(not jobs and not left_out, f"{source}: holds no files of {options.dataset}")
    if options.dataset == "folder" and not options.key_file:
        print("note: ids are made with a public key: anyone can test a guess; patients' data need --key-file")
    jobs = [job._replace(id=pseudonym(key, job.key or job.files[0]), patient=pseudonym(key, job.patient))
            for job in jobs]
    jobs.sort(key=lambda job: job.id)  # an order that tells nothing, and shards of any kind of file
    for job in jobs[part]:
        beside = target / f"{job.id}.txt"
        if job.modality and beside.exists() and beside.read_text().partition("; ")[0] != job.modality:
            (target / f"{job.id}.npy").unlink(missing_ok=True)  # windowed as another
    todo = [job for job in jobs[part] if not job.modality or not (target / f"{job.id}.npy").exists()]
    answers = run_in_workers(lambda job: cache_sample(job, source, target, recipe), todo, options.workers)
    for job, answer in tqdm(answers, total=len(todo), unit="sample", desc=target.name, disable=not todo):
        left_out += [(path, str(answer)) for path in job.files if answer]  # of a refused series every slice
    if options.shard:
        print(f"{target}: part {options.shard} is made; after the last part, run once without --shard")
        return
    notes, rejected = write_tables(target, jobs, left_out)
    burned = sum(BURNED_IN in note for note in notes)
    if burned:
        print(f"warning: {burned} samples of DICOM files: each {BURNED_IN}")
    print(f"{target}: {len(notes)} samples, {sum(map(bool, notes))} with notes (sources.csv); "
          f"{len(rejected)} files left out (rejected.csv)")
    if not notes:  # the commonest reason, if possible of files of a known kind; without what a file says
        reasons = Counter(reason.partition(":")[0] for reason in rejected.values())
        reason = max(reasons, key=lambda reason: (reason != UNKNOWN_FILE, reasons[reason]))
        raise UserError(f"nothing in {source} could be read (mostly: {reason}); see {target}/rejected.csv")


if __name__ == "__main__":
    cli(main)
