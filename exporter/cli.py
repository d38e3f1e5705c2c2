"""The command line's root. Commands load when they are called: `chat` must not import torch."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from llama_onnx.targets.errors import LlamaOnnxError, MissingDependencyError

_COMMANDS = {
    "export": "llama_onnx.exporter.commands.export",
    "plan": "llama_onnx.exporter.commands.plan",
    "adapter": "llama_onnx.exporter.commands.adapter",
    "inspect": "llama_onnx.exporter.commands.inspect",
    "validate": "llama_onnx.exporter.commands.validate",
    "verify": "llama_onnx.runtime.commands.verify",
    "generate": "llama_onnx.runtime.commands.generate",
    "chat": "llama_onnx.runtime.commands.chat",
    "bench": "llama_onnx.runtime.commands.bench",
    "sign": "llama_onnx.runtime.commands.sign",
    "bundle": "llama_onnx.runtime.commands.bundle",
    "targets": "llama_onnx.runtime.commands.targets",
    "doctor": "llama_onnx.runtime.commands.doctor",
}
"""Verb -> the module whose `command` it is, in the order `--help` shows them."""

_EXTRAS = {"exporter": "export,cpu", "runtime": "cpu", "targets": "cpu"}


class _Root(click.Group):
    """Loads a command's module when it is called; turns our errors into click's, at this edge."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command

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
            if error.errno == errno.EPIPE:  # whoever read our output has gone: click's own business
                raise
            raise click.ClickException(_system_error(error)) from error


def _system_error(error: OSError) -> str:
    """What the system refused, where no command has a better word for it."""
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror or error}{'; free some space' if full else ''}."


def _missing(verb: str, error: ModuleNotFoundError) -> MissingDependencyError:
    extra = _EXTRAS[_COMMANDS[verb].split(".")[1]]
    return MissingDependencyError(
        f"`llama-onnx {verb}` needs the package {error.name}, which is not "
        f'installed: run `pip install "llama-onnx[{extra}]"`.'
    )


class _Misuse(click.ClickException):
    """A call that cannot be carried out; click's own UsageError would print the usage as well."""

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
    # genai and ORT report usage by default; an embedded runtime must not unless its user wants it.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


if __name__ == "__main__":
    main()
