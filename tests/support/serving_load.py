"""Clients of a server at work: `python -m tests.support.serving_load URL SECONDS KEY`.

A program of its own, so that it can run in another network namespace. It prints a line of JSON for
each request: when it ended, its status, whether its answer was whole, and what was wrong.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

from tests.support.http_calls import call

CLIENTS = 16


def ask(url: str, key: str, text: str) -> dict[str, object]:
    """Return how one request ended."""
    fields = {"model": "tiny", "max_tokens": 40, "temperature": 0, "logit_bias": {"2": -100}}
    chat = {"messages": [{"role": "user", "content": text}], **fields}
    began = time.time()
    try:
        status, body = call(url, "/v1/chat/completions", chat, key=key, seconds=120)
    except (OSError, http.client.HTTPException) as error:
        status, body = 0, repr(error).encode()
    whole = status == 200 and json.loads(body)["usage"]["completion_tokens"] == 40
    wrong = "" if whole else body.decode(errors="replace")[:300]
    return {"began": began, "ended": time.time(), "status": status, "whole": whole, "wrong": wrong}


def main() -> None:
    """Let `CLIENTS` clients ask one request after the other."""
    url, seconds, key = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    end, lock = time.time() + seconds, threading.Lock()

    def client(number: int) -> None:
        turn = 0
        while time.time() < end:
            found = json.dumps(ask(url, key, f"{number} {turn}"))
            turn += 1
            with lock:
                print(found, flush=True)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()


if __name__ == "__main__":
    main()
