"""Fine-tunes a released model on your own data: frozen vision tower, trained projector and decoder.

    python train.py --config configs/finetune.py:OpenGVLab/InternVL3-2B --workdir runs/mine \\
        --config.data.source=meta.json --config.steps=1000 --config.data.rows=16

The numbers are those of InternVL's scripts for a second fine-tuning [S3]: one epoch over batches of
128 samples, which are not packed there. Here 32 packed rows hold about 128 samples of 4,000 tokens
[ours]. The loss is the mean over all supervised tokens of the batch, where theirs is the mean over
those of a device's micro-batch. Set rows and steps for your data; the data doctor counts:
`python -m internvl3_jax.data.doctor META`.
"""

from configs.common import recipe, size_of
from internvl3_jax.config import TrainConfig

# [S3]. A frozen tower drops no paths, unlike in InternVL's code.
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
