"""How much each token of a text matters to each matrix: gradients, layer by layer.

The loss that rounding a matrix costs is, to the second order, 1/2 E[(g . dy)^2], where dy is the
error of the matrix's output for a token and g the gradient of -log p(y) with regard to that output,
y drawn from the model's own prediction (the empirical Fisher information of the model's
distribution, whose second-order expansion is the KL divergence). With |g|^2 shared evenly among the
N outputs, that is 1/(2 N) sum_t |g_t|^2 |dW x_t|^2 / T: a weight for each token and matrix.

A forward pass puts the hidden states before each layer on disk; the backward pass then needs one
layer in memory, and runs it once more with gradients of its activations only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llama_onnx.exporter.calibration.groups import MEMBERS
from llama_onnx.exporter.calibration.states import load_states, not_finite, save_states
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.hooks import attached
from llama_onnx.exporter.reference.walk import (
    Ids,
    advance,
    decoder_layers,
    embed,
    final_norm,
    head_chunks,
    rotary_embedding,
    window_mask,
)
from llama_onnx.targets.progress import SILENT, Progress

_SEED = 0
_SEQUENCES = 4  # whose logits are in memory at a time


@dataclass(frozen=True)
class Seen:
    """What the backward pass saw of one matrix with K inputs: |g|^2 for each token, `tokens` [T];
    the means over tokens of x_k^2, `squares` [K], and of |g|^2 x_k^2, `weighted` [K]."""

    tokens: Float32
    squares: Float32
    weighted: Float32


@dataclass
class Watched:
    """Adds up what `Seen` holds, a sequence of tokens at a time."""

    squares: npt.NDArray[np.float64]
    weighted: npt.NDArray[np.float64]
    tokens: list[Float32] = field(default_factory=list)

    @classmethod
    def of(cls, channels: int) -> Watched:
        """Return one that has seen nothing."""
        return cls(np.zeros(channels), np.zeros(channels))

    def add(self, inputs: Float32, gradients: Float32) -> None:
        """Add the inputs [S, K] and the gradients of the outputs [S, N] of S tokens."""
        self.add_weighted(inputs, np.einsum("sn,sn->s", gradients, gradients))

    def add_weighted(self, inputs: Float32, weights: Float32) -> None:
        """Add the inputs [S, K] and the squares of the gradients of the outputs [S] of S tokens."""
        self.tokens.append(weights)
        squares = np.square(inputs, dtype=np.float64)
        self.squares += squares.sum(axis=0)
        self.weighted += weights.astype(np.float64) @ squares

    def seen(self) -> Seen:
        """Return the means."""
        tokens = np.concatenate(self.tokens)
        means = (part / len(tokens) for part in (self.squares, self.weighted))
        return Seen(tokens, *(mean.astype(np.float32) for mean in means))


@dataclass(frozen=True)
class Backward:
    """The `sequences` of a text on their way through a model and back, with hidden states on disk
    in `folder`."""

    checkpoint: Checkpoint
    sequences: Sequence[Ids]
    folder: Path

    @property
    def config(self) -> LlamaConfig:
        """The model's architecture."""
        return self.checkpoint.config

    def forward(self, progress: Progress = SILENT) -> None:
        """Put the hidden states before each layer, and after the last, in the folder."""
        rotary, count = rotary_embedding(self.config), self.config.num_hidden_layers
        start = max((i for i in range(count + 1) if self._states(i).exists()), default=None)
        if start is None:
            hidden = embed(self.checkpoint, self.sequences)
            self._save(0, hidden)
            start = 0
        else:
            hidden = self._load(start)
        for index, layer in enumerate(decoder_layers(self.checkpoint, start), start=start):
            progress.update(f"reading the text, layer {index}", index, count)
            with torch.inference_mode():
                hidden = [advance(layer, rotary, x, self._mask(x)) for x in hidden]
            if not all(bool(torch.isfinite(x).all()) for x in hidden):
                raise not_finite(f"layer {index} gives NaN or infinity for the calibration's text")
            self._save(index + 1, hidden)

    def head(self) -> tuple[list[Tensor], Seen, Float32]:
        """Return the gradients with regard to the last layer's hidden states, what the head saw,
        and the mean over tokens of p (1 - p) for each row of the head [V]."""
        watched, chances = Watched.of(self.config.hidden_size), torch.zeros(self.config.vocab_size)
        generator = torch.Generator().manual_seed(_SEED)
        states = self._load(self.config.num_hidden_layers)
        found: list[Tensor] = []
        for start in range(0, len(states), _SEQUENCES):
            part = [x.requires_grad_() for x in states[start : start + _SEQUENCES]]
            normed = final_norm(self.checkpoint, part)
            flat = torch.cat([x.detach() for x in normed])
            gradients, squares = _of_prediction(self.checkpoint, flat, generator, chances)
            watched.add_weighted(flat.numpy(), squares.numpy())
            split = torch.split(gradients, [len(x) for x in normed])
            found += torch.autograd.grad(normed, part, split)
        seen = watched.seen()
        return found, seen, (chances / len(seen.tokens)).numpy()

    def layer(
        self, index: int, gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Seen]]:
        """Return the gradients with regard to the states before layer `index`, given those after
        it, and what each of its matrices saw."""
        layer = next(decoder_layers(self.checkpoint, index))
        rotary = rotary_embedding(self.config)
        watched = {
            name: Watched.of(layer.get_submodule(name).in_features)  # type: ignore[arg-type]
            for name in MEMBERS
        }
        before: list[Tensor] = []
        hooks = (
            layer.get_submodule(name).register_forward_hook(_adding_to(one))
            for name, one in watched.items()
        )
        with attached(hooks):
            for x, gradient in zip(self._load(index), gradients, strict=True):
                x.requires_grad_()
                y = advance(layer, rotary, x, self._mask(x))
                before += torch.autograd.grad(y, x, gradient)
        return before, {name: one.seen() for name, one in watched.items()}

    def _mask(self, x: Tensor) -> Tensor | None:
        return window_mask(self.config, x.shape[1])

    def _states(self, index: int) -> Path:
        return self.folder / f"states-{index}.npy"

    def _save(self, index: int, hidden: Sequence[Tensor]) -> None:
        save_states(self._states(index), hidden)

    def _load(self, index: int) -> list[Tensor]:
        return load_states(self._states(index), self.sequences)


def _of_prediction(
    checkpoint: Checkpoint, normed: Tensor, generator: torch.Generator, chances: Tensor
) -> tuple[Tensor, Tensor]:
    """Return, for the states `normed` [S, H] that the head reads, the gradient of -log p(y) for y
    drawn from p, [S, H], and the square of that with regard to the logits, [S]. p (1 - p) is added
    to `chances` [V]."""
    logits = torch.cat([normed @ part.T for part in head_chunks(checkpoint)], dim=1)
    gradient = logits.softmax(dim=-1)
    del logits
    for p in gradient:
        chances += p - p.square()
    drawn = torch.multinomial(gradient, 1, generator=generator)  # [S, 1]
    gradient.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=gradient.dtype))
    back, start = torch.zeros_like(normed), 0
    for part in head_chunks(checkpoint):
        back += gradient[:, start : start + len(part)] @ part
        start += len(part)
    return back, gradient.square().sum(dim=-1)


def _adding_to(watched: Watched) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def forward_hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = arguments[0].detach()[0].numpy()  # [S, K]
        hook: Callable[..., object] = output.register_hook
        hook(lambda gradient: watched.add(inputs, gradient[0].numpy()))

    return forward_hook
