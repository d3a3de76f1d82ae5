import ast
import sys
from dataclasses import fields

import pytest
from conftest import REPO, assert_one_line

from config import (
    Config,
    Parser,
    add_flags,
    given_flags,
    merge,
    parse_digits,
    parse_duration,
)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", "30", "type int"),
        ("epochs", True, "type int"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "finite"),
        ("guidance", float("inf"), "finite"),
        ("label_dropout", 1.5, "at most 1"),
        ("schedule", "quadratic", "linear, cosine, sigmoid"),
        ("prediction", "noise", "eps, v, x_0"),
        ("sampler", "euler", "ddpm, ddim, dpmpp"),
        ("img_size", 30, "multiple of 4"),
        ("widths", (), "at least one"),
        ("widths", (32, 60), "multiple of 8"),
        ("widths", (32, "64"), "finite number"),
        ("embedding_size", 33, "multiple of 2"),
        ("preview_digits", "12a", "digits 0 to 9"),
        ("preview_digits", "", "digits 0 to 9"),
        ("budget", "10", "10m"),
        ("seed", -1, "at least 0"),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_the_remedy(field, value, remedy):
    with pytest.raises(ValueError, match=field) as error:
        Config(**{field: value})
    shown = value[-1] if field == "widths" and value and value[-1] == 60 else value
    assert repr(shown) in str(error.value)
    assert remedy in str(error.value)


def test_three_levels_need_a_size_they_can_halve():
    with pytest.raises(ValueError, match="multiple of 8"):
        Config(widths=(8, 8, 8), img_size=28)
    Config(widths=(8, 8, 8), img_size=32)


def test_every_field_is_a_flag_under_its_own_name_but_lr():
    parser = Parser(prog="test")
    add_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for f in fields(Config):
        assert ("--lr" if f.name == "learning_rate" else f"--{f.name}") in flags
        assert f.metadata["help"]


def test_only_given_flags_are_seen_and_parsed_to_the_fields_type():
    parser = Parser(prog="test")
    add_flags(parser)
    words = "--lr 1e-3 --widths 16,24 --no-clip_x_0 --epochs 3 --schedule linear"
    given = given_flags(parser.parse_args(words.split()))
    assert given == {
        "learning_rate": 1e-3, "widths": (16, 24), "clip_x_0": False, "epochs": 3,
        "schedule": "linear",
    }  # fmt: skip
    assert given_flags(parser.parse_args([])) == {}


def test_a_wrong_flag_is_one_line(run):
    assert_one_line(run("train.py", "--epoch", "3"), "--epoch", "--help")
    assert_one_line(run("train.py", "--epochs", "three"), "--epochs", "three")
    assert_one_line(run("train.py", "--epochs", "0"), "epochs = 0", "at least 1")


def test_an_edited_default_is_checked_like_a_flag(tmp_path):
    from conftest import start_script

    for path in REPO.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "config.py":
            assert "batch_size: int = knob(128" in text
            text = text.replace("batch_size: int = knob(128", "batch_size: int = knob(-3")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    process = start_script(str(tmp_path / "train.py"))
    output = process.communicate()[0]
    assert process.returncode == 2
    assert output == "train.py: batch_size = -3: must be at least 1\n"


def test_a_checkpoints_settings_survive_knobs_that_come_and_go():
    values = Config(widths=(16, 24), epochs=7).to_dict()
    assert Config.from_dict(values) == Config(widths=(16, 24), epochs=7)
    values["knob_of_the_future"] = 1
    del values["grad_clip"]
    assert Config.from_dict(values) == Config(widths=(16, 24), epochs=7)


def test_going_on_flags_win_then_the_checkpoint_then_config():
    trained = Config(batch_size=64, learning_rate=1e-3, output_dir="theirs", device="cuda")
    cfg, notes = merge(trained, {"learning_rate": 2e-3})
    assert (cfg.learning_rate, cfg.batch_size) == (2e-3, 64)
    assert (cfg.output_dir, cfg.device) == (Config().output_dir, Config().device)
    assert any("learning_rate = 0.002" in note and "0.001" in note for note in notes)
    assert any("batch_size = 64" in note and "128" in note for note in notes)
    with pytest.raises(ValueError, match=r"widths.*trained with"):
        merge(trained, {"widths": (8,)})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5m", 30)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "0s", "1d", "5 minutes"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="10m"):
        parse_duration(text)


def test_digits():
    assert parse_digits("707") == [7, 0, 7]
    for text in ("", "7x", "-1", "٣", "7 7"):
        with pytest.raises(ValueError, match="digits 0 to 9"):
            parse_digits(text)
    with pytest.raises(ValueError, match="0 to 4"):
        parse_digits("5", num_classes=5)


def test_config_needs_the_standard_library_alone():
    tree = ast.parse((REPO / "config.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
