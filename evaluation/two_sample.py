"""A classifier two-sample test (C2ST, Lopez-Paz & Oquab 2017): how often can a network tell samples
from real images? 50 % means that it only guesses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.classifier import block
from system.randomness import seeded_generator

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 8, 128, 3e-3, 0.1
LEAST_STEPS = 300  # for few images


def coarse(images: Tensor) -> Tensor:
    """uint8 images blurred over 2 x 2 pixels and reduced to 17 grey levels 0, 15 … 240, which is
    about what an eye sees."""
    blurred = F.avg_pool2d(images.float(), 2, stride=1)
    return (blurred / 16).round().mul(15).to(torch.uint8)


VIEWS = {"coarse": coarse, "exact": lambda images: images}


class Discriminator(nn.Module):
    """uint8 images (N, C, H, W) to logits (N,): above 0 for "a real image". It sees each grey level
    as waves of several lengths too, so that it can tell 253 from 255."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        level = torch.arange(256) / 255
        waves = [f(torch.pi * k * level) for k in (1, 4, 16, 64) for f in (torch.sin, torch.cos)]
        self.register_buffer("encoded", torch.stack([level, *waves], dim=1))  # (256, 9)
        self.features = nn.Sequential(
            block(9 * channels, 16, stride=2),  # (N, 16, 14, 14)
            block(16, 32),
            nn.MaxPool2d(2),  # (N, 32, 7, 7)
            block(32, 64),
            block(64, 64),
        )
        self.head = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.embedding(images.int(), self.encoded)  # (N, C, H, W, 9)
        x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (N, C · 9, H, W)
        return self.head(self.features(x).mean(dim=(2, 3))).squeeze(1)


def two_sample_test(samples: Tensor, real: Tensor, seed: int) -> tuple[float, Tensor]:
    """Train on one random half of samples and as many real images, both uint8 (N, C, H, W), and
    test on the other half. Returns the accuracy, and for each sample the logit of "real" where it
    was tested, else infinity (N,)."""
    N = min(len(samples), len(real))
    order = [
        torch.randperm(len(x), generator=seeded_generator(seed, i))[:N].to(x.device)
        for i, x in enumerate((samples, real))
    ]
    half = N // 2
    seen = torch.cat([samples[order[0][:half]], real[order[1][:half]]])
    answers = (torch.arange(2 * half, device=seen.device) >= half).float()
    net = fit(seen, answers, seed)
    logits = [
        _logits(net, x[index[half:]]) for x, index in zip((samples, real), order, strict=True)
    ]
    accuracy = ((logits[0] < 0).float().mean() + (logits[1] >= 0).float().mean()) / 2
    logit = torch.full((len(samples),), torch.inf, device=samples.device)
    logit[order[0][half:]] = logits[0]
    return accuracy.item(), logit


def fit(x: Tensor, answers: Tensor, seed: int) -> Discriminator:
    """Train on uint8 images x (N, C, H, W) and answers (N,): 1 for a real image, else 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Discriminator(x.shape[1]).to(x.device)
    per_epoch = max(1, len(x) // BATCH_SIZE)
    total = max(EPOCHS, -(-LEAST_STEPS // per_epoch)) * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=total, cycle_momentum=False
    )
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=seeded_generator(seed, 2, step)).to(x.device)
        begin = step % per_epoch * BATCH_SIZE
        index = order[begin : begin + BATCH_SIZE]
        loss = F.binary_cross_entropy_with_logits(net(x[index]), answers[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def _logits(net: Discriminator, x: Tensor) -> Tensor:
    return torch.cat([net(part) for part in x.split(500)])
