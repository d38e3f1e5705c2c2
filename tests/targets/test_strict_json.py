"""`parse_json` gives what the standard library gives, and refuses what breaks later steps."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.targets.strict_json import JSONError, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)

REFUSED = {
    "not UTF-8": b'"\xff"',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "cut": b'{"a": ',
    "empty": b"",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested 101 times": b"[" * 101 + b"]" * 101,
    "nested objects": b'{"a":' * 100_000,
    "NaN": b"[NaN]",
    "infinity": b"[-Infinity]",
    "float out of range": b"[1e400]",
    "5,000 digits": b"[" + b"9" * 5000 + b"]",
    "lone surrogate": b'["\\ud800"]',
    "lone surrogate as a key": b'{"\\uDFFF": 1}',
    "a key twice": b'{"a": 1, "a": 2}',
}


@given(VALUES)
def test_what_the_standard_library_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_refuses_what_later_steps_cannot_handle(text: bytes) -> None:
    with pytest.raises(JSONError):
        parse_json(text, unique=True)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_raise_nothing_else(text: bytes) -> None:
    with contextlib.suppress(JSONError):
        parse_json(text)


def test_a_hundred_levels_are_read() -> None:
    text = b'{"a":[' * 50 + b"]}" * 50
    assert parse_json(text) == json.loads(text)


def test_minus_zero_is_not_an_integer() -> None:
    assert type(parse_json(b"-0")) is float  # as in serde_json, which reads safetensors


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_many_small_values_are_refused_before_they_take_memory() -> None:
    text = b"[" + b"[]," * 5_000_000 + b"1]"
    tracemalloc.start()
    with pytest.raises(JSONError, match="values"):
        parse_json(text)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_key_that_is_there_twice_is_found_in_time() -> None:
    """In linear time: by comparing each key with all it would take hours."""
    text = "{" + ",".join(f'"{number}":0' for number in range(400_000)) + ',"7":0}'
    with pytest.raises(JSONError, match="has the key '7' twice"):
        parse_json(text.encode(), unique=True)
