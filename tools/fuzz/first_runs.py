"""Makes the inputs that only the programs can make: a finished run, answers, log-probabilities."""

import os
import pathlib
import sys
import warnings
from collections.abc import Callable

from tools.fuzz import programs


def train_and_answer(corpus: pathlib.Path, needed: set[str]) -> None:
    """Makes a finished run, half of the answers and the reference model's log-probabilities."""
    os.chdir(corpus)
    if "run" in needed:
        in_child(lambda: programs.train(()))
    if "pairs" in needed:
        in_child(lambda: programs.make_reference(()))
    if "ask" in needed:
        in_child(lambda: programs.infer(()))
        lines = (corpus / "answers.jsonl").read_text().splitlines(keepends=True)
        (corpus / "answers.jsonl").unlink()
        (corpus / "ask/answers.jsonl").write_text("".join(lines[:2]))


def in_child(work: Callable[[], object]) -> None:
    """Calls `work` in a forked process: this one must never start an accelerator or a thread.

    RuntimeError with its output if it fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of every fork
        reader, writer = os.pipe()
        child = os.fork()
    if not child:
        status = 1
        try:
            for number in (1, 2):
                os.dup2(writer, number)
            os.close(reader)
            work()
            status = 0
        except SystemExit as end:
            status = int(bool(end.code))
            print(end.code if isinstance(end.code, str) else "")
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as file:
        said = file.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the good inputs could not be made:\n{said[-2000:]}")
