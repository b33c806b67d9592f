"""Native multimodal pre-training: text and multimodal data in one stage, all parameters trained.

    python -m convert --llm Qwen/Qwen2.5-1.5B --vision VIT_DIR checkpoints/new-2b
    python train.py --config configs/pretrain.py:checkpoints/new-2b --workdir runs/pretrain-2b \\
        --config.data.source=meta.json

The paper says of this stage [P3 2.1, 2.2]: tower, projector and language model are trained; square
averaging; language to multimodal data 1 : 3; about 200 billion tokens; V2PE with a delta sampled
for each image. It gives no learning rate, batch size or schedule: those are from InternVL2.5's
stage 2 [S25], the nearest public recipe.
"""

from configs.common import ALL_DELTAS, ROWS, TOKENS, full_training
from internvl3_jax.config import TrainConfig

ALL_TOKENS = 200e9  # [P3]


def get_config(name: str = "1b") -> TrainConfig:
    data = {"text_fraction": 0.25, "deltas": ALL_DELTAS, "loss_reduction": "square"}  # [P3]
    return full_training(name, round(ALL_TOKENS / (ROWS * TOKENS)), data)
