"""The only module of `exporter` and `runtime` that imports onnxruntime.

It turns usage reports off before onnxruntime loads, opens all sessions with the same settings, and
turns exceptions into ours. Importing it is cheap: onnxruntime loads at the first call.

Set ORT_DISABLE_TELEMETRY=0 to turn the usage reports on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llama_onnx.targets.errors import (
    LlamaOnnxError,
    PackageError,
    ProviderError,
    ResourceError,
    UsageError,
)
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE
from llama_onnx.targets.printable import shown
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

Session: TypeAlias = Any
"""An `onnxruntime.InferenceSession`."""

Array = npt.NDArray[Any]

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    **{
        f"tensor({name})": np.dtype(name).type
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
}
"""ONNX Runtime's type strings -> numpy's types. numpy has no bfloat16."""


_NO_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_ENVIRONMENT = Lock()  # one session at a time reads it


def disable_telemetry() -> bool:
    """Turn off usage reports of libraries that load from now on, unless the user wants them.

    Return whether they are off. ONNX Runtime and onnxruntime-genai read the variable when they
    load, so call this before importing either.
    """
    return os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1") != "0"


@cache
def load() -> Any:
    """Return the module onnxruntime, with its usage reports off.

    Raises `MissingDependencyError` if it, or a library it needs, is not installed.
    """
    quiet = disable_telemetry()
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_extra("running a graph", error.name, "cpu") from None
    if quiet and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def version() -> str:
    """Return the version of the onnxruntime that loads here."""
    return str(load().__version__)


def available_providers() -> list[str]:
    """Return the providers in the installed wheel, by ONNX Runtime's names."""
    return list(load().get_available_providers())


def preload_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, which onnxruntime does not search otherwise.

    Prints the names of those it does not find.
    """
    load().preload_dlls()


@dataclass(frozen=True)
class Settings:
    """How to open a session.

    Attributes:
        threads: threads to compute with; None: the physical cores.
        prepack: False opens faster, without a second copy of the weights, for a session that runs
            little or not at all.
        arena: False gives memory back after each run.
        assignment: record which provider each node is assigned to.
        profile: write a profile of each run to files whose names begin with this.
        weights: the folder of the data file, for a graph that is given as bytes.
        exact: compute float32 products of quantized weights in float32, not in int8.
        spin: False lets threads sleep between runs, where another session has work meanwhile.
        parallel: pack weights with all threads, which opens faster. The weights as they are on disk
            stay mapped until the last is packed.
        packed: write the graph as it runs here, and its weights as packed, to this folder.
        tiled_attention: False computes all scores of a prompt's attention at once, which takes more
            memory, and rounds differently.
    """

    threads: int | None = None
    prepack: bool = True
    arena: bool = True
    assignment: bool = False
    profile: Path | None = None
    weights: Path | None = None
    exact: bool = False
    spin: bool = True
    parallel: bool = False
    packed: Path | None = None
    tiled_attention: bool = True


def check_threads(threads: object) -> int:
    """Return `threads` if they make sense here: at least 1, at most eight per processor or 64.

    More only cost memory and time, and the system may end the process. Raises `UsageError`, also
    for what is not a whole number.
    """
    processors = os.cpu_count() or 1
    most = max(64, 8 * processors)
    if (
        isinstance(threads, bool)
        or not isinstance(threads, Integral)
        or not 1 <= int(threads) <= most
    ):
        raise UsageError(
            f"the number of threads must be 1 to {most}, not {shown(threads)}: this machine has "
            f"{processors} processor{'s' if processors > 1 else ''}."
        )
    return int(threads)


def create_session(
    model: Path | bytes, provider: Provider = CPU, settings: Settings | None = None
) -> Session:
    """Open a graph, a file or its bytes, on `provider`; the CPU runs the nodes that it cannot.

    Raises `PackageError` if ONNX Runtime refuses the graph on the CPU, and `ProviderError` if it
    refuses it on another provider or cannot start that provider.
    """
    settings = settings or Settings()
    name = "the graph" if isinstance(model, bytes) else str(model)
    if isinstance(model, bytes) and settings.weights is not None:
        name = f"the graph of {settings.weights}"
    with _attention(settings.tiled_attention):
        return _open(model, provider, _session_options(settings), name)


@contextmanager
def _attention(tiled: bool) -> Iterator[None]:
    """Have sessions that are opened in this block compute attention in tiles, or without.

    ONNX Runtime reads the variable when it makes a kernel, and has no option for it:
    https://github.com/microsoft/onnxruntime/pull/28962
    """
    with _ENVIRONMENT:
        if tiled:  # unless the user says otherwise
            yield
            return
        before = os.environ.get(_NO_TILES)
        os.environ[_NO_TILES] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_NO_TILES]
            else:
                os.environ[_NO_TILES] = before


def _open(model: Path | bytes, provider: Provider, options: Any, name: str) -> Session:
    named: list[Any] = [(provider.ort_name, dict(provider.provider_options))]
    if provider != CPU:
        named.append(CPU.ort_name)
    providers: list[Any] | None = named
    source = model if isinstance(model, bytes) else str(model)
    runtime = load()
    try:
        if provider.ep_device is not None:  # named in the options, and the CPU is always there
            devices = [d for d in runtime.get_ep_devices() if d.ep_name == provider.ort_name]
            chosen = devices[provider.ep_device : provider.ep_device + 1]
            options.add_provider_for_devices(chosen, dict(provider.provider_options))
            providers = None
        # By default onnxruntime falls back to the CPU, with no more than a printed line, when the
        # provider fails to open the model and when a run fails.
        session = runtime.InferenceSession(source, options, providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise _refusal(name, provider, error) from None
    if provider.ort_name not in session.get_providers():
        raise ProviderError(
            f"provider {provider.name} cannot run here: ONNX Runtime could not start it, for "
            "the reason printed above; check that it has a device and that the driver is recent."
        )
    return session


def check_opens(path: Path) -> None:
    """Open the graph at `path` as written, without reading its weights, and close it again.

    ONNX Runtime checks every node's operator, types and attributes, and the location of every
    initializer in the data file. No session is returned: without optimizations, products with
    weights whose scales the graph converts are all zero, and ONNX Runtime does not say so.

    Raises `PackageError` if ONNX Runtime refuses the graph.
    """
    options = _session_options(Settings(prepack=False))
    options.graph_optimization_level = load().GraphOptimizationLevel.ORT_DISABLE_ALL
    _open(path, CPU, options, str(path))


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn an exception into `PackageError`; `what` completes "onnxruntime failed ..."."""
    try:
        yield
    except LlamaOnnxError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise PackageError(f"onnxruntime failed {what}: {first_line(error)}") from error


@contextmanager
def time_limit(seconds: float | None) -> Iterator[Any]:
    """Yield options for one run, which ends after `seconds`, between two nodes; None: no limit.

    Raises `PackageError` for a run that was ended.
    """
    if seconds is None:
        yield None
        return
    options, ended = run_options(), Event()

    def end() -> None:
        ended.set()
        options.terminate = True

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield options
    except Exception:
        if not ended.is_set():
            raise
        raise PackageError(
            f"a step of the graph was stopped after {seconds:.0f} s: no sound package of this size "
            "takes as long."
        ) from None
    finally:
        timer.cancel()


def run_options() -> Any:
    """Return options for runs, which end between two nodes once its `terminate` is True."""
    return load().RunOptions()


def first_line(error: Exception) -> str:
    """Return the first line of the message; the others are a trace through C++."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def numpy_dtype(type_name: str) -> type[np.generic]:
    """Return numpy's type for ONNX Runtime's `type_name`, such as "tensor(float16)".

    Raises `PackageError` if numpy has none.
    """
    try:
        return _DTYPES[type_name]
    except KeyError:
        raise PackageError(
            f"the graph has an input of type {type_name}, which numpy cannot hold: export the "
            "package with different activations to run it here."
        ) from None


def to_device(array: Array, device: str) -> Any:
    """Return `array` as an `onnxruntime.OrtValue` on `device`, such as "cpu" or "cuda".

    On the CPU the value shares the memory of `array`: keep both as long as a binding uses them.
    """
    return load().OrtValue.ortvalue_from_numpy(array, device, 0)


def empty_on_device(shape: tuple[int, ...], kind: type[np.generic], device: str) -> Any:
    """Return an `onnxruntime.OrtValue` on `device`, whose contents are unknown."""
    return load().OrtValue.ortvalue_from_shape_and_type(shape, kind, device, 0)


def write_adapter(path: Path, parameters: Mapping[str, Array]) -> None:
    """Write `parameters`, named like the graph's inputs, as an adapter file, whole or not at all.

    Raises `ResourceError` if the file cannot be written.
    """
    runtime = load()
    values = {name: runtime.OrtValue.ortvalue_from_numpy(v) for name, v in parameters.items()}
    file = runtime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        file.export_adapter(str(temporary))
        temporary.replace(path)
    except RuntimeError as error:
        raise ResourceError(
            f"{path} cannot be written, perhaps because the disk is full: {first_line(error)}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(path: Path) -> dict[str, Array]:
    """Return the values in an adapter file, by the names of the graph's inputs."""
    parameters = load().AdapterFormat.read_adapter(str(path)).get_parameters()
    # Copied: numpy's view of a parameter does not keep its memory alive.
    return {name: value.numpy().copy() for name, value in parameters.items()}


def _session_options(settings: Settings) -> Any:
    runtime = load()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are exceptions as well; the log would print them raw
    options.intra_op_num_threads = settings.threads or 0
    options.enable_cpu_mem_arena = options.enable_mem_pattern = settings.arena
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile)
    if settings.packed is not None:
        options.optimized_model_filepath = str(settings.packed / MODEL_FILE)
    for key, value in _config_entries(settings):
        options.add_session_config_entry(key, value)
    return options


def _config_entries(settings: Settings) -> Iterator[tuple[str, str]]:
    if settings.assignment:
        yield "session.record_ep_graph_assignment_info", "1"
    if not settings.prepack:
        yield "session.disable_prepacking", "1"
    if settings.weights is not None:
        # A graph given as bytes has no folder in which to find its data file.
        yield "session.model_external_initializers_file_folder_path", str(settings.weights)
    if settings.exact:
        # ONNX Runtime turns DequantizeLinear and MatMul into a MatMulNBits that computes in int8.
        yield "session.qdq_matmulnbits_accuracy_level", "1"
    if not settings.spin:
        yield "session.force_spinning_stop", "1"
    if settings.parallel:
        yield "session.prepack.enable_parallel", "1"
    if settings.packed is not None:
        yield "session.optimized_model_external_initializers_file_name", DATA_FILE
        yield "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        yield "session.save_external_prepacked_constant_initializers", "1"


def _refusal(name: str, provider: Provider, error: Exception) -> LlamaOnnxError:
    reason = " ".join(str(error).split())
    if provider == CPU:
        return PackageError(f"onnxruntime refuses {name}: {reason}")
    # The message lists the C++ functions that failed, then the reason, then the place in C++.
    reason = re.sub(r"^.*(void\]|was false\.) ", "", reason).split(" ; ")[0].rstrip(".")
    return ProviderError(
        f"{name} does not open on {provider.name}: {reason}; pass --provider cpu to use the CPU."
    )
