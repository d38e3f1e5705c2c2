"""What a conversation consists of, saved to a file and read back.

A session belongs to the package that it was saved with, whose manifest lists every file by hash:
the keys and values in it mean nothing to another one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.prefixes import SHORTEST, Entry
from llama_onnx.runtime.engine.sampling.parameters import Sampling, check_sampling, read_value
from llama_onnx.runtime.llama.asking import TurnOptions
from llama_onnx.runtime.llama.conversation import (
    Message,
    Overflow,
    check_messages,
    check_overflow,
)
from llama_onnx.runtime.llama.session_file import SessionFile, open_session, write_session
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.runtime.llama.template import check_variables
from llama_onnx.runtime.llama.tools import check_tools
from llama_onnx.targets.errors import (
    PackageError,
    SessionError,
    UsageError,
    describe_damage,
    describe_reason,
)
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.engine import Engine

log = logging.getLogger("llama_onnx.session")

_INT8_PROMPTS = "int8_prompts"
"""Key of a saved session whose keys and values are not quite those of the package's own graph."""

_NUMBERS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def _no_tokens() -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Setup:
    """What all answers of a conversation have in common; `options` are keyword arguments."""

    tools: tuple[Mapping[str, Any], ...] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    overflow: Overflow = "error"
    adapter: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(cls, package: ModelPackage, values: Mapping[str, Any]) -> Setup:
        """Return the setup of a conversation with `package`; raise `UsageError` for wrong values,
        and `TypeError` for names that are not options."""
        adapter = values.get("adapter")
        if adapter is not None:
            package.adapter_path(adapter)
        variables = values.get("template_variables") or {}
        check_variables(variables)
        return cls(
            tuple(check_tools(values.get("tools", ()))),
            dict(variables),
            check_overflow(values.get("overflow", "error")),
            adapter,
            check_options(values.get("options", {})),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `checked` and `_options` read."""
        options = dict(self.options)
        if "sampling" in options:
            options["sampling"] = options["sampling"].to_json()
        if options.get("guide") is not None:
            options["guide"] = {"kind": options["guide"].kind, "text": options["guide"].text}
        return {
            "tools": list(self.tools),
            "template_variables": self.template_variables,
            "overflow": self.overflow,
            "adapter": self.adapter,
            "options": options,
        }


@dataclass(frozen=True)
class State:
    """What has been said: `messages`, those that were left out before them, and `tokens`, which the
    last answer was computed with, its own included."""

    messages: tuple[Message, ...] = ()
    dropped: tuple[Message, ...] = ()
    tokens: npt.NDArray[np.int64] = field(default_factory=_no_tokens)


@dataclass(frozen=True)
class SessionReport:
    """What was saved or restored: so many messages, and the cache of so many tokens.

    `left_out` says why there is no cache, or one of fewer tokens than the text has; None if all
    that a next turn needs is there.
    """

    path: Path
    messages: int
    positions: int
    left_out: str | None


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of an answer, checked as far as that is possible without a model."""
    for name in options:
        if name not in TurnOptions.__annotations__:
            raise TypeError(f"a conversation's answers have no option {name!r}.")
    checked = {name: value for name, value in options.items() if value is not None}
    for name in _NUMBERS:
        if name in checked:
            checked[name] = read_value(name, checked[name])
    if "sampling" in checked:
        check_sampling(checked["sampling"])
    if "stop" in checked:
        checked["stop"] = tuple(check_stops(checked["stop"]))
    return checked


def package_hash(package: ModelPackage) -> str:
    """Return the sha256 of the manifest; raise `PackageError` if it changed since it was opened."""
    try:
        content = package.index.read_bytes()
        changed = parse_json(content) != package.manifest
    except OSError as error:
        raise PackageError(f"{package.index} cannot be read: {describe_reason(error)}.") from None
    except JSONError:
        changed = True
    if changed:
        raise PackageError(f"{package.path} has changed since it was opened: open it again.")
    return hashlib.sha256(content).hexdigest()


def save(
    path: Path, package: ModelPackage, setup: Setup, state: State, engine: Engine | None
) -> SessionReport:
    """Save a conversation, with what `engine` has of it; None: the messages alone.

    Raises `SessionError` or `ResourceError` if the file cannot be written, `PackageError` if the
    package has changed, and `LlamaOnnxError` if the engine is closed.
    """
    name = os.fsencode(package.path.resolve().name).decode("utf-8", "replace")
    content = {
        "package": {"name": name, "manifest_sha256": package_hash(package)},
        "messages": list(state.messages),
        **setup.to_json(),
    }
    if engine is not None and engine.int8_prompts:
        content[_INT8_PROMPTS] = True
    entry, why = None, _cannot(engine)
    if why is None and engine is not None and state.tokens.size:
        entry = engine.export_prefix(state.tokens, setup.adapter)
    positions = 0 if entry is None else len(entry.tokens)
    # The last token was never read, and texts shorter than `SHORTEST` are not kept.
    if why is None and positions < state.tokens.size - 1 >= SHORTEST:
        why = f"the engine has {positions:,} of {state.tokens.size:,} tokens left"
    write_session(path, content, state.tokens, {} if entry is None else entry.block)
    return _report(path, len(state.messages), positions, why)


def restore(
    path: Path,
    package: ModelPackage,
    engine: Engine | None,
    asked: Setup,
    *,
    messages_only: bool = False,
) -> tuple[Setup, State, SessionReport]:
    """Read a conversation back, and give `engine` what it had of it.

    With `messages_only`, only the messages are read, whatever package they were saved with, and the
    setup is the one `asked` for. Raises `SessionError` for a file that is damaged or of another
    package, or another adapter than `asked` for.
    """
    with open_session(path) as session:
        try:
            messages = session.content["messages"]
            state = State(tuple(check_messages(messages)) if messages else ())
            if messages_only:
                report = SessionReport(path, len(messages), 0, "only messages were asked for")
                return asked, state, report
            _check_package(session, package)
            setup = Setup.checked(package, {**session.content, "options": _options(session)})
        except UsageError as error:
            raise session.damaged(str(error).rstrip(".")) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise session.damaged(describe_damage(error)) from None
        if asked.adapter not in (None, setup.adapter):
            saved = f"the adapter {setup.adapter}" if setup.adapter else "no adapter"
            raise SessionError(
                f"{path} was saved with {saved}, not with {asked.adapter}: ask for that one, or "
                "take the messages alone (messages_only=True, --messages-only)."
            )
        why = _cannot(engine)
        if engine is None or why is not None:
            return setup, state, _report(path, len(messages), 0, why)
        return _with_cache(session, setup, state, engine)


def _with_cache(
    session: SessionFile, setup: Setup, state: State, engine: Engine
) -> tuple[Setup, State, SessionReport]:
    session.check(engine.layout)
    tokens, positions = session.lengths()
    why = None if positions or not tokens else "it was saved without one"
    if tokens > engine.context_length:
        why = f"it has {tokens:,} tokens, more than the context of {engine.context_length:,}"
    elif session.content.get(_INT8_PROMPTS) and not engine.int8_prompts:
        why = "its prompts were read in int8, and are not here"
    elif positions and not engine.make_room(positions):
        why = f"there is no room for {positions:,} tokens in the engine's memory"
    if why is not None:
        return setup, state, _report(session.path, len(state.messages), 0, why)
    ids, block = session.read(engine.layout)
    if positions and not engine.import_prefix(Entry(setup.adapter, ids[:positions], block)):
        positions, why = 0, "others took the room in the engine's memory"
    state = State(state.messages, (), ids)
    return setup, state, _report(session.path, len(state.messages), positions, why)


def _cannot(engine: Engine | None) -> str | None:
    """Return why an engine has no cache to save or restore; None if it can."""
    if engine is None:
        return "onnxruntime-genai keeps none: choose the engine onnxruntime"
    return None if engine.copies else "it is on a device, from which it is not copied"


def _report(path: Path, messages: int, positions: int, why: str | None) -> SessionReport:
    if why is not None:
        log.warning("%s: the cache is missing or incomplete: %s", path, why)
    return SessionReport(path, messages, positions, why)


def _check_package(session: SessionFile, package: ModelPackage) -> None:
    saved = session.content["package"]
    if saved["manifest_sha256"] != package_hash(package):
        raise SessionError(
            f"{session.path} was saved with another package or another version of it, "
            f"{shown(saved['name'])}, not with {package.path}: open that one, or take the messages "
            "alone (messages_only=True, --messages-only)."
        )


def _options(session: SessionFile) -> dict[str, Any]:
    options = dict(session.content["options"])
    if "sampling" in options:
        options["sampling"] = Sampling(**options["sampling"])
    if options.get("guide") is not None:
        from llama_onnx.runtime.engine.sampling.guidance import Guide

        options["guide"] = Guide(**options["guide"])
    return options
