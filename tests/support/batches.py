"""Files of requests for `llama-onnx batch`, and its output read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def chat_line(custom_id: str, text: str, **fields: Any) -> str:
    """Return a line of OpenAI's batch format."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **fields}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps({"custom_id": custom_id, **request})


def write_lines(path: Path, lines: Sequence[str | bytes]) -> Path:
    """Write a file of requests."""
    path.write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in [
        part for line in lines for part in (line, "\n")
    ]))  # fmt: skip
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what a batch has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(line: dict[str, Any]) -> str:
    """Return the text of a line's first answer."""
    choice = line["response"]["body"]["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def failure_of(line: dict[str, Any]) -> tuple[int | None, str]:
    """Return the status and the message of a line that failed."""
    if line["error"] is not None:
        return None, line["error"]["message"]
    assert line["response"]["status_code"] != 200
    return line["response"]["status_code"], line["response"]["body"]["error"]["message"]
