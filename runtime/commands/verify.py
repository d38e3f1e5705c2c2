"""`llama-onnx verify`: check a package's files, and that it computes the certified results here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.options import package_argument, provider_options, threads_option
from llama_onnx.targets.printable import printable_line
from llama_onnx.targets.provider import Provider

if TYPE_CHECKING:
    from rich.table import Table

    from llama_onnx.runtime.measure.integrity import Integrity
    from llama_onnx.runtime.measure.verify import VerifyReport
    from llama_onnx.targets.signature import Signature


_SHOWN = 5  # unlisted files that are named


@click.command("verify")
@package_argument
@provider_options
@threads_option
@click.option(
    "--key",
    metavar="PUBLIC.pem",
    type=click.Path(path_type=Path),
    help="Also check a signature, with the signer's public key: ed25519 or, for model.sig, P-256.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="With --key: require this name of the signed package or of the model it was made from.",
)
@click.option("--files-only", is_flag=True, help="Check only files and signature; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    package: Path,
    provider: Provider | None,
    allow_fallback: bool,
    threads: int | None,
    key: Path | None,
    name: str | None,
    files_only: bool,
    as_json: bool,
) -> None:
    """Check every file of PACKAGE, then replay its certificate on this device.

    Needs only onnxruntime, and not even that with --files-only. PACKAGE may be a bundle: all
    its files are checked, and the package in it is replayed. Exits with 1 if a file was altered
    or added, the signature is not that of --key, or a threshold is missed.
    """
    from llama_onnx.runtime.measure.jsontext import dumps
    from llama_onnx.runtime.measure.verify import verify, verify_files

    if files_only and (provider or threads is not None or allow_fallback):
        raise click.UsageError(
            "--files-only runs nothing: leave out --provider, --allow-fallback and --threads."
        )
    if name is not None and key is None:
        raise click.UsageError("--name is that of a signed package: pass --key too.")
    with progress_line() as progress:
        if files_only:
            report = verify_files(package, key=key, name=name, progress=progress)
        else:
            report = verify(
                package,
                provider,
                key=key,
                name=name,
                threads=threads,
                allow_fallback=allow_fallback,
                progress=progress,
            )
    click.echo(dumps(report.to_json())) if as_json else _print(report)
    ctx.exit(0 if report.passed else 1)


def _print(report: VerifyReport) -> None:
    from rich.text import Text

    from llama_onnx.runtime.commands.tables import make_console

    console = make_console()
    for line in _head(report):
        console.print(line, soft_wrap=True)
    if report.situations:
        console.print(_situations(report))
    for line in _details(report):
        console.print(line, soft_wrap=True)
    problems = _problems(report)
    if problems:
        failed = Text.assemble(("failed", "bold red"), f": {'; '.join(problems)}.")
        console.print(failed, soft_wrap=True)
    else:
        computes = (
            ", and the package computes the certified results on this machine"
            if report.placement
            else ""
        )
        passed = Text.assemble(("passed", "bold green"), f": all files are intact{computes}.")
        console.print(passed, soft_wrap=True)


def _head(report: VerifyReport) -> Iterator[str]:
    seconds = report.seconds
    activations = f", {report.activations} activations" if report.activations else ""
    yield (
        f"package    {report.package} ({report.precision}{activations}), "
        f"{report.integrity.files} files hashed in {seconds['hashing']:.1f} s"
    )
    if signed := _signed(report.signature):
        yield f"signature  {signed}"
    if report.integrity.tolerated:
        yield f"beside     {', '.join(report.integrity.tolerated)}: not part of the package"
    yield f"versions   {', '.join(f'{name} {value}' for name, value in report.versions.items())}"
    if report.placement:
        from llama_onnx.runtime.placement.shares import percent

        for share in report.placement["providers"]:
            fraction = share["fraction"]
            yield (
                f"ran on     {share['provider']}: {percent(fraction['nodes'])} of the nodes, "
                f"{percent(fraction['weight_bytes'])} of the weights, "
                f"{percent(fraction['macs_per_token'])} of the work; opened in "
                f"{seconds['opening']:.1f} s, meanwhile, and replayed in {seconds['replay']:.1f} s"
            )
    if report.reduced:
        yield (
            "sampled    batches, and two conversations at once, of 16 tokens each: less than of a "
            "smaller package"
        )
    if report.fallback:
        yield f"fallback   {report.fallback}"


def _signed(signature: Signature) -> str | None:
    if signature.checked:
        unchecked = "".join(f"; {name} needs its own key" for name in signature.others)
        signed = f"{signature.file} was made with the key, for {signature.model}{unchecked}"
        return None if signature.problem else signed
    if signature.there:
        files = " and ".join((signature.file, *signature.others))
        verb = "are" if signature.others else "is"
        return f"{files} {verb} not checked: pass --key PUBLIC.pem to check it"
    return None


def _situations(report: VerifyReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Compared with PyTorch, using the package's weights",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("situation", no_wrap=True)
    for name in ("max abs", "rel L2", "mean KL", "KL bound", "top-1", "top-5"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in report.situations:
        row = entry.shipped
        table.add_row(
            entry.meaning,
            f"{row.max_abs:.1e}",
            f"{row.relative_l2:.1e}",
            f"{row.mean_kl:.1e}",
            f"{row.mean_kl_bound:.1e}",
            f"{row.same_top1:.1%}",
            f"{row.top5_overlap:.1%}",
        )
    return table


def _details(report: VerifyReport) -> Iterator[str]:
    from llama_onnx.runtime.measure.metrics import NEAR_TIE

    for entry in report.situations:
        if entry.situation == "decode" and entry.total:
            yield (
                f"original   mean KL {entry.total.mean_kl:.2g} from the original weights, same "
                f"likeliest token at {entry.total.same_top1:.1%} of {entry.total.positions} "
                "positions"
            )
    if report.fidelity:
        yield f"fidelity   {_claim(report)}"
    if report.full is not None and report.kl_difference is not None:
        yield (
            f"full rows  {report.full.positions} positions with all logits: relative L2 "
            f"{report.full.relative_l2:.1e}, mean KL {report.full.mean_kl:.1e}, "
            f"{report.kl_difference:.1e} above the value from the likeliest tokens only"
        )
    if report.divergences:
        same = sum(d is None for d in report.divergences)
        yield f"greedy     {same} of {len(report.divergences)} continuations match the certificate"
    for index, found in enumerate(report.divergences):
        if found is not None:
            tie = ", a near-tie" if abs(found.margin) <= NEAR_TIE else ""
            yield (
                f"  prompt {index + 1}: token {found.step + 1} is {found.chosen}, not "
                f"{found.expected}, which is {found.margin:.2g} logits ahead{tie}"
            )


def _claim(report: VerifyReport) -> str:
    signed = "the signer claims" if report.signature.checked else "the certificate claims"
    found = report.fidelity
    assert found is not None
    beyond = "" if found.passed else f"; beyond the limits of {found.recipe}"
    return f"{signed}, not measured here: {found.grade}: {found.shipped}{beyond}"


def _problems(report: VerifyReport) -> list[str]:
    where: dict[str, list[str]] = {}
    for entry in report.checks:
        if not entry.passed:
            row = entry.threshold
            name = f"{row.measure} {row.metric} above {row.limit:g}"
            where.setdefault(name, []).append(f"{entry.situation} {entry.value:.2g}".strip())
    missed = [f"{name} ({', '.join(values)})" for name, values in where.items()]
    problem = report.signature.problem
    return [*([problem] if problem else []), *_broken(report.integrity), *missed]


def _broken(integrity: Integrity) -> Iterator[str]:
    if integrity.altered:
        yield f"{', '.join(integrity.altered)} changed since the package was made"
    if integrity.unknown:
        shown = printable_line(", ".join(integrity.unknown[:_SHOWN]))
        more = len(integrity.unknown) - _SHOWN
        yield (
            f"{shown}{f' and {more} more' if more > 0 else ''}: not listed, so no hash covers it: "
            "remove it"
        )
    if integrity.stale:
        yield f"the certificate was made for a different {', '.join(integrity.stale)}"
    if integrity.tokens is False:
        yield "tokenizer.json produces tokens that differ from the certificate's"
