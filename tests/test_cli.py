import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import pytest
from PIL import Image

from resnet_jax import cli
from resnet_jax.cli import MEMORY, main
from resnet_jax.commands import COMMANDS
from resnet_jax.config import Config, ParallelConfig, to_dict
from resnet_jax.recipe_files import load_config
from resnet_jax.recipe_flags import spelt_out
from resnet_jax.training import loop
from resnet_jax.typed import DISTRIBUTION

from .conftest import ROOT
from .small import parse_recipe, save_small_network


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
cli.main = lambda arguments: print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
cli.run()
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
@pytest.mark.parametrize(
    ("given", "starts_anew", "expected"),
    [
        ({}, True, MEMORY),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, False, "glibc.malloc.perturb=0"),
        ({"RESNET_JAX_LARGE_PAGES": "0"}, False, "None"),
        ({"RESNET_JAX_LARGE_PAGES": "1"}, True, MEMORY),
    ],
)
def test_a_command_starts_anew_once_with_kept_memory_unless_told_otherwise(given, starts_anew, expected, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
    command = [sys.executable, "-u", str(tmp_path / "command.py"), "plan"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *starts, last = done.stdout.splitlines()
    assert starts == [last.split()[0]] * (2 if starts_anew else 1)
    assert last.endswith(f"['plan'] {expected}")


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
    assert status == 2 and f"{tmp_path / 'config.json'} is no recipe of a run: " in err


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


SMALL = "train --model.name cifar_resnet8 --train.batch_size 32"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    file = tmp_path_factory.mktemp("network") / "net.safetensors"
    save_small_network(file)
    return file


@pytest.fixture
def things(tmp_path, monkeypatch, network):
    """The current folder, with a small network and with things that are in the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # `plan` changes it
    shutil.copy(network, tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Path("file").write_text("x")
    Path("folder.pth").mkdir()
    Path("bad.py").write_text("import os\nconfig = (\n")
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "there are train, sweep, plan, show-batch, evaluate"),
        ("train --model.name rsnet50", "did you mean resnet50"),
        ("train --data.dataset web", "digits, folder:PATH"),
        ("train --data.dataset folder:/no/such", "there is no such folder"),
        ("train --config /no/such.py", "there is no such file"),
        ("train --config ''", "--config is empty"),
        ("train --config folder.pth", "it is a folder"),
        ("train --config bad.py", "bad.py, line 2: SyntaxError"),
        ("train --train.batch_size 33", "nearest that does is 32"),
        ("train --train.seed -1", "train.seed must be at least 0, and is -1"),
        (f"train --train.seed {2**70}", "train.seed is a whole number of more than 63 bits"),
        ("train --train.epochs nan", "train.epochs is nan; it must be a finite number"),
        ("train --optimizer.learning_rate inf", "optimizer.learning_rate is inf; it must be a finite number"),
        ("train --optimizer.learning_rate -1", "optimizer.learning_rate must be at least 0"),
        ("train --data.std 0 0 0", "data.std must be at least 1e-30"),
        ("train --augment.pad -1", "augment.pad must lie in [0, 1024], and is -1"),
        ("train --checkpoint.every_steps -3", "checkpoint.every_steps must be at least 1, and is -3"),
        (f"{SMALL} --model.norm group", "16 channels do not divide into the 32 groups"),
        (f"{SMALL} --model.num_classes 5", "model.num_classes 5 is below the 10 classes of digits"),
        (f"{SMALL} --parallel.batch_norm ghost:7", "nearest sizes that do are 4, 8"),
        (
            f"{SMALL} --parallel.batch_norm ghost:8 --parallel.strategy shard_map",
            "the 4 images that go through at once",
        ),
        ("train --workdir az://bucket/run", "only gs://BUCKET/PATH is supported"),
        ("train --workdir ''", "--workdir is empty"),
        ("train --workdir ~nosuchuser/x", "there is no such home"),
        (f"{SMALL} --workdir file", "cannot be written"),
        (f"{SMALL} --workdir file/run", "cannot be written"),
        (f"train --workdir {'x' * 300}", "File name too long"),
        ("train --data.dataset folder:az://bucket/x", "only gs://BUCKET/PATH is supported"),
        ("train --data.dataset csv:s3://bucket/x.csv", "only gs://BUCKET/PATH is supported"),
        ("train --data.data_dir gs://bucket/x", "has to be on this machine"),
        ("train --model.pretrained s3://bucket/x.pth", "only gs://BUCKET/PATH is supported"),
        ("plan --parallel.strategy pmap", "plan with --parallel.strategy shard_map"),
        ("plan --devices 0", "from 1 to 1024"),
        ("plan --devices 1000000", "from 1 to 1024"),
        ("plan --memory nonsense", "such as 80GiB"),
        ("plan --memory ''", "such as 80GiB"),
        ("plan --memory 1.2.3GiB", "such as 80GiB"),
        ("plan --data.std nan nan nan", "data.std[0] is nan; it must be a finite number"),
        ("show-batch", "which file to write"),
        ("show-batch gs://bucket/a.png", "has to be on this machine"),
        ("show-batch a.png --train.epochs nan", "train.epochs is nan"),
        ("show-batch file/a.png", "cannot be written"),
        ("show-batch --data.image_size 8 16 file/a.png", "cannot be written"),
        ("evaluate /no/such/run", "holds no run"),
        ("evaluate az://bucket/run", "only gs://BUCKET/PATH is supported"),
        ("evaluate ~nosuchuser/run", "there is no such home"),
        ("evaluate file", "holds no run"),
        ("report s3://bucket/run", "only gs://BUCKET/PATH is supported"),
        ("report ''", "WORKDIR is empty"),
        ("runs az://bucket", "only gs://BUCKET/PATH is supported"),
        ("runs file", "there is no such folder"),
        ("predict s3://bucket/run a.png", "only gs://BUCKET/PATH is supported"),
        ("predict net.safetensors https://host/a.png", "only gs://BUCKET/PATH is supported"),
        ("predict net.safetensors a.png --top 0", "--top and --batch must be at least 1"),
        ("predict net.safetensors a.png --batch 0", "--top and --batch must be at least 1"),
        ("predict net.safetensors a.png --cam file", "--cam file is a file: name a folder"),
        ("predict net.safetensors a.png --cam file/x", "file/x"),
        ("predict net.safetensors a.png --cam gs://bucket/x", "has to be on this machine"),
        ("export net.safetensors az://bucket/a.pth", "only gs://BUCKET/PATH is supported"),
        ("export net.safetensors folder.pth", "no ordinary file"),
        ("export net.safetensors pipe --format pth", "no ordinary file"),
        ("export net.safetensors /dev/null --format safetensors", "no ordinary file"),
        ("export net.safetensors file/a.pth", "file/a.pth cannot be written"),
        ("export net.safetensors file/a.safetensors", "file/a.safetensors cannot be written"),
        (f"export net.safetensors {'x' * 250}.safetensors", "File name too long"),
        (f"export net.safetensors {'x' * 252}.pth", "File name too long"),
        ("export net.safetensors a.txt", "say which with --format"),
        ("models nothing*", "no model matches"),
        ("lab nosuch", "there is no experiment 'nosuch'"),
        ("lab degradation --seeds -1", "--seeds -1: seeds lie in 0 to"),
        (f"lab degradation --seeds {2**70}", "seeds lie in 0 to"),
        ("lab degradation --depths 0", "depths are 6n + 2"),
        ("lab degradation --depths 21", "depths are 6n + 2"),
        ("lab degradation --depths 60000002", "depths are 6n + 2"),
        ("lab degradation --dataset web", "digits, folder:PATH"),
        ("lab degradation --dataset folder:az://bucket/x", "only gs://BUCKET/PATH is supported"),
        ("lab degradation --out file", "--out file cannot be written"),
        ("lab degradation --out file/x", "--out file/x cannot be written"),
        ("lab degradation --out gs://bucket/x", "has to be on this machine"),
    ],
)
def test_wrong_input_ends_with_status_2(line, message, capsys, things):
    status, _, err = run(shlex.split(line), capsys)
    assert status == 2
    assert err.startswith("error: ") and message in err
    assert not list(things.rglob("*.json")) and not list(things.glob("*:*"))


@pytest.mark.parametrize("line", ["lab degradation --seeds x", "lab degradation --seeds 1,,2", "plan --devices x"])
def test_a_word_in_place_of_a_number_names_the_flag(line, capsys, things):
    status, _, err = run(shlex.split(line), capsys)
    flag = line.split()[-2]
    assert status == 2 and f"Error parsing {flag}" in err and "For full helptext" in err


def test_a_nul_character_is_no_traceback(capsys):
    assert run(["train", "--workdir", "a\0b"], capsys)[::2] == (
        2,
        "error: a word of the command line holds a NUL character\n",
    )


@pytest.mark.parametrize("field", [{"train": {"epochs": float("inf")}}, {"data": {"std": [0.0] * 3}}])
@pytest.mark.parametrize("command", ["train --workdir", "evaluate", "report"])
def test_the_recipe_of_a_run_is_checked_by_every_command(field, command, capsys, tmp_path):
    recipe = to_dict(Config())
    for section, values in field.items():
        recipe[section] |= values
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    (name,) = (f"{section}.{field}" for section, values in field.items() for field in values)
    status, _, err = run([*command.split(), str(tmp_path)], capsys)
    assert status == 2 and name in err and ("finite number" in err or "must be at least" in err)


@pytest.mark.parametrize("error", [MemoryError("64 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 64 GiB")])
def test_too_little_memory_is_a_sentence_with_the_remedy(error, capsys, monkeypatch, tmp_path):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(loop, "fit_with_rollbacks", exhausted)
    status, _, err = run([*SMALL.split(), "--workdir", str(tmp_path / "run")], capsys)
    assert status == 1 and "64 GiB" in err and "--train.batch_size" in err and "--model.remat" in err


def test_export_that_fails_leaves_the_old_file(capsys, things, monkeypatch):
    Path("old.pth").write_text("old")
    monkeypatch.setattr("torch.save", lambda values, path: Path(path).write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["export", "net.safetensors", "old.pth"])
    assert Path("old.pth").read_text() == "old" and not list(things.glob("*.new"))


PROCESS = [sys.executable, "-m", "resnet_jax.cli"]


EACH_DEVICE = """
import os
import sys

import jax

from resnet_jax import cli

for platform in ("rubbish", "cuda", "tpu"):
    os.environ["JAX_PLATFORMS"] = platform
    jax.config.update("jax_platforms", platform)
    for line in ("train --workdir run", "predict net.safetensors a.png"):
        print(platform, line, cli.main(line.split()), file=sys.stderr)
"""


def test_a_device_that_is_not_there_is_a_sentence(things):
    environment = os.environ | {"JAX_PLATFORMS": "rubbish"}
    command = [sys.executable, "-c", EACH_DEVICE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = iter(done.stderr.splitlines())
    for device in ("rubbish", "cuda", "tpu"):
        for line in ("train --workdir run", "predict net.safetensors a.png"):
            assert f"JAX_PLATFORMS={device}: JAX finds no such device here" in next(lines), done.stderr
            assert next(lines) == f"{device} {line} 2"


@pytest.mark.parametrize("home", ["/proc/nosuch", None])
def test_without_a_home_a_run_goes_on_without_a_cache_and_says_so_once(home, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG", "JAX_C"))}
    start = [sys.executable, "-c", NO_HOME if home is None else "from resnet_jax import cli; cli.run()"]
    flags = [*SMALL.split(), "--train.steps", "2", "--schedule.warmup_epochs", "0", "--workdir", str(tmp_path / "run")]
    flags += ["--parallel.devices", "1", "--train.metric", "none", "--log.no_report", "--log.no_tensorboard"]
    environment |= {} if home is None else {"HOME": home}
    done = subprocess.run([*start, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "run" / "curves.png").is_file(), done.stderr
    assert (done.stdout + done.stderr).count("compiled programs cannot be kept") == 1
    assert "Traceback" not in done.stderr and "atplotlib" not in done.stderr


NO_HOME = """
import os
import pwd

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody  # as for a user whom the system does not know

from resnet_jax import cli

cli.run()
"""


def test_a_closed_pipe_is_no_traceback():
    with subprocess.Popen([*PROCESS, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0 and not err


def test_another_pipe_that_breaks_is_not_taken_for_the_output(capsys, monkeypatch):
    """As that to the process that keeps shared memory, or to a worker: a run did not end as it should."""

    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(COMMANDS, "models", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["models"])


def test_a_batch_norm_that_sees_one_value_a_channel_is_a_warning(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "fit_with_rollbacks", lambda *_: sys.exit(0))
    flags = ["--model.name", "resnet10t", "--data.dataset", "synthetic", "--data.synthetic_size", "8"]
    flags += ["--data.synthetic_classes", "2", "--schedule.warmup_epochs", "0", "--augment.crop", "none"]

    def out(*more):
        folder = str(tmp_path / str(len(list(tmp_path.iterdir()))))  # a folder's recipe is what flags change
        return run(["train", *flags, *more, "--parallel.devices", "2", "--workdir", folder], capsys)[1]

    small, large = ["--data.image_size", "32"], ["--data.image_size", "64"]
    one_each = ["--train.batch_size", "2", "--parallel.batch_norm", "local"]
    assert "WARNING: 3 batch norms, stage4/block1/norm1 the first, see one value" in out(*small, *one_each)
    for scope in (["--parallel.batch_norm", "ghost:1"], ["--train.accumulate_steps", "2", *one_each[2:]]):
        assert "see one value a channel" in out(*small, "--train.batch_size", "4", *scope)
    assert "WARNING" not in out(*large, *one_each)
    assert "WARNING" not in out(*small, "--train.batch_size", "2")
    assert "WARNING" not in out(*small, *one_each, "--model.norm", "frozen_batch")


def test_the_version_is_told(capsys):
    assert run(["--version"], capsys)[:2] == (0, f"resnet-jax {metadata.version(DISTRIBUTION)}\n")


def test_shells_can_complete_commands_and_flags(capsys):
    status, out, _ = run(["--tyro-print-completion", "bash"], capsys)
    assert not status and "show-batch" in out and "--optimizer.learning_rate" in out


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


def test_a_run_from_the_shell(tmp_path, capsys, monkeypatch):
    """Real processes train, the second one with what the first one compiled; then it is evaluated."""
    one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"XLA_FLAGS": one, "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    flags = ["--workdir", "run", "--model.name", "cifar_resnet8", "--train.steps", "6"]
    flags += ["--schedule.warmup_epochs", "0", "--train.batch_size", "32", "--log.no_report"]
    shell = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    train = subprocess.run([sys.executable, ROOT / "train.py", *flags], **shell)
    assert train.returncode == 0, train.stderr
    assert "training cifar_resnet8 on 1 x cpu: 6 steps, 0.166 epochs\n" in train.stdout
    assert "next, type\n  resnet-jax evaluate run --per-class\n" in train.stdout
    assert "step 6/6" in train.stdout
    assert "CACHE MISS" in train.stderr
    second = subprocess.run([sys.executable, ROOT / "train.py", *flags, "--workdir", "second"], **shell)
    missed = [line for line in second.stderr.splitlines() if "CACHE MISS" in line and "jit_trial" not in line]
    assert second.returncode == 0 and "cache hit" in second.stderr and not missed
    monkeypatch.chdir(tmp_path)
    status, table, _ = run(["evaluate", "run", "--per-class"], capsys)
    assert status == 0 and "360 images" in table and "top-5" in table
    listed = run(["runs", "."], capsys)[1].splitlines()
    assert [line.split()[:2] for line in listed] == [["run", "finished"], ["second", "finished"]]
    result = json.loads(run(["evaluate", "run", "--json"], capsys)[1])
    assert result["test"]["count"] == 360 and result["step"] == 6
    status, _, err = run(["train", *flags, "--train.seed", "1"], capsys)
    assert status == 2 and "train.seed: 0 -> 1" in err


@pytest.mark.parametrize("command", ["train", "plan", "show-batch"])
def test_help_is_short_with_the_common_flags_and_help_all_shows_every_flag(command, capsys):
    status, out, _ = run([command, "--help"], capsys)
    assert status == 0
    assert len(out.splitlines()) <= 100
    for flag in ("--config", "--workdir", "--model.name", "--data.dataset", "--optimizer.learning_rate", "--help-all"):
        assert flag in out
    assert "--augment.erasing" not in out
    status, whole, _ = run([command, "--help-all"], capsys)
    assert status == 0
    for section, values in to_dict(Config()).items():
        for field in values:
            assert f"--{section}.{field}" in whole
    if command == "plan":
        assert "How many devices the run will have." in out
        assert "How many devices the run will have." in whole


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--lr", "0.1"], "--optimizer.learning_rate"),
        (["train", "--model", "resnet18"], "--model.name"),
        (["train", "--batch-size=8"], "--train.batch_size"),
        (["plan", "--epochs", "3"], "--train.epochs"),
        (["train", "--norm", "group"], "--model.norm"),
        (["train", "--optimizer.lr", "0.1"], "--optimizer.learning_rate"),
    ],
)
def test_a_flag_of_another_name_is_answered_with_ours(words, meant, capsys):
    status, _, err = run(words, capsys)
    assert status == 2
    assert err.startswith("error: there is no --")
    assert f"give {meant}" in err
    assert len(err.splitlines()) == 1


def test_help_is_a_command_and_python_m_runs_the_package(capsys):
    assert run(["help"], capsys)[1] == run(["--help"], capsys)[1]
    assert run(["help", "runs"], capsys)[1] == run(["runs", "--help"], capsys)[1]
    done = subprocess.run([sys.executable, "-m", "resnet_jax", "--version"], capture_output=True, text=True)
    assert done.stdout == run(["--version"], capsys)[1]


def test_a_run_that_is_not_there_is_named_before_the_pictures(capsys):
    status, _, err = run(["predict", "runs/none", "none.png"], capsys)
    assert status == 2
    assert err == "error: runs/none: there is no such run, folder or file\n"


def test_no_color_is_heeded(tmp_path):
    """On a terminal, which `script` imitates, help has colours; with NO_COLOR it has none."""
    if shutil.which("script") is None:
        pytest.skip("needs the program script")
    command = f"{sys.executable} -m resnet_jax train --help"
    found = {}
    for value in ("", "1"):
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": value}
        if not value:
            del environment["NO_COLOR"]
        done = subprocess.run(["script", "-qec", command, "/dev/null"], env=environment, capture_output=True, text=True)
        found[value] = "\x1b[" in done.stdout
    assert found[""]
    assert not found["1"]
