"""prepare.py: DICOM series and headers, and every file of three packages."""
import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import SPOT, cut, dicom, load, nifti, phantom, png, prepare_main, series, video
from pydicom.uid import generate_uid

import prepare
from prepare import UserError, read_any


# ---- DICOM series ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil, expected", [
    ("gap", "gap of 6.0 mm after slice 7 of 15, others 3.0 mm"), ("few", "5 slices .*, a volume needs 8"), ("none", ""),
    ("duplicate", ""), ("different", "two different slices at one position"), ("cut", "a slice is damaged: IM.* less than expected"),
    ("unplaced", "no ImageOrientationPatient"), ("nouid", "no SeriesInstanceUID")])
def test_a_series_is_whole_or_refused(tmp_path, monkeypatch, spoil, expected):
    hu, affine = phantom()
    folder = series(tmp_path / "data/s", hu, affine, skip={"gap": [7], "few": range(5, 16)}.get(spoil, ()))
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
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", code=int(bool(expected)))
    assert list(kept) == ([] if expected else [f"s/{min(path.name for path in folder.iterdir())}"])
    assert len(rejected) == (len(list(folder.iterdir())) if expected else 0), "every slice of a refused series is named"
    assert all(re.search(expected, reason) for reason in rejected.values())


def test_scouts_other_sizes_phases_and_copies_are_named_and_two_series_are_two_volumes(tmp_path, monkeypatch):
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine)
    for path in list(data.iterdir()):
        path.rename(data / f"a{path.name}")
    series(data, hu // 2, affine, modality="MR")
    some = pydicom.dcmread(data / "aIM0003")
    shutil.copy(data / "aIM0003", data / "copy")
    some.SOPInstanceUID, some.AcquisitionNumber, some.PixelData = generate_uid(), 2, bytes(len(some.PixelData))
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


def test_body_parts_of_messy_tags():
    for text, parts in {"CT ABDOMEN": ["abdomen"], "CT ABD/PEL": ["abdomen", "pelvis"], "CTA CHEST": ["chest"], "CT ANKLE LEFT": ["ankle"],
                        "CHEST": ["chest"], "PORT CHEST": ["chest"], "Abdomen_Pelvis": ["abdomen", "pelvis"],
                        "C_A_P": ["chest", "abdomen", "pelvis"], "CHEST/ABD/PELVIS": ["chest", "abdomen", "pelvis"],
                        "EAR": ["head"],
                        "T SPINE": ["tspine"], "CERVIX": ["pelvis"], "CERVICAL_SPINE": ["cspine"], "RESEARCH": [],
                        "CT Thorax with contrast": ["chest"], "LOCATOR": [], "": [], "EXTREMITY": []}.items():
        assert sorted(prepare.body_parts(text)) == sorted(parts), text
    assert prepare.body_parts("", "UNKNOWN", "MR KNEE LEFT") == ("knee",)


# ---- series, once more -----------------------------------------------------------------------------------------------
def edit(folder, change):
    """Apply change(dataset, n) to each file of a folder, in the order of the positions."""
    files = sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    for n, path in enumerate(files):
        ds = pydicom.dcmread(path)
        change(ds, n)
        ds.save_as(path)


def test_two_patients_who_share_a_series_uid_are_two_volumes(tmp_path, monkeypatch):
    """Copied phantoms and careless exports share them; interleaved, they would be one body."""
    hu, affine = phantom()
    for patient, values in (("one", hu), ("two", -hu)):
        edit(series(tmp_path / "data" / patient, values, affine),
             lambda ds, n: ds.update({"PatientID": patient, "SeriesInstanceUID": "1.2.3"}))
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 32, "--slices", 16)
    assert set(kept) == {"one/IM0000", "two/IM0000"} and not rejected
    assert len({row["patient"] for row in kept.values()}) == len({row["id"] for row in kept.values()}) == 2
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]
    assert np.array_equal(load(kept["one/IM0000"]), want)


@pytest.mark.parametrize("tag, values", [
    ("DiffusionBValue", (0.0, 1000.0)), ("AcquisitionTime", ("101010", "101110")), ("ContentTime", ("101010", "101110")),
    ("TriggerTime", ("0", "400")), ("EchoTime", ("2", "5")), ("TemporalPositionIdentifier", ("1", "2"))])
def test_of_passes_over_one_place_a_complete_one_is_kept(tmp_path, monkeypatch, tag, values):
    """DWI, perfusion and cine: the same slices again, told apart by one tag. The second pass here lacks two slices."""
    hu, affine = phantom()
    data = tmp_path / "data"
    series(data, hu, affine, modality="MR", uid="1.2.3")
    edit(data, lambda ds, n: ds.update({tag: values[0]}))
    series(tmp_path / "again", hu // 2, affine, modality="MR", skip=(0, 15), uid="1.2.3")
    edit(tmp_path / "again", lambda ds, n: ds.update({tag: values[1]}))
    for path in (tmp_path / "again").iterdir():
        path.rename(data / f"x{path.name}")
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", data, "--size", 32, "--slices", 16)
    assert list(kept) == ["IM0000"] and len(rejected) == 14
    assert all(path.startswith("x") and "echo, b-value, phase or time" in why for path, why in rejected.items())
    want = read_any(series(tmp_path / "one", hu, affine, modality="MR"), size=32, slices=16)[1]
    assert np.array_equal(load(kept["IM0000"]), want)


def test_slices_with_one_sop_uid_are_slices_and_empty_padding_is_none(tmp_path, monkeypatch):
    hu, affine = phantom()
    want = read_any(series(tmp_path / "one", hu, affine), size=32, slices=16)[1]

    def share(ds, n):
        ds.SOPInstanceUID = "1.2"
        ds.add_new("PixelPaddingValue", "SS", None)

    edit(series(tmp_path / "data", hu, affine), share)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", "--size", 32, "--slices", 16)
    assert np.array_equal(load(kept["IM0000"]), want) and not rejected


# ---- the whole wheels -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("package, folder", [("pydicom", "data"), ("data_store", "data"), ("nibabel", "tests/data")])
def test_every_file_of_the_wheels_is_kept_or_named(tmp_path, monkeypatch, package, folder):
    source = Path(pytest.importorskip(package).__file__).parent / folder
    monkeypatch.setattr(prepare, "SECONDS", 20)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", source, "--allow-2d", "--modality", "mri",
                                  "--size", "32", "--slices", "8", "--frames", "4")
    for root, _, names in os.walk(source):
        for name in names:
            path = os.path.relpath(os.path.join(root, name), source)
            above = {os.path.dirname(name) for name in kept}  # a series is kept under the name of its first file
            assert path in rejected or path in kept or os.path.dirname(path) in above, path
    assert len(kept) > {"pydicom": 55, "data_store": 24, "nibabel": 4}[package]
    assert not [reason for reason in rejected.values() if not reason]
    for row in kept.values():
        x = load(row)
        assert x.dtype in (np.uint8, np.float16) and np.isfinite(x).all() and x.min() >= 0


# ---- one file, as a query ----------------------------------------------------------------------------------------
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
            (volume, None, None, "ct", True), (volume, None, "mri", "mri", True), (volume, "mri", "ct", "mri", False),
            (tagged, None, "ultrasound", "xray", False), (tagged, "ultrasound", None, "ultrasound", False),
            (tmp_path / "a.png", None, None, "xray", True), (video(tmp_path / "a.avi"), None, None, "endoscopy", True)]:
        modality, x = read_any(path, told, likely, size=16, slices=4, frames=4)
        assert modality == want and x.shape[1:3] == (16, 16)
        assert capsys.readouterr().err == f"{path}: taken as {want} (--modality says otherwise)\n" * said
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("fifo", "no such file"), ("none", "no such file"), ("broken.png", "cannot be decoded")):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_any(tmp_path / name)


def test_a_stream_that_does_not_say_its_length_is_drawn_from_too(tmp_path):
    """An MPEG program stream declares no number of frames; the drawn ones are those of any other clip."""
    video(tmp_path / "a.mpg", 25, codec="mpeg2video")
    x = read_any(tmp_path / "a.mpg", frames=8, size=32)[1]
    assert x.shape == (3, 32, 32, 8) and (np.diff(x[0, 16, 16].astype(int)) > 3).all()


