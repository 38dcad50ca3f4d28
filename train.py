"""Pretraining (paper Sec. 3.4): caches of several modalities -> runs/NAME/checkpoint.pt, by MAE or SimDINO.

    python train.py --ssl simdino                                    # one process, CPU or GPU
    torchrun --nproc_per_node=16 train.py --ssl mae                  # one process per GPU

All that a step does follows from (seed, step, rank) alone, so the same command again continues a run as if
never stopped. Writes runs/NAME/: checkpoint.pt; log.jsonl, a line a step, the last one counts; DONE at the
end.
"""
import argparse
import fcntl
import functools
import json
import math
import os
import resource
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from mae import MAE
from model import (ARCHS, PATCH_SIZE, Block, ViT, expecting, init_from_2d, read_checkpoint, save_checkpoint,
                   stack, take_frames, unit)
from prepare import MODALITIES, CachedDataset, UserError, cli, read_samples
from simdino import LOCAL_VIEWS_2D, MOMENTUM, SimDINO

WARMUP_EPOCHS = 10  # Sec. 3.4, of 300 epochs
WARMUP_SHARE = 0.1  # CHOICE: and at most a tenth of the run, so that short runs reach the peak rate too
DROP_PATH = 0.1  # stochastic depth of the SimDINO student (official implementation)
MAX_BAD_STEPS = 10  # non-finite steps in a row before the run stops
FREE_FLAGS = {"preset", "data", "out", "workers", "max_steps", "save_minutes", "keep_every"}  # may change midway
# What --preset sets and prints; flags of the command line go before it. For minutes on a CPU: a small network, the
# gamma of the paper's 256 volumes, and a teacher quick enough for a few thousand steps (docs/learning.md).
SMALL = dict(arch="vit_xs", patch_size=8, batch_size=48, local_views=2, gamma=0.0078, momentum=0.9)
PRESETS = {"demo": SMALL | dict(batch_size_3d=48, epochs=160), "small": SMALL}


# ---- schedule ---------------------------------------------------------------------------------------------
def seed_of(*numbers):
    """One 64-bit seed from several small numbers, the same on every machine (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def plan_epoch(sizes, batches, seed, epoch):
    """The steps of one epoch, [(group, sample numbers (batch,))], from (seed, epoch) alone.

    sizes, batches: samples and global batch size of each group. A group is shuffled and cut into k whole
    batches; what is left over waits for another epoch. Batch i is due at (i + u) / k of the epoch, one random
    u a group: every group is spread evenly, and modalities alternate (Sec. 3.4).
    """
    steps = []
    for group, (n, batch) in enumerate(zip(sizes, batches)):
        rng = np.random.default_rng([seed, epoch, group])
        order, u, k = rng.permutation(n), rng.random(), n // batch
        steps += [((i + u) / k, group, order[i * batch:(i + 1) * batch]) for i in range(k)]
    return [(group, numbers) for _, group, numbers in sorted(steps, key=lambda step: step[:2])]


class Schedule:
    """Which samples a step takes: pure in the step, so that every rank knows every batch without talking.

    A group is the samples of one modality and shape; one that is smaller than a global batch is left out.
    """

    def __init__(self, rows, args, rank=0, world=1):
        self.rows, self.rank, self.world = rows, rank, world
        groups, self.groups, sizes, batches = defaultdict(list), [], [], []
        for number, row in enumerate(rows):
            groups[row["modality"], row["shape"]].append(number)
        for (modality, shape), members in groups.items():
            volume = shape[0] == 1 and shape[3] > 1
            batch = world * (args.batch_size_3d if volume else args.batch_size)
            if len(members) >= batch:
                self.groups.append((modality, members))
                sizes.append(len(members))
                batches.append(batch)
            elif rank == 0:
                print(f"left out: {len(members)} {modality} samples of shape {'x'.join(map(str, shape))}, fewer "
                      f"than a global batch of {batch}")
        for modality in {key[0] for key in groups} - {group[0] for group in self.groups}:
            raise UserError(f"too few {modality} samples for a global batch: lower --batch-size (volumes: "
                            "--batch-size-3d), or leave them out with --modalities")
        self.per_epoch = sum(n // batch for n, batch in zip(sizes, batches))
        self.total = args.epochs * self.per_epoch
        self.warmup = max(1, round(min(WARMUP_EPOCHS * self.per_epoch, WARMUP_SHARE * self.total)))
        self.plan = functools.lru_cache(maxsize=2)(lambda epoch: plan_epoch(sizes, batches, args.seed, epoch))

    def batch(self, step):
        """Step -> (modality, row numbers of the global batch)."""
        group, numbers = self.plan(step // self.per_epoch)[step % self.per_epoch]
        modality, members = self.groups[group]
        return modality, [members[number] for number in numbers]

    def shares(self, start, stop):
        """This rank's row numbers for each step from start to stop (the batch sampler of its DataLoader)."""
        for step in range(start, stop):
            numbers = self.batch(step)[1]
            share = len(numbers) // self.world
            yield numbers[self.rank * share:(self.rank + 1) * share]


def cosine(start, end, progress):
    """Half a cosine, from start at progress 0 to end at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(step, total, warmup, peak):
    """Of step 0 .. total - 1: linear warm-up to the peak, then cosine to zero (Sec. 3.4), in optimizer steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, 0, (step - warmup) / (total - warmup))


def select_rows(folders, modalities, fraction):
    """Rows of cache folders that pretraining may see: of the named modalities, never the test split.

    Samples are ranked by id, a keyed hash, so the subsets of --data-fraction are random and nested (Sec.
    4.4).
    """
    rows = [row for folder in folders for row in read_samples(folder) if row["split"] != "test"]
    rows.sort(key=lambda row: (row["id"], row["folder"]))
    chosen = []
    for modality in modalities:
        group = [row for row in rows if row["modality"] == modality]
        chosen += group[:math.ceil(fraction * len(group))]
    if not chosen:
        raise UserError(f"{', '.join(map(str, folders))}: no {' or '.join(modalities)} samples outside the test "
                        "split; prepare some, or name others with --data and --modalities")
    return chosen


# ---- run folder -------------------------------------------------------------------------------------------
def save(args, about, method, optimizer, step, epoch):
    """Write checkpoint.pt and, if the epoch just completed (None within one) is to be kept, epoch_NNNN.pt."""
    names = ["checkpoint.pt"]
    if epoch and args.keep_every and epoch % args.keep_every == 0:
        names.append(f"epoch_{epoch:04d}.pt")
    for name in names:
        save_checkpoint(args.out / name, method.encoder, method=method.config, model=method.state_dict(),
                        optimizer=optimizer.state_dict(), step=step, **about)


def resume(path, about, method, optimizer, rank):
    """Load a checkpoint into method and optimizer; returns how many steps of this run are done.

    If the number of processes or the data changed, the same share of the new run counts as done.
    """
    state = read_checkpoint(path)
    with expecting(path, "is damaged or does not fit: choose another --out"):
        old, new = json.loads(state["flags"]), json.loads(about["flags"])
        differ = [f"--{key.replace('_', '-')} {old.get(key)}" for key in new if old.get(key) != new[key]]
        if differ:
            raise UserError(f"{path} was made with {' '.join(differ)}: repeat that, or choose another --out")
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"] * about["total"] // state["total"]
        if rank == 0 and (state["world"] != about["world"] or not torch.equal(state["ids"], about["ids"])):
            print(f"processes or data changed: step {state['step']} of {state['total']} becomes step {done} of "
                  f"{about['total']}, and batches differ from now on")
    return done


# ---- steps ------------------------------------------------------------------------------------------------
def make_optimizer(method):
    """Fused AdamW; biases, norms and tokens do not decay. CHOICE: tokens, which both official codes decay."""
    decay, free = [], []
    for name, p in method.named_parameters():
        if p.requires_grad:
            (free if p.ndim < 2 or name.endswith("_token") else decay).append(p)
    groups = [{"params": decay}, {"params": free}]
    return torch.optim.AdamW(groups, betas=method.BETAS, weight_decay=0.0, fused=True)


def any_rank(*flags, device):
    """Element-wise "or" of booleans over all ranks, in one small all-reduce."""
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()


def own_group(worker):
    """Put a loader process out of reach of signals to the whole group: this process saves first."""
    os.setpgrp()


def fit(args, about, method, optimizer, schedule, start, stop, device):
    """Steps start .. stop - 1, one optimizer update each -> how many steps are done, and how many were skipped."""
    bf16 = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)  # else fp32 is faster
    model, main = method, schedule.rank == 0
    if schedule.world > 1:
        model = DistributedDataParallel(method, gradient_as_bucket_view=True)
    trained = [p for p in method.parameters() if p.requires_grad]
    loader = DataLoader(CachedDataset(schedule.rows), batch_sampler=schedule.shares(start, stop), collate_fn=stack,
                        num_workers=args.workers, worker_init_fn=own_group, pin_memory=device.type == "cuda")
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, lambda number, frame: signals.append(number))
    log = open(args.out / "log.jsonl" if main else os.devnull, "a", buffering=1)
    bar = tqdm(initial=start, total=stop, unit="step", smoothing=0.05, disable=not main)
    bad_steps, skipped, saved, clock = 0, 0, time.monotonic(), time.perf_counter()

    with log, bar:
        for step, batch in enumerate(loader, start):  # batch (B, C, H, W, S) as cached
            waited = time.perf_counter() - clock
            decay, free = optimizer.param_groups
            decay["lr"] = free["lr"] = learning_rate(step, schedule.total, schedule.warmup, args.lr)
            decay["weight_decay"] = cosine(*method.WEIGHT_DECAY, step / schedule.total)

            torch.manual_seed(seed_of(args.seed, 1, step, schedule.rank))  # stochastic depth
            generator = torch.Generator().manual_seed(seed_of(args.seed, 2, step, schedule.rank))
            x = unit(batch.to(device, non_blocking=True))  # (B, C, H, W, S) in [0, 1]
            inputs = method.inputs(take_frames(x, generator=generator), generator)  # frames, then masks or views
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = model(*inputs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # DDP averages gradients over ranks here
            norm = nn.utils.clip_grad_norm_(trained, method.CLIP_GRAD)
            finite = math.isfinite(loss.item() + norm.item())
            stopping, bad = any_rank(bool(signals), not finite, device=device)
            if not bad:
                optimizer.step()
                method.after_step(step / schedule.total)

            modality, numbers = schedule.batch(step)
            seconds = time.perf_counter() - clock
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if device.type == "cuda":
                memory = torch.cuda.max_memory_allocated()
            record = {"loss": loss.item(), **parts, "lr": decay["lr"], "grad_norm": norm.item(), "skipped": bad,
                      "samples_per_s": schedule.world * len(x) / seconds, "data_wait": waited / seconds,
                      "peak_memory_gb": memory / 2**30}
            record = {key: float(value) if math.isfinite(value) else None for key, value in record.items()}
            place = {"step": step + 1, "epoch": step // schedule.per_epoch, "modality": modality}
            log.write(json.dumps(place | record) + "\n")
            bar.set_postfix_str(f"{modality} loss {loss.item():.4f}", refresh=False)
            bar.update()
            bad_steps, skipped = bad_steps + 1 if bad else 0, skipped + bad
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(f"step {step + 1}: {bad_steps} non-finite steps in a row, now {modality} with "
                                f"{record}, samples {' '.join(schedule.rows[i]['id'] for i in numbers)}: look at "
                                "these, or start again with a lower --lr")
            epoch = (step + 1) // schedule.per_epoch if (step + 1) % schedule.per_epoch == 0 else None
            late = time.monotonic() - saved > 60 * args.save_minutes
            if main and (epoch or late or stopping or step + 1 == stop):
                save(args, about, method, optimizer, step + 1, epoch)
                saved = time.monotonic()
            if stopping:
                break
            clock = time.perf_counter()
    return step + 1, skipped


def build(args, device):
    """The untrained method on its device; on a GPU its blocks are compiled, one static graph for each shape."""
    torch.manual_seed(seed_of(args.seed, 0))
    simdino, patch = args.ssl == "simdino", (args.patch_size, args.patch_size, PATCH_SIZE[-1])
    encoder = ViT(args.arch, patch, cls_token=simdino, drop_path=DROP_PATH if simdino else 0.0)
    if args.init:
        init_from_2d(encoder, args.init)
    if simdino:
        method = SimDINO(encoder, args.local_views, args.gamma, args.momentum)
    else:
        width = min(512, encoder.dim)  # CHOICE: official for ViT-B; not wider than a smaller encoder
        method = MAE(encoder, decoder_dim=width, decoder_heads=width // 32)
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        for block in (module for module in method.modules() if isinstance(module, Block)):
            block.compile(dynamic=False)
    return method.to(device)


def train(args, rank, world, device):
    """A run from its checkpoint, or from the start, to its end, a signal or --max-steps."""
    rows = select_rows(args.data, args.modalities, args.data_fraction)
    schedule = Schedule(rows, args, rank, world)
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for (folder, modality), n in sorted(Counter((row["folder"], row["modality"]) for row in rows).items()):
            print(f"training on {folder}: {n} {modality}")
        held = open(args.out / ".lock", "w")  # as long as this process lives
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{args.out}: another training is at work there; choose another --out") from None
    path = args.out / "checkpoint.pt"
    some, none = any_rank(path.exists(), not path.exists(), device=device)
    if some and none:
        raise UserError(f"only some processes see {path}: --out must be one folder shared by all nodes")
    flags = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS}
    ids = np.array([int(row["id"], 16) for row in rows], np.uint64).view(np.int64)
    about = {"ssl": args.ssl, "flags": json.dumps(flags), "world": world, "total": schedule.total,
             "ids": torch.from_numpy(ids)}
    method = build(args, device)
    optimizer = make_optimizer(method)
    done, skipped = resume(path, about, method, optimizer, rank) if some else 0, 0
    stop = min(schedule.total, args.max_steps or schedule.total)
    if done < stop:
        done, skipped = fit(args, about, method, optimizer, schedule, done, stop, device)
    if rank == 0:
        if done >= schedule.total:
            (args.out / "DONE").touch()
        print(f"{args.out}: {done} of {schedule.total} steps done, {skipped} of these just skipped as non-finite")


def number(kind, low, high=math.inf):
    """A reader of flags for argparse: kind(text), which must lie in [low, high]."""
    def read(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    read.__name__ = f"number from {low} to {high}:"  # argparse says "invalid ... value"
    return read


def parse_args():
    parser = argparse.ArgumentParser(description="Pretrain the encoder; the same command again resumes the run.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, count, workers = parser.add_argument, number(int, 1), 4 if torch.cuda.is_available() else 0
    flag("--ssl", choices=["mae", "simdino"], default="simdino", help="method; docs/learning.md compares them")
    flag("--preset", choices=PRESETS, help="flags for the demo, or for a thousand small images on a CPU")
    flag("--data", nargs="+", type=Path, help="cache folders (default: all in cache/; demo only if alone)")
    flag("--out", type=Path, help="run folder (default: runs/SSL); name a new one for every experiment")
    flag("--arch", choices=ARCHS, default="vit_b", help="vit_t or vit_s for small data or a CPU")
    flag("--patch-size", type=int, choices=[8, 16, 32], default=16, help="in plane; 8 is finer and slower")
    flag("--epochs", type=count, default=300, help="length of the run and of its schedules")
    flag("--batch-size", type=count, default=32, help="images or videos per process; lower to save memory")
    flag("--batch-size-3d", type=count, default=16, help="volumes per process")
    flag("--lr", type=number(float, 1e-9, 1), default=1e-3, help="peak rate; lower it if the loss turns NaN")
    flag("--modalities", nargs="+", choices=MODALITIES, default=[m for m in MODALITIES if m != "mri"],
         help="what to train on; mri is left out unless named, to stay unseen")
    flag("--data-fraction", type=number(float, 1e-6, 1), default=1.0, help="of each modality, nested")
    flag("--local-views", type=number(int, 0), default=LOCAL_VIEWS_2D, help="simdino: of an image")
    flag("--gamma", type=number(float, 0), help="simdino: weight of the coding rate (default: (d + m) / (d m))")
    flag("--momentum", type=number(float, 0, 1), default=MOMENTUM, help="simdino: of the teacher at the first "
         "step; lower in runs of a few thousand steps")
    flag("--init", help="start from a 2D ViT of the timm, DINO or MAE family, or another run's checkpoint")
    flag("--seed", type=number(int, 0), default=0, help="of all that is random; vary it to see the noise")
    flag("--workers", type=number(int, 0), default=workers, help="loaders; raise if data_wait is above 0.1")
    flag("--max-steps", type=count, help="stop here for now; the schedules still span --epochs")
    flag("--save-minutes", type=number(float, 0), default=15, help="save this often, besides every epoch")
    flag("--keep-every", type=number(int, 0), default=0, help="epochs; keep epoch_NNNN.pt for studies, 0: none")
    preset = PRESETS.get(parser.parse_known_args()[0].preset, {})
    parser.set_defaults(**preset)
    args = parser.parse_args()
    if preset and int(os.environ.get("RANK", 0)) == 0:
        print("preset:", *(f"--{key.replace('_', '-')} {value}" for key, value in preset.items()))
    caches = sorted(file.parent for file in Path("cache").glob("*/samples.csv"))
    archive = [folder for folder in caches if folder.name != "demo"]  # phantoms never mix with real images
    args.data = args.data or archive or caches or [Path("cache")]
    args.out = args.out or Path("runs") / args.ssl
    return args


def main():
    args = parse_args()
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # set by torchrun
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, rank, world, device)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
