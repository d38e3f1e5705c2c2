"""The files beside a tokenizer in a Hugging Face folder: settings, added tokens, chat template.

A folder with only `tokenizer.model` is read as SentencePiece reads it, not as transformers
converts it: transformers 5.23 leaves out the space before the first word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.model.typed_keys import is_number
from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenizerFiles, set_ends
from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from llama_onnx.runtime.llama.template import ROLES, chosen_template
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.printable import printable

_MAX_TEMPLATE = 1 << 20  # in bytes; the longest of a public Llama has 10,000


def tokenizer_from_folder(folder: Path) -> TokenizerFiles:
    """Read `folder/tokenizer.model` with the tokens, roles and template in the files beside it.

    Raises `CheckpointError` when these do not fit together.
    """
    settings = read_settings(folder)
    files = tokenizer_from_model_file(folder / "tokenizer.model", legacy=is_legacy(settings))
    _add_tokens(files.tokenizer, read_added_tokens(folder), str(folder))
    special = special_tokens(files.special, settings)
    for role in ROLES:
        token = getattr(special, role)
        if token is not None and files.tokenizer.token_to_id(token) is None:
            raise CheckpointError(
                f"{folder}: the {role}_token {token!r} is not a token of tokenizer.model, and "
                "added_tokens.json gives it no id."
            )
    set_ends(files.tokenizer, special)
    return TokenizerFiles(files.tokenizer, special, read_chat_template(folder))


def read_settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, completed by special_tokens_map.json; {} without either."""
    return _optional(folder / "special_tokens_map.json") | _optional(
        folder / "tokenizer_config.json"
    )


def is_legacy(settings: Mapping[str, Any]) -> bool:
    """Return whether each part of a text between special tokens gets a space in front, as Llama's
    own tokenizer does; `"legacy": false` in tokenizer_config.json (Vicuna 1.5) says otherwise."""
    return settings.get("legacy") is not False


def read_chat_template(folder: Path) -> str | None:
    """Read the chat template of `folder`: chat_template.jinja, or else the one in
    tokenizer_config.json (the default of several)."""
    if file := file_inside(folder, "chat_template.jinja"):
        try:
            return read_inside(folder, file.name, max_bytes=_MAX_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{file} is not UTF-8 text: download it again.") from None
    return chosen_template(_optional(folder / "tokenizer_config.json").get("chat_template"))


def template_notes(folder: Path) -> list[str]:
    """Return warnings about templates in `folder` that a package does not get."""
    settings = folder / "tokenizer_config.json"
    inside = _optional(settings).get("chat_template")
    chosen, notes = read_chat_template(folder), []
    if isinstance(inside, list):
        entries = [entry for entry in inside if isinstance(entry, Mapping)]
        names = sorted(printable(str(entry.get("name"))) for entry in entries)
        others = ", ".join(name for name in names if name != "default")
        if chosen is None:
            notes.append(
                f"{settings}: of the chat templates {others} none is the default, so the package "
                "has none, and chat is not possible; transformers refuses to choose, too."
            )
        elif others:
            notes.append(
                f"{settings}: of several chat templates the package gets the default one; left "
                f"out: {others}."
            )
    elif isinstance(inside, str) and chosen is not None and inside != chosen:
        notes.append(
            f"{settings}: its chat template differs from chat_template.jinja, which the package "
            "gets, as in transformers."
        )
    return notes


def read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Read the tokens added to the vocabulary, by id, from added_tokens.json and
    tokenizer_config.json, which may repeat some of the vocabulary.

    Raises `CheckpointError` for a damaged entry.
    """
    settings = read_settings(folder)
    special = {_text(value) for key, value in settings.items() if key.endswith("_token")}
    try:
        special |= {_text(value) for value in settings.get("additional_special_tokens") or []}
        entries: dict[Any, Any] = {
            index: {"content": token, "special": token in special}
            for token, index in _optional(folder / "added_tokens.json").items()
        }
        entries |= settings.get("added_tokens_decoder") or {}
        return {_index(index): _added_token(entry) for index, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{folder}: the tokens in added_tokens.json or in tokenizer_config.json's "
            "added_tokens_decoder are damaged: download these files again."
        ) from None


def _index(value: Any) -> int:
    if type(value) is int or (isinstance(value, str) and is_number(value)):
        return int(value)
    raise ValueError(value)


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip", "single_word")}
    # Never normalized: SentencePiece's own tokenizer looks for them in the original text.
    return AddedToken(entry["content"], normalized=False, **flags)


def _text(token: Any) -> str | None:
    """Return the text of a token, which may come with its flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _add_tokens(tokenizer: Tokenizer, added: Mapping[int, AddedToken], where: str) -> None:
    size = tokenizer.get_vocab_size()
    for index in sorted(added):
        token = added[index]
        if index >= size or tokenizer.token_to_id(token.content) == index:
            tokenizer.add_tokens([token])  # a token of the vocabulary keeps its id
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{where}: the added token {token.content!r} has the id {index}, but "
                f"{tokenizer.token_to_id(token.content)} in tokenizer.model: use the files of one "
                "model."
            )


def special_tokens(own: SpecialTokens, settings: Mapping[str, Any]) -> SpecialTokens:
    """Return `own`, the roles that a vocabulary defines, with those in `settings` replaced."""
    given: dict[str, Any] = {}
    for role in ROLES:
        token = _text(settings.get(f"{role}_token"))
        if token:  # early conversions of Llama have empty ones
            given[role] = token
    for key, field in (("add_bos_token", "add_bos"), ("add_eos_token", "add_eos")):
        if settings.get(key) is not None:
            given[field] = bool(settings[key])
    return replace(own, **given)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if file_inside(path.parent, path.name) else {}
