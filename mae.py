"""Masked autoencoding (paper Sec. 3.2): hide 75 % of the patches and predict them from the rest.

In:  x (B, C, H, W, S) normalised to [-1, 1], no augmentation.
Out: the mean squared error on the hidden patches.

`MAE.forward` is the method in four steps: mask, encode, decode, loss. The decoder is thrown away
after pretraining; embeddings are the average of the encoder's tokens. Letters beside those of
model.py: alpha is the share of hidden patches, d the decoder's width.

    python mae.py runs/mae/checkpoint.pt FILE --out recon.png   # original, masked, reconstruction
"""
import argparse
import math

import torch
from torch import nn

from model import (Block, ViT, as_user_error, denormalize, draw_samples, expand, init_weights,
                   normalize, parse_picture_arguments, patchify, read_checkpoint,
                   read_sample_to_draw, run_blocks, sincos_positions, unpatchify)
from prepare import UserError, cli


def gather_tokens(x, index):
    """Tokens (B, N, D) at places index (B, n) -> (B, n, D)."""
    index = index[:, :, None].expand(-1, -1, x.shape[-1])  # (B, n, D)
    return x.gather(1, index)  # (B, n, D)


class MAE(nn.Module):
    """An encoder without CLS token, and a decoder of its own width.

    mask_ratio: alpha of Sec. 3.2, the share of patches that is hidden.
    Encoder and decoder see a set of tokens, each with the position of its patch: their order means
    nothing. train.py calls `make_inputs`, `forward` and `after_step`, here and in SimDINO.
    """

    # AdamW as in the official implementation, which Sec. 3.4 follows.
    BETAS = (0.9, 0.95)
    WEIGHT_DECAY = (0.05, 0.05)  # first and last step
    CLIP_GRAD = float("inf")

    def __init__(self, encoder, mask_ratio=0.75, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16):
        super().__init__()
        assert encoder.cls_token is None, "MAE does not use a CLS token (Sec. 3.2)"
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.config = {"mask_ratio": mask_ratio, "decoder_dim": decoder_dim,
                       "decoder_depth": decoder_depth, "decoder_heads": decoder_heads}

        self.decoder_embed = nn.Linear(encoder.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))  # P_mask, the same for all
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_embed.proj.in_features)

        # The encoder has its initial weights already.
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def for_encoder(cls, encoder):
        """An encoder without CLS token -> its MAE, with the official decoder of ViT-B."""
        # CHOICE: beside a narrower encoder the decoder is as narrow.
        width = min(512, encoder.dim)
        return cls(encoder, decoder_dim=width, decoder_heads=width // 32)

    def make_inputs(self, x, generator):
        """Samples in [0, 1] and a CPU generator -> the arguments of `forward`.

        There is no augmentation (Sec. 3.4). The noise (B, N) decides the mask.
        """
        n = math.prod(self.encoder.grid(x.shape[2:]))
        noise = torch.rand(len(x), n, generator=generator).to(x.device)  # (B, N)
        return normalize(x), noise

    def mask(self, noise):
        """Noise (B, N) -> places of visible patches (B, (1-alpha)N), of hidden ones (B, alpha N).

        Visible are those where the noise is lowest. UserError if no patch is left to hide.
        """
        order = noise.argsort(dim=1)  # (B, N), a random permutation of each sample's patches

        # CHOICE: (1 - alpha) N is rounded to the nearest; MAE's code rounds it down.
        n = max(1, round(noise.shape[1] * (1 - self.mask_ratio)))
        if n == noise.shape[1]:
            raise UserError(
                "no patch is left to hide: choose a smaller --patch-size")
        return order[:, :n], order[:, n:]

    def encode(self, x, visible):
        """f_theta(P_vis): the encoder sees the visible patches only -> (B, (1-alpha)N, D)."""
        tokens = self.encoder.tokens(x)  # (B, N, D)
        return self.encoder.encode(gather_tokens(tokens, visible))  # (B, (1-alpha)N, D)

    def decode(self, latent, visible, hidden, grid):
        """g_phi(f_theta(P_vis), P_mask) -> predicted pixels of hidden patches (B, alpha N, P)."""
        # Every hidden patch enters as the same learned mask token.
        latent = self.decoder_embed(latent)  # (B, (1-alpha)N, d)
        masks = self.mask_token.to(latent.dtype)  # (1, 1, d)
        masks = masks.expand(len(latent), hidden.shape[1], -1)  # (B, alpha N, d)
        tokens = torch.cat([latent, masks], dim=1)  # (B, N, d), visible first

        # The position says which patch a token stands for.
        order = torch.cat([visible, hidden], dim=1)  # (B, N)
        positions = sincos_positions(grid, tokens.shape[-1], tokens.device)  # (N, d)
        tokens = tokens + positions[order]  # (B, N, d)

        tokens = run_blocks(self.decoder_blocks, tokens)  # (B, N, d)
        tokens = tokens[:, visible.shape[1]:]  # (B, alpha N, d)
        return self.decoder_pred(self.decoder_norm(tokens))  # (B, alpha N, P)

    def patches(self, x):
        """(B, C, H, W, S) -> pixels of all patches (B, N, P) in fp32."""
        patch = self.encoder.patch_size
        return patchify(expand(x.float(), patch[-1]), patch)  # (B, N, P)

    def loss(self, prediction, target):
        """L_MAE of Sec. 3.2, in fp32, of hidden patches (B, alpha N, P) -> scalar.

        The paper sums over the P values of a patch: its loss is P times this mean. As in its
        equation, pixels are not normalised patch by patch (norm_pix_loss of MAE's code).
        """
        # CHOICE: pixels lie in [-1, 1], as the encoder sees them; the paper's lie in [0, 1]. So our
        # loss is four times as large, and an output of 0 means mid-grey here, black in the paper.
        return (prediction.float() - target).square().mean()

    def forward(self, x, noise=None):
        """x (B, C, H, W, S) in [-1, 1], noise (B, N) for the mask -> scalar loss, {"mse": loss}."""
        grid = self.encoder.grid(x.shape[2:])
        if noise is None:
            noise = torch.rand(len(x), math.prod(grid), device=x.device)  # (B, N)
        visible, hidden = self.mask(noise)
        latent = self.encode(x, visible)
        prediction = self.decode(latent, visible, hidden, grid)
        loss = self.loss(prediction, gather_tokens(self.patches(x), hidden))
        return loss, {"mse": loss.detach()}

    def after_step(self, progress):
        """Nothing to do after an optimizer step (SimDINO moves its teacher here)."""

    @torch.no_grad()
    def reconstruct(self, x, noise):
        """Arguments of `forward` -> original, masked, filled in, each (B, 3, H, W, S) in [0, 1].

        An image comes back as the first of the ps slices that the decoder predicts; their targets
        are equal.
        """
        grid = self.encoder.grid(x.shape[2:])
        visible, hidden = self.mask(noise)
        prediction = self.decode(self.encode(x, visible), visible, hidden, grid)
        prediction = prediction.float()  # (B, alpha N, P)

        # Hidden patches are 0, the middle of the range, in the second, and predicted in the third.
        patches = self.patches(x)  # (B, N, P)
        index = hidden[:, :, None].expand(-1, -1, patches.shape[-1])  # (B, alpha N, P)
        masked = patches.scatter(1, index, torch.zeros_like(prediction))  # (B, N, P)
        filled = patches.scatter(1, index, prediction)  # (B, N, P)

        pictures = []
        for pixels in (patches, masked, filled):
            picture = unpatchify(pixels, self.encoder.patch_size, grid)  # (B, 3, H, W, s*ps)
            pictures.append(denormalize(picture[..., :x.shape[-1]]))  # (B, 3, H, W, S)
        return pictures


def load_mae(path):
    """Checkpoint of `train.py --ssl mae` -> MAE with its decoder, in eval mode.

    It holds config (of ViT), method (MAE.config) and model (all weights of MAE).
    """
    state = read_checkpoint(path)
    if state.get("ssl") != "mae":
        raise UserError(f"{path} holds no MAE decoder: give a checkpoint of train.py --ssl mae")
    with as_user_error(path):
        model = MAE(ViT(**state["config"]), **state["method"])
        model.load_state_dict(state["model"])
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description="Draw original, masked, reconstruction of a file.")
    parser.add_argument("checkpoint", help="runs/NAME/checkpoint.pt of train.py --ssl mae")
    args = parse_picture_arguments(parser, "recon.png")
    x, shown = read_sample_to_draw(args)  # (1, C, H, W, S)
    model = load_mae(args.checkpoint)
    x, noise = model.make_inputs(x, torch.Generator().manual_seed(args.seed))

    pictures = [picture[0] for picture in model.reconstruct(x, noise)]  # (3, H, W, S) each
    draw_samples(args.out, pictures, ["original", "masked", "reconstruction"], shown)

    with torch.no_grad():
        loss, _ = model(x, noise)
    print(f"{args.out}: original, masked, reconstruction; mean squared error on the hidden patches "
          f"{loss.item():.4f}")


if __name__ == "__main__":
    cli(main)
