"""What goes wrong with files, of this machine and in object storage."""


class FileError(ValueError):
    """A file that is missing, unreadable, ambiguous, too large or of an unknown kind. The message
    names it.
    """


class InUse(FileError):
    """Another process works on the same directory or file; the message says which one."""
