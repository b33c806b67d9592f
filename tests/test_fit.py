"""Whether a run fits: the topology that is asked for, the operations of a step, and the command."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from configs.sft import get_config as sft
from configs.tiny_digits import get_config as digits
from internvl3_jax.fit import advice, generation
from internvl3_jax.fit.lowering import batch_shapes, train_state_shapes
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.step_cost import full_batch, times, train_cost
from internvl3_jax.fit.topology import Topology, parse
from internvl3_jax.model.ops.remat import POLICIES
from internvl3_jax.training.hardware import CHIPS, chip_of
from internvl3_jax.training.loss_choice import make_loss
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import make_model, train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent


def tiny(**flags):
    """configs/tiny_digits.py for eight devices."""
    return advice.with_flags(
        digits(), {"data.rows": 16, "data.tiles_per_row": 8, "optimizer.name": "adamw"} | flags
    )


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "near"),
    [
        ("v5e:16x16", 256, 256),
        ("v5p:4x4x8", 128, 128),
        ("tpu7x:2x2x4", 32, 32),
        ("h100:1x16x8", 128, 8),
    ],
)
def test_a_topology_has_as_many_devices_as_its_name_says(text, count, near):
    topology = parse(text)
    assert (topology.count, topology.near) == (count, near)


@pytest.mark.parametrize(
    "text",
    ["v5e", "v5e:16", "v5p:4x4", "v6e:4x4x4", "h100:8", "v4:2x2x2", "v5e:0x4", "v5e:4xa", ""],
)
def test_an_error_about_a_topology_shows_a_right_one(text):
    with pytest.raises(ValueError, match=r"--topology is .*v5e:4x4, v5p:4x4x8"):
        parse(text)


def test_a_chip_is_found_by_its_devices_name():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    assert {kind: chip_of(kind).name for kind in names} == names
    assert chip_of("cpu") is None
    assert all(chip.usable < chip.memory for chip in CHIPS.values())


def test_links_that_a_group_can_use():
    torus, hosts = parse("v5p:4x4x8"), parse("h100:1x16x8")
    size, link = 1e9, CHIPS["v5p"].network_bytes
    assert [torus.seconds(size, group) for group in (1, 8, 16, 128)] == pytest.approx(
        [0, size / link * 3, size / link * 1.5, size / link]
    )
    inside, h100 = hosts.seconds(size, 8), CHIPS["h100"]
    assert inside == pytest.approx(size / h100.network_bytes)
    # Fifteen of sixteen parts come from other hosts, through the eight adapters of this one.
    assert hosts.seconds(size, 128) == pytest.approx(size * 15 / 16 / 8 / h100.outside_bytes)
    assert hosts.seconds(size, 16, stride=8) == pytest.approx(size * 15 / 16 / h100.outside_bytes)


# --- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(), ("vision/.*",)], ids=["all trained", "frozen tower"])
@pytest.mark.parametrize("policy", POLICIES)
def test_operations_are_those_of_the_traced_step(policy, frozen):
    """Products with matrices, counted in the step's own trace; the loss' chunks run as often as
    there are tokens to train.
    """
    config = tiny(remat_vision=policy, remat_language=policy, **{"optimizer.freeze": frozen})
    model, optimizer = make_model(config), make_optimizer(config.optimizer, config.steps)
    step = functools.partial(train_step, make_loss(config, model), optimizer)
    traced = jax.make_jaxpr(step)(
        train_state_shapes(config, model, optimizer), batch_shapes(config), jax.random.key(0)
    )
    counted = collections.Counter()
    _count(traced.jaxpr, 1, counted)
    share = per_device(config, parse("v5e:2x2"))
    computed = train_cost(share, estimate(share)).computed
    scores = {name for name in computed if "attention" in name}
    # What attention computes again is a kernel's, not a product with a matrix.
    again = (
        4 * sum(_pairs(config)) * (policy in ("dots", "full", "offload"))
        if not frozen
        else 4 * _pairs(config)[1] * (policy in ("dots", "full", "offload"))
    )
    expected = (
        4 * sum(value for name, value in computed.items() if name not in scores | {"head"}) - again
    )
    assert counted["dense"] == pytest.approx(expected, rel=1e-6)


def _pairs(config) -> tuple[float, float]:
    """Width times pairs of queries and keys of all layers: the tower's and, as the TPU's kernel
    computes them, the decoder's.
    """
    vision, language, data = config.model.vision, config.model.language, config.data
    tower = (
        vision.num_layers
        * data.rows
        * data.tiles_per_row
        * (1 + vision.grid**2) ** 2
        * vision.hidden_size
    )
    tokens = data.tokens_per_row
    pairs = data.rows * tokens * (tokens + 1) / 2 * (tokens + min(512, tokens)) / (tokens + 1)
    return tower, language.num_layers * pairs * language.num_heads * language.head_dim


def _count(jaxpr, times: int, counted: collections.Counter) -> None:
    """FLOPs of the products in a trace: "dense" with a matrix, "batched" in attention and in the
    chunks of the loss.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            is_loss = "gcd" in str(equation.source_info.name_stack) or "gcv" in str(
                equation.source_info.name_stack
            )
            is_scores = any(
                name in str(equation.source_info.name_stack)
                for name in ("bkrh", "bkrs", "th,", "ts,")
            )
            kind = "batched" if batched or is_loss or is_scores else "dense"
            counted[kind] += times * 2 * math.prod(equation.outvars[0].aval.shape) * inner
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else [value]:
                one = getattr(one, "jaxpr", one)
                if hasattr(one, "eqns"):
                    _count(one, inside, counted)


def test_the_highest_mfu_is_what_recomputing_leaves():
    config, topology = sft("8b"), parse("v5p:4x4x8")
    reached = {}
    for policy in POLICIES:
        share = per_device(
            advice.with_flags(config, {"remat_vision": policy, "remat_language": policy}), topology
        )
        taken = times(train_cost(share, estimate(share)), topology)
        assert taken.lower_bound == max(taken.compute, taken.memory, taken.network)
        reached[policy] = taken.mfu
    assert 0.6 < reached["full"] < reached["attention"] < reached["none"] < 1


def test_a_full_batch_is_the_most_that_can_be_needed():
    counts = full_batch(sft("8b"))
    assert counts == {
        "tokens": 512 * 16384,
        "trained_tokens": 512 * 4096,
        "tiles": 512 * 48,
        "pairs": 512 * 16384 * 16385 // 2,
    }


# --- the command ---------------------------------------------------------------------------------


def ask(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "internvl3_jax.fit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_answers_without_a_compiler(tmp_path):
    path = tmp_path / "row.json"
    arguments = ("--config", "configs/sft.py:8b", "--topology", "v5e:16x16", "--analytic")
    done = ask(*arguments, "--config.micro_batches=2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert (
        "256 devices, mesh fsdp 256" in done.stdout
        and "fits" in done.stdout
        and "prediction: at least" in done.stdout
    )
    row = json.loads(path.read_text())
    assert row["analysis"]["peak"] < CHIPS["v5e"].usable and 0.5 < row["mfu_at_most"] < 1


def test_a_run_that_does_not_fit_gets_advice():
    done = ask("--config", "configs/sft.py:8b", "--topology", "v5e:4x4", "--analytic")
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout and "--config.micro_batches=32" in done.stdout


def test_generation_is_answered_without_a_compiler():
    flags = ("--config.mesh.tensor=4", "--config.mesh.fsdp=1")
    done = ask(
        "--config", "configs/sft.py:78b", "--topology", "v5p:2x2x1", *flags, "--infer", "--analytic"
    )
    assert done.returncode == 0, done.stderr
    assert (
        all(program in done.stdout for program in generation.PROGRAMS)
        and "ms a token" in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("--topology", "v9:4x4"), "error: --topology is 'v9:4x4'"),
        (("--topology", "v5e:16x16", "--config.mesh.fsdp=100"), "error: mesh "),
        (("--topology", "v5e:16x16", "--config.data.rows=100"), "error: data.rows is 100"),
        (("--topology", "cpu:8", "--analytic"), "error: --topology is cpu:8"),
    ],
)
def test_a_wrong_question_is_one_line(arguments, answer):
    done = ask("--config", "configs/sft.py:8b", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(answer)
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_is_named():
    with pytest.raises(ImportError, match=r"pip install.*--analytic"):
        dataclasses.replace(parse("v5e:4x4"), name="v5e:4x4-that-is-no-topology").devices()


def test_topologies_are_values():
    assert parse("v5e:4x4") == Topology("v5e:4x4", CHIPS["v5e"], (4, 4))
