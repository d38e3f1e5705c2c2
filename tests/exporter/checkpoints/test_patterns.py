"""A stranger's expressions match as `re` does, and never for long."""

from __future__ import annotations

import re
import time

import pytest

from llama_onnx.exporter.checkpoints.patterns import Pattern, TimeLimit
from llama_onnx.targets.errors import CheckpointError
from tests.support import tiny

MODULES = [name.removesuffix(".weight") for name in tiny.GQA.tensor_shapes()]

# What PEFT's documentation, its tests and published adapters have.
EXPRESSIONS = [
    r".*\.(q|v)_proj",
    r".*(q_proj|k_proj|v_proj|o_proj)$",
    r"^(?!.*(?:lm_head|embed)).*(?:proj)$",
    r"model\.layers\.\d+\.self_attn\.(?:q|k)_proj",
    r"model\.layers\.(?:[02])\.mlp\..*",
    r".*layers\.(0|1)\.(?=mlp).*down_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r"[^.]*",
    r"",
    r"q_proj",
    r"(?P<layer>\w+)\.layers\.1\..*",
]

ENDLESS = [
    r"(\w+)+!",
    r"(([a-z.]+)*)*$!",
    r"(\w|\w\w|\w\w\w)+!",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!?[^\w]$",
]


@pytest.mark.parametrize("form", ["{}", r"(.*\.)?({})$"])
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_matches_what_re_matches(text: str, form: str) -> None:
    plain, pattern = re.compile(form.replace("{}", text)), Pattern(text, "x", TimeLimit(), form)
    for module in MODULES:
        assert pattern.fullmatch(module) == (plain.fullmatch(module) is not None)
        assert (pattern.match(module) is None) == (plain.match(module) is None)


def test_flags_are_read_where_re_reads_them() -> None:
    assert Pattern(r"(?i).*Q_PROJ", "x", TimeLimit()).fullmatch("model.layers.0.self_attn.q_proj")
    with pytest.raises(CheckpointError, match="not a valid regular expression"):
        Pattern(r"(?i).*Q_PROJ", "x", TimeLimit(), r"(.*\.)?({})$")  # PEFT fails there too


@pytest.mark.parametrize("text", [r".*[[:alpha:]].*", r"[[:digit:]]", r"(?:q_prok){e<=1}", "a{i}"])
def test_what_the_two_modules_read_differently_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="is not supported"):
        Pattern(text, "x", TimeLimit())


@pytest.mark.parametrize("text", ENDLESS)
def test_an_expression_without_end_is_refused_by_name(text: str) -> None:
    pattern, started = Pattern(text, "x: target_modules", TimeLimit(0.5)), time.perf_counter()
    name = "model.layers.0.self_attn.q_proj." + "a" * 30
    try:
        for _ in range(10_000):
            pattern.fullmatch(name)
    except CheckpointError as error:
        assert re.match("x: target_modules '.* takes too long to match", str(error))
    assert time.perf_counter() - started < 9


@pytest.mark.parametrize(
    "text", ["(", "*", "a{2,1}", "(?<=.*)a", "x" * 2001, "(" * 900 + ")" * 900, "(?P<a>x)(?P<a>y)"]
)
def test_an_invalid_expression_is_one_sentence(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^x: r \S* ?(has|is not|takes)") as caught:
        Pattern(text, "x: r", TimeLimit()).fullmatch("a")
        pytest.fail("accepted")
    assert "\n" not in str(caught.value)
