"""Every shell command and Python snippet of the pages runs, in the page's order, on the digits
model and a few rows.

A page has a folder in which the files that it names exist (documented_world.py). What is changed in
a command before it runs, and what cannot run here, is listed in documented_changes.py. Any other
command runs as it is.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import documented_world
from tests.support.command_runner import Done, Runner
from tests.support.documented_changes import ALL, LAST, prepared, reason
from tests.support.documents import ROOT, Command, pages, snippets, words

UNREAD = "answers could not be read: wanted is a stated answer"
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}  # for --devices and --hosts
# Behind this heading all commands train or need what was trained: a chain of its own, in the same
# kind of folder.
TRAINING = {"README.md": "## Fine-tune on your data"}
QUICK = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/README.md",
    "docs/architecture.md",
    "docs/attention.md",
    "docs/benchmarks.md",
    "docs/decisions.md",
    "docs/experiments.md",
    "docs/fit.md",
    "docs/launch.md",
    "docs/scaling.md",
    "docs/troubleshooting.md",
)


def chain_of(command: Command) -> str:
    """The page, or page and heading."""
    heading = TRAINING.get(command.page)
    if heading is None:
        return command.page
    before = (
        (ROOT / command.page).read_text(encoding="utf-8").split(f"\n{heading}\n")[0].count("\n")
    )
    behind = command.line > before + 1 or any(name in command.text for name in LAST)
    return f"{command.page} {heading}" if behind else command.page


CHAINS = list(dict.fromkeys(chain_of(command) for command in ALL))


@pytest.fixture(scope="module")
def runner():
    with Runner(JAX_DISABLE_MOST_OPTIMIZATIONS="1", HF_HUB_OFFLINE="1") as ready:
        yield ready


def execute(runner: Runner, text: str, folder: pathlib.Path) -> Done:
    arguments = words(text)
    if arguments[:3] == ["python", "-m", "convert"]:  # the pages write several forms to one name
        places = re.sub(
            r"--(?!verify|overwrite|accept_|allow_)\w+ \S+", "", " ".join(arguments[3:])
        ).split()
        shutil.rmtree(
            folder / [place for place in places if not place.startswith("-")][-1],
            ignore_errors=True,
        )
    environment = DEVICES if {"--devices", "--hosts"} & set(arguments) else {}
    if arguments[0] == "python" and not {"|", "<", ">", "$("} & set(arguments):
        return runner(arguments[1:], folder, **environment)
    (folder / "bin").mkdir(exist_ok=True)
    shim = folder / "bin" / "python"
    if not shim.exists():
        shim.symlink_to(sys.executable)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return Done(done.returncode, 0.0, done.stdout)


@pytest.mark.parametrize(
    "chain",
    [chain if chain in QUICK else pytest.param(chain, marks=pytest.mark.docs) for chain in CHAINS],
)
def test_commands_run(chain, runner, tmp_path):
    """Each ends with status 0; `fit` with 1 where it says that something does not fit, and labels
    with 1 where it says that the tiny model states no answer.
    """
    page = chain.split(" ")[0]
    listed = [command for command in ALL if chain_of(command) == chain and reason(command) is None]
    late = [command for command in listed if any(name in command.text for name in LAST)]
    folder = documented_world.build(
        tmp_path / "clone", page, "\n".join(prepared(command.text) for command in listed)
    )
    for command in [command for command in listed if command not in late] + late:
        for name, made in LAST.items():
            if name in command.text and not (folder / name).exists():
                (folder / name).symlink_to(folder / made)
        text = prepared(command.text)
        done = execute(runner, text, folder)
        print(f"{done.seconds:5.1f} s  {text}")
        allowed = (0, 1) if "internvl3_jax.fit" in text else (0,)
        fine = done.status in allowed and "error:" not in done.output
        unread = done.status == 1 and "make_process_labels" in text and UNREAD in done.output
        assert fine or unread, f"{command}\nas: {text}\n{done.output[-3000:]}"
    if page in BEHIND_COMMANDS:
        run_snippets(page, runner, folder)


# --- Python --------------------------------------------------------------------------------------

# What a page's snippets need that stands in none of them.
BEFORE = {
    "docs/architecture.md": "from tests.support.documented_world import batch; batch = batch()",
    "docs/lora.md": "from internvl3_jax import Chat, load",
}
# A LoRA run and a PEFT directory take a training: docs/lora.md's commands make both, and its
# snippet runs behind them.
BEHIND_COMMANDS = {"docs/lora.md"}
ELSEWHERE = {"docs/serving.md"}  # asks a server: tests/test_serve_documented.py
SNIPPETS = [page for page in pages() if snippets(page) and page not in ELSEWHERE]


def run_snippets(page: str, runner: Runner, folder: pathlib.Path) -> None:
    text = "\n".join([f"import sys; sys.path.append({str(ROOT)!r})", BEFORE.get(page, "")])
    text += "".join(f"\n{snippet}" for _, snippet in snippets(page))
    done = runner(["-c", text], folder)
    assert done.status == 0, f"{page}, Python:\n{text}\n{done.output[-3000:]}"


@pytest.mark.parametrize(
    "page",
    [
        page if page in QUICK else pytest.param(page, marks=pytest.mark.docs)
        for page in SNIPPETS
        if page not in BEHIND_COMMANDS
    ],
)
def test_snippets_run(page, runner, tmp_path):
    names = "\n".join(text for _, text in snippets(page))
    run_snippets(page, runner, documented_world.build(tmp_path / "clone", "", names))
