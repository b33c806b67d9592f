"""Errors about files, local ones and those in object storage."""


class FileError(ValueError):
    """A file that is missing, unreadable, ambiguous, too large or of an unknown kind.

    The message names it.
    """


class InUse(FileError):
    """Another process uses the same directory or file; the message names the process."""
