"""SimDINO (paper Sec. 3.3, Appendix B): align views of a sample across student and teacher, keep the batch spread out.

In:  samples x (B, C, H, W, S) in [0, 1]. Out: alignment minus gamma times the coding rate of the student's embeddings.
A view of Algorithms 1-3 (crop, resize, flip, blur) is linear and separable, so it is one small matrix per axis and sample:
the whole batch is augmented by three batched matrix products, on whatever device it lies.

    python simdino.py FILE --out views.png                         # draws the views of one file
"""
import argparse
import copy
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather

from model import (PATCH_SIZE, block_flops, denormalize, expand, init_weights, is_video, normalize, pool, save_montage,
                   take_frames, unit)
from prepare import UserError, read_any

GLOBAL_SIZE, LOCAL_SIZE = 0.875, 0.375  # s_g, s_l of Appendix B as 224 / 256 and 96 / 256. The sizes are DINO's
LOCAL_VIEWS_2D, LOCAL_VIEWS_3D = 10, 4  # Sec. 3.3
# Numbers the paper does not give:
GLOBAL_AREA, LOCAL_AREA = (0.4, 1.0), (0.05, 0.4)  # CHOICE: DINO's crop scales
ASPECT = (3 / 4, 4 / 3)  # CHOICE: of a crop in plane, torchvision's and DINO's
PROBABILITY = 0.5  # CHOICE: of flip, shift, blur and contrast each
SHIFT = 0.1  # CHOICE: intensity shift in [-0.1, 0.1] of the full range
BLUR = (0.1, 2.0)  # CHOICE: sigma of the Gaussian in pixels, DINO's
GAMMA = (0.7, 1.5)  # CHOICE: contrast as a power of the intensity, MONAI's RandAdjustContrast
HIDDEN, OUT = 2048, 256  # projection head, DINO's and SimDINO's
MOMENTUM = 0.996  # of the teacher at the first step, 1 at the last (Sec. 3.3)
BATCH = 256  # the paper's smallest global batch (volumes, Sec. 3.4): smaller ones are weighted like it, see simdino_loss
SHORT_RUN, SHORT_MOMENTUM = 5000, 0.9  # DEVIATION: runs of fewer steps start here; 0.996 fails in 1,500 (docs/learning.md)


# ------------------------------------------------------------------------------------------------------------ views
def resample_matrix(start, length, n_in, n_out, flip=None):
    """Linear resampling of n_in cells to n_out as matrices (B, n_out, n_in) whose rows sum to one.

    start, length (B,): the crop in input cells. flip (B,) bool: mirror it. When shrinking, the triangle filter widens with
    the step (antialiasing); the whole axis at its own size is the identity exactly.
    """
    step = (length / n_out)[:, None]  # (B, 1) input cells per output cell
    cells = torch.arange(n_out, device=start.device)  # (n_out,)
    centre = start[:, None] + (cells + 0.5) * step - 0.5  # (B, n_out), centre to centre (align_corners=False)
    if flip is not None:
        centre = torch.where(flip[:, None], centre.flip(1), centre)  # (B, n_out)
    distance = (torch.arange(n_in, device=start.device) - centre.clamp(0, n_in - 1)[:, :, None]).abs()  # (B, n_out, n_in)
    weight = (1 - distance / step.clamp(min=1)[:, :, None]).clamp(min=0)  # (B, n_out, n_in)
    return weight / weight.sum(dim=2, keepdim=True)


def blur_matrix(sigma, n):
    """Gaussian blur of n cells, sigma (B,) in cells, as matrices (B, n, n); borders are renormalised, sigma 0 is identity."""
    cells = torch.arange(n, device=sigma.device)
    distance = cells[:, None] - cells  # (n, n)
    weight = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None, None]).square())  # (B, n, n)
    return weight / weight.sum(dim=2, keepdim=True)


def apply_matrices(x, matrices):
    """x (B, C, H, W, S) and (B, n_out, n_in) per spatial axis, or None to leave an axis alone -> the resampled x."""
    for axis, matrix in enumerate(matrices, start=2):
        if matrix is not None:
            x = x.movedim(axis, -1)  # the axis last
            x = torch.einsum("b...i,boi->b...o", x, matrix).movedim(-1, axis)  # n_in -> n_out on this axis
    return x


def make_view(x, kind, size, u):
    """One view of every sample: x (B, C, H, W, S) in [0, 1], kind global1 | global2 | local, size (H', W', S'), u (B, 12).

    u holds the view's uniform random numbers. Returns (B, C, H', W', S') in [0, 1]; S is cropped only if it is depth.
    """
    def between(i, low, high):
        return low + (high - low) * u[:, i]  # (B,)

    area = between(0, *(LOCAL_AREA if kind == "local" else GLOBAL_AREA))  # RandCrop: share of the plane
    aspect = torch.exp(between(1, *map(math.log, ASPECT)))
    sides = [(area * aspect).sqrt(), (area / aspect).sqrt(), area.sqrt()]  # of H, W, S. CHOICE: S as the mean side
    axes = 2 if x.shape[-1] == 1 or is_video(x) else 3  # Algorithm 3 crops and blurs S, Algorithms 1 and 2 do not
    blur = torch.where(u[:, 6] < PROBABILITY, between(7, *BLUR), 0) if kind == "global1" else None  # GaussianBlur, sigma (B,)
    flip = u[:, 5] < PROBABILITY if kind != "local" else None  # RandFlip. CHOICE: left-right
    matrices = [None, None, None]
    for axis in range(axes):
        n_in, n_out = x.shape[2 + axis], size[axis]
        length = sides[axis].clamp(max=1) * n_in  # CHOICE: a side that would stick out is cut to the sample
        start = u[:, 2 + axis] * (n_in - length)
        matrices[axis] = resample_matrix(start, length, n_in, n_out, flip if axis == 1 else None)  # Resize
        if blur is not None:  # blur and shift commute, rows sum to one; only the clipping now comes after both
            matrices[axis] = blur_matrix(blur, n_out) @ matrices[axis]  # (B, n_out, n_in)
    x = apply_matrices(x, matrices)
    if kind != "local":  # RandShiftIntensity, clipped to the range of the data
        shift = torch.where(u[:, 8] < PROBABILITY, between(9, -SHIFT, SHIFT), 0)
        x = (x + shift[:, None, None, None, None]).clamp(0, 1)
    if kind == "global2":  # Contrast adjust
        gamma = torch.where(u[:, 10] < PROBABILITY, between(11, *GAMMA), 1)
        x = x ** gamma[:, None, None, None, None]
    return x


def view_size(x, scale, patch):
    """(H', W', S') of a view: scale times the sample in whole patches; a video keeps its frames, an image has one slice."""
    size = [max(1, int(n * scale / p + 0.5)) * p for n, p in zip(x.shape[2:], patch)]
    return size[:2] + [x.shape[-1]] if x.shape[-1] == 1 or is_video(x) else size


def n_local_views(x, local_views):
    """local_views of an image (Fig. 3a varies them), 4 of a video or volume (Sec. 3.3)."""
    return local_views if x.shape[-1] == 1 else LOCAL_VIEWS_3D


def make_views(x, patch_size=PATCH_SIZE, local_views=LOCAL_VIEWS_2D, generator=None):
    """Algorithms 1-3: samples (B, C, H, W, S) in [0, 1] -> two global and 10 (2D) or 4 local views, normalised to [-1, 1].

    Each view is (B, 3, H', W', S'). The random numbers come from a CPU generator whatever the device, one row per sample:
    a sample's views depend neither on its batch mates nor, but for rounding, on the hardware.
    """
    kinds = ["global1", "global2"] + ["local"] * n_local_views(x, local_views)
    u = torch.rand(len(x), len(kinds), 12, generator=generator).to(x.device)  # (B, V, 12)
    sizes = {kind: view_size(x, LOCAL_SIZE if kind == "local" else GLOBAL_SIZE, patch_size) for kind in kinds}
    views = [make_view(x, kind, sizes[kind], u[:, v]) for v, kind in enumerate(kinds)]
    return [expand(normalize(view), patch_size[-1]) for view in views]  # Normalize last, then C = 3 (Algorithm 1)


# ------------------------------------------------------------------------------------------------------------- loss
def coding_rate(z, eps=0.5):
    """R(Z) = 1/2 logdet(I + d / (m eps^2) Z^T Z) for z (m, d): nats to code the batch up to precision eps (Sec. 3.3).

    Gamma = Z^T Z / m is the uncentred second moment. By Sylvester's identity the smaller of Z^T Z and Z Z^T gives the same
    value. float64 from the product on, autocast off: near collapse fp32 depends on the order of summation, bf16 is NaN.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.double()
        m, d = z.shape
        gram = z @ z.T if m < d else z.T @ z  # (min(m, d), min(m, d))
        eye = torch.eye(len(gram), dtype=z.dtype, device=z.device)
        cholesky, info = torch.linalg.cholesky_ex(eye + d / (m * eps**2) * gram)
        rate = cholesky.diagonal().log().sum().float()  # 1/2 logdet(A) = sum log diag(L) for A = L L^T
        return torch.where(info == 0, rate, torch.nan)  # not factorised (non-finite input): NaN, which train.py reports


def rate_range(m, d, eps=0.5):
    """Coding rate of m unit vectors in d dimensions: collapsed to one direction, and spread out as far as they can be."""
    r = min(m, d)  # m <= d: orthonormal rows, m eigenvalues d / (m eps^2); m > d: a tight frame, d eigenvalues 1 / eps^2
    return 0.5 * math.log1p(d / eps**2), 0.5 * r * math.log1p(d / (r * eps**2))


def gather(z):
    """(B, d) on each of R ranks -> (R B, d) on all, gradients flowing back to their rank.

    Z_1^T Z_1 + ... + Z_R^T Z_R = Z^T Z of the gathered batch, so this is the all-reduced covariance over global samples.
    """
    return torch.cat(all_gather(z.contiguous())) if dist.is_initialized() and dist.get_world_size() > 1 else z


def effective_rank(z):
    """Collapse monitor: participation ratio (tr G)^2 / tr(G^2) of G = Z Z^T; 1 if collapsed, at most min(m, d)."""
    gram = z.float() @ z.float().T  # (m, m)
    return gram.trace().square() / gram.square().sum()


def simdino_loss(student, teacher, eps=0.5, gamma=None):
    """L_SimDINO (Sec. 3.3): student (V, B, d), views 0 and 1 global; teacher (2, B, d) -> scalar loss, its parts.

    Alignment 1/2 ||z_c - z_g||^2 is averaged over all pairs of a teacher and a student view that are not the same view; the
    coding rate is that of all ranks' samples, averaged over the two global student views.
    DEVIATION: the paper's equation has no weight between the terms. gamma defaults to (d + m) / (d m), the balance of the
    SimDINO code (whose --eps is this eps squared): the rate can reach `rate_range`, the alignment of unit vectors at most 2.
    DEVIATION: m counts as at least 256. A small variance v in a new direction earns gamma d v / (2 eps^2), whatever m: the
    gamma of a small batch pays more for crop noise than that of the paper's batches (docs/learning.md).
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.float()
        V, B, d = student.shape
        distance = 0.5 * (student[None] - teacher[:, None]).square().sum(dim=-1)  # (2, V, B)
        different = ~torch.eye(2, V, dtype=torch.bool, device=student.device)  # (2, V)
        alignment = (distance * different[..., None]).sum() / (2 * (V - 1) * B)  # mean over 2 V - 2 pairs, B samples
        everyone = [gather(student[view]) for view in (0, 1)]  # each (m, d)
        rate = sum(coding_rate(z, eps) for z in everyone) / 2
        m = len(everyone[0])
        counted = max(m, BATCH)
        gamma = (d + counted) / (d * counted) if gamma is None else gamma
        low, high = rate_range(m, d, eps)
        parts = {"alignment": alignment.detach(), "coding_rate": rate.detach(), "rate_collapsed": low, "rate_max": high,
                 "gamma": gamma, "effective_rank": effective_rank(everyone[0].detach())}
        return alignment - gamma * rate, parts


# ----------------------------------------------------------------------------------------------------------- method
class Branch(nn.Module):
    """Encoder and projection head, D -> 2048 -> 2048 -> 256: views (B, 3, H', W', S') -> unit vectors (B, d) in fp32."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        hidden = HIDDEN if encoder.dim >= 192 else 4 * encoder.dim  # CHOICE: a small head for the small vit_xs
        self.head = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                  nn.Linear(hidden, OUT))
        self.head.apply(init_weights)

    def forward(self, x):
        z = self.head(pool(self.encoder(x), "cls"))  # (B, d)
        return F.normalize(z.float(), dim=-1)


class SimDINO(nn.Module):
    """Student and its moving average, the teacher; `encoder` is the teacher's, the one that embeds (as in DINO)."""

    BETAS = (0.9, 0.999)  # AdamW, official implementation
    WEIGHT_DECAY = (0.04, 0.4)  # first and last step, cosine
    CLIP_GRAD = 3.0

    def __init__(self, encoder, local_views=LOCAL_VIEWS_2D, eps=0.5):
        super().__init__()
        self.config = dict(local_views=local_views, eps=eps)
        self.student = Branch(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.encoder.drop_path = 0.0

    @property
    def encoder(self):
        return self.teacher.encoder

    def inputs(self, x, generator):
        """Samples (B, C, H, W, S) in [0, 1] and a CPU generator -> the arguments of `forward`."""
        return (make_views(x, self.encoder.patch_size, self.config["local_views"], generator),)

    def forward(self, views):
        """V views, each (B, 3, H', W', S'), the two global ones first -> scalar loss, its parts."""
        B = len(views[0])
        both = torch.cat(views[:2])  # (2 B, 3, H', W', S')
        with torch.no_grad():
            teacher = self.teacher(both).unflatten(0, (2, B))  # (2, B, d)
        student = self.student(both).unflatten(0, (2, B))  # (2, B, d)
        if len(views) > 2:
            student = torch.cat([student, self.student(torch.cat(views[2:])).unflatten(0, (-1, B))])  # (V, B, d)
        return simdino_loss(student, teacher, self.config["eps"])

    def flops(self, x):
        """Model floating point operations of a training step per sample: student forward and backward, teacher forward."""
        encoder = self.encoder
        big, small = (block_flops(encoder.blocks, 1 + math.prod(encoder.grid(view_size(x, scale, encoder.patch_size))))
                      for scale in (GLOBAL_SIZE, LOCAL_SIZE))
        return 2 * (3 + 1) * big + n_local_views(x, self.config["local_views"]) * 3 * small

    @torch.no_grad()
    def after_step(self, progress, total_steps):
        """Move the teacher after an optimizer step: theta_t <- mu theta_t + (1 - mu) theta_s, in fp32 (Sec. 3.3)."""
        mu = teacher_momentum(progress, total_steps)
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - mu)


def teacher_momentum(progress, total_steps):
    """Momentum at progress in [0, 1] of the run: cosine from 0.996, in a short run from 0.9, to 1 (Sec. 3.3)."""
    start = MOMENTUM if total_steps >= SHORT_RUN else SHORT_MOMENTUM
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def main():
    parser = argparse.ArgumentParser(description="Draw the SimDINO views of one file: each row one view.")
    parser.add_argument("file", help="a DICOM, NIfTI, image or video file, or the folder of a DICOM series")
    parser.add_argument("--out", default="views.png", help="picture to write; slices or frames run from left to right")
    parser.add_argument("--size", type=int, default=256, help="longer side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and intensities")
    args = parser.parse_args()
    _, array = read_any(args.file, size=args.size)
    x = take_frames(unit(torch.from_numpy(array)[None]))  # (1, C, H, W, S)
    views = make_views(x, generator=torch.Generator().manual_seed(args.seed))
    rows = []
    for view in [expand(normalize(x))] + views:  # (1, 3, H', W', S'), the sample itself first
        n = min(x.shape[-1], 8)  # slices shown
        shown = torch.linspace(0, view.shape[-1] - 1, n).round().long()
        rows.append(list(denormalize(view[0, ..., shown]).unbind(-1)))  # each (3, H', W')
    save_montage(args.out, rows if x.shape[-1] > 1 else [[r[0] for r in rows[:3]], [r[0] for r in rows[3:]]])
    print(f"{args.out}: the sample, then {len(views)} views: global 1, global 2, {len(views) - 2} local")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"simdino.py: {error}")
