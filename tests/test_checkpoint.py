"""Checkpoint files: what comes back from them, what an older one means, what is refused."""

import copy
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same
from PIL import Image

import checkpoint
import export
from checkpoint import Progress, TrainState
from config import Config
from interface import provenance
from interface.models import list_checkpoints
from levels import GreyLevels
from model import UNet

CPU = torch.device("cpu")
CFG = Config(widths=(8, 8), embedding_size=8)


def trained_state(cfg: Config = CFG, progress: Progress | None = None) -> TrainState:
    """The state of a small network after one step, with an average and a guide of its own."""
    state = TrainState.initial(cfg, CPU)
    sum(p.sum() for p in state.model.parameters()).backward()
    for optimizer in state.optimizers:
        optimizer.step()
    state.ema, state.guide = (UNet(cfg).requires_grad_(False) for _ in range(2))
    state.progress = progress or Progress(epoch=1, step=10)
    state.totals += torch.tensor([0.1, 1 / 3])
    state.epoch_seconds = 2.5
    state.levels = GreyLevels(torch.ones(6) / 6, torch.full((6, 2041), 9, dtype=torch.uint8))
    state.data = {"images": 5, "shape": [1, 28, 28], "sha256": "0" * 64}
    return state


def everything(state: TrainState) -> dict:
    """All that a checkpoint should hold."""
    networks = {"model": state.model, "ema": state.ema, "guide": state.guide}
    weights = {name: net and dict(net.state_dict()) for name, net in networks.items()}
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    counters = {"progress": state.progress, "seconds": state.epoch_seconds}
    about = {"levels": state.levels and vars(state.levels), "data": state.data}
    return weights | counters | about | {"optimizers": optimizers, "totals": state.totals}


def without_guide() -> TrainState:
    state = trained_state()
    state.guide = None
    return state


# ---- the state of a run


@pytest.mark.parametrize("guided", [True, False])
def test_a_training_state_comes_back_to_the_last_bit(tmp_path, guided):
    progress = Progress(epoch=3, images=128, step=7, seconds=1.25, budget_from=0.5)
    state = trained_state(progress=progress) if guided else without_guide()
    checkpoint.save(tmp_path / "a.pth", CFG, state)
    restored = TrainState.initial(Config(widths=(8, 8), embedding_size=8, seed=1), CPU)
    checkpoint.restore(tmp_path / "a.pth", restored)
    assert_same(everything(restored), everything(state))
    assert Config.from_dict(checkpoint.load(tmp_path / "a.pth")["config"]) == CFG


def test_a_restored_state_saves_the_same_file_again(tmp_path):
    checkpoint.save(tmp_path / "a.pth", CFG, trained_state())
    state = TrainState.initial(CFG, CPU)
    checkpoint.restore(tmp_path / "a.pth", state)
    checkpoint.save(tmp_path / "b.pth", CFG, state)
    assert_same(checkpoint.load(tmp_path / "b.pth"), checkpoint.load(tmp_path / "a.pth"))


def test_restored_optimizers_keep_their_current_settings(tmp_path):
    checkpoint.save(tmp_path / "a.pth", CFG, trained_state())
    now = Config(widths=(8, 8), embedding_size=8, weight_decay=0.3, muon_momentum=0.8)
    state = TrainState.initial(now, CPU)
    checkpoint.restore(tmp_path / "a.pth", state)
    muon, adamw = (optimizer.param_groups[0] for optimizer in state.optimizers)
    assert (muon["weight_decay"], muon["momentum"], adamw["weight_decay"]) == (0.3, 0.8, 0.3)


def test_the_initial_state_depends_on_the_seed_alone():
    states = []
    for seed in (0, 0, 1):
        torch.rand(3)  # moves on torch's own generator
        states.append(TrainState.initial(Config(widths=(8, 8), embedding_size=8, seed=seed), CPU))
    first, again, other = (dict(state.model.state_dict()) for state in states)
    assert_same(first, again)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])
    assert_same(dict(states[0].ema.state_dict()), first)
    assert not any(p.requires_grad for p in states[0].ema.parameters())
    assert states[0].guide is None


def test_an_epoch_starts_with_its_counters_at_zero():
    state = trained_state(progress=Progress(epoch=2, images=320, step=30, seconds=9.0))
    state.start_next_epoch()
    assert state.progress == Progress(epoch=3, images=0, step=30, seconds=9.0)
    assert state.totals.tolist() == [0, 0]
    assert state.epoch_seconds == 0


def test_weights_of_another_network_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pth", CFG, trained_state())
    contents = checkpoint.load(tmp_path / "a.pth")
    contents["config"]["widths"] = [16, 16]
    torch.save(contents, tmp_path / "a.pth")
    wider = TrainState.initial(Config(widths=(16, 16), embedding_size=8), CPU)
    with pytest.raises(ValueError, match="ema: weights that do not fit"):
        checkpoint.restore(tmp_path / "a.pth", wider)
    with pytest.raises(ValueError, match="ema: weights that do not fit"):
        checkpoint.load_model(tmp_path / "a.pth", CPU)


# ---- the model of a checkpoint


def test_a_model_is_rebuilt_from_the_file_alone(tmp_path):
    cfg = Config(widths=(8, 16), embedding_size=16, img_size=16, blocks=2, guidance=1.5, steps=7)
    state, path = trained_state(cfg), tmp_path / "a.pth"
    checkpoint.save(path, cfg, state)
    loaded = checkpoint.load_model(path, CPU)
    assert loaded.cfg == cfg
    assert (loaded.path, loaded.progress, loaded.device) == (path, state.progress, CPU)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for network, original in ((loaded.model, state.ema), (loaded.guide, state.guide)):
        assert_same(dict(network.state_dict()), dict(original.state_dict()))
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_a_slim_file_has_the_average_and_the_guide_in_half_precision(tmp_path):
    state = trained_state()
    checkpoint.save(tmp_path / "a.pth", CFG, state)
    export.slim(tmp_path / "a.pth", tmp_path / "small.pth")
    loaded = checkpoint.load_model(tmp_path / "small.pth", CPU)
    assert (loaded.cfg, loaded.progress) == (CFG, state.progress)
    for network, original in ((loaded.model, state.ema), (loaded.guide, state.guide)):
        halved = {k: weight.half().float() for k, weight in original.state_dict().items()}
        assert_same(dict(network.state_dict()), halved)
    with pytest.raises(ValueError, match=r"small\.pth.*holds only what drawing needs"):
        checkpoint.restore(tmp_path / "small.pth", TrainState.initial(CFG, CPU))


def test_a_model_may_have_no_guide(tmp_path):
    checkpoint.save(tmp_path / "a.pth", CFG, without_guide())
    export.slim(tmp_path / "a.pth", tmp_path / "small.pth")
    for name in ("a.pth", "small.pth"):
        assert checkpoint.load_model(tmp_path / name, CPU).guide is None


# ---- files of format 3


def save_in_format_3(path: Path, contents: dict, **settings: object) -> Path:
    """Write a checkpoint's contents as the program before this one would have."""
    old = copy.deepcopy(contents)
    config = old["config"]
    config["guide_share"] = config.pop("guide_fraction")
    config["clip_x_0"] = config.pop("clip_loss")  # one setting said both
    old |= {"format": 3, "config": config | settings}
    torch.save(old, path)
    return path


def test_an_old_file_draws_as_config_says_and_a_new_one_as_it_says_itself(tmp_path):
    own = {"sampler": "ddim", "steps": 5, "guidance": 1.5, "eta": 0.7, "clip_x_0": True}
    cfg = Config(widths=(8, 8), embedding_size=8, guide_fraction=0.25, clip_loss=False, **own)
    new = tmp_path / "new.pth"
    checkpoint.save(new, cfg, trained_state(cfg))
    assert checkpoint.load_model(new, CPU).cfg == cfg

    old = save_in_format_3(tmp_path / "old.pth", checkpoint.load(new))
    slim = tmp_path / "slim.pth"
    export.slim(old, slim)
    for path in (old, slim):
        read = checkpoint.load_model(path, CPU).cfg
        assert read.select("sampling") == Config().select("sampling") | {"clip_x_0": False}
        for groups in (("model", "training"), ("length", "machine", "picture")):
            assert read.select(*groups) == cfg.select(*groups)


def test_an_old_file_with_few_timesteps_draws_in_as_many_steps(tmp_path):
    cfg = Config(widths=(8, 8), embedding_size=8, timesteps=6, steps=3)
    checkpoint.save(tmp_path / "new.pth", cfg, trained_state(cfg))
    old = save_in_format_3(tmp_path / "old.pth", checkpoint.load(tmp_path / "new.pth"))
    assert checkpoint.load_model(old, CPU).cfg.steps == 6
    assert checkpoint.load_model(tmp_path / "new.pth", CPU).cfg.steps == 3


def test_the_scripts_train_and_draw_with_an_old_file(tmp_path, run):
    settings = TINY | {"guide_fraction": 0.4, "clip_loss": False, "guidance": 1.5}
    result = run("train.py", **settings, epochs=1, output_dir=tmp_path / "new")
    assert result.code == 0, result
    new = tmp_path / "new" / "models" / "model_epoch_1.pth"
    contents = checkpoint.load(new)
    old = save_in_format_3(tmp_path / "old.pth", contents, guidance=1.5)

    trained_on = []
    for start in (new, old):
        out = tmp_path / f"on_from_{start.stem}"
        length = {"load_checkpoint_path": start, "continue_training_epochs": 1}
        result = run("train.py", **TINY, **length, output_dir=out)
        assert result.code == 0, result
        assert "clip_loss = False, as in the checkpoint (config.py says True)" in result.out
        assert "guide_fraction = 0.4, as in the checkpoint" in result.out
        trained_on.append(checkpoint.load(out / "models" / "model_epoch_2.pth"))
    assert [contents["format"] for contents in trained_on] == [4, 4]
    for part in ("model", "ema", "guide", "optimizers"):
        assert_same(trained_on[1][part], trained_on[0][part])
    assert trained_on[1]["config"]["clip_loss"] is False

    usual = Config().select("sampling")
    draws_with = {old: usual | {"clip_x_0": False}, new: usual | {"guidance": 1.5, "steps": 2}}
    grey = []
    for model, expected in draws_with.items():
        picture = tmp_path / f"{model.stem}.png"
        flags = {"digits": 1, "count": 1, "model": model, "output": picture, "device": "cpu"}
        assert run("generate.py", **flags).code == 0
        recorded = provenance.read(picture)
        assert {name: recorded[name] for name in usual} == expected
        grey.append(np.asarray(Image.open(picture)))
    assert (grey[0] != grey[1]).any()


# ---- writing


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in ("missing", "file"):
        path = tmp_path / folder / "a.pth"
        with pytest.raises(ValueError, match=f"{folder}.*a.pth: cannot be written"):
            checkpoint.save(path, CFG, trained_state())
    assert os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint.save(path, CFG, trained_state())
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ValueError, match=r"a\.pth.*disk is full"):
        checkpoint.save(path, CFG, without_guide())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


# ---- reading


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "text", "cut", "tensor", "pickle", "bomb"]
)
def test_what_is_not_a_checkpoint_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "hello")
    elif kind == "cut":
        checkpoint.save(path, CFG, trained_state())
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"format": 4, "model": Bomb()}))
    elif kind == "bomb":
        torch.save({"format": 4, "model": Bomb()}, path)
    with pytest.raises(ValueError, match=r"bad\.pth") as error:
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "exploded").exists()
    assert list_checkpoints(tmp_path) == []


def test_data_that_are_no_plain_values_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pth", CFG, trained_state())
    contents = checkpoint.load(tmp_path / "a.pth") | {"data": {"images": torch.ones(2)}}
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: not a checkpoint of this program"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("number", [2, 99])
def test_another_format_is_named(tmp_path, number):
    checkpoint.save(tmp_path / "a.pth", CFG, trained_state())
    torch.save(checkpoint.load(tmp_path / "a.pth") | {"format": number}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"format {number}"):
        checkpoint.load(tmp_path / "a.pth")


def test_progress_in_words():
    assert Progress(epoch=3, step=1404).name == "epoch_3"
    assert Progress(epoch=3, images=128, step=1405).name == "epoch_3_step_1405"
    assert str(Progress(epoch=3, images=1280, step=1414)) == "epoch 3 and 1,280 images (step 1,414)"
    assert str(Progress(epoch=3, step=1404)) == "epoch 3 (step 1,404)"


@pytest.mark.parametrize("data", [{"teacher": 5}, [1], "text"])
def test_data_of_another_kind_are_no_checkpoint(tmp_path, data):
    path = tmp_path / "a.pth"
    checkpoint.save(path, CFG, trained_state())
    torch.save(checkpoint.load(path) | {"data": data}, path)
    with pytest.raises(ValueError, match=r"a\.pth: not a checkpoint"):
        checkpoint.load(path)


def test_grey_levels_come_back_and_are_checked(tmp_path):
    cfg, path, cpu = (
        Config(widths=(8, 8), embedding_size=8),
        tmp_path / "a.pth",
        torch.device("cpu"),
    )
    state, again = TrainState.initial(cfg, cpu), TrainState.initial(cfg, cpu)
    curves = torch.randint(0, 256, (6, 2041), dtype=torch.uint8)
    state.levels = GreyLevels(torch.ones(6) / 6, curves)
    checkpoint.save(path, cfg, state)
    checkpoint.restore(path, again)
    for found in (again.levels, checkpoint.load_model(path, cpu).levels):
        assert torch.equal(found.curves, curves)
        assert torch.equal(found.share, state.levels.share)
    wrong = {"share": torch.ones(6), "curves": torch.ones(6)}
    torch.save(checkpoint.load(path) | {"levels": wrong}, path)
    with pytest.raises(ValueError, match=r"a\.pth: its curves of grey levels"):
        checkpoint.load(path)


def test_a_state_whose_batches_cannot_be_divided_is_not_made():
    cfg = Config(widths=(8,), embedding_size=8, batch_size=7, accumulate=8)
    with pytest.raises(ValueError, match="batch_size = 7: cannot be divided among 8 parts"):
        TrainState.initial(cfg, CPU)
