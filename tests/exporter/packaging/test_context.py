"""`--context`: as many positions as the rope scaling allows, as transformers computes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.context import context_warning, with_context
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import UsageError
from tests.support import gguf_files, tiny

SHORT = replace(tiny.GQA, max_position_embeddings=64)
LINEAR = replace(SHORT, rope_scaling=tiny.ROPE_SCALINGS["linear"])


def test_the_stretched_context_is_transformers_own(tmp_path: Path) -> None:
    """Vicuna 1.5 16k and LongChat state the context of their base, and a linear scaling by 4."""
    source = tiny.write_huggingface(
        tmp_path / "source", LINEAR, config_json={"max_sequence_length": 256}
    )
    (warning,) = open_checkpoint(source).warnings()
    assert "holds 64 positions" in warning and "pass --context 256" in warning
    result = export_package(source, tmp_path / "out", TARGET, Options("fp32", context=256))
    assert result.warnings == ()
    ids = np.random.default_rng(0).integers(3, tiny.GQA.vocab_size, 256)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = GraphSession.open(result.package).step(ids)[0]
    assert np.abs(found - expected).max() < 1e-3
    genai = json.loads((result.package / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 256
    # The original still states 64 positions; it is the same model.
    assert prove(result.package, open_checkpoint(source), tokens=8, longest=24).passed


def test_plan_and_export_take_it_on_the_command_line(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", LINEAR)
    planned = CliRunner().invoke(main, ["plan", str(source), "--context", "128", "--json"])
    assert json.loads(planned.stdout)["max_length"] == 128
    planned = CliRunner().invoke(main, ["plan", str(source)])
    assert "pass --context 256" in planned.stderr
    refused = CliRunner().invoke(main, ["plan", str(source), "--context", "many"])
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("config", "raw", "warned"),
    [
        (LINEAR, {}, True),
        (LINEAR, {"max_sequence_length": 64}, False),  # a second key confirms the first
        (replace(LINEAR, max_position_embeddings=256), {"max_sequence_length": 256}, False),
        (replace(SHORT, rope_scaling=tiny.ROPE_SCALINGS["dynamic"]), {}, False),
        (replace(SHORT, rope_scaling=tiny.ROPE_SCALINGS["yarn"]), {}, True),
        (replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["yarn"]), {}, False),
        (replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["llama3"]), {}, False),
        (SHORT, {"max_sequence_length": 256}, False),
    ],
)
def test_a_context_in_doubt_is_warned_of(config: Any, raw: dict[str, Any], warned: bool) -> None:
    assert bool(context_warning(raw, config, "config.json")) == warned


def test_condensed_positions_are_warned_of_and_can_be_had(tmp_path: Path) -> None:
    """LongChat 7B 16k was trained with a patched rotary embedding."""
    condensed = {"rope_condense_ratio": 8, "max_sequence_length": 2048}
    source = tiny.write_huggingface(tmp_path, config_json=condensed)
    (warning,) = open_checkpoint(source).warnings()
    assert "rope_condense_ratio is 8" in warning
    assert '"rope_scaling": {"type": "linear", "factor": 8.0}' in warning
    advice = {"rope_scaling": {"type": "linear", "factor": 8.0}}
    tiny.write_huggingface(tmp_path, config_json={**condensed, **advice})
    scaling = open_checkpoint(tmp_path).config.rope_scaling
    assert scaling is not None and (scaling.rope_type, scaling.factor) == ("linear", 8.0)


def test_a_context_that_cannot_be_had() -> None:
    for context in (0, -1, 7, 1 << 40):
        with pytest.raises(UsageError, match="is not between 8 and"):
            with_context(SHORT, context, "config.json")
    dynamic = replace(SHORT, rope_scaling=tiny.ROPE_SCALINGS["dynamic"])
    with pytest.raises(UsageError, match="'dynamic' the frequencies would change"):
        with_context(dynamic, 65, "config.json")
    assert with_context(dynamic, 32, "config.json")[0].max_position_embeddings == 32


def test_a_context_beyond_the_model_s_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path)
    (warning,) = open_checkpoint(path, context=300).warnings()
    assert "a context of 300 positions is beyond the 256 that the model was made for" in warning
    assert open_checkpoint(path, context=32).warnings() == ()
