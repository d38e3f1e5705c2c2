"""The tokenizer in a GGUF file's metadata (`tokenizer.ggml.*`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from llama_onnx.exporter.tokenizer.bytelevel import SPLITTINGS, Splitting, bytelevel_tokenizer
from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenizerFiles, TokenType
from llama_onnx.exporter.tokenizer.sentencepiece import check_pieces, sentencepiece_tokenizer
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> TokenizerFiles:
    """Build the tokenizer that `metadata` describes; `where` names the file in messages.

    Raises `CheckpointError` when it is missing or incomplete, `UnsupportedError` for a kind
    that this tool does not know.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        raise CheckpointError(
            f"{where} holds no tokenizer: use the original checkpoint folder, or a GGUF file "
            "converted with its vocabulary."
        )
    builders = {"llama": _sentencepiece, "gpt2": _bytelevel}
    if not isinstance(kind, str) or kind not in builders:
        raise UnsupportedError(
            f"{where}: tokenizer.ggml.model is {shown(kind)}, but only 'llama' and 'gpt2' are "
            "supported."
        )
    tokenizer, special = builders[kind](_Vocabulary(metadata, where))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where}: tokenizer.chat_template is {shown(template)}, not a text.")
    return TokenizerFiles(tokenizer, special, template)


class _Vocabulary:
    """The lists in the metadata, checked for consistency."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.pieces: list[str] = self.items("tokens", str)
        check_pieces(self.pieces, where)
        self.types: list[int] = [TokenType.NORMAL] * len(self.pieces)
        if self.get("token_type", None) is not None:
            self.types = self.items("token_type", int)
        self.same_length("token_type", self.types)

    def get(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def items(self, key: str, kind: type) -> list[Any]:
        value = self.get(key, None)
        if not isinstance(value, list):
            raise CheckpointError(
                f"{self.where} lacks the metadata key 'tokenizer.ggml.{key}': its tokenizer is "
                "incomplete."
            )
        if not all(type(item) is kind for item in value):
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{key} is {shown(value)}, which is not a list of "
                "the right type: convert the model again."
            )
        return value

    def same_length(self, key: str, values: list[Any]) -> None:
        if len(values) != len(self.pieces):
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{key} has {len(values):,} entries for "
                f"{len(self.pieces):,} tokens."
            )

    def special_tokens(self, add_bos: bool) -> SpecialTokens:
        special = SpecialTokens(
            bos=self._piece("bos_token_id"),
            eos=self._piece("eos_token_id"),
            unk=self._piece("unknown_token_id"),
            pad=self._piece("padding_token_id"),
            add_bos=bool(self.get("add_bos_token", add_bos)),
            add_eos=bool(self.get("add_eos_token", False)),
        )
        for name, wanted, piece in (
            ("bos", special.add_bos, special.bos),
            ("eos", special.add_eos, special.eos),
        ):
            if wanted and piece is None:
                raise CheckpointError(
                    f"{self.where}: tokenizer.ggml.add_{name}_token is set, but there is no "
                    f"tokenizer.ggml.{name}_token_id."
                )
        return special

    def _piece(self, key: str) -> str | None:
        index = self.get(key, None)
        if index is None:
            return None
        if isinstance(index, bool) or not isinstance(index, int):
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{key} is {index!r}, not a token id."
            )
        # Converters write -1 or 4294967295 for "none"; the checkpoint warns of any other id.
        return self.pieces[index] if 0 <= index < len(self.pieces) else None


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, SpecialTokens]:
    scores = vocabulary.items("scores", float)
    vocabulary.same_length("scores", scores)
    if vocabulary.get("remove_extra_whitespaces", False):
        raise UnsupportedError(
            f"{vocabulary.where}: tokenizer.ggml.remove_extra_whitespaces is not supported."
        )
    special = vocabulary.special_tokens(add_bos=True)
    tokenizer = sentencepiece_tokenizer(
        vocabulary.pieces,
        scores,
        vocabulary.types,
        special,
        vocabulary.where,
        add_space_prefix=bool(vocabulary.get("add_space_prefix", True)),
    )
    return tokenizer, special


def _bytelevel(vocabulary: _Vocabulary) -> tuple[Tokenizer, SpecialTokens]:
    splitting = _splitting(vocabulary)
    special = vocabulary.special_tokens(add_bos=splitting.add_bos)
    tokenizer = bytelevel_tokenizer(
        vocabulary.pieces, _merges(vocabulary), vocabulary.types, special, splitting
    )
    return tokenizer, special


def _splitting(vocabulary: _Vocabulary) -> Splitting:
    name = vocabulary.get("pre", "default")
    if name == "default":
        # llama.cpp falls back to a pattern that no model was trained with, and warns.
        raise UnsupportedError(
            f"{vocabulary.where} lacks tokenizer.ggml.pre, the way its tokenizer splits text: "
            "convert the model again with a current llama.cpp."
        )
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise UnsupportedError(
            f"{vocabulary.where}: the pre-tokenizer {shown(name)} (tokenizer.ggml.pre) is not "
            f"supported; supported are {', '.join(SPLITTINGS)}."
        )
    return SPLITTINGS[name]


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    known = set(vocabulary.pieces)
    merges = []
    for line in vocabulary.items("merges", str):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= known:
            raise CheckpointError(
                f"{vocabulary.where}: the merge {line!r} in tokenizer.ggml.merges has parts "
                "that are not in the vocabulary."
            )
        merges.append((left, right))
    return merges
