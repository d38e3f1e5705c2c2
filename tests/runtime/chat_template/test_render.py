"""Chat templates in Python: transformers' own prompts, and an end for each hostile template."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llama_onnx.runtime.chat_template.render import ChatTemplate, RejectedError, TemplateError
from llama_onnx.runtime.llama.template import TEMPLATE, read_template, render_messages
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.errors import PackageError, UsageError
from tests.support import tiny
from tests.support.chat_templates import CONVERSATIONS, SPECIAL, TEMPLATES, transformers_prompt
from tests.support.hostile_templates import HOSTILE

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, tiny.GQA.vocab_size)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_a_prompt_are_those_of_transformers(
    name: str, folder: Path, tokenizer: Any
) -> None:
    (folder / TEMPLATE).write_bytes(TEMPLATES[name].encode())
    encoder = open_encoder(folder)
    for messages in CONVERSATIONS.values():
        expected = tokenizer.apply_chat_template(
            messages,
            chat_template=TEMPLATES[name],
            add_generation_prompt=True,
            return_dict=False,
        )
        prompt = render_messages(folder, messages)
        assert encoder.encode([prompt], add_special_tokens=False) == [expected]


def test_the_matrix_is_as_large_as_the_documentation_says() -> None:
    assert (len(TEMPLATES), len(CONVERSATIONS)) == (55, 6)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "4", "reasoning": "2 + 2"},
        {"role": "assistant", "content": "4", "thinking": "2 + 2", "n": [1, 2.5, {"a": None}]},
        {"role": "user", "content": "é", "flags": (True, "x")},
    ],
)
def test_what_a_template_sees_of_a_message(message: dict[str, Any], tokenizer: Any) -> None:
    template = "{{ messages|tojson }}{{ messages[0].reasoning_content }}{{ messages[0] }}"
    expected = tokenizer.apply_chat_template(
        [message], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(template, SPECIAL).render([message]) == expected


def test_tools_and_the_generation_prompt() -> None:
    template = "{{ tools|tojson(indent=1) }}{{ add_generation_prompt }}{{ documents }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    expected = transformers_prompt(template, USER, tools=tools, add_generation_prompt=False)
    rendered = ChatTemplate(template, SPECIAL).render(
        USER, tools=tools, add_generation_prompt=False
    )
    assert rendered == expected


def test_a_long_conversation_is_within_the_bounds() -> None:
    turns = [
        {"role": role, "content": f"{index} " + "many words " * 200}
        for index in range(1000)
        for role in ("user", "assistant")
    ]
    for name in ("llama 3.1", "mistral 3", "qwen 3"):
        messages = [*turns, *USER]
        rendered = ChatTemplate(TEMPLATES[name], SPECIAL).render(messages)
        assert rendered == transformers_prompt(TEMPLATES[name], messages)


@pytest.mark.slow
def test_every_hostile_template_ends(tmp_path: Path) -> None:
    """In a process of its own: a failure takes no other test with it."""
    command = [sys.executable, "-m", "tests.support.hostile_templates", "0.1"]
    root = Path(__file__).parents[3]
    printed = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=150, preexec_fn=_limit_memory
    )
    assert printed.returncode == 0, printed.stderr[-2000:]
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(HOSTILE)
    slow = {name: seconds for name, seconds, _, _ in lines if seconds > 5}
    assert slow == {}
    assert max(peak for _, _, peak, _ in lines) < 600
    ended = {name: found for name, _, _, found in lines}
    harmless = {name for name, found in ended.items() if found.endswith(" characters")}
    assert harmless <= {
        "globals of a function",  # empty: unsafe attributes are undefined, as in transformers
        "attr",
        "many outputs",
        "minus signs and spaces",
    }


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


if sys.platform == "win32":
    _limit_memory = None  # type: ignore[assignment]


def test_a_template_may_refuse() -> None:
    with pytest.raises(RejectedError, match=r"^roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate.') }}", {}).render(USER)
    with pytest.raises(RejectedError, match="has no attribute 'x'"):
        ChatTemplate("{{ messages[0].x.y }}", {}).render(USER)
    with pytest.raises(RejectedError, match="'_x'"):
        ChatTemplate("{% set ns = namespace(_x=1) %}", {}).render(USER)


def test_a_template_that_cannot_be_read() -> None:
    with pytest.raises(TemplateError, match=r"^line 2: Unexpected end of template"):
        ChatTemplate("\n{% if x %}", {}).check()
    with pytest.raises(TemplateError, match="No filter named 'x'"):
        ChatTemplate("{{ 1|x }}", {}).check()


def test_the_file_goes_before_the_settings(tmp_path: Path) -> None:
    put(tmp_path, {"chat_template": "settings {{ bos_token }}", "bos_token": {"content": "<s>"}})
    assert render_messages(tmp_path, USER) == "settings <s>"
    (tmp_path / TEMPLATE).write_bytes(b"file {{ bos_token }}{{ eos_token }}\r\n")
    assert render_messages(tmp_path, USER) == "file <s>"


def test_of_several_named_templates_the_default(tmp_path: Path) -> None:
    put(tmp_path, {"chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "b"}]})
    assert render_messages(tmp_path, USER) == "1"
    put(tmp_path, {"chat_template": [{"name": "b", "template": "{{ 1 }}"}]})
    assert read_template(tmp_path) is None
    with pytest.raises(UsageError, match="no chat template"):
        render_messages(tmp_path, USER)


def test_refusals_are_sentences(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE).write_text("{{ raise_exception('no \x1b[31m system') }}")
    with pytest.raises(UsageError, match=r"rejects the messages: no \\x1b\[31m system\.$"):
        render_messages(tmp_path, USER)
    (tmp_path / TEMPLATE).write_text("{{ 'a' * 10**9 }}")
    with pytest.raises(
        PackageError, match=r"cannot be used: it makes a value that is too large\.$"
    ):
        render_messages(tmp_path, USER)
    (tmp_path / TEMPLATE).write_text("{% for %}")
    with pytest.raises(PackageError, match=r"cannot be used: line 1: .*[^.]\.$"):
        render_messages(tmp_path, USER)
    (tmp_path / TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(PackageError, match="not UTF-8"):
        render_messages(tmp_path, USER)
    (tmp_path / TEMPLATE).unlink()
    (tmp_path / "tokenizer_config.json").write_bytes(b"[" * 5000)
    with pytest.raises(PackageError, match=r"tokenizer_config\.json "):
        render_messages(tmp_path, USER)


def put(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
