"""How to install what an optional part of the project needs. The project is not on PyPI, so the
command is for a clone."""

from __future__ import annotations

from llama_onnx.targets.errors import MissingDependencyError


def install_command(extras: str) -> str:
    """Return the command that installs `extras` ("cpu", "export,cpu"), run in a clone.

    >>> install_command("export,cpu")
    'python -m pip install ".[export,cpu]"'
    """
    return f'python -m pip install ".[{extras}]"'


def missing_extra(what: str, module: str | None, extras: str) -> MissingDependencyError:
    """Return the error for `what`, which needs the absent `module` that `extras` install."""
    return MissingDependencyError(
        f"{what} needs {module}, which is not installed: run `{install_command(extras)}` in a "
        "clone of llama-onnx."
    )
