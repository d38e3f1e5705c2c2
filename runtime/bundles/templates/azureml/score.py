"""The scoring script of a managed online endpoint: `init` opens the package, `run` answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # llama_onnx lies beside this file

from azureml_inference_server_http.api.aml_response import AMLResponse

from llama_onnx.runtime.serving.request import Request
from llama_onnx.runtime.serving.service import Service, find_package, http_status
from llama_onnx.targets.errors import LlamaOnnxError

service: Service


def init() -> None:
    """Open the package in AZUREML_MODEL_DIR; an exception keeps the deployment from starting."""
    global service  # Azure's server calls these two functions and passes nothing between them
    service = Service(find_package(Path(os.environ["AZUREML_MODEL_DIR"])))
    print(f"runs {service}", flush=True)


def run(body: str) -> Any:
    """Answer a request: {"text": ..., "stats": ...}, or {"error": ...} with its status."""
    try:
        return service.answer(Request.parse(body))
    except LlamaOnnxError as error:
        print(f"refused or failed: {error}", flush=True)
        return AMLResponse({"error": str(error)}, http_status(error), json_str=True)
