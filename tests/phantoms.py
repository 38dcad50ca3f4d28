"""Labelled phantoms in five modalities, written as the files a hospital would send.

In: a folder, a size n, a seed. Out: n training and .8 n test patients per modality (MRI: test only), one sample each:
  ct          (96-128)^2 x 24-48 HU volume   .nii.gz in many axis orders, or a folder of DICOM slices
  xray        attenuation projection         12-bit DICOM, one third MONOCHROME1
  mri         T1, T2 or PD contrast          .nii.gz, never trained on
  ultrasound  speckled sector with shadows   .png, grey
  endoscopy   24-28 frames through a tube    .avi, RGB
and labels.csv (path,labels,patient,split,modality) with `part:<body part>` and, for two in three, `lesion:<kind>`.
A body is ellipsoids and tubes in 3D; a modality is a column of TISSUES and a way to look at them.
Run: python -m tests.phantoms FOLDER
"""
import csv
import gzip
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRBigEndian,
                         ExplicitVRLittleEndian, generate_uid)

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
TISSUES = {  # CT in HU; MRI as T1, T2, PD; ultrasound echo and attenuation per mm
    "air": (-1000, .00, .00, .00, .00, .000),
    "gas": (-950, .00, .00, .00, .90, .040),
    "lung": (-830, .08, .10, .12, .80, .040),
    "fat": (-100, 1.0, .75, .80, .40, .002),
    "muscle": (55, .42, .22, .55, .25, .004),
    "organ": (110, .55, .38, .65, .45, .004),
    "kidney": (200, .40, .62, .70, .20, .003),
    "brain": (60, .62, .50, .80, .30, .004),
    "vessel": (190, .10, .12, .20, .02, .001),
    "fluid": (5, .12, 1.0, .90, .01, .000),
    "cartilage": (110, .45, .45, .75, .12, .006),
    "bone": (900, .04, .04, .06, 1.0, .060),
    "marrow": (280, .85, .55, .60, .30, .040),
    "nodule": (260, .75, .80, .85, .10, .006),
    "cyst": (-180, .08, 1.0, .95, .00, .000),
    "calcification": (1200, .02, .02, .03, 1.3, .150),
}


# ---- bodies ----------------------------------------------------------------------------------------------------------

LAYERS = {  # rows of PARTS that are more than a tissue: (round of drawing, tissue, mm below the surface)
    "skin": [(0, "fat", 0), (1, "muscle", 12)],
    "belly": [(0, "fat", 0), (1, "muscle", 13), (1, "fat", 27)],
    "skull": [(0, "fat", -6), (2, "bone", 0), (2, "fluid", 7), (2, "brain", 10)],
    "bone": [(2, "bone", 0), (3, "marrow", 3)],  # last, so that joined shafts share one cavity
    "gut": [(2, "muscle", 0), (2, "organ", 4)],
    "cage": [(2, "bone", 0)],
}


def spine(y, low, high, radius, gap):
    """Rows of PARTS: discs, vertebrae with their processes, the canal behind."""
    back, wide = y + radius * 1.2, radius / 3
    rows = [("cartilage", [(0, y, low), (0, y, high)], radius * .9)]
    for z in range(low, high, gap):
        rows += [("bone", [(-wide, y, z), (wide, y, z)], (radius - wide, radius * .8, gap * .4)),
                 ("bone", [(0, back, z), (0, y + radius * 2.6, z - gap * .4)], radius * .2),
                 ("bone both", [(radius * .6, back, z), (radius * 2, y + radius * 1.5, z)], radius * .25)]
    return [*rows, ("fluid", [(0, back, low), (0, back, high)], radius * .4)]


# Field of view in mm and rows (tissue or layers, one centre or a path, radius or radii, mm that points stray if not 2).
# x to the left, y to the back, z up; "both": and its mirror image. Later rows are drawn over earlier ones.
PARTS = {
    "head": (270, [
        ("muscle", (0, -32, -48), (58, 58, 62)), ("muscle", [(0, 25, -40), (0, 32, -150)], 54),
        ("muscle", (0, -96, -32), (12, 18, 20)), *spine(24, -140, -50, 16, 19), ("bone", (0, -66, -52), (30, 24, 20)),
        ("bone both", [(0, -76, -97), (18, -74, -96), (46, -15, -82), (50, -5, -45)], 8),
        ("bone both", [(60, -45, -22), (40, -80, -26)], 6), ("skull", (0, 0, 20), (72, 90, 76)),
        ("bone", (0, -30, -42), (45, 40, 7)), ("brain", (0, 48, -30), (45, 32, 25)),
        ("fluid both", [(9, -35, 32), (11, 5, 42), (20, 35, 25)], 8), ("fat both", (33, -72, -6), (20, 24, 18)),
        ("fluid both", (33, -80, -6), 12), ("gas both", (29, -62, -38), (14, 18, 15)),
        ("gas", (0, -62, -34), (9, 32, 20)), ("gas", [(0, -18, -50), (0, -14, -140)], 9)]),
    "neck": (210, [
        ("skin", (0, 0, -20), (62, 62, 420)), ("skin", [(-110, 10, -165), (110, 10, -165)], (80, 75, 90)),
        ("fat both", [(40, 5, 90), (34, 5, -140)], 9), *spine(16, -190, 150, 15, 20),
        ("vessel both", [(28, -8, 120), (24, -8, -180)], 5), ("vessel both", [(38, -2, 120), (32, -6, -180)], 7),
        ("organ both", (17, -26, -30), (13, 13, 28)),
        ("bone both", [(0, -64, 61), (16, -62, 62), (45, -10, 72), (48, -5, 100)], 8),
        ("cartilage", [(0, -30, 35), (0, -28, 5)], 16), ("cartilage", [(0, -26, 0), (0, -8, -190)], 12),
        ("gas", [(0, -18, 110), (0, -28, 20), (0, -27, 0), (0, -8, -190)], 9),
        ("bone both", [(0, -42, 40), (20, -20, 42)], 4), ("bone both", [(8, -40, -120), (130, -10, -95)], 7),
        ("lung both", (48, 10, -190), (40, 40, 75))]),
    "chest": (430, [
        ("skin", [(-65, 0, -20), (65, 0, -20)], (113, 116, 330)), ("skin both", (165, 10, 140), (62, 55, 90)),
        ("fat both", (82, -108, -20), (56, 26, 50), 8), ("cage", (0, 0, 15), (150, 102, 185)),
        ("lung both", [(66, 2, -50), (66, 2, 70)], (58, 82, 85)),
        *[("vessel both", [(30, 10, 15), (60, 0, 10), (80, 0, 10)], 4, 28)] * 5,
        ("muscle", (0, 0, 40), (30, 70, 160)), ("organ", (-72, 0, -150), (95, 90, 95)),
        ("organ", (80, 5, -165), (85, 85, 88)), ("gas", (70, -35, -115), (28, 25, 18)),
        ("muscle", (26, -32, -45), (66, 52, 66), 6), ("vessel", (34, -30, -50), (36, 28, 40)),
        *spine(72, -210, 200, 19, 26), ("gas", [(0, 5, 200), (0, 18, 62)], 9),
        ("vessel", [(5, -20, -10), (0, -22, 65), (20, 20, 82), (24, 48, 60), (20, 48, -210)], 12),
        ("gas both", [(0, 18, 62), (42, 15, 22)], 7), ("bone", (0, -96, 40), (18, 7, 85)),
        ("bone both", [(14, -80, 128), (70, -75, 150), (150, -10, 160)], 7),
        ("bone both", [(80, 95, 70), (128, 72, 70)], (6, 6, 60)), ("bone both", (172, 10, 135), 24),
        ("bone both", [(174, 10, 130), (178, 10, 90)], 12)]),
    "abdomen": (390, [
        ("belly", [(-60, 0, 0), (60, 0, 0)], (112, 116, 420)), ("muscle both", [(34, 55, 60), (62, 35, -190)], 20),
        ("muscle both", (45, 92, 0), (38, 22, 300)), *spine(62, -170, 200, 23, 34), ("cage", (0, 0, 135), (150, 102, 115)),
        ("organ", (-66, -12, 85), (82, 78, 78), 6), ("fluid", (-50, -55, 40), (16, 18, 24)),
        ("organ", (100, 35, 85), (30, 45, 48)), *[("vessel", [(-25, 0, 60), (-60, 0, 80)], 5, 16)] * 4,
        ("muscle", (50, -40, 80), (56, 40, 44)), ("gas", (54, -58, 88), (24, 20, 22), 6),
        ("kidney both", (72, 48, 8), (29, 26, 54), 5), ("fat both", (60, 44, 8), (14, 12, 24)),
        ("vessel", [(8, 28, 200), (5, 30, -80)], 11), ("vessel", [(-18, 26, 200), (-14, 30, -80)], 11),
        ("gut", [(-118, 10, -120), (-116, 5, -5), (-90, -60, 15), (0, -78, -20), (95, -55, 30), (118, 20, -130)], 22, 6),
        *[("gut", [(0, -45, -75)] * 3, 14, 38)] * 8, *[("gas", (0, -45, -40), (16, 12, 12), 50)] * 5,
        ("bone both", [(70, 75, -175), (135, 15, -175)], (10, 10, 60))]),
    "pelvis": (410, [
        ("skin", [(-70, 0, 110), (70, 0, 110)], (116, 118, 235)), ("skin both", [(92, 5, -55), (98, 5, -260)], 88),
        ("fat", (0, -15, 75), (105, 75, 120)), *[("gut", [(0, -25, 80)] * 3, 14, 34)] * 8,
        ("fat both", [(30, 80, -40), (60, 85, 60)], 10), ("bone both", (86, 2, -8), 34),
        ("bone both", [(45, 62, 80), (122, -4, 80)], (9, 9, 60)),
        ("bone both", [(82, -8, -14), (12, -56, -42), (56, 15, -88), (80, 18, -20)], 9),
        ("bone", (0, 66, 62), (52, 16, 55)), ("bone", (0, 74, 10), (22, 9, 30)), *spine(52, 112, 300, 24, 35),
        ("cartilage both", (92, 0, -12), 28), ("bone both", (92, 0, -12), 25),
        ("bone both", [(92, 0, -12), (132, 6, -48), (116, 2, -280)], 17), ("fluid", (0, -25, -10), (38, 32, 30), 6),
        ("muscle", [(0, 42, 50), (0, 45, -60)], 17), ("gas", (0, 42, 0), 11, 15), ("organ", (0, -2, -45), (22, 18, 18)),
        ("vessel both", [(8, 25, 170), (55, -25, 40), (75, -58, -50), (80, -40, -260)], 7)]),
    "knee": (170, [
        ("skin", [(0, 5, 190), (0, 10, -190)], 60), ("fat", (0, 35, 10), (26, 18, 60)),
        ("fat", (0, -40, 0), (28, 16, 36)), ("fluid", (0, -34, 46), (24, 6, 26)),
        ("cartilage", (0, 2, 0), (44, 32, 13)), ("cartilage", [(0, -46, 40), (0, -36, -40)], 5),
        ("vessel", [(4, 38, 190), (0, 36, -190)], 5), ("bone", [(0, -6, 220), (0, -4, 40)], 16),
        ("bone", (0, -2, 38), (30, 22, 34)), ("bone both", (22, 4, 26), (22, 30, 24)),
        ("bone", (0, 0, -22), (44, 30, 17)), ("bone", (1, 0, -40), (28, 24, 34)),
        ("bone", [(2, 0, -40), (4, 2, -220)], 15), ("bone", (0, -26, -48), (10, 8, 14)), ("bone", (38, 18, -34), 11),
        ("bone", [(38, 18, -34), (36, 20, -220)], 7), ("bone", (0, -44, 26), (20, 10, 21))]),
    "foot": (270, [
        ("skin", [(0, 36, 250), (0, 42, 0)], 41), ("skin", (0, 62, -34), (34, 40, 32)),
        ("skin", [(0, 45, -20), (0, -45, -42)], 32), ("skin", (0, -75, -48), (50, 62, 19)),
        ("muscle", [(0, 76, 150), (0, 84, -20)], 6), ("bone", [(4, 32, 250), (3, 34, 30)], 16),
        ("bone", [(-24, 44, 250), (-25, 44, 8)], 8), ("bone", (2, 28, 8), (19, 28, 14)),
        ("bone", (0, 60, -26), (16, 36, 18)), ("bone", (8, -6, -4), (16, 10, 14)), ("bone", (-14, -6, -22), (13, 18, 12)),
        *[("bone", (x, -26, -14), (8, 11, 10)) for x in (-1, 11, 22)],
        *[("fat", [(x, -95, -51), (x * 1.1, -132, -54)], 11) for x in (-26, -13, 0, 13, 26)],
        *[("bone", [(x * .8, -38, x / 4 - 24), (x, -95, -51), (x * 1.1, -132, -54)], 5 + 3 * (x == 26))
          for x in (-26, -13, 0, 13, 26)]]),
}
ECHO_PARTS = ("neck", "abdomen", "pelvis", "knee")
HOSTS = ("lung", "organ", "brain", "kidney", "muscle", "marrow")  # where lesions grow


class Shape(NamedTuple):
    """What is less than `radii` mm from the line between two points: an ellipsoid if they are one."""
    tissue: str
    start: np.ndarray  # (3,) each
    end: np.ndarray
    radii: np.ndarray
    ribs: bool = False  # cut into bands, the inside left as it was

    def distance(self, points):
        """About the signed distance of points (3, ...) in mm, never too far, negative inside."""
        points, axis = ((points.T - self.start) / self.radii).T, (self.end - self.start) / self.radii
        if axis.any():
            along = np.clip(np.einsum("i,i...->...", axis / (axis @ axis), points), 0, 1)
            points = points - np.multiply.outer(axis, along)
        gap = (np.sqrt(np.einsum("i...,i...->...", points, points)) - 1) * self.radii.min()
        if not self.ribs:
            return gap
        fall = (points[2] * self.radii[2] - .5 * points[1] * self.radii[1]) / 29  # ribs fall towards the front
        return np.maximum(np.abs(gap + 3.5) - 3.5, .9 * 29 * (np.abs(fall % 1 - .5) - .2))


def body(part, rng):
    """The shapes of one patient in the order to draw them, a lesion last, and its kind or None."""
    (size, rows), thick, drawn = PARTS[part], rng.uniform(.6, 1.5), []
    for row in rows:
        name, path, radii, stray = (*row, 2)[:4]
        name, _, both = name.partition(" ")
        for side in (1, -1) if both else (1,):
            points = np.atleast_2d(path) * (side, 1, 1)
            points = np.float32(points + rng.normal(0, stray, points.shape))
            reach = np.float32(np.broadcast_to(radii, 3) * rng.uniform(.92, 1.08, 3))
            ends = points[1:] if len(points) > 1 else points
            for turn, tissue, depth in LAYERS.get(name, [(2, name, 0)]):
                inner = reach - np.float32(depth * thick)
                if inner.min() > 0:
                    drawn += [(turn, Shape(tissue, a, b, inner, name == "cage")) for a, b in zip(points, ends)]
    shapes = [shape for _, shape in sorted(drawn, key=lambda pair: pair[0])]
    if rng.random() < 1 / 3:
        return shapes, None
    kind = str(rng.choice(["nodule", "cyst", "calcification"]))
    hosts = [s for s in shapes if s.tissue in HOSTS and s.radii.min() > 12]
    host = hosts[rng.integers(len(hosts))]
    centre = (host.start + host.end) / 2 + host.radii * rng.uniform(-.4, .4, 3)
    centre = centre.clip(-.2 * size, .2 * size)
    count, radius = (6, .012) if kind == "calcification" else (1, .04)
    for _ in range(count):
        place = np.float32(centre + rng.normal(0, .004 * (count - 1), 3) * size)
        shapes.append(Shape(kind, place, place, np.float32(radius * size * rng.uniform(.6, 1.4, 3))))
    return shapes, kind


# ---- looking at a body -----------------------------------------------------------------------------------------------

def pose(points, rng, size, turn, freedom=1):
    """Points (3, ...) mm of the scanner -> of a patient who lies turned, off centre, small or large, and bent."""
    points = [np.float32(p) for p in points]
    for axis, (cos, sin) in enumerate(zip(np.cos(np.radians(turn)).tolist(), np.sin(np.radians(turn)).tolist())):
        one, two = points[axis - 2], points[axis - 1]
        points[axis - 2], points[axis - 1] = cos * one - sin * two, sin * one + cos * two
    zoom = (1 + freedom * rng.uniform(-.35, .35)) * rng.uniform(.92, 1.08, 3)
    move = freedom * rng.uniform(-.18, .18, 3) * size
    points = np.stack([p / np.float32(z) + np.float32(m) for p, z, m in zip(points, zoom, move)])
    for _ in range(2):  # two random waves: no two organs have the same outline
        wave, push = np.float32(rng.normal(0, 1.6 * np.pi / size, 3)), np.float32(rng.normal(0, .017 * size, 3))
        phase = np.einsum("i,i...->...", wave, points) + np.float32(rng.uniform(0, 6.28))
        points += np.multiply.outer(push, np.sin(phase))
    return points


def box(shape, extent):
    """Points (3, *shape) on a box of `extent` mm."""
    axes = [np.linspace(-.5, .5, k) * e for k, e in zip(shape, extent)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def paint(shapes, points, values, edge):
    """Draw shapes in order, with soft edges of `edge` mm: points (3, X, Y, Z), {tissue: value} -> (X, Y, Z) float32."""
    image, step = np.full(points.shape[1:], values["air"], np.float32), 4
    coarse = points[:, ::step, ::step, ::step]  # most shapes are small: look closely only where they can be
    steps = [np.linalg.norm(np.diff(coarse, axis=axis), axis=0).max(initial=0) for axis in (1, 2, 3)]
    for shape in shapes:
        near = np.nonzero(shape.distance(coarse) < edge / 2 + sum(steps))
        if len(near[0]):
            part = tuple(slice(i.min() * step, (i.max() + 1) * step) for i in near)
            inside = np.clip(.5 - shape.distance(points[(slice(None), *part)]) / np.float32(edge), 0, 1)
            image[part] += inside * (np.float32(values[shape.tissue]) - image[part])
    return image


def look(column, rng, spread):
    """One column of TISSUES, every value moved a little: no tissue looks alike in two patients."""
    return {tissue: row[column] + spread * rng.normal() * (tissue not in ("air", "gas", "lung"))
            for tissue, row in TISSUES.items()}


def volume(part, rng, column, spread):
    """A scan: values (W, H, S) float32 along patient left, back, up; voxel size (3,) mm; lesion kind."""
    (shapes, kind), size, pixels = body(part, rng), PARTS[part][0], rng.choice([96, 112, 128])
    shape = np.array([pixels, pixels, rng.integers(24, 49)])
    extent = size * np.array([1, 1, rng.uniform(.5, .9)])
    points = pose(box(shape, extent), rng, size, rng.uniform(-1, 1, 3) * (8, 8, 20))
    return paint(shapes, points, look(column, rng, spread), size / pixels), extent / shape, kind


def ct(part, rng):
    """HU (W, H, S) int16 with streaky noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, 0, 20)
    noise = rng.normal(0, rng.uniform(15, 50), image.shape)
    image += (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.round(image).clip(-1024, 3071).astype(np.int16), voxel, kind


def mri(part, rng):
    """T1, T2 or PD (W, H, S) int16 in scanner units with a coil profile and Rician noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, rng.integers(1, 4), .06)
    grid = box(image.shape, (2, 2, 2))
    gain = np.einsum("i,i...->...", rng.normal(0, .25, 3), grid - .4 * grid ** 2)
    noise = rng.normal(0, rng.uniform(.01, .05), (2, *image.shape))
    image = np.hypot(image * np.exp(gain) + noise[0], noise[1])
    return (image * rng.uniform(300, 3000)).astype(np.int16), voxel, kind


def xray(part, rng):
    """12-bit picture (H, W) uint16, dense is bright; None; lesion kind: log of Beer-Lambert with photon noise."""
    (shapes, kind), size, width = body(part, rng), PARTS[part][0], rng.integers(96, 129)
    view = rng.choice([0, 0, 0, 180, 40, -40, 90, -90]) + rng.uniform(-12, 12)  # frontal to lateral
    points = box((width, 64, 128), size * np.array([width / 128, 1.15, 1]))
    points = pose(points, rng, size, (rng.uniform(-8, 8), rng.uniform(-20, 20), view))
    hu = paint(shapes, points, look(0, rng, 20), size / 80)
    density = np.clip(1 + hu / 1000, 0, None) + .9 * np.clip(hu / 1000 - .15, 0, None)  # bone stops soft rays
    line = density.mean(1).T[::-1] * 5.2  # (H, W), head up
    line = -np.log(rng.poisson(rng.uniform(2e3, 2e4) * np.exp(-line)) + 1.)
    line = (line - line.min()) / np.ptp(line)
    return np.round(line * rng.uniform(2500, 4000)).astype(np.uint16), None, kind


def ultrasound(part, rng):
    """Sector picture (160, 192) uint8, None, lesion kind: a curved probe on the skin in front of the body's middle."""
    (shapes, kind), size = body(part, rng), PARTS[part][0]
    front = shapes[0].radii[1]
    depth, half = front + size * rng.uniform(.2, .3), np.radians(rng.uniform(33, 37))
    near = depth * rng.uniform(.18, .22)
    angle, length = np.linspace(-half, half, 160)[:, None], near + np.linspace(0, depth, 224)
    points = np.stack([np.sin(angle) * length, np.cos(angle) * length - near - front, 0 * angle * length])
    turn = rng.uniform(-1, 1, 3) * (8, 10, 12) + (0, 180 * rng.integers(2), 0)  # from left or right
    points = pose(points, rng, size, turn, .3)[..., None]  # (3, 160, 224, 1)
    points[1] += shapes[0].distance(points[:, 80, :1, 0])  # onto the skin
    echo, loss = look(4, rng, .03), look(5, rng, 0)
    echo["air"] = echo["muscle"] / 2  # gel around the skin
    echo, loss = (paint(shapes, points, values, depth / 150)[..., 0] for values in (echo, loss))  # (160, 224) each
    edges = sum(gain * np.abs(np.diff(a, axis=1, prepend=a[:, :1])) for gain, a in ((1, echo), (2, loss)))
    speckle = rng.rayleigh(.8, echo.shape)
    speckle = (speckle + np.roll(speckle, 1, 0) + np.roll(speckle, 2, 0)) / 3  # as wide as the beam
    passed = np.exp(-2 * np.cumsum(loss, 1) * depth / 224)  # shadow behind bone
    signal = (np.clip(echo, .004, None) * speckle + 1.2 * edges) * passed
    signal = np.clip(1 + np.log10(signal + 1e-4) / rng.uniform(1.8, 2), 0, 1) ** rng.uniform(.9, 1.1)
    low, (y, x) = near * np.cos(half), np.mgrid[:160, :192]
    zoom, left, top = (near + depth - low) / 156 * rng.uniform(.7, 1.3), *rng.uniform(-1, 1, 2) * (48, 36)
    y, x = (y - top) * zoom + low, (x - 95.5 - left) * zoom  # mm from the tip
    row, column = (np.arctan2(x, y) / half + 1) * 79.5, (np.hypot(x, y) - near) / depth * 223
    seen = (row >= 0) & (row <= 159) & (column >= 0) & (column <= 223)
    picture = signal[row.clip(0, 159).round().astype(int), column.clip(0, 223).round().astype(int)] * seen
    return np.uint8(picture * 255), None, kind


# ---- endoscopy: flying through a tube of about radius 1 --------------------------------------------------------------

ORGANS = {"colon": 1.5, "stomach": .6, "bronchus": .3, "oesophagus": 1}  # how dense the veins are
FINDINGS = {"polyp": (.85, .28, .28), "ulcer": (.95, .9, .65), "bleeding": (.45, .02, .02)}  # colours


def lumen(organ, phi, z, folds, deep, shift):
    """Radius of the organ at an angle and a depth."""
    if organ == "colon":  # half-moon folds in three rows between wide pockets
        return 1.1 - .42 * deep * np.exp(-(8 * (z / 1.3 % 1 - .5)) ** 2) * (.7 + .3 * np.cos(3 * phi + shift + z))
    if organ == "stomach":  # a wide cave with rugae winding along it
        return 1.75 + .3 * np.sin(.8 * z + shift) - .2 * deep * np.abs(np.sin(folds * phi + 1.5 * np.sin(2 * z)))
    if organ == "bronchus":  # stiff rings close together, then the carina
        fork = (z > 3.2) * np.exp(-(np.cos(phi + shift + z / 5) / .18) ** 2)
        return .85 - .08 * deep * np.cos(14 * z) * (1 + np.cos(phi + shift)) - fork
    wave = .5 + .5 * np.cos(1.6 * z + shift)  # oesophagus: a narrow star, closing and opening in waves
    return .78 - .3 * deep * wave * (.6 + .4 * np.cos(folds * phi + shift))


def endoscopy(organ, rng):
    """Frames (T, 160, 160, 3) uint8, None, finding: in or out through a veined tube."""
    finding, folds, deep, pace = rng.choice([*FINDINGS, None]), rng.integers(4, 8), *rng.uniform(.7, 1.3, 2)
    shift, spot, place, reach = *rng.uniform(-3.14, 3.14, 2), rng.uniform(2, 3.5), rng.uniform(.25, .45)
    tip, drift, roll = rng.uniform(-.5, .5, 2), rng.uniform(-.2, .2, 2), rng.uniform(-1, 1, 2) * (1, .2)
    flesh = np.array([.8, .42, .34]) * rng.uniform(.96, 1.04, 3) * rng.uniform(.95, 1.05)
    around, along, phase = rng.normal(0, 3, 8), rng.normal(0, 5, 8), rng.uniform(0, 6.28, 8)
    around, along = np.round(around * ORGANS[organ]), along * ORGANS[organ]
    veins, lamp, wet, exposure = rng.uniform((.05, .3, .3, .28), (.3, .5, .6, .34))
    ways = np.linspace(0, 1, rng.integers(24, 29))[::rng.choice([-1, 1])]
    planes, frames = np.geomspace(.25, 9, 20, dtype=np.float32)[:, None, None], []

    def blob(phi, z):  # distance from the finding, 1 at its rim
        return np.sqrt((2.2 * np.sin((phi - spot) / 2)) ** 2 + (z - place) ** 2) / reach

    for t in ways:
        y, x = np.mgrid[-1:1:72j, -1:1:72j].astype(np.float32)
        seen = (np.hypot(x, y) < 1.15)[..., None]
        y, x = 1.25 * y + np.float32(tip[0] + drift[0] * t), 1.25 * x + np.float32(tip[1] + drift[1] * t)
        phi, deeper = np.arctan2(y, x) + np.float32(roll @ (1, t)), np.float32(1.2 * t)
        radius = lumen(organ, phi, (deeper + planes) * np.float32(pace), folds, deep, shift)  # (20, 72, 72)
        if finding == "polyp":
            radius = radius - reach * np.exp(-1.5 * blob(phi, deeper + planes) ** 2)
        gap = planes * np.hypot(x, y) - radius  # where a ray leaves the tube
        gap[-1] = np.abs(gap[-1])
        hit = np.argmax(gap > 0, 0).clip(1)
        before, after = (np.take_along_axis(gap, hit[None] - k, 0)[0] for k in (1, 0))
        share = np.clip(before / (before - after), 0, 1)
        far = planes.ravel()[hit - 1] * (1 - share) + planes.ravel()[hit] * share  # (72, 72)
        point = np.stack([x * far, y * far, far], -1)
        normal = np.cross(np.gradient(point, axis=1), np.gradient(point, axis=0))
        facing = np.abs((normal * point).sum(-1)) / np.linalg.norm(normal, axis=-1) / np.linalg.norm(point, axis=-1)
        relief = np.sin(np.multiply.outer(phi, around) + np.multiply.outer(deeper + far, along) + phase).sum(-1) / 4
        colour = (1 - veins * np.exp(-(relief / .12) ** 2) + .08 * relief)[..., None]  # veins where it is 0
        colour = flesh * colour ** (.6, 1.3, 1.3)
        if finding:
            colour += .85 * np.exp(-blob(phi, deeper + far) ** 4)[..., None] * (FINDINGS[finding] - colour)
        shine = wet * np.clip(facing + .04 * relief, 0, 1) ** 60
        frame = (colour + shine[..., None]) * ((.25 + .75 * facing) / (1 + (lamp * far) ** 2))[..., None]
        frame = frame * exposure / frame.mean() + rng.normal(0, .012, (72, 72, 1))
        frame = np.uint8(255 * np.clip(frame, 0, 1) ** .8 * seen)
        frames.append(np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)))
    return np.stack(frames), None, finding


# ---- files -----------------------------------------------------------------------------------------------------------

def dicom(path, pixels, sop_class, syntax=ExplicitVRLittleEndian, **tags):
    """A DICOM file of integer pixels (rows, columns), (frames, rows, columns) or (rows, columns, 3); `tags` go before
    what the pixels say. Tests and benchmark write theirs with it, too."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PhotometricInterpretation = sop_class, generate_uid(), "MONOCHROME2"
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        (ds.Rows, ds.Columns, ds.SamplesPerPixel), ds.PhotometricInterpretation = pixels.shape, "RGB"
        ds.PlanarConfiguration = 0
    else:
        (ds.Rows, ds.Columns), ds.SamplesPerPixel = pixels.shape[-2:], 1
    if pixels.ndim == 3 and ds.SamplesPerPixel == 1:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.HighBit = tags.get("HighBit", ds.BitsStored - 1)
    little = syntax != ExplicitVRBigEndian
    ds.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True, little_endian=little, implicit_vr=False)
    return path


def patient_tags(patient, instance):
    """What the headers of one patient say; its UIDs follow from the patient and the instance."""
    study, series, own = (generate_uid(entropy_srcs=[patient, name]) for name in ("study", "series", str(instance)))
    return {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": own, "PatientID": patient,
            "PatientName": f"PHANTOM^{patient.upper()}", "PatientBirthDate": "19700101",
            "StudyDate": "20250101", "ImageType": ["ORIGINAL", "PRIMARY"], "BitsStored": 12}


def write_xray(path, image, patient, rng):
    """A digital X-ray, one in three with dense stored low, all with a display window."""
    low, high = np.percentile(image, [2, 99.5]) * rng.uniform(.9, 1.1, 2)
    flip, centre = rng.random() < 1 / 3, (low + high) / 2
    dicom(path, 4095 - image if flip else image, DigitalXRayImageStorageForPresentation, **patient_tags(patient, 1),
          Modality=str(rng.choice(["DX", "CR"])), PhotometricInterpretation="MONOCHROME1" if flip else "MONOCHROME2",
          WindowCenter=f"{4095 - centre if flip else centre:.1f}", WindowWidth=f"{high - low:.1f}",
          PresentationIntentType="FOR PRESENTATION", PixelIntensityRelationship="LOG",
          PixelIntensityRelationshipSign=-1)


def write_series(folder, image, voxel, patient, rng):
    """A CT series: a file a slice, named in random order, numbered upwards or downwards."""
    folder.mkdir(exist_ok=True)
    count, corner, numbers = image.shape[2], rng.uniform(-200, 0, 3), np.arange(1, image.shape[2] + 1)
    numbers = numbers[::rng.choice([-1, 1])]
    for k, name in enumerate(rng.permutation(count)):
        pixels = (image[:, :, k].T + 1024).astype(np.uint16)
        dicom(folder / f"IM{name:05d}", pixels, CTImageStorage, **patient_tags(patient, k), Modality="CT",
              RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU", InstanceNumber=int(numbers[k]),
              ImagePositionPatient=[f"{p:.4f}" for p in corner + (0, 0, k * voxel[2])],
              ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[f"{v:.5f}" for v in voxel[1::-1]],
              SliceThickness=f"{voxel[2]:.4f}", FrameOfReferenceUID=generate_uid(entropy_srcs=[patient, "frame"]))


def write_nifti(path, image, voxel, rng):
    """A volume stored in one of many axis orders, with the affine that undoes it."""
    scan = nib.Nifti1Image(image, np.diag([-voxel[0], -voxel[1], voxel[2], 1]))                   # NIfTI: right, front
    axes = nib.orientations.axcodes2ornt(str(rng.choice(["LPS", "RAS", "LAS", "PIR", "ASL", "SRA", "RSP"])))
    scan = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), axes))
    path.write_bytes(gzip.compress(scan.to_bytes(), compresslevel=1, mtime=0))


def write_sample(folder, modality, number, split, seed):
    """Make and write patient `number` of a modality; returns the row of labels.csv."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality), number])
    make, parts = {"xray": (xray, (*PARTS,)), "ultrasound": (ultrasound, ECHO_PARTS), "endoscopy": (endoscopy, (*ORGANS,)),
                   "ct": (ct, (*PARTS,)), "mri": (mri, (*PARTS,))}[modality]
    part, patient = parts[number % len(parts)], f"{seed}-{modality}-{number:04d}"
    path = folder / modality / f"{number:04d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    image, voxel, lesion = make(part, rng)
    if modality == "xray":
        write_xray(path := path.with_suffix(".dcm"), image, patient, rng)
    elif modality == "ultrasound":
        Image.fromarray(image).save(path := path.with_suffix(".png"))
    elif modality == "endoscopy":
        iio.imwrite(path := path.with_suffix(".avi"), image, plugin="pyav", codec="mjpeg", fps=25,
                    out_pixel_format="yuvj420p")
    elif modality == "ct" and number % 2:
        write_series(path, image, voxel, patient, rng)
    else:
        write_nifti(path := path.with_suffix(".nii.gz"), image, voxel, rng)
    labels = f"part:{part}|lesion:{lesion}" if lesion else f"part:{part}"
    return path.relative_to(folder).as_posix(), labels, patient, split, modality


def write_demo(folder, n=200, seed=1):
    """Write n training and ceil(.8 n) test patients per modality (MRI: test only) under `folder`, last their
    labels.csv -> its path. What is there already is left as it is.

    Every patient gives one sample and has its own random numbers, so that no number of others or of cores changes it.
    """
    folder, test = Path(folder), -(-4 * n // 5)
    if (folder / "labels.csv").exists():
        return folder / "labels.csv"
    jobs = [(folder, modality, number, "test" if number < test else "train", seed)
            for modality in MODALITIES for number in range(test + n * (modality != "mri"))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write_sample, *zip(*jobs), chunksize=4))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "patient", "split", "modality"), *rows])
    return folder / "labels.csv"


if __name__ == "__main__":
    write_demo(sys.argv[1])
