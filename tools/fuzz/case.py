"""Defines a damaged input, and the behavior expected of the program that reads it."""

import dataclasses
import hashlib
import pathlib
import random
from collections.abc import Callable, Iterable

# Expected behavior:
#   refuse   a message that names the file or field, and status 1 or 2
#   accept   status 0 and the result of the undamaged input
#   same     either of these: the damage may not matter, but a changed result is wrong
#   tell     status 0 with the same result, or a message
#   warn     status 0 with a message that names the oddity, or a refusal
#   either   a refusal with a message, or any result: the damaged input may mean something else
MAX_HASHED = 1 << 28  # bytes
EXPECTATIONS = ("refuse", "accept", "same", "tell", "warn", "either")


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
      kind: group of inputs, such as "safetensors".
      name: what was done to it; unique in its kind.
      expect: one of EXPECTATIONS.
      spoil: damages the copy of a good input in the folder it is given.
      names: words of which a message must hold at least one.
      arguments: added to those of the program.
    """

    kind: str
    name: str
    expect: str
    spoil: Callable[[pathlib.Path], None]
    names: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    def __post_init__(self):
        if self.expect not in EXPECTATIONS:
            raise ValueError(f"{self.name}: {self.expect!r} is none of {', '.join(EXPECTATIONS)}")

    @property
    def id(self) -> str:
        """Returns a name that is stable for a seed, however many cases there are."""
        return f"{self.kind}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A group of inputs that one program reads.

    Attributes:
      inputs: folders of the corpus that are copied for each input.
      program: called in a process of its own, in the folder with the copies; ends as a program
          does, by returning a status, by
        sys.exit or by an exception.
      cases: all damaged inputs, drawn with a generator of random numbers.
      result: text that tells whether two results are equal, of the folder after the program.
      untouched: files and folders that a refusal must leave as they were, absent ones absent.
      seconds: longest that the program may take.
    """

    name: str
    inputs: tuple[str, ...]
    program: Callable[[tuple[str, ...]], int | None]
    cases: Callable[[random.Random], Iterable[Case]]
    result: Callable[[pathlib.Path], str] = lambda folder: ""
    untouched: tuple[str, ...] = ()
    seconds: float = 60.0


def undamaged(kind: Kind) -> Case:
    """Returns the undamaged input, with whose result the others are compared."""
    return Case(kind.name, "undamaged", "accept", lambda folder: None, ())


def all_cases(kind: Kind, seed: int) -> list[Case]:
    """Returns every damaged input of a kind, by a seed. ValueError if two have the same name."""
    cases = list(kind.cases(random.Random(f"{seed}/{kind.name}")))
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{kind.name}: two inputs are called {next(name for name in names if names.count(name) > 1)!r}"
        )
    return cases


def digest_of(*paths: pathlib.Path) -> str:
    """Returns a hash of the contents of files, or of all files below folders."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                # Some damage is gigabytes of zeros: hash only their length.
                size = file.stat().st_size
                content = file.read_bytes() if size <= MAX_HASHED else str(size).encode()
                found.update(f"{file.relative_to(path)}\0".encode() + content)
            elif not file.is_dir():
                found.update(f"{file.name} is missing\0".encode())
    return found.hexdigest()[:16]
