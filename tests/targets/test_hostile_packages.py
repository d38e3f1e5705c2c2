"""A stranger's package is data: whatever is in it, it is refused with a sentence, and nothing runs.

`tests.support.hostile_packages` makes the packages. What the libraries would do with them is not
asked: no library may see them.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.runtime.tokenizer import encoder
from llama_onnx.targets.errors import LlamaOnnxError, PackageError
from llama_onnx.targets.listing import Unlisted
from llama_onnx.targets.package import ModelPackage
from tests.support.hostile_packages import (
    CERTIFICATE,
    KINDS,
    SOUND,
    Change,
    agree,
    read,
    write,
)
from tests.support.packages import renew_hashes

SECONDS = 20
"""Far more than the sound package takes on a slow machine, which is half a second."""

CASES = [
    pytest.param(kind, change, id=f"{kind}: {name}".encode("unicode_escape").decode())
    for kind, changes in KINDS.items()
    for name, change in changes.items()
]

SEEN_WHEN_OPENED = {"settings of genai", "settings of the tokenizer", "graph"}
"""Kinds that a library would act on: no command opens such a package, `verify` or not."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOUND, tmp_path / "package"))


def refusal(package: Path) -> str:
    """Return why `verify` refuses a package."""
    try:
        report = verify(package)
    except LlamaOnnxError as error:
        return str(error)
    assert not report.passed, "it passed"
    return "verified"


def test_the_sound_one_passes(hostile: Path) -> None:
    assert verify(hostile).passed


@pytest.mark.parametrize(
    "options", [{}, {"device_id": "0", "enable_graph_capture": "0"}, {"enable_graph_capture": "1"}]
)
def test_the_options_of_directml_are_known(hostile: Path, options: dict[str, str]) -> None:
    """Those of version 0.1, today's, and graph capture turned on."""
    settings = read(hostile, "genai_config.json")
    session = settings["model"]["decoder"]["session_options"]
    session["provider_options"] = [{"dml": options}]
    write(hostile, "genai_config.json", settings)
    renew_hashes(hostile)
    assert ModelPackage.open(hostile).verify() == []


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_it_is_refused(hostile: Path, kind: str, change: Change) -> None:
    change(hostile)
    outside = sorted(hostile.parent.rglob("*")) if kind != "unlisted files" else []
    started = time.perf_counter()
    said = refusal(hostile)
    assert time.perf_counter() - started < SECONDS
    assert "\n" not in said and "Traceback" not in said
    if kind in SEEN_WHEN_OPENED:
        with pytest.raises(PackageError):
            ModelPackage.open(hostile)
        with pytest.raises(PackageError):
            Llama.load(hostile)
    if outside:
        assert sorted(hostile.parent.rglob("*")) == outside, "something was written"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (
            "settings of genai",
            "custom_ops_library='/tmp/evil.so'",
            "genai_config.json sets 'model.decoder.session_options.custom_ops_library', which no "
            "export writes",
        ),
        (
            "settings of genai",
            "filename='/etc/passwd'",
            "genai_config.json sets 'model.decoder.filename' to '/etc/passwd', which no export",
        ),
        ("graph", "a loop without end", "model.onnx has the operator 'Loop', which no export"),
        (
            "graph",
            "weights in /etc/passwd",
            "from '/etc/passwd': not model.onnx.data",
        ),
        ("manifest and listed files", "a graph that is a FIFO", "is not a regular file: remove it"),
        ("manifest and listed files", "without model.onnx", "it does not name model.onnx"),
    ],
)
def test_the_sentence_names_what_is_wrong(hostile: Path, kind: str, name: str, said: str) -> None:
    KINDS[kind][name](hostile)
    for arguments in (("verify",), ("generate",), ("bench",)):
        extra = ("hi",) if arguments == ("generate",) else ()
        done = CliRunner().invoke(main, [*arguments, str(hostile), *extra])
        assert done.exit_code == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["model.sig", "sbom.cdx.json", "sbom.spdx.json", "SHA256SUMS"])
def test_what_may_be_beside_a_package(hostile: Path, name: str) -> None:
    (hostile / name).write_text("{}")
    assert verify(hostile).passed
    assert ModelPackage.open(hostile).unlisted() == Unlisted((), ())


@pytest.mark.skipif(sys.platform == "win32", reason="no such names")
def test_a_name_adds_no_line_to_the_output(hostile: Path) -> None:
    (hostile / "x\npassed: all files are intact.").touch()
    done = CliRunner().invoke(main, ["verify", str(hostile), "--files-only"])
    assert done.exit_code == 1
    assert not [line for line in done.output.splitlines() if line.startswith("passed")]
    assert r"x\npassed: all files are intact." in done.output


def test_what_a_download_leaves_is_named_and_passes(hostile: Path) -> None:
    """`hf download --local-dir` leaves these; `.cache` with anything else in it is refused."""
    (hostile / ".gitattributes").write_text("*.data filter=lfs")
    (hostile / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (hostile / ".cache" / "huggingface" / "download" / "model.onnx.metadata").touch()
    report = verify(hostile)
    assert report.passed
    assert report.integrity.tolerated == (".cache/huggingface/", ".gitattributes")
    done = CliRunner().invoke(main, ["verify", str(hostile), "--files-only"])
    assert "beside     .cache/huggingface/, .gitattributes: not part of" in done.stdout


def test_a_tokenizer_that_takes_hours_has_a_time_limit(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern whose every attempt stays below the library's own limit. It is stopped before it
    would be done; here it takes seconds, so that the tests end too."""
    tokenizer = read(hostile, "tokenizer.json")
    pattern = {"Regex": r"(?:a{1,90}a{1,90}a{1,90}\w\b)+d"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    write(hostile, "tokenizer.json", tokenizer | {"pre_tokenizer": split})
    certificate = read(hostile, CERTIFICATE)
    certificate["passages"][0]["text"] = "a" * 180
    write(hostile, CERTIFICATE, certificate)
    agree(hostile)
    monkeypatch.setattr(encoder, "_SECONDS", 0.2)
    with pytest.raises(PackageError, match=r"tokenizer\.json took more than 0\.2 s for a"):
        verify(hostile)


def test_a_package_in_the_hub_s_cache_passes(tmp_path: Path) -> None:
    """There each file is a link to ../../blobs/HASH; a link to anywhere else is not allowed."""
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / "0123abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "card").write_text("a card")
    files = {
        path.relative_to(SOUND).as_posix(): path for path in SOUND.rglob("*") if path.is_file()
    }
    for number, (name, path) in enumerate({**files, "README.md": tmp_path / "card"}.items()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert verify(snapshot).passed
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(tmp_path / "card")
    assert verify(snapshot).integrity.unknown == ("README.md",)
