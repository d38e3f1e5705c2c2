"""Which wheels are installed, by their metadata; the command that puts others in their place."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import distributions

from llama_onnx.targets.provider import Provider


def installed_flavours(module: str) -> dict[str, str]:
    """Distribution -> version of everything installed that owns `module`.

    `module` is "onnxruntime" or "onnxruntime_genai". More than one overwrite each other's files.
    """
    found = {}
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        # Names first: reading the list of files of every distribution takes a second.
        if name.lower().startswith(("onnxruntime", "ort-")) and any(
            file.as_posix() == f"{module}/__init__.py" for file in distribution.files or ()
        ):
            found[name] = distribution.version
    return found


def install_command(provider: Provider, installed: Collection[str]) -> str:
    """The command that puts the provider's wheels in the place of those that are `installed`."""
    install = f'pip install "llama-onnx[{provider.extra}]"'
    return f"pip uninstall -y {' '.join(sorted(installed))} && {install}" if installed else install
