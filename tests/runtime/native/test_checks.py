"""What the C library refuses before onnxruntime-genai sees it, and what it must not refuse."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.packaging.genai_config import genai_config
from llama_onnx.targets.folder_files import is_plain_name
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.strict_json import JSONError, parse_json
from tests.support.native import compile_checks
from tests.support.native_templates import HARMFUL, HARMLESS, KILLING
from tests.support.tiny import GQA

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

TALK = json.dumps(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_checks(tmp_path_factory.mktemp("checks"))


def refusal(check: Any, *given: Any) -> str | None:
    """Return what a check says is wrong; None if it accepts `given`."""
    why = ctypes.create_string_buffer(512)
    return None if check(*given, why) else why.value.decode()


def written(target: str) -> dict[str, Any]:
    """Return what an export for `target` writes to genai_config.json."""
    search = {"do_sample": True, "top_k": 40, "no_repeat_ngram_size": 3}
    return genai_config(GQA, search, TARGETS[target].session, "model.onnx")


def config_refusal(checks: ctypes.CDLL, text: str | bytes) -> str | None:
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return refusal(checks.check_config, content, ctypes.c_size_t(len(content)))


def paths(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        yield prefix + key
        if isinstance(inner, dict):
            yield from paths(inner, f"{prefix}{key}.")


def allowed(checks: ctypes.CDLL) -> set[str]:
    keys = iter(lambda: checks.config_key(len(found)), None)
    found: list[str] = []
    for key in keys:
        found.append(key.decode())
    return set(found)


def test_the_keys_are_those_that_exports_write(checks: ctypes.CDLL) -> None:
    assert {path for target in TARGETS for path in paths(written(target))} == allowed(checks)


def test_the_keys_are_those_that_python_allows(checks: ctypes.CDLL) -> None:
    settings = pytest.importorskip("llama_onnx.targets.genai_settings")
    assert set(paths(settings._rules("model.onnx"))) == allowed(checks)


@pytest.mark.parametrize("target", TARGETS)
def test_the_settings_of_each_target(checks: ctypes.CDLL, target: str) -> None:
    assert config_refusal(checks, json.dumps(written(target), indent=2)) is None


def test_the_settings_of_an_earlier_version(checks: ctypes.CDLL) -> None:
    folder = Path(__file__).parents[2] / "support" / "earlier_packages"
    for file in folder.glob("*/genai_config.json"):
        assert config_refusal(checks, file.read_bytes()) is None


def altered(path: str, value: Any) -> str:
    """Return the settings with the value at `path`, "model.decoder.filename", replaced or added."""
    settings = written("cpu")
    place = settings
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return json.dumps(settings)


OPTIONS = "model.decoder.session_options"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.custom_ops_library", "/tmp/evil.so"),
        (f"{OPTIONS}.custom_ops_library", "evil.so"),
        ("custom_ops_library", "evil.so"),
        (f"{OPTIONS}.enable_profiling", "/etc/profile"),
        (f"{OPTIONS}.graph_optimization_level", "ORT_DISABLE_ALL"),
        (
            f"{OPTIONS}.config_entries",
            {"session.model_external_initializers_file_folder_path": "/"},
        ),
        (f"{OPTIONS}.provider_options", [{"cuda": {"external_alloc": "1"}}]),
        (f"{OPTIONS}.provider_options", [{"QNN": {}}]),
        (f"{OPTIONS}.provider_options", [{"dml": {"enable_graph_capture": "2"}}]),
        (f"{OPTIONS}.provider_options", [{"dml": {"enable_graph_capture": 0}}]),
        (f"{OPTIONS}.provider_options", [{"dml": {"device_id": "0", "luid": "1:2"}}]),
        (f"{OPTIONS}.provider_options", [{"cuda": {"enable_graph_capture": "0"}}]),
        (f"{OPTIONS}.provider_options", [{"cuda": {}}, {"dml": {}}]),
        (f"{OPTIONS}.provider_options", {"cuda": {}}),
        (f"{OPTIONS}.intra_op_num_threads", 10**6),
        (f"{OPTIONS}.log_id", "other"),
        ("model.decoder.filename", "../model.onnx"),
        ("model.decoder.filename", "/etc/passwd"),
        ("model.decoder.filename", "other.onnx"),
        ("model.decoder.inputs.past_key_names", "past_key_values.%s.key"),
        ("model.decoder.inputs.past_key_names", "%n%n%n%n"),
        ("model.decoder.outputs.logits", LOGITS + "2"),
        ("model.decoder.pipeline", []),
        ("model.decoder.sliding_window", {"window_size": 1}),
        ("model.embedding", {"filename": "x.onnx"}),
        ("model.type", "whisper"),
        ("model.vocab_size", 0),
        ("model.vocab_size", 2**31),
        ("model.vocab_size", 288.0),
        ("model.context_length", "128"),
        ("model.context_length", -1),
        ("model.eos_token_id", 288),
        ("model.eos_token_id", [2, 10**9]),
        ("model.eos_token_id", []),
        ("model.pad_token_id", -1),
        ("model.decoder.num_hidden_layers", 10**9),
        ("search.num_beams", 8),
        ("search.temperature", 10**12),
        ("search.temperature", "hot"),
        ("search.do_sample", 1),
        ("engine", {}),
        ("model", None),
        ("model", []),
        ("search", [1]),
    ],
)
def test_other_settings(checks: ctypes.CDLL, path: str, value: Any) -> None:
    reason = config_refusal(checks, altered(path, value))
    assert reason and (path in reason or "special token" in reason)


@pytest.mark.parametrize(
    "options", [{}, {"device_id": "0", "enable_graph_capture": "0"}, {"enable_graph_capture": "1"}]
)
def test_the_options_of_directml(checks: ctypes.CDLL, options: dict[str, str]) -> None:
    """Those of version 0.1, today's, and graph capture turned on by hand."""
    text = altered(f"{OPTIONS}.provider_options", [{"dml": options}])
    assert config_refusal(checks, text) is None


SETTINGS = json.dumps(written("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SETTINGS.replace("log_id", "custom_ops_librar\\u0079"), "has a backslash"),
        (SETTINGS.replace('"search"', '"search": {}, "search"'), "has the key 'search' twice"),
        (SETTINGS.replace('"log_id"', '"a.b": 1, "log_id"'), "sets model.decoder.*a.b"),
        (SETTINGS.replace("llama", "ll\0ama"), "has a NUL"),
        (SETTINGS.replace("llama", "ll\ud800ama"), "not UTF-8"),
        (SETTINGS + "x", "text after its end"),
        (SETTINGS + SETTINGS, "text after its end"),
        (SETTINGS[:-1], "not closed"),
        (SETTINGS.replace("256", "NaN", 1), "not valid JSON"),
        (SETTINGS.replace("1.0", "1e400", 1), "out of range"),
        (SETTINGS.replace("1.0", "9" * 5000, 1), "a number of 5000 characters"),
        (SETTINGS.replace("1.0", "01", 1), "bracket is not closed|broken number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model":' * 100_000, "nested too deeply"),
        ("[" + "0," * 300_000 + "0]", "more than 200000 values"),
        ("null", "is not a JSON object"),
        ("{}", "has no context length"),
        ("", "not valid JSON"),
        ("'", "not valid JSON"),
        ('{"a":"\t"}', "control character"),
    ],
)
def test_damaged_settings(checks: ctypes.CDLL, text: str, message: str) -> None:
    assert re.search(message, config_refusal(checks, text) or "accepted")


JSON_TEXT = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(min_codepoint=1), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text('ab"\\é', max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
).map(json.dumps)
PUT = ["", "", ",", '"', "\\", "}", "0", "e5", "\\u0041", "\\ud83d\\ude00", "é", " "]


@settings(max_examples=300)
@given(text=JSON_TEXT, cut=st.integers(0, 40), put=st.sampled_from(PUT))
def test_the_reader_accepts_what_pythons_strict_reader_accepts(
    checks: ctypes.CDLL, text: str, cut: int, put: str
) -> None:
    content = (text[:cut] + put + text[cut:]).encode()
    try:
        parse_json(content, unique=True)
        expected = True
    except JSONError:
        expected = False
    reason = refusal(checks.check_json, content, ctypes.c_size_t(len(content)))
    # In C also too large, although Python can hold it: 1e308, and a NUL inside a text.
    bound = reason is not None and ("out of range" in reason or "has a NUL" in reason)
    assert bound or (reason is None) == expected, (content, reason)


NAMES = [
    "model.onnx",
    "adapters/fox.onnx_adapter",
    "ä ü 日本.bin",
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "/x",
    "C:x",
    "a\\b",
    "a//b",
    "a/",
    "NUL",
    "con.txt",
    "a/lpt1",
    "com10",
    "x.",
    "x ",
    "a*",
    "a?b",
    "a|b",
    "<a",
    "a\nb",
    "a\x1b[2J",
    "a\x7f",
    "a\x9bb",
    "a\u202eb",
    "a\u2028b",
    "a\u200eb",
    "a\u2066b",
    "nul .txt",
    "aux:",
]


@pytest.mark.parametrize("name", NAMES)
def test_plain_names_are_pythons(checks: ctypes.CDLL, name: str) -> None:
    assert bool(checks.check_name(name.encode())) == is_plain_name(name)


def test_names_that_are_not_utf8(checks: ctypes.CDLL) -> None:
    assert not checks.check_name(b"a\xff") and not checks.check_name(b"\xed\xa0\x80")


def messages_as_read(checks: ctypes.CDLL, text: str) -> Any:
    out = ctypes.create_string_buffer(1 << 16)
    reason = refusal(checks.check_messages, text.encode(), out, ctypes.c_size_t(len(out)))
    return reason or json.loads(out.value)


def test_messages_are_passed_on(checks: ctypes.CDLL) -> None:
    messages = [
        {"role": "system", "content": ""},
        {
            "role": "user",
            "content": 'a "b" \\ \n\t\x01 é 日 😀',
            "name": "Eve",
            "n": [1, 1.5e3, None],
        },
        {"role": "tool", "content": "x", "tool_calls": [{"a": {"b": True}}]},
    ]
    assert messages_as_read(checks, json.dumps(messages)) == messages
    assert messages_as_read(checks, json.dumps(messages, ensure_ascii=False)) == messages


def test_parts_of_a_content_are_joined_by_line_feeds(checks: ctypes.CDLL) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": 'b"'}]
    given = json.dumps([{"role": "user", "content": parts}])
    assert messages_as_read(checks, given) == [{"role": "user", "content": 'a\nb"'}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "messages must be a list"),
        ('"hi"', "messages must be a list"),
        ("{}", "messages must be a list"),
        ('{"role": "user", "content": "hi"}', "messages must be a list"),
        ("5", "messages must be a list"),
        ("[]", "must have 1 to 10000 messages"),
        ("[" + '{"role":"user","content":""},' * 10_001 + "1]", "must have 1 to 10000 messages"),
        ("[1]", "messages[0] must be an object"),
        ("[null]", "messages[0] must be an object"),
        ("[[]]", "messages[0] must be an object"),
        ("[{}]", "messages[0] has no 'role'"),
        ('[{"role": "user"}]', "messages[0] has no 'content'"),
        ('[{"content": "hi"}]', "messages[0] has no 'role'"),
        ('[{"role": "", "content": "hi"}]', "'role' must be a text"),
        ('[{"role": 5, "content": "hi"}]', "'role' must be a text"),
        ('[{"role": "user", "content": null}]', "'content' must be a text"),
        ('[{"role": "user", "content": 5}]', "'content' must be a text"),
        ('[{"role": "user", "content": {}}]', "'content' must be a text"),
        ('[{"role": "user", "content": []}]', "'content' is an empty list"),
        ('[{"role": "user", "content": ["a"]}]', "a part of 'content' must be"),
        ('[{"role": "user", "content": [{"text": "a"}]}]', "a part of 'content' must be"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "needs 'text'"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "of type 'image_url'"),
        ('[{"role": "user", "content": "a\\u0000b"}]', "has a NUL"),
        ('[{"role": "user", "content": "\\ud800"}]', "half of a surrogate pair"),
        ('[{"role": "user", "content": "\\udc00\\ud800"}]', "half of a surrogate pair"),
        ('[{"role": "user", "role": "system", "content": ""}]', "has the key 'role' twice"),
        ('[{"role": "user", "content": ""},]', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_senseless_messages(checks: ctypes.CDLL, text: str, message: str) -> None:
    assert message in messages_as_read(checks, text)


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template(checks: ctypes.CDLL, name: str) -> None:
    template, message = HARMFUL[name]
    reason = refusal(checks.check_template, template.encode(), TALK.encode())
    assert reason and message in reason


@pytest.mark.parametrize("name", HARMLESS)
def test_a_template_as_models_have_them(checks: ctypes.CDLL, name: str) -> None:
    assert refusal(checks.check_template, HARMLESS[name].encode(), TALK.encode()) is None


def test_a_long_conversation(checks: ctypes.CDLL) -> None:
    roles = ("user", "assistant")
    many = [{"role": roles[i % 2], "content": "some words " * 40} for i in range(401)]
    long = [{"role": "user", "content": "some words " * 20_000}]
    for messages in (many, long):
        for template in HARMLESS.values():
            given = json.dumps(messages).encode()
            assert refusal(checks.check_template, template.encode(), given) is None


def test_what_harmful_templates_do_to_the_engine(package: Path) -> None:
    """The reason for the check: without it the engine ends or holds the process."""
    code = (
        "import json, os, resource, signal, sys\n"
        "import onnxruntime_genai as og\n"
        f"tokenizer = og.Tokenizer(og.Model({str(package)!r}))\n"
        "for template in json.loads(sys.stdin.read()):\n"
        "    if (child := os.fork()) == 0:\n"
        "        signal.alarm(1)\n"
        f"        tokenizer.apply_chat_template({TALK!r}, template_str=template)\n"
        "        os._exit(0)\n"
        "    print(os.WTERMSIG(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(list(KILLING)),
        capture_output=True,
        text=True,
        check=True,
    )
    signals = [int(line) for line in done.stdout.split()]
    assert len(signals) == len(KILLING)
    assert all(number in (6, 11, 14) for number in signals)  # aborted, stack overflow, alarm
