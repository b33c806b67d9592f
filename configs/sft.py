"""Supervised fine-tuning after pre-training: packed, everything trained.

    python train.py --config configs/sft.py:runs/pretrain-2b --workdir runs/sft-2b --config.data.source=meta.json

[P3 2.3]: random JPEG compression (a source's data_augment in the meta JSON), square averaging,
multimodal packing, 21.7 million samples.
Learning rate and batch are not published; they are of InternVL2.5's stage 2 [S25]. `steps` is for a
mixture of about 2,000 tokens a sample [ours]: set it to what `python -m internvl3_jax.data.doctor
META` counts for yours.
"""

from configs.common import ROWS, TOKENS, full_training
from internvl3_jax.config import TrainConfig

ALL_TOKENS = 21.7e6 * 2_000  # samples [P3] of tokens each [ours]


def get_config(name: str = "1b") -> TrainConfig:
    # [P3]
    return full_training(name, round(ALL_TOKENS / (ROWS * TOKENS)), {"loss_reduction": "square"})
