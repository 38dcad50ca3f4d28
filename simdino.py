"""SimDINO (paper Sec. 3.3, Appendix B): align views of a sample across student and teacher, spread the batch.

In:  samples x (B, C, H, W, S) in [0, 1]. Out: alignment minus gamma times the coding rate of the student.
Crop, resize, flip and blur of Algorithms 1-3 are linear and separable: one small matrix per axis and sample,
so that a whole batch is augmented by three batched matrix products, on whatever device it lies.

    python simdino.py FILE --out views.png                         # draws the views of one file
"""
import argparse
import copy
import math

import torch
import torch.distributed as dist
from torch import nn

from model import (PATCH_SIZE, denormalize, expand, init_weights, normalize, read_picture_flags,
                   sample_kind, save_montage, subsample_frames)
from prepare import cli

GLOBAL_SIZE, LOCAL_SIZE = 0.875, 0.375  # s_g, s_l of Appendix B as DINO's 224 and 96 of 256
LOCAL_VIEWS_2D, LOCAL_VIEWS_3D = 10, 4  # Sec. 3.3
# Numbers the paper does not give:
GLOBAL_AREA, LOCAL_AREA = (0.4, 1.0), (0.05, 0.4)  # CHOICE: DINO's crop scales
ASPECT = (3 / 4, 4 / 3)  # CHOICE: of a crop in plane, torchvision's and DINO's
PROBABILITY = 0.5  # CHOICE: of flip, shift, blur and contrast each
SHIFT = 0.1  # CHOICE: intensity shift in [-0.1, 0.1] of the full range
BLUR, BLUR_RADIUS = (0.1, 2.0), 4  # CHOICE: DINO's sigma, in pixels, along S in slices; ends at 4 sigma
CONTRAST = (0.7, 1.5)  # CHOICE: a power of the intensity, within MONAI's RandAdjustContrast
HIDDEN, OUT = 2048, 256  # CHOICE: the head of the DINO and SimDINO code; the loss of Sec. 3.3 names none
DROP_PATH = 0.1  # stochastic depth of the student, official implementation
MOMENTUM = 0.996  # of the teacher at the first step, 1 at the last (Sec. 3.3)


# ---- views ------------------------------------------------------------------------------------------------
def resample_matrix(start, length, n_in, n_out, flip=None):
    """Linear resampling of n_in cells to n_out as matrices (B, n_out, n_in) whose rows sum to one.

    start, length (B,): the crop in input cells. flip (B,) bool: mirror it. When shrinking, the triangle
    filter widens with the step (antialiasing). The whole axis at its own size is the identity exactly.
    """
    step = (length / n_out)[:, None]  # (B, 1) input cells per output cell
    cells = torch.arange(n_out, device=start.device)  # (n_out,)
    centre = start[:, None] + (cells + 0.5) * step - 0.5  # (B, n_out), centre to centre (align_corners=False)
    if flip is not None:
        centre = torch.where(flip[:, None], centre.flip(1), centre)  # (B, n_out)
    centre = centre.clamp(0, n_in - 1)[:, :, None]  # (B, n_out, 1)
    distance = (torch.arange(n_in, device=start.device) - centre).abs()  # (B, n_out, n_in)
    weight = (1 - distance / step.clamp(min=1)[:, :, None]).clamp(min=0)  # (B, n_out, n_in)
    return weight / weight.sum(dim=2, keepdim=True)


def blur_matrix(sigma, n):
    """Gaussian blur of n cells, sigma (B,) in cells, as matrices (B, n, n) whose rows sum to one."""
    cells = torch.arange(n, device=sigma.device)
    distance = (cells[:, None] - cells) / sigma.clamp(min=1e-3)[:, None, None]  # (B, n, n) in sigmas
    # Without the cut the tails would be subnormal numbers, with which a CPU multiplies many times slower.
    weight = torch.exp(-0.5 * distance.square()) * (distance.abs() <= BLUR_RADIUS)  # (B, n, n)
    return weight / weight.sum(dim=2, keepdim=True)


def apply_matrices(x, along_h, along_w, along_s):
    """x (B, C, H, W, S) and matrices (B, n_out, n_in) for its last three axes -> (B, C, H', W', S')."""
    rows = along_h.amax(dim=(0, 1)).nonzero()[:, 0]  # those with any weight: of H no others are read
    low, high = rows[0], rows[-1] + 1
    x, along_h = x[:, :, low:high], along_h[:, :, low:high]
    for matrix in (along_s, along_w, along_h):  # each leaves its axis in front: the next is last, none moves
        rest = x.shape[1:-1]
        x = (matrix @ x.flatten(1, -2).mT).unflatten(2, rest)  # (B, ..., n_in) -> (B, n_out, ...)
    return x.movedim(-1, 1)  # (B, H', W', S', C) -> (B, C, H', W', S'), a view


def make_view(x, kind, size, u):
    """Views (B, C, H', W', S') of a kind and size of samples x (B, C, H, W, S), by uniform u (B, 12)."""
    area, aspect, top, left, first, flip, blur, sigma, shift, by, contrast, power = u.unbind(dim=1)  # (B,)

    def between(bounds, uniform):
        return bounds[0] + (bounds[1] - bounds[0]) * uniform

    area = between(LOCAL_AREA if kind == "local" else GLOBAL_AREA, area)  # RandCrop: share of the plane
    aspect = torch.exp(between([math.log(ratio) for ratio in ASPECT], aspect))
    sides = [(area * aspect).sqrt(), (area / aspect).sqrt(), area.sqrt()]  # CHOICE: S as the mean of H and W
    mirror = flip < PROBABILITY if kind != "local" else None  # RandFlip. CHOICE: left-right
    sigma = torch.where(blur < PROBABILITY, between(BLUR, sigma), 0)  # GaussianBlur
    matrices = []
    for axis, place in enumerate((top, left, first)):
        n_in, n_out = x.shape[2 + axis], size[axis]
        if axis == 2 and sample_kind(x.shape[1:]) != "volume":  # Algorithm 3 crops S, Algorithms 1 and 2 do not
            matrices.append(torch.eye(n_in, device=x.device).expand(len(x), -1, -1))  # (B, S, S)
            continue
        length = sides[axis].clamp(max=1) * n_in  # CHOICE: a side that would stick out is cut to the sample
        start = place * (n_in - length)
        matrix = resample_matrix(start, length, n_in, n_out, mirror if axis == 1 else None)  # Resize
        if kind == "global1":  # blur and shift commute, rows sum to one: only the clipping comes after both
            matrix = blur_matrix(sigma, n_out) @ matrix  # (B, n_out, n_in)
        matrices.append(matrix)
    x = apply_matrices(x, *matrices)  # (B, C, H', W', S')
    if kind != "local":  # RandShiftIntensity, clipped to the range of the data
        shift = torch.where(shift < PROBABILITY, between((-SHIFT, SHIFT), by), 0)
        x = (x + shift[:, None, None, None, None]).clamp(0, 1)
    if kind == "global2":  # Contrast adjust
        power = torch.where(contrast < PROBABILITY, between(CONTRAST, power), 1)
        x = x ** power[:, None, None, None, None]
    return x


def make_views(x, patch_size=PATCH_SIZE, local_views=LOCAL_VIEWS_2D, generator=None):
    """Algorithms 1-3: samples (B, C, H, W, S) in [0, 1] -> views (B, 3, H', W', S') in [-1, 1], global first.

    Sides are s_g or s_l times the sample's, in whole patches; local_views: for images (Fig. 3a). Random draws
    are of a CPU generator, a row a sample: no view depends on batch mates nor, but for rounding, on hardware.
    """
    image, video = x.shape[-1] == 1, sample_kind(x.shape[1:]) == "video"
    kinds = ["global1", "global2"] + ["local"] * (local_views if image else LOCAL_VIEWS_3D)
    u = torch.rand(len(x), len(kinds), 12, generator=generator).to(x.device)  # (B, V, 12)
    views = []
    for v, kind in enumerate(kinds):
        scale = LOCAL_SIZE if kind == "local" else GLOBAL_SIZE
        size = [max(1, int(n * scale / p + 0.5)) * p for n, p in zip(x.shape[2:], patch_size)]
        if image or video:
            size[2] = x.shape[-1]  # all frames (Algorithm 2)
        view = normalize(make_view(x, kind, size, u[:, v]))  # Normalize last, then C = 3 (Algorithm 1)
        views.append(expand(view, patch_size[-1]))  # (B, 3, H', W', S')
    return views


# ---- loss -------------------------------------------------------------------------------------------------
def coding_rate(z, eps=0.5):
    """R(Z) = 1/2 logdet(I + d / (m eps^2) Z^T Z) of z (m, d): nats to code z to precision eps (Sec. 3.3).

    Gamma = Z^T Z / m is the uncentred second moment; the smaller of Z^T Z and Z Z^T will do (Sylvester). In
    float64, autocast off: near collapse fp32 depends on the order of summation, and bf16 is NaN.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.double()
        m, d = z.shape
        gram = z @ z.T if m < d else z.T @ z  # (min(m, d), min(m, d))
        eye = torch.eye(len(gram), dtype=z.dtype, device=z.device)
        cholesky, info = torch.linalg.cholesky_ex(eye + d / (m * eps**2) * gram)
        rate = cholesky.diagonal().log().sum().float()  # 1/2 logdet(A) = sum log diag(L) for A = L L^T
        return torch.where(info == 0, rate, torch.nan)  # no factor of what is not finite: train.py skips it


def rate_range(m, d, eps=0.5):
    """Coding rate of m unit vectors in d dimensions: collapsed to one, and spread as far as they can be."""
    r = min(m, d)  # m <= d: orthonormal, m eigenvalues d / (m eps^2); m > d: a tight frame, d of 1 / eps^2
    return 0.5 * math.log1p(d / eps**2), 0.5 * r * math.log1p(d / (r * eps**2))


def gather(z):
    """(B, d) on each of R ranks -> (R B, d) on all, whose Z^T Z is Z_1^T Z_1 + ... + Z_R^T Z_R, all-reduced.

    Gradients flow through a rank's own rows alone, R times: DDP averages over ranks what is a sum here.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return z
    everyone = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(everyone, z.detach().contiguous())
    everyone[dist.get_rank()] = z + (world - 1) * (z - z.detach())  # the value of z, R times its gradient
    return torch.cat(everyone)  # (R B, d)


def effective_rank(z):
    """Collapse monitor: participation ratio (tr G)^2 / tr(G^2), G = Z Z^T: 1 if collapsed, to min(m, d)."""
    gram = z @ z.T  # (m, m)
    return gram.trace().square() / gram.square().sum()


def simdino_loss(student, teacher, eps=0.5, gamma=None):
    """L_SimDINO (Sec. 3.3): student (V, B, d), global views first; teacher (2, B, d) -> scalar loss, parts.

    Alignment 1/2 ||z_c - z_g||^2 is averaged over the pairs of a teacher and a student view that differ, the
    coding rate of the samples of all ranks over the two global student views.
    CHOICE: the rate of the student alone, as the paper writes it, and of global views, as the SimDINO code;
    its default, the rate of (student + teacher) / 2, has half the gradient.
    DEVIATION: the paper has no weight between the terms, but rates reach `rate_range`, alignments 2: gamma
    defaults to (d + m) / (d m), the balance of the SimDINO code (whose --eps is this eps squared).
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.float()
        V, B, d = student.shape
        distance = 0.5 * (student[None] - teacher[:, None]).square().sum(dim=-1)  # (2, V, B)
        different = ~torch.eye(2, V, dtype=torch.bool, device=student.device)  # (2, V)
        alignment = (distance * different[..., None]).sum() / (2 * (V - 1) * B)  # 2 V - 2 pairs, B samples
        everyone = [gather(student[view]) for view in (0, 1)]  # each (m, d)
        rate = sum(coding_rate(z, eps) for z in everyone) / 2
        m = len(everyone[0])
        gamma = (d + m) / (d * m) if gamma is None else gamma
        low, high = rate_range(m, d, eps)
        parts = {"alignment": alignment.detach(), "coding_rate": rate.detach(), "rate_collapsed": low,
                 "rate_max": high, "gamma": gamma, "effective_rank": effective_rank(everyone[0].detach())}
        return alignment - gamma * rate, parts


# ---- method -----------------------------------------------------------------------------------------------
def cosine(start, end, progress):
    """Half a cosine, from start at progress 0 to end at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class EncoderWithHead(nn.Module):
    """Encoder and head D -> 2048 -> 2048 -> 256: views (B, 3, H', W', S') -> unit vectors (B, d) in fp32."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        hidden = HIDDEN if encoder.dim >= 192 else 4 * encoder.dim  # CHOICE: a small head for the tiny vit_xs
        self.head = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.GELU(),
                                  nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, OUT))
        self.head.apply(init_weights)

    def forward(self, x):
        z = self.head(self.encoder(x)[:, 0])  # (B, d), of the CLS token
        return nn.functional.normalize(z.float(), dim=-1)


class SimDINO(nn.Module):
    """Student and its moving average, the teacher; `encoder` is the teacher's, which embeds (as in DINO)."""

    BETAS = (0.9, 0.999)  # AdamW, official implementation
    WEIGHT_DECAY = (0.04, 0.4)  # first and last step, cosine
    CLIP_GRAD = 3.0  # CHOICE: the norm of all gradients together; the official code clips each tensor's at 3

    def __init__(self, encoder, local_views=LOCAL_VIEWS_2D, gamma=None, momentum=MOMENTUM, eps=0.5):
        super().__init__()
        self.config = dict(local_views=local_views, gamma=gamma, momentum=momentum, eps=eps)
        self.student = EncoderWithHead(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.encoder.drop_path = 0.0

    @property
    def encoder(self):
        return self.teacher.encoder

    def make_inputs(self, x, generator):
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
            local = self.student(torch.cat(views[2:])).unflatten(0, (-1, B))  # (V - 2, B, d)
            student = torch.cat([student, local])  # (V, B, d)
        return simdino_loss(student, teacher, self.config["eps"], self.config["gamma"])

    @torch.no_grad()
    def after_step(self, progress):
        """theta_t <- mu theta_t + (1 - mu) theta_s after the optimizer step, in fp32; progress in [0, 1]."""
        mu = cosine(self.config["momentum"], 1, progress)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - mu)


def main():
    parser = argparse.ArgumentParser(description="Draw the SimDINO views of one file, each row one view.")
    args, x = read_picture_flags(parser, "views.png")  # (1, C, H, W, S)
    views = make_views(x, generator=torch.Generator().manual_seed(args.seed))
    shown = min(x.shape[-1], 8)  # slices or frames
    rows = [list(denormalize(subsample_frames(view[0], shown)).unbind(-1)) for view in [expand(normalize(x)), *views]]
    save_montage(args.out, rows if shown > 1 else [sum(rows[:3], []), sum(rows[3:], [])])
    print(f"{args.out}: the sample, then {len(views)} views: global 1, global 2, {len(views) - 2} local")


if __name__ == "__main__":
    cli(main)
