"""Packages with matrices in every kind of storage: what ONNX Runtime and genai compute with them,
against transformers with the weights that the independent reader finds."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime import ort
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.placement.shares import HEAVY_OPERATORS
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from tests.support import tiny
from tests.support.packages import greedy, renew_hashes
from tests.support.pytorch import run_whole, whole_model
from tests.support.storages import everywhere, make_chosen, matrices

KINDS = [
    RowBlocks(bits, block, zero_points, stored_scales=form)
    for bits, block, zero_points, form in product(
        (2, 4, 8), (16, 32, 64, 128), (False, True), get_args(ScaleForm)
    )
]
"""Blocks of 64 and 128 end in a partial one: the tiny model has 64 and 96 columns."""

IDS = np.array([1, 40, 7, 99, 200, 13, 5, 77])
TIED = replace(tiny.GQA, tie_word_embeddings=True)


def dealt(kinds: Iterator[RowBlocks]) -> Callable[[LlamaConfig], Mapping[str, RowBlocks]]:
    """Return a function that gives each matrix of the graph the next of `kinds`."""

    def choose(config: LlamaConfig) -> Mapping[str, RowBlocks]:
        given: dict[str, RowBlocks] = {}
        for name in matrices(config):
            if (matrix := _matrix_of(name)) not in given:
                given[matrix] = next(kinds)
        return {name: given[_matrix_of(name)] for name in matrices(config)}

    return choose


def _matrix_of(tensor: str) -> str:
    """Return the matrix of the graph that holds `tensor`: query, key and value share one."""
    return re.sub(r"[qkv]_proj", "qkv_proj", tensor)


def logits_of(package: Path) -> np.ndarray:
    return logits_in(ort.create_session(package / "model.onnx"))


def logits_in(session: ort.Session, ids: np.ndarray = IDS) -> np.ndarray:
    feeds: dict[str, np.ndarray] = {
        "input_ids": ids[None],
        "attention_mask": np.ones_like(ids[None]),
    }
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            feeds[entry.name] = np.zeros((1, 2, 0, 16), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0][0]
    return logits


def weights_in(package: Path) -> dict[str, np.ndarray]:
    """Return the weights by name, as the reader finds them."""
    found = PackageCheckpoint.open(package)
    return {name: t.rows(0, t.shape[0]) for name, t in found.tensors.items()}


@pytest.fixture(scope="module")
def kinds() -> Iterator[RowBlocks]:
    return cycle(KINDS)


@pytest.mark.parametrize("part", range(5))
def test_every_kind_of_storage_computes_what_its_weights_say(
    part: int, kinds: Iterator[RowBlocks], tmp_path: Path
) -> None:
    """Five packages with 17 matrices each: every one of the 72 kinds is in one of them."""
    package, _ = make_chosen(tmp_path, dealt(kinds), options=Options("int4", accuracy_level=1))
    weights = weights_in(package)
    expected = run_whole(whole_model(tiny.GQA, weights), IDS)
    np.testing.assert_allclose(logits_of(package), expected, rtol=2e-5, atol=2e-4)
    prompt = IDS.tolist()
    for token in greedy(package, prompt, 3):
        following = run_whole(whole_model(tiny.GQA, weights), np.array(prompt))[-1]
        assert following[token] > following.max() - 1e-3
        prompt.append(token)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_a_tied_matrix_is_read_alike_by_both_its_operators(
    bits: int, block: int, tmp_path: Path
) -> None:
    """Row by row with zero points, four, two or one in a byte, and as the head."""
    storage = RowBlocks(bits, block, zero_points=True, stored_scales="uint8")
    config = replace(TIED, num_hidden_layers=1, hidden_size=80, head_dim=16)
    options = Options("int4", accuracy_level=1)
    package, _ = make_chosen(tmp_path, everywhere(storage), config, options)
    weights = weights_in(package)
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    untied = replace(config, tie_word_embeddings=False)
    expected = run_whole(whole_model(untied, weights), IDS)
    np.testing.assert_allclose(logits_of(package), expected, rtol=2e-5, atol=2e-4)
    model = onnx.load(package / "model.onnx", load_external_data=False)
    places = {
        tensor.name: next(e.value for e in tensor.external_data if e.key == "offset")
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    assert {name for name in places if name.startswith("lm_head.")} == {"lm_head.qweight"}
    assert places["lm_head.qweight"] == places["model.embed_tokens.qweight"]


@pytest.mark.parametrize("form", get_args(ScaleForm))
def test_such_a_package_is_proved(form: ScaleForm, tmp_path: Path) -> None:
    storage = RowBlocks(4, 32, zero_points=True, stored_scales=form)
    package, source = make_chosen(tmp_path, everywhere(storage), TIED)
    report = prove(package, open_checkpoint(source), tokens=4, longest=12)
    assert report.passed, [verdict for verdict in report.verdicts() if not verdict.passed]
    rounding = [m for m in report.measurements if m.error == "graph"]
    assert max(m.figures.relative_l2 for m in rounding) < 1e-5


def test_the_recipe_in_the_manifest_says_how_each_tensor_is_stored(tmp_path: Path) -> None:
    storage = RowBlocks(2, 64, zero_points=True, stored_scales="fp16")
    name = "model.layers.1.mlp.down_proj.weight"
    package, _ = make_chosen(tmp_path, lambda _: {name: storage})
    recipe = ModelPackage.open(package).manifest["recipe"]
    assert recipe["chosen"] == [{**storage.to_json(), "tensors": [name]}]
    assert recipe["taken_over"] == []
    assert PackageCheckpoint.open(package).tensor(name).dtype == "INT2/64"


def test_what_makes_scales_is_no_operator_of_its_own_in_the_shares(tmp_path: Path) -> None:
    """Its bytes are counted for the operator that reads the matrix."""
    storage = RowBlocks(4, 32, zero_points=True, stored_scales="uint8")
    package, _ = make_chosen(tmp_path, everywhere(storage), TIED)
    costs = ModelPackage.open(package).manifest["graph"]["costs"]
    assert "Cast" not in {cost["op"] for cost in costs.values()}
    (gate,) = (cost for name, cost in costs.items() if "layers.0/mlp/gate_proj" in name)
    assert gate["op"] in HEAVY_OPERATORS
    # 96 rows of 2 blocks: codes of 16 bytes, numbers, one byte of zero points, a factor
    assert gate["weight_bytes"] == 96 * (2 * 16 + 2 + 1 + 2)


def test_packed_projections_share_one_storage(tmp_path: Path) -> None:
    """A query that is stored in another way than key and value has a matrix of its own."""
    odd = "model.layers.0.self_attn.q_proj.weight"
    package, _ = make_chosen(tmp_path, lambda _: {odd: RowBlocks(8, 32)})
    names = {
        t.name
        for t in onnx.load(package / "model.onnx", load_external_data=False).graph.initializer
    }
    assert "model.layers.0.self_attn.q_proj.qweight" in names
    assert "model.layers.1.self_attn.qkv_proj.qweight" in names


def run_at(package: Path, level: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(package / "model.onnx", options)
    return logits_in(session)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="other processors pack otherwise"
)
def test_the_basic_optimizations_are_enough_and_without_any_the_result_is_wrong(
    tmp_path: Path,
) -> None:
    """The day the last line fails, ONNX Runtime computes it rightly, and the docs may say so."""
    storage = RowBlocks(4, 32, zero_points=True, stored_scales="uint8")
    package, _ = make_chosen(tmp_path, everywhere(storage))
    everything = run_at(package, "ORT_ENABLE_ALL")
    np.testing.assert_array_equal(run_at(package, "ORT_ENABLE_BASIC"), everything)
    assert not run_at(package, "ORT_DISABLE_ALL").any()


def test_a_package_that_turns_optimizations_off_is_refused(tmp_path: Path) -> None:
    storage = RowBlocks(4, 32, stored_scales="fp16")
    package, _ = make_chosen(tmp_path, everywhere(storage))
    file = package / "genai_config.json"
    settings = json.loads(file.read_text("utf-8"))
    options = settings["model"]["decoder"]["session_options"]
    options["graph_optimization_level"] = "ORT_DISABLE_ALL"
    file.write_text(json.dumps(settings), "utf-8")
    renew_hashes(package)
    with pytest.raises(PackageError, match=r"session_options\.graph_optimization_level', which no"):
        Llama.load(package)
