"""Draw digits with a trained model: python generate.py asks; with flags it asks nothing."""

import json
import os
import secrets
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import checkpoint
from config import FAST, SAMPLING, Config, Parser, add_flags, given_flags, parse_digits, run_script
from data import draw_labels, image_grid, to_uint8, write_npz, written_whole
from diffusion import Diffusion
from model import pick_device
from terminal import ask, say, show, whole_number

VERSION = "1.0"
FLAGS = (*SAMPLING, "seed", "clip_x_0", "sample_batch_size", "device", "output_dir")
PLACES = {"device", "output_dir"}
RECORDED = (*SAMPLING, "seed", "clip_x_0", "sample_batch_size")  # they settle a picture's pixels


class Pen:
    """A trained model, ready to draw."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.model, self.trained, self.progress = checkpoint.load_model(path, device)
        self.diffusion = Diffusion(self.trained)

    def labels(self, digits: str, count: int) -> tuple[Tensor, int]:
        """Labels (N,) of `count` variants of the number `digits`, or of each digit for "all"; and
        how many digits a variant has."""
        if digits == "all":
            return torch.arange(self.trained.num_classes).repeat_interleave(count), 1
        number = parse_digits(digits, self.trained.num_classes)
        return torch.tensor(number * count), len(number)

    def draw(self, cfg: Config, y: Tensor, every_step: bool = False) -> Tensor:
        """uint8 (N, C, H, W); with `every_step` from noise to image (steps + 1, N, C, H, W)."""
        x = self.diffusion.sample(
            self.model, y.to(self.device), **cfg.sampling, progress=True,
            return_intermediates=every_step,
        )  # fmt: skip
        return to_uint8(x[1] if every_step else x)


def usual_count(digits: str) -> int:
    """How many variants to draw if nobody says: 16 images, of "all" 16 of each digit."""
    return 16 if digits == "all" else max(1, 16 // len(digits))


def side_by_side(images: Tensor, length: int) -> Tensor:
    """Images (N, C, H, W) → numbers of `length` digits (N / length, C, H, length · W)."""
    return torch.cat(list(images.unflatten(0, (-1, length)).unbind(1)), dim=-1)


def write(pen: Pen, cfg: Config, digits: str, count: int, output: Path, look: bool) -> None:
    """Draw `count` variants of `digits` into one file, of the kind that its ending says."""
    y, length = pen.labels(digits, count)
    columns = count if digits == "all" else max(1, round((count / length) ** 0.5))
    moving = output.suffix in (".gif", ".webp")
    if output.suffix == ".npz" and digits == "all":
        y = draw_labels(count, cfg.seed)  # a set to measure, `count` images in all
    began = time.perf_counter()
    images = pen.draw(cfg, y, every_step=moving)
    told(pen, cfg, len(y), time.perf_counter() - began)
    if output.suffix == ".npz":
        write_npz(output, images, y)
    elif moving:
        grids = [image_grid(side_by_side(step, length), columns) for step in images]
        images = images[-1]
        pace = max(20, 1500 // len(grids))  # milliseconds: 1.5 s of denoising, 1 s of the digits
        options = {"lossless": True} if output.suffix == ".webp" else {}
        with written_whole(output) as partial:
            grids[0].save(
                partial, save_all=True, append_images=grids[1:], loop=0,
                duration=[pace] * (len(grids) - 1) + [1000], **options,
            )  # fmt: skip
    else:
        grid = image_grid(side_by_side(images, length), columns)
        with written_whole(output) as partial:
            grid.save(partial, pnginfo=provenance(pen, cfg, digits, count))
    if look:
        edge = images.shape[-1] // 14  # the empty margin; a terminal has few characters
        inside = slice(edge, images.shape[-1] - edge)
        show(side_by_side(images[..., inside, inside], length))
    print(output, flush=True)


def told(pen: Pen, cfg: Config, count: int, seconds: float) -> None:
    """Say what was drawn, how and how fast."""
    say(f"{count} images in {seconds:.2f} s by {pen.path}: {cfg.sampler}, {cfg.steps} steps, "
        f"guidance {cfg.guidance:g}, seed {cfg.seed}")  # fmt: skip


def write_folder(pen: Pen, cfg: Config, digits: str, count: int, folder: Path) -> None:
    """Write each image to its own PNG, with its own seed: --digits 7 --count 1 --seed 12 is
    7_seed12.png. Raises ValueError before anything is drawn if one of them exists."""
    y = pen.labels(digits, count)[0].tolist()
    paths = [folder / f"{digit}_seed{cfg.seed + i}.png" for i, digit in enumerate(y)]
    for path in paths:
        if path.exists():
            raise ValueError(f"{path}: exists already; choose another folder or --seed")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder ({error.strerror}); choose another") from None
    began = time.perf_counter()
    for i, (digit, path) in enumerate(zip(y, paths, strict=True)):
        own = replace(cfg, seed=cfg.seed + i)
        image = image_grid(pen.draw(own, torch.tensor([digit])), columns=1)
        with written_whole(path) as partial:
            image.save(partial, pnginfo=provenance(pen, own, str(digit), 1))
        print(path, flush=True)
    told(pen, cfg, len(y), time.perf_counter() - began)


def provenance(pen: Pen, cfg: Config, digits: str, count: int) -> PngInfo:
    """The text chunks from which --reproduce draws a picture again."""
    chunks = {"model": checkpoint.sha256(pen.path), "digits": digits, "count": count}
    chunks |= {name: getattr(cfg, name) for name in RECORDED}
    chunks |= {"version": VERSION, "torch": torch.__version__}
    info = PngInfo()
    for name, value in chunks.items():
        info.add_text(name, json.dumps(value))
    return info


def reproduce(picture: Path, folder: Path, cfg: Config, output: Path | None, look: bool) -> None:
    """Draw a picture again from its text chunks; raises ValueError when it has none, when its
    model is not in `folder`, and when the bytes come out differently."""
    try:
        with Image.open(picture) as image:
            known = {name: json.loads(text) for name, text in image.text.items()}
        settings = {name: known[name] for name in RECORDED}
        model, digits, count, made_by = (known[k] for k in ("model", "digits", "count", "torch"))
    except FileNotFoundError:
        raise ValueError(f"{picture}: no such picture") from None
    except (OSError, AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"{picture}: not a PNG that generate.py wrote") from None
    paths = [path for path in folder.glob("*.pth") if checkpoint.sha256(path) == model]
    if not paths:
        raise ValueError(f"{picture}: its model, SHA-256 {model}, is not in {folder}; put it there")
    cfg = replace(cfg, **settings)
    output = output or free_name(cfg, f"{digits}_again")
    write(Pen(paths[0], pick_device(cfg.device)), cfg, digits, count, output, look)
    if output.read_bytes() != picture.read_bytes():
        raise ValueError(
            f"{output}: not the same bytes as {picture}, which torch {made_by} made; here is torch "
            f"{torch.__version__} on {cfg.device}"
        )
    say(f"the same bytes as {picture}")


def free_name(cfg: Config, digits: str, ending: str = ".png") -> Path:
    """A file name under output_dir/images that is not taken."""
    folder = Path(cfg.output_dir, "images")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"generated_{digits[:20]}_{number:03d}{ending}").exists():
        number += 1
    return path


def real_number(text: str) -> float:
    """Guidance, as Config checks it."""
    try:
        return replace(Config(), guidance=float(text)).guidance
    except ValueError:
        raise ValueError(f"{text!r} is not a number such as 1 or 1.5") from None


def choose_model(folder: Path) -> Path:
    """List the models of a folder and ask for one; Enter takes the newest."""
    found = checkpoint.list_checkpoints(folder)
    say(f"Models in {folder}:")
    for number, (path, progress) in enumerate(found, 1):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        say(f"  {number}  {path.name}  {progress}  {date}")
    return found[ask("Which model", len(found), whole_number(len(found))) - 1][0]


def find_model(text: str, folder: Path) -> Path:
    """The model that a user means by a path, a name in `folder`, its number there or "newest"."""
    found = [path for path, _ in checkpoint.list_checkpoints(folder)]
    if not found and not Path(text).is_file():
        raise ValueError(f"no model in {folder}; train one first: python train.py --budget 10m")
    if text == "newest":
        return found[-1]
    if text.isdecimal() and 1 <= int(text) <= len(found):
        return found[int(text) - 1]
    places = (Path(text), folder / text, folder / f"{text}.pth")
    return next((path for path in places if path.is_file()), Path(text))


def converse(pen: Pen, cfg: Config, seed: int | None, look: bool) -> None:
    """Ask what to draw and draw it, again and again; without `seed` every picture is new."""
    last, count = pen.trained.num_classes - 1, None

    def number(text: str) -> str:
        if text != "all":
            parse_digits(text, pen.trained.num_classes, "digits")
        if len(text) > 20:
            raise ValueError(f"{text!r} is too long: 20 digits at most")
        return text

    say("? explains, q leaves.")
    while True:
        digits = ask(f"Digit to draw, 0 to {last}", None, number)
        count = ask("How many", count or usual_count(digits), whole_number(10_000))
        guidance = ask("Guidance", cfg.guidance, real_number)
        picture_seed = secrets.randbelow(2**31) if seed is None else seed
        cfg = replace(cfg, guidance=guidance, seed=picture_seed)
        write(pen, cfg, digits, count, free_name(cfg, digits), look)


def main() -> int:
    parser = Parser(prog="generate.py", description="Draw digits with a trained model.")
    parser.add_argument("--digits", metavar="TEXT", help="7, 2026 or all; asks nothing")
    parser.add_argument(
        "--count", type=int, metavar="INT", help="variants to draw (default: 16 images)"
    )
    parser.add_argument("--model", metavar="TEXT", help="path, name, number or newest (default)")
    parser.add_argument("--output", metavar="FILE", help=".png, .gif, .webp, .npz or a folder/")
    parser.add_argument("--fast", action="store_true", help="few network calls, a little worse")
    parser.add_argument(
        "--show", action=BooleanOptionalAction, default=sys.stderr.isatty(),
        help="also draw in the terminal (default: where there is one)",
    )  # fmt: skip
    parser.add_argument("--reproduce", type=Path, metavar="FILE.png", help="draw that picture anew")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    given = given_flags(args)
    cfg = replace(Config(), **{**(FAST if args.fast else {}), **given})
    count = usual_count(args.digits or "all") if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    asks = args.digits is None and not args.reproduce
    if asks and (args.output or args.count is not None):
        raise ValueError("--output and --count need --digits, say --digits 7")
    if args.reproduce and (
        args.digits or args.count or args.model or args.fast or given.keys() - PLACES
    ):
        raise ValueError("--reproduce takes everything from the picture; drop the other flags")
    output = Path(args.output) if args.output else None
    to_folder = bool(output) and (args.output.endswith(("/", os.sep)) or output.is_dir())
    if output and not to_folder and output.suffix not in (".png", ".gif", ".webp", ".npz"):
        raise ValueError(
            f"output = '{output}': must end in .png, .gif, .webp, .npz, or / (a folder)"
        )
    if output and not output.parent.is_dir():
        raise ValueError(f"output = '{output}': no folder {output.parent}; make it first")
    torch.set_flush_denormal(True)  # denormals are slow; before any thread starts
    folder = Path(cfg.output_dir, "models")
    try:
        if args.reproduce:
            reproduce(args.reproduce, folder, cfg, output, args.show)
            return 0
        path = find_model(args.model or "newest", folder)
        if asks and not args.model:
            path = choose_model(folder)
        pen = Pen(path, pick_device(cfg.device))
        if "steps" not in given:
            cfg = replace(cfg, steps=min(cfg.steps, pen.trained.timesteps))
        pen.diffusion.sampling_times(cfg.steps)  # complains now if the model has fewer
        if asks:
            say(f"{path}: {pen.progress}")
            converse(pen, cfg, given.get("seed"), args.show)
        elif to_folder:
            write_folder(pen, cfg, args.digits, count, output)
        else:
            write(pen, cfg, args.digits, count, output or free_name(cfg, args.digits), args.show)
    except EOFError:
        say("")
    return 0


if __name__ == "__main__":
    run_script("generate.py", main)
