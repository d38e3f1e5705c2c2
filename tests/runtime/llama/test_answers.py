"""The ways to get an answer: pieces, events and asyncio give the same, from texts and from ids."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from llama_onnx.runtime.engine.sampling.guidance import Guide
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.generation import FinishEvent, TextEvent
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.template import TEMPLATE, render_messages
from llama_onnx.targets.errors import LlamaOnnxError, UsageError
from tests.support import tiny

PROMPT = "the quick brown fox"
CHAT: list[Any] = [{"role": "user", "content": "the lazy dog"}]


@pytest.fixture(scope="module")
def model(package_fp32: Path) -> Iterator[Llama]:
    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module", params=["onnxruntime", "genai"])
def either(request: pytest.FixtureRequest, package_fp32: Path) -> Llama:
    return Llama.load(package_fp32, engine=request.param, threads=1)


def test_events_are_the_tokens_and_their_text(either: Llama) -> None:
    answer = either.generate(PROMPT, max_new_tokens=20)
    *tokens, end = answer.events()
    assert isinstance(end, FinishEvent)
    assert all(isinstance(event, TextEvent) for event in tokens)
    text = "".join(event.text for event in (*tokens, end))
    assert text == "".join(either.generate(PROMPT, max_new_tokens=20)) != ""
    assert len(tokens) == end.stats.new_tokens == 20
    assert (end.finish_reason, end.stats) == ("length", answer.stats)


def test_what_a_stop_text_holds_back_comes_later(either: Llama) -> None:
    text = "".join(either.generate(PROMPT, max_new_tokens=20))
    never = text[-3:] + "never"
    *_, end = either.generate(PROMPT, max_new_tokens=20, stop=never).events()
    assert isinstance(end, FinishEvent) and end.text == text[-3:]


def test_ids_are_continued_like_their_text(either: Llama) -> None:
    ids = either.encode(PROMPT)
    text = "".join(either.generate(PROMPT, max_new_tokens=8))
    for prompt in (ids, ids.tolist(), tuple(ids), np.asarray(ids, np.int64)):
        assert "".join(either.generate(prompt, max_new_tokens=8)) == text
    with pytest.raises(UsageError, match="not a token id"):
        either.generate([1 << 40])
    with pytest.raises(UsageError, match="must be a text or token ids"):
        either.generate(b"the fox")


def test_asyncio_gives_the_same(model: Llama) -> None:
    async def ask() -> tuple[str, list[str]]:
        one = model.agenerate(PROMPT, max_new_tokens=20)
        pieces = "".join([piece async for piece in one])
        assert one.stats.new_tokens == 20 and one.stats.finish_reason == "length"
        three = await asyncio.gather(*map(collect, (PROMPT, "a", PROMPT)))
        return pieces, three

    async def collect(prompt: str) -> str:
        return "".join([piece async for piece in model.agenerate(prompt, max_new_tokens=20)])

    expected = ["".join(model.generate(text, max_new_tokens=20)) for text in (PROMPT, "a", PROMPT)]
    assert asyncio.run(ask()) == (expected[0], expected)


def test_asyncio_has_events_and_chats(model: Llama) -> None:
    async def ask() -> list[Any]:
        return [event async for event in model.achat(CHAT, max_new_tokens=12).events()]

    expected: list[Any] = list(model.chat(CHAT, max_new_tokens=12).events())
    found = asyncio.run(ask())
    assert found[:-1] == expected[:-1]
    assert (found[-1].text, found[-1].finish_reason) == (
        expected[-1].text,
        expected[-1].finish_reason,
    )


def test_an_answer_is_cancelled_in_asyncio(model: Llama) -> None:
    engine = model.backend.require_engine()

    async def ask() -> None:
        answer = model.agenerate(PROMPT, max_new_tokens=240)
        events = answer.events()
        await anext(events)
        answer.cancel()
        rest = [event async for event in events]
        assert isinstance(rest[-1], FinishEvent) and rest[-1].finish_reason == "interrupted"
        assert answer.stats.new_tokens < 240
        never = model.agenerate(PROMPT, max_new_tokens=240)
        never.cancel()
        assert [piece async for piece in never] == []
        async with model.agenerate(PROMPT, max_new_tokens=240) as left:
            await anext(left)
        assert [piece async for piece in left] == []
        dropped = model.agenerate(PROMPT, max_new_tokens=240)
        await anext(dropped)
        del dropped

    asyncio.run(ask())
    gc.collect()
    deadline = time.monotonic() + 20
    while engine.load().running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_genai_cannot_do_is_said(package_fp32: Path) -> None:
    theirs = Llama.load(package_fp32, engine="genai")
    with pytest.raises(UsageError, match="answers one caller at a time"):
        theirs.agenerate(PROMPT)
    with pytest.raises(UsageError, match="cannot follow a guide"):
        theirs.generate(PROMPT, guide=Guide("regex", "a"))
    with theirs:
        assert "".join(theirs.generate(PROMPT, max_new_tokens=20))


def test_a_closed_model_says_so(package_fp32: Path) -> None:
    with Llama.load(package_fp32, engine="onnxruntime") as opened:
        answer = opened.generate(PROMPT, max_new_tokens=240)
        next(answer)
    with pytest.raises(LlamaOnnxError, match="closed"):
        list(answer)
    with pytest.raises(LlamaOnnxError, match="closed"):
        list(opened.generate(PROMPT))


def test_a_guide_is_followed(model: Llama) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    guide = Guide("json_schema", json.dumps(schema))
    for seed in range(3):
        text = "".join(model.chat(CHAT, guide=guide, temperature=2.0, seed=seed))
        jsonschema.validate(json.loads(text), schema)
    assert "".join(model.generate(PROMPT, guide=Guide("regex", "ab{3}"))) == "abbb"


def test_log_probabilities_come_with_their_tokens(model: Llama) -> None:
    *tokens, _ = model.generate(PROMPT, max_new_tokens=5, sampling=Sampling(logprobs=2)).events()
    for event in tokens:
        assert isinstance(event, TextEvent)
        assert event.logprobs.top[0] == (event.token, event.logprobs.logprob)
        assert len(event.logprobs.top) == 2


def test_tokens_are_decoded(model: Llama) -> None:
    assert model.decode(model.encode(PROMPT)) == PROMPT
    with pytest.raises(UsageError, match="not a token id"):
        model.decode([-1])


# What the template gets


def hugging(package: Path) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(package)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.mark.parametrize("start", ["the fox", "the fox ", "a\n", " b"])
def test_an_answer_is_continued_as_transformers_does(model: Llama, start: str) -> None:
    messages = [*CHAT, {"role": "assistant", "content": start}]
    expected: Any = hugging(model.package.path).apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=False
    )
    assert model.encode_chat(messages, continue_last=True).tolist() == expected
    text = "".join(model.chat(messages, continue_last=True, max_new_tokens=6))
    assert text == "".join(model.generate(expected, max_new_tokens=6))
    with pytest.raises(UsageError, match="only an assistant's message"):
        model.encode_chat(CHAT, continue_last=True)


def test_variables_reach_the_template(tmp_path: Path) -> None:
    source = "{{ mood }} {% for m in messages %}{{ m.content }}{% endfor %}"
    tiny.write_tokenizer(tmp_path, tiny.GQA.vocab_size)
    (tmp_path / TEMPLATE).write_text(source)
    expected = hugging(tmp_path).apply_chat_template(
        CHAT, chat_template=source, mood="fox", tokenize=False
    )
    assert render_messages(tmp_path, CHAT, variables={"mood": "fox"}) == expected


@pytest.mark.parametrize("wrong", [{"messages": []}, {"x": object()}, [1], {1: 2}])
def test_variables_that_are_none_are_refused(model: Llama, wrong: Any) -> None:
    with pytest.raises(UsageError, match="variable"):
        model.encode_chat(CHAT, template_variables=wrong)
