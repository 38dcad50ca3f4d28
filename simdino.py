"""SimDINO (paper Sec. 3.3, Appendix B): align the views of a sample, spread the samples of a batch.

In:  samples x (B, C, H, W, S) in [0, 1].
Out: alignment of the views minus gamma times the coding rate of the student.

Crop, resize, flip and blur of Algorithms 1-3 are linear, and each works on one axis at a time: one
small matrix per axis, view and sample. So a whole batch is augmented by two or three batched matrix
products, on whatever device it lies.

Letters beside those of model.py: H', W', S' the size of a view; d the width of the vectors that are
compared; m the samples in a coding rate, those of all R ranks.

    python simdino.py FILE --out views.png   # draws the views of one file
"""
import argparse
import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model import (PATCH_SIZE, denormalize, draw_samples, init_weights, normalize,
                   parse_picture_arguments, read_sample_to_draw, sample_kind)
from prepare import cli

LOCAL_VIEWS_2D = 10  # Sec. 3.3, of images
LOCAL_VIEWS_3D = 4  # of videos and volumes

# CHOICE: s_g and s_l of Appendix B have no value in the paper. These are DINO's view sizes, 224 and
# 96 pixels, as shares of our 256.
# Appendix B calls (s_g H, s_g W) the size of the crop. We read it as the size after Resize,
# which is what the network sees.
GLOBAL_SIZE = 0.875
LOCAL_SIZE = 0.375

# The paper gives no numbers for the augmentations either.
GLOBAL_AREA = (0.4, 1.0)  # CHOICE: DINO's shares of the plane in a crop
LOCAL_AREA = (0.05, 0.4)
ASPECT = (3 / 4, 4 / 3)  # CHOICE: of a crop relative to the sample, torchvision's numbers
PROBABILITY = 0.5  # CHOICE: of flip, shift, blur and contrast each
SHIFT = (-0.1, 0.1)  # CHOICE: added to intensities in [0, 1]
BLUR = (0.1, 2.0)  # CHOICE: DINO's sigma, in pixels, along S in slices
BLUR_RADIUS = 4  # sigma, where the Gaussian is cut off
CONTRAST = (0.7, 1.5)  # CHOICE: a power of the intensity, narrower than MONAI's (0.5, 4.5)

HIDDEN = 2048  # CHOICE: the head of the SimDINO code; Sec. 3.3 describes none
OUT = 256
DROP_PATH = 0.1  # stochastic depth of the student (train.py), official implementation
MOMENTUM = 0.996  # of the teacher at the first step, 1 at the last (Sec. 3.3)


# ---- views ---------------------------------------------------------------------------------------
def resample_matrix(start, length, n_in, n_out, flip=None):
    """Linear resampling of n_in cells to n_out: matrices (..., n_out, n_in), each row's sum is 1.

    start, length (...): the crop, in input cells. flip (...) bool: mirror it. The whole axis at its
    own size is exactly the identity. CHOICE: linear, where DINO's resize is bicubic.
    """
    # The output cells' centres lie evenly over the crop, in input cells (align_corners=False).
    step = (length / n_out)[..., None]  # (..., 1) input cells per output cell
    cells = torch.arange(n_out, device=start.device)  # (n_out,)
    centre = start[..., None] + (cells + 0.5) * step - 0.5  # (..., n_out)
    if flip is not None:
        centre = torch.where(flip[..., None], centre.flip(-1), centre)  # (..., n_out)
    centre = centre.clamp(0, n_in - 1)

    # A triangle of weights lies around each centre. It reaches one cell to each side, or one step
    # when shrinking, which antialiases; at the border of a crop also to cells just outside.
    width = step.clamp(min=1)[..., None]  # (..., 1, 1)
    distance = (torch.arange(n_in, device=start.device) - centre[..., None]).abs()
    weight = (1 - distance / width).clamp(min=0)  # (..., n_out, n_in)
    return weight / weight.sum(dim=-1, keepdim=True)


def blur_matrix(sigma, n):
    """Gaussian blur of n cells, sigma (...) in cells: matrices (..., n, n), each row's sum is 1."""
    cells = torch.arange(n, device=sigma.device)
    sigma = sigma.clamp(min=1e-3)[..., None, None]  # (..., 1, 1), where 0 leaves all as it is
    distance = (cells[:, None] - cells) / sigma  # (..., n, n) in sigmas

    # Without the cut the tails would be subnormal numbers, which slow a CPU down many times.
    weight = torch.exp(-0.5 * distance.square()) * (distance.abs() <= BLUR_RADIUS)  # (..., n, n)
    return weight / weight.sum(dim=-1, keepdim=True)


def apply_matrices(x, along_h, along_w, along_s=None):
    """V views of each sample: x (B, C, H, W, S) -> (B, V, C, H', W', S').

    Matrices (B, V, n_out, n_in), one for each axis; without along_s, S stays as it is. In the
    einsums s, w and h are the axes that go in, and k, j and i those that come out (without along_s,
    k is S itself). In x, v has the size 1, and is broadcast over the views. Axes are put in such an
    order that the next one to be multiplied is the last in memory, which is fastest.
    """
    x = x.permute(0, 4, 1, 2, 3)[:, None]  # (B, 1, S, C, H, W), a view: S is still last in memory
    if along_s is None:
        x = x.contiguous()  # now W is last in memory
    else:
        x = torch.einsum("bvks,bvschw->bvkchw", along_s, x)  # (B, V, S', C, H, W)
    x = torch.einsum("bvjw,bvkchw->bvjkch", along_w, x)  # (B, V, W', S', C, H)
    x = torch.einsum("bvih,bvjkch->bvijkc", along_h, x)  # (B, V, H', W', S', C)
    return x.movedim(-1, 2)  # (B, V, C, H', W', S')


class Uniforms(NamedTuple):
    """The random numbers of a view, each (B, V) in [0, 1)."""
    area: torch.Tensor
    aspect: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    front: torch.Tensor  # the first slice of a crop
    flip_coin: torch.Tensor  # below PROBABILITY: do it
    blur_coin: torch.Tensor
    sigma: torch.Tensor
    shift_coin: torch.Tensor
    shift: torch.Tensor
    contrast_coin: torch.Tensor
    power: torch.Tensor


def between(bounds, uniform):
    """Uniform numbers in [0, 1) -> in [low, high)."""
    low, high = bounds
    return low + (high - low) * uniform


def view_matrices(shape, kind, size, draw):
    """Crop, resize, flip and blur of views of one kind, as matrices (B, V, n_out, n_in).

    They are for H, W and, of a volume, S. shape: (C, H, W, S) of a sample. kind, size: as in
    `views_of_kind`. draw: Uniforms.
    """
    # RandCrop: the sides of the crop as shares of H, W and S. CHOICE: the share of S is the
    # geometric mean of the others.
    area = between(LOCAL_AREA if kind == "local" else GLOBAL_AREA, draw.area)  # (B, V)
    log_ratios = [math.log(ratio) for ratio in ASPECT]
    aspect = torch.exp(between(log_ratios, draw.aspect))  # (B, V)
    sides = [(area * aspect).sqrt(), (area / aspect).sqrt(), area.sqrt()]

    # Where the crop lies, and which axis RandFlip mirrors. CHOICE: W, left and right.
    places = [draw.top, draw.left]
    if sample_kind(shape) == "volume":
        places.append(draw.front)  # Algorithm 3 crops S, Algorithms 1 and 2 do not
    flip_w = draw.flip_coin < PROBABILITY if kind != "local" else None
    flips = [None, flip_w, None]

    matrices = []
    for axis, place in enumerate(places):
        n_in = shape[1 + axis]
        length = sides[axis].clamp(max=1) * n_in  # CHOICE: cut to the sample where it sticks out
        start = place * (n_in - length)
        matrix = resample_matrix(start, length, n_in, size[axis], flips[axis])  # Resize
        if kind == "global1":  # GaussianBlur
            # Algorithm 1 shifts before it blurs. That is the same, since rows sum to one and values
            # are clipped after both.
            sigma = torch.where(draw.blur_coin < PROBABILITY, between(BLUR, draw.sigma), 0)
            matrix = blur_matrix(sigma, size[axis]) @ matrix  # (B, V, n_out, n_in)
        matrices.append(matrix)
    return matrices


def views_of_kind(x, kind, size, draws):
    """V views of one kind: samples x (B, C, H, W, S), draws (B, V, 12) -> (B, V, C, H', W', S').

    kind: "global1", "global2" or "local". size: (H', W', S'), of which S' counts for volumes alone.
    draws: uniform numbers in [0, 1), in the order of `Uniforms`.
    """
    draw = Uniforms(*draws.unbind(dim=-1))
    matrices = view_matrices(x.shape[1:], kind, size, draw)
    views = apply_matrices(x, *matrices)  # (B, V, C, H', W', S')

    if kind != "local":  # RandShiftIntensity. CHOICE: then clipped to [0, 1]
        shift = torch.where(draw.shift_coin < PROBABILITY, between(SHIFT, draw.shift), 0)
        views = (views + shift[..., None, None, None, None]).clamp(0, 1)
    if kind == "global2":  # Contrast adjust
        power = torch.where(draw.contrast_coin < PROBABILITY, between(CONTRAST, draw.power), 1)
        views = views ** power[..., None, None, None, None]
    return views


def view_size(size, scale, patch_size):
    """Size (H, W, S) of a sample -> (H', W', S') of a view: scale times it, in whole patches.

    S' counts for volumes alone: views of images and videos keep S.
    """
    sides = []
    for n, p in zip(size, patch_size):
        patches = int(n * scale / p + 0.5)  # the nearest whole number
        sides.append(p * max(1, patches))
    return sides


def make_views(x, patch_size=PATCH_SIZE, local_views=LOCAL_VIEWS_2D, generator=None):
    """Algorithms 1-3: samples (B, C, H, W, S) in [0, 1] -> V views, (B, C, H', W', S') in [-1, 1].

    The two global views come first. Sides are s_g or s_l times the sample's, in whole patches.
    local_views: how many an image has (Fig. 3a). generator: on the CPU. A view depends only on its
    sample and its row of random numbers: not on the rest of the batch, and on the device only by
    rounding.
    """
    is_image = sample_kind(x.shape[1:]) == "image"
    count = local_views if is_image else LOCAL_VIEWS_3D
    draws = torch.rand(len(x), 2 + count, len(Uniforms._fields), generator=generator)  # (B, V, 12)
    draws = draws.to(x.device)
    of_kind = {"global1": draws[:, :1], "global2": draws[:, 1:2], "local": draws[:, 2:]}

    views = []
    for kind, own_draws in of_kind.items():
        scale = LOCAL_SIZE if kind == "local" else GLOBAL_SIZE
        size = view_size(x.shape[2:], scale, patch_size)
        same_kind = views_of_kind(x, kind, size, own_draws)  # (B, V, C, H', W', S')
        views += normalize(same_kind).unbind(1)  # Normalize last (Algorithm 1)
    return views


# ---- loss ----------------------------------------------------------------------------------------
def coding_rate(z, eps=0.5):
    """R(Z) = 1/2 logdet(I + d / eps^2 Gamma) of z (m, d), Gamma = Z^T Z / m (Sec. 3.3).

    It is in nats a row: to code all of z, up to a squared error of eps^2 a row, takes m + d times
    as many (Ma et al. 2007).
    CHOICE: Gamma is the uncentred second moment, as in the SimDINO code; the paper has Cov. It is
    computed in float64 with autocast off: near collapse and with a small eps, fp32 depends on the
    order of summation and bf16 is NaN.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.double()
        m, d = z.shape
        # I + c Z^T Z and I + c Z Z^T have one determinant (Sylvester): the smaller will do.
        if m < d:
            gram = z @ z.T  # (m, m)
        else:
            gram = z.T @ z  # (d, d)
        eye = torch.eye(len(gram), dtype=z.dtype, device=z.device)

        # 1/2 logdet(A) = sum log diag(L) for A = L L^T. What is not finite has no such factor; the
        # rate is then NaN, and train.py skips the step.
        factor, info = torch.linalg.cholesky_ex(eye + d / (m * eps**2) * gram)
        rate = factor.diagonal().log().sum().float()
        return torch.where(info == 0, rate, torch.nan)


def rate_range(m, d, eps=0.5):
    """Coding rate of m unit vectors in d dimensions: collapsed to one, and spread as far as can be.

    The trace of d / (m eps^2) Z^T Z is d / eps^2 for any unit vectors. Collapsed, it is all in one
    eigenvalue. The rate is concave, so it is largest if r = min(m, d) eigenvalues share it equally.
    """
    trace = d / eps**2
    r = min(m, d)
    return 0.5 * math.log1p(trace), 0.5 * r * math.log1p(trace / r)


def gather_ranks(z):
    """(B, d) on each of R ranks -> (R B, d) on all, so that Z^T Z is that of all samples.

    CHOICE: rows are gathered instead of summing (d, d) matrices over ranks, so that coding_rate
    can take the smaller of Z^T Z and Z Z^T. A rank's gradient flows through its own rows alone.
    The whole gradient is the sum over ranks, which DDP divides by R; so here it is taken R times.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return z
    everyone = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(everyone, z.detach().contiguous())
    # Straight-through: this has the value of z and R times its gradient.
    everyone[dist.get_rank()] = z + (world - 1) * (z - z.detach())
    return torch.cat(everyone)  # (R B, d)


def effective_rank(z):
    """Collapse monitor of z (m, d): 1 if collapsed, up to min(m, d).

    The participation ratio (tr G)^2 / tr(G^2) of G = Z Z^T.
    """
    gram = z @ z.T  # (m, m)
    return gram.trace().square() / gram.square().sum()


def simdino_loss(student, teacher, eps=0.5, gamma=None):
    """Student (V, B, d), global views first, and teacher (2, B, d) -> scalar loss, its parts.

        L_SimDINO = mean(1/2 ||z_c - z_g||^2) - gamma R(Z)                              (Sec. 3.3)

    The mean is over all pairs of a teacher's view z_g and another view z_c of the student. R(Z) is
    the coding rate of the samples of all ranks, averaged over the two global views of the student.

    CHOICE: the rate is the student's alone, as the paper writes it, and of global views, as in the
    SimDINO code. That code's default is the rate of (student + teacher) / 2. There the student has
    the weight 1/2, so that the rate's gradient is half of ours where the two agree. Its --eps is
    this eps squared.
    DEVIATION: the paper has gamma = 1. But the alignment is at most 2, while the rate can be 206
    nats where m >= d = 256 (`rate_range`). So gamma defaults to (d + m) / (d m), the balance of the
    SimDINO code, with m the rows of Z on all ranks.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = student.float()
        teacher = teacher.float()
        V, B, d = student.shape

        distance = 0.5 * (student[None] - teacher[:, None]).square().sum(dim=-1)  # (2, V, B)
        different = ~torch.eye(2, V, dtype=torch.bool, device=student.device)  # (2, V)
        pairs = 2 * (V - 1)
        alignment = (distance * different[..., None]).sum() / (pairs * B)

        first = gather_ranks(student[0])  # (m, d)
        second = gather_ranks(student[1])  # (m, d)
        rate = (coding_rate(first, eps) + coding_rate(second, eps)) / 2
        m = len(first)
        if gamma is None:
            gamma = (d + m) / (d * m)

        low, high = rate_range(m, d, eps)
        parts = {"alignment": alignment.detach(), "coding_rate": rate.detach(),
                 "rate_collapsed": low, "rate_max": high, "gamma": gamma,
                 "effective_rank": effective_rank(first.detach())}
        return alignment - gamma * rate, parts


# ---- method --------------------------------------------------------------------------------------
def cosine(start, end, progress):
    """Half a cosine, from start at progress 0 to end at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class EncoderWithHead(nn.Module):
    """Encoder and head: views (B, C, H, W, S) -> unit vectors (B, d) in fp32."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        # CHOICE: the tiny vit_xs has a small head.
        hidden = HIDDEN if encoder.dim >= 192 else 4 * encoder.dim
        self.head = nn.Sequential(
            nn.Linear(encoder.dim, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, OUT))
        self.head.apply(init_weights)

    def forward(self, x):
        cls = self.encoder(x)[:, 0]  # (B, D)
        z = self.head(cls)  # (B, d)
        return nn.functional.normalize(z.float(), dim=-1)


class SimDINO(nn.Module):
    """Student and its moving average, the teacher. The teacher's encoder embeds, as in DINO.

    train.py calls `make_inputs`, `forward` and `after_step`, here and in MAE.
    """

    # AdamW as in the official implementation.
    BETAS = (0.9, 0.999)
    WEIGHT_DECAY = (0.04, 0.4)  # first and last step, cosine
    # CHOICE: the norm of all gradients together; the official code clips each tensor's at 3.
    CLIP_GRAD = 3.0

    def __init__(self, encoder, local_views=LOCAL_VIEWS_2D, gamma=None, momentum=MOMENTUM, eps=0.5):
        super().__init__()
        assert encoder.cls_token is not None, "SimDINO embeds the CLS token (Sec. 3.3)"
        self.config = {"local_views": local_views, "gamma": gamma, "momentum": momentum, "eps": eps}
        self.student = EncoderWithHead(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.encoder.drop_path = 0.0

    @property
    def encoder(self):
        """The teacher's: it is what checkpoints hold and what embeds."""
        return self.teacher.encoder

    def make_inputs(self, x, generator):
        """Samples (B, C, H, W, S) in [0, 1] and a CPU generator -> the arguments of `forward`."""
        views = make_views(x, self.encoder.patch_size, self.config["local_views"], generator)
        return (views,)

    def forward(self, views):
        """V views, each (B, C, H', W', S'), the two global ones first -> scalar loss, its parts."""
        B = len(views[0])
        both = torch.cat(views[:2])  # (2 B, C, H', W', S')
        with torch.no_grad():
            teacher = self.teacher(both).unflatten(0, (2, B))  # (2, B, d)
        student = self.student(both).unflatten(0, (2, B))  # (2, B, d)
        if len(views) > 2:
            local = self.student(torch.cat(views[2:])).unflatten(0, (-1, B))  # (V - 2, B, d)
            student = torch.cat([student, local])  # (V, B, d)
        return simdino_loss(student, teacher, self.config["eps"], self.config["gamma"])

    @torch.no_grad()
    def after_step(self, progress):
        """theta_t <- mu theta_t + (1 - mu) theta_s after the optimizer step, in fp32 (Sec. 3.3).

        progress: of the run, in [0, 1].
        """
        mu = cosine(self.config["momentum"], 1, progress)
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
            teacher.lerp_(student, 1 - mu)


def main():
    parser = argparse.ArgumentParser(description="Draw the SimDINO views of one file.")
    args = parse_picture_arguments(parser, "views.png")
    x, shown = read_sample_to_draw(args)  # (1, C, H, W, S)
    views = make_views(x, generator=torch.Generator().manual_seed(args.seed))

    # The sample comes first, then its views, each with its size.
    pictures = [x[0]]
    captions = ["the sample"]
    for number, view in enumerate(views, start=1):
        pictures.append(denormalize(view[0]))  # (C, H', W', S')
        size = " x ".join(map(str, view.shape[2:]))
        name = f"global {number}" if number <= 2 else f"local {number - 2}"
        captions.append(f"{name}: {size}")
    draw_samples(args.out, pictures, captions, shown)
    print(f"{args.out}: the sample, then {len(views)} views: global 1, global 2, "
          f"{len(views) - 2} local")


if __name__ == "__main__":
    cli(main)
