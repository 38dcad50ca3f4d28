"""Embeddings of cached samples, and exact search among them (paper Sec. 3.2, 3.3, C.2).

In:  cache/NAME (prepare.py) and runs/NAME/checkpoint.pt (train.py), or any other encoder.
Out: emb.npz: embeddings (n, D) float32, not normalised; ids (n,); meta, a JSON string of how they were made.
     python embed.py cache/NAME --checkpoint runs/NAME/checkpoint.pt --out emb.npz  (torchrun shares the work)
     python embed.py --search scan.nii.gz --gallery ct.npz mri.npz --figure hits.png
"""
import argparse
import csv
import hashlib
import importlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import (ViT, load_encoder, normalize, pool, read_checkpoint, save_montage, stack,
                   take_frames_evenly, unit)
from prepare import (MODALITIES, CachedDataset, UserError, atomic_write, cli, load_sample, read_any,
                     read_samples, read_sizes)

# A search multiplies blocks of so many rows, which bounds its memory.
QUERY_BLOCK = 2048
GALLERY_BLOCK = 8192
EMBED_BATCH = 16  # samples embedded at a time

# What the meta of two files must have in common for their embeddings to be comparable.
SAME_ENCODER = ("encoder", "checkpoint_sha256", "code_sha256", "pool")
MUST_MATCH = SAME_ENCODER + ("sizes",)


def search(queries, gallery, k):
    """Exact cosine top-k (Sec. C.2): queries (m, D), gallery (n, D) -> scores, indices, (m, min(k, n)) each.

    Arrays or tensors, searched where the queries are; the gallery may be a map larger than memory. Equal
    scores come in any order. UserError: k < 1, an empty gallery, widths that differ, values that are not finite.
    """
    if k < 1:
        raise UserError(f"the number of matches to look for must be at least 1, not {k}")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError("queries (m, D) and gallery (n, D) must have one width D, not "
                        f"{tuple(queries.shape)} and {tuple(gallery.shape)}")
    if len(gallery) == 0:
        raise UserError("the gallery is empty")

    # The best k so far are kept, and every block of the gallery is merged into them.
    q = F.normalize(torch.as_tensor(queries).float(), dim=1)  # (m, D)
    scores = q.new_empty(len(q), 0)
    indices = q.new_empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(gallery), GALLERY_BLOCK):
        block = gallery[start:start + GALLERY_BLOCK]
        if not torch.is_tensor(block):
            block = torch.tensor(block)  # a copy: the array may be a read-only map
        g = F.normalize(block.to(q), dim=1)  # (b, D)

        block_scores, block_indices = [], []
        for part in q.split(QUERY_BLOCK):
            best = (part @ g.T).topk(min(k, len(g)), dim=1)  # (part, k) each
            block_scores.append(best.values)
            block_indices.append(start + best.indices)

        scores = torch.cat([scores, torch.cat(block_scores)], dim=1)  # (m, up to 2k)
        indices = torch.cat([indices, torch.cat(block_indices)], dim=1)  # (m, up to 2k)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)  # (m, up to k)
        indices = indices.gather(1, order)

    if scores.isnan().any():  # topk puts them first
        raise UserError("embeddings hold values that are not finite: embed these samples again")
    return scores, indices


def pixels(x):
    """Baseline: the mean slice as 32 x 32 grey values less their mean, (B, C, H, W, S) -> (B, 1024)."""
    x = unit(x).mean(dim=(1, 4))  # (B, H, W)
    x = x - x[:, :1, :1]  # the mean of a flat image would differ from its pixels by rounding; zeros do not
    x = F.adaptive_avg_pool2d(x, 32).flatten(1)  # (B, 1024)
    return x - x.mean(dim=1, keepdim=True)  # the cosine of two images is now their correlation


def by_slices(network, size=224, chunk=128):
    """A 2D network (n, 3, size, size) -> (n, D) as an encoder of samples: the mean over slices or frames.

    The network is given ImageNet's colours, and `chunk` slices at a time.
    """
    def embed(x):  # (B, C, H, W, S) -> (B, D)
        slices = unit(take_frames_evenly(x)).permute(0, 4, 1, 2, 3)  # (B, S, C, H, W)
        mean = x.new_tensor([0.485, 0.456, 0.406], dtype=torch.float32)[:, None, None]  # (3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225], dtype=torch.float32)[:, None, None]  # (3, 1, 1)
        images = ((slices - mean) / std).flatten(0, 1)  # (B * S, 3, H, W)

        features = []
        for part in images.split(chunk):  # (chunk, 3, H, W)
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            features.append(network(part))  # (chunk, D)
        return torch.cat(features).float().unflatten(0, slices.shape[:2]).mean(dim=1)  # (B, D)
    return embed


class Embedder(NamedTuple):
    """What load_embedder gives: how samples are embedded, and what is known of it."""
    embed: Callable  # cached samples (B, C, H, W, S) -> (B, D)
    meta: dict  # for the npz
    seen_ids: object  # (n,) int64, ids of the samples it was trained on; None if unknown


class Embeddings(NamedTuple):
    """What read_embeddings finds in an npz."""
    rows: list  # of its cache's samples.csv, in the npz's order
    vectors: np.ndarray  # (n, D) float32
    meta: dict


def load_foreign_encoder(name, device):
    """module:function, the module sought in the working folder too -> what function() returns, the module's sha256."""
    module_name, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        code_sha256 = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        make = getattr(module, function)
        with torch.device(device):  # so that a network it makes lies where its samples will
            embed = make()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--encoder {name}: {error}; choose module:function, pixels, m3ret") from None
    if not callable(embed):
        raise UserError(f"--encoder {name}: the encoder must be a function of samples (B, C, H, W, S), but "
                        f"{function}() returned {embed!r}")
    return embed, code_sha256


def load_embedder(name, checkpoint=None, device="cpu"):
    """Encoder -> Embedder. Its function maps cached samples (B, C, H, W, S) to (B, D).

    m3ret: the checkpoint's, pooled to mix = [CLS, avg] (Sec. 3.3), to avg without CLS token (Sec. 3.2);
    random: the same, untrained; pixels: the baseline above; module:function: what the function returns.
    """
    meta = {"encoder": name, "checkpoint": "", "checkpoint_sha256": "", "code_sha256": "", "pool": ""}
    needs_checkpoint = name in ("m3ret", "random")
    if needs_checkpoint and not checkpoint:
        raise UserError(f"--encoder {name}: needs the --checkpoint of a run of train.py")
    if checkpoint and not needs_checkpoint:
        raise UserError(f"--encoder {name}: has no use for a --checkpoint; leave it out")
    if name == "pixels":
        return Embedder(pixels, meta, [])
    if not needs_checkpoint:
        embed, meta["code_sha256"] = load_foreign_encoder(name, device)
        return Embedder(embed, meta, None)

    state = read_checkpoint(checkpoint)
    network = load_encoder(checkpoint, device, state)
    seen_ids = state.get("ids")  # a file that does not say leaves it unknown
    if name == "random":
        torch.manual_seed(0)
        network = ViT(**network.config).to(device).eval()
        seen_ids = []

    pooling = "avg" if network.cls_token is None else "mix"
    meta["pool"] = pooling
    meta["checkpoint"] = str(checkpoint)
    meta["checkpoint_sha256"] = state["sha256"]
    meta["flags"] = state.get("flags")
    meta["step"] = state.get("step")
    meta["parameters"] = sum(p.numel() for p in network.parameters())

    def embed(x):  # no augmentation; of longer videos 16 evenly spaced frames
        tokens = network(normalize(unit(take_frames_evenly(x))))  # (B, [1+]N, D)
        return pool(tokens, pooling, cls_token=network.cls_token is not None)  # (B, D) or (B, 2D)
    return Embedder(embed, meta, seen_ids)


def apply_encoder(embed, x, names, device):
    """Samples (B, C, H, W, S) -> (B, D) float32 on the CPU; names: what an error calls the samples."""
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
        vectors = embed(x.to(device))  # (B, D)

    # The encoder may be anybody's.
    if not torch.is_tensor(vectors):
        raise UserError(f"the encoder gave {type(vectors).__name__}, not a tensor ({len(x)}, D)")
    if vectors.ndim != 2 or len(vectors) != len(x):
        raise UserError(f"the encoder gave {tuple(vectors.shape)}, not ({len(x)}, D)")
    finite = vectors.isfinite().all(dim=1)  # (B,)
    if not finite.all():
        name = names[finite.tolist().index(False)]
        raise UserError(f"{name} embeds to values that are not finite: if it has such, prepare it again")
    return vectors.float().cpu()


def list_batches(rows):
    """Row numbers in lists of at most EMBED_BATCH; the samples of a batch have one shape."""
    batches = []
    for shape in sorted({row["shape"] for row in rows}):
        members = [i for i, row in enumerate(rows) if row["shape"] == shape]
        for start in range(0, len(members), EMBED_BATCH):
            batches.append(members[start:start + EMBED_BATCH])
    return batches


def list_seen(ids, seen_ids):
    """Those of the ids that the encoder was trained on; None if nobody knows."""
    if seen_ids is None:
        return None
    numbers = np.array([int(name, 16) for name in ids], np.uint64).view(np.int64)  # as in the checkpoint
    found = np.isin(numbers, np.asarray(seen_ids))
    return [name for name, seen in zip(ids, found) if seen]


def embed_rows(rows, embedder, out, device="cpu", workers=2):
    """Embed rows (of one cache folder) into `out`, by what load_embedder gave; torchrun's processes share."""
    if not rows:
        raise UserError("there is no sample to embed: samples.csv has no row")
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    folder = rows[0]["folder"]

    # Every process embeds its share of the batches.
    batches = list_batches(rows)
    mine = batches[rank::world]
    done = []
    loader = DataLoader(CachedDataset(rows), batch_sampler=mine, num_workers=workers, collate_fn=stack)
    bar = tqdm(loader, desc="embed", unit="batch", disable=rank > 0, leave=False)
    for batch, x in zip(mine, bar):
        names = [f"{folder}/{rows[i]['id']}.npy" for i in batch]
        done.append(apply_encoder(embedder.embed, x, names, device))

    # The first process joins the parts.
    with atomic_write(f"{out}.part{rank}") as file:
        torch.save(done, file)
    if world > 1:
        dist.init_process_group("gloo")
        dist.barrier()
    if rank > 0:
        return
    vectors = None
    for other in range(world):
        parts = torch.load(f"{out}.part{other}", weights_only=True)
        os.remove(f"{out}.part{other}")
        for batch, part in zip(batches[other::world], parts):
            if vectors is None:
                vectors = np.empty((len(rows), part.shape[1]), np.float32)  # (n, D)
            vectors[batch] = part

    ids = [row["id"] for row in rows]
    seen = list_seen(ids, embedder.seen_ids)
    meta = json.dumps(embedder.meta | {"cache": folder, "sizes": read_sizes(folder), "seen": seen})
    with atomic_write(out) as file:
        np.savez(file, embeddings=vectors, ids=ids, meta=meta)
    print(f"{len(rows)} embeddings in {out}")


def read_embeddings(path, cache=None):
    """npz -> Embeddings: rows of its cache's samples.csv in its order, vectors (n, D) float32, meta (a dict)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors = file["embeddings"]
            ids = file["ids"]
            meta = {}
            if "meta" in file:
                meta = {"code_sha256": ""} | json.loads(str(file["meta"]))
        if vectors.dtype.kind != "f" or vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError("embeddings must be finite floats (n, D)")
        if ids.dtype.kind != "U" or ids.shape != vectors.shape[:1]:
            raise ValueError("ids must be n strings")
        if len(ids) == 0:
            raise ValueError("it is empty")
        if len(np.unique(ids)) < len(ids):
            raise ValueError("an id comes twice")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no embedding file ({error}): make it with embed.py") from None

    folder = cache or meta.get("cache", "")
    ids = ids.tolist()
    rows = {row["id"]: row for row in read_samples(folder)}
    if not rows.keys() >= set(ids):
        raise UserError(f"{path} holds ids that are not in {folder}: give the cache it is of")
    return Embeddings([rows[name] for name in ids], vectors.astype(np.float32), meta)


def picture(sample, caption, colour=(90, 90, 90), size=192):
    """Sample (C, H, W, S) -> its middle slice, framed, two lines of caption below: (3, y, x) in [0, 1]."""
    middle = torch.as_tensor(sample)[..., sample.shape[-1] // 2]  # (C, H, W)
    grey_levels = (unit(middle).clamp(0, 1) * 255).byte().expand(3, -1, -1)  # (3, H, W)
    image = Image.fromarray(grey_levels.permute(1, 2, 0).numpy())
    tile = ImageOps.pad(image, (size, size))
    tile = ImageOps.expand(tile, border=(6, 6, 6, 36), fill=colour)  # left, top, right, bottom
    ImageDraw.Draw(tile).text((8, size + 6), caption, fill="white", font=ImageFont.load_default(11))
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255  # (3, y, x)


def find_difference(meta, other, keys):
    """The first of the keys that one of two metas lacks, or that differs; None if they agree."""
    for key in keys:
        if key not in meta or key not in other or meta[key] != other[key]:
            return key
    return None


def read_paths(folder):
    """{id: path of the source file}, or {} for all but the owner of the cache, who alone may read it."""
    table = Path(folder, "sources.csv")
    if not os.access(table, os.R_OK):
        return {}
    with open(table, encoding="utf-8", newline="") as file:
        return {line["id"]: line["path"] for line in csv.DictReader(file)}


def search_file(path, galleries, top=3, figure=None, checkpoint=None, modality=None, device="cpu"):
    """Embed one medical file as the galleries were and print its nearest samples; the figure has no path."""
    rows, vectors, paths = [], [], {}
    meta = None
    for gallery in galleries:
        found = read_embeddings(gallery)
        meta = meta or found.meta  # of the first
        differs = find_difference(found.meta, meta, MUST_MATCH)
        if differs:
            raise UserError(f"{gallery} says no {differs}, or another than {galleries[0]}: embed again")
        rows += found.rows
        vectors.append(found.vectors)
        paths |= read_paths(found.meta["cache"])

    embedder = load_embedder(meta["encoder"], checkpoint or meta["checkpoint"], device)
    if find_difference(embedder.meta, meta, SAME_ENCODER):
        raise UserError(f"{checkpoint or meta['checkpoint'] or meta['encoder']} is not what made {galleries[0]}: "
                        "give its --checkpoint")

    # A file that does not say its modality has the gallery's, if that holds one only.
    modalities = {row["modality"] for row in rows}
    likely = modalities.pop() if len(modalities) == 1 else None
    modality, sample = read_any(path, modality, likely, **meta["sizes"])
    x = torch.from_numpy(sample)[None]  # (1, C, H, W, S)
    query = apply_encoder(embedder.embed, x, [path], device)  # (1, D)
    scores, indices = search(query, np.concatenate(vectors), top)  # (1, k)

    tiles = [picture(sample, f"query ({modality})")]
    print("rank  cosine  modality    labels  id  file")
    for place, (score, i) in enumerate(zip(scores[0].tolist(), indices[0].tolist()), start=1):
        row = rows[i]
        labels = " | ".join(row["labels"])
        source = paths.get(row["id"], "")
        print(f"{place:4}  {score:6.3f}  {row['modality']:10}  {labels}  {row['id']}  {source}")
        caption = f"{place}. {score:.3f} {row['modality']}\n{labels}"
        tiles.append(picture(load_sample(row["folder"], row), caption))
    if figure:
        save_montage(figure, [tiles])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("cache", nargs="?", help="folder to embed, cache/NAME")
    flag("--checkpoint", help="runs/NAME/checkpoint.pt; with --search: if the gallery's has moved")
    flag("--encoder", default="m3ret", help="m3ret, random, pixels or module:function (docs/baselines.md)")
    flag("--out", default="emb.npz", help="file to write (default emb.npz)")
    flag("--workers", type=int, default=2, help="reading processes (default 2); more if the GPU waits")
    flag("--search", metavar="FILE", help="DICOM file, series folder, NIfTI, image or video to look for")
    flag("--gallery", nargs="+", metavar="NPZ", help="what to search: files of one encoder and checkpoint")
    flag("--top", type=int, default=3, help="results of a search (default 3)")
    flag("--modality", choices=MODALITIES, help="of FILE; default: its DICOM tag, or the gallery's only one")
    flag("--figure", metavar="PNG", help="draw the query and its results")
    args = parser.parse_args()
    if not args.cache and not args.search:
        parser.error("give a cache folder to embed, or --search FILE with --gallery NPZ")
    if args.cache and args.search:
        parser.error(f"{args.cache} is to be embedded, {args.search} to be searched for: give one of the two")
    if args.search and not args.gallery:
        parser.error("--search needs a --gallery NPZ, made by embedding a cache")
    if args.gallery and not args.search:
        parser.error("--gallery belongs to --search FILE")
    if args.workers < 0:
        parser.error("--workers counts from 0")

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.search:
        search_file(args.search, args.gallery, args.top, args.figure, args.checkpoint, args.modality, device)
    else:
        embedder = load_embedder(args.encoder, args.checkpoint, device)
        embed_rows(read_samples(args.cache), embedder, args.out, device, args.workers)


if __name__ == "__main__":
    cli(main)
