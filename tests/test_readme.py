import ast
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax
from resnet_jax import list_models
from resnet_jax.commands import count_models
from resnet_jax.models.registry import OURS

from .conftest import ROOT

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "design-notes.md",
]


def snippet(word):
    return compile(ast.parse(next(code for code in PYTHON if word in code)), "README.md", "exec")


def test_the_two_commands_are_there_word_for_word():
    assert '\npip install -e ".[train]" && python train.py\n' in README
    assert '\npip install -e ".[test]" && pytest\n' in README


def test_the_pages_are_short():
    assert len(README.split()) <= 1200
    assert len((ROOT / "benchmarks" / "README.md").read_text().split()) <= 900


def test_it_counts_the_models_of_timm_and_torchvision():
    timm = (ROOT / "tests" / "models" / "timm_models.csv").read_text().splitlines()[1:]
    names = {line.partition(",")[0] for line in timm} | {"googlenet", "vit_b_16"}
    own = set(OURS) - names
    assert names <= set(list_models()) and {n for n in own if not n.startswith("cifar_")} == {"botnet50", "vit_tiny"}
    assert f"{len(names)} networks by the names of" in README and f"| {len(names)}, most residual |" in README
    assert f"and {len(own)} of its own (`cifar_*`, `botnet50`, `vit_tiny`)" in " ".join(README.split())
    told = (
        f"{len(OURS)} models: {len(names)} by the names of timm and torchvision, and {len(own)} of this package's own"
    )
    assert count_models(sorted(OURS)) == f"{told} (cifar_*, botnet50, vit_tiny)"


def test_the_block_in_a_module_of_ones_own_runs():
    source = next(code for code in PYTHON if "class MyNet" in code)
    assert len(source.strip().splitlines()) <= 12
    names = {}
    exec(snippet("class MyNet"), names)
    logits, _ = names["MyNet"]().init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), train=True)
    assert logits.shape == (2, 10)


def test_the_step_in_a_loop_of_ones_own_trains():
    labels = np.arange(16) % 4
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32) + labels[:, None, None, None]
    names = {"batches": [{"image": images, "label": labels}] * 8}
    exec(snippet("class MyNet"), names)
    exec(snippet("rj.make_train_step"), names)
    assert names["state"].step == 8 and names["sums"]["count"] == 16 and names["sums"]["loss"] / 16 < 1.0


def test_parts_of_ones_own_train_in_our_loop(tmp_path, monkeypatch):
    labels = np.arange(96) % 10
    images = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
    ended = []

    class MyHook:
        def on_end(self, summary):
            ended.append(summary["test"]["margin"])

    names = {"nn": nn, "rj": resnet_jax, "images": images, "labels": labels, "MyHook": MyHook}
    names |= {"more_images": images[:40], "more_labels": labels[:40], "margin": lambda logits, batch: logits.max(-1)}
    monkeypatch.chdir(tmp_path)
    exec(snippet("class MyNet"), names)
    exec(snippet("hooks=[MyHook()]"), names)
    assert len(ended) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_names_is_there(page):
    links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", page.read_text())
    assert links or page.parent.name != "benchmarks"
    for name in links:
        assert (page.parent / name).exists(), name


def test_every_promise_links_to_tests_that_there_are():
    promises = README.partition("## Three promises")[2].partition("\n## ")[0]
    named = re.findall(r"\[`(test_\w+)`\]\((tests/[\w/]+\.py)\)", promises)
    assert len(re.findall(r"^- \*\*", promises, re.M)) == 3 <= len(named)
    for test, file in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test


def test_every_promise_of_the_page_names_tests_that_there_are():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "promises.md").read_text()))
    there = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))))
    assert len(named) > 15 and named <= there, named - there


def test_recipes_and_commands_that_it_names_are_there():
    from resnet_jax.commands import COMMANDS

    for name in re.findall(r"--config (\w+)", README):
        assert (ROOT / "configs" / f"{name}.py").exists(), name
    commands = re.findall(r"resnet-jax (\w[\w-]*)", README)
    assert len(commands) > 2 and set(commands) <= set(COMMANDS)
