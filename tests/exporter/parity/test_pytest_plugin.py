"""The fixture as another project uses it: three lines, and a failure that says what and where."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomllib

from tests.support.faults import edit

pytest_plugins = ["pytester"]

CONFTEST = "from llama_onnx.exporter.parity.pytest_plugin import llama_parity\n"
# As the entry point loads it, but wherever these tests run from.


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    return pytester


def write_test(project: pytest.Pytester, package: Path, reference: Path, more: str = "") -> None:
    project.makepyfile(
        f"def test_my_model(llama_parity):\n"
        f"    llama_parity({str(package)!r}, reference={str(reference)!r}, tokens=4{more})\n"
    )


def test_a_sound_package_passes_and_leaves_its_report(
    project: pytest.Pytester, package: Path
) -> None:
    page = project.path / "seite ä 日本.html"
    write_test(project, package, package.parent / "checkpoint", f", report={str(page)!r}")
    project.runpytest_inprocess().assert_outcomes(passed=1)
    assert "Passed" in page.read_text(encoding="utf-8")


def test_a_damaged_package_fails_and_the_limit_and_place_are_named(
    project: pytest.Pytester, package_fp32: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(package_fp32, tmp_path / "kaputt ä 日本"))

    def shift(table: np.ndarray) -> None:
        table[:] = np.roll(table, 1, axis=0)

    edit(damaged, "model.cos_cache.weight", shift)
    write_test(project, damaged, package_fp32.parent / "checkpoint")
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert f"{damaged} differs from {package_fp32.parent / 'checkpoint'}:" in text
    assert "graph relative_l2 (in every situation): 0." in text
    assert "limit 1e-05: the same weights in the same fp32 arithmetic" in text
    assert "the graph exceeds the limit after layer 0: relative L2 " in text
    assert "Traceback" not in text and "pytest_plugin.py" not in text


def test_what_the_package_may_cost_is_the_projects_own_limit(
    project: pytest.Pytester, package: Path
) -> None:
    write_test(project, package, package.parent / "checkpoint", ", max_kl=1e-9")
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*quantization mean_kl: 0.*, limit 1e-09: asked for*"])


def test_a_wrong_path_is_one_sentence(project: pytest.Pytester, tmp_path: Path) -> None:
    write_test(project, tmp_path / "nothing", tmp_path / "nowhere")
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert str(tmp_path) in result.stdout.str()
    assert "Traceback" not in result.stdout.str()


def test_nothing_heavy_is_loaded_by_tests_that_do_not_ask(project: pytest.Pytester) -> None:
    project.makepyfile(
        "import sys\n"
        "def test_light(request):\n"
        "    assert 'llama_onnx.exporter.parity.pytest_plugin' in sys.modules\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'jinja2'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    plugins = ["xdist", "hypothesispytest", "anyio"]  # other plugins may load what they like
    result = project.runpytest_subprocess(*(f"-pno:{name}" for name in plugins))
    result.assert_outcomes(passed=1)


def test_the_entry_point_is_where_the_fixture_is() -> None:
    content = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    (module,) = tomllib.loads(content)["project"]["entry-points"]["pytest11"].values()
    assert hasattr(importlib.import_module(module), "llama_parity")
