"""The 4D vision transformer of M3Ret (paper Sec. 3.1): one encoder for 2D images, videos and volumes.

In:  x (B, C, H, W, S), C in {1, 3}, intensities in [-1, 1]. Out: tokens (B, [1+]N, D), and embeddings by
`pool`. Nothing below asks for the modality: an image has S = 1, a video's S is time, a volume's S is depth.

Letters, here and in every other file: B batch, C channels, H W S height, width, slices or frames of a sample;
ph pw ps the same of a patch, P = ph*pw*ps*3 values; h w s patch grid, N = h*w*s tokens; D token width,
d projected width; V views; K neighbours; m samples in a coding rate.
"""
import contextlib
import hashlib
import json
import math
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from prepare import MODALITIES, UserError, atomic_write, read_any

ARCHS = {"vit_t": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12),  # width, depth, heads (4.4)
         "vit_xs": (96, 3, 3)}  # CHOICE: not the paper's; for the demo and small data on a CPU
PATCH_SIZE, FRAMES = (16, 16, 4), 16  # Sec. 3.1; a patch has 3 channels besides, a video so many frames
REFERENCE_GRID = 16  # cells per axis that positions are measured in: 256 / 16 in plane and 64 / 4 over slices
RECOMPUTE_ABOVE = 4096  # tokens; longer sequences (8-pixel patches on volumes) recompute their activations
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # of save_montage, by the end of the name
LEFT_OUT = ("pos_embed", "decoder", "mask_token", "head", "pre_logits", "dist_token")  # of --init's networks


# ---- samples ----------------------------------------------------------------------------------------------
def unit(x):
    """Cached samples, uint8 or float16 (..., any shape) -> float32 in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def stack(samples):
    """Cached samples (C, H, W, S) of one shape -> (B, C, H, W, S); of two depths, all become float32."""
    mixed = len({sample.dtype for sample in samples}) > 1
    return torch.stack([unit(sample) if mixed else sample for sample in samples])  # (B, C, H, W, S)


def normalize(x):
    """[0, 1] -> [-1, 1]. CHOICE: one constant for all modalities, so unseen ones (MRI) need no statistics."""
    return (x - 0.5) / 0.5


def denormalize(x):
    """The inverse of `normalize`, clipped to [0, 1]."""
    return (x * 0.5 + 0.5).clamp(0, 1)


def sample_kind(shape):
    """Shape (C, H, W, S) of a sample -> "image", "video" or "volume".

    The cache keeps videos in colour (C = 3) and volumes in grey (C = 1): this is the one place that relies on it.
    """
    channels, _, _, depth = shape
    if depth == 1:
        return "image"
    return "video" if channels == 3 else "volume"


def subsample_frames(x, n):
    """n of the S slices or frames of x (..., S), evenly spaced -> (..., n)."""
    return x[..., torch.linspace(0, x.shape[-1] - 1, n).round().long()]


def take_frames_evenly(x, n=FRAMES):
    """Videos (B, 3, H, W, S > n) -> n evenly spaced frames (B, 3, H, W, n); every other sample as it is."""
    if sample_kind(x.shape[1:]) != "video" or x.shape[-1] <= n:
        return x
    return subsample_frames(x, n)  # (B, 3, H, W, n)


def take_frames_at_random(x, generator, n=FRAMES):
    """Videos (B, 3, H, W, S > n) -> n random frames in order (B, 3, H, W, n); every other sample as it is."""
    if sample_kind(x.shape[1:]) != "video" or x.shape[-1] <= n:
        return x
    frames = torch.randint(x.shape[-1], (len(x), n), generator=generator)  # (B, n), with replacement (Algorithm 2)
    frames = frames.sort(dim=1).values.to(x.device)[:, None, None, None]  # (B, 1, 1, 1, n). CHOICE: sorted
    return x.gather(-1, frames.expand(*x.shape[:-1], n))  # (B, 3, H, W, n)


def expand(x, ps=PATCH_SIZE[-1]):
    """(B, C, H, W, S) -> a view (B, 3, H, W, S): grey in 3 channels, an image as S = ps slices (Sec. 3.1)."""
    return x.expand(-1, 3, -1, -1, ps if x.shape[-1] == 1 else -1)


# ---- tokens -----------------------------------------------------------------------------------------------
def patchify(x, patch=PATCH_SIZE):
    """(B, 3, H, W, S) -> (B, N, P): N in (h, w, s) order, a patch in (ph, pw, ps, c) order (Sec. 3.1)."""
    ph, pw, ps = patch[-3:]  # the paper writes (3, ph, pw, ps)
    assert not any(n % p for n, p in zip(x.shape[2:], (ph, pw, ps))), f"{tuple(x.shape)} in patches {patch}"
    x = x.unflatten(4, (-1, ps)).unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (B, C, h, ph, w, pw, s, ps)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, h, w, s, ph, pw, ps, C)
    return x.flatten(4).flatten(1, 3)  # (B, N, P)


def unpatchify(patches, patch, grid):
    """(B, N, P) -> (B, 3, H, W, S), the inverse of `patchify`; grid = (h, w, s)."""
    x = patches.unflatten(2, (*patch[-3:], -1)).unflatten(1, grid)  # (B, h, w, s, ph, pw, ps, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, h, ph, w, pw, s, ps)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)  # (B, C, H, W, S)


def sincos_positions(grid, dim, device=None):
    """Fixed sin-cos positions of a grid (h, w, s) -> (N, dim) float32: a third of dim per axis, then zeros.

    CHOICE: cell i of n lies at (i + 1/2) * 16 / n, whatever the crop, size or depth: nothing is stored,
    positions are relative to the view (DINO resizes its table to the crop), an image is at mid-depth.
    """
    k = dim // 6  # frequencies per axis, each with a sine and a cosine
    omega = 10000 ** (-torch.arange(k, dtype=torch.float32, device=device) / k)  # (k,), Vaswani et al. 3.5
    axes = [(torch.arange(n, device=device) + 0.5) * (REFERENCE_GRID / n) for n in grid]  # (h,), (w,), (s,)
    angle = torch.cartesian_prod(*axes)[:, :, None] * omega  # (N, 3, k)
    waves = torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)  # (N, 6k)
    return nn.functional.pad(waves, (0, dim - 6 * k))  # (N, dim)


# ---- transformer ------------------------------------------------------------------------------------------
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
        x = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm block (B, N, D) -> (B, N, D); scale (2, B, 1, 1) weighs its branches (stochastic depth)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, scale=(1.0, 1.0)):
        x = x + scale[0] * self.attn(self.norm1(x))
        return x + scale[1] * self.mlp(self.norm2(x))


def run_blocks(blocks, tokens, drop_path=0.0):
    """Tokens (B, N, D) through blocks -> (B, N, D); long sequences keep no activations and recompute them."""
    scales = [(1.0, 1.0)] * len(blocks)
    if drop_path > 0:  # stochastic depth: a scale of zero skips a branch, the more often the deeper (as DINO)
        rates = torch.linspace(0, drop_path, len(blocks), device=tokens.device)[:, None, None, None, None]
        draws = torch.rand(len(blocks), 2, len(tokens), 1, 1, device=tokens.device)
        scales = (draws >= rates) / (1 - rates)  # (depth, 2, B, 1, 1), 1 on average
    recompute = torch.is_grad_enabled() and tokens.shape[1] > RECOMPUTE_ABOVE
    for block, scale in zip(blocks, scales):
        tokens = checkpoint(block, tokens, scale, use_reentrant=False) if recompute else block(tokens, scale)
    return tokens


def init_weights(module):
    """Xavier uniform and zero bias for all linear maps of both methods, the patch kernel too (MAE's code)."""
    # CHOICE: SimDINO's code has std 0.02, Xavier's at ViT-B's width; a narrower network learned less with it.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """The encoder (Sec. 3.1): (B, C, H, W, S) in [-1, 1] -> tokens (B, [1+]N, D); names as timm and DINO."""

    def __init__(self, arch="vit_b", patch_size=PATCH_SIZE, cls_token=False, drop_path=0.0):
        super().__init__()
        self.config = {"arch": arch, "patch_size": list(patch_size), "cls_token": cls_token}
        self.patch_size, self.drop_path = tuple(patch_size), drop_path
        self.dim, depth, heads = ARCHS[arch]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(3 * math.prod(patch_size), self.dim)))
        self.blocks = nn.ModuleList(Block(self.dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.apply(init_weights)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.dim)) if cls_token else None

    def grid(self, size):
        """Patch grid (h, w, s) of samples of a size (H, W, S); an image, S = 1, counts as one patch deep."""
        if any(n % p for n, p in zip(size, self.patch_size) if n > 1):
            raise UserError(f"samples of {'x'.join(map(str, size))} are no whole patches: choose another "
                            "--patch-size, or prepare them with another --size, --slices or --frames")
        return tuple(max(1, n // p) for n, p in zip(size, self.patch_size))

    def tokens(self, x):
        """(B, C, H, W, S) -> (B, N, D): patches, projected, with their positions."""
        positions = sincos_positions(self.grid(x.shape[2:]), self.dim, x.device)  # (N, D)
        patches = patchify(expand(x, self.patch_size[-1]), self.patch_size)  # (B, N, P)
        return self.patch_embed(patches) + positions  # (B, N, D), as by a Conv3d of kernel = stride

    def encode(self, tokens):
        """(B, N, D), all tokens or any subset of them -> (B, [1+]N, D)."""
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1+N, D)
        tokens = run_blocks(self.blocks, tokens, self.drop_path if self.training else 0.0)
        return self.norm(tokens)  # (B, [1+]N, D)

    def forward(self, x):
        return self.encode(self.tokens(x))  # (B, [1+]N, D)


def pool(tokens, how, cls_token=True):
    """Tokens (B, [1+]N, D) -> float32 embeddings (B, D), mix = [CLS, avg] (B, 2D) (Sec. 3.2, 3.3, Fig. 3)."""
    if how not in ("avg", "cls", "mix") or how != "avg" and not cls_token:
        raise UserError(f"pooling {how!r}: choose avg, cls or mix; an encoder of MAE has no CLS token: avg")
    cls, avg = tokens[:, 0].float(), tokens[:, int(cls_token):].float().mean(dim=1)  # (B, D) each
    return {"avg": avg, "cls": cls, "mix": torch.cat([cls, avg], dim=1)}[how]


# ---- checkpoints ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def as_user_error(path, problem="is damaged or not of this program: give a checkpoint.pt of train.py"):
    """Inside, what a damaged or foreign file or a full disk can raise becomes one UserError that names it."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, UnpicklingError) as e:
        reason = " ".join(str(e).split()).split(". ")[0][:160]
        raise UserError(f"{path} {problem} ({type(e).__name__}: {reason})") from None


def save_checkpoint(path, encoder, **state):
    """Write {config, encoder, **state} atomically: tensors and plain types only, for weights_only loading."""
    with as_user_error(path, "cannot be written; is the disk full?"), atomic_write(path) as file:
        torch.save({"config": encoder.config, "encoder": encoder.state_dict(), **state}, file)


def read_checkpoint(path):
    """File -> dict of tensors and plain values on the CPU, and "sha256" of its bytes. UserError if it is no such file."""
    with as_user_error(path), open(path, "rb") as file:  # one open file: a training may replace it meanwhile
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return dict(torch.load(file, map_location="cpu", weights_only=True)) | {"sha256": sha256}


def weights_sha256(encoder):
    """A hash of what an encoder computes: its config and its weights, wherever they are stored -> hex digits."""
    digest = hashlib.sha256(json.dumps(encoder.config, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_encoder(path, device="cpu", state=None):
    """Checkpoint file -> the ViT that embeds, in eval mode; the file says its architecture."""
    state = state or read_checkpoint(path)
    with as_user_error(path):
        encoder = ViT(**state["config"])
        encoder.load_state_dict(state["encoder"])
    return encoder.to(device).eval()


def init_from_2d(encoder, path):
    """Start from a public 2D ViT (timm, DINO, MAE) or from a checkpoint of ours, for `train.py --init`.

    The patch kernel is inflated over S and divided by ps: a replicated image gives the 2D network's tokens.
    CHOICE: positions, but for the CLS token's, and heads are left out; a missing CLS token starts at random.
    """
    state = read_checkpoint(path)
    del state["sha256"]  # a plain state dict would have it among its weights
    with as_user_error(path, "does not fit: --init takes a ViT of this --arch and --patch-size"):
        for key in ("encoder", "teacher", "model", "state_dict"):  # where the families nest their weights
            state = state[key] if isinstance(state.get(key), dict) else state
        state = {key.removeprefix("module.").removeprefix("backbone.").replace("fc_norm.", "norm."): value
                 for key, value in state.items()}
        if "cls_token" in state and "pos_embed" in state:  # timm and DINO add one to the other
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]  # (1, 1, D)
        state = {key: value for key, value in state.items() if not key.startswith(LEFT_OUT)}
        kernel, ps = state["patch_embed.proj.weight"], encoder.patch_size[-1]
        if kernel.dim() == 4:  # (D, 3, ph, pw)
            kernel = kernel[..., None].expand(-1, -1, -1, -1, ps) / ps  # (D, 3, ph, pw, ps)
            state["patch_embed.proj.weight"] = kernel.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P)
        state.setdefault("cls_token", encoder.cls_token)
        if encoder.cls_token is None:
            del state["cls_token"]
        encoder.load_state_dict(state)


# ---- pictures ---------------------------------------------------------------------------------------------
def read_picture_flags(parser, out):
    """Flags of the scripts that draw one file -> args, and the file as a sample (1, C, H, W, S) in [0, 1]."""
    flag = parser.add_argument
    flag("file", help="a DICOM, NIfTI, image or video file, or the folder of a DICOM series")
    flag("--out", default=out, help=f"picture to write (default {out}); slices run from left to right")
    flag("--modality", choices=MODALITIES, help="what the file shows, if it does not say so itself")
    flag("--size", type=int, choices=range(32, 1025, 32), default=256, metavar="N", help="longer side (256)")
    flag("--seed", type=int, default=0, help="of what is random: the mask, or crops and intensities")
    args = parser.parse_args()
    _, array = read_any(args.file, args.modality, size=args.size)
    return args, take_frames_evenly(unit(torch.from_numpy(array)[None]))


def save_montage(path, rows, gap=4):
    """Write rows of tiles, each (3, H, W) in [0, 1], as one picture, a PNG or JPEG as its name says.

    Columns are as wide as the widest tile. UserError: another ending of the name.
    """
    file_format = PICTURE_FORMATS.get(Path(path).suffix.lower())
    if file_format is None:
        raise UserError(f"{path}: the name of a picture must end in {', '.join(PICTURE_FORMATS)}")
    heights = [gap + max(tile.shape[1] for tile in row) for row in rows]
    width = gap + max(tile.shape[2] for row in rows for tile in row)
    sheet = torch.full((3, sum(heights), max(map(len, rows)) * width), 0.25)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet[:, sum(heights[:i]):, j * width:][:, :tile.shape[1], :tile.shape[2]] = tile
    pixels = (sheet[:, :-gap, :-gap].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (height, width, 3)
    with atomic_write(path) as file:
        Image.fromarray(pixels.numpy()).save(file, format=file_format)
