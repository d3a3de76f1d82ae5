"""Data sets other than MNIST: one's own pictures, and MNIST's relatives by torchvision."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, REPO, TINY, assert_one_line, unix
from PIL import Image

import checkpoint
import other_data
from config import Config
from data import fingerprint, load_split
from evaluation.classifier import own_classifier
from other_data import class_names, open_picture, to_pixels, with_classes
from system.values import parse_labels

CPU = torch.device("cpu")
NETWORK = {"widths": "8,8", "embedding_size": 8, "batch_size": 8, "preview_columns": 2, "steps": 2}
NETWORK |= {"dataset": "folder", "device": "cpu"}


def make_folder(root: Path, names: list[str], count: int = 11, mode: str = "L", **sizes) -> Path:
    """Pictures of one brightness for each label, of several sizes and formats."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            side = sizes.get("side", 20 + 7 * i)
            level = round(255 * (index + 1) / len(names))
            colour = level if mode == "L" else (level, 0, 255 - level)
            ending = "png" if i % 2 else "jpg"
            Image.new(mode, (side, side + 3), colour).save(root / name / f"{i}.{ending}")
    return root


def folder(root: Path, **settings) -> Config:
    return with_classes(Config(), {"dataset": "folder", "data_dir": str(root), **settings})


NAMES = ["cat", "dog with hat", "七"]


def test_a_folder_becomes_images_and_labels(tmp_path):
    cfg = folder(make_folder(tmp_path, NAMES), img_size=32)
    assert cfg.label_names == NAMES
    assert (cfg.num_classes, cfg.null_class) == (3, 3)
    images, labels = load_split(cfg, train=True, device=CPU)
    assert (images.shape, images.dtype) == ((30, 1, 32, 32), torch.uint8)
    for label, level in enumerate((85, 170, 255)):
        assert (labels == label).sum() == 10
        assert (images[labels == label].int() - level).abs().max() <= 2  # JPEG rounds
    _, their_labels = load_split(cfg, train=False, device=CPU)
    assert their_labels.sort()[0].tolist() == [0, 1, 2]  # a tenth is set aside
    _, few_labels = load_split(folder(tmp_path, img_size=32, max_images=15), True, CPU)
    assert set(few_labels.tolist()) == {0, 1, 2}  # not the first label alone


def test_colour(tmp_path):
    cfg = folder(make_folder(tmp_path, NAMES, mode="RGB"), img_channels=3)
    images, labels = load_split(cfg, train=True, device=CPU)
    assert images.shape == (30, 3, 28, 28)
    mean = images[labels == 0].float().mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([85.0, 0.0, 170.0]), atol=3, rtol=0)


@pytest.mark.parametrize(("count", "per_label"), [(1, 3), (200, 1)])
def test_one_label_and_many(tmp_path, count, per_label):
    cfg = folder(make_folder(tmp_path, [f"kind {i:03d}" for i in range(count)], per_label))
    assert cfg.num_classes == count
    _, labels = load_split(cfg, train=True, device=CPU)
    assert set(labels.tolist()) == set(range(count))
    assert len(load_split(cfg, train=False, device=CPU)[0]) > 0


def test_what_cannot_be_read_is_named_and_counted(tmp_path, capsys):
    make_folder(tmp_path, NAMES)
    whole = (tmp_path / "cat" / "0.jpg").read_bytes()
    (tmp_path / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])  # cut off
    (tmp_path / "cat" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "cat" / "notes.txt").write_text("is no picture, and not meant to be one")
    images, _ = load_split(folder(tmp_path), train=True, device=CPU)
    said = capsys.readouterr().out
    assert "left out 2 of 34 pictures" in said
    for name in ("0.jpg", "broken.png"):
        assert str(tmp_path / "cat" / name) in said
    assert len(images) == 29


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(), "has 0 subfolders, needs one for each label"),
        (lambda root: (root / "cat").mkdir(parents=True), "no .png or .jpg that can be read"),
        (lambda root: make_folder(root, ["cat"]) and (root / "dog").mkdir(), "dog"),
    ],
)
def test_a_folder_without_pictures(run, tmp_path, make, words):
    make(tmp_path / "pictures")
    flags = NETWORK | {"data_dir": tmp_path / "pictures", "output_dir": tmp_path / "out"}
    assert_one_line(run("train.py", **flags, epochs=1), words)
    assert not (tmp_path / "out" / "models").exists()


def test_results_among_the_labels_would_be_labels(run, tmp_path):
    pictures = make_folder(tmp_path / "pictures", NAMES)
    for out in (pictures, pictures / "results"):
        result = run("train.py", **NETWORK, data_dir=pictures, output_dir=out, epochs=1)
        assert_one_line(result, f"output_dir = '{out}'", "whose folders are labels")
    assert sorted(path.name for path in pictures.glob("[!.]*")) == sorted(NAMES)


@unix
def test_what_is_no_file_is_left_out_and_odd_names_are_shown_safely(tmp_path, capsys):
    make_folder(tmp_path, ["cat", "dog"])
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "a\x1b]0;owned\a.png").write_text("no picture")
    load_split(folder(tmp_path), True, CPU)
    said = capsys.readouterr().out
    assert "left out 2 of" in said
    assert "pipe.png (not a file)" in said
    assert "a?]0;owned?.png" in said


def test_a_run_on_own_pictures_from_training_to_drawing_by_name(run, tmp_path):
    pictures, out = make_folder(tmp_path / "pictures", NAMES), tmp_path / "out"
    flags = NETWORK | {"data_dir": pictures, "output_dir": out}
    trained = run("train.py", **flags, epochs=2)
    assert trained.code == 0, trained
    grid = Image.open(out / "images" / "samples_epoch_2.png")
    assert grid.height == 3 * 30 + 2  # a row for each label, with its name on the left
    assert grid.width > 2 * 30 + 2 + 50
    drawing = {"output_dir": out, "device": "cpu", "count": 2}
    all_size = grid.size
    for asked, size in {"七": (32, 62), "cat,七,cat": (3 * 28 + 4, 62), "all": all_size}.items():
        drawn = run("generate.py", **drawing, digits=asked)
        assert drawn.code == 0, drawn
        assert Image.open(drawn.out.strip()).size == size
        again = run("generate.py", reproduce=drawn.out.strip(), output_dir=out)
        assert again.code == 0, again
    drawn = run("generate.py", **drawing, digits="dog with hat", output=f"{tmp_path}/files/")
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == [
        "dog with hat_seed0.png",
        "dog with hat_seed1.png",
    ]
    assert_one_line(run("generate.py", **drawing, digits="bird"), "bird", "cat, dog with hat, 七")
    assert_one_line(run("generate.py", **drawing, digits="mnist"), "not trained on MNIST")
    assert_one_line(run("evaluate.py", output_dir=out), "MNIST")

    make_folder(pictures, ["bird"])  # a label more than the model knows
    result = run("train.py", **flags, resume=True, epochs=3)
    assert_one_line(
        result, "labels 'bird/cat/dog with hat/七'", "the model knows 'cat/dog with hat"
    )
    others = {
        "load_checkpoint_path": out / "models" / "model_epoch_2.pth",
        "output_dir": tmp_path / "b",
    }
    result = run("train.py", **(flags | others), continue_training_epochs=1)
    assert_one_line(result, "has 4 labels, the model 3")
    (pictures / "cat").rename(tmp_path / "cat")
    del flags["dataset"]
    result = run("train.py", **flags, resume=True, epochs=3)
    assert_one_line(result, "bird/dog with hat/七", "the model knows")


def test_the_shipped_model_is_trained_on_with_other_pictures_of_its_shape(run, tmp_path):
    names = [f"kind {i}" for i in range(10)]
    flags = {"data_dir": make_folder(tmp_path / "pictures", names, 2), "dataset": "folder"}
    flags |= {"load_checkpoint_path": REPO / "results" / "models" / "pretrained.pth"}
    flags |= {"continue_training_epochs": 1, "output_dir": tmp_path, "batch_size": 8}
    flags |= {"device": "cpu", "preview_columns": 1, "lr": 1e-9}
    result = run("train.py", **flags)
    assert result.code == 0, result
    contents = checkpoint.load(tmp_path / "models" / "model_epoch_1.pth")
    shipped = checkpoint.load(flags["load_checkpoint_path"])
    assert Config.from_dict(contents["config"]).label_names == names
    for name, weight in shipped["ema"].items():
        torch.testing.assert_close(contents["ema"][name], weight.float(), atol=1e-5, rtol=0)
    make_folder(tmp_path / "pictures", ["one more"])
    assert_one_line(run("train.py", **flags), "has 11 labels, the model 10")


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_mnists_relatives_are_read_by_torchvision(tmp_path, name):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        answers = struct.pack(">2I", 0x801, 20) + labels.tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(answers)
    cfg = with_classes(Config(), {"dataset": name, "data_dir": str(tmp_path)})
    assert len(cfg.label_names) == 10
    assert not any("/" in each for each in cfg.label_names)
    images, found = load_split(cfg, train=True, device=CPU)
    assert np.array_equal(images[:, 0], pixels)
    assert found.tolist() == labels.tolist()


def test_a_relative_that_is_not_there(run, tmp_path):
    flags = TINY | {"dataset": "QMNIST", "data_dir": tmp_path / "no", "output_dir": tmp_path}
    (tmp_path / "no").write_text("")  # where a folder has to be made
    assert_one_line(run("train.py", **flags, epochs=1), "QMNIST", "go online")


def test_a_relative_whose_files_are_damaged(run, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(bytes(100))  # as after a power cut
    flags = TINY | {"dataset": "FashionMNIST", "data_dir": tmp_path, "output_dir": tmp_path / "out"}
    assert_one_line(run("train.py", **flags, epochs=1), "FashionMNIST", "delete", str(raw.parent))


def test_a_data_set_that_is_downloaded_split_by_split(tmp_path, monkeypatch):
    there = set()

    class QMNIST:  # like torchvision's, which downloads only the split that it is asked for
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            there.update({train} if download else ())
            if train not in there:
                raise RuntimeError("Dataset not found")
            self.data = torch.zeros(3, 28, 28, dtype=torch.uint8)
            self.targets = torch.zeros(3, 8, dtype=torch.long)

    datasets = type("datasets", (), {"QMNIST": QMNIST})
    monkeypatch.setattr(other_data, "from_torchvision", lambda name: datasets)
    cfg = Config(dataset="QMNIST", data_dir=str(tmp_path))
    for train in (False, True):
        images, labels = load_split(cfg, train, CPU)
        assert images.shape == (3, 1, 28, 28)
        assert fingerprint(images, labels)["images"] == 3


@pytest.mark.parametrize(("kind", "first"), [("letters", 1), ("digits", 0)])
def test_emnist_lies_on_its_side_and_counts_letters_from_one(kind, first, monkeypatch):
    class EMNIST:  # like torchvision's
        def __init__(self, root: str, split: str, train: bool, download: bool = False) -> None:
            assert split == kind
            self.data = torch.arange(2 * 28 * 28).view(2, 28, 28).remainder(251).byte()
            self.targets = torch.tensor([first, first + 9])

    datasets = type("datasets", (), {"EMNIST": EMNIST})
    monkeypatch.setattr(other_data, "from_torchvision", lambda name: datasets)
    cfg = with_classes(Config(), {"dataset": f"EMNIST-{kind}"})
    images, labels = load_split(cfg, True, CPU)
    assert torch.equal(images[0, 0].T, EMNIST("", kind, True).data[0])
    assert labels.tolist() == [0, 9]
    assert fingerprint(images, labels)["images"] == 2


def test_pictures_of_other_kinds_are_named(tmp_path, capsys):
    root = make_folder(tmp_path, NAMES[:2])
    for name in ("a.webp", "b.HEIC", "notes.txt"):
        (root / "cat" / name).write_bytes(b"")
    load_split(folder(root), True, CPU)
    said = capsys.readouterr().out
    assert "left out all .heic, .webp in" in said
    assert "txt" not in said


def test_pictures_in_the_wrong_place_are_counted_and_hidden_ones_are_not(tmp_path, capsys):
    root = make_folder(tmp_path, NAMES[:2])
    picture = root / "cat" / "1.png"
    (root / "cat" / "more").mkdir()
    for copy in ("cat/more/1.png", "loose.png", "also.JPG", "cat/.hidden.png"):
        shutil.copy(picture, root / copy)
    images, _ = load_split(folder(root), True, CPU)
    said = capsys.readouterr().out
    assert len(images) == 20  # of 22, two are set aside for testing
    assert f"left out 1 folder inside labels, such as {root / 'cat' / 'more'}" in said
    assert f"left out 2 pictures without a label, in {root} itself" in said
    load_split(folder(root), False, CPU)
    assert "left out" not in capsys.readouterr().out


def test_folders_of_labels_that_are_one_level_deeper_are_pointed_to(tmp_path):
    for split in ("test", "train"):
        make_folder(tmp_path / split, NAMES[:2])
    with pytest.raises(ValueError, match=r"test: .* give the --data_dir whose folders are labels$"):
        load_split(folder(tmp_path), True, CPU)


def test_too_few_pictures_to_set_any_aside_is_said(tmp_path, capsys):
    cfg = folder(make_folder(tmp_path, NAMES, count=1))
    assert torch.equal(load_split(cfg, False, CPU)[0], load_split(cfg, True, CPU)[0])
    assert "testing on training ones" in capsys.readouterr().out


def test_a_label_may_be_written_in_either_way_of_unicode():
    one, two = "caf\u00e9", "cafe\u0301"  # as a Mac writes it
    assert parse_labels(one, ["dog", two]) == parse_labels(two, ["dog", one]) == [1]
    assert parse_labels(f"dog,{one}", ["dog", two]) == [0, 1]


def test_letters_are_labels_too():
    cfg = with_classes(Config(), {"dataset": "EMNIST-letters"})
    assert (cfg.num_classes, cfg.label_names[0], cfg.label_names[-1]) == (26, "a", "z")
    assert parse_labels("cab", cfg.label_names) == [2, 0, 1]
    assert class_names(Config(data_dir=MNIST)) == list("0123456789")
    assert with_classes(cfg := Config(data_dir=MNIST), {}) == cfg


def test_labels_by_name():
    assert parse_labels("707", list("0123456789")) == [7, 0, 7]
    assert parse_labels("cat, dog,cat", ["cat", "dog"]) == [0, 1, 0]
    assert parse_labels("a,b", ["a,b", "a", "b"]) == [0]  # a name with a comma
    for wrong in ("", "cow", "cat,", "catdog"):
        with pytest.raises(ValueError, match="use cat, dog"):
            parse_labels(wrong, ["cat", "dog"])


def test_the_preview_can_name_labels_and_odd_folder_names_are_refused(run, tmp_path):
    pictures = make_folder(tmp_path / "pictures", NAMES)
    flags = NETWORK | {"data_dir": pictures, "output_dir": tmp_path, "epochs": 1}
    assert run("train.py", **flags, preview_digits="七,cat").code == 0
    assert Image.open(tmp_path / "images" / "samples_epoch_1.png").height == 62
    assert_one_line(run("train.py", **flags, preview_digits="cow"), "preview_digits = 'cow'", "cat")
    make_folder(pictures, ["all"], 1)
    assert_one_line(run("train.py", **flags), str(pictures / "all"), "rename the folder")


def test_pictures_are_turned_as_the_camera_was_held_and_laid_on_black(tmp_path):
    top_white = np.zeros((28, 28), np.uint8)
    top_white[:14] = 255
    upright, cfg = Image.fromarray(top_white), Config()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to the right
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    transparent = Image.new("LA", (28, 28), (255, 0))
    transparent.paste(Image.new("LA", (28, 14), (255, 255)), (0, 0))
    transparent.save(tmp_path / "transparent.png")
    Image.fromarray(top_white.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("turned", "transparent", "deep"):
        assert np.array_equal(
            to_pixels(open_picture(tmp_path / f"{name}.png"), cfg)[0], top_white
        ), name


def test_a_folder_is_evaluated_with_a_classifier_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.classifier.LEAST_STEPS", 30)
    monkeypatch.setattr("evaluation.classifier.LEAST_STEPS_OF_CAS", 10)
    monkeypatch.setattr("evaluation.two_sample.LEAST_STEPS", 1)
    monkeypatch.setattr("evaluation.two_sample.EPOCHS", 1)
    monkeypatch.setattr("evaluation.metrics.RESAMPLES", 3)
    random = np.random.default_rng(0)
    for label, colour in (("七", (255, 40, 40)), ("a dog", (40, 40, 255)), ("cat", (0, 255, 0))):
        folder = tmp_path / "pictures" / label
        folder.mkdir(parents=True)
        for i in range(500):
            pixels = np.array(colour) * random.random((8, 8, 1))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "results"
    here = {"data_dir": tmp_path / "pictures", "output_dir": out, "device": "cpu"}
    shape = {"dataset": "folder", "img_size": 8, "img_channels": 3, "patch_size": 1, "epochs": 2}
    tiny = {"widths": 8, "dense_size": 16, "embedding_size": 8, "preview_columns": 1, "steps": 3}
    assert run("train.py", **here, **shape, **tiny).code == 0

    found = run("evaluate.py", "--c2st", "--cas", **here)
    assert found.code == 0, found
    assert "training a classifier for these 1,350 images, once" in found.out
    assert "150 images of" in found.out  # every tenth was set aside, and sets the number
    for row in ("FD-folder", "  七 ", "  a dog ", "  cat ", "C2ST, exact pixels", "CAS"):
        assert row in found.out
    [file] = (out / "metrics").glob("model*.json")
    result = json.loads(file.read_text("utf-8"))
    assert result["real"]["agreement"] > 0.95  # colours are easy to tell
    assert result["label_names"] == ["a dog", "cat", "七"]
    again = run("evaluate.py", **here)
    assert "measured before" in again.out + again.err
    assert "training a classifier" not in again.out

    named = run("evaluate.py", "--classify", **here, samples=60)
    assert named.code == 0
    assert "of 60 test images" in named.out


def test_pictures_of_which_none_can_be_set_aside_cannot_be_evaluated(tmp_path):
    cfg = folder(make_folder(tmp_path, [f"kind {i:03d}" for i in range(130)], 1))
    train, test = (load_split(cfg, train=kind, device=CPU) for kind in (True, False))
    with pytest.raises(ValueError, match="no label has a second picture"):
        own_classifier(cfg, train, test)


def test_too_few_pictures_to_evaluate_are_one_line(run, tmp_path):
    for i in range(40):
        folder = tmp_path / "pictures" / ("even" if i % 2 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i * 6).save(folder / f"{i:02}.png")
    out = tmp_path / "results"
    here = {"data_dir": tmp_path / "pictures", "output_dir": out, "device": "cpu"}
    shape = {"dataset": "folder", "img_size": 8, "patch_size": 1, "batch_size": 8, "epochs": 1}
    tiny = {"widths": 8, "dense_size": 0, "embedding_size": 8, "preview_columns": 1, "steps": 2}
    assert run("train.py", **here, **shape, **tiny).code == 0
    refused = run("evaluate.py", **here)
    assert refused.code == 2
    assert "4 test images; the metrics need at least 128; add pictures" in refused.err


def test_a_single_label_cannot_be_judged(run, tmp_path):
    pictures, out = make_folder(tmp_path / "pictures", ["cat"], side=8), tmp_path / "out"
    here = {"data_dir": pictures, "output_dir": out}
    assert run("train.py", **NETWORK, **here, epochs=1, guidance=1).code == 0
    for flags in ({}, {"classify": True}):
        result = run("evaluate.py", **here, device="cpu", **flags)
        assert result.code == 2
        assert "has one label, nothing to tell apart" in result.err


@unix
def test_a_label_with_a_control_character_is_named(tmp_path):
    for name in ("cat", "zebra\u200f"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"zebra\\u200f': has control characters; rename"):
        class_names(Config(dataset="folder", data_dir=str(tmp_path)))


def test_an_output_folder_among_the_labels_is_named_on_resuming_too(tmp_path):
    for name in ("cat", "dog", "more"):
        (tmp_path / name).mkdir()
    cfg = Config(dataset="folder", data_dir=str(tmp_path), preview_digits="all", num_classes=2)
    cfg = replace(cfg, class_names="cat/dog")
    with pytest.raises(ValueError, match=r"output_dir = .*more': is in data_dir"):
        load_split(replace(cfg, output_dir=str(tmp_path / "more")), True, torch.device("cpu"))


def test_labels_that_differ_are_named_among_many(tmp_path):
    known = [f"label{number:02}" for number in range(26)]
    for name in (*known[:13], "label13b", *known[14:]):
        (tmp_path / name).mkdir()
    cfg = Config(dataset="folder", data_dir=str(tmp_path), num_classes=26)
    cfg = replace(cfg, class_names="/".join(known), preview_digits="all")
    with pytest.raises(ValueError, match="different in 'label13/label13b'"):
        load_split(cfg, True, torch.device("cpu"))


def test_qmnists_labels_are_its_first_column(monkeypatch):
    class QMNIST:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.data = torch.zeros(3, 28, 28, dtype=torch.uint8)
            self.targets = torch.arange(24).view(3, 8)

    module = type("datasets", (), {"QMNIST": QMNIST})
    monkeypatch.setattr(other_data, "from_torchvision", lambda name: module)
    _, labels = other_data.read_by_torchvision(Config(dataset="QMNIST"), True)
    assert labels.tolist() == [0, 8, 16]


def test_more_images_than_are_resized_at_a_time_are_all_resized():
    images = torch.randint(0, 256, (4100, 1, 4, 4), dtype=torch.uint8)
    assert other_data.resize(images, Config(img_size=8), True).shape == (4100, 1, 8, 8)


def test_what_folders_can_be_labels(tmp_path, monkeypatch):
    cfg = Config(dataset="folder", data_dir=str(tmp_path))
    for name in ("cat", "dog", ".cache"):
        (tmp_path / name).mkdir()
    assert class_names(cfg) == ["cat", "dog"]
    for name in ("caf\u00e9", "cafe\u0301"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="only in their Unicode form"):
        class_names(cfg)
    monkeypatch.setattr(other_data, "MAX_CLASSES", 2)
    with pytest.raises(ValueError, match="has 4 subfolders, needs one for each label, 1 to 2"):
        class_names(cfg)


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("a.JPG", "b.Png"):
        Image.new("L", (8, 8)).save(tmp_path / "cat" / name)
    for train in (True, False):  # the second picture is set aside
        assert len(other_data.read_folder(folder(tmp_path), train)[0]) == 1


def test_pictures_that_are_too_many_or_too_large_are_refused(tmp_path, monkeypatch):
    cfg = folder(make_folder(tmp_path, ["cat"]))
    monkeypatch.setattr(other_data, "MAX_BYTES", 3 * 784)
    with pytest.raises(ValueError, match="too many pictures; choose a smaller --img_size"):
        other_data.read_folder(cfg, train=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # that one has 810
    with pytest.raises(Image.DecompressionBombWarning):
        open_picture(tmp_path / "cat" / "1.png")


def test_what_cannot_be_read_is_said_once_not_for_each_split(tmp_path, capsys):
    make_folder(tmp_path, ["cat"])
    (tmp_path / "cat" / "broken.png").write_bytes(b"no picture")
    other_data.read_folder(folder(tmp_path), train=False)
    assert capsys.readouterr().out == ""
