"""SentencePiece's own file, `tokenizer.model`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from llama_onnx.exporter.formats.placeholder import refuse_placeholder
from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenizerFiles, TokenType
from llama_onnx.exporter.tokenizer.sentencepiece import sentencepiece_tokenizer
from llama_onnx.runtime.tokenizer.json_limits import MAX_PIECES
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.folder_files import read_inside

MAX_BYTES = 8 << 20
"""Largest `tokenizer.model`: Llama's has 0.5 MB, Gemma's 4 MB."""

_proto: Any = sentencepiece_model_pb2  # its classes are made at run time, unseen by mypy


@dataclass(frozen=True)
class ModelFileFacts:
    """How many tokens a model has, and the ids of its BOS and EOS."""

    size: int
    bos_id: int | None
    eos_id: int | None


def read_facts(path: Path) -> ModelFileFacts:
    """Read the facts of the model at `path`; raises `CheckpointError` for another kind of file."""
    model = _read(path)
    bos, eos = (
        i if i >= 0 else None for i in (model.trainer_spec.bos_id, model.trainer_spec.eos_id)
    )
    return ModelFileFacts(len(model.pieces), bos, eos)


def tokenizer_from_model_file(path: Path, *, legacy: bool = True) -> TokenizerFiles:
    """Read the SentencePiece BPE model at `path`; encoding adds BOS, as Llama expects. `legacy` is
    as in `sentencepiece_tokenizer`.

    Raises `CheckpointError` when it cannot be read, `UnsupportedError` when it is another kind.
    """
    model = _read(path)
    _refuse_features(model, str(path))
    special = _special_tokens(model)
    tokenizer = sentencepiece_tokenizer(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        special,
        str(path),
        add_space_prefix=model.normalizer_spec.add_dummy_prefix,
        atoms=[p.piece for p in model.pieces if p.type == TokenType.USER_DEFINED],
        legacy=legacy,
    )
    return TokenizerFiles(tokenizer, special)


def without_prefix(content: bytes) -> bytes:
    """Return the same model without the space that it puts before a text."""
    model = _proto.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return content  # the reader says so
    model.normalizer_spec.add_dummy_prefix = False
    changed: bytes = model.SerializeToString()
    return changed


def _read(path: Path) -> Any:
    model = _proto.ModelProto()
    content = read_inside(path.parent, path.name, max_bytes=MAX_BYTES)
    refuse_placeholder(path, content)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        raise UnsupportedError(
            f"{path} is a vocabulary for tiktoken, as Meta's download of Llama 3 has it, not a "
            "SentencePiece model: export the model's Hugging Face folder, which has a "
            "tokenizer.json."
        )
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise CheckpointError(f"{path} is not a SentencePiece model: download it again.") from None
    if len(model.pieces) > MAX_PIECES:
        raise CheckpointError(f"{path} has more than {MAX_PIECES:,} pieces: download it again.")
    if not all(isinstance(piece.piece, str) for piece in model.pieces):  # bytes if not UTF-8
        raise CheckpointError(f"{path} has a piece that is not UTF-8 text: download it again.")
    return model


def _refuse_features(model: Any, where: str) -> None:
    normalizer = model.normalizer_spec
    refused = {
        "no vocabulary": not model.pieces,
        "a model type other than BPE": model.trainer_spec.model_type != _proto.TrainerSpec.BPE,
        "a normalization rule": bool(normalizer.precompiled_charsmap),
        "removal of extra spaces": normalizer.remove_extra_whitespaces,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "spaces at the end of words": model.trainer_spec.treat_whitespace_as_suffix,
    }
    for feature, present in refused.items():
        if present:
            raise UnsupportedError(f"{where}: the tokenizer has {feature}, which is not supported.")


def _special_tokens(model: Any) -> SpecialTokens:
    trainer = model.trainer_spec
    ids = (trainer.bos_id, trainer.eos_id, trainer.unk_id, trainer.pad_id)
    size = len(model.pieces)
    bos, eos, unk, pad = (model.pieces[i].piece if 0 <= i < size else None for i in ids)
    return SpecialTokens(bos, eos, unk, pad, add_bos=bos is not None)
