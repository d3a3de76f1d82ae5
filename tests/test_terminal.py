"""Pictures as characters, on streams that stand for terminals of every kind."""

import io
import re

import pytest
import torch

import terminal


class Screen(io.TextIOWrapper):
    """A terminal as a stream sees one."""

    def __init__(self, encoding: str = "utf-8", tty: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def sized(monkeypatch):
    def set_size(columns: int, lines: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("WT_SESSION", "1")  # what Windows has for TERM
        monkeypatch.delenv("NO_COLOR", raising=False)

    set_size(80, 24)
    return set_size


def shown(tiles: torch.Tensor, screen: Screen) -> list[str]:
    terminal.show(tiles, screen)
    return screen.text().splitlines()


def digits(count: int, width: int = 24) -> torch.Tensor:
    """Black pictures with a white bar in the middle."""
    tiles = torch.zeros(count, 1, 24, width, dtype=torch.uint8)
    tiles[..., width // 3 : width // 2] = 255
    return tiles


def visible(line: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", line)


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(sized, columns):
    sized(columns, 50)
    for encoding in ("utf-8", "ascii"):
        for width in (24, 48, 96):
            lines = shown(digits(16, width), Screen(encoding))
            assert "wide" in lines[0] if width > 4 * columns else len(lines) >= 4
            assert all(len(visible(line)) <= columns for line in lines if "wide" not in line)


def test_sixteen_digits_fit_an_ordinary_terminal(sized):
    lines = shown(digits(16), Screen())
    assert len(lines) <= 20
    assert "more" not in lines[-1]


def test_what_does_not_fit_is_told(sized):
    assert shown(digits(500), Screen())[-1] == "(452 more in the file)"
    sized(20, 24)
    assert "20 wide" in shown(digits(1, 240), Screen())[0]


def test_half_blocks_are_grey_above_grey_below(sized):
    tile = torch.tensor([[0, 255], [128, 128]], dtype=torch.uint8)[None, None]
    assert shown(tile, Screen()) == [
        "\x1b[38;5;16;48;5;244m▀\x1b[38;5;231;48;5;244m▀\x1b[0m"
    ]  # black over grey, white over grey


def test_the_nearest_grey_of_the_palette():
    palette = {16: 0, 231: 255} | {232 + i: 8 + 10 * i for i in range(24)}
    for value in range(256):
        best = min(abs(grey - value) for grey in palette.values())
        assert abs(palette[terminal.grey_of_256(value)] - value) == best


def test_plain_characters_where_the_terminal_knows_no_better(sized, monkeypatch):
    plain = [shown(digits(1), Screen("ascii"))]
    plain.append(shown(digits(1), Screen(tty=False)))
    monkeypatch.setenv("NO_COLOR", "1")
    plain.append(shown(digits(1), Screen()))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("WT_SESSION")
    plain.append(shown(digits(1), Screen()))
    assert all(lines == plain[0] for lines in plain)
    assert set("".join(plain[0])) == {" ", "@"}
