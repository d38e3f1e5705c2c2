"""The root of the command line. A command's module is imported only when the command is called, so
that `chat` does not import torch."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from llama_onnx.runtime.commands.streams import (
    INTERRUPTED,
    finish_streams,
    interrupts_end_imports,
    occupy_closed_files,
    prepare_streams,
    say,
)
from llama_onnx.targets.durable import is_full
from llama_onnx.targets.errors import LlamaOnnxError, MissingDependencyError
from llama_onnx.targets.extras import missing_extra


@dataclass(frozen=True)
class _Command:
    """The module that defines `command`, and the summary that `--help` shows."""

    module: str
    summary: str


_SECTIONS = {
    "Make a package": {
        "inspect": _Command(
            "llama_onnx.exporter.commands.inspect", "Describe a checkpoint or a package."
        ),
        "plan": _Command(
            "llama_onnx.exporter.commands.plan", "Show what an export would write and need."
        ),
        "export": _Command(
            "llama_onnx.exporter.commands.export", "Write a checkpoint as a package."
        ),
        "fleet": _Command(
            "llama_onnx.exporter.commands.fleet", "Make many packages from one list."
        ),
        "adapter": _Command(
            "llama_onnx.exporter.commands.adapter", "Add LoRA adapters to a finished package."
        ),
    },
    "Prove a package": {
        "validate": _Command(
            "llama_onnx.exporter.commands.validate",
            "Compare a package with its original checkpoint.",
        ),
        "evaluate": _Command(
            "llama_onnx.exporter.commands.evaluate",
            "Compare a package with its checkpoint over a corpus of any size.",
        ),
        "verify": _Command(
            "llama_onnx.runtime.commands.verify",
            "Check a package's files and replay its certificate.",
        ),
        "sign": _Command("llama_onnx.runtime.commands.sign", "Sign a package or a bundle."),
    },
    "Run a package": {
        "generate": _Command("llama_onnx.runtime.commands.generate", "Answer one prompt."),
        "chat": _Command(
            "llama_onnx.runtime.commands.chat", "Hold a conversation in the terminal."
        ),
        "serve": _Command(
            "llama_onnx.runtime.commands.serve", "Serve OpenAI's API and a chat page."
        ),
        "batch": _Command(
            "llama_onnx.runtime.commands.batch",
            "Answer a file of requests, on one machine or many.",
        ),
        "bench": _Command("llama_onnx.runtime.commands.bench", "Measure speed and memory."),
        "tune": _Command(
            "llama_onnx.runtime.commands.tune", "Find the fastest settings on this machine."
        ),
        "capacity": _Command(
            "llama_onnx.runtime.commands.capacity", "Compute what serving a load takes."
        ),
        "bundle": _Command(
            "llama_onnx.runtime.commands.bundle",
            "Prepare a package for Windows, a cloud or the hub.",
        ),
        "model-package": _Command(
            "llama_onnx.runtime.commands.model_package",
            "Combine packages for several targets in one, and take them out.",
        ),
    },
    "Look around": {
        "doctor": _Command(
            "llama_onnx.runtime.commands.doctor",
            "Report what this machine can run and how to fix problems.",
        ),
        "targets": _Command(
            "llama_onnx.runtime.commands.targets", "List the targets a package can be made for."
        ),
    },
}
"""The commands as `--help` groups them. A new command needs a new file and one entry here."""

_COMMANDS = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}

_EXTRAS = {"exporter": "export,cpu", "runtime": "cpu", "targets": "cpu"}


class _Root(click.Group):
    """Imports a command's module when the command is called, and turns our errors into click's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = importlib.import_module(entry.module).command
        command.short_help = entry.summary
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Use the table only: printing a summary must not import the command's module.
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in section.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit; errors are printed here, and nowhere else."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        occupy_closed_files()
        prepare_streams()
        with interrupts_end_imports():
            status = self._run(args, prog_name, complete_var, **extra)
        sys.exit(finish_streams(status))

    def _run(
        self,
        args: Sequence[str] | None,
        prog_name: str | None,
        complete_var: str | None,
        **extra: Any,
    ) -> int:
        """Run the command, print its error if there is one, and return the exit status."""
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except click.ClickException as error:
            _print_error(error)
            return error.exit_code
        except (click.Abort, KeyboardInterrupt) as error:
            say("Aborted!", err=True)
            pressed = (error, error.__cause__)
            return INTERRUPTED if any(isinstance(e, KeyboardInterrupt) for e in pressed) else 1
        except OSError as error:  # outside a command: `llama-onnx --help > /dev/full`
            _print_error(click.ClickException(_system_error(error)))
            return 1
        return status if isinstance(status, int) else 0

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.invoked_subcommand is None or str(error.name).startswith("llama_onnx"):
                raise
            raise _exception(_missing(ctx.invoked_subcommand, error)) from None
        except LlamaOnnxError as error:
            raise _exception(error) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # our output's reader is gone: click handles it
                raise
            raise click.ClickException(_system_error(error)) from error


def _print_error(error: click.ClickException) -> None:
    """Print an error with everything that it quotes made safe to show."""
    text = io.StringIO()
    error.show(file=text)
    say(text.getvalue().rstrip("\n"), err=True)


def _system_error(error: OSError) -> str:
    """Return an error text for a system error that no command handles itself."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{'; free some space' if is_full(error) else ''}."


def _missing(name: str, error: ModuleNotFoundError) -> MissingDependencyError:
    extra = _EXTRAS[_COMMANDS[name].module.split(".")[1]]
    return missing_extra(f"`llama-onnx {name}`", error.name, extra)


class _Misuse(click.ClickException):
    """An invalid call. Unlike click's UsageError it does not print the usage."""

    exit_code = 2


def _exception(error: LlamaOnnxError) -> click.ClickException:
    return _Misuse(str(error)) if error.exit_code == 2 else click.ClickException(str(error))


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llama-onnx")
def main() -> None:
    """Turn a Llama checkpoint into an ONNX package, prove it and run it."""
    # genai and ONNX Runtime report usage by default; here telemetry is off unless the user sets it.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
