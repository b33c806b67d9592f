"""Every supported pair of Python and jax: all modules import, all programs start."""

import ast
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
from tests.support.rooms import NEEDS_KIT

pytestmark = pytest.mark.smoke

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(
    module.name
    for package in (internvl3_jax, convert)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
    and module.name.removeprefix("internvl3_jax.") not in NEEDS_KIT
)
PROGRAMS = {
    "convert": ["-m", "convert"],
    "doctor": ["-m", "internvl3_jax.data.doctor"],
    "evaluate": ["-m", "internvl3_jax.evaluate"],
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


def public_names() -> dict[str, str]:
    """Name -> module, as internvl3_jax/__init__.py tells type checkers."""
    tree = ast.parse(pathlib.Path(internvl3_jax.__file__).read_text())
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("internvl3_jax.")
        for alias in node.names
    }


def test_the_public_names_are_what_type_checkers_see():
    names = public_names()
    assert sorted(names) == sorted(internvl3_jax.__all__)
    for name, module in names.items():
        assert getattr(internvl3_jax, name) is getattr(importlib.import_module(module), name)
    assert {"load", "Chat", "__version__"} <= set(dir(internvl3_jax))
    with pytest.raises(AttributeError, match="no attribute 'Chatt'"):
        _ = internvl3_jax.Chatt


def test_the_package_is_imported_without_jax():
    script = "import sys, internvl3_jax; internvl3_jax.TrainConfig; print('jax' in sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_versions():
    assert internvl3_jax.__version__ == PROJECT["version"]
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
    assert "usage: __main__" not in done.stdout
