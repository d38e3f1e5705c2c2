"""A hub in a thread, with the part of huggingface.co's HTTP interface that huggingface_hub needs to
fetch a model. https://huggingface.co/docs/hub/api"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + 34 * "0"
OTHER_COMMIT = "decade" + 34 * "0"

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^?/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Hub:
    """Serves `folder` as the model `repo`. Each of its lists can be changed while it runs.

    `gated` answers requests for files as the hub answers somebody who has not accepted the license;
    `cut` names files whose next download breaks off half way, `stalled` those that hang there,
    which sets `reached`; `forged_headers` replace those of files, and `forge` changes JSON before
    it is sent; `requests` records method, name and range of every request for a file.
    """

    repo: str
    folder: Path
    gated: bool = False
    cut: list[str] = field(default_factory=list)
    stalled: list[str] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    forged_headers: dict[str, str] = field(default_factory=dict)
    forge: Callable[[Any], Any] = field(default=lambda value: value)
    url: str = ""

    def revisions(self) -> dict[str, str]:
        return {"main": COMMIT, "v2": OTHER_COMMIT, COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT}

    def sent(self, name: str) -> list[str | None]:
        """Return the range of each download of the file `name`."""
        return [where for method, file, where in self.requests if (method, file) == ("GET", name)]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that were killed."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        api, file = _API.match(self.path), _FILE.match(self.path)
        match = api or file
        commit = self.hub.revisions().get(match["revision"]) if match else None
        if match is None or match["repo"] != self.hub.repo:
            self._refuse(401, "RepoNotFound")  # the hub does not tell private from absent
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        elif api:
            self._send_json(self._tree() if api["what"] == "tree" else self._info(commit))
        elif file:
            self._send_file(file["name"], commit)

    def _info(self, commit: str) -> dict[str, Any]:
        names = [{"rfilename": path.name} for path in self.hub.folder.iterdir()]
        return {"id": self.hub.repo, "modelId": self.hub.repo, "sha": commit, "siblings": names}

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _oid(path)}
            for path in sorted(self.hub.folder.iterdir())
        ]

    def _send_file(self, name: str, commit: str) -> None:
        where = self.headers["Range"]
        self.hub.requests.append((self.command, name, where))
        path = self.hub.folder / name
        if self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            data = path.read_bytes()
            first, last = _bounds(where, len(data))
            headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            headers |= self.hub.forged_headers
            if where:
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206 if where else 200, data[first : last + 1], headers, name)

    def _send_json(self, value: Any) -> None:
        answer = json.dumps(self.hub.forge(value)).encode()
        self._send(200, answer, {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": f"said by the test: {code}"}
        self._send(status, b"{}", {**said, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.cut:
            self.hub.cut.remove(name)
            body = body[: len(body) // 2]
            self.close_connection = True
        if name in self.hub.stalled:
            self.wfile.write(body[: len(body) // 2])
            self.hub.reached.set()
            while name in self.hub.stalled:
                time.sleep(0.05)
            body = b""
        self.wfile.write(body)


def _bounds(where: str | None, size: int) -> tuple[int, int]:
    """Return the first and last byte of a Range header."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", where or "bytes=0-")
    assert match, f"unexpected range: {where}"
    return int(match[1]), min(int(match[2] or size - 1), size - 1)


def _oid(path: Path) -> str:
    """Return the hash that the hub uses: sha256 for a large file, git's sha1 for a small one."""
    data = path.read_bytes()
    if path.suffix in (".safetensors", ".bin", ".pth", ".model"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
