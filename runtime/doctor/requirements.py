"""Check the lower bounds of requirements in wheels' metadata, such as "onnxruntime>=1.31.0"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REQUIREMENT = re.compile(
    r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?"
)


def unmet(requirements: Iterable[str], installed: Mapping[str, str]) -> tuple[str, ...]:
    """Return those of `requirements` whose distribution is missing or too old.

    `installed` is distribution -> version. Ignores upper bounds and exclusions; a requirement with
    a marker that names a platform counts as met.
    """
    versions = {normalize(name): version for name, version in installed.items()}
    return tuple(text for text in requirements if not _met(text, versions))


def distribution(requirement: str) -> str:
    """Return the name of the distribution in a requirement, normalized."""
    found = _REQUIREMENT.match(requirement)
    return normalize(found[1]) if found else ""


def normalize(name: str) -> str:
    """Return one spelling of a distribution's name: ml-dtypes for ml_dtypes and Ml.Dtypes."""
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
    """Return a version's release as numbers without trailing zeros: (1, 31) for "1.31.0rc1"."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
