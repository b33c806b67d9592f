"""Native pre-training and fine-tuning in miniature: 1.6 million parameters on two CPU cores.

    pip install -e '.[demo]'
    python examples/native_pretraining/make_data.py runs/miniature/data
    python train.py --config configs/miniature.py:pretrain --workdir runs/miniature/native/pretrain
    python train.py --config configs/miniature.py:sft --workdir runs/miniature/native/sft

The first stage is the paper's in everything but size (configs/pretrain.py): text and multimodal
data 1 : 3; tower, projector and language model all trained, here from random weights; square
averaging; a V2PE step sampled for each image. The steps end at 1/8, since a tile has 4 tokens here:
at 1/256 a whole image would take a tenth of a position. Muon is used as in tiny_digits.py.
examples/native_pretraining/run.py runs this and its ablations, and evaluates them on unseen data.
"""

import dataclasses

from configs.tiny_digits import tiny_processor
from internvl3_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvl3_jax.sizes import SIZES

DATA = "runs/miniature/data"
PRETRAINED = "runs/miniature/native/pretrain"
DELTAS = ("1", "1/2", "1/4", "1/8")
STEPS = {"pretrain": 1300, "sft": 400}
# From the tokenizer that make_data.py writes.
VOCABULARY, IMAGE_TOKEN = 1024, 1017


def get_config(stage: str = "pretrain") -> TrainConfig:
    """Returns the recipe of a stage, "pretrain" or "sft"."""
    if stage not in STEPS:
        raise ValueError(
            f"configs/miniature.py has the stages {' and '.join(STEPS)}, not {stage!r}"
        )
    pretrains, model = stage == "pretrain", miniature()
    return TrainConfig(
        model=model,
        processor=tiny_processor(model),
        data=DataConfig(
            source=f"{DATA}/{stage}.json",
            tokenizer=f"{DATA}/tokenizer",
            text_fraction=0.25 if pretrains else -1.0,
            rows=10,
            tokens_per_row=160,
            tiles_per_row=9,
            packing_buffer=32,
            deltas=DELTAS,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            muon_learning_rate=0.02 if pretrains else 0.01,
            learning_rate=2e-3 if pretrains else 1e-3,
            warmup_steps=50 if pretrains else 20,
            beta2=0.99,
        ),
        steps=STEPS[stage],
        init_from="" if pretrains else PRETRAINED,
        eval=EvalConfig(source=f"{DATA}/held_out.json", every=100, batches=8),
        checkpoint=CheckpointConfig(every=200, keep=1, keep_best=False),
        scan_unroll=4,
    )


def miniature() -> ModelConfig:
    """Returns SIZES["tiny"] with a larger vocabulary."""
    tiny = SIZES["tiny"]
    language = dataclasses.replace(tiny.language, vocab_size=VOCABULARY)
    return dataclasses.replace(tiny, language=language, image_token_id=IMAGE_TOKEN)
