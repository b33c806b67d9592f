"""Commands of the pages that cannot run here name files, flags and targets that exist, as do those
that programs give for themselves.
"""

import ast
import os
import re
import tomllib

import pytest

from internvl3_jax.config import TrainConfig
from tests.support.documented_changes import ALL, LAST, SUBSTITUTED, reason
from tests.support.documents import ROOT, Command, commands, words


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
    elif first.endswith("python") and rest[:1] != ["run.py"]:  # VLMEvalKit's
        check_program(command, rest)
    if first.startswith("launch/") or first == "sbatch":
        check_configuration(command)


# --- what can be known without running -----------------------------------------------------------

# defined in modules that several programs share
ANYWHERE = {"--help", "--config", "--coordinator", "--processes", "--process"}


def check_program(command: Command, arguments: list[str]) -> None:
    """The file or module is there, and its text holds every flag; fields of a configuration exist."""
    if "--" in arguments:  # what follows is of another program
        arguments = arguments[: arguments.index("--")]
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
        for module in ("answer_flags", "media_flags"):
            more = ROOT / f"internvl3_jax/inference/{module}.py"
            source += more.read_text(encoding="utf-8")
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
    """Nothing in the lists is left over from a command that the pages no longer have."""
    texts = [command.text for command in ALL]
    for pattern, _ in SUBSTITUTED:
        assert any(re.search(pattern, text) for text in texts), pattern
    for name in LAST:
        assert any(name in text for text in texts), name
