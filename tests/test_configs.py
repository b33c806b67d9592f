"""The shipped recipes: shapes, settings that the code accepts, and numbers that go together."""

import dataclasses
import importlib

import jax
import pytest

from configs.common import RELEASED
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    split_params,
    warmup_steps,
)
from tests.support import tiny_checkpoint

STAGES = ("pretrain", "sft", "finetune", "lora", "mpo")


def recipe(stage: str, name: str):
    return importlib.import_module(f"configs.{stage}").get_config(name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", RELEASED)
def test_every_size_has_every_stage(stage, size):
    config = recipe(stage, size)
    still = dataclasses.replace(
        config.model, vision=dataclasses.replace(config.model.vision, drop_path=0.0)
    )
    assert still == SIZES[size]
    make_optimizer(config.optimizer, config.steps)
    config = lora.freeze_base(config)
    params = abstract_params(config.model)
    if config.lora.rank:
        params |= {
            "lora": jax.eval_shape(lambda: lora.init(params, config.lora, jax.random.key(0)))
        }
    trained, frozen = split_params(params, config.optimizer.freeze)
    assert set(trained) == set(params) - set(frozen)
    assert set(frozen) == {"finetune": {"vision"}, "lora": {"vision", "projector", "language"}}.get(
        stage, set()
    )
    make_schedule(config.optimizer, config.steps, config.optimizer.learning_rate)
    longest = 24_576 if stage == "mpo" and size not in ("38b", "78b") else 16_384
    assert config.data.tokens_per_row == longest and config.data.tiles_per_row == 48
    # A row of tiles alone fits the tokens.
    assert config.data.tiles_per_row * config.model.tokens_per_tile <= config.data.tokens_per_row


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_names_its_own_shapes(stage):
    config = recipe(stage, str(tiny_checkpoint.directory()))
    assert (
        config.model.language == tiny_checkpoint.CONFIG.language
        and config.processor == tiny_checkpoint.PROCESSOR
    )
    assert config.init_from == config.data.tokenizer == str(tiny_checkpoint.directory())


def test_pretraining_is_the_papers():
    config = recipe("pretrain", "8b")
    assert (
        config.data.text_fraction == 0.25
        and len(config.data.deltas) == 9
        and config.data.loss_reduction == "square"
    )
    assert config.steps * config.data.rows * config.data.tokens_per_row == pytest.approx(
        200e9, rel=1e-3
    )


def test_mpo_is_the_scripts():
    for size, pairs in (("8b", 256), ("78b", 512)):
        config, loss = recipe("mpo", size), recipe("mpo", size).loss
        assert (loss.kind, loss.preference_weight, loss.quality_weight, loss.generation_weight) == (
            "mpo",
            0.8,
            0.2,
            1.0,
        )
        assert config.optimizer.learning_rate == 2e-7 and config.data.pairs and loss.beta == 0.1
        assert config.steps * pairs == pytest.approx(300_000, rel=1e-2)


def test_adapters_learn_at_the_scripts_rates():
    rates = {size: recipe("lora", size).optimizer.learning_rate for size in RELEASED}
    assert rates == {size: 2e-5 if size in ("38b", "78b") else 4e-5 for size in RELEASED}


@pytest.mark.parametrize("stage", STAGES)
def test_warm_up_is_three_percent_of_any_number_of_steps(stage):
    config = recipe(stage, "1b")
    for steps, expected in ((6, 0), (1_000, 30), (12_000, 360)):
        assert warmup_steps(config.optimizer, steps) == expected
        make_schedule(config.optimizer, steps, 1.0)
