"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from llama_onnx.runtime.engine.sampling.choice import read_search
from llama_onnx.runtime.engine.sampling.parameters import (
    PARAMETERS,
    Sampling,
    read_value,
    refuse_what_genai_cannot,
)
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.targets.engines import ENGINES, SPECULATIONS
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, PROVIDERS, get_provider

_Command = TypeVar("_Command", bound=Callable[..., Any])

package_argument = click.argument("package", type=click.Path(path_type=Path))


def _threads(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    from llama_onnx.runtime.ort import check_threads

    return None if value is None else check_threads(value)


threads_option = click.option(
    "--threads",
    type=int,
    callback=_threads,
    help="Number of threads.  [default: one per physical core]",
)

ray_option = click.option(
    "--ray", metavar="ADDRESS", help="Use the Ray cluster at this address, or auto."
)

engine_option = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="onnxruntime: our own engine; its chat reads each message once. genai: onnxruntime-genai. "
    " [default: onnxruntime on the CPU, genai elsewhere]",
)


def speculation_options(command: _Command) -> _Command:
    """Add `--speculate` and `--draft`, which reach the command as one argument, `drafting`."""

    @wraps(command)
    def gathered(*args: Any, speculate: str, draft: Path | None, **rest: Any) -> Any:
        return command(*args, drafting={"speculate": speculate, "draft": draft}, **rest)

    decorated: Any = gathered
    for option in (
        click.option(
            "--draft",
            type=click.Path(path_type=Path),
            metavar="PACKAGE",
            help="A smaller package with the same tokens, which drafts tokens as well.",
        ),
        click.option(
            "--speculate",
            type=click.Choice(SPECULATIONS),
            default=SPECULATIONS[0],
            show_default=True,
            help="Draft tokens from what the text repeats, and verify several in one step, while "
            "that is faster (engine onnxruntime): auto: where the graph can; ngram: or an error.",
        ),
    ):
        decorated = option(decorated)
    result: _Command = decorated
    return result


adapter_option = click.option(
    "--adapter", metavar="NAME", help="Use this LoRA adapter of the package."
)


def provider_options(command: _Command) -> _Command:
    """Add `--provider` and `--allow-fallback`; refuse the second with `--provider cpu`, where it
    has no effect."""
    return _add_provider_options(command, "the target's")


def optional_provider_options(command: _Command) -> _Command:
    """Add the same options to a command that opens the graph only with `--provider`."""
    return _add_provider_options(command, "do not open the graph")


def _add_provider_options(command: _Command, default: str) -> _Command:
    @wraps(command)
    def checked(*args: Any, provider: Provider | None, allow_fallback: bool, **rest: Any) -> Any:
        if allow_fallback and provider == CPU:
            raise UsageError("--allow-fallback has no effect with --provider cpu: leave it out.")
        return command(*args, provider=provider, allow_fallback=allow_fallback, **rest)

    decorated: Any = checked
    for option in (
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Let the CPU run what the provider cannot, instead of failing.",
        ),
        click.option(
            "--provider",
            callback=_provider,
            metavar="NAME",
            help=f"Execution provider: {', '.join(PROVIDERS)}.  [default: {default}]",
        ),
    ):
        decorated = option(decorated)
    result: _Command = decorated
    return result


def _provider(_: click.Context, __: click.Parameter, name: str | None) -> Provider | None:
    return None if name is None else get_provider(name)


_OFFERED = tuple(name for name in PARAMETERS if name != "logprobs")
"""Fields of `Sampling` that are options: log probabilities have no place in an answer's text."""


def sampling_options(*, max_new_tokens: int) -> Callable[[_Command], _Command]:
    """Add options for the arguments of `Llama.generate` and `Llama.chat`, with the same names.

    The fields of `Sampling` reach the command as one argument, `sampling`.
    """
    options = (
        click.option(
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            show_default=True,
            help="Largest number of tokens in the answer.",
        ),
        *(_sampling_option(name) for name in _OFFERED),
        click.option(
            "--stop", multiple=True, help="End the answer before this text; may be repeated."
        ),
    )

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def checked(**values: Any) -> Any:
            read = {name: _read(name, values.pop(name)) for name in _OFFERED}
            values["max_new_tokens"] = _read("max_new_tokens", values["max_new_tokens"])
            values["stop"] = check_stops(values["stop"], "--stop")
            sampling = Sampling(**read)
            if values["engine"] == "genai":
                refuse_what_genai_cannot(sampling, _flag)
            _refuse_greedy_sampling(values["package"], sampling)
            return command(sampling=sampling, **values)

        decorated: Any = checked
        for option in reversed(options):
            decorated = option(decorated)
        result: _Command = decorated
        return result

    return decorate


def _sampling_option(name: str) -> Callable[[_Command], _Command]:
    known = PARAMETERS[name]
    if known["type"] is dict:
        return click.option(
            _flag(name), multiple=True, metavar="TOKEN=NUMBER", help=known["help"], callback=_pairs
        )
    return click.option(_flag(name), type=known["type"], help=known["help"])


def _pairs(
    _: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> list[tuple[str, float]] | None:
    """Read `15=-100` and the like; None without any."""
    pairs = []
    for text in texts:
        token, _equals, number = text.partition("=")
        try:
            pairs.append((token, float(number)))
        except ValueError:
            raise UsageError(
                f"{parameter.opts[0]} must be a token id, = and a number, such as 15=-100, not "
                f"{shown(text)}."
            ) from None
    return pairs or None


def _read(name: str, value: Any) -> Any:
    return None if value is None else read_value(name, value, _flag(name))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_greedy_sampling(package: Path, sampling: Sampling) -> None:
    """Raise `UsageError` for a sampling option that a greedy answer does not use."""
    given = [
        name for name in sampling.to_json() if PARAMETERS[name]["samples"] and name != "temperature"
    ]
    flags = ", ".join(map(_flag, given))
    if given and sampling.temperature == 0:
        raise UsageError(
            f"--temperature 0 is greedy: leave out {flags}, which would have no effect."
        )
    if given == ["seed"] and sampling.temperature is None and not _samples(package):
        raise UsageError(
            "--seed has no effect on a greedy answer: add --temperature, --top-k or --top-p."
        )


def _samples(package: Path) -> bool:
    """Whether the package samples by default; True if it is damaged, which `Llama.load` reports."""
    try:
        return bool(read_search(package).get("do_sample", True))
    except PackageError:
        return True
