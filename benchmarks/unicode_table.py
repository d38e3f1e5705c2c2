"""Write runtime/native/unicode.h: what the regular expressions of pre-tokenizers call characters.

    python benchmarks/unicode_table.py

The classes are those of Oniguruma as it is in the library `tokenizers`, asked character by
character, so that the C library splits a text as that library does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

OUT = Path(__file__).parents[1] / "runtime" / "native" / "unicode.h"

CLASSES = (
    ("UNICODE_UPPER", r"[\p{Lu}\p{Lt}]"),
    ("UNICODE_LOWER", r"\p{Ll}"),
    ("UNICODE_LETTER", r"[\p{Lm}\p{Lo}]"),
    ("UNICODE_MARK", r"\p{M}"),
    ("UNICODE_NUMBER", r"\p{N}"),
    ("UNICODE_SPACE", r"\s"),
)
"""Name and pattern; a character without a class has number 0."""

HEAD = """/* Classes of characters, as the regular expressions of pre-tokenizers see them.
 *
 * Written by benchmarks/unicode_table.py from the Unicode tables of the library `tokenizers`.
 */
#ifndef LLAMA_ONNX_UNICODE_H
#define LLAMA_ONNX_UNICODE_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    UNICODE_OTHER,
    UNICODE_UPPER,  /* Lu, Lt */
    UNICODE_LOWER,  /* Ll */
    UNICODE_LETTER, /* Lm, Lo: neither upper nor lower case */
    UNICODE_MARK,   /* M */
    UNICODE_NUMBER, /* N */
    UNICODE_SPACE   /* \\s */
} unicode_class;

/* The first character of each run of characters of one class, times 8, plus the class. */
static const uint32_t unicode_runs[] = {
"""

TAIL = """};

static unicode_class class_of(uint32_t code) {
    size_t low = 0, high = sizeof unicode_runs / sizeof *unicode_runs;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (unicode_runs[middle] >> 3 <= code) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return (unicode_class)(unicode_runs[low] & 7);
}

#endif
"""


def characters() -> Iterator[str]:
    """Yield every character that UTF-8 can hold."""
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            yield chr(code)


def classes() -> dict[str, int]:
    """Return the number of the class of each character that has one."""
    found = {}
    everything = list(characters())
    for number, (_, pattern) in enumerate(CLASSES, 1):
        split = Split(Regex(pattern), "removed")
        for start in range(0, len(everything), 4096):
            block = "".join(everything[start : start + 4096])
            kept = {c for piece, _ in split.pre_tokenize_str(block) for c in piece}
            for character in set(block) - kept:
                assert character not in found, (character, pattern)
                found[character] = number
    return found


def runs() -> Iterator[int]:
    """Yield the entries of the table."""
    known = classes()
    for number, group in groupby(characters(), key=lambda c: known.get(c, 0)):
        yield ord(next(group)) * 8 + number


def main() -> None:
    entries = [f"{entry:#x}," for entry in runs()]
    lines, line = [], "   "
    for entry in entries:
        if len(line) + len(entry) + 1 > 100:
            lines.append(line)
            line = "   "
        line += f" {entry}"
    OUT.write_text(HEAD + "\n".join([*lines, line]) + "\n" + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
