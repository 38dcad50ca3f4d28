"""How fast the stages are, each beside a peer that does the same; docs/benchmarks.md holds the tables.

    pip install monai einops faiss-cpu        # the peers, needed here only; a missing one leaves its part out
    python tests/benchmark.py mae             # one of the rows below, or: all

Ours and the peer take turns in one process, on inputs made here. What counts is their ratio, printed as the
median of the rounds and their smallest and largest. A CPU works with one thread (but for all pairs) and CPU
seconds are taken, which a busy neighbour stretches less than time on the wall. On a GPU blocks are compiled,
networks run in bf16 under autocast, and the clock waits for the device. No test is timed.
"""
import argparse
import importlib
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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
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


# ---- clocks -----------------------------------------------------------------------------------------------
def seconds(call, repeat=1):
    """Of one call: CPU seconds of this process, or on the wall until the GPU has finished."""
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if GPU else (time.process_time, lambda: None)
    wait()
    start = clock()
    for _ in range(repeat):
        call()
    wait()
    return (clock() - start) / repeat


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
            answer, usage = task(), resource.getrusage(resource.RUSAGE_SELF)
            os.write(writer, f"{answer} {usage.ru_maxrss / 2**10}".encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)  # nothing of the parent's runs twice
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read().split()
    os.wait()
    return tuple(map(float, answer)) or (math.nan, math.nan)


# ---- training steps ---------------------------------------------------------------------------------------
def build(ssl, arch, local_views=simdino.LOCAL_VIEWS_2D):
    """A method as train.py makes it, compiled on a GPU, and its optimizer."""
    if ssl == "simdino":
        encoder = model.ViT(arch, cls_token=True, drop_path=train.DROP_PATH)
        method = simdino.SimDINO(encoder, local_views)
    else:
        width = min(512, model.ARCHS[arch][0])
        method = mae.MAE(model.ViT(arch), decoder_dim=width, decoder_heads=width // 32)
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
            both, local = (torch.cat(views).to("meta") for views in (inputs[0][:2], inputs[0][2:]))
            method.teacher(both)  # takes no gradient
            (method.student(both).sum() + method.student(local).sum()).backward()
        else:
            method(*(part.to("meta") for part in inputs))[0].backward()
    return counter.get_total_flops()


def peak():
    """FLOP/s of a large matrix product in the number format of a step, the best of ten."""
    n, dtype = (8192, torch.bfloat16) if GPU else (2048, torch.float32)
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(10))


# ---- rows: training ---------------------------------------------------------------------------------------
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
    arch, width = ("vit_b", 512) if GPU else ("vit_t", 192)
    for B, shape, rounds in ((4, SMALL_VOLUME, 5), (1, SAMPLES["volume"], 2)):
        x = torch.rand(B, *shape, device=DEVICE)
        ours = build("mae", arch)
        calls = {"ours": lambda: step(*ours, x)}
        if peer("monai"):
            calls |= {name: monai_step(x, arch, width, name != "MONAI") for name in ("MONAI", "MONAI fused")}
        tokens = math.prod(shape) // math.prod(model.PATCH_SIZE)
        show(f"MAE step, {arch}, {tokens} tokens, batch {B}", in_turn(calls, rounds))


def simdino_row():
    """A SimDINO step beside a plain loop: one forward of each view, for the student and for the teacher."""
    for title, B, shape in (("image", 4, SAMPLES["image"]), ("volume of 512 tokens", 2, SMALL_VOLUME)):
        x, (method, optimizer) = torch.rand(B, *shape, device=DEVICE), build("simdino", "vit_t")

        def loop(views):
            with torch.no_grad():
                teacher = torch.stack([method.teacher(view) for view in views[:2]])  # (2, B, d)
            return simdino.simdino_loss(torch.stack([method.student(view) for view in views]), teacher)
        calls = {"ours": lambda: step(method, optimizer, x), "loop": lambda: step(method, optimizer, x, loop)}
        show(f"SimDINO step, vit_t, {title}, batch {B}", in_turn(calls))


def monai_views(shape, antialias):
    """Algorithm 3 as MONAI's transforms: six pipelines from (1, H, W, S) to a view; ours always antialias."""
    make = peer("monai.transforms")

    def crop(low, high, size):
        least, most = ([int(share**0.5 * n) for n in shape] for share in (low, high))
        return [make.RandSpatialCrop(least, most, random_size=True),
                make.Resize([round(size * n) for n in shape], mode="trilinear", anti_aliasing=antialias)]
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
        plain, smooth = (monai_views(x.shape[2:], antialias) for antialias in (False, True))
        calls |= {"MONAI": lambda: [view(x[0]) for view in plain],
                  "MONAI antialiased": lambda: [view(x[0]) for view in smooth]}
    times = in_turn(calls, repeat=12)  # draws of what is random: MONAI blurs half of them, at great cost
    method, optimizer = build("simdino", "vit_t")
    whole = in_turn({"": lambda: step(method, optimizer, x)}, rounds=2)[""].min()
    share = np.median(times["ours"]) / whole
    show("six views of 256 x 256 x 64", times, f"ours are {share:.1%} of a vit_t step of {whole:.3g} s")


def flops_row():
    """FLOPs of a step, and the share of the device's rate of matrix products that it reaches."""
    print(f"| matrix product | {peak() / 1e9:.0f} GFLOP/s")
    for arch in ("vit_t", "vit_b"):
        for ssl in ("mae", "simdino"):
            for title, shape in SAMPLES.items():
                B = 16 if GPU else 1
                x, (method, optimizer) = torch.rand(B, *shape, device=DEVICE), build(ssl, arch)
                rounds = 1 if arch == "vit_b" and not GPU else 3
                taken = min(seconds(lambda: step(method, optimizer, x)) for _ in range(rounds))
                rate, work = peak(), flops(method, x)
                print(f"| {arch} {ssl} {title}, batch {B} | {work / B / 1e12:.3f} TFLOP a sample | "
                      f"{taken:.2f} s | {work / taken / rate:.0%} of the rate", flush=True)


def memory_row():
    """Memory of a sample in training, activations kept or recomputed; on a GPU the largest batch."""
    for title, shape in (("1,024 tokens", (1, 128, 128, 64)), ("4,096 tokens", SAMPLES["volume"])):
        for ssl in ("mae", "simdino"):
            for label, above in (("kept", math.inf), ("recomputed", 0)):
                model.RECOMPUTE_ABOVE = above
                found = (largest_batch if GPU else memory_of_one)(ssl, shape)
                print(f"| {ssl} volume of {title}, {label} | {found}", flush=True)


def largest_batch(ssl, shape):
    (method, optimizer), B, used = build(ssl, "vit_b"), 1, math.nan
    try:
        while True:
            step(method, optimizer, torch.rand(B, *shape, device=DEVICE))
            used, B = torch.cuda.max_memory_allocated() / 2**30, 2 * B
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return f"vit_b: {B // 2} fit, with {used:.1f} GiB; {B} do not"


def memory_of_one(ssl, shape):
    def once(B):
        method, _ = build(ssl, "vit_t")
        inputs = method.make_inputs(torch.rand(B, *shape), torch.Generator().manual_seed(0))
        return seconds(lambda: method(*inputs)[0].backward())
    (taken, one), (_, two) = (in_child(lambda: once(B)) for B in (1, 2))
    return f"vit_t: {two - one:.0f} MiB a sample | {taken:.2f} s"


# ---- rows: search and files -------------------------------------------------------------------------------
def search_row():
    """embed.search beside FAISS's exact index; leave-one-out retrieval in the largest task, on all cores."""
    queries, gallery = (torch.randn(n, 768, device=DEVICE) for n in (2000, 30000))
    calls = {"ours": lambda: embed.search(queries, gallery, 10)}
    if faiss := peer("faiss"):
        faiss.omp_set_num_threads(1)
        q, g = (F.normalize(x, dim=1).cpu().numpy() for x in (queries, gallery))
        index = faiss.IndexFlatIP(768)
        index.add(g)
        calls["FAISS"] = lambda: index.search(q, 10)
    show("search, 2,000 x 30,000 x 768, top 10", in_turn(calls))

    def all_pairs():
        torch.set_num_threads(os.cpu_count())
        rng, ids = np.random.default_rng(0), list(map(str, range(25687)))
        vectors = rng.standard_normal((25687, 1536), np.float32)
        labels = [tuple(map(str, pair)) for pair in rng.integers(0, 18, (25687, 2))]
        start, wall = time.process_time(), time.perf_counter()
        evaluate.evaluate_retrieval(vectors, vectors, labels, labels, [(ids, ids)])
        cpu = time.process_time() - start
        print(f"| evaluate.evaluate_retrieval, 25,687 x 25,687 x 1,536 | {cpu:.1f} CPU s", end="", flush=True)
        return time.perf_counter() - wall
    wall, most = in_child(all_pairs)
    print(f" | {wall:.1f} s on the wall, {os.cpu_count()} cores | peak {most:.0f} MiB")


def read_ours(path, kind):
    """One file or series through prepare's own readers -> (C, H, W, S)."""
    files = sorted(map(str, path.iterdir())) if kind == "series" else [str(path)]
    if kind == "series":
        for file in files:  # the pass over the headers that finds the series of a folder
            prepare.dicom_header(file)
    job = prepare.Sample(files, kind, "xray" if kind == "image" else "ct", id="0" * 16)
    return prepare.decode(job, "", 256, 64, 16)[0]


def read_monai(path, kind):
    """The same with MONAI's transforms -> (C, x, y, z)."""
    make, volume = peer("monai.transforms"), kind != "image"
    reader = {"image": "PILReader", "series": "PydicomReader", "nifti": "NibabelReader"}[kind]
    load = [make.LoadImage(image_only=True, reader=reader), make.EnsureChannelFirst()]
    steps = [make.ScaleIntensityRange(0, 255, 0, 1, clip=True), make.Resize((256, 256))]
    if volume:
        steps = [make.Orientation("LPS", labels=None), make.ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
                 make.Resize((256, 256, 64))]
    return make.Compose([*load, *steps])(path)


def write_files(folder):
    """A noisy ball in air as a DICOM series and as NIfTI, and noise as a PNG."""
    rng, axis = np.random.default_rng(0), np.linspace(-1, 1, 512, dtype=np.float32)
    plane, z = axis[:, None] ** 2 + axis**2, np.linspace(-1, 1, 300)  # (512, 512), (300,)
    ball = plane[..., None] + z**2 < 0.8  # (512, 512, 300)
    hu = (np.where(ball, 40, -1000) + rng.integers(-20, 20, ball.shape)).astype(np.int16)
    noise = rng.integers(0, 40, (1024, 1024)) + np.arange(1024) // 5
    Image.fromarray(noise.astype(np.uint8)).save(folder / "image.png")
    phantoms.write_series(folder / "series", hu, (0.7, 0.7, 1.0), "ball", rng)
    phantoms.write_nifti(folder / "nifti.nii.gz", hu, (0.7, 0.7, 1.0), rng)
    return 0


def prepare_row():
    """From file to array of the cache beside MONAI's transforms, each reader in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        in_child(lambda: write_files(folder))  # whose memory the readers' processes do not begin with
        for title, name, repeat in (("PNG 1024 x 1024", "image.png", 20),
                                    ("300 DICOM slices 512 x 512", "series", 1),
                                    ("NIfTI .nii.gz 512 x 512 x 300", "nifti.nii.gz", 1)):
            def take(read):
                logging.disable()  # MONAI tells each time which decoders it lacks
                kind = name.partition(".")[0]
                read(folder / name, kind)  # imports and first calls are not the file's
                start = time.process_time()
                for _ in range(repeat):
                    read(folder / name, kind)
                return (time.process_time() - start) / repeat
            readers = {"ours": read_ours} | ({"MONAI": read_monai} if peer("monai") else {})
            rounds = [[in_child(lambda: take(read)) for read in readers.values()] for _ in range(3)]
            found = np.array(rounds)  # (3 rounds, readers, 2)
            peaks = ", ".join(f"{who} {most:.0f}" for who, most in zip(readers, found[..., 1].max(axis=0)))
            show(title, dict(zip(readers, found[..., 0].T)), f"peak MiB: {peaks}")


def fit(title, sizes, costs):
    """Print the exponent p of costs ~ sizes^p, by least squares of the logarithms."""
    p = np.polyfit(np.log(sizes), np.log(costs), 1)[0]
    sizes, costs = ", ".join(map(str, sizes)), ", ".join(f"{cost:.3g}" for cost in costs)
    print(f"| {title} {sizes} | {costs} s | exponent {p:.2f}", flush=True)


def scaling_row():
    """How cost grows: a step with its tokens, search with the gallery, prepare with the files."""
    def best(call):
        return in_turn({"": call}, rounds=3)[""].min()
    for ssl in ("mae", "simdino"):
        (method, optimizer), depths = build(ssl, "vit_t"), (8, 16, 32, 64)
        x = [torch.rand(1, 1, 128, 128, S, device=DEVICE) for S in depths]
        costs = [best(lambda: step(method, optimizer, part)) for part in x]
        fit(f"{ssl} step, vit_t, tokens", [16 * S for S in depths], costs)
    queries, gallery = (torch.randn(n, 256, device=DEVICE) for n in (500, 80_000))
    sizes = (10_000, 20_000, 40_000, 80_000)
    fit("search, candidates", sizes, [best(lambda: embed.search(queries, gallery[:n], 10)) for n in sizes])
    files, costs = (1, 200, 400, 800, 1600), []  # one file costs what starting the program does
    for n in files:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(n):
                noise = np.random.default_rng(i).integers(0, 256, (128, 128), dtype=np.uint8)
                Image.fromarray(noise).save(f"{folder}/{i}.png")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            flags = f"{folder} --modality xray --size 64 --workers 1 --out {folder}/cache".split()
            command = [sys.executable, prepare.__file__, "folder", *flags]
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            costs.append(sum(after[:2]) - sum(before[:2]))
    fit("prepare, PNG files", files[1:], np.array(costs[1:]) - costs[0])


ROWS = {row.__name__.removesuffix("_row"): row for row in (
    mae_row, simdino_row, views_row, search_row, prepare_row, flops_row, scaling_row, memory_row)}


def main():
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("row", choices=[*ROWS, "all"])
    chosen = parser.parse_args().row
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # as train.py: one static graph for each shape
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
    print(f"{device}, Python {platform.python_version()}, torch {torch.__version__}")
    for name in ROWS if chosen == "all" else [chosen]:
        print(f"\n{name}: {ROWS[name].__doc__}", flush=True)
        ROWS[name]()


if __name__ == "__main__":
    main()
