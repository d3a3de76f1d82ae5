"""Command lines: flags, rules between flags, which value wins, and how errors end a script."""

import io
import os
import re
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import REPO, assert_one_line, start_script, unix

from config import MODEL_SIZES, Config
from interface.cli import Parser, add_settings, expanded_path, given_settings, quote, run_script
from interface.flags import add_model_size
from interface.settings import settings_for_drawing, settings_for_training


@pytest.fixture
def parse(monkeypatch) -> Callable[[Parser, str], Namespace]:
    def parse_it(parser: Parser, line: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["test.py", *line.split()])
        return parser.parse_args()

    return parse_it


@pytest.fixture
def refusal(parse, capsys) -> Callable[[Parser, str], str]:
    """The message with which a parser refuses a command line, and exits with 2."""

    def refusal_of(parser: Parser, line: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(parser, line)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refusal_of


def parser_with(*flags: str) -> Parser:
    parser = Parser(prog="test.py")
    for flag in flags:
        parser.add_argument(flag, nargs="?")
    return parser


# ---- flags


def test_every_setting_has_a_flag_of_its_own_name_but_for_lr():
    parser = Parser(prog="test.py")
    add_settings(parser, [f.name for f in fields(Config)])
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for f in fields(Config):
        assert ("--lr" if f.name == "learning_rate" else f"--{f.name}") in flags
        assert f.metadata["help"]


def test_a_parser_has_only_the_settings_that_were_added(parse, refusal):
    parser = Parser(prog="test.py")
    add_settings(parser, Config.names("length"))
    assert given_settings(parse(parser, "--epochs 3 --budget 5m")) == {"epochs": 3, "budget": "5m"}
    assert "--seed" in refusal(parser, "--seed 3")


def test_only_given_flags_are_seen_and_parsed_to_the_settings_type(parse):
    parser = Parser(prog="test.py")
    add_settings(parser, [f.name for f in fields(Config)])
    line = "--lr 1e-3 --widths 16,24 --no-clip_x_0 --epochs 3 --schedule linear"
    expected = {"learning_rate": 1e-3, "widths": (16, 24), "clip_x_0": False}
    assert given_settings(parse(parser, line)) == expected | {"epochs": 3, "schedule": "linear"}
    assert given_settings(parse(parser, "")) == {}


def test_help_shows_the_default_of_each_setting():
    parser = Parser(prog="test.py")
    add_settings(parser, ("widths", "eta", "sampler", "clip_x_0"))
    shown = " ".join(parser.format_help().split())
    for words in ("(default: 32,64)", "(default: 0.3)", "{ddpm,ddim,dpmpp}", "(default: True)"):
        assert words in shown


def test_a_wrong_flag_is_one_line(run):
    assert_one_line(run("train.py", "--epoch", 3), "--epoch", "--help")
    assert_one_line(run("train.py", epochs="three"), "--epochs", "three")
    assert_one_line(run("train.py", epochs=0), "epochs = 0", "at least 1")
    for widths in ("32,x", "32,", "-8", ""):
        assert_one_line(run("train.py", f"--widths={widths}"), "--widths", "such as 32,64")


# ---- rules


def test_a_flag_that_needs_another_is_refused_alone(parse, refusal):
    parser = parser_with("--count", "--digits", "--picture")
    parser.needs("--count", "--digits", "--picture")
    message = refusal(parser, "--count 3")
    assert message == "test.py: --count needs --digits or --picture (--help lists every flag)\n"
    assert refusal(parser, "--count=3") == message
    for line in ("", "--digits 7", "--count 3 --digits 7", "--picture=a --count=3"):
        parse(parser, line)


def test_flags_that_exclude_each_other_are_refused_together(parse, refusal):
    parser = parser_with("--images", "--model", "--sweep", "--seed")
    parser.excludes("--images", "--model", "--sweep", message="one thing at a time")
    for line in ("--images a --model b", "--sweep a --images b", "--images=a --model=b"):
        assert refusal(parser, line) == "test.py: one thing at a time (--help lists every flag)\n"
    for line in ("", "--images a", "--model a --sweep b", "--images a --seed 3"):
        parse(parser, line)


def test_a_flag_that_allows_only_some_others_is_refused_with_the_rest(parse, refusal):
    parser = parser_with("--reproduce", "--output", "--seed")
    parser.allows_only("--reproduce", "--output")
    for line in ("--reproduce a --seed 3", "--seed=3 --output b --reproduce=a"):
        assert "--reproduce allows only --output" in refusal(parser, line)
    for line in ("", "--reproduce a", "--reproduce a --output b", "--output b --seed 3"):
        parse(parser, line)


# ---- which value wins


def test_in_training_flags_win_over_the_checkpoint_and_the_checkpoint_over_config():
    trained = Config(batch_size=64, learning_rate=1e-3, output_dir="theirs", device="cuda")
    cfg, notes = settings_for_training(trained, {"learning_rate": 2e-3})
    assert (cfg.learning_rate, cfg.batch_size) == (2e-3, 64)
    assert (cfg.output_dir, cfg.device) == (Config().output_dir, Config().device)
    assert notes == [
        "batch_size = 64, as in the checkpoint (config.py says 128)",
        "learning_rate = 0.002 (the checkpoint had 0.001)",
    ]


def test_where_files_are_and_how_long_a_run_is_need_no_note():
    trained = Config(output_dir="theirs", data_dir="their_data", epochs=7, budget="5m")
    cfg, notes = settings_for_training(trained, {"output_dir": "mine"})
    assert (cfg.output_dir, cfg.data_dir, cfg.budget) == ("mine", Config().data_dir, "5m")
    assert notes == []
    _, notes = settings_for_training(trained, {"epochs": 9})
    assert notes == ["epochs = 9 (the checkpoint had 7)"]


@pytest.mark.parametrize("name", Config.names("model", "student"))
def test_no_setting_of_the_model_can_change_once_it_is_trained(name):
    trained = Config(widths=(16, 24), num_classes=10)
    others = {"widths": (8,), "schedule": "linear", "prediction": "v"}
    others |= {"attention": True, "bypass": False}
    others |= {
        "teacher": "other",
        "img_channels": 3,
        "img_size": 56,
        "patch_size": 1,
        "embedding_size": 64,
        "num_classes": 9,
    }
    own = getattr(trained, name)
    cfg, _ = settings_for_training(trained, {name: own})  # naming its value does no harm
    assert getattr(cfg, name) == own
    other = others.get(name, own + 1 if type(own) is int else 0.3)
    flags = {name: other} | ({"preview_digits": "0"} if name == "num_classes" else {})
    with pytest.raises(ValueError, match=rf"^{name} = .*trained with"):
        settings_for_training(trained, flags)


@pytest.mark.parametrize(("name", "other"), [("batch_size", 64), ("max_images", 9), ("seed", 5)])
def test_what_orders_the_images_cannot_change_inside_an_epoch(name, other):
    cfg, _ = settings_for_training(Config(), {name: other}, mid_epoch=False)
    assert getattr(cfg, name) == other
    with pytest.raises(ValueError, match=f"^{name} = {other}: .*inside an epoch"):
        settings_for_training(Config(), {name: other}, mid_epoch=True)
    cfg, _ = settings_for_training(Config(), {"learning_rate": 0.1}, mid_epoch=True)
    assert cfg.learning_rate == 0.1


def test_in_drawing_flags_win_over_the_models_own_sampling_settings():
    own = {"sampler": "ddim", "steps": 7, "guidance": 1.5, "guidance_low": 0.1}
    own |= {"guidance_high": 0.8, "eta": 0.7, "clip_x_0": False}
    assert set(own) == set(Config.names("sampling"))
    trained = Config(**own, widths=(8, 8), timesteps=50)
    assert settings_for_drawing(trained, {}).select("sampling") == own
    given = {"steps": 9, "clip_x_0": True}
    cfg = settings_for_drawing(trained, given)
    assert cfg.select("sampling") == own | given
    assert cfg.select("model") == trained.select("model")
    with pytest.raises(ValueError, match="steps = 51: must be at most timesteps = 50"):
        settings_for_drawing(trained, {"steps": 51})


def test_in_drawing_guidance_that_would_never_act_is_refused():
    for given in ({"guidance_low": 0.9}, {"guidance_high": 0.3}, {"guidance_low": 1.0}):
        with pytest.raises(ValueError, match=r"guidance_low = .* below guidance_high = .* never"):
            settings_for_drawing(Config(guidance_low=0.4, guidance_high=0.9), given)
    settings_for_drawing(Config(guidance_low=0.4, guidance_high=0.9), {"guidance_low": 0.89})
    # A model or a picture may have such settings from an earlier version
    settings_for_drawing(Config(guidance_low=0.9, guidance_high=0.9), {})
    settings_for_drawing(Config(), {}, {"guidance_low": 0.9, "guidance_high": 0.9})


def test_in_drawing_the_seed_the_folders_and_the_device_come_from_config():
    theirs = {"output_dir": "theirs", "data_dir": "their_data", "device": "cuda", "compile": True}
    theirs |= {"seed": 5, "sample_batch_size": 3, "precision": "bf16", "match_levels": False}
    assert set(theirs) == set(Config.names("machine", "picture"))
    trained = Config(**theirs)
    here = settings_for_drawing(trained, {})
    assert here.select("machine", "picture") == Config().select("machine", "picture")
    cfg = settings_for_drawing(trained, {"seed": 9, "device": "cpu"})
    assert (cfg.seed, cfg.device, cfg.output_dir) == (9, "cpu", Config().output_dir)


# ---- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("steps = 0"), 2, "a.py: steps = 0"),
        (FileNotFoundError("no such folder"), 2, "a.py: no such folder"),
        (FloatingPointError("not finite"), 1, "a.py: not finite"),
        (
            RuntimeError("can't allocate memory: 9 TB\nat"),
            2,
            "can't allocate memory: 9 TB; choose a smaller --batch_size",
        ),
        (MemoryError(), 2, "a.py: out of memory; choose a smaller"),
        (RuntimeError("CPUAllocator: not enough memory: you tried"), 2, "choose a smaller"),
        (torch.cuda.OutOfMemoryError("CUDA is full"), 2, "a.py: CUDA is full; choose a smaller"),
        (KeyboardInterrupt(), 130, "a.py: stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_that_a_user_can_cause_is_one_line(error, code, line, capsys, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script("a.py", main)
    assert stop.value.code == code
    shown = capsys.readouterr().err.strip()
    assert line in shown
    assert len(shown.splitlines()) == 1


def test_a_programming_error_is_one_line_that_asks_for_a_report(capsys):
    def main():
        raise RuntimeError("shapes do not match\nat conv2d")

    with pytest.raises(SystemExit) as stop:
        run_script("a.py", main)
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("a.py: RuntimeError: shapes do not match; a bug: report it with")
    assert "TRACEBACK=1" in shown
    assert shown.count("\n") == 1


def test_traceback_in_the_environment_shows_where_an_error_comes_from(monkeypatch):
    def main():
        raise ValueError("steps = 0")

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="steps = 0"):
        run_script("a.py", main)


def test_a_scripts_exit_code_is_what_its_main_returns():
    for code in (0, 143):
        with pytest.raises(SystemExit) as stop:
            run_script("a.py", lambda code=code: code)
        assert stop.value.code == code


# ---- streams


class Broken(io.StringIO):
    """A stream that lost its reader."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


def test_what_cannot_be_printed_is_dropped(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken())

    def main() -> int:
        print("to nobody")
        print("to nobody", file=sys.stderr, flush=True)
        return 5

    with pytest.raises(SystemExit) as stop:
        run_script("a.py", main)
    assert stop.value.code == 5


def test_characters_that_an_encoding_lacks_become_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with pytest.raises(SystemExit):
        run_script("a.py", lambda: print("汉字 ±") or 0)
    assert raw.getvalue() == b"\\u6c49\\u5b57 \\xb1\n"


def test_streams_that_the_shell_closed_are_replaced(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        run_script("a.py", lambda: len(sys.stdin.read()) + (print("x", file=sys.stderr) or 0))
    assert stop.value.code == 0


# ---- words on the command line


def test_a_home_folder_is_found_after_an_equals_sign(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    parser = Parser(prog="test.py")
    add_settings(parser, Config.names("machine"))
    parser.add_argument("--model", type=expanded_path)
    args = parse(parser, "--output_dir=~/r --data_dir ~/d --model=~/m.pth")
    assert args.output_dir.replace("\\", "/") == "/home/me/r"
    assert args.data_dir.replace("\\", "/") == "/home/me/d"
    assert args.model == Path("/home/me/m.pth")
    odd = "~nobody-of-this-name.pth"  # as editors name their copies
    assert parse(parser, f"--model {odd}").model == Path(odd)


def test_a_negative_number_is_not_taken_for_a_flag(parse, refusal):
    parser = Parser(prog="test.py")
    add_settings(parser, ["guidance"])
    for text in ("-1", "-.5", "-1e-1", "-2.5e+2"):
        assert parse(parser, f"--guidance {text}").guidance == float(text)
    assert "--guidance is empty" in refusal(parser, "--guidance=--")


def test_a_flag_whose_variable_was_not_set_is_refused(refusal):
    parser = Parser(prog="test.py")
    add_settings(parser, ["budget", "teacher"])
    for flag in ("--budget", "--teacher"):
        assert f"{flag} is empty" in refusal(parser, f"{flag}=")


@pytest.mark.skipif(os.name == "nt", reason="quotes as a POSIX shell does")
def test_a_command_to_paste_comes_back_as_it_was():
    words = ["R&D", "it's", "$HOME", "a b", "汉字"]
    assert shlex.split(quote(words)) == words


@unix
def test_ctrl_c_while_importing_is_one_line(tmp_path):
    stops = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass"
    (tmp_path / "torch.py").write_text(stops)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = start_script("train.py", {"epochs": 1}, env=environment)
    assert process.communicate()[0] == "train.py: stopped\n"
    assert process.returncode == -signal.SIGINT


def test_an_old_python_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 10, 0)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = start_script("train.py", {"epochs": 1}, env=environment)
    text = process.communicate()[0]
    assert re.fullmatch(r"Python [\d.]+ is too old; install 3.11 or later\n", text), text
    assert process.returncode == 2


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = start_script("train.py", {"epochs": 1}, env=environment)
    text = process.communicate()[0]
    assert text == "train.py: no torch here; pip install -r requirement.txt\n"
    assert process.returncode == 1


def test_a_script_leaves_nothing_for_python_to_warn_of():
    shipped = {"load_checkpoint_path": Path(REPO, "results", "models", "student.pth")}
    process = start_script("train.py", shipped, env=os.environ | {"PYTHONWARNINGS": "error"})
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "planned" in text
    assert "Warning" not in text


def test_a_size_of_the_network_is_several_settings_and_their_own_flags_win(parse):
    parser = Parser(prog="a.py")
    add_model_size(parser)
    add_settings(parser, Config.names("model"))
    args = parse(parser, "--model_size base --blocks 1")
    assert given_settings(args) == MODEL_SIZES["base"] | {"blocks": 1}


@pytest.mark.parametrize("word", ["foo\nbar\x1b[31m", "--load_checkpoint_path=/tmp/a\nb.pth"])
def test_a_line_break_in_an_argument_neither_cuts_nor_splits_the_message(run, word):
    result = run("train.py", word)
    assert_one_line(result, "--help lists every flag")
    assert "\x1b" not in result.err
