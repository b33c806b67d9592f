"""command_line.py: every program's usage errors, refusals, help, Ctrl-C and lost readers; each as a
program of its own.
"""

import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from internvl3_jax.io import command_line
from internvl3_jax.io.command_line import Parser, UsageError, call, message, naming

pytestmark = pytest.mark.smoke
ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = '''"""Does a thing.

    python program.py --name x
"""
import sys, time
from absl import flags
from internvl3_jax.io import command_line

flags.DEFINE_string("name", None, "Of the thing.", required=True)
flags.DEFINE_integer("count", 1, "Times.", lower_bound=1)

def main(arguments):
    name = flags.FLAGS.name
    if arguments[1:]:
        raise command_line.UsageError(f"what is {arguments[1]!r}?")
    if name == "value":
        raise ValueError("two\\nlines \\x1b[2J")
    if name == "missing":
        open("no/such/file")
    if name == "wait":
        print("waiting", flush=True)
        time.sleep(60)
    if name == "defect":
        raise RuntimeError("ours")
    for number in range(100_000 if name == "much" else 1):
        print(number)

if __name__ == "__main__":
    command_line.run(main)
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--name=x"], 0, ""),
        ([], 2, "error: --name is missing; run it with --help for all options"),
        (
            ["--nam=x"],
            2,
            "error: --nam: there is no such option; did you mean 'name'? Run it with --help for all options",
        ),
        (["--name=x", "--count=0"], 2, "error: --count=0: 0 is not a positive integer"),
        (["--name=x", "more"], 2, "error: what is 'more'? Run it with"),
        (["--name=value"], 1, r"error: two; lines \x1b[2J"),
        (["--name=missing"], 1, "error: no/such/file: No such file or directory"),
    ],
)
def test_a_program_says_it_in_one_line(program, arguments, status, said):
    run = subprocess.run(
        [*program, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert run.returncode == status
    assert run.stderr.startswith(said) and run.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpfull"])
def test_help_is_no_error(program, flag):
    run = subprocess.run(
        [*program, flag], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert run.returncode == 0 and run.stderr == ""
    assert "python program.py --name x" in run.stdout and "Of the thing." in run.stdout


def test_our_own_defects_keep_their_traceback(program):
    run = subprocess.run(
        [*program, "--name=defect"], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert (
        run.returncode == 1
        and "Traceback" in run.stderr
        and run.stderr.endswith("RuntimeError: ours\n")
    )


# Runs a program with the default SIGINT: what a shell starts in the background ignores it.
LISTENING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_ctrl_c_is_one_line(program):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, *program, "--name=wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "interrupted")


@pytest.mark.parametrize("name", ["much", "little"])
def test_a_reader_that_leaves_ends_it_quietly(program, name):
    """Also when the lost text is still in the buffer at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [*program, f"--name={name}"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


def test_call_gives_the_status(capsys):
    def fails(error):
        raise error

    assert call(lambda: None) == 0 and call(lambda: 3) == 3
    assert (
        call(lambda: fails(ValueError("bad"))) == 1
        and call(lambda: fails(ValueError("bad")), failed=2) == 2
    )
    assert call(lambda: fails(UsageError("give --x"))) == 2
    assert call(lambda: fails(ImportError("no x")), ImportError) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: bad"] * 2 + [
        "error: give --x; run it with --help for all options",
        "error: no x",
    ]
    with pytest.raises(KeyError):
        call(lambda: fails(KeyError("ours")))


def test_the_parser_refuses_in_one_line(capsys):
    parser = Parser("program")
    parser.add_argument("--length", type=int, default=3)
    for given, said in [
        (["--lenght", "3"], "unrecognized arguments: --lenght 3; did you mean '--length'?"),
        (["--len", "3"], "unrecognized arguments: --len 3"),
        (["--length", "x"], "argument --length: invalid int value: 'x'"),
    ]:
        assert call(lambda given=given: parser.parse_args(given)) == command_line.USAGE
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert call(lambda: parser.parse_args(["--help"])) == 0


def test_a_full_disk_has_the_files_name():
    with pytest.raises(OSError) as caught, naming("answers.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert message(caught.value) == "answers.jsonl: No space left on device"
    assert message(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert (
        message(FileNotFoundError(errno.ENOENT, "No such file", "a\x1bb"))
        == r"a\x1bb: No such file"
    )
    assert message(ValueError()) == "ValueError"


def test_help_is_grouped_and_complete(capsys):
    """-h shows every flag of infer.py once, under its heading, within the terminal's width."""
    environment = os.environ | {"COLUMNS": "80"}
    shown = subprocess.run(
        [sys.executable, ROOT / "infer.py", "-h"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    from internvl3_jax.inference import answer_flags

    names = [name for section in answer_flags.SECTIONS.values() for name in section]
    assert sorted(re.findall(r"^  --(\w+)", shown.stdout, flags=re.M)) == sorted(names)
    assert set(names) >= {
        flag.name for flag in answer_flags.FLAGS.get_key_flags_for_module(answer_flags)
    }
    assert [
        heading for heading in answer_flags.SECTIONS if f"\n{heading}:\n" not in shown.stdout
    ] == []
    options = shown.stdout.split("\nModel:\n")[1]
    assert max(map(len, options.splitlines())) <= 80 and "repeat this option" not in options


def test_an_image_in_the_place_of_a_path_does_not_fill_the_terminal():
    text = message(OSError(36, "File name too long", "data:image/png;base64," + "A" * 2_000_000))
    assert len(text) < 600 and text.startswith("data:image/png;base64,AAA") and "2,000,0" in text


@pytest.mark.parametrize("flag", ["json", "text"])
def test_fit_writes_over_nothing(tmp_path, flag):
    """And says so before any work."""
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    command = [
        sys.executable,
        "-m",
        "internvl3_jax.fit",
        "--config=configs/finetune.py:2b",
        "--topology=v5e:4x4",
        "--analytic",
    ]
    for value, reason in ((mine, "which exists"), (tmp_path / "none" / "x", "there is no folder")):
        ended = subprocess.run(
            [*command, f"--{flag}={value}"], capture_output=True, text=True, cwd=ROOT
        )
        assert (
            ended.returncode == 2
            and ended.stdout == ""
            and f"error: --{flag} is {value}" in ended.stderr
        )
        assert reason in ended.stderr
    assert mine.read_text() == "mine"
