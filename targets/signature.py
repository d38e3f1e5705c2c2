"""Who made this? An ed25519 signature of the file that names all others by their sha256.

It stands beside that file (`manifest.json.sig`, `bundle.json.sig`): the 64 bytes of RFC 8032, as
`openssl pkeyutl` makes and checks them. Keys are PEM files, as `openssl genpkey` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.package import SIGNATURE_SUFFIX

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Signer = Callable[[bytes], bytes]
"""Bytes -> their signature."""

_NEW_KEY = "`openssl genpkey -algorithm ed25519 -out KEY.pem` makes one"
_PUBLIC_KEY = "`openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem` makes one of the private one"


@dataclass(frozen=True)
class Signature:
    """What is known of the signature in `file`: whether it is there, whether it was checked, and
    what is wrong with it."""

    file: str
    there: bool
    checked: bool
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with it; one that was not asked for cannot be."""
        return self.problem is None


def read_signer(file: Path, ask_password: Callable[[], str]) -> Signer:
    """What signs with the private key in `file`; `ask_password` is called if it is protected.

    Raises `UsageError` for a file that is no such key or another password,
    `MissingDependencyError` without `cryptography`.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content, password = _read_key(file), None
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content:
        password = ask_password().encode()
    try:
        key = load_pem_private_key(content, password)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if password is not None:
            raise UsageError(f"{file} cannot be read with this password: give its own.") from None
        raise UsageError(f"{file} is no private key in PEM form: {_NEW_KEY}.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{file} is a key of another kind, not ed25519: {_NEW_KEY}.")
    return key.sign


def write_signature(index: Path, sign: Signer) -> Path:
    """Sign `index` and return the file with the signature, which appears whole or not at all."""
    file = _signature_of(index)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(sign(index.read_bytes()))
    temporary.replace(file)
    return file


def check_signature(index: Path, unnamed: Sequence[str], key: Path | None) -> Signature:
    """Check the signature of `index` by the public key in the file `key`, if there is one.

    `unnamed` are files beside it that it does not name: nobody has signed those. Raises
    `UsageError` for a `key` that is none, `MissingDependencyError` without `cryptography`.
    """
    file = _signature_of(index)
    if key is None:
        return Signature(file.name, file.exists(), checked=False)
    public = _read_public(key)
    problem = _problem(index, file, public, key)
    if problem is None and unnamed:
        problem = f"{', '.join(unnamed)}: not in {index.name}, so nobody has signed it"
    return Signature(file.name, file.exists(), checked=True, problem=problem)


def _problem(index: Path, file: Path, public: Ed25519PublicKey, key: Path) -> str | None:
    from cryptography.exceptions import InvalidSignature

    try:
        signature = file.read_bytes()
    except FileNotFoundError:
        return f"it is not signed: there is no {file.name}"
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror or error}.") from None
    try:
        public.verify(signature, index.read_bytes())
    except InvalidSignature:
        return (
            f"{file.name} is no signature of {index.name} by {key}: the file was changed after it "
            "was signed, or another key signed it"
        )
    return None


def _read_public(file: Path) -> Ed25519PublicKey:
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(file))
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{file} is no public key in PEM form: {_PUBLIC_KEY}.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{file} is a key of another kind, not ed25519: {_PUBLIC_KEY}.")
    return key


def _read_key(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None


def _signature_of(index: Path) -> Path:
    return index.with_name(index.name + SIGNATURE_SUFFIX)


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise missing_extra("signing", "cryptography", "sign") from None
