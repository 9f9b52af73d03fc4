"""The networks for CIFAR that `benchmarks/` trains in PyTorch are ours: one function, one gradient, one start."""

from functools import partial
from itertools import accumulate

import jax
import numpy as np
import optax
import pytest

from resnet_jax import create_model
from resnet_jax.ops import use_custom_kernels
from resnet_jax.weights.convert import from_torch, to_torch

from .weights.torch_twins import close, images_for, randomize, torch, torch_step

NAMES = ("cifar_resnet20", "cifar_resnet18")


def twin(name):
    """The opponent, ours, and what the opponent's tensors are called in torchvision."""
    from benchmarks.torch_models import torch_model

    torch.manual_seed(0)
    module, model = torch_model(name, 10), create_model(name, unbiased_variance=True, zero_init_last=False)
    starts = [0, *accumulate(model.stage_sizes)]

    def renamed(key):
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            stage = max(s for s, start in enumerate(starts) if start <= int(number))
            key = f"layer{stage + 1}.{int(number) - starts[stage]}.{rest.replace('project', 'downsample')}"
        return key.replace("stem.0", "conv1").replace("stem.1", "bn1")

    return module, model, renamed


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_opponent_is_ours(name):
    """Gradients by the norm of their difference: at the kinks of ReLU single pixels may turn.

    By plain operations: those of a CPU round otherwise, at which more pixels turn. They have tests of their own.
    """
    module, model, renamed = twin(name)
    randomize(module)
    variables = from_torch(model, {renamed(key): tensor for key, tensor in module.state_dict().items()})
    images, labels = images_for(size=32, batch=8), np.arange(8) % 10

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_of(params):
        logits, moved = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

    with use_custom_kernels(False):
        (loss, moved), grads = loss_of(variables["params"])
    expected, theirs, stats = torch_step(module, images, labels)
    close(loss, expected, 1e-5, "loss")
    ours = to_torch(model, {"params": grads} | moved)
    for key, tensor in stats.items():
        close(ours[renamed(key)], tensor, 1e-4, key)
    for key, gradient in theirs.items():
        off = np.linalg.norm(np.asarray(ours[renamed(key)]) - gradient.numpy()) / np.linalg.norm(gradient.numpy())
        assert off < 1e-2, f"{key}: off by {off:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_the_opponent_begins_as_we_do(name):
    module, model, renamed = twin(name)
    variables = jax.jit(model.init)(jax.random.key(0), images_for(size=32))
    ours = to_torch(model, variables)
    for key, tensor in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        expected = np.asarray(ours[renamed(key)])
        np.testing.assert_allclose(tensor.mean().item(), expected.mean(), atol=0.02, err_msg=key)
        np.testing.assert_allclose(tensor.std().item(), expected.std(), rtol=0.1, err_msg=key)
