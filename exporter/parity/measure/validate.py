"""Measures whether a package is the model it was made from, each kind of error separately.

    weights        every weight of the package        against  its original
    rotary         its rotary tables                  against  those of transformers
    graph          the graph, fp32 activations        against  PyTorch on the package's weights
    shipped        onnxruntime, as shipped            against  PyTorch on the package's weights
    quantization   PyTorch on the package's weights   against  PyTorch on the original weights
    total          onnxruntime, as shipped            against  PyTorch on the original weights
    fidelity       the last two again                 on real text, and graded in words

The graph's error must be at rounding level in every precision: a check that mixes it with the
quantization's can hide a bug behind int4. The graph and the session are measured on token ids, in
every situation of `runtime.measure.situations`; the tokenizer is compared separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.parity.measure.about import About, describe
from llama_onnx.exporter.parity.measure.evaluation import Evaluation
from llama_onnx.exporter.parity.measure.evidence import Evidence, gather
from llama_onnx.exporter.parity.measure.figures import (
    curves,
    greedy_continuations,
    measurements,
)
from llama_onnx.exporter.parity.measure.long import LongContext, measure_long
from llama_onnx.exporter.parity.measure.loss import Lost
from llama_onnx.exporter.parity.measure.report import Greedy, Measurement, ParityReport
from llama_onnx.exporter.parity.measure.rotary import rotary_error
from llama_onnx.exporter.parity.measure.sample import Sample
from llama_onnx.exporter.parity.measure.shipped import NO_PROMPTS, PromptSet
from llama_onnx.exporter.parity.measure.stages import Stages
from llama_onnx.exporter.parity.measure.tokenizers import check_tokenizer
from llama_onnx.exporter.parity.measure.weights import (
    WeightError,
    compare_weights,
    quantizer_of,
)
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.fidelity import Fidelity, Loss, recipe_of
from llama_onnx.runtime.measure.situations import LONG_CONTEXT, Situation, situations_of
from llama_onnx.runtime.measure.thresholds import check, thresholds
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.providers import CPU


def validate(
    subject: Subject,
    prompts: PromptSet,
    *,
    certificate_prompts: PromptSet = NO_PROMPTS,
    evaluation: Evaluation | None = None,
    sample: Sample | None = None,
    texts: Sequence[str] = (),
    situations: Sequence[Situation] | None = None,
    max_kl: float | None = None,
    accept_loss: bool = False,
    thorough: bool = False,
    progress: Progress = SILENT,
) -> tuple[ParityReport, Evidence]:
    """Measure the package of `subject` on `prompts`.

    The two tokenizers are compared on a fixed set of texts and on `texts`. `situations` are by
    default all that apply to the graph. `thorough` also goes to the end of the context. Fidelity is
    measured on the `evaluation`. `sample`, for the report, is how much of the texts both are.
    `max_kl` (nats) limits the loss against the original weights; `accept_loss` accepts what is
    beyond the limits of the recipe. The evidence returned with the
    report has both references' logits on `certificate_prompts` too.

    Raises `PackageError` when the package cannot be run.
    """
    weights = subject.weights
    stages = Stages()
    with stages.timed("tokenizer"):
        tokenizer = check_tokenizer(subject.path, subject.original, texts)
    if situations is None:
        situations = _situations(subject, sample)
    sequences = evaluation.sequences if evaluation else ()
    evidence = gather(subject, prompts, certificate_prompts, situations, sequences, progress)
    stages.seconds.update(evidence.seconds)
    with stages.timed("weights"):
        distance = compare_weights(weights, subject.rounded_from, progress)
    trained, long = _trained_length(subject.original), None
    if thorough:
        with stages.timed("long context"):
            long = measure_long(subject, prompts.prompts, trained, progress)
    with stages.timed("figures"):
        measured = (*measurements(evidence), *_of_long_context(long))
    greedy = greedy_continuations(evidence)
    kind = (weights.precision, weights.activations, "cpu")
    limits = thresholds(*kind, max_kl, quantizer_of(subject.path))
    with stages.timed("files"):
        about = describe(subject, _tokens_named_in(greedy))
    report = ParityReport(
        package=str(subject.path),
        original=_name(subject.adapted_original),
        precision=weights.precision,
        activations=weights.activations,
        provider=CPU.ort_name,
        positions=sum(len(passage.ids) for passage in evidence.shipped.passages),
        trained_length=trained,
        measurements=measured,
        greedy=greedy,
        layers=evidence.layers,
        curves=tuple(curves(evidence)),
        weights=distance,
        checks=check(limits, _values(subject, measured, distance, greedy[0])),
        tokenizer=tokenizer,
        long=long,
        speed=evidence.shipped.speed,
        about=about,
        fidelity=_fidelity(subject, about, evaluation, evidence.lost, max_kl, accept_loss),
        passages=evidence.shipped.passages,
        sample=sample,
        seconds=stages.seconds,
    )
    return report, evidence


def _situations(subject: Subject, sample: Sample | None) -> Sequence[Situation]:
    short = sample is not None and sample.reduced
    return situations_of(shared_buffer=subject.weights.ragged, short=short)


def _fidelity(
    subject: Subject,
    about: About,
    evaluation: Evaluation | None,
    lost: Lost | None,
    max_kl: float | None,
    accept_loss: bool,
) -> Fidelity | None:
    if evaluation is None or lost is None:
        return None
    config, recipe = subject.original.config, subject.manifest.get("recipe", {})
    return Fidelity(
        recipe=recipe_of(recipe, subject.weights.precision, about.bits_per_weight),
        parameters=config.num_parameters(),
        text=evaluation.text,
        original_perplexity=lost.original_perplexity,
        vocab_size=config.vocab_size,
        shipped=Loss.of(lost.shipped),
        weights=Loss.of(lost.weights),
        max_kl=max_kl,
        accepted=accept_loss,
    )


def _values(
    subject: Subject, measured: Iterable[Measurement], distance: WeightError, greedy: Greedy
) -> Mapping[tuple[str, str, str], float]:
    """Return the values to compare with thresholds, by (measure, situation, metric)."""
    values = {
        (m.error, m.situation, metric): value
        for m in measured
        for metric, value in asdict(m.figures).items()
        if value is not None
    }
    for metric, worst in vars(distance).items():
        if worst is not None:
            values["weights", "", metric] = worst.value
    rotary = rotary_error(subject.load_graph(), subject.weights.config)
    if rotary is not None:
        values["rotary", "", "max_abs"] = rotary.max_abs
    values["greedy", "", "divergences"] = len(greedy.divergences) - greedy.identical
    return values


def _of_long_context(long: LongContext | None) -> Iterable[Measurement]:
    figures = long.figures if long else {}
    return [Measurement(error, LONG_CONTEXT.name, found) for error, found in figures.items()]


def _tokens_named_in(greedy: Iterable[Greedy]) -> set[int]:
    divergences = [d for one in greedy for d in one.divergences if d is not None]
    return {token for d in divergences for token in (d.chosen, d.expected)}


def _name(checkpoint: Checkpoint) -> str:
    return " + ".join(map(str, (checkpoint.path, *adapters_of(checkpoint))))


def _trained_length(original: Checkpoint) -> int | None:
    config, scaling = original.config, original.config.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "linear":  # it has no key for that length
        return int(config.max_position_embeddings / scaling.factor)
    return scaling.original_max_position_embeddings
