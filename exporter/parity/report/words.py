"""What a report says, in words: for the terminal, the page and a test's failure alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llama_onnx.exporter.parity.measure.long import LongContext
from llama_onnx.exporter.parity.measure.tokenizers import TokenizerCheck
from llama_onnx.exporter.parity.measure.validate import Greedy, ParityReport
from llama_onnx.exporter.parity.measure.weights import WeightError
from llama_onnx.runtime.measure.metrics import NEAR_TIE, Comparison, Divergence
from llama_onnx.runtime.measure.thresholds import Check, Threshold


def verdict(report: ParityReport) -> str:
    """ "passed: ..." or "failed: ...", one sentence that names each limit missed, and where."""
    missed = dict.fromkeys(check.threshold for check in report.checks if not check.passed)
    limits = ", ".join(_limit(row, report.checks) for row in missed)
    reasons = [f"{limits} beyond the limit"] if limits else []
    if report.tokenizer and not report.tokenizer.passed:
        reasons.append("the tokenizer is not the source's")
    return f"failed: {'; '.join(reasons)}." if reasons else "passed: every threshold holds."


def failure(report: ParityReport) -> Iterator[str]:
    """Why a package did not pass: each limit missed with the worst value, then where to look."""
    yield f"{report.package} is not {report.reference}:"
    missed = [check for check in report.checks if not check.passed]
    for row in dict.fromkeys(check.threshold for check in missed):
        worst_value = worst([check.value for check in missed if check.threshold == row])
        yield (
            f"  {_limit(row, report.checks)}: {worst_value:.2g}, limit {row.limit:g}: {row.reason}"
        )
    measures = {check.threshold.measure for check in missed}
    if "weights" in measures:
        yield f"  weights: {weights(report.weights)}"
    if "graph" in measures:
        yield f"  {_where(report)}"
    if report.tokenizer and not report.tokenizer.passed:
        yield f"  tokenizer: {tokenizer(report.tokenizer)}"


def _where(report: ParityReport) -> str:
    rows = (check.threshold for check in report.checks)
    limit = next((r.limit for r in rows if (r.measure, r.metric) == ("graph", "relative_l2")), 0.0)
    for layer in report.layers:
        if not layer.graph <= limit:  # a NaN is beyond any limit
            return f"the graph leaves the limit behind {layer.stage}: relative L2 {layer.graph:.2g}"
    return "the graph's hidden states are within the limit when fed in one pass"


def _limit(row: Threshold, checks: Iterable[Check]) -> str:
    """What is limited, and the situations in which the limit is missed."""
    held = {check.situation: check.passed for check in checks if check.threshold == row}
    missed = [situation for situation, passed in held.items() if situation and not passed]
    name = f"{row.measure} {row.metric}"
    if not missed:
        return name
    everywhere = len(missed) == len(held) > 1
    return f"{name} ({'in every situation' if everywhere else ', '.join(missed)})"


def weights(error: WeightError) -> str:
    """How far the farthest weight is, and where; the same of the largest value of a block."""
    text = f"{error.steps:.3g} steps from the original at most, in {error.tensor}"
    if not error.block_maximum:
        return text
    return (
        f"{text}; the largest of a block off by {error.block_maximum:.2g}, in {error.block_tensor}"
    )


def tokenizer(check: TokenizerCheck | None) -> str:
    """Whether a text has the same ids, and if not, where they part."""
    if check is None:
        return "not compared: there is no tokenizer in the source, or none in the package"
    if check.difference is None:
        return f"the ids of the source's {check.source} on {check.texts} texts, and their text"
    difference = check.difference
    if difference.found is None:
        return f"MISSING: the source has a {check.source}, the package no tokenizer.json"
    if difference.expected_text is not None:
        here = (difference.found_text or "")[:60]
        return (
            f"DIFFERS from the source's {check.source}: the ids of {difference.text[:60]!r} are "
            f"{difference.expected_text[:60]!r} there, {here!r} in the package"
        )
    part = slice(difference.position, difference.position + 8)
    text = repr(difference.text[:60]) + ("..." if len(difference.text) > 60 else "")
    return (
        f"DIFFERS from the source's {check.source} on {text}: from token {part.start + 1} on "
        f"{list(difference.expected[part])} there, {list(difference.found[part])} in the package"
    )


def ratio(value: float | None, error: float | None) -> str:
    """A perplexity ratio and its standard error."""
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def worst(values: list[float]) -> float:
    """The largest value; NaN is worse than any."""
    return next((value for value in values if value != value), max(values))


def is_near_tie(divergence: Divergence) -> bool:
    """Whether rounding alone may have decided between the two tokens."""
    return divergence.margin <= NEAR_TIE


def greedy(found: Greedy) -> Iterator[str]:
    """How many continuations are the reference's own, and where each other one parts from it."""
    what = {
        "graph": "fp32 activations, against the package's weights",
        "shipped": "as shipped, against the original weights",
    }
    yield (
        f"greedy, {what[found.name]}: {found.identical} of {len(found.divergences)} "
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
    """Every position that was looked at, those the model was never trained on named as such."""
    trained = f", trained on {trained_length:,}" if trained_length else ""
    yield f"context of {long.length:,} positions{trained}: relative L2 of graph and package, KL"
    for row in long.positions:
        beyond = ", beyond the trained length" if row.beyond_training else ""
        yield (
            f"  position {row.position + 1:,}: {row.graph:.1e}, {row.shipped:.1e}, "
            f"{row.kl:.1e}{beyond}"
        )


def cost(lost: Comparison) -> str:
    """What the weights' rounding takes from the model, for people who know no KL."""
    if lost.max_abs == 0:
        return "The weights are the original ones, to the bit."
    sentence = (
        f"With these weights the likeliest next token is the original's at {lost.same_top1:.1%} of "
        f"the positions, and the probabilities lie {lost.mean_kl:.2g} nats from the original's"
    )
    if lost.perplexity_ratio is None:
        return f"{sentence}."
    change = lost.perplexity_ratio - 1
    how = "higher" if change >= 0 else "lower"
    return f"{sentence}; the texts' perplexity is {abs(change):.2%} {how}."
