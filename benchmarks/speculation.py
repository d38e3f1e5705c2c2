"""Decode speed with and without drafts, on text that repeats and text that does not.

    python benchmarks/speculation.py PACKAGE [--draft SMALLER] [--rounds 7]

Each round opens the package anew, so that nothing is learned from the one before, and answers each
text with and without drafts, in an order that alternates. Needs a package of a chat model with
ChatML, such as SmolLM2. Where a greedy answer with drafts parts from the one without, the distance
of the two logits is printed: at accuracy level 4 it is a near-tie. `--processor-time` counts the
time of this process instead of the clock's, for a machine that others use: with `--threads 1`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality.processor import processor
from llama_onnx.runtime.engine.drafting import Speculation
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.events import Request, TokenEvent
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.sampler import Sampler
from llama_onnx.targets.package import ModelPackage

LIST = """1. red lamp from Kent
2. blue chair from Norway
3. green bicycle from Lisbon
4. small piano from Quito
5. large ladder from Osaka
6. wooden basket from Malta
7. silver kettle from Turin
8. heavy mirror from Perth
9. round carpet from Cairo
10. old window from Delhi
11. narrow bottle from Bergen
12. quiet drum from Lima
"""
CODE = """def total_price(items, tax):
    total = 0
    for item in items:
        price = item["price"] * item["count"]
        total = total + price
    return total * (1 + tax)


def print_receipt(items, tax):
    for item in items:
        print(item["name"], item["count"], item["price"])
    print("Total:", total_price(items, tax))
"""
DOCUMENT = (
    "The harbour of Aldmouth was built in 1784 by the engineer Thomas Hale. Its outer wall is 900 "
    "metres long and made of granite from the quarries of Penrick. In 1856 a storm destroyed the "
    "northern lighthouse, which was never rebuilt. Today the harbour is used by forty fishing "
    "boats and by the ferry to the island of Sark."
)


@dataclass(frozen=True)
class Case:
    """A prompt, and the temperature of its answer."""

    prompt: str
    temperature: float = 0.0


def chat(question: str, start: str = "") -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{start}"


REPEATS = {
    "copy a list": Case(chat(f"Copy this list:\n{LIST}", "Here is the list:\n1. red lamp")),
    "edit code": Case(
        chat(f"Add a docstring to this code and print it all:\n```python\n{CODE}```", "```python\n")
    ),
    "quote a document": Case(
        chat(f"Repeat this text word for word:\n{DOCUMENT}", "The harbour of Aldmouth was")
    ),
}
OTHERS = {
    "a story, sampled": Case("The old captain opened the letter and", 1.0),
    "an essay, sampled": Case(chat("Write an essay about the history of bread."), 1.0),
    "names, sampled": Case("A list of forty unusual names for a cat: Pixel,", 1.3),
}


@dataclass
class Chooser:
    """The engine's sampler, which keeps the logits of a greedy answer, and when it was asked."""

    sampler: Sampler
    greedy: bool
    seen: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def choose(self, logits: Any) -> Any:
        self.times.append(time.process_time())
        if self.greedy:
            self.seen.append(logits.astype(np.float16))
        return self.sampler.choose(logits)


@dataclass(frozen=True)
class Answer:
    """What an answer said and took."""

    tokens: list[int]
    seconds: float
    drafted: int
    accepted: int
    seen: list[Any]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.tokens) - 1) / self.seconds


def answer(
    engine: Engine, tokenizer: Tokenizer, case: Case, count: int, drafts: bool, cpu: bool = False
) -> Answer:
    prompt = np.array(tokenizer.encode(case.prompt).ids)
    choice = Choice(temperature=case.temperature, top_p=0.98, seed=7)
    sampler = Sampler(choice, prompt.tolist(), engine.layout.vocab_size)
    chooser = Chooser(sampler, case.temperature == 0)
    ends = {tokenizer.token_to_id("<|im_end|>")} if case.temperature == 0 else set()
    request = Request(prompt, count, chooser, end_tokens=ends, reuse=False, speculate=drafts)
    events = [event for event in engine.submit(request) if isinstance(event, TokenEvent)]
    return Answer(
        [event.token for event in events],
        chooser.times[-1] - chooser.times[0] if cpu else sum(e.seconds for e in events[1:]),
        sum(event.drafted for event in events),
        sum(event.accepted for event in events),
        chooser.seen,
    )


def difference(plain: Answer, drafted: Answer) -> str:
    """Return where two answers part, and how far apart the two tokens are for the one without."""
    pairs = enumerate(zip(plain.tokens, drafted.tokens, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), None)
    if place is None:
        return "same"
    if not plain.seen:
        return f"parts at {place}"
    logits = plain.seen[place].astype(np.float32)
    gap = logits[plain.tokens[place]] - logits[drafted.tokens[place]]
    return f"parts at {place}: {gap / logits.std():.3f} standard deviations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--draft", type=Path, help="a smaller package with the same tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.package / "tokenizer.json"))
    draft = ModelPackage.open(arguments.draft) if arguments.draft else None
    cases = {**REPEATS, **OTHERS}
    found: dict[str, list[tuple[Answer, Answer]]] = {name: [] for name in cases}
    for number in range(arguments.rounds):
        package, context = ModelPackage.open(arguments.package), 2048
        speculation = Speculation("ngram", draft, context)
        with Engine(package, context, threads=arguments.threads, speculation=speculation) as engine:
            answer(engine, tokenizer, OTHERS["a story, sampled"], 16, drafts=False)
            for name, case in cases.items():
                order = (False, True) if number % 2 else (True, False)
                results = {
                    drafts: answer(
                        engine, tokenizer, case, arguments.new, drafts, arguments.processor_time
                    )
                    for drafts in order
                }
                found[name].append((results[False], results[True]))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print(f"{processor()}, {platform.system()}, {arguments.threads} threads")
    print(f"{arguments.package.name}, draft {arguments.draft.name if draft else 'the text itself'}")
    clock = "processor time" if arguments.processor_time else "wall clock"
    print(
        f"medians of {arguments.rounds} rounds, tokens a second by {clock}; ratios within a round"
    )
    columns = f"{'':20} {'tokens':>6} {'plain':>7} {'drafts':>7} {'ratio':>6} {'range':>12}"
    print(f"{columns} {'accepted':>12}  text")
    for name, pairs in found.items():
        ratios = [drafted.rate / plain.rate for plain, drafted in pairs]
        plain = statistics.median(one.rate for one, _ in pairs)
        rate = statistics.median(other.rate for _, other in pairs)
        accepted = sum(other.accepted for _, other in pairs)
        drafted = sum(other.drafted for _, other in pairs)
        texts = sorted({difference(*pair) for pair in pairs})
        print(
            f"{name:20} {len(pairs[0][0].tokens):6} {plain:7.1f} {rate:7.1f} "
            f"{statistics.median(ratios):6.2f} {min(ratios):5.2f}-{max(ratios):5.2f}  "
            f"{accepted:5}/{drafted:5}  {'; '.join(texts)}"
        )


if __name__ == "__main__":
    main()
