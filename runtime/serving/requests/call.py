"""What a request asks for, whichever of OpenAI's endpoints it came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llama_onnx.runtime.engine.sampling.guidance import Guide
from llama_onnx.runtime.engine.sampling.parameters import (
    PARAMETERS,
    RANDOM_SEED,
    Sampling,
    read_value,
)
from llama_onnx.runtime.llama.asking import prepare
from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.conversation import Message, Overflow, check_messages
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.overflow import fit_messages
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.runtime.llama.tools import check_tools, tool_names, with_template_calls
from llama_onnx.runtime.serving.requests.guides import answer_guide, tool_guide
from llama_onnx.runtime.serving.requests.schemas import FieldError
from llama_onnx.targets.errors import UsageError

MOST_CHOICES = 16
"""Most answers to one request."""

DEFAULT_NEW_TOKENS = 2048
"""Tokens of an answer whose request names no limit; the context limits them too."""

COMPLETION_NEW_TOKENS = 16
"""The same for /v1/completions, as in OpenAI's API."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A request that has been checked as far as that is possible without the model.

    Either `messages` or `prompts`. `choices` answers for each prompt. `tools` are offered to the
    template; `calls_named` are the tools whose calls are looked for in the answer, and `most_calls`
    limits how many it has. `ignore_eos`: no token ends an answer. `overflow` says what to do with
    messages that are longer than the context.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    stop: tuple[str, ...] = ()
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    calls_named: tuple[str, ...] = ()
    most_calls: int | None = None
    guide: Guide | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    continue_last: bool = False
    ignore_eos: bool = False
    overflow: Overflow = "error"

    @property
    def places(self) -> int:
        """How many answers it takes."""
        return self.choices * max(1, len(self.prompts))

    def prepare(self, model: Llama, adapter: str | None) -> list[AsyncGeneration]:
        """Return the answers, which have not started, prompt by prompt.

        Encodes each prompt once and compiles the guide: call it in a thread of its own. Raises what
        `Llama.achat` raises.
        """
        begins = bool(self.messages) and not self.continue_last
        return [
            prepare(
                model.codec,
                model.backend,
                tokens,
                model.codec.stream(answer=begins),
                sampling=_numbered(self.sampling, number),
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
                adapter=adapter,
                guide=self.guide,
                ignore_eos=self.ignore_eos,
            )
            for tokens in self._encoded(model)
            for number in range(self.choices)
        ]

    def _encoded(self, model: Llama) -> list[Tokens]:
        """Return the tokens of each prompt, or of the messages: without the oldest if these may be
        left out and do not fit."""
        if not self.messages:
            return [model.codec.encode_prompt(prompt) for prompt in self.prompts]
        encode = partial(
            model.codec.encode_chat,
            tools=self.tools,
            variables=self.template_variables,
            continue_last=self.continue_last,
        )
        if self.overflow == "error":
            return [encode(self.messages)]
        room, most = model.context_length, self.max_new_tokens
        return [fit_messages(self.messages, encode, room, most, self.overflow).tokens]


def _numbered(sampling: Sampling, number: int) -> Sampling:
    """Return the sampling of an answer's `number`: another seed, where one is given."""
    if number == 0 or sampling.seed in (None, RANDOM_SEED):
        return sampling
    return sampling.override(seed=((sampling.seed or 0) + number) % (1 << 64))


def chat_call(fields: Mapping[str, Any]) -> Call:
    """Read a checked request to /v1/chat/completions; raises `UsageError`."""
    if "text" not in fields.get("modalities", ["text"]) or "audio" in fields.get("modalities", []):
        raise FieldError("modalities", "modalities: the model writes text only.")
    new_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
    wanted = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    if wanted is None and "top_logprobs" in fields:
        raise FieldError("top_logprobs", "top_logprobs needs logprobs to be true.")
    return Call(
        messages=_messages(fields["messages"]),
        max_new_tokens=_new_tokens(new_tokens, DEFAULT_NEW_TOKENS),
        **_common(fields, wanted, fields.get("response_format")),
        **_template(fields),
    )


def completion_call(fields: Mapping[str, Any]) -> Call:
    """Read a checked request to /v1/completions; raises `UsageError`."""
    echo, wanted = bool(fields.get("echo")), fields.get("logprobs")
    if echo and wanted is not None:
        raise FieldError("echo", "echo: the prompt has no log probabilities: leave out logprobs.")
    if "prompt" not in fields:
        raise FieldError("prompt", "the request has no 'prompt': give it a text.")
    return Call(
        prompts=_prompts(fields["prompt"]),
        max_new_tokens=_new_tokens(fields.get("max_tokens"), COMPLETION_NEW_TOKENS),
        echo=echo,
        **_common(fields, wanted, None),
    )


def _common(
    fields: Mapping[str, Any], logprobs: int | None, answer_format: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the fields of `Call` that all endpoints have alike."""
    tools, named, forced = _tools(fields)
    guide = answer_guide(answer_format, fields.get("structured_outputs"))
    if forced is not None and guide is not None:
        raise FieldError("tool_choice", "tool_choice: a required call cannot have another format.")
    ignore_eos = fields.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise FieldError("ignore_eos", "ignore_eos must be true or false.")
    if ignore_eos and (guide is not None or forced is not None):
        raise FieldError("ignore_eos", "ignore_eos: an answer with a given format ends with it.")
    choices = fields.get("n", 1)
    if not 1 <= choices <= MOST_CHOICES:
        raise FieldError("n", f"n must be a whole number from 1 to {MOST_CHOICES}, not {choices}.")
    return {
        "model": fields["model"],
        "sampling": _sampling(fields, logprobs),
        "stop": check_stops(fields.get("stop", ()), "stop"),
        "choices": choices,
        "stream": bool(fields.get("stream")),
        "include_usage": bool(fields.get("stream_options", {}).get("include_usage")),
        "tools": tools,
        "calls_named": named,
        "most_calls": None if fields.get("parallel_tool_calls", True) else 1,
        "guide": guide if forced is None else forced,
        "ignore_eos": ignore_eos,
    }


_SAMPLING = tuple(name for name in PARAMETERS if name != "logprobs")
"""Fields of a request that are those of `Sampling`; the endpoints ask for logprobs differently."""


def _sampling(fields: Mapping[str, Any], logprobs: int | None) -> Sampling:
    values = {
        name: _of_field(name, partial(read_value, name), fields[name])
        for name in _SAMPLING
        if name in fields
    }
    if logprobs is not None:
        values["logprobs"] = read_value("logprobs", logprobs, "top_logprobs")
    return Sampling(**values)


def _of_field(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except UsageError as error:
        raise FieldError(name, str(error)) from None


def _new_tokens(value: Any, default: int) -> int:
    if value is None:
        return default
    return int(
        _of_field("max_tokens", lambda v: read_value("max_new_tokens", v, "max_tokens"), value)
    )


def _messages(messages: Any) -> tuple[Message, ...]:
    """Return a conversation as templates know it: "developer" is their "system"."""

    def read(value: Any) -> tuple[Message, ...]:
        if not isinstance(value, Sequence):
            return tuple(check_messages(value))
        plain = [
            with_template_calls(message, f"messages[{number}]")
            if isinstance(message, Mapping)
            else message
            for number, message in enumerate(value)
        ]
        return tuple(
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in check_messages(plain)
        )

    found: tuple[Message, ...] = _of_field("messages", read, messages)
    return found


def _template(fields: Mapping[str, Any]) -> dict[str, Any]:
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise FieldError("chat_template_kwargs", "chat_template_kwargs must be an object.")
    continued = fields.get("continue_final_message", False)
    if not isinstance(continued, bool):
        raise FieldError("continue_final_message", "continue_final_message must be true or false.")
    return {"template_variables": variables, "continue_last": continued}


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """Return a prompt, or several, each a text or token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(part, int) for part in prompt):
        return (tuple(prompt),)
    if not prompt or len(prompt) > MOST_CHOICES:
        raise FieldError("prompt", f"prompt must be a text, or 1 to {MOST_CHOICES} of them.")
    return tuple(part if isinstance(part, str) else tuple(part) for part in prompt)


def _tools(
    fields: Mapping[str, Any],
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...], Guide | None]:
    """Return the tools for the template, the names whose calls count, and the guide of a call
    that is required."""
    offered = fields.get("tools", ())
    choice = fields.get("tool_choice", "auto" if offered else "none")
    tools = tuple(_of_field("tools", check_tools, offered))
    if choice == "none":
        return (), (), None
    if not tools:
        raise FieldError("tool_choice", "tool_choice needs tools.")
    names = tuple(tool_names(tools))
    if choice == "auto":
        return tools, names, None
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        wanted = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or wanted not in names:
            raise FieldError("tool_choice", "tool_choice must name one of the tools.")
        names = (str(wanted),)
    elif choice != "required":
        raise FieldError("tool_choice", 'tool_choice must be "none", "auto" or "required".')
    chosen = [tool for tool in tools if tool["function"]["name"] in names]
    return tools, names, tool_guide(chosen)


def call_text(call: Call) -> str:
    """Return what a call asks, as JSON, for a log that may have prompts."""
    return json.dumps(list(call.messages or call.prompts), ensure_ascii=False)
