"""Reports Orbax's errors about a disk in the system's own words, once."""

import contextlib
import errno
import logging
import os
import sys
import time

from absl import logging as absl_logging

from internvl3_jax.io.command_line import message

# Seconds from a failed write to the removal of its directory. Writes of other arrays continue
# for some milliseconds, which nobody can wait for, and would create files in it again.
SETTLE = 1.0
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
)
_WORDS = {os.strerror(number): number for number in _DISK}


def _is_heard_of(record: logging.LogRecord) -> bool:
    """Returns whether a record is a stack trace of an error that whoever waits for a save gets."""
    text = record.getMessage()
    return "_SignalingThread.run() raised an exception" in text or (
        "exception was never retrieved" in text and ".orbax-checkpoint-tmp" in text
    )


for _logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    _logger.addFilter(lambda record: not _is_heard_of(record))


def cause(error: BaseException) -> str:
    """Returns the system's own words, if the error has them, or else the start of its message."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    text = message(error)
    known = next((words for words in _WORDS if words.lower() in text.lower()), None)
    return known or text[:300]


@contextlib.contextmanager
def writing():
    """Turns what Orbax raises for a full or failing disk into an OSError without a file's name.

    It is raised when writes of other arrays have ended, and their complaints that nobody waits for
    them any longer are not printed.
    """
    hook = sys.unraisablehook

    def unless_late(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = unless_late
    try:
        yield
    except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:
        time.sleep(SETTLE)
        words = cause(error)
        if words not in _WORDS:
            raise
        raise OSError(_WORDS[words], words) from error
    finally:
        sys.unraisablehook = hook
