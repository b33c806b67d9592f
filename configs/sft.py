"""Supervised fine-tuning after pre-training: packed rows, all parameters trained.

    python train.py --config configs/sft.py:runs/pretrain-2b --workdir runs/sft-2b \\
        --config.data.source=meta.json

From the paper [P3 2.3]: random JPEG compression (a source's data_augment in the meta JSON), square
averaging, multimodal packing, 21.7 million samples. Learning rate and batch size are not published;
they are from InternVL2.5's stage 2 [S25]. `steps` assumes about 2,000 tokens per sample [ours]: set
it to what `python -m internvl3_jax.data.doctor META` counts for your mixture.
"""

from configs.common import ROWS, TOKENS, full_training
from internvl3_jax.config import TrainConfig

# Samples [P3] times tokens per sample [ours]
ALL_TOKENS = 21.7e6 * 2_000


def get_config(name: str = "1b") -> TrainConfig:
    # [P3]
    return full_training(name, round(ALL_TOKENS / (ROWS * TOKENS)), {"loss_reduction": "square"})
