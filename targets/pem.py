"""Keys in PEM files, as `openssl` writes them: ed25519 for our own signatures, NIST curves for
OpenSSF's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.extras import missing_extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

NEW_KEY = "make one with `openssl genpkey -algorithm ed25519 -out KEY.pem`"
NEW_CURVE_KEY = (
    "make one with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem`"
)

_PUBLIC_KEY = "make one with `openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem`"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def read_private(
    file: Path, ask_password: Callable[[], str], advice: str = NEW_KEY
) -> tuple[Any, bytes | None]:
    """Return the private key in `file`, of any kind, and its password, which is asked for if the
    key is protected.

    Raises `UsageError`, with `advice`, for a file that is not a key, and for a wrong password,
    `MissingDependencyError` without `cryptography`.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content, password = _read_key(file), None
    if b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content:
        password = ask_password().encode()
    try:
        return load_pem_private_key(content, password), password
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if password is not None:
            raise UsageError(f"{file} cannot be read with this password.") from None
        raise UsageError(f"{file} is not a private key in PEM format: {advice}.") from None


def read_ed25519(file: Path, ask_password: Callable[[], str]) -> Ed25519PrivateKey:
    """Return the ed25519 key in `file`; see `read_private`. Raises `UsageError` for others."""
    key, _ = read_private(file, ask_password)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(key, Ed25519PrivateKey):
        other = ", or pass --format oms" if getattr(key, "curve", None) is not None else ""
        raise UsageError(f"{file} is not an ed25519 key: {NEW_KEY}{other}.")
    return key


def read_curve_key(
    file: Path, ask_password: Callable[[], str]
) -> tuple[EllipticCurvePrivateKey, bytes | None]:
    """Return the key in `file` of a curve that OpenSSF's model signing takes, and its password; see
    `read_private`. Raises `UsageError` for other keys."""
    key, password = read_private(file, ask_password, NEW_CURVE_KEY)
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    if not (isinstance(key, EllipticCurvePrivateKey) and key.curve.name in _CURVES):
        raise UsageError(f"{file} is not a P-256 key, which OMS needs: {NEW_CURVE_KEY}.")
    return key, password


def read_public(file: Path) -> Ed25519PublicKey | EllipticCurvePublicKey:
    """Return the public key in `file`: ed25519, or of a curve that OpenSSF's model signing takes.

    Raises `UsageError` for other keys and files, `MissingDependencyError` without `cryptography`.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(file))
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{file} is not a public key in PEM format: {_PUBLIC_KEY}.") from None
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    raise UsageError(f"{file} is neither an ed25519 key nor a P-256 key: {_PUBLIC_KEY}.")


def _read_key(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise missing_extra("signing", "cryptography", "sign") from None
