"""OpenSSF model signing: `model.sig`, a signature of all files of a folder, as other tools read it.

The file is a Sigstore bundle: a DSSE envelope around an in-toto statement, which lists the files
by sha256. OpenSSF's own library writes it; it is checked here with `cryptography` alone, because it
may come from a stranger: nothing of the statement is looked at before its signature is valid.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.durable import flush, replace_file
from llama_onnx.targets.errors import PackageError, UsageError, describe_reason
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.folder_files import file_inside, is_plain_name, read_inside
from llama_onnx.targets.listing import BESIDE, OMS_SIGNATURE, hash_file, left_out_of_signatures
from llama_onnx.targets.pem import read_curve_key
from llama_onnx.targets.printable import printable
from llama_onnx.targets.strict_json import JSONError, parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_MAX_BYTES = 16 << 20  # of model.sig: 10,000 files take 2 MB
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_SHOWN = 5  # files that are named


class _InvalidError(Exception):
    """What is wrong with a signature, in words that follow its file's name."""


def write_oms_signature(index: Path, key: Path, ask_password: Callable[[], str]) -> Path:
    """Sign all files in the folder of `index` with the private key in the file `key`.

    Returns the signature's file, which is written completely or not at all. Signatures are not
    covered, so that those of other kinds can be added later. Raises `UsageError` for a `key` that
    is not of a suitable curve and for a folder with links, `MissingDependencyError` without
    `model-signing`.
    """
    _, password = read_curve_key(key, ask_password)
    folder, left_out = index.parent.resolve(), left_out_of_signatures(index)
    _check_links(folder, left_out)
    bundle = _sign(folder, left_out, key, password)
    flush(index)
    replace_file(folder / OMS_SIGNATURE, bundle.encode())
    return index.with_name(OMS_SIGNATURE)


def oms_problem(
    index: Path, listed: Mapping[str, Mapping[str, Any]], public: EllipticCurvePublicKey, key: Path
) -> str | None:
    """Return what is wrong with model.sig beside `index`, by the key `public` from the file `key`;
    None if nothing is.

    `listed` are the files of `index` with their sha256, which somebody else compares with the files
    themselves. Raises `PackageError` for a model.sig that cannot be read.
    """
    folder = index.parent
    if file_inside(folder, OMS_SIGNATURE, PackageError) is None:
        return f"it is not signed: there is no {OMS_SIGNATURE}"
    content = read_inside(folder, OMS_SIGNATURE, PackageError, max_bytes=_MAX_BYTES)
    try:
        statement = _open_envelope(content, public, key)
        digests, ignored = _read_statement(statement)
        _compare(index, listed, digests, ignored)
    except _InvalidError as problem:
        return f"{OMS_SIGNATURE} {printable(str(problem))}"
    return None


def _check_links(folder: Path, left_out: tuple[str, ...]) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not _is_left_out(name, left_out):
            raise UsageError(
                f"{path} is a link, which OMS does not sign: copy the package to a folder of its "
                "own, with files instead of links."
            )


def _is_left_out(name: str, left_out: tuple[str, ...]) -> bool:
    return any(
        name == left.rstrip("/") or name.startswith(f"{left.rstrip('/')}/") for left in left_out
    )


def _sign(folder: Path, left_out: tuple[str, ...], key: Path, password: bytes | None) -> str:
    """Return the Sigstore bundle that OpenSSF's library makes for `folder`."""
    try:
        from model_signing import hashing, signing
    except ModuleNotFoundError as error:
        raise missing_extra("`sign --format oms`", error.name, "oms") from None
    import tempfile

    # Not annotated there, and the password as text; cryptography, which gets it, takes bytes.
    hash_config: Any = hashing.Config
    sign_config: Any = signing.Config
    files = hash_config().set_ignored_paths(paths=[Path(name) for name in left_out])
    config = sign_config().use_elliptic_key_signer(private_key=key, password=password)
    with tempfile.TemporaryDirectory() as place:
        written = Path(place, OMS_SIGNATURE)
        try:
            config.set_hashing_config(files).sign(folder, written)
        except (OSError, ValueError) as error:
            raise PackageError(f"{folder} cannot be signed: {describe_reason(error)}.") from None
        return written.read_text("utf-8")


def _open_envelope(content: bytes, public: EllipticCurvePublicKey, key: Path) -> Any:
    """Return the signed statement. Raises `_InvalidError`, also if `public` did not sign it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    bundle = _parse(content, "")
    _require(bundle, "mediaType", _MEDIA_TYPE)
    material = _object(bundle, "verificationMaterial")
    if "publicKey" not in material:
        raise _InvalidError(
            "was made with a certificate, not with a key: check it with OpenSSF's `model_signing "
            "verify`"
        )
    envelope = _object(bundle, "dsseEnvelope")
    _require(envelope, "payloadType", _PAYLOAD_TYPE)
    payload = _decode(envelope.get("payload"))
    signatures = envelope.get("signatures")
    if not (isinstance(signatures, list) and len(signatures) == 1):
        raise _InvalidError("is damaged: it must have one signature")
    if not isinstance(signatures[0], dict):
        raise _InvalidError("is damaged: its signature has the wrong type")
    sizes = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    try:
        algorithm = ECDSA(sizes[public.curve.key_size])
        public.verify(_decode(signatures[0].get("sig")), _signed_bytes(payload), algorithm)
    except InvalidSignature:
        raise _InvalidError(
            f"is not a signature by {key}: it was changed, or another key signed it"
        ) from None
    return _parse(payload, "its statement ")


def _signed_bytes(payload: bytes) -> bytes:
    """Return what DSSE signs of `payload`."""
    return b"DSSEv1 %d %s %d %s" % (
        len(_PAYLOAD_TYPE),
        _PAYLOAD_TYPE.encode(),
        len(payload),
        payload,
    )


def _read_statement(statement: Any) -> tuple[dict[str, str], set[str]]:
    """Return the sha256 of the signed files by name, and the names that the signer left out."""
    _require(statement, "_type", _STATEMENT)
    _require(statement, "predicateType", _PREDICATE)
    predicate = _object(statement, "predicate")
    how = _object(predicate, "serialization")
    _require(how, "method", "files")
    _require(how, "hash_type", "sha256")
    resources, ignored = predicate.get("resources"), how.get("ignore_paths", [])
    if not (isinstance(resources, list) and isinstance(ignored, list)):
        raise _InvalidError("is damaged: its list of files has the wrong type")
    digests: dict[str, str] = {}
    for entry in resources:
        name, digest = _read_resource(entry)
        if name in digests:
            raise _InvalidError(f"is damaged: it lists {name!r} twice")
        digests[name] = digest
    _check_subject(statement, digests)
    return digests, {name for name in ignored if isinstance(name, str)}


def _read_resource(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise _InvalidError("is damaged: an entry of its list of files has the wrong type")
    name, digest = entry.get("name"), entry.get("digest")
    if not (isinstance(name, str) and isinstance(digest, str)):
        raise _InvalidError("is damaged: an entry of its list of files has no name or digest")
    if not is_plain_name(name):
        raise _InvalidError(f"lists the file {name!r}, which is not a plain name inside the folder")
    _require(entry, "algorithm", "sha256")
    return name, digest.lower()


def _check_subject(statement: Any, digests: Mapping[str, str]) -> None:
    """Compare the digest of all digests: a list that was cut short has another."""
    subjects = statement.get("subject")
    try:
        expected = [subject["digest"]["sha256"] for subject in subjects]
        found = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()
    except (TypeError, KeyError, ValueError):
        raise _InvalidError("is damaged: its subject or a digest is not valid") from None
    if expected != [found]:
        raise _InvalidError("is damaged: its digest is not that of its list of files")


def _compare(
    index: Path,
    listed: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
    ignored: set[str],
) -> None:
    """Raise `_InvalidError` unless all files of the package are covered and unchanged."""
    folder = index.parent
    there = {name for name in BESIDE if _is_there(folder, name)}
    beside = there - set(listed) - set(left_out_of_signatures(index)) - ignored
    if uncovered := sorted(({*listed, index.name} | beside) - set(digests)):
        raise _InvalidError(f"does not cover {_shown(uncovered)}")
    changed = []
    for name, digest in digests.items():
        if name in listed:
            found: str | None = listed[name]["sha256"]
        else:
            path = file_inside(folder, name, PackageError)
            found = hash_file(path) if path else None
        if found != digest:
            changed.append(name)
    if changed:
        raise _InvalidError(
            f"was made for a different {_shown(changed)}: changed since, or removed"
        )


def _is_there(folder: Path, name: str) -> bool:
    return file_inside(folder, name, PackageError) is not None


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return f"{', '.join(names[:_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def _parse(content: bytes, what: str) -> Any:
    try:
        return parse_json(content, unique=True, max_bytes=_MAX_BYTES)
    except JSONError as error:
        raise _InvalidError(f"is damaged: {what or 'it '}{error}") from None


def _require(value: Any, key: str, expected: str) -> None:
    found = value.get(key) if isinstance(value, dict) else None
    if found != expected:
        raise _InvalidError(
            f"is not one that is supported: its {key} is {str(found)[:80]!r}, not {expected}"
        )


def _object(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise _InvalidError(f"is damaged: its {key} is missing or has the wrong type")
    return found


def _decode(value: Any) -> bytes:
    try:
        return base64.b64decode(value.encode("ascii"), validate=True)
    except (AttributeError, UnicodeEncodeError, binascii.Error):
        raise _InvalidError("is damaged: its payload or signature is not base64") from None
