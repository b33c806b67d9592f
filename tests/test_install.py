"""Each installation that the pages write, in an empty environment: doctor, four training steps,
export and infer go through.

Run by `make test-install`. Of a line with an accelerator's extra, whose libraries are gigabytes,
the same line without it is installed.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.support import documented_world
from tests.support.documents import ROOT, pages

ACCELERATORS = {"gpu", "tpu"}
LINE = re.compile(r"'\.\[([\w,]+)\]'")
TRAIN = "train.py --config configs/finetune.py:checkpoints/internvl3-2b --config.data.source=meta.json --config.steps=4".split()
TRAIN += "--config.optimizer.warmup_steps=0 --config.data.rows=1 --config.data.tokens_per_row=512 --config.data.tiles_per_row=12".split()


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
    assert installations() == [(), ("quant",), ("storage",), ("logging", "video")]
    written = [
        set(LINE.findall((ROOT / page).read_text())) for page in ("README.md", "docs/training.md")
    ]
    assert {"gpu,video,logging", "tpu,video,logging"} <= written[0] & written[1]


@pytest.mark.smoke
def test_remedies_name_extras_that_exist():
    """Nothing is published under the package's name: a message says how to install from the clone."""
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
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        place = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
        self.run(
            *pip,
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
    printed = environment.run(*TRAIN, "--workdir", f"runs/{name}")
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
