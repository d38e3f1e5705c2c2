"""A Hugging Face folder's tokenizer.json, with what transformers adds from the files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_onnx.exporter.formats.placeholder import refuse_placeholder
from llama_onnx.exporter.tokenizer.digits import spell_out_digits
from llama_onnx.exporter.tokenizer.encoded import encoded
from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenizerFiles, set_ends
from llama_onnx.exporter.tokenizer.huggingface import (
    read_added_tokens,
    read_chat_template,
    read_settings,
    special_tokens,
)
from llama_onnx.runtime.tokenizer.encoder import tokenizer_from
from llama_onnx.runtime.tokenizer.json_limits import exceeded_limit
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.folder_files import read_inside
from llama_onnx.targets.strict_json import MAX_BYTES, JSONError, parse_json

FILE = "tokenizer.json"

_LLAMA = (
    *(None, "LlamaTokenizer", "LlamaTokenizerFast"),
    *("CodeLlamaTokenizer", "CodeLlamaTokenizerFast"),
)
_END = "<|endoftext|>"
_DEFAULTS: dict[str | None, SpecialTokens] = {
    **dict.fromkeys(_LLAMA, SpecialTokens("<s>", "</s>", "<unk>")),
    **dict.fromkeys(("GPT2Tokenizer", "GPT2TokenizerFast"), SpecialTokens(_END, _END, _END)),
}
"""Class in tokenizer_config.json -> the roles it has by itself, where the settings name none."""


@dataclass(frozen=True)
class JsonTokenizer:
    """What a folder's files say together. `text` is that of the tokenizer.json to write; `notes`
    are warnings for people."""

    tokenizer: Tokenizer
    text: str
    special: SpecialTokens
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


def copy_tokenizer(source: Path, folder: Path, max_length: int) -> list[str]:
    """Write the tokenizer in `source` and its chat template to `folder`; returns the file names."""
    read = read_json_tokenizer(source)
    length = read.settings.get("model_max_length")
    kept = {
        key: value
        for key, kind in (("clean_up_tokenization_spaces", bool), ("padding_side", str))
        if isinstance(value := read.settings.get(key), kind)
    }
    if isinstance(length, int) and 0 < length < 1 << 31:
        max_length = length
    files = TokenizerFiles(
        read.tokenizer, read.special, read_chat_template(source), read.text, kept
    )
    return files.write(folder, max_length)


def read_json_tokenizer(folder: Path, *, spelled: bool = True) -> JsonTokenizer:
    """Read `folder`/tokenizer.json, and the files beside it; with `spelled`, steps that
    onnxruntime-genai gets wrong are written in another way (see `digits`).

    Raises `CheckpointError` if one is damaged, `UnsupportedError` for a kind of tokenizer that
    onnxruntime-genai does not read.
    """
    content = read_inside(folder, FILE, max_bytes=MAX_BYTES)
    _check_kind(folder, content)
    if spelled:
        content = spell_out_digits(content)
    try:
        tokenizer = tokenizer_from(content)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: tokenizer.json cannot be read ({error}): download it again."
        ) from None
    settings = read_settings(folder)
    before = tokenizer.to_str()
    special, missing = _roles(tokenizer, settings)
    notes = [f"{folder}: {note}" for note in missing]
    _mark_special(tokenizer, read_added_tokens(folder), special)
    special, note = _with_ends(tokenizer, special, settings, str(folder / FILE))
    notes += [f"{folder}: {one}" for one in note]
    changed = tokenizer.to_str() != before
    text = tokenizer.to_str(pretty=True) if changed else content.decode("utf-8-sig")
    return JsonTokenizer(tokenizer, text, special, settings, tuple(notes))


def _check_kind(folder: Path, content: bytes) -> None:
    refuse_placeholder(folder / FILE, content)
    try:
        value = parse_json(content)
    except JSONError as error:
        raise CheckpointError(
            f"{folder}: tokenizer.json cannot be read (it {error}): download it again."
        ) from None
    if limit := exceeded_limit(value):
        raise UnsupportedError(f"{folder}: tokenizer.json is too large: {limit}.")
    model = value.get("model") if isinstance(value, dict) else None
    # Very old files have no type, which is BPE or WordPiece: the library says which it can be.
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind in ("Unigram", "WordLevel", "WordPiece"):
        raise UnsupportedError(
            f"{folder}: tokenizer.json has a {kind} model, but onnxruntime-genai reads "
            "BPE only: use a checkpoint with such a tokenizer."
        )
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):
        raise UnsupportedError(
            f"{folder}: tokenizer.json has a continuing_subword_prefix, which is not supported."
        )


def _roles(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> tuple[SpecialTokens, list[str]]:
    """Return the tokens with a role that the vocabulary has, and notes about the others."""
    kind = settings.get("tokenizer_class")
    own = _DEFAULTS.get(kind if isinstance(kind, str) else None, SpecialTokens())
    for role, token in own.roles():
        if f"{role}_token" in settings or tokenizer.token_to_id(token) is None:
            own = own.without(role)
    special = special_tokens(own, settings)
    notes = []
    for role, token in special.roles():
        if tokenizer.token_to_id(token) is None:
            notes.append(
                f"the {role}_token {token!r} is not a token of tokenizer.json, so the package has "
                f"no {role}_token."
            )
            special = special.without(role)
    return special, notes


def _mark_special(
    tokenizer: Tokenizer, added: Mapping[int, AddedToken], special: SpecialTokens
) -> None:
    """Let the tokens that the settings describe match as a whole, as transformers does."""
    known = tokenizer.get_added_tokens_decoder()
    for index, token in sorted(added.items()):
        found = tokenizer.token_to_id(token.content)
        last = tokenizer.get_vocab_size(with_added_tokens=True)
        if (found is None and index == last) or (found == index and index not in known):
            tokenizer.add_tokens([token])
    known = tokenizer.get_added_tokens_decoder()
    for _, text in special.roles():
        own = tokenizer.token_to_id(text)
        if own not in known or not known[own].special:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _with_ends(
    tokenizer: Tokenizer, special: SpecialTokens, settings: Mapping[str, Any], where: str
) -> tuple[SpecialTokens, list[str]]:
    """Return `special` with what encoding adds, and notes.

    transformers 4's Llama tokenizers do what the settings say; transformers 5 does what
    tokenizer.json says, which often has no such step. The settings are what the model was trained
    with.
    """
    plain = encoded(tokenizer, "a", where, add_special_tokens=False)
    ids = encoded(tokenizer, "a", where)
    bos = special.bos is not None and ids[: -len(plain)][:1] == [tokenizer.token_to_id(special.bos)]
    eos = special.eos is not None and ids[len(plain) :][-1:] == [tokenizer.token_to_id(special.eos)]
    said = [settings.get(key) for key in ("add_bos_token", "add_eos_token")]
    kind = settings.get("tokenizer_class")
    if kind not in _LLAMA or all(value is None for value in said):
        return replace(special, add_bos=bos, add_eos=eos), []
    wanted = replace(
        special,
        add_bos=special.bos is not None and (said[0] is None or bool(said[0])),
        add_eos=special.eos is not None and bool(said[1]),
    )
    if (wanted.add_bos, wanted.add_eos) == (bos, eos):
        return wanted, []
    set_ends(tokenizer, wanted)
    return wanted, [" ".join(_describe_ends(wanted, bos, eos))]


def _describe_ends(wanted: SpecialTokens, bos: bool, eos: bool) -> Iterator[str]:
    yield "tokenizer_config.json and tokenizer.json disagree:"
    for name, token, want, has in (
        ("add_bos_token", wanted.bos, wanted.add_bos, bos),
        ("add_eos_token", wanted.eos, wanted.add_eos, eos),
    ):
        if want != has:
            verb = "adds" if want else "does not add"
            yield f"with {name} {str(want).lower()}, encoding {verb} {token!r},"
    yield "as in transformers 4; transformers 5 ignores these settings."
