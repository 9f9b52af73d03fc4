"""What a recipe takes from its pretrained weights."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax import InputError, Predictor, create_model, to_torch
from resnet_jax.cli import main
from resnet_jax.config import AugmentConfig, Config, DataConfig, LogConfig, ModelConfig, ScheduleConfig, TrainConfig
from resnet_jax.training.build import length_of, make_plan
from resnet_jax.training.loop import train
from resnet_jax.training.resolve import resolve
from resnet_jax.weights.sources import find_weights
from resnet_jax.weights.tags import find_tag, tags_of


@pytest.mark.parametrize(
    ("length", "examples", "words"),
    [
        ({"epochs": 6}, 225, "43 steps (6 epochs of 7.03 steps, rounded up)"),
        ({"epochs": 1}, 320, "10 steps (1 epoch of 10 steps)"),
        ({"epochs": 90}, 1_281_167, "3,603,283 steps (90 epochs of 40,036.5 steps, rounded up)"),
        ({"steps": 6}, 1157, "6 steps, 0.166 epochs"),
        ({"epochs": 30, "batch_size": 24}, 400, "500 steps (30 epochs of 16.67 steps)"),
    ],
)
def test_a_length_in_epochs_says_how_it_became_whole_steps(length, examples, words):
    config = Config(train=TrainConfig(**{"batch_size": 32} | length))
    assert length_of(config, make_plan(config, examples)) == words


@pytest.mark.parametrize("source", ["no/such.pth", "hf-hub:a/b"])
def test_weights_that_are_not_there_are_named_with_their_flag_and_what_to_give(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(InputError, match=r"^model.pretrained: .*--model.pretrained FILE .*--model.pretrained None"):
        resolve(Config(model=ModelConfig("resnet50", pretrained=source)))


@pytest.fixture
def tensors():
    model = create_model("test_resnet", num_classes=4)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    return to_torch(model, variables)


def look(config):
    data, augment = config.data, config.augment
    evaluation = (augment.eval_crop, augment.interpolation, augment.eval_flip)
    return data.mean, data.std, data.image_size, data.eval_image_size, *evaluation


def test_a_bare_file_is_prepared_for_as_in_prediction(tmp_path, tensors, caplog):
    """As the default tag of the model that the recipe names."""
    source = str(tmp_path / "bare.safetensors")
    save_file(tensors, source)
    config = resolve(Config(model=ModelConfig("test_resnet", pretrained=source))).config
    expected = tags_of("test_resnet")[0].preprocessing
    assert look(config) == dataclasses.astuple(expected) != look(resolve(Config()).config)
    assert Predictor.from_source(source, "test_resnet").preprocessing == expected
    assert "bare.safetensors does not say how images are prepared: taken as for test_resnet.r160_in1k" in caplog.text
    assert "Preprocessing(" not in caplog.text


def test_flags_give_a_bare_file_torchvisions_preprocessing_and_a_line_says_which_are_open(tmp_path, tensors, capsys):
    """Those of docs/from_torchvision.md."""
    source = str(tmp_path / "bare.safetensors")
    save_file(tensors, source)
    words = ["show-batch", str(tmp_path / "a.png"), "--data.dataset", "synthetic", "--train.batch_size", "2"]
    words += ["--model.pretrained", source, "--model.name", "resnet18"]
    assert main([*words, "--augment.eval_crop", "0.875"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "bare.safetensors" in line)
    assert line.startswith(f"WARNING: {source} does not say how images are prepared: taken as for resnet18.a1_in1k, ")
    assert "288 in evaluation (--data.eval_image_size), bicubic (--augment.interpolation), " in line
    assert "eval_crop" not in line
    config = Config(
        model=ModelConfig("resnet18", pretrained=source),
        data=DataConfig(image_size=224),
        augment=AugmentConfig(eval_crop=0.875, interpolation="bilinear"),
    )
    expected, found = find_tag("resnet18.tv_in1k").preprocessing, look(resolve(config).config)
    assert found == (expected.mean, expected.std, 224, None, expected.eval_crop, expected.interpolation, False)
    assert (expected.image_size, expected.eval_image_size) == (224, 224)


def test_a_run_from_a_bare_file_is_predicted_with_what_it_was_trained_with(tmp_path, tensors):
    """With a size of its own, which keeps the rest of the preprocessing of the weights."""
    source = str(tmp_path / "bare.safetensors")
    save_file(tensors, source)
    config = Config(
        model=ModelConfig("test_resnet", pretrained=source),
        data=DataConfig(dataset="synthetic", synthetic_size=16, synthetic_classes=4, image_size=32),
        schedule=ScheduleConfig(warmup_epochs=0.0),
        train=TrainConfig(steps=1, batch_size=8),
        log=LogConfig(report=False, tensorboard=False),
    )
    train(config, tmp_path / "run")
    expected = dataclasses.replace(tags_of("test_resnet")[0].preprocessing, image_size=32, eval_image_size=32)
    assert find_weights(str(tmp_path / "run")).preprocessing == expected


def test_weights_that_do_not_fit_name_both_models(tmp_path, tensors):
    nan = tensors | {"bn1.bias": tensors["bn1.bias"] * np.nan}
    for values, name, says in (
        (tensors, "cifar_resnet8", r"model.name is cifar_resnet8. .*bare.safetensors: the tensors are not"),
        (nan, "test_resnet", r"bare.safetensors: the weights are damaged:\n  bn1.bias"),
    ):
        save_file(values, tmp_path / "bare.safetensors")
        config = Config(
            model=ModelConfig(name, pretrained=str(tmp_path / "bare.safetensors")),
            data=DataConfig(dataset="synthetic", synthetic_size=16, synthetic_classes=4, image_size=32),
        )
        with pytest.raises(InputError, match=says):
            train(config, tmp_path / name)
