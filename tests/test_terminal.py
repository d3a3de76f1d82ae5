"""Pictures as characters, on streams that stand for terminals of every kind, and questions."""

import builtins
import io
import re

import pytest
import torch

from interface import terminal


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


def test_a_person_is_told_of_what_does_not_fit(sized):
    assert shown(digits(500), Screen())[-1] == "(452 more in the file)"
    sized(20, 24)
    assert "20 columns wide" in shown(digits(1, 240), Screen())[0]


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


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let a person type these lines, and then Ctrl-D."""
    typed = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_a_question_is_asked_until_the_answer_makes_sense(monkeypatch, capsys):
    answers(monkeypatch, "many", "0", "17", "1" * 5000, " 16 ")
    assert terminal.ask("How many", 4, terminal.whole_number(16)) == 16
    captured = capsys.readouterr()
    assert captured.out == ""  # stdout is only for the paths of written files
    assert captured.err.count("How many [4]: ") == 5
    for wrong in ("many", "0", "17", "1" * 5000):
        assert f"  '{wrong}' is not a whole number from 1 to 16\n" in captured.err


def test_enter_takes_the_default_where_there_is_one(monkeypatch, capsys):
    answers(monkeypatch, "")
    assert terminal.ask("How many", 4, terminal.whole_number(16)) == 4
    answers(monkeypatch, "", "3")
    assert terminal.ask("How many", None, terminal.whole_number(16)) == 3
    assert "'' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [("q",), ("Q",), ("x", "q"), ()], ids=str)
def test_q_and_the_end_of_the_input_end_the_questions(monkeypatch, lines):
    answers(monkeypatch, *lines)
    with pytest.raises(EOFError):
        terminal.ask("How many", 4, terminal.whole_number(16))


def test_a_question_mark_shows_the_help(monkeypatch, capsys):
    answers(monkeypatch, "?", "5")
    assert terminal.ask("How many", 4, terminal.whole_number(16)) == 5
    assert "2026" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2.5", "-1", "1e1", "", "0", "17", "½"])
def test_what_is_not_a_whole_number_is_refused(text):
    with pytest.raises(ValueError, match="not a whole number from 1 to 16"):
        terminal.whole_number(16)(text)


def test_the_sampling_bar_counts_every_state_of_every_batch(monkeypatch):
    totals, updates = [], []

    class Bar:
        def __init__(self, total: int, **look: object) -> None:
            totals.append(total)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self) -> None:
            updates.append(1)

    monkeypatch.setattr(terminal, "tqdm", Bar)
    with terminal.sampling_bar(steps=5, batches=3) as on_state:
        on_state(0, torch.zeros(4, 1, 28, 28))
    assert totals == [3 * 6]  # from the noise over five steps, three times
    assert updates == [1]


def test_an_answer_in_another_encoding_is_named(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(ValueError, match="answers on stdin must be in utf-8"):
        terminal.ask("Digits", None, str)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (list("0123456789"), ["7     draws this alone", "2026  draws these side by side"]),
        (["cat", "dog"], ["cat          draws this alone", "cat,dog,cat  draws these"]),
        (list("ab"), ["a    draws this alone", "aba  draws these"]),
        (["one"], ["one      draws this alone", "one,one  draws these"]),
    ],
)
def test_help_speaks_of_the_labels_that_there_are(names, words, monkeypatch, capsys):
    answers(monkeypatch, "?", "1")
    assert terminal.ask("What to draw", None, str, names) == "1"
    shown = capsys.readouterr().err
    for word in (*words, "?", "all", "q or quit ends"):
        assert word in shown
    assert "{" not in shown


def test_labels_called_q_quit_and_question_mark_can_be_drawn(monkeypatch, capsys):
    names = ["?", "q", "z"]
    for label in names[:2]:
        answers(monkeypatch, label)
        assert terminal.ask("What to draw", None, str, names) == label
    answers(monkeypatch, "?", "3")  # no label is asked for here
    assert terminal.ask("How many", 4, terminal.whole_number(16), names) == 3
    assert "; quit ends;" in capsys.readouterr().err
    for question in (("What to draw", None, str, names), ("How many", 4, str, ["quit"])):
        answers(monkeypatch, "quit")
        with pytest.raises(EOFError):
            terminal.ask(*question)
    assert terminal.quit_words(["q", "quit"]) == ["Ctrl-D"]
