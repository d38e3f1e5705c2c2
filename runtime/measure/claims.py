"""What a certificate says about its package, checked: the limits that hold depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llama_onnx.runtime import ort
from llama_onnx.runtime.measure.certificate import (
    CERTIFICATE,
    COVERED_FILES,
    FOLDER,
    Certificate,
)
from llama_onnx.runtime.measure.evaluated import KEY, Evaluated
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.task_scores import KEY as SCORES_KEY
from llama_onnx.runtime.measure.task_scores import TaskScores
from llama_onnx.targets.errors import PackageError, describe_damage
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.package import ModelPackage

_T = TypeVar("_T")


def check_claims(package: ModelPackage, certificate: Certificate) -> None:
    """Raise `PackageError` for a certificate of another kind of package: the limits depend on it.

    Raises it also for one that does not cover a file that decides what the package computes.
    """
    content, file = certificate.content, package.path / FOLDER / CERTIFICATE
    if content["precision"] != package.precision:
        raise PackageError(
            f"{file} is for {content['precision']}, but the package is {package.precision}: make a "
            "new one with `llama-onnx validate --certify`."
        )
    for name in COVERED_FILES:
        if name in package.files and name not in content["files"]:
            raise PackageError(f"{file} is damaged: it does not cover {name}.")


def claimed_fidelity(package: ModelPackage, certificate: Certificate) -> Fidelity | None:
    """Return the fidelity that the maker measured, None in a certificate from before 0.2.

    It cannot be measured here, without the original. Raises `PackageError` for one that nobody
    could have measured.
    """
    validated = certificate.content.get("validated")
    claim = validated.get("fidelity") if isinstance(validated, dict) else None
    return _claimed(package, claim, Fidelity.from_json)


def claimed_evaluation(package: ModelPackage, certificate: Certificate) -> Evaluated | None:
    """Return what the maker found over a corpus, None if the certificate does not say.

    Raises `PackageError` for what nobody could have measured.
    """
    return _claimed(package, certificate.content.get(KEY), Evaluated.from_json)


def claimed_scores(package: ModelPackage, certificate: Certificate) -> list[TaskScores]:
    """Return the maker's scores on tasks, none if the certificate has none.

    Raises `PackageError` for what nobody could have measured.
    """

    def read(claim: Any) -> list[TaskScores]:
        if not isinstance(claim, list):
            raise TypeError("not a list")
        return [TaskScores.from_json(task) for task in claim]

    return _claimed(package, certificate.content.get(SCORES_KEY), read) or []


def _claimed(package: ModelPackage, claim: Any, read: Callable[[Any], _T]) -> _T | None:
    if claim is None:
        return None
    try:
        return read(claim)
    except (KeyError, TypeError, ValueError) as error:
        file = package.path / FOLDER / CERTIFICATE
        raise PackageError(f"{file} is damaged: {describe_damage(error)}.") from None


def check_activations(package: ModelPackage, activations: str, session: ort.Session) -> None:
    """Raise `PackageError` unless the package can have such activations: they allow larger errors.

    Only quantized matrices round them to int8; in half precision the logits have that type too.
    """
    logits = next(output.type for output in session.get_outputs() if output.name == LOGITS)
    rounded = ("int8",) if package.precision in ("int8", "int4") else ()
    possible = {"tensor(float16)": ("fp16",), "tensor(bfloat16)": ("bf16",)}
    if activations not in possible.get(logits, ("fp32", *rounded)):
        raise PackageError(
            f"{package.path / FOLDER / CERTIFICATE} is damaged: the package does not have "
            f"{activations} activations."
        )
