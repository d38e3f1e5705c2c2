"""LoRA adapters in a package, any of which an answer may use."""

from __future__ import annotations

from typing import Any

from llama_onnx.runtime.genai import og
from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.targets.errors import PackageError, ResourceError
from llama_onnx.targets.package import ModelPackage


class Adapters:
    """The adapters of an open package. Each is loaded at its first use and stays loaded."""

    def __init__(self, package: ModelPackage, model: Any) -> None:
        self._package, self._model = package, model
        self._native: Any = None
        self._loaded: set[str] = set()

    def activate(self, generator: Any, name: str) -> None:
        """Activate the adapter `name` in `generator`, before it reads its prompt.

        Raises `UsageError` for a name the package does not have, `PackageError` for a damaged file.
        """
        path = self._package.adapter_path(name)
        if self._native is None:
            self._native = og.Adapters(self._model)
        try:
            if name not in self._loaded:
                self._native.load(str(path), name)
                self._loaded.add(name)
            generator.set_active_adapter(self._native, name)
        except (RuntimeError, MemoryError) as error:
            if is_memory_failure(error):
                raise ResourceError(
                    f"there is not enough memory for the adapter {path}: pass a smaller "
                    "max_new_tokens (--max-new-tokens), or close other programs."
                ) from None
            reason = str(error).strip().splitlines()[0]
            raise PackageError(f"onnxruntime-genai cannot load {path}: {reason}") from None
