"""The graph that reads prompts in int8: its numbers by the definition, and its engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.targets.errors import UnsupportedError
from llama_onnx.targets.package import MODEL_FILE, ModelPackage
from tests.support import tiny
from tests.support.answers import Greedy, ask
from tests.support.parity import Make
from tests.support.storages import FORMS, everywhere, make_chosen

IDS = np.arange(3, 60, dtype=np.int64)
WIDE = replace(tiny.GQA, intermediate_size=100)  # no multiple of a block


def written(package: Path, folder: Path, *apart: str) -> Path:
    folder.mkdir(parents=True)
    write_prompt_graph(ModelPackage.open(package), folder, apart)
    return folder


def logits_of(folder: Path) -> np.ndarray:
    return GraphSession.open(folder).step(IDS)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [tiny.GQA, WIDE], ids=["GQA", "padded blocks"])
def test_each_matrix_is_the_package_s_within_half_a_step(
    tmp_path: Path, form: str, config: Any
) -> None:
    package, _ = make_chosen(tmp_path, everywhere(FORMS[form]), config)
    folder = written(package, tmp_path / "prompts ä 日本")
    model = onnx.load(folder / MODEL_FILE)
    onnx.checker.check_model(str(folder / MODEL_FILE))
    tensors = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    weights = PackageCheckpoint.open(package)
    seen = 0
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            continue
        codes, scales = tensors[node.input[1]], tensors[node.input[3]]
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= 127
        found = (codes.astype(np.float32) * scales).T
        layer = node.input[1].split("layers.")[1].split("/")[0].split(".")[0]
        names = [
            n for n in weights.config.tensor_shapes() if f"layers.{layer}." in n and "proj" in n
        ]
        close = [
            name
            for name in names
            for rows in [weights.tensor(name).rows(0, weights.tensor(name).shape[0])]
            if rows.shape[1] == found.shape[1]
            for start in range(0, len(found) - len(rows) + 1, 16)
            if np.all(
                np.abs(rows - found[start : start + len(rows)])
                <= 0.501 * scales[start : start + len(rows), None]
            )
        ]
        seen += len(set(close))
    assert seen == 7 * config.num_hidden_layers, "every matrix of every layer is in one product"
    assert not [
        n for n in model.graph.node if n.op_type == "MatMulNBits" and "logits" not in n.output
    ]


def test_the_logits_are_close_and_what_nothing_reads_is_left_out(
    package: Path, tmp_path: Path
) -> None:
    folder = written(package, tmp_path / "all")
    usual, int8 = logits_of(package), logits_of(folder)
    # The limit of thresholds.csv for activations in int8.
    assert 1e-5 < np.linalg.norm(int8 - usual) / np.linalg.norm(usual) < 0.1
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    read = {name for node in graph.node for name in node.input}
    assert {i.name for i in graph.initializer} <= read


def test_matrices_can_stay_as_they_are(package: Path, tmp_path: Path) -> None:
    folder = written(package, tmp_path / "some", "down_proj")
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    kept = [
        n.output[0] for n in graph.node if n.op_type == "MatMulNBits" and "logits" not in n.output
    ]
    assert len(kept) == tiny.GQA.num_hidden_layers and all("down_proj" in name for name in kept)
    usual, some = logits_of(package), logits_of(folder)
    every = logits_of(written(package, tmp_path / "all"))
    assert np.linalg.norm(some - usual) < np.linalg.norm(every - usual)


def test_a_row_of_zeros_and_one_of_large_numbers(package: Path, tmp_path: Path) -> None:
    """Each row has a scale of its own: what one token has does not round another's to nothing."""
    folder = written(package, tmp_path / "prompts")
    alone = GraphSession.open(folder).step(IDS[:20])[0]
    together = GraphSession.open(folder).step(IDS)[0][:20]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["package_fp32", "exact"])
def test_without_int8_activations_there_is_nothing_to_do(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, made: Make
) -> None:
    package = request.getfixturevalue(name) if name != "exact" else made("int4-exact")[0]
    with pytest.raises(UnsupportedError, match="no matrix that int8 activations multiply"):
        written(package, tmp_path / "prompts")


# the engine


def seen_logits(package: Path, prompts: Path | None, length: int) -> np.ndarray:
    chooser = Greedy()
    settings = replace(DEFAULT, prompts=prompts)
    with Engine(ModelPackage.open(package), 96, threads=1, settings=settings) as engine:
        for _ in engine.submit(ask(range(3, 3 + length), 4, chooser=chooser)):
            pass
    return np.stack(chooser.seen)


def test_the_engine_reads_long_prompts_with_it_and_short_ones_without(
    package: Path, tmp_path: Path
) -> None:
    folder = written(package, tmp_path / "prompts")
    short, usual = (seen_logits(package, prompts, 15) for prompts in (folder, None))
    assert np.array_equal(short, usual)
    long, usual = (seen_logits(package, prompts, 57) for prompts in (folder, None))
    assert not np.array_equal(long[0], usual[0])
    np.testing.assert_allclose(long[0], logits_of(folder)[-1], rtol=1e-3, atol=1e-3)
    # The answer goes on in the same cache, with the package's own graph.
    ids = [*IDS, int(long[0].argmax())]
    cached = GraphSession.open(folder).step(IDS)[1]
    after = GraphSession.open(package).step(np.array(ids[-1:]), cached)[0][-1]
    np.testing.assert_allclose(long[1], after, rtol=1e-3, atol=1e-3)
