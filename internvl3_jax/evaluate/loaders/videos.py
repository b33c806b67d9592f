"""Benchmarks of videos: VLMEvalKit's tables, and the JSON lists of MVBench."""

import pathlib
import re
from collections.abc import Callable

from internvl3_jax.evaluate.loaders.places import find_files
from internvl3_jax.evaluate.loaders.table import Record, Table
from internvl3_jax.evaluate.scorers.letters import options_of
from internvl3_jax.evaluate.task import Loaded, Row, Task
from internvl3_jax.io import safe_files, strict_json
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import one_line

_SUBTITLE_BYTES = 64 << 20
# Task of MVBench -> folder of its videos below MVBench/video, and whether rows have a clip.
MVBENCH = {
    "action_sequence": ("star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "moving_direction": ("clevrer/video_validation", False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": ("perception/videos", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "state_change": ("perception/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": ("perception/videos", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", False),
}


def load(task: Task, data: pathlib.Path) -> Loaded:
    """Reads a table of VLMEvalKit; argument of the task: set, key of _SETS."""
    (path,) = find_files(data, task.files)
    columns, wanted, read = _SETS[task.arguments["set"]]
    table = Table(path, ["index", "question", *columns])
    rows = []
    for record in table.by_index.values():
        if wanted(record, task):
            row = Row(record.values["index"], record.where, record.get("question"))
            row.values = dict(record.values) | {"columns": table.columns}
            read(row, record, path.parent, task)
            row.check = _checked_video(row)
            rows.append(row)
    if not rows:
        raise FileError(f"{path.name}: has no row for {task.name}; is it the right file?")
    return Loaded(rows, (str(path),))


def _checked_video(row: Row) -> Callable[[], None]:
    def check() -> None:
        if not pathlib.Path(row.video).exists():
            raise FileError(f"{row.where}: column video: there is no {one_line(row.video)}")

    return check


def _video_mme(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / "video" / f"{record.get('video')}.mp4")
    candidates = [str(text) for text in record.literal("candidates")]
    row.values["candidates"] = candidates
    row.answer = record.one_of("answer", list("ABCD"))
    # "A. text" -> text: what the answer is compared with if it has no letter
    row.options = options_of([re.sub(r"^[A-D]\.\s*", "", text) for text in candidates])
    if task.arguments.get("subtitles"):
        path = root / record.get("subtitle_path").removeprefix("./")
        # The kit shows no subtitles where a video has none, but still says that they follow.
        row.values["cues"] = read_subtitles(path) if path.is_file() else []


def _mlvu(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / record.get("prefix").removeprefix("./") / record.get("video"))
    _by_text(row, record)


def _by_text(row: Row, record: Record) -> None:
    """Sets options, and the answer's letter, where the table has the answer's text."""
    texts = [str(text) for text in record.literal("candidates")]
    if record.get("answer") not in texts:
        raise record.wrong("answer", "one of the candidates")
    row.options = options_of(texts)
    row.answer = next(
        letter for letter, text in reversed(row.options.items()) if text == record.values["answer"]
    )


def _longvideobench(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / record.get("video_path").removeprefix("./"))
    row.options = options_of([str(text) for text in record.literal("candidates")])
    number = record.number_of("correct_choice", int)
    if not 0 <= number < len(row.options):
        raise record.wrong("correct_choice", f"from 0 to {len(row.options) - 1}")
    row.answer = list(row.options)[number]


def _mmbench_video(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / record.get("video_path").removeprefix("./"))
    row.answer = record.values.get("answer")


def _cgbench(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / record.get("video"))
    row.options = options_of([str(text) for text in record.literal("choices")])
    row.answer = record.one_of("answer", list(row.options))
    if task.arguments["mode"] == "clue_acc":
        row.clip = record.literal("clue_intervals")


def _vsi(row: Row, record: Record, root: pathlib.Path, task: Task) -> None:
    row.video = str(root / record.get("video"))
    row.answer = record.get("answer")
    printed = record.present("candidates")
    row.values["candidates"] = record.literal("candidates") if printed else []
    if not row.values["candidates"]:
        record.number_of("answer")


def _every(record: Record, task: Task) -> bool:
    return True


def _of_mode(record: Record, task: Task) -> bool:
    return record.values["task_mode"] == task.arguments["mode"]


# Set -> (columns, which rows count, function that completes a row).
_SETS: dict[str, tuple[tuple[str, ...], Callable, Callable]] = {
    "video_mme": (("video", "candidates", "answer"), _every, _video_mme),
    "mlvu": (("video", "prefix", "candidates", "answer", "task_type"), _every, _mlvu),
    "longvideobench": (("video_path", "candidates", "correct_choice"), _every, _longvideobench),
    "mmbench_video": (("video_path",), _every, _mmbench_video),
    "cgbench": (("video", "choices", "answer", "task_mode"), _of_mode, _cgbench),
    "vsi": (("video", "question_type", "candidates", "answer"), _every, _vsi),
}


def load_mvbench(task: Task, data: pathlib.Path) -> Loaded:
    """Reads the 20 JSON lists of MVBench."""
    paths, rows = find_files(data, [f"MVBench/json/{name}.json" for name in MVBENCH]), []
    for path in paths:
        folder, has_clip = MVBENCH[path.stem]
        listed = strict_json.read(path)
        if not isinstance(listed, list):
            raise JsonError(f"{path.name}: expected a list of questions")
        for number, values in enumerate(listed, 1):
            item = strict_json.Object(values, f"{path.name} entry {number}")
            texts = [str(text) for text in item.get("candidates", list, low=1)]
            answer = item.get("answer", str)
            if answer not in texts:
                raise JsonError(f"{item.where}: answer is none of the candidates")
            options = options_of(texts)
            letter = next(letter for letter, text in reversed(options.items()) if text == answer)
            row = Row(
                id=f"{path.stem}:{number}",
                where=item.where,
                question=item.get("question", str),
                answer=f"({letter}) {answer}",
                options=options,
                values={"task": path.stem},
                video=str(data / "MVBench" / "video" / folder / item.get("video", str)),
            )
            if has_clip:
                row.clip = [item.get("start", float), item.get("end", float)]
            row.check = _checked_video(row)
            rows.append(row)
    return Loaded(rows, tuple(map(str, paths)))


# --- subtitles --------------------------------------------------------------------------------

_TIME = re.compile(
    r"(\d+):(\d{1,2}):(\d{1,2})[.,](\d{1,3})\s*-->\s*(\d+):(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
)
_TAG = re.compile(r"< */? *[a-zA-Z][^>]*>")


def read_subtitles(path: pathlib.Path) -> list[tuple[int, int, str]]:
    """Returns (start, end, text) of each cue of an SRT file, in milliseconds."""
    data = safe_files.read_bytes(path, max_bytes=_SUBTITLE_BYTES)
    cues = []
    for block in re.split(r"\n\s*\n", strict_json.decode(data, path.name).replace("\r\n", "\n")):
        found = _TIME.search(block)
        if found:
            numbers = list(map(int, found.groups()))
            start, end = (
                ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds
                for hours, minutes, seconds, milliseconds in (numbers[:4], numbers[4:])
            )
            text = _TAG.sub("", block[found.end() :].strip())
            cues.append((start, end, text.replace("\n", " ")))
    return cues


def shown_subtitles(cues: list[tuple[int, int, str]], indices: list[int], fps: float) -> str:
    """Returns the subtitles at the frames, one line each, as the kit shows them."""
    lines = []
    for index in indices:
        time = round(index * 1000 / fps)
        text = next((text for start, end, text in cues if start < time < end), "")
        lines += [text] if text.strip() else []
    return "\n".join(lines)
