"""Runs of `python -m internvl3_jax.evaluate` in this process, with or without a model's answers."""

import json
import pathlib

from internvl3_jax.evaluate import asking, command
from tests.support import evaluate_world as world

MODEL = str(pathlib.Path(__file__).parents[2] / "examples" / "tiny_digits")


def evaluate(data, output, names, *more: str) -> int:
    return command.main(
        ["--checkpoint", MODEL, "--data", str(data), "--tasks", ",".join(names)]
        + ["--output", str(output), "--compilation_cache", "", *more]
    )


def rescore(data, output, names, *more: str) -> int:
    return command.main(
        ["--rescore", "--data", str(data), "--tasks", ",".join(names), "--output", str(output)]
        + list(more)
    )


def read_report(output) -> dict:
    return json.loads((output / "report.json").read_text())


class StandIn:
    """In place of `asking.answer`: right answers, and a record of what was asked."""

    def __init__(self, monkeypatch, stop_after: int | None = None, wrong: tuple[str, ...] = ()):
        self.asked, self.options, self.stop_after, self.wrong = [], [], stop_after, wrong
        self.rows = {}
        monkeypatch.setattr(asking, "answer", self)
        make_question = asking.make_question

        def remember(variant, row):
            self.rows[row.where] = (variant, row)
            return make_question(variant, row)

        monkeypatch.setattr(asking, "make_question", remember)

    def __call__(self, chat, questions, options, rows):
        for question in questions:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(question.name)
            self.options.append(options)
            yield {"text": self.text(question.name), "finish": "stop"}

    def text(self, name: str) -> str:
        variant, row = self.rows[name]
        wrong = row.id in self.wrong or (variant.frames and variant.frames < 32)
        return "?" if wrong else world.right_answer(variant.task, row)
