"""The logits of a package after a prompt, from onnxruntime-genai's own Python API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.genai import og


def logits_after(package: Path, prompt: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the logits [vocabulary] of the token after `prompt`."""
    model = og.Model(str(package))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(list(prompt))
    return np.asarray(generator.get_logits(), np.float64).ravel()
