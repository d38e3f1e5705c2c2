"""Open a package's graph in plain ONNX Runtime, and report where its nodes run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llama_onnx.runtime import ort
from llama_onnx.runtime.placement.availability import require
from llama_onnx.runtime.placement.shares import Placement, place, read_costs, summarize
from llama_onnx.runtime.placement.wheels import installed_flavours
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU


@dataclass(frozen=True)
class OpenSession:
    """An open graph: `session` is an `onnxruntime.InferenceSession`.

    `fallback` is the reason why the requested provider does not run the graph at all; None if it
    does.
    """

    session: ort.Session
    placement: Placement
    fallback: str | None = None

    @property
    def shares_buffer(self) -> bool:
        """Whether past and present cache can be one buffer, as GroupQueryAttention's can."""
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
    spin: bool = True,
    edit: Callable[[bytes], bytes] | None = None,
    parallel: bool = False,
    tiled_attention: bool = True,
) -> OpenSession:
    """Open the graph at `model` on `provider`, and ask ONNX Runtime which node runs where.

    Small nodes (shapes, masks) may always run on the CPU. A node with weights, or an attention,
    that is not on `provider` is an error unless `allow_fallback`; so is a provider that cannot
    run here at all. `threads`, `prepack`, `arena`, `profile`, `spin`, `parallel` and
    `tiled_attention` are those of `ort.Settings`. `edit` changes the graph before it is opened.

    Raises `ProviderError`, `UsageError` for a senseless number of threads, and `PackageError` if
    ONNX Runtime refuses the graph.
    """
    settings = replace(
        _settings(threads, prepack, arena, profile),
        spin=spin,
        parallel=parallel,
        tiled_attention=tiled_attention,
    )
    costs = read_costs(model)
    graph: Path | bytes = model
    if edit is not None:
        graph, settings = edit(model.read_bytes()), replace(settings, weights=model.parent)
    session, fallback = _open(graph, provider, settings, allow_fallback)
    if not hasattr(session, "get_provider_graph_assignment_info"):
        wheel = next(iter(installed_flavours("onnxruntime")), provider.wheel)
        raise ProviderError(
            f"onnxruntime {ort.version()} cannot report where the nodes of a graph run: 1.24 or "
            f"newer is needed; run `python -m pip install --upgrade {wheel}`."
        )
    placement = place(provider.ort_name, session.get_provider_graph_assignment_info(), costs)
    if placement.heavy_elsewhere and not allow_fallback:
        raise ProviderError(
            f"provider {provider.name} does not run all of {model}: "
            f"{summarize(placement.heavy_elsewhere)}; pass --provider cpu, or accept it with "
            "--allow-fallback."
        )
    return OpenSession(session, placement, fallback)


def _open(
    model: Path | bytes, provider: Provider, settings: ort.Settings, allow_fallback: bool
) -> tuple[ort.Session, str | None]:
    """Return an open session, and the reason if it is not on `provider`."""
    try:
        require(provider)
        return ort.create_session(model, provider, settings), None
    except ProviderError as error:
        if not allow_fallback:
            raise
        return ort.create_session(model, CPU, settings), str(error)


def _settings(
    threads: int | None, prepack: bool, arena: bool, profile: Path | None
) -> ort.Settings:
    if threads is not None:
        ort.check_threads(threads)
    return ort.Settings(
        threads=threads, prepack=prepack, arena=arena, assignment=True, profile=profile
    )
