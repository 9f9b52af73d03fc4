"""A recipe with a network of one convolution and its statistics, for runs that are started many times."""

import flax.linen as nn

from resnet_jax.config import Config


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(images))
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


model = Small()
config = Config()
