"""A LoRA run through train.py: what its checkpoints hold, how it resumes, what its base must be,
and what opens it.
"""

import dataclasses
import functools
import io
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

import infer
from convert.__main__ import main as convert
from internvl3_jax import Chat, load
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import MeshConfig, OptimizerConfig
from internvl3_jax.io.checkpoint_paths import resolve_checkpoint
from internvl3_jax.model import lora
from internvl3_jax.parallel import sharding
from tests.support import tiny_checkpoint
from tests.support.batches import batch
from tests.support.lora_setup import LORA, config_of, logits, start
from tests.support.tiny_checkpoint import CONFIG


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_a_checkpoint_holds_what_was_trained(lora_run, lora_base):
    workdir, params = lora_run
    step = resolve_checkpoint(workdir)
    stored = storage.leaf_infos(step / "params")
    assert {path.split("/")[0] for path in stored} == {"lora", "projector"}
    state = jax.tree.leaves_with_path(storage.ocp.metadata(step / "opt_state").metadata)
    assert len([path for path, _ in state if "mu" in jax.tree_util.keystr(path)]) == len(stored)
    assert sum(leaf.size for leaf in stored.values()) < 0.15 * sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    named = Manifest.read(step).base
    assert (named.path, named.dtype, named.lora) == (str(lora_base), "float32", LORA)
    under = load(lora_base).params
    for part in ("vision", "language"):
        jax.tree.map(np.testing.assert_array_equal, params[part], under[part])


def test_it_opens_as_an_ordinary_model(lora_run):
    """Merged, in any dtype; with the logits of the run's own parameters."""
    workdir, params = lora_run
    opened = load(workdir)
    expected = logits(CONFIG, lora.variables(params, LORA), batch(2))
    np.testing.assert_allclose(
        logits(CONFIG, {"params": opened.params}, batch(2)), expected, atol=2e-5, rtol=1e-5
    )
    assert {
        leaf.dtype.name for leaf in jax.tree.leaves(load(workdir, dtype="bfloat16").params)
    } == {"bfloat16"}
    meshed = load(workdir, mesh=sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        meshed.params,
        opened.params,
    )


def test_it_resumes_bit_for_bit(lora_run, lora_base, tmp_path):
    """From the step before the last; the adapters' dropout and the data continue."""
    workdir, params = lora_run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = jax.device_get(start(config_of(lora_base), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert losses(tmp_path / "run") == losses(workdir)


def test_another_base_is_noticed(lora_run, lora_base, tmp_path, caplog):
    """Training on, opening and converting say so; so does an adapter on a base of the same shapes."""
    workdir, _ = lora_run
    other = load(lora_base)
    other.params["language"]["norm"]["scale"] = (
        other.params["language"]["norm"]["scale"].at[3].add(1e-6)
    )
    files = {
        path.name: path.read_bytes()
        for path in lora_base.iterdir()
        if path.is_file() and path.suffix in (".json", ".txt")
    }
    files.pop("internvl3_jax.json")
    save_checkpoint(tmp_path / "other", other.params, other.config, other.processor, files)
    with pytest.raises(ValueError, match="this base has other parameters"):
        load(workdir, base=tmp_path / "other")
    with pytest.raises(ValueError, match="this base has other parameters"):
        load(tmp_path / "other", adapters={"it": workdir})
    assert convert([str(workdir), str(tmp_path / "merged"), "--base", str(tmp_path / "other")]) == 1
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(
        ValueError, match="step 3 of .* was trained on the base .* has other parameters"
    ):
        start(config_of(tmp_path / "other"), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "other", dtype="bfloat16", adapters={"it": workdir})
    assert "not compared with its base" in caplog.text


def test_adapters_are_chosen_by_name(lora_run, lora_base):
    opened = load(lora_base, adapters={"run": lora_run[0]})
    alone, merged = (
        Chat(load(lora_base), max_new_tokens=6),
        Chat(load(lora_run[0]), max_new_tokens=6),
    )
    chat = Chat(opened, "run", max_new_tokens=6)
    image = [tiny_checkpoint.make_image(16, 16)]
    for adapter, expected in (("run", merged), (None, alone), ("run", merged)):
        chat.use(adapter)
        expected.reset()
        assert chat("What is it?", image) == expected("What is it?", image)
    assert merged.last.token_ids != alone.last.token_ids


def test_infer_takes_adapters(lora_run, lora_base, tmp_path, capsys, monkeypatch):
    """The first is used unless another is named; in a conversation /adapter changes it. Both
    formats, by name.
    """
    assert convert([str(lora_run[0]), str(tmp_path / "peft"), "--to", "peft-hf"]) == 0
    values = {
        "checkpoint": str(lora_base),
        "adapter": [f"mine={lora_run[0]}", str(tmp_path / "peft")],
        "compilation_cache": "",
    }

    def answers(**changes):
        capsys.readouterr()
        infer.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(max_new_tokens=6, json=True, **values | changes):
            infer.run(["infer.py"])
        return [
            json.loads(line[line.index("{") :])["token_ids"]
            for line in capsys.readouterr().out.splitlines()
            if "{" in line
        ]

    chats = [Chat(load(path), max_new_tokens=6) for path in (lora_run[0], lora_base)]
    adapted, plain = ([chat("Hello"), chat.last.token_ids][1] for chat in chats)
    assert adapted != plain
    assert answers(prompt="Hello") == answers(prompt="Hello", use="peft") == [adapted]
    assert answers(prompt="Hello", use="") == [plain]
    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO("Hello\n/adapter\nHello\n/adapter peft\nHello\n/adapter none\n/quit\n"),
    )
    assert answers() == [adapted, plain, adapted]
    with pytest.raises(
        SystemExit, match="error: --use is 'other'; there is no such --adapter: mine, peft"
    ):
        answers(prompt="Hello", use="other")
    with pytest.raises(
        SystemExit, match="error: two adapters are called 'peft'; name them: --adapter NAME=DIR"
    ):
        answers(prompt="Hello", adapter=["a/peft", "b/peft"])


def test_a_run_is_merged_by_converting(lora_run, lora_base, tmp_path, capsys):
    workdir, _ = lora_run
    assert convert([str(workdir), str(tmp_path / "merged")]) == 0
    assert "adapters of 5 stacked layers merged" in capsys.readouterr().out
    expected = load(workdir).params
    found = load(tmp_path / "merged")
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found.params, expected
    )
    assert convert([str(workdir), str(tmp_path / "exported"), "--to", "hf"]) == 0
    rows = CONFIG.language.vocab_size  # the rest pads
    back = load(tmp_path / "exported").params["language"]["embedding"][:rows]
    np.testing.assert_array_equal(back, expected["language"]["embedding"][:rows])


def test_a_run_on_a_four_bit_base(lora_base, tmp_path):
    """Saves no base, resumes bit for bit, opens with the kernels that it was trained on."""
    config = config_of(
        lora_base, lora=dataclasses.replace(LORA, quantize="nf4"), steps=3, checkpoint__every=2
    )
    params = jax.device_get(start(config, tmp_path / "run"))
    assert set(params["language"]["layers"]["q"]["kernel"]) == {"nf4", "scales"}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(start(config, tmp_path / "run")), params
    )
    found = logits(CONFIG, {"params": load(tmp_path / "run").params}, batch(2))
    np.testing.assert_allclose(
        found, logits(CONFIG, lora.variables(params, config.lora), batch(2)), atol=2e-5, rtol=1e-5
    )
    assert convert([str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        *(load(tmp_path / name).params for name in ("merged", "run")),
    )


def test_a_run_starts_from_an_adapter(lora_run, lora_base, tmp_path):
    """Of the same layers and ranks; its scale is turned into the new run's. Any other is refused,
    naming the first difference.
    """
    workdir, params = lora_run
    settings = dataclasses.replace(LORA, init_from=str(workdir), alpha=2.0, dropout=0.0)
    config = config_of(lora_base, lora=settings, steps=1)
    config = dataclasses.replace(
        config, optimizer=OptimizerConfig(learning_rate=0.0, warmup_steps=0)
    )
    first = jax.device_get(start(config, tmp_path / "run"))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, lora.merged(first, settings), lora.merged(params, LORA))
    with pytest.raises(
        ValueError,
        match=r"does not fit lora.rank, targets and full: lora/.* is \(2, \d+, 2\) in the adapter, "
        r"\(2, \d+, 4\) in the config",
    ):
        start(
            dataclasses.replace(config, lora=dataclasses.replace(settings, rank=4)),
            tmp_path / "wider",
        )


def test_a_base_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="init_from is empty: name the base"):
        start(config_of(""), tmp_path / "run")


def test_what_holds_no_adapter(lora_base, tmp_path):
    with pytest.raises(
        ValueError, match="holds no adapter: it is neither a LoRA run nor a PEFT directory"
    ):
        load(lora_base, adapters={"it": lora_base})
