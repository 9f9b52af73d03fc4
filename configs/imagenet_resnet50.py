"""ResNet-50 on ImageNet-1k in 90 epochs: label smoothing, cosine, learning rate by linear scaling, no decay on norms.

Hardware: eight GPUs (`--train.batch_size 2048` there) or one. Expected time: NVIDIA's PyTorch example of nearly this
recipe takes about three hours on eight A100. Expected top-1 accuracy: 76.5 to 77.1 %, theirs is 77.12 ± 0.11 %. It has
not been run with this project yet. Sources: He et al. 2015; Goyal et al. 2017 (arXiv:1706.02677) for scaling and
warm-up; NVIDIA DeepLearningExamples, ResNet50 v1.5, for the expected figures.
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
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        on_device=False,
        workers=16,
        on_bad_image="skip",
    ),
    augment=AugmentConfig(crop="random_resized", flip="random", eval_crop=0.875),
    optimizer=OptimizerConfig(learning_rate=0.1, base_batch_size=256, weight_decay=5e-5),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=5.0),
    train=TrainConfig(
        epochs=90.0, batch_size=256, label_smoothing=0.1, ema_decay=None, eval_every_epochs=1.0, metric="none"
    ),
    log=LogConfig(every_steps=100),
)
