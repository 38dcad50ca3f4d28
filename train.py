"""Pretraining (paper Sec. 3.4), by MAE or SimDINO: caches of several modalities -> a checkpoint.

    python train.py --ssl simdino                                    # one process, CPU or GPU
    torchrun --nproc_per_node=16 train.py --ssl mae                  # one process per GPU

All that a step does follows from (seed, step, rank), so that the same command again goes on as if
it had never stopped. Writes to runs/NAME/: checkpoint.pt; log.jsonl, a line for every step, with
the loss of the first process (if a step was done twice, the later line counts); and DONE at the
end. `fit` is the training loop.
"""
import argparse
import contextlib
import fcntl
import functools
import json
import math
import os
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import NamedTuple

# A thread that waits for others spins for a moment and then sleeps. By default it spins long, which
# takes the processor on a busy machine from the very thread that it waits for; to sleep at once is
# slow on an idle one. GNU's OpenMP reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from mae import MAE
from model import (ARCHS, PATCH_SIZE, Block, ViT, as_user_error, init_from_2d, read_checkpoint,
                   sample_kind, save_checkpoint, stack, take_frames_at_random, unit)
from prepare import MODALITIES, CachedDataset, UserError, cli, read_samples
from simdino import DROP_PATH, LOCAL_VIEWS_2D, MOMENTUM, SimDINO, cosine

PAPER_MODALITIES = ["xray", "ultrasound", "endoscopy", "ct"]  # Sec. 3.4
WARMUP_EPOCHS = 10  # Sec. 3.4, of 300 epochs
# CHOICE: the warm-up takes a tenth of the run at most, so that short runs reach the peak rate too.
WARMUP_SHARE = 0.1
MAX_BAD_STEPS = 10  # non-finite steps in a row before the run stops

# A run resumes only with the flags that it was started with, except for these.
RESUME_MAY_CHANGE = {"preset", "data", "out", "workers", "max_steps", "save_minutes", "keep_every"}

# Samples of these splits are never pretrained on: evaluation may query them.
HELD_OUT = ("val", "test")

# A small network for minutes on a CPU. The gamma is (d + m) / (d m) for d = 256 and the paper's
# m = 256 volumes a step. The low momentum makes the teacher follow quickly (docs/learning.md).
SMALL = dict(arch="vit_xs", patch_size=8, batch_size=48, local_views=2, gamma=0.0078, momentum=0.9)
PRESETS = {"demo": SMALL | dict(batch_size_3d=48, epochs=80), "small": SMALL}

# Random numbers for different purposes have different seeds: seed_of(--seed, one of these, ...).
FOR_WEIGHTS = 0
FOR_DROP_PATH = 1
FOR_INPUTS = 2  # masks and views
FOR_FRAMES = 3  # of videos


# ---- schedule -----------------------------------------------------------------------------------
class Group(NamedTuple):
    """The samples of one modality and one shape: they can share a batch."""

    modality: str
    shape: tuple  # (C, H, W, S)
    members: list  # row numbers
    size: int  # of a global batch


class Step(NamedTuple):
    """What one optimizer update is computed on."""

    modality: str
    numbers: list  # row numbers of the global batch
    own: list  # those of them that this rank takes


def seed_of(*numbers):
    """One 64-bit seed from several small numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def plan_epoch(groups, seed, epoch):
    """The steps of one epoch in order, [(modality, row numbers)], from (seed, epoch) alone.

    A group is shuffled and cut into k whole batches; what is left over waits for another epoch.
    Batch i is due at (i + u) / k of the epoch, with one random u for the group: four batches with
    u = 0.5 are due at 0.125, 0.375, 0.625 and 0.875. So each group is spread evenly over the epoch,
    and modalities alternate (Sec. 3.4) in proportion to their batches. One can still come twice in
    a row: at the paper's sizes, 5 % of the steps have the modality of the step before.
    """
    due = []
    for g, group in enumerate(groups):
        rng = np.random.default_rng([seed, epoch, g])  # the same on every rank
        order = rng.permutation(group.members).tolist()
        u = rng.random()
        k = len(order) // group.size
        for i in range(k):
            batch = order[i * group.size:(i + 1) * group.size]
            due.append(((i + u) / k, g, batch))

    due.sort()
    return [(groups[g].modality, batch) for _, g, batch in due]


def flag_name(key):
    """The name of a value in args -> its flag, as typed: save_minutes -> --save-minutes."""
    return "--" + key.replace("_", "-")


def make_groups(rows, args, world=1, verbose=True):
    """Rows -> the groups that fill a global batch. UserError if a modality has none of them."""
    # The samples of a batch are stacked: they have one modality and one shape.
    by_shape = defaultdict(list)
    for number, row in enumerate(rows):
        by_shape[row["modality"], row["shape"]].append(number)

    groups = []
    left_out = []
    for (modality, shape), members in by_shape.items():
        volume = sample_kind(shape) == "volume"
        per_process = args.batch_size_3d if volume else args.batch_size
        size = world * per_process  # CHOICE: Sec. 3.4 gives 16 and 32, which we read as per GPU
        group = Group(modality, shape, members, size)
        if len(members) >= size:
            groups.append(group)
        else:
            left_out.append(group)

    # A group that fills no batch is left out, but not if its modality has no other. The largest
    # comes first, so that the error names the largest batch that would do.
    filled = {group.modality for group in groups}
    for group in sorted(left_out, key=lambda group: len(group.members), reverse=True):
        if group.modality not in filled:
            raise UserError(too_few(group, world))
        if verbose:
            shape = "x".join(map(str, group.shape))
            print(f"left out: {len(group.members)} {group.modality} samples of shape {shape}, "
                  f"fewer than the {group.size} that a step takes")
    return groups


def too_few(group, world):
    """What is wrong with the largest group of a modality, and the flag that mends it."""
    flag = "--batch-size-3d" if sample_kind(group.shape) == "volume" else "--batch-size"
    found = len(group.members)
    remedy = "leave it out with --modalities"
    if found >= world:
        remedy = f"{flag} {found // world}, or {remedy}"
    return (f"{group.modality} has {found} samples of one shape, a step takes {group.size}: "
            f"{remedy}")


class Schedule:
    """Which samples a step takes, as a pure function: every rank knows the batches of all ranks."""

    def __init__(self, rows, args, rank=0, world=1):
        self.rows = rows
        self.rank = rank
        self.world = world
        self.seed = args.seed
        self.groups = make_groups(rows, args, world, verbose=rank == 0)

        self.per_epoch = len(self.plan(0))  # steps
        self.total = args.epochs * self.per_epoch  # optimizer updates of the run
        warmup = min(WARMUP_EPOCHS * self.per_epoch, WARMUP_SHARE * self.total)
        self.warmup = max(1, round(warmup))

    @functools.lru_cache(maxsize=2)  # the loader may be one epoch ahead of the log
    def plan(self, epoch):
        return plan_epoch(self.groups, self.seed, epoch)

    def batch(self, step):
        """Step number -> Step."""
        modality, numbers = self.plan(step // self.per_epoch)[step % self.per_epoch]
        share = len(numbers) // self.world  # exact: a global batch is world times it
        own = numbers[self.rank * share:(self.rank + 1) * share]
        return Step(modality, numbers, own)


def learning_rate(step, total, warmup, peak):
    """Of step 0 .. total - 1: linear warm-up to the peak, then half a cosine (Sec. 3.4).

    The cosine would reach 0 at step `total`, right after the last. CHOICE: the first step has
    1 / warmup of the peak. Both official codes start at 0, and SimDINO's cosine ends at 1e-6.
    """
    if step < warmup:
        return peak * (step + 1) / warmup  # step warmup - 1 has the peak
    return cosine(peak, 0, (step - warmup) / (total - warmup))


# ---- data, method, optimizer --------------------------------------------------------------------
def read_caches(folders):
    """Rows of all caches. UserError if two names are one cache: its samples would count twice."""
    rows = []
    names = {}
    for folder in folders:
        path = os.path.realpath(folder)
        if path in names:
            raise UserError(f"--data: {names[path]} and {folder} are one cache; name it once")
        names[path] = folder
        rows.extend(read_samples(folder))
    return rows


def select_rows(folders, modalities, fraction, verbose=True):
    """Rows of the caches that pretraining may see: of these modalities, none of HELD_OUT.

    An id is one sample. Where caches share it (RadGenome has volumes of CT-RATE), it is trained on
    once, as the first of them has it, and not at all if any of them holds it out.
    `fraction` of each modality is taken; a larger share contains a smaller one (Sec. 4.4).
    UserError if a cache or a modality is named twice, or if nothing is left.
    """
    if len(set(modalities)) < len(modalities):
        raise UserError(f"--modalities {' '.join(modalities)}: name each of them once")
    rows = read_caches(folders)

    # An id is held out of all caches if it is of one; else the row of the first cache is kept.
    held_out_ids = {row["id"] for row in rows if row["split"] in HELD_OUT}
    rows = [row for row in rows if row["modality"] in modalities]
    by_id = {}
    for row in rows:
        if row["id"] not in held_out_ids:
            by_id.setdefault(row["id"], row)
    if verbose:
        report_rows(rows, modalities, held_out_ids, by_id)

    # Ids are hashes: sorted by them, samples are in random order, the same one in every run.
    ordered = sorted(by_id.values(), key=lambda row: row["id"])
    chosen = []
    for modality in modalities:
        group = [row for row in ordered if row["modality"] == modality]
        chosen.extend(group[:math.ceil(fraction * len(group))])

    if not chosen:
        raise UserError(f"{', '.join(map(str, folders))}: no {' or '.join(modalities)} samples "
                        "outside split val and test; prepare some, or name others with --data and "
                        "--modalities")
    return chosen


def report_rows(rows, modalities, held_out_ids, by_id):
    """Print which samples are kept out of training, and which of the others a task would query."""
    kept_out = Counter(row["folder"] for row in rows if row["id"] in held_out_ids)
    for folder, n in kept_out.items():
        print(f"kept out of training: {n} samples of {folder}, of split val or test")

    absent = sorted(set(modalities) - {row["modality"] for row in rows})
    if absent:
        print(f"note: no samples of {', '.join(absent)} in --data")

    repeated = len(rows) - sum(kept_out.values()) - len(by_id)
    if repeated:
        print(f"trained on once: {repeated} samples that an earlier cache of --data has too")

    unsplit = Counter(row["folder"] for row in by_id.values() if not row["split"])
    for folder, n in unsplit.items():
        print(f"note: {n} samples of {folder} have no split: they are trained on, and "
              "evaluate.py --task cross_modal would query them")


def build_method(args, device, init=None):
    """The method that the flags name, on the device; on a GPU its blocks are compiled.

    The encoder starts from the file `init`, if there is one. Returns the method, and the ids of the
    samples that the network of the file was trained on: an empty tensor without a file, None if the
    file does not tell.
    """
    torch.manual_seed(seed_of(args.seed, FOR_WEIGHTS))
    patch_size = (args.patch_size, args.patch_size, PATCH_SIZE[-1])

    # Only SimDINO has a CLS token (Sec. 3.3) and stochastic depth.
    simdino = args.ssl == "simdino"
    encoder = ViT(args.arch, patch_size, cls_token=simdino, drop_path=DROP_PATH if simdino else 0.0)
    init_ids = torch.empty(0, dtype=torch.int64)
    if init:
        init_ids = init_from_2d(encoder, init)

    if simdino:
        method = SimDINO(encoder, args.local_views, args.gamma, args.momentum)
    else:
        method = MAE.for_encoder(encoder)

    if device.type == "cuda":
        # Each shape has its graphs, with and without gradients: far fewer than this limit.
        torch._dynamo.config.recompile_limit = 64
        for module in method.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    return method.to(device), init_ids


def make_optimizer(method):
    """Fused AdamW with two groups: weights decay, and biases, norms and tokens do not.

    CHOICE: tokens do not decay. Both official codes let them.
    """
    decay = []
    no_decay = []
    for name, p in method.named_parameters():
        if not p.requires_grad:  # the teacher's
            continue
        if p.ndim < 2 or name.endswith("_token"):
            no_decay.append(p)
        else:
            decay.append(p)

    groups = [{"params": decay}, {"params": no_decay}]
    return torch.optim.AdamW(groups, betas=method.BETAS, weight_decay=0.0, fused=True)


def set_rates(optimizer, method, lr, progress):
    """Set the learning rate of both groups, and the weight decay of the one that decays."""
    decay_group, no_decay_group = optimizer.param_groups
    decay_group["lr"] = lr
    no_decay_group["lr"] = lr
    decay_group["weight_decay"] = cosine(*method.WEIGHT_DECAY, progress)


# ---- checkpoints --------------------------------------------------------------------------------
def list_differences(old_flags, new_flags):
    """How an earlier run was made otherwise: ["with --lr 0.001", "without --init"], for example."""
    differences = []
    for key, value in new_flags.items():
        old = old_flags.get(key)
        if old == value:
            continue
        if old is None:
            differences.append(f"without {flag_name(key)}")
        elif isinstance(old, list):
            differences.append(f"with {flag_name(key)} {' '.join(map(str, old))}")
        else:
            differences.append(f"with {flag_name(key)} {old}")
    return differences


def describe_run(args, method, schedule, init_ids):
    """What a checkpoint says about its run, besides weights and steps: tensors and plain values."""
    flags = {key: value for key, value in vars(args).items() if key not in RESUME_MAY_CHANGE}
    if args.init:
        flags["init"] = "FILE"  # that there was one: it may have moved when the run resumes

    # Ids have 64 bits; they are kept as int64, since torch has little arithmetic for uint64.
    ids = torch.tensor([int(row["id"], 16) for row in schedule.rows], dtype=torch.uint64)
    ids = ids.view(torch.int64)
    if init_ids is not None:
        ids = torch.cat([ids, init_ids]).unique()
    return {"ssl": args.ssl, "method": method.config, "world": schedule.world,
            "total": schedule.total, "flags": json.dumps(flags),
            "ids": ids, "ids_known": init_ids is not None}


def resume(path, run_info, method, optimizer, rank):
    """Load a checkpoint into method and optimizer -> the number of steps that are done.

    The ids that it was trained on are added to those of run_info: this run goes on from them.
    """
    state = read_checkpoint(path)
    with as_user_error(path, "is damaged or does not fit: choose another --out"):
        # A UserError passes through as_user_error unchanged.
        differences = list_differences(json.loads(state["flags"]), json.loads(run_info["flags"]))
        if differences:
            raise UserError(f"{path} was made {', '.join(differences)}: repeat that, or choose "
                            "another --out")

        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run_info["ids"] = torch.cat([state["ids"], run_info["ids"]]).unique()
        run_info["ids_known"] = state.get("ids_known", True)

        # With another number of processes, or other data, the run has another length; the same
        # share of it is done.
        old_total = state["total"]
        new_total = run_info["total"]
        done = state["step"] * new_total // old_total
        if rank == 0 and old_total != new_total:
            print(f"processes or data changed: step {state['step']} of {old_total} becomes "
                  f"step {done} of {new_total}")
    return done


def save_run(path, run_info, method, optimizer, step):
    """Write all that a run goes on from. Random numbers follow from the step and need no state."""
    save_checkpoint(path, method.encoder, **run_info, model=method.state_dict(),
                    optimizer=optimizer.state_dict(), step=step)


# ---- training loop ------------------------------------------------------------------------------
def any_rank(*flags):
    """n scalar bool tensors -> (n,) bool: which are True on any rank, in one small all-reduce."""
    votes = torch.stack(flags).int()  # (n,)
    if dist.is_initialized():
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return votes.bool()


def read_numbers(values):
    """Scalars by name, tensors or plain numbers -> the same as floats.

    All tensors come from the device in one transfer: one for each would wait for it each time.
    """
    names = [name for name, value in values.items() if torch.is_tensor(value)]
    numbers = torch.stack([values[name].detach().float() for name in names]).tolist()
    return values | dict(zip(names, numbers))


def catch_signals():
    """A list, to which from now on signals add themselves instead of ending the process."""
    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup asks for this
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def leave_process_group(worker):
    """Keep Ctrl-C from a loader process: training needs it until its last step is done."""
    os.setpgrp()


def make_batch(samples):
    """Samples (C, H, W, S) -> (B, C, H, W, S), which a loader process puts into shared memory.

    Done here, a full /dev/shm is an error of the loader, which is reported. The queue, which else
    would do it, loses that error.
    """
    batch = stack(samples)
    if get_worker_info():
        batch.share_memory_()
    return batch


class TrainingSamples(CachedDataset):
    """Samples (C, H, W, S) as cached; videos are cut to the frames of one step (Algorithm 2).

    That is done in the loader, so that only a quarter of a video is moved from there.
    """

    def __getitem__(self, item):
        number, seed = item  # of the row, and of the frames
        x = super().__getitem__(number)[None]  # (1, C, H, W, S)
        return take_frames_at_random(x, torch.Generator().manual_seed(seed))[0]


def draw_items(schedule, start, stop):
    """What this rank reads for each step, start to stop - 1: [(row number, seed of frames)]."""
    for step in range(start, stop):
        numbers = schedule.batch(step).own
        items = []
        for number in numbers:
            items.append((number, seed_of(schedule.seed, FOR_FRAMES, step, number)))
        yield items


def make_loader(args, schedule, start, stop, device):
    """This rank's batches of the steps start .. stop - 1, each (B, C, H, W, S) on the CPU."""
    # Each list of items is a batch, and each item an argument of TrainingSamples.__getitem__.
    items = draw_items(schedule, start, stop)
    return DataLoader(TrainingSamples(schedule.rows), batch_sampler=items, collate_fn=make_batch,
                      num_workers=args.workers, worker_init_fn=leave_process_group,
                      pin_memory=device.type == "cuda")


def copy_ahead(loader, device):
    """Batches on the device. On a GPU, each is copied while the step before it computes."""
    if device.type != "cuda":
        for batch in loader:
            yield batch.to(device)
        return

    # A batch is copied on a stream of its own, which starts before the batch that is ready is used.
    copying = torch.cuda.Stream()
    ready = None
    for batch in loader:
        with torch.cuda.stream(copying):
            batch = batch.to(device, non_blocking=True)
        if ready is not None:
            yield ready
        torch.cuda.current_stream().wait_stream(copying)
        # Its memory is free only when the step that uses it is done.
        batch.record_stream(torch.cuda.current_stream())
        ready = batch
    if ready is not None:
        yield ready


class Log:
    """log.jsonl, one line a step, and the progress bar; only the first rank writes them."""

    def __init__(self, args, schedule, bar):
        self.bar = bar
        path = args.out / "log.jsonl" if schedule.rank == 0 else os.devnull
        self.file = open(path, "a", buffering=1)
        self.schedule = schedule
        self.skipped = []  # whether each step was

    def write(self, step, values, seconds, waited):
        """Log a step's numbers; it took `seconds`, and `waited` of them for the loader.

        UserError if this was one of too many steps in a row that were skipped.
        """
        modality, numbers, _ = self.schedule.batch(step)
        # The peak so far, in bytes: of the GPU, or of this process on a CPU.
        memory = getrusage(RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()

        # Steps are counted from 1, as those that are done; epochs from 0, as the one at work.
        record = {"step": step + 1, "epoch": step // self.schedule.per_epoch, "modality": modality}
        for name, value in values.items():
            record[name] = value if math.isfinite(value) else None  # JSON has no NaN
        record["samples_per_s"] = len(numbers) / seconds
        record["data_wait"] = waited / seconds  # share of the step
        record["peak_memory_gb"] = memory / 2**30
        self.file.write(json.dumps(record) + "\n")
        self.bar.set_postfix_str(f"{modality} loss {values['loss']:.4f}", refresh=False)

        # Nothing is learned any more where so many steps in a row were skipped.
        self.skipped.append(bool(values["skipped"]))
        if sum(self.skipped[-MAX_BAD_STEPS:]) == MAX_BAD_STEPS:
            names = " ".join(self.schedule.rows[number]["id"] for number in numbers)
            raise UserError(f"step {step + 1}: {MAX_BAD_STEPS} non-finite steps in a row, {record} "
                            f"on {modality} samples {names}: look at these, or lower --lr")


@contextlib.contextmanager
def naming_the_remedy():
    """Inside, errors of loader processes and of torch.compile become a UserError with a remedy."""
    try:
        yield
    except (RuntimeError, subprocess.CalledProcessError) as error:
        text = str(error).strip()
        first = text.split("\n")[0]
        last = text.split("\n")[-1]

        # Compiling starts gcc; what it lacks comes as an error of the compiler or of the command.
        compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if compiler or "C compiler" in text or isinstance(error, subprocess.CalledProcessError):
            raise UserError(f"torch.compile failed ({first}): install gcc and Python's headers, or "
                            "set TORCH_COMPILE_DISABLE=1") from None

        for symptom in ("is killed by signal", "exited unexpectedly", "shared memory"):
            if symptom in text:
                raise UserError(f"a loader process failed ({last}): free memory or /dev/shm, or "
                                "lower --workers") from None
        raise


def fit(args, run_info, method, optimizer, schedule, start, device):
    """Train from step `start` on -> how many steps are done, and how many of them were skipped."""
    is_main = schedule.rank == 0
    stop = min(schedule.total, args.max_steps or schedule.total)  # schedules still span the total
    model = method
    if schedule.world > 1:
        model = nn.parallel.DistributedDataParallel(method, gradient_as_bucket_view=True)

    # A signal lets the step end; then all leave.
    signals = catch_signals()
    batches = copy_ahead(make_loader(args, schedule, start, stop, device), device)
    bar = tqdm(batches, initial=start, total=stop, unit="step", smoothing=0.05, disable=not is_main)
    log = Log(args, schedule, bar)
    keep_steps = args.keep_every * schedule.per_epoch
    next_save = time.monotonic() + 60 * args.save_minutes
    clock = time.monotonic()
    with log.file, bar:
        for step, batch in enumerate(bar, start):  # batch (B, C, H, W, S), uint8 or float16
            waited = time.monotonic() - clock  # for the loader
            progress = step / schedule.total
            lr = learning_rate(step, schedule.total, schedule.warmup, args.lr)
            set_rates(optimizer, method, lr, progress)

            # All that is random here follows from (seed, step, rank).
            torch.manual_seed(seed_of(args.seed, FOR_DROP_PATH, step, schedule.rank))
            input_seed = seed_of(args.seed, FOR_INPUTS, step, schedule.rank)
            generator = torch.Generator().manual_seed(input_seed)
            x = unit(batch)  # (B, C, H, W, S) in [0, 1]
            inputs = method.make_inputs(x, generator)  # a mask, or views

            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss, parts = model(*inputs)  # a scalar, and what it is made of for the log
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # DDP averages gradients over ranks here
            norm = nn.utils.clip_grad_norm_(method.parameters(), method.CLIP_GRAD)

            # A step that is not finite is skipped. All ranks skip the same steps, and after a
            # signal to any of them all leave at one step.
            bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
            bad, signalled = any_rank(bad, torch.full_like(bad, len(signals) > 0))
            values = read_numbers({"loss": loss, **parts, "lr": lr, "grad_norm": norm,
                                   "skipped": bad, "stopping": signalled})
            stopping = values.pop("stopping")  # 1.0 or 0.0
            if not values["skipped"]:
                optimizer.step()
                method.after_step(progress)  # SimDINO: the teacher follows
            log.write(step, values, time.monotonic() - clock, waited)

            # A checkpoint is large: it is written every few minutes, and before the run ends.
            done = step + 1
            if is_main and keep_steps and done % keep_steps == 0:
                name = f"epoch_{done // schedule.per_epoch:04d}.pt"
                save_run(args.out / name, run_info, method, optimizer, done)
            if is_main and (stopping or done == stop or time.monotonic() > next_save):
                save_run(args.out / "checkpoint.pt", run_info, method, optimizer, done)
                next_save = time.monotonic() + 60 * args.save_minutes
            if stopping:
                break
            clock = time.monotonic()
    return start + len(log.skipped), sum(log.skipped)


# ---- command line -------------------------------------------------------------------------------
def within(low, high=math.inf, kind=float):
    """A reader of flags for argparse: numbers of a kind from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:  # nan neither
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value
    return number


def add_flags(parser):
    """The flags of a run, each with advice in its help."""
    flag = parser.add_argument
    natural = within(0, kind=int)
    count = within(1, kind=int)
    flag("--ssl", choices=["mae", "simdino"], default="simdino",
         help="docs/learning.md compares them")
    flag("--preset", choices=PRESETS,
         help="flags for the demo, or for a thousand small images on a CPU")
    flag("--data", nargs="+", type=Path,
         help="cache folders (default: all in cache/; demo only if alone)")
    flag("--out", type=Path,
         help="run folder (default: runs/SSL); name a new one for every experiment")
    flag("--arch", choices=ARCHS, default="vit_b", help="vit_t or vit_s for small data or a CPU")
    flag("--patch-size", type=int, choices=[8, 16, 32], default=16,
         help="in plane; 8 is finer and slower")
    flag("--epochs", type=count, default=300, help="length of the run and of its schedules")
    flag("--batch-size", type=count, default=32,
         help="images or videos per process; lower to save memory")
    flag("--batch-size-3d", type=count, default=16, help="volumes per process")
    flag("--lr", type=within(1e-9, 1), default=1e-3,
         help="peak rate; lower it if the loss turns NaN")
    flag("--modalities", nargs="+", choices=MODALITIES, default=PAPER_MODALITIES,
         help="mri and others only if named")
    flag("--data-fraction", type=within(1e-6, 1), default=1.0, help="of each modality, nested")
    flag("--local-views", type=natural, default=LOCAL_VIEWS_2D, help="simdino: of an image")
    flag("--gamma", type=within(0),
         help="simdino: weight of the coding rate (default: (d + m) / (d m), d = 256, m of a step)")
    flag("--momentum", type=within(0, 1), default=MOMENTUM, help="simdino: lower in short runs")
    flag("--init",
         help="start from a 2D ViT of the timm, DINO or MAE family, or another run's checkpoint")
    flag("--seed", type=natural, default=0, help="of all that is random; vary it to see the noise")
    flag("--workers", type=natural, default=4 if torch.cuda.is_available() else 0,
         help="loader processes")
    flag("--precision", choices=["bf16", "fp32"],
         default="bf16" if torch.cuda.is_available() else "fp32",
         help="of the networks; bf16 pays on GPUs, and for vit_t and larger on CPUs with AMX")
    flag("--max-steps", type=count, help="stop here for now; the schedules still span --epochs")
    flag("--save-minutes", type=within(0), default=15, help="save this often, and at the end")
    flag("--keep-every", type=natural, default=0,
         help="epochs; keep epoch_NNNN.pt for studies, 0: none")


def parse_arguments():
    """The flags, with those of a preset and the default folders filled in."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser)

    # A preset replaces defaults, and flags that are given override it: it is found first, and then
    # the flags are read again.
    args, _ = parser.parse_known_args()
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
    args = parser.parse_args()
    if args.preset and int(os.environ.get("RANK", 0)) == 0:
        words = [f"{flag_name(key)} {getattr(args, key)}" for key in PRESETS[args.preset]]
        print("preset:", *words)

    # The demo's phantoms are never mixed with real images: they count where there is nothing else.
    caches = sorted(file.parent for file in Path("cache").glob("*/samples.csv"))
    real = [folder for folder in caches if folder.name != "demo"]
    args.data = args.data or real or caches or [Path("cache")]
    args.out = args.out or Path("runs") / args.ssl
    return args


class Process(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    world: int  # how many there are
    device: torch.device


def set_up_process():
    """Join the other processes, if there are any. UserError if this one would have no GPU."""
    # torchrun sets these three; without it there is one process.
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))

    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"no GPU for process {local_rank} of this machine: "
                            "lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Process(rank, world, device)


def open_run(out, process):
    """Make the run folder and lock it -> whether it has a checkpoint, and the open lock file."""
    out.mkdir(parents=True, exist_ok=True)
    lock = None
    if process.rank == 0:
        lock = open(out / ".lock", "w")  # held until it is closed
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another training is at work there; "
                            "choose another --out") from None

    path = out / "checkpoint.pt"
    exists = torch.tensor(path.exists(), device=process.device)
    exists, missing = any_rank(exists, ~exists).tolist()
    if exists and missing:
        raise UserError(f"only some processes see {path}: --out must be one folder that all "
                        "nodes share")
    return exists, lock


def main():
    args = parse_arguments()
    process = set_up_process()
    rank, world, device = process

    # The samples and their order are known before the run folder is touched.
    rows = select_rows(args.data, args.modalities, args.data_fraction, verbose=rank == 0)
    schedule = Schedule(rows, args, rank, world)
    exists, lock = open_run(args.out, process)  # lock: kept until the end, closing it unlocks
    if rank == 0:
        counts = Counter((row["folder"], row["modality"]) for row in rows)
        for (folder, modality), n in sorted(counts.items()):
            print(f"training on {folder}: {n} {modality}")

    # A run that goes on has its weights from checkpoint.pt; only a new one reads --init.
    method, init_ids = build_method(args, device, init=None if exists else args.init)
    optimizer = make_optimizer(method)
    run_info = describe_run(args, method, schedule, init_ids)
    start = 0
    if exists:
        start = resume(args.out / "checkpoint.pt", run_info, method, optimizer, rank)
    with naming_the_remedy():
        done, skipped = fit(args, run_info, method, optimizer, schedule, start, device)

    if rank == 0:
        if done >= schedule.total:
            (args.out / "DONE").touch()  # what a loop that restarts a preempted run waits for
        what = f"{skipped} skipped (not finite)" if skipped else "none skipped"
        print(f"{args.out}: {done} of {schedule.total} steps; {what}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
