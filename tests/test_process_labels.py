"""make_process_labels.py: + where the right answer can still be reached, rows that train.py reads,
and resuming after a stop.
"""

import json

import numpy as np
import pytest

from internvl3_jax.config import DataConfig
from internvl3_jax.data.pipeline import make_tokenizer, sample_dataset
from internvl3_jax.inference.chat import Answer
from internvl3_jax.reward import make_process_labels
from internvl3_jax.reward.make_process_labels import main, run
from internvl3_jax.reward.process_labels import LabelSettings, label
from internvl3_jax.reward.question_output import done_path
from internvl3_jax.reward.questions import Question, read_questions
from tests.support import tiny_checkpoint
from tests.support.tiny_checkpoint import PROCESSOR, make_image


class Solver:
    """Solves "a b c" by adding. Its solutions are given; it continues rightly from right steps,
    wrongly from wrong ones, and from a step with a ? rightly in one of four continuations.
    """

    def __init__(self, solutions: dict[str, list[str]]):
        self.solutions, self.asked = solutions, []

    def candidates(self, requests, n, *, answer_prefixes=(), seed=0, names=(), **options):
        self.asked.append((len(requests), n, options))
        if not answer_prefixes:
            texts = [
                [
                    self.solutions[question][number % len(self.solutions[question])]
                    for number in range(n)
                ]
                for question, _ in requests
            ]
        else:
            texts = [[self.rest(text, number) for number in range(n)] for text in answer_prefixes]
        return [[Answer(text, [1], 5, [], 0.0, 0.0) for text in row] for row in texts]

    def rest(self, text: str, number: int) -> str:
        assert not text.endswith("\n")
        if "Answer" in text or "boxed" in text:
            return ""  # it is at its end
        right = "wrong" not in text and ("?" not in text or number % 4 == 3)
        return " and so on\n\nAnswer: 6" if right else " and so on\n\nAnswer: 7"


QUESTION = Question("q", "<image>\nadd 1 2 3", ["a.png"], "6", "a.png")
SMALL = {"solutions": 3, "continuations": 8, "batch_size": 16, "system": None}


def rows_of(solver: Solver, settings: LabelSettings) -> list[dict]:
    (result,) = label(solver, [QUESTION], settings)
    return result.rows


def test_labels():
    solver = Solver(
        {
            QUESTION.question: [
                "1 + 2 = 3\n\n3 + 3 = 6\n\nAnswer: 6",
                "1 + 2 = 3\n\nwrong\n\n?\n\nAnswer: 5",
                "?\n\n\\boxed{6.0}",
            ]
        }
    )
    rows = rows_of(solver, LabelSettings(**SMALL))
    assert [row["scores"] for row in rows] == [[1, 1, 1], [1, 0, 0, 0], [0.25, 1]]
    labels = [
        [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"] for row in rows
    ]
    assert labels == [["+", "+", "+"], ["+", "-", "-", "-"], ["+", "+"]]
    assert rows[1]["conversations"][0] == {
        "from": "human",
        "value": "### Question:\n<image>\nadd 1 2 3\n\n### Solution Process:\n1 + 2 = 3",
    }
    assert [(row["id"], row["image"]) for row in rows] == [("q", "a.png")] * 3
    options = {"temperature": 1.0, "top_k": 50, "max_new_tokens": 4096}
    # 3 + 4 + 2 places, one of them twice
    assert solver.asked == [(1, 3, options)] + [(2, 8, options)] * 4
    assert [row["unstated"] for row in rows] == [0, 0, 0]
    stricter = rows_of(solver, LabelSettings(**SMALL, threshold=0.25))
    assert [turn["value"] for turn in stricter[2]["conversations"] if turn["from"] == "gpt"] == [
        "-",
        "+",
    ]


def test_steps_are_merged_and_equal_solutions_count_once():
    solver = Solver({QUESTION.question: ["a\n\nb\n\nwrong\n\nc\n\nAnswer: 7"]})
    rows = rows_of(solver, LabelSettings(**(SMALL | {"system": "Judge."}), max_steps=2))
    assert len(rows) == 1 and rows[0]["scores"] == [0, 0]
    assert [turn["value"] for turn in rows[0]["conversations"]][0::2] == ["Judge.", "-", "-"]
    assert rows[0]["conversations"][3]["value"] == "c\n\nAnswer: 7"


def test_an_unstated_answer_is_counted(tmp_path):
    solver = Solver({QUESTION.question: ["it is 6", ""]})
    rows = rows_of(solver, LabelSettings(**SMALL))
    assert [row["scores"] for row in rows] == [[1], [1]]  # continued, they state it
    mute = Solver({QUESTION.question: ["it is 6", ""]})
    mute.rest = lambda text, number: " and so on"
    rows = rows_of(mute, LabelSettings(**SMALL))
    assert [(row["scores"], row["unstated"]) for row in rows] == [([0], 9), ([0], 9)]
    output = tmp_path / "labels.jsonl"
    run(mute, [QUESTION], output, LabelSettings(**SMALL))
    with pytest.raises(ValueError, match="18 answers could not be read: wanted is a stated answer"):
        make_process_labels.summary(output)


def questions_file(folder, count: int = 3):
    make_image(20, 20).save(folder / "a.png")
    rows = [{"id": n, "question": f"add {n}", "image": "a.png", "answer": 6} for n in range(count)]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_resumes_after_the_last_finished_question(tmp_path):
    settings = LabelSettings(**(SMALL | {"batch_size": 3}))
    questions = read_questions(questions_file(tmp_path))
    # A line separator of Unicode is none of JSON's.
    solver = Solver(
        {
            question.question: ["x\u2028\n\nAnswer: 6", "wrong\n\nAnswer: 7"]
            for question in questions
        }
    )
    output = tmp_path / "labels.jsonl"
    done = done_path(output)
    run(solver, questions, output, settings)
    complete, finished = output.read_text(), done.read_text()
    ends = finished.splitlines(True)
    lines = [line + "\n" for line in complete.split("\n")[:-1]]
    assert len(lines) == 6 and [json.loads(end)["rows"] for end in ends] == [2, 2, 2]
    # Rows of a question that is not finished are made again.
    for rows, kept in (
        (lines[:3], ends[:1]),
        (lines[:4], ends[:2]),
        ([*lines[:4], lines[4][:20]], [*ends[:2], ends[2][:9]]),
        (lines[:2], []),
        ([], []),
    ):
        output.write_text("".join(rows))
        done.write_text("".join(kept))
        run(solver, questions, output, settings)
        assert (output.read_text(), done.read_text()) == (complete, finished)
    for arguments in (
        (questions[1:], settings, ""),
        (questions, LabelSettings(**SMALL, threshold=0.5), ""),
        (questions, settings, "another"),
    ):
        with pytest.raises(ValueError, match="move it and .*labels.jsonl.done away|questions, and"):
            run(solver, arguments[0], output, *arguments[1:])
    # Another image under the same name, too.
    make_image(20, 20, 1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"other questions or images.*line 1 \(id 0\)"):
        run(solver, questions, output, settings)
    assert (output.read_text(), done.read_text()) == (complete, finished)
    for foreign in ("{}\n", "notes", '{"id": 5, "x": 1}', '{"id": 0}\n'):
        output.write_text(foreign)
        with pytest.raises(ValueError, match="name another --output"):
            run(solver, questions, output, settings)
        assert output.read_text() == foreign


def test_rows_are_training_data(tmp_path, capsys):
    """From the command line with a real model; then a sample whose trained tokens are the labels
    and the ends of their turns.
    """
    path, output = questions_file(tmp_path, 2), tmp_path / "labels.jsonl"
    arguments = [
        "--checkpoint",
        str(tiny_checkpoint.directory()),
        "--questions",
        str(path),
        "--output",
        str(output),
    ]
    arguments += [
        "--solutions",
        "2",
        "--continuations",
        "2",
        "--max_new_tokens",
        "8",
        "--batch_size",
        "4",
        "--system",
        "none",
    ]
    assert main(arguments) == 1  # a model with random weights states nothing
    assert "answers could not be read: wanted is" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["id"] for row in rows} == {0, 1}
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"labels": {"root": str(tmp_path), "annotation": str(output)}}))
    (tmp_path / "tokenizer").mkdir()
    for name, content in tiny_checkpoint.tokenizer_files().items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    data = DataConfig(source=str(meta), tokenizer=str(tmp_path / "tokenizer"))
    tokenizer = make_tokenizer(data)
    dataset = sample_dataset(data, PROCESSOR, tokenizer)
    trained = set()
    for number in range(len(rows)):
        sample = dataset[number]
        trained |= set(np.asarray(sample["targets"])[sample["loss_weights"] > 0].tolist())
        assert sample["tiles"].shape[0] == 1
    assert (
        trained <= {tokenizer.token_id(token) for token in ("+", "-", "<|im_end|>")}
        and len(trained) >= 2
    )


def test_errors(tmp_path, capsys):
    path = questions_file(tmp_path)
    for text, message in [
        ('{"question": "a"}', "line 1 has no answer"),
        ('{"question": "a", "answer": null}', "line 1 has no answer"),
        ('{"prompt": "a"}', "line 1: unknown key 'prompt'; did you mean 'question'\\?"),
        ('{"answer": "a"}', "line 1: question is missing"),
        (
            '{"question": "a", "answer": 1, "images": ["a.png"]}',
            "line 1: unknown key 'images'; did you mean 'image'",
        ),
        ('{"question": "a", "answer": [1]}', "line 1: answer is the list"),
        ("", "has no questions"),
        (
            '{"question": "<image>", "answer": 1, "image": ["a.png", "a.png"]}',
            "line 1: 2 images, but 1 <image> tags",
        ),
        ('{"question": "a", "answer": "1", "image": "b.png"}', "b.png does not exist"),
        (
            '{"question": "a", "answer": 1, "id": 2}\n{"question": "a", "answer": 1}',
            "line 2: the id 2 is also that of",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_questions(path)
    with pytest.raises(ValueError, match="solutions is 0"):
        LabelSettings(solutions=0)
    for threshold in (-0.1, 1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"threshold is {threshold}; it must be at least 0"):
            LabelSettings(threshold=threshold)
    with pytest.raises(ValueError, match="max_steps is 0"):
        LabelSettings(max_steps=0)
    arguments = [
        "--checkpoint",
        str(tmp_path),
        "--questions",
        str(path),
        "--output",
        str(tmp_path / "labels.jsonl"),
    ]
    assert main(arguments) == 1 and "the id 2 is also" in capsys.readouterr().err
    assert make_process_labels.parse(arguments).system == "visualprm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1"], "threshold is 1.0; it must be at least 0 and below 1"),
        (["--max_image_pixels", "-1"], "max_image_pixels is -1; it must be at least 0"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--checkpoint", "/no/model"], "/no/model does not exist; give a checkpoint"),
        (["--output", "/no/labels.jsonl"], "there is no folder /no"),
    ],
)
def test_cheap_checks_come_before_the_model(tmp_path, capsys, arguments, message):
    """The folder is no checkpoint: nothing has tried to load it."""
    command = ["--checkpoint", str(tmp_path), "--questions", str(questions_file(tmp_path))]
    command += ["--output", str(tmp_path / "labels.jsonl")]
    assert main([*command, *arguments]) == 1
    assert message in capsys.readouterr().err
    (tmp_path / "labels.jsonl").write_text("mine")
    assert main(command) == 1
    assert "are not both of make_process_labels" in capsys.readouterr().err


def test_a_question_that_cannot_be_asked(tmp_path, capsys):
    """Its error is noted, with file, line and id, and it can be asked again when it is fixed."""
    path, output = questions_file(tmp_path, 2), tmp_path / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.insert(1, rows[0] | {"id": "b", "image": "broken.png"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:60])
    command = ["--checkpoint", str(tiny_checkpoint.directory()), "--questions", str(path)]
    command += ["--solutions", "1", "--continuations", "1", "--max_new_tokens", "4"]
    stopped = [*command, "--output", str(tmp_path / "stopped.jsonl"), "--on_error", "stop"]
    assert main(stopped) == 1
    assert f"error: {path} line 2 (id 'b'): {broken}: " in capsys.readouterr().err
    command += ["--output", str(output)]
    assert main(command) == 1
    done = [json.loads(line) for line in done_path(output).read_text().splitlines()]
    assert [(line["id"], line["rows"]) for line in done] == [(0, 1), ("b", 0), (1, 1)]
    assert done[1]["error"].startswith(f"{path} line 2 (id 'b'): {broken}: ")
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [0, 1]
    broken.write_bytes((tmp_path / "a.png").read_bytes())
    assert main([*command, "--retry_errors"]) == 1  # no answer states anything
    assert "1 questions with an error were asked again" in capsys.readouterr().err
    done = [json.loads(line) for line in done_path(output).read_text().splitlines()]
    assert [(line["id"], line["rows"]) for line in done] == [(0, 1), ("b", 1), (1, 1)]
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [0, 1, "b"]
    before = output.read_bytes()
    assert main(command) == 1 and output.read_bytes() == before
