import dataclasses
import json

import pytest

from resnet_jax.config import Config, DataConfig, InputError, TrainConfig
from resnet_jax.recipes import check, differences, from_dict, load_config
from resnet_jax.recipes import to_dict as as_dict


def test_json_round_trip():
    config = Config(train=TrainConfig(steps=3, ema_decay=None), data=DataConfig(mean=(0.1, 0.2, 0.3)))
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config


def test_unknown_fields_of_a_saved_recipe_are_named():
    values = as_dict(Config())
    values["train"]["epoch"] = 3
    with pytest.raises(InputError, match=r"train\.epoch"):
        from_dict(values)


def test_differences_leave_out_what_does_not_change_the_result():
    other = Config(data=DataConfig(workers=3, image_size=16), log=dataclasses.replace(Config().log, every_steps=1))
    assert differences(Config(), other) == ["data.image_size: 8 -> 16"]


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"batch_size": 0}, "at least 1"),
        ("train", {"epochs": 0.0}, "above 0"),
        ("train", {"label_smoothing": 1.0}, r"\[0, 1\)"),
        ("train", {"ema_decay": 1.5}, "between 0 and 1"),
        ("augment", {"crop": "random_resized"}, "--data.no_on_device"),
        ("augment", {"randaugment": 3}, "--data.no_on_device"),
        ("data", {"validation_fraction": 1.0}, "between 0 and 1"),
        ("log", {"profile": "25:20"}, "is no START:STOP"),
        ("log", {"profile": "20"}, "such as 20:25"),
    ],
)
def test_impossible_fields_are_refused(section, fields, message):
    config = Config()
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)}))


@pytest.mark.parametrize("text", [None, "recipe = 3", "config = 3"])
def test_a_file_without_a_recipe_is_named(tmp_path, text):
    path = tmp_path / "recipe.py"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=r"--config .*recipe\.py"):
        load_config(path)
