"""The targets there are. A new one is a new file, and one more line here."""

from __future__ import annotations

from llama_onnx.targets import cpu
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import Target

TARGETS = {target.name: target for target in (cpu.TARGET,)}
"""Target name -> target."""


def get_target(name: str) -> Target:
    """Return the target called `name`; raises `UsageError` naming the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise UsageError(
            f"There is no target {name!r}; the known ones are: {', '.join(TARGETS)}."
        ) from None
