"""Runs infer.py in this process with flags that it must refuse."""

import pytest


def fail(ask, **values) -> str:
    """Returns the message of a run that must fail: the text given to `sys.exit`, which the
    interpreter prints to stderr as one line.
    """
    with pytest.raises(SystemExit) as stopped:
        ask(**values)
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith("error: ")
    return stopped.value.code
