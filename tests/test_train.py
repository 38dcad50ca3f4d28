"""The schedule as a pure function; the run folder: exact resume, signals, kills, damage, one rank and two."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.exc

import train
from conftest import write_cache
from model import ViT
from prepare import UserError, load_sample
from simdino import SimDINO
from train import Schedule, cosine, learning_rate, plan_epoch, seed_of, select_rows

ROOT = Path(__file__).parents[1]
TINY = ["--arch", "vit_t", "--epochs", "2", "--batch-size", "4", "--batch-size-3d", "2", "--local-views", "2",
        "--workers", "0"]


# ---- schedule ----------------------------------------------------------------------------------------------
def rows_of(**counts):
    """Rows as read_samples gives them: a ct is a volume, endoscopy a video, everything else an image."""
    shapes = {"ct": (1, 32, 32, 8), "endoscopy": (3, 32, 32, 16)}
    rows = []
    for modality, n in counts.items():
        shape = shapes.get(modality, (1, 32, 32, 1))
        for i in range(n):
            name = f"{seed_of(i, len(modality)):016x}"
            rows.append({"id": name, "modality": modality, "shape": shape, "split": "", "folder": ""})
    return rows


def flags(**changes):
    return Namespace(**(dict(batch_size=4, batch_size_3d=2, epochs=3, seed=0) | changes))


def groups_of(sizes, batches):
    """Groups as make_groups makes them, numbered, their rows counted on from group to group."""
    groups = []
    start = 0
    for g, (n, batch) in enumerate(zip(sizes, batches)):
        groups.append(train.Group(g, None, range(start, start + n), batch))
        start += n
    return groups


def test_every_sample_once_per_epoch_in_whole_batches():
    groups = groups_of([103, 40, 17], [8, 4, 2])
    plan = plan_epoch(groups, seed=1, epoch=5)
    assert len(plan) == 12 + 10 + 8
    for group, _, rows, batch in groups:
        taken = [numbers for g, numbers in plan if g == group]
        assert all(len(numbers) == batch for numbers in taken) and set(np.concatenate(taken)) <= set(rows)
        # no repeats, and only the rest is dropped
        assert len(set(np.concatenate(taken))) == len(rows) // batch * batch


def test_modalities_are_spread_evenly():
    """At any moment of the epoch each modality is within two batches of its share of the steps."""
    for epoch in range(5):
        groups = np.array([g for g, _ in plan_epoch(groups_of([320, 80, 33, 16], [4, 4, 4, 4]), 0, epoch)])
        for group in range(4):
            done, k = np.cumsum(groups == group), (groups == group).sum()
            share = k * np.arange(1, len(groups) + 1) / len(groups)
            assert np.abs(done - share).max() < 2, (epoch, group)
        assert (np.diff(np.flatnonzero(groups == 3)) > 20).all()  # 4 batches among 112: never bunched


def test_schedule_is_a_function_of_seed_and_epoch_only():
    def order(seed, epoch):
        return plan_epoch(groups_of([50, 30], [5, 3]), seed, epoch)

    assert order(3, 2) == order(3, 2)
    for other in (order(3, 1), order(4, 2)):
        assert [n for g, n in other if g == 0] != [n for g, n in order(3, 2) if g == 0]


def test_ranks_share_each_step_and_resume_in_the_middle():
    rows = rows_of(xray=40, ct=9, endoscopy=16)
    ranks = [Schedule(rows, flags(), rank, 2) for rank in range(2)]
    a, b = ([schedule.batch(step)[2] for step in range(schedule.total)] for schedule in ranks)
    assert ranks[0].per_epoch == 40 // 8 + 9 // 4 + 16 // 8 and len(a) == len(b) == 3 * ranks[0].per_epoch
    for step, (x, y) in enumerate(zip(a, b)):
        modality, numbers, _ = ranks[0].batch(step)
        assert (modality, numbers) == ranks[1].batch(step)[:2]  # known to both without talking
        assert x + y == numbers and not set(x) & set(y)
        kinds = {(rows[i]["modality"], rows[i]["shape"]) for i in numbers}
        assert kinds == {(modality, rows[numbers[0]]["shape"])}
        assert len(x) == (2 if modality == "ct" else 4)  # Sec. 3.4: another batch size for volumes
    later = Schedule(rows, flags(), 0, 2)
    assert [later.batch(step)[2] for step in range(7, 20)] == a[7:20]
    one = Schedule(rows, flags(batch_size=8, batch_size_3d=4), 0, 1)
    joined = [sorted(x + y) for x, y in zip(a, b)]
    assert [sorted(one.batch(step)[2]) for step in range(9)] == joined[:9]  # the same global batches


def test_a_group_smaller_than_a_batch_is_left_out_but_never_a_whole_modality(capsys):
    rows = rows_of(xray=12)
    for row in rows[:3]:
        row["shape"] = (1, 64, 64, 1)
    schedule = Schedule(rows, flags())
    assert "3 xray samples of shape 1x64x64x1" in capsys.readouterr().out and schedule.per_epoch == 2
    with pytest.raises(UserError, match="xray has 3 samples of one shape, a step takes 4: --batch-size 3,"):
        Schedule(rows[:3], flags())


def test_a_modality_too_small_for_a_step_is_told_the_batch_size_that_fits():
    def told(rows, world=1, **changes):
        with pytest.raises(UserError) as error:
            Schedule(rows, flags(**changes), world=world)
        return str(error.value)

    assert told(rows_of(xray=50, ultrasound=18), batch_size=48).startswith(
        "ultrasound has 18 samples of one shape, a step takes 48: --batch-size 18")
    assert told(rows_of(ct=3), world=2).startswith(
        "ct has 3 samples of one shape, a step takes 4: --batch-size-3d 1, or")
    assert told(rows_of(ct=1), world=2) == (
        "ct has 1 samples of one shape, a step takes 4: leave it out with --modalities")


def test_only_weight_matrices_decay():
    method = SimDINO(ViT("vit_t", cls_token=True))
    decay, free = train.make_optimizer(method).param_groups
    names = {id(p): name for name, p in method.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decay["params"])
    assert all("norm" in names[id(p)] or names[id(p)].endswith(("bias", "cls_token")) for p in free["params"])
    assert free["weight_decay"] == 0
    assert len(decay["params"]) + len(free["params"]) == len(list(method.student.parameters()))


def test_two_shapes_of_a_modality_never_share_a_batch():
    rows = rows_of(ct=8)
    for row in rows[:4]:
        row["shape"] = (1, 32, 32, 1)
    schedule = Schedule(rows, flags())
    for step in range(schedule.per_epoch):
        assert len({rows[i]["shape"] for i in schedule.batch(step)[1]}) == 1


def test_learning_rate_and_weight_decay_by_hand():
    total, warmup, peak = 300, 10, 1e-3
    assert learning_rate(0, total, warmup, peak) == pytest.approx(1e-4)
    assert learning_rate(9, total, warmup, peak) == learning_rate(10, total, warmup, peak) == peak
    assert learning_rate(155, total, warmup, peak) == pytest.approx(peak / 2)
    assert 0 < learning_rate(299, total, warmup, peak) < 1e-7
    assert cosine(0.04, 0.4, 0) == pytest.approx(0.04) and cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    assert cosine(0.04, 0.4, 1) == pytest.approx(0.4)
    paper = Schedule(rows_of(xray=64), flags(epochs=300, batch_size=32))
    assert (paper.total, paper.warmup) == (600, 20)  # 10 epochs of warm-up
    short = Schedule(rows_of(xray=64), flags(epochs=5, batch_size=32))
    assert short.warmup == 1  # never more than a tenth of the run


def test_data_fractions_are_nested_and_test_split_and_mri_stay_out(tmp_path):
    write_cache(tmp_path / "a", {"xray": (1, 8, 8, 1), "mri": (1, 8, 8, 4)}, per_shape=50)
    write_cache(tmp_path / "b", {"ct": (1, 8, 8, 4)}, per_shape=30, seed=2)
    write_cache(tmp_path / "t", {"xray": (1, 8, 8, 1)}, split="test", seed=1)
    folders, names = [tmp_path / x for x in "abt"], ["xray", "ct"]
    chosen = {f: {row["id"] for row in select_rows(folders, names, f)} for f in (0.2, 0.6, 1.0)}
    assert [len(c) for c in chosen.values()] == [10 + 6, 30 + 18, 50 + 30]
    assert chosen[0.2] < chosen[0.6] < chosen[1.0]
    assert len(select_rows(folders, ["mri"], 1.0)) == 50
    with pytest.raises(UserError, match="ultrasound"):
        select_rows(folders, ["ultrasound"], 1.0)
    # ten of b, as queries here
    write_cache(tmp_path / "c", {"ct": (1, 8, 8, 4)}, per_shape=10, seed=2, split="test")
    assert len(select_rows([tmp_path / "b", tmp_path / "c"], ["ct"], 1.0)) == 20


def test_a_cache_or_a_modality_named_twice_is_refused(tmp_path):
    cache = write_cache(tmp_path / "a", {"xray": (1, 8, 8, 1)})
    (tmp_path / "link").symlink_to(cache)
    for other in (cache, tmp_path / "link", Path(f"{tmp_path}/./a/"), tmp_path / "link" / ".." / "a"):
        with pytest.raises(UserError, match="one cache; name it once"):
            select_rows([cache, other], ["xray"], 1.0)
    with pytest.raises(UserError, match="--modalities xray xray"):
        select_rows([cache], ["xray", "xray"], 1.0)


def test_an_id_in_two_caches_is_trained_on_once_as_the_first_has_it(tmp_path, capsys):
    first = write_cache(tmp_path / "b", {"xray": (1, 8, 8, 1)}, per_shape=5)
    second = write_cache(tmp_path / "a", {"xray": (1, 8, 8, 1)}, per_shape=5)  # of the same seed: equal ids
    rows = select_rows([first, second], ["xray"], 1.0)
    assert len(rows) == len({row["id"] for row in rows}) == 5
    assert {row["folder"] for row in rows} == {str(first)}
    assert "trained on once: 5 samples" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_id_that_any_cache_holds_out_is_not_trained_on(tmp_path, capsys, split):
    train_set = write_cache(tmp_path / "a", {"ct": (1, 8, 8, 4)}, per_shape=10)
    test_set = write_cache(tmp_path / "b", {"ct": (1, 8, 8, 4)}, per_shape=4, split=split)
    assert len(select_rows([train_set, test_set], ["ct"], 1.0)) == 6
    told = capsys.readouterr().out
    assert f"kept out of training: 4 samples of {train_set}" in told and f"4 samples of {test_set}" in told
    assert "once" not in told and "note" not in told


def test_an_archive_without_a_split_is_told_that_cross_modal_would_query_it(tmp_path, capsys):
    unsplit = write_cache(tmp_path / "a", {"xray": (1, 8, 8, 1)}, per_shape=7, split="")
    select_rows([unsplit], ["xray"], 1.0)
    told = capsys.readouterr().out
    assert f"note: 7 samples of {unsplit} have no split" in told and "cross_modal" in told
    select_rows([unsplit], ["xray"], 1.0, verbose=False)
    assert capsys.readouterr().out == ""


def test_a_loader_process_puts_batches_into_shared_memory(monkeypatch):
    samples = [torch.zeros(1, 4, 4, 1)] * 2
    assert not train.make_batch(samples).is_shared()
    monkeypatch.setattr(train, "get_worker_info", lambda: "a worker")
    assert train.make_batch(samples).is_shared()


@pytest.mark.parametrize("text", [
    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    "Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
    "DataLoader worker (pid 7) is killed by signal: Killed. ",
    "DataLoader worker (pid(s) 7, 8) exited unexpectedly"])
def test_a_lost_loader_process_is_one_line_with_the_remedy(text):
    remedy = "memory or /dev/shm, or lower --workers"
    with pytest.raises(UserError, match=remedy) as told, train.naming_the_remedy():
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback:\n{text}")
    assert text.strip() in str(told.value) and "\n" not in str(told.value)


def test_other_errors_of_a_step_keep_their_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), train.naming_the_remedy():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_hang_up_is_caught_unless_nohup_ignores_it(monkeypatch):
    for before, handled in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        handlers = {}
        monkeypatch.setattr(signal, "getsignal", lambda number: before)
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        train.catch_signals()
        assert (signal.SIGHUP in handlers) is handled
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= handlers.keys()


# ---- frames and batches ------------------------------------------------------------------------------------
def video_rows(tmp_path, frames=20, n=6):
    cache = write_cache(tmp_path / "videos", {"endoscopy": (3, 8, 8, frames)}, per_shape=n)
    return train.read_samples(cache)


def read_items(rows, step, rank=0, world=1, **changes):
    """{row number: the sample that a rank reads for it at a step}."""
    schedule = Schedule(rows, flags(batch_size=4 // world, **changes), rank, world)
    samples = train.TrainingSamples(rows)
    (items,) = train.draw_items(schedule, step, step + 1)
    return {number: samples[number, seed] for number, seed in items}


def test_a_video_comes_as_16_of_its_frames_in_order(tmp_path):
    rows = video_rows(tmp_path)
    for number, sample in read_items(rows, 0).items():
        whole = load_sample(rows[number]["folder"], rows[number])
        where = [np.flatnonzero([(whole[..., j] == frame).all() for j in range(20)])[0]
                 for frame in sample.numpy().transpose(3, 0, 1, 2)]
        assert len(where) == 16 and where == sorted(where)


def test_frames_follow_from_seed_step_and_sample_alone(tmp_path):
    rows = video_rows(tmp_path, n=4)
    first = read_items(rows, 0)
    assert all(torch.equal(first[number], sample) for number, sample in read_items(rows, 0).items())
    shared = [read_items(rows, 0, rank, 2) for rank in range(2)]
    assert all(torch.equal(first[number], sample) for part in shared for number, sample in part.items())
    for other in (read_items(rows, 1), read_items(rows, 0, seed=1)):
        assert not any(torch.equal(first[number], sample) for number, sample in other.items())


def test_samples_other_than_long_videos_come_as_cached(tmp_path):
    shapes = {"xray": (1, 8, 8, 1), "endoscopy": (3, 8, 8, 16), "ct": (1, 8, 8, 64)}
    cache = write_cache(tmp_path / "x", shapes)
    rows = train.read_samples(cache)
    samples = train.TrainingSamples(rows)
    for number, row in enumerate(rows):
        assert np.array_equal(samples[number, 5].numpy(), load_sample(cache, row))


def test_a_batch_is_copied_to_the_gpu_before_the_step_in_front_of_it_begins(monkeypatch):
    events = []

    class Batch:
        def __init__(self, name):
            self.name = name

        def to(self, device, non_blocking):
            assert non_blocking
            events.append(f"copy {self.name}")
            return self

        def record_stream(self, stream):
            events.append(f"keep {self.name}")

    stream = mock.Mock(wait_stream=lambda other: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda copying: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for batch in train.copy_ahead(map(Batch, "abc"), torch.device("cuda")):
        events.append(f"step {batch.name}")
    assert events == ["copy a", "wait", "keep a", "copy b", "step a", "wait", "keep b", "copy c", "step b",
                      "wait", "keep c", "step c"]


def test_on_a_cpu_batches_pass_as_they_are():
    batches = [torch.zeros(2), torch.ones(2)]
    assert all(a is b for a, b in zip(train.copy_ahead(batches, torch.device("cpu")), batches, strict=True))


# ---- rehearsal of a GPU without one ------------------------------------------------------------------------
def small_run(monkeypatch, cache, out, ssl, device, *more):
    """Arguments of `fit` for a small run of both kinds of samples, with everything on a device."""
    words = ["--ssl", ssl, "--data", str(cache), "--out", str(out), *TINY, "--arch", "vit_xs", *more]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    args = train.parse_arguments()
    schedule = Schedule(select_rows(args.data, args.modalities, 1.0), args)
    method, init_ids = train.build_method(args, torch.device(device))
    optimizer = train.make_optimizer(method)
    for group in optimizer.param_groups:
        group["fused"] = device != "meta"  # which has no fused kernel
    out.mkdir()
    run_info = train.describe_run(args, method, schedule, init_ids)
    return args, run_info, method, optimizer, schedule, 0, torch.device(device)


@pytest.mark.parametrize("ssl", ["mae", "simdino"])
def test_a_step_mixes_no_devices_and_reads_the_device_once(mixed_cache, tmp_path, monkeypatch, ssl):
    """On the meta device nothing has a value: to read one, or to mix devices, is an error."""
    reads = []

    def read_numbers(values):
        tensors = [value for value in values.values() if torch.is_tensor(value)]
        assert all(value.device.type == "meta" and value.numel() == 1 for value in tensors)
        reads.append(len(tensors))
        return {name: 0.0 if torch.is_tensor(value) else value for name, value in values.items()}

    monkeypatch.setattr(train, "read_numbers", read_numbers)
    monkeypatch.setattr(train, "save_run", lambda *state: None)
    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())  # it knows no meta
    done, skipped = train.fit(*small_run(monkeypatch, mixed_cache, tmp_path / "run", ssl, "meta"))
    assert (done, skipped, len(reads)) == (16, 0, 16)  # once a step


def test_the_numbers_of_a_step_come_in_one_transfer(monkeypatch):
    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append(x.shape) or tolist(x))
    loss = torch.tensor(1.5, requires_grad=True)
    rate = torch.tensor(2.0)
    values = train.read_numbers({"loss": loss, "skipped": torch.tensor(True), "lr": 0.1, "rate": rate})
    assert values == {"loss": 1.5, "skipped": 1.0, "lr": 0.1, "rate": 2.0}
    assert transfers == [(3,)]


@pytest.mark.parametrize("ssl", ["mae", "simdino"])
def test_blocks_compile_whole_and_once_a_shape(mixed_cache, tmp_path, monkeypatch, ssl):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    run_arguments = small_run(monkeypatch, mixed_cache, tmp_path / "run", ssl, "cpu", "--max-steps", "8")
    # Each of these has a graph of its own: a shape, with or without gradients, with or without drop path.
    kinds = set()

    def note(block, inputs):
        scales = inputs[1] if len(inputs) > 1 else ()
        drawn = [torch.is_tensor(scale) for scale in scales]
        kinds.add((*inputs[0].shape, torch.is_grad_enabled(), any(drawn)))

    for module in run_arguments[2].modules():
        if isinstance(module, train.Block):
            module.register_forward_pre_hook(note)
            compiled = torch.compile(module.forward, backend=counter, dynamic=False, fullgraph=True)
            module.forward = compiled  # fullgraph: a graph break is an error
    train.fit(*run_arguments)
    assert 0 < counter.frame_count <= len(kinds), (counter.frame_count, kinds)


@pytest.mark.parametrize("error", [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    torch._inductor.exc.InvalidCxxCompiler(),
    torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("Python.h: No such file"), None),
    subprocess.CalledProcessError(1, ["gcc", "main.c"])])
def test_a_missing_compiler_is_one_line_with_the_remedy(error):
    with pytest.raises(UserError, match="TORCH_COMPILE_DISABLE=1") as told, train.naming_the_remedy():
        raise error
    assert "\n" not in str(told.value)


# ---- runs --------------------------------------------------------------------------------------------------
def command(cache, out, *more, ssl="mae", ranks=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags_of_run = ["--ssl", ssl, "--data", cache, "--out", out, *TINY, *more]
    return [sys.executable, *launch, ROOT / "train.py", *flags_of_run]


def run(*args, ranks=1, check=True, **options):
    """Train to the end: several ranks as torchrun starts them, one in this process."""
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        started = []
        for rank in range(ranks):
            started.append(subprocess.Popen(
                command(*args, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | world | {"OMP_NUM_THREADS": "1", "RANK": str(rank)}))
        outputs = [process.communicate() for process in started]
        stdout, stderr = ("".join(texts) for texts in zip(*outputs))
        code = max(process.returncode for process in started)
        done = Namespace(returncode=code, stdout=stdout, stderr=stderr)
    else:
        done = in_process([str(x) for x in command(*args, **options)[1:]])
    assert not check or done.returncode == 0, done.stderr
    return done


def train_here(*more):
    return in_process([str(ROOT / "train.py"), "--ssl", "mae", *TINY, *more])


def in_process(words):
    """train.py in this process, as its last line runs it -> its return code and what it printed."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {name: signal.getsignal(name) for name in names}
    code = 0
    with (contextlib.redirect_stderr(io.StringIO()) as errors,
          contextlib.redirect_stdout(io.StringIO()) as output,
          mock.patch.object(sys, "argv", words)):
        try:
            train.cli(train.main)
        except SystemExit as leave:
            code = leave.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return Namespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(a, b):
    """Equal checkpoints, bit for bit, and equal logs but for the times in them."""
    def flat(out):
        state = state_of(out)
        kept = {key: state[key] for key in ("model", "optimizer", "step")}
        return torch.utils._pytree.tree_flatten_with_path(kept)[0]

    for (path, x), (other, y) in zip(flat(a), flat(b), strict=True):
        assert path == other
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y, path
    def last_lines(out):  # of a step the last line counts
        lines = {}
        for line in log_of(out):
            for timing in ("samples_per_s", "data_wait", "peak_memory_gb"):
                del line[timing]
            lines[line["step"]] = line
        return lines

    assert len(flat(a)) > 100 and last_lines(a) == last_lines(b)


@pytest.mark.parametrize("ssl", ["mae", "simdino"])
def test_four_steps_are_two_plus_two(mixed_cache, tmp_path, ssl):
    run(mixed_cache, tmp_path / "once", "--max-steps", "4", ssl=ssl)
    run(mixed_cache, tmp_path / "twice", "--max-steps", "2", ssl=ssl)
    assert state_of(tmp_path / "twice")["step"] == 2
    run(mixed_cache, tmp_path / "twice", "--max-steps", "4", ssl=ssl)
    assert_same_run(tmp_path / "once", tmp_path / "twice")
    log = log_of(tmp_path / "once")
    assert [x["step"] for x in log] == [1, 2, 3, 4] and len({x["modality"] for x in log}) == 3
    assert all(np.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in log)
    parts = {"mae": {"mse"},
             "simdino": {"alignment", "coding_rate", "rate_max", "effective_rank", "gamma"}}
    assert parts[ssl] | {"lr", "samples_per_s", "data_wait", "peak_memory_gb", "epoch"} <= log[0].keys()
    assert not (tmp_path / "once" / "DONE").exists()


def test_two_ranks(mixed_cache, tmp_path):
    """Two processes resume bit for bit, log what one would, and may become one and two again."""
    run(mixed_cache, tmp_path / "once", "--max-steps", "2", ssl="simdino", ranks=2)
    run(mixed_cache, tmp_path / "twice", "--max-steps", "1", ssl="simdino", ranks=2)
    quiet = run(mixed_cache, tmp_path / "twice", "--max-steps", "2", ssl="simdino", ranks=2)
    assert_same_run(tmp_path / "once", tmp_path / "twice")
    assert "Warning" not in quiet.stderr, quiet.stderr
    # one process with the joint batch: other random numbers, the same plan, a rate over as many samples
    joint = ["--batch-size", "8", "--batch-size-3d", "4"]
    run(mixed_cache, tmp_path / "one", "--max-steps", "2", *joint, ssl="simdino")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "once"), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] for k in ("step", "modality", "rate_max", "gamma", "lr"))
    # alone, an epoch has twice as many steps: 2 of 8 have become 4 of 16
    done = run(mixed_cache, tmp_path / "twice", "--max-steps", "5", ssl="simdino")
    assert "step 2 of 8 becomes step 4 of 16" in done.stdout and state_of(tmp_path / "twice")["step"] == 5
    assert [x["step"] for x in log_of(tmp_path / "twice")] == [1, 2, 5]
    done = run(mixed_cache, tmp_path / "twice", "--max-steps", "3", ssl="simdino", ranks=2)
    assert done.stdout.count("step 5 of 16 becomes step 2 of 8") == 1  # said by the first process alone


def start_and_wait(cache, out, lines, *more, **options):
    """Start a long run and return its process once the log has so many lines."""
    process = subprocess.Popen(
        command(cache, out, "--epochs", "500", *more, **options), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup has it ignored
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < lines:
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_whole_group_saves_too(mixed_cache, tmp_path, number):
    """As schedulers and Ctrl-C send it: to the loader processes as well, which must outlive it."""
    process = start_and_wait(mixed_cache, tmp_path / "run", 3, "--workers", "2")
    os.killpg(process.pid, number)
    assert process.wait(60) == 0, process.stderr.read()
    assert state_of(tmp_path / "run")["step"] == log_of(tmp_path / "run")[-1]["step"]


def test_signal_to_one_rank_stops_both_at_the_same_step(mixed_cache, tmp_path):
    out = tmp_path / "run"
    process = start_and_wait(mixed_cache, out, 3, ranks=2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGUSR1)
    assert process.wait(60) == 0, process.stderr.read()
    assert state_of(out)["step"] == log_of(out)[-1]["step"]


def test_kill_9_loses_nothing(mixed_cache, tmp_path):
    """Killed while saving after every step, the run ends as one never disturbed."""
    out = tmp_path / "killed"
    process = start_and_wait(mixed_cache, out, 3, "--save-minutes", "0", "--max-steps", "5")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(mixed_cache, out, "--epochs", "500", "--save-minutes", "0", "--max-steps", "5")
    run(mixed_cache, tmp_path / "whole", "--epochs", "500", "--save-minutes", "0", "--max-steps", "5")
    assert_same_run(out, tmp_path / "whole")


def test_a_second_training_in_the_same_folder_is_refused(mixed_cache, tmp_path):
    process = start_and_wait(mixed_cache, tmp_path / "run", 1)
    again = command(mixed_cache, tmp_path / "run", "--epochs", "500")
    second = subprocess.run(again, capture_output=True, text=True)
    assert second.returncode == 1 and "another training" in second.stderr.splitlines()[-1]
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0, process.stderr.read()


def test_a_damaged_checkpoint_is_named_and_left_alone(mixed_cache, tmp_path):
    out = tmp_path / "run"
    run(mixed_cache, out, "--max-steps", "1")
    half = (out / "checkpoint.pt").read_bytes()[:1000]
    (out / "checkpoint.pt").write_bytes(half)
    failed = run(mixed_cache, out, check=False)
    assert failed.returncode == 1 and "checkpoint.pt is damaged" in failed.stderr
    assert (out / "checkpoint.pt").read_bytes() == half


def test_the_checkpoint_keeps_the_ids_it_was_trained_on(mixed_cache, tmp_path):
    run(mixed_cache, tmp_path / "run", "--max-steps", "1", "--modalities", "xray", "ct")
    rows = [row for row in train.read_samples(mixed_cache) if row["modality"] in ("xray", "ct")]
    ids = state_of(tmp_path / "run")["ids"]
    assert ids.dtype == torch.int64
    assert {i % 2**64 for i in ids.tolist()} == {int(row["id"], 16) for row in rows} and len(rows) == 16


def ids_of(*caches):
    return {int(row["id"], 16) for cache in caches for row in train.read_samples(cache)}


def seen(out):
    return {i % 2**64 for i in state_of(out)["ids"].tolist()}


def test_a_run_that_starts_from_another_has_seen_its_samples_too(tmp_path):
    a, b, c = (write_cache(tmp_path / name, {"xray": (1, 32, 32, 1)}, seed=i) for i, name in enumerate("abc"))
    run(a, tmp_path / "first", "--max-steps", "1")
    start = ["--init", tmp_path / "first" / "checkpoint.pt"]
    run(b, tmp_path / "second", "--max-steps", "1", *start)
    assert seen(tmp_path / "second") == ids_of(a, b) and state_of(tmp_path / "second")["ids_known"] is True
    shutil.rmtree(tmp_path / "first")  # what it started from is not needed any more
    run(c, tmp_path / "second", "--max-steps", "2", *start)
    assert seen(tmp_path / "second") == ids_of(a, b, c) and state_of(tmp_path / "second")["step"] == 2
    forgotten = run(c, tmp_path / "second", check=False)
    assert forgotten.returncode == 1 and "--init" in forgotten.stderr


def test_what_a_foreign_network_has_seen_is_not_known(mixed_cache, tmp_path):
    state = {name: value for name, value in ViT("vit_t", cls_token=False).state_dict().items()}
    torch.save(state, tmp_path / "foreign.pt")
    run(mixed_cache, tmp_path / "run", "--max-steps", "1", "--init", tmp_path / "foreign.pt")
    assert state_of(tmp_path / "run")["ids_known"] is False and seen(tmp_path / "run") == ids_of(mixed_cache)
    run(mixed_cache, tmp_path / "run", "--max-steps", "2", "--init", tmp_path / "foreign.pt")
    assert state_of(tmp_path / "run")["ids_known"] is False
    run(mixed_cache, tmp_path / "next", "--max-steps", "1", "--init", tmp_path / "run" / "checkpoint.pt")
    assert state_of(tmp_path / "next")["ids_known"] is False


def test_a_killed_loader_process_ends_the_run_with_one_line(mixed_cache, tmp_path):
    process = start_and_wait(mixed_cache, tmp_path / "run", 3, "--workers", "2")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "lower --workers" in errors.splitlines()[-1]


def test_a_cpu_computes_in_fp32_unless_told_otherwise(mixed_cache, tmp_path, monkeypatch):
    # no rule looks at the processor
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    run(mixed_cache, tmp_path / "plain", "--max-steps", "1")
    run(mixed_cache, tmp_path / "fp32", "--max-steps", "1", "--precision", "fp32")
    run(mixed_cache, tmp_path / "bf16", "--max-steps", "1", "--precision", "bf16")
    losses = {name: log_of(tmp_path / name)[0]["loss"] for name in ("plain", "fp32", "bf16")}
    assert losses["plain"] == losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    other = run(mixed_cache, tmp_path / "bf16", check=False)
    assert other.returncode == 1 and "--precision bf16: repeat that" in other.stderr


def test_checkpoints_are_written_by_the_clock_and_at_the_end(mixed_cache, tmp_path, monkeypatch):
    """Not after every epoch, which may be seconds long."""
    written = []
    monkeypatch.setattr(train, "save_run", lambda path, *state: written.append(path.name))
    xrays = ["--modalities", "xray", "--epochs", "3"]
    run(mixed_cache, tmp_path / "a", *xrays)  # 6 steps
    run(mixed_cache, tmp_path / "b", *xrays, "--keep-every", "2")
    run(mixed_cache, tmp_path / "c", *xrays, "--save-minutes", "0")
    assert written == ["checkpoint.pt", "epoch_0002.pt", *["checkpoint.pt"] * 7]


def test_training_says_what_it_sees_and_leaves_the_demo_out(mixed_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "cache" / "demo", {"xray": (1, 32, 32, 1)}, seed=3)
    done = train_here("--max-steps", "1")
    assert "training on cache/mixed: 8 ct" in done.stdout and "demo" not in done.stdout
    shutil.rmtree(mixed_cache)
    assert "training on cache/demo: 8 xray" in train_here("--max-steps", "1", "--out", "alone").stdout


def test_presets_print_what_they_set_and_flags_go_before_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "demo", "--epochs", "2"])
    args = train.parse_arguments()
    assert (args.arch, args.epochs, args.gamma, args.momentum) == ("vit_xs", 2, 0.0078, 0.9)
    assert "--momentum 0.9" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_arguments()
    assert (args.arch, args.epochs, args.gamma, args.momentum) == ("vit_b", 300, None, 0.996)  # Sec. 3.3, 3.4


def test_whole_run_ends_with_done_and_kept_epochs(mixed_cache, tmp_path):
    out = tmp_path / "run"
    run(mixed_cache, out, "--keep-every", "1", "--modalities", "xray")
    names = {path.name for path in out.iterdir()}
    assert {"DONE", "checkpoint.pt", "epoch_0001.pt", "epoch_0002.pt", "log.jsonl"} <= names
    assert [torch.load(out / f"epoch_000{i}.pt", weights_only=True)["step"] for i in (1, 2)] == [2, 4]
    assert {x["modality"] for x in log_of(out)} == {"xray"}
    again = run(mixed_cache, out, "--modalities", "xray", "--keep-every", "3")
    assert "4 of 4 steps; none skipped" in again.stdout


def test_non_finite_steps_are_skipped_then_stop_with_the_facts(mixed_cache, tmp_path):
    for file in mixed_cache.glob("*.npy"):
        np.save(file, np.full(np.load(file).shape, np.nan, np.float16))
    out = tmp_path / "run"
    failed = run(mixed_cache, out, "--epochs", "20", check=False)
    assert failed.returncode == 1
    assert re.search(r"step 10: 10 non-finite .*mse.*samples [0-9a-f]{16}", failed.stderr)
    assert "Traceback" not in failed.stderr and failed.stderr.splitlines()[-1].startswith("train.py: step 10")
    assert sum(x["skipped"] for x in log_of(out)) == 10
    assert log_of(out)[-1]["loss"] is None and "NaN" not in (out / "log.jsonl").read_text()  # strict JSON
    # One such step is saved: the weights are the old, good ones.
    short = run(mixed_cache, tmp_path / "short", "--max-steps", "1")
    assert state_of(tmp_path / "short")["step"] == 1
    assert "1 of 16 steps; 1 skipped (not finite)" in short.stdout


def test_wrong_use_is_one_line(mixed_cache, tmp_path):
    run(mixed_cache, tmp_path / "run", "--max-steps", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    cases = [([mixed_cache, tmp_path / "run", "--lr", "1e-2"], 1, "made with --lr 0.001:"),
             ([mixed_cache, tmp_path / "new", "--batch-size", "64"], 1, "--batch-size 8"),
             ([mixed_cache, tmp_path / "new", "--batch-size-3d", "64"], 1, "--batch-size-3d 8"),
             ([tmp_path / "missing", tmp_path / "new"], 1, "missing"),
             ([tmp_path / "empty", tmp_path / "new"], 1, "empty"),
             ([mixed_cache, tmp_path / "new", "--init", tmp_path / "text.pt"], 1, "text.pt"),
             ([mixed_cache, tmp_path / "run", "--init", checkpoint], 1, "made without --init:"),
             ([mixed_cache, tmp_path / "text.pt" / "new"], 1, "text.pt"),
             ([mixed_cache, tmp_path / "new", "--patch-size", "32"], 1, "no patch is left to hide"),
             ([mixed_cache, tmp_path / "new", "--patch-size", "17"], 2, "patch-size"),
             *(([mixed_cache, tmp_path / "new", flag, value], 2, flag) for flag, value in (
                 ("--lr", "nan"), ("--lr", "-1"), ("--momentum", "1.5"), ("--workers", "-1"),
                 ("--epochs", "0"))),
             ([mixed_cache, tmp_path / "new", "--data-fraction", "1.5"], 2, "data-fraction")]
    for args, code, words in cases:
        failed = run(*args, check=False)
        assert failed.returncode == code and words in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr, failed.stderr
        assert code == 2 or failed.stderr.strip().splitlines()[-1].startswith("train.py: "), failed.stderr
    for truncated in mixed_cache.glob("*.npy"):
        truncated.write_bytes(truncated.read_bytes()[:50])
    loading = command(mixed_cache, tmp_path / "new", "--workers", "1")
    failed = subprocess.run(loading, capture_output=True, text=True)
    assert failed.returncode == 1 and ".npy" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr, failed.stderr


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="lower --nproc_per_node"):
        train.main()


def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise():
    """Beside other programs, two threads that spin long took many times as long as one."""
    show = "import train; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    cases = ({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")
    for given, spins in cases:
        told = subprocess.run([sys.executable, "-c", show], cwd=ROOT, env=environment | given,
                              capture_output=True, text=True)
        assert told.stdout.strip() == spins
    source = (ROOT / "train.py").read_text()
    assert source.index("GOMP_SPINCOUNT") < source.index("import torch")


def test_every_flag_is_read_and_advised():
    source = (ROOT / "train.py").read_text()
    names = re.findall(r'flag\("--([a-z0-9-]+)"', source)
    assert len(names) > 10
    for name in names:
        assert len(re.findall(rf"args\.{name.replace('-', '_')}\b", source)) >= 1, name
    assert source.count("help=") == len(names)


@pytest.mark.parametrize("patch, ssl, views", [("8", "mae", "2"), ("32", "simdino", "0")])
def test_ablation_flags(mixed_cache, tmp_path, patch, ssl, views):
    out = tmp_path / "run"
    run(mixed_cache, out, "--max-steps", "1", "--patch-size", patch, "--local-views", views, "--seed", "1",
        "--gamma", "0.01", "--momentum", "0.99", ssl=ssl)
    assert state_of(out)["config"]["patch_size"] == [int(patch), int(patch), 4]
    if ssl == "simdino":
        given = {"local_views": int(views), "gamma": 0.01, "momentum": 0.99, "eps": 0.5}
        assert state_of(out)["method"] == given
