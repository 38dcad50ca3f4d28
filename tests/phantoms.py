"""Labelled phantoms in five modalities, written as the files a hospital would send.

In: a folder, a size n, a seed. Out: n training and .8 n test patients per modality (MRI: test only), one sample each:
  ct          (96-128)^2 x 24-48 HU volume   .nii.gz in many axis orders, or a folder of DICOM slices
  xray        attenuation projection         12-bit DICOM, one third MONOCHROME1
  mri         T1, T2 or PD contrast          .nii.gz, never trained on
  ultrasound  speckled sector with shadows   .png, grey
  endoscopy   24-28 frames through a tube    .avi, RGB
and labels.csv (path,labels,patient,split,modality) with `part:<body part>` and, for two in three, `lesion:<kind>`.
A body is a list of implicit shapes; a modality is a column of TISSUES and a way to look at the shapes.
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
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRBigEndian,
                         ExplicitVRLittleEndian, generate_uid)

MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
TISSUES = {         # CT in HU; MRI as T1, T2, PD; ultrasound echo and attenuation per mm
    "air":           (-1000, .00, .00, .00, .00, .000),
    "gas":           (-950, .00, .00, .00, .90, .040),
    "lung":          (-830, .08, .10, .12, .80, .040),
    "fat":           (-100, 1.0, .75, .80, .40, .002),
    "muscle":        (55, .42, .22, .55, .25, .004),
    "organ":         (110, .55, .38, .65, .45, .004),
    "kidney":        (200, .40, .62, .70, .20, .003),
    "brain":         (60, .62, .50, .80, .30, .004),
    "vessel":        (190, .10, .12, .20, .02, .001),
    "fluid":         (5, .12, 1.0, .90, .01, .000),
    "cartilage":     (110, .45, .45, .75, .12, .006),
    "bone":          (900, .04, .04, .06, 1.0, .060),
    "marrow":        (280, .85, .55, .60, .30, .040),
    "nodule":        (260, .75, .80, .85, .10, .006),
    "cyst":          (-180, .08, 1.0, .95, .00, .000),
    "calcification": (1200, .02, .02, .03, 1.3, .150),
}


class Shape(NamedTuple):
    """A tissue inside a surface; distance((x, y, z)) is about the signed distance in mm, negative inside."""
    tissue: str
    low: np.ndarray                   # (3,) corners of a box that holds the shape; x to the left, y to the back, z up
    high: np.ndarray
    distance: Callable


# ---- shapes ----------------------------------------------------------------------------------------------------------

def ball(tissue, centre, radii, power=2, turn=0):
    """Ellipsoid, boxier with a higher power, turned about the vertical by degrees."""
    centre, radii = np.float32(centre), np.float32(np.broadcast_to(radii, 3))
    cos, sin = np.cos(np.radians(turn), dtype=np.float32), np.sin(np.radians(turn), dtype=np.float32)
    reach = radii if turn == 0 else np.float32([radii[:2].max(), radii[:2].max(), radii[2]])

    def distance(points):
        x, y, z = (p - c for p, c in zip(points, centre))
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
        d = [p - s for p, s in zip(points, start)]
        t = np.clip(sum(a * b for a, b in zip(d, axis)) / np.float32(axis @ axis), 0, 1)
        return np.sqrt(sum((a - t * b) ** 2 for a, b in zip(d, axis))) - radius - taper * t
    return Shape(tissue, np.minimum(start, end) - thick, np.maximum(start, end) + thick, distance)


def wire(tissue, points, radius):
    return [rod(tissue, a, b, radius) for a, b in zip(points, points[1:])]


def layer(shape, tissue, depth):
    """What lies `depth` mm below the surface of a shape (above it, if negative)."""
    grow = min(depth, 0)
    return Shape(tissue, shape.low + grow, shape.high - grow, lambda points: shape.distance(points) + depth)


def bones(*shapes, wall=3.5):
    """Cortical shells first, then all the marrow, so that joined shafts share one cavity."""
    return [layer(s, "bone", 0) for s in shapes] + [layer(s, "marrow", wall) for s in shapes]


def both(*shapes):
    """The left ones and their mirror images on the right."""
    flip = np.float32([-1, 1, 1])
    return [*shapes, *(Shape(s.tissue, np.minimum(s.low * flip, s.high * flip), np.maximum(s.low * flip, s.high * flip),
                             lambda p, s=s: s.distance((-p[0], p[1], p[2]))) for s in shapes)]


def ribs(centre, radii, gap, low, high):
    """Slanted bands on an ellipsoid: they fall towards the front, as ribs do."""
    cage = ball("bone", centre, radii)

    def distance(points):
        band = np.abs((points[2] - .5 * points[1]) / gap % 1 - .5) * gap - gap * .2
        return np.maximum.reduce([np.abs(cage.distance(points)) - 3.5, band, points[2] - high, low - points[2]])
    return Shape("bone", cage.low - 5, cage.high + 5, distance)


def spine(y, low, high, radius, gap):
    """Vertebrae with processes, discs between them, the canal behind."""
    back, shapes = y + radius * 1.2, [rod("cartilage", (0, y, low), (0, y, high), radius * .9)]
    for z in np.arange(low, high, gap):
        shapes += bones(ball("bone", (0, y, z), (radius, radius * .8, gap * .4), 4), wall=2.5)
        shapes += [rod("bone", (0, back, z), (0, y + radius * 2.6, z - gap * .4), radius * .2)]
        shapes += both(rod("bone", (radius * .6, back, z), (radius * 2, y + radius * 1.5, z), radius * .25))
    return shapes + [rod("fluid", (0, back, low), (0, back, high), radius * .4)]


def tree(rng, tissue, start, direction, length, radius, forks):
    """A vessel that forks again and again."""
    end = start + direction * length
    shapes = [rod(tissue, start, end, radius, radius * .75)]
    for _ in range(2 if forks else 0):
        turned = direction + rng.normal(0, .5, 3)
        shapes += tree(rng, tissue, end, turned / np.linalg.norm(turned), length * .8, radius * .7, forks - 1)
    return shapes


def bowel(rng, centre, spread, loops):
    """Random loops of gut, filled with gas, fluid or food."""
    shapes = []
    for _ in range(loops):
        path = np.array(centre) + np.cumsum(rng.normal(0, 18, (4, 3)), 0) + rng.uniform(-1, 1, 3) * spread
        shapes += wire("muscle", path, 14) + wire(str(rng.choice(["gas", "fluid", "organ"])), path, 10)
    return shapes


# ---- body parts: random proportions in mm, drawn from the skin inwards ----------------------------------------------

def head(rng):
    skull, width = ball("bone", (0, 0, 20), np.array([72, 90, 76]) * rng.uniform(.92, 1.08, 3)), rng.uniform(5, 12)
    jaw = wire("bone", [(0, -76, -97), (18, -74, -96), (46, -15, -82), (50, -5, -45)], 8)
    return [
        layer(skull, "fat", -6), ball("muscle", (0, -32, -48), (60, 60, 62), 3),
        rod("muscle", (0, 25, -40), (0, 32, -150), 54), ball("muscle", (0, -96, -32), (12, 18, 20)),
        *spine(24, -140, -50, 16, 19), *both(*jaw), *bones(ball("bone", (0, -66, -52), (30, 24, 20))),
        *both(rod("bone", (60, -45, -22), (40, -80, -26), 6)), skull, layer(skull, "fluid", rng.uniform(6, 9)),
        layer(skull, "brain", rng.uniform(10, 12)), ball("bone", (0, -30, -42), (45, 40, 7)),
        ball("brain", (0, 48, -30), (45, 32, 25)),
        *both(*wire("fluid", [(9, -35, 32), (11, 5, 42), (20, 35, 25)], width),
              ball("fat", (33, -72, -6), (20, 24, 18)), ball("fluid", (33, -80, -6), 12),
              ball("gas", (29, -62, -38), (14, 18, 15))), ball("gas", (0, -62, -34), (9, 32, 20)),
        rod("gas", (0, -18, -50), (0, -14, -140), 9)]


def neck(rng):
    skin = ball("fat", (0, 0, -20), np.array([62, 62, 420]) * rng.uniform(.9, 1.1, 3))
    shoulders = ball("fat", (0, 10, -165), (190, 75, 90))
    jaw = wire("bone", [(0, -64, 61), (16, -62, 62), (45, -10, 72), (48, -5, 100)], 8)
    return [
        skin, shoulders, layer(skin, "muscle", rng.uniform(4, 10)), layer(shoulders, "muscle", 10),
        *both(rod("fat", (40, 5, 90), (34, 5, -140), 9)), *spine(16, -190, 150, 15, 20),
        *both(rod("vessel", (28, -8, 120), (24, -8, -180), 5),
              rod("vessel", (38, -2, 120), (32, -6, -180), rng.uniform(5, 9)),
              ball("organ", (17, -26, -30), np.array([12, 12, 26]) * rng.uniform(.8, 1.4)), *jaw),
        rod("bone", (0, -30, 35), (0, -28, 5), 16), rod("gas", (0, -30, 36), (0, -28, 4), 13),
        rod("cartilage", (0, -26, 0), (0, -8, -190), 12), rod("gas", (0, -18, 110), (0, -28, 20), 9),
        rod("gas", (0, -27, 20), (0, -8, -190), 9), rod("muscle", (0, -4, -20), (3, 0, -190), 8),
        *both(*wire("bone", [(0, -42, 40), (20, -20, 42)], 4), rod("bone", (8, -40, -120), (130, -10, -95), 7),
              ball("lung", (48, 10, -190), (40, 40, 75)))]


def chest(rng):
    wide, deep, heart = *rng.uniform(.9, 1.1, 2), rng.uniform(.85, 1.25)
    skin = ball("fat", (0, 0, -20), (178 * wide, 118 * deep, 330), 3)
    breast = ball("fat", (82, -108 * deep, -20), (62, 36, 55))
    return [
        skin, *(both(breast) if rng.random() < .5 else []), *both(ball("fat", (165, 10, 140), (62, 55, 90))),
        layer(skin, "muscle", rng.uniform(10, 22)), *both(ball("muscle", (165, 10, 140), (50, 44, 80))),
        ribs((0, 0, 10), (146 * wide, 98 * deep, 205), 29, -140, 170),
        *both(ball("lung", (72 * wide, 2, 12), (62 * wide, 86 * deep, 150), 2.5)),
        *both(*tree(rng, "vessel", np.array([30., 10, 15]), np.array([.9, 0, -.3]), 34, 7, 4)),
        ball("muscle", (0, 0, 40), (30, 70, 160)), ball("organ", (-72, 0, -150), (95, 90, 95)),
        ball("organ", (80, 5, -165), (85, 85, 88)), ball("gas", (70, -35, -115), (28, 25, 18)),
        ball("muscle", (26, -32, -45), np.array([66, 52, 66]) * heart),
        ball("vessel", (34, -30, -50), np.array([36, 28, 40]) * heart), *spine(72, -210, 200, 19, 26),
        *wire("vessel", [(5, -20, -10), (0, -22, 65), (20, 20, 82), (24, 48, 60), (20, 48, -210)], rng.uniform(10, 15)),
        rod("gas", (0, 5, 200), (0, 18, 62), 9), *both(rod("gas", (0, 18, 62), (42, 15, 22), 7)),
        *bones(ball("bone", (0, -94 * deep, 40), (18, 7, 85)),
               *both(*wire("bone", [(14, -80, 128), (70, -75, 150), (150, -10, 160)], 7))),
        *both(ball("bone", (104, 84, 70), (46, 5, 62), turn=-30)),
        *bones(*both(ball("bone", (172, 10, 135), 24), rod("bone", (174, 10, 130), (178, 10, 90), 12)))]


def abdomen(rng):
    wide, deep, fat = *rng.uniform(.9, 1.1, 2), rng.uniform(6, 30)
    skin = ball("fat", (0, 0, 0), (172 * wide, 118 * deep, 420), 3)
    colon = [(-118, 10, -120), (-116, 5, -5), (-90, -60, 15), (0, -78, -20), (95, -55, 30), (120, 15, 20),
             (116, 20, -130)]
    gas = [ball("gas", np.array(colon[i]) + rng.normal(0, 9, 3), rng.uniform(8, 17, 3)) for i in rng.integers(0, 7, 7)]
    return [
        skin, layer(skin, "muscle", fat), layer(skin, "fat", fat + 14),
        *both(rod("muscle", (34, 55, 60), (62, 35, -190), 20), ball("muscle", (45, 92, 0), (38, 22, 300))),
        *spine(62, -170, 200, 23, 34), ribs((0, 0, 60), (148 * wide, 100 * deep, 230), 30, 40, 210),
        ball("organ", (-66, -12, 85), np.array([82, 78, 78]) * rng.uniform(.85, 1.15, 3)),
        ball("fluid", (-50, -55, 40), (16, 18, 24)),
        ball("organ", (100, 35, 85), np.array([30, 45, 48]) * rng.uniform(.8, 1.3)),
        *tree(rng, "vessel", np.array([-20., 0, 60]), np.array([-.9, 0, .4]), 34, 6, 2),
        ball("muscle", (50, -40, 80), (56, 40, 44)), ball("gas", (54, -58, 88), rng.uniform(14, 32, 3)),
        *both(ball("kidney", (72, 48, 8), (29, 26, 54)), ball("fat", (60, 44, 8), (14, 12, 24))),
        rod("vessel", (8, 28, 200), (5, 30, -80), 11), rod("vessel", (-18, 26, 200), (-14, 30, -80), 11),
        *wire("muscle", colon, 23), *wire("organ", colon, 19), *gas, *bowel(rng, (0, -45, -75), (70, 20, 55), 9),
        *bones(*both(ball("bone", (105, 45, -175), (58, 10, 62), turn=-40)))]


def pelvis(rng):
    wide, deep, fat = *rng.uniform(.9, 1.1, 2), rng.uniform(8, 26)
    skin = ball("fat", (0, 0, 110), (186 * wide, 118 * deep, 235), 3)
    leg = rod("fat", (92, 5, -55), (98, 5, -260), 92, 84)
    crest = wire("bone", [(30, 62, 95), (74, 56, 138), (122, 14, 132), (136, -22, 92), (112, -26, 30), (90, -4, 8)], 8)
    ring = [rod("bone", (82, -8, -14), (12, -56, -42), 9), rod("bone", (80, 18, -20), (56, 20, -88), 13),
            rod("bone", (56, 15, -88), (12, -50, -58), 8)]
    femur = [ball("bone", (92, 0, -12), 25), rod("bone", (92, 0, -12), (132, 6, -48), 15),
             rod("bone", (134, 8, -44), (116, 2, -280), 19, 16)]
    return [
        skin, *both(leg), layer(skin, "muscle", fat), *both(layer(leg, "muscle", fat)),
        ball("fat", (0, -15, 75), (105, 75, 120)), *bowel(rng, (0, -25, 80), (70, 25, 45), 8),
        *both(rod("fat", (30, 80, -40), (60, 85, 60), 10)),
        *bones(*both(ball("bone", (84, 28, 72), (64, 9, 68), turn=-42), ball("bone", (86, 2, -8), 34), *ring)),
        *bones(*both(*crest)), *bones(ball("bone", (0, 66, 62), (52, 16, 55)), ball("bone", (0, 74, 10), (22, 9, 30))),
        *spine(52, 112, 300, 24, 35), *both(ball("cartilage", (92, 0, -12), 28)), *bones(*both(*femur)),
        ball("fluid", (0, -25, -10), np.array([38, 32, 30]) * rng.uniform(.6, 1.3, 3)),
        rod("muscle", (0, 42, 50), (0, 45, -60), 17), ball("gas", (0, 42, rng.uniform(-30, 40)), rng.uniform(8, 14)),
        ball("organ", (0, -2, -45), (22, 18, 18)),
        *both(*wire("vessel", [(8, 25, 170), (55, -25, 40), (75, -58, -50), (80, -40, -260)], 7))]


def knee(rng):
    leg, fat = rod("fat", (0, 5, 190), (0, 12, -190), rng.uniform(58, 72), rng.uniform(48, 58)), rng.uniform(5, 15)
    side, size = rng.choice([-1, 1]), rng.uniform(.9, 1.1)
    return [
        leg, layer(leg, "muscle", fat), ball("fat", (0, 35, 10), (26, 18, 60)), ball("fat", (0, -40, 0), (28, 16, 36)),
        *both(rod("fat", (30, 10, 120), (26, 22, -150), 5)), ball("fluid", (0, -34, 46), (24, rng.uniform(3, 9), 26)),
        ball("cartilage", (0, 2, 0), (42, 30, 12), 3), rod("cartilage", (0, -46, 40), (0, -36, -40), 5),
        rod("vessel", (4, 38, 190), (0, 36, -190), 5),
        *bones(rod("bone", (0, -6, 220), (0, -4, 60), 16 * size), rod("bone", (0, -4, 70), (0, -2, 30), 17, 32 * size),
               *both(ball("bone", (22, 4, 26), np.array([22, 30, 24]) * size))),
        *bones(ball("bone", (0, 0, -22), np.array([43, 29, 17]) * size, 3),
               rod("bone", (0, 0, -28), (2, 0, -75), 33 * size, 17), rod("bone", (2, 0, -70), (4, 2, -220), 17, 14),
               ball("bone", (0, -26, -48), (10, 8, 14))),
        *bones(rod("bone", (side * 38, 18, -34), (side * 36, 20, -220), 7), ball("bone", (side * 38, 18, -34), 11),
               wall=2.5), *bones(ball("bone", (0, -44 * size, 26), np.array([20, 10, 21]) * size))]


def foot(rng):
    wide, fat, toes = rng.uniform(.85, 1.15), rng.uniform(3, 8), [(13. * s, abs(s - 1), s == 2) for s in range(-2, 3)]
    skin = [rod("fat", (0, 36, 250), (0, 42, 0), 46, 38), ball("fat", (0, 62, -34), (34, 40, 32)),
            rod("fat", (0, 45, -20), (0, -45, -42), 36, 28), ball("fat", (0, -75, -48), (50 * wide, 62, 18), 2.5)]
    frame = [rod("bone", (4, 32, 250), (3, 34, 30), 14, 19), rod("bone", (-24, 44, 250), (-25, 44, 8), 7, 9),
             ball("bone", (2, 28, 8), (19, 28, 14)), ball("bone", (0, 60, -26), (16, 36, 18), 2.5),
             ball("bone", (8, -6, -4), (16, 10, 14)), ball("bone", (-14, -6, -22), (13, 18, 12)),
             *[ball("bone", (x, -26, -14), (8, 11, 10)) for x in (-1, 11, 22)]]
    for x, short, big in toes:
        knuckle, tip = (x * wide, 5 * short - 97, -51), (x * wide * 1.1, 6 * short - 136, -54)
        frame += [rod("bone", (x * .8, -38, x / 4 - 24), knuckle, 5.5 + 3 * big)]
        frame += [rod("bone", knuckle, tip, 4.5 + 3 * big)]
        skin += [rod("fat", knuckle, tip, 10 + 2 * big)]
    return [*skin, *[layer(s, "muscle", fat) for s in skin], rod("muscle", (0, 76, 150), (0, 84, -20), 6),
            *bones(*frame, wall=2.5)]


PARTS = {head: 270, neck: 210, chest: 430, abdomen: 390, pelvis: 410, knee: 170, foot: 270}       # field of view, mm
ECHO_PARTS = (neck, abdomen, pelvis, knee)
HOSTS = ("lung", "organ", "brain", "kidney", "muscle", "marrow")                                  # where lesions grow


def body(part, rng):
    """(shapes, lesion kind or None, lesion centre or None) of one patient."""
    shapes, size = part(rng), PARTS[part] * rng.uniform(.02, .06)
    if rng.random() < 1 / 3:
        return shapes, None, None
    kind = str(rng.choice(["nodule", "cyst", "calcification"]))
    hosts = [s for s in shapes if s.tissue in HOSTS and (s.high - s.low).min() > 24
             and np.abs(s.low + s.high).max() / 2 < .3 * PARTS[part]]
    host = hosts[rng.integers(len(hosts))]
    reach = np.minimum(host.high - host.low, .5 * PARTS[part])
    centre = (host.low + host.high) / 2 + reach * rng.uniform(-.22, .22, 3)
    if kind == "calcification":
        crumbs = [ball(kind, centre + rng.normal(0, size / 2, 3), size * rng.uniform(.15, .4)) for _ in range(6)]
        return shapes + crumbs, kind, centre
    return [*shapes, ball(kind, centre, size * rng.uniform(.8, 1.25, 3))], kind, centre


# ---- looking at a body -----------------------------------------------------------------------------------------------

def lattice(shape, extent, rng, turn):
    """Points (3, *shape) mm on a box of `extent` mm around a patient who lies turned, off centre, near or far."""
    axes = [np.linspace(-.5, .5, k, dtype=np.float32) * np.float32(e) for k, e in zip(shape, extent)]
    points = np.stack(np.meshgrid(*axes, indexing="ij")) / np.float32(rng.uniform(.65, 1.35))
    for axis, (cos, sin) in enumerate(zip(np.cos(np.radians(turn)).tolist(), np.sin(np.radians(turn)).tolist())):
        one, two = points[axis - 2].copy(), points[axis - 1].copy()                               # the plane of x, y, z
        points[axis - 2], points[axis - 1] = cos * one - sin * two, sin * one + cos * two
    return points + np.float32(rng.uniform(-.18, .18, 3) * extent).reshape(3, 1, 1, 1)


def warp(points, rng, size):
    """Bend (3, ...) points by two random waves, so that no two organs have the same outline."""
    for _ in range(2):
        wave, push = rng.normal(0, .8, 3) * 2 * np.pi / size, np.float32(rng.normal(0, .017, 3) * size)
        phase = sum(np.float32(w) * p for w, p in zip(wave, points)) + np.float32(rng.uniform(0, 6.28))
        points = points + push.reshape(3, *[1] * phase.ndim) * np.sin(phase)
    return points


def paint(shapes, points, value, edge):
    """Draw shapes in order, with soft edges of `edge` mm: points (3, X, Y, Z), {tissue: value} -> (X, Y, Z) float32."""
    image, step = np.full(points.shape[1:], value["air"], np.float32), 4
    coarse = points[:, ::step, ::step, ::step]
    strides = [np.abs(np.diff(points, axis=a)).max((1, 2, 3), initial=0) for a in (1, 2, 3)]
    margin = edge / 2 + sum(strides) * (step - 1)                 # no point is further than this from its coarse corner
    for shape in shapes:
        near = np.all((coarse.T > shape.low - margin) & (coarse.T < shape.high + margin), -1).T
        if near.any():                                            # most shapes are small: look only where they can be
            box = tuple(slice(i.min() * step, (i.max() + 1) * step) for i in np.nonzero(near))
            inner = np.clip(.5 - shape.distance(points[(slice(None), *box)]) / np.float32(edge), 0, 1)
            image[box] += inner * (np.float32(value[shape.tissue]) - image[box])
    return image


def table(column, rng, spread):
    """One column of TISSUES, every value moved a little: no tissue looks alike in two patients."""
    return {tissue: row[column] + spread * rng.normal() * (tissue not in ("air", "gas", "lung"))
            for tissue, row in TISSUES.items()}


def volume(part, rng, column, spread):
    """A scan: values (W, H, S) float32 along patient left, back, up; voxel size (3,) mm; lesion kind."""
    shapes, kind, _ = body(part, rng)
    shape = np.array([1, 1, 0]) * rng.choice([96, 112, 128]) + (0, 0, rng.integers(24, 49))
    extent = PARTS[part] * np.array([1, 1, rng.uniform(.5, .9)])
    points = warp(lattice(shape, extent, rng, rng.uniform(-1, 1, 3) * (8, 8, 20)), rng, PARTS[part])
    return paint(shapes, points, table(column, rng, spread), extent[0] / shape[0]), extent / shape, kind


def ct(part, rng):
    """HU (W, H, S) int16 with streaky noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, 0, 20)
    noise = rng.normal(0, rng.uniform(15, 50), image.shape)
    image += (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.round(image).clip(-1024, 3071).astype(np.int16), voxel, kind


def mri(part, rng):
    """T1, T2 or PD (W, H, S) int16 in scanner units with a coil profile and Rician noise, voxel size, lesion kind."""
    image, voxel, kind = volume(part, rng, rng.integers(1, 4), .06)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, k) for k in image.shape], indexing="ij"))
    gain = np.tensordot(rng.normal(0, .25, 3), grid, 1) - np.tensordot(rng.uniform(0, .3, 3), grid ** 2, 1)
    noise = rng.normal(0, rng.uniform(.01, .05), (2, *image.shape))
    return (np.hypot(image * np.exp(gain) + noise[0], noise[1]) * rng.uniform(300, 3000)).astype(np.int16), voxel, kind


def xray(part, rng):
    """12-bit picture (H, W) uint16, dense is bright; None; lesion kind: log of Beer-Lambert with photon noise."""
    shapes, kind, _ = body(part, rng)
    view = rng.choice([0, 0, 0, 180, 40, -40, 90, -90]) + rng.uniform(-12, 12)                    # frontal to lateral
    shape, size = (rng.integers(96, 129), 64, 128), PARTS[part]                                   # left, back, up
    extent = size * np.array([shape[0] / 128, 1.15, 1])
    points = warp(lattice(shape, extent, rng, (rng.uniform(-8, 8), rng.uniform(-20, 20), view)), rng, size)
    hu = paint(shapes, points, table(0, rng, 20), size / 80)
    density = np.clip(1 + hu / 1000, 0, None) + .9 * np.clip(hu / 1000 - .15, 0, None)            # bone stops soft rays
    line = density.mean(1).T[::-1] * 1.15 * 4.5                                                   # (H, W), head up
    line = -np.log(rng.poisson(rng.uniform(2e3, 2e4) * np.exp(-line)) + 1.)
    line = (line - line.min()) / np.ptp(line)
    return np.round(line * rng.uniform(2500, 4000)).astype(np.uint16), None, kind


def aim(shapes, target, size, rng):
    """Put a probe on the skin: its place (3,), the unit vectors out of the body and across the picture, skin depth."""
    side, tip = np.radians(rng.uniform(-12, 12)), np.radians(rng.uniform(-8, 8))
    out = np.array([np.sin(side) * np.cos(tip), -np.cos(side) * np.cos(tip), np.sin(tip)])
    level, tilt = np.cross(out, (0, 0, 1)), np.radians(rng.uniform(-10, 10)) + np.pi * rng.integers(2)
    across = np.cos(tilt) * level + np.sin(tilt) * np.cross(out, level)                           # from left or right
    steps = np.linspace(0, size, 128)
    ray = np.float32(target[:, None] + out[:, None] * steps).reshape(3, 128, 1, 1)
    solid = paint(shapes, ray, {tissue: float(tissue != "air") for tissue in TISSUES}, 2).ravel()
    skin = steps[np.flatnonzero(solid > .5).max(initial=0)]
    return target + out * skin, out, across / np.linalg.norm(across), skin


def ultrasound(part, rng):
    """Sector picture (160, 192) uint8, None, lesion kind: the probe looks at a lesion, or about the middle."""
    (shapes, kind, target), size = body(part, rng), PARTS[part]
    target = rng.uniform(-.06, .06, 3) * size + (0 if target is None else .25 * target)
    probe, out, across, skin = aim(shapes, target, size, rng)
    depth, half = skin + size * rng.uniform(.2, .3), np.radians(rng.uniform(33, 37))
    near = depth * rng.uniform(.18, .22)                                                          # a curved probe face
    angle, length = np.linspace(-half, half, 160)[:, None], near + np.linspace(0, depth, 224)
    down, aside = np.cos(angle) * length - near, np.sin(angle) * length                           # (160, 224) each
    points = probe[:, None, None] - out[:, None, None] * down + across[:, None, None] * aside     # (3, 160, 224)
    points = warp(np.float32(points)[..., None], rng, size)
    echo, loss = table(4, rng, .03), table(5, rng, 0)
    echo["air"], loss["air"] = echo["muscle"] / 2, 0.                                             # gel around the skin
    echo, loss = (paint(shapes, points, value, depth / 150)[..., 0] for value in (echo, loss))    # (160, 224) each
    edges = sum(gain * np.abs(np.diff(a, axis=1, prepend=a[:, :1])) for gain, a in ((1, echo), (2, loss)))
    speckle = rng.rayleigh(.8, echo.shape)
    speckle = (speckle + np.roll(speckle, 1, 0) + np.roll(speckle, 2, 0)) / 3                     # as wide as the beam
    passed = np.exp(-2 * np.cumsum(loss, 1) * depth / 224)                                        # shadow behind bone
    signal = (np.clip(echo, .004, None) * speckle + 1.2 * edges) * passed
    signal = np.clip(1 + np.log10(signal + 1e-4) / rng.uniform(1.8, 2), 0, 1) ** rng.uniform(.9, 1.1)
    low, (y, x) = near * np.cos(half), np.mgrid[:160, :192]
    zoom, left, top = (near + depth - low) / 156 * rng.uniform(.7, 1.3), *rng.uniform(-1, 1, 2) * (48, 36)
    y, x = (y - top) * zoom + low, (x - 95.5 - left) * zoom                                       # mm from the tip
    row, column = (np.arctan2(x, y) / half + 1) * 79.5, (np.hypot(x, y) - near) / depth * 223
    seen = (row >= 0) & (row <= 159) & (column >= 0) & (column <= 223)
    picture = signal[row.clip(0, 159).round().astype(int), column.clip(0, 223).round().astype(int)] * seen
    return np.uint8(picture * 255), None, kind


# ---- endoscopy: flying through a tube of about radius 1 --------------------------------------------------------------

ORGANS = ("colon", "stomach", "bronchus", "oesophagus")
FINDINGS = {"polyp": (.85, .28, .28), "ulcer": (.95, .9, .65), "bleeding": (.45, .02, .02)}       # colours


def tube(organ, rng):
    """radius(angle, depth) of the organ's lumen."""
    shift, folds, deep, pace = rng.uniform(0, 6.28), int(rng.integers(4, 8)), rng.uniform(.7, 1.3), rng.uniform(.8, 1.2)

    def colon(phi, z):                # half-moon folds in three rows between wide pockets
        pocket = z * pace / 1.3 - np.floor(z * pace / 1.3) - .5
        return 1.1 - .42 * deep * np.exp(-(8 * pocket) ** 2) * (.7 + .3 * np.cos(3 * phi + shift + z))

    def stomach(phi, z):              # a wide cave with rugae winding along it
        return 1.75 + .3 * np.sin(.8 * z + shift) - .2 * deep * np.abs(np.sin(folds * phi + 1.5 * np.sin(2 * z)))

    def bronchus(phi, z):             # stiff rings close together, then the carina
        rings = .08 * deep * np.cos(14 * pace * z) * (1 + np.cos(phi + shift))
        return .85 - rings - (z > 3.2 * pace) * np.exp(-(np.cos(phi + shift + z / 5) / .18) ** 2)

    def oesophagus(phi, z):           # a narrow star, closing and opening in waves
        return .78 - .3 * deep * (.5 + .5 * np.cos(1.6 * pace * z + shift)) * (.6 + .4 * np.cos(folds * phi + shift))
    return {"colon": colon, "stomach": stomach, "bronchus": bronchus, "oesophagus": oesophagus}[organ]


def angle(y, x):
    """arctan2 to .004 radians, five times as fast."""
    a = np.minimum(np.abs(x), np.abs(y)) / (np.maximum(np.abs(x), np.abs(y)) + np.float32(1e-9))
    a = a * (np.float32(np.pi / 4 + .273) - np.float32(.273) * a)
    a = np.where(np.abs(y) > np.abs(x), np.float32(np.pi / 2) - a, a)
    return np.copysign(np.where(x < 0, np.float32(np.pi) - a, a), y)


def march(lumen, x, y, bend, lens, roll, start):
    """Where the rays (x, y, 1) from the lens at depth `start` leave the lumen: distance, angle, depth, each (H, W)."""
    planes = np.geomspace(.25, 9, 20, dtype=np.float32)[:, None, None]                            # (20, 1, 1)
    px, py = (u * planes - b * planes ** 2 + c for u, b, c in zip((x, y), bend, lens))
    gap = np.sqrt(px * px + py * py) - lumen(angle(py, px) + roll, start + planes)                # (20, H, W)
    gap[-1] = np.abs(gap[-1])                                                                     # the end of the world
    hit = np.argmax(gap > 0, 0).clip(1)
    before, after = (np.take_along_axis(gap, hit[None] - k, 0)[0] for k in (1, 0))
    share, planes = np.clip(before / (before - after), 0, 1), planes.ravel()
    far = planes[hit - 1] * (1 - share) + planes[hit] * share
    px, py = (u * far - b * far ** 2 + c for u, b, c in zip((x, y), bend, lens))
    return far, angle(py, px) + roll, start + far


def shade(x, y, far, colour, relief, lamp, wet):
    """Light a wall (H, W) from the lens: surfaces that face it shine, distant ones fade. -> (H, W, 3)"""
    point = np.stack([x * far, y * far, far], -1)                                                 # (H, W, 3)
    normal = np.cross(np.gradient(point, axis=1), np.gradient(point, axis=0))
    facing = np.abs((normal * point).sum(-1)) / np.linalg.norm(normal, axis=-1) / np.linalg.norm(point, axis=-1)
    shine = wet * np.clip(facing + .04 * relief, 0, 1) ** 60
    return (colour + shine[..., None]) * ((.25 + .75 * facing) / (1 + (lamp * far) ** 2) * 1.4)[..., None]


def endoscopy(organ, rng):
    """Frames (T, 160, 160, 3) uint8, None, finding: in or out through a bent, veined tube."""
    count, kind = rng.integers(24, 29), rng.choice([*FINDINGS, None])
    wall, spot, reach = tube(organ, rng), (rng.uniform(-np.pi, np.pi), rng.uniform(2, 3.5)), rng.uniform(.25, .45)
    y, x = np.mgrid[-1:1:72j, -1:1:72j].astype(np.float32)
    wide, travel, roll = rng.uniform(1.1, 1.4), rng.uniform(.8, 1.6), (rng.uniform(-1, 1, 2) * (1, .2)).tolist()
    bend, sway = np.float32(rng.normal(0, .08, 2)), rng.uniform(-1, 1, (2, 2)) * (.2, .1)
    right, down = np.float32([x, y]) * wide + np.float32(rng.uniform(-.5, .5, (2, 1, 1)))  # where the tip looks
    flesh = np.float32([.8, .42, .34] * rng.uniform(.96, 1.04, 3) * rng.uniform(.95, 1.05))
    fine = {"colon": 1.5, "stomach": .6, "bronchus": .3, "oesophagus": 1}[organ]                  # how dense its veins are
    waves = np.float32([np.round(fine * rng.normal(0, 3, 8)), fine * rng.normal(0, 5, 8), rng.uniform(0, 6.28, 8)])  # (3, 8)
    veins, lamp, wet, exposure = (rng.uniform(*span) for span in ((.05, .3), (.3, .5), (.3, .6), (.28, .34)))

    def rim(phi, z):                                                                              # 1 at a finding's rim
        return np.sqrt((2.2 * np.sin((phi - spot[0]) / 2)) ** 2 + (z - spot[1]) ** 2) / reach

    def lumen(phi, z):
        return wall(phi, z) - (reach * np.exp(-1.5 * rim(phi, z) ** 2) if kind == "polyp" else 0)

    frames, way = [], np.linspace(0, 1, count).tolist()
    for t in way if rng.random() < .5 else way[::-1]:
        lens = np.float32(sway @ (1, t))
        far, phi, z = march(lumen, right, down, bend, lens, roll[0] + roll[1] * t, travel * t)
        relief = sum(np.sin(a * phi + b * z + c) for a, b, c in zip(*waves)) / 4                  # veins where it is 0
        colour = (1 - veins * np.exp(-(relief / .12) ** 2) + .08 * relief)[..., None]
        colour = flesh * colour ** np.float32([.6, 1.3, 1.3])                                     # veins are red
        if kind is not None:
            ring = rim(phi, z)[..., None]
            colour = colour + .85 * np.exp(-ring ** 4) * (np.float32(FINDINGS[kind]) - colour)
            colour = colour - .25 * float(kind == "ulcer") * np.exp(-((ring - 1.1) / .25) ** 2) * np.float32([0, 1, 1])
        frame = shade(right, down, far, colour, relief, lamp, wet)
        frame *= exposure / frame.mean()                                                          # as the camera does
        frame += np.float32(rng.normal(0, .012, (72, 72, 1)))
        frame = np.uint8(255 * np.clip(frame, 0, 1) ** .8 * (np.hypot(x, y) < 1.15)[..., None])
        frames.append(np.asarray(Image.fromarray(frame).resize((160, 160), Image.Resampling.BICUBIC)))
    return np.stack(frames), None, kind


# ---- files -----------------------------------------------------------------------------------------------------------

NAMES = ("ALICE", "BORIS", "CARLA", "DEMIR", "ELENA", "FELIX", "GRETA", "HENRY")


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
            "PatientName": f"PHANTOM^{NAMES[sum(patient.encode()) % len(NAMES)]}", "PatientBirthDate": "19700101",
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


def write_video(path, frames):
    """Motion JPEG at a bit rate that leaves no visible blocks."""
    with iio.imopen(path, "w", plugin="pyav") as file:
        file.init_video_stream("mjpeg", fps=25, pixel_format="yuvj420p")
        file._video_stream.bit_rate = 4_000_000  # imageio has no argument for it
        for frame in frames:
            file.write_frame(frame)


def write_sample(folder, modality, number, split, seed):
    """Make and write patient `number` of a modality; returns the row of labels.csv."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality), number])
    make, parts = {"xray": (xray, (*PARTS,)), "ultrasound": (ultrasound, ECHO_PARTS), "endoscopy": (endoscopy, ORGANS),
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
        write_video(path := path.with_suffix(".avi"), image)
    elif modality == "ct" and number % 2:
        write_series(path, image, voxel, patient, rng)
    else:
        write_nifti(path := path.with_suffix(".nii.gz"), image, voxel, rng)
    labels = "part:" + getattr(part, "__name__", part) + (f"|lesion:{lesion}" if lesion else "")
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
