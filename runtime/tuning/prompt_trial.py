"""Whether a package's prompts may be read in int8 on this machine: proved, then measured.

This does not compute the same, bit for bit. So it is tried only if the user asks for it, must keep
the limits of the package's certificate, and says what it loses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.measure.certificate import Certificate
from llama_onnx.runtime.tuning import exact_products
from llama_onnx.runtime.tuning.cache_folder import new_folder, shortage
from llama_onnx.runtime.tuning.contest import Candidate, Verdict, hold, judge
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.runtime.tuning.proof import Proof, certificate_of, prove
from llama_onnx.runtime.tuning.tuned import PROMPTS_SUFFIX, Place
from llama_onnx.runtime.tuning.tuning_sample import Sample
from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.package import DATA_FILE, ModelPackage
from llama_onnx.targets.progress import SILENT, Progress

_GROWTH = 4.5
"""Most bytes of the new files for each byte of the package's weights: of 2 bits, in int8."""

_APART = ((), ("down_proj",))
"""Matrices to leave as they are, tried in turn: the input of `down_proj` has the largest outliers,
which a scale of the whole row does not suit."""


@dataclass(frozen=True)
class PromptTrial:
    """What came of it: `problem` is why nothing was measured, else None.

    `matrices` are in int8, `apart` names those that are not, and `nbytes` is what the graph takes
    on disk, and about as much in memory. `usual` is what the certificate says of the package's own
    graph, `int8` what it says of this one. `verdicts` are about the settings that were measured
    with it.
    """

    problem: str | None
    matrices: int = 0
    apart: tuple[str, ...] = ()
    nbytes: int = 0
    usual: Proof | None = None
    int8: Proof | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def best(self) -> Verdict | None:
        """That of the fastest settings which are faster by more than the noise."""
        kept = [verdict for verdict in self.verdicts if verdict.kept]
        return max(kept, key=lambda verdict: verdict.gain, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        usual = None if self.usual is None else self.usual.figures
        int8 = None if self.int8 is None else self.int8.figures
        return {
            "problem": self.problem,
            "matrices": self.matrices,
            "apart": list(self.apart),
            "bytes": self.nbytes,
            "usual": usual and asdict(usual),
            "int8": int8 and asdict(int8),
            "checks": [each.to_json() for each in (self.int8.checks if self.int8 else ())],
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }


def try_prompts(
    package: ModelPackage,
    place: Place,
    usual: EngineSettings,
    rounds: int,
    measure: Callable[[str, EngineSettings], Sample],
    progress: Progress = SILENT,
    *,
    untiled: bool = False,
) -> PromptTrial:
    """Write the graph to a new folder in `place`, check it with the certificate, and measure the
    settings `usual` with and without it; if `untiled`, also with attention without tiles. Whatever
    fails is the trial's `problem`."""
    try:
        if not exact_products.are_exact():
            return PromptTrial("this processor's products of int8 are not exact")
        room = shortage(place.folder, int(package.data_path.stat().st_size * _GROWTH))
        if room is not None:
            return PromptTrial(room)
        certificate = certificate_of(package)
        trial, folder = _proved(package, place, certificate, progress)
        if folder is None:
            return trial
        found = _candidates(replace(usual, prompts=folder), certificate, untiled=untiled)
        contest = hold(found, rounds, measure, usual)
        return replace(trial, verdicts=tuple(judge(each, contest) for each in found))
    except LlamaOnnxError as error:
        return PromptTrial(str(error).rstrip("."))


def _candidates(
    settings: EngineSettings, certificate: Certificate, *, untiled: bool
) -> list[Candidate]:
    found = [Candidate("prompts in int8", settings, "prompts", exact=False)]
    assert settings.prompts is not None, "the graph is written"
    if not untiled or not settings.tiled_attention:
        return found
    if prove(settings.prompts, certificate, tiled_attention=False).problem is None:
        without = replace(settings, tiled_attention=False)
        found.append(Candidate("prompts in int8, no tiles", without, "prompts", exact=False))
    return found


def _proved(
    package: ModelPackage, place: Place, certificate: Certificate, progress: Progress
) -> tuple[PromptTrial, Path | None]:
    """Return what is known of the last graph that was tried, and its folder if it keeps the
    certificate's limits."""
    progress.step("reading the certificate's passages")
    usual = prove(package.path, certificate)
    for apart in _APART:
        progress.step("writing prompts in int8")
        with new_folder(place.folder, PROMPTS_SUFFIX, "matrices in int8") as folder:
            matrices = write_prompt_graph(package, folder, apart, progress)
        progress.step("reading the certificate's passages in int8")
        int8 = prove(folder, certificate)
        nbytes = (folder / DATA_FILE).stat().st_size
        trial = PromptTrial(int8.problem, matrices, apart, nbytes, usual, int8)
        if int8.problem is None:
            return trial, folder
        shutil.rmtree(folder, ignore_errors=True)  # makes room for the next
    return trial, None
