"""The files in examples/kubernetes: what they must say, and other people's validators."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.serving.serving_spec import ServingSpec

FOLDER = Path(__file__).parents[3] / "examples/kubernetes"
FILES = ("serve.yaml", "rayservice.yaml")


def pods(value: Any) -> list[dict[str, Any]]:
    """The pods in a document: what has containers."""
    if isinstance(value, list):
        return [pod for one in value for pod in pods(one)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for one in value.values() for pod in pods(one)]


@pytest.mark.parametrize("name", FILES)
def test_pods_are_bounded_and_cannot_write(name: str) -> None:
    found = pods(list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))))
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            bounds = container["securityContext"]
            assert bounds["readOnlyRootFilesystem"] and not bounds["allowPrivilegeEscalation"]
            assert bounds["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            (package,) = (v for v in container["volumeMounts"] if v["name"] == "package")
            assert package["readOnly"] is True


def test_the_deployment_asks_the_server_what_it_answers() -> None:
    documents = yaml.safe_load_all((FOLDER / "serve.yaml").read_text(encoding="utf-8"))
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    assert probes == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    known = {flag for option in main.get_command(None, "serve").params for flag in option.opts}  # type: ignore[arg-type, union-attr]
    assert {word for word in container["args"] if word.startswith("--")} <= known


def test_the_ray_service_has_arguments_that_its_builder_takes() -> None:
    service = yaml.safe_load((FOLDER / "rayservice.yaml").read_text(encoding="utf-8"))
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, function = app["import_path"].partition(":")
    assert module == "llama_onnx.runtime.serving.replicas.ray_app" and function == "build"
    assert app["args"].keys() <= set(ServingSpec.__dataclass_fields__) | {"least", "most"}


def test_a_schema_validator_passes_them() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((FOLDER / "serve.yaml").read_text(encoding="utf-8")):
        validate.validate(document, validate.latest_version(), strict=True)
    service = yaml.safe_load((FOLDER / "rayservice.yaml").read_text(encoding="utf-8"))
    for number, pod in enumerate(pods(service)):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{number}"}, "spec": pod}
        validate.validate(whole, validate.latest_version(), strict=True)


def test_hadolint_has_no_remark() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: nox -s kubernetes installs it")
    done = subprocess.run(
        [linter, str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
