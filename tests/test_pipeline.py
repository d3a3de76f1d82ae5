"""Drawing in batches, editing and completing, with perfect models of simple data sets."""

import pytest
import torch
from test_diffusion import SAMPLERS, GaussianData, diffusion, draw

from config import Config
from levels import GreyLevels
from pipeline import Pipeline, Start
from system.randomness import ImageNoise, seeded_generator


def gaussian_pipeline(**settings) -> Pipeline:
    """Draws pixels of N(mean[y], 0.5²)."""
    process = diffusion(**settings)
    return Pipeline(process.cfg, GaussianData(process))


def test_states_is_a_generator_from_noise_to_image():
    process, y = diffusion(steps=4), torch.arange(5)
    model = GaussianData(process)
    states = Pipeline(process.cfg, model).states(y, ImageNoise(0, range(5), (1, 8, 8)))
    first = next(states)
    assert model.calls == []  # the network is called only when the next state is asked for
    assert torch.equal(first, ImageNoise(0, range(5), (1, 8, 8)).draw())
    rest = []
    for x in states:
        rest.append(x)
        assert len(model.calls) == len(rest)
    assert len(rest) == 4
    assert torch.equal(draw(process, model, y), rest[-1])


def test_draw_passes_every_state_of_every_batch_on():
    pipeline, y, seen = gaussian_pipeline(steps=4, sample_batch_size=2), torch.arange(5), []
    images = pipeline.draw(y, lambda *each: seen.append(each))
    numbers, seen = [number for number, _ in seen], [x for _, x in seen]
    assert numbers == list(range(5)) * 3
    assert [len(x) for x in seen] == [2] * 5 + [2] * 5 + [1] * 5
    states = torch.stack([torch.cat(seen[i::5]) for i in range(5)])
    together = ImageNoise(0, range(5), (1, 8, 8))
    assert torch.equal(states, torch.stack(list(pipeline.states(y, together))))
    assert torch.equal(states[-1], images)


# ---- from a picture


def test_at_full_strength_nothing_but_its_faintest_trace_is_left_of_the_original():
    pipeline, y = gaussian_pipeline(sampler="ddim", steps=10), torch.arange(4)
    original = torch.rand(1, 8, 8, generator=seeded_generator(0)) * 2 - 1
    plain, edited = pipeline.draw(y), pipeline.draw(y, start=Start(original))
    assert (plain - edited).abs().max() < 0.02  # sqrt(alpha_bar_T) is 0.0064


def test_the_first_state_of_an_edit_is_the_noisy_original():
    cfg, y = Config(img_size=8, steps=10, guidance=1.0), torch.arange(3)
    pipeline, original = Pipeline(cfg, lambda x, t, y: x * 0), torch.full((1, 8, 8), 0.25)
    noise, same = (ImageNoise(0, range(3), (1, 8, 8)) for _ in range(2))
    states = list(pipeline.states(y, noise, Start(original, strength=0.35)))
    assert pipeline.diffusion.sampling_times(0.35) == [350, 300, 200, 100, 0]
    assert len(states) == 5
    a = pipeline.diffusion.alpha_bar[350]
    expected = a.sqrt() * original + (1 - a).sqrt() * same.draw()
    torch.testing.assert_close(states[0], expected.float())


def test_a_completion_of_gaussian_data_keeps_what_is_known_and_draws_the_rest():
    """With pixels independent of each other, the rest is distributed as if nothing were known."""
    pipeline = gaussian_pipeline(clip_x_0=False, sampler="ddpm", steps=100)
    y, known = torch.full((300,), 3), torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    drawn = pipeline.draw(y, start=Start(torch.full((1, 8, 8), 0.9), known))
    free = pipeline.draw(y)
    assert (drawn[:, :, :4] == 0.9).all()
    torch.testing.assert_close(drawn[:, :, 4:], free[:, :, 4:])


def test_an_edit_can_keep_pixels_too():
    cfg, y = Config(img_size=8, steps=10, guidance=1.0), torch.arange(3)
    pipeline, known = Pipeline(cfg, lambda x, t, y: x * 0), torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    start = Start(torch.full((1, 8, 8), 0.25), known, strength=0.35)
    noise, same = (ImageNoise(0, range(3), (1, 8, 8)) for _ in range(2))
    first, *_, last = pipeline.states(y, noise, start)
    edited = Start(start.x_0, strength=0.35)
    assert torch.equal(first, next(pipeline.states(y, same, edited)))
    assert (last[:, :, :4] == 0.25).all()
    assert (last[:, :, 4:] == 0).all()


# ---- random numbers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(sampler):
    def drawn(count=5, seed=3, **settings):
        process = diffusion(sampler=sampler, steps=4, seed=seed, **settings)
        return draw(process, GaussianData(process), torch.arange(count))

    whole = drawn()
    for batch_size in (1, 2, 4):
        assert torch.equal(drawn(sample_batch_size=batch_size), whole)
    assert torch.equal(drawn(count=2), whole[:2])
    assert not torch.allclose(drawn(seed=4), whole)
    assert not torch.allclose(whole[0] - whole[0].mean(), whole[1] - whole[1].mean())


def test_sampling_leaves_the_global_random_state_alone():
    process = diffusion(sampler="ddpm", steps=5)
    state = torch.get_rng_state()
    draw(process, GaussianData(process), torch.arange(2))
    assert torch.equal(torch.get_rng_state(), state)


def some_levels() -> GreyLevels:
    """Every level becomes 7, 17 … 57, by the white of the image."""
    curves = torch.full((6, 2041), 7, dtype=torch.uint8)
    curves += torch.arange(6, dtype=torch.uint8)[:, None] * 10
    return GreyLevels(torch.ones(6) / 6, curves)


def test_known_pixels_keep_their_grey_levels():
    process = diffusion(steps=4)
    pipeline = Pipeline(process.cfg, GaussianData(process), levels=some_levels())
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    drawn = pipeline.draw(torch.arange(3), start=Start(torch.full((1, 8, 8), 0.3), known))
    assert (drawn[:, :, :4] == torch.tensor(0.3)).all()


def test_whites_do_not_depend_on_the_batches():
    def drawn(size: int) -> torch.Tensor:
        process = diffusion(steps=2, sample_batch_size=size)
        pipeline = Pipeline(process.cfg, GaussianData(process), levels=some_levels())
        return pipeline.draw(torch.arange(10))

    whole = drawn(10)
    assert len(whole[:, 0, 0, 0].unique()) > 2
    for size in (1, 3):
        assert torch.equal(drawn(size), whole)


def test_the_last_batch_may_be_smaller():
    pipeline = Pipeline(Config(sample_batch_size=4), None)
    assert [pipeline.batch_count(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_completing_begins_with_noise_alone():
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    noise, same = (ImageNoise(0, range(3), (1, 8, 8)) for _ in range(2))
    start = Start(torch.full((1, 8, 8), 0.9), known)
    first = next(gaussian_pipeline().states(torch.arange(3), noise, start))
    assert torch.equal(first, same.draw())
