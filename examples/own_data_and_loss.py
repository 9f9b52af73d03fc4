"""Data, loss, metric and hook of your own: where is the bright spot? No classes; some 20 seconds on a CPU.

python examples/own_data_and_loss.py
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import resnet_jax as rj


def spots(count, seed):
    """Returns pictures of noise with a bright spot, and its place (row, column), from 0 to 1."""
    rng, grid = np.random.default_rng(seed), (np.arange(16) + 0.5) / 16
    places = rng.uniform(0.1, 0.9, (count, 2))
    rows, columns = (np.exp(-0.5 * ((grid - places[:, axis, None]) / 0.08) ** 2) for axis in (0, 1))
    light = rows[:, :, None, None] * columns[:, None, :, None] + rng.normal(0, 0.1, (count, 16, 16, 3))
    return (255 * np.clip(light, 0, 1)).astype(np.uint8), places


class Finder(nn.Module):
    """Two convolutions and two numbers."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


def distance(places, batch):
    """Computes the distance of each picture, in parts of its width."""
    return jnp.linalg.norm(places - batch["label"] + 1e-6, axis=-1)


class Enough:
    """Ends the run when it is good enough."""

    def on_evaluation(self, step, metrics):
        return metrics.get("ema/validation/distance", 1.0) < 0.03


config = rj.Config()
config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, image_size=16),
    augment=dataclasses.replace(config.augment, crop="none"),
    optimizer=dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-2),
    train=dataclasses.replace(config.train, epochs=40, metric="distance", metric_goal="min"),
)

if __name__ == "__main__":
    data = rj.Dataset(train=spots(1024, 0), validation=spots(256, 1), test=spots(256, 2))
    own = {"model": Finder(), "dataset": data, "loss": distance, "hooks": [Enough()]}
    summary = rj.train(config, metrics={"distance": distance}, **own)
    print(f"distance on the test pictures: {summary['ema/test']['distance']:.3f} of the width")
