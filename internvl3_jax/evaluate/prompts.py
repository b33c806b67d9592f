"""Prompts of the benchmarks: the texts of the programs that made the card's numbers.

A prompt is a text with an <image> for each image. `build` makes it from a row and the number of its
images or frames; the answer's form depends on every character.
"""

import re
from collections.abc import Callable

from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.evaluate.task import Row, Task

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"
WORD = "Answer the question using a single word or phrase."
BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes: "
    "<ref>{}</ref>"
)
_REASONING = (
    " If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. Think step by step logically, considering all relevant information before answering."
)
REASONING_OPTION = (
    "Answer the preceding multiple choice question. The last line of your response should follow "
    "this format: 'Answer: \\boxed{$LETTER}' (without quotes), where LETTER is one of the options."
    + _REASONING
)
REASONING_OPEN = (
    "Answer the preceding question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion "
    "based on the reasoning provided." + _REASONING
)
_CHINESE = re.compile("[\u4e00-\u9fff]")
_MIRB = {
    "Answer with a single word.": "analogy attribute plot_code sightseeing visual_chain".split(),
    "Answer with the option symbol.": "codeu food image_jigsaw".split(),
    "Answer with the paper title.": ["arxiv"],
    "Answer with a single number.": ["count"],
    "The following images are different views of the same 3D scene. Answer with a single number.": [
        "3d_scene"
    ],
}
_MIRB_OF_TASK = {task: text for text, tasks in _MIRB.items() for task in tasks}


def build(task: Task, row: Row, images: int, reasoning: bool = False) -> str:
    """Returns the prompt of a row, with places for its images.

    Args:
      images: number of images, or of frames.
      reasoning: ask for reasoning, as the kit does with USE_COT=1.
    """
    if task.prompt in VIDEO:
        return VIDEO[task.prompt](row, images)
    text = IMAGE[task.prompt](row, reasoning, images)
    if task.prompt == "given":
        return text
    if task.prompt == "muirbench":
        return numbered("Image", images, always=True) + text
    return numbered("Image", images) + text


def numbered(word: str, count: int, always: bool = False, hyphen: str = "-") -> str:
    """Returns the lines of images: <image>, or Image-1: <image> and so on for several.

    always: number a single one, too.
    """
    if count == 1 and not always:
        return f"{IMAGE_TAG}\n"
    return "".join(f"{word}{hyphen}{number}: {IMAGE_TAG}\n" for number in range(1, count + 1))


def _listed(options: dict[str, str], form: str = "{}. {}") -> list[str]:
    return [form.format(letter, text) for letter, text in options.items()]


# --- VLMEvalKit, images -----------------------------------------------------------------------


def _kit_options(row: Row, reasoning: bool, images: int) -> str:
    hint = row.values.get("hint")
    text = "\n".join([*([hint] if hint else []), row.question, *_listed(row.options)])
    chinese = _CHINESE.search(text) is not None
    if row.options:
        text += f"\n{LETTER_CHINESE if chinese else LETTER}"
    else:
        text += "\n请直接回答问题。" if chinese else "\nAnswer the question directly."
    # The Chinese sentence stays, as in the kit.
    return f"{text.replace(LETTER, '').strip()}\n{REASONING_OPTION}" if reasoning else text


def _kit_muirbench(row: Row, reasoning: bool, images: int) -> str:
    text = _kit_options(row, reasoning, images).replace(" ".join([IMAGE_TAG] * images), "")
    for number in range(1, images + 1):
        text = text.replace(IMAGE_TAG, f"<Image-{number}>", 1)
    return text


def _bare(row: Row, reasoning: bool, images: int) -> str:
    return f"{row.question}\n{REASONING_OPEN}" if reasoning else row.question


def _mathverse(row: Row, reasoning: bool, images: int) -> str:
    text = row.question.replace("please directly answer the question and", "please")
    return f"{text}\n{REASONING_OPEN}" if reasoning else text


def _mme_realworld(row: Row, reasoning: bool, images: int) -> str:
    return (
        f"{row.question} {row.values['multi-choice options']}\nSelect the best answer to the above "
        "multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or "
        "E) of the correct option. \nThe best answer is:"
    )


# --- the own code, images ---------------------------------------------------------------------


def _own_options(row: Row, reasoning: bool, images: int) -> str:
    hint = row.values.get("hint")
    sentence = LETTER_CHINESE if row.values.get("language") == "cn" else LETTER
    return "\n".join([*([hint] if hint else []), row.question, *_listed(row.options), sentence])


def _mantis(row: Row, reasoning: bool, images: int) -> str:
    text = row.question.replace(" ".join([IMAGE_TAG] * images), "").strip()
    for number in range(1, images + 1):
        text = text.replace(IMAGE_TAG, f"Image-{number}", 1)
    lines = [*row.values["texts"], LETTER] if row.values["kind"] == "multi-choice" else [WORD]
    return "\n".join([text, *lines]).strip()


def _mmiu(row: Row, reasoning: bool, images: int) -> str:
    return f"{row.question}\n{row.values['context']}\n{LETTER}"


# Name -> function of (row, whether reasoning is asked for, number of images).
IMAGE: dict[str, Callable[[Row, bool, int], str]] = {
    "options": _kit_options,
    "muirbench": _kit_muirbench,
    "word": lambda row, reasoning, images: f"{row.question}\n{WORD}",
    "bare": _bare,
    "mathverse": _mathverse,
    "detail": lambda row, reasoning, images: f"{row.question}\nAnswer this question in detail.",
    "yes_or_no": lambda row, reasoning, images: f"{row.question} Please answer yes or no. {WORD}",
    "box": lambda row, reasoning, images: BOX.format(row.question),
    "mme_realworld": _mme_realworld,
    "own_word": lambda row, reasoning, images: f"{row.question} {WORD}",
    "own_bare": lambda row, reasoning, images: row.question,
    "given": lambda row, reasoning, images: row.question,
    "own_options": _own_options,
    "own_detail": lambda row, reasoning, images: f"{row.question} Answer this question in detail.",
    "mantis": _mantis,
    "mirb": lambda row, reasoning, images: f"{row.question}\n{_MIRB_OF_TASK[row.values['task']]}",
    "mmiu": _mmiu,
}


# --- videos -----------------------------------------------------------------------------------


def _frames(count: int, text: str) -> str:
    """Returns the lines of the frames and a text of the kit, in which images are called frames."""
    for number in range(1, 65):
        text = text.replace(f"Image-{number}", f"Frame-{number}")
    return numbered("Frame", count) + text


def _video_mme(row: Row, frames: int) -> str:
    subtitles = row.values.get("subtitles")
    shown = "" if subtitles is None else f" This video's subtitles are listed below:\n{subtitles}\n"
    text = (
        f"\nThese are the frames of a video.{shown or ' '}Select the best answer to the following "
        "multiple-choice question based on the video. Respond with only the letter (A, B, C, or D) "
        f"of the correct option.\nQuestion: {row.question}\n" + "\n".join(row.values["candidates"])
    )
    return _frames(frames, f"{text} \n{LETTER}")


def _mmbench_video(row: Row, frames: int) -> str:
    return _frames(
        frames,
        f"\nYou will be provided with {frames} separate frames uniformly sampled from a video, the "
        "frames are provided in chronological order of the video.\nPlease analyze these images and "
        "provide the answer to the question about the video content.\nPlease directly reply with "
        f"your response to the only question.\nQuestion: {row.question} ",
    )


def _question_with_options(row: Row) -> str:
    lines = [f"Question: {row.question}", "Options:", *_listed(row.options, "({}) {}")]
    return "\n".join(lines).rstrip()


def _mlvu(row: Row, frames: int) -> str:
    return _frames(
        frames,
        "Carefully watch this video and pay attention to every detail. Based on your observations, "
        "select the best option that accurately addresses the question."
        f"{_question_with_options(row)}\nOnly give the best option.",
    )


def _longvideobench(row: Row, frames: int) -> str:
    return _frames(frames, "\n".join([row.question, *_listed(row.options), LETTER]))


def _cgbench(row: Row, frames: int) -> str:
    quote = "'" if row.values["task_mode"] == "clue_acc" else '"'
    listed = "\n".join(_listed(row.options, "{}:{}"))
    return _frames(
        frames,
        "You will be provided with sampled frames from a video, along with a multiple-choice "
        "question that includes a question and several answer options.\nYour task is to analyze "
        "the provided frames, infer the most plausible answer based on the visual information.\nIf "
        "the video does not provide enough information, infer the answer based on the options "
        "available and still provide a result. Therefore, In all cases, an answer must be given.\n"
        'Only output the answer in the following format:\n\n```json\n{"result": "option"}\n```\n\n'
        f"The {quote}option{quote} is the uppercase letter corresponding to your answer.\n\n"
        f"Question: {row.question}\n\n{listed}\n\n",
    )


def _vsi(row: Row, frames: int) -> str:
    options = row.values.get("candidates") or []
    last = LETTER if options else "Answer briefly and directly in one float number."
    text = "\n".join(["These are frames of a video.", row.question, *options, last])
    return _frames(frames, text)


def _mvbench(row: Row, frames: int) -> str:
    return (
        numbered("Frame", frames, always=True, hyphen="")
        + "Carefully watch the video and pay attention to the cause and sequence of events, the "
        "detail and movement of objects, and the action and pose of persons. Based on your "
        "observations, select the best option that accurately addresses the question.\n\n"
        f"{_question_with_options(row)}\nOnly give the best option."
    )


# Name -> function of (row, number of frames).
VIDEO: dict[str, Callable[[Row, int], str]] = {
    "video_mme": _video_mme,
    "mmbench_video": _mmbench_video,
    "mlvu": _mlvu,
    "longvideobench": _longvideobench,
    "cgbench": _cgbench,
    "vsi": _vsi,
    "mvbench": _mvbench,
}
