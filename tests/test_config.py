import ast
import sys
import types
from dataclasses import fields

import pytest
import torch
from conftest import REPO, copy_program, start_script

from config import ALIASES, BEFORE, Config
from interface.requests import FAST
from model import UNet
from system.values import parse_duration, parse_labels

GROUPS = ("machine", "model", "student", "classes", "training", "length", "sampling", "picture")
SOURCE = (REPO / "config.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", "30", "type int"),
        ("epochs", True, "type int"),
        ("attention", 1, "type bool"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", float("nan"), "finite"),
        ("guidance", float("inf"), "at most"),
        ("label_dropout", 1.5, "at most 1"),
        ("schedule", "quadratic", "linear, cosine, sigmoid"),
        ("prediction", "noise", "eps, v, x_0"),
        ("sampler", "euler", "ddpm, ddim, dpmpp"),
        ("img_size", 30, "multiple of 4"),
        ("widths", (), "at least one"),
        ("widths", (32, 60), "multiple of 8"),
        ("widths", (32, "64"), "type int"),
        ("embedding_size", 33, "multiple of 2"),
        ("preview_digits", "12a", "digits 0 to 9"),
        ("preview_digits", "", "digits 0 to 9"),
        ("budget", "10", "10m"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295"),
    ],
)
def test_a_bad_value_names_the_setting_the_value_and_the_remedy(name, value, remedy):
    with pytest.raises(ValueError, match=f"^{name} = ") as error:
        Config(**{name: value})
    shown = value[-1] if name == "widths" and value else value
    assert repr(shown) in str(error.value)
    assert remedy in str(error.value)


def test_a_whole_number_will_do_for_a_float():
    assert Config(guidance=1).guidance == 1


def test_three_levels_need_a_size_that_can_be_halved_twice():
    with pytest.raises(ValueError, match="multiple of 8"):
        Config(widths=(8, 8, 8), img_size=28)
    Config(widths=(8, 8, 8), img_size=32)


def test_a_level_of_one_pixel_needs_groups_of_two_channels():
    with pytest.raises(ValueError, match=r"widths = \(8, 8, 8\): the last must be at least 16"):
        Config(widths=(8, 8, 8), img_size=28, patch_size=7)
    cfg = Config(widths=(8, 8, 16), embedding_size=8, img_size=28, patch_size=7)
    UNet(cfg)(torch.zeros(1, 1, 28, 28), torch.tensor([1]), torch.tensor([1])).sum().backward()


@pytest.mark.parametrize("steps", [0, 51, -1])
def test_steps_are_at_least_one_and_at_most_the_timesteps(steps):
    for possible in (1, 50):
        Config(timesteps=50, steps=possible)
    with pytest.raises(ValueError, match=f"steps = {steps}: must be at"):
        Config(timesteps=50, steps=steps)


def test_a_preview_takes_only_digits_that_the_model_knows():
    with pytest.raises(ValueError, match=r"preview_digits = '4': .*0 to 3"):
        Config(num_classes=4, preview_digits="4")
    Config(num_classes=4, preview_digits="30")


def edited(old: str, new: str) -> str:
    """The text of config.py after somebody has replaced `old`."""
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size: int = training(128", "batch_size: int = training(-3", "batch_size = -3"),
        ('schedule: str = model("cosine"', 'schedule: str = model("cos"', "schedule = 'cos'"),
        ("model((32, 64)", "model((32, 60)", "widths = 60"),
        ("steps: int = sampling(13", "steps: int = sampling(1001", "steps = 1001"),
        ("training(4e-3", "training(float('nan')", "learning_rate = nan"),
        ('length(""', 'length("soon"', "budget = 'soon'"),
        ('training("0123456789"', 'training("01a"', "preview_digits = '01a'"),
    ],
)
def test_an_edited_default_is_checked_like_a_flag(old, new, message, monkeypatch):
    module = types.ModuleType("edited_config")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look it up
    exec(edited(old, new), module.__dict__)
    with pytest.raises(ValueError, match=message):
        module.Config()


def test_a_bad_edited_default_ends_a_script_with_one_line(tmp_path):
    copy_program(tmp_path)
    bad = edited("batch_size: int = training(128", "batch_size: int = training(-3")
    (tmp_path / "config.py").write_text(bad, encoding="utf-8")
    process = start_script(str(tmp_path / "train.py"), {}, cwd=tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 2
    assert output == "train.py: batch_size = -3: must be at least 1\n"


# ---- groups


def test_every_setting_belongs_to_exactly_one_known_group():
    names = [name for group in GROUPS for name in Config.names(group)]
    assert sorted(names) == sorted(f.name for f in fields(Config))


def test_the_names_of_several_groups_are_in_the_order_of_the_settings():
    assert Config.names(*GROUPS) == tuple(f.name for f in fields(Config))
    assert Config.names("machine") == ("data_dir", "output_dir", "device", "compile")
    assert Config.names("length") == ("epochs", "budget")
    of_pictures = "sampler steps guidance guidance_low guidance_high eta precision seed clip_x_0"
    rest = ("match_levels", "sample_batch_size")
    assert Config.names("picture", "sampling") == (*of_pictures.split(), *rest)


def test_select_gives_the_values_of_groups():
    cfg = Config(epochs=3, budget="5m", device="cpu")
    assert cfg.select("length") == {"epochs": 3, "budget": "5m"}
    assert cfg.select("length", "machine") == {
        **{"data_dir": "mnist_data", "output_dir": "results", "device": "cpu"},
        "compile": False,
        **{"epochs": 3, "budget": "5m"},
    }


def test_fast_changes_only_how_to_draw_and_fits_the_defaults():
    assert set(FAST) <= set(Config.names("sampling"))
    assert Config(**FAST) != Config()


# ---- checkpoints


def test_a_checkpoints_settings_survive_settings_that_come_and_go():
    values = Config(widths=(16, 24), epochs=7).to_dict()
    assert values["widths"] == [16, 24]  # plain values only
    assert Config.from_dict(values) == Config(widths=(16, 24), epochs=7)
    values["setting_of_the_future"] = 1
    del values["grad_clip"]
    assert Config.from_dict(values) == Config(widths=(16, 24), epochs=7)


def test_an_old_checkpoint_goes_on_with_the_network_and_the_loss_that_it_had():
    values = Config().to_dict()
    for name, value in BEFORE.items():
        assert values.pop(name) != value or name == "teacher"  # whose default a user may edit
    assert Config.from_dict(values) == Config(unsquared_snr=0.0, bypass=False)


# A new name, an old name, and a value other than the default
OLD_NAMES = [("guide_fraction", "guide_share", 0.25), ("clip_loss", "clip_x_0", False)]
OLD_NAMES += [("unsquared_snr", "absolute_snr", 3.0)]


def test_every_alias_is_tested():
    assert {new: old for new, old, _ in OLD_NAMES} == ALIASES


@pytest.mark.parametrize(("new", "old", "value"), OLD_NAMES)
def test_a_setting_is_read_under_its_old_name_unless_the_file_has_the_new_one(new, old, value):
    assert value != getattr(Config(), new)
    new_file = Config().to_dict() | {old: value}
    assert getattr(Config.from_dict(new_file), new) == getattr(Config(), new)
    old_file = {name: each for name, each in new_file.items() if name != new}
    assert getattr(Config.from_dict(old_file), new) == value


def test_the_old_clip_x_0_still_says_whether_samplers_clamp():
    for old in (True, False):
        cfg = Config.from_dict({"clip_x_0": old})
        assert (cfg.clip_loss, cfg.clip_x_0) == (old, old)


# ---- texts


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5m", 30)]
)
def test_a_duration_is_a_number_with_a_unit(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "0s", "1d", "5 minutes"])
def test_other_text_is_no_duration(text):
    with pytest.raises(ValueError, match="10m"):
        parse_duration(text)


def test_digits_are_the_labels_of_the_model_and_nothing_else():
    digits = Config().label_names
    assert parse_labels("707", digits) == [7, 0, 7]
    for text in ("", "7x", "-1", "٣", "7 7"):
        with pytest.raises(ValueError, match="digits 0 to 9"):
            parse_labels(text, digits)
    with pytest.raises(ValueError, match="0 to 4"):
        parse_labels("5", digits[:5])


def test_config_needs_only_the_standard_library():
    values = (REPO / "system" / "values.py").read_text(encoding="utf-8")
    for node in (node for source in (SOURCE, values) for node in ast.walk(ast.parse(source))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found = {name.split(".")[0] for name in names if name != "system.values"}
        assert found <= set(sys.stdlib_module_names)
