"""What an open model offers for conversations that it keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.llama.asking import TurnOptions
from llama_onnx.runtime.llama.backends import Backend
from llama_onnx.runtime.llama.conversation import Message, Overflow, check_messages
from llama_onnx.runtime.llama.dialogue import Conversation, engine_of
from llama_onnx.runtime.llama.saving import Setup, State, restore
from llama_onnx.runtime.llama.text_codec import TextCodec
from llama_onnx.runtime.llama.tools import Tool

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Conversing:
    """What an open model offers for conversations that it keeps."""

    codec: TextCodec
    backend: Backend

    def conversation(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        tools: Sequence[Tool] = (),
        template_variables: Mapping[str, Any] | None = None,
        overflow: Overflow = "error",
        adapter: str | None = None,
        **options: Unpack[TurnOptions],
    ) -> Conversation:
        """Begin a conversation.

        Args:
            system: A system message at its start.
            messages: What has been said already.
            tools: See `encode_chat`; the calls in an answer are read into its message.
            template_variables: See `encode_chat`.
            overflow: What to do once it is longer than the context: "error" raises
                `ContextLengthError`; "drop_oldest" leaves the oldest turns out, as few as possible.
                The system message and the last turn always stay, and calls of tools stay with
                their answers.
            adapter: One of `package.adapters`, for all answers.
            **options: Keyword arguments of `generate` for all answers, such as `temperature`.

        Returns:
            The conversation; `say` asks for an answer.

        Raises:
            UsageError: An argument is out of range, or the package takes token ids only.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> chat = model.conversation(overflow="drop_oldest", max_new_tokens=4)
            >>> text = "".join(chat.say("the fox"))
            >>> [message["role"] for message in chat.messages]
            ['user', 'assistant']
        """
        package = self.codec.package
        package.require_tokenizer()
        setup = Setup.checked(
            package,
            {
                "tools": tools,
                "template_variables": template_variables,
                "overflow": overflow,
                "adapter": adapter,
                "options": options,
            },
        )
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        known = [*first, *messages]
        state = State(tuple(check_messages(known)) if known else ())
        return Conversation(self.codec, self.backend, setup, state)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        adapter: str | None = None,
        overflow: Overflow | None = None,
        messages_only: bool = False,
        **options: Unpack[TurnOptions],
    ) -> Conversation:
        """Return a conversation that `Conversation.save` saved.

        With our own engine, the next turn reads only what is new. A session is as trustworthy as
        its source: that its keys and values are those of its tokens cannot be checked.

        Args:
            path: The file.
            adapter: The adapter that it must have been saved with. None: any.
            overflow: See `conversation`. None: as saved.
            messages_only: Take the messages alone, also those of another package or adapter.
            **options: See `conversation`; they replace the saved ones.

        Returns:
            The conversation; `restored.left_out` says why the engine knows nothing of it, if so.

        Raises:
            SessionError: The file cannot be read, is damaged, or was saved with another package,
                another version of it, or another adapter.
            UsageError: An argument is out of range.
            PackageError: The package has changed since it was opened.
        """
        self.codec.package.require_tokenizer()
        asked = {"adapter": adapter, "overflow": overflow or "error", "options": options}
        given = Setup.checked(self.codec.package, asked)
        setup, state, report = restore(
            Path(path),
            self.codec.package,
            engine_of(self.backend),
            given,
            messages_only=messages_only,
        )
        setup = replace(
            setup,
            overflow=overflow or setup.overflow,
            options={**setup.options, **given.options},
        )
        return Conversation(self.codec, self.backend, setup, state, report)
