"""The recipe of a run: frozen dataclasses. `Config()` is the digits recipe; every field is a flag."""

import importlib.util
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Size: TypeAlias = int | tuple[int, int]
"""Pixels of an image: its side, or height and width."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy. Commands end with status 2."""


REMOTE = re.compile(r"([A-Za-z][\w+.-]+):/")
"""How a path that is not on this machine begins; a Path has made one slash of two."""


def path_of(given: str | Path, what: str) -> Path:
    """Returns a path that the user gave, on this machine (`local_path`) or in a bucket (`gs://bucket/run`).

    What is in a bucket is an `etils.epath.Path`, which has pathlib's methods but no links, locks or appending.

    Raises:
      InputError: as `local_path`; or another scheme than gs, a bucket without a name, or `gcsfs` is not installed.
    """
    scheme = REMOTE.match(str(given))
    if not scheme:
        return local_path(given, what)
    if scheme[1] != "gs":
        raise InputError(f"{what} {given}: of remote paths only gs://BUCKET/PATH is supported; or name a local path")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{what} {given}: buckets need gcsfs: pip install 'resnet_jax[gcs]'")
    if not re.match(r"gs://?[^/]", str(given)):
        raise InputError(f"{what} {given}: give the bucket's name, as in gs://BUCKET/PATH")
    import fsspec
    from etils import epath

    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # others write, too
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    found: Path = epath.Path(re.sub("^gs:/+", "gs://", str(given)))
    return found


def local_path(given: str | Path, what: str) -> Path:
    """Returns a path that the user gave, with `~` expanded; nothing needs to be there.

    Args:
      what: the name of the flag or field, for messages.

    Raises:
      InputError: it is empty, remote (`gs://bucket/run`), in the home of an unknown user, or no name for a file.
    """
    text = str(given)
    if not text.strip():
        raise InputError(f"{what} is empty: name a file or folder")
    if REMOTE.match(text):
        raise InputError(f"{what} {text}: this has to be on this machine; name a local folder or file, or a mount")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{what} {text}: there is no such home ({error}); write the path out") from error
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {text[:200]!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "cifar_resnet20"
    """A name from `resnet-jax models`."""
    num_classes: int | None = None
    """Outputs of the head; None takes the number of classes in the data."""
    pretrained: str | None = None
    """Weights to start from: a tag such as resnet50.tv2_in1k, a file, hf-hub:OWNER/NAME, a run's folder. Preprocessing
    fields that the recipe leaves at their defaults become those of the weights."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and convolutions; parameters, statistics, logits and loss are float32 always."""
    shortcut: Literal["A", "B", "C", "D", "none"] | None = None
    """Kind of shortcut in place of the model's own; none makes the plain twin."""
    norm: Literal["batch", "frozen_batch", "group"] | None = None
    """Norm in place of the model's own; frozen_batch uses running statistics and trains nothing of the norm."""
    unbiased_variance: bool = False
    """Keep running variances the PyTorch way, n / (n - 1)."""
    zero_init_last: bool = True
    """Every residual branch starts at zero."""
    remat: Literal["none", "block", "stage"] = "none"
    """What the backward pass computes again instead of keeping it: saves memory, costs time. With scan, stage takes
    groups of blocks, for very deep networks."""
    scan: bool = False
    """Compile the equal blocks of a ResNet's stage once and run them in a loop: compile time no longer grows with
    depth."""
    act: Literal["relu", "silu", "gelu", "identity"] | None = None
    """Activation in place of the model's own."""
    attention: Literal["none", "se", "eca"] | None = None
    """Attention over channels in place of the model's own."""
    anti_alias: Literal["none", "average", "blur"] | None = None
    """Low pass before pixels are left out, in place of the model's own."""
    drop_rate: float | None = None
    """Of the dropout before the head."""
    drop_path_rate: float | None = None
    """Share of the images whose last branch is left out in training; it falls to 0 at the first."""
    output_stride: Literal[8, 16, 32] | None = None
    """The image never shrinks further than by this; later stages are dilated instead."""
    global_pool: Literal["avg", "max", "avgmax", "catavgmax"] | None = None
    """Pooling before the head."""


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are read."""

    dataset: str = "digits"
    """digits, folder:PATH, csv:FILE (columns path, label and perhaps split; several labels as a;b;c), tfds:NAME[:SPLIT]
    or synthetic. A resumed run may find the same pictures elsewhere."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps its data; None for its own default."""
    image_size: Size = 8
    """Side of training images in pixels, or height and width."""
    eval_image_size: Size | None = None
    """The same of images that are evaluated; None for image_size."""
    channels: int = 3
    """Of the pictures. 3 is RGB in 8 bits; 1 is grey, other numbers are those of .npy and TIFF files: these keep their
    16 bits or floating-point values."""
    validation_fraction: float = 0.2
    """Share of the training split that is held out for validation, by name, where the data has no validation split and
    something is selected (train.metric) or there is no test split; 0 for none."""
    accept_changes: bool = False
    """Resume although pictures of the training split were added, lost, moved or relabelled."""
    sampling: Literal["natural", "balanced"] = "natural"
    """balanced: every class is drawn equally often, the pictures of small ones again and again."""
    mean: tuple[float, ...] = (0.305, 0.305, 0.305)
    """Subtracted from the channels of pixels in [0, 1]; where there are not as many, their mean."""
    std: tuple[float, ...] = (0.376, 0.376, 0.376)
    """What the channels are divided by afterwards."""
    on_device: bool = True
    """Keep the data on the accelerator; indices, crops and flips are then drawn inside the compiled step."""
    workers: int = 0
    """Processes that decode; 0 decodes in threads of this process."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded; skipped ones are counted and listed in the summary."""
    timeout: float = 600.0
    """Seconds after which a loader that gives nothing ends the run, naming the image it is at."""
    synthetic_size: int = 1024
    """Images in the synthetic dataset."""
    synthetic_classes: int = 1000
    """Classes in the synthetic dataset."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, and the crop of those that are evaluated."""

    crop: Literal["none", "pad", "random_resized"] = "pad"
    """pad: add a border and cut out the size again; random_resized: cut out an area and resize it; none: resize."""
    pad: int = 1
    """Width of that border in pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image that random_resized cuts out."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Mirror left and right: half of the images of every epoch by chance, or each image in every second epoch."""
    flip_vertical: bool = False
    """Mirror half of the images top to bottom too, as aerial and microscopic pictures allow. Host data only."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each changed by a factor of up to 1 +- this. Host data only."""
    randaugment: int = 0
    """Magnitude (1 to 10) of two random operations an image; 0 for none. Host data only."""
    trivial_augment: bool = False
    """One random operation of random strength an image (Mueller and Hutter 2021). Host data only."""
    erasing: float = 0.0
    """Chance that a random box of the image becomes noise (Zhong et al. 2017). Host data only."""
    repeats: int = 1
    """So many copies of an image, each augmented on its own, follow each other (Hoffer et al. 2019)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2017); 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); 0 for none. With mixup, each batch takes one of them by a coin."""
    eval_crop: float = 1.0
    """Images are evaluated after a resize of the short side to eval_image_size / eval_crop and a crop at the centre."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized; antialiased in both cases."""
    eval_flip: bool = False
    """Images are evaluated as they are and mirrored, and the two logits are averaged."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated."""

    name: Literal["sgd", "adamw", "lamb", "lars"] = "sgd"
    """sgd has Nesterov momentum."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    base_batch_size: int | None = None
    """The batch that learning_rate is meant for; it is scaled linearly to train.batch_size. None: no scaling."""
    momentum: float = 0.9
    """Of sgd and lars."""
    nesterov: bool = True
    """Look ahead in sgd."""
    weight_decay: float = 5e-4
    """Decay towards zero, times the factor of the first rule that matches."""
    decay_rules: tuple[tuple[str, float], ...] = (
        (".*/kernel", 1.0),
        (".*/(bias|scale|relative_rows|relative_columns)|class_token|position", 0.0),
    )
    """(regular expression over a whole parameter path, factor of weight_decay); every parameter needs a match."""
    rate_rules: tuple[tuple[str, float], ...] = ()
    """(regular expression over a whole parameter path, factor of learning_rate); the first match counts, 0 freezes, the
    statistics of a norm too, and what no rule matches has the factor that finetune gives it, or 1."""
    clip_norm: float | None = None
    """Greatest global norm of the gradient."""
    sam_rho: float = 0.0
    """Radius of sharpness-aware minimisation (Foret et al. 2020), which takes two gradients a step; 0 for none."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "step", "cosine", "one_cycle"] = "cosine"
    """Shape of the learning rate after the warm-up; one_cycle rises for 30 % of the run, then falls to zero."""
    warmup_epochs: float = 2.0
    """Length of the warm-up."""
    warmup_factor: float = 0.0
    """The warm-up starts at this share of the learning rate."""
    warmup_shape: Literal["linear", "constant"] = "linear"
    """constant stays at the starting value until the warm-up ends."""
    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run at which `step` multiplies the rate by `factor`."""
    factor: float = 0.1
    """Of `step`."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a pretrained network is tuned; `--finetune MODE` is short for `--finetune.mode MODE`."""

    mode: Literal["none", "linear_probe", "full", "gradual"] = "none"
    """linear_probe trains the head alone, on features that are computed once where nothing is random; full trains all;
    gradual thaws stage by stage from the head down. What is frozen keeps its batch statistics too."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one stage to the one below it."""
    thaw_every_epochs: float = 2.0
    """In gradual, after this number of epochs the next stage is thawed."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and loss of a run."""

    epochs: float = 40.0
    """Passes over the training data."""
    steps: int | None = None
    """Length in steps, in place of epochs; a recipe's steps give way to epochs on the command line."""
    batch_size: int = 96
    """Images a step, over all devices."""
    seed: int = 0
    """Of parameters, order, augmentation and splits."""
    loss: Literal["cross_entropy", "focal", "binary"] = "cross_entropy"
    """focal (Lin et al. 2017) attends to what is still wrong; binary: one sigmoid a class (Wightman et al. 2021), and
    what data with several labels needs."""
    focal_gamma: float = 2.0
    """How strongly focal does so; 0 is cross_entropy."""
    class_weights: Literal["none", "balanced", "effective_number"] = "none"
    """Weight of a class in the loss: balanced is inverse to its number of images, effective_number less strongly so
    (Cui et al. 2019)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    ema_decay: float | None = 0.99
    """Decay of the moving average of parameters and batch statistics; None for none."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do when loss or state stops being finite: stop; skip that update, batch statistics and optimizer
    included; or go back to the last checkpoint with half the learning rate."""
    nonfinite_limit: int = 5
    """Skipped updates in a row, or rollbacks of a run, after which it ends all the same."""
    accumulate_steps: int = 1
    """Parts in which a batch goes through, to save memory; batch normalisation then sees one part at a time."""
    steps_per_call: int | None = None
    """Most steps in one dispatch; it always ends where something is logged, saved or evaluated. None: 5 with the data
    on the device; else 2 on a CPU, which may have to find a step's memory anew for each, and 1 elsewhere."""
    eval_every_epochs: float = 5.0
    """Evaluate on the validation split this often, and at the end."""
    metric: Literal["auto", "none", "accuracy", "loss", "macro_recall", "macro_f1", "map"] = "auto"
    """What makes a checkpoint the best on the validation split, of the moving average where there is one. auto:
    accuracy, or where images have several labels map, the mean over the classes of average precision. none: nothing is
    selected, and the last step is what counts."""
    patience: int | None = None
    """End after this number of evaluations on the validation split without a better one."""


@dataclass(frozen=True)
class ParallelConfig:
    """The devices that share the work."""

    devices: int | None = None
    """Use the first devices, of that number,; None for all."""
    strategy: Literal["jit", "shard_map", "pmap"] = "jit"
    """How the step is split: jit leaves it to XLA; shard_map and pmap run a function for each device."""
    batch_norm: str = "global"
    """Whose statistics batch normalisation takes: global (the whole batch), local (each device's), or ghost:N (groups
    of N images)."""
    fsdp: int = 1
    """Parameters, averages and optimizer state are spread over this number of devices; needs jit."""
    distributed: Literal["auto", "off"] = "off"
    """auto: join the processes of the cluster that JAX detects (SLURM, Open MPI, Kubernetes, Cloud TPU), or of the
    coordinator below."""
    coordinator: str | None = None
    """Address and port of the first process, such as 10.0.0.1:1234; None asks the environment
    (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) or the cluster."""
    processes: int | None = None
    """How many processes there are; with coordinator."""
    process_id: int | None = None
    """Number of this process, from 0; with coordinator."""
    join_within: float = 40.0
    """Seconds for which a process waits until all have joined; then all end, naming those that are missing."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every_steps: int | None = None
    """Save this often; None saves after each evaluation. The end is always saved."""
    keep: int = 1
    """Latest checkpoints that are kept, beside the best one."""


@dataclass(frozen=True)
class LogConfig:
    """When numbers are written."""

    every_steps: int = 15
    """Write training metrics, averaged since the last line, this often."""
    tensorboard: bool = True
    """Write TensorBoard events too."""
    report: bool = True
    """Make report.html at the end."""
    profile: str | None = None
    """START:STOP, such as 20:25: a trace of the steps from START to before STOP for TensorBoard and xprof, in the run's
    folder."""


@dataclass(frozen=True)
class Config:
    """A whole recipe. The default trains a small residual network on scikit-learn's handwritten digits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
