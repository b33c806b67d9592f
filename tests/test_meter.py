"""What the log says: FLOPs by hand, what a batch holds, means over steps; and where the rows go."""

import contextlib
import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.flops import batch_counts, forward_flops, train_flops
from internvl3_jax.training.metrics import MetricsAggregator
from internvl3_jax.training.run_log import Log
from tests.support.tiny_checkpoint import CONFIG, changed, train_config


def matrices(tree) -> int:
    return sum(
        int(np.prod(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(tree)
        if path[-1].key == "kernel"
    )


@pytest.mark.parametrize("size", ["tiny", "1b", "38b"])
def test_a_product_costs_two_operations_a_weight_and_row(size):
    model = SIZES[size]
    params, forward = abstract_params(model), forward_flops(model)
    vision, language = model.vision, model.language
    layers, patches = params["vision"]["layers"], vision.grid**2
    attention = 4 * vision.num_layers * (1 + patches) ** 2 * vision.hidden_size
    embedding = 2 * patches * matrices(params["vision"]["patch_embedding"])
    assert forward.vision_tile == embedding + 2 * (1 + patches) * matrices(layers) + attention
    assert forward.projector_tile == 2 * model.tokens_per_tile * matrices(params["projector"])
    assert forward.language_token == 2 * matrices(params["language"]["layers"])
    assert forward.head == 2 * language.hidden_size * language.vocab_size


# Parameters of the decoder that a token uses, as published: 3.35 and 22.19 billion.
@pytest.mark.parametrize(("size", "active"), [("3.5-30b-a3b", 3.35e9), ("3.5-241b-a28b", 22.19e9)])
def test_of_experts_those_count_that_a_token_uses(size, active):
    language = SIZES[size].language
    tables = 2 * language.vocab_size * language.hidden_size
    used = forward_flops(SIZES[size]).language_token / 2 + tables
    assert used == pytest.approx(active, rel=2e-3)


def example_batch():
    """Two rows: samples of 3 and 2 tokens and one of padding; a sample of 6 tokens with a tile of
    four visual tokens.
    """
    image = CONFIG.image_token_id
    size = CONFIG.vision.image_size
    return {
        "tokens": np.array([[1, 2, 3, 4, 5, 0], [1, image, image, image, image, 2]], np.int32),
        "segments": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32),
        "loss_weights": np.array([[0, 1, 1, 0, 0.5, 0], [0, 0, 0, 0, 0, 1]], np.float32),
        "tiles": np.zeros((2, 3, size, size, 3), np.uint8),
    }


def test_what_a_batch_holds():
    counts = batch_counts(example_batch(), CONFIG)
    expected = {
        "tokens": 11,
        "trained_tokens": 4,
        "tiles": 1,
        "pairs": 6 + 3 + 21,
        "token_room": 12,
        "tile_room": 6,
    }
    assert counts == expected
    forward = forward_flops(CONFIG)
    frozen = train_flops(CONFIG, counts, vision_trained=False)
    assert train_flops(CONFIG, counts) - frozen == 2 * forward.vision_tile
    rest = (
        11 * forward.language_token
        + 30 * forward.language_pair
        + 4 * forward.head
        + forward.projector_tile
    )
    assert frozen == forward.vision_tile + 3 * rest


def test_a_row_is_the_mean_since_the_last():
    config = dataclasses.replace(train_config(), steps=10)
    placement = types.SimpleNamespace(counted=lambda batch: batch)
    meter = MetricsAggregator(config, placement, ["a", "b", "c"], True)
    prepared = types.SimpleNamespace(batch=example_batch(), waited=0.0)
    for step in (1, 2):
        sums = {"source_loss": np.array([2.0 * step, 0, 3]), "source_weight": np.array([1.0, 0, 2])}
        meter.add(prepared, {"loss": np.float32(step), "grad_norm": 2.0, "finite": True} | sums)
    row = meter.row(2)
    assert (row["loss"], row["grad_norm"], row["loss/a"], row["loss/c"]) == (1.5, 2.0, 3.0, 1.5)
    assert "loss/b" not in row, "no token of it was trained"
    assert row["token_fill"] == 11 / 12 and row["tile_fill"] == 1 / 6
    assert row["tokens_per_second"] == pytest.approx(11 / row["step_seconds"])
    assert row["learning_rate"] == pytest.approx(config.optimizer.learning_rate / 2), (
        "the second of two warm-up steps"
    )
    assert "mfu" not in row and row["memory_gib"] > 0
    meter.add(prepared, {"loss": 7.0, "source_loss": np.ones(3), "source_weight": np.ones(3)})
    assert meter.row(3)["loss"] == 7.0

    # The wait for a batch that came before the clock started does not count.
    late = types.SimpleNamespace(batch=prepared.batch, waited=100.0)
    zeros = {"loss": 7.0, "source_loss": np.ones(3), "source_weight": np.ones(3)}
    meter.restart(has_batch=True)
    meter.add(late, zeros)
    assert meter.row(4)["input_wait"] == 0.0
    meter.add(late, zeros)
    assert meter.row(5)["input_wait"] > 0.0


def test_the_log_and_tensorboard(tmp_path):
    """Rows after the step at which a run resumes are dropped; TensorBoard's file holds the same
    values.
    """
    config = changed(train_config(), logging__tensorboard=True)
    for start in (0, 1):
        with Log(tmp_path, config, start) as log:
            for step in range(start + 1, 3):
                log.write(step, {"loss": 1.0 / step, "seconds": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert (tmp_path / "loss.png").exists()
    assert all(b"loss" in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_weights_and_biases_tells_runs_apart(tmp_path, monkeypatch):
    """Two runs whose directories end alike are two runs there; one that resumes stays what it is."""
    started, finished = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: None, finish=lambda exit_code: finished.append(exit_code)
    )
    fake = types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = changed(train_config(), logging__wandb="project")
    for name in ("a/sft", "b/sft", "a/sft"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FloatingPointError), Log(tmp_path / name, config, 0) as log:
            log.write(1, {"loss": 1.0, "seconds": 1.0})
            if len(started) == 1:
                raise FloatingPointError
    ids = [settings["id"] for settings in started]
    assert ids[0] == ids[2] != ids[1] and started[0]["name"] == str(tmp_path / "a" / "sft")
    assert finished == [1, 0, 0]


def test_a_profile_of_chosen_steps(tmp_path):
    config = changed(train_config(), logging__profile_steps=(2, 3))
    with Log(tmp_path, config, 0) as log:
        for step in range(1, 6):
            log.profile(step)
            assert log.profiling == (step in (2, 3))
            jax.numpy.ones(3).block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
