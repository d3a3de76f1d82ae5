"""The denoiser as a classifier (Li et al. 2023): which label lets it remove noise best?"""

import time

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import LoadedModel
from data import to_model_range
from diffusion import Diffusion
from evaluation.results import Result
from system.randomness import seeded_generator

TIMES = [0.5 + 0.05 * i for i in range(9)]  # t / T: with less noise, any label will do


@torch.no_grad()
def classify(loaded: LoadedModel, images: Tensor, labels: Tensor) -> Result:
    """How often the best label is right, for uint8 images (N, C, H, W) with int64 labels (N,). The
    best is the one with the smallest error of x_0_hat, summed over TIMES and weighted by the root
    of snr; all labels are tried with the same noise."""
    cfg, began = loaded.cfg, time.perf_counter()
    diffusion, right = Diffusion(cfg), 0
    bar = tqdm(total=len(images), unit=" images", leave=False, disable=None)
    for first in range(0, len(images), cfg.sample_batch_size):
        part = slice(first, first + cfg.sample_batch_size)
        x_0, y = to_model_range(images[part]), labels[part]
        errors = torch.zeros(len(y), cfg.num_classes, device=y.device)
        for number, u in enumerate(TIMES):
            t = max(1, round(u * diffusion.T))
            generator = seeded_generator(cfg.seed, number, first)  # on the CPU, as when drawing
            eps = torch.randn(x_0.shape, generator=generator).to(y.device)
            x_t = diffusion.add_noise(x_0, torch.full_like(y, t), eps)
            for label in range(cfg.num_classes):
                x_0_hat = diffusion.denoise(loaded.model, x_t, t, torch.full_like(y, label))
                error = (x_0_hat - x_0).square().mean(dim=(1, 2, 3))
                errors[:, label] += diffusion.snr[t].sqrt().item() * error
        right += (errors.argmin(dim=1) == y).sum().item()
        bar.update(len(y))
    bar.close()
    cost = {"calls": len(TIMES) * cfg.num_classes, "seconds": time.perf_counter() - began}
    return {"accuracy": right / len(images), "images": len(images)} | cost
