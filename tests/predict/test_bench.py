"""Models are measured on this machine."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.models.registry import cost
from resnet_jax.predict import bench


def test_a_model_is_measured(capsys):
    assert main(["bench", "cifar_resnet8", "--batch", "4", "--image_size", "8", "--repeats", "3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    model = rj.create_model("cifar_resnet8")
    assert (row["parameters"], row["gmacs"] * 1e9) == pytest.approx(cost(model, 8))
    for kind in ("inference", "training"):
        found = row[kind]
        assert found["n"] == 3
        assert 0 < found["quartiles"][0] <= found["images_per_second"] <= found["quartiles"][1]
    weights = 4 * row["parameters"]
    assert row["inference"]["memory"] > weights
    assert row["training"]["memory"] > 2 * weights + row["inference"]["memory"] - weights  # with momentum
    print(bench.format_bench(row))
    out = capsys.readouterr().out
    assert "GMACs at 8 pixels, batch 4, float32" in out and "inference" in out and "n = 3" in out


def test_the_time_to_compile_is_not_that_of_reading_the_cache(tmp_path):
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        x = jnp.ones(3)
        program, seconds = bench.compiled(jax.jit(lambda x: 17 * x), x)
        assert seconds > 0 and not any("lambda" in file.name for file in tmp_path.iterdir())
        np.testing.assert_array_equal(program(x), jax.jit(lambda x: 17 * x)(x))  # which JAX keeps
        assert any("lambda" in file.name for file in tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_the_median_of_calls_after_the_warm_up_counts(monkeypatch):
    """Calls of 9 s twice, then of 1, 5, 2, 4 and 3 s."""
    now = [0.0]
    lengths = iter([9.0, 9.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(lengths)

    found = bench.measured((call, None, 0.5), 60, 5)
    assert found["images_per_second"] == 20 and found["quartiles"] == [15, 30] and found["n"] == 5
    assert found["memory"] is None


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(capsys, monkeypatch):
    def training(model, state, images):
        if model.stage_sizes[0] == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        return (lambda: None), 2**20, 0.1

    monkeypatch.setattr(bench, "PROGRAMS", {"training": training})
    assert main(["bench", "cifar_resnet8", "cifar_resnet14", "cifar_resnet8"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cifar_resnet8: not measured: RESOURCE_EXHAUSTED: no memory"
    assert lines[1].startswith("cifar_resnet14: ") and "1.0 MiB" in lines[2] and len(lines) == 3
    for words, message in (
        ([], "name the models"),
        (["resnet5"], "did you mean"),
        (["cifar_resnet8", "--batch", "0"], "--batch"),
        (["cifar_resnet8", "--image_size", "0"], "--image_size"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err
    assert bench.models_of(("cifar_resnet2*", "cifar_resnet20"))[0] == "cifar_resnet20"
    assert bench.usual_size("cifar_resnet8") == 32 and bench.usual_size("test_resnet") == 160
