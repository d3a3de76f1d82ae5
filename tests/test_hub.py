"""The models by torch.hub."""

import subprocess
import sys

import pytest
import torch
from conftest import REPO

import checkpoint
from checkpoint import TrainState
from config import Config

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120}


def test_the_hub_draws_what_generate_draws(run, tmp_path):
    """From another folder, in a process of its own, as a user would, who has a model.py, too."""
    out = tmp_path / "hub.pt"
    for name in ("model", "data", "config"):
        (tmp_path / f"{name}.py").write_text(f"mine = {name!r}")
    program = f"""
import model as mine
import torch
model = torch.hub.load({str(REPO)!r}, "mnist_diffusion", source="local")
images = model.sample("2026", seed=3, precision="float32")
student = torch.hub.load({str(REPO)!r}, "mnist_diffusion_student", source="local")
torch.save([images, student.sample("7")], {str(out)!r})
import data, sys
assert sys.excepthook is sys.__excepthook__  # the user's errors stay the user's
assert (mine.mine, data.mine) == ("model", "data")  # and so do the modules
assert sys.modules["model"] is mine
assert {str(REPO)!r} not in sys.path
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    images, seven = torch.load(out)
    assert (images.shape, images.dtype) == ((4, 1, 28, 28), torch.uint8)
    assert seven.shape == (1, 1, 28, 28)
    flags = {"model": "pretrained", "digits": 2026, "count": 1, "seed": 3, "precision": "float32"}
    assert run("generate.py", **flags, device="cpu", output=tmp_path / "same.npz").code == 0
    import numpy as np

    drawn = torch.from_numpy(np.load(tmp_path / "same.npz")["arr_0"])
    assert (drawn.int() - images[:, 0].int()).abs().max() <= 1  # other threads round differently


def test_the_errors_of_a_program_of_the_same_name_stay_the_users(tmp_path):
    load = f'torch.hub.load({str(REPO)!r}, "mnist_diffusion", source="local")'
    (tmp_path / "train.py").write_text(f"import torch\n{load}\n1 / 0\n")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, text=True, **PIPES)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug" not in done.stderr


def test_guidance_that_a_model_never_learned_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO))
    import hubconf

    cfg = Config(widths=(8, 8), embedding_size=8, label_dropout=0.0)
    checkpoint.save(tmp_path / "a.pth", cfg, TrainState.initial(cfg, torch.device("cpu")))
    model = hubconf.mnist_diffusion(str(tmp_path / "a.pth"))
    for settings in ({}, {"guidance": 0.0}):
        with pytest.raises(ValueError, match="cannot draw without a label"):
            model.sample("7", **settings)
    assert model.sample("7", guidance=1.0).shape == (1, 1, 28, 28)


def test_a_wrong_label_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO))
    import hubconf

    with pytest.raises(ValueError, match="use digits 0 to 9"):
        hubconf.mnist_diffusion_student().sample("x")
    for wrong in ({"widths": (8, 8)}, {"guidence": 2.0}, {"guidance": 3.0}):  # of a student
        with pytest.raises(ValueError, match=r"no setting for drawing; choose|a student learned"):
            hubconf.mnist_diffusion_student().sample("1", **wrong)


def test_the_hub_names_wrong_arguments(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO))
    import hubconf

    model = hubconf.mnist_diffusion()
    with pytest.raises(TypeError, match="digits = 2026: must be text"):
        model.sample(2026)
    with pytest.raises(ValueError, match="device = 'gpu': not usable here"):
        hubconf.mnist_diffusion(device="gpu")
    student = hubconf.mnist_diffusion("student", device=torch.device("cpu"))
    assert student.cfg.is_student
    assert student.sample("all").shape == (10, 1, 28, 28)
    model.levels = None
    with pytest.raises(ValueError, match="this model has no grey levels"):
        model.sample("7", match_levels=True)
