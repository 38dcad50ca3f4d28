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
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import (ViT, load_encoder, normalize, pool, read_checkpoint, save_montage, stack,
                   take_frames_evenly, unit)
from prepare import (MODALITIES, CachedDataset, UserError, atomic_write, cli, load_sample, read_any,
                     read_samples, read_sizes)

QUERIES, GALLERY, BATCH = 2048, 8192, 16  # rows of one product of a search; samples embedded at a time
MUST_MATCH = ("encoder", "checkpoint_sha256", "code_sha256", "pool", "sizes")  # in all galleries of a search


def search(queries, gallery, k):
    """Exact cosine top-k (Sec. C.2): queries (m, D), gallery (n, D) -> scores, indices, (m, min(k, n)) each.

    Arrays or tensors, searched where the queries are; the gallery may be a map larger than memory. Equal ones
    come in any order. UserError: k < 1, an empty gallery, widths that differ, values that are not finite.
    """
    if k < 1 or queries.ndim != 2 or len(gallery) == 0 or queries.shape[1:] != gallery.shape[1:]:
        raise UserError(f"no {k} matches of {tuple(queries.shape)} in a gallery {tuple(gallery.shape)}")
    q = F.normalize(torch.as_tensor(queries).float(), dim=1)  # (m, D)
    scores, indices = q.new_empty(len(q), 0), q.new_empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(gallery), GALLERY):
        block = gallery[start:start + GALLERY]
        g = F.normalize((block if torch.is_tensor(block) else torch.tensor(block)).to(q), dim=1)  # (b, D)
        best = [(part @ g.T).topk(min(k, len(g)), dim=1) for part in q.split(QUERIES)]  # each (b, k)
        scores = torch.cat([scores, torch.cat([found.values for found in best])], dim=1)  # (m, up to 2k)
        indices = torch.cat([indices, torch.cat([found.indices for found in best]) + start], dim=1)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)  # (m, up to k)
        indices = indices.gather(1, order)
    if scores.isnan().any():  # topk puts them first
        raise UserError("embeddings hold values that are not finite: embed these samples again")
    return scores, indices


def pixels(x):
    """Baseline: the mean slice as 32 x 32 grey values less their mean, (B, C, H, W, S) -> (B, 1024)."""
    x = unit(x).mean(dim=(1, 4))  # (B, H, W)
    x = F.adaptive_avg_pool2d(x - x[:, :1, :1], 32).flatten(1)  # (B, 1024), exactly zero if flat
    return x - x.mean(dim=1, keepdim=True)  # the cosine of two images is now their correlation


def by_slices(network, size=224, chunk=128):
    """A 2D network (n, 3, size, size) -> (n, D) as an encoder of samples: the mean over slices."""
    def embed(x):  # (B, C, H, W, S) -> (B, D)
        x = unit(take_frames_evenly(x)).permute(0, 4, 1, 2, 3)  # (B, S, C, H, W)
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # ImageNet
        out = [network(F.interpolate(part, (size, size), mode="bilinear", antialias=True))
               for part in ((x - mean) / std).flatten(0, 1).split(chunk)]  # parts (chunk, 3, H, W)
        return torch.cat(out).float().unflatten(0, x.shape[:2]).mean(dim=1)  # (B, D)
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


def load_embedder(name, checkpoint=None, device="cpu"):
    """Encoder -> (embed, meta for the npz, 64-bit ids of the samples it was trained on, None if unknown).

    embed maps cached samples (B, C, H, W, S) to (B, D). m3ret: the checkpoint's, pooled to mix = [CLS, avg]
    (Sec. 3.3), to avg without CLS token (Sec. 3.2); random: the same, untrained; module:function: its result.
    """
    meta = {"encoder": name, "checkpoint": "", "checkpoint_sha256": "", "code_sha256": "", "pool": ""}
    if bool(checkpoint) != (name in ("m3ret", "random")):
        raise UserError(f"--encoder {name}: m3ret and random need a --checkpoint of train.py, others none")
    if name == "pixels":
        return Embedder(pixels, meta, [])
    if not checkpoint:
        module, _, function = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module)
            meta["code_sha256"] = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
            with torch.device(device):  # so that a network it makes lies where its samples will
                return Embedder(getattr(module, function)(), meta, None)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"--encoder {name}: {error}; choose module:function, pixels, m3ret") from None
    state = read_checkpoint(checkpoint)
    network, trained = load_encoder(checkpoint, device, state), state.get("ids")
    if name == "random":
        torch.manual_seed(0)
        network, trained = ViT(**network.config).to(device).eval(), []
    how = "avg" if network.cls_token is None else "mix"
    meta |= {"checkpoint": str(checkpoint), "flags": state.get("flags"), "step": state.get("step"),
             "checkpoint_sha256": state["sha256"],
             "parameters": sum(p.numel() for p in network.parameters()), "pool": how}
    def embed(x):  # no augmentation; of longer videos 16 evenly spaced frames
        return pool(network(normalize(unit(take_frames_evenly(x)))), how, how == "mix")
    return Embedder(embed, meta, trained)


def apply_encoder(embed, x, names, device):
    """Samples (B, C, H, W, S) -> (B, D) float32 on the CPU; names: what an error calls the samples."""
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
        vectors = embed(x.to(device)) if callable(embed) else embed  # function() may have returned anything
    if not torch.is_tensor(vectors) or vectors.ndim != 2 or len(vectors) != len(x):
        raise UserError(f"the encoder gave {getattr(vectors, 'shape', vectors)}, not a tensor ({len(x)}, D)")
    for name, finite in zip(names, vectors.isfinite().all(dim=1).tolist()):
        if not finite:
            raise UserError(f"{name} embeds to values that are not finite: if it has such, prepare it again")
    return vectors.float().cpu()


def embed_rows(rows, embedder, out, device="cpu", workers=2):
    """Embed rows (of one cache folder) into `out`, by what load_embedder gave; torchrun's processes share."""
    embed, meta, trained = embedder
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder, batches, done = rows[0]["folder"], [], []
    for shape in sorted({row["shape"] for row in rows}):
        members = [i for i, row in enumerate(rows) if row["shape"] == shape]
        batches += [members[a:a + BATCH] for a in range(0, len(members), BATCH)]
    mine = batches[rank::world]
    loader = DataLoader(CachedDataset(rows), batch_sampler=mine, num_workers=workers, collate_fn=stack)
    for batch, x in zip(mine, tqdm(loader, desc="embed", unit="batch", disable=rank > 0, leave=False)):
        done.append(apply_encoder(embed, x, [f"{folder}/{rows[i]['id']}.npy" for i in batch], device))
    with atomic_write(f"{out}.part{rank}") as file:  # the first process joins the parts
        torch.save(done, file)
    if world > 1:
        torch.distributed.init_process_group("gloo")  # returns when every process has come this far
    if rank > 0:
        return
    done = [None] * len(batches)
    for r in range(world):
        done[r::world] = torch.load(f"{out}.part{r}", weights_only=True)
        os.remove(f"{out}.part{r}")
    order = np.argsort(np.concatenate(batches))  # batches hold each row number once
    numbers = np.array([int(row["id"], 16) for row in rows], np.uint64).view(np.int64)  # as in the checkpoint
    seen = None if trained is None else [rows[i]["id"] for i in np.flatnonzero(np.isin(numbers, trained))]
    meta = json.dumps(meta | {"cache": folder, "sizes": read_sizes(folder), "seen": seen})
    with atomic_write(out) as file:
        np.savez(file, embeddings=torch.cat(done)[order], ids=[row["id"] for row in rows], meta=meta)
    print(f"{len(rows)} embeddings in {out}")


def read_embeddings(path, cache=None):
    """npz -> rows of its cache's samples.csv in its order, embeddings (n, D) float32, meta (a dict)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, ids = file["embeddings"], file["ids"]
            meta = {"code_sha256": ""} | json.loads(str(file["meta"])) if "meta" in file else {}
        good = x.dtype.kind + ids.dtype.kind == "fU" and x.ndim == 2 and np.isfinite(x).all()
        if not good or not 0 < len(np.unique(ids)) == len(ids) == len(x):
            raise ValueError("it needs finite embeddings (n, D) and n different ids")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no embedding file ({error}): make it with embed.py") from None
    rows = {row["id"]: row for row in read_samples(cache or meta.get("cache", ""))}
    if not rows.keys() >= set(ids.tolist()):
        raise UserError(f"{path} holds ids that are not in {cache or meta['cache']}: give the cache it is of")
    return Embeddings([rows[i] for i in ids.tolist()], x.astype(np.float32), meta)


def picture(sample, caption, colour=(90, 90, 90), size=192):
    """Sample (C, H, W, S) -> its middle slice, framed, two lines of caption below: (3, y, x) in [0, 1]."""
    middle = unit(torch.as_tensor(sample))[..., sample.shape[-1] // 2].expand(3, -1, -1)  # (3, H, W)
    image = Image.fromarray((middle.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    tile = ImageOps.expand(ImageOps.pad(image, (size, size)), border=(6, 6, 6, 36), fill=colour)
    ImageDraw.Draw(tile).text((8, size + 6), caption, fill="white", font=ImageFont.load_default(11))
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255  # (3, y, x)


def search_file(path, galleries, top=3, figure=None, checkpoint=None, modality=None, device="cpu"):
    """Embed one medical file as the galleries were and print its nearest samples; the figure has no path."""
    rows, vectors, metas = zip(*map(read_embeddings, galleries))
    rows, paths = sum(rows, []), {}
    for gallery, meta in zip(galleries, metas):
        differ = [key for key in MUST_MATCH if key not in meta or meta[key] != metas[0].get(key)]
        if differ:
            raise UserError(f"{gallery} says no {differ[0]}, or another than {galleries[0]}: embed again")
        if os.access(f"{meta['cache']}/sources.csv", os.R_OK):  # only its owner may read it
            lines = csv.DictReader(Path(meta["cache"], "sources.csv").read_text("utf-8").split("\n"))
            paths |= {line["id"]: line["path"] for line in lines}
    embed, own, _ = load_embedder(meta["encoder"], checkpoint or meta["checkpoint"], device)
    if any(own[key] != meta[key] for key in MUST_MATCH[:-1]):
        raise UserError(f"{checkpoint or own['encoder']} is not what made {gallery}: give its --checkpoint")
    known = [*{row["modality"] for row in rows}]
    modality, sample = read_any(path, modality, known[0] if len(known) == 1 else None, **meta["sizes"])
    query = apply_encoder(embed, torch.from_numpy(sample)[None], [path], device)  # (1, D)
    scores, indices = search(query, np.concatenate(vectors), top)  # (1, k)
    tiles = [picture(sample, f"query ({modality})")]
    print("rank  cosine  modality    labels  id  file")
    for place, (score, i) in enumerate(zip(scores[0].tolist(), indices[0].tolist()), start=1):
        row, kind, labels = rows[i], rows[i]["modality"], " | ".join(rows[i]["labels"])
        print(f"{place:4}  {score:6.3f}  {kind:10}  {labels}  {row['id']}  {paths.get(row['id'], '')}")
        tiles.append(picture(load_sample(row["folder"], row), f"{place}. {score:.3f} {kind}\n{labels}"))
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
    if bool(args.cache) == bool(args.search) or bool(args.search) != bool(args.gallery) or args.workers < 0:
        parser.error("give a cache folder, or --search FILE with --gallery NPZ; --workers counts from 0")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.search:
        search_file(args.search, args.gallery, args.top, args.figure, args.checkpoint, args.modality, device)
    else:
        embedder = load_embedder(args.encoder, args.checkpoint, device)
        embed_rows(read_samples(args.cache), embedder, args.out, device, args.workers)


if __name__ == "__main__":
    cli(main)
