"""The targets. To add one, add a file and a line here."""

from __future__ import annotations

from llama_onnx.targets import cpu, cuda, directml, portable, webgpu
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import Target

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET for module in (cpu, cuda, directml, webgpu, portable)
}
"""Target name -> target."""


def get_target(name: str) -> Target:
    """Return the target called `name`. Raises `UsageError`, listing the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise UsageError(
            f"there is no target {name!r}: choose one of {', '.join(TARGETS)}."
        ) from None
