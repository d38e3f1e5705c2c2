"""The whole proof of a package, as `validate` and `export --prove` run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.trial import WITHOUT_KERNELS
from llama_onnx.exporter.parity.certify import certificate_prompts, write_certificate
from llama_onnx.exporter.parity.measure.evaluation import make_evaluation
from llama_onnx.exporter.parity.measure.open_subject import naming_altered, open_subject
from llama_onnx.exporter.parity.measure.prompts import TEXTS, make_prompts
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.sample import Sample, choose_sample
from llama_onnx.exporter.parity.measure.shipped import NO_PROMPTS, PromptSet
from llama_onnx.exporter.parity.measure.validate import validate
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.metrics import Ids
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, check_changeable
from llama_onnx.targets.progress import SILENT, Progress


def prove(
    package: Path,
    original: Checkpoint,
    *,
    texts: Sequence[str] = TEXTS,
    tokens: int | None = None,
    longest: int | None = None,
    max_kl: float | None = None,
    accept_loss: bool = False,
    thorough: bool = False,
    certify: bool = False,
    progress: Progress = SILENT,
) -> ParityReport:
    """Validate the package at `package` against the checkpoint `original`; see `prove_subject`."""
    return prove_subject(
        open_subject(package, original),
        texts=texts,
        tokens=tokens,
        longest=longest,
        max_kl=max_kl,
        accept_loss=accept_loss,
        thorough=thorough,
        certify=certify,
        progress=progress,
    )


def prove_subject(
    subject: Subject,
    *,
    texts: Sequence[str] = TEXTS,
    tokens: int | None = None,
    longest: int | None = None,
    max_kl: float | None = None,
    accept_loss: bool = False,
    thorough: bool = False,
    certify: bool = False,
    progress: Progress = SILENT,
) -> ParityReport:
    """Validate the package of `subject`, and write its certificate into it if it passes.

    It is measured on the first `longest` tokens of each of `texts`, continued by `tokens`, and with
    `thorough` up to the end of the context; `choose_sample` chooses what is None. `max_kl` (nats)
    also limits the loss against the original weights; `accept_loss` accepts what is beyond the
    limits of fidelity that the package's recipe has. The certificate is written only with
    `certify`, and if both verdicts allow it.

    Raises `UsageError` for a package that cannot be measured or certified, `PackageError` for one
    that cannot be run.
    """
    check_measurable(texts, tokens, longest)
    parameters = subject.original.config.num_parameters()
    sample = choose_sample(parameters, tokens, longest, thorough=thorough)
    weights = subject.weights
    if certify:
        _check_certifiable(subject)
    if weights.activations in WITHOUT_KERNELS:
        raise UsageError(
            f"{subject.path} has {weights.activations} activations, for which ONNX Runtime has no "
            "CPU kernels: validate an export with fp16 activations, which has the same graph in "
            "another type."
        )
    with naming_altered(subject.path):
        prompts = _prompts(subject, texts, sample)
        evaluation = make_evaluation(subject.path, weights.config, texts, sample.evaluation_tokens)
    report, evidence = validate(
        subject,
        PromptSet(prompts, sample.tokens),
        sample=sample,
        certificate_prompts=(
            certificate_prompts(subject.path, weights.config) if certify else NO_PROMPTS
        ),
        evaluation=evaluation,
        texts=texts,
        max_kl=max_kl,
        accept_loss=accept_loss,
        thorough=thorough,
        progress=progress,
    )
    if certify and report.accepted:
        write_certificate(ModelPackage.open(subject.path), report, evidence)
    return report


def _prompts(subject: Subject, texts: Sequence[str], sample: Sample) -> list[Ids]:
    longest = sample.prompt_tokens
    first, *others = make_prompts(
        subject.path, subject.weights.config, texts, tokens=sample.tokens, longest=longest
    )
    return [first, *(prompt[: sample.other_prompt_tokens] for prompt in others)]


def check_measurable(texts: Sequence[str], tokens: int | None, longest: int | None) -> None:
    """Raise `UsageError` for settings of `prove_subject` with which nothing can be measured."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError("texts must be a list of one or more strings: pass [text] for one text.")
    for name, value, least in (("tokens", tokens, 2), ("prompt_tokens", longest, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is {value!r}: use a whole number from {least} up.")


def _check_certifiable(subject: Subject) -> None:
    if subject.adapter is not None:
        raise UsageError("a certificate covers only the base: certify without --adapter.")
    check_changeable(ModelPackage.open(subject.path))
