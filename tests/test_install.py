"""Installs in empty environments: what the pages write, with doctor, training, export and infer; and
the wheel outside of a clone, with every console script.

Run by `make test-install`. Of a line with an accelerator's extra, whose libraries are gigabytes,
the same line without it is installed.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.support import documented_world
from tests.support.documents import ROOT, pages

ACCELERATORS = {"gpu", "tpu"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PIP = ("-m", "pip", "--disable-pip-version-check")
QUIET = ("--quiet", "--no-compile")
LINE = re.compile(r"'\.\[([\w,]+)\]'")
TRAIN = ["train.py", "--config", "configs/finetune.py:checkpoints/internvl3-2b"]
TRAIN += ["--config.data.source=meta.json", "--config.steps=4"]
SMALL = ["--config.optimizer.warmup_steps=0", "--config.data.rows=1"]
SMALL += ["--config.data.tokens_per_row=512", "--config.data.tiles_per_row=12"]


def installations() -> list[tuple[str, ...]]:
    """Sets of extras, smaller ones first, that the pages and the recipes' and programs' own texts
    install, accelerators left out.
    """
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages()]
    found = {
        tuple(sorted(set(extras.split(",")) - ACCELERATORS))
        for text in texts
        for extras in LINE.findall(text)
    }
    return sorted(found, key=lambda extras: (len(extras), extras))


@pytest.mark.smoke
def test_the_pages_install_what_training_needs():
    """The line of docs/training.md is README's, and there is one without any extra: the two that
    are tried below.
    """
    one = [(name,) for name in ("documents", "quant", "serve", "storage", "video")]
    assert installations() == [(), *one, ("documents", "video"), ("logging", "video")]
    written = [
        set(LINE.findall((ROOT / page).read_text())) for page in ("README.md", "docs/training.md")
    ]
    assert {"gpu,video,logging", "tpu,video,logging"} <= written[0] & written[1]


@pytest.mark.smoke
def test_remedies_name_extras_that_exist():
    """Nothing is published under the package's name: a message says how to install the clone."""
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    for path in [
        *ROOT.glob("internvl3_jax/**/*.py"),
        *ROOT.glob("convert/*.py"),
        *ROOT.glob("*.py"),
        *ROOT.glob("configs/*.py"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install ['\"]?internvl3", text), path
        for extras in LINE.findall(text):
            assert set(extras.split(",")) <= set(known), path


class Environment:
    """A virtual environment and a folder with the pages' files."""

    def __init__(self, folder: pathlib.Path):
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.world = documented_world.build(
            folder / "clone", "", "meta.json checkpoints/internvl3-2b receipt.jpg"
        )
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}

    def install(self, extras: tuple[str, ...]) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        place = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
        self.run(
            *PIP,
            "install",
            *QUIET,
            "--constraint",
            str(ROOT / "requirements" / f"constraints-{version}.txt"),
            "--editable",
            place,
        )

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.world,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("install"))


# Each in the environment of the smaller ones before it, as pip only adds.
@pytest.mark.install
@pytest.mark.parametrize(
    "extras", [(), ("logging", "video")], ids=lambda extras: ",".join(extras) or "none"
)
def test_documented_installation(environment, extras):
    environment.install(extras)
    name = "-".join(extras) or "none"
    environment.run(
        "-m", "internvl3_jax.data.doctor", "meta.json", "--tokenizer", "checkpoints/internvl3-2b"
    )
    printed = environment.run(*TRAIN, *SMALL, "--workdir", f"runs/{name}")
    run = environment.world / "runs" / name
    assert ("matplotlib" in printed) == ("logging" not in extras)
    assert (run / "loss.png").exists() == ("logging" in extras) and (run / "log.jsonl").exists()
    if extras:
        environment.run("-m", "convert", f"runs/{name}", "exported", "--to", "internvl")
        question = (
            "--image",
            "receipt.jpg",
            "--prompt",
            "What is the total?",
            "--max_new_tokens",
            "4",
        )
        assert environment.run("infer.py", "--checkpoint", "exported", *question).strip()


# --- the wheel -----------------------------------------------------------------------------------

SCRIPTS = ("convert", "doctor", "fit", "infer", "tokens", "train")
ROWS = [("01_read.png", "39969"), ("02_read.png", "456"), ("04_read.png", "6")]


class WheelEnvironment:
    """A virtual environment with the wheel of a clean export, and a working directory that has only
    what a user would bring: a released model, images and a meta JSON.
    """

    def __init__(self, folder: pathlib.Path):
        self.venv, self.work = folder / "venv", folder / "work"
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONWARNINGS": "ignore"}
        self.work.mkdir()
        self.write_files()
        subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
        self.wheel = self.build(folder)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        constraints = ROOT / "requirements" / f"constraints-{version}.txt"
        self.run("python", *PIP, "install", *QUIET, "--constraint", constraints, self.wheel)

    def write_files(self) -> None:
        model = ROOT / "examples" / "tiny_digits"
        (self.work / "model").mkdir()
        for path in model.iterdir():
            if path.is_file():
                shutil.copy(path, self.work / "model")
        lines = []
        for number, (name, answer) in enumerate(ROWS):
            shutil.copy(model / "pictures" / name, self.work)
            question = {"from": "human", "value": "<image>\nRead the number."}
            turns = [question, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"id": number, "image": name, "conversations": turns}) + "\n")
        (self.work / "rows.jsonl").write_text("".join(lines))
        source = {"root": str(self.work), "annotation": str(self.work / "rows.jsonl")}
        (self.work / "meta.json").write_text(json.dumps({"digits": source}))
        # A recipe of the user's own, on top of a shipped one.
        (self.work / "my_recipe.py").write_text(
            "import dataclasses\n"
            "from configs.finetune import get_config as finetune\n"
            "def get_config(name):\n"
            "    return dataclasses.replace(finetune(name), seed=3)\n"
        )

    def build(self, folder: pathlib.Path) -> pathlib.Path:
        """Builds sdist -> wheel from what git tracks."""
        export, dist = folder / "export", folder / "dist"
        export.mkdir()
        archive = subprocess.run(
            ["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", export], input=archive.stdout, check=True)
        self.run("python", *PIP, "install", *QUIET, "build")
        self.run("python", "-m", "build", "--outdir", dist, export)
        (wheel,) = dist.glob("*.whl")
        return wheel

    def run(self, program: str, *arguments) -> str:
        done = subprocess.run(
            [self.venv / "bin" / program, *arguments],
            cwd=self.work,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == 0, f"{program} {arguments}\n{done.stdout[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    return WheelEnvironment(tmp_path_factory.mktemp("wheel"))


@pytest.mark.install
def test_a_wheel_has_one_top_level_name(installed_wheel):
    with zipfile.ZipFile(installed_wheel.wheel) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"internvl3_jax", f"internvl3_jax-{VERSION}.dist-info"}
    # Every module of the package, the programs, and each recipe but those of examples/
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("internvl3_jax/**/*.py")}
    shipped = [ROOT / "train.py", ROOT / "infer.py", *ROOT.glob("convert/*.py")]
    shipped += [ROOT / "configs" / f"{name}.py" for name in ("common", "finetune", "lora", "mpo")]
    modules |= {f"internvl3_jax/cli/{path.relative_to(ROOT)}" for path in shipped}
    assert modules | {"internvl3_jax/py.typed"} <= set(names)
    assert "internvl3_jax/cli/configs/tiny_digits.py" not in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.install
def test_the_installed_programs_work_outside_of_a_clone(installed_wheel):
    """Help, conversion, an answer, three steps of a shipped and of an own recipe, and the tools."""
    run = installed_wheel.run
    for name in SCRIPTS:
        assert f"internvl3-{name} " in run(f"internvl3-{name}", "-h"), name
    assert "117 tensors" in run("internvl3-convert", "model", "checkpoint", "--verify")
    question = ("--image", "01_read.png", "--prompt", "Read the number.")
    assert run("internvl3-infer", "--checkpoint", "checkpoint", *question).split() == ["39969"]
    assert "0 errors" in run("internvl3-doctor", "meta.json", "--tokenizer", "checkpoint")
    small = ["--config.data.source=meta.json", "--config.steps=3", *SMALL]
    for recipe in ("finetune.py", "my_recipe.py"):
        printed = run(
            *("internvl3-train", "--config", f"{recipe}:checkpoint", "--workdir", recipe[:-3]),
            *small,
        )
        assert "step 3 of 3" in printed and "internvl3-infer --checkpoint" in printed
    assert "1b" in run("internvl3-tokens", "1920x1080")
    planned = run(
        "internvl3-fit", "--config", "finetune.py:1b", "--topology", "v5e:4x4", "--analytic"
    )
    assert "MFU" in planned


# What a type checker must report of a user's code, by line; None: nothing.
USER_CODE = {
    "from internvl3_jax import SIZES, Chat, Critic, Options, TrainConfig, best_of_n, load": None,
    "import internvl3_jax": None,
    "checkpoint = load('DIR', dtype='float32')": None,
    "chat = Chat(checkpoint, temperature=0.2)": None,
    "text: str = chat('What?', images=['cat.jpg'], max_new_tokens=3)": None,
    "score: float | None = best_of_n(chat, Critic(checkpoint), 'What?').candidates[0].score": None,
    "size: int = SIZES['1b'].vision.image_size": None,
    "version: str = internvl3_jax.__version__": None,
    "load('DIR', dtyp='float32')": 'Unexpected keyword argument "dtyp"',
    "Chat(checkpoint, temprature=1)": 'Unexpected keyword argument "temprature"',
    "chat('What?', temprature=1)": 'Unexpected keyword argument "temprature"',
    "Options(temperature='hot')": 'has incompatible type "str"',
    "internvl3_jax.Chatt": 'Module has no attribute "Chatt"',
}


@pytest.mark.install
def test_the_installed_package_is_typed(installed_wheel):
    """A type checker sees the public names, and reports wrong names, keywords and types."""
    run = installed_wheel.run
    run("python", *PIP, "install", *QUIET, "mypy")
    (installed_wheel.work / "user.py").write_text("\n".join(USER_CODE) + "\n")
    check = "from mypy import api; print(api.run(['--follow-imports=silent', 'user.py'])[0])"
    printed = run("python", "-c", check)
    errors = dict(re.findall(r"^user.py:(\d+): error: (.*)$", printed, re.M))
    expected = {str(n): text for n, text in enumerate(USER_CODE.values(), 1) if text}
    assert errors.keys() == expected.keys(), printed
    assert all(text in errors[line] for line, text in expected.items()), printed


@pytest.mark.install
def test_the_installed_package_knows_its_version(installed_wheel):
    """__version__ is that of pyproject.toml, and reading it does not import jax."""
    script = "import internvl3_jax, sys; print(internvl3_jax.__version__, 'jax' in sys.modules)"
    assert installed_wheel.run("python", "-c", script).split() == [VERSION, "False"]
