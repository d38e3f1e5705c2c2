"""Options that `generate` and `chat` share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from llama_onnx.runtime.llama.sampling import PARAMETERS, Sampling
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import PROVIDERS, get_provider

_Command = TypeVar("_Command", bound=Callable[..., Any])

package_argument = click.argument("package", type=click.Path(path_type=Path))

threads_option = click.option(
    "--threads", type=int, help="Threads to compute with.  [default: the physical cores]"
)

adapter_option = click.option(
    "--adapter", metavar="NAME", help="Answer with this adapter of the package, not the bare base."
)


def provider_options(command: _Command) -> _Command:
    """Add `--provider` and `--allow-fallback`."""
    for option in (
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Run on the CPU what the provider does not run, instead of refusing.",
        ),
        click.option(
            "--provider",
            callback=_provider,
            metavar="NAME",
            help=f"What computes: {', '.join(PROVIDERS)}.  [default: the package's target]",
        ),
    ):
        command = option(command)
    return command


def _provider(_: click.Context, __: click.Parameter, name: str | None) -> Provider | None:
    return None if name is None else get_provider(name)


def sampling_options(*, max_new_tokens: int) -> Callable[[_Command], _Command]:
    """Add what `Llama.generate` and `Llama.chat` accept, by the same names.

    The fields of `Sampling` reach the command as one argument, `sampling`.
    """
    options = (
        click.option(
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            show_default=True,
            help="End an answer after this many tokens.",
        ),
        *(
            click.option(f"--{name.replace('_', '-')}", type=known["type"], help=known["help"])
            for name, known in PARAMETERS.items()
        ),
        click.option("--stop", multiple=True, help="End before this text. May be repeated."),
    )

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def checked(**values: Any) -> Any:
            sampling = Sampling(**{name: values.pop(name) for name in PARAMETERS})
            return command(sampling=sampling, **values)

        decorated: Any = checked
        for option in reversed(options):
            decorated = option(decorated)
        result: _Command = decorated
        return result

    return decorate
