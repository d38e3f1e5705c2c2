"""A model card for the Hugging Face hub: what a package says of itself, and nothing more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from llama_onnx.runtime.bundles.clouds import TEMPLATES
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.licences import PACKAGE_CARD, TERMS, of_kind, title
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target

CERTIFICATE = "parity/certificate.json"

_LICENCES = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
    "llama2": r"Llama 2 Community License",
    "llama3": r"Meta Llama 3 Community License",
    "llama3.1": r"Llama 3\.1 Community License",
    "llama3.2": r"Llama 3\.2 Community License",
}
"""The hub's name of a licence -> how its text begins."""

_SCALAR = r"""(?:"[^"\\\n]*"|'[^'\n]*'|[\w./:+-]+(?: [\w./:+-]+)*)"""
_CARRIED = re.compile(
    rf"^(license|license_name|license_link|language):[ \t]*"
    rf"({_SCALAR}|\[[^\[\]{{}}#&*\n]*\]|(?:\n[ \t]*- *{_SCALAR})+)[ \t]*$",
    re.MULTILINE,
)
"""Lines of a source's own card that hold for the package too, in plain YAML."""

_LOSSES = {
    "quantization alone": ("quantization", ""),
    "all, one pass": ("total", "prefill"),
    "all, token by token": ("total", "decode"),
}


def write_card(package: ModelPackage, title: str, name: str) -> str:
    """The text of README.md; raises `PackageError` for a certificate that is damaged or is about
    other files."""
    content = read_certificate(package)
    return _template("README").substitute(
        metadata="\n".join(_metadata(package)),
        title=title,
        examples="".join(_examples(package, name)),
        source=_source(package),
        precision=package.precision,
        target=package.target,
        version=package.manifest.get("created_with", {}).get("llama-onnx", ""),
        parity="\n".join(_parity(content)),
        verify=_VERIFY if content else "",
        licence=_licence(package),
    )


def missing(package: ModelPackage) -> Iterator[str]:
    """What people look for in a card, and this package does not know."""
    names = {line.partition(":")[0] for line in _metadata(package)}
    if "base_model" not in names:
        yield "The card names no base model: the package was not made from a model of the hub."
    if "language" not in names:
        yield "The card names no language: add one to the head of README.md."
    if not read_certificate(package):
        yield (
            "The card has no parity table, since the package has no certificate: "
            "`llama-onnx validate --certify` makes one."
        )


def read_certificate(package: ModelPackage) -> Mapping[str, Any] | None:
    """What the package's certificate says, None without one; raises `PackageError`."""
    if CERTIFICATE not in package.manifest["files"]:
        return None
    file = package.path / CERTIFICATE
    try:
        content: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
        "\n".join(_parity(content))
        about = dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{file} is damaged: {error!r}.") from None
    files = package.manifest["files"]
    stale = [name for name in about if files.get(name, {}).get("sha256") != about[name]]
    if stale:
        raise PackageError(
            f"{file} is about another {', '.join(stale)}: make it anew with `llama-onnx validate "
            "--certify`."
        )
    return content


# ---- metadata ------------------------------------------------------------------------------------


def _metadata(package: ModelPackage) -> Iterator[str]:
    carried = dict(_carried(package))
    if "license" not in carried:
        yield from _licence_lines(package)
    yield from carried.values()
    yield "library_name: onnxruntime-genai"
    yield "pipeline_tag: text-generation"
    source = package.manifest["source"]
    if "commit" in source:
        yield f"base_model: {json.dumps(source['name'])}"
        if package.precision in ("int4", "int8"):
            yield "base_model_relation: quantized"
    yield f"tags: [onnx, onnxruntime, onnxruntime-genai, llama-onnx, {package.precision}]"


def _carried(package: ModelPackage) -> Iterator[tuple[str, str]]:
    card = package.path / PACKAGE_CARD
    if PACKAGE_CARD not in package.files:
        return
    head = re.match(r"---\n(.*?)\n---\s", card.read_text("utf-8", "replace"), re.DOTALL)
    for match in _CARRIED.finditer(head[1] if head else ""):
        yield match[1], match[0]


def _licence_lines(package: ModelPackage) -> Iterator[str]:
    files = of_kind(package.files, "license", "notice")
    for name in files:
        text = title(package.path / name)
        known = [key for key, title in _LICENCES.items() if re.search(title, text, re.IGNORECASE)]
        if known:
            yield f"license: {known[0]}"
            return
    if files:
        yield "license: other"
        yield f"license_name: {json.dumps(Path(files[0]).stem.lower())}"
        yield f"license_link: {json.dumps(files[0])}"
    else:
        yield "license: unknown"


# ---- text ----------------------------------------------------------------------------------------


def _source(package: ModelPackage) -> str:
    source = package.manifest["source"]
    name = f"`{source.get('name', 'a model')}`"
    return f"{name} (commit {source['commit']})" if "commit" in source else name


def _parity(content: Mapping[str, Any] | None) -> Iterator[str]:
    if content is None:
        yield "This package has no certificate: how far it is from its original was not recorded."
        return
    report = content["validated"]
    figures = {(row["error"], row["situation"]): row["figures"] for row in report["measurements"]}
    versions = content["created_with"]
    yield (
        f"Measured against the original in PyTorch at {report['positions']:,} positions, on "
        f"{report['provider']} with onnxruntime {versions['onnxruntime']}; "
        f"{'every threshold holds' if report['passed'] else 'NOT every threshold holds'}. "
        "KL is in nats."
    )
    yield ""
    yield "| what is lost | mean KL | p99 KL | same top-1 | same top-5 | perplexity ratio |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for label, key in _LOSSES.items():
        yield f"| {label} | {_losses(figures[key])} |"
    graph = [values for (error, _), values in figures.items() if error == "graph"]
    yield ""
    yield (
        "The graph alone, on the package's own weights in fp32, in the worst of "
        f"{len(graph)} situations: largest difference of a logit "
        f"{max(values['max_abs'] for values in graph):.1e}, relative L2 "
        f"{max(values['relative_l2'] for values in graph):.1e}."
    )
    for row in report["greedy"]:
        if row["name"] == "shipped":
            yield (
                f"Of {len(row['divergences'])} greedy continuations of {row['tokens']} tokens, "
                f"{row['identical']} are the original's."
            )


def _losses(figures: Mapping[str, Any]) -> str:
    ratio, error = figures["perplexity_ratio"], figures["perplexity_ratio_error"]
    cells = (
        f"{figures['mean_kl']:.1e}",
        f"{figures['p99_kl']:.1e}",
        f"{figures['same_top1']:.1%}",
        f"{figures['top5_overlap']:.1%}",
        "-" if ratio is None else f"{ratio:.4f}" + ("" if error is None else f" ± {error:.4f}"),
    )
    return " | ".join(cells)


def _examples(package: ModelPackage, name: str) -> Iterator[str]:
    """How to run it, with whatever opens packages for its target."""
    if not package.has_tokenizer:
        return
    target = get_target(package.target)
    provider = target.session.provider
    # genai hands a graph of standard operators a mask that they do not take.
    if provider.genai_wheel and not target.graph.operators.standard:
        yield _template("genai").substitute(name=name, wheel=provider.genai_wheel)
        yield _template("llama_onnx").substitute(name=name)
    if provider == CPU:
        yield _template("optimum").substitute(name=name)


def _template(name: str) -> Template:
    return Template((TEMPLATES / "hub" / f"{name}.md").read_text("utf-8"))


def _licence(package: ModelPackage) -> str:
    files = of_kind(package.files, *TERMS)
    if not files:
        return "The package came without a licence file; the terms of the original model hold."
    links = ", ".join(f"[{name}]({name})" for name in files)
    return f"The model's own, which travels with it: {links}."


_VERIFY = """\
The certificate in `parity/` is replayed on any device, without the original:

```
llama-onnx verify FOLDER
```

"""
