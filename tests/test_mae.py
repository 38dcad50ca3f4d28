"""Masked autoencoding against a naive loop, its invariances, and that it learns."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mae
from mae import MAE, gather_tokens, load_mae
from model import ViT, expand, patchify, save_checkpoint
from prepare import UserError

ROOT = Path(__file__).parents[1]
SHAPES = [(2, 1, 64, 32, 1), (2, 3, 32, 32, 16), (2, 1, 64, 32, 8)]  # image, video, volume


def tiny(**options):
    torch.manual_seed(0)
    return MAE(ViT("vit_t"), decoder_dim=64, decoder_depth=2, decoder_heads=4, **options).eval()


@pytest.mark.parametrize("n", [4, 16, 64, 256, 1024])
def test_exactly_a_quarter_stays_visible(n):
    visible, hidden = tiny().mask(torch.rand(3, n))
    assert visible.shape == (3, n // 4) and hidden.shape == (3, n - n // 4)
    for row in torch.cat([visible, hidden], dim=1):
        assert sorted(row.tolist()) == list(range(n))  # every patch once


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_naive_loop(shape):
    model = tiny()
    x = torch.randn(shape)
    noise = torch.rand(2, patchify(expand(x)).shape[1])
    visible, hidden = model.mask(noise)
    with torch.no_grad():
        loss, _ = model(x, noise)
        grid = model.encoder.grid(shape[2:])
        prediction = model.decode(model.encode(x, visible), visible, hidden, grid).double()
    total, count = 0.0, 0
    patches = patchify(expand(x)).double()
    for b in range(2):
        for i, n in enumerate(hidden[b].tolist()):
            target = patches[b, n]
            total += ((prediction[b, i] - target) ** 2).sum().item()  # || . ||^2 of Sec. 3.2
            count += 1
    assert loss.item() == pytest.approx(total / count / patches.shape[-1], rel=1e-5)


def test_perfect_prediction_costs_nothing_and_visible_patches_do_not_count():
    model = tiny()
    x, noise = torch.randn(2, 1, 64, 64, 1), torch.rand(2, 16)
    visible, hidden = model.mask(noise)
    target = gather_tokens(model.patches(x), hidden)
    assert model.loss(target, target) == 0
    assert model.loss(target + 0.1, target).item() == pytest.approx(0.01)
    shown = torch.zeros(2, 16).scatter(1, visible, 1).view(2, 1, 4, 4)
    shown = shown.kron(torch.ones(16, 16))[..., None]  # (B, 1, H, W, 1)
    assert torch.equal(gather_tokens(model.patches(x + 5 * shown), hidden), target)


def test_encoder_never_sees_hidden_pixels():
    model = tiny()
    x, noise = torch.randn(1, 1, 64, 64, 1, requires_grad=True), torch.rand(1, 16)
    visible, hidden = model.mask(noise)
    model.encode(x, visible).sum().backward()
    seen = patchify(expand(x.grad), (16, 16, 4)).abs().sum(-1)[0] > 0  # (N,)
    assert seen[visible[0]].all() and not seen[hidden[0]].any()


def test_decoder_puts_tokens_back_where_they_were():
    """Which order visible tokens are fed in must not matter: positions say where they are."""
    model = tiny()
    x, noise = torch.randn(1, 1, 64, 64, 1), torch.rand(1, 16)
    visible, hidden = model.mask(noise)
    swapped = visible.flip(1)
    with torch.no_grad():
        a = model.decode(model.encode(x, visible), visible, hidden, (4, 4, 1))
        b = model.decode(model.encode(x, swapped), swapped, hidden.flip(1), (4, 4, 1)).flip(1)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_same_noise_same_loss_and_every_parameter_learns():
    model = tiny().train()
    x = torch.rand(2, 1, 64, 64, 1)
    args = model.make_inputs(x, torch.Generator().manual_seed(3))
    loss, parts = model(*args)
    assert loss == model(*model.make_inputs(x, torch.Generator().manual_seed(3)))[0]
    assert loss != model(*model.make_inputs(x, torch.Generator().manual_seed(4)))[0]
    assert parts["mse"] == loss and not parts["mse"].requires_grad
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_sample_of_one_patch_is_refused():
    """Nothing would be hidden, and the mean over no patches is NaN."""
    with pytest.raises(UserError, match="no patch is left to hide"):
        model = tiny()
        model(*model.make_inputs(torch.rand(2, 1, 16, 16, 1), None))


def test_reconstruction_pastes_what_is_visible():
    model = tiny()
    x, noise = torch.rand(1, 1, 64, 64, 8) * 2 - 1, torch.rand(1, 32)
    visible, hidden = model.mask(noise)
    original, masked, filled = (patchify(image) for image in model.reconstruct(x, noise))
    torch.testing.assert_close(original, patchify(expand(x)) * 0.5 + 0.5)
    for image in (masked, filled):
        assert torch.equal(image[0, visible[0]], original[0, visible[0]])
    assert (masked[0, hidden[0]] == 0.5).all() and not torch.equal(filled, masked)
    prediction = model.decode(model.encode(x, visible), visible, hidden, (4, 4, 2)).detach()
    torch.testing.assert_close(filled[0, hidden[0]], (prediction[0] * 0.5 + 0.5).clamp(0, 1))


def test_a_reconstructed_image_is_one_slice():
    """The decoder predicts ps slices of it: the first is shown, as they stand for one."""
    pictures = tiny().reconstruct(torch.zeros(1, 1, 64, 64, 1), torch.rand(1, 16))
    assert [picture.shape for picture in pictures] == [(1, 3, 64, 64, 1)] * 3


def test_it_learns():
    """Sixteen grey images of different brightness: soon the visible patches tell the hidden ones."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16).view(16, 1, 1, 1, 1).expand(-1, -1, 64, 64, -1)
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=MAE.BETAS)
    losses = []
    for step in range(30):
        loss, _ = model(x, torch.rand(16, 16, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.4 * x.var().item(), losses[::10]  # predicting the mean costs the variance


def test_picture_from_the_command_line(tmp_path, monkeypatch, capsys):
    model = tiny()
    state = {"ssl": "mae", "method": model.config, "model": model.state_dict()}
    save_checkpoint(tmp_path / "c.pt", model.encoder, **state)
    assert load_mae(tmp_path / "c.pt").config == model.config
    Image.effect_noise((80, 60), 40).save(tmp_path / "x.png")
    run = ["mae.py", tmp_path / "c.pt", tmp_path / "x.png", "--out", tmp_path / "r.png", "--size", "64",
           "--modality", "xray"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in run])
    mae.main()
    one_row = 3 * (192 + 12) + 2 * 4, 192 + 6 + 36  # of tiles of 192 pixels
    assert Image.open(tmp_path / "r.png").size == one_row
    assert "mean squared error" in capsys.readouterr().out
    (tmp_path / "c.pt").write_bytes(b"no")
    failed = subprocess.run([sys.executable, ROOT / run[0], *run[1:]], capture_output=True, text=True)
    assert failed.returncode == 1 and "c.pt" in failed.stderr and failed.stderr.count("\n") == 1
