"""ResNet-20 on scikit-learn's handwritten digits: 1,155 training, 282 validation and 360 test images.

Hardware: two CPU cores. Expected time: under a minute, compilation included. Expected test accuracy: not
measured yet with these splits. Source: our own; it is `Config()`, the recipe that `python train.py` runs.
"""

from resnet_jax.config import Config

config = Config()
