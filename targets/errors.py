"""The one tree of errors, for people.

    LlamaOnnxError                 exit 1   base: one sentence - what is wrong, where, what to do
    ├── UsageError                 exit 2   the call itself cannot be carried out as asked
    ├── CheckpointError            exit 1   the source cannot be read, or contradicts itself
    │   └── UnsupportedError       exit 1   the source is sound, but has a feature named here
    ├── PackageError               exit 1   a package is missing something, or is damaged
    ├── ResourceError              exit 1   disk or memory does not suffice
    ├── ProviderError              exit 1   the execution provider asked for does not run
    ├── BusyError                  exit 1   a server has more requests waiting than it takes
    └── MissingDependencyError     exit 1   an optional library is not installed

Raised anywhere; turned into click's exceptions at the command line's edge only.
"""

from __future__ import annotations


class LlamaOnnxError(Exception):
    """Base of every error this project raises on purpose; `str()` is one clear sentence."""

    exit_code = 1


class UsageError(LlamaOnnxError):
    """What was asked for cannot be done, whatever the files hold."""

    exit_code = 2


class CheckpointError(LlamaOnnxError):
    """A source checkpoint is missing, damaged or inconsistent."""


class UnsupportedError(CheckpointError):
    """A source checkpoint uses a feature that is refused by name rather than ignored."""


class PackageError(LlamaOnnxError):
    """A model package is incomplete, damaged or not a package."""


class ResourceError(LlamaOnnxError):
    """The machine cannot hold the result."""


class ProviderError(LlamaOnnxError):
    """An execution provider cannot run the package."""


class BusyError(LlamaOnnxError):
    """More requests are waiting than a server takes; nothing is wrong with this one."""


class MissingDependencyError(LlamaOnnxError):
    """An optional library is needed for this command and is not installed."""
