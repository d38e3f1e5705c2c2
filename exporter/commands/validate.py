"""`llama-onnx validate`: prove a package against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import Source, adapter_option
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, is_package

if TYPE_CHECKING:
    from llama_onnx.exporter.parity.bisect.search import Bisection
    from llama_onnx.exporter.parity.measure.report import ParityReport


@click.command("validate")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=Source,
    help="The checkpoint that PACKAGE was made from: a path, or OWNER/NAME on the hub.",
)
@adapter_option
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure on the beginning of this UTF-8 file instead of the built-in texts.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    help="Greedy tokens after each prompt.  [default: 64; 16 from 3 billion parameters on]",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="Maximum tokens of a prompt.  [default: 128; from 3 billion parameters on, 32, and 128 of "
    "the first]",
)
@click.option(
    "--max-kl", type=float, help="Also fail above this mean KL divergence from the original (nats)."
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Accept a loss beyond the limits of fidelity that PACKAGE's recipe has.",
)
@click.option(
    "--certify",
    is_flag=True,
    help="If every limit holds, write the certificate that `verify` replays.",
)
@click.option(
    "--thorough",
    is_flag=True,
    help="Also measure at positions 2047, 2048, 2049 and up to the end of the context.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write the report to an HTML page that needs neither scripts nor a network.",
)
@click.option(
    "--bisect",
    "bisecting",
    is_flag=True,
    help="If a threshold is missed, find the first layer and operator at fault.",
)
@click.option(
    "--bisect-out",
    type=click.Path(path_type=Path),
    help="Folder for that operator, its input and a script.  [default: PACKAGE-bisect]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    package: Path,
    reference: Path | HubId,
    adapters: tuple[str, ...],
    text: Path | None,
    tokens: int | None,
    prompt_tokens: int | None,
    max_kl: float | None,
    accept_loss: bool,
    certify: bool,
    thorough: bool,
    report_file: Path | None,
    bisecting: bool,
    bisect_out: Path | None,
    as_json: bool,
) -> None:
    """Compare PACKAGE with the checkpoint it was made from, each kind of error separately.

    With --adapter, compare with the checkpoint plus that adapter, which must be merged into
    PACKAGE. If PACKAGE keeps its adapters beside the base, the adapter is activated instead.

    There are two verdicts. Conversion: whether PACKAGE computes what its weights say, and is the
    rounded checkpoint. Fidelity: what the rounding costs, graded in words.

    The exit status is 1 when a threshold is missed, the tokenizer differs from the source's, or a
    file does not match the manifest; and when more is lost than PACKAGE's recipe may lose, unless
    --accept-loss is given.
    """
    from llama_onnx.exporter.checkpoints.download import local_copy
    from llama_onnx.exporter.parity.bisect.search import bisect
    from llama_onnx.exporter.parity.measure.open_subject import open_subject
    from llama_onnx.exporter.parity.measure.prompts import TEXTS
    from llama_onnx.exporter.parity.prove import prove_subject
    from llama_onnx.exporter.parity.report.page import write_report
    from llama_onnx.exporter.sources import open_checkpoint
    from llama_onnx.runtime.reports.report_file import check_report_file

    active = _active_adapter(package, adapters)
    out = _bisect_folder(package, bisect_out, active) if bisecting or bisect_out else None
    if report_file:
        check_report_file(report_file)
    merged = [] if active else [Path(folder) for folder in adapters]
    subject = open_subject(package, open_checkpoint(local_copy(reference), merged), active)
    with progress_line() as progress:
        report = prove_subject(
            subject,
            texts=TEXTS if text is None else (_read_text(text, package),),
            tokens=tokens,
            longest=prompt_tokens,
            max_kl=max_kl,
            accept_loss=accept_loss,
            thorough=thorough,
            certify=certify,
            progress=progress,
        )
        found = bisect(subject, report, out, progress) if out else None
    if report_file:
        write_report(report, report_file)
    _print(report, found, certified=certify and report.accepted, as_json=as_json)
    ctx.exit(0 if report.accepted else 1)


def _print(
    report: ParityReport, found: Bisection | None, *, certified: bool, as_json: bool
) -> None:
    from llama_onnx.exporter.parity.report.terminal import print_bisection, print_report

    if as_json:
        click.echo(report.to_json(**({"bisect": found.to_json()} if found else {})))
        return
    print_report(report)
    if found:
        print_bisection(found)
    if certified:
        say(f"certified: {Path(report.package) / 'parity'}, for `llama-onnx verify`.")


def _bisect_folder(package: Path, given: Path | None, active: tuple[str, Path] | None) -> Path:
    from llama_onnx.exporter.parity.bisect.reproduce import check_out

    if active:
        raise UsageError("--bisect examines only the base: use it without --adapter.")
    out = given or package.absolute().with_name(f"{package.absolute().name}-bisect")
    check_out(out, package)
    return out


def _read_text(text: Path, package: Path) -> str:
    from llama_onnx.exporter.parity.measure.prompts import read_text

    if opened := ModelPackage.unchecked(package):
        opened.require_tokenizer()
    return read_text(text)


def _active_adapter(package: Path, adapters: Sequence[str]) -> tuple[str, Path] | None:
    """Return name and PEFT folder of the adapter to activate, if `package` keeps adapters."""
    from llama_onnx.exporter.packaging.adapters import named_adapters

    if not adapters or not is_package(package) or not ModelPackage.open(package).adapters:
        return None
    if len(adapters) > 1:
        raise UsageError(
            f"{package} keeps its adapters beside the base, and only one can be active: pass "
            "--adapter once."
        )
    (found,) = named_adapters(adapters).items()
    return found
