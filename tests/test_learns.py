"""It learns: train.py on toy textures lifts zero-shot R@1 far above its first step and above raw pixels."""
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embed import search
from model import load_encoder, normalize, pool, unit
from prepare import CachedDataset, read_samples

ROOT = Path(__file__).parents[1]


def draw(kind, rng, side=32):
    """A disc of stripes, fine or coarse, upright or flat; place, size, phase, tilt, contrast vary."""
    y, x = np.mgrid[:side, :side] / side
    (cy, cx), radius = rng.uniform(.35, .65, 2), rng.uniform(.25, .4)
    period = (.1, .22)[kind % 2] * rng.uniform(.85, 1.15)
    turn = np.radians((0, 90)[kind // 2] + rng.uniform(-15, 15))
    wave = np.sin(2 * np.pi * (np.cos(turn) * x + np.sin(turn) * y) / period + rng.uniform(0, 2 * np.pi))
    disc = (x - cx) ** 2 + (y - cy) ** 2 < radius ** 2
    image = .2 + rng.uniform(-.1, .1) + disc * (.3 + rng.uniform(.1, .25) * wave)
    image = image + rng.normal(0, .05, (side, side))
    return np.uint8(255 * image.clip(0, 1))[None, :, :, None]  # (1, H, W, 1)


@pytest.fixture
def textures(tmp_path):
    """A cache of 256 training and 128 test images of four kinds."""
    rng, folder = np.random.default_rng(0), tmp_path / "textures"
    folder.mkdir()
    with open(folder / "samples.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "modality", "labels", "patient", "split", "shape"])
        for i in range(384):
            split = "train" if i < 256 else "test"
            table.writerow([f"{i:016x}", "xray", f"kind{i % 4}", f"p{i}", split, "1x32x32x1"])
            np.save(folder / f"{i:016x}.npy", draw(i % 4, rng))
    return folder


def recall_at_1(embeddings, labels):
    _, indices = search(embeddings, embeddings, 2)  # the first is the query itself
    return (labels[indices[:, 1]] == labels).mean()


def test_training_beats_its_initialisation_and_pixels(textures, tmp_path):
    """160 of 320 steps of the short-run rule; chance is .25.

    In ours, R@1 went from .55 to .91; pixels .47.
    """
    rows = [row for row in read_samples(textures) if row["split"] == "test"]
    data = CachedDataset(rows)
    x = normalize(unit(torch.stack([data[i] for i in range(len(rows))])))  # (128, 1, 32, 32, 1)
    labels = np.array([row["labels"][0] for row in rows])
    found = []
    for steps in (1, 160):
        subprocess.run([sys.executable, ROOT / "train.py", "--ssl", "simdino", "--arch", "vit_xs",
                        "--patch-size", "8", "--epochs", "40", "--local-views", "2", "--gamma", "0.0078",
                        "--momentum", "0.9", "--max-steps", str(steps), "--workers", "0",
                        "--data", textures, "--out", tmp_path / "run"],
                       check=True, capture_output=True, cwd=tmp_path)
        encoder = load_encoder(tmp_path / "run" / "checkpoint.pt")
        with torch.no_grad():
            found.append(recall_at_1(pool(encoder(x), "mix"), labels))
    pixels = recall_at_1((x - x.mean((2, 3), keepdim=True)).flatten(1), labels)
    assert found[1] > found[0] + .15 and found[1] > pixels + .15, (found, pixels)
