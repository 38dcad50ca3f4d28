"""The paper's tasks: embeddings and labels in, tables and JSON out (Sec. 4, Appendix C, D).

In:  cache/NAME (prepare.py) and a checkpoint (train.py; default: the newest run), or embeddings
     that anyone made:
     python evaluate.py --task chestxray14      (embeds what is not yet embedded)
     python evaluate.py --embeddings q.npz --cache cache/A [--gallery g.npz --gallery-cache cache/B]
Out: a table in Markdown, and every number in results/TASK.json. --scaling reads such files instead,
     and prints fits (Fig. 4).
Letters beside those of model.py: m queries; n candidates, or samples where nothing is asked; b
queries of a block; L labels; k = min(10, n) places of a ranked list, the best one first.
"""
import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from embed import (SAME_ENCODER, centre_parts, embed_rows, load_embedder, picture, read_embeddings,
                   read_npz)
from model import FRAME_GREY, as_user_error, save_montage
from prepare import UserError, atomic_write, cli, load_sample, read_samples

TOP_K = 10  # places of a list that MnR, MdR and P@10 look at
KS = (1, 5, 10)  # K of R@K
QUERY_BLOCK = 256  # queries scored at a time: 26 MB of scores for 25,687 candidates

METRICS = ("R@1", "R@5", "R@10", "MnR", "MdR", "P@10")  # the paper has the first five
TABLE_METRICS = ("R@1", "R@5", "R@10", "P@10", "MnR", "MdR")  # in the order of our table
PROBE_METRICS = ("F1", "precision", "accuracy", "AUROC")

# CHOICE: the paper names no regularisation of its probe; the best of these is taken.
L2 = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)

RIGHT_COLOUR = (0, 150, 60)  # frames of a figure: green
WRONG_COLOUR = (200, 30, 30)  # red

# The paper's M3Ret (MAE) and M3Ret (SimDINO): Tables 1, 2, 3 as METRICS, Table 7 as PROBE_METRICS.
PAPER = {
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
    "18 ct findings": ((.178, .355, .824, .749), (.313, .624, .840, .797)),
    "mri parts": ((.785, .782, .785, .964), (.954, .954, .955, .997))}

# Table 4: M3Ret pretrained on the modality of the task alone, and on all modalities; as METRICS.
PAPER_TABLE_4 = {
    "chestxray14": ((.295, .650, .785, 6.343, 6.314), (.323, .665, .795, 6.259, 6.220)),
    "fetal_planes": ((.926, .980, .991, 5.449, 5.427), (.934, .980, .991, 5.468, 5.453)),
    "kvasir_capsule": ((.534, .825, .918, 5.411, 5.340), (.548, .834, .901, 5.431, 5.353)),
    "hyper_kvasir": ((.360, .673, .755, 6.754, 6.780), (.432, .673, .736, 6.700, 6.672)),
    "regional_abnormality": ((.053, .194, .296, 9.344, 9.343), (.053, .195, .295, 9.340, 9.342)),
    "lesion_size": ((.015, .045, .075, 10.543, 10.543), (.013, .043, .076, 10.562, 10.562))}

# Modalities of the queries and of the gallery: those of Table 3, and those of the demo.
DIRECTIONS = [("ct", "mri"), ("mri", "ct"), ("ct", "xray"), ("xray", "ct"), ("mri", "xray"),
              ("xray", "mri")]
DEMO_DIRECTIONS = [("ct", "xray"), ("xray", "ct"), ("ct", "mri")]


# ---- tasks --------------------------------------------------------------------------------------
class Task(NamedTuple):
    """Where the samples of a task lie, and which of them take part (Sec. 4.1, App. C.1)."""
    takes_part: Callable  # a row of samples.csv -> bool
    cache: str = ""  # its folder below cache/; "": all archives there that belong to no task
    paper_size: int = 0  # how many samples the paper has (Table 6); 0: it has other data
    label_prefix: str = ""  # only labels that begin so count
    relevance: str = "any"  # a relevant candidate shares one label of the query, or "all" of them


class Setting(NamedTuple):
    """One row of the table: who asks, what is searched, and when an answer is right."""
    name: str
    queries: list  # rows of samples.csv
    gallery: list  # rows too; a query that is among them is excluded from its own list
    label_prefix: str = ""  # as in Task
    relevance: str = "any"
    paper: tuple = ()  # the rows that the paper has of it


# Who takes part in a task: functions of a row of samples.csv.
def everyone(row):
    return True


def has_labels(row):
    return len(row["labels"]) > 0


def has_one_finding_in_test(row):
    return row["split"] == "test" and len(row["labels"]) == 1


def shows_a_named_plane(row):
    return any(label != "Other" for label in row["labels"])


def is_not_for_training(row):
    return row["split"] != "train"


# CHOICE: Table 2 counts a candidate as relevant if it carries "all" statuses, or sizes, of the
# query. We read this so: it may carry others besides.
TASKS = {
    "chestxray14": Task(has_one_finding_in_test, "chestxray14", 7992),
    "fetal_planes": Task(shows_a_named_plane, "fetal_planes", 8188),
    "kvasir_capsule": Task(has_labels, "kvasir_capsule", 344),
    "hyper_kvasir": Task(has_labels, "hyper_kvasir", 364),
    "regional_abnormality": Task(everyone, "radgenome", 25687, "status:", "all"),
    "lesion_size": Task(everyone, "radgenome", 25687, "size:", "all"),
    "cross_modal": Task(is_not_for_training, label_prefix="part:"),
    "demo": Task(is_not_for_training, "demo", label_prefix="part:"),
    "within": Task(is_not_for_training),
    "probe": Task(everyone, "ct_rate")}


def column(rows, key):
    """The values that rows have in a column of samples.csv."""
    return [row[key] for row in rows]


def labels_of(row, prefix):
    """Labels of a row that begin with the prefix.

    With the prefix "part:" a label without a colon counts as a body part: "head" as "part:head".
    """
    labels = []
    for label in row["labels"]:
        bare_part = prefix == "part:" and ":" not in label
        if label.startswith(prefix) or bare_part:
            labels.append(label.removeprefix("part:"))
    return labels


def label_lists(rows, prefix):
    """The labels with the prefix of each row."""
    return [labels_of(row, prefix) for row in rows]


def task_rows(args):
    """The samples of --cache, by default of the task's own cache, as rows of samples.csv."""
    folders = args.cache or []
    if not folders and TASKS[args.task].cache:
        folders = [f"cache/{TASKS[args.task].cache}"]
    if not folders:  # CHOICE: the paper's archives are private, so that all of one's own serve
        owned = {task.cache for task in TASKS.values()}
        for table in sorted(Path("cache").glob("*/samples.csv")):
            if table.parent.name not in owned:
                folders.append(table.parent)

    rows = []
    for folder in folders:
        rows += read_samples(folder)
    return rows


def each_id_once(rows):
    """Rows without those whose id came before: it is one sample, in however many caches it lies."""
    first = {}
    for row in rows:
        first.setdefault(row["id"], row)
    return list(first.values())


def paper_setting(name, rows):
    """The setting of a task on a public data set (Tables 1, 2): leave-one-out among its samples."""
    task = TASKS[name]
    gallery = [row for row in each_id_once(rows) if task.takes_part(row)]
    # CHOICE: samples without a label of this task ask nothing, and are candidates only.
    queries = [row for row in gallery if labels_of(row, task.label_prefix)]
    print(f"{name}: found {len(gallery):,} samples, paper {task.paper_size:,}; "
          f"{len(queries):,} of them are queries")
    if not queries:
        raise UserError(f"{name}: no sample has the split and labels it needs: "
                        f"prepare.py {task.cache}")

    # The paper's numbers are of its data: they are shown beside at least half of it. Those of
    # cross_modal and probe, whose data are private in part, are shown beside any archive.
    paper = PAPER[name]
    if len(gallery) < task.paper_size / 2:
        print("the paper's numbers are left out: this is less than half of its samples")
        paper = ()
    return Setting(name, queries, gallery, task.label_prefix, task.relevance, paper)


def group_samples(task, rows, key_of):
    """Rows that can ask and answer -> {key_of(row): rows}, which are queries and gallery in one.

    CHOICE: samples of a training split, or without a label of the task, take no part.
    """
    groups = {}
    for row in rows:
        if task.takes_part(row) and labels_of(row, task.label_prefix):
            groups.setdefault(key_of(row), []).append(row)
    return {key: each_id_once(members) for key, members in groups.items()}


def body_part_settings(name, rows):
    """Settings by modality: Table 3's directions; for the demo each modality by itself as well."""
    task = TASKS[name]
    sets = group_samples(task, rows, lambda row: row["modality"])
    settings = []
    directions = DIRECTIONS
    if name == "demo":
        directions = DEMO_DIRECTIONS
        for modality, members in sets.items():
            settings.append(Setting(modality, members, members, task.label_prefix))

    for asking, searched in directions:
        if asking in sets and searched in sets:
            direction = f"{asking} -> {searched}"
            paper = () if name == "demo" else PAPER[direction]  # phantoms are not its data
            settings.append(Setting(direction, sets[asking], sets[searched], task.label_prefix,
                                    paper=paper))

    if not settings:
        counts = [f"{len(members):,} {modality}" for modality, members in sorted(sets.items())]
        raise UserError(f"{name}: body parts as labels (prepare.py folder --labels) are needed in "
                        "two of ct, mri, xray, outside training splits; "
                        f"found {', '.join(counts) or 'none'}. --cache names folders")
    return settings


def archive_settings(name, rows):
    """Settings of one's own archives: each modality of each cache by itself, by any labels."""
    groups = group_samples(TASKS[name], rows, lambda row: (row["folder"], row["modality"]))
    if not groups:
        raise UserError(f"{name}: no sample outside training splits has a label: "
                        "prepare.py folder --labels; --cache names folders")

    # An archive is called by its folder, and by its whole path if two folders have this name.
    folders = {folder for folder, _ in groups}
    folder_names = [Path(folder).name for folder in folders]
    settings = []
    for (folder, modality), members in groups.items():
        archive = Path(folder).name
        if folder_names.count(archive) > 1:
            archive = folder
        settings.append(Setting(f"{archive} {modality}", members, members))
    return settings


# ---- metrics ------------------------------------------------------------------------------------
def label_matrix(label_sets, vocabulary):
    """Label sets of n samples -> (n, L) bool; labels outside the vocabulary are left out."""
    number = {label: i for i, label in enumerate(vocabulary)}
    matrix = np.zeros((len(label_sets), len(vocabulary)), dtype=bool)  # (n, L)
    for i, labels in enumerate(label_sets):
        for label in labels:
            if label in number:
                matrix[i, number[label]] = True
    return torch.from_numpy(matrix)


def count_shared_labels(query_matrix, gallery_matrix):
    """(b, L) and (n, L) bool -> (b, n): how many labels a query and a candidate have in common."""
    used = query_matrix.any(dim=0)  # (L,) faster: labels of no query are never shared
    query_matrix = query_matrix[:, used].float()
    gallery_matrix = gallery_matrix[:, used].float()
    return query_matrix @ gallery_matrix.T  # (b, n)


def string_codes(query_strings, gallery_strings):
    """m and n strings -> integers (m,), (n,), equal where two strings are equal.

    An empty string means that nothing is known: a query that has one is equal to no candidate.
    """
    code = {}
    for text in [*query_strings, *gallery_strings]:
        code.setdefault(text, len(code))
    gallery_codes = torch.tensor([code[text] for text in gallery_strings])

    # From here on an empty string has a code that no candidate has.
    code[""] = -1
    query_codes = torch.tensor([code[text] for text in query_strings])
    return query_codes, gallery_codes


def mean_and_median_rank(hit):
    """Whether each place of the lists holds a relevant candidate (m, k) -> MnR, MdR, (m,) each.

    MnR (MdR) of a query: the mean (median) rank of all relevant candidates in its list of 10; 11 if
    there is none. CHOICE: the paper defines neither. The ranks of all hits fit its tables, the rank
    of the first hit does not.
    """
    places = np.arange(1, hit.shape[1] + 1)  # (k,)
    ranks = np.where(hit, places, np.nan)  # (m, k)
    ranks[~hit.any(axis=1)] = TOP_K + 1
    return np.nanmean(ranks, axis=1), np.nanmedian(ranks, axis=1)


def chance_of_hit(relevant, candidates, k):
    """R@K of a random order: the chance that k of n candidates hold one of the r relevant ones.

    1 - C(n - r, k) / C(n, k) = 1 - product over i < k of (n - r - i) / (n - i): every draw misses.
    Of each query, relevant (m,) are r and candidates (m,) are n, without those that are excluded;
    k is that of R@K. The chance is (m,).
    """
    draws = np.arange(k)[:, None]  # (k, 1)
    misses_left = np.clip(candidates - relevant - draws, 0, None)  # (k, m)
    candidates_left = np.maximum(candidates - draws, 1)  # (k, m)
    all_miss = (misses_left / candidates_left).prod(axis=0)  # (m,)
    return np.where(relevant > 0, 1 - all_miss, 0.0)


def bootstrap(values, draws=1000, seed=0):
    """95 % intervals of the mean of each column of values (m, c), by resampling queries -> (2, c).

    A resample draws m of the m queries with replacement; its mean is sum_i count_i values_i / m.
    """
    generator = np.random.default_rng(seed)
    m = len(values)
    means = []
    for _ in range(draws):
        counts = np.bincount(generator.integers(0, m, m), minlength=m)  # (m,)
        means.append(counts @ values / m)  # (c,)
    return np.percentile(means, [2.5, 97.5], axis=0)  # (2, c)


def auroc(scores, positive):
    """Area under the ROC curve of scores (n,) of samples that are positive (n,) bool or negative.

    It is the share of all pairs of a positive and a negative in which the positive scores higher,
    where a tie counts half: P(s+ > s-) + P(s+ = s-) / 2.
    """
    negatives = np.sort(scores[~positive])
    positives = scores[positive]
    below = np.searchsorted(negatives, positives, "left")  # how many negatives are below each
    not_above = np.searchsorted(negatives, positives, "right")  # how many are below or equal
    return (below + not_above).mean() / 2 / len(negatives)


def first_rank(scores, relevant):
    """The rank of the first relevant candidate, (m,) float64, among scores (m, n), relevant (m, n).

    If r relevant and u irrelevant candidates share the best relevant score, it is
    1 + number above + u / (r + 1), the mean over all orders of these r + u: each that ties with a
    single relevant one counts half, and an encoder that gives all samples one vector has the rank
    of a random order. Without relevant ones it is 1 + n, less what is excluded (score -inf).
    """
    relevant_scores = torch.where(relevant, scores, -torch.inf)  # (m, n)
    best = relevant_scores.amax(dim=1, keepdim=True)  # (m, 1)
    above = (scores > best).sum(dim=1, dtype=torch.int32)  # (m,)
    equal = (scores == best).sum(dim=1, dtype=torch.int32)  # (m,) r + u

    # Faster: r is counted only where several candidates share the best score. Elsewhere it is 1.
    several = equal > 1  # (m,)
    equal_relevant = torch.ones_like(equal)  # (m,) r
    is_best = relevant_scores[several] == best[several]
    equal_relevant[several] = is_best.sum(dim=1, dtype=torch.int32)

    rank = 1 + above + (equal - equal_relevant).double() / (equal_relevant + 1)  # (m,)
    return torch.where(best[:, 0] > -torch.inf, rank, 1 + above)


def comparable_vectors(queries, gallery):
    """Embeddings (m, D), (n, D) -> float32 whose products order the gallery as the cosines do."""
    q = F.normalize(torch.as_tensor(queries).double(), dim=1)  # (m, D)
    g = F.normalize(torch.as_tensor(gallery).double(), dim=1)  # (n, D)
    # Subtracting one vector from all candidates shifts all scores of a query alike: their order
    # stays. Less the first candidate, candidates that are all equal become exact zeros. Less their
    # mean, float32, three times as fast as float64, can tell those apart that lie close together,
    # as a collapsed encoder's do.
    g = g - g[:1]
    g = g - g.mean(dim=0)
    return q.float(), g.float()


def count_needed_labels(query_matrix, relevance):
    """Labels of queries (m, L) -> how many a candidate must share to be relevant to each, (m,)."""
    count = query_matrix.sum(dim=1)  # (m,) labels of a query
    needed = count if relevance == "all" else torch.ones(len(count))  # (m,)
    return torch.where(count > 0, needed, torch.inf)  # (m,) inf: nothing is relevant


def rank_block(scores, relevant, excluded):
    """The first five entries of evaluate_retrieval's result, of b queries; arguments are (b, n)."""
    # What is excluded comes last and counts nowhere. Both are changed in place.
    scores[excluded] = -torch.inf
    relevant[excluded] = False

    # topk orders equal scores arbitrarily, and the metrics of the list depend on that order. If an
    # encoder gives all samples one vector, they describe an arbitrary list; `first` does not.
    n = scores.shape[1]
    top = scores.topk(min(TOP_K, n), dim=1).indices  # (b, k)
    return {
        "top": top,
        "hit": relevant.gather(1, top),  # (b, k)
        "relevant": relevant.sum(dim=1, dtype=torch.int32),  # (b,)
        "candidates": n - excluded.sum(dim=1, dtype=torch.int32),  # (b,)
        "first": first_rank(scores, relevant),  # (b,)
    }


def evaluate_retrieval(queries, gallery, query_labels, gallery_labels, exclude=(), relevance="any"):
    """Rank the gallery for every query by cosine similarity (Sec. 4.1) -> dict of arrays.

    queries (m, D), gallery (n, D): embeddings; query_labels, gallery_labels: m and n label sets.
    relevance: a candidate is relevant if it shares a label with the query ("any"), or has all of
    the query's ("all"). To a query without labels nothing is relevant.
    exclude: pairs of lists of strings, m and n. A candidate whose string is the query's is no
    candidate for it; an empty string excludes nothing.

    top (m, k): numbers of the best k candidates, then of what is excluded if there are fewer; hit
    (m, k): which are relevant; relevant, candidates (m,): how many there are; first (m,): see
    first_rank; R@K (m,): is any of the first K relevant; P@10 (m,): relevant share of the best 10,
    or of all candidates if there are fewer; MnR, MdR (m,): see mean_and_median_rank.

    `first` needs the scores of all candidates, so that embed.search, which keeps a few, won't do.
    """
    q, g = comparable_vectors(queries, gallery)
    vocabulary = sorted(set().union(*query_labels))
    query_matrix = label_matrix(query_labels, vocabulary)  # (m, L)
    gallery_matrix = label_matrix(gallery_labels, vocabulary)  # (n, L)
    needed = count_needed_labels(query_matrix, relevance)  # (m,)
    codes = [string_codes(*pair) for pair in exclude]

    # Queries are scored block by block: all their scores would fill the memory.
    blocks = []
    for rows in torch.arange(len(q)).split(QUERY_BLOCK):
        scores = q[rows] @ g.T  # (b, n)
        shared = count_shared_labels(query_matrix[rows], gallery_matrix)  # (b, n)
        relevant = shared >= needed[rows, None]  # (b, n)
        excluded = torch.zeros_like(relevant)  # (b, n)
        for query_codes, gallery_codes in codes:
            excluded |= query_codes[rows, None] == gallery_codes
        blocks.append(rank_block(scores, relevant, excluded))

    # The entries of all blocks are joined, and the metrics follow from `hit`.
    found = {}
    for key in blocks[0]:
        found[key] = torch.cat([block[key] for block in blocks]).numpy()
    for k in KS:
        found[f"R@{k}"] = found["hit"][:, :k].any(axis=1)
    found["P@10"] = found["hit"].sum(axis=1) / np.clip(found["candidates"], 1, TOP_K)
    found["MnR"], found["MdR"] = mean_and_median_rank(found["hit"])
    return found


def summarise(found):
    """What evaluate_retrieval found -> the numbers of a result: means over queries, intervals."""
    values = np.stack([found[name] for name in METRICS], axis=1).astype(float)  # (m, 6)
    chance = {}
    for k in KS:
        chance[f"R@{k}"] = chance_of_hit(found["relevant"], found["candidates"], k).mean()

    # Other papers take the rank of the first relevant candidate, of queries that have any.
    first_ranks = found["first"][found["relevant"] > 0]
    first_mean, first_median = None, None
    if len(first_ranks):
        first_mean = float(first_ranks.mean())
        first_median = float(np.median(first_ranks))

    return {"queries": len(values), "without_relevant": len(values) - len(first_ranks),
            **dict(zip(METRICS, values.mean(axis=0).tolist())),
            "chance": chance, "first_MnR": first_mean, "first_MdR": first_median,
            "ci95": dict(zip(METRICS, bootstrap(values).T.tolist()))}


# ---- embeddings ---------------------------------------------------------------------------------
class EncoderChoice(NamedTuple):
    """An encoder to evaluate."""
    name: str  # in the table
    encoder: str  # as --encoder
    checkpoint: object  # path, or None


class EncodedTask(NamedTuple):
    """The embeddings that one encoder gives of all samples of a task."""
    name: str
    query_vectors: dict  # {(folder, id): (D,)}
    gallery_vectors: dict  # the same one, unless --gallery names another file
    meta: dict  # as in an embedding file


def run_name(checkpoint):
    """runs/NAME/checkpoint.pt -> NAME; a file of another name -> this name without its suffix."""
    path = Path(checkpoint).absolute()
    if path.name == "checkpoint.pt":
        return path.parent.name
    return path.stem


def find_runs():
    """The checkpoints of all runs, the newest first."""
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: -path.stat().st_mtime)
    if not runs:
        raise UserError("no runs/*/checkpoint.pt here: train first (train.py), "
                        "or give --checkpoint FILE")
    return runs


def choose_encoders(args):
    """The encoders asked for, or the newest run; for the demo all runs and two baselines."""
    # Which checkpoints: those given, or what the task takes by default. The random encoder is an
    # untrained one of the checkpoint's architecture.
    needs_checkpoint = args.encoder in ("m3ret", "random")
    all_of_the_demo = args.task == "demo" and needs_checkpoint and not args.checkpoint
    if args.checkpoint:
        checkpoints = args.checkpoint
    elif not needs_checkpoint:
        checkpoints = [None]
    elif all_of_the_demo:
        checkpoints = find_runs()
    else:
        checkpoints = find_runs()[:1]
        print(f"the newest run is taken: {checkpoints[0]}")

    # A trained encoder is called after its run, any other by its kind.
    choices = []
    for checkpoint in checkpoints:
        name = run_name(checkpoint) if args.encoder == "m3ret" else args.encoder
        choices.append(EncoderChoice(name, args.encoder, checkpoint))
    if all_of_the_demo:
        choices.append(EncoderChoice("random", "random", checkpoints[0]))
    if all_of_the_demo and args.pool == [""]:  # pixels have no tokens to pool
        choices.append(EncoderChoice("pixels", "pixels", None))

    # Their paths tell two of the same name apart.
    names = [choice.name for choice in choices]
    for i, choice in enumerate(choices):
        if names.count(choice.name) > 1:
            choices[i] = choice._replace(name=f"{choice.name} ({choice.checkpoint})")
    return choices


def vectors_by_sample(embeddings):
    """Embeddings of a file -> {(folder, id): embedding (D,)}."""
    vectors = {}
    for row, vector in zip(embeddings.rows, embeddings.vectors):
        vectors[row["folder"], row["id"]] = vector
    return vectors


def cached_embeddings(rows, encoder, checkpoint, pools):
    """Embed rows of any caches -> {(folder, id): embedding (D,)}, and the meta of their files.

    pools: the poolings that are wanted of them, all of which come from one file.

    The files lie in results/embeddings/ and serve again: embed_rows embeds the samples that are
    missing in the file or newer than it. It embeds all again if they were made in other sizes, or
    if the encoder gives other vectors now, as a foreign one with new weights does.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pooling = "grid" if "grid" in pools else ""
    embedder = load_embedder(encoder, checkpoint, device, pooling)
    vectors = {}
    seen = []  # ids of rows that the encoder was trained on; None if nobody knows
    for folder in sorted(set(column(rows, "folder"))):
        made_of = [encoder, embedder.meta["weights_sha256"], embedder.meta["code_sha256"],
                   os.path.realpath(folder), pooling]
        cache_key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        path = Path(f"results/embeddings/{Path(folder).name}-{cache_key}.npz")

        # The samples that another task has put into the file stay in it.
        wanted = {row["id"] for row in rows if row["folder"] == folder}
        if path.exists():
            wanted.update(read_npz(path).ids)
        members = [row for row in read_samples(folder) if row["id"] in wanted]
        embed_rows(members, embedder, path, device)
        stored = read_embeddings(path, folder)
        vectors.update(vectors_by_sample(stored))

        if stored.meta["seen"] is None:
            seen = None
        elif seen is not None:
            seen += stored.meta["seen"]
    return vectors, embedder.meta | {"seen": seen}


def load_given_embeddings(args):
    """The files of --embeddings and --gallery -> their setting, and their EncodedTask."""
    queries = read_embeddings(args.embeddings, args.cache[0])
    gallery = queries
    if args.gallery:
        gallery = read_embeddings(args.gallery, args.gallery_cache or args.cache[0])

    for key in SAME_ENCODER:
        if queries.meta.get(key) != gallery.meta.get(key):
            raise UserError(f"{args.gallery} is of another encoder than {args.embeddings} "
                            f"({key}): embed both with one")
    if queries.vectors.shape[1] != gallery.vectors.shape[1]:
        raise UserError(f"{args.gallery} has embeddings of another width than {args.embeddings}: "
                        "embed both with one encoder")
    if not any(row["labels"] for row in queries.rows):
        raise UserError(f"{args.cache[0]}: no sample has a label to evaluate by; "
                        "prepare with --labels")

    setting = Setting("embeddings", queries.rows, gallery.rows, relevance=args.relevance)
    model = EncodedTask(Path(args.embeddings).stem, vectors_by_sample(queries),
                        vectors_by_sample(gallery), queries.meta)
    return setting, model


def embedding_matrix(rows, vectors, meta, pool):
    """Embeddings (n, D) of rows, pooled as asked for ("": as they are).

    mix is [CLS, avg], and grid begins with it; so each of the others is a part of them.
    """
    x = np.stack([vectors[row["folder"], row["id"]] for row in rows])  # (n, D)
    stored = meta.get("pool")
    if pool in ("", stored):
        return x
    if stored == "grid":
        x = x[:, :sum(meta["parts"][:-1])]  # (n, D) without the cells
        stored = "avg" if len(meta["parts"]) == 2 else "mix"
        if pool == stored:
            return x
    if pool == "grid":
        raise UserError("--pool grid: these embeddings hold no grid; make them with "
                        "embed.py --pool grid")
    if stored != "mix":
        raise UserError(f"--pool {pool} needs an encoder with a CLS token (SimDINO); "
                        f"this one gives {stored}")
    cls, avg = np.split(x, 2, axis=1)  # (n, D / 2) each
    return cls if pool == "cls" else avg


def model_name(name, meta, pool):
    """The name of a model in the table, with the step of a run that is not finished."""
    if meta.get("encoder") == "m3ret" and meta.get("total") and meta["step"] < meta["total"]:
        name = f"{name}, step {meta['step']} of {meta['total']}"
    return f"{name} {pool}".strip()


def provenance(name, meta, pool, queries):
    """What a result says of its embeddings, and how many of its queries pretraining had seen."""
    keys = ("encoder", "checkpoint", "checkpoint_sha256", "code_sha256", "parameters", "flags",
            "step", "total")
    seen_in_pretraining = None  # nobody knows
    if meta.get("seen") is not None:
        seen_in_pretraining = len(set(column(queries, "id")) & set(meta["seen"]))
    result = {"model": model_name(name, meta, pool)}
    for key in keys:
        result[key] = meta.get(key)
    result["pool"] = pool or meta.get("pool")
    result["seen_in_pretraining"] = seen_in_pretraining
    return result


def compare_pretraining(setting, meta):
    """Table 4's rows for a run that was trained on one modality alone, else None."""
    if not setting.paper or setting.name not in PAPER_TABLE_4:
        return None
    flags = json.loads(meta.get("flags") or "{}")
    if len(flags.get("modalities", [])) != 1:
        return None
    return PAPER_TABLE_4[setting.name]


# ---- retrieval ----------------------------------------------------------------------------------
def retrieve(setting, query_x, gallery_x, exclude_same):
    """Rank the gallery (n, D) of a setting for its queries (m, D), see evaluate_retrieval.

    CHOICE: a query never retrieves itself, and equal ids are one sample, in a copied cache as well.
    The paper does not speak of it.
    """
    queries, gallery = setting.queries, setting.gallery
    exclude = [(column(queries, "id"), column(gallery, "id"))]

    if exclude_same == "patient":
        query_patients = column(queries, "patient")  # keyed hashes
        gallery_patients = column(gallery, "patient")
        if not any(query_patients) or not any(gallery_patients):
            raise UserError(f"{setting.name}: --exclude-same patient, but there are no patient "
                            "ids in samples.csv")
        exclude.append((query_patients, gallery_patients))

    query_labels = label_lists(queries, setting.label_prefix)
    gallery_labels = label_lists(gallery, setting.label_prefix)
    return evaluate_retrieval(query_x, gallery_x, query_labels, gallery_labels, exclude,
                              setting.relevance)


def captioned(row, text, label_prefix, colour=FRAME_GREY):
    """A sample as a tile of a figure, with a line of text and its labels: (3, y, x) in [0, 1]."""
    caption = "\n".join([text, *labels_of(row, label_prefix)])
    sample = load_sample(row["folder"], row)
    return picture(sample, row["modality"], caption, colour)


def draw_examples(path, settings, rankings):
    """Draw random queries (seed 0), each with its top 3 behind it, right or wrong (Fig. 5)."""
    # Where some settings search exactly their own queries, only these are shown, else all.
    shown = [(setting, found) for setting, found in zip(settings, rankings)
             if setting.queries is setting.gallery]
    shown = shown or list(zip(settings, rankings))
    per_setting = 4 if len(shown) == 1 else 1

    lines = []
    for setting, found in shown:
        for i in np.random.default_rng(0).permutation(len(setting.queries))[:per_setting]:
            tiles = [captioned(setting.queries[i], f"query: {setting.name}", setting.label_prefix)]
            shown_hits = min(3, found["candidates"][i])
            for j, hit in zip(found["top"][i, :shown_hits], found["hit"][i, :shown_hits]):
                word, colour = ("right", RIGHT_COLOUR) if hit else ("wrong", WRONG_COLOUR)
                tiles.append(captioned(setting.gallery[j], word, setting.label_prefix, colour))
            lines.append(tiles)
    save_montage(path, lines)


def load_task(args):
    """The settings of a task or of --embeddings, and the EncodedTasks that are asked for."""
    if args.embeddings:
        setting, model = load_given_embeddings(args)
        return [setting], [model]

    rows = task_rows(args)
    if TASKS[args.task].paper_size:
        settings = [paper_setting(args.task, rows)]
    elif args.task == "within":
        settings = archive_settings(args.task, rows)
    else:
        settings = body_part_settings(args.task, rows)

    # Every sample is embedded once, in however many settings it takes part.
    used = []
    for setting in settings:
        used += setting.queries + setting.gallery

    models = []
    for choice in choose_encoders(args):
        vectors, meta = cached_embeddings(used, choice.encoder, choice.checkpoint, args.pool)
        models.append(EncodedTask(choice.name, vectors, vectors, meta))
    return settings, models


def run_task(args):
    """Every setting of a task, or of --embeddings, by every model and pooling -> results."""
    settings, models = load_task(args)
    results = []
    rankings = []
    for model in models:
        for pool in args.pool:
            for setting in settings:
                query_x = embedding_matrix(setting.queries, model.query_vectors,
                                           model.meta, pool)  # (m, D)
                gallery_x = embedding_matrix(setting.gallery, model.gallery_vectors,
                                             model.meta, pool)  # (n, D)
                if (pool or model.meta.get("pool")) == "grid":
                    query_x, gallery_x = centre_parts(query_x, gallery_x, model.meta["parts"])
                found = retrieve(setting, query_x, gallery_x, args.exclude_same)
                rankings.append(found)
                results.append({
                    "task": args.task or "embeddings", "name": setting.name,
                    "gallery": len(setting.gallery), **summarise(found),
                    "relevance": setting.relevance, "exclude_same": args.exclude_same or "",
                    "paper": setting.paper or None,
                    "paper_table_4": compare_pretraining(setting, model.meta),
                    **provenance(model.name, model.meta, pool, setting.queries)})
    if args.figure:
        # Those of the first model, and of its first pooling.
        draw_examples(args.figure, settings, rankings[:len(settings)])
    return results


# ---- linear probe -------------------------------------------------------------------------------
class ProbeData(NamedTuple):
    """What a probe predicts."""
    rows: list  # n rows of samples.csv
    targets: list  # n lists of labels
    multi: bool  # whether a sample may have several labels, or none; else it has one class


def cross_entropy(features, targets, weights, multi):
    """Mean over samples of the softmax cross-entropy, or of the sum over labels of the sigmoid's.

    features (n, D), targets (n, L), weights (D + 1, L), the bias last.
    """
    logits = features @ weights[:-1] + weights[-1]  # (n, L)
    if multi:
        return F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
    return F.cross_entropy(logits, targets)


def fit_logistic(features, targets, l2, multi):
    """Weights (D + 1, L) that minimise cross_entropy + l2 / 2 * |weights without the bias|^2."""
    weights = torch.zeros(features.shape[1] + 1, targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=300, tolerance_grad=1e-6,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        penalty = l2 / 2 * weights[:-1].square().sum()
        loss = cross_entropy(features, targets, weights, multi) + penalty
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def probe_metrics(probabilities, truth, multi):
    """Predicted probabilities (n, L), truth (n, L) bool -> Table 7's numbers, means over labels.

    CHOICE: the paper defines none of them. A finding is predicted above 1/2. Accuracy is the share
    of right (sample, finding) pairs for findings, and of right samples for classes. A label that is
    never predicted has precision 0 and F1 0. AUROC leaves out labels that all or no test samples
    have.
    """
    if multi:
        predicted = probabilities > 0.5  # (n, L)
    else:
        predicted = np.eye(truth.shape[1], dtype=bool)[probabilities.argmax(axis=1)]  # (n, L)
    true_positives = (predicted & truth).sum(axis=0)  # (L,)
    positives = truth.sum(axis=0)  # (L,)
    predicted_positives = predicted.sum(axis=0)  # (L,)

    # A label that is never predicted, or never carried, would divide by zero.
    precision = true_positives / np.maximum(predicted_positives, 1)  # (L,)
    f1 = 2 * true_positives / np.maximum(positives + predicted_positives, 1)  # (L,)
    accuracy = (predicted == truth).mean() if multi else true_positives.sum() / len(truth)
    areas = []
    for label in np.flatnonzero((positives > 0) & (positives < len(truth))):
        areas.append(auroc(probabilities[:, label], truth[:, label]))
    return {"F1": float(f1.mean()), "precision": float(precision.mean()),
            "accuracy": float(accuracy), "AUROC": float(np.mean(areas or [np.nan]))}


def split_probe(rows, classes):
    """Row numbers (training, test): by the split column, or 4 : 1 in each class (App. C).

    All that is not of split test trains. CHOICE: without splits patients are divided, each of the
    class of its first sample. A sample whose patient is not known counts as a patient.
    """
    is_test = np.array([row["split"] == "test" for row in rows], dtype=bool)  # (n,)
    if not is_test.any():
        patients = [row["patient"] or row["id"] for row in rows]
        class_of = {}
        for patient, name in zip(patients, classes):
            class_of.setdefault(patient, name)
        order = np.random.default_rng(0).permutation(len(rows))
        shuffled = list(dict.fromkeys(patients[i] for i in order))

        test_patients = set()
        for name in sorted(set(classes)):
            of_class = [patient for patient in shuffled if class_of[patient] == name]
            test_patients.update(of_class[:len(of_class) // 5])
        is_test = np.array([patient in test_patients for patient in patients])  # (n,)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def probe_targets(rows):
    """What is predicted of rows: findings, if any of them has one, else the body parts."""
    findings = label_lists(rows, "finding:")
    if any(findings):
        return ProbeData(rows, findings, multi=True)
    rows = [row for row in rows if labels_of(row, "part:")]
    # Several parts of one sample are one class together: "abdomen+chest".
    parts = [["+".join(sorted(parts))] for parts in label_lists(rows, "part:")]
    return ProbeData(rows, parts, multi=False)


def fit_probe(features, targets, train, test, multi):
    """Fit on the rows `train` of features (n, D), targets (n, L) -> probabilities (test, L), l2."""
    # The training rows alone say what is standard.
    mean = features[train].mean(dim=0)
    std = features[train].std(dim=0)
    features = (features - mean) / std.clamp_min(1e-6)

    # The l2 that does best on a fifth of the training rows, held out for this, is used for all.
    # CHOICE: samples are held out here, not patients.
    held_out = len(train) // 5
    validation, rest = np.split(np.random.default_rng(1).permutation(train), [held_out])
    losses = {}
    for l2 in L2:
        weights = fit_logistic(features[rest], targets[rest], l2, multi)
        losses[l2] = cross_entropy(features[validation], targets[validation], weights, multi)
    l2 = min(L2, key=losses.get)

    # The fit with it to all training rows predicts the test rows.
    weights = fit_logistic(features[train], targets[train], l2, multi)  # (D + 1, L)
    logits = features[test] @ weights[:-1] + weights[-1]  # (test, L)
    probabilities = logits.sigmoid() if multi else logits.softmax(dim=1)
    return probabilities, l2


def probe(args):
    """Linear probe on frozen embeddings (App. D, Table 7) -> results."""
    rows, target_lists, multi = probe_targets(each_id_once(task_rows(args)))
    train, test = split_probe(rows, ["+".join(labels) for labels in target_lists])
    names = sorted(set().union(*[target_lists[i] for i in train]))
    fewest = 1 if multi else 2
    if len(train) < 5 or len(test) < 5 or len(names) < fewest:
        raise UserError(f"probe: {len(train)} train, {len(test)} test samples, "
                        f"{len(names)} labels: too few")

    # The paper probes one modality at a time, which the name says: "18 ct findings", "mri parts".
    modalities = set(column(rows, "modality"))
    modality = modalities.pop() if len(modalities) == 1 else "mixed"
    name = f"{len(names)} {modality} findings" if multi else f"{modality} parts"

    # All models predict the same labels of the same samples.
    targets = label_matrix(target_lists, names)  # (n, L)
    results = []
    for choice in choose_encoders(args):
        vectors, meta = cached_embeddings(rows, choice.encoder, choice.checkpoint, args.pool)
        features = torch.from_numpy(embedding_matrix(rows, vectors, meta, args.pool[0]))  # (n, D)
        probabilities, l2 = fit_probe(features, targets.float(), train, test, multi)
        metrics = probe_metrics(probabilities.numpy(), targets[test].numpy(), multi)
        results.append({
            "task": "probe", "name": name, **metrics, "train": len(train), "queries": len(test),
            "labels": names, "l2": l2, "paper": PAPER.get(name),
            **provenance(choice.name, meta, args.pool[0], [rows[i] for i in test])})
    return results


# ---- tables -------------------------------------------------------------------------------------
def format_cell(numbers, key):
    """A number as text, R@1 with its 95 % interval; "" if there is none."""
    if key not in numbers:
        return ""
    text = f"{numbers[key]:.3f}"
    if key == "R@1" and "ci95" in numbers:
        low, high = numbers["ci95"][key]
        text += f" ({low:.2f}-{high:.2f})".replace("0.", ".")  # .29: lines fit 120 columns
    return text


def list_references(result):
    """What a result is compared with -> {name: numbers}: chance, and rows of the paper."""
    references = {}
    if "chance" in result:
        references["chance"] = result["chance"]
    metrics = PROBE_METRICS if "AUROC" in result else METRICS
    for name, values in zip(("paper: MAE", "paper: SimDINO"), result["paper"] or ()):
        references[name] = dict(zip(metrics, values))
    table_4 = result.get("paper_table_4") or ()
    for name, values in zip(("paper: unimodal", "paper: multimodal"), table_4):
        references[name] = dict(zip(metrics, values))
    return references


def markdown_table(results):
    """Results as Markdown: of every setting all models, then what they are compared with.

    seen: how many queries pretraining had seen, ? where nobody knows.
    """
    # Of every setting our models come first, and below them what they are compared with.
    metrics = PROBE_METRICS if "AUROC" in results[0] else TABLE_METRICS
    lines = [["", "", *metrics, "queries", "seen"]]
    for name in dict.fromkeys(result["name"] for result in results):
        ours = [result for result in results if result["name"] == name]
        references = {}
        for result in ours:
            seen = result["seen_in_pretraining"]
            numbers = [format_cell(result, key) for key in metrics]
            lines.append([name, result["model"], *numbers, f"{result['queries']:,}",
                          "?" if seen is None else f"{seen:,}"])
            references.update(list_references(result))
        for reference, values in references.items():
            numbers = [format_cell(values, key) for key in metrics]
            lines.append([name, reference, *numbers, "", ""])

    # Columns are padded, so that the table reads well as plain text too.
    widths = []
    for cells in zip(*lines):
        widths.append(max(len(cell) for cell in cells))
    lines.insert(1, ["-" * width for width in widths])
    padded = []
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths)]
        padded.append(f"| {' | '.join(cells)} |")
    return "\n".join(padded)


def scaling(paths, against):
    """Of each setting in results files, fit log R@5 = slope * log x + start; print it (Fig. 4).

    x is the number of parameters, or the share of the data that was trained on.
    """
    points = {}  # {setting: list of (x, R@5)}
    for path in paths:
        with as_user_error(path, f"holds no results of retrieval with their {against}"):
            content = json.loads(Path(path).read_text())
            results = content["rows"] if "rows" in content else [content]
            for result in results:
                if against == "parameters":
                    x = result["parameters"]
                else:
                    x = json.loads(result["flags"])[against]
                points.setdefault(result["name"], []).append((float(x), float(result["R@5"])))

    # A straight line through the logarithms is a power law.
    for name, pairs in points.items():
        x, recall = np.array(pairs).T  # (number of results,) each
        if len(set(x)) < 2 or recall.min() <= 0:
            raise UserError(f"{name}: a fit needs R@5 above 0 at two or more values of {against}")
        slope, start = np.polyfit(np.log(x), np.log(recall), 1)  # least squares
        print(f"{name}: log R@5 = {slope:.4f} log {against} {start:+.4f}, from {pairs}")


# ---- command line -------------------------------------------------------------------------------
def check_arguments(parser, args):
    """Leave with code 2 if the flags contradict each other, or one would have no effect."""
    asked = [args.task, args.embeddings, args.scaling]
    if sum(map(bool, asked)) != 1:
        parser.error("give one of --task, --embeddings and --scaling")
    if "WORLD_SIZE" in os.environ:
        parser.error("evaluate.py is one process; under torchrun, embed.py makes the embeddings")

    if args.embeddings and len(args.cache or []) != 1:
        parser.error("--embeddings needs --cache, the one folder that they are of")
    if args.embeddings and (args.checkpoint or args.encoder != "m3ret"):
        parser.error("--embeddings are made already: leave out --checkpoint and --encoder")
    if not args.embeddings and (args.gallery or args.relevance != "any"):
        parser.error("--gallery and --relevance go with --embeddings")
    if args.gallery_cache and not args.gallery:
        parser.error("--gallery-cache goes with --gallery")

    others = [args.cache, args.checkpoint, args.exclude_same, args.figure, args.out]
    if args.scaling and (any(others) or args.encoder != "m3ret" or args.pool != [""]):
        parser.error("--scaling prints fits to results files: the only other flag is --against")
    if args.against != "parameters" and not args.scaling:
        parser.error("--against goes with --scaling")
    if args.task == "probe" and (args.exclude_same or args.figure):
        parser.error("probe ranks nothing: leave out --exclude-same and --figure")
    if args.task == "probe" and len(args.pool) > 1:
        parser.error("probe takes one --pool")


def keep_earlier_results(path, content):
    """Rename results that other numbers are about to replace: TASK.json to TASK.1.json, .2.json."""
    if not path.exists() or path.read_bytes() == content:
        return
    number = 1
    while path.with_suffix(f".{number}.json").exists():
        number += 1
    kept = path.with_suffix(f".{number}.json")
    os.replace(path, kept)
    print(f"kept: what was in {path} is {kept} now")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=list(TASKS), metavar="TASK",
         help=f"one of {', '.join(list(TASKS)[:6])},\n"
              "cross_modal (your archives, across modalities), within (each of them by itself),\n"
              "demo, probe (linear; findings of ct_rate, or body parts)")
    flag("--cache", nargs="+",
         help="cache folders (default: the task's data set under cache/, or all of your own there)")
    flag("--checkpoint", nargs="+", metavar="FILE",
         help="one, or several to compare (default: the newest runs/*/checkpoint.pt, for demo all)")
    flag("--encoder", default="m3ret",
         help="m3ret, random, pixels or module:function, as in embed.py")
    flag("--pool", nargs="+", choices=["avg", "cls", "mix", "grid"], default=[""],
         help="one, or several to compare; grid is beyond the paper, as in embed.py")
    flag("--exclude-same", choices=["patient"], help="leave out candidates of the query's patient")
    flag("--embeddings", metavar="NPZ",
         help="evaluate these, whoever made them; labels come from --cache")
    flag("--gallery", metavar="NPZ",
         help="with --embeddings: what to search (default: the queries)")
    flag("--gallery-cache", metavar="FOLDER", help="cache of --gallery (default: --cache)")
    flag("--relevance", choices=["any", "all"], default="any",
         help="with --embeddings: labels to share")
    flag("--scaling", nargs="+", metavar="FILE",
         help="results files of several models: fit R@5 (Fig. 4)")
    flag("--against", choices=["parameters", "data_fraction"], default="parameters",
         help="with --scaling")
    flag("--figure", metavar="PNG",
         help="draw some queries and their top 3, right and wrong marked")
    flag("--out", help="results file (default results/TASK.json)")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def main():
    args = parse_arguments()
    if args.scaling:
        scaling(args.scaling, args.against)
        return

    results = probe(args) if args.task == "probe" else run_task(args)
    print(markdown_table(results))

    # One result is written as it is, several as {"rows": [...]}.
    content = results[0] if len(results) == 1 else {"rows": results}
    content = json.dumps(content, indent=1).encode()
    path = Path(args.out or f"results/{args.task or 'embeddings'}.json")
    if not args.out:  # who names a file means to replace it
        keep_earlier_results(path, content)
    with atomic_write(path) as file:
        file.write(content)
    print(f"written: {path}")


if __name__ == "__main__":
    cli(main)
