"""The root of the command line. A command's module loads when it is called, so that `chat` does not
import torch."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import click

from llama_onnx.targets.errors import LlamaOnnxError, MissingDependencyError
from llama_onnx.targets.extras import missing_extra


@dataclass(frozen=True)
class _Verb:
    """The module whose `command` it is, and the sentence that `--help` shows."""

    module: str
    summary: str


_SECTIONS = {
    "Make a package": {
        "inspect": _Verb(
            "llama_onnx.exporter.commands.inspect", "Describe a checkpoint or a package."
        ),
        "plan": _Verb(
            "llama_onnx.exporter.commands.plan", "Show what an export would make and need."
        ),
        "export": _Verb("llama_onnx.exporter.commands.export", "Write a checkpoint as a package."),
        "adapter": _Verb(
            "llama_onnx.exporter.commands.adapter", "Add LoRA adapters to a finished package."
        ),
    },
    "Prove a package": {
        "validate": _Verb(
            "llama_onnx.exporter.commands.validate",
            "Compare a package with its original checkpoint.",
        ),
        "verify": _Verb(
            "llama_onnx.runtime.commands.verify", "Check a package's files, replay its certificate."
        ),
        "sign": _Verb("llama_onnx.runtime.commands.sign", "Sign a package or a bundle."),
    },
    "Run a package": {
        "generate": _Verb("llama_onnx.runtime.commands.generate", "Answer one prompt."),
        "chat": _Verb("llama_onnx.runtime.commands.chat", "Hold a conversation in the terminal."),
        "bench": _Verb("llama_onnx.runtime.commands.bench", "Measure speed and memory."),
        "bundle": _Verb(
            "llama_onnx.runtime.commands.bundle",
            "Prepare a package for Windows, a cloud or the hub.",
        ),
    },
    "Look around": {
        "doctor": _Verb(
            "llama_onnx.runtime.commands.doctor",
            "Say what this machine can run, and how to fix it.",
        ),
        "targets": _Verb("llama_onnx.runtime.commands.targets", "List what packages are made for."),
    },
}
"""The commands as `--help` groups them. A new command is a new file, and one more entry here."""

_VERBS = {name: verb for verbs in _SECTIONS.values() for name, verb in verbs.items()}

_EXTRAS = {"exporter": "export,cpu", "runtime": "cpu", "targets": "cpu"}


class _Root(click.Group):
    """Loads a command's module when it is called, and turns our errors into click's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = _VERBS.get(cmd_name)
        if verb is None:
            return None
        command: click.Command = importlib.import_module(verb.module).command
        command.short_help = verb.summary
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table alone: to print one line, no command's module has to load.
        for title, verbs in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, verb.summary) for name, verb in verbs.items()])

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
            if error.errno == errno.EPIPE:  # the reader of our output has gone: click handles that
                raise
            raise click.ClickException(_system_error(error)) from error


def _system_error(error: OSError) -> str:
    """Return a sentence for what the system refused, where no command has a better one."""
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror or error}{'; free some space' if full else ''}."


def _missing(verb: str, error: ModuleNotFoundError) -> MissingDependencyError:
    extra = _EXTRAS[_VERBS[verb].module.split(".")[1]]
    return missing_extra(f"`llama-onnx {verb}`", error.name, extra)


class _Misuse(click.ClickException):
    """A call that cannot be carried out. Unlike click's UsageError it does not print the usage."""

    exit_code = 2


def _exception(error: LlamaOnnxError) -> click.ClickException:
    return _Misuse(str(error)) if error.exit_code == 2 else click.ClickException(str(error))


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llama-onnx")
def main() -> None:
    """Turn a Llama checkpoint into an ONNX package, prove it, run it."""
    # Windows consoles that are not UTF-8 would end a stream of tokens with a UnicodeEncodeError.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # genai and ORT report usage by default; an embedded runtime must not, unless its user asks.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
