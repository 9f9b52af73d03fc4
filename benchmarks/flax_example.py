"""A straight linen ResNet as Flax's ImageNet example builds it: `SAME` padding, `nn.BatchNorm`, no tuning."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnet_jax.models.registry import create_model


def network(name: str, classes: int, dtype: str, example: bool) -> Any:
    """Returns the network of this name as the example would build it, or ours."""
    if example:
        return ExampleResNet(name, classes, jnp.dtype(dtype))
    return create_model(name, num_classes=classes, dtype=jnp.dtype(dtype))


class ExampleBlock(nn.Module):
    """Basic or bottleneck, with a projection where the shape changes."""

    filters: int
    strides: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        outputs = self.filters * (4 if self.bottleneck else 1)
        strides = (self.strides, self.strides)
        if self.bottleneck:
            y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
            y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), strides)(y)))
            y = self.norm(scale_init=nn.initializers.zeros)(self.conv(outputs, (1, 1))(y))
        else:
            y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), strides)(x)))
            y = self.norm(scale_init=nn.initializers.zeros)(self.conv(outputs, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(outputs, (1, 1), strides)(x))
        return nn.relu(x + y)


class ExampleResNet(nn.Module):
    """resnet50, cifar_resnet20 or cifar_resnet18 in this style."""

    kind: str
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        sizes, widths, bottleneck = {
            "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True),
            "cifar_resnet20": ((3, 3, 3), (16, 32, 64), False),
            "cifar_resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False),
        }[self.kind]
        if bottleneck:
            x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        else:
            x = nn.relu(norm()(conv(widths[0], (3, 3))(x)))
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            for i in range(size):
                x = ExampleBlock(width, 2 if stage and i == 0 else 1, bottleneck, conv, norm)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))
