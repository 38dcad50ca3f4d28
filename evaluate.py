"""The tasks of the paper: embeddings and labels in, one table and results/TASK.json out (Sec. 4, Appendix C and D).

In:  cache/NAME (prepare.py) and a checkpoint (train.py; default: the newest under runs/), or embeddings made by anyone.
     python evaluate.py --task chestxray14                   (or all; embeds what is not yet embedded)
     python evaluate.py --embeddings q.npz --cache cache/A   [--gallery g.npz --gallery-cache cache/B] [--relevance all]
     python evaluate.py --compare a.json b.json              (is B better than A on the same queries?)
     python evaluate.py --scaling s.json m.json l.json       (log-log fit of R@5, Fig. 4)
Protocol: each query ranks all candidates by cosine similarity, never itself; relevance is an operation on label sets.
Letters: m queries, n candidates, B queries of a block, L labels, k places of a list.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from embed import embed_rows, first_k, fixed_point, load_embedder, make_folder, picture, read_embeddings, sha256
from model import save_montage
from prepare import UserError, atomic_write, load_sample, read_samples

BLOCK = 256  # queries whose scores against the whole gallery are in memory at once
MIRROR_BYTES = 7e8  # scores of a set with itself that may be kept for their mirror images
EXACT_WORK = 1e11  # multiplications up to which scores are float64 and exact (embed.fixed_point); float32 beyond
LIST = 10  # the list that R@10, MnR and MdR look at
CUTS = (1, 5, 10)
METRICS = ("R@1", "R@5", "R@10", "MnR", "MdR")
PROBE_METRICS = ("F1", "precision", "accuracy", "AUROC")
L2 = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # CHOICE: the paper names no regularisation of its probe

PAPER = """M3Ret (MAE)         | M3Ret (SimDINO)                  | the baseline with the best R@1 (in Table 7: best F1)
chestxray14          | .247 .603 .762 6.575 6.552 | .345 .674 .812 6.136 6.095 | DINOv2-B .311 .658 .798 6.277 6.246
fetal_planes         | .881 .966 .981 5.429 5.399 | .955 .990 .996 5.456 5.445 | DINOv3-7B .971 .994 .997 5.460 5.448
kvasir_capsule       | .606 .843 .901 5.360 5.289 | .647 .872 .913 5.302 5.201 | DINOv2-B .784 .898 .936 5.132 5.038
hyper_kvasir         | .412 .687 .753 6.592 6.563 | .448 .690 .747 6.617 6.657 | DINOv2-B .396 .668 .736 6.788 6.801
regional_abnormality | .046 .178 .276 9.461 9.463 | .058 .200 .303 9.298 9.299 | Merlin .054 .198 .303 9.311 9.312
lesion_size          | .008 .030 .055 10.679 10.679 | .014 .046 .076 10.544 10.544 | Merlin .010 .043 .076 10.571 10.572
ct -> mri            | .301 .525 .641 7.552 7.554 | .424 .607 .677 7.285 7.274 | Merlin .370 .626 .710 7.005 6.977
mri -> ct            | .246 .329 .397 8.661 8.591 | .252 .495 .581 7.746 7.767 | Merlin .236 .463 .548 7.895 7.871
ct -> xray           | .327 .513 .572 7.837 7.799 | .262 .487 .548 7.912 7.900 | UniMiSS+ .204 .336 .417 8.778 8.774
xray -> ct           | .310 .552 .625 7.403 7.396 | .285 .502 .581 7.851 7.836 | UniMiSS+ .344 .518 .595 7.745 7.720
mri -> xray          | .055 .162 .217 9.802 9.792 | .152 .306 .373 8.787 8.798 | UniMiSS+ .012 .044 .073 10.599 10.597
xray -> mri          | .130 .200 .242 9.718 9.717 | .165 .382 .482 8.383 8.388 | UniMiSS+ .101 .153 .192 9.895 9.890
18 findings          | .178 .355 .824 .749 | .313 .624 .840 .797 | CT-FM .306 .494 .803 .763
body parts           | .785 .782 .785 .964 | .954 .954 .955 .997 | Merlin .948 .948 .949 .997
"""  # Tables 1, 2, 3 as METRICS; Table 7 as PROBE_METRICS


def paper_rows(name, metrics=METRICS):
    """A line of PAPER -> {method: {metric: value}}; None if there is no such line."""
    cells = next((line.split("|")[1:] for line in PAPER.splitlines() if line.split("|")[0].strip() == name), [])
    rows = [["M3Ret (MAE)"], ["M3Ret (SimDINO)"], []]
    rows = [row + cell.split() for row, cell in zip(rows, cells)]
    return {row[0]: dict(zip(metrics, map(float, row[1:]))) for row in rows} or None


# ---------------------------------------------------------------------------------------------------------- ranking
def multi_hot(label_sets, vocabulary):
    """Label sets of n samples -> (L, n) bool; labels outside the vocabulary are left out."""
    number = {label: i for i, label in enumerate(vocabulary)}
    hot = torch.zeros(len(vocabulary), len(label_sets), dtype=torch.bool)
    for column, labels in enumerate(label_sets):
        hot[[number[label] for label in labels if label in number], column] = True
    return hot


def score_blocks(queries, gallery):
    """Cosines of (m, D) with (n, D), all scaled by one constant: yields the first query of a block and (B, n).

    Within one set (gallery is queries) they are symmetric, so each tile right of the diagonal is kept until its mirror
    image is due: half the products for n^2 / 4 numbers in memory, where these are not too many.
    """
    exact = len(queries) * gallery.size <= EXACT_WORK
    g = fixed_point(gallery).to(torch.float64 if exact else torch.float32)  # (n, D)
    q = g if gallery is queries else fixed_point(queries).to(g.dtype)  # (m, D)
    within = gallery is queries and len(g) ** 2 / 4 * g.element_size() <= MIRROR_BYTES
    seen = {}  # float32 sums depend on their place in a block, so equal candidates take the score of the first of them
    first = torch.tensor([seen.setdefault(hash(row.tobytes()), i) for i, row in enumerate(g.numpy())])  # (n,)
    copies = (first != torch.arange(len(g))).nonzero()[:, 0]
    blocks = math.ceil(len(q) / BLOCK)
    store = torch.empty(blocks**2 // 4 if within else 0, BLOCK, BLOCK, dtype=g.dtype)  # one piece: no fragments
    free, held = list(range(len(store))), {}  # places in the store, and {(query block, candidate block): its place}
    for i, start in enumerate(range(0, len(q), BLOCK)):
        begin = start if within else 0
        new = g[begin:] @ q[start:start + BLOCK].T  # (n - begin, B), the faster way round
        places = [held.pop((i, j)) for j in range(i if within else 0)]
        scores = torch.cat([*store[places, :new.shape[1]], new.T], dim=1)  # (B, n)
        free += places
        for j, tile in enumerate(new.split(BLOCK)[1:] if within else [], start=i + 1):
            held[j, i] = free.pop()
            store[held[j, i], :len(tile)] = tile  # (B, B)
        scores[:, copies] = scores[:, first[copies]]
        yield start, scores


def excluded(same):
    """Pairs of string lists (m,), (n,) -> a function that lists the excluded candidates of some queries.

    It takes query numbers and gives two index arrays: position in these queries, and candidate with the same string in
    any of the pairs. "" is the string of nobody.
    """
    places = []
    for _, gallery in same:
        places.append({})
        for i, text in enumerate(gallery):
            places[-1].setdefault(text, []).append(i)

    def pairs(queries):
        columns = [np.unique([i for (texts, _), at in zip(same, places) if texts[q] for i in at.get(texts[q], ())])
                   for q in queries]
        rows = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
        return torch.from_numpy(rows), torch.from_numpy(np.concatenate(columns).astype(np.int64))
    return pairs


def first_rank(scores, relevant):
    """Rank of the first relevant candidate, ties by lower index: (B, n), (B, n) -> (B,). None: candidates + 1."""
    best = torch.where(relevant, scores, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
    rank = 1 + (scores > best).sum(dim=1, dtype=torch.int32)  # (B,) none relevant: best is -inf, all candidates above
    ties = ((scores >= best).sum(dim=1, dtype=torch.int32) > rank) & best.isfinite()[:, 0]  # (B,)
    for i in ties.nonzero()[:, 0]:
        equal = scores[i] == best[i]  # (n,)
        rank[i] += equal[:(equal & relevant[i]).nonzero()[0, 0]].sum()  # those before the first relevant one
    return rank


def list_ranks(hit):
    """Hits in the top 10 (B, k) -> mean and median rank of the hits, 11 without any (the paper's MnR, MdR): (B,) each.

    The paper defines neither. This reading fits all rows of its tables; the rank of the first hit contradicts most.
    """
    count = hit.sum(dim=1, keepdim=True)  # (B, 1)
    places = torch.arange(1, hit.shape[1] + 1)  # (k,)
    ranks = torch.where(hit, places, LIST + 1).sort(dim=1).values.double()  # (B, k) ranks of the hits, then 11s
    mean = torch.where(count > 0, (ranks * (places <= count)).sum(dim=1, keepdim=True) / count, LIST + 1.0)  # (B, 1)
    low, high = ((count - 1) // 2).clamp(min=0), (count // 2).clamp(max=hit.shape[1] - 1)  # the middle one or two
    return mean[:, 0], ((ranks.gather(1, low) + ranks.gather(1, high)) / 2)[:, 0]


def chance_of_hit(relevant, candidates, k):
    """Chance that k candidates drawn at random hold a relevant one (hypergeometric), exact: (m,), (m,) -> (m,)."""
    miss = np.ones(len(relevant))
    for i in range(k):  # ... and draw i misses too
        miss *= np.clip(candidates - relevant - i, 0, None) / np.maximum(candidates - i, 1)
    return np.where(relevant > 0, 1 - miss, 0.0)


def measure(queries, gallery, asked, offered, same=(), relevance="any"):
    """Everything the tables need, per query: dict of arrays (m, ...).

    queries (m, D), gallery (n, D); asked, offered: their label sets. A candidate is relevant if it shares a label (any)
    or carries every label of the query (all); a query without labels has no relevant candidate. same: pairs of string
    lists (m,), (n,): candidates whose string equals the query's are excluded, "" excludes nothing.
    """
    vocabulary = sorted({label for labels in asked for label in labels})
    hot_q = multi_hot(asked, vocabulary)  # (L, m)
    hot_g = hot_q if offered is asked else multi_hot(offered, vocabulary)  # (L, n)
    count = torch.tensor([float(len(set(labels))) for labels in asked])  # (m,)
    need = torch.where(count == 0, torch.inf, count if relevance == "all" else 1.0)  # (m,) shared labels of a match
    pairs = excluded(same)
    result = {}
    for start, scores in score_blocks(queries, gallery):
        B, rows = len(scores), slice(start, start + len(scores))
        used = hot_q[:, rows].any(dim=1)  # (L,) only labels of this block enter the product
        relevant = hot_q[:, rows][used].float().T @ hot_g[used].float() >= need[rows, None]  # (B, n)
        out = pairs(range(start, start + B))  # (pairs,) and (pairs,)
        scores[out], relevant[out] = -torch.inf, False
        top = first_k(scores, LIST)[1]  # (B, k)
        hit = relevant.gather(1, top)  # (B, k) an excluded candidate is never relevant
        mean, median = list_ranks(hit)
        found = {**{f"R@{k}": hit[:, :k].any(dim=1) for k in CUTS}, "MnR": mean, "MdR": median,
                 "first": first_rank(scores, relevant), "relevant": relevant.sum(dim=1, dtype=torch.int32),
                 "candidates": len(gallery) - torch.bincount(out[0], minlength=B), "top": top, "hit": hit}
        for key, value in found.items():  # kept small pieces would split the memory that the next block needs
            result.setdefault(key, torch.empty(len(queries), *value.shape[1:], dtype=value.dtype))[rows] = value
    return {key: value.numpy() for key, value in result.items()}


def bootstrap(values, draws=1000, seed=0):
    """Means of each column of (m, c) over resampled queries (draws, c), and their 95 % intervals (2, c)."""
    generator, m = np.random.default_rng(seed), len(values)
    means = np.stack([np.bincount(generator.integers(0, m, m), minlength=m) @ values / m for _ in range(draws)])
    return means, np.percentile(means, [2.5, 97.5], axis=0)


def summarise(found):
    """What `measure` found -> the numbers of a results file."""
    names = (*METRICS, "first_MnR")
    columns = [found["first" if name == "first_MnR" else name].astype(float) for name in names]
    table = np.stack(columns, axis=1)  # (m, 6)
    chance = {f"R@{k}": float(chance_of_hit(found["relevant"], found["candidates"], k).mean()) for k in CUTS}
    return {"queries": len(table), "without_relevant": int((found["relevant"] == 0).sum()),
            **dict(zip(names, table.mean(axis=0).tolist())), "first_MdR": float(np.median(found["first"])),
            "chance": chance, "ci95": dict(zip(names, bootstrap(table)[1].T.tolist())),
            "hits": {f"R@{k}": "".join("01"[int(hit)] for hit in found[f"R@{k}"]) for k in CUTS}}


# ------------------------------------------------------------------------------------------------------------ tasks
class Setting(NamedTuple):
    """Queries and candidates (rows of read_samples; None: the queries themselves), and which labels count, and how.

    all_ask: samples without such labels are queries too, which cannot be answered, and not candidates only.
    """
    name: str
    queries: list
    gallery: list = None
    labels: callable = lambda row: row["labels"]
    relevance: str = "any"
    all_ask: bool = False


class Task(NamedTuple):
    """A task within one public data set: its cache, the paper's test size (Table 6), and the samples that take part."""
    cache: str
    paper: int
    takes: callable = lambda row: row["labels"]
    family: str = ""  # prefix of the labels that count
    relevance: str = "any"


TASKS = {
    "chestxray14": Task("chestxray14", 7992, lambda row: row["split"] == "test" and len(row["labels"]) == 1),  # App. C
    "fetal_planes": Task("fetal_planes", 8188, lambda row: row["labels"] and "Other" not in row["labels"]),  # App. C
    "kvasir_capsule": Task("kvasir_capsule", 344),
    "hyper_kvasir": Task("hyper_kvasir", 364),
    "regional_abnormality": Task("radgenome", 25687, lambda row: True, "status:", "all"),
    "lesion_size": Task("radgenome", 25687, lambda row: True, "size:", "all"),
}
OTHER_CACHES = {"probe": "ct_rate", "demo": "demo"}
DIRECTIONS = [("ct", "mri"), ("mri", "ct"), ("ct", "xray"), ("xray", "ct"), ("mri", "xray"), ("xray", "mri")]  # Table 3


def own_caches(task):
    """Cache folders of a task. CHOICE: for cross_modal all that hold no public data set, as the paper's are private."""
    if task != "cross_modal":
        return [f"cache/{TASKS[task].cache if task in TASKS else OTHER_CACHES[task]}"]
    public = {row.cache for row in TASKS.values()} | {*OTHER_CACHES.values()}
    return sorted(str(file.parent) for file in Path("cache").glob("*/samples.csv") if file.parent.name not in public)


def body_parts(row):
    """Labels that name body parts: those with the prefix `part:`, and those without any prefix."""
    return [label.removeprefix("part:") for label in row["labels"] if label.startswith("part:") or ":" not in label]


def settings_of(task, folders):
    """The Settings of a task on the samples of these cache folders."""
    rows = [row for folder in folders for row in read_samples(folder)]
    if task in TASKS:
        _, paper, takes, family, relevance = TASKS[task]
        rows = [row for row in rows if takes(row)]

        def labels(row):
            return [label for label in row["labels"] if label.startswith(family)]
        # CHOICE: every sample is a candidate, and those with a label of the family are queries.
        asking = sum(bool(labels(row)) for row in rows)
        print(f"{task}: found {len(rows)} samples, paper {paper}; {asking} of them are queries")
        return [Setting(task, rows, None, labels, relevance)] * bool(asking)
    # CHOICE: samples of a training split, and samples without a body part, take no part.
    rows = [row for row in rows if row["split"] != "train" and body_parts(row)]
    sets = {name: [row for row in rows if row["modality"] == name] for name in sorted({r["modality"] for r in rows})}
    print(f"{task}: found " + ", ".join(f"{len(members)} {name}" for name, members in sets.items()))
    within = [Setting(name, members, None, body_parts) for name, members in sets.items() if task == "demo"]
    pairs = DIRECTIONS if task == "cross_modal" else [("ct", "xray"), ("xray", "ct"), ("ct", "mri")]
    return within + [Setting(f"{a} -> {b}", sets[a], sets[b], body_parts) for a, b in pairs if a in sets and b in sets]


def checkpoints():
    """Checkpoints under runs/, the newest first."""
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: -path.stat().st_mtime)
    if not found:
        raise UserError("no runs/*/checkpoint.pt here: train first (train.py), or give --checkpoint FILE")
    return found


def checkpoint_of(args):
    """The checkpoint asked for, or the newest one; pixels need none."""
    return args.checkpoint or (None if args.encoder == "pixels" else checkpoints()[0])


def embeddings_of(rows, encoder, checkpoint):
    """Embeddings (n, D) of rows and their meta: from results/embeddings/ if they are there, else made now.

    The file name holds a hash of the encoder, the checkpoint's bytes and every sample file's size and time, so that
    embeddings of another checkpoint, or of a cache that was made again, are never used.
    """
    place = {(row["folder"], row["id"]): i for i, row in enumerate(rows)}
    result = meta = None
    for folder in sorted({row["folder"] for row in rows}):  # ids are unique within a cache
        members = sorted((row for row in rows if row["folder"] == folder), key=lambda row: row["id"])
        try:
            stats = [Path(folder, f"{row['id']}.npy").stat() for row in members]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: run prepare.py again, it makes what is not there") from None
        stamps = [(row["id"], stat.st_size, stat.st_mtime_ns) for row, stat in zip(members, stats)]
        digest = hashlib.sha256(json.dumps([encoder, sha256(checkpoint), stamps]).encode()).hexdigest()[:16]
        path = Path("results/embeddings", f"{Path(folder).name}-{digest}.npz")
        if not path.is_file():
            make_folder(path.parent)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            embed_rows(members, *load_embedder(encoder, checkpoint, device), path, device)
        part, ids, meta = read_embeddings(path)
        if result is None:
            result = np.empty((len(rows), part.shape[1]), np.float32)  # (n, D)
        result[[place[folder, i] for i in ids]] = part
    return result, meta


def match(path, cache):
    """An embeddings file and the cache it was made from -> rows in the file's order, embeddings (n, D), meta."""
    embeddings, ids, meta = read_embeddings(path)
    rows = {row["id"]: row for row in read_samples(cache)}
    unknown = [i for i in ids if i not in rows]
    if unknown:
        raise UserError(f"{len(unknown)} of {len(ids)} ids in {path} are not in {cache}, such as {unknown[0]}: "
                        "give the cache that these embeddings were made from")
    return [rows[i] for i in ids], embeddings, meta


def pooled(embeddings, stored, how):
    """Embeddings (n, D) in the pooling asked for: one pass stores mix = [CLS, avg], which holds all three (Fig. 3b)."""
    if how in ("", stored):
        return embeddings
    if stored != "mix":
        raise UserError(f"--pool {how}: these embeddings hold {stored or 'an unnamed pooling'} only; encoders with a "
                        "CLS token (SimDINO) store mix, which holds cls and avg too")
    return np.ascontiguousarray(np.split(embeddings, 2, axis=1)[how == "avg"])


def retrieve(setting, queries, gallery, args, figure=None):
    """Rank the gallery (n, D) of a setting (None: leave-one-out) for its queries (m, D) -> a row of a results file."""
    candidates = setting.queries if gallery is None else setting.gallery

    def both(key):  # of each query and each candidate; within one set the same list twice
        asked = [key(row) for row in setting.queries]
        return asked, asked if gallery is None else [key(row) for row in candidates]
    same = [both(lambda row: f"{Path(row['folder']).resolve()} {row['id']}")]  # the query itself
    if args.exclude_same:
        same.append(both(lambda row: row[args.exclude_same]))
    asked, offered = both(setting.labels)
    found = measure(queries, queries if gallery is None else gallery, asked, offered, same, setting.relevance)
    asking = [i for i, labels in enumerate(asked) if labels or setting.all_ask]
    found = {key: value[asking] for key, value in found.items()}
    setting = setting._replace(queries=[setting.queries[i] for i in asking])
    if figure:
        draw_queries(figure, setting, candidates, found)
    digest = hashlib.sha256("\n".join(row["id"] for row in setting.queries).encode()).hexdigest()
    return {"name": setting.name, "gallery": len(candidates), **summarise(found), "relevance": setting.relevance,
            "exclude_same": args.exclude_same, "queries_sha256": digest, "paper": paper_rows(setting.name)}


def draw_queries(path, setting, candidates, found, count=4):
    """Picture of queries drawn at random (seed 0) with their top 3, framed green if right and red if wrong (Fig. 5)."""
    def tile(row, head, colour=(90, 90, 90)):
        return picture(load_sample(row["folder"], row), f"{head}\n{', '.join(setting.labels(row))}", colour)
    chosen = np.random.default_rng(0).permutation(len(setting.queries))[:count]
    save_montage(path, [[tile(setting.queries[i], f"query: {setting.name}")] + [
        tile(candidates[j], f"{place}. {'right' if hit else 'wrong'}", (0, 150, 60) if hit else (200, 30, 30))
        for place, (j, hit) in enumerate(zip(found["top"][i, :3], found["hit"][i, :3]), start=1)] for i in chosen])


def about(meta, **more):
    """What a results file says of the embeddings."""
    keys = ("encoder", "checkpoint", "checkpoint_sha256", "pool", "parameters", "run", "precision")
    return {key: meta.get(key, "") for key in keys} | more


def any_embeddings(args):
    """--embeddings: within one set, or against --gallery."""
    rows, queries, meta = match(args.embeddings, args.cache[0])
    others = gallery = None
    if args.gallery:
        others, gallery, other = match(args.gallery, args.gallery_cache or args.cache[0])
        differ = [key for key in ("encoder", "checkpoint_sha256", "pool") if meta.get(key, "") != other.get(key, "")]
        if gallery.shape[1] != queries.shape[1] or differ and meta and other:
            raise UserError(f"{args.embeddings} and {args.gallery} come from different encoders: embed both with one")
        gallery = pooled(gallery, other.get("pool"), args.pool[0])
    setting = Setting("embeddings", rows, others, relevance=args.relevance, all_ask=True)
    found = retrieve(setting, pooled(queries, meta.get("pool"), args.pool[0]), gallery, args, args.figure)
    return [about(meta, task="embeddings", model=Path(args.embeddings).stem, **found)]


def run_task(task, args):
    """All settings of a task, with every encoder and pooling asked for -> rows of its results file."""
    settings = settings_of(task, args.cache or own_caches(task))
    if not settings:
        raise UserError(f"no samples for {task} in {' '.join(args.cache or own_caches(task)) or 'cache/'}: name the "
                        "caches that hold them with --cache")
    models = [(args.encoder, checkpoint_of(args))]
    if args.task == "demo" and not args.checkpoint:  # side by side: every run, an untrained encoder, raw pixels
        models = [("m3ret", path) for path in checkpoints()] + [("random", checkpoints()[0]), ("pixels", None)]
    rows = {(row["folder"], row["id"]): row for s in settings for row in [*s.queries, *(s.gallery or [])]}
    place = {key: i for i, key in enumerate(rows)}
    results = []
    for encoder, checkpoint in models:
        embeddings, meta = embeddings_of(list(rows.values()), encoder, checkpoint)
        for how in args.pool:
            vectors = pooled(embeddings, meta["pool"], how)  # (n, D)
            for s in settings:
                sides = [vectors[[place[row["folder"], row["id"]] for row in side]] if side else None
                         for side in (s.queries, s.gallery)]
                model = Path(checkpoint).parent.name or "m3ret" if encoder == "m3ret" else encoder
                figure = None if results else args.figure  # of the first model and setting
                found = retrieve(s, *sides, args, figure)
                results.append(about(meta, task=task, model=f"{model} {how}".strip(), **found)
                               | {"pool": how or meta["pool"]})
    return results


# ------------------------------------------------------------------------------------------------------------ probe
def cross_entropy(x, y, w, multi):
    """Mean over samples of the softmax cross-entropy (or summed sigmoid ones): x (n, D), y (n, L), w (D + 1, L)."""
    logits = x @ w[:-1] + w[-1]  # (n, L)
    if multi:
        return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(y)
    return F.cross_entropy(logits, y)


def fit(x, y, l2, multi):
    """Logistic regression by L-BFGS: x (n, D), y (n, L) one-hot or multi-hot -> w (D + 1, L), the last row the bias.

    Minimises cross_entropy + l2 / 2 * |w without the bias|^2.
    """
    w = torch.zeros(x.shape[1] + 1, y.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = cross_entropy(x, y, w, multi) + l2 / 2 * w[:-1].square().sum()
        loss.backward()
        return loss
    solver.step(closure)
    return w.detach()


def auroc(scores, truth):
    """Area under the ROC curve, scores (n,), truth (n,) bool: the chance that a positive scores above a negative."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # (n,) equal scores share their mean rank
    p, n = truth.sum(), (~truth).sum()
    return (ranks[truth].sum() - p * (p + 1) / 2) / (p * n)


def probe_scores(chances, truth, multi):
    """Predicted probabilities (n, L) and truth (n, L) bool -> Table 7's numbers, means over labels.

    CHOICE: a finding is called above 1/2; accuracy is the share of right (sample, finding) pairs, or of right samples
    for classes; a label never called has precision and F1 0; AUROC skips labels that all or no test samples carry.
    """
    called = chances > 0.5 if multi else np.arange(truth.shape[1]) == chances.argmax(axis=1)[:, None]  # (n, L)
    right, carry, calls = (called & truth).sum(axis=0), truth.sum(axis=0), called.sum(axis=0)  # (L,)
    areas = [auroc(chances[:, j], truth[:, j]) for j in range(truth.shape[1]) if 0 < carry[j] < len(truth)]
    values = ((2 * right / np.maximum(carry + calls, 1)).mean(), (right / np.maximum(calls, 1)).mean(),
              (called == truth).mean() if multi else right.sum() / len(truth), np.mean(areas) if areas else np.nan)
    return dict(zip(PROBE_METRICS, map(float, values)))


def split_probe(rows, classes, generator):
    """Row numbers (training, test): by the split column, or, without one, 4 : 1 within each class (Appendix C)."""
    if any(row["split"] == "test" for row in rows):
        return [np.array([i for i, r in enumerate(rows) if (r["split"] == "test") == test]) for test in (False, True)]
    order = generator.permutation(len(rows))
    members = [[i for i in order if classes[i] == name] for name in sorted(set(classes))]
    return [np.array([i for m in members for i in (m[:len(m) // 5] if test else m[len(m) // 5:])])
            for test in (False, True)]


def probe(args):
    """Linear probe on frozen embeddings (Appendix D): the findings of a cache that has them, else its body parts."""
    rows = [row for folder in args.cache or own_caches("probe") for row in read_samples(folder)]
    multi = any(label.startswith("finding:") for row in rows for label in row["labels"])
    rows = rows if multi else [row for row in rows if body_parts(row)]
    targets = [[label for label in row["labels"] if label.startswith("finding:")] if multi
               else ["+".join(sorted(body_parts(row)))] for row in rows]  # several parts together are one class
    generator = np.random.default_rng(0)
    train, test = split_probe(rows, ["+".join(target) for target in targets], generator)
    names = sorted({label for i in train for label in targets[i]})
    if min(len(train), len(test)) < 5 or len(names) < 2 - multi:
        raise UserError(f"probe: {len(train)} training and {len(test)} test samples, {len(names)} labels: too few")
    embeddings, meta = embeddings_of(rows, args.encoder, checkpoint_of(args))
    x, y = torch.from_numpy(pooled(embeddings, meta["pool"], args.pool[0])), multi_hot(targets, names).T.float()
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0).clamp_min(1e-6)  # (n, D), by the training split alone
    kept = generator.permutation(train)
    held, kept = kept[:len(kept) // 5], kept[len(kept) // 5:]
    l2 = min(L2, key=lambda l2: cross_entropy(x[held], y[held], fit(x[kept], y[kept], l2, multi), multi).item())
    w = fit(x[train], y[train], l2, multi)  # (D + 1, L)
    logits = x[test] @ w[:-1] + w[-1]  # (n, L)
    chances = logits.sigmoid() if multi else logits.softmax(dim=1)
    name = f"{len(names)} findings" if multi else "body parts"
    scores = probe_scores(chances.numpy(), y[test].bool().numpy(), multi)
    return [about(meta, task="probe", name=name, train=len(train), test=len(test), labels=names, l2=l2, **scores,
                  paper=paper_rows(name, PROBE_METRICS))]


# ---------------------------------------------------------------------------------------------------------- studies
def load_results(path):
    """Rows of a results file of a retrieval task; their hits as arrays of 0 and 1."""
    try:
        content = json.loads(Path(path).read_text())
        rows = content.get("rows", [content])
        return [row | {"hits": {k: np.array(list(bits), int) for k, bits in row["hits"].items()}} for row in rows]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no results file of a retrieval task ({error!r}): evaluate the task again") from None


def compare(first, second):
    """Paired bootstrap over queries: is B better than A? Yields lines of a table."""
    files = load_results(first), load_results(second)
    if len({tuple((row["name"], row["queries_sha256"]) for row in rows) for rows in files}) > 1:
        raise UserError(f"{first} and {second} hold other queries: compare two runs of one task on one cache")
    for a, b in zip(*files):
        for k in a["hits"]:
            gain = (b["hits"][k] - a["hits"][k])[:, None]  # (m, 1)
            means, (low, high) = bootstrap(gain)
            yield [f"{a['name']}  {k}", f"{a[k]:.3f}", f"{b[k]:.3f}", f"{gain.mean():+.3f}",
                   f"{low[0]:+.3f} to {high[0]:+.3f}", f"{(means <= 0).mean():.3f}"]


def scaling(paths, against, figure=None):
    """Fit log R@5 = slope * log x + intercept per task over results files (Fig. 4): lines of a table, and a PNG."""
    points = {}
    for row in (row for path in paths for row in load_results(path)):
        x = row["parameters"] if against == "parameters" else (row["run"] or {}).get("data_fraction")
        if not x or row["R@5"] <= 0:
            raise UserError(f"a result for {row['name']} has R@5 {row['R@5']} at {against} {x}: both must be above 0")
        points.setdefault(row["name"], []).append((x, row["R@5"]))
    lone = [name for name, xy in points.items() if len({x for x, _ in xy}) < 2]
    if lone:
        raise UserError(f"{', '.join(lone)}: a fit needs results at two or more values of {against}")
    fits = {name: np.polyfit(*np.log(np.array(xy)).T, 1) for name, xy in points.items()}
    if figure:
        draw_scaling(figure, points, fits, against)
    return [[name, str(len(points[name])), f"{slope:.4f}", f"{start:.4f}"] for name, (slope, start) in fits.items()]


def draw_scaling(path, points, fits, against, w=480, h=320):
    """One panel per task: the points in log-log axes, and the fitted power law."""
    sheet = Image.new("RGB", (w, h * len(points)), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, (name, xy) in enumerate(points.items()):
        logs, fit_line = np.log(np.array(sorted(xy))), fits[name]  # (points, 2)
        low, span = logs.min(axis=0), np.maximum(np.ptp(logs, axis=0), 0.02)

        def at(x, y):  # log values -> pixels
            return 80 + (x - low[0]) / span[0] * (w - 160), h * (panel + 1) - 60 - (y - low[1]) / span[1] * (h - 130)
        draw.rectangle((40, h * panel + 34, w - 20, h * (panel + 1) - 20), outline="grey")
        head = f"{name}:  log R@5 = {fit_line[0]:.3f} log({against}) {fit_line[1]:+.3f}"
        draw.text((40, h * panel + 12), head, fill="black")
        draw.line([at(x, np.polyval(fit_line, x)) for x in logs[[0, -1], 0]], fill="red", width=2)
        for (x, y), (u, v) in zip(sorted(xy), (at(*point) for point in logs)):
            draw.ellipse((u - 4, v - 4, u + 4, v + 4), fill="navy")
            draw.text((u - 24, v + 8), f"{x:,g}: {y:.3f}", fill="black")
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")


# ----------------------------------------------------------------------------------------------------------- tables
LEGEND = {
    "R@K": "share of queries with a relevant sample among their K most similar candidates; higher is better",
    "MnR, MdR": "as in the paper: mean (median) rank of all relevant samples in a query's top 10, 11 if there is none, "
                "averaged over queries; ten of ten relevant score 5.5, so lower is better only down to there",
    "first": "rank of the first relevant sample in the whole gallery, mean and median over queries; a query without "
             "any counts as one place behind its last candidate",
    "queries": "samples that ask; gallery: samples there are to find (a query never finds itself)",
    "none": "queries without any relevant candidate; they count as misses",
    "95 %": "bootstrap interval over queries (1000 resamples)",
    "chance": "what a random order of the same candidates scores, exactly",
    "paper": "as printed there, with its own weights and samples",
    "F1": "and precision, AUROC: means over labels; accuracy: share of right decisions",
    "train": "and test: samples that the linear classifier was fitted to, and judged on",
    "A, B": "share of queries with a hit, in the first and in the second file",
    "gain": "B minus A on the same queries, with the interval of a paired bootstrap",
    "p": "share of resamples in which B is not better than A",
}


def render(header, rows, terms, markdown=False):
    """A table as text, and a line for each of its terms below."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines]
    legend = [textwrap.fill(f"{term:9} {LEGEND[term]}", 120, subsequent_indent=" " * 10) for term in terms]
    return "\n".join([*lines, "", *(["- " + " ".join(line.split()) for line in legend] if markdown else legend)])


def lines_of(result):
    """One row of a results file -> lines of the table: ours, interval, chance, paper."""
    names = (*METRICS, "first_MnR")
    yield [result["name"], *(f"{result[m]:.3f}" for m in names), f"{result['first_MdR']:.1f}",
           *(str(result[key]) for key in ("queries", "gallery", "without_relevant"))]
    yield ["  95 %", *("{:.3f}-{:.3f}".format(*result["ci95"][m]) for m in names)] + [""] * 4
    yield ["  chance", *(f"{result['chance'][m]:.3f}" for m in METRICS[:3])] + [""] * 7
    for name, values in (result["paper"] or {}).items():
        yield [f"  paper: {name}", *(f"{values[m]:.3f}" for m in METRICS)] + [""] * 5


def table(results, markdown=False):
    """Rows of results files -> text: a block per setting, or several models or poolings side by side, or the probe."""
    if "AUROC" in results[0]:
        lines = []
        for r in results:
            lines.append([r["name"], *(f"{r[m]:.3f}" for m in PROBE_METRICS), str(r["train"]), str(r["test"])])
            for name, values in (r["paper"] or {}).items():
                lines.append([f"  paper: {name}", *(f"{values[m]:.3f}" for m in PROBE_METRICS), "", ""])
        return render(["", *PROBE_METRICS, "train", "test"], lines, ["F1", "train", "paper"], markdown)
    models = list(dict.fromkeys(r["model"] for r in results))
    if len(models) == 1:
        header = ["", *METRICS, "first mean", "median", "queries", "gallery", "none"]
        return render(header, [line for r in results for line in lines_of(r)], list(LEGEND)[:8], markdown)
    cells = {(r["name"], r["model"]): r for r in results}
    lines = [[f"{name}  {m}", *("{:.3f} [{:.3f}-{:.3f}]".format(r[m], *r["ci95"][m])
                                for r in (cells[name, model] for model in models)),
              f"{cells[name, models[0]]['chance'][m]:.3f}"]
             for name in dict.fromkeys(r["name"] for r in results) for m in METRICS[:2]]
    return render(["", *models, "chance"], lines, ["R@K", "95 %", "chance"], markdown)


def save(path, results):
    """Write a results file: one row as itself, several as {"rows": [...]}."""
    protocol = " ".join(__doc__.partition("Protocol: ")[2].partition("\nLetters")[0].split())
    more = {"protocol": {"ranking": protocol, **LEGEND}, "versions": {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    make_folder(Path(path).parent)
    with atomic_write(path) as file:
        file.write(json.dumps((results[0] if len(results) == 1 else {"rows": results}) | more, indent=1).encode())
    print(f"written: {path}")


def evaluate(task, args):
    """Rows of a task's results file."""
    return probe(args) if task == "probe" else run_task(task, args)


def run_all(args):
    """Every task whose cache is there: results/TASK.json each; one table of retrieval, and one of the probe."""
    retrieval, probes = [], []
    for task in (*TASKS, "cross_modal", "demo", "probe"):
        if not own_caches(task) or not all(Path(folder, "samples.csv").is_file() for folder in own_caches(task)):
            continue
        try:
            results = evaluate(task, args)
        except UserError as error:
            print(f"{task} left out: {error}")
            continue
        save(f"results/{task}.json", results)
        (probes if task == "probe" else retrieval).extend(results)
    if not retrieval + probes:
        raise UserError("no task has its data set under cache/: run prepare.py first")
    print("\n" + "\n\n".join(table(rows, args.markdown) for rows in (retrieval, probes) if rows))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=[*TASKS, "cross_modal", "demo", "probe", "all"], help="all: every task whose cache is there")
    flag("--cache", nargs="+", help="cache folders (default: the task's data set under cache/; for cross_modal every "
         "folder there that is no public data set)")
    flag("--checkpoint", help="default: the newest runs/*/checkpoint.pt; for demo all of them")
    flag("--encoder", default="m3ret", help="m3ret, random, pixels, dinov2:CLONE or module:function, as in embed.py")
    flag("--pool", nargs="+", choices=["avg", "cls", "mix"], default=[""], help="several are compared side by side")
    flag("--exclude-same", choices=["patient"], default="", help="leave out candidates of the query's patient")
    flag("--embeddings", metavar="NPZ", help="evaluate these, whoever made them; their labels come from --cache")
    flag("--gallery", metavar="NPZ", help="with --embeddings: what to search (default: the queries, leave-one-out)")
    flag("--gallery-cache", metavar="FOLDER", help="cache of --gallery (default: --cache)")
    flag("--relevance", choices=["any", "all"], default="any", help="with --embeddings: share a label, or all labels")
    flag("--compare", nargs=2, metavar=("A", "B"), help="two results files of one task")
    flag("--scaling", nargs="+", metavar="FILE", help="results files of several models")
    flag("--against", choices=["parameters", "data_fraction"], default="parameters", help="with --scaling: the x axis")
    flag("--figure", metavar="PNG", help="draw some queries and their top 3, or the fit of --scaling")
    flag("--markdown", action="store_true", help="print tables as Markdown")
    flag("--out", help="results file (default results/TASK.json)")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("run this without torchrun; to share the embedding, run embed.py under it and give --embeddings")
    if sum(map(bool, (args.task, args.embeddings, args.compare, args.scaling))) != 1:
        parser.error("give one of --task, --embeddings, --compare and --scaling")
    if args.embeddings and len(args.cache or []) != 1 or args.task == "all" and (args.cache or args.out):
        parser.error("--embeddings needs one --cache; --task all finds its caches and names its files itself")
    if len(args.pool) > 1 and (args.embeddings or args.task == "probe"):
        parser.error("several --pool are compared for retrieval tasks only: give one")
    return args


def main():
    args = parse_arguments()
    if args.compare:
        lines = list(compare(*args.compare))
        print(render(["", "A", "B", "gain", "95 %", "p"], lines, ["A, B", "gain", "p"], args.markdown))
    elif args.scaling:
        lines = scaling(args.scaling, args.against, args.figure)
        print(f"log R@5 = slope * log({args.against}) + intercept")
        print(render(["", "results", "slope", "intercept"], lines, [], args.markdown))
    elif args.task == "all":
        run_all(args)
    else:
        results = any_embeddings(args) if args.embeddings else evaluate(args.task, args)
        save(args.out or f"results/{args.task or 'embeddings'}.json", results)
        print("\n" + table(results, args.markdown))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"evaluate.py: {error}")
