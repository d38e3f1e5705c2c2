"""Text from a stranger, made safe to print."""

from __future__ import annotations

import re
import reprlib

# C0 and C1 controls except tab and line feed; marks that reorder a line for the eye (Trojan
# Source, https://trojansource.codes); separators at which some terminals break lines; halves of
# surrogate pairs, which cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 100, 100, 70, 3


def printable(text: str) -> str:
    r"""Return `text` with everything that a terminal could obey shown as an escape instead.

    Names of tensors, files and tokens, errors of libraries that quote them, and generated text can
    hold anything, such as ESC, which starts commands that retitle the window or type for the user.

    >>> printable("model\x1b]0;title\x07.safetensors")
    'model\\x1b]0;title\\x07.safetensors'
    """
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text)


def shown(value: object) -> str:
    """Return a `repr` of `value` that is short whatever it is, for a message.

    >>> shown("x" * 1000), shown([[1] * 100] * 100)
    ("'xxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxx'", '[[1, 1, 1, 1, ...], [1, 1, 1, 1, ...], ...]')
    """
    return _SHORT.repr(value)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
