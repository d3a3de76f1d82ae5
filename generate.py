"""Draw digits with a trained model: python generate.py asks; with flags it asks nothing."""

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import checkpoint
from config import Config, Parser, add_flags, given_flags, parse_digits, run_script
from data import draw_labels, image_grid, to_uint8, write_npz
from diffusion import Diffusion
from model import UNet, pick_device

FLAGS = (
    "seed", "steps", "sampler", "eta", "guidance", "clip_x_0", "sample_batch_size", "device",
    "output_dir",
)  # fmt: skip


def draw(
    cfg: Config, model: UNet, diffusion: Diffusion, y: torch.Tensor, columns: int, output: Path
) -> None:
    """Draw an image for each label in y (N,) and write them, as a grid or as an .npz."""
    began = time.perf_counter()
    x_0 = diffusion.sample(
        model, y.to(next(model.parameters()).device), sampler=cfg.sampler, steps=cfg.steps,
        guidance=cfg.guidance, eta=cfg.eta, clip_x_0=cfg.clip_x_0, seed=cfg.seed,
        batch_size=cfg.sample_batch_size, progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if output.suffix == ".npz":
        write_npz(output, to_uint8(x_0), y)
    else:
        image_grid(to_uint8(x_0), columns).save(output)
    say(f"{len(y)} images in {seconds:.1f} s ({cfg.sampler}, {cfg.steps} steps, seed {cfg.seed})")
    print(output, flush=True)


def free_name(cfg: Config, digits: str) -> Path:
    """A file name under output_dir/images that is not taken."""
    folder = Path(cfg.output_dir, "images")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"generated_{digits}_{number:03d}.png").exists():
        number += 1
    return path


def say(message: str) -> None:
    """Talk to the person; stdout carries the written paths alone."""
    print(message, file=sys.stderr, flush=True)


def ask(question: str, default: Any, parse: Callable[[str], Any]) -> Any:
    """Ask until `parse` accepts the answer; Enter takes the default. `q` raises EOFError."""
    hint = "" if default is None else f" [{default}]"
    while True:
        print(f"{question}{hint}: ", end="", file=sys.stderr, flush=True)
        answer = input().strip()
        if answer.lower() == "q":
            raise EOFError
        if not answer and default is not None:
            return default
        try:
            return parse(answer)
        except ValueError as error:
            say(f"  {error}")


def whole_number(most: int) -> Callable[[str], int]:
    """A parser of whole numbers from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise ValueError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parse


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


def converse(cfg: Config, model: UNet, trained: Config, count: int, seed: int | None) -> None:
    """Ask for a digit and draw it, again and again; without `seed` every picture is new."""
    diffusion, last = Diffusion(trained), trained.num_classes - 1

    def one_digit(text: str) -> int:
        if len(text) != 1:
            raise ValueError(f"{text!r} is not one digit from 0 to {last}")
        return parse_digits(text, trained.num_classes, "digit")[0]

    say("q leaves.")
    while True:
        digit = ask(f"Digit to draw, 0 to {last}", None, one_digit)
        count = ask("How many", count, whole_number(10_000))
        guidance = ask("Guidance", cfg.guidance, real_number)
        picture_seed = secrets.randbelow(2**31) if seed is None else seed
        cfg = replace(cfg, guidance=guidance, seed=picture_seed)
        y = torch.full((count,), digit)
        draw(cfg, model, diffusion, y, round(count**0.5), free_name(cfg, str(digit)))


def main() -> int:
    parser = Parser(prog="generate.py", description="Draw digits with a trained model.")
    parser.add_argument("--digits", metavar="TEXT", help="digits to draw, or all; asks nothing")
    parser.add_argument("--count", type=int, metavar="INT", help="images a digit (default: 16)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="checkpoint (default: newest)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".png or .npz to write")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    given = given_flags(args)
    cfg = replace(Config(), **given)
    count = 16 if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    if args.digits is None and (args.output or args.count is not None):
        raise ValueError("--output and --count need --digits, say --digits 7")
    if args.output and args.output.suffix not in (".png", ".npz"):
        raise ValueError(f"output = '{args.output}': must end in .png or .npz")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"output = '{args.output}': no folder {args.output.parent}; make it first")
    torch.set_flush_denormal(True)  # denormals are slow; before any thread starts
    device = pick_device(cfg.device)

    folder = Path(cfg.output_dir, "models")
    path = args.model or checkpoint.newest(folder)
    if path is None:
        raise ValueError(f"no model in {folder}; train one first: python train.py --budget 10m")
    try:
        if args.digits is None and not args.model:
            path = choose_model(folder)
        model, trained, progress = checkpoint.load_model(path, device)
        if "steps" not in given:
            cfg = replace(cfg, steps=min(cfg.steps, trained.timesteps))
        Diffusion(trained).sampling_times(cfg.steps)  # complains now if the model has fewer
        if args.digits is None:
            say(f"{path}: {progress}")
            converse(cfg, model, trained, count, given.get("seed"))
        if args.digits == "all":
            digits = list(range(trained.num_classes))
        else:
            digits = parse_digits(args.digits, trained.num_classes)
        y = torch.tensor(digits).repeat_interleave(count)
        columns = count if len(digits) > 1 else round(count**0.5)
        output = args.output or free_name(cfg, args.digits)
        if args.digits == "all" and output.suffix == ".npz":
            y = draw_labels(count, cfg.seed)  # a set to measure, `count` images in all
        say(f"{path}: {progress}")
        draw(cfg, model, Diffusion(trained), y, columns, output)
    except EOFError:
        say("")
    return 0


if __name__ == "__main__":
    run_script("generate.py", main)
