"""Labelled phantoms in five modalities, written as the files a hospital would send.

In:  a folder, a number n, a seed.
Out: n training and .8 n test patients (MRI: test only), one sample each, of
  ct          (48-64)^2 x 12-24 HU volume    .nii.gz in many axis orders, or a DICOM series
  xray        attenuation projection         12-bit DICOM, one third MONOCHROME1
  mri         T1, T2 or PD contrast          .nii.gz, never trained on
  ultrasound  speckled sector with shadows   .png, grey
  endoscopy   12-16 frames through a tube    .avi, RGB
and labels.csv (path,labels,patient,split,modality): `part:<body part>` and, of two in three, also
`lesion:<kind>`.

A body is a list of ellipsoids and tubes in 3D. Each modality gives every tissue a value (TISSUES)
and looks at such bodies in its own way. All are drawn at about twice the size that the demo trains
on: enough for everything that reads them, and half a minute's work for two cores.

    python -m tests.phantoms FOLDER
"""
import csv
import gc
import gzip
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import (CTImageStorage, DigitalXRayImageStorageForPresentation,
                         ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid)


# ---- tissues and bodies --------------------------------------------------------------------------
class Tissue(NamedTuple):
    """What each modality measures of a tissue."""
    hu: float  # CT and X-ray, Hounsfield units
    t1: float  # MRI brightness by contrast
    t2: float
    pd: float
    echo: float  # ultrasound that comes back
    loss: float  # ultrasound that is lost, per mm


TISSUES = {
    "air": Tissue(-1000, .00, .00, .00, .00, .000),
    "gas": Tissue(-950, .00, .00, .00, .90, .040),
    "lung": Tissue(-830, .08, .10, .12, .80, .040),
    "fat": Tissue(-100, 1.0, .75, .80, .40, .002),
    "muscle": Tissue(55, .42, .22, .55, .25, .004),
    "organ": Tissue(110, .55, .38, .65, .45, .004),
    "kidney": Tissue(200, .40, .62, .70, .20, .003),
    "brain": Tissue(60, .62, .50, .80, .30, .004),
    "vessel": Tissue(190, .10, .12, .20, .02, .001),
    "fluid": Tissue(5, .12, 1.0, .90, .01, .000),
    "bone": Tissue(900, .04, .04, .06, 1.0, .060),
    "marrow": Tissue(280, .85, .55, .60, .30, .040),
    "nodule": Tissue(260, .75, .80, .85, .10, .006),
    "cyst": Tissue(-180, .08, 1.0, .95, .00, .000),
    "calcification": Tissue(1200, .02, .02, .03, 1.3, .150),
}
NEVER_VARY = ("air", "gas", "lung")  # the other tissues differ a little from patient to patient
HOSTS = ("lung", "organ", "brain", "kidney", "muscle", "marrow")  # where lesions grow
LESIONS = ("nodule", "cyst", "calcification")


class Layer(NamedTuple):
    """A tissue that fills a structure from a depth below its surface on."""
    turn: int  # of a body all layers of turn 0 are drawn first, then those of turn 1, and so on
    tissue: str
    depth: float  # mm below the surface of the row, negative outside it


LAYERS = {  # structures made of more than one tissue; all others are one layer of turn 2
    "skin": [Layer(0, "fat", 0), Layer(1, "muscle", 12)],
    "belly": [Layer(0, "fat", 0), Layer(1, "muscle", 13), Layer(1, "fat", 27)],
    "skull": [Layer(0, "fat", -6), Layer(2, "bone", 0), Layer(2, "fluid", 7),
              Layer(2, "brain", 10)],
    "bone": [Layer(2, "bone", 0), Layer(3, "marrow", 3)],  # joined shafts share one cavity
    "gut": [Layer(2, "muscle", 0), Layer(2, "organ", 4)],
    "ribs": [Layer(2, "bone", 0)],
}


class Row(NamedTuple):
    """One structure of a body, in mm: x runs to the left, y to the back, z up."""
    name: str  # a tissue or one of LAYERS
    path: tuple | list  # its centre, or the points that it leads along
    radii: float | tuple
    stray: float = 2  # standard deviation of where its points lie in a patient
    both: bool = False  # the mirror image on the right side, too


class Part(NamedTuple):
    """A part of the body. Later rows are drawn over earlier ones."""
    size: float  # mm, the field of view
    rows: list


def spine(y, low, high, radius, gap):
    """Rows of the spine at depth y from z = low to high, with a vertebra every `gap` mm."""
    back = y + radius * 1.2
    wide = radius / 3
    discs = [(0, y, low), (0, y, high)]
    canal = [(0, back, low), (0, back, high)]

    rows = [Row("organ", discs, radius * .9)]
    for z in range(low, high, gap):
        vertebra = [(-wide, y, z), (wide, y, z)]
        behind = [(0, back, z), (0, y + radius * 2.6, z - gap * .4)]
        beside = [(radius * .6, back, z), (radius * 2, y + radius * 1.5, z)]
        rows.append(Row("bone", vertebra, (radius - wide, radius * .8, gap * .4)))
        rows.append(Row("bone", behind, radius * .2))
        rows.append(Row("bone", beside, radius * .25, both=True))
    rows.append(Row("fluid", canal, radius * .4))
    return rows


TOES = (-28, -14, 0, 14, 28)  # x of each
PARTS = {
    "head": Part(270, [
        Row("muscle", (0, -32, -48), (58, 58, 62)),  # face
        Row("muscle", [(0, 25, -40), (0, 32, -150)], 54),  # neck
        *spine(24, -140, -50, 16, 19),
        Row("bone", [(0, -76, -97), (18, -74, -96), (48, -10, -70)], 8, both=True),  # lower jaw
        Row("bone", (0, -66, -52), (30, 24, 20)),  # upper jaw
        Row("skull", (0, 0, 20), (72, 90, 76)),
        Row("bone", (0, -30, -42), (45, 40, 7)),  # base of the skull
        Row("fluid", [(9, -35, 32), (11, 5, 42), (20, 35, 25)], 8, both=True),  # ventricles
        Row("fluid", (33, -80, -6), 12, both=True),  # eyes
        Row("gas", (29, -62, -38), (14, 18, 15), both=True),  # sinuses
    ]),
    "neck": Part(210, [
        Row("skin", (0, 0, -20), (62, 62, 420)),
        Row("skin", [(-110, 10, -165), (110, 10, -165)], (80, 75, 90)),  # shoulders
        Row("vessel", [(28, -8, 120), (24, -8, -180)], 5, both=True),
        *spine(16, -190, 150, 15, 20),
        Row("vessel", [(38, -2, 120), (32, -6, -180)], 7, both=True),
        Row("organ", (17, -26, -30), (13, 13, 28), both=True),  # thyroid
        Row("bone", [(0, -64, 61), (20, -60, 62), (48, 0, 90)], 8, both=True),  # lower jaw
        Row("bone", (0, -29, 20), (15, 15, 24)),  # larynx
        Row("bone", [(8, -40, -120), (130, -10, -95)], 7, both=True),  # clavicles
        Row("gas", [(0, -28, 70), (0, -8, -190)], 9),  # windpipe
    ]),
    "chest": Part(430, [
        Row("skin", [(-65, 0, -20), (65, 0, -20)], (113, 116, 330)),
        Row("skin", (165, 10, 140), (62, 55, 90), both=True),  # shoulders
        Row("ribs", (0, 0, 15), (150, 102, 185)),
        Row("lung", [(66, 2, -50), (66, 2, 70)], (58, 82, 85), both=True),
        *[Row("vessel", [(30, 9, 15), (60, 0, 10), (80, 0, 10)], 4, stray=28, both=True)] * 5,
        *spine(72, -210, 200, 19, 26),
        Row("muscle", (0, 0, 40), (30, 70, 160)),  # between the lungs
        Row("muscle", (26, -32, -45), (66, 52, 66), stray=6),  # heart
        Row("organ", (-72, 0, -150), (95, 90, 95)),  # liver
        Row("organ", (80, 5, -165), (85, 85, 88)),  # spleen and stomach
        Row("vessel", [(5, -20, -10), (0, -22, 65), (20, 48, 70), (20, 48, -210)], 12),  # aorta
        Row("gas", [(0, 5, 200), (0, 18, 62)], 9),  # windpipe
        Row("gas", [(0, 18, 62), (42, 15, 22)], 7, both=True),  # bronchi
        Row("bone", [(14, -80, 128), (70, -75, 150), (150, -10, 160)], 7, both=True),  # clavicles
        Row("bone", (0, -96, 40), (18, 7, 85)),  # breastbone
    ]),
    "abdomen": Part(390, [
        Row("belly", [(-60, 0, 0), (60, 0, 0)], (112, 116, 420)),
        Row("ribs", (0, 0, 135), (150, 102, 115)),
        Row("muscle", [(34, 55, 60), (62, 35, -190)], 20, both=True),  # psoas
        *spine(62, -170, 200, 23, 34),
        Row("organ", (-66, -12, 85), (82, 78, 78), stray=6),  # liver
        Row("organ", (100, 35, 85), (30, 45, 48)),  # spleen
        Row("kidney", (72, 48, 8), (29, 26, 54), stray=5, both=True),
        Row("fat", (60, 44, 8), (14, 12, 24), both=True),  # of the kidneys
        Row("vessel", [(8, 28, 200), (5, 30, -80)], 11),  # aorta
        Row("vessel", [(-18, 26, 200), (-14, 30, -80)], 11),  # vena cava
        Row("gut", [(-118, 10, -120), (-90, -60, 15), (0, -78, -20),  # colon
                    (95, -55, 30), (118, 20, -130)], 22),
        *[Row("gut", [(0, -45, -75)] * 3, 14, stray=38)] * 8,
        *[Row("gas", (0, -45, -40), (16, 12, 12), stray=50)] * 5,
        Row("bone", (105, 45, -175), (45, 25, 60), both=True),  # hip bones
    ]),
    "pelvis": Part(410, [
        Row("skin", [(-70, 0, 110), (70, 0, 110)], (116, 118, 235)),
        Row("fat", (0, -15, 75), (105, 75, 120)),
        Row("skin", [(92, 5, -55), (98, 5, -260)], 84, both=True),  # thighs
        *[Row("gut", [(0, -25, 80)] * 3, 14, stray=34)] * 8,
        Row("bone", [(45, 62, 80), (122, -4, 80)], (9, 9, 60), both=True),  # hip bones
        Row("bone", (0, 70, 40), (40, 13, 65)),  # sacrum
        Row("bone", [(82, -8, -14), (12, -56, -42),  # pubis
                     (56, 15, -88), (80, 18, -20)], 9, both=True),
        Row("bone", (86, 2, -8), 34, both=True),  # sockets
        *spine(52, 112, 300, 24, 35),
        Row("organ", (92, 0, -12), 28, both=True),  # heads of the femurs
        Row("bone", [(92, 0, -12), (132, 6, -48), (116, 2, -280)], 18, both=True),  # femurs
        Row("gas", (0, 42, 0), 12, stray=15),  # rectum
        Row("vessel", [(8, 25, 170), (55, -25, 40), (80, -45, -260)], 7, both=True),
        Row("fluid", (0, -25, -10), 33, stray=6),  # bladder
    ]),
    "knee": Part(170, [
        Row("skin", [(0, 5, 190), (0, 10, -190)], 60),
        Row("vessel", [(4, 38, 190), (0, 36, -190)], 5),
        Row("fat", (0, -40, 0), (28, 16, 36)),
        Row("fluid", (0, -34, 46), (24, 6, 26)),
        Row("organ", (0, 2, 0), (44, 32, 13)),  # cartilage
        Row("bone", [(0, -6, 220), (0, -4, 40)], 16),  # femur
        Row("bone", (0, -2, 38), (30, 22, 34)),
        Row("bone", (22, 4, 26), 25, both=True),
        Row("bone", (0, 0, -22), (44, 30, 17)),  # tibia
        Row("bone", (1, 0, -40), (28, 24, 34)),
        Row("bone", [(2, 0, -40), (4, 2, -220)], 15),
        Row("bone", [(38, 18, -34), (36, 20, -220)], 8),  # fibula
        Row("bone", (0, -44, 26), (20, 10, 21)),  # knee cap
    ]),
    "foot": Part(270, [
        Row("skin", [(0, 36, 250), (0, 42, 0)], 41),  # lower leg
        Row("skin", (0, 62, -34), (34, 40, 32)),  # heel
        Row("skin", [(0, 45, -20), (0, -45, -42)], 32),
        Row("skin", (0, -75, -48), (50, 62, 19)),
        Row("bone", [(4, 32, 250), (3, 34, 30)], 16),  # tibia
        Row("bone", [(-24, 44, 250), (-25, 44, 8)], 8),  # fibula
        Row("bone", (2, 28, 8), (19, 28, 14)),  # ankle
        Row("bone", (0, 60, -26), (16, 36, 18)),  # heel
        Row("bone", (0, -8, -14), (26, 12, 13)),
        *[Row("fat", [(x, -95, -51), (x, -132, -54)], 11) for x in TOES],
        *[Row("bone", [(x * .8, -30, x / 4 - 24), (x, -95, -51), (x, -132, -54)], 6) for x in TOES],
    ]),
}
ECHO_PARTS = ("neck", "abdomen", "pelvis", "knee")  # those that ultrasound looks into


# ---- shapes: what one patient is made of ---------------------------------------------------------
class Shape(NamedTuple):
    """All that is within `radii` mm of a line between two points: an ellipsoid if they are one."""
    tissue: str
    start: np.ndarray  # (3,) each
    end: np.ndarray
    radii: np.ndarray
    gap: float = 0  # if not 0: only bands of its surface, so many mm apart, lower in front, as ribs

    def distance(self, points):
        """Roughly the signed distance (...) of points (3, ...) in mm, never larger than it."""
        # Divided by the radii, the shape is a tube of radius 1. From each point its nearest one on
        # the axis is subtracted: what is left is the distance.
        place = ((points.T - self.start) / self.radii).T  # (3, ...)
        axis = (self.end - self.start) / self.radii  # (3,)
        if axis.any():
            along = np.einsum("i,i...->...", axis / (axis @ axis), place)
            place = place - np.multiply.outer(axis, np.clip(along, 0, 1))
        length = np.sqrt(np.einsum("i...,i...->...", place, place))
        outside = (length - 1) * self.radii.min()
        if not self.gap:
            return outside

        # Ribs are where a shell 7 mm thick meets slanted slabs.
        slab = np.abs((points[2] - .5 * points[1]) / self.gap % 1 - .5) - .2
        return np.maximum(np.abs(outside + 3.5) - 3.5, .9 * self.gap * slab)


def shapes_of(row, side, thickness, rng):
    """[(turn to be drawn, shape)] of a row in one patient, on the left (side 1) or right (-1)."""
    points = np.atleast_2d(row.path) * (side, 1, 1)  # (k, 3)
    points = np.float32(points + rng.normal(0, row.stray, points.shape))
    ends = points[1:] if len(points) > 1 else points
    radii = np.broadcast_to(row.radii, 3) * rng.uniform(.92, 1.08, 3)
    gap = 29 if row.name == "ribs" else 0

    found = []
    for layer in LAYERS.get(row.name, [Layer(2, row.name, 0)]):
        inner = np.float32(radii - layer.depth * thickness)
        if inner.min() <= 0:  # this patient is too thin here for what lies deeper
            continue
        for start, end in zip(points, ends):
            found.append((layer.turn, Shape(layer.tissue, start, end, inner, gap)))
    return found


def lobes_of_lesion(kind, shapes, size, rng):
    """Three ellipsoids close together, inside one of the shapes where lesions grow."""
    hosts = [shape for shape in shapes if shape.tissue in HOSTS and shape.radii.min() > 12]
    host = hosts[rng.integers(len(hosts))]
    centre = (host.start + host.end) / 2 + host.radii * rng.uniform(-.4, .4, 3)
    centre = centre.clip(-.2 * size, .2 * size)  # not at the border of the picture

    lobes = []
    for _ in range(3):
        place = np.float32(centre + rng.normal(0, .012, 3) * size)
        radii = np.float32(size * rng.uniform(.015, .04, 3))
        lobes.append(Shape(kind, place, place, radii))
    return lobes


def body(part, rng):
    """The shapes of one patient in the order to draw them, and the kind of the lesion, or None.

    The lesion comes last.
    """
    thickness = rng.uniform(.6, 1.5)  # of fat, skull and walls
    drawn = []  # (turn, shape)
    for row in PARTS[part].rows:
        drawn += shapes_of(row, 1, thickness, rng)
        if row.both:
            drawn += shapes_of(row, -1, thickness, rng)
    drawn.sort(key=lambda pair: pair[0])  # within a turn the rows keep their order
    shapes = [shape for _, shape in drawn]

    if rng.random() > 2 / 3:
        return shapes, None
    kind = rng.choice(LESIONS)
    return shapes + lobes_of_lesion(kind, shapes, PARTS[part].size, rng), kind


# ---- looking at a body ---------------------------------------------------------------------------
class Phantom(NamedTuple):
    """What a scanner made of one patient."""
    image: np.ndarray
    voxel: np.ndarray | None  # (3,) mm, of volumes
    lesion: str | None  # its kind


def box(shape, extent):
    """Points (3, *shape) on a box of `extent` mm."""
    axes = [np.linspace(-.5, .5, count) * mm for count, mm in zip(shape, extent)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def pose(points, rng, size, turn, freedom=1):
    """Points (3, ...) in mm of the scanner -> in mm of a patient who lies there somehow.

    freedom: 1, or less where the scanner is held to the body.
    """
    points = np.float32(points)

    # The patient is turned about x, about y and about z, each time by so many degrees.
    for (a, b), degrees in zip(((1, 2), (2, 0), (0, 1)), turn):
        cos = np.float32(np.cos(np.radians(degrees)))
        sin = np.float32(np.sin(np.radians(degrees)))
        points[a], points[b] = cos * points[a] - sin * points[b], sin * points[a] + cos * points[b]

    # The patient is small or large, and lies off centre.
    zoom = (1 + freedom * rng.uniform(-.35, .35)) * rng.uniform(.92, 1.08, 3)
    move = freedom * rng.uniform(-.18, .18, 3) * size
    points = (points.T / np.float32(zoom) + np.float32(move)).T

    # Two random waves bend the body: no two organs have the same outline.
    for _ in range(2):
        wave, push = np.float32(rng.normal(0, (5 / size, .017 * size), (3, 2))).T  # (3,) each
        phase = np.einsum("i,i...->...", wave, points) + np.float32(rng.uniform(0, 6.28))
        points += np.multiply.outer(push, np.sin(phase))
    return points


def paint(shapes, points, values, edge, step=3):
    """Draw shapes: points (3, X, Y, Z) in mm, {tissue: value} -> (X, Y, Z) float32.

    Their edges are soft over `edge` mm.
    """
    image = np.full(points.shape[1:], values["air"], np.float32)

    # Most shapes are small. Every third point is looked at first, and those between them only where
    # the shape can be: each is at most `far` mm from one that was looked at.
    coarse = points[:, ::step, ::step, ::step]
    far = 0
    for axis in (1, 2, 3):
        far += np.linalg.norm(np.diff(coarse, axis=axis), axis=0).max(initial=0)

    for shape in shapes:
        near = np.nonzero(shape.distance(coarse) < far + edge / 2)
        if len(near[0]) == 0:
            continue
        part = tuple(slice(i.min() * step, (i.max() + 1) * step) for i in near)
        distance = shape.distance(points[(slice(None), *part)])
        inside = np.clip(.5 - distance / np.float32(edge), 0, 1)  # .5 on the edge, 0 outside
        image[part] += inside * (np.float32(values[shape.tissue]) - image[part])
    return image


def look(quantity, rng, spread):
    """{tissue: one quantity of TISSUES}, moved a little: no tissue looks alike in two patients."""
    values = {}
    for name, tissue in TISSUES.items():
        moved = spread * rng.normal()
        if name in NEVER_VARY:
            moved = 0
        values[name] = getattr(tissue, quantity) + moved
    return values


def scan(part, rng, quantity, spread):
    """A volume (W, H, S) float32 of one quantity, along patient left, back, up."""
    shapes, lesion = body(part, rng)
    size = PARTS[part].size
    pixels = rng.choice([48, 56, 64])
    shape = (pixels, pixels, rng.integers(12, 25))
    extent = size * np.array([1, 1, rng.uniform(.5, .9)])  # mm

    turn = rng.uniform(-1, 1, 3) * (8, 8, 20)
    points = pose(box(shape, extent), rng, size, turn)
    image = paint(shapes, points, look(quantity, rng, spread), size / pixels)
    return Phantom(image, extent / shape, lesion)


def ct(part, rng):
    """HU (W, H, S) int16 with streaky noise."""
    image, voxel, lesion = scan(part, rng, "hu", 20)
    noise = rng.normal(0, rng.uniform(5, 18), image.shape)
    image += (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return Phantom(np.round(image).clip(-1024, 3071).astype(np.int16), voxel, lesion)


def mri(part, rng):
    """T1, T2 or PD (W, H, S) int16 with a coil profile and Rician noise."""
    contrast = ("t1", "t2", "pd")[rng.integers(3)]
    image, voxel, lesion = scan(part, rng, contrast, .06)

    # The coil is nearer to one side.
    grid = box(image.shape, (2, 2, 2))  # (3, W, H, S) in [-1, 1]
    gain = np.exp(np.einsum("i,i...->...", rng.normal(0, .25, 3), grid - .4 * grid ** 2))

    # The picture is the size of a complex signal whose two parts are noisy.
    noise = rng.normal(0, rng.uniform(.004, .018), (2, *image.shape))
    image = np.hypot(image * gain + noise[0], noise[1])
    return Phantom((image * rng.uniform(300, 3000)).astype(np.int16), voxel, lesion)


def xray(part, rng):
    """A 12-bit picture (H, W) uint16: log of Beer-Lambert with photon noise, bone bright."""
    shapes, lesion = body(part, rng)
    size = PARTS[part].size
    width = rng.integers(48, 65)
    view = rng.choice([0, 0, 0, 180, 40, -40, 90, -90]) + rng.uniform(-12, 12)  # degrees, 0 frontal

    extent = size * np.array([width / 64, 1.15, 1])  # mm across, along the rays, up
    turn = (rng.uniform(-8, 8), rng.uniform(-20, 20), view)
    points = pose(box((width, 40, 64), extent), rng, size, turn)
    hu = paint(shapes, points, look("hu", rng, 20), size / 64)  # (W, 40, H)

    # Density of water is 1. Bone stops soft rays beyond its density.
    density = np.clip(1 + hu / 1000, 0, None) + .9 * np.clip(hu / 1000 - .15, 0, None)
    density = density.mean(1).T[::-1]  # (H, W), head up
    photons = rng.poisson(rng.uniform(8e3, 8e4) * np.exp(-5.2 * density))
    line = -np.log(photons + 1.)
    line = (line - line.min()) / np.ptp(line) * rng.uniform(2500, 4000)
    return Phantom(np.round(line).astype(np.uint16), None, lesion)


# ---- ultrasound: a curved probe on the skin ------------------------------------------------------
class Probe(NamedTuple):
    """Beams that leave one centre as a fan, from a curved front that touches the skin."""
    near: float  # mm from the centre to the front of the probe
    depth: float  # mm from there to the end of the beams
    half: float  # radians from the middle beam to the outer ones


def echoes(shapes, size, probe, rng):
    """What 160 beams bring back from 224 depths: log-compressed signal (160, 224) in [0, 1]."""
    # The beams lie in a plane across the body, the front of the probe before the middle of it.
    front = shapes[0].radii[1]  # mm from the middle of the body to its skin
    angle = np.linspace(-probe.half, probe.half, 160)[:, None]  # (160, 1)
    length = probe.near + np.linspace(0, probe.depth, 224)  # (224,)
    across = np.sin(angle) * length
    down = np.cos(angle) * length - probe.near - front
    points = np.stack([across, down, np.zeros_like(down)])  # (3, 160, 224) mm

    # The patient is turned a little, and moved up or down until the middle beam starts at the skin.
    turn = rng.uniform(-1, 1, 3) * (8, 10, 12) + (0, 180 * rng.integers(2), 0)  # from left or right
    points = pose(points, rng, size, turn, .3)[..., None]  # (3, 160, 224, 1)
    points[1] += shapes[0].distance(points[:, 80, :1, 0])

    echo_of = look("echo", rng, .03)
    loss_of = look("loss", rng, 0)
    echo_of["air"] = echo_of["muscle"] / 2  # it is gel
    edge = probe.depth / 150
    echo = paint(shapes, points, echo_of, edge)[..., 0]  # (160, 224)
    loss = paint(shapes, points, loss_of, edge)[..., 0]  # (160, 224)

    # Borders of tissues shine, speckle is as wide as a beam, and behind bone there is shadow.
    borders = np.abs(np.diff(echo, axis=1, prepend=0))
    borders = borders + 2 * np.abs(np.diff(loss, axis=1, prepend=0))
    speckle = rng.rayleigh(.8, echo.shape)
    speckle = (speckle + np.roll(speckle, 1, 0) + np.roll(speckle, 2, 0)) / 3
    passed = np.exp(-2 * np.cumsum(loss, 1) * probe.depth / 224)
    signal = np.log10((echo.clip(.004) * speckle + 1.2 * borders) * passed + 1e-4)
    return np.clip(1 + signal / rng.uniform(1.8, 2), 0, 1) ** rng.uniform(.9, 1.1)


def sector(signal, probe, rng):
    """Beams (160, 224) in [0, 1] -> a picture (160, 192) uint8 with the fan somewhere in it."""
    zoom = probe.depth / 150 * rng.uniform(.7, 1.3)  # mm a pixel
    left, top = rng.uniform(-1, 1, 2) * (48, 36)
    y, x = np.mgrid[:160, :192]  # pixels, then mm from the centre of the beams
    y = (y - top) * zoom + probe.near * np.cos(probe.half)
    x = (x - 95.5 - left) * zoom

    beam = (np.arctan2(x, y) / probe.half + 1) * 79.5
    along = (np.hypot(x, y) - probe.near) / probe.depth * 223
    beam = np.rint(beam).astype(int).clip(-1, 160)  # -1 and 160 are outside
    along = np.rint(along).astype(int).clip(-1, 224)
    return np.uint8(np.pad(signal, 1)[beam + 1, along + 1] * 255)  # black beside the fan


def ultrasound(part, rng):
    """A sector picture (160, 192) uint8."""
    shapes, lesion = body(part, rng)
    size = PARTS[part].size
    depth = shapes[0].radii[1] + size * rng.uniform(.2, .3)
    half = np.radians(rng.uniform(33, 37))
    probe = Probe(depth * rng.uniform(.18, .22), depth, half)
    signal = echoes(shapes, size, probe, rng)
    return Phantom(sector(signal, probe, rng), None, lesion)


# ---- endoscopy: flying through a tube of about radius 1 ------------------------------------------
# Each organ is the radius of a tube at an angle and a depth. Every patient has another number of
# folds, which are more or less deep and begin elsewhere.
def colon(angle, depth, folds, deep, phase):
    """Half-moon folds in three rows between wide pockets."""
    fold = np.exp(-(8 * (depth / 1.3 % 1 - .5)) ** 2)
    return 1.1 - .42 * deep * fold * (.7 + .3 * np.cos(3 * angle + depth))


def stomach(angle, depth, folds, deep, phase):
    """A wide cave with rugae winding along it."""
    rugae = np.abs(np.sin(folds * angle + 1.5 * np.sin(2 * depth)))
    return 1.75 + .3 * np.sin(.8 * depth + phase) - .2 * deep * rugae


def bronchus(angle, depth, folds, deep, phase):
    """Stiff rings close together, then the carina."""
    carina = (depth > 3.2) * np.exp(-30 * np.cos(angle) ** 2)
    return .85 - .08 * deep * np.cos(14 * depth) * (1 + np.cos(angle)) - carina


def oesophagus(angle, depth, folds, deep, phase):
    """A narrow star, closing and opening in waves."""
    closed = .5 + .5 * np.cos(1.6 * depth + phase)
    return .78 - .3 * deep * closed * (.6 + .4 * np.cos(folds * angle + phase))


ORGANS = {"colon": colon, "stomach": stomach, "bronchus": bronchus, "oesophagus": oesophagus}
VEINS = {"colon": 1.5, "stomach": .6, "bronchus": .3, "oesophagus": 1}  # how dense they are
FINDINGS = {"polyp": (.85, .28, .28), "ulcer": (.95, .9, .65), "bleeding": (.45, .02, .02)}  # RGB
VIEW = 64  # pixels, as the frames are drawn
FRAME = 160  # pixels, as they are written: in fewer MJPEG would blur the colours
PLANES = np.geomspace(.25, 9, 20, dtype=np.float32)[:, None, None]  # (20, 1, 1) depths along a ray


class Tube(NamedTuple):
    """One patient's organ, its finding, the way of the endoscope through it, and the endoscope."""
    wall: Callable  # one of ORGANS
    folds: int  # their number
    deep: float  # their height, 1 on average
    pace: float  # how fast they follow each other
    phase: float  # where they begin
    finding: str | None  # its kind
    spot: float  # its angle,
    place: float  # its depth
    reach: float  # and its size
    tip: np.ndarray  # (2,) where the endoscope points at first,
    drift: np.ndarray  # (2,) and how far this moves
    roll: np.ndarray  # (2,) its angle at first, and how far that turns
    flesh: np.ndarray  # (3,) colour
    waves: np.ndarray  # (8, 2) of which the pattern of veins is made
    veins: float  # how dark they are
    lamp: float  # how fast light fades
    wet: float  # how strong highlights are
    exposure: float  # mean brightness of a frame


def draw_tube(organ, rng):
    """The organ of one patient, at random."""
    finding = rng.choice([*FINDINGS, None])
    folds = rng.integers(4, 8)
    deep, pace, phase = np.float32(rng.uniform((.7, .7, 0), (1.3, 1.3, 6.28)))
    spot, place, reach = rng.uniform((-3.14, 2, .25), (3.14, 3.5, .45))
    tip = rng.uniform(-.5, .5, 2)
    drift = rng.uniform(-.2, .2, 2)
    roll = rng.uniform(-1, 1, 2) * (3.14, .2)
    flesh = np.array([.8, .42, .34]) * rng.uniform(.96, 1.04, 3) * rng.uniform(.95, 1.05)
    waves = rng.normal(0, (3, 5), (8, 2)) * VEINS[organ]
    veins, lamp, wet, exposure = rng.uniform((.05, .3, .3, .28), (.3, .5, .6, .34))
    return Tube(ORGANS[organ], folds, deep, pace, phase, finding, spot, place, reach, tip, drift,
                roll, flesh, waves, veins, lamp, wet, exposure)


def first_hit(gap):
    """How far rays go to the wall: gap (20, VIEW, VIEW) -> (VIEW, VIEW).

    gap is negative where a ray, at one of PLANES, is still inside the tube.
    """
    gap[-1] = np.abs(gap[-1])  # here every ray ends
    hit = np.argmax(gap > 0, 0).clip(1)  # the first plane outside
    after = np.take_along_axis(gap, hit[None], 0)[0]
    before = np.take_along_axis(gap, hit[None] - 1, 0)[0]
    share = np.clip(before / (before - after), 0, 1)  # by linear interpolation
    return PLANES.ravel()[hit - 1] * (1 - share) + PLANES.ravel()[hit] * share


def frame_at(t, tube, rng):
    """What the endoscope sees at time t in [0, 1]: (FRAME, FRAME, 3) uint8."""
    # The ray of a pixel leads (right, down, 1) times `far` to the wall.
    axis = np.linspace(-1, 1, VIEW, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")  # (VIEW, VIEW) each
    tip = np.float32(tube.tip + tube.drift * t)
    right = 1.25 * x + tip[0]
    down = 1.25 * y + tip[1]
    angle = np.arctan2(down, right) + np.float32(tube.roll @ (1, t))
    depth = np.float32(1.2 * t)
    planes = (depth + PLANES) * tube.pace
    wall = tube.wall(angle, planes, tube.folds, tube.deep, tube.phase)  # (20, VIEW, VIEW)
    far = first_hit(PLANES * np.hypot(right, down) - wall)  # (VIEW, VIEW)

    # A finding is round on the wall, its rim where `ring` is 1. A polyp sticks out.
    ring = np.hypot(2.2 * np.sin((angle - tube.spot) / 2), depth + far - tube.place) / tube.reach
    far = far * (1 - .3 * (tube.finding == "polyp") * np.exp(-1.5 * ring ** 2))

    # The wall is bright where it faces the lamp.
    point = np.stack([right * far, down * far, far], -1)  # (VIEW, VIEW, 3)
    normal = np.cross(np.gradient(point, axis=1), np.gradient(point, axis=0))
    lengths = np.sqrt((normal ** 2).sum(-1) * (point ** 2).sum(-1))
    facing = np.abs((normal * point).sum(-1)) / lengths  # (VIEW, VIEW), 1 where it does

    # Veins are where a sum of waves is 0.
    relief = 0
    for around, inward in tube.waves.tolist():
        relief = relief + np.sin(round(around) * angle + inward * (depth + far) + 9 * around)
    relief = relief / 4
    colour = (1 - tube.veins * np.exp(-(relief / .12) ** 2) + .08 * relief)[..., None]
    colour = tube.flesh * colour ** (.6, 1.3, 1.3)  # (VIEW, VIEW, 3)
    if tube.finding:
        colour += .85 * np.exp(-ring ** 4)[..., None] * (FINDINGS[tube.finding] - colour)
    colour += (tube.wet * np.clip(facing + .04 * relief, 0, 1) ** 60)[..., None]  # highlights

    # Light fades, the camera exposes and adds noise, and its lens is round.
    frame = colour * ((.25 + .75 * facing) / (1 + (tube.lamp * far) ** 2))[..., None]
    frame = frame * tube.exposure / frame.mean() + rng.normal(0, .012, (VIEW, VIEW, 1))
    frame = np.uint8(255 * np.clip(frame, 0, 1) ** .8 * (np.hypot(x, y) < 1.15)[..., None])
    return np.asarray(Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.BICUBIC))


def endoscopy(organ, rng):
    """Frames (T, 160, 160, 3) uint8 of a veined tube from inside; a lesion lies on its wall."""
    tube = draw_tube(organ, rng)
    times = np.linspace(0, 1, rng.integers(12, 17))
    times = times[::rng.choice([-1, 1])]  # on the way in or out
    frames = [frame_at(t, tube, rng) for t in times]
    return Phantom(np.stack(frames), None, tube.finding)


# ---- files ---------------------------------------------------------------------------------------
def dicom(path, pixels, sop_class, syntax=ExplicitVRLittleEndian, **tags):
    """A file of pixels (rows, columns), (frames, rows, columns) or (rows, columns, 3) -> its path.

    `tags` are set last. Tests write their own files with it, too.
    """
    little = syntax != ExplicitVRBigEndian
    colours = "RGB" if pixels.shape[2:] == (3,) else "MONOCHROME2"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = sop_class
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
    def uid(of):
        return generate_uid(entropy_srcs=[patient, of])

    return {
        "PatientID": patient,
        "PatientName": f"PHANTOM^{patient}",
        "PatientBirthDate": "19700101",
        "StudyDate": "20250101",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "BitsStored": 12,
        "StudyInstanceUID": uid("study"),
        "SeriesInstanceUID": uid("series"),
        "FrameOfReferenceUID": uid("frame"),
        "SOPInstanceUID": uid(str(instance)),
    }


def write_xray(path, image, patient, rng):
    """A digital X-ray, one in three with dense stored low, all with a display window."""
    low, high = np.percentile(image, [2, 99.5]) * rng.uniform(.9, 1.1, 2)
    inverted = rng.random() < 1 / 3
    if inverted:
        image = 4095 - image
        low, high = 4095 - high, 4095 - low
    dicom(path, image, DigitalXRayImageStorageForPresentation, **patient_tags(patient, 1),
          Modality=str(rng.choice(["DX", "CR"])), PresentationIntentType="FOR PRESENTATION",
          PixelIntensityRelationship="LOG", PixelIntensityRelationshipSign=1 if inverted else -1,
          PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
          WindowCenter=f"{(low + high) / 2:.1f}", WindowWidth=f"{high - low:.1f}")


def write_series(folder, image, voxel, patient, rng):
    """A CT series: a file a slice, named in random order, numbered upwards or downwards."""
    slices = image.shape[2]
    corner = rng.uniform(-200, 0, 3)  # mm, of the first slice
    numbers = range(1, slices + 1)[::rng.choice([-1, 1])]
    names = rng.permutation(slices)
    for k in range(slices):
        pixels = (image[:, :, k].T + 1024).astype(np.uint16)  # (rows, columns)
        place = corner + (0, 0, k * voxel[2])
        dicom(folder / f"IM{names[k]:05d}", pixels, CTImageStorage, **patient_tags(patient, k),
              Modality="CT", RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU",
              InstanceNumber=numbers[k], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
              ImagePositionPatient=[f"{mm:.4f}" for mm in place],
              PixelSpacing=[f"{mm:.5f}" for mm in voxel[1::-1]], SliceThickness=f"{voxel[2]:.4f}")


def write_nifti(path, image, voxel, rng):
    """A volume stored in one of many axis orders, with the affine that undoes it."""
    affine = np.diag([-voxel[0], -voxel[1], voxel[2], 1])  # NIfTI counts to the right and front
    scan = nib.Nifti1Image(image, affine)
    axes = rng.choice(["LPS", "RAS", "LAS", "PIR", "ASL", "SRA", "RSP"])
    wanted = nib.orientations.axcodes2ornt(str(axes))
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    scan = scan.as_reoriented(change)
    path.write_bytes(gzip.compress(scan.to_bytes(), compresslevel=1, mtime=0))


def write_video(path, frames):
    """An AVI of motion JPEG, every frame a picture of its own."""
    with iio.imopen(path, "w", plugin="pyav") as video:
        video.init_video_stream("mjpeg", fps=25, pixel_format="yuvj420p")
        # With more threads the bytes, though not the pixels, depend on how many cores there are.
        video._video_stream.thread_count = 1
        for frame in frames:
            video.write_frame(frame)


class Kind(NamedTuple):
    """How samples of a modality are made."""
    draw: Callable  # (part, rng) -> Phantom
    parts: dict | tuple  # their names
    ending: str  # of the file


KINDS = {"xray": Kind(xray, PARTS, ".dcm"),
         "ultrasound": Kind(ultrasound, ECHO_PARTS, ".png"),
         "endoscopy": Kind(endoscopy, ORGANS, ".avi"),
         "ct": Kind(ct, PARTS, ".nii.gz"),
         "mri": Kind(mri, PARTS, ".nii.gz")}
MODALITIES = tuple(KINDS)


def write_sample(folder, modality, number, split, seed):
    """Make and write patient `number` of a modality -> the row of labels.csv."""
    # The seed is this patient's alone: it does not matter how many others there are, nor in which
    # process they are made.
    rng = np.random.default_rng([seed, MODALITIES.index(modality), number])
    patient = f"{seed}-{modality}-{number:04d}"
    kind = KINDS[modality]
    part = tuple(kind.parts)[number % len(kind.parts)]
    image, voxel, lesion = kind.draw(part, rng)

    # Every other CT is a folder of slices.
    ending = kind.ending
    if modality == "ct" and number % 2:
        ending = ""
    path = folder / modality / f"{number:04d}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == "":
        write_series(path, image, voxel, patient, rng)
    elif ending == ".nii.gz":
        write_nifti(path, image, voxel, rng)
    elif ending == ".dcm":
        write_xray(path, image, patient, rng)
    elif ending == ".avi":
        write_video(path, image)
    else:
        Image.fromarray(image).save(path)

    labels = f"part:{part}|lesion:{lesion}" if lesion else f"part:{part}"
    return path.relative_to(folder).as_posix(), labels, patient, split, modality


def write_demo(folder, n=200, seed=1):
    """Write n training and ceil(.8 n) test patients of each modality -> path of labels.csv.

    MRI is for tests only. The table is written last; if it is there already, nothing is written.
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    if table.exists():
        return table

    # imageio collects garbage after every video: quick, if what was imported is left out of it.
    test = math.ceil(.8 * n)
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, initializer=gc.freeze) as pool:
        samples = []
        for modality in MODALITIES:
            train = 0 if modality == "mri" else n
            for number in range(test + train):
                split = "test" if number < test else "train"
                samples.append(pool.submit(write_sample, folder, modality, number, split, seed))
        rows = [sample.result() for sample in samples]

    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels", "patient", "split", "modality"])
        writer.writerows(rows)
    return table


if __name__ == "__main__":
    write_demo(sys.argv[1])
