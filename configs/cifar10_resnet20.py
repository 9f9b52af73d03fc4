"""ResNet-20 on CIFAR-10 after He et al. 2015 (arXiv:1512.03385), section 4.2.

Hardware: one GPU. Expected time: minutes. Expected test accuracy: 91.25 % (8.75 % error in their Table 6),
on the original pixels; theirs is trained on 45k of the 50k images. Nothing is selected: all training images are trained
on, and the last step is tested. The data comes from tensorflow-datasets on first use; class folders work too:
`--data.dataset folder:PATH`.
"""

from resnet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(name="cifar_resnet20", zero_init_last=False),
    data=DataConfig(
        dataset="tfds:cifar10",
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        on_device=True,
    ),
    augment=AugmentConfig(crop="pad", pad=4, flip="random"),
    optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
    schedule=ScheduleConfig(name="step", boundaries=(0.5, 0.75), warmup_epochs=0.0),
    train=TrainConfig(steps=64_000, batch_size=128, ema_decay=None, eval_every_epochs=10.0, metric="none"),
    log=LogConfig(every_steps=100),
)
