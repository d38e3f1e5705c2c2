"""`llama-onnx tune`: find out what suits a package on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.options import package_argument
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage

if TYPE_CHECKING:
    from llama_onnx.runtime.tuning.contest import Verdict
    from llama_onnx.runtime.tuning.prompt_trial import PromptTrial
    from llama_onnx.runtime.tuning.tune import Report


@click.command("tune")
@package_argument
@click.option(
    "--rounds", type=click.IntRange(2, 100), default=5, show_default=True, help="Rounds of trials."
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--packed/--no-packed",
    default=True,
    help="Try weights packed on disk, which take two to three times the package's size there.  "
    "[default: packed]",
)
@click.option(
    "--int8-prompts",
    is_flag=True,
    help="Also try a second graph that reads prompts in int8: two to three times as fast on a Xeon "
    "with AMX. It takes a byte more for each weight, in memory and on disk, and does not compute "
    "the same, bit for bit; it must keep the limits of the package's certificate.",
)
@click.option("--forget", is_flag=True, help="Remove the settings kept for PACKAGE.")
@click.option("--json", "as_json", is_flag=True, help="Print all that was tried as JSON.")
def command(
    package: Path,
    rounds: int,
    prompt_tokens: int,
    new_tokens: int,
    packed: bool,
    int8_prompts: bool,
    forget: bool,
    as_json: bool,
) -> None:
    """Find the fastest settings for PACKAGE on this machine, and keep them for later runs.

    Tries numbers of threads, spinning, memory, parts of a prompt, attention without tiles, drafts
    and packed weights on the CPU, each in turn with the defaults. Keeps only what gains more than
    the noise and computes the same, bit for bit; attention and --int8-prompts must keep the limits
    of the package's certificate instead. It is kept in the user's cache folder; the package stays
    as it is. generate, chat, serve, batch and bench then use it and say so;
    LLAMA_ONNX_TUNED=0 turns it off, and --threads overrides its number of threads.
    """
    from llama_onnx.runtime.llama.text_files import read_settings
    from llama_onnx.runtime.measure.jsontext import dumps
    from llama_onnx.runtime.tuning import tuned
    from llama_onnx.runtime.tuning.tune import tune
    from llama_onnx.targets.registry import get_target

    opened = ModelPackage.open(package)
    if forget:
        there = tuned.forget(opened)
        say("Forgotten." if there else "Nothing was kept for this package.")
        return
    if get_target(opened.target).session.provider.name != "cpu":
        raise UsageError(
            f"{package} is for {opened.target}: only what the CPU runs is tuned; export it for cpu."
        )
    had_prompts = tuned.reads_prompts_apart(opened)
    settings = read_settings(opened.path)
    with progress_line() as progress:
        report = tune(
            opened,
            int(settings["context_length"]),
            heads=_heads(settings),
            rounds=rounds,
            packed=packed,
            int8_prompts=int8_prompts,
            progress=progress,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
    if as_json:
        click.echo(dumps(report.to_json()))
    else:
        _print(report)
        if had_prompts and not int8_prompts:
            say("Prompts are no longer read in int8: pass --int8-prompts to keep that too.")


def _heads(settings: Mapping[str, Any]) -> int | None:
    decoder = settings.get("decoder")
    heads = decoder.get("num_attention_heads") if isinstance(decoder, dict) else None
    return heads if isinstance(heads, int) and heads > 0 else None


def _print(report: Report) -> None:
    from rich import box
    from rich.table import Column, Table

    from llama_onnx.runtime.commands.tables import make_console

    machine, work = report.machine, report.workload
    say(f"{machine.processor} · {machine.allowed:g} processors · onnxruntime {machine.onnxruntime}")
    table = Table(
        Column(no_wrap=True),
        Column("speed", justify="right"),
        Column("kept", overflow="fold"),
        title=f"{report.rounds} rounds, prompt {work.prompt_tokens}, answer {work.new_tokens} "
        f"tokens; {_noise(report)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    prompts = () if report.prompts is None else report.prompts.verdicts
    for verdict in (*report.verdicts, report.confirmed, *prompts):
        if verdict is not None:
            table.add_row(*_row(verdict))
    make_console().print(table)
    if report.prompts is not None:
        say(_prompts(report.prompts))
    for what, reason in report.not_tried.items():
        say(f"Not tried: {what}: {reason}.")
    say(_result(report))


def _row(verdict: Verdict) -> tuple[str, str, str]:
    kept = f"{'yes' if verdict.kept else 'no'}: {verdict.reason}"
    # Of those the prompt alone is timed, of the others prompt and answer.
    only = " (prompt only)" if verdict.candidate.gauge == "prompts" else ""
    return f"{verdict.candidate.name}{only}", f"{1 + verdict.gain:.2f}", kept


def _prompts(trial: PromptTrial) -> str:
    """Return what prompts in int8 cost, or why they are not tried."""
    if trial.problem is not None:
        return f"Not kept: prompts in int8: {trial.problem}."
    apart = f" ({', '.join(trial.apart)} stays in the package's bits)" if trial.apart else ""
    kl = ""
    usual = None if trial.usual is None else trial.usual.figures
    int8 = None if trial.int8 is None else trial.int8.figures
    if usual is not None and int8 is not None:
        kl = (
            f"; mean KL from the original weights {int8.mean_kl:.4f} instead of "
            f"{usual.mean_kl:.4f} nats on the certificate's passages, within their limits"
        )
    return (
        f"Prompts in int8: {trial.matrices} matrices{apart}, {trial.nbytes / 1e9:.2f} GB on disk "
        f"and about as much in memory{kl}."
    )


def _noise(report: Report) -> str:
    return f"noise {max(verdict.noise for verdict in report.verdicts):.0%}"


def _result(report: Report) -> str:
    settings, gain = report.tuned.settings, report.tuned.gain
    best = None if report.prompts is None else report.prompts.best
    found = replace(settings, prompts=None).differences()
    faster = f", {gain:.0%} faster" if gain > 0 else ""
    kept = [f"Kept{faster}: {', '.join(found)}."] if found else []
    if best is not None:
        kept.append(f"Kept: prompts read in int8, {1 + best.gain:.2f} times as fast.")
    return " ".join(kept) or "Kept: the defaults. Nothing else gains more than the noise here."
