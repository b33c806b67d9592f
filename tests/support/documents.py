"""Reads the shell commands and Python snippets of the documentation pages, in their order."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = r"python3?|pip|make|git|sbatch|kubectl|sky|docker|gcloud|launch/\S+|tools/\S+|\.venv\S*"
SHELLS = ("sh", "bash", "shell", "console")
FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
# Separates one program's command from the next.
_NEXT = re.compile(r"\s+&&\s+")


@dataclasses.dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str  # one command, continuation lines joined, without its comment

    def __str__(self) -> str:
        return f"{self.page} line {self.line}: {self.text}"


def pages() -> list[str]:
    named = [
        name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists()
    ]
    return named + sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def commands(page: str, text: str | None = None) -> list[Command]:
    """Returns the commands of fenced shell blocks (marked as such, or unmarked and starting with a
    program), and those in prose as `inline code`.
    """
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for block in FENCE.finditer(text):
        if block[2] in SHELLS or (not block[2] and begins_with_program(block[3].lstrip())):
            found += _of_block(page, _line(text, block.start(3)), block[3])
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for code in INLINE.finditer(prose):
        spoken = " ".join(code[1].split())
        if begins_with_program(spoken) and " " in spoken:
            found.append(Command(page, _line(prose, code.start()), spoken))
    return sorted(found, key=lambda command: command.line)


def snippets(page: str) -> list[tuple[int, str]]:
    """Returns (line, text) of each Python block of the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (_line(text, block.start(3)), block[3])
        for block in FENCE.finditer(text)
        if block[2] == "python"
    ]


def begins_with_program(text: str) -> bool:
    return re.match(rf"(\$ +)?(\w+=\S+ +)*(export +\w+=|({PROGRAMS})(\s|$))", text) is not None


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _of_block(page: str, line: int, body: str) -> list[Command]:
    found, pending, began = [], "", line
    for number, written in enumerate(body.splitlines(), line):
        written = written.strip().removeprefix("$ ")
        began = began if pending else number
        if written.endswith("\\"):
            pending += written[:-1].rstrip() + " "
            continue
        whole, pending = without_comment(pending + written), ""
        found += [Command(page, began, part) for part in _NEXT.split(whole) if part]
    return found


def without_comment(line: str) -> str:
    """Removes a shell comment: everything from an unquoted word that starts with #."""
    quote, before = "", " "
    for place, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and before.isspace():
            return line[:place].rstrip()
        before = character
    return line.rstrip()


def words(text: str) -> list[str]:
    return shlex.split(text)
