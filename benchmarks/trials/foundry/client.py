"""Use a bundle through foundry-local-sdk, without our code: chat, streaming, a tool, the service.

python client.py BUNDLE SETTINGS

Registers with the bundle's own register.py. The last line of its output is JSON.
"""

from __future__ import annotations

import json
import runpy
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from foundry_local_sdk import (
    CatalogType,
    ChatSession,
    Configuration,
    FoundryLocalManager,
    MessageItem,
    Request,
    RequestOptions,
    SearchOptions,
    ToolChoice,
)

CITY = {"enum": ["Paris", "Rome"]}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}


def converse(model: Any, questions: list[str], options: RequestOptions) -> list[dict[str, Any]]:
    """Ask the first question as a whole, the others streamed."""
    turns = []
    with ChatSession(model) as session:
        session.set_options(options)
        for number, question in enumerate(questions):
            with Request() as request:
                request.add_item(MessageItem.user(question))
                session.set_streaming(number > 0)
                turns.append(streamed(session, request) if number else whole(session, request))
    return turns


def whole(session: Any, request: Any) -> dict[str, Any]:
    """Return an answer that came in one piece."""
    with session.process_request(request) as answer:
        text = "".join(item.get_simple_text() for item in answer)
        return {"text": text, "pieces": 1, "prompt_tokens": answer.get_usage().prompt_tokens}


def streamed(session: Any, request: Any) -> dict[str, Any]:
    """Return an answer, and in how many pieces it came."""
    with session.process_streaming_request(request) as answer:
        pieces = [item.text for item in answer if hasattr(item, "text")]
    return {"text": "".join(pieces), "pieces": len(pieces), "prompt_tokens": None}


def call_tool(model: Any, options: RequestOptions) -> str:
    """Return the call that the model makes, as JSON, or the first line of the error."""
    options.tool_choice = ToolChoice.REQUIRED
    options.search.max_output_tokens = 64
    try:
        with ChatSession(model) as session, Request() as request:
            session.set_options(options)
            session.add_tool_definition("weather", "Tell the weather of a city", json.dumps(SCHEMA))
            request.add_item(MessageItem.user("What is the weather in Paris?"))
            with session.process_request(request) as answer:
                for item in answer:
                    if hasattr(item, "arguments"):
                        called = {"name": item.name, "arguments": json.loads(item.arguments)}
                        return json.dumps(called)
                return "no call"
    except Exception as error:  # whatever the SDK raises is the finding
        return str(error).splitlines()[0].rpartition(") ")[2]


def ask_service(manager: Any, model: str) -> dict[str, Any]:
    """Ask the OpenAI web service for the model."""
    manager.start_web_service()
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    asked = urllib.request.Request(
        manager.urls[0].rstrip("/") + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return {"status": answer.status, "message": answer.read().decode()[:200]}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "message": json.loads(error.read())["error"]["message"]}
    finally:
        manager.stop_web_service()


def main() -> None:
    """Do everything once and print the findings."""
    bundle, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    web = Configuration.WebService(urls="http://127.0.0.1:0")
    FoundryLocalManager.initialize(
        Configuration(
            app_name="llama-onnx",
            model_cache_dir=settings["cache"],
            web=web,
            disable_nonessential_telemetry=True,
        )
    )
    manager = FoundryLocalManager.instance
    register = runpy.run_path(str(bundle / "register.py"))["register"]
    model = register(manager.get_catalog(CatalogType.LOCAL))
    model.load()
    options = RequestOptions(
        search=SearchOptions(temperature=0.0, max_output_tokens=settings["count"])
    )
    found = {
        "turns": converse(model, settings["questions"], options),
        "tool": call_tool(model, options),
        "service": ask_service(manager, model.id),
    }
    model.unload()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
