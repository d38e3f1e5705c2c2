"""Find a model's license, use policy, notice and model card, and whether it is a Llama.

These files travel with the weights: from a checkpoint into its package, from a package into a
bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Kind = Literal["license", "use policy", "notice", "model card"]

_STARTS: dict[str, Kind] = {
    "LICENSE": "license",
    "LICENCE": "license",
    "USE_POLICY": "use policy",
    "NOTICE": "notice",
}
_LICENSE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
    "llama2": r"Llama 2 Community License",
    "llama3": r"Meta Llama 3 Community License",
    "llama3.1": r"Llama 3\.1 Community License",
    "llama3.2": r"Llama 3\.2 Community License",
}
"""The hub's name of a license -> a pattern found near the start of its text."""

_CARD = "README.md"

PACKAGE_CARD = "MODEL_CARD.md"
"""The name that a checkpoint's model card has in its package: README.md is the bundle's own."""

TERMS: tuple[Kind, ...] = ("license", "use policy", "notice")
"""The kinds with terms under which a model may be used; a model card only describes it."""

_IDENTIFYING: tuple[Kind, ...] = ("license", "notice")
_TITLE_BYTES = 4096
# Llama 2 or later: Llama 1 had no community license. "tinyllama2" and "llama-2024" do not match.
_LLAMA = re.compile(r"(?<![a-z])(?<!open[-_ ])llama[-_ ]?([234])(?![0-9])", re.IGNORECASE)


def kind_of(name: str) -> Kind | None:
    """Return the kind of the file called `name`, None for any other file. Case does not matter.

    >>> kind_of("LICENSE.txt"), kind_of("use_policy.md"), kind_of("tokenizer.json")
    ('license', 'use policy', None)
    """
    if name.upper() == _CARD.upper():
        return "model card"
    return next((kind for start, kind in _STARTS.items() if name.upper().startswith(start)), None)


def of_kind(names: Iterable[str], *kinds: Kind) -> list[str]:
    """Return those of `names` that are of one of `kinds`, in their order."""
    return [name for name in names if kind_of(name) in kinds]


def file_patterns() -> list[str]:
    """Return glob patterns for all files that travel, for tools that select files by pattern."""
    return [_any_case(f"{start}*") for start in _STARTS] + [_any_case(_CARD)]


def file_start(kind: Kind) -> str:
    """Return how names of files of `kind` start: "LICENSE" for "license"."""
    return next((start for start, its in _STARTS.items() if its == kind), _CARD)


def title(file: Path) -> str:
    """Read the start of `file`, enough to identify a license: the file may have any size."""
    with file.open("rb") as opened:
        return opened.read(_TITLE_BYTES).decode("utf-8", "replace")


def license_id(text: str) -> str | None:
    """Return the hub's name of the license that `text` begins with, None for another license.

    >>> license_id("Apache License  Version 2.0, January 2004")
    'apache-2.0'
    """
    known = (key for key, start in _LICENSE_TEXTS.items() if re.search(start, text, re.IGNORECASE))
    return next(known, None)


def llama_generation(name: str, files: Iterable[Path]) -> int | None:
    """Return the generation of Meta's Llama that a model is, 2 or later; None for any other model.

    The model's `name` decides, otherwise the licenses and notices among its `files`.
    """
    for text in (name, *(title(file) for file in files if kind_of(file.name) in _IDENTIFYING)):
        if found := _LLAMA.search(text):
            return int(found[1])
    return None


def required_kinds(generation: int | None) -> tuple[Kind, ...]:
    """Return what must accompany a model: a license, and Meta's use policy for a Llama."""
    return ("license",) if generation is None else ("license", "use policy")


def _any_case(pattern: str) -> str:
    # Matching by pattern is case-sensitive on some systems.
    return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in pattern)
