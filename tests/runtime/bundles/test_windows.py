"""Bundles for Windows: their contents, what is refused, and that failures leave nothing."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bundles import windows
from llama_onnx.runtime.bundles.make import Bundled, Settings, make_bundle
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.wheel_libraries import CPU, DIRECTML, Libraries
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.runtime.measure.verify import verify_files
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from tests.support.keys import public_of, write_key

ROOT = Path(__file__).parents[3]


def bundle_windows(
    package: ModelPackage,
    out: Path,
    wheels: Path,
    *,
    libraries: tuple[Libraries, ...] = (CPU, DIRECTML),
    self_test: SelfTest | None = None,
    compiler: str | None = None,
    **settings: Any,
) -> Bundled:
    place = Windows(wheels, libraries, self_test, compiler)
    return make_bundle(package, out, place, Settings(**settings))


def fake_wheels(folder: Path, sets: Sequence[Libraries]) -> tuple[Path, tuple[Libraries, ...]]:
    """Make wheels with small files in the real places, and sets of DLLs that expect those."""
    folder.mkdir()
    made = []
    for part in sets:
        wheels = []
        for wheel in part.wheels:
            name = wheel.pattern.replace("*", "cp311-cp311")
            with zipfile.ZipFile(folder / name, "w") as archive:
                for path in (*wheel.dlls, *wheel.licences):
                    archive.writestr(path, f"{wheel.name} {path}")
            dlls = {
                path: sha256(f"{wheel.name} {path}".encode()).hexdigest() for path in wheel.dlls
            }
            wheels.append(replace(wheel, dlls=dlls))
        made.append(replace(part, wheels=tuple(wheels)))
    return folder, tuple(made)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, tuple[Libraries, ...]]:
    return fake_wheels(tmp_path / "wheels", (CPU, DIRECTML))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "ä 日本"


def left_over(out: Path) -> list[str]:
    return [path.name for path in out.parent.glob("*")] if out.parent.exists() else []


def without(
    package: Path, folder: Path, *patterns: str, source: str = "checkpoint"
) -> ModelPackage:
    """Copy a package without some files, and rename its source."""
    shutil.copytree(package, folder)
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["source"]["name"] = source
    return write_manifest(folder, manifest)


def test_a_bundle_holds_all_its_parts(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    made = bundle_windows(ModelPackage.open(package), out, sets[0], libraries=sets[1])
    assert made.path == out
    assert left_over(out) == [out.name]
    for name in ("onnxruntime.dll", "onnxruntime-genai.dll", "onnxruntime.version"):
        assert (out / "bin" / "cpu" / name).is_file()
        assert (out / "bin" / "directml" / name).is_file()
    assert (out / "bin" / "cpu" / "onnxruntime.version").read_text() == "1.32.0\n"
    assert (out / "bin" / "directml" / "DirectML.dll").is_file()
    for wheel in (wheel for part in (CPU, DIRECTML) for wheel in part.wheels):
        (folder,) = (out / "licenses").glob(f"*/{wheel.name}")
        assert {"LICENSE", "ThirdPartyNotices.txt"} <= {path.name for path in folder.iterdir()}
    for name in ("llama_onnx.h", "llama_onnx.c", "LICENSE", "samples/c/CMakeLists.txt"):
        assert (out / "native" / name).is_file()
    assert ModelPackage.open(out / "package").verify() == []


def test_bundle_json_names_every_file(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    bundle_windows(ModelPackage.open(package), out, sets[0], libraries=sets[1])
    described = json.loads((out / "bundle.json").read_text("utf-8"))
    paths = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    del paths["bundle.json"]
    assert described["files"] == {
        name: {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        for name, path in paths.items()
    }
    assert described["libraries"]["cpu"] == {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0"}


def test_the_package_has_its_sums_and_its_self_test(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    test = SelfTest((1, 2), (3, 4, 5))
    opened = ModelPackage.open(package)
    made = bundle_windows(opened, out, sets[0], libraries=sets[1], self_test=test, compiler=None)
    assert (out / "package" / "selftest.txt").read_bytes() == b"prompt 1 2\nexpected 3 4 5\n"
    assert SelfTest.read(out / "package" / "selftest.txt") == test
    lines = (out / "package" / "SHA256SUMS").read_text("utf-8").splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    files = [path for path in (out / "package").rglob("*") if path.name != "SHA256SUMS"]
    assert listed == {path.name: sha256(path.read_bytes()).hexdigest() for path in files}
    assert not any("self-test" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("patterns", "source", "message"),
    [
        (["LICENSE*"], "checkpoint", r"lacks the license \(LICENSE\) that"),
        (["USE_POLICY*"], "Llama-2-7b-chat-hf", r"lacks the use policy \(USE_POLICY\) that"),
        (["USE_POLICY*"], "llama2-7b.gguf", "lacks the use policy"),
        (["LICENSE*", "USE_POLICY*"], "Llama-2-7b", "lacks the license .* and the use policy"),
    ],
)
def test_a_model_without_its_license_needs_an_option(
    package: Path,
    sets: tuple[Path, tuple[Libraries, ...]],
    out: Path,
    tmp_path: Path,
    patterns: list[str],
    source: str,
    message: str,
) -> None:
    opened = without(package, tmp_path / "copy", *patterns, source=source)
    with pytest.raises(PackageError, match=message):
        bundle_windows(opened, out, sets[0], libraries=sets[1])
    assert left_over(out) == []
    bundle_windows(opened, out, sets[0], libraries=sets[1], licensed=True)
    assert out.is_dir()


def test_a_model_that_is_not_a_llama_needs_no_policy(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path, tmp_path: Path
) -> None:
    opened = without(package, tmp_path / "copy", "USE_POLICY*", source="smollm2")
    bundle_windows(opened, out, sets[0], libraries=sets[1])


def test_a_notice_identifies_a_llama(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "noticed"))
    (copy / "NOTICE").write_text("Llama 2 is licensed under the LLAMA 2 Community License")
    opened = without(copy, tmp_path / "copy", "USE_POLICY*", source="mine")
    with pytest.raises(PackageError, match="lacks the use policy"):
        bundle_windows(opened, out, sets[0], libraries=sets[1])


def test_a_damaged_package_is_refused(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(PackageError, match=r"damaged: model\.onnx\.data has changed"):
        bundle_windows(ModelPackage.open(copy), out, sets[0], libraries=sets[1])
    assert left_over(out) == []


def test_a_dll_that_was_not_tested_is_refused(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    with pytest.raises(PackageError, match=r"onnxruntime\.dll has another sha256"):
        bundle_windows(ModelPackage.open(package), out, sets[0])
    assert left_over(out) == []


def test_a_wheel_that_is_missing_or_broken(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    opened, (wheels, libraries) = ModelPackage.open(package), sets
    (genai,) = wheels.glob("onnxruntime_genai-*.whl")
    genai.write_bytes(b"no zip")
    with pytest.raises(PackageError, match=r"genai-.*\.whl is damaged or is not the"):
        bundle_windows(opened, out, wheels, libraries=libraries)
    genai.unlink()
    with pytest.raises(UsageError, match=r"has no onnxruntime_genai-0\.18\.0-\*-win_amd64\.whl"):
        bundle_windows(opened, out, wheels, libraries=libraries)
    assert left_over(out) == []


def test_only_a_bundle_is_replaced_and_only_with_force(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    opened = ModelPackage.open(package)
    out.mkdir(parents=True)
    (out / "mine").touch()
    with pytest.raises(UsageError, match="exists already"):
        bundle_windows(opened, out, sets[0], libraries=sets[1])
    with pytest.raises(UsageError, match="is not a bundle, so --force does not replace it"):
        bundle_windows(opened, out, sets[0], libraries=sets[1], force=True)
    assert (out / "mine").exists()
    (out / "bundle.json").touch()
    bundle_windows(opened, out, sets[0], libraries=sets[1], force=True)
    assert not (out / "mine").exists()
    assert left_over(out) == [out.name]


def test_the_zip_file_holds_the_folder(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    opened = ModelPackage.open(package)
    made = bundle_windows(opened, out, sets[0], libraries=sets[1], as_zip=True)
    assert made.zip == out.with_name(out.name + ".zip")
    with zipfile.ZipFile(made.zip) as archive:
        assert archive.testzip() is None
        files = {
            f"{out.name}/{p.relative_to(out).as_posix()}" for p in out.rglob("*") if p.is_file()
        }
        assert set(archive.namelist()) == files
    assert sorted(left_over(out)) == sorted([out.name, made.zip.name])


def test_warnings_name_what_is_missing(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    made = bundle_windows(ModelPackage.open(package), out, sets[0], libraries=sets[1])
    assert any("llama_onnx.dll is not built" in warning for warning in made.warnings)
    assert any("export with --target directml" in warning for warning in made.warnings)
    assert any("has no self-test" in warning for warning in made.warnings)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(windows.COMPILER) is None, reason="MinGW is not installed")
def test_the_library_is_built_where_there_is_a_compiler(
    package: Path, sets: tuple[Path, tuple[Libraries, ...]], out: Path
) -> None:
    compiler = shutil.which(windows.COMPILER)
    opened = ModelPackage.open(package)
    made = bundle_windows(opened, out, sets[0], libraries=sets[1], compiler=compiler)
    for name in ("llama_onnx.dll", "llama_onnx_chat.exe"):
        assert (out / "bin" / name).read_bytes()[:2] == b"MZ"
    assert not any("not built" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    "text", ["", "prompt 1\n", "prompt 1\nexpected\n", "prompt x\nexpected 1\n", "ä"]
)
def test_a_file_that_is_not_a_self_test(tmp_path: Path, text: str) -> None:
    file = tmp_path / "selftest.txt"
    file.write_text(text, "utf-8")
    with pytest.raises(UsageError, match="is not a self-test"):
        SelfTest.read(file)


def test_a_folder_is_not_a_self_test(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as said:
        SelfTest.read(tmp_path)
    assert str(said.value) == f"{tmp_path} cannot be read: Is a directory."


def test_a_self_test_that_nothing_would_use_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "selftest.txt"
    file.write_text("prompt 1\nexpected 2\n", "utf-8")
    with pytest.raises(UsageError, match="--self-test has no effect with --cpu-only"):
        Windows.from_options({"cpu_only": True, "self_test": file})
    place = Windows.from_options({"self_test": file})
    assert place.self_test == SelfTest((1,), (2,))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bundle", *map(str, arguments)])


def test_the_command(
    package: Path,
    sets: tuple[Path, tuple[Libraries, ...]],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windows, "CPU", sets[1][0])
    monkeypatch.setattr(windows, "COMPILER", "no-such-compiler")
    arguments = (package, out, "--for", "windows", "--wheels", sets[0], "--cpu-only", "--json")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["bundle"] == str(out)
    assert result["bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert "Warning: no-such-compiler is not installed" in done.stderr
    assert not (out / "bin" / "directml").exists()
    again = run(*arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_the_command_signs(
    package: Path,
    sets: tuple[Path, tuple[Libraries, ...]],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windows, "CPU", sets[1][0])
    monkeypatch.setattr(windows, "COMPILER", "no-such-compiler")
    model = Path(shutil.copytree(package, tmp_path / "model"))
    theirs, ours = write_key(tmp_path, "theirs"), write_key(tmp_path, "ours")
    assert CliRunner().invoke(main, ["sign", str(model), "--key", str(theirs)]).exit_code == 0
    arguments = (model, out, "--for", "windows", "--wheels", sets[0], "--cpu-only", "--zip")
    done = run(*arguments, "--sign", public_of(ours))
    assert done.exit_code == 2
    assert not out.exists()
    done = run(*arguments, "--sign", ours)
    assert done.exit_code == 0, done.output
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(out.with_name(out.name + ".zip"), unpacked)
    for path, key in ((unpacked / out.name, ours), (unpacked / out.name / "package", theirs)):
        assert verify_files(path, key=public_of(key)).signature.passed
        assert not verify_files(path, key=public_of(ours if key == theirs else theirs)).passed


def test_the_command_without_a_network(
    package: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    done = run(package, out, "--for", "windows")
    assert done.exit_code == 1
    assert "pip could not download onnxruntime==1.32.0 and onnxruntime-genai==0.18.0" in done.stderr
    assert "--wheels FOLDER" in done.stderr
    assert left_over(out) == []


def test_the_command_knows_its_places(package: Path, out: Path) -> None:
    done = run(package, out, "--for", "moon")
    assert done.exit_code == 2


def test_the_license_in_the_bundle_is_the_project_s() -> None:
    assert (windows.NATIVE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
