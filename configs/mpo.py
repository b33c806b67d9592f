"""Mixed Preference Optimization after fine-tuning, on pairs of answers; trains all parameters.

    python -m internvl3_jax.reward.make_pairs --checkpoint runs/sft-8b \\
        --questions questions.jsonl --output pairs.jsonl
    python train.py --config configs/mpo.py:runs/sft-8b --workdir runs/mpo-8b \\
        --config.data.source=pairs.json

The pairs may also be MMPR-v1.2. The numbers are those of InternVL's shell/internvl3.0/mpo scripts
[M3]: 0.8 DPO + 0.2 BCO + 1.0 cross-entropy of the chosen answer, beta 0.1, learning rate 2e-7, 3 %
warm-up, decay 0.05, answers of up to 12,288 tokens (8,192 from 38B on), and 256 pairs per update
(512). Here pairs are packed: `rows` assumes about four pairs of half the longest length in a row
[ours], and `steps` is one pass over the paper's 300 thousand pairs [P3 2.3].

The scripts drop paths in the policy's tower (0.1; 0.4 from 38B on) but not in the reference
model's. Set loss.drop_path to do so; otherwise both start equal. The authors found 38B and 78B best
at step 400 [M3].
"""

import dataclasses

from configs.common import recipe, size_of
from internvl3_jax.config import LossConfig, TrainConfig

PAIRS = 300_000  # [P3 2.3]
PAIRS_PER_ROW = 4  # [ours]


def get_config(name: str = "1b") -> TrainConfig:
    large = size_of(name) in ("38b", "78b")
    longest, pairs = (8_192, 512) if large else (12_288, 256)  # [M3]
    config = recipe(
        name,
        rows=pairs // PAIRS_PER_ROW,
        steps=round(PAIRS / pairs),
        learning_rate=2e-7,
        drop_path=0.4 if large else 0.1,
        data={"pairs": True, "tokens_per_row": 2 * longest, "loss_reduction": "sample"},
        optimizer={"weight_decay": 0.05},
    )
    return dataclasses.replace(config, loss=LossConfig(kind="mpo"))
