"""Values from a package, for a text in Markdown: they may hold anything, and must stay values."""

from __future__ import annotations

import re
from typing import Any

from llama_onnx.targets.printable import printable

_MARKS = re.compile(r"([\\`*{}\[\]()<>#!|~$&@:])")


def as_text(value: Any) -> str:
    r"""Return `value` on one line, without a meaning in Markdown or HTML.

    >>> as_text("int4 <b>\n# big")
    'int4 \\<b\\> \\# big'
    """
    return _MARKS.sub(r"\\\1", _line(value))


def as_code(value: Any) -> str:
    """Return `value` on one line, as code, in which nothing has a meaning.

    >>> as_code("meta-llama/Llama-3.2-1B"), as_code("a`b")
    ('`meta-llama/Llama-3.2-1B`', '`` a`b ``')
    """
    text = _line(value)
    if "`" not in text:
        return f"`{text}`"
    # The fence must be longer than every run of backticks inside.
    fence = "`" * (max(map(len, re.findall("`+", text))) + 1)
    return f"{fence} {text} {fence}"


def _line(value: Any) -> str:
    return printable(" ".join(str(value).split()))[:500] or "-"
