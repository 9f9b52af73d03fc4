"""Models of torchvision and timm beside ours, with the same random weights."""

from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.registry import create_model
from resnet_jax.weights.convert import from_torch

if not all(map(find_spec, ("torch", "torchvision", "timm"))):
    pytest.skip("needs the extra `parity`", allow_module_level=True)

import torch
import torch.nn.functional as F

from benchmarks.torch_models import import_torchvision

import_torchvision()
import timm  # noqa: E402
import torchvision  # noqa: E402, F401


def randomize(module, seed=0):
    """Weights as they are, but norms and running statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                base = 1.0 if name.endswith("weight") else 0.0
                tensor.copy_(base + 0.2 * torch.randn(tensor.shape, generator=generator))
    return module


def ours_of(module, name, fields):
    """Our model beside a torch module whose weights are made random, and the variables that both have."""
    randomize(module.eval())
    model = create_model(name, unbiased_variance=True, **fields)
    return model, from_torch(model, module.state_dict())


def twins(name, ours, theirs, shared):
    """timm's model, ours of the same shape, and the variables that both have.

    `ours` and `theirs` are the same knobs by their two names, `shared` those with one name.
    """
    torch.manual_seed(0)
    module = timm.create_model(name, **theirs, **shared)
    return module, *ours_of(module, name, ours | shared)


def images_for(channels=3, size=64, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, channels)).astype(np.float32)


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def nhwc(tensor):
    return jnp.asarray(tensor.detach().permute(0, 2, 3, 1).numpy())


def close(actual, expected, tolerance, what):
    """Within `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert error < tolerance, f"{what}: off by {error:.2e} of the largest value"


def torch_step(module, images, labels):
    """Loss, gradients and running statistics of one training step of torch."""
    module.train()
    loss = F.cross_entropy(module(nchw(images)), torch.from_numpy(labels))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    stats = {name: tensor for name, tensor in module.named_buffers() if "running" in name}
    return loss.item(), grads, stats
