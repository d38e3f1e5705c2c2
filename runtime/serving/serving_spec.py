"""What is served, and how: enough to open it in another process or on another machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from llama_onnx.runtime.engine.engine import Limits as EngineLimits
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.runtime.serving.app import MOST_WAITING, Settings, create_app
from llama_onnx.targets.engines import SPECULATIONS, SpeculationName
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage


@dataclass(frozen=True)
class ServingSpec:
    """A package, and how it is opened and served; the fields are those of `Llama.load` and of
    `Settings`, as JSON values.

    `sha256` is that of the manifest, which lists every file: another package is refused. None: any.
    """

    package: str
    sha256: str | None = None
    name: str | None = None
    rows: int = EngineLimits().rows
    waiting: int = MOST_WAITING
    cache_bytes: int | None = None
    max_length: int | None = None
    threads: int | None = None
    provider: str | None = None
    allow_fallback: bool = False
    speculate: SpeculationName = SPECULATIONS[0]
    draft: str | None = None
    log_prompts: bool = False

    @classmethod
    def of(cls, package: Path, **fields: Any) -> ServingSpec:
        """Return the spec for `package`, with the hash of the manifest that it has now."""
        opened = ModelPackage.open(package)
        opened.require_tokenizer()
        return cls(str(package.resolve()), hash_file(opened.index), **fields)

    @classmethod
    def from_json(cls, text: str) -> ServingSpec:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return all fields as JSON."""
        return json.dumps(asdict(self))

    def check(self, *, contents: bool = False) -> None:
        """Raise `PackageError` unless the package is the one that `sha256` means, and with
        `contents` every file is what its manifest says."""
        package = ModelPackage.open(Path(self.package))
        if self.sha256 not in (None, hash_file(package.index)):
            raise PackageError(
                f"{package.path} differs from the package that the server was started with: put "
                "the same package there, or restart the server."
            )
        if contents and (altered := package.verify()):
            raise PackageError(
                f"{package.path} is damaged: {', '.join(altered)} changed: copy the package anew."
            )

    def open(self) -> Llama:
        """Open the package; raises what `Llama.load` raises, and `PackageError` for another one."""
        self.check()
        model = Llama.load(
            self.package,
            max_length=self.max_length,
            threads=self.threads,
            provider=self.provider,
            allow_fallback=self.allow_fallback,
            engine="onnxruntime",
            speculate=self.speculate,
            draft=self.draft,
            limits=EngineLimits(self.cache_bytes, self.rows),
        )
        model.package.require_tokenizer()
        return model

    def app(self, model: Llama, verification: VerifyReport | None = None) -> FastAPI:
        """Return the application that serves `model`."""
        settings = Settings(self.name, self.waiting, self.log_prompts)
        return create_app(model, settings, verification)
