"""Scripts in docs/ are looked at by the tools that will run them."""

import re
import subprocess

import yaml

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
