"""Values of a text's tokens on disk: hidden states, and gradients with regard to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_onnx.exporter.reference.walk import Ids
from llama_onnx.targets.durable import flush
from llama_onnx.targets.errors import CheckpointError


def save_states(file: Path, states: Sequence[Tensor]) -> None:
    """Write `states` [1, S, H], one for each sequence; the file appears whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.save(out, torch.cat(list(states), dim=1)[0].numpy())
    flush(partial)
    partial.replace(file)


def load_states(file: Path, sequences: Sequence[Ids]) -> list[Tensor]:
    """Return the states [1, S, H] in `file` of the token ids `sequences` [S]."""
    states = torch.from_numpy(np.load(file))
    return [x[None].clone() for x in torch.split(states, [len(ids) for ids in sequences])]


def not_finite(what: str) -> CheckpointError:
    """Return the error for values of a text's tokens that are not finite; `what` says which."""
    return CheckpointError(f"{what}: the weights are damaged, or the training diverged.")
