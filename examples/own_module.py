"""A network of your own in our loop, on the digits; some 20 seconds on a CPU.

python examples/own_module.py
resnet-jax train --config examples/own_module.py --workdir runs/own     # the same, with flags
resnet-jax evaluate runs/own --config examples/own_module.py
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

import resnet_jax as rj


class Mixer(nn.Module):
    """A tiny MLP-Mixer (Tolstikhin et al. 2021): mixes places, then channels."""

    num_classes: int = 10
    width: int = 32

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.width, (2, 2), strides=2)(images).reshape(images.shape[0], -1, self.width)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x += jnp.swapaxes(nn.Dense(x.shape[1])(nn.gelu(jnp.swapaxes(y, 1, 2))), 1, 2)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))
        x = nn.Dropout(0.1, deterministic=not train)(x.mean(1))
        return nn.Dense(self.num_classes)(x)


model = Mixer()
config = rj.Config()
config = dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-2, weight_decay=0.05),
    train=dataclasses.replace(config.train, epochs=30),
)

if __name__ == "__main__":
    summary = rj.train(config, model=model)
    print(f"test accuracy {summary['ema/test']['accuracy']:.1%}")
