"""Files: written whole or not at all, and checked before they are read."""

import os
import zipfile

import numpy as np
import pytest
import torch
from conftest import unix

from system import files
from system.files import atomic_write, make_folder

# ---- writing


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    for text in (b"first", b"second, and longer"):
        before = path.read_bytes() if path.exists() else None
        with atomic_write(path) as file:
            file.write(text)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == text
        assert os.listdir(tmp_path) == ["a.txt"]
    os.link(path, tmp_path / "same file")
    with atomic_write(path) as file:
        file.write(b"third")
    assert (tmp_path / "same file").read_bytes() == text  # replaced, not written over


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), ValueError, r"a\.txt.*disk is full"),
        (OSError("encoder error"), ValueError, r"a\.txt.*encoder error"),
        (TypeError("no bytes"), TypeError, "no bytes"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "no error number", "mistake", "ctrl-c"],
)
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(
    tmp_path, error, raised, message, existed
):
    path = tmp_path / "a.txt"
    if existed:
        path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half of it")
            raise error

    with pytest.raises(raised, match=message):
        write()
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == (
        {"a.txt": b"old"} if existed else {}
    )


def test_a_new_file_never_replaces_one_that_came_first(tmp_path, monkeypatch):
    path = tmp_path / "a.png"

    def write() -> None:
        with atomic_write(path, replace=False) as file:
            file.write(b"new")

    write()
    with pytest.raises(FileExistsError):
        write()
    path.write_bytes(b"mine")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    with pytest.raises(FileExistsError):
        write()
    assert path.read_bytes() == b"mine"
    path.unlink()
    write()  # on a file system without hard links
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_cannot_be_written_is_known_beforehand(tmp_path):
    files.check_writable(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "no" / "a.json", "no such folder.*make it first"),
        (tmp_path / "file" / "a.json", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ValueError, match=rf"{path}: cannot be written \({words}"):
            files.check_writable(path)
    files.make_folder(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="file: cannot be written"):
        files.make_folder(tmp_path / "file")


def test_names_of_the_longest_length_can_be_written(tmp_path):
    with atomic_write(tmp_path / ("数" * 80 + ".png")) as file:
        file.write(b"x")


# ---- reading


def test_tensors_come_back_as_they_were(tmp_path):
    contents = {"a": torch.randn(3, 4), "b": [1, 2.5, "text", None]}
    files.write_tensors(tmp_path / "a.pth", contents)
    found = files.read_tensors(tmp_path / "a.pth", "a test")
    assert torch.equal(found["a"], contents["a"])
    assert found["b"] == contents["b"]
    looked_at = files.read_tensors(tmp_path / "a.pth", "a test", only_look=True)
    assert looked_at["b"] == contents["b"]


@pytest.mark.parametrize("compressed", [True, False])
def test_tensors_that_were_compressed_or_damaged_are_refused(tmp_path, compressed):
    whole, path = tmp_path / "a.pth", tmp_path / "b.pth"
    files.write_tensors(whole, {"a": torch.arange(1000.0)})
    if compressed:  # would allow a small file to fill the memory
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    else:
        content = bytearray(whole.read_bytes())
        content[content.index(np.float32(500).tobytes())] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: damaged, or not a test \("):
        files.read_tensors(path, "a test")


def test_messages_are_one_printable_line():
    assert files.first_line(ValueError("first\nsecond")) == "first"
    assert files.first_line(ValueError("\x1b]0;owned\x07")) == "?]0;owned?"
    assert files.first_line(EOFError()) == "EOFError"
    assert files.cannot_write(OSError(28, "No space left on device")).startswith(
        "cannot be written (the disk is full)"
    )


@unix
def test_a_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: cannot be written \(it is a device"):
        files.check_writable(tmp_path / "pipe.json")


def test_a_folder_may_hold_a_folder_of_any_name(tmp_path):
    (tmp_path / "file").mkdir()
    make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_too_many_bytes_are_neither_written_nor_read(tmp_path, monkeypatch):
    paths = tmp_path / "a.pth", tmp_path / "a.safetensors"
    files.write_tensors(paths[0], {"a": torch.zeros(1000)})
    files.write_safetensors(paths[1], {"a": {"b": torch.zeros(1000)}})
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="it holds more than"):
        files.read_tensors(paths[0], "a test")
    with pytest.raises(ValueError, match="it holds more than"):
        files.read_safetensors(paths[1])
    with pytest.raises(ValueError, match=r"b\.pth: would hold more than"):
        files.write_tensors(tmp_path / "b.pth", {"a": torch.zeros(1000)})
    assert sorted(tmp_path.iterdir()) == list(paths)
