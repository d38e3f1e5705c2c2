"""OpenSSF model signing: its own tool checks what we sign, we check what it signs, and a model.sig
from a stranger is never believed before its signature is valid."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from llama_onnx.exporter.cli import main
from llama_onnx.targets.bundle import write_bundle
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import MANIFEST, ModelPackage, renew_manifest
from tests.support.keys import public_of, write_key

pytest.importorskip("model_signing", reason="the extra `oms` is not installed")

OMS, OURS = "model.sig", f"{MANIFEST}.sig"
PASSWORD = "pässwort 日本"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys: ed, p256, other (P-256 too), p384, k1 (a curve that OMS does not take)."""
    folder = tmp_path_factory.mktemp("keys ä 日本")
    write_key(folder, "ed")
    write_key(folder, "p256", kind="ec")
    write_key(folder, "other", kind="ec")
    write_key(folder, "p384", kind="p384")
    write_key(folder, "k1", kind="k1")
    write_key(folder, "locked", kind="ec", password=PASSWORD)
    return folder


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "ä 日本" / "package"))


@pytest.fixture
def signed(copy: Path, keys: Path) -> Path:
    sign(copy, keys / "p256.pem")
    return copy


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], **options)


def sign(path: Path, key: Path, kind: str = "oms") -> None:
    done = run("sign", path, "--key", key, "--format", kind)
    assert done.exit_code == 0, done.output


def verify(path: Path, key: Path, *more: str) -> Result:
    return run("verify", path, "--files-only", "--key", public_of(key), *more)


def official(command: str, path: Path, key: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run OpenSSF's own command line."""
    which = ("--private_key", key) if command == "sign" else ("--public_key", public_of(key))
    call = ["-m", "model_signing", command, "key", path, *which, "--signature", path / OMS, *more]
    if command == "sign":
        call += [item for name in (OMS, OURS) for item in ("--ignore-paths", path / name)]
    return subprocess.run(
        [sys.executable, *map(str, call)],
        capture_output=True,
        text=True,
        env={**os.environ, "OTEL_SDK_DISABLED": "true"},
    )


def resign(file: Path, key: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the signed statement in `file`, and sign it with `key`."""
    bundle = json.loads(file.read_text("utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    write_signed(file, bundle, json.dumps(statement).encode(), key)


def write_signed(file: Path, bundle: dict[str, Any], payload: bytes, key: Path) -> None:
    kind = b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
    envelope = bundle["dsseEnvelope"]
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    file.write_text(json.dumps(bundle), "utf-8")


def total(statement: dict[str, Any]) -> str:
    digests = (bytes.fromhex(entry["digest"]) for entry in statement["predicate"]["resources"])
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("key", ["p256.pem", "p384.pem"])
def test_openssf_s_own_tool_checks_what_we_sign_and_finds_a_change(
    copy: Path, keys: Path, key: str
) -> None:
    sign(copy, keys / key)
    done = official("verify", copy, keys / key)
    assert done.returncode == 0, done.stderr
    assert verify(copy, keys / key).exit_code == 0
    (copy / "tokenizer.json").write_text("{}", "utf-8")
    assert official("verify", copy, keys / key).returncode != 0


def test_we_check_what_openssf_s_own_tool_signs(copy: Path, keys: Path) -> None:
    done = official("sign", copy, keys / "p256.pem")
    assert done.returncode == 0, done.stderr
    said = verify(copy, keys / "p256.pem")
    assert said.exit_code == 0, said.output
    assert "signature  model.sig was made with the key, for " in said.stdout
    said = verify(copy, keys / "other.pem")
    assert said.exit_code == 1
    assert "model.sig is not a signature by" in said.stdout
    assert "it was changed, or another key signed it." in said.stdout


@pytest.mark.parametrize("order", ["ed oms", "oms ed", "ed oms ed", "oms ed oms"])
def test_both_signatures_hold_in_any_order(copy: Path, keys: Path, order: str) -> None:
    for kind in order.split():
        if kind == "oms":
            sign(copy, keys / "p256.pem")
        else:
            sign(copy, keys / "ed.pem", "ed25519")
    for key, file, other in (("ed.pem", OURS, OMS), ("p256.pem", OMS, OURS)):
        done = verify(copy, keys / key)
        assert done.exit_code == 0, done.output
        assert f"signature  {file} was made with the key, for package (int4, cpu)" in done.stdout
        assert f"; {other} needs its own key" in done.stdout
    assert official("verify", copy, keys / "p256.pem").returncode == 0


def test_our_signature_may_follow_that_of_openssf_s_own_tool(copy: Path, keys: Path) -> None:
    """The manifest has no name yet, and must not get one: model.sig covers it."""
    assert official("sign", copy, keys / "p256.pem").returncode == 0
    before = (copy / MANIFEST).read_bytes()
    sign(copy, keys / "ed.pem", "ed25519")
    assert (copy / MANIFEST).read_bytes() == before
    assert official("verify", copy, keys / "p256.pem").returncode == 0
    assert [verify(copy, keys / key).exit_code for key in ("ed.pem", "p256.pem")] == [0, 0]


def test_a_second_signature_under_another_name_is_refused(signed: Path, keys: Path) -> None:
    """It would change the manifest, which the first one covers."""
    other = signed.rename(signed.with_name("other"))
    before = (other / MANIFEST).read_bytes()
    done = run("sign", other, "--key", keys / "ed.pem")
    assert done.exit_code == 2
    assert "was signed as package: give the folder that name again, or delete model.sig" in (
        done.stderr
    )
    assert (other / MANIFEST).read_bytes() == before
    sign(other, keys / "p256.pem")  # alone, it takes the new name
    assert "for other (" in verify(other, keys / "p256.pem").stdout


def test_a_signature_that_nobody_asked_about_is_named(signed: Path, keys: Path) -> None:
    done = run("verify", signed, "--files-only")
    assert "model.sig is not checked: pass --key PUBLIC.pem" in done.stdout
    sign(signed, keys / "ed.pem", "ed25519")
    done = run("verify", signed, "--files-only")
    assert "manifest.json.sig and model.sig are not checked: pass --key" in done.stdout


def test_the_key_says_which_signature_is_meant(signed: Path, keys: Path) -> None:
    done = verify(signed, keys / "ed.pem")
    assert done.exit_code == 1
    assert (
        "failed: it is not signed: there is no manifest.json.sig, only model.sig, which a P-256 "
        "key checks."
    ) in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ed.pem", "is not a P-256 key, which OMS needs: make one with `openssl genpkey"),
        ("k1.pem", "is not a P-256 key, which OMS needs"),
        ("p256.pub.pem", "in PEM format: make one with `openssl genpkey -algorithm EC "),
        ("locked.pem", "cannot be read with this password"),
    ],
)
def test_a_key_of_another_kind_is_a_wrong_call(
    copy: Path, keys: Path, name: str, message: str
) -> None:
    wrong = {"LLAMA_ONNX_KEY_PASSWORD": "wrong"}
    done = run("sign", copy, "--key", keys / name, "--format", "oms", env=wrong)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert not (copy / OMS).exists()


def test_a_protected_key_signs(copy: Path, keys: Path) -> None:
    right = {"LLAMA_ONNX_KEY_PASSWORD": PASSWORD}
    done = run("sign", copy, "--key", keys / "locked.pem", "--format", "oms", "--json", env=right)
    assert json.loads(done.stdout) == {"signature": str(copy / OMS)}
    assert verify(copy, keys / "locked.pem").exit_code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx.data"])
def test_a_file_changed_after_signing_is_found(signed: Path, keys: Path, name: str) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    done = verify(signed, keys / "p256.pem")
    assert done.exit_code == 1
    assert f"failed: {name} changed since the package was made." in done.stdout


def test_a_manifest_changed_together_with_its_files_is_found(signed: Path, keys: Path) -> None:
    (signed / "tokenizer_config.json").write_text("{}", "utf-8")
    manifest = json.loads((signed / MANIFEST).read_text("utf-8"))
    digest = hashlib.sha256(b"{}").hexdigest()
    manifest["files"]["tokenizer_config.json"] = {"size": 2, "sha256": digest}
    (signed / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    done = verify(signed, keys / "p256.pem")
    assert done.exit_code == 1
    assert "model.sig was made for a different manifest.json, tokenizer_config.json" in done.stdout


def test_files_beside_the_package_are_covered_too(copy: Path, keys: Path) -> None:
    (copy / "README.md").write_text("by the signer", "utf-8")
    sign(copy, keys / "p256.pem")
    assert verify(copy, keys / "p256.pem").exit_code == 0
    (copy / "README.md").write_text("by another", "utf-8")
    assert "made for a different README.md" in verify(copy, keys / "p256.pem").stdout
    (copy / "README.md").unlink()
    assert "made for a different README.md" in verify(copy, keys / "p256.pem").stdout
    sign(copy, keys / "p256.pem")
    (copy / "README.md").write_text("added later", "utf-8")
    assert "model.sig does not cover README.md" in verify(copy, keys / "p256.pem").stdout


def test_a_signed_package_is_not_changed(signed: Path) -> None:
    with pytest.raises(UsageError, match=r"is signed.*delete model\.sig"):
        renew_manifest(ModelPackage.open(signed))


def test_links_are_not_signed(copy: Path, keys: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "README.md")
    (copy / "tokenizer.json").symlink_to("README.md")
    done = run("sign", copy, "--key", keys / "p256.pem", "--format", "oms")
    assert done.exit_code == 2
    assert "tokenizer.json is a link, which OMS does not sign" in done.stderr


def test_a_signature_that_is_a_link_is_neither_read_nor_written_through(
    copy: Path, keys: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine", "utf-8")
    (copy / OMS).symlink_to(mine)
    done = verify(copy, keys / "p256.pem")
    assert done.exit_code == 1
    assert "is a link that leads out of its folder" in done.stderr
    (copy / OMS).unlink()
    (copy / f"{OMS}.tmp").symlink_to(mine)
    sign(copy, keys / "p256.pem")
    assert mine.read_text("utf-8") == "mine"
    assert verify(copy, keys / "p256.pem").exit_code == 0


def test_a_bundle_is_signed_and_its_files_compared(copy: Path, keys: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(copy, bundle / "package")
    write_bundle(bundle, {"package": {"precision": "fp32"}})
    sign(bundle, keys / "p256.pem")
    assert verify(bundle, keys / "p256.pem").exit_code == 0
    assert official("verify", bundle, keys / "p256.pem").returncode == 0
    (bundle / "package" / "tokenizer.json").write_text("{}", "utf-8")
    assert verify(bundle, keys / "p256.pem").exit_code == 1


def test_without_the_extra_the_error_says_how_to_install_it(
    copy: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("model_signing", "model_signing.hashing", "model_signing.signing"):
        monkeypatch.setitem(sys.modules, module, None)
    done = run("sign", copy, "--key", keys / "p256.pem", "--format", "oms")
    assert done.exit_code == 1
    assert 'pip install ".[oms]"' in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.sig is damaged"),
        (b"[1]", "its mediaType is 'None'"),
        (b"\xff\xfe", "model.sig is damaged: it is not UTF-8"),
        (b"[" * 100_000, "model.sig is damaged"),
        (b'{"mediaType": "x\\u001b[2J"}', "is not one that is supported: its mediaType is"),
        (b'{"a": 1, "a": 2}', "model.sig is damaged"),
        (b" " * (17 << 20), "more than 16,777,216 bytes"),
    ],
)
def test_a_file_that_is_no_signature_is_one_sentence(
    signed: Path, keys: Path, content: bytes, message: str
) -> None:
    (signed / OMS).write_bytes(content)
    done = verify(signed, keys / "p256.pem")
    assert done.exit_code == 1
    assert message in done.output
    assert "\x1b[2J" not in done.output and "Traceback" not in done.output


def _envelope(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda bundle: bundle["dsseEnvelope"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_envelope(payload="e30="), "is not a signature by"),
        (_envelope(payload=17), "is not base64"),
        (_envelope(payload="ä"), "is not base64"),
        (_envelope(payloadType="text/plain"), "its payloadType is 'text/plain'"),
        (_envelope(signatures=[]), "it must have one signature"),
        (_envelope(signatures=[7]), "its signature has the wrong type"),
        (_envelope(signatures=[{"sig": "AAAA"}]), "is not a signature by"),
        (lambda bundle: bundle.update(dsseEnvelope=None), "its dsseEnvelope is missing"),
        (
            lambda bundle: bundle.update(verificationMaterial={"certificate": {}}),
            "was made with a certificate, not with a key",
        ),
    ],
)
def test_an_envelope_that_was_changed_is_one_sentence(
    signed: Path, keys: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    bundle = json.loads((signed / OMS).read_text("utf-8"))
    change(bundle)
    (signed / OMS).write_text(json.dumps(bundle), "utf-8")
    done = verify(signed, keys / "p256.pem")
    assert done.exit_code == 1
    assert message in done.stdout


def _cut(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"].pop()


def _cut_well(statement: dict[str, Any]) -> None:
    resources = statement["predicate"]["resources"]
    resources[:] = [entry for entry in resources if entry["name"] != "tokenizer.json"]
    statement["subject"][0]["digest"]["sha256"] = total(statement)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"][0].update(changes)

    return change


def _ignore(name: str) -> Callable[[dict[str, Any]], None]:
    """The signer says that a listed file does not count."""

    def change(statement: dict[str, Any]) -> None:
        _cut_well(statement)
        statement["predicate"]["serialization"]["ignore_paths"] = [name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "its digest is not that of its list of files"),
        (_cut_well, "does not cover tokenizer.json"),
        (_ignore("tokenizer.json"), "does not cover tokenizer.json"),
        (_entry(name="../x"), "which is not a plain name inside the folder"),
        (_entry(name="model.onnx"), "it lists 'model.onnx' twice"),
        (_entry(name=3), "has no name or digest"),
        (_entry(digest="zz"), "its subject or a digest is not valid"),
        (_entry(algorithm="blake3"), "its algorithm is 'blake3', not sha256"),
        (lambda s: s.update(predicateType="https://slsa.dev"), "its predicateType is 'https"),
        (lambda s: s.update(subject=None), "its subject or a digest is not valid"),
        (lambda s: s.update(subject=[]), "its digest is not that of its list"),
        (lambda s: s["predicate"].update(resources={}), "its list of files has the wrong type"),
        (lambda s: s["predicate"].update(resources=[1]), "an entry of its list of files has"),
        (
            lambda s: s["predicate"]["serialization"].update(method="shards"),
            "its method is 'shards', not files",
        ),
    ],
)
def test_a_statement_that_the_signer_made_wrong_is_one_sentence(
    signed: Path, keys: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    resign(signed / OMS, keys / "p256.pem", change)
    done = verify(signed, keys / "p256.pem")
    assert done.exit_code == 1
    assert message in done.stdout


def test_a_payload_that_is_no_statement_is_one_sentence(signed: Path, keys: Path) -> None:
    bundle = json.loads((signed / OMS).read_text("utf-8"))
    for payload in (b"", b"7", b"[]", b"{}", b"\xff", b"[" * 10_000):
        write_signed(signed / OMS, bundle, payload, keys / "p256.pem")
        done = verify(signed, keys / "p256.pem")
        assert done.exit_code == 1
        assert "failed: model.sig is " in done.stdout
