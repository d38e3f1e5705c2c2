"""A finding: what `doctor` says about one thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "trouble"]


@dataclass(frozen=True)
class Finding:
    """What was found, how bad it is, and what mends it: a sentence with the command in backticks.

    "trouble": something does not work. "warning": it works, but worse than it could, or something
    else will not. `mend` is None where nothing needs mending, or nothing can.
    """

    name: str
    status: Status
    found: str
    mend: str | None = None


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status there is, "ok" of none."""
    found = {finding.status for finding in findings}
    return "trouble" if "trouble" in found else "warning" if "warning" in found else "ok"
