"""What Ray costs: the same file of chats with local processes and with actors of a cluster.

    ray start --head --num-cpus 2
    python benchmarks/batch_ray.py OUT --ray auto --lines 10000

The file is cut in two parts, which both do in turns: local, Ray, Ray, local. So a machine that
becomes slower favors neither. Every answer is compared with the other's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from llama_onnx.runtime.doctor.gather import gather_processor

Summary = dict[str, Any]

TOPICS = (
    "a ship with {} sailors", "a village of {} houses", "the number {}", "a garden with {} trees",
    "a train that is {} minutes late", "a library with {} books", "the year {}",
)  # fmt: skip
TASKS = (
    "Write a story about {}.", "Explain to a child: {}.", "What could one ask about {}?",
    "Write a letter to a friend about {}.", "Name three things that one knows of {}.",
)  # fmt: skip


def chats(count: int, new_tokens: int) -> list[str]:
    """Return `count` requests, each another, with answers of `new_tokens` tokens: none may end
    before, as the token that ends an answer (2 in SmolLM2) is forbidden."""
    chosen = random.Random(0)
    lines = []
    for number in range(count):
        topic = chosen.choice(TOPICS).format(number)
        message = {"role": "user", "content": chosen.choice(TASKS).format(topic)}
        fields = {"max_tokens": new_tokens, "temperature": 0, "logit_bias": {"2": -100}}
        lines.append(json.dumps({"messages": [message], **fields}))
    return lines


def run(package: Path, source: Path, out: Path, workers: int, ray: str | None) -> Summary:
    """Answer `source` and return the summary."""
    where = ["--ray", ray] if ray else []
    program = Path(sys.executable).with_name("llama-onnx")
    command = [program, "batch", package, source, out, "--json", *where]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    count = ["--workers", str(workers), "--threads", "1"]
    done = subprocess.run([*command, *count], stdout=subprocess.PIPE, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    summary: Summary = json.loads(done.stdout)
    return summary


def answers(path: Path) -> list[str]:
    """Return the text of each answer."""
    bodies = [json.loads(line)["response"]["body"] for line in path.open(encoding="utf-8")]
    return [body["choices"][0]["message"]["content"] for body in bodies]


@click.command()
@click.argument("package", type=click.Path(exists=True, path_type=Path))
@click.option("--ray", required=True, help="Address of a cluster that runs.")
@click.option("--lines", default=400, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(package: Path, ray: str, lines: int, new_tokens: int, workers: int) -> None:
    """Compare both on `package`."""
    requests = chats(lines, new_tokens)
    halves = requests[: lines // 2], requests[lines // 2 :]
    done: dict[str, list[Summary]] = {"local": [], "ray": []}
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        for part, order in enumerate((("local", "ray"), ("ray", "local"))):
            source = Path(folder, f"{part}.jsonl")
            source.write_text("\n".join(halves[part]) + "\n", encoding="utf-8")
            for name in order:
                out = Path(folder, f"{part}-{name}.jsonl")
                summary = run(package, source, out, workers, ray if name == "ray" else None)
                done[name].append(summary)
                print(f"part {part}, {name}: {json.dumps(summary)}", file=sys.stderr, flush=True)
            texts = [answers(Path(folder, f"{part}-{name}.jsonl")) for name in order]
            same += sum(one == other for one, other in zip(*texts, strict=True))
    print(report(done, same, lines))


def report(done: dict[str, list[Summary]], same: int, lines: int) -> str:
    """Return the table."""
    rows, rates = [], {}
    for name, parts in done.items():
        tokens, seconds = (sum(part[key] for part in parts) for key in ("new_tokens", "seconds"))
        rates[name] = tokens / seconds
        each = ", ".join(f"{part['tokens_per_second']:.0f}" for part in parts)
        start = ", ".join(f"{part['start_seconds']:.1f}" for part in parts)
        errors = sum(part["errors"] for part in parts)
        speed = f"{rates[name]:.0f} ({each})"
        rows.append(f"| {name} | {start} s | {seconds:.0f} s | {tokens:,} | {speed} | {errors} |")
    processor = gather_processor()
    return f"""\
{processor.name}, {processor.int4.name}; {lines:,} chats, two parts in turns

| | start | answering | tokens | tokens/s (parts) | errors |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Ray takes {rates["local"] / rates["ray"] - 1:+.1%} more time, its start excluded.
{same:,} of {lines:,} answers are the same."""


if __name__ == "__main__":
    main()
