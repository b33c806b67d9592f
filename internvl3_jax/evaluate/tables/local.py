"""Tasks that are no column of the card: labeled halves of its sets, and sets of this repository."""

import dataclasses

from internvl3_jax.evaluate.tables import images, reading
from internvl3_jax.evaluate.tables.forms import options
from internvl3_jax.evaluate.task import Task

_OCR = {task.name: task for task in reading.OCR}
_COMPREHENSIVE = {task.name: task for task in images.COMPREHENSIVE}


def _with_labels(task: Task, name: str, column: str, files: tuple[str, ...], **changes) -> Task:
    changes = {"group": "local", "exact": "rule", "file_name": "", "file_form": ""} | changes
    return dataclasses.replace(task, name=name, columns=(column,), files=files, **changes)


LOCAL = [
    *(
        _with_labels(
            _OCR[name],
            f"{name}_val",
            f"{_OCR[name].columns[0]} val",
            files,
            scorer="anls",
            arguments={"labels": "annotations"},
        )
        for name, files in (
            ("docvqa", ("docvqa/val.jsonl", "docvqa/val/val_v1.0.json")),
            (
                "infovqa",
                (
                    "infographicsvqa/val.jsonl",
                    "infographicsvqa/infographicsVQA_val_v1.0_withQT.json",
                ),
            ),
        )
    ),
    *(
        _with_labels(
            _COMPREHENSIVE[f"mmbench_{language}"],
            f"mmbench_dev_{language}_own",
            f"MMBench dev {language.upper()}",
            (f"mmbench/mmbench_dev_{language}_20231003.tsv",),
            scorer="option_first",
        )
        for language in ("en", "cn")
    ),
    options(
        "mmbench_dev_v11",
        "MMBench v1.1 dev",
        "local",
        "MMBench_DEV_EN_V11",
        metric="circular",
    ),
    Task(
        "requests",
        ("requests",),
        "local",
        ("questions.jsonl",),
        "requests",
        "given",
        scorer="text_or_box",
        metric="by_task",
        program="own",
        share="model",
        max_new_tokens=96,
        note="questions.jsonl in the form of infer.py --requests, with task and expected",
    ),
]
