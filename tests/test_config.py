import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest

from resnet_jax.config import (
    Config,
    DataConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    differences,
    from_dict,
    local_path,
)
from resnet_jax.config import to_dict as as_dict
from resnet_jax.recipe_files import load_config


def test_json_round_trip():
    config = Config(train=TrainConfig(steps=3, ema_decay=None), data=DataConfig(mean=(0.1, 0.2, 0.3)))
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config


def test_unknown_fields_of_a_saved_recipe_are_named():
    values = as_dict(Config())
    values["train"]["epoch"] = 3
    with pytest.raises(InputError, match=r"train\.epoch"):
        from_dict(values)


def test_differences_leave_out_what_does_not_change_the_result():
    first = load_config("digits_resnet20")
    data = dataclasses.replace(first.data, workers=3, image_size=16)
    other = dataclasses.replace(first, data=data, log=dataclasses.replace(first.log, every_steps=1))
    assert differences(first, other) == ["data.image_size: 8 -> 16"]


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"batch_size": 0}, "at least 1"),
        ("train", {"epochs": 0.0}, "above 0"),
        ("train", {"label_smoothing": 1.0}, r"\[0, 1\)"),
        ("train", {"ema_decay": 1.5}, "between 0 and 1"),
        ("augment", {"crop": "random_resized"}, "--data.no_on_device"),
        ("augment", {"randaugment": 3}, "--data.no_on_device"),
        ("data", {"validation_fraction": 1.0}, r"\[0, 1\)"),
        ("train", {"seed": -1}, r"at least 0, and is -1"),
        ("train", {"seed": 2**32}, "at most 4294967295"),
        ("train", {"seed": 10**5000}, "a whole number of more than 63 bits"),
        ("train", {"epochs": float("nan")}, "a finite number"),
        ("train", {"epochs": float("inf")}, "a finite number"),
        ("train", {"batch_size": "32"}, "must be a whole number"),
        ("train", {"nonfinite_limit": 0}, "at least 1"),
        ("train", {"accumulate_steps": 0}, "at least 1"),
        ("train", {"steps_per_call": 10**6}, r"\[1, 1000\]"),
        ("train", {"patience": 0}, "at least 1"),
        ("train", {"metric_goal": "most"}, "must be one of auto, max, min"),
        ("model", {"num_classes": 0}, "at least 1"),
        ("model", {"drop_rate": 1.0}, r"\[0, 1\)"),
        ("model", {"name": 50}, "must be a text"),
        ("model", {"pretrained": ""}, "is empty"),
        ("data", {"std": (0.0, 0.0, 0.0)}, "at least 1e-30"),
        ("data", {"std": (1.0, float("nan"), 1.0)}, r"data.std\[1\] is nan"),
        ("data", {"mean": ()}, "0 values: give one for each of the 3 channels"),
        ("data", {"mean": (0.5, 0.5)}, "2 values"),
        ("data", {"mean": (float("inf"),) * 3}, "a finite number"),
        ("data", {"image_size": 0}, r"\[1, 16384\]"),
        ("data", {"image_size": (32, -1)}, r"\[1, 16384\]"),
        ("data", {"eval_image_size": 20_000}, r"\[1, 16384\]"),
        ("data", {"workers": -1}, r"\[0, 1024\]"),
        ("data", {"synthetic_size": 0}, "at least 1"),
        ("data", {"dataset": "synthetic", "synthetic_size": 10**9}, "GiB of memory"),
        ("data", {"dataset": "folder:az://b/x"}, "only gs://BUCKET/PATH is supported"),
        ("data", {"data_dir": "s3://b/x"}, "has to be on this machine"),
        ("data", {"data_dir": "~nosuchuser/x"}, "no such home"),
        ("augment", {"pad": -1}, r"\[0, 1024\]"),
        ("augment", {"area": (0.9, 0.1)}, "least share comes first"),
        ("augment", {"area": (0.0, 1.0)}, r"\(0, 1\]"),
        ("augment", {"mixup": float("nan")}, "a finite number"),
        ("optimizer", {"learning_rate": -0.1}, "at least 0"),
        ("optimizer", {"learning_rate": float("inf")}, "a finite number"),
        ("optimizer", {"momentum": 1.0}, r"\[0, 1\)"),
        ("optimizer", {"clip_norm": 0.0}, "above 0"),
        ("optimizer", {"weight_decay": -1.0}, "at least 0"),
        ("optimizer", {"decay_rules": (("(", 1.0),)}, "no regular expression"),
        ("optimizer", {"decay_rules": ((".*", -1.0),)}, "at least 0"),
        ("optimizer", {"rate_rules": (("(a+)+b", 1.0),)}, "could take for ever"),
        ("optimizer", {"rate_rules": (("(?x)(a+) +b", 1.0),)}, "could take for ever"),
        ("optimizer", {"rate_rules": (("(a|a)*b", 1.0),)}, "could take for ever"),
        ("optimizer", {"rate_rules": ((".*", float("nan")),)}, "a finite number"),
        ("schedule", {"boundaries": (0.5, 1.5)}, "between 0 and 1"),
        ("schedule", {"boundaries": (0.7, 0.5)}, "that rise"),
        ("parallel", {"devices": 0}, "at least 1"),
        ("parallel", {"fsdp": 0}, "at least 1"),
        ("parallel", {"batch_norm": "ghost:0"}, "ghost:N"),
        (
            "parallel",
            {"distributed": "auto", "coordinator": "host:1", "processes": 2, "process_id": 2},
            "of 2 processes the first is 0",
        ),
        (
            "parallel",
            {"distributed": "auto", "coordinator": "host", "processes": 2, "process_id": 0},
            "a host and a port",
        ),
        ("checkpoint", {"every_steps": -3}, "at least 1"),
        ("checkpoint", {"every_steps": 0}, "at least 1"),
        ("checkpoint", {"keep": 0}, "at least 1"),
        ("log", {"every_steps": 0}, "at least 1"),
        ("log", {"profile": "1:" + "9" * 5000}, "is no START:STOP"),
        ("log", {"profile": "25:20"}, "is no START:STOP"),
        ("log", {"profile": "20"}, "such as 20:25"),
    ],
)
def test_impossible_fields_are_refused(section, fields, message):
    config = load_config("digits_resnet20")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), -1e30, 10**40, True, "1"], ids=repr)
def test_no_number_is_without_limits(number):
    for section, recipe in vars(Config()).items():
        for field in dataclasses.fields(recipe):
            if field.metadata.get("limits"):
                value = (number,) * len(field.default) if isinstance(field.default, tuple) else number
                with pytest.raises(InputError, match=f"{section}.{field.name}"):
                    dataclasses.replace(recipe, **{field.name: value})


def test_every_word_that_a_field_may_be_is_of_its_type():
    for section, kind in typing.get_type_hints(Config).items():
        for name, hint in typing.get_type_hints(kind).items():
            for word in _words(hint):
                assert "it must be" not in _refusal(getattr(Config(), section), name, word)


def _refusal(section, name, value):
    try:
        dataclasses.replace(section, **{name: value})
    except InputError as error:
        return str(error)
    return ""


def _words(hint):
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return [word for part in typing.get_args(hint) for word in _words(part)]


@pytest.mark.parametrize("pattern", [r".*/kernel", r"stage[1-4]/block\d+/.*", r"(stem|stage1)/.*", r"(?!head/).*"])
def test_rules_of_the_usual_kinds_are_taken(pattern):
    assert OptimizerConfig(rate_rules=((pattern, 0.5),)).rate_rules == ((pattern, 0.5),)


def test_a_section_that_is_none_is_named():
    with pytest.raises(InputError, match=r"train is 3 and must be TrainConfig"):
        Config(train=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("recipe = 3", "must define `config = Config"),
        ("config = 3", "must define `config = Config"),
        ("\nconfig = (", r"line 2: SyntaxError"),
        ("import os\n\nconfig = os.nosuch", r"line 3: AttributeError: .*nosuch"),
        ("import nosuchmodule", r"line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)", r"line 1: SystemExit: 3"),
        (b"config = '\xff'", "SyntaxError.*utf-8"),
        (b"config = '\0'", "null byte"),
    ],
)
def test_a_file_without_a_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"--config .*recipe\.py.*{message}"):
        load_config(path)


def test_a_recipe_that_is_shipped_is_found_by_its_name():
    assert load_config("digits_resnet20").model.name == "cifar_resnet20"
    assert load_config("cifar10_resnet56").model.name == "cifar_resnet56"


def test_a_misspelt_name_is_answered_with_the_names_the_nearest_first():
    with pytest.raises(
        InputError, match="finetune_foldr: there is no recipe of this name; there are finetune_folder, "
    ):
        load_config("finetune_foldr")


def test_a_recipe_starts_from_one_that_is_shipped_or_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from resnet_jax.configs.imagenet_resnet50 import config\n")
    (tmp_path / "longer.py").write_text(
        "from dataclasses import replace\n"
        "from mine import config as mine\n"
        "config = replace(mine, train=replace(mine.train, epochs=300.0))\n"
    )
    config = load_config(tmp_path / "longer.py")
    assert (config.model.name, config.train.epochs) == ("resnet50", 300.0)
    assert str(tmp_path) not in sys.path


def test_a_folder_in_place_of_a_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match="it is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize("path", ["gs://b/x", "https://host/x", "", " ", "~nosuchuser/x", "x" * 300, "a\0b"])
def test_paths_that_are_none_of_this_machine_are_refused(path):
    with pytest.raises(InputError, match="--workdir"):
        local_path(path, "--workdir")


def test_a_remote_path_is_refused_as_an_object_too():
    with pytest.raises(InputError, match="has to be on this machine"):
        local_path(Path("gs://bucket/x"), "--workdir")


def test_a_local_path_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x", "--workdir") == tmp_path / "x"
    assert local_path("a:b/c d", "--workdir") == Path("a:b/c d")
