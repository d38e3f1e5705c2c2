"""Templates: Python that runs elsewhere, with names that have to exist here."""

from __future__ import annotations

import ast
import glob
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_onnx.runtime.bundles.azureml import AzureML
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.runtime.bundles.template_files import TEMPLATES
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.package import ModelPackage

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(TEMPLATES.glob("*/*.py.template"))

# Azure's own class, reduced to what the script hands to it.
AZURE = "class AMLResponse(dict):\n    def __init__(self, message, status, json_str=False):\n"
AZURE += "        super().__init__(message, status=status)\n"
CALL = """
import json, score
score.init()
text = score.run('{"prompt": "the quick", "max_new_tokens": 8}')["text"]
print(json.dumps([text, score.run('{"prompt": 3}')["status"]]))
"""


def test_there_are_scripts_and_none_is_a_module_here() -> None:
    assert [path.name for path in SCRIPTS] == [
        "score.py.template",
        "deploy.py.template",
        "serve.py.template",
    ]
    assert not list(TEMPLATES.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_compiles_and_imports_what_there_is(script: Path) -> None:
    tree = ast.parse(script.read_text("utf-8"), script.name)
    compile(tree, script.name, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llama_onnx."):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_azure_s_script_answers_in_its_bundle(package: Path, tmp_path: Path) -> None:
    out = make_bundle(ModelPackage.open(package), tmp_path / "out", AzureML()).path
    module = tmp_path / "azure" / "azureml_inference_server_http" / "api" / "aml_response.py"
    module.parent.mkdir(parents=True)
    module.write_text(AZURE)
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        capture_output=True,
        encoding="utf-8",
        cwd=out / "code",
        env={"AZUREML_MODEL_DIR": str(out / "package"), "PYTHONPATH": str(tmp_path / "azure")},
    )
    assert done.returncode == 0, done.stderr
    expected = "".join(Llama.load(package).generate("the quick", max_new_tokens=8))
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, 400]


def test_the_wheel_has_all_templates_and_native_files() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["llama_onnx.runtime"]
    runtime = ROOT / "runtime"
    # As setuptools does it: with Path.glob a star would match a leading dot too.
    packed = {name for line in patterns for name in glob.glob(line, root_dir=runtime)}  # noqa: PTH207
    files = [*(runtime / "bundles" / "templates").rglob("*"), *(runtime / "native").rglob("*")]
    there = {path.relative_to(runtime).as_posix() for path in files if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} <= packed
