"""Draw digits with a trained model: python generate.py asks; with --digits it asks nothing."""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from checkpoint import LoadedModel
from config import Config
from data import to_uint8
from interface import cli, models, original, picture, provenance, requests
from interface.flags import generate_flags
from interface.requests import Request
from interface.settings import settings_for_drawing
from interface.terminal import log, sampling_bar, show
from pipeline import Pipeline
from system import distributed
from system.machine import pick_device
from system.values import counted


def draw_all(loaded: LoadedModel, wanted: list[Request], show_digits: bool) -> None:
    """Draw and write all requests, and print their paths on stdout. Several processes share the
    images of a single request, or else the requests."""
    seconds, together = 0.0, len(wanted) == 1  # whether all processes draw parts of one picture
    [mine] = [slice(1)] if together else distributed.my_parts(len(wanted))
    for request in wanted[mine]:
        began = time.perf_counter()
        states = draw(loaded, request, together)
        seconds += time.perf_counter() - began
        if not together or distributed.rank() == 0:
            write(loaded, request, states)
        if show_digits:
            side = request.cfg.img_size
            margin = 0 if request.cfg.class_names else side // 14  # which is empty around digits
            inside = states[-1][..., margin : side - margin, margin : side - margin]
            show(picture.arrange(inside, request.digits, request.count)[0])
        print(request.output, flush=True)
    distributed.barrier()
    for request in wanted[mine.stop :]:  # drawn by other processes, which print nothing
        print(request.output, flush=True)
    images = len(states[-1]) if together else len(wanted)
    if not all(map(str.isascii, wanted[0].row_names)):  # the grid's font lacks these
        log(f"the rows from the top: {', '.join(wanted[0].row_names)}")
    log(f"{counted(images, 'image')} in {seconds:.2f} s with {loaded.path}: {wanted[0].how}")


def draw(loaded: LoadedModel, request: Request, together: bool) -> list[Tensor]:
    """The images of a request, uint8 (N, C, H, W) on the CPU: for an animation one such tensor for
    each kept state, from noise to the images, otherwise a single one. With `together` all processes
    draw them, each some of the batches."""
    pipeline = Pipeline(request.cfg, loaded.model, loaded.guide, loaded.levels)
    y, start = request.labels.to(loaded.device), request.start.to(loaded.device)
    steps = len(pipeline.diffusion.sampling_times(start.strength)) - 1
    batches = range(pipeline.batch_count(len(y)))
    [mine] = distributed.my_parts(len(batches)) if together else [slice(None)]
    states: dict[int, list[Tensor]] = {number: [] for number in request.kept_states(steps)}
    with sampling_bar(steps, len(batches[mine])) as advance:

        def on_state(number: int, x: Tensor) -> None:
            advance(number, x)
            if number in states:
                states[number].append(to_uint8(x).cpu())

        pipeline.draw(y, on_state, mine, start)
    return [distributed.gather(x) if together else torch.cat(x) for x in states.values()]


def write(loaded: LoadedModel, request: Request, states: list[Tensor]) -> None:
    """Write what was drawn, in the format that the output's extension names."""
    if request.output.suffix == ".npz":
        picture.write_npz(request.output, states[-1], request.labels)
        return
    grids = [picture.image_grid(*picture.arrange(x, request.digits, request.count)) for x in states]
    if names := request.row_names:
        grids = [picture.name_rows(grid, names) for grid in grids]
    if request.animated:
        picture.save_animation(grids, request.output)
        return
    provenance.save(grids[-1], loaded, request)


def reproduce(png: Path, args: Namespace, given: dict[str, Any]) -> None:
    """Draw a picture again from what it records. Raises ValueError if it cannot be drawn here, or
    if the bytes come out differently, which are not written."""
    loaded, request = provenance.request_again(png, args.output, given)
    draw_all(loaded, [request], args.show)
    log(f"the same bytes as {png}")


def draw_what_is_asked(args: Namespace, given: dict[str, Any], device: torch.device) -> None:
    """Draw what --digits says, or else what the answers say."""
    here = Config().select("machine") | given
    folder = Path(here["output_dir"], "models")
    file = distributed.from_first(lambda: models.model_from_flags(args, folder))
    loaded = checkpoint.load_model(file, device, here["compile"])
    fast = requests.fast_settings(loaded) if args.fast else {}
    cfg = settings_for_drawing(loaded.cfg, fast | given)
    requests.check_flags(loaded, cfg, given, original.strength_of(args))
    if args.digits is not None:
        wanted = distributed.from_first(lambda: requests.requests_from_flags(args, cfg))
        draw_all(loaded, wanted, args.show)
        return
    log(f"{file}: {loaded.progress}")
    for request in requests.requests_from_answers(cfg, given.get("seed"), loaded):
        draw_all(loaded, [request], args.show)


def main() -> int:
    args = generate_flags()
    given = cli.given_settings(args)
    if args.reproduce:
        reproduce(args.reproduce, args, given)
        return 0
    device = pick_device(given.get("device", Config().device))
    try:
        with distributed.joined(device):
            draw_what_is_asked(args, given, device)
    except EOFError as end:  # q or Ctrl-D at a question, or no answer on stdin
        log(str(end))
    return 0


if __name__ == "__main__":
    cli.run_script("generate.py", main)
