import ast
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import resnet_jax
from resnet_jax import list_models

from .conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_there_word_for_word():
    assert "\npip install -e . && python train.py\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README


def test_the_table_of_models_names_models_that_there_are():
    rows = README.partition("| family | names |")[2].partition("\n\n")[0].splitlines()[2:]
    named = set(
        re.findall(r"\b((?:cifar_|wide_|se|eca)*(?:resne|densene|google|botne|vit_)\w+(?:\\\*)?)", " ".join(rows))
    )
    assert len(rows) == 9 and len(named) > 20
    for name in named - {"cifar_resnet20", "cifar_plain20"}:
        assert list_models(name.replace("\\", "")), name


def test_it_counts_the_models_of_timm():
    timm = len((ROOT / "tests" / "models" / "timm_models.csv").read_text().splitlines()) - 1
    assert f"The names, shapes and parameter counts of all {timm} timm models" in README
    assert f"torchvision, {timm + 2} of them" in README  # and torchvision's googlenet and vit_b_16


def test_the_block_in_a_module_of_ones_own_runs():
    source = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "class MyNet" in code)
    assert len(source.strip().splitlines()) <= 11
    names = {"nn": nn}
    exec(compile(ast.parse(source), "README.md", "exec"), names)
    logits, _ = names["MyNet"]().init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), train=True)
    assert logits.shape == (2, 10)


def test_the_step_in_a_loop_of_ones_own_trains():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    net, own = (next(code for code in blocks if word in code) for word in ("class MyNet", "rj.make_train_step"))
    labels = np.arange(16) % 4
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32) + labels[:, None, None, None]
    names = {"nn": nn, "jax": jax, "rj": resnet_jax, "batches": [{"image": images, "label": labels}] * 8}
    exec(compile(ast.parse(net), "README.md", "exec"), names)
    exec(compile(ast.parse(own), "README.md", "exec"), names)
    assert names["state"].step == 8 and names["sums"]["count"] == 16 and names["sums"]["loss"] / 16 < 1.0


def test_parts_of_ones_own_train_in_our_loop(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    net, own = (next(code for code in blocks if word in code) for word in ("class MyNet", "hooks=[MyHook()]"))
    labels = np.arange(96) % 10
    images = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
    ended = []

    class MyHook:
        def on_end(self, summary):
            ended.append(summary["test"]["margin"])

    names = {"nn": nn, "rj": resnet_jax, "images": images, "labels": labels, "MyHook": MyHook}
    names |= {"more_images": images[:40], "more_labels": labels[:40], "margin": lambda logits, batch: logits.max(-1)}
    monkeypatch.chdir(tmp_path)
    for source in (net, own):
        exec(compile(ast.parse(source), "README.md", "exec"), names)
    assert len(ended) == 1


def test_every_file_it_names_is_there():
    for name in re.findall(r"\]\(([^):#]+)\)", README) + re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name


def test_every_promise_names_tests_that_there_are():
    table = README.partition("## What is promised")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    there = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))))
    assert len(named) > 15 and named <= there, named - there
