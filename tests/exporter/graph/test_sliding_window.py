"""`mistral`: a Llama's graph, with or without a sliding window, against transformers' own class."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from llama_onnx.exporter.model.config import config_from_huggingface
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.errors import UnsupportedError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.packages import greedy

WINDOW = 7
MISTRAL = replace(tiny.GQA, sliding_window=WINDOW)
SHAPES = {
    "fused": MISTRAL,
    "rotated outside": replace(MISTRAL, head_dim=8),
    "ONNX's Attention": replace(MISTRAL, head_dim=12),
}
IDS = np.random.default_rng(0).integers(3, tiny.GQA.vocab_size, 60)

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mistral")
    return {name: tiny.write_huggingface(root / name, config) for name, config in SHAPES.items()}


@pytest.fixture(scope="module")
def export(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("packages")

    def make(shape: str, target: str = "cpu", precision: str = "fp32") -> Path:
        out = root / f"{shape}-{target}-{precision}"
        if not out.exists():
            export_package(sources[shape], out, get_target(target), Options(precision))
        return out

    return make


def reference(source: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "MistralForCausalLM"
    return model.eval()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_and_steps_beyond_the_window(
    sources: dict[str, Path], export: Export, shape: str, target: str
) -> None:
    with torch.inference_mode():
        expected = reference(sources[shape])(torch.from_numpy(IDS)[None]).logits[0].numpy()
    session = GraphSession.open(export(shape, target))
    assert np.abs(session.step(IDS)[0] - expected).max() < 1e-3
    assert np.abs(stepped(export(shape, target)) - expected).max() < 1e-3
    # Without the window the logits are others, so the test would notice its absence.
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        sources[shape], dtype=torch.float32, sliding_window=None
    )
    with torch.inference_mode():
        other = plain(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert np.abs(other - expected)[WINDOW:].max() > 0.1
    assert np.abs(other - expected)[:WINDOW].max() < 1e-3


def stepped(package: Path) -> np.ndarray:
    """The logits of a prompt longer than the window, and of every step after it."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(package / "model.onnx"))
    cache: Any = GraphSession(session).empty_cache()
    names, rows = [output.name for output in session.get_outputs()], []
    for start, stop in ((0, 20), *((i, i + 1) for i in range(20, len(IDS)))):
        feeds = {"input_ids": IDS[None, start:stop], "attention_mask": np.ones((1, stop), np.int64)}
        logits, *present = session.run(names, {**feeds, **cache})
        rows.append(logits[0])
        past = [name.replace("present.", "past_key_values.") for name in names[1:]]
        cache = dict(zip(past, present, strict=True))
    return np.concatenate(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_in_genai_is_that_of_transformers(
    sources: dict[str, Path], export: Export, shape: str
) -> None:
    prompt = IDS[:20].tolist()
    with torch.inference_mode():
        expected = reference(sources[shape]).generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert greedy(export(shape), prompt, 24) == expected[0, 20:].tolist()


@pytest.mark.parametrize(("shape", "target"), [("fused", "cpu"), ("ONNX's Attention", "portable")])
def test_padding_chunks_and_rewinding_are_proved_too(
    sources: dict[str, Path], export: Export, shape: str, target: str
) -> None:
    package = export(shape, target, "int4")
    assert prove(package, open_checkpoint(sources[shape]), tokens=16, longest=40).passed


def test_the_config_of_the_package_is_a_mistral_s(export: Export) -> None:
    read: Any = transformers.AutoConfig.from_pretrained(export("fused"))
    assert (read.model_type, read.sliding_window) == ("mistral", WINDOW)


@pytest.mark.parametrize("window", [None, 256, 4096])
def test_without_a_window_in_the_context_the_graph_is_a_llama_s(
    tmp_path: Path, window: int | None
) -> None:
    """Mistral 7B v0.2 and v0.3 have no window; a window as long as the context has no effect."""
    change = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    source = tiny.write_huggingface(tmp_path / "source", config_json=change)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "sliding_window": window}))
    out = export_package(
        source, tmp_path / "out", get_target("cuda"), Options("int4", quantizer="rtn")
    ).package
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    attributes = {attribute.name for node in nodes for attribute in node.attribute}
    assert "num_heads" in attributes and "local_window_size" not in attributes


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_a_target_without_a_proved_window_refuses_by_name(
    sources: dict[str, Path], tmp_path: Path, target: str
) -> None:
    message = f"a sliding window of 7 positions, which is not proved for the target {target}"
    with pytest.raises(UnsupportedError, match=message):
        export_package(sources["fused"], tmp_path / "out", get_target(target), Options("int4"))


@pytest.mark.parametrize("missing", ["sliding_window", "num_key_value_heads", "head_dim"])
def test_missing_keys_mean_what_they_mean_to_transformers(missing: str) -> None:
    raw = {**replace(MISTRAL, num_attention_heads=16).to_huggingface(), "hidden_size": 256}
    del raw[missing]
    if missing != "num_key_value_heads":
        raw["num_key_value_heads"] = 4
    found = config_from_huggingface(raw, "config.json")
    read: Any = transformers.MistralConfig.from_dict(raw)
    for key in ("sliding_window", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(found, key) == getattr(read, key), key


def test_layers_of_several_kinds_are_refused() -> None:
    raw = {**MISTRAL.to_huggingface(), "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(UnsupportedError, match="layer_types gives the layers different attention"):
        config_from_huggingface(raw, "config.json")


def test_a_window_in_the_config_of_a_llama_is_ignored_as_transformers_does() -> None:
    raw = {**tiny.GQA.to_huggingface(), "sliding_window": 7}
    assert config_from_huggingface(raw, "config.json") == tiny.GQA
