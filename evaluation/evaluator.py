"""The evaluator: the frozen classifier, real images, and what it measures of samples."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from data import fingerprint, load_split
from evaluation import classifier, metrics, two_sample
from evaluation.results import Result

MAX_MEASURED = 10_000  # as many as MNIST has test images
FEW = 5000  # with fewer images KID, CAS and C2ST are computed in another way since version 1.7


class Evaluator:
    """The frozen classifier, and the real images that samples are compared with."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        own = not classifier.is_mnist(cfg)  # a data set with a classifier of its own
        self.cfg = cfg = cfg if own else classifier.full_mnist(cfg)
        self.device = device
        train, test = (load_split(cfg, train=kind, device=device) for kind in (True, False))
        own = own or fingerprint(*train)["sha256"] != classifier.MNIST_SHA256
        (self.train_images, self.train_labels), (self.test_images, self.test_labels) = train, test
        path = classifier.own_classifier(cfg, train, test) if own else classifier.PATH
        sizes = cfg.img_channels, cfg.num_classes
        self.net, self.train_moments, self.sha256 = classifier.load(device, path, *sizes)
        test_sha256 = fingerprint(*test)["sha256"]
        is_other = own or test_sha256 != classifier.MNIST_TEST_SHA256
        self._other_test_split = {"test_sha256": test_sha256} if is_other else {}
        self.label_counts = self.train_labels.bincount(minlength=cfg.num_classes).tolist()
        some = self.train_images[shuffled(len(self.train_images), seed=0)[:MAX_MEASURED].to(device)]
        self.some_train_features = classifier.features_of(self.net, some)
        self._real: dict[int, Result] = {}  # metrics of N real test images, by N

    @property
    def real_count(self) -> int:
        """How many images the smaller split has, the most that can be measured."""
        return min(len(self.test_images), len(self.train_images))

    def identity(self, count: int) -> Result:
        """What a result of `count` images depends on, besides the images."""
        recipe = {"recipe": 2} if count < FEW else {}  # so that older results are measured again
        return {"evaluator": self.sha256} | self._other_test_split | recipe

    def measure(self, images: Tensor, labels: Tensor | None) -> tuple[Result, Tensor]:
        """Measure uint8 images (N, C, H, W) with int64 labels (N,). Returns their metrics, with
        those of N test images as "real"; and the ten images closest to a training image, each
        followed by it, (20, C, H, W). Raises ValueError for too few or too many images."""
        N = len(images)
        if N < classifier.FEATURES:
            raise ValueError(f"{N} images: too few; metrics need at least {classifier.FEATURES}")
        if len(self.test_images) < N:
            most = len(self.test_images)
            raise ValueError(f"{N} images: measure at most {most}, as there are {most} test images")
        if N not in self._real:
            some = shuffled(len(self.test_images), seed=1)[:N].to(self.device)
            real, distances, _ = self._metrics(self.test_images[some], self.test_labels[some])
            self._real[N] = real | {"nearest_least": distances.min().item()}
        real = self._real[N]
        found, distances, index = self._metrics(images, labels)
        found["fd_over_floor"] = found["fd"] / real["fd"]
        if real["nearest_median"] > 0:
            found["nearest_over_real"] = found["nearest_median"] / real["nearest_median"]
        found["copies"] = int((distances < real["nearest_least"]).sum())
        closest = distances.argsort()[:10]
        pairs = torch.stack([images[closest], self.train_images[index[closest]]], dim=1)
        about = {"dataset": self.cfg.dataset, "label_names": self.cfg.label_names}
        return {"images": N, **about, "samples": found, "real": real}, pairs.flatten(0, 1)

    def _metrics(self, images: Tensor, labels: Tensor | None) -> tuple[Result, Tensor, Tensor]:
        """Metrics of a set of images; for each of them, the distance to the nearest training image
        and its index."""
        features = classifier.features_of(self.net, images)
        found = metrics.frechet_metrics(features, self.train_moments)
        found |= metrics.feature_metrics(features, self.some_train_features[: len(features)])
        found |= {"pixels": metrics.pixel_metrics(images)}
        if labels is not None:
            answers = self.net.classify(features).argmax(dim=1)
            found |= metrics.agreement_metrics(answers, labels, self.cfg.num_classes)
        distances, index = metrics.nearest(images, self.train_images)
        return found | {"nearest_median": distances.median().item()}, distances, index

    def accuracy_score(self, images: Tensor, labels: Tensor) -> Result:
        """Test accuracy of the classifier's architecture, trained on these images alone and on as
        many real ones, for 3 seeds (classification accuracy score, Ravuri & Vinyals 2019)."""
        score: Result = {"synthetic": [], "real": []}
        for seed in (1, 2, 3):
            some = shuffled(len(self.train_images), seed)[: len(images)].to(self.device)
            real = self.train_images[some], self.train_labels[some]
            for kind, (x, y) in (("synthetic", (images, labels)), ("real", real)):
                classes = self.cfg.num_classes
                least = classifier.LEAST_STEPS_OF_CAS
                net = classifier.fit(x, y, seed=seed, classes=classes, least_steps=least)
                score[kind].append(classifier.accuracy(net, self.test_images, self.test_labels))
        score["gap"] = float(np.mean(score["real"]) - np.mean(score["synthetic"]))
        return score

    def two_sample_test(self, images: Tensor) -> tuple[Result, Tensor]:
        """How often networks tell the images (N, C, H, W) from test images, and as the floor how
        often they tell as many training images from test images, in each of two_sample.VIEWS and
        for 3 seeds. Also returns, for each view, the ten images that were taken for samples with
        the most certainty, (20, C, H, W)."""
        some = shuffled(len(self.train_images), seed=3)[: len(images)].to(self.device)
        kinds = {"samples": images, "real": self.train_images[some]}  # here "real" is the floor
        found: Result = {view: {kind: [] for kind in kinds} for view in two_sample.VIEWS}
        most_obvious, seeds = [], (1, 2, 3)
        total = len(two_sample.VIEWS) * len(kinds) * len(seeds)
        with tqdm(total=total, desc="two-sample tests", leave=False, disable=None) as bar:
            for view, look in two_sample.VIEWS.items():
                test_images = look(self.test_images)
                for kind, shown in kinds.items():
                    seen, tests = look(shown), []
                    for seed in seeds:
                        tests.append(two_sample.two_sample_test(seen, test_images, seed))
                        bar.update()
                    found[view][kind] = [accuracy for accuracy, _ in tests]
                    if kind == "samples":
                        logit = torch.stack([logit for _, logit in tests]).amin(dim=0)
                        most_obvious.append(images[logit.argsort()[:10]])
        return found, torch.cat(most_obvious)


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers 0 … count - 1 in an order that `seed` fixes, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
