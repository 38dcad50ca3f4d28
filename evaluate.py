"""The retrieval tasks of the paper: embeddings and labels in, one table and results/TASK.json out (Sec. 4, Appendix C, D).

In:  cache/NAME (prepare.py) and a checkpoint (train.py; the newest under runs/ by default), or embeddings made by anyone.
     python evaluate.py --task chestxray14
     python evaluate.py --embeddings q.npz --cache cache/A [--gallery g.npz --gallery-cache cache/B] [--relevance all]
Protocol: every query ranks all candidates by cosine similarity. Within one set it is left out of its own list.
Letters: m queries, n gallery samples, B queries of a block, L labels, k places of a list.
"""
import argparse
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from embed import embed_rows, first_k, fixed_point, load_embedder, read_embeddings, sha256, sizes_of
from prepare import UserError, atomic_write, read_samples

BLOCK = 512  # queries whose scores against the whole gallery are in memory at once
EXACT_WORK = 1e11  # multiplications up to which scores are float64 (seconds); float32 beyond, twice as fast
LIST = 10  # length of the list that R@10, MnR and MdR look at
CUTS = (1, 5, 10)
METRICS = ("R@1", "R@5", "R@10", "MnR", "MdR")


class Task(NamedTuple):
    """cache: folder under cache/; paper: its number of samples (Table 6); takes: which rows; family: label prefix that counts."""
    cache: str
    paper: int
    relevance: str
    family: str
    takes: callable
    words: str


TASKS = {
    "chestxray14": Task("chestxray14", 7992, "any", "", lambda r: r["split"] == "test" and len(r["labels"]) == 1,
                        "official test split, images with exactly one finding"),
    "fetal_planes": Task("fetal_planes", 8188, "any", "", lambda r: r["labels"] and "Other" not in r["labels"],
                         "train and test together, without the class Other"),
    "kvasir_capsule": Task("kvasir_capsule", 344, "any", "", lambda r: r["labels"], "clips with a class"),
    "hyper_kvasir": Task("hyper_kvasir", 364, "any", "", lambda r: r["labels"], "videos with a category"),
    "regional_abnormality": Task("radgenome", 25687, "all", "status:", lambda r: True, "all volumes"),
    "lesion_size": Task("radgenome", 25687, "all", "size:", lambda r: True, "all volumes"),
}

PAPER = {  # Tables 1 to 3, as METRICS: M3Ret and the baseline with the best R@1
    "chestxray14": {"M3Ret (MAE)": (0.247, 0.603, 0.762, 6.575, 6.552), "M3Ret (SimDINO)": (0.345, 0.674, 0.812, 6.136, 6.095),
                    "DINOv2-B": (0.311, 0.658, 0.798, 6.277, 6.246)},
}


# ---------------------------------------------------------------------------------------------------------- ranking
def multi_hot(label_sets, vocabulary):
    """Label sets of n samples -> (L, n) bool; labels outside the vocabulary are left out."""
    column = {label: i for i, label in enumerate(vocabulary)}
    hot = torch.zeros(len(vocabulary), len(label_sets), dtype=torch.bool)
    pairs = [(column[label], i) for i, labels in enumerate(label_sets) for label in labels if label in column]
    if pairs:
        hot[tuple(torch.tensor(pairs).T)] = True
    return hot


def score_blocks(queries, gallery):
    """Cosines of (m, D) and (n, D), as yields of (first query, (B, n)), scaled by one constant.

    Within one set (gallery is queries) the cosines are symmetric, so every tile right of the diagonal is kept until its
    mirror image is due: half the products, at most n^2 / 4 numbers in memory.
    """
    exact = len(queries) * gallery.size <= EXACT_WORK
    symmetric = gallery is queries
    g = fixed_point(gallery)  # (n, D)
    q = g if symmetric else fixed_point(queries)  # (m, D)
    if not exact:
        g = g.float()
        q = g if symmetric else q.float()
    tiles = {}
    for i, start in enumerate(range(0, len(q), BLOCK)):
        begin = start if symmetric else 0
        new = q[start:start + BLOCK] @ g[begin:].T  # (B, n - begin)
        left = [tiles.pop((j, i)).T for j in range(i)] if symmetric else []
        for j, column in enumerate(range(start + BLOCK, len(g), BLOCK), i + 1):
            if symmetric:
                tiles[i, j] = new[:, column - begin:column - begin + BLOCK].clone()
        yield start, torch.cat(left + [new], dim=1)  # (B, n)


def chance_of_hit(relevant, candidates, k):
    """Chance that k of the candidates, drawn at random, hold a relevant one (hypergeometric): arrays (m,) -> (m,)."""
    miss = np.ones(len(relevant))
    for i in range(k):  # the i-th draw misses too
        miss *= np.clip(candidates - relevant - i, 0, None) / np.maximum(candidates - i, 1)
    return np.where(relevant > 0, 1 - miss, 0.0)


def codes(queries, gallery):
    """Strings of both sides as int32 numbers, equal where the strings are; "" equals nothing."""
    _, numbers = np.unique(np.array([*queries, *gallery], dtype=str), return_inverse=True)
    numbers = numbers.reshape(-1).astype(np.int32)
    q, g = numbers[:len(queries)].copy(), numbers[len(queries):]
    q[np.array(queries, dtype=str) == ""] = -1
    return torch.from_numpy(q), torch.from_numpy(g)


def measure(queries, gallery, asked, offered, same=(), relevance="any"):
    """Everything the tables need, per query: dict of arrays (m,).

    queries (m, D), gallery (n, D); asked, offered: their label sets. A candidate is relevant if it shares a label (any) or
    carries every label of the query (all); a query without labels has no relevant candidate. same: pairs of string lists
    (m,), (n,): candidates whose string equals the query's are excluded, "" excludes nothing.
    """
    vocabulary = sorted({label for labels in asked for label in labels})
    hot_g = multi_hot(offered, vocabulary)  # (L, n)
    hot_q = multi_hot(asked, vocabulary)  # (L, m)
    count = hot_q.sum(dim=0).float()  # (m,)
    need = torch.where(count == 0, torch.inf, count if relevance == "all" else 1.0)  # (m,) shared labels that make a match
    keys = [codes(*pair) for pair in same]
    places = torch.arange(1, LIST + 1)  # (k,)
    parts = []
    for start, scores in score_blocks(queries, gallery):
        rows = slice(start, start + len(scores))
        used = hot_q[:, rows].any(dim=1)  # (L,) only the labels of this block enter the product
        relevant = hot_q[:, rows][used].float().T @ hot_g[used].float() >= need[rows, None]  # (B, n)
        out = torch.zeros_like(relevant)  # (B, n)
        for q, g in keys:
            out |= q[rows, None] == g
        scores.masked_fill_(out, -torch.inf)
        relevant &= ~out
        top, columns = first_k(scores, LIST)  # (B, k)
        hit = relevant.gather(1, columns)  # (B, k) excluded candidates are never relevant
        ranks = torch.where(hit, places[:hit.shape[1]], LIST + 1).sort(dim=1).values.double()  # (B, k) ranks of the hits, then 11s
        hits = hit.sum(dim=1)  # (B,)
        middle = [ranks.gather(1, i.clamp(0)[:, None])[:, 0] for i in ((hits - 1) // 2, hits.clamp(max=LIST - 1) // 2)]
        mean = (ranks * (torch.arange(ranks.shape[1]) < hits[:, None])).sum(dim=1) / hits
        parts.append({
            **{f"R@{k}": hit[:, :k].any(dim=1) for k in CUTS},
            "MnR": torch.where(hits > 0, mean, LIST + 1), "MdR": (middle[0] + middle[1]) / 2,
            "first": first_rank(scores, relevant),
            "relevant": relevant.sum(dim=1), "candidates": len(gallery) - out.sum(dim=1)})
    result = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
    for k in CUTS:
        result[f"chance@{k}"] = chance_of_hit(result["relevant"], result["candidates"], k)
    return result


def first_rank(scores, relevant):
    """Rank of the first relevant candidate, ties by lower index: (B, n), (B, n) -> (B,). None: candidates + 1."""
    best = torch.where(relevant, scores, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
    rank = 1 + (scores > best).sum(dim=1, dtype=torch.int32)  # (B,) without any, best is -inf and all candidates are above
    tied = (scores >= best).sum(dim=1, dtype=torch.int32) > rank  # (B,) more than the best one itself
    for i in (tied & best.isfinite()[:, 0]).nonzero()[:, 0]:
        equal = scores[i] == best[i]
        rank[i] += equal[:(equal & relevant[i]).nonzero()[0, 0]].sum()  # equal ones before it
    return rank


def bootstrap(values, draws=1000, seed=0):
    """95 % interval of the mean of each column of (m, c) by resampling queries -> (2, c)."""
    generator = np.random.default_rng(seed)
    m = len(values)
    means = [np.bincount(generator.integers(0, m, m), minlength=m) @ values / m for _ in range(draws)]
    return np.percentile(means, [2.5, 97.5], axis=0)


def summarise(per_query, **more):
    """Per-query arrays -> one row of a results file (spec names; JSON types)."""
    table = np.stack([per_query[name] for name in METRICS] + [per_query["first"]], axis=1).astype(float)  # (m, 6)
    means = table.mean(axis=0)
    low, high = bootstrap(table)
    names = (*METRICS, "first_MnR")
    return {
        "queries": len(table), "without_relevant": int((per_query["relevant"] == 0).sum()),
        **{name: float(mean) for name, mean in zip(names, means)}, "first_MdR": float(np.median(per_query["first"])),
        "chance": {f"R@{k}": float(per_query[f"chance@{k}"].mean()) for k in CUTS},
        "ci95": {name: [float(a), float(b)] for name, a, b in zip(names, low, high)},
        "hits": {f"R@{k}": "".join("01"[int(hit)] for hit in per_query[f"R@{k}"]) for k in CUTS}, **more}


def retrieve(rows, embeddings, gallery_rows=None, gallery=None, family="", relevance="any", exclude_same="", **more):
    """Rank queries in a gallery, or within their own set (leave-one-out), and summarise: one row of a results file."""
    if gallery is None:
        gallery_rows, gallery = rows, embeddings
    labels = [[tuple(label for label in row["labels"] if label.startswith(family)) for row in side]
              for side in (rows, gallery_rows)]
    same = [[[row[key] for row in side] for side in (rows, gallery_rows)] for key in ("id", exclude_same) if key]
    per_query = measure(embeddings, gallery, *labels, same, relevance)
    ids = "\n".join(row["id"] for row in rows)
    return summarise(per_query, gallery=len(gallery_rows), relevance=relevance, exclude_same=exclude_same,
                     queries_sha256=hashlib.sha256(ids.encode()).hexdigest(), **more)


# ----------------------------------------------------------------------------------------------------------- tables
LEGEND = """R@K         share of queries with a relevant sample among their K most similar candidates; higher is better
MnR, MdR    as in the paper: the mean (median) rank of all relevant samples in a query's top 10, 11 if there is none,
            averaged over queries; ten relevant samples of ten score 5.5
first MnR   rank of the first relevant sample in the whole gallery, mean and (first MdR) median over queries; a query
            without any counts as one place behind the last candidate
none        queries without any relevant sample in the gallery: they count as misses everywhere
95 %        bootstrap interval over queries; chance: a random order of the same candidates (exact)"""


def render(header, rows, markdown=False):
    """Header and rows of strings -> a table as text."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [(" | " if markdown else "  ").join(cell.ljust(w) if i == 0 else cell.rjust(w)
                                                for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
    lines.insert(1, "|".join("-" * (w + 2) for w in widths)[1:-1] if markdown else "-" * len(lines[0]))
    return "\n".join(f"| {line} |" if markdown else line for line in lines)


def lines_of(result):
    """One row of a results file -> lines of the table: ours, interval, chance, paper."""
    ci, empty = result["ci95"], [""] * 3
    yield [result["name"], *(f"{result[m]:.3f}" for m in (*METRICS, "first_MnR")), f"{result['first_MdR']:.1f}",
           str(result["queries"]), str(result["gallery"]), str(result["without_relevant"])]
    yield ["  95 %", *(f"{ci[m][0]:.3f}-{ci[m][1]:.3f}" for m in (*METRICS, "first_MnR")), "", *empty]
    yield ["  chance", *(f"{result['chance'][m]:.3f}" for m in METRICS[:3]), "", "", "", "", *empty]
    for name, values in (result["paper"] or {}).items():
        yield [f"  paper: {name}", *(f"{values[m]:.3f}" for m in METRICS), "", "", *empty]


def show(results, markdown=False):
    header = ["", *METRICS, "first MnR", "first MdR", "queries", "gallery", "none"]
    print(render(header, [line for result in results for line in lines_of(result)], markdown))
    print("\n" + LEGEND)


def save(path, results):
    """One row as itself, several as {"rows": [...]}; atomically."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    results = [result | {"versions": versions} for result in results]
    with atomic_write(path) as file:
        file.write(json.dumps(results[0] if len(results) == 1 else {"rows": results}, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------ tasks
def newest_checkpoint():
    """The checkpoint under runs/ written last."""
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no runs/*/checkpoint.pt here: train first (train.py), or give --checkpoint FILE")
    return found[-1]


def embeddings_of(rows, encoder, checkpoint):
    """Embeddings (n, D) of these rows and their meta, from results/embeddings/ if they are there, made now if not.

    The file name holds a hash of the encoder, the checkpoint's bytes and every sample file's size and time, so embeddings
    of another checkpoint or of a cache that was made again are never used.
    """
    files = [Path(row["folder"], f"{row['id']}.npy") for row in rows]
    try:
        stamps = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: run prepare.py again, it makes only what is not there") from None
    digest = hashlib.sha256(json.dumps([encoder, sha256(checkpoint), stamps]).encode()).hexdigest()[:16]
    names = sorted({Path(row["folder"]).name for row in rows})
    path = Path("results/embeddings", f"{'+'.join(names)}-{digest}.npz")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        embed, meta = load_embedder(encoder, checkpoint, device)
        embed_rows(rows, embed, meta | {"cache": str(rows[0]["folder"]), "sizes": sizes_of(rows)}, path, device)
    embeddings, ids, meta = read_embeddings(path)
    assert ids == [row["id"] for row in rows], f"{path} does not hold the rows its name says"
    return embeddings, meta


def match(path, cache):
    """Embeddings file and the cache it was made from -> rows in the file's order, embeddings, meta."""
    embeddings, ids, meta = read_embeddings(path)
    rows = {row["id"]: row for row in read_samples(cache)}
    unknown = [i for i in ids if i not in rows]
    if unknown:
        raise UserError(f"{len(unknown)} of {len(ids)} ids in {path} are not in {cache}, such as {unknown[0]}: "
                        "give the cache that these embeddings were made from")
    return [rows[i] for i in ids], embeddings, meta


def category_task(name, args):
    """A task of Table 1 or 2, within one set."""
    task = TASKS[name]
    rows = [row for row in read_samples(args.cache or f"cache/{task.cache}") if task.takes(row)]
    if not rows:
        raise UserError(f"{args.cache or task.cache} holds no samples for {name} ({task.words})")
    print(f"{name}: found {len(rows)} samples, paper {task.paper} ({task.words})\n")
    embeddings, meta = embeddings_of(rows, args.encoder, args.checkpoint or newest_checkpoint())
    paper = {row: dict(zip(METRICS, values)) for row, values in PAPER.get(name, {}).items()}
    return [retrieve(rows, embeddings, family=task.family, relevance=task.relevance, exclude_same=args.exclude_same,
                     task=name, name=name, paper=paper or None, checkpoint=meta["checkpoint"], pool=meta["pool"],
                     checkpoint_sha256=meta["checkpoint_sha256"])]


def any_embeddings(args):
    """Embeddings made by anyone (--embeddings), within one set or against --gallery."""
    rows, embeddings, meta = match(args.embeddings, args.cache)
    other = match(args.gallery, args.gallery_cache or args.cache)[:2] if args.gallery else ()
    return [retrieve(rows, embeddings, *other, relevance=args.relevance, exclude_same=args.exclude_same, task="embeddings",
                     name=Path(args.embeddings).name, paper=None, checkpoint=meta.get("checkpoint", ""),
                     checkpoint_sha256=meta.get("checkpoint_sha256", ""), pool=meta.get("pool", ""))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS], help="what to evaluate")
    parser.add_argument("--cache", help="cache folder (default: the task's data set under cache/)")
    parser.add_argument("--checkpoint", help="default: the newest runs/*/checkpoint.pt")
    parser.add_argument("--encoder", default="m3ret", help="as in embed.py")
    parser.add_argument("--embeddings", help="evaluate this .npz, whoever made it; labels come from --cache")
    parser.add_argument("--gallery", help=".npz to search in (default: the queries themselves, leave-one-out)")
    parser.add_argument("--gallery-cache", help="cache folder of --gallery (default: --cache)")
    parser.add_argument("--relevance", choices=("any", "all"), default="any", help="with --embeddings")
    parser.add_argument("--exclude-same", choices=("patient",), default="", help="leave the query's patient out")
    parser.add_argument("--out", help="results file (default results/TASK.json)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if bool(args.task) == bool(args.embeddings) or args.embeddings and not args.cache:
        parser.error("give --task NAME, or --embeddings FILE.npz with --cache FOLDER")
    results = category_task(args.task, args) if args.task else any_embeddings(args)
    show(results, args.markdown)
    out = Path(args.out or f"results/{args.task or 'embeddings'}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, results)
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"evaluate.py: {error}")
