"""Kills training or batch inference with SIGKILL again and again, resumes it, and compares with
what was never interrupted.

    python tools/kill.py training --kills 50
    python tools/kill.py requests --kills 50

Training has worker processes, saves, evaluations and answers to eval questions, and is slowed
so that a kill can hit each of them:
while it starts, in a step, while a step's checkpoint is written, while it evaluates, at any time. A
run is killed several times on its way, until it ends; then the log without times, answers.jsonl,
skipped.txt, and the parameters and optimizer state of its last checkpoint must equal the
uninterrupted run's. Of inference, the answers must be the same, in order and once. The exit status
is 1 if anything differs. The same seed draws the same kinds of moments.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from kill_state import REQUESTS, ROOT, answers, compared, environment, state, write_requests

PHASES = ("starting", "step", "saving", "evaluating", "any time")
STEPS, SAVE_EVERY, EVALUATE_EVERY = 28, 4, 6
# Batches are delayed, so that kills hit each phase.
CONFIG = f"""\
import dataclasses, os, time
from internvl3_jax.data.loader import BatchLoader
from tests.support.official_run import official_config
from tests.support.tiny_checkpoint import changed

following = BatchLoader.__next__
def slowly(self):
    time.sleep(0.15)
    return following(self)
BatchLoader.__next__ = slowly

def get_config():
    config = official_config(os.environ["META"])
    data = dataclasses.replace(config.data, workers=1)
    return changed(config, steps={STEPS}, checkpoint__every={SAVE_EVERY}, eval__every={EVALUATE_EVERY},
                   eval__batches=1, data=data, micro_batches=1, remat_vision="none",
                   remat_language="none")
"""
# infer.py with a delay before each batch.
SLOW_INFER = """\
import runpy, sys, time
from internvl3_jax.inference.chat import Chat
answer_many = Chat.answer_many
def slowly(*arguments, **options):
    time.sleep(0.2)
    return answer_many(*arguments, **options)
Chat.answer_many = slowly
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Killer:
    """Starts programs, kills them and counts the kills.

    environment: variables added to those of this process.
    scratch: folder for logs.
    """

    def __init__(self, environment: dict[str, str], scratch: pathlib.Path, rng: random.Random):
        self.environment, self.scratch, self.rng = os.environ | environment, scratch, rng
        self.hits, self.lost = collections.Counter(), []

    def start(self, command: list[str]) -> subprocess.Popen:
        output = (self.scratch / "output.txt").open("w")
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=self.scratch,
            start_new_session=True,
        )

    def said(self) -> str:
        return (self.scratch / "output.txt").read_text(errors="replace")

    def finish(self, process: subprocess.Popen) -> None:
        """Waits for a program that is not killed. SystemExit with its output if it fails."""
        if process.wait(900):
            sys.exit(f"error: it ended with {process.returncode}:\n{self.said()[-3000:]}")

    def kill(self, process: subprocess.Popen) -> bool:
        """Kills the program and its workers; returns False if it had ended."""
        if process.poll() is not None:
            self.finish(process)
            return False
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True

    def wait_for(self, process: subprocess.Popen, reached, seconds: float = 300) -> bool:
        """Waits for `reached`; returns False if the program ends before or time is up."""
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            if reached():
                return True
            time.sleep(0.002)
        return False


# --- training ------------------------------------------------------------------------------------


def training(kills: int, scratch: pathlib.Path, rng: random.Random) -> list[str]:
    """Kills and resumes training; returns a line for each difference to an undisturbed run."""
    sys.path.insert(0, str(ROOT))
    from tests.support.official_run import write_official

    (scratch / "data").mkdir()
    meta = write_official(scratch / "data")
    (scratch / "config.py").write_text(CONFIG)
    killer = Killer(environment(scratch) | {"META": meta}, scratch, rng)
    command = [sys.executable, str(ROOT / "train.py"), f"--config={scratch / 'config.py'}"]
    killer.finish(killer.start([*command, f"--workdir={scratch / 'whole'}"]))
    began = time.monotonic()
    # a second run, with all programs compiled, to time
    killer.finish(killer.start([*command, f"--workdir={scratch / 'again'}"]))
    wanted, duration, wrong, number = (
        state(scratch / "whole", STEPS),
        time.monotonic() - began,
        [],
        0,
    )
    wrong += compared("the second uninterrupted run", state(scratch / "again", STEPS), wanted)
    done = 0
    while done < kills:
        number += 1
        run, ended = scratch / f"run{number}", False
        while done < kills and not ended:
            ended = not kill_training(killer, command, run, duration)
            done += not ended
            if not ended:
                print(
                    f"{done:3} of {kills} kills; {last_step(run)} of {STEPS} steps of training {number} are logged",
                    flush=True,
                )
        if not ended:
            killer.finish(killer.start([*command, f"--workdir={run}"]))
        wrong += compared(f"training {number}", state(run, STEPS), wanted)
    print_counts(killer, f"{done} kills of {number} trainings, each carried to its end")
    return wrong


def kill_training(killer: Killer, command: list[str], run: pathlib.Path, duration: float) -> bool:
    """Starts training and kills it; returns False if it ended first."""
    phase = killer.rng.choice(PHASES)
    wait = killer.rng.random()
    before = last_step(run)
    process = killer.start([*command, f"--workdir={run}"])
    if phase == "starting":
        time.sleep(wait * duration / 4)
    elif phase == "any time":
        time.sleep(wait * duration)
    elif phase == "step":
        if killer.wait_for(process, lambda: "\nstep " in killer.said()):
            time.sleep(wait * 3)
    elif phase == "saving":
        if killer.wait_for(process, lambda: unfinished(run)):
            time.sleep(wait * 0.1)
    elif killer.wait_for(
        process, lambda: last_step(run) > before and last_step(run) % EVALUATE_EVERY == 0
    ):
        time.sleep(wait * 0.3)
    writing = unfinished(run)
    if not killer.kill(process):
        return False
    killer.hits[phase] += 1
    killer.hits["(with an unfinished step on the disk)"] += writing
    killer.lost.append(max(0, last_step(run) - newest(run)))
    return True


def unfinished(run: pathlib.Path) -> bool:
    """Returns whether a step is being written: checkpoints/ has an entry that is no step number."""
    try:
        return any(not entry.name.isdigit() for entry in (run / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def last_step(run: pathlib.Path) -> int:
    """Returns the last step in the log."""
    path = run / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-3:]), default=0)


def newest(run: pathlib.Path) -> int:
    """Returns the newest step with its final name."""
    folder = run / "checkpoints"
    return (
        max((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), default=0)
        if folder.is_dir()
        else 0
    )


# --- requests ------------------------------------------------------------------------------------


def requests(kills: int, scratch: pathlib.Path, rng: random.Random) -> list[str]:
    """Kills and resumes batch inference; returns a line for each difference."""
    killer = Killer(environment(scratch), scratch, rng)
    write_requests(scratch)
    command = [
        sys.executable,
        "-c",
        SLOW_INFER,
        str(ROOT / "infer.py"),
        f"--checkpoint={scratch / 'model'}",
    ]
    command += [
        f"--requests={scratch / 'requests.jsonl'}",
        "--batch_size=2",
        "--max_new_tokens=12",
        "--temperature=1.5",
    ]
    command += [f"--compilation_cache={scratch / 'compiled'}"]
    killer.finish(killer.start([*command, f"--output={scratch / 'whole.jsonl'}"]))
    wanted, duration, wrong, number, done = answers(scratch / "whole.jsonl"), 20.0, [], 0, 0
    if len(wanted) != REQUESTS:
        return [f"the uninterrupted run wrote {len(wanted)} of {REQUESTS} answers"]
    while done < kills:
        number += 1
        output, ended = scratch / f"answers{number}.jsonl", False
        while done < kills and not ended:
            began, before = time.monotonic(), size(output)
            process = killer.start([*command, f"--output={output}"])
            if rng.random() < 0.3:
                time.sleep(rng.random() * duration / 2)
            elif killer.wait_for(
                process, lambda output=output, before=before: size(output) > before
            ):
                time.sleep(rng.random() * 2)
            ended = not killer.kill(process)
            if ended:
                duration = time.monotonic() - began
                continue
            done += 1
            killer.hits["answering" if size(output) > before else "starting"] += 1
            killer.hits["(within a line)"] += size(output) > 0 and not output.read_bytes().endswith(
                b"\n"
            )
            print(f"{done:3} of {kills} kills; {size(output):,} bytes of pass {number}", flush=True)
        if not ended:
            killer.finish(killer.start([*command, f"--output={output}"]))
        found = answers(output)
        wrong += [f"pass {number}: {len(found)} answers for {REQUESTS} questions"] * (
            len(found) != REQUESTS
        )
        wrong += [f"pass {number}: the answers differ"] * (found != wanted)
    print_counts(
        killer,
        f"{done} kills of {number} passes over {REQUESTS} questions, each carried to its end",
    )
    return wrong


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- both ----------------------------------------------------------------------------------------


def print_counts(killer: Killer, what: str) -> None:
    print(what)
    for phase, count in killer.hits.items():
        print(f"  {count:3} {phase}")
    if killer.lost:
        mean = sum(killer.lost) / len(killer.lost)
        print(
            f"  steps to compute again after a kill: mean {mean:.1f}, at most {max(killer.lost)} (a save every {SAVE_EVERY})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        "kill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=("training", "requests"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_") as scratch:
        run = {"training": training, "requests": requests}[options.program]
        wrong = run(options.kills, pathlib.Path(scratch), random.Random(options.seed))
    print(f"{len(wrong)} differences" + "".join(f"\n  {line}" for line in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
