"""ResNet-56 on CIFAR-10 after He et al. 2015 (arXiv:1512.03385), section 4.2: the recipe of ResNet-20.

Hardware: one GPU. Expected time: three times that of ResNet-20. Expected test accuracy: 93.03 % (6.97 % error in their
Table 6), on the original pixels; theirs is trained on 45k of the 50k images.
"""

import dataclasses

from resnet_jax.configs.cifar10_resnet20 import config as resnet20

config = dataclasses.replace(resnet20, model=dataclasses.replace(resnet20.model, name="cifar_resnet56"))
