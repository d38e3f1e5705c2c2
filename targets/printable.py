"""Text from a stranger, made safe to print."""

from __future__ import annotations

import math
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
_MOST_SHOWN = 200
_LONG_BITS = 128


def printable(text: str) -> str:
    r"""Return `text` with everything that a terminal could obey shown as an escape instead.

    Names of tensors, files and tokens, errors of libraries that quote them, and generated text can
    hold anything, such as ESC, which starts commands that retitle the window or type for the user.

    >>> printable("model\x1b]0;title\x07.safetensors")
    'model\\x1b]0;title\\x07.safetensors'
    """
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text)


def printable_line(text: str) -> str:
    r"""Return `text` as `printable` does, on one line: for names of files, which could otherwise
    add a line that looks like ours.

    >>> printable_line("x\npassed: all files are intact.")
    'x\\npassed: all files are intact.'
    """
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


def shown(value: object) -> str:
    """Return a `repr` of `value` that is short whatever it is, for a message.

    >>> shown("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    >>> shown([1] * 100), shown(10**400)
    ('[1, 1, 1, 1, 1, 1, ...]', 'a number of 401 digits')
    """
    if isinstance(value, int) and value.bit_length() > _LONG_BITS:
        # Python refuses to write more than 4,300 digits; their number can be one too many.
        bits = value.bit_length()
        digits = len(str(abs(value))) if bits < 10_000 else math.floor(bits * math.log10(2)) + 1
        return f"a number of {digits:,} digits"
    try:
        text = _SHORT.repr(value)
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__}"
    # A dict of lists of texts is as many short texts.
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
