"""The matrix of `nox -s parity`: what it covers, and that a case that fails is seen."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.trials import parity_matrix
from benchmarks.trials.parity_matrix import Row, choose, main, run_case
from tests.support.matrix import SOURCES, STORAGES, VARIANTS, Case, all_cases, cover


def test_every_pair_that_can_be_is_tried() -> None:
    cases = cover(list(all_cases()))
    assert len(cases) < len(list(all_cases())) / 3
    assert {(c.storage, c.source) for c in cases} == set(product(STORAGES, SOURCES))
    assert {(c.storage, c.variant) for c in cases} == set(product(STORAGES, VARIANTS))
    possible = {(name, variant) for name, s in SOURCES.items() for variant in s.variants}
    assert {(c.source, c.variant) for c in cases} == possible


def test_a_case_runs_from_source_to_certificate(tmp_path: Path) -> None:
    row = run_case(Case("int8", "LoRA, merged", "GQA"), tmp_path / "ä 日本", ["cpu"], False)
    assert row.passed, row.problem
    assert row.providers == {"cpu": True}
    assert row.graph is not None and 0 < row.graph < 1e-5
    assert row.kl is not None and 1e-6 < row.kl < 0.05


def test_a_case_that_breaks_is_a_row_that_failed(tmp_path: Path) -> None:
    row = run_case(Case("int8", "no such source", "GQA"), tmp_path, ["cpu"], False)
    assert not row.passed
    assert "no such source" in row.problem


class _InThisProcess:
    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@pytest.mark.parametrize("problem", ["", "graph relative_l2: 1, limit 1e-05"])
def test_the_exit_status_is_1_when_one_fails(monkeypatch: Any, problem: str) -> None:
    def measure(case: Case, *_: object) -> Row:
        broken = problem if case.source == "GGUF Q4_0" else ""
        return Row(case.storage, case.source, case.variant, graph=1e-6, problem=broken)

    monkeypatch.setattr(parity_matrix, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setattr(parity_matrix, "run_case", measure)
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == bool(problem)
        if arguments:
            content = json.loads(result.stdout)
            assert content["passed"] is not bool(problem)
            assert len(content["rows"]) == len(cover(list(all_cases())))
        else:
            assert ("FAILED int8 | GGUF Q4_0" in result.stdout) is bool(problem)
            assert "not every combination" in result.stdout


def test_a_name_that_fits_no_case_is_a_wrong_call() -> None:
    with pytest.raises(Exception, match="no case has 'xyz' in its name"):
        choose(real=False, every=False, only="xyz")
    assert {case.storage for case in choose(real=True, every=False, only="")} == set(STORAGES)
