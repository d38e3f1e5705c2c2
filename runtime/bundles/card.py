"""The model card of a package for the Hugging Face hub; it shows only what the package records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.bundles.template_files import read_template
from llama_onnx.targets.errors import PackageError, describe_damage
from llama_onnx.targets.licences import PACKAGE_CARD, TERMS, of_kind, title
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate

CERTIFICATE = "parity/certificate.json"

_LICENCES = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
    "llama2": r"Llama 2 Community License",
    "llama3": r"Meta Llama 3 Community License",
    "llama3.1": r"Llama 3\.1 Community License",
    "llama3.2": r"Llama 3\.2 Community License",
}
"""The hub's name of a license -> a pattern found near the start of its text."""

_SCALAR = r"""(?:"[^"\\\n]*"|'[^'\n]*'|[\w./:+-]+(?: [\w./:+-]+)*)"""
_CARRIED = re.compile(
    rf"^(license|license_name|license_link|language):[ \t]*"
    rf"({_SCALAR}|\[[^\[\]{{}}#&*\n]*\]|(?:\n[ \t]*- *{_SCALAR})+)[ \t]*$",
    re.MULTILINE,
)
"""Lines of the source's own card that apply to the package too, in plain YAML."""

_LOSSES = {
    "quantization only": ("quantization", ""),
    "everything, one pass": ("total", "prefill"),
    "everything, token by token": ("total", "decode"),
}


def write_card(
    package: ModelPackage, certificate: Certificate | None, title: str, name: str
) -> str:
    """Return the text of README.md for a repository called `name`.

    Raises `PackageError` for a certificate without the figures that the card shows.
    """
    return read_template("hub", "README.md").substitute(
        metadata="\n".join(_metadata(package)),
        title=title,
        examples="".join(_examples(package, name)),
        source=_source(package),
        precision=package.precision,
        target=package.target,
        version=package.manifest.get("created_with", {}).get("llama-onnx", ""),
        parity="\n".join(_parity(package, certificate)),
        verify=_VERIFY if certificate else "",
        licence=_licence(package),
    )


def missing(package: ModelPackage, certificate: Certificate | None) -> Iterator[str]:
    """Yield a warning for each item that readers expect in a card but the package lacks."""
    names = {line.partition(":")[0] for line in _metadata(package)}
    if "base_model" not in names:
        yield "The card has no base model: the package was not made from a model on the hub."
    if "language" not in names:
        yield "The card has no language: add one at the top of README.md."
    if not certificate:
        yield (
            "The card has no parity table, because the package has no certificate: make one with "
            "`llama-onnx validate --certify`."
        )


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


def _parity(package: ModelPackage, certificate: Certificate | None) -> list[str]:
    if certificate is None:
        return ["This package has no certificate: its loss against the original is not recorded."]
    try:
        return list(_figures(certificate.content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # `read_certificate` does not check these entries.
        raise PackageError(
            f"{package.path / CERTIFICATE} is damaged: {describe_damage(error)}."
        ) from None


def _figures(content: Mapping[str, Any]) -> Iterator[str]:
    report = content["validated"]
    figures = {(row["error"], row["situation"]): row["figures"] for row in report["measurements"]}
    versions = content["created_with"]
    yield (
        f"Measured against the original in PyTorch at {report['positions']:,} positions, on "
        f"{report['provider']} with onnxruntime {versions['onnxruntime']}; "
        f"{'all thresholds hold' if report['passed'] else 'NOT all thresholds hold'}. "
        "KL is in nats."
    )
    yield ""
    yield "| loss | mean KL | p99 KL | same top-1 | same top-5 | perplexity ratio |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for label, key in _LOSSES.items():
        yield f"| {label} | {_losses(figures[key])} |"
    graph = [values for (error, _), values in figures.items() if error == "graph"]
    yield ""
    yield (
        "The graph only, with the package's weights in fp32, in the worst of "
        f"{len(graph)} situations: largest logit difference "
        f"{max(values['max_abs'] for values in graph):.1e}, relative L2 "
        f"{max(values['relative_l2'] for values in graph):.1e}."
    )
    for row in report["greedy"]:
        if row["name"] == "shipped":
            yield (
                f"Of {len(row['divergences'])} greedy continuations of {row['tokens']} tokens, "
                f"{row['identical']} are identical to the original's."
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
    """Yield an example for each library that can run packages for this target."""
    if not package.has_tokenizer:
        return
    target = get_target(package.target)
    provider = target.session.provider
    # genai passes a mask that a graph of standard operators does not accept.
    if provider.genai_wheel and not target.graph.operators.standard:
        yield read_template("hub", "genai.md").substitute(name=name, wheel=provider.genai_wheel)
        yield read_template("hub", "llama_onnx.md").substitute(name=name)
    if provider == CPU:
        yield read_template("hub", "optimum.md").substitute(name=name)


def _licence(package: ModelPackage) -> str:
    files = of_kind(package.files, *TERMS)
    if not files:
        return "The package has no license file; the terms of the original model apply."
    links = ", ".join(f"[{name}]({name})" for name in files)
    return f"The license of the model is part of the package: {links}."


_VERIFY = """\
Check the package on your own device with the certificate in `parity/`; the original is not needed:

```
llama-onnx verify FOLDER
```

"""
