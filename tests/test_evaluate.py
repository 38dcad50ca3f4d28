"""evaluate.py against hand-worked tables, naive loops, enumeration, scikit-learn and the paper itself."""
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import prepare
from evaluate import PAPER, PAPER_TABLE_4, TASKS, evaluate_retrieval, summarise
from model import ViT, save_checkpoint
from prepare import UserError

ROOT = Path(__file__).parents[1]


def angles(*degrees):
    """Unit vectors in the plane: the cosine between two is that of the angle between them."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


# ---- a table worked by hand --------------------------------------------------------------------------------
GALLERY = angles(0, 10, 20, 30, 40, 50, 60, 70)
GALLERY_LABELS = [("a",), ("b",), ("a", "b"), ("c",), ("b",), ("a",), (), ("c",)]
QUERIES = angles(-1, 71, 31, 5.001)
QUERY_LABELS = [("b",), ("a", "b"), ("d",), ("a", "c")]
# Lists by angle. Query -1: 0 10 20 30 40 50 60 70 degrees, of which 10, 20 and 40 carry b: ranks 2, 3, 5.
# Query 71: 70 60 50 40 30 20 10 0; with a or b: 50 40 20 10 0, ranks 3 4 6 7 8; with both: 20 alone, rank 6.
# Query 31 asks for d, which nothing has.
# Query 5.001: 10 0 20 30 40 50 60 70; with a or c: ranks 2 3 4 6 8; with both: none.


def test_four_queries_and_eight_candidates_by_hand():
    found = evaluate_retrieval(QUERIES, GALLERY, QUERY_LABELS, GALLERY_LABELS)
    assert found["R@1"].tolist() == [False, False, False, False]
    assert found["R@5"].tolist() == [True, True, False, True]
    assert found["R@10"].tolist() == [True, True, False, True]
    assert found["MnR"] == pytest.approx([10 / 3, 28 / 5, 11, 23 / 5])
    assert found["MdR"] == pytest.approx([3, 6, 11, 4])
    assert found["first"].tolist() == [2, 3, 9, 2]  # nothing found: one place behind the 8 candidates
    assert found["relevant"].tolist() == [3, 5, 0, 5]
    assert found["P@10"].tolist() == [3 / 8, 5 / 8, 0, 5 / 8]  # of a list of all eight


def test_all_labels_of_the_query_by_hand():
    found = evaluate_retrieval(QUERIES, GALLERY, QUERY_LABELS, GALLERY_LABELS, relevance="all")
    assert found["first"].tolist() == [2, 6, 9, 9]
    assert found["MnR"] == pytest.approx([10 / 3, 6, 11, 11])


def test_a_summary_counts_queries_without_an_answer_as_misses():
    found = evaluate_retrieval(QUERIES, GALLERY, QUERY_LABELS, GALLERY_LABELS, relevance="all")
    row = summarise(found)
    assert (row["queries"], row["without_relevant"], row["R@5"], row["R@10"]) == (4, 2, 0.25, 0.5)
    assert row["chance"]["R@1"] == pytest.approx((3 / 8 + 1 / 8) / 4)


def test_first_hit_ranks_are_of_the_queries_that_have_an_answer():
    row = summarise(evaluate_retrieval(QUERIES, GALLERY, QUERY_LABELS, GALLERY_LABELS, relevance="all"))
    assert (row["first_MnR"], row["first_MdR"]) == (4, 4)  # ranks 2 and 6
    none = summarise(evaluate_retrieval(QUERIES[2:3], GALLERY, QUERY_LABELS[2:3], GALLERY_LABELS))
    assert none["first_MnR"] is None and none["R@10"] == 0 and none["MnR"] == 11


# ---- the definition, slowly --------------------------------------------------------------------------------
def unit_vector(v):
    length = math.sqrt(math.fsum(float(x) ** 2 for x in v))
    return [float(x) / length if length else 0.0 for x in v]


def naive(queries, gallery, query_labels, gallery_labels, exclude, relevance):
    """The definition, one query at a time, in Python floats."""
    gallery = [unit_vector(v) for v in gallery]
    result = []
    for i, q in enumerate(map(unit_vector, queries)):
        candidates = [j for j in range(len(gallery))
                      if not any(qs[i] == gs[j] and qs[i] != "" for qs, gs in exclude)]
        scores = {j: math.fsum(a * b for a, b in zip(q, gallery[j])) for j in candidates}
        ranked = sorted(candidates, key=lambda j: (-scores[j], j))
        wanted = set(query_labels[i])
        shared = [wanted & set(gallery_labels[j]) for j in ranked]
        right = [bool(found) and (found == wanted or relevance == "any") for found in shared]
        ranks = [place for place, good in enumerate(right, start=1) if good]
        top = [rank for rank in ranks if rank <= 10]
        result.append({"R@1": any(right[:1]), "R@5": any(right[:5]), "R@10": any(right[:10]),
                       "P@10": sum(right[:10]) / min(10, max(1, len(candidates))),
                       "MnR": np.mean(top) if top else 11, "MdR": np.median(top) if top else 11,
                       "first": ranks[0] if ranks else len(candidates) + 1,
                       "relevant": len(ranks), "candidates": len(candidates)})
    return {key: np.array([row[key] for row in result], dtype=float) for key in result[0]}


def draw_labels(generator, n, labels="abcdef", most=3):
    return [tuple(generator.choice(list(labels), generator.integers(0, most + 1), replace=False))
            for _ in range(n)]


@pytest.mark.parametrize("block", [7, 256])
@pytest.mark.parametrize("relevance", ["any", "all"])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("own_gallery", [False, True], ids=["another gallery", "leave-one-out"])
@pytest.mark.parametrize("n, m", [(60, 40), (9, 5)], ids=["sixty", "nine, fewer than a list holds"])
def test_retrieval_equals_naive_loops(n, m, own_gallery, patients, relevance, block, monkeypatch):
    monkeypatch.setattr(evaluate, "QUERY_BLOCK", block)
    generator = np.random.default_rng(n + 10 * patients)
    x = generator.standard_normal((n, 8)).astype(np.float32)
    y = x if own_gallery else generator.standard_normal((m, 8)).astype(np.float32)
    x_labels = draw_labels(generator, n)
    y_labels = x_labels if own_gallery else draw_labels(generator, m)
    x_ids = [f"x{i}" for i in range(n)]
    y_ids = x_ids if own_gallery else [f"y{i}" for i in range(m)]
    x_patients = generator.choice(["", "p", "q", "r", "s"], n)
    y_patients = x_patients if own_gallery else generator.choice(["", "p", "q", "r", "s"], m)
    exclude = [(y_ids, x_ids)] + [(y_patients, x_patients)] * patients

    found = evaluate_retrieval(y, x, y_labels, x_labels, exclude, relevance)
    for key, expected in naive(y, x, y_labels, x_labels, exclude, relevance).items():
        np.testing.assert_allclose(found[key].astype(float), expected, rtol=0, atol=1e-12, err_msg=key)


def test_candidates_that_lie_close_together_are_told_apart():
    """A collapsed encoder: all cosines are 1 within float32; their order is still that of the angles."""
    generator = np.random.default_rng(0)
    small = generator.standard_normal((60, 8))
    x = 1e4 * np.eye(8)[:1] + small * [0, *[1] * 7]  # (60, 8) one direction, and small steps to its sides
    labels = [(str(i // 2),) for i in range(60)]
    ids = [str(i) for i in range(60)]
    found = evaluate_retrieval(x, x, labels, labels, [(ids, ids)])
    expected = naive(x, x, labels, labels, [(ids, ids)], "any")
    q = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.float32(q @ q.T).min() > 1 - 1e-6
    assert (found["first"] == expected["first"]).mean() > 0.95


# ---- what is excluded --------------------------------------------------------------------------------------
def test_a_query_never_finds_itself_but_finds_its_copy():
    x = angles(0, 0, 90)  # the second is a copy of the first
    labels = [("a",), ("a",), ("b",)]
    ids = ["1", "2", "3"]
    found = evaluate_retrieval(x, x, labels, labels, [(ids, ids)])
    assert found["first"].tolist() == [1, 1, 3] and found["candidates"].tolist() == [2, 2, 2]


def test_an_unknown_patient_excludes_nobody():
    x = angles(0, 1, 2)
    labels = [("a",)] * 3
    ids = ["1", "2", "3"]
    patients = ["", "", "p"]
    found = evaluate_retrieval(x, x, labels, labels, [(ids, ids), (patients, patients)])
    assert found["candidates"].tolist() == [2, 2, 2]


# ---- equal scores ------------------------------------------------------------------------------------------
def test_ties_by_hand():
    # All four candidates lie at 0 degrees but the last; the query lies there too.
    gallery = angles(0, 0, 0, 90)

    def first(*labels):
        return evaluate_retrieval(angles(0), gallery, [("a",)], labels)["first"][0]

    assert first("a", "b", "b", "b") == 2  # ranks 1, 2, 3 are equally likely
    assert first("a", "a", "b", "b") == pytest.approx(4 / 3)  # aab, aba: 1; baa: 2
    assert first("a", "a", "a", "b") == 1
    assert first("b", "b", "b", "a") == 4  # no tie of the relevant one
    assert first("b", "b", "b", "b") == 5


@pytest.mark.parametrize("relevant", [1, 2, 5, 8])
def test_a_constant_encoder_has_the_first_rank_of_a_random_order(relevant):
    labels = [("a",)] * relevant + [("b",)] * (8 - relevant)
    x = np.full((8, 96), 0.3, np.float32)
    found = evaluate_retrieval(x[:1], x, [("a",)], labels)
    orders = itertools.combinations(range(8), relevant)  # the places of the relevant ones
    assert found["first"][0] == pytest.approx(np.mean([1 + min(places) for places in orders]))


def test_a_constant_encoder_does_not_look_perfect():
    generator = np.random.default_rng(0)
    x = np.tile(generator.standard_normal(96).astype(np.float32), (300, 1))
    labels = [(str(i),) for i in generator.integers(0, 10, 300)]
    ids = [str(i) for i in range(300)]
    row = summarise(evaluate_retrieval(x, x, labels, labels, [(ids, ids)]))
    assert row["first_MnR"] == pytest.approx(10, rel=0.2)  # one in ten is relevant


# ---- chance, intervals, the paper's tables -----------------------------------------------------------------
@pytest.mark.parametrize("candidates, relevant", [(6, 0), (6, 1), (6, 3), (6, 6), (2, 1), (0, 0)])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_chance_is_the_share_of_all_draws(candidates, relevant, k):
    draws = list(itertools.combinations(range(candidates), min(k, candidates)))
    share = sum(any(item < relevant for item in draw) for draw in draws) / len(draws)
    chance = evaluate.chance_of_hit(np.array([relevant]), np.array([candidates]), k)
    assert chance[0] == pytest.approx(share)


def test_random_embeddings_score_at_chance():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((1500, 16)).astype(np.float32)
    labels = [(str(i),) for i in generator.integers(0, 8, 1500)]
    ids = [str(i) for i in range(1500)]
    row = summarise(evaluate_retrieval(x, x, labels, labels, [(ids, ids)]))
    for k in ("R@1", "R@5", "R@10"):
        assert row["ci95"][k][0] <= row[k] <= row["ci95"][k][1]
        assert row[k] == pytest.approx(row["chance"][k], abs=0.05)


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).random((400, 2)) < [0.3, 1.1]
    low, high = evaluate.bootstrap(values.astype(float))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert high[0] - low[0] == pytest.approx(2 * half, rel=0.15) and (low[1], high[1]) == (1, 1)


def test_bootstrap_repeats():
    values = np.random.default_rng(0).random((40, 2))
    assert np.array_equal(evaluate.bootstrap(values), evaluate.bootstrap(values))


def paper_rows():
    rows = [row for rows in [*PAPER.values(), *PAPER_TABLE_4.values()] for row in rows if len(row) == 5]
    return [dict(zip(evaluate.METRICS, row)) for row in rows]


def test_the_papers_rows_fit_our_reading_of_its_ranks():
    """11 for the 1 - R@10 queries without hits, about 5.5 for the others."""
    assert len(paper_rows()) == 24 + 12
    for row in paper_rows():
        for rank in ("MnR", "MdR"):
            among_hits = (row[rank] - 11 * (1 - row["R@10"])) / row["R@10"]
            assert 4.4 < among_hits < 6.2, (row, among_hits)  # 5.5 where hits are spread evenly over the list


def test_the_papers_rows_contradict_the_rank_of_the_first_hit():
    impossible = 0
    for row in paper_rows():
        r1, r5, r10 = row["R@1"], row["R@5"], row["R@10"]
        low = r1 + 2 * (r5 - r1) + 6 * (r10 - r5) + 11 * (1 - r10)
        high = r1 + 5 * (r5 - r1) + 10 * (r10 - r5) + 11 * (1 - r10)
        impossible += not low - 0.01 <= row["MnR"] <= high + 0.01
    assert impossible >= 12 + 6, impossible


# ---- probe -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("multi", [True, False])
def test_probe_metrics_are_those_of_scikit_learn(multi):
    sk = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 90).round(1)  # rounded, so that there are ties
    classes = generator.integers(0, 4, 90)
    truth = generator.random((90, 4)) < 0.3 if multi else np.eye(4, dtype=bool)[classes]
    probabilities[:, 3] = 0  # never predicted
    ours = evaluate.probe_metrics(probabilities, truth, multi)

    best = probabilities.argmax(axis=1)
    predicted = probabilities > 0.5 if multi else np.eye(4, dtype=bool)[best]
    options = {"average": "macro", "zero_division": 0}
    assert ours["F1"] == pytest.approx(sk.f1_score(truth, predicted, **options))
    assert ours["precision"] == pytest.approx(sk.precision_score(truth, predicted, **options))
    areas = [sk.roc_auc_score(truth[:, j], probabilities[:, j]) for j in range(4)]
    assert ours["AUROC"] == pytest.approx(np.mean(areas))
    accuracy = [sk.accuracy_score(truth[:, j], predicted[:, j]) for j in range(4)]
    assert ours["accuracy"] == pytest.approx(np.mean(accuracy) if multi else sk.accuracy_score(classes, best))


def test_auroc_is_the_share_of_pairs_in_order():
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    positive = np.array([False, True, False, True])
    # Of the pairs .4 > .1, .4 = .4, .8 > .1, .8 > .4 one is a tie.
    assert evaluate.auroc(scores, positive) == (3 + 1 / 2) / 4


def test_a_label_nobody_carries_is_left_out_of_auroc():
    truth = np.array([[True, False], [False, False], [True, False]])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.2], [0.6, 0.3]])
    assert evaluate.probe_metrics(probabilities, truth, True)["AUROC"] == 1


@pytest.mark.parametrize("multi", [True, False])
def test_fit_finds_the_minimum_that_scikit_learn_finds(multi):
    linear = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((120, 6)).astype(np.float32)
    logits = x @ generator.standard_normal((6, 3)) + generator.standard_normal((120, 3))
    y = logits > 0.5 if multi else np.eye(3, dtype=bool)[logits.argmax(axis=1)]
    w = evaluate.fit_logistic(torch.from_numpy(x), torch.from_numpy(y).float(), 0.01, multi).numpy()
    model = linear.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=5000)  # C is 1 / (l2 * n)
    if multi:
        fits = [model.fit(x, y[:, j]) and (model.coef_[0].copy(), model.intercept_[0]) for j in range(3)]
        coefficients, bias = np.stack([c for c, _ in fits], axis=1), np.array([b for _, b in fits])
    else:
        model.fit(x, y.argmax(axis=1))
        coefficients, bias = model.coef_.T, model.intercept_ - model.intercept_.mean()
        w[-1] -= w[-1].mean()  # softmax ignores a shift of all biases
    np.testing.assert_allclose(w, np.vstack([coefficients, bias]), atol=2e-3)


def test_probe_splits_four_to_one_within_every_class():
    rows = [{"id": str(i), "patient": "", "split": ""} for i in range(30)]
    train, test = evaluate.split_probe(rows, ["a"] * 20 + ["b"] * 10)
    assert sorted([*train, *test]) == list(range(30))
    assert [(test < 20).sum(), (test >= 20).sum()] == [4, 2]


def test_probe_has_no_patient_on_both_sides():
    """20 patients of three samples each, some of two classes: a fifth of the patients is test."""
    rows = [{"id": str(i), "patient": f"p{i % 20}", "split": ""} for i in range(60)]
    train, test = evaluate.split_probe(rows, ["a" if i < 30 else "b" for i in range(60)])
    assert sorted([*train, *test]) == list(range(60))
    assert not {i % 20 for i in train} & {i % 20 for i in test}
    assert len(test) == 4 * 3  # a fifth of the patients


def test_probe_takes_the_split_of_the_table_if_there_is_one():
    train, test = evaluate.split_probe([{"split": "train"}] * 3 + [{"split": "test"}], list("abcd"))
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [3])


# ---- who takes part ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("task, split, labels, takes_part", [
    ("chestxray14", "test", ("Mass",), True), ("chestxray14", "test", ("Mass", "Edema"), False),
    ("chestxray14", "test", (), False), ("chestxray14", "train", ("Mass",), False),
    ("fetal_planes", "", ("Other",), False), ("fetal_planes", "", ("Brain", "Other"), True),
    ("kvasir_capsule", "", (), False), ("hyper_kvasir", "train", ("polyps",), True),
    ("lesion_size", "", (), True), ("cross_modal", "train", ("head",), False),
    ("cross_modal", "test", ("head",), True), ("within", "train", ("x",), False)])
def test_who_takes_part(task, split, labels, takes_part):
    assert TASKS[task].takes_part({"split": split, "labels": labels}) == takes_part


@pytest.mark.parametrize("prefix, expected", [
    ("part:", ["head", "chest"]), ("finding:", ["finding:Mass"]),
    ("", ["head", "chest", "finding:Mass"])])
def test_a_body_part_may_come_without_its_prefix(prefix, expected):
    assert evaluate.labels_of({"labels": ("head", "part:chest", "finding:Mass")}, prefix) == expected


def test_pooling_takes_its_half_of_mix():
    rows = [{"folder": "f", "id": name} for name in "ba"]
    vectors = {("f", "a"): np.arange(6), ("f", "b"): np.arange(6, 12)}  # [CLS, avg]
    pooled = {pool: evaluate.embedding_matrix(rows, vectors, {"pool": "mix"}, pool).tolist()
              for pool in ("cls", "avg", "mix", "")}
    assert pooled["cls"] == [[6, 7, 8], [0, 1, 2]] and pooled["avg"] == [[9, 10, 11], [3, 4, 5]]
    assert pooled["mix"] == pooled[""] == [[*range(6, 12)], [*range(6)]]


# ---- makers of caches and files ----------------------------------------------------------------------------
def name_of(folder, i):
    """The id of sample i of a cache that write_cache makes: 16 hex digits, as prepare.py's."""
    return hashlib.sha256(f"{folder} {i}".encode()).hexdigest()[:16]


def write_cache(folder, modality, labels, split="", patients=None, shape=(1, 32, 32, 1)):
    """A cache of stripes at the angle of a sample's first label, so that neighbours share labels."""
    generator = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    names = sorted({label for row in labels for label in row})
    lines = ["id,modality,labels,patient,split,shape"]
    for i, row in enumerate(labels):
        angle = names.index(row[0]) * np.pi / len(names) if row else 1.0
        y, x = np.mgrid[:32, :32]
        stripes = 0.5 + 0.4 * np.sin(0.7 * (x * np.cos(angle) + y * np.sin(angle)))
        stripes = (stripes + generator.normal(0, 0.05, stripes.shape)).clip(0, 1)
        sample = np.broadcast_to(stripes[None, :, :, None], shape)
        np.save(folder / f"{name_of(folder.name, i)}.npy", (255 * sample).astype(np.uint8))
        patient = patients[i] if patients else f"p{i}"
        lines.append(",".join([name_of(folder.name, i), modality, "|".join(row), patient, split,
                               "x".join(map(str, shape))]))
    (folder / "samples.csv").write_text("\n".join(lines) + "\n")
    (folder / "recipe.json").write_text(json.dumps({"size": 32, "slices": 8, "frames": 16}))
    return folder


def join_caches(folder, parts):
    """Move the samples of some caches into one."""
    folder.mkdir()
    shutil.copy(parts[0] / "recipe.json", folder)
    lines = [(parts[0] / "samples.csv").read_text().splitlines()[0]]
    for part in parts:
        lines += (part / "samples.csv").read_text().splitlines()[1:]
        for array in part.glob("*.npy"):
            array.rename(folder / array.name)
        shutil.rmtree(part)
    (folder / "samples.csv").write_text("\n".join(lines))


def write_npz(path, embeddings, cache, numbers, **meta):
    """Embeddings made by anyone, of these samples of a cache."""
    names = [name_of(cache, i) for i in numbers]
    np.savez(path, embeddings=np.float32(embeddings), ids=names, meta=json.dumps(meta))


def chest(here, n=12):
    """12 test images with one finding, 3 that do not take part, and one training image."""
    labels = [(("Mass", "Edema", "Hernia")[i % 3],) for i in range(n)] + [(), ("Mass", "Edema"), ()]
    write_cache(here / "cache/chestxray14", "xray", labels, "test", [f"p{i // 2}" for i in range(n + 3)])
    with open(here / "cache/chestxray14/samples.csv", "a") as file:
        file.write("0123456789abcdef,xray,Mass,p0,train,1x32x32x1\n")


def write_run(path, age=0, cls=False, step=1, seed=0, arch="vit_xs", **state):
    """A checkpoint of an untrained network, as old as told."""
    torch.manual_seed(seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state.setdefault("flags", "{}")
    save_checkpoint(path, ViT(arch, cls_token=cls), step=step, **state)
    os.utime(path, (1e9 + age, 1e9 + age))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with an untrained SimDINO-like and MAE-like run, the second one newer."""
    monkeypatch.chdir(tmp_path)
    write_run("runs/simdino/checkpoint.pt", age=0, cls=True, seed=0)
    write_run("runs/mae/checkpoint.pt", age=1, seed=1)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Call evaluate.main as the command line does; returns what it printed."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out
    return call


def read_results(path):
    """A results file -> its rows, whether it has one or many."""
    content = json.loads(Path(path).read_text())
    return content.get("rows", [content])


def read_table(printed):
    """The printed table as {(setting, model): {column: text}}."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    lines = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    header = lines[0]
    return {(line[0], line[1]): dict(zip(header[2:], line[2:])) for line in lines[2:]}


# ---- a task ------------------------------------------------------------------------------------------------
KEYS = {"task", "queries", "gallery", "without_relevant", "R@1", "R@5", "R@10", "MnR", "MdR", "first_MnR",
        "first_MdR", "chance", "ci95", "paper", "checkpoint", "checkpoint_sha256", "pool", "exclude_same",
        "seen_in_pretraining"}


def test_a_task_needs_no_other_flag(here, command):
    chest(here)
    printed = command("--task", "chestxray14")
    assert "found 12 samples, paper 7,992" in printed
    row, = read_results("results/chestxray14.json")
    assert KEYS <= row.keys()
    assert (row["queries"], row["gallery"], row["pool"]) == (12, 12, "avg")
    assert row["R@1"] == 1  # stripes of one direction are nearest to each other, for an untrained encoder too
    assert row["chance"]["R@1"] == pytest.approx(3 / 11)


def test_the_table_fits_a_terminal_and_holds_the_results(here, command):
    chest(here)
    printed = command("--task", "chestxray14")
    row, = read_results("results/chestxray14.json")
    table = read_table(printed)
    ours = table["chestxray14", "mae"]
    assert list(ours) == ["R@1", "R@5", "R@10", "P@10", "MnR", "MdR", "queries", "seen"]
    assert ours["R@1"] == "1.000 (1.00-1.00)" and ours["queries"] == "12"
    assert all(ours[key] == f"{row[key]:.3f}" for key in ("R@5", "P@10", "MnR", "MdR"))
    assert table["chestxray14", "chance"]["R@1"] == f"{3 / 11:.3f}"
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_the_widest_table_of_the_paper_fits_120_columns():
    numbers = dict.fromkeys(evaluate.METRICS, 0.1) | {"MnR": 9.5, "MdR": 9.5}
    result = {"name": "regional_abnormality", "model": "my_simdino_run", "queries": 25687,
              "seen_in_pretraining": 25687, "chance": {}, "paper": PAPER["regional_abnormality"],
              "ci95": {"R@1": [0.05, 0.15]}, **numbers}
    table = evaluate.markdown_table([result])
    assert "0.100 (.05-.15)" in table
    assert max(map(len, table.splitlines())) <= 120


@pytest.fixture
def papers_size(monkeypatch):
    """Says how many samples the paper has of chestxray14; `chest` makes 12 that take part."""
    task = TASKS["chestxray14"]
    return lambda size: monkeypatch.setitem(TASKS, "chestxray14", task._replace(paper_size=size))


@pytest.mark.parametrize("size, shown", [(24, True), (25, False)])
def test_the_papers_rows_are_left_out_where_less_than_half_of_its_samples_are_there(
        here, command, papers_size, size, shown):
    chest(here)
    papers_size(size)
    printed = command("--task", "chestxray14", "--encoder", "pixels")
    table = read_table(printed)
    assert (("chestxray14", "paper: SimDINO") in table) == shown
    assert ("numbers are left out" in printed) == (not shown)


def test_the_papers_rows_stand_below_ours(here, command, papers_size):
    chest(here)
    papers_size(12)
    table = read_table(command("--task", "chestxray14"))
    assert [by for _, by in table] == ["mae", "chance", "paper: MAE", "paper: SimDINO"]
    assert table["chestxray14", "paper: SimDINO"]["R@1"] == "0.345"
    row, = read_results("results/chestxray14.json")
    assert row["paper"][1][0] == 0.345


@pytest.mark.parametrize("modalities, shown", [(["xray"], True), (["xray", "ct"], False)])
def test_a_run_of_one_modality_is_compared_with_table_4(here, command, papers_size, modalities, shown):
    chest(here)
    papers_size(12)
    write_run("runs/uni/checkpoint.pt", age=2, flags=json.dumps({"modalities": modalities}))
    table = read_table(command("--task", "chestxray14"))
    assert (("chestxray14", "paper: unimodal") in table) == shown
    row, = read_results("results/chestxray14.json")
    assert row["paper_table_4"] == (json.loads(json.dumps(PAPER_TABLE_4["chestxray14"])) if shown else None)
    if shown:
        assert table["chestxray14", "paper: unimodal"]["R@1"] == "0.295"
        assert table["chestxray14", "paper: multimodal"]["R@1"] == "0.323"


def test_candidates_of_the_querys_patient_can_be_excluded(here, command):
    chest(here)
    command("--task", "chestxray14", "--exclude-same", "patient", "--out", "apart.json")
    row, = read_results("apart.json")
    assert row["chance"]["R@1"] == pytest.approx(3 / 10)  # a patient has 2 images, of 2 findings
    assert row["exclude_same"] == "patient"


def test_excluding_patients_needs_patients(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)] * 3, patients=[""] * 6)
    write_npz("a.npz", angles(*range(6)), "a", range(6))
    with pytest.raises(UserError, match="no patient ids"):
        command("--embeddings", "a.npz", "--cache", "cache/a", "--exclude-same", "patient")


def test_a_cache_that_is_named_twice_counts_once(here, command):
    chest(here)
    command("--task", "chestxray14", "--cache", "cache/chestxray14", "cache/chestxray14")
    row, = read_results("results/chestxray14.json")
    assert (row["queries"], row["gallery"], row["chance"]["R@1"]) == (12, 12, pytest.approx(3 / 11))


def test_from_the_public_layout_to_the_table(here, command, monkeypatch):
    """NIH files -> prepare -> evaluate: test images with one finding take part, each finds its like."""
    source = here / "CXR8"
    generator = np.random.default_rng(0)
    (source / "images").mkdir(parents=True)
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height]"]
    names = []
    for i, finding in enumerate(["Mass", "Hernia", "Edema|Mass", "No Finding"] * 3):
        names.append(f"{i:08d}_000.png")
        lines.append(f"{names[-1]},{finding},0,{i},60,60")
        kind = 200 * (np.arange(60) // 10 % 2) if finding == "Mass" else 3 * np.arange(60)
        noisy = (kind[:, None] + generator.integers(0, 20, (60, 60))).astype(np.uint8)
        Image.fromarray(noisy).save(source / "images" / names[-1])
    (source / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    (source / "train_val_list.txt").write_text("\n".join(names[8:]))
    (source / "test_list.txt").write_text("\n".join(names[:8]))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "chestxray14", str(source), "--size", "64"])
    prepare.main()
    assert "found 4 samples, paper 7,992" in command("--task", "chestxray14", "--encoder", "pixels")
    row, = read_results("results/chestxray14.json")
    assert (row["queries"], row["R@1"], row["MnR"]) == (4, 1, 1)
    assert row["chance"]["R@1"] == pytest.approx(1 / 3)


def test_regional_tasks_count_their_own_labels(here, command):
    labels = [("status:lung:abnormal", "size:lung:nodule:13", "finding:Nodule"),
              ("status:lung:abnormal", "finding:Nodule"), ("status:lung:abnormal", "status:heart:normal"),
              ("status:heart:normal", "size:lung:nodule:13"), ()]
    write_cache(here / "cache/radgenome", "ct", labels, shape=(1, 32, 32, 8))
    command("--task", "regional_abnormality")
    row, = read_results("results/regional_abnormality.json")
    # Abnormal lungs alone match two others; with a normal heart as well, none; a normal heart alone, one.
    assert (row["queries"], row["gallery"], row["without_relevant"]) == (4, 5, 1)
    assert row["chance"]["R@1"] == pytest.approx((2 / 4 + 2 / 4 + 0 + 1 / 4) / 4)
    command("--task", "lesion_size")
    row, = read_results("results/lesion_size.json")
    assert (row["queries"], row["gallery"], row["chance"]["R@1"]) == (2, 5, pytest.approx(1 / 4))
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 1  # one pass serves both


# ---- across modalities, the demo, archives of one's own ----------------------------------------------------
def write_hospital(here, modality, folder=""):
    labels = [(("head", "chest", "knee")[i % 3],) if i else () for i in range(10)]
    depth = 1 if modality == "xray" else 8
    return write_cache(here / "cache" / (folder or f"hospital_{modality}"), modality, labels,
                       shape=(1, 32, 32, depth))


def test_cross_modal_in_six_directions(here, command):
    for modality in ("ct", "mri", "xray"):
        write_hospital(here, modality)
    chest(here)  # a public data set, which takes no part
    command("--task", "cross_modal")
    rows = read_results("results/cross_modal.json")
    names = ["ct -> mri", "mri -> ct", "ct -> xray", "xray -> ct", "mri -> xray", "xray -> mri"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert (row["queries"], row["gallery"], row["chance"]["R@1"]) == (9, 9, pytest.approx(1 / 3))
    assert rows[2]["paper"][0][0] == 0.327


def test_a_copy_of_a_cache_adds_no_candidates(here, command):
    for modality in ("ct", "xray"):
        write_hospital(here, modality)
    shutil.copytree("cache/hospital_ct", "cache/copy")
    command("--task", "cross_modal")
    for row in read_results("results/cross_modal.json"):
        assert (row["queries"], row["gallery"]) == (9, 9)


@pytest.fixture
def demo(here):
    """A demo cache of three modalities, 12 samples each."""
    parts = [("part:head", "lesion:dense"), ("part:chest",), ("part:knee",)] * 4
    folders = [write_cache(here / f"cache/{modality}", modality, parts, "test")
               for modality in ("ct", "mri", "xray")]
    join_caches(here / "cache/demo", folders)
    return here


def test_the_demo_sets_all_runs_and_two_baselines_side_by_side(demo, command):
    table = read_table(command("--task", "demo"))
    rows = read_results("results/demo.json")
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["mae", "simdino", "random", "pixels"]
    assert [row["name"] for row in rows[:6]] == ["ct", "mri", "xray", "ct -> xray", "xray -> ct", "ct -> mri"]
    by_ct_mri = [by for name, by in table if name == "ct -> mri"]
    assert by_ct_mri == ["mae", "simdino", "random", "pixels", "chance"]
    assert table["ct", "pixels"]["seen"] == "0" and table["ct", "mae"]["seen"] == "?"


def test_phantoms_are_not_compared_with_the_paper(demo, command):
    printed = command("--task", "demo")
    assert "paper" not in printed
    assert not any(row["paper"] for row in read_results("results/demo.json"))


def test_a_figure_shows_a_query_and_its_top_three_of_each_modality(demo, command):
    command("--task", "demo", "--figure", "demo.png")
    with Image.open("demo.png") as image:
        assert 4 * 192 < image.size[0] < 5 * 192 and 3 * 192 < image.size[1] < 4 * 192 + 3 * 42


def test_a_figure_never_shows_the_query_as_its_own_answer(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)])
    write_npz("a.npz", angles(0, 40), "a", (0, 1))
    command("--embeddings", "a.npz", "--cache", "cache/a", "--figure", "a.png")
    with Image.open("a.png") as image:  # two queries, and the one other sample behind each
        assert 2 * 192 < image.size[0] < 3 * 192


def test_archives_of_ones_own_are_scored_by_themselves(here, command):
    write_cache(here / "cache/nih", "xray", [("AP",), ("PA",)] * 4)
    write_cache(here / "cache/busi", "ultrasound", [("benign",), ("malignant",), ()] * 3)
    chest(here)  # a public data set, which has a task of its own
    table = read_table(command("--task", "within", "--encoder", "pixels"))
    rows = {row["name"]: row for row in read_results("results/within.json")}
    assert [*rows] == ["busi ultrasound", "nih xray"]
    assert [rows[name]["queries"] for name in rows] == [6, 8]
    assert rows["nih xray"]["chance"]["R@1"] == pytest.approx(3 / 7)  # leave-one-out
    assert ("nih xray", "pixels") in table and not any("paper" in by for _, by in table)


def test_an_archive_of_two_modalities_has_a_row_for_each(here, command):
    folders = [write_cache(here / f"cache/{modality}", modality, [("x",), ("y",)] * 3)
               for modality in ("ct", "mri")]
    join_caches(here / "cache/hospital", folders)
    command("--task", "within", "--cache", "cache/hospital", "--encoder", "pixels")
    assert [row["name"] for row in read_results("results/within.json")] == ["hospital ct", "hospital mri"]


def test_two_archives_of_one_name_are_told_apart(here, command):
    write_cache(here / "a/scans", "ct", [("x",), ("y",)] * 3)
    write_cache(here / "b/scans", "ct", [("x",), ("y",)] * 2)
    command("--task", "within", "--cache", "a/scans", "b/scans", "--encoder", "pixels")
    rows = read_results("results/within.json")
    assert [(row["name"], row["queries"]) for row in rows] == [("a/scans ct", 6), ("b/scans ct", 4)]


def test_a_training_split_is_not_scored(here, command):
    write_cache(here / "cache/own", "ct", [("x",), ("y",)] * 3, split="train")
    with pytest.raises(UserError, match="outside training splits"):
        command("--task", "within", "--encoder", "pixels")


# ---- which encoder -----------------------------------------------------------------------------------------
def test_the_newest_run_is_taken_and_named(here, command):
    chest(here)
    printed = command("--task", "chestxray14")
    row, = read_results("results/chestxray14.json")
    assert "the newest run is taken: runs/mae/checkpoint.pt" in printed.splitlines()
    assert (row["model"], row["checkpoint"]) == ("mae", "runs/mae/checkpoint.pt")


def test_checkpoints_are_compared_in_one_table_by_the_names_of_their_runs(here, command):
    chest(here)
    write_run("saved.pt")
    printed = command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt",
                      "runs/mae/checkpoint.pt", "saved.pt")
    assert [by for _, by in read_table(printed)][:4] == ["simdino", "mae", "saved", "chance"]
    rows = read_results("results/chestxray14.json")
    assert [row["checkpoint"] for row in rows] == ["runs/simdino/checkpoint.pt", "runs/mae/checkpoint.pt",
                                                   "saved.pt"]


def test_two_runs_of_one_name_are_told_apart(here, command):
    chest(here)
    write_run("a/mae/checkpoint.pt")
    command("--task", "chestxray14", "--checkpoint", "runs/mae/checkpoint.pt", "a/mae/checkpoint.pt")
    models = [row["model"] for row in read_results("results/chestxray14.json")]
    assert models == ["mae (runs/mae/checkpoint.pt)", "mae (a/mae/checkpoint.pt)"]


@pytest.mark.parametrize("step, total, model", [(6, 17, "short, step 6 of 17"), (17, 17, "short")])
def test_a_run_that_is_not_finished_says_so(here, command, step, total, model):
    chest(here)
    write_run("runs/short/checkpoint.pt", age=2, step=step, total=total)
    printed = command("--task", "chestxray14")
    row, = read_results("results/chestxray14.json")
    assert row["model"] == model and ("chestxray14", model) in read_table(printed)


def test_an_untrained_encoder_is_called_random_not_after_the_run(here, command):
    chest(here)
    write_run("runs/short/checkpoint.pt", age=2, step=6, total=17)
    command("--task", "chestxray14", "--encoder", "random")
    assert read_results("results/chestxray14.json")[0]["model"] == "random"


def test_poolings_come_from_one_pass(here, command):
    chest(here)
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt",
            "--pool", "avg", "cls", "mix")
    rows = read_results("results/chestxray14.json")
    assert [(row["pool"], row["model"]) for row in rows] == [
        ("avg", "simdino avg"), ("cls", "simdino cls"), ("mix", "simdino mix")]
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 1


@pytest.mark.parametrize("run, paper", [("simdino", "mix"), ("mae", "avg")])
def test_the_grid_holds_the_papers_pooling_too(here, command, run, paper):
    """Beside --pool grid it comes from the same file, and its numbers are those of a run without the grid."""
    chest(here)
    checkpoint = f"runs/{run}/checkpoint.pt"
    command("--task", "chestxray14", "--checkpoint", checkpoint, "--out", "alone.json")
    command("--task", "chestxray14", "--checkpoint", checkpoint, "--pool", paper, "grid",
            "--out", "both.json")
    (alone,), (both, grid) = read_results("alone.json"), read_results("both.json")
    assert (alone["pool"], both["pool"], grid["pool"]) == (paper, paper, "grid")
    assert all(alone[key] == both[key] for key in ("R@1", "P@10", "MnR", "first_MnR"))


def test_a_grid_file_is_compared_by_centre_parts_and_what_is_taken_of_it_is_not(here, command, monkeypatch):
    """With a centre_parts that turns the gallery around, the right ones come last."""
    chest(here)
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt", "--pool", "grid")
    (file,) = Path("results/embeddings").glob("*.npz")
    monkeypatch.setattr(evaluate, "centre_parts", lambda queries, gallery, parts: (queries, -gallery))
    given = ["--embeddings", file, "--cache", "cache/chestxray14"]
    command(*given, "--out", "given.json")
    command(*given, "--pool", "mix", "--out", "mix.json")
    (given,), (mix,) = read_results("given.json"), read_results("mix.json")
    assert (given["pool"], mix["pool"]) == ("grid", "mix") and given["R@1"] < mix["R@1"]


@pytest.mark.parametrize("arguments, message", [
    (["--task", "chestxray14", "--encoder", "pixels", "--pool", "grid"], "no tokens for --pool grid"),
    (["--embeddings", "mix.npz", "--cache", "cache/chestxray14", "--pool", "grid"], "hold no grid")])
def test_other_embeddings_have_no_grid(here, command, arguments, message):
    chest(here)
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt")
    (file,) = Path("results/embeddings").glob("*.npz")
    file.rename("mix.npz")
    with pytest.raises(UserError, match=message):
        command(*arguments)


def test_mae_has_no_cls_token_to_pool(here, command):
    chest(here)
    with pytest.raises(UserError, match="CLS"):
        command("--task", "chestxray14", "--pool", "cls")


def signed(names):
    """Ids as a checkpoint keeps them: 64-bit numbers with a sign."""
    return torch.from_numpy(np.array([int(name, 16) for name in names], np.uint64).view(np.int64))


@pytest.mark.parametrize("encoder, known, seen", [
    ("m3ret", True, "2"), ("random", True, "0"), ("m3ret", False, "?")])
def test_queries_that_were_trained_on_are_counted(here, command, encoder, known, seen):
    chest(here)
    ids = signed(name_of("chestxray14", i) for i in (0, 3, 13))  # 13 is no query
    write_run("some.pt", ids=ids, ids_known=known)
    printed = command("--task", "chestxray14", "--checkpoint", "some.pt", "--encoder", encoder)
    assert next(iter(read_table(printed).values()))["seen"] == seen
    row, = read_results("results/chestxray14.json")
    assert row["seen_in_pretraining"] == (None if seen == "?" else int(seen))


def test_a_copy_of_a_sample_is_seen_too(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)] * 3)
    shutil.copytree("cache/a", "cache/b")
    write_run("some.pt", ids=signed([name_of("a", 0)]))
    command("--task", "within", "--cache", "cache/a", "cache/b", "--checkpoint", "some.pt")
    assert [row["seen_in_pretraining"] for row in read_results("results/within.json")] == [1, 1]


# ---- embeddings that are kept ------------------------------------------------------------------------------
def stored_files():
    return sorted(Path("results/embeddings").glob("*.npz"))


def test_what_is_embedded_is_not_embedded_again(here, command):
    chest(here)
    assert "0 kept, 12 embedded" in command("--task", "chestxray14")
    assert "12 kept, 0 embedded" in command("--task", "chestxray14")
    assert len(stored_files()) == 1


def test_another_checkpoint_has_a_file_of_its_own(here, command):
    chest(here)
    command("--task", "chestxray14")
    printed = command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt")
    assert "0 kept, 12 embedded" in printed and len(stored_files()) == 2


def test_a_checkpoint_that_was_replaced_is_embedded_anew(here, command):
    chest(here)
    command("--task", "chestxray14")
    write_run("runs/mae/checkpoint.pt", age=1, seed=7)
    assert "0 kept, 12 embedded" in command("--task", "chestxray14")


def test_a_sample_that_was_prepared_again_is_embedded_again(here, command):
    chest(here)
    command("--task", "chestxray14", "--encoder", "pixels")
    array = Path("cache/chestxray14", f"{name_of('chestxray14', 0)}.npy")
    np.save(array, 255 - np.load(array))  # samples.csv stays as it is
    assert "11 kept, 1 embedded" in command("--task", "chestxray14", "--encoder", "pixels")


def test_a_task_leaves_in_the_file_what_another_has_embedded(here, command):
    write_cache(here / "cache/own", "mri", [("head",), ("knee",)] * 30)
    table = Path("cache/own/samples.csv")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([line.replace(",,1x", ",train,1x") for line in lines[:31]] + lines[31:]))
    table.write_text(table.read_text().replace(",,1x", ",test,1x"))
    command("--task", "probe", "--cache", "cache/own", "--encoder", "pixels")  # all 60
    command("--task", "within", "--encoder", "pixels")  # the 30 of the test split
    assert "60 kept, 0 embedded" in command("--task", "probe", "--cache", "cache/own", "--encoder", "pixels")


def write_encoder(code):
    """own.py, whose build() returns an encoder; forgotten if it was imported before."""
    Path("own.py").write_text(code)
    sys.modules.pop("own", None)
    importlib.invalidate_caches()
    shutil.rmtree("__pycache__", ignore_errors=True)


def test_an_encoder_of_ones_own_is_embedded_again_when_its_code_changes(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)  # no checkpoint is here, and none is asked for
    chest(tmp_path)
    for code in ("x.float().flatten(1)", "x.float().flatten(1)[:, :1] * 0 + 1"):
        write_encoder(f"def build():\n    return lambda x: {code}\n")
        command("--task", "chestxray14", "--encoder", "own:build")
        row, = read_results("results/chestxray14.json")
        assert (row["checkpoint"], row["checkpoint_sha256"]) == ("", "")
        assert row["code_sha256"] == hashlib.sha256(Path("own.py").read_bytes()).hexdigest()
        assert row["seen_in_pretraining"] is None  # nobody knows what it was trained on
    assert len(stored_files()) == 2


def test_an_encoder_of_ones_own_is_embedded_again_when_its_weights_change(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    chest(tmp_path)
    write_encoder("import torch\ndef build():\n    w = torch.load('w.pt')\n"
                  "    return lambda x: x.float().flatten(1) * w\n")
    recalls = []
    for weights in (torch.ones(1024), torch.zeros(1024).index_fill_(0, torch.tensor([0]), 1.0)):
        torch.save(weights, "w.pt")
        command("--task", "chestxray14", "--encoder", "own:build", "--out", "r.json")
        recalls.append(read_results("r.json")[0]["R@1"])
    assert recalls[0] == 1 and recalls[1] < 1  # by one pixel, of stripes and noise, nothing is found


# ---- embeddings made by anyone -----------------------------------------------------------------------------
@pytest.fixture
def two_caches(here):
    """a.npz of cache/a and b.npz of cache/bb, in any order: z, y, xy."""
    write_cache(here / "cache/a", "ct", [("x",), ("x", "y"), ("y",), ()])
    write_cache(here / "cache/bb", "mri", [("x", "y"), ("y",), ("z",)])
    write_npz("a.npz", angles(0, 10, 80, 40), "a", range(4))
    write_npz("b.npz", angles(70, 30, 5), "bb", (2, 1, 0))
    return here


ACROSS = ["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "b.npz", "--gallery-cache", "cache/bb"]


def test_embeddings_made_by_anyone_search_a_gallery(two_caches, command):
    printed = command(*ACROSS, "--out", "r.json")
    row, = read_results("r.json")
    # By angle: 0 -> xy y z; 10 -> xy y z; 80 -> z y xy; 40 -> y z xy, which asks for nothing.
    assert (row["queries"], row["gallery"], row["without_relevant"]) == (4, 3, 1)
    assert (row["R@1"], row["R@5"], row["first_MnR"]) == (0.5, 0.75, pytest.approx((1 + 1 + 2) / 3))
    assert row["seen_in_pretraining"] is None and read_table(printed)["embeddings", "a"]["seen"] == "?"


def test_embeddings_made_by_anyone_can_ask_for_all_labels(two_caches, command):
    command(*ACROSS, "--relevance", "all", "--out", "r.json")
    row, = read_results("r.json")
    # x and xy find xy at once; y finds y second; the first of the whole gallery is wrong for it.
    assert (row["R@1"], row["R@5"], row["relevance"]) == (0.5, 0.75, "all")


def test_nothing_finds_itself_however_it_is_asked(two_caches, command):
    command("--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "a.npz", "--out", "within.json")
    command("--embeddings", "a.npz", "--cache", "cache/a", "--out", "alone.json")
    within, = read_results("within.json")
    alone, = read_results("alone.json")
    assert within == alone and within["chance"]["R@1"] < 1


def test_a_copied_cache_as_gallery_gives_the_leave_one_out_figure(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)] * 20)
    shutil.copytree("cache/a", "cache/copy")
    write_npz("a.npz", np.random.default_rng(0).standard_normal((40, 8)), "a", range(40))
    alone = ["--embeddings", "a.npz", "--cache", "cache/a"]
    command(*alone, "--out", "alone.json")
    command(*alone, "--gallery", "a.npz", "--gallery-cache", "cache/copy", "--out", "copy.json")
    assert read_results("copy.json") == read_results("alone.json")
    assert read_results("copy.json")[0]["R@1"] < 1


def test_a_gallery_of_the_same_samples_keeps_its_own_vectors(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",), ("x",)])
    write_npz("q.npz", angles(0, 90, 10), "a", range(3))
    write_npz("g.npz", angles(90, 5, 0), "a", range(3))
    command("--embeddings", "q.npz", "--cache", "cache/a", "--gallery", "g.npz", "--out", "r.json")
    # The gallery holds x at 90, y at 5, x at 0, and none is found by itself: x at 0 finds x at 0, y at 90
    # finds x at 90, x at 10 finds y at 5. Among their own vectors both x would find each other.
    assert read_results("r.json")[0]["R@1"] == pytest.approx(1 / 3)


# ---- probe, as a command -----------------------------------------------------------------------------------
@pytest.mark.parametrize("modality, compared", [("mri", True), ("ct", False)])
def test_probe_of_body_parts_names_their_modality(here, command, modality, compared):
    write_cache(here / "cache/hospital", modality, [(("head", "chest", "knee")[i % 3],) for i in range(45)])
    table = read_table(command("--task", "probe", "--cache", "cache/hospital"))
    row, = read_results("results/probe.json")
    assert (row["train"], row["queries"], row["name"]) == (36, 9, f"{modality} parts")
    assert row["F1"] == row["accuracy"] == row["AUROC"] == 1  # a label follows from the stripes' direction
    assert ((f"{modality} parts", "paper: MAE") in table) == compared  # Table 7 has MRI alone
    assert list(table[f"{modality} parts", "mae"]) == [*evaluate.PROBE_METRICS, "queries", "seen"]


def test_probe_of_several_modalities_is_not_compared_with_one(here, command):
    for modality in ("mri", "ct"):
        write_cache(here / f"cache/{modality}s", modality, [(("head", "chest")[i % 2],) for i in range(30)])
    command("--task", "probe", "--cache", "cache/mris", "cache/cts", "--encoder", "pixels")
    row, = read_results("results/probe.json")
    assert (row["name"], row["paper"]) == ("mixed parts", None)


def test_probe_of_findings_takes_the_split_of_the_table(here, command):
    labels = [(f"finding:{('Mass', 'Edema')[i % 2]}",) for i in range(20)]
    write_cache(here / "cache/ct_rate", "ct", labels, "train")
    table = Path("cache/ct_rate/samples.csv")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:13] + [line.replace("train", "test") for line in lines[13:]]))
    command("--task", "probe")
    row, = read_results("results/probe.json")
    assert (row["train"], row["queries"], row["name"], row["F1"]) == (12, 8, "2 ct findings", 1)


def test_probe_compares_checkpoints(here, command):
    write_cache(here / "cache/hospital", "mri", [(("head", "chest")[i % 2],) for i in range(50)])
    command("--task", "probe", "--cache", "cache/hospital", "--checkpoint", "runs/mae/checkpoint.pt",
            "runs/simdino/checkpoint.pt")
    assert [row["model"] for row in read_results("results/probe.json")] == ["mae", "simdino"]


def test_probe_never_tests_on_a_copy_of_a_training_sample(here, command):
    write_cache(here / "cache/hospital", "mri", [(("head", "chest")[i % 2],) for i in range(50)])
    shutil.copytree("cache/hospital", "cache/copy")
    command("--task", "probe", "--cache", "cache/hospital", "cache/copy")
    row, = read_results("results/probe.json")
    assert row["train"] + row["queries"] == 50


# ---- results files -----------------------------------------------------------------------------------------
def test_results_of_another_run_are_kept(here, command):
    chest(here)
    command("--task", "chestxray14", "--encoder", "pixels")
    earlier = Path("results/chestxray14.json").read_text()
    printed = command("--task", "chestxray14")
    assert "results/chestxray14.1.json" in printed
    assert Path("results/chestxray14.1.json").read_text() == earlier
    command("--task", "chestxray14", "--exclude-same", "patient")
    assert read_results("results/chestxray14.2.json")[0]["exclude_same"] == ""


def test_the_same_results_are_not_kept_twice(here, command):
    chest(here)
    for _ in range(2):
        printed = command("--task", "chestxray14", "--encoder", "pixels")
    assert "kept:" not in printed and not Path("results/chestxray14.1.json").exists()


def test_scaling_finds_the_exponent_of_a_power_law(here, command):
    for i, size in enumerate((5e6, 2e7, 9e7)):
        flags = json.dumps({"data_fraction": [0.2, 0.6, 1.0][i]})
        row = {"name": "t", "parameters": size, "flags": flags, "R@5": 0.02 * size**0.2}
        Path(f"{i}.json").write_text(json.dumps({"rows": [row]} if i else row))  # one row or many
    printed = command("--scaling", "0.json", "1.json", "2.json")
    assert f"t: log R@5 = 0.2000 log parameters {math.log(0.02):+.4f}" in printed
    slope = math.log((9e7 / 2e7) ** 0.2) / math.log(1 / 0.6)
    printed = command("--scaling", "1.json", "2.json", "--against", "data_fraction")
    assert f"= {slope:.4f} log data_fraction" in printed
    with pytest.raises(UserError, match="two or more"):
        command("--scaling", "0.json", "0.json")


def test_scaling_fits_every_result_of_a_size(here, command):
    points = [(1e6, 0.2), (1e6, 0.3), (1e8, 0.4)]  # two seeds of the first
    rows = [{"name": "t", "parameters": size, "R@5": recall} for size, recall in points]
    Path("r.json").write_text(json.dumps({"rows": rows}))
    slope = np.log(0.4 / np.sqrt(0.2 * 0.3)) / np.log(1e8 / 1e6)
    assert f"log R@5 = {slope:.4f}" in command("--scaling", "r.json")


# ---- errors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, names", [
    (["--task", "chestxray14"], "cache/chestxray14"), (["--task", "cross_modal"], "--labels"),
    (["--task", "cross_modal", "--cache", "cache/a"], "2 ct"),
    (["--task", "probe", "--cache", "cache/many", "--checkpoint", "no.pt"], "no.pt"),
    (["--task", "probe", "--cache", "cache/many", "--checkpoint", "a.npz"], "a.npz"),
    (["--task", "fetal_planes", "--cache", "cache/none"], "fetal_planes: no sample"),
    (["--task", "cross_modal", "--cache", "cache/none"], "body part"),
    (["--task", "within", "--cache", "cache/none"], "within: no sample .* label"),
    (["--embeddings", "strange.npz", "--cache", "cache/a"], "strange.npz .* not in cache/a"),
    (["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "wide.npz"], "wide.npz"),
    (["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "empty.npz"], "empty.npz"),
    (["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "other.npz"],
     "other.npz is of another encoder"),
    (["--embeddings", "none.npz", "--cache", "cache/none"], "cache/none: no sample has a label"),
    (["--embeddings", "a.npz", "--cache", "nowhere"], "nowhere"),
    (["--embeddings", "a.npz", "--cache", "cache/a", "--pool", "cls"], "CLS"),
    (["--scaling", "a.npz"], "a.npz"), (["--task", "probe", "--cache", "cache/a"], "too few")])
def test_what_a_user_gets_wrong_is_named(here, command, arguments, names):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)])
    write_cache(here / "cache/none", "ct", [(), ()])
    write_cache(here / "cache/many", "ct", [("x",), ("y",)] * 20)
    write_npz("a.npz", np.ones((2, 2)), "a", (0, 1))
    write_npz("other.npz", np.ones((2, 2)), "a", (0, 1), encoder="x")
    write_npz("wide.npz", np.ones((2, 3)), "a", (0, 1))
    write_npz("none.npz", np.ones((2, 2)), "none", (0, 1))
    write_npz("strange.npz", np.ones((2, 2)), "a", (0, 7))
    write_npz("empty.npz", np.ones((0, 2)), "a", ())
    with pytest.raises((UserError, OSError), match=names):
        command(*arguments)


def test_without_a_checkpoint_it_says_so(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    chest(tmp_path)
    with pytest.raises(UserError, match="train first"):
        command("--task", "chestxray14")
    assert "R@1" in command("--task", "chestxray14", "--encoder", "pixels")


@pytest.mark.parametrize("arguments, words", [
    ([], "one of"), (["--task", "nonsense"], "chestxray14"), (["--task", "demo", "--scaling", "a"], "one of"),
    (["--embeddings", "a.npz"], "--cache"),
    (["--embeddings", "a.npz", "--cache", "a", "--checkpoint", "b.pt"], "--checkpoint"),
    (["--task", "demo", "--gallery", "a.npz"], "--gallery"),
    (["--task", "demo", "--relevance", "all"], "go with --embeddings"),
    (["--embeddings", "a.npz", "--cache", "a", "--gallery-cache", "b"], "--gallery-cache"),
    (["--task", "probe", "--pool", "avg", "cls"], "one --pool"),
    (["--task", "probe", "--figure", "a"], "--figure"),
    (["--scaling", "a.json", "--out", "b"], "--scaling"),
    (["--task", "demo", "--against", "data_fraction"], "--against")])
def test_wrong_usage_says_which_flag_is_wrong(command, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        command(*arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_torchrun_is_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        command("--task", "demo")


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--task", "hyper_kvasir"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
