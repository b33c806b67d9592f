"""What must hold on every supported pair of Python and jax: all modules import, all programs start."""

import importlib
import importlib.metadata
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

import convert
import internvl3_jax

pytestmark = pytest.mark.smoke

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(
    module.name
    for package in (internvl3_jax, convert)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
)
PROGRAMS = {
    "convert": ["-m", "convert"],
    "tokens": ["-m", "internvl3_jax.data.tokens"],
    "infer.py": ["infer.py"],
    "train.py": ["train.py"],
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"[\d.]*\d", version)[0].split(".")))


def test_modules_import():
    """Every module of both packages, each with a docstring."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    assert [name for name, module in modules.items() if not module.__doc__] == []


def test_versions():
    assert importlib.metadata.version("internvl3-jax") == PROJECT["version"]
    assert sys.version_info[:2] >= numbers(PROJECT["requires-python"].removeprefix(">="))
    for requirement in PROJECT["dependencies"]:
        name, minimum = requirement.split(">=")
        assert numbers(importlib.metadata.version(name)) >= numbers(minimum), requirement


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_explains_itself(program):
    """--help prints the usage. Not the exit status: absl's own is 1."""
    command = [sys.executable, *PROGRAMS[program], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search(r"(?im)^usage|^flags:|^  -", done.stdout), f"{done.stdout}\n{done.stderr}"
