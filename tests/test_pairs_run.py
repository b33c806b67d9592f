"""MPO through train.py: from pairs in files to a run that resumes, with each kind of reference, and
what is said of eval pairs.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import train
from internvl3_jax.config import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
)
from internvl3_jax.data.batch import SampleError
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.data.reference_table import ReferenceTable
from internvl3_jax.model import lora
from internvl3_jax.parallel import sharding
from internvl3_jax.training import mpo, reference_model
from internvl3_jax.training.make_reference import make_reference
from tests.support import tiny_checkpoint
from tests.support.official_data import write_meta, write_video
from tests.support.pairs import LOSS, pairs_config
from tests.support.tiny_checkpoint import PROCESSOR, changed

ONE_DEVICE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def run_config(folder, **changes):
    config = pairs_config(folder)
    optimizer = dataclasses.replace(config.optimizer, name="adamw", learning_rate=1e-3)
    settings = {
        "init_from": str(tiny_checkpoint.directory()),
        "loss": LOSS,
        "optimizer": optimizer,
        "steps": 12,
        "checkpoint__every": 6,
    }
    return changed(config, **(settings | changes))


def test_a_run_prefers_what_was_chosen_and_resumes_exactly(tmp_path):
    """What is said of eval pairs goes the same way."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    config = run_config(tmp_path, eval=EvalConfig(every=6, batches=2, answers=2))
    config = changed(config, eval__source=config.data.source)
    whole = train.fit(config, make(tmp_path / "whole", config), mesh)
    rows = log_of(tmp_path / "whole")
    evals = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evals] == [6, 12]
    assert evals[1]["eval_reward_margin"] > evals[0]["eval_reward_margin"] > 0
    answers = [
        json.loads(line) for line in (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()
    ]
    assert answers[0]["question"] == "<image>\nWhat is 0?" and answers[0]["expected"] == "It is 0."
    rows = [row for row in rows if "loss" in row]
    assert rows[0]["loss_preference"] == pytest.approx(np.log(2), abs=1e-5) and rows[0][
        "reward_margin"
    ] == pytest.approx(0, abs=1e-5)
    assert np.mean([row["reward_margin"] for row in rows[-4:]]) > 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    again = train.fit(config, tmp_path / "again", mesh)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def log_of(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def losses_of(workdir):
    names, rows = ("loss", "loss_preference", "loss_quality", "grad_norm"), log_of(workdir)
    return [[row[name] for name in names] for row in rows if "loss" in row]


def test_adapters_are_compared_with_their_base(tmp_path):
    """Without a second model: as if the base were named as one. The run resumes exactly."""
    adapters = LoraConfig(rank=2, alpha=8.0, targets=("language/layers/(q|v|down)",))
    config = lora.freeze_base(
        run_config(tmp_path, lora=adapters, steps=4, checkpoint=CheckpointConfig(every=2, keep=5))
    )
    named = dataclasses.replace(config, loss=dataclasses.replace(LOSS, ref_model=config.init_from))
    assert not mpo.needs_model(config) and mpo.needs_model(named)
    whole = train.fit(config, make(tmp_path / "base", config), ONE_DEVICE)
    train.fit(named, make(tmp_path / "named", named), ONE_DEVICE)
    np.testing.assert_allclose(
        losses_of(tmp_path / "base"), losses_of(tmp_path / "named"), rtol=1e-4
    )
    assert losses_of(tmp_path / "base")[-1][1] < np.log(2)
    shutil.rmtree(tmp_path / "base" / "checkpoints" / "4")
    again = train.fit(config, tmp_path / "base", ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_an_optimizer_with_the_host_changes_nothing(tmp_path):
    config = run_config(tmp_path, steps=3)
    for name, offload in (("here", False), ("there", True)):
        train.fit(
            dataclasses.replace(config, offload_optimizer=offload),
            make(tmp_path / name, config),
            ONE_DEVICE,
        )
    np.testing.assert_allclose(
        losses_of(tmp_path / "there"), losses_of(tmp_path / "here"), rtol=1e-5
    )


def test_log_probabilities_computed_beforehand_are_the_reference_model(tmp_path):
    """The same losses as with the model, whatever is drawn for a sample, eval pairs and videos
    too.
    """
    path = tmp_path / "reference.jsonl"
    config = run_config(
        tmp_path, steps=4, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    )
    write_video(tmp_path / "clip.mp4", 20)
    clip = {
        "video": "clip.mp4",
        "question": "What happens?",
        "chosen": "It gets brighter.",
        "rejected": "Nothing.",
    }
    meta = json.loads(pathlib.Path(config.data.source).read_text())
    source = write_meta(tmp_path, clips={"rows": [clip], "data_augment": True}, **meta)
    data = dataclasses.replace(config.data, source=source, min_frames=1, max_frames=3)
    config = dataclasses.replace(config, data=data, mesh=MeshConfig(fsdp=1, data=8), loss_chunk=64)
    config = dataclasses.replace(config, eval=EvalConfig(source, every=4, batches=1))
    several = dataclasses.replace(config, data=dataclasses.replace(data, rows=16), micro_batches=2)
    count = make_reference(several, path)
    assert count > 12, "eval pairs are at delta 1, others are drawn"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert make_reference(several, path) == count
    before, after = (
        {row.get("key"): row for row in map(json.loads, text.splitlines())}
        for text in (whole, path.read_text())
    )
    assert before.keys() == after.keys() and before[None] == after[None]
    for key in before.keys() - {None}:
        assert before[key]["chosen"] == pytest.approx(after[key]["chosen"], rel=1e-5)
    cached = dataclasses.replace(config, data=dataclasses.replace(data, ref_logps_file=str(path)))
    train.fit(cached, make(tmp_path / "without", cached), ONE_DEVICE)
    # With the model, and the same draws: the file is there, but not looked at.
    named = dataclasses.replace(cached, loss=dataclasses.replace(LOSS, ref_model=config.init_from))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceTable, "added_to", lambda self, sample: sample)
        patch.setattr(mpo, "needs_model", lambda config: True)
        train.fit(named, make(tmp_path / "with", named), ONE_DEVICE)
    np.testing.assert_allclose(
        losses_of(tmp_path / "without"), losses_of(tmp_path / "with"), rtol=1e-4
    )
    ends = [log_of(tmp_path / name)[-1] for name in ("with", "without")]
    assert ends[1]["eval_loss"] == pytest.approx(ends[0]["eval_loss"], rel=1e-4)
    assert ends[1]["eval_reward_margin"] == pytest.approx(
        ends[0]["eval_reward_margin"], rel=1e-2, abs=1e-4
    )


def test_a_reference_file_of_something_else_is_refused(tmp_path):
    path, config = (
        tmp_path / "reference.jsonl",
        run_config(tmp_path, mesh=MeshConfig(fsdp=1, data=8)),
    )
    several = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=8))
    path.write_text("")  # of a start that was stopped at once
    make_reference(several, path)
    assert path.read_text().count('"hash"') == 1
    cached = dataclasses.replace(
        config, data=dataclasses.replace(config.data, ref_logps_file=str(path))
    )
    other = dataclasses.replace(cached, loss=dataclasses.replace(LOSS, ref_model=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        train.fit(other, make(tmp_path / "named", other), ONE_DEVICE)
    path.write_text(path.read_text().replace('"hash": "', '"hash": "0'))
    with pytest.raises(
        ValueError, match="was made with other parameters .*make it again with this configuration"
    ):
        train.fit(cached, make(tmp_path / "other", cached), ONE_DEVICE)
    data = dataclasses.replace(cached.data, deltas=("1/8",))
    with (
        BatchLoader(data, PROCESSOR, make_tokenizer(data)) as batches,
        pytest.raises(SampleError, match="of this pair as it is now"),
    ):
        next(batches)


def test_rows_that_training_leaves_out_have_no_log_probability(tmp_path):
    config = run_config(tmp_path, mesh=MeshConfig(fsdp=1, data=8))
    rows = [{"question": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n + 1}?"} for n in range(3)]
    rows += [{"question": "a", "chosen": "b" * 300, "rejected": "c"}, {"question": "no pair"}]
    source = write_meta(tmp_path, few={"rows": rows})
    (tmp_path / "errors.tsv").write_text("few\t4\tno pair\n")
    data = dataclasses.replace(
        config.data,
        source=source,
        rows=8,
        overlong="drop",
        exclude_file=str(tmp_path / "errors.tsv"),
    )
    assert make_reference(dataclasses.replace(config, data=data), tmp_path / "reference.jsonl") == 3


def make(workdir, config):
    train.save_config(config, workdir)
    return workdir


def test_what_does_not_go_together_is_named(tmp_path):
    config = run_config(tmp_path)
    with pytest.raises(ValueError, match="loss.kind is sft and data.pairs is True"):
        train.make_mesh(dataclasses.replace(config, loss=LossConfig()))
    with pytest.raises(ValueError, match="init_from is empty"):
        train.make_mesh(dataclasses.replace(config, init_from=""))
    with pytest.raises(ValueError, match="Set loss.ref_model to runs/sft too"):
        train.make_mesh(dataclasses.replace(config, lora=LoraConfig(rank=2, init_from="runs/sft")))


def test_a_policy_that_is_not_its_reference_is_noticed(tmp_path, monkeypatch):
    """As if something changed the policy's forward pass."""
    config = run_config(tmp_path)
    load = reference_model.load_reference
    monkeypatch.setattr(
        reference_model,
        "load_reference",
        lambda *a: jax.tree.map(lambda leaf: leaf * 1.01, load(*a)),
    )
    with pytest.raises(ValueError, match=r"quality losses are 0\.831777; they are"):
        train.fit(
            config,
            make(tmp_path / "run", config),
            sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        )
