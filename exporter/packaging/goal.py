"""What a package may take, and what it may lose: a goal, which decides how matrices are stored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llama_onnx.exporter.graph.names import EMBEDDING, HEAD
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.packaging.options import Minimize, Options
from llama_onnx.exporter.quantize.registry import CALIBRATED
from llama_onnx.runtime.measure.fidelity import limits_of
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.sizes import parse_size
from llama_onnx.targets.target import Target

_FAST_SHARE = 0.8
"""Of the limit of "fast" for the loss, what is used unless `--max-kl` says otherwise: a prediction
is not exact, and another text may lose more."""


@dataclass(frozen=True)
class Goal:
    """What a package may take, and what it may lose; with a largest loss, `minimize` says what is
    as small as that allows. `text` is the budget as the user gave it; `fixed` are the matrices
    whose storage the user chose."""

    text: str | None
    nbytes: int | None
    max_kl: float | None
    fixed: frozenset[str] = frozenset()
    minimize: Minimize = "size"


def goal_of(options: Options, parameters: int) -> Goal | None:
    """Return the goal that `--budget`, `--max-kl` and `--minimize` set; None without them.

    Raises `UsageError` for what is no budget, and for options that say two things.
    """
    budget, max_kl, minimize = options.budget, options.max_kl, options.minimize
    if budget is None and max_kl is None and minimize is None:
        return None
    if options.recipe is not None:
        raise UsageError(
            "--recipe says how each matrix is stored, which is what --budget, --max-kl and "
            "--minimize decide: leave them out, or the recipe."
        )
    if minimize == "time" and budget is not None:
        raise UsageError(
            "--budget makes a package as good as its size allows, and --minimize time as fast as "
            "its loss allows: pass only one."
        )
    if minimize == "time" and max_kl is None:
        max_kl = _usual_loss(parameters)
    if minimize == "size" and max_kl is None:
        raise UsageError("--minimize size needs --max-kl, such as 0.05: the most that may be lost.")
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise UsageError(f"--max-kl {max_kl} is not a number above 0, such as 0.05.")
    nbytes = None if budget is None else budget_bytes(budget, parameters)
    fixed = {EMBEDDING: options.embedding, HEAD: options.head}
    names = frozenset(name for name in fixed if fixed[name])
    return Goal(budget, nbytes, max_kl, names, minimize or "size")


def _usual_loss(parameters: int) -> float:
    limits = limits_of("fast", parameters)
    assert limits is not None, "the table has every preset"
    return _FAST_SHARE * limits.mean_kl


def check_goal(goal: Goal | None, recipe: Recipe, target: Target) -> None:
    """Raise `UsageError` if there is nothing that `goal` could decide on `target`."""
    if goal is None:
        return
    what = "a budget" if goal.text else "a largest KL divergence"
    if goal.minimize == "time":
        what = "the least time"
        if target.session.provider != CPU or recipe.accuracy_level != 4:
            raise UsageError(
                "--minimize time, which --preset fast sets, knows the times of the CPU's kernels "
                f"in int8, not those of the target {target.name} at accuracy level "
                f"{recipe.accuracy_level}: choose the target cpu, or a preset for size."
            )
    if recipe.linear.name != "int4":
        raise UsageError(
            f"{what} decides how codes are stored, and a package of {recipe.precision} leaves no "
            "choice: use --precision int4."
        )
    if recipe.operators.standard:
        raise UsageError(
            f"{what} needs an operator that reads codes of several sizes, which the target does "
            "not have: leave it out."
        )
    if recipe.source_codes:
        raise UsageError(
            f"{what} decides how matrices are stored, and the source is quantized already: leave "
            "it out, and its codes are kept."
        )
    if recipe.quantizer not in CALIBRATED:
        raise UsageError(
            f"{what} needs a quantizer that reads a text, not {recipe.quantizer}: leave out "
            f"--quantizer, or use {', '.join(CALIBRATED)}."
        )


def budget_bytes(text: str, parameters: int) -> int:
    """Return the bytes of a budget given as `text`, for a model of `parameters`.

    >>> budget_bytes("4.4bpw", 1000), budget_bytes("3.8GB", 1000)
    (550, 3800000000)
    """
    bits = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?bpw", text.strip())
    size = int(float(bits[1]) * parameters / 8) if bits else parse_size(text)
    if not size:
        raise UsageError(
            f"--budget {text!r} is neither bits per weight, such as 4.4bpw, nor a size, such as "
            "3.8GB."
        )
    return size
