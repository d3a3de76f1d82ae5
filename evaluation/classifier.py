"""The classifier behind evaluate.py: trained once and then frozen, so that samples can be measured
by its features and its answers. Figures of two different classifiers cannot be compared. MNIST's is
in the repository; that of another data set is trained when it is first needed.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from data import fingerprint, load_split
from evaluation.metrics import moments
from system.files import make_folder, read_tensors, sha256, write_tensors
from system.randomness import seeded_generator

PATH = Path(__file__).parent.parent / "results" / "evaluator.pth"
REMAKE = "python evaluate.py --train_evaluator"
FEATURES = 128  # size of the penultimate layer

Split = tuple[Tensor, Tensor]  # images and labels

# The recipe of the committed file: a change makes another classifier
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 12, 128, 3e-3, 0.05, 0.05
# data.fingerprint of the training split that PATH learned from, and of the test split
MNIST_SHA256 = "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c"
MNIST_TEST_SHA256 = "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891"
LEAST_STEPS = 1500  # for a small data set
LEAST_STEPS_OF_CAS = 300


def block(c_in: int, c_out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """uint8 images (N, C, H, W) to features (N, 128); `classify` turns those into logits. The sizes
    in comments are those for MNIST."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            block(channels, 32, size=5, stride=2),  # (N, 32, 14, 14)
            block(32, 64),
            nn.MaxPool2d(2),  # (N, 64, 7, 7)
            block(64, 128),
            block(128, FEATURES),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.float() / 255)

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings, shears and shifts, as handwriting varies; float 0…255."""
    draw = (torch.rand(5, len(images), generator=generator) * 2 - 1).to(images.device)
    angle, size = draw[0] * math.radians(12), 1 + draw[1] * 0.12
    slant, shift = draw[2] * 0.15, draw[3:] * 2.5 / 14  # 2.5 pixels, on a grid from -1 to 1
    rows = [
        torch.stack([size * angle.cos(), slant - size * angle.sin(), shift[0]], dim=1),
        torch.stack([size * angle.sin(), size * angle.cos(), shift[1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def fit(
    images: Tensor, labels: Tensor, *, seed: int, classes: int = 10, least_steps: int = 0
) -> Classifier:
    """Train on uint8 images (N, C, H, W) and int64 labels (N,) for EPOCHS, or longer if those would
    be fewer than `least_steps`; deterministic on a CPU."""
    torch.manual_seed(seed)
    net = Classifier(images.shape[1], classes).to(images.device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.99))
    per_epoch = max(1, len(images) // BATCH_SIZE)
    total = max(EPOCHS, -(-least_steps // per_epoch)) * per_epoch
    with tqdm(total=total * BATCH_SIZE, unit=" images", leave=False, disable=None) as bar:
        for step in range(total):
            if step % per_epoch == 0:
                order = torch.randperm(len(images), generator=seeded_generator(seed, step))
            begin = step % per_epoch * BATCH_SIZE
            index = order[begin : begin + BATCH_SIZE].to(images.device)
            batch = _augment(images[index], seeded_generator(seed, 1, step))
            warmup = min(1.0, (step + 1) / 200)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * (1 - step / total)
            logits = net.classify(net(batch))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            bar.update(BATCH_SIZE)
    return net.eval()


@torch.no_grad()
def features_of(net: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (N, 128), float32, of uint8 images (N, C, H, W)."""
    return torch.cat([net(part) for part in images.split(batch_size)])


@torch.no_grad()
def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images that the classifier reads as their label."""
    answers = net.classify(features_of(net, images)).argmax(dim=1)
    return (answers == labels).float().mean().item()


def full_mnist(cfg: Config) -> Config:
    """MNIST complete and at its own size, whatever the settings of a model are."""
    own = {"img_size": 28, "img_channels": 1, "max_images": 0, "patch_size": 1, "widths": (8,)}
    return replace(cfg, **own, dataset="MNIST", **Config().select("classes"))


def train_and_save(cfg: Config, path: Path = PATH) -> float:
    """Train the classifier on MNIST's training split and write it; returns its test accuracy.
    Raises ValueError for other images in MNIST's format."""
    cfg = full_mnist(cfg)
    device = torch.device("cpu")  # so that the file does not depend on the GPU
    images, labels = load_split(cfg, train=True, device=device)
    if fingerprint(images, labels)["sha256"] != MNIST_SHA256:
        other = "is not MNIST; evaluate.py trains a classifier for other digits by itself"
        raise ValueError(f"data_dir = {cfg.data_dir!r}: {other}, without --train_evaluator")
    make_folder(path.parent)
    net = fit(images, labels, seed=0)
    write(path, net, images)
    return accuracy(net, *load_split(cfg, train=False, device=device))


def write(path: Path, net: Classifier, images: Tensor) -> None:
    """Write a classifier with the moments of its features over its training images."""
    reference = {k: torch.from_numpy(v) for k, v in moments(features_of(net, images)).items()}
    write_tensors(path, {"net": net.state_dict(), "train_moments": reference})


def is_mnist(cfg: Config) -> bool:
    """Whether a model draws what MNIST's classifier was trained on."""
    mnist = Config().select("classes") | {"dataset": "MNIST", "img_size": 28, "img_channels": 1}
    return all(getattr(cfg, name) == value for name, value in mnist.items())


def own_classifier(cfg: Config, train: Split, test: Split) -> Path:
    """The classifier of another data set, trained unless the output folder has it already. Raises
    ValueError if there are fewer images than it has features, or nothing to tell apart."""
    if cfg.num_classes == 1:
        raise ValueError(
            f"dataset = {cfg.dataset!r}: has one label, nothing to tell apart; add another"
        )
    if torch.equal(train[0], test[0]):
        alone = "no label has a second picture to test with"
        raise ValueError(f"dataset = {cfg.dataset!r}: {alone}; add pictures")
    for kind, (images, _) in {"test": test, "training": train}.items():
        if len(images) < FEATURES:
            few = f"{len(images)} {kind} images; the metrics need at least {FEATURES}"
            remedy = "add pictures"
            if kind == "training" and cfg.max_images:
                remedy = f"the model's --max_images was {cfg.max_images}; choose another"
            raise ValueError(f"dataset = {cfg.dataset!r}: {few}; {remedy}")
    content = fingerprint(*train)["sha256"][:8]
    path = Path(cfg.output_dir, "evaluators", f"{cfg.dataset}-{cfg.img_size}px-{content}.pth")
    if not path.is_file():
        make_folder(path.parent)
        print(f"training a classifier for these {len(train[0]):,} images, once")
        least = max(EPOCHS * len(train[0]) // BATCH_SIZE, LEAST_STEPS)
        net = fit(*train, seed=0, classes=cfg.num_classes, least_steps=least)
        write(path, net, train[0])
        read = f"{accuracy(net, *test):.2%} of the {len(test[0]):,} test images read correctly"
        print(f"wrote {path}: {read}")
    return path


def load(
    device: torch.device, path: Path = PATH, channels: int = 1, classes: int = 10
) -> tuple[Classifier, dict[str, np.ndarray], str]:
    """The frozen classifier, the mean and covariance of its features over the training split, and
    the file's SHA-256. Raises ValueError if it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path}: no evaluator; make it: {REMAKE}")
    net = Classifier(channels, classes)
    remedy = f"make it: {REMAKE}" if path == PATH else "delete it"
    contents = read_tensors(path, "an evaluator", remedy=remedy)
    try:
        net.load_state_dict(contents["net"])
        reference = {k: v.numpy() for k, v in contents["train_moments"].items()}
    except Exception:  # contents of another kind can be anything
        raise ValueError(f"{path}: not an evaluator; {remedy}") from None
    return net.to(device).eval().requires_grad_(False), reference, sha256(path)
