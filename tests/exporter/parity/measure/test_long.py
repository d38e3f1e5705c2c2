"""The whole context, past the length that the model was trained on; in bounded memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.rope import RopeScaling
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.long import PIECE, LongContext, in_pieces, measure_long
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.reference.segments import run_segments
from llama_onnx.exporter.reference.walk import walk
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.situations import LONG_CONTEXT, Passage
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.progress import SILENT
from tests.support import tiny
from tests.support.faults import edit

CONTEXT, TRAINED = 2304, 576
CONFIG = replace(
    tiny.GQA,
    num_hidden_layers=2,
    max_position_embeddings=CONTEXT,
    rope_scaling=RopeScaling("linear", 4.0),
)
EDGES = [2046, 2047, 2048, CONTEXT - 3, CONTEXT - 2, CONTEXT - 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Package (int4, fp32 activations) and source."""
    folder = tmp_path_factory.mktemp("long")
    source = tiny.write_huggingface(folder / "source", CONFIG)
    options = Options("int4", accuracy_level=1)
    return export_package(source, folder / "package", TARGET, options).package, source


def measured(package: Path, source: Path) -> LongContext:
    prompts = [np.arange(5, 40), np.arange(100, 160)]
    subject = open_subject(package, open_checkpoint(source))
    return measure_long(subject, prompts, TRAINED, SILENT)


def test_a_sound_package_holds_up_to_the_end(made: tuple[Path, Path]) -> None:
    long = measured(*made)
    assert long.length == CONTEXT
    assert [row.position for row in long.positions] == EDGES
    assert all(row.beyond_training for row in long.positions)
    assert max(row.graph for row in long.positions) < 1e-5
    assert max(row.shipped for row in long.positions) < 1e-5
    assert min(row.kl for row in long.positions) > 1e-4  # int4 costs something
    assert long.figures["graph"].positions == len(EDGES)


def test_the_total_is_against_the_original_at_those_very_positions(
    made: tuple[Path, Path],
) -> None:
    package, source = made
    ids = np.resize(np.concatenate([np.arange(5, 40), np.arange(100, 160)]), CONTEXT)
    (there,) = walk(open_checkpoint(source), [ids])
    (here,) = walk(PackageCheckpoint.open(package), [ids])
    expected = np.abs(here[EDGES] - there[EDGES]).max()
    assert measured(package, source).figures["total"].max_abs == pytest.approx(expected, rel=1e-3)


def _negate_late(cosines: np.ndarray) -> None:
    cosines[2047:] *= -1


def test_a_table_that_is_wrong_late_is_seen_here_alone(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    package, source = made
    damaged = tmp_path / "ä 日本"
    damaged.mkdir()
    for file in package.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    edit(damaged, "model.cos_cache.weight", _negate_late)
    report = _validate(damaged, source)
    missed = {(c["measure"], c["situation"]) for c in report["checks"] if not c["passed"]}
    # Of the situations, that is: the tables themselves are compared too.
    assert missed == {("graph", "long"), ("shipped", "long"), ("rotary", "")}
    assert [row["graph"] < 1e-5 for row in report["long"]["positions"]] == [True] + [False] * 5


def test_validate_goes_there_when_asked(made: tuple[Path, Path]) -> None:
    report = _validate(*made)
    assert report["passed"] is True
    assert report["trained_length"] == TRAINED
    assert [row["position"] for row in report["long"]["positions"]] == EDGES
    measured = {m["error"] for m in report["measurements"] if m["situation"] == "long"}
    assert measured == {"graph", "shipped", "total"}
    checked = {c["measure"] for c in report["checks"] if c["situation"] == "long"}
    assert checked == {"graph", "shipped"}


def _validate(package: Path, source: Path) -> Any:
    arguments = ["validate", package, "--reference", source, "--tokens", 4, "--prompt-tokens", 16]
    result = CliRunner().invoke(main, [*map(str, arguments), "--thorough", "--json"])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def test_pieces_do_the_same_in_smaller_steps() -> None:
    program = LONG_CONTEXT.program([Passage(np.arange(CONTEXT), CONTEXT)])
    pieces = in_pieces(program, PIECE)
    assert max(step.ids.shape[1] for step in pieces) == PIECE < 2047
    assert np.array_equal(np.concatenate([step.ids[0] for step in pieces]), np.arange(CONTEXT))
    assert [step.mask.shape[1] for step in pieces] == np.cumsum(
        [step.ids.shape[1] for step in pieces]
    ).tolist()
    assert [step.past for step in pieces] == [None, *range(len(pieces) - 1)]
    assert [row for step in pieces for row in step.rows] == [r for s in program for r in s.rows]


def test_pieces_of_a_graph_forget_what_no_later_one_reads(made: tuple[Path, Path]) -> None:
    package, _ = made
    config = PackageCheckpoint.open(package).config
    program = LONG_CONTEXT.program([Passage(np.arange(64), 64)])
    ghosts: list[dict[str, weakref.ref[np.ndarray]]] = []
    for _, steps in run_segments(package / "model.onnx", program, config):
        # Two pieces back, only what the whole graph passes on (the mask's lengths) is alive.
        for before in ghosts[:-1]:
            kept = {name for name, ghost in before.items() if ghost() is not None}
            assert not any("layers." in name for name in kept)
        last: dict[str, weakref.ref[np.ndarray]] = {}
        for outputs in steps:
            last |= {name: weakref.ref(value) for name, value in outputs.items()}
            del outputs
        ghosts.append(last)
    assert any("layers." in name for before in ghosts for name in before)
