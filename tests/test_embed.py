"""embed.py: exact search against plain loops, embeddings that no batch or process changes, files that are refused."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embed
import prepare
from embed import (batches_of, embed_rows, first_k, fixed_point, load_embedder, picture, pixels, read_embeddings,
                   search, write_embeddings)
from model import ViT, pool, save_checkpoint
from prepare import UserError, load_sample, read_samples

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    """Run one of the scripts as a user would; returns the finished process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained SimDINO-like encoder (with a CLS token) in a file."""
    torch.manual_seed(1)
    path = tmp_path / "runs" / "tiny" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    flags = json.dumps({"ssl": "simdino", "data_fraction": 0.6})
    save_checkpoint(path, ViT("vit_t", cls_token=True), flags=flags, step=7)
    return path


# ----------------------------------------------------------------------------------------------------------- search
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


def test_ties_go_to_the_lower_index_in_and_between_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((3, 17)).astype(np.float32)
    gallery = directions[generator.integers(0, 3, 50)] * 2.0 ** generator.integers(-3, 4, (50, 1)).astype(np.float32)
    queries = generator.standard_normal((9, 17)).astype(np.float32)
    expected = plain_search(queries, gallery, 12)[1]
    for block in (1, 3, 7, 64):
        monkeypatch.setattr(embed, "GALLERY_BLOCK", block)
        monkeypatch.setattr(embed, "QUERY_BLOCK", block)
        assert search(queries, gallery, 12)[1].tolist() == expected, block


def test_copies_of_a_vector_have_one_score_wherever_they_lie():
    """float32 products do not promise this: sums run in another order at the edge of a block."""
    generator = np.random.default_rng(0)
    for width in (7, 100, 1537):
        gallery = generator.standard_normal((129, width)).astype(np.float32)
        gallery[::4] = gallery[0]
        scores, indices = search(gallery[:1], gallery, 129)
        assert indices[0, :33].tolist() == list(range(0, 129, 4)) and len(set(scores[0, :33].tolist())) == 1
        q, g = fixed_point(gallery[:8]), fixed_point(gallery)
        assert torch.equal(q @ g.T, torch.stack([(q * row).sum(dim=1) for row in g], dim=1))  # to the last bit


def test_first_k_of_all_equal_scores_is_the_first_k():
    values, columns = first_k(torch.zeros(2, 100), 5)
    assert columns.tolist() == [[0, 1, 2, 3, 4]] * 2 and values.tolist() == [[0.0] * 5] * 2


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


@pytest.mark.parametrize("queries, gallery, k", [
    ((2, 4), (3, 4), 0), ((2, 4), (3, 5), 1), ((2, 4), (0, 4), 1), ((4,), (3, 4), 1)])
def test_search_refuses_what_has_no_answer(queries, gallery, k):
    with pytest.raises(UserError):
        search(np.ones(queries, np.float32), np.ones(gallery, np.float32), k)


def test_search_refuses_values_that_are_not_finite():
    gallery = np.ones((3, 4), np.float32)
    gallery[1, 2] = np.nan
    with pytest.raises(UserError, match="embedding 1 "):
        search(gallery[:1], gallery, 1)


# --------------------------------------------------------------------------------------------------------- encoders
def test_embedding_is_cls_and_mean_of_the_patch_tokens(mixed_cache, checkpoint):
    network, meta = load_embedder("m3ret", checkpoint)
    row = next(r for r in read_samples(mixed_cache) if r["modality"] == "ct")
    x = torch.from_numpy(load_sample(mixed_cache, row))[None]
    torch.manual_seed(1)
    vit = ViT("vit_t", cls_token=True).eval()  # what the fixture saved
    with torch.no_grad():
        tokens = vit((x.float() / 255 - 0.5) / 0.5)
        assert torch.equal(network(x), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    assert (meta["pool"], meta["run"]) == ("mix", {"ssl": "simdino", "data_fraction": 0.6, "step": 7})
    assert meta["parameters"] == sum(p.numel() for p in vit.parameters())


def test_untrained_encoder_has_the_architecture_but_not_the_weights(checkpoint):
    x = torch.randint(0, 256, (1, 1, 32, 32, 1), dtype=torch.uint8)
    (trained, a), (first, b), (again, _) = (load_embedder(name, checkpoint) for name in ("m3ret", "random", "random"))
    assert a["parameters"] == b["parameters"] and b["pool"] == "mix"
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), trained(x))


def test_pixels_are_the_mean_slice_and_compare_by_correlation():
    """A ramp down the slices of constant volumes is flat; an image equals itself brighter and with more contrast."""
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


def test_dinov2_comes_from_a_clone_and_a_weight_file(tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "hubconf.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.zeros(4))\n\n    def forward(self, x):\n"
        "        return self.w.expand(len(x), 4)\n\n\n"
        "def dinov2_vits14_reg(pretrained=True):\n    assert not pretrained\n    return Net()\n")
    weights = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save({"w": torch.arange(4.0)}, weights)
    network, meta = load_embedder(f"dinov2:{tmp_path / 'clone'}", weights)
    assert network(torch.zeros(2, 1, 20, 20, 3, dtype=torch.uint8)).tolist() == [[0, 1, 2, 3]] * 2
    assert meta["checkpoint"] == str(weights) and meta["parameters"] == 4
    with pytest.raises(UserError, match="hubconf"):
        load_embedder(f"dinov2:{tmp_path}", weights)


@pytest.mark.parametrize("name", ["nonsense", "no_such_module:f", "math:no_such_function", "m3ret"])
def test_unknown_encoders_are_named(name):
    with pytest.raises(UserError, match=name.split(":")[0]):
        load_embedder(name, None)


# ------------------------------------------------------------------------------------------------------- embeddings
def test_every_id_once_in_the_order_of_the_table(mixed_cache, tmp_path):
    rows = read_samples(mixed_cache)[::-1]
    rows = rows[1::2] + rows[::2]  # shapes in turn
    assert sorted(sum(batches_of(rows), [])) == list(range(len(rows)))
    embed_rows(rows, pixels, {"encoder": "pixels"}, tmp_path / "e.npz", workers=0)
    embeddings, ids, meta = read_embeddings(tmp_path / "e.npz")
    assert ids == [row["id"] for row in rows] and meta["cache"] == str(mixed_cache)
    assert meta["sizes"] == {"size": 32, "slices": 8, "frames": 16}
    for i in (0, 5, 23):
        x = torch.from_numpy(load_sample(mixed_cache, rows[i]))[None]
        np.testing.assert_allclose(embeddings[i], pixels(x)[0], atol=1e-6)
    assert [path.name for path in tmp_path.glob("*.parts")] == []


def test_an_interrupted_run_goes_on_where_it_stopped(mixed_cache, tmp_path):
    rows, calls = read_samples(mixed_cache), []

    def breaks(x):
        calls.append(x.shape)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pixels(x)
    with pytest.raises(KeyboardInterrupt):
        embed_rows(rows, breaks, {"encoder": "pixels"}, tmp_path / "e.npz", workers=0)
    assert not (tmp_path / "e.npz").exists()
    embed_rows(rows, breaks, {"encoder": "pixels"}, tmp_path / "e.npz", workers=0)
    assert len(calls) == 1 + len(batches_of(rows))
    embed_rows(rows, pixels, {"encoder": "pixels"}, tmp_path / "whole.npz", workers=0)
    assert (tmp_path / "e.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named_in_one_line(mixed_cache, tmp_path, workers):
    rows = read_samples(mixed_cache)
    (mixed_cache / f"{rows[3]['id']}.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=rows[3]["id"]) as caught:
        embed_rows(rows, pixels, {"encoder": "pixels"}, tmp_path / "e.npz", workers=workers)
    assert "\n" not in str(caught.value) and not (tmp_path / "e.npz").exists()


def test_8_bit_and_deeper_samples_of_one_shape_keep_their_scale(tmp_path, mixed_cache):
    rows = [row for row in read_samples(mixed_cache) if row["modality"] == "xray"][:2]
    half = np.repeat([0, 1], 16)[None, None, :, None] * np.ones((1, 32, 1, 1))  # left black, right white
    np.save(mixed_cache / f"{rows[0]['id']}.npy", np.uint8(51 * half))
    np.save(mixed_cache / f"{rows[1]['id']}.npy", np.float16(0.2 * half))
    embed_rows(rows, pixels, {"encoder": "pixels"}, tmp_path / "e.npz", workers=0)
    expected = np.tile(np.repeat([-0.1, 0.1], 16), (2, 32))  # (2, 1024): both are .2 wide, less their mean
    np.testing.assert_allclose(read_embeddings(tmp_path / "e.npz")[0], expected, atol=1e-3)


def test_two_processes_write_what_one_writes(mixed_cache, checkpoint, tmp_path):
    two = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29713", ROOT / "embed.py",
              mixed_cache, "--checkpoint", checkpoint, "--workers", "0", "--out", tmp_path / "two.npz", cwd=tmp_path)
    assert two.returncode == 0 and two.stdout.count("24 embeddings") == 1, two.stderr
    embed_rows(read_samples(mixed_cache), *load_embedder("m3ret", checkpoint), tmp_path / "one.npz", workers=0)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("content", [
    b"", b"not a zip", {"embeddings": np.ones((2, 3))}, {"ids": np.array(["a"]), "embeddings": np.ones((2, 3))},
    {"ids": np.array(["a", "a"]), "embeddings": np.ones((2, 3))}, {"ids": np.arange(1), "embeddings": np.ones((1, 3))},
    {"ids": np.array(["a"]), "embeddings": np.full((1, 3), np.nan)},
    {"ids": np.array([], str), "embeddings": np.ones((0, 3))},
    {"ids": np.array(["a"]), "embeddings": np.array([[object()]])},
    {"ids": np.array(["a"]), "embeddings": np.ones((1, 3)), "meta": "no json"}])
def test_files_that_are_no_embeddings_are_refused(tmp_path, content):
    path = tmp_path / "e.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(UserError, match="e.npz"):
        read_embeddings(path)


def test_embeddings_survive_the_file(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    write_embeddings(tmp_path / "e.npz", x, ["b", "a", "c"], {"encoder": "x"})
    embeddings, ids, meta = read_embeddings(tmp_path / "e.npz")
    assert np.array_equal(embeddings, x) and ids == ["b", "a", "c"] and meta == {"encoder": "x"}
    np.savez(tmp_path / "other.npz", embeddings=x.astype(np.float64), ids=np.array(["b", "a", "c"]))  # made by anyone
    assert np.array_equal(read_embeddings(tmp_path / "other.npz")[0], x)


# ------------------------------------------------------------------------------------------------------ command line
@pytest.fixture
def command(tmp_path, monkeypatch):
    """Call a script's main as `python script.py arguments` would, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()
    return call


def test_an_encoder_of_ones_own(mixed_cache, tmp_path, command):
    (tmp_path / "mine.py").write_text("def build():\n    return lambda x: x.float().flatten(1)[:, :6]\n")
    command(embed, mixed_cache, "--encoder", "mine:build", "--workers", "0")
    embeddings, ids, meta = read_embeddings("emb.npz")
    row = next(r for r in read_samples(mixed_cache) if r["id"] == ids[0])
    assert embeddings[0].tolist() == load_sample(mixed_cache, row).ravel()[:6].tolist()  # uint8, as it is cached
    assert meta["encoder"] == "mine:build"


def test_a_file_finds_itself(checkpoint, tmp_path, command, capsys):
    """prepare -> embed -> search: the source file of a sample comes back first, and its path is not told."""
    generator = np.random.default_rng(0)
    (tmp_path / "secret_name").mkdir()
    for i in range(6):
        noise = Image.fromarray(generator.integers(0, 256, (5, 7), dtype=np.uint8))
        noise.resize((70, 50)).save(tmp_path / "secret_name" / f"{i}.png")
    (tmp_path / "labels.csv").write_text("path,labels\n" + "".join(f"{i}.png,kind {i}\n" for i in range(6)))
    command(prepare, "folder", "secret_name", "--name", "mine", "--modality", "xray", "--labels", "labels.csv",
            "--size", "64")
    command(embed, "cache/mine", "--checkpoint", checkpoint, "--workers", "0")
    capsys.readouterr()
    search_for_4 = ["--search", "secret_name/4.png", "--modality", "xray", "--gallery", "emb.npz"]
    command(embed, *search_for_4, "--top", "2", "--figure", "hits.png")
    head, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["1", "1.000"] and first.endswith("kind 4")
    assert "secret_name" not in head + first + second
    with Image.open("hits.png") as image:
        assert image.size[0] > 2 * image.size[1]  # three tiles side by side
    torch.manual_seed(2)
    save_checkpoint("other.pt", ViT("vit_t", cls_token=True))
    with pytest.raises(UserError, match="other.pt is not the checkpoint"):
        command(embed, *search_for_4, "--checkpoint", "other.pt")


def test_picture_marks_and_scales():
    tile = picture(torch.full((1, 10, 20, 1), 255, dtype=torch.uint8), "one\ntwo", (0, 255, 0), size=96)
    assert tile.shape == (3, 96 + 42, 96 + 12) and tile[:, 0, 0].tolist() == [0, 1, 0]
    assert tile[:, 30, 50].tolist() == [1, 1, 1]


@pytest.mark.parametrize("arguments, names", [
    (["nowhere", "--checkpoint", "x.pt"], "nowhere"), (["cache/mixed"], "--checkpoint"),
    (["cache/mixed", "--checkpoint", "text.pt"], "text.pt"), (["cache/mixed", "--checkpoint", "no.pt"], "no.pt"),
    (["cache/mixed", "--encoder", "pixels", "--out", "text.pt/e.npz"], "text.pt/e.npz"),
    (["--search", "x.png", "--gallery", "missing.npz"], "missing.npz")])
def test_what_a_user_gets_wrong_is_named(mixed_cache, arguments, names, command):
    Path("text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=names):
        command(embed, *arguments)


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = run(ROOT / "embed.py", "nowhere", "--encoder", "pixels", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1) and done.stderr.startswith("embed.py: nowhere")


def test_wrong_usage_is_exit_code_2(command):
    for arguments in ([], ["--search", "x.png"], ["cache/a", "--search", "x.png", "--gallery", "g.npz"]):
        with pytest.raises(SystemExit, match="2"):
            command(embed, *arguments)
