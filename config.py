"""Every setting of the program: its default, its help and its limits. Standard library only.

Edit a default here or pass the flag of the same name; both are checked. A trained model keeps its
own values, except those of `machine` and, when drawing, `picture`, unless a flag changes them.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from system.values import check, parse_duration, parse_labels, shortened

VERSION = "1.11"  # of the program

DATASETS = "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "EMNIST-digits", "EMNIST-letters", "folder"


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field of Config. `metadata`: `group`; the limits `ge`, `gt`, `le` (of a text, its length),
    `multiple_of`, `choices`; `flag`, where it differs from the name; `fixed_in_epoch`, if it must
    not change when a run resumes in the middle of an epoch; `not_in_students`, if a student's loss
    does not use it."""
    return field(default=default, metadata={"help": help, **metadata})


# A constructor for each group: model(28, "…") is a setting of the model, 28 by default
machine = partial(setting, group="machine")  # belongs to this computer: never from a checkpoint
model = partial(setting, group="model")  # cannot change once a model has been trained with it
student = partial(setting, group="student")  # cannot change either
classes = partial(setting, group="classes")  # given by the data set; has no flag
training = partial(setting, group="training")
denoising = partial(training, not_in_students=True)  # of the denoising loss, which students lack
length = partial(setting, group="length")  # how long a run is
sampling = partial(setting, group="sampling")  # how a model draws: in its checkpoint and PNGs
picture = partial(setting, group="picture")  # of one drawing (in its PNG) or of one run


@dataclass(frozen=True)
class Config:
    """All settings. Raises a ValueError that names an invalid one, its value and the remedy."""

    # This computer
    data_dir: str = machine("mnist_data", "folder of the data set, downloaded if missing")
    output_dir: str = machine("results", "folder for models, pictures and metrics")
    device: str = machine("auto", "auto (CUDA or Apple's MPS, else CPU) or a torch device")
    compile: bool = machine(False, "compile the network: a minute's wait, meant for a GPU")

    # Images
    dataset: str = training("MNIST", "data set; folder: data_dir/LABEL/*.png", choices=DATASETS)
    img_size: int = model(28, "image side in pixels", ge=4, le=256)
    img_channels: int = model(1, "1: grey, 3: colour (of a folder only)", choices=(1, 3))
    num_classes: int = classes(10, "number of labels", ge=1, le=1000)
    class_names: str = classes("", "their names, with / between them (none: digits)", le=30_000)
    max_images: int = training(0, "train on the first N images (0: all)", ge=0, fixed_in_epoch=True)

    # U-Net
    patch_size: int = model(2, "fold patches of this side into channels (1: none)", ge=1, le=32)
    widths: tuple = model((32, 64), "channels, fine to coarse", ge=8, le=1024, multiple_of=8)
    blocks: int = model(1, "residual blocks per level, both down and up", ge=1, le=16)
    dense_size: int = model(128, "hidden units of a whole-image layer (0: none)", ge=0, le=8192)
    attention: bool = model(False, "self-attention at the coarsest level")
    bypass: bool = model(True, "a linear path around the last norm, for exact grey levels")
    embedding_size: int = model(128, "width of the embeddings", ge=2, le=4096, multiple_of=2)

    # Diffusion (snr: signal-to-noise ratio; x_0_hat: an estimate of x_0)
    timesteps: int = model(1000, "number of timesteps T", ge=2, le=10_000)
    schedule: str = model("cosine", "noise schedule", choices=("linear", "cosine", "sigmoid"))
    prediction: str = model("x_0", "what the network predicts", choices=("eps", "v", "x_0"))
    loss_weighting: str = training(
        "snr_power", "how the loss weights timesteps", choices=("uniform", "min_snr", "snr_power")
    )
    snr_power: float = training(0.25, "snr_power: the p in x_0's loss weight, snr^p", ge=0, le=1)
    min_snr_gamma: float = training(5.0, "min_snr: largest weight of x_0's error", gt=0)
    timestep_power: float = denoising(0.7, "p of t = T * u^p, u uniform (p < 1: more noise)", gt=0)
    unsquared_snr: float = training(10.0, "pseudo-Huber loss above this snr (0: nowhere)", ge=0)
    clip_loss: bool = training(True, "no loss where clamping (clip_x_0) makes x_0_hat exact")
    label_dropout: float = denoising(0.1, "fraction of images trained without a label", ge=0, le=1)

    # Training
    epochs: int = length(30, "epochs of the whole run", ge=1)
    budget: str = length("", "train for this long instead of --epochs: 90s, 10m, 1.5h")
    batch_size: int = training(128, "images per step", ge=1, le=65_536, fixed_in_epoch=True)
    accumulate: int = training(1, "compute each batch in this many parts, to save memory", ge=1)
    learning_rate: float = training(4e-3, "peak learning rate", gt=0, flag="lr")
    warmup_steps: int = training(100, "steps of warm-up (at most a tenth of --epochs)", ge=0)
    adam_beta1: float = training(0.9, "AdamW: decay of the mean gradient", ge=0, le=0.9999)
    adam_beta2: float = training(0.99, "AdamW: decay of the mean squared gradient", ge=0, le=0.9999)
    muon_momentum: float = training(0.95, "Muon: decay of the mean gradient", ge=0, le=0.9999)
    weight_decay: float = training(0.01, "weight decay of both optimizers", ge=0)
    grad_clip: float = training(1.0, "largest gradient norm; larger ones are scaled down", gt=0)
    ema_sigma_rel: float = training(
        0.1, "width of the EMA of the weights, as a fraction of the steps so far", ge=1e-6, le=0.28
    )
    guide_fraction: float = model(0.1, "first part of a run, for the guide (0: none)", ge=0, le=0.5)
    guide_label_noise: float = denoising(0.3, "share of random labels for the guide", ge=0, le=1)
    teacher: str = student("", "train a student of this model: path, name, number or newest")
    student_steps: int = student(4, "network calls of a student per image", ge=1, le=8)
    save_every: int = training(5, "epochs between checkpoints", ge=1)
    preview_digits: str = training("0123456789", "labels in each sample grid; all: the first ten")
    preview_columns: int = training(10, "samples of each label in each grid", ge=1, le=100)

    # Sampling. PNGs record these settings in this order: another would change their bytes
    sampler: str = sampling("dpmpp", "sampling method", choices=("ddpm", "ddim", "dpmpp"))
    steps: int = sampling(13, "sampling steps, at most timesteps", ge=1)
    guidance: float = sampling(2.8, "guidance w (1: none; larger: clearer, less varied)", ge=-1000)
    guidance_low: float = sampling(0.4, "guidance acts where t / timesteps > this", ge=0, le=1)
    guidance_high: float = sampling(0.9, "guidance acts where t / timesteps <= this", ge=0, le=1)
    eta: float = sampling(0.3, "noise added by ddim and dpmpp (0: none, 1: as ddpm)", ge=0, le=1)
    precision: str = picture(
        "auto", "what the network computes in (auto: faster)", choices=("auto", "float32", "bf16")
    )
    seed: int = picture(0, "seed of all random numbers", ge=0, le=2**32 - 1, fixed_in_epoch=True)
    clip_x_0: bool = sampling(True, "clamp each estimate of x_0 to [-1, 1]")
    match_levels: bool = picture(True, "give images the grey levels of the training images")
    sample_batch_size: int = picture(128, "images sampled at a time", ge=1, le=8192)

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f.name, getattr(self, f.name), f.type, f.metadata)
        factor = self.patch_size * 2 ** (len(self.widths) - 1)  # by which the U-Net shrinks images
        if self.img_size % factor:
            why = f"{factor}, which patch_size and the number of widths imply"
            raise ValueError(f"img_size = {self.img_size}: must be a multiple of {why}")
        if self.img_size == factor and self.widths[-1] == 8:  # a group norm of a single value
            why = "the last must be at least 16, as the coarsest level has a single pixel"
            raise ValueError(f"widths = {self.widths}: {why}")
        if self.steps > self.timesteps:
            raise ValueError(f"steps = {self.steps}: must be at most timesteps = {self.timesteps}")
        if self.budget:
            parse_duration(self.budget)
        if self.class_names and len(self.label_names) != self.num_classes:
            wrong = f"{len(self.label_names)} names for {self.num_classes} labels"
            raise ValueError(f"class_names = {shortened(self.class_names)}: {wrong}")
        if self.preview_digits != "all":
            parse_labels(self.preview_digits, self.label_names, "preview_digits")

    @property
    def null_class(self) -> int:
        """The label that means "no label"."""
        return self.num_classes

    @property
    def label_names(self) -> list[str]:
        """The name of each label: the data set's, or its number."""
        numbers = map(str, range(self.num_classes))
        return self.class_names.split("/") if self.class_names else list(numbers)

    @property
    def is_student(self) -> bool:
        """Whether the model learned from a teacher (train.py --teacher)."""
        return bool(self.teacher)

    @staticmethod
    def names(*groups: str) -> tuple[str, ...]:
        """The names of all settings in these groups, in order."""
        return tuple(f.name for f in fields(Config) if f.metadata["group"] in groups)

    def select(self, *groups: str) -> dict[str, Any]:
        """The settings of these groups, by name."""
        return {name: getattr(self, name) for name in self.names(*groups)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of to_dict. A missing setting is read through ALIASES or BEFORE, or takes its
        default, and an unknown one is dropped, so that old checkpoints stay readable."""
        aliases = {new: values[old] for new, old in ALIASES.items() if old in values}
        values = BEFORE | aliases | values
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


# {setting: its name in older checkpoints}. In format 3, clip_x_0 meant clip_loss as well
ALIASES = {"clip_loss": "clip_x_0", "guide_fraction": "guide_share"}
ALIASES["unsquared_snr"] = "absolute_snr"  # until version 1.8

# What applied before these settings existed, where the default differs or may be edited
BEFORE = {"unsquared_snr": 0.0, "bypass": False, "teacher": ""}

# train.py --model_size: 1.7, 6 and 20 million parameters. The default network has 1.3
MODEL_SIZES = {
    "small": {"widths": (48, 96), "blocks": 1, "dense_size": 96, "embedding_size": 128},
    "base": {"widths": (64, 128), "blocks": 3, "dense_size": 192, "embedding_size": 256},
    "large": {"widths": (128, 256), "blocks": 3, "dense_size": 320, "embedding_size": 256},
}
