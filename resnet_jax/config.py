"""The recipe of a run: frozen dataclasses with their own checks, to and from JSON.

Every field is a flag of `resnet-jax train`, such as `--train.batch_size 64`, and its docstring the flag's help. What
depends on model, weights or data is None until a run begins, where `training.resolve` finds it.
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from resnet_jax.files import local_path, parse_path
from resnet_jax.typed import InputError, check_limits, require, shown, typed

Size: TypeAlias = int | tuple[int, int]
"""Pixels of an image: its side, or height and width."""

MOST = 2**31 - 1
"""The largest number of a field that has no other limit."""
SYNTHETIC_BYTES = 2**35
"""Most that the synthetic images of a recipe may take."""


Value = TypeVar("Value")


def known(value: Value | None, name: str) -> Value:
    """Returns the value of a field that is None until a run begins.

    Args:
      name: of the field, such as `data.mean`.

    Raises:
      InputError: it is still None.
    """
    if value is None:
        raise InputError(
            f"{name} is None, which only the start of a run resolves: give it, or take "
            "resnet_jax.training.resolve.resolve(config).config"
        )
    return value


def known_size(size: Size | None) -> Size:
    """Returns a `data.image_size` as `known` does."""
    return known(size, "data.image_size")  # type: ignore[return-value]  # mypy makes an object of the union


def shown_size(size: Size) -> str:
    """Returns a size, such as `32` or `32 x 48`."""
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def sides(size: Size | None) -> tuple[int, int]:
    """Returns height and width.

    Raises:
      InputError: it is None, a `data.image_size` that nothing has resolved.
    """
    found = known_size(size)
    return (found, found) if isinstance(found, int) else found


def option(default: Any, limits: str | None = None, *, may_change_on_resume: bool = False) -> Any:
    """Declares a field of a recipe.

    Args:
      limits: the interval in which its number, or each of its numbers, must lie, such as `[0, 1)` or `[1, MOST]`.
      may_change_on_resume: a run that is resumed may have another value, since it does not change the result.
    """
    return field(default=default, metadata={"limits": limits, "may_change_on_resume": may_change_on_resume})


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str | None = None
    """A name from `resnet-jax models`. None takes the model of the pretrained weights, and without any
    cifar_resnet20."""
    num_classes: int | None = option(None, "[1, 10000000]")
    """Outputs of the head; None takes the number of classes in the data."""
    pretrained: str | None = None
    """Weights to start from: a tag such as resnet50.tv2_in1k, a file, hf-hub:OWNER/NAME, a run's folder. Their model
    and preprocessing count where the recipe gives none."""
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
    remat: Literal["none", "block", "stage"] = option("none", may_change_on_resume=True)
    """What the backward pass computes again instead of keeping it: saves memory, costs time. With scan, stage takes
    groups of blocks, for very deep networks."""
    scan: bool = option(False, may_change_on_resume=True)
    """Compile the equal blocks of a ResNet's stage once and run them in a loop: compile time no longer grows with
    depth."""
    act: Literal["relu", "silu", "gelu", "identity"] | None = None
    """Activation in place of the model's own."""
    attention: Literal["none", "se", "eca"] | None = None
    """Attention over channels in place of the model's own."""
    anti_alias: Literal["none", "average", "blur"] | None = None
    """Low-pass filter before downsampling, in place of the model's own."""
    drop_rate: float | None = option(None, "[0, 1)")
    """Rate of the dropout before the head."""
    drop_path_rate: float | None = option(None, "[0, 1)")
    """Stochastic depth: how often the last block's branch is left out in training; it falls to 0 at the first block."""
    output_stride: Literal[8, 16, 32] | None = None
    """The image never shrinks further than by this; later stages are dilated instead."""
    global_pool: Literal["avg", "max", "avgmax", "catavgmax"] | None = None
    """Pooling before the head."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pretrained is not None:
            parse_path(self.pretrained, "model.pretrained")
        require(
            not (self.scan and self.drop_path_rate),
            "model.scan needs equal blocks, and model.drop_path_rate gives each its own rate: leave one of them out",
        )


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are read."""

    dataset: str = option("digits", may_change_on_resume=True)
    """digits, folder:PATH, csv:FILE (columns path, label and perhaps split; several labels as a;b;c),
    tfds:NAME[:SPLIT], hf:NAME_OR_PATH[:SPLIT], parquet:PATH (a file, a folder or a pattern) or synthetic. A resumed run
    may find the same pictures elsewhere."""
    data_dir: str | None = option(None, may_change_on_resume=True)
    """Where tensorflow-datasets or Hugging Face keep their data; None for their own default."""
    image_column: str | None = option(None, may_change_on_resume=True)
    """Column of the images in hf: and parquet:; None finds it by its type."""
    label_column: str | None = option(None, may_change_on_resume=True)
    """Column of the labels in hf: and parquet:; None finds it by its type."""
    image_size: Size | None = option(None, "[1, 16384]")
    """Side or height and width in pixels. It is that of training images. None takes that of the weights, else what is
    usual for the model: 32 for cifar_*, else 224."""
    eval_image_size: Size | None = option(None, "[1, 16384]")
    """The same of images that are evaluated; None for image_size."""
    channels: int = option(3, "[1, 4096]")
    """Of the pictures. 3 is RGB in 8 bits; 1 is grey, other numbers are those of .npy and TIFF files: these keep their
    16 bits or floating-point values."""
    validation_fraction: float = option(0.2, "[0, 1)")
    """Share of the training split that is held out for validation, by name, where the data has no validation split and
    something is selected (train.metric) or there is no test split; 0 for none."""
    accept_changes: bool = option(False, may_change_on_resume=True)
    """Resume although pictures of the training split were added, lost, moved or relabelled."""
    sampling: Literal["natural", "balanced"] = "natural"
    """balanced: every class is drawn equally often, the pictures of small ones again and again."""
    mean: tuple[float, ...] | None = option(None, "[-MOST, MOST]")
    """Subtracted from the channels of pixels in [0, 1]; their mean, where the number of channels is another. None takes
    that of the weights, else measures it on up to 1,000 training pictures."""
    std: tuple[float, ...] | None = option(None, "[1e-30, MOST]")
    """What the channels are divided by afterwards; None as for mean."""
    on_device: bool | None = None
    """Keep the data on the accelerator; indices, crops and flips are then drawn inside the compiled step. None does so
    where the training images take less than 1 GiB and nothing works on the host."""
    workers: int = option(0, "[0, 1024]", may_change_on_resume=True)
    """Processes that decode; 0, and evaluations of up to 1,000 images, take threads of this one."""
    on_bad_image: Literal["error", "skip"] = option("error", may_change_on_resume=True)
    """What to do with an image that cannot be decoded; skipped ones are counted and listed in the summary."""
    timeout: float = option(600.0, "(0, MOST]", may_change_on_resume=True)
    """Seconds after which a loader that gives nothing ends the run, naming the image it is at."""
    synthetic_size: int = option(1024, "[1, MOST]")
    """Images in the synthetic dataset."""
    synthetic_classes: int = option(1000, "[1, 10000000]")
    """Classes in the synthetic dataset."""

    def __post_init__(self) -> None:
        check_fields(self)
        kind, _, path = self.dataset.partition(":")
        if path and kind in ("folder", "csv"):
            parse_path(path, "data.dataset")
        elif path and kind in ("tfds", "hf", "parquet"):
            local_path(path, "data.dataset")
        for name in ("image_column", "label_column"):
            require(
                getattr(self, name) is None or kind in ("hf", "parquet"),
                f"data.{name} is for hf: and parquet:, and data.dataset is {self.dataset!r}: leave it out",
            )
        if self.data_dir is not None:
            local_path(self.data_dir, "data.data_dir")
        for name, values in (("mean", self.mean), ("std", self.std)):
            require(
                values is None or len(values) in (1, 3, self.channels),
                f"data.{name} has {len(values or ())} values: give one for each of the {self.channels} channels",
            )
        pixels = 0 if self.image_size is None else math.prod(sides(self.image_size))
        count = self.synthetic_size * pixels * self.channels
        require(
            self.dataset != "synthetic" or count <= SYNTHETIC_BYTES,
            f"data.synthetic_size {self.synthetic_size}: its images take {count / 2**30:,.0f} GiB of memory; take "
            f"fewer or smaller ones, up to {SYNTHETIC_BYTES // 2**30} GiB",
        )


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, and the crop of those that are evaluated."""

    crop: Literal["none", "pad", "random_resized"] | None = None
    """pad: a border, then a random cut; random_resized: an area, resized; none: resize. None
    takes pad for images of up to 64 pixels and random_resized for larger ones."""
    pad: int | None = option(None, "[0, 1024]")
    """Width of that border in pixels; None takes an eighth of the side."""
    area: tuple[float, float] = option((0.08, 1.0), "(0, 1]")
    """Least and greatest share of the image that random_resized cuts out."""
    flip: Literal["none", "random", "alternating"] | None = None
    """Mirror left and right: half of the images by chance, or each in every second epoch. None takes random; for the
    digits and where labels are no classes none."""
    flip_vertical: bool = False
    """Mirror half of the images top to bottom too, as aerial and microscopic pictures allow. Host data only."""
    color_jitter: float = option(0.0, "[0, 1)")
    """Brightness, contrast and saturation are each changed by a factor of up to 1 ± this. Host data only."""
    randaugment: int = option(0, "[0, 10]")
    """Magnitude (1 to 10) of two random operations an image; 0 for none. Host data only."""
    trivial_augment: bool = False
    """One random operation of random strength an image (Mueller and Hutter 2021). Host data only."""
    erasing: float = option(0.0, "[0, 1]")
    """Chance that a random box of the image becomes noise (Zhong et al. 2017). Host data only."""
    repeats: int = option(1, "[1, MOST]")
    """How many copies of an image follow each other, each augmented on its own (Hoffer et al. 2019)."""
    mixup: float = option(0.0, "[0, 1000]")
    """Alpha of mixup (Zhang et al. 2017); 0 for none."""
    cutmix: float = option(0.0, "[0, 1000]")
    """Alpha of CutMix (Yun et al. 2019); 0 for none. With mixup, each batch takes one of them by a coin."""
    eval_crop: float | None = option(None, "[0.01, 1]")
    """Images are evaluated after a resize of the short side to eval_image_size / eval_crop and a crop at the centre.
    None takes that of the weights, else 0.875 from 224 pixels on and 1 below."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How images are resized; antialiased in both cases. None takes that of the weights, else bilinear."""
    eval_flip: bool = False
    """Images are evaluated as they are and mirrored, and the two logits are averaged."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.area[0] <= self.area[1], f"augment.area {self.area}: the least share comes first")


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated."""

    name: Literal["sgd", "adam", "adamw", "lamb", "lars"] = "sgd"
    """sgd has momentum; adam adds the decay to the gradient, adamw to the update; lamb and lars are for very large
    batches."""
    learning_rate: float = option(0.1, "[0, 1e+30]")
    """Peak learning rate."""
    base_batch_size: int | None = option(None, "[1, MOST]")
    """The batch that learning_rate is meant for; it is scaled linearly to train.batch_size. None: no scaling."""
    momentum: float = option(0.9, "[0, 1)")
    """Momentum of sgd and lars."""
    nesterov: bool = True
    """Nesterov's momentum in sgd."""
    weight_decay: float = option(5e-4, "[0, 1000000]")
    """Decay towards zero, times the factor of the first rule that matches."""
    decay_rules: tuple[tuple[str, float], ...] = (
        (".*/kernel", 1.0),
        (".*/(bias|scale|relative_rows|relative_columns)|class_token|position", 0.0),
    )
    """(regular expression over a whole parameter path, factor of weight_decay); every parameter needs a match."""
    rate_rules: tuple[tuple[str, float], ...] = ()
    """(regular expression over a whole parameter path, factor of learning_rate); the first match counts, 0 freezes, the
    statistics of a norm too, and what no rule matches has the factor that finetune gives it, or 1."""
    clip_norm: float | None = option(None, "(0, MOST]")
    """Greatest global norm of the gradient."""
    sam_rho: float = option(0.0, "[0, 1000]")
    """Radius of sharpness-aware minimisation (Foret et al. 2020), which takes two gradients a step; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self)
        for pattern, factor in self.decay_rules:
            check_rule(pattern, factor, "optimizer.decay_rules")
        for pattern, factor in self.rate_rules:
            check_rule(pattern, factor, "optimizer.rate_rules")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "step", "cosine", "one_cycle"] = "cosine"
    """Shape of the learning rate after the warm-up; one_cycle rises for 30 % of the run, then falls to zero."""
    warmup_epochs: float = option(2.0, "[0, MOST]")
    """Length of the warm-up."""
    warmup_factor: float = option(0.0, "[0, 1]")
    """The warm-up starts at this share of the learning rate."""
    warmup_shape: Literal["linear", "constant"] = "linear"
    """constant stays at the starting value until the warm-up ends."""
    boundaries: tuple[float, ...] = option((0.5, 0.75), "(0, 1)")
    """Shares of the run at which `step` multiplies the rate by `factor`."""
    factor: float = option(0.1, "(0, 1000]")
    """What `step` multiplies the rate by."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            list(self.boundaries) == sorted(set(self.boundaries)),
            f"schedule.boundaries {self.boundaries}: give shares of the run that rise",
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """How a pretrained network is tuned; `--finetune MODE` is short for `--finetune.mode MODE`."""

    mode: Literal["none", "linear_probe", "full", "gradual"] = "none"
    """linear_probe trains the head alone, on features that are computed once where nothing is random; full trains all;
    gradual thaws stage by stage from the head down. What is frozen keeps its batch statistics too."""
    layer_decay: float = option(1.0, "(0, 1]")
    """Factor of the learning rate from one stage to the one below it."""
    thaw_every_epochs: float = option(2.0, "(0, MOST]")
    """In gradual, after this number of epochs the next stage is thawed."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and loss of a run."""

    epochs: float = option(40.0, "(0, MOST]")
    """Passes over the training data."""
    steps: int | None = option(None, "[1, MOST]")
    """Length in steps, in place of epochs; a recipe's steps give way to epochs on the command line."""
    batch_size: int = option(96, "[1, 1000000]")
    """Images a step, over all devices."""
    seed: int = option(0, "[0, 4294967295]")
    """Of parameters, order, augmentation and splits."""
    loss: Literal["cross_entropy", "focal", "binary"] = "cross_entropy"
    """focal (Lin et al. 2017) lowers the weight of what is right already; binary: one sigmoid a class (Wightman et al.
    2021), and what data with several labels needs."""
    focal_gamma: float = option(2.0, "[0, 100]")
    """How strongly focal does so; 0 is cross_entropy."""
    class_weights: Literal["none", "balanced", "effective_number"] = "none"
    """Weight of a class in the loss: balanced is inverse to its number of images, effective_number less strongly so
    (Cui et al. 2019)."""
    label_smoothing: float = option(0.0, "[0, 1)")
    """Share of the target that is spread over all classes."""
    ema_decay: float | None = option(0.99, "(0, 1)")
    """Decay of the moving average of parameters and batch statistics, at first (1 + step) / (10 + step) where that is
    less; None for none."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do when loss or state stops being finite: stop; skip that update, batch statistics and optimizer
    included; or go back to the last checkpoint with half the learning rate."""
    nonfinite_limit: int = option(5, "[1, MOST]")
    """Skipped updates in a row, or rollbacks of a run, after which it ends all the same."""
    accumulate_steps: int = option(1, "[1, MOST]")
    """Parts of a batch that are computed one after the other, to save memory; batch normalisation then sees one part at
    a time."""
    steps_per_call: int | None = option(None, "[1, 1000]")
    """Most steps that one compiled call runs; a call ends where something is logged, saved or evaluated. None: 5 with
    the data on the device, else 2 on a CPU and 1 elsewhere; 1 for a model of your own on a CPU. More share the host's
    time for a call, which counts for small networks, and let a signal wait longer. It is part of the recipe because
    each number is a compiled program of its own, which may round otherwise: a resumed run keeps it."""
    eval_every_epochs: float = option(5.0, "(0, MOST]")
    """Evaluate on the validation split this often, and at the end."""
    metric: str = "auto"
    """What makes a checkpoint the best on the validation split, of the moving average where there is one: accuracy,
    loss, macro_recall, macro_f1, map (the mean over the classes of average precision), or the name of a metric of your
    own. auto: accuracy; where images have several labels map; where there are no classes loss. none: nothing is
    selected, and the last step is what counts."""
    metric_goal: Literal["auto", "max", "min"] = "auto"
    """Whether more or less of the metric is better; auto knows it of ours, and a metric of your own needs the word."""
    patience: int | None = option(None, "[1, MOST]")
    """End after this number of evaluations on the validation split without a better one."""
    accept_parts: bool = option(False, may_change_on_resume=True)
    """Resume although a model, loss, optimizer, ... of your own is another one than the run was started with."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.metric != "none" or self.patience is None,
            "train.patience needs a metric to wait for: leave train.metric none out",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """The devices that share the work."""

    devices: int | None = option(None, "[1, MOST]", may_change_on_resume=True)
    """How many devices to use, the first ones; None for all."""
    strategy: Literal["jit", "shard_map", "pmap"] = option("jit", may_change_on_resume=True)
    """How the step is split: jit leaves it to XLA; shard_map and pmap run a function for each device."""
    batch_norm: str = "global"
    """Whose statistics batch normalisation takes: global (the whole batch), local (each device's), or ghost:N (groups
    of N images)."""
    fsdp: int = option(1, "[1, MOST]", may_change_on_resume=True)
    """Parameters, averages and optimizer state are spread over this number of devices, but for small arrays; needs
    jit."""
    distributed: Literal["auto", "off"] = option("off", may_change_on_resume=True)
    """auto: join the processes of the cluster that JAX detects (SLURM, Open MPI, Kubernetes, Cloud TPU), or of the
    coordinator below."""
    coordinator: str | None = option(None, may_change_on_resume=True)
    """Address and port of the first process, such as 10.0.0.1:1234; None asks the environment
    (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) or the cluster."""
    processes: int | None = option(None, "[1, MOST]", may_change_on_resume=True)
    """How many processes there are; with coordinator."""
    process_id: int | None = option(None, "[0, MOST]", may_change_on_resume=True)
    """Number of this process, from 0; with coordinator."""
    join_within: float = option(40.0, "(0, 1000000]", may_change_on_resume=True)
    """Seconds for which a process waits until all have joined; then all end, naming those that are missing."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.fsdp == 1 or self.strategy == "jit",
            f"parallel.fsdp needs parallel.strategy jit: {self.strategy} keeps all of the state on each device",
        )
        require(
            re.fullmatch(r"global|local|ghost:[1-9][0-9]{0,8}", self.batch_norm) is not None,
            f"parallel.batch_norm {self.batch_norm!r} is unknown; choose global, local or ghost:N",
        )
        given = [value is not None for value in (self.coordinator, self.processes, self.process_id)]
        require(
            not any(given) or (all(given) and self.distributed == "auto"),
            "parallel.coordinator, processes and process_id belong together, with parallel.distributed auto",
        )
        require(
            self.coordinator is None or re.fullmatch(r".+:[0-9]{1,5}", self.coordinator) is not None,
            f"parallel.coordinator {self.coordinator!r}: give a host and a port, such as 10.0.0.1:1234",
        )
        require(
            (self.process_id or 0) < (self.processes or MOST),
            f"parallel.process_id {self.process_id}: of {self.processes} processes the first is 0",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every_steps: int | None = option(None, "[1, MOST]", may_change_on_resume=True)
    """Save this often; None saves after each evaluation. The end is always saved."""
    keep: int = option(1, "[1, MOST]", may_change_on_resume=True)
    """Latest checkpoints that are kept, beside the best one."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class LogConfig:
    """When numbers are written."""

    every_steps: int = option(15, "[1, MOST]", may_change_on_resume=True)
    """Write training metrics, averaged since the last line, this often."""
    tensorboard: bool = option(True, may_change_on_resume=True)
    """Write TensorBoard events too."""
    report: bool = option(True, may_change_on_resume=True)
    """Make report.html at the end."""
    profile: str | None = option(None, may_change_on_resume=True)
    """START:STOP, such as 20:25: a trace of the steps from START to before STOP for TensorBoard and xprof, in the run's
    folder."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.profile is not None:
            span = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile)
            require(
                span is not None and int(span[1]) < int(span[2]),
                f"log.profile {self.profile!r} is no START:STOP: give two steps, such as 20:25",
            )


@dataclass(frozen=True)
class Config:
    """A whole recipe. What is None is resolved where a run begins; with nothing given it is the recipe
    `digits_resnet20`: a small residual network on scikit-learn's handwritten digits.

    Example:
      >>> from resnet_jax.config import OptimizerConfig, TrainConfig
      >>> config = rj.Config(train=TrainConfig(epochs=10), optimizer=OptimizerConfig(learning_rate=0.05))
      >>> config.train.epochs, config.data.dataset
      (10, 'digits')
    """

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

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Config).items():
            section = getattr(self, name)
            require(isinstance(section, kind), f"{name} is {shown(section)} and must be {kind.__name__}(...)")
        require(
            not (self.model.scan and self.optimizer.name in ("lars", "lamb")),
            f"optimizer.name {self.optimizer.name} takes the norm of each layer, and model.scan stacks them: leave "
            "model.scan out, or take sgd or adamw",
        )
        require(
            self.parallel.strategy != "pmap" or self.train.steps_per_call in (None, 1),
            "parallel.strategy pmap runs one step a call: leave train.steps_per_call at 1, or take jit",
        )
        augment, channels = self.augment, self.data.channels
        host = works_on_host(augment)
        for name, without in host.items():
            require(
                not self.data.on_device,
                f"augment.{name} works on the host: with data.on_device leave it out ({without}), or add "
                "--data.no_on_device",
            )
        for name in ("color_jitter", "randaugment", "trivial_augment"):
            require(
                name not in host or channels == 3,
                f"augment.{name} is for RGB: leave it out with data.channels {channels}",
            )


def works_on_host(augment: AugmentConfig) -> dict[str, str]:
    """Returns the augmentations of a recipe that only the host can do, which the data on a device cannot have, and the
    flag that leaves each out.
    """
    wanted = {
        "crop random_resized": (augment.crop == "random_resized", "crop pad"),
        "flip_vertical": (augment.flip_vertical, "no_flip_vertical"),
        "color_jitter": (augment.color_jitter > 0, "color_jitter 0"),
        "randaugment": (augment.randaugment > 0, "randaugment 0"),
        "trivial_augment": (augment.trivial_augment, "no_trivial_augment"),
        "erasing": (augment.erasing > 0, "erasing 0"),
    }
    return {name: f"--augment.{without}" for name, (there, without) in wanted.items() if there}


def check_fields(section: Any) -> None:
    """Raises InputError where a field of a section is not of its type, not finite, or outside its limits."""
    kind, hints = type(section), typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        name = f"{kind.__name__.removesuffix('Config').lower()}.{item.name}"
        value = getattr(section, item.name)
        typed(value, hints[item.name], name)
        if (limits := item.metadata.get("limits")) and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                check_limits(number, limits.replace("MOST", str(MOST)), name)


def check_rule(pattern: str, factor: float, name: str) -> None:
    """Raises InputError where a rule is no regular expression, could take for ever, or its factor is negative.

    A group under `*`, `+` or `{}` is refused: a match can then take exponential time.
    """
    about = f"{name} {pattern[:200]!r}"
    require(0 <= factor <= MOST, f"{about}: its factor {shown(factor)} must be at least 0")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{about} is no regular expression: {error}") from error
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern, flags=re.DOTALL)
    repeats_group = re.search(r"\)\s*[*+{]|\(\?(#|[a-zA-Z]*x)", plain) is not None
    require(
        len(pattern) <= 1000 and not repeats_group,
        f"{about}: it is too long, or repeats a group, which could take for ever",
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the recipe as JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """Returns the recipe of `to_dict`; lists become tuples, absent fields have their defaults.

    Raises:
      InputError: a field is unknown, of another type or impossible, or a section is no object; the message names it.
    """
    return typed(values, Config, "the recipe")


def result_fields(config: Config) -> dict[str, Any]:
    """Returns `section.field` -> value of all that can change a run's result."""
    return {
        f"{section}.{item.name}": getattr(values, item.name)
        for section, values in vars(config).items()
        for item in dataclasses.fields(values)
        if not item.metadata.get("may_change_on_resume")
    }


def differences(old: Config, new: Config) -> list[str]:
    """Returns `field: old -> new` for every field that differs and changes the result."""
    before = result_fields(old)
    return [
        f"{name}: {before[name]!r} -> {value!r}" for name, value in result_fields(new).items() if value != before[name]
    ]
