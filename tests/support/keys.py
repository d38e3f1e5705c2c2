"""Keys for signing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa


def write_key(folder: Path, name: str, kind: str = "ed25519", password: str | None = None) -> Path:
    """Write NAME.pem and NAME.pub.pem as `openssl genpkey` and `openssl pkey -pubout` do."""
    make: dict[str, Callable[[], Any]] = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }
    key = make[kind]()
    protection = (
        form.BestAvailableEncryption(password.encode()) if password else form.NoEncryption()
    )
    private = folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, protection))
    public_of(private).write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private


def public_of(private: Path) -> Path:
    return private.with_suffix(".pub.pem")
