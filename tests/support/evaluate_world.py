"""Made-up files of every benchmark of the model card, six rows each, and answers that are right."""

import io
import json
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image

from internvl3_jax.evaluate.loaders.videos import MVBENCH
from internvl3_jax.evaluate.task import Row, Task
from tests.support import evaluate_own as own
from tests.support.evaluate_rows import (
    OPTIONS,
    ROWS,
    SIZE,
    choices,
    in_base64,
    letter,
    picture,
    save,
    table_rows,
    write_lines,
    write_table,
)
from tests.support.official_data import write_video

# --- VLMEvalKit's tables --------------------------------------------------------------------------


def _several() -> list[dict]:
    rows = choices()
    rows[2]["image"] = str([in_base64(0), in_base64(1)])
    return rows


def _mmmu() -> list[dict]:
    rows = choices(split="validation") + choices(split="dev")
    for number, row in enumerate(rows):
        row["index"] = f"validation_{number}"
    rows[1]["image"] = rows[0]["index"]
    rows[7]["image"] = rows[0]["index"]
    for row in rows[4:6]:  # open questions
        row |= dict.fromkeys("ABCD", "") | {"answer": "24"}
    return rows


def _circular() -> list[dict]:
    rows = choices()
    for number, row in enumerate(rows):
        row["index"] = number % 3 + number // 3 * 10**6
    rows[1]["image"] = rows[0]["index"]
    return rows


_KIT: dict[str, Callable[[], list[dict]]] = {
    "MMMU_DEV_VAL": _mmmu,
    "MathVista_MINI": lambda: table_rows(
        question_type=lambda n: "multi_choice" if n % 2 else "free_form",
        answer_type=lambda n: "text" if n % 2 else "integer",
        choices=lambda n: "['3', '8']" if n % 2 else "[]",
        answer=lambda n: "8",
        answer_option=lambda n: "B" if n % 2 else "",
    ),
    "MathVision": lambda: table_rows(
        choices=lambda n: "['3', '8']" if n % 2 else "[]",
        answer=lambda n: "B" if n % 2 else "1/2",
    ),
    "MathVerse_MINI_Vision_Only": lambda: table_rows(answer=letter),
    "DynaMath": lambda: table_rows(
        qid=lambda n: n // 2,
        varid=lambda n: n % 2 + 1,
        answer_type=lambda n: "multiple choice" if n < 4 else "float",
        answer=lambda n: letter(n) if n < 4 else "3.14",
    ),
    "WeMath": lambda: table_rows(
        ID=lambda n: n // 3,
        key=lambda n: ("2steps_1", "2steps_2", "2steps_multi")[n % 3],
        option="A. x; B. y",
        answer=letter,
    ),
    "LogicVista": lambda: table_rows(
        skill="deductive", answer=lambda n: "A, C" if n == 2 else letter(n)
    ),
    "OCRBench": lambda: table_rows(
        category=lambda n: "Handwritten Mathematical Expression Recognition" if n == 5 else "x",
        answer=lambda n: str([f"word{n}", "x"]),
    ),
    "VCR_EN_EASY_ALL": lambda: table_rows(answer=str(["in 1990", "the band"])),
    "MME-RealWorld": lambda: choices(**{"multi-choice options": "The choices are ..."}),
    "WildVision": lambda: table_rows(claude3_sonnet="A car."),
    "HallusionBench": lambda: table_rows(
        index=lambda n: f"VD_chart_x_0_{n % 2}_{n // 2}",
        **{"l2-category": "chart"},
        answer=lambda n: "Yes" if n % 2 else "No",
    ),
    "CRPE_RELATION": lambda: table_rows(
        category=lambda n: "subject", answer=lambda n: f"{letter(n)}. it is red"
    )[:4],
    "MTVQA_TEST": lambda: table_rows(answer=lambda n: f"Word {n}"),
    "MMVet": lambda: table_rows(answer="a car"),
    "BLINK": _several,
    "MUIRBench": _several,
}
_BOXES = {"bbox": "[4, 8, 12, 10]", "data_type": "text"}


def write_kit(folder: pathlib.Path, task: Task) -> None:
    for name in task.files:
        stem = name.removesuffix(".tsv")
        if task.arguments["kind"] == "box":
            rows = table_rows(**_BOXES)
        elif stem in _KIT:
            rows = _KIT[stem]()
        else:
            rows = _circular() if task.metric == "circular" else choices()
        write_table(folder / name, rows)


# --- videos ---------------------------------------------------------------------------------------

_VSI = (
    "object_counting",
    "object_abs_distance",
    "object_rel_distance",
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
)

_CANDIDATES = str(list(OPTIONS.values()))
_VIDEO = {
    "video_mme": {
        "video": "clip",
        "candidates": str([f"{name}. {text}" for name, text in OPTIONS.items()]),
        "answer": letter,
        "subtitle_path": "./subtitle/clip.srt",
    },
    "mlvu": {
        "video": "clip.mp4",
        "prefix": "./video",
        "candidates": _CANDIDATES,
        "answer": lambda n: OPTIONS[letter(n)],
        "task_type": "plotQA",
    },
    "longvideobench": {
        "video_path": "./video/clip.mp4",
        "candidates": _CANDIDATES,
        "correct_choice": lambda n: n % 4,
    },
    "mmbench_video": {"video": "clip", "video_path": "./video/clip.mp4", "answer": "a car"},
    "cgbench": {
        "video": "video/clip.mp4",
        "choices": _CANDIDATES,
        "answer": letter,
        "task_mode": lambda n: "long_acc" if n < 3 else "clue_acc",
        "clue_intervals": "[[0.0, 1.0], [0.5, 2.0]]",
        "clue_video_path": "",
    },
    "vsi": {
        "video": "video/clip.mp4",
        "question_type": lambda n: _VSI[n],
        "candidates": lambda n: "" if n < 2 else "['A. x', 'B. y']",
        "answer": lambda n: "4" if n < 2 else "B",
    },
}


def write_videos(folder: pathlib.Path, task: Task) -> None:
    write_video(make(folder / "video" / "clip.mp4"), 30)
    save(
        folder / "subtitle" / "clip.srt",
        "1\n00:00:00,000 --> 00:00:01,500\nHello <i>you</i>\n\n2\n00:00:02,000 --> 00:00:02,900\nBye\n",
    )
    write_table(folder / task.files[0], table_rows(**_VIDEO[task.arguments["set"]]))


def make(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_mvbench(folder: pathlib.Path, task: Task) -> None:
    frame = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(frame, "JPEG")
    clip = write_video(make(folder / "clip.mp4"), 30).read_bytes()
    for number, (name, (place, has_clip)) in enumerate(MVBENCH.items()):
        video = folder / "MVBench" / "video" / place / "clip"
        if name == "episodic_reasoning":
            for count in range(1, 8):
                save(video / f"{count:05d}.jpg", frame.getvalue())
        else:
            video = video.with_suffix(".mp4")
            save(video, clip)
        row = {"video": video.name, "question": "What?", "candidates": list(OPTIONS.values())}
        row |= {"start": 0.5, "end": 2.0} if has_clip else {}
        row |= {"answer": OPTIONS[letter(number)]}
        save(folder / "MVBench" / "json" / f"{name}.json", json.dumps([row]))


# --- all of them ----------------------------------------------------------------------------------

# Rows of the parquet file of Mantis-Eval, as pyarrow returns them.
MANTIS = [
    {
        "id": f"mantis_{number}",
        "question_type": "short-answer" if number == 5 else "multi-choice",
        "question": "<image> <image> Which?",
        "images": [{"bytes": picture(number), "path": None}, {"bytes": picture(0), "path": None}],
        "options": ["(A) x", "(B) y", "(C) z", "(D) w"],
        "answer": "red" if number == 5 else letter(number),
        "data_source": "x",
    }
    for number in range(ROWS)
]


def write_requests(folder: pathlib.Path, task: Task) -> None:
    save(folder / "0.png", picture())
    rows = [{"prompt": "Read the number.", "image": "0.png", "expected": "7", "task": "read"}]
    write_lines(folder / task.files[0], rows * ROWS)


WRITERS: dict[str, Callable[[pathlib.Path, Task], None]] = {
    "kit": write_kit,
    "videos": write_videos,
    "mvbench": write_mvbench,
    "mantis": lambda folder, task: save(folder / "mantis_eval" / "test.parquet", "made up"),
    "requests": write_requests,
    "vqa": own.write_vqa,
    "pope": own.write_pope,
    "mme": own.write_mme,
    "mmbench": own.write_mmbench,
    "mmiu": own.write_mmiu,
    "mirb": own.write_mirb,
    "refcoco": own.write_refcoco,
    "mmvet2": own.write_mmvet2,
    "mmhal": own.write_mmhal,
}


def build(folder: pathlib.Path, tasks: Sequence[Task]) -> pathlib.Path:
    """Writes the files of tasks, and returns the folder."""
    for task in tasks:
        WRITERS[task.loader](folder, task)
    return folder


def right_answer(task: Task, row: Row) -> str:
    """An answer that the task's rule takes as right."""
    if task.loader == "mirb" or isinstance(row.answer, str) and task.scorer != "mathvista":
        return (
            {"A": "Answer: \\boxed{A}"}.get(row.answer, row.answer) if task.reasons else row.answer
        )
    if task.scorer == "mathvista":
        return row.values["answer_option"] or row.answer
    if task.scorer == "refcoco":
        return "[[125, 250, 500, 750]]"
    if task.scorer == "screenspot":
        return "[[130, 260, 400, 500]]"
    if task.scorer == "vcr":
        return " and ".join(row.answer)
    return row.answer[0]
