"""Gradients layer by layer, against one backward pass of transformers' whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_onnx.exporter.calibration.backward import Backward, Seen
from llama_onnx.exporter.calibration.groups import MEMBERS
from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.targets.errors import CheckpointError
from tests.support import tiny
from tests.support.pytorch import whole_model

TIED = replace(tiny.GQA, tie_word_embeddings=True)


def backward(folder: Path, config: LlamaConfig, tensors: dict[str, np.ndarray]) -> Backward:
    source, states = folder / "source", folder / "states"
    source.mkdir()
    states.mkdir()
    tiny.write_huggingface(source, config, tensors=tensors)
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, config.vocab_size, length) for length in (7, 20)]
    return Backward(HuggingFaceCheckpoint.open(source), ids, states)


@pytest.mark.parametrize("config", [tiny.GQA, TIED], ids=["gqa", "tied"])
def test_it_is_the_gradient_of_the_whole_model(tmp_path: Path, config: LlamaConfig) -> None:
    tensors = tiny.weights(config)
    model = whole_model(config, tensors).requires_grad_(True)
    found = backward(tmp_path, config, tensors)
    found.forward()
    gradients, head, chances = found.head()
    watched: dict[str, Seen] = {}
    for index in reversed(range(config.num_hidden_layers)):
        gradients, seen = found.layer(index, gradients)
        watched |= {f"model.layers.{index}.{name}": one for name, one in seen.items()}
    names = [f"model.layers.{i}.{m}" for i in range(config.num_hidden_layers) for m in MEMBERS]
    outputs: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    for name in [*names, "lm_head"]:

        def keep(_module: Any, arguments: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            outputs.setdefault(name, []).append(output)
            inputs.setdefault(name, []).append(arguments[0].detach()[0])

        model.get_submodule(name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(0)
    embeddings = []
    logits = []
    for ids in found.sequences:
        embedded = model.get_input_embeddings()(torch.from_numpy(ids)[None]).detach()
        embeddings.append(embedded.requires_grad_())
        logits.append(model(inputs_embeds=embedded).logits[0])
    whole = torch.cat(logits)
    drawn = torch.multinomial(whole.detach().softmax(-1), 1, generator=generator)[:, 0]
    p = whole.detach().softmax(-1)
    np.testing.assert_allclose(chances, (p - p**2).mean(0), rtol=1e-3)
    loss = torch.nn.functional.cross_entropy(whole, drawn, reduction="sum")
    torch.autograd.backward(loss)
    for got, embedded in zip(gradients, embeddings, strict=True):
        torch.testing.assert_close(got, embedded.grad, rtol=1e-3, atol=1e-5)
    for name, one in {**watched, "lm_head": head}.items():
        squares = torch.cat(
            [(x.grad * x.grad)[0].sum(-1) for x in outputs[name] if x.grad is not None]
        )
        read = torch.cat(inputs[name])
        np.testing.assert_allclose(one.tokens, squares, rtol=2e-3, atol=1e-9)
        np.testing.assert_allclose(one.squares, read.square().mean(0), rtol=1e-4)
        expected = (squares[:, None] * read.square()).mean(0)
        np.testing.assert_allclose(one.weighted, expected, rtol=2e-3)


def test_states_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    tensors = tiny.weights(tiny.GQA)
    found = backward(tmp_path, tiny.GQA, tensors)
    found.forward()
    files = sorted(found.folder.iterdir())
    content = {file.name: file.read_bytes() for file in files}
    files[-1].unlink()
    times = [file.stat().st_mtime_ns for file in files[:-1]]
    found.forward()
    assert {file.name: file.read_bytes() for file in files} == content
    assert [file.stat().st_mtime_ns for file in files[:-1]] == times


def test_infinite_activations_name_the_layer(tmp_path: Path) -> None:
    tensors = {k: v.copy() for k, v in tiny.weights(tiny.GQA).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.inf
    found = backward(tmp_path, tiny.GQA, tensors)
    with pytest.raises(CheckpointError, match="layer 1 gives NaN or infinity"):
        found.forward()
