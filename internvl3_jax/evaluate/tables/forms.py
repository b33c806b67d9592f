"""Rows that many tasks have in common."""

from internvl3_jax.evaluate.task import Task


def options(name: str, column: str, group: str, file: str, **changes) -> Task:
    """Returns a multiple-choice task of VLMEvalKit."""
    return Task(
        name,
        (column,),
        group,
        (f"{file}.tsv",),
        "kit",
        **{"prompt": "options", "scorer": "option_letter", "arguments": {"kind": "options"}}
        | changes,
    )


def own(name: str, column: str, group: str, files, loader: str, prompt: str, **changes) -> Task:
    files = (files,) if isinstance(files, str) else files
    return Task(
        name, (column,), group, files, loader, prompt, program="own", share="own", **changes
    )


def reasoning(name: str, column: str, file: str, prompt: str, columns=(), **changes) -> Task:
    return Task(
        name,
        (column,),
        "reasoning",
        (f"{file}.tsv",),
        "kit",
        prompt,
        **{
            "scorer": name,
            "exact": "reasoning",
            "reasons": True,
            "arguments": {"kind": "text", "columns": columns, "letters": ""},
        }
        | changes,
    )
