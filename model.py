"""The 4D vision transformer of M3Ret (paper Sec. 3.1): one encoder for images, videos and volumes.

In:  x (B, C, H, W, S), C in {1, 3}, intensities in [-1, 1]. S is 1 in an image, time in a video and
     depth in a volume. All have the same weights and code; grey (C = 1) and images (S = 1) take a
     shortcut with equal results (`ViT.tokens`). Only the functions that choose frames and crops ask
     what a sample is, by `sample_kind`.
Out: tokens (B, [1+]N, D), where [1+] stands for a CLS token, and embeddings by `pool`.

Letters of shape comments, in every file: B batch, C channels; H, W, S height, width and slices (or
frames) of a sample; ph, pw, ps the same of a patch, P = ph*pw*ps*3 its values; h, w, s the grid of
patches, N = h*w*s tokens; D the width of tokens and embeddings; V views. A file that needs more
letters says what they are.
"""
import argparse
import contextlib
import hashlib
import json
import math
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint

from prepare import HU_RANGE, MODALITIES, UserError, atomic_write, read_any


class Arch(NamedTuple):
    dim: int  # D
    depth: int  # blocks
    heads: int


ARCHS = {  # Sec. 4.4
    "vit_t": Arch(dim=192, depth=12, heads=3),
    "vit_s": Arch(dim=384, depth=12, heads=6),
    "vit_b": Arch(dim=768, depth=12, heads=12),
    # CHOICE: the smallest is not the paper's. It is for the demo and for small data on a CPU.
    "vit_xs": Arch(dim=96, depth=3, heads=3),
}
PATCH_SIZE = (16, 16, 4)  # (ph, pw, ps); Sec. 3.1 writes (3, 16, 16, 4), channels included
FRAMES = 16  # of a video at a time (Sec. 3.1)
GRID_CELLS = 4  # of pool "grid", along H and along W

# Positions are measured in cells of this grid, on every axis: 256 / 16 in plane, 64 / 4 in depth.
REFERENCE_GRID = 16

# Longer sequences (8-pixel patches on volumes) recompute their activations instead of keeping them.
RECOMPUTE_ABOVE = 4096  # tokens

# See `attend`.
EXPLICIT_ATTENTION_UP_TO = 200  # tokens

# What torch.load, ViT and load_state_dict can raise if a file is damaged or holds something else.
DAMAGED = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
           UnpicklingError)


# ---- samples -------------------------------------------------------------------------------------
def unit(x):
    """Cached samples, uint8 or float16 (..., any shape) -> float32 in [0, 1]."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    return x.float()


def stack(samples):
    """Cached samples (C, H, W, S) of one shape -> (B, C, H, W, S), of their type if they share it.

    torch.stack would make float16 of uint8 without dividing by 255. So samples of both types become
    float32 in [0, 1] first.
    """
    dtypes = {sample.dtype for sample in samples}
    if len(dtypes) > 1:
        samples = [unit(sample) for sample in samples]
    return torch.stack(samples)  # (B, C, H, W, S)


def normalize(x):
    """[0, 1] -> [-1, 1].

    CHOICE: one constant for all modalities, so that an unseen one (MRI) needs no statistics.
    """
    return (x - 0.5) / 0.5


def denormalize(x):
    """The inverse of `normalize`, clipped to [0, 1]."""
    return (x * 0.5 + 0.5).clamp(0, 1)


def sample_kind(shape):
    """Shape (C, H, W, S) of a sample -> "image", "video" or "volume".

    The cache keeps videos in colour (C = 3), volumes in grey (C = 1). Only this function uses that.
    """
    channels, _, _, depth = shape
    if depth == 1:
        return "image"
    if channels == 3:
        return "video"
    return "volume"


def subsample_frames(x, n):
    """n of the S slices or frames of x (..., S), evenly spaced -> (..., n)."""
    frames = torch.linspace(0, x.shape[-1] - 1, n).round().long()  # (n,), from first to last
    return x[..., frames]  # (..., n)


def take_frames_evenly(x, n=FRAMES):
    """Videos (B, 3, H, W, S > n) -> n evenly spaced frames (B, 3, H, W, n); others as they are.

    CHOICE: for embedding, so that a video always has the same vector. Sec. 3.1 draws at random.
    """
    if sample_kind(x.shape[1:]) != "video" or x.shape[-1] <= n:
        return x
    return subsample_frames(x, n)  # (B, 3, H, W, n)


def take_frames_at_random(x, generator, n=FRAMES):
    """Videos (B, 3, H, W, S > n) -> n random frames (B, 3, H, W, n); others as they are.

    Each video draws its own, with replacement as in Algorithm 2. CHOICE: they are sorted in time.
    """
    B, _, _, _, S = x.shape
    if sample_kind(x.shape[1:]) != "video" or S <= n:
        return x
    frames = torch.randint(S, (B, n), generator=generator).sort(dim=1).values  # (B, n)
    frames = frames.to(x.device)[:, None, None, None]  # (B, 1, 1, 1, n)
    return x.gather(-1, frames.expand(*x.shape[:-1], n))  # (B, 3, H, W, n)


def expand(x, ps=PATCH_SIZE[-1]):
    """(B, C, H, W, S) -> (B, 3, H, W, S): grey in 3 channels, an image in ps slices (Sec. 3.1).

    The values are not copied, it is a view.
    """
    if x.shape[-1] == 1:
        return x.expand(-1, 3, -1, -1, ps)
    return x.expand(-1, 3, -1, -1, -1)


# ---- tokens --------------------------------------------------------------------------------------
def patchify(x, patch=PATCH_SIZE):
    """(B, C, H, W, S) -> patches (B, N, ph*pw*ps*C), or (B, N, P) where C = 3 (Sec. 3.1).

    Patches follow each other in (h, w, s) order, the values of each in (ph, pw, ps, c) order.
    patch: (ph, pw, ps), or (3, ph, pw, ps) as the paper writes it.
    """
    ph, pw, ps = patch[-3:]
    H, W, S = x.shape[2:]
    fits = H % ph == W % pw == S % ps == 0
    assert fits, f"{tuple(x.shape)} does not divide into patches of {patch}"

    # Every axis is split into the number of a patch and a place within it; the numbers go in front.
    x = x.unflatten(4, (-1, ps))  # (B, C, H, W, s, ps)
    x = x.unflatten(3, (-1, pw))  # (B, C, H, w, pw, s, ps)
    x = x.unflatten(2, (-1, ph))  # (B, C, h, ph, w, pw, s, ps)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, h, w, s, ph, pw, ps, C)
    return x.flatten(4).flatten(1, 3)  # (B, N, ph*pw*ps*C)


def unpatchify(patches, patch, grid):
    """(B, N, ph*pw*ps*C) -> (B, C, H, W, S), the inverse of `patchify`; grid = (h, w, s)."""
    ph, pw, ps = patch[-3:]
    x = patches.unflatten(2, (ph, pw, ps, -1)).unflatten(1, grid)  # (B, h, w, s, ph, pw, ps, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, h, ph, w, pw, s, ps)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)  # (B, C, H, W, S)


def sincos_positions(grid, dim, device=None):
    """Fixed sin-cos positions of a grid (h, w, s) -> (N, dim) float32.

    Each axis has a third of dim, the rest is zero. CHOICE: cell i of n has the coordinate
    (i + 1/2) * 16 / n, so that any grid spans 0 to 16 and no table is stored. A crop spans it too:
    positions are relative to the view, as in DINO, which stretches its table. An image, with one
    cell in depth, lies at 8.
    """
    k = dim // 6  # frequencies per axis, each with a sine and a cosine
    steps = torch.arange(k, dtype=torch.float32, device=device)  # (k,)
    omega = 10000 ** (-steps / k)  # (k,), Vaswani et al. 3.5

    axes = []  # (h,), (w,) and (s,) coordinates
    for n in grid:
        cells = torch.arange(n, device=device)  # (n,)
        axes.append((cells + 0.5) * (REFERENCE_GRID / n))
    angle = torch.cartesian_prod(*axes)[:, :, None] * omega  # (N, 3, k)
    waves = torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)  # (N, 6k)
    return nn.functional.pad(waves, (0, dim - 6 * k))  # (N, dim)


# ---- transformer ---------------------------------------------------------------------------------
def attend(q, k, v):
    """softmax(q k^T / sqrt(n)) v (Vaswani et al. eq. 1), of q, k, v (B, heads, N, n) each."""
    # Written out, it is 1.3 to 2.4 times faster than fused on a CPU in bf16, for short sequences.
    is_short = q.shape[2] <= EXPLICIT_ATTENTION_UP_TO
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_short:
        scale = 1 / math.sqrt(q.shape[3])
        weights = (scale * q @ k.mT).softmax(dim=-1)  # (B, heads, N, N)
        return weights.to(v.dtype) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = attend(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm block (B, N, D) -> (B, N, D).

    scale: a factor for each of the two branches, 1.0 or (B, 1, 1) for stochastic depth
    (`run_blocks`).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim),
            act=nn.GELU(),
            fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, scale=(1.0, 1.0)):
        x = x + scale[0] * self.attn(self.norm1(x))
        return x + scale[1] * self.mlp(self.norm2(x))


def run_blocks(blocks, tokens, drop_path=0.0):
    """Tokens (B, N, D) through blocks -> (B, N, D).

    drop_path: the rate of the last block; it rises linearly from 0 at the first.
    """
    depth = len(blocks)
    scales = [(1.0, 1.0)] * depth
    if drop_path > 0:
        # Stochastic depth skips a branch of a sample at random, more often in deeper blocks (DINO).
        # Where it is kept it counts 1 / (1 - rate), so that it counts 1 on average.
        device = tokens.device
        rates = torch.linspace(0, drop_path, depth, device=device)  # (depth,)
        rates = rates.view(depth, 1, 1, 1, 1)
        draws = torch.rand(depth, 2, tokens.shape[0], 1, 1, device=device)  # (depth, 2, B, 1, 1)
        keep = draws >= rates
        scales = keep / (1 - rates)  # (depth, 2, B, 1, 1)

    # Of a long sequence only the tokens between blocks are kept for the backward pass.
    recompute = torch.is_grad_enabled() and tokens.shape[1] > RECOMPUTE_ABOVE
    for block, scale in zip(blocks, scales):
        if recompute:
            tokens = checkpoint(block, tokens, scale, use_reentrant=False)  # (B, N, D)
        else:
            tokens = block(tokens, scale)  # (B, N, D)
    return tokens


def init_weights(module):
    """Xavier uniform weights and zero biases for the linear maps of both methods, as in MAE's code.

    CHOICE: the patch kernel's bias is zero too; MAE's code leaves it at the default of Conv2d.
    CHOICE: SimDINO starts so too. Its code draws with std 0.02, with which our narrower networks
    learned less (Xavier's std is 0.023 to 0.036 in ViT-B, and larger in them).
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """The encoder (Sec. 3.1): (B, C, H, W, S) in [-1, 1] -> tokens (B, [1+]N, D).

    Parameters are named as in timm, DINO and MAE. ViT(**config) makes it again, but
    for drop_path, which only training uses.
    """

    def __init__(self, arch="vit_b", patch_size=PATCH_SIZE, cls_token=False, drop_path=0.0):
        super().__init__()
        self.config = {"arch": arch, "patch_size": list(patch_size), "cls_token": cls_token}
        self.patch_size = tuple(patch_size)
        self.drop_path = drop_path
        self.dim, depth, heads = ARCHS[arch]

        # A dict of one module, so that its weight is named patch_embed.proj, as in timm.
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * math.prod(patch_size), self.dim)})
        self.blocks = nn.ModuleList(Block(self.dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.apply(init_weights)
        self.cls_token = None
        if cls_token:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.dim))

    def grid(self, size):
        """Patch grid (h, w, s) of a size (H, W, S); an image, S = 1, is one patch deep.

        UserError if the patches do not fill the size.
        """
        H, W, S = size
        ph, pw, ps = self.patch_size
        if H % ph or W % pw or (S > 1 and S % ps):
            raise UserError(
                f"samples of {'x'.join(map(str, size))} are no whole patches: choose another "
                "--patch-size, or prepare them with another --size, --slices or --frames")
        return H // ph, W // pw, max(1, S // ps)

    def tokens(self, x):
        """(B, C, H, W, S) -> (B, N, D): patches, projected, with their positions.

        Grey stands for 3 equal channels and an image for ps equal slices (`expand`). The weights
        that meet equal values are summed first: the tokens are the same, but those of a grey image
        take 1 / (3 ps) of the products, a twelfth by default.
        """
        positions = sincos_positions(self.grid(x.shape[2:]), self.dim, x.device)  # (N, D)
        ph, pw, ps = self.patch_size
        weight = self.patch_embed.proj.weight.unflatten(1, (ph, pw, ps, 3))  # (D, ph, pw, ps, 3)
        if x.shape[1] == 1:
            weight = weight.sum(dim=4, keepdim=True)  # (D, ph, pw, ps, 1)
        if x.shape[4] == 1:
            weight = weight.sum(dim=3, keepdim=True)  # (D, ph, pw, 1, C)

        patches = patchify(x, weight.shape[1:4])  # (B, N, ph*pw*ps*C)
        bias = self.patch_embed.proj.bias  # (D,)
        tokens = nn.functional.linear(patches, weight.flatten(1), bias)  # (B, N, D)
        return tokens + positions

    def encode(self, tokens):
        """(B, N, D), all tokens or any subset of them -> (B, [1+]N, D)."""
        if self.cls_token is not None:
            cls = self.cls_token.expand(tokens.shape[0], -1, -1)  # (B, 1, D)
            tokens = torch.cat([cls, tokens], dim=1)  # (B, 1+N, D)
        drop_path = self.drop_path if self.training else 0.0
        tokens = run_blocks(self.blocks, tokens, drop_path)
        return self.norm(tokens)  # (B, [1+]N, D)

    def forward(self, x):
        return self.encode(self.tokens(x))  # (B, [1+]N, D)


def pool_cells(patches, grid):
    """Patch tokens (B, N, D) of a grid (h, w, s) -> means of 4 x 4 cells in plane, (B, 16 D)."""
    plane = patches.float().unflatten(1, grid).mean(dim=3)  # (B, h, w, D), the mean over slices
    plane = plane.permute(0, 3, 1, 2)  # (B, D, h, w)
    return nn.functional.adaptive_avg_pool2d(plane, GRID_CELLS).flatten(1)  # (B, 16 D)


def pool(tokens, how, cls_token=True, grid=None):
    """Tokens (B, [1+]N, D) -> embeddings in float32 (Sec. 3.2, 3.3, Fig. 3).

    how: "cls", the CLS token (B, D); "avg", the mean of all others (B, D); "mix", both (B, 2D).
    Beyond the paper: "grid", mix and then `pool_cells`, which add where things are (B, 18 D), or
    avg and these without a CLS token (B, 17 D). embed.centre_parts makes such vectors comparable.
    cls_token: whether the first token is one; those of MAE have none. grid: (h, w, s) of the
    tokens, for "grid" alone. UserError: another word, or no CLS token to take.
    """
    if how not in ("avg", "cls", "mix", "grid"):
        raise UserError(f"pooling {how!r}: choose avg, cls, mix or grid")
    if how in ("cls", "mix") and not cls_token:
        raise UserError(f"pooling {how!r}: an encoder of MAE has no CLS token, choose avg")

    if how == "cls":
        return tokens[:, 0].float()  # (B, D)
    patches = tokens[:, 1:] if cls_token else tokens  # (B, N, D)
    avg = patches.float().mean(dim=1)  # (B, D)
    if how == "avg":
        return avg

    parts = [avg]
    if cls_token:
        parts = [tokens[:, 0].float(), avg]
    if how == "grid":
        parts.append(pool_cells(patches, grid))
    return torch.cat(parts, dim=1)  # (B, 2 D), (B, 18 D) or (B, 17 D)


# ---- checkpoints ---------------------------------------------------------------------------------
@contextlib.contextmanager
def as_user_error(
        path, problem="is damaged or not of this program: give a checkpoint.pt of train.py"):
    """Inside, the errors of DAMAGED become a UserError that names path.

    OSErrors name it anyway. A UserError is none of DAMAGED, and passes unchanged.
    """
    try:
        yield
    except DAMAGED as error:
        one_line = " ".join(str(error).split())
        first_sentence = one_line.split(". ")[0]
        reason = f"{type(error).__name__}: {first_sentence[:160]}"
        raise UserError(f"{path} {problem} ({reason})") from None


def save_checkpoint(path, encoder, **state):
    """Write {config, encoder, **state} atomically.

    state: tensors and plain types, so that it loads with weights_only. UserError if the file cannot
    be written; an older one is then as it was.
    """
    state = {"config": encoder.config, "encoder": encoder.state_dict(), **state}
    with as_user_error(path, "cannot be written; is the disk full?"), atomic_write(path) as file:
        torch.save(state, file)


def read_checkpoint(path):
    """File -> dict of tensors and plain values on the CPU, and "sha256" of the file's bytes.

    UserError or OSError if it is no such file.
    """
    with as_user_error(path), open(path, "rb") as file:
        # The hash and the weights are of one open file: a training may replace it meanwhile.
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {**state, "sha256": sha256}


def load_encoder(path, device="cpu", state=None):
    """Checkpoint file -> the ViT that embeds, in eval mode; the file says its architecture.

    state: what `read_checkpoint` gave, if it was read already; path then only names it in errors.
    """
    if state is None:
        state = read_checkpoint(path)
    with as_user_error(path):
        encoder = ViT(**state["config"])
        encoder.load_state_dict(state["encoder"])
    return encoder.to(device).eval()


def weights_sha256(encoder):
    """Hex digest of an encoder's config and weights, whatever file they came from."""
    digest = hashlib.sha256(json.dumps(encoder.config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())  # their bytes
    return digest.hexdigest()


# ---- weights of other programs -------------------------------------------------------------------
# DDP, torch.compile and the classes of the methods put these before the names of weights.
PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.", "base_encoder.")

# Left out are positions, and all that is not the encoder.
LEFT_OUT = ("pos_embed", "decoder", "mask_token", "head", "pre_logits", "dist_token", "dino_head",
            "ibot_head", "momentum_encoder", "predictor")

# The LayerScale of a branch, and the linear map that it follows.
LAYER_SCALES = {".ls1.gamma": ".attn.proj", ".ls2.gamma": ".mlp.fc2"}

# MAE, DINO and SimDINO keep their flags (a Namespace) and rates (NumPy numbers) beside the weights.
# Reading these types runs no code of the file.
#
# A pickled NumPy number names the function that makes it again, which is private: __reduce__ gives
# this function and its arguments. NumPy 1 and 2 write two names for it, and both must be read.
NUMPY_SCALAR, _ = np.float64(0).__reduce__()
FOREIGN_TYPES = [
    argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Int64DType,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar")]


def named_weights(state):
    """What a file holds -> {name: tensor} of the network in it, with the names of `ViT`."""
    # Training checkpoints hold the network under one of these, or one inside another.
    for key in ("encoder", "teacher", "model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]

    weights = {}
    for key, value in state.items():
        while key.startswith(PREFIXES):
            _, key = key.split(".", 1)
        name = key.replace("fc_norm.", "norm.")  # timm's name if it averages
        weights[name] = value
    return weights


def adapt_cls_token(weights, encoder):
    """Give the CLS token the position that a file adds to it; leave it out if encoder has none."""
    if encoder.cls_token is None:
        weights.pop("cls_token", None)
        return
    cls_token = weights.get("cls_token", encoder.cls_token)  # (1, 1, D)

    # timm, MAE and DINO add the first position to it in every forward pass. A square number of
    # positions has no place for it: those are of patches alone (timm's no_embed_class).
    positions = weights.get("pos_embed")  # (1, [1+]N, D)
    if "cls_token" in weights and positions is not None:
        n = positions.shape[1]
        has_cls_position = math.isqrt(n) ** 2 != n
        if has_cls_position:
            cls_token = cls_token + positions[:, :1]
    weights["cls_token"] = cls_token


def fold_layer_scale(weights):
    """Multiply DINOv2's LayerScale into the linear maps that it follows.

    gamma * (W x + b) = (gamma W) x + gamma b, where gamma is (D,), W (D, n) and b (D,).
    """
    for scale, layer in LAYER_SCALES.items():
        for name in [name for name in weights if name.endswith(scale)]:
            gamma = weights.pop(name)  # (D,)
            last = name.removesuffix(scale) + layer  # blocks.0.attn.proj, for example
            weights[f"{last}.weight"] = gamma[:, None] * weights[f"{last}.weight"]  # (D, n)
            weights[f"{last}.bias"] = gamma * weights[f"{last}.bias"]  # (D,)


def inflate_kernel(kernel, patch_size):
    """Patch kernel (D, 3, height, width) of a 2D ViT -> weights (D, P) for patches (ph, pw, ps)."""
    ph, pw, ps = patch_size
    height, width = kernel.shape[2:]
    if (height, width) != (ph, pw):
        # CHOICE: a kernel of another size (DINOv2 has 14 pixels) is resized as a picture would be.
        # The sum of its weights, and so the token of an even patch, stays about as it was.
        kernel = nn.functional.interpolate(
            kernel.float(), (ph, pw), mode="bilinear", antialias=True)
        kernel = kernel * (height * width) / (ph * pw)  # (D, 3, ph, pw)

    # Each slice gets kernel / ps, so that the ps equal slices of an image sum to the 2D token.
    kernel = kernel[..., None].expand(-1, -1, -1, -1, ps) / ps  # (D, 3, ph, pw, ps)
    return kernel.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P)


def init_from_2d(encoder, path):
    """Start from a public 2D ViT or from a checkpoint of ours, for `train.py --init`.

    Reads bare weights and training checkpoints of timm, MAE, DINO, DINOv2 and SimDINO. If positions
    were the same, and the kernel not resized, an image would have the tokens that the 2D network
    gives it. CHOICE: positions are ours, but for that of the CLS token; inputs stay in [-1, 1],
    where most of these networks saw ImageNet's mean and std taken away; heads are left out. If the
    file has no CLS token, it starts at random.

    Returns the ids (n,), int64, of the samples that a network of ours was trained on, so that
    evaluation can tell which queries it has seen; None if they are not known, as of a foreign file,
    or of a run of ours that began with one (ids_known is False). UserError if the file holds no
    such network, one of another shape, or one with registers, SwiGLU or RoPE.
    """
    with torch.serialization.safe_globals(FOREIGN_TYPES):
        state = read_checkpoint(path)
    del state["sha256"]  # else it would look like a weight

    with as_user_error(path, "does not fit: --init takes a ViT of this --arch and --patch-size"):
        weights = named_weights(state)
        if "patch_embed.proj.weight" not in weights:
            first = ", ".join(list(weights)[:5])
            raise UserError(f"{path}: no patch_embed.proj.weight; its first keys are {first}")

        # What is not of the encoder goes, and all that is left must be known.
        adapt_cls_token(weights, encoder)
        weights = {name: value for name, value in weights.items() if not name.startswith(LEFT_OUT)}
        known = encoder.state_dict().keys()
        for name in weights:
            if name not in known and not name.endswith(tuple(LAYER_SCALES)):
                raise UserError(f"{path} does not fit: a ViT of this --arch has no {name}")

        fold_layer_scale(weights)
        kernel = weights["patch_embed.proj.weight"]
        if kernel.dim() == 4:  # (D, 3, height, width); ours is (D, P) already
            weights["patch_embed.proj.weight"] = inflate_kernel(kernel, encoder.patch_size)
        encoder.load_state_dict(weights)

    if state.get("ids_known", True):
        return state.get("ids")
    return None


# ---- pictures ------------------------------------------------------------------------------------
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
TILE = 192  # pixels, the side of a tile in a picture
FRAME_GREY = (90, 90, 90)

# CHOICE: CT is drawn in the soft-tissue window of radiology, in which organs differ. The network
# sees the whole HU_RANGE (Sec. 3.4).
SOFT_TISSUE = (-160, 240)  # HU


def display_range(sample, modality):
    """The two values of a cached sample (tensor) that a picture shows as black and as white."""
    # The cache keeps CT as float16 of HU_RANGE, but for CT images of 8 bits, windowed long before.
    # CHOICE: CT in another unit, which sources.csv notes, is not told apart here.
    if modality != "ct" or sample.dtype == torch.uint8:
        return 0.0, 1.0
    low, high = HU_RANGE
    black, white = SOFT_TISSUE
    return (black - low) / (high - low), (white - low) / (high - low)


def draw_tile(image, caption, shown, colour=FRAME_GREY):
    """Image (C, H, W) in [0, 1] -> fitted into a tile, framed, captioned: (3, y, x) in [0, 1].

    shown: from `display_range`. colour: of the frame, three numbers up to 255.
    """
    black, white = shown
    levels = ((unit(image) - black) / (white - black)).clamp(0, 1)  # (C, H, W)
    pixels = (levels * 255).byte().expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3)
    tile = ImageOps.pad(Image.fromarray(pixels.numpy()), (TILE, TILE))
    tile = ImageOps.expand(tile, border=(6, 6, 6, 36), fill=colour)  # left, top, right, bottom
    font = ImageFont.load_default(11)
    ImageDraw.Draw(tile).text((8, TILE + 6), caption, fill="white", font=font)
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255  # (3, y, x)


def draw_samples(path, samples, captions, shown):
    """Write samples, (C, H, W, S) in [0, 1] each, and their captions as one picture.

    Images fill a sheet that is about square. Of videos and volumes each is a row of its slices.
    """
    # Each sample is a row of at most eight of its slices, evenly spaced.
    rows = []
    for sample, caption in zip(samples, captions):
        slices = subsample_frames(sample, min(8, sample.shape[-1]))  # (C, H, W, up to 8)
        rows.append([draw_tile(image, caption, shown) for image in slices.unbind(-1)])

    # Rows of one tile each, those of images, are put into a sheet.
    if all(len(row) == 1 for row in rows):
        tiles = [row[0] for row in rows]
        columns = max(3, math.ceil(math.sqrt(len(tiles))))
        rows = [tiles[start:start + columns] for start in range(0, len(tiles), columns)]
    save_montage(path, rows)


def parse_picture_arguments(parser, out):
    """The flags that mae.py and simdino.py share, which draw one file -> args."""
    flag = parser.add_argument
    flag("file", help="a DICOM, NIfTI, image or video file, or the folder of a DICOM series")
    flag("--out", default=out, help=f"picture (default {out}); slices run from left to right")
    flag("--modality", choices=MODALITIES, help="what the file shows, if it does not say so itself")
    flag("--size", type=int, choices=range(32, 1025, 32), default=256, metavar="N",
         help="longer side (256)")
    flag("--seed", type=int, default=0, help="of what is random: the mask, or the views")
    return parser.parse_args()


def read_sample_to_draw(args):
    """The file of args -> a batch of this sample (1, C, H, W, S) in [0, 1], its display_range."""
    modality, array = read_any(args.file, args.modality, size=args.size)  # (C, H, W, S)
    sample = torch.from_numpy(array)
    x = unit(sample[None])  # (1, C, H, W, S)
    return take_frames_evenly(x), display_range(sample, modality)


def save_montage(path, rows, gap=4):
    """Write rows of tiles, each (3, H, W) in [0, 1], as one picture, .png, .jpg or .jpeg.

    A row is as high as its highest tile, and all columns are as wide as the widest of all.
    UserError for another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURE_FORMATS:
        raise UserError(f"{path}: pictures are written as {', '.join(PICTURE_FORMATS)}")

    heights = [gap + max(tile.shape[1] for tile in row) for row in rows]
    widths = [max(tile.shape[2] for tile in row) for row in rows]
    step = gap + max(widths)  # from the left of a tile to the left of the next
    columns = max(len(row) for row in rows)
    sheet = torch.full((3, sum(heights), columns * step), 0.25)  # dark grey

    # Tiles are pasted row by row from the top left.
    top = 0
    for row, height in zip(rows, heights):
        for j, tile in enumerate(row):
            _, h, w = tile.shape
            left = j * step
            sheet[:, top:top + h, left:left + w] = tile
        top += height

    sheet = sheet[:, :-gap, :-gap]  # no gap after the last
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (height, width, 3)
    with atomic_write(path) as file:
        Image.fromarray(pixels.numpy()).save(file, format=PICTURE_FORMATS[suffix])
