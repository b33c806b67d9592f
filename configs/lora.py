"""Trains LoRA adapters on a frozen released model, or on one in 4 bits (QLoRA).

    python train.py --config configs/lora.py:OpenGVLab/InternVL3-8B --workdir runs/mine \\
        --config.data.source=meta.json --config.steps=1000

Add --config.lora.quantize=nf4 for QLoRA, which needs pip install '.[quant]'. Other choices:

    --config.lora.targets='("language/layers/.*", "vision/layers/.*")'
        Adapters in the vision tower too.
    --config.lora.full='("projector/.*",)'
        Trains the projector itself too.

The numbers are those of InternVL's scripts for a second fine-tuning with LoRA [S25:
2nd_finetune/*_lora.sh]: adapters in the decoder's linear layers, tower and projector frozen, and
batches of 16 samples, which about four packed rows hold [ours, as in finetune.py].
"""

import dataclasses

from configs.common import recipe, size_of
from internvl3_jax.config import LoraConfig, TrainConfig


def get_config(name: str = "1b") -> TrainConfig:
    size = size_of(name)
    small, large = size in ("1b", "2b"), size in ("38b", "78b")
    config = recipe(
        name,
        rows=4,
        steps=1_000,
        learning_rate=2e-5 if large else 4e-5,  # [S25]
        drop_path=0.0,  # [S25]
        data={"loss_reduction": "token"},  # as in finetune.py
        optimizer={"weight_decay": 0.01 if small else 0.05},  # [S25]
    )
    adapters = LoraConfig(rank=16, alpha=32.0, dropout=0.05)  # [S25]
    # The frozen base is bfloat16; the adapters are float32.
    return dataclasses.replace(config, lora=adapters, param_dtype="bfloat16")
