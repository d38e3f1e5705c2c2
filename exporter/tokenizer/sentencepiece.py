"""SentencePiece BPE as a `tokenizers` tokenizer that gives the same ids and the same text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from llama_onnx.exporter.tokenizer.files import SpecialTokens, TokenType, add_special_tokens
from llama_onnx.runtime.tokenizer.json_limits import MAX_PIECES
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

_SPACE = "▁"

Merge = tuple[str, str]

MAX_LENGTH = 512
"""Most characters of a token; Gemma's longest has 93."""


def sentencepiece_tokenizer(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    special: SpecialTokens,
    where: str,
    *,
    add_space_prefix: bool = True,
    atoms: Sequence[str] = (),
    legacy: bool = True,
) -> Tokenizer:
    """Build the tokenizer of a SentencePiece BPE vocabulary; a piece's index is its id.

    `atoms` are pieces that SentencePiece cuts out of a text whole, after it added the space prefix;
    other user-defined pieces split the text into parts that each get a prefix, like tokens that
    were added to a vocabulary. Not `legacy`: only the start of a text gets the prefix, and only if
    it is neither a space nor a special token. `where` names the source in messages. Raises
    `UnsupportedError` when the vocabulary merges in a way that a list of merges cannot express.
    """
    check_pieces(pieces, where, scores)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    normal = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind == TokenType.NORMAL
    }
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            merges_by_score(normal, where),
            unk_token=special.unk,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if legacy:
        prefix = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    else:
        scheme = "first" if add_space_prefix else "never"
        steps.append(pre_tokenizers.Metaspace(_SPACE, scheme, split=False))
    if atoms:
        _refuse_unreachable(tokenizer, normal, where)
        tokenizer.model.ignore_merges = True  # for the atoms: no merge leads to them
        steps += _cut_off(atoms)
    if steps:
        one, *others = steps
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if others else one
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    cut_off = {vocabulary[atom] for atom in atoms}
    marked = [TokenType.NORMAL if i in cut_off else kind for i, kind in enumerate(types)]
    add_special_tokens(tokenizer, pieces, marked, special)
    return tokenizer


def check_pieces(pieces: Sequence[str], where: str, scores: Sequence[float] = ()) -> None:
    """Raise `CheckpointError` for a vocabulary that no model has and that takes for ever to read:
    each way to cut a piece in two is looked up."""
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{where}: a piece has no finite score: download it again.")
    longest = max(map(len, pieces), default=0)
    if len(pieces) > MAX_PIECES or longest > MAX_LENGTH:
        raise CheckpointError(
            f"{where}: the vocabulary has {len(pieces):,} pieces of up to {longest:,} characters, "
            f"more than {MAX_PIECES:,} or longer than {MAX_LENGTH:,}: download it again."
        )


def _cut_off(atoms: Sequence[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps that split a text at the atoms. Of several that begin at one position, the
    longest wins."""
    pattern = "|".join(re.escape(atom) for atom in sorted(atoms, key=len, reverse=True))
    # The rest may spell a byte's piece, "<0x0A>", and must not become it: it is split in two, which
    # prevents only merges that begin with "<0".
    spelled = r"\A<(?=0x[0-9A-F]{2}>\z)"
    return [pre_tokenizers.Split(Regex(part), "isolated") for part in (pattern, spelled)]


def _refuse_unreachable(tokenizer: Tokenizer, pieces: Mapping[str, float], where: str) -> None:
    """Refuse a piece that its own text does not merge to: `ignore_merges` would produce it."""
    for piece in pieces:
        if [token.value for token in tokenizer.model.tokenize(piece)] != [piece]:
            raise UnsupportedError(
                f"{where}: no merge leads to the piece {piece!r}, which is not supported together "
                "with user-defined pieces; export a checkpoint with a tokenizer.json instead."
            )


def merges_by_score(pieces: Mapping[str, float], where: str) -> list[Merge]:
    """Return every way to join two pieces to a third, best score of the result first.

    SentencePiece merges the neighbors whose union scores highest, the leftmost on a tie; a list of
    merges applies the earliest in the list, and only then the leftmost. They agree if all scores
    are distinct. Llama's runs of spaces all score -1e9: there, longest first gives the same result.
    """
    ranked = sorted(
        (piece for piece in pieces if len(piece) > 1), key=lambda p: (-pieces[p], -len(p))
    )
    _refuse_foreign_characters(ranked, pieces, where)
    merges: list[Merge] = []
    for score, group in groupby(ranked, key=pieces.__getitem__):
        tied = list(group)
        found = [merge for piece in tied for merge in _splits(piece, pieces)]
        if len(tied) > 1 and _compete(found):
            raise UnsupportedError(
                f"{where}: {len(tied)} pieces of the vocabulary share the score {score:g}, so the "
                "order of its merges is lost; export the original checkpoint folder instead."
            )
        merges += found
    return merges


def _splits(piece: str, pieces: Mapping[str, float]) -> Iterator[Merge]:
    for cut in range(len(piece) - 1, 0, -1):
        left, right = piece[:cut], piece[cut:]
        if left in pieces and right in pieces:
            yield left, right


def _compete(merges: Sequence[Merge]) -> bool:
    """Return whether two merges of one score can claim the same piece of a text."""
    others = [merge for merge in merges if set("".join(merge)) != {_SPACE}]
    return not {left for left, _ in others}.isdisjoint(right for _, right in others)


def _refuse_foreign_characters(
    ranked: Sequence[str], pieces: Mapping[str, float], where: str
) -> None:
    # SentencePiece can merge a character that is not a piece; a list of merges has pieces only.
    for piece in ranked:
        for cut in range(1, len(piece)):
            parts = piece[:cut], piece[cut:]
            reached = all(len(part) == 1 or part in pieces for part in parts)
            if reached and not all(part in pieces for part in parts):
                raise UnsupportedError(
                    f"{where}: the piece {piece!r} has a character that is not in the "
                    "vocabulary; export the original checkpoint folder instead."
                )
