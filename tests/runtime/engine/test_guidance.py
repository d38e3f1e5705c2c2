"""Answers that must be JSON of a schema, match an expression or follow a grammar.

The model is random: whatever its logits, the text is what was asked for. Python's `json`, `re` and
the library jsonschema judge it.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from llama_onnx.runtime.engine.sampling import guidance
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.guidance import (
    MOST_TEXT,
    Guidance,
    Guide,
    open_guidance,
)
from llama_onnx.runtime.engine.sampling.sampler import Sampler
from llama_onnx.targets.errors import PackageError, UsageError
from tests.support import tiny
from tests.support.vocabularies import model_named

ROWS = 300  # the model has more rows than the tokenizer tokens
END = (2, 1)


@dataclass(frozen=True)
class Model:
    """A tokenizer, and what guides answers with it."""

    tokenizer: Tokenizer
    guidance: Guidance

    def answer(self, guide: Guide, choice: Choice, logits: Any, most: int = 400) -> str | None:
        """The text up to an end token, of which none is left out; None if there is none."""
        constraint = self.guidance.compile(guide).start()
        sampler = Sampler(choice, [3], ROWS, constraint)
        tokens: list[int] = []
        for step in range(most):
            token = sampler.choose(logits(step)).token
            if token in END:
                return self.text(tokens)
            tokens.append(token)
        return None

    def id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None
        return found

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, 288)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(
        Tokenizer.from_file(str(folder / "tokenizer.json")), open_guidance(folder, ROWS, END)
    )


def schema(content: Any) -> Guide:
    return Guide("json_schema", json.dumps(content))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    {"enum": ["the quick", 5, None, {"a": [1, 2]}]},
    {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]$"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"$ref": "#/$defs/pair", "$defs": {"pair": {"type": "array", "prefixItems": [
        {"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2}}},
    {"type": "object", "properties": {"kind": {"const": "f"}, "x": {"type": "boolean"}},
     "required": ["kind", "x"], "additionalProperties": False},
]  # fmt: skip

CHOICES = st.builds(
    Choice,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([0.0, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 3]),
    logit_bias=st.sampled_from([(), ((2, 100.0), (5, -100.0)), ((1, -100.0),)]),
    seed=st.integers(0, 2**64 - 1),
)


@st.composite
def models(draw: st.DrawFn) -> Any:
    """Logits that change with each step: spread, tied, or with tokens that are impossible."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    favored = draw(st.lists(st.integers(0, ROWS - 1), max_size=3))
    gone = draw(st.sampled_from([0.0, 0.5, 0.99]))

    def logits(step: int) -> np.ndarray:
        values = (rng.standard_normal(ROWS) * scale).astype(np.float32)
        values[rng.random(ROWS) < gone] = -np.inf
        values[favored] = 60
        values[7] = 0  # one at least is a number
        return values

    return logits


@settings(max_examples=150)
@given(st.sampled_from(SCHEMAS), CHOICES, models())
def test_whatever_the_logits_the_answer_is_json_of_the_schema(
    model: Model, content: dict[str, Any], choice: Choice, logits: Any
) -> None:
    text = model.answer(schema(content), choice, logits)
    assert text is not None
    jsonschema.validate(json.loads(text), content)


EXPRESSIONS = ["[0-9]{4}-(0[1-9]|1[0-2])", "(the|quick|fox){1,3}", "", "a?b?", "[^a-y ]{1,3}"]


@given(st.sampled_from(EXPRESSIONS), CHOICES, models())
def test_whatever_the_logits_the_answer_matches_the_expression(
    model: Model, expression: str, choice: Choice, logits: Any
) -> None:
    text = model.answer(Guide("regex", expression), choice, logits)
    assert text is not None and re.fullmatch(expression, text)


SUM = """start: product ("+" product){0,3}
product: NUMBER ("*" NUMBER){0,2}
NUMBER: /[1-9][0-9]{0,2}/
"""


@given(CHOICES, models())
def test_whatever_the_logits_the_answer_follows_the_grammar(
    model: Model, choice: Choice, logits: Any
) -> None:
    text = model.answer(Guide("grammar", SUM), choice, logits)
    assert text is not None and re.fullmatch(r"[1-9]\d{0,2}([+*][1-9]\d{0,2})*", text)
    assert eval(text) > 0  # digits and operators alone


def test_a_guide_leaves_the_choice_between_what_it_allows_to_the_model(model: Model) -> None:
    logits = np.random.default_rng(0).standard_normal(ROWS).astype(np.float32)
    guide = Guide("regex", "[a-z]")
    letters = [model.id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    likeliest = max(letters, key=lambda token: logits[token])
    text = model.answer(guide, Choice(), lambda step: logits)
    assert text == model.text([likeliest])
    found = {model.answer(guide, Choice(temperature=1, seed=s), lambda _: logits) for s in range(9)}
    assert len(found) > 3


# White space


@pytest.mark.parametrize(
    "content",
    [{"type": "object"}, {}, {"x-guidance": {"whitespace_flexible": True}, "type": "object"}],
)
def test_a_model_that_loves_white_space_cannot_fill_its_answer_with_it(
    model: Model, content: dict[str, Any]
) -> None:
    """The layout is that of json.dumps, whatever a schema asks for."""
    spaces = [
        token
        for token in range(model.tokenizer.get_vocab_size())
        if token not in END and not model.text([token]).strip()
    ]
    rng = np.random.default_rng(4)

    def logits(step: int) -> np.ndarray:
        values = rng.standard_normal(ROWS).astype(np.float32)
        values[spaces] += 20
        values[model.tokenizer.encode('"').ids] += 19  # a string's end, lest it be all spaces
        return values

    texts = [
        model.answer(schema(content), Choice(temperature=1.0, seed=seed), logits)
        for seed in range(20)
    ]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 5
    for text in ended:
        json.loads(text)
        outside = re.sub(r'"(\\.|[^"\\])*"', '""', text)
        assert not re.search(r"\s\s|[^,:]\s|[\n\t\r]", outside)


# End tokens


def test_an_end_token_may_come_only_where_the_answer_may_end(model: Model) -> None:
    following = model.guidance.compile(Guide("regex", "a(bc)?")).start()
    a, b, c = (model.id(letter) for letter in "abc")
    merged = model.tokenizer.token_to_id("bc")
    assert merged is None  # else more tokens than these may come
    allowed = []
    for token in (a, b, c):
        allowed.append(set(np.flatnonzero(following.mask()).tolist()))
        following.accept(token)
    allowed.append(set(np.flatnonzero(following.mask()).tolist()))
    assert allowed == [{a}, {b, *END}, {c}, set(END)]


def test_answers_of_one_guide_do_not_disturb_one_another(model: Model) -> None:
    compiled = model.guidance.compile(Guide("regex", "ab|cd"))
    first, second = compiled.start(), compiled.start()
    a, c = (model.id(letter) for letter in "ac")
    first.accept(a)
    assert second.mask()[[a, c]].tolist() == [True, True]
    assert first.mask().sum() == 1


def test_a_token_that_may_not_come_is_refused(model: Model) -> None:
    following = model.guidance.compile(Guide("regex", "ab")).start()
    with pytest.raises(UsageError, match="regular expression cannot be followed"):
        following.accept(model.id("z"))


# Other tokenizers


@pytest.mark.parametrize("name", ["plain", "llama-runs"])
def test_a_sentencepiece_vocabulary(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_named(name))
    tokenizer = tokenizer_from_model_file(tmp_path / "tokenizer.model").tokenizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    guidance = open_guidance(tmp_path, rows, [2])
    rng = np.random.default_rng(0)
    for seed in range(10):
        constraint = guidance.compile(schema(PERSON)).start()
        sampler = Sampler(Choice(temperature=2.0, seed=seed), [1], rows, constraint)
        tokens: list[int] = []
        while not tokens or tokens[-1] != 2:
            tokens.append(sampler.choose(rng.standard_normal(rows).astype(np.float32)).token)
        jsonschema.validate(json.loads(tokenizer.decode(tokens[:-1])), PERSON)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"tokenizer\.json cannot guide an answer: "):
        open_guidance(folder, 100, [2])


# What is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"properties": {"a/b": {"type": "array", "items": {"type": "strange"}}}},
            "Invalid type: strange, at #/properties/a~1b/items.",
        ),
        (
            {
                "$ref": "#/$defs/q",
                "$defs": {"q": {"allOf": [{}, {"type": "string", "minLength": 5, "maxLength": 2}]}},
            },
            "minLength (5) is greater than maxLength (2), at #/$defs/q/allOf/1.",
        ),
        (
            {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 9, "maximum": 2}},
                "required": ["n"],
            },
            "minimum (9) is greater than maximum (2), at #/properties/n.",
        ),
        ({"not": {}}, 'Unimplemented keys: ["not"], at #.'),
        ({"properties": {"a": {"type": "string", "pattern": "(x"}}}, "at #/properties/a."),
        ({"enum": []}, "at #."),
        ({"$ref": "#"}, "no text follows it, at #."),
        ({"$ref": "https://example.com/schema.json"}, "at #."),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "no text follows it, at #/properties/a.",
        ),
    ],
)
def test_an_impossible_schema_is_refused_and_the_message_says_where(
    model: Model, content: Any, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        model.guidance.compile(schema(content))
    text = str(caught.value)
    assert text.startswith("the JSON schema cannot be used: ") and said in text
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json_schema", "{", "the JSON schema is not valid JSON"),
        ("json_schema", "[]", "the JSON schema must be an object"),
        ("json_schema", "true", "the JSON schema must be an object"),
        ("json_schema", '{"a": 1, "a": 2}', "the JSON schema has the key"),
        ("json_schema", '{"a":' * 200 + "1" + "}" * 200, "the JSON schema is nested too deeply"),
        ("regex", "a" * (MOST_TEXT + 1), "has 65,537 bytes, more than the 65,536 allowed"),
        ("regex", "\ud800", "the regular expression is not valid Unicode"),
        ("xml", "a", "a guide must be json_schema, regex, grammar, not 'xml'"),
        ("regex", 5, "the regular expression must be a text, not int"),
    ],
)
def test_a_guide_that_means_nothing_is_refused(kind: Any, text: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Guide(kind, text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("regex", "(a|b", "the regular expression cannot be used: unclosed group."),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "[^\\s\\S]", "no text follows it"),
        ("grammar", 'start: "a" b', 'line 1, column 8: unknown name: "b"'),
        ("grammar", "start: a\na: a", "no text follows it"),
        ("grammar", "", "Empty grammar"),
        ("grammar", "\x1b[31m", "the grammar cannot be used: "),
    ],
)
def test_one_that_cannot_be_read_is_refused(model: Model, kind: Any, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        model.guidance.compile(Guide(kind, text))
    assert said in str(caught.value) and str(caught.value).isprintable()


def chain(count: int, link: Any, last: Any) -> dict[str, Any]:
    """A schema whose definitions refer to one another, one after the other."""
    definitions = {f"{i}": link({"$ref": f"#/$defs/{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, f"{count}": last}}


def nested(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"items": inner}
    return inner


BOMBS: dict[str, Guide] = {
    "expression": Guide("regex", "((((a{1000}){1000}){1000}){1000})"),
    "automaton": Guide("regex", "(a|b)*a(a|b){500}c"),
    "long": Guide("regex", "a" * MOST_TEXT),
    "rules in a circle": Guide(
        "grammar", "start: r0\n" + "\n".join(f'r{i}: "x" r{(i + 1) % 3000}' for i in range(3000))
    ),
    "rules in a chain": Guide(
        "grammar", "".join(f"{'start' if i == 0 else f'r{i}'}:r{i + 1}\n" for i in range(5000))
        + 'r5000:"a"',
    ),
    "terminals in a chain": Guide(
        "grammar", "start:T0\n" + "".join(f'T{i}:"x" T{i + 1}\n' for i in range(3500))
        + 'T3500:"a"',
    ),
    "ambiguous": Guide("grammar", 'start: start start start | "a" | "a" "a"'),
    "references": schema(chain(1800, lambda ref: ref, {"type": "integer"})),
    "references in lists": schema(chain(1100, lambda ref: {"allOf": [ref]}, {"type": "null"})),
    "references deep inside": schema(chain(60, lambda ref: nested(90, ref), {"type": "null"})),
    "objects": schema(
        chain(600, lambda ref: {"properties": {"p": ref}, "required": ["p"]}, {"type": "null"})
    ),
    "choices": schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}}
                              for j in range(6)]} for i in range(8)]}
    ),
    "properties": schema(
        {"type": "object", "properties": {f"x{i}": {"type": "integer"} for i in range(2000)}}
    ),
    "counts": schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "numbers": schema({"type": "integer", "multipleOf": 10**60, "minimum": -(10**60)}),
}  # fmt: skip


def test_python_on_windows_takes_the_stack_of_a_compilation() -> None:
    """It refuses 256 MiB and more: THREAD_MAX_STACKSIZE in CPython's thread_nt.h."""
    assert guidance._STACK < 256 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_a_guide_that_explodes_ends(model: Model, name: str) -> None:
    """In an error or, where llguidance can follow it, in steps that each take a moment. Chains were
    chosen that end the process in a thread with a stack of the usual size."""
    rng = np.random.default_rng(0)
    started = time.monotonic()
    try:
        constraint = model.guidance.compile(BOMBS[name]).start()
        sampler = Sampler(Choice(temperature=1.0), [3], ROWS, constraint)
        for _ in range(20):
            token = sampler.choose(rng.standard_normal(ROWS).astype(np.float32)).token
            if token in END:
                break
    except UsageError as error:
        assert re.search("too (complex|large|many digits)", str(error))
    assert time.monotonic() - started < 30
