"""Names and shapes at full size, beside timm and torchvision; nothing is allocated on either side."""

import pytest

from resnet_jax.models.registry import create_model, list_models
from resnet_jax.weights.names import entries

from .torch_twins import timm, torch, torchvision

OURS = ("botnet50", "vit_tiny")
"""Of no published weights."""


@pytest.mark.parametrize("name", [n for n in list_models() if not n.startswith("cifar_") and n not in OURS])
def test_every_tensor_has_the_name_and_shape_that_pytorch_gives_it(name):
    with torch.device("meta"):
        if name == "googlenet":
            module = torchvision.models.googlenet(aux_logits=False, init_weights=False)
        elif name == "vit_b_16":
            module = torchvision.models.vit_b_16()
        else:
            module = timm.create_model(name)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    ours = {entry.key: entry.tensor_shape for entry in entries(create_model(name))}
    assert ours == {key: shape for key, shape in expected.items() if not key.endswith("num_batches_tracked")}


def test_networks_for_cifar_have_the_names_of_torchvision():
    keys = {entry.key for entry in entries(create_model("cifar_resnet20"))}
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "fc.weight"} <= keys
    assert not any("downsample" in key for key in keys)
