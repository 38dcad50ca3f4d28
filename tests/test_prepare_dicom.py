"""prepare.py: DICOM files: which are one volume, values as displayed, and every file of three packages."""
import csv
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import (SPOT, WHEEL, add_series, cut, dicom, edit, enhanced, item, load, nifti, phantom, png,
                      prepare_main, series, video)
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
                         JPEGLSLossless, RLELossless, generate_uid)

import prepare
from prepare import UserError, read_any

HU, AFFINE = phantom()  # (24, 20, 16) voxels
STEP = AFFINE[2, 2]  # mm from slice to slice
RAMP = np.tile(np.arange(64) * 64 + 16, (64, 1)).astype(np.uint16)  # 12 bits, dark left to bright right
TWELVE = {"BitsStored": 12, "HighBit": 11}
WINDOW = {"WindowCenter": "2048", "WindowWidth": "1024", **TWELVE}
ANOTHER_PASS = "another echo, b-value, phase or time of a kept series"
XA = "1.2.840.10008.5.1.4.1.1.12.1"


def read_volume(path):
    return read_any(path, size=32, slices=16)[1]


def volume_of(tmp_path, voxels=HU, modality="MR"):
    """The array of a plain series of these voxels, which a mended one must be equal to."""
    return read_volume(series(tmp_path / f"plain{generate_uid()}", voxels, AFFINE, modality=modality))


def prepare_data(monkeypatch, tmp_path, *args, code=0):
    """Run prepare.py on tmp_path/data -> ({path: row}, {path: reason})."""
    sizes = ("--size", 32, "--slices", 16)
    return prepare_main(monkeypatch, tmp_path, "folder", tmp_path / "data", *sizes, *args, code=code)


def notes(tmp_path):
    """{path: notes} of the last run."""
    with open(tmp_path / "cache/x/sources.csv", newline="") as file:
        return {row["path"]: row["notes"] for row in csv.DictReader(file)}


def pass_of(tmp_path, prefix, voxels, change=None, skip=(), modality="MR"):
    """Add a pass over the same places to the series in tmp_path/data; change(dataset, n) edits its slices."""
    folder = series(tmp_path / prefix, voxels, AFFINE, modality=modality, uid="1.2.3", skip=skip)
    if change:
        edit(folder, change)
    return add_series(folder, tmp_path / "data", prefix)


def set_raw(ds, keyword, vr, text):
    """A value as some programs write it, and pydicom would not."""
    tag = Tag(keyword)
    ds[tag] = RawDataElement(tag, vr, len(text), text, 0, False, True)


def lut(entries, bits, first=0, vr="OW"):
    """A sequence of one LUT; entries are bytes, or numbers for US."""
    sequence = Sequence([item(LUTDescriptor=[4096, first, bits])])
    sequence[0].add_new("LUTData", vr, entries)
    return sequence


def palette(entries, bits, kind="<u2"):
    """Tags of a palette whose three colours are alike: grey."""
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(entries), 0, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = np.asarray(entries).astype(kind).tobytes()
    return tags


def show(tmp_path, pixels=RAMP, modality="CR", frames=1, size=64, **tags):
    """An image of these pixels as float (rows, columns), of several frames (rows, columns, frames)."""
    path = dicom(tmp_path / "shown.dcm", pixels, modality, **tags)
    array = read_any(path, size=size, frames=frames)[1]
    x = array.astype(float) / (255 if array.dtype == np.uint8 else 1)
    return x[0] if frames > 1 else x[0, :, :, 0]


def stretched(x):
    low, high = np.percentile(x, (0.5, 99.5))
    return np.clip((x - low) / (high - low), 0, 1)


# ---- a series is one volume, or none ------------------------------------------------------------
@pytest.mark.parametrize("spoil, expected", [
    ("none", ""), ("duplicate", ""), ("gap", "gap of 6.0 mm after slice 7 of 15, others 3.0 mm"),
    ("few", "5 slices .*, a volume needs 8"), ("different", "two different slices at one position"),
    ("cut", "a slice is damaged: IM.* less than expected"), ("unplaced", "no ImageOrientationPatient"),
    ("nouid", "no SeriesInstanceUID")])
def test_a_series_is_whole_or_refused(tmp_path, monkeypatch, spoil, expected):
    folder = series(tmp_path / "data/s", HU, AFFINE, skip={"gap": [7], "few": range(5, 16)}.get(spoil, ()))
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
    kept, rejected = prepare_data(monkeypatch, tmp_path, code=int(bool(expected)))
    assert list(kept) == ([] if expected else [f"s/{min(path.name for path in folder.iterdir())}"])
    named = len(list(folder.iterdir())) if expected else 0
    assert len(rejected) == named, "every slice of a refused series is named"
    assert all(re.search(expected, reason) for reason in rejected.values())


def test_scouts_other_sizes_phases_and_copies_are_named_and_two_series_are_two_volumes(tmp_path, monkeypatch):
    data = tmp_path / "data"
    series(data, HU, AFFINE)
    for path in list(data.iterdir()):
        path.rename(data / f"a{path.name}")
    series(data, HU // 2, AFFINE, modality="MR")
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
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    with open(tmp_path / "cache/x/samples.csv") as file:
        assert sorted(row["modality"] for row in csv.DictReader(file)) == ["ct", "mri"]
    assert set(rejected) == {"phase", "small", "scout"} and rejected["scout"] == "localizer"
    assert "phase" in rejected["phase"] and "needs 8" in rejected["small"]
    assert notes(tmp_path)["aIM0000"] == "duplicate slices dropped"


def test_two_patients_who_share_a_series_uid_are_two_volumes(tmp_path, monkeypatch):
    """Copied phantoms and careless exports share them; interleaved, they would be one body."""
    for patient, values in (("one", HU), ("two", -HU)):
        edit(series(tmp_path / "data" / patient, values, AFFINE),
             lambda ds, n: ds.update({"PatientID": patient, "SeriesInstanceUID": "1.2.3"}))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert set(kept) == {"one/IM0000", "two/IM0000"} and not rejected
    assert len({row["patient"] for row in kept.values()}) == len({row["id"] for row in kept.values()}) == 2
    assert np.array_equal(load(kept["one/IM0000"]), volume_of(tmp_path, modality="CT"))


def test_slices_with_one_sop_uid_are_slices_and_empty_padding_is_none(tmp_path, monkeypatch):
    def share(ds, n):
        ds.SOPInstanceUID = "1.2"
        ds.add_new("PixelPaddingValue", "SS", None)

    edit(series(tmp_path / "data", HU, AFFINE), share)
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert np.array_equal(load(kept["IM0000"]), volume_of(tmp_path, modality="CT")) and not rejected

@pytest.mark.parametrize("order", ["halves", "alternating", "at random"])
def test_directions_and_spacings_that_scanners_round_are_one_volume(tmp_path, monkeypatch, order):
    """The sine of the angle is .105 plus or minus 4e-7: rounded to two digits it would be .1 or .11."""
    signs = {"halves": [1] * 8 + [-1] * 8, "alternating": [1, -1] * 8,
             "at random": np.random.default_rng(0).choice([1, -1], 16)}[order]

    def turn(ds, sign):
        sine = 0.105 + 4e-7 * float(sign)
        cosine = (1 - sine ** 2) ** 0.5
        ds.ImageOrientationPatient = [round(x, 7) for x in (cosine, sine, 0, -sine, cosine, 0)]
        ds.PixelSpacing = [round(2.5 + 4e-6 * sign, 6), 2.0]

    edit(series(tmp_path / "data", HU, AFFINE), lambda ds, n: turn(ds, signs[n]))
    exact = edit(series(tmp_path / "exact", HU, AFFINE), lambda ds, n: turn(ds, 1))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert len(kept) == 1 and not rejected
    assert np.abs(load(kept["IM0000"]) - read_volume(exact).astype(float)).max() < 1e-3


def test_two_fields_of_view_are_two_volumes(tmp_path, monkeypatch):
    small = HU[::-1]
    pass_of(tmp_path, "a", HU, modality="CT")
    pass_of(tmp_path, "b", small, lambda ds, n: ds.update({"PixelSpacing": [1.25, 1.0]}), modality="CT")
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert set(kept) == {"aIM0000", "bIM0000"} and not rejected
    assert np.array_equal(load(kept["aIM0000"]), volume_of(tmp_path, modality="CT"))
    assert np.array_equal(load(kept["bIM0000"]), volume_of(tmp_path, small, "CT")), "both fill the square"


@pytest.mark.parametrize("position", [b"", b"0\\0 ", b"nan\\0\\0 ", b"here"])
def test_a_slice_without_a_place_costs_only_itself(tmp_path, monkeypatch, position):
    """A dose report or a saved screen lies in many series."""
    folder = series(tmp_path / "data", HU, AFFINE, uid="1.2.3")
    ds = pydicom.dcmread(folder / "IM0004")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    set_raw(ds, "ImagePositionPatient", "DS", position)
    ds.save_as(folder / "report")
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert np.array_equal(load(kept["IM0000"]), volume_of(tmp_path, modality="CT"))
    assert list(rejected) == ["report"] and "ImagePositionPatient" in rejected["report"]


def test_decimal_commas_and_fractional_instance_numbers_are_read(tmp_path):
    def spoil(ds, n):
        set_raw(ds, "PixelSpacing", "DS", b"2,5\\2,0 ")
        set_raw(ds, "EchoTime", "DS", b"2,5 ")
        set_raw(ds, "RescaleIntercept", "DS", b"-1024,0 ")
        set_raw(ds, "InstanceNumber", "IS", b"%d.5 " % n)

    folder = edit(series(tmp_path / "data", HU, AFFINE), spoil)
    assert np.array_equal(read_volume(folder), volume_of(tmp_path, modality="CT"))


def test_slices_all_of_one_place_are_said_to_be_so(tmp_path, monkeypatch):
    """A mosaic holds a volume in each file, here twelve of them."""
    folder = series(tmp_path / "data", HU, AFFINE, modality="MR", skip=range(12, 16))
    edit(folder, lambda ds, n: ds.update({"ImagePositionPatient": [0.0, 0.0, 0.0]}))
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert all(reason.startswith("12 slices at one place of this series") for reason in rejected.values())


@pytest.mark.parametrize("kind", ["RGB", "palette"])
def test_colour_maps_are_no_volumes(tmp_path, monkeypatch, kind):
    for k in range(16):
        pixels = np.dstack([np.arange(24) * 10] * 3).astype(np.uint8).repeat(20, axis=0) + np.uint8(k)
        tags = {}
        if kind == "palette":
            pixels = pixels[:, :, 0]
            tags = {"PhotometricInterpretation": "PALETTE COLOR", **palette(np.arange(256) * 257, 16)}
        dicom(tmp_path / f"data/{k:02d}", pixels, "MR", SeriesInstanceUID="1.2.3", PixelSpacing=[1, 1],
              ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 3.0 * k], **tags)
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert len(rejected) == 16 and all(reason.startswith("a colour map") for reason in rejected.values())
    kept, _ = prepare_data(monkeypatch, tmp_path, "--allow-2d")
    assert len(kept) == 16 and load(kept["08"]).max() > 200


def test_floating_point_maps_are_called_so(tmp_path, monkeypatch):
    folder = series(tmp_path / "data", HU, AFFINE, modality="MR")
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.FloatPixelData = ds.pixel_array.astype("<f4").tobytes()
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
        ds.save_as(path)
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert set(rejected.values()) == {"no BitsStored: floating-point pixels, or a damaged header"}


SYNTAXES = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_series_is_the_same_in_every_transfer_syntax(tmp_path, syntax):
    """With padding, whose bits must be told in either byte order."""
    for folder in ("plain", "encoded"):
        for k in range(16):
            pixels = (HU[:, :, k].T + 1100).astype(np.int16)
            pixels[:4] = -2000
            tags = {"SeriesInstanceUID": "1.2.3", "PixelSpacing": [2.5, 2], "PixelPaddingValue": -2000,
                    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, STEP * k]}
            if folder == "encoded" and syntax == ExplicitVRBigEndian:
                tags["syntax"] = syntax
            path = dicom(tmp_path / folder / f"{k:02d}", pixels, "MR", **tags)
            if folder == "encoded" and syntax != ExplicitVRBigEndian:
                ds = pydicom.dcmread(path)
                ds.file_meta.TransferSyntaxUID = syntax
                if syntax.is_encapsulated:
                    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
                    ds.compress(syntax)
                ds.save_as(path)
    want = read_volume(tmp_path / "plain")
    assert np.array_equal(read_volume(tmp_path / "encoded"), want) and (want[0, 2:6, 4:28] < 0.01).all()


# ---- of passes over the same places one is kept -------------------------------------------------
@pytest.mark.parametrize("tag, values", [
    ("DiffusionBValue", (0.0, 1000.0)), ("EchoTime", ("2", "15")), ("TriggerTime", ("0", "400")),
    ("TemporalPositionIdentifier", ("1", "2")), ("ConvolutionKernel", ("B70f", "B30f")),
    ("AcquisitionNumber", ("2", "10")), ("AcquisitionTime", ("101010", "101110")),
    ("ContentTime", ("101010", "101110"))])
@pytest.mark.parametrize("complete", [0, 1])
def test_the_first_pass_that_covers_all_places_is_kept(tmp_path, monkeypatch, tag, values, complete):
    """DWI, perfusion and cine: the same slices again, told apart by one tag. The other pass lacks two."""
    def change(n):
        return lambda ds, _: ds.update({tag: values[n]})

    pass_of(tmp_path, "a", HU, change(complete))
    pass_of(tmp_path, "b", HU // 2, change(1 - complete), skip=(0, 15))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["aIM0000"] and len(rejected) == 14 and set(rejected.values()) == {ANOTHER_PASS}
    assert all(path.startswith("b") for path in rejected)
    assert np.array_equal(load(kept["aIM0000"]), volume_of(tmp_path))


@pytest.mark.parametrize("first, second", [
    ({"EchoTime": "9.5"}, {"EchoTime": "14"}), ({}, {"DiffusionBValue": 1000.0}),
    ({"ImageType": ["ORIGINAL", "PRIMARY"]}, {"ImageType": ["DERIVED", "SECONDARY"]})])
def test_the_first_pass_has_the_lower_number_or_the_lower_instances(tmp_path, monkeypatch, first, second):
    pass_of(tmp_path, "z", HU, lambda ds, n: ds.update({"InstanceNumber": 1 + n, **first}))
    pass_of(tmp_path, "b", HU // 2, lambda ds, n: ds.update({"InstanceNumber": 100 + n, **second}))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["zIM0000"] and len(rejected) == 16
    assert np.array_equal(load(kept["zIM0000"]), volume_of(tmp_path))


def test_two_echoes_in_three_phases_are_six_passes(tmp_path, monkeypatch):
    for echo in (2, 5):
        for phase in (1, 2, 3):
            pass_of(tmp_path, f"e{echo}p{phase}", HU // (echo * phase - 1),
                    lambda ds, n: ds.update({"EchoTime": echo, "TemporalPositionIdentifier": phase}))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["e2p1IM0000"] and len(rejected) == 5 * 16
    assert np.array_equal(load(kept["e2p1IM0000"]), volume_of(tmp_path))


def test_passes_that_only_instance_numbers_tell_apart_are_ranks_at_each_place(tmp_path, monkeypatch):
    """GE writes its b-values into a private tag."""
    for b in range(4):
        darker = HU - 20 * b * (HU > -900)
        pass_of(tmp_path, f"b{b}", darker, lambda ds, n: ds.update({"InstanceNumber": 16 * b + n}))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["b0IM0000"] and len(rejected) == 48 and set(rejected.values()) == {ANOTHER_PASS}
    assert np.array_equal(load(kept["b0IM0000"]), volume_of(tmp_path))


def test_trigger_times_that_every_slice_has_of_its_own_are_ranks_at_each_place(tmp_path, monkeypatch):
    """A cine. InstanceNumber, in the order of the files' names here, says nothing."""
    for phase in (3, 0, 2, 1):
        darker = HU - 20 * phase * (HU > -900)
        pass_of(tmp_path, f"p{phase}", darker, lambda ds, n: ds.update({
            "TriggerTime": 40 * phase + 0.5 * n, "AcquisitionTime": f"1200{n:02d}",
            "ContentTime": f"1201{n:02d}.{phase}"}))
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["p0IM0000"] and len(rejected) == 48
    assert np.array_equal(load(kept["p0IM0000"]), volume_of(tmp_path))
    (tmp_path / "data/p2IM0003").unlink()
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert {reason.partition(" (")[0] for reason in rejected.values()} == {
        "no pass covers the 16 places of this series, the largest 1"}


@pytest.mark.parametrize("tag, values", [("EchoTime", (2, 5)), ("AcquisitionNumber", (1, 2))])
def test_without_a_pass_over_all_places_a_series_is_refused(tmp_path, monkeypatch, tag, values):
    for n, skip in enumerate(((0, 1, 2), (14, 15))):
        pass_of(tmp_path, "ab"[n], HU // (n + 1), lambda ds, _: ds.update({tag: values[n]}), skip=skip)
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert len(rejected) == 27 and {reason.partition(" (")[0] for reason in rejected.values()} == {
        "no pass covers the 16 places of this series, the largest 14"}


@pytest.mark.parametrize("tag, is_joined", [("AcquisitionNumber", True), ("EchoTime", False)])
def test_acquisitions_that_meet_at_one_place_are_joined_not_echoes(tmp_path, monkeypatch, tag, is_joined):
    """A head in two scans, with one slice of both. Two echoes, half a head each, are no head."""
    pass_of(tmp_path, "a", HU, lambda ds, n: ds.update({tag: 1}), skip=range(9, 16))
    pass_of(tmp_path, "b", HU + 3 * (HU == 0), lambda ds, n: ds.update({tag: 2}), skip=range(8))
    kept, rejected = prepare_data(monkeypatch, tmp_path, code=int(not is_joined))
    assert len(rejected) == (1 if is_joined else 17) and len(kept) == int(is_joined)
    if is_joined:
        both = np.where(np.arange(16) > 8, HU + 3 * (HU == 0), HU)
        assert np.array_equal(load(kept["aIM0000"]), volume_of(tmp_path, both))


def test_one_file_under_two_names_is_one_slice(tmp_path, monkeypatch):
    """A whole series that was sent twice; and one slice again, compressed with loss."""
    folder = series(tmp_path / "data", HU, AFFINE)
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"x{path.name}")
    ds = pydicom.dcmread(folder / "IM0004")
    ds.PixelData = (ds.pixel_array + 1).tobytes()
    ds.save_as(folder / "xIM0004")
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert not rejected and np.array_equal(load(kept["IM0000"]), volume_of(tmp_path, modality="CT"))
    assert notes(tmp_path) == {"IM0000": "duplicate slices dropped"}


def test_an_equal_slice_of_another_time_is_a_copy(tmp_path, monkeypatch):
    folder = series(tmp_path / "data", HU, AFFINE)
    edit(folder, lambda ds, n: ds.update({"ContentTime": f"1201{n:02d}"}))
    ds = pydicom.dcmread(folder / "IM0004")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.ContentTime = "190000"
    ds.save_as(folder / "xIM0004")
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert not rejected and np.array_equal(load(kept["IM0000"]), volume_of(tmp_path, modality="CT"))
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(folder / "xIM0004")
    _, rejected = prepare_data(monkeypatch, tmp_path, code=1)
    assert len(rejected) == 17 and set(rejected.values()) == {"two different slices at one position"}


def test_a_series_sent_again_under_new_uids_is_not_called_another_echo(tmp_path, monkeypatch):
    for prefix in ("a", "b"):
        pass_of(tmp_path, prefix, HU)
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert list(kept) == ["aIM0000"] and len(rejected) == 16
    assert set(rejected.values()) == {prepare.NOT_TOLD_APART} and "a copy" in prepare.NOT_TOLD_APART


def test_a_query_of_a_pass_that_is_left_out_says_so(tmp_path):
    for echo in (2, 5):
        pass_of(tmp_path, f"e{echo}", HU // (echo - 1), lambda ds, n: ds.update({"EchoTime": echo}))
    assert np.array_equal(read_volume(tmp_path / "data/e2IM0007"), volume_of(tmp_path))
    with pytest.raises(UserError, match=f"e5IM0007: {ANOTHER_PASS}"):
        read_any(tmp_path / "data/e5IM0007")


# ---- frames of enhanced files are treated like files --------------------------------------------
def frame(k, **groups):
    """What an enhanced file says of a frame at the k-th place."""
    return {"PlanePositionSequence": {"ImagePositionPatient": [0, 0, STEP * k]}, **groups}


def stored(k, divisor=1):
    return (HU[:, :, k].T + 1100) // divisor


def enhanced_want(tmp_path):
    return read_volume(enhanced(tmp_path / f"{generate_uid()}.dcm", [stored(k) for k in range(16)],
                                [frame(k) for k in range(16)]))


PASSES = {
    "b-values": lambda k, n: {"MRDiffusionSequence": {"DiffusionBValue": 1000.0 * n}},
    "echoes": lambda k, n: {"MREchoSequence": {"EffectiveEchoTime": 2.5 + n}},
    "phases": lambda k, n: {"FrameContentSequence": {"TemporalPositionIndex": n + 1}},
    "times": lambda k, n: {
        "CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 40 * n + 0.3 * k}},
    "nothing": lambda k, n: {}}


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("order", ["pass by pass", "place by place", "shuffled"])
def test_of_passes_in_an_enhanced_file_the_first_is_kept(tmp_path, kind, order):
    frames = [(k, n) for n in range(3) for k in range(16)]
    if order == "place by place" or kind == "nothing":
        frames = [(k, n) for k in range(16) for n in range(3)]
    elif order == "shuffled":
        frames = np.random.default_rng(0).permutation(frames).tolist()
    path = enhanced(tmp_path / "a.dcm", [stored(k, n + 1) for k, n in frames],
                    [frame(k, **PASSES[kind](k, n)) for k, n in frames])
    assert np.array_equal(read_volume(path), enhanced_want(tmp_path))


def test_an_enhanced_file_of_parts_is_refused_with_the_count(tmp_path):
    frames = [(k, 0) for k in range(14)] + [(k, 1) for k in range(2, 16)]
    path = enhanced(tmp_path / "a.dcm", [stored(k, n + 1) for k, n in frames],
                    [frame(k, **PASSES["echoes"](k, n)) for k, n in frames])
    with pytest.raises(UserError, match="no pass covers the 16 places of this series, the largest 14"):
        read_any(path)


def test_two_echoes_may_be_two_enhanced_files(tmp_path, monkeypatch):
    for n in (0, 1):
        enhanced(tmp_path / f"data/echo{n}", [stored(k, n + 1) for k in range(16)],
                 [frame(k, **PASSES["echoes"](k, n)) for k in range(16)], SeriesInstanceUID="1.2.3")
    kept, rejected = prepare_data(monkeypatch, tmp_path)
    assert rejected == {"echo1": ANOTHER_PASS}
    assert np.array_equal(load(kept["echo0"]), enhanced_want(tmp_path))


def test_scouts_inside_an_enhanced_file_are_left_out(tmp_path):
    side = {"PlaneOrientationSequence": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}}
    frames = [(k, side if k < 3 else {}) for k in (0, 1, 2)] + [(k, {}) for k in range(16)]
    path = enhanced(tmp_path / "a.dcm", [stored(k) for k, _ in frames],
                    [frame(k, **more) for k, more in frames])
    assert np.array_equal(read_volume(path), enhanced_want(tmp_path))


def test_slices_may_have_their_own_rescale(tmp_path):
    def store_higher(ds, n):
        ds.PixelData = (ds.pixel_array + n).astype("<i2").tobytes()
        ds.RescaleIntercept = -1024 - n

    folder = edit(series(tmp_path / "own", HU, AFFINE), store_higher)
    assert np.array_equal(read_volume(folder), volume_of(tmp_path, modality="CT"))


def test_enhanced_frames_out_of_order_with_a_rescale_of_their_own_are_the_plain_series(tmp_path):
    order = np.random.default_rng(0).permutation(16)
    scale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    path = enhanced(tmp_path / "a.dcm", [HU[:, :, k].T + 1024 for k in order],
                    [frame(k, PixelValueTransformationSequence=scale) for k in order], "CT")
    flipped = AFFINE * [[-1], [-1], [1], [1]]  # the file counts to the left and back
    want = read_any(nifti(tmp_path / "a.nii.gz", HU, flipped), "ct", size=32, slices=16)[1]
    assert np.array_equal(read_volume(path), want)


# ---- Hounsfield units ---------------------------------------------------------------------------
def test_hounsfield_units_of_a_known_file(tmp_path):
    ds = pydicom.dcmread(WHEEL / "CT_small.dcm")
    hu = ds.pixel_array.astype(float) * ds.RescaleSlope + ds.RescaleIntercept
    ds.PhotometricInterpretation = "MONOCHROME1"  # which changes no Hounsfield unit
    ds.WindowWidth = ["", "400"]  # nor does this
    ds.save_as(tmp_path / "inverse.dcm")
    for path in (WHEEL / "CT_small.dcm", tmp_path / "inverse.dcm"):
        modality, x = read_any(path, size=128)  # 128 x 128 already
        assert modality == "ct" and np.abs(x[0, :, :, 0] * 2000.0 - 1000 - hu.clip(-1000, 1000)).max() < 1


@pytest.mark.parametrize("unit, intercept, is_hu", [
    ("HU", 0, True), ("", -1024, True), ("US", -1024, True), ("MGML", -1024, False), ("Z_EFF", 0, False)])
def test_a_header_says_whether_values_are_hounsfield_units(tmp_path, monkeypatch, unit, intercept, is_hu):
    """All values lie above 10, as in a tight crop of a liver: they themselves say nothing."""
    values = np.where(HU > -500, HU, 10)
    folder = series(tmp_path / "data", values, AFFINE, intercept=intercept)
    edit(folder, lambda ds, n: ds.update({"RescaleType": unit} if unit else {}))
    kept, _ = prepare_data(monkeypatch, tmp_path)
    x = load(kept["IM0000"]).astype(float)
    if is_hu:
        assert x[x > 0].min() == pytest.approx(0.5, abs=0.01) and notes(tmp_path)["IM0000"] == ""
        assert x.max() == pytest.approx(0.95, abs=0.02), "900 HU"
    else:
        assert "not Hounsfield units" in notes(tmp_path)["IM0000"] and x.max() == 1


def test_an_iodine_map_in_an_enhanced_file_is_stretched_and_noted(tmp_path, monkeypatch):
    scale = {"RescaleSlope": 0.01, "RescaleIntercept": -10, "RescaleType": "MGML"}
    enhanced(tmp_path / "data/a.dcm", [HU[:, :, k].T + 1000 for k in range(16)],
             [frame(k, PixelValueTransformationSequence=scale) for k in range(16)], "CT")
    kept, _ = prepare_data(monkeypatch, tmp_path)
    assert "not Hounsfield units" in notes(tmp_path)["a.dcm"] and load(kept["a.dcm"]).max() == 1


# ---- values as displayed ------------------------------------------------------------------------
def test_xray_windows_inversion_padding_and_depth(tmp_path):
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    want = np.clip((ramp - 2047.5) / 1023 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert np.abs(show(tmp_path, ramp, **WINDOW) - want).max() < 1e-3
    inverse = show(tmp_path, ramp, **WINDOW, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(inverse - (1 - want)).max() < 1e-3
    assert np.abs(show(tmp_path, ramp, **WINDOW, syntax=ExplicitVRBigEndian) - want).max() < 1e-3
    assert np.abs(show(tmp_path, ramp, **TWELVE) - stretched(ramp)).max() < 1e-3
    padded = np.where(np.arange(64) < 8, 65535, ramp).astype(np.uint16)
    x = show(tmp_path, padded, PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    assert (x[:, :8] == 0).all(), "padding stays black"
    assert x[:, 8:].max() == 1 and x[-1, 8:].max() < 0.1, "the rest is inverted"
    assert read_any(dicom(tmp_path / "b.dcm", (ramp // 16).astype(np.uint8)))[1].dtype == np.uint8


def linear(x):
    return (x - 2047.5) / 1023 + 0.5


@pytest.mark.parametrize("function, shown", [
    ("LINEAR", linear), ("", linear), ("LOG", linear), (["SIGMOID", "LINEAR"], linear),
    ("LINEAR_EXACT", lambda x: (x - 2048) / 1024 + 0.5),
    ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 2048) / 1024)))])
def test_windows_have_three_functions_and_any_other_counts_as_linear(tmp_path, function, shown):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", RAMP, **WINDOW))
    ds.add_new("VOILUTFunction", "CS", function)
    ds.save_as(tmp_path / "a.dcm")
    x = read_any(tmp_path / "a.dcm", size=64)[1][0, :, :, 0]
    assert np.abs(x - np.clip(shown(RAMP.astype(float)), 0, 1)).max() < 1e-3


def test_a_window_of_width_one_is_a_threshold():
    values = np.float32([-1, 9.4, 9.5, 9.6, 11])
    assert prepare.apply_window(values, 10, 1, "LINEAR").tolist() == [0, 0, 0, 1, 1]


def test_windows_with_decimal_commas_are_read(tmp_path):
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", RAMP, **TWELVE))
    set_raw(ds, "WindowCenter", "DS", b"2048,5")
    set_raw(ds, "WindowWidth", "DS", b"1025,0")
    ds.save_as(tmp_path / "a.dcm")
    x = read_any(tmp_path / "a.dcm", size=64)[1][0, :, :, 0]
    assert np.abs(x - np.clip((RAMP - 2048.0) / 1024 + 0.5, 0, 1)).max() < 1e-3


@pytest.mark.parametrize("center, width", [
    (b"2048", b"0 "), (b"nan ", b"1024"), (b"wide", b"1024"), (b"2048", b"-9")])
def test_a_window_that_is_none_costs_no_image(tmp_path, monkeypatch, center, width):
    ds = pydicom.dcmread(dicom(tmp_path / "data/a.dcm", RAMP, **TWELVE))
    set_raw(ds, "WindowCenter", "DS", center)
    set_raw(ds, "WindowWidth", "DS", width)
    ds.save_as(tmp_path / "data/a.dcm")
    kept, _ = prepare_data(monkeypatch, tmp_path, "--size", 64)
    assert np.abs(load(kept["a.dcm"])[0, :, :, 0] - stretched(RAMP)).max() < 1e-3
    assert notes(tmp_path)["a.dcm"] == "window cannot be read: not used"


def test_a_window_that_clips_nearly_everything_is_not_used(tmp_path, monkeypatch):
    """That of another copy, of 8 bits. All but the dark border of the collimator would be white."""
    y, x = np.mgrid[:64, :64]
    pixels = (800 + 40 * x + 300 * np.sin(y / 9)).astype(np.uint16)
    pixels[:3] = pixels[-3:] = pixels[:, :3] = pixels[:, -3:] = 0
    dicom(tmp_path / "data/a.dcm", pixels, WindowCenter="127", WindowWidth="255", **TWELVE)
    kept, _ = prepare_data(monkeypatch, tmp_path, "--size", 64)
    assert np.abs(load(kept["a.dcm"])[0, :, :, 0] - stretched(pixels)).max() < 1e-3
    assert notes(tmp_path)["a.dcm"] == "window shows nearly nothing: not used"


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("bits, entries", [
    (16, lambda x: (x * 16).astype("<u2").tobytes()), (12, lambda x: x.astype("<u2").tobytes()),
    (10, lambda x: (x // 4).astype("<u2").tobytes()), (8, lambda x: (x // 16).astype("u1").tobytes()),
    (8, lambda x: (x // 16).astype("<u2").tobytes())], ids=["16", "12", "10", "8 in bytes", "8 in words"])
def test_a_voi_lut_of_any_depth_is_applied_and_falls_where_it_falls(tmp_path, bits, entries, rising):
    index = np.arange(4096) if rising else np.arange(4096)[::-1]
    want = RAMP / 4095 if rising else 1 - RAMP / 4095
    x = show(tmp_path, VOILUTSequence=lut(entries(index), bits), **TWELVE)
    assert np.abs(x - want).max() < 0.005
    inverse = show(tmp_path, VOILUTSequence=lut(entries(index), bits), **TWELVE,
                   PhotometricInterpretation="MONOCHROME1")
    assert np.abs(inverse - (1 - want)).max() < 0.005


def test_values_outside_a_voi_lut_take_its_ends(tmp_path):
    sequence = lut((np.arange(1024) * 64).astype("<u2").tobytes(), 16, first=-512)
    sequence[0].LUTDescriptor = [1024, -512, 16]
    x = show(tmp_path, RAMP.astype(np.int16) - 2048, VOILUTSequence=sequence)
    want = np.clip((RAMP - 2048.0 + 512) / 1023, 0, 1)
    assert np.abs(x - want).max() < 0.002


def test_a_broken_voi_lut_leaves_the_window(tmp_path):
    broken = Sequence([item(LUTDescriptor=[4096, 0, 16])])
    assert np.array_equal(show(tmp_path, VOILUTSequence=broken, **WINDOW), show(tmp_path, **WINDOW))


def test_windows_of_functional_groups_count_frame_by_frame(tmp_path):
    """Tomosynthesis has them there."""
    centers = (1000, 2048, 3000)
    groups = [item(FrameVOILUTSequence={"WindowCenter": center, "WindowWidth": 512}) for center in centers]
    x = show(tmp_path, np.stack([RAMP] * 3), "DX", frames=3, **TWELVE,
             PerFrameFunctionalGroupsSequence=Sequence(groups))
    for n, center in enumerate(centers):
        want = np.clip((RAMP - (center - 0.5)) / 511 + 0.5, 0, 1)
        assert np.abs(x[..., n] - want).max() < 1e-3


def test_a_modality_lut_of_any_depth_is_applied(tmp_path):
    for bits, kind in ((12, "<u2"), (16, "<u2"), (8, "u1")):
        entries = ((np.arange(4096) / 4095) ** 4 * (2 ** bits - 1)).astype(kind)
        x = show(tmp_path, ModalityLUTSequence=lut(entries.tobytes(), bits), **TWELVE)
        assert np.abs(x - stretched(entries[RAMP].astype(float))).max() < 0.01, bits


def test_the_modality_lut_of_angiography_is_not_for_display(tmp_path):
    """PS3.4 N.2.5: it leads to linear X-ray intensity."""
    entries = (65535 * (np.arange(4096) / 4095) ** 4).astype("<u2").tobytes()
    x = show(tmp_path, modality="XA", SOPClassUID=XA, ModalityLUTSequence=lut(entries, 16), **TWELVE)
    assert np.abs(x - stretched(RAMP)).max() < 1e-3


@pytest.mark.parametrize("tags", [
    {"RescaleSlope": "0", "RescaleIntercept": "0"},
    {"ModalityLUTSequence": Sequence([item(LUTDescriptor=[9, 0, 16])])}],
    ids=["slope of zero", "LUT without data"])
def test_a_broken_modality_transform_costs_no_image(tmp_path, tags):
    assert np.array_equal(show(tmp_path, **tags, **WINDOW), show(tmp_path, **WINDOW))


@pytest.mark.parametrize("vr, value", [("US", 63536), ("SS", -2000)])
@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_padding_is_told_by_its_bits_whatever_its_sign(tmp_path, vr, value, kind):
    """The same 16 bits are -2000 and 63536, in the tag and in the pixels."""
    def pad(ds, n):
        pixels = ds.pixel_array.astype(np.int64)
        pixels[:4] = 63536 if kind is np.uint16 else -2000
        ds.PixelData = pixels.astype(kind).tobytes()
        ds.PixelRepresentation = int(kind is np.int16)
        ds.add_new("PixelPaddingValue", vr, value)

    folder = edit(series(tmp_path / "padded", HU, AFFINE, modality="MR"), pad)
    black = series(tmp_path / "black", np.where(np.arange(20)[:, None] < 4, -1024, HU), AFFINE, modality="MR")
    assert np.array_equal(read_volume(folder), read_volume(black))


def test_a_range_of_padding_in_the_other_sign_is_black(tmp_path):
    pixels = RAMP.astype(np.int16)
    pixels[:, :8] = -32768
    pixels[:, 8:16] = -32000
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", pixels))
    ds.add_new("PixelPaddingValue", "US", 32768)
    ds.add_new("PixelPaddingRangeLimit", "US", 33536)
    ds.save_as(tmp_path / "a.dcm")
    x = read_any(tmp_path / "a.dcm", size=64)[1][0, :, :, 0]
    assert (x[:, :16] == 0).all() and np.abs(x[:, 16:] - stretched(RAMP[:, 16:])).max() < 1e-3


def test_padding_of_an_inverted_mr_is_black_too(tmp_path):
    def invert(ds, n):
        pixels = 3000 - ds.pixel_array
        pixels[:4] = -2000
        ds.PixelData = pixels.astype(np.int16).tobytes()
        ds.add_new("PixelPaddingValue", "SS", -2000)
        ds.PhotometricInterpretation = "MONOCHROME1"

    folder = edit(series(tmp_path / "inverted", HU, AFFINE, modality="MR"), invert)
    black = series(tmp_path / "black", np.where(np.arange(20)[:, None] < 4, -1000, HU), AFFINE, modality="MR")
    assert np.abs(read_volume(folder).astype(float) - read_volume(black)).max() < 2e-3


def test_a_slice_of_padding_alone_is_background(tmp_path):
    def pad(ds, n):
        ds.add_new("PixelPaddingValue", "SS", -2000)
        if n == 3:
            ds.PixelData = np.full((20, 24), -2000, np.int16).tobytes()

    folder = edit(series(tmp_path / "padded", HU, AFFINE, modality="MR"), pad)
    black = HU.copy()
    black[:, :, 3] = -1024
    assert np.array_equal(read_volume(folder), volume_of(tmp_path, black))


def test_all_frames_of_a_file_are_stretched_as_one(tmp_path):
    """Contrast arrives in a cine: what does not change must not, and what brightens evenly must."""
    frames = np.full((20, 64, 64), 1000, np.uint16) + np.arange(64, dtype=np.uint16) // 2
    frames[:, 20:44, 20:44] += (150 * np.arange(20, dtype=np.uint16))[:, None, None]
    x = show(tmp_path, frames, "XA", frames=20, SOPClassUID=XA, **TWELVE)
    assert np.ptp(x[2, 16]) == 0
    low, high = np.percentile(frames, (0.5, 99.5))
    want = np.clip((frames[:, 32, 32] - low) / (high - low), 0, 1)
    assert np.abs(x[32, 32] - want).max() < 1e-3


def test_long_clips_are_displayed_frame_by_frame(tmp_path, monkeypatch):
    """Tomosynthesis: all steps from file to screen of all frames at once would fill the memory."""
    frames = np.random.default_rng(0).integers(0, 4096, (16, 128, 128), np.uint16)
    ds = pydicom.dcmread(dicom(tmp_path / "a.dcm", frames, "DX", **WINDOW))
    del ds.WindowCenter
    stored = dict(enumerate(frames))
    exact = prepare.display(ds, stored, "xray", set())
    monkeypatch.setattr(prepare, "MOST_ASKED", 10_000)
    tracemalloc.start()
    shown = prepare.display(ds, stored, "xray", set())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(plane.nbytes for plane in shown.values())
    assert max(np.abs(shown[n] - exact[n]).max() for n in range(16)) < 0.01, "a part of the pixels is enough"


@pytest.mark.parametrize("bits, kind, factor", [
    (8, "u1", 1), (8, "<u2", 1), (16, "<u2", 257), (16, "<u2", 1)])
def test_palettes_reach_white_whatever_their_depth(tmp_path, bits, kind, factor):
    index = (RAMP // 16).astype(np.uint8)
    x = show(tmp_path, index, "US", PhotometricInterpretation="PALETTE COLOR",
             **palette(np.arange(256) * factor, bits, kind))
    assert np.abs(x - index / 255).max() < 0.005


def test_a_palette_of_more_than_256_entries_of_8_bits_is_not_wrapped(tmp_path):
    x = show(tmp_path, RAMP, "US", PhotometricInterpretation="PALETTE COLOR", **TWELVE,
             **palette(np.arange(4096) // 16, 8, "u1"))
    assert np.abs(x - RAMP / 4096).max() < 0.005


def test_an_image_without_its_palette_is_grey(tmp_path):
    index = (RAMP // 16).astype(np.uint8)
    x = show(tmp_path, index, "US", PhotometricInterpretation="PALETTE COLOR")
    assert np.abs(x - index / 255).max() < 0.005


def test_big_endian_files_look_like_their_twins_of_a_wheel():
    folder = Path(pytest.importorskip("data_store").__file__).parent / "data"
    want = read_any(folder / "OBXXXX1A.dcm")[1]
    assert want.max() > 50 and np.array_equal(read_any(folder / "OBXXXX1A_expb.dcm")[1], want)


def test_palette_and_ybr_ultrasound_from_the_pydicom_wheel():
    modality, x = read_any(WHEEL / "examples_palette.dcm")
    assert modality == "ultrasound" and x.shape == (1, 256, 256, 1) and 20 < x[x > 0].mean() < 200
    modality, x = read_any(WHEEL / "examples_ybr_color.dcm", frames=8)
    assert x.shape == (3, 256, 256, 8) and x.dtype == np.uint8


@pytest.mark.parametrize("tags", [{"PixelAspectRatio": [2, 1]}, {"PixelSpacing": [0.4, 0.2]},
                                  {"ImagerPixelSpacing": [0.4, 0.2]}], ids=lambda tags: [*tags][0])
def test_images_keep_their_aspect_in_mm(tmp_path, tags):
    """20 rows of 2 units are as long as 40 columns of 1: the square is filled, without the tag half of it."""
    ramp = np.arange(800, dtype=np.uint8).reshape(20, 40) % 200 + 50
    for wanted, more in ((40, tags), (20, {})):
        x = read_any(dicom(tmp_path / "a.dcm", ramp.astype(np.uint8), **more), size=40)[1]
        assert (x[0, :, 20, 0] > 0).sum() == wanted

# ---- what the header says -----------------------------------------------------------------------
@pytest.mark.parametrize("text, parts", {
    "CT ABDOMEN": "abdomen", "CT ABD/PEL": "abdomen pelvis", "CTA CHEST": "chest", "CT ANKLE LEFT": "ankle",
    "CHEST": "chest", "PORT CHEST": "chest", "Abdomen_Pelvis": "abdomen pelvis",
    "C_A_P": "abdomen chest pelvis", "CHEST/ABD/PELVIS": "abdomen chest pelvis",
    "CHESTABDPELVIS": "abdomen chest pelvis", "EAR": "head",
    "T SPINE": "tspine", "CERVIX": "pelvis", "CERVICAL_SPINE": "cspine", "RESEARCH": "", "LOCATOR": "",
    "CT Thorax with contrast": "chest", "": "", "EXTREMITY": ""}.items())
def test_body_parts_of_messy_tags(text, parts):
    assert " ".join(sorted(prepare.body_parts(text))) == parts


def test_the_first_text_that_names_a_body_part_counts():
    assert prepare.body_parts("", "UNKNOWN", "MR KNEE LEFT", "CHEST") == ("knee",)


# ---- the whole wheels ---------------------------------------------------------------------------
@pytest.mark.parametrize("package, folder", [
    ("pydicom", "data"), ("data_store", "data"), ("nibabel", "tests/data")])
def test_every_file_of_the_wheels_is_kept_or_named(tmp_path, monkeypatch, package, folder):
    source = Path(pytest.importorskip(package).__file__).parent / folder
    monkeypatch.setattr(prepare, "SECONDS", 20)
    kept, rejected = prepare_main(monkeypatch, tmp_path, "folder", source, "--allow-2d", "--modality", "mri",
                                  "--size", "32", "--slices", "8", "--frames", "4")
    for root, _, names in os.walk(source):
        for name in names:
            path = os.path.relpath(os.path.join(root, name), source)
            # A series is kept under the name of its first file.
            above = {os.path.dirname(name) for name in kept}
            assert path in rejected or path in kept or os.path.dirname(path) in above, path
    assert len(kept) > {"pydicom": 55, "data_store": 24, "nibabel": 4}[package]
    assert not [reason for reason in rejected.values() if not reason]
    for row in kept.values():
        x = load(row)
        assert x.dtype in (np.uint8, np.float16) and np.isfinite(x).all() and x.min() >= 0


# ---- one file, as a query -----------------------------------------------------------------------
def test_any_file_of_a_series_stands_for_it(tmp_path):
    want = read_volume(series(tmp_path / "a", HU, AFFINE))
    assert np.array_equal(read_volume(tmp_path / "a/IM0005"), want)
    for path in series(tmp_path / "b", -HU, AFFINE).iterdir():
        path.rename(tmp_path / f"a/x{path.name}")
    with pytest.raises(UserError, match="holds 2 samples; name one, IM0000, xIM0000"):
        read_any(tmp_path / "a")
    assert np.array_equal(read_volume(tmp_path / "a/IM0005"), want)
    alone = dicom(tmp_path / "c/one.dcm", HU[:, :, 8], "CT", SeriesInstanceUID="1.2")
    assert read_any(alone, size=32)[1].shape == (1, 32, 32, 1)


def test_what_a_query_is_taken_for(tmp_path, capsys):
    """Told, else tagged, else likely, else by kind; the last two are said."""
    volume = nifti(tmp_path / "a.nii.gz", HU, AFFINE)
    tagged = dicom(tmp_path / "a.dcm", SPOT, "DX")
    png(tmp_path / "a.png")
    for path, told, likely, want, said in [
            (volume, None, None, "ct", True), (volume, None, "mri", "mri", True),
            (volume, "mri", "ct", "mri", False),
            (tagged, None, "ultrasound", "xray", False), (tagged, "ultrasound", None, "ultrasound", False),
            (tmp_path / "a.png", None, None, "xray", True),
            (video(tmp_path / "a.avi"), None, None, "endoscopy", True)]:
        modality, x = read_any(path, told, likely, size=16, slices=4, frames=4)
        assert modality == want and x.shape[1:3] == (16, 16)
        assert capsys.readouterr().err == f"{path}: taken as {want} (--modality says otherwise)\n" * said
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in (("fifo", "no such file"), ("none", "no such file"),
                          ("broken.png", "cannot be decoded")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_any(tmp_path / name)


def test_a_stream_that_does_not_say_its_length_is_drawn_from_too(tmp_path):
    """An MPEG program stream declares no number of frames; the drawn ones are those of any other clip."""
    video(tmp_path / "a.mpg", 25, codec="mpeg2video")
    x = read_any(tmp_path / "a.mpg", frames=8, size=32)[1]
    assert x.shape == (3, 32, 32, 8) and (np.diff(x[0, 16, 16].astype(int)) > 3).all()
