"""A conversation that keeps its messages: what is in it after each answer, however that ended."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llama_onnx.runtime.engine.bound_graph import BoundGraph
from llama_onnx.runtime.engine.sampling.guidance import Guide
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.dialogue import Conversation
from llama_onnx.runtime.llama.generation import FinishEvent, Generation, TextEvent
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.errors import ContextLengthError, LlamaOnnxError, UsageError
from tests.support.packages import alter_package

NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model(package_fp32: Path) -> Iterator[Llama]:
    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture
def chat(model: Llama) -> Conversation:
    return model.conversation(system="the lazy dog", max_new_tokens=8)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "the lazy dog"}


# What is said, and what is kept


def test_answers_are_those_to_the_whole_list_of_messages(model: Llama, chat: Conversation) -> None:
    messages = [SYSTEM]
    for said in ("the fox", "Paris 日本 😀", "and the dog?"):
        text = "".join(chat.say(said))
        messages.append(user(said))
        assert text == "".join(model.chat(messages, max_new_tokens=8)) != ""
        messages.append(assistant(text))
        assert chat.messages == messages
    assert chat.dropped == []


def test_a_turn_reads_only_what_is_new(package_fp32: Path) -> None:
    """The original tokenizer says which tokens of a prompt the model has not seen."""
    source = AutoTokenizer.from_pretrained(package_fp32.parent / "checkpoint")
    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as model:
        chat = model.conversation(system="the lazy dog", max_new_tokens=8)
        seen: list[int] = []
        for said in ("the fox", "Paris 日本 😀", "and the dog?"):
            messages = [*chat.messages, user(said)]
            prompt = source.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            known = next(
                (n for n, (a, b) in enumerate(zip(seen, prompt, strict=False)) if a != b),
                min(len(seen), len(prompt)),
            )
            answer = chat.say(said)
            *texts, _ = answer.events()
            assert answer.stats.prompt_tokens == len(prompt)
            assert answer.stats.reused_tokens == known
            # The last token has been chosen, but not read.
            seen = [*prompt, *(e.token for e in texts if isinstance(e, TextEvent))][:-1]
        assert known > len(prompt) / 2


def test_options_of_the_conversation_and_of_one_answer(model: Llama) -> None:
    chat = model.conversation(max_new_tokens=8, temperature=1.5, seed=3)
    first = chat.say("the fox")
    text = "".join(first)
    expected = model.chat([user("the fox")], max_new_tokens=8, temperature=1.5, seed=3)
    assert text == "".join(expected)
    second = chat.say("the dog", max_new_tokens=3, temperature=0.0)
    "".join(second)
    assert (first.stats.new_tokens, second.stats.new_tokens) == (8, 3)


def test_a_message_and_several_can_be_said(model: Llama) -> None:
    chat = model.conversation(max_new_tokens=4)
    "".join(chat.say({"role": "user", "content": [{"type": "text", "text": "the fox"}]}))
    "".join(chat.say([{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]))
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[0]["content"] == "the fox"


def test_a_conversation_can_begin_with_messages(model: Llama) -> None:
    known = [user("a"), assistant("b")]
    chat = model.conversation(system="the lazy dog", messages=known, max_new_tokens=4)
    text = "".join(chat.say("the fox"))
    assert chat.messages == [SYSTEM, *known, user("the fox"), assistant(text)]


def test_messages_are_copies(chat: Conversation) -> None:
    chat.messages[0]["content"] = "other"
    chat.messages.clear()
    assert chat.messages == [SYSTEM]


def test_calls_of_tools_are_read_from_the_answer(package: Path, tmp_path: Path) -> None:
    """The template writes calls and answers of tools; a guide makes the model call."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% for c in m.get('tool_calls', []) %}({{ c.id }} {{ c.function.name }}"
        "{{ c.function.arguments.get('x') }}){% endfor %}{{ '\\n' }}{% endfor %}<|assistant|>"
    )
    altered = alter_package(package, tmp_path / "tools", chat_template=template)
    call = '<tool_call>{"name": "now", "arguments": {"x": 1}}</tool_call>'
    guide = Guide("regex", call.replace("{", r"\{").replace("}", r"\}"))
    with Llama.load(altered, engine="onnxruntime", threads=1) as model:
        chat = model.conversation(tools=[NOW], max_new_tokens=100)
        for number in range(2):
            assert "".join(chat.say("the fox", guide=guide)) == call
            (said,) = chat.messages[-1]["tool_calls"]
            assert chat.messages[-1]["content"] == ""
            assert said == {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": "now", "arguments": '{"x": 1}'},
            }
        answer = chat.say({"role": "tool", "content": "5", "tool_call_id": "call_1"}, stop="z")
        "".join(answer)
        wanted = (
            "<|user|>the fox\n<|assistant|>(call_0 now1)\n"
            "<|user|>the fox\n<|assistant|>(call_1 now1)\n<|tool|>5\n<|assistant|>"
        )
        source = AutoTokenizer.from_pretrained(package.parent / "checkpoint")
        tokens = source.encode(wanted, add_special_tokens=False)
        assert answer.stats.prompt_tokens == len(tokens)


# Ends


def test_an_answer_that_is_closed_leaves_what_was_shown(chat: Conversation) -> None:
    answer = chat.say("the fox", max_new_tokens=60)
    shown = next(answer) + next(answer)
    assert chat.messages == [SYSTEM]
    answer.close()
    assert chat.messages == [SYSTEM, user("the fox"), assistant(shown)]
    "".join(chat.say("more"))
    assert len(chat.messages) == 5


def test_an_answer_that_is_dropped_leaves_what_was_shown(chat: Conversation) -> None:
    shown = next(chat.say("the fox", max_new_tokens=60))
    gc.collect()
    assert chat.messages == [SYSTEM, user("the fox"), assistant(shown)]


def never_started(chat: Conversation) -> None:
    chat.say("the fox")


def closed_at_once(chat: Conversation) -> None:
    chat.say("the fox").close()


def refused(chat: Conversation) -> None:
    with pytest.raises(UsageError):
        chat.say("the fox", guide=Guide("regex", "("))


def too_long(chat: Conversation) -> None:
    with pytest.raises(ContextLengthError):
        chat.say("the fox " * 100)


@pytest.mark.parametrize("end", [never_started, closed_at_once, refused, too_long])
def test_an_answer_that_showed_nothing_changes_nothing(
    chat: Conversation, end: Callable[[Conversation], None]
) -> None:
    end(chat)
    assert chat.messages == [SYSTEM]
    "".join(chat.say("again"))
    assert len(chat.messages) == 3


def test_an_empty_answer_is_one(package_fp32: Path, tmp_path: Path) -> None:
    """The first token ends it: nothing was shown, and nothing went wrong."""
    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as model:
        (first, *_rest, _end) = model.chat([user("the fox")], max_new_tokens=4).events()
    ends = {"eos_token_id": [2, first.token]}  # type: ignore[union-attr]
    altered = alter_package(package_fp32, tmp_path / "altered", model=ends)
    with Llama.load(altered, engine="onnxruntime", threads=1) as model:
        chat = model.conversation()
        assert "".join(chat.say("the fox")) == ""
        assert chat.messages == [user("the fox"), assistant("")]


def test_an_error_in_the_middle_leaves_what_was_shown(
    model: Llama, chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = BoundGraph.run, 0

    def fail(self: BoundGraph, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("no luck")
        return run(self, *arguments)

    monkeypatch.setattr(BoundGraph, "run", fail)
    answer, shown = chat.say("the fox"), ""
    with pytest.raises(LlamaOnnxError, match="no luck"):
        for piece in answer:
            shown += piece
    monkeypatch.undo()
    expected = [SYSTEM, user("the fox"), assistant(shown)] if shown else [SYSTEM]
    assert chat.messages == expected
    "".join(chat.say("more"))


def test_one_answer_at_a_time(chat: Conversation) -> None:
    answer = chat.say("the fox")
    next(answer)
    for ask in (lambda: chat.say("the dog"), chat.retry, chat.undo):
        with pytest.raises(UsageError, match="still answering"):
            ask()
    "".join(answer)
    "".join(chat.say("the dog"))
    assert [message["content"] for message in chat.messages[1::2]] == ["the fox", "the dog"]


def test_the_last_event_ends_the_turn(chat: Conversation) -> None:
    events = chat.say("the fox").events()
    for event in events:
        if isinstance(event, FinishEvent):
            break
    "".join(chat.say("the dog"))
    assert len(chat.messages) == 5


def test_threads_that_ask_at_once_get_one_answer_and_refusals(chat: Conversation) -> None:
    barrier = threading.Barrier(6)
    found: list[Generation | UsageError] = []

    def ask() -> None:
        barrier.wait()
        try:
            found.append(chat.say("the fox"))
        except UsageError as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [each for each in found if not isinstance(each, UsageError)]
    assert len(answers) == 1 and len(found) == 6
    "".join(answers[0])
    assert len(chat.messages) == 3


def test_another_thread_ends_an_answer(chat: Conversation) -> None:
    answer = chat.say("the fox", max_new_tokens=200)
    shown = [next(answer)]

    def read() -> None:
        shown.extend(answer)

    thread = threading.Thread(target=read)
    thread.start()
    answer.close()
    thread.join()
    assert chat.messages[1:] == [user("the fox"), assistant("".join(shown))]


# asyncio


def test_the_async_twins_do_the_same(chat: Conversation) -> None:
    twin = chat.fork()

    async def talk() -> None:
        assert [p async for p in twin.asay("the fox")] == list(chat.say("the fox"))
        answer = twin.asay("the dog", max_new_tokens=60)
        shown = await anext(answer)
        with pytest.raises(UsageError, match="still answering"):
            twin.asay("more")
        await answer.aclose()
        assert twin.messages[3:] == [user("the dog"), assistant(shown)]
        again = [p async for p in twin.aretry(temperature=1.0, seed=5, max_new_tokens=4)]
        assert twin.messages[3:] == [user("the dog"), assistant("".join(again))]
        twin.asay("nothing")  # dropped at once
        cancelled = twin.asay("the dog")
        cancelled.cancel()
        assert [p async for p in cancelled] == []
        assert len(twin.messages) == 5
        twin.undo()

    asyncio.run(talk())
    assert chat.messages == twin.messages


def test_a_cancelled_task_leaves_what_was_shown(chat: Conversation) -> None:
    async def talk() -> str:
        shown = ""

        async def read() -> None:
            nonlocal shown
            async for piece in chat.asay("the fox", max_new_tokens=200):
                shown += piece

        task = asyncio.create_task(read())
        while not shown:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return shown

    shown = asyncio.run(talk())
    gc.collect()
    assert chat.messages == [SYSTEM, user("the fox"), assistant(shown)]


# Undo, retry, fork


def test_retry_replaces_the_last_answer(model: Llama, chat: Conversation) -> None:
    first = "".join(chat.say("the fox"))
    assert "".join(chat.retry()) == first
    answer = chat.retry(temperature=1.5, seed=1)
    other = "".join(answer)
    asked = [SYSTEM, user("the fox")]
    expected = model.chat(asked, max_new_tokens=8, temperature=1.5, seed=1)
    assert other == "".join(expected) != first
    assert chat.messages == [*asked, assistant(other)]
    assert answer.stats.reused_tokens == answer.stats.prompt_tokens - 2
    chat.retry().close()
    assert chat.messages == [*asked, assistant(other)]


def test_undo_returns_what_was_said(chat: Conversation) -> None:
    texts = ["".join(chat.say(said)) for said in ("the fox", "the dog")]
    assert chat.undo() == [user("the dog")]
    assert chat.messages == [SYSTEM, user("the fox"), assistant(texts[0])]
    assert "".join(chat.say("the dog")) == texts[1]
    assert (chat.undo(), chat.undo()) == ([user("the dog")], [user("the fox")])
    assert chat.messages == [SYSTEM]
    for nothing in (chat.undo, chat.retry):
        with pytest.raises(UsageError, match="no answer yet"):
            nothing()


def test_a_fork_goes_its_own_way(chat: Conversation) -> None:
    "".join(chat.say("the fox"))
    running = chat.say("the dog")
    next(running)
    fork = chat.fork()
    answer = fork.say("the cat")
    "".join(answer)
    assert answer.stats.reused_tokens > 30
    "".join(running)
    assert [m["content"] for m in (fork.messages[3], chat.messages[3])] == ["the cat", "the dog"]
    assert fork.messages[:3] == chat.messages[:3]


# The context


def test_the_oldest_turns_make_room(package_fp32: Path) -> None:
    with Llama.load(package_fp32, engine="onnxruntime", threads=1, max_length=100) as model:
        chat = model.conversation(system="the fox", overflow="drop_oldest", max_new_tokens=10)
        said = []
        for number in range(8):
            answer = chat.say(f"{number} the dog")
            said.append(user(f"{number} the dog"))
            before = len(chat.dropped)
            said.append(assistant("".join(answer)))
            assert len(chat.dropped) == before
            assert answer.stats.prompt_tokens + 10 <= 100
            assert [*chat.dropped, *chat.messages[1:]] == said
            assert chat.messages[0] == {"role": "system", "content": "the fox"}
            if chat.dropped:  # not a turn more than needed
                more = [chat.messages[0], *chat.dropped[-2:], *chat.messages[1:-1]]
                assert len(model.encode_chat(more)) + 10 > 100
        assert len(chat.dropped) >= 4
        # What is left out for an answer that shows nothing comes back.
        messages, dropped = chat.messages, chat.dropped
        running = chat.say("the dog " * 8)
        assert len(chat.dropped) > len(dropped)
        running.close()
        assert (chat.messages, chat.dropped) == (messages, dropped)


def test_or_the_conversation_is_refused(package_fp32: Path) -> None:
    with Llama.load(package_fp32, engine="onnxruntime", threads=1, max_length=60) as model:
        chat = model.conversation(max_new_tokens=10)
        with pytest.raises(ContextLengthError, match="context length is 60"):
            for _ in range(9):
                "".join(chat.say("the dog"))
        assert len(chat.messages) >= 2 and chat.dropped == []
        assert chat.messages[-1]["role"] == "assistant"


# Wrong use


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"system": 5}, "'content' must be a text"),
        ({"overflow": "drop"}, "overflow must be"),
        ({"adapter": "fox"}, "no adapter 'fox'"),
        ({"tools": [1]}, "tools"),
        ({"template_variables": {"messages": 1}}, "not a free variable"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"sampling": 5}, "must be a Sampling"),
        ({"stop": [""]}, "not empty"),
        ({"messages": [{"role": "user"}]}, "has no 'content'"),
    ],
)
def test_wrong_values_are_refused_at_once(model: Llama, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        model.conversation(**options)


def test_names_that_are_no_options_are_refused(model: Llama, chat: Conversation) -> None:
    for ask in (lambda: model.conversation(top=1), lambda: chat.say("a", adapter=None)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="no option"):
            ask()
    assert chat.messages == [SYSTEM]


@pytest.mark.parametrize(
    "said", [5, None, [], {"role": "user"}, {"role": "assistant", "content": "a"}, b"a"]
)
def test_what_cannot_be_said_is_refused(chat: Conversation, said: Any) -> None:
    with pytest.raises(UsageError):
        chat.say(said)
    assert chat.messages == [SYSTEM]


def test_genai_answers_too(package: Path) -> None:
    llama = Llama.load(package, engine="genai")
    chat = llama.conversation(max_new_tokens=4, sampling=Sampling(top_k=1))
    text = "".join(chat.say("the fox"))
    assert text == "".join(llama.chat([user("the fox")], max_new_tokens=4))
    assert chat.messages == [user("the fox"), assistant(text)]
    with pytest.raises(UsageError, match="one caller at a time"):
        chat.asay("the dog")
    "".join(chat.say("the dog"))
