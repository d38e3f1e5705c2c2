"""Parity of tiny packages, and faults planted in them: each must show in the row it belongs to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper
from tokenizers import Tokenizer, normalizers

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.parity.bisect.search import bisect
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.prompts import TEXTS, make_prompts
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.shipped import PromptSet
from llama_onnx.exporter.parity.measure.tokenizers import FIXED_TEXTS
from llama_onnx.exporter.parity.measure.validate import validate
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.block_codes import dequantize
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.situations import SITUATIONS, run_plainly
from llama_onnx.targets.errors import PackageError, UnsupportedError, UsageError
from tests.support import tiny
from tests.support.faults import (
    double_cached_keys,
    edit,
    edit_graph,
    epsilon,
    interleaved,
    negate,
    stale_tokenizer,
)
from tests.support.packages import renew_hashes
from tests.support.parity import EXPORTS, Make, figures, missed, missed_in, report_on


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


# Sound packages


@pytest.fixture(scope="module")
def sound(made: Make) -> Callable[[str], ParityReport]:
    """What is said about one of `EXPORTS` as it was made, measured once."""
    return cache(lambda name: report_on(*made(name)))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_sound_package_passes(sound: Callable[[str], ParityReport], name: str) -> None:
    report = sound(name)
    rows = figures(report)
    assert missed(report) == set()
    assert report.precision == name.partition("-")[0]
    assert report.greedy[0].identical == len(report.greedy[0].divergences) == 4
    # Far below the limits: rounding in other orders, and nothing else.
    graph = [row for row in rows if row.startswith("graph ")]
    assert len(graph) == 7
    for row in graph:
        assert rows[row]["relative_l2"] < 5e-6
    shipped = [row for row in rows if row.startswith("shipped ")]
    assert len(shipped) == 9
    for row in shipped:
        assert (rows[row]["relative_l2"] > 1e-3) == (report.activations == "int8")
    assert [layer.stage for layer in report.layers] == [
        "embedding", "layer 0", "layer 1", "layer 2", "head"
    ]  # fmt: skip
    assert all(layer.graph < 5e-6 for layer in report.layers)
    # What the precision costs does not leak into the graph error, but it is there.
    assert (rows["quantization"]["max_abs"] == 0) == name.startswith("fp32")
    expected = {"fp16": 1e-3, "int8": 1e-2, "int4": 1e-1}.get(report.precision, 0)
    assert expected <= rows["quantization"]["relative_l2"] < 10 * expected + 1e-9


@pytest.mark.parametrize("name", ["fp32", "int4", "int4-exact"])
def test_activations_are_those_of_the_graph(
    sound: Callable[[str], ParityReport], name: str
) -> None:
    report = sound(name)
    assert report.activations == ("int8" if name == "int4" else "fp32")


def test_a_pruned_head_is_compared_at_the_last_positions(
    sound: Callable[[str], ParityReport],
) -> None:
    report = sound("int4-last")
    rows = figures(report)
    assert rows["graph prefill"]["positions"] == 4  # one of each passage
    assert rows["graph decode"]["positions"] == 4 * (1 + 12)
    assert rows["graph prefill"]["perplexity_ratio"] is None


def test_every_weight_is_the_one_the_operators_compute_with(made: Make) -> None:
    """Read back against the operators themselves: x @ W.T with x the identity."""
    package, _ = made("int4-partial-fused")
    checkpoint = PackageCheckpoint.open(package)
    model = onnx.load(package / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [checkpoint.tensor(f"model.layers.1.self_attn.{p}_proj.weight") for p in "qkv"]
    fused = [checkpoint.tensor(f"model.layers.2.mlp.{p}_proj.weight") for p in ("gate", "up")]
    whole = {
        "model.layers.1.self_attn.qkv_proj.qweight": found,
        "model.layers.2.mlp.gate_up_proj.qweight": fused,
        "model.layers.0.mlp.down_proj.qweight": [
            checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
        ],
        "lm_head.qweight": [checkpoint.tensor("lm_head.weight")],
    }
    for node in model.graph.node:
        parts = whole.pop(node.input[1], []) if node.op_type == "MatMulNBits" else []
        if parts:
            columns = parts[0].shape[1]
            weight = _run_node(node, tensors, x=np.eye(columns, dtype=np.float32)).T
            read = np.concatenate([part.rows(0, part.shape[0]) for part in parts])
            np.testing.assert_array_equal(read, weight)
    assert not whole
    gather = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    looked_up = _run_node(gather, tensors, x=np.arange(embedding.shape[0]))
    np.testing.assert_array_equal(embedding.rows(0, embedding.shape[0]), looked_up[:, :80])
    np.testing.assert_array_equal(embedding.rows(7, 9), looked_up[7:9, :80])


def _run_node(
    node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], x: np.ndarray
) -> np.ndarray:
    weights = [tensors[name] for name in node.input if name in tensors]
    (data,) = (name for name in node.input if name not in tensors)
    node = onnx.NodeProto.FromString(node.SerializeToString())
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    kind = TensorProto.FLOAT if x.dtype == np.float32 else TensorProto.INT64
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(data, kind, x.shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {data: x})[0]
    return output


def test_dequantize_by_hand() -> None:
    four = dequantize(np.array([[0x0F, 0x98]], np.uint8), np.array([[2.0]], np.float32), 4, 4, 3)
    np.testing.assert_array_equal(four, [[14.0, -16.0, 0.0]])  # (15-8)*2, (0-8)*2, (8-8)*2
    eight = dequantize(np.array([[0, 255]], np.uint8), np.array([[0.5, 1]], np.float32), 8, 1, 2)
    np.testing.assert_array_equal(eight, [[-64.0, 127.0]])


# Faults


def flip_codes(array: np.ndarray) -> None:
    """Negate the codes of one block of each row: c - 8 becomes 8 - c (and -8 becomes -7)."""
    block = array[:, 0]
    low, high = (np.minimum(16 - (nibble.astype(int)), 15) for nibble in (block & 15, block >> 4))
    block[:] = low | high << 4


def test_flipped_weights_are_no_graph_error_but_a_quantization_error(copied: Make) -> None:
    package, source = copied("fp32")
    edit(package, "model.layers.1.mlp.down_proj.weight", lambda weight: negate(weight[:16, :32]))
    report = report_on(package, source)
    assert missed(report) == {"quantization", "weights"}
    assert figures(report)["graph prefill"]["relative_l2"] < 5e-6


def test_flipped_codes_are_no_graph_error_but_a_quantization_error(
    made: Make, sound: Callable[[str], ParityReport], copied: Make
) -> None:
    clean = figures(sound("int4"))
    package, source = copied("int4")
    edit(package, "model.layers.1.mlp.down_proj.qweight", flip_codes)
    limit = 1.5 * clean["quantization"]["mean_kl"]
    report = report_on(package, source, max_kl=limit)
    assert missed(report) == {"quantization", "total", "weights"}
    assert figures(report)["graph prefill"]["relative_l2"] < 5e-6
    assert missed(report_on(*made("int4"), max_kl=limit)) == set()


def test_another_models_weights_fail_whatever_the_precision(made: Make, tmp_path: Path) -> None:
    """Four bits have no limit on KL of their own, and need none for this."""
    other = tiny.write_huggingface(tmp_path / "other", tiny.GQA, seed=1)
    package, _ = made("int4")
    assert "weights" in missed(report_on(package, other))


def _swap_blocks(array: np.ndarray) -> None:
    array[:] = array[:, ::-1].copy()


def _two_steps(array: np.ndarray) -> None:
    """One code of one block, two steps away."""
    low = int(array[5, 1, 3]) & 15
    array[5, 1, 3] = (array[5, 1, 3] & 0xF0) | (low + 2 if low < 8 else low - 2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("int4", _two_steps),
        ("int4", _swap_blocks),
        ("int4-tied", _two_steps),
        ("int8", _swap_blocks),
    ],
)
def test_codes_that_are_not_the_nearest_are_named(
    copied: Make, name: str, fault: Callable[[np.ndarray], None]
) -> None:
    package, source = copied(name)
    edit(package, "model.layers.1.self_attn.o_proj.qweight", fault)
    report = report_on(package, source)
    assert "weights" in missed(report)
    assert report.weights.steps.tensor == "model.layers.1.self_attn.o_proj.weight"


def _exchanged_blocks(array: np.ndarray) -> None:
    """The first two blocks of one row, codes alone: their scales stay."""
    array[5, :2] = array[5, 1::-1].copy()


def _all_one_higher(array: np.ndarray) -> None:
    """Every code but the largest, as where a zero point is one off."""
    low, high = array & 15, array >> 4
    array[:] = np.minimum(low + 1, 15) | np.minimum(high + 1, 15) << 4


@pytest.mark.parametrize(
    ("fault", "metric"), [(_exchanged_blocks, "block_rms"), (_all_one_higher, "matrix_rms")]
)
def test_codes_that_error_feedback_cannot_have_chosen_are_named(
    copied: Make, tmp_path: Path, fault: Callable[[np.ndarray], None], metric: str
) -> None:
    """GPTQ chooses other codes than the nearest, but not any: by the mean of a block, or of all."""
    package, source = copied("int4-gptq")
    assert missed(report_on(package, source)) == set()
    edit(package, "model.layers.1.self_attn.o_proj.qweight", fault)
    report = report_on(package, source)
    failed = {c.threshold.metric for c in report.checks if not c.passed}
    assert metric in failed
    worst = getattr(report.weights, metric)
    assert worst.tensor == "model.layers.1.self_attn.o_proj.weight"
    subject = open_subject(package, open_checkpoint(source))
    found = bisect(subject, report, tmp_path / "out").finding
    assert found is not None and (found.cause, found.layer) == ("weights", "layer 1")
    assert found.value == worst.tensor


def _late_rotary(table: np.ndarray) -> None:
    table[35, 3] += 0.01  # one value of one position, behind the prompts


@pytest.mark.parametrize("name", ["fp32", "int4"])
@pytest.mark.parametrize("fault", ["epsilon", "interleaved", "late_rotary"])
def test_a_fault_of_the_graph_is_a_graph_error_and_no_quantization_error(
    copied: Make, name: str, fault: str
) -> None:
    package, source = copied(name)
    if fault == "late_rotary":
        edit(package, "model.cos_cache.weight", _late_rotary)
    else:
        edit_graph(package, {"epsilon": epsilon, "interleaved": interleaved}[fault])
    report = report_on(package, source)
    assert {"prefill", "decode"} <= missed_in(report, "graph")
    assert "quantization" not in missed(report)


def test_a_fault_in_the_cache_is_seen_by_decode_alone(copied: Make) -> None:
    """Keys of layer 0 leave the graph doubled: a pass without a past cannot notice."""
    package, source = copied("fp32")
    edit_graph(package, double_cached_keys)
    report = report_on(package, source)
    assert missed(report) >= {"graph", "shipped", "greedy"}
    # Wherever a cache is read that an earlier step wrote.
    plain = {situation.name for situation in SITUATIONS if situation.run is run_plainly}
    once = {"prefill", "lengths"}
    assert missed_in(report, "graph") == plain - once
    assert missed_in(report, "shipped") >= plain - once
    assert not missed_in(report, "shipped") & once


def test_nan_fails_and_is_still_json(copied: Make) -> None:
    package, source = copied("fp32")
    edit(package, "model.norm.weight", lambda gain: gain.fill(np.nan))
    report = report_on(package, source)
    assert not report.passed
    content = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert content["passed"] is False
    assert content["measurements"][0]["figures"]["max_abs"] is None


# Packages that cannot be read


def test_a_truncated_data_file_is_named(copied: Make) -> None:
    package, source = copied("int4")
    data = package / "model.onnx.data"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    with pytest.raises(PackageError, match=r"model\.onnx\.data ends at byte"):
        report_on(package, source)


def test_data_outside_the_package_is_refused(copied: Make) -> None:
    package, _ = copied("fp32")

    def point_outside(graph: onnx.GraphProto) -> None:
        for entry in graph.initializer[-1].external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"

    edit_graph(package, point_outside)
    with pytest.raises(PackageError, match=r"from '\.\./elsewhere': not model\.onnx\.data"):
        PackageCheckpoint.open(package)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (["", "g_idx"], UnsupportedError, r"additional inputs \['g_idx'\]"),
        (["zero_points"], PackageError, "reads 'zero_points', which is not an initializer"),
    ],
)
def test_inputs_that_are_not_understood_are_refused(
    copied: Make, inputs: list[str], error: type[Exception], message: str
) -> None:
    package, _ = copied("int4")

    def add(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.op_type == "MatMulNBits")
        node.input.extend(inputs)

    edit_graph(package, add)
    with pytest.raises(error, match=message):
        PackageCheckpoint.open(package)


def test_a_damaged_or_missing_graph_is_one_sentence(copied: Make) -> None:
    package, _ = copied("fp32")
    (package / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(PackageError, match="not an ONNX model"):
        PackageCheckpoint.open(package)
    (package / "model.onnx").unlink()
    with pytest.raises(PackageError, match="pass the folder of a package"):
        PackageCheckpoint.open(package)


def test_a_graph_that_onnxruntime_refuses_is_a_package_error(copied: Make) -> None:
    package, _ = copied("fp32")

    def misspell(graph: onnx.GraphProto) -> None:
        next(n for n in graph.node if n.op_type == "GroupQueryAttention").op_type = "Attenuation"

    edit_graph(package, misspell)
    with pytest.raises(PackageError, match="onnxruntime refuses"):
        GraphSession.open(package)


@pytest.mark.parametrize("more", [(), ("--bisect",)])
def test_nodes_out_of_order_are_one_sentence(copied: Make, more: tuple[str, ...]) -> None:
    """ONNX Runtime sorts them, the standard asks for them sorted."""
    package, source = copied("fp32")

    def swap(graph: onnx.GraphProto) -> None:
        index = next(i for i, node in enumerate(graph.node) if "layers.1/mlp" in node.name)
        nodes = list(graph.node)
        nodes[index], nodes[index + 2] = nodes[index + 2], nodes[index]
        del graph.node[:]
        graph.node.extend(nodes)

    edit_graph(package, swap)
    GraphSession.open(package)
    result = run(package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8, *more)
    assert result.exit_code == 1
    assert re.search(r"^Error: the graph's nodes are out of order: model/layers\.1/", result.stderr)
    assert len(result.stderr.splitlines()) == 1


# The tokenizer


def test_a_swapped_tokenizer_fails_and_the_text_is_named(copied: Make) -> None:
    package, source = copied("fp32")
    stale_tokenizer(package)
    renew_hashes(package)
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.search(
        r"tokenizer  DIFFERS from the source's tokenizer\.json on 'The harbour", result.stdout
    )
    assert "failed: the tokenizer is not the source's." in result.stdout
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["passed"] is False
    assert content["tokenizer"]["passed"] is False
    assert content["tokenizer"]["difference"]["text"] == TEXTS[0]
    assert all(check["passed"] for check in content["checks"])


def test_a_tokenizer_that_differs_on_ones_own_text_alone(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("zyx", "fox")
    tokenizer.save(str(package / "tokenizer.json"))
    renew_hashes(package)
    text = tmp_path / "text"
    text.write_text("the zyx", encoding="utf-8")
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 2)
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--text", text)
    assert result.exit_code == 1
    assert "on 'the zyx': from token " in result.stdout


def test_the_same_tokenizer_has_its_line(made: Make) -> None:
    package, source = made("fp32")
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    line = (
        "same 288 tokens as the source's tokenizer.json, and the same ids and text on "
        f"{len(FIXED_TEXTS)} texts"
    )
    assert line in run(*arguments).stdout
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["tokenizer"] == {
        "source": "tokenizer.json",
        "texts": len(FIXED_TEXTS),
        "tokens": 288,
        "difference": None,
        "vocabulary": None,
        "passed": True,
    }


def test_a_missing_tokenizer_fails_unless_the_source_has_none(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")
    source = Path(shutil.copytree(source, tmp_path / "source"))
    (package / "tokenizer.json").unlink()
    renew_hashes(package)
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "tokenizer  MISSING: the source has a tokenizer.json" in result.stdout
    (source / "tokenizer.json").unlink()
    result = run(*arguments)
    assert result.exit_code == 0
    assert "tokenizer  not compared: there is no tokenizer in the source" in result.stdout
    assert json.loads(run(*arguments, "--json").stdout)["tokenizer"] is None


# The files


def _capitals(file: Path) -> None:
    file.write_bytes(file.read_bytes().upper())


def _longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("LICENSE.txt", _capitals),
        ("LICENSE.txt", Path.unlink),
        ("genai_config.json", _longer),
        ("genai_config.json", Path.unlink),
        ("config.json", _longer),
    ],
)
def test_a_file_that_is_not_the_manifests_fails_and_is_named(
    copied: Make, name: str, change: Callable[[Path], None]
) -> None:
    package, source = copied("fp32")
    change(package / name)
    arguments = (package, "--reference", source, "--tokens", 2, "--prompt-tokens", 4)
    result = run(*arguments)
    assert result.exit_code == 1
    assert f"failed: {name} is missing or changed since the export.\n" in result.stdout
    assert re.search(r"files altered +1 +0 +MISSED", result.stdout)
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["passed"] is False
    assert all(check["passed"] for check in found["checks"]) and found["tokenizer"]["passed"]
    assert found["altered"] == [name]


def test_another_rope_scaling_is_another_model(copied: Make) -> None:
    package, source = copied("fp32")
    config = json.loads((package / "config.json").read_text(encoding="utf-8"))
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (package / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match=r"rope_scaling is RopeScaling.*'linear'.* and None in"):
        report_on(package, source)


# The command


def test_the_command_prints_a_verdict(made: Make) -> None:
    package, source = made("int4")
    result = run(package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    assert result.exit_code == 0, result.output
    assert "passed: every threshold holds." in result.stdout
    assert "CPUExecutionProvider" in result.stdout
    assert "batch, padded left" in result.stdout
    assert result.stderr == ""


def test_the_command_fails_with_1_and_names_what_is_missed(made: Make) -> None:
    package, source = made("int4")
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    result = run(*arguments, "--max-kl", 1e-6)
    assert result.exit_code == 1
    assert "failed: quantization mean_kl, total mean_kl (in every situation) " in result.stdout


def test_the_command_writes_json(made: Make) -> None:
    package, source = made("fp32")
    result = run(package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8, "--json")
    content = json.loads(result.stdout)
    assert content["passed"] is True
    assert content["provider"] == "CPUExecutionProvider"
    assert content["positions"] == 4 * (8 + 4)
    assert {m["error"] for m in content["measurements"]} == {
        "graph", "shipped", "quantization", "total"
    }  # fmt: skip


def test_another_models_checkpoint_is_a_wrong_call(made: Make) -> None:
    package, _ = made("fp32")
    _, other = made("int4-partial-fused")
    result = run(package, "--reference", other)
    assert result.exit_code == 2
    assert "hidden_size is 64 in the package and 80 in the checkpoint" in result.stderr


def test_a_text_of_ones_own(made: Make, tmp_path: Path) -> None:
    package, source = made("fp32")
    text = tmp_path / "ü.txt"
    text.write_text("The capital of France is Paris.", encoding="utf-8")
    arguments = (package, "--reference", source, "--tokens", 4, "--json", "--text", text)
    content = json.loads(run(*arguments).stdout)
    assert [len(greedy["divergences"]) for greedy in content["greedy"]] == [1, 1]
    text.write_bytes(b"\xff\xfe\xff")
    assert run(*arguments).exit_code == 2
    text.write_bytes(b"")
    assert run(*arguments).exit_code == 2


def test_prompts_leave_room_in_the_context(made: Make) -> None:
    package, _ = made("fp32")
    config: LlamaConfig = replace(tiny.GQA, max_position_embeddings=20)
    assert [len(ids) for ids in make_prompts(package, config, tokens=12, longest=64)] == [8] * 4
    with pytest.raises(UsageError, match="do not fit the context of 20"):
        make_prompts(package, config, tokens=20, longest=64)


def test_without_a_tokenizer_the_prompts_are_the_same_every_time(copied: Make) -> None:
    package, source = copied("fp32")
    (package / "tokenizer.json").unlink()
    first, second = (make_prompts(package, tiny.GQA, tokens=4, longest=64) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    report = validate(open_subject(package, open_checkpoint(source)), PromptSet(first, 4))[0]
    assert missed(report) == set()
    assert report.tokenizer is not None and not report.tokenizer.passed


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.onnx"])
def test_a_file_too_damaged_to_be_read_is_named_as_changed(copied: Make, name: str) -> None:
    package, source = copied("fp32")
    content = (package / name).read_bytes()
    (package / name).write_bytes(content[: len(content) // 2])
    result = run(package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    assert result.exit_code == 1
    assert result.stderr.endswith(f": {name} changed since the export.\n")
    assert len(result.stderr.splitlines()) == 1
