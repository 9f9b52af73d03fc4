import ast
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import list_models
from resnet_jax.models.registry import count_parameters, create_model

from .conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_there_word_for_word():
    assert "\npip install -e . && python train.py\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README


def test_the_table_of_models_tells_the_truth():
    cells = [cell.strip() for line in README.splitlines() if line.startswith("| ") for cell in line.split("|")]
    listed = {
        name.strip(): int(count.replace(",", ""))
        for names, count in itertools.pairwise(cells)
        if re.fullmatch(r"[\d,]{7,}", count)
        for name in names.split(",")
    }
    assert set(listed) == set(list_models())
    for name in ("resnet50", "cifar_wrn_28_10", "cifar_plain20"):
        assert listed[name] == count_parameters(create_model(name))


def test_the_block_in_a_module_of_ones_own_runs():
    source = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "class MyNet" in code)
    assert len(source.strip().splitlines()) <= 11
    names = {"nn": nn}
    exec(compile(ast.parse(source), "README.md", "exec"), names)
    logits, _ = names["MyNet"]().init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), train=True)
    assert logits.shape == (2, 10)


def test_every_file_it_names_is_there():
    for name in re.findall(r"\]\(([^):#]+)\)", README) + re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name
