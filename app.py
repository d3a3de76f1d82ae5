"""Digits on a live page that draws, completes and morphs them: python app.py prints its address."""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import base64
import functools
import html
import os
import secrets
import signal
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import generate
from checkpoint import LoadedModel, load_model
from config import Config
from data import load_split, to_model_range, to_uint8
from evaluation.metrics import nearest
from interface import cli, models, original, picture
from interface.flags import app_flags
from interface.original import KEEP
from interface.requests import Request, labels_named
from interface.settings import check_effects, check_guidance, settings_for_drawing
from pipeline import FROM_NOISE, Pipeline, Start
from system.files import first_line, optional
from system.machine import pick_device
from system.randomness import ImageNoise
from system.values import parse_labels, shortened

MOST_LABELS, MOST_STEPS, MOST_FRAMES = 8, 100, 16  # of one picture
COMPLETIONS = 4  # of a sketch
ADJUSTABLE = ("guidance", "steps", "sampler")  # on the page, except for a student
MOST_SKETCHED = 100_000  # characters; a sketch takes about 5,000
FORMING = 0.5  # seconds that a picture takes at least, for the eye to follow
EMPTY = "<figure><figcaption>The picture forms here.</figcaption></figure>"
CANVAS = """<p>Draw the half to keep, in its place</p>
<canvas width=280 height=280></canvas><button>Clear</button>"""
# Strokes are as wide as MNIST's, a twelfth of the image; the value is what was drawn, as a PNG
PEN = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d")
Object.assign(pen, {lineWidth: 24, lineCap: "round", lineJoin: "round", strokeStyle: "white"})
const line = (event) => {
  const scale = canvas.width / canvas.clientWidth
  pen.lineTo(event.offsetX * scale, event.offsetY * scale)
  pen.stroke()
}
canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId)
  pen.beginPath()
  line(event)
}
canvas.onpointermove = (event) => event.buttons && line(event)
canvas.onpointerup = () => props.value = canvas.toDataURL()
element.querySelector("button").onclick = () => {
  pen.clearRect(0, 0, canvas.width, canvas.height)
  props.value = ""
}
"""
SHOW = """() => document.querySelector("#%s figure").scrollIntoView({block: "nearest"})"""
LOOK = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important}
figure {margin: 0 0 12px; padding: 12px; background: #404040; text-align: center}
figure:only-child {min-height: 230px}
figure img {image-rendering: pixelated; max-width: 100%; height: auto; margin: 0 auto 8px}
figure figcaption, figure a {color: #fff !important}
canvas {display: block; max-width: 100%; margin: 8px 0; touch-action: none; cursor: crosshair}
canvas {background: linear-gradient(#555, #555) 50% / 100% 1px no-repeat,
  linear-gradient(#555, #555) 50% / 1px 100% no-repeat, black}
"""


@dataclass(frozen=True)
class Studio:
    """A model, and what the page does with it: generators of HTML, which raise ValueError for what
    cannot be drawn. Drawing changes nothing here, so that all users share one."""

    loaded: LoadedModel
    given: dict[str, Any]  # settings of this machine

    def request(
        self, digits: str, count: int = 1, start: Start = FROM_NOISE, **settings: Any
    ) -> Request:
        """What generate.py would be asked for."""
        own = self.loaded.cfg
        usual = {} if own.is_student else {"steps": min(own.steps, MOST_STEPS)}
        usual |= {"guidance": 1.0} if self.is_unguided else {}
        cfg, digits = settings_for_drawing(own, self.given | usual | settings), digits.strip()
        parse_labels(digits, cfg.label_names)  # refuses "all", unless a and l are labels
        if len(labels_named(digits, cfg.label_names)) > MOST_LABELS:
            raise ValueError(f"digits = {shortened(digits)}: too many; draw at most {MOST_LABELS}")
        check_guidance(own, cfg, has_guide=self.loaded.guide is not None)
        if settings.get("guidance", own.guidance) != own.guidance:
            check_effects(cfg, {"guidance": cfg.guidance})
        if cfg.steps > MOST_STEPS:
            raise ValueError(f"steps = {cfg.steps}: too many; choose at most {MOST_STEPS}")
        output = Path(f"{digits[:20]}_seed{cfg.seed}.png")
        return Request(digits, count, cfg, output, start=start)

    @property
    def is_unguided(self) -> bool:
        """Whether the model has nothing to be guided by."""
        return self.loaded.guide is None and self.loaded.cfg.label_dropout == 0

    def states(self, request: Request, noise: Any = None) -> Iterator[Tensor]:
        """The states of a picture, uint8 (N, C, H, W), from noise to the image that generate.py
        would draw, unless another `noise` is given."""
        cfg, y = request.cfg, request.labels.to(self.loaded.device)
        loaded, began = self.loaded, time.perf_counter()
        pipeline = Pipeline(cfg, loaded.model, loaded.guide, loaded.levels)
        noise = noise or self.noise(cfg, len(y))
        for step, x in enumerate(pipeline.states(y, noise, request.start.to(y.device))):
            due = began + FORMING * step / cfg.steps
            time.sleep(max(0.0, due - time.perf_counter()))
            yield to_uint8(x).cpu()

    def noise(self, cfg: Config, count: int) -> ImageNoise:
        """What generate.py begins with when it draws `count` images."""
        shape = (cfg.img_channels, cfg.img_size, cfg.img_size)
        return ImageNoise(cfg.seed, range(count), shape, device=self.loaded.device)

    def forming(self, request: Request) -> Iterator[str]:
        """A picture as it forms, then with a link to its file. Returns that and the images."""
        for step, images in enumerate(self.states(request)):
            grid = picture.image_grid(*picture.arrange(images, request.digits, request.count))
            yield figure(grid, f"step {step} of {request.cfg.steps}")
        with tempfile.TemporaryDirectory() as folder:
            request.output = Path(folder, request.output)
            generate.write(self.loaded, request, [images])
            told = f"{request.digits}, seed {request.cfg.seed}"
            page = figure(grid, told, request.output)
        yield page
        return page, images

    def draw(self, digits: str, seed: str, compare: bool, *values: Any) -> Iterator[str]:
        """The picture of some digits; `values` are those of ADJUSTABLE."""
        settings = dict(zip(ADJUSTABLE, values, strict=False))  # a student has none
        request = self.request(digits, seed=seed_from(seed), **settings)
        page, images = yield from self.forming(request)
        if compare:
            distances, index = nearest(images, self.training_images)
            real = picture.arrange(self.training_images[index], request.digits, 1)
            grid = picture.image_grid(*real)
            far = ", ".join(f"{distance:.1f}" for distance in distances.tolist())
            yield page + figure(grid, f"nearest training images, {far} away")

    @functools.cached_property
    def training_images(self) -> Tensor:
        """What the model was trained on, uint8 (N, C, H, W); read when first asked for."""
        cfg = settings_for_drawing(self.loaded.cfg, self.given)
        images, labels = load_split(cfg, True, torch.device("cpu"))
        if not models.fits_data(self.loaded, images, labels):
            other = "the model was trained on other images; start the page with their folder"
            raise ValueError(f"data_dir = {cfg.data_dir!r}: {other}")
        return images

    def complete(self, sketch: str | None, label: str, keep: str, seed: str) -> Iterator[str]:
        """Completions of half a sketch, a PNG as a data: URL."""
        if not sketch:
            raise ValueError("sketch: nothing there; draw one half first")
        if keep not in KEEP:
            raise ValueError(f"half to keep = {shortened(keep)}: choose one of {', '.join(KEEP)}")
        if len(sketch) > MOST_SKETCHED:
            raise ValueError("sketch: too large a file; clear it and draw again")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sketch.png")
            path.write_bytes(base64.b64decode(sketch.partition(",")[2]))
            pixels = original.read(path, self.loaded.cfg)
        known = original.half_of(self.loaded.cfg.img_size, keep)
        if not pixels[:, known].any():
            raise ValueError(f"sketch: its {keep} half is empty; draw there, or keep another half")
        start = Start(to_model_range(pixels), known)
        yield from self.forming(self.request(label, COMPLETIONS, start, seed=seed_from(seed)))

    def morph(self, digits: str, first: str, second: str, frames: int) -> Iterator[str]:
        """The pictures between two seeds, side by side and as an animation."""
        seeds = seed_from(first), seed_from(second)
        if seeds[0] == seeds[1]:
            raise ValueError(f"second seed = {seeds[1]}: choose another than the first")
        sampler = {"ddpm": "ddim"}.get(self.loaded.cfg.sampler, self.loaded.cfg.sampler)
        # No noise is added on the way, or neighbouring frames would differ by chance
        request = self.request(digits, frames, seed=seeds[0], eta=0.0, sampler=sampler)
        labels = len(request.labels) // frames
        ends = [self.noise(replace(request.cfg, seed=seed), labels) for seed in seeds]
        for step, images in enumerate(self.states(request, Between(ends, frames))):
            tiles, _ = picture.arrange(images, request.digits, frames)
            grid = picture.image_grid(tiles, max(1, MOST_LABELS // labels))
            yield figure(grid, f"step {step} of {request.cfg.steps}")
        there = [picture.image_grid(tile[None], 1) for tile in tiles]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "morph.webp")
            picture.save_animation(there + there[-2:0:-1], path)
            told = f"{request.digits}, from seed {seeds[0]} to seed {seeds[1]} and back"
            yield figure(there[0], told, path) + figure(grid, f"the {frames} frames")


def seed_from(text: str) -> int:
    """The seed that a user writes; a new one for an empty text."""
    if len(text) > 100:  # Python reads no number of thousands of digits
        raise ValueError(f"seed = {shortened(text)}: must be at most {2**32 - 1}")
    if text.strip() and not text.strip().isdecimal():
        raise ValueError(f"seed = {shortened(text)}: write a whole number, or nothing for any")
    return int(text) if text.strip() else secrets.randbelow(2**31)


class Between:
    """Noise, in place of ImageNoise, at `frames` points of the way between two."""

    def __init__(self, ends: list[ImageNoise], frames: int) -> None:
        self.ends, self.shares = ends, [i / (frames - 1) for i in range(frames)]

    def draw(self) -> Tensor:
        a, b = (end.draw() for end in self.ends)
        return torch.cat([slerp(a, b, share) for share in self.shares])

    def uniform(self) -> Tensor:
        a, b = (end.uniform() for end in self.ends)
        return torch.cat([a if share < 0.5 else b for share in self.shares])


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise (N, C, H, W) between a and b, on a great circle, as their mean would be too small: a
    for a share of 0, b for 1."""
    angle = torch.cosine_similarity(a.flatten(1), b.flatten(1)).acos()[:, None, None, None]
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def figure(grid: Image.Image, caption: str, path: Path | None = None) -> str:
    """A picture as HTML, enlarged, with a link to save it if it is the file at `path`. The file is
    copied into the page, so that nobody else can ask for it, and it can be deleted."""
    kind, caption = path.suffix[1:] if path else "png", html.escape(caption)
    content = path.read_bytes() if path else picture.encode_png(grid, {})
    content = base64.b64encode(content).decode()
    url, scale = f"data:image/{kind};base64,{content}", max(1, min(8, 700 // grid.width))
    size = f'width="{scale * grid.width}" height="{scale * grid.height}"'
    link = f' · <a href="{url}" download="{html.escape(path.name)}">Download</a>' if path else ""
    image = f'<img src="{url}" alt="{caption}" {size}>'
    return f"<figure>{image}<figcaption>{caption}{link}</figcaption></figure>"


def build(gr: ModuleType, studio: Studio) -> Any:
    """The page, a gradio.Blocks."""
    cfg, names = studio.loaded.cfg, studio.loaded.cfg.label_names
    label, some = f"Digits (at most {MOST_LABELS})", "2026"
    if cfg.class_names:
        some = ",".join(names[:4])
        label = f"What to draw, with commas: {', '.join(names[:20])}{' …' if names[20:] else ''}"
    any_seed = {"placeholder": "empty: a new one each time"}
    samplers = Config.__dataclass_fields__["sampler"].metadata["choices"]
    most = min(MOST_STEPS, cfg.timesteps)
    guidance = 1.0 if studio.is_unguided else cfg.guidance
    draw = [
        gr.Textbox(some, label=label),
        gr.Textbox(label="Seed", **any_seed),
        gr.Checkbox(label="Nearest training images"),
        gr.Number(guidance, label="Guidance", info="1: none; larger: clearer, less varied"),
        gr.Slider(1, most, min(cfg.steps, most), step=1, label="Steps"),
        gr.Radio(samplers, value=cfg.sampler, label="Sampler"),
    ]
    complete = [
        gr.HTML("", html_template=CANVAS, js_on_load=PEN, elem_classes="canvas"),
        gr.Dropdown(names, label="What it is"),
        gr.Radio(KEEP, value="top", label="The half to keep"),
        gr.Textbox(label="Seed", **any_seed),
    ]
    morph = [
        gr.Textbox(some, label=label),
        gr.Textbox("0", label="First seed", **any_seed),
        gr.Textbox("1", label="Second seed", **any_seed),
        gr.Slider(3, MOST_FRAMES, 8, step=1, label="Frames"),
    ]
    tabs = {
        "Draw": (studio.draw, draw[: -len(ADJUSTABLE)] if cfg.is_student else draw),
        "Complete": (studio.complete, complete),
        "Morph": (studio.morph, morph),
    }
    with gr.Blocks(title="MNIST diffusion", analytics_enabled=False) as blocks:
        gr.Markdown(f"# MNIST diffusion\n{studio.loaded.path.name}, {studio.loaded.progress}")
        for name, (work, controls) in tabs.items():
            with gr.Tab(name), gr.Row():
                with gr.Column():
                    for control in controls:
                        control.render()
                    button = gr.Button(name, variant="primary")
                with gr.Column(scale=2):
                    page = gr.HTML(EMPTY, elem_id=name)
            typed = [each.submit for each in controls if isinstance(each, gr.Textbox)]
            # The network draws for one user at a time: all tabs share one place in the queue
            options = {"concurrency_id": "network", "trigger_mode": "always_last"}
            begin = [button.click, *typed, *([blocks.load] if name == "Draw" else [])]
            gr.on(begin, in_one_line(gr, work), controls, page, show_progress="hidden", **options)
            button.click(js=SHOW % name)  # where the page is longer than the screen
    return blocks.queue(max_size=16, default_concurrency_limit=1, api_open=False)


def in_one_line(gr: ModuleType, work: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """The same work, but a user's mistake becomes a message on the page."""

    def handler(*values: Any) -> Iterator[str]:
        try:
            yield from work(*values)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(first_line(error)), print_exception=False) from None
        except (AttributeError, TypeError):
            if None not in values:
                raise
            fault = "a value is missing; fill in every field"
            raise gr.Error(fault, print_exception=False) from None

    return handler


def check_address(host: str, port: int | None) -> None:
    """Raise ValueError if nothing can listen there; gradio would try a hundred ports first."""
    if port is not None and port < 1:
        raise ValueError(f"port = {port}: choose one from 1 to 65535, or none")
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError, TypeError, ValueError) as error:  # also of a host's characters
        where = f"host = {shortened(host)}, port = {port or 'any'}"
        raise ValueError(f"{where}: {first_line(error)}; choose others") from None


def serve(gr: ModuleType, args: Namespace) -> None:
    """Show the page until Ctrl-C or SIGTERM."""
    given = cli.given_settings(args)
    here = Config().select("machine") | given
    file = models.find_model(args.model, Path(here["output_dir"], "models"))
    loaded = load_model(file, pick_device(here["device"]), here["compile"])
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # end it as Ctrl-C does, which tidies up
        signal.signal(getattr(signal, name), signal.default_int_handler)
    studio = Studio(loaded, given)
    if here["compile"]:  # now, as it may fail
        for _ in studio.states(studio.request(loaded.cfg.label_names[0])):
            pass
    blocks = build(gr, studio)
    theme = gr.themes.Monochrome(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    where = {"server_name": args.host, "server_port": args.port, "max_file_size": "1kb"}
    look = {"theme": theme, "css": LOOK, "footer_links": []}
    without = {"share": False, "ssr_mode": False, "run_history": False, "quiet": True}
    _, url, _ = blocks.launch(**where, **look, **without, prevent_thread_lock=True)
    print(url, flush=True)
    try:
        while True:
            time.sleep(1)  # on Windows, Ctrl-C does not end an Event's wait
    finally:
        blocks.close(verbose=False)


def main() -> int:
    args = app_flags()
    check_address(args.host, args.port)
    with tempfile.TemporaryDirectory() as folder:
        # gradio keeps uploads in this folder, and is told to send its makers nothing. It asks for
        # its own page, and for nothing else, so that it must not go through a proxy
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}
        gr = optional("gradio")
        serve(gr, args)
    return 0


if __name__ == "__main__":
    cli.run_script("app.py", main)
