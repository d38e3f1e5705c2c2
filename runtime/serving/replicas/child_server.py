"""A replica: a process with the whole server, for its front alone.

It listens on a port of the loopback address and wants a key that only the front has. The first line
of stdin is what it serves; when stdin ends, so does the process, because the front is gone. It says
on stdout, in one line, where it listens, or why it does not.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from llama_onnx.runtime.batch.process import words_of
from llama_onnx.runtime.doctor.child import take_stdout
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.http.api_keys import make_guard
from llama_onnx.runtime.serving.http.limits import Limits
from llama_onnx.runtime.serving.http.web_server import listen, log_to_stderr, run
from llama_onnx.runtime.serving.serving_spec import ServingSpec

_LOOK_SECONDS = 0.5
_LAST_SECONDS = 2.0
"""Time for the error replies of an engine that has ended."""


def main() -> None:
    """Be a replica until stdin ends or a signal comes."""
    out = os.fdopen(take_stdout(), "w", encoding="utf-8")

    def tell(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    given = json.loads(sys.stdin.readline())
    log_to_stderr(f"replica {given['number']}: ")
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        spec = ServingSpec.from_json(given["spec"])
        model = spec.open()
        app = spec.app(model)
        opened = listen("127.0.0.1", 0)
    except Exception as error:  # nobody may wait for a process that cannot open the package
        tell(error=words_of(error))
        return
    threading.Thread(target=_end_with_engine, args=(model,), daemon=True).start()
    found = model.opened
    said = {
        "model": str(model),
        "provider": found.provider.name,
        "fallback": found.fallback,
        "tuned": found.tuned,
    }
    port = opened.getsockname()[1]
    guarded = Limits(app, guard=make_guard(given["key"], None))
    run(guarded, opened, lambda: tell(port=port, **said))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)  # in the middle of a step, if need be: nobody waits for an answer


def _end_with_engine(model: Llama) -> None:
    """End the process after its engine has: the front starts another."""
    engine = model.backend.require_engine()
    while engine.is_alive():
        time.sleep(_LOOK_SECONDS)
    time.sleep(_LAST_SECONDS)
    os._exit(1)
