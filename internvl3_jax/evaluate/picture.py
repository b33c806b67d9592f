"""Draws a report as an image: ours against the card, by column and group."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internvl3_jax.evaluate import card

_OURS, _CARD = "#0072b2", "#b0b0b0"


def draw(report: Mapping) -> bytes | None:
    """Returns a PNG with one row for each column that has a score, and each Overall; None if there
    is none. Numbers are on a scale of 100 (`card.Group.scales`).
    """
    rows = _rows(report)
    if not rows:
        return None
    figure = Figure(figsize=(9.5, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (*_, ours, printed) in enumerate(rows):
        if printed is not None:
            axes.plot([printed, ours], [place, place], color=_CARD, linewidth=2, zorder=1)
            axes.plot(printed, place, "o", color=_CARD, markersize=7, zorder=2)
        axes.plot(ours, place, "o", color=_OURS, markersize=5, zorder=3)
    axes.plot([], [], "o", color=_OURS, label="ours")
    if any(printed is not None for *_, printed in rows):
        axes.plot([], [], "o", color=_CARD, label=f"model card, {report['card']}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    _name_groups(axes, [group for group, *_ in rows])
    axes.set_yticks(range(len(rows)), [name for _, name, *_ in rows])
    for label, (_, name, *_) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name.startswith("Overall") else "normal")
    axes.set(xlim=(0, 102), ylim=(len(rows) - 0.4, -0.6), xlabel="score, scaled to 100")
    axes.grid(axis="x", alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _name_groups(axes: Axes, groups: Sequence[str]) -> None:
    """Writes the name of each group beside its first row, and draws a line above it."""
    for place, name in enumerate(groups):
        if place == 0 or name != groups[place - 1]:
            axes.annotate(
                name, (1.01, place), xycoords=("axes fraction", "data"), va="center", color="0.4"
            )
            if place:
                axes.axhline(place - 0.5, color="0.8", linewidth=0.8, zorder=0)


def _rows(report: Mapping) -> list[tuple[str, str, float, float | None]]:
    """Returns (title of the group, name, ours, the card's or None) of each column, and of each
    Overall after them.
    """
    steps = {task["delta"] for task in report["tasks"]}
    rows, groups = [], dict.fromkeys(task["group"] for task in report["tasks"])
    for name in groups:
        scales = card.GROUPS[name].scales if name in card.GROUPS else {}
        group_title = card.GROUPS[name].title if name in card.GROUPS else ""
        for task in report["tasks"]:
            if task["group"] != name:
                continue
            more = [f"delta {task['delta']}"] if len(steps) > 1 else []
            more += [f"{task['frames']} frames"] if task["frames"] else []
            for column in task["scores"] if name not in card.GROUPS else task["card"]:
                if task["scores"].get(column) is not None:
                    scale, printed = scales.get(column, 1.0), task["card"].get(column)
                    label = f"{column} ({', '.join(more)})" if more else column
                    ours = task["scores"][column] / scale
                    other = None if printed is None else printed / scale
                    rows.append((group_title, label, ours, other))
        for group in report["groups"]:
            if group["group"] == name:
                more = f" (delta {group['delta']})" if len(steps) > 1 else ""
                rows.append((group_title, f"Overall{more}", group["overall"], group["card"]))
    return rows
