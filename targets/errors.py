"""All errors that this project raises on purpose.

    LlamaOnnxError                 exit 1   base: one sentence - what is wrong, where, what to do
    ├── UsageError                 exit 2   the call is wrong, independent of any file
    │   ├── ContextLengthError     exit 2   a prompt does not fit the model's context
    │   └── TooLargeError          exit 2   a request has more bytes than a server reads
    ├── CheckpointError            exit 1   a checkpoint is missing, damaged or inconsistent
    │   └── UnsupportedError       exit 1   a sound checkpoint has an unsupported feature
    ├── PackageError               exit 1   a package is incomplete or damaged
    ├── SessionError               exit 1   a saved conversation is damaged, or of another package
    ├── ResourceError              exit 1   there is not enough disk space or memory
    ├── ProviderError              exit 1   the chosen execution provider cannot run the package
    ├── BusyError                  exit 1   too many requests are waiting for a server
    └── MissingDependencyError     exit 1   an optional library is not installed

They are turned into click's exceptions only in the command line's root.
"""

from __future__ import annotations


def describe_reason(error: Exception) -> str:
    """Return the first line of a library's or the system's error, without class name or full stop.

    >>> describe_reason(IsADirectoryError(21, "Is a directory", "text.txt"))
    'Is a directory'
    >>> describe_reason(RuntimeError("bad allocation.\\nat malloc"))
    'bad allocation'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return describe_damage(error)
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(".")


def describe_damage(error: Exception) -> str:
    """Return what is wrong with a file's content, from the exception that reading an entry raised.

    >>> describe_damage(KeyError("limit"))
    "'limit' is missing"
    >>> describe_damage(TypeError("list indices must be integers or slices, not str"))
    'an entry has the wrong type or size'
    """
    if isinstance(error, KeyError) and error.args:
        return f"'{error.args[0]}' is missing"
    return "an entry has the wrong type or size"


MAX_MESSAGE = 1500
"""Longest message, in characters."""


class LlamaOnnxError(Exception):
    """Base class of this project's errors; `str()` is one sentence.

    A name or value that the sentence quotes may be a stranger's and have any length: of a sentence
    that is too long, only start and end are kept.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        half = MAX_MESSAGE // 2
        too_long = len(message) > MAX_MESSAGE
        super().__init__(f"{message[:half]} ... {message[-half:]}" if too_long else message)


class UsageError(LlamaOnnxError):
    """The call is wrong, independent of the content of any file."""

    exit_code = 2


class ContextLengthError(UsageError):
    """A prompt that does not fit the model's context."""


class TooLargeError(UsageError):
    """A request has more bytes than a server reads; the caller can shorten it."""


class CheckpointError(LlamaOnnxError):
    """A checkpoint is missing, damaged or inconsistent."""


class UnsupportedError(CheckpointError):
    """A checkpoint uses a feature that is not supported; the message names it."""


class PackageError(LlamaOnnxError):
    """A model package is incomplete, damaged or not a package."""


class SessionError(LlamaOnnxError):
    """A saved conversation is missing, damaged, or not of this package."""


class ResourceError(LlamaOnnxError):
    """There is not enough disk space or memory."""


class ProviderError(LlamaOnnxError):
    """An execution provider cannot run the package."""


class BusyError(LlamaOnnxError):
    """Too many requests are waiting for a server; the caller can try again later."""


class MissingDependencyError(LlamaOnnxError):
    """An optional library that is needed here is not installed."""
