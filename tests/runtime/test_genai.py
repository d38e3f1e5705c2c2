"""The package in onnxruntime-genai itself, unchanged: batches and speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_onnx.runtime.genai import og
from tests.support import tiny
from tests.support.pytorch import reference

NEW = 20
REPEATING = list(range(20, 30)) * 4  # something for n-grams to find


@pytest.fixture(scope="module")
def model(package_fp32: Path) -> Any:
    return og.Model(str(package_fp32))


def greedy(model: Any, prompts: list[list[int]], **speculative: int) -> list[list[int]]:
    """The first NEW tokens behind each prompt; end tokens are not allowed to end it."""
    params = og.GeneratorParams(model)
    length = max(map(len, prompts)) + NEW
    params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
    if speculative:
        params.set_speculative_options(**speculative)
    generator = og.Generator(model, params)
    pad = 2
    width = max(map(len, prompts))
    generator.append_tokens(np.array([p + [pad] * (width - len(p)) for p in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [
        generator.get_sequence(row).tolist()[width : width + NEW] for row in range(len(prompts))
    ]


def expected(prompt: list[int]) -> list[int]:
    """What PyTorch chooses, end tokens left out as genai's min_length leaves them out."""
    ids = list(prompt)
    for _ in range(NEW):
        logits = reference(tiny.GQA, np.array([ids]))[0, -1].copy()
        logits[list(tiny.GQA.eos_token_ids)] = -np.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_a_prompt_alone(model: Any) -> None:
    assert greedy(model, [REPEATING]) == [expected(REPEATING)]


def test_prompts_of_different_lengths_in_one_batch(model: Any) -> None:
    """genai pads on the right; each row is as if it were alone."""
    prompts = [REPEATING, [31, 32, 33, 34, 35], [40]]
    assert greedy(model, prompts) == [expected(prompt) for prompt in prompts]


def test_n_gram_speculation_changes_nothing(model: Any) -> None:
    found = greedy(model, [REPEATING], ngram_size=2, max_draft_tokens=4)
    assert found == [expected(REPEATING)]
