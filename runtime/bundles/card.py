"""The model card of a package for the Hugging Face hub; it shows only what the package records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from llama_onnx.runtime.bundles.markdown import as_code, as_text
from llama_onnx.runtime.bundles.template_files import read_template
from llama_onnx.targets.errors import PackageError, describe_damage
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.licences import PACKAGE_CARD, TERMS, license_id, of_kind, title
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate

CERTIFICATE = "parity/certificate.json"

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

    Raises `PackageError` for a certificate without the figures that the card shows, and
    `MissingDependencyError` without huggingface_hub, which writes the metadata.
    """
    created = package.manifest.get("created_with")
    text = read_template("hub", "README.md").substitute(
        title=as_text(title),
        examples="".join(_examples(package, name)),
        source=_source(package),
        precision=as_code(package.precision),
        target=as_code(package.target),
        version=as_code(created.get("llama-onnx", "") if isinstance(created, dict) else ""),
        parity="\n".join(_parity(package, certificate)),
        verify=_VERIFY if certificate else "",
        licence=_licence(package),
    )
    return _card(_metadata(package) | _model_index(package, certificate, title), text)


def missing(package: ModelPackage, certificate: Certificate | None) -> Iterator[str]:
    """Yield a warning for each item that readers expect in a card but the package lacks."""
    names = _metadata(package)
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


def _card(metadata: Mapping[str, Any], text: str) -> str:
    """Return a card. Raises `MissingDependencyError` without huggingface_hub."""
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ModuleNotFoundError as error:
        raise missing_extra("a bundle for the hub", error.name, "hub") from None
    data = ModelCardData(**metadata)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=False))


def _metadata(package: ModelPackage) -> dict[str, Any]:
    metadata = {**_license(package), **_carried(package)}
    metadata |= {"library_name": "onnxruntime-genai", "pipeline_tag": "text-generation"}
    source = package.manifest["source"]
    if "commit" in source:
        metadata["base_model"] = str(source.get("name"))
        if package.precision in ("int4", "int8"):
            metadata["base_model_relation"] = "quantized"
    tags = ["onnx", "onnxruntime", "onnxruntime-genai", "llama-onnx", package.precision]
    return {**metadata, "tags": tags}


def _model_index(
    package: ModelPackage, certificate: Certificate | None, name: str
) -> dict[str, Any]:
    """Return the figures that the hub shows beside the card, in its own terms."""
    if certificate is None:
        return {}
    from huggingface_hub import EvalResult

    from llama_onnx.runtime.measure.claims import claimed_fidelity

    found = claimed_fidelity(package, certificate)
    if found is None:
        return {}
    metrics = {
        "kl_divergence": ("mean KL divergence from the original, nats", found.shipped.mean_kl),
        "same_top1": ("same likeliest token as the original", 1 - found.shipped.other_top1),
        "perplexity_ratio": ("perplexity, times the original's", found.shipped.perplexity_ratio),
    }
    text = "llama-onnx's held-out text" if found.text == "built-in" else "a text of the maker"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"llama-onnx-{found.text}",
            dataset_name=text,
            metric_type=kind,
            metric_name=words,
            metric_value=round(value, 6),
        )
        for kind, (words, value) in metrics.items()
    ]
    return {"model_name": name, "eval_results": results}


def _carried(package: ModelPackage) -> dict[str, Any]:
    if PACKAGE_CARD not in package.files:
        return {}
    import yaml  # comes with huggingface_hub

    card = (package.path / PACKAGE_CARD).read_text("utf-8", "replace")
    head = re.match(r"---\n(.*?)\n---\s", card, re.DOTALL)
    carried: dict[str, Any] = {}
    for match in _CARRIED.finditer(head[1] if head else ""):
        # A line that YAML reads in another way, such as `language: ["a]`, is not carried.
        with suppress(yaml.YAMLError, ValueError, TypeError):
            # Every value as text: to YAML 1.1, the language `no` is false.
            carried |= yaml.load(match[0], Loader=yaml.BaseLoader)
    return carried


def _license(package: ModelPackage) -> dict[str, str]:
    files = of_kind(package.files, "license", "notice")
    for name in files:
        if known := license_id(title(package.path / name)):
            return {"license": known}
    if not files:
        return {"license": "unknown"}
    name = Path(files[0]).stem.lower()
    return {"license": "other", "license_name": name, "license_link": files[0]}


# ---- text ----------------------------------------------------------------------------------------


def _source(package: ModelPackage) -> str:
    source = package.manifest["source"]
    name = as_code(source.get("name", "a model"))
    return f"{name} (commit {as_code(source['commit'])})" if "commit" in source else name


def _parity(package: ModelPackage, certificate: Certificate | None) -> list[str]:
    if certificate is None:
        return ["This package has no certificate: its loss against the original is not recorded."]
    try:
        return [
            *_fidelity(package, certificate),
            *_evaluated(package, certificate),
            *_task_scores(package, certificate),
            *_figures(certificate.content),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # `read_certificate` does not check these entries.
        raise PackageError(
            f"{package.path / CERTIFICATE} is damaged: {describe_damage(error)}."
        ) from None


def _fidelity(package: ModelPackage, certificate: Certificate) -> Iterator[str]:
    """Yield how close the package is to its original, if the certificate has that."""
    from llama_onnx.runtime.measure.claims import claimed_fidelity

    found = claimed_fidelity(package, certificate)
    if found is None:
        return
    missed = found.missed
    yield (
        f"**Fidelity to the original: {found.grade}.** On {found.shipped.positions:,} positions of "
        f"a text that no calibration used: {found.shipped}."
    )
    if not found.trained:
        yield "The original itself predicts that text no better than chance, so no limit applies."
    elif missed:
        yield (
            f"This is beyond the limits of the recipe `{found.recipe}`; whoever made the package "
            "accepted it."
        )
    else:
        yield f"This is within the limits of the recipe `{found.recipe}`."
    yield ""


def _evaluated(package: ModelPackage, certificate: Certificate) -> Iterator[str]:
    """Yield what was measured over a corpus, if the certificate has that."""
    from llama_onnx.runtime.measure.claims import claimed_evaluation

    found = claimed_evaluation(package, certificate)
    if found is None:
        return
    yield (
        f"**Evaluated over a corpus**, {as_code(found.text)} (SHA-256 "
        f"{as_code(found.sha256[:16])}), in {found.figures.passages:,} passages of up to "
        f"{found.length} tokens: {found.sentence()}. In brackets: 95 % confidence intervals, "
        "normal over passages."
    )
    yield ""


def _task_scores(package: ModelPackage, certificate: Certificate) -> Iterator[str]:
    """Yield the scores on tasks, if the certificate has some."""
    from llama_onnx.runtime.measure.claims import claimed_scores

    for found in claimed_scores(package, certificate):
        scores = (f"{as_text(score.name)} {score.sentence()}" for score in found.scores)
        yield (
            f"**Task {as_code(found.task)}** (SHA-256 {as_code(found.sha256[:16])}), "
            f"{found.documents:,} documents, lm-eval {as_code(found.lm_eval)}: "
            f"{'; '.join(scores)}. In brackets: 95 % confidence intervals, normal over documents."
        )
        yield ""


def _figures(content: Mapping[str, Any]) -> Iterator[str]:
    report = content["validated"]
    figures = {(row["error"], row["situation"]): row["figures"] for row in report["measurements"]}
    versions = content["created_with"]
    yield (
        f"**Conversion: {'all thresholds hold' if report['passed'] else 'NOT all thresholds hold'}"
        f".** Measured against the original in PyTorch at {report['positions']:,} positions, on "
        f"{as_code(report['provider'])} with onnxruntime {as_code(versions['onnxruntime'])}. "
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
                f"Of {len(row['divergences'])} greedy continuations of {int(row['tokens'])} "
                f"tokens, {int(row['identical'])} are identical to the original's."
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
    links = ", ".join(f"[{as_text(name)}]({quote(name)})" for name in files)
    return f"The license of the model is part of the package: {links}."


_VERIFY = """\
Check the package on your own device with the certificate in `parity/`; the original is not needed:

```
llama-onnx verify FOLDER
```

"""
