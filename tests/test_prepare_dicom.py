"""prepare.py: DICOM series and headers, and every file of three packages."""
import csv
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import (SPOT, cut, dicom, enhanced, load, nifti, phantom, png, prepare_main, series,
                      video)
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEGLSLossless,
                         RLELossless, generate_uid)

import prepare
from prepare import UserError, read_any

SMALL = {"size": 32, "slices": 16}
SMALLER = ("--size", 32, "--slices", 16)


# ---- DICOM series --------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil, expected", [
    ("gap", "gap of 6.0 mm after slice 7 of 15, others 3.0 mm"),
    ("few", "5 slices .*, a volume needs 8"), ("none", ""), ("duplicate", ""),
    ("different", "two different slices at one position"),
    ("cut", "a slice is damaged: IM.* less than expected"),
    ("unplaced", "no ImageOrientationPatient"), ("nouid", "no SeriesInstanceUID")])
def test_a_series_is_whole_or_refused(tmp_path, monkeypatch, spoil, expected):
    hu, affine = phantom()
    skip = {"gap": [7], "few": range(5, 16)}.get(spoil, ())
    folder = series(tmp_path / "data/s", hu, affine, skip=skip)
    files = sorted(folder.iterdir())
    ds = pydicom.dcmread(files[4])
    if spoil in ("duplicate", "different"):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.PixelData = ds.PixelData if spoil == "duplicate" else bytes(len(ds.PixelData))
        ds.save_as(folder / "again")
    elif spoil == "cut":
        cut(files[4], 0.8)
    elif spoil in ("unplaced", "nouid"):
        for path in files:
            ds = pydicom.dcmread(path)
            del ds["ImageOrientationPatient" if spoil == "unplaced" else "SeriesInstanceUID"]
            ds.save_as(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                                  code=int(bool(expected)))
    assert list(kept) == ([] if expected else [f"s/{min(path.name for path in folder.iterdir())}"])
    named = len(list(folder.iterdir())) if expected else 0
    assert len(rejected) == named, "every slice of a refused series is named"
    assert all(re.search(expected, reason) for reason in rejected.values())


def test_scouts_other_sizes_phases_and_copies_are_named_and_two_series_are_two_volumes(
        tmp_path, monkeypatch):
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine)
    for path in list(data.iterdir()):
        path.rename(data / f"a{path.name}")
    series(data, hu // 2, affine, modality="MR")
    some = pydicom.dcmread(data / "aIM0003")
    shutil.copy(data / "aIM0003", data / "copy")
    some.SOPInstanceUID = generate_uid()
    some.AcquisitionNumber = 2
    some.PixelData = bytes(len(some.PixelData))
    some.save_as(data / "phase")
    some.Rows = some.Rows // 2
    some.save_as(data / "small")
    some.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    some.save_as(data / "scout")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data)
    with open(tmp_path / "cache/x/samples.csv") as file:
        assert sorted(row["modality"] for row in csv.DictReader(file)) == ["ct", "mri"]
    assert set(rejected) == {"phase", "small", "scout"} and rejected["scout"] == "localizer"
    assert "phase" in rejected["phase"] and "needs 8" in rejected["small"]
    assert "aIM0000,duplicate slices dropped" in (tmp_path / "cache/x/sources.csv").read_text()


@pytest.mark.parametrize("text, parts", [
    ("CT ABDOMEN", ["abdomen"]), ("CT ABD/PEL", ["abdomen", "pelvis"]), ("CTA CHEST", ["chest"]),
    ("CT ANKLE LEFT", ["ankle"]), ("CHEST", ["chest"]), ("PORT CHEST", ["chest"]),
    ("Abdomen_Pelvis", ["abdomen", "pelvis"]), ("C_A_P", ["chest", "abdomen", "pelvis"]),
    ("CHEST/ABD/PELVIS", ["chest", "abdomen", "pelvis"]), ("EAR", ["head"]), ("T SPINE", ["tspine"]),
    ("CERVIX", ["pelvis"]), ("CERVICAL_SPINE", ["cspine"]), ("RESEARCH", []),
    ("CT Thorax with contrast", ["chest"]), ("LOCATOR", []), ("", []), ("EXTREMITY", [])])
def test_body_parts_of_messy_tags(text, parts):
    assert sorted(prepare.body_parts(text)) == sorted(parts)


def test_the_body_part_comes_from_the_first_text_of_known_words():
    assert prepare.body_parts("", "UNKNOWN", "MR KNEE LEFT") == ("knee",)


# ---- series, once more ---------------------------------------------------------------------------
def edit(folder, change):
    """Apply change(dataset, n) to each file of a folder, in the order of the positions."""
    def height(path):
        return float(pydicom.dcmread(path).ImagePositionPatient[2])

    for n, path in enumerate(sorted(folder.iterdir(), key=height)):
        ds = pydicom.dcmread(path)
        change(ds, n)
        ds.save_as(path)


def test_two_patients_who_share_a_series_uid_are_two_volumes(tmp_path, monkeypatch):
    """Copied phantoms and careless exports share them; interleaved, they would be one body."""
    hu, affine = phantom()
    for patient, values in (("one", hu), ("two", -hu)):
        edit(series(tmp_path / "data" / patient, values, affine),
             lambda ds, n: ds.update({"PatientID": patient, "SeriesInstanceUID": "1.2.3"}))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert set(kept) == {"one/IM0000", "two/IM0000"} and not rejected
    assert len({row["patient"] for row in kept.values()}) == len({row["id"] for row in kept.values()}) == 2
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]
    assert np.array_equal(load(kept["one/IM0000"]), want)


@pytest.mark.parametrize("tag, values", [
    ("DiffusionBValue", (0.0, 1000.0)), ("AcquisitionTime", ("101010", "101110")),
    ("ContentTime", ("101010", "101110")), ("TriggerTime", ("0", "400")), ("EchoTime", ("2", "5")),
    ("TemporalPositionIdentifier", ("1", "2"))])
def test_of_passes_over_one_place_a_complete_one_is_kept(tmp_path, monkeypatch, tag, values):
    """DWI, perfusion and cine: the same slices again, told apart by one tag.

    The second pass here lacks two slices.
    """
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine, modality="MR", uid="1.2.3")
    edit(data, lambda ds, n: ds.update({tag: values[0]}))
    series(tmp_path / "again", hu // 2, affine, modality="MR", skip=(0, 15), uid="1.2.3")
    edit(tmp_path / "again", lambda ds, n: ds.update({tag: values[1]}))
    for path in (tmp_path / "again").iterdir():
        path.rename(data / f"x{path.name}")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, *SMALLER)
    assert list(kept) == ["IM0000"] and len(rejected) == 14
    assert all(path.startswith("x") for path in rejected)
    assert all("echo, b-value, phase or time" in why for why in rejected.values())
    want = read_any(series(tmp_path / "one", hu, affine, modality="MR"), size=32, slices=16)[1]
    assert np.array_equal(load(kept["IM0000"]), want)


def test_slices_with_one_sop_uid_are_slices_and_empty_padding_is_none(tmp_path, monkeypatch):
    hu, affine = phantom()
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]

    def share(ds, n):
        ds.SOPInstanceUID = "1.2"
        ds.add_new("PixelPaddingValue", "SS", None)

    edit(series(tmp_path / "data", hu, affine), share)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(load(kept["IM0000"]), want) and not rejected


# ---- the whole wheels ----------------------------------------------------------------------------
@pytest.mark.parametrize("package, folder", [("pydicom", "data"), ("data_store", "data"),
                                             ("nibabel", "tests/data")])
def test_every_file_of_the_wheels_is_kept_or_named(tmp_path, monkeypatch, package, folder):
    source = Path(pytest.importorskip(package).__file__).parent / folder
    monkeypatch.setattr(prepare, "SECONDS", 20)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", source, "--allow-2d",
                                  "--modality", "mri", "--size", 32, "--slices", 8, "--frames", 4)
    above = {os.path.dirname(name) for name in kept}  # a series has the name of its first file
    for root, _, names in os.walk(source):
        for name in names:
            path = os.path.relpath(os.path.join(root, name), source)
            assert path in rejected or path in kept or os.path.dirname(path) in above, path
    assert len(kept) > {"pydicom": 55, "data_store": 24, "nibabel": 4}[package]
    assert not [reason for reason in rejected.values() if not reason]
    for row in kept.values():
        x = load(row)
        assert x.dtype in (np.uint8, np.float16) and np.isfinite(x).all() and x.min() >= 0


# ---- one file, as a query ------------------------------------------------------------------------
def test_any_file_of_a_series_stands_for_it(tmp_path):
    hu, affine = phantom()
    want = read_any(series(tmp_path / "a", hu, affine), size=32, slices=16)[1]
    assert np.array_equal(read_any(tmp_path / "a/IM0005", size=32, slices=16)[1], want)
    for path in series(tmp_path / "b", -hu, affine).iterdir():
        path.rename(tmp_path / f"a/x{path.name}")
    with pytest.raises(UserError, match="holds 2 samples; name one, IM0000, xIM0000"):
        read_any(tmp_path / "a")
    assert np.array_equal(read_any(tmp_path / "a/IM0005", size=32, slices=16)[1], want)
    alone = dicom(tmp_path / "c/one.dcm", hu[:, :, 8], "CT", SeriesInstanceUID="1.2")
    assert read_any(alone, size=32)[1].shape == (1, 32, 32, 1)


def test_what_a_query_is_taken_for(tmp_path, capsys):
    """Told, else tagged, else likely, else by kind; the last two are said."""
    hu, affine = phantom()
    volume, tagged = nifti(tmp_path / "a.nii.gz", hu, affine), dicom(tmp_path / "a.dcm", SPOT, "DX")
    png(tmp_path / "a.png")
    for path, told, likely, want, said in [
            (volume, None, None, "ct", True), (volume, None, "mri", "mri", True),
            (volume, "mri", "ct", "mri", False), (tagged, None, "ultrasound", "xray", False),
            (tagged, "ultrasound", None, "ultrasound", False),
            (tmp_path / "a.png", None, None, "xray", True),
            (video(tmp_path / "a.avi"), None, None, "endoscopy", True)]:
        modality, x = read_any(path, told, likely, size=16, slices=4, frames=4)
        assert modality == want and x.shape[1:3] == (16, 16)
        line = f"{path}: taken as {want} (--modality says otherwise)\n"
        assert capsys.readouterr().err == (line if said else "")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in (("fifo", "no such file"), ("none", "no such file"),
                          ("broken.png", "cannot be decoded")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_any(tmp_path / name)


def test_a_stream_that_does_not_say_its_length_is_drawn_from_too(tmp_path):
    """An MPEG program stream declares no number of frames; its are drawn as of any other clip."""
    video(tmp_path / "a.mpg", 25, codec="mpeg2video")
    x = read_any(tmp_path / "a.mpg", frames=8, size=32)[1]
    assert x.shape == (3, 32, 32, 8) and (np.diff(x[0, 16, 16].astype(int)) > 3).all()


# ---- a volume covers its series ------------------------------------------------------------------
def mr(folder, voxels, change=None, prefix="", **options):
    """An MR series of voxels; change(dataset, n) edits each file, whose name begins with prefix."""
    made = folder.with_name(f"{folder.name} {prefix} to be renamed")
    series(made, voxels, phantom()[1], modality="MR", **options)
    if change:
        edit(made, change)
    folder.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        path.rename(folder / f"{prefix}{path.name}")
    made.rmdir()
    return folder


def set_raw(ds, keyword, vr, text):
    """A value as some programs write it, and pydicom would not."""
    tag = Tag(keyword)
    ds[tag] = RawDataElement(tag, vr, len(text), text, 0, False, True)


def sole(kept):
    """The array of the one sample."""
    [row] = kept.values()
    return load(row)


@pytest.mark.parametrize("acquisitions", [2, 3])
def test_acquisitions_that_follow_each_other_are_one_volume(tmp_path, monkeypatch, acquisitions):
    """A long body is scanned in pieces, each of its own AcquisitionNumber and time."""
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "whole", hu), **SMALL)[1]

    def change(ds, n):
        ds.AcquisitionNumber = 1 + n * acquisitions // 16
        ds.AcquisitionTime = f"1200{ds.AcquisitionNumber:02d}"

    mr(tmp_path / "data", hu, change)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and not rejected


@pytest.mark.parametrize("tag, is_joined", [("AcquisitionNumber", True), ("EchoTime", False)])
def test_acquisitions_that_meet_at_one_place_are_joined_and_echoes_are_not(
        tmp_path, monkeypatch, tag, is_joined):
    """A head in two scans, with one slice of both. Two echoes, half a head each, are no head."""
    hu, _ = phantom()
    both = np.where(np.arange(16) > 8, hu + 3, hu)
    want = read_any(mr(tmp_path / "whole", both), **SMALL)[1]
    mr(tmp_path / "data", hu, lambda ds, n: ds.update({tag: 1, "InstanceNumber": n}), "a",
       uid="1.2.3", skip=range(9, 16))
    mr(tmp_path / "data", hu + 3, lambda ds, n: ds.update({tag: 2, "InstanceNumber": 9 + n}), "b",
       uid="1.2.3", skip=range(8))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER,
                                  code=int(not is_joined))
    if is_joined:
        assert np.array_equal(sole(kept), want) and len(rejected) == 1
    else:
        reason = "no pass covers the 16 places of this series, the largest 9"
        assert len(rejected) == 17 and all(why.startswith(reason) for why in rejected.values())


def test_a_part_of_a_series_is_never_the_volume(tmp_path, monkeypatch):
    """Acquisitions that share a place but do not meet there: which slice is right at that place?"""
    hu, _ = phantom()

    def change(ds, n):
        ds.AcquisitionNumber = 1 + n * 3 // 16

    def again(ds, n):
        ds.AcquisitionNumber = 1

    mr(tmp_path / "data", hu, change, uid="1.2.3")
    mr(tmp_path / "data", hu + 3, again, "x", uid="1.2.3", skip=set(range(16)) - {8})
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER,
                                  code=1)
    assert not kept and len(rejected) == 17
    reason = "no pass covers the 16 places of this series, the largest 7"
    assert all(why.startswith(reason) for why in rejected.values())


@pytest.mark.parametrize("order", [lambda n: n >= 8, lambda n: n % 2],
                         ids=["halves", "alternating"])
@pytest.mark.parametrize("tag, values", [
    ("ImageOrientationPatient", (0.1049996, 0.1050004)), ("ImageOrientationPatient", (-4e-7, 4e-7)),
    ("PixelSpacing", (2.0049999, 2.0050001)), ("PixelSpacing", (2.49999, 2.50001)),
    ("ImagePositionPatient", (-1e-4, 1e-4))], ids=str)
def test_headers_that_differ_in_a_late_decimal_are_of_one_volume(
        tmp_path, monkeypatch, tag, values, order):
    hu, _ = phantom()

    def write(jitter):
        def change(ds, n):
            value = values[order(n)] if jitter else values[0]
            if tag == "ImageOrientationPatient":
                cos = float(np.sqrt(1 - value ** 2))
                ds.ImageOrientationPatient = [cos, value, 0.0, -value, cos, 0.0]
            elif tag == "PixelSpacing":
                ds.PixelSpacing = [value, 2.0]
            else:
                ds.ImagePositionPatient = [0.0, 0.0, 3.0 * n + value]
        return change

    want = read_any(mr(tmp_path / "plain", hu, write(False)), **SMALL)[1].astype(float)
    mr(tmp_path / "data", hu, write(True))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.abs(sole(kept) - want).max() < 2e-3 and not rejected


def by_instance_number(ds, n, time):
    ds.InstanceNumber = 16 * time + n + 1
    ds.ContentTime = "120000"


def by_instance_number_slice_after_slice(ds, n, time):
    ds.InstanceNumber = 4 * n + time + 1


def by_private_tag(ds, n, time):
    """As GE writes b-values."""
    by_instance_number(ds, n, time)
    ds.add_new(0x00430010, "LO", "GEMS_PARM_01")
    ds.add_new(0x00431039, "IS", [1000 * (time > 0), 8, 0, 0])


def by_times_of_its_own(ds, n, time):
    """As cine has them: no two files have the same. InstanceNumber says nothing."""
    ds.InstanceNumber = 1
    ds.TriggerTime = 40.0 * time + 0.5 * n
    ds.AcquisitionTime = f"1200{n:02d}"
    ds.ContentTime = f"1201{n:02d}.{time}"


@pytest.mark.parametrize("tell", [
    by_instance_number, by_instance_number_slice_after_slice, by_private_tag, by_times_of_its_own,
], ids=lambda tell: tell.__name__)
def test_where_no_tag_is_shared_the_first_slice_of_each_place_is_of_the_first_pass(
        tmp_path, monkeypatch, tell):
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "first", hu), **SMALL)[1]
    for time in (3, 1, 0, 2):
        mr(tmp_path / "data", hu // (time + 1), lambda ds, n: tell(ds, n, time), "dbca"[time],
           uid="1.2.3")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want)
    assert len(rejected) == 48 and not [path for path in rejected if path.startswith("d")]


def test_copies_sent_twice_under_new_names_are_one_volume(tmp_path, monkeypatch):
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "first", hu), **SMALL)[1]

    def rename(ds, n):
        ds.SOPInstanceUID = generate_uid()

    for prefix in "ab":
        mr(tmp_path / "data", hu, rename, prefix, uid="1.2.3")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and len(rejected) == 16


@pytest.mark.parametrize("lacking", [(0,), (7,), (0, 7, 15)], ids=str)
@pytest.mark.parametrize("tag, values", [
    ("EchoTime", ("2", "5", "10")), ("ConvolutionKernel", ("B30", "B60", "B70")),
    ("AcquisitionNumber", ("1", "2", "3"))])
def test_the_first_pass_that_lacks_nothing_is_kept(tmp_path, monkeypatch, tag, values, lacking):
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "second", hu // 2), **SMALL)[1]
    for n, value in enumerate(values):
        mr(tmp_path / "data", hu // (n + 1), lambda ds, _: ds.update({tag: value}), "abc"[n],
           uid="1.2.3", skip=lacking if n == 0 else ())
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and len(rejected) == 32 - len(lacking)
    assert set(rejected.values()) == {prepare.ANOTHER_PASS}


def test_a_series_of_which_every_pass_lacks_a_slice_is_refused_with_the_count(
        tmp_path, monkeypatch):
    hu, _ = phantom()
    for n, lacking in enumerate(((3,), (5, 6))):
        change = {"EchoTime": str(n + 1)}
        mr(tmp_path / "data", hu + n, lambda ds, _: ds.update(change), "ab"[n], uid="1.2.3",
           skip=lacking)
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER, code=1)
    assert len(rejected) == 29
    reason = "no pass covers the 16 places of this series, the largest 15"
    assert all(why.startswith(reason) for why in rejected.values())


@pytest.mark.parametrize("first, second", [
    ({"EchoTime": "9.5"}, {"EchoTime": "14"}), ({}, {"DiffusionBValue": 1000.0}),
    ({"ImageType": ["ORIGINAL", "PRIMARY"]}, {"ImageType": ["DERIVED", "SECONDARY"]})], ids=str)
def test_the_first_pass_has_the_lower_number_or_for_words_the_lower_instances(
        tmp_path, monkeypatch, first, second):
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "first", hu), **SMALL)[1]
    mr(tmp_path / "data", hu, lambda ds, n: ds.update({"InstanceNumber": 1 + n, **first}), "z",
       uid="1.2.3")
    mr(tmp_path / "data", hu // 2, lambda ds, n: ds.update({"InstanceNumber": 99 + n, **second}),
       "b", uid="1.2.3")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and len(rejected) == 16


def test_two_echoes_in_three_phases_are_six_passes(tmp_path, monkeypatch):
    hu, _ = phantom()
    want = read_any(mr(tmp_path / "first", hu), **SMALL)[1]
    for echo in (5, 2):
        for phase in (3, 1, 2):
            tags = {"EchoTime": str(echo), "TemporalPositionIdentifier": str(phase)}
            mr(tmp_path / "data", hu // (echo * phase - 1), lambda ds, n: ds.update(tags),
               f"e{echo}p{phase}", uid="1.2.3")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and len(rejected) == 5 * 16


def test_a_cine_that_lacks_a_file_is_refused(tmp_path, monkeypatch):
    """Of the times at its place none says which phase is gone."""
    for time in range(4):
        mr(tmp_path / "data", phantom()[0] // (time + 1),
           lambda ds, n: by_times_of_its_own(ds, n, time), "abcd"[time], uid="1.2.3")
    (tmp_path / "data/cIM0003").unlink()
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER, code=1)
    reason = "no pass covers the 16 places of this series, the largest 1"
    assert len(rejected) == 63 and all(why.startswith(reason) for why in rejected.values())


def test_one_file_under_two_names_is_one_slice(tmp_path, monkeypatch):
    """A whole series that was sent twice; one of its slices, the second time, compressed with loss."""
    hu, _ = phantom()
    data = mr(tmp_path / "data", hu)
    want = read_any(data, **SMALL)[1]
    for path in list(data.iterdir()):
        shutil.copy(path, data / f"x{path.name}")
    ds = pydicom.dcmread(data / "IM0004")
    ds.PixelData = (ds.pixel_array + 1).tobytes()
    ds.save_as(data / "xIM0004")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, *SMALLER)
    assert np.array_equal(sole(kept), want) and not rejected
    assert "IM0000,duplicate slices dropped" in (tmp_path / "cache/x/sources.csv").read_text()


@pytest.mark.parametrize("copies", [1, 12])
def test_a_slice_that_differs_in_no_pixel_is_a_copy(tmp_path, monkeypatch, copies):
    """Under a new UID; one of another time, too, where each slice has its own."""
    hu, _ = phantom()
    data = mr(tmp_path / "data", hu, lambda ds, n: ds.update({"ContentTime": f"1201{n:02d}"}))
    want = read_any(data, **SMALL)[1]
    for path in sorted(data.iterdir())[:copies]:
        ds = pydicom.dcmread(path)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        if copies == 1:
            ds.ContentTime = "190000"
        ds.save_as(data / f"x{path.name}")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, *SMALLER)
    assert np.array_equal(sole(kept), want) and not rejected

    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(data / f"x{path.name}")
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, *SMALLER, code=1)
    assert set(rejected.values()) == {"two different slices at one position"}


def test_what_no_tag_tells_from_a_kept_slice_is_not_called_another_echo(tmp_path, monkeypatch):
    for prefix in "ab":
        mr(tmp_path / "data", phantom()[0], lambda ds, n: ds.update({"SOPInstanceUID": generate_uid()}),
           prefix, uid="1.2.3")
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert len(rejected) == 16 and set(rejected.values()) == {prepare.NOT_TOLD_APART}
    assert "a copy" in prepare.NOT_TOLD_APART


@pytest.mark.parametrize("position", [b"", b"0\\0 ", b"nan\\0\\0 ", b"here"])
def test_a_slice_without_a_place_costs_only_itself(tmp_path, monkeypatch, position):
    """A dose report or a saved screen lies in many series."""
    data = mr(tmp_path / "data", phantom()[0])
    want = read_any(data, **SMALL)[1]
    ds = pydicom.dcmread(data / "IM0004")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    set_raw(ds, "ImagePositionPatient", "DS", position)
    ds.save_as(data / "report")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, *SMALLER)
    assert np.array_equal(sole(kept), want)
    assert list(rejected) == ["report"] and "ImagePositionPatient" in rejected["report"]


def test_decimal_commas_and_fractional_instance_numbers_of_a_series_are_read(tmp_path):
    def spoil(ds, n):
        set_raw(ds, "PixelSpacing", "DS", b"2,5\\2,0 ")
        set_raw(ds, "EchoTime", "DS", b"2,5 ")
        set_raw(ds, "RescaleIntercept", "DS", b"-1024,0 ")
        set_raw(ds, "InstanceNumber", "IS", b"%d.5 " % n)

    hu, _ = phantom()
    want = read_any(mr(tmp_path / "right", hu), **SMALL)[1]
    assert np.array_equal(read_any(mr(tmp_path / "data", hu, spoil), **SMALL)[1], want)


SYNTAXES = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_series_with_padding_is_the_same_in_every_transfer_syntax(tmp_path, syntax):
    hu, affine = phantom()
    padded = np.where(np.arange(20)[:, None] < 4, -2000, hu + 1100)
    options = {"modality": "MR", "intercept": 0.0, "PixelPaddingValue": -2000}
    want = read_any(series(tmp_path / "plain", padded, affine, **options), **SMALL)[1]
    if syntax == ExplicitVRBigEndian:
        options["syntax"] = syntax
    folder = series(tmp_path / "encoded", padded, affine, **options)
    if syntax != ExplicitVRBigEndian:
        for path in folder.iterdir():
            ds = pydicom.dcmread(path)
            if syntax.is_encapsulated:
                ds.compress(syntax)
            ds.file_meta.TransferSyntaxUID = syntax
            ds.save_as(path)
    assert pydicom.dcmread(folder / "IM0000").file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(read_any(folder, **SMALL)[1], want)


def test_two_fields_of_view_in_one_series_are_two_volumes(tmp_path, monkeypatch):
    hu, _ = phantom()
    half = {"PixelSpacing": [1.25, 1.0]}
    wide = read_any(mr(tmp_path / "wide", hu), **SMALL)[1]
    narrow = read_any(mr(tmp_path / "narrow", -hu, lambda ds, n: ds.update(half)), **SMALL)[1]
    mr(tmp_path / "data", hu, None, "a", uid="1.2.3")
    mr(tmp_path / "data", -hu, lambda ds, n: ds.update(half), "b", uid="1.2.3")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert not rejected and set(kept) == {"aIM0000", "bIM0000"}
    assert np.array_equal(load(kept["aIM0000"]), wide)
    assert np.array_equal(load(kept["bIM0000"]), narrow)


# ---- enhanced files: their frames are slices -----------------------------------------------------
@pytest.mark.parametrize("is_reversed", [False, True], ids=["in order", "reversed"])
@pytest.mark.parametrize("tag, values", [
    ("EffectiveEchoTime", (2.5, 10.0)), ("DiffusionBValue", (0.0, 1000.0))])
def test_an_enhanced_file_of_two_passes_gives_the_first(tmp_path, tag, values, is_reversed):
    hu, _ = phantom()
    folders = [mr(tmp_path / "a", hu, uid="1.2.3"), mr(tmp_path / "b", hu // 2, uid="1.2.3")]
    want = read_any(folders[0], **SMALL)[1]
    frames = []
    for folder, value in zip(folders, values):
        frames += [(path, {tag: value}) for path in sorted(folder.iterdir())]
    if is_reversed:
        frames.reverse()
    files, tags = zip(*frames)
    assert np.array_equal(read_any(enhanced(tmp_path / "c/e.dcm", files, tags), **SMALL)[1], want)


def test_an_enhanced_file_whose_passes_no_tag_tells_apart_gives_the_first_frame_of_each_place(
        tmp_path):
    hu, _ = phantom()
    first = sorted(mr(tmp_path / "a", hu, uid="1.2.3").iterdir())
    second = sorted(mr(tmp_path / "b", hu // 2, uid="1.2.3").iterdir())
    want = read_any(tmp_path / "a", **SMALL)[1]
    path = enhanced(tmp_path / "c/e.dcm", [*first, *second])
    assert np.array_equal(read_any(path, **SMALL)[1], want)


def test_two_enhanced_files_of_one_series_are_one_volume(tmp_path, monkeypatch):
    hu, _ = phantom()
    files = sorted(mr(tmp_path / "a", hu, uid="1.2.3").iterdir())  # in a shuffled order
    want = read_any(tmp_path / "a", **SMALL)[1]
    enhanced(tmp_path / "data/1.dcm", files[:6])
    enhanced(tmp_path / "data/2.dcm", files[6:])
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and not rejected


def test_of_two_enhanced_files_with_a_pass_each_the_first_pass_is_kept(tmp_path, monkeypatch):
    hu, _ = phantom()
    files = sorted(mr(tmp_path / "a", hu, uid="1.2.3").iterdir())
    others = sorted(mr(tmp_path / "b", hu // 2, uid="1.2.3").iterdir())
    want = read_any(tmp_path / "a", **SMALL)[1]
    enhanced(tmp_path / "data/1.dcm", others, [{"DiffusionBValue": 1000.0}] * 16)
    enhanced(tmp_path / "data/2.dcm", files, [{"DiffusionBValue": 0.0}] * 16)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert np.array_equal(sole(kept), want) and rejected == {"1.dcm": prepare.ANOTHER_PASS}


TELL = {
    "b-values": lambda k, n: {"DiffusionBValue": 1000.0 * n},
    "echoes": lambda k, n: {"EffectiveEchoTime": 2.5 + n},
    "phases": lambda k, n: {"TemporalPositionIndex": n + 1},
    "times of their own": lambda k, n: {"NominalCardiacTriggerDelayTime": 40 * n + 0.3 * k},
    "nothing": lambda k, n: {}}


def enhanced_passes(tmp_path, tell, frames):
    """An enhanced file of frames (k, n): the k-th file of a series in its n-th pass."""
    passes = []
    for n in range(3):
        passes.append(sorted(mr(tmp_path / f"pass{n}", phantom()[0] // (n + 1), uid="1.2.3").iterdir()))
    files = [passes[n][k] for k, n in frames]
    return enhanced(tmp_path / "c/e.dcm", files, [TELL[tell](k, n) for k, n in frames])


@pytest.mark.parametrize("order", ["pass by pass", "place by place", "shuffled"])
@pytest.mark.parametrize("tell", TELL)
def test_of_three_passes_in_an_enhanced_file_the_first_is_kept_in_any_order(tmp_path, tell, order):
    frames = [(k, n) for n in range(3) for k in range(16)]
    if order == "shuffled" and tell != "nothing":
        frames = np.random.default_rng(0).permutation(frames).tolist()
    if order == "place by place":
        frames.sort()
    path = enhanced_passes(tmp_path, tell, frames)
    want = read_any(tmp_path / "pass0", **SMALL)[1]
    assert np.array_equal(read_any(path, **SMALL)[1], want)


def test_an_enhanced_file_whose_passes_all_lack_a_frame_is_refused_with_the_count(tmp_path):
    frames = [(k, 0) for k in range(14)] + [(k, 1) for k in range(2, 16)]
    path = enhanced_passes(tmp_path, "echoes", frames)
    with pytest.raises(UserError, match="no pass covers the 16 places of this series, the largest 14"):
        read_any(path)


def test_two_different_frames_of_one_place_that_no_tag_tells_apart_are_refused(tmp_path):
    path = enhanced_passes(tmp_path, "nothing", [*((k, 0) for k in range(16)), (5, 1)])
    with pytest.raises(UserError, match="two different slices at one position"):
        read_any(path)


def test_scouts_inside_an_enhanced_file_are_left_out(tmp_path):
    files = sorted(mr(tmp_path / "a", phantom()[0]).iterdir())
    want = read_any(tmp_path / "a", **SMALL)[1]
    scout = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    path = enhanced(tmp_path / "c/e.dcm", files[:3] + files, [scout] * 3 + [{}] * 16)
    assert np.array_equal(read_any(path, **SMALL)[1], want)


def test_an_iodine_map_in_an_enhanced_file_is_stretched_and_noted(tmp_path, monkeypatch):
    files = sorted(series(tmp_path / "a", *phantom()).iterdir())
    enhanced(tmp_path / "data/e.dcm", files, [{"RescaleType": "MGML", "RescaleSlope": 0.01}] * 16, "CT")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *SMALLER)
    assert sole(kept).max() == 1 and prepare.NOT_HU in (tmp_path / "cache/x/sources.csv").read_text()


# ---- reasons that are true -----------------------------------------------------------------------
@pytest.mark.parametrize("allow_2d", [False, True])
def test_a_colour_map_is_called_one(tmp_path, monkeypatch, allow_2d):
    def colour(ds, n):
        pixels = np.repeat(ds.pixel_array[:, :, None] // 8 % 256, 3, axis=2).astype(np.uint8)
        pixels[0, 0] = (n, 100, 255 - n)
        ds.set_pixel_data(pixels, "RGB", 8)

    mr(tmp_path / "data", phantom()[0] + 1100, colour)
    options = ["--allow-2d"] if allow_2d else []
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *options,
                                  code=int(not allow_2d))
    assert (len(kept), len(rejected)) == ((16, 0) if allow_2d else (0, 16))
    assert all("a colour map" in why for why in rejected.values())


def test_slices_with_a_palette_are_a_colour_map_too(tmp_path, monkeypatch):
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [4096, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = (np.arange(4096) * 16).astype("<u2").tobytes()
    mr(tmp_path / "data", phantom()[0], **tags)
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=1)
    assert len(rejected) == 16 and all("a colour map" in why for why in rejected.values())


def test_a_map_of_floating_point_pixels_is_named_as_such(tmp_path, monkeypatch):
    path = dicom(tmp_path / "data/map", np.eye(32, dtype=np.uint16), "MR")
    ds = pydicom.dcmread(path)
    ds.FloatPixelData = bytes(4 * 32 * 32)
    for tag in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        del ds[tag]
    ds.save_as(path)
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--allow-2d",
                               code=1)
    assert "floating-point" in rejected["map"]


def test_many_slices_of_one_place_are_counted_as_such(tmp_path, monkeypatch):
    """As a mosaic has them: a whole volume in each file."""
    place = {"ImagePositionPatient": [0.0, 0.0, 0.0]}
    mr(tmp_path / "data", phantom()[0], lambda ds, n: ds.update(place))
    _, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=1)
    assert len(rejected) == 16
    assert all(why.startswith("16 slices at one place of") for why in rejected.values())


def test_a_slice_of_a_pass_that_was_left_out_says_why_as_a_query(tmp_path):
    hu, _ = phantom()
    for n in range(2):
        change = {"EchoTime": str(n + 1)}
        mr(tmp_path / "a", hu // (n + 1), lambda ds, _: ds.update(change), "ab"[n], uid="1.2.3")
    assert read_any(tmp_path / "a/aIM0004", **SMALL)[1].shape == (1, 32, 32, 16)
    with pytest.raises(UserError, match=f"bIM0004: {prepare.ANOTHER_PASS}"):
        read_any(tmp_path / "a/bIM0004", **SMALL)


# ---- what a file is, whatever its name says ------------------------------------------------------
def write_as(path, kind):
    """A grey ramp as a file of a kind, under any name."""
    ramp = (np.arange(64) * np.ones((64, 1)) * 4).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "DICOM":
        dicom(path, ramp, "DX")
    elif kind == "NIfTI":
        hu, affine = phantom()
        nifti(path, hu, affine, packed=False)
    elif kind == "AVI":
        video(path.with_name("clip.avi"), 8).rename(path)
    else:
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
        Image.fromarray(ramp).save(path, kind, **options)
    return path


@pytest.mark.parametrize("kind, right, wrong", [
    ("DICOM", "a.dcm", ("a.jpg", "a.png", "a.tif", "a.mp4", "a.nii", "a.IMA", "a", "1.2.840.5")),
    ("JPEG", "a.jpg", ("a", "a.jfif", "a.jpe", "a.JPEG", "a.png", "a.dcm", "a.mov")),
    ("PNG", "a.png", ("a", "a.jpg", "a.dcm", "a.nii.gz")),
    ("WEBP", "a.webp", ("a", "a.png")), ("TIFF", "a.tif", ("a", "a.png")),
    ("GIF", "a.gif", ("a", "a.jpg")),
    ("BMP", "a.bmp", ("a.BMP",)),
    ("NIfTI", "a.nii", ("a", "a.dcm", "a.nii.gz", "a.img")),
    ("AVI", "a.avi", ("a", "a.mp4", "a.MPG")),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_is_what_its_first_bytes_say(tmp_path, monkeypatch, kind, right, wrong):
    write_as(tmp_path / "data/right" / right, kind)
    for name in wrong:
        write_as(tmp_path / "data/wrong" / name, kind)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data",
                                  "--modality", "xray", *SMALLER, "--frames", 8)
    assert not rejected and set(kept) == {f"right/{right}", *(f"wrong/{name}" for name in wrong)}
    want = load(kept.pop(f"right/{right}"))
    for row in kept.values():
        assert np.array_equal(load(row), want)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_labels_of_a_table_written_on_windows_or_with_other_accents_are_found(
        tmp_path, monkeypatch, form):
    png(tmp_path / "data" / unicodedata.normalize("NFD", "Thorax é") / "a.png")
    png(tmp_path / "data" / unicodedata.normalize("NFC", "Über") / "b.png", 100)
    table = "path,labels\r\nThorax é\\a.png,one\r\n.\\Über\\b.png,two|three\r\n"
    (tmp_path / "labels.csv").write_bytes(unicodedata.normalize(form, table).encode("utf-8-sig"))
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--modality", "xray",
                           "--labels", tmp_path / "labels.csv")
    labels = {Path(path).name: row["labels"] for path, row in kept.items()}
    assert labels == {"a.png": ("one",), "b.png": ("two", "three")}


def test_a_volume_of_a_series_never_takes_the_array_of_another(tmp_path, monkeypatch):
    """Two fields of view in one series; when the first is deleted, the second keeps its own pixels."""
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data / "a", hu, affine, uid="1.2.3")
    series(data / "b", hu // 2, np.diag([1.0, 1.25, 3.0, 1.0]), uid="1.2.3")
    sizes = ("--size", 32, "--slices", 16)
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", data, *sizes)
    want = load(kept["b/IM0000"])
    shutil.rmtree(data / "a")
    kept, _ = prepare_main(monkeypatch, tmp_path, "folder", data, *sizes)
    assert list(kept) == ["b/IM0000"] and np.array_equal(load(kept["b/IM0000"]), want)


def test_a_position_that_is_no_number_costs_its_series_alone(tmp_path, monkeypatch):
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data / "good", hu, affine)
    for path in series(data / "bad", hu, affine).iterdir():
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [0, 0, "nan"]
        ds.save_as(path)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--size", 32)
    assert list(kept) == ["good/IM0000"] and len(rejected) == 16
    assert all("no ImageOrientationPatient" in reason for reason in rejected.values())


def test_a_ct_of_the_spine_is_of_the_spine():
    assert prepare.body_parts("CT SPINE") == ("spine",)
