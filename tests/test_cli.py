"""Console scripts and shipped recipes, in a clone. tests/test_install.py tries them in a wheel."""

import pathlib
import runpy
import sys
import tomllib

import pytest

from internvl3_jax import cli
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.training import settings

pytestmark = pytest.mark.smoke

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_script_has_a_function_and_a_command(monkeypatch):
    assert SCRIPTS.keys() == cli.COMMANDS.keys()
    started = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: started.append(path))
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: started.append(name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "_script", False)
    for script, target in SCRIPTS.items():
        module, function = target.split(":")
        assert module == cli.__name__
        getattr(cli, function)()
        command = cli.COMMANDS[script]
        assert command.removeprefix("python ").removeprefix("-m ") in started[-1], script


def test_help_names_the_command_that_was_started(monkeypatch):
    text = "python train.py --config X; python -m internvl3_jax.fit"
    monkeypatch.setattr(cli, "_script", False)
    assert cli.as_typed(text) == text
    monkeypatch.setattr(cli, "_script", True)
    assert cli.as_typed(text) == "internvl3-train --config X; internvl3-fit"


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "finetune.py"
    for name in ("finetune.py", "configs/finetune.py", str(shipped)):
        assert cli.find_recipe(pathlib.Path(name)) == shipped
        assert settings.read(f"{name}:2b") == settings.read(f"{shipped}:2b")
    for name in ("nosuch.py", "/nosuch/finetune.py", "other/finetune.py"):
        assert cli.find_recipe(pathlib.Path(name)) == pathlib.Path(name)
    with pytest.raises(UsageError, match=r"finetun\.py: no such file; did you mean 'finetune\.py'"):
        settings.read("finetun.py")


def test_a_file_of_the_user_comes_first_and_may_import_the_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "import dataclasses\nfrom configs.finetune import get_config as finetune\n"
    text += "def get_config(name):\n    return dataclasses.replace(finetune(name), steps=7)\n"
    (tmp_path / "finetune.py").write_text(text)
    assert settings.read("finetune.py:1b").steps == 7
    assert settings.read("configs/finetune.py:1b").steps == 1_000
