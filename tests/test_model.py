"""Tokens, positions, the transformer and its files, against loops, closed forms and an independent 2D ViT."""
import contextlib
import math
import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from mae import MAE
from model import (ViT, expand, inflate_kernel, init_from_2d, load_encoder, patchify, pool, read_checkpoint,
                   save_checkpoint, save_montage, sincos_positions, stack, take_frames_at_random,
                   take_frames_evenly, unit, unpatchify, weights_sha256)
from prepare import UserError
from simdino import SimDINO

PATCHES = [(8, 8, 4), (16, 16, 4), (32, 32, 4)]  # Sec. 4.4
SHAPES = [(2, 1, 64, 96, 1), (2, 3, 64, 32, 16), (2, 1, 32, 64, 8)]  # image, video, volume, none square


@pytest.mark.parametrize("patch", PATCHES)
def test_patchify_is_the_loop_it_stands_for(patch):
    ph, pw, ps = patch
    x = torch.arange(3 * 64 * 96 * 8.0).view(1, 3, 64, 96, 8)
    patches, n = patchify(x, patch), 0
    for i in range(64 // ph):
        for j in range(96 // pw):
            for k in range(8 // ps):
                rows, columns = slice(i * ph, (i + 1) * ph), slice(j * pw, (j + 1) * pw)
                block = x[0, :, rows, columns, k * ps:(k + 1) * ps]  # (3, ph, pw, ps)
                values = [block[c, a, b, s] for a in range(ph) for b in range(pw) for s in range(ps)
                          for c in range(3)]
                assert patches[0, n].tolist() == [value.item() for value in values]
                n += 1
    assert patches.shape == (1, n, ph * pw * ps * 3)
    assert torch.equal(unpatchify(patches, patch, (64 // ph, 96 // pw, 2)), x)
    assert torch.equal(patchify(x, (3, *patch)), patches)  # the paper's way to write a patch


def test_patchify_refuses_what_is_not_whole_patches():
    with pytest.raises(AssertionError, match="60"):
        patchify(torch.zeros(1, 3, 60, 64, 4))


def test_expand_is_a_view():
    x = torch.rand(2, 1, 16, 16, 1)
    y = expand(x)
    assert y.shape == (2, 3, 16, 16, 4) and y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x.repeat(1, 3, 1, 1, 4))


@pytest.mark.parametrize("dim", [192, 384, 768, 512, 100])
def test_positions_are_the_formula(dim):
    grid, k = (3, 5, 2), dim // 6
    table, n = sincos_positions(grid, dim).double().numpy(), 0
    for cell in np.ndindex(grid):
        row = []
        for i, size in zip(cell, grid):
            angles = [(i + 0.5) * 16 / size / 10000 ** (f / k) for f in range(k)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(table[n], row + [0] * (dim - 6 * k), atol=2e-6)
        n += 1
    assert len(table) == n


def test_positions_know_where_things_are():
    image, volume = sincos_positions((4, 4, 1), 192), sincos_positions((4, 4, 2), 192)
    assert len(torch.unique(image, dim=0)) == 16
    # an image lies between the two halves of a volume that has the same plane: the middle of the slice axis
    angles = 8 / 10000 ** (torch.arange(32) / 32)
    middle = torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(image[0, 128:], middle)
    assert torch.equal(volume.view(4, 4, 2, 192)[..., :128][:, :, 0], image.view(4, 4, 192)[..., :128])


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_path_for_image_video_volume(patch, shape):
    vit = ViT("vit_t", patch, cls_token=True).eval()
    x = torch.rand(shape)
    tokens = vit(x)
    assert tokens.shape == (2, 1 + math.prod(vit.grid(shape[2:])), 192)
    repeats = (1, 3 // shape[1], 1, 1, 4 if shape[-1] == 1 else 1)
    torch.testing.assert_close(vit(x.repeat(repeats)), tokens)  # what expand() saves copying


def tokens_of_replicated(vit, x):
    """Tokens by the whole kernel, from all 3 channels and all slices."""
    patches = patchify(expand(x, vit.patch_size[-1]), vit.patch_size)  # (B, N, P)
    return vit.patch_embed.proj(patches) + sincos_positions(vit.grid(x.shape[2:]), vit.dim)  # (B, N, D)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 64, 32, 1)])
def test_tokens_and_gradients_are_those_of_the_replicated_sample(patch, shape):
    torch.manual_seed(0)
    vit, x = ViT("vit_xs", patch), torch.randn(shape)
    weights = torch.randn(96) / 96  # of a scalar loss
    found = []
    for tokens in (vit.tokens, lambda x: tokens_of_replicated(vit, x)):
        vit.zero_grad()
        given = x.clone().requires_grad_()
        out = tokens(given)
        (out @ weights).sum().backward()
        found.append([out, given.grad, vit.patch_embed.proj.weight.grad, vit.patch_embed.proj.bias.grad])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_equal_pixels_are_multiplied_once():
    """Beside 3 channels and 4 slices, an image takes a twelfth of the products and a volume a third."""
    def products(*shape):
        with FlopCounterMode(display=False) as counter:
            ViT("vit_xs").tokens(torch.rand(shape))
        return counter.get_total_flops()

    video = products(1, 3, 64, 64, 4)
    assert video == 12 * products(1, 1, 64, 64, 1) == 3 * products(1, 1, 64, 64, 4) > 0


@pytest.mark.parametrize("arch, dim, depth, heads, millions", [
    ("vit_t", 192, 12, 3, 5.9), ("vit_s", 384, 12, 6, 22.5), ("vit_b", 768, 12, 12, 87.4)])
def test_architectures(arch, dim, depth, heads, millions):
    with torch.device("meta"):
        vit = ViT(arch)
    assert (vit.dim, len(vit.blocks), vit.blocks[0].attn.heads) == (dim, depth, heads)
    patch_embed = 3072 * dim + dim  # four times as large as in 2D
    by_hand = patch_embed + depth * (12 * dim**2 + 13 * dim) + 2 * dim
    assert sum(p.numel() for p in vit.parameters()) == by_hand
    assert abs(by_hand / 1e6 - millions) < 0.1


class Plain2DViT(nn.Module):
    """An independent 2D ViT made of torch's own parts, with timm's parameter names in its state dict."""

    def __init__(self, dim=192, depth=12, heads=3, patch=16):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, patch, patch)
        layer = (dim, heads, 4 * dim, 0.0, "gelu", 1e-6, True, True)  # the last: normalise first
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(*layer) for _ in range(depth))
        self.cls, self.norm = nn.Parameter(torch.randn(1, 1, dim)), nn.LayerNorm(dim, 1e-6)
        self.table = torch.randn(1, 197, dim)

    def forward(self, image, positions):
        tokens = self.conv(image).flatten(2).transpose(1, 2) + positions  # (B, N, D)
        cls = self.cls + self.table[:, :1]  # timm and DINO: the first position belongs to the CLS token
        tokens = torch.cat([cls.expand(len(image), -1, -1), tokens], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)

    def timm_state(self):
        names = {"self_attn.in_proj_weight": "attn.qkv.weight", "self_attn.in_proj_bias": "attn.qkv.bias",
                 "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2."}
        state = {"cls_token": self.cls, "pos_embed": self.table, "head.weight": torch.randn(10, 192)}
        for key, value in self.state_dict().items():
            key = key.replace("conv.", "patch_embed.proj.").replace("layers.", "blocks.")
            for old, new in names.items():
                key = key.replace(old, new)
            state[key] = value
        state.pop("cls")
        return {k: v.detach().clone() for k, v in state.items()}


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def nested(state, *keys, prefix=""):
    """A file of weights, each with a prefix, under keys within keys."""
    state = {prefix + name: value for name, value in state.items()}
    for key in reversed(keys):
        state = {key: state}
    return state


@pytest.mark.parametrize("keys, prefix", [
    ((), ""), (("model",), ""), (("teacher",), "module.backbone."), (("teacher",), "backbone."),
    (("teacher",), "module._orig_mod.backbone."), (("state_dict",), "module.base_encoder."),
    ((), "_orig_mod."), ((), "model."), (("state_dict",), "_orig_mod.module.model.backbone.")])
def test_inflated_2d_network_gives_its_tokens_wherever_its_file_keeps_them(tmp_path, keys, prefix):
    torch.manual_seed(0)
    plain = Plain2DViT().eval()
    torch.save(nested(plain.timm_state(), *keys, prefix=prefix), tmp_path / "plain.pth")
    vit = ViT("vit_t", cls_token=True).eval()
    init_from_2d(vit, tmp_path / "plain.pth")
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = plain(image, sincos_positions((4, 3, 1), 192))
        torch.testing.assert_close(vit(image[..., None]), expected, rtol=1e-4, atol=1e-4)


def test_init_says_what_a_file_holds_that_is_no_vit(tmp_path):
    resnet = {"module.conv1.weight": torch.ones(1), "module.fc.bias": torch.ones(1)}
    torch.save(resnet, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="resnet.pth: no patch_embed.proj.weight; .* conv1.weight, fc.bias"):
        init_from_2d(ViT("vit_t"), tmp_path / "resnet.pth")


def test_init_keeps_a_cls_token_that_has_no_position(tmp_path):
    """timm's no_embed_class: 196 positions of 14 x 14 patches, none for the CLS token."""
    state = Plain2DViT().timm_state()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "plain.pth")
    vit = ViT("vit_t", cls_token=True)
    init_from_2d(vit, tmp_path / "plain.pth")
    assert torch.equal(vit.cls_token, state["cls_token"])


@pytest.mark.parametrize("numpy_module", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and 1
def test_init_reads_training_checkpoints_with_their_flags_and_rates(tmp_path, numpy_module):
    """MAE, DINO and SimDINO save argparse's flags, DINO and SimDINO rates that are NumPy numbers."""
    plain = Plain2DViT().timm_state()
    group = {"lr": np.float64(1e-3), "weight_decay": np.linspace(0.04, 0.4, 3)[1], "step": np.int64(7)}
    file = {"teacher": {f"backbone.{name}": value for name, value in plain.items()},
            "optimizer": {"state": {}, "param_groups": [group]}, "epoch": 3,
            "args": Namespace(arch="vit_tiny", lr=5e-4, local_crops_scale=(0.05, 0.4)),
            "dino_loss": {"center": torch.zeros(1, 8)}}
    file["teacher"] |= {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    torch.save(file, tmp_path / "dino.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "dino.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    data = data.replace(b"numpy._core.multiarray", numpy_module + b".multiarray")
    (tmp_path / "dino.pth").write_bytes(data)
    vit = ViT("vit_t", cls_token=True)
    init_from_2d(vit, tmp_path / "dino.pth")
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, plain["blocks.3.mlp.fc1.weight"])


def test_init_runs_no_code_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Plain2DViT().timm_state() | {"args": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="harmful.pth"):
        init_from_2d(ViT("vit_t"), tmp_path / "harmful.pth")
    assert not (tmp_path / "harm").exists()


def test_init_folds_layer_scale_exactly(tmp_path):
    """DINOv2's blocks are ours with a factor (D,) on each branch."""
    torch.manual_seed(0)
    vit = ViT("vit_xs", cls_token=True).double()
    state = vit.state_dict()
    for name, value in state.items():
        state[name] = value + 0.1 * torch.randn_like(value)  # biases too
    vit.load_state_dict(state)
    scales = torch.randn(3, 2, 96, dtype=torch.float64)
    for number, (first, second) in enumerate(scales):
        state |= {f"blocks.{number}.ls1.gamma": first, f"blocks.{number}.ls2.gamma": second}
    torch.save(state, tmp_path / "dinov2.pth")

    tokens = torch.randn(2, 5, 96, dtype=torch.float64)
    expected = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], dim=1)
    for block, scale in zip(vit.blocks, scales):
        expected = block(expected, scale)
    folded = ViT("vit_xs", cls_token=True).double()
    init_from_2d(folded, tmp_path / "dinov2.pth")
    torch.testing.assert_close(folded.encode(tokens), vit.norm(expected), rtol=1e-12, atol=1e-12)


def test_a_resized_kernel_sees_the_same_picture_drawn_larger():
    """A smooth kernel of 14 pixels on a smooth picture, and resized to 16 on the picture drawn at 16."""
    def picture(n):  # (3, n, n)
        rows, columns = torch.meshgrid(*[(torch.arange(n) + 0.5) / n] * 2, indexing="ij")
        return torch.stack([rows, columns**2, torch.cos(3 * rows * columns)])

    kernel = torch.cos(4 * picture(14)).expand(2, -1, -1, -1) / 14**2  # (D, 3, 14, 14)
    token = (kernel[0] * picture(14)).sum()
    for size in (16, 8, 32):
        weights = inflate_kernel(kernel, (size, size, 4))  # (D, P)
        image = picture(size)[None, ..., None]  # (1, 3, H, W, 1)
        larger = weights @ patchify(expand(image), (size, size, 4))[0, 0]  # (D,)
        torch.testing.assert_close(larger, token.expand(2), rtol=0.02, atol=0)


def test_a_kernel_of_14_pixels_fits_after_resizing(tmp_path):
    state = Plain2DViT(patch=14).timm_state()
    torch.save(state, tmp_path / "dinov2.pth")
    vit = ViT("vit_t", cls_token=True)
    init_from_2d(vit, tmp_path / "dinov2.pth")
    expected = inflate_kernel(state["patch_embed.proj.weight"], (16, 16, 4))
    assert torch.equal(vit.patch_embed.proj.weight, expected)
    even = torch.full((1, 3, 14, 14), 0.5)
    assert inflate_kernel(even, (16, 16, 4)).sum().item() == pytest.approx(even.sum().item())


def test_init_takes_our_own_mae_for_simdino(tmp_path):
    mae, simdino = ViT("vit_t"), ViT("vit_t", cls_token=True)
    save_checkpoint(tmp_path / "mae.pt", mae)
    init_from_2d(simdino, tmp_path / "mae.pt")
    assert torch.equal(simdino.blocks[3].mlp.fc1.weight, mae.blocks[3].mlp.fc1.weight)


def test_init_refuses_another_width(tmp_path):
    save_checkpoint(tmp_path / "mae.pt", ViT("vit_t"))
    with pytest.raises(UserError, match="mae.pt does not fit.*--arch"):
        init_from_2d(ViT("vit_s"), tmp_path / "mae.pt")


@pytest.mark.parametrize("extra", [
    "blocks.0.gamma_1", "norm_pre.weight", "reg_token", "register_tokens", "rope_embed.periods",
    "blocks.0.mlp.w12.weight", "blocks.12.norm1.weight"])  # DeiT III, CLIP, DINOv2 and 3, a deeper network
def test_init_names_what_it_does_not_know(tmp_path, extra):
    torch.save({**ViT("vit_t").state_dict(), extra: torch.ones(192)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth does not fit.* has no {extra}"):
        init_from_2d(ViT("vit_t", cls_token=True), tmp_path / "other.pth")


def test_init_leaves_heads_out_and_knows_timms_last_norm(tmp_path):
    plain = ViT("vit_t").state_dict()
    plain |= {"decoder_blocks.0.norm1.weight": torch.ones(512), "mask_token": torch.ones(1, 1, 512)}
    plain["fc_norm.weight"], plain["fc_norm.bias"] = plain.pop("norm.weight") + 1, plain.pop("norm.bias")
    # timm's older files are of the older format.
    torch.save(plain, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    simdino = ViT("vit_t", cls_token=True)
    init_from_2d(simdino, tmp_path / "legacy.pth")
    assert torch.equal(simdino.norm.weight, torch.full((192,), 2.0))


def test_init_tells_which_samples_a_network_of_ours_has_seen(tmp_path):
    ids = torch.tensor([3, -5])
    save_checkpoint(tmp_path / "ours.pt", ViT("vit_xs"), ids=ids)
    save_checkpoint(tmp_path / "known.pt", ViT("vit_xs"), ids=ids, ids_known=True)
    save_checkpoint(tmp_path / "unknown.pt", ViT("vit_xs"), ids=ids, ids_known=False)  # began from another
    torch.save(ViT("vit_xs").state_dict(), tmp_path / "foreign.pth")
    assert torch.equal(init_from_2d(ViT("vit_xs"), tmp_path / "ours.pt"), ids)
    assert torch.equal(init_from_2d(ViT("vit_xs"), tmp_path / "known.pt"), ids)
    assert init_from_2d(ViT("vit_xs"), tmp_path / "unknown.pt") is None
    assert init_from_2d(ViT("vit_xs"), tmp_path / "foreign.pth") is None


def test_the_hash_of_an_encoder_is_of_its_weights_and_config(tmp_path):
    vit = ViT("vit_xs")
    before = weights_sha256(vit)
    save_checkpoint(tmp_path / "a.pt", vit, step=1)
    save_checkpoint(tmp_path / "b.pt", vit, step=2)  # another file of the same encoder
    for name in ("a.pt", "b.pt"):
        assert weights_sha256(load_encoder(tmp_path / name)) == before
    assert read_checkpoint(tmp_path / "a.pt")["sha256"] != read_checkpoint(tmp_path / "b.pt")["sha256"]
    assert len(before) == 64 and weights_sha256(ViT("vit_xs")) != before
    with torch.no_grad():
        vit.norm.bias[5] = 1e-7
    assert weights_sha256(vit) != before
    same_weights = ViT("vit_xs", (16, 8, 8))
    same_weights.load_state_dict(vit.state_dict())
    assert weights_sha256(same_weights) != weights_sha256(vit)
    assert weights_sha256(vit.bfloat16()) != before


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")])
def test_a_picture_is_written_as_its_name_says(tmp_path, name, kind):
    save_montage(tmp_path / name, [[torch.rand(3, 16, 16), torch.rand(3, 8, 24)], [torch.rand(3, 20, 10)]])
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and image.size == (24 + 4 + 24, 16 + 4 + 20)


@pytest.mark.parametrize("name", ["a.csv", "a.tiff", "a"])
def test_other_kinds_of_pictures_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: .*\.png"):
        save_montage(tmp_path / name, [[torch.rand(3, 8, 8)]])
    assert not list(tmp_path.iterdir())


def test_pool_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]])
    assert pool(tokens, "cls").tolist() == [[1, 2]]
    assert pool(tokens, "avg").tolist() == [[4, 6]]
    assert pool(tokens, "mix").tolist() == [[1, 2, 4, 6]]
    assert pool(tokens, "avg", cls_token=False).tolist() == [[3, pytest.approx(14 / 3)]]
    assert pool(tokens.bfloat16(), "mix").dtype == torch.float32
    for how, cls in (("mix", False), ("max", True)):
        with pytest.raises(UserError):
            pool(tokens, how, cls)


def test_grid_pooling_is_mix_and_the_means_of_cells_by_hand():
    """An 8 x 8 x 2 grid of tokens: each cell of the 4 x 4 has 2 x 2 tokens of a plane, in 2 slices."""
    tokens = torch.rand(2, 1 + 8 * 8 * 2, 3)  # (B, 1+N, D)
    found = pool(tokens, "grid", grid=(8, 8, 2))
    assert found.shape == (2, 18 * 3) and torch.equal(found[:, :6], pool(tokens, "mix"))
    cells = found[:, 6:].unflatten(1, (3, 4, 4))  # (B, D, 4, 4)
    patches = tokens[:, 1:].unflatten(1, (8, 8, 2))  # (B, h, w, s, D)
    for i in range(4):
        for j in range(4):
            members = patches[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2]  # (B, 2, 2, s, D)
            torch.testing.assert_close(cells[:, :, i, j], members.flatten(1, 3).mean(dim=1))


def test_grid_pooling_without_a_cls_token_begins_with_avg():
    tokens = torch.rand(2, 16, 3)
    found = pool(tokens, "grid", cls_token=False, grid=(4, 4, 1))
    assert found.shape == (2, 17 * 3) and torch.equal(found[:, :3], pool(tokens, "avg", cls_token=False))
    assert torch.equal(found[:, 3:], tokens.transpose(1, 2).flatten(1))  # a token is a cell


def test_take_frames():
    video = torch.arange(40.0).expand(2, 3, 4, 4, 40)
    even = take_frames_evenly(video)
    assert even.shape == (2, 3, 4, 4, 16) and even[0, 0, 0, 0, 0] == 0 and even[0, 0, 0, 0, -1] == 39
    drawn = take_frames_at_random(video, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=-1) >= 0).all()  # in time order
    assert not torch.equal(drawn[0], drawn[1])  # each video its own
    volume = torch.rand(2, 1, 4, 4, 40)
    assert take_frames_evenly(volume) is volume


def test_stack_mixes_types_without_changing_values():
    deep = torch.full((1, 2, 2, 1), 0.5, dtype=torch.float16)
    shallow = torch.full((1, 2, 2, 1), 51, dtype=torch.uint8)
    assert stack([shallow, shallow]).dtype == torch.uint8
    torch.testing.assert_close(unit(stack([deep, shallow])).flatten(1)[:, 0], torch.tensor([0.5, 0.2]))


def test_sizes_that_are_no_whole_patches_are_named():
    with pytest.raises(UserError, match="100x96x1"):
        ViT("vit_t")(torch.rand(1, 1, 100, 96, 1))


def test_unit_of_both_cached_types():
    assert unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    assert unit(torch.tensor([0.5], dtype=torch.float16)).dtype == torch.float32


def test_both_methods_start_from_xavier_uniform():
    """Every weight matrix fills [-a, a] evenly, a = sqrt(6 / (inputs + outputs)), the heads' too."""
    mae = MAE(ViT("vit_xs"), decoder_dim=96, decoder_heads=3)
    simdino = SimDINO(ViT("vit_xs", cls_token=True))
    for method in (mae, simdino.student):
        linear = [module for module in method.modules() if isinstance(module, nn.Linear)]
        assert len(linear) > 12
        for module in linear:
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.98 * bound < module.weight.abs().max() <= bound and not module.bias.any()
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    scales = []

    def block(tokens, scale):
        scales.append(scale)
        return tokens

    model.run_blocks([block] * 12, torch.zeros(2000, 1, 8), 0.5)
    scales = torch.stack(scales)  # (depth, 2, B, 1, 1)
    assert (scales[0] == 1).all() and set(scales[-1].flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(scales.mean(dim=(1, 2)).flatten(), torch.ones(12), rtol=0, atol=0.05)
    kept = (scales > 0).float().mean(dim=(1, 2)).flatten()
    torch.testing.assert_close(kept, 1 - torch.linspace(0, 0.5, 12), rtol=0, atol=0.05)  # deeper, seldomer


def test_a_skipped_branch_adds_nothing():
    block, x = model.Block(8, 1), torch.rand(2, 3, 8)
    out = block(x, torch.tensor([[1.0, 0], [1, 0]]).view(2, 2, 1, 1))  # the second sample skips both branches
    assert torch.equal(out[1], x[1]) and torch.equal(out[0], block(x)[0]) and not torch.equal(out[0], x[0])


def test_stochastic_depth_is_of_training_only():
    vit, image = ViT("vit_t", drop_path=0.5), torch.rand(1, 1, 32, 32, 1)
    assert not torch.equal(vit(image), vit(image)) and torch.equal(vit.eval()(image), vit(image))


# ---- a step of both methods ------------------------------------------------------------------------------
STEPS = [(2, 1, 32, 32, 1), (2, 3, 32, 32, 8), (2, 1, 32, 32, 16)]  # image, video, volume


def make_method(ssl, device="cpu"):
    """A small MAE or SimDINO in training mode, as train.py makes it."""
    with torch.device(device):
        encoder = ViT("vit_xs", (8, 8, 4), cls_token=ssl == "simdino", drop_path=0.1)
        method = SimDINO(encoder, local_views=2) if ssl == "simdino" else MAE.for_encoder(encoder)
    return method.train()


def one_step(method, x):
    loss, parts = method(*method.make_inputs(x, torch.Generator().manual_seed(0)))
    loss.backward()
    method.after_step(0.5)
    return loss, parts


class WatchDevices(TorchDispatchMode):
    """Counts copies to the meta device and what would wait for it, and refuses operations on two devices."""

    def __init__(self):
        super().__init__()
        self.uploads, self.reads = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0}
        assert len(devices) < 2, f"{name} on {devices}"
        if "meta" in devices or any(tensor.is_meta for tensor in tensors):
            waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
            if waits or torch.device(kwargs.get("device") or "meta").type != "meta":
                self.reads.append(name)
        elif kwargs.get("device") is not None and tensors and torch.device(kwargs["device"]).type == "meta":
            self.uploads += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("ssl", ["mae", "simdino"])
def test_a_step_uploads_its_random_numbers_and_waits_for_nothing(ssl, shape, monkeypatch):
    """On the meta device, which stands for a GPU: no operation mixes devices, none reads a value back."""
    no_autocast = lambda device, enabled: contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", no_autocast)  # autocast itself does not know this device
    method = make_method(ssl, "meta")
    x = torch.rand(shape, device="meta")
    with WatchDevices() as watch:
        loss, _ = one_step(method, x)
    assert loss.is_meta and watch.reads == [] and watch.uploads == 1
    assert all(p.grad.is_meta for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("read", [lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x.to("cpu")])
def test_a_read_from_the_device_would_be_seen(read):
    with WatchDevices() as watch, contextlib.suppress(RuntimeError, NotImplementedError):
        read(torch.rand(3, device="meta"))
    assert len(watch.reads) == 1
    with WatchDevices(), pytest.raises(AssertionError, match="on {"):
        torch.rand(3, device="meta") + torch.rand(3)


@pytest.mark.parametrize("ssl, passes", [("mae", 2), ("simdino", 3)])
def test_compiled_blocks_break_no_graph_and_make_one_a_shape(ssl, passes):
    """Shapes a step: those of MAE's encoder and decoder; of SimDINO's teacher and, twice, student."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    method = make_method(ssl)
    for block in (module for module in method.modules() if isinstance(module, model.Block)):
        block.compile(backend=count, fullgraph=True, dynamic=False)  # fullgraph: a break is an error
    for shape in STEPS * 2:
        one_step(method, torch.rand(shape))
    assert passes <= count.frame_count <= passes * len(STEPS)
    torch._dynamo.reset()



def test_the_encoder_exports_with_any_batch_size():
    vit = ViT("vit_t", cls_token=True).eval()
    shapes = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(vit, (torch.rand(2, 1, 32, 48, 1),), dynamic_shapes=(shapes,))
    for batch in (1, 3, 5):
        x = torch.rand(batch, 1, 32, 48, 1)
        torch.testing.assert_close(program.module()(x), vit(x))


def test_recomputed_activations_give_the_same_gradients(monkeypatch):
    grads = []
    for limit in (4096, 2):
        monkeypatch.setattr(model, "RECOMPUTE_ABOVE", limit)
        torch.manual_seed(0)
        vit = ViT("vit_t", drop_path=0.5).train()
        vit(torch.ones(2, 1, 32, 32, 1)).square().sum().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("n, dtype, fused", [
    (200, torch.bfloat16, False), (201, torch.bfloat16, True), (17, torch.float32, True)])
def test_attention_is_written_out_for_short_sequences_in_bf16_alone(n, dtype, fused, monkeypatch):
    calls = []

    def count(q, k, v):
        calls.append(v)
        return v
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    model.attend(*torch.randn(3, 1, 1, n, 8, dtype=dtype).unbind())
    assert len(calls) == fused


@pytest.mark.parametrize("n", [17, 200])
def test_attention_in_bf16_is_the_equation(n):
    q, k, v = torch.randn(3, 2, 3, n, 32).unbind()
    weights = torch.exp(q.double() @ k.double().mT / math.sqrt(32))
    expected = (weights / weights.sum(dim=-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(model.attend(q, k, v), expected.float(), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        short = model.attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), expected.float(), rtol=0.05, atol=0.02)


def test_attention_does_not_care_for_token_order():
    vit = ViT("vit_t").eval()
    tokens = vit.tokens(torch.rand(1, 1, 64, 64, 1))
    order = torch.randperm(tokens.shape[1])
    expected = vit.encode(tokens)[:, order]
    torch.testing.assert_close(vit.encode(tokens[:, order]), expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_brings_its_own_architecture(tmp_path):
    vit = ViT("vit_t", (8, 8, 4), cls_token=True).eval()
    save_checkpoint(tmp_path / "c.pt", vit, step=7)
    loaded = load_encoder(tmp_path / "c.pt")
    x = torch.rand(1, 1, 32, 32, 8)
    assert loaded.config == vit.config and torch.equal(loaded(x), vit(x)) and not loaded.training
    assert [f.name for f in tmp_path.iterdir()] == ["c.pt"]


def test_what_is_no_checkpoint_gets_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pt"
    save_checkpoint(good, ViT("vit_t"))
    data = good.read_bytes()
    bad = {"missing.pt": None, "empty.pt": b"", "text.pt": b"hello", "cut.pt": data[:len(data) // 2]}
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    torch.save({"config": {}, "other": 1}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Harmful(), tmp_path / "harmful.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "folder.pt").mkdir()
    for name in [*bad, "other.pt", "list.pt", "harmful.pt", "pickle.pt", "folder.pt"]:
        with pytest.raises((UserError, OSError), match=name) as error:
            load_encoder(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("key, value", [
    ("arch", "vit_x"), ("arch", None), ("patch_size", [8, 8]), ("patch_size", "8"), ("patch_size", [0, 8, 4]),
    ("patch_size", [8.5, 8, 4]), ("cls_token", True), ("extra", 1)])
def test_an_edited_config_gets_one_clear_line(tmp_path, key, value):
    save_checkpoint(tmp_path / "edited.pt", ViT("vit_t"))
    state = torch.load(tmp_path / "edited.pt", weights_only=True)
    state["config"][key] = value
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(UserError, match="edited.pt"):
        load_encoder(tmp_path / "edited.pt")


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pt", ViT("vit_t"))
    before = (tmp_path / "c.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="c.pt cannot be written.* full"):
        save_checkpoint(tmp_path / "c.pt", ViT("vit_t"))
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert (tmp_path / "c.pt").read_bytes() == before


def test_weights_must_fit_exactly(tmp_path):
    vit = ViT("vit_t")
    state = vit.state_dict()
    del state["norm.weight"]
    torch.save({"config": vit.config, "encoder": state}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="norm.weight"):
        load_encoder(tmp_path / "c.pt")


def test_gelu_and_layer_norm_are_the_vit_ones():
    vit = ViT("vit_t")
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6 and vit.blocks[0].attn.qkv.bias is not None
    x = torch.randn(1, 1, 192)
    mlp = vit.blocks[0].mlp
    hidden = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    exact = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), F.linear(exact, mlp.fc2.weight, mlp.fc2.bias))
