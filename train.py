"""Pretraining (paper Sec. 3.4): caches of several modalities -> runs/NAME/checkpoint.pt, by MAE or SimDINO.

    python train.py --ssl simdino                                    # one process, CPU or GPU
    torchrun --nproc_per_node=16 train.py --ssl mae                  # one process per GPU

All that a step does follows from (seed, step, rank), so the same command again goes on as if never stopped.
Writes runs/NAME/: checkpoint.pt; log.jsonl, a line a step, the last one counts; DONE at the end.
"""
import argparse
import fcntl
import functools
import json
import math
import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mae import MAE
from model import (ARCHS, PATCH_SIZE, Block, ViT, as_user_error, init_from_2d, read_checkpoint,
                   sample_kind, save_checkpoint, stack, take_frames_at_random, unit)
from prepare import MODALITIES, CachedDataset, UserError, cli, read_samples
from simdino import DROP_PATH, LOCAL_VIEWS_2D, MOMENTUM, SimDINO, cosine

WARMUP_EPOCHS = 10  # Sec. 3.4, of 300 epochs
WARMUP_SHARE = 0.1  # CHOICE: and at most a tenth of the run, so that short runs reach the peak rate too
MAX_BAD_STEPS = 10  # non-finite steps in a row before the run stops
FREE_FLAGS = {"preset", "data", "out", "workers", "max_steps", "save_minutes", "keep_every"}  # not the run's
# Minutes on a CPU: a small network, the gamma of the paper's 256 volumes, a quick teacher (docs/learning.md)
SMALL = dict(arch="vit_xs", patch_size=8, batch_size=48, local_views=2, gamma=0.0078, momentum=0.9)
PRESETS = {"demo": SMALL | dict(batch_size_3d=48, epochs=160), "small": SMALL}


def seed_of(*numbers):
    """One 64-bit seed from several small numbers, the same on every machine (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def plan_epoch(groups, seed, epoch):
    """The steps of one epoch, [(modality, row numbers of the global batch)], from (seed, epoch) alone."""
    # A group (modality, row numbers, batch size) is shuffled and cut into k whole batches, batch i due at
    # (i + u) / k of the epoch, u random: each group is spread evenly, and modalities alternate (Sec. 3.4).
    steps = []
    for g, (modality, members, size) in enumerate(groups):
        rng = np.random.default_rng([seed, epoch, g])  # the same on every rank
        order, u, k = rng.permutation(members).tolist(), rng.random(), len(members) // size  # rest dropped
        steps += [((i + u) / k, g, modality, order[i * size:(i + 1) * size]) for i in range(k)]
    return [(modality, numbers) for _, _, modality, numbers in sorted(steps)]


class Schedule:
    """Which samples a step takes: pure in the step, so that every rank knows every batch without talking."""

    def __init__(self, rows, args, rank=0, world=1):
        self.rows, self.rank, self.world = rows, rank, world
        alike, groups = defaultdict(list), []
        for number, row in enumerate(rows):
            alike[row["modality"], row["shape"]].append(number)  # one batch, one modality and one shape
        for (modality, shape), members in alike.items():
            volume = sample_kind(shape) == "volume"
            size = world * (args.batch_size_3d if volume else args.batch_size)  # CHOICE: both per GPU
            if len(members) >= size:
                groups.append((modality, members, size))
            elif rank == 0:
                what = f"{len(members)} {modality} samples of shape {'x'.join(map(str, shape))}"
                print(f"left out: {what}, fewer than a global batch of {size}")
        for modality in {modality for modality, _ in alike} - {modality for modality, *_ in groups}:
            raise UserError(f"too few {modality}: lower --batch-size-3d or --batch-size, or use --modalities")
        self.plan = functools.lru_cache(maxsize=2)(functools.partial(plan_epoch, groups, args.seed))
        self.per_epoch = len(self.plan(0))  # steps: every sample once, but for the last partial batches
        self.total = args.epochs * self.per_epoch  # optimizer updates
        self.warmup = max(1, round(min(WARMUP_EPOCHS * self.per_epoch, WARMUP_SHARE * self.total)))

    def batch(self, step):
        """Step -> modality, row numbers of the global batch, and of these the share of this rank."""
        modality, numbers = self.plan(step // self.per_epoch)[step % self.per_epoch]
        share = len(numbers) // self.world  # whole: batches are multiples of it
        return modality, numbers, numbers[self.rank * share:(self.rank + 1) * share]


def learning_rate(step, total, warmup, peak):
    """Of step 0 .. total - 1: linear warm-up to the peak, then half a cosine to zero (Sec. 3.4)."""
    if step < warmup:
        return peak * (step + 1) / warmup  # the last one of these is the peak
    return cosine(peak, 0, (step - warmup) / (total - warmup))


def select_rows(folders, modalities, fraction):
    """Rows of cache folders that pretraining may see: of the named modalities, never the test split."""
    rows = [row for folder in folders for row in read_samples(folder)]
    queried = {row["id"] for row in rows if row["split"] == "test"}  # RadGenome's are CT-RATE's train volumes
    rows = [row for row in rows if row["id"] not in queried]
    rows.sort(key=lambda row: (row["id"], row["folder"]))  # keyed hashes: fractions are random, nested (4.4)
    groups = [[row for row in rows if row["modality"] == modality] for modality in modalities]  # as named
    chosen = [row for group in groups for row in group[:math.ceil(fraction * len(group))]]
    if not chosen:
        raise UserError(f"{', '.join(map(str, folders))}: no {' or '.join(modalities)} samples but for the "
                        "test split; prepare some, or name others with --data and --modalities")
    return chosen


def make_optimizer(method):
    """Fused AdamW; biases, norms and tokens do not decay. CHOICE: tokens, which both official codes decay."""
    groups = [{"params": []}, {"params": []}]  # that decay, that do not
    for name, p in method.named_parameters():
        if p.requires_grad:  # the teacher's do not
            groups[p.ndim < 2 or name.endswith("_token")]["params"].append(p)
    return torch.optim.AdamW(groups, betas=method.BETAS, weight_decay=0.0, fused=True)


def resume(path, about, method, optimizer, rank):
    """Load a checkpoint -> steps done: after a change of processes or data the same share of the new run."""
    state = read_checkpoint(path)
    with as_user_error(path, "is damaged or does not fit: choose another --out"):
        old, new = json.loads(state["flags"]), json.loads(about["flags"])
        differ = [f"--{key.replace('_', '-')} {old.get(key)}" for key in new if old.get(key) != new[key]]
        if differ:
            raise UserError(f"{path} was made with {' '.join(differ)}: repeat that, or choose another --out")
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, old, new = state["step"], state["total"], about["total"]
        done = step * new // old  # the same share of the run
        if rank == 0 and (state["world"] != about["world"] or not torch.equal(state["ids"], about["ids"])):
            print(f"processes or data changed: step {step} of {old} becomes step {done} of {new}")
    return done


def any_rank(device, *flags):
    """Element-wise "or" of booleans over all ranks, in one small all-reduce."""
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # 1 where any rank has a 1
    return flags.bool().tolist()


def own_group(worker):
    """Put a loader process out of reach of signals to the whole group: this process saves first."""
    os.setpgrp()


def fit(args, about, method, optimizer, schedule, start, device):
    """The steps from start on, one optimizer update each -> how many are done, how many were just skipped."""
    bf16 = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)  # else fp32 is faster
    model, main = method, schedule.rank == 0
    if schedule.world > 1:
        model = nn.parallel.DistributedDataParallel(method, gradient_as_bucket_view=True)  # one per process
    stop = min(schedule.total, args.max_steps or schedule.total)  # schedules span the total all the same
    shares = (schedule.batch(step)[2] for step in range(start, stop))  # row numbers, this rank's of each step
    loader = DataLoader(CachedDataset(schedule.rows), batch_sampler=shares, collate_fn=stack,
                        num_workers=args.workers, worker_init_fn=own_group, pin_memory=device.type == "cuda")
    signals, skipped, clock, due = [], [], time.monotonic(), time.monotonic() + 60 * args.save_minutes
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, lambda number, frame: signals.append(number))  # the step ends, then all leave
    log = open(args.out / "log.jsonl" if main else os.devnull, "a", buffering=1)
    bar = tqdm(loader, initial=start, total=stop, unit="step", smoothing=0.05, disable=not main)
    with log, bar:
        for step, batch in enumerate(bar, start):  # batch (B, C, H, W, S) as cached
            waited = time.monotonic() - clock  # for the loader
            decay, free = optimizer.param_groups
            decay["lr"] = free["lr"] = learning_rate(step, schedule.total, schedule.warmup, args.lr)
            decay["weight_decay"] = cosine(*method.WEIGHT_DECAY, step / schedule.total)  # of weights alone

            torch.manual_seed(seed_of(args.seed, 1, step, schedule.rank))  # stochastic depth
            generator = torch.Generator().manual_seed(seed_of(args.seed, 2, step, schedule.rank))
            x = take_frames_at_random(unit(batch.to(device, non_blocking=True)), generator)  # in [0, 1]
            inputs = method.make_inputs(x, generator)  # a mask, or views
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = model(*inputs)  # a scalar, and what it is made of for the log
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # DDP averages gradients over ranks here
            norm = nn.utils.clip_grad_norm_(method.parameters(), method.CLIP_GRAD)  # alike on all ranks
            stopping, bad = any_rank(device, bool(signals), not math.isfinite(loss.item() + norm.item()))
            if not bad:  # else it is skipped: tried again, it would draw the same numbers
                optimizer.step()
                method.after_step(step / schedule.total)  # SimDINO: the teacher follows

            modality, numbers, _ = schedule.batch(step)  # what this step was on, for the log
            seconds = time.monotonic() - clock
            memory = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024  # bytes
            record = {"loss": loss.item(), **parts, "lr": decay["lr"], "grad_norm": norm.item(),
                      "samples_per_s": schedule.world * len(x) / seconds, "data_wait": waited / seconds,
                      "peak_memory_gb": memory / 2**30, "skipped": bad}
            record = {key: float(value) if math.isfinite(value) else None for key, value in record.items()}
            place = {"step": step + 1, "epoch": step // schedule.per_epoch, "modality": modality}
            log.write(json.dumps(place | record) + "\n")  # strict JSON: what is not finite is null
            bar.set_postfix_str(f"{modality} loss {loss.item():.4f}", refresh=False)
            skipped.append(bad)
            if sum(skipped[-MAX_BAD_STEPS:]) == MAX_BAD_STEPS:  # this run learns nothing any more
                names = " ".join(schedule.rows[i]["id"] for i in numbers)
                raise UserError(f"step {step + 1}: {MAX_BAD_STEPS} non-finite steps in a row, {record} on "
                                f"{modality} samples {names}: look at these, or lower --lr")
            epoch, rest = divmod(step + 1, schedule.per_epoch)  # whole epochs done
            if main and (rest == 0 or stopping or step + 1 == stop or time.monotonic() > due):
                weights = {"model": method.state_dict(), "optimizer": optimizer.state_dict()}
                state = about | weights | {"step": step + 1}  # no random state: it follows from the step
                if rest == 0 and args.keep_every and epoch % args.keep_every == 0:
                    save_checkpoint(args.out / f"epoch_{epoch:04d}.pt", method.encoder, **state)
                save_checkpoint(args.out / "checkpoint.pt", method.encoder, **state)
                due = time.monotonic() + 60 * args.save_minutes
            if stopping:  # all ranks at the same step
                break
            clock = time.monotonic()
    return start + len(skipped), sum(skipped)


def within(low, high=math.inf, kind=float):
    """A reader of flags for argparse: numbers of a kind from low to high."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")  # nan neither
    return number


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, natural, count = parser.add_argument, within(0, kind=int), within(1, kind=int)
    flag("--ssl", choices=["mae", "simdino"], default="simdino", help="docs/learning.md compares them")
    flag("--preset", choices=PRESETS, help="flags for the demo, or for a thousand small images on a CPU")
    flag("--data", nargs="+", type=Path, help="cache folders (default: all in cache/; demo only if alone)")
    flag("--out", type=Path, help="run folder (default: runs/SSL); name a new one for every experiment")
    flag("--arch", choices=ARCHS, default="vit_b", help="vit_t or vit_s for small data or a CPU")
    flag("--patch-size", type=int, choices=[8, 16, 32], default=16, help="in plane; 8 is finer and slower")
    flag("--epochs", type=count, default=300, help="length of the run and of its schedules")
    flag("--batch-size", type=count, default=32, help="images or videos per process; lower to save memory")
    flag("--batch-size-3d", type=count, default=16, help="volumes per process")
    flag("--lr", type=within(1e-9, 1), default=1e-3, help="peak rate; lower it if the loss turns NaN")
    flag("--modalities", nargs="+", choices=MODALITIES, default=[*MODALITIES[:4]], help="mri only if named")
    flag("--data-fraction", type=within(1e-6, 1), default=1.0, help="of each modality, nested")
    flag("--local-views", type=natural, default=LOCAL_VIEWS_2D, help="simdino: of an image")
    flag("--gamma", type=within(0), help="simdino: weight of the coding rate (default: (d + m) / (d m))")
    flag("--momentum", type=within(0, 1), default=MOMENTUM, help="simdino: lower in short runs")
    flag("--init", help="start from a 2D ViT of the timm, DINO or MAE family, or another run's checkpoint")
    flag("--seed", type=natural, default=0, help="of all that is random; vary it to see the noise")
    flag("--workers", type=natural, default=4 if torch.cuda.is_available() else 0, help="loader processes")
    flag("--max-steps", type=count, help="stop here for now; the schedules still span --epochs")
    flag("--save-minutes", type=within(0), default=15, help="save this often, besides every epoch")
    flag("--keep-every", type=natural, default=0, help="epochs; keep epoch_NNNN.pt for studies, 0: none")
    parser.set_defaults(**PRESETS.get(parser.parse_known_args()[0].preset, {}))  # under the flags given
    args = parser.parse_args()
    if args.preset and int(os.environ.get("RANK", 0)) == 0:
        print("preset:", *(f"--{key.replace('_', '-')} {getattr(args, key)}" for key in PRESETS[args.preset]))
    caches = sorted(file.parent for file in Path("cache").glob("*/samples.csv"))
    real = [folder for folder in caches if folder.name != "demo"]  # phantoms never mix with real images
    args.data = args.data or real or caches or [Path("cache")]
    args.out = args.out or Path("runs") / args.ssl
    return args


def main():
    args = parse_args()
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # set by torchrun
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"no GPU for process {local} of this machine: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # torchrun says who is where
    rows = select_rows(args.data, args.modalities, args.data_fraction)
    schedule = Schedule(rows, args, rank, world)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    if rank == 0:
        for (place, modality), n in sorted(Counter((row["folder"], row["modality"]) for row in rows).items()):
            print(f"training on {place}: {n} {modality}")
        lock = open(args.out / ".lock", "w")  # held as long as this process lives
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{args.out}: another training is at work there; choose another --out") from None
    some, none = any_rank(device, path.exists(), not path.exists())
    if some and none:
        raise UserError(f"only some processes see {path}: --out must be one folder shared by all nodes")
    torch.manual_seed(seed_of(args.seed, 0))  # of the untrained weights
    simdino, patch_size = args.ssl == "simdino", (args.patch_size, args.patch_size, PATCH_SIZE[-1])
    encoder = ViT(args.arch, patch_size, cls_token=simdino, drop_path=DROP_PATH if simdino else 0.0)
    if args.init:
        init_from_2d(encoder, args.init)
    method = SimDINO(encoder, args.local_views, args.gamma, args.momentum) if simdino else MAE.for_encoder(encoder)
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # shapes, with the views of all modalities
        for block in (module for module in method.modules() if isinstance(module, Block)):
            block.compile(dynamic=False)  # one static graph a shape
    optimizer = make_optimizer(method.to(device))
    about = {"ssl": args.ssl, "method": method.config, "world": world, "total": schedule.total,
             "flags": json.dumps({key: value for key, value in vars(args).items() if key not in FREE_FLAGS}),
             "ids": torch.tensor([int(row["id"], 16) for row in rows], dtype=torch.uint64).view(torch.int64)}
    done = resume(path, about, method, optimizer, rank) if some else 0  # steps
    done, skipped = fit(args, about, method, optimizer, schedule, done, device)
    if rank == 0:
        if done >= schedule.total:
            (args.out / "DONE").touch()  # what a loop that restarts a preempted run waits for
        print(f"{args.out}: {done} of {schedule.total} steps done, {skipped} of these just skipped (NaN)")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
