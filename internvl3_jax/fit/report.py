"""Formats the prediction as text, and as a row of a table."""

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.advice import Change
from internvl3_jax.fit.compilation import Compiled
from internvl3_jax.fit.gpu_time import GpuTime
from internvl3_jax.fit.kernels import Program
from internvl3_jax.fit.live_arrays import arrays_at_peak, count_equal
from internvl3_jax.fit.memory import Memory
from internvl3_jax.fit.per_device import PerDevice
from internvl3_jax.fit.search import Setting
from internvl3_jax.fit.step_cost import StepCost, Times
from internvl3_jax.fit.topology import Topology

GIB = 2**30


def heading(config: TrainConfig, topology: Topology, mesh: dict[str, int], program: str) -> str:
    """Returns the first line: the program, the devices and the mesh."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{program} on {topology.name}: {topology.count} devices, mesh {axes}"


def settings(config: TrainConfig) -> str:
    """Returns the line with the settings that determine memory and time."""
    data, optimizer = config.data, config.optimizer
    frozen = f", frozen {', '.join(optimizer.freeze)}" if optimizer.freeze else ""
    if adapters := config.lora.rank:
        base = "" if config.lora.quantize == "none" else f" on a base in {config.lora.quantize}"
        frozen = f", adapters of rank {adapters}{base}"
    return (
        f"  {data.rows} rows of {data.tokens_per_row:,} tokens and {data.tiles_per_row} tiles in "
        f"{config.micro_batches} micro-batches; "
        f"remat {config.remat_vision} (vision), {config.remat_language} (language); "
        f"{optimizer.name}, first moment {optimizer.moment_dtype}; "
        f"{config.compute_dtype} on {config.param_dtype}{frozen}"
    )


def memory_lines(memory: Memory, available: float | None, compiled: Compiled | None) -> list[str]:
    """Returns the parts of the predicted peak and, if compiled, the compiler's peak.

    Args:
      available: Bytes that a program may use; None on a CPU.
    """
    saved = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.saved.items() if size)
    work = memory.work[memory.phase]
    rows = [
        ("parameters", memory.params),
        ("optimizer state", memory.opt_state),
        ("batch", memory.batch),
    ]
    rows += [(name, size) for name, size in memory.held.items() if size]

    # The parts of the analysis and their sum.
    lines = ["", "memory of one device, GiB"]
    lines += [f"  {name:<34}{size / GIB:9.2f}" for name, size in rows]
    lines.append(
        f"  {'activations and temporaries':<34}{work / GIB:9.2f}   "
        f"at the peak, in the phase: {memory.phase}; kept: {saved or 'nothing'}"
    )
    lines.append(f"  {'peak by the analysis':<34}{memory.peak / GIB:9.2f}")

    # The compiler's peak, the host's memory, and the verdict.
    if compiled is not None:
        failed = compiled.out_of_memory
        name = "needed by the compiler, which failed" if failed else "peak by the compiler"
        lines.append(
            f"  {name:<34}{compiled.peak / GIB:9.2f}   "
            f"{memory.peak / compiled.peak - 1:+.1%} in the analysis"
        )
    was_compiled = compiled is not None and not compiled.out_of_memory
    if host := compiled.host if was_compiled else memory.host:
        lines.append(
            f"  {'in the memory of the host':<34}{host / GIB:9.2f}   "
            "the transfers are not in the lower bounds"
        )
    if available is not None:
        peak = memory.peak if compiled is None else compiled.peak
        verdict = (
            "fits" if (peak <= available if compiled is None else compiled.fits) else "DOES NOT FIT"
        )
        lines.append(f"  {'available':<34}{available / GIB:9.2f}   {verdict}")
    return lines


def time_lines(cost: StepCost, times: Times, compiled: Compiled | None) -> list[str]:
    """Returns the lower bounds of the step time."""
    computed = sum(cost.computed.values())
    recomputed = sum(size for name, size in cost.computed.items() if "recomputed" in name)
    source = (
        "of the compiled program"
        if compiled is not None and not compiled.out_of_memory
        else "by the analysis"
    )
    used = f"{recomputed / computed:.0%} of them recomputed; the model needs {cost.needed:.3g}"
    return [
        "",
        "one step of one device, lower bounds at the data sheet's rates",
        f"  compute   {times.compute:10.3f} s   {computed:.3g} FLOPs, {used}",
        f"  memory    {times.memory:10.3f} s   {sum(cost.memory_bytes.values()) / 1e9:,.1f} GB",
        f"  network   {times.network:10.3f} s   collectives {source}",
        f"  prediction: at least {times.lower_bound:.3f} s a step ({times.limit}), "
        f"{times.serial:.3f} s if nothing overlaps; "
        f"MFU at most {times.mfu:.0%}",
    ]


def gpu_lines(program: Program, predicted: GpuTime) -> list[str]:
    """Returns the kernels of a program for one GPU, and the time that they predict."""
    loops = len(program.unknown_loops)
    return [
        "",
        "kernels of the compiled program (fit/gpu_time.py; rates published, not measured here)",
        f"  products  {predicted.products:10.3f} s",
        f"  attention {predicted.attention:10.3f} s",
        f"  the rest  {predicted.memory:10.3f} s",
        f"  launches  {predicted.launches:10.3f} s   {program.launches:,}"
        + (f"; {loops} loops of unknown length, counted once" if loops else ""),
        f"  prediction: {predicted.total:.3f} s a step, MFU {predicted.mfu:.0%}",
    ]


def collective_lines(compiled: Compiled) -> list[str]:
    """Returns the collectives of the compiled program."""
    lines = ["", "collectives of one device in one step, by the compiled text"]
    for row in compiled.collectives:
        named = row.axes and not row.axes[0].startswith("axis_")
        axes = " x ".join(row.axes) if named else "a group"
        note = "   in a loop of unknown length, counted once" if row.unknown else ""
        lines.append(
            f"  {row.kind:<19}{row.count:7,} times{row.bytes / 1e9:12.3f} GB received   "
            f"{axes} of {row.group}{note}"
        )
    return lines if compiled.collectives else [*lines, "  none"]


def alive_lines(compiled: Compiled, shown: int = 12) -> list[str]:
    """Returns the largest arrays at the peak of a TPU program."""
    lines = ["", "largest arrays alive at the peak, GiB"]
    for count, array in count_equal(arrays_at_peak(compiled.text))[:shown]:
        times = f"{count} x " if count > 1 else ""
        lines.append(
            f"  {count * array.bytes / GIB:8.2f}   {times}{array.shape}   {array.source[-80:]}"
        )
    return lines


def advice_lines(changes: list[Change], before: int, available: float) -> list[str]:
    """Returns what would reduce a peak of `before` bytes."""
    lines = [
        "",
        f"changes that reduce the peak of {before / GIB:.2f} GiB, each by itself, by the analysis",
    ]
    for change in changes:
        fits = "fits" if change.peak <= available else ""
        lines.append(
            f"  {(change.peak - before) / GIB:+8.2f} GiB to {change.peak / GIB:7.2f}   "
            f"{fits:<5}{change.text}"
        )
    return lines if changes else [*lines, "  none: take more devices, or larger ones"]


def search_lines(
    fitting: list[Setting], tried: int, smallest: Setting | None, shown: int
) -> list[str]:
    """Returns the fastest settings of a search."""
    lines = ["", f"{len(fitting)} of {tried} settings fit by the analysis; the fastest:"]
    for setting in fitting[:shown]:
        times = setting.times
        lines.append(
            f"  at least {times.lower_bound:8.3f} s, MFU at most {times.mfu:4.0%}, "
            f"{setting.memory.peak / GIB:6.2f} GiB   {setting.text}"
        )
    if not fitting and smallest is not None:
        lines.append(
            f"  none; the smallest needs {smallest.memory.peak / GIB:.2f} GiB   {smallest.text}"
        )
    return lines


def row(
    device: PerDevice, memory: Memory, cost: StepCost, times: Times, compiled: Compiled | None
) -> dict:
    """Returns the prediction as a dict for JSON: bytes, seconds and FLOPs of one device."""
    result = {
        "topology": device.topology.name,
        "devices": device.topology.count,
        "mesh": device.mesh,
        "analysis": {
            "peak": memory.peak,
            "phase": memory.phase,
            "parameters": memory.params,
            "optimizer": memory.opt_state,
            "batch": memory.batch,
            "held": memory.held,
            "saved": memory.saved,
        },
        "needed_flops": cost.needed,
        "computed_flops": sum(cost.computed.values()),
        "floor_seconds": {name: getattr(times, name) for name in ("compute", "memory", "network")},
        "mfu_at_most": times.mfu,
    }
    return result | ({} if compiled is None else {"compiler": compiler_row(compiled)})


def compiler_row(compiled: Compiled) -> dict:
    """Returns what the compiler says as a dict for JSON."""
    return {
        "peak": compiled.peak,
        "available": compiled.available,
        "fits": compiled.fits,
        "refused": compiled.out_of_memory,
        "arguments": compiled.arguments,
        "seconds": compiled.seconds,
        "collectives": [
            {
                "kind": row.kind,
                "axes": row.axes,
                "group": row.group,
                "count": row.count,
                "bytes": row.bytes,
                "unknown": row.unknown,
            }
            for row in compiled.collectives
        ],
    }
