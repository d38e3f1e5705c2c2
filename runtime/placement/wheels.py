"""Find which wheels of the runtimes are installed, by their metadata, and how to replace them."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import distributions

from llama_onnx.targets.extras import install_command
from llama_onnx.targets.provider import Provider


def installed_flavours(module: str) -> dict[str, str]:
    """Return distribution -> version of all installed distributions that contain `module`.

    `module` is "onnxruntime" or "onnxruntime_genai". Several distributions of one module overwrite
    each other's files.
    """
    found = {}
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        # Filter by name first: reading the file lists of all distributions takes a second.
        if name.lower().startswith(("onnxruntime", "ort-")) and any(
            file.as_posix() == f"{module}/__init__.py" for file in distribution.files or ()
        ):
            found[name] = distribution.version
    return found


def install_wheels(provider: Provider, installed: Collection[str] = ()) -> str:
    """Return how to replace the `installed` distributions with the provider's wheels.

    >>> from llama_onnx.targets.providers import CUDA
    >>> print(install_wheels(CUDA, ["onnxruntime"]))  # doctest: +NORMALIZE_WHITESPACE
    run `python -m pip uninstall -y onnxruntime && python -m pip install ".[cuda]"`
    in a clone of llama-onnx
    """
    install = install_command(provider.extra)
    if installed:
        install = f"python -m pip uninstall -y {' '.join(sorted(installed))} && {install}"
    return f"run `{install}` in a clone of llama-onnx"
