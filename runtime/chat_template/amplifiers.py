"""Operations whose result can be much larger than what they are given, checked before they run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2.sandbox import SandboxedFormatter
from markupsafe import EscapeFormatter

from llama_onnx.runtime.chat_template.meter import Meter, TooMuchError, current

_WIDEST, _DEEPEST = 10_000, 16
_WIDTHS = {"batch", "center", "indent", "round", "slice", "truncate", "wordwrap"}
_SLOW = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
"""Filters that can take the square of the text's length."""

_SLOW_TEXT = 32 * 1024

_SHALLOW = {
    *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map"),
    *("reject", "rejectattr", "reverse", "select", "selectattr", "slice"),
}
"""Filters that look at no more than the outermost list, so that a long one need not be weighed."""


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise `TooMuchError` if `left operator right` could be too large."""
    meter = current()
    meter.weigh([left, right])
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_percent(meter, left, right)
    elif operator == "*":
        for one, count in ((left, right), (right, left)):
            if isinstance(one, (str, bytes, list, tuple)) and isinstance(count, int):
                items, text = meter.weigh(one)
                meter.need(max(items if isinstance(one, (list, tuple)) else 0, text) * count)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        meter.need(left.bit_length() * right)


def _check_percent(meter: Meter, form: str | bytes, values: Any) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    # Wide fields: a run of digits, or a star, which takes the width from the values.
    if re.search(r"[0-9]{5}|[%)][#0\- +0-9.]*\*", text):
        raise TooMuchError.text()
    _, size = meter.weigh(values)
    meter.need(len(text) + text.count("%") * size)


def check_filter(name: str, given: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raise `TooMuchError` if the filter `name` could make too much of `given` and `options`."""
    meter = current()
    values = [*given[1:], *options.values()]
    items, size = meter.weigh(values if name in _SHALLOW else [given[:1], values])
    if name in _WIDTHS and _largest(values) > _WIDEST:
        raise TooMuchError.text()
    if name in _SLOW:
        meter.need(size * (meter.text // _SLOW_TEXT))
    if name == "indent":
        width = max(_largest(values), _longest(values), 4)
        meter.need(size + len(str(given[0]).splitlines()) * width)
    elif name == "tojson" and max(_largest(values), _longest(values)) > _DEEPEST:
        raise TooMuchError.text()
    elif name == "replace" and len(given) > 2:
        _check_replace(meter, str(given[0]), str(given[1]), str(given[2]))
    elif name == "join":
        meter.need(size + items * _longest(values))
    elif name == "format" and given:
        _check_percent(meter, str(given[0]), values)


def check_method(method: Any, given: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Raise `TooMuchError` if calling `method` of a built-in type could make too much."""
    meter = current()
    meter.weigh([*given, options])
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    values = [*given, *options.values()]
    if isinstance(owner, (int, float)):
        meter.need(_largest(values))
    elif isinstance(owner, (str, bytes)):
        check = _METHODS.get(name)
        if check is not None:
            check(meter, owner, values)


def _check_width(meter: Meter, _owner: str | bytes, values: Sequence[Any]) -> None:
    if _largest(values) > _WIDEST:
        raise TooMuchError.text()


def _check_tabs(meter: Meter, owner: str | bytes, values: Sequence[Any]) -> None:
    count = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
    meter.need(len(owner) + count * (_largest(values) or 8))


def _check_replacement(meter: Meter, owner: str | bytes, values: Sequence[Any]) -> None:
    if len(values) > 1 and all(isinstance(value, (str, bytes)) for value in values[:2]):
        _check_replace(meter, owner, values[0], values[1])


def _check_replace(meter: Meter, text: Any, old: str | bytes, new: str | bytes) -> None:
    if isinstance(text, str) != isinstance(old, str):
        return  # Python refuses it
    meter.need(len(text) + text.count(old) * len(new))


def _check_join(meter: Meter, owner: str | bytes, values: Sequence[Any]) -> None:
    items, size = meter.weigh(values)
    characters = size if any(isinstance(value, str) for value in values) else 0
    meter.need(size + (items + characters) * len(owner))


def _check_translation(meter: Meter, owner: str | bytes, values: Sequence[Any]) -> None:
    meter.need(len(owner) * max(_longest(values), 1))


def _check_slow(meter: Meter, owner: str | bytes, _values: Sequence[Any]) -> None:
    meter.need(len(owner) * (meter.text // _SLOW_TEXT))


_METHODS: Mapping[str, Callable[[Meter, str | bytes, Sequence[Any]], None]] = {
    "center": _check_width,
    "expandtabs": _check_tabs,
    "join": _check_join,
    "ljust": _check_width,
    "replace": _check_replacement,
    "rjust": _check_width,
    "striptags": _check_slow,
    "translate": _check_translation,
    "zfill": _check_width,
}


def _largest(values: Iterable[Any]) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _longest(values: Iterable[Any]) -> int:
    """Return the length of the longest text in `values` and in the containers among them."""
    longest = 0
    for value in values:
        if isinstance(value, (str, bytes)):
            longest = max(longest, len(value))
        elif isinstance(value, Mapping):
            longest = max(longest, _longest(value.values()))
        elif isinstance(value, (list, tuple)):
            longest = max(longest, _longest(value))
    return longest


class BoundedFormatter(SandboxedFormatter):
    """`str.format` with bounds on the width of a field and the length of the result."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Convert a field's value as `!r` and its like say."""
        current().weigh(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field."""
        meter = current()
        meter.weigh(value)
        if re.search("[0-9]{5}", format_spec):
            raise TooMuchError.text()
        return meter.produce(super().format_field(value, format_spec))


class BoundedEscapeFormatter(BoundedFormatter, EscapeFormatter):
    """The same for a text that is marked safe."""
