"""`llama-onnx serve`: a web server with OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import introduce, introduce_opened, note, progress_line
from llama_onnx.runtime.commands.options import (
    package_argument,
    provider_options,
    speculation_options,
    threads_option,
)
from llama_onnx.runtime.commands.size_option import size_option
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.providers import get_provider

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.verify import VerifyReport
    from llama_onnx.runtime.serving.serving_spec import ServingSpec
    from llama_onnx.targets.provider import Provider


@click.command("serve")
@package_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--api-key",
    envvar="LLAMA_ONNX_API_KEY",
    show_envvar=True,
    help="Key that clients must send. Needed for an address other than this machine's own.",
)
@click.option("--name", help="The model's name for clients.  [default: the package's folder]")
@click.option(
    "--rows",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Answers to generate at once.",
)
@click.option(
    "--waiting",
    type=click.IntRange(0, 100_000),
    default=64,
    show_default=True,
    help="Requests that may wait for a free row; further ones get 429.",
)
@click.option("--max-length", type=int, help="Limit the context to fewer tokens.")
@size_option(
    "--cache-memory", "Memory for keys and values: 500MB, 2GB.  [default: half of what is free]"
)
@click.option("--verify", is_flag=True, help="Replay the package's certificate before listening.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Answer to this name too, of a proxy for example; may be repeated.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log.")
@click.option(
    "--replicas",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that answer, behind one front. --threads and --rows are those of each; "
    "--cache-memory and --waiting are for all.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Let the replicas run on the Ray cluster at this address, or auto, with --threads (1) "
    "CPUs and --cache-memory for each.",
)
@click.option(
    "--most-replicas",
    type=click.IntRange(1, 10_000),
    help="With --ray: more replicas while there is more to do, up to this many.",
)
@speculation_options
@threads_option
@provider_options
def command(
    package: Path,
    host: str,
    port: int,
    api_key: str | None,
    verify: bool,
    allow_host: tuple[str, ...],
    replicas: int,
    ray: str | None,
    most_replicas: int | None,
    **how: Any,
) -> None:
    """Serve PACKAGE to clients of OpenAI's API, and a chat page to browsers.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health, /ready,
    /metrics. Ctrl-C lets the answers in progress finish and ends the server; a second Ctrl-C ends
    it at once.
    """
    try:
        from llama_onnx.runtime.serving.http.web_server import address, listen, log_to_stderr, run
    except ModuleNotFoundError as error:
        raise missing_extra("llama-onnx serve", error.name, "cpu,serve") from None
    from llama_onnx.runtime.serving.http.api_keys import LOCAL_HOSTS, LOOPBACK, make_guard
    from llama_onnx.runtime.serving.http.limits import Limits

    local = host in LOOPBACK
    if not local and not api_key:
        raise UsageError(
            f"on {host} anybody who reaches this machine could use the model: give a key with "
            "--api-key, or leave out --host."
        )
    hosts = None if not local else LOCAL_HOSTS | {name.lower() for name in allow_host}
    if ray is not None:
        spec = _spec(package, **{**how, "threads": how["threads"] or 1})
        reach = {"host": host, "port": port, "api_key": api_key or None, "hosts": hosts}
        _serve_on_ray(ray, spec, (replicas, most_replicas), verify, reach)
        return
    if most_replicas is not None:
        raise UsageError("--most-replicas is for --ray: without it, --replicas says how many.")
    opened = listen(host, port)
    log_to_stderr()
    guard = make_guard(api_key or None, hosts)
    spec = _spec(package, **how)
    verification = _verify(spec) if verify else None
    with _app(spec, replicas, verification) as app:
        url = address(opened)
        run(Limits(app, guard=guard), opened, lambda: note(f"Listening on {url} (Ctrl-C ends it)."))


def _serve_on_ray(
    address: str,
    spec: ServingSpec,
    count: tuple[int, int | None],
    verify: bool,
    reach: dict[str, Any],
) -> None:
    from llama_onnx.runtime.serving.replicas.ray_app import Cluster, serve_on

    if verify:
        raise UsageError(
            "--verify is for this machine, not for those of a cluster: run `llama-onnx verify` on "
            "each, and leave it out here."
        )
    least, most = count
    if most is not None and most < least:
        raise UsageError("--most-replicas must not be less than --replicas.")
    url = f"http://{reach['host']}:{reach['port']}"

    def ready() -> None:
        several = f"{least} to {most}" if most is not None else str(least)
        where = spec.provider or "the target's provider"
        each = f"{spec.threads} CPUs each, on {where}"
        note(f"Ray serves {spec.package} with {several} replicas of {each}.")
        note(f"Listening on {url} (Ctrl-C ends it).")

    serve_on(address, spec, Cluster(least, most), **reach, ready=ready)


def _spec(
    package: Path,
    *,
    cache_memory: int | None,
    drafting: dict[str, Any],
    provider: Provider | None,
    **fields: Any,
) -> ServingSpec:
    """Return what the options say about the model."""
    from llama_onnx.runtime.serving.serving_spec import ServingSpec

    draft: Path | None = drafting["draft"]
    return ServingSpec.of(
        package,
        cache_bytes=cache_memory,
        speculate=drafting["speculate"],
        draft=None if draft is None else str(draft.resolve()),
        provider=None if provider is None else provider.name,
        **fields,
    )


@contextmanager
def _app(spec: ServingSpec, count: int, verification: VerifyReport | None) -> Iterator[Any]:
    """Open the model, here or in several processes, and yield the application over it."""
    if count == 1:
        model = spec.open()
        introduce(model)
        yield spec.app(model, verification)
        return
    from llama_onnx.runtime.serving.replicas.serve_replicas import replicas

    with replicas(spec, count, verification) as started:
        for number, up in enumerate(started.ups):
            where = f"replica {number}, process {up.pid}: {up.model}"
            introduce_opened(where, up.fallback, up.tuned)
        yield started.app


def _verify(spec: ServingSpec) -> VerifyReport:
    """Replay the certificate; raise `PackageError` if this machine computes something else."""
    from llama_onnx.runtime.measure.verify import verify

    package = Path(spec.package)
    with progress_line() as progress:
        report = verify(
            package,
            None if spec.provider is None else get_provider(spec.provider),
            threads=spec.threads,
            allow_fallback=spec.allow_fallback,
            progress=progress,
        )
    if not report.passed:
        raise PackageError(
            f"{package} is not verified here: run `llama-onnx verify {package}` for the reasons."
        )
    note("Verified: this machine computes what the certificate says.")
    return report
