"""Command-line entry points: user errors in one line, help with status 0, tracebacks only for bugs.

    if __name__ == "__main__":
        command_line.run(main)                      # with absl's flags: infer.py, train.py
        sys.exit(command_line.call(lambda: ...))    # with `Parser`: convert, the doctor

Status 0: done; 1: refused, with a line "error: ..."; 2: the command line is wrong; 130: interrupted
by Ctrl-C; 141: the reader of the output is gone (`| head`). An error that is neither a ValueError
nor an OSError is a bug and keeps its traceback.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import app, flags

from internvl3_jax import cli
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import one_line, printable, short_name

USAGE = 2
INTERRUPTED = 128 + signal.SIGINT
NO_READER = 128 + signal.SIGPIPE
_UNBROKEN = re.compile(r"\S{1000,}")


class UsageError(ValueError):
    """A command line that cannot be parsed: prints `error: ...` and exits with status 2."""


# --- errors --------------------------------------------------------------------------------------


def _with_help(text: str) -> str:
    """Adds how to get help to what is wrong with a command line."""
    joined = f"{text} Run" if text.endswith("?") else f"{text}; run"
    return f"{joined} it with --help for all options"


def message(error: BaseException) -> str:
    """Returns an error as one line, safe to print. An OSError begins with its file's name."""
    if isinstance(error, OSError) and error.filename is not None:
        names = [
            os.fsdecode(name)
            for name in (error.filename, error.filename2)
            if isinstance(name, str | bytes | os.PathLike)
        ]
        text = f"{' -> '.join(map(one_line, names)) or error.filename}: {error.strerror or error}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error) or type(error).__name__
    lines = [line.strip() for line in printable(text).splitlines() if line.strip()]
    for number, (line, following) in enumerate(itertools.pairwise(lines)):
        if line[-1] not in ".:;,?":
            lines[number] = f"{line}{'.' if following[0].isupper() else ';'}"
    text = " ".join(lines)
    # An image in base64 that was given as a path would fill the terminal.
    return _UNBROKEN.sub(lambda match: short_name(match[0], 300), text)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds `path` to an OSError that names no file, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if (
            error.filename is None
            and error.errno is not None
            and not isinstance(error, BrokenPipeError)
        ):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


@contextlib.contextmanager
def errors_in_one_line(*also: type[Exception], failed: int = 1) -> Iterator[None]:
    """Turns ValueError, OSError and Ctrl-C into SystemExit with the statuses above.

    Args:
      *also: more error types that a user can fix.
      failed: exit status of a refusal. With 1, the default, the exit code is the text "error: ...",
        which Python prints and `multihost.abort_together` sends to the other processes.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is not None:
            raise SystemExit(f"error: {message(error)}") from error
        _forget_output()
        raise SystemExit(NO_READER) from error
    except KeyboardInterrupt as error:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error
    except (UsageError, app.UsageError) as error:
        print(f"error: {_with_help(message(error))}", file=sys.stderr)
        raise SystemExit(USAGE) from error
    except (ValueError, OSError, *also) as error:
        text = f"error: {message(error)}"
        if failed == 1:
            raise SystemExit(text) from error
        print(text, file=sys.stderr)
        raise SystemExit(failed) from error


def _forget_output() -> None:
    """Redirects output to /dev/null after its reader is gone, so that exiting raises nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if (
                stream is sys.stdout
                or os.fstat(stream.fileno()).st_ino == os.fstat(sys.stdout.fileno()).st_ino
            ):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# --- programs with argparse ----------------------------------------------------------------------


def expanded(path: str) -> pathlib.Path:
    """Returns a path with ~ expanded; for `type=` of an argument."""
    return pathlib.Path(os.path.expanduser(path))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the docstring's layout and prints usage errors in one line."""

    def __init__(self, *arguments, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # Abbreviations would change their meaning when an option is added.
        options.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **options)

    def format_help(self) -> str:
        return cli.as_typed(super().format_help())

    def error(self, text: str):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", text)
        if "arguments are required" in text:
            # A misspelled option is why the right one is missing.
            given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
            wrong = next((word for word in given if word not in self._option_string_actions), None)
            if wrong:
                text, unknown = f"unrecognized arguments: {wrong}", (None, wrong)
        near = suggestion(unknown[1], self._option_string_actions) if unknown else ""
        text = " ".join(printable(text).split())
        print(f"error: {_with_help(text + near)}", file=sys.stderr)
        raise SystemExit(USAGE)


def call(body: Callable[[], int | None], *also: type[Exception], failed: int = 1) -> int:
    """Runs `body` and returns the exit status: its result (None is 0), or that of its error.

    Errors are printed.
    """
    try:
        with errors_in_one_line(*also, failed=failed):
            return body() or 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0


# --- programs with absl's flags ------------------------------------------------------------------


def run(
    main: Callable[[Sequence[str]], int | None],
    *also: type[Exception],
    failed: int = 1,
    sections: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parses absl's flags, calls `main` with the remaining arguments, and exits.

    Args:
      main: the program.
      *also: more error types that a user can fix.
      failed: exit status of a refusal.
      sections: heading -> names of flags, in the order of the help; None shows all flags under one
        heading.
    """
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        with errors_in_one_line():
            print(cli.as_typed(help_text(sys.modules["__main__"].__doc__ or "", sections)))
        raise SystemExit(0)

    def guarded(arguments: Sequence[str]) -> int | None:
        with errors_in_one_line(*also, failed=failed):
            return main(arguments)

    app.run(guarded, flags_parser=_parse)


def help_text(
    description: str,
    sections: Mapping[str, Sequence[str]] | None = None,
    width: int | None = None,
    values: flags.FlagValues = flags.FLAGS,
) -> str:
    """Returns the help text of a program with absl's flags.

    Args:
      description: text above the options.
      sections: as in `run`.
      width: columns; None takes the terminal's.
      values: the program's flags.
    """
    width = width or min(shutil.get_terminal_size().columns, 110)
    if sections is None:
        sections = {"Options": [flag.name for flag in values.get_key_flags_for_module(sys.argv[0])]}
    lines = [description.strip()]
    for heading, names in sections.items():
        lines += ["", f"{heading}:"]
        for name in names:
            lines += _flag_help(values[name], width)
    return "\n".join([*lines, "", "  -h, --help  Show this help."])


def _flag_help(flag, width: int) -> list[str]:
    """Returns the lines of one flag: its name and value, its meaning, its default."""
    kind = flag.flag_type()
    value = {"bool": "", "int": " N", "float": " X"}.get(kind.removeprefix("multi "), " TEXT")
    if "enum" in kind:
        value = f" {{{','.join(flag.parser.enum_values)}}}"
    # Drop what absl adds about enums and repeated flags.
    meaning = re.sub(
        r"^<[^>]*>: |; repeat this option to specify a list of values$",
        "",
        " ".join(flag.help.split()),
    )
    if (
        flag.default not in (None, "")
        and flag.default is not False
        and flag.default != []
        and "efault" not in meaning
    ):
        meaning += f" Default: {flag.default}."
    left = f"  --{flag.name}{value}"
    text = textwrap.wrap(meaning, width - 26)
    if len(left) <= 24:
        return [f"{left:<26}{text[0]}"] + [f"{'':26}{line}" for line in text[1:]]
    return [left] + [f"{'':26}{line}" for line in text]


def _parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags and returns the other arguments; exits after help or a usage error."""
    try:
        with contextlib.suppress(BrokenPipeError):
            return flags.FLAGS(list(arguments))
    except SystemExit as ended:  # absl has printed the help
        if not isinstance(ended.code, str):
            with errors_in_one_line():
                pass
            raise SystemExit(0) from ended
        raise
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flags.FLAGS if not name.startswith("no")]
        near = suggestion(error.flagname, known)
        text = f"--{one_line(error.flagname)}: there is no such option{near}"
    except flags.Error as error:
        missing = re.match(
            r"flag --(\S+)=None: Flag --\S+ must have a value other than None", str(error)
        )
        text = f"--{missing[1]} is missing" if missing else message(error).removeprefix("flag ")
    print(f"error: {_with_help(text)}", file=sys.stderr)
    raise SystemExit(USAGE)
