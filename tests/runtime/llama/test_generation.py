"""An answer: its memory, its end from another thread, and what goes wrong inside it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.failures import describe_failure
from llama_onnx.runtime.engine.schedule import CHUNK
from llama_onnx.runtime.llama import generation as generation_module
from llama_onnx.runtime.llama.generation import Generation, Run, chunks
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.targets.errors import PackageError, ProviderError, ResourceError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.fakes import FakeGenerator, FakeStream, generation
from tests.support.packages import renew_hashes

PROMPT = "the quick brown fox"


def make_long(folder: Path, context: int) -> Path:
    """Export a tiny model with a long context; each position takes 768 bytes of cache."""
    positions = {"max_position_embeddings": context}
    source = tiny.write_huggingface(folder / "long", config_json=positions)
    out = folder / "out"
    options = Options("int4", quantizer="rtn")
    return export_package(source, out, get_target("cpu"), options).package


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Memory


def leave_by_break(answer: Generation) -> None:
    for _ in answer:
        break


def leave_by_error(answer: Generation) -> None:
    with pytest.raises(KeyError):
        for _ in answer:
            raise KeyError


def leave_by_with(answer: Generation) -> None:
    with answer:
        next(answer)


LEAVING: list[Callable[[Generation], Any]] = [
    leave_by_break,
    leave_by_error,
    leave_by_with,
    lambda answer: None,  # never begun
    lambda answer: next(answer),
    lambda answer: "".join(answer),
]


@pytest.mark.parametrize("leave", LEAVING)
def test_the_cache_is_freed_with_the_last_reference(leave: Callable[[Generation], Any]) -> None:
    native = FakeGenerator([97, 98, 99])
    alive = weakref.ref(native)
    with no_garbage_collector():
        answer = Generation(native, FakeStream(), np.array([1], np.int32), ())
        del native
        leave(answer)
        del answer
        assert alive() is None


@pytest.mark.parametrize("how", ["with", "error inside"])
def test_the_cache_is_freed_while_the_answer_or_its_error_is_kept(how: str) -> None:
    def fail(step: int) -> None:
        if step == 1 and how == "error inside":
            raise RuntimeError("std::bad_alloc")

    native = FakeGenerator([97, 98, 99], fail)
    alive = weakref.ref(native)
    answer = Generation(native, FakeStream(), np.array([1], np.int32), (), length=4)
    del native
    with no_garbage_collector():
        if how == "with":
            with answer:
                next(answer)
        else:
            next(answer)
            with pytest.raises(ResourceError) as kept:
                next(answer)
            assert kept.value is not None
        assert alive() is None
    assert answer.stats.finish_reason == "interrupted"


def test_answers_left_by_break_need_the_memory_of_one(package: Path, tmp_path: Path) -> None:
    """The real generator; its cache for 4,096 positions takes 4 MB."""
    source = tiny.write_huggingface(
        tmp_path / "long", config_json={"max_position_embeddings": 4096}
    )
    options = Options("int4", quantizer="rtn")
    out = export_package(source, tmp_path / "out", get_target("cpu"), options)
    llama = Llama.load(out.package)
    resident = psutil.Process().memory_info

    def leave_one() -> None:
        for _ in llama.generate(PROMPT, max_new_tokens=4000):
            break

    for _ in range(5):
        leave_one()
    before = resident().rss
    with no_garbage_collector():
        for _ in range(50):
            leave_one()
    assert resident().rss - before < 20e6, "50 caches of 4 MB were kept"


# The end, from another thread


def test_another_thread_ends_an_answer(llama: Llama) -> None:
    answer = llama.generate(PROMPT, max_new_tokens=240)
    begun, texts = threading.Event(), []

    def read() -> None:
        for piece in answer:
            texts.append(piece)
            begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    answer.close()
    thread.join(30)
    assert not thread.is_alive()
    assert answer.stats.new_tokens < 240
    assert answer.stats.finish_reason == "interrupted"
    assert next(answer, None) is None
    assert "".join(llama.generate(PROMPT, max_new_tokens=240)).startswith("".join(texts))


def test_another_thread_ends_an_answer_while_its_prompt_is_read() -> None:
    class Slow(FakeGenerator):
        parts = 0

        def append_tokens(self, tokens: Tokens) -> None:
            self.parts += 1
            reading.set()
            assert closed.wait(30)

    reading, closed = threading.Event(), threading.Event()
    native = Slow([97])
    answer = Generation(native, FakeStream(), np.ones(10 * CHUNK, np.int32), ())
    pieces: list[str] = []
    thread = threading.Thread(target=lambda: pieces.extend(answer))
    thread.start()
    assert reading.wait(30)
    answer.close()
    closed.set()
    thread.join(30)
    assert (pieces, native.parts, answer.stats.new_tokens) == ([], 1, 0)
    assert answer.stats.finish_reason == "interrupted"


def test_an_end_in_the_midst_of_a_step_frees_the_cache_afterwards() -> None:
    """Closed by whoever holds the answer, in the very step that another thread computes."""
    held: list[Generation] = []
    native = FakeGenerator([97, 98, 99], lambda step: held[0].close() if step == 1 else None)
    alive = weakref.ref(native)
    held.append(Generation(native, FakeStream(), np.array([1], np.int32), ()))
    del native
    assert list(held[0]) == ["a", "b"]
    assert alive() is None


# The prompt in chunks


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 1024, 1025, 7501])
def test_chunks_are_the_prompt_in_nearly_equal_parts(count: int) -> None:
    prompt = np.arange(count, dtype=np.int32)
    parts = chunks(prompt)
    assert np.concatenate(parts).tolist() == prompt.tolist()
    lengths = [len(part) for part in parts]
    assert max(lengths) <= CHUNK and max(lengths) - min(lengths) <= 1
    assert count < 2 or min(lengths) > 1


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_a_prompt_in_chunks_gives_the_answer_of_the_whole(
    package_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    package = package_fp32
    if target != "cpu":
        source = tiny.write_huggingface(tmp_path / "source")
        package = export_package(
            source, tmp_path / "out", get_target(target), Options(precision="fp32")
        ).package
    llama = Llama.load(package, provider="cpu", engine="genai")
    prompt = "the quick brown fox jumps over the lazy dog and the capital of"

    def logits(most: int) -> Any:
        monkeypatch.setattr(generation_module, "CHUNK", most)
        seen: list[Any] = []
        answer = llama.generate(prompt, max_new_tokens=16)
        assert isinstance(answer._run, Run)
        answer._run._native = Recorder(answer._run._native, seen)
        text = "".join(answer)
        return text, np.array(seen)

    text, whole = logits(10_000)
    for most in (1, 3, 7):
        same, parts = logits(most)
        assert same == text
        np.testing.assert_allclose(parts, whole, atol=2e-5)


class Recorder:
    """Passes everything on to genai's generator, and keeps the logits."""

    def __init__(self, native: Any, seen: list[Any]) -> None:
        self._native, self._seen = native, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def get_logits(self) -> Any:
        self._seen.append(self._native.get_logits().copy())
        return self._seen[-1]


# What goes wrong inside


def test_a_lost_device_is_named() -> None:
    """As `nox -s directml` saw it, with a fault planted in d3d12.dll."""
    said = "while running ReduceSum node. Status Message: DmlCommandRecorder.cpp(371) 887A0005 "
    error = describe_failure(RuntimeError(said), 3, 6)
    assert type(error) is ProviderError
    assert str(error).startswith("the graphics device was lost in the answer (error 887A0005)")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError("std::bad_alloc"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("bad allocation"), True),
        (RuntimeError("Could not allocate the key-value cache buffer of size: 9"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 9"), True),
        (RuntimeError("CUDA failure 2: out of memory"), True),
        (RuntimeError("887A0005 E_OUTOFMEMORY"), True),
        (RuntimeError("Non-zero status code returned while running Gather node"), False),
    ],
)
def test_a_failure_inside_an_answer_is_a_sentence(error: Exception, memory: bool) -> None:
    def fail(step: int) -> None:
        if step == 1:
            raise error

    answer = generation("abc", before_step=fail)
    assert next(answer) == "a"
    kind = ResourceError if memory else PackageError
    said = (
        "not enough memory for a prompt of 3 tokens and an answer of up to 3: pass a shorter prompt"
        if memory
        else "onnxruntime-genai failed in the answer: Non-zero status code"
    )
    assert is_memory_failure(error) == memory
    assert type(describe_failure(error, 3, 6)) is kind
    with pytest.raises(kind, match=said):
        next(answer)
    assert next(answer, None) is None


NO_ROOM = """
import resource, sys
from pathlib import Path
from llama_onnx.exporter.cli import main
from llama_onnx.runtime.llama.model import Llama

opened = Llama.load(sys.argv[1], engine="genai")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
Llama.load = lambda *_, **__: opened
main(["generate", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cache_without_memory_is_a_sentence_about_memory(tmp_path: Path) -> None:
    """genai_config.json was blamed for it. The cache takes 400 MB, and there are 100."""
    context = 1 << 19
    out = make_long(tmp_path, context)
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, out, PROMPT, "--max-new-tokens", str(context), "--json"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = f"not enough memory for a prompt of 11 tokens and an answer of up to {context - 11:,}: "
    assert said in done.stderr
    assert "genai_config" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_computes_no_numbers_is_an_error(bad: float) -> None:
    """Nothing was said of it: genai takes token 0 or an end token, and the answer was empty."""

    class Broken(FakeGenerator):
        def get_logits(self) -> Any:
            values = super().get_logits()
            if self._steps == 2:
                values[0, 0, 1] = bad
            return values

    answer = Generation(Broken([97, 98, 99]), FakeStream(), np.array([1], np.int32), ())
    assert [next(answer), next(answer)] == ["a", "b"]
    with pytest.raises(PackageError, match="output is not a number after 2 tokens"):
        next(answer)


def test_damaged_weights_are_an_error_not_an_empty_answer(
    package_fp32: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(package_fp32, folder)
    model = onnx.load(folder / "model.onnx")
    norm = next(weight for weight in model.graph.initializer if "norm" in weight.name)
    values = numpy_helper.to_array(norm).copy()
    values[0] = np.nan
    norm.CopyFrom(numpy_helper.from_array(values, norm.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    renew_hashes(folder)
    llama = Llama.load(folder)
    with pytest.raises(PackageError, match="output is not a number after 0 tokens"):
        "".join(llama.generate(PROMPT, max_new_tokens=4))
