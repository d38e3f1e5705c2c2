"""The OpenAPI document, tried by schemathesis: whatever is sent, the answer is no server error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.packages import make_package
from tests.support.real_server import serving

EXAMPLES = os.environ.get("LLAMA_ONNX_EXAMPLES", "40")
"""Requests to each endpoint."""


def test_no_request_is_a_server_error(tmp_path: Path) -> None:
    tool = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.fail("schemathesis is missing: run `nox -s e2e`.")
    package = make_package(tmp_path, "fp32")
    with serving(package, ["--name", "tiny", "--max-length", "128", "--threads", "1"]) as server:
        command = [tool, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
        # The phase "coverage" sends thousands of fixed requests, and takes many minutes.
        command += ["--phases", "fuzzing,stateful", "--max-examples", EXAMPLES, "--seed", "1"]
        command += ["--generation-database", "none"]
        command += ["--request-timeout", "120", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
        print(done.stdout[-6000:])
        assert done.returncode == 0, done.stderr
        assert server.process.poll() is None
        assert not [line for line in server.lines if "Traceback" in line]
