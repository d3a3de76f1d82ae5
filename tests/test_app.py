"""app.py: what its page does, called directly, and the page in a browser.

The tests marked `browser` need gradio, playwright and Chromium.
"""

import base64
import html
import re
import shutil
import signal
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from conftest import MNIST, REPO, assert_one_line, start_script
from PIL import Image

import app
from app import Between, Studio, slerp
from checkpoint import TrainState, load_model, save
from config import Config
from data import load_split
from interface import provenance
from interface.original import KEEP
from system.randomness import ImageNoise

CPU = torch.device("cpu")
STUDENT = REPO / "results" / "models" / "student.pth"
TINY = {"widths": (8, 8), "embedding_size": 8, "steps": 3, "data_dir": MNIST}
TINY |= {"preview_digits": "all"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(app, "FORMING", 0.0)


@pytest.fixture(scope="module")
def student() -> Studio:
    return Studio(load_model(STUDENT, CPU), {"data_dir": MNIST})


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Make a model with these settings and random weights."""

    def make(**settings: object) -> Studio:
        cfg = Config(**TINY | settings)
        state = TrainState.initial(cfg, CPU)
        for weight in state.ema.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        path = tmp_path_factory.mktemp("untrained") / "models" / "model_epoch_1.pth"
        path.parent.mkdir()
        save(path, cfg, state)
        return Studio(load_model(path, CPU), {"data_dir": MNIST})

    return make


def pictures(page: str) -> list[bytes]:
    """The picture files that a page shows."""
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', page)
    return [base64.b64decode(content) for content in found]


def pixels(file: bytes, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "pixels.png"
    path.write_bytes(file)
    return np.asarray(Image.open(path)).astype(int)


def sketch(tmp_path: Path, at: tuple = np.s_[4:24, 12:16]) -> str:
    """What the canvas sends of a vertical line, or of what is white elsewhere."""
    canvas = np.zeros((28, 28), np.uint8)
    canvas[at] = 255
    Image.fromarray(canvas).resize((280, 280), Image.Resampling.NEAREST).save(tmp_path / "s.png")
    return "data:image/png;base64," + base64.b64encode((tmp_path / "s.png").read_bytes()).decode()


def test_the_picture_forms_and_ends_as_the_file_that_generate_writes(run, student, tmp_path):
    *states, page = student.draw("2026", "5", False)
    assert len({pictures(state)[0] for state in states}) == student.loaded.cfg.steps + 1
    assert [f"step {i} of 4" in state for i, state in enumerate(states)] == [True] * 5
    flags = {"model": STUDENT, "digits": 2026, "count": 1, "seed": 5, "device": "cpu"}
    assert run("generate.py", **flags, output=tmp_path / "same.png").code == 0
    assert pictures(page) == [(tmp_path / "same.png").read_bytes()]
    assert 'download="2026_seed5.png"' in page


def test_settings_are_those_of_generate(run, untrained, tmp_path):
    studio = untrained()
    *_, page = studio.draw(" 70 ", "3", False, 1.5, 6, "ddim")
    flags = {"digits": 70, "count": 1, "seed": 3, "guidance": 1.5, "steps": 6, "sampler": "ddim"}
    flags |= {"model": studio.loaded.path, "device": "cpu", "output": tmp_path / "same.png"}
    assert run("generate.py", **flags).code == 0
    assert pictures(page) == [(tmp_path / "same.png").read_bytes()]


def test_no_seed_is_a_new_one(student):
    first, second = ([*student.draw("7", "", False)][-1] for _ in range(2))
    assert pictures(first) != pictures(second)


def test_a_picture_stands_beside_the_nearest_training_images(student, tmp_path):
    *_, page = student.draw("41", "0", True)
    shown = pixels(pictures(page)[1], tmp_path)[2:30, 2:-2]
    images, labels = load_split(Config(data_dir=MNIST), True, CPU)
    for tile, digit in zip(np.split(shown, 2, axis=1), (4, 1), strict=True):
        same = (images[:, 0] == torch.from_numpy(tile)).flatten(1).all(dim=1)
        assert labels[same].tolist() == [digit]


@pytest.mark.parametrize("keep", KEEP)
def test_completions_keep_their_half_and_can_be_reproduced(run, student, tmp_path, keep):
    *_, page = student.complete(sketch(tmp_path), "1", keep, "0")
    out = tmp_path / "out.png"
    [file] = pictures(page)
    out.write_bytes(file)
    grid = np.asarray(Image.open(out))
    tiles = [grid[r : r + 28, c : c + 28] for r in (2, 32) for c in (2, 32)]
    kept = {"top": np.s_[:14], "bottom": np.s_[14:], "left": np.s_[:, :14]}
    kept = kept.get(keep, np.s_[:, 14:])
    line = np.asarray(Image.open(tmp_path / "s.png").resize((28, 28), Image.Resampling.BOX))
    for tile in tiles:
        assert np.abs(tile[kept].astype(int) - line[kept]).max() < 40  # Pillow resizes smoothly
    assert len({tile.tobytes() for tile in tiles}) == app.COMPLETIONS
    again = run("generate.py", reproduce=out, output=tmp_path / "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == file


def test_the_ends_of_a_morph_are_the_pictures_of_its_seeds(run, untrained, tmp_path):
    studio = untrained(sampler="ddpm")
    *_, page = studio.morph("70", "3", "4", 5)
    moving, strip = pictures(page)
    (tmp_path / "morph.webp").write_bytes(moving)
    assert Image.open(tmp_path / "morph.webp").n_frames == 8  # there and back
    strip = pixels(strip, tmp_path)
    columns = app.MOST_LABELS // 2
    tiles = [strip[2 + 30 * (i // columns) :, 2 + 58 * (i % columns) :] for i in range(5)]
    flags = {"model": studio.loaded.path, "digits": 70, "count": 1, "sampler": "ddim", "eta": 0.0}
    for seed, tile in ((3, tiles[0]), (4, tiles[-1])):
        out = tmp_path / f"{seed}.png"
        assert run("generate.py", **flags, seed=seed, device="cpu", output=out).code == 0
        drawn = np.asarray(Image.open(out)).astype(int)[2:30, 2:-2]
        assert np.abs(tile[:28, :56] - drawn).max() <= 1


def test_noise_between_two_seeds_is_noise():
    def ends() -> list[ImageNoise]:
        return [ImageNoise(seed, range(2), (1, 28, 28)) for seed in (3, 4)]

    a, b = (end.draw() for end in ends())
    between = Between(ends(), 5)
    steps = between.draw().unflatten(0, (5, 2))
    assert torch.equal(steps[0], a)
    assert torch.equal(steps[-1], b)
    assert torch.allclose(steps.std(dim=(2, 3, 4)), torch.ones(5, 2), atol=0.1)
    assert torch.allclose(slerp(a, b, 0.25), steps[1])
    assert between.uniform().shape == (10,)


def test_labels_have_names(untrained):
    studio = untrained(dataset="folder", num_classes=3, class_names="cat/<b>/dog")
    *_, page = studio.draw("dog,<b>", "1", False, 1.0, 2, "ddim")
    assert "dog,&lt;b&gt;, seed 1" in page
    assert "<b>" not in page
    with pytest.raises(ValueError, match="use cat, <b>, dog"):
        next(studio.draw("2", "1", False))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("20x6", "0", False), "digits = '20x6': use digits 0 to 9"),
        (("", "0", False), "digits = '': use digits 0 to 9"),
        (("all", "0", False), "digits = 'all': use digits 0 to 9"),
        (("123456789", "0", False), "digits = '123456789': too many; draw at most 8"),
        (("7", "-1", False), "seed = '-1': write a whole number, or nothing for any"),
        (("7", "x", False), "seed = 'x': write a whole number"),
        (("7", "4294967296", False), "seed = 4294967296: must be at most 4294967295"),
        (("7", "0", False, None, 3, "ddim"), "guidance = None: must be of type float"),
        (("7", "0", False, 1.0, 0, "ddim"), "steps = 0: must be at least 1"),
        (("7", "0", False, 1.0, 101, "ddim"), "steps = 101: too many; choose at most 100"),
        (("7", "0", False, 1.0, 3, "euler"), "sampler = 'euler': choose one of ddpm, ddim"),
        (("7", "0", False, 9.0, 1, "ddim"), "guidance = 9: no sampling time"),
        (("7", "9" * 5000, False), "seed = '999"),
    ],
)
def test_wrong_input_is_named(untrained, values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        next(untrained().draw(*values))


def test_what_cannot_be_drawn_is_named(student, tmp_path):
    with pytest.raises(ValueError, match=r"guidance = 2\.0: a student learned"):
        next(student.draw("7", "0", False, 2.0))
    with pytest.raises(ValueError, match="second seed = 3: choose another"):
        next(student.morph("7", "3", "3", 5))
    with pytest.raises(ValueError, match="draw one half first"):
        next(student.complete("", "7", "top", "0"))
    with pytest.raises(ValueError, match="its bottom half is empty; draw there"):
        next(student.complete(sketch(tmp_path, np.s_[4:12, 12:16]), "7", "bottom", "0"))
    for hostile in ("data:image/png;base64,AAAA", "x" * 10**6):
        with pytest.raises(ValueError, match=r"cannot be read as|too large a file; clear"):
            next(student.complete(hostile, "7", "top", "0"))

    with pytest.raises(ValueError, match="half to keep = None: choose one of top, bottom"):
        next(student.complete(sketch(tmp_path, np.s_[4:12, 12:16]), "7", None, "0"))


def test_all_letters_are_too_many(untrained):
    letters = {"num_classes": 12, "class_names": "/".join("abcdefghijkl")}
    with pytest.raises(ValueError, match="digits = 'all': too many; draw at most 8"):
        next(untrained(dataset="folder", **letters).draw("all", "0", False))


def test_a_missing_value_is_a_message_too(student):
    class Error(Exception):
        def __init__(self, message: str, print_exception: bool) -> None:
            super().__init__(message)

    draw = app.in_one_line(types.SimpleNamespace(Error=Error), student.draw)
    for values in ((None, "0", False), ("7", None, False)):
        with pytest.raises(Error, match="a value is missing; fill in every field"):
            next(draw(*values))

    def buggy(*_: object) -> Iterator[str]:
        raise TypeError("not the user's")
        yield

    with pytest.raises(TypeError, match="not the user's"):
        next(app.in_one_line(types.SimpleNamespace(Error=Error), buggy)("7"))


def test_a_model_of_many_steps_draws_in_fewer(untrained):
    *states, _ = untrained(steps=500, sampler="ddim").morph("7", "0", "1", 3)
    assert "step 100 of 100" in states[-1]


def test_the_page_needs_gradio_and_a_place(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    assert_one_line(run("app.py", model=STUDENT), "gradio", "requirement-extra.txt")
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    assert_one_line(run("app.py", model="nothing"), "model = 'nothing'")
    assert_one_line(run("app.py", port=99999), "port = 99999")
    assert_one_line(run("app.py", host="ü..x"), "host = 'ü..x', port = any", "choose others")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run("app.py", port=port), f"port = {port}", "choose others")


# In a browser


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The address of a page that draws with the student."""
    folder = tmp_path_factory.mktemp("home")
    flags = {"model": STUDENT, "data_dir": MNIST, "device": "cpu"}
    process = start_script("app.py", flags, cwd=folder)
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), line + process.stdout.read()
        yield line
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().splitlines() == ["app.py: stopped"]
        assert process.wait() == 130
        assert list(folder.iterdir()) == []  # nothing is left


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Open the page as a new user; nothing may be asked of any other address."""
    contexts, asked = [], []

    def open_it(width: int = 1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(urlparse(request.url)))
        page.goto(address)
        page.get_by_text("2026, seed").wait_for()  # it opens with a picture
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert {url.hostname for url in asked if url.scheme != "data"} == {"127.0.0.1"}


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def fill(page, label: str, text: str) -> None:
    page.locator("input, textarea").and_(page.get_by_label(label)).locator("visible=true").fill(
        text
    )


def saved(page, tmp_path: Path) -> Path:
    """The file that the link under the picture saves."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").locator("visible=true").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


WATCH = """() => {
  window.seen = new Set()
  new MutationObserver(() => {
    const image = document.querySelector("#Draw img")
    if (image) window.seen.add(image.src)
  }).observe(document.body, {subtree: true, childList: true, attributes: true})
}"""


@pytest.mark.browser
def test_2026_forms_and_is_saved_so_that_generate_reproduces_it(visit, run, tmp_path):
    page = visit()
    page.evaluate(WATCH)
    fill(page, "Seed", "7")
    press(page, "Draw")
    page.get_by_text(re.compile(r"2026, seed 7\b")).wait_for()
    assert page.evaluate("window.seen.size") >= 6  # five states and the file
    image = page.locator("#Draw img")
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert image.bounding_box()["width"] > 4 * 116
    path = saved(page, tmp_path)
    assert path.name == "2026_seed7.png"
    again = run("generate.py", reproduce=path, output=tmp_path / "again.png")
    assert again.code == 0, again.err


@pytest.mark.browser
def test_half_a_digit_is_completed_and_cleared(visit, run, tmp_path):
    page = visit(width=390)
    page.get_by_role("tab", name="Complete").click()
    press(page, "Complete")
    page.get_by_text("draw one half first").wait_for()
    page.get_by_label("Close").click()
    page.get_by_test_id("toast-body").wait_for(state="detached")
    page.locator("canvas").scroll_into_view_if_needed()
    box = page.locator("canvas").bounding_box()
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + 0.3 * side, y + 0.2 * side)
    page.mouse.down()
    for right, down in ((0.7, 0.2), (0.5, 0.6)):
        page.mouse.move(x + right * side, y + down * side, steps=10)
    page.mouse.up()
    page.get_by_label("What it is").click()
    page.get_by_role("option", name="7").click()
    press(page, "Complete")
    page.get_by_text("7, seed").wait_for()
    path = saved(page, tmp_path)
    assert provenance.read(path)["original"]
    again = run("generate.py", reproduce=path, output=tmp_path / "again.png")
    assert again.code == 0, again.err
    tile = np.asarray(Image.open(path))[2:16, 2:30]
    assert tile[5, 9:19].min() > 200  # the bar of the 7
    press(page, "Clear")
    press(page, "Complete")
    page.get_by_text("draw one half first").last.wait_for()


@pytest.mark.browser
def test_two_seeds_morph(visit, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Morph").click()
    press(page, "Morph")
    page.get_by_text("from seed 0 to seed 1 and back").wait_for()
    assert Image.open(saved(page, tmp_path)).n_frames == 14


@pytest.mark.browser
def test_a_mistake_is_one_line_on_the_page(visit):
    page = visit()
    wrong = "<i>20x6"
    fill(page, "Digits", wrong)
    press(page, "Draw")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert f"digits = '{wrong}': use digits 0 to 9" in toast.inner_text()
    assert html.escape(wrong, quote=False) in toast.inner_html()


@pytest.mark.browser
def test_two_users_at_once_get_their_own_pictures(visit, tmp_path):
    wanted = {"11": visit(), "777": visit()}
    files = []
    for _ in range(2):  # both at once, and then one after the other
        for digits, page in wanted.items():
            fill(page, "Digits", digits)
            fill(page, "Seed", digits)
            press(page, "Draw")
            if files:
                page.wait_for_timeout(1500)
        for digits, page in wanted.items():
            page.get_by_text(re.compile(rf"{digits}, seed {digits}\b")).wait_for()
            record = provenance.read(saved(page, tmp_path))
            assert (record["digits"], record["seed"]) == (digits, int(digits))
            files.append((tmp_path / f"{digits}_seed{digits}.png").read_bytes())
    assert files[:2] == files[2:]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(visit, width):
    page = visit(width)
    for tab in ("Draw", "Complete", "Morph"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_a_student_has_no_settings(student, untrained):
    import gradio

    def labels(studio: Studio) -> set[str]:
        parts = app.build(gradio, studio).config["components"]
        return {part["props"].get("label") for part in parts}

    adjustable = {"Guidance", "Steps", "Sampler"}
    assert not adjustable & labels(student)
    assert adjustable <= labels(untrained())


def test_guidance_that_a_model_never_learned_is_refused(untrained):
    studio = untrained(label_dropout=0.0, guide_fraction=0)
    with pytest.raises(ValueError, match="cannot draw without a label"):
        next(studio.draw("7", "3", False, 0.0, 3, "ddim"))


def test_images_that_a_model_was_not_trained_on_are_not_shown_as_such(untrained, monkeypatch):
    studio = untrained()
    studio.loaded.data = {"images": 60_000, "shape": [1, 28, 28], "sha256": "0" * 64}
    with pytest.raises(ValueError, match=r"data_dir = .* was trained on other images"):
        [*studio.draw("7", "3", True, 1.0, 3, "ddim")]
