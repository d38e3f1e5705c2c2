"""`llama-onnx serve`: a web server with OpenAI's API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import introduce, note, progress_line
from llama_onnx.runtime.commands.options import (
    package_argument,
    provider_options,
    speculation_options,
    threads_option,
)
from llama_onnx.runtime.commands.size_option import size_option
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.extras import missing_extra

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.verify import VerifyReport
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
    "--rows", type=click.IntRange(1, 256), default=8, show_default=True, help="Answers at once."
)
@click.option(
    "--waiting",
    type=click.IntRange(0, 100_000),
    default=64,
    show_default=True,
    help="Answers that may wait for a row; further requests get 429.",
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
@speculation_options
@threads_option
@provider_options
def command(
    package: Path,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    rows: int,
    waiting: int,
    max_length: int | None,
    cache_memory: int | None,
    verify: bool,
    allow_host: tuple[str, ...],
    log_prompts: bool,
    drafting: dict[str, Any],
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
) -> None:
    """Serve PACKAGE to clients of OpenAI's API, and a chat page to browsers.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health, /ready,
    /metrics. Ctrl-C ends the server after the answers in work, Ctrl-C again at once.
    """
    try:
        from llama_onnx.runtime.serving.app import Settings, create_app
        from llama_onnx.runtime.serving.http.web_server import address, listen, run
    except ModuleNotFoundError as error:
        raise missing_extra("llama-onnx serve", error.name, "cpu,serve") from None
    from llama_onnx.runtime.engine.engine import Limits as EngineLimits
    from llama_onnx.runtime.llama.model import Llama
    from llama_onnx.runtime.serving.http.api_keys import LOCAL_HOSTS, LOOPBACK, make_guard
    from llama_onnx.runtime.serving.http.limits import Limits

    local = host in LOOPBACK
    if not local and not api_key:
        raise UsageError(
            f"on {host} anybody who reaches this machine could use the model: give a key with "
            "--api-key, or leave out --host."
        )
    opened = listen(host, port)
    _log_to_stderr()
    verification = _verify(package, provider, threads, allow_fallback) if verify else None
    model = Llama.load(
        package,
        max_length=max_length,
        threads=threads,
        provider=provider,
        allow_fallback=allow_fallback,
        engine="onnxruntime",
        **drafting,
        limits=EngineLimits(cache_memory, rows),
    )
    model.package.require_tokenizer()
    introduce(model)
    app = create_app(model, Settings(name, waiting, log_prompts), verification)
    hosts = None if not local else LOCAL_HOSTS | {name.lower() for name in allow_host}
    guard = make_guard(api_key or None, hosts)
    url = address(opened)
    run(Limits(app, guard=guard), opened, lambda: note(f"Listening on {url} (Ctrl-C ends it)."))


def _verify(
    package: Path, provider: Provider | None, threads: int | None, allow_fallback: bool
) -> VerifyReport:
    """Replay the certificate; raise `PackageError` if this machine computes something else."""
    from llama_onnx.runtime.measure.verify import verify

    with progress_line() as progress:
        report = verify(
            package,
            provider,
            threads=threads,
            allow_fallback=allow_fallback,
            progress=progress,
        )
    if not report.passed:
        raise PackageError(
            f"{package} is not verified here: run `llama-onnx verify {package}` for the reasons."
        )
    note("Verified: this machine computes what the certificate says.")
    return report


def _log_to_stderr() -> None:
    """Write what the server and the engine have to say, without colors or times of their own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in ("llama_onnx", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("llama_onnx").setLevel(logging.INFO)
