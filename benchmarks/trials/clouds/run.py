"""`nox -s clouds`: the bundles for Azure ML and SageMaker, with the tools of those places.

python -m benchmarks.trials.clouds.run WORK_FOLDER

Prints its tables and writes them to docs/clouds.md; exits with status 1 if a case fails.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.trials.clouds import azureml, sagemaker, strangers
from benchmarks.trials.clouds.server import run_place
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bundles.azureml import AzureML
from llama_onnx.runtime.bundles.clouds import requirements
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.runtime.bundles.sagemaker import SageMaker
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.packages import make_package
from tests.support.tables import Case, show

DOCS = Path(__file__).parents[3] / "docs" / "clouds.md"

SLOW = replace(
    tiny.GQA,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    max_position_embeddings=4096,
)
"""A model that needs seconds for a long prompt; the others need milliseconds."""


def make_slow(folder: Path) -> Path:
    """Make a slow int4 package that never generates the end token."""
    tensors = tiny.weights(SLOW)
    tensors["lm_head.weight"][list(SLOW.eos_token_ids)] = 0
    source = tiny.write_huggingface(folder / "slow checkpoint", SLOW, tensors=tensors)
    out = folder / "slow"
    return export_package(source, out, get_target("cpu"), Options(precision="int4")).package


def make_foreign(package: Path, out: Path) -> Path:
    """Copy a package and change its target to cuda."""
    shutil.copytree(package, out)
    manifest = json.loads((out / MANIFEST).read_text("utf-8"))
    write_manifest(out, manifest | {"target": "cuda"})
    return out


def pin_case() -> Case:
    """Check that the tested versions are those that a bundle installs."""
    pins = dict(line.split("==") for line in requirements())
    other = [f"{name} {version(name)}" for name in pins if version(name) != pins[name]]
    said = f"other ones: {', '.join(other)}" if other else f"{len(pins)} as pinned"
    return Case("versions", not other, said)


def azure_cases(folder: Path, package: Path, slow: Path, foreign: Path) -> Iterator[Case]:
    """Make the bundle for Azure ML and yield its cases."""
    bundle = make_bundle(ModelPackage.open(package), folder / "azureml ä ü 日本", AzureML()).path
    yield pin_case()
    yield from azureml.loader_cases(bundle)
    yield from run_place(azureml.place(bundle), bundle / "package", slow, foreign, folder)


def sagemaker_cases(folder: Path, package: Path, slow: Path, foreign: Path) -> Iterator[Case]:
    """Make the bundle for SageMaker and yield its cases."""
    out = folder / "sagemaker ä ü 日本"
    bundle = make_bundle(ModelPackage.open(package), out, SageMaker()).path
    yield pin_case()
    yield sagemaker.docker_case(bundle)
    yield from sagemaker.deploy_cases(bundle)
    model = sagemaker.unpack(bundle, folder / "opt ml model")
    more = (sagemaker.stream_cases, strangers.stranger_cases)
    yield from run_place(sagemaker.place(bundle), model, slow, foreign, folder, more)


def main() -> None:
    """Make the packages and run the cases of each place."""
    folder = Path(sys.argv[1]).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    package = make_package(folder, "int4")
    arguments = (folder, package, make_slow(folder), make_foreign(package, folder / "foreign"))
    tables = [
        ("Azure ML | what happened", list(azure_cases(*arguments))),
        ("SageMaker | what happened", list(sagemaker_cases(*arguments))),
    ]
    if not show(DOCS, "clouds", tables, [str(folder)]):
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
