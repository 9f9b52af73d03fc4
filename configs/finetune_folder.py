"""A linear probe on your own pictures: a pretrained network as it is, and a new head.

    resnet-jax train --config configs/finetune_folder.py --data.dataset folder:PICTURES

`--data.dataset csv:FILE` takes a table; `--model.pretrained SOURCE` other weights, whose size and preprocessing count.
To train everything, the more slowly the further from the head, write rules such as ("stage1/.*", 0.1) into a copy of
this file, and leave the norm out.

Hardware: a CPU will do for a thousand pictures. Expected time: that of 20 epochs forward and back. Expected test
accuracy: it depends on the pictures. Source: the weights are those of Wightman et al. 2021 (arXiv:2110.00476).
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
    model=ModelConfig(name="resnet50", pretrained="resnet50.a1_in1k", norm="frozen_batch"),
    data=DataConfig(dataset="folder:pictures", on_device=False, workers=2),
    augment=AugmentConfig(crop="random_resized", area=(0.35, 1.0), flip="random"),
    optimizer=OptimizerConfig(
        learning_rate=0.02, weight_decay=0.0, rate_rules=(("head/.*", 1.0), (".*", 0.0)), clip_norm=1.0
    ),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=1.0),
    train=TrainConfig(epochs=20.0, batch_size=32, ema_decay=None, label_smoothing=0.1, eval_every_epochs=1.0),
    log=LogConfig(every_steps=20),
)
