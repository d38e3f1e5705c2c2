"""The same package in our own engine and in onnxruntime-genai: the same texts, ends and figures."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bench.bench import bench
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.generation import TextEvent
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.placement import genai_model
from llama_onnx.targets.engines import ENGINES
from llama_onnx.targets.errors import PackageError, ResourceError, UsageError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CUDA
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.answers import let_every_step_take_as_long
from tests.support.packages import alter_package, greedy

PROMPT = "the quick brown fox"
CHAT = [
    {"role": "system", "content": "the lazy dog"},
    {"role": "user", "content": "Paris 日本 😀"},
]


@pytest.fixture(scope="module")
def ours(package_fp32: Path) -> Llama:
    return Llama.load(package_fp32, engine="onnxruntime")


@pytest.fixture(scope="module")
def theirs(package_fp32: Path) -> Llama:
    return Llama.load(package_fp32, engine="genai")


@pytest.fixture(params=["generate", "chat", "stop"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_texts_and_figures_are_the_same(ours: Llama, theirs: Llama, case: str) -> None:
    found = []
    for model in (ours, theirs):
        stop = "".join(theirs.generate(PROMPT, max_new_tokens=40))[9:12] if case == "stop" else ()
        if case == "chat":
            answer = model.chat(CHAT, max_new_tokens=40)
        else:
            answer = model.generate(PROMPT, max_new_tokens=40, stop=stop)
        text, stats = "".join(answer), answer.stats
        assert 0 < stats.prefill_seconds < stats.first_token_seconds
        assert stats.decode_seconds > 0
        found.append((text, stats.prompt_tokens, stats.new_tokens, stats.finish_reason))
    assert found[0] == found[1]


def test_an_int4_package_gives_the_same_text(package: Path, llama: Llama) -> None:
    # Several positions in a step have another kernel, which may decide a near-tie otherwise.
    model = Llama.load(package, engine="onnxruntime", speculate="off")
    for prompt in (PROMPT, "the capital of France", "a"):
        text = "".join(model.generate(prompt, max_new_tokens=60))
        assert text == "".join(llama.generate(prompt, max_new_tokens=60)) != ""


def test_an_end_token_ends_both(package_fp32: Path, theirs: Llama, tmp_path: Path) -> None:
    tokens = greedy(package_fp32, theirs.encode(PROMPT).tolist(), 24)
    ends = {"eos_token_id": [2, tokens[6]]}
    altered = alter_package(package_fp32, tmp_path / "altered", model=ends)
    answers = [
        Llama.load(altered, engine=engine).generate(PROMPT, max_new_tokens=24)
        for engine in ("onnxruntime", "genai")
    ]
    texts = ["".join(answer) for answer in answers]
    assert texts[0] == texts[1]
    assert answers[0].stats.finish_reason == answers[1].stats.finish_reason == "stop"
    assert answers[0].stats.new_tokens == answers[1].stats.new_tokens < 24


def test_the_next_turn_of_a_chat_reads_only_what_is_new(package_fp32: Path, theirs: Llama) -> None:
    model = Llama.load(package_fp32, engine="onnxruntime")
    messages = list(CHAT)
    reused = []
    for _ in range(3):
        answer = model.chat(messages, max_new_tokens=20)
        text = "".join(answer)
        assert text == "".join(theirs.chat(messages, max_new_tokens=20))
        reused.append(answer.stats.prompt_tokens - answer.stats.reused_tokens)
        said = {"role": "assistant", "content": text}
        messages += [said, {"role": "user", "content": "the fox"}]
    assert reused[1] < len(model.encode_chat(messages)) / 3
    assert reused[0] == len(model.encode_chat(CHAT))


def test_an_adapter_says_the_same_in_both(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    modules = {name: 4 for layer in range(3) for name in adapters.attention(layer, "q", "v")}
    kept = {"qv": adapters.write_adapter(tmp_path / "qv", adapters.factors(modules))}
    cpu = get_target("cpu")
    package = export_package(source, tmp_path / "p", cpu, Options("fp32"), kept=kept).package
    models = [Llama.load(package, engine=engine) for engine in ("onnxruntime", "genai")]
    texts = [
        ["".join(model.generate(PROMPT, max_new_tokens=24, adapter=name)) for name in ("qv", None)]
        for model in models
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    with pytest.raises(UsageError, match="other"):
        models[0].generate(PROMPT, adapter="other")


def test_several_threads_get_their_own_answers(ours: Llama, theirs: Llama) -> None:
    prompts = ["the fox", "a lazy dog", PROMPT, "Paris"]
    found: dict[str, str] = {}

    def answer(prompt: str) -> None:
        found[prompt] = "".join(ours.generate(prompt, max_new_tokens=30))

    threads = [threading.Thread(target=answer, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {p: "".join(theirs.generate(p, max_new_tokens=30)) for p in prompts}


def test_another_thread_ends_an_answer(ours: Llama) -> None:
    answer = ours.generate(PROMPT, max_new_tokens=240)
    pieces = [next(answer)]
    closer = threading.Thread(target=answer.close)
    closer.start()
    closer.join()
    assert list(answer) == []
    assert answer.stats.finish_reason == "interrupted"
    assert answer.stats.new_tokens >= len(pieces)
    unread = ours.generate(PROMPT)
    unread.close()
    assert list(unread) == [] and unread.stats.new_tokens == 0


def test_nothing_runs_before_an_answer_is_read(ours: Llama) -> None:
    answer = ours.generate(PROMPT, max_new_tokens=9)
    assert answer.stats.prefill_seconds == 0
    assert answer._run._answer is None  # type: ignore[attr-defined]
    assert "".join(answer)


def test_an_answer_outlives_its_model(package_fp32: Path, theirs: Llama) -> None:
    answer = Llama.load(package_fp32, engine="onnxruntime").generate(PROMPT, max_new_tokens=9)
    gc.collect()
    assert "".join(answer) == "".join(theirs.generate(PROMPT, max_new_tokens=9))


def engine_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "llama-onnx engine")


def test_a_model_without_references_ends_its_thread(package_fp32: Path) -> None:
    before = set(engine_threads())
    model: Llama | None = Llama.load(package_fp32, engine="onnxruntime")
    assert model is not None
    (thread,) = set(engine_threads()) - before
    "".join(model.generate(PROMPT, max_new_tokens=2))
    del model
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_measurements_do_not_profit_from_what_was_read(ours: Llama) -> None:
    prompt = ours.encode("the quick brown fox jumps over the lazy dog. " * 3)
    for _ in range(2):
        stats = ours.measure(prompt, 8)
        assert (stats.reused_tokens, stats.new_tokens) == (0, 8)


@pytest.mark.parametrize("options", [{"temperature": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_the_same_seed_draws_the_same_whatever_else_runs(
    ours: Llama, options: dict[str, float]
) -> None:
    sampling = Sampling(seed=2**63 + 7).override(**options)

    def answer(seed: int) -> str:
        return "".join(ours.generate(PROMPT, sampling=sampling, seed=seed, max_new_tokens=24))

    alone = answer(2**63 + 7)
    beside = ours.generate("the dog", temperature=1.0, seed=1, max_new_tokens=60)
    next(beside)  # it is generated in the same steps from here on
    assert answer(2**63 + 7) == alone
    assert len({answer(seed) for seed in range(4)}) > 1


def test_every_choice_of_the_likeliest_token_is_greedy(ours: Llama) -> None:
    greedy = "".join(ours.generate(PROMPT, max_new_tokens=20))
    for sampling in (
        Sampling(top_k=1),
        Sampling(top_p=0),
        Sampling(min_p=1),
        Sampling(temperature=0),
    ):
        assert "".join(ours.generate(PROMPT, sampling=sampling, max_new_tokens=20)) == greedy


def test_a_biased_token_is_all_there_is(ours: Llama) -> None:
    answer = ours.generate(PROMPT, sampling=Sampling(logit_bias={70: 100}), max_new_tokens=5)
    assert len(set("".join(answer))) == 1
    with pytest.raises(UsageError, match="logit_bias names the token 999"):
        ours.generate(PROMPT, sampling=Sampling(logit_bias={999: 1}))


def test_log_probabilities_are_not_left_out_in_silence(ours: Llama, theirs: Llama) -> None:
    *tokens, _ = ours.generate(PROMPT, max_new_tokens=3, sampling=Sampling(logprobs=2)).events()
    assert all(isinstance(event, TextEvent) and event.logprobs for event in tokens)
    with pytest.raises(UsageError, match="has no logprobs"):
        theirs.generate(PROMPT, sampling=Sampling(logprobs=2))


@pytest.mark.parametrize(
    "search", [{"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 0.6, "top_k": 1}]
)
def test_what_the_package_sets_counts_in_both_engines(
    package_fp32: Path, tmp_path: Path, search: dict[str, float]
) -> None:
    altered = alter_package(package_fp32, tmp_path / "altered", search=search)
    both = [
        "".join(Llama.load(altered, engine=engine).generate(PROMPT, max_new_tokens=40))
        for engine in ENGINES
    ]
    assert both[0] == both[1] != ""


def test_the_engine_is_ours_on_the_cpu_and_genai_elsewhere(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Llama.load(package_fp32).backend.name == "onnxruntime"
    opened = []

    def open_model(path: Path, provider: Provider, **_: Any) -> None:
        opened.append(provider)
        raise PackageError("that is enough")

    monkeypatch.setattr(genai_model, "open_model", open_model)
    with pytest.raises(PackageError, match="that is enough"):
        Llama.load(package_fp32, provider="cuda")
    assert opened == [CUDA]


def test_an_engine_that_there_is_not(package_fp32: Path) -> None:
    with pytest.raises(
        UsageError, match="there is no engine 'vllm': choose one of onnxruntime, genai"
    ):
        Llama.load(package_fp32, engine="vllm")  # type: ignore[arg-type]


def test_a_damaged_graph_is_a_sentence(package_fp32: Path, tmp_path: Path) -> None:
    folder = alter_package(package_fp32, tmp_path / "damaged")
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(PackageError):
        Llama.load(folder, engine="onnxruntime")


def test_no_memory_is_a_sentence(package_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_onnx.runtime.doctor.facts import Memory
    from llama_onnx.runtime.engine import cache_budget

    monkeypatch.setattr(cache_budget, "gather_memory", lambda: Memory(10**9, 768 * 80))
    model = Llama.load(package_fp32, engine="onnxruntime")
    with pytest.raises(ResourceError, match="not enough memory for a prompt of 11 tokens and an"):
        model.generate(PROMPT, max_new_tokens=200)
    assert "".join(model.generate(PROMPT, max_new_tokens=4))


# The command line


def test_what_genai_cannot_do_is_done_by_the_other_engine(package_fp32: Path) -> None:
    arguments = ["generate", str(package_fp32), PROMPT, "--max-new-tokens", "8"]
    arguments += ["--temperature", "0", "--frequency-penalty", "1.5"]
    done = CliRunner().invoke(main, [*arguments, "--engine", "genai"])
    assert done.exit_code == 2 and "choose the engine onnxruntime (--engine" in done.stderr
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_commands_say_the_same_with_both(package_fp32: Path, command: str) -> None:
    said = []
    for engine in ("onnxruntime", "genai"):
        arguments = [command, str(package_fp32), "--engine", engine, "--max-new-tokens", "20"]
        arguments += [PROMPT] if command == "generate" else []
        done = CliRunner().invoke(main, arguments, input="the fox\nand the dog\n")
        assert done.exit_code == 0, done.output
        # The second turn of a chat has been read but for the new message.
        assert (" known), " in done.stderr) == (engine == "onnxruntime" and command == "chat")
        said.append(done.stdout)
    assert said[0] == said[1] != ""


def test_bench_measures_the_engine_that_is_asked_for(package: Path) -> None:
    arguments = ["bench", str(package), "--engine", "onnxruntime", "--json", "--repeats", "1"]
    done = CliRunner().invoke(main, [*arguments, "--prompt-tokens", "16", "--new-tokens", "8"])
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout)
    assert measured["engine"] == "onnxruntime" and measured["decode_rate"]["median"] > 0
    assert (
        bench(package, prompt_tokens=8, new_tokens=4, repeats=1, engine="genai").engine == "genai"
    )


# Drafts


REPEATS = "one two three one two three one two three one two three"


def test_drafts_are_counted_and_change_no_text(
    package_fp32: Path, theirs: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_every_step_take_as_long(monkeypatch)
    model = Llama.load(package_fp32, engine="onnxruntime", threads=1)
    drafted = 0
    for _ in range(3):
        answer = model.generate(REPEATS, max_new_tokens=120)
        assert "".join(answer) == "".join(theirs.generate(REPEATS, max_new_tokens=120))
        stats = answer.stats
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        assert stats.to_json()["drafted_tokens"] == stats.drafted_tokens
        drafted += stats.drafted_tokens
    assert drafted > 0
    measured = model.measure(model.encode(REPEATS), 120)
    assert (measured.drafted_tokens, measured.accepted_tokens) == (0, 0)


def test_drafts_are_counted_in_asyncio_too(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_every_step_take_as_long(monkeypatch)

    async def drafted(model: Llama) -> int:
        answer = model.agenerate(REPEATS, max_new_tokens=120)
        _ = [piece async for piece in answer]
        return answer.stats.drafted_tokens

    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as model:
        assert sum(asyncio.run(drafted(model)) for _ in range(3)) > 0


def test_speculation_can_be_turned_off(package_fp32: Path) -> None:
    with Llama.load(package_fp32, engine="onnxruntime", speculate="off") as model:
        answer = model.generate(REPEATS, max_new_tokens=120)
        assert "".join(answer)
        assert answer.stats.drafted_tokens == 0


def test_a_package_drafts_for_another(package_fp32: Path, package: Path, theirs: Llama) -> None:
    with Llama.load(package_fp32, engine="onnxruntime", draft=package) as model:
        text = "".join(model.generate(PROMPT, max_new_tokens=60))
    assert text == "".join(theirs.generate(PROMPT, max_new_tokens=60))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"engine": "genai", "speculate": "ngram"},
            "onnxruntime-genai generates here, without drafts",
        ),
        ({"engine": "genai", "draft": True}, "onnxruntime-genai generates here, without drafts"),
        ({"speculate": "always"}, "there is no speculation 'always': choose one of auto, ngram"),
        ({"speculate": "off", "draft": True}, "a draft package has no ef"),
    ],
)
def test_drafts_that_nothing_verifies_are_refused(
    package_fp32: Path, options: dict[str, Any], said: str
) -> None:
    if options.get("draft"):
        options["draft"] = package_fp32
    with pytest.raises(UsageError, match=said):
        Llama.load(package_fp32, **options)


def test_a_draft_that_is_no_package_is_refused(package_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="nothing"):
        Llama.load(package_fp32, engine="onnxruntime", draft=tmp_path / "nothing")


def test_the_command_says_what_was_drafted(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_every_step_take_as_long(monkeypatch)
    arguments = ["generate", package_fp32, REPEATS, "--engine", "onnxruntime", "--threads", "1"]
    arguments += ["--max-new-tokens", "200", "--speculate", "ngram"]
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    counts = re.search(r"answer 200 tokens \((\d+) of (\d+) drafted accepted\), ", result.stderr)
    assert counts is not None and int(counts[1]) <= int(counts[2])
    drafting = [*map(str, arguments[:3]), "--engine", "genai", "--draft", str(package_fp32)]
    refused = CliRunner().invoke(main, drafting)
    assert refused.exit_code == 2 and "choose the engine onnxruntime" in refused.stderr
