"""A conversation as an object: it keeps the messages, and what becomes of them at the end."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_onnx.runtime.engine.prefixes import common
from llama_onnx.runtime.llama.asking import DEFAULT_NEW_TOKENS, TurnOptions, prepare, start
from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.backends import Backend, EngineBackend
from llama_onnx.runtime.llama.conversation import Message, Overflow, check_messages
from llama_onnx.runtime.llama.generation import (
    AnswerEvent,
    FinishEvent,
    Generation,
    Observer,
    TextEvent,
)
from llama_onnx.runtime.llama.overflow import Fitted, fit_messages
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.llama.saving import (
    SessionReport,
    Setup,
    State,
    check_options,
    save,
)
from llama_onnx.runtime.llama.text_codec import TextCodec
from llama_onnx.runtime.llama.tools import parse_tool_calls, tool_names, with_template_calls
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_onnx.runtime.engine.engine import Engine


class Conversation:
    """A conversation with an open model. `Llama.conversation` and `Llama.restore` make one.

    It gives one answer at a time: asking while one runs is a `UsageError`. Any thread may ask.

    Attributes:
        restored: What `Llama.restore` found in the file; None for a new conversation.

    Examples:
        >>> with llama_onnx.Llama.load("tiny-int4") as model:
        ...     chat = model.conversation(system="the lazy dog", max_new_tokens=4)
        ...     for said in ("the fox", "the quick brown dog"):
        ...         answer = chat.say(said)
        ...         text = "".join(answer)
        ...     [message["role"] for message in chat.messages], answer.stats.reused_tokens > 20
        (['system', 'user', 'assistant', 'user', 'assistant'], True)
    """

    def __init__(
        self,
        codec: TextCodec,
        backend: Backend,
        setup: Setup,
        state: State,
        restored: SessionReport | None = None,
    ) -> None:
        self._codec, self._backend = codec, backend
        self._setup, self._state = setup, state
        self._answering = False
        self._leaving: tuple[Message, ...] = ()
        self._lock = RLock()  # an answer may be dropped, and end, while it is held
        self.restored = restored

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the messages; a message and its answer come in when the answer ends."""
        return copy.deepcopy([dict(message) for message in self._state.messages])

    @property
    def dropped(self) -> list[dict[str, Any]]:
        """A copy of the messages that were left out for lack of room, the oldest first; those that
        are left out for an answer that runs are there at once."""
        left_out = (*self._state.dropped, *self._leaving)
        return copy.deepcopy([dict(message) for message in left_out])

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter of all answers."""
        return self._setup.adapter

    @property
    def overflow(self) -> Overflow:
        """What happens once the conversation is longer than the context."""
        return self._setup.overflow

    def say(
        self, said: str | Message | Sequence[Message], **options: Unpack[TurnOptions]
    ) -> Generation:
        """Say something, and return the answer.

        Message and answer become a part of the conversation when the answer ends, also in the
        middle: then with the text that was shown. An answer that ends before it showed anything
        leaves the conversation as it was.

        Args:
            said: The text of a user's message, a message, or several: the answers of tools.
            **options: As in `Llama.generate`; they replace the conversation's own for this answer.

        Returns:
            An iterator over pieces of text; see `Llama.generate`. With tools, the calls in it are
            the `tool_calls` of its message.

        Raises:
            UsageError: Another answer is not over, or as `Llama.chat`.
            ContextLengthError: The conversation, or with `overflow="drop_oldest"` its last message,
                is longer than the context.
        """
        return self._start(self._turn(_read(said), options))

    def asay(
        self, said: str | Message | Sequence[Message], **options: Unpack[TurnOptions]
    ) -> AsyncGeneration:
        """Say something, for asyncio; see `say` and `Llama.agenerate`."""
        return self._prepare(self._turn(_read(said), options))

    def retry(self, **options: Unpack[TurnOptions]) -> Generation:
        """Return another answer to what was said last, which takes the place of the last answer.

        That one stays if the new one ends before it showed anything. Raises as `say` does, and
        `UsageError` if there is no answer yet. A greedy answer is the same again: pass a
        `temperature` or a `seed`.
        """
        return self._start(self._turn((), options, again=True))

    def aretry(self, **options: Unpack[TurnOptions]) -> AsyncGeneration:
        """Return another answer to what was said last, for asyncio; see `retry`."""
        return self._prepare(self._turn((), options, again=True))

    def undo(self) -> list[dict[str, Any]]:
        """Take the last answer back, and what it answered; return what was said.

        Raises `UsageError` if there is no answer yet, or one is not over.
        """
        with self._lock:
            self._check_idle()
            rest = self._unanswered()
            said: list[Message] = []
            while rest and rest[-1]["role"] not in ("assistant", "system", "developer"):
                said.insert(0, rest.pop())
            # What was computed for the rest is the start of what was computed for all.
            left = self._encode(rest) if rest and rest[-1]["role"] == "assistant" else ()
            length = common(self._state.tokens, np.asarray(left, np.int64))
            tokens = self._state.tokens[:length]
            self._state = replace(self._state, messages=tuple(rest), tokens=tokens)
        return copy.deepcopy([dict(message) for message in said])

    def fork(self) -> Conversation:
        """Return another conversation that begins with this one, without an answer that runs."""
        return Conversation(self._codec, self._backend, self._setup, self._state, self.restored)

    def save(self, path: str | os.PathLike[str]) -> SessionReport:
        """Save the conversation to a file, for `Llama.restore`.

        The file has the messages, the options, the tokens, and with our own engine the keys and
        values that were computed of them, which take as much room as in memory. It can be read by
        its owner only. `path` has its old content until all is written. An answer that runs is not
        a part of it.

        Args:
            path: The file; an existing one is replaced.

        Returns:
            What was saved; `left_out` says why there is no cache, if so.

        Raises:
            SessionError: The file cannot be written.
            ResourceError: The disk is full.
            PackageError: The package has changed since it was opened.
        """
        package, engine = self._codec.package, engine_of(self._backend)
        return save(Path(path), package, self._setup, self._state, engine)

    def _turn(self, new: Sequence[Message], options: TurnOptions, *, again: bool = False) -> Turn:
        checked = check_options(options)
        with self._lock:
            self._check_idle()
            state = self._state
            before = self._unanswered() if again else list(state.messages)
            chosen: dict[str, Any] = {**self._setup.options, **checked}
            fitted = fit_messages(
                [*before, *new],
                self._encode,
                self._codec.context_length,
                chosen.get("max_new_tokens", DEFAULT_NEW_TOKENS),
                self._setup.overflow,
            )
            self._answering, self._leaving = True, fitted.dropped
        return Turn(self, state, fitted, chosen)

    def _start(self, turn: Turn) -> Generation:
        try:
            answer = start(self._codec, self._backend, turn.prompt, **self._options(turn))
        except BaseException:
            turn.end()
            raise
        answer.observe(turn)
        return answer

    def _prepare(self, turn: Turn) -> AsyncGeneration:
        try:
            answer = prepare(self._codec, self._backend, turn.prompt, **self._options(turn))
        except BaseException:
            turn.end()
            raise
        answer.observe(turn)
        return answer

    def _options(self, turn: Turn) -> dict[str, Any]:
        stream = self._codec.stream(answer=True)
        return {"stream": stream, "adapter": self._setup.adapter, **turn.options}

    def _encode(self, messages: Sequence[Message]) -> Tokens:
        checked = [with_template_calls(m, f"messages[{i}]") for i, m in enumerate(messages)]
        setup = self._setup
        return self._codec.encode_chat(
            checked, tools=setup.tools, variables=setup.template_variables
        )

    def _unanswered(self) -> list[Message]:
        """Return the messages up to the last answer; raise `UsageError` if there is none."""
        messages = list(self._state.messages)
        if not messages or messages[-1]["role"] != "assistant":
            raise UsageError("this conversation has no answer yet: say something first.")
        return messages[:-1]

    def _check_idle(self) -> None:
        if self._answering:
            raise UsageError(
                "this conversation is still answering: read the answer to its end, or close it."
            )

    def _finish(self, turn: Turn) -> None:
        """Take what has come of a turn."""
        with self._lock:
            self._answering, self._leaving = False, ()
            if not (turn.finished or turn.text):
                return
            before, fitted = turn.before, turn.fitted
            message = _answer(turn.text, tool_names(self._setup.tools), fitted.messages)
            tokens = [*fitted.tokens.tolist(), *turn.tokens]
            self._state = State(
                (*fitted.messages, message),
                (*before.dropped, *fitted.dropped),
                np.array(tokens, np.int64),
            )


class Turn(Observer):
    """An answer in work: what it answers, and what has been shown of it."""

    def __init__(
        self, conversation: Conversation, before: State, fitted: Fitted, options: dict[str, Any]
    ) -> None:
        self._conversation: Conversation | None = conversation
        self.before, self.fitted, self.options = before, fitted, options
        self.text, self.finished = "", False
        self.tokens: list[int] = []

    @property
    def prompt(self) -> Tokens:
        """The tokens to answer."""
        return self.fitted.tokens

    def add(self, event: AnswerEvent) -> None:
        """Take what the reader is about to see."""
        self.text += event.text
        if isinstance(event, TextEvent):
            self.tokens.append(event.token)
        elif isinstance(event, FinishEvent):
            self.finished = event.finish_reason != "interrupted"

    def end(self) -> None:
        """Hand over what there is, once."""
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            conversation._finish(self)


def engine_of(backend: Backend) -> Engine | None:
    """Return our own engine; None if another one generates."""
    return backend.engine if isinstance(backend, EngineBackend) else None


def _read(said: str | Message | Sequence[Message]) -> list[Message]:
    """Return what is said as messages; raise `UsageError` for what nobody can say."""
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    elif isinstance(said, Mapping):
        said = [said]
    messages = check_messages(said, "what is said")
    for message in messages:
        if message["role"] == "assistant":
            raise UsageError(
                f"the assistant's messages come from the model: {shown('assistant')} cannot be the "
                "role of what is said."
            )
    return list(messages)


def _answer(text: str, names: Sequence[str], before: Sequence[Message]) -> Message:
    """Return an answer as a message, with the calls of tools that are in it."""
    parsed = parse_tool_calls(text, names)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.calls:
        known = sum(len(earlier.get("tool_calls") or ()) for earlier in before)
        message["tool_calls"] = [
            {"id": f"call_{known + number}", **call.to_json()}
            for number, call in enumerate(parsed.calls)
        ]
    return message
