"""The server as a deployment of Ray Serve, on any number of machines.

Ray places the replicas, watches and restarts them, updates them one after the other and balances
the load. Each is the same application as `llama-onnx serve`. The package must be at the same path
on every machine, with the same llama-onnx: a replica that finds another one does not start.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_onnx.runtime.batch.ray_cluster import connected, first_sentence
from llama_onnx.runtime.serving.http.api_keys import make_guard
from llama_onnx.runtime.serving.http.limits import Limits
from llama_onnx.runtime.serving.openai_errors import NotReadyError
from llama_onnx.runtime.serving.serving_spec import ServingSpec
from llama_onnx.targets.errors import PackageError, UsageError

NAME = "llama-onnx"
"""Of the application and its deployment in the cluster."""

QUESTIONS = 2
"""Requests to a replica beside those for all its rows, for /health and its like."""

_HEALTH_SECONDS, _HEALTH_PATIENCE, _DRAIN_SECONDS = 5, 30, 30


@dataclass(frozen=True)
class Cluster:
    """How many replicas there are: `least`, and up to `most` while there is more to do."""

    least: int = 1
    most: int | None = None


class Replica:
    """A replica: an open package, and the application over it."""

    def __init__(
        self, spec: str, api_key: str | None, hosts: Collection[str] | None, release: str
    ) -> None:
        """Open the package; raises `PackageError` for another one than the others serve."""
        if (here := version("llama-onnx")) != release:
            raise PackageError(
                f"this machine has llama-onnx {here}, and the others {release}: install the same."
            )
        logging.getLogger("llama_onnx").setLevel(logging.INFO)
        found = ServingSpec.from_json(spec)
        found.check(contents=True)
        self._model = found.open()
        logging.getLogger("llama_onnx.serve").info("%s", self._model)
        self._app = Limits(found.app(self._model), guard=make_guard(api_key, hosts))

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Ray asks for it."""
        return self._app

    async def check_health(self) -> None:
        """Raise if the engine has ended: Ray starts another replica then."""
        if not self._model.backend.require_engine().is_alive():
            raise NotReadyError("the engine has ended.")


def application(
    spec: ServingSpec,
    cluster: Cluster,
    *,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
) -> Any:
    """Return the application of Ray Serve that serves `spec`.

    A replica takes a CPU for each of its threads. It gets no more requests than it has rows; the
    others wait in Ray's proxies, where they lose nothing when a replica dies.
    """
    from ray import serve

    scaling: dict[str, Any] = {"num_replicas": cluster.least}
    if cluster.most is not None:
        bounds = {"min_replicas": cluster.least, "max_replicas": cluster.most}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": spec.rows}}
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": spec.threads or 1},
        max_ongoing_requests=spec.rows + QUESTIONS,
        max_queued_requests=spec.waiting,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=_HEALTH_PATIENCE,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        **scaling,
    )
    release = version("llama-onnx")
    made: Any = deployment(serve.ingress()(Replica))
    return made.bind(spec.to_json(), api_key, hosts, release)


def build(arguments: Mapping[str, Any]) -> Any:
    """Return the application; a Serve config names this function in its `import_path`.

    `arguments` are the fields of `ServingSpec` and of `Cluster`. The key is in the environment, as
    LLAMA_ONNX_API_KEY.
    """
    fields = {"threads": 1, **arguments}
    cluster = Cluster(int(fields.pop("least", 1)), fields.pop("most", None))
    key = os.environ.get("LLAMA_ONNX_API_KEY")
    if not key:
        raise UsageError("LLAMA_ONNX_API_KEY is not set: it is the key that clients must send.")
    spec = ServingSpec.of(Path(fields.pop("package")), **fields)
    return application(spec, cluster, api_key=key)


def serve_on(
    address: str,
    spec: ServingSpec,
    cluster: Cluster,
    *,
    host: str,
    port: int,
    api_key: str | None,
    hosts: Collection[str] | None,
    ready: Any,
) -> None:
    """Serve on the Ray cluster at `address` until a signal ends it.

    If the application runs there already, its replicas are replaced one after the other. `ready` is
    called once it answers. Raises `UsageError` if there is no such cluster, and `PackageError` if
    no replica can start.
    """
    with connected(address):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": host, "port": port})
        _check_listens(host, port)
        app = application(spec, cluster, api_key=api_key, hosts=hosts)
        with _ended_by_signals() as ended:
            try:
                serve.run(app, name=NAME, route_prefix="/")
            except RuntimeError as error:
                reason = _why(serve, error)
                with suppress(Exception):
                    serve.delete(NAME)
                raise PackageError(f"the cluster cannot serve this: {reason}.") from None
            ours = _deployed(serve)
            ready()
            while not ended:
                time.sleep(0.2)
        if _deployed(serve) == ours:  # nobody has updated it meanwhile
            serve.delete(NAME)


def _check_listens(host: str, port: int) -> None:
    """Raise `UsageError` if the cluster's proxies listen elsewhere: those of a Ray Serve that runs
    already keep their address, which another application may have asked for."""
    from ray.serve.context import _get_global_client

    config = _get_global_client().http_config
    if (config.host, config.port) != (host, port):
        raise UsageError(
            f"Ray Serve runs on this cluster already and listens on {config.host}:{config.port}: "
            f"pass --host {config.host} --port {config.port}, or end it with `serve shutdown`."
        )


class _ended_by_signals:  # noqa: N801
    """A list that gets the signals which ask this process to end, instead of their effect."""

    def __enter__(self) -> list[int]:
        found: list[int] = []
        self._before = {
            number: signal.signal(number, lambda number, _: found.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return found

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def _deployed(serve: Any) -> float | None:
    """Return when the application was last deployed, None if it is not there."""
    found = serve.status().applications.get(NAME)
    return None if found is None else float(found.last_deployed_time_s)


def _why(serve: Any, error: BaseException) -> str:
    """Return the reason why no replica could start, from what Ray says of the deployment."""
    found = serve.status().applications.get(NAME)
    messages = [one.message for one in found.deployments.values()] if found else []
    return first_sentence(RuntimeError("\n".join([str(error), *messages])))
