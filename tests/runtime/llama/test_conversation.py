"""What a conversation, a prompt, token ids and stop strings may be, however they arrive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama_onnx.runtime.llama.conversation import check_messages
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import check_text_length, check_tokens
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.targets.errors import UsageError

PROMPT = "the quick brown fox"
USER = {"role": "user", "content": "hi"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def text(said: Any, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": said}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", r"messages must be a list of .*, not a text\."),
        (b"hi", r"must be a list of .*, not bytes\."),
        (USER, r"must be a list of .*, not an object\."),
        (MappingProxyType(USER), "must be a list of"),
        (None, r"must be a list of .*, not None\."),
        (5, r"must be a list of .*, not 5\."),
        ([], "must have at least one message"),
        ([USER] * 10_001, "has 10,001 messages, more than the 10,000 allowed"),
        ([USER, "hi"], r'messages\[1\] must be an object such as {"role": "user".*, not a text\.'),
        ([USER, None], r"messages\[1\] must be an object"),
        ([[("role", "user")]], r"messages\[0\] must be an object .*, not a list\."),
        ([{}], r"messages\[0\] has no 'role'"),
        ([{"content": "hi"}], "has no 'role'"),
        ([{"role": "user"}], "has no 'content'"),
        ([USER | {"role": None}], "'role' must be a text that is not empty, not None"),
        ([USER | {"role": ""}], "'role' must be a text that is not empty"),
        ([USER | {"role": 1}], "'role' must be a text that is not empty, not 1"),
        ([USER | {"content": None}], "'content' must be a text, not None"),
        ([USER | {"content": None, "tool_calls": []}], "'content' must be a text, not None"),
        ([USER | {"content": 5}], "'content' must be a text, not 5"),
        ([USER | {"content": True}], "'content' must be a text, not True"),
        ([USER | {"content": b"hi"}], "'content' must be a text, not bytes"),
        ([USER | {"content": text("hi")}], "'content' must be a text, not an object"),
        ([USER | {"content": []}], "'content' is an empty list"),
        ([USER | {"content": ["hi"]}], "a part of 'content' must be"),
        ([USER | {"content": [{"text": "hi"}]}], "a part of 'content' must be"),
        ([USER | {"content": [text(None)]}], "a part of type 'text' needs 'text'"),
        ([USER | {"content": [text("a"), text("b", "image_url")]}], "a part of type 'image_url'"),
        ([USER | {"content": "a\ud800"}], r"messages\[0\] has bytes that are not UTF-8"),
        ([USER | {"content": [text("\udcff")]}], "bytes that are not UTF-8"),
        ([USER | {"role": "\ud800"}], "bytes that are not UTF-8"),
        ([USER | {"name": {1, 2}}], "an entry that JSON cannot express"),
        ([USER | {"name": float("nan")}], "an entry that JSON cannot express"),
    ],
)
def test_what_is_no_conversation_is_refused(llama: Llama, messages: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_messages(messages)
    with pytest.raises(UsageError, match=said):
        llama.chat(messages)


def test_what_is_a_conversation_in_another_form(llama: Llama) -> None:
    expected = llama.encode_chat([USER | {"content": "a\nb"}]).tolist()
    forms: list[Any] = [
        [USER | {"content": [text("a"), text("b")]}],
        [USER | {"content": (text("a") | {"cache_control": {}}, text("b"))}],
        (USER | {"content": "a\nb"},),
        (message for message in [USER | {"content": "a\nb"}]),
        [MappingProxyType(USER | {"content": "a\nb"})],
    ]
    for form in forms:
        assert llama.encode_chat(form).tolist() == expected
    assert check_messages([USER | {"name": "Eve"}]) == [USER | {"name": "Eve"}]


@given(ANYTHING | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), ANYTHING)))
def test_anything_is_a_conversation_or_refused_in_a_sentence(messages: Any) -> None:
    try:
        checked = check_messages(messages)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    assert all(isinstance(message["content"], str) for message in checked)
    assert json.loads(json.dumps(checked)) == checked


def test_a_nul_cuts_nothing(package: Path, llama: Llama) -> None:
    prompt = "the\0fox"
    expected = Tokenizer.from_file(str(package / "tokenizer.json")).encode(prompt).ids
    assert llama.encode(prompt).tolist() == expected
    whole = "".join(llama.generate(PROMPT, max_new_tokens=20))
    assert "".join(llama.generate(PROMPT, max_new_tokens=20, stop="a\0b")) == whole
    tokens = llama.encode_chat([USER | {"content": prompt}]).tolist()
    assert tokens == llama.encode("<|user|>the\0fox\n<|assistant|>").tolist()


@pytest.mark.parametrize("prompt", [None, 5, b"hi", ["hi"], {"text": "hi"}])
def test_a_prompt_is_a_text_or_ids(llama: Llama, prompt: Any) -> None:
    expected = r"the prompt must be a text or token ids, not \w+\.|'hi' is not a token id"
    with pytest.raises(UsageError, match=expected):
        llama.generate(prompt)


# Stop strings


def test_one_text_is_one_stop_string(llama: Llama) -> None:
    whole = "".join(llama.generate(PROMPT, max_new_tokens=40))
    stop = whole[-1] + "never there" + whole[1]
    assert "".join(llama.generate(PROMPT, max_new_tokens=40, stop=stop)) == whole
    assert "".join(llama.generate(PROMPT, max_new_tokens=40, stop=whole[4:7])) == whole[:4]


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (None, "stop must be a text or a list of texts, not None"),
        (5, "stop must be a text or a list of texts, not 5"),
        ("", "stop must hold texts that are not empty, not ''"),
        ([""], "stop must hold texts that are not empty, not ''"),
        (["a", None], "stop must hold texts that are not empty, not None"),
        ([b"a"], "stop must hold texts that are not empty, not b'a'"),
        ("x" * 1025, "stop has a text of 1,025 characters, more than the 1,024 allowed"),
        (["ab"] * 300_000, "stop has 300,000 texts, more than the 256 allowed"),
        (("ab" for _ in range(300_000)), "stop has more than the 256 allowed"),
    ],
)
def test_what_is_no_stop_string_is_refused(llama: Llama, stop: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        llama.generate(PROMPT, stop=stop)


def test_stop_strings_from_any_iterable() -> None:
    assert check_stops(stop for stop in ("a", "b")) == check_stops(("a", "b")) == ("a", "b")


# Token ids


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([288], "288 is not a token id: this model's are whole numbers from 0 to 287"),
        ([3, -1], "-1 is not a token id"),
        ([2**31], "2147483648 is not a token id"),
        ([10**400], "a number of 401 digits is not a token id"),
        ([True], "True is not a token id"),
        ([1.0], "1.0 is not a token id"),
        (["1"], "'1' is not a token id"),
        ([None], "None is not a token id"),
        ([[1]], r"\[1\] is not a token id"),
        ("12", "token ids must be a list of whole numbers, not '12'"),
        (b"12", "token ids must be a list of whole numbers"),
        (None, "token ids must be a list of whole numbers, not None"),
        (np.array([1.0]), "a flat array of whole numbers, not float64 of 1 dimensions"),
        (np.array([True]), "a flat array of whole numbers, not bool"),
        (np.array([[1]]), "a flat array of whole numbers, not int64 of 2 dimensions"),
        (np.array([1, 288]), "288 is not a token id"),
        (np.array([-(2**40)]), "-1099511627776 is not a token id"),
        (np.array([2**63], np.uint64), "9223372036854775808 is not a token id"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_token_id_is_refused(llama: Llama, ids: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        llama.measure(ids, 1)


def test_token_ids_from_any_iterable() -> None:
    def numbers() -> Iterator[int]:
        yield from (3, 287)

    for ids in ([3, 287], (3, 287), numbers(), np.array([3, 287]), [np.int64(3)]):
        checked = check_tokens(ids, 288)
        assert checked.dtype == np.int32 and checked[0] == 3


# Length


@pytest.mark.parametrize(
    ("length", "refused", "encoded"), [(400, False, 0), (401, False, 400), (10**7, True, 3200)]
)
def test_a_long_text_is_not_encoded_whole(length: int, refused: bool, encoded: int) -> None:
    """One token for 10 characters: 2,000 characters are twice a context of 100."""
    seen = [0]

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 10

    if refused:
        with pytest.raises(UsageError, match=r"first 3,200 are already more than 200 tokens"):
            check_text_length("a" * length, 100, count)
    else:
        check_text_length("a" * length, 100, count)
    assert seen[-1] == encoded
