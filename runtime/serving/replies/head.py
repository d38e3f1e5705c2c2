"""What all responses begin with."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Head:
    """A response's id, the time (seconds since 1970), and the model as the client called it."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Head:
        """Return the head of a new response."""
        return cls(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), model, fingerprint)

    def to_json(self, kind: str) -> dict[str, Any]:
        """Return the fields that the two older endpoints have alike."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def dumps(content: BaseModel) -> bytes:
    """Return the JSON of a response, with the fields that were set."""
    return content.model_dump_json(exclude_unset=True).encode()
