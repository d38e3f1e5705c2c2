"""Packages for every target: the same model, proved on the CPU as far as it has kernels.

What only a device can tell is told nowhere here: the structure check speaks of kernels that are
published, not of any that ran.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.graph.kernels import check_standard, check_structure, read_kernels
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.genai_config import cache_bytes_per_token
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.bisect.culprit import find_culprit
from llama_onnx.exporter.parity.bisect.search import bisect
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.reference.exact import compute_in_float32
from llama_onnx.exporter.reference.walk import walk
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.situations import SITUATIONS, join, run_plainly
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import TARGETS
from tests.support import tiny
from tests.support.faults import edit, edit_graph, node_of
from tests.support.packages import greedy

Array = npt.NDArray[Any]
Make = Callable[..., Path]

CASES = [
    pytest.param(name, precision, index % 2 == 1, id=f"{name} {precision}")
    for name, target in TARGETS.items()
    if name != "cpu"
    for index, precision in enumerate(target.graph.precisions)
    if precision != "bf16"
]
TYPES = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
IDS = np.random.default_rng(0).integers(3, 288, (2, 20))
PADDED = np.concatenate([np.zeros((1, 6), np.int64), np.ones((1, 14), np.int64)], axis=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    root = tmp_path_factory.mktemp("sources")

    @cache
    def make(tied: bool) -> Path:
        config = dataclasses.replace(tiny.GQA, tie_word_embeddings=tied)
        return tiny.write_huggingface(root / f"tied {tied}", config)

    return make


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, source: Callable[[bool], Path]) -> Make:
    root, numbers = tmp_path_factory.mktemp("packages ä 日本"), itertools.count()

    @cache
    def export(target: str, precision: str, tied: bool, **options: Any) -> Path:
        out = root / f"{target}-{precision}-{next(numbers)}"
        export_package(source(tied), out, TARGETS[target], Options(precision, **options))
        return out

    # Outside the cache, which takes a default for another argument than the same value given.
    def make(target: str, precision: str, tied: bool = False, **options: Any) -> Path:
        if (
            precision == "int4" and target != "cuda"
        ):  # once is enough to calibrate in half precision
            options.setdefault("quantizer", "rtn")
        return export(target, precision, tied, **options)

    return make


@pytest.fixture(scope="module")
def proved(make: Make, source: Callable[[bool], Path]) -> Callable[..., ParityReport]:
    """What is said about a package as it was made, measured once."""

    @cache
    def measure(target: str, precision: str, tied: bool) -> ParityReport:
        package, checkpoint = make(target, precision, tied), open_checkpoint(source(tied))
        return prove(package, checkpoint, tokens=4, longest=12)

    return measure


# --- every target -------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision", "tied"), CASES)
def test_a_package_is_its_source(
    proved: Callable[..., ParityReport], target: str, precision: str, tied: bool
) -> None:
    """Every error of `validate`: the graph's is at rounding level, whatever it computes in."""
    report = proved(target, precision, tied)
    assert report.passed, [c for c in report.checks if not c.passed]
    measured = {check.threshold.measure for check in report.checks}
    assert {"weights", "rotary", "graph", "shipped"} <= measured
    graph = TARGETS[target].graph
    expected = graph.activations[0]
    quantized = precision.startswith("int")
    assert report.activations == ("int8" if expected == "fp32" and quantized else expected)


def test_a_wrong_weight_of_a_half_precision_package_is_found(
    make: Make, source: Callable[[bool], Path], tmp_path: Path
) -> None:
    """The limits for rounded scales are wider, and still find a scale that is off by 2 %."""
    package = shutil.copytree(make("cuda", "int4", quantizer="rtn"), tmp_path / "wrong")
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    (scales,) = (i for i in graph.initializer if i.name == "model.layers.1.mlp.up_proj.scales")
    offset = next(int(e.value) for e in scales.external_data if e.key == "offset")
    with (package / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        value = np.frombuffer(file.read(2), np.float16) * np.float16(1.02)
        file.seek(offset)
        file.write(value.astype(np.float16).tobytes())
    report = prove(package, open_checkpoint(source(False)), tokens=4, longest=12)
    failed = {check.threshold.metric for check in report.checks if not check.passed}
    assert failed == {"block_maximum"}
    assert report.weights.block_maximum is not None
    assert report.weights.block_maximum.tensor == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu", "portable"])
def test_no_piece_of_a_sound_graph_is_accused(
    make: Make,
    proved: Callable[..., ParityReport],
    source: Callable[[bool], Path],
    target: str,
) -> None:
    """In float32, and as it ships within what half precision does."""
    package, report = make(target, "int4"), proved(target, "int4", False)
    program = join(s.program(report.passages) for s in SITUATIONS if s.run is run_plainly)
    subject = open_subject(package, open_checkpoint(source(False)))
    culprit = find_culprit(subject, report.passages, program, 5e-6, True, SILENT)
    assert culprit is None


@pytest.mark.parametrize(
    ("target", "scope", "operator", "attribute", "value"),
    [
        ("cuda", "layers.1/mlp", "QuickGelu", "alpha", 1.1),
        ("directml", "layers.1/self_attn", "GroupQueryAttention", "scale", 0.3),
        ("portable", "layers.1/post_attention_layernorm", "RMSNormalization", "epsilon", 0.1),
        ("portable", "layers.2/self_attn", "Attention", "scale", 0.3),
    ],
)
def test_the_operator_at_fault_is_named(
    make: Make,
    source: Callable[[bool], Path],
    tmp_path: Path,
    target: str,
    scope: str,
    operator: str,
    attribute: str,
    value: float,
) -> None:
    package = shutil.copytree(make(target, "int4"), tmp_path / "wrong")

    def change(graph: onnx.GraphProto) -> None:
        node = node_of(graph, scope, operator)
        kept = [entry for entry in node.attribute if entry.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    edit_graph(package, change)
    reference = open_checkpoint(source(False))
    report = prove(package, reference, tokens=4, longest=12)
    assert not report.passed
    finding = bisect(open_subject(package, reference), report, tmp_path / "found").finding
    assert finding is not None
    assert (finding.op_type, finding.layer) == (operator, scope.split("/")[0].replace("s.", " "))


@pytest.mark.parametrize("target", ["directml", "portable"])
def test_a_wrong_angle_is_found_where_rotation_is_an_operator_of_its_own(
    make: Make, source: Callable[[bool], Path], tmp_path: Path, target: str
) -> None:
    package = shutil.copytree(make(target, "int4"), tmp_path / "wrong")

    def shift(table: Array) -> None:
        table[100:] = table[99:-1].copy()

    edit(package, "model.cos_cache.weight", shift)
    reference = open_checkpoint(source(False))
    report = prove(package, reference, tokens=4, longest=12)
    assert {c.threshold.measure for c in report.checks if not c.passed} == {"rotary"}
    finding = bisect(open_subject(package, reference), report, tmp_path / "found").finding
    assert finding is not None and finding.op_type == "RotaryEmbedding"
    assert any("positions 100-255" in words for words in finding.where)


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_half_precision_halves_the_cache(make: Make, target: str) -> None:
    config = PackageCheckpoint.open(make(target, "int4")).config
    assert 2 * cache_bytes_per_token(config, "fp16") == cache_bytes_per_token(config)
    session = ort.InferenceSession(
        make(target, "int4") / "model.onnx", providers=["CPUExecutionProvider"]
    )
    types = {i.name: i.type for i in session.get_inputs()}
    assert types["past_key_values.0.key"] == "tensor(float16)"


def test_the_shared_buffer_is_how_a_prompt_goes_to_directml(
    make: Make, source: Callable[[bool], Path], tmp_path: Path
) -> None:
    """Its attention takes several tokens in front of an empty cache alone."""
    package = shutil.copytree(make("directml", "int4"), tmp_path / "directml")
    reference = open_checkpoint(source(False))
    assert prove(package, reference, tokens=4, longest=12, certify=True).passed
    assert len(verify(package, CPU).situations) == 9
    report = verify(package, dataclasses.replace(CPU, continues=False))
    assert report.passed
    assert [entry.situation for entry in report.situations] == ["prefill", "decode"]


def test_what_has_no_kernel_here_says_so(source: Callable[[bool], Path], tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    call = ["export", str(source(False)), str(out), "--target", "cuda", "--precision", "bf16"]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    assert "ran a step in fp32, because the CPU has no bf16 kernels" in result.stdout
    assert "Not run on cuda here: " in result.stdout
    result = CliRunner().invoke(main, ["validate", str(out), "--reference", str(source(False))])
    assert result.exit_code == 2
    assert "for which ONNX Runtime has no CPU kernels" in result.stderr
    with pytest.raises(PackageError, match="onnxruntime refuses"):
        open_session(out / "model.onnx", CPU)


def test_int4_in_bf16_computes_what_its_weights_say(make: Make) -> None:
    """The graph in fp32, as `validate` measures it; bf16 itself needs a device."""
    package = make("cuda", "int4", activations="bf16", quantizer="rtn")
    checkpoint = PackageCheckpoint.open(package)
    assert checkpoint.activations == "bf16"
    model = ir.load(package / "model.onnx")
    compute_in_float32(model, checkpoint.config)
    ir.external_data.load_to_model(model)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = run(session, IDS[:1], np.ones((1, 20), np.int64))
    (expected,) = walk(checkpoint, [IDS[0]])
    assert np.linalg.norm(logits[0] - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("cuda", {"precision": "fp32"}, "use fp16, bf16, int8, int4"),
        ("cpu", {"activations": "fp16"}, "fp16 activations are not available .* use fp32"),
        ("cuda", {"accuracy_level": 4}, "an accuracy level chooses between"),
        ("portable", {"accuracy_level": 1}, "an accuracy level chooses between"),
        ("portable", {"embedding": "int4"}, "no operator that reads an int4 embedding"),
        ("directml", {"embedding": "int8"}, "use fp32, fp16 or bf16"),
    ],
)
def test_what_a_target_cannot_is_one_sentence(
    source: Callable[[bool], Path], tmp_path: Path, target: str, options: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        export_package(source(False), tmp_path / "out", TARGETS[target], Options(**options))
    assert not list(tmp_path.iterdir())


# --- kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_the_kernels_are_counted_in_the_manifest(make: Make, target: str) -> None:
    package = make(target, "int4")
    structure = ModelPackage.open(package).manifest["structure"]
    nodes = onnx.load(package / "model.onnx", load_external_data=False).graph.node
    assert structure["provider"] == target
    assert structure["nodes"] == len(nodes)
    assert structure["kernels"] + sum(structure["on_cpu"].values()) == len(nodes)
    layers = [node for node in nodes if node.name.startswith("model/layers.")]
    known = {operator for _, operator in read_kernels(target)}
    assert {node.op_type for node in layers} <= known


@pytest.mark.parametrize(
    ("package_for", "held_against", "said"),
    [
        ("cpu", "cuda", r"GroupQueryAttention \(.*\): input 0 is fp32"),
        ("cpu", "webgpu", r"RMSNormalization \(.*\): it has no kernel there"),
        ("cuda", "directml", r"GatherBlockQuantized \(.*\): it has no kernel there"),
    ],
)
def test_a_graph_for_another_target_is_refused(
    make: Make, package_for: str, held_against: str, said: str
) -> None:
    model = ir.load(make(package_for, "int4") / "model.onnx")
    with pytest.raises(PackageError, match=said):
        check_structure(model, TARGETS[held_against])


def test_rotary_tables_that_directml_would_not_read_are_refused(make: Make) -> None:
    """It is registered for them, and leaves them out: the graph would open, and be wrong."""
    model = ir.load(make("directml", "int4") / "model.onnx")
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    tables = [model.graph.initializers[f"model.{name}_cache.weight"] for name in ("cos", "sin")]
    changed = ir.node(
        node.op_type, [*node.inputs, *tables], domain=node.domain, name=node.name, num_outputs=3
    )
    model.graph.insert_after(node, changed)
    with pytest.raises(PackageError, match="input 7 is not read"):
        check_structure(model, TARGETS["directml"])


@pytest.mark.parametrize(
    ("operator", "attributes", "said"),
    [
        ("MatMulNBits", {"bits": 2}, "bits is 2"),
        ("MatMulNBits", {"block_size": 128}, "64 columns are not whole blocks of 128"),
        ("MatMulNBits", {"block_size": 64, "bits": 8}, "odd number of blocks"),
        ("GroupQueryAttention", {"do_rotary": 1}, "do_rotary is 1"),
        ("GroupQueryAttention", {"softcap": 30.0}, "softcap is 30"),
        ("GroupQueryAttention", {"local_window_size": 128}, "local_window_size is 128"),
        ("RotaryEmbedding", {"rotary_embedding_dim": 8}, "rotary_embedding_dim is 8"),
    ],
)
def test_what_directml_would_compute_wrongly_is_refused(
    make: Make, operator: str, attributes: dict[str, Any], said: str
) -> None:
    """Its kernel does not read these, or reads them wrongly; `nox -s directml` shows which."""
    model = ir.load(make("directml", "int4") / "model.onnx")
    node = next(node for node in model.graph if node.op_type == operator)
    for name, value in attributes.items():
        node.attributes[name] = ir.Attr(name, TYPES[type(value)], value)
    if operator == "MatMulNBits" and attributes.get("bits") == 8:
        node.resize_inputs(4)
        node.replace_input_with(3, node.inputs[1])
    with pytest.raises(PackageError, match=said):
        check_structure(model, TARGETS["directml"])


def test_outputs_that_directml_does_not_write_are_refused() -> None:
    """Named, they make ONNX Runtime give the node to the CPU, as in packages of version 0.1."""
    operator, domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
    half = ir.TensorType(ir.DataType.FLOAT16)
    inputs = [ir.Value(name=name, type=half) for name in ("x", "residual", "gain")]
    node = ir.node(operator, inputs, domain=domain, num_outputs=4)
    for value, name in zip(node.outputs, ("y", "", "", "sum"), strict=True):
        value.name = name
    kernel = read_kernels("directml")[domain, operator]
    assert kernel.refusal(node, 1) is None
    node.outputs[1].name = "mean"
    assert kernel.refusal(node, 1) == "output 1 is not written"


def test_the_norms_of_directml_do_not_overflow(make: Make) -> None:
    """Its kernel squares in the type of its input: 20000 among 576 values is infinite in fp16."""
    model = ir.load(make("directml", "fp16") / "model.onnx")
    norms = [node for node in model.graph if node.op_type.endswith("LayerNormalization")]
    assert {node.op_type for node in norms} == {"SimplifiedLayerNormalization"}
    for node in norms:
        assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT
        assert node.outputs[0].dtype == ir.DataType.FLOAT16


def test_an_operator_newer_than_the_kernel_is_refused(make: Make) -> None:
    """ONNX Runtime takes a kernel for the version it was written for, not for a later one."""
    model = ir.load(make("directml", "int4") / "model.onnx")
    sound = check_structure(model, TARGETS["directml"])
    assert sound is not None and sound.on_cpu == {}
    model.graph.opset_imports[""] = 23
    with pytest.raises(
        PackageError, match=r"Cast \(.*\): it has a kernel for version .* not for 23"
    ):
        check_structure(model, TARGETS["directml"])


def test_nodes_on_the_cpu_are_said_to_prevent_capture(make: Make) -> None:
    structure = check_structure(ir.load(make("webgpu", "int4") / "model.onnx"), TARGETS["webgpu"])
    assert structure is not None and structure.on_cpu
    assert "keep the graph from being captured" in str(structure)


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_shapes_are_those_that_onnx_runtime_infers(make: Make, target: str) -> None:
    """The exporter stamps them: behind a contrib operator nobody infers any but this tool."""
    model = onnx.load(make(target, "int4") / "model.onnx", load_external_data=False)
    stamped = types_of(model)
    # It takes the type of a norm from the input, the kernels from the gain: without the casts.
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.input[0] = casts.get(node.input[0], node.input[0])
    del model.graph.value_info[:]
    inferred = types_of(SymbolicShapeInference.infer_shapes(model, auto_merge=True))
    # GatherND, of whose batch_dims it knows nothing, and the head behind it.
    operators = [node.op_type for node in model.graph.node]
    unknown = {node.output[0] for node in model.graph.node[operators.index("GatherND") :]}
    both = (stamped.keys() & inferred.keys()) - unknown
    assert "present.2.value" in both and len(both) >= 60
    for name in both:
        (dtype, shape), (its_dtype, its_shape) = stamped[name], inferred[name]
        assert dtype == its_dtype, name
        assert len(shape) == len(its_shape), name
        pairs = zip(shape, its_shape, strict=True)
        assert all(mine == its for mine, its in pairs if mine and its), name


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_optimization_leaves_the_fused_operators(make: Make, tmp_path: Path, target: str) -> None:
    """The graph that ONNX Runtime makes of it, on the CPU here, still has every one of them."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    package = make(target, "int4")
    ort.InferenceSession(package / "model.onnx", options, ["CPUExecutionProvider"])
    before = onnx.load(package / "model.onnx", load_external_data=False).graph.node
    after = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    wide = TARGETS[target].graph.operators.wide_norms
    norm = "SimplifiedLayerNormalization" if wide else "SkipSimplifiedLayerNormalization"
    for operator in ("GroupQueryAttention", "MatMulNBits", norm):
        count = sum(node.op_type == operator for node in before)
        assert count == sum(node.op_type == operator for node in after) > 0


# --- webgpu -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_webgpu_s_attention_has_an_empty_sink_and_no_rotary(make: Make, precision: str) -> None:
    """Its FlashAttention and its rotation of padded rows are wrong; a sink avoids the one,
    RotaryEmbedding the other. Such a sink takes nothing: without it, the CPU's logits are the
    same."""
    model = onnx.load(make("webgpu", precision) / "model.onnx", load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    attentions = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    for node in attentions:
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["do_rotary"], attributes["smooth_softmax"]) == (0, 1)
        assert all(node.input[:7]) and not any(node.input[7:11])
        sink = onnx.numpy_helper.to_array(weights[node.input[11]])
        assert sink.dtype == np.float16 and sink.tolist() == [-30000.0] * attributes["num_heads"]
    assert sum(n.op_type == "RotaryEmbedding" for n in model.graph.node) == 2 * len(attentions)


def test_an_empty_sink_changes_no_logit(make: Make, tmp_path: Path) -> None:
    """One of 0 does, so this test can fail."""
    package = shutil.copytree(make("webgpu", "int4"), tmp_path / "package")
    mask = np.concatenate([PADDED, np.ones_like(PADDED)])
    logits = []
    for sink in (-30000.0, 0.0, None):
        model = onnx.load(package / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type != "GroupQueryAttention":
                continue
            if sink is None:
                del node.input[7:]
                kept = [a for a in node.attribute if a.name != "smooth_softmax"]
                del node.attribute[:]
                node.attribute.extend(kept)
            for tensor in model.graph.initializer:
                if sink is not None and tensor.name == node.input[11]:
                    value = np.full(tensor.dims, sink, np.float16)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        onnx.save(model, package / "model.onnx")
        session = ort.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
        fed = feeds(session, IDS, mask)
        halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in fed.items()}
        logits.append(session.run(["logits"], halves)[0])
    given, taking, without = logits
    assert np.array_equal(given, without)
    assert np.abs(given - taking).max() > 1e-2


# --- portable -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TARGETS["portable"].graph.precisions)
def test_portable_runs_on_onnx_s_own_evaluator(make: Make, precision: str) -> None:
    """A runtime that knows the standard alone: prefill, a batch padded on the left, a step."""
    package = make("portable", precision)
    evaluator: Any = ReferenceEvaluator(str(package / "model.onnx"))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(package / "model.onnx", options, ["CPUExecutionProvider"])
    mask = np.concatenate([PADDED, np.ones_like(PADDED)])
    first = evaluator.run(None, feeds(session, IDS, mask))
    found = session.run(None, feeds(session, IDS, mask))
    valid = mask.astype(bool)
    assert close(found[0][valid], first[0][valid])
    past = {i.name: v for i, v in zip(cache_of(session), first[1:], strict=True)}
    longer = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    step = {"input_ids": IDS[:, :1], "attention_mask": longer, **past}
    assert close(session.run(None, step)[0], evaluator.run(None, step)[0])
    checkpoint = PackageCheckpoint.open(package)
    shifted, whole = walk(checkpoint, [IDS[0, 6:], IDS[1]])
    assert close(first[0][0, 6:], shifted) and close(first[0][1], whole)


def test_portable_has_no_operator_of_another_domain(make: Make, tmp_path: Path) -> None:
    for precision, tied in itertools.product(("fp32", "fp16", "int8", "int4"), (False, True)):
        model = onnx.load(make("portable", precision, tied) / "model.onnx")
        assert {(o.domain, o.version) for o in model.opset_import} == {("", 23)}
        assert {node.domain for node in model.graph.node} <= {""}
        # With the weights in it, which the exporter's check had not.
        onnx.checker.check_model(model, full_check=True)


def test_an_operator_of_another_domain_is_refused_for_portable(make: Make) -> None:
    with pytest.raises(PackageError, match="operators that are not ONNX's"):
        check_standard(ir.load(make("cpu", "int4") / "model.onnx"))


def test_a_graph_that_onnx_s_checker_refuses_is_refused_for_portable(make: Make) -> None:
    model = ir.load(make("portable", "int4") / "model.onnx")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["q_num_headz"] = ir.AttrInt64("q_num_headz", 4)
    with pytest.raises(PackageError, match="ONNX's checker refuses"):
        check_standard(model)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_fuses_the_portable_matrices(
    make: Make, tmp_path: Path, precision: str
) -> None:
    """Dequantized at every step they would take a hundred times as long."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        make("portable", precision, True) / "model.onnx", options, ["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 3 * 7 + 1
    dequantized = [node.name for node in nodes if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 1 and "embed_tokens" in dequantized[0]


def test_genai_runs_portable_as_it_runs_the_cpu_s(make: Make) -> None:
    prompt = IDS[0, :9].tolist()
    expected = greedy(make("cpu", "fp32"), prompt, 12)
    assert greedy(make("portable", "fp32"), prompt, 12) == expected


def types_of(model: onnx.ModelProto) -> dict[str, tuple[int, list[int]]]:
    """Dtype and shape of every value that has them; 0 stands for a dimension without a number."""
    return {
        value.name: (kind.elem_type, [dim.dim_value for dim in kind.shape.dim])
        for value in (*model.graph.value_info, *model.graph.output)
        if (kind := value.type.tensor_type).elem_type
    }


def cache_of(session: ort.InferenceSession) -> list[Any]:
    return [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]


def feeds(session: ort.InferenceSession, ids: Array, mask: Array) -> dict[str, Array]:
    empty = {
        entry.name: np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in cache_of(session)
    }
    return {"input_ids": ids, "attention_mask": mask, **empty}


def run(session: ort.InferenceSession, ids: Array, mask: Array) -> Array:
    logits: Array = session.run(["logits"], feeds(session, ids, mask))[0]
    return logits


def close(found: Array, expected: Array) -> bool:
    return bool(np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected))
