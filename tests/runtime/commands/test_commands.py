from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.commands import chat as chat_module
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama import dialogue
from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import Tokens
from tests.support.fakes import generation, interrupt_at
from tests.support.packages import alter_package
from tests.support.terminal import read_until

PROMPT = "the quick brown fox"


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# generate


def test_generate_prints_the_text_alone_to_stdout(package: Path, llama: Llama) -> None:
    result = run("generate", package, PROMPT, "--max-new-tokens", "20")
    assert result.exit_code == 0
    assert result.stdout == "".join(llama.generate(PROMPT, max_new_tokens=20)) + "\n"
    provider, statistics = result.stderr.splitlines()
    assert "int4" in provider and "CPUExecutionProvider" in provider
    assert "prompt 11 tokens" in statistics and "answer 20 tokens" in statistics


def test_generate_can_ask_as_a_user(package: Path, llama: Llama) -> None:
    result = run("generate", package, PROMPT, "--chat", "--max-new-tokens", "20")
    answer = "".join(llama.chat([user(PROMPT)], max_new_tokens=20))
    assert result.stdout == answer + "\n"
    assert answer != "".join(llama.generate(PROMPT, max_new_tokens=20))


def test_generate_prints_one_json_object(package: Path, llama: Llama) -> None:
    result = run("generate", package, PROMPT, "--max-new-tokens", "20", "--json")
    content = json.loads(result.stdout)
    assert content["text"] == "".join(llama.generate(PROMPT, max_new_tokens=20))
    assert content["provider"]["onnxruntime"] == "CPUExecutionProvider"
    assert content["provider"]["fallback"] is None
    assert content["stats"]["new_tokens"] == 20
    assert content["stats"]["finish_reason"] == "length"
    assert content["stats"]["decode_rate"] > 0
    assert result.stderr == ""


@pytest.mark.parametrize("end", ["", "\n"])
def test_generate_reads_the_prompt_from_stdin(package: Path, llama: Llama, end: str) -> None:
    result = run("generate", package, "-", "--max-new-tokens", "20", stdin=PROMPT + end)
    assert result.stdout == "".join(llama.generate(PROMPT, max_new_tokens=20)) + "\n"


def test_generate_hands_every_option_on(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(self: Llama, prompt: str, **options: Any) -> Generation:
        seen.update(options)
        return generation("ok.")

    monkeypatch.setattr(Llama, "generate", record)
    options = (
        *("--max-new-tokens", "9", "--temperature", "0.5", "--top-k", "4"),
        *("--top-p", "0.9", "--seed", "7", "--stop", "one", "--stop", "two"),
        *("--adapter", "mine"),
    )
    assert run("generate", package, PROMPT, *options, "--threads", "1").stdout == "ok\n"
    assert seen == {
        "max_new_tokens": 9,
        "sampling": Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=7),
        "stop": ("one", "two"),
        "adapter": "mine",
    }


def test_ctrl_c_ends_generate_with_the_text_so_far(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Llama, prompt: str, **options: Any) -> Generation:
        return generation("abcdef", before_step=interrupt_at(3))

    monkeypatch.setattr(Llama, "generate", interrupted)
    result = run("generate", package, PROMPT)
    assert (result.exit_code, result.stdout) == (1, "abc\n")
    assert "interrupted" in result.stderr
    result = run("generate", package, PROMPT, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["text"] == "abc"


@pytest.mark.parametrize("verb", [("generate", "prompt"), ("chat",)])
def test_what_is_no_package_is_one_sentence_and_exit_1(
    tmp_path: Path, verb: tuple[str, ...]
) -> None:
    result = run(verb[0], tmp_path, *verb[1:])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path} is not a llama-onnx package: it has no manifest.json.\n"
    )


@pytest.mark.parametrize(
    "options",
    [["--temperature", "-1"], ["--top-p", "2"], ["--max-new-tokens", "0"], ["--threads", "0"]],
)
def test_a_wrong_call_is_one_sentence_and_exit_2(package: Path, options: list[str]) -> None:
    result = run("generate", package, PROMPT, *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert result.stdout == ""


def test_a_prompt_that_is_too_long_is_exit_2(package: Path) -> None:
    result = run("generate", package, "a" * 300)
    assert result.exit_code == 2
    assert "has 300 tokens, but this model's maximum context length is 256" in result.stderr


# chat


def test_chat_answers_each_line_of_a_pipe_and_remembers(package: Path, llama: Llama) -> None:
    first = "".join(llama.chat([user("the fox")], max_new_tokens=10))
    talk = [user("the fox"), assistant(first), user("the dog")]
    second = "".join(llama.chat(talk, max_new_tokens=10))
    result = run("chat", package, "--max-new-tokens", "10", stdin="the fox\n\n  the dog\n")
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr.count("answer 10 tokens") == 2


def test_chat_tells_the_model_the_system_message(package: Path, llama: Llama) -> None:
    talk = [{"role": "system", "content": "the lazy dog"}, user("the fox")]
    expected = "".join(llama.chat(talk, max_new_tokens=10))
    options = ("--system", "the lazy dog", "--max-new-tokens", "10")
    assert run("chat", package, *options, stdin="the fox\n").stdout == expected + "\n"


def test_chat_ends_at_exit(package: Path) -> None:
    result = run("chat", package, "--max-new-tokens", "5", stdin="/exit\nthe fox\n")
    assert (result.exit_code, result.stdout) == (0, "")


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    package: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [generation("abcdef", before_step=interrupt_at(3)), generation("xyz.")]
    asked = []

    def answer(codec: object, backend: object, prompt: Tokens, **options: Any) -> Generation:
        asked.append(prompt.tolist())
        return answers.pop(0)

    monkeypatch.setattr(dialogue, "start", answer)
    result = run("chat", package, stdin="the fox\nthe dog\n")
    assert result.exit_code == 0
    assert result.stdout == "abc\nxyz\n"
    assert "interrupted" in result.stderr
    # What was said until then stays said.
    said = [user("the fox"), assistant("abc"), user("the dog")]
    assert asked[1] == llama.encode_chat(said).tolist()


@pytest.mark.parametrize("leave", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(
    package: Path, monkeypatch: pytest.MonkeyPatch, leave: type[BaseException]
) -> None:
    def read_line(lines: object) -> str:
        raise leave

    monkeypatch.setattr(chat_module, "_read_line", read_line)
    result = run("chat", package)
    assert (result.exit_code, result.stdout) == (0, "")


def test_chat_forgets_the_oldest_when_the_context_is_full(package: Path) -> None:
    lines = [f"{word} " * 12 for word in ("alpha", "beta", "gamma", "delta")]
    result = run("chat", package, "--max-new-tokens", "20", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert result.stderr.count("answer 20 tokens") == len(lines)
    assert "(The context of 256 tokens is full: the oldest 2 messages were dropped.)" in (
        result.stderr
    )


def test_chat_goes_on_after_a_message_that_is_too_long(package: Path, llama: Llama) -> None:
    result = run("chat", package, "--max-new-tokens", "5", stdin="a" * 300 + "\nthe fox\n")
    assert result.exit_code == 0
    assert "The message is longer than the context of 256 tokens." in result.stderr
    expected = "".join(llama.chat([user("the fox")], max_new_tokens=5))
    assert result.stdout == expected + "\n"


def test_chat_with_a_base_model_is_a_wrong_call(package: Path, tmp_path: Path) -> None:
    folder = alter_package(package, tmp_path / "base", chat_template="")
    result = run("chat", folder, stdin="the fox\n")
    assert result.exit_code == 2
    assert "has no chat template" in result.stderr


def press_ctrl_c(process: subprocess.Popen[bytes]) -> None:
    """Press it as a person does, again if nothing happens: readline misses one that comes between
    its prompt and its wait for a key."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a POSIX thing")
@pytest.mark.parametrize("leave", ["ctrl-c", "ctrl-d"])
def test_chat_in_a_terminal(package: Path, leave: str) -> None:
    terminal, inside = os.openpty()
    chat = [sys.executable, "-m", "llama_onnx.exporter.cli", "chat", str(package)]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        chat,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment,
        # Where the tests run as a shell's job in the background, Ctrl-C is ignored, and so it would
        # be in every process they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        read_until(terminal, rb"> $")
        os.write(terminal, b"the fox\n")
        read_until(terminal, rb"tok/s[^\n]*\n> $")
        if leave == "ctrl-c":
            press_ctrl_c(process)
        else:
            os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(inside)
        os.close(terminal)


def test_answers_stream_as_utf8_through_a_real_pipe(package: Path, llama: Llama) -> None:
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "chat", str(package)]
    output = subprocess.check_output(
        [*command, "--max-new-tokens", "40"], input="ü日😀\n".encode(), stderr=subprocess.DEVNULL
    )
    expected = "".join(llama.chat([user("ü日😀")], max_new_tokens=40))
    assert output.decode().replace("\r\n", "\n") == expected + "\n"
