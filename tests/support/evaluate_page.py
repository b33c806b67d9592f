"""The table of tasks of docs/evaluation.md, made from the tasks."""

from internvl3_jax.evaluate.card import GROUPS
from internvl3_jax.evaluate.task_table import TASKS

NEEDS = {"vcr": "spaCy", "mantis": "pyarrow"}


def task_table() -> str:
    lines = ["| task | columns | files | program | tiles or frames | exact |"]
    lines.append("|---|---|---|---|---|---|")
    for task in TASKS.values():
        if task.group not in GROUPS:
            continue
        first, *others = (f"`{name}`" for name in task.files)
        files = (
            f"{first} and {len(others)} more" if len(others) > 2 else ", ".join([first, *others])
        )
        size = f"{task.max_tiles} tiles"
        if task.frames:
            size = f"{', '.join(map(str, task.frames))} frames"
        needs = f", {NEEDS[task.name]}" if task.name in NEEDS else ""
        columns = ", ".join(task.columns)
        cells = [f"`{task.name}`", columns, files + needs, task.program, size, task.exact]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
