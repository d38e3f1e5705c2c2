"""The programs of docs/c.md, compiled with sanitizers and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llama_onnx.runtime.llama.model import Llama
from tests.support.native import NATIVE, link_libraries
from tests.support.packages import greedy

PAGE = (Path(__file__).parents[3] / "docs" / "c.md").read_text(encoding="utf-8")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def programs() -> list[tuple[str, str]]:
    """Language and text of each program of the page."""
    fences = re.findall(r"^( *)```(c|cpp)\n(.*?)^\1```", PAGE, re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(text)) for _, language, text in fences]


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, to be linked into a program, beside the libraries that it loads."""
    folder = tmp_path_factory.mktemp("documented")
    link_libraries(folder / "cpu")
    out = folder / "llama_onnx.o"
    command = ["gcc", "-std=c11", *SANITIZERS, "-c", str(NATIVE / "llama_onnx.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def run(object_file: Path, language: str, text: str, package: Path) -> str:
    source = object_file.with_name(f"program.{language}")
    source.write_text(text, "utf-8")
    program = object_file.with_name("program")
    compiler, standard = {"c": ("gcc", "-std=c11"), "cpp": ("g++", "-std=c++17")}[language]
    command = [compiler, standard, "-Wall", "-Wextra", "-Werror", *SANITIZERS, f"-I{NATIVE}"]
    command += [str(source), str(object_file), "-o", str(program), "-ldl", "-lpthread", "-lm"]
    subprocess.run(command, check=True)
    # ONNX Runtime itself keeps memory until the process ends.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, package], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_there_are_three() -> None:
    assert [language for language, _ in programs()] == ["c", "cpp", "c"]


@pytest.mark.parametrize("index", [0, 1])
def test_ten_lines_to_the_first_token(
    object_file: Path, package: Path, llama: Llama, index: int
) -> None:
    prompt = llama.encode_chat([{"role": "user", "content": "What is 2 + 2?"}]).tolist()
    ids = greedy(package, prompt, 64)
    expected = Tokenizer.from_file(str(package / "tokenizer.json")).decode(ids)
    said = run(object_file, *programs()[index], package)
    assert said.rstrip("\ufffd") == expected.replace("\0", "").rstrip("\ufffd")


def test_a_conversation(object_file: Path, package: Path) -> None:
    said = run(object_file, *programs()[2], package)
    found = re.findall(r"\((\d+) of (\d+) tokens were read before\)", said)
    assert [int(cached) > 0 for cached, _ in found] == [False, True]
