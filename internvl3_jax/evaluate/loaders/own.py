"""Files of InternVL's own evaluation programs: JSONL, JSON and text, below one data folder."""

import base64
import binascii
import pathlib
from collections.abc import Callable

from internvl3_jax.evaluate.loaders.places import find_files, image_path
from internvl3_jax.evaluate.loaders.table import Table
from internvl3_jax.evaluate.task import Loaded, Row, Task
from internvl3_jax.io import jsonl, strict_json
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt, one_line

_ANNOTATION_BYTES = 2 << 30


def _image(data: pathlib.Path, written: str, where: str, folder: str = "") -> dict:
    return _several(data, [written], where, folder)


def _several(data: pathlib.Path, images: list, where: str, folder: str) -> dict:
    """Returns fields of `Row` for images that are files."""

    def load_images() -> list:
        return [image_path(data, name, where, folder) for name in images]

    return {"load_images": load_images, "check": load_images}


def load_vqa(task: Task, data: pathlib.Path) -> Loaded:
    """Reads lines with image, question, question_id and answer.

    Arguments of the task:
      labels: "text", "list" (a text counts as a list of one), "annotations" (of a second file, by
        question_id) or "none".
    """
    labels = task.arguments.get("labels", "text")
    paths = find_files(data, task.files)
    references = _annotations(paths.pop()) if labels == "annotations" else {}
    rows = []
    for path in paths:
        for line in jsonl.read_objects(path):
            number = line.get("question_id", (int, str))
            answer = line.get("answer", (str, list), None)
            if labels == "annotations":
                if number not in references:
                    raise JsonError(f"{line.where}: question_id {number} has no annotation")
                answer = references[number]
            elif labels == "list":
                answer = [answer] if isinstance(answer, str) else answer
            if answer is None and labels != "none":
                raise JsonError(f"{line.where}: answer is missing")
            written = line.get("image", str)
            rows.append(
                Row(
                    id=f"{path.stem}:{number}:{len(rows)}",
                    where=line.where,
                    question=line.get("question", str),
                    answer=answer,
                    values={"question_id": number, "part": path.stem, "image": written},
                    **_image(data, written, line.where),
                )
            )
    return Loaded(rows, tuple(map(str, find_files(data, task.files))))


def _annotations(path: pathlib.Path) -> dict[int, list[str]]:
    """Returns question_id -> answers of the official annotations of TextVQA, DocVQA or InfoVQA."""
    content = strict_json.read_object(path, max_bytes=_ANNOTATION_BYTES)
    found = {}
    key = "annotations" if "annotations" in content.values else "data"
    for number, values in enumerate(content.get(key, list)):
        entry = strict_json.Object(values, f"{path.name}: {key}[{number}]")
        name = "question_id" if "question_id" in entry.values else "questionId"
        answers = entry.get("answers", list)
        found[entry.get(name, (int, str))] = [
            answer["answer"] if isinstance(answer, dict) else answer for answer in answers
        ]
    return found


def load_pope(task: Task, data: pathlib.Path) -> Loaded:
    """Reads the questions of POPE and, by order within each category, its labels."""
    questions, *label_files = find_files(data, task.files)
    labels = {
        path.stem.removeprefix("coco_pope_"): [
            line.get("label", str, choices=("yes", "no")) for line in jsonl.read_objects(path)
        ]
        for path in label_files
    }
    rows, used = [], dict.fromkeys(labels, 0)
    for line in jsonl.read_objects(questions):
        category = line.get("category", str, choices=tuple(labels))
        if used[category] >= len(labels[category]):
            raise JsonError(f"{line.where}: category {category} has more questions than labels")
        rows.append(
            Row(
                id=f"{category}:{line.get('question_id', (int, str))}",
                where=line.where,
                question=line.get("text", str).strip(),
                answer=labels[category][used[category]],
                values={"category": category},
                **_image(data, line.get("image", str), line.where, "pope/val2014"),
            )
        )
        used[category] += 1
    short = [name for name, count in used.items() if count != len(labels[name])]
    if short:
        raise FileError(
            f"{questions.name}: category {short[0]} has {used[short[0]]} questions and "
            f"{len(labels[short[0]])} labels; was it downloaded completely?"
        )
    return Loaded(rows, tuple(map(str, [questions, *label_files])))


def load_mme(task: Task, data: pathlib.Path) -> Loaded:
    """Reads the text files of MME's tasks: image, question and ground truth per line."""
    paths, rows = find_files(data, task.files), []
    for path in paths:
        for number, text in jsonl.lines(path):
            fields, where = text.strip().split("\t"), f"{path.name} line {number}"
            if len(fields) != 3 or fields[2] not in ("Yes", "No"):
                raise FileError(
                    f"{where}: is {excerpt(text)}; expected image, question, and Yes or No, with "
                    "tabs between"
                )
            rows.append(
                Row(
                    id=f"{path.stem}:{number}",
                    where=where,
                    question=fields[1],
                    answer=fields[2],
                    values={"task": path.stem, "image": fields[0]},
                    **_mme_image(data, path.stem, fields[0], where),
                )
            )
    return Loaded(rows, tuple(map(str, paths)))


def _mme_image(data: pathlib.Path, name: str, image: str, where: str) -> dict:
    folder = data / "mme" / "MME_Benchmark_release_version" / name
    inner = folder / "images"  # as the benchmark itself has some tasks
    place = inner if (inner / image).is_file() else folder
    return _image(data, str(place.relative_to(data) / image), where)


def load_mmbench(task: Task, data: pathlib.Path) -> Loaded:
    """Reads a table of MMBench; arguments of the task: language, "en" or "cn"."""
    (path,) = find_files(data, task.files)
    table = Table(path, ["index", "image", "question", "A", "B"])
    rows = []
    for record in table.by_index.values():
        options = record.options("ABCDE")
        rows.append(
            Row(
                id=record.values["index"],
                where=record.where,
                question=record.get("question"),
                answer=record.present("answer"),
                options=options,
                values=dict(record.values)
                | {"hint": record.present("hint"), "columns": table.columns}
                | dict(task.arguments),
                load_images=record.images,
                check=record.check,
            )
        )
        if task.scorer != "none" and rows[-1].answer not in options:
            raise record.wrong("answer", f"one of {', '.join(options)}")
    return Loaded(rows, (str(path),))


def load_mmiu(task: Task, data: pathlib.Path) -> Loaded:
    """Reads mmiu.jsonl."""
    (path,) = find_files(data, task.files)
    rows = []
    for number, line in enumerate(jsonl.read_objects(path), 1):
        asked = strict_json.Object(line.get("input", dict), f"{line.where}: input")
        output = strict_json.Object(line.get("output", dict), f"{line.where}: output")
        images = asked.get("input_image_path", list, low=1)
        options = {}
        for letter, text in zip(
            map(chr, range(65, 91)), line.get("options", str).split("\n"), strict=False
        ):
            text = text.strip()
            options[letter] = (
                text.replace(f"{letter}:", "").strip() if text.startswith(f"{letter}:") else text
            )
        rows.append(
            Row(
                id=str(number),
                where=line.where,
                question=asked.get("question", str),
                answer=output.get("output_text", str),
                options=options,
                values={"context": asked.get("context", str), "task": line.get("task", str)},
                **_several(data, images, line.where, "mmiu"),
            )
        )
    return Loaded(rows, (str(path),))


def load_mirb(task: Task, data: pathlib.Path) -> Loaded:
    """Reads one JSON list per task of MIRB; the folder's other lists are not counted."""
    paths, rows = find_files(data, task.files), []
    for path in paths:
        listed = strict_json.read(path)
        if not isinstance(listed, list):
            raise JsonError(f"{path.name}: expected a list of questions")
        for number, values in enumerate(listed, 1):
            item = strict_json.Object(values, f"{path.name} entry {number}")
            images = item.get("images", list, low=1)
            rows.append(
                Row(
                    id=f"{path.stem}:{number}",
                    where=item.where,
                    question=item.get("questions", str),
                    answer=str(item.get("answers", (str, int, float))),
                    values={"task": path.stem},
                    **_several(data, images, item.where, "MIRB"),
                )
            )
    return Loaded(rows, tuple(map(str, paths)))


def load_refcoco(task: Task, data: pathlib.Path) -> Loaded:
    """Reads lines with image, sent, bbox, width and height."""
    (path,) = find_files(data, task.files)
    rows = []
    for number, line in enumerate(jsonl.read_objects(path), 1):
        box = line.get("bbox", list, low=4, high=4)
        if not all(isinstance(edge, int | float) for edge in box):
            raise JsonError(f"{line.where}: bbox is {excerpt(box)}; expected four numbers")
        rows.append(
            Row(
                id=str(number),
                where=line.where,
                question=line.get("sent", str),
                answer=box,
                values={
                    "width": line.get("width", float, low=1),
                    "height": line.get("height", float, low=1),
                },
                **_image(data, line.get("image", str), line.where),
            )
        )
    return Loaded(rows, (str(path),))


def load_mmvet2(task: Task, data: pathlib.Path) -> Loaded:
    """Reads mm-vet-v2.json: id -> question with <IMG> between text and names, and the answer."""
    (path,) = find_files(data, task.files)
    rows = []
    for name, values in strict_json.read_object(path).values.items():
        item = strict_json.Object(values, f"{path.name}: {one_line(name)}")
        parts = item.get("question", str).split("<IMG>")
        if len(parts) < 2:
            raise JsonError(f"{item.where}: question has no <IMG> and so no image")
        rows.append(
            Row(
                id=name,
                where=item.where,
                question=parts[0],
                answer=item.get("answer", str, None),
                **_image(data, parts[1], item.where, "mm-vet-v2/images"),
            )
        )
    return Loaded(rows, (str(path),))


def load_mmhal(task: Task, data: pathlib.Path) -> Loaded:
    """Reads lines with an image in base64, a question and the answer; their order counts."""
    (path,) = find_files(data, task.files)
    rows = []
    for number, line in enumerate(jsonl.read_objects(path), 1):
        values = {name: value for name, value in line.values.items() if name != "image"}
        rows.append(
            Row(
                id=str(number),
                where=line.where,
                question=line.get("question", str),
                answer=line.get("answer", str, None) or line.get("gt_answer", str, None),
                values=values,
                load_images=_written(line.get("image", str), line.where),
            )
        )
    return Loaded(rows, (str(path),))


def _written(text: str, where: str) -> Callable[[], list]:
    def load_images() -> list:
        try:
            return [base64.b64decode(text, validate=True)]
        except (binascii.Error, ValueError) as error:
            raise JsonError(f"{where}: image is not base64 ({error})") from error

    return load_images
