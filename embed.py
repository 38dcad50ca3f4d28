"""Embeddings of cached samples, and exact search among them (paper Sec. 3.2, 3.3, C.2).

In:  cache/NAME (prepare.py) and runs/NAME/checkpoint.pt (train.py), or any other encoder.
Out: emb.npz: embeddings (n, D) float32, not normalised; ids (n,); meta, JSON of how they were made.
     python embed.py cache/NAME --checkpoint runs/NAME/checkpoint.pt --out emb.npz
     python embed.py --search scan.nii.gz --gallery ct.npz mri.npz --figure hits.png
     python embed.py --search new/*.dcm --gallery xray.npz --out hits.csv
Under torchrun processes share the first of these. If --out exists, only what is new is embedded.
Letters beside those of model.py: m queries, n samples of a gallery, b rows of a block or of a batch
that is not filled up; D is the width of embeddings.

From Python:
    from prepare import read_any
    from embed import apply_encoder, load_embedder, read_embeddings, search
    gallery = read_embeddings("emb.npz")
    embedder = load_embedder("m3ret", "runs/NAME/checkpoint.pt")
    modality, sample = read_any("scan.nii.gz", **gallery.meta["sizes"])
    scores, indices = search(apply_encoder(embedder, sample[None]), gallery.vectors, k=3)
    labels = [gallery.rows[i]["labels"] for i in indices[0]]
"""
import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import (FRAME_GREY, GRID_CELLS, PICTURE_FORMATS, ViT, display_range, draw_tile,
                   load_encoder, normalize, pool, read_checkpoint, sample_kind, save_montage, stack,
                   take_frames_evenly, unit, weights_sha256)
from prepare import (MODALITIES, CachedDataset, UserError, atomic_write, cli, load_sample, read_any,
                     read_samples, read_sizes)

# A search multiplies blocks of this many rows: that makes 34 MB of scores at a time.
QUERY_BLOCK = 2048
GALLERY_BLOCK = 4096

# Samples in a batch. Every batch has this size, the last one is filled up, because the last digits
# of an embedding depend on the size of its batch, but not on what else is in it.
EMBED_BATCH = {"image": 16, "video": 4, "volume": 4}

# What the meta of two files must have in common for their embeddings to be comparable.
SAME_ENCODER = ("encoder", "weights_sha256", "code_sha256", "pool")
MUST_MATCH = SAME_ENCODER + ("sizes",)

# Floats of samples may leave [0, 1] by this much.
VALUE_TOLERANCE = 1e-3

# Two machines, or bf16 and fp32, may differ in an embedding by this share of its length.
ANSWER_TOLERANCE = 0.05

HIT_COLUMNS = ("query", "rank", "cosine", "modality", "labels", "cache", "id", "path")
TILES_IN_A_ROW = 6  # of a figure


# ---- search -------------------------------------------------------------------------------------
def search_block(q, g, k):
    """Unit vectors (m, D), (b, D) -> scores and indices of the best, (m, min(k, b)) each."""
    scores = []
    indices = []
    for part in q.split(QUERY_BLOCK):
        best = (part @ g.T).topk(min(k, len(g)), dim=1)  # values, indices (part, min(k, b))
        scores.append(best.values)
        indices.append(best.indices)
    return torch.cat(scores), torch.cat(indices)


def search(queries, gallery, k):
    """Exact cosine top-k (Sec. C.2): queries (m, D), gallery (n, D) -> scores, indices.

    Both are arrays or tensors, normalised or not, and are searched on the queries' device; the
    gallery may be a memory map larger than memory. scores (m, min(k, n)): cosines, float32, best
    first; a vector of zeros has 0. indices (m, min(k, n)): rows of the gallery, int64. Equal scores
    come in any order.
    UserError: k < 1, an empty gallery, another shape or width, values that are not finite.
    """
    if k < 1:
        raise UserError(f"the number of matches to look for must be at least 1, not {k}")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError("queries (m, D) and gallery (n, D) must have one width D, not "
                        f"{tuple(queries.shape)} and {tuple(gallery.shape)}")
    if len(gallery) == 0:
        raise UserError("the gallery is empty")

    # The best k so far are kept while the gallery is read block by block.
    q = F.normalize(torch.as_tensor(queries).float(), dim=1)  # (m, D)
    scores = q.new_empty(len(q), 0)
    indices = q.new_empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(gallery), GALLERY_BLOCK):
        block = gallery[start:start + GALLERY_BLOCK]
        if not torch.is_tensor(block):
            block = torch.tensor(block)  # a copy: the array may be a read-only map
        g = F.normalize(block.to(q), dim=1)  # (b, D)
        block_scores, block_indices = search_block(q, g, k)  # (m, up to k) each

        # Of those kept before and those of this block, the best k are kept.
        scores = torch.cat([scores, block_scores], dim=1)  # (m, up to 2k)
        indices = torch.cat([indices, start + block_indices], dim=1)  # (m, up to 2k)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)  # (m, up to k)
        indices = indices.gather(1, order)

    # topk puts NaN first, so that none is overlooked.
    if scores.isnan().any():
        raise UserError("embeddings hold values that are not finite: embed these samples again")
    return scores, indices


def centre_parts(queries, gallery, parts):
    """Vectors of --pool grid -> vectors to compare, tensors (m, D), (n, D).

    Beyond the paper (docs/learning.md). queries (m, D) and gallery (n, D) are arrays or tensors, of
    parts of these widths. From each part its mean over the gallery is subtracted, and it is scaled
    to length one, so that all parts count alike; the cosine of two vectors is then that of their
    parts. A gallery of one sample, which is its own mean, becomes zeros.
    """
    gallery = torch.as_tensor(gallery)
    mean = gallery.mean(dim=0)  # (D,)

    def centred(vectors):  # (n, D) -> (n, D)
        split = (vectors - mean).split(parts, dim=1)  # (n, width) for each of parts
        return torch.cat([F.normalize(part, dim=1) for part in split], dim=1)  # (n, D)
    return centred(torch.as_tensor(queries)), centred(gallery)


# ---- encoders -----------------------------------------------------------------------------------
def pixels(x):
    """Baseline (B, C, H, W, S) -> (B, 1024): the mean slice in 32 x 32 pixels, less their mean."""
    x = unit(x).mean(dim=(1, 4))  # (B, H, W)
    # Subtracting a pixel makes a flat image exactly zero. Subtracting its mean alone would leave
    # noise of rounding.
    x = x - x[:, :1, :1]
    x = F.adaptive_avg_pool2d(x, 32).flatten(1)  # (B, 1024)
    # Without its mean, the cosine of two images is their correlation.
    return x - x.mean(dim=1, keepdim=True)


def by_slices(network, size=224, chunk=128):
    """A 2D network (n, 3, size, size) -> (n, D) as an encoder of samples: the mean over slices.

    Slices (or frames) are normalised by ImageNet's mean and deviation and pass `chunk` at a time.
    """
    def embed(x):  # (B, C, H, W, S) -> (B, D)
        slices = unit(take_frames_evenly(x)).permute(0, 4, 1, 2, 3)  # (B, S, C, H, W)
        mean = slices.new_tensor([0.485, 0.456, 0.406])[:, None, None]  # (3, 1, 1)
        std = slices.new_tensor([0.229, 0.224, 0.225])[:, None, None]  # (3, 1, 1)
        images = (slices - mean) / std  # (B, S, 3, H, W), grey is broadcast to 3 channels
        images = images.flatten(0, 1)  # (B * S, 3, H, W)

        features = []
        for part in images.split(chunk):  # (chunk, 3, H, W)
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            features.append(network(part))  # (chunk, D)
        features = torch.cat(features).float()  # (B * S, D)
        return features.unflatten(0, slices.shape[:2]).mean(dim=1)  # (B, D)
    return embed


class Embedder(NamedTuple):
    """What load_embedder gives: how samples are embedded, and what is known of it."""
    embed: Callable  # cached samples (B, C, H, W, S) -> (B, D)
    meta: dict  # for the npz
    seen_ids: object  # (n,) int64, ids of the samples it was trained on; None if unknown


def load_foreign_encoder(name, device):
    """module:function -> what function() returns, and the sha256 of the module's file.

    The module is looked for in the working folder first. The hash is of that one file: nothing is
    known of the weights and other modules that it reads.
    """
    module_name, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        make = getattr(module, function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--encoder {name}: {error}; choose m3ret, random, pixels or a "
                        "module:function of your own") from None
    try:
        code_sha256 = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        with torch.device(device):  # where the tensors of a network that it makes will be
            embed = make()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--encoder {name}: {function}() failed: {error}") from error
    if not callable(embed):
        raise UserError(f"--encoder {name}: the encoder must be a function of samples "
                        f"(B, C, H, W, S), but {function}() returned {embed!r}")
    return embed, code_sha256


def load_vit(name, checkpoint, device, pooling):
    """The encoder of a checkpoint ("m3ret"), or an untrained one like it ("random") -> Embedder."""
    state = read_checkpoint(checkpoint)
    network = load_encoder(checkpoint, device, state)
    # Nobody knows what it has seen if the file does not say, or if it began with a foreign network.
    seen_ids = state.get("ids")
    if not state.get("ids_known", True):
        seen_ids = None
    if name == "random":
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they were
            torch.manual_seed(0)
            network = ViT(**network.config).to(device).eval()
        seen_ids = []

    # The widths of the parts of a vector: [CLS,] avg and, with "grid", all cells as one part.
    has_cls = network.cls_token is not None
    parts = [network.dim] * (2 if has_cls else 1)
    if pooling == "grid":
        parts.append(GRID_CELLS**2 * network.dim)
    else:
        pooling = "mix" if has_cls else "avg"

    meta = {
        "encoder": name,
        "pool": pooling,
        "parts": parts,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": state["sha256"],
        "weights_sha256": weights_sha256(network),
        "code_sha256": "",  # only foreign encoders have one
        "flags": state.get("flags"),
        "step": state.get("step"),
        "total": state.get("total"),  # steps of the whole run
        "parameters": sum(p.numel() for p in network.parameters()),
    }

    def embed(x):  # no augmentation; of longer videos 16 evenly spaced frames
        x = normalize(unit(take_frames_evenly(x)))  # (B, C, H, W, S)
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            tokens = network(x)  # (B, [1+]N, dim)
        return pool(tokens, pooling, has_cls, network.grid(x.shape[2:]))  # (B, D), D = sum(parts)
    return Embedder(embed, meta, seen_ids)


def load_embedder(name, checkpoint=None, device="cpu", pooling=""):
    """Encoder -> Embedder: a function of cached samples (B, C, H, W, S) -> (B, D), and its origin.

    name: "m3ret" is the checkpoint's encoder, its tokens pooled to mix = [CLS, avg] (Sec. 3.3), or
    to avg if it has no CLS token (Sec. 3.2); "random" is the same, untrained; "pixels" is the
    baseline above; "module:function" is what that function returns.
    checkpoint: a file of train.py or an encoder saved alone; only m3ret and random take one.
    device: where it will run, "cpu" or "cuda:0". Use it through `apply_encoder`, which checks.
    pooling: "grid" adds where things are (model.pool; beyond the paper); its vectors must pass
    `centre_parts` before `search`.
    UserError: an unknown name; a checkpoint that is missing, superfluous, damaged or foreign.
    """
    if name in ("m3ret", "random"):
        if not checkpoint:
            raise UserError(f"--encoder {name}: needs the --checkpoint of a run of train.py")
        return load_vit(name, checkpoint, device, pooling)

    if pooling:
        raise UserError(f"--encoder {name}: has no tokens for --pool {pooling}; leave it out")
    if checkpoint:
        raise UserError(f"--encoder {name}: has no use for a --checkpoint; leave it out")
    meta = {"encoder": name, "checkpoint": "", "checkpoint_sha256": "", "weights_sha256": "",
            "code_sha256": "", "pool": ""}
    if name == "pixels":
        return Embedder(pixels, meta, [])
    embed, meta["code_sha256"] = load_foreign_encoder(name, device)
    return Embedder(embed, meta, None)


def apply_encoder(embedder, x, names=None, device="cpu"):
    """Samples (B, C, H, W, S) -> their embeddings (B, D), float32 on the CPU, not normalised.

    embedder: what load_embedder gave for this device, or its function alone.
    x: an array or tensor as read_any and the cache give it, C = 1 (grey) or 3 (colour), uint8 in
    0..255 or floats in [0, 1]. names: what errors call the samples.
    UserError: another shape, type or range; an encoder that gives no vectors, or not finite ones.
    """
    x = torch.as_tensor(x).to(device)
    if x.ndim != 5 or x.shape[1] not in (1, 3):
        raise UserError(f"samples must be (B, C, H, W, S) with C 1 or 3, not {tuple(x.shape)}; "
                        "one sample alone is x[None]")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise UserError(f"samples must be uint8 in 0..255 or floats in [0, 1], not {x.dtype}")
    if x.is_floating_point():
        outside = (x < -VALUE_TOLERANCE) | (x > 1 + VALUE_TOLERANCE)  # (B, C, H, W, S)
        if outside.any():
            raise UserError(f"floats must lie in [0, 1], not in [{x.min():.4g}, {x.max():.4g}]: "
                            "divide 8-bit values by 255, scale CT from a window of HU, or let "
                            "read_any do it")
    # NumPy makes float64 of most numbers; networks take float32.
    if x.dtype == torch.float64:
        x = x.float()

    embed = embedder.embed if isinstance(embedder, Embedder) else embedder
    with torch.inference_mode():
        vectors = embed(x)  # (B, D)

    # The encoder may be anybody's, so what it gives is checked.
    if not torch.is_tensor(vectors):
        raise UserError(f"the encoder gave {type(vectors).__name__}, not a tensor ({len(x)}, D)")
    if vectors.ndim != 2 or len(vectors) != len(x):
        raise UserError(f"the encoder gave {tuple(vectors.shape)}, not ({len(x)}, D)")
    finite = vectors.isfinite().all(dim=1)  # (B,)
    if not finite.all():
        i = finite.tolist().index(False)
        name = names[i] if names else f"sample {i}"
        raise UserError(f"{name} embeds to values that are not finite: if it holds NaN or infinite "
                        "values, prepare it again")
    return vectors.float().cpu()


# ---- embedding files ----------------------------------------------------------------------------
class EmbeddingFile(NamedTuple):
    """What an npz holds."""
    ids: list  # n strings
    vectors: np.ndarray  # (n, D) float32
    meta: dict


class Embeddings(NamedTuple):
    """An npz, and the rows of samples.csv that it is of."""
    rows: list  # in the npz's order
    vectors: np.ndarray  # (n, D) float32
    meta: dict


def list_seen(ids, seen_ids):
    """Those of the ids that the encoder was trained on; None if nobody knows."""
    if seen_ids is None:
        return None
    # A checkpoint keeps ids, which are 16 hex digits, as signed 64-bit numbers.
    numbers = np.array([int(name, 16) for name in ids], np.uint64).view(np.int64)  # (n,)
    found = np.isin(numbers, np.asarray(seen_ids))  # (n,)
    return [name for name, seen in zip(ids, found) if seen]


def write_npz(out, rows, vectors, embedder, started):
    """Write the vectors (n, D) of n rows of one cache, and how they were made.

    The file bears the time `started` (ns): a sample that was written since is newer than it.
    """
    ids = [row["id"] for row in rows]
    folder = rows[0]["folder"]
    seen = list_seen(ids, embedder.seen_ids)
    meta = embedder.meta | {"cache": folder, "sizes": read_sizes(folder), "seen": seen}
    with atomic_write(out) as file:
        np.savez(file, embeddings=vectors.numpy(), ids=ids, meta=json.dumps(meta))
        file.flush()
        os.utime(file.fileno(), ns=(started, started))


def read_npz(path):
    """An embedding file -> EmbeddingFile. UserError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors = file["embeddings"]
            ids = file["ids"]
            meta = json.loads(str(file["meta"])) if "meta" in file else {}
        if vectors.dtype.kind != "f" or vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError("embeddings must be finite floats (n, D)")
        if ids.dtype.kind != "U" or ids.shape != vectors.shape[:1]:
            raise ValueError("ids must be n strings")
        if len(ids) == 0:
            raise ValueError("it is empty")
        if len(np.unique(ids)) < len(ids):
            raise ValueError("an id comes twice")
        if not isinstance(meta, dict):
            raise ValueError("meta must be a JSON object")
        if meta.get("pool") == "grid" and sum(meta.get("parts", [])) != vectors.shape[1]:
            raise ValueError("its pool is grid, but its parts are not those of its vectors")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError,
            zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no embedding file ({error}): make it with embed.py") from None
    return EmbeddingFile(ids.tolist(), vectors.astype(np.float32), meta)


def find_cache(path, meta):
    """The cache that an embedding file is of: where its meta says, or beside the file."""
    if "cache" not in meta:
        raise UserError(f"{path} does not say which cache it is of: give --cache FOLDER")
    folder = Path(meta["cache"])
    beside = Path(path).parent
    for place in (folder, beside / folder, beside / folder.name):
        if (place / "samples.csv").is_file():
            return place
    raise UserError(f"{path}: its cache {folder} is not there, nor beside it: give --cache FOLDER")


def read_embeddings(path, cache=None):
    """An npz of embeddings -> Embeddings, the rows of its cache's samples.csv in its order.

    cache: the folder of the samples; by default where meta says, else of that name beside the npz.
    UserError: no such file, another content, a cache that is not found or lacks samples of it.
    """
    # The rows of all its ids must be in the cache.
    file = read_npz(path)
    folder = cache or find_cache(path, file.meta)
    rows = {row["id"]: row for row in read_samples(folder)}
    missing = len(set(file.ids) - rows.keys())
    if missing == len(file.ids):
        raise UserError(f"{path} holds ids that are not in {folder}, not even one: give the cache "
                        "it is of")
    if missing:
        raise UserError(f"{path} holds {missing} ids that are not in {folder}: the cache has "
                        "changed since: embed it again")
    return Embeddings([rows[name] for name in file.ids], file.vectors, file.meta)


def find_difference(meta, other, keys):
    """The first of the keys that one of two metas lacks, or that differs; None if they agree."""
    for key in keys:
        if key not in meta or key not in other or meta[key] != other[key]:
            return key
    return None


# ---- embedding a cache --------------------------------------------------------------------------
class Kept(NamedTuple):
    """What of an earlier file goes into the new one."""
    row_numbers: list  # of the samples that need no embedding
    vectors: torch.Tensor  # (kept, D), their embeddings
    dropped: int  # ids of the earlier file that have no row any more


NOTHING_KEPT = Kept([], torch.empty(0, 0), 0)


class NothingToKeep(Exception):
    """Says why all samples must be embedded, although the file is there."""


def list_batches(rows, row_numbers):
    """Row numbers in lists of at most EMBED_BATCH; the samples of a batch have one shape."""
    batches = []
    for shape in sorted({rows[i]["shape"] for i in row_numbers}):
        members = [i for i in row_numbers if rows[i]["shape"] == shape]
        size = EMBED_BATCH[sample_kind(shape)]
        for start in range(0, len(members), size):
            batches.append(members[start:start + size])
    return batches


def embed_batch(x, rows, embedder, device):
    """Samples (b, C, H, W, S) of b rows -> (b, D), the same whatever else is in the batch."""
    missing = EMBED_BATCH[sample_kind(x.shape[1:])] - len(x)
    filling = x[-1:].expand(missing, -1, -1, -1, -1)
    x = torch.cat([x, filling])  # (EMBED_BATCH, C, H, W, S)
    names = [f"{row['folder']}/{row['id']}.npy" for row in rows]
    names += names[-1:] * missing
    return apply_encoder(embedder, x, names, device)[:len(rows)]


def meet_processes(rows, meta):
    """Join torchrun's processes. UserError unless all read one checkpoint and one samples.csv."""
    if not dist.is_initialized():
        # The fastest process waits for the slowest, however long that takes.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    known = hashlib.sha256(json.dumps([meta, rows]).encode()).hexdigest()
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, known)
    if len(set(answers)) == 1:
        return
    if dist.get_rank() > 0:
        sys.exit(1)  # the first process says why
    raise UserError("the processes read different checkpoints or tables: one was replaced "
                    "meanwhile; start again")


def gather_rows(vectors, batches, rank, world):
    """The first process receives, into its vectors (n, D), the rows that the others embedded.

    vectors is None in a process that had no batch; the first one has a batch if there are any.
    """
    for other in range(1, world):
        share = batches[other::world]
        if not share:
            continue
        row_numbers = np.concatenate(share)
        if rank == other:
            dist.send(vectors[row_numbers], dst=0)
        if rank == 0:
            part = torch.empty(len(row_numbers), vectors.shape[1])
            dist.recv(part, src=other)
            vectors[row_numbers] = part


def read_earlier(out, rows, embedder):
    """An existing file `out` -> EmbeddingFile. NothingToKeep unless of this encoder and cache."""
    folder = rows[0]["folder"]
    try:
        file = read_npz(out)
    except UserError as error:
        raise NothingToKeep(f"{out} cannot be used ({error})") from None

    meta = embedder.meta | {"sizes": read_sizes(folder)}
    differs = find_difference(file.meta, meta, MUST_MATCH)
    if differs:
        raise NothingToKeep(f"{out} was made otherwise: its {differs} is missing or differs")
    cache = file.meta.get("cache", "")
    if os.path.realpath(cache) != os.path.realpath(folder):
        raise NothingToKeep(f"{out} is of another cache ({cache})")
    return file


def find_unchanged(rows, ids, started):
    """Numbers of the rows whose id is among ids and whose array is older than `started` (ns)."""
    row_numbers = []
    for i, row in enumerate(rows):
        array = Path(row["folder"], f"{row['id']}.npy")
        if row["id"] not in ids or not array.exists():
            continue
        # An old array that was put in its place lately has an old mtime, but a new ctime.
        status = array.stat()
        if max(status.st_mtime_ns, status.st_ctime_ns) < started:
            row_numbers.append(i)
    return row_numbers


def check_kept(kept, rows, embedder, out, device):
    """Embed the first sample of each shape again. NothingToKeep unless its vector is the same.

    A foreign encoder may have other weights by now, and another machine gives other digits.
    """
    seen = set()
    for i, vector in zip(kept.row_numbers, kept.vectors):
        row = rows[i]
        if row["shape"] in seen:
            continue
        seen.add(row["shape"])
        x = torch.from_numpy(load_sample(row["folder"], row))[None]  # (1, C, H, W, S)
        answer = embed_batch(x, [row], embedder, device)[0]  # (D,)
        if not torch.equal(answer, vector):
            raise NothingToKeep(f"{out} holds other vectors than this encoder gives here and now "
                                "(other weights, machine, torch or number of threads)")


def find_kept(out, rows, embedder, device):
    """What of an existing file `out` may stay -> Kept. NothingToKeep if nothing may."""
    # The time of the file is the start of the run that wrote it. It is read before the file: if
    # another run replaces it in between, samples count as newer than they are, which is safe.
    started = os.stat(out).st_mtime_ns
    file = read_earlier(out, rows, embedder)
    number_in_file = {name: j for j, name in enumerate(file.ids)}

    row_numbers = find_unchanged(rows, number_in_file, started)
    numbers = [number_in_file[rows[i]["id"]] for i in row_numbers]
    vectors = torch.from_numpy(file.vectors[numbers])  # (kept, D)
    dropped = number_in_file.keys() - {row["id"] for row in rows}

    kept = Kept(row_numbers, vectors, len(dropped))
    check_kept(kept, rows, embedder, out, device)
    return kept


def embed_share(vectors, rows, batches, embedder, device, workers, quiet):
    """Embed batches into their rows of vectors (n, D), which is made if it is None -> vectors."""
    loader = DataLoader(CachedDataset(rows), batch_sampler=batches, num_workers=workers,
                        collate_fn=stack)
    bar = tqdm(loader, desc="embed", unit="batch", disable=quiet, leave=False)
    for batch, x in zip(batches, bar):
        found = embed_batch(x, [rows[i] for i in batch], embedder, device)  # (b, D)

        # Only the first batch tells the width D, unless an earlier file told it.
        if vectors is None:
            vectors = torch.empty(len(rows), found.shape[1])
        if found.shape[1] != vectors.shape[1]:
            raise UserError(f"the encoder gave vectors of {vectors.shape[1]} numbers, and of "
                            f"{found.shape[1]}")
        vectors[batch] = found
    return vectors


def plan_work(rows, embedder, out, device, rank, world):
    """What of `out` is kept (known to the first process), and the numbers of the rows to embed."""
    kept = NOTHING_KEPT
    if rank == 0 and os.path.exists(out):
        try:
            kept = find_kept(out, rows, embedder, device)
        except NothingToKeep as reason:
            print(f"{reason}: all samples are embedded anew")
    todo = sorted(set(range(len(rows))) - set(kept.row_numbers))
    if world > 1:
        message = [todo]
        dist.broadcast_object_list(message, src=0)
        todo = message[0]
    return kept, todo


def embed_rows(rows, embedder, out, device="cpu", workers=2):
    """Embed rows of one cache into the file `out`, by what load_embedder gave.

    What `out` already holds of the same encoder and cache is kept, and only the rest is embedded.
    To the last digit the file is what embedding all gives: one kept sample of each shape is
    embedded again to see that. torchrun's processes share the work.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        meet_processes(rows, embedder.meta)

    # The first process decides what is kept and what is embedded.
    started = time.time_ns()
    kept, todo = plan_work(rows, embedder, out, device, rank, world)

    # Every process embeds its share of the batches, and the first gathers them.
    vectors = None  # (n, D)
    if kept.row_numbers:
        vectors = torch.empty(len(rows), kept.vectors.shape[1])
        vectors[kept.row_numbers] = kept.vectors
    batches = list_batches(rows, todo)
    mine = batches[rank::world]
    vectors = embed_share(vectors, rows, mine, embedder, device, workers, quiet=rank > 0)
    gather_rows(vectors, batches, rank, world)
    if rank > 0:
        return

    write_npz(out, rows, vectors, embedder, started)
    print(f"{len(rows)} embeddings in {out}: {len(kept.row_numbers)} kept, {len(todo)} embedded, "
          f"{kept.dropped} dropped")


# ---- search by file -----------------------------------------------------------------------------
def picture(sample, modality, caption, colour=FRAME_GREY):
    """Sample (C, H, W, S) -> its middle slice as a tile (3, y, x) in [0, 1], framed, captioned."""
    sample = torch.as_tensor(sample)
    middle = sample[..., sample.shape[-1] // 2]  # (C, H, W)
    return draw_tile(middle, caption, display_range(sample, modality), colour=colour)


class Query(NamedTuple):
    """A file that is looked for."""
    path: str
    vector: torch.Tensor  # (D,)
    tile: torch.Tensor  # (3, y, x), its picture


def read_paths(folder):
    """{id: path of the source file} of a cache; {} if it is missing or may not be read."""
    table = Path(folder, "sources.csv")  # which its owner alone may read
    if not os.access(table, os.R_OK):
        return {}
    with open(table, encoding="utf-8", newline="") as file:
        return {line["id"]: line["path"] for line in csv.DictReader(file)}


def read_galleries(paths, caches):
    """Embedding files of one encoder -> list of Embeddings.

    caches: where theirs are, one for all or one for each; None: where read_embeddings finds them.
    """
    caches = caches or [None]
    if len(caches) == 1:
        caches = caches * len(paths)
    galleries = []
    samples = set()
    for path, cache in zip(paths, caches):
        gallery = read_embeddings(path, cache)
        galleries.append(gallery)
        # The first is compared with itself, too: that finds what its meta lacks.
        differs = find_difference(gallery.meta, galleries[0].meta, MUST_MATCH)
        if differs:
            raise UserError(f"{path}: its {differs} is missing or differs from that of {paths[0]}: "
                            "embed again")

        # A sample in two galleries would be found twice.
        folder = os.path.realpath(gallery.rows[0]["folder"])
        own = {(folder, row["id"]) for row in gallery.rows}
        if own & samples:
            raise UserError(f"{path} holds samples that another gallery holds: name them once")
        samples |= own
    return galleries


def load_gallery_encoder(galleries, paths, checkpoint, device):
    """The Embedder that made the galleries of these paths. UserError if it is another by now."""
    meta = galleries[0].meta
    checkpoint = checkpoint or meta.get("checkpoint")
    if checkpoint and not os.path.exists(checkpoint):
        raise UserError(f"{paths[0]}: its {checkpoint} is not there: give --checkpoint FILE")
    pooling = "grid" if meta["pool"] == "grid" else ""
    embedder = load_embedder(meta["encoder"], checkpoint, device, pooling)
    source = checkpoint or meta["encoder"]
    if find_difference(embedder.meta, meta, SAME_ENCODER):
        raise UserError(f"{source} is not what made {paths[0]}: give its --checkpoint")
    if not meta["code_sha256"]:
        return embedder

    # The weights of a foreign encoder are unknown: its answer to one sample of each gallery tells.
    for gallery, path in zip(galleries, paths):
        row = gallery.rows[0]
        x = torch.from_numpy(load_sample(row["folder"], row))[None]  # (1, C, H, W, S)
        answer = apply_encoder(embedder, x, [row["id"]], device)[0]  # (D,)
        stored = torch.from_numpy(gallery.vectors[0])  # (D,)
        same_width = len(answer) == len(stored)
        if not same_width or (answer - stored).norm() > ANSWER_TOLERANCE * stored.norm():
            raise UserError(f"{source} no longer gives what is in {path}: embed its cache again")
    return embedder


def read_queries(paths, modality, likely, sizes, embedder, device):
    """Embed medical files, prepared in these sizes -> list of Query; stderr names those refused.

    modality: what all files are. likely: what those are that do not say it. Either may be None.
    """
    queries = []
    for path in paths:
        try:
            found, sample = read_any(path, modality, likely, **sizes)
            vector = apply_encoder(embedder, sample[None], [path], device)[0]  # (D,)
        except (UserError, OSError) as error:
            reason = str(error)
            if str(path) not in reason:
                reason = f"{path}: {reason}"
            print(f"embed.py: {reason}", file=sys.stderr)
        else:
            queries.append(Query(path, vector, picture(sample, found, f"query ({found})")))
    return queries


def list_hits(query, scores, indices, rows, sources):
    """The hits of a query, best first, each as HIT_COLUMNS; sources: {cache: {id: path}}."""
    hits = []
    for rank, (score, i) in enumerate(zip(scores.tolist(), indices.tolist()), start=1):
        row = rows[i]
        labels = "|".join(row["labels"])
        path = sources[row["folder"]].get(row["id"], "")
        hits.append([query.path, rank, f"{score:.6f}", row["modality"], labels, row["folder"],
                     row["id"], path])
    return hits


def format_table(lines, delimiter):
    """Lines of HIT_COLUMNS -> the bytes of a table that csv readers take, the header first."""
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    table.writerow(HIT_COLUMNS)
    table.writerows(lines)
    # The name of a file may be no UTF-8.
    return text.getvalue().encode("utf-8", "backslashreplace")


def draw_hits(path, queries, scores, indices, rows):
    """Write a picture: every query begins a row, its hits follow behind it. No path is on it."""
    lines = []
    for query, query_scores, query_indices in zip(queries, scores.tolist(), indices.tolist()):
        tiles = [query.tile]
        for rank, (score, i) in enumerate(zip(query_scores, query_indices), start=1):
            row = rows[i]
            caption = f"{rank}. {score:.3f} {row['modality']}\n{' | '.join(row['labels'])}"
            sample = load_sample(row["folder"], row)
            tiles.append(picture(sample, row["modality"], caption))
        for start in range(0, len(tiles), TILES_IN_A_ROW):
            lines.append(tiles[start:start + TILES_IN_A_ROW])
    save_montage(path, lines)


def search_files(args, device):
    """Embed the files of --search as the galleries were, and print or write their nearest samples.

    Returns the number of files that were searched for; those refused are named on stderr.
    """
    # The samples of all galleries are searched as one.
    galleries = read_galleries(args.gallery, args.caches)
    embedder = load_gallery_encoder(galleries, args.gallery, args.checkpoint, device)
    rows = []
    for gallery in galleries:
        rows += gallery.rows

    # A file that does not say its modality has the galleries', if they hold one only.
    modalities = {row["modality"] for row in rows}
    likely = modalities.pop() if len(modalities) == 1 else None
    sizes = galleries[0].meta["sizes"]
    queries = read_queries(args.search, args.modality, likely, sizes, embedder, device)
    if not queries:
        return 0

    # All queries are searched for at once.
    query_vectors = torch.stack([query.vector for query in queries])  # (m, D)
    gallery_vectors = np.concatenate([gallery.vectors for gallery in galleries])  # (n, D)
    meta = galleries[0].meta
    if meta["pool"] == "grid":
        query_vectors, gallery_vectors = centre_parts(query_vectors, gallery_vectors, meta["parts"])
    scores, indices = search(query_vectors, gallery_vectors, args.top or 3)  # (m, k) each

    sources = {folder: read_paths(folder) for folder in {row["folder"] for row in rows}}
    hits = []
    for i, query in enumerate(queries):
        hits += list_hits(query, scores[i], indices[i], rows, sources)
    if args.out:
        # Only its owner may read it, as sources.csv: the path of a file can identify a patient.
        with atomic_write(args.out, mode=0o600) as file:
            file.write(format_table(hits, ","))
        print(f"{len(hits)} hits of {len(queries)} files in {args.out}")
    else:
        print(format_table(hits, "\t").decode(), end="")
    if args.figure:
        draw_hits(args.figure, queries, scores, indices, rows)
    return len(queries)


# ---- command line -------------------------------------------------------------------------------
def check_arguments(parser, args):
    """Leave with code 2 and a message at the first flags that do not go together."""
    if args.folder is None and args.search is None:
        parser.error("give a cache folder to embed, or --search FILE with --gallery NPZ")
    if args.folder and args.search:
        parser.error(f"{args.folder} would be embedded, --search looked for: give one of the two")
    if args.search and not args.gallery:
        parser.error("--search needs a --gallery NPZ, made by embedding a cache")
    if args.search and (args.encoder or args.pool or args.workers is not None):
        parser.error("--encoder, --pool and --workers are of embedding: a search has the gallery's")
    if args.folder and (args.gallery or args.caches or args.top or args.modality or args.figure):
        parser.error("--gallery, --cache, --top, --modality and --figure belong to --search")
    if args.caches and len(args.caches) not in (1, len(args.gallery)):
        parser.error("give one --cache for all of --gallery, or one for each")
    if args.workers is not None and args.workers < 0:
        parser.error("--workers counts from 0")
    if args.top is not None and args.top < 1:
        parser.error("--top counts from 1")
    ending = ".csv" if args.search else ".npz"
    if args.out and not args.out.endswith(ending):
        parser.error(f"--out {args.out}: this file must end in {ending}")
    if args.figure and Path(args.figure).suffix.lower() not in PICTURE_FORMATS:
        endings = ", ".join(PICTURE_FORMATS)
        parser.error(f"--figure {args.figure}: this file must end in one of {endings}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("folder", nargs="?", metavar="cache", help="folder to embed, cache/NAME")
    flag("--checkpoint", help="runs/NAME/checkpoint.pt; with --search: if the gallery's has moved")
    flag("--encoder", help="m3ret (default), random, pixels or module:function (docs/baselines.md)")
    flag("--pool", choices=["grid"], default="",
         help="beyond the paper: also where things are; better within a modality, worse across")
    flag("--out", help="file to write: .npz (default emb.npz), with --search .csv (default: print)")
    flag("--workers", type=int, help="reading processes (default 2); more if the GPU waits")
    search_flags = parser.add_argument_group("search").add_argument
    search_flags("--search", nargs="+", metavar="FILE",
                 help="what to look for: DICOM files, series folders, NIfTI, images or videos")
    search_flags("--gallery", nargs="+", metavar="NPZ", help="what to search: files of one encoder")
    search_flags("--cache", nargs="+", dest="caches", metavar="FOLDER",
                 help="where the galleries' caches are now, one for all or one each (if moved)")
    search_flags("--top", type=int, help="hits of a file (default 3)")
    search_flags("--modality", choices=MODALITIES,
                 help="of the files; default: their DICOM tag, or the gallery's only one")
    search_flags("--figure", metavar="PNG", help="draw the files and their hits (.png, .jpg)")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def main():
    args = parse_arguments()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.search:
        if search_files(args, device) == 0:
            sys.exit(1)  # all files were refused
        return

    embedder = load_embedder(args.encoder or "m3ret", args.checkpoint, device, args.pool)
    workers = 2 if args.workers is None else args.workers
    embed_rows(read_samples(args.folder), embedder, args.out or "emb.npz", device, workers)


if __name__ == "__main__":
    cli(main)
