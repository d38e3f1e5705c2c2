"""Two machines in one: two network namespaces with an address each, and a node of Ray in both.

Needs root. What is made has names that begin with `llo-`, and is gone after the block.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HEAD, WORKER = "llo-head", "llo-work"
ADDRESSES = {HEAD: "10.77.17.1", WORKER: "10.77.17.2"}
PORT = 6399

_SECONDS, _ATTEMPTS = 50, 5
_LIMITS = ["--num-cpus=1", f"--memory={3 << 30}", f"--object-store-memory={100 << 20}"]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": str(_SECONDS),
}


def why_not() -> str | None:
    """Return why this machine cannot have two namespaces, None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip: install iproute2"
    probe = f"{HEAD}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this machine allows no network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass
class Nodes:
    """A cluster of two nodes, whose temporary files are in `folder`."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]

    @property
    def address(self) -> str:
        """Where the cluster is, for a process in the namespace `HEAD`."""
        return f"{ADDRESSES[HEAD]}:{PORT}"

    def start(self, name: str) -> None:
        """Start the node in a namespace, and wait until it is there.

        A node whose agent has not said its port after 15 seconds gives up and says nothing: on a
        busy machine it takes another attempt.
        """
        for _ in range(_ATTEMPTS):
            if self._start(name):
                return
            while self.kill(name):
                time.sleep(0.1)
        raise RuntimeError(f"{name} did not start: {self._log(name).read_text(encoding='utf-8')}")

    def _start(self, name: str) -> bool:
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        where.append(f"--temp-dir={self.folder}")
        if name == WORKER:
            where = [f"--address={self.address}"]
        ray = Path(sys.executable).with_name("ray")
        own = [f"--node-ip-address={ADDRESSES[name]}", *_LIMITS]
        log = self._log(name)
        with log.open("wb") as file:
            process = subprocess.Popen(
                inside(name, [str(ray), "start", "--block", *where, *own]),
                env={**os.environ, **_ENVIRONMENT},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        deadline = time.monotonic() + _SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in log.read_text(encoding="utf-8"):
                return True
            time.sleep(0.2)
        return False

    def _log(self, name: str) -> Path:
        return self.folder.parent / f"{name}.log"

    def find(self, name: str, what: str = "") -> list[int]:
        """Return the processes in a namespace whose command has `what`."""
        listed = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        found = []
        for pid in map(int, listed.stdout.split()):
            with suppress(OSError):
                if what.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self, name: str, what: str = "") -> int:
        """End them at once; return how many there were."""
        found = self.find(name, what)
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return len(found)


def inside(name: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` in a namespace."""
    return ["ip", "netns", "exec", name, *command]


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Make the namespaces and the cluster, and remove both after the block."""
    nodes = Nodes(folder / "ray", [])
    nodes.folder.mkdir(parents=True)
    try:
        _connect()
        nodes.start(HEAD)
        nodes.start(WORKER)
        yield nodes
    finally:
        for name in (WORKER, HEAD):
            if _exists(name):
                while nodes.kill(name):
                    time.sleep(0.1)
                _ip("netns", "delete", name)
        for process in nodes.processes:
            process.wait()


def _connect() -> None:
    """Make two namespaces, joined by a pair of interfaces; nothing else is reached from them."""
    for name in ADDRESSES:
        if _exists(name):
            raise RuntimeError(f"there is a network namespace {name} already: remove it.")
    for name in ADDRESSES:
        _ip("netns", "add", name)
    link = ["link", "add", "llo-a", "netns", HEAD, "type", "veth"]
    _ip(*link, "peer", "name", "llo-b", "netns", WORKER)
    for name, interface in ((HEAD, "llo-a"), (WORKER, "llo-b")):
        _ip("-n", name, "address", "add", f"{ADDRESSES[name]}/24", "dev", interface)
        _ip("-n", name, "link", "set", interface, "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _exists(name: str) -> bool:
    return Path("/run/netns", name).exists()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
