"""export.py: other programs get the same pictures from the same noise."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MNIST, assert_one_line
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import checkpoint
import export
from config import Config
from data import load_split, to_model_range
from diffusion import Diffusion
from levels import GreyLevels

CPU = torch.device("cpu")


def save_model(path: Path, widths: tuple[int, ...]) -> Path:
    """A model whose weights matter, unlike those of one that has hardly been trained."""
    cfg = Config(widths=widths, embedding_size=8, dense_size=8, steps=2)
    state = checkpoint.TrainState.initial(cfg, CPU)
    state.guide = copy.deepcopy(state.ema)
    torch.manual_seed(0)
    for parameter in (*state.ema.parameters(), *state.guide.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    images, _ = load_split(Config(data_dir=MNIST, max_images=300), True, CPU)
    state.levels = GreyLevels.measure(images, images, to_model_range(images))
    checkpoint.save(path, cfg, state)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "a.pth", widths=(8,))


@pytest.fixture
def trained(model, tmp_path) -> Path:
    path = tmp_path / "results/models/model_epoch_1.pth"
    path.parent.mkdir(parents=True)
    return Path(shutil.copy(model, path))


def session(path):
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


class Given:
    """Noise that was drawn before, for Diffusion.sample."""

    def __init__(self, noise):
        self.left = list(noise.unbind(dim=1))

    def draw(self):
        return self.left.pop(0)


def test_the_whole_sampler_as_a_graph(run, trained, tmp_path):
    out, (steps, eta, draws) = tmp_path / "digits.onnx", (2, 0.5, 2)
    made = run("export.py", out, model=trained, steps=steps, eta=eta)
    assert made.code == 0, made
    assert f"wrote {out}" in made.out
    loaded = checkpoint.load_model(trained, CPU)
    cfg = checkpoint.replace(loaded.cfg, steps=steps, eta=eta, precision="float32")
    diffusion = Diffusion(cfg)
    for B in (1, 3, 7):
        noise = torch.randn(B, draws, 1, 28, 28)
        y = torch.arange(B) % 10
        denoiser = diffusion.guided(loaded.model, loaded.guide)
        given, times = Given(noise), diffusion.sampling_times()
        *_, expected = diffusion.sample(denoiser, given.draw(), y, times, given)
        found = session(out).run(None, {"noise": noise.numpy(), "y": y.numpy()})[0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_network_as_a_graph(run, tmp_path):
    out, model = tmp_path / "network.onnx", save_model(tmp_path / "a.pth", widths=(8, 8))
    assert run("export.py", out, model=model, network=True).code == 0
    loaded = checkpoint.load_model(model, CPU)
    x_t, t, y = torch.randn(4, 1, 28, 28), torch.tensor([1, 9, 500, 1000]), torch.arange(4)
    found = session(out).run(None, {"x_t": x_t.numpy(), "t": t.numpy(), "y": y.numpy()})[0]
    np.testing.assert_allclose(found, loaded.model(x_t, t, y).numpy(), atol=1e-4)


def test_how_often_the_sampler_draws_noise(trained):
    loaded = checkpoint.load_model(trained, CPU)
    for steps, eta, draws in ((2, 0.0, 1), (1, 0.5, 1), (3, 0.5, 3)):
        assert export.Sampler(loaded, replace(loaded.cfg, steps=steps, eta=eta)).draws == draws


class Otherwise(torch.nn.Module):
    """Computes something else by 0.001 once it is exported."""

    def forward(self, x_t, t, y):
        return x_t * (t + y)[:, None, None, None] + 0.001 * torch.compiler.is_exporting()

    def example(self, B):
        return {"x_t": torch.ones(B, 1, 4, 4), "t": torch.arange(B), "y": torch.arange(B)}


def test_a_graph_that_computes_otherwise_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"differs from torch by 0\.001"):
        export.export_onnx(Otherwise(), tmp_path / "digits.onnx")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_draw_the_same_pictures(run, trained, tmp_path):
    out = trained.parent / "shared.safetensors"
    assert run("export.py", out, model=trained).code == 0
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["config"])["widths"] == [8]
        assert json.loads(file.metadata()["config"])["output_dir"] == "results"  # not this one
    pictures = []
    for model in (trained, out):
        picture = tmp_path / f"{model.suffix}.png"
        drawn = run("generate.py", digits=26, model=model, output=picture, device="cpu")
        assert drawn.code == 0, drawn
        pictures.append(np.asarray(Image.open(picture)))
    assert np.array_equal(*pictures)
    here = {"output_dir": trained.parent.parent, "output": tmp_path / "again.png"}
    assert run("generate.py", reproduce=picture, **here).code == 0


def test_a_small_checkpoint_draws_but_replaces_nothing(run, trained, tmp_path):
    out = tmp_path / "small.pth"
    assert run("export.py", out, model=trained).code == 0
    assert out.stat().st_size < trained.stat().st_size / 2
    drawn = run("generate.py", digits=26, model=out, output=tmp_path / "a.png", device="cpu")
    assert drawn.code == 0, drawn
    for path in (trained, tmp_path / "other.safetensors", tmp_path / "other.onnx"):
        path.write_bytes(trained.read_bytes())
        assert_one_line(run("export.py", path, model=trained), str(path), "exists already")
        assert path.read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("fault", ["torn", "of another program", "not finite"])
def test_other_safetensors_are_refused_in_a_line(run, trained, tmp_path, fault):
    out = tmp_path / "shared.safetensors"
    assert run("export.py", out, model=trained).code == 0
    if fault == "torn":
        out.write_bytes(out.read_bytes()[:-100])
    elif fault == "of another program":
        save_file({"weight": torch.zeros(3)}, out)
    else:
        with safe_open(out, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata()
        tensors["ema.head.bias"][0] = torch.nan
        save_file(tensors, out, notes)
    refused = run("generate.py", digits=1, model=out, output_dir=tmp_path)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert str(out) in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.pt"], "ends in .onnx, .safetensors, .pth"),
        (["model.safetensors", "--network"], "drop the flag"),
        (["no/such/folder.onnx"], "make it first"),
        (["model.onnx", "--model", "none"], "no such checkpoint"),
        (["model_epoch_9.pth"], "is a name of train.py's own checkpoints"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    refused = run("export.py", *words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert said in refused.err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(run, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    refused = run("export.py", tmp_path / "digits.onnx", model=trained)
    assert refused.code == 2
    assert "pip install -r requirement-extra.txt" in refused.err
