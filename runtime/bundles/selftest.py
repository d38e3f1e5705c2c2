"""A short proof for a device in a bundle: a prompt, and what the model continues it with.

Taken from the certificate that a package may carry: there the reference model has said how far each
next token leads the second likeliest. Rounding differs from device to device, so a self-test is a
stretch where that lead is large throughout.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import PackageError, UsageError

MAX_TOKENS = 512
"""Of the prompt, and of the answer."""

LENGTH = 8
"""Tokens of an answer out of a certificate."""

LEAST_LEAD = 1.0
"""Between the two largest logits: the likeliest token has e times the second's probability."""


@dataclass(frozen=True)
class SelfTest:
    """A prompt and what the model continues it with, greedily; a device has to agree.

    Choose a prompt whose every next token leads the second likeliest by far.
    """

    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        """The content of selftest.txt."""
        lines = {"prompt": self.prompt, "expected": self.expected}
        return "".join(f"{key} {' '.join(map(str, ids))}\n" for key, ids in lines.items())

    @classmethod
    def read(cls, file: Path) -> SelfTest:
        """Read what `str()` wrote; raises `UsageError`."""
        try:
            lines = [line.split() for line in file.read_text("ascii").splitlines()]
            found = {line[0]: tuple(int(number) for number in line[1:]) for line in lines if line}
            test = cls(found["prompt"], found["expected"])
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{file} is no self-test: {error!r}.") from None
        if not all(0 < len(ids) <= MAX_TOKENS for ids in (test.prompt, test.expected)):
            raise UsageError(
                f"{file} is no self-test: it needs 1 to {MAX_TOKENS} tokens on each line."
            )
        return test

    @classmethod
    def from_certificate(cls, package: Path) -> SelfTest | None:
        """The stretch of the package's certificate whose tokens lead by most, if they do enough.

        None without a certificate, or if none leads by `LEAST_LEAD`. Raises `PackageError` for a
        damaged one.
        """
        file = package / "parity" / "reference.safetensors"
        if not file.is_file():
            return None
        try:
            passages = list(_read_passages(file))
            best = max((_best(*passage) for passage in passages), key=lambda found: found[0])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise PackageError(f"{file} is damaged: {error!r}.") from None
        return best[1] if best[0] >= LEAST_LEAD else None


def _best(
    ids: Sequence[int], likeliest: Sequence[int], leads: Sequence[float]
) -> tuple[float, SelfTest]:
    """Of all stretches of `LENGTH` likeliest tokens of a passage, the one with the largest least
    lead; 0 where there is none."""
    followed = [
        lead if token == following else 0.0
        for token, following, lead in zip(likeliest, ids[1:], leads, strict=False)
    ]
    best = (0.0, SelfTest((), ()))
    for start in range(min(len(followed) - LENGTH + 1, MAX_TOKENS)):
        least = min(followed[start : start + LENGTH])
        if least > best[0]:
            test = SelfTest(tuple(ids[: start + 1]), tuple(ids[start + 1 : start + 1 + LENGTH]))
            best = (least, test)
    return best


def _read_passages(file: Path) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Ids, the likeliest next token and its lead at each position, of each passage."""
    # Whole: a certificate is small, and a length that is nonsense then asks for no memory.
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:size]), content[size:]

    def values(name: str, dtype: str) -> tuple[list[int], list[Any]]:
        entry = header[name]
        if entry["dtype"] != dtype:
            raise ValueError(f"{name} is {entry['dtype']}")
        begin, end = entry["data_offsets"]
        return entry["shape"], array("i" if dtype == "I32" else "f", data[begin:end]).tolist()

    index = 0
    while f"{index}.ids" in header:
        ids = values(f"{index}.ids", "I32")[1]
        (rows, width), kept = values(f"{index}.package.ids", "I32")
        logits = values(f"{index}.package.logits", "F32")[1]
        firsts = [row * width for row in range(rows)]
        yield (
            ids,
            [kept[first] for first in firsts],
            [logits[first] - logits[first + 1] for first in firsts],
        )
        index += 1
