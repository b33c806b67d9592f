"""Writes summary.md: ours against PyTorch and against the card's measured ceilings."""

import pathlib

from benchmarks.gpu_parts.part import latest, read

# Case of both sides -> the value that is compared; less is better.


def write(output: pathlib.Path) -> str:
    """Writes OUTPUT/summary.md and returns it."""
    rows = read(output)
    values = latest(rows)
    good = {key: row for key, row in values.items() if "error" not in row}
    runs = [row["run"] for row in rows if "run" in row]
    lines = ["# GPU benchmark", ""]
    if any(run["smoke"] for run in runs):
        lines += ["**Smoke run: tiny shapes on a CPU. No number here is a measurement.**", ""]
    lines += _runs(runs)
    lines += _ceilings(good)
    lines += _ratios(good)
    lines += _correctness(values)
    lines += _training(good)
    lines += _kernels(good)
    lines += _compilation(good)
    lines += _errors(rows, values)
    text = "\n".join(lines).rstrip() + "\n"
    (output / "summary.md").write_text(text, encoding="utf-8")
    return text


def _runs(runs: list[dict]) -> list[str]:
    lines = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        card = run["card"] or "no NVIDIA GPU"
        lines.append(f"- {run['date']}: `{run['command']}` on {card}; {versions}")
    return [*lines, ""]


def _ceilings(good: dict) -> list[str]:
    rows = [
        (case, f"{row['tb_s']:.2f} TB/s" if "tb_s" in row else f"{row['tflop_s']:.0f} TFLOP/s")
        for (part, case), row in good.items()
        if part == "ceilings"
    ]
    return _table("Ceilings", ("what", "measured"), rows)


def _ceiling(good: dict, case: str, name: str) -> float | None:
    found = [
        row[name] for (part, known), row in good.items() if part == "ceilings" and case == known
    ]
    return found[0] if found else None


def _ratios(good: dict) -> list[str]:
    """Returns ours, PyTorch's best, their ratio, and the share of the ceiling that ours reaches."""
    matmul = _ceiling(good, "matmul 8192", "tflop_s") or _ceiling(good, "matmul 256", "tflop_s")
    read_speed = _ceiling(good, "read", "tb_s")
    rows = []
    for (part, case), row in good.items():
        kind, _, size = part.partition(" ")
        if kind not in ("inference", "train") or case.startswith("kernels"):
            continue
        name = next(
            name for name in ("ms_per_tile", "ms_per_token", "ms_per_run", "ms") if name in row
        )
        peer_part = "torch train" if kind == "train" else "torch"
        size = size.split()[0]
        eager = good.get((f"{peer_part} {size}", case), {}).get(name)
        compiled = good.get((f"{peer_part} compiled {size}", case), {}).get(name)
        best = min(value for value in (eager, compiled, float("inf")) if value is not None)
        decodes = case.startswith("decode")
        speed, limit = (row["tb_s"], read_speed) if decodes else (row.get("tflop_s"), matmul)
        rows.append(
            (
                part,
                case,
                f"{row[name]:.3f}",
                f"{eager:.3f}" if eager else "-",
                f"{compiled:.3f}" if compiled else "-",
                f"{best / row[name]:.2f}" if best < float("inf") else "-",
                f"{100 * speed / limit:.1f} %" if speed and limit else "-",
                _gib(row),
                _gib(good.get((f"{peer_part} {size}", case), {})),
            )
        )
    heading = ("part", "case", "ours, ms", "torch eager", "torch compiled", "torch / ours")
    heading += ("of the ceiling", "peak GiB", "torch's")
    note = [
        "Milliseconds per tile (vision tower), per token (decode), per run of 8 tokens (prompt lookup), per call or step (the rest). "
        "The ceiling is the read bandwidth for decode and the largest product for the rest. Our "
        "peak is that of the process up to the case.",
        "",
    ]
    return _table("Ours and PyTorch", heading, rows, note)


def _gib(row: dict) -> str:
    value = row.get("peak_gib", row.get("peak_gib_so_far"))
    return f"{value:.1f}" if value else "-"


def _correctness(values: dict) -> list[str]:
    rows = []
    for (part, case), row in values.items():
        if part != "correctness" or "error" in row:
            continue
        error = row.get("forward_error", row.get("max_error"))
        shown = f"{error:.2e}" if error is not None else f"{row['equal']} of {row['of']} equal"
        gradient = f"{row['gradient_error']:.2e}" if "gradient_error" in row else "-"
        rows.append((case, shown, gradient, "yes" if row["ok"] else "**NO**"))
    return _table("Correctness", ("case", "error", "gradients", "within tolerance"), rows)


def _training(good: dict) -> list[str]:
    rows = [
        (
            part,
            case,
            f"{row['tokens_s']:.0f}",
            f"{100 * row['mfu_of_datasheet']:.1f} %",
            f"{row['compiler_peak_gib']:.1f}",
            "yes" if row["finite"] else "**NO**",
        )
        for (part, case), row in good.items()
        if "mfu_of_datasheet" in row
    ]
    heading = ("part", "case", "tokens/s", "of 989 TFLOP/s", "compiler's peak GiB", "finite")
    return _table("Train step", heading, rows)


def _kernels(good: dict) -> list[str]:
    lines = []
    for (part, case), row in good.items():
        if "top" in row:
            rows = [(f"`{name}`", f"{ms:.3f}", number) for name, ms, number in row["top"]]
            title = f"{part}, {case}: {row['kernels']} in {row['busy_ms']:.2f} ms"
            lines += _table(title, ("kernel", "ms", "calls"), rows, level=3)
    return ["## Kernels", "", *lines] if lines else []


def _compilation(good: dict) -> list[str]:
    rows = [
        (
            part,
            case,
            f"{row['compile_s']:.1f}",
            row.get("autotune_entries_before", "-"),
            row.get("autotune_entries_after", "-"),
        )
        for (part, case), row in good.items()
        if "compile_s" in row
    ]
    heading = ("part", "case", "seconds", "autotuning results before", "after")
    return _table("Compilation", heading, rows)


def _errors(rows: list[dict], values: dict) -> list[str]:
    errors = [
        (part, case, str(row["error"]).replace("|", "/").replace("\n", " ")[:200])
        for (part, case), row in values.items()
        if "error" in row
    ]
    status = {row["part"]: row for row in rows if "status" in row}
    parts = [(name, row["status"], f"{row['seconds']:.0f}") for name, row in status.items()]
    return _table("Errors", ("part", "case", "error"), errors) + _table(
        "Parts", ("part", "status of the last call", "seconds"), parts
    )


def _table(title: str, heading, rows, note=(), level: int = 2) -> list[str]:
    if not rows:
        return []
    lines = [f"{'#' * level} {title}", "", *note, _line(heading), _line(["---"] * len(heading))]
    return [*lines, *(_line(row) for row in rows), ""]


def _line(cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
