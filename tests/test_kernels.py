"""Kernels of a compiled GPU program, read from its text; written by hand, so that every count is
known.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_programs
from internvl3_jax.fit import kernels
from internvl3_jax.parallel import compiler_options

TEXT = """HloModule jit_step, entry_computation_layout={()->f32[]}

%scaled (p0: f32[8,4], p1: f32[4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %b = f32[8,4]{1,0} broadcast(%p1), dimensions={1}
  ROOT %m = f32[8,4]{1,0} multiply(%p0, %b)
}

%one_row (stack: f32[100,8,4], index: s32[]) -> f32[1,8,4] {
  %stack = f32[100,8,4]{2,1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8,4]{2,1,0} dynamic-slice(%stack, %index, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%write_row (stack: f32[100,8,4], new: f32[1,8,4], index: s32[]) -> f32[100,8,4] {
  %stack = f32[100,8,4]{2,1,0} parameter(0)
  %new = f32[1,8,4]{2,1,0} parameter(1)
  %index = s32[] parameter(2)
  %zero = s32[] constant(0)
  %negative = f32[1,8,4]{2,1,0} negate(%new)
  ROOT %updated = f32[100,8,4]{2,1,0} dynamic-update-slice(%stack, %negative, %index, %zero, %zero)
}

%body (carried: (s32[], f32[100,8,4])) -> (s32[], f32[100,8,4]) {
  %carried = (s32[], f32[100,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %stack = f32[100,8,4]{2,1,0} get-tuple-element(%carried), index=1
  %row = f32[1,8,4]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%one_row, metadata={op_name="step/layers/slice"}
  %new = f32[100,8,4]{2,1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%write_row
  ROOT %next = (s32[], f32[100,8,4]{2,1,0}) tuple(%i, %new)
}

%condition (carried: (s32[], f32[100,8,4])) -> pred[] {
  %carried = (s32[], f32[100,8,4]{2,1,0}) parameter(0)
  ROOT %more = pred[] custom-call(%carried), custom_call_target="unknown"
}

ENTRY %main (x: f32[8,4], w: f32[4], stack: f32[100,8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4]{0} parameter(1)
  %stack = f32[100,8,4]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[100,8,4]{2,1,0}) tuple(%zero, %stack)
  %known = (s32[], f32[100,8,4]{2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %open = (s32[], f32[100,8,4]{2,1,0}) while(%known), condition=%condition, body=%body
  %unfilled = f32[100,8,4]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %product = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"
  %y = f32[8,4]{1,0} get-tuple-element(%product), index=0
  %fused = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%y, %y, %y), custom_call_target="__cudnn$fmhaSoftmax"
  %z = f32[8,4]{1,0} get-tuple-element(%fused), index=0
  %copied = f32[8,4]{1,0} copy(%z)
  ROOT %scaled.1 = f32[8,4]{1,0} fusion(%copied, %w), kind=kLoop, calls=%scaled
}
"""


def test_launches_and_bytes():
    program = kernels.read(TEXT)
    found = {(k.name, k.kind, k.launches, k.bytes) for k in program.kernels}
    row, whole = 4 * 8 * 4, 4 * 8 * 4
    # Of the stack one row is read and written, whatever its size.
    assert {k for k in found if k[0] in ("row", "new")} == {
        ("row", "copy", 24, 2 * row + 4),
        ("new", "elementwise", 24, 2 * row + 4),
        ("row", "copy", 1, 2 * row + 4),
        ("new", "elementwise", 1, 2 * row + 4),
    }
    assert {k for k in found if k[0] not in ("row", "new")} == {
        ("product", "product", 1, 3 * whole),
        ("fused", "attention", 1, 4 * whole),
        ("copied", "copy", 1, 2 * whole),
        ("scaled.1", "elementwise", 1, 2 * whole + 16),
    }
    assert program.launches == 2 * 25 + 4 and program.unknown_loops == ("open",)
    assert program.select("copy", "layers/").launches == 25
    assert program.bytes == 25 * 2 * (2 * row + 4) + 11 * whole + 16


def test_the_kernels_of_decoding():
    text = """HloModule decode

ENTRY %main (x: f32[8], cache: f32[64]) -> (f32[8], f32[64]) {
  %x = f32[8]{0} parameter(0)
  %cache = f32[64]{0} parameter(1)
  %p = f32[8]{0} custom-call(%x), TARGET, metadata={op_name="jit(norm_product)/k"}
  ROOT %a = (f32[8]{0}, f32[64]{0}) custom-call(%p, %cache), TARGET, ALIAS, metadata={op_name="jit(attend)/k"}
}
"""
    alias = "output_to_operand_aliasing={{1}: (1, {})}"
    text = text.replace("TARGET", 'custom_call_target="mosaic_gpu_v2"').replace("ALIAS", alias)
    program = kernels.read(text)
    # The cache is read, and not all of it written.
    found = [(k.name, k.kind, k.bytes) for k in program.kernels]
    assert found == [("p", "product", 64), ("a", "attention", 32 + 256)]


def test_a_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        kernels.read("HloModule empty")


def test_the_program_replaces_only_its_own_results(tmp_path, capsys):
    path = tmp_path / "notes.json"
    for content in ('{"scores": [1, 2]}', "[]", "3", "not JSON"):
        path.write_text(content)
        with pytest.raises(SystemExit):
            gpu_programs.main(["--output", str(path)])
        assert path.read_text() == content
        assert "notes.json exists and is not of this program" in capsys.readouterr().err
    gpu_programs.save(path, {})
    assert gpu_programs.is_own(path) and gpu_programs.is_own(tmp_path / "new.json")


# --- options -------------------------------------------------------------------------------------


def test_the_options_of_gpu_programs_are_known(monkeypatch, capsys):
    """To this version of jax; those of other devices have none."""
    assert compiler_options.options("train") is None
    monkeypatch.setattr(compiler_options, "platform", lambda: "gpu")
    for program, wanted in compiler_options._GPU.items():
        assert compiler_options.options(program) == wanted
    assert capsys.readouterr().err == ""


def test_an_unknown_option_is_left_out_with_one_note(monkeypatch, capsys):
    monkeypatch.setattr(compiler_options, "platform", lambda: "gpu")
    known = {"xla_gpu_dot_merger_threshold_mb": 0}
    monkeypatch.setitem(compiler_options._GPU, "encode", {"xla_gpu_of_tomorrow": True} | known)
    assert compiler_options.options("encode") == compiler_options.options("encode") == known
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: XLA option xla_gpu_of_tomorrow is left out, since jax ")


def test_a_program_is_compiled_once_for_each_kind_of_device(monkeypatch):
    compiler_options.is_known.cache_clear()
    asked = []
    monkeypatch.setattr(compiler_options, "options", lambda name: asked.append(name))
    double = compiler_options.Program(lambda x: 2 * x, "encode")
    assert [float(double(jnp.asarray(x))) for x in (1.0, 2.0)] == [2.0, 4.0]
    assert double._cache_size() == 1 and asked == ["encode"]
    assert "stablehlo" in double.lower(jax.ShapeDtypeStruct((), jnp.float32)).as_text()
