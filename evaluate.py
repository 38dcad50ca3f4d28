"""The paper's tasks: embeddings and labels in, a table and results/TASK.json out (Sec. 4, Appendix C, D).

In:  cache/NAME (prepare.py) and a checkpoint (train.py; default: the newest run), or anyone's embeddings.
     python evaluate.py --task chestxray14                   (embeds what is not yet embedded)
     python evaluate.py --embeddings q.npz --cache cache/A [--gallery g.npz --gallery-cache cache/B]
Letters: model.py; here m queries, n candidates, b queries of a block, L labels, k places of a list.
"""
import argparse
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from embed import MUST_MATCH, embed_rows, load_embedder, picture, read_embeddings
from model import as_user_error, save_montage
from prepare import PUBLIC_KEY, UserError, atomic_write, cli, load_sample, pseudonym, read_samples

LIST, CUTS, BLOCK = 10, (1, 5, 10), 1024  # what MnR and MdR look at; K of R@K; queries scored at a time
METRICS = ("R@1", "R@5", "R@10", "MnR", "MdR", "P@10")  # the paper has the first five
PROBE_METRICS = ("F1", "precision", "accuracy", "AUROC")
L2 = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # CHOICE: the paper names no regularisation of its probe
PAPER = {  # M3Ret (MAE), M3Ret (SimDINO): Tables 1, 2, 3 as METRICS, Table 7 as PROBE_METRICS
    "chestxray14": ((.247, .603, .762, 6.575, 6.552), (.345, .674, .812, 6.136, 6.095)),
    "fetal_planes": ((.881, .966, .981, 5.429, 5.399), (.955, .990, .996, 5.456, 5.445)),
    "kvasir_capsule": ((.606, .843, .901, 5.360, 5.289), (.647, .872, .913, 5.302, 5.201)),
    "hyper_kvasir": ((.412, .687, .753, 6.592, 6.563), (.448, .690, .747, 6.617, 6.657)),
    "regional_abnormality": ((.046, .178, .276, 9.461, 9.463), (.058, .200, .303, 9.298, 9.299)),
    "lesion_size": ((.008, .030, .055, 10.679, 10.679), (.014, .046, .076, 10.544, 10.544)),
    "ct -> mri": ((.301, .525, .641, 7.552, 7.554), (.424, .607, .677, 7.285, 7.274)),
    "mri -> ct": ((.246, .329, .397, 8.661, 8.591), (.252, .495, .581, 7.746, 7.767)),
    "ct -> xray": ((.327, .513, .572, 7.837, 7.799), (.262, .487, .548, 7.912, 7.900)),
    "xray -> ct": ((.310, .552, .625, 7.403, 7.396), (.285, .502, .581, 7.851, 7.836)),
    "mri -> xray": ((.055, .162, .217, 9.802, 9.792), (.152, .306, .373, 8.787, 8.798)),
    "xray -> mri": ((.130, .200, .242, 9.718, 9.717), (.165, .382, .482, 8.383, 8.388)),
    "18 findings": ((.178, .355, .824, .749), (.313, .624, .840, .797)),
    "body parts": ((.785, .782, .785, .964), (.954, .954, .955, .997))}
TASKS = {  # cache, paper's test size (Table 6), who takes part (App. C), prefix of labels that count, how
    "chestxray14": ("chestxray14", 7992, lambda r: r["split"] == "test" and len(r["labels"]) == 1, "", "any"),
    "fetal_planes": ("fetal_planes", 8188, lambda row: {*row["labels"]} - {"Other"}, "", "any"),
    "kvasir_capsule": ("kvasir_capsule", 344, lambda row: row["labels"], "", "any"),
    "hyper_kvasir": ("hyper_kvasir", 364, lambda row: row["labels"], "", "any"),
    "regional_abnormality": ("radgenome", 25687, lambda row: True, "status:", "all"),
    "lesion_size": ("radgenome", 25687, lambda row: True, "size:", "all")}
CACHES = {**{task: row[0] for task, row in TASKS.items()}, "probe": "ct_rate", "demo": "demo"}
DIRECTIONS = [("ct", "mri"), ("mri", "ct"), ("ct", "xray"), ("xray", "ct"), ("mri", "xray"), ("xray", "mri")]


def multi_hot(label_sets, vocabulary):
    """Label sets of n samples -> (n, L) bool; labels outside the vocabulary are left out."""
    number = {label: i for i, label in enumerate(vocabulary)}
    hot = torch.zeros(len(label_sets), len(vocabulary), dtype=torch.bool)  # (n, L)
    for row, labels in zip(hot, label_sets):
        row[[number[label] for label in labels if label in number]] = True
    return hot


def list_ranks(hit):
    """Hits in the top 10 (m, k) -> the paper's MnR and MdR: mean and median rank of all hits, 11 if none."""
    # It defines neither. This reading fits all its rows, most of which the rank of the first hit contradicts.
    ranks = np.where(hit, np.arange(1, hit.shape[1] + 1), np.nan)  # (m, k)
    ranks[~hit.any(axis=1)] = LIST + 1  # 11
    return np.nanmean(ranks, axis=1), np.nanmedian(ranks, axis=1)  # (m,) each


def chance_of_hit(relevant, candidates, k):
    """Chance that k candidates drawn at random hold a relevant one (hypergeometric): (m,), (m,) -> (m,)."""
    draws = np.arange(k)[:, None]  # (k, 1), and each of them misses
    misses = np.clip(candidates - relevant - draws, 0, None) / np.maximum(candidates - draws, 1)  # (k, m)
    return np.where(relevant > 0, 1 - misses.prod(axis=0), 0.0)  # (m,)


def measure(queries, gallery, asked, offered, same=(), relevance="any"):
    """Everything the tables need, per query: dict of arrays (m, ...).

    queries (m, D), gallery (n, D); asked, offered: their label sets. Relevant is a candidate that shares a
    label (any) or carries all of the query's (all); without labels none is. same: pairs of lists of strings,
    (m,) and (n,): candidates whose string equals the query's are excluded, "" excludes nothing.
    """
    q, g = (F.normalize(torch.as_tensor(x).double(), dim=1) for x in (queries, gallery))
    # The mean candidate adds the same to all scores of a query. Without it float32 products (a third of the
    # time of float64) tell candidates apart that lie close together, as those of a collapsed encoder do.
    q, g = q.float(), (g - g.mean(dim=0)).float()  # (m, D), (n, D)
    vocabulary = sorted({label for labels in asked for label in labels})
    hot_q, hot_g = multi_hot(asked, vocabulary), multi_hot(offered, vocabulary)  # (m, L), (n, L)
    count = hot_q.sum(dim=1)  # (m,)
    need = torch.where(count == 0, torch.inf, count if relevance == "all" else 1)  # (m,) labels to share
    numbers, blocks = [], []
    for a, b in same:  # strings as numbers, equal where these are; "" equals nothing: -1 is not -2
        code = {text: i for i, text in enumerate({*a, *b} - {""})}
        numbers.append([torch.tensor([code.get(x, no) for x in side]) for side, no in ((a, -1), (b, -2))])
    for rows in torch.arange(len(q)).split(BLOCK):
        scores = q[rows] @ g.T  # (b, n)
        used = hot_q[rows].any(dim=0)  # (L,) only labels of this block enter the product
        relevant = hot_q[rows][:, used].float() @ hot_g[:, used].float().T >= need[rows, None]  # (b, n)
        out = torch.zeros_like(relevant)  # (b, n)
        for a, b in numbers:  # (m,), (n,): the query itself, its patient
            out |= a[rows, None] == b
        scores[out], relevant[out] = -torch.inf, False  # what is out comes last and counts nowhere
        top = scores.topk(min(LIST, len(g)), dim=1).indices  # (b, k)
        best = torch.where(relevant, scores, -torch.inf).amax(dim=1, keepdim=True)  # (b, 1)
        right, left, above = (x.sum(1, dtype=torch.int32) for x in (relevant, ~out, scores > best))  # (b,)
        blocks.append({"top": top, "hit": relevant.gather(1, top), "relevant": right, "candidates": left,
                       "first": 1 + above})
    found = {key: torch.cat([block[key] for block in blocks]).numpy() for key in blocks[0]}
    found["MnR"], found["MdR"] = list_ranks(found["hit"])
    found["P@10"] = found["hit"].mean(axis=1)  # share of the list that is relevant
    return found | {f"R@{k}": found["hit"][:, :k].any(axis=1) for k in CUTS}  # a relevant one in the top K


def bootstrap(values, draws=1000, seed=0):
    """95 % intervals of the mean of each column of (m, c), by resampling queries -> (2, c)."""
    generator, m = np.random.default_rng(seed), len(values)
    means = [np.bincount(generator.integers(0, m, m), minlength=m) @ values / m for _ in range(draws)]
    return np.percentile(means, [2.5, 97.5], axis=0)  # (2, c)


def summarise(found):
    """What `measure` found -> a result's numbers; first-hit ranks over the queries that have an answer."""
    values = np.stack([found[name] for name in METRICS], axis=1).astype(float)  # (m, 6)
    first, sizes = found["first"][found["relevant"] > 0], (found["relevant"], found["candidates"])
    return {"queries": len(values), "without_relevant": len(values) - len(first),
            **dict(zip(METRICS, values.mean(axis=0).tolist())),
            "chance": {f"R@{k}": chance_of_hit(*sizes, k).mean() for k in CUTS},
            "first_MnR": float(first.mean()) if len(first) else None,
            "first_MdR": float(np.median(first)) if len(first) else None,
            "ci95": dict(zip(METRICS, bootstrap(values).T.tolist())),
            "hits": {f"R@{k}": "".join("01"[int(hit)] for hit in found[f"R@{k}"]) for k in CUTS}}


def labels_of(row, family):
    """Labels of a family: those with its prefix; of part: (body parts) those without any prefix too."""
    return [label.removeprefix("part:") for label in row["labels"]
            if label.startswith(family) or family == "part:" and ":" not in label]


def rows_of(args):
    """The samples of --cache, or of the task's own data set; for cross_modal of all caches that hold none."""
    folders = args.cache or [f"cache/{CACHES.get(args.task)}"]
    if args.task == "cross_modal" and not args.cache:  # CHOICE: the paper's are private
        made = sorted(file.parent for file in Path("cache").glob("*/samples.csv"))
        folders = [folder for folder in made if folder.name not in CACHES.values()]
    return [row for folder in folders for row in read_samples(folder)]


def settings_of(task, rows):
    """A task's settings: (name, queries, candidates, family of labels, relevance); UserError if none."""
    if task in TASKS:
        _, paper, takes, family, relevance = TASKS[task]
        rows = [row for row in rows if takes(row)]
        asking = [row for row in rows if labels_of(row, family)]  # CHOICE: all others are candidates only
        print(f"{task}: found {len(rows):,} samples, paper {paper:,}; {len(asking):,} of them are queries")
        if not asking:
            raise UserError(f"{task}: no sample has the split and labels it needs: prepare.py {CACHES[task]}")
        return [(task, asking, rows, family, relevance)]
    sets = {}
    for row in rows:  # CHOICE: samples of a training split, or without a body part, take no part
        if row["split"] != "train" and labels_of(row, "part:"):
            sets.setdefault(row["modality"], []).append(row)  # a query set, and a gallery
    counts = ", ".join(f"{len(members):,} {name}" for name, members in sorted(sets.items())) or "none"
    pairs = DIRECTIONS if task == "cross_modal" else [*zip(sets, sets), *DIRECTIONS[2:4], DIRECTIONS[0]]
    pairs = [(a, b) for a, b in pairs if a in sets and b in sets]  # leave-one-out where a is b
    if not pairs:
        raise UserError(f"{task}: body parts as labels (prepare.py folder --labels) are needed in two of ct, "
                        f"mri, xray, outside training splits; found {counts}. --cache names folders")
    return [(a if a == b else f"{a} -> {b}", sets[a], sets[b], "part:", "any") for a, b in pairs]


def models_of(args):
    """(name, encoder, checkpoint) asked for, or of the newest run; the demo: all runs and two baselines."""
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda file: -file.stat().st_mtime)
    if args.checkpoint or args.encoder not in ("m3ret", "random"):
        return [(args.encoder, args.encoder, args.checkpoint)]
    if not runs:
        raise UserError("no runs/*/checkpoint.pt here: train first (train.py), or give --checkpoint FILE")
    models = [(run.parent.name, args.encoder, run) for run in runs]
    demo = [*models, ("random", "random", runs[0]), ("pixels", "pixels", None)]
    return demo if args.task == "demo" else models[:1]


def embeddings_of(rows, encoder, checkpoint):
    """{(folder, id): embedding (D,)} of rows, and meta; kept in a file unless samples.csv is newer."""
    device, vectors = "cuda" if torch.cuda.is_available() else "cpu", {}
    embedder = load_embedder(encoder, checkpoint, device)
    meta = embedder.meta
    for folder in sorted({row["folder"] for row in rows}):
        made = [encoder, meta["checkpoint_sha256"], meta["code_sha256"], os.path.realpath(folder)]
        path = Path(f"results/embeddings/{Path(folder).name}-{pseudonym(PUBLIC_KEY, json.dumps(made))}.npz")
        fresh = path.is_file() and path.stat().st_mtime_ns > os.stat(f"{folder}/samples.csv").st_mtime_ns
        kept = {row["id"] for row in read_embeddings(path, folder)[0]} if fresh else set()
        members = {row["id"]: row for row in rows if row["folder"] == folder}
        if not members.keys() <= kept:  # else the file of an earlier run serves
            embed_rows(list(members.values()), embedder, path, device)
        found, part, own = read_embeddings(path, folder)
        vectors |= {(folder, row["id"]): vector for row, vector in zip(found, part)}
        meta["seen"] = None if own["seen"] is None else [*meta.get("seen", []), *own["seen"]]
    return vectors, meta


def about(model, meta, how, queries):
    """What a result says of its embeddings, and how many queries pretraining had seen (None: unknown)."""
    keys = ("encoder", "checkpoint", "checkpoint_sha256", "code_sha256", "parameters", "flags", "step")
    seen = None if meta.get("seen") is None else len({row["id"] for row in queries} & set(meta["seen"]))
    return {"model": f"{model} {how}".strip(), **{key: meta.get(key) for key in keys},
            "pool": how or meta.get("pool"), "seen_in_pretraining": seen}


def retrieve(setting, asking, offering, exclude_same):
    """Rank the candidates (n, D) of a setting for its queries (m, D) -> what `measure` finds."""
    name, *sides, family, relevance = setting
    same = [[[f"{os.path.realpath(row['folder'])} {row['id']}" for row in side] for side in sides]]
    if exclude_same:
        same.append([[row["patient"] for row in side] for side in sides])  # keyed hashes
        if not all(map(any, same[1])):
            raise UserError(f"{name}: --exclude-same patient, but there are no patient ids in samples.csv")
    labels = [[labels_of(row, family) for row in side] for side in sides]
    return measure(asking, offering, *labels, same, relevance)


def drawn(setting, found, count):
    """Random queries (seed 0) with their top 3, framed green if right, red if wrong -> tiles (Fig. 5)."""
    name, queries, candidates, family, _ = setting
    marks, grid = {True: ("right", (0, 150, 60)), False: ("wrong", (200, 30, 30))}, []
    for i in np.random.default_rng(0).permutation(len(queries))[:count]:
        hits = zip(found["top"][i, :3], found["hit"][i, :3].tolist())
        shown = [(queries[i], f"query: {name}"), *((candidates[j], *marks[hit]) for j, hit in hits)]
        grid.append([picture(load_sample(r["folder"], r), "\n".join([text, *labels_of(r, family)]), *colour)
                     for r, text, *colour in shown])
    return grid


def stacked(rows, vectors, meta, how):
    """Embeddings (n, D) of rows in the pooling asked for; mix = [CLS, avg] holds all three (Fig. 3b)."""
    x, stored = np.stack([vectors[row["folder"], row["id"]] for row in rows]), meta.get("pool")
    if how in ("", stored):
        return x
    if stored != "mix":
        raise UserError(f"--pool {how} needs an encoder with a CLS token (SimDINO); this one gives {stored}")
    return np.split(x, 2, axis=1)[how == "avg"]  # (n, D / 2)


def run_task(args):
    """All settings of a task or of --embeddings, with every encoder and pooling asked for -> its results."""
    if args.embeddings:
        rows, x, meta = read_embeddings(args.embeddings, args.cache[0])
        gallery = args.gallery or args.embeddings
        others, y, other = read_embeddings(gallery, args.gallery_cache or args.cache[0])
        if x.shape[1] != y.shape[1] or any(meta.get(key) != other.get(key) for key in MUST_MATCH[:-1]):
            raise UserError(f"{gallery} is of another encoder than {args.embeddings}: embed both with one")
        if not any(row["labels"] for row in rows):
            raise UserError(f"{args.cache[0]}: no sample has a label to evaluate by; prepare with --labels")
        vectors = {(row["folder"], row["id"]): v for row, v in [*zip(others, y), *zip(rows, x)]}
        settings = [("embeddings", rows, others, "", args.relevance)]
        models = [(Path(args.embeddings).stem, vectors, meta)]
    else:
        settings = settings_of(args.task, rows_of(args))
        rows = sum((queries + candidates for _, queries, candidates, *_ in settings), [])
        models = [(name, *embeddings_of(rows, *rest)) for name, *rest in models_of(args)]
    results, lines = [], []
    within = [setting for setting in settings if " -> " not in setting[0]] or settings
    for (name, vectors, meta), how, setting in itertools.product(models, args.pool, settings):
        x, y = (stacked(rows, vectors, meta, how) for rows in setting[1:3])  # (m, D), (n, D)
        found = retrieve(setting, x, y, args.exclude_same)  # arrays (m, ...)
        if args.figure and setting in within and len(results) < len(settings):  # of the first model
            lines += drawn(setting, found, 4 if len(within) == 1 else 1)
        results.append({"task": args.task or "embeddings", "name": setting[0], "gallery": len(setting[2]),
                        **summarise(found), "relevance": setting[4], "exclude_same": args.exclude_same or "",
                        "paper": None if args.task == "demo" else PAPER.get(setting[0]),
                        **about(name, meta, how, setting[1])})
    if lines:
        save_montage(args.figure, lines)
    return results


def cross_entropy(x, y, w, multi):
    """Mean over samples of softmax, or summed sigmoid, cross-entropy: x (n, D), y (n, L), w (D + 1, L)."""
    logits = x @ w[:-1] + w[-1]  # (n, L)
    return F.binary_cross_entropy_with_logits(logits, y) * y.shape[1] if multi else F.cross_entropy(logits, y)


def fit_logistic(x, y, l2, multi):
    """Weights (D + 1, L), the bias last, that minimise cross_entropy + l2 / 2 * |w without the bias|^2."""
    w = torch.zeros(x.shape[1] + 1, y.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = cross_entropy(x, y, w, multi) + l2 / 2 * w[:-1].square().sum()
        loss.backward()
        return loss
    solver.step(closure)
    return w.detach()


def probe_scores(chances, truth, multi):
    """Predicted probabilities (n, L) and truth (n, L) bool -> Table 7's numbers, means over labels.

    CHOICE: a finding is called above 1/2; accuracy is the share of right (sample, finding) pairs, of samples
    for classes; a label never called has precision and F1 0; AUROC skips labels of all or no test samples.
    """
    called = chances > 0.5 if multi else np.eye(truth.shape[1], dtype=bool)[chances.argmax(axis=1)]  # (n, L)
    right, carry, calls = (called & truth).sum(axis=0), truth.sum(axis=0), called.sum(axis=0)  # (L,)
    areas = []
    for j in np.flatnonzero((carry > 0) & (carry < len(truth))):  # AUROC: positives above negatives
        low, high = np.sort(chances[~truth[:, j], j]), chances[truth[:, j], j]
        wins = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")  # twice, a tie once
        areas.append(wins.mean() / 2 / len(low))
    values = ((2 * right / np.maximum(carry + calls, 1)).mean(), (right / np.maximum(calls, 1)).mean(),
              (called == truth).mean() if multi else right.sum() / len(truth), np.mean(areas or [np.nan]))
    return dict(zip(PROBE_METRICS, map(float, values)))


def split_probe(rows, classes):
    """Row numbers (training, test): by the split column; without one 4 : 1 within each class (App. C)."""
    test = np.array([row["split"] == "test" for row in rows])
    order = [] if test.any() else np.random.default_rng(0).permutation(len(rows))
    for name in sorted(set(classes)):
        members = [i for i in order if classes[i] == name]
        test[members[:len(members) // 5]] = True  # a fifth of the class
    return np.flatnonzero(~test), np.flatnonzero(test)


def probe(args):
    """Linear probe on frozen embeddings (App. D): findings where a cache has some, else body parts."""
    rows = rows_of(args)
    multi = any(labels_of(row, "finding:") for row in rows)
    rows = [row for row in rows if multi or labels_of(row, "part:")]
    targets = [labels_of(row, "finding:" if multi else "part:") for row in rows]
    targets = targets if multi else [["+".join(sorted(parts))] for parts in targets]  # together one class
    train, test = split_probe(rows, ["+".join(target) for target in targets])
    names = sorted({label for i in train for label in targets[i]})
    if min(len(train), len(test)) < 5 or len(names) < 2 - multi:
        raise UserError(f"probe: {len(train)} train, {len(test)} test samples, {len(names)} labels: too few")
    (model, *asked), *_ = models_of(args)  # the first: a name, encoder and checkpoint
    vectors, meta = embeddings_of(rows, *asked)
    x = torch.from_numpy(stacked(rows, vectors, meta, args.pool[0]))  # (n, D)
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0).clamp_min(1e-6)  # by the training split alone
    y = multi_hot(targets, names).float()  # (n, L)
    held, kept = np.split(np.random.default_rng(1).permutation(train), [len(train) // 5])
    fits = {l2: fit_logistic(x[kept], y[kept], l2, multi) for l2 in L2}  # held out: a fifth of the training
    l2 = min(L2, key=lambda l2: cross_entropy(x[held], y[held], fits[l2], multi))
    w = fit_logistic(x[train], y[train], l2, multi)  # (D + 1, L)
    logits = x[test] @ w[:-1] + w[-1]  # (n, L)
    chances = logits.sigmoid() if multi else logits.softmax(dim=1)
    name = f"{len(names)} findings" if multi else "body parts"
    return [{"task": "probe", "name": name, **probe_scores(chances.numpy(), y[test].bool().numpy(), multi),
             "train": len(train), "queries": len(test), "labels": names, "l2": l2, "paper": PAPER.get(name),
             **about(model, meta, args.pool[0], [rows[i] for i in test])}]


def cell(row, key):
    """A number of a result as text, R@K with its 95 % interval."""
    value, span = row.get(key), row.get("ci95", {}).get(key, ())
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return text + (" ({:.2f}-{:.2f})".format(*span) if span and key.startswith("R@") else "")


def table(results):
    """Results as Markdown, with chance and the paper's rows, and how many queries pretraining had seen."""
    metrics = PROBE_METRICS if "AUROC" in results[0] else METRICS
    keys = [*metrics, "first_MnR", "first_MdR", "queries", "gallery", "without_relevant"]
    lines = [["", "", *keys]]
    for name in dict.fromkeys(r["name"] for r in results):
        mine = [r for r in results if r["name"] == name]
        papers = [dict(zip(metrics, values)) for values in mine[0]["paper"] or ()]  # MAE, SimDINO
        others = zip(("chance", "paper: MAE", "paper: SimDINO"), [mine[0].get("chance", {}), *papers])
        for by, row in [*((r["model"], r) for r in mine), *others]:
            lines.append([name, by, *(cell(row, key) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*lines)]  # so that it reads well as plain text too
    lines.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths))} |" for line in lines]
    for model, mine in itertools.groupby(results, key=lambda r: r["model"]):  # they come model by model
        seen, total = zip(*((r["seen_in_pretraining"], r["queries"]) for r in mine))
        known = "unknown" if None in seen else f"{sum(seen):,} of {sum(total):,}"
        lines.append(f"seen in pretraining: {known} ({model})")
    return "\n".join(lines)


def scaling(paths, against):
    """Print each task's fit log R@5 = slope * log x + start over results files, and its points (Fig. 4)."""
    points = {}  # {name: {parameters or share of the data: R@5}}
    for path in paths:
        with as_user_error(path, f"holds no results of retrieval with their {against}"):
            content = json.loads(Path(path).read_text())
            for r in content.get("rows", [content]):
                x = r["parameters"] if against == "parameters" else json.loads(r["flags"])[against]
                points.setdefault(r["name"], {})[float(x)] = float(r["R@5"])
    for name, xy in points.items():
        if len(xy) < 2 or not all(xy.values()):
            raise UserError(f"{name}: a fit needs R@5 above 0 at two or more values of {against}")
        slope, start = np.polyfit(np.log([*xy]), np.log([*xy.values()]), 1)  # least squares, a power law
        print(f"{name}: log R@5 = {slope:.4f} log {against} {start:+.4f}, from {xy}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=[*TASKS, "cross_modal", "demo", "probe"], help="needs its cache, see --cache")
    flag("--cache", nargs="+", help="cache folders (default: the task's data set under cache/)")
    flag("--checkpoint", help="default: the newest runs/*/checkpoint.pt; for demo all of them")
    flag("--encoder", default="m3ret", help="m3ret, random, pixels or module:function, as in embed.py")
    flag("--pool", nargs="+", choices=["avg", "cls", "mix"], default=[""], help="one, or several to compare")
    flag("--exclude-same", choices=["patient"], help="leave out candidates of the query's patient")
    flag("--embeddings", metavar="NPZ", help="evaluate these, whoever made them; labels come from --cache")
    flag("--gallery", metavar="NPZ", help="with --embeddings: what to search (default: the queries)")
    flag("--gallery-cache", metavar="FOLDER", help="cache of --gallery (default: --cache)")
    flag("--relevance", choices=["any", "all"], default="any", help="with --embeddings: labels to share")
    flag("--scaling", nargs="+", metavar="FILE", help="results files of several models: fit R@5 (Fig. 4)")
    flag("--against", choices=["parameters", "data_fraction"], default="parameters", help="with --scaling")
    flag("--figure", metavar="PNG", help="draw some queries and their top 3, right and wrong marked")
    flag("--out", help="results file (default results/TASK.json)")
    args = parser.parse_args()
    if sum(map(bool, (args.task, args.embeddings, args.scaling))) != 1 or "WORLD_SIZE" in os.environ:
        parser.error("give one of --task, --embeddings and --scaling, and no torchrun (embed.py knows it)")
    wrong = args.embeddings and (len(args.cache or []) != 1 or args.checkpoint or args.encoder != "m3ret")
    wrong = wrong or args.task and (args.gallery or args.gallery_cache or args.relevance != "any")
    if wrong or args.task == "probe" and (args.exclude_same or args.figure or len(args.pool) > 1):
        parser.error("--embeddings needs one --cache, probe takes one --pool; a flag has no effect here")
    if args.scaling:
        return scaling(args.scaling, args.against)
    results = probe(args) if args.task == "probe" else run_task(args)
    path = args.out or f"results/{args.task or 'embeddings'}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(results[0] if len(results) == 1 else {"rows": results}, indent=1).encode())
    print(f"{table(results)}\nwritten: {path}")


if __name__ == "__main__":
    cli(main)
