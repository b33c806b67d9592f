"""Fine-tuning by adapters (LoRA) beside a released model, which stays as it is; or beside it in 4
bits (QLoRA).

    python train.py --config configs/lora.py:OpenGVLab/InternVL3-8B --workdir runs/mine \\
        --config.data.source=meta.json --config.steps=1000
    python train.py --config configs/lora.py:OpenGVLab/InternVL3-8B ... --config.lora.quantize=nf4           needs '.[quant]'

Numbers of InternVL's scripts for a second fine-tuning by LoRA [S25: 2nd_finetune/*_lora.sh], which
give adapters to the language model's linear layers and freeze tower and projector: batches of 16
samples, of which four rows hold about as many [ours, as in finetune.py].

    --config.lora.targets='("language/layers/.*", "vision/layers/.*")'     the tower's layers as well
    --config.lora.full='("projector/.*",)'                                                the projector trained whole beside them
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
    # of what is frozen; the rest is float32
    return dataclasses.replace(config, lora=adapters, param_dtype="bfloat16")
