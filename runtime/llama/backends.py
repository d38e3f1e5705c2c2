"""What generates the tokens of an open package: our own engine, or onnxruntime-genai.

Both open the same package and answer alike; a backend turns a prompt into `Steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from llama_onnx.runtime.engine.failures import describe_failure
from llama_onnx.runtime.engine.sampling.choice import Choice, read_search, resolve
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.engine.sampling.sampler import Sampler
from llama_onnx.runtime.llama.generation import Run, Steps
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.llama.template import check_genai_reads
from llama_onnx.runtime.llama.text_files import open_genai_tokenizer, read_settings
from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.runtime.tokenizer.text_stream import Decoder, GenaiDecoder
from llama_onnx.targets.engines import EngineName, SpeculationName
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

# Modules that need an extra are imported where they are used, so that `help(Llama)` needs none.
if TYPE_CHECKING:
    from llama_onnx.runtime.engine.answer import AsyncAnswer
    from llama_onnx.runtime.engine.engine import Engine, Limits
    from llama_onnx.runtime.engine.events import Request
    from llama_onnx.runtime.engine.sampling.guidance import CompiledGuide
    from llama_onnx.runtime.placement.genai_model import OpenModel


@dataclass(frozen=True)
class Asked:
    """What an answer is to be: the most tokens, and how to choose them.

    `vocab_size` is the number of rows of the embedding. `measured`: greedily, to the full length,
    and without anything that was read before. `guide`: what the answer must be.
    """

    prompt: Tokens
    vocab_size: int
    length: int
    sampling: Sampling
    end_tokens: frozenset[int]
    adapter: str | None = None
    measured: bool = False
    guide: CompiledGuide | None = None


class Opened(Protocol):
    """A package open on `provider`; `asked` is the requested one, and `fallback` the reason why the
    two differ, None if they do not. `tuned` is what to say about settings that `tune` kept."""

    @property
    def provider(self) -> Provider:
        """What runs the graph."""

    @property
    def asked(self) -> Provider:
        """What was to run it."""

    @property
    def fallback(self) -> str | None:
        """Why the CPU runs it instead."""

    @property
    def tuned(self) -> str | None:
        """Which settings `tune` found for this machine, or why they are not used."""

    def to_json(self) -> dict[str, Any]:
        """Return what runs the model, and how that was verified."""


class Backend(Protocol):
    """An open package that generates."""

    name: EngineName

    @property
    def opened(self) -> Opened:
        """What runs the graph."""

    def open_tokenizer(self) -> Decoder:
        """Return genai's tokenizer, for a tokenizer.json with a decoder that is not Llama's."""

    def start(self, asked: Asked) -> Steps:
        """Return an answer that has read nothing yet; raises what `Llama.generate` raises."""

    def prepare(self, asked: Asked) -> Callable[[], AsyncAnswer]:
        """Return what starts the answer in the running asyncio loop; raises as `start` does."""

    def require_engine(self) -> Engine:
        """Return our own engine; raise `UsageError` if another runs the graph."""

    def close(self) -> None:
        """End all answers and free the session."""


def open_backend(
    name: EngineName,
    package: ModelPackage,
    context_length: int,
    provider: Provider,
    *,
    threads: int | None,
    allow_fallback: bool,
    limits: Limits | None = None,
    speculate: SpeculationName = "auto",
    draft: ModelPackage | None = None,
    tuned: bool = True,
) -> Backend:
    """Open `package` in the engine `name`; raises what `Llama.load` raises."""
    if name == "onnxruntime":
        from llama_onnx.runtime.engine.drafting import Speculation
        from llama_onnx.runtime.engine.engine import Engine
        from llama_onnx.runtime.engine.engine_settings import DEFAULT
        from llama_onnx.runtime.tuning.tuned import choose

        settings, remark = choose(package, provider, threads) if tuned else (DEFAULT, None)
        context = int(read_settings(draft.path)["context_length"]) if draft is not None else 0
        engine = Engine(
            package,
            context_length,
            provider,
            threads=threads,
            allow_fallback=allow_fallback,
            limits=limits,
            speculation=Speculation(speculate, draft, context),
            settings=settings,
        )
        return EngineBackend(package, engine, provider, remark)
    if speculate == "ngram" or draft is not None:
        raise UsageError(
            "onnxruntime-genai generates here, without drafts: leave out speculate and draft, or "
            "choose the engine onnxruntime (--engine onnxruntime)."
        )
    from llama_onnx.runtime.placement.genai_model import open_model

    opened = open_model(package.path, provider, threads=threads, allow_fallback=allow_fallback)
    return GenaiBackend(package, opened)


@dataclass(frozen=True)
class OpenEngine:
    """What runs the graph in our own engine; see `Opened`."""

    provider: Provider
    asked: Provider
    fallback: str | None
    tuned: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what runs the model, and how that was verified."""
        return {
            "name": self.provider.name,
            "asked": self.asked.name,
            "onnxruntime": self.provider.ort_name,
            "device": self.provider.device,
            "fallback": self.fallback,
            "tuned": self.tuned,
            "verified": "it is the only provider in the session"
            if self.provider == CPU
            else "ONNX Runtime reports the provider of every node",
        }


class EngineBackend(Backend):
    """Our own engine over plain ONNX Runtime."""

    name: EngineName = "onnxruntime"

    def __init__(
        self, package: ModelPackage, engine: Engine, asked: Provider, tuned: str | None = None
    ) -> None:
        self._package, self.engine = package, engine
        self._search = read_search(package.path)
        self._opened = OpenEngine(engine.provider, asked, engine.fallback, tuned)

    @property
    def opened(self) -> OpenEngine:
        """What runs the graph."""
        return self._opened

    def open_tokenizer(self) -> Decoder:
        """Return genai's tokenizer."""
        native = open_genai_tokenizer(self._package.path)
        if native is None:
            raise missing_extra("decoding an answer", "onnxruntime_genai", "cpu")
        return GenaiDecoder(native)

    def start(self, asked: Asked) -> Steps:
        """Return an answer that has read nothing yet."""
        from llama_onnx.runtime.llama.engine_run import EngineRun

        return EngineRun(self.engine, self._request(asked))

    def prepare(self, asked: Asked) -> Callable[[], AsyncAnswer]:
        """Return what starts the answer in the running asyncio loop."""
        request = self._request(asked)
        return lambda: self.engine.submit_async(request)

    def require_engine(self) -> Engine:
        """Return the engine."""
        return self.engine

    def close(self) -> None:
        """End all answers and free the session."""
        self.engine.close()

    def _request(self, asked: Asked) -> Request:
        from llama_onnx.runtime.engine.events import Request

        rows = self.engine.layout.vocab_size
        choice = Choice()
        if not asked.measured:
            choice = resolve(asked.sampling, self._search, vocab_size=rows)
        constraint = asked.guide.start() if asked.guide is not None else None
        request = Request(
            asked.prompt,
            asked.length - len(asked.prompt),
            Sampler(choice, asked.prompt.tolist(), rows, constraint),
            end_tokens=asked.end_tokens,
            adapter=asked.adapter,
            reuse=not asked.measured,
            speculate=not asked.measured,
        )
        self.engine.check(request)
        return request


class GenaiBackend(Backend):
    """onnxruntime-genai, one answer at a time."""

    name: EngineName = "genai"

    def __init__(self, package: ModelPackage, opened: OpenModel) -> None:
        from llama_onnx.runtime.llama.adapters import Adapters

        self._package, self._opened = package, opened
        self._adapters = Adapters(package, opened.model)

    @property
    def opened(self) -> OpenModel:
        """What runs the graph."""
        return self._opened

    def open_tokenizer(self) -> Decoder:
        """Return genai's tokenizer."""
        from llama_onnx.runtime.genai import og

        check_genai_reads(self._package.path)
        return GenaiDecoder(og.Tokenizer(self._opened.model))

    def start(self, asked: Asked) -> Steps:
        """Return an answer that has read nothing yet."""
        from llama_onnx.runtime.genai import og

        if asked.guide is not None:
            raise UsageError(
                "onnxruntime-genai, which generates here, cannot follow a guide: choose the engine "
                "onnxruntime (--engine onnxruntime)."
            )
        model = self._opened.model
        params = og.GeneratorParams(model)
        search: dict[str, Any] = {"do_sample": False, "min_length": asked.length}
        if not asked.measured:
            search = asked.sampling.search_options(asked.vocab_size)
        # genai allocates the KV cache for `max_length` tokens: no more than this answer can need.
        try:
            params.set_search_options(max_length=asked.length, **search)
            generator = og.Generator(model, params)
        except (RuntimeError, MemoryError) as error:
            if is_memory_failure(error):
                raise describe_failure(error, len(asked.prompt), asked.length) from None
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"{self._package.path / 'genai_config.json'} has settings that "
                f"onnxruntime-genai rejects: {reason}"
            ) from None
        if asked.adapter is not None:
            self._adapters.activate(generator, asked.adapter)
        return Run(generator, asked.prompt, self._opened.provider == CPU)

    def prepare(self, asked: Asked) -> NoReturn:
        """Raise `UsageError`: its thread holds Python's lock while it reads a prompt."""
        self.require_engine()

    def require_engine(self) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(
            "onnxruntime-genai, which generates here, answers one caller at a time: open the "
            'package with engine="onnxruntime".'
        )

    def close(self) -> None:
        """Do nothing: the model is freed with its last reference."""
