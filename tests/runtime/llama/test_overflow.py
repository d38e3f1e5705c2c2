"""What of a conversation is left when the context is full, against what a person would keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llama_onnx.runtime.llama.conversation import Message, check_overflow
from llama_onnx.runtime.llama.overflow import fit_messages
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.targets.errors import ContextLengthError, UsageError

ROLES = {"S": "system", "D": "developer", "u": "user", "a": "assistant", "c": "assistant"}
ROLES |= {"t": "tool"}


def talk(letters: str) -> list[Message]:
    """A conversation of one message for each letter, whose role the letter tells; `c` calls."""
    return [
        {"role": ROLES[letter], "content": letter}
        | ({"tool_calls": [number]} if letter == "c" else {})
        for number, letter in enumerate(letters)
    ]


def encode(messages: Sequence[Message]) -> Tokens:
    """Ten tokens for each message."""
    return np.zeros(10 * len(messages), np.int32)


def fit(letters: str, context: int, new: Any = 5, **options: Any) -> tuple[str, str]:
    """What is kept and what is dropped."""
    policy = options.get("overflow", "drop_oldest")
    fitted = fit_messages(talk(letters), options.get("encode", encode), context, new, policy)
    assert len(fitted.tokens) == 10 * len(fitted.messages)
    kept, dropped = (
        "".join(message["content"] for message in part)
        for part in (fitted.messages, fitted.dropped)
    )
    return kept, dropped


@pytest.mark.parametrize(
    ("letters", "context", "kept"),
    [
        ("u", 20, "u"),
        ("uau", 35, "uau"),
        ("uau", 34, "u"),
        ("uauau", 55, "uauau"),
        ("uauau", 54, "uau"),
        ("Suau", 45, "Suau"),
        ("Suau", 44, "Su"),
        ("Su", 21, "Su"),
        ("SDuau", 40, "SDu"),
        # A turn is whole: a call stays with its answers, and what led to it.
        ("uctauau", 74, "uau"),
        ("Suctctauctau", 65, "Suctau"),
        ("Suctctauctau", 64, "Su"),
        ("Suauctct", 79, "Suctct"),
        ("uctau", 40, "u"),
        # Not only conversations in the usual order.
        ("auau", 40, "uau"),
        ("uuuau", 50, "uuau"),
        ("uSau", 40, "u"),
        ("uau" + "au" * 40, 60, "uauau"),
        ("S" + "ua" * 40 + "u", 50, "Suau"),
    ],
)
def test_the_oldest_turns_go_first_and_no_more_than_needed(
    letters: str, context: int, kept: str
) -> None:
    found, dropped = fit(letters, context)
    assert found == kept
    head = letters[: len(letters) - len(letters.lstrip("SD"))]
    assert head + dropped + kept.removeprefix(head) == letters


def test_a_large_limit_of_the_answer_displaces_only_a_quarter() -> None:
    assert fit("uauau", 66, new=1000)[0] == "uauau"  # 50 tokens and 16
    assert fit("uauau", 65, new=1000)[0] == "uau"


def test_what_stays_may_leave_less_room_than_the_answer_may_take() -> None:
    assert fit("uau", 11, new=5) == ("u", "ua")


@pytest.mark.parametrize(("letters", "context"), [("u", 10), ("Su", 20), ("uau", 10), ("uct", 30)])
def test_what_must_stay_and_leaves_no_room_is_refused(letters: str, context: int) -> None:
    with pytest.raises(ContextLengthError, match=f"context length is {context}, .*shorten it"):
        fit(letters, context)


def test_the_other_policy_refuses_instead() -> None:
    assert fit("uauau", 51, overflow="error") == ("uauau", "")
    with pytest.raises(ContextLengthError, match=r"conversation has 50 tokens.*drop_oldest"):
        fit("uauau", 50, overflow="error")


def test_a_text_that_is_too_long_to_be_encoded_is_left_out_too() -> None:
    def refusing(messages: Sequence[Message]) -> Tokens:
        if len(messages) > 5:
            raise ContextLengthError("more than twice the context.")
        return encode(messages)

    assert fit("ua" * 20 + "u", 40, encode=refusing)[0] == "uau"
    with pytest.raises(ContextLengthError, match="twice"):
        fit("ua" * 20 + "u", 40, encode=refusing, overflow="error")


def test_thousands_of_turns_are_not_encoded_one_after_the_other() -> None:
    lengths = []

    def counting(messages: Sequence[Message]) -> Tokens:
        lengths.append(len(messages))
        return encode(messages)

    assert fit("ua" * 4000 + "u", 40, encode=counting)[0] == "uau"
    assert len(lengths) < 20


@pytest.mark.parametrize("value", ["drop", "", None, 1, ["error"]])
def test_policies_have_names(value: Any) -> None:
    with pytest.raises(UsageError, match="overflow must be error or drop_oldest"):
        check_overflow(value)
