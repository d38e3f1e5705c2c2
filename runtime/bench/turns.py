"""A chat of several turns, in text or, where a package has no chat template, in token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from llama_onnx.runtime.bench.timings import TurnRun
from llama_onnx.runtime.llama.conversation import Message
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.targets.errors import UsageError

_WISH = (
    "tell me a long story about a fox who crosses a river with a dog and say in the end what each "
    "of them learned on the way"
)


@dataclass(frozen=True)
class Script:
    """A chat: `turns` messages of `words` words each (in `text`) or token ids, and answers of at
    most `answer_tokens` tokens; all of it takes at most `room` tokens."""

    turns: int
    words: int
    answer_tokens: int
    text: bool
    room: int


def message(number: int, turn: int, words: int) -> str:
    """Return what the user says; no two conversations and no two turns begin alike."""
    return f"{number}.{turn} {' '.join(islice(cycle(_WISH.split()), words))}"


def opening(model: Llama, number: int) -> list[Message]:
    """Return how conversation `number` begins: unlike any other, where the template allows it.

    Otherwise a template's own introduction would be known in the first turn, and the first message
    is what differs.
    """
    system: list[Message] = [{"role": "system", "content": f"{number}"}]
    try:
        model.encode_chat([*system, {"role": "user", "content": "1"}])
    except UsageError:
        return []
    return system


def has_chat(model: Llama) -> bool:
    """Return whether the package can format a conversation."""
    try:
        model.encode_chat([{"role": "user", "content": "1"}])
    except UsageError:
        return False
    return True


def chat_length(model: Llama, script: Script) -> int:
    """Return the most tokens of the chat, if answers have as many tokens when read as when
    generated."""
    answers = script.turns * script.answer_tokens
    if not script.text:
        return script.turns * script.words + answers
    messages = opening(model, 1)
    for turn in range(1, script.turns + 1):
        messages.append({"role": "user", "content": message(1, turn, script.words)})
        messages.append({"role": "assistant", "content": ""})
    try:
        return len(model.encode_chat(messages[:-1])) + answers
    except UsageError:  # far more tokens than the context holds
        return 2 * model.context_length


def chat_in_text(model: Llama, number: int, script: Script) -> Iterator[TurnRun]:
    """Hold conversation `number` and yield its turns, as many as there is room for."""
    messages = opening(model, number)
    for turn in range(1, script.turns + 1):
        messages.append({"role": "user", "content": message(number, turn, script.words)})
        if not _fits(model, messages, script):
            return
        answer = model.chat(messages, max_new_tokens=script.answer_tokens, temperature=0)
        messages.append({"role": "assistant", "content": "".join(answer)})
        stats = answer.stats
        yield TurnRun(
            stats.prompt_tokens, stats.reused_tokens, stats.new_tokens, stats.first_token_seconds
        )


def _fits(model: Llama, messages: Sequence[Message], script: Script) -> bool:
    try:
        return len(model.encode_chat(messages)) + script.answer_tokens <= script.room
    except UsageError:
        return False


def messages_in_ids(vocab_size: int, number: int, script: Script) -> Sequence[Tokens]:
    """Return random messages: conversations with other numbers have others."""
    drawn = np.random.default_rng([number, script.words]).integers(
        0, vocab_size, (script.turns, script.words), dtype=np.int32
    )
    return list(drawn)
