"""How fast the stages are, each beside a peer doing the same work; the tables are in docs/benchmarks.md.

    pip install monai faiss-cpu               # the peers, needed here only; without one its column stays empty
    python tests/benchmark.py mae             # one row of ROWS below, or: all

Ours and the peer take turns in one process, on inputs made here; what counts is the ratio of a round, of which
the smallest, the median and the largest are printed. On a CPU everything runs on one thread (but for allpairs)
and CPU seconds are taken, which a busy neighbour stretches less than time on the wall. On a GPU the blocks are
compiled, steps run in bf16 under autocast, and the clock waits for the device. No test is timed.
"""
import argparse
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
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import embed  # noqa: E402
import evaluate  # noqa: E402
import mae  # noqa: E402
import model  # noqa: E402
import phantoms  # noqa: E402
import prepare  # noqa: E402
import simdino  # noqa: E402
import train  # noqa: E402

try:
    import monai
    from monai import transforms
except ImportError:
    monai = None
try:
    import faiss  # exact search on CPUs
except ImportError:
    faiss = None

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
IMAGE, VIDEO, VOLUME = (1, 256, 256, 1), (3, 256, 256, 16), (1, 256, 256, 64)  # (C, H, W, S), Sec. 3.4


# ---- clocks -----------------------------------------------------------------------------------------------
def clock():
    """Seconds: of this process's CPU, or on the wall once the GPU has finished."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call, repeat=1):
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def in_turn(calls, rounds=5, repeat=1):
    """calls {name: function} take turns -> {name: seconds of each round (rounds,)}; one more round warms up."""
    times = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, repeat)
            if number > 0:
                times[name].append(taken)
    return {name: np.array(taken) for name, taken in times.items()}


def compare(title, calls, **how):
    """Print a row: median seconds of each call, and how many times as long as the first the others take."""
    times = in_turn(calls, **how)
    ours = next(iter(times.values()))
    cells = [f"{name} {np.median(taken):.4g} s" for name, taken in times.items()]
    for name, taken in list(times.items())[1:]:
        ratio = taken / ours
        cells.append(f"{name} / ours {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
    print(f"| {title} | {' | '.join(cells)} |", flush=True)
    return times


def in_child(task):
    """task() in a forked process, so that its memory can be told -> (its float, peak MiB, of these at the start)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        warnings.simplefilter("ignore")
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            answer = task()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            os.write(writer, f"{answer} {peak} {pages * resource.getpagesize() / 2**20}".encode())
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read().split()
    os.waitpid(pid, 0)
    return tuple(map(float, answer)) or (math.nan,) * 3


def exponent(sizes, costs):
    """p of costs ~ sizes^p, by least squares of the logarithms."""
    return np.polyfit(np.log(sizes), np.log(costs), 1)[0]


# ---- training steps ---------------------------------------------------------------------------------------
def build(ssl, arch, local_views=simdino.LOCAL_VIEWS_2D):
    """A method as train.py makes it, compiled on a GPU, and its optimizer."""
    if ssl == "simdino":
        encoder = model.ViT(arch, cls_token=True, drop_path=train.DROP_PATH)
        method = simdino.SimDINO(encoder, local_views)
    else:
        width = min(512, model.ARCHS[arch][0])
        method = mae.MAE(model.ViT(arch), decoder_dim=width, decoder_heads=width // 32)
    method.to(DEVICE)
    if GPU:
        torch._dynamo.config.recompile_limit = 64
        for block in method.modules():
            if isinstance(block, model.Block):
                block.compile(dynamic=False)
    return method, train.make_optimizer(method)


def update(method, optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in method.parameters() if p.requires_grad], 3.0)
    optimizer.step()


def step(method, optimizer, x, forward=None):
    """One optimizer update on x (B, C, H, W, S) as in train.fit: inputs, forward, backward, AdamW, teacher."""
    inputs = method.inputs(x, torch.Generator().manual_seed(0))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
        loss = (forward or method)(*inputs)[0]
    update(method, optimizer, loss)
    method.after_step(0.5)


def flops(method, x):
    """Matrix products of a step on x, forward and backward, recomputation and view-making left out.

    Counted on the meta device, where attention is two products: the CPU's fused attention is not counted.
    """
    inputs = method.inputs(x, torch.Generator().manual_seed(0))
    inputs = [[view.to("meta") for view in part] if isinstance(part, list) else part.to("meta")
              for part in inputs]
    with FlopCounterMode(display=False) as counter:
        method.to("meta")(*inputs)[0].backward()
    return counter.get_total_flops()


def peak():
    """FLOP/s of a large square matrix product, in the number format of a step: the best of ten."""
    n, dtype = (8192, torch.bfloat16) if GPU else (2048, torch.float32)
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(10))


# ---- rows -------------------------------------------------------------------------------------------------
def mae_row():
    """A MAE step beside MONAI's, as it is and with its blocks switched to fused attention."""
    arch, decoder = ("vit_b", 512) if GPU else ("vit_t", 192)
    width, depth, heads = model.ARCHS[arch]
    for B, shape in ((4, (1, 128, 128, 32)), (1, VOLUME)):
        grid = [n // p for n, p in zip(shape[1:], model.PATCH_SIZE)]
        x = torch.rand(B, *shape, device=DEVICE)
        method, optimizer = build("mae", arch)
        calls = {"ours": lambda: step(method, optimizer, x)}

        def peer(fused):
            net = monai.networks.nets.MaskedAutoEncoderViT(
                3, shape[1:], model.PATCH_SIZE, width, 4 * width, depth, heads, 0.75, decoder, 4 * decoder, 8,
                decoder // 32, pos_embed_type="learnable", decoder_pos_embed_type="learnable", qkv_bias=True)
            for block in net.modules():
                if hasattr(block, "use_flash_attention"):
                    block.use_flash_attention = fused
            net.to(DEVICE)
            adamw = torch.optim.AdamW(net.parameters(), fused=True)

            def one_step():
                full = model.expand(model.normalize(x))  # (B, 3, H, W, S)
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                    prediction, hidden = net(full)  # (B, N, P), (B, N)
                error = (prediction.float() - model.patchify(full)).square().mean(dim=2)  # (B, N)
                update(net, adamw, (error * hidden).sum() / hidden.sum())
            return one_step

        if monai:
            calls |= {"MONAI": peer(False), "MONAI fused": peer(True)}
        compare(f"MAE step, {arch}, {math.prod(grid)} tokens, batch {B}", calls, rounds=2 if B == 1 else 5)


def simdino_row():
    """A SimDINO step beside a plain loop: one forward of each view, for the student and for the teacher."""
    for title, arch, B, shape, views in (("image, 10 local views", "vit_t", 4, IMAGE, 10),
                                         ("volume, 4 local views", "vit_t", 2, (1, 128, 128, 32), 4)):
        x = torch.rand(B, *shape, device=DEVICE)
        method, optimizer = build("simdino", arch, views)

        def loop(crops):
            with torch.no_grad():
                teacher = torch.stack([method.teacher(crop) for crop in crops[:2]])  # (2, B, d)
            student = torch.stack([method.student(crop) for crop in crops])  # (V, B, d)
            return simdino.simdino_loss(student, teacher)

        compare(f"SimDINO step, {arch}, {title}, batch {B}", {
            "ours": lambda: step(method, optimizer, x), "loop": lambda: step(method, optimizer, x, loop)})


def monai_views(shape, antialias):
    """Algorithm 3 as MONAI's transforms: six pipelines from (1, H, W, S) to a view; ours always antialias."""
    def crop(low, high, size):
        least, most = ([int(share**0.5 * n) for n in shape] for share in (low, high))
        return [transforms.RandSpatialCrop(least, most, random_size=True),
                transforms.Resize([round(size * n) for n in shape], mode="trilinear", anti_aliasing=antialias)]

    seen = [*crop(*simdino.GLOBAL_AREA, simdino.GLOBAL_SIZE), transforms.RandFlip(0.5, spatial_axis=1),
            transforms.RandShiftIntensity(simdino.SHIFT, prob=0.5)]
    smooth = transforms.RandGaussianSmooth(*[simdino.BLUR] * 3, prob=0.5)
    contrast = transforms.RandAdjustContrast(prob=0.5, gamma=simdino.CONTRAST)
    local = crop(*simdino.LOCAL_AREA, simdino.LOCAL_SIZE)
    return [transforms.Compose(steps) for steps in ([*seen, smooth], [*seen, contrast], *[local] * 4)]


def views_row():
    """The views of one volume beside MONAI's transforms, and their share of a SimDINO step."""
    x, generator = torch.rand(1, *VOLUME, device=DEVICE), torch.Generator().manual_seed(0)
    calls = {"ours": lambda: simdino.make_views(x, generator=generator)}
    if monai:
        plain, smooth = (monai_views(VOLUME[1:], antialias) for antialias in (False, True))
        calls["MONAI"] = lambda: [view(x[0]) for view in plain]
        calls["MONAI antialiased"] = lambda: [view(x[0]) for view in smooth]
    # A round takes twelve draws of what is random: a blur happens in half of MONAI's, and takes most of its time.
    views = np.median(compare("six views of 256 x 256 x 64", calls, rounds=5, repeat=12)["ours"])
    method, optimizer = build("simdino", "vit_t")
    whole = np.median(in_turn({"step": lambda: step(method, optimizer, x)}, rounds=2)["step"])
    print(f"| views, share of a SimDINO step of vit_t, {whole:.3g} s | {views / whole:.1%} |")


def search_row():
    """embed.search beside FAISS's exact index, 2,000 queries x 30,000 candidates x 768, ten neighbours."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 768, generator=generator).to(DEVICE) for n in (2000, 30000))
    calls = {"ours": lambda: embed.search(queries, gallery, 10)}
    if faiss:
        faiss.omp_set_num_threads(torch.get_num_threads())
        q, g = (torch.nn.functional.normalize(x, dim=1).cpu().numpy() for x in (queries, gallery))

        def exact():
            index = faiss.IndexFlatIP(768)
            index.add(g)
            return index.search(q, 10)
        same = (exact()[1] == embed.search(queries, gallery, 10)[1].cpu().numpy()).mean()
        print(f"neighbours that agree in place: {same:.5f}")
        calls["FAISS"] = exact
    compare("search 2,000 x 30,000 x 768, top 10", calls)


def allpairs_row():
    """Leave-one-out retrieval of the largest task, 25,687 x 1,536, two of 18 labels each, on all cores."""
    def task():
        torch.set_num_threads(os.cpu_count())
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((25687, 1536), np.float32)
        labels = [tuple(map(str, pair)) for pair in rng.integers(0, 18, (25687, 2))]
        ids = list(map(str, range(25687)))
        start, wall = time.process_time(), time.perf_counter()
        evaluate.measure(vectors, vectors, labels, labels, [(ids, ids)])
        print(f"CPU seconds {time.process_time() - start:.1f}", flush=True)
        return time.perf_counter() - wall
    wall, high, _ = in_child(task)
    print(f"| evaluate.measure 25,687 x 25,687 x 1,536 | {wall:.1f} s on the wall | peak {high:.0f} MiB |")


def write_ct(folder, slices=300, side=512):
    """A noisy ball in air as a DICOM series and as a compressed NIfTI file."""
    rng, axis = np.random.default_rng(0), np.linspace(-1, 1, side, dtype=np.float32)
    plane, z = axis[:, None] ** 2 + axis[None] ** 2, np.linspace(-1, 1, slices)  # (side, side), (slices,)
    ball = plane[..., None] + z**2 < 0.8  # (side, side, slices)
    hu = (np.where(ball, 40, -1000) + rng.integers(-20, 20, ball.shape)).astype(np.int16)
    phantoms.write_series(folder / "series", hu, (0.7, 0.7, 1.0), "ball", rng)
    phantoms.write_nifti(folder / "ct.nii.gz", hu, (0.7, 0.7, 1.0), rng)


def ours(path, kind):
    """One file or series through prepare's own readers -> (C, H, W, S)."""
    files = sorted(map(str, path.iterdir())) if kind == "series" else [str(path)]
    if kind == "series":
        for file in files:  # the pass over the headers that groups a folder into series
            prepare.dicom_header(file)
    job = prepare.Job(files, kind, "xray" if kind == "image" else "ct", id="0" * 16)
    return prepare.decode(job, "", 256, 64, 16)[0]


def theirs(path, kind):
    """The same with MONAI's transforms -> (C, x, y, z)."""
    volume = kind != "image"
    reader = {"image": "PILReader", "series": "PydicomReader", "nifti": "NibabelReader"}[kind]
    steps = [transforms.LoadImage(image_only=True, reader=reader), transforms.EnsureChannelFirst()]
    steps += [transforms.Orientation("LPS", labels=None)] * volume
    steps += [transforms.ScaleIntensityRange(*((-1000, 1000) if volume else (0, 255)), 0, 1, clip=True)]
    return transforms.Compose([*steps, transforms.Resize((256, 256, 64) if volume else (256, 256))])(path)


def prepare_row():
    """From file to array of the cache beside MONAI's transforms; CPU seconds and peak memory of one process."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_ct(folder)
        noise = np.random.default_rng(0).integers(0, 40, (1024, 1024)) + np.arange(1024) // 5
        Image.fromarray(noise.astype(np.uint8)).save(folder / "xray.png")
        for name, kind, title, repeat in (("xray.png", "image", "PNG 1024 x 1024", 20),
                                          ("series", "series", "300 DICOM slices of 512 x 512", 1),
                                          ("ct.nii.gz", "nifti", "NIfTI .nii.gz 512 x 512 x 300", 1)):
            readers, found = {"ours": ours} | ({"MONAI": theirs} if monai else {}), {}

            def take(read):
                logging.disable()  # MONAI tells each time which readers it lacks
                read(folder / name, kind)  # imports and first calls are not the file's
                return seconds(lambda: read(folder / name, kind), repeat)
            for _ in range(3):
                for who, read in readers.items():
                    found.setdefault(who, []).append(in_child(lambda: take(read)))
            found = {who: np.array(rounds) for who, rounds in found.items()}  # (3, 3)
            cells = [f"{who} {np.median(f[:, 0]):.3f} s, {f[:, 1].max():.0f} MiB" for who, f in found.items()]
            if monai:
                ratio = found["MONAI"][:, 0] / found["ours"][:, 0]
                cells.append(f"MONAI / ours {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


def flops_row():
    """FLOPs a sample and the share of this device's matrix product rate that a step reaches."""
    print(f"| matrix product | {peak() / 1e9:.0f} GFLOP/s |")
    for arch in ("vit_t", "vit_b"):
        for ssl in ("mae", "simdino"):
            for title, shape in (("image", IMAGE), ("video", VIDEO), ("volume", VOLUME)):
                B = 16 if GPU else 2 if arch == "vit_t" and title == "image" else 1
                x = torch.rand(B, *shape, device=DEVICE)
                method, optimizer = build(ssl, arch)
                taken = [seconds(lambda: step(method, optimizer, x)) for _ in range(1 if arch == "vit_b" else 2)]
                work = flops(method, x)  # leaves the method without weights
                print(f"| {arch} {ssl} {title}, batch {B} | {work / B / 1e12:.3f} TFLOP a sample | "
                      f"{min(taken):.2f} s | {work / min(taken) / peak():.0%} of the rate |", flush=True)


def scaling_row():
    """How cost grows: fitted exponents of a step in its tokens, search in the gallery, prepare in the files."""
    method, optimizer = build("mae", "vit_t")
    sizes = (4, 16, 64, 256) if GPU else (4, 8, 16, 32)
    x = [torch.rand(1, 1, 128, 128, S, device=DEVICE) for S in sizes]
    costs = [in_turn({"": lambda: step(method, optimizer, part)}, rounds=3)[""].min() for part in x]
    tokens = [64 * S // 4 for S in sizes]
    print(f"| MAE step, vit_t, {tokens} tokens | {np.round(costs, 3)} s | exponent {exponent(tokens, costs):.2f} |")
    galleries, queries = [10_000 * 2**k for k in range(4)], torch.randn(500, 256, device=DEVICE)
    gallery = torch.randn(galleries[-1], 256, device=DEVICE)
    costs = [in_turn({"": lambda: embed.search(queries, gallery[:n], 10)}, rounds=3)[""].min() for n in galleries]
    print(f"| search, 500 queries, {galleries} | {np.round(costs, 3)} s | exponent {exponent(galleries, costs):.2f} |")
    files, costs = (1, 200, 400, 800, 1600), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in files:  # the first one is what starting the program costs
            (folder / str(n)).mkdir()
            for i in range(n):
                noise = np.random.default_rng(i).integers(0, 256, (128, 128), dtype=np.uint8)
                Image.fromarray(noise).save(folder / str(n) / f"{i}.png")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, Path(prepare.__file__), "folder", folder / str(n), "--modality", "xray",
                            "--out", folder / f"cache{n}", "--size", "64", "--workers", "1"],
                           check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    costs = np.array(costs[1:]) - costs[0]
    print(f"| prepare, {files[1:]} PNG | {costs.round(2)} s | exponent {exponent(files[1:], costs):.2f} |")


def memory_row():
    """Memory a sample takes in forward and backward, activations kept or recomputed; on a GPU the largest batch."""
    for title, shape in (("volume, 1,024 tokens", (1, 128, 128, 64)), ("volume, 4,096 tokens", VOLUME)):
        for ssl in ("mae", "simdino"):
            for label, above in (("kept", math.inf), ("recomputed", 0)):
                model.RECOMPUTE_ABOVE = above
                if GPU:
                    method, optimizer = build(ssl, "vit_b")
                    B = 1
                    try:
                        while True:
                            torch.cuda.reset_peak_memory_stats()
                            step(method, optimizer, torch.rand(B, *shape, device=DEVICE))
                            used, B = torch.cuda.max_memory_allocated() / 2**30, 2 * B
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
                    print(f"| vit_b {ssl} {title}, {label} | batch {B // 2} fits | {used:.1f} GiB |", flush=True)
                    continue

                def one_pass(B):
                    method, _ = build(ssl, "vit_t")
                    inputs = method.inputs(torch.rand(B, *shape), torch.Generator().manual_seed(0))
                    return seconds(lambda: method(*inputs)[0].backward())
                (once, one, _), (_, two, _) = (in_child(lambda: one_pass(B)) for B in (1, 2))
                print(f"| vit_t {ssl} {title}, {label} | {two - one:.0f} MiB a sample | {once:.2f} s |", flush=True)


ROWS = {row.__name__.removesuffix("_row"): row for row in (
    mae_row, simdino_row, views_row, search_row, allpairs_row, prepare_row, flops_row, scaling_row, memory_row)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[*ROWS, "all"])
    chosen = parser.parse_args().row
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
    versions = [f"{m.__name__} {m.__version__}" if m else "a peer is missing" for m in (torch, monai, faiss)]
    print(f"{device}, Python {platform.python_version()}, {', '.join(versions)}")
    for name in ROWS if chosen == "all" else [chosen]:
        print(f"\n{name}: {ROWS[name].__doc__}", flush=True)
        ROWS[name]()


if __name__ == "__main__":
    main()
