"""Greedy tokens in onnxruntime-genai's own loop, on DirectML and on the CPU of the same DLLs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.trials.directml.place import DEVICE, PRECISIONS, Loop, Place
from tests.support.packages import renew_hashes
from tests.support.tables import Case

NEW_TOKENS = 32
TEXTS = ("The capital of France is", "Name three colors.", "One, two, three, four, five,")
CAPTURE = '"enable_graph_capture": "0"'
"""What turns graph capture off in genai_config.json."""
TURNS = [[1, 40, 41, 42, 43, 44, 45], [1, 90, 91, 92, 93, 94], [140, 141, 142, 143, 144]]


def token_cases(place: Place) -> Iterator[Case]:
    """Greedy tokens in genai's loop with graph capture off and on, against the same DLLs' CPU."""
    for name in place.packages:
        prompts = turns(place, name)[: 2 if name in PRECISIONS else 1]
        job: dict[str, Any] = {"turns": prompts, "count": NEW_TOKENS, "how": "new"}
        expected = place.genai(name, "cpu", **job)
        for capture, said in (("0", "off"), ("1", "on")):
            found = place.genai(name, "dml", capture, **job)
            yield compare(f"{name} | {said}", found, expected, NEW_TOKENS)
            if (name, capture) == ("int4", "1"):
                package = copy_with(place, name, CAPTURE, CAPTURE.replace("0", capture))
                found = place.genai_on(package, None, capture, **job)
                yield compare(f"{name} | on, by genai_config.json", found, expected, NEW_TOKENS)


def copy_with(place: Place, name: str, before: str, after: str) -> Path:
    """Copy a package, with `after` instead of `before` in its genai_config.json."""
    folder = place.root.work / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.packages[name], folder)
    config = folder / "genai_config.json"
    text = config.read_text("utf-8")
    if text.count(before) != 1:
        sys.exit(f"{config} does not have {before} once.")
    config.write_text(text.replace(before, after), "utf-8")
    return folder


def turns(place: Place, name: str) -> list[list[int]]:
    """Return three prompts, or turns of a conversation, as token ids."""
    if name in PRECISIONS:
        return TURNS
    tokenizer = Tokenizer.from_file(str(place.packages[name] / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def compare(what: str, found: Loop, expected: Loop, count: int) -> Case:
    """Compare tokens in answers of `count`. Where they first part, the CPU's two tokens must be
    closer than twice the largest difference seen between the logits."""
    if found.device != DEVICE:
        return Case(what, False, found.error or f"ran on {found.device}")
    equal, ties, worst = 0, [], 0.0
    for start in range(0, len(expected.ids), count):
        for step in range(start, start + count):
            mine, its = found.logits[step], expected.logits[step]
            worst = max(worst, float(np.abs(mine - its).max()))
            if found.ids[step] != expected.ids[step]:
                ties.append((step - start, float(its[expected.ids[step]] - its[found.ids[step]])))
                break
            equal += 1
    spread = float(expected.logits.std())
    said = f"{equal} of {len(expected.ids)}; logits differ by {worst:.2g} at most, at a standard "
    said += f"deviation of {spread:.2g}"
    for place, gap in ties:
        said += f"; a near-tie at token {place + 1}: the CPU's two are {gap:.2g} apart"
    return Case(what, all(gap <= 2 * worst for _, gap in ties) and worst < spread / 2, said)


def conversation_cases(place: Place) -> Iterator[Case]:
    """Three turns: each answered after the whole conversation, as our commands do; and appended."""
    count = 8
    for name in place.packages:
        spoken = turns(place, name)
        expected = place.genai(name, "cpu", turns=spoken, count=count, how="whole")
        history, prompts = list[int](), []
        for number, turn in enumerate(spoken):
            history += turn
            prompts.append(list(history))
            history += expected.ids[count * number : count * (number + 1)]
        found = place.genai(name, "dml", turns=prompts, count=count, how="new")
        how = "the whole conversation for each answer, as our commands do"
        yield compare(f"{name} | {how}", found, expected, count)
    for name in list(place.packages)[len(PRECISIONS) - 1 :]:
        found = place.genai(name, "dml", turns=turns(place, name), count=count, how="append")
        refused = "Continuous decoding is not supported" in found.error
        said = f"onnxruntime-genai refuses it: {found.error}" if refused else "it did not refuse"
        yield Case(f"{name} | the next turn appended to the cache", refused, said)
    job: dict[str, Any] = {"turns": TURNS[:1] * 3, "count": count, "how": "rewind"}
    expected = place.genai("int4", "cpu", **job)
    what = "int4 | the same turn three times, the cache rewound to its end, then to nothing"
    yield compare(what, place.genai("int4", "dml", **job), expected, count)
    yield from _chunks(place, replace(expected, ids=expected.ids[:count]))


def _chunks(place: Place, expected: Loop) -> Iterator[Case]:
    """A prompt read in parts, which the attention takes for prompts: wrong, or refused."""
    count = len(expected.ids)
    found = place.genai("int4", "dml", chunk=4, turns=TURNS[:1], count=count, how="new")
    wrong = not found.error and not compare("", found, expected, count).holds
    said = "**wrong**, without an error" if wrong else found.error or "right"
    what = "int4 | a turn in parts, by onnxruntime-genai's own option `chunk_size`"
    yield Case(what, wrong, said)
    package = copy_with(place, "int4", '"search": {', '"search": {"chunk_size": 4, ')
    renew_hashes(package)  # or it would be refused for its size
    arguments = (place.root.windows_path(package), "the", "--provider", "directml")
    answer = place.ours("generate", *arguments).get("error", "it was not refused")
    refused = "chunk_size" in answer
    yield Case("int4 | `chunk_size` in genai_config.json, our commands", refused, answer)
