"""A fixture for the tests of other projects, which compares a package with its checkpoint:

    def test_my_model(llama_parity):
        llama_parity("path/to/package", reference="path/to/checkpoint")

pytest finds it wherever llama-onnx is installed. Heavy libraries load only when a test uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_onnx.targets.extras import missing_extra

if TYPE_CHECKING:
    from llama_onnx.exporter.parity.measure.report import ParityReport


class LlamaParity:
    """A function that asserts that a package passes `llama-onnx validate`."""

    def __call__(
        self,
        package: str | Path,
        *,
        reference: str | Path,
        adapters: Sequence[str | Path] = (),
        texts: Sequence[str] | None = None,
        tokens: int = 16,
        longest: int = 64,
        max_kl: float | None = None,
        accept_loss: bool = False,
        thorough: bool = False,
        report: str | Path | None = None,
    ) -> ParityReport:
        """Measure `package` against the checkpoint `reference` with `adapters` merged into it.

        Fails the calling test when a limit is missed, of conversion or of fidelity, or one of the
        two cannot be read. Prompts
        are the first `longest` tokens of each of `texts` (by default the built-in ones), continued
        greedily by `tokens` (2 or more). `max_kl` (nats), `accept_loss` and `thorough` are those of
        the command line; `report` is the HTML file to write. Returns the report.
        """
        try:
            from llama_onnx.exporter.parity.measure.prompts import TEXTS
            from llama_onnx.exporter.parity.prove import prove
            from llama_onnx.exporter.parity.report.page import write_report
            from llama_onnx.exporter.parity.report.words import failure
            from llama_onnx.exporter.sources import open_checkpoint
            from llama_onnx.runtime.reports.report_file import check_report_file
        except ModuleNotFoundError as error:
            missing = missing_extra("llama_parity", error.name, "export,cpu")
            pytest.fail(str(missing), pytrace=False)
        from llama_onnx.targets.errors import LlamaOnnxError

        try:
            if report is not None:
                check_report_file(Path(report))
            found = prove(
                Path(package),
                open_checkpoint(Path(reference), tuple(map(Path, adapters))),
                texts=TEXTS if texts is None else texts,
                tokens=tokens,
                longest=longest,
                max_kl=max_kl,
                accept_loss=accept_loss,
                thorough=thorough,
            )
            if report is not None:
                write_report(found, Path(report))
        except LlamaOnnxError as error:
            pytest.fail(str(error), pytrace=False)
        if not found.accepted:
            pytest.fail("\n".join(failure(found)), pytrace=False)
        return found


@pytest.fixture(scope="session")
def llama_parity() -> LlamaParity:
    """Assert that a package computes what its checkpoint does; see `LlamaParity`."""
    return LlamaParity()
