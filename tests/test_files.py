"""Files: written whole or not at all, and checked before they are read."""

import os

import pytest

from files import atomic_write

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
