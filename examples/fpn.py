"""A feature pyramid (Lin et al. 2016) with a toy detector, which learns boxes of squares in noise: 20 s on a CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import resnet_jax as rj


def squares(key, count=32, size=64):
    """Draws images with a bright square in each, and its box: left, top, right, bottom in pixels."""
    a, b, c = jax.random.split(key, 3)
    side = jax.random.uniform(a, (count, 1), minval=12, maxval=size / 2)
    corner = jax.random.uniform(b, (count, 2)) * (size - side)
    across, down = ((x <= jnp.arange(size)) & (jnp.arange(size) < x + side) for x in jnp.split(corner, 2, 1))
    images = jax.random.normal(c, (count, size, size, 3)) + 2 * (down[:, :, None] & across[:, None, :])[..., None]
    return {"image": images, "label": jnp.concatenate([corner, corner + side], 1)}


def iou(a, b):
    """Returns the intersection over the union of boxes [batch, 4]."""
    common = jnp.maximum(jnp.minimum(a[:, 2:], b[:, 2:]) - jnp.maximum(a[:, :2], b[:, :2]), 0).prod(-1)
    return common / ((a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - common)


class Detector(nn.Module):
    """Gives a box [batch, 4]: the mean of those that the places of all maps propose, weighted by their scores."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images, train=False):
        head, above, found = nn.Conv(5, (3, 3)), jnp.zeros((1, 1, 1, 1)), []
        for x, stride in zip(self.backbone(images, train)[::-1], self.backbone.strides[::-1], strict=True):
            above = nn.Conv(32, (1, 1))(x) + jax.image.resize(above, (*x.shape[:3], 32), "nearest")
            y = head(nn.relu(nn.Conv(32, (3, 3))(above))).reshape(x.shape[0], -1, 5)
            place = stride * (jnp.indices(x.shape[1:3])[::-1].reshape(2, -1).T + 0.5)
            box = jnp.tile(place, 2) + stride * nn.softplus(y[..., 1:]) * jnp.array([-1, -1, 1, 1])
            found.append(jnp.concatenate([y[..., :1], box], -1))
        scores, boxes = jnp.split(jnp.concatenate(found, 1), [1], -1)
        return (nn.softmax(scores, 1) * boxes).sum(1)


def main(steps=100):
    """Returns a detector, its state after a number of steps, and the mean IoU on the new squares of each."""
    first, *keys = jax.random.split(jax.random.key(0, impl="rbg"), steps + 1)
    shape = {"stage_sizes": (1,) * 4, "widths": (16, 32, 48, 64), "stem_width": 16}
    detector, optimizer = Detector(rj.features("resnet18", stages=(2, 3, 4), key=first, **shape)[0]), optax.adam(3e-3)
    step = jax.jit(rj.make_train_step(detector, optimizer, loss=lambda box, batch: 1 - iou(box, batch["label"])))
    state, overlaps = rj.create_state(detector, optimizer, first, image_shape=(64, 64, 3)), []
    for key in keys:
        state, sums = step(state, jax.jit(squares)(key))
        overlaps.append(1 - float(sums["loss"] / sums["count"]))
    return detector, state, overlaps


if __name__ == "__main__":
    print("mean IoU: {:.2f} in the first step, {:.2f} in the last".format(*main()[2][::99]))
