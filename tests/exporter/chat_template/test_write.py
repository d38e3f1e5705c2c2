"""One chat template for every engine: transformers' prompts stay, onnxruntime-genai's become them,
or a warning names the conversations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llama_onnx.exporter.chat_template.conversations import CONVERSATIONS as TRIED
from llama_onnx.exporter.chat_template.conversations import TOOLS, WITH_TOOLS
from llama_onnx.exporter.chat_template.genai_prompts import genai_prompts, needs_care
from llama_onnx.exporter.chat_template.rewrite import InexpressibleError, rewrite
from llama_onnx.exporter.chat_template.write import prepare_template, template_differences
from tests.support.chat_templates import (
    CONVERSATIONS,
    TEMPLATES,
    transformers_prompt,
    write_tokenizer,
)

DIFFERENT = {
    "upper",
    "upper, as a method",
    "slices",
    "negative index",
    "undefined and none",
    "numbers",
    "filters",
    "methods",
    "two names",
}
"""Templates that cannot be made equal in onnxruntime-genai 0.18."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What onnxruntime-genai needs to open a tokenizer."""
    folder = tmp_path_factory.mktemp("package")
    write_tokenizer(folder)
    return folder


def write(folder: Path, template: str) -> list[str]:
    (folder / "chat_template.jinja").write_bytes(template.encode())
    return [*prepare_template(folder, "SOURCE"), *template_differences(folder, "SOURCE")]


USELESS = {
    "{% for i in range(999999999) %}x{% endfor %}": "Range too big",
    "{{ ''.__class__.__mro__ }}": "'__class__' of 'str' object is unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "nests or calls itself too deeply",
    "{{ raise_exception('never') }}": "never",
}


@pytest.mark.parametrize("template", USELESS, ids=USELESS.values())
def test_a_template_that_no_conversation_can_use_is_left_out(template: str, folder: Path) -> None:
    """Before onnxruntime-genai, which has no bounds, sees it."""
    with pytest.raises(Exception, match=r"."):
        transformers_prompt(template, TRIED["one turn"])
    (warning,) = write(folder, template)
    assert USELESS[template] in warning and "cannot be used" in warning
    assert not (folder / "chat_template.jinja").exists()


def test_a_template_for_tools_only_stays(folder: Path) -> None:
    template = "{% if not tools %}{{ raise_exception('tools first') }}{% endif %}x"
    write(folder, template)
    assert (folder / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_engine_makes_transformers_prompts(name: str, folder: Path) -> None:
    """For all of ours and of the exporter's conversations; in onnxruntime-genai equal or warned."""
    template = TEMPLATES[name]
    warnings = write(folder, template)
    written = (folder / "chat_template.jinja").read_bytes().decode()
    messages = [*CONVERSATIONS.values(), *TRIED.values()]
    expected = [transformers_prompt(template, one) for one in messages]
    assert [transformers_prompt(written, one) for one in messages] == expected
    same = genai_prompts(folder, written, messages) == expected
    warned = any("onnxruntime-genai makes other prompts" in warning for warning in warnings)
    assert same == (not warned) == (name not in DIFFERENT)
    assert len(warnings) == warned + (name == "hermes, macros")


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_are_not_lost(name: str, folder: Path) -> None:
    template = TEMPLATES[name]
    write(folder, template)
    written = (folder / "chat_template.jinja").read_bytes().decode()
    for messages in (WITH_TOOLS, *TRIED.values()):
        for options in ({"tools": TOOLS}, {"add_generation_prompt": False}):
            try:
                expected = transformers_prompt(template, messages, **options)
            except Exception:
                continue  # the template has its own idea of tools
            assert transformers_prompt(written, messages, **options) == expected


def test_a_template_that_all_read_alike_stays_as_it_is(folder: Path) -> None:
    for name in ("chatml", "llama 3", "mistral 1", "a macro"):
        assert write(folder, TEMPLATES[name]) == []
        assert (folder / "chat_template.jinja").read_bytes().decode() == TEMPLATES[name]


def test_what_is_written(folder: Path) -> None:
    template = (
        "{% for m in messages %}\n  {% if 'x' in m.content %}\n{{ m.content }}'\n  {% endif %}\n"
        "{% endfor %}"
    )
    write(folder, template)
    assert (folder / "chat_template.jinja").read_text() == "\n".join(
        [
            "{%- for m in messages -%}",
            "    {%- if ((m.content.split('x')|length > 1) if m.content is string else "
            "('x' in m.content)) -%}",
            "        {{- m.content -}}",
            "        {{- '\\'\\n' -}}",
            "    {%- endif -%}",
            "{%- endfor -%}",
        ]
    )
    again = (folder / "chat_template.jinja").read_text()
    assert rewrite(again).count("\n") == again.count("\n"), "what is written needs no more lines"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(1 + 2) * 3", "9"),
        ("1 - (2 - 3)", "2"),
        ("-(1 + 2)", "-3"),
        ("(-1) ** 2", "1"),
        ("2 ** (1 + 1)", "4"),
        ("not (1 and 0)", "True"),
        ("(not 1) == 0", "True"),
        ("1 < 2 < 3", "True"),
        ("(1 ~ 2) * 2", "1212"),
        ("(1 if 0 else 2) + 3", "5"),
        ("('a' ~ 'b')|upper", "AB"),
        ("'a' ~ 'b'|upper", "aB"),
        ("('ab'|upper)[0]", "A"),
        ("('ab'|upper).lower()", "ab"),
        ("(1, 2)[1]", "2"),
        ("(1,)|length", "1"),
        ("{'a': [1, (2, 3)]}['a'][1][0]", "2"),
        ("[1, 2, 3][::-1]|join('-')", "3-2-1"),
        ("'it\\'s \"q\" \\\\n\\n'", 'it\'s "q" \\n\n'),
        ("messages is not none and not tools is defined", "False"),
        ("(tools is none) == true", "True"),
        ("'b' in 'abc' and 'x' not in 'abc'", "True"),
        ("'a-b'.replace('-', '+') ~ 'a'|replace('a', 'b')", "a+bb"),
        ("('a' in 'abc') is sameas true", "True"),
        ("'ab' is in ['ab']", "True"),
        ("x|default('d', true) is defined", "True"),
        ("messages|map(attribute='role')|list|first", "user"),
        ("1.5 // 1", "1.0"),
    ],
)
def test_an_expression_keeps_its_value(expression: str, value: str) -> None:
    template = f"{{# so that it is written again #}}\n{{{{ {expression} }}}}"
    written = rewrite(template)
    assert written != template
    messages = [{"role": "user", "content": "hi"}]
    assert transformers_prompt(written, messages) == value
    assert transformers_prompt(template, messages) == value


def test_what_cannot_be_written_again_stays(folder: Path) -> None:
    template = "{# #}\n{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}a\n{% endcall %}"
    with pytest.raises(InexpressibleError):
        rewrite(template)
    write(folder, template)
    assert (folder / "chat_template.jinja").read_bytes().decode() == template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
    ],
)
def test_a_template_that_nobody_can_use_is_left_out(
    template: str, reason: str, folder: Path
) -> None:
    (warning,) = write(folder, template)
    assert reason in warning
    assert warning.startswith("SOURCE: the chat template cannot be used (")
    assert not (folder / "chat_template.jinja").exists()


def test_a_crash_of_the_other_engine_is_a_warning(folder: Path) -> None:
    """There, no text has a last letter, so that this macro calls itself until the stack is full."""
    template = (
        "{% macro f(x) %}{% if 'abc'[-1] == 'c' %}{{ x }}{% else %}{{ f(x) }}{% endif %}"
        "{% endmacro %}{{ f(messages[0].content) }}"
    )
    assert needs_care(template)
    macro, warning = write(folder, template)
    assert "has the macro f, which calls itself" in macro
    assert "for every conversation" in warning


def test_a_long_comment_crashes_only_another_process(folder: Path) -> None:
    template = "{# " + "long " * 20_000 + "#}{{ messages[0].content }}"
    assert needs_care(template)
    assert write(folder, template + "\n") == [], "written without the comment"
    found = genai_prompts(folder, template, [[{"role": "user", "content": "hi"}]])
    assert found in ([None], ["hi"])


def test_the_rare_template_that_refuses(folder: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    assert write(folder, template) == [], "both refuse the same conversations"


def test_without_onnxruntime_genai_nothing_is_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_onnx.runtime.genai", None)
    for name in ("numbers", "slices"):  # in another process, and in this one
        assert write(folder, TEMPLATES[name]) == []
    assert write(folder, TEMPLATES["zephyr"]) == []
    assert "{%-" in (folder / "chat_template.jinja").read_text(), "written all the same"


def test_the_warning_names_the_conversations(folder: Path) -> None:
    (warning,) = write(folder, TEMPLATES["slices"].replace("{{ messages[0].content[:5] }}|", ""))
    assert "for letters beyond ASCII;" in warning


@pytest.mark.parametrize(
    "expression",
    [
        "messages[0].content.split('')",
        "messages[0].content.split(bos_token)",
        "messages[0].content.replace('', 'x')",
        "('-9223372036854775808' | int) // (0 - 1)",
        "5 % (0 - 1)",
        "5 / add_generation_prompt",
        "messages | tojson(indent='2000000000' | int)",
        "[2000000000] | map('range') | list",
    ],
)
def test_what_ends_the_other_engine_runs_in_another_process(expression: str) -> None:
    assert needs_care(f"{{{{ {expression} }}}}")


def test_a_plain_template_needs_no_other_process() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 % 2 == 0 %}{{ m.content.split('|')[0] | trim }}"
        "{% else %}{{ m | tojson }}{% endif %}{% endfor %}"
    )
    assert not needs_care(template)
