"""levels.py: what is drawn gets the grey levels of the training images."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

import levels
from checkpoint import TrainState, load_model
from config import Config
from data import load_split, to_model_range, to_uint8
from diffusion import Diffusion
from levels import LIGHT, WHITES, GreyLevels
from system.randomness import ImageNoise


@pytest.fixture(scope="module")
def mnist():
    return load_split(Config(max_images=3000), train=True, device=torch.device("cpu"))[0]


def histogram(images):
    return torch.bincount(images.flatten().long(), minlength=256) / images.numel()


def test_images_with_real_levels_keep_them_up_to_their_white(mnist):
    few = mnist[:500]
    levels = GreyLevels.measure(mnist, few, to_model_range(few))
    matched = to_uint8(levels.match(to_model_range(few), torch.rand(500)))
    dark = few < LIGHT
    assert torch.equal(matched < LIGHT, dark)
    assert (matched[dark].int() - few[dark].int()).abs().max() <= 2  # other images, other ranks


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_curve_that_rises_otherwise_is_undone(mnist, power):
    x = (mnist[:500] / 255) ** power * 2 - 1  # faint pixels become brighter, or fainter
    levels = GreyLevels.measure(mnist, mnist[:500], x)
    matched = to_uint8(levels.match(x, torch.rand(500)))
    before = (histogram(to_uint8(x)) - histogram(mnist[:500])).abs().sum()
    after = (histogram(matched) - histogram(mnist[:500])).abs().sum()
    assert after < 0.05 < 0.1 < before


def test_a_halo_becomes_black(mnist):
    blurred = mnist[:500].float().div(127.5).sub(1)
    halo = blurred.eq(-1) & (torch.rand(blurred.shape) < 0.1)
    x = blurred.masked_fill(halo, -0.99)
    levels = GreyLevels.measure(mnist, mnist[:500], x)
    matched = to_uint8(levels.match(x, torch.rand(500)))
    assert (matched[halo] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_level_above_all_that_was_drawn_becomes_the_white(seed):
    """Whatever its rank, 1, is rounded to."""
    random = torch.Generator().manual_seed(seed)
    images = ((torch.rand(40 + seed, 1, 8, 8, generator=random) < 0.3) * 253).to(torch.uint8)
    images[..., 0, 0] = torch.randint(1, 252, (len(images), 1), generator=random).to(torch.uint8)
    levels = GreyLevels.measure(images, images[:7], to_model_range(images[:7] * 0.8))
    assert levels.curves[WHITES.index(253), -1] == 253


def test_each_image_has_one_white_and_whites_are_as_frequent_as_in_mnist(mnist):
    x = to_model_range(mnist)
    levels = GreyLevels.measure(mnist, mnist[:500], x[:500])
    chance = (torch.arange(len(x)) + 0.5) / len(x)
    matched = to_uint8(levels.match(x, chance))
    counts = torch.stack([(matched == white).flatten(1).sum(dim=1) for white in WHITES])
    found = torch.bincount(counts.argmax(dim=0), minlength=len(WHITES)) / len(x)
    torch.testing.assert_close(found, levels.share, atol=0.06, rtol=0)
    # 253 is the most frequent, then 254 and 252
    assert found.argsort(descending=True)[:3].tolist() == [3, 4, 2]


def test_curves_rise_and_leave_black_black(mnist):
    levels = GreyLevels.measure(mnist, mnist[:100], to_model_range(mnist[:100]) * 0.9)
    assert (levels.curves.int().diff(dim=1) >= 0).all()
    assert (levels.curves[:, 0] == 0).all()


def test_no_white_no_curves():
    dark = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    assert GreyLevels.measure(dark, dark, to_model_range(dark)) is None


def test_nan_is_left_for_others_to_report(mnist):
    x = to_model_range(mnist[:4])
    levels = GreyLevels.measure(mnist, mnist[:4], x)
    x[0, 0, 3, 3] = torch.nan
    assert levels.match(x, torch.rand(4)).isnan().any()
    assert GreyLevels.measure(mnist, mnist[:4], x) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_share_the_curves(channels):
    images = torch.randint(0, 256, (50, channels, 8, 8), dtype=torch.uint8)
    levels = GreyLevels.measure(images, images, to_model_range(images))
    matched = to_uint8(levels.match(to_model_range(images), torch.rand(50)))
    assert matched.shape == images.shape
    assert (matched.int() - images.int()).abs().float().mean() < 4


@pytest.mark.parametrize(
    ("share", "curves"),
    [
        (torch.ones(6) / 6, torch.zeros(6, 9, dtype=torch.uint8)),
        (torch.ones(5) / 5, torch.zeros(6, 2041, dtype=torch.uint8)),
        (torch.ones(6), torch.zeros(6, 2041, dtype=torch.uint8)),
        (torch.ones(6) / 6, torch.zeros(6, 2041)),
        (torch.ones(6).double() / 6, torch.zeros(6, 2041, dtype=torch.uint8)),
        (torch.full((6,), torch.nan), torch.zeros(6, 2041, dtype=torch.uint8)),
    ],
)
def test_other_tensors_are_no_levels(share, curves):
    with pytest.raises(ValueError, match="grey levels"):
        GreyLevels(share, curves)


@pytest.mark.parametrize("steps", [1, 2, 4, 13])
def test_measured_of_a_model_whatever_its_number_of_steps(steps):
    cfg = Config(widths=(8,), dense_size=0, embedding_size=8, max_images=300, steps=steps)
    images, labels = load_split(cfg, train=True, device=torch.device("cpu"))
    state = TrainState.initial(replace(cfg, guide_fraction=0.0), torch.device("cpu"))
    diffusion = Diffusion(cfg)
    levels = GreyLevels.of_model(diffusion, diffusion.guided(state.ema), images, labels)
    assert levels.curves.shape == (6, 2041)
    assert (levels.curves.int().diff(dim=1) >= 0).all()
    assert len(levels.curves.unique()) > 1


def test_a_checkpoint_is_saved_even_if_levels_cannot_be_measured(run, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError("no memory for that")

    monkeypatch.setattr(GreyLevels, "of_model", fail)
    trained = run("train.py", **TINY, epochs=1, output_dir=tmp_path)
    assert trained.code == 0, trained
    assert "grey levels not written: no memory for that" in trained.out + trained.err
    assert load_model(tmp_path / "models" / "model_epoch_1.pth", torch.device("cpu")).levels is None


def test_levels_of_a_model_are_measured_on_training_images_drawn_again(monkeypatch):
    monkeypatch.setattr(levels, "REDRAWN_PIXELS", 50 * 784)
    cfg = Config(max_images=300, seed=3)
    images, labels = load_split(cfg, train=True, device=torch.device("cpu"))
    few, process, seen = images[:50], Diffusion(cfg), []
    faint = to_model_range(few) * 0.8 - 0.2

    def denoiser(x: torch.Tensor, t: int, y: torch.Tensor) -> torch.Tensor:
        seen.append((x, t, y))
        return faint

    found = GreyLevels.of_model(process, denoiser, images, labels)
    assert torch.equal(found.curves, GreyLevels.measure(images, few, faint).curves)
    assert [t for _, t, _ in seen] == [231, 154, 77]  # from the first time of at least 200
    x, t, y = seen[0]
    noise = ImageNoise(3, range(50), (1, 28, 28)).draw()
    noised = process.add_noise(to_model_range(few), torch.full((50,), t), noise)
    torch.testing.assert_close(x, noised)
    assert torch.equal(y, labels[:50])
