"""Signatures show who made a package: ours are of the file that lists all others by sha256.

A signature is a file beside the signed one (`manifest.json.sig`, `bundle.json.sig`) with the 64
bytes of RFC 8032, as `openssl pkeyutl` writes and checks them. Keys are PEM files, as
`openssl genpkey` writes them. OpenSSF's signatures, which are checked here too, are in `oms.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.durable import flush, replace_file
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.listing import signature_files
from llama_onnx.targets.oms import oms_problem
from llama_onnx.targets.pem import read_ed25519, read_public
from llama_onnx.targets.printable import printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Signer = Callable[[bytes], bytes]
"""A function that returns the signature of some bytes."""

_LONGEST = 1024  # bytes to read of a signature, which has 64


@dataclass(frozen=True)
class SignedModel:
    """The model that a signed file is about.

    `name` is that of its folder when it was signed; None for a package that was signed before
    names were recorded. `source` is the checkpoint it was made from, `commit` its commit on the
    hub.
    """

    name: str | None
    source: str | None
    commit: str | None
    target: str
    precision: str

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> SignedModel:
        """Read the content of a manifest or of a bundle.json."""
        about = content.get("package")  # of a bundle.json
        about = about if isinstance(about, dict) else content
        source = about.get("source")
        source = source if isinstance(source, dict) else {}
        return cls(
            name=_text(about.get("name")),
            source=_text(source.get("name")),
            commit=_text(source.get("commit")),
            target=_text(about.get("target")) or "",
            precision=_text(about.get("precision")) or "",
        )

    def is_called(self, name: str) -> bool:
        """Whether `name` is its name, or that of its source."""
        return name in (self.name, self.source)

    def __str__(self) -> str:
        """Return a description for people."""
        made = ", ".join(value for value in (self.precision, self.target) if value)
        source = f"made from {self.source}" if self.source else "which does not say its source"
        commit = f" (commit {self.commit})" if self.commit else ""
        return printable(f"{self.name or 'a package without a name'} ({made}), {source}{commit}")


@dataclass(frozen=True)
class Signature:
    """The state of the signature in the file called `file`.

    `there`: it exists; `checked`: it was checked with a key; `problem`: what is wrong with it.
    `model` is what was signed, by the signed file itself, if the signature is valid: a valid
    signature of one model says nothing of another. `others` are signatures there that were not
    checked: a key checks those of its kind.
    """

    file: str
    there: bool
    checked: bool
    problem: str | None = None
    model: SignedModel | None = None
    others: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no problem was found; a signature that was not checked has none."""
        return self.problem is None


def read_signer(file: Path, ask_password: Callable[[], str]) -> Signer:
    """Return a function that signs with the private key in `file`.

    `ask_password` is called if the key is protected. Raises `UsageError` for a file that is not an
    ed25519 key and for a wrong password, `MissingDependencyError` without `cryptography`.
    """
    return read_ed25519(file, ask_password).sign


def write_signature(index: Path, sign: Signer) -> Path:
    """Sign `index` and return the signature's file, which is written completely or not at all."""
    file, _ = signature_files(index)
    flush(index)
    replace_file(file, sign(index.read_bytes()))
    return file


def check_signature(
    index: Path, content: Mapping[str, Any], key: Path | None, name: str | None = None
) -> Signature:
    """Check the signature of `index` with the public key in the file `key`, if a key is given.

    The kind of the key says which signature: ours (ed25519) or OpenSSF's (P-256). `content` is that
    of `index`. With `name`, the signed model must be called so, or be made from a source called so.
    Raises `UsageError` for a `key` of another kind, `MissingDependencyError` without
    `cryptography`.
    """
    if key is None:
        there = [file.name for file in signature_files(index) if file.exists()]
        name, *others = there or [signature_files(index)[0].name]
        return Signature(name, bool(there), checked=False, others=tuple(others))
    file, problem = _problem(index, content, read_public(key), key)
    model = SignedModel.of(content)
    if problem is None and name is not None and not model.is_called(name):
        problem = f"{file.name} is a signature of {model}, not of {name}"
    return Signature(
        file.name,
        file.exists(),
        checked=True,
        problem=problem,
        model=None if problem else model,
        others=tuple(f.name for f in signature_files(index) if f != file and f.exists()),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _problem(
    index: Path, content: Mapping[str, Any], public: Any, key: Path
) -> tuple[Path, str | None]:
    """Return the signature that a key of this kind makes, and what is wrong with it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    ours, oms = signature_files(index)
    if isinstance(public, Ed25519PublicKey):
        file, other, kind = ours, oms, "a P-256 key"
        problem = _our_problem(index, file, public, key)
    else:
        file, other, kind = oms, ours, "an ed25519 key"
        problem = oms_problem(index, content["files"], public, key)
    if problem and not file.exists() and other.exists():
        problem += f", only {other.name}, which {kind} checks"
    return file, problem


def _our_problem(index: Path, file: Path, public: Ed25519PublicKey, key: Path) -> str | None:
    from cryptography.exceptions import InvalidSignature

    found = file_inside(index.parent, file.name, PackageError)
    if found is None:
        return f"it is not signed: there is no {file.name}"
    try:
        with found.open("rb") as opened:
            signature = opened.read(_LONGEST)
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror or error}.") from None
    try:
        public.verify(signature, index.read_bytes())
    except InvalidSignature:
        return (
            f"{file.name} is not a signature of {index.name} by {key}: the file was changed after "
            "it was signed, or another key signed it"
        )
    return None
