"""The programs of docs/first-token.md and docs/c.md, run; those in C compiled with sanitizers."""

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
from llama_onnx.runtime.serving.app import Settings
from tests.support.native import NATIVE, link_libraries
from tests.support.packages import decode, greedy
from tests.support.served import running

DOCS = Path(__file__).parents[3] / "docs"
PAGES = [(DOCS / name).read_text(encoding="utf-8") for name in ("first-token.md", "c.md")]
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def programs() -> list[tuple[str, str]]:
    """Language and text of each program in C and C++."""
    return [(language, text) for language, text in fences() if language in ("c", "cpp")]


def fences() -> list[tuple[str, str]]:
    found = [
        fence
        for page in PAGES
        for fence in re.findall(r"^( *)```(\w+)\n(.*?)^\1```", page, re.DOTALL | re.MULTILINE)
    ]
    return [(language, textwrap.dedent(text)) for _, language, text in found]


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


def test_there_are_three_of_c_and_two_of_python() -> None:
    assert [language for language, _ in programs()] == ["c", "cpp", "c"]
    first = [language for language, _ in fences()[:5]]
    assert first == ["python", "python", "c", "cpp", "java"]


@pytest.fixture
def ids(package: Path, llama: Llama) -> list[int]:
    """The model's answer by onnxruntime-genai's own API."""
    prompt = llama.encode_chat([{"role": "user", "content": "What is 2 + 2?"}]).tolist()
    return greedy(package, prompt, 64)


@pytest.mark.parametrize("index", [0, 1])
def test_ten_lines_to_the_first_token(
    object_file: Path, package: Path, ids: list[int], index: int
) -> None:
    answer = Tokenizer.from_file(str(package / "tokenizer.json")).decode(ids)
    said = run(object_file, *programs()[index], package)
    assert said.rstrip("\ufffd") == answer.replace("\0", "").rstrip("\ufffd")


def run_python(text: str, folder: Path, package: Path) -> str:
    shutil.copytree(package, folder / "package")
    environment = {**os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_python_s_lines_to_the_first_token(package: Path, tmp_path: Path, ids: list[int]) -> None:
    assert run_python(fences()[0][1], tmp_path, package) == decode(package, ids)


def test_the_lines_of_openai_s_client(package: Path, tmp_path: Path, ids: list[int]) -> None:
    text, standard = fences()[1][1], "http://127.0.0.1:8000"
    assert standard in text
    with running(package, Settings(name="package")) as server:
        said = run_python(text.replace(standard, server.url), tmp_path, package)
    assert said == decode(package, ids)


def test_a_conversation(object_file: Path, package: Path) -> None:
    said = run(object_file, *programs()[2], package)
    found = re.findall(r"\((\d+) of (\d+) tokens were read before\)", said)
    assert [int(cached) > 0 for cached, _ in found] == [False, True]
