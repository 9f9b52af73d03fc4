"""ResNet-50 on ImageNet-1k, procedure A3 of "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476, Table 2).

Hardware: four to eight GPUs. Expected time: 15 hours on four V100 (their figure).
Expected top-1 accuracy: 78.1 % at 224 pixels after training at 160. It has not been run with this project yet.
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
    model=ModelConfig(name="resnet50", compute_dtype="bfloat16"),
    data=DataConfig(
        dataset="folder:imagenet",
        image_size=160,
        eval_image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        on_device=False,
        workers=16,
        on_bad_image="skip",
    ),
    augment=AugmentConfig(crop="random_resized", flip="random", randaugment=6, mixup=0.1, cutmix=1.0, eval_crop=0.95),
    optimizer=OptimizerConfig(name="lamb", learning_rate=8e-3, weight_decay=0.02),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=5.0, warmup_factor=1e-4 / 8e-3),
    train=TrainConfig(
        epochs=100.0, batch_size=2048, loss="binary", ema_decay=None, eval_every_epochs=1.0, metric="none"
    ),
    log=LogConfig(every_steps=100),
)
