"""What a user is told in one line, without a traceback."""


class InputError(ValueError):
    """What the user gave cannot be used: a data file, a folder, an option. The message says what was
    expected.
    """


class WriteError(InputError):
    """A folder could not be written: the disk is full, say. What was finished before is still there."""
