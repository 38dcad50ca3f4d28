"""Masked autoencoding (paper Sec. 3.2): hide 75 % of the patches, encode the rest, predict the hidden pixels.

In:  x (B, C, H, W, S) normalised to [-1, 1], no augmentation. Out: the mean squared error on the masked
patches. `MAE.forward` is the method in four verbs: mask, encode, decode, loss. The decoder is thrown away
after pretraining; embeddings are the encoder's average-pooled tokens.

    python mae.py runs/mae/checkpoint.pt FILE --out recon.png      # draws original, masked and reconstruction
"""
import argparse
import math

import torch
from torch import nn

from model import (Block, ViT, as_user_error, denormalize, expand, init_weights, normalize,
                   patchify, read_checkpoint, read_picture_flags, run_blocks, save_montage,
                   sincos_positions, subsample_frames, unpatchify)
from prepare import UserError, cli


def gather_tokens(x, index):
    """Tokens (B, N, D) at positions index (B, n) -> (B, n, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, n, D)


class MAE(nn.Module):
    """An encoder without CLS token and a decoder of its own width; mask_ratio is alpha, the hidden share.

    Encoder and decoder see a set of tokens, each with the position of its patch: their order means nothing.
    """

    BETAS = (0.9, 0.95)  # AdamW, official implementation (Sec. 3.4 follows it)
    WEIGHT_DECAY = (0.05, 0.05)  # first and last step
    CLIP_GRAD = float("inf")

    def __init__(self, encoder, mask_ratio=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16):
        super().__init__()
        assert encoder.cls_token is None, "MAE does not use a CLS token (Sec. 3.2)"
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.config = dict(mask_ratio=mask_ratio, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
                           decoder_heads=decoder_heads)
        self.decoder_embed = nn.Linear(encoder.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))  # P_mask, the same for all
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_embed.proj.in_features)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def for_encoder(cls, encoder):
        """The official decoder, of ViT-B. CHOICE: beside a smaller encoder it is not wider than that."""
        width = min(512, encoder.dim)
        return cls(encoder, decoder_dim=width, decoder_heads=width // 32)

    def make_inputs(self, x, generator):
        """Samples in [0, 1] and a CPU generator -> the arguments of `forward`. No augmentation (Sec. 3.4)."""
        n = math.prod(self.encoder.grid(x.shape[2:]))
        noise = torch.rand(len(x), n, generator=generator).to(x.device)  # (B, N)
        return normalize(x), noise

    def mask(self, noise):
        """Noise (B, N) -> visible (B, (1-alpha)N), where it is lowest, and hidden (B, alpha N) places."""
        order = noise.argsort(dim=1)  # (B, N), a random permutation of each sample's patches
        n = max(1, round(noise.shape[1] * (1 - self.mask_ratio)))  # (1 - alpha) N
        if n == noise.shape[1]:
            raise UserError("samples of one patch leave nothing to hide: choose a smaller --patch-size")
        return order[:, :n], order[:, n:]

    def encode(self, x, visible):
        """f_theta(P_vis): the encoder sees the visible patches only -> (B, (1-alpha)N, D)."""
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

    def patches(self, x):
        """(B, C, H, W, S) -> pixels of all patches (B, N, P) in fp32."""
        return patchify(expand(x.float(), self.encoder.patch_size[-1]), self.encoder.patch_size)

    def loss(self, prediction, target):
        """L_MAE of Sec. 3.2, in fp32, of hidden patches (B, alpha N, P) -> scalar.

        CHOICE: pixels lie in [-1, 1], the paper's in [0, 1]: four times the loss, which Adam does not see.
        """
        return (prediction.float() - target).square().mean()  # the paper sums over P: P times this mean

    def forward(self, x, noise=None):
        """x (B, C, H, W, S) in [-1, 1]; noise (B, N) decides the mask -> scalar loss, {"mse": loss}."""
        if noise is None:
            noise = torch.rand(len(x), math.prod(self.encoder.grid(x.shape[2:])), device=x.device)  # (B, N)
        visible, hidden = self.mask(noise)
        latent = self.encode(x, visible)
        prediction = self.decode(latent, visible, hidden, self.encoder.grid(x.shape[2:]))
        loss = self.loss(prediction, gather_tokens(self.patches(x), hidden))
        return loss, {"mse": loss.detach()}

    def after_step(self, progress):
        """Nothing to do after an optimizer step (SimDINO moves its teacher here)."""

    @torch.no_grad()
    def reconstruct(self, x, noise):
        """Arguments of `forward` -> original, masked, reconstruction, each (B, 3, H, W, S) in [0, 1]."""
        grid, patch = self.encoder.grid(x.shape[2:]), self.encoder.patch_size
        visible, hidden = self.mask(noise)
        prediction = self.decode(self.encode(x, visible), visible, hidden, grid).float()  # (B, alpha N, P)
        patches = self.patches(x)  # (B, N, P)
        index = hidden[:, :, None].expand(-1, -1, patches.shape[-1])  # (B, alpha N, P)
        masked = patches.scatter(1, index, torch.zeros_like(prediction))  # hidden patches grey
        filled = patches.scatter(1, index, prediction)  # visible patches pasted in
        return [denormalize(unpatchify(pixels, patch, grid)) for pixels in (patches, masked, filled)]


def load_mae(path):
    """Checkpoint of `train.py --ssl mae` -> MAE with its decoder, in eval mode."""
    state = read_checkpoint(path)
    if state.get("ssl") != "mae":
        raise UserError(f"{path} holds no MAE decoder: give a checkpoint of train.py --ssl mae")
    with as_user_error(path):
        model = MAE(ViT(**state["config"]), **state["method"])
        model.load_state_dict(state["model"])
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description="Draw original, masked and reconstruction of one file.")
    parser.add_argument("checkpoint", help="runs/NAME/checkpoint.pt of train.py --ssl mae")
    args, x = read_picture_flags(parser, "recon.png")  # (1, C, H, W, S)
    model = load_mae(args.checkpoint)
    x, noise = model.make_inputs(x, torch.Generator().manual_seed(args.seed))
    shown = min(x.shape[-1], 8)  # slices or frames
    rows = [list(subsample_frames(picture[0], shown).unbind(-1)) for picture in model.reconstruct(x, noise)]
    save_montage(args.out, rows if shown > 1 else [sum(rows, [])])
    with torch.no_grad():
        mse = model(x, noise)[0].item()
    print(f"{args.out}: original, masked, reconstruction; mean squared error on the masked patches {mse:.4f}")


if __name__ == "__main__":
    cli(main)
