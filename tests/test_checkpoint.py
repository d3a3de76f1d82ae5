import os
import pickle

import pytest
import torch
from conftest import assert_same

import checkpoint
from checkpoint import Progress
from config import Config
from model import UNet
from optimizer import make_optimizers

CFG = Config(widths=(8, 8), embedding_size=8)


def save(path, progress=None, cfg=CFG, guided=True):
    """Save a small network that was trained for one step; returns what the file should hold."""
    torch.manual_seed(0)
    model, ema, guide = UNet(cfg), UNet(cfg), UNet(cfg) if guided else None
    optimizers = make_optimizers(cfg, model)
    sum(p.sum() for p in model.parameters()).backward()
    for optimizer in optimizers:
        optimizer.step()
    progress = progress or Progress(epoch=1, step=10)
    metrics = {"totals": [0.1, 1 / 3], "seconds": 2.5}
    checkpoint.save(path, cfg, progress, model, ema, guide, optimizers, metrics)
    return model, ema, guide, optimizers, metrics


def test_everything_comes_back_to_the_last_bit(tmp_path):
    progress = Progress(epoch=3, images=128, step=7, seconds=1.25, budget_from=0.5)
    model, ema, guide, optimizers, metrics = save(tmp_path / "a.pth", progress)
    contents = checkpoint.load(tmp_path / "a.pth")
    assert Config.from_dict(contents["config"]) == CFG
    assert Progress(**contents["progress"]) == progress
    assert_same(contents["model"], model.state_dict())
    assert_same(contents["ema"], ema.state_dict())
    assert_same(contents["guide"], guide.state_dict())
    assert_same(contents["optimizers"], [each.state_dict() for each in optimizers])
    assert_same(contents["metrics"], metrics)


def test_the_networks_are_rebuilt_from_the_file_alone_the_average_and_the_guide(tmp_path):
    cfg = Config(widths=(8, 16), embedding_size=16, img_size=16, blocks=2)
    saved = save(tmp_path / "a.pth", cfg=cfg)
    *networks, loaded, progress = checkpoint.load_model(tmp_path / "a.pth", "cpu")
    assert loaded == cfg
    assert progress.epoch == 1
    for network, original in zip(networks, saved[1:3], strict=True):
        assert_same(network.state_dict(), original.state_dict())
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_a_slim_file_has_half_precision_of_the_average_and_the_guide(tmp_path):
    _, *originals, _, _ = save(tmp_path / "a.pth")
    checkpoint.slim(tmp_path / "a.pth", tmp_path / "small.pth")
    *networks, _, _ = checkpoint.load_model(tmp_path / "small.pth", "cpu")
    for network, original in zip(networks, originals, strict=True):
        halved = {k: weight.half().float() for k, weight in original.state_dict().items()}
        assert_same(dict(network.state_dict()), halved)


def test_a_checkpoint_from_before_its_guide(tmp_path):
    save(tmp_path / "a.pth", guided=False)
    checkpoint.slim(tmp_path / "a.pth", tmp_path / "small.pth")
    for name in ("a.pth", "small.pth"):
        assert checkpoint.load_model(tmp_path / name, "cpu")[1] is None
    model, ema, _, optimizers, metrics = save(tmp_path / "b.pth", guided=False)
    restored = checkpoint.restore(tmp_path / "b.pth", model, ema, optimizers)
    assert restored == (None, metrics)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save(path)
    before = path.read_bytes()

    def full_disk(contents, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ValueError, match=r"a\.pth.*No space left"):
        save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


def test_saving_where_there_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        save(tmp_path / "missing" / "a.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "tensor", "pickle"])
def test_what_is_no_checkpoint_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "hello")
    elif kind == "cut":
        save(path)
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "model": Bomb()}))
    with pytest.raises(ValueError, match=r"bad\.pth") as error:
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "exploded").exists()
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_another_format_is_named(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load(tmp_path / "a.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    save(tmp_path / "a.pth")
    contents = checkpoint.load(tmp_path / "a.pth")
    contents["config"]["widths"] = [16, 16]
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="do not fit"):
        checkpoint.load_model(tmp_path / "a.pth", "cpu")


def test_newest_is_by_completed_work_then_time_never_by_name(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None
    save(tmp_path / "model_epoch_30.pth", Progress(epoch=30, step=300))
    save(tmp_path / "model_epoch_5.pth", Progress(epoch=5, step=50))  # later in time and in text
    save(tmp_path / "a_first.pth", Progress(epoch=7, step=70))
    save(tmp_path / "z_second.pth", Progress(epoch=7, step=70))
    os.utime(tmp_path / "z_second.pth", (1, 1))  # older than its equal
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    names = [path.name for path, _ in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["model_epoch_5.pth", "z_second.pth", "a_first.pth", "model_epoch_30.pth"]
    assert checkpoint.newest(tmp_path).name == "model_epoch_30.pth"
    assert checkpoint.newest(tmp_path, "model_epoch_5*").name == "model_epoch_5.pth"


def test_progress_in_words():
    assert Progress(epoch=3, step=1404).name == "epoch_3"
    assert Progress(epoch=3, images=128, step=1405).name == "epoch_3_step_1405"
    assert str(Progress(epoch=3, images=1280, step=1414)) == "epoch 3 and 1,280 images (step 1,414)"
