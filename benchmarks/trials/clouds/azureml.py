"""Azure ML: its loaders read the YAML, and its inference server runs the scoring script."""

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

SERVER = Path(sys.executable).parent / "azmlinfsrv"


def place(bundle: Path) -> Place:
    """How Azure runs the scoring script: AZUREML_MODEL_DIR contains the folder of the model."""
    settings = yaml.safe_load((bundle / "deployment.yml").read_text("utf-8"))

    def start(package: Path, log: Path) -> subprocess.Popen[bytes]:
        folder = log.with_suffix("") / "1"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(package, folder / "package")
        variables = {**settings["environment_variables"], "AZUREML_MODEL_DIR": str(folder)}
        with log.open("wb") as file:
            return subprocess.Popen(
                [str(SERVER), "--entry_script", "code/score.py"],
                cwd=bundle,
                env=environment(**variables),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    return Place("azureml", start, 5001, "/score", "/")


def loader_cases(bundle: Path) -> Iterator[Case]:
    """Load the four YAML files with azure-ai-ml."""
    from azure.ai.ml import load_environment, load_online_deployment, load_online_endpoint

    endpoint: Any = load_online_endpoint(source=bundle / "endpoint.yml")
    yield Case("azure-ai-ml: endpoint.yml", endpoint.auth_mode == "key", f"name {endpoint.name}")
    loaded: Any = load_environment(source=bundle / "environment.yml")
    pip = loaded.conda_file["dependencies"][-1]["pip"]
    pinned = (bundle / "requirements.txt").read_text("utf-8").split()
    yield Case("azure-ai-ml: environment.yml, conda.yml", pip == pinned, ", ".join(pip))
    deployment: Any = load_online_deployment(source=bundle / "deployment.yml")
    code = Path(deployment.code_configuration.code)
    script = deployment.code_configuration.scoring_script
    there = [(bundle / code / script).is_file(), (bundle / deployment.model.path).is_dir()]
    holds = all(there) and deployment.endpoint_name == endpoint.name
    kind = type(deployment).__name__
    said = f"{kind}, {deployment.instance_type}, {deployment.environment.name}"
    yield Case("azure-ai-ml: deployment.yml", holds, said)
