"""The head of a network: dropout and a dense layer on pooled features."""

import flax.linen as nn
import jax

from resnet_jax.models.layers import Dropout
from resnet_jax.ops.pooling import global_pool

Array = jax.Array


class Classifier(nn.Module):
    """Computes logits from pooled features [batch, channel]: the head alone, named as in a whole network.

    Attributes:
      drop_rate, num_classes: as in `ResNet`.
    """

    num_classes: int
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> Array:
        return classify(features, self.drop_rate, self.num_classes, train)[1]


def pool_and_classify(
    x: Array, pool: str, drop_rate: float, num_classes: int | None, train: bool
) -> tuple[Array, Array]:
    """Returns pooled features and logits of the last map, both float32, as `classify` gives them.

    Raises:
      ValueError: `pool` is `none`, and there are classes.
    """
    if pool == "none" and num_classes:
        raise ValueError("global_pool none gives a map, not a vector that can be classified: add num_classes=None")
    return classify(global_pool(x, pool), drop_rate, num_classes, train)


def classify(features: Array, drop_rate: float, num_classes: int | None, train: bool) -> tuple[Array, Array]:
    """Returns features [batch, channel] and their logits [batch, class]; without classes the features twice.

    To be called in a compact module. The dense layer is called `head`; dropout draws from the `dropout` random numbers
    when training.
    """
    if not num_classes:
        return features, features
    dropped = Dropout(drop_rate, deterministic=not train)(features)
    return features, nn.Dense(num_classes, name="head")(dropped)
