"""Made-up files of the benchmarks that InternVL's own programs read, in their forms."""

import json
import pathlib

from internvl3_jax.evaluate.metrics import MMIU_TASKS
from internvl3_jax.evaluate.task import Task
from tests.support.evaluate_rows import (
    OPTIONS,
    ROWS,
    SIZE,
    choices,
    in_base64,
    letter,
    picture,
    save,
    write_lines,
    write_table,
)


def _images(folder: pathlib.Path, place: str) -> list[str]:
    for number in range(ROWS):
        save(folder / place / f"{number}.png", picture(number))
    return [f"{number}.png" for number in range(ROWS)]


def write_vqa(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "pictures")
    annotated = task.arguments.get("labels") == "annotations"
    for name in task.files[:-1] if annotated else task.files:
        rows = [
            {"image": f"data/pictures/{image}", "question": f"What is {n}?", "question_id": n}
            | ({} if annotated or task.exact == "server" else {"answer": "A"})
            for n, image in enumerate(names)
        ]
        write_lines(folder / name, rows)
    if annotated:
        many = [{"answer": "two"}] * 10 if task.name == "textvqa" else ["two", "2"]
        key = "question_id" if task.name == "textvqa" else "questionId"
        entries = [{key: n, "answers": many} for n in range(ROWS)]
        top = "annotations" if task.name == "textvqa" else "data"
        save(folder / task.files[-1], json.dumps({top: entries}))


def write_pope(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "pope/val2014")
    kinds = [("adversarial", "popular", "random")[n % 3] for n in range(ROWS)]
    rows = [
        {"question_id": n, "image": name, "text": "Is it? Answer ...", "category": kinds[n]}
        for n, name in enumerate(names)
    ]
    write_lines(folder / task.files[0], rows)
    for name in task.files[1:]:
        write_lines(folder / name, [{"label": "yes"}, {"label": "no"}])


def write_mme(folder: pathlib.Path, task: Task) -> None:
    for path in task.files:
        name = pathlib.Path(path).stem
        _images(folder, f"mme/MME_Benchmark_release_version/{name}")
        lines = [f"{n // 2}.png\tIs it {n}?\t{'No' if n % 2 else 'Yes'}" for n in range(ROWS)]
        save(folder / path, "\n".join(lines) + "\n")


def write_mmbench(folder: pathlib.Path, task: Task) -> None:
    rows = choices()
    for row in rows:
        if task.scorer == "none":
            del row["answer"]
    write_table(folder / task.files[0], [row | {"category": "x", "split": "test"} for row in rows])


def write_mmiu(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "mmiu/pictures")
    options = "\n".join(f"{name}: {text}" for name, text in OPTIONS.items())
    rows = [
        {
            "task": name,
            "input": {
                "input_image_path": [f"./pictures/{image}" for image in names[: 1 + n % 2]],
                "question": "Which?",
                "context": f"Select from:\n{options}",
            },
            "options": options,
            "output": {"output_text": letter(n)},
        }
        for n, name in enumerate([*MMIU_TASKS, "not_counted"])
    ]
    write_lines(folder / task.files[0], rows)


def write_mirb(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "MIRB/pictures")
    for name in task.files:
        kind = pathlib.Path(name).stem
        answer = "yes" if kind in ("analogy", "attribute", "sightseeing") else "3"
        rows = [{"questions": "How?", "answers": answer, "images": [f"pictures/{names[0]}"]}]
        save(folder / name, json.dumps(rows))
    save(folder / "MIRB" / "count_concat.json", "[]")  # not counted


def write_refcoco(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "coco/train2014")
    rows = [
        {
            "image": f"data/coco/train2014/{name}",
            "sent": "the car",
            "bbox": [4, 8, 16, 24],
            "width": SIZE,
            "height": SIZE,
        }
        for name in names
    ]
    write_lines(folder / task.files[0], rows)


def write_mmvet2(folder: pathlib.Path, task: Task) -> None:
    names = _images(folder, "mm-vet-v2/images")
    items = {f"v2_{n}": f"What is<IMG>{name}<IMG>?" for n, name in enumerate(names)}
    content = {
        name: {"question": text, "answer": "x", "added_in": "v2"} for name, text in items.items()
    }
    save(folder / task.files[0], json.dumps(content))


def write_mmhal(folder: pathlib.Path, task: Task) -> None:
    rows = [{"image": in_base64(n), "question": f"What {n}?", "answer": "x"} for n in range(ROWS)]
    write_lines(folder / task.files[0], rows)
