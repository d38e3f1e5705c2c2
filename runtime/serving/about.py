"""What a server tells about its package: what it is, how far from the original, whether verified.

Every figure is from the certificate, whose maker measured it: without the original nobody can
measure it here. Whether this machine computes the certified results is what `verify` finds.
"""

from __future__ import annotations

from typing import Any

from llama_onnx.runtime.llama.backends import Opened
from llama_onnx.runtime.llama.text_files import read_settings
from llama_onnx.runtime.measure.certificate import (
    CERTIFICATE,
    FOLDER,
    read_certificate,
    stale_files,
)
from llama_onnx.runtime.measure.claims import check_claims, claimed_fidelity
from llama_onnx.runtime.measure.fidelity import Fidelity, grades
from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import printable_line

NO_CERTIFICATE = (
    "The package has no certificate, so its distance from the original is not recorded: export it "
    "with --prove."
)


def about(
    package: ModelPackage,
    opened: Opened,
    verification: VerifyReport | None,
    *,
    context_length: int | None = None,
) -> dict[str, Any]:
    """Return what `GET /about` answers, as JSON values.

    `opened` is what runs `package`, `verification` the result of `verify`, None if it did not run.
    `context_length` is the server's own limit, None: the package's.
    """
    if context_length is None:
        context_length = int(read_settings(package.path)["context_length"])
    source = package.manifest["source"]
    return {
        "name": _text(package.path.resolve().name),
        "source": _text(source.get("name")),
        "commit": _text(source.get("commit")),
        "precision": package.precision,
        "bytes": sum(entry["size"] for entry in package.files.values()),
        "provider": opened.provider.name,
        "fallback": _text(opened.fallback),
        "context_length": context_length,
        "adapters": [printable_line(name) for name in package.adapters],
        "distance": _distance(package),
        "verified": verified(verification),
    }


def _distance(package: ModelPackage) -> dict[str, Any]:
    """Return the grade in words, its sentence and its figures, None without a proof."""
    nothing = {"grade": None, "grades": [row.name for row in grades()], "figures": None}
    if f"{FOLDER}/{CERTIFICATE}" not in package.files:
        return {**nothing, "sentence": NO_CERTIFICATE}
    try:
        certificate = read_certificate(package.path)
        check_claims(package, certificate)
        found = claimed_fidelity(package, certificate)
    except PackageError as error:
        return {
            **nothing,
            "sentence": f"The certificate cannot be used: {printable_line(str(error))}",
        }
    if stale := stale_files(certificate, package):
        names = printable_line(", ".join(stale))
        text = f"The certificate was made for a different {names}, so it says nothing about this."
        return {**nothing, "sentence": text}
    if found is None:
        text = "The certificate is from before the distance from the original was measured."
        return {**nothing, "sentence": text}
    lost = found.shipped
    figures = {
        "mean_kl": lost.mean_kl,
        "mean_kl_error": lost.mean_kl_error,
        "same_top1": 1 - lost.other_top1,
        "perplexity_ratio": lost.perplexity_ratio,
        "positions": lost.positions,
    }
    return {**nothing, "grade": found.grade, "figures": figures, "sentence": _sentence(found)}


def _sentence(found: Fidelity) -> str:
    text = "a text that no calibration used" if found.text == "built-in" else "the maker's own text"
    if not found.trained:
        limits = "The original itself predicts that text no better than chance, so no limit applies"
    elif found.missed:
        limits = f"This is beyond the limits of the recipe {found.recipe}; the maker accepted it"
    else:
        limits = f"This is within the limits of the recipe {found.recipe}"
    return (
        f"Measured by the maker of the package on {found.shipped.positions:,} positions of {text}. "
        f"{limits}."
    )


def verified(report: VerifyReport | None) -> dict[str, str]:
    """Return what the page says about the result of `verify`, None if it did not run."""
    if report is None:
        text = "Not verified on this machine: start the server with --verify."
        return {"state": "not run", "sentence": text}
    if report.passed and report.placement:
        text = (
            f"All {report.integrity.files} files are intact, and the package computes the "
            f"certified results on this machine, with {report.provider}."
        )
        return {"state": "verified", "sentence": text}
    if report.passed:  # only the files were checked
        text = (
            f"All {report.integrity.files} files are intact, but the certificate was not replayed."
        )
        return {"state": "not run", "sentence": text}
    return {
        "state": "failed",
        "sentence": f"{_problem(report)} Run `llama-onnx verify` for details.",
    }


def _problem(report: VerifyReport) -> str:
    """Return the first thing that is wrong, as a sentence."""
    whole = report.integrity
    changed = (*whole.altered, *whole.stale, *whole.unknown)
    if report.signature.problem:
        return f"The signature is not valid: {printable_line(report.signature.problem)}."
    if changed:
        first = printable_line(changed[0])
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{first}{more} changed since the package was made or certified."
    if whole.tokens is False:
        return "tokenizer.json produces tokens that differ from the certificate's."
    missed = [check.threshold for check in report.checks if not check.passed]
    names = ", ".join(sorted({f"{row.measure} {row.metric}" for row in missed}))
    return f"This machine does not compute the certified results: {names} is above its limit."


def _text(value: object) -> str | None:
    return printable_line(value) if isinstance(value, str) else None
