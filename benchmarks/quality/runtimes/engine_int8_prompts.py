"""ONNX packages in our own engine, which reads prompts with a second graph in int8."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality.runtimes import engine
from llama_onnx.runtime.bench.together import request
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.engine.events import PromptEvent
from llama_onnx.runtime.tuning import tuned
from llama_onnx.runtime.tuning.cache_folder import new_folder
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.targets.package import ModelPackage

TOKENS, ROUNDS = 512, 3


class Model(engine.Model):
    """A package after `llama-onnx tune --int8-prompts`, without most of that command's trials: for
    random weights there is no certificate that could allow it. Attention has tiles or not,
    whichever is faster."""

    def __init__(self, path: Path, threads: int) -> None:
        os.environ["XDG_CACHE_HOME"] = str(path.resolve().parent.parent / "cache")
        package = ModelPackage.open(path)
        if not tuned.reads_prompts_apart(package):
            _keep(package, threads)
        super().__init__(path, threads)


def _keep(package: ModelPackage, threads: int) -> None:
    place = tuned.require_place(package)
    with tuned.tuning(place):
        with new_folder(place.folder, tuned.PROMPTS_SUFFIX, "matrices in int8") as folder:
            write_prompt_graph(package, folder)
        found = [replace(DEFAULT, prompts=folder, tiled_attention=each) for each in (True, False)]
        times = [_seconds(package, settings, threads) for settings in found]
        best = found[times.index(min(times))]
        tuned.keep(place, package, tuned.Tuned(best, 0.0), {})


def _seconds(package: ModelPackage, settings: EngineSettings, threads: int) -> float:
    """Return what a prompt takes, the best of some rounds."""
    times = []
    with Engine(package, 2 * TOKENS, threads=threads, settings=settings) as opened:
        for number in range(ROUNDS):
            ids = np.random.default_rng(number).integers(
                0, opened.layout.vocab_size, TOKENS, np.int32
            )
            for event in opened.submit(request(opened, ids, 1)):
                if isinstance(event, PromptEvent):
                    times.append(event.read_seconds)
    return min(times)
