"""The flags of each script, and which of them go together."""

import sys
from argparse import BooleanOptionalAction, Namespace

from config import MODEL_SIZES, Config
from interface.cli import Parser, add_settings, expanded_path
from interface.original import KEEP
from interface.requests import is_folder, output_name
from system import distributed
from system.files import optional

PATH = {"type": expanded_path, "metavar": "PATH"}
NUMBER = {"type": int, "metavar": "INT"}
WHICH_MODEL = {"metavar": "TEXT", "help": "path, name, number or newest (most steps; default)"}


def add_model_size(parser: Parser) -> None:
    """Add a flag that stands for several settings of the network; each has a flag of its own too,
    which wins."""
    sizes = "1.7, 6 or 20 million parameters (default: 1.3 million)"
    parser.add_argument("--model_size", choices=MODEL_SIZES, help=sizes)


def train_flags() -> Namespace:
    parser = Parser(prog="train.py", description="Train a class-conditional DDPM.")
    start, length = (parser.add_mutually_exclusive_group() for _ in range(2))
    start.add_argument("--resume", action="store_true", help="continue the newest checkpoint")
    load_help = "checkpoint to continue for K epochs or a --budget; alone: describe it"
    start.add_argument("--load_checkpoint_path", **PATH, help=load_help)
    more_help = "train that checkpoint for K more epochs"
    options = {"type": int, "metavar": "K", "default": 0, "help": more_help}
    length.add_argument("--continue_training_epochs", **options)
    add_settings(length, Config.names("length"))
    groups = ("machine", "model", "student", "training", "sampling", "picture")
    add_settings(parser, Config.names(*groups))
    add_model_size(parser)
    board_help = "also write figures and grids for TensorBoard"
    parser.add_argument("--tensorboard", action="store_true", help=board_help)
    parser.needs("--continue_training_epochs", "--load_checkpoint_path")
    if not Config().teacher:
        parser.needs("--student_steps", "--teacher")
    counts_all = "--epochs counts from scratch; give --continue_training_epochs instead"
    parser.excludes("--load_checkpoint_path", "--epochs", message=counts_all)
    args = parser.parse_args()
    if args.continue_training_epochs < 0:
        given = f"continue_training_epochs = {args.continue_training_epochs}"
        raise ValueError(f"{given}: must be at least 0")
    if args.tensorboard:
        optional("torch.utils.tensorboard")  # before anything is moved aside
    return args


def generate_flags() -> Namespace:
    parser = Parser(prog="generate.py", description="Draw digits with a trained model.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--digits", metavar="TEXT", help="what to draw: 7, 2026, all or mnist")
    picture = PATH | {"metavar": "PNG"}
    what.add_argument("--reproduce", **picture, help="draw a picture again from its record")
    parser.add_argument(
        "--count", **NUMBER, help="variants (default: 16 images; for all, 16 of each)"
    )
    parser.add_argument("--model", **WHICH_MODEL)
    file = {"type": output_name, "metavar": "FILE"}
    parser.add_argument(
        "--output", **file, help=".png, .npz, .gif, .webp (replaced if it exists), or a folder/"
    )
    fast_help = "draw faster but less well: about 6 network calls (the shipped student: 4)"
    parser.add_argument("--fast", action="store_true", help=fast_help)
    begin = parser.add_mutually_exclusive_group()
    picture = PATH | {"metavar": "PICTURE"}
    begin.add_argument("--complete", **picture, help="draw the rest of a picture (white on black)")
    begin.add_argument("--edit", **picture, help="draw a picture anew, from a noisy version of it")
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--keep", choices=KEEP, default="top", help="the half to keep (default: top)"
    )
    known.add_argument("--mask", **picture, help="instead of --keep: white where pixels are kept")
    strength = {"type": float, "default": 0.6, "metavar": "FLOAT"}
    parser.add_argument("--strength", **strength, help="noise of --edit, up to 1 (default: 0.6)")
    on_screen = "show the digits in the terminal, too"
    parser.add_argument("--show", action=BooleanOptionalAction, help=on_screen)
    add_settings(parser, set(Config.names("machine", "sampling", "picture")) - {"data_dir"})
    for flag in ("--count", "--complete", "--edit"):
        parser.needs(flag, "--digits")
    parser.needs("--keep", "--complete")
    parser.needs("--mask", "--complete")
    parser.needs("--strength", "--edit")
    parser.needs("--output", "--digits", "--reproduce")
    with_it = ("--output", "--output_dir", "--device", "--show", "--no-show")
    parser.allows_only("--reproduce", *with_it)
    args = parser.parse_args()
    if args.show is None:
        args.show = sys.stderr.isatty() and not is_folder(args.output)
    if args.reproduce and args.output and not args.output.endswith(".png"):
        raise ValueError(f"output = {args.output!r}: --reproduce writes a .png")
    if args.digits is None and distributed.processes() > 1:
        raise ValueError("torchrun asks no questions: give --digits, or drop torchrun")
    return args


def evaluate_flags() -> Namespace:
    parser = Parser(prog="evaluate.py", description="Measure samples against real images.")
    what = parser.add_mutually_exclusive_group()
    images = PATH | {"metavar": "NPZ"}
    what.add_argument("--images", **images, help="measure the images in this file")
    what.add_argument("--sweep", nargs="+", metavar="NAME=A,B", help="evaluate all combinations")
    what.add_argument("--classify", action="store_true", help="classify test images by denoising")
    what.add_argument("--train_evaluator", action="store_true", help="train the classifier anew")
    parser.add_argument("--model", **WHICH_MODEL)
    number = "how many images to draw (default: 10000) or to --classify (default: 1000)"
    parser.add_argument("--samples", **NUMBER, help=number)
    parser.add_argument("--cas", action="store_true", help="also train a classifier on the samples")
    parser.add_argument(
        "--c2st", action="store_true", help="also train networks to tell samples from test images"
    )
    add_settings(parser, Config.names("machine", "sampling", "picture"))
    parser.allows_only("--images", "--cas", "--c2st", "--data_dir", "--output_dir", "--device")
    parser.allows_only("--train_evaluator", "--data_dir")
    with_it = ("--model", "--samples", "--seed", "--precision", "--sample_batch_size", "--compile")
    parser.allows_only("--classify", *with_it, "--data_dir", "--output_dir", "--device")
    for flag in ("--cas", "--c2st"):
        parser.excludes("--sweep", flag, message=f"--sweep trains no networks; drop {flag}")
    return parser.parse_args()


def benchmark_flags() -> Namespace:
    parser = Parser(prog="benchmark.py", description="Measure training and sampling speed.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--gpu", action="store_true", help="time eager and compiled runs, and train three times"
    )
    what.add_argument("--scaling", action="store_true", help="estimate the speed of many GPUs")
    file = PATH | {"metavar": "FILE"}
    parser.add_argument(
        "--json", **file, help="also write the figures as JSON; replaced if it exists"
    )
    names = set(Config.names("machine", "model", "training", "sampling", "picture"))
    unused = {"accumulate", "dataset", "output_dir", "save_every", "match_levels"}
    add_settings(parser, names - unused - {"preview_digits", "preview_columns"})
    add_model_size(parser)
    parser.allows_only("--scaling", "--device", "--data_dir")
    args = parser.parse_args()
    if distributed.processes() > 1:
        raise ValueError("benchmark.py measures a single process; start it without torchrun")
    if args.json and args.json.suffix != ".json":
        raise ValueError(f"json = {str(args.json)!r}: choose a name that ends in .json")
    if args.gpu and getattr(args, "img_size", 28) != 28:
        raise ValueError(f"img_size = {args.img_size}: --gpu trains on MNIST at 28; drop the flag")
    return args


def export_flags() -> Namespace:
    parser = Parser(prog="export.py", description="Export a model for other programs.")
    kinds = ".onnx, or for generate.py --model: .safetensors, or .pth in half precision"
    file = PATH | {"metavar": "FILE"}
    parser.add_argument("output", **file, help=kinds)
    parser.add_argument("--model", default="newest", **WHICH_MODEL)
    alone = ".onnx: the network alone, instead of the whole sampler"
    parser.add_argument("--network", action="store_true", help=alone)
    add_settings(parser, {"output_dir", *Config.names("sampling")})
    args = parser.parse_args()
    path, formats = args.output, (".onnx", ".safetensors", ".pth")
    if path.suffix not in formats:
        raise ValueError(f"{path}: choose a name that ends in {', '.join(formats)}")
    if args.network and path.suffix != ".onnx":
        raise ValueError(f"--network is for .onnx, not {path}; drop the flag")
    is_sampler = path.suffix == ".onnx" and not args.network
    if not is_sampler and any(hasattr(args, name) for name in Config.names("sampling")):
        raise ValueError(f"{path}: sampling flags affect only an exported sampler; drop them")
    return args


def app_flags() -> Namespace:
    parser = Parser(prog="app.py", description="Draw digits on a page in the browser.")
    parser.add_argument("--model", default="newest", **WHICH_MODEL)
    host = {"metavar": "TEXT", "default": "127.0.0.1"}
    parser.add_argument("--host", **host, help="address (default: 127.0.0.1, this computer alone)")
    parser.add_argument("--port", **NUMBER, help="port (default: a free one from 7860)")
    add_settings(parser, Config.names("machine"))
    return parser.parse_args()
