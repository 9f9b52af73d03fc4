import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.config import AugmentConfig, Config, DataConfig, InputError, ModelConfig, ParallelConfig
from resnet_jax.recipe_files import load_config
from resnet_jax.runs.forecast import classes_of, collective_bytes, flops_of, forecast, format_plan, parse_memory

from ..conftest import ROOT

RECIPE = Config(model=ModelConfig(num_classes=10), data=DataConfig(on_device=False), augment=AugmentConfig(crop="none"))


def test_data_parallel_steps_exchange_gradients_and_batch_statistics_and_no_activations():
    needs = forecast(RECIPE, 8)
    gradients, statistics = 4 * needs["parameters"], needs["state"]["batch_stats"]
    assert set(needs["collectives"]) == {"all-reduce"}
    assert gradients <= needs["collectives"]["all-reduce"] <= 1.01 * (gradients + statistics)


def test_nothing_travels_but_gradients_and_statistics_with_crops_and_flips_on_the_device():
    small = load_config(ROOT / "configs" / "cifar10_resnet20.py")
    needs = forecast(dataclasses.replace(small, train=dataclasses.replace(small.train, batch_size=128)), 2)
    assert "\nbeside it training images of less than 1 GiB are kept on each device" in format_plan(needs)
    assert set(needs["collectives"]) == {"all-reduce"} and needs["parameters"] == 269_722
    assert needs["collectives"]["all-reduce"] <= 1.01 * (4 * needs["parameters"] + needs["state"]["batch_stats"])


def test_a_spread_state_is_smaller_on_each_device_and_gathered():
    whole = forecast(RECIPE, 8)["state"]
    spread = forecast(dataclasses.replace(RECIPE, parallel=ParallelConfig(fsdp=8)), 8)
    assert spread["state"]["opt_state"] < 0.4 * whole["opt_state"]
    assert spread["collectives"]["all-gather"] > 0


def test_operations_are_those_of_the_plain_network_and_classes_those_of_the_folder(tmp_path):
    """By hand, with the custom kernels on: the gradients double each layer's operations again, but for the pixels'."""
    for name in ("train/a", "train/b", "train/c", "validation/a"):
        (tmp_path / name).mkdir(parents=True)
    recipe = dataclasses.replace(
        RECIPE,
        model=ModelConfig("cifar_resnet8"),
        data=dataclasses.replace(RECIPE.data, dataset=f"folder:{tmp_path}", image_size=32),
    )
    stages = (1024 * 9 * 2 * 16 * 16, 256 * 9 * (16 * 32 + 32 * 32), 64 * 9 * (32 * 64 + 64 * 64))
    stem, head = 1024 * 9 * 3 * 16, 64 * 3
    needs, images = forecast(recipe, 1), recipe.train.batch_size
    assert needs["flops"] == images * 2 * (2 * stem + 3 * sum(stages) + 3 * head)
    assert needs["parameters"] == 75_290 - 65 * 7
    first, second, *_ = format_plan(needs).splitlines()
    assert "kept on each device" not in format_plan(needs)
    assert first == f"74,835 parameters with 3 classes (of folder:{tmp_path})" and "GFLOP a step on 1 device:" in second
    nowhere = dataclasses.replace(recipe, data=DataConfig(dataset="folder:/nowhere"), model=ModelConfig("resnet18"))
    assert classes_of(nowhere)[0] == 1000 and "assumed" in classes_of(nowhere)[1]


def test_operations_of_loops_devices_and_strided_gradients_are_counted():
    """Three turns of a convolution with strides and its two gradients, each of which has as many multiply-adds."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))

    def convolve(kernel, images):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)

    def turn(carry, _):
        convolved, gradients = jax.vjp(convolve, *carry)
        return gradients(convolved), None

    def step(kernel, images):
        return jax.lax.scan(turn, (kernel, images), None, length=3)[0]

    spec = jax.sharding.PartitionSpec
    split = jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"), check_vma=False)
    shapes = jnp.zeros((3, 3, 4, 6)), jnp.zeros((16, 8, 8, 4))
    assert flops_of(split, *shapes) == 2 * 3 * 3 * 16 * (4 * 4 * 6) * (3 * 3 * 4) == flops_of(step, *shapes)


def test_bytes_are_read_from_the_text_of_a_program():
    text = """
  %a = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1}}
  %b = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce(%y, %z), to_apply=%add
  %c = u8[10]{0} all-gather-start(%w), dimensions={0}
  %d = f32[] add(%p, %q)
"""
    assert collective_bytes(text) == {"all-reduce": 4 * 128 + 16 + 8, "all-gather": 10}


def test_memory_has_a_unit():
    assert parse_memory("80GiB") == 80 * 2**30 and parse_memory("1.5 GB") == 1.5e9
    with pytest.raises(InputError, match="such as 80GiB"):
        parse_memory("80")


def test_the_command_needs_no_device_and_no_data():
    flags = ["--devices", "4", "--memory", "1GiB", "--json", "--model.num_classes", "10"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "resnet_jax.cli", "plan", *flags, "--data.dataset", "folder:/nowhere"]
    result = subprocess.run(command, env=environment | {"GLIBC_TUNABLES": ""}, capture_output=True, text=True)
    needs = json.loads(result.stdout)
    assert needs["devices"] == 4 and needs["parameters"] == 269_722 and needs["fits"]
    assert jax.device_count() == 8  # this process is untouched
