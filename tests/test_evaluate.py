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
from model import ViT, save_checkpoint
from prepare import UserError

ROOT = Path(__file__).parents[1]


def angles(*degrees):
    """Unit vectors in the plane: the cosine between two is that of the angle between them."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- metrics
def test_four_queries_and_eight_candidates_by_hand():
    gallery = angles(0, 10, 20, 30, 40, 50, 60, 70)
    offered = [("a",), ("b",), ("a", "b"), ("c",), ("b",), ("a",), (), ("c",)]
    queries = angles(-1, 71, 31, 5.001)
    asked = [("b",), ("a", "b"), ("d",), ("a", "c")]
    # Lists by angle. Query -1: 0 10 20 30 40 50 60 70 degrees, of which 10, 20 and 40 carry b: ranks 2, 3, 5.
    # Query 71: 70 60 50 40 30 20 10 0; with a or b: 50 40 20 10 0, ranks 3 4 6 7 8; both: 20 alone, rank 6.
    # Query 31 asks for d, which nothing has.
    # Query 5.001: 10 0 20 30 40 50 60 70; with a or c: ranks 2 3 4 6 8; with both: none.
    found = evaluate.evaluate_retrieval(queries, gallery, asked, offered)
    assert found["R@1"].tolist() == [False, False, False, False]
    assert found["R@5"].tolist() == [True, True, False, True]
    assert found["R@10"].tolist() == [True, True, False, True]
    assert found["MnR"] == pytest.approx([10 / 3, 28 / 5, 11, 23 / 5])
    assert found["MdR"] == pytest.approx([3, 6, 11, 4])
    assert found["first"].tolist() == [2, 3, 9, 2]  # nothing found: one place behind the 8 candidates
    assert found["relevant"].tolist() == [3, 5, 0, 5]
    assert found["P@10"].tolist() == [3 / 8, 5 / 8, 0, 5 / 8]  # of a list of all eight
    found = evaluate.evaluate_retrieval(queries, gallery, asked, offered, relevance="all")
    assert found["first"].tolist() == [2, 6, 9, 9]
    assert found["MnR"] == pytest.approx([10 / 3, 6, 11, 11])
    row = evaluate.summarise(found)
    assert (row["queries"], row["without_relevant"], row["R@5"], row["R@10"]) == (4, 2, 0.25, 0.5)
    assert (row["first_MnR"], row["first_MdR"]) == (4, 4)  # of the two that have an answer: ranks 2 and 6
    assert row["chance"]["R@1"] == pytest.approx((3 / 8 + 1 / 8) / 4)
    nothing = evaluate.summarise(evaluate.evaluate_retrieval(queries[2:3], gallery, asked[2:3], offered))
    assert nothing["first_MnR"] is None and nothing["R@10"] == 0 and nothing["MnR"] == 11


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
        shared = [wanted & set(offered[j]) for j in ranked]
        right = [bool(found) and (found == wanted or relevance == "any") for found in shared]
        ranks = [place for place, good in enumerate(right, start=1) if good]
        top = [rank for rank in ranks if rank <= 10]
        result.append({"R@1": any(right[:1]), "R@5": any(right[:5]), "R@10": any(right[:10]),
                       "P@10": sum(right[:10]) / min(10, len(gallery)),
                       "MnR": np.mean(top) if top else 11, "MdR": np.median(top) if top else 11,
                       "first": ranks[0] if ranks else len(candidates) + 1,
                       "relevant": len(ranks), "candidates": len(candidates)})
    return {key: np.array([row[key] for row in result], dtype=float) for key in result[0]}


def draw(generator, n, labels="abcdef", most=3):
    return [tuple(generator.choice(list(labels), generator.integers(0, most + 1),
                                   replace=False)) for _ in range(n)]


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("relevance", ["any", "all"])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "few"])
def test_measure_equals_naive_loops(kind, exclude, relevance, block, monkeypatch):
    monkeypatch.setattr(evaluate, "QUERY_BLOCK", block)
    generator = np.random.default_rng(len(kind) + 10 * exclude)
    n, m = (9, 5) if kind == "few" else (60, 40)  # few: the list is shorter than 10
    x = generator.standard_normal((n, 8)).astype(np.float32)
    y = generator.standard_normal((m, 8)).astype(np.float32)
    x_labels, y_labels = draw(generator, n), draw(generator, m)
    patients = [generator.choice(["", "p", "q", "r", "s"], size) for size in (n, m)]
    for queries, asked, ids, patient in ((x, x_labels, [f"x{i}" for i in range(n)], patients[0]),
                                         # leave-one-out
                                         (y, y_labels, [f"y{i}" for i in range(m)],
                                          patients[1])):  # another gallery
        same = [(ids, [f"x{i}" for i in range(n)])] + [(patient, patients[0])] * exclude
        found = evaluate.evaluate_retrieval(queries, x, asked, x_labels, same, relevance)
        for key, expected in naive(queries, x, asked, x_labels, same, relevance).items():
            np.testing.assert_allclose(found[key].astype(float), expected, rtol=0, atol=1e-12, err_msg=key)


def test_candidates_that_lie_close_together_are_told_apart():
    """A collapsed encoder: all cosines are 1 within float32; their order is still that of the angles."""
    generator = np.random.default_rng(0)
    small = generator.standard_normal((60, 8))
    x = 1e4 * np.eye(8)[:1] + small * [0, *[1] * 7]  # (60, 8) one direction, and small steps to its sides
    labels = [(str(i // 2),) for i in range(60)]
    ids = [str(i) for i in range(60)]
    found = evaluate.evaluate_retrieval(x, x, labels, labels, [(ids, ids)])
    expected = naive(x, x, labels, labels, [(ids, ids)], "any")
    q = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.float32(q @ q.T).min() > 1 - 1e-6
    assert (found["first"] == expected["first"]).mean() > 0.95


def test_a_query_never_finds_itself_but_finds_its_copy():
    x, labels, ids = angles(0, 0, 90), [("a",), ("a",), ("b",)], ["1", "2",
                                                                  "3"]  # the second is a copy of the first
    found = evaluate.evaluate_retrieval(x, x, labels, labels, [(ids, ids)])
    assert found["first"].tolist() == [1, 1, 3] and found["candidates"].tolist() == [2, 2, 2]


def test_an_unknown_patient_excludes_nobody():
    x, labels, ids, patients = angles(0, 1, 2), [("a",)] * 3, ["1", "2", "3"], ["", "", "p"]
    found = evaluate.evaluate_retrieval(x, x, labels, labels, [(ids, ids), (patients, patients)])
    assert found["candidates"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("candidates, relevant", [(6, 0), (6, 1), (6, 3), (6, 6), (2, 1), (0, 0)])
def test_chance_is_the_share_of_all_draws(candidates, relevant):
    for k in (1, 2, 5, 10):
        draws = list(itertools.combinations(range(candidates), min(k, candidates)))
        share = sum(any(item < relevant for item in d) for d in draws) / len(draws)
        assert evaluate.chance_of_hit(np.array([relevant]), np.array([candidates]),
                                      k)[0] == pytest.approx(share)


def test_random_embeddings_score_at_chance():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((1500, 16)).astype(np.float32)
    labels = [(str(i),) for i in generator.integers(0, 8, 1500)]
    ids = [str(i) for i in range(1500)]
    row = evaluate.summarise(evaluate.evaluate_retrieval(x, x, labels, labels, [(ids, ids)]))
    for k in ("R@1", "R@5", "R@10"):
        assert row["ci95"][k][0] <= row[k] <= row["ci95"][k][1]
        assert row[k] == pytest.approx(row["chance"][k], abs=0.05)


def test_the_papers_rows_fit_our_reading_of_its_ranks():
    """11 for the 1 - R@10 queries without hits, about 5.5 for the others; first-hit ranks contradict them."""
    rows = [dict(zip(evaluate.METRICS,
                     row)) for rows in evaluate.PAPER.values() for row in rows if len(row) == 5]
    assert len(rows) == 24
    impossible = 0
    for row in rows:
        r1, r5, r10 = row["R@1"], row["R@5"], row["R@10"]
        for rank in ("MnR", "MdR"):
            among_hits = (row[rank] - 11 * (1 - r10)) / r10
            assert 4.4 < among_hits < 6.2, (row, among_hits)  # 5.5 where hits are spread evenly over the list
        first_low = r1 + 2 * (r5 - r1) + 6 * (r10 - r5) + 11 * (1 - r10)
        first_high = r1 + 5 * (r5 - r1) + 10 * (r10 - r5) + 11 * (1 - r10)
        impossible += not first_low - 0.01 <= row["MnR"] <= first_high + 0.01
    assert impossible >= 12, impossible


# ------------------------------------------------------------------------------------------------------ probe
@pytest.mark.parametrize("multi", [True, False])
def test_probe_metrics_are_those_of_scikit_learn(multi):
    sk = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.ones(4), 90).round(1)  # rounded, so that there are ties
    classes = generator.integers(0, 4, 90)
    truth = generator.random((90, 4)) < 0.3 if multi else np.eye(4, dtype=bool)[classes]
    chances[:, 3] = 0  # never called
    ours = evaluate.probe_metrics(chances, truth, multi)
    called = chances > 0.5 if multi else np.eye(4, dtype=bool)[chances.argmax(axis=1)]
    assert ours["F1"] == pytest.approx(sk.f1_score(truth, called, average="macro", zero_division=0))
    assert ours["precision"] == pytest.approx(sk.precision_score(truth, called, average="macro",
                                                                 zero_division=0))
    areas = [sk.roc_auc_score(truth[:, j], chances[:, j]) for j in range(4)]
    assert ours["AUROC"] == pytest.approx(np.mean(areas))
    accuracy = [sk.accuracy_score(truth[:, j], called[:, j]) for j in range(4)]
    expected = np.mean(accuracy) if multi else sk.accuracy_score(classes, called.argmax(axis=1))
    assert ours["accuracy"] == pytest.approx(expected)


def test_a_label_nobody_carries_is_left_out_of_auroc():
    truth = np.array([[True, False], [False, False], [True, False]])
    assert evaluate.probe_metrics(np.array([[0.9, 0.1], [0.2, 0.2], [0.6, 0.3]]), truth, True)["AUROC"] == 1


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
    rows, classes = [{"split": ""}] * 30, ["a"] * 20 + ["b"] * 10
    train, test = evaluate.split_probe(rows, classes)
    assert sorted([*train, *test]) == list(range(30)) and [(test < 20).sum(), (test >= 20).sum()] == [4, 2]
    rows = [{"split": "train"}] * 3 + [{"split": "test"}]
    train, test = evaluate.split_probe(rows, list("abcd"))
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [3])


# --------------------------------------------------------------------------------------------- whole commands
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


def write_npz(path, embeddings, cache, numbers, **meta):
    """Embeddings made by anyone, of these samples of a cache."""
    names = [name_of(cache, i) for i in numbers]
    np.savez(path, embeddings=np.float32(embeddings), ids=names, meta=json.dumps(meta))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with an untrained SimDINO-like and MAE-like checkpoint, the second one newer."""
    monkeypatch.chdir(tmp_path)
    for age, (name, cls) in enumerate([("simdino", True), ("mae", False)]):
        torch.manual_seed(age)
        path = Path("runs", name, "checkpoint.pt")
        path.parent.mkdir(parents=True)
        save_checkpoint(path, ViT("vit_t", cls_token=cls),
                        flags=json.dumps({"data_fraction": 0.2 + 0.4 * age}), step=1)
        os.utime(path, (1e9 + age, 1e9 + age))
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Call evaluate.main as the command line does; returns what it printed."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out
    return call


def chest(here, n=12):
    """12 test images with one finding, 3 that do not take part, and 2 training images."""
    labels = [(("Mass", "Edema", "Hernia")[i % 3],) for i in range(n)] + [(), ("Mass", "Edema"), ()]
    write_cache(here / "cache/chestxray14", "xray", labels, "test", [f"p{i // 2}" for i in range(n + 3)])
    with open(here / "cache/chestxray14/samples.csv", "a") as file:
        file.write("0123456789abcdef,xray,Mass,p0,train,1x32x32x1\n")


KEYS = {"task", "queries", "gallery", "without_relevant", "R@1", "R@5", "R@10", "MnR", "MdR", "first_MnR",
        "first_MdR",
        "chance", "ci95", "paper", "checkpoint", "pool", "exclude_same", "seen_in_pretraining"}


def test_a_task_with_no_other_flag(here, command):
    chest(here)
    printed = command("--task", "chestxray14")
    assert "found 12 samples, paper 7,992" in printed and "| 12      | ?    |" in printed
    row = json.loads(Path("results/chestxray14.json").read_text())
    assert KEYS | {"checkpoint_sha256"} <= row.keys() and row["seen_in_pretraining"] is None
    assert (row["queries"], row["gallery"], row["pool"], row["checkpoint"]) == (12, 12, "avg",
                                                                                "runs/mae/checkpoint.pt")
    assert row["chance"]["R@1"] == pytest.approx(3 / 11) and row["paper"][1][0] == 0.345
    assert row["R@1"] == 1  # stripes of one direction are nearest to each other, for an untrained encoder too
    assert all(f"{row[key]:.3f}" in printed for key in ("R@1", "MnR", "MdR", "P@10"))
    apart = command("--task", "chestxray14", "--exclude-same", "patient", "--out", "apart.json")
    assert "| chestxray14 " in apart and "paper: SimDINO" in apart
    chance = json.loads(Path("apart.json").read_text())["chance"]
    assert chance["R@1"] == pytest.approx(3 / 10)  # a patient has 2 kinds


def test_from_the_public_layout_to_the_table(here, command, monkeypatch):
    """NIH files -> prepare -> evaluate: test images with one finding take part, each finds its like."""
    source, generator = here / "CXR8", np.random.default_rng(0)
    (source / "images").mkdir(parents=True)
    lines, names = ["Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height]"], []
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
    row = json.loads(Path("results/chestxray14.json").read_text())
    assert (row["queries"], row["R@1"], row["chance"]["R@1"], row["MnR"]) == (4, 1, pytest.approx(1 / 3), 1)


def test_embeddings_are_kept_but_never_stale(here, command):
    chest(here)
    kept = Path("results/embeddings")
    command("--task", "chestxray14")
    (first,) = kept.glob("*.npz")
    stamp = first.stat().st_mtime_ns
    command("--task", "chestxray14")
    assert [path.stat().st_mtime_ns for path in kept.glob("*.npz")] == [stamp]
    command("--task", "chestxray14", "--checkpoint",
            "runs/simdino/checkpoint.pt")  # another checkpoint, another file
    assert len(list(kept.glob("*.npz"))) == 2 and first.stat().st_mtime_ns == stamp
    os.utime("cache/chestxray14/samples.csv")  # prepare.py was run again
    command("--task", "chestxray14")
    assert len(list(kept.glob("*.npz"))) == 2 and first.stat().st_mtime_ns > stamp


def test_an_encoder_of_ones_own_is_embedded_again_when_its_code_changes(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)  # no checkpoint is here, and none is asked for
    chest(tmp_path)
    for i, code in enumerate(["x.float().flatten(1)", "x.float().flatten(1)[:, :1] * 0 + 1"]):
        Path(f"own{i}.py").write_text(f"def build():\n    return lambda x: {code}\n")
    for i in range(2):
        Path("own.py").write_bytes(Path(f"own{i}.py").read_bytes())
        sys.modules.pop("own", None)
        importlib.invalidate_caches()
        shutil.rmtree("__pycache__", ignore_errors=True)
        command("--task", "chestxray14", "--encoder", "own:build")
        row = json.loads(Path("results/chestxray14.json").read_text())
        assert (row["checkpoint"], row["checkpoint_sha256"]) == ("", "")
        assert row["code_sha256"] == hashlib.sha256(Path("own.py").read_bytes()).hexdigest()
        assert row["seen_in_pretraining"] is None  # nobody knows what it was trained on
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 2


def test_queries_that_were_trained_on_are_counted(here, command):
    chest(here)
    trained = np.array([int(name_of("chestxray14", i), 16) for i in (0, 3, 13)], np.uint64).view(np.int64)
    save_checkpoint("some.pt", ViT("vit_t"), flags="{}", step=1,
                    ids=torch.from_numpy(trained))  # 13 is no query
    for encoder, number in (("m3ret", 2), ("random", 0)):
        printed = command("--task", "chestxray14", "--checkpoint", "some.pt", "--encoder", encoder)
        assert f"| 12      | {number}    |" in printed
        assert json.loads(Path("results/chestxray14.json").read_text())["seen_in_pretraining"] == number
    Path("kept.npz").write_bytes(next(Path("results/embeddings").glob("*.npz")).read_bytes())
    assert "| 12      | 0    |" in command("--embeddings", "kept.npz", "--cache", "cache/chestxray14")


def test_regional_tasks_count_their_own_labels(here, command):
    labels = [("status:lung:abnormal", "size:lung:nodule:13", "finding:Nodule"),
              ("status:lung:abnormal", "finding:Nodule"), ("status:lung:abnormal", "status:heart:normal"),
              ("status:heart:normal", "size:lung:nodule:13"), ()]
    write_cache(here / "cache/radgenome", "ct", labels, shape=(1, 32, 32, 8))
    command("--task", "regional_abnormality")
    row = json.loads(Path("results/regional_abnormality.json").read_text())
    # Abnormal lungs alone match two others; with a normal heart as well, none; a normal heart alone, one.
    assert (row["queries"], row["gallery"], row["without_relevant"]) == (4, 5, 1)
    assert row["chance"]["R@1"] == pytest.approx((2 / 4 + 2 / 4 + 0 + 1 / 4) / 4)
    command("--task", "lesion_size")
    row = json.loads(Path("results/lesion_size.json").read_text())
    assert (row["queries"], row["gallery"], row["chance"]["R@1"]) == (2, 5, pytest.approx(1 / 4))
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 1  # one pass serves both


def test_cross_modal_in_six_directions(here, command):
    parts = ("head", "chest", "knee")
    for modality in ("ct", "mri", "xray"):
        labels = [(parts[i % 3],) if i else () for i in range(10)]
        depth = 1 if modality == "xray" else 8
        write_cache(here / f"cache/hospital_{modality}", modality, labels, shape=(1, 32, 32, depth))
    chest(here)  # a public data set, which takes no part
    command("--task", "cross_modal")
    rows = json.loads(Path("results/cross_modal.json").read_text())["rows"]
    names = ["ct -> mri", "mri -> ct", "ct -> xray", "xray -> ct", "mri -> xray", "xray -> mri"]
    assert [row["name"] for row in rows] == names
    assert all((row["queries"], row["gallery"],
                row["chance"]["R@1"]) == (9, 9, pytest.approx(1 / 3)) for row in rows)
    assert rows[2]["paper"][0][0] == 0.327


def test_demo_sets_models_side_by_side(here, command):
    parts = [("part:head", "lesion:dense"), ("part:chest",), ("part:knee",)] * 4
    for modality in ("ct", "mri", "xray"):
        write_cache(here / f"cache/{modality}", modality, parts, "test")
    text = [(here / f"cache/{modality}/samples.csv").read_text().splitlines() for modality in ("ct", "mri",
                                                                                               "xray")]
    (here / "cache/demo").mkdir()
    (here / "cache/ct/recipe.json").rename(here / "cache/demo/recipe.json")
    for modality in ("ct", "mri", "xray"):
        for file in (here / f"cache/{modality}").glob("*.npy"):
            file.rename(here / "cache/demo" / file.name)
    lines = [text[0][0]] + [line for t in text for line in t[1:]]
    (here / "cache/demo/samples.csv").write_text("\n".join(lines))
    printed = command("--task", "demo", "--figure", "demo.png")
    rows = json.loads(Path("results/demo.json").read_text())["rows"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["mae", "simdino", "random", "pixels"]
    assert [row["name"] for row in rows[:6]] == ["ct", "mri", "xray", "ct -> xray", "xray -> ct", "ct -> mri"]
    assert printed.count("| ct -> mri ") == 5 and "| chance " in printed
    assert printed.count("| 12      | 0    |") == 12 and printed.count("| 12      | ?    |") == 12
    assert "paper" not in printed and not any(row["paper"] for row in rows)  # phantoms are not its data
    with Image.open("demo.png") as image:  # a row for each modality: the query and its top 3
        assert 4 * 192 < image.size[0] < 5 * 192 and 3 * 192 < image.size[1] < 4 * 192 + 3 * 42


def test_poolings_from_one_pass(here, command):
    chest(here)
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt", "--pool", "avg", "cls",
            "mix")
    rows = json.loads(Path("results/chestxray14.json").read_text())["rows"]
    assert [row["pool"] for row in rows] == ["avg", "cls", "mix"]
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 1
    rows = [{"folder": "f", "id": name} for name in "ba"]
    vectors = {("f", "a"): np.arange(6), ("f", "b"): np.arange(6, 12)}  # [CLS, avg]
    assert evaluate.embedding_matrix(rows, vectors, {"pool": "mix"}, "cls").tolist() == [[6, 7, 8], [0, 1, 2]]
    assert evaluate.embedding_matrix(rows, vectors, {"pool": "mix"}, "avg").tolist() == [[9, 10, 11], [3, 4, 5]]
    assert evaluate.embedding_matrix(rows, vectors, {"pool": "mix"}, "").tolist() == [[*range(6, 12)], [*range(6)]]
    with pytest.raises(UserError, match="CLS"):
        command("--task", "chestxray14", "--pool", "cls")  # the newest is MAE


def test_embeddings_made_by_anyone(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("x", "y"), ("y",), ()])
    write_cache(here / "cache/bb", "mri", [("x", "y"), ("y",), ("z",)])
    write_npz("a.npz", angles(0, 10, 80, 40), "a", range(4))
    write_npz("b.npz", angles(70, 30, 5), "bb", (2, 1, 0))  # any order, z y xy
    across = ["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "b.npz", "--gallery-cache",
              "cache/bb"]
    printed = command(*across, "--out", "r.json")
    row = json.loads(Path("r.json").read_text())
    # By angle: 0 -> xy y z; 10 -> xy y z; 80 -> z y xy; 40 -> y z xy, which asks for nothing.
    assert (row["queries"], row["gallery"], row["without_relevant"]) == (4, 3, 1)
    assert (row["R@1"], row["R@5"], row["first_MnR"]) == (0.5, 0.75, pytest.approx((1 + 1 + 2) / 3))
    assert row["seen_in_pretraining"] is None and "| 4       | ?    |" in printed
    command(*across, "--relevance", "all", "--out", "r.json")
    assert json.loads(Path("r.json").read_text())["R@1"] == 0.5
    command("--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "a.npz", "--out", "within.json")
    command("--embeddings", "a.npz", "--cache", "cache/a", "--out", "alone.json")
    a, b = (json.loads(Path(name).read_text()) for name in ("within.json", "alone.json"))
    assert a == b and a["chance"]["R@1"] < 1  # nothing finds itself, however it is asked


def test_excluding_patients_needs_patients(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("y",)] * 3, patients=[""] * 6)
    write_npz("a.npz", angles(*range(6)), "a", range(6))
    with pytest.raises(UserError, match="no patient ids"):
        command("--embeddings", "a.npz", "--cache", "cache/a", "--exclude-same", "patient")


def test_probe_reads_a_label_from_its_direction(here, command):
    write_cache(here / "cache/hospital", "mri", [(("head", "chest", "knee")[i % 3],) for i in range(45)])
    command("--task", "probe", "--cache", "cache/hospital")
    row = json.loads(Path("results/probe.json").read_text())
    assert (row["train"], row["queries"], row["name"]) == (36, 9, "body parts")
    assert row["F1"] == row["accuracy"] == row["AUROC"] == 1
    write_cache(here / "cache/ct_rate", "ct", [(f"finding:{('Mass', 'Edema')[i % 2]}",) for i in range(20)],
                "train")
    table = Path("cache/ct_rate/samples.csv")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:13] + [line.replace("train", "test") for line in lines[13:]]))
    printed = command("--task", "probe")
    row = json.loads(Path("results/probe.json").read_text())
    assert (row["train"], row["queries"], row["name"], row["F1"]) == (12, 8, "2 findings",
                                                                      1) and "AUROC" in printed


# ---------------------------------------------------------------------------------------------------- studies
def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).random((400, 2)) < [0.3, 1.1]
    low, high = evaluate.bootstrap(values.astype(float))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert high[0] - low[0] == pytest.approx(2 * half, rel=0.15) and (low[1], high[1]) == (1, 1)
    assert np.array_equal(evaluate.bootstrap(values), evaluate.bootstrap(values))


def test_scaling_finds_the_exponent_of_a_power_law(here, command):
    for i, size in enumerate((5e6, 2e7, 9e7)):
        flags = json.dumps({"data_fraction": [0.2, 0.6, 1.0][i]})
        row = {"name": "t", "parameters": size, "flags": flags, "R@5": 0.02 * size**0.2}
        Path(f"{i}.json").write_text(json.dumps({"rows": [row]}))
    printed = command("--scaling", "0.json", "1.json", "2.json")
    assert f"t: log R@5 = 0.2000 log parameters {math.log(0.02):+.4f}" in printed
    slope = math.log((9e7 / 2e7) ** 0.2) / math.log(1 / 0.6)
    assert f"= {slope:.4f} log data_fraction" in command("--scaling", "1.json", "2.json", "--against",
                                                         "data_fraction")
    with pytest.raises(UserError, match="two or more"):
        command("--scaling", "0.json", "0.json")


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("arguments, names", [
    (["--task", "chestxray14"], "cache/chestxray14"), (["--task", "cross_modal"], "--labels"),
    (["--task", "cross_modal", "--cache", "cache/a"], "2 ct"),
    (["--task", "probe", "--cache", "cache/many", "--checkpoint", "no.pt"], "no.pt"),
    (["--task", "probe", "--cache", "cache/many", "--checkpoint", "a.npz"], "a.npz"),
    (["--task", "fetal_planes", "--cache", "cache/none"], "fetal_planes: no sample"),
    (["--task", "cross_modal", "--cache", "cache/none"], "body part"),
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


def test_wrong_usage_is_exit_code_2_and_errors_are_one_line(tmp_path, command, monkeypatch):
    for arguments in ([], ["--task", "nonsense"], ["--embeddings", "a.npz"],
                      ["--task", "probe", "--pool", "avg", "cls"]):
        with pytest.raises(SystemExit, match="2"):
            command(*arguments)
    with monkeypatch.context() as torchrun, pytest.raises(SystemExit, match="2"):
        torchrun.setenv("WORLD_SIZE", "2")
        command("--task", "demo")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--task", "hyper_kvasir"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
