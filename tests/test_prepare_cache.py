"""prepare.py: bad inputs, workers, privacy, resume, labels, public layouts and what a cache remembers."""
import csv
import faulthandler
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import (ROOT, SPOT, WHEEL, command, cut, dicom, load, nifti, phantom, png,
                      prepare_main, series, video)
from PIL import Image

import prepare
from prepare import UserError, read_any, read_samples
from tests import phantoms


# ---- bad inputs, each with its reason ------------------------------------------------------------
def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def nifti_with(path, **fields):
    header = nib.Nifti1Header()
    header.set_data_shape((10, 10, 10))
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"], header["sform_code"] = 352, b"n+1", 1
    header["srow_x"], header["srow_y"], header["srow_z"] = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + bytes(4) + np.arange(1000, dtype="<i2").tobytes())


def png_claiming(path, side):
    """A PNG of side x side pixels in a few bytes: the image decompression bomb."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(bytes((side + 1) * 16))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def deflated_bomb(path):
    ds = pydicom.dcmread(WHEEL / "image_dfl.dcm")
    meta = (WHEEL / "image_dfl.dcm").read_bytes()[:144 + ds.file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, wbits=-15)
    path.write_bytes(meta + b"".join(packer.compress(bytes(1 << 24)) for _ in range(2)) + packer.flush())


NOISE = np.random.default_rng(0).integers(0, 99, (20, 40, 40), np.int16)
BAD = {  # name: (maker, expected reason; "" = kept)
    "empty.dcm": (lambda p: p.touch(), "empty file"),
    "empty.nii.gz": (lambda p: p.touch(), "empty file"),
    "page.dcm": (lambda p: p.write_text("<html>login</html>" * 99), "not a DICOM"),
    "page.nii.gz": (lambda p: p.write_text("<html>login</html>" * 99), "not a NIfTI file"),
    "page.png": (lambda p: p.write_text("<html>login</html>" * 99), "UnidentifiedImageError"),
    "page.mp4": (lambda p: p.write_text("<html>login</html>" * 99), "cannot be decoded: .*pyav"),
    "text.txt": (lambda p: p.write_text("notes"), "not a DICOM, NIfTI, image or video file"),
    "cutpixels.dcm": (lambda p: cut(dicom(p, np.zeros((64, 64), np.uint16)), 0.7),
                      r"less than expected \(\d+ vs 8192 bytes"),
    "cutjpeg.dcm": (lambda p: (shutil.copy(WHEEL / "MR_small_RLE.dcm", p), cut(p, 0.9)),
                    "no pixel data to decode"),
    "cutheader.dcm": (lambda p: p.write_bytes((WHEEL / "CT_small.dcm").read_bytes()[:401]),
                      "cannot be decoded|no image"),
    "nosyntax.dcm": (lambda p: shutil.copy(WHEEL / "meta_missing_tsyntax.dcm", p),
                     "TransferSyntaxUID|no image"),
    "plan.dcm": (lambda p: shutil.copy(WHEEL / "rtplan.dcm", p), r"no image \(RT Plan Storage\)"),
    "report.dcm": (lambda p: shutil.copy(WHEEL / "reportsi.dcm", p), "no image"),
    "DICOMDIR": (lambda p: shutil.copy(WHEEL / "dicomdirtests/DICOMDIR", p), "no image"),
    "huge.dcm": (lambda p: dicom(p, np.zeros((8, 8), np.uint16), Rows=65535, Columns=65535),
                 "less than expected"),
    "frames.dcm": (lambda p: dicom(p, np.zeros((2, 8, 8), np.uint8), "US", NumberOfFrames=str(2 ** 31 - 1)),
                   "timed out|cannot be decoded"),
    "noframes.dcm": (lambda p: dicom(p, SPOT, "US", NumberOfFrames="0"), ""),
    "bomb.dcm": (deflated_bomb, "timed out|no image|cannot be decoded"),
    "deflated.dcm": (lambda p: shutil.copy(WHEEL / "image_dfl.dcm", p), ""),
    "oneslice.dcm": (lambda p: shutil.copy(WHEEL / "CT_small.dcm", p),
                     "1 slices of this series, size and direction, a volume needs 8"),
    "crc.nii.gz": (lambda p: flip(nifti(p, NOISE, np.eye(4)), 3000), "CRC|error: Error -3"),
    "cut.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4))), "ended before"),
    "trailer.nii.gz": (lambda p: cut(nifti(p, NOISE, np.eye(4)), 0.9995),
                       "ended before|EOFError|struct.error|error"),
    "giant.nii": (lambda p: nifti_with(p, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
                  "damaged, ends before its last voxel"),
    "zero.nii": (lambda p: nifti_with(p, dim=[3, 10, 0, 10, 1, 1, 1, 1]), "cannot be used"),
    "negative.nii": (lambda p: nifti_with(p, dim=[3, 10, -10, 10, 1, 1, 1, 1]), "cannot be"),
    "5d.nii": (lambda p: nifti_with(p, dim=[5, 10, 10, 2, 1, 5, 1, 1]), "cannot be used"),
    "rgb.nii": (lambda p: nifti_with(p, datatype=128, bitpix=24), "cannot be used"),
    "complex.nii": (lambda p: nifti_with(p, datatype=32, bitpix=64), "cannot be used"),
    "offset.nii": (lambda p: nifti_with(p, vox_offset=0), "cannot be used"),
    "singular.nii": (lambda p: nifti_with(p, srow_x=(0, 0, 0, 0)), "singular affine"),
    "slope.nii": (lambda p: nifti_with(p, scl_slope=np.nan, scl_inter=np.nan), ""),
    "nan.nii.gz": (lambda p: nifti(p, np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), "blank"),
    "4d.nii.gz": (lambda p: nifti(p, NOISE[:12].reshape(20, 20, 16, 3), np.eye(4)), ""),
    "half.jpg": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)),
                 "image file is truncated"),
    "half.png": (lambda p: (Image.fromarray(NOISE[0].astype(np.uint8)).save(p), cut(p)),
                 "image file is truncated|broken"),
    "bomb.png": (lambda p: png_claiming(p, 13000), "169000000 pixels"),
    "half.avi": (lambda p: cut(video(p, 60)), "Invalid data|ends before frame"),
    "half.mp4": (lambda p: cut(video(p, 60, codec="mpeg4")), "cannot be decoded"),
    "three.avi": (lambda p: video(p, 3), ""),
    "script.avi": (lambda p: p.write_text("ffconcat version 1.0\nfile three.avi\n"), "cannot be decoded"),
    "one.gif": (lambda p: Image.fromarray(SPOT).save(p), ""),
    "many.gif": (lambda p: Image.fromarray(SPOT).save(
        p, save_all=True, append_images=[Image.fromarray(SPOT * 40 * i) for i in range(2, 6)]), ""),
    "fifo.dcm": (lambda p: os.mkfifo(p), "no regular file"),
    "folder.dcm": (lambda p: p.mkdir(), None),  # an empty folder is no file
    "dangling.dcm": (lambda p: p.symlink_to("nowhere"), "no regular file"),
    "loop": (lambda p: p.symlink_to(p.parent), "link to a folder"),
    'odd,"name\n.png': (lambda p: Image.fromarray(SPOT).save(p, "PNG"), ""),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """All bad files in one folder, and what one run made of them."""
    tmp = tmp_path_factory.mktemp("bad")
    for name, (make, _) in BAD.items():
        (tmp / "data").mkdir(exist_ok=True)
        make(tmp / "data" / name)
    (tmp / "data" / os.fsdecode(b"latin\xe9.txt")).write_text("no UTF-8 in this name")
    with open(tmp / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("path", "labels", "modality"), ("deflated.dcm", "", "xray"), ("cutjpeg.dcm", "", "xray"),
            *((name, "", "ct") for name in BAD if not name.endswith(".dcm"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SECONDS", 4)
        return tmp, prepare_main(patch, tmp, "folder", tmp / "data", "--labels", tmp / "labels.csv")


@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_is_kept_or_named(bad, name):
    kept, rejected = bad[1]
    expected = BAD[name][1]
    if expected is None:
        assert name not in kept and name not in rejected
    elif expected:
        assert name not in kept and re.search(expected, rejected[name]), rejected.get(name, "kept")
    else:
        assert name in kept and name not in rejected, rejected.get(name)


def test_no_file_disappears(bad):
    tmp, (kept, rejected) = bad
    for folder, _, names in os.walk(tmp / "data"):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), tmp / "data")
            assert path in kept or path in rejected or "latin" in path
    assert any("latin" in path for path in rejected)
    assert load(kept["many.gif"]).shape == (3, 256, 256, 64)


@pytest.mark.parametrize("trouble, expected", [
    ("abort", "decoder crashed (exit code -6)"),
    ("crash", "decoder crashed (exit code -11)"),
    ("hang", "timed out: too long on the clock"),
    ("loop", "timed out: too much processor time"),
    ("memory", "cannot be decoded: MemoryError"),
    ("exit", "decoder crashed (exit code 0)"),
    ("panic", "cannot be decoded: KeyboardInterrupt")])
def test_no_decoder_can_end_or_hang_the_run(tmp_path, monkeypatch, trouble, expected):
    real = prepare.decode

    def decode(job, *args, **sizes):
        if job.files == ["3.png"]:
            faulthandler.disable()
            if trouble == "abort":
                os.abort()
            elif trouble == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif trouble == "hang":
                time.sleep(60)
            elif trouble == "loop":
                pow(3, 10 ** 9)  # in C, where no Python handler is called
            elif trouble == "memory":
                np.ones(4 * prepare.MEMORY, np.uint8)
            elif trouble == "exit":
                os._exit(0)
            elif trouble == "panic":
                raise KeyboardInterrupt("SECRETNAME")
        return real(job, *args, **sizes)

    monkeypatch.setattr(prepare, "decode", decode)
    monkeypatch.setattr(prepare, "SECONDS", 1)
    monkeypatch.setattr(prepare, "PATIENCE", 10 if trouble == "loop" else 2)
    monkeypatch.setattr(prepare, "MEMORY", 1 << 29)
    for n in range(6):
        Image.fromarray(SPOT).save(tmp_path / f"{n}.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    assert sorted(kept) == ["0.png", "1.png", "2.png", "4.png", "5.png"] and list(rejected) == ["3.png"]
    assert rejected["3.png"].startswith(expected)


def test_a_busy_machine_costs_no_file(monkeypatch):
    """Waiting for a processor, a disk or a network counts a tenth: an item may take 2 s of a limit of 1 s."""
    monkeypatch.setattr(prepare, "SECONDS", 1)
    answers = dict(prepare.run_in_workers(lambda item: time.sleep(2) or item, [7], 1))
    assert answers == {7: 7}


def test_a_worker_is_replaced_before_leaks_add_up(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLES_PER_WORKER", 3)
    answers = dict(prepare.run_in_workers(lambda item: (item, os.getpid()), list(range(10)), 1))
    assert [answers[item][0] for item in range(10)] == list(range(10))
    assert len({pid for _, pid in answers.values()}) == 4


def test_a_full_disk_ends_the_run_and_blames_no_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    Image.fromarray(SPOT).save(tmp_path / "a.png")
    monkeypatch.setattr(prepare.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        command(monkeypatch, "folder", tmp_path, "--modality", "xray", "--out", tmp_path / "c")
    left = [name for _, _, names in os.walk(tmp_path / "c") for name in names]
    assert not [name for name in left if "npy" in name or name.endswith("csv")]


def test_the_item_at_work_is_blamed_for_a_crash_and_no_other():
    """Item 2 leaves a thread that kills the process later; 5 kills each process at once."""
    def kill_later():
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGSEGV)

    def task(item):
        if item == 2:
            threading.Thread(target=kill_later, daemon=True).start()
        elif item == 3:
            time.sleep(0.1)
        elif item == 5:
            os._exit(0)
        return item

    faulthandler.disable()
    answers = dict(prepare.run_in_workers(task, list(range(100)), 1))
    assert {item for item, answer in answers.items() if answer != item} == {5} and len(answers) == 100
    assert isinstance(answers[5], prepare.Rejected)


def test_an_orphan_ends_at_its_next_answer():
    """The parent is killed in the middle; read() returns when nobody is left who could write."""
    def task(item):
        os.write(writer, b"x")
        time.sleep(0.02)

    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reader)
        for item, _ in prepare.run_in_workers(task, list(range(800)), 1):
            if item == 10:
                os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(parent, 0)
    with open(reader, "rb") as made:
        assert len(made.read()) < 20


# ---- privacy, resume, shards ---------------------------------------------------------------------
SECRETS = (b"SECRETNAME", b"SECRETID77", b"19610503", b"1961", b"Meyer")


def test_nothing_written_names_a_patient(tmp_path, monkeypatch, capfd):
    hu, affine = phantom((12, 10, 9))
    data = tmp_path / "data"
    series(data / "Meyer_1961/ct", hu, affine, StudyDate="19610503", PatientComments="SECRETNAME")
    dicom(data / "Meyer.dcm", SPOT, StudyDescription="SECRETNAME", BurnedInAnnotation="YES")
    path = dicom(data / "bad.dcm", SPOT)
    data_with_name = path.read_bytes().replace(b"DA\x08\x0019610503", b"DA\x08\x00SECRETNA")
    path.write_bytes(data_with_name.replace(b"PI", b"ZZ"))
    dicom(data / "frames.dcm", SPOT, NumberOfFrames="1")
    path = data / "frames.dcm"
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x001 ", b"IS\x02\x001A"))
    Image.fromarray(SPOT).save(data / "Meyer_19610503.png")
    (tmp_path / "my.key").write_text("0123456789abcdef0123")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--key-file", tmp_path / "my.key")
    out = "".join(capfd.readouterr()).encode()
    assert b"may show names" in out
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.name not in ("sources.csv", "rejected.csv"):
            out += path.name.encode() + path.read_bytes()
    assert not [secret for secret in SECRETS if secret in out]
    rejected = (tmp_path / "cache/x/rejected.csv").read_bytes()
    assert b"Meyer_19610503.png,modality unknown" in rejected
    for name in ("sources.csv", "rejected.csv"):
        assert stat.S_IMODE((tmp_path / "cache/x" / name).stat().st_mode) == 0o600


def test_ids_depend_on_the_key_and_patients_are_hashed(tmp_path, monkeypatch):
    for n in range(2):
        dicom(tmp_path / f"data/{n}.dcm", SPOT)
    ids = {}
    key = ["--key-file", tmp_path / "keys/new.key"]
    for name, args in {"a": [], "b": key, "c": key}.items():
        kept, _ = prepare_main(monkeypatch, tmp_path / name, "folder", tmp_path / "data", *args)
        assert len({row["patient"] for row in kept.values()}) == 1 and kept["0.dcm"]["labels"] == ("chest",)
        ids[name] = [row["id"] for row in kept.values()] + [kept["0.dcm"]["patient"]]
    assert ids["a"] != ids["b"] == ids["c"] and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids["b"])
    assert stat.S_IMODE((tmp_path / "keys/new.key").stat().st_mode) == 0o600


def test_equal_paths_in_two_caches_are_two_samples_and_two_patients(tmp_path, monkeypatch):
    """Two hospitals, each with a 0.dcm of a patient 77. Public data have one id under any name."""
    dicom(tmp_path / "data/0.dcm", SPOT)
    one, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", name="one")
    two, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", name="two")
    assert one["0.dcm"]["id"] != two["0.dcm"]["id"] and one["0.dcm"]["patient"] != two["0.dcm"]["patient"]
    chest_ct(tmp_path / "ct")
    sizes = ["--size", 16, "--slices", 4]
    one, _ = prepare_main(monkeypatch, tmp_path, "ct_rate", tmp_path / "ct", *sizes, name="rate")
    two, _ = prepare_main(monkeypatch, tmp_path, "ct_rate", tmp_path / "ct", *sizes, name="again")
    assert [row["id"] for row in one.values()] == [row["id"] for row in two.values()]
    published = [prepare.pseudonym(prepare.PUBLIC_KEY, path) for path in one]
    assert [row["id"] for row in one.values()] == published


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".tmp"}


def many(folder, n=60):
    folder.mkdir()
    for k in range(n):
        noise = np.random.default_rng(k).integers(0, 255, (150, 200), np.uint8)
        Image.fromarray(noise).save(folder / f"{k:03d}.png")
    hu, affine = phantom()
    for k in range(6):
        nifti(folder / f"{k}.nii.gz", hu + k, affine)
    nifti(folder / "noted.nii.gz", np.stack([hu, hu], axis=3), affine)
    (folder / "broken.png").write_bytes(b"no image")


def start(source, out):
    """A child process that prepares `source`, as the command line would."""
    pid = os.fork()
    if not pid:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            prepare.tqdm.set_lock(threading.RLock())  # its own one is shared: who is killed with it stops all
            sys.argv = ["prepare.py", "folder", str(source), "--modality", "ct",
                        "--out", str(out), "--name", "x"]
            prepare.main()
        finally:
            os._exit(0)
    return pid


def test_kill_at_random_moments_then_resume_is_byte_for_byte_the_same(tmp_path):
    many(tmp_path / "data")
    os.waitpid(start(tmp_path / "data", tmp_path / "whole"), 0)
    cache, made, kills = tmp_path / "cut/x", {}, 0
    for k in range(9):
        pid, rng = start(tmp_path / "data", tmp_path / "cut"), random.Random(k)
        while k < 8 and len(list(cache.glob("*.npy"))) < 7 * (k + 1):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        if k < 8:
            os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        time.sleep(0.3)  # children notice that they are orphans
        done = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
        assert made.items() <= done.items(), "finished work was lost, or done again"
        made = done
    assert kills >= 6 and len(made) == 67 and tree(cache) == tree(tmp_path / "whole/x")
    assert b"noted.nii.gz,4D NIfTI: first volume kept\n" in tree(cache)["sources.csv"], "notes survive too"


def test_shards_together_are_the_whole(tmp_path, monkeypatch, capsys):
    many(tmp_path / "data", 12)
    args = ["folder", tmp_path / "data", "--modality", "ct"]
    prepare_main(monkeypatch, tmp_path / "whole", *args)
    for run, shards in (("two", ["0/2", "1/2"]), ("three", ["2/3", "0/3", "1/3"])):
        for part in shards:
            command(monkeypatch, *args, "--name", "x", "--out", tmp_path / run / "cache", "--shard", part)
            assert not (tmp_path / run / "cache/x/samples.csv").exists()
        kept, rejected = prepare_main(monkeypatch, tmp_path / run, *args)
        assert len(kept) == 19 and list(rejected) == ["broken.png"]
        assert tree(tmp_path / run / "cache/x") == tree(tmp_path / "whole/cache/x")


def test_reading_a_cache_names_the_file_and_the_remedy(tmp_path, monkeypatch):
    Image.fromarray(SPOT).save(tmp_path / "a.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path, "--modality", "xray")
    row, path = kept["a.png"], tmp_path / "cache/x" / f"{kept['a.png']['id']}.npy"
    assert prepare.CachedDataset([row])[0].shape == (1, 256, 256, 1)

    def save_a_pickle():  # which could run code when it is read: load_sample must refuse it
        np.save(path, np.array([{}]), allow_pickle=True)

    for spoil in (lambda: np.save(path, np.zeros((1, 2, 2, 1), np.uint8)), lambda: cut(path),
                  save_a_pickle, path.unlink):
        spoil()
        with pytest.raises(UserError, match=f"{row['id']}.*delete it and run prepare.py again"):
            load(row)
    no_shape = "id,modality,labels,patient,split,shape\n1,x,,,,axb\n"
    for table in (None, "", "id,shape\n", "a,b\n1,2\n", no_shape):
        (tmp_path / "samples.csv").unlink(missing_ok=True)
        if table is not None:
            (tmp_path / "samples.csv").write_text(table)
        with pytest.raises(UserError, match="samples.csv.*prepare.py"):
            read_samples(tmp_path)


@pytest.mark.parametrize("args, message", [
    (["folder", "nowhere"], "nowhere: no such folder"), (["folder", "empty"], "holds no files"),
    (["chestxray14", "empty"], "Data_Entry_2017"),
    (["folder", "text"], "nothing in text could be read"),
    (["folder", "text", "--labels", "no.csv"], "no.csv: no such file"),
    (["kvasir_capsule", "text"], "holds no CLASS/VIDEO_FRAME.jpg"),
    (["folder", "text", "--out", "text/a.txt"], "cannot write"),
    (["folder", "text", "--key-file", "text"], "16 bytes"),
    (["folder", "text", "--key-file", "fifo"], "16 bytes"),
    (["folder", "text", "--labels", "fifo"], "no such file"),
    (["folder", "fifo"], "no such folder")])
def test_wrong_usage_names_the_thing_and_the_remedy(tmp_path, monkeypatch, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        command(monkeypatch, *args)


def test_exit_codes_and_one_line_on_stderr(tmp_path):
    (tmp_path / "a.txt").write_text("a")

    def run(*args):
        program = [sys.executable, str(ROOT / "prepare.py"), *args]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)

    done = run("folder")
    assert done.returncode == 2 and "SOURCE is missing" in done.stderr
    done = run("folder", ".")
    assert done.returncode == 1 and done.stderr.startswith("prepare.py: nothing in")
    assert done.stderr.count("\n") == 1


def test_a_file_that_may_not_be_read_is_named_and_ends_nothing(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    png(tmp_path / "data/b.png")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.png"))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert list(kept) == ["a.png"] and rejected == {"b.png": "no permission to read it"}


def test_an_error_of_our_own_is_not_taken_for_a_wrong_layout(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    monkeypatch.setitem(prepare.DATASETS, "folder", lambda *_: {}["mistake"])
    with pytest.raises(KeyError, match="mistake"):
        prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data")


def test_a_table_that_gives_a_modality_to_one_slice_of_a_series_is_refused_by_line(tmp_path, monkeypatch):
    """The other slices would be of another modality: the row must name the folder."""
    volume, affine = phantom()
    series(tmp_path / "data/a", volume, affine)
    one = sorted((tmp_path / "data/a").iterdir())[1].name
    (tmp_path / "labels.csv").write_text(f"path,labels,modality\na/{one},x,mri\n")
    with pytest.raises(UserError, match="labels.csv, line 2: modality of one file of a series"):
        prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--labels", tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("path,labels,modality\na,x,mri\n")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                           "--labels", tmp_path / "labels.csv")
    assert [(row["modality"], row["labels"]) for row in kept.values()] == [("mri", ("x",))]


@pytest.mark.parametrize("arguments", [
    ["folder", ".", "--shard", "2/2"], ["folder", ".", "--shard", "0/0"], ["folder", ".", "--shard", "1"],
    ["folder", ".", "--name", "../../etc"], ["folder", ".", "--name", ".x"], ["folder", ".", "--size", "0"],
    ["chestxray14", ".", "--labels", "labels.csv"], ["demo", ".", "--labels", "folders"],
    ["fetal_planes", ".", "--modality", "ultrasound"], ["chestxray14", ".", "--allow-2d"]])
def test_flags_that_mean_nothing_are_refused_with_exit_code_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2 and not list(tmp_path.iterdir())


# ---- the public data sets, in the layouts users have, dirt included ------------------------------
@pytest.mark.parametrize("folder", ["images", "images_001/images"])
def test_chestxray14_layouts(tmp_path, monkeypatch, folder):
    """The header holds bare commas in brackets, each line a comma too many; no newline ends a list."""
    data = tmp_path / "data"
    for n in range(4):
        png(data / folder / f"0000000{n}_000.png")
    png(data / folder / "stray.png")
    (data / "Data_Entry_2017_v2020.csv").write_text(
        "\ufeffImage Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\r\n"
        "00000000_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000001_000.png,No Finding,0,1,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000002_000.png,Hernia,0,2,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000003_000.png,Pleural_Thickening,0,3,58,M,PA,2682,2749,0.143,0.143,\r\n"
        "00000009_000.png,Mass,0,3,58,M,PA,2682,2749,0.143,0.143,\r\n")
    (data / "train_val_list.txt").write_text("00000000_000.png\n00000001_000.png\n00000002_000.png")
    (data / "test_list.txt").write_text("00000003_000.png\n00000009_000.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "chestxray14", data)
    rows = [kept[f"{folder}/0000000{n}_000.png"] for n in range(4)]
    labels = [("Cardiomegaly", "Emphysema"), (), ("Hernia",), ("Pleural_Thickening",)]
    assert [row["labels"] for row in rows] == labels
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"]
    assert list(rejected) == [f"{folder}/stray.png"]
    assert rows[0]["patient"] == rows[1]["patient"] != rows[2]["patient"]


def test_fetal_planes(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for n in range(3):
        png(data / f"Images/Patient0000{n}_Plane1_1_of_15.png")
    (data / "FETAL_PLANES_DB_data.csv").write_text(
        "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
        "Patient00000_Plane1_1_of_15;1;Other;Not A Brain;Op. 1;Aloka;1 \n"
        "Patient00001_Plane1_1_of_15;2;Fetal brain;Trans-thalamic;Op. 1;Aloka;0 \n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "fetal_planes", data)
    rows = [kept[f"Images/Patient0000{n}_Plane1_1_of_15.png"] for n in range(2)]
    assert [row["labels"] for row in rows] == [("Other",), ("Fetal brain",)]
    assert [row["split"] for row in rows] == ["test", "test"]
    assert rows[0]["modality"] == "ultrasound" and len(rejected) == 1


def test_kvasir_capsule_clips(tmp_path, monkeypatch):
    """Frame numbers are not padded; one frame is in two classes; one folder has the packed spelling."""
    data = tmp_path / "data"
    for n in [*range(90, 110), *range(200, 210)]:
        png(data / f"labelled_images/Normal clean mucosa/bca26705313a4644_{n}.jpg", n)
    for n in range(18):
        png(data / f"labelled_images/blood_fresh/Blood - fresh/bca26705313a4644_{n}.jpg", n)
    png(data / "labelled_images/Pylorus/bca26705313a4644_90.jpg")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "kvasir_capsule", data)
    clip = kept["labelled_images/Normal clean mucosa/bca26705313a4644_90.jpg"]
    assert clip["labels"] == ("Normal clean mucosa",) and clip["split"] == "test"
    assert clip["shape"] == (3, 256, 256, 64)
    levels = load(clip)[0, 128, 128].astype(int)
    assert (np.diff(levels) >= 0).all() and len(set(levels)) > 15 and levels[0] >= 88 and levels[-1] <= 111
    assert len(rejected) == 11 and "in a run of 10 frames, a clip needs 16" in rejected.values()
    shutil.rmtree(data / "labelled_images")
    (data / "polyp.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack"):
        command(monkeypatch, "kvasir_capsule", data, "--out", tmp_path / "c")


def test_hyper_kvasir(tmp_path, monkeypatch):
    data = tmp_path / "data"
    places = {"8f9e4085": "lower-gi-tract/pathological-findings/anastomotic-leakage",
              "aaaa": "lower/x", "bbbb": "upper-gi-tract/y", "cccc": "z"}
    for name, place in places.items():
        (data / place).mkdir(parents=True)
        video(data / place / f"{name}.avi")
    png(data / "8f9e4085.png")  # a thumbnail
    (data / "video-labels.csv").write_bytes(
        b"Video file,Organ,Finding 1,Classification 1,Detailed description of finding,"
        b"Finding 2,Classification 2\n"
        b"8f9e4085,Lower GI,anastomosis,Pathological findings,,stent,Therapeutic interventions\n"
        b'aaaa,Lower GI,"cancer, colorectal ",Pathological findings,\xa8,,\n'
        b"bbbb,Upper GI,ERCP,Therapeutic interventions,,,\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "hyper_kvasir", data)
    assert sorted(rejected) == ["8f9e4085.png", "z/cccc.avi"]
    assert [row["labels"] for row in kept.values()].count(()) == 1
    assert kept["lower/x/aaaa.avi"]["labels"] == ("cancer",)
    assert len(set(prepare.HYPER_KVASIR.values())) == 13


def chest_ct(data):
    """CT-RATE's tree: two reconstructions, a second scan, a valid volume, a head; HU in LPS arrays."""
    hu, _ = phantom()
    for name in ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1"):
        split, patient, scan, _ = name.split("_")
        path = data / f"dataset/{split}_fixed/{split}_{patient}/{split}_{patient}_{scan}/{name}.nii.gz"
        nifti(path, hu[::-1, ::-1], np.diag([-2.0, -2.5, 3.0, 1.0]))
    shutil.copytree(data / "dataset/valid_fixed", data / "dataset/valid")  # as first published: blank headers
    radgenome = data / "dataset/valid_preprocessed/valid_7/valid_7a/valid_7_a_1.nii.gz"
    nifti(radgenome, hu, np.eye(4))
    names = ["Lung nodule", "Hiatal hernia"]
    (data / "dataset/labels").mkdir()
    tables = {"train": "train_1_a_1.nii.gz,1,0\ntrain_1_b_1.nii.gz,,1\n", "valid": "valid_1_a_1,1.0,1\n"}
    for part, rows in tables.items():
        table = data / f"dataset/labels/{part}_predicted_labels.csv"
        table.write_text(f"VolumeName,{','.join(names)}\n{rows}")
    (data / "dataset/labels/no_chest_train.txt").write_text("train_2/train_2_a/train_2_a_1.nii.gz\n")
    return hu


def test_ct_rate_takes_one_reconstruction_of_the_fixed_volumes(tmp_path, monkeypatch):
    hu = chest_ct(tmp_path / "data")
    alone = nifti(tmp_path / "a.nii.gz", hu, np.diag([2.0, 2.5, 3.0, 1.0]))
    _, want = read_any(alone, "ct", size=48, slices=16)
    sizes = ["--size", 48, "--slices", 16]
    kept, rejected = prepare_main(monkeypatch, tmp_path, "ct_rate", tmp_path / "data", *sizes)
    kept = {os.path.basename(path): row for path, row in kept.items()}
    assert set(kept) == {"train_1_a_1.nii.gz", "train_1_b_1.nii.gz", "valid_1_a_1.nii.gz"}
    assert np.abs(load(kept["train_1_a_1.nii.gz"]).astype(float) - want).max() < 2e-3, "HU and orientation"
    assert kept["train_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule",)
    assert kept["valid_1_a_1.nii.gz"]["labels"] == ("finding:Lung nodule", "finding:Hiatal hernia")
    assert [kept[f"{part}_1_a_1.nii.gz"]["split"] for part in ("train", "valid")] == ["train", "test"]
    reasons = {path.partition("/")[2]: reason for path, reason in rejected.items()}
    assert "another reconstruction" in reasons["train_fixed/train_1/train_1_a/train_1_a_2.nii.gz"]
    assert "no chest" in reasons["train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"]
    assert "whose headers are true" in reasons["valid/valid_1/valid_1_a/valid_1_a_1.nii.gz"]
    valid, labels = tmp_path / "data/dataset/valid_fixed", tmp_path / "data/dataset/labels"
    kept, _ = prepare_main(monkeypatch, tmp_path, "ct_rate", valid, "--labels", labels, name="part")
    assert list(kept) == ["valid_1/valid_1_a/valid_1_a_1.nii.gz"], "SOURCE may be one of the folders itself"


def test_radgenome_labels_of_ct_rate_volumes(tmp_path, monkeypatch):
    data, tables = tmp_path / "data", tmp_path / "radgenome_files"
    chest_ct(data)
    tables.mkdir()
    for part, volume in (("train", "train_1_a_1.nii.gz"), ("validation", "valid_1_a_1.nii.gz")):
        (tables / f"{part}_vqa_abnormality.csv").write_text(
            f"Volumename,Anatomy,Abnormality\n{volume},lung/lung/right lung,"
            '"ground glass areas, wider than normal"\n'
            f"{volume},lung/lung/left lung,no findings\n{volume},heart/heart,no findings\n")
        (tables / f"{part}_vqa_size.csv").write_text(
            "Volumename,Anatomy,Abnormality,Size\n" + "".join(
                f"{volume},abdomen/abdomen/liver,hypodense lesion,{size}\n" for size in (
                    "13 mm", "1 cm", "6x4 mm", "2.7x2.8 cm", "120x87mm", "2-3 mm", "170 in", "")))
    for path in (data / "dataset/labels").glob("valid_predicted*"):
        path.unlink()
    kept, rejected = prepare_main(monkeypatch, tmp_path, "radgenome", data, "--labels", tables)
    kept = {os.path.basename(path): row for path, row in kept.items()}
    sizes = tuple(f"size:abdomen:hypodense lesion:{mm}" for mm in ("13", "10", "6", "28", "120", "3"))
    status = {"status:lung:abnormal", "status:heart:normal"}
    assert set(kept["train_1_a_1.nii.gz"]["labels"]) == {"finding:Lung nodule", *status, *sizes}
    assert set(kept["valid_1_a_1.nii.gz"]["labels"]) == {*status, *sizes}
    assert {row["split"] for row in kept.values()} == {"test"}, "the task queries them all"
    assert "headers" in rejected["dataset/valid_preprocessed/valid_7/valid_7a/valid_7_a_1.nii.gz"]


# ---- labels --------------------------------------------------------------------------------------
def test_labels_of_files_series_and_folders(tmp_path, monkeypatch, capsys):
    """A row may name any file of a series, or the folder; labels are stripped, splits in any case."""
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data / "p1/ct", hu, affine)
    series(data / "flat", hu // 2, affine)
    dicom(data / "flat/x.dcm", SPOT)
    png(data / "p2/us.png")
    (data / "labels.csv").write_text("\ufeffpath;labels;patient;split;modality\n"
                                     "p1/ct; lesion | cyst;1;Test;\n"
                                     "flat/IM0007;mass|cyst;1;VALID;\nflat/x.dcm;;1;train;\n"
                                     "p2/us.png;kidney;2;;ultrasound\nnone.png;a;;;\n")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--labels", data / "labels.csv")
    assert kept["p1/ct/IM0000"]["labels"] == ("lesion", "cyst") and kept["p1/ct/IM0000"]["split"] == "test"
    assert kept["flat/IM0000"]["labels"] == ("mass", "cyst") and kept["flat/IM0000"]["split"] == "val"
    assert kept["p1/ct/IM0000"]["patient"] == kept["flat/x.dcm"]["patient"] != kept["p2/us.png"]["patient"]
    assert kept["flat/x.dcm"]["labels"] == () and kept["p2/us.png"]["modality"] == "ultrasound"
    assert not rejected
    assert "1 rows of" in (out := capsys.readouterr().out) and "(line 6 ...)" in out


def test_paths_of_labels_as_windows_and_macos_spell_them(tmp_path, monkeypatch, capsys):
    """Backslashes, and an e with an accent as one letter or as two, in the table or in the file's name."""
    one, two = "caf\u00e9", "cafe\u0301"
    for path in (f"sub/{one}.png", f"{two}/b.png", "sub/c.png"):
        png(tmp_path / "data" / path)
    rows = ("path,labels", f"sub\\{two}.png,a", f"{one},b", ".\\sub\\c.png,c")
    (tmp_path / "labels.csv").write_text("\n".join(rows), "utf-8")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray",
                           "--labels", tmp_path / "labels.csv")
    assert {path: row["labels"] for path, row in kept.items()} == {
        f"sub/{one}.png": ("a",), f"{two}/b.png": ("b",), "sub/c.png": ("c",)}
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("path,labels\nsub/c.png,a\nsub\\c.png,b\n")
    with pytest.raises(UserError, match="line 3: sub/c.png again"):
        command(monkeypatch, "folder", tmp_path / "data", "--labels", tmp_path / "labels.csv")


def test_a_further_modality_is_one_word(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    monkeypatch.setattr(prepare, "MODALITIES", (*prepare.MODALITIES, "dermatoscopy"))
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "dermatoscopy")
    assert kept["a.png"]["modality"] == "dermatoscopy"


@pytest.mark.parametrize("text, message", [
    (b"path,labels,split\na.png,x,train\n\nb.png,x,holdout\n",
     "line 4: split 'holdout' is none of train, val, test"),
    (b"path,labels,modality\na.png,x,CT\n",
     "line 2: modality 'CT' is not known: one of xray, ultrasound, endoscopy, ct, mri; "
     "for another add the word to MODALITIES in prepare.py"),
    (b"path,labels\na.png,x\nb.png,x\n./a.png,y\n", "line 4: a.png again"),
    (b"file,labels\na.png,x\n", "line 2: needs the columns path and labels"),
    (b"path,labels\nb.png,x\na.png\n", "line 3: needs the columns path and labels"),
    (b"path,labels\na.png,l\xe9sion\n",
     "not a table in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 19"),
    (b"path,labels\n", "holds no rows"),
    pytest.param(b"path,labels\na.png," + bytes([120]) * 200_000, "not a table", id="a cell without end")])
def test_a_wrong_labels_table_is_an_error_with_line_and_value(tmp_path, monkeypatch, text, message):
    png(tmp_path / "data/a.png")
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(message)):
        command(monkeypatch, "folder", tmp_path / "data", "--modality", "xray",
                "--labels", tmp_path / "labels.csv", "--out", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_folders_are_labels_and_splits(tmp_path, monkeypatch):
    data = tmp_path / "data"
    paths = {"train/benign/a.png": ("benign", "train"), "valid/benign/b.png": ("benign", "val"),
             "malignant/Test/c.png": ("malignant", "test"), "normal/d.png": ("normal", ""),
             "e.png": (None, "")}
    for path in paths:
        png(data / path)
    dicom(data / "normal/f.dcm", SPOT)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray", "--labels", "folders")
    assert {path: ((*row["labels"], None)[0], row["split"]) for path, row in kept.items()} == {
        **paths, "normal/f.dcm": ("normal", "")}


# ---- what a cache remembers ----------------------------------------------------------------------
def test_another_modality_makes_a_sample_again(tmp_path, monkeypatch):
    hu, affine = phantom()
    nifti(tmp_path / "data/a.nii.gz", hu, affine)
    png(tmp_path / "data/b.png")
    args = ["folder", tmp_path / "data", "--size", 32, "--slices", 8]
    arrays = []
    for modality in ("ct", "mri"):
        kept, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", modality)
        assert kept["a.nii.gz"]["modality"] == modality
        arrays.append(load(kept["a.nii.gz"]))
    fresh, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", "mri", name="fresh")
    assert not np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[1], load(fresh["a.nii.gz"]))
    nifti(tmp_path / "data/c.nii.gz", hu - 5000, affine)  # below all HU: as CT it is blank
    kept, _ = prepare_main(monkeypatch, tmp_path, *args, "--modality", "mri")
    array = Path(kept["c.nii.gz"]["folder"], f"{kept['c.nii.gz']['id']}.npy")
    kept, rejected = prepare_main(monkeypatch, tmp_path, *args, "--modality", "ct")
    assert set(kept) == {"a.nii.gz", "b.png"} and rejected["c.nii.gz"].startswith("blank")
    assert not array.exists()


def made_again(monkeypatch, tmp_path, *args):
    """Run prepare.py again -> the paths whose arrays are new."""
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache/x").glob("*.npy")}
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    arrays = {path: Path(row["folder"], f"{row['id']}.npy") for path, row in kept.items()}
    return {path for path, array in arrays.items() if array.stat().st_mtime_ns != before.get(array.name)}


def test_a_file_that_changed_is_read_again_and_no_other(tmp_path, monkeypatch):
    """Written anew, copied over with its old time, moved in its place, linked to another."""
    args = ["--modality", "xray", "--size", 16]
    for name in "abcdef":
        png(tmp_path / f"data/{name}.png", ord(name))
    for name in ("old", "other"):
        png(tmp_path / f"{name}.png", 200)
        os.utime(tmp_path / f"{name}.png", (0, 0))
    (tmp_path / "data/link.png").symlink_to("a.png")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    assert made_again(monkeypatch, tmp_path, *args) == set()

    png(tmp_path / "data/a.png", 99)  # the link shows it too
    shutil.copy2(tmp_path / "old.png", tmp_path / "data/b.png")
    (tmp_path / "old.png").rename(tmp_path / "data/c.png")
    (tmp_path / "data/d.png").unlink()
    (tmp_path / "data/d.png").symlink_to(tmp_path / "other.png")
    os.utime(tmp_path / "data/e.png", (9e9, 9e9))  # of a clock that is wrong: once, not at every run
    changed = {"a.png", "b.png", "c.png", "d.png", "e.png", "link.png"}
    assert made_again(monkeypatch, tmp_path, *args) == changed
    assert made_again(monkeypatch, tmp_path, *args) == set()
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    assert load(kept["a.png"]).ravel()[100] == 99 and load(kept["c.png"]).ravel()[100] == 200


def test_a_series_that_gained_slices_is_read_again(tmp_path, monkeypatch):
    hu, affine = phantom()
    args = ["--size", 32, "--slices", 8]
    series(tmp_path / "data/a", hu, affine, uid="1.2", skip=(0, 1, 2))
    series(tmp_path / "data/b", hu, affine, uid="1.3")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    series(tmp_path / "new", hu, affine, uid="1.2")
    for path in sorted((tmp_path / "new").iterdir()):
        if not (tmp_path / "data/a" / path.name).exists():
            shutil.copy2(path, tmp_path / "data/a" / path.name)
    assert {os.path.dirname(path) for path in made_again(monkeypatch, tmp_path, *args)} == {"a"}
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    one, two = (load(row) for row in kept.values())
    assert np.array_equal(one, two)


def test_a_series_that_lost_a_slice_is_read_again(tmp_path, monkeypatch):
    hu, affine = phantom()
    args = ["--size", 32, "--slices", 8]
    series(tmp_path / "data", hu, affine)
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    heights = {pydicom.dcmread(path).ImagePositionPatient[2]: path for path in (tmp_path / "data").iterdir()}
    heights[max(heights)].unlink()
    assert made_again(monkeypatch, tmp_path, *args)
    assert not made_again(monkeypatch, tmp_path, *args)


def test_a_file_that_became_unreadable_leaves_no_old_array(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    png(tmp_path / "data/b.png")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    cut(tmp_path / "data/a.png")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert list(kept) == ["b.png"] and list(rejected) == ["a.png"]
    assert len(list((tmp_path / "cache/x").glob("*.npy"))) == 1


def test_arrays_of_files_that_are_gone_are_named_and_pruned_when_asked(tmp_path, monkeypatch, capsys):
    data, cache = tmp_path / "data", tmp_path / "cache/x"
    args = ["folder", data, "--modality", "xray", "--size", 16]
    for name in "abc":
        png(data / f"{name}.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, *args)
    gone = kept["b.png"]["id"]
    (data / "b.png").unlink()
    capsys.readouterr()
    prepare_main(monkeypatch, tmp_path, *args)
    assert f"1 arrays are of no file in {data} (--prune deletes them): {gone}\n" in capsys.readouterr().out
    assert (cache / f"{gone}.npy").exists()
    shutil.copy(cache / f"{gone}.npy", cache / "mean.npy")  # the user's, whatever it is
    left, _ = prepare_main(monkeypatch, tmp_path, *args, "--prune")
    assert f"deleted 1 arrays of no file in {data}: {gone}\n" in capsys.readouterr().out
    assert {path.stem for path in cache.glob("*.npy")} == {"mean", *(row["id"] for row in left.values())}
    assert set(left) == {"a.png", "c.png"}
    prepare_main(monkeypatch, tmp_path, *args)
    assert gone not in capsys.readouterr().out


def test_nothing_is_pruned_by_a_forgotten_flag_an_empty_source_or_a_shard(tmp_path, monkeypatch, capsys):
    data, cache = tmp_path / "data", tmp_path / "cache/x"
    png(data / "a.png")
    png(data / "b.png")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--prune", code=1)
    assert len(list(cache.glob("*.npy"))) == 2, "the modality was forgotten"
    assert "arrays" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "folder", data, "--modality", "xray", "--prune", "--shard", "0/2")
    for path in data.iterdir():
        path.unlink()
    args = ["folder", data, "--modality", "xray", "--prune", "--name", "x", "--out", tmp_path / "cache"]
    for make, message in ((lambda: None, "holds no files"), ((data / "text.txt").touch, "could be read"),
                          (lambda: (data / "broken.png").write_bytes(b"no image"), "could be read")):
        make()  # as an archive that is not mounted, or in part
        with pytest.raises(UserError, match=message):
            command(monkeypatch, *args)
        assert len(list(cache.glob("*.npy"))) == 2


def test_a_table_that_shrinks_says_so_and_why(tmp_path, monkeypatch, capsys):
    """Of three labelled files one has its modality from the table alone, and two are deleted later."""
    data = tmp_path / "data"
    dicom(data / "a.dcm", SPOT)
    dicom(data / "b.dcm", SPOT, BodyPartExamined="")
    png(data / "c.png")
    png(data / "d.png")
    (tmp_path / "labels.csv").write_text("path,labels,modality\nb.dcm,mass,\nc.png,mass,xray\n"
                                         "d.png,cyst,xray\n")
    labels = ["--labels", tmp_path / "labels.csv"]

    def said(*args):
        capsys.readouterr()
        kept, _ = prepare_main(monkeypatch, tmp_path, "folder", data, *args)
        return [line for line in capsys.readouterr().out.splitlines() if "of the last table" in line]

    assert said(*labels) == [] and said(*labels) == []
    assert said() == ["warning: 2 of the 4 samples of the last table are gone; that table had labels: "
                      "was --labels forgotten?"]
    assert said(*labels) == []
    assert said("--modality", "xray") == ["warning: 4 samples of the last table had labels, 1 have some now: "
                                          "was --labels forgotten?"]
    said(*labels)
    (data / "a.dcm").unlink()
    (data / "d.png").unlink()
    assert said(*labels) == ["warning: 2 of the 4 samples of the last table are gone; so are their files"]
    (data / "c.png").write_bytes(b"no image")
    assert said(*labels) == ["warning: 1 of the 2 samples of the last table are gone; rejected.csv says why"]


def test_another_modality_is_no_loss(tmp_path, monkeypatch, capsys):
    png(tmp_path / "data/a.png")
    for modality in ("xray", "ultrasound"):
        prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", modality)
        assert "warning" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache/x").glob("*.npy"))) == 1


def test_an_archive_in_a_new_place_goes_on_when_told(tmp_path, monkeypatch):
    args = ["--modality", "xray", "--size", 16]
    png(tmp_path / "data/sub/a.png")
    before, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    array = Path(before["sub/a.png"]["folder"], f"{before['sub/a.png']['id']}.npy")
    made = array.stat().st_mtime_ns
    (tmp_path / "data").rename(tmp_path / "moved")
    png(tmp_path / "moved/b.png")
    with pytest.raises(UserError, match="another source .--moved if the same data lie in a new place"):
        prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "moved", *args)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "moved", *args, "--moved")
    assert kept["sub/a.png"] == before["sub/a.png"] and array.stat().st_mtime_ns == made and len(kept) == 2
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "moved", *args)  # told once is enough
    assert len(kept) == 2


def test_a_cache_of_an_older_version_is_refused(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    monkeypatch.setattr(prepare, "VERSION", prepare.VERSION - 1)
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    monkeypatch.undo()
    message = "x: made by another version; delete the folder and prepare again"
    with pytest.raises(UserError, match=message):
        prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    with pytest.raises(UserError, match=message):
        prepare.read_sizes(tmp_path / "cache/x")


def test_the_commonest_reasons_and_notes_are_counted_on_the_screen(tmp_path, monkeypatch, capsys):
    """Reasons without their details, which may quote the file; files of no known kind come last."""
    data = tmp_path / "data"
    png(data / "a.png")
    for n in range(3):
        dicom(data / f"{n}.dcm", SPOT, PhotometricInterpretation="MONOCHROME1")
        (data / f"SECRETNAME{n}.png").write_bytes(b"SECRETNAME")
    for n in range(4):
        (data / f"{n}.txt").write_text("notes")
    (data / ".hidden").write_text("x")
    prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray")
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if "4 samples, 3 with notes" in line)
    assert "8 files left out (rejected.csv)" in lines[at]
    assert lines[at + 1:] == [
        "  3 samples: MONOCHROME1: inverted", "  3 files left out: cannot be decoded",
        "  1 files left out: hidden, not read", "  4 files left out: not a DICOM, NIfTI, image or video file"]


# ---- one file, as a query ------------------------------------------------------------------------
def test_a_query_shows_the_frames_that_the_cache_holds(tmp_path, monkeypatch):
    """Wherever the file lies, and whatever it is called: its content seeds the choice."""
    (tmp_path / "data").mkdir()
    for name, frames in (("a.avi", 100), ("b.avi", 120)):
        video(tmp_path / "data" / name, frames)
    dicom(tmp_path / "data/c.dcm", np.arange(90, dtype=np.uint8)[:, None, None] + SPOT, "US")
    args = ["--modality", "endoscopy", "--size", 32, "--frames", 8]
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *args)
    for path, row in kept.items():
        shutil.copy(tmp_path / "data" / path, tmp_path / f"query{Path(path).suffix}")
        modality, x = read_any(tmp_path / f"query{Path(path).suffix}", row["modality"], size=32, frames=8)
        assert np.array_equal(x, load(row)), path
    firsts = {load(row)[0, 16, 16].tobytes() for row in kept.values()}
    assert len(firsts) == 3, "and other files show others"


def test_a_folder_as_a_query_says_why_it_is_none(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="data: holds no file that is read"):
        read_any(tmp_path / "data")
    (tmp_path / "data/a.txt").write_text("notes")
    with pytest.raises(UserError, match="data: not a DICOM"):
        read_any(tmp_path / "data")
    shutil.copy(WHEEL / "rtplan.dcm", tmp_path / "data/plan.dcm")
    with pytest.raises(UserError, match="data: no image"):
        read_any(tmp_path / "data")


def test_a_slice_that_no_volume_took_says_why(tmp_path):
    """The second echo of a series is left out, and so is a slice of it that is asked for."""
    hu, affine = phantom()
    series(tmp_path / "a", hu, affine, uid="1.2", modality="MR", EchoTime="10")
    for path in series(tmp_path / "b", hu // 2, affine, uid="1.2", modality="MR", EchoTime="80").iterdir():
        path.rename(tmp_path / f"a/second{path.name}")
    with pytest.raises(UserError, match="secondIM0003: another echo, b-value, phase or time"):
        read_any(tmp_path / "a/secondIM0003", size=32, slices=8)
    want = read_any(tmp_path / "a", size=32, slices=8)[1]
    assert np.array_equal(read_any(tmp_path / "a/IM0003", size=32, slices=8)[1], want)


def test_another_modality_after_a_run_that_wrote_no_tables(tmp_path, monkeypatch):
    """Stopped because the modality was wrong, and started again with the right one."""
    hu, affine = phantom()
    for n in range(4):
        nifti(tmp_path / f"data/{n}.nii.gz", hu + n, affine)
    args = ["folder", tmp_path / "data", "--size", 32, "--slices", 8, "--modality"]
    command(monkeypatch, *args, "mri", "--name", "x", "--out", tmp_path / "cache", "--shard", "0/1")
    kept, _ = prepare_main(monkeypatch, tmp_path, *args, "ct")
    fresh, _ = prepare_main(monkeypatch, tmp_path, *args, "ct", name="fresh")
    assert len(kept) == 4 and all(np.array_equal(load(kept[path]), load(fresh[path])) for path in kept)


def test_a_forgotten_modality_loses_no_array(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    array = Path(kept["a.png"]["folder"], f"{kept['a.png']['id']}.npy")
    made = array.stat().st_mtime_ns
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=1)
    assert rejected["a.png"] == "modality unknown; give --modality" and array.stat().st_mtime_ns == made
    again, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert again == kept and not rejected and array.stat().st_mtime_ns == made


def test_another_source_key_or_size_is_refused_once_a_sample_is_kept(tmp_path, monkeypatch):
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data, other):
        folder.mkdir()
        (folder / "a.png").write_bytes(b"no image")
    cache = ["--modality", "xray", "--name", "x", "--out", tmp_path / "cache"]
    for args in ([data, "--size", 64], [other, "--size", 32], [data, "--key-file", tmp_path / "k"]):
        with pytest.raises(UserError, match="could be read"):  # nothing is kept, so nothing is remembered
            command(monkeypatch, "folder", *args, *cache)
    png(data / "a.png")
    command(monkeypatch, "folder", data, *cache)
    assert prepare.read_sizes(tmp_path / "cache/x") == {"size": 256, "slices": 64, "frames": 64}
    before = tree(tmp_path / "cache/x")
    messages = {(other,): "another source", (data, "--size", 64): "size 256",
                (data, "--frames", 8): "frames 64", (data, "--slices", 32): "slices 64",
                (data, "--key-file", tmp_path / "k"): "another key"}
    for args, message in messages.items():
        with pytest.raises(UserError, match=f"was made with.*{message}"):
            command(monkeypatch, "folder", *args, *cache)
    assert tree(tmp_path / "cache/x") == before
    text = (tmp_path / "cache/x/recipe.json").read_text()
    assert str(tmp_path) not in text and "data" not in text.replace("dataset", "")
    (tmp_path / "cache/x/recipe.json").write_text("{")
    with pytest.raises(UserError, match="recipe.json: missing or damaged"):
        prepare.read_recipe(tmp_path / "cache/x")


def test_runs_that_start_together_take_the_key_of_the_first(tmp_path):
    """Each child makes its key at the same moment; all must read the same one."""
    for attempt in range(5):
        path, gate = tmp_path / f"{attempt}.key", time.monotonic() + 0.2
        children = []
        for n in range(4):
            pid = os.fork()
            if not pid:
                try:
                    sys.stdout = open(os.devnull, "w")
                    while time.monotonic() < gate:
                        pass
                    (tmp_path / f"{attempt}-{n}").write_bytes(prepare.read_key(path))
                finally:
                    os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        assert {(tmp_path / f"{attempt}-{n}").read_bytes() for n in range(4)} == {path.read_bytes()}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(list(tmp_path.glob(f"{attempt}.key*"))) == 1


def test_temporary_files_of_another_run_are_left_alone(tmp_path, monkeypatch):
    """The other run is at the very sample that this one makes too."""
    png(tmp_path / "data/a.png")
    key = prepare.key_of_cache(prepare.PUBLIC_KEY, "x", own_files=True)
    name = prepare.possible_ids(prepare.Sample(["a.png"], "image"), key, own_files=True)["xray"]
    other = tmp_path / f"cache/x/.{name}.npy.12345678.tmp"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray")
    assert other.read_bytes() == b"half" and len(kept) == 1


def test_own_caches_and_hidden_folders_are_not_read_and_said(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for path in ("a.png", ".Trash/b.png", "recipes/c.png", "sub/.snapshot/d.png", "__MACOSX/e.png"):
        png(data / path)
    (data / "recipes/recipe.json").write_text('{"cake": 1}')
    command(monkeypatch, "folder", data, "--modality", "xray", "--name", "own", "--out", data / "cache")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--modality", "xray")
    assert set(kept) == {"a.png", "recipes/c.png"}
    assert {path: reason.split(",")[0] for path, reason in rejected.items()} == {
        ".Trash": "hidden", "sub/.snapshot": "hidden", "__MACOSX": "hidden",
        "cache/own": "cache of this program",
        "recipes/recipe.json": "not a DICOM"}


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    png(tmp_path / "data/sub/locked/b.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    files, rejected = prepare.list_files(tmp_path / "data")
    assert files == ["a.png"]
    assert {path: str(reason) for path, reason in rejected.items()} == {
        "sub/locked": "folder cannot be read: Permission denied"}


def test_notes_stand_beside_the_sample_also_after_an_interrupted_run(tmp_path, monkeypatch, capsys):
    dicom(tmp_path / "data/a.dcm", SPOT, PhotometricInterpretation="MONOCHROME1")
    dicom(tmp_path / "data/b.dcm", SPOT, "US")
    dicom(tmp_path / "data/c.dcm", SPOT, "US", BurnedInAnnotation="YES")
    command(monkeypatch, "folder", tmp_path / "data", "--name", "x", "--out", tmp_path / "cache",
            "--shard", "0/1")
    prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data")
    with open(tmp_path / "cache/x/sources.csv", newline="") as file:
        notes = {row["path"]: row["notes"] for row in csv.DictReader(file)}
    assert notes["a.dcm"] == "MONOCHROME1: inverted" and not notes["b.dcm"]
    assert "may show names" in notes["c.dcm"]
    out = capsys.readouterr().out
    assert "warning: 1 samples" in out and "3 samples, 2 with notes (sources.csv)" in out


def test_the_commonest_reason_is_that_of_files_of_a_known_kind(tmp_path, monkeypatch):
    png(tmp_path / "data/a.png")
    for n in range(3):
        (tmp_path / f"data/{n}.txt").write_text("notes")
    with pytest.raises(UserError, match=r"mostly: modality unknown; give --modality\)"):
        command(monkeypatch, "folder", tmp_path / "data", "--out", tmp_path / "cache")


@pytest.mark.parametrize("table, line", [
    ("id,modality,labels,patient,split\n0123456789abcdef,ct,,,\n", 2),  # no shape
    ("id,labels,patient,split,shape\n0123456789abcdef,,,,1x8x8x1\n", 2),  # no modality
    ("{head}{row}{row}", 3), ("{head}../../x,ct,,,,1x8x8x1\n", 2),
    ("{head}0123456789abcdef,ct,,,,1x8x8\n", 2),
    ("{head}0123456789abcdef,ct,,,,1x8xAx1\n", 2), ("{head}0123456789abcdef,ct\n", 2)])
def test_a_broken_samples_table_names_its_line(tmp_path, table, line):
    head, row = "id,modality,labels,patient,split,shape\n", "0123456789abcdef,ct,a|b,,test,1x8x8x1\n"
    (tmp_path / "samples.csv").write_text(table.format(head=head, row=row))
    with pytest.raises(UserError, match=f"samples.csv, line {line}: "):
        read_samples(tmp_path)
    (tmp_path / "samples.csv").write_text("\ufeff" + head + row)  # as a spreadsheet saves it
    assert read_samples(tmp_path) == [{
        "id": "0123456789abcdef", "modality": "ct", "labels": ("a", "b"), "patient": "",
        "split": "test", "shape": (1, 8, 8, 1), "folder": str(tmp_path)}]


def test_the_fatal_line_stands_alone_below_the_bar(tmp_path):
    """A disk that fills up in the middle of a run: the bar is there, and the message is a line of its own."""
    for n in range(40):
        png(tmp_path / f"data/{n}.png", n)
    code = f"""if True:
        import sys, os, errno; sys.path.insert(0, {str(ROOT)!r})
        import prepare
        real = os.replace
        def full(source, target):
            if str(target).endswith(".npy") and len(os.listdir(os.path.dirname(target))) > 34:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)
        os.replace = full
        sys.argv = ["prepare.py", "folder", "data", "--modality", "xray", "--workers", "1"]
        prepare.cli(prepare.main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.split("\n")
    assert done.returncode == 1, done.stderr
    assert lines[-2].startswith("prepare.py: cannot write cache/folder/"), done.stderr
    assert "No space left on device" in lines[-2] and lines[-1] == "" and "sample/s" in lines[-3]


# ---- the demo ------------------------------------------------------------------------------------
def test_demo_is_written_as_files_and_read_back(tmp_path, monkeypatch, capsys):
    write = phantoms.write_demo
    monkeypatch.setattr(phantoms, "write_demo", lambda folder: write(folder, n=2))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "demo", tmp_path / "demo", "--slices", 16)
    assert "prepare.py demo --size 32 --slices 16 --frames 4\n" in capsys.readouterr().out
    assert {row["modality"] for row in kept.values()} == set(prepare.MODALITIES) and not rejected
    assert {row["shape"] for row in kept.values()} == {(1, 32, 32, 1), (3, 32, 32, 4), (1, 32, 32, 16)}
    assert all(row["labels"] and row["patient"] and row["split"] for row in kept.values())
