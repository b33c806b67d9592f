"""Two trainings of examples/process_reward: a model that sorts digits, and a critic of its steps.

    python examples/process_reward/run.py runs/process_reward
        Runs both trainings and the steps between them, and prints the table.
    python train.py --config configs/process_reward.py:policy --workdir runs/process_reward/policy
    python train.py --config configs/process_reward.py:critic --workdir runs/process_reward/critic

The policy sorts handwritten digits into even and odd. It starts from the shipped digits model,
which reads numbers, and its teacher makes mistakes (task.py), so that the critic has something to
find. The critic starts from the policy. Its training is ordinary fine-tuning on conversations whose
answers are + and -.
"""

from configs.tiny_digits import tiny_processor
from internvl3_jax.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvl3_jax.sizes import SIZES

DATA = "runs/process_reward"
TOKENIZER = "examples/tiny_digits"
# Stage -> initial weights, steps
STAGES = {"policy": ("examples/tiny_digits", 300), "critic": (f"{DATA}/policy", 300)}


def get_config(stage: str = "policy") -> TrainConfig:
    """Returns the recipe of a stage, "policy" or "critic"."""
    if stage not in STAGES:
        raise ValueError(
            f"configs/process_reward.py has the stages {' and '.join(STAGES)}, not {stage!r}"
        )
    start, steps = STAGES[stage]
    model = SIZES["tiny"]
    return TrainConfig(
        model=model,
        processor=tiny_processor(model),
        data=DataConfig(
            source=f"{DATA}/{stage}.json",
            tokenizer=TOKENIZER,
            rows=8,
            tokens_per_row=288,
            tiles_per_row=14,
            packing_buffer=32,
            loss_reduction="token",
        ),
        optimizer=OptimizerConfig(
            name="muon", muon_learning_rate=0.02, learning_rate=2e-3, warmup_steps=20, beta2=0.99
        ),
        steps=steps,
        init_from=start,
        checkpoint=CheckpointConfig(every=250, keep=1, keep_best=False),
        scan_unroll=4,
    )
