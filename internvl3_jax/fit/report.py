"""The answer in words, and as a row for a table."""

from internvl3_jax.config import TrainConfig
from internvl3_jax.fit.advice import Change
from internvl3_jax.fit.build import Built
from internvl3_jax.fit.live import alive_at_peak, grouped
from internvl3_jax.fit.memory import Memory
from internvl3_jax.fit.search import Setting
from internvl3_jax.fit.share import PerDevice
from internvl3_jax.fit.topology import Topology
from internvl3_jax.fit.work import StepCost, Times

GIB = 2**30


def heading(config: TrainConfig, topology: Topology, mesh: dict[str, int], what: str) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{what} on {topology.name}: {topology.count} devices, mesh {axes}"


def settings(config: TrainConfig) -> str:
    data, optimizer = config.data, config.optimizer
    frozen = f", frozen {', '.join(optimizer.freeze)}" if optimizer.freeze else ""
    if adapters := config.lora.rank:
        few = "" if config.lora.quantize == "none" else f" beside {config.lora.quantize}"
        frozen = f", adapters of rank {adapters}{few}"
    return (
        f"  {data.rows} rows of {data.tokens_per_row:,} tokens and {data.tiles_per_row} tiles in {config.micro_batches} micro-batches; "
        f"remat {config.remat_vision} (vision), {config.remat_language} (language); "
        f"{optimizer.name}, first moment {optimizer.moment_dtype}; {config.compute_dtype} on {config.param_dtype}{frozen}"
    )


def memory_lines(memory: Memory, available: float | None, built: Built | None) -> list[str]:
    """The analysis' parts and, where it was compiled, the compiler's peak beside its own."""
    saved = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.saved.items() if size)
    work = memory.work[memory.phase]
    rows = [
        ("parameters", memory.params),
        ("optimizer state", memory.opt_state),
        ("batch", memory.batch),
    ]
    rows += [(name, size) for name, size in memory.held.items() if size]
    lines = ["", "memory of one device, GiB"]
    lines += [f"  {name:<34}{size / GIB:9.2f}" for name, size in rows]
    lines.append(
        f"  {'activations and temporaries':<34}{work / GIB:9.2f}   at the peak, in the phase: {memory.phase}; kept: {saved or 'nothing'}"
    )
    lines.append(f"  {'peak by the analysis':<34}{memory.peak / GIB:9.2f}")
    if built is not None:
        name = "needed, as the compiler refuses it" if built.refused else "peak by the compiler"
        lines.append(
            f"  {name:<34}{built.peak / GIB:9.2f}   {memory.peak / built.peak - 1:+.1%} in the analysis"
        )
    if host := built.host if built is not None and not built.refused else memory.host:
        lines.append(
            f"  {'beside it in the memory of the host':<34}{host / GIB:9.2f}   and on the way between them: not in the floors"
        )
    if available is not None:
        peak = memory.peak if built is None else built.peak
        verdict = "fits" if (peak <= available if built is None else built.fits) else "DOES NOT FIT"
        lines.append(f"  {'available':<34}{available / GIB:9.2f}   {verdict}")
    return lines


def time_lines(work: StepCost, times: Times, built: Built | None) -> list[str]:
    computed = sum(work.computed.values())
    again = sum(size for name, size in work.computed.items() if "recomputed" in name)
    source = (
        "of the compiled program" if built is not None and not built.refused else "by the analysis"
    )
    used = f"{again / computed:.0%} of them recomputed; the model needs {work.needed:.3g}"
    return [
        "",
        "one step of one device, floors at the data sheet's rates",
        f"  compute   {times.compute:10.3f} s   {computed:.3g} FLOPs, {used}",
        f"  memory    {times.memory:10.3f} s   {sum(work.memory_bytes.values()) / 1e9:,.1f} GB",
        f"  network   {times.network:10.3f} s   collectives {source}",
        f"  prediction: at least {times.floor:.3f} s a step ({times.limit}), {times.one_after_the_other:.3f} s if nothing overlaps; "
        f"MFU at most {times.mfu:.0%}",
    ]


def collective_lines(built: Built) -> list[str]:
    lines = ["", "collectives of one device in one step, by the compiled text"]
    for row in built.collectives:
        where = (
            " x ".join(row.axes) if row.axes and not row.axes[0].startswith("axis_") else "a group"
        )
        note = (
            "   in a loop whose rounds the text does not tell: one counted" if row.unknown else ""
        )
        lines.append(
            f"  {row.kind:<19}{row.count:7,} times{row.bytes / 1e9:12.3f} GB received   {where} of {row.group}{note}"
        )
    return lines if built.collectives else [*lines, "  none"]


def alive_lines(built: Built, shown: int = 12) -> list[str]:
    """The largest arrays at the peak of a TPU's program."""
    lines = ["", "largest arrays alive at the peak, GiB"]
    for count, array in grouped(alive_at_peak(built.text))[:shown]:
        times = f"{count} x " if count > 1 else ""
        lines.append(
            f"  {count * array.bytes / GIB:8.2f}   {times}{array.shape}   {array.source[-80:]}"
        )
    return lines


def advice_lines(found: list[Change], before: int, available: float) -> list[str]:
    lines = [
        "",
        f"what would make it smaller than {before / GIB:.2f} GiB, each by itself, by the analysis",
    ]
    for change in found:
        fits = "fits" if change.peak <= available else ""
        lines.append(
            f"  {(change.peak - before) / GIB:+8.2f} GiB to {change.peak / GIB:7.2f}   {fits:<5}{change.text}"
        )
    return lines if found else [*lines, "  nothing: take more devices, or a larger kind"]


def search_lines(
    found: list[Setting], tried: int, smallest: Setting | None, shown: int
) -> list[str]:
    lines = ["", f"{len(found)} of {tried} settings fit by the analysis; the fastest:"]
    for setting in found[:shown]:
        times = setting.times
        lines.append(
            f"  {times.floor:8.3f} s floor, MFU at most {times.mfu:4.0%}, {setting.memory.peak / GIB:6.2f} GiB   {setting.text}"
        )
    if not found and smallest is not None:
        lines.append(
            f"  none; the smallest needs {smallest.memory.peak / GIB:.2f} GiB   {smallest.text}"
        )
    return lines


def row(
    share: PerDevice, memory: Memory, work: StepCost, times: Times, built: Built | None
) -> dict:
    """One row of a table: bytes, seconds and FLOPs of one device."""
    found = {
        "topology": share.topology.name,
        "devices": share.topology.count,
        "mesh": share.mesh,
        "analysis": {
            "peak": memory.peak,
            "phase": memory.phase,
            "parameters": memory.params,
            "optimizer": memory.opt_state,
            "batch": memory.batch,
            "held": memory.held,
            "saved": memory.saved,
        },
        "needed_flops": work.needed,
        "computed_flops": sum(work.computed.values()),
        "floor_seconds": {name: getattr(times, name) for name in ("compute", "memory", "network")},
        "mfu_at_most": times.mfu,
    }
    return found | ({} if built is None else {"compiler": compiler_row(built)})


def compiler_row(built: Built) -> dict:
    return {
        "peak": built.peak,
        "available": built.available,
        "fits": built.fits,
        "refused": built.refused,
        "arguments": built.arguments,
        "seconds": built.seconds,
        "collectives": [
            {
                "kind": row.kind,
                "axes": row.axes,
                "group": row.group,
                "count": row.count,
                "bytes": row.bytes,
                "unknown": row.unknown,
            }
            for row in built.collectives
        ],
    }
