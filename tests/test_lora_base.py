"""The base of a LoRA run: the same wherever it is stored and in whatever format, and where an
adapter is refused.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.finetune import get_config as finetune
from internvl3_jax import load
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.config import OptimizerConfig
from internvl3_jax.io.checkpoint_paths import resolve_checkpoint
from internvl3_jax.model import lora
from internvl3_jax.training.state import reinit_dead_ranks
from tests.support.lora_setup import LORA, config_of, start

ADAPTERS = dataclasses.replace(LORA, full=(), dropout=0.0)


def short(path, **changes):
    config = config_of(path, **{"steps": 2, "checkpoint__every": 1, "lora": ADAPTERS} | changes)
    return dataclasses.replace(
        config, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    )


def save_other(directory, path):
    """A checkpoint that differs from the one at `directory` in one number."""
    other = load(directory)
    other.params["language"]["norm"]["scale"] = (
        other.params["language"]["norm"]["scale"].at[3].add(1e-6)
    )
    files = {
        file.name: file.read_bytes()
        for file in directory.iterdir()
        if file.is_file() and file.suffix in (".json", ".txt")
    }
    files.pop("internvl3_jax.json")
    save_checkpoint(path, other.params, other.config, other.processor, files)


def test_a_base_may_move_and_a_run_that_is_one_may_resume(lora_base, tmp_path):
    """It is known by its hash; of a training run the step is the base that was its newest then."""
    first = tmp_path / "sft" / "checkpoints" / "1"
    shutil.copytree(lora_base, first)
    config = short(tmp_path / "sft")
    whole = jax.device_get(start(config, tmp_path / "lora"))
    save_other(lora_base, tmp_path / "sft" / "checkpoints" / "2")
    assert resolve_checkpoint(tmp_path / "sft").name == "2"
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "2")
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(start(config, tmp_path / "lora")), whole
    )
    assert load(tmp_path / "lora").config == load(lora_base).config
    moved = first.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "2")
    with pytest.raises(
        ValueError,
        match=r"trained on the base .*sft/checkpoints/1, and .*checkpoints/2 has other parameters",
    ):
        start(config, tmp_path / "lora")
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(start(short(moved), tmp_path / "lora")), whole
    )


@pytest.mark.parametrize(("before", "now"), [
    pytest.param("nf4", "nf4", marks=pytest.mark.slow),
    ("none", "nf4"),
    pytest.param("int8", "none", marks=pytest.mark.slow),
])  # fmt: skip
def test_an_adapter_resumes_on_the_same_base_in_another_format(lora_base, tmp_path, before, now):
    settings = dataclasses.replace(ADAPTERS, quantize=before)
    trained = jax.device_get(
        start(short(lora_base, steps=1, param_dtype="bfloat16", lora=settings), tmp_path / "before")
    )
    settings = dataclasses.replace(settings, quantize=now, init_from=str(tmp_path / "before"))
    config = short(lora_base, steps=1, param_dtype="bfloat16", lora=settings)
    config = dataclasses.replace(
        config, optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=0)
    )
    found = jax.device_get(start(config, tmp_path / "now"))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        found["lora"],
        trained["lora"],
    )


def test_what_adapters_train_is_not_frozen(lora_base, tmp_path):
    for frozen in ("lora/vision/.*", "projector/.*"):
        config = dataclasses.replace(
            config_of(lora_base), optimizer=OptimizerConfig(warmup_steps=0, freeze=(frozen,))
        )
        with pytest.raises(
            ValueError, match="optimizer.freeze freezes .*, which lora.targets or lora.full trains"
        ):
            start(config, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="lora.targets is empty"):
        lora.freeze_base(config_of(lora_base, lora=dataclasses.replace(LORA, targets=())))


def test_an_adapter_wants_the_processor_that_it_was_trained_with(
    lora_run, lora_base, tmp_path, caplog
):
    config = short(lora_base, steps=1)
    config = dataclasses.replace(
        config, processor=dataclasses.replace(config.processor, system_message="Be brief.")
    )
    start(config, tmp_path / "run")
    with pytest.raises(
        ValueError, match="system_message is 'Be brief.' in the adapter and None in the base"
    ):
        load(lora_base, adapters={"it": tmp_path / "run"})
    load(lora_base, adapters={"it": tmp_path / "run"}, accept_fingerprint=True)
    with pytest.raises(ValueError, match="is not a LoRA run, so it has no base"):
        load(lora_base, base=lora_base)


def test_an_adapter_in_a_dtype_that_cannot_be_compared(lora_base, tmp_path, caplog):
    start(short(lora_base, steps=1, param_dtype="bfloat16"), tmp_path / "run")
    load(lora_base, dtype="float16", adapters={"it": tmp_path / "run"})
    assert "not compared with its base" in caplog.text


def test_a_recipe_of_a_run_starts_from_its_merged_model(lora_run):
    assert finetune(str(lora_run[0])).init_from == str(resolve_checkpoint(lora_run[0]))


def test_dead_ranks_of_an_adapter_are_reinitialized():
    rng = np.random.default_rng(0)
    drawn, a, b = rng.normal(size=(3, 8, 2)), rng.normal(size=(3, 8, 2)), rng.normal(size=(3, 2, 4))
    a[1], b[1] = 0, 0  # a layer without an adapter
    a[2, :, 1], b[2, 1] = 0, 0  # one of a lower rank
    b[0, 0] = 0  # as it begins: this learns
    leaves = {
        "lora/q/a": jnp.asarray(a),
        "lora/q/b": jnp.asarray(b),
        "projector/fc1/kernel": jnp.zeros((2, 2)),
    }
    found = reinit_dead_ranks(leaves, {"lora/q/a": jnp.asarray(drawn)})
    expected = a.copy()
    expected[1], expected[2, :, 1] = drawn[1], drawn[2, :, 1]
    np.testing.assert_allclose(found["lora/q/a"], expected, rtol=1e-6)
    assert found["lora/q/b"] is leaves["lora/q/b"] and not found["projector/fc1/kernel"].any()
