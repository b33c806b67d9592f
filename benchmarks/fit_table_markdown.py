"""Formats the rows of results/fit_table.json as the tables of docs/fit.md."""

from internvl3_jax.fit.topology import parse
from internvl3_jax.inference.programs import TOKENS_PER_CALL

# Columns that describe a training setting.
SETTING = ("stage", "size", "devices", "mesh", "remat (vision, language)", "micro-batches")
GIB = 2**30


def is_analytic(row: dict) -> bool:
    return row["command"].endswith(" --analytic")


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error'].strip().splitlines()[-1:]}"
    if is_analytic(row):
        return f"{row['name']}: by the analysis {row['analysis']['peak'] / GIB:.2f} GiB; {row['command']}"
    if "peak" not in row["compiler"]:
        peaks = ", ".join(
            f"{program} {found['peak'] / GIB:.2f}" for program, found in row["compiler"].items()
        )
        return f"{row['name']}: {peaks} GiB; {row['seconds']:.0f} s"
    peak, analysis = row["compiler"]["peak"], row["analysis"]["peak"]
    verdict = "fits" if row["compiler"]["fits"] else "refused"
    return f"{row['name']}: {verdict}, {peak / GIB:.2f} GiB (analysis {analysis / peak - 1:+.1%}); {row['seconds']:.0f} s; {row['command']}"


def markdown(rows: list[dict]) -> str:
    return "\n\n".join(
        [training(rows), generation(rows), "Not compiled; by the analysis alone:", analyzed(rows)]
    )


def generation(rows: list[dict]) -> str:
    """Returns the table of generation. Peaks count everything on a device, also parameters that a
    program does not use. Lower bounds of the time leave out the network.
    """
    programs = ("encode", "prefill", "decode")
    columns = [
        "size",
        "devices",
        "mesh",
        *(f"{name}, GiB" for name in programs),
        "available",
        "prefill s, floor",
        "decode ms a token, floor",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "compiler" not in row or "decode" not in row["compiler"]:
            continue
        _, size, topology = row["name"].split(":", 2)
        cells = []
        for name in programs:
            found = row["compiler"][name]
            peak = found["peak"] + row["analysis"]["beside"][name]
            refused = "" if found["fits"] else " **refused**"
            cells.append(f"{peak / GIB:.1f} ({row['analysis'][name] / peak - 1:+.0%}){refused}")
        available = row["compiler"]["decode"]["available"]
        floors = row["floor_seconds"]
        lines.append(
            f"| {size} | {topology} | {mesh_text(row)} | {' | '.join(cells)} | {available / GIB:.1f} | {floors['prefill']:.2f} "
            f"| {floors['decode'] / TOKENS_PER_CALL * 1e3:.1f} |"
        )
    return "\n".join(lines)


def mesh_text(row: dict) -> str:
    return ", ".join(f"{axis} {count}" for axis, count in row["mesh"].items() if count > 1)


def training(rows: list[dict]) -> str:
    columns = [*SETTING, "peak / available GiB", "analysis", "s/step, floor", "MFU at most"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "compiler" not in row or "peak" not in row["compiler"]:
            continue
        found, analysis = row["compiler"], row["analysis"]["peak"]
        refused = "" if found["fits"] else " **refused**"
        lines.append(
            f"| {setting_text(row)} | {found['peak'] / GIB:.1f} / {found['available'] / GIB:.1f}{refused} "
            f"| {analysis / found['peak'] - 1:+.0%} | {max(row['floor_seconds'].values()):.2f} | {row['mfu_at_most']:.0%} |"
        )
    return "\n".join(lines)


def analyzed(rows: list[dict]) -> str:
    """Returns the rows that no compiler was asked about, with the analysis' network bounds."""
    columns = [*SETTING, "peak / available GiB", "s/step, floor", "MFU at most"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" not in row and is_analytic(row):
            available = parse(row["topology"]).chip.usable / GIB
            too_much = "" if row["status"] == 0 else " **too much**"
            lines.append(
                f"| {setting_text(row)} | {row['analysis']['peak'] / GIB:.1f} / {available:.1f}{too_much} "
                f"| {max(row['floor_seconds'].values()):.2f} | {row['mfu_at_most']:.0%} |"
            )
    return "\n".join(lines)


def setting_text(row: dict) -> str:
    """Returns the first cells of a row."""
    stage, size, topology = row["name"].split(":", 2)
    flags = dict(
        part.removeprefix("--config.").split("=") for part in row["command"].split() if "=" in part
    )
    remat = f"{flags.get('remat_vision', 'as it is')}, {flags['remat_language']}"
    return " | ".join([stage, size, topology, mesh_text(row), remat, flags["micro_batches"]])
