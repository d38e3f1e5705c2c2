"""Values that decide about the next token: one reading, whichever way they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.sampling.parameters import (
    PARAMETERS,
    RULES,
    Sampling,
    fold_seed,
    genai_values,
    read_value,
)
from llama_onnx.runtime.genai import og
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.requests.call import completion_call
from llama_onnx.runtime.serving.requests.schemas import FieldError
from llama_onnx.targets.errors import CheckpointError, UsageError
from llama_onnx.targets.registry import get_target
from tests.support import tiny

PROMPT = "the quick brown fox"
VOCABULARY = 288
NAN, INF = float("nan"), float("inf")
MIN_P = {"do_sample": True}
SERVED = PARAMETERS.keys() - {"logprobs", "no_repeat_ngram_size", "do_sample"}
"""What a request to a server may set by the same name."""

READ: list[tuple[str, Any, Any]] = [
    ("temperature", 0, 0.0),
    ("temperature", 1e-320, 0.0),
    ("temperature", 9e-7, 0.0),
    ("temperature", 1e-6, 1e-6),
    ("temperature", 2, 2.0),
    ("temperature", np.float32(0.5), 0.5),
    ("temperature", 10**6, 1e6),
    ("top_k", -1, 0),
    ("top_k", -(10**30), 0),
    ("top_k", 0, 0),
    ("top_k", np.int64(7), 7),
    ("top_k", 10**30, 10**30),
    ("top_p", 0, 0.0),
    ("top_p", 1, 1.0),
    ("top_p", 1e-320, 1e-320),
    ("seed", -1, -1),
    ("seed", 0, 0),
    ("seed", 2**64 - 1, 2**64 - 1),
    ("max_new_tokens", 1, 1),
    ("max_new_tokens", 10**30, 10**30),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("repetition_penalty", 1, 1.0),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("logit_bias", {}, ()),
    ("logit_bias", {"7": 1, "5": -100}, ((5, -100.0), (7, 1.0))),
    ("logit_bias", {np.int32(3): 0.5}, ((3, 0.5),)),
    ("logit_bias", [(3, 0.5)], ((3, 0.5),)),
    ("logprobs", 0, 0),
    ("logprobs", 20, 20),
    ("no_repeat_ngram_size", 3, 3),
    ("do_sample", False, False),
]
REFUSED: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (-1.0, -1e-320, NAN, INF, 1e300, 10**400, "1", True)),
    *(("top_k", value) for value in (1.0, "5", True, NAN, [1], 0.5)),
    *(("top_p", value) for value in (-0.1, 1.000001, NAN, INF, 10**400, "1", True)),
    *(("seed", value) for value in (-2, 2**64, 1.0, True, "1", 10**4000)),
    *(("max_new_tokens", value) for value in (0, -1, -(10**30), 3.0, "3.0", True, NAN)),
    *(("repetition_penalty", value) for value in (0, -1, 1e-320, INF, NAN, 1e300, 10**400, "1")),
    *(("min_p", value) for value in (-0.1, 1.000001, NAN, "1", True)),
    *(("presence_penalty", value) for value in (-2.01, 2.01, NAN, "1", True)),
    *(("frequency_penalty", value) for value in (-2.01, 2.01, INF, "1", True)),
    *(("logprobs", value) for value in (-1, 21, 1.0, True, "5")),
    *(("logit_bias", value) for value in (5, "5", True, {"5": "1"}, {"5": 100.1}, {"5": NAN})),
    *(("logit_bias", value) for value in ({"-1": 1}, {"a": 1}, {2**31: 1}, {True: 1}, {"٣": 1})),
    *(("logit_bias", value) for value in ([5], [(5, 1), ("5", 2)], {"9" * 5000: 1})),
    ("logit_bias", dict.fromkeys(range(1025), 1)),
    *(("no_repeat_ngram_size", value) for value in (-1, 2**31, 1.0, True)),
    *(("do_sample", value) for value in (1, 0, "true")),
]


@pytest.mark.parametrize(("name", "value", "expected"), READ)
def test_a_value_that_means_something(name: str, value: Any, expected: Any) -> None:
    read = read_value(name, value)
    assert read == expected and type(read) is type(expected)


def test_a_number_that_python_cannot_write_is_refused_too() -> None:
    with pytest.raises(UsageError, match="not a number of 5,001 digits"):
        read_value("seed", 10**5000)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_that_means_nothing_is_refused_by_the_callers_name(name: str, value: Any) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=rf"^{flag} must be .*, not .*\.$") as caught:
        read_value(name, value, flag)
    assert len(str(caught.value)) < 250
    if name in PARAMETERS:
        with pytest.raises(UsageError, match=rf"^{name} must be"):
            Sampling(**{name: value})
    if name in SERVED:
        with pytest.raises(FieldError, match=rf"^{name} must be") as refused:
            completion_call({"model": "tiny", "prompt": "a", name: value})
        assert refused.value.param == name


@given(st.sampled_from(sorted(RULES)), st.none() | st.integers() | st.floats() | st.text())
def test_anything_is_read_or_refused(name: str, value: Any) -> None:
    try:
        read = read_value(name, value)
    except UsageError:
        return
    assert read_value(name, read) == read


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"seed": 3}, {"random_seed": 3}),
        ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}),
        ({"top_k": 5, "seed": 0}, {"top_k": 5, "random_seed": 0, "do_sample": True}),
        ({"top_k": -1}, {"top_k": 0, "do_sample": True}),
        ({"top_k": VOCABULARY - 1}, {"top_k": VOCABULARY - 1, "do_sample": True}),
        ({"top_k": VOCABULARY}, {"top_k": 0, "do_sample": True}),
        ({"top_p": 0.9}, {"top_p": 0.9, "do_sample": True}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1, "do_sample": True}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 1e-320}, {"do_sample": False}),
        ({"temperature": 0.0, "top_k": 5}, {"top_k": 5, "do_sample": False}),
        ({"seed": 2**32 - 1}, {"random_seed": 2**31 - 2}),
        ({"seed": -1}, {"random_seed": -1}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "min_p": 0}, MIN_P),
    ],
)
def test_asking_for_sampling_turns_it_on(asked: dict[str, Any], options: dict[str, Any]) -> None:
    assert Sampling(**asked).search_options(VOCABULARY) == options


BEYOND_GENAI: dict[str, Any] = {
    "min_p": 0.1,
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "logit_bias": {3: 1.0},
    "logprobs": 0,
}


@pytest.mark.parametrize("name", BEYOND_GENAI)
def test_what_genai_cannot_do_is_refused_by_name(package: Path, name: str) -> None:
    """onnxruntime-genai would refuse the name, and in another release do something else by it."""
    llama = Llama.load(package, engine="genai")
    sampling = Sampling(**{name: BEYOND_GENAI[name]})
    with pytest.raises(UsageError, match=f"has no {name}: leave it out"):
        llama.generate(PROMPT, sampling=sampling)


def test_genai_itself_has_what_it_is_given_and_not_the_rest(llama: Llama) -> None:
    params = og.GeneratorParams(og.Model(str(llama.package.path)))
    for name, known in PARAMETERS.items():
        value = 0 if name == "logprobs" else 1
        if name in ("seed", "logit_bias"):
            continue
        if known["genai"]:
            params.set_search_options(**{name: value})
        else:
            with pytest.raises(RuntimeError, match=name):
                params.set_search_options(**{name: value})


def test_a_repetition_penalty_reaches_genai(llama: Llama) -> None:
    def answer(**options: Any) -> str:
        sampling = Sampling(**options)
        return "".join(llama.generate(PROMPT, max_new_tokens=30, sampling=sampling))

    assert answer(repetition_penalty=1.0) == answer() != answer(repetition_penalty=5.0)


def test_sampling_as_json_is_read_back() -> None:
    sampling = Sampling(logit_bias={7: -1.5, 3: 2}, logprobs=3, min_p=0.1, temperature=0.5)
    written = json.loads(json.dumps(sampling.to_json()))
    assert written["logit_bias"] == {"3": 2.0, "7": -1.5}
    assert Sampling(**written) == sampling and hash(Sampling(**written)) == hash(sampling)


@given(st.integers(0, 2**64 - 1))
def test_every_seed_is_one_of_genais(seed: int) -> None:
    folded = fold_seed(seed)
    assert 0 <= folded < 2**31
    assert folded == seed or seed >= 2**31
    assert fold_seed(seed ^ (1 << 63)) != folded  # the highest bit counts too


def test_the_extremes_mean_what_they_do_in_transformers(llama: Llama) -> None:
    scores = torch.tensor(np.random.default_rng(0).standard_normal((1, VOCABULARY)))
    everything = TopKLogitsWarper(10**6)(torch.zeros((1, 0)), scores)
    assert torch.isfinite(everything).all()
    likeliest = TopPLogitsWarper(0.0)(torch.zeros((1, 0)), scores)
    assert torch.isfinite(likeliest).nonzero()[:, 1].tolist() == [int(scores.argmax())]

    def answer(**options: Any) -> str:
        return "".join(llama.generate(PROMPT, max_new_tokens=20, **options))

    assert answer(top_k=10**6, seed=1) == answer(top_k=0, seed=1) != answer(top_k=0, seed=2)
    assert answer(top_p=0, seed=1) == answer(top_p=1e-320) == answer(temperature=1e-320) == answer()
    assert answer(temperature=1e-6, seed=1) == answer()


def test_every_value_that_is_read_is_one_that_genai_takes(llama: Llama) -> None:
    extremes: dict[str, tuple[Any, ...]] = {
        "temperature": (1e-6, 1e6),
        "top_k": (-1, 1, VOCABULARY - 1, VOCABULARY, 10**30),
        "top_p": (0, 1e-320, 1e-6, 1e-5, 1),
        "seed": (-1, 0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1),
        "max_new_tokens": (1, 2**31, 2**63, 10**30),
    }
    for name, values in extremes.items():
        for value in values:
            options = {"max_new_tokens": 3, "temperature": 1.0, name: value}
            answer = llama.generate(PROMPT, **options)
            list(answer)
            assert answer.stats.new_tokens >= 1


def test_a_large_seed_is_repeatable(llama: Llama) -> None:
    texts = [
        "".join(llama.generate(PROMPT, max_new_tokens=20, temperature=1.0, top_k=0, seed=seed))
        for seed in (2**64 - 1, 2**64 - 1, 2**63)
    ]
    assert texts[0] == texts[1] != texts[2]


# The command line


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--top-p", "2"), "--top-p must be a number from 0 to 1 (off), not 2.0."),
        (("--top-p", "nan"), "--top-p must be a number from 0 to 1 (off), not nan."),
        (("--temperature", "inf"), "--temperature must be a number from 0 (greedy)"),
        (("--temperature", "-1"), "--temperature must be a number from 0 (greedy)"),
        (("--temperature", "9" * 400), "--temperature must be a number from 0 (greedy)"),
        (("--temperature", "1", "--seed", "-2"), "--seed must be a whole number from 0 to 2^64"),
        (("--seed", str(2**64)), "--seed must be a whole number from 0 to 2^64"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be a whole number of at least 1"),
        (("--stop", ""), "--stop must hold texts that are not empty"),
        (("--seed", "9" * 5000), "--seed"),
        (("--top-k", "3.0"), "--top-k"),
        (("--min-p", "0.1"), "has no --min-p: leave it out, or choose"),
        (
            ("--presence-penalty", "1", "--min-p", "0.1"),
            "has no --min-p and no --presence-penalty: leave them out",
        ),
        (("--presence-penalty", "3"), "--presence-penalty must be a number from -2 to 2"),
        (("--frequency-penalty", "1"), "has no --frequency-penalty: leave it out, or choose"),
        (
            ("--logit-bias", "3=5", "--logit-bias", "4=-5"),
            "has no --logit-bias: leave it out, or choose",
        ),
        (("--logit-bias", "3"), "--logit-bias must be a token id, = and a number, such as 15=-100"),
        (("--logit-bias", "3=x"), "must be a token id, = and a number, such as 15=-100, not '3=x'"),
        (("--logit-bias", "x=3"), "--logit-bias must be at most 1,024 token ids"),
        (("--repetition-penalty", "0"), "--repetition-penalty must be a number from 0.000001"),
        (("--temperature", "0", "--top-k", "5"), "is greedy: leave out --top-k, which would have"),
    ],
)
def test_the_command_line_refuses_by_the_options_name(
    package: Path, options: tuple[str, ...], said: str
) -> None:
    result = run("generate", package, PROMPT, "--engine", "genai", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "genai_config" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--top-k", "1000000"),
        ("--top-k", "-1"),
        ("--seed", "4294967295", "--temperature", "1"),
        ("--seed", "18446744073709551615", "--temperature", "1"),
        ("--temperature", "1e-320"),
        ("--top-p", "0"),
        ("--max-new-tokens", "999999999999"),
        ("--repetition-penalty", "1.2"),
        ("--repetition-penalty", "1.2", "--temperature", "0", "--presence-penalty", "0"),
    ],
)
def test_the_command_line_takes_what_others_take(package: Path, options: tuple[str, ...]) -> None:
    result = run("generate", package, PROMPT, "--max-new-tokens", "4", *options)
    assert result.exit_code == 0
    assert "prompt 11 tokens" in result.stderr and " · answer 0 tokens" not in result.stderr


# generation_config.json


def export(folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
    source = tiny.write_huggingface(folder / "source")
    (source / "generation_config.json").write_text(json.dumps(generation))
    out = folder / "out"
    options = Options("int4", quantizer="rtn")
    package = export_package(source, out, get_target("cpu"), options).package
    search: dict[str, Any] = json.loads((package / "genai_config.json").read_text())["search"]
    return search


@pytest.mark.parametrize(
    ("generation", "search"),
    [
        ({"do_sample": True, "top_k": -1}, {"do_sample": True, "top_k": 0}),
        ({"do_sample": True, "top_k": 10**6}, {"do_sample": True, "top_k": 0}),
        ({"do_sample": True, "top_p": 0}, {"do_sample": True, "top_k": 1, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False, "temperature": 1.0}),
        ({"do_sample": True, "temperature": 1e-320}, {"do_sample": False, "temperature": 1.0}),
    ],
)
def test_a_models_own_values_are_read_alike(
    tmp_path: Path, generation: dict[str, Any], search: dict[str, Any]
) -> None:
    written = export(tmp_path, generation)
    assert {name: written[name] for name in search} == search
    model = Llama.load(tmp_path / "out")
    answer = model.generate(PROMPT, max_new_tokens=4)
    for _ in answer:
        pass
    assert answer.stats.new_tokens >= 1  # the text of a random model's tokens may be empty


@pytest.mark.parametrize(
    "generation",
    [{"repetition_penalty": 0}, {"top_k": 0.5}, {"temperature": -1}, {"top_p": "1"}],
)
def test_a_models_own_value_that_means_nothing_is_refused_by_name(
    tmp_path: Path, generation: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=f"json sets {next(iter(generation))} to .*: correct"):
        export(tmp_path, generation)


def test_a_vocabulary_of_fewer_tokens_than_the_default_top_k() -> None:
    assert genai_values({"top_k": 50}, 32) == {"top_k": 0}
    assert genai_values({"top_k": 50}, 51) == {"top_k": 50}
