"""JSON that every parser accepts."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(content: Any) -> str:
    """Return `content` as JSON text; a number that is not finite becomes null."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
