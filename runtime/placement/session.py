"""A package's graph opened by plain ONNX Runtime, and the truth about where its nodes run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.placement.availability import require
from llama_onnx.runtime.placement.shares import Placement, place, read_costs, summarize
from llama_onnx.targets.errors import PackageError, ProviderError, UsageError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
import onnxruntime as ort


@dataclass(frozen=True)
class OpenSession:
    """An open graph.

    `session` is an `onnxruntime.InferenceSession`. `fallback` says why the provider asked for does
    not run it at all; it is None when it does, as it always is unless a fallback was allowed.
    """

    session: Any
    placement: Placement
    fallback: str | None = None

    @property
    def shares_buffer(self) -> bool:
        """Whether past and present of its cache can be one buffer: GroupQueryAttention's can."""
        return any(node.op_type == "GroupQueryAttention" for node in self.placement.nodes)


def open_session(
    model: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    allow_fallback: bool = False,
    prepack: bool = True,
    arena: bool = True,
    profile: Path | None = None,
) -> OpenSession:
    """Open the graph at `model` on `provider`, and learn from ONNX Runtime which node runs where.

    Small nodes (shapes, masks) may run on the CPU whatever the provider. A node with weights, or an
    attention, that is not on `provider` is an error unless `allow_fallback`; so is a provider that
    does not run here at all. `threads` None: as many as there are physical cores. `prepack` False
    opens faster, without a second copy of the weights, for a session that is not going to run.
    `arena` False gives memory back after each run. `profile`: ONNX Runtime writes its profile to
    files that begin so.

    Raises `ProviderError`, `UsageError` for a senseless number of threads, and `PackageError` when
    ONNX Runtime refuses the graph.
    """
    options = _session_options(threads, prepack, arena, profile)
    costs = read_costs(model)
    session, fallback = _open(model, provider, options, allow_fallback)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise ProviderError(
            f"onnxruntime {ort.__version__} cannot say where the nodes of a graph run: 1.24 or "
            "newer is needed; run `pip install --upgrade onnxruntime`."
        )
    placement = place(provider.ort_name, session.get_provider_graph_assignment_info(), costs)
    if placement.heavy_elsewhere and not allow_fallback:
        raise ProviderError(
            f"{provider.name} does not run all of {model}: {summarize(placement.heavy_elsewhere)}; "
            "take --provider cpu, or accept it with --allow-fallback."
        )
    return OpenSession(session, placement, fallback)


def _open(
    model: Path, provider: Provider, options: ort.SessionOptions, allow_fallback: bool
) -> tuple[ort.InferenceSession, str | None]:
    """An open session, and why it is not on `provider` if it is not."""
    try:
        require(provider)
        return _create(model, provider, options), None
    except ProviderError as error:
        if not allow_fallback:
            raise
        return _create(model, CPU, options), str(error)


def _create(model: Path, provider: Provider, options: ort.SessionOptions) -> ort.InferenceSession:
    providers: list[Any] = [(provider.ort_name, dict(provider.provider_options))]
    if provider != CPU:
        providers.append(CPU.ort_name)
    try:
        # With its fallback enabled, which it is by default, onnxruntime opens the model on the CPU
        # when the provider fails, and again when a run fails; it only prints that it did.
        session = ort.InferenceSession(str(model), options, providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise _refusal(model, provider, error) from None
    if provider.ort_name not in session.get_providers():
        raise ProviderError(
            f"The provider {provider.name} cannot run here: ONNX Runtime could not start it and "
            f"says why above; is there a device for it, and is the driver recent enough?"
        )
    return session


def _refusal(model: Path, provider: Provider, error: Exception) -> Exception:
    reason = " ".join(str(error).split())
    if provider == CPU:
        return PackageError(f"onnxruntime refuses {model}: {reason}")
    # Behind the C++ functions that failed stands what is wrong, behind that where it was noticed.
    reason = re.sub(r"^.*(void\]|was false\.) ", "", reason).split(" ; ")[0].rstrip(".")
    return ProviderError(
        f"{model} does not open on {provider.name}: {reason}; take --provider cpu."
    )


def _session_options(
    threads: int | None, prepack: bool, arena: bool, profile: Path | None
) -> ort.SessionOptions:
    if threads is not None and threads < 1:
        raise UsageError(f"The number of threads must be at least 1, not {threads}.")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options
