import jax
import numpy as np
import pytest

from resnet_jax import InputError, create_model, from_torch, list_models, to_torch
from resnet_jax.models.densenet import DenseNet
from resnet_jax.models.registry import variable_shapes
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vit import ViT
from resnet_jax.weights.convert import adapt_stem, classes_of, head_key


def counted(model):
    """Variables in which every number stands once."""
    leaves, tree = jax.tree.flatten(variable_shapes(model))
    ends = np.cumsum([leaf.size for leaf in leaves])
    assert ends[-1] < 2**24
    values = [
        np.arange(e - leaf.size, e, dtype=np.float32).reshape(leaf.shape) for e, leaf in zip(ends, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def small(name):
    """The named model with few blocks and channels, so that float32 holds each number of `counted`."""
    model = create_model(name)
    if isinstance(model, ResNet):
        stages = len(model.stage_sizes)
        model = model.clone(stage_sizes=(2 if name in ("resnet50", "resnetv2_18") else 1,) * stages)
        if model.standardized:
            model = model.clone(stem_width=64)
        return model.clone(widths=(32, 64, 96, 128)[:stages]) if model.widths[0] > 32 else model
    if isinstance(model, DenseNet):
        return model.clone(stage_sizes=(2, 1, 1, 1))
    return model.clone(depth=2, width=192, heads=3, mlp=384) if isinstance(model, ViT) else model


@pytest.mark.parametrize("name", list_models())
def test_out_and_in_again_changes_no_bit(name):
    model = small(name)
    variables = counted(model)
    tensors = to_torch(model, variables)
    again = from_torch(model, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for key, tensor in to_torch(model, again).items():
        np.testing.assert_array_equal(tensor, tensors[key])


def test_all_that_is_wrong_is_said_at_once():
    model = small("resnet18")
    tensors = to_torch(model, counted(model))
    tensors["layer1.0.conv1.wieght"] = tensors.pop("layer1.0.conv1.weight")
    tensors["fc.weight"] = tensors["fc.weight"][:, :-1]
    del tensors["bn1.bias"]
    with pytest.raises(InputError) as error:
        from_torch(model, tensors)
    metadata = str(error.value)
    assert "missing: layer1.0.conv1.weight (did you mean layer1.0.conv1.wieght?)" in metadata
    assert "missing: bn1.bias" in metadata and "left over: layer1.0.conv1.wieght" in metadata
    assert "shape: fc.weight is [1000, 127], the model has [1000, 128]" in metadata


def test_old_names_wrappers_and_half_precision_are_understood():
    model = small("densenet121")
    variables = jax.tree.map(lambda leaf: leaf % 512, counted(model))  # whole numbers that float16 holds
    tensors = {}
    for key, tensor in to_torch(model, variables).items():
        old = key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key
        tensors[f"module.{old}"] = tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
    assert any("conv.2.weight" in key for key in tensors)
    jax.tree.map(np.testing.assert_array_equal, from_torch(model, tensors), variables)


def test_arrays_are_copies_whatever_order_the_tensors_lie_in():
    model = create_model("resnet50", stage_sizes=(1, 1))
    variables = counted(model)
    tensors = {}
    for key, tensor in to_torch(model, variables).items():
        order = (0, 2, 3, 1) if tensor.ndim == 4 else range(tensor.ndim)  # as PyTorch keeps them in channels_last
        turned = tensor.transpose(order)
        memory = np.zeros(tensor.size + 16, tensor.dtype)  # JAX takes what lies on a border of 64 bytes without a copy
        tensors[key] = memory[-memory.ctypes.data % 64 // tensor.itemsize :][: tensor.size].reshape(turned.shape)
        tensors[key][...] = turned
        tensors[key] = tensors[key].transpose(np.argsort(order))
    ours = from_torch(model, tensors)
    for tensor in tensors.values():
        tensor[...] = 0
    jax.tree.map(np.testing.assert_array_equal, ours, variables)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "densenet121", "googlenet", "vit_tiny"])
def test_a_head_is_found_whatever_it_is_called_in_every_family(name):
    model = small(name)
    tensors = to_torch(model, variables := counted(model))
    own = head_key(model)
    weight, bias = tensors.pop(f"{own}.weight"), tensors.pop(f"{own}.bias")
    for other in (own, f"{own}.1", "fc", "head", "head.fc", "heads.head", "classifier.1.0", "last_linear"):
        renamed = tensors | {f"{other}.weight": weight.reshape(weight.shape[:2]), f"{other}.bias": bias}
        jax.tree.map(np.testing.assert_array_equal, from_torch(model, renamed), variables)
        assert classes_of(model, renamed) == len(bias)
    without = from_torch(model, tensors | {f"{own}.weight": weight})
    np.testing.assert_array_equal(without["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])
    assert not without["params"]["head"]["bias"].any()
    assert classes_of(model, tensors) == 0


def test_auxiliary_heads_of_googlenet_are_left_out():
    model = small("googlenet")
    variables = counted(model)
    tensors = to_torch(model, variables) | {"aux1.fc2.bias": np.zeros(1000, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, from_torch(model, tensors), variables)


@pytest.mark.parametrize("name", ["resnet50d", "resnetv2_50"])
def test_a_grey_image_gives_the_same_features_as_its_rgb(name):
    model = create_model(name, stage_sizes=(1, 1), widths=(16, 32), num_classes=5)
    grey = np.random.default_rng(0).normal(size=(1, 64, 64, 1)).astype(np.float32)
    rgb = np.repeat(grey, 3, -1)
    variables = jax.jit(model.init)(jax.random.key(0), rgb)
    tensors = to_torch(model, variables)
    for channels in (1, 6):
        other = model.clone(in_channels=channels)
        adapted = from_torch(other, adapt_stem(other, tensors))
        logits = jax.jit(other.apply)(adapted, np.repeat(grey, channels, -1))
        np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, rgb), rtol=1e-3, atol=1e-4)
