"""Every shell command and Python snippet of the pages runs, in the page's order, on the digits
model and a few rows.

A page has a folder in which the files that it names exist (documented_world.py). What is changed in
a command before it runs stands in SUBSTITUTED and ADDED; what cannot run here in NOT_RUN, each with
its reason, and its files, flags and targets are looked up. A command that is neither runs as it is.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from internvl3_jax.config import TrainConfig
from tests.support import documented_world
from tests.support.command_runner import Done, Runner
from tests.support.documents import ROOT, Command, commands, pages, snippets, words

# What is changed before a command runs: (regular expression, replacement), all of them, in this
# order.
SUBSTITUTED = (
    (r"^python3? |^\.venv-test/bin/python ", "python "),
    (r"runs/receipts/checkpoints/500", "runs/receipts/checkpoints/2"),  # of a run of 2 steps
    # A mesh of many devices: what the analysis says of the same configuration.
    (
        r"^python train.py --config (\S+:(?:8|38|78)b) --workdir \S+ (.*--config\.mesh.*)",
        r"python -m internvl3_jax.fit --config \1 \2 --topology h100:2x8x8 --analytic",
    ),
    # no compiler of a TPU or GPU
    (r"^(python -m internvl3_jax.fit (?!.*--analytic).*)", r"\1 --analytic"),
    (r"(infer.py --checkpoint DIR --devices 4)", r"\1 --prompt Hello"),  # no conversation
)
# Flags behind those of the page, by program. A later one wins.
SMALL_DATA = "--config.data.rows=1 --config.data.tokens_per_row=1024 --config.data.tiles_per_row=16 --config.data.workers=0"
ADDED = {
    "train.py --config configs/tiny_digits.py": "--config.steps=2 --config.optimizer.warmup_steps=0",
    "train.py --config configs/pretrain.py": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA} "
    "--config.data.text_fraction=-1",
    "train.py": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA}",
    "internvl3_jax.training.make_reference": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA}",
    "infer.py": "--max_new_tokens=4",
    "internvl3_jax.reward.make_pairs": "--max_new_tokens=8 --samples=2",
    "internvl3_jax.reward.make_process_labels": "--max_new_tokens=8 --solutions=1 --continuations=2",
}
# What is not run, and why.
NOT_RUN = (
    (r"^make ", "sets up environments; this test is part of make test"),
    (
        r"^pip install |^python3? -m venv |^\. \S+/bin/activate$",
        "tests/test_install.py runs the pages' installations",
    ),
    (r"^git clone |^cd internvl3_jax$", "the clone is here"),
    (r"^export ", "of a cloud, or of the reader's shell"),
    (
        r"^launch/|^sbatch |^kubectl |^sky |^docker |^gcloud ",
        "needs a cluster; tests/test_launch.py runs launch/ with stand-ins",
    ),
    (r"^\S*python -m pytest ", "another test"),
    (
        r"^python .*(gs|s3)://",
        "needs a bucket; tests/test_object_storage.py runs the programs with servers of this machine",
    ),
    (
        r"^python benchmarks/",
        "minutes to hours; tests/test_benchmarks.py and others run their smallest forms",
    ),
    (r"^python examples/", "half an hour; tests of their own run their parts"),
    (r"^python -m internvl3_jax\.fit$", "named, not called"),
    (r"^python (-m )?tools[./]", "many runs of the programs; tests of their own run a few"),
)
# Commands whose files later ones of the same page make: they run at its end, with the name linked
# to what was made.
LAST = {"peft_directory": "adapter"}
UNREAD = "answers could not be read: wanted is a stated answer"
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}  # for --devices and --hosts

ALL = [command for page in pages() for command in commands(page)]
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
    "docs/inference.md",
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


def reason(command: Command) -> str | None:
    return next((why for pattern, why in NOT_RUN if re.search(pattern, command.text)), None)


def prepared(text: str) -> str:
    """The command as it runs here."""
    for pattern, replacement in SUBSTITUTED:
        text = re.sub(pattern, replacement, text)
    added = next(
        (
            flags
            for program, flags in ADDED.items()
            if f"{program}" in text.replace("python -m ", "python ")
        ),
        "",
    )
    return f"{text} {added}".strip()


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


@pytest.mark.parametrize("command", [command for command in ALL if reason(command)], ids=str)
def test_what_is_not_run_names_what_exists(command):
    """Files, flags, extras and make's targets."""
    first, *rest = (
        words(command.text)
        if "'" not in command.text or command.text.count("'") % 2 == 0
        else command.text.split()
    )
    if first == "make":
        text = (ROOT / "Makefile").read_text()
        for word in rest:
            name = word.split("=")[0]
            assert re.search(rf"^{re.escape(name)}:|^{re.escape(name)} \?=", text, re.M), (
                f"{command}: make knows no {name}"
            )
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for named in re.findall(r"'?\.\[([\w,]+)\]", command.text):
            assert set(named.split(",")) <= extras.keys(), command
    elif first == "sbatch" or first.startswith("launch/"):
        script = ROOT / (rest[0] if first == "sbatch" else first)
        assert os.access(script, os.X_OK), command
        if first == "launch/tpu.sh" and rest:
            assert re.search(rf"^{rest[0]}\) ", script.read_text(), re.M), command
    elif first.endswith("python"):
        check_program(command, rest)
    if first.startswith("launch/") or first == "sbatch":
        check_configuration(command)


# --- what can be known without running -----------------------------------------------------------

# defined in modules that several programs share
ANYWHERE = {"--help", "--config", "--coordinator", "--processes", "--process"}


def check_program(command: Command, arguments: list[str]) -> None:
    """The file or module is there, and its text holds every flag; fields of a configuration exist."""
    name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
    if name in ("pytest", "pip"):
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), command
        return
    path = ROOT / (name.replace(".", "/") if arguments[0] == "-m" else name)
    path = next(
        (one for one in (path, path.with_suffix(".py"), path / "__main__.py") if one.is_file()),
        None,
    )
    assert path, f"{command}: there is no {name}"
    source = path.read_text(encoding="utf-8")
    if name == "infer.py":
        source += (ROOT / "internvl3_jax/inference/answer_flags.py").read_text(encoding="utf-8")
    if path.name == "__main__.py":
        source += "".join(other.read_text(encoding="utf-8") for other in path.parent.glob("*.py"))
    for flag in {word.split("=")[0] for word in rest if re.match(r"--?\w", word)} - ANYWHERE:
        if not flag.startswith("--config."):
            assert re.search(rf"\"{flag}\"|\"{flag[2:]}\"|^ +{flag[2:]}:", source, re.M), (
                f"{command}: {name} has no {flag}"
            )
    check_configuration(command)


def check_configuration(command: Command) -> None:
    for name in re.findall(r"--config[= ](configs/\w+\.py)", command.text):
        assert (ROOT / name).exists() or name == "configs/X.py", command
    for field in re.findall(r"--config\.([\w.]+)", command.text):
        where = TrainConfig
        for part in field.split("."):
            assert part in where.__dataclass_fields__, f"{command}: there is no {field}"
            where = where.__dataclass_fields__[part].type


def test_what_programs_say_of_themselves_exists():
    """The command lines at the top of every program, recipe, example and benchmark."""
    found = 0
    folders = ("configs", "convert", "examples", "benchmarks", "internvl3_jax")
    for path in [
        *ROOT.glob("*.py"),
        *(path for folder in folders for path in (ROOT / folder).rglob("*.py")),
    ]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            if match := re.match(r"\s*(?:python|\S+ python) ((?:-m )?\S+.*?)(?: {3,}.*)?$", line):
                line = re.sub(r"\[|\]|\.\.\.", "", match[1])
                check_program(Command(str(path.relative_to(ROOT)), 1, line), line.split())
                found += 1
    assert found > 40


def test_commands_are_found():
    """All kinds of them: fenced and marked, fenced and unmarked, continued, several in a line, in
    prose, with comments.
    """
    text = "a `python b.py --c` d\n```\npython a.py 'x # y' \\\n   --b  # c\nmake a && make b\n```\n```json\nmake c\n```\n"
    text += "```bash\n# only a comment\nFOO=1 python d.py\n```\n`python` alone, `pythonic words`\n"
    found = [command.text for command in commands("page", text)]
    assert found == [
        "python b.py --c",
        "python a.py 'x # y' --b",
        "make a",
        "make b",
        "FOO=1 python d.py",
    ]
    assert {command.page for command in ALL} >= {
        "README.md",
        "CONTRIBUTING.md",
        "docs/training.md",
        "docs/fit.md",
    }


def test_lists_are_used():
    """Nothing in the lists above is left over from a command that the pages no longer have."""
    texts = [command.text for command in ALL]
    for pattern, _ in SUBSTITUTED:
        assert any(re.search(pattern, text) for text in texts), pattern
    for name in LAST:
        assert any(name in text for text in texts), name


# --- Python --------------------------------------------------------------------------------------

# What a page's snippets need that stands in none of them.
BEFORE = {
    "README.md": "from tests.support import documented_world; batch = documented_world.batch()",
    "docs/lora.md": "from internvl3_jax import Chat, load",
}
# A LoRA run and a PEFT directory take a training: docs/lora.md's commands make both, and its
# snippet runs behind them.
BEHIND_COMMANDS = {"docs/lora.md"}
SNIPPETS = [page for page in pages() if snippets(page)]


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
