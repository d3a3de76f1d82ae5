"""The conditional U-Net."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from system.machine import SkipInitialization

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 lacks it
MAX_PARAMETERS = 40_000_000  # twice those of --model_size large


class UNet(nn.Module):
    """Predicts the noise, v or x_0 from a noisy image, its timestep and its label.

    `forward(x_t, t, y)`: x_t (B, C, H, W) with H = W = `img_size`; t int64 (B,) in 1…T; y int64
    (B,), where `null_class` means "no label". Returns (B, C, H, W). A new network predicts zero.
    Patches of pixels are first folded into channels, so that convolutions run at lower resolution,
    which on a CPU saves more time than all other choices together.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.time_scale = 1000 / cfg.timesteps  # timestep_features expects t up to 1000
        self.patch_size = cfg.patch_size
        size, widths = cfg.embedding_size, cfg.widths
        patch_channels = cfg.img_channels * cfg.patch_size**2

        self.time_embedding = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.label_embedding = nn.Embedding(cfg.num_classes + 1, size)
        self.stem = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.shrink.append(nn.Conv2d(4 * widths[level - 1], width, 1))
                self.grow.append(nn.Conv2d(width, 4 * widths[level - 1], 1))
            self.down.append(nn.ModuleList(ResidualBlock(width, size) for _ in range(cfg.blocks)))
            self.up.append(nn.ModuleList(ResidualBlock(width, size) for _ in range(cfg.blocks)))
        side = cfg.img_size // (cfg.patch_size * 2 ** (len(widths) - 1))  # of the coarsest level
        # A learned feature map for each label, added at the coarsest level
        self.label_picture = nn.Embedding(cfg.num_classes + 1, widths[-1] * side**2)
        nn.init.zeros_(self.label_picture.weight)
        self.middle = ResidualBlock(widths[-1], size)
        self.dense = Dense(widths[-1], side, cfg.dense_size, size) if cfg.dense_size else None
        self.attention = Attention(widths[-1]) if cfg.attention else None
        self.norm = nn.GroupNorm(8, widths[0])
        self.head = zero(nn.Conv2d(widths[0], patch_channels, 3, padding=1))
        self.bypass = zero(nn.Conv2d(widths[0], patch_channels, 1)) if cfg.bypass else None

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        features = timestep_features(t * self.time_scale, self.label_embedding.embedding_dim)
        embedding = F.silu(self.time_embedding(features) + self.label_embedding(y))  # (B, size)

        # P = patch_size, w = widths
        h = self.stem(F.pixel_unshuffle(x_t, self.patch_size))  # (B, w[0], H/P, W/P)
        skips = []
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.shrink[level - 1](F.pixel_unshuffle(h, 2))  # (B, w[l], H/(P·2^l), …)
            if level == len(self.down) - 1:
                h = h + self.label_picture(y).view(h.shape).to(h.dtype)  # float32 under autocast
            for block in blocks:
                h = block(h, embedding)
                skips.append(h)
        h = self.middle(h, embedding)  # (B, w[-1], coarsest side, coarsest side)
        if self.dense:
            h = self.dense(h, embedding)
        if self.attention:
            h = self.attention(h)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                h = block(h + skips.pop(), embedding)  # added, as concatenating them is slower
            if level > 0:
                h = F.pixel_shuffle(self.grow[level - 1](h), 2)  # (B, w[l-1], twice the side)
        folded = self.head(F.silu(self.norm(h)))  # (B, C·P², H/P, W/P)
        if self.bypass:  # a norm uses statistics of the whole image, which blurs exact levels
            folded = folded + self.bypass(h)
        return F.pixel_shuffle(folded, self.patch_size)  # (B, C, H, W)


def without_weights(cfg: Config) -> UNet:
    """The network with the shapes of its weights but no memory for them. Raises ValueError if there
    would be more than MAX_PARAMETERS."""
    with torch.device("meta"), SkipInitialization():
        network = UNet(cfg)
    size = sum(parameter.numel() for parameter in network.parameters())
    if size > MAX_PARAMETERS:
        remedy = "reduce widths, blocks, dense_size, embedding_size or img_size"
        raise ValueError(f"U-Net: {size:,} parameters; at most {MAX_PARAMETERS:,}; {remedy}")
    return network


class ResidualBlock(nn.Module):
    """x + conv(modulate(conv(x))), where the embedding scales and shifts the features (adaptive
    group norm, Dhariwal & Nichol 2021). Starts as the identity."""

    def __init__(self, channels: int, embedding_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_size, 2 * channels)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        scale, shift = self.modulation(embedding).chunk(2, dim=1)  # (B, C) each
        return x + self.conv2(F.silu(modulated_group_norm(h, 1 + scale, shift)))


def modulated_group_norm(h: Tensor, scale: Tensor, shift: Tensor, groups: int = 8) -> Tensor:
    """Group norm of h (B, C, H, W), then h * scale + shift, with a scale and a shift (B, C) for
    each image and channel. Computed as the group norm of a single image with B·C channels, because
    one pass over memory instead of three makes a training step 8 % shorter."""
    if is_exporting():  # what follows would fix the graph's batch size
        return F.group_norm(h, groups) * scale[:, :, None, None] + shift[:, :, None, None]
    B, C, H, W = h.shape
    single = h.reshape(1, B * C, H, W)
    return F.group_norm(single, B * groups, scale.flatten(), shift.flatten()).view(B, C, H, W)


class Dense(nn.Module):
    """A residual layer of `size` hidden units that sees the whole image; starts as the identity.
    At high noise the best estimate depends on absolute positions and on distant pixels, which
    convolutions handle badly."""

    def __init__(self, channels: int, side: int, size: int, embedding_size: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.read = nn.Linear(channels * side**2, size)
        self.modulation = nn.Linear(embedding_size, 2 * size)
        self.write = zero(nn.Linear(size, channels * side**2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.read(self.norm(x).flatten(1))  # (B, size)
        scale, shift = self.modulation(embedding).chunk(2, dim=1)  # (B, size) each
        return x + self.write(F.silu(h * (1 + scale) + shift)).view(x.shape)


class Attention(nn.Module):
    """Self-attention over all positions, with a residual; starts as the identity."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # (B, heads, H·W, C / heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


def timestep_features(t: Tensor, size: int) -> Tensor:
    """Cosines and sines of t (B,), 0…1000, at `size / 2` frequencies from 1 to almost 1/10000:
    (B, size). Vaswani et al. 2017, section 3.5, but all cosines before all sines."""
    half = size // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angle = t.float()[:, None] * frequency  # (B, size / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, size)


def zero(layer: nn.Module) -> nn.Module:
    """Zero the weights and bias of a layer that ends a residual branch or the network."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
