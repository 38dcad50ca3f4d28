"""evaluate.py against hand-worked tables, naive loops, exhaustive enumeration, scikit-learn and the paper itself."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import prepare
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
    # Query 71: 70 60 50 40 30 20 10 0; with a or b: 50 40 20 10 0, ranks 3 4 6 7 8; with both: 20 alone, rank 6.
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


@pytest.mark.parametrize("kept", [0, 1e9])
def test_large_sets_in_float32_agree_with_float64_copies_included(kept, monkeypatch):
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((300, 63)).astype(np.float32), draw(generator, 300)
    x[150:] = x[generator.integers(0, 150, 150)]
    exact = evaluate.measure(x, x, labels, labels)
    monkeypatch.setattr(evaluate, "EXACT_WORK", 0)
    monkeypatch.setattr(evaluate, "BLOCK", 32)
    monkeypatch.setattr(evaluate, "MIRROR_BYTES", kept)  # with and without the use of symmetry
    fast = evaluate.measure(x, x, labels, labels)
    assert all(np.array_equal(exact[key], fast[key]) for key in exact)


def test_a_query_never_finds_itself_but_finds_its_copy():
    x, labels, ids = angles(0, 0, 90), [("a",), ("a",), ("b",)], ["1", "2", "3"]  # the second is a copy of the first
    found = evaluate.measure(x, x, labels, labels, [(ids, ids)])
    assert found["first"].tolist() == [1, 1, 3] and found["candidates"].tolist() == [2, 2, 2]


def test_an_unknown_patient_excludes_nobody():
    x, labels, ids, patients = angles(0, 1, 2), [("a",)] * 3, ["1", "2", "3"], ["", "", "p"]
    found = evaluate.measure(x, x, labels, labels, [(ids, ids), (patients, patients)])
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
    """11 for the 1 - R@10 queries without hits and about 5.5 for the others; first-hit ranks contradict the tables."""
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


# ------------------------------------------------------------------------------------------------------------ probe
@pytest.mark.parametrize("multi", [True, False])
def test_probe_scores_are_those_of_scikit_learn(multi):
    sk = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.ones(4), 90).round(1)  # rounded, so that there are ties
    classes = generator.integers(0, 4, 90)
    truth = generator.random((90, 4)) < 0.3 if multi else np.eye(4, dtype=bool)[classes]
    chances[:, 3] = 0  # never called
    ours = evaluate.probe_scores(chances, truth, multi)
    called = chances > 0.5 if multi else np.eye(4, dtype=bool)[chances.argmax(axis=1)]
    assert ours["F1"] == pytest.approx(sk.f1_score(truth, called, average="macro", zero_division=0))
    assert ours["precision"] == pytest.approx(sk.precision_score(truth, called, average="macro", zero_division=0))
    areas = [sk.roc_auc_score(truth[:, j], chances[:, j]) for j in range(4)]
    assert ours["AUROC"] == pytest.approx(np.mean(areas))
    accuracy = [sk.accuracy_score(truth[:, j], called[:, j]) for j in range(4)]
    expected = np.mean(accuracy) if multi else sk.accuracy_score(classes, called.argmax(axis=1))
    assert ours["accuracy"] == pytest.approx(expected)


def test_a_label_nobody_carries_is_left_out_of_auroc():
    truth = np.array([[True, False], [False, False], [True, False]])
    assert evaluate.probe_scores(np.array([[0.9, 0.1], [0.2, 0.2], [0.6, 0.3]]), truth, True)["AUROC"] == 1


@pytest.mark.parametrize("multi", [True, False])
def test_fit_finds_the_minimum_that_scikit_learn_finds(multi):
    linear = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((120, 6)).astype(np.float32)
    logits = x @ generator.standard_normal((6, 3)) + generator.standard_normal((120, 3))
    y = logits > 0.5 if multi else np.eye(3, dtype=bool)[logits.argmax(axis=1)]
    w = evaluate.fit(torch.from_numpy(x), torch.from_numpy(y).float(), 0.01, multi).numpy()
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
    train, test = evaluate.split_probe(rows, classes, np.random.default_rng(0))
    assert sorted([*train, *test]) == list(range(30)) and [(test < 20).sum(), (test >= 20).sum()] == [4, 2]
    rows = [{"split": "train"}] * 3 + [{"split": "test"}]
    train, test = evaluate.split_probe(rows, list("abcd"), np.random.default_rng(0))
    assert (train.tolist(), test.tolist()) == ([0, 1, 2], [3])


# ---------------------------------------------------------------------------------------------------- whole commands
def write_cache(folder, modality, labels, split="", patients=None, shape=(1, 32, 32, 1)):
    """A cache folder whose samples are stripes at the angle of their first label, so that neighbours share labels."""
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
        np.save(folder / f"{folder.name}{i:04d}.npy", (255 * sample).astype(np.uint8))
        patient = patients[i] if patients else f"p{i}"
        lines.append(f"{folder.name}{i:04d},{modality},{'|'.join(row)},{patient},{split},{'x'.join(map(str, shape))}")
    (folder / "samples.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with an untrained SimDINO-like and MAE-like checkpoint, the second one newer."""
    monkeypatch.chdir(tmp_path)
    for age, (name, cls) in enumerate([("simdino", True), ("mae", False)]):
        torch.manual_seed(age)
        path = Path("runs", name, "checkpoint.pt")
        path.parent.mkdir(parents=True)
        save_checkpoint(path, ViT("vit_t", cls_token=cls), flags=json.dumps({"data_fraction": 0.2 + 0.4 * age}), step=1)
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
        file.write("train,xray,Mass,p0,train,1x32x32x1\n")


KEYS = {"task", "queries", "gallery", "without_relevant", "R@1", "R@5", "R@10", "MnR", "MdR", "first_MnR", "first_MdR",
        "chance", "ci95", "paper", "checkpoint", "pool", "exclude_same"}


def test_a_task_with_no_other_flag(here, command):
    chest(here)
    printed = command("--task", "chestxray14")
    assert "found 12 samples, paper 7992" in printed
    row = json.loads(Path("results/chestxray14.json").read_text())
    assert KEYS | {"protocol", "versions", "checkpoint_sha256"} <= row.keys()
    assert (row["queries"], row["gallery"], row["pool"], row["checkpoint"]) == (12, 12, "avg", "runs/mae/checkpoint.pt")
    assert row["chance"]["R@1"] == pytest.approx(3 / 11) and row["paper"]["M3Ret (SimDINO)"]["R@1"] == 0.345
    assert row["R@1"] == 1  # stripes of one direction are nearest to each other, even for an untrained encoder
    assert all(f"{row[key]:.3f}" in printed for key in ("R@1", "MnR", "MdR", "first_MnR"))
    apart = command("--task", "chestxray14", "--exclude-same", "patient", "--markdown", "--out", "apart.json")
    assert "| chestxray14 " in apart
    assert json.loads(Path("apart.json").read_text())["chance"]["R@1"] == pytest.approx(3 / 10)  # a patient has 2 kinds


def test_from_the_public_layout_to_the_table(here, command, monkeypatch):
    """NIH files -> prepare -> evaluate: only test images with one finding take part, and every one finds its like."""
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
    assert "found 4 samples, paper 7992" in command("--task", "chestxray14", "--encoder", "pixels")
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
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt")
    sample = sorted(Path("cache/chestxray14").glob("chest*.npy"))[0]
    np.save(sample, np.zeros((1, 32, 32, 1), np.uint8))  # the cache was made again
    command("--task", "chestxray14")
    assert len(list(kept.glob("*.npz"))) == 3


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
    assert all((row["queries"], row["gallery"], row["chance"]["R@1"]) == (9, 9, pytest.approx(1 / 3)) for row in rows)
    assert rows[2]["paper"]["M3Ret (MAE)"]["R@1"] == 0.327


def test_demo_sets_models_side_by_side(here, command):
    parts = [("part:head", "lesion:dense"), ("part:chest",), ("part:knee",)] * 4
    for modality in ("ct", "mri", "xray"):
        write_cache(here / f"cache/{modality}", modality, parts, "test")
    text = [(here / f"cache/{modality}/samples.csv").read_text().splitlines() for modality in ("ct", "mri", "xray")]
    (here / "cache/demo").mkdir()
    for modality in ("ct", "mri", "xray"):
        for file in (here / f"cache/{modality}").glob("*.npy"):
            file.rename(here / "cache/demo" / file.name)
    (here / "cache/demo/samples.csv").write_text("\n".join([text[0][0]] + [line for t in text for line in t[1:]]))
    printed = command("--task", "demo", "--figure", "demo.png")
    rows = json.loads(Path("results/demo.json").read_text())["rows"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["mae", "simdino", "random", "pixels"]
    assert [row["name"] for row in rows[:6]] == ["ct", "mri", "xray", "ct -> xray", "xray -> ct", "ct -> mri"]
    assert "ct -> mri  R@1" in printed and "chance" in printed
    with Image.open("demo.png") as image:
        assert image.size[0] > 3 * 192 and image.size[1] > 3 * 192


def test_poolings_from_one_pass(here, command):
    chest(here)
    command("--task", "chestxray14", "--checkpoint", "runs/simdino/checkpoint.pt", "--pool", "avg", "cls", "mix")
    rows = json.loads(Path("results/chestxray14.json").read_text())["rows"]
    assert [row["pool"] for row in rows] == ["avg", "cls", "mix"]
    assert len(list(Path("results/embeddings").glob("*.npz"))) == 1
    mix = np.arange(12, dtype=np.float32).reshape(2, 6)  # [CLS, avg]
    assert evaluate.pooled(mix, "mix", "cls").tolist() == [[0, 1, 2], [6, 7, 8]]
    assert evaluate.pooled(mix, "mix", "avg").tolist() == [[3, 4, 5], [9, 10, 11]]
    with pytest.raises(UserError, match="CLS"):
        command("--task", "chestxray14", "--pool", "cls")  # the newest is MAE


def test_embeddings_made_by_anyone(here, command):
    write_cache(here / "cache/a", "ct", [("x",), ("x", "y"), ("y",), ()])
    write_cache(here / "cache/bb", "mri", [("x", "y"), ("y",), ("z",)])
    write_embeddings("a.npz", angles(0, 10, 80, 40), [f"a{i:04d}" for i in range(4)], {})
    write_embeddings("b.npz", angles(70, 30, 5), [f"bb{i:04d}" for i in (2, 1, 0)], {})  # any order, z y xy
    across = ["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "b.npz", "--gallery-cache", "cache/bb"]
    command(*across, "--out", "r.json")
    row = json.loads(Path("r.json").read_text())
    # By angle: 0 -> xy y z; 10 -> xy y z; 80 -> z y xy; 40 -> y z xy, which asks for nothing.
    assert (row["queries"], row["gallery"], row["without_relevant"]) == (4, 3, 1)
    assert (row["R@1"], row["R@5"], row["first_MnR"]) == (0.5, 0.75, pytest.approx((1 + 1 + 2 + 4) / 4))
    command(*across, "--relevance", "all", "--out", "r.json")
    assert json.loads(Path("r.json").read_text())["hits"]["R@1"] == "1100"
    command("--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "a.npz", "--out", "within.json")
    command("--embeddings", "a.npz", "--cache", "cache/a", "--out", "alone.json")
    a, b = (json.loads(Path(name).read_text()) for name in ("within.json", "alone.json"))
    assert a["hits"] == b["hits"] and a["chance"] == b["chance"]  # nothing finds itself, however it is asked


def test_probe_reads_a_label_from_its_direction(here, command):
    write_cache(here / "cache/hospital", "mri", [(("head", "chest", "knee")[i % 3],) for i in range(45)])
    command("--task", "probe", "--cache", "cache/hospital")
    row = json.loads(Path("results/probe.json").read_text())
    assert (row["train"], row["test"], row["name"]) == (36, 9, "body parts")
    assert row["F1"] == row["accuracy"] == row["AUROC"] == 1
    write_cache(here / "cache/ct_rate", "ct", [(f"finding:{('Mass', 'Edema')[i % 2]}",) for i in range(20)], "train")
    table = Path("cache/ct_rate/samples.csv")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:13] + [line.replace("train", "test") for line in lines[13:]]))
    printed = command("--task", "probe")
    row = json.loads(Path("results/probe.json").read_text())
    assert (row["train"], row["test"], row["name"], row["F1"]) == (12, 8, "2 findings", 1) and "AUROC" in printed


def test_all_runs_what_is_there(here, command):
    chest(here)
    write_cache(here / "cache/fetal_planes", "ultrasound", [("Fetal brain",), ("Fetal femur",), ("Other",)] * 3)
    write_cache(here / "cache/hospital", "ct", [("head",)])  # one modality: nothing to cross
    printed = command("--task", "all")
    assert "cross_modal left out" in printed and "paper: DINOv3-7B" in printed and "paper: DINOv2-B" in printed
    assert json.loads(Path("results/fetal_planes.json").read_text())["queries"] == 6


# ---------------------------------------------------------------------------------------------------------- studies
def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).random((400, 2)) < [0.3, 1.1]
    low, high = evaluate.bootstrap(values.astype(float))[1]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert high[0] - low[0] == pytest.approx(2 * half, rel=0.15) and (low[1], high[1]) == (1, 1)
    assert np.array_equal(evaluate.bootstrap(values)[1], evaluate.bootstrap(values)[1])


def result(name, hits, **more):
    return {"name": name, "queries_sha256": "q", "hits": {"R@5": "".join(map(str, hits))},
            "R@5": float(np.mean(hits)), **more}


def test_compare_pairs_the_queries(here, command):
    a = [1, 0] * 100
    b = [1, 0] * 80 + [1, 1] * 20  # never worse, better on 20 of 200
    Path("a.json").write_text(json.dumps(result("t", a)))
    Path("b.json").write_text(json.dumps(result("t", b)))
    (line,) = evaluate.compare("a.json", "b.json")
    assert line[1:4] == ["0.500", "0.600", "+0.100"] and float(line[5]) == 0
    assert "gain" in command("--compare", "a.json", "b.json")
    (line,) = evaluate.compare("a.json", "a.json")
    assert line[3] == "+0.000" and float(line[5]) == 1
    Path("c.json").write_text(json.dumps(result("t", b) | {"queries_sha256": "other"}))
    with pytest.raises(UserError, match="other queries"):
        command("--compare", "a.json", "c.json")


def test_scaling_finds_the_exponent_of_a_power_law(here, command):
    for i, size in enumerate((5e6, 2e7, 9e7)):
        row = result("t", [1], parameters=size, run={"data_fraction": [0.2, 0.6, 1.0][i]}) | {"R@5": 0.02 * size**0.2}
        Path(f"{i}.json").write_text(json.dumps({"rows": [row]}))
    (line,) = evaluate.scaling(["0.json", "1.json", "2.json"], "parameters", "fit.png")
    assert line == ["t", "3", "0.2000", f"{math.log(0.02):.4f}"]
    with Image.open("fit.png") as image:
        assert image.size == (480, 320) and len(image.getcolors(1000)) > 3
    assert "slope" in command("--scaling", "0.json", "2.json", "--against", "data_fraction")
    with pytest.raises(UserError, match="two or more"):
        evaluate.scaling(["0.json", "0.json"], "parameters")


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("arguments, names", [
    (["--task", "chestxray14"], "cache/chestxray14"), (["--task", "cross_modal"], "--cache"),
    (["--task", "all"], "cache/"), (["--task", "cross_modal", "--cache", "cache/a"], "cache/a"),
    (["--task", "probe", "--cache", "cache/many", "--checkpoint", "no.pt"], "no.pt"),
    (["--task", "fetal_planes", "--cache", "cache/a"], "cache/a"),
    (["--embeddings", "strange.npz", "--cache", "cache/a"], "strange.npz are not in cache/a"),
    (["--embeddings", "a.npz", "--cache", "cache/a", "--gallery", "wide.npz"], "wide.npz"),
    (["--embeddings", "a.npz", "--cache", "nowhere"], "nowhere"), (["--compare", "a.npz", "a.npz"], "a.npz"),
    (["--scaling", "missing.json"], "missing.json"), (["--task", "probe", "--cache", "cache/a"], "too few")])
def test_what_a_user_gets_wrong_is_named(here, command, arguments, names):
    write_cache(here / "cache/a", "ct", [(), ()] if "fetal_planes" in arguments else [("x",), ("y",)])
    write_cache(here / "cache/many", "ct", [("x",), ("y",)] * 20)
    for name, second, width in (("a", "a0001", 2), ("strange", "b", 2), ("wide", "a0001", 3)):
        write_embeddings(f"{name}.npz", np.ones((2, width), np.float32), ["a0000", second], {})
    with pytest.raises(UserError, match=names):
        command(*arguments)


def test_without_a_checkpoint_it_says_so(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    chest(tmp_path)
    with pytest.raises(UserError, match="train first"):
        command("--task", "chestxray14")
    assert "R@1" in command("--task", "chestxray14", "--encoder", "pixels")


def test_wrong_usage_is_exit_code_2_and_errors_are_one_line(tmp_path, command, monkeypatch):
    for arguments in ([], ["--task", "nonsense"], ["--embeddings", "a.npz"], ["--task", "all", "--cache", "cache/a"]):
        with pytest.raises(SystemExit, match="2"):
            command(*arguments)
    with monkeypatch.context() as torchrun, pytest.raises(SystemExit, match="2"):
        torchrun.setenv("WORLD_SIZE", "2")
        command("--task", "demo")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--task", "hyper_kvasir"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
