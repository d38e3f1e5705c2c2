"""The graph that reads prompts in int8: its numbers by the definition, and its engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.tuning import onnx_wire, prompt_graph
from llama_onnx.runtime.tuning.packed_weights import write_packed
from llama_onnx.runtime.tuning.prompt_graph import write_prompt_graph
from llama_onnx.runtime.tuning.tuned import Place, tuning
from llama_onnx.targets.errors import PackageError, ResourceError, UnsupportedError
from llama_onnx.targets.onnx_file import FLOAT, UINT8
from llama_onnx.targets.package import MODEL_FILE, ModelPackage
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.answers import Greedy, ask, random_prompts, tokens_of
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


def test_each_token_has_a_scale_of_its_own(package: Path, tmp_path: Path) -> None:
    """What one token has does not round another's to nothing."""
    folder = written(package, tmp_path / "prompts")
    alone = GraphSession.open(folder).step(IDS[:20])[0]
    together = GraphSession.open(folder).step(IDS)[0][:20]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


def test_activations_are_rounded_as_the_formula_says() -> None:
    """Also a row of zeros, of the smallest and of the largest numbers there are."""
    rows = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    rows[1], rows[2], rows[3] = 0, rows[2] * np.float32(1e-29), rows[3] * np.float32(1e37)
    codes, scales = f"{prompt_graph._PREFIX}x.codes", f"{prompt_graph._PREFIX}x.scales"
    content = onnx_wire.model(
        list(prompt_graph._quantize("x")),
        prompt_graph._constants().values(),
        {"x": (FLOAT, rows.shape)},
        {codes: (UINT8, rows.shape), scales: (FLOAT, (len(rows), 1))},
    )
    onnx.checker.check_model(onnx.load_from_string(content))
    found, steps = ort.create_session(content).run([codes, scales], {"x": rows})
    exact = rows.astype(np.float64)
    largest = np.maximum(np.abs(exact).max(axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(steps, largest / 127, rtol=1e-6)
    rounded = found.astype(int) - 128
    assert np.abs(rounded - exact / (largest / 127)).max() <= 0.5001
    assert np.abs(rounded).max(axis=1).tolist() == [127, 0, 127, 127, 127]


@pytest.mark.parametrize("name", ["package_fp32", "exact"])
def test_without_int8_activations_there_is_nothing_to_do(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, made: Make
) -> None:
    package = request.getfixturevalue(name) if name != "exact" else made("int4-exact")[0]
    with pytest.raises(UnsupportedError, match="no matrix that int8 activations multiply"):
        written(package, tmp_path / "prompts")


# the engine


def seen_logits(
    package: Path,
    prompts: Path | None,
    length: int,
    packed: Path | None = None,
    adapter: str | None = None,
) -> np.ndarray:
    chooser = Greedy()
    settings = replace(DEFAULT, prompts=prompts, packed=packed)
    with Engine(ModelPackage.open(package), 96, threads=1, settings=settings) as engine:
        request = ask(range(3, 3 + length), 4, chooser=chooser, adapter=adapter)
        tokens_of(engine.submit(request))
    return np.stack(chooser.seen)


def test_the_engine_reads_long_prompts_with_it_and_short_ones_without(
    package: Path, tmp_path: Path
) -> None:
    folder = written(package, tmp_path / "prompts")
    short, usual = (seen_logits(package, prompts, 15) for prompts in (folder, None))
    assert np.array_equal(short, usual)
    long, usual = (seen_logits(package, prompts, 57) for prompts in (folder, None))
    assert not np.array_equal(long[0], usual[0])
    # The last two tokens, and the answer, are read with the package's own graph, in the same cache.
    ids = [*IDS, int(long[0].argmax())]
    cache = GraphSession.open(folder).step(IDS[:-2])[1]
    first, cache = GraphSession.open(package).step(IDS[-2:], cache)
    np.testing.assert_allclose(long[0], first[-1], rtol=1e-3, atol=1e-3)
    after = GraphSession.open(package).step(np.array(ids[-1:]), cache)[0][-1]
    np.testing.assert_allclose(long[1], after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [16, 17, 18, 33, 63, 64, 65, 79, 80, 81, 90])
def test_the_same_request_gets_the_same_answer_again(
    package: Path, tmp_path: Path, length: int
) -> None:
    """The second time most of it is known; the logits are the same, bit for bit."""
    settings = replace(DEFAULT, prompts=written(package, tmp_path / "prompts"), chunk=64)
    (prompt,) = random_prompts(length, seed=length)
    first, second = Greedy(), Greedy()
    with Engine(ModelPackage.open(package), 128, threads=1, settings=settings) as engine:
        answers = [
            tokens_of(engine.submit(ask(prompt, 6, chooser=each))) for each in (first, second)
        ]
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(first.seen, second.seen)


def test_several_at_once_get_what_each_gets_alone(package: Path, tmp_path: Path) -> None:
    settings = replace(DEFAULT, prompts=written(package, tmp_path / "prompts"))
    prompts = random_prompts(15, 16, 40, 70, seed=3)
    with Engine(ModelPackage.open(package), 128, threads=1, settings=settings) as engine:
        alone = [tokens_of(engine.submit(ask(prompt, 8))) for prompt in prompts]
        together = [engine.submit(ask(prompt, 8, reuse=False)) for prompt in prompts]
        assert [tokens_of(answer) for answer in together] == alone


def test_packed_weights_make_no_difference(package: Path, tmp_path: Path, place: Place) -> None:
    folder = written(package, tmp_path / "prompts")
    with tuning(place):
        packed = write_packed(ModelPackage.open(package), place)
        both = seen_logits(package, folder, 57, packed=packed)
    np.testing.assert_array_equal(both, seen_logits(package, folder, 57))


def test_an_adapter_changes_what_the_graph_reads(tmp_path: Path) -> None:
    changes = adapters.factors(
        {module: 4 for layer in range(3) for module in adapters.attention(layer, *"qv")}
    )
    source = tiny.write_huggingface(tmp_path / "source")
    kept = {"first": adapters.write_adapter(tmp_path / "first", changes)}
    package = export_package(
        source, tmp_path / "package", get_target("cpu"), Options("int4"), kept=kept
    ).package
    folder = written(package, tmp_path / "prompts")
    usual, int8 = (
        seen_logits(package, prompts, 57, adapter="first")[0] for prompts in (None, folder)
    )
    plain = seen_logits(package, folder, 57)[0]
    assert np.linalg.norm(int8 - usual) < 0.15 * np.linalg.norm(usual)
    assert np.linalg.norm(int8 - plain) > 3 * np.linalg.norm(int8 - usual)


def test_a_graph_that_does_not_open_is_one_sentence(package: Path, tmp_path: Path) -> None:
    folder = written(package, tmp_path / "prompts")
    (folder / MODEL_FILE).write_bytes(b"no graph")
    with pytest.raises(ResourceError, match=r"tune .* --forget.*LLAMA_ONNX_TUNED=0"):
        seen_logits(package, folder, 57)


def test_a_data_file_that_is_cut_off_ends(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    opened = ModelPackage.open(copy)
    with opened.data_path.open("r+b") as file:
        file.truncate(opened.data_path.stat().st_size // 2)
    (tmp_path / "prompts").mkdir()
    with pytest.raises((PackageError, ValueError)):
        write_prompt_graph(opened, tmp_path / "prompts")
