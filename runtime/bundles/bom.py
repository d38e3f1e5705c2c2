"""A bill of materials of a package for inventories of software and auditors: CycloneDX 1.6, JSON.

It says what the model was made from, under which license, and what was measured of it, and lists
every file by hash. It has only what the package records. https://cyclonedx.org/docs/1.6/json
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from llama_onnx.targets.licences import license_id, of_kind, title
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate

_MODEL = "model"
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT"}
"""The hub's name of a license -> that of https://spdx.org/licenses, which has none of Meta's."""

_METRICS = (
    ("mean KL divergence from the source, nats", "mean_kl"),
    ("share of positions with another likeliest token than the source's", "other_top1"),
    ("perplexity, as a multiple of the source's", "perplexity_ratio"),
)


def make_bom(package: ModelPackage, certificate: Certificate | None) -> str:
    """Return the bill of materials of `package` as JSON; the same package has the same.

    Raises `PackageError` for a certificate whose figures are damaged.
    """
    manifest = hash_file(package.index)
    files = [_file(name, entry) for name, entry in package.files.items()]
    content = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # Of the content: no time and no chance, so that it can be made again and compared.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, manifest)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool("llama-onnx", version("llama-onnx"))]},
            "component": _model(package, certificate, manifest),
        },
        "components": files,
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [file["bom-ref"] for file in files]},
            *({"ref": file["bom-ref"]} for file in files),
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _tool(name: str, number: str) -> dict[str, str]:
    return {"type": "application", "name": name, "version": number}


def _file(name: str, entry: Any) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": str(entry["sha256"])}]
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": hashes}


def _model(package: ModelPackage, certificate: Certificate | None, digest: str) -> dict[str, Any]:
    made = package.manifest.get("created_with")
    config = package.manifest.get("config")
    tools = made.items() if isinstance(made, dict) else ()
    properties = {
        "llama-onnx:precision": package.precision,
        "llama-onnx:target": package.target,
        **{f"llama-onnx:created_with:{name}": str(value) for name, value in tools},
    }
    size = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if size is not None:
        properties["llama-onnx:context_length"] = str(size)
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": str(package.manifest.get("name") or package.path.resolve().name),
        "version": digest[:12],
        "licenses": list(_licenses(package)),
        "pedigree": {"ancestors": [_source(package)]},
        "modelCard": _card(package, certificate),
        "properties": [{"name": name, "value": value} for name, value in properties.items()],
    }


def _licenses(package: ModelPackage) -> Iterator[dict[str, Any]]:
    for name in of_kind(package.files, "license"):
        known = license_id(title(package.path / name))
        if known in _SPDX:
            yield {"license": {"id": _SPDX[known]}}
        else:
            yield {"license": {"name": known or name}}


def _source(package: ModelPackage) -> dict[str, Any]:
    source = package.manifest["source"]
    found: dict[str, Any] = {"type": "machine-learning-model", "name": str(source.get("name", ""))}
    if "commit" in source:  # of a repository on the hub
        found["version"] = str(source["commit"])
        url = f"https://huggingface.co/{quote(str(source.get('name')))}"
        found["externalReferences"] = [{"type": "distribution", "url": url}]
    if files := list(_source_files(source.get("hashes"))):
        found["components"] = files
    return found


def _source_files(hashes: Any) -> Iterator[dict[str, Any]]:
    """Yield the source's files whose hashes the export recorded."""
    for key, name, length in (("sha256", "SHA-256", 64), ("md5", "MD5", 32)):
        recorded = hashes.get(key) if isinstance(hashes, dict) else None
        for file, digest in sorted(recorded.items()) if isinstance(recorded, dict) else ():
            if isinstance(digest, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", digest):
                content = [{"alg": name, "content": digest}]
                ref = f"source:{file}"
                yield {"type": "file", "bom-ref": ref, "name": file, "hashes": content}


def _card(package: ModelPackage, certificate: Certificate | None) -> dict[str, Any]:
    text = {"format": "text"}
    card: dict[str, Any] = {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "llama",
            "modelArchitecture": "decoder-only transformer",
            "inputs": [text],
            "outputs": [text],
        }
    }
    if metrics := list(_metrics(package, certificate)):
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _metrics(package: ModelPackage, certificate: Certificate | None) -> Iterator[dict[str, Any]]:
    """Yield what the certificate says of the loss against the source, with 95 % intervals."""
    if certificate is None:
        return
    from llama_onnx.runtime.measure.claims import claimed_fidelity
    from llama_onnx.runtime.measure.evaluated import Estimate

    found = claimed_fidelity(package, certificate)
    if found is None:
        return
    part = f"{found.shipped.positions} positions of the {found.text} text, as the package ships"
    for words, name in _METRICS:
        value, error = getattr(found.shipped, name), getattr(found.shipped, f"{name}_error")
        estimate = Estimate.normal(value, error)
        interval = {
            "lowerBound": f"{estimate.low:.6g}",
            "upperBound": f"{estimate.high:.6g}",
        }
        yield {
            "type": words,
            "value": f"{value:.6g}",
            "slice": part,
            "confidenceInterval": interval,
        }
