"""Hugging Face's diffusers, given our noise schedule, makes the same pictures of the same noise."""

import pytest
import torch

from config import Config
from diffusion import Diffusion

STEPS = 10


def network(x, t, y):
    """Some smooth function in the place of a network: an x_0_hat in [-1, 1]."""
    return torch.tanh(2 * x.roll(1, dims=3) - 0.3 * x + y.view(-1, 1, 1, 1) / 10)


class Recorded:
    """Noise that other samplers can be given too."""

    def __init__(self, shape):
        generator = torch.Generator().manual_seed(0)
        self.all = torch.randn(STEPS + 1, *shape, generator=generator)
        self.next = iter(self.all)

    def draw(self):
        return next(self.next)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_same_noise_same_pictures(monkeypatch, sampler, schedule):
    import diffusers  # here, because every process that runs tests would wait for it

    own = {"sampler": sampler, "schedule": schedule, "eta": 0.0, "guidance": 1.0}
    process = Diffusion(Config(steps=STEPS, precision="float32", img_size=8, **own))
    noise, y = Recorded((3, 1, 8, 8)), torch.arange(3)
    times, x_T = process.sampling_times(), noise.draw()
    *_, ours = process.sample(process.guided(network), x_T, y, times, noise)

    # Theirs count timesteps from 0, ours from 1; their last step has to end at x_0 as well
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    common = {"trained_betas": beta.float().numpy(), "prediction_type": "sample"}
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(
            **common, clip_sample=False, timestep_spacing="trailing"
        )
    elif sampler == "ddim":
        options = {"clip_sample": False, "set_alpha_to_one": True}
        scheduler = diffusers.DDIMScheduler(**common, **options, timestep_spacing="trailing")
    else:
        options = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **common, **options, solver_order=2, timestep_spacing="trailing", lower_order_final=True
        )
    scheduler.set_timesteps(STEPS)
    assert [int(t) + 1 for t in scheduler.timesteps] == process.sampling_times()[:-1]
    left = iter(noise.all[1:])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(left)
    )
    x = noise.all[0]
    for t in scheduler.timesteps:
        x_0_hat = network(x, int(t) + 1, y)
        x = scheduler.step(x_0_hat, t, x).prev_sample
    torch.testing.assert_close(x, ours, atol=2e-3, rtol=0)
