"""ResNet-110 on CIFAR-10 after He et al. 2015 (arXiv:1512.03385), section 4.2: about one epoch at a rate of 0.01 first.

Hardware: one GPU. Expected time: five times that of ResNet-20. Expected test accuracy: 93.39 ± 0.16 % (their Table 6,
five runs), on the original pixels; theirs is trained on 45k of the 50k images.
"""

import dataclasses

from resnet_jax.configs.cifar10_resnet20 import config as resnet20

from resnet_jax.config import ScheduleConfig

config = dataclasses.replace(
    resnet20,
    model=dataclasses.replace(resnet20.model, name="cifar_resnet110"),
    schedule=ScheduleConfig(
        name="step", boundaries=(0.5, 0.75), warmup_epochs=1.0, warmup_factor=0.1, warmup_shape="constant"
    ),
)
