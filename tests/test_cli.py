import json
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest

from resnet_jax.cli import MEMORY, main, parse_recipe, spelt_out
from resnet_jax.config import Config, ParallelConfig
from resnet_jax.recipes import load_config, to_dict
from resnet_jax.sharding import known_on_cpu
from resnet_jax.training.state import OPTION

from .conftest import ROOT


def run(arguments, capsys):
    """Exit status, standard output and standard error of a command line."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


COMMAND = """
import os
import sys

from resnet_jax import cli

print(os.getpid())
cli.main = lambda arguments: print(os.getpid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"])
cli.run()
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
@pytest.mark.parametrize("given", [{}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_a_command_starts_anew_once_with_kept_memory_unless_settings_are_given(given, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
    command = [sys.executable, "-u", str(tmp_path / "command.py"), "plan"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *starts, last = done.stdout.splitlines()
    assert starts == [last.split()[0]] * (1 if given else 2)
    assert last.endswith(f"['plan'] {given.get('GLIBC_TUNABLES', MEMORY)}")


def test_flags_override_the_file(tmp_path):
    flags = ["--config", str(ROOT / "configs" / "cifar10_resnet20.py"), "--workdir", "a", "--train.batch_size", "64"]
    config, workdir = parse_recipe([*flags, "--data.no_on_device", "--model.compute_dtype", "bfloat16"])
    assert workdir == "a"
    assert (config.train.batch_size, config.train.steps) == (64, 64_000)
    assert not config.data.on_device and config.model.compute_dtype == "bfloat16"


@pytest.mark.parametrize("flags", [["--train.epochs", "3"], ["--train.epochs=3"]])
def test_epochs_of_a_flag_take_the_place_of_steps_in_the_file(flags):
    file = ["--config", str(ROOT / "configs" / "cifar10_resnet20.py")]
    config, _ = parse_recipe([*file, *flags])
    assert (config.train.epochs, config.train.steps) == (3.0, None)
    both, _ = parse_recipe([*file, *flags, "--train.steps", "50"])
    assert both.train.steps == 50


def test_the_recipe_of_a_run_is_what_flags_change(tmp_path):
    folder, file = ["--workdir", str(tmp_path)], ["--config", str(ROOT / "configs" / "cifar10_resnet20.py")]
    among = ["--parallel.distributed", "auto", "--parallel.coordinator", "host:1", "--parallel.processes", "2"]
    among += ["--parallel.process_id", "1", "--parallel.strategy", "shard_map"]
    theirs, _ = parse_recipe([*file, *among, "--optimizer.learning_rate", "0.7"])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(theirs)))
    alone = replace(theirs, parallel=ParallelConfig(strategy="shard_map"))
    assert parse_recipe(folder)[0] == alone
    assert parse_recipe([*folder, "--train.epochs", "3"])[0].train == replace(theirs.train, epochs=3.0, steps=None)
    assert parse_recipe([*file, *folder])[0] == load_config(file[1])
    assert parse_recipe(["--workdir", str(tmp_path / "new")])[0] == Config()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "resnet50"}', '{"model": {"depth": 20}}'])
@pytest.mark.parametrize("command", [["train", "--workdir"], ["evaluate"]])
def test_a_folder_whose_recipe_cannot_be_read_is_named(text, command, capsys, tmp_path):
    (tmp_path / "config.json").write_text(text)
    status, _, err = run([*command, str(tmp_path)], capsys)
    assert status == 2 and f"{tmp_path / 'config.json'} is no recipe of a run" in err


def test_booleans_may_have_a_value():
    assert spelt_out(["--data.on_device", "False", "--log.tensorboard", "True", "--train.seed", "3"]) == [
        "--data.no_on_device",
        "--log.tensorboard",
        "--train.seed",
        "3",
    ]


def test_a_misspelt_flag_names_the_nearest(capsys):
    status, out, err = run(["train", "--optimizer.learning_rat", "0.1"], capsys)
    assert status == 2
    assert "learning_rate" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there are train, plan, show-batch, evaluate"),
        (["train", "--model.name", "rsnet50"], "did you mean resnet50"),
        (["train", "--data.dataset", "web"], "digits, folder:PATH"),
        (["train", "--data.dataset", "folder:/no/such"], "there is no such folder"),
        (["train", "--config", "/no/such.py"], "there is no such file"),
        (["train", "--train.batch_size", "33"], "nearest that does is 32"),
        (["evaluate", "/no/such/run"], "holds no run"),
        (["models", "nothing*"], "no model matches"),
    ],
)
def test_wrong_input_ends_with_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(arguments, capsys)
    assert status == 2
    assert err.startswith("error: ") and message in err
    assert not list(tmp_path.rglob("*.json"))


def test_help_describes_every_field(capsys):
    status, out, _ = run(["train", "--help"], capsys)
    assert status == 0
    assert "--optimizer.learning_rate" in out and "Peak learning rate." in out
    assert run([], capsys)[0] == 0


def test_models_lists_cost_and_weights(capsys):
    status, out, _ = run(["models", "resnet26*"], capsys)
    lines = out.splitlines()
    assert status == 0 and [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "resnet26", "resnet26d", "resnet26t"
    ]  # fmt: skip
    assert lines[0].split()[1:] == ["15,995,176", "parameters", "2.36", "GMACs", "at", "224"]
    assert lines[1].split() == ["resnet26.bt_in1k", "apache-2.0,", "default"]
    (row,) = json.loads(run(["models", "resnet18d", "--json"], capsys)[1])
    assert (row["name"], row["parameters"], row["size"]) == ("resnet18d", 11_708_744, 224)
    assert [tag["default"] for tag in row["tags"]] == [True, False]


def test_a_run_from_the_shell(tmp_path):
    """The real processes: train, evaluate as a table and as JSON."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    flags = ["--workdir", "run", "--model.name", "cifar_resnet8", "--train.steps", "6"]
    flags += ["--schedule.warmup_epochs", "0", "--train.batch_size", "32"]
    shell = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    train = subprocess.run([sys.executable, ROOT / "train.py", *flags], **shell)
    assert train.returncode == 0, train.stderr
    assert "resnet-jax evaluate run" in train.stdout
    assert "step 6/6" in train.stdout
    assert "CACHE MISS" in train.stderr
    second = subprocess.run([sys.executable, ROOT / "train.py", *flags, "--workdir", "second"], **shell)
    missed = [line for line in second.stderr.splitlines() if "CACHE MISS" in line]
    if not known_on_cpu(OPTION):  # then its trial fails, and is not kept
        missed = [line for line in missed if "jit_trial" not in line]
    assert second.returncode == 0 and "cache hit" in second.stderr and not missed
    command = [sys.executable, "-m", "resnet_jax.cli", "evaluate", "run"]
    table = subprocess.run([*command, "--per-class"], **shell)
    assert table.returncode == 0 and "360 images" in table.stdout and "top-5" in table.stdout, table.stderr
    listed = subprocess.run([sys.executable, "-m", "resnet_jax.cli", "runs", "."], **shell).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["run", "finished"], ["second", "finished"]]
    result = json.loads(subprocess.run([*command, "--json"], **shell).stdout)
    assert result["test"]["count"] == 360 and result["step"] == 6
    again = subprocess.run([sys.executable, ROOT / "train.py", *flags, "--train.seed", "1"], **shell)
    assert again.returncode == 2 and "train.seed: 0 -> 1" in again.stderr
