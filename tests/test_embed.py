"""embed.py: exact search against plain loops, embeddings that no process changes, files that are refused."""
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embed
import prepare
from embed import (apply_encoder, embed_batch, embed_rows, load_embedder, picture, pixels, read_embeddings,
                   search)
from model import ViT, load_encoder, save_checkpoint, save_montage, weights_sha256
from prepare import UserError, load_sample, read_samples
from tests.conftest import nifti, phantom
from tests.phantoms import write_series

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    """Run one of the scripts as a user would; returns the finished process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def cache(mixed_cache):
    """The mixed cache, and what prepare.py would say of its sizes."""
    (mixed_cache / "recipe.json").write_text(json.dumps({"size": 32, "slices": 8, "frames": 16}))
    return mixed_cache


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained SimDINO-like encoder (with a CLS token) in a file."""
    torch.manual_seed(1)
    path = tmp_path / "runs" / "tiny" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    flags = json.dumps({"ssl": "simdino", "data_fraction": 0.6})
    save_checkpoint(path, ViT("vit_t", cls_token=True), flags=flags, step=7)
    return path


# ----------------------------------------------------------------------------------------------------- search
def plain_search(queries, gallery, k):
    """The definition in Python floats: cosine, best first, ties by lower index."""
    def unit(v):
        length = math.sqrt(math.fsum(float(x) ** 2 for x in v))
        return [float(x) / length if length else 0.0 for x in v]
    gallery = [unit(v) for v in gallery]
    scores = [[math.fsum(a * b for a, b in zip(unit(q), g)) for g in gallery] for q in queries]
    order = [sorted(range(len(gallery)), key=lambda j: (-row[j], j))[:k] for row in scores]
    return [[row[j] for j in js] for row, js in zip(scores, order)], order


@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (5, 9), (200, 10)])
def test_search_equals_plain_loops(n, k):
    generator = np.random.default_rng(n)
    gallery, queries = (generator.standard_normal((m, 24)).astype(np.float32) for m in (n, 7))
    gallery[n // 2] = 0  # a zero vector scores 0
    scores, indices = search(queries, gallery, k)
    expected, order = plain_search(queries, gallery, k)
    assert indices.tolist() == order and scores.dtype == torch.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_gallery_may_be_a_memory_map_and_inputs_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "GALLERY_BLOCK", 16)
    x = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    np.save(tmp_path / "gallery.npy", x)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    expected = search(torch.from_numpy(x[:3]), torch.from_numpy(x), 4)
    for a, b in zip(search(x[:3], mapped, 4), expected):
        assert torch.equal(a, b)
    assert search(x[:0], mapped, 4)[1].shape == (0, 4)
    assert np.array_equal(x, mapped)  # and neither is changed


def test_blocks_of_any_size_find_the_same(monkeypatch):
    generator = np.random.default_rng(0)
    queries, gallery = (generator.standard_normal((n, 17)).astype(np.float32) for n in (23, 150))
    expected = plain_search(queries, gallery, 12)[1]
    for a, b in ((1, 1), (3, 7), (64, 64), (23, 149)):
        monkeypatch.setattr(embed, "QUERY_BLOCK", a)
        monkeypatch.setattr(embed, "GALLERY_BLOCK", b)
        scores, indices = search(queries, gallery, 12)
        assert indices.tolist() == expected, (a, b)
        assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_memory_is_bounded_by_the_blocks(monkeypatch):
    """No product is larger than a block of queries times a block of the gallery; k columns are kept."""
    monkeypatch.setattr(embed, "QUERY_BLOCK", 8)
    monkeypatch.setattr(embed, "GALLERY_BLOCK", 16)
    widest = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args,
                        **more: widest.append(x.shape) or topk(x, *args, **more))
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    search(x, x, 3)
    products = [shape for shape in widest if shape[0] <= 8]
    kept = [shape for shape in widest if shape[0] == 50]
    assert max(shape[1] for shape in products) == 16 and max(shape[1] for shape in kept) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_search_on_a_gpu_finds_the_same():
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    scores, indices = search(x[:20].cuda(), x.cuda(), 5)
    assert scores.is_cuda and torch.equal(indices.cpu(), search(x[:20], x, 5)[1])


@pytest.mark.parametrize("queries, gallery, k", [
    ((2, 4), (3, 4), 0), ((2, 4), (3, 5), 1), ((2, 4), (0, 4), 1), ((4,), (3, 4), 1)])
def test_search_refuses_what_has_no_answer(queries, gallery, k):
    with pytest.raises(UserError):
        search(np.ones(queries, np.float32), np.ones(gallery, np.float32), k)


def test_search_refuses_values_that_are_not_finite():
    for value in (np.nan, np.inf):
        gallery = np.ones((3, 4), np.float32)
        gallery[1, 2] = value
        for queries, candidates in ((gallery[:1], gallery), (gallery, gallery[:1])):
            with pytest.raises(UserError, match="not finite"):
                search(queries, candidates, 1)


# --------------------------------------------------------------------------------------------------- encoders
def test_embedding_is_cls_and_mean_of_the_patch_tokens(mixed_cache, checkpoint):
    network, meta, trained = load_embedder("m3ret", checkpoint)
    row = next(r for r in read_samples(mixed_cache) if r["modality"] == "ct")
    x = torch.from_numpy(load_sample(mixed_cache, row))[None]
    torch.manual_seed(1)
    vit = ViT("vit_t", cls_token=True).eval()  # what the fixture saved
    with torch.no_grad():
        tokens = vit((x.float() / 255 - 0.5) / 0.5)
        assert torch.equal(network(x), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    assert (meta["pool"], meta["step"], json.loads(meta["flags"])["data_fraction"]) == ("mix", 7, 0.6)
    assert meta["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert trained is None  # this checkpoint does not say
    assert meta["parameters"] == sum(p.numel() for p in vit.parameters())


def test_parts_are_centred_on_the_gallery_and_count_alike():
    """Two parts of widths 1 and 2: whatever their scale, each has length one, and the mean is gone."""
    gallery = np.array([[1, 0, 0], [3, 0, 8], [5, 0, 4]], np.float32)  # mean 3, 0, 4
    queries = np.array([[4, 0, 4], [2, 3, 0]], np.float32)
    q, g = embed.centre_parts(queries, gallery, [1, 2])
    assert q.tolist() == [[1, 0, 0], [-1, pytest.approx(0.6), pytest.approx(-0.8)]]
    assert g.tolist() == [[-1, 0, -1], [0, 0, 1], [1, 0, 0]]


def test_a_grid_is_embedded_and_searched(two_galleries, command, capsys):
    """A file finds itself, the vectors begin with those of mix, and no other gallery is comparable."""
    command(embed, "cache/xray", "--checkpoint", two_galleries, "--pool", "grid", "--workers", "0",
            "--out", "g.npz")
    grid, mix = read_embeddings("g.npz"), read_embeddings("xray.npz")
    parts = grid.meta["parts"]
    assert grid.meta["pool"] == "grid" and parts[2] == 16 * parts[0] and mix.meta["parts"] == parts[:2]
    assert np.array_equal(grid.vectors[:, :sum(parts[:2])], mix.vectors)
    capsys.readouterr()
    command(embed, "--search", "my_xray/1.png", "--modality", "xray", "--gallery", "g.npz", "--top", "1")
    (hit,) = read_table(capsys.readouterr().out)
    assert (hit["labels"], hit["cosine"]) == ("my_xray 1", "1.000000")
    with pytest.raises(UserError, match="g.npz: its pool is missing or differs"):
        command(embed, "--search", "my_xray/1.png", "--gallery", "xray.npz", "g.npz")
    edited = dict(np.load("g.npz"))
    edited["meta"] = json.dumps({**grid.meta, "parts": [1, 2]})
    np.savez("cut.npz", **edited)
    with pytest.raises(UserError, match="cut.npz is no embedding file .its pool is grid, but its parts"):
        command(embed, "--search", "my_xray/1.png", "--gallery", "cut.npz")
    with pytest.raises(UserError, match="pixels: has no tokens for --pool grid"):
        command(embed, "cache/xray", "--encoder", "pixels", "--pool", "grid")


def test_untrained_encoder_has_the_architecture_but_not_the_weights(checkpoint):
    x = torch.randint(0, 256, (1, 1, 32, 32, 1), dtype=torch.uint8)
    (trained, a, _), (first, b, _), (again, *_) = (
        load_embedder(name, checkpoint) for name in ("m3ret", "random", "random"))
    assert a["parameters"] == b["parameters"] and b["pool"] == "mix"
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), trained(x))


def test_pixels_are_the_mean_slice_and_compare_by_correlation():
    """A ramp down the slices of a constant volume is flat; an image equals itself brighter and harder."""
    flat = torch.arange(5, dtype=torch.float16).expand(1, 1, 64, 64, 5) / 10
    assert not pixels(flat).any()
    image = torch.rand(1, 1, 32, 32, 1, generator=torch.Generator().manual_seed(0))
    video = torch.cat([image, 3 * image], dim=-1).expand(-1, 3, -1, -1, -1) / 4  # its mean frame is image / 2
    assert torch.allclose(pixels(video), (image / 2 - image.mean() / 2).flatten(1), atol=1e-6)
    assert torch.cosine_similarity(pixels(image.half()), pixels((0.3 + image / 2).half())) > 0.9999


def test_a_2d_network_sees_every_slice_in_imagenet_colours():
    seen = []

    def network(x):  # (n, 3, 28, 28) -> (n, 3)
        seen.append(x.shape)
        return x.mean(dim=(2, 3))
    volume = torch.rand(2, 1, 20, 20, 6)
    out = embed.by_slices(network, size=28, chunk=5)(volume)
    assert seen == [(5, 3, 28, 28), (5, 3, 28, 28), (2, 3, 28, 28)]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(out, (volume.mean(dim=(1, 2, 3, 4))[:, None] - mean) / std, atol=0.02, rtol=0)


def test_the_checkpoint_is_read_once(checkpoint, monkeypatch):
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **more: reads.append(args) or load(*args, **more))
    load_embedder("m3ret", checkpoint)
    assert len(reads) == 1


@pytest.mark.parametrize("name", [
    "nonsense", "no_such_module:f", "math:no_such_function", ":x", "x:", ".x:f", "math:pi", "own:needs",
    "m3ret", "random"])
def test_unknown_encoders_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def needs(argument):\n    pass\n")
    with pytest.raises(UserError, match=f"--encoder {name}:"):
        load_embedder(name)


def test_what_must_match_is_a_hash_of_config_and_weights(checkpoint, tmp_path):
    """The same encoder saved alone, or with other things, is the same; another weight or config is not."""
    network = load_encoder(checkpoint)
    save_checkpoint(tmp_path / "alone.pt", network)
    meta = load_embedder("m3ret", checkpoint).meta
    alone = load_embedder("m3ret", tmp_path / "alone.pt")
    assert alone.meta["weights_sha256"] == meta["weights_sha256"] == weights_sha256(network)
    assert alone.meta["checkpoint_sha256"] != meta["checkpoint_sha256"] and alone.seen_ids is None
    assert load_embedder("random", checkpoint).meta["weights_sha256"] != meta["weights_sha256"]
    with torch.no_grad():
        network.blocks[3].mlp.fc1.bias[5] += 1e-6
    assert weights_sha256(network) != meta["weights_sha256"]
    square, deep = ViT("vit_xs", (8, 8, 4)), ViT("vit_xs", (8, 4, 8))  # patches of equally many values
    deep.load_state_dict(square.state_dict())
    assert weights_sha256(square) != weights_sha256(deep)


def test_a_run_that_began_with_a_foreign_network_does_not_say_what_it_has_seen(tmp_path):
    for known, seen_ids in ((True, [1, 2]), (False, None)):
        save_checkpoint(tmp_path / "c.pt", ViT("vit_xs"), ids=torch.tensor([1, 2]), ids_known=known)
        found = load_embedder("m3ret", tmp_path / "c.pt").seen_ids
        assert (found if found is None else found.tolist()) == seen_ids


@pytest.mark.parametrize("x, reason", [
    (torch.zeros(1, 32, 32, 1), "B, C, H, W, S"), (np.zeros((1, 2, 32, 32, 1), np.float32), "B, C, H, W, S"),
    (np.full((1, 1, 32, 32, 1), 200, np.float32), "divide"), (np.full((1, 1, 32, 32, 1), 2.0), "divide"),
    (np.full((1, 1, 32, 32, 1), -0.6, np.float16), "divide"), (np.full((1, 1, 32, 32, 1), 1.01), "divide"),
    (np.zeros((1, 1, 32, 32, 1), np.int16), "int16"), (np.zeros((1, 1, 30, 32, 1), np.uint8), "patches")])
def test_samples_of_another_shape_type_or_range_are_refused(checkpoint, x, reason):
    with pytest.raises(UserError, match=reason):
        apply_encoder(load_embedder("m3ret", checkpoint), x)


def test_samples_are_embedded_whatever_they_are_stored_as(checkpoint):
    """uint8, and the same values as floats of any precision that holds them; an array or a tensor."""
    embedder = load_embedder("m3ret", checkpoint)
    x = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 1), dtype=np.uint8)
    expected = apply_encoder(embedder, x)
    assert expected.dtype == torch.float32 and expected.shape == (2, 384)
    for same in (torch.from_numpy(x), np.float32(x / 255), x / 255):
        torch.testing.assert_close(apply_encoder(embedder.embed, same), expected)


def test_the_lines_for_python_in_the_docstring_run(cache, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "NAME")
    rows = [row for row in read_samples(cache) if row["modality"] == "ct"]
    embed_rows(rows, load_embedder("m3ret", "runs/NAME/checkpoint.pt"), "emb.npz", workers=0)
    nifti(tmp_path / "scan.nii.gz", *phantom())
    lines = embed.__doc__.split("From Python:\n")[1]
    names = {}
    exec(textwrap.dedent(lines), names)
    assert names["modality"] == "ct" and names["scores"].shape == (1, 3)
    assert names["labels"] == [rows[i]["labels"] for i in names["indices"][0]]


def test_a_checkpoint_that_would_be_ignored_is_refused(checkpoint):
    with pytest.raises(UserError, match="--checkpoint"):
        load_embedder("pixels", checkpoint)


@pytest.mark.parametrize("state", [
    {"config": {}}, {"encoder": 5}, {"config": {"arch": "vit_t"}, "encoder": {}},
    {"config": 5, "encoder": {}},
    {"config": {"arch": "vit_huge"}, "encoder": {}},
    {"config": {"arch": "vit_t", "patch_size": 0}, "encoder": {}}])
def test_edited_checkpoints_are_named(tmp_path, state):
    torch.save(state, tmp_path / "edited.pt")
    done = run(ROOT / "embed.py", "cache", "--checkpoint", "edited.pt", cwd=tmp_path)
    assert (done.returncode,
            len(done.stderr.splitlines())) == (1, 1) and "edited.pt" in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------- embeddings
PIXELS = load_embedder("pixels")


def test_every_id_once_in_the_order_of_the_table(cache, tmp_path):
    rows = read_samples(cache)[::-1]
    rows = rows[1::2] + rows[::2]  # shapes in turn
    embed_rows(rows, PIXELS, tmp_path / "new" / "e.npz", workers=0)
    found, embeddings, meta = read_embeddings(tmp_path / "new" / "e.npz")
    assert found == read_embeddings(tmp_path / "new" / "e.npz",
                                    cache)[0] == rows and meta["cache"] == str(cache)
    assert meta["sizes"] == {"size": 32, "slices": 8, "frames": 16} and meta["seen"] == []
    for i in (0, 5, 23):
        x = torch.from_numpy(load_sample(cache, rows[i]))[None]
        np.testing.assert_allclose(embeddings[i], pixels(x)[0], atol=1e-6)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.npz"]


def test_samples_that_were_trained_on_are_listed(cache, checkpoint, tmp_path):
    """The checkpoint keeps ids as signed 64-bit numbers; ids from 8000... on wrap to negative ones."""
    rows = read_samples(cache)[:3]
    for row, name in zip(rows, ("00000000000000ff", "ffffffffffffffff", "8000000000000000")):
        (cache / f"{row['id']}.npy").rename(cache / f"{name}.npy")
        row["id"] = name
    save_checkpoint(tmp_path / "some.pt", ViT("vit_t"), flags="{}", step=1, ids=torch.tensor([255, -1, 7]))
    for file, name, seen in ((tmp_path / "some.pt", "m3ret", [rows[0]["id"], rows[1]["id"]]),
                             (checkpoint, "m3ret", None),
                             (tmp_path / "some.pt", "random", [])):
        embed_rows(rows, load_embedder(name, file), tmp_path / "e.npz", workers=0)
        with np.load(tmp_path / "e.npz") as made:
            assert json.loads(str(made["meta"]))["seen"] == seen


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named_in_one_line(cache, tmp_path, workers):
    rows = read_samples(cache)
    (cache / f"{rows[3]['id']}.npy").write_bytes(b"\x93NUMPY")
    done = run(ROOT / "embed.py", cache, "--encoder", "pixels", "--workers", workers, cwd=tmp_path)
    lines = done.stderr.replace("\r", "\n").strip().splitlines()  # the progress bar is wiped out before
    assert done.returncode == 1 and lines[-1].startswith("embed.py: "), done.stderr
    assert rows[3]["id"] in lines[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "emb.npz").exists()


def test_a_sample_that_is_not_finite_is_named(cache, tmp_path):
    rows = [row for row in read_samples(cache) if row["modality"] == "xray"]
    for row in rows:
        np.save(cache / f"{row['id']}.npy",
                np.full((1, 32, 32, 1), np.nan if row is rows[2] else 0.5, np.float16))
    with pytest.raises(UserError, match=f"{rows[2]['id']}.npy .* not finite"):
        embed_rows(rows, PIXELS, tmp_path / "e.npz", workers=0)


@pytest.mark.parametrize("made", ["None", "5", "lambda x: None", "lambda x: x.flatten(1).float().numpy()",
                                  "lambda x: x.float()", "lambda x: x.flatten(1)[:1].float()"])
def test_an_encoder_that_gives_no_vectors_is_said_in_one_line(cache, tmp_path, made):
    (tmp_path / "mine.py").write_text(f"def build():\n    return {made}\n")
    done = run(ROOT / "embed.py", cache, "--encoder", "mine:build", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 1 and "embed.py: " in done.stderr and "the encoder" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_8_bit_and_deeper_samples_of_one_shape_keep_their_scale(tmp_path, cache):
    rows = [row for row in read_samples(cache) if row["modality"] == "xray"][:2]
    half = np.repeat([0, 1], 16)[None, None, :, None] * np.ones((1, 32, 1, 1))  # left black, right white
    np.save(cache / f"{rows[0]['id']}.npy", np.uint8(51 * half))
    np.save(cache / f"{rows[1]['id']}.npy", np.float16(0.2 * half))
    embed_rows(rows, PIXELS, tmp_path / "e.npz", workers=0)
    expected = np.tile(np.repeat([-0.1, 0.1], 16), (2, 32))  # (2, 1024): both are .2 wide, less their mean
    np.testing.assert_allclose(read_embeddings(tmp_path / "e.npz")[1], expected, atol=1e-3)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_what_one_writes(cache, checkpoint, tmp_path, processes):
    """Each id exactly once, also where there are more processes than batches."""
    done = run("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
               ROOT / "embed.py",
               cache, "--checkpoint", checkpoint, "--workers", "0", "--out", tmp_path / "many.npz",
               cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("24 embeddings") == 1, done.stderr
    embed_rows(read_samples(cache), load_embedder("m3ret", checkpoint), tmp_path / "one.npz", workers=0)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "many.npz").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def torchrun(script, *arguments, processes=2):
    """The command that starts a script in several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return [*launcher, script, *arguments]


def test_two_runs_at_once_do_not_mix(cache, checkpoint, tmp_path):
    """Two encoders, one --out, two processes each: the file is wholly of one; no other file is touched."""
    torch.manual_seed(2)
    save_checkpoint(tmp_path / "other.pt", ViT("vit_t", cls_token=True), flags="{}", step=7)
    for i in range(2):
        (tmp_path / f"emb.npz.part{i}").mkdir()  # a name that a run might have used, is in the way of none
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = []
    for file in (checkpoint, tmp_path / "other.pt"):
        arguments = [cache, "--checkpoint", file, "--workers", "0", "--out", "emb.npz"]
        command = [sys.executable, *torchrun(ROOT / "embed.py", *arguments)]
        runs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE,
                                     text=True))
    for started in runs:
        _, errors = started.communicate(timeout=120)
        assert started.returncode == 0, errors

    _, vectors, meta = read_embeddings(tmp_path / "emb.npz")
    embedder = load_embedder("m3ret", meta["checkpoint"])
    embed_rows(read_samples(cache), embedder, tmp_path / "one.npz", workers=0)
    assert np.array_equal(vectors, read_embeddings(tmp_path / "one.npz").vectors)
    assert not list(tmp_path.glob("emb.npz.part*/*")) and not list(tmp_path.glob(".*.tmp"))


def test_processes_that_read_different_checkpoints_stop_with_one_line(cache, checkpoint, tmp_path):
    """As when a training replaces the file between the starts of two processes."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        save_checkpoint(tmp_path / rank / "c.pt", ViT("vit_t", cls_token=True), flags="{}", step=int(rank))
    script = tmp_path / "script.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.chdir(os.environ["RANK"])
import embed
arguments = ["--checkpoint", "c.pt", "--workers", "0", "--out", "../emb.npz"]
sys.argv = ["embed.py", {str(cache)!r}, *arguments]
embed.cli(embed.main)
""")
    done = run(*torchrun(script), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("embed.py: ") == 1, done.stderr
    assert "different checkpoints" in done.stderr and not (tmp_path / "emb.npz").exists()


# ------------------------------------------------------------------------------------- embedding what is new
def keep_rows(cache, keep):
    """Leave in samples.csv only the rows whose number is in keep."""
    table = cache / "samples.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *(lines[i] for i in keep)]) + "\n")


@pytest.fixture
def update(cache, checkpoint, capsys):
    """Embed the cache into a file -> what was printed; the checkpoint's encoder unless another is given."""
    def call(out, embedder=None):
        capsys.readouterr()
        embed_rows(read_samples(cache), embedder or load_embedder("m3ret", checkpoint), out, workers=0)
        return capsys.readouterr().out
    return call


def assert_equal_files(a, b):
    with np.load(a) as one, np.load(b) as other:
        assert one["ids"].tolist() == other["ids"].tolist() and str(one["meta"]) == str(other["meta"])
        assert np.array_equal(one["embeddings"], other["embeddings"])


@pytest.mark.parametrize("first", [[*range(0, 24, 2)], [0, 9, 17], [*range(8)]])
def test_only_what_is_new_is_embedded_and_equals_a_full_run_to_the_last_digit(cache, update, tmp_path, first):
    full = (cache / "samples.csv").read_text()
    update(tmp_path / "full.npz")
    keep_rows(cache, first)
    assert f"{len(first)} embeddings" in update(tmp_path / "e.npz")
    (cache / "samples.csv").write_text(full)
    counts = f"{len(first)} kept, {24 - len(first)} embedded, 0 dropped"
    assert f"24 embeddings in {tmp_path}/e.npz: {counts}" in update(tmp_path / "e.npz")
    assert_equal_files(tmp_path / "e.npz", tmp_path / "full.npz")
    assert "24 kept, 0 embedded, 0 dropped" in update(tmp_path / "e.npz")
    assert_equal_files(tmp_path / "e.npz", tmp_path / "full.npz")


def test_what_is_gone_is_dropped_and_what_was_written_since_is_embedded_again(cache, update, tmp_path):
    update(tmp_path / "e.npz")
    rows = read_samples(cache)
    keep_rows(cache, range(2, 24))
    np.save(cache / f"{rows[5]['id']}.npy", 255 - load_sample(cache, rows[5]))
    older = cache / f"{rows[6]['id']}.npy"  # an old file that was put in its place now: only its ctime is new
    np.save(tmp_path / "old.npy", 255 - load_sample(cache, rows[6]))
    os.utime(tmp_path / "old.npy", (0, 0))
    (tmp_path / "old.npy").rename(older)
    assert "20 kept, 2 embedded, 2 dropped" in update(tmp_path / "e.npz")
    update(tmp_path / "full.npz")
    assert_equal_files(tmp_path / "e.npz", tmp_path / "full.npz")


def test_a_sample_that_is_written_while_others_are_embedded_is_newer_than_the_file(cache, update, tmp_path):
    rows = read_samples(cache)

    def embed_and_write(x):  # the first batch is out, and its first sample is made again
        if rows:
            np.save(cache / f"{rows.pop(0)['id']}.npy", np.zeros((1, 32, 32, 1), np.uint8))
            rows.clear()
        return pixels(x)
    update(tmp_path / "e.npz", PIXELS._replace(embed=embed_and_write))
    assert "23 kept, 1 embedded" in update(tmp_path / "e.npz", PIXELS)
    assert not read_embeddings(tmp_path / "e.npz").vectors[0].any()


def test_another_encoder_embeds_anew_and_says_so_in_one_line(cache, checkpoint, update, tmp_path):
    update(tmp_path / "e.npz", PIXELS)
    printed = update(tmp_path / "e.npz").splitlines()
    assert len(printed) == 2
    assert "its encoder is missing or differs" in printed[0] and "0 kept, 24 embedded" in printed[1]
    (tmp_path / "e.npz").write_text("text")
    printed = update(tmp_path / "e.npz").splitlines()
    assert len(printed) == 2 and "no embedding file" in printed[0] and "0 kept, 24 embedded" in printed[1]


def test_vectors_of_another_cache_with_equal_ids_are_not_kept(cache, update, tmp_path):
    shutil.copytree(cache, tmp_path / "twin")
    embed_rows(read_samples(tmp_path / "twin"), PIXELS, tmp_path / "e.npz", workers=0)
    printed = update(tmp_path / "e.npz", PIXELS)
    assert "another cache" in printed and "0 kept, 24 embedded" in printed


def test_vectors_of_a_foreign_encoder_are_kept_if_it_answers_as_before(cache, update, tmp_path, monkeypatch):
    """Its code is the same, the weights that it reads are not."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import torch\ndef build():\n    w = torch.load('w.pt')\n"
                              "    return lambda x: w * x.float().flatten(1)[:, :6]\n")
    sys.modules.pop("own", None)
    for weight, kept in ((1.0, 0), (1.0, 24), (1.5, 0)):
        torch.save(torch.tensor(weight), "w.pt")
        assert f": {kept} kept, {24 - kept} embedded" in update("e.npz", load_embedder("own:build"))


def test_several_processes_embed_what_is_new(cache, checkpoint, update, tmp_path):
    full = (cache / "samples.csv").read_text()
    keep_rows(cache, range(0, 24, 3))
    update(tmp_path / "e.npz")
    (cache / "samples.csv").write_text(full)
    arguments = [cache, "--checkpoint", checkpoint, "--workers", "0", "--out", "e.npz"]
    done = run(*torchrun(ROOT / "embed.py", *arguments), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("8 kept, 16 embedded, 0 dropped") == 1, done.stderr
    update(tmp_path / "full.npz")
    assert_equal_files(tmp_path / "e.npz", tmp_path / "full.npz")


@pytest.mark.parametrize("shape, size", [((1, 32, 32, 1), 16), ((3, 32, 32, 16), 4), ((1, 32, 48, 8), 4)])
def test_an_embedding_does_not_depend_on_what_else_is_in_the_batch(checkpoint, shape, size):
    embedder = load_embedder("m3ret", checkpoint)
    x = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
    rows = [{"folder": "", "id": str(i)} for i in range(size)]
    together = embed_batch(x, rows, embedder, "cpu")
    for i in (0, size // 2, size - 1):
        assert torch.equal(embed_batch(x[i:i + 1], rows[i:i + 1], embedder, "cpu")[0], together[i])


# ------------------------------------------------------------------------------------------- files and caches
@pytest.mark.parametrize("content", [
    b"", b"not a zip", {"embeddings": np.ones((2, 3))},
    {"ids": np.array(["a"]), "embeddings": np.ones((2, 3))},
    {"ids": np.array(["a", "a"]), "embeddings": np.ones((2, 3))},
    {"ids": np.arange(1), "embeddings": np.ones((1, 3))},
    {"ids": np.array(["a"]), "embeddings": np.full((1, 3), np.nan)},
    {"ids": np.array([], str), "embeddings": np.ones((0, 3))},
    {"ids": np.array(["a"]), "embeddings": np.array([[object()]])},
    {"ids": np.array(["a"]), "embeddings": np.ones((1, 3)), "meta": "no json"}])
def test_files_that_are_no_embeddings_are_refused(tmp_path, content):
    path = tmp_path / "e.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(UserError, match="e.npz"):
        read_embeddings(path)


def test_embeddings_made_by_anyone_are_read(cache, tmp_path):
    rows = read_samples(cache)
    x = np.random.default_rng(0).standard_normal((3, 5))
    np.savez(tmp_path / "e.npz", embeddings=x,
             ids=np.array([rows[i]["id"] for i in (4, 0, 2)]))  # float64, no meta
    found, embeddings, meta = read_embeddings(tmp_path / "e.npz", cache)
    assert found == [rows[4], rows[0], rows[2]] and meta == {} and embeddings.dtype == np.float32
    assert np.array_equal(embeddings, np.float32(x))
    with pytest.raises(UserError, match="--cache"):
        read_embeddings(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", embeddings=x[:1], ids=np.array(["0123456789abcdef"]))
    with pytest.raises(UserError, match="not in .* give the cache it is of"):
        read_embeddings(tmp_path / "e.npz", cache)


def test_a_cache_that_has_lost_samples_is_said_to_have_changed(cache, tmp_path):
    embed_rows(read_samples(cache), PIXELS, tmp_path / "e.npz", workers=0)
    keep_rows(cache, range(1, 24))
    with pytest.raises(UserError, match="1 ids .*the cache has changed since: embed it again"):
        read_embeddings(tmp_path / "e.npz")


def test_the_cache_is_found_from_another_folder_and_beside_the_file(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed_rows(read_samples("cache/mixed"), PIXELS, "e.npz", workers=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(read_embeddings("../e.npz").rows) == 24  # ../cache/mixed, as meta says from where the file is
    shutil.move(cache, tmp_path / "mixed")
    assert read_embeddings("../e.npz").rows[0]["folder"] == "../mixed"
    shutil.move(tmp_path / "mixed", tmp_path / "moved")
    with pytest.raises(UserError, match="its cache cache/mixed is not there.*--cache"):
        read_embeddings("../e.npz")
    assert len(read_embeddings("../e.npz", "../moved").rows) == 24


# ----------------------------------------------------------------------------------------------- command line
@pytest.fixture
def command(tmp_path, monkeypatch):
    """Call a script's main as `python script.py arguments` would, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()
    return call


def test_an_encoder_of_ones_own(cache, tmp_path, command):
    (tmp_path / "mine.py").write_text("def build():\n    return lambda x: x.float().flatten(1)[:, :6]\n")
    sys.modules.pop("mine", None)
    command(embed, cache, "--encoder", "mine:build", "--workers", "0")
    rows, embeddings, meta = read_embeddings("emb.npz")
    assert embeddings[0].tolist() == load_sample(cache, rows[0]).ravel()[:6].tolist()  # uint8, as cached
    assert (meta["encoder"], meta["checkpoint_sha256"], meta["seen"]) == ("mine:build", "", None)
    assert meta["code_sha256"] == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()


def noise_images(folder, generator, n=6):
    """n smooth noise images in a folder of that name, and labels.csv beside it."""
    Path(folder).mkdir()
    for i in range(n):
        noise = Image.fromarray(generator.integers(0, 256, (5, 7), dtype=np.uint8))
        noise.resize((70, 50)).save(f"{folder}/{i}.png")
    Path("labels.csv").write_text("path,labels\n" + "".join(f"{i}.png,{folder} {i}\n" for i in range(n)))


@pytest.fixture
def two_galleries(checkpoint, command, capsys):
    """X-rays and ultrasound images, embedded as xray.npz and ultrasound.npz; returns the checkpoint."""
    generator = np.random.default_rng(0)
    for name in ("xray", "ultrasound"):
        noise_images(f"my_{name}", generator)
        command(prepare, "folder", f"my_{name}", "--name", name, "--modality", name, "--labels", "labels.csv",
                "--size", "64", "--workers", "1")
        command(embed, f"cache/{name}", "--checkpoint", checkpoint, "--workers", "0", "--out", f"{name}.npz")
    capsys.readouterr()
    return checkpoint


def read_table(text, delimiter="\t"):
    """A printed table, or a hits.csv, as a list of dicts."""
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


def test_a_file_finds_itself(two_galleries, command, capsys):
    """prepare -> embed -> search: the source file of a sample comes back first, from either gallery."""
    for name in ("xray", "ultrasound"):
        command(embed, "--search", f"my_{name}/4.png", "--modality", name, "--gallery", "xray.npz",
                "ultrasound.npz", "--top", "2", "--figure", "hits.png")
        first, second = read_table(capsys.readouterr().out)
        assert (first["rank"], first["cosine"], first["modality"]) == ("1", "1.000000", name)
        assert (first["labels"], first["cache"], first["path"]) == (f"my_{name} 4", f"cache/{name}", "4.png")
        assert (second["rank"], second["query"]) == ("2", f"my_{name}/4.png")
        with Image.open("hits.png") as image:
            assert image.size[0] > 2 * image.size[1]  # three tiles side by side
    Path("cache/xray/sources.csv").unlink()  # what only its owner may have
    command(embed, "--search", "my_xray/4.png", "--gallery", "xray.npz", "--top", "1")
    (hit,) = read_table(capsys.readouterr().out)
    assert (hit["labels"], hit["path"]) == ("my_xray 4", "")


def test_many_files_are_searched_for_by_an_encoder_read_once(two_galleries, command, capsys, monkeypatch):
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **more: reads.append(args) or load(*args, **more))
    files = [f"my_xray/{i}.png" for i in range(6)]
    command(embed, "--search", *files, "--modality", "xray", "--gallery", "xray.npz", "ultrasound.npz",
            "--top", "2", "--out", "hits.csv")
    assert len(reads) == 1 and capsys.readouterr().out == "12 hits of 6 files in hits.csv\n"
    text = Path("hits.csv").read_text()
    assert text.splitlines()[0] == "query,rank,cosine,modality,labels,cache,id,path"
    hits = read_table(text, ",")
    assert [(hit["query"], hit["rank"]) for hit in hits] == [(file, rank) for file in files for rank in "12"]
    for file, hit in zip(files, hits[::2]):  # each finds itself
        assert (hit["cosine"], hit["cache"], hit["path"]) == ("1.000000", "cache/xray", Path(file).name)
    assert Path("hits.csv").stat().st_mode & 0o777 == 0o600  # as sources.csv, which has the paths


def test_a_refused_file_is_named_and_the_others_go_on(two_galleries, command, capsys):
    Path("text.png").write_text("no picture")
    command(embed, "--search", "text.png", "my_xray/1.png", "lost.png", "--modality", "xray", "--gallery",
            "xray.npz", "--top", "1", "--out", "hits.csv")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("embed.py: ") and "text.png" in first
    assert second.startswith("embed.py: ") and "lost.png" in second
    assert [hit["labels"] for hit in read_table(Path("hits.csv").read_text(), ",")] == ["my_xray 1"]
    with pytest.raises(SystemExit, match="1"):  # nothing useful could be done
        command(embed, "--search", "text.png", "lost.png", "--modality", "xray", "--gallery", "xray.npz")


def test_a_search_prints_the_cache_of_each_hit(two_galleries, command, capsys):
    """Two hospitals with equal paths have equal ids: the cache tells their samples and paths apart."""
    shutil.copytree("cache/xray", "cache/hospital_b")
    sources = Path("cache/hospital_b/sources.csv")
    sources.write_text(sources.read_text().replace(".png", "_b.png"))
    command(embed, "cache/hospital_b", "--checkpoint", two_galleries, "--workers", "0", "--out", "b.npz")
    capsys.readouterr()
    command(embed, "--search", "my_xray/4.png", "--modality", "xray", "--gallery", "xray.npz", "b.npz",
            "--top", "2")
    hits = read_table(capsys.readouterr().out)
    assert len({hit["id"] for hit in hits}) == 1 and {hit["cosine"] for hit in hits} == {"1.000000"}
    found = {(hit["cache"], hit["path"]) for hit in hits}
    assert found == {("cache/xray", "4.png"), ("cache/hospital_b", "4_b.png")}


def test_a_gallery_that_is_named_twice_is_refused(two_galleries, command):
    with pytest.raises(UserError, match="name them once"):
        command(embed, "--search", "my_xray/4.png", "--gallery", "xray.npz", "xray.npz")


def test_after_the_caches_moved_a_search_works_with_their_new_place(two_galleries, command, capsys):
    search_xray = ["--search", "my_xray/4.png", "--modality", "xray", "--top", "1", "--gallery"]
    shutil.move("cache", "archive")
    with pytest.raises(UserError, match="xray.npz: its cache cache/xray .*--cache"):
        command(embed, *search_xray, "xray.npz")
    command(embed, *search_xray, "xray.npz", "--cache", "archive/xray")
    assert read_table(capsys.readouterr().out)[0]["cache"] == "archive/xray"
    command(embed, *search_xray, "ultrasound.npz", "xray.npz",
            "--cache", "archive/ultrasound", "archive/xray")
    assert read_table(capsys.readouterr().out)[0]["cache"] == "archive/xray"


def test_an_encoder_saved_alone_searches_what_the_whole_checkpoint_embedded(two_galleries, command, capsys):
    save_checkpoint("alone.pt", load_encoder(two_galleries))
    two_galleries.unlink()
    search_xray = ["--search", "my_xray/4.png", "--gallery", "xray.npz", "--top", "1"]
    with pytest.raises(UserError, match="xray.npz: its .*checkpoint.pt is not there: give --checkpoint"):
        command(embed, *search_xray)
    command(embed, *search_xray, "--checkpoint", "alone.pt")
    assert read_table(capsys.readouterr().out)[0]["cosine"] == "1.000000"


def test_a_foreign_encoder_that_no_longer_answers_as_the_gallery_is_refused(two_galleries, command, capsys):
    Path("own.py").write_text("import torch\ndef build():\n    w = torch.load('w.pt')\n"
                              "    return lambda x: (x.float() / 255)[:, 0, 20:40, :, 0].flatten(1) ** w\n")
    sys.modules.pop("own", None)
    torch.save(torch.tensor(1.0), "w.pt")
    command(embed, "cache/xray", "--encoder", "own:build", "--workers", "0", "--out", "own.npz")
    command(embed, "--search", "my_xray/4.png", "--gallery", "own.npz")
    torch.save(torch.tensor(2.0), "w.pt")
    with pytest.raises(UserError, match="own:build no longer gives what is in own.npz"):
        command(embed, "--search", "my_xray/4.png", "--gallery", "own.npz")


def test_a_figure_has_a_query_a_row_at_most_six_tiles_wide(two_galleries, command):
    tile = picture(np.zeros((1, 9, 9, 1), np.uint8), "xray", "")
    for files, top, rows, columns in ((2, 3, 2, 4), (1, 10, 2, 6), (2, 6, 4, 6)):
        command(embed, "--search", *(f"my_xray/{i}.png" for i in range(files)), "--modality", "xray",
                "--top", top, "--gallery", "xray.npz", "ultrasound.npz", "--figure", "hits.jpg")
        with Image.open("hits.jpg") as image:  # between tiles lie 4 pixels
            assert image.format == "JPEG"
            assert image.height + 4 == rows * (tile.shape[1] + 4)
            assert image.width + 4 == columns * (tile.shape[2] + 4)


@pytest.mark.parametrize("name, file_format", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG")])
def test_a_picture_is_what_its_name_says(tmp_path, name, file_format):
    save_montage(tmp_path / name, [[torch.zeros(3, 8, 8)]])
    with Image.open(tmp_path / name) as image:
        assert image.format == file_format


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="a.webm: .*png"):
        save_montage(tmp_path / "a.webm", [[torch.zeros(3, 8, 8)]])


def test_the_gallery_says_what_a_file_is_if_it_holds_one_modality(two_galleries, command, capsys):
    command(embed, "--search", "my_xray/4.png", "--gallery", "ultrasound.npz")
    assert "taken as ultrasound" in capsys.readouterr().err
    command(embed, "--search", "my_ultrasound/4.png", "--gallery", "xray.npz", "ultrasound.npz")
    assert "taken as xray" in capsys.readouterr().err  # no single one: an image is an X-ray, and that is said
    command(embed, "--search", "my_xray/4.png", "--gallery", "ultrasound.npz", "--modality", "xray")
    assert "taken as" not in capsys.readouterr().err


def test_galleries_that_do_not_belong_together_are_named(two_galleries, cache, command):
    search_xray = ["--search", "my_xray/4.png", "--modality", "xray", "--gallery", "xray.npz"]
    torch.manual_seed(2)
    save_checkpoint("other.pt", ViT("vit_t", cls_token=True), flags="{}", step=1)
    with pytest.raises(UserError, match="other.pt is not what made xray.npz"):
        command(embed, *search_xray, "--checkpoint", "other.pt")
    command(embed, "cache/ultrasound", "--checkpoint", "other.pt", "--out", "other.npz", "--workers", "0")
    with pytest.raises(UserError, match="other.npz: its weights_sha256 is missing or differs"):
        command(embed, *search_xray, "other.npz")
    command(embed, cache, "--checkpoint", two_galleries, "--out", "small.npz", "--workers", "0")
    with pytest.raises(UserError, match="small.npz: its sizes is missing or differs"):
        command(embed, *search_xray, "small.npz")
    rows = read_samples("cache/xray")
    np.savez("foreign.npz", embeddings=np.ones((1, 384)), ids=[rows[0]["id"]],
             meta=json.dumps({"cache": "cache/xray"}))
    for galleries in (["foreign.npz"], ["xray.npz", "foreign.npz"]):
        with pytest.raises(UserError, match="foreign.npz: its encoder is missing"):
            command(embed, "--search", "my_xray/4.png", "--modality", "xray", "--gallery", *galleries)


def test_a_pipe_as_query_does_not_hang(two_galleries, tmp_path):
    os.mkfifo("pipe")
    done = run(ROOT / "embed.py", "--search", "pipe", "--gallery", "xray.npz", cwd=tmp_path)
    assert done.returncode == 1 and "pipe" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_any_file_of_a_series_stands_for_it(tmp_path, command, capsys):
    """Two series in one folder: the folder is ambiguous and both are named, a file stands for its series."""
    rng = np.random.default_rng(0)
    for patient in ("a", "b"):
        image = np.int16(rng.integers(-500, 500,
                                      (3, 3, 3)).repeat(8, 0).repeat(8, 1).repeat(4, 2))  # (24, 24, 12)
        write_series(tmp_path / patient, image, (2.0, 2.0, 3.0), patient, rng)
        (tmp_path / "both").mkdir(exist_ok=True)
        for file in (tmp_path / patient).iterdir():
            file.rename(tmp_path / "both" / f"{patient}_{file.name}")
    command(prepare, "folder", "both", "--name", "ct", "--size", "32", "--slices", "8", "--workers", "1")
    command(embed, "cache/ct", "--encoder", "pixels", "--workers", "0", "--out", "ct.npz")
    with pytest.raises(SystemExit, match="1"):
        command(embed, "--search", "both", "--gallery", "ct.npz")
    assert re.search("embed.py: .*both: .*2 samples.*[ab]_IM.*[ab]_IM", capsys.readouterr().err)
    ids = set()
    for patient in ("a", "b"):
        capsys.readouterr()
        command(embed, "--search", f"both/{patient}_IM00005", "--gallery", "ct.npz", "--top", "1")
        (hit,) = read_table(capsys.readouterr().out)
        assert (hit["cosine"], hit["modality"]) == ("1.000000", "ct")
        ids.add(hit["id"])
    assert len(ids) == 2


def test_a_picture_is_framed_in_its_colour_and_fitted_into_the_tile():
    tile = picture(torch.full((1, 10, 20, 1), 255, dtype=torch.uint8), "xray", "one\ntwo", (0, 255, 0))
    assert tile.shape == (3, 192 + 42, 192 + 12) and tile[:, 0, 0].tolist() == [0, 1, 0]
    assert tile[:, 6 + 96, 6 + 96].tolist() == [1, 1, 1]


@pytest.mark.parametrize("hu, level", [(-1000, 0), (-160, 0), (40, 0.5), (240, 1), (1000, 1)])
def test_pictures_show_ct_in_a_soft_tissue_window(hu, level):
    sample = np.full((1, 8, 8, 1), (hu + 1000) / 2000, np.float16)
    tile = picture(sample, "ct", "")
    assert tile[:, 102, 102].tolist() == pytest.approx([level] * 3, abs=0.01)
    assert picture(sample, "mri", "")[0, 102, 102] == pytest.approx((hu + 1000) / 2000, abs=0.01)


def test_pictures_show_ct_of_8_bits_as_it_is():
    """Such files hold what a screen showed, not HU."""
    tile = picture(np.full((1, 8, 8, 1), 128, np.uint8), "ct", "")
    assert tile[0, 102, 102] == pytest.approx(128 / 255, abs=0.01)


@pytest.mark.parametrize("arguments, names", [
    (["nowhere", "--checkpoint", "{checkpoint}"], "nowhere"), (["cache/mixed"], "--checkpoint"),
    (["cache/mixed", "--checkpoint", "text.pt"], "text.pt"),
    (["cache/mixed", "--checkpoint", "no.pt"], "no.pt"),
    (["cache/mixed", "--encoder", "pixels", "--out", "text.pt/e.npz"], "text.pt/e.npz"),
    (["--search", "x.png", "--gallery", "missing.npz"], "missing.npz")])
def test_what_a_user_gets_wrong_is_named(cache, checkpoint, arguments, names, command):
    Path("text.pt").write_text("not a checkpoint")
    with pytest.raises((UserError, OSError), match=names):
        command(embed, *(argument.format(checkpoint=checkpoint) for argument in arguments))


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = run(ROOT / "embed.py", "nowhere", "--encoder", "pixels", cwd=tmp_path)
    assert (done.returncode,
            len(done.stderr.splitlines())) == (1, 1) and done.stderr.startswith("embed.py: nowhere")


SEARCH = ["--search", "x.png", "--gallery", "g.npz"]


@pytest.mark.parametrize("arguments, reason", [
    ([], "give a cache folder"), (["--search", "x.png"], "--gallery"),
    (["cache/a", *SEARCH], "one of the two"), (["cache/a", "--workers", "two"], "two"),
    (["cache/a", "--encoder", "pixels", "--workers", "-1"], "from 0"),
    (["cache/a", "--out", "e.csv"], "end in .npz"), ([*SEARCH, "--out", "hits.npz"], "end in .csv"),
    ([*SEARCH, "--figure", "hits.gif"], "end in one of .png"), ([*SEARCH, "--top", "0"], "from 1"),
    (["cache/a", "--figure", "x.png"], "belong to --search"),
    (["cache/a", "--top", "5"], "belong to --search"),
    ([*SEARCH, "--encoder", "pixels"], "of embedding"), ([*SEARCH, "--cache", "a", "b"], "one --cache")])
def test_wrong_usage_is_exit_code_2_and_says_which(command, capsys, arguments, reason):
    with pytest.raises(SystemExit, match="2"):
        command(embed, *arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
