"""evaluate.py against hand-worked tables, naive float64 loops, exhaustive enumeration, scikit-learn and the paper itself."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from embed import write_embeddings
from model import ViT, save_checkpoint
from prepare import UserError

ROOT = Path(__file__).parents[1]


def angles(*degrees):
    """Unit vectors in the plane: the cosine between two is that of the angle between them."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- metrics
def test_four_queries_and_eight_candidates_by_hand():
    gallery = angles(0, 10, 20, 30, 40, 50, 60, 70)
    offered = [("a",), ("b",), ("a", "b"), ("c",), ("b",), ("a",), (), ("c",)]
    queries = angles(-1, 71, 31, 5.001)
    asked = [("b",), ("a", "b"), ("d",), ("a", "c")]
    # Lists by angle. Query -1: 0 10 20 30 40 50 60 70 degrees, of which 10, 20 and 40 carry b: ranks 2, 3, 5.
    # Query 71: 70 60 50 40 30 20 10 0; those with a or b: 50 40 20 10 0 are ranks 3 4 6 7 8; with both: 20 alone, rank 6.
    # Query 31 asks for d, which nothing has. Query 5.001: 10 0 20 30 40 50 60 70; a or c: ranks 2 3 4 6 8; both: none.
    found = evaluate.measure(queries, gallery, asked, offered)
    assert found["R@1"].tolist() == [False, False, False, False]
    assert found["R@5"].tolist() == [True, True, False, True]
    assert found["R@10"].tolist() == [True, True, False, True]
    assert found["MnR"] == pytest.approx([10 / 3, 28 / 5, 11, 23 / 5])
    assert found["MdR"] == pytest.approx([3, 6, 11, 4])
    assert found["first"].tolist() == [2, 3, 9, 2]  # nothing found: one place behind the 8 candidates
    assert found["relevant"].tolist() == [3, 5, 0, 5]
    found = evaluate.measure(queries, gallery, asked, offered, relevance="all")
    assert found["first"].tolist() == [2, 6, 9, 9]
    assert found["MnR"] == pytest.approx([10 / 3, 6, 11, 11])
    row = evaluate.summarise(found)
    assert (row["queries"], row["without_relevant"], row["R@5"], row["R@10"]) == (4, 2, 0.25, 0.5)
    assert row["chance"]["R@1"] == pytest.approx((3 / 8 + 1 / 8) / 4)


def naive(queries, gallery, asked, offered, same, relevance):
    """The definition, one query at a time, in Python floats."""
    def unit(v):
        length = math.sqrt(math.fsum(float(x) ** 2 for x in v))
        return [float(x) / length if length else 0.0 for x in v]
    queries, gallery = [unit(v) for v in queries], [unit(v) for v in gallery]
    result = []
    for i, q in enumerate(queries):
        candidates = [j for j in range(len(gallery))
                      if not any(qs[i] == gs[j] and qs[i] != "" for qs, gs in same)]
        scores = {j: math.fsum(a * b for a, b in zip(q, gallery[j])) for j in candidates}
        ranked = sorted(candidates, key=lambda j: (-scores[j], j))
        wanted = set(asked[i])
        right = [bool(wanted) and (wanted <= set(offered[j]) if relevance == "all" else bool(wanted & set(offered[j])))
                 for j in ranked]
        ranks = [place for place, good in enumerate(right, start=1) if good]
        top = [rank for rank in ranks if rank <= 10]
        result.append({"R@1": any(right[:1]), "R@5": any(right[:5]), "R@10": any(right[:10]),
                       "MnR": np.mean(top) if top else 11, "MdR": np.median(top) if top else 11,
                       "first": ranks[0] if ranks else len(candidates) + 1,
                       "relevant": len(ranks), "candidates": len(candidates)})
    return {key: np.array([row[key] for row in result], dtype=float) for key in result[0]}


def draw(generator, n, labels="abcdef", most=3):
    return [tuple(generator.choice(list(labels), generator.integers(0, most + 1), replace=False)) for _ in range(n)]


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("relevance", ["any", "all"])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "ties", "few"])
def test_measure_equals_naive_loops(kind, exclude, relevance, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    generator = np.random.default_rng(len(kind) + 10 * exclude)
    n, m = (9, 5) if kind == "few" else (60, 40)  # few: the list is shorter than 10
    x = generator.standard_normal((n, 8)).astype(np.float32)
    y = generator.standard_normal((m, 8)).astype(np.float32)
    if kind == "ties":  # few directions, so most scores are shared by several candidates, and some vectors are zero
        x = np.eye(8, dtype=np.float32)[generator.integers(0, 8, n)] * generator.integers(0, 3, (n, 1))
        y = np.eye(8, dtype=np.float32)[generator.integers(0, 8, m)] + np.eye(8, dtype=np.float32)[0]
    x_labels, y_labels = draw(generator, n), draw(generator, m)
    patients = [generator.choice(["", "p", "q", "r", "s"], size) for size in (n, m)]
    for queries, asked, ids, patient in ((x, x_labels, [f"x{i}" for i in range(n)], patients[0]),  # leave-one-out
                                         (y, y_labels, [f"y{i}" for i in range(m)], patients[1])):  # another gallery
        same = [(ids, [f"x{i}" for i in range(n)])] + [(patient, patients[0])] * exclude
        found = evaluate.measure(queries, x, asked, x_labels, same, relevance)
        for key, expected in naive(queries, x, asked, x_labels, same, relevance).items():
            np.testing.assert_allclose(found[key].astype(float), expected, rtol=0, atol=1e-12, err_msg=key)


def test_float32_of_large_sets_agrees_with_float64(monkeypatch):
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((300, 64)).astype(np.float32), draw(generator, 300)
    exact = evaluate.measure(x, x, labels, labels)
    monkeypatch.setattr(evaluate, "EXACT_WORK", 0)
    fast = evaluate.measure(x, x, labels, labels)
    assert all(np.array_equal(exact[key], fast[key]) for key in ("R@1", "R@5", "R@10", "relevant"))
    np.testing.assert_allclose(exact["first"], fast["first"], atol=1)


def test_a_query_never_finds_itself_but_finds_its_copy():
    x = angles(0, 0, 90)  # the second is a copy of the first under its own id
    found = evaluate.measure(x, x, [("a",), ("a",), ("b",)], [("a",), ("a",), ("b",)], [(["1", "2", "3"], ["1", "2", "3"])])
    assert found["first"].tolist() == [1, 1, 3] and found["candidates"].tolist() == [2, 2, 2]


def test_an_unknown_patient_excludes_nobody():
    x = angles(0, 1, 2)
    found = evaluate.measure(x, x, [("a",)] * 3, [("a",)] * 3, [(["1", "2", "3"], ["1", "2", "3"]), (["", "", "p"], ["", "", "p"])])
    assert found["candidates"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("candidates, relevant", [(6, 0), (6, 1), (6, 3), (6, 6), (2, 1), (0, 0)])
def test_chance_is_the_share_of_all_draws(candidates, relevant):
    for k in (1, 2, 5, 10):
        draws = list(itertools.combinations(range(candidates), min(k, candidates)))
        share = sum(any(item < relevant for item in d) for d in draws) / len(draws)
        assert evaluate.chance_of_hit(np.array([relevant]), np.array([candidates]), k)[0] == pytest.approx(share)


def test_random_embeddings_score_at_chance():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((1500, 16)).astype(np.float32)
    labels = [(str(i),) for i in generator.integers(0, 8, 1500)]
    ids = [str(i) for i in range(1500)]
    row = evaluate.summarise(evaluate.measure(x, x, labels, labels, [(ids, ids)]))
    for k in ("R@1", "R@5", "R@10"):
        assert row["ci95"][k][0] <= row[k] <= row["ci95"][k][1]
        assert row[k] == pytest.approx(row["chance"][k], abs=0.05)


def test_the_papers_rows_fit_our_reading_of_its_ranks():
    """MnR = 11 for the 1 - R@10 queries without hits, and 1 to 10 for the others; a first-hit rank cannot explain the rows."""
    names = [line.partition("|")[0].strip() for line in evaluate.PAPER.split("\n")[1:13]]
    rows = [row for name in names for row in evaluate.paper_rows(name).values()]
    assert len(rows) == 36
    impossible = 0
    for row in rows:
        r1, r5, r10 = row["R@1"], row["R@5"], row["R@10"]
        for rank in ("MnR", "MdR"):
            among_hits = (row[rank] - 11 * (1 - r10)) / r10
            assert 4.4 < among_hits < 6.2, (row, among_hits)  # 5.5 where hits are spread evenly over the list
        first_low = r1 + 2 * (r5 - r1) + 6 * (r10 - r5) + 11 * (1 - r10)
        first_high = r1 + 5 * (r5 - r1) + 10 * (r10 - r5) + 11 * (1 - r10)
        impossible += not first_low - 0.01 <= row["MnR"] <= first_high + 0.01
    assert impossible >= 20, impossible
