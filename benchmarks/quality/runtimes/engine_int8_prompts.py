"""ONNX packages in our own engine, which reads prompts with a second graph in int8."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.runtimes import engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT
from llama_onnx.runtime.tuning import tuned
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.targets.package import ModelPackage


class Model(engine.Model):
    """A package after `llama-onnx tune --int8-prompts`, without that command's measurements: for
    random weights there is no certificate that could allow it."""

    def __init__(self, path: Path, threads: int) -> None:
        os.environ["XDG_CACHE_HOME"] = str(path.resolve().parent.parent / "cache")
        package = ModelPackage.open(path)
        if tuned.find(package) is None:
            _keep(package)
        super().__init__(path, threads)


def _keep(package: ModelPackage) -> None:
    place = tuned.require_place(package)
    with tuned.tuning(place):
        folder = Path(tempfile.mkdtemp(suffix=tuned.PROMPTS_SUFFIX, dir=place.folder))
        write_prompt_graph(package, folder)
        for file in folder.iterdir():
            file.chmod(0o600)
        tuned.keep(place, package, tuned.Tuned(replace(DEFAULT, prompts=folder), 0.0), {})
