"""Errors that a user can mend: each message is one sentence, which says what is wrong and how to mend it.

The command line prints the message of a `LycheeError` and exits with its status. Everything else is an internal fault:
it shows its traceback and exits with 70. All of them are `ValueError`s, so callers need not know these names. Other
modules derive theirs: `PlanError`, `ModelError`, `TextError`, ...

Contracts between our own parts (shapes and strides of an operation's tensors, say) raise plain `ValueError`: whoever
meets one through the command line has found a bug.
"""

from __future__ import annotations


class LycheeError(ValueError):
    """Base class of all errors that a user can fix.

    Attributes:
        exit_status: the exit status of a command that ends with it: 2 for bad input, 1 if it ran and the answer is no.
    """

    exit_status = 2


class ConfigError(LycheeError):
    """A setting, option or argument that makes no sense, alone or beside the others."""


class InputError(LycheeError):
    """A prompt, a text or a file of the user's that cannot be used."""


class OutputError(LycheeError):
    """A file that cannot be written."""


class DeviceError(LycheeError):
    """Something that needs another device than there is."""


class PackageError(LycheeError):
    """An optional package that is not installed."""


class ResumeError(LycheeError):
    """Unfinished work that cannot be continued: there is none, or it belongs to something else."""


class LycheeWarning(UserWarning):
    """What a user should know and need not mend, in one sentence: the command line prints it as well."""


class MismatchError(LycheeError):
    """Two ways of computing the same disagree; nothing is timed then."""

    exit_status = 1


def first_line(error: BaseException, most: int = 200) -> str:
    """The beginning of somebody else's message, to end a sentence of ours with; without one, the kind of error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:most].rstrip(".") if lines else type(error).__name__
