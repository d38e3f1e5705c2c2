"""A Ray cluster of this machine, with two CPUs and bounded memory, which ends with the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_SECONDS = 300


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the cluster."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    limits = ["--num-cpus=2", f"--memory={4 << 30}", f"--object-store-memory={200 << 20}"]
    names = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": str(_SECONDS)}
    log = tmp_path_factory.mktemp("ray") / "start.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(ray), "start", "--head", "--block", f"--port={port}", *limits],
            env={**os.environ, **names, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _SECONDS
    try:
        while "Ray runtime started" not in log.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the cluster did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        # What is left of it is in the session that began with it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
