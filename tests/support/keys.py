"""Keys for signing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


def write_key(folder: Path, name: str, kind: str = "ed25519", password: str | None = None) -> Path:
    """Write NAME.pem and NAME.pub.pem as `openssl genpkey` and `openssl pkey -pubout` do."""
    key: Any = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else ec.generate_private_key(ec.SECP256R1())
    )
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
