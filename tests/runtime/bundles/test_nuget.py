"""NuGet packages: their layout, that they are reproducible, and what is refused."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bundles.make import Bundled, Settings, make_bundle
from llama_onnx.runtime.bundles.nuget import RUNTIMES, NuGet, Runtime
from llama_onnx.runtime.bundles.nupkg import nuget_version
from llama_onnx.runtime.bundles.template_files import read_template
from llama_onnx.runtime.measure.verify import verify_files
from llama_onnx.targets.errors import (
    LlamaOnnxError,
    MissingDependencyError,
    PackageError,
    UsageError,
)
from llama_onnx.targets.package import MANIFEST, ModelPackage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers are shell scripts")

NUSPEC = "{http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd}"
TYPES = "{http://schemas.openxmlformats.org/package/2006/content-types}"
LOADED = {
    "win-x64": {"llama_onnx.dll", "onnxruntime.dll", "onnxruntime-genai.dll"},
    "linux-x64": {"libllama_onnx.so", "libonnxruntime.so.1", "libonnxruntime-genai.so"},
}
"""What llama_onnx.c loads on each system, and itself."""


@pytest.fixture
def place(tmp_path: Path) -> NuGet:
    """A place whose wheels and compilers are small."""
    wheels, tools = tmp_path / "wheels", tmp_path / "tools"
    wheels.mkdir()
    tools.mkdir()
    compiler = write_script(tools / "cc", COMPILER)
    managed = tools / "LlamaOnnx.dll"
    managed.write_bytes(b"MZ\0LlamaOnnx.dll\0")
    managed.with_suffix(".xml").write_text("<doc/>")
    runtimes = tuple(with_wheels(runtime, wheels, str(compiler)) for runtime in RUNTIMES)
    return NuGet(wheels, managed, runtimes)


COMPILER = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def with_wheels(runtime: Runtime, folder: Path, compiler: str) -> Runtime:
    """Make small wheels for a runtime."""
    made = []
    for wheel in runtime.libraries.wheels:
        name = wheel.pattern.replace("*", "cp311-cp311")
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path in (*wheel.dlls, *wheel.licences):
                archive.writestr(path, path)
        hashes = {path: sha256(path.encode()).hexdigest() for path in wheel.dlls}
        made.append(replace(wheel, dlls=hashes))
    libraries = replace(runtime.libraries, wheels=tuple(made))
    return replace(runtime, compiler=compiler, libraries=libraries)


def bundle(package: Path, out: Path, place: NuGet, **settings: Any) -> Bundled:
    return make_bundle(ModelPackage.open(package), out, place, Settings(**settings))


def read_nupkg(out: Path) -> tuple[Path, dict[str, bytes]]:
    (file,) = out.glob("*.nupkg")
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        return file, {name: archive.read(name) for name in archive.namelist()}


def test_its_layout_is_what_nuget_reads(package: Path, place: NuGet, tmp_path: Path) -> None:
    bundle(package, tmp_path / "out", place)
    file, parts = read_nupkg(tmp_path / "out")
    about = ElementTree.fromstring(parts["LlamaOnnx.nuspec"]).find(f"{NUSPEC}metadata")
    assert about is not None
    said = {child.tag.removeprefix(NUSPEC): child.text for child in about}
    assert file.name == f"{said['id']}.{said['version']}.nupkg"
    assert said["license"] in parts
    assert said["readme"] in parts
    group = about.find(f"{NUSPEC}dependencies/{NUSPEC}group")
    assert group is not None
    assert group.attrib == {"targetFramework": ".NETStandard2.0"}
    assert {"lib/netstandard2.0/LlamaOnnx.dll", "lib/netstandard2.0/LlamaOnnx.xml"} <= set(parts)
    relationships = ElementTree.fromstring(parts["_rels/.rels"])
    assert [part.attrib["Target"] for part in relationships] == ["/LlamaOnnx.nuspec"]
    types = list(ElementTree.fromstring(parts["[Content_Types].xml"]))
    by_extension = {t.attrib["Extension"] for t in types if t.tag == f"{TYPES}Default"}
    by_name = {t.attrib["PartName"] for t in types if t.tag == f"{TYPES}Override"}
    for name in parts.keys() - {"[Content_Types].xml"}:
        last = name.rpartition("/")[2]
        typed = last.rpartition(".")[2] in by_extension if "." in last else f"/{name}" in by_name
        assert typed, name


def test_it_has_the_libraries_and_their_licenses(
    package: Path, place: NuGet, tmp_path: Path
) -> None:
    bundle(package, tmp_path / "out", place)
    _, parts = read_nupkg(tmp_path / "out")
    for runtime, libraries in LOADED.items():
        prefix = f"runtimes/{runtime}/native/"
        found = {name.removeprefix(prefix) for name in parts if name.startswith(prefix)}
        assert found == libraries | {"onnxruntime.version"}
        assert parts[prefix + "onnxruntime.version"] == b"1.32.0\n"
        for wheel in ("onnxruntime", "onnxruntime-genai"):
            licences = f"licenses/{runtime}/{wheel}/"
            assert {licences + "LICENSE", licences + "ThirdPartyNotices.txt"} <= set(parts)
    assert parts["runtimes/linux-x64/native/libllama_onnx.so"] == b"built\n"


def test_the_model_is_beside_it(package: Path, place: NuGet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bundle(package, out, place)
    _, parts = read_nupkg(out)
    assert not any(name.endswith(("model.onnx", ".data")) for name in parts)
    assert ModelPackage.open(out / "package").verify() == []
    assert verify_files(out).passed


def test_the_same_files_give_the_same_bytes(package: Path, place: NuGet, tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        bundle(package, tmp_path / name, place)
        made.append(read_nupkg(tmp_path / name)[0].read_bytes())
        for file in (*place.wheels.iterdir(), place.managed):  # type: ignore[union-attr]
            file.touch()
    assert made[0] == made[1]


def test_an_existing_folder_is_not_replaced(package: Path, place: NuGet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bundle(package, out, place)
    with pytest.raises(UsageError, match="exists already"):
        bundle(package, out, place)
    bundle(package, out, place, force=True)


def test_a_package_for_another_target_is_refused(
    package: Path, place: NuGet, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    text = (copy / MANIFEST).read_text("utf-8")
    (copy / MANIFEST).write_text(text.replace('"target": "cpu"', '"target": "directml"'), "utf-8")
    with pytest.raises(PackageError, match="is for the target directml, but the NuGet package"):
        bundle(copy, tmp_path / "out", place)


def refusals(place: NuGet) -> Sequence[tuple[NuGet, str]]:
    """Places that lack something, and what is said of it."""
    first, second = place.runtimes
    assert place.wheels and place.managed
    other = write_script(place.managed.with_name("other.dll"), "no assembly")
    failing = write_script(
        place.managed.with_name("failing"), "echo llama_onnx.c:1: no >&2; exit 1"
    )
    empty = place.wheels.with_name("empty")
    empty.mkdir()
    return (
        (replace(place, wheels=empty), r"has no onnxruntime-1\.32\.0-\*-win_amd64\.whl"),
        (replace(place, managed=other), "not an assembly that was compiled as LlamaOnnx.dll"),
        (
            replace(place, runtimes=(first, replace(second, compiler="no-such-gcc"))),
            "no-such-gcc, which builds the C library for linux-x64, is not installed",
        ),
        (
            replace(place, runtimes=(replace(first, compiler=str(failing)), second)),
            r"failing could not build .*llama_onnx\.dll: llama_onnx\.c:1: no",
        ),
        (replace(place, managed=None, dotnet="no-such-dotnet"), r"no \.NET SDK is installed"),
        (replace(place, managed=None, dotnet=str(failing)), "failing has no SDK"),
    )


def test_what_is_missing_is_named(package: Path, place: NuGet, tmp_path: Path) -> None:
    for lacking, said in refusals(place):
        with pytest.raises(LlamaOnnxError, match=said):
            bundle(package, tmp_path / "out", lacking)
        assert not list(tmp_path.glob("out*"))


def test_the_sdk_compiles_the_wrapper(package: Path, place: NuGet, tmp_path: Path) -> None:
    """A fake SDK; `nox -s windows -- --csharp` has the real one."""
    assert place.managed
    script = (
        'if [ "$1" = --list-sdks ]; then echo "3.1.102 [/sdk dir]"; exit; fi\n'
        'echo "$@" > "$0.said"\n'
        'for a; do case "$a" in -out:*) printf "compiled" > "${a#-out:}";; esac; done'
    )
    dotnet = write_script(place.managed.with_name("dotnet"), script)
    bundle(package, tmp_path / "out", replace(place, managed=None, dotnet=str(dotnet)))
    _, parts = read_nupkg(tmp_path / "out")
    assert parts["lib/netstandard2.0/LlamaOnnx.dll"] == b"compiled"
    said = dotnet.with_name("dotnet.said").read_text()
    assert said.startswith("/sdk dir/3.1.102/Roslyn/bincore/csc.dll ")
    for source in ("Model.cs", "Native.cs", "Session.cs", "Values.cs", "AssemblyInfo.cs"):
        assert f"/{source}" in said
    failing = script.replace("exit; fi", "exit; fi; echo 'Model.cs(1,1): error CS1: x'; exit 1")
    write_script(dotnet, failing)
    with pytest.raises(MissingDependencyError, match=r"could not compile .*: Model\.cs\(1,1\)"):
        bundle(package, tmp_path / "other", replace(place, managed=None, dotnet=str(dotnet)))


def test_the_command(package: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "x.dll"
    file.write_bytes(b"MZ")
    arguments = ["bundle", str(package), str(out), "--for", "nuget", "--managed", str(file)]
    done = CliRunner().invoke(main, [*arguments, "--wheels", str(tmp_path)])
    assert done.exit_code != 0
    assert not out.exists()
    assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("python", "expected"),
    [("0.1.0", "0.1.0"), ("2.1", "2.1.0"), ("1.0.0rc2", "1.0.0-rc2"), ("1.2.dev3", "1.2.0-dev3")],
)
def test_versions_are_semantic(python: str, expected: str) -> None:
    assert nuget_version(python) == expected


def test_the_ten_lines_are_those_of_the_documentation() -> None:
    """`nox -s windows -- --csharp` compiles and runs those of the README."""
    page = (Path(__file__).parents[3] / "docs" / "dotnet.md").read_text("utf-8")
    program = read_template("nuget", "README.md").template.partition("```csharp\n")[2]
    assert "```csharp\n" + program.partition("```")[0] + "```" in page
