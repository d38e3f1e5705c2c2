"""Seeded strings and sequences of ids on which tokenizers are likely to differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from llama_onnx.exporter.parity.measure.tokenizers import FIXED_TEXTS

SPECIAL = ("<s>", "</s>", "<unk>")

_PARTS = (
    *(" ", "  ", "   ", 7 * " ", 17 * " ", "\n", "\n\n", "\r\n", "\t", "\t\t", "\u00a0", "\u3000"),
    *("▁", "▁▁", "<0x0A>", "<0xFF>", "[INST]", "<<SYS>>", "<", "<0", "0x", ">"),
    *("the", "The", " of", "ing", "don't", "I'LL", "a", "A", "x", "ab", "aa", "banana"),
    *("1", "23", "4567", "3.14", "-5e-7", "½", "²", "Ⅷ", "٣", "１"),
    *("def f(x):", "    return", "{", "}", "()", "!=", "->", "#", "//", "\\n", '"', "'", "`", "_"),
    *("é", "e\u0301", "ß", "ñ", "ö", "ĳ", "ı", "Ω", "ж", "Съешь", "ε"),
    *("中", "文字", "吾輩は", "猫", "한국어", "ก็", "हिन्दी", "தமிழ்"),
    *("שלום", "مرحبا", "\u200f", "\u202b", "\u200b", "\u2060", "\ufeff"),
    *("🎉", "👍🏽", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "☺", "☺️", "€", "…", "—"),
    *("\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028", "\ufffd", "\ufffe"),
    *("\U0010ffff", "\U000e0061", "\ue000", "\u0345", "\u0300\u0301\u0302"),
)
_BLOCKS = ((0x20, 0x7F), (0, 0x250), (0x250, 0x2000), (0x2000, 0xD800), (0xE000, 0x110000))


def strings(count: int, corpus: Sequence[str], *, special: bool, seed: int = 0) -> Iterator[str]:
    """Yield `count` strings: those of `validate`, joined parts, random characters, runs, pieces of
    the texts in `corpus`; with `special`, each contains the text of a special token."""
    rng = random.Random(seed)
    makers: list[Callable[[random.Random], str]] = [_of_parts, _of_parts, _of_characters, _runs]
    fixed = list(FIXED_TEXTS)
    for index in range(count):
        if index < len(fixed):
            text = fixed[index]
        elif index % 3 == 0:
            text = _excerpt(rng, rng.choice(corpus))
        else:
            text = rng.choice(makers)(rng)
        yield _with_special(rng, text) if special else _without_special(text)


def sequences(
    count: int, texts: Sequence[Sequence[int]], byte_ids: Sequence[int], size: int, seed: int = 0
) -> Iterator[list[int]]:
    """Yield `count` sequences of ids below `size`: random ids, the ids of `texts` cut anywhere, and
    bytes, where `byte_ids[b]` is the id of byte b."""
    rng = random.Random(seed)
    for index in range(count):
        if index % 3 == 0:
            yield [rng.randrange(size) for _ in range(rng.randint(0, 12))]
        elif index % 3 == 1 or not byte_ids:
            ids = rng.choice(texts)
            start = rng.randint(0, len(ids))
            yield list(ids[start : rng.randint(start, len(ids))])
        else:
            yield _bytes(rng, byte_ids, size)


def _of_parts(rng: random.Random) -> str:
    return "".join(rng.choice(_PARTS) for _ in range(rng.randint(1, 25)))


def _of_characters(rng: random.Random) -> str:
    first, last = rng.choice(_BLOCKS)
    return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randint(1, 30)))


def _runs(rng: random.Random) -> str:
    parts = (rng.choice(_PARTS) * rng.randint(1, 40) for _ in range(rng.randint(1, 4)))
    return "".join(parts)


def _excerpt(rng: random.Random, text: str) -> str:
    length = 5000 if rng.random() < 0.002 else rng.randint(1, 200)
    start = rng.randrange(max(1, len(text) - length))
    return text[start : start + length]


def _with_special(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 3)):
        place = rng.randint(0, len(text))
        text = text[:place] + rng.choice(SPECIAL) + text[place:]
    return text


def _without_special(text: str) -> str:
    while any(token in text for token in SPECIAL):
        for token in SPECIAL:
            text = text.replace(token, "")
    return text


def _bytes(rng: random.Random, byte_ids: Sequence[int], size: int) -> list[int]:
    """Return UTF-8 cut anywhere, with or without noise, between other pieces."""
    data = _of_parts(rng).encode()
    start = rng.randint(0, len(data))
    data = data[start : rng.randint(start, len(data))]
    if rng.random() < 0.3:
        data += rng.randbytes(rng.randint(1, 4))
    around = [rng.randrange(size) for _ in range(rng.randint(0, 2))]
    return [*around, *(byte_ids[byte] for byte in data), *around[:1]]
