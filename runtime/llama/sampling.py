"""How the next token is chosen: the caller's wishes as onnxruntime-genai's search options."""

from __future__ import annotations

from llama_onnx.targets.errors import UsageError


def search_options(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> dict[str, bool | int | float]:
    """Search options for what was asked; what is None stays as the package's own search says.

    Asking for a temperature, top-k or top-p turns sampling on; temperature 0 turns it off. Raises
    `UsageError` for a value that means nothing.
    """
    _check(temperature, top_k, top_p, seed)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "random_seed": seed}
    options: dict[str, bool | int | float] = {k: v for k, v in asked.items() if v is not None}
    if temperature == 0:
        del options["temperature"]
        options["do_sample"] = False
    elif options.keys() - {"random_seed"}:
        options["do_sample"] = True
    return options


def _check(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UsageError(f"The temperature must be 0 (greedy) or more, not {temperature}.")
    if top_k is not None and top_k < 0:
        raise UsageError(f"top-k must be 0 (off) or more, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top-p must be above 0 and at most 1 (off), not {top_p}.")
    if seed is not None and seed < 0:
        raise UsageError(f"The seed must be 0 or more, not {seed}.")
