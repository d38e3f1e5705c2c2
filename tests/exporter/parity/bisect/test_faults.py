"""Every fault of tests/support/faults.py is found by its own measure, and named by bisect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.formats.tensor import BlockCodes
from llama_onnx.exporter.parity.bisect.culprit import find_culprit
from llama_onnx.exporter.parity.bisect.deviation import deviation, ranges
from llama_onnx.exporter.parity.bisect.search import Bisection, Finding, _note, bisect
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.weights import block_errors
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.situations import SITUATIONS, join, run_plainly
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT
from tests.support.faults import FAULTS, Fault, edit, edit_graph, epsilon, node_of
from tests.support.parity import Make, missed, report_on

# Every fault in one precision, each precision with every kind of them; `nox -s faults` runs all.
CASES = [
    pytest.param(fault, fault.precisions[i % len(fault.precisions)], id=fault.name)
    for i, fault in enumerate(FAULTS)
]


def measured(package: Path, source: Path) -> ParityReport:
    return report_on(package, source, tokens=6, longest=20)


def subject_of(package: Path, source: Path) -> Subject:
    return open_subject(package, open_checkpoint(source))


def what_finds(package: Path, report: ParityReport) -> set[str]:
    found = missed(report)
    if report.tokenizer is not None and not report.tokenizer.passed:
        found.add("tokenizer")
    try:
        altered = ModelPackage.open(package).verify()
    except PackageError:
        altered = ["another size"]
    return found | ({"integrity"} if altered else set())


@pytest.mark.parametrize(("fault", "precision"), CASES)
def test_a_fault_is_found_and_named(
    copied: Make, tmp_path: Path, fault: Fault, precision: str
) -> None:
    package, source = copied(precision)
    fault.plant(package)
    if fault.found_by == ("refused",):
        with pytest.raises(PackageError):
            measured(package, source)
        return
    report = measured(package, source)
    assert set(fault.found_by) <= what_finds(package, report)
    out = tmp_path / "bisect ä 日本"
    result = bisect(subject_of(package, source), report, out)
    if not fault.layer:
        assert result.finding is None or precision == "fp32"  # a flipped bit is a weight's, too
        return
    finding = result.finding
    assert finding is not None, result.note
    assert finding.layer == fault.layer
    assert any(fault.op in node for node in (finding.op, *finding.others))
    assert finding.cause == fault.found_by[0]
    reproduces(out)


def reproduces(out: Path) -> None:
    """The piece alone gives what was found, which is not what was expected."""
    onnx.checker.check_model(onnx.load(out / "model.onnx"), full_check=False)
    session = ort.InferenceSession(
        (out / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    inputs = dict(np.load(out / "input.npz"))
    (output,) = session.get_outputs()
    (again,) = session.run([output.name], inputs)
    found, expected = (np.load(out / f"{n}.npz")[output.name] for n in ("found", "expected"))
    counted = ~np.isnan(expected)
    np.testing.assert_allclose(again[counted], found[counted], rtol=1e-6, atol=1e-7)
    assert np.abs(found - expected)[counted].max() > 0
    assert counted.any()


@pytest.mark.parametrize(
    "name", ["fp32", "int8", "int4", "fp16-tied", "int4-partial-fused", "int4-last", "int4-yarn"]
)
def test_no_piece_of_a_sound_graph_is_accused(made: Make, name: str) -> None:
    """In every situation, at half of the limit."""
    package, source = made(name)
    passages = measured(package, source).passages
    program = join(s.program(passages) for s in SITUATIONS if s.run is run_plainly)
    subject = subject_of(package, source)
    assert find_culprit(subject, passages, program, 5e-6, True, SILENT) is None


def finding_of(package: Path, source: Path, out: Path) -> Finding:
    result = bisect(subject_of(package, source), measured(package, source), out)
    assert result.finding is not None, result.note
    return result.finding


def test_an_earlier_layers_error_does_not_accuse_a_later_one(copied: Make, tmp_path: Path) -> None:
    """The first of two faults is named; with it mended, the second."""
    package, source = copied("fp32")
    graph = (package / "model.onnx").read_bytes()

    def later(graph: onnx.GraphProto) -> None:
        node = node_of(graph, "layers.2/mlp", "QuickGelu")
        node.attribute[0].f = 1.1

    edit_graph(package, epsilon)
    edit_graph(package, later)
    assert finding_of(package, source, tmp_path / "out").layer == "layer 1"
    (package / "model.onnx").write_bytes(graph)
    edit_graph(package, later)
    assert finding_of(package, source, tmp_path / "out").layer == "layer 2"


def test_it_says_which_positions_heads_and_rows(copied: Make, tmp_path: Path) -> None:
    by_name = {fault.name: fault for fault in FAULTS}
    package, source = copied("fp32")
    graph = (package / "model.onnx").read_bytes()
    for name, words in (
        ("attention sees the last 8 positions only", "positions 8-25 of 0-25"),
        ("query heads grouped with other KV heads, in the graph", "heads 1-2 of 4"),
        ("logits of another position under left padding", "rows 1-3 of a batch of 4"),
    ):
        by_name[name].plant(package)
        assert words in finding_of(package, source, tmp_path / "out").where
        (package / "model.onnx").write_bytes(graph)
    by_name["one rotary angle off, farther than any prompt"].plant(package)
    where = finding_of(package, source, tmp_path / "out").where
    assert where == ("positions 200 of 0-255", "in 3 of 3 layers")


def test_a_wrong_weight_is_named_by_row_and_block(copied: Make, tmp_path: Path) -> None:
    package, source = copied("int4")

    def change(scales: np.ndarray) -> None:
        scales[7, 2] *= np.float32(1.02)

    edit(package, "model.layers.1.mlp.down_proj.scales", change)
    finding = finding_of(package, source, tmp_path / "out")
    assert finding.value == "model.layers.1.mlp.down_proj.weight"
    assert finding.where[:3] == (
        "32 of 6,144 weights", "rows 7 of 64", "columns 64-95 of 96 (block 2)"
    )  # fmt: skip


def test_a_rotary_table_of_one_layer_alone(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")

    def replace_table(graph: onnx.GraphProto) -> None:
        wrong = onnx.numpy_helper.from_array(np.ones((256, 8), np.float32), "own_cos")
        graph.initializer.append(wrong)
        node_of(graph, "layers.2/self_attn", "GroupQueryAttention").input[7] = "own_cos"

    edit_graph(package, replace_table)
    finding = finding_of(package, source, tmp_path / "out")
    assert (finding.layer, finding.value) == ("layer 2", "own_cos")
    assert finding.where == ("positions 1-255 of 0-255", "in 1 of 3 layers")
    reproduces(tmp_path / "out")


def test_names_in_a_graph_are_no_code(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")

    def rename(graph: onnx.GraphProto) -> None:
        epsilon(graph)
        node = node_of(
            graph, "layers.1/post_attention_layernorm", "SkipSimplifiedLayerNormalization"
        )
        node.name += '"""\'); raise SystemExit(77)  # {x}'

    edit_graph(package, rename)
    finding_of(package, source, tmp_path / "out")
    subprocess.run([sys.executable, str(tmp_path / "out" / "reproduce.py")], check=True)


def test_what_only_the_whole_context_shows_is_found_there(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")

    def window(graph: onnx.GraphProto) -> None:
        node = node_of(graph, "layers.1/self_attn", "GroupQueryAttention")
        node.attribute.append(onnx.helper.make_attribute("local_window_size", 100))

    edit_graph(package, window)
    report = report_on(package, source, tokens=6, longest=20, thorough=True)
    assert {c.situation for c in report.checks if not c.passed} == {"long"}
    result = bisect(subject_of(package, source), report, tmp_path / "out")
    assert result.finding is not None
    assert result.finding.layer == "layer 1"
    assert "positions 100-255 of 0-255" in result.finding.where


# Where there is nothing to name


def test_without_a_fault_it_says_so(made: Make, tmp_path: Path) -> None:
    package, source = made("int4")
    report = measured(package, source)
    result = bisect(subject_of(package, source), report, tmp_path / "out")
    assert result == Bisection(None, "every threshold holds, so there is nothing to look for.")
    strict = report_on(package, source, tokens=6, longest=20, max_kl=1e-6)
    result = bisect(subject_of(package, source), strict, tmp_path / "out")
    assert result.finding is None
    assert result.note.startswith("only quantization and total missed")
    assert not (tmp_path / "out").exists()


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def test_the_command_prints_and_writes_what_it_found(copied: Make, tmp_path: Path) -> None:
    package, source = copied("int4")
    edit_graph(package, epsilon)
    arguments = (package, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    result = run(*arguments, "--bisect")
    assert result.exit_code == 1
    assert "layer 1, post_attention_layernorm: SkipSimplifiedLayerNormalization" in result.stdout
    out = package.with_name("int4-bisect")
    names = ["expected.npz", "found.npz", "input.npz", "model.onnx", "reproduce.py"]
    assert sorted(file.name for file in out.iterdir()) == names
    said = subprocess.check_output([sys.executable, str(out / "reproduce.py")], text=True)
    assert "relative L2" in said and "instead of" in said
    # Again, into a folder of one's own; the first one's content does not matter.
    content = json.loads(run(*arguments, "--bisect-out", tmp_path / "own", "--json").stdout)
    finding = content["bisect"]["finding"]
    assert (finding["layer"], finding["op_type"]) == (
        "layer 1", "SkipSimplifiedLayerNormalization"
    )  # fmt: skip
    assert (tmp_path / "own" / "reproduce.py").exists()
    assert run(*arguments, "--bisect").exit_code == 1


def test_the_command_writes_over_nothing_of_others(copied: Make, tmp_path: Path) -> None:
    package, source = copied("fp32")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    result = run(package, "--reference", source, "--bisect-out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has other files" in result.stderr
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
    result = run(package, "--reference", source, "--bisect-out", package / "out")
    assert result.exit_code == 2
    assert "is in the package" in result.stderr
    result = run(package, "--reference", source, "--tokens", 2, "--prompt-tokens", 4, "--bisect")
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("bisect"))
    assert line == "bisect: every threshold holds, so there is nothing to look for."


@pytest.mark.parametrize("measures", [set(), {"graph"}, {"weights", "total"}])
def test_a_note_has_no_colon_of_its_own(measures: set[str]) -> None:
    missed = cast(ParityReport, SimpleNamespace(passed=False))
    assert ":" not in _note(missed, measures)


# The pieces


def test_block_errors_by_hand() -> None:
    expected = np.array([[1, -8, 2, 3, 5, -5]], np.float32)
    found = np.array([[1, -8.08, 2, 3, 4, -5]], np.float32)
    # Blocks of 4: the first one's largest is 1 % off; of the second one's two, one is right.
    np.testing.assert_allclose(
        block_errors(found, expected, BlockCodes(4, 4)), [[0.01, 0]], atol=1e-7
    )
    assert block_errors(found, expected, None).shape == (1, 0)


def test_a_deviation_by_hand() -> None:
    expected = np.ones((2, 2, 4))
    expected[1, 1] = np.nan  # padding
    found = np.ones((2, 2, 4), np.float32)
    found[1, 1] = 7
    assert deviation(expected, found, 1e-5).within(1e-5)
    found[0, 1, 3] = 1.5
    how = deviation(expected, found, 1e-5)
    assert how.relative_l2 == pytest.approx(0.5 / np.sqrt(12))
    assert (how.worst, how.max_abs) == (0.25, 0.5)
    assert how.positions.tolist() == [[False, True], [False, False]]
    assert how.channels.tolist() == [False, False, False, True]
    found[0, 0, 0] = np.nan
    assert not deviation(expected, found, 1e-5).within(1e9)
    assert not deviation(np.zeros((1, 1)), np.ones((1, 1)), 1e-5).within(1e9)


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(list(range(0, 40, 2))) == "0, 2, 4, 6, 8, 10 and 14 more"
