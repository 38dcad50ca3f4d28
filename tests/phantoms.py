"""Labelled phantoms in five modalities, written as the files a hospital would send.

In: a folder, a size n, a seed. Out: n training and .8 n test patients (MRI: test only), one sample each, of
  ct          (48-64)^2 x 12-24 HU volume   .nii.gz in many axis orders, or a folder of DICOM slices
  xray        attenuation projection         12-bit DICOM, one third MONOCHROME1
  mri         T1, T2 or PD contrast          .nii.gz, never trained on
  ultrasound  speckled sector with shadows   .png, grey
  endoscopy   12-16 frames through a tube    .avi, RGB
and labels.csv (path,labels,patient,split,modality): `part:<body part>` and, of two in three, `lesion:<kind>`.
A body is ellipsoids and tubes in 3D; a modality is a column of TISSUES and a way to look at them.
Run: python -m tests.phantoms FOLDER
"""
import csv
import gc
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
from pydicom.uid import (CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRBigEndian,
                         ExplicitVRLittleEndian, generate_uid)

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
    "bone": (900, .04, .04, .06, 1.0, .060),
    "marrow": (280, .85, .55, .60, .30, .040),
    "nodule": (260, .75, .80, .85, .10, .006),
    "cyst": (-180, .08, 1.0, .95, .00, .000),
    "calcification": (1200, .02, .02, .03, 1.3, .150),
}
HOSTS = ("lung", "organ", "brain", "kidney", "muscle", "marrow")  # where lesions grow
LAYERS = {  # rows of PARTS that are more than a tissue: (round of drawing, tissue, mm below the surface)
    "skin": [(0, "fat", 0), (1, "muscle", 12)],
    "belly": [(0, "fat", 0), (1, "muscle", 13), (1, "fat", 27)],
    "skull": [(0, "fat", -6), (2, "bone", 0), (2, "fluid", 7), (2, "brain", 10)],
    "bone": [(2, "bone", 0), (3, "marrow", 3)],  # last, so that joined shafts share one cavity
    "gut": [(2, "muscle", 0), (2, "organ", 4)],
    "ribs": [(2, "bone", 0)],
}
TOES = (-28, -14, 0, 14, 28)


def spine(y, low, high, radius, gap):
    """Rows of PARTS: discs, vertebrae with their processes, the canal behind."""
    back, wide, rows = y + radius * 1.2, radius / 3, [("organ", [(0, y, low), (0, y, high)], radius * .9)]
    for z in range(low, high, gap):
        rows += [("bone", [(-wide, y, z), (wide, y, z)], (radius - wide, radius * .8, gap * .4)),
                 ("bone", [(0, back, z), (0, y + radius * 2.6, z - gap * .4)], radius * .2),
                 ("bone both", [(radius * .6, back, z), (radius * 2, y + radius * 1.5, z)], radius * .25)]
    return [*rows, ("fluid", [(0, back, low), (0, back, high)], radius * .4)]


# Field of view in mm; rows: tissue or LAYERS, centre or path, radius or radii, how far points stray if not 2.
# x to the left, y to the back, z up; "both" adds the mirror image. Later rows are drawn over earlier ones.
PARTS = {
    "head": (270, [
        ("muscle", (0, -32, -48), (58, 58, 62)), ("muscle", [(0, 25, -40), (0, 32, -150)], 54),
        *spine(24, -140, -50, 16, 19), ("bone both", [(0, -76, -97), (18, -74, -96), (48, -10, -70)], 8),
        ("bone", (0, -66, -52), (30, 24, 20)), ("skull", (0, 0, 20), (72, 90, 76)),
        ("bone", (0, -30, -42), (45, 40, 7)), ("fluid both", [(9, -35, 32), (11, 5, 42), (20, 35, 25)], 8),
        ("fluid both", (33, -80, -6), 12), ("gas both", (29, -62, -38), (14, 18, 15))]),
    "neck": (210, [
        ("skin", (0, 0, -20), (62, 62, 420)), ("skin", [(-110, 10, -165), (110, 10, -165)], (80, 75, 90)),
        ("vessel both", [(28, -8, 120), (24, -8, -180)], 5), *spine(16, -190, 150, 15, 20),
        ("vessel both", [(38, -2, 120), (32, -6, -180)], 7), ("organ both", (17, -26, -30), (13, 13, 28)),
        ("bone both", [(0, -64, 61), (20, -60, 62), (48, 0, 90)], 8), ("bone", (0, -29, 20), (15, 15, 24)),
        ("bone both", [(8, -40, -120), (130, -10, -95)], 7), ("gas", [(0, -28, 70), (0, -8, -190)], 9)]),
    "chest": (430, [
        ("skin", [(-65, 0, -20), (65, 0, -20)], (113, 116, 330)), ("skin both", (165, 10, 140), (62, 55, 90)),
        ("ribs", (0, 0, 15), (150, 102, 185)), ("lung both", [(66, 2, -50), (66, 2, 70)], (58, 82, 85)),
        *[("vessel both", [(30, 9, 15), (60, 0, 10), (80, 0, 10)], 4, 28)] * 5, *spine(72, -210, 200, 19, 26),
        ("muscle", (0, 0, 40), (30, 70, 160)), ("muscle", (26, -32, -45), (66, 52, 66), 6),
        ("organ", (-72, 0, -150), (95, 90, 95)), ("organ", (80, 5, -165), (85, 85, 88)),
        ("vessel", [(5, -20, -10), (0, -22, 65), (20, 48, 70), (20, 48, -210)], 12),
        ("gas", [(0, 5, 200), (0, 18, 62)], 9), ("gas both", [(0, 18, 62), (42, 15, 22)], 7),
        ("bone both", [(14, -80, 128), (70, -75, 150), (150, -10, 160)], 7),
        ("bone", (0, -96, 40), (18, 7, 85))]),
    "abdomen": (390, [
        ("belly", [(-60, 0, 0), (60, 0, 0)], (112, 116, 420)), ("ribs", (0, 0, 135), (150, 102, 115)),
        ("muscle both", [(34, 55, 60), (62, 35, -190)], 20), *spine(62, -170, 200, 23, 34),
        ("organ", (-66, -12, 85), (82, 78, 78), 6), ("organ", (100, 35, 85), (30, 45, 48)),
        ("kidney both", (72, 48, 8), (29, 26, 54), 5), ("fat both", (60, 44, 8), (14, 12, 24)),
        ("vessel", [(8, 28, 200), (5, 30, -80)], 11), ("vessel", [(-18, 26, 200), (-14, 30, -80)], 11),
        ("gut", [(-118, 10, -120), (-90, -60, 15), (0, -78, -20), (95, -55, 30), (118, 20, -130)], 22),
        *[("gut", [(0, -45, -75)] * 3, 14, 38)] * 8, *[("gas", (0, -45, -40), (16, 12, 12), 50)] * 5,
        ("bone both", (105, 45, -175), (45, 25, 60))]),
    "pelvis": (410, [
        ("skin", [(-70, 0, 110), (70, 0, 110)], (116, 118, 235)), ("fat", (0, -15, 75), (105, 75, 120)),
        ("skin both", [(92, 5, -55), (98, 5, -260)], 84), *[("gut", [(0, -25, 80)] * 3, 14, 34)] * 8,
        ("bone both", [(45, 62, 80), (122, -4, 80)], (9, 9, 60)), ("bone", (0, 70, 40), (40, 13, 65)),
        ("bone both", [(82, -8, -14), (12, -56, -42), (56, 15, -88), (80, 18, -20)], 9),
        ("bone both", (86, 2, -8), 34), *spine(52, 112, 300, 24, 35), ("organ both", (92, 0, -12), 28),
        ("bone both", [(92, 0, -12), (132, 6, -48), (116, 2, -280)], 18), ("gas", (0, 42, 0), 12, 15),
        ("vessel both", [(8, 25, 170), (55, -25, 40), (80, -45, -260)], 7), ("fluid", (0, -25, -10), 33, 6)]),
    "knee": (170, [
        ("skin", [(0, 5, 190), (0, 10, -190)], 60), ("vessel", [(4, 38, 190), (0, 36, -190)], 5),
        ("fat", (0, -40, 0), (28, 16, 36)), ("fluid", (0, -34, 46), (24, 6, 26)),
        ("organ", (0, 2, 0), (44, 32, 13)), ("bone", [(0, -6, 220), (0, -4, 40)], 16),
        ("bone", (0, -2, 38), (30, 22, 34)), ("bone both", (22, 4, 26), 25),
        ("bone", (0, 0, -22), (44, 30, 17)), ("bone", (1, 0, -40), (28, 24, 34)),
        ("bone", [(2, 0, -40), (4, 2, -220)], 15), ("bone", [(38, 18, -34), (36, 20, -220)], 8),
        ("bone", (0, -44, 26), (20, 10, 21))]),
    "foot": (270, [
        ("skin", [(0, 36, 250), (0, 42, 0)], 41), ("skin", (0, 62, -34), (34, 40, 32)),
        ("skin", [(0, 45, -20), (0, -45, -42)], 32), ("skin", (0, -75, -48), (50, 62, 19)),
        ("bone", [(4, 32, 250), (3, 34, 30)], 16), ("bone", [(-24, 44, 250), (-25, 44, 8)], 8),
        ("bone", (2, 28, 8), (19, 28, 14)), ("bone", (0, 60, -26), (16, 36, 18)),
        ("bone", (0, -8, -14), (26, 12, 13)), *[("fat", [(x, -95, -51), (x, -132, -54)], 11) for x in TOES],
        *[("bone", [(x * .8, -30, x / 4 - 24), (x, -95, -51), (x, -132, -54)], 6) for x in TOES]]),
}
ECHO_PARTS = ("neck", "abdomen", "pelvis", "knee")


class Shape(NamedTuple):
    """What is less than `radii` mm from the line between two points: an ellipsoid if they are one."""
    tissue: str
    start: np.ndarray  # (3,) each
    end: np.ndarray
    radii: np.ndarray
    gap: float = 0  # if not 0: only bands of its surface, so many mm apart, falling to the front as ribs do

    def distance(self, points):
        """Roughly the signed distance of points (3, ...) in mm, never larger than it, negative inside."""
        place, axis = ((points.T - self.start) / self.radii).T, (self.end - self.start) / self.radii
        if axis.any():
            along = np.clip(np.einsum("i,i...->...", axis / (axis @ axis), place), 0, 1)
            place = place - np.multiply.outer(axis, along)
        outside = (np.sqrt(np.einsum("i...,i...->...", place, place)) - 1) * self.radii.min()
        if not self.gap:
            return outside
        band = np.abs((points[2] - .5 * points[1]) / self.gap % 1 - .5) - .2
        return np.maximum(np.abs(outside + 3.5) - 3.5, .9 * self.gap * band)


def body(part, rng):
    """The shapes of one patient in the order to draw them, a lesion last; its kind or None."""
    (size, rows), thick, drawn = PARTS[part], rng.uniform(.6, 1.5), []
    for row in rows:
        name, path, radii, stray = (*row, 2)[:4]
        name, _, both = name.partition(" ")
        for side in (1, -1) if both else (1,):
            points = np.atleast_2d(path) * (side, 1, 1)
            points = np.float32(points + rng.normal(0, stray, points.shape))
            ends = points[1:] if len(points) > 1 else points
            reach = np.broadcast_to(radii, 3) * rng.uniform(.92, 1.08, 3)
            for turn, tissue, depth in LAYERS.get(name, [(2, name, 0)]):
                inner, gap = np.float32(reach - depth * thick), 29 if name == "ribs" else 0
                if inner.min() > 0:
                    drawn += [(turn, Shape(tissue, *line, inner, gap)) for line in zip(points, ends)]
    shapes = [shape for _, shape in sorted(drawn, key=lambda pair: pair[0])]
    kind = rng.choice(["nodule", "cyst", "calcification"]) if rng.random() < 2 / 3 else None
    if kind:
        hosts = [s for s in shapes if s.tissue in HOSTS and s.radii.min() > 12]
        host = hosts[rng.integers(len(hosts))]
        centre = (host.start + host.end) / 2 + host.radii * rng.uniform(-.4, .4, 3)
        for _ in range(3):  # lobes
            place = np.float32(centre.clip(-.2 * size, .2 * size) + rng.normal(0, .012, 3) * size)
            shapes.append(Shape(kind, place, place, np.float32(size * rng.uniform(.015, .04, 3))))
    return shapes, kind


# ---- looking at a body -------------------------------------------------------------------------------------

def box(shape, extent):
    """Points (3, *shape) on a box of `extent` mm."""
    axes = [np.linspace(-.5, .5, k) * e for k, e in zip(shape, extent)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def pose(points, rng, size, turn, freedom=1):
    """Points (3, ...) mm of the scanner -> of a patient who lies turned, off centre, small or large, bent."""
    points = np.float32(points)
    for axis, angle in enumerate(np.radians(turn)):
        one, two = points[axis - 2].copy(), points[axis - 1].copy()
        points[axis - 2] = np.float32(np.cos(angle)) * one - np.float32(np.sin(angle)) * two
        points[axis - 1] = np.float32(np.sin(angle)) * one + np.float32(np.cos(angle)) * two
    zoom = (1 + freedom * rng.uniform(-.35, .35)) * rng.uniform(.92, 1.08, 3)
    move = freedom * rng.uniform(-.18, .18, 3) * size
    points = (points.T / np.float32(zoom) + np.float32(move)).T
    for _ in range(2):  # two random waves: no two organs have the same outline
        wave, push = np.float32(rng.normal(0, (5 / size, .017 * size), (3, 2))).T
        phase = np.einsum("i,i...->...", wave, points) + np.float32(rng.uniform(0, 6.28))
        points += np.multiply.outer(push, np.sin(phase))
    return points


def paint(shapes, points, values, edge):
    """Draw shapes with soft edges of `edge` mm: points (3, X, Y, Z), {tissue: value} -> (X, Y, Z) float32."""
    image, step = np.full(points.shape[1:], values["air"], np.float32), 3
    coarse = points[:, ::step, ::step, ::step]  # most shapes are small: look closely only where they can be
    far = sum(np.linalg.norm(np.diff(coarse, axis=axis), axis=0).max(initial=0) for axis in (1, 2, 3))
    for shape in shapes:
        near = np.nonzero(shape.distance(coarse) < far + edge / 2)
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
    (shapes, kind), size, pixels = body(part, rng), PARTS[part][0], rng.choice([48, 56, 64])
    shape, extent = (pixels, pixels, rng.integers(12, 25)), size * np.array([1, 1, rng.uniform(.5, .9)])
    points = pose(box(shape, extent), rng, size, rng.uniform(-1, 1, 3) * (8, 8, 20))
    return paint(shapes, points, look(column, rng, spread), size / pixels), extent / shape, kind


def ct(part, rng):
    """HU (W, H, S) int16 with streaky noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, 0, 20)
    noise = rng.normal(0, rng.uniform(5, 18), image.shape)
    image += (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.round(image).clip(-1024, 3071).astype(np.int16), voxel, kind


def mri(part, rng):
    """T1, T2 or PD (W, H, S) int16 with a coil profile and Rician noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, rng.integers(1, 4), .06)
    grid = box(image.shape, (2, 2, 2))
    gain = np.einsum("i,i...->...", rng.normal(0, .25, 3), grid - .4 * grid ** 2)
    noise = rng.normal(0, rng.uniform(.004, .018), (2, *image.shape))
    image = np.hypot(image * np.exp(gain) + noise[0], noise[1])
    return (image * rng.uniform(300, 3000)).astype(np.int16), voxel, kind


def xray(part, rng):
    """12-bit picture (H, W) uint16, None, lesion kind: log of Beer-Lambert with photon noise, bone bright."""
    (shapes, kind), size, width = body(part, rng), PARTS[part][0], rng.integers(48, 65)
    view = rng.choice([0, 0, 0, 180, 40, -40, 90, -90]) + rng.uniform(-12, 12)  # frontal to lateral
    points = box((width, 40, 64), size * np.array([width / 64, 1.15, 1]))
    points = pose(points, rng, size, (rng.uniform(-8, 8), rng.uniform(-20, 20), view))
    hu = paint(shapes, points, look(0, rng, 20), size / 64)
    density = np.clip(1 + hu / 1000, 0, None) + .9 * np.clip(hu / 1000 - .15, 0, None)  # bone stops soft rays
    passed = rng.poisson(rng.uniform(8e3, 8e4) * np.exp(-5.2 * density.mean(1).T[::-1]))  # (H, W), head up
    line = -np.log(passed + 1.)
    line = (line - line.min()) / np.ptp(line) * rng.uniform(2500, 4000)
    return np.round(line).astype(np.uint16), None, kind


def ultrasound(part, rng):
    """Sector picture (160, 192) uint8, None, lesion kind: a curved probe on the skin before the middle."""
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
    echo, loss = (paint(shapes, points, values, depth / 150)[..., 0] for values in (echo, loss))  # (160, 224)
    edges = np.abs(np.diff(echo, axis=1, prepend=0)) + 2 * np.abs(np.diff(loss, axis=1, prepend=0))
    speckle = rng.rayleigh(.8, echo.shape)
    speckle = (speckle + np.roll(speckle, 1, 0) + np.roll(speckle, 2, 0)) / 3  # as wide as the beam
    passed = np.exp(-2 * np.cumsum(loss, 1) * depth / 224)  # shadow behind bone
    signal = np.log10((echo.clip(.004) * speckle + 1.2 * edges) * passed + 1e-4)
    signal = np.clip(1 + signal / rng.uniform(1.8, 2), 0, 1) ** rng.uniform(.9, 1.1)
    zoom, (left, top) = depth / 150 * rng.uniform(.7, 1.3), rng.uniform(-1, 1, 2) * (48, 36)
    y, x = np.mgrid[:160, :192]
    y, x = (y - top) * zoom + near * np.cos(half), (x - 95.5 - left) * zoom  # mm from the centre of the beams
    row, column = (np.arctan2(x, y) / half + 1) * 79.5, (np.hypot(x, y) - near) / depth * 223
    row, column = np.rint(row).astype(int).clip(-1, 160), np.rint(column).astype(int).clip(-1, 224)
    return np.uint8(np.pad(signal, 1)[row + 1, column + 1] * 255), None, kind  # black beside the sector


# ---- endoscopy: flying through a tube of about radius 1 ----------------------------------------------------

ORGANS = {  # how dense the veins are; radius at angle a and depth z, n folds of depth d, phase p
    "colon": (1.5, lambda a, z, n, d, p:  # half-moon folds in three rows between wide pockets
              1.1 - .42 * d * np.exp(-(8 * (z / 1.3 % 1 - .5)) ** 2) * (.7 + .3 * np.cos(3 * a + z))),
    "stomach": (.6, lambda a, z, n, d, p:  # a wide cave with rugae winding along it
                1.75 + .3 * np.sin(.8 * z + p) - .2 * d * np.abs(np.sin(n * a + 1.5 * np.sin(2 * z)))),
    "bronchus": (.3, lambda a, z, n, d, p:  # stiff rings close together, then the carina
                 .85 - .08 * d * np.cos(14 * z) * (1 + np.cos(a)) - (z > 3.2) * np.exp(-30 * np.cos(a) ** 2)),
    "oesophagus": (1, lambda a, z, n, d, p:  # a narrow star, closing and opening in waves
                   .78 - .3 * d * (.5 + .5 * np.cos(1.6 * z + p)) * (.6 + .4 * np.cos(n * a + p))),
}
FINDINGS = {"polyp": (.85, .28, .28), "ulcer": (.95, .9, .65), "bleeding": (.45, .02, .02)}  # colours


def endoscopy(organ, rng):
    """Frames (T, 160, 160, 3) uint8, None, finding: in or out through a veined tube."""
    dense, lumen = ORGANS[organ]
    finding, folds = rng.choice([*FINDINGS, None]), rng.integers(4, 8)
    deep, pace, phase = np.float32(rng.uniform((.7, .7, 0), (1.3, 1.3, 6.28)))
    spot, place, reach = rng.uniform((-3.14, 2, .25), (3.14, 3.5, .45))  # of the finding
    tip, drift, roll = rng.uniform(-.5, .5, 2), rng.uniform(-.2, .2, 2), rng.uniform(-1, 1, 2) * (3.14, .2)
    flesh = np.array([.8, .42, .34]) * rng.uniform(.96, 1.04, 3) * rng.uniform(.95, 1.05)
    waves = rng.normal(0, (3, 5), (8, 2)) * dense
    veins, lamp, wet, exposure = rng.uniform((.05, .3, .3, .28), (.3, .5, .6, .34))
    y, x = np.mgrid[-1:1:64j, -1:1:64j].astype(np.float32)
    planes, frames = np.geomspace(.25, 9, 20, dtype=np.float32)[:, None, None], []
    for t in np.linspace(0, 1, rng.integers(12, 17))[::rng.choice([-1, 1])]:
        right, down = (1.25 * u + np.float32(v) for u, v in zip((x, y), tip + drift * t))
        angle, depth = np.arctan2(down, right) + np.float32(roll @ (1, t)), np.float32(1.2 * t)
        wall = lumen(angle, (depth + planes) * pace, folds, deep, phase)  # (20, 64, 64)
        gap = planes * np.hypot(right, down) - wall  # positive where a ray has left the tube
        gap[-1] = np.abs(gap[-1])  # the end of the world
        hit = np.argmax(gap > 0, 0).clip(1)
        before, after = (np.take_along_axis(gap, hit[None] - k, 0)[0] for k in (1, 0))
        share = np.clip(before / (before - after), 0, 1)
        far = planes.ravel()[hit - 1] * (1 - share) + planes.ravel()[hit] * share  # (64, 64)
        ring = np.hypot(2.2 * np.sin((angle - spot) / 2), depth + far - place) / reach  # its rim is 1
        far = far * (1 - .3 * (finding == "polyp") * np.exp(-1.5 * ring ** 2))
        point = np.stack([right * far, down * far, far], -1)
        normal = np.cross(np.gradient(point, axis=1), np.gradient(point, axis=0))
        facing = np.abs((normal * point).sum(-1)) / np.sqrt((normal ** 2).sum(-1) * (point ** 2).sum(-1))
        relief = sum(np.sin(round(a) * angle + b * (depth + far) + 9 * a) for a, b in waves.tolist()) / 4
        colour = (1 - veins * np.exp(-(relief / .12) ** 2) + .08 * relief)[..., None]  # veins where it is 0
        colour = flesh * colour ** (.6, 1.3, 1.3)
        if finding:
            colour += .85 * np.exp(-ring ** 4)[..., None] * (FINDINGS[finding] - colour)
        colour += (wet * np.clip(facing + .04 * relief, 0, 1) ** 60)[..., None]  # highlights
        frame = colour * ((.25 + .75 * facing) / (1 + (lamp * far) ** 2))[..., None]
        frame = frame * exposure / frame.mean() + rng.normal(0, .012, (64, 64, 1))  # as the camera does
        frame = np.uint8(255 * np.clip(frame, 0, 1) ** .8 * (np.hypot(x, y) < 1.15)[..., None])
        frames.append(np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)))
    return np.stack(frames), None, finding


# ---- files -------------------------------------------------------------------------------------------------

def dicom(path, pixels, sop_class, syntax=ExplicitVRLittleEndian, **tags):
    """A file of pixels (rows, columns), (frames, rows, columns) or (rows, columns, 3); `tags` overrule them.
    Tests and benchmark write theirs with it, too."""
    ds, little = pydicom.Dataset(), syntax != ExplicitVRBigEndian
    ds.file_meta, ds.SOPClassUID = pydicom.dataset.FileMetaDataset(), sop_class
    colours = "RGB" if pixels.shape[2:] == (3,) else "MONOCHROME2"
    ds.set_pixel_data(pixels if little else pixels.byteswap(), colours, 8 * pixels.itemsize)
    ds.file_meta.TransferSyntaxUID = syntax
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.HighBit = tags.get("HighBit", ds.BitsStored - 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True, little_endian=little, implicit_vr=False)
    return path


def patient_tags(patient, instance):
    """What the headers of one patient say; its UIDs follow from the patient and the instance."""
    names = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series", "FrameOfReferenceUID": "frame",
             "SOPInstanceUID": str(instance)}
    return {"PatientID": patient, "PatientName": f"PHANTOM^{patient}", "PatientBirthDate": "19700101",
            "StudyDate": "20250101", "ImageType": ["ORIGINAL", "PRIMARY"], "BitsStored": 12,
            **{tag: generate_uid(entropy_srcs=[patient, name]) for tag, name in names.items()}}


def write_xray(path, image, patient, rng):
    """A digital X-ray, one in three with dense stored low, all with a display window."""
    low, high = np.percentile(image, [2, 99.5]) * rng.uniform(.9, 1.1, 2)
    flip = rng.random() < 1 / 3
    if flip:
        image, low, high = 4095 - image, 4095 - high, 4095 - low
    dicom(path, image, DigitalXRayImageStorageForPresentation, **patient_tags(patient, 1),
          Modality=str(rng.choice(["DX", "CR"])), PresentationIntentType="FOR PRESENTATION",
          PixelIntensityRelationship="LOG", PixelIntensityRelationshipSign=1 if flip else -1,
          PhotometricInterpretation="MONOCHROME1" if flip else "MONOCHROME2",
          WindowCenter=f"{(low + high) / 2:.1f}", WindowWidth=f"{high - low:.1f}")


def write_series(folder, image, voxel, patient, rng):
    """A CT series: a file a slice, named in random order, numbered upwards or downwards."""
    corner, numbers = rng.uniform(-200, 0, 3), range(1, image.shape[2] + 1)[::rng.choice([-1, 1])]
    for k, name in enumerate(rng.permutation(image.shape[2])):
        pixels = (image[:, :, k].T + 1024).astype(np.uint16)
        dicom(folder / f"IM{name:05d}", pixels, CTImageStorage, **patient_tags(patient, k), Modality="CT",
              RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU", InstanceNumber=numbers[k],
              ImagePositionPatient=[f"{p:.4f}" for p in corner + (0, 0, k * voxel[2])],
              ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[f"{v:.5f}" for v in voxel[1::-1]],
              SliceThickness=f"{voxel[2]:.4f}")


def write_nifti(path, image, voxel, rng):
    """A volume stored in one of many axis orders, with the affine that undoes it."""
    scan = nib.Nifti1Image(image, np.diag([-voxel[0], -voxel[1], voxel[2], 1]))  # NIfTI: right, front
    axes = nib.orientations.axcodes2ornt(str(rng.choice(["LPS", "RAS", "LAS", "PIR", "ASL", "SRA", "RSP"])))
    scan = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), axes))
    path.write_bytes(gzip.compress(scan.to_bytes(), compresslevel=1, mtime=0))


KINDS = {"xray": (xray, PARTS, ".dcm"), "ultrasound": (ultrasound, ECHO_PARTS, ".png"),
         "endoscopy": (endoscopy, ORGANS, ".avi"), "ct": (ct, PARTS, ".nii.gz"),
         "mri": (mri, PARTS, ".nii.gz")}
MODALITIES = (*KINDS,)


def write_sample(folder, modality, number, split, seed):
    """Make and write patient `number` of a modality; returns the row of labels.csv."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality), number])  # nobody else changes him
    patient = f"{seed}-{modality}-{number:04d}"
    make, parts, ending = KINDS[modality]
    part = [*parts][number % len(parts)]
    image, voxel, lesion = make(part, rng)
    series = modality == "ct" and number % 2
    path = folder / modality / f"{number:04d}{'' if series else ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if series:
        write_series(path, image, voxel, patient, rng)
    elif ending == ".nii.gz":
        write_nifti(path, image, voxel, rng)
    elif ending == ".dcm":
        write_xray(path, image, patient, rng)
    elif ending == ".avi":
        iio.imwrite(path, image, plugin="pyav", codec="mjpeg", fps=25, out_pixel_format="yuvj420p")
    else:
        Image.fromarray(image).save(path)
    labels = f"part:{part}|lesion:{lesion}" if lesion else f"part:{part}"
    return path.relative_to(folder).as_posix(), labels, patient, split, modality


def write_demo(folder, n=200, seed=1):
    """Write n training and ceil(.8 n) test patients of each modality (MRI: test only), last labels.csv -> its
    path. What is there already is left as it is."""
    folder, test = Path(folder), -(-4 * n // 5)
    if (folder / "labels.csv").exists():
        return folder / "labels.csv"
    jobs = [(folder, modality, number, "test" if number < test else "train", seed)
            for modality in MODALITIES for number in range(test + n * (modality != "mri"))]
    with ProcessPoolExecutor(os.cpu_count(), initializer=gc.freeze) as pool:
        rows = list(pool.map(write_sample, *zip(*jobs), chunksize=4))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "patient", "split", "modality"), *rows])
    return folder / "labels.csv"


if __name__ == "__main__":
    write_demo(sys.argv[1])
