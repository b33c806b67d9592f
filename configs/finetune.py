"""Fine-tuning a released model on your own data: the tower is frozen, projector and language model
are trained.

    python train.py --config configs/finetune.py:OpenGVLab/InternVL3-2B --workdir runs/mine \\
        --config.data.source=meta.json --config.steps=1000 --config.data.rows=16

Numbers of InternVL's scripts for the second fine-tuning [S3]: one epoch over batches of 128
samples, which are not packed. Here they are: 32 rows hold about 128 samples of 4,000 tokens [ours];
the loss is the mean over all trained tokens of the batch, as theirs is over those of a device's
micro-batch. Set rows and steps to your data: `python -m internvl3_jax.data.doctor META` counts.
"""

from configs.common import recipe, size_of
from internvl3_jax.config import TrainConfig

# [S3]; without effect while the tower is frozen, unlike in the reference
DROP_PATH = {"14b": 0.1, "38b": 0.2, "78b": 0.4}


def get_config(name: str = "1b") -> TrainConfig:
    size = size_of(name)
    return recipe(
        name,
        rows=32,
        steps=1_000,
        learning_rate=1e-5 if size == "1b" else 2e-5,  # [S3]
        drop_path=DROP_PATH.get(size, 0.0),
        data={"loss_reduction": "token"},  # [S3]
        optimizer={"weight_decay": 0.05, "freeze": ("vision/.*",)},  # [S3]
    )
