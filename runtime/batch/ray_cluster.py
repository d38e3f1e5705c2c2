"""Answer lines on a Ray cluster: the workers are actors of a `ray.data` pipeline.

Ray places the actors, feeds them, and restarts what dies. The file and the package must be at the
same paths on every machine, and the same llama-onnx installed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import time
from typing import Any

from llama_onnx.runtime.batch.batch import Start, Started
from llama_onnx.runtime.batch.lines import Line, Piece, Source, read_piece, unfinished
from llama_onnx.runtime.batch.worker import Opening, Worker, check_same
from llama_onnx.runtime.engine.cache_budget import shared_bytes
from llama_onnx.targets.errors import (
    LlamaOnnxError,
    PackageError,
    ResourceError,
    UsageError,
    describe_reason,
)
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import printable, shown

THREADS = 1
"""Threads of an actor, unless the caller says otherwise; see `plan_workers`."""

_MOST_TASKS = 2000
"""Tasks in all. The answers of a task come when it ends."""

_RETRIES = 3
"""How often a task whose actor died is tried again: a line may be what ends them."""

_SECONDS = 5.0
"""How long the cluster may take to accept a connection."""

_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w+Error): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, how many actors fit, and its bytes of memory for tasks."""

    id: str
    name: str
    actors: int
    memory: int = 0


def ray_start(
    address: str, workers: int | None, threads: int | None, cache_bytes: int | None
) -> Start:
    """Return what opens the package in actors of the cluster at `address`.

    `workers` None: as many as fit, with `threads` each. `cache_bytes` is for the caches of all
    actors of a machine; None: half of what they leave free. Raises `UsageError` if there is no
    such cluster or it is too small, and `PackageError` if a machine has another package.
    """

    @contextmanager
    def start(opening: Opening, source: Source, left: int) -> Iterator[Started]:
        with connected(address) as ray:
            each = threads or THREADS
            nodes = find_nodes(ray, each)
            check_nodes(ray, nodes, (opening.package, opening.sha256), (source.path, source.sha256))
            count = min(workers_of(nodes, workers, each), left)
            shares = {node.id: min(node.actors, count) for node in nodes}
            part = opening.share(1, cache_bytes, each)
            began, opened = time(), [0.0]
            yield Started(
                count,
                each,
                lambda done: _answer(ray, part, shares, count, source, done, opened),
                late=lambda: max(0.0, max(opened) - began),
            )

    return start


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module `ray`, connected to the cluster at `address`, and disconnect at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise missing_extra("--ray", error.name, "cpu,batch,ray") from None
    _check_address(address)
    try:
        with _quiet():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError and more
        raise UsageError(
            f"the Ray cluster at {shown(address)} cannot be used: {first_sentence(error)}."
        ) from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray's next releases; pyproject.toml says which
            yield ray
    except LlamaOnnxError:
        raise
    except ray.exceptions.RayError as error:
        raise _failure(error) from None
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Let no library print to stderr meanwhile: Ray's prints that it will print less."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_address(address: str) -> None:
    """Raise `UsageError` at once if nobody listens there: Ray would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address not in ("auto", "local"):
            raise UsageError(f"--ray must be HOST:PORT or auto, not {shown(address)}.")
        return
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"there is no Ray cluster at {shown(address)}: {describe_reason(error)}."
        ) from None


def find_nodes(ray: Any, threads: int) -> list[Node]:
    """Return the machines that can have an actor of so many threads."""
    found = [
        Node(
            str(node["NodeID"]),
            str(node["NodeManagerAddress"]),
            int(node["Resources"].get("CPU", 0) // threads),
            int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not any(node.actors for node in found):
        raise UsageError(f"no machine of the cluster has {threads} CPUs: use fewer --threads.")
    return [node for node in found if node.actors]


def workers_of(nodes: list[Node], workers: int | None, threads: int) -> int:
    """Return how many actors of so many `threads` to start: `workers`, or as many as fit.

    Raises `UsageError` if they do not fit.
    """
    room = sum(node.actors for node in nodes)
    if workers is not None and workers > room:
        raise UsageError(
            f"the cluster has room for {room} workers of {threads} threads, not {workers}: use "
            "fewer --workers or --threads."
        )
    return workers or room


def check_nodes(
    ray: Any, nodes: list[Node], package: tuple[str, str], source: tuple[Path, str]
) -> None:
    """Raise `PackageError` unless every machine has the same package and file.

    `package` is its path and its manifest's hash, `source` the file's path and hash.
    """
    path, sha256 = source
    ask_nodes(ray, nodes, _look, *package, str(path.resolve()), sha256, version("llama-onnx"))


def ask_nodes(
    ray: Any, nodes: list[Node], look: Callable[..., str | None], *arguments: str
) -> None:
    """Raise `PackageError` with what `look` returns on a machine, unless that is None on all."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(look)
    asked = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(*arguments)
        for node in nodes
    ]
    for node, answer in zip(nodes, asked, strict=True):
        try:
            problem = ray.get(answer)
        except Exception as error:  # also of a machine where this module cannot be imported
            problem = f"{first_sentence(error)}."
        if problem:
            raise PackageError(f"machine {node.name} of the cluster: {printable(problem)}")


def _look(package: str, sha256: str, source: str, source_sha256: str, release: str) -> str | None:
    """Return what a machine lacks, None if it can answer."""
    if (here := version("llama-onnx")) != release:
        return f"it has llama-onnx {here}, and the driver {release}: install the same on both."
    if not Path(source).is_file():
        return f"{source} is not there: put it in a folder that all machines share."
    if hash_file(Path(source)) != source_sha256:
        return f"{source} is another file than the driver's: put it in a folder that all share."
    try:
        check_same(ModelPackage.open(package), sha256, contents=True)
    except LlamaOnnxError as error:
        return str(error)
    return None


class Actor:
    """A worker in Ray's hands, which answers several batches of lines at once."""

    def __init__(self, opening: Opening, shares: Mapping[str, int]) -> None:
        """Open the package; `shares` says for each machine how many actors share its memory."""
        import ray

        here = shares.get(ray.get_runtime_context().get_node_id(), 1)
        memory = opening.cache_bytes
        if memory is None:
            size = ModelPackage.open(opening.package).data_path.stat().st_size
            memory = shared_bytes(here, size)
        self._worker = Worker(opening.share(here, memory, opening.threads))
        self._opened = time()

    async def __call__(self, batch: Any) -> Any:
        """Answer the lines of the pieces in a table, as `_rows` describes them."""
        import pyarrow

        lines = [line for row in batch.to_pylist() for line in _lines(row)]
        answers = await asyncio.gather(*(self._worker.answer(text) for _, text in lines))
        numbers = pyarrow.array([number for number, _ in lines], pyarrow.int64())
        contents = [answer.to_bytes() for answer in answers]
        column = pyarrow.array(contents, pyarrow.large_binary())
        times = pyarrow.array([self._opened] * len(lines), pyarrow.float64())
        return pyarrow.table({"line": numbers, "answer": column, "opened": times})


def _rows(source: Source, done: bytearray) -> list[dict[str, Any]]:
    """Return what actors need to know of each piece that is not done: where its lines are."""
    path = str(source.path.resolve())

    def row(piece: Piece) -> dict[str, Any]:
        known = bytes(done[piece.first : piece.first + piece.count])
        return {**asdict(piece), "path": path, "done": known}

    return [row(piece) for piece in unfinished(source.pieces, done)]


def _lines(row: Mapping[str, Any]) -> list[Line]:
    """Return the lines of a piece that are not done."""
    piece = Piece(**{name: row[name] for name in Piece.__dataclass_fields__})
    read = read_piece(piece)
    return [(number, text) for number, text in read if not row["done"][number - piece.first]]


def _answer(
    ray: Any,
    opening: Opening,
    shares: Mapping[str, int],
    count: int,
    source: Source,
    done: bytearray,
    opened: list[float],
) -> Iterator[Line]:
    """Yield the answers, and add to `opened` the times when actors had opened the package."""
    pieces = _rows(source, done)
    pool = ray.data.ActorPoolStrategy(
        size=count, max_tasks_in_flight_per_actor=4, max_concurrent_calls_per_actor=2
    )
    # The actors read the lines themselves: tasks for that would wait for the CPUs that they have.
    answered = ray.data.from_items(
        pieces, override_num_blocks=min(len(pieces), _MOST_TASKS)
    ).map_batches(
        Actor,
        fn_constructor_args=(opening, dict(shares)),
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=opening.threads,
        max_task_retries=_RETRIES,
    )
    for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        opened += set(table["opened"].to_pylist()) - set(opened)
        yield from zip(table["line"].to_pylist(), table["answer"].to_pylist(), strict=True)


def first_sentence(error: BaseException) -> str:
    """Return the reason in an error of Ray's, which may have another machine's traceback."""
    text = str(error)
    ours = [match[2] for match in _ERROR.finditer(text)]
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    line = ours[-1] if ours else first.partition(". ")[0]
    return printable(line)[:300].rstrip(".")


def _failure(error: BaseException) -> LlamaOnnxError:
    return ResourceError(
        f"the cluster could not go on: {first_sentence(error)}; what is finished is kept: run the "
        "same command without --force to continue."
    )
