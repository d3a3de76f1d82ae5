"""What a user asks to draw, by flags and by answers."""

import itertools
import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import answers

from config import Config
from interface import picture
from interface.requests import (
    MNIST_COUNTS,
    Request,
    free_name,
    is_folder,
    output_name,
    requests_from_answers,
    requests_from_flags,
    usual_count,
)

CFG = Config(widths=(8, 8), embedding_size=8)
MODEL = Namespace(cfg=CFG, guide=None)


# ---- one file to draw


@pytest.mark.parametrize(
    ("digits", "count", "output", "words"),
    [
        ("7x", 1, "a.png", ("digits = '7x'", "0 to 9")),
        ("", 1, "a.png", ("digits = ''", "0 to 9")),
        ("everything", 1, "a.png", ("digits = 'everything'",)),
        ("7", 0, "a.png", ("count = 0", "at least 1")),
        ("mnist", -3, "a.npz", ("count = -3", "at least 1")),
        ("7", 10**12, "a.png", ("count = 1000000000000", "at most 100,000")),
        ("77", 50_001, "a.npz", ("count = 50001", "at most 100,000")),
        ("all", 10_001, "a.npz", ("count = 10001", "at most 100,000")),
        ("mnist", 100_001, "a.npz", ("count = 100001", "at most 100,000")),
        ("7", 501, "a.gif", ("count = 501", "at most 500", ".gif")),
        ("all", 51, "a.webp", ("count = 51", "at most 500", ".webp")),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused(digits, count, output, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Request(digits, count, CFG, Path(output))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("digits", "count", "output"),
    [
        ("7", 100_000, "a.png"),
        ("all", 10_000, "a.npz"),
        ("mnist", 100_000, "a.npz"),
        ("77", 250, "a.gif"),
        ("all", 50, "a.webp"),
    ],
)
def test_the_largest_requests_are_accepted(digits, count, output):
    largest = 500 if Path(output).suffix in (".gif", ".webp") else 100_000
    assert len(Request(digits, count, CFG, Path(output)).labels) == largest


def test_a_model_of_fewer_digits_draws_those_alone():
    five = replace(CFG, num_classes=5, preview_digits="01234")
    assert Request("all", 2, five, Path("a.png")).labels.tolist() == [0, 1, 2, 3, 4] * 2
    with pytest.raises(ValueError, match="digits = '5': use digits 0 to 4"):
        Request("5", 1, five, Path("a.png"))
    with pytest.raises(ValueError, match="this model was not trained on MNIST"):
        Request("mnist", 1, five, Path("a.npz"))


@pytest.mark.parametrize("output", ["a.png", "a.npz", "a.gif"])
def test_each_variant_has_every_digit_whatever_file_it_goes_to(output):
    number = Request("707", 2, CFG, Path(output)).labels
    assert number.dtype == torch.int64
    assert number.tolist() == [7, 0, 7] * 2
    assert Request("all", 3, CFG, Path(output)).labels.tolist() == list(range(10)) * 3


def test_labels_as_in_mnist_are_as_frequent_and_depend_on_the_seed():
    labels = Request("mnist", 20_000, CFG, Path("a.npz")).labels
    fractions = labels.bincount(minlength=10) / 20_000
    real = torch.tensor(MNIST_COUNTS) / sum(MNIST_COUNTS)
    assert (fractions - real).abs().max() < 0.01
    assert fractions[1] > fractions[5] + 0.01
    again, other = (
        Request("mnist", 20_000, replace(CFG, seed=seed), Path("a.png")).labels for seed in (0, 1)
    )
    assert torch.equal(again, labels)
    assert not torch.equal(other, labels)


def test_the_usual_count_is_sixteen_images_or_sixteen_of_each_digit():
    counts = {"7": 16, "26": 8, "2026": 4, "1" * 17: 1, "all": 16, "mnist": 16}
    assert {digits: usual_count(digits, CFG) for digits in counts} == counts


def test_a_name_is_never_used_twice(tmp_path):
    cfg = replace(CFG, output_dir=str(tmp_path))
    for number in (1, 2, 3):
        path = free_name(cfg, "7")
        assert path == tmp_path / "images" / f"generated_7_00{number}.png"
        path.write_bytes(b"taken")
    assert free_name(cfg, "1" * 30).name == f"generated_{'1' * 20}_001.png"


# ---- by flags


def by_flags(cfg: Config, digits: str, count: int | None, output: object = None) -> list[Request]:
    flags = Namespace(digits=digits, count=count, output=output and str(output))
    flags.complete = flags.edit = flags.mask = None
    return requests_from_flags(flags, cfg)


def test_flags_ask_for_one_file(tmp_path):
    cfg = replace(CFG, output_dir=str(tmp_path))
    (request,) = by_flags(cfg, "26", None)
    assert request == Request(
        "26", 8, cfg, tmp_path / "images" / "generated_26_001.png", "renumber"
    )
    (request,) = by_flags(cfg, "mnist", 50, tmp_path / "a.npz")
    assert request == Request("mnist", 50, cfg, tmp_path / "a.npz")
    assert len(request.labels) == 50


@pytest.mark.parametrize("digits", ["all", "mnist"])
def test_any_kind_of_file_can_have_the_largest_number_of_images(monkeypatch, digits):
    monkeypatch.setattr(picture, "MAX_IMAGES", 20)
    largest = {"all": 2, "mnist": 20}[digits]
    for output in ("a.npz", "a.png"):
        assert len(by_flags(CFG, digits, largest, output)[0].labels) == 20
        with pytest.raises(ValueError, match=f"count = {largest + 1}: .* images; at most 20"):
            by_flags(CFG, digits, largest + 1, output)


def test_a_folder_takes_a_file_for_each_image_each_with_its_own_seed(tmp_path):
    cfg = replace(CFG, seed=11)
    found = by_flags(cfg, "72", 2, f"{tmp_path}/many/")
    assert (tmp_path / "many").is_dir()
    names = ["7_seed11.png", "2_seed12.png", "7_seed13.png", "2_seed14.png"]
    assert [request.output for request in found] == [tmp_path / "many" / name for name in names]
    for request, seed in zip(found, itertools.count(11), strict=False):
        assert request.cfg == replace(CFG, seed=seed)
        assert (request.digits, request.count) == (request.output.name[0], 1)
    labels = Request("mnist", 5, cfg, tmp_path).labels.tolist()
    assert [int(r.digits) for r in by_flags(cfg, "mnist", 5, tmp_path / "many")] == labels


def test_a_label_too_long_for_a_file_name_is_cut(tmp_path):
    names = ["犬" * 250, "猫" * 80]
    cfg = replace(CFG, num_classes=2, class_names="/".join(names), preview_digits="all")
    for request, name in zip(by_flags(cfg, "all", 1, f"{tmp_path}/x/"), names, strict=True):
        request.output.touch()
        assert request.digits == name
        assert request.output.name.startswith(name[:50] + "_seed")


def test_a_folder_that_has_one_of_the_files_is_refused(tmp_path):
    (tmp_path / "2_seed1.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"2_seed1\.png: exists already"):
        by_flags(CFG, "72", 1, tmp_path)


def test_seeds_beyond_the_largest_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"seed = 4294967296.*at most"):
        by_flags(replace(CFG, seed=2**32 - 1), "77", 1, f"{tmp_path}/many/")
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_a_known_kind_of_file_or_a_folder(tmp_path):
    for name in ("a.png", "a.npz", "a.gif", "a.webp", "new/", "."):
        assert output_name(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    for name in ("a.jpg", "a", "a.png.txt", "a.PNG"):
        with pytest.raises(ArgumentTypeError, match=r"must end in \.png, \.npz, .*a folder"):
            output_name(f"{tmp_path}/{name}")
    for name in ("no/a.png", "no/such/"):
        with pytest.raises(ArgumentTypeError, match=r"no folder .*make it first"):
            output_name(f"{tmp_path}/{name}")


def test_a_folder_is_known_by_its_slash_or_by_being_one(tmp_path):
    assert is_folder(f"{tmp_path}/new/")
    assert is_folder(str(tmp_path))
    assert not is_folder(f"{tmp_path}/new")
    assert not is_folder(None)


# ---- by answers


def test_answers_become_requests_and_the_last_answers_are_the_defaults(tmp_path, monkeypatch):
    cfg = replace(CFG, output_dir=str(tmp_path), guidance=1.5)
    answers(monkeypatch, "4", "3", "2", "2026", "", "", "all", "1", "", "7", "2", "0")
    found = []
    for request in itertools.islice(requests_from_answers(cfg, 5, MODEL), 4):
        request.output.write_bytes(b"taken")
        found.append((request.digits, request.count, request.cfg.guidance, request.output.name))
        assert request.cfg.seed == 5
    assert found == [
        ("4", 3, 2.0, "generated_4_001.png"),
        ("2026", 3, 2.0, "generated_2026_001.png"),
        ("all", 1, 2.0, "generated_all_001.png"),
        ("7", 2, 0.0, "generated_7_001.png"),
    ]


def test_the_first_defaults_are_the_usual_count_and_the_models_guidance(tmp_path, monkeypatch):
    cfg = replace(CFG, output_dir=str(tmp_path), guidance=1.5)
    answers(monkeypatch, "26", "", "")
    request = next(requests_from_answers(cfg, 5, MODEL))
    assert (request.count, request.cfg.guidance) == (8, 1.5)


def test_without_a_seed_every_picture_gets_one_of_its_own(tmp_path, monkeypatch):
    answers(monkeypatch, *["4", "1", ""] * 3)
    cfg = replace(CFG, output_dir=str(tmp_path))
    asked = itertools.islice(requests_from_answers(cfg, None, MODEL), 3)
    assert len({request.cfg.seed for request in asked}) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("1x", "1"), "digits = '1x': use digits 0 to 9"),
        (("mnist", "1"), "digits = 'mnist': use digits 0 to 9"),
        (("1" * 21, "1"), "too long: 20 labels at most"),
        (("1", "100001"), "'100001' is not a whole number from 1 to 100000"),
        (("1", "3", "strong"), "'strong' is not a number such as 1 or 1.5"),
        (("1", "3", "inf"), "guidance = inf: must be at most 1000000000"),
        (("1", "3", "-2000"), "guidance = -2000.0: must be at least -1000"),
        (("1", "3", "0"), "guidance = 0: the model cannot draw without a label"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_an_answer_that_makes_no_sense_is_asked_for_again(
    tmp_path, monkeypatch, capsys, lines, message
):
    wrong = len(lines) if lines[0] == "1" else 1  # after how many answers there is a complaint
    answers(monkeypatch, *lines[:wrong], *["1", "1", "1"][wrong - 1 :])
    model = Namespace(cfg=replace(CFG, label_dropout=0.0), guide="any")
    request = next(requests_from_answers(replace(CFG, output_dir=str(tmp_path)), 0, model))
    assert request.digits == "1"
    assert message in capsys.readouterr().err


def test_of_many_labels_fewer_variants_can_be_asked_for(tmp_path, monkeypatch, capsys):
    answers(monkeypatch, "1", "10001", "1", "all", "10001", "", "1")
    asked = requests_from_answers(replace(CFG, output_dir=str(tmp_path)), 0, MODEL)
    assert next(asked).count == 10001
    assert next(asked).count == 10000  # ten labels: what Enter takes then
    assert "'10001' is not a whole number from 1 to 10000" in capsys.readouterr().err


def test_a_label_called_q_can_be_drawn(tmp_path, monkeypatch, capsys):
    labels = {"num_classes": 2, "class_names": "p/q", "preview_digits": "all"}
    letters = replace(CFG, **labels, output_dir=str(tmp_path))
    answers(monkeypatch, "q", "1", "1", "quit")
    asked = requests_from_answers(letters, 0, MODEL)
    assert next(asked).digits == "q"
    assert "for help, quit to quit" in capsys.readouterr().err
    with pytest.raises(EOFError):
        next(asked)


def test_what_is_drawn_is_said_in_a_few_words():
    def how(**settings: object) -> str:
        return Request("7", 1, Config(seed=3, **settings), Path("a.png")).how

    assert how() == "dpmpp, eta 0.3, 13 steps, guidance 2.8, seed 3"
    assert how(sampler="ddpm", guidance=1) == "ddpm, 13 steps, guidance 1, seed 3"
    assert how(steps=1) == "dpmpp, eta 0.3, 1 step, guidance 2.8 (at no time), seed 3"


def test_a_link_to_nothing_is_a_name_that_is_taken(tmp_path):
    cfg = replace(CFG, output_dir=str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "generated_7_001.png").symlink_to(tmp_path / "gone.png")
    assert free_name(cfg, "7").name == "generated_7_002.png"


def test_a_grid_that_could_not_be_read_again_is_not_drawn():
    large = replace(CFG, img_size=256)
    most = 170_000_000 // 258**2
    assert Request("7", most, large, Path("a.png"))
    with pytest.raises(ValueError, match=f"images; at most {most:,}"):
        Request("7", most + 1, large, Path("a.png"))
    for other in ("a.npz", "folder"):
        assert Request("7", most + 1, large, Path(other))
    names = "/".join(f"label {i}" for i in range(160))
    many = replace(large, num_classes=160, class_names=names, preview_digits="all")
    assert usual_count("all", many) == 15  # not 16, which would be too many
