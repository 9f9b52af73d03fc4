"""The recipe of a run: frozen dataclasses. `Config()` is the digits recipe; every field is a flag."""

import re
from dataclasses import dataclass, field
from typing import Literal


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy. Commands end with status 2."""


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
    """What of a ResNet is computed a second time on the way back instead of being kept: saves memory, costs time."""
    scan: bool = False
    """Compile the equal blocks of a ResNet's stage once and run them in a loop: compile time no longer grows with
    depth. Slow on a CPU."""
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
    """digits, folder:PATH, csv:FILE (columns path, label and perhaps split), tfds:NAME[:SPLIT] or synthetic."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps its data; None for its own default."""
    image_size: int = 8
    """Height and width of training images in pixels."""
    eval_image_size: int | None = None
    """Height and width of test images; None for image_size."""
    validation_fraction: float = 0.2
    """Share of each class held out for testing where the data has no test split."""
    mean: tuple[float, float, float] = (0.305, 0.305, 0.305)
    """Subtracted from the channels of pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.376, 0.376, 0.376)
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
    """Random changes to training images, and the crop of test images."""

    crop: Literal["none", "pad", "random_resized"] = "pad"
    """pad: add a border and cut out the size again; random_resized: cut out an area and resize it; none: resize."""
    pad: int = 1
    """Width of that border in pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image that random_resized cuts out."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Mirror left and right: half of the images of every epoch by chance, or each image in every second epoch."""
    randaugment: int = 0
    """Magnitude (1 to 10) of two random operations an image; 0 for none. Host data only."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2017); 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); 0 for none. With mixup, each batch takes one of them by a coin."""
    eval_crop: float = 1.0
    """Test images are resized to eval_image_size / eval_crop on the short side, then cut out at the centre."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized; antialiased in both cases."""
    eval_flip: bool = False
    """Test images are seen as they are and mirrored, and the two logits are averaged."""


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
    decay_rules: tuple[tuple[str, float], ...] = ((".*/kernel", 1.0), (".*/(bias|scale)", 0.0))
    """(regular expression over a whole parameter path, factor of weight_decay); every parameter needs a match."""
    rate_rules: tuple[tuple[str, float], ...] = ()
    """(regular expression over a whole parameter path, factor of learning_rate); the first match counts, 0 freezes, and
    what no rule matches has the factor 1."""
    clip_norm: float | None = None
    """Greatest global norm of the gradient."""


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
class TrainConfig:
    """Length, batch and loss of a run."""

    epochs: float = 40.0
    """Passes over the training data."""
    steps: int | None = None
    """Length in steps, in place of epochs."""
    batch_size: int = 96
    """Images a step, over all devices."""
    seed: int = 0
    """Of parameters, order, augmentation and splits."""
    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    """binary: one sigmoid a class (Wightman et al. 2021)."""
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
    steps_per_call: int = 1
    """Steps in one dispatch; needs data.on_device."""
    eval_every_epochs: float = 5.0
    """Evaluate this often, and at the end."""


@dataclass(frozen=True)
class ParallelConfig:
    """The devices that share the work."""

    devices: int | None = None
    """Use the first so many devices; None for all."""
    strategy: Literal["jit", "shard_map", "pmap"] = "jit"
    """How the step is split: jit leaves it to XLA; shard_map and pmap run a function for each device."""
    batch_norm: str = "global"
    """Whose statistics batch normalisation takes: global (the whole batch), local (each device's), or ghost:N (groups
    of N images)."""
    fsdp: int = 1
    """Parameters, averages and optimizer state are spread over so many devices; needs jit."""
    distributed: Literal["auto", "off"] = "off"
    """auto: join the processes of the cluster that JAX detects (SLURM, Open MPI, Kubernetes, Cloud TPU), or of the
    coordinator below."""
    coordinator: str | None = None
    """Address and port of the first process, such as 10.0.0.1:1234; None asks the cluster."""
    processes: int | None = None
    """How many processes there are; with coordinator."""
    process_id: int | None = None
    """Number of this process, from 0; with coordinator."""


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
    profile: tuple[int, int] | None = None
    """First and last step of a trace for TensorBoard and xprof, in the run's folder."""


@dataclass(frozen=True)
class Config:
    """A whole recipe. The default trains a small residual network on scikit-learn's handwritten digits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def check(config: Config) -> None:
    """Raises InputError where fields are impossible or contradict each other."""
    problems = [
        (config.train.batch_size < 1, "train.batch_size must be at least 1"),
        (config.train.steps is None and config.train.epochs <= 0, "train.epochs must be above 0"),
        (config.train.steps is not None and config.train.steps < 1, "train.steps must be at least 1"),
        (config.train.eval_every_epochs <= 0, "train.eval_every_epochs must be above 0"),
        (config.train.accumulate_steps < 1, "train.accumulate_steps must be at least 1"),
        (config.train.nonfinite_limit < 1, "train.nonfinite_limit must be at least 1"),
        (config.data.timeout <= 0, "data.timeout must be above 0"),
        (config.train.steps_per_call < 1, "train.steps_per_call must be at least 1"),
        (
            config.train.steps_per_call > 1 and not config.data.on_device,
            "train.steps_per_call above 1 needs the data on the device: add --data.on_device",
        ),
        (
            config.data.on_device and config.augment.crop == "random_resized",
            "augment.crop random_resized works on the host: add --data.no_on_device, or take --augment.crop pad",
        ),
        (
            config.data.on_device and config.augment.randaugment > 0,
            "augment.randaugment works on the host: add --data.no_on_device",
        ),
        (not 0 < config.data.validation_fraction < 1, "data.validation_fraction must lie between 0 and 1"),
        (not 0 <= config.train.label_smoothing < 1, "train.label_smoothing must lie in [0, 1)"),
        (
            config.train.ema_decay is not None and not 0 < config.train.ema_decay < 1,
            "train.ema_decay must lie between 0 and 1; None turns it off",
        ),
        (not 0 < config.augment.eval_crop <= 1, "augment.eval_crop must lie in (0, 1]"),
        (not 0 <= config.augment.randaugment <= 10, "augment.randaugment must lie in 0..10"),
        (
            config.model.scan and bool(config.model.drop_path_rate),
            "model.scan needs equal blocks, and model.drop_path_rate gives each its own rate: leave one of them out",
        ),
        (
            config.model.scan and config.optimizer.name in ("lars", "lamb"),
            f"optimizer.name {config.optimizer.name} takes the norm of each layer, and model.scan stacks them: leave "
            "model.scan out, or take sgd or adamw",
        ),
        (config.log.every_steps < 1, "log.every_steps must be at least 1"),
        (config.checkpoint.keep < 1, "checkpoint.keep must be at least 1"),
    ]
    for wrong, message in problems + _parallel_problems(config.parallel, config.train.steps_per_call):
        if wrong:
            raise InputError(message)


def _parallel_problems(recipe: ParallelConfig, steps_per_call: int) -> list[tuple[bool, str]]:
    given = [value is not None for value in (recipe.coordinator, recipe.processes, recipe.process_id)]
    return [
        (recipe.fsdp < 1, "parallel.fsdp must be at least 1"),
        (
            recipe.fsdp > 1 and recipe.strategy != "jit",
            f"parallel.fsdp needs parallel.strategy jit: {recipe.strategy} keeps all of the state on each device",
        ),
        (
            recipe.strategy == "pmap" and steps_per_call > 1,
            "parallel.strategy pmap runs one step a call: leave train.steps_per_call at 1, or take jit",
        ),
        (
            recipe.strategy == "pmap" and recipe.distributed == "auto",
            "parallel.strategy pmap is for one process: take jit or shard_map for several",
        ),
        (
            not re.fullmatch(r"global|local|ghost:[1-9]\d*", recipe.batch_norm),
            f"parallel.batch_norm {recipe.batch_norm!r} is unknown; choose global, local or ghost:N",
        ),
        (
            any(given) and not (all(given) and recipe.distributed == "auto"),
            "parallel.coordinator, processes and process_id belong together, with parallel.distributed auto",
        ),
    ]
