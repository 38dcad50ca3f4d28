"""Labelled phantoms in five modalities, written as the files a hospital would send.

In: a folder, a size n and a seed. Out: n training and .6 n test patients per modality (MRI: test only), each one file:
  ct          (96-128)^2 x 24-48 HU volume   .nii.gz in any axis order, or a folder of DICOM slices
  xray        attenuation projection          12-bit DICOM, one third MONOCHROME1
  mri         T1, T2 or PD contrast           .nii.gz          (never trained on)
  ultrasound  speckled sector with shadows    .png, grey
  endoscopy   24-40 frames through a tube     .avi, RGB
and labels.csv with path,labels,patient,split,modality. The labels are `part:<body part>` and, in two of three, `lesion:<kind>`.
A body is a list of implicit shapes; a modality is a table of tissue values and a way to look at the shapes.
Run: python -m tests.phantoms FOLDER
"""
import csv
import gzip
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import imageio.v3 as iio
import nibabel as nib
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
TISSUES = {           # CT in HU; MRI looks T1, T2, PD; ultrasound echo and attenuation (per mm)
    "air":           (-1000, .00, .00, .00, .00, .000),
    "gas":           (-950,  .00, .00, .00, .90, .040),
    "lung":          (-830,  .08, .10, .12, .80, .040),
    "fat":           (-100,  1.0, .75, .80, .40, .002),
    "muscle":        (55,    .42, .22, .55, .25, .004),
    "organ":         (110,   .55, .38, .65, .45, .004),
    "kidney":        (200,   .40, .62, .70, .20, .003),
    "brain":         (60,    .62, .50, .80, .30, .004),
    "vessel":        (190,   .10, .12, .20, .02, .001),
    "fluid":         (5,     .12, 1.0, .90, .01, .000),
    "cartilage":     (110,   .45, .45, .75, .12, .006),
    "bone":          (900,   .04, .04, .06, 1.0, .060),
    "marrow":        (280,   .85, .55, .60, .30, .040),
    "nodule":        (260,   .75, .80, .85, .10, .006),
    "cyst":          (-180,  .08, 1.0, .95, .00, .000),
    "calcification": (1200,  .02, .02, .03, 1.3, .150),
}


class Shape(NamedTuple):
    """A tissue inside a surface: distance((3, ...) points) is about the signed distance in mm, negative inside."""
    tissue: str
    low: np.ndarray                   # (3,) corners of a box that holds the shape; x to the left, y to the back, z up, mm
    high: np.ndarray
    distance: Callable


# ---- shapes ----------------------------------------------------------------------------------------------------------

def ball(tissue, centre, radii, power=2., turn=0.):
    """Ellipsoid, boxier with a higher power, turned about the vertical by degrees."""
    centre, radii = np.float32(centre), np.float32(np.broadcast_to(radii, 3))
    cos, sin = np.cos(np.radians(turn), dtype=np.float32), np.sin(np.radians(turn), dtype=np.float32)
    reach = radii if turn == 0 else np.float32([radii[:2].max(), radii[:2].max(), radii[2]])

    def distance(points):
        x, y, z = (points[i] - centre[i] for i in range(3))
        q = np.abs((cos * x + sin * y) / radii[0]), np.abs((cos * y - sin * x) / radii[1]), np.abs(z / radii[2])
        length = np.sqrt(sum(a * a for a in q)) if power == 2 else sum(a ** power for a in q) ** (1 / power)
        return (length - 1) * radii.min()
    return Shape(tissue, centre - reach, centre + reach, distance)


def rod(tissue, start, end, radius, end_radius=None):
    """Round-ended cone between two points."""
    start, end = np.float32(start), np.float32(end)
    radius, taper = np.float32(radius), np.float32((radius if end_radius is None else end_radius) - radius)
    axis, thick = end - start, max(radius, radius + taper)

    def distance(points):
        d = [points[i] - start[i] for i in range(3)]
        t = np.clip(sum(a * b for a, b in zip(d, axis)) / np.float32(axis @ axis), 0, 1)
        return np.sqrt(sum((a - t * b) ** 2 for a, b in zip(d, axis))) - radius - taper * t
    return Shape(tissue, np.minimum(start, end) - thick, np.maximum(start, end) + thick, distance)


def wire(tissue, points, radius):
    return [rod(tissue, a, b, radius) for a, b in zip(points, points[1:])]


def inside(shape, tissue, depth):
    """The part of a shape that lies at least `depth` mm below its surface."""
    return Shape(tissue, shape.low, shape.high, lambda points: shape.distance(points) + depth)


def bones(shapes, wall=3.5):
    """Cortical shells first, then all the marrow, so that joined shafts share one cavity."""
    return [inside(s, "bone", 0) for s in shapes] + [inside(s, "marrow", wall) for s in shapes]


def both(make):
    """make(side) for the patient's right (-1) and left (+1)."""
    return [shape for side in (-1, 1) for shape in make(side)]


def ribs(centre, radii, gap, low, high):
    """Slanted bands on an ellipsoid: they fall towards the front, as ribs do."""
    cage = ball("bone", centre, radii)

    def distance(points):
        band = np.abs((points[2] - .5 * points[1]) / gap % 1 - .5) * gap - gap * .2
        return np.maximum.reduce([np.abs(cage.distance(points)) - 3.5, band, points[2] - high, low - points[2]])
    return Shape("bone", cage.low - 5, cage.high + 5, distance)


def spine(y, low, high, radius, gap):
    """Vertebral bodies with processes and a canal, discs between them."""
    shapes = [rod("cartilage", (0, y, low), (0, y, high), radius * .9)]
    for z in np.arange(low, high, gap):
        shapes += bones([ball("bone", (0, y, z), (radius, radius * .8, gap * .4), 4)], 2.5)
        shapes += [rod("bone", (0, y + radius * 1.5, z), (0, y + radius * 2.6, z - gap * .4), radius * .2)]
        shapes += both(lambda s: [rod("bone", (s * radius * .6, y + radius, z), (s * radius * 2, y + radius * 1.5, z), radius * .25)])
    return shapes + [rod("fluid", (0, y + radius * 1.2, low), (0, y + radius * 1.2, high), radius * .4)]


def tree(rng, tissue, start, direction, length, radius, depth):
    """A vessel that forks `depth` times."""
    end = start + direction * length
    shapes = [rod(tissue, start, end, radius, radius * .75)]
    for _ in range(2 if depth else 0):
        turned = direction + rng.normal(0, .5, 3)
        shapes += tree(rng, tissue, end, turned / np.linalg.norm(turned), length * .8, radius * .7, depth - 1)
    return shapes


def bowel(rng, centre, spread, loops):
    """Random loops with a wall, filled with gas or fluid."""
    shapes = []
    for _ in range(loops):
        points = np.array(centre) + np.cumsum(rng.normal(0, 22, (4, 3)), 0) + rng.uniform(-1, 1, 3) * spread
        filling = rng.choice(["gas", "fluid", "organ"])
        shapes += wire("muscle", points, 14) + wire(filling, points, 10)
    return shapes


# ---- body parts: shapes from the outside in, mm, random proportions -------------------------------------------------

def head(rng):
    skull = ball("bone", (0, 0, 20), np.array([72, 90, 76]) * rng.uniform(.92, 1.08, 3))
    jaw = [(-50, -5, -45), (-46, -15, -82), (-16, -74, -96), (16, -74, -96), (46, -15, -82), (50, -5, -45)]
    shapes = [inside(skull, "fat", -6)._replace(low=skull.low - 8, high=skull.high + 8)]
    shapes += [ball("muscle", (0, -32, -48), (60, 60, 62), 3), rod("muscle", (0, 25, -40), (0, 32, -150), 54)]
    shapes += [ball("muscle", (0, -96, -32), (12, 18, 20))] + spine(24, -140, -50, 16, 19)
    shapes += wire("bone", jaw, 8) + bones([ball("bone", (0, -66, -52), (30, 24, 20))])
    shapes += both(lambda s: [rod("bone", (s * 60, -45, -22), (s * 40, -80, -26), 6)])
    shapes += [skull, inside(skull, "fluid", rng.uniform(6, 9)), inside(skull, "brain", rng.uniform(10, 12))]
    shapes += [ball("bone", (0, -30, -42), (45, 40, 7)), ball("brain", (0, 48, -30), (45, 32, 25))]
    width = rng.uniform(5, 12)
    shapes += both(lambda s: wire("fluid", [(s * 9, -35, 32), (s * 11, 5, 42), (s * 20, 35, 25)], width))
    shapes += both(lambda s: [ball("fat", (s * 33, -72, -6), (20, 24, 18)), ball("fluid", (s * 33, -80, -6), 12)])
    shapes += both(lambda s: [ball("gas", (s * 29, -62, -38), (14, 18, 15))])
    return shapes + [ball("gas", (0, -62, -34), (9, 32, 20)), rod("gas", (0, -18, -50), (0, -14, -140), 9)]


def neck(rng):
    skin = ball("fat", (0, 0, -20), np.array([62, 62, 420]) * rng.uniform(.9, 1.1, 3))
    jaw = [(-48, -5, 100), (-45, -10, 72), (-15, -62, 62), (15, -62, 62), (45, -10, 72), (48, -5, 100)]
    shoulder = ball("fat", (0, 10, -165), (190, 75, 90))
    shapes = [skin, shoulder, inside(skin, "muscle", rng.uniform(4, 10)), inside(shoulder, "muscle", 10)]
    shapes += both(lambda s: [rod("fat", (s * 40, 5, 90), (s * 34, 5, -140), 9)]) + spine(16, -190, 150, 15, 20)
    shapes += both(lambda s: [rod("vessel", (s * 28, -8, 120), (s * 24, -8, -180), 5)])
    shapes += both(lambda s: [rod("vessel", (s * 38, -2, 120), (s * 32, -6, -180), rng.uniform(5, 9))])
    shapes += both(lambda s: [ball("organ", (s * 17, -26, -30), np.array([12, 12, 26]) * rng.uniform(.8, 1.4))])
    shapes += [rod("bone", (0, -30, 35), (0, -28, 5), 16), rod("gas", (0, -30, 36), (0, -28, 4), 13)]
    shapes += [rod("cartilage", (0, -26, 0), (0, -8, -190), 12), rod("gas", (0, -18, 110), (0, -28, 20), 9)]
    shapes += [rod("gas", (0, -27, 20), (0, -8, -190), 9), rod("muscle", (0, -4, -20), (3, 0, -190), 8)]
    shapes += wire("bone", [(-20, -20, 42), (0, -42, 40), (20, -20, 42)], 4) + wire("bone", jaw, 8)
    shapes += both(lambda s: [rod("bone", (s * 8, -40, -120), (s * 130, -10, -95), 7)])
    return shapes + both(lambda s: [ball("lung", (s * 48, 10, -190), (40, 40, 75))])


def chest(rng):
    wide, deep = rng.uniform(.9, 1.1, 2)
    skin = ball("fat", (0, 0, -20), (178 * wide, 118 * deep, 330), 3)
    shapes = [skin] + both(lambda s: [ball("fat", (s * 165, 10, 140), (62, 55, 90))])
    if rng.random() < .5:
        shapes += both(lambda s: [ball("fat", (s * 82, -108 * deep, -20), (62, 38, 55))])
    shapes += [inside(skin, "muscle", rng.uniform(10, 22))] + both(lambda s: [ball("muscle", (s * 165, 10, 140), (50, 44, 80))])
    shapes += [ribs((0, 0, 10), (146 * wide, 98 * deep, 205), 29, -140, 170)]
    shapes += both(lambda s: [ball("lung", (s * 72 * wide, 2, 12), (62 * wide, 86 * deep, 150), 2.5)])
    shapes += both(lambda s: tree(rng, "vessel", np.array([s * 30., 10, 15]), np.array([s * .9, 0, -.3]), 34, 7, 4))
    shapes += [ball("muscle", (0, 0, 40), (30, 70, 160)), ball("organ", (-72, 0, -150), (95, 90, 95))]
    shapes += [ball("organ", (80, 5, -165), (85, 85, 88)), ball("gas", (70, -35, -115), (28, 25, 18))]
    shapes += [ball("muscle", (26, -32, -45), np.array([66, 52, 66]) * rng.uniform(.85, 1.25))]
    shapes += [ball("vessel", (34, -30, -50), (36, 28, 40))] + spine(72, -210, 200, 19, 26)
    shapes += wire("vessel", [(5, -20, -10), (0, -22, 65), (20, 20, 82), (24, 48, 60), (20, 48, -210)], rng.uniform(10, 15))
    shapes += [rod("gas", (0, 5, 200), (0, 18, 62), 9)] + both(lambda s: [rod("gas", (0, 18, 62), (s * 42, 15, 22), 7)])
    shapes += bones([ball("bone", (0, -94 * deep, 40), (18, 7, 85))])
    shapes += bones(both(lambda s: wire("bone", [(s * 14, -80, 128), (s * 70, -75, 150), (s * 150, -10, 160)], 7)))
    shapes += both(lambda s: [ball("bone", (s * 112, 92, 70), (46, 5, 62), turn=s * 25)])
    return shapes + bones(both(lambda s: [ball("bone", (s * 172, 10, 135), 24), rod("bone", (s * 176, 10, 130), (s * 195, 10, -40), 12)]))


def abdomen(rng):
    wide, deep = rng.uniform(.9, 1.1, 2)
    skin = ball("fat", (0, 0, 0), (172 * wide, 118 * deep, 420), 3)
    fat = rng.uniform(6, 30)
    shapes = [skin, inside(skin, "muscle", fat), inside(skin, "fat", fat + 14)]
    shapes += both(lambda s: [rod("muscle", (s * 34, 55, 60), (s * 62, 35, -190), 20), ball("muscle", (s * 45, 92, 0), (38, 22, 300))])
    shapes += spine(62, -170, 200, 23, 34) + [ribs((0, 0, 60), (148 * wide, 100 * deep, 230), 30, 40, 210)]
    shapes += [ball("organ", (-66, -12, 85), np.array([82, 78, 78]) * rng.uniform(.85, 1.15, 3))]
    shapes += [ball("organ", (100, 35, 85), np.array([30, 45, 48]) * rng.uniform(.8, 1.3)), ball("fluid", (-50, -55, 40), (16, 18, 24))]
    shapes += tree(rng, "vessel", np.array([-20., 0, 60]), np.array([-.9, 0, .4]), 34, 6, 2)
    shapes += [ball("muscle", (50, -40, 80), (56, 40, 44)), ball("gas", (54, -58, 88), rng.uniform(14, 32, 3))]
    shapes += both(lambda s: [ball("kidney", (s * 72, 48, 8 - s * 6), (29, 26, 54)), ball("fat", (s * 60, 44, 8), (14, 12, 24))])
    shapes += [rod("vessel", (8, 28, 200), (5, 30, -80), 11), rod("vessel", (-18, 26, 200), (-14, 30, -80), 11)]
    colon = [(-118, 10, -120), (-116, 5, -5), (-90, -60, 15), (0, -78, -20), (95, -55, 30), (120, 15, 20), (116, 20, -130)]
    shapes += wire("muscle", colon, 23) + wire("organ", colon, 19)
    shapes += [ball("gas", np.array(colon[i]) + rng.normal(0, 12, 3), rng.uniform(8, 17, 3)) for i in rng.integers(0, 7, 7)]
    shapes += bowel(rng, (0, -45, -75), (70, 20, 55), 9)
    return shapes + bones(both(lambda s: [ball("bone", (s * 105, 45, -175), (58, 10, 62), turn=s * 40)]))


def pelvis(rng):
    wide, deep = rng.uniform(.9, 1.1, 2)
    skin, fat = ball("fat", (0, 0, 110), (186 * wide, 118 * deep, 235), 3), rng.uniform(8, 26)
    legs = both(lambda s: [rod("fat", (s * 92, 5, -55), (s * 98, 5, -260), 92, 84)])
    shapes = [skin, *legs, inside(skin, "muscle", fat), *[inside(leg, "muscle", fat) for leg in legs]]
    shapes += [ball("fat", (0, -15, 75), (105, 75, 120)), *bowel(rng, (0, -25, 80), (70, 25, 45), 8)]
    shapes += both(lambda s: [rod("fat", (s * 30, 80, -40), (s * 60, 85, 60), 10)])
    shapes += bones(both(lambda s: [ball("bone", (s * 84, 28, 72), (64, 9, 68), turn=s * 42), ball("bone", (s * 86, 2, -8), 34),
                                    rod("bone", (s * 82, -8, -14), (s * 12, -56, -42), 9),
                                    rod("bone", (s * 80, 18, -20), (s * 56, 20, -88), 13),
                                    rod("bone", (s * 56, 15, -88), (s * 12, -50, -58), 8)]))
    shapes += bones(both(lambda s: wire("bone", [(s * 30, 62, 95), (s * 74, 56, 138), (s * 122, 14, 132), (s * 136, -22, 92),
                                                 (s * 112, -26, 30), (s * 90, -4, 8)], 8)))
    shapes += bones([ball("bone", (0, 66, 62), (52, 16, 55)), ball("bone", (0, 74, 10), (22, 9, 30))]) + spine(52, 112, 300, 24, 35)
    shapes += both(lambda s: [ball("cartilage", (s * 92, 0, -12), 28)])
    shapes += bones(both(lambda s: [ball("bone", (s * 92, 0, -12), 25), rod("bone", (s * 92, 0, -12), (s * 132, 6, -48), 15),
                                    rod("bone", (s * 134, 8, -44), (s * 116, 2, -280), 19, 16)]))
    shapes += [ball("fluid", (0, -25, -10), np.array([38, 32, 30]) * rng.uniform(.6, 1.3, 3)), rod("muscle", (0, 42, 50), (0, 45, -60), 17)]
    shapes += [ball("gas", (0, 42, rng.uniform(-30, 40)), rng.uniform(8, 14)), ball("organ", (0, -2, -45), (22, 18, 18))]
    return shapes + both(lambda s: wire("vessel", [(s * 8, 25, 170), (s * 55, -25, 40), (s * 75, -58, -50), (s * 80, -40, -260)], 7))


def knee(rng):
    leg, fat, side = rod("fat", (0, 5, 190), (0, 12, -190), rng.uniform(58, 72), rng.uniform(48, 58)), rng.uniform(5, 15), rng.choice([-1, 1])
    shapes = [leg, inside(leg, "muscle", fat), ball("fat", (0, 35, 10), (26, 18, 60)), ball("fat", (0, -40, 0), (28, 16, 36))]
    shapes += both(lambda s: [rod("fat", (s * 30, 10, 120), (s * 26, 22, -150), 5)])
    shapes += [ball("fluid", (0, -34, 46), (24, rng.uniform(3, 9), 26)), ball("cartilage", (0, 2, 0), (42, 30, 12), 3)]
    shapes += [rod("cartilage", (0, -46, 40), (0, -36, -40), 5), rod("vessel", (4, 38, 190), (0, 36, -190), 5)]
    size = rng.uniform(.9, 1.1)
    shapes += bones([rod("bone", (0, -6, 220), (0, -4, 60), 16 * size), rod("bone", (0, -4, 70), (0, -2, 30), 17, 32 * size)]
                    + both(lambda s: [ball("bone", (s * 22, 4, 26), np.array([22, 30, 24]) * size)]))
    shapes += bones([ball("bone", (0, 0, -22), np.array([43, 29, 17]) * size, 3), rod("bone", (0, 0, -28), (2, 0, -75), 33 * size, 17),
                     rod("bone", (2, 0, -70), (4, 2, -220), 17, 14), ball("bone", (0, -26, -48), (10, 8, 14))])
    shapes += bones([rod("bone", (side * 38, 18, -34), (side * 36, 20, -220), 7), ball("bone", (side * 38, 18, -34), 11)], 2.5)
    return shapes + bones([ball("bone", (0, -44 * size, 26), np.array([20, 10, 21]) * size)])


def foot(rng):
    wide = rng.uniform(.85, 1.15)
    skin = [rod("fat", (0, 40, 150), (0, 42, 0), 46, 38), ball("fat", (0, 62, -34), (34, 40, 32)),
            rod("fat", (0, 45, -20), (0, -45, -42), 36, 28), ball("fat", (0, -75, -48), (50 * wide, 62, 18), 2.5)]
    skin += [rod("fat", (14 * s * wide, -110, -52), (15 * s * wide, -142 + 6 * abs(s - 1), -55), 9 + 2 * (s == 2)) for s in range(-2, 3)]
    shapes = skin + [inside(s, "muscle", rng.uniform(3, 8)) for s in skin[:4]] + [rod("muscle", (0, 76, 150), (0, 84, -20), 6)]
    frame = [rod("bone", (4, 34, 220), (3, 34, 30), 14, 19), rod("bone", (-24, 44, 220), (-25, 44, 8), 7, 9)]
    frame += [ball("bone", (2, 28, 8), (19, 28, 14)), ball("bone", (0, 60, -26), (16, 36, 18), 2.5), ball("bone", (8, -6, -4), (16, 10, 14))]
    frame += [ball("bone", (-14, -6, -22), (13, 18, 12)), *[ball("bone", (x, -26, -14), (8, 11, 10)) for x in (-1, 11, 22)]]
    for s in range(-2, 3):
        x, big = 13 * s * wide, 3 * (s == 2)
        frame += [rod("bone", (x * .8, -38, -24 + 3 * s), (x, -92 + 5 * abs(s - 1), -50), 5.5 + big)]
        frame += [rod("bone", (x, -102 + 5 * abs(s - 1), -52), (x * 1.08, -136 + 6 * abs(s - 1), -54), 4.5 + big)]
    return shapes + bones(frame, 2.5)


PARTS = {head: 270, neck: 210, chest: 430, abdomen: 390, pelvis: 410, knee: 170, foot: 270}          # usual field of view, mm
ECHO_PARTS = (neck, abdomen, pelvis, knee)


def body(part, rng):
    """(shapes, lesion kind or None, lesion centre or None) of one patient."""
    shapes, kind = part(rng), rng.choice(["nodule", "cyst", "calcification"]) if rng.random() < .67 else None
    if kind is None:
        return shapes, None, None
    hosts = [s for s in shapes if s.tissue in ("lung", "organ", "brain", "kidney", "muscle", "marrow") and (s.high - s.low).min() > 24
             and np.abs(s.low + s.high).max() / 2 < .3 * PARTS[part]]
    host, size = hosts[rng.integers(len(hosts))], PARTS[part] * rng.uniform(.02, .06)
    centre = (host.low + host.high) / 2 + np.minimum(host.high - host.low, .5 * PARTS[part]) * rng.uniform(-.22, .22, 3)
    if kind == "calcification":
        return shapes + [ball(kind, centre + rng.normal(0, size / 2, 3), size * rng.uniform(.15, .4)) for _ in range(6)], kind, centre
    return shapes + [ball(kind, centre, size * rng.uniform(.8, 1.25, 3))], kind, centre


# ---- looking at a body -----------------------------------------------------------------------------------------------

def warp(points, rng, size):
    """Bend the space by three random waves of about 1.4 % of `size`: no two organs have the same outline. (3, ...) -> same."""
    for _ in range(2):
        wave = rng.normal(0, .8, 3) * 2 * np.pi / size
        push = np.float32(rng.normal(0, .017, 3) * size)
        phase = sum(np.float32(w) * p for w, p in zip(wave, points)) + np.float32(rng.uniform(0, 6.28))
        points = points + push.reshape(3, *[1] * phase.ndim) * np.sin(phase)
    return points


def lattice(shape, extent, rng, turn):
    """Sample points (3, *shape) in mm of a patient who lies turned (degrees about x, y, z), off centre and near or far."""
    axes = [np.linspace(-.5, .5, k, dtype=np.float32) * e for k, e in zip(shape, extent)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) / np.float32(rng.uniform(.7, 1.3))                # (3, *shape)
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(turn)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[[a, b, a, b], [a, b, b, a]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
        rotation = one @ rotation
    shift = rng.uniform(-.12, .12, 3) * extent
    return np.tensordot(np.float32(rotation), grid, 1) + np.float32(shift).reshape(3, 1, 1, 1)


def paint(shapes, points, value, edge):
    """Draw the shapes in order with soft edges of `edge` mm. points (3, X, Y, Z), value {tissue: number} -> (X, Y, Z) float32."""
    image, step = np.full(points.shape[1:], value["air"], np.float32), 4
    coarse = points[:, ::step, ::step, ::step]
    strides = [np.abs(np.diff(points, axis=a)).max((1, 2, 3), initial=0) for a in (1, 2, 3)]
    margin = edge / 2 + sum(strides) * (step - 1)                # no point is further than this from its coarse corner
    for shape in shapes:
        near = np.all((coarse.T > shape.low - margin) & (coarse.T < shape.high + margin), -1).T          # where to look at all
        if near.any():
            box = tuple(slice(i.min() * step, (i.max() + 1) * step) for i in np.nonzero(near))
            inner = np.clip(.5 - shape.distance(points[(slice(None), *box)]) / np.float32(edge), 0, 1)
            image[box] += inner * (np.float32(value[shape.tissue]) - image[box])
    return image


def table(column, rng, spread):
    """One column of TISSUES with every value moved a little: no tissue looks alike in two patients."""
    return {tissue: row[column] + spread * rng.normal() * (tissue not in ("air", "gas", "lung")) for tissue, row in TISSUES.items()}


def volume(part, rng, column, spread):
    """(values (X, Y, Z) float32 on a scanner grid in LPS order, voxel size (3,) mm, lesion kind)."""
    shapes, kind, _ = body(part, rng)
    shape = (*rng.choice([96, 112, 128], 1).repeat(2), rng.integers(24, 49))
    extent = PARTS[part] * np.array([1, 1, rng.uniform(.5, .9)])
    points = lattice(shape, extent, rng, rng.uniform(-1, 1, 3) * (8, 8, 20))
    image = paint(shapes, warp(points, rng, PARTS[part]), table(column, rng, spread), extent[0] / shape[0])
    return image, extent / shape, kind


def ct(part, rng):
    image, voxel, kind = volume(part, rng, 0, 20)
    noise = rng.normal(0, rng.uniform(15, 50), image.shape)
    return np.round(image + (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2).clip(-1024, 3071).astype(np.int16), voxel, kind


def mri(part, rng):
    """T1, T2 or PD values with a smooth coil profile and Rician noise."""
    image, voxel, kind = volume(part, rng, rng.integers(1, 4), .06)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, k) for k in image.shape], indexing="ij"))
    image = image * np.exp(np.tensordot(rng.normal(0, .25, 3), grid, 1) - np.tensordot(rng.uniform(0, .3, 3), grid ** 2, 1))
    noise = rng.normal(0, rng.uniform(.01, .05), (2, *image.shape))
    return (np.hypot(image + noise[0], noise[1]) * rng.uniform(300, 3000)).astype(np.int16), voxel, kind


def xray(part, rng):
    """(12-bit picture (H, W) uint16 in which dense is bright, lesion kind): -log of Beer-Lambert with photon noise."""
    shapes, kind, _ = body(part, rng)
    view = rng.choice([0, 0, 0, 180, 40, -40, 90, -90]) + rng.uniform(-12, 12)
    shape, extent = (rng.integers(96, 129), 60, 128), PARTS[part] * np.array([1, 1.3, 1])
    extent[0] *= shape[0] / shape[2]
    points = lattice(shape, extent, rng, (rng.uniform(-8, 8), rng.uniform(-20, 20), view))
    hu = paint(shapes, warp(points, rng, PARTS[part]), table(0, rng, 20), extent[0] / shape[0] * 1.5)
    density = np.clip(1 + hu / 1000, 0, None) + .9 * np.clip(hu / 1000 - .15, 0, None)                   # bone stops soft rays
    line = density.sum(1).T[::-1] * extent[1] / shape[1] * 4.5 / PARTS[part]                             # (H, W), head up
    photons = rng.poisson(rng.uniform(2e3, 2e4) * np.exp(-line))
    line = -np.log((photons + 1) / 2e4)
    line = (line - line.min()) / np.ptp(line)
    return np.round(line * rng.uniform(2500, 4000)).astype(np.uint16), kind


def ultrasound(part, rng):
    """(sector picture (160, 192) uint8, lesion kind): the probe stands on the skin in front of a lesion or of the middle."""
    shapes, kind, target = body(part, rng)
    size = PARTS[part]
    target = rng.uniform(-.15, .15, 3) * size if target is None else target
    side, tip = np.radians(rng.uniform(-70, 70)), np.radians(rng.uniform(-25, 25))
    out = np.array([np.sin(side) * np.cos(tip), -np.cos(side) * np.cos(tip), np.sin(tip)])               # towards the probe
    across = np.cross(out, rng.normal(0, 1, 3))
    across /= np.linalg.norm(across)
    ray = target[:, None] + out[:, None] * np.linspace(0, size, 128)                                     # (3, 128)
    solid = paint(shapes, np.float32(ray).reshape(3, 128, 1, 1), {t: float(t != "air") for t in TISSUES}, 2).ravel()
    skin = np.linspace(0, size, 128)[np.flatnonzero(solid > .5).max(initial=0)]
    depth, half = skin + size * rng.uniform(.15, .4), np.radians(rng.uniform(26, 42))
    near = depth * rng.uniform(.1, .35)                                                                  # curved probe face
    angle, length = np.linspace(-half, half, 160), near + np.linspace(0, depth, 224)
    fan = np.cos(angle)[:, None] * length, np.sin(angle)[:, None] * length                               # (160, 224) each
    points = (target + out * (skin + near))[:, None, None] - out[:, None, None] * fan[0] + across[:, None, None] * fan[1]
    points = warp(np.float32(points)[..., None], rng, size)
    echo, loss = table(4, rng, .03), table(5, rng, 0)
    echo["air"], loss["air"] = echo["muscle"] / 2, 0.                                                    # gel around the skin
    echo, loss = (paint(shapes, points, value, depth / 150)[..., 0] for value in (echo, loss))
    reflect = np.abs(np.diff(echo, axis=1, prepend=echo[:, :1])) + 2 * np.abs(np.diff(loss, axis=1, prepend=loss[:, :1]))
    speckle = rng.rayleigh(.8, echo.shape)
    speckle = (speckle + np.roll(speckle, 1, 0) + np.roll(speckle, 2, 0)) / 3                            # wide as the beam
    signal = (np.clip(echo, .004, None) * speckle + 1.2 * reflect) * np.exp(-2 * np.cumsum(loss, 1) * depth / 224)
    signal = np.clip(1 + np.log10(signal + 1e-4) / rng.uniform(1.6, 2.2), 0, 1) ** rng.uniform(.8, 1.2)
    y, x = np.mgrid[:160, :192]
    scale = (near + depth - near * np.cos(half)) / 156
    y, x = y * scale + near * np.cos(half), (x - 95.5) * scale
    row, column = (np.arctan2(x, y) / half + 1) * 79.5, (np.hypot(x, y) - near) / depth * 223
    seen = (row >= 0) & (row <= 159) & (column >= 0) & (column <= 223)
    picture = signal[row.clip(0, 159).round().astype(int), column.clip(0, 223).round().astype(int)] * seen
    return np.uint8(picture * 255), kind


# ---- endoscopy: looking along a tube of radius 1 -------------------------------------------------------------------

def wall(organ, rng):
    """The lumen's shape: wall(phi, z) -> radius, for angles and depths of any shape."""
    phase, count, deep, pace = rng.uniform(0, 6.28), rng.integers(4, 8), rng.uniform(.7, 1.3), rng.uniform(.8, 1.2)
    if organ == "colon":             # half-moon folds in three rows between wide pockets
        return lambda phi, z: 1.1 - .42 * deep * np.exp(-((z * pace % 1.3 - .65) / .16) ** 2) * (.7 + .3 * np.cos(3 * phi + phase + z))
    if organ == "stomach":           # a wide cave with winding rugae along it
        return lambda phi, z: 1.75 + .3 * np.sin(.8 * z + phase) - .2 * deep * np.abs(np.sin(count * phi + 1.5 * np.sin(2 * z + phase)))
    if organ == "bronchus":          # stiff rings close together, then the carina
        return lambda phi, z: .85 - .05 * deep * np.cos(14 * pace * z) * (1 + np.cos(phi + phase)) - \
            (z > 3.2 * pace) * np.exp(-(np.cos(phi + phase + z / 5) / .18) ** 2)
    # oesophagus: a narrow smooth star, closing and opening in waves
    return lambda phi, z: .78 - .3 * deep * (.5 + .5 * np.cos(1.6 * pace * z + phase)) * (.6 + .4 * np.cos(count * phi + phase))


ORGANS = ("colon", "stomach", "bronchus", "oesophagus")
LESIONS = {"polyp": (.85, .28, .28), "ulcer": (.95, .9, .65), "bleeding": (.45, .02, .02)}               # colours


def march(lumen, x, y, bend, lens, roll, start):
    """Where the rays (x, y, 1) from the lens at depth `start` first leave the lumen: depth, angle, position (H, W) each."""
    planes = np.geomspace(.25, 9, 20, dtype=np.float32)[:, None, None]                                   # (20, 1, 1)
    px, py = (u * planes - np.float32(b) * planes ** 2 + np.float32(c) for u, b, c in zip((x, y), bend, lens))
    gap = np.hypot(px, py) - lumen(np.arctan2(py, px) + np.float32(roll), np.float32(start) + planes)    # (20, H, W)
    gap[-1] = np.abs(gap[-1])                                                                            # a far end, if nothing else
    hit = np.argmax(gap > 0, 0).clip(1)
    before, after = (np.take_along_axis(gap, hit[None] - k, 0)[0] for k in (1, 0))
    share = np.clip(before / (before - after), 0, 1)
    depth = planes.ravel()[hit - 1] * (1 - share) + planes.ravel()[hit] * share
    px, py = (u * depth - b * depth ** 2 + c for u, b, c in zip((x, y), bend, lens))
    return depth, np.arctan2(py, px) + roll, start + depth


def endoscopy(organ, rng):
    """(frames (T, 160, 160, 3) uint8, lesion kind): a flight through a bent, textured tube with the lamp at the lens."""
    count, size, kind = rng.integers(24, 33), 80, rng.choice(["polyp", "ulcer", "bleeding", None], p=[.22, .22, .22, .34])
    tube, spot, reach = wall(organ, rng), (rng.uniform(-np.pi, np.pi), rng.uniform(2, 3.5)), rng.uniform(.25, .45)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    wide, travel, roll = rng.uniform(1., 1.5), rng.choice([-1, 1]) * rng.uniform(.8, 2), rng.uniform(-1, 1, 2)
    bend, sway, swing = rng.normal(0, .04, 2), rng.normal(0, .12, (2, 2)), rng.uniform(0, 6.28, 2)
    flesh = np.array([.8, .42, .34]) * rng.uniform(.8, 1.1) * rng.uniform(.85, 1.15, 3)
    waves = np.round(rng.normal(0, 3, (8, 1))), rng.normal(0, 5, (8, 1)), rng.uniform(0, 6.28, (8, 1))   # whole round the tube
    veins, lamp, wet = rng.uniform(.05, .3), rng.uniform(.2, .6), rng.uniform(.2, .8)

    def distance(phi, z):                                                                                # 1 at the lesion's rim
        return np.hypot(1.1 * ((phi - spot[0] + np.pi) % (2 * np.pi) - np.pi), z - spot[1]) / reach

    def lumen(phi, z):
        return tube(phi, z) - np.float32(reach) * np.exp(-1.5 * distance(phi, z) ** 2) if kind == "polyp" else tube(phi, z)

    frames = []
    for t in np.linspace(0, 1, count):
        start, lens = travel * (t if travel > 0 else t - 1), (sway * np.sin(2 * np.pi * t + swing)).sum(1)
        depth, phi, z = march(lumen, x * wide, y * wide, bend, lens, roll[0] + roll[1] * t, start)
        point = np.stack([x * wide * depth, y * wide * depth, depth], -1)                                # (H, W, 3)
        normal = np.cross(np.gradient(point, axis=1), np.gradient(point, axis=0))
        facing = np.abs((normal * point).sum(-1)) / np.linalg.norm(normal, axis=-1) / np.linalg.norm(point, axis=-1)
        pattern = sum(np.sin(a * phi + b * z + c) for a, b, c in zip(*waves)) / 4                        # thin veins where it is 0
        colour = flesh * (1 - veins * np.exp(-(pattern / .12) ** 2) + .08 * pattern)[..., None] ** [.6, 1.3, 1.3]
        if kind is not None:
            near = distance(phi, z)[..., None]
            colour = colour + .85 * np.exp(-near ** 4) * (np.array(LESIONS[kind]) - colour)
            colour = colour - (kind == "ulcer") * .25 * np.exp(-((near - 1.1) / .25) ** 2) * (0, 1, 1)   # inflamed rim
        shine = wet * np.clip(facing + .04 * pattern, 0, 1) ** 60
        light = ((.25 + .75 * facing) / (1 + (lamp * depth) ** 2) * 1.4)[..., None]
        frame = np.clip((colour + shine[..., None]) * light + rng.normal(0, .012, (size, size, 1)), 0, 1) ** .8
        frame = np.uint8(255 * frame * (np.hypot(x, y) < 1.15)[..., None])
        frames.append(np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)))
    return np.stack(frames), kind


# ---- files -----------------------------------------------------------------------------------------------------------

NAMES = ("ALICE", "BORIS", "CARLA", "DEMIR", "ELENA", "FELIX", "GRETA", "HENRY")


def dicom(path, pixels, patient, *uid, **tags):
    """One 16-bit grey DICOM file; `uid` names (class, study, series, instance), so that the same seed gives the same bytes."""
    ds, sop_class = Dataset(), uid[0]
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid(entropy_srcs=[str(u) for u in uid])
    ds.StudyInstanceUID, ds.SeriesInstanceUID = (generate_uid(entropy_srcs=[str(u) for u in uid[:k]]) for k in (2, 3))
    ds.PatientID, ds.PatientName = patient, f"PHANTOM^{NAMES[sum(patient.encode()) % len(NAMES)]}"
    ds.PatientBirthDate, ds.PatientSex, ds.StudyDate, ds.StudyTime = "19700101", "O", "20250101", "120000"
    ds.InstitutionName, ds.Manufacturer = "PHANTOM HOSPITAL", "PHANTOM"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 0, 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)


def write_series(folder, image, voxel, patient, key, rng):
    """One CT series (W, H, S) in HU: a file a slice, named in random order, stacked up- or downwards."""
    folder.mkdir(exist_ok=True)
    up, corner = rng.choice([-1, 1]), rng.uniform(-200, 0, 3)
    names = rng.permutation(image.shape[2])
    for k, name in enumerate(names):
        number = int(k if up > 0 else image.shape[2] - 1 - k) + 1
        position = corner + (0, 0, k * voxel[2])
        dicom(folder / f"IM{name:05d}", image[:, :, k].T + 1024, patient, CTImageStorage, key, "series", k, Modality="CT",
              InstanceNumber=number, ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[f"{p:.4f}" for p in position],
              PixelSpacing=[f"{voxel[1]:.5f}", f"{voxel[0]:.5f}"], SliceThickness=f"{voxel[2]:.4f}", RescaleSlope=1,
              RescaleIntercept=-1024, RescaleType="HU", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], FrameOfReferenceUID=generate_uid(entropy_srcs=[key]))


def write_nifti(path, image, voxel, rng):
    """A volume (W, H, S), LPS order, stored in one of many axis orders with the affine that undoes it."""
    scan = nib.Nifti1Image(image, np.diag([-voxel[0], -voxel[1], voxel[2], 1]))
    codes = rng.choice(["LPS", "RAS", "LAS", "PIR", "ASL", "SRA", "RSP"])
    order = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(codes))
    path.write_bytes(gzip.compress(scan.as_reoriented(order).to_bytes(), compresslevel=1, mtime=0))


def write_xray(path, image, patient, key, rng):
    """A digital X-ray, one in three stored with dense = low, all with a display window."""
    low, high = np.percentile(image, [2, 99.5]) * rng.uniform(.9, 1.1, 2)
    flip = rng.random() < 1 / 3
    centre = 4095 - (low + high) / 2 if flip else (low + high) / 2
    dicom(path, 4095 - image if flip else image, patient, DigitalXRayImageStorageForPresentation, key, "series", 0,
          Modality=str(rng.choice(["DX", "CR"])), PhotometricInterpretation="MONOCHROME1" if flip else "MONOCHROME2",
          WindowCenter=f"{centre:.1f}", WindowWidth=f"{high - low:.1f}", PixelIntensityRelationship="LOG",
          PixelIntensityRelationshipSign=-1, PresentationIntentType="FOR PRESENTATION", ImageType=["ORIGINAL", "PRIMARY"])


def write_sample(folder, modality, number, split, seed):
    """Make and write patient `number` of a modality; returns its row of labels.csv."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality), number])
    patient, path = f"{modality}-{number:04d}", folder / modality / f"{number:04d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    choices = {"ultrasound": ECHO_PARTS, "endoscopy": ORGANS}.get(modality, tuple(PARTS))
    part = choices[number % len(choices)]
    made = {"xray": xray, "ultrasound": ultrasound, "endoscopy": endoscopy, "ct": ct, "mri": mri}[modality](part, rng)
    key = f"{seed} {patient}"
    if modality == "xray":
        path = path.with_suffix(".dcm")
        write_xray(path, made[0], patient, key, rng)
    elif modality == "ultrasound":
        path = path.with_suffix(".png")
        Image.fromarray(made[0]).save(path)
    elif modality == "endoscopy":
        path = path.with_suffix(".avi")
        iio.imwrite(path, made[0], plugin="pyav", codec="mjpeg", fps=25, out_pixel_format="yuvj420p")
    elif modality == "ct" and number // len(choices) % 2:
        write_series(path, *made[:2], patient, key, rng)
    else:
        path = path.with_suffix(".nii.gz")
        write_nifti(path, *made[:2], rng)
    labels = ["part:" + getattr(part, "__name__", part)] + [f"lesion:{made[-1]}"] * (made[-1] is not None)
    return path.relative_to(folder).as_posix(), "|".join(labels), patient, split, modality


def write_demo(folder, n=80, seed=0):
    """Write n training and ceil(.6 n) test patients per modality (MRI: test only) and labels.csv under `folder`.

    Every sample has its own patient and its own random numbers, so more patients never change the first ones.
    """
    folder, test = Path(folder), -(-3 * n // 5)
    jobs = [(folder, modality, number, "test" if number >= n else "train", seed)
            for modality in MODALITIES for number in range(n if modality == "mri" else 0, n + test)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write_sample, *zip(*jobs), chunksize=4))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "patient", "split", "modality"), *rows])


if __name__ == "__main__":
    write_demo(sys.argv[1])
