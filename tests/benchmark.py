"""How fast the stages are, each beside a peer that does the same; docs/benchmarks.md holds the tables.

    pip install monai einops faiss-cpu        # the peers, needed here only; a missing one leaves its part out
    python tests/benchmark.py mae             # one of the rows below, or: all
    python tests/benchmark.py step --before FOLDER     # the demo's steps beside those of an older checkout

Ours and the peer take turns in one process, on inputs made here. What counts is their ratio, printed as the
median of the rounds and their smallest and largest. A CPU works with one thread (but for all pairs) and CPU
seconds are taken, which a busy neighbour stretches less than time on the wall. On a GPU blocks are compiled,
networks run in bf16 under autocast, and the clock waits for the device. No test is timed.

The row `step` runs train.py itself, in processes of one thread unless OMP_NUM_THREADS says otherwise. On an
idle machine two show what a user gets; on a busy one they wait for each other many times longer.
"""
import argparse
import importlib
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import embed, evaluate, mae, model, phantoms, prepare, simdino, train  # noqa: E401, E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SAMPLES = {"image": (1, 256, 256, 1), "video": (3, 256, 256, 16), "volume": (1, 256, 256, 64)}  # Sec. 3.4
SMALL_VOLUME = (1, 128, 128, 32)


def peer(name):
    """A module that may be missing, then None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: no comparison with it")
        return None


def machine():
    """What this runs on: the processor with its widest instructions, the GPU, Python and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = platform.machine()
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    instructions = torch.backends.cpu.get_cpu_capability()
    if torch.cpu.get_capabilities().get("amx_bf16"):
        instructions += " and AMX"
    gpu = f"{torch.cuda.get_device_name()}, " if GPU else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{gpu}{os.cpu_count()} cores of {name} ({instructions}), {versions}"


# ---- clocks ------------------------------------------------------------------------------------------------
def seconds(call, repeat=1):
    """Of one call: CPU seconds of this process, or on the wall until the GPU has finished."""
    def now():
        if GPU:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    start = now()
    for _ in range(repeat):
        call()
    return (now() - start) / repeat


def cpu_of_children():
    """CPU seconds of all processes started here that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def in_turn(calls, rounds=5, repeat=1):
    """calls {name: function} take turns -> {name: seconds (rounds,)}; a round before the first warms up."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds(call, repeat))
    return {name: np.array(taken[1:]) for name, taken in times.items()}


def show(title, times, note=""):
    """Print a row: times {name: seconds (rounds,)} and how many times as long as ours the others take."""
    cells = [f"{name} {np.median(taken):.3g} s" for name, taken in times.items()]
    for name in list(times)[1:]:
        ratio = times[name] / times["ours"]
        cells.append(f"{name} / ours {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
    print("|", " | ".join([title, *cells, note]), flush=True)


def in_child(task):
    """task() in a forked process -> the number it returns, peak memory of the process in MiB."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            answer = task()
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writer, f"{answer} {peak_kib / 2**10}".encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)  # nothing of the parent's runs twice
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read().split()
    os.wait()
    return tuple(map(float, answer)) or (math.nan, math.nan)


# ---- training steps ----------------------------------------------------------------------------------------
def build(ssl, arch, local_views=simdino.LOCAL_VIEWS_2D):
    """A method as train.py makes it, compiled on a GPU, and its optimizer."""
    if ssl == "simdino":
        encoder = model.ViT(arch, cls_token=True, drop_path=train.DROP_PATH)
        method = simdino.SimDINO(encoder, local_views)
    else:
        method = mae.MAE.for_encoder(model.ViT(arch))
    for block in method.modules():
        if GPU and isinstance(block, model.Block):
            block.compile(dynamic=False)
    return method.to(DEVICE), train.make_optimizer(method.to(DEVICE))


def update(network, optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], 3.0)
    optimizer.step()


def step(method, optimizer, x, forward=None):
    """One update on x (B, C, H, W, S) as in train.fit: inputs, forward, backward, AdamW, teacher."""
    inputs = method.make_inputs(x, torch.Generator().manual_seed(0))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
        loss = (forward or method)(*inputs)[0]
    update(method, optimizer, loss)
    method.after_step(0.5)


def flops(method, x):
    """Matrix products of a step's networks, forward and backward, without recomputation, views and loss.

    Counted on the meta device, where attention is two products: the CPU's fused one is not counted. The
    method stays there, without weights.
    """
    inputs = method.make_inputs(x, torch.Generator().manual_seed(0))
    method.to("meta")
    with FlopCounterMode(display=False) as counter:
        if isinstance(method, simdino.SimDINO):
            views = inputs[0]
            both = torch.cat(views[:2]).to("meta")
            local = torch.cat(views[2:]).to("meta")
            method.teacher(both)  # takes no gradient
            (method.student(both).sum() + method.student(local).sum()).backward()
        else:
            method(*(part.to("meta") for part in inputs))[0].backward()
    return counter.get_total_flops()


def peak():
    """FLOP/s of a large matrix product in the number format of a step, the best of ten."""
    n = 8192 if GPU else 2048
    dtype = torch.bfloat16 if GPU else torch.float32
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(10))


# ---- rows: training ----------------------------------------------------------------------------------------
def monai_step(x, arch, decoder_dim, fused):
    """A step on x of MONAI's masked autoencoder of the same sizes, with or without fused attention."""
    width, depth, heads = model.ARCHS[arch]
    net = peer("monai.networks.nets").MaskedAutoEncoderViT(
        3, x.shape[2:], model.PATCH_SIZE, width, 4 * width, depth, heads, 0.75, decoder_dim, 4 * decoder_dim,
        8, decoder_dim // 32, pos_embed_type="learnable", decoder_pos_embed_type="learnable", qkv_bias=True)
    for block in net.modules():
        if hasattr(block, "use_flash_attention"):
            block.use_flash_attention = fused
    optimizer = torch.optim.AdamW(net.to(DEVICE).parameters(), fused=True)

    def one():
        full = model.expand(model.normalize(x))  # (B, 3, H, W, S)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            prediction, hidden = net(full)  # (B, N, P), (B, N)
        error = (prediction.float() - model.patchify(full)).square().mean(dim=2)  # (B, N)
        update(net, optimizer, (error * hidden).sum() / hidden.sum())
    return one


def mae_row():
    """A MAE step beside MONAI's, as it comes and with its attention switched to the fused one."""
    arch = "vit_b" if GPU else "vit_t"
    for B, shape, rounds in ((4, SMALL_VOLUME, 5), (1, SAMPLES["volume"], 2)):
        x = torch.rand(B, *shape, device=DEVICE)
        method, optimizer = build("mae", arch)
        calls = {"ours": lambda: step(method, optimizer, x)}
        if peer("monai"):
            width = method.config["decoder_dim"]
            calls["MONAI"] = monai_step(x, arch, width, fused=False)
            calls["MONAI fused"] = monai_step(x, arch, width, fused=True)
        tokens = math.prod(shape) // math.prod(model.PATCH_SIZE)
        show(f"MAE step, {arch}, {tokens} tokens, batch {B}", in_turn(calls, rounds))


def simdino_row():
    """A SimDINO step beside a plain loop: one forward of each view, for the student and for the teacher."""
    for title, B, shape in (("image", 4, SAMPLES["image"]), ("volume of 512 tokens", 2, SMALL_VOLUME)):
        x = torch.rand(B, *shape, device=DEVICE)
        method, optimizer = build("simdino", "vit_t")

        def loop(views):
            with torch.no_grad():
                teacher = torch.stack([method.teacher(view) for view in views[:2]])  # (2, B, d)
            student = torch.stack([method.student(view) for view in views])  # (V, B, d)
            return simdino.simdino_loss(student, teacher)

        calls = {"ours": lambda: step(method, optimizer, x), "loop": lambda: step(method, optimizer, x, loop)}
        show(f"SimDINO step, vit_t, {title}, batch {B}", in_turn(calls))


def run_training(checkout, ssl, cache, steps):
    """Steps of the demo by the train.py of a checkout -> {modality: median seconds on the wall}, CPU seconds.

    The loader and the number format that train.py chooses are in it. The wall seconds are those of its own
    log, the CPU seconds those of the whole process.
    """
    threads = {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        flags = ["--ssl", ssl, "--preset", "demo", "--data", cache, "--out", out, "--max-steps", str(steps)]
        before = cpu_of_children()
        command = [sys.executable, checkout / "train.py", *flags]
        subprocess.run(command, env=threads | os.environ, check=True, capture_output=True)
        cpu = cpu_of_children() - before
        lines = Path(out, "log.jsonl").read_text().splitlines()

    batch = train.PRESETS["demo"]["batch_size"]
    taken = defaultdict(list)
    for record in map(json.loads, lines):
        taken[record["modality"]].append(batch / record["samples_per_s"])
    return {modality: np.median(times) for modality, times in taken.items()}, cpu


def step_row(before=None, steps=64, rounds=3):
    """Whole training steps of the demo; with --before FOLDER beside those of another checkout."""
    checkouts = {"ours": ROOT}
    if before:
        checkouts["before"] = before.absolute()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, prepare.__file__, "demo"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cache = Path(folder, "cache/demo")
        for ssl in ("mae", "simdino"):
            wall = defaultdict(lambda: {name: [] for name in checkouts})  # {modality: {name: seconds}}
            cpu = {name: [] for name in checkouts}
            for _ in range(rounds):
                for name, checkout in checkouts.items():
                    _, start = run_training(checkout, ssl, cache, 1)  # what starting the program costs
                    medians, whole = run_training(checkout, ssl, cache, steps)
                    cpu[name].append((whole - start) / (steps - 1))
                    for modality, median in medians.items():
                        wall[modality][name].append(median)

            for modality, times in wall.items():
                times = {name: np.array(taken) for name, taken in times.items()}
                show(f"{ssl} step of the demo, {modality}", times, "on the wall")
            times = {name: np.array(taken) for name, taken in cpu.items()}
            show(f"{ssl} step of the demo, mean of all", times, "CPU seconds")


def monai_views(shape, antialias):
    """Algorithm 3 as MONAI's transforms: six pipelines from (1, H, W, S) to a view; ours always antialias."""
    make = peer("monai.transforms")

    def crop(low, high, size):
        least = [int(low**0.5 * n) for n in shape]
        most = [int(high**0.5 * n) for n in shape]
        sides = [round(size * n) for n in shape]
        return [make.RandSpatialCrop(least, most, random_size=True),
                make.Resize(sides, mode="trilinear", anti_aliasing=antialias)]

    both = [*crop(*simdino.GLOBAL_AREA, simdino.GLOBAL_SIZE), make.RandFlip(0.5, spatial_axis=1),
            make.RandShiftIntensity(simdino.SHIFT, prob=0.5)]
    first = [*both, make.RandGaussianSmooth(*[simdino.BLUR] * 3, prob=0.5)]
    second = [*both, make.RandAdjustContrast(prob=0.5, gamma=simdino.CONTRAST)]
    local = crop(*simdino.LOCAL_AREA, simdino.LOCAL_SIZE)
    return [make.Compose(steps) for steps in (first, second, *[local] * 4)]


def views_row():
    """The views of one volume beside MONAI's transforms, and their share of a SimDINO step."""
    x = torch.rand(1, *SAMPLES["volume"], device=DEVICE)
    calls = {"ours": lambda: simdino.make_views(x)}
    if peer("monai"):
        plain = monai_views(x.shape[2:], antialias=False)
        smooth = monai_views(x.shape[2:], antialias=True)
        calls["MONAI"] = lambda: [view(x[0]) for view in plain]
        calls["MONAI antialiased"] = lambda: [view(x[0]) for view in smooth]
    times = in_turn(calls, repeat=12)  # draws of what is random: MONAI blurs half of them, at great cost

    method, optimizer = build("simdino", "vit_t")
    whole = in_turn({"": lambda: step(method, optimizer, x)}, rounds=2)[""].min()
    share = np.median(times["ours"]) / whole
    show("six views of 256 x 256 x 64", times, f"ours are {share:.1%} of a vit_t step of {whole:.3g} s")


def flops_row():
    """FLOPs of a step, and the share of the device's rate of matrix products that it reaches."""
    print(f"| matrix product | {peak() / 1e9:.0f} GFLOP/s")
    B = 16 if GPU else 1
    for arch in ("vit_t", "vit_b"):
        rounds = 1 if arch == "vit_b" and not GPU else 3
        for ssl in ("mae", "simdino"):
            for title, shape in SAMPLES.items():
                x = torch.rand(B, *shape, device=DEVICE)
                method, optimizer = build(ssl, arch)
                taken = min(seconds(lambda: step(method, optimizer, x)) for _ in range(rounds))
                rate = peak()
                work = flops(method, x)
                print(f"| {arch} {ssl} {title}, batch {B} | {work / B / 1e12:.3f} TFLOP a sample | "
                      f"{taken:.2f} s | {work / taken / rate:.0%} of the rate", flush=True)


def largest_batch(ssl, shape):
    method, optimizer = build(ssl, "vit_b")
    B = 1
    used = math.nan
    try:
        while True:
            step(method, optimizer, torch.rand(B, *shape, device=DEVICE))
            used = torch.cuda.max_memory_allocated() / 2**30
            B = 2 * B
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return f"vit_b: {B // 2} fit, with {used:.1f} GiB; {B} do not"


def memory_of_one(ssl, shape):
    def once(B):
        method, _ = build(ssl, "vit_t")
        inputs = method.make_inputs(torch.rand(B, *shape), torch.Generator().manual_seed(0))
        return seconds(lambda: method(*inputs)[0].backward())

    taken, one = in_child(lambda: once(1))
    _, two = in_child(lambda: once(2))
    return f"vit_t: {two - one:.0f} MiB a sample | {taken:.2f} s"


def memory_row():
    """Memory of a sample in training, activations kept or recomputed; on a GPU the largest batch."""
    for title, shape in (("1,024 tokens", (1, 128, 128, 64)), ("4,096 tokens", SAMPLES["volume"])):
        for ssl in ("mae", "simdino"):
            for label, above in (("kept", math.inf), ("recomputed", 0)):
                model.RECOMPUTE_ABOVE = above
                found = (largest_batch if GPU else memory_of_one)(ssl, shape)
                print(f"| {ssl} volume of {title}, {label} | {found}", flush=True)


# ---- rows: search and files --------------------------------------------------------------------------------
def all_pairs():
    """Leave-one-out retrieval of the largest task -> seconds on the wall; prints those of the cores."""
    torch.set_num_threads(os.cpu_count())
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(25687)]
    vectors = rng.standard_normal((25687, 1536), np.float32)
    labels = [(str(one), str(other)) for one, other in rng.integers(0, 18, (25687, 2))]
    cpu = time.process_time()
    wall = time.perf_counter()
    evaluate.evaluate_retrieval(vectors, vectors, labels, labels, [(ids, ids)])
    cpu = time.process_time() - cpu
    print(f"| all pairs, 25,687 x 25,687 x 1,536 | {cpu:.1f} CPU s", end="", flush=True)
    return time.perf_counter() - wall


def search_row():
    """embed.search beside FAISS's exact index; leave-one-out retrieval in the largest task, on all cores."""
    queries = torch.randn(2000, 768, device=DEVICE)
    gallery = torch.randn(30000, 768, device=DEVICE)
    calls = {"ours": lambda: embed.search(queries, gallery, 10)}
    faiss = peer("faiss")
    if faiss:
        faiss.omp_set_num_threads(1)
        asked = F.normalize(queries, dim=1).cpu().numpy()
        index = faiss.IndexFlatIP(768)
        index.add(F.normalize(gallery, dim=1).cpu().numpy())
        calls["FAISS"] = lambda: index.search(asked, 10)
    show("search, 2,000 x 30,000 x 768, top 10", in_turn(calls))

    wall, most = in_child(all_pairs)
    print(f" | {wall:.1f} s on the wall, {os.cpu_count()} cores | peak {most:.0f} MiB")


def read_ours(path, kind):
    """One file or series through prepare's own readers -> (C, H, W, S)."""
    if kind == "series":
        # The pass over the headers that finds the series of a folder is part of the work.
        headers = [prepare.read_header("", str(file), "", allow_2d=True) for file in sorted(path.iterdir())]
        sample = prepare.group_series(headers, allow_2d=True)[0][0]
    else:
        sample = prepare.Sample([str(path)], kind, "xray" if kind == "image" else "ct")
    return prepare.decode(sample, "", 256, 64, 16)[0]


def read_monai(path, kind):
    """The same with MONAI's transforms -> (C, x, y, z)."""
    make = peer("monai.transforms")
    reader = {"image": "PILReader", "series": "PydicomReader", "nifti": "NibabelReader"}[kind]
    load = [make.LoadImage(image_only=True, reader=reader), make.EnsureChannelFirst()]
    if kind == "image":
        steps = [make.ScaleIntensityRange(0, 255, 0, 1, clip=True), make.Resize((256, 256))]
    else:
        steps = [make.Orientation("LPS", labels=None), make.ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
                 make.Resize((256, 256, 64))]
    return make.Compose([*load, *steps])(path)


def write_files(folder):
    """A noisy ball in air as a DICOM series and as NIfTI, and noise as a PNG."""
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 512, dtype=np.float32)
    z = np.linspace(-1, 1, 300)
    plane = axis[:, None] ** 2 + axis**2  # (512, 512)
    ball = plane[..., None] + z**2 < 0.8  # (512, 512, 300)
    hu = (np.where(ball, 40, -1000) + rng.integers(-20, 20, ball.shape)).astype(np.int16)
    noise = rng.integers(0, 40, (1024, 1024)) + np.arange(1024) // 5
    Image.fromarray(noise.astype(np.uint8)).save(folder / "image.png")
    phantoms.write_series(folder / "series", hu, (0.7, 0.7, 1.0), "ball", rng)
    phantoms.write_nifti(folder / "nifti.nii.gz", hu, (0.7, 0.7, 1.0), rng)
    return 0


def time_reader(read, path, repeat):
    """CPU seconds of reading a file, once the imports and the first call are done."""
    logging.disable()  # MONAI tells each time which decoders it lacks
    kind = path.name.partition(".")[0]
    read(path, kind)
    return seconds(lambda: read(path, kind), repeat)


def prepare_row():
    """From file to array of the cache beside MONAI's transforms, each reader in a process of its own."""
    readers = {"ours": read_ours}
    if peer("monai"):
        readers["MONAI"] = read_monai
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        in_child(lambda: write_files(folder))  # whose memory the readers' processes do not begin with
        for title, name, repeat in (("PNG 1024 x 1024", "image.png", 20),
                                    ("300 DICOM slices 512 x 512", "series", 1),
                                    ("NIfTI .nii.gz 512 x 512 x 300", "nifti.nii.gz", 1)):
            times = {who: [] for who in readers}
            peaks = {who: 0 for who in readers}  # MiB
            for _ in range(3):
                for who, read in readers.items():
                    taken, most = in_child(lambda: time_reader(read, folder / name, repeat))
                    times[who].append(taken)
                    peaks[who] = max(peaks[who], most)
            note = ", ".join(f"{who} {most:.0f}" for who, most in peaks.items())
            show(title, {who: np.array(taken) for who, taken in times.items()}, f"peak MiB: {note}")


def fit(title, sizes, costs):
    """Print the exponent p of costs ~ sizes^p, by least squares of the logarithms."""
    p = np.polyfit(np.log(sizes), np.log(costs), 1)[0]
    sizes = ", ".join(map(str, sizes))
    costs = ", ".join(f"{cost:.3g}" for cost in costs)
    print(f"| {title} {sizes} | {costs} s | exponent {p:.2f}", flush=True)


def cost_of_preparing(n):
    """CPU seconds of prepare.py on n small PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            noise = np.random.default_rng(i).integers(0, 256, (128, 128), dtype=np.uint8)
            Image.fromarray(noise).save(f"{folder}/{i}.png")
        flags = f"{folder} --modality xray --size 64 --workers 1 --out {folder}/cache".split()
        before = cpu_of_children()
        subprocess.run([sys.executable, prepare.__file__, "folder", *flags], check=True, capture_output=True)
        return cpu_of_children() - before


def scaling_row():
    """How cost grows: a step with its tokens, search with the gallery, prepare with the files."""
    def best(call):
        return in_turn({"": call}, rounds=3)[""].min()

    for ssl in ("mae", "simdino"):
        method, optimizer = build(ssl, "vit_t")
        tokens, costs = [], []
        for depth in (8, 16, 32, 64):
            x = torch.rand(1, 1, 128, 128, depth, device=DEVICE)
            tokens.append(16 * depth)
            costs.append(best(lambda: step(method, optimizer, x)))
        fit(f"{ssl} step, vit_t, tokens", tokens, costs)

    queries = torch.randn(500, 256, device=DEVICE)
    gallery = torch.randn(80_000, 256, device=DEVICE)
    sizes = (10_000, 20_000, 40_000, 80_000)
    fit("search, candidates", sizes, [best(lambda: embed.search(queries, gallery[:n], 10)) for n in sizes])

    start = cost_of_preparing(1)  # what starting the program costs
    sizes = (200, 400, 800, 1600)
    fit("prepare, PNG files", sizes, [cost_of_preparing(n) - start for n in sizes])


ROWS = {row.__name__.removesuffix("_row"): row for row in (
    step_row, mae_row, simdino_row, views_row, search_row, prepare_row, flops_row, scaling_row, memory_row)}


def main():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("row", choices=[*ROWS, "all"])
    parser.add_argument("--before", type=Path, help="step: folder of another checkout of this repository")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # as train.py: one static graph for each shape

    print(machine())
    for name in ROWS if args.row == "all" else [args.row]:
        print(f"\n{name}: {ROWS[name].__doc__}", flush=True)
        if name == "step":
            step_row(args.before)
        else:
            ROWS[name]()


if __name__ == "__main__":
    main()
