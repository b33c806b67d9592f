"""What `python -m internvl3_jax.fit` reads from compiled programs, and what compiles for devices
that are not used.
"""

import numpy as np
import pytest

from configs.sft import get_config as sft
from configs.tiny_digits import get_config as digits
from internvl3_jax.fit import advice, generation, live_arrays, report
from internvl3_jax.fit.compilation import compile_for, parse_out_of_memory
from internvl3_jax.fit.hlo import collectives
from internvl3_jax.fit.lowering import (
    Requests,
    generation_params,
    lower_generation,
    lower_train_step,
)
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.step_cost import train_cost
from internvl3_jax.fit.topology import parse
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.training.hardware import CHIPS

GIB = 2**30


def tiny(**flags):
    """configs/tiny_digits.py for eight devices."""
    return advice.with_flags(
        digits(), {"data.rows": 16, "data.tiles_per_row": 8, "optimizer.name": "adamw"} | flags
    )


# --- compiled programs ---------------------------------------------------------------------------

TEXT = (
    """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]# parameter(0)
  %b = f32[]# parameter(1)
  ROOT %sum = f32[]# add(%a, %b)
}

%part.1 (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]@ parameter(0)
  ROOT %all-gather.1 = bf16[64,128]@ all-gather(%p), channel_id=7, GROUPS, dimensions={0}
}

%inner_condition (c: (u32[], bf16[8,128])) -> pred[] {
  %c = (u32[]#, bf16[8,128]@) parameter(0)
  %eight = u32[]# constant(8)
  %i = u32[]# get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %eight), direction=LT
}

%inner (b: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %b.1 = (u32[]#, bf16[8,128]@) parameter(0)
  %two = u32[]# constant(2)
  %j = u32[]# get-tuple-element(%b.1), index=0
  %x = bf16[8,128]@ get-tuple-element(%b.1), index=1
  %next = u32[]# add(%j, %two)
  %start = (bf16[8,128]@, bf16[8,128]@, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9
  %done = bf16[8,128]@ collective-permute-done(%start)
  ROOT %out = (u32[]#, bf16[8,128]@) tuple(%next, %done)
}

%outer_condition (c.1: (s32[], bf16[8,128])) -> pred[] {
  ROOT %any = pred[] parameter(0)
}

%outer (b.2: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b.2 = (s32[]#, bf16[8,128]@) parameter(0)
  %k = s32[]# get-tuple-element(%b.2), index=0
  %y = bf16[8,128]@ get-tuple-element(%b.2), index=1
  %first = bf16[64,128]@ fusion(%y), kind=kOutput, calls=%part.1
  %second = bf16[64,128]@ fusion(%y), kind=kOutput, calls=%part.2
  %zero = u32[]# constant(0)
  %carried = (u32[]#, bf16[8,128]@) tuple(%zero, %y)
  %loop = (u32[]#, bf16[8,128]@) while(%carried), condition=%inner_condition, body=%inner
  %y.1 = bf16[8,128]@ get-tuple-element(%loop), index=1
  ROOT %out.1 = (s32[]#, bf16[8,128]@) tuple(%k, %y.1)
}

%part.2 (p.1: bf16[8,128]) -> bf16[64,128] {
  %p.1 = bf16[8,128]@ parameter(0)
  ROOT %all-gather.2 = bf16[64,128]@ all-gather(%p.1), channel_id=7, GROUPS, dimensions={0}
}

%unknown (b.3: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %b.3 = (s32[]#, f32[1000]{0:T(1024)}) parameter(0)
  %z = f32[1000]{0:T(1024)} get-tuple-element(%b.3), index=1
  %sum.1 = f32[1000]{0:T(1024)} all-reduce(%z), channel_id=11, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out.2 = (s32[]#, f32[1000]{0:T(1024)}) tuple(%z, %sum.1)
}

ENTRY %main (w: bf16[8,128], v: f32[1000]) -> bf16[8,128] {
  %w = bf16[8,128]@ parameter(0), metadata={op_name="state.params[\\'head\\']"}
  %v = f32[1000]{0:T(1024)} parameter(1)
  %n = s32[]# constant(0)
  %large = f32[1024,1024]{1,0:T(8,128)} broadcast(%n), dimensions={}, metadata={op_name="jit(step)/while/body/large"}
  %fast = f32[1024,1024]{1,0:T(8,128)S(1)} copy(%large)
  %t = (s32[]#, bf16[8,128]@) tuple(%n, %w)
  %loop.1 = (s32[]#, bf16[8,128]@) while(%t), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %t.1 = (s32[]#, f32[1000]{0:T(1024)}) tuple(%n, %v)
  %loop.2 = (s32[]#, f32[1000]{0:T(1024)}) while(%t.1), condition=%outer_condition, body=%unknown
  %sums = f32[1000]{0:T(1024)} reduce-scatter(%v), channel_id=12, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %result = bf16[8,128]@ get-tuple-element(%loop.1), index=1
}
""".replace("@", "{1,0:T(8,128)(2,1)}")
    .replace("#", "{:T(128)}")
    .replace("GROUPS", "replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}")
)


def test_collectives_count_as_often_as_their_loops_run():
    found = {row.kind: row for row in collectives(TEXT, 8)}
    # In three rounds, its two parts have one channel; 7 of 8 parts of 64 x 128 values come from
    # others.
    assert (found["all-gather"].count, found["all-gather"].group, found["all-gather"].axes) == (
        3,
        8,
        ("fsdp",),
    )
    assert found["all-gather"].bytes == 3 * 64 * 128 * 2 * 7 // 8
    # The inner loop counts to 8 in steps of 2.
    assert (found["collective-permute"].count, found["collective-permute"].bytes) == (
        12,
        12 * 8 * 128 * 2,
    )
    assert (found["all-reduce"].count, found["all-reduce"].group, found["all-reduce"].unknown) == (
        1,
        4,
        True,
    )
    assert found["all-reduce"].bytes == 2 * 4000 * 3 // 4
    assert (found["reduce-scatter"].group, found["reduce-scatter"].bytes) == (4, 4000 * 3)
    assert not found["all-gather"].unknown and not found["collective-permute"].unknown


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing", 8)


def test_what_is_alive_at_the_peak():
    arrays = live_arrays.arrays_at_peak(TEXT)
    sizes = {array.source: array.bytes for array in arrays}
    # Alive until it is copied, as the arguments are all along; its copy is in another memory.
    assert sizes["while/body/large"] == 1024 * 1024 * 4
    assert sizes["state.params['head']"] == 8 * 128 * 2
    assert sum(sizes.values()) < 1024 * 1024 * 4 + 64 * 128 * 2 * 3


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(2.67G) exceeds available HBM (1000.00M). HLO module: jit_train_step.",
            (2.67 * GIB, 1000 * 2**20),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 2.73G of 2.70G hbm. Exceeded hbm capacity by 37.73M.\n\nTotal hbm usage >= 2.98G:\n    reserved        258.01M",
            (2.73 * GIB, 2.70 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INTERNAL: (2.67G) exceeds available HBM (1.00G)", None),
    ],
)
def test_a_refusal_names_two_sizes(message, sizes):
    assert parse_out_of_memory(message) == (None if sizes is None else tuple(map(round, sizes)))


def test_the_train_step_compiles_for_devices_that_are_not_used():
    """The way of the command, for eight CPU devices."""
    config, topology = tiny(), parse("cpu:8")
    built = compile_for(
        lower_train_step(config, make_mesh(config.mesh, topology.devices())), topology
    )
    memory = estimate(per_device(config, topology))
    assert built.fits and not built.out_of_memory
    assert 0 <= built.arguments - memory.arguments < 256
    kinds = {row.kind for row in built.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert any("collectives of one device" in line for line in report.collective_lines(built))


def test_a_step_of_mpo_takes_its_reference():
    flags = {"loss.kind": "mpo", "data.pairs": True, "data.pairs_per_row": 2}
    config, topology = tiny(**flags), parse("cpu:8")
    beforehand = tiny(**flags, **{"data.ref_logps_file": "beforehand.jsonl"})
    built = compile_for(
        lower_train_step(config, make_mesh(config.mesh, topology.devices())), topology
    )
    share = per_device(config, topology)
    assert (
        0 <= built.arguments - estimate(share).arguments - share.reference < 256
        and share.reference == share.params
    )
    assert per_device(beforehand, topology).reference == 0
    assert train_cost(share, estimate(share)).computed["reference"] > 0


def test_generation_compiles_for_devices_that_are_not_used():
    config, topology = tiny(**{"mesh.tensor": 2, "mesh.fsdp": 4}), parse("cpu:8")
    requests = Requests(rows=4, prompt=40, new=8, tiles=8)
    lowered = lower_generation(config, make_mesh(config.mesh, topology.devices()), requests)
    need = generation.needed(config, topology, requests)
    assert set(lowered) == set(generation.PROGRAMS)
    for program in generation.PROGRAMS:
        built = compile_for(lowered[program], topology)
        given = need.params + need.cache - need.beside[program]
        assert 0 <= built.arguments - given < 64 * 1024


def test_decoding_moves_no_matrix():
    """Split over fsdp, a matrix stays: gathered, all layers would be gathered before the loop over
    tokens and be there at once.
    """
    config, topology = tiny(**{"mesh.tensor": 2, "mesh.fsdp": 4}), parse("cpu:8")
    mesh = make_mesh(config.mesh, topology.devices())
    built = compile_for(
        lower_generation(config, mesh, Requests(rows=4, prompt=40, new=8, tiles=8))["decode"],
        topology,
    )
    layer = generation_params(config, mesh)["language"]["layer_0"]
    smallest = min(
        np.prod(layer[name]["kernel"].shape) * 4
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert built.collectives
    assert all(row.bytes < row.count * smallest / 4 for row in built.collectives)


# --- with the TPU's compiler ---------------------------------------------------------------------


@pytest.mark.tpu_compiler
def test_a_small_step_compiles_for_a_tpu_as_the_analysis_says():
    config, topology = tiny(compute_dtype="bfloat16", scan_unroll=1), parse("v5e:2x4")
    built = compile_for(
        lower_train_step(config, make_mesh(config.mesh, topology.devices())), topology
    )
    memory = estimate(per_device(config, topology))
    assert built.fits and built.collectives and not any(row.unknown for row in built.collectives)
    assert 0 <= built.arguments - memory.arguments < 1024**2
    alive = sum(array.bytes for array in live_arrays.arrays_at_peak(built.text))
    assert abs(alive + built.code - built.peak) < 0.5 * built.peak


@pytest.mark.tpu_compiler
def test_what_is_too_large_for_a_tpu_is_refused_with_its_sizes():
    config = advice.with_flags(sft("8b"), {"data.rows": 16})
    topology = parse("v5e:4x4")
    built = compile_for(
        lower_train_step(config, make_mesh(config.mesh, topology.devices())), topology
    )
    assert built.out_of_memory and not built.fits
    assert built.peak > built.available == pytest.approx(CHIPS["v5e"].usable, rel=1e-3)
