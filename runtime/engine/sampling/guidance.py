"""What an answer must be: JSON of a schema, a match of a regular expression, a grammar's text.

The library llguidance says at each step which tokens may come next. A caller's schema or grammar is
a stranger's: its size, the time to compile it and what a step may cost are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.tokenizer.deadline import within
from llama_onnx.runtime.tokenizer.encoder import is_panic, open_tokenizer
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.printable import printable, shown
from llama_onnx.targets.strict_json import JSONError, parse_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

GuideKind = Literal["json_schema", "regex", "grammar"]

MOST_TEXT = 64 * 1024
"""Bytes of a schema, an expression or a grammar."""

_NAMES: Mapping[GuideKind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "grammar": "the grammar",
}

_STACK = 255 << 20
"""Stack of the thread that compiles; on Windows, Python refuses 256 MiB. llguidance recurses along
references and nesting: measured, a level takes at most 8 KiB of stack and at least 4 bytes of text,
and a rule of a grammar 4 KiB."""

_SECONDS = 10.0
"""For a compilation: the limits of llguidance end one after 2 s, on a slow machine later."""

_FIRST_STEPS = 4
"""Tokens that are tried before a guide counts as one that can be followed."""

_NO_TEXT = "no text follows it"

_MOST_TRIES = 200
"""Compilations to find the part of a schema that is at fault."""

_WHITE_SPACE: JsonCompileOptions = {
    # White space between tokens would be up to the model, which can then write nothing else until
    # its tokens are used up. So the text is laid out as Python's json.dumps does.
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # a keyword that is not supported is an error
    "coerce_one_of": False,
}

_IN_MAPPING = ("properties", "patternProperties", "dependentSchemas")
_IN_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ALONE = ("items", "additionalItems", "additionalProperties", "contains", "if", "then", "else")
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class Guide:
    """What an answer must be: `text` is a JSON schema, a regular expression (the syntax of Rust's
    regex, for the whole answer), or a grammar in llguidance's variant of Lark.

    Raises `UsageError` for a text that is too long, and for a schema that is not JSON.

    >>> Guide("regex", "[0-9]{4}").kind
    'regex'
    """

    kind: GuideKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in _NAMES:
            raise UsageError(f"a guide must be {', '.join(_NAMES)}, not {shown(self.kind)}.")
        if not isinstance(self.text, str):
            raise UsageError(f"{self.name} must be a text, not {type(self.text).__name__}.")
        try:
            size = len(self.text.encode("utf-8"))
        except UnicodeEncodeError:
            raise UsageError(f"{self.name} is not valid Unicode.") from None
        if size > MOST_TEXT:
            raise UsageError(
                f"{self.name} has {size:,} bytes, more than the {MOST_TEXT:,} allowed: shorten it."
            )
        if self.kind == "json_schema" and not isinstance(self.schema(), dict):
            raise UsageError('the JSON schema must be an object, such as {"type": "object"}.')

    @property
    def name(self) -> str:
        """What a message calls it."""
        return _NAMES[self.kind]

    def schema(self) -> Any:
        """Return the decoded JSON schema."""
        try:
            return parse_json(self.text.encode("utf-8"), unique=True, max_bytes=MOST_TEXT)
        except JSONError as error:
            raise UsageError(f"{self.name} {error}.") from None


class Guidance:
    """A package's tokenizer, ready to compile guides; `open_guidance` opens one."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def compile(self, guide: Guide) -> CompiledGuide:
        """Return what starts answers that follow `guide`.

        Raises `UsageError` for a guide that cannot be read, that no text follows, or that is too
        complex; it says where.
        """
        work = partial(self._compile, guide)
        try:
            matcher = within(_SECONDS, work, stack_bytes=_STACK)
        except TimeoutError:
            raise UsageError(
                f"{guide.name} is too complex: reading it takes more than {_SECONDS:g} s."
            ) from None
        return CompiledGuide(matcher, guide, self._vocab_size)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, its name for a special one."""
        return bytes(self._tokenizer.decode_bytes([token]))

    def _compile(self, guide: Guide) -> LLMatcher:
        try:
            matcher, reason = self._match(_grammar(guide))
            if not reason:
                return matcher
            if guide.kind == "json_schema":
                reason = _locate(guide.schema(), reason, self._fault)
        except BaseException as error:
            if not isinstance(error, ValueError) and not is_panic(error):
                raise
            reason = _first_line(str(error))
        raise UsageError(f"{guide.name} cannot be used: {printable(reason)}.") from None

    def _fault(self, schema: Any) -> str:
        """Return what is wrong with a schema, empty if nothing is."""
        return self._match(_schema_grammar(json.dumps(schema)))[1]

    def _match(self, grammar: str) -> tuple[LLMatcher, str]:
        """Return the matcher of a grammar, and why it cannot be used: empty if it can."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # the others are llguidance's own
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        reason = _reason(matcher)
        return matcher, reason or _dead_end(matcher.deep_copy(), self._vocab_size)


class CompiledGuide:
    """A guide that is ready to start answers."""

    def __init__(self, matcher: LLMatcher, guide: Guide, vocab_size: int) -> None:
        self._matcher, self._guide, self._vocab_size = matcher, guide, vocab_size

    def start(self) -> Following:
        """Return the constraint of a new answer, for its `Sampler`."""
        return Following(self._matcher.deep_copy(), self._guide, self._vocab_size)


class Following:
    """The constraint of one answer that follows a guide. End tokens may come where it may end."""

    def __init__(self, matcher: LLMatcher, guide: Guide, vocab_size: int) -> None:
        self._matcher, self._guide, self._vocab_size = matcher, guide, vocab_size

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next [vocabulary].

        Raises `UsageError` if the guide is too complex at this step, or if the tokenizer has no
        token to go on with.
        """
        allowed = _unpacked(self._matcher.compute_bitmask(), self._vocab_size)
        reason = _reason(self._matcher)
        if reason or not allowed.any():
            reason = reason or "no token of the model continues the answer"
            raise UsageError(f"{self._guide.name} cannot be followed: {printable(reason)}.")
        return allowed

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen, one of the `mask`."""
        if not self._matcher.consume_token(token):
            raise UsageError(
                f"{self._guide.name} cannot be followed: {printable(_reason(self._matcher))}."
            )


def open_guidance(folder: Path, vocab_size: int, end_tokens: Collection[int]) -> Guidance:
    """Open the tokenizer.json of the package in `folder`, for a model with `vocab_size` tokens.

    `end_tokens` are those that end an answer. A vocabulary of 128,000 takes about a second. Raises
    `PackageError` for a tokenizer that cannot be used, `MissingDependencyError` without llguidance.
    """
    try:
        from llguidance import LLTokenizer
    except ModuleNotFoundError as error:
        raise missing_extra("a schema, expression or grammar", error.name, "cpu") from None

    tokenizer = open_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        opened = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(end_tokens))
    except BaseException as error:
        if not isinstance(error, ValueError) and not is_panic(error):
            raise
        raise PackageError(
            f"{folder / 'tokenizer.json'} cannot guide an answer: "
            f"{printable(_first_line(str(error)))}."
        ) from None
    return Guidance(opened, vocab_size)


def _grammar(guide: Guide) -> str:
    from llguidance import LLMatcher

    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.text)
    if guide.kind == "grammar":
        return LLMatcher.grammar_from_lark(guide.text)
    return _schema_grammar(guide.text)


def _schema_grammar(text: str) -> str:
    from llguidance import LLMatcher

    # `overrides`: a schema can bring its own options.
    return LLMatcher.grammar_from_json_schema(text, overrides=_WHITE_SPACE)


def _dead_end(matcher: LLMatcher, vocab_size: int) -> str:
    """Return why an answer cannot take its first steps, empty if it can.

    Only a step shows that no text follows a grammar, as where an object requires itself.
    """
    for _ in range(_FIRST_STEPS):
        allowed = np.flatnonzero(_unpacked(matcher.compute_bitmask(), vocab_size))
        if reason := _reason(matcher):
            return reason
        if not len(allowed):
            return _NO_TEXT
        if matcher.is_accepting() or not matcher.consume_token(int(allowed[0])):
            break
    return _reason(matcher)


def _unpacked(mask: bytes, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Return llguidance's bits as one truth value for each token."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


def _reason(matcher: LLMatcher) -> str:
    """Return what is wrong with a matcher, empty if nothing is."""
    if not matcher.is_error():
        return ""
    text = matcher.get_error()
    if "NoExtension" in text:
        return _NO_TEXT
    if re.search(r"(?i)row has|too (many (items|expr|states)|large|complex)", text):
        return f"it is too complex ({_first_line(text)})"
    return _first_line(text)


def _first_line(text: str) -> str:
    """Return llguidance's reason without the lines that quote the grammar."""
    if syntax := re.search(r"^error: (.+)$", text, re.MULTILINE):  # of Rust's regex
        return syntax[1].rstrip(".")[:300]
    line = next(iter(text.strip().splitlines()), "it is not known why")
    place = re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", line)
    if place:
        line = f"line {place[1]}, column {place[2]}: {place[3]}"
    return line.rstrip(".")[:300]


def _locate(root: Any, reason: str, fault: Callable[[Any], str]) -> str:
    """Return the reason of the innermost part of the schema `root` that is at fault by itself, and
    its JSON pointer."""
    definitions = (
        {key: root[key] for key in _DEFINITIONS if key in root} if isinstance(root, dict) else {}
    )
    pointer, part, tries = "#", root, _MOST_TRIES
    seen = {pointer}
    found = True
    while found:
        found = False
        for place, inner in _parts(root, pointer, part):
            tries -= 1
            if tries < 0:
                break
            if place in seen or not (inside := fault({**definitions, **inner})):
                continue
            seen.add(place)
            pointer, part, reason, found = place, inner, inside, True
            break
    return f"{reason}, at {pointer}"


def _parts(root: Any, pointer: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas inside `schema`, a reference's target included, with their pointers."""
    if not isinstance(schema, dict):
        return
    for key in _IN_MAPPING:
        if isinstance(inner := schema.get(key), dict):
            for name, value in inner.items():
                yield f"{pointer}/{key}/{_escape(name)}", value
    for key in _IN_LIST:
        if isinstance(inner := schema.get(key), list):
            yield from ((f"{pointer}/{key}/{i}", value) for i, value in enumerate(inner))
    for key in _ALONE:
        if isinstance(inner := schema.get(key), dict):
            yield f"{pointer}/{key}", inner
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target = root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, dict) else None
        if isinstance(target, dict):
            yield reference, target


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
