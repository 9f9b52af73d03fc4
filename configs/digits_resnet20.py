"""ResNet-20 on scikit-learn's handwritten digits: 1,155 training, 282 validation and 360 test images.

Hardware: two CPU cores. Expected time: under a minute, compilation included. Expected test accuracy: not
measured yet with these splits. Source: our own; it is what `python train.py` runs, since `data.dataset` is digits where
nothing else is given.
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
    model=ModelConfig(name="cifar_resnet20"),
    data=DataConfig(
        dataset="digits",
        image_size=8,
        mean=(0.305, 0.305, 0.305),
        std=(0.376, 0.376, 0.376),
        on_device=True,
    ),
    augment=AugmentConfig(crop="pad", pad=1, flip="none", eval_crop=1.0, interpolation="bilinear"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=2.0),
    train=TrainConfig(epochs=40.0, batch_size=96, ema_decay=0.99, eval_every_epochs=5.0),
    log=LogConfig(every_steps=15),
)
