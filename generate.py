"""Draw digits with a trained model: python generate.py asks; with flags it asks nothing."""

import os
import secrets
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from config import FAST, SAMPLING, Config, Parser, add_flags, given_flags, parse_digits, run_script
from data import draw_labels, image_grid, to_uint8, write_npz
from diffusion import Diffusion
from model import pick_device
from picture import arrange, made_with, read_png, save_animation, save_png
from terminal import ask, say, show, whole_number

VERSION = "1.0"
MOST, MOST_MOVING = 100_000, 500  # images in a file; of an animation WebP ends at 16,383 pixels
RECORDED = (*SAMPLING, "seed", "clip_x_0", "sample_batch_size")  # they settle a picture's pixels
PLACES = ("device", "output_dir")


class Pen:
    """A trained model, ready to draw."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.model, self.guide, self.trained, self.progress = checkpoint.load_model(path, device)
        self.sha256 = checkpoint.sha256(path)
        self.diffusion = Diffusion(self.trained)

    def labels(self, digits: str, count: int) -> Tensor:
        """Labels (N,) of `count` variants of the number `digits`, where "all" stands for every
        digit once."""
        everything = list(range(self.trained.num_classes))
        number = everything if digits == "all" else parse_digits(digits, len(everything))
        check_total(count, len(number) * count)
        return torch.tensor(number * count)

    def draw(self, cfg: Config, y: Tensor, every_step: bool = False) -> Tensor:
        """uint8 (N, C, H, W) on the CPU; with `every_step` from the noise on (steps + 1, …)."""
        x = self.diffusion.sample(
            self.model, y.to(self.device), guide=self.guide, **cfg.sampling, progress=True,
            return_intermediates=every_step,
        )  # fmt: skip
        return to_uint8(x[1] if every_step else x).cpu()


def check_total(count: int, total: int) -> None:
    """Raises ValueError if `count` means too many images in all."""
    if total > MOST:
        raise ValueError(f"count = {count}: more than {MOST:,} images in all; draw fewer")


def usual_count(digits: str) -> int:
    """How many variants to draw if nobody says: 16 images, of "all" 16 of each digit."""
    return 16 if digits == "all" else max(1, 16 // len(digits))


def write(pen: Pen, cfg: Config, digits: str, count: int, output: Path, look: bool) -> None:
    """Draw `count` variants of `digits` into one file, of the kind that its ending says."""
    moving = output.suffix in (".gif", ".webp")
    if output.suffix == ".npz" and digits == "all":  # a set to measure, `count` images in all
        if pen.trained.num_classes != 10:
            raise ValueError(f"digits = 'all': {pen.path} does not know MNIST's ten; name digits")
        check_total(count, count)
        y = draw_labels(count, cfg.seed)
    else:
        y = pen.labels(digits, count)
    if moving and len(y) > MOST_MOVING:
        raise ValueError(f"count = {count}: more than {MOST_MOVING} images for {output.suffix}")
    began = time.perf_counter()
    images = pen.draw(cfg, y, every_step=moving)
    told(pen, cfg, len(y), time.perf_counter() - began)
    if output.suffix == ".npz":
        write_npz(output, images, y)
    elif moving:
        grids = [image_grid(*arrange(step, digits, count)) for step in images]
        images = images[-1]
        save_animation(grids, output)
    else:
        grid = image_grid(*arrange(images, digits, count))
        save_png(grid, output, provenance(pen, cfg, digits, count))
    if look:
        edge = images.shape[-1] // 14  # the empty margin; a terminal has few characters
        inside = slice(edge, images.shape[-1] - edge)
        show(arrange(images[..., inside, inside], digits, count)[0])
    print(output, flush=True)


def told(pen: Pen, cfg: Config, count: int, seconds: float) -> None:
    """Say what was drawn, how and how fast."""
    eta = "" if cfg.sampler == "ddpm" else f"eta {cfg.eta:g}, "
    say(f"{count} images in {seconds:.2f} s by {pen.path}: {cfg.sampler}, {cfg.steps} steps, {eta}"
        f"guidance {cfg.guidance:g}, seed {cfg.seed}")  # fmt: skip


def write_folder(pen: Pen, cfg: Config, digits: str, count: int, folder: Path) -> None:
    """Write each image to its own PNG, with its own seed: --digits 7 --count 1 --seed 12 is
    7_seed12.png. Raises ValueError before anything is drawn if one of them exists."""
    y = pen.labels(digits, count).tolist()
    replace(cfg, seed=cfg.seed + len(y) - 1)  # complains now if seeds run out
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
        save_png(image, path, provenance(pen, own, str(digit), 1))
        print(path, flush=True)
    told(pen, cfg, len(y), time.perf_counter() - began)


def provenance(pen: Pen, cfg: Config, digits: str, count: int) -> dict[str, Any]:
    """What --reproduce needs to draw a picture again."""
    known = {"model": pen.sha256, "digits": digits, "count": count, "version": VERSION}
    known |= {name: getattr(cfg, name) for name in RECORDED}
    return known | {"made with": made_with(pen.device)}


def reproduce(picture: Path, folder: Path, cfg: Config, output: Path | None, look: bool) -> None:
    """Draw a picture again from its text chunks; raises ValueError when it has none, when its
    model is neither in `folder` nor among earlier runs', and when the bytes come out differently.
    """
    known, original = read_png(picture), picture.read_bytes()
    try:
        cfg = replace(cfg, **{name: known[name] for name in RECORDED})
        digits, count, model = known["digits"], known["count"], known["model"]
        if type(digits) is not str or type(count) is not int or count < 1:
            raise TypeError
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{picture}: not a PNG that generate.py wrote") from None
    kept = [*folder.glob("*.pth"), *folder.parent.glob("earlier/*/*.pth")]
    models = [path for path in kept if checkpoint.sha256(path) == model]
    if not models:
        raise ValueError(f"{picture}: its model, SHA-256 {model}, is not in {folder}")
    output = output or free_name(cfg, f"{digits}_again")
    if output.exists() and output.samefile(picture):
        raise ValueError(f"output = '{output}': is the picture itself; choose another name")
    write(Pen(models[0], pick_device(cfg.device)), cfg, digits, count, output, look)
    if output.read_bytes() != original:
        raise ValueError(
            f"{output}: not the same bytes as {picture}, made with {known.get('made with')}; "
            f"this is {made_with(pick_device(cfg.device))}"
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
    found = checkpoint.list_models(folder)
    say(f"Models in {folder}:")
    for number, (path, progress) in enumerate(found, 1):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        say(f"  {number}  {path.name}  {progress}  {date}")
    return found[ask("Which model", len(found), whole_number(len(found))) - 1][0]


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
    parser.add_argument(
        "--model",
        metavar="TEXT",
        help="path, name, number, or newest (default): the longest trained of your own",
    )
    parser.add_argument("--output", metavar="FILE", help=".png, .gif, .webp, .npz or a folder/")
    parser.add_argument("--fast", action="store_true", help="few network calls, a little worse")
    parser.add_argument(
        "--show", action=BooleanOptionalAction, default=sys.stderr.isatty(),
        help="also draw in the terminal (default: where there is one)",
    )  # fmt: skip
    parser.add_argument("--reproduce", type=Path, metavar="FILE.png", help="draw that picture anew")
    add_flags(parser, (*RECORDED, *PLACES))
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
        args.digits or args.count or args.model or args.fast or given.keys() - set(PLACES)
    ):
        raise ValueError("--reproduce takes everything from the picture; drop the other flags")
    output = Path(args.output) if args.output else None
    to_folder = bool(output) and (args.output.endswith(("/", os.sep)) or output.is_dir())
    if args.reproduce and output and (to_folder or output.suffix != ".png"):
        raise ValueError(f"output = '{args.output}': --reproduce writes a .png")
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
            if "device" not in given:
                cfg = replace(cfg, device="cpu")  # a GPU rounds differently
            reproduce(args.reproduce, folder, cfg, output, args.show)
            return 0
        if asks and not args.model:
            path = choose_model(folder)
        else:
            path = checkpoint.find_model(args.model or "newest", folder)
        pen = Pen(path, pick_device(cfg.device))
        if "clip_x_0" not in given:  # the model was trained for one of the two
            cfg = replace(cfg, clip_x_0=pen.trained.clip_x_0)
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
