"""The tokenizer files that transformers, onnxruntime-genai and browsers read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from llama_onnx.runtime.llama.template import ROLES
from llama_onnx.runtime.tokenizer.encoder import tokenizer_from
from llama_onnx.targets.errors import CheckpointError

# No null, no list, and only a class that onnxruntime-genai knows: it refuses all others. The chat
# template is in its own file only, so that no reader can find another one.
# With this class every reader uses tokenizer.json unchanged. For LlamaTokenizer and GPT2Tokenizer,
# transformers 5 inserts more steps and onnxruntime-genai misreads byte-level BPE.
_CLASS = "PreTrainedTokenizerFast"


class TokenType(IntEnum):
    """What a piece of a vocabulary is: SentencePiece's numbers, which GGUF uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a role, as text, and whether encoding adds BOS and EOS."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    sep: str | None = None
    cls: str | None = None
    mask: str | None = None
    add_bos: bool = False
    add_eos: bool = False

    def roles(self) -> list[tuple[str, str]]:
        """Return the roles that a token has, and the tokens."""
        found = ((role, getattr(self, role)) for role in ROLES)
        return [(role, token) for role, token in found if token is not None]

    def without(self, role: str) -> SpecialTokens:
        """Return the same without the token of `role`, which encoding does not add either."""
        changes: dict[str, Any] = {role: None}
        if role in ("bos", "eos"):
            changes[f"add_{role}"] = False
        return replace(self, **changes)


def check_tokenizer(file: Path, vocab_size: int, where: str) -> None:
    """Raise `CheckpointError` unless `file` is a tokenizer.json that can be read, and all of its
    ids are below `vocab_size`."""
    try:
        tokenizer = tokenizer_from(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{where}: tokenizer.json cannot be read ({error}): download it again."
        ) from None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    last = max(ids, key=ids.__getitem__, default=None)
    if last is not None and ids[last] >= vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer gives the token {last!r} the id {ids[last]:,}, but the "
            f"embedding has {vocab_size:,} rows: use the tokenizer of this model, or remove the "
            "token from the tokenizer's files if it was added without training."
        )


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer ready to be written.

    `text` is that of tokenizer.json, if it is not the library's own; `settings` are further
    entries of tokenizer_config.json.
    """

    tokenizer: Tokenizer
    special: SpecialTokens
    chat_template: str | None = None
    text: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, max_length: int) -> list[str]:
        """Write the files into `folder`; return their names."""
        files = {
            "tokenizer.json": self.text or self.tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(
                _settings(self.special, max_length) | dict(self.settings),
                indent=2,
                ensure_ascii=False,
            ),
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            # Bytes, because text mode would turn a template's \n into \r\n on Windows.
            (folder / name).write_bytes(text.encode("utf-8"))
        return list(files)


def add_special_tokens(
    tokenizer: Tokenizer, pieces: Sequence[str], types: Sequence[int], special: SpecialTokens
) -> None:
    """Make control and user-defined pieces match as a whole, and let encoding add BOS and EOS."""
    added = [
        AddedToken(piece, special=kind != TokenType.USER_DEFINED, normalized=False)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED) and piece
    ]
    tokenizer.add_tokens(added)
    set_ends(tokenizer, special)


def set_ends(tokenizer: Tokenizer, special: SpecialTokens) -> None:
    """Let encoding add BOS and EOS as `special` says, and nothing else."""
    bos = special.bos if special.add_bos else None
    eos = special.eos if special.add_eos else None
    ends = [token for token in (bos, eos) if token is not None]
    tokenizer.post_processor = None
    if ends:
        single, pair = ([t for t in (bos, f"${x}", eos) if t is not None] for x in "AB")
        tokenizer.post_processor = TemplateProcessing(
            single=single,
            pair=[*single, *(f"{token}:1" for token in pair)],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ends],
        )


def _settings(special: SpecialTokens, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": _CLASS,
        **{f"{role}_token": token for role, token in special.roles()},
        "add_bos_token": special.add_bos,
        "add_eos_token": special.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
