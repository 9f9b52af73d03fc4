"""The short road on CIFAR-10: ResNet-18, one cycle, label smoothing, alternating flips, averages, test flips.

Sources: Page 2018 ("How to train your ResNet"), Jordan 2024 (arXiv:2404.00498, alternating flips). Hardware: one GPU.
Expected time: minutes. Expected test accuracy: 94 % is the aim, on the original pixels; this recipe has not been run
at full length here.
"""

import dataclasses

from resnet_jax.configs.cifar10_resnet20 import config as resnet20

from resnet_jax.config import AugmentConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig

config = dataclasses.replace(
    resnet20,
    model=ModelConfig(name="cifar_resnet18", compute_dtype="bfloat16", zero_init_last=False),
    augment=AugmentConfig(crop="pad", pad=2, flip="alternating", eval_flip=True),
    optimizer=OptimizerConfig(learning_rate=0.4, weight_decay=5e-4),
    schedule=ScheduleConfig(name="one_cycle", warmup_epochs=0.0),
    train=TrainConfig(
        epochs=15,
        batch_size=500,
        label_smoothing=0.1,
        ema_decay=0.99,
        steps_per_call=50,
        eval_every_epochs=5.0,
        metric="none",
    ),
)
