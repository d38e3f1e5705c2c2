"""A server under load: rates at several clients, and a soak with clients that vanish.

    python benchmarks/serving.py rates PACKAGE [--openvino PYTHON MODEL]
    python benchmarks/serving.py replicas PACKAGE
    python benchmarks/serving.py soak PACKAGE --minutes 10

`rates` asks for answers to 1, 4 and 8 clients at once, ours over HTTP and peers' in turns (see
serving_peer.py), and prints the median of the tokens that all clients together got a second.
`replicas` asks one process with all threads, and as many replicas with one thread each, in turns.
`soak` keeps 16 clients at work for a while, whose prompts and answers differ in length, and a
quarter of whom leave in the middle; it prints latencies, errors, and the server's memory at the
start and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import openai
import psutil
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality.processor import processor
from tests.support.real_server import serving

WORDS = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()
NAME = "model"
NEW_TOKENS = 96
ROUNDS = 5
Prompts = Sequence[Sequence[int]]
CLIENTS = (1, 4, 8)


def question(words: int, number: int) -> str:
    """Return a prompt that no other begins like, so that nothing of it is known."""
    start = number * 37 % 1000
    return f"{number}. Summarize this text: " + " ".join(WORDS[start : start + words])


async def ask(client: openai.AsyncOpenAI, ids: Sequence[int]) -> int:
    """Get one answer, which no end token ends, and return its length."""
    answer = await client.completions.create(
        model=NAME,
        prompt=list(ids),
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
        timeout=600,
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


async def rate(url: str, prompts: Prompts) -> float:
    """Return the tokens a second that the clients got together."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(*(ask(client, ids) for ids in prompts))
        return sum(counts) / (time.perf_counter() - started)


@contextmanager
def peer(command: Sequence[str]) -> Iterator[Callable[[Prompts], float]]:
    """Start a peer, and return what gives its rate for some prompts."""
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(list(command), encoding="utf-8", **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        into, out = process.stdin, process.stdout
        while (line := out.readline()).strip() != "ready":
            assert line, f"{command} ended"

        def measure(prompts: Prompts) -> float:
            into.write(json.dumps(list(prompts)) + "\n")
            into.flush()
            return float(out.readline())

        yield measure
        into.close()


def rates(package: Path, openvino: Sequence[str], threads: int) -> None:
    """Print a table of rates, ours and the peers' in turns."""
    script = str(Path(__file__).with_name("serving_peer.py"))
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    with ExitStack() as stack:
        options = ["--name", NAME, "--threads", str(threads)]
        server = stack.enter_context(serving(package, options))
        url = f"{server.url}/v1"
        ways: dict[str, Callable[[Prompts], float]] = {
            "llama-onnx serve": lambda prompts: asyncio.run(rate(url, prompts))
        }
        own = [sys.executable, script, "genai", str(package), str(threads)]
        ways["onnxruntime-genai, one at a time"] = stack.enter_context(peer(own))
        if openvino:
            python, model = openvino
            command = [python, script, "openvino", model, str(threads)]
            ways["OpenVINO GenAI, batching"] = stack.enter_context(peer(command))
        in_turns(ways, tokenizer, threads)


def replicas(package: Path, threads: int) -> None:
    """Print a table of rates: one process with `threads`, and as many replicas with one."""
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    sides = {f"1 process, {threads} threads": ["--threads", str(threads)]}
    sides[f"{threads} replicas, 1 thread each"] = ["--replicas", str(threads), "--threads", "1"]
    memory = ["--name", NAME, "--cache-memory", "512MB"]
    with ExitStack() as stack:
        ways: dict[str, Callable[[Prompts], float]] = {}
        for name, options in sides.items():
            server = stack.enter_context(serving(package, [*memory, *options]))
            ways[name] = partial(_rate, f"{server.url}/v1")
        in_turns(ways, tokenizer, threads)


def _rate(url: str, prompts: Prompts) -> float:
    return asyncio.run(rate(url, prompts))


def in_turns(
    ways: Mapping[str, Callable[[Prompts], float]], tokenizer: Tokenizer, threads: int
) -> None:
    """Measure each of `ways` in turns, and print the medians."""
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(ROUNDS + 1):
        for clients in CLIENTS:
            for name, measure in ways.items():
                first = number * 1000 + clients * 10
                texts = [question(20, first + index) for index in range(clients)]
                prompts = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
                found.setdefault((name, clients), []).append(measure(prompts))
    print(f"{processor()}, {threads} threads, medians of {ROUNDS} rounds, tokens a second:")
    for name in ways:
        single = statistics.median(found[name, 1][1:])
        cells = []
        for clients in CLIENTS:
            value = statistics.median(found[name, clients][1:])
            cells.append(f"{clients}: {value:6.1f} (x {value / single:.2f})")
        print(f"{name:34} {'  '.join(cells)}")


@dataclass
class Soak:
    """What 16 clients saw."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


async def one_client(url: str, end: float, seed: int, found: Soak) -> None:
    """Ask one thing after the other until `end`; leave every fourth answer in the middle."""
    draw = random.Random(seed)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        while time.monotonic() < end:
            text = question(draw.choice([5, 20, 80, 300]), draw.randrange(1_000_000))
            new, leaves = draw.choice([8, 32, 128]), draw.random() < 0.25
            started = time.perf_counter()
            try:
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=new,
                    temperature=1,
                    stream=True,
                    timeout=600,
                )
                async with stream:
                    count = 0
                    async for chunk in stream:
                        if chunk.choices and chunk.choices[0].delta.content:
                            count += 1
                            if count == 1:
                                found.first.append(time.perf_counter() - started)
                            if leaves and count == new // 2:
                                break
                found.tokens += count
                found.ends["left" if leaves else "whole"] += 1
                if not leaves:
                    found.whole.append(time.perf_counter() - started)
            except openai.APIStatusError as error:
                found.ends[str(error.status_code)] += 1
                await asyncio.sleep(float(error.response.headers.get("retry-after", "1")))
            except openai.APIError as error:
                found.ends[type(error).__name__] += 1


def soak(package: Path, minutes: float, clients: int) -> None:
    """Print what the clients saw, and what became of the server's memory."""
    with serving(package, ["--name", NAME, "--waiting", "4", "--cache-memory", "500MB"]) as server:
        own = psutil.Process(server.process.pid)
        url = f"{server.url}/v1"
        asyncio.run(_together(url, clients, min(1.0, minutes / 5)))
        before = own.memory_info().rss
        found = asyncio.run(_together(url, clients, minutes))
        time.sleep(2)
        after = own.memory_info().rss
        alive = server.process.poll() is None
        faults = [line for line in server.lines if "Traceback" in line]
    print(f"{processor()}, {clients} clients for {minutes:g} minutes")
    print(f"ends: {json.dumps(found.ends)}; {found.tokens} tokens; alive: {alive}; {faults}")
    for name, values in (("first token", found.first), ("whole answer", found.whole)):
        cut = statistics.quantiles(values, n=100)
        print(f"{name:14} p50 {cut[49]:6.2f} s   p99 {cut[98]:6.2f} s   of {len(values)}")
    print(f"RSS after warming up {before / 1e6:.0f} MB, at the end {after / 1e6:.0f} MB", end="")
    print(f" (x {after / before:.3f})")


async def _together(url: str, clients: int, minutes: float) -> Soak:
    found = Soak()
    end = time.monotonic() + 60 * minutes
    await asyncio.gather(*(one_client(url, end, seed, found) for seed in range(clients)))
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("rates", "replicas", "soak"))
    parser.add_argument("package", type=Path)
    parser.add_argument("--openvino", nargs=2, default=[], metavar=("PYTHON", "MODEL"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.what == "rates":
        rates(arguments.package, arguments.openvino, arguments.threads)
    elif arguments.what == "replicas":
        replicas(arguments.package, arguments.threads)
    else:
        soak(arguments.package, arguments.minutes, arguments.clients)


if __name__ == "__main__":
    main()
