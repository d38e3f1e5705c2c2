"""The answers to one request, merged as they come, with the calls of tools taken out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.generation import AnswerEvent, FinishEvent, TextEvent
from llama_onnx.runtime.llama.generation_stats import GenerationStats
from llama_onnx.runtime.llama.tools import ToolCall, parse_tool_calls

Finish = Literal["stop", "length", "tool_calls"]

_TAG = "<tool_call>"
_BARE = ("{", "<|python_tag|>")


@dataclass(frozen=True)
class Part:
    """A piece of the answer `index`: text, and the tokens that it came with.

    The last one of an answer has the calls of tools that were found, the reason of its end and its
    statistics.
    """

    index: int
    text: str = ""
    tokens: tuple[TextEvent, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    finish: Finish | None = None
    stats: GenerationStats | None = None


class CallFilter:
    """Passes text through, and holds back what may be the call of a tool until the answer ends.

    Where no tools were offered, it passes everything. A call starts with `<tool_call>` anywhere, or
    the whole answer is one: see `parse_tool_calls`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held, self._shown = names, "", False

    def feed(self, text: str) -> str:
        """Add the next piece and return the text that can be shown now."""
        if not self._names:
            return text
        held = self._held + text
        start = held.lstrip()
        if not self._shown and any(
            start.startswith(form) or form.startswith(start) for form in _BARE
        ):
            self._held = held
            return ""
        found = held.find(_TAG)
        length = found if found >= 0 else len(held) - _partial(held)
        self._held = held[length:]
        self._shown = self._shown or bool(held[:length])
        return held[:length]

    def rest(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the rest of the text, and the calls in it."""
        answer = parse_tool_calls(self._held, self._names)
        return answer.content, answer.calls


def _partial(text: str) -> int:
    """Return how many characters at the end of `text` may be the start of a tag."""
    lengths = range(min(len(_TAG) - 1, len(text)), 0, -1)
    return next((length for length in lengths if _TAG.startswith(text[-length:])), 0)


@dataclass(frozen=True)
class Answered:
    """All parts of one answer together."""

    text: str
    tokens: tuple[TextEvent, ...]
    last: Part


def gathered(parts: Iterable[Part], count: int) -> list[Answered]:
    """Return the `count` answers that `parts` are of, which are over."""
    own: list[list[Part]] = [[] for _ in range(count)]
    for part in parts:
        own[part.index].append(part)
    return [
        Answered(
            "".join(part.text for part in each),
            tuple(token for part in each for token in part.tokens),
            each[-1],
        )
        for each in own
    ]


async def merged(
    answers: Sequence[AsyncGeneration],
    names: Collection[str],
    end_tokens: Collection[int],
    most_calls: int | None = None,
) -> AsyncIterator[Part]:
    """Yield the parts of all `answers` as they come, and at the end of each its last.

    `names` are the tools whose calls are looked for; an answer has at most `most_calls` of them.
    Closing this ends all of them. Raises the error of the first that fails.
    """
    queue: asyncio.Queue[tuple[int, AnswerEvent | BaseException]] = asyncio.Queue()
    readers = [
        asyncio.ensure_future(_read(answer, index, queue)) for index, answer in enumerate(answers)
    ]
    filters = [CallFilter(names) for _ in answers]
    left = len(answers)
    try:
        while left:
            index, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, FinishEvent):
                left -= 1
                yield _last(index, event, filters[index], most_calls)
            else:
                tokens = () if event.token in end_tokens else (event,)
                yield Part(index, filters[index].feed(event.text), tokens)
    finally:
        for answer, reader in zip(answers, readers, strict=True):
            answer.cancel()
            reader.cancel()


async def _read(
    answer: AsyncGeneration,
    index: int,
    queue: asyncio.Queue[tuple[int, AnswerEvent | BaseException]],
) -> None:
    try:
        async for event in answer.events():
            queue.put_nowait((index, event))
    except Exception as error:
        queue.put_nowait((index, error))


def _last(index: int, event: FinishEvent, calls: CallFilter, most_calls: int | None) -> Part:
    text = calls.feed(event.text)
    rest, found = calls.rest()
    found = found[:most_calls]
    finish: Finish = "length" if event.finish_reason == "length" else "stop"
    return Part(
        index,
        text + rest,
        calls=found,
        finish="tool_calls" if found else finish,
        stats=event.stats,
    )


@dataclass(frozen=True)
class Usage:
    """The tokens of a request; `cached` of its prompts' were known before."""

    prompt: int
    completion: int
    cached: int

    @classmethod
    def of(cls, parts: Iterable[Part], choices: int) -> Usage:
        """Return the sums, by the last part of each answer, in any order.

        The answers to one prompt follow one another by index, and it counts once.
        """
        ordered = sorted(parts, key=lambda part: part.index)
        stats = [part.stats for part in ordered if part.stats is not None]
        prompts = stats[::choices]
        return cls(
            sum(entry.prompt_tokens for entry in prompts),
            sum(entry.new_tokens for entry in stats),
            sum(entry.reused_tokens for entry in prompts),
        )

    def to_json(self) -> dict[str, object]:
        """Return OpenAI's usage object of the two older endpoints."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
