"""Conversations of five turns under Wine, against the C library built for Linux."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trials.windows.wine import Wine, compile_windows, windows_path
from tests.support.native import NATIVE, build_library
from tests.support.tables import Case

SOURCE = Path(__file__).with_name("talk.c")
SAID = (
    "What is the capital of France?",
    "Name another city there.",
    "And one by the sea?",
    "What do people eat there?",
    "Thank you. Say goodbye.",
)
SLOWER = 1.5
"""Turn 5's first token may take so many times as long as turn 1's: only what is new is read."""


@dataclass(frozen=True)
class Turn:
    """What talk.c prints of a turn."""

    milliseconds: int
    prompt: int
    cached: int
    ids: tuple[int, ...]


def read_turns(text: str) -> list[Turn]:
    """Read the output of talk.c; raises `RuntimeError` if it is an error."""
    turns = []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind != "turn":
            raise RuntimeError(f"the talk: {line}")
        milliseconds, prompt, cached, *ids = map(int, rest.split())
        turns.append(Turn(milliseconds, prompt, cached, tuple(ids)))
    return turns


def talk_on_linux(package: Path, folder: Path, count: int) -> list[Turn]:
    """Hold the conversation with the library built for Linux in the new folder `folder`."""
    library = build_library(folder)
    program = folder / "talk"
    where = (f"-L{folder}", "-lllama_onnx", f"-Wl,-rpath,{folder}")
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", str(SOURCE)]
    subprocess.run([*command, "-o", str(program), *where], check=True)
    arguments = [str(package), str(library.parent), str(count), *SAID]
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    return read_turns(done.stdout)


def talk_under_wine(wine: Wine, bundle: Path, package: Path, count: int) -> list[Turn]:
    """Hold it with the bundle's llama_onnx.dll."""
    binaries = bundle / "bin"
    program = binaries / "talk.exe"
    flags = (str(binaries / "llama_onnx.dll"), f"-I{bundle / 'native'}")
    compile_windows(SOURCE, program, *flags)
    # The arguments of main are in the code page of the machine, so paths must be ASCII: relative.
    folder = bundle.parent
    arguments = [str(path.relative_to(folder)) for path in (package, binaries)]
    given = [argument.replace("/", "\\") for argument in arguments]
    done = wine.call([windows_path(program), *given, str(count), *SAID], cwd=folder)
    return read_turns(done.stdout.decode())


def five_turns(
    wine: Wine, bundle: Path, package: Path, work: Path, count: int, *, timed: bool
) -> Case:
    """Compare the tokens; if `timed`, also the times of the first and the last turn."""
    expected = talk_on_linux(package, work / "linux", count)
    given = talk_under_wine(wine, bundle, package, count)
    return compare_talks("a conversation of five turns", expected, given, timed=timed)


def compare_talks(
    what: str, expected: Sequence[Turn], given: Sequence[Turn], *, timed: bool
) -> Case:
    """Compare the tokens; if `timed`, also the times of the first and the last turn."""
    pairs = [(a.ids, b.ids) for a, b in zip(expected, given, strict=False)]
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    total = sum(len(turn.ids) for turn in expected)
    said = f"{equal} of {total} tokens equal Linux's"
    holds = [turn.ids for turn in given] == [turn.ids for turn in expected] and len(given) == 5
    holds = holds and all(turn.cached for turn in given[1:])
    if timed and len(given) == 5:
        first, last = given[0].milliseconds, given[-1].milliseconds
        holds = holds and last <= SLOWER * first
        said += f"; first token after {first} ms in turn 1, {last} ms in turn 5"
        said += f" ({given[-1].prompt:,} tokens, {given[-1].cached:,} of them read before)"
    return Case(what, holds, said)
