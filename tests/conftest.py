"""Shared by all tests: the repository root on the path, one thread, and small caches made without any file reader."""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


def write_cache(folder, shapes, per_shape=8, seed=0, split="train"):
    """A cache folder with random samples: shapes {modality: (C, H, W, S)}; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with open(folder / "samples.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "modality", "labels", "patient", "split", "shape"])
        for modality, shape in shapes.items():
            for i in range(per_shape):
                name = f"{rng.integers(2**63):016x}"
                table.writerow([name, modality, f"kind{i % 2}", f"p{i // 2}", split, "x".join(map(str, shape))])
                np.save(folder / f"{name}.npy", rng.integers(0, 256, shape, dtype=np.uint8))
    return folder


@pytest.fixture
def mixed_cache(tmp_path):
    """Eight images, eight videos and eight volumes of 32 pixels."""
    return write_cache(tmp_path / "cache" / "mixed", {"xray": (1, 32, 32, 1), "endoscopy": (3, 32, 32, 16), "ct": (1, 32, 32, 8)})
