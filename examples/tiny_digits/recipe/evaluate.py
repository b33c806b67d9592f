"""Scores a run of configs/tiny_digits.py on unseen handwriting, and writes RUN/report.json.

    python examples/tiny_digits/recipe/evaluate.py runs/tiny_digits

Prompts and generation are those of inference.
"""

import argparse
import json
import pathlib
import platform
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from examples.tiny_digits.recipe import data
from internvl3_jax import Checkpoint, load
from internvl3_jax.data.batch import cut_images, make_prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.io import safe_files
from internvl3_jax.training.run_log import LOG, read_rows

_BATCH = 50
_LIMIT = 96  # tokens; the longest answer names five boxes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="the --workdir of the training")
    parser.add_argument(
        "--per_task", type=int, default=500, help="questions per task (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        scores = evaluate(load(options.run), options.per_task)
        write(options.run, scores, options.per_task)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        "\n".join(
            ["unseen handwriting"]
            + [f"  {name:<8} {100 * value:6.2f} %" for name, value in scores.items()]
        )
    )


def evaluate(checkpoint: Checkpoint, per_task: int, delta: int | None = None) -> dict[str, float]:
    """Returns task -> fraction of correct greedy answers, and "digit" -> fraction of correct digits
    in "read".

    delta: V2PE step in units of 1/256; None is the processor's.
    """
    processor, tokenizer = checkpoint.processor, checkpoint.tokenizer
    stop_ids = [tokenizer.token_id(token) for token in processor.stop_tokens]
    generator = Generator(checkpoint.config, jax.device_get(checkpoint.params), stop_ids=stop_ids)
    questions = data.held_out(per_task)
    answers = []
    for start in range(0, len(questions), _BATCH):
        prompts = [
            _prompt(question, tokenizer, processor, delta)
            for question in questions[start : start + _BATCH]
        ]
        run = GenerationConfig(
            _LIMIT, Sampling(), (0,) * len(prompts), checkpoint.config.language.rope_scaling
        )
        answers += [tokenizer.decode(ids).strip() for ids in generator.generate(prompts, run)]
    return score(questions, answers)


def score(questions: list[data.Question], answers: list[str]) -> dict[str, float]:
    scores = {}
    for task in data.TASKS:
        right = [
            data.is_right(q.task, q.answer, a)
            for q, a in zip(questions, answers, strict=True)
            if q.task == task
        ]
        scores[task] = sum(right) / len(right)
    read = [(q.answer, a) for q, a in zip(questions, answers, strict=True) if q.task == "read"]
    hits = sum(
        digit == answered_digit
        for expected, answered in read
        for digit, answered_digit in zip(expected, answered, strict=False)
    )
    digits = sum(max(len(expected), len(answered)) for expected, answered in read)
    return scores | {"digit": hits / digits}


def write(run: pathlib.Path, scores: dict[str, float], per_task: int) -> None:
    """Writes RUN/report.json: scores, steps, seconds, machine and versions."""
    last = [row for row in read_rows(run / LOG) if "loss" in row][-1]
    report = {
        "held_out": {name: round(value, 4) for name, value in scores.items()},
        "questions_per_task": per_task,
        "steps": last["step"],
        "last_loss": last["loss"],
        "training_seconds": round(last["seconds"], 1),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    safe_files.replace(run / "report.json", json.dumps(report, indent=1) + "\n")


def _prompt(question: data.Question, tokenizer, processor, delta: int | None):
    units = [processor.delta if delta is None else delta] * len(question.images)
    return make_prompt(
        question.messages[:-1],
        cut_images(question.images, processor),
        tokenizer,
        processor,
        units,
    )


if __name__ == "__main__":
    main()
