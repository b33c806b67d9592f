"""fit of LoRA and QLoRA: what is held, what is computed, what is communicated."""

import dataclasses
import importlib
import json
import pathlib
import sys

import jax
import pytest

from configs.finetune import get_config as finetune
from configs.lora import get_config as adapters
from internvl3_jax.config import LoraConfig, MeshConfig
from internvl3_jax.fit import advice
from internvl3_jax.fit.lowering import lower_train_step
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.step_cost import train_cost
from internvl3_jax.fit.topology import parse
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.parallel.sharding import make_mesh
from tests.support.tiny_checkpoint import CONFIG, train_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
GB = 1e9
ONE = parse("h100:1x1x1")
SHORT = {"data.rows": 1, "data.tokens_per_row": 4096, "data.tiles_per_row": 12}


def shared(size="8b", **flags):
    config = advice.with_flags(adapters(size), SHORT | flags)
    return per_device(lora.freeze_base(config), ONE)


def test_what_is_held_is_the_base_and_the_adapters():
    """Of the 8B: 15.9 GB in bfloat16, adapters of rank 16 in float32 with two moments, and no
    gradient of anything else.
    """
    share = shared()
    memory = estimate(share)
    count = 16 * 28 * (2 * 3584 + 2 * (3584 + 512) + 2 * 3584 + 3 * (3584 + 18944))
    assert share.adapters("language/") == count and share.adapters("vision/") == 0
    base = 2 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(share.config.model)))
    assert (memory.params, memory.opt_state) == (base + 4 * count, pytest.approx(8 * count, abs=64))
    assert (
        share.gradients("") == share.gradients("language/") == 4 * count
        and share.gradients("vision/") == 0
    )
    assert (
        not memory.held["matrices in the compute dtype"]
        and not memory.saved["tower"]
        and not memory.saved["projector"]
    )


def test_fewer_bits_take_less():
    peaks = {
        kind: estimate(shared(**{"lora.quantize": kind})).peak / GB
        for kind in ("none", "int8", "nf4")
    }
    whole = estimate(per_device(advice.with_flags(finetune("8b"), SHORT), ONE)).peak / GB
    assert whole > 100 and peaks["none"] > peaks["int8"] + 5 and peaks["int8"] > peaks["nf4"] + 2.5
    changes = advice.changes(
        lora.freeze_base(advice.with_flags(adapters("8b"), SHORT)), ONE, estimate(shared())
    )
    assert {"lora.quantize": "nf4"} in [change.flags for change in changes]


def test_adapters_of_the_tower_are_gone_through_backward():
    everywhere = shared(**{"lora.targets": ("language/layers/.*", "vision/layers/.*")})
    memory = estimate(everywhere)
    assert (
        everywhere.learns("vision/")
        and not everywhere.trains("vision/")
        and memory.saved["tower"] > 0
    )
    assert everywhere.gradients("vision/") == 4 * everywhere.adapters("vision/") > 0
    few, more = (train_cost(share, estimate(share)).computed for share in (shared(), everywhere))
    # forward, and the gradient of the activations
    assert more["tower"] == pytest.approx(2 * few["tower"], rel=0.01)


def test_frozen_matrices_have_no_gradient():
    """Two passes in place of three in decoder and head, and what the adapters cost. Dropout keeps
    their inputs if nothing is recomputed.
    """
    plain = train_cost(
        share := per_device(advice.with_flags(finetune("8b"), SHORT), ONE), estimate(share)
    ).computed
    found = train_cost(shared(), estimate(shared())).computed
    assert found["decoder"] == pytest.approx(plain["decoder"] * 2 / 3) and found[
        "head"
    ] == pytest.approx(plain["head"] * 2 / 3)
    assert found["decoder, attention"] == plain["decoder, attention"]
    assert (
        found["decoder's adapters"]
        == 6 * 4096 * shared().adapters("language/")
        < 0.02 * found["decoder"]
    )
    kept = [
        estimate(shared(remat_language="none", **{"lora.dropout": rate})).saved["decoder"]
        for rate in (0.1, 0.0)
    ]
    assert kept[0] - kept[1] == 28 * 4096 * 3 * (5 * 3584 + 3584 + 18944)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_programs_arguments_are_known_exactly(quantize):
    """Compiled for this machine; the step is train.py's."""
    settings = LoraConfig(
        rank=4, targets=("language/layers/.*", "vision/layers/fc1"), dropout=0.1, quantize=quantize
    )
    config = dataclasses.replace(
        train_config(), lora=settings, param_dtype="bfloat16", mesh=MeshConfig(fsdp=1)
    )
    config = lora.freeze_base(
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    )
    assert config.model == CONFIG
    lowered = lower_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    compiled = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    analysis = estimate(per_device(config, parse("cpu:1"))).arguments
    assert 0 <= compiled.argument_size_in_bytes - analysis < 1024


def test_the_analysis_agrees_with_every_row_of_the_table():
    """Peaks of the compilers within 10 %, and a row says what the analysis says today; the page
    shows the tables.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    table = importlib.import_module("lora_table")
    rows = {row["name"]: row for row in json.loads(table.RESULTS.read_text())}
    assert {name for name in rows if name.startswith("h100")} == {
        f"h100:{s}:{b}" for s in table.SIZES for b in table.BASES
    }
    apart, changed = {}, []
    for name, row in rows.items():
        kind, size, base = name.split(":")
        config = lora.freeze_base(
            advice.with_flags(adapters(size), table.SETTINGS | {"lora.quantize": base})
        )
        if (
            estimate(per_device(config, parse(table.CHIPS.get(kind, table.GPU)))).peak
            != row["analysis"]["peak"]
        ):
            changed.append(name)
        if not row["compiler"]["refused"]:
            apart[name] = round(row["analysis"]["peak"] / row["compiler"]["peak"] - 1, 3)
    assert changed == [], "run benchmarks/lora_table.py for these again"
    assert {name: error for name, error in apart.items() if abs(error) > 0.1} == {}
    assert table.markdown(rows) in (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
