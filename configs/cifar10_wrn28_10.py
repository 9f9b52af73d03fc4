"""WRN-28-10 on CIFAR-10 without dropout. Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146), section 3.

Hardware: one large GPU. Expected time: hours. Expected test accuracy: 96.0 % (4.00 % error, median of five runs in
their Table 5), on the original pixels with mean and standard deviation normalised. This recipe has not been run at full
length here.
"""

import dataclasses

from resnet_jax.configs.cifar10_resnet20 import config as resnet20

from resnet_jax.config import OptimizerConfig, ScheduleConfig, TrainConfig

config = dataclasses.replace(
    resnet20,
    model=dataclasses.replace(resnet20.model, name="cifar_wrn_28_10"),
    optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=ScheduleConfig(name="step", boundaries=(0.3, 0.6, 0.8), factor=0.2, warmup_epochs=0.0),
    train=TrainConfig(epochs=200, batch_size=128, ema_decay=None, eval_every_epochs=10.0, metric="none"),
)
