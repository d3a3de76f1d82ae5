"""Draw digits with a trained model: python generate.py asks; with flags it asks nothing."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
from config import Config, Parser, add_flags, given_flags, parse_digits, run_script
from data import image_grid, to_uint8
from diffusion import Diffusion
from model import UNet, pick_device

FLAGS = (
    "seed", "steps", "sampler", "eta", "guidance", "clip_x_0", "sample_batch_size", "device",
    "output_dir",
)  # fmt: skip


def draw(
    cfg: Config, model: UNet, diffusion: Diffusion, digits: list[int], count: int, output: Path
) -> None:
    """Write a grid of `count` images of each digit, in the order given."""
    columns = count if len(digits) > 1 else max(1, round(count**0.5))
    y = torch.tensor(digits).repeat_interleave(count)
    began = time.perf_counter()
    x_0 = diffusion.sample(
        model, y.to(next(model.parameters()).device), sampler=cfg.sampler, steps=cfg.steps,
        guidance=cfg.guidance, eta=cfg.eta, clip_x_0=cfg.clip_x_0, seed=cfg.seed,
        batch_size=cfg.sample_batch_size, progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    image_grid(to_uint8(x_0), columns).save(output)
    say(f"{len(y)} images in {seconds:.1f} s ({cfg.sampler}, {cfg.steps} steps, seed {cfg.seed})")
    print(output, flush=True)


def free_name(cfg: Config, digits: list[int]) -> Path:
    """A file name under output_dir/images that is not taken."""
    folder = Path(cfg.output_dir, "images")
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"generated_{''.join(map(str, digits))}", 1
    while (path := folder / f"{stem}_{number:03d}.png").exists():
        number += 1
    return path


def say(message: str) -> None:
    """Talk to the person; stdout carries the written paths alone."""
    print(message, file=sys.stderr, flush=True)


def ask(question: str, default: object, parse: object) -> object:
    """Ask until `parse` accepts the answer; Enter takes the default. `q` raises EOFError."""
    while True:
        print(f"{question} [{default}]: " if default is not None else f"{question}: ",
              end="", file=sys.stderr, flush=True)  # fmt: skip
        answer = input().strip()
        if answer.lower() == "q":
            raise EOFError
        if not answer and default is not None:
            return default
        try:
            return parse(answer)
        except ValueError as error:
            say(f"  {error}")


def whole_number(least: int, most: int) -> object:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise ValueError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def real_number(text: str) -> float:
    try:
        return replace(Config(), guidance=float(text)).guidance
    except ValueError:
        raise ValueError(f"{text!r} is not a number such as 1 or 1.5") from None


def one_digit(num_classes: int) -> object:
    def parse(text: str) -> int:
        if len(text) != 1:
            raise ValueError(f"{text!r} is not one digit from 0 to {num_classes - 1}")
        return parse_digits(text, num_classes, "digit")[0]

    return parse


def choose_model(folder: Path) -> Path:
    """List the models of a folder and ask for one; Enter takes the newest."""
    found = checkpoint.list_checkpoints(folder)
    say(f"Models in {folder}:")
    for number, (path, progress) in enumerate(found, 1):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        say(f"  {number}  {path.name}  {progress}  {date}")
    if len(found) == 1:
        return found[0][0]
    return found[ask("Which model", len(found), whole_number(1, len(found))) - 1][0]


def main() -> int:
    parser = Parser(prog="generate.py", description="Draw digits with a trained model.")
    parser.add_argument("--digits", metavar="TEXT", help="digits to draw; asks nothing")
    parser.add_argument("--count", type=int, metavar="INT", help="images a digit (default: 16)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="checkpoint (default: newest)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG file to write")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    cfg = replace(Config(), **given_flags(args))
    count = 16 if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    if args.digits is None and (args.output or args.count is not None):
        raise ValueError("--output and --count need --digits, say --digits 7")
    if args.output and args.output.suffix.lower() != ".png":
        raise ValueError(f"output = '{args.output}': must end in .png")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"output = '{args.output}': no folder {args.output.parent}; make it first")
    torch.set_flush_denormal(True)
    device = pick_device(cfg.device)

    folder = Path(cfg.output_dir, "models")
    path = args.model or checkpoint.newest(folder)
    if path is None:
        raise ValueError(f"no model in {folder}; train one first: python train.py --budget 10m")
    interactive = args.digits is None
    try:
        if interactive and not args.model:
            path = choose_model(folder)
        model, trained, progress = checkpoint.load_model(path, device)
        if cfg.steps > trained.timesteps:
            raise ValueError(f"steps = {cfg.steps}: the model has {trained.timesteps} timesteps")
        diffusion = Diffusion(trained)
        digits = [] if interactive else parse_digits(args.digits, trained.num_classes)
        say(f"{path}: {progress}")
        if not interactive:
            output = args.output or free_name(cfg, digits)
            draw(cfg, model, diffusion, digits, count, output)
            return 0
        last = trained.num_classes - 1
        say("q leaves.")
        while True:
            digit = ask(f"Digit to draw, 0 to {last}", None, one_digit(trained.num_classes))
            count = ask("How many", count, whole_number(1, 10_000))
            guidance = ask("Guidance", cfg.guidance, real_number)
            cfg = replace(cfg, guidance=guidance)
            draw(cfg, model, diffusion, [digit], count, free_name(cfg, [digit]))
            cfg = replace(cfg, seed=cfg.seed + 1)  # the same question again gives new pictures
    except EOFError:
        say("")
        return 0


if __name__ == "__main__":
    run_script("generate.py", main)
