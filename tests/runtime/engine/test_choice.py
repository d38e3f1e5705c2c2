"""What a caller asks for and what a package decides, and the values that come of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.runtime.engine.sampling.choice import Choice, read_search, resolve
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.errors import PackageError, UsageError

PACKAGE = {
    "do_sample": False,
    "max_length": 256,
    "repetition_penalty": 1.5,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.9,
}
SAMPLES = {**PACKAGE, "do_sample": True}


@pytest.mark.parametrize(
    ("asked", "package", "expected"),
    [
        ({}, {}, {"temperature": 0.0}),
        ({}, PACKAGE, {"temperature": 0.0, "repetition_penalty": 1.5}),
        ({}, SAMPLES, {"temperature": 0.6, "top_k": 50, "top_p": 0.9}),
        ({"temperature": 0}, SAMPLES, {"temperature": 0.0}),
        ({"temperature": 0, "top_k": 5}, SAMPLES, {"temperature": 0.0}),
        ({"temperature": 2}, PACKAGE, {"temperature": 2.0, "top_k": 50, "top_p": 0.9}),
        ({"top_k": 0}, PACKAGE, {"temperature": 0.6, "top_k": 0}),
        ({"top_p": 1.0}, PACKAGE, {"temperature": 0.6, "top_p": 1.0}),
        ({"min_p": 0.1}, {}, {"temperature": 1.0, "min_p": 0.1, "top_k": 0}),
        ({"repetition_penalty": 1.0}, PACKAGE, {"temperature": 0.0, "repetition_penalty": 1.0}),
        ({"presence_penalty": 1, "logprobs": 0}, {}, {"temperature": 0.0, "logprobs": 0}),
        ({"logit_bias": {"9": 1}}, {}, {"logit_bias": ((9, 1.0),)}),
        ({}, {"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"seed": 2**64 - 1}, {}, {"seed": 2**64 - 1}),
    ],
)
def test_the_caller_decides_before_the_package(
    asked: dict[str, Any], package: dict[str, Any], expected: dict[str, Any]
) -> None:
    choice = resolve(Sampling(**asked), package, vocab_size=10)
    assert {name: getattr(choice, name) for name in expected} == expected


def test_without_anything_it_is_greedy_and_nothing_else() -> None:
    assert resolve(Sampling(seed=0), vocab_size=10) == Choice()


@pytest.mark.parametrize("seed", [None, -1])
def test_a_random_seed_is_another_one_each_time(seed: int | None) -> None:
    seeds = {resolve(Sampling(seed=seed), vocab_size=10).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= found < 2**64 for found in seeds)


def test_a_bias_of_a_token_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="names the token 1,000, but the model has 1,000"):
        resolve(Sampling(logit_bias={999: 1, 1000: 1}), vocab_size=1000)


# The package


def test_a_real_package(llama: Llama, package: Path) -> None:
    assert read_search(package) == {
        "do_sample": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    choice = resolve(Sampling(temperature=0.5, seed=1), read_search(package), vocab_size=288)
    assert choice == Choice(temperature=0.5, top_k=50, seed=1)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"temperature": -1}, "genai_config.json sets temperature to -1, which is not a number"),
        ({"top_p": "1"}, "genai_config.json sets top_p to '1', which is not a number from 0"),
        ({"do_sample": 1}, "genai_config.json sets do_sample to 1, which is not true or false"),
        ([], "is damaged: it has no search settings"),
        (None, "is damaged: it has no search settings"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, search: Any, said: str) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"search": search}))
    with pytest.raises(PackageError, match=said):
        read_search(tmp_path)


def test_an_absent_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="genai_config"):
        read_search(tmp_path)
