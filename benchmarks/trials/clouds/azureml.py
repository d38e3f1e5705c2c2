"""Azure ML: its loaders read the YAML, and the container's server runs with its settings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.trials.clouds.server import Place, environment
from tests.support.tables import Case


def place(bundle: Path) -> Place:
    """How Azure runs the image: the model's folder has folders for its name and version."""
    settings = yaml.safe_load((bundle / "deployment.yml").read_text("utf-8"))
    routes = yaml.safe_load((bundle / "environment.yml").read_text("utf-8"))["inference_config"]

    def start(package: Path, log: Path) -> subprocess.Popen[bytes]:
        mount = log.with_suffix("")
        shutil.rmtree(mount, ignore_errors=True)
        shutil.copytree(package, mount / settings["model"]["name"] / "1" / "package")
        variables = settings["environment_variables"]
        assert variables["LLAMA_ONNX_MODEL"] == settings["model_mount_path"]
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "serve.py"],
                cwd=bundle / "container",
                env=environment(**variables | {"LLAMA_ONNX_MODEL": str(mount)}),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    return Place(
        "azureml",
        start,
        routes["scoring_route"]["port"],
        routes["scoring_route"]["path"],
        "/v1/completions",
        routes["readiness_route"]["path"],
        settings["environment_variables"]["LLAMA_ONNX_NAME"],
    )


def loader_cases(bundle: Path) -> Iterator[Case]:
    """Load the YAML files with azure-ai-ml."""
    from azure.ai.ml import load_environment, load_online_deployment, load_online_endpoint

    endpoint: Any = load_online_endpoint(source=bundle / "endpoint.yml")
    yield Case("azure-ai-ml: endpoint.yml", endpoint.auth_mode == "key", f"name {endpoint.name}")
    loaded: Any = load_environment(source=bundle / "environment.yml")
    built = bundle / loaded.build.path / loaded.build.dockerfile_path
    routes = {f"{route['port']}{route['path']}" for route in loaded.inference_config.values()}
    holds = built.is_file() and len(routes) == 3
    yield Case("azure-ai-ml: environment.yml", holds, ", ".join(sorted(routes)))
    deployment: Any = load_online_deployment(source=bundle / "deployment.yml")
    there = (bundle / deployment.model.path).is_dir()
    holds = there and deployment.endpoint_name == endpoint.name
    kind = type(deployment).__name__
    said = f"{kind}, {deployment.instance_type}, {deployment.environment.name}"
    yield Case("azure-ai-ml: deployment.yml", holds, said)
