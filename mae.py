"""Masked autoencoding (paper Sec. 3.2): hide 75 % of the patches, encode the rest, predict the hidden pixels.

In:  x (B, C, H, W, S) normalised to [-1, 1], no augmentation. Out: the mean squared error on the masked patches.
`MAE.forward` is the method in four verbs: mask, encode, decode, loss. Embeddings are the encoder's average-pooled tokens.

    python mae.py runs/mae/checkpoint.pt FILE --out recon.png      # draws original, masked and reconstruction
"""
import argparse
import math
import sys

import torch
from torch import nn

from model import (Block, ViT, block_flops, denormalize, expand, init_weights, load_exactly, normalize, patchify, read_checkpoint,
                   run_blocks, save_montage, sincos_positions, take_frames, unit, unpatchify)
from prepare import UserError, read_any

TARGET_EPS = 1e-6  # added to a patch's variance by norm_pix: zero padding makes constant patches


def gather_tokens(x, index):
    """Tokens (B, N, D) at positions index (B, n) -> (B, n, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, n, D)


class MAE(nn.Module):
    """Encoder without CLS token plus a narrow decoder that is thrown away after pretraining.

    mask_ratio: share of hidden patches (alpha of Sec. 3.2). norm_pix: predict patches standardised by their own mean and
    variance (an option of the official implementation; the paper's equation predicts plain pixels, the default).
    """

    BETAS = (0.9, 0.95)  # AdamW, official implementation (Sec. 3.4 follows it)
    WEIGHT_DECAY = (0.05, 0.05)  # first and last step
    CLIP_GRAD = float("inf")

    def __init__(self, encoder, mask_ratio=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=False):
        super().__init__()
        assert encoder.cls_token is None, "MAE does not use a CLS token (Sec. 3.2)"
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        self.config = dict(mask_ratio=mask_ratio, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
                           decoder_heads=decoder_heads, norm_pix=norm_pix)
        self.decoder_embed = nn.Linear(encoder.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))  # P_mask: one learned vector for every hidden patch
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_embed.proj.in_features)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def inputs(self, x, generator):
        """Samples in [0, 1] and a CPU generator -> the arguments of `forward`. No augmentation (Sec. 3.4)."""
        n = math.prod(self.encoder.grid(x.shape[2:]))
        noise = torch.rand(len(x), n, generator=generator).to(x.device)  # (B, N)
        return normalize(x), noise

    def n_visible(self, n):
        """How many of n patches stay visible: (1 - alpha) N, at least one."""
        return max(1, round(n * (1 - self.mask_ratio)))

    def mask(self, noise):
        """noise (B, N) -> visible (B, (1-alpha)N) and hidden (B, alpha N) indices: the patches of lowest noise stay visible."""
        order = noise.argsort(dim=1)  # (B, N), a random permutation of each sample's patches
        n = self.n_visible(noise.shape[1])
        return order[:, :n], order[:, n:]

    def encode(self, x, visible):
        """f_theta(P_vis): the encoder sees the visible patches only, at their own positions -> (B, (1-alpha)N, D)."""
        return self.encoder.encode(gather_tokens(self.encoder.tokens(x), visible))

    def decode(self, latent, visible, hidden, grid):
        """g_phi(f_theta(P_vis), P_mask) -> predicted pixels of the hidden patches (B, alpha N, P)."""
        latent = self.decoder_embed(latent)  # (B, (1-alpha)N, d), d the decoder's width
        masks = self.mask_token.to(latent.dtype).expand(len(latent), hidden.shape[1], -1)  # (B, alpha N, d)
        tokens = torch.cat([latent, masks], dim=1)  # (B, N, d), visible first
        order = torch.cat([visible, hidden], dim=1)  # (B, N), where each of them sits in the image
        positions = sincos_positions(grid, tokens.shape[-1], tokens.device)  # (N, d)
        tokens = tokens + positions[order]  # (B, N, d)
        tokens = run_blocks(self.decoder_blocks, tokens)[:, visible.shape[1]:]  # (B, alpha N, d)
        return self.decoder_pred(self.decoder_norm(tokens))  # (B, alpha N, P)

    def target(self, x, hidden):
        """What the decoder should say: pixels of the hidden patches (B, alpha N, P) in fp32, and their mean and deviation."""
        patches = gather_tokens(patchify(expand(x.float(), self.encoder.patch_size[-1]), self.encoder.patch_size), hidden)
        mean = patches.mean(dim=-1, keepdim=True)  # (B, alpha N, 1)
        std = (patches.var(dim=-1, keepdim=True) + TARGET_EPS).sqrt()  # (B, alpha N, 1)
        return ((patches - mean) / std if self.norm_pix else patches), mean, std

    def loss(self, prediction, target):
        """L_MAE of Sec. 3.2, fp32. We average a patch's P squared errors where the paper sums them: a constant factor P."""
        return (prediction.float() - target).square().mean()  # over B, the alpha N hidden patches, and P

    def forward(self, x, noise=None):
        """x (B, C, H, W, S) in [-1, 1]; noise (B, N) decides the mask -> scalar loss, {"mse": loss}."""
        grid = self.encoder.grid(x.shape[2:])
        noise = torch.rand(len(x), math.prod(grid), device=x.device) if noise is None else noise  # (B, N)
        visible, hidden = self.mask(noise)
        latent = self.encode(x, visible)
        prediction = self.decode(latent, visible, hidden, grid)
        loss = self.loss(prediction, self.target(x, hidden)[0])
        return loss, {"mse": loss.detach()}

    def flops(self, x):
        """Model floating point operations of a training step per sample: forward and twice that backward."""
        n = math.prod(self.encoder.grid(x.shape[2:]))
        return 3 * (block_flops(self.encoder.blocks, self.n_visible(n)) + block_flops(self.decoder_blocks, n))

    def after_step(self, progress, total_steps):
        """Nothing to do after an optimizer step (SimDINO moves its teacher here)."""

    @torch.no_grad()
    def reconstruct(self, x, noise):
        """x (B, C, H, W, S), noise (B, N) -> original, masked, reconstruction, each (B, 3, H, W, S) in [0, 1]."""
        grid, patch = self.encoder.grid(x.shape[2:]), self.encoder.patch_size
        visible, hidden = self.mask(noise)
        prediction = self.decode(self.encode(x, visible), visible, hidden, grid).float()
        if self.norm_pix:  # undo the standardisation with the target patch's own statistics
            _, mean, std = self.target(x, hidden)
            prediction = prediction * std + mean  # (B, alpha N, P)
        x = expand(x, patch[-1])  # (B, 3, H, W, S)
        patches = patchify(x, patch)  # (B, N, P)
        index = hidden[:, :, None].expand(-1, -1, patches.shape[-1])  # (B, alpha N, P)
        masked = unpatchify(patches.scatter(1, index, torch.zeros_like(prediction)), patch, grid)  # hidden patches grey
        filled = unpatchify(patches.scatter(1, index, prediction), patch, grid)  # visible patches pasted in
        return denormalize(x), denormalize(masked), denormalize(filled)


def load_mae(path):
    """Checkpoint of `train.py --ssl mae` -> MAE with its decoder, in eval mode."""
    state = read_checkpoint(path)
    if state.get("ssl") != "mae":
        raise UserError(f"{path} holds no MAE decoder: give a checkpoint of train.py --ssl mae")
    model = MAE(ViT(**state["config"]), **state["method"])
    load_exactly(model, state["model"], path)
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description="Draw original, masked and reconstruction of one file.")
    parser.add_argument("checkpoint", help="runs/NAME/checkpoint.pt of train.py --ssl mae")
    parser.add_argument("file", help="a DICOM, NIfTI, image or video file, or the folder of a DICOM series")
    parser.add_argument("--out", default="recon.png", help="picture to write; slices or frames run from left to right")
    parser.add_argument("--size", type=int, default=256, help="longer side in pixels, as the model was trained")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    args = parser.parse_args()
    model = load_mae(args.checkpoint)
    _, array = read_any(args.file, size=args.size)
    x = normalize(take_frames(unit(torch.from_numpy(array)[None])))  # (1, C, H, W, S)
    _, noise = model.inputs(x, torch.Generator().manual_seed(args.seed))
    rows = []
    for picture in model.reconstruct(x, noise):  # (1, 3, H, W, S)
        shown = torch.linspace(0, picture.shape[-1] - 1, min(x.shape[-1], 8)).round().long()  # at most 8 slices
        rows.append(list(picture[0, ..., shown].unbind(-1)))  # each (3, H, W)
    save_montage(args.out, rows if len(rows[0]) > 1 else [[row[0] for row in rows]])
    loss = model(x, noise)[0].item()
    print(f"{args.out}: original, masked, reconstruction; mean squared error on the masked patches {loss:.4f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"mae.py: {error}")
