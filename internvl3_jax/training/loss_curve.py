"""Draws the losses of a run's log as an image."""

import io


def draw_losses(rows: list[dict]) -> bytes:
    """Returns a PNG with the training loss and, if there is one, the eval loss by step.

    Args:
      rows: Rows of log.jsonl.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "eval", ".-")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, linewidth=1, label=label)
    if len(axes.lines) > 1:
        axes.legend()
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
