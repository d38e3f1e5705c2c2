"""The chat template of a package: which one it is, and the prompt it makes of a conversation.

onnxruntime-genai's own engine is not asked: it renders many templates otherwise than jinja2, which
the models were trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.chat_template.genai_bounds import exceeded_bound
from llama_onnx.runtime.llama.conversation import check_expressible
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.package_json import read_package_json
from llama_onnx.targets.printable import printable, shown

if TYPE_CHECKING:
    from llama_onnx.runtime.chat_template.render import ChatTemplate

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_MOST_TEMPLATE, _MOST_SETTINGS = 1 << 20, 16 << 20

_MARK = "\ue000continued here\ue001 "
"""Where an answer goes on: characters for private use, and a space that some templates trim."""

_OWN = ("messages", "tools", "add_generation_prompt")

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
"""What a token can be for, as transformers calls it."""

SPECIAL_TOKENS = tuple(f"{role}_token" for role in ROLES)
"""Variables that a template may use, and keys of tokenizer_config.json."""


def render_messages(
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    continue_last: bool = False,
) -> str:
    """Return the prompt for a conversation, up to the start of the answer, with the `tools` that
    `check_tools` returned and more `variables` of the template's own.

    `continue_last`: the last message is the start of the answer, and the prompt ends with it.

    Raises `UsageError` if the package in `folder` has no template, or it rejects the messages, and
    `PackageError` for a template that cannot be read, or that exceeds a bound.
    """
    check_variables(variables or {})
    template = read_template(folder)
    if template is None:
        raise UsageError(
            f"{folder} has no chat template, so it is not a chat model: "
            "give it a plain prompt to continue."
        )
    from llama_onnx.runtime.chat_template.render import RejectedError, TemplateError

    shown_messages = [*messages[:-1], _marked(messages[-1])] if continue_last else messages
    try:
        text = template.render(
            shown_messages,
            tools=tools or None,
            add_generation_prompt=not continue_last,
            variables=variables,
        )
        return _up_to_mark(text) if continue_last else text
    except RejectedError as error:
        raise UsageError(
            f"the model's chat template rejects the messages: {printable(str(error))}."
        ) from None
    except TemplateError as error:
        raise PackageError(
            f"the chat template of {folder} cannot be used: {printable(str(error))}."
        ) from None


def check_variables(variables: Any) -> None:
    """Raise `UsageError` unless `variables` are a mapping that JSON can express, by names that are
    not the template's own."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise UsageError(f"template variables must have names, not be {shown(variables)}.")
    if taken := [name for name in variables if name in _OWN]:
        raise UsageError(f"{taken[0]!r} is not a free variable of a template: leave it out.")
    check_expressible(variables, "the template variables")


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") != "assistant":
        raise UsageError("only an assistant's message can be continued: the last one is another's.")
    return {**message, "content": message["content"] + _MARK}


def _up_to_mark(text: str) -> str:
    """Return the prompt up to the mark, as transformers' `continue_final_message` does.

    A template that trims contents took the mark's space away, and keeps none before it either.
    """
    start = text.rfind(_MARK.strip())
    if start < 0:
        raise UsageError(
            "the model's chat template does not write the last message as it is: it cannot be "
            "continued."
        )
    return text[:start] if text[start:].startswith(_MARK) else text[:start].rstrip()


def check_template(folder: Path) -> None:
    """Raise `PackageError` if reading the chat template of the package in `folder` exceeds a bound.

    onnxruntime-genai reads the template when it opens a tokenizer, and has no bounds: it needs
    minutes for some thousand nested blocks.
    """
    try:
        template = read_template(folder)
    except MissingDependencyError:  # jinja2, which older installations do not have
        return
    if template is None:
        return
    from llama_onnx.runtime.chat_template.render import BoundError, TemplateError

    try:
        template.check()
    except BoundError as error:
        raise PackageError(
            f"the chat template of {folder} cannot be used: {printable(str(error))}."
        ) from None
    except TemplateError:  # only chat needs it
        return


def read_template(folder: Path) -> ChatTemplate | None:
    """Return the package's template, None if it has none."""
    try:
        from llama_onnx.runtime.chat_template.render import ChatTemplate
    except ModuleNotFoundError as error:
        raise missing_extra("a chat template", error.name, "cpu") from None

    text, settings = _read_text(folder)
    return ChatTemplate(text, special_texts(settings)) if text else None


def check_genai_reads(folder: Path) -> None:
    """Raise `PackageError` if onnxruntime-genai might not survive a template of the package in
    `folder`: it parses them when it opens the tokenizer."""
    check_template(folder)
    text, settings = _read_text(folder)
    for each in (text, *_templates(settings.get("chat_template"))):
        if each and (reason := exceeded_bound(each)):
            raise PackageError(
                f"the chat template of {folder} {reason}: onnxruntime-genai may not survive that, "
                "so it is not opened."
            )


def _templates(found: Any) -> Iterator[str]:
    """Yield the texts in an entry `chat_template`: one, or a list of named ones."""
    for each in found if isinstance(found, list) else [found]:
        text = each.get("template") if isinstance(each, dict) else each
        if isinstance(text, str):
            yield text


def has_template(folder: Path) -> bool:
    """Return whether the package in `folder` has a template, whatever it does."""
    return bool(template_text(folder))


def template_text(folder: Path) -> str | None:
    """Return the template of the package in `folder` as it is written, None if it has none.

    Raises `PackageError` for one that is not UTF-8 text.
    """
    return _read_text(folder)[0]


def _read_text(folder: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Return the template's text and the tokenizer's settings: chat_template.jinja before the text
    in tokenizer_config.json, as transformers takes them."""
    # The second file is in packages of earlier versions, which copied it from the source.
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", SETTINGS):
        found = read_package_json(folder, name, max_bytes=_MOST_SETTINGS, unique=False)
        settings |= found or {}
    text = chosen_template(settings.get("chat_template"))
    if file_inside(folder, TEMPLATE, PackageError):
        content = read_inside(folder, TEMPLATE, PackageError, max_bytes=_MOST_TEMPLATE)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise PackageError(f"{folder / TEMPLATE} is not UTF-8 text.") from None
    return text, settings


def chosen_template(value: Any) -> str | None:
    """Return the template in `chat_template`, which may be a list of named ones: the `default`."""
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, Mapping)]
        value = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(value, Mapping):
        value = value.get("default")
    return value if isinstance(value, str) else None


def special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that `settings` name, by the variable of a template."""
    found = {}
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            found[key] = text
    return found
