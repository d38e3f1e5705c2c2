from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as og
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import total_length
from llama_onnx.runtime.llama.stops import StopFilter
from llama_onnx.runtime.placement import genai_model as providers_module
from llama_onnx.runtime.placement.genai_model import open_model
from llama_onnx.targets.errors import PackageError, ProviderError, ResourceError, UsageError
from llama_onnx.targets.package import MANIFEST, write_manifest
from llama_onnx.targets.providers import CPU, CUDA, WEBGPU
from tests.support import tiny
from tests.support.fakes import FakeGenerator, FakeStream, generation, interrupt_at
from tests.support.packages import END, START, alter_package, decode
from tests.support.pytorch import reference

PROMPT = "the quick brown fox"
HELLO = [{"role": "user", "content": "the fox"}]

ADD_START = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [START], "tokens": ["<s>"]}},
}
"""The post-processor of a tokenizer.json whose model wants a start token, as Llama 2's does."""


# Stop strings


def stopped_text(text: str, stops: list[str]) -> str:
    """What may be shown of `text`, by the definition: up to the stop that ends first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@example(["abc"], ["abc", "b"])
@given(st.lists(st.text("abc", max_size=4)), st.lists(st.text("abc", max_size=4), max_size=3))
def test_a_stop_string_is_found_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    filtered = StopFilter(stops)
    shown = ""
    for piece in pieces:
        shown += filtered.feed(piece)
        assert stopped_text(text, stops).startswith(shown), "a part of the stop string leaked"
        if filtered.stopped:
            break
    assert shown + filtered.flush() == stopped_text(text, stops)


def test_text_is_held_back_no_longer_than_needed() -> None:
    filtered = StopFilter(["</end>"])
    assert filtered.feed("a < b") == "a < b"
    assert filtered.feed("</en") == ""
    assert filtered.feed("try") == "</entry"


# Sampling


def test_a_seed_makes_sampling_repeatable(llama: Llama) -> None:
    texts = [
        "".join(llama.generate(PROMPT, max_new_tokens=30, temperature=1.0, top_k=0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_package_decides_whether_sampling_is_the_default(
    package: Path, llama: Llama, tmp_path: Path
) -> None:
    search = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    sampling = Llama.load(alter_package(package, tmp_path / "sampling", search=search))
    greedy = "".join(llama.generate(PROMPT, max_new_tokens=30))
    assert "".join(sampling.generate(PROMPT, max_new_tokens=30, seed=1)) != greedy
    assert "".join(sampling.generate(PROMPT, max_new_tokens=30, temperature=0)) == greedy


# Length


@pytest.mark.parametrize(("prompt", "new", "total"), [(5, 10, 15), (5, 1000, 64), (63, 10, 64)])
def test_the_cache_is_as_long_as_the_answer_can_become(prompt: int, new: int, total: int) -> None:
    assert total_length(prompt, new, 64) == total


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (64, 10, "has 64 tokens, but this model's maximum context length is 64"),
        (0, 10, "prompt is empty"),
        (5, 0, "at least 1, not 0"),
    ],
)
def test_an_answer_without_room_is_refused(prompt: int, new: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        total_length(prompt, new, 64)


def test_genai_is_given_no_more_cache_than_that(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Llama.load(package, engine="genai")
    lengths = []

    class Recorded(og.GeneratorParams):  # type: ignore[misc]
        def set_search_options(self, **options: Any) -> None:
            lengths.append(options["max_length"])
            super().set_search_options(**options)

    monkeypatch.setattr(og, "GeneratorParams", Recorded)
    prompt_tokens = llama.generate(PROMPT, max_new_tokens=7).stats.prompt_tokens
    assert lengths == [prompt_tokens + 7]


def test_an_answer_ends_where_the_context_does(package: Path) -> None:
    llama = Llama.load(package, max_length=20)
    answer = llama.generate(PROMPT, max_new_tokens=1000)
    assert "".join(answer)
    assert answer.stats.prompt_tokens + answer.stats.new_tokens == 20
    assert answer.stats.finish_reason == "length"


def test_a_long_prompt_is_refused_before_anything_runs(llama: Llama) -> None:
    with pytest.raises(
        UsageError, match=r"has 300 tokens, but this model's maximum context length is 256"
    ):
        llama.generate("a" * 300)


def test_max_length_does_not_stretch_the_context(package: Path) -> None:
    assert Llama.load(package, max_length=10_000).context_length == 256
    with pytest.raises(UsageError, match="at least 2 tokens"):
        Llama.load(package, max_length=1)


# Text


def greedy_tokens(package: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by ONNX Runtime alone: the whole text anew for each token, no cache."""
    session = onnxruntime.InferenceSession(package / "model.onnx")
    empty = np.zeros((1, tiny.GQA.num_key_value_heads, 0, tiny.GQA.head_dim), np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values")}
    tokens = list(prompt)
    for _ in range(count):
        ids = np.array([tokens], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
        (logits,) = session.run(["logits"], feeds)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_greedy_answer_is_what_the_graph_says(package_fp32: Path) -> None:
    prompt = Tokenizer.from_file(str(package_fp32 / "tokenizer.json")).encode(PROMPT).ids
    expected = greedy_tokens(package_fp32, prompt, 24)
    assert END not in expected
    answer = Llama.load(package_fp32).generate(PROMPT, max_new_tokens=24)
    assert "".join(answer) == decode(package_fp32, expected)
    assert answer.stats.prompt_tokens == len(prompt)
    assert answer.stats.new_tokens == 24


def test_a_greedy_answer_is_pytorchs_own(package_fp32: Path) -> None:
    """The whole way at once: exporter, genai with its shared cache, and nothing in between."""
    ids = Tokenizer.from_file(str(package_fp32 / "tokenizer.json")).encode(PROMPT).ids
    for _ in range(24):
        ids.append(int(reference(tiny.GQA, np.array([ids]))[0, -1].argmax()))
    answer = Llama.load(package_fp32).generate(PROMPT, max_new_tokens=24)
    assert "".join(answer) == decode(package_fp32, ids[-24:])


def test_a_text_that_is_not_utf_8(llama: Llama) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        llama.encode("a\udcff")


def test_settings_genai_refuses(package: Path, tmp_path: Path) -> None:
    altered = alter_package(package, tmp_path / "altered", search={"top_p": 7.0, "do_sample": True})
    with pytest.raises(PackageError, match="has settings that onnxruntime-genai rejects"):
        "".join(Llama.load(altered, engine="genai").generate(PROMPT, max_new_tokens=2))


def test_an_end_token_ends_the_answer_and_is_not_shown(package_fp32: Path, tmp_path: Path) -> None:
    prompt = Tokenizer.from_file(str(package_fp32 / "tokenizer.json")).encode(PROMPT).ids
    tokens = greedy_tokens(package_fp32, prompt, 24)
    end = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    altered = alter_package(
        package_fp32, tmp_path / "altered", model={"eos_token_id": [END, tokens[end]]}
    )
    answer = Llama.load(altered).generate(PROMPT, max_new_tokens=24)
    assert "".join(answer) == decode(package_fp32, tokens[:end])
    assert answer.stats.finish_reason == "stop"
    assert answer.stats.new_tokens == end + 1


def test_a_stop_string_ends_the_answer_before_it(llama: Llama) -> None:
    whole = "".join(llama.generate(PROMPT, max_new_tokens=40))
    stop = whole[4:7]
    answer = llama.generate(PROMPT, max_new_tokens=40, stop=["never there", stop])
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.stats.finish_reason == "stop"
    assert answer.stats.new_tokens < 40


def test_the_model_answers_again_after_an_answer_was_dropped(llama: Llama) -> None:
    expected = "".join(llama.generate(PROMPT, max_new_tokens=10))
    dropped = llama.generate("the lazy dog", max_new_tokens=10)
    next(dropped)
    dropped.close()
    assert list(dropped) == []
    assert "".join(llama.generate(PROMPT, max_new_tokens=10)) == expected


# Start tokens and chat templates


@pytest.fixture(scope="module")
def with_start(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose tokenizer writes a start token in front of a text, as Llama 2's does."""
    folder = tmp_path_factory.mktemp("start") / "package"
    return alter_package(package, folder, tokenizer={"post_processor": ADD_START})


@pytest.mark.parametrize("text", ["the fox", "Paris. ü日😀", "", "</s>the"])
def test_a_prompt_is_encoded_as_tokenizers_does(package: Path, with_start: Path, text: str) -> None:
    for folder in (package, with_start):
        expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert Llama.load(folder).encode(text).tolist() == expected


def test_a_start_token_is_written_once(with_start: Path) -> None:
    llama = Llama.load(with_start)
    written_by_tokenizer = llama.encode("the fox").tolist()
    written_by_user = llama.encode("<s>the fox").tolist()
    assert written_by_tokenizer == written_by_user
    assert written_by_tokenizer.count(START) == 1 and written_by_tokenizer[0] == START


def test_an_empty_prompt_needs_a_start_token(llama: Llama, with_start: Path) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        llama.generate("")
    assert Llama.load(with_start).generate("").stats.prompt_tokens == 1


@pytest.mark.parametrize("prefix", ["", "{{ bos_token }}", "<s>"])
def test_a_chat_template_decides_about_the_start_token(
    with_start: Path, tmp_path: Path, prefix: str
) -> None:
    folder = alter_package(
        with_start, tmp_path / "package", chat_template=prefix + tiny.CHAT_TEMPLATE
    )
    tokens = Llama.load(folder).encode_chat(HELLO).tolist()
    assert tokens.count(START) == (1 if prefix else 0)
    oracle = AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert tokens == expected


def test_a_conversation_is_put_into_the_template(package: Path, llama: Llama) -> None:
    messages = [
        {"role": "system", "content": "the dog"},
        *HELLO,
        {"role": "assistant", "content": "lazy"},
        {"role": "user", "content": 'ü "日" \n'},
    ]
    text = '<|system|>the dog\n<|user|>the fox\n<|assistant|>lazy\n<|user|>ü "日" \n\n<|assistant|>'
    assert llama.encode_chat(messages).tolist() == llama.encode(text).tolist()
    answer = "".join(llama.chat(messages, max_new_tokens=10))
    assert answer == "".join(llama.generate(text, max_new_tokens=10)) != ""


def test_a_package_without_chat_template_says_so(package: Path, tmp_path: Path) -> None:
    folder = alter_package(package, tmp_path / "base", chat_template="")
    with pytest.raises(UsageError, match="has no chat template"):
        Llama.load(folder).chat(HELLO)


def test_a_chat_template_may_refuse(package: Path, tmp_path: Path) -> None:
    refusal = "{{ raise_exception('roles must alternate') }}"
    folder = alter_package(package, tmp_path / "strict", chat_template=refusal)
    with pytest.raises(UsageError, match=r"rejects the messages: roles must alternate") as caught:
        Llama.load(folder).chat(HELLO)
    assert "\n" not in str(caught.value)


# A SentencePiece tokenizer, whose words begin with their space


SPACE = "▁"
SENTENCEPIECE = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


def test_an_answer_has_no_leading_space_and_a_continuation_keeps_it(
    package: Path, tmp_path: Path
) -> None:
    pieces = ["<unk>", "<s>", "</s>", SPACE, "a", f"{SPACE}a"]
    words = [f"{SPACE}word{n}" for n in range(tiny.GQA.vocab_size - len(pieces))]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {piece: index for index, piece in enumerate(pieces + words)},
        "merges": [[SPACE, "a"]],
    }
    llama = Llama.load(
        alter_package(
            package,
            tmp_path / "sentencepiece",
            tokenizer={**SENTENCEPIECE, "model": model},
            tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
            chat_template="{{ messages[0]['content'] }}",
        )
    )
    continuation = "".join(llama.generate("a a a", max_new_tokens=5))
    answer = "".join(llama.chat([{"role": "user", "content": "a a a"}], max_new_tokens=5))
    assert continuation.startswith(" word")
    assert answer == continuation.removeprefix(" ")


# Statistics


def test_the_statistics_count_every_step() -> None:
    answer = generation("abc.")
    assert "".join(answer) == "abc"
    stats = answer.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish_reason) == (3, 4, "stop")
    assert 0 < stats.prefill_seconds < stats.first_token_seconds
    assert stats.prefill_rate == 3 / stats.prefill_seconds
    assert stats.decode_rate == 3 / stats.decode_seconds


def test_the_first_token_is_timed_apart_and_the_reader_not_at_all() -> None:
    answer = generation("abc", before_step=lambda step: time.sleep((0.2, 0.01, 0.01)[step]))
    for _ in answer:
        time.sleep(0.2)
    assert 0.2 <= answer.stats.first_token_seconds < 0.4
    assert 0.02 <= answer.stats.decode_seconds < 0.2


def test_a_rate_without_tokens_is_none() -> None:
    answer = generation("a")
    assert answer.stats.prefill_rate is None
    assert "".join(answer) == "a"
    assert answer.stats.decode_rate is None
    assert json.loads(json.dumps(answer.stats.to_json()))["decode_rate"] is None


@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [
        ("abc", (), "abc", "length"),
        ("ab.c", (), "ab", "stop"),
        ("abcd", ("bc",), "a", "stop"),
        ("abc", ("cd",), "abc", "length"),
        ("abc.", ("cd",), "abc", "stop"),
        (".", (), "", "stop"),
    ],
)
def test_why_an_answer_ended(text: str, stop: tuple[str, ...], shown: str, reason: str) -> None:
    answer = generation(text, stop=stop)
    assert "".join(answer) == shown
    assert answer.stats.finish_reason == reason


def test_an_answer_that_is_broken_off_is_interrupted() -> None:
    answer = generation("abc", before_step=interrupt_at(2))
    assert [next(answer), next(answer)] == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert answer.stats.finish_reason == "interrupted"
    assert answer.stats.new_tokens == 2


@pytest.mark.parametrize("how", ["exhausted", "closed"])
def test_the_cache_is_freed_with_the_answer_not_with_its_statistics(how: str) -> None:
    generator = FakeGenerator([97, 98])
    alive = weakref.ref(generator)
    answer = Generation(generator, FakeStream(), np.array([1], np.int32), ())
    del generator
    next(answer)
    gc.collect()
    assert alive() is not None
    answer.close() if how == "closed" else list(answer)
    gc.collect()
    assert alive() is None


# Opening


def test_a_model_on_another_device_than_asked_for_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = replace(CPU, device="CUDA")
    monkeypatch.setattr(providers_module, "require", lambda provider, genai: None)
    with pytest.raises(ProviderError, match=r"opened .* on CPU instead of CPUExecutionProvider"):
        open_model(package, elsewhere)


def test_a_provider_that_genai_lacks_is_an_error_not_a_fallback(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers_module, "require", lambda provider, genai: None)
    lacking = replace(WEBGPU, genai_name="no such thing")
    with pytest.raises(
        ProviderError, match=r"on webgpu: Unknown provider name .*; pass --provider"
    ):
        open_model(package, lacking)
    opened = open_model(package, lacking, allow_fallback=True)
    assert (opened.provider, opened.asked) == (CPU, lacking)
    assert opened.fallback is not None and "Unknown provider name" in opened.fallback
    assert opened.to_json()["device"] == "CPU"


def test_a_package_is_opened_on_the_provider_asked_for(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        providers_module, "require", lambda provider, genai: asked.append((provider, genai))
    )
    Llama.load(package, engine="genai")
    assert asked == [(CPU, True)]
    with pytest.raises(ProviderError, match="does not open in onnxruntime-genai on cuda"):
        Llama.load(package, provider=CUDA)
    assert asked[1:] == [(CUDA, True)]


def test_a_graph_that_does_not_open(package: Path, tmp_path: Path) -> None:
    folder = alter_package(package, tmp_path / "broken")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[-1].input[0] = "nothing makes this"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, json.loads((folder / MANIFEST).read_text("utf-8")))
    with pytest.raises(PackageError, match="does not open in onnxruntime-genai"):
        Llama.load(folder, engine="genai")
    with pytest.raises(PackageError, match="onnxruntime refuses"):
        Llama.load(folder)


@pytest.mark.parametrize("error", [RuntimeError("Exception: std::bad_alloc"), MemoryError()])
def test_a_model_that_does_not_fit_into_memory(
    package: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(og, "Model", fail)
    with pytest.raises(ResourceError, match="not enough memory to open"):
        Llama.load(package, engine="genai")


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"context_length": null}}', "[]"])
def test_settings_that_give_no_context_length(package: Path, tmp_path: Path, text: str) -> None:
    folder = alter_package(package, tmp_path / "broken")
    (folder / "genai_config.json").write_text(text, "utf-8")
    write_manifest(folder, json.loads((folder / MANIFEST).read_text("utf-8")))
    with pytest.raises(PackageError, match=r"genai_config\.json (is not|has|sets) "):
        Llama.load(folder)


def test_the_number_of_threads_is_what_was_asked_for(package: Path) -> None:
    process = psutil.Process()
    models, started = [], []
    for threads in (1, 3):
        before = process.num_threads()
        models.append(open_model(package, CPU, threads=threads))
        started.append(process.num_threads() - before)
    # The thread that calls is one of them.
    assert started == [0, 2]
    with pytest.raises(UsageError, match=r"must be 1 to \d+, not 0"):
        open_model(package, CPU, threads=0)


def test_usage_reports_are_off_unless_somebody_turns_them_on() -> None:
    code = "import os, llama_onnx.runtime.genai; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    unset = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    for environment, expected in ((unset, "1"), (unset | {"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": "8"}, "at least 2 tokens, not '8'"),
        ({"max_length": 2.5}, r"at least 2 tokens, not 2\.5"),
        ({"threads": "2"}, r"must be 1 to \d+, not '2'"),
        ({"threads": True}, r"must be 1 to \d+, not True"),
        ({"provider": 5}, "no provider 5"),
        ({"provider": ["cpu"]}, r"no provider \['cpu'\]"),
    ],
)
def test_options_of_load_of_the_wrong_type(package: Path, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Llama.load(package, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": None}, r"sampling must be a Sampling, .* not None\.$"),
        ({"sampling": {"top_k": 5}}, "sampling must be a Sampling"),
        ({"stop": {"a": 1}}, "stop must be a text or a list of texts"),
    ],
)
def test_options_of_an_answer_of_the_wrong_type(llama: Llama, options: Any, said: str) -> None:
    for start in (
        llama.generate,
        lambda text, **o: llama.chat([{"role": "user", "content": text}], **o),
    ):
        with pytest.raises(UsageError, match=said):
            start("the fox", **options)


def test_a_path_that_no_system_takes() -> None:
    with pytest.raises(PackageError, match=r"cannot be opened: .*[^.]\.$"):
        Llama.load("x" * 5000)
