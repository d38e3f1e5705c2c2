"""The sentences of a report, shared by the terminal, the page and a test's failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.about import About
from llama_onnx.exporter.parity.measure.long import LongContext
from llama_onnx.exporter.parity.measure.report import Greedy, ParityReport, Verdict
from llama_onnx.exporter.parity.measure.sample import LARGE, Sample
from llama_onnx.exporter.parity.measure.tokenizers import (
    Difference,
    TokenizerCheck,
    VocabularyDifference,
)
from llama_onnx.exporter.parity.measure.weights import WeightError
from llama_onnx.runtime.measure.fidelity import ASKED_FOR, Fidelity, Limit
from llama_onnx.runtime.measure.metrics import NEAR_TIE, Comparison, Divergence
from llama_onnx.runtime.measure.thresholds import NEAREST

LOSSES = (
    ("package's weights", "quantization", ""),
    ("shipped, one pass", "total", "prefill"),
    ("shipped, by token", "total", "decode"),
)
"""Comparisons with the original weights: what is compared, error, situation."""

GREEDY = {
    "graph": "fp32 activations, against the package's weights",
    "shipped": "as shipped, against the original weights",
}
"""What the greedy continuations of a name compare."""


def verdict(report: ParityReport) -> str:
    """Return "passed: ..." or "failed: ...", one sentence that names each missed limit and the
    situations in which it is missed."""
    failed = [found for found in report.verdicts() if not found.passed]
    limits = ", ".join(_limit(found) for found in failed if found.measure not in _ON_FILES)
    reasons = [f"{limits} beyond the limit"] if limits else []
    measures = {found.measure for found in failed}
    reasons += ["the tokenizer is not the source's"] if "tokenizer" in measures else []
    reasons += [files(report.about)] if "files" in measures else []
    return f"failed: {'; '.join(reasons)}." if reasons else "passed: every threshold holds."


_ON_FILES = ("tokenizer", "files")

NOT_MEASURED = "not measured: without a tokenizer there is no text to measure it on"

_ORDER = ("int4 rtn", "small", "default", "best", "careful", "int8", "fp16", "fp32")
"""Recipes, each losing less than the one before it. `fast` has the limits of `default`, and is not
advised: it spends bytes to save time."""


def fidelity(found: Fidelity | None) -> tuple[str, str]:
    """Return the grade and the figures it is based on, as "close" and a sentence without a full
    stop."""
    if found is None:
        return "not graded", NOT_MEASURED
    text = "" if found.text == "built-in" else ", on the text given"
    return found.grade, f"{found.shipped}{text}"


def limits(found: Fidelity | None) -> Iterator[str]:
    """Yield which limits of fidelity hold or are missed, and what to do about a loss."""
    if found is None:
        return
    if not found.trained:
        yield (
            f"no limit: the original's perplexity is {found.original_perplexity:,.0f}, and there "
            f"are {found.vocab_size:,} tokens, so it has not learned this text: its weights are "
            "random, or the text is of another kind"
        )
    elif not found.limits:
        yield f"no limit: the table has none for {found.recipe}"
    elif found.passed:
        yield f"within the limits of {found.recipe}"
    for basis in dict.fromkeys(limit.basis for limit in found.missed):
        yield _beyond(found, [limit for limit in found.missed if limit.basis == basis])
    if found.missed and found.allowed:
        yield "the loss is accepted"
    elif found.missed or (found.trained and found.grade in LOSES_MUCH):
        yield from advice(found)


LOSES_MUCH = ("noticeably different", "another model")


_METRICS = {
    "mean_kl": "mean KL",
    "other_top1": "share of other likeliest tokens",
    "perplexity_ratio": "perplexity ratio",
}


def _beyond(found: Fidelity, missed: Sequence[Limit]) -> str:
    """Return which limits of one basis are `missed`, and their reason, which they share."""
    said = "; ".join(
        f"{_METRICS[limit.metric]} {limit.value:.3g}, limit {limit.limit:g}" for limit in missed
    )
    if missed[0].basis == ASKED_FOR:
        return f"beyond the limit asked for: {said}"
    return f"beyond the limits of {found.recipe}: {said} ({missed[0].basis}: {missed[0].reason})"


def advice(found: Fidelity) -> Iterator[str]:
    """Yield how to lose less than the recipe of `found` does, with options that there are."""
    recipe = "default" if found.recipe == "fast" else found.recipe
    place = _ORDER.index(recipe) if recipe in _ORDER else len(_ORDER)
    presets = _choices("preset")
    better = [f"--preset {name}" for name in _ORDER[place + 1 :] if name in presets][:2]
    if found.recipe == "int4 rtn" and not better:
        better = [f"--quantizer {name}" for name in _choices("quantizer") if name != NEAREST][:1]
    if place < _ORDER.index("int8"):
        better.append("--precision int8")
    elif found.recipe in ("int8", "fp16"):
        better.append(f"--precision {_ORDER[place + 1]}")
    if better:
        yield f"to lose less, export with {' or '.join(f'`{option}`' for option in better)}"


def _choices(option: str) -> tuple[str, ...]:
    found = next((field for field in fields(Options) if field.name == option), None)
    return tuple(found.metadata["choices"]) if found else ()


def failure(report: ParityReport) -> Iterator[str]:
    """Yield the reasons why a package did not pass: each missed limit with the worst value, then
    where to look; then the same about fidelity."""
    if report.passed:
        yield f"{report.package} loses too much against {report.original}:"
    else:
        yield f"{report.package} differs from {report.original}:"
    yield from _conversion(report)
    if report.fidelity and not report.fidelity.allowed:
        yield f"  fidelity: {': '.join(fidelity(report.fidelity))}"
        yield from (f"  fidelity: {line}" for line in limits(report.fidelity))


def _conversion(report: ParityReport) -> Iterator[str]:
    failed = [found for found in report.verdicts() if not found.passed]
    for found in failed:
        if found.measure not in _ON_FILES:
            yield f"  {_limit(found)}: {found.worst:.2g}, limit {found.limit:g}: {found.reason}"
    measures = {found.measure for found in failed}
    if "weights" in measures:
        yield f"  weights: {weights(report.weights)}"
    if "graph" in measures:
        yield f"  {_first_wrong_layer(report)}"
    if "tokenizer" in measures:
        yield f"  tokenizer: {tokenizer(report.tokenizer)}"
    if "files" in measures:
        yield f"  files: {files(report.about)}"


def _first_wrong_layer(report: ParityReport) -> str:
    limit = report.limit("graph", "relative_l2") or 0.0
    for layer in report.layers:
        if not layer.graph <= limit:  # a NaN is beyond any limit
            return f"the graph exceeds the limit after {layer.stage}: relative L2 {layer.graph:.2g}"
    return "the graph's hidden states are within the limit in one pass"


def _limit(found: Verdict) -> str:
    """Return the verdict's name, and the situations in which the limit is missed."""
    return f"{found.name} ({found.where})" if found.where else found.name


def weights(error: WeightError) -> str:
    """Return the distance of the farthest weight and its tensor; the same for whole blocks."""
    text = f"{error.steps.value:.3g} steps from the original at most, in {error.steps.tensor}"
    if blocks := error.block_rms:
        text += f"; a block {blocks.value:.2g} (root mean square), in {blocks.tensor}"
    if error.block_maximum and error.block_maximum.value:
        largest = error.block_maximum
        text += f"; block maximum off by {largest.value:.2g} at most, in {largest.tensor}"
    return text


def tokenizer(check: TokenizerCheck | None) -> str:
    """Return whether the tokenizer is the source's, and if not, the first differences."""
    if check is None:
        return "not compared: there is no tokenizer in the source, or none in the package"
    if check.passed:
        return (
            f"same {check.tokens:,} tokens as the source's {check.source}, and the same ids and "
            f"text on {check.texts} texts"
        )
    if check.difference and check.difference.found is None:
        return f"MISSING: the source has a {check.source}, the package has no tokenizer.json"
    parts = [_text_difference(check.difference)] if check.difference else []
    parts += [_vocabulary_difference(check.vocabulary)] if check.vocabulary else []
    return f"DIFFERS from the source's {check.source} {'; '.join(parts)}"


def _text_difference(difference: Difference) -> str:
    text = repr(difference.text[:60]) + ("..." if len(difference.text) > 60 else "")
    if difference.expected_text is not None:
        found = (difference.found_text or "")[:60]
        return (
            f"on {text}: the ids decode to {difference.expected_text[:60]!r} in the source, "
            f"to {found!r} in the package"
        )
    part = slice(difference.position, difference.position + 8)
    found_ids = list((difference.found or ())[part])
    return (
        f"on {text}: from token {part.start + 1} on {list(difference.expected[part])} in the "
        f"source, {found_ids} in the package"
    )


def _vocabulary_difference(difference: VocabularyDifference) -> str:
    what = {"id to piece": "token", "piece to id": "id of", "id to special": "kind of token"}
    answers = (difference.expected, difference.found)
    expected, found = ("none" if answer is None else repr(answer) for answer in answers)
    return (
        f"in {difference.count:,} entries of the vocabulary: {what[difference.direction]} "
        f"{difference.key!r} is {expected} in the source, {found} in the package"
    )


def files(about: About) -> str:
    """Return which files differ from the manifest."""
    if not about.altered:
        return "all as in the manifest"
    verb = "is" if len(about.altered) == 1 else "are"
    return f"{', '.join(about.altered)} {verb} missing or changed since the export"


def ratio(value: float | None, error: float | None) -> str:
    """Return a perplexity ratio with its standard error."""
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def is_near_tie(divergence: Divergence) -> bool:
    """Return whether rounding may have decided between the two tokens."""
    return divergence.margin <= NEAR_TIE


def greedy(found: Greedy) -> Iterator[str]:
    """Yield how many continuations equal the reference's, and where each other one differs."""
    yield (
        f"greedy, {GREEDY[found.name]}: {found.identical} of {len(found.divergences)} "
        f"continuations of {found.tokens} tokens identical, {found.agreement:.1%} of tokens"
    )
    for index, divergence in enumerate(found.divergences):
        if divergence is not None:
            tie = ", a near-tie" if is_near_tie(divergence) else ""
            yield (
                f"  prompt {index + 1}: token {divergence.step + 1} is {divergence.chosen}, the "
                f"reference has {divergence.expected} ahead by {divergence.margin:.2g} logits{tie}"
            )


def long_context(long: LongContext, trained_length: int | None) -> Iterator[str]:
    """Yield the errors at every position measured, and whether the model was trained on it."""
    trained = f", trained on {trained_length:,}" if trained_length else ""
    yield f"context of {long.length:,} positions{trained}: relative L2 of graph and package, KL"
    for row in long.positions:
        beyond = ", beyond the trained length" if row.beyond_training else ""
        yield (
            f"  position {row.position + 1:,}: {row.graph:.1e}, {row.shipped:.1e}, "
            f"{row.kl:.1e}{beyond}"
        )


def cost(lost: Comparison) -> str:
    """Return what quantizing the weights costs, for people who do not know KL."""
    if lost.max_abs == 0:
        return "The package's weights are the original weights, bit for bit."
    sentence = (
        "With the package's weights, the likeliest next token is the original's at "
        f"{lost.same_top1:.1%} of the positions, and the mean KL divergence from the original's "
        f"probabilities is {lost.mean_kl:.2g} nats"
    )
    if lost.perplexity_ratio is None:
        return f"{sentence}."
    change = lost.perplexity_ratio - 1
    how = "higher" if change >= 0 else "lower"
    return f"{sentence}; the perplexity of the texts is {abs(change):.2%} {how}."


def sampled(sample: Sample | None) -> str:
    """Return what was read of a large model, and how to read more; "" if nothing was left out."""
    if sample is None or not sample.reduced:
        return ""
    return (
        f"{sample.prompt_tokens} tokens of the first prompt, {sample.other_prompt_tokens} of each "
        f"other, {sample.tokens} after each, {sample.evaluation_tokens} for fidelity, as of every "
        f"model from {LARGE // 10**9} billion parameters on; --tokens 64 reads all that is read of "
        "a smaller one"
    )
