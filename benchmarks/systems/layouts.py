"""The layout of a preset on SmolLM2, for a model of another geometry with random weights.

On random weights all matrices of a kind are equally sensitive, so a preset would decide nothing
there. A layer gets what the layer of SmolLM2 at the same share of the depth has; a head of its own,
what SmolLM2's embedding has, which is its head.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.quality.model_process import BrokenPeerError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_recipe(package: Path, source: Path, out: Path) -> None:
    """Write the recipe of `package` for the checkpoint `source` of an untied model to `out`."""
    recipe = json.loads((package / "manifest.json").read_text("utf-8"))["recipe"]
    layers = json.loads((source / "config.json").read_text("utf-8"))["num_hidden_layers"]
    stored = {name: group for group in recipe["chosen"] for name in group["tensors"]}
    if _EMBEDDING not in stored:
        raise BrokenPeerError(f"{package} was not made with a budget: remove it, to make it again.")
    count = 1 + max(int(match[1]) for match in map(_LAYER.match, stored) if match)
    chosen = [{**stored[_EMBEDDING], "tensors": [_HEAD]}]
    for index in range(layers):
        of = index * count // layers
        chosen += _layer(stored, of, index)
    # Plain rounding takes no zero points, which ONNX Runtime's kernels read beside the scales.
    plain = {"zero_points": False, "stored_scales": "fp16"}
    recipe |= {"chosen": [each | plain for each in chosen], "quantizer": "rtn"}
    recipe |= {name: recipe[name] | plain for name in ("linear", "embedding", "head")}
    out.write_text(json.dumps({"recipe": recipe}), "utf-8")


def _layer(stored: dict[str, Any], of: int, index: int) -> list[dict[str, Any]]:
    found = []
    for name, storage in stored.items():
        match = _LAYER.match(name)
        if match and int(match[1]) == of:
            found.append({**storage, "tensors": [f"model.layers.{index}.{match[2]}"]})
    return found
