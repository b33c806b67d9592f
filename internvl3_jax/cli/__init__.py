"""Console scripts: run the programs of this repository from a clone or from an installed wheel.

    internvl3-train      python train.py
    internvl3-infer      python infer.py
    internvl3-convert    python -m convert
    internvl3-fit        python -m internvl3_jax.fit
    internvl3-doctor     python -m internvl3_jax.data.doctor
    internvl3-eval       python -m internvl3_jax.evaluate
    internvl3-tokens     python -m internvl3_jax.data.tokens
    internvl3-serve      python -m internvl3_jax.serve
    internvl3-parity     python -m internvl3_jax.parity

train.py, infer.py, convert/ and configs/ are at the top of the repository. A wheel has them in this
folder instead (hatch_build.py copies them), so that site-packages gets no such top-level names.
Each program runs as `__main__`, exactly as the command on the right runs it.
"""

import pathlib
import runpy
import sys

COMMANDS = {
    "internvl3-train": "python train.py",
    "internvl3-infer": "python infer.py",
    "internvl3-convert": "python -m convert",
    "internvl3-fit": "python -m internvl3_jax.fit",
    "internvl3-doctor": "python -m internvl3_jax.data.doctor",
    "internvl3-eval": "python -m internvl3_jax.evaluate",
    "internvl3-tokens": "python -m internvl3_jax.data.tokens",
    "internvl3-serve": "python -m internvl3_jax.serve",
    "internvl3-parity": "python -m internvl3_jax.parity",
}
_HERE = pathlib.Path(__file__).resolve().parent
_script = False  # whether a console script was started


def home() -> pathlib.Path:
    """Returns the folder of train.py, infer.py, convert/ and configs/: this one in a wheel, the top
    of the repository in a clone or an editable install.
    """
    return _HERE if (_HERE / "train.py").is_file() else _HERE.parents[1]


def find_recipe(path: pathlib.Path) -> pathlib.Path:
    """Returns the file that --config means: `path` if it exists, else the shipped recipe of that
    name (finetune.py or configs/finetune.py), else `path` as it is.
    """
    if path.is_file() or path.is_absolute():
        return path
    inner = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    shipped = home() / "configs" / inner
    return shipped if shipped.is_file() else path


def as_typed(text: str) -> str:
    """Returns a help text with the commands as the user types them: `internvl3-train` in place of
    `python train.py` if a console script was started.
    """
    if _script:
        for script, command in COMMANDS.items():
            text = text.replace(command, script)
    return text


# --- entry points --------------------------------------------------------------------------------


def train() -> None:
    _run("train.py")


def infer() -> None:
    _run("infer.py")


def convert() -> None:
    # `convert` is a package of that folder, as it is of the working directory with `python -m`.
    sys.path.insert(0, str(home()))
    _run("convert")


def fit() -> None:
    _run("internvl3_jax.fit")


def doctor() -> None:
    _run("internvl3_jax.data.doctor")


def evaluate() -> None:
    _run("internvl3_jax.evaluate")


def tokens() -> None:
    _run("internvl3_jax.data.tokens")


def serve() -> None:
    _run("internvl3_jax.serve")


def parity() -> None:
    _run("internvl3_jax.parity")


def _run(program: str) -> None:
    """Runs a file of `home()`, or a module, as `__main__`."""
    global _script
    _script = True
    if program.endswith(".py"):
        runpy.run_path(str(home() / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
