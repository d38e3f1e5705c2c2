"""Requirements as wheels state them, as far as lower bounds go: "onnxruntime>=1.31.0"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REQUIREMENT = re.compile(
    r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?"
)


def unmet(requirements: Iterable[str], installed: Mapping[str, str]) -> tuple[str, ...]:
    """Those of `requirements` whose distribution is not in `installed`, or too old.

    `installed` is distribution -> version. Upper bounds and exclusions are not looked at, and a
    requirement that only other platforms have (its marker names one) is taken as met.
    """
    versions = {normalize(name): version for name, version in installed.items()}
    return tuple(text for text in requirements if not _met(text, versions))


def distribution(requirement: str) -> str:
    """The distribution a requirement names, normalized."""
    found = _REQUIREMENT.match(requirement)
    return normalize(found[1]) if found else ""


def normalize(name: str) -> str:
    """One spelling of a distribution's name: ml_dtypes, ml-dtypes and Ml.Dtypes are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _met(requirement: str, versions: Mapping[str, str]) -> bool:
    found = _REQUIREMENT.match(requirement)
    if found is None or "platform" in (found[3] or ""):
        return True
    version = versions.get(normalize(found[1]))
    if version is None:
        return False
    bounds = re.findall(r"(?:>=|~=)\s*([\d.]+)", found[2])
    return all(numbers(version) >= numbers(bound) for bound in bounds)


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, comparable: (1, 31) of "1.31.0rc1", zeros at the end left out."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
