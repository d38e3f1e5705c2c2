"""Sessions of the C library, through its Python sample."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.packages import alter_package, greedy

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

PROMPT = [1, 40, 41, 42]
SAID = ("the quick brown", "fox ä", "jumps", "over the  lazy", "dog 日本")
END, LENGTH, STOP, STOPPED = 1, 2, 3, 4


@pytest.fixture
def session(model: Any) -> Iterator[Any]:
    with model.session() as opened:
        yield opened


def answer(model: Any, session: Any, count: int, **values: Any) -> list[int]:
    """Return the tokens of an answer of at most `count`."""
    before = len(session.ids)
    session.generate(model.sampling(max_new_tokens=count, **values))
    tokens: list[int] = session.ids[before:]
    return tokens


def test_tokens_are_those_of_genai_in_python(model: Any, session: Any, package: Path) -> None:
    session.append(PROMPT)
    assert answer(model, session, 40) == greedy(package, PROMPT, 40)


def test_five_turns_have_the_tokens_of_the_runtime(
    model: Any, session: Any, package: Path, llama: Llama
) -> None:
    messages: list[dict[str, str]] = []
    for turn, said in enumerate(SAID):
        messages.append({"role": "user", "content": said})
        prompt = llama.encode_chat(messages).tolist()
        session.say(said)
        assert session.ids == prompt
        text = session.generate(model.sampling(max_new_tokens=8))
        stats = session.stats
        assert session.ids[len(prompt) :] == greedy(package, prompt, 8)
        assert stats.prompt_tokens == len(prompt)
        # Only what is new was read; the answer may be spelled with other tokens the second time.
        assert stats.cached_tokens > 0 or turn == 0
        assert stats.tokens == stats.prompt_tokens + stats.generated_tokens
        messages.append({"role": "assistant", "content": text})


def test_texts_and_tokens_can_be_appended(
    model: Any, session: Any, package: Path, llama: Llama
) -> None:
    session.append("the quick")
    first = answer(model, session, 5)
    session.append(" fox")
    session.append([7, 8])
    prompt = [*llama.encode("the quick").tolist(), *first, *llama.encode(" fox").tolist(), 7, 8]
    assert session.ids == prompt
    assert answer(model, session, 20) == greedy(package, prompt, 20)
    assert session.stats.cached_tokens == len(prompt) - len(llama.encode(" fox")) - 3


def test_rewinding_gives_the_same_tokens_again(model: Any, session: Any, package: Path) -> None:
    session.append(PROMPT)
    first = answer(model, session, 20)
    for position in (len(PROMPT), len(PROMPT) + 7, 2, 1):
        session.rewind(position)
        prompt = [*PROMPT, *first][:position]
        assert session.ids == prompt
        assert answer(model, session, 10) == greedy(package, prompt, 10)
        session.rewind(position)
        session.append([*PROMPT, *first][position:])
    session.rewind(0)
    with pytest.raises(RuntimeError, match="the session is empty"):
        session.generate()
    session.append(PROMPT)
    assert answer(model, session, 20) == first
    with pytest.raises(RuntimeError, match="has 24 tokens: it cannot be rewound to 25"):
        session.rewind(25)


def test_rewinding_drops_messages(model: Any, session: Any, llama: Llama) -> None:
    session.say("one")
    end = len(session.ids)
    session.generate(model.sampling(max_new_tokens=4))
    session.say("two")
    session.rewind(end)
    session.say("three")
    messages = [{"role": "user", "content": text} for text in ("one", "three")]
    assert session.ids == llama.encode_chat(messages).tolist()


def test_a_template_that_shortens_earlier_messages(
    sample: Any, built: Path, package: Path, tmp_path: Path
) -> None:
    """As those do that drop what a model thought: earlier messages end elsewhere then."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('|')[-1] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    copy = alter_package(package, tmp_path / "copy", chat_template=template)
    with (
        sample.Model(copy, library=built / "libllama_onnx.so") as model,
        model.session() as session,
        model.session() as other,
    ):
        session.say("the quick brown fox jumps over the lazy dog|x")
        first = len(session.ids)
        session.generate(model.sampling(max_new_tokens=3))
        session.say("b")
        assert len(session.ids) < first
        session.save(tmp_path / "saved.json")
        other.load(tmp_path / "saved.json")
        session.rewind(len(session.ids))  # nothing is dropped
        for one in (session, other):
            one.say("c")
        assert session.ids == other.ids


def test_a_saved_session_goes_on(model: Any, session: Any, tmp_path: Path) -> None:
    file = tmp_path / "ä 日本.json"
    session.say('a "quoted" ä')
    session.generate(model.sampling(max_new_tokens=6))
    session.save(file)
    session.save(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with model.session() as other:
        other.append([5, 6])
        other.load(file)
        assert other.ids == session.ids
        for one in (session, other):
            one.say("b")
        assert other.ids == session.ids
        assert answer(model, other, 8) == answer(model, session, 8)


def test_a_saved_session_of_tokens(model: Any, session: Any, tmp_path: Path) -> None:
    session.append(PROMPT)
    session.save(tmp_path / "file")
    first = answer(model, session, 8)
    session.load(tmp_path / "file")
    assert answer(model, session, 8) == first
    with pytest.raises(RuntimeError, match="text or tokens that are not of messages"):
        session.say("the")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "it is not valid JSON"),
        (lambda text: text.replace("llama_onnx_session", "x"), "it is not a saved session"),
        (lambda text: text.replace('session": 1', 'session": 2'), "it is of a newer version"),
        (lambda text: text.replace('package": "', 'package": "0'), "saved with another package"),
        (lambda text: text.replace("null", '"a"'), "saved with another adapter"),
        (lambda text: text.replace("[", "[-1, ", 1), "has the token -1"),
        (lambda text: text.replace("[", "[99999, ", 1), "has the token 99999"),
        (lambda text: text.replace("[", "[" + "5, " * 300, 1), "may have 256"),
        (lambda text: text.replace('"tokens"', '"toke"', 1), "it has no tokens"),
        (lambda text: text.replace('"role"', '"rol"'), "it has damaged messages"),
        (lambda text: text.replace('{"tokens": ', '{"tokens": 9'), "it has damaged messages"),
    ],
)
def test_a_saved_session_that_is_damaged(
    model: Any, session: Any, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    file = tmp_path / "file"
    session.say("the")
    before = session.ids
    session.save(file)
    file.write_text(change(file.read_text("utf-8")), "utf-8")
    with pytest.raises(RuntimeError, match=message):
        session.load(file)
    assert session.ids == before
    with pytest.raises(RuntimeError, match="cannot be read"):
        session.load(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be written"):
        session.save(tmp_path / "no" / "folder")


def test_the_same_seed_gives_the_same_answer(model: Any, session: Any) -> None:
    session.append(PROMPT)
    found = []
    for seed in (1, 1, 2, -1):
        found.append(answer(model, session, 20, temperature=1.0, seed=seed))
        session.rewind(len(PROMPT))
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found}) == 3


def first_tokens(model: Any, session: Any, draws: int, **values: Any) -> np.ndarray:
    """How often each token came first in `draws` answers."""
    counts = np.zeros(288, int)
    for seed in range(draws):
        (token,) = answer(model, session, 1, seed=seed, **values)
        counts[token] += 1
        session.rewind(len(PROMPT))
    return counts


def test_draws_follow_the_probabilities(model: Any, session: Any, llama: Llama) -> None:
    from tests.support.genai_logits import logits_after

    logits = logits_after(llama.package.path, PROMPT)
    session.append(PROMPT)
    share = np.exp((logits - logits.max()) / 2)
    share /= share.sum()
    order = np.argsort(-logits, kind="stable")
    counts = first_tokens(model, session, 600, temperature=2.0, top_k=5)
    assert set(np.flatnonzero(counts)) <= set(order[:5])
    expected = 600 * share[order[:5]] / share[order[:5]].sum()
    assert (np.abs(counts[order[:5]] - expected) < 5 * np.sqrt(expected) + 1).all()
    kept = int(np.searchsorted(np.cumsum(share[order]), 0.3)) + 1
    counts = first_tokens(model, session, 200, temperature=2.0, top_p=0.3)
    assert set(np.flatnonzero(counts)) <= set(order[:kept])
    counts = first_tokens(model, session, 200, temperature=2.0, min_p=0.5)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(share >= 0.5 * share.max()))


def test_repetition_is_penalized(model: Any, session: Any, package: Path) -> None:
    session.append(PROMPT)
    tokens = answer(model, session, 40, repetition_penalty=1e6)
    assert len({*PROMPT, *tokens}) == len(PROMPT) + len(tokens)
    session.rewind(len(PROMPT))
    text = [*PROMPT, *answer(model, session, 100, no_repeat_ngram_size=2)]
    pairs = list(pairwise(text))
    assert len(set(pairs)) == len(pairs)


def test_stop_texts_may_span_pieces(model: Any, session: Any) -> None:
    session.append(PROMPT)
    whole = session.generate(model.sampling(max_new_tokens=60))
    assert session.stats.finish in (END, LENGTH)
    for start in range(2, len(whole) - 5, 7):
        session.rewind(len(PROMPT))
        stop = whole[start : start + 4]
        text = session.generate(model.sampling(max_new_tokens=60, stop=["\x01never", stop]))
        assert text == whole[: whole.index(stop)]
        assert session.stats.finish == STOP
    session.rewind(len(PROMPT))
    text = session.generate(model.sampling(max_new_tokens=60, stop=[whole[-1] + "more"]))
    assert text == whole


def test_an_answer_must_follow_a_guide(model: Any, session: Any, package: Path) -> None:
    session.append(PROMPT)
    text = session.generate(model.sampling(max_new_tokens=60, regex="[a-c]{3} [0-9]{2}"))
    assert re.fullmatch("[a-c]{3} [0-9]{2}", text)
    guided = session.ids
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    session.append("the")
    made = json.loads(session.generate(model.sampling(json_schema=json.dumps(schema))))
    assert made["a"] in (1, 2)
    # After an answer with a guide, the session goes on as it would without.
    session.rewind(len(guided))
    assert answer(model, session, 10) == greedy(package, guided, 10)


def test_a_callback_ends_an_answer(model: Any, session: Any) -> None:
    session.append(PROMPT)
    seen: list[str] = []

    def receive(piece: str) -> bool:
        seen.append(piece)
        with pytest.raises(RuntimeError, match="busy"):
            session.append([1])
        return len(seen) == 3

    session.generate(model.sampling(max_new_tokens=50), receive)
    assert len(seen) == 3
    stats = session.stats
    assert (stats.finish, stats.tokens) == (STOPPED, len(PROMPT) + stats.generated_tokens)
    session.generate(model.sampling(max_new_tokens=2))


def test_cancelling_from_another_thread(model: Any, session: Any, package: Path) -> None:
    session.cancel()
    session.append(PROMPT)

    def receive(piece: str) -> None:
        thread = threading.Thread(target=session.cancel)
        thread.start()
        thread.join()

    session.generate(model.sampling(max_new_tokens=50), receive)
    assert session.stats.finish == STOPPED
    assert session.stats.generated_tokens < 10
    session.rewind(len(PROMPT))
    assert answer(model, session, 20) == greedy(package, PROMPT, 20)


def test_sessions_run_in_threads_of_their_own(model: Any, package: Path) -> None:
    prompts = [[1, *range(first, first + 20)] for first in (30, 60, 90)]
    found: dict[int, list[list[int]]] = {}

    def run(number: int) -> None:
        with model.session() as session:
            session.append(prompts[number])
            found[number] = []
            for _ in range(3):
                found[number].append(answer(model, session, 30))
                session.rewind(len(prompts[number]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(prompts):
        assert found[number] == [greedy(package, prompt, 30)] * 3


def test_a_session_outlives_its_model(sample: Any, built: Path, package: Path) -> None:
    model = sample.Model(package, library=built / "libllama_onnx.so")
    session = model.session()
    sampling = model.sampling(max_new_tokens=5)
    session.append(PROMPT)
    model.close()
    session.generate(sampling)
    assert session.ids[len(PROMPT) :] == greedy(package, PROMPT, 5)
    session.close()


def test_the_program_may_change_its_folder(
    sample: Any, built: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(package.parent)
    with sample.Model(package.name, library=built / "libllama_onnx.so") as model:
        monkeypatch.chdir(tmp_path)
        assert len(model.generate_ids(PROMPT, 3)) == 3
        with model.session() as session:
            session.say("one")
            session.save("saved.json")
            session.load("saved.json")
    assert (tmp_path / "saved.json").is_file()


def test_a_session_has_a_size(model: Any, package: Path) -> None:
    with model.session(max_tokens=12) as session:
        session.append(PROMPT)
        assert answer(model, session, 50) == greedy(package, PROMPT, 8)
        assert session.stats.finish == LENGTH
        with pytest.raises(RuntimeError, match="has 12 tokens, and may have no more"):
            session.generate()
        with pytest.raises(RuntimeError, match="would have 13 tokens, but may have 12"):
            session.append([1])
    for wanted in (1, 257):
        with pytest.raises(RuntimeError, match="max_tokens must be from 2 to 256"):
            model.session(max_tokens=wanted)
    with pytest.raises(RuntimeError, match="has no adapter 'x'"):
        model.session(adapter="x")


def test_an_adapter_says_what_the_runtime_says(sample: Any, built: Path, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    modules = {name: 4 for layer in range(3) for name in adapters.attention(layer, "q", "v")}
    kept = {"qv": adapters.write_adapter(tmp_path / "qv", adapters.factors(modules))}
    cpu = get_target("cpu")
    package = export_package(source, tmp_path / "p", cpu, Options("fp32"), kept=kept).package
    expected = {}
    with Llama.load(package) as runtime:
        for name in ("qv", None):
            answer_ = runtime.generate(np.array(PROMPT), max_new_tokens=24, adapter=name)
            expected[name] = [event.token for event in answer_.events() if hasattr(event, "token")]
    assert expected["qv"] != expected[None]
    with sample.Model(package, library=built / "libllama_onnx.so") as model:
        for name in ("qv", None, "qv"):
            with model.session(adapter=name) as session:
                session.append(PROMPT)
                assert answer(model, session, 24) == expected[name]
        with model.session(adapter="qv") as one, model.session() as other:
            one.save(tmp_path / "file")
            with pytest.raises(RuntimeError, match="was saved with another adapter"):
                other.load(tmp_path / "file")


def test_encoding_and_decoding(model: Any, package: Path) -> None:
    library = Tokenizer.from_file(str(package / "tokenizer.json"))
    for text in ("", "the quick", "a  b\0c 日本 <s>", "🎉"):
        assert model.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert model.decode(model.encode(text.replace("\0", ""))) == library.decode(
            library.encode(text.replace("\0", "")).ids
        )
    assert model.tokenizer == ""


def test_a_tokenizer_of_another_kind(
    sample: Any, built: Path, package: Path, tmp_path: Path, llama: Llama
) -> None:
    altered = alter_package(package, tmp_path / "other", tokenizer={"normalizer": {"type": "NFC"}})
    with sample.Model(altered, library=built / "libllama_onnx.so") as model:
        assert "because tokenizer.json has the normalizer NFC" in model.tokenizer
        assert model.encode("the quick") == llama.encode("the quick").tolist()
        with pytest.raises(RuntimeError, match="has a NUL in it"):
            model.encode("a\0b")
        with model.session() as session:
            session.say("the")
            session.generate(model.sampling(max_new_tokens=5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0"),
        ({"top_p": 2}, "top_p must be a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p must be a number from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be 0"),
        ({"size": 5}, "are of another version"),
        ({"stop_count": 1000}, "more than 256 stop texts"),
        ({"stop": [""]}, "stop text 0 is not UTF-8 of 1 to 4096 bytes"),
        ({"regex": "["}, "the guide was rejected: "),
        ({"json_schema": "{"}, "the guide was rejected: "),
        ({"regex": "a", "guide_kind": b"x"}, "there is no guide 'x'"),
        ({"regex": "a", "min_p": 0.5}, "min_p cannot be used with a guide"),
    ],
)
def test_options_out_of_range(
    model: Any, session: Any, package: Path, values: dict[str, Any], message: str
) -> None:
    session.append(PROMPT)
    with pytest.raises(RuntimeError, match=message):
        session.generate(model.sampling(**values))
    assert session.ids == PROMPT
    assert answer(model, session, 5) == greedy(package, PROMPT, 5)


def test_text_that_is_not_utf_8(model: Any, session: Any, sample: Any) -> None:
    api, damaged = model._api, b"a\xff"
    size = ctypes.c_size_t(2)
    assert api.llama_onnx_session_append_text(session._handle, damaged, size) == sample.FAILED
    assert session.error == "the text is not UTF-8."
    text = b'[{"role": "user", "content": "\xc3"}]'
    assert api.llama_onnx_session_append_messages(session._handle, text) == sample.FAILED
    assert "is not UTF-8" in session.error
    assert session.ids == []


def test_messages_need_each_other(model: Any, session: Any) -> None:
    with pytest.raises(RuntimeError, match="messages must be a list"):
        session._call("append_messages", b"{}")
    session.say("the")
    with pytest.raises(RuntimeError, match="the session has messages"):
        session.append("text")
    session.generate(model.sampling(max_new_tokens=2))
    with pytest.raises(RuntimeError, match="ends with an answer: append a message"):
        session.generate()
    with pytest.raises(RuntimeError, match="tokens, but may have 256 with its answer"):
        session.say("x " * 300)
    session.say("again")
    session.generate(model.sampling(max_new_tokens=2))


def test_every_pointer_may_be_null(model: Any, session: Any, sample: Any) -> None:
    api = model._api
    count, out = ctypes.c_size_t(0), ctypes.c_void_p()
    name = "llama_onnx_session_"
    calls: dict[str, tuple[Any, ...]] = {
        "append_text": (None, count),
        "append_ids": (None, count),
        "append_messages": (None,),
        "save": (None,),
        "load": (None,),
        "ids": (None, None),
        "stats": (None, count),
    }
    for call, arguments in calls.items():
        assert getattr(api, name + call)(session._handle, *arguments) == sample.FAILED, call
        assert session.error == "a pointer is NULL."
        assert getattr(api, name + call)(None, *arguments) == sample.FAILED
    assert api.llama_onnx_session_generate(None, None, None, None) == sample.FAILED
    assert api.llama_onnx_session_rewind(None, count) == sample.FAILED
    assert api.llama_onnx_session_open(None, None, ctypes.byref(out)) == sample.FAILED
    assert api.llama_onnx_session_open(model._handle, None, None) == sample.FAILED
    assert api.llama_onnx_sampling_defaults(None, None, count) == sample.FAILED
    assert api.llama_onnx_encode(None, None, count, 0, None, None) == sample.FAILED
    assert api.llama_onnx_encode(model._handle, None, count, 0, None, None) == sample.FAILED
    assert api.llama_onnx_encode(model._handle, b"a", count, 0, None, None) == sample.FAILED
    assert api.llama_onnx_decode(model._handle, None, count, None, None) == sample.FAILED
    assert api.llama_onnx_decode(None, None, count, None, None) == sample.FAILED
    api.llama_onnx_session_cancel(None)
    api.llama_onnx_session_close(None)
    assert api.llama_onnx_session_error(None) == b"there is no session."
    assert api.llama_onnx_tokenizer(None) == b""
