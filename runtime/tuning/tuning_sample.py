"""One measurement of a package with given settings, in a process of its own.

The process starts with nothing in memory, and may crash alone. Each opens the package, warms up,
reads a prompt and generates: tokens are drawn in advance, so all settings do the same work. It does
so up to three times, within some seconds, and the best time counts: others use the machine too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.doctor.child import command_of, run
from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.engine.failures import require_finite
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, describe_reason
from llama_onnx.targets.package import ModelPackage

_MARK = "llama-onnx-trial "
_PERIOD = 7
_WARM_UP = 16
_TIMES, _ENOUGH_SECONDS = 3, 3.0
_SECONDS = 3600.0


@dataclass(frozen=True)
class Workload:
    """What a trial does: read `prompt_tokens`, generate `new_tokens`; if `drafts`, once more a
    text that repeats itself, with drafts where the settings have them."""

    context_length: int
    prompt_tokens: int
    new_tokens: int
    drafts: bool = False


@dataclass(frozen=True)
class Sample:
    """What a trial took. `digest` is that of all logits it saw; `repeating_seconds` are those of
    the text that repeats itself; `own_bytes` see `memory`."""

    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    repeating_seconds: float | None
    digest: str
    own_bytes: int | None
    resident_bytes: int | None

    @property
    def seconds(self) -> float:
        """The time for prompt and answer."""
        return self.prefill_seconds + self.decode_seconds

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)


def measure(package: Path, settings: EngineSettings, workload: Workload) -> Sample:
    """Measure once; raises `ResourceError` if the process crashes or the package fails there."""
    job = json.dumps(describe(package, settings, workload))
    outcome = run(command_of(__name__, job), seconds=_SECONDS)
    answer = outcome.answer(_MARK)
    if answer is None:
        raise ResourceError(
            f"the process that measures {package} failed: {outcome.error or 'it said nothing'}; "
            "the system may have ended it for lack of memory."
        )
    if "error" in answer:
        raise ResourceError(f"{package} cannot be measured: {answer['error']}.")
    return Sample(**answer)


def describe(package: Path, settings: EngineSettings, workload: Workload) -> dict[str, Any]:
    """Return as JSON what to measure."""
    return {
        "package": str(package),
        "settings": {
            **asdict(settings),
            "packed": settings.packed and str(settings.packed),
            "prompts": settings.prompts and str(settings.prompts),
        },
        "workload": asdict(workload),
    }


def main() -> None:
    """Do what the command line says, and print what it took."""
    try:
        answer = measure_here(json.loads(sys.argv[1])).to_json()
    except LlamaOnnxError as error:
        answer = {"error": str(error).rstrip(".")}
    except Exception as error:  # a mistake in this code, or a library's own exception
        answer = {"error": f"{type(error).__name__}: {describe_reason(error)}"}
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer)}\n")


@dataclass(frozen=True)
class _Token:
    token: int
    logprobs: None = None


@dataclass
class _Scripted:
    """Takes the tokens it was given, whatever the logits are, of which it keeps a hash."""

    tokens: Iterator[int]
    digest: Any = field(default_factory=hashlib.sha256)

    def choose(self, logits: npt.NDArray[np.float32]) -> _Token:
        require_finite(logits, 0)
        self.digest.update(logits.tobytes())
        return _Token(next(self.tokens))


def measure_here(job: dict[str, Any]) -> Sample:
    """Measure in this process what `describe` returned."""
    from llama_onnx.runtime.engine.drafting import Speculation
    from llama_onnx.runtime.engine.engine import Engine
    from llama_onnx.runtime.memory import own_bytes, resident_bytes

    workload = Workload(**job["workload"])
    settings = EngineSettings(**job["settings"])
    packed, prompts = (each and Path(each) for each in (settings.packed, settings.prompts))
    settings = replace(settings, packed=packed, prompts=prompts)
    package = ModelPackage.open(Path(job["package"]))
    started = perf_counter()
    with Engine(
        package,
        workload.context_length,
        settings=settings,
        speculation=Speculation("auto" if workload.drafts else "off"),
    ) as engine:
        load = perf_counter() - started
        random = np.random.default_rng(0)
        vocabulary = engine.layout.vocab_size
        prompt = random.integers(0, vocabulary, workload.prompt_tokens)
        plain = random.integers(0, vocabulary, workload.new_tokens).tolist()
        _run(engine, prompt[:_WARM_UP], plain[:2])
        runs = _repeat(lambda: _run(engine, prompt, plain))
        memory = own_bytes(), resident_bytes()
        repeating = None
        if workload.drafts:
            pattern = [*plain, *range(_PERIOD)][:_PERIOD]
            again = (pattern * (1 + workload.new_tokens))[: workload.new_tokens]
            start = np.array(pattern * (workload.prompt_tokens // _PERIOD or 1))
            twice = _repeat(lambda: _run(engine, start, again, drafts=True))
            repeating = min(decode for _, decode, _ in twice)
    own, resident = memory
    prefill, decode = (min(times) for times in list(zip(*runs, strict=True))[:2])
    # One digest if all runs saw the same.
    digest = " ".join(sorted({digest for *_, digest in runs}))
    return Sample(load, prefill, decode, repeating, digest, own, resident and resident[0])


def _repeat(once: Callable[[], _Run]) -> list[_Run]:
    runs: list[_Run] = []
    started = perf_counter()
    while len(runs) < _TIMES and (not runs or perf_counter() - started < _ENOUGH_SECONDS):
        runs.append(once())
    return runs


_Run: TypeAlias = tuple[float, float, str]
"""The seconds for the prompt and for the answer, and the hash of the logits."""


def _run(
    engine: Any, prompt: npt.NDArray[np.int64], tokens: list[int], *, drafts: bool = False
) -> _Run:
    from llama_onnx.runtime.engine.events import PromptEvent, Request, TokenEvent

    chooser = _Scripted(iter(tokens))
    request = Request(prompt, len(tokens), chooser, reuse=False, speculate=drafts)
    read = decode = 0.0
    for event in engine.submit(request):
        if isinstance(event, PromptEvent):
            read = event.read_seconds
        elif isinstance(event, TokenEvent):
            decode += event.seconds
    return read, decode, chooser.digest.hexdigest()
