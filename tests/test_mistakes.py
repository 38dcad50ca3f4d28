"""A newcomer's likeliest mistakes: each ends with one clear line that names the remedy, no traceback."""
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from conftest import write_cache
from model import ViT, save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with images, a cache, a checkpoint, embeddings, and files that are none of these."""
    home = tmp_path_factory.mktemp("home")
    (home / "images").mkdir()
    for i in range(3):
        Image.effect_noise((40, 30), 40 + i).save(home / "images" / f"{i}.png")
    (home / "empty").mkdir()
    (home / "nolabels.csv").write_text("path,label\n0.png,a\n")
    (home / "badsplit.csv").write_text("path,labels,split\n0.png,a,holdout\n")
    write_cache(home / "cache" / "small", {"xray": (1, 32, 32, 1)})
    write_cache(home / "cache" / "volumes", {"ct": (1, 32, 32, 8)})
    no_ids = torch.zeros(0, dtype=torch.int64)
    save_checkpoint(home / "mae.pt", ViT("vit_xs", (8, 8, 4)), flags="{}", step=1, ids=no_ids)
    (home / "text.pt").write_text("hello")
    table = (home / "cache" / "small" / "samples.csv").read_text().splitlines()
    ids = [line.split(",")[0] for line in table[1:]]
    meta = {"encoder": "pixels", "pool": "", "checkpoint": "", "checkpoint_sha256": "", "weights_sha256": "",
            "code_sha256": "", "cache": "cache/small", "sizes": {"size": 32, "slices": 8, "frames": 16}}
    vectors = np.eye(8, 1024, dtype=np.float32)
    np.savez(home / "emb.npz", embeddings=vectors, ids=np.array(ids), meta=json.dumps(meta))
    np.savez(home / "none.npz", embeddings=np.zeros((0, 4), np.float32), ids=np.array([], str), meta="{}")
    return home


TRAIN = "train.py --arch vit_xs --epochs 1 --batch-size 4 --batch-size-3d 4 --data cache/small"
MISTAKES = [  # command, exit code, words of its last line
    ("prepare.py folder nowhere --modality xray", 1, "nowhere"),
    ("prepare.py folder", 2, "SOURCE"),
    ("prepare.py folder empty --modality xray", 1, "empty"),
    ("prepare.py folder images", 1, "--modality"),
    ("prepare.py folder images --modality x-ray", 2, "add the word to MODALITIES"),
    ("prepare.py folder images --modality xray --shard 2/2", 2, "--shard"),
    ("prepare.py folder images --modality xray --shard 0/2 --prune", 2, "--prune"),
    ("prepare.py folder images --modality xray --labels nolabels.csv", 1, "nolabels.csv"),
    ("prepare.py folder images --modality xray --labels badsplit.csv", 1, "holdout"),
    ("prepare.py chestxray14 images", 1, "Data_Entry"),
    ("prepare.py mimic images", 2, "mimic"),
    ("train.py --data cache/nothing", 1, "cache/nothing"),
    (f"{TRAIN} --modalities ct", 1, "no ct samples"),
    (f"{TRAIN} --batch-size 64", 1, "a step takes 64: --batch-size 8"),
    ("train.py --arch vit_xs --epochs 1 --batch-size-3d 64 --data cache/volumes", 1, "--batch-size-3d 8"),
    (f"{TRAIN} ./cache/small", 1, "one cache"),
    (f"{TRAIN} --modalities xray xray", 1, "--modalities"),
    (f"{TRAIN} --ssl mae --patch-size 32", 1, "--patch-size"),
    (f"{TRAIN} --ssl simdino --patch-size 32 --init text.pt", 1, "text.pt"),
    (f"{TRAIN} --ssl dino", 2, "--ssl"),
    ("embed.py cache/small", 1, "--checkpoint"),
    ("embed.py cache/small --checkpoint lost.pt", 1, "lost.pt"),
    ("embed.py cache/small --checkpoint text.pt", 1, "text.pt"),
    ("embed.py --search images/0.png --gallery none.npz", 1, "none.npz"),
    ("embed.py --search lost.png --gallery emb.npz", 1, "lost.png"),
    ("embed.py --search images/0.png", 2, "--gallery"),
    ("evaluate.py --task chestxray", 2, "chestxray14"),
    ("evaluate.py --task chestxray14", 1, "chestxray14"),
    ("evaluate.py --embeddings emb.npz --cache cache/volumes", 1, "cache/volumes"),
    ("evaluate.py --embeddings emb.npz --cache cache/small --pool cls", 1, "--pool"),
    ("mae.py mae.pt images/0.png", 1, "mae.pt"),
    ("simdino.py lost.dcm", 1, "lost.dcm"),
]


@pytest.mark.parametrize("command, code, words", MISTAKES, ids=[command for command, *_ in MISTAKES])
def test_a_mistake_is_one_line_with_the_remedy(home, command, code, words, monkeypatch, capsys):
    script, *arguments = command.split()
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    with pytest.raises(SystemExit) as leave:
        prepare.cli(importlib.import_module(script.removesuffix(".py")).main)
    # The interpreter prints a text, with exit code 1.
    told = leave.value.code if isinstance(leave.value.code, str) else ""
    assert (1 if told else leave.value.code) == code
    last = (capsys.readouterr().err + told).rstrip().splitlines()[-1]
    assert last.startswith(f"{script}: ") and words in last
