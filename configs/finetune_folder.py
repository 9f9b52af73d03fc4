"""Your own pictures: a pretrained ResNet-50, all of it, the more slowly the further from the head.

    resnet-jax train --config finetune_folder --data.dataset folder:PICTURES

A fifth of the pictures is held out for validation, which chooses the step; folders `train`, `val` and `test` are taken
for what they are called, and `test` is looked at once, at the end. `--data.dataset csv:FILE` takes a table;
`--model.pretrained SOURCE` other weights, whose size and preprocessing count. `--finetune linear_probe --augment.crop
none --augment.flip none` trains the head alone on features that are computed once: minutes on a CPU. For small classes
there are `--data.sampling balanced` and `--train.class_weights balanced`.

Hardware: a GPU; a CPU will do for the probe. Expected time: that of at most 30 epochs; it ends where five in a row
bring nothing. Expected accuracy: it depends on the pictures. Source: the weights are those of Wightman et al. 2021
(arXiv:2110.00476).
"""

from resnet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(name="resnet50", pretrained="resnet50.a1_in1k"),
    data=DataConfig(dataset="folder:pictures", on_device=False, workers=2),
    augment=AugmentConfig(crop="random_resized", area=(0.35, 1.0), flip="random"),
    optimizer=OptimizerConfig(learning_rate=0.02, weight_decay=1e-4, clip_norm=1.0),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=1.0),
    finetune=FinetuneConfig(mode="full", layer_decay=0.7),
    train=TrainConfig(
        epochs=30.0,
        batch_size=32,
        ema_decay=None,
        label_smoothing=0.1,
        eval_every_epochs=1.0,
        metric="macro_recall",
        patience=5,
    ),
    log=LogConfig(every_steps=10),
)
