"""Coding rate in closed form, the loss on one rank and two, views on a coordinate ramp, the teacher."""
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import simdino
from model import ViT
from prepare import UserError
from simdino import (SimDINO, Uniforms, apply_matrices, blur_matrix, coding_rate, effective_rank, make_views,
                     rate_range, resample_matrix, simdino_loss, views_of_kind)


def unit_vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- coding rate ---------------------------------------------------------------------------------
def rate_oracle(z, eps):
    """1/2 logdet(I + d / (m eps^2) Z^T Z) in float64, by eigenvalues of the d x d side."""
    z = np.asarray(z, np.float64)
    m, d = z.shape
    return 0.5 * np.log1p(np.clip(np.linalg.eigvalsh(z.T @ z), 0, None) * d / (m * eps**2)).sum()


@pytest.mark.parametrize("m, d", [(32, 256), (512, 256), (256, 256), (1, 8), (8, 1)])
@pytest.mark.parametrize("eps", [0.5, 0.05])
def test_coding_rate_is_float64(m, d, eps):
    z = unit_vectors(m, d)
    assert coding_rate(z, eps).item() == pytest.approx(rate_oracle(z, eps), rel=1e-6)


def test_coding_rate_in_closed_form():
    m, d, eps = 8, 32, 0.5
    assert coding_rate(torch.zeros(m, d)) == 0
    collapsed = unit_vectors(1, d).expand(m, -1)
    assert coding_rate(collapsed, eps).item() == pytest.approx(0.5 * math.log(1 + d / eps**2), rel=1e-5)
    orthonormal = torch.eye(d)[:m]
    spread = 0.5 * m * math.log(1 + d / (m * eps**2))
    assert coding_rate(orthonormal, eps).item() == pytest.approx(spread, rel=1e-5)
    tight = torch.cat([torch.eye(4), -torch.eye(4)])  # m = 2 d, spread evenly
    assert coding_rate(tight, eps).item() == pytest.approx(0.5 * 4 * math.log(1 + 1 / eps**2), rel=1e-5)
    for z, place in ((collapsed, 0), (orthonormal, 1)):
        assert coding_rate(z, eps).item() == pytest.approx(rate_range(m, d, eps)[place], rel=1e-5)
    assert coding_rate(tight, eps).item() == pytest.approx(rate_range(8, 4, eps)[1], rel=1e-5)
    low, high = rate_range(m, d, eps)
    assert low < coding_rate(unit_vectors(m, d), eps).item() < high


def test_both_sylvester_sides_agree():
    z = unit_vectors(24, 24)
    wide, tall = F.pad(z, (0, 40)), torch.cat([z, torch.zeros(40, 24)])  # m < d, m > d
    d, m = 64, 64
    by_hand = lambda scale: 0.5 * torch.logdet(torch.eye(24) + scale * z.T @ z)
    torch.testing.assert_close(coding_rate(wide), by_hand(d / (24 * 0.25)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coding_rate(tall), by_hand(24 / (m * 0.25)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m, d", [(5, 9), (9, 5)])
def test_coding_rate_gradient_is_the_finite_difference(m, d):
    z = unit_vectors(m, d).requires_grad_()
    coding_rate(z).backward()
    numeric, h = np.zeros((m, d)), 1e-6
    base = z.detach().double().numpy()
    for i in np.ndindex(m, d):
        up, down = base.copy(), base.copy()
        up[i] += h
        down[i] -= h
        numeric[i] = (rate_oracle(up, 0.5) - rate_oracle(down, 0.5)) / (2 * h)
    np.testing.assert_allclose(z.grad, numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eps", [0.5, 0.05, 0.005])
def test_collapsed_bf16_features_stay_finite(eps):
    one = unit_vectors(1, 256)
    z = (one + 1e-3 * unit_vectors(64, 256, seed=1)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rate = coding_rate(z, eps)
    rate.backward()
    assert rate.dtype == torch.float32 and torch.isfinite(rate) and torch.isfinite(z.grad).all()
    assert rate.item() == pytest.approx(rate_oracle(z.detach().float(), eps), rel=1e-6)  # on any processor


def test_non_finite_features_give_nan_not_a_number():
    z = unit_vectors(4, 8)
    z[0, 0] = torch.inf
    assert torch.isnan(coding_rate(z))


def test_effective_rank():
    assert effective_rank(unit_vectors(1, 16).expand(8, -1)).item() == pytest.approx(1)
    assert effective_rank(torch.eye(16)[:8]).item() == pytest.approx(8)


# ---- loss ----------------------------------------------------------------------------------------
def loss_oracle(student, teacher, eps, gamma):
    """The equation of Sec. 3.3 by loops, float64."""
    V, B, d = student.shape
    student, teacher, total, pairs = student.double(), teacher.double(), 0.0, 0
    for g in range(2):
        for v in range(V):
            if v != g:
                total += sum(0.5 * ((student[v, b] - teacher[g, b]) ** 2).sum().item() for b in range(B)) / B
                pairs += 1
    rate = (rate_oracle(student[0], eps) + rate_oracle(student[1], eps)) / 2
    return total / pairs - ((d + B) / (d * B) if gamma is None else gamma) * rate


@pytest.mark.parametrize("V, eps, gamma", [(2, 0.5, None), (6, 0.5, None), (12, 0.05, 0.003)])
def test_loss_is_the_equation(V, eps, gamma):
    student, teacher = unit_vectors(V, 5, 16), unit_vectors(2, 5, 16, seed=1)
    loss, parts = simdino_loss(student, teacher, eps, gamma)
    assert loss.item() == pytest.approx(loss_oracle(student, teacher, eps, gamma), rel=1e-5)
    terms = parts["alignment"].item() - parts["gamma"] * parts["coding_rate"].item()
    assert loss.item() == pytest.approx(terms, rel=1e-5)


def test_loss_ignores_batch_order_and_prefers_aligned_and_spread():
    student, teacher = unit_vectors(4, 8, 16), unit_vectors(2, 8, 16, seed=1)
    loss, order = simdino_loss(student, teacher)[0], torch.randperm(8)
    torch.testing.assert_close(simdino_loss(student[:, order], teacher[:, order])[0], loss)
    aligned = teacher[:1].expand(4, -1, -1)
    assert simdino_loss(aligned, teacher[:1].expand(2, -1, -1))[1]["alignment"] == 0
    collapsed = unit_vectors(1, 16).expand(4, 8, 16)
    assert simdino_loss(aligned, aligned[:2])[0] < simdino_loss(collapsed, collapsed[:2])[0]


def loss_of_rank(rank, world, folder):
    """One step of a linear network on this rank's part of six samples; rank 0 writes what came out."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.Linear(10, 16)
    views, teacher = torch.randn(4, 6, 10), unit_vectors(2, 6, 16)
    part = slice(rank * 6 // world, (rank + 1) * 6 // world)
    loss, parts = simdino_loss(F.normalize(net(views[:, part]), dim=-1), teacher[:, part])
    loss.backward()
    numbers = [loss.detach(), parts["alignment"], parts["coding_rate"], parts["gamma"], parts["rate_max"]]
    results = torch.cat([torch.tensor(numbers), net.weight.grad.flatten()])
    if world > 1:
        dist.all_reduce(results)
        dist.destroy_process_group()
    if rank == 0:
        torch.save(results / world, f"{folder}/{world}.pt")


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path):
    loss_of_rank(0, 1, tmp_path)
    torch.multiprocessing.spawn(loss_of_rank, (2, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)
    assert one[5:].abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 64, 64, 8), (3, 32, 48, 16), (1, 48, 32, 1)])
def test_three_products_are_the_sum_over_all_three_axes(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, generator=generator)
    sizes = zip((24, 16, 4), shape[1:])
    h, w, s = (torch.rand(2, 3, n_out, n_in, generator=generator) for n_out, n_in in sizes)
    expected = torch.einsum("bchws,bvih,bvjw,bvks->bvcijk", x, h, w, s)
    torch.testing.assert_close(apply_matrices(x, h, w, s), expected, rtol=1e-4, atol=1e-4)
    expected = torch.einsum("bchws,bvih,bvjw->bvcijs", x, h, w)
    torch.testing.assert_close(apply_matrices(x, h, w), expected, rtol=1e-4, atol=1e-4)


# ---- views ---------------------------------------------------------------------------------------
LINES = [torch.linspace(0, 1, n) for n in (32, 48, 16)]
RAMP = torch.stack(torch.meshgrid(*LINES, indexing="ij"))  # (3, H, W, S)


# Numbers that leave the sample as it is.
UNCHANGED = {"area": 1.0, "aspect": 0.5, "top": 0.5, "left": 0.5, "front": 0.5, "flip_coin": 1.0,
             "blur_coin": 1.0, "sigma": 0.5, "shift_coin": 1.0, "shift": 0.5, "contrast_coin": 1.0,
             "power": 0.5}


def make_view(x, kind, size, **chosen):
    """One view of each sample, by random numbers that change nothing, but for the chosen ones."""
    u = torch.tensor(list(Uniforms(**UNCHANGED | chosen)))  # (12,)
    return views_of_kind(x, kind, size, u.expand(len(x), 1, 12))[:, 0]


@pytest.mark.parametrize("kind", ["global1", "global2"])
def test_identity_crop_returns_the_input(kind):
    x = torch.rand(2, 1, 32, 48, 16)
    assert torch.equal(make_view(x, kind, (32, 48, 16)), x)


def test_axes_are_not_swapped():
    """On a ramp along one axis, a crop changes that axis only, by the crop's start and length."""
    volumes = RAMP[:, None]  # three volumes (B = 3, 1, H, W, S), a ramp along H, W and S each
    area = (0.5 - 0.4) / 0.6  # of GLOBAL_AREA: half the plane, sides of sqrt(0.5)
    view = make_view(volumes, "global1", (32, 48, 16), area=area, top=0.0, left=1.0, front=0.5)
    side = 0.5**0.5
    for axis, (n, start) in enumerate([(32, 0.0), (48, 1 - side), (16, (1 - side) / 2)]):
        centres = (start + side * (torch.arange(n) + 0.5) / n) * n - 0.5  # in input cells
        expected = (centres / (n - 1)).clamp(0, 1)
        line = view[axis, 0].movedim(axis, 0).flatten(1)  # (n, all the rest): constant but for this axis
        torch.testing.assert_close(line, expected[:, None].expand_as(line), rtol=0, atol=1e-5)


def test_flip_mirrors_width_only():
    x = torch.rand(1, 1, 32, 48, 8)
    size = (32, 48, 8)
    assert torch.equal(make_view(x, "global2", size, flip_coin=0.0), x.flip(3))
    assert torch.equal(make_view(x, "local", size, flip_coin=0.0), make_view(x, "local", size))


def test_intensities_of_each_kind_of_view():
    x, size = torch.rand(1, 1, 16, 16, 1), (16, 16, 1)
    brighter = make_view(x, "global1", size, shift_coin=0.0, shift=1.0)
    torch.testing.assert_close(brighter, (x + 0.1).clamp(max=1))
    torch.testing.assert_close(make_view(x, "global2", size, shift_coin=0.0, shift=1.0), brighter)
    assert torch.equal(make_view(x, "local", size, shift_coin=0.0, shift=1.0), make_view(x, "local", size))
    torch.testing.assert_close(make_view(x, "global2", size, contrast_coin=0.0, power=0.0), x**0.7)
    # Contrast is of global 2 alone.
    assert torch.equal(make_view(x, "global1", size, contrast_coin=0.0, power=0.0), x)
    assert torch.equal(make_view(x, "global2", size, blur_coin=0.0, sigma=1.0), x)  # and blur global 1's


@pytest.mark.parametrize("shape", [(3, 1, 64, 32, 1), (3, 3, 64, 32, 4), (3, 1, 64, 32, 8)])
def test_views_made_together_are_those_made_one_by_one(shape):
    generator = torch.Generator().manual_seed(0)
    x, u = torch.rand(shape, generator=generator), torch.rand(3, 5, 12, generator=generator)
    for kind in ("global1", "global2", "local"):
        together = views_of_kind(x, kind, (32, 16, shape[-1]), u)  # (B, V, C, H', W', S')
        for v in range(5):
            alone = views_of_kind(x, kind, (32, 16, shape[-1]), u[:, v:v + 1])[:, 0]
            torch.testing.assert_close(together[:, v], alone, rtol=1e-6, atol=1e-6)


def test_blur_is_a_gaussian_and_keeps_constants():
    x = torch.zeros(1, 1, 33, 33, 1)
    x[0, 0, 16, 16] = 1
    blurred = make_view(x, "global1", (33, 33, 1), blur_coin=0.0, sigma=1.0)[0, 0, :, :, 0]  # sigma 2
    distance = torch.arange(33) - 16
    g = torch.exp(-0.5 * (distance / 2) ** 2) * (distance.abs() <= 8)  # to 4 sigma
    torch.testing.assert_close(blurred, torch.outer(g, g) / g.sum() ** 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(blur_matrix(torch.tensor([1.7]), 9).sum(-1), torch.ones(1, 9))
    assert torch.equal(blur_matrix(torch.tensor([0.0]), 9)[0], torch.eye(9))
    matrix = blur_matrix(torch.tensor([0.3, 2.0]), 256)
    assert (matrix[matrix > 0] > 1e-5).all()  # cut at 4 sigma: no subnormal numbers, which multiply slowly


def test_resampling_agrees_with_torch_interpolate():
    """Whole axis to another size: growing is bilinear, shrinking antialiased, as torch's own resize."""
    x = torch.rand(1, 1, 1, 60)
    for n in (96, 23):
        ours = x @ resample_matrix(torch.zeros(1), torch.full((1,), 60.0), 60, n)[0].T
        theirs = F.interpolate(x, size=(1, n), mode="bilinear", antialias=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape, globals_, locals_, n", [
    ((2, 1, 256, 256, 1), (1, 224, 224, 1), (1, 96, 96, 1), 10),  # the sizes of Sec. 3.3 and Appendix B
    ((1, 3, 256, 256, 16), (3, 224, 224, 16), (3, 96, 96, 16), 4),
    ((1, 1, 256, 256, 64), (1, 224, 224, 56), (1, 96, 96, 24), 4),
    ((2, 3, 128, 64, 1), (3, 112, 64, 1), (3, 48, 32, 1), 10)])
def test_sizes_and_numbers_of_views(shape, globals_, locals_, n):
    views = make_views(torch.rand(shape), generator=torch.Generator().manual_seed(0))
    assert [tuple(v.shape[1:]) for v in views] == [globals_] * 2 + [locals_] * n
    assert all(-1 <= v.min() and v.max() <= 1 for v in views)


def test_video_keeps_its_frames_and_crops_all_alike():
    frame = torch.rand(1, 3, 64, 64, 1)
    video = frame * torch.linspace(0.5, 1, 16)  # the same picture, brighter with time
    for view in make_views(video, generator=torch.Generator().manual_seed(0))[2:]:  # local views: crops only
        ratio = (view + 1) / (view[..., -1:] + 1)
        torch.testing.assert_close(ratio, torch.linspace(0.5, 1, 16).expand_as(ratio), rtol=1e-3, atol=1e-3)


def test_views_do_not_depend_on_batch_mates_and_are_reproducible():
    x = torch.rand(3, 1, 32, 32, 1)
    views = make_views(x, generator=torch.Generator().manual_seed(5))
    other_mates = torch.cat([x[:1], torch.rand(1, 1, 32, 32, 1)])
    again = make_views(other_mates, generator=torch.Generator().manual_seed(5))
    for a, b in zip(views, again):
        assert torch.equal(a[0], b[0])  # other mates, another batch size
        assert not torch.equal(a[0], a[1])
    other = make_views(x, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(views[2], other[2])


def test_crop_areas_stay_in_their_range():
    x = RAMP[:1, None, :, :32, :1]  # a ramp along H on a square image
    spans = {"global": [], "local": []}
    for seed in range(40):
        views = make_views(x * 0.999, generator=torch.Generator().manual_seed(seed))
        spans["global"].append(views[1]), spans["local"].append(views[2])
    sides = [((v[..., -1, 0, 0] - v[..., 0, 0, 0])[0, 0] / 2).item() for v in spans["local"]]
    assert 0.1 < min(sides) < 0.35 and 0.45 < max(sides) < 0.75  # sqrt(.05 * 3/4) = .19, sqrt(.4 * 4/3) = .73


# ---- method --------------------------------------------------------------------------------------
def test_teacher_follows_the_student_and_only_then():
    torch.manual_seed(0)
    method = SimDINO(ViT("vit_t", cls_token=True, drop_path=0.1))
    assert method.encoder.drop_path == 0 and method.student.encoder.drop_path == 0.1
    before = [p.clone() for p in method.teacher.parameters()]
    loss, _ = method(*method.make_inputs(torch.rand(2, 1, 32, 32, 1), torch.Generator().manual_seed(0)))
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.student.parameters())
    with torch.no_grad():
        for p in method.student.parameters():
            p += 1
    method.after_step(0.0)
    for old, new in zip(before, method.teacher.parameters()):
        torch.testing.assert_close(new, old + 0.004, rtol=0, atol=1e-5)
    assert not any(key.startswith("encoder") for key in method.state_dict())  # saved once, as the teacher's


@pytest.mark.parametrize("m", [4, 64])
def test_a_little_variance_earns_the_same_rate_in_any_batch(m):
    """For short vectors R is d / (2 eps^2) times the mean squared length; gamma grows as m shrinks."""
    z = 0.01 * unit_vectors(m, 16)
    assert coding_rate(z, 0.5).item() == pytest.approx(16 / (2 * 0.5**2) * 0.01**2, rel=1e-2)


@pytest.mark.parametrize("momentum", [0.996, 0.9])
def test_teacher_momentum_goes_to_one_by_half_a_cosine(momentum):
    """A student at 1 pulls a teacher at 0 to 1 - mu: the first step, the middle and the end of a run."""
    method = SimDINO(ViT("vit_xs", cls_token=True), momentum=momentum)
    for progress, mu in ((0, momentum), (0.5, (1 + momentum) / 2), (1, 1.0)):
        for branch, value in ((method.teacher, 0.0), (method.student, 1.0)):
            for p in branch.parameters():
                nn.init.constant_(p, value)
        method.after_step(progress)
        for p in method.teacher.parameters():
            assert p.flatten()[0].item() == pytest.approx(1 - mu, abs=1e-6)


def test_forward_is_the_loss_of_its_branches():
    torch.manual_seed(0)
    method = SimDINO(ViT("vit_t", cls_token=True)).eval()
    views = method.make_inputs(torch.rand(3, 1, 32, 32, 1), torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        loss, _ = method(views)
        student = torch.stack([method.student(view) for view in views])
        teacher = torch.stack([method.teacher(view) for view in views[:2]])
    assert student.norm(dim=-1).allclose(torch.ones(len(views), 3))
    assert loss.item() == pytest.approx(loss_oracle(student, teacher, 0.5, None), rel=1e-4)


def test_picture_from_the_command_line(tmp_path, monkeypatch, capsys):
    Image.effect_noise((60, 80), 40).save(tmp_path / "x.png")
    run = ["simdino.py", tmp_path / "x.png", "--out", tmp_path / "v.png", "--size", "128",
           "--modality", "ultrasound"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in run])
    simdino.main()
    tile = 192 + 12 + 4, 192 + 6 + 36 + 4
    size = Image.open(tmp_path / "v.png").size
    assert size == (4 * tile[0] - 4, 4 * tile[1] - 4)  # the sample and 12 views: 4, 4, 4 and 1
    assert "10 local" in capsys.readouterr().out


def test_picture_of_a_file_that_is_not_there_or_of_a_wrong_size(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["simdino.py", str(tmp_path / "none.png")])
    with pytest.raises(UserError, match="none.png"):
        simdino.main()
    monkeypatch.setattr(sys, "argv", ["simdino.py", str(tmp_path / "x.png"), "--size", "-1"])
    with pytest.raises(SystemExit, match="2"):
        simdino.main()


def test_picture_of_a_volume_shows_at_most_eight_of_its_slices(tmp_path, monkeypatch):
    args = Namespace(out=tmp_path / "v.png", seed=0)
    sample = torch.rand(1, 1, 64, 64, 32), (0.0, 1.0)
    monkeypatch.setattr(simdino, "parse_picture_arguments", lambda *_: args)
    monkeypatch.setattr(simdino, "read_sample_to_draw", lambda _: sample)
    simdino.main()
    tile = 192 + 12 + 4, 192 + 6 + 36 + 4
    size = Image.open(tmp_path / "v.png").size
    assert size == (8 * tile[0] - 4, 7 * tile[1] - 4)  # the sample, 2 global and 4 local views
