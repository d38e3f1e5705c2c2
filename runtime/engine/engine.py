"""A package open for many callers at once: the front of the engine."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from threading import Lock

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.answer import Answer, AsyncAnswer, Channel
from llama_onnx.runtime.engine.bound_graph import Parameters
from llama_onnx.runtime.engine.cache_budget import ROWS, decide_capacity
from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.device_memory import DeviceBuffers, Joiner
from llama_onnx.runtime.engine.drafting import Speculation, Verifier, open_speculator
from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.engine.events import Request
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.engine.loop import Loop
from llama_onnx.runtime.engine.prefixes import Entry, Prefixes, Tokens
from llama_onnx.runtime.engine.shared_rows import Rows, SharedRows
from llama_onnx.runtime.engine.single_rows import DeviceRows, GrowingRows
from llama_onnx.runtime.engine.task import Task
from llama_onnx.runtime.memory import forgetting_pages, merge_pages, own_ranges, trim_heap
from llama_onnx.runtime.placement.session import OpenSession, open_session
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, UsageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU


@dataclass(frozen=True)
class Limits:
    """What the caches may take: `cache_bytes` (None: half of what is free), and how many sequences
    are in work at once; others wait."""

    cache_bytes: int | None = None
    rows: int = ROWS


@dataclass(frozen=True)
class Load:
    """What an engine does at the moment: answers in work, answers that wait, and the share of the
    caches that they and earlier texts use, from 0 to 1."""

    running: int
    waiting: int
    used: float


class Engine:
    """An open package that generates many answers at once, in a thread of its own.

    Attributes:
        provider: What runs the graph, and as `fallback` why it is not the one asked for, or None.
        layout: The caches and the width of the logits.
        capacity: What the caches may hold.
        context_length: The most tokens of a text.
        copies: Whether caches can be copied, so that a text can start with what another read.
        int8_prompts: Whether another graph reads prompts, in int8; see `EngineSettings.prompts`.
    """

    def __init__(
        self,
        package: ModelPackage,
        context_length: int,
        provider: Provider = CPU,
        *,
        threads: int | None = None,
        allow_fallback: bool = False,
        limits: Limits | None = None,
        speculation: Speculation | None = None,
        settings: EngineSettings = DEFAULT,
    ) -> None:
        """Open the graph of `package` as `verify` does, but for `choose_rows`.

        `speculation` is none by default. `settings` are for the CPU; `threads` overrides theirs.

        Raises `ProviderError`, `UsageError` for a senseless number of threads and for drafts that
        cannot be, and `PackageError` if ONNX Runtime refuses the graph.
        """
        speculation = speculation or Speculation()
        limits = limits or Limits()
        settings = settings if provider == CPU else DEFAULT
        threads = settings.threads if threads is None else threads
        spin = settings.spin and speculation.draft is None
        before = own_ranges()
        opened = _open(package, provider, replace(settings, spin=spin), threads, allow_fallback)
        prompts = _open_prompts(settings, provider, threads, opened.shares_buffer, package)
        trim_heap()  # what packing needed for a moment
        merge_pages(before)
        self.package, self.context_length = package, context_length
        self.provider = CPU if opened.fallback else provider
        self.fallback = opened.fallback
        self.layout = CacheLayout.of(opened.session)
        verifier = Verifier(package, self.layout, opened.shares_buffer, self.provider)
        if speculation == Speculation("auto") and not settings.drafts:
            speculation = Speculation()
        drafts = open_speculator(speculation, verifier, threads)
        adapters, sessions = Adapters(package), (opened.session, prompts)
        open_rows = _rows_of(sessions, self.layout, self.provider, opened.shares_buffer, adapters)
        self.capacity = decide_capacity(
            self.layout,
            context_length,
            cache_bytes=limits.cache_bytes,
            rows=limits.rows,
            rectangular=self.provider.views and opened.shares_buffer,
            provider=self.provider,
            beside=drafts.position_bytes,
        )
        self.copies = self.provider.views or not opened.shares_buffer
        self.int8_prompts = prompts is not None
        self._adapters, self._keys = adapters, count(1)
        self._loop = Loop(
            open_rows,
            self.capacity,
            self.layout.position_bytes,
            settings.chunk if self.provider == CPU else None,
            drafts.speculator,
        )
        # Also at the end of the process, where a thread must not be in the middle of a step.
        self._end = weakref.finalize(self, self._loop.close)

    def submit(self, request: Request) -> Answer:
        """Start an answer and return it; the engine generates it whether or not it is read.

        Raises `UsageError` for what the model cannot take, `PackageError` for a damaged adapter,
        `ResourceError` if the caches cannot hold it even alone, and `LlamaOnnxError` if the engine
        is closed.
        """
        channel = Channel()
        task = self._task(request, channel)
        answer = Answer(channel, self, self._loop.is_alive)
        self._loop.put(task)
        return answer

    def submit_async(self, request: Request) -> AsyncAnswer:
        """Start an answer whose events come to the running asyncio loop; see `submit`.

        Reads an adapter's file at its first use: call `prepare` before, where that is too slow.
        """
        channel = Channel()
        task = self._task(request, channel)
        answer = AsyncAnswer(channel, self, channel.deliver_to(asyncio.get_running_loop()))
        self._loop.put(task)
        return answer

    def check(self, request: Request) -> None:
        """Raise what `submit` would raise for a request."""
        self._task(request, Channel())

    def is_alive(self) -> bool:
        """Return whether answers can be had: not after `close`, or a mistake in the engine."""
        return self._loop.is_alive()

    def load(self) -> Load:
        """Return what the engine does at the moment, from any thread."""
        running, waiting, positions = self._loop.load()
        return Load(running, waiting, min(1.0, positions / self.capacity.positions))

    def export_prefix(self, tokens: Tokens, adapter: str | None = None) -> Entry | None:
        """Return what the caches have of the start of `tokens`, None for nothing; from any thread.

        Its arrays are the engine's own, which never change: nothing is copied. They stay in memory
        as long as the entry does. Raises `LlamaOnnxError` if the engine is closed.
        """
        wanted = np.asarray(tokens, np.int64)

        def find(prefixes: Prefixes, _room: int) -> Entry | None:
            length, entry = prefixes.find(adapter, wanted)
            return None if entry is None else entry.start(length)

        return self._loop.call(find)

    def make_room(self, positions: int) -> bool:
        """Drop texts that were read before until `positions` more fit; return whether they do now.

        Drops nothing if they cannot. From any thread; raises as `export_prefix` does.
        """

        def drop(prefixes: Prefixes, room: int) -> bool:
            if positions <= room:
                prefixes.shrink(room - positions)
            return positions <= room

        return self.copies and self._loop.call(drop)

    def import_prefix(self, entry: Entry) -> bool:
        """Keep what was read for a text in another process, or before; return whether it is kept.

        It is not where there is no room beside the answers in work, or caches are on a device. The
        caller vouches that the keys and values are those of the tokens, and does not change them.
        From any thread. Raises `UsageError` for an entry that does not fit the graph, and else as
        `export_prefix` does.
        """
        _check_entry(entry, self.layout, self.context_length)
        if entry.group is not None:
            self._adapters.load(entry.group)

        def put(prefixes: Prefixes, room: int) -> bool:
            if len(entry.tokens) > room:
                return False
            prefixes.put(entry, room)
            return True

        return self.copies and self._loop.call(put)

    def prepare(self, adapter: str) -> None:
        """Read an adapter's file; raise `UsageError` or `PackageError` if there is no sound one."""
        self._adapters.load(adapter)

    @property
    def cache_bytes(self) -> int:
        """The bytes that caches of answers in work take now."""
        return self._loop.positions[0] * self.layout.position_bytes

    @property
    def kept_bytes(self) -> int:
        """The bytes of what is kept of earlier texts."""
        return self._loop.positions[1] * self.layout.position_bytes

    def close(self) -> None:
        """End all answers, which get an error, and free the session and all caches."""
        self._end()

    def __enter__(self) -> Engine:
        """Return the engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def _task(self, request: Request, channel: Channel) -> Task:
        _check(request, self.layout.vocab_size, self.context_length)
        if request.adapter is not None:
            self._adapters.load(request.adapter)
        task = Task(next(self._keys), request, channel)
        if not self.capacity.holds([task.need]):
            raise ResourceError(
                f"not enough memory for a prompt of {task.prompt_tokens:,} tokens and an answer of "
                f"up to {request.max_new_tokens:,}: the caches hold {self.capacity.positions:,} "
                "tokens; pass a shorter prompt or a smaller max_new_tokens (--max-new-tokens)."
            )
        return task


class Adapters:
    """The LoRA adapters of a package, each read at its first use."""

    def __init__(self, package: ModelPackage) -> None:
        self._package, self._lock = package, Lock()
        self._read: dict[str, Parameters] = {}

    def load(self, name: str) -> Parameters:
        """Return the parameters of the adapter `name`, by the graph's inputs.

        Raises `UsageError` for a name the package does not have, `PackageError` for a damaged file.
        """
        path = self._package.adapter_path(name)
        with self._lock:
            if name not in self._read:
                self._read[name] = _read_adapter(path)
            return self._read[name]


def _read_adapter(path: Path) -> Parameters:
    try:
        return ort.read_adapter(path)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise PackageError(f"onnxruntime cannot load {path}: {ort.first_line(error)}") from None


def _open(
    package: ModelPackage,
    provider: Provider,
    settings: EngineSettings,
    threads: int | None,
    allow_fallback: bool,
) -> OpenSession:
    """Open the package's graph."""
    with forgetting_pages(package.path / DATA_FILE):
        return open_session(
            (settings.packed or package.path) / MODEL_FILE,
            provider,
            threads=threads,
            allow_fallback=allow_fallback,
            arena=settings.arena,
            spin=settings.spin,
            parallel=provider == CPU,
            edit=choose_rows if provider.views and settings.packed is None else None,
            tiled_attention=settings.tiled_attention,
        )


def _open_prompts(
    settings: EngineSettings,
    provider: Provider,
    threads: int | None,
    shares_buffer: bool,
    package: ModelPackage,
) -> ort.Session | None:
    """Return a session of the graph that reads prompts; None if there is none, or no cache that
    two graphs can share."""
    if settings.prompts is None or not (provider == CPU and shares_buffer):
        return None
    try:
        with forgetting_pages(settings.prompts / DATA_FILE):
            return open_session(
                settings.prompts / MODEL_FILE,
                provider,
                threads=threads,
                arena=settings.arena,
                spin=False,  # answers follow, by the other session's threads
                parallel=True,
                edit=choose_rows,
                tiled_attention=settings.tiled_attention,
            ).session
    except (OSError, LlamaOnnxError) as error:
        raise ResourceError(
            "the graph that reads prompts in int8 does not open: "
            f"{str(error).rstrip('.')}; remove it with `llama-onnx tune {package.path} --forget`, "
            "or set LLAMA_ONNX_TUNED=0."
        ) from None


def _rows_of(
    sessions: tuple[ort.Session, ort.Session | None],
    layout: CacheLayout,
    provider: Provider,
    shares_buffer: bool,
    adapters: Adapters,
) -> Callable[[str | None], Rows]:
    """Return a function that opens rows for an adapter, of the kind that the graph needs here;
    `sessions` are of the graph, and of the one for prompts."""
    session, prompts = sessions

    @cache
    def joiner() -> Joiner:
        return Joiner(layout, provider)

    def open_rows(name: str | None) -> Rows:
        adapter = adapters.load(name) if name is not None else {}
        if not shares_buffer:
            return GrowingRows(session, layout, adapter)
        if provider.views:
            buffers = None if provider == CPU else DeviceBuffers(joiner())
            device = provider.ort_device
            return SharedRows(session, layout, adapter, buffers, device, prompts=prompts)
        return DeviceRows(session, layout, adapter, provider.ort_device)

    return open_rows


def _check(request: Request, vocab_size: int, context_length: int) -> None:
    """Raise `UsageError` for a request that the graph has no rows or positions for."""
    prompt = np.asarray(request.prompt)
    if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or not prompt.size:
        raise UsageError("a prompt must be a flat array of one or more token ids.")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise UsageError(f"a token id must be a whole number from 0 to {vocab_size - 1:,}.")
    if request.max_new_tokens < 1:
        raise UsageError(
            f"max_new_tokens must be a whole number of at least 1, not {request.max_new_tokens}."
        )
    if len(prompt) + request.max_new_tokens > context_length:
        raise UsageError(
            f"a prompt of {len(prompt):,} and {request.max_new_tokens:,} new tokens are more than "
            f"the context of {context_length:,} tokens can hold: ask for fewer."
        )


def _check_entry(entry: Entry, layout: CacheLayout, context_length: int) -> None:
    """Raise `UsageError` for an entry that is not of this graph's caches."""
    tokens, shapes = entry.tokens, layout.shapes(len(entry.tokens))
    found = {name: (part.shape, part.dtype.type) for name, part in entry.block.items()}
    if tokens.dtype != np.int64 or tokens.ndim != 1 or not 0 < len(tokens) <= context_length:
        raise UsageError(f"a text must have 1 to {context_length:,} token ids, as int64.")
    if tokens.min() < 0 or tokens.max() >= layout.vocab_size or found != shapes:
        raise UsageError("the keys and values are not those of this graph.")
