"""A finding: what `doctor` reports about one subject."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "trouble"]


@dataclass(frozen=True)
class Finding:
    """What was found, how bad it is, and how to fix it (`mend`), with the command in backticks.

    "trouble": something does not work. "warning": it works, but not as well as it could, or
    something related will fail. `mend` is None where nothing needs to be or can be fixed.
    """

    name: str
    status: Status
    found: str
    mend: str | None = None


def worst(findings: Iterable[Finding]) -> Status:
    """Return the worst status of `findings`; "ok" if there are none."""
    found = {finding.status for finding in findings}
    return "trouble" if "trouble" in found else "warning" if "warning" in found else "ok"
