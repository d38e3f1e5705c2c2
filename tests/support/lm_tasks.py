"""Tasks of lm-eval that tests write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("fox", "dog", "river", "lazy", "quick brown", "over the hill")

CHOICE: dict[str, Any] = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "question": f"which word is number {number}?",
            "choices": [WORDS[number % 6], WORDS[(number + 1) % 6], WORDS[(number + 3) % 6]],
            "answer": number % 3,
        }
        for number in range(count)
    ]


def write_task(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a task, `CHOICE` with `changes`, and rows for each of its files."""
    config = {**(config or CHOICE), **changes}
    folder.mkdir(exist_ok=True)
    # JSON is YAML.
    (folder / f"{config['task']}.yaml").write_text(json.dumps(config), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    (folder / "choice.jsonl").write_text(lines, encoding="utf-8")
    return folder
