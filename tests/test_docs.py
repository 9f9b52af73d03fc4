"""Scripts in docs/ are looked at by the tools that will run them; examples in docstrings run."""

import doctest
import re
import subprocess
from importlib import import_module

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml

import resnet_jax as rj
from resnet_jax.models import registry

from .conftest import ROOT
from .small import parse_recipe

CLUSTERS = (ROOT / "docs" / "clusters.md").read_text()


def test_shell_scripts_parse():
    scripts = re.findall(r"```bash\n(.*?)```", CLUSTERS, re.S)
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_command_is_one_that_we_take(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"resnet-jax train ((?:[^\n&\"]|\\\n)*)", CLUSTERS.replace("\\\n", " ").replace("$i", "0"))
    assert len(commands) == 3
    for command in commands:
        config, workdir = parse_recipe(command.split())
        assert config.parallel.distributed == "auto" and workdir


def test_the_job_set_runs_a_command_that_we_take(monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = re.findall(r"```yaml\n(.*?)```", CLUSTERS, re.S)
    spec = yaml.safe_load(text)["spec"]
    assert spec["network"]["enableDNSHostnames"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["resnet-jax", "train"]
    parse_recipe(command[2:])


def documented():
    """What the reference describes: (module, name) of each."""
    module, found, page = "", [], (ROOT / "docs" / "api.md").read_text()
    for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", page, re.M):
        if kind == "currentmodule":
            module = name
        else:
            found.append((module, name))
    return found


def test_every_public_name_is_in_the_reference_once():
    found = documented()
    public = {name for name in rj.__all__ if callable(getattr(rj, name))}
    assert "analysis" in rj.__all__ and "resnet_jax.analysis" in {module for module, _ in found}
    assert {name for module, name in found if module == "resnet_jax"} == public
    assert len(found) == len(set(found)) > 50


def test_every_name_in_the_reference_has_an_example_and_those_that_can_run_are_right(monkeypatch):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    told, run = [], 0
    common = {"rj": rj, "jax": jax, "jnp": jnp, "np": np, "nn": nn, "optax": optax}
    for module, name in documented():
        thing = getattr(import_module(module), name)
        assert "Example" in thing.__doc__, f"{module}.{name} has no example"
        names = vars(import_module(thing.__module__)) | common
        test = doctest.DocTestParser().get_doctest(thing.__doc__, dict(names), name, None, 0)
        run += bool(test.examples)
        runner.run(test, out=told.append)
    assert not told, "".join(told)
    assert run > 40
