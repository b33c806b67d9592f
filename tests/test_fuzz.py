"""A part of the damaged inputs of tools/fuzz, and that the fuzz program notices what it is there
for.
"""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Those that need neither a training nor answers.
QUICK = (
    "safetensors",
    "index",
    "config",
    "preprocessor",
    "tokenizer",
    "tokenizer.json",
    "adapter",
    "checkpoint",
)
QUICK += ("images", "rows", "meta", "shards")
COUNT = 120
pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(rows, what was printed) of a run of the program, as a person starts it."""
    output = tmp_path_factory.mktemp("fuzz") / "verdicts.jsonl"
    command = [
        sys.executable,
        "-m",
        "tools.fuzz",
        "--kinds",
        *QUICK,
        "--count",
        str(COUNT),
        "--jobs",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert output.exists(), done.stdout + done.stderr
    return [json.loads(line) for line in output.read_text().splitlines()], done


def test_damaged_inputs_are_refused_in_a_clear_line_or_read_rightly(drawn):
    rows, done = drawn
    assert [row for row in rows if row["short"]] == []
    assert done.returncode == 0
    # The shares are rounded down, and of each kind there is the undamaged input besides.
    assert COUNT - len(QUICK) <= len(rows) - len(QUICK) <= COUNT + len(QUICK)
    assert {row["kind"] for row in rows} == set(QUICK)


def test_the_undamaged_inputs_are_accepted(drawn):
    found = {row["kind"]: row["verdict"] for row in drawn[0] if row["input"] == "undamaged"}
    assert found == dict.fromkeys(QUICK, "rightly accepted")


# A program of each kind of fault. They are run in a process without threads, as the fuzz program is
# one.
FAULTS = """
import pathlib, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
from tools.fuzz.case import Case, Kind, undamaged
from tools.fuzz.judge import judge
from tools.fuzz.server import run_all

def good(arguments):
    return print("7")

def refuse(arguments):
    sys.exit("error: file.txt: is damaged; download it again")

def unnamed(arguments):
    sys.exit("error: invalid")

def escape(arguments):
    sys.exit("error: file.txt: \\x1b[2J")

def trace(arguments):
    raise KeyError("file.txt")

def hang(arguments):
    open("pipe").read()

def swallow(arguments):
    bytearray(1 << 40)

def another(arguments):
    print("8")

def leave(arguments):
    pathlib.Path("out").mkdir()
    refuse(arguments)

def crash(arguments):
    import os
    os.abort()

def spoil(folder):
    import os
    os.mkfifo(folder / "pipe")

def result(folder):
    return (folder / ".out").read_text()

corpus, scratch = (pathlib.Path(tempfile.mkdtemp(dir=sys.argv[2])) for _ in range(2))
(corpus / "file.txt").write_text("x")
for expect, program in [("refuse", refuse), ("refuse", good), ("accept", good), ("accept", another), ("same", another), ("either", another),
                        ("accept", refuse), ("refuse", unnamed), ("refuse", escape), ("refuse", trace), ("either", hang),
                        ("either", swallow),
                        ("refuse", leave), ("refuse", crash), ("warn", good)]:
    kind = Kind("kind", ("file.txt",), program, lambda rng: [], result, ("out",), seconds=2 if program is hang else 60)
    case = Case("kind", f"{expect} {program.__name__}", expect, spoil, ("file.txt",))
    (outcome,) = run_all([(kind, case)], corpus, pathlib.Path(tempfile.mkdtemp(dir=scratch)), 1)
    print(f"{case.name}: {judge(outcome, '7' + chr(10)).name}")
"""
VERDICTS = """
refuse refuse: clear
refuse good: SILENT
accept good: rightly accepted
accept another: WRONG
same another: SILENT
either another: rightly accepted
accept refuse: WRONG
refuse unnamed: UNNAMED
refuse escape: WRONG
refuse trace: TRACEBACK
either hang: HANG
either swallow: MEMORY
refuse leave: WRONG
refuse crash: TRACEBACK
warn good: SILENT
"""


def test_each_kind_of_fault_is_noticed(tmp_path):
    command = [sys.executable, "-c", FAULTS, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == VERDICTS.strip(), done.stdout + done.stderr


def test_the_same_seed_makes_the_same_inputs():
    from tools.fuzz.case import Case, Kind, all_cases
    from tools.fuzz.mutate import flip_changes

    def cases(rng):
        return [
            Case("kind", *change, ("file",)) for change in flip_changes("file", rng, 5, "either")
        ]

    kind = Kind("kind", (), print, cases)
    ids = [[case.id for case in all_cases(kind, seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] and not set(ids[0]) & set(ids[2])
    twice = Kind("kind", (), print, lambda rng: cases(rng)[:1] * 2)
    with pytest.raises(ValueError, match="two inputs are called 'file bit"):
        all_cases(twice, 0)


@pytest.mark.parametrize("expect", ["refused", ""])
def test_an_unknown_expectation_is_refused(expect):
    from tools.fuzz.case import Case

    with pytest.raises(ValueError, match="is none of"):
        Case("kind", "name", expect, print, ())
