"""Counts the modules of the package that one training step and one answered question run through.

    python tools/modules_on_path.py step
    python tools/modules_on_path.py answer

A module counts if one of its functions runs; an import alone does not count. Both run the digits
model for the first time, so that its programs are traced.

    step     the next batch with the preparation of its samples, the update with its compilation,
             and a row of the log; without start-up, evaluation and saving
    answer   one question about one image, to a `Chat` that is loaded
"""

import collections
import dataclasses
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = f"{ROOT / 'internvl3_jax'}/"
sys.path.insert(0, str(ROOT))


class Recorder:
    """Notes which functions of the package run, in any thread, while `on` is set."""

    def __init__(self):
        self.on, self.functions = False, collections.defaultdict(set)
        sys.setprofile(self._note)
        threading.setprofile(self._note)

    def _note(self, frame, event: str, argument) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if self.on and event == "call" and path.startswith(PACKAGE) and name != "<module>":
            self.functions[path.removeprefix(PACKAGE)].add(name)

    def print_table(self) -> None:
        """Prints the modules, each with the number of its functions that ran."""
        sys.setprofile(None)
        threading.setprofile(None)
        for path, names in sorted(self.functions.items()):
            print(f"{len(names):4}  {path}")
        print(f"{len(self.functions)} modules")


class FirstStepDone(Exception):
    """Ends the run after its first row of the log."""


def record_step(recorder: Recorder) -> None:
    """Runs the first step of the digits model's training."""
    import train
    from configs.tiny_digits import get_config

    next_batch, log_step, save_config = train.next_batch, train.log_step, train.save_config

    def counted_batch(*arguments):
        recorder.on = True
        return next_batch(*arguments)

    def uncounted_save(*arguments):
        # Written once in a run
        recorder.on = False
        save_config(*arguments)
        recorder.on = True

    def counted_log(*arguments):
        log_step(*arguments)
        recorder.on = False
        raise FirstStepDone

    train.next_batch, train.save_config = counted_batch, uncounted_save
    train.log_step = counted_log
    config = get_config()
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, every=1))
    with tempfile.TemporaryDirectory() as folder:
        try:
            train.fit(config, Path(folder))
        except FirstStepDone:
            return


def record_answer(recorder: Recorder) -> None:
    """Asks the digits model about one of its images."""
    from internvl3_jax import Chat, load

    digits = ROOT / "examples" / "tiny_digits"
    chat = Chat(load(str(digits)))
    recorder.on = True
    chat("Where is the <ref>8</ref>?", images=[str(digits / "pictures" / "10_locate.png")])
    recorder.on = False


def main() -> None:
    """Counts what the command line names."""
    paths = {"step": record_step, "answer": record_answer}
    if len(sys.argv) != 2 or sys.argv[1] not in paths:
        sys.exit(f"error: give one of {', '.join(paths)}")
    recorder = Recorder()
    paths[sys.argv[1]](recorder)
    recorder.print_table()


if __name__ == "__main__":
    main()
