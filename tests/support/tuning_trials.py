"""Trials of `tune` in this process, of which tests say which are faster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.tuning.tuning_sample import Sample, Workload, describe, measure_here


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def here(package: Path, settings: EngineSettings, workload: Workload) -> Sample:
    """Measure in this process, which takes milliseconds."""
    return measure_here(json.loads(json.dumps(describe(package, settings, workload))))


class Faster:
    """Measures for real, and then says of some settings that they were faster."""

    def __init__(self, **wanted: Any) -> None:
        self.wanted = wanted

    def __call__(self, package: Path, settings: EngineSettings, workload: Workload) -> Sample:
        sample = here(package, settings, workload)
        hits = sum(getattr(settings, name) == value for name, value in self.wanted.items())
        seconds = 10.0 / 2**hits
        values = {**sample.to_json(), "prefill_seconds": seconds, "decode_seconds": 1.0}
        return Sample(**{**values, "repeating_seconds": 1.0, "own_bytes": 100})


def tune(package: Path, *options: object) -> Result:
    return run("tune", package, "--rounds", 2, "--prompt-tokens", 200, "--new-tokens", 8, *options)
