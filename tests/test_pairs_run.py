"""MPO through train.py: from pairs in files to a run that goes on, with each kind of reference, and what is said of held-out pairs."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoint
from test_pairs import LOSS, pairs_config
from tiny_checkpoint import PROCESSOR

import train
from internvl3_jax import lora, preference, sharding
from internvl3_jax.config import LoraConfig, LossConfig, MeshConfig, OptimizerConfig
from internvl3_jax.data.batch import SampleError
from internvl3_jax.data.batches import Batches
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.make_reference import make_reference

ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
pytestmark = pytest.mark.usefixtures("quick_compilation")


def run_config(folder, **changes):
    config = pairs_config(folder)
    optimizer = dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-3)
    settings = {
        "init_from": str(tiny_checkpoint.directory()),
        "loss": LOSS,
        "optimizer": optimizer,
        "steps": 12,
        "save_every": 6,
    }
    return dataclasses.replace(config, **(settings | changes))


def test_a_run_prefers_what_was_chosen_and_goes_on_exactly(tmp_path):
    """What is said of held-out pairs goes the same way."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    config = run_config(tmp_path, evaluate_every=6, evaluate_batches=2, evaluate_answers=2)
    config = dataclasses.replace(config, held_out=config.data.source)
    whole, _ = train.fit(config, make(tmp_path / "whole", config), mesh)
    rows = log_of(tmp_path / "whole")
    held_out = [row for row in rows if "held_out" in row]
    assert [row["step"] for row in held_out] == [6, 12]
    assert held_out[1]["held_out_reward_margin"] > held_out[0]["held_out_reward_margin"] > 0
    answers = [json.loads(line) for line in (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["question"] == "<image>\nWhat is 0?" and answers[0]["expected"] == "It is 0."
    rows = [row for row in rows if "loss" in row]
    assert rows[0]["loss_preference"] == pytest.approx(np.log(2), abs=1e-5) and rows[0]["reward_margin"] == pytest.approx(
        0, abs=1e-5
    )
    assert np.mean([row["reward_margin"] for row in rows[-4:]]) > 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    again, _ = train.fit(config, tmp_path / "again", mesh)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def log_of(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def losses_of(workdir):
    names, rows = ("loss", "loss_preference", "loss_quality", "grad_norm"), log_of(workdir)
    return [[row[name] for name in names] for row in rows if "loss" in row]


def test_adapters_are_compared_with_their_base(tmp_path):
    """Without a second model: as if the base were named as one. The run goes on exactly."""
    adapters = LoraConfig(rank=2, alpha=8.0, targets=("language/layers/(q|v|down)",))
    config = lora.resolved(run_config(tmp_path, lora=adapters, steps=4, save_every=2, keep=5))
    named = dataclasses.replace(config, loss=dataclasses.replace(LOSS, reference=config.init_from))
    assert not preference.needs_model(config) and preference.needs_model(named)
    whole, _ = train.fit(config, make(tmp_path / "base", config), ONE_DEVICE)
    train.fit(named, make(tmp_path / "named", named), ONE_DEVICE)
    np.testing.assert_allclose(losses_of(tmp_path / "base"), losses_of(tmp_path / "named"), rtol=1e-4)
    assert losses_of(tmp_path / "base")[-1][1] < np.log(2)
    shutil.rmtree(tmp_path / "base" / "checkpoints" / "4")
    again, _ = train.fit(config, tmp_path / "base", ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_an_optimizer_with_the_host_changes_nothing(tmp_path):
    config = run_config(tmp_path, steps=3)
    for name, offload in (("here", False), ("there", True)):
        train.fit(dataclasses.replace(config, offload_optimizer=offload), make(tmp_path / name, config), ONE_DEVICE)
    np.testing.assert_allclose(losses_of(tmp_path / "there"), losses_of(tmp_path / "here"), rtol=1e-5)


def test_log_probabilities_computed_beforehand_are_the_reference_model(tmp_path):
    """The same losses as with the model, and a file of another model, or of other pairs, is refused."""
    mesh, path = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), tmp_path / "reference.jsonl"
    config = run_config(tmp_path, steps=4, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    one = dataclasses.replace(config.data, deltas=("1/2",), min_frames=2, max_frames=2)
    config = dataclasses.replace(config, data=one, mesh=MeshConfig(fsdp=1, data=8), loss_chunk=64)
    config = dataclasses.replace(config, held_out=one.source, evaluate_every=4, evaluate_batches=1)
    pairs, pictures = 11, 7  # held out at another delta, which only pairs with pictures know of
    several = dataclasses.replace(config, data=dataclasses.replace(one, rows=8))
    assert make_reference(several, path) == pairs + pictures
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert make_reference(several, path) == pairs + pictures
    before, after = ({row.get("key"): row for row in map(json.loads, text.splitlines())} for text in (whole, path.read_text()))
    assert before.keys() == after.keys() and before[None] == after[None]
    for key in before.keys() - {None}:
        assert before[key]["chosen"] == pytest.approx(after[key]["chosen"], rel=1e-5)
    cached = dataclasses.replace(config, data=dataclasses.replace(one, reference=str(path)))
    losses = []
    for name, each in (("with", config), ("without", cached)):
        train.fit(each, make(tmp_path / name, each), mesh)
        losses.append(losses_of(tmp_path / name))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    ends = [log_of(tmp_path / name)[-1] for name in ("with", "without")]
    assert ends[1]["held_out"] == pytest.approx(ends[0]["held_out"], rel=1e-4)
    assert ends[1]["held_out_reward_margin"] == pytest.approx(ends[0]["held_out_reward_margin"], rel=1e-2, abs=1e-4)
    path.write_text(path.read_text().replace('"hash": "', '"hash": "0'))
    with pytest.raises(ValueError, match="is of other parameters .*make it again with this configuration"):
        train.fit(cached, make(tmp_path / "other", cached), mesh)
    with pytest.raises(ValueError, match=r"data.deltas is \('1', '1/2', '1/4'\)"):
        make_reference(run_config(tmp_path), path)
    data = dataclasses.replace(cached.data, deltas=("1/4",))
    with (
        Batches(data, PROCESSOR, make_tokenizer(data)) as batches,
        pytest.raises(SampleError, match="of this pair as it is now"),
    ):
        next(batches)


def make(workdir, config):
    train.save_config(config, workdir)
    return workdir


def test_what_does_not_go_together_is_named(folder):
    config = run_config(folder)
    with pytest.raises(ValueError, match="loss.kind is sft and data.pairs True"):
        train.make_mesh(dataclasses.replace(config, loss=LossConfig()))
    with pytest.raises(ValueError, match="init_from is empty"):
        train.make_mesh(dataclasses.replace(config, init_from=""))


def test_a_policy_that_is_not_its_reference_is_noticed(folder, tmp_path, monkeypatch):
    """As if something changed the policy's forward pass."""
    config = run_config(folder)
    load = train.load_reference
    monkeypatch.setattr(train, "load_reference", lambda *a: jax.tree.map(lambda leaf: leaf * 1.01, load(*a)))
    with pytest.raises(ValueError, match=r"the preference part is 0\.831777; it was"):
        train.fit(config, make(tmp_path / "run", config), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
