"""Pretraining (paper Sec. 3.4): caches of several modalities -> runs/NAME/checkpoint.pt, by MAE or SimDINO.

    python train.py --ssl simdino                                    # one process, CPU or GPU
    torchrun --nproc_per_node=16 train.py --ssl mae                  # one process per GPU

Every step takes one modality and one shape on all ranks, a batch (B, C, H, W, S) on each. All that a step does follows from
(seed, step, rank) alone, so the same command run again continues from the newest checkpoint as if never stopped.
Writes runs/NAME/: checkpoint.pt, the two before it, log.jsonl (a line a step), and DONE at the end.
"""
import argparse
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from mae import MAE
from model import (ARCHS, PATCH_SIZE, Block, ViT, init_from_2d, load_exactly, read_checkpoint, save_checkpoint, stack,
                   take_frames, unit)
from prepare import MODALITIES, CachedDataset, UserError, atomic_write, read_samples
from simdino import LOCAL_VIEWS_2D, SimDINO

WARMUP_EPOCHS = 10  # Sec. 3.4, of 300 epochs
WARMUP_SHARE = 0.1  # CHOICE: and at most a tenth of the run, so that short runs reach the peak rate too
DROP_PATH = 0.1  # stochastic depth of the SimDINO student (official implementation)
KEEP = 3  # checkpoints: the newest and two before it
MAX_BAD_STEPS = 10  # non-finite steps in a row before the run stops
PEAK_FLOPS = {"H20": 148e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, from the vendor's data sheets
FREE_FLAGS = {"data", "out", "init", "workers", "max_steps", "save_minutes", "keep_every"}  # may differ when a run is resumed


def tell(rank, message):
    """One line on standard error, from the first process alone."""
    if rank == 0:
        print(f"train.py: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- schedule
def seed_of(*numbers):
    """One 64-bit seed from several small numbers, the same on every machine (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def plan_epoch(sizes, batches, seed, epoch):
    """The steps of one epoch, [(group, sample numbers (batch,))], from (seed, epoch) alone.

    sizes, batches: samples and global batch size of each group (a modality and shape). A group is shuffled and cut into k
    whole batches; what is left over waits for another epoch. Batch i is due at (i + u) / k of the epoch, one random u per
    group: every modality is spread evenly, and modalities alternate (Sec. 3.4).
    """
    steps = []
    for group, (n, batch) in enumerate(zip(sizes, batches)):
        rng = np.random.default_rng([seed, epoch, group])
        order, u, k = rng.permutation(n), rng.random(), n // batch
        steps += [((i + u) / k, group, order[i * batch:(i + 1) * batch]) for i in range(k)]
    return [(group, numbers) for _, group, numbers in sorted(steps, key=lambda step: step[:2])]


class Schedule:
    """Which samples each step of a run takes: pure in the step, so that every rank knows every batch without talking."""

    def __init__(self, rows, args, rank=0, world=1):
        self.rows, self.rank, self.world, groups, batches = rows, rank, world, {}, {}
        for number, row in enumerate(rows):
            groups.setdefault((row["modality"], row["shape"]), []).append(number)
        for key, members in groups.items():
            volume = key[1][0] == 1 and key[1][3] > 1  # Sec. 3.4: per GPU, 16 volumes or 32 of anything else
            batch = world * (args.batch_size_3d if volume else args.batch_size)
            if len(members) >= batch:
                batches[key] = batch
                continue
            short = (f"{len(members)} {key[0]} samples of shape {'x'.join(map(str, key[1]))} are fewer than one global batch of "
                     f"{batch}")
            if key[0] not in {modality for (modality, _), members in groups.items() if len(members) >= batch}:
                raise UserError(f"{short}: lower --batch-size{'-3d' * volume}, or leave them out with --modalities")
            tell(rank, f"{short} and are left out")
        self.groups = [(key, groups[key]) for key in batches]
        sizes, batches = [len(members) for _, members in self.groups], list(batches.values())
        self.per_epoch = sum(n // batch for n, batch in zip(sizes, batches))
        self.total = args.epochs * self.per_epoch
        self.warmup = max(1, round(min(WARMUP_EPOCHS * self.per_epoch, WARMUP_SHARE * self.total)))
        self.plan = functools.lru_cache(maxsize=2)(lambda epoch: plan_epoch(sizes, batches, args.seed, epoch))

    def batch(self, step):
        """Step -> (modality, row numbers of the global batch)."""
        group, numbers = self.plan(step // self.per_epoch)[step % self.per_epoch]
        (modality, _), members = self.groups[group]
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
    """Of step 0 .. total - 1: linear warm-up to the peak, then cosine towards zero (Sec. 3.4); in optimizer steps."""
    return peak * (step + 1) / warmup if step < warmup else cosine(peak, 0, (step - warmup) / (total - warmup))


def select_rows(folders, modalities, fraction):
    """Rows of cache folders that pretraining may see: the named modalities, never the test split, a share of each.

    Samples are ranked by id, a keyed hash, so the subsets of --data-fraction are random and nested (Sec. 4.4).
    """
    rows = sorted((row for folder in folders for row in read_samples(folder)), key=lambda row: (row["id"], row["folder"]))
    chosen = []
    for modality in modalities:
        group = [row for row in rows if row["modality"] == modality and row["split"] != "test"]
        chosen += group[:math.ceil(fraction * len(group))]
    if not chosen:
        raise UserError(f"{', '.join(map(str, folders))}: no {' or '.join(modalities)} samples outside the test split; prepare "
                        "some, or name others with --data and --modalities")
    return chosen


# -------------------------------------------------------------------------------------------------------- run folder
class Checkpoints:
    """The checkpoints of a run folder: checkpoint.pt is the newest, checkpoint.1.pt and checkpoint.2.pt came before it.

    A new one is written beside them as checkpoint.next.pt, then all move up by a rename each: whenever a kill comes, the
    files in this order are from newest to oldest. about: plain values stored in each, among them the flags of the run.
    """

    def __init__(self, out, args, about, rank):
        self.minutes, self.keep_every, self.about, self.rank = args.save_minutes, args.keep_every, about, rank
        self.files = [out / f"checkpoint{name}.pt" for name in (".next", "", *(f".{i}" for i in range(1, KEEP)))]
        self.saved, self.cost = time.monotonic(), 0.0

    def newest(self):
        """The newest readable file and its state, (None, None) for a fresh run; a damaged file is named and passed over."""
        files = [file for file in self.files if file.exists()]
        for file in files:
            try:
                return file, read_checkpoint(file)
            except UserError as error:
                print(f"train.py: {error}. Trying the one before", file=sys.stderr)  # on every rank: their disks may differ
        if files:
            raise UserError(f"none of {', '.join(map(str, files))} can be read: move them away to start again")
        return None, None

    def resume(self, method, optimizer):
        """Load the newest checkpoint into method and optimizer; returns the steps it had done, and what they amount to now.

        Both are equal unless the number of processes or the data changed: then the same share of the new run counts as done.
        """
        file, state = self.newest()
        if not self.about.keys() <= state.keys():
            raise UserError(f"{file} is not a checkpoint of train.py: choose another --out")
        old, new = json.loads(state["flags"]), json.loads(self.about["flags"])
        differ = [f"--{key.replace('_', '-')} {old.get(key)}" for key in new if old.get(key) != new[key]]
        if differ:
            raise UserError(f"{file} was made with {' '.join(differ)}: repeat the same flags, or choose another --out")
        changed = [name for key, name in (("world", "number of processes"), ("samples", "training data"))
                   if state[key] != self.about[key]]
        done = state["step"] * self.about["total"] // state["total"]
        if changed:
            tell(self.rank, f"{' and '.join(changed)} changed since {file}: its step {state['step']} of {state['total']} becomes "
                 f"step {done} of {self.about['total']}, and batches differ from now on")
        load_exactly(method, state["model"], file)
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], done

    def due(self, epoch):
        """Save now? epoch: number of epochs just completed, or None within one.

        CHOICE: an epoch shorter than twenty times the cost of saving may end unsaved, lest tiny data sets only write files.
        """
        since = time.monotonic() - self.saved
        return since > 60 * self.minutes or epoch is not None and (since > 20 * self.cost or self.keeps(epoch))

    def keeps(self, epoch):
        return epoch is not None and self.keep_every > 0 and epoch % self.keep_every == 0

    def save(self, method, optimizer, step, epoch):
        """Write the newest checkpoint, and epoch_NNNN.pt if this epoch is to be kept."""
        begin = time.monotonic()
        save_checkpoint(self.files[0], method.encoder, method=method.config, model=method.state_dict(),
                        optimizer=optimizer.state_dict(), step=step, **self.about)
        for newer, older in reversed(list(zip(self.files, self.files[1:]))):
            if newer.exists():
                os.replace(newer, older)
        if self.keeps(epoch):
            kept = self.files[1].with_name(f"epoch_{epoch:04d}.pt")
            with atomic_write(kept) as copy, self.files[1].open("rb") as file:
                shutil.copyfileobj(file, copy)
        self.saved = time.monotonic()
        self.cost = self.saved - begin


class Log:
    """log.jsonl, the progress bar and, where it is installed, TensorBoard."""

    def __init__(self, out, logged, start, stop):
        path = out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_write(path) as file:  # steps after the checkpoint are done again; a torn last line goes too
            file.write("".join(x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= logged).encode())
        self.file, self.bar = path.open("a"), tqdm(initial=start, total=stop, unit="step", smoothing=0.05)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=start + 1)
        except ImportError:
            self.board = None

    def write(self, record):
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # JSON has no NaN
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        self.bar.update()
        self.bar.set_postfix_str(f"{record['modality']} loss {record['loss']:.4f}", refresh=False)
        for key in record.keys() - {"step", "epoch", "modality"} if self.board else ():
            self.board.add_scalar(f"{key}/{record['modality']}", record[key], record["step"])


def speed(method, x, world, seconds, waited):
    """Of one step: samples/s and tokens/s of all ranks, share of time spent waiting for data, peak memory, and the model
    FLOP utilisation where the GPU's peak is known."""
    h, w, s = method.encoder.grid(x.shape[2:])
    record = {"samples_per_s": world * len(x) / seconds, "tokens_per_s": world * len(x) * h * w * s / seconds,
              "data_wait": waited / seconds}
    if x.device.type == "cpu":
        return record | {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    peak = [flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name().replace("-", " ").split()]
    record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return record | ({"mfu": len(x) * method.flops(x) / seconds / peak[0]} if peak else {})


# -------------------------------------------------------------------------------------------------------------- steps
def make_optimizer(method):
    """Fused AdamW in two groups: weight matrices decay; biases, norms and tokens do not (as both official codes)."""
    decay, free = [], []
    for name, p in method.named_parameters():
        if p.requires_grad:
            (free if p.ndim < 2 or name.endswith("_token") else decay).append(p)
    return torch.optim.AdamW([{"params": decay}, {"params": free}], betas=method.BETAS, weight_decay=0.0,
                             fused=True)


def any_rank(*flags, device):
    """Element-wise "or" of booleans over all ranks, in one small all-reduce."""
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()


def own_group(worker):
    """Put a loader process in a process group of its own, out of reach of signals to the whole run: that saves first."""
    os.setpgrp()


def fit(args, method, optimizer, schedule, checkpoints, logged, start, stop, device):
    """Steps start .. stop - 1; one pass of the loop is one optimizer update."""
    bf16 = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)  # on other CPUs fp32 is faster
    model = method if schedule.world == 1 else DistributedDataParallel(method, broadcast_buffers=False,
                                                                       gradient_as_bucket_view=True)
    trained = [p for p in method.parameters() if p.requires_grad]
    loader = DataLoader(CachedDataset(schedule.rows), batch_sampler=schedule.shares(start, stop), num_workers=args.workers,
                        collate_fn=stack, worker_init_fn=own_group, pin_memory=device.type == "cuda")
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda number, frame: signals.append(number))
    log = Log(args.out, logged, start, stop) if schedule.rank == 0 else None
    bad_steps, clock = 0, time.perf_counter()

    for step, batch in enumerate(loader, start):  # batch (B, C, H, W, S) as cached
        waited = time.perf_counter() - clock
        decay, free = optimizer.param_groups
        decay["lr"] = free["lr"] = learning_rate(step, schedule.total, schedule.warmup, args.lr)
        decay["weight_decay"] = cosine(*method.WEIGHT_DECAY, step / schedule.total)

        torch.manual_seed(seed_of(args.seed, 1, step, schedule.rank))  # stochastic depth
        generator = torch.Generator().manual_seed(seed_of(args.seed, 2, step, schedule.rank))  # frames, and masks or views
        x = take_frames(unit(batch.to(device, non_blocking=True)), generator=generator)  # (B, C, H, W, S) in [0, 1]
        inputs = method.inputs(x, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, parts = model(*inputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # DDP averages gradients over ranks here
        norm = nn.utils.clip_grad_norm_(trained, method.CLIP_GRAD)
        stopping, bad = any_rank(bool(signals), not math.isfinite(loss.item() + norm.item()), device=device)
        if not bad:
            optimizer.step()
            method.after_step(step / schedule.total, schedule.total)
        bad_steps = bad_steps + 1 if bad else 0

        modality, numbers = schedule.batch(step)
        parts = {key: float(value) for key, value in parts.items()}
        seconds = time.perf_counter() - clock
        if schedule.rank == 0:
            log.write({"step": step + 1, "epoch": step // schedule.per_epoch, "modality": modality, "loss": loss.item(), **parts,
                       "lr": decay["lr"], "grad_norm": norm.item(), "skipped": int(bad),
                       **speed(method, x, schedule.world, seconds, waited)})
        if bad_steps == MAX_BAD_STEPS:
            raise UserError(f"step {step + 1}: {bad_steps} non-finite steps in a row, now {modality} with {parts}, samples "
                            f"{' '.join(schedule.rows[i]['id'] for i in numbers)}; the last checkpoint is intact: look at "
                            "these samples, or start again with a lower --lr")
        epoch = (step + 1) // schedule.per_epoch if (step + 1) % schedule.per_epoch == 0 else None
        if schedule.rank == 0 and (stopping or step + 1 == stop or checkpoints.due(epoch)):
            checkpoints.save(method, optimizer, step + 1, epoch)
        if stopping:
            break
        clock = time.perf_counter()
    return step + 1


def train(args, rank, world, device):
    """A run from its newest checkpoint, or from the start, to its end, a signal or --max-steps."""
    schedule = Schedule(select_rows(args.data, args.modalities, args.data_fraction), args, rank, world)
    args.out.mkdir(parents=True, exist_ok=True)
    for stale in args.out.glob("*.tmp") if rank == 0 else ():  # of a process killed while writing
        stale.unlink(missing_ok=True)
    fixed = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS}
    samples = sha256(" ".join(row["id"] for row in schedule.rows).encode()).hexdigest()
    checkpoints = Checkpoints(args.out, args, {"ssl": args.ssl, "flags": json.dumps(fixed), "world": world,
                                               "samples": samples, "total": schedule.total}, rank)
    resuming = any(file.exists() for file in checkpoints.files)
    if all(any_rank(resuming, not resuming, device=device)):
        raise UserError(f"{args.out} holds checkpoints on some processes only: --out must be one folder shared by all nodes")

    torch.manual_seed(seed_of(args.seed, 0))
    simdino = args.ssl == "simdino"
    encoder = ViT(args.arch, (args.patch_size, args.patch_size, PATCH_SIZE[-1]), simdino, DROP_PATH if simdino else 0.0)
    if args.init and not resuming:
        init_from_2d(encoder, args.init)
    width = min(512, encoder.dim)  # CHOICE: MAE's decoder is 512 wide (official, for ViT-B and up) but not wider than the encoder
    method = SimDINO(encoder, args.local_views) if simdino else MAE(encoder, decoder_dim=width, decoder_heads=width // 32)
    method = method.to(device)
    optimizer = make_optimizer(method)
    if device.type == "cuda":  # blocks are compiled one by one and share a static graph for each of the few shapes
        torch._dynamo.config.recompile_limit = 64
        for block in (module for module in method.modules() if isinstance(module, Block)):
            block.compile(dynamic=False)

    logged, done = checkpoints.resume(method, optimizer) if resuming else (0, 0)
    stop = schedule.total if args.max_steps is None else min(schedule.total, args.max_steps)
    if done < stop:
        done = fit(args, method, optimizer, schedule, checkpoints, logged, done, stop, device)
    if rank == 0:
        if done >= schedule.total:
            (args.out / "DONE").touch()
        print(f"{args.out}: {done} of {schedule.total} steps done")


def parse_args():
    parser = argparse.ArgumentParser(description="Pretrain the M3Ret encoder; the same command again resumes the run.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--ssl", choices=["mae", "simdino"], default="simdino", help="method; docs/learning.md compares them")
    flag("--data", nargs="+", type=Path, help="cache folders (default: all under cache/)")
    flag("--out", type=Path, help="run folder (default: runs/SSL); name a new one for every experiment")
    flag("--arch", choices=ARCHS, default="vit_b", help="vit_t or vit_s for small data or a CPU")
    flag("--patch-size", type=int, choices=[8, 16, 32], default=16, help="in plane; 8 is finer and about 8 times slower")
    flag("--epochs", type=int, default=300, help="length of the run and of its schedules")
    flag("--batch-size", type=int, default=32, help="images or videos per process; lower it if memory runs out")
    flag("--batch-size-3d", type=int, default=16, help="volumes per process")
    flag("--lr", type=float, default=1e-3, help="peak learning rate; lower it if the loss turns NaN or the batch is small")
    flag("--modalities", nargs="+", choices=MODALITIES, default=[m for m in MODALITIES if m != "mri"],
         help="what to train on; mri is left out unless named, to stay unseen")
    flag("--data-fraction", type=float, default=1.0, help="share of each modality, nested: 0.2 lies within 0.6")
    flag("--local-views", type=int, default=LOCAL_VIEWS_2D, help="of a 2D sample (simdino); fewer are faster, see Fig. 3a")
    flag("--init", help="start from a 2D ViT of the timm, DINO or MAE family, or from another run's checkpoint")
    flag("--seed", type=int, default=0, help="of everything random; vary it to see the noise of a result")
    flag("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
         help="data loading processes; raise it if data_wait in the log is above 0.1")
    flag("--max-steps", type=int, help="stop here for now; the schedules still span --epochs, so the run can go on later")
    flag("--save-minutes", type=float, default=15, help="save at least this often, besides every epoch")
    flag("--keep-every", type=int, default=0, help="also keep epoch_NNNN.pt every so many epochs, for studies; 0 keeps none")
    args = parser.parse_args()
    for name, least in (("epochs", 1), ("batch_size", 1), ("batch_size_3d", 1), ("max_steps", 1), ("local_views", 0),
                        ("seed", 0), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 < args.data_fraction <= 1:
        parser.error("--data-fraction must lie in (0, 1]")
    args.out = args.out or Path("runs") / args.ssl
    args.data = args.data or sorted(file.parent for file in Path("cache").glob("*/samples.csv")) or [Path("cache")]
    return args


def main():
    args = parse_args()
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # set by torchrun
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU, there are {torch.cuda.device_count()}: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, rank, world, device)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"train.py: {error}")
