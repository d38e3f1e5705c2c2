"""Whether a package's prompts may be read in int8 on this machine: proved, then measured.

Everything else that `tune` tries computes the same bit for bit; this does not. So it is tried only
if the user asks for it, must keep the limits of the package's certificate, and says what it loses.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.measure.certificate import Certificate, read_certificate, stale_files
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import Comparison
from llama_onnx.runtime.measure.replay import replay
from llama_onnx.runtime.measure.situations import PREFILL
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.runtime.tuning.contest import Candidate, Verdict, hold, judge
from llama_onnx.runtime.tuning.machine import Machine
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.runtime.tuning.tuned import PROMPTS_SUFFIX, Place
from llama_onnx.runtime.tuning.tuning_sample import Sample
from llama_onnx.targets.durable import flush_tree
from llama_onnx.targets.errors import PackageError, ResourceError, UnsupportedError, describe_reason
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
    rounds: int,
    measure: Callable[[str, EngineSettings], Sample],
    progress: Progress = SILENT,
) -> PromptTrial:
    """Write the graph to a new folder in `place`, check it with the certificate, and measure it.

    Raises `ResourceError` if it cannot be written.
    """
    problem = _unsuitable(place.machine) or _no_room(package, place)
    if problem is not None:
        return PromptTrial(problem)
    try:
        certificate = read_certificate(package.path)
        if stale_files(certificate, package):
            return PromptTrial(f"the certificate of {package.path} is for other files")
        found = _proved(package, place, certificate, progress)
    except (PackageError, UnsupportedError) as error:
        return PromptTrial(str(error).rstrip("."))
    if isinstance(found, PromptTrial):
        return found
    trial, folder = found
    candidate = Candidate("prompts in int8", replace(DEFAULT, prompts=folder), "prompts")
    return replace(trial, verdict=judge(candidate, hold([candidate], rounds, measure)))


def _unsuitable(machine: Machine) -> str | None:
    features = set(machine.features)
    if "AVX2" in features and not features.intersection({"VNNI", "AVX-VNNI"}):
        # Its instruction adds two products in 16 bits, and stops at the largest number.
        return "a processor with AVX2 and without VNNI does not add up products of int8 exactly"
    return None


def _no_room(package: ModelPackage, place: Place) -> str | None:
    needed = int(package.data_path.stat().st_size * _GROWTH)
    free = shutil.disk_usage(place.folder).free
    if free > needed:
        return None
    return f"{place.folder} has {free / 1e9:.1f} GB free, and needs up to {needed / 1e9:.1f} GB"


def _proved(
    package: ModelPackage, place: Place, certificate: Certificate, progress: Progress
) -> tuple[PromptTrial, Path] | PromptTrial:
    """Return a graph that keeps the certificate's limits, and its folder; or why none does."""
    progress.step("reading the certificate's passages")
    usual = _replayed(package.path, certificate)[1]
    trial = PromptTrial("no graph was tried")
    for apart in _APART:
        progress.step("writing prompts in int8")
        folder, matrices = _written(package, place, apart, progress)
        progress.step("reading the certificate's passages in int8")
        checks, int8 = _replayed(folder, certificate)
        nbytes = (folder / DATA_FILE).stat().st_size
        missed = [check for check in checks if not check.passed]
        problem = _missed(missed[0]) if missed else None
        trial = PromptTrial(problem, matrices, apart, nbytes, usual, int8, checks)
        if problem is None:
            return trial, folder
    return trial


def _missed(check: Check) -> str:
    limit = check.threshold
    return (
        f"{limit.measure} {limit.metric} of the certificate's passages is {check.value:.2g}, and "
        f"the limit {limit.limit:g}"
    )


def _written(
    package: ModelPackage, place: Place, apart: tuple[str, ...], progress: Progress
) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(suffix=PROMPTS_SUFFIX, dir=place.folder))
    try:
        matrices = write_prompt_graph(package, folder, apart, progress)
        for file in folder.iterdir():
            file.chmod(0o600)
        flush_tree(folder)
    except OSError as error:
        raise ResourceError(
            f"the graph for prompts cannot be written to {place.folder}: {describe_reason(error)}."
        ) from None
    return folder, matrices


def _replayed(
    folder: Path, certificate: Certificate
) -> tuple[tuple[Check, ...], Comparison | None]:
    """Return the distances of the graph in `folder` from the package's and the original weights."""
    graph = GraphSession.open(folder)
    (figures,), _ = replay(certificate, graph, [PREFILL], SILENT)
    return checks_of(certificate, CPU, [figures], []), figures.total
