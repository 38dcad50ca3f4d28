"""Embeddings of cached samples, and exact search among them (paper Sec. 3.2, 3.3, C.2).

In:  cache/NAME (prepare.py) and runs/NAME/checkpoint.pt (train.py), or any other encoder.
Out: emb.npz: embeddings (n, D) float32, not normalised; ids (n,) str; meta, a JSON string that says how they were made.
     python embed.py cache/NAME --checkpoint runs/NAME/checkpoint.pt --out emb.npz     (under torchrun: shares the work)
     python embed.py --search scan.nii.gz --gallery emb.npz --top 3 --figure hits.png  (one file as the query)
Letters: model.py; here also m queries, n gallery samples, k results per query, G gallery rows of a block.
"""
import argparse
import hashlib
import importlib
import json
import os
import shutil
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import FRAMES, ViT, load_encoder, normalize, pool, read_checkpoint, save_montage, stack, take_frames, unit
from prepare import MODALITIES, CachedDataset, UserError, atomic_write, load_sample, read_any, read_samples

UNIT = 2.0**26  # length of a vector in fixed point
QUERY_BLOCK, GALLERY_BLOCK = 1024, 8192  # rows of one product: what bounds the memory of a search
VOXELS, MAX_BATCH = 2**25, 64  # of one embedding batch: 8 volumes of 256 x 256 x 64, 32 videos of 16 frames, 64 images
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # mean and std of the channels


# ----------------------------------------------------------------------------------------------------------- search
def fixed_point(x):
    """Rows (n, D), array or tensor -> (n, D) float64 whole numbers: same directions, length 2^26; zero rows stay zero.

    A product of two such rows is a sum of whole numbers that stays within 2^53 (Cauchy-Schwarz), so float64 holds every
    partial sum exactly. Cosines are then the same in any block, order and device, and equal vectors have equal scores;
    in plain float32 they have not, and ties would fall to rounding. The grid moves a cosine by about 1e-8.
    """
    x = x.to(torch.float64, copy=True) if torch.is_tensor(x) else torch.from_numpy(np.array(x, dtype=np.float64))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (n, 1)
    if not length.isfinite().all():
        raise UserError(f"embedding {int(length.isfinite().int().argmin())} is not finite: embed the samples again")
    return x.div_(length.clamp_min(1e-300)).mul_(UNIT).round_()  # (n, D)


def first_k(scores, k):
    """The k largest of each row (B, n), descending, ties by lower column -> values and columns, (B, min(k, n)) each.

    torch.topk promises nothing about ties, so a row whose k-th and next values are equal is sorted in full.
    """
    k = min(k, scores.shape[1])
    top = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    columns = top.indices[:, :k].sort(dim=1).values  # (B, k), ascending
    cut = (top.values[:, k - 1:k] == top.values[:, k:]).any(dim=1)  # (B,) does place k cut through a tie?
    columns[cut] = scores[cut].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)  # (B, k)
    return values, columns.gather(1, order)


def search(queries, gallery, k):
    """Exact cosine top-k: queries (m, D), gallery (n, D) -> scores float32 and indices int64, (m, min(k, n)) each.

    Arrays or tensors; the gallery may be a memory map larger than memory. Ties go to the lower index, a zero vector
    scores 0 with everything. Tensors are searched where the queries are, arrays on the GPU if there is one.
    UserError: k < 1, an empty gallery, widths that differ, values that are not finite.
    """
    if k < 1:
        raise UserError(f"cannot return the best {k} matches: ask for 1 or more")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or len(gallery) == 0:
        raise UserError(f"queries {tuple(queries.shape)} cannot be searched in a gallery {tuple(gallery.shape)}: both "
                        "must be (rows, D) with one D (the same encoder and pooling), and the gallery not empty")
    home = queries.device if torch.is_tensor(queries) else torch.device("cpu")
    device = home if torch.is_tensor(queries) or not torch.cuda.is_available() else torch.device("cuda")
    found = [(torch.empty(0, min(k, len(gallery))), torch.empty(0, min(k, len(gallery)), dtype=torch.int64))]
    for a in range(0, len(queries), QUERY_BLOCK):
        q = fixed_point(queries[a:a + QUERY_BLOCK]).to(device)  # (B, D)
        scores, indices = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for start in range(0, len(gallery), GALLERY_BLOCK):
            block = fixed_point(gallery[start:start + GALLERY_BLOCK]).to(device)  # (G, D)
            here = torch.arange(start, start + len(block), device=device).expand(len(q), -1)  # (B, G)
            # What is kept so far has lower indices, ties among it in their order: lower column = lower index.
            scores, columns = first_k(torch.cat([scores, q @ block.T], dim=1), k)  # (B, up to k)
            indices = torch.cat([indices, here], dim=1).gather(1, columns)  # (B, up to k)
        found.append(((scores / UNIT**2).float().to(home), indices.to(home)))
    scores, indices = zip(*(found[1:] or found))
    return torch.cat(scores), torch.cat(indices)  # (m, k)


# --------------------------------------------------------------------------------------------------------- encoders
def pixels(x):
    """Baseline: the mean slice or frame as 32 x 32 grey values less their mean, (B, C, H, W, S) -> (B, 1024)."""
    x = unit(x).mean(dim=(1, 4))  # (B, H, W)
    x = F.adaptive_avg_pool2d(x - x[:, :1, :1], 32).flatten(1)  # (B, 1024), exactly zero if flat
    return x - x.mean(dim=1, keepdim=True)  # the cosine of two images is now their correlation


def by_slices(network, size=224, chunk=128):
    """A 2D network (n, 3, size, size) -> (n, D) as an encoder of samples: mean over slices, ImageNet colours."""
    def embed(x):  # (B, C, H, W, S) -> (B, D)
        x = unit(take_frames(x))
        B, C, H, W, S = x.shape
        x = x.permute(0, 4, 1, 2, 3).reshape(B * S, C, H, W).expand(-1, 3, -1, -1)  # (B*S, 3, H, W)
        mean, std = IMAGENET.to(x)
        out = [network((F.interpolate(part, (size, size), mode="bilinear", antialias=True) - mean) / std)
               for part in x.split(chunk)]
        return torch.cat(out).float().view(B, S, -1).mean(dim=1)  # (B, D)
    return embed


def load_embedder(name, checkpoint, device="cpu"):
    """Encoder name -> (embed, meta): embed maps cached samples (B, C, H, W, S), uint8 or float16, to (B, D).

    m3ret            the checkpoint's encoder; pooling mix = [CLS, avg] (Sec. 3.3), or avg without CLS token (Sec. 3.2)
    random           the same architecture, untrained (seed 0);    pixels: 32 x 32, less their mean
    dinov2:CLONE     DINOv2 from a clone of its repository; --checkpoint is its weight file, under its public name
    module:function  function() returns embed; the samples arrive as they are cached, on the device
    """
    checkpoint = "" if name == "pixels" else str(checkpoint or "")
    meta = {"encoder": name, "checkpoint": checkpoint, "pool": "", "parameters": 0, "run": {}}
    if name in ("m3ret", "random"):
        if not checkpoint:
            raise UserError(f"the encoder {name} needs --checkpoint FILE, a checkpoint.pt written by train.py")
        network, state = load_encoder(checkpoint), read_checkpoint(checkpoint)
        if name == "random":
            torch.manual_seed(0)
            network = ViT(**network.config)
        cls = network.cls_token is not None
        meta["pool"] = "mix" if cls else "avg"
        meta["run"] = json.loads(state.get("flags", "{}")) | {"step": state.get("step")}

        def embed(x):  # no augmentation; of longer videos 16 evenly spaced frames
            return pool(network(normalize(unit(take_frames(x)))), meta["pool"], cls)
    elif name == "pixels":
        network = embed = pixels
    elif name.startswith("dinov2:"):
        clone = Path(name.removeprefix("dinov2:"))
        entry = Path(checkpoint).stem.removesuffix("_pretrain").replace("_reg4", "_reg")
        if not (clone / "hubconf.py").is_file() or not entry.startswith("dinov2_vit"):
            raise UserError(f"{name} with --checkpoint {checkpoint or '(none)'}: give a clone that holds hubconf.py, "
                            "and a weight file under its public name, such as dinov2_vitb14_pretrain.pth")
        network = torch.hub.load(str(clone), entry, source="local", pretrained=False)
        network.load_state_dict(read_checkpoint(checkpoint))
        embed, meta["pool"] = by_slices(network), "cls, mean over slices or frames"
    elif ":" in name:
        sys.path.insert(0, os.getcwd())
        module, function = name.split(":", 1)
        try:
            network = embed = getattr(importlib.import_module(module), function)()
        except (ModuleNotFoundError, AttributeError) as error:
            raise UserError(f"--encoder {name}: {error}; give module:function, importable from here") from None
    else:
        raise UserError(f"unknown encoder {name!r}: choose m3ret, random, pixels, dinov2:CLONE or module:function")
    if isinstance(network, torch.nn.Module):
        network.to(device).eval()
        meta["parameters"] = sum(p.numel() for p in network.parameters())
    return embed, meta | {"checkpoint_sha256": sha256(checkpoint)}


def sha256(path):
    """Hash of a file's bytes; "" for no file. UserError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a checkpoint.pt written by train.py") from None


# ------------------------------------------------------------------------------------------------------- embeddings
def make_folder(path):
    """Make a folder and those above it, if need be; returns it. UserError if that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): choose another place with --out") from None
    return Path(path)


def batches_of(rows):
    """Row numbers in batches of one shape, the same for any number of processes."""
    shapes = {}
    for i, row in enumerate(rows):
        shapes.setdefault(row["shape"], []).append(i)
    size = {s: max(1, min(MAX_BATCH, VOXELS // (s[1] * s[2] * s[3]))) for s in shapes}
    return [members[a:a + size[s]] for s, members in shapes.items() for a in range(0, len(members), size[s])]


@torch.inference_mode()
def embed_rows(rows, embed, meta, out, device="cpu", workers=2):
    """Embed rows (of one cache folder) and write `out`. Under torchrun every process calls this; the first one writes.

    Each batch is kept in `out`.parts until all are done, so an interrupted run goes on where it stopped.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = str(device).startswith("cuda")
    meta = meta | {"cache": rows[0]["folder"], "precision": "bfloat16" if gpu else "float32", "sizes": sizes_of(rows)}
    batches = batches_of(rows)
    key = hashlib.sha256(json.dumps([meta, [(row["id"], row["shape"]) for row in rows]]).encode()).hexdigest()[:16]
    parts = make_folder(Path(f"{out}.parts", key))  # the key keeps other rows and encoders apart
    todo = [i for i in range(rank, len(batches), world) if not (parts / f"{i}.npy").exists()]
    loader = DataLoader(CachedDataset(rows), batch_sampler=[batches[i] for i in todo], num_workers=workers,
                        collate_fn=stack)
    bar = tqdm(loader, desc="embed", unit="batch", disable=rank > 0, leave=False)
    try:
        for i, x in zip(todo, bar):
            with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
                vectors = embed(x.to(device)).float().cpu().numpy()  # (B, D)
            if vectors.ndim != 2 or len(vectors) != len(x) or not np.isfinite(vectors).all():
                raise UserError(f"encoder {meta['encoder']} gave {vectors.shape} for {len(x)} samples, or values that "
                                f"are not finite (first sample {rows[batches[i][0]]['id']})")
            with atomic_write(parts / f"{i}.npy") as file:
                np.save(file, vectors, allow_pickle=False)
    except UserError as error:  # a reading process sends its traceback along: the last line is the message
        bar.close()
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("prepare.UserError: ")) from None
    if world > 1:
        dist.barrier()
    if rank == 0:
        vectors = [np.load(parts / f"{i}.npy", allow_pickle=False) for i in range(len(batches))]
        order = np.argsort(np.concatenate(batches))  # batches hold each row number once
        write_embeddings(out, np.concatenate(vectors)[order], [row["id"] for row in rows], meta)
        shutil.rmtree(parts.parent)


def sizes_of(rows):
    """The sizes prepare.py was asked for, read off the shapes (C, H, W, S): what a query file must be prepared to."""
    depth = {c: max((r["shape"][3] for r in rows if r["shape"][0] == c and r["shape"][3] > 1), default=default)
             for c, default in ((1, 64), (3, FRAMES))}
    return {"size": max(max(r["shape"][1:3]) for r in rows), "slices": depth[1], "frames": depth[3]}


def write_embeddings(path, embeddings, ids, meta):
    """Write the npz of this file's header, atomically."""
    assert len(set(ids)) == len(ids) == len(embeddings), f"{len(embeddings)} embeddings, {len(set(ids))} different ids"
    with atomic_write(path) as file:
        np.savez(file, embeddings=np.asarray(embeddings, np.float32), ids=np.array(ids, str), meta=json.dumps(meta))


def read_embeddings(path):
    """npz -> embeddings (n, D) float32, ids (list of str), meta (dict). UserError if it is not such a file."""
    advice = "give an .npz with embeddings (n, D), ids (n,) and meta, as embed.py writes it"
    try:
        with np.load(path, allow_pickle=False) as file:
            embeddings, ids = file["embeddings"], file["ids"]
            meta = json.loads(str(file["meta"])) if "meta" in file else {}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {advice}") from None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no embedding file ({error}): {advice}") from None
    if embeddings.ndim != 2 or ids.shape != embeddings.shape[:1] or embeddings.dtype.kind + ids.dtype.kind != "fU":
        raise UserError(f"{path} holds embeddings {embeddings.shape} and ids {ids.shape}: {advice}")
    if len(np.unique(ids)) < max(1, len(ids)) or not np.isfinite(embeddings).all() or not isinstance(meta, dict):
        raise UserError(f"{path} is empty, repeats an id or holds values that are not finite: {advice}")
    return embeddings.astype(np.float32), ids.tolist(), meta


# ------------------------------------------------------------------------------------------------ search by one file
def picture(sample, caption, colour=(90, 90, 90), size=192):
    """Sample (C, H, W, S) -> its middle slice or frame, framed, two lines of caption below: (3, y, x) in [0, 1]."""
    middle = unit(torch.as_tensor(sample))[..., sample.shape[-1] // 2].expand(3, -1, -1)  # (3, H, W)
    image = Image.fromarray((middle.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    scale = size / max(image.size)
    tile = Image.new("RGB", (size + 12, size + 42), colour)
    tile.paste((0, 0, 0), (6, 6, size + 6, size + 36))
    tile.paste(image.resize((round(image.width * scale), round(image.height * scale))), (6, 6))
    for line, text in enumerate(caption.split("\n")[:2]):
        ImageDraw.Draw(tile).text((8, size + 6 + 14 * line), text[:32], fill="white", font=ImageFont.load_default(11))
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255  # (3, y, x)


def search_file(path, gallery, top, figure=None, checkpoint=None, modality=None, device="cpu"):
    """Embed one medical file as the gallery was and print its nearest samples: ids and labels, no name and no path."""
    embeddings, ids, meta = read_embeddings(gallery)
    embed, own = load_embedder(meta.get("encoder", "m3ret"), checkpoint or meta.get("checkpoint"), device)
    if own["checkpoint_sha256"] != meta.get("checkpoint_sha256"):
        raise UserError(f"{own['checkpoint']} is not the checkpoint that made {gallery}: give that one as --checkpoint")
    modality, sample = read_any(path, modality, **meta.get("sizes", {}))  # (C, H, W, S)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=str(device).startswith("cuda")):
        query = embed(torch.from_numpy(sample)[None].to(device)).float().cpu()  # (1, D)
    scores, indices = search(query, embeddings, top)  # (1, k)
    cache = Path(meta.get("cache", ""))
    rows = {row["id"]: row for row in read_samples(cache)} if (cache / "samples.csv").is_file() else {}
    tiles = [picture(sample, f"query ({modality})")]
    print(f"rank  cosine  {'id':16}  labels" + ("" if rows else f" (unknown: the gallery's cache {cache} is not here)"))
    for place, (score, index) in enumerate(zip(scores[0].tolist(), indices[0].tolist()), start=1):
        row = rows.get(ids[index], {})
        labels = " | ".join(row.get("labels", ()))
        print(f"{place:4}  {score:6.3f}  {ids[index]:16}  {labels}")
        if figure and row:
            tiles.append(picture(load_sample(row["folder"], row), f"{place}. {score:.3f} {row['modality']}\n{labels}"))
    if figure:
        save_montage(figure, [tiles])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("cache", nargs="?", help="folder to embed, cache/NAME")
    flag("--checkpoint", help="runs/NAME/checkpoint.pt, or the weight file of DINOv2")
    flag("--encoder", default="m3ret", help="m3ret, random, pixels, dinov2:CLONE or module:function")
    flag("--out", default="emb.npz", help="file to write (default emb.npz)")
    flag("--workers", type=int, default=2, help="reading processes; more if the GPU waits")
    flag("--search", metavar="FILE", help="DICOM file, series folder, NIfTI, image or video to look for")
    flag("--gallery", help="emb.npz to search in")
    flag("--top", type=int, default=3, help="results of a search (default 3)")
    flag("--modality", choices=MODALITIES, help="of FILE, if it does not say (only DICOM does)")
    flag("--figure", help="picture of the query and its results, PNG")
    args = parser.parse_args()
    if bool(args.cache) == bool(args.search) or bool(args.search) != bool(args.gallery):
        parser.error("give a cache folder to embed, or --search FILE and --gallery emb.npz")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.search:
        return search_file(args.search, args.gallery, args.top, args.figure, args.checkpoint, args.modality, device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # for the barrier alone: no tensor is exchanged
    rows = read_samples(args.cache)
    embed_rows(rows, *load_embedder(args.encoder, args.checkpoint, device), args.out, device, args.workers)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(rows)} embeddings in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"embed.py: {error}")
