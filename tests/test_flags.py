"""Command lines with wrong values: words and a status, never a traceback. Runs stop before their first step."""

import contextlib
import dataclasses
import io
import types
import typing

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_jax import cli
from resnet_jax.config import Config
from resnet_jax.lab.record import Notebook
from resnet_jax.predict import export_program
from resnet_jax.predict import predictor as inference
from resnet_jax.runs import forecast, show_batch
from resnet_jax.training import loop, sharding

from .small import save_small_network

NUMBERS = ("0", "-1", "-3", "1", "2", "7", "nan", "inf", "-inf", "1e308", "1e-300", "0.5", "1.5", "9" * 30, "x", "")
WORDS = ("", " ", "x", "~nosuchuser/x", "az://bucket/x", "s3://b/x", "file:///x", "é\u2028", "a b", "x" * 300, "20:1")
OF_FIELD = {
    "model.name": ("cifar_resnet8", "resnet10t", "densenet121", "vit_small_patch16_224", "rsnet50", ""),
    "data.dataset": (
        "digits",
        "synthetic",
        "folder:",
        "folder:/no",
        "csv:.",
        "folder:az://b/x",
        "tfds:gs://b/x",
        "web",
    ),
    "parallel.batch_norm": ("local", "ghost:7", "ghost:0", "ghost:", "ghost:99999999999", "ghost:48", "x"),
    "log.profile": ("20:25", "25:20", "0:0", "-1:3", "20", "1:" + "9" * 50),
    "parallel.coordinator": ("host:1", "host", ":", "host:99999999"),
}
"""Values of fields that are more than a word or a number."""
PATTERNS = (".*", "(", "(a+)+b", "(a|a)*", "x{1,99999999999999}", "[", "head/.*", "\\", "(?x)(a+) +")


def fields():
    """`section.field` and type of every field of a recipe."""
    for section, kind in typing.get_type_hints(Config).items():
        for name, hint in typing.get_type_hints(kind).items():
            yield f"{section}.{name}", hint


def words_for(name, hint):
    """Words after `--section.field`: right and wrong ones for its type."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if name.endswith("_rules"):
        return st.tuples(st.sampled_from(PATTERNS), st.sampled_from(NUMBERS)).map(list)
    if name in OF_FIELD:
        return st.sampled_from(OF_FIELD[name]).map(lambda word: [word])
    if kind in (typing.Union, types.UnionType):
        return st.one_of(*(words_for(name, part) for part in parts))
    if kind is typing.Literal:
        return st.sampled_from((*map(str, parts), "rubbish")).map(lambda word: [word])
    if kind is tuple:
        return st.lists(st.sampled_from(NUMBERS), max_size=4)
    if hint is bool:
        return st.sampled_from((["True"], ["False"], ["maybe"], []))
    if hint is type(None):
        return st.just(["None"])
    return st.sampled_from(NUMBERS if hint in (int, float) else WORDS).map(lambda word: [word])


FLAGS = st.one_of(
    *(words_for(name, hint).map(lambda words, name=name: [f"--{name}", *words]) for name, hint in fields())
)
SEVERAL = st.lists(FLAGS, min_size=1, max_size=3).map(lambda flags: [word for flag in flags for word in flag])
SMALL = ["--model.name", "cifar_resnet8", "--train.batch_size", "32"]


def reached(*arguments, **options):
    """Stands where the first step would begin."""
    print("reached")
    raise SystemExit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with things in the way and a small network, where runs stop before their first step."""
    folder = tmp_path_factory.mktemp("flags")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    (folder / "wrong.py").write_text("config = (")
    (folder / "null").mkdir()
    (folder / "null" / "config.json").write_text("{}")
    save_small_network(folder / "net.safetensors")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XLA_FLAGS", "")  # `plan` changes them
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setattr(loop, "start_processes", lambda recipe: None)
        patch.setattr(loop, "fit_with_rollbacks", reached)
        patch.setattr(forecast, "recipe_step", reached)
        patch.setattr(show_batch, "whole_split", reached)
        patch.setattr(show_batch, "train_batches", reached)
        patch.setattr(Notebook, "part", reached)
        patch.setattr(export_program, "write_stablehlo", reached)
        patch.setattr(inference, "make_forward", lambda model, variables: lambda images: jnp.zeros((len(images), 10)))
        patch.setattr(sharding, "run_in_caller", lambda: None)
        yield folder


def outcome(arguments):
    """Status and standard error of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue() + err.getvalue()


def fuzzed(examples):
    """Settings of a fuzz that is the same every time."""
    healthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=healthy
    )


def check_words(arguments):
    """A status that means something, and no traceback."""
    status, text = outcome(arguments)
    assert status in (0, 1, 2) and "Traceback" not in text, (arguments, status, text)
    assert status == 0 or text.strip(), arguments


@pytest.mark.parametrize(
    "line",
    [
        "train",
        "plan",
        "show-batch a.png",
        "show-batch a.png --data.no_on_device",
        "export net.safetensors a.stablehlo",
        "lab degradation",
    ],
)
def test_right_flags_reach_the_first_step(folder, line):
    command, *words = line.split()
    recipe = SMALL if command in ("train", "plan", "show-batch") else []
    status, text = outcome([command, *words, *recipe])
    assert status == 0 and text.endswith("reached\n")


@fuzzed(120)
@given(flags=SEVERAL)
def test_train_with_any_flags_ends_in_words(folder, flags):
    check_words(["train", *SMALL, *flags, "--workdir", "run"])


OF_PLAN = st.tuples(st.sampled_from(["--devices", "--memory"]), st.sampled_from((*NUMBERS, *WORDS, "80GiB"))).map(list)


@fuzzed(50)
@given(flags=st.one_of(SEVERAL, OF_PLAN))
def test_plan_with_any_flags_ends_in_words(folder, flags):
    check_words(["plan", *SMALL, *flags])


PLACES = st.sampled_from(
    (*WORDS, "file", "file/x", "empty", "null", "net.safetensors", "no/such", "wrong.py", "/dev/null")
)


@fuzzed(25)
@given(flags=FLAGS, place=PLACES, config=st.none() | PLACES)
def test_show_batch_with_any_flags_ends_in_words(folder, flags, place, config):
    check_words(["show-batch", f"{place}.png", *SMALL, *flags, *([] if config is None else ["--config", config])])


@fuzzed(50)
@given(
    source=st.just("net.safetensors") | PLACES,
    path=st.just("a.png") | PLACES,
    top=st.sampled_from(NUMBERS),
    batch=st.sampled_from(NUMBERS),
    cam=st.none() | PLACES,
)
def test_predict_with_any_flags_ends_in_words(folder, source, path, top, batch, cam):
    own = ["--top", top, "--batch", batch] if cam is None else ["--cam", cam]
    check_words(["predict", source, path, *own])


@fuzzed(50)
@given(
    source=st.just("net.safetensors") | PLACES,
    place=PLACES,
    form=st.sampled_from((".pth", ".safetensors", ".stablehlo", ".x", "")),
)
def test_export_with_any_flags_ends_in_words(folder, source, place, form):
    check_words(["export", source, place + form])


@fuzzed(60)
@given(
    name=st.sampled_from(("degradation", "landscape", "nosuch", "")),
    flag=st.sampled_from(("--seeds", "--depths", "--out", "--dataset")),
    value=st.sampled_from((*NUMBERS, *WORDS, "20,56", "1,,2", "file", "file/x", "folder:az://b/x")),
)
def test_lab_with_any_flags_ends_in_words(folder, name, flag, value):
    check_words(["lab", name, flag, value])


@fuzzed(40)
@given(command=st.sampled_from(("runs", "evaluate", "report")), place=PLACES)
def test_commands_on_any_folder_end_in_words(folder, command, place):
    check_words([command, place])


def test_every_number_of_a_recipe_has_limits():
    def of_numbers(hint):
        return hint in (int, float) or any(of_numbers(part) for part in typing.get_args(hint))

    numbers = {name for name, hint in fields() if of_numbers(hint) and not name.endswith("_rules")}
    limited = {
        f"{section}.{field.name}"
        for section, recipe in vars(Config()).items()
        for field in dataclasses.fields(recipe)
        if field.metadata.get("limits")
    }
    assert numbers == limited
    assert all(dataclasses.is_dataclass(section) for section in vars(Config()).values())
