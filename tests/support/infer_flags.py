"""Runs of infer.py in this process that must fail."""

import pytest


def fail(ask, **values) -> str:
    """The message of a run that must fail: one line to stderr by the interpreter's own rule for
    `sys.exit(text)`.
    """
    with pytest.raises(SystemExit) as stopped:
        ask(**values)
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith("error: ")
    return stopped.value.code
