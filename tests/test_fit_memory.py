"""The analysis of memory agrees with every program of the committed table, and says what to
change.
"""

import importlib
import json
import pathlib
import sys

import pytest

from configs.finetune import get_config as finetune
from configs.sft import get_config as sft
from internvl3_jax.fit import advice, generation
from internvl3_jax.fit.lowering import Requests
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device, tiled
from internvl3_jax.fit.search import MARGIN, search
from internvl3_jax.fit.topology import parse
from internvl3_jax.training.hardware import CHIPS

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "fit_table.json"


def test_a_tpu_fills_its_tiles_up():
    assert tiled((1025, 1024), 2) == 1032 * 1024 * 2
    assert tiled((3, 5, 100), 4) == 3 * 8 * 128 * 4
    assert tiled((1, 896), 2) == 2 * 896 * 2


@pytest.mark.parametrize(
    ("size", "topology", "flags", "arguments"),
    # Of compiled programs, `memory_analysis().argument_size_in_bytes`.
    [
        ("8b", "v5e:16x16", {"micro_batches": 2}, 512_040_960),
        (
            "8b",
            "v5e:4x4",
            {"data.rows": 16, "data.tokens_per_row": 2048, "data.tiles_per_row": 8},
            5_985_159_168,
        ),
        (
            "1b",
            "v5e:4x4",
            {"data.rows": 16, "data.tokens_per_row": 2048, "data.tiles_per_row": 8},
            726_398_976,
        ),
        ("78b", "v5p:4x4x8", {"micro_batches": 4}, 7_606_786_048),
    ],
)
def test_a_programs_arguments_are_known_exactly(size, topology, flags, arguments):
    memory = estimate(per_device(advice.with_flags(sft(size), flags), parse(topology)))
    # What is missing are scalars: the step, the optimizer's counters, the random key.
    assert 0 <= arguments - memory.arguments < 64 * 1024


def test_the_analysis_agrees_with_every_row_of_the_table():
    """Peaks of the compiler within 10 %, and a row says what the analysis says today; docs/fit.md
    names the two that are further above.
    """
    rows = [row for row in json.loads(TABLE.read_text()) if not row["name"].startswith("infer:")]
    assert rows
    apart, changed = {}, []
    for row in rows:
        stage, size, topology = row["name"].split(":", 2)
        config = importlib.import_module(f"configs.{stage}").get_config(size)
        config = advice.with_flags(
            config, {name: _value(value) for name, value in _flags(row["command"]).items()}
        )
        if estimate(per_device(config, parse(topology))).peak != row["analysis"]["peak"]:
            changed.append(row["name"])
        if "compiler" in row and not row["compiler"]["refused"]:
            apart[row["name"]] = row["analysis"]["peak"] / row["compiler"]["peak"] - 1
    assert changed == [], "run benchmarks/fit_table.py for these again"
    assert {name: round(error, 3) for name, error in apart.items() if abs(error) > 0.1} == {
        "sft:2.5-2b:v5p:4x4x8": 0.111,
        "sft:3.5-1b:v5p:4x4x8": 0.283,
    }


def test_the_analysis_agrees_with_every_program_of_generation():
    """As above; what is not within 10 % is named in docs/fit.md."""
    rows = [row for row in json.loads(TABLE.read_text()) if "decode" in row.get("compiler", {})]
    assert rows
    apart = {}
    for row in rows:
        config = importlib.import_module("configs.sft").get_config(row["name"].split(":")[1])
        config = advice.with_flags(
            config, {name: _value(value) for name, value in _flags(row["command"]).items()}
        )
        need = generation.needed(config, parse(row["topology"]), Requests(**row["requests"]))
        for program, found in row["compiler"].items():
            assert need.peak(program) == row["analysis"][program], (
                f"run benchmarks/fit_table.py for {row['name']} again"
            )
            if not found["refused"]:
                apart[row["name"], program] = (
                    need.peak(program) / (found["peak"] + need.beside[program]) - 1
                )
    assert {name: round(error, 3) for name, error in apart.items() if abs(error) > 0.1} == {}


def test_the_page_and_the_csv_show_the_table():
    """The CSV file has every row, and what docs/fit.md shows of them is what was measured."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    rows = json.loads(TABLE.read_text())
    table = importlib.import_module("fit_csv").text(rows)
    assert TABLE.with_suffix(".csv").read_text() == table, "run benchmarks/fit_csv.py"
    shown = importlib.import_module("fit_table").markdown(rows).splitlines()
    page = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")
    compiled = page.split("## Compiled programs")[1].split("\n## ")[0]
    copied = [line for line in compiled.splitlines() if line.startswith("| ")]
    assert len(copied) >= 15 and set(copied) <= set(shown)


def _flags(command: str) -> dict[str, str]:
    return dict(
        part.removeprefix("--config.").split("=")
        for part in command.split()
        if part.startswith("--config.")
    )


def _value(text: str):
    return int(text) if text.lstrip("-").isdecimal() else text


def test_remat_and_smaller_parts_take_less():
    config, topology = sft("8b"), parse("v5p:4x4x8")

    def peak(**flags):
        return estimate(per_device(advice.with_flags(config, flags), topology)).peak

    by_policy = [
        peak(remat_vision=name, remat_language=name)
        for name in ("none", "dots", "attention", "full")
    ]
    assert by_policy == sorted(by_policy, reverse=True)
    assert peak(micro_batches=4) < peak(micro_batches=2) < peak()
    assert peak(**{"optimizer.moment_dtype": "bfloat16"}) < peak()


def test_a_frozen_tower_keeps_nothing():
    memory = estimate(per_device(finetune("8b"), parse("v5p:2x2x4")))
    assert memory.saved["tower"] == 0
    assert memory.opt_state < 2 * memory.params


def test_what_to_change_is_measured_by_the_same_analysis():
    config, topology = sft("78b"), parse("v5e:16x16")
    config = advice.with_flags(
        config, {"mesh.fsdp": 128, "mesh.data": 2, "micro_batches": 2, "remat_vision": "dots"}
    )
    memory = estimate(per_device(config, topology))
    found = advice.changes(config, topology, memory)
    named = {name for change in found for name in change.flags}
    assert {
        "remat_vision",
        "mesh.tensor",
        "mesh.context",
        "optimizer.moment_dtype",
        "optimizer.name",
        "data.tokens_per_row",
    } <= named
    for change in found:
        assert (
            change.peak
            == estimate(per_device(advice.with_flags(config, change.flags), topology)).peak
            < memory.peak
        )


def test_search_ranks_what_fits():
    config, topology = sft("2b"), parse("v5e:4x4")
    found, tried, _ = search(config, topology)
    assert tried > 100
    assert [setting.seconds for setting in found] == sorted(setting.seconds for setting in found)
    assert all(setting.memory.peak <= MARGIN * CHIPS["v5e"].usable for setting in found)
    again = per_device(advice.with_flags(config, found[0].flags), topology)
    assert estimate(again) == found[0].memory
