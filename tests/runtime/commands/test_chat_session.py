"""`llama-onnx chat --session`, and what it says when the context is full."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.llama.model import Llama

LINES = ("the quick brown fox", "Paris 日本 😀")


def chat(package: Path, *options: object, lines: tuple[str, ...] = LINES) -> Result:
    arguments = ["chat", str(package), *map(str, options), "--max-new-tokens", "6"]
    return CliRunner().invoke(main, arguments, input="\n".join(lines) + "\n")


def messages(file: Path) -> list[dict[str, str]]:
    with safe_open(file, "numpy") as opened:
        found: list[dict[str, str]] = json.loads(opened.metadata()["session"])["messages"]
    return found


def test_a_chat_goes_on_where_it_ended(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "mein Gespräch 日本"
    ours = ("--engine", "onnxruntime", "--threads", "1")
    whole = chat(package, *ours, "--system", "a dog", lines=(*LINES, "more"))
    first = chat(package, *ours, "--system", "a dog", "--session", file)
    assert (first.exit_code, first.stdout.count("\n")) == (0, 2), first.output
    said = re.search(r"5 messages and the cache of (\d+) tokens saved\.\)", first.stderr)
    assert said is not None
    second = chat(package, *ours, "--session", file, lines=("more",))
    assert second.exit_code == 0, second.output
    assert first.stdout + second.stdout == whole.stdout
    assert f"5 messages and the cache of {said[1]} tokens restored.)" in second.stderr
    read = re.findall(r"prompt \d+ tokens \((\d+) known\)", second.stderr)
    assert len(read) == 1 and int(read[0]) > 40
    assert [m["role"] for m in messages(file)] == ["system", *["user", "assistant"] * 3]
    again = chat(package, *ours, "--session", file, "--system", "a dog", lines=("/exit",))
    assert again.exit_code == 0 and "saved" not in again.stderr
    other = chat(package, *ours, "--session", file, "--system", "a cat")
    assert other.exit_code == 2 and "another system message" in other.stderr
    assert len(messages(file)) == 7


def test_genai_keeps_the_messages_and_says_so(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "a"
    first, second = (chat(package, "--engine", "genai", "--session", file) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "saved, because onnxruntime-genai keeps none" in first.stderr
    assert "4 messages and the cache of 0 tokens restored, because" in second.stderr
    assert first.stderr.count("keeps none") == 1 and len(messages(file)) == 8


def test_the_session_of_another_package(package: Path, package_fp32: Path, tmp_path: Path) -> None:
    file = tmp_path / "a"
    ours = ("--engine", "onnxruntime", "--session", file)
    chat(package, *ours)
    before = file.read_bytes()
    refused = chat(package_fp32, *ours)
    assert refused.exit_code == 1 and refused.stdout == ""
    assert re.fullmatch(r"Error: .*another version of it.*--messages-only\)\.\n", refused.stderr)
    assert file.read_bytes() == before
    taken = chat(package_fp32, *ours, "--messages-only", lines=("more",))
    assert taken.exit_code == 0 and len(messages(file)) == 6
    assert chat(package_fp32, *ours, lines=("more",)).exit_code == 0
    alone = chat(package, "--messages-only")
    assert alone.exit_code == 2 and "no effect without --session" in alone.stderr


def test_a_file_that_is_no_session_stays_as_it_is(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("my notes", encoding="utf-8")
    refused = chat(package, "--session", file)
    assert refused.exit_code == 1 and "notes.txt is not a session" in refused.stderr
    assert file.read_text(encoding="utf-8") == "my notes"


@pytest.mark.parametrize("place", ["none/a", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_chat(
    package: Path, tmp_path: Path, place: str
) -> None:
    refused = chat(package, "--session", tmp_path / place)
    assert refused.exit_code == 1 and refused.stdout == ""
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1


def test_what_was_said_before_an_error_is_saved(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "a"
    long = "the dog " * 200
    options = ("--engine", "onnxruntime", "--session", file, "--overflow", "error")
    failed = chat(package, *options, lines=("the fox", long, "more"))
    assert failed.exit_code == 2 and "context length is 256" in failed.stderr
    assert [m["role"] for m in messages(file)] == ["user", "assistant"]


def test_the_oldest_turns_are_dropped_or_the_chat_ends(package: Path, llama: Llama) -> None:
    lines = tuple(f"{word} " * 12 for word in ("alpha", "beta", "gamma", "delta"))
    dropping = chat(package, lines=lines)
    said = "(The context of 256 tokens is full: the oldest 2 messages were dropped.)"
    assert dropping.exit_code == 0 and said in dropping.stderr
    assert dropping.stderr.count("· length") + dropping.stderr.count("· stop") == 4
    ending = chat(package, "--overflow", "error", lines=(*lines, *lines))
    assert ending.exit_code == 2 and "conversation has" in ending.stderr
    assert said not in ending.stderr
