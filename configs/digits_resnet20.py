"""ResNet-20 on scikit-learn's handwritten digits: 1,437 training and 360 test images of 8x8 pixels.

Hardware: two CPU cores. Expected time: under a minute, compilation included. Expected test accuracy: 98.5 to 99.7 %.
Source: our own; it is `Config()`, the recipe that `python train.py` runs.
"""

from resnet_jax.config import Config

config = Config()
