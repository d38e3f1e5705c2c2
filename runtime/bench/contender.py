"""A package open in this process, and the runs that are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from llama_onnx.runtime.bench.timings import Caches, SingleRun, StreamsRun, TurnRun
from llama_onnx.runtime.bench.together import follow, request, run_streams
from llama_onnx.runtime.bench.turns import (
    Script,
    chat_in_text,
    chat_length,
    has_chat,
    messages_in_ids,
)
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.sampling.parameters import PACKAGE_DEFAULT
from llama_onnx.runtime.engine.schedule import Capacity
from llama_onnx.runtime.llama.backends import Asked, EngineBackend
from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.no_tokenizer import SilentStream
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.memory import resident_bytes
from llama_onnx.targets.engines import EngineName
from llama_onnx.targets.provider import Provider


@dataclass(frozen=True)
class Opening:
    """What to open, and how."""

    package: Path
    engine: EngineName | None
    threads: int | None
    provider: Provider | None
    allow_fallback: bool


@dataclass(frozen=True)
class Facts:
    """An open package: what it is, how long opening took, and what it can do.

    `chat`: it can format a conversation. `capacity` of the engine's caches; None with genai, which
    generates one answer at a time.
    """

    package: str
    precision: str
    content: str
    provider: dict[str, Any]
    engine: EngineName
    context_length: int
    load_seconds: float
    resident: int | None
    chat: bool
    capacity: Capacity | None


class Contender(Protocol):
    """An open package, here or in a process of its own."""

    @property
    def facts(self) -> Facts:
        """What is known before anything is measured."""

    def single(self, prompt_tokens: int, new_tokens: int) -> SingleRun:
        """Generate one answer alone."""

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> StreamsRun:
        """Generate several answers at once."""

    def chat(self, number: int, script: Script) -> tuple[TurnRun, ...]:
        """Hold a conversation that no other `number` has."""

    def chat_length(self, script: Script) -> int:
        """Return how many tokens a conversation has at most."""

    def peak(self) -> int | None:
        """Return the most bytes of memory that the process has used."""

    def caches(self) -> Caches | None:
        """Return the bytes of the caches."""


class Here:
    """A package open in this process; see `Contender`."""

    def __init__(self, opening: Opening) -> None:
        """Open it; raises what `Llama.load` raises."""
        started = perf_counter()
        self._model = model = Llama.load(
            opening.package,
            threads=opening.threads,
            provider=opening.provider,
            allow_fallback=opening.allow_fallback,
            engine=opening.engine,
        )
        loaded, memory = perf_counter() - started, resident_bytes()
        self._backend = backend = model.backend
        self._engine: Engine | None = backend.engine if isinstance(backend, EngineBackend) else None
        manifest = model.package.files
        self.facts = Facts(
            str(opening.package),
            model.package.precision,
            ":".join(sorted(str(entry.get("sha256")) for entry in manifest.values())),
            model.opened.to_json(),
            backend.name,
            model.context_length,
            loaded,
            memory[0] if memory else None,
            has_chat(model),
            self._engine.capacity if self._engine else None,
        )

    def single(self, prompt_tokens: int, new_tokens: int) -> SingleRun:
        """Generate one answer alone, to its full length, of a prompt nothing is known of."""
        prompt = make_prompt(prompt_tokens, self._model)
        length = prompt_tokens + new_tokens
        asked = Asked(
            prompt, self._model.vocab_size, length, PACKAGE_DEFAULT, frozenset(), measured=True
        )
        run = self._backend.start(asked)
        for _ in Generation.of(run, SilentStream(), frozenset(), length=length):
            pass
        return SingleRun(prompt_tokens, run.prefill_seconds, tuple(run.step_seconds))

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> StreamsRun:
        """Generate several answers at once, each to a prompt of its own."""
        assert self._engine is not None
        prompts = [make_prompt(prompt_tokens, self._model, 1 + row) for row in range(count)]
        return run_streams(self._engine, prompts, new_tokens)

    def chat(self, number: int, script: Script) -> tuple[TurnRun, ...]:
        """Hold a conversation that no other `number` has."""
        hold = chat_in_text if script.text else self._chat_in_ids
        return tuple(hold(self._model, number, script))

    def chat_length(self, script: Script) -> int:
        """Return how many tokens a conversation has at most."""
        return chat_length(self._model, script)

    def peak(self) -> int | None:
        """Return the most bytes of memory that the process has used."""
        memory = resident_bytes()
        return memory[1] if memory else None

    def caches(self) -> Caches | None:
        """Return the bytes of the caches; None with genai, which does not tell."""
        if self._engine is None:
            return None
        size = self._engine.layout.position_bytes
        return Caches(size, self._engine.capacity.positions * size, self._engine.kept_bytes)

    def _chat_in_ids(self, model: Llama, number: int, script: Script) -> Iterator[TurnRun]:
        text: Tokens = np.empty(0, np.int32)
        for message in messages_in_ids(model.vocab_size, number, script):
            text = np.concatenate([text, message])
            count = script.answer_tokens
            if len(text) + count > script.room:
                return
            if self._engine is None:  # remembers nothing: what the answers say makes no difference
                run = self.single(len(text), count)
                yield TurnRun(len(text), 0, count, run.first_token_seconds)
                text = np.concatenate([text, np.zeros(count, np.int32)])
                continue
            started = perf_counter()
            stream, _ = follow(
                self._engine.submit(request(self._engine, text, count)), started, self._engine
            )
            first = stream.moments[0] - started
            yield TurnRun(len(text), stream.reused, count, first)
            text = np.concatenate([text, np.array(stream.tokens, np.int32)])


def make_prompt(length: int, model: Llama, number: int = 0) -> Tokens:
    """Return `length` random ids: the cost of a step does not depend on them."""
    return np.random.default_rng(number).integers(0, model.vocab_size, length, dtype=np.int32)
