"""Whether a package's prompts may be read in int8 on this machine: proved, then measured.

Everything else that `tune` tries computes the same, bit for bit. This does not, so it is tried only
if the user asks for it, must keep the limits of the package's certificate, and says what it loses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.measure.certificate import Certificate, read_certificate, stale_files
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import Comparison
from llama_onnx.runtime.measure.replay import replay
from llama_onnx.runtime.measure.situations import PREFILL
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.runtime.tuning import exact_products
from llama_onnx.runtime.tuning.cache_folder import new_folder, shortage
from llama_onnx.runtime.tuning.contest import Candidate, Verdict, hold, judge
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.runtime.tuning.tuned import PROMPTS_SUFFIX, Place
from llama_onnx.runtime.tuning.tuning_sample import Sample
from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.package import DATA_FILE, ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.providers import CPU

_GROWTH = 4.5
"""Most bytes of the new files for each byte of the package's weights: of 2 bits, in int8."""

_APART = ((), ("down_proj",))
"""Matrices to leave as they are, tried in turn: the input of `down_proj` has the largest outliers,
which a scale of the whole row does not suit."""


@dataclass(frozen=True)
class PromptTrial:
    """What came of it: `problem` is why nothing was measured, else None.

    `matrices` are in int8, `apart` names those that are not, and `nbytes` is what the graph takes
    on disk, and about as much in memory. `usual` is how far the package's own graph is from the
    original weights on the certificate's passages, `int8` how far this one is; the `checks` are its
    distance from the package's weights.
    """

    problem: str | None
    matrices: int = 0
    apart: tuple[str, ...] = ()
    nbytes: int = 0
    usual: Comparison | None = None
    int8: Comparison | None = None
    checks: tuple[Check, ...] = ()
    verdict: Verdict | None = None

    @property
    def kept(self) -> Path | None:
        """The folder of the graph, if it is faster by more than the noise."""
        verdict = self.verdict
        return verdict.candidate.settings.prompts if verdict and verdict.kept else None

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "problem": self.problem,
            "matrices": self.matrices,
            "apart": list(self.apart),
            "bytes": self.nbytes,
            "usual": self.usual and asdict(self.usual),
            "int8": self.int8 and asdict(self.int8),
            "checks": [each.to_json() for each in self.checks],
            "verdict": self.verdict and self.verdict.to_json(),
        }


def try_prompts(
    package: ModelPackage,
    place: Place,
    usual: EngineSettings,
    rounds: int,
    measure: Callable[[str, EngineSettings], Sample],
    progress: Progress = SILENT,
) -> PromptTrial:
    """Write the graph to a new folder in `place`, check it with the certificate, and measure the
    settings `usual` with and without it. Whatever fails is the trial's `problem`."""
    try:
        if not exact_products.are_exact():
            return PromptTrial("this processor's products of int8 are not exact")
        room = shortage(place.folder, int(package.data_path.stat().st_size * _GROWTH))
        if room is not None:
            return PromptTrial(room)
        certificate = read_certificate(package.path)
        if stale_files(certificate, package):
            return PromptTrial(f"the certificate of {package.path} is for other files")
        trial, folder = _proved(package, place, certificate, progress)
        if folder is None:
            return trial
        candidate = Candidate("prompts in int8", replace(usual, prompts=folder), "prompts")
        contest = hold([candidate], rounds, measure, usual)
        return replace(trial, verdict=judge(candidate, contest))
    except LlamaOnnxError as error:
        return PromptTrial(str(error).rstrip("."))


def _proved(
    package: ModelPackage, place: Place, certificate: Certificate, progress: Progress
) -> tuple[PromptTrial, Path | None]:
    """Return what is known of the last graph that was tried, and its folder if it keeps the
    certificate's limits."""
    progress.step("reading the certificate's passages")
    usual = _replayed(package.path, certificate)[1]
    for apart in _APART:
        progress.step("writing prompts in int8")
        with new_folder(place.folder, PROMPTS_SUFFIX, "matrices in int8") as folder:
            matrices = write_prompt_graph(package, folder, apart, progress)
        progress.step("reading the certificate's passages in int8")
        checks, int8 = _replayed(folder, certificate)
        missed = next((check for check in checks if not check.passed), None)
        problem = None if missed is None else _missed(missed)
        nbytes = (folder / DATA_FILE).stat().st_size
        trial = PromptTrial(problem, matrices, apart, nbytes, usual, int8, checks)
        if problem is None:
            return trial, folder
        shutil.rmtree(folder, ignore_errors=True)  # makes room for the next
    return trial, None


def _missed(check: Check) -> str:
    metric, limit = check.threshold.metric.replace("_", " "), check.threshold.limit
    found = "is not a number" if check.value != check.value else f"is {check.value:.2g}"
    return f"on the certificate's passages the {metric} {found}, and the limit is {limit:g}"


def _replayed(
    folder: Path, certificate: Certificate
) -> tuple[tuple[Check, ...], Comparison | None]:
    """Return how far the graph in `folder` is from the package's weights, beside the limits for
    passages that are read at once, and how far from the original's."""
    graph = GraphSession.open(folder)
    (figures,), _ = replay(certificate, graph, [PREFILL], SILENT)
    checks = checks_of(certificate, CPU, [figures], [])
    return tuple(c for c in checks if c.threshold.measure == "shipped"), figures.total
