"""The shapes in signatures are true: the tiny model runs with all of them checked."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "support/shape_checks.py"


@functools.cache
def results() -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("check", "seen"),
    [
        ("forward", [8, 32, 460]),
        ("prefill_and_decode", [8, 1, 512]),
        ("generate", 6),
        ("train", ["loss"]),
        ("train_lora", ["loss"]),
    ],
)
def test_annotated_shapes_are_true(check, seen):
    assert results()[check] == seen


def test_a_wrong_shape_is_refused():
    """Values with another number of tokens than the keys."""
    message = results()["refused"]
    assert "attention.attention" in message and "typechecking parameter 'v'" in message, message


def test_nothing_is_checked_without_the_hook():
    """The annotations cost nothing in ordinary runs."""
    script = (
        "import sys, internvl3_jax.model.internvl, internvl3_jax.training.step;"
        "assert not any(name.split('.')[0] == 'beartype' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SCRIPT.parent.parent)
