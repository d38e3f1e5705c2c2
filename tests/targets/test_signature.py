"""Signatures of packages and bundles: made and checked by us and by openssl, and never taken on
trust."""

from __future__ import annotations

import base64
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.add_adapters import add_adapters
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bundles.make import new_folder
from llama_onnx.targets.bundle import open_shipped, write_bundle
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import Unlisted, hash_file
from llama_onnx.targets.package import (
    MANIFEST,
    ModelPackage,
    renew_manifest,
    write_manifest,
)
from llama_onnx.targets.signature import check_signature, read_signer, write_signature
from tests.support.keys import public_of, write_key
from tests.support.packages import make_certified

OPENSSL = shutil.which("openssl")
PASSWORD = "pässwort 日本"

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")


def no_password() -> str:
    raise AssertionError("a key without a password must not ask for one")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys: mine, other, ec and rsa (of other kinds) and locked (with a password)."""
    folder = tmp_path_factory.mktemp("keys ä 日本")
    write_key(folder, "mine")
    write_key(folder, "other")
    write_key(folder, "ec", kind="ec")
    write_key(folder, "rsa", kind="rsa")
    write_key(folder, "locked", password=PASSWORD)
    return folder


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with its certificate. Read only."""
    return make_certified(tmp_path_factory.mktemp("certified ä 日本"))


@pytest.fixture
def copy(certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(certified, tmp_path / "ä 日本" / "package"))


@pytest.fixture
def signed(copy: Path, keys: Path) -> Path:
    assert run("sign", copy, "--key", keys / "mine.pem").exit_code == 0
    return copy


@pytest.fixture
def bundle(copy: Path, keys: Path, tmp_path: Path) -> Path:
    """What every bundle is: a package, something else, and the signed list of both."""
    out = tmp_path / "bundle"
    with new_folder(out) as folder:
        shutil.copytree(copy, folder / "package")
        (folder / "program").write_bytes(b"program")
        about = {"package": {"precision": "int4"}}
        write_bundle(folder, about, read_signer(keys / "mine.pem", no_password))
    return out


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], **options)


def verify(path: Path, key: Path | None, *more: str) -> Result:
    return run("verify", path, "--files-only", *(("--key", public_of(key)) if key else ()), *more)


def flip(file: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


def test_a_signature_is_that_of_rfc_8032(tmp_path: Path) -> None:
    """Test 3 of RFC 8032, 7.1: its secret key behind PKCS8's prefix (RFC 8410), its message."""
    secret = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
    content = base64.b64encode(bytes.fromhex("302e020100300506032b657004220420" + secret))
    key = tmp_path / "key.pem"
    key.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + content + b"\n-----END PRIVATE KEY-----\n")
    assert read_signer(key, no_password)(b"\xaf\x82").hex() == (
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )


@needs_openssl
@pytest.mark.parametrize("name", ["mine", "locked"])
def test_openssl_checks_what_we_sign(copy: Path, keys: Path, name: str) -> None:
    environment = {"LLAMA_ONNX_KEY_PASSWORD": PASSWORD}
    assert run("sign", copy, "--key", keys / f"{name}.pem", env=environment).exit_code == 0
    # The command in docs/signing.md.
    command = f"openssl pkeyutl -verify -pubin -inkey {name}.pub.pem -rawin -in".split()
    files = [str(copy / MANIFEST), "-sigfile", str(copy / f"{MANIFEST}.sig")]
    done = subprocess.run([*command, *files], cwd=keys, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Signature Verified Successfully\n")
    flip(copy / MANIFEST, 40)
    assert subprocess.run([*command, *files], cwd=keys, capture_output=True).returncode == 1


@needs_openssl
def test_we_check_what_openssl_signs_with_keys_that_it_made(copy: Path, tmp_path: Path) -> None:
    for command in (
        "openssl genpkey -algorithm ed25519 -out k.pem",
        "openssl pkey -in k.pem -pubout -out k.pub.pem",
    ):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    # Our own signature first: it records the folder's name in the manifest.
    assert run("sign", copy, "--key", tmp_path / "k.pem").exit_code == 0
    ours = (copy / f"{MANIFEST}.sig").read_bytes()
    sign = ["openssl", "pkeyutl", "-sign", "-inkey", str(tmp_path / "k.pem"), "-rawin"]
    files = ["-in", str(copy / MANIFEST), "-out", str(copy / f"{MANIFEST}.sig")]
    subprocess.run([*sign, *files], check=True)
    done = verify(copy, tmp_path / "k.pem")
    assert done.exit_code == 0, done.output
    # And the other way round: ours is the same 64 bytes, since ed25519 has no choice.
    assert (copy / f"{MANIFEST}.sig").read_bytes() == ours


def test_a_signed_package_verifies_and_runs(signed: Path, keys: Path) -> None:
    done = run("verify", signed, "--key", public_of(keys / "mine.pem"))
    assert done.exit_code == 0, done.output
    assert "manifest.json.sig was made with the key" in done.stdout
    assert "ran on     CPUExecutionProvider" in done.stdout
    assert "the package computes the certified results on this machine." in done.stdout


def test_a_signature_that_nobody_asked_about_is_named(signed: Path) -> None:
    done = verify(signed, None)
    assert done.exit_code == 0
    assert "manifest.json.sig is not checked: pass --key PUBLIC.pem to check it" in done.stdout
    said = json.loads(verify(signed, None, "--json").stdout)
    assert said["signature"] == {
        "file": "manifest.json.sig",
        "there": True,
        "checked": False,
        "problem": None,
        "model": None,
        "others": [],
        "passed": True,
    }


def test_without_a_signature_nothing_is_said_of_one_unless_asked(copy: Path, keys: Path) -> None:
    done = verify(copy, None)
    assert done.exit_code == 0
    assert "signature  " not in done.stdout
    done = verify(copy, keys / "mine.pem")
    assert done.exit_code == 1
    assert "failed: it is not signed: there is no manifest.json.sig." in done.stdout


def test_another_key_is_not_good_enough(signed: Path, keys: Path) -> None:
    for more in ((), ("--json",)):
        done = verify(signed, keys / "other.pem", *more)
        assert done.exit_code == 1
        assert "manifest.json.sig is not a signature of manifest.json by" in done.stdout
        assert "another key signed it" in done.stdout


def test_an_altered_manifest_is_found(signed: Path, keys: Path) -> None:
    file = signed / MANIFEST
    manifest = json.loads(file.read_text("utf-8"))
    manifest["precision"] = "fp32"
    file.write_text(json.dumps(manifest), "utf-8")
    done = verify(signed, keys / "mine.pem")
    assert done.exit_code == 1
    assert "the file was changed after it was signed" in done.stdout


def test_a_forged_file_with_its_hash_in_the_manifest_is_found(signed: Path, keys: Path) -> None:
    name = "tokenizer_config.json"
    (signed / name).write_text("{}", "utf-8")
    file = signed / MANIFEST
    manifest = json.loads(file.read_text("utf-8"))
    manifest["files"][name] = {"size": 2, "sha256": hash_file(signed / name)}
    file.write_text(json.dumps(manifest), "utf-8")
    assert verify(signed, None).exit_code == 0, "all hashes agree: only the signature can tell"
    assert verify(signed, keys / "mine.pem").exit_code == 1


def test_an_altered_file_is_found_despite_a_good_signature(signed: Path, keys: Path) -> None:
    flip(signed / "tokenizer.json", 0)
    done = verify(signed, keys / "mine.pem")
    assert done.exit_code == 1
    assert "failed: tokenizer.json changed since the package was made." in done.stdout


def test_a_signature_says_which_model_was_signed(signed: Path, keys: Path) -> None:
    """A valid signature of one model must not pass for that of another."""
    done = verify(signed, keys / "mine.pem")
    assert "with the key, for package (int4, cpu), made from checkpoint" in done.stdout
    told = json.loads(verify(signed, keys / "mine.pem", "--json").stdout)["signature"]["model"]
    assert (told["name"], told["source"]) == ("package", "checkpoint")
    other = signed.rename(signed.with_name("other"))
    assert verify(other, keys / "mine.pem", "--name", "package").exit_code == 0
    assert verify(other, keys / "mine.pem", "--name", "checkpoint").exit_code == 0
    done = verify(other, keys / "mine.pem", "--name", "other")
    assert done.exit_code == 1
    assert "is a signature of package (int4, cpu), made from checkpoint, not of other" in (
        done.stdout
    )
    assert verify(other, None, "--name", "other").exit_code == 2


def test_signing_writes_nothing_outside_of_the_package(
    copy: Path, keys: Path, tmp_path: Path
) -> None:
    """A stranger's package may have links where `sign` writes its files first."""
    mine = tmp_path / "mine"
    for name in ("manifest.json.tmp", "manifest.json.sig.tmp", "manifest.json.sig"):
        mine.write_text("my file", "utf-8")
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(mine)
        run("sign", copy, "--key", keys / "mine.pem")
        assert mine.read_text("utf-8") == "my file"


def test_a_package_with_links_is_not_added_to(copy: Path, certified: Path, tmp_path: Path) -> None:
    """What is written to `adapters/` would land where that link leads."""
    (copy / "adapters").symlink_to(tmp_path)
    source = open_checkpoint(certified.with_name("checkpoint"))
    with pytest.raises(UsageError, match="adapters is not part of the package: remove it"):
        add_adapters(copy, source, {"x": tmp_path / "not looked at"})


def test_a_signature_that_is_a_link_is_not_bundled(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret", "utf-8")
    (copy / f"{MANIFEST}.sig").symlink_to(secret)
    for place in ("hub", "sagemaker"):
        command = ("bundle", copy, tmp_path / place, "--for", place, "--i-have-the-licence")
        done = run(*command)
        assert done.exit_code == 1
        assert "is a link that leads out of its folder" in done.stderr
        assert not (tmp_path / place).exists()


def test_a_signature_without_a_name_is_still_valid(signed: Path, keys: Path) -> None:
    """Packages that were signed before names were recorded have none."""
    content = json.loads((signed / MANIFEST).read_text("utf-8"))
    del content["name"]
    (signed / MANIFEST).write_text(json.dumps(content), "utf-8")
    write_signature(signed / MANIFEST, read_signer(keys / "mine.pem", no_password))
    done = verify(signed, keys / "mine.pem")
    assert done.exit_code == 0
    assert "for a package without a name (int4, cpu), made from checkpoint" in done.stdout


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 65, b"\0" * 64])
def test_an_invalid_signature(signed: Path, keys: Path, content: bytes) -> None:
    (signed / f"{MANIFEST}.sig").write_bytes(content)
    assert verify(signed, keys / "mine.pem").exit_code == 1


def test_a_file_that_nobody_signed_is_found(signed: Path, keys: Path) -> None:
    for harmless in ("SHA256SUMS", "selftest.txt", "README.md", "model.sig", "sbom.cdx.json"):
        (signed / harmless).touch()
    assert verify(signed, keys / "mine.pem").exit_code == 0
    (signed / "parity" / "added_tokens.json").write_text("{}", "utf-8")
    for key in (keys / "mine.pem", None):
        done = verify(signed, key)
        assert done.exit_code == 1
        assert "failed: parity/added_tokens.json: not listed, so no hash covers it" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mine.pem",
            r"is not a public key in PEM format: make one with `openssl pkey",
        ),
        ("rsa.pub.pem", "is neither an ed25519 key nor a P-256 key"),
        ("nothing.pem", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
    ],
)
def test_an_invalid_public_key_is_a_wrong_call(
    signed: Path, keys: Path, name: str, message: str
) -> None:
    done = run("verify", signed, "--key", keys / name)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mine.pub.pem",
            "is not a private key in PEM format: make one with `openssl genpkey",
        ),
        ("ec.pem", "-out KEY.pem`, or pass --format oms."),
        ("nothing.pem", "cannot be read: No such file or directory"),
        ("locked.pem", "cannot be read with this password"),
    ],
)
def test_an_invalid_private_key_is_a_wrong_call(
    copy: Path, keys: Path, name: str, message: str
) -> None:
    done = run("sign", copy, "--key", keys / name, env={"LLAMA_ONNX_KEY_PASSWORD": "wrong"})
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (copy / f"{MANIFEST}.sig").exists()


def test_a_password_is_not_asked_for_where_nobody_can_answer(copy: Path, keys: Path) -> None:
    done = run("sign", copy, "--key", keys / "locked.pem")
    assert done.exit_code == 2
    assert "is protected by a password: set LLAMA_ONNX_KEY_PASSWORD" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals here")
def test_a_password_is_asked_for_on_a_terminal(copy: Path, keys: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "sign", str(copy), "--key"]
    with subprocess.Popen(
        [*command, str(keys / "locked.pem")],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stderr
        asked = process.stderr.read(len("Password of "))
        os.write(ours, f"{PASSWORD}\n".encode())
        said, _ = process.communicate()
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, asked
    assert said.decode().strip().endswith("manifest.json.sig: signed")
    assert verify(copy, keys / "locked.pem").exit_code == 0


@pytest.mark.parametrize("place", ["azureml", "sagemaker", "hub"])
def test_a_bundle_for_any_place_is_signed(
    signed: Path, keys: Path, tmp_path: Path, place: str
) -> None:
    out = tmp_path / "out"
    command = ("bundle", signed, out, "--for", place, "--i-have-the-licence")
    done = run(*command, "--sign", keys / "other.pem")
    assert done.exit_code == 0, done.output
    assert verify(out, keys / "other.pem").exit_code == 0
    assert verify(out, keys / "mine.pem").exit_code == 1
    done = run("verify", out, "--key", public_of(keys / "other.pem"))
    if place == "sagemaker":
        assert done.exit_code == 1
        assert "contains its package as an archive, which cannot run" in done.stderr
        shutil.unpack_archive(out / "model.tar.gz", tmp_path / "package")
        assert verify(tmp_path / "package", keys / "mine.pem").exit_code == 0
    else:
        assert done.exit_code == 0, done.output


def test_an_export_s_journal_does_not_hinder(copy: Path, keys: Path) -> None:
    """A journal remains if an export was killed at the last moment."""
    (copy / "journal.jsonl").touch()
    assert run("sign", copy, "--key", keys / "mine.pem").exit_code == 0
    assert verify(copy, keys / "mine.pem").exit_code == 0


def test_a_damaged_package_is_not_signed(copy: Path, keys: Path) -> None:
    (copy / "stray.bin").touch()
    done = run("sign", copy, "--key", keys / "mine.pem")
    assert done.exit_code == 1
    assert "contains stray.bin, which manifest.json does not list" in done.stderr
    (copy / "stray.bin").unlink()
    flip(copy / "tokenizer.json", 0)
    done = run("sign", copy, "--key", keys / "mine.pem")
    assert done.exit_code == 1
    assert "is damaged: tokenizer.json is missing or was changed" in done.stderr
    assert not (copy / f"{MANIFEST}.sig").exists()


def test_a_package_signed_again_has_the_new_signature(signed: Path, keys: Path) -> None:
    done = run("sign", signed, "--key", keys / "other.pem", "--json")
    assert json.loads(done.stdout) == {"signature": str(signed / f"{MANIFEST}.sig")}
    assert verify(signed, keys / "other.pem").exit_code == 0
    assert verify(signed, keys / "mine.pem").exit_code == 1


def test_a_signed_package_is_not_changed(signed: Path, certified: Path) -> None:
    before = (signed / MANIFEST).read_bytes()
    with pytest.raises(UsageError, match=r"is signed.*delete manifest\.json\.sig"):
        renew_manifest(ModelPackage.open(signed))
    source = certified.with_name("checkpoint")
    done = run("validate", signed, "--reference", source, "--certify")
    assert done.exit_code == 2
    assert "is signed, and a change would make the signature invalid" in done.stderr
    with pytest.raises(UsageError, match="is signed"):
        add_adapters(signed, open_checkpoint(source), {"x": source / "not looked at"})
    assert (signed / MANIFEST).read_bytes() == before


def test_a_manifest_written_anew_has_no_old_signature(signed: Path) -> None:
    content = json.loads((signed / MANIFEST).read_text("utf-8"))
    package = write_manifest(signed, content)
    assert not (signed / f"{MANIFEST}.sig").exists()
    assert f"{MANIFEST}.sig" not in package.files


def test_a_signed_bundle_verifies_and_its_package_runs(bundle: Path, keys: Path) -> None:
    done = run("verify", bundle, "--key", public_of(keys / "mine.pem"))
    assert done.exit_code == 0, done.output
    assert "bundle.json.sig was made with the key" in done.stdout
    assert "ran on     CPUExecutionProvider" in done.stdout
    report = json.loads(verify(bundle, keys / "mine.pem", "--json").stdout)
    assert report["passed"] and report["signature"]["passed"]
    assert report["integrity"]["files"] == len(list(bundle.rglob("*.*"))) - 2 + 1


@pytest.mark.parametrize("name", ["program", "package/tokenizer.json", "package/manifest.json"])
def test_an_altered_bundle_is_found(bundle: Path, keys: Path, name: str) -> None:
    file = bundle / name
    if name.endswith(MANIFEST):
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        flip(file, 0)
    for key in (keys / "mine.pem", None):
        done = verify(bundle, key)
        assert done.exit_code == 1
        assert f"failed: {name} changed since the package was made." in done.stdout


def test_a_file_added_to_a_bundle_is_found(bundle: Path, keys: Path) -> None:
    (bundle / "package" / "selftest.txt").touch()
    done = verify(bundle, keys / "mine.pem")
    assert done.exit_code == 1
    assert "package/selftest.txt: not listed, so no hash covers it" in done.stdout


def test_a_bundle_signed_after_it_was_made_is_signed(bundle: Path, keys: Path) -> None:
    assert run("sign", bundle, "--key", keys / "other.pem").exit_code == 0
    assert verify(bundle, keys / "other.pem").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "it has no format_version"),
        ('{"format_version": 1, "files": {}}', "it does not describe its package"),
        ('{"format_version": 1, "files": {"../x": {}}}', "its entry for '../x' is invalid"),
    ],
)
def test_a_damaged_bundle_json_is_one_sentence(bundle: Path, content: str, message: str) -> None:
    (bundle / "bundle.json").write_text(content, "utf-8")
    done = verify(bundle, None)
    assert done.exit_code == 1
    assert f"bundle.json is damaged: {message}" in done.stderr


def test_only_files_are_checked_without_a_certificate_or_a_provider(
    package: Path, tmp_path: Path
) -> None:
    done = verify(package, None)
    assert done.exit_code == 0
    assert "passed: all files are intact." in done.stdout
    done = verify(package, None, "--provider", "cpu")
    assert done.exit_code == 2
    assert "--files-only runs nothing" in done.stderr


def test_without_cryptography_the_error_says_how_to_install_it(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for arguments in (
        ("sign", signed, "--key", keys / "mine.pem"),
        ("verify", signed, "--key", public_of(keys / "mine.pem")),
    ):
        done = run(*arguments)
        assert done.exit_code == 1
        assert 'pip install ".[sign]"' in done.stderr
    assert verify(signed, None).exit_code == 0


def test_a_signature_appears_whole_or_not_at_all(
    copy: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = read_signer(keys / "mine.pem", no_password)

    def fail(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(Path, "replace", fail)
        write_signature(copy / MANIFEST, sign)
    assert not check_signature(copy / MANIFEST, {}, None).there
    assert open_shipped(copy).unlisted().tolerated == ("manifest.json.sig.tmp",)
    assert write_signature(copy / MANIFEST, sign).stat().st_size == 64
    assert open_shipped(copy).unlisted() == Unlisted((), ())


def test_files_are_checked_without_onnxruntime(copy: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; "
        "from llama_onnx.exporter.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "verify", str(copy)]
    done = subprocess.run([*command, "--files-only", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True and "onnxruntime" not in report["versions"]
    replay = subprocess.run(command, capture_output=True, text=True)
    assert replay.returncode == 1 and "needs onnxruntime" in replay.stderr
