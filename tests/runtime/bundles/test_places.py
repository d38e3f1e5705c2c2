"""Bundles for Azure ML, SageMaker and the hub: their contents, and what is refused."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, metadata_load

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bundles import azureml, sagemaker
from llama_onnx.runtime.bundles.clouds import Machine, choose_machine, service_name
from llama_onnx.runtime.bundles.make import Bundled, Settings, make_bundle
from llama_onnx.runtime.bundles.place import Option, Place
from llama_onnx.runtime.bundles.places import PLACES, get_place
from llama_onnx.runtime.bundles.template_files import template_path
from llama_onnx.runtime.engine.engine import Limits as EngineLimits
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.app import Settings as ServerSettings
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.package import BOM, MANIFEST, ModelPackage, write_manifest
from tests.support.import_graph import Source
from tests.support.packages import alter_package, make_package

Bundle = Callable[..., Bundled]


def bundle_for(place: str, package: ModelPackage, out: Path, **settings: Any) -> Bundled:
    return make_bundle(package, out, get_place(place), Settings(**settings))


BUNDLES: dict[str, Bundle] = {
    place: partial(bundle_for, place) for place in ("azureml", "sagemaker", "hub", "foundry", "web")
}
bundle_azureml, bundle_sagemaker, bundle_hub, *_ = BUNDLES.values()
CLOUDS = ("azureml", "sagemaker")
ROOT = Path(__file__).parents[3]
every_place = pytest.mark.parametrize("bundle", BUNDLES.values(), ids=BUNDLES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "My model ä 日本"


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParityReport]:
    """A certified package, and the report that its certificate was made from. Read only."""
    folder = tmp_path_factory.mktemp("certified ä")
    package = make_package(folder, "int4")
    source = open_checkpoint(folder / "checkpoint")
    return package, prove(package, source, tokens=4, longest=16, certify=True)


def altered(
    package: Path,
    folder: Path,
    source: dict[str, Any] | None = None,
    *,
    target: str = "cpu",
    **files: str | None,
) -> ModelPackage:
    """Copy a package with other files (None: removed), source entries and target."""
    shutil.copytree(package, folder)
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.unlink() if text is None else path.write_text(text, "utf-8")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["source"] |= source or {}
    manifest["target"] = target
    return write_manifest(folder, manifest)


def files_in(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def left_over(out: Path) -> list[str]:
    return [path.name for path in out.parent.glob("*")] if out.parent.exists() else []


# ---- every place ---------------------------------------------------------------------------------


@every_place
def test_bundle_json_names_every_file(package: Path, out: Path, bundle: Bundle) -> None:
    assert bundle(ModelPackage.open(package), out).path == out
    described = json.loads((out / "bundle.json").read_text("utf-8"))
    paths = files_in(out)
    del paths["bundle.json"]
    assert described["files"] == {
        name: {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        for name, path in paths.items()
    }
    assert BUNDLES[described["for"]] is bundle
    assert described["package"]["precision"] == "int4"
    assert left_over(out) == [out.name]


@every_place
def test_a_model_without_its_license_needs_an_option(
    package: Path, out: Path, tmp_path: Path, bundle: Bundle
) -> None:
    opened = altered(package, tmp_path / "copy", {"name": "Llama-2-7b"}, USE_POLICY__md=None)
    with pytest.raises(PackageError, match=r"lacks the use policy \(USE_POLICY\) that must"):
        bundle(opened, out)
    assert left_over(out) == []
    assert bundle(opened, out, licensed=True).path == out


@every_place
def test_a_damaged_package_is_refused(
    package: Path, out: Path, tmp_path: Path, bundle: Bundle
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(PackageError, match=r"damaged: model\.onnx\.data has changed"):
        bundle(ModelPackage.open(copy), out)
    assert left_over(out) == []


@every_place
def test_only_a_bundle_is_replaced_and_only_with_force(
    package: Path, out: Path, bundle: Bundle
) -> None:
    opened = ModelPackage.open(package)
    out.mkdir(parents=True)
    (out / "mine").touch()
    with pytest.raises(UsageError, match="exists already"):
        bundle(opened, out)
    with pytest.raises(UsageError, match="is not a bundle"):
        bundle(opened, out, force=True)
    (out / "bundle.json").touch()
    bundle(opened, out, force=True)
    assert not (out / "mine").exists()


@every_place
def test_the_zip_file_holds_the_folder(package: Path, out: Path, bundle: Bundle) -> None:
    made = bundle(ModelPackage.open(package), out, as_zip=True)
    assert made.zip is not None
    with zipfile.ZipFile(made.zip) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == {f"{out.name}/{name}" for name in files_in(out)}


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bundle", *map(str, arguments)])


@pytest.mark.parametrize("place", BUNDLES)
def test_the_command(package: Path, out: Path, place: str) -> None:
    done = run(package, out, "--for", place, "--json", "--zip")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "bundle": str(out),
        "bytes": sum(path.stat().st_size for path in files_in(out).values()),
        "zip": str(out) + ".zip",
    }
    again = run(package, out, "--for", place)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("place", BUNDLES)
@pytest.mark.parametrize("option", [("--cpu-only",), ("--wheels", "."), ("--self-test", ".")])
def test_options_of_windows_are_refused_elsewhere(
    package: Path, out: Path, place: str, option: tuple[str, ...]
) -> None:
    done = run(package, out, "--for", place, *option)
    assert done.exit_code == 2
    takers = "windows and nuget" if option[0] == "--wheels" else "windows"
    sentence = f"{option[0]} is not an option for the place {place}, only for {takers}: leave "
    assert sentence in done.stderr
    assert left_over(out) == []


def test_a_place_or_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="no place 'moon': choose one of windows, nuget, "):
        get_place("moon")
    with pytest.raises(UsageError, match="heat is not an option for the place hub: leave it out"):
        get_place("hub", {"heat": True})


@dataclass(frozen=True)
class Moon(Place):
    name: ClassVar[str] = "moon"
    summary: ClassVar[str] = "a place for tests"
    options: ClassVar[tuple[Option, ...]] = (Option("crater", "file", "Where."),)

    crater: str = ""

    def check(self, package: ModelPackage) -> None:
        if not self.crater:
            raise PackageError(f"{package.path} is too hot.")

    def content(self) -> dict[str, str]:
        return {"crater": self.crater}

    def fill(self, package: ModelPackage, folder: Path, name: str) -> list[str]:
        (folder / "flag").touch()
        return [f"{name} is cold."]


def test_a_new_place_is_a_class_and_a_line_in_the_registry(
    package: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLACES, "moon", Moon)
    opened = ModelPackage.open(package)
    made = make_bundle(opened, out, get_place("moon", {"crater": "Tycho"}))
    assert made.warnings == (f"{out.name} is cold.",)
    described = json.loads((out / "bundle.json").read_text("utf-8"))
    assert (described["for"], described["crater"]) == ("moon", "Tycho")
    assert list(described["files"]) == ["flag"]
    with pytest.raises(UsageError, match="not an option for the place hub, only for moon"):
        get_place("hub", {"crater": "Tycho"})
    with pytest.raises(PackageError, match="too hot"):
        make_bundle(opened, out.with_name("sun"), get_place("moon"))
    assert left_over(out) == [out.name]


# ---- clouds --------------------------------------------------------------------------------------


RUN = """
import sys
sys.path.insert(0, {container!r})
import serve
import llama_onnx
assert llama_onnx.__file__.startswith({container!r}), llama_onnx.__file__
assert not {{"rich", "torch", "onnx", "huggingface_hub"}} & set(sys.modules)
serve.main()
"""


@contextmanager
def container_of(bundle: Path, folder: Path) -> Iterator[str]:
    """Run the server in a bundle's container with the package in `folder`; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(container=str(bundle / "container"))],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "LLAMA_ONNX_MODEL": str(folder), "SAGEMAKER_BIND_TO_PORT": port},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving "), "the server did not start"
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


@pytest.mark.skipif(sys.platform == "win32", reason="the containers run Linux")
def test_a_container_answers_by_itself(
    certified: tuple[Path, ParityReport], out: Path, tmp_path: Path
) -> None:
    """As on Azure: the package is three folders below; and the requests of both clouds."""
    package, _ = certified
    opened = ModelPackage.open(package)
    bundle_azureml(opened, out)
    bundle_sagemaker(opened, out.with_name("s"))
    requests = [(path / "request.json").read_bytes() for path in (out, out.with_name("s"))]
    routes = yaml.safe_load((out / "environment.yml").read_text("utf-8"))["inference_config"]
    paths = {name.partition("_")[0]: route["path"] for name, route in routes.items()}
    assert {route["port"] for route in routes.values()} == {8080}
    mount = tmp_path / "mount" / "my-model" / "1"
    shutil.copytree(out / "package", mount / "package")
    expected = "".join(
        Llama.load(package, engine="onnxruntime").chat(
            [{"role": "user", "content": "Once upon a time"}], max_new_tokens=32
        )
    )
    with container_of(out, tmp_path / "mount") as url:
        assert ask(url + paths["liveness"]) == ask(url + paths["readiness"]) == {"status": "ok"}
        # The name that the deployment gives the model is not set here.
        named = json.dumps({**json.loads(requests[0]), "model": "package"}).encode()
        answers = [ask(url + paths["scoring"], named), ask(f"{url}/invocations", requests[1])]
        assert [reply["choices"][0]["message"]["content"] for reply in answers] == [expected] * 2
        said = ask(f"{url}/about")["distance"]["sentence"]
        assert "cannot be used" not in said and "has no certificate" not in said
        with urllib.request.urlopen(url) as page:
            assert b"<html" in page.read()


def test_both_clouds_run_the_same_container(package: Path, out: Path) -> None:
    made = [BUNDLES[place](ModelPackage.open(package), out / place) for place in CLOUDS]
    first, second = (
        {name: path.read_bytes() for name, path in files_in(bundle.path / "container").items()}
        for bundle in made
    )
    assert first == second


@pytest.fixture(scope="module")
def container(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image is built from. Read only."""
    out = tmp_path_factory.mktemp("sagemaker") / "out"
    return bundle_sagemaker(ModelPackage.open(package), out).path / "container"


def shipped(container: Path) -> set[str]:
    return set(files_in(container / "llama_onnx"))


def test_only_what_runs_there_is_shipped(container: Path) -> None:
    """A second reader of imports, which counts those for type checkers too, finds no fewer."""
    source = Source(ROOT)
    script = {f"{name}.py" for name in ("app", "invocations", "http/limits", "http/web_server")}
    waiting = {f"llama_onnx.runtime.serving.{name[:-3].replace('/', '.')}" for name in script}
    waiting |= {"llama_onnx.runtime.llama.model", "llama_onnx.targets.package"}
    found: set[str] = set()
    while waiting:
        found.add(name := waiting.pop())
        waiting |= source.edges[name] - found
    modules = {source.modules[name].relative_to(ROOT).as_posix() for name in found}
    names = shipped(container)
    python = {name for name in names if name.endswith(".py") and "__init__" not in name}
    assert python <= modules
    assert {"LICENSE", "__init__.py", *(f"runtime/serving/{name}" for name in script)} <= names
    unwanted = ("commands/", "bundles/", "kernels/", "native/", "templates/", "__pycache__")
    assert not [name for name in names if any(part in name for part in unwanted)]


def test_the_data_that_modules_read_is_shipped(container: Path) -> None:
    names = shipped(container)
    assert {"runtime/serving/page/index.html", "runtime/measure/thresholds.csv"} <= names
    page = files_in(ROOT / "runtime" / "serving" / "page")
    assert {f"runtime/serving/page/{name}" for name in page} <= names
    suffixes = {Path(name).suffix for name in names if "/page/" not in name}
    assert suffixes == {"", ".py", ".csv", ".onnx"}


def runtime_imports(module: Path) -> Iterator[str]:
    """The modules that a module imports, except in a block for type checkers."""
    tree = ast.parse(module.read_text("utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = {
        id(child)
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for child in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_what_is_shipped_imports_only_what_is_shipped(container: Path) -> None:
    modules = sorted(container.rglob("*.py"))
    assert len(modules) > 100
    for module in modules:
        for name in runtime_imports(module):
            if name.startswith("llama_onnx."):
                source = container.joinpath(*name.split("."))
                assert source.with_suffix(".py").exists() or source.is_dir(), (module, name)


def test_the_requirements_are_what_it_imports(container: Path) -> None:
    pinned = (container / "requirements.txt").read_text("utf-8").split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in pinned)
    names = {line.partition("==")[0] for line in pinned}
    needed = {
        name
        for module in container.rglob("*.py")
        for name in (found.partition(".")[0] for found in runtime_imports(module))
        if name not in sys.stdlib_module_names | {"llama_onnx"}
    }
    # Signatures are checked by those who receive a package, not by its server.
    needed -= {"cryptography", "model_signing"}
    distributions = metadata.packages_distributions()
    used = {min(distributions[name], key=len).lower().replace("_", "-") for name in needed}
    brought = {
        re.split(r"[^\w-]", line)[0].lower().replace("_", "-")
        for name in names
        for line in metadata.requires(name) or ()
    }
    assert names <= used <= names | brought


def test_a_package_without_a_template_gets_a_prompt(
    package: Path, out: Path, tmp_path: Path
) -> None:
    plain = ModelPackage.open(alter_package(package, tmp_path / "plain", chat_template=""))
    bundle_azureml(plain, out)
    environment = yaml.safe_load((out / "environment.yml").read_text("utf-8"))
    assert environment["inference_config"]["scoring_route"]["path"] == "/v1/completions"
    asked = json.loads((out / "request.json").read_text("utf-8"))
    assert asked == {"model": "my-model", "prompt": "Once upon a time", "max_tokens": 32}
    bundle_sagemaker(plain, out, force=True)
    del asked["model"]
    assert json.loads((out / "request.json").read_text("utf-8")) == asked


def test_azure_gets_one_name(package: Path, out: Path) -> None:
    bundle_azureml(ModelPackage.open(package), out)
    read = {
        name: yaml.safe_load((out / name).read_text("utf-8"))
        for name in ("endpoint.yml", "deployment.yml", "environment.yml")
    }
    deployment, environment = read["deployment.yml"], read["environment.yml"]
    name = "my-model"
    assert read["endpoint.yml"]["name"] == deployment["endpoint_name"] == name
    assert (out / deployment["model"]["path"] / MANIFEST).is_file()
    assert (out / environment["build"]["path"] / environment["build"]["dockerfile_path"]).is_file()
    assert deployment["environment"] == "file:environment.yml"
    variables = deployment["environment_variables"]
    assert variables["ORT_DISABLE_TELEMETRY"] == "1"
    assert variables["LLAMA_ONNX_NAME"] == name
    assert variables["LLAMA_ONNX_MODEL"] == deployment["model_mount_path"]
    assert json.loads((out / "request.json").read_text("utf-8"))["model"] == name
    assert f"--name {name} " in (out / "README.md").read_text("utf-8")


def test_azure_sends_as_many_requests_as_the_server_takes() -> None:
    text = template_path("azureml", "deployment.yml").read_text("utf-8")
    settings = yaml.safe_load(text)["request_settings"]
    taken = EngineLimits().rows + ServerSettings().most_waiting
    assert settings["max_concurrent_requests_per_instance"] == taken


@pytest.mark.parametrize("target", ["cuda", "portable"])
def test_a_package_for_another_target_is_refused(
    package: Path, out: Path, tmp_path: Path, target: str
) -> None:
    opened = altered(package, tmp_path / "copy", target=target)
    for bundle in (bundle_azureml, bundle_sagemaker):
        with pytest.raises(PackageError, match="runs on the CPU only: export the package with"):
            bundle(opened, out)
    assert left_over(out) == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("My model ä 日本", "my-model"),
        ("日本", "llama-onnx"),
        ("7b", "llama-onnx"),
        ("2-llama_2.7B", "llama-2-7b"),
        ("x" * 31 + "-y", "x" * 31),
        ("--a--b--c--", "a-b-c"),
    ],
)
def test_names_that_clouds_accept(folder: str, name: str) -> None:
    assert service_name(folder) == name
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,30}[a-z0-9]", name)


@pytest.mark.parametrize(
    ("gibibytes", "names"),
    [
        (0.1, ("Standard_DS3_v2", "ml.m5.xlarge")),
        (5, ("Standard_DS3_v2", "ml.m5.xlarge")),
        (7, ("Standard_DS4_v2", "ml.m5.xlarge")),
        (26, ("Standard_DS5_v2", "ml.m5.4xlarge")),
        (1000, ("Standard_E32s_v3", "ml.m5.24xlarge")),
    ],
)
def test_the_machine_has_room_for_the_weights_twice(
    gibibytes: float, names: tuple[str, str]
) -> None:
    package = ModelPackage(Path(), {"files": {"model.onnx.data": {"size": gibibytes * 2**30}}})
    chosen = [choose_machine(package, place.MACHINES) for place in (azureml, sagemaker)]
    assert tuple(need.machine.name for need in chosen) == names


def test_machines_are_sorted_by_memory() -> None:
    for place in (azureml, sagemaker):
        machines: tuple[Machine, ...] = place.MACHINES
        assert list(machines) == sorted(machines, key=lambda machine: machine.memory)


def test_the_archive_unpacks_to_the_package(package: Path, out: Path, tmp_path: Path) -> None:
    bundle_sagemaker(ModelPackage.open(package), out)
    first = (out / "model.tar.gz").read_bytes()
    with tarfile.open(out / "model.tar.gz") as archive:
        archive.extractall(tmp_path / "model", filter="data")
    unpacked = {name: path.read_bytes() for name, path in files_in(tmp_path / "model").items()}
    assert unpacked == {name: path.read_bytes() for name, path in files_in(package).items()}
    bundle_sagemaker(ModelPackage.open(package), out, force=True)
    assert (out / "model.tar.gz").read_bytes() == first


def test_sagemaker_s_container_copies_what_is_there(package: Path, out: Path) -> None:
    bundle_sagemaker(ModelPackage.open(package), out)
    dockerfile = (out / "container" / "Dockerfile").read_text("utf-8")
    for source in re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE):
        assert (out / "container" / source).exists()
    deploy = (out / "deploy.py").read_text("utf-8")
    assert 'default="my-model"' in deploy and 'default="ml.m5.xlarge"' in deploy
    compile(deploy, "deploy.py", "exec")


# ---- the hub -------------------------------------------------------------------------------------


def card_of(package: ModelPackage, out: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a package's card, as huggingface_hub reads them."""
    bundle_hub(package, out, licensed=True)
    return read_card(out)


def read_card(out: Path) -> tuple[dict[str, Any], str]:
    metadata = metadata_load(out / "README.md")
    assert metadata is not None
    return metadata, str(ModelCard.load(out / "README.md").text)


def test_a_bundle_with_a_bill_of_materials_is_a_package_still(package: Path, out: Path) -> None:
    settings = Settings(bom=True, licensed=True)
    make_bundle(ModelPackage.open(package), out, get_place("hub"), settings)
    assert (out / BOM).is_file()
    assert ModelPackage.open(out).verify() == []


def test_a_card_that_is_listed_already_is_refused(package: Path, out: Path, tmp_path: Path) -> None:
    listed = altered(package, tmp_path / "copy", README__md="# another")
    with pytest.raises(PackageError, match=r"lists a README\.md of its own"):
        bundle_hub(listed, out, licensed=True)
    assert not out.exists()


def test_a_card_of_a_package_that_knows_little(package: Path, out: Path) -> None:
    made = bundle_hub(ModelPackage.open(package), out)
    metadata, text = read_card(out)
    assert metadata == {
        "license": "other",
        "license_name": "license",
        "license_link": "LICENSE.txt",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "onnxruntime-genai", "llama-onnx", "int4"],
    }
    assert "[LICENSE.txt](LICENSE.txt), [USE_POLICY.md](USE_POLICY.md)" in text
    assert "has no certificate" in text
    assert "|" not in text and "%" not in text, "a figure from nowhere"
    assert [warning.partition(":")[0].partition(",")[0] for warning in made.warnings] == [
        "The card has no base model",
        "The card has no language",
        "The card has no parity table",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("                 Apache License\n           Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date", "llama2"),
        ("my own words", "other"),
    ],
)
def test_a_license_is_recognized_by_its_text(
    package: Path, out: Path, tmp_path: Path, text: str, expected: str
) -> None:
    opened = altered(package, tmp_path / "copy", LICENSE__txt=text)
    assert card_of(opened, out)[0]["license"] == expected


def test_a_package_without_a_license_claims_none(package: Path, out: Path, tmp_path: Path) -> None:
    opened = altered(package, tmp_path / "copy", LICENSE__txt=None, USE_POLICY__md=None)
    metadata, text = card_of(opened, out)
    assert metadata["license"] == "unknown"
    assert "has no license file" in text


def test_a_model_of_the_hub_is_the_base_model(package: Path, out: Path, tmp_path: Path) -> None:
    source = {"name": "some-body/Llama-2-7b-chat", "commit": "c0ffee"}
    metadata, text = card_of(altered(package, tmp_path / "copy", source), out)
    assert metadata["base_model"] == "some-body/Llama-2-7b-chat"
    assert metadata["base_model_relation"] == "quantized"
    assert "`some-body/Llama-2-7b-chat` (commit `c0ffee`)" in text


HOSTILE = (
    "int4\nlicense: mit",
    "int4]\nbase_model: other/one",
    "&a [*a, *a]",
    "!!python/object/apply:os.system [id]",
    "int4\n---\n# Free",
    "`]($x) <script>alert(1)</script>",
    "![x](https://example.com/x.png)",
    "https://example.com",
    "\x1b]0;t\x07\u202egnp",
    "a | b\n| --- |",
    "$source ${name} %s {{ x }}",
    "`` ` ```\n```",
    "'\"\\",
)


@pytest.mark.parametrize("value", HOSTILE)
def test_values_of_a_package_stay_values(
    package: Path, out: Path, tmp_path: Path, value: str
) -> None:
    plain = card_of(altered(package, tmp_path / "plain", {"name": "a/b", "commit": "1"}), out)
    opened = altered(package, tmp_path / "copy", {"name": value, "commit": value})
    manifest = {**opened.manifest, "precision": value, "created_with": {"llama-onnx": value}}
    folder = tmp_path / "hostile"
    metadata, text = card_of(write_manifest(opened.path, manifest), folder)
    head = (folder / "README.md").read_text("utf-8").split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(head) == metadata
    assert (metadata["base_model"], metadata["tags"][-1]) == (value, value)
    assert metadata["license"] == plain[0]["license"]
    assert metadata.keys() == plain[0].keys() - {"base_model_relation"}
    # The values are in code, on one line each: no line, heading, link or tag is added.
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:] == [line for line in plain[1].splitlines() if line.startswith("#")][1:]
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)
    inert = re.sub(r"(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    assert not any(mark in inert for mark in ("<script", "example.com", "python/object"))


@pytest.mark.parametrize("place", CLOUDS)
@pytest.mark.parametrize("value", HOSTILE)
def test_values_of_a_package_stay_values_for_clouds(
    package: Path, tmp_path: Path, value: str, place: str
) -> None:
    opened = altered(package, tmp_path / "copy", {"name": value})
    opened = write_manifest(opened.path, {**opened.manifest, "precision": value})
    bundle_for(place, opened, tmp_path / "out", licensed=True)
    for file in (tmp_path / "out").glob("*.yml"):
        text = file.read_text("utf-8")
        assert yaml.safe_load(text)
        assert "base_model" not in text and "example.com" not in text
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    inert = re.sub(r"(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    assert not any(mark in inert for mark in ("<script", "example.com", "python/object"))


def test_a_card_needs_the_hub_s_library(
    package: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install ".[hub]"')):
        bundle_hub(ModelPackage.open(package), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: llama2\nlanguage:\n- en\n- 'no'", ("llama2", ["en", "no"])),
        ("language: en\nlicense: apache-2.0\nbase_model: other/one", ("apache-2.0", "en")),
        ('language: [en, de]\nlicense: "mit"', ("mit", ["en", "de"])),
        # Only plain YAML is copied: the rest may refer to lines that are left out.
        ("language: &anchor en\nlicense: !!python/object mit", ("other", None)),
        ("language: |\n  en\nlicense: >\n  mit", ("other", None)),
        ("licence", ("other", None)),
        ("language:\n- no\n- en\nlicense: mit", ("mit", ["no", "en"])),
        ("language: 2020-13-45\nlicense: mit", ("mit", "2020-13-45")),
        ('language: ["a]\nlicense: mit', ("mit", None)),
    ],
)
def test_plain_lines_of_the_source_s_card_are_copied(
    package: Path, out: Path, tmp_path: Path, head: str, expected: tuple[str, Any]
) -> None:
    card_file = f"---\n{head}\n---\n# A model\n\nlanguage: klingon\n"
    metadata, _ = card_of(altered(package, tmp_path / "copy", MODEL_CARD__md=card_file), out)
    assert (metadata["license"], metadata.get("language")) == expected
    assert "base_model" not in metadata
    assert (out / "MODEL_CARD.md").read_text("utf-8") == card_file


def test_the_table_is_the_certificate_s(certified: tuple[Path, ParityReport], out: Path) -> None:
    package, report = certified
    _, text = card_of(ModelPackage.open(package), out)
    figures = {(m.error, m.situation): m.figures for m in report.measurements}
    rows = [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if row[:1] == "|"]
    keys = (("quantization", ""), ("total", "prefill"), ("total", "decode"))
    assert len(rows) == 2 + len(keys)
    for row, key in zip(rows[2:], keys, strict=True):
        of = figures[key]
        assert float(row[1]) == pytest.approx(of.mean_kl, rel=0.05)
        assert float(row[2]) == pytest.approx(of.p99_kl, rel=0.05)
        assert float(row[3].rstrip("%")) / 100 == pytest.approx(of.same_top1, abs=6e-4)
        assert float(row[4].rstrip("%")) / 100 == pytest.approx(of.top5_overlap, abs=6e-4)
        assert float(row[5].split()[0]) == pytest.approx(of.perplexity_ratio, abs=6e-5)
    assert f"at {report.positions:,} positions" in text
    assert "all thresholds hold" in text and "NOT" not in text
    assert "llama-onnx verify FOLDER" in text


def test_a_certificate_for_other_files_is_refused(
    certified: tuple[Path, ParityReport], out: Path, tmp_path: Path
) -> None:
    stale = altered(certified[0], tmp_path / "stale", tokenizer__json="{}")
    with pytest.raises(PackageError, match=r"was made for a different tokenizer\.json"):
        bundle_hub(stale, out)
    assert left_over(out) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"validated": {}}', "ä"])
def test_an_invalid_certificate_is_refused(
    certified: tuple[Path, ParityReport], out: Path, tmp_path: Path, text: str
) -> None:
    shutil.copytree(certified[0], tmp_path / "copy")
    (tmp_path / "copy" / "parity" / "certificate.json").write_text(text, "utf-8")
    manifest = json.loads((tmp_path / "copy" / MANIFEST).read_text("utf-8"))
    damaged = write_manifest(tmp_path / "copy", manifest)
    with pytest.raises(PackageError, match=r"certificate\.json (is damaged|cannot be read)"):
        bundle_hub(damaged, out)


@pytest.mark.parametrize(
    ("key", "value"), [("files", []), ("validated", {}), ("validated", {"measurements": 1})]
)
def test_a_certificate_with_an_invalid_part_is_refused(
    certified: tuple[Path, ParityReport], out: Path, tmp_path: Path, key: str, value: Any
) -> None:
    copy = Path(shutil.copytree(certified[0], tmp_path / "copy"))
    file = copy / "parity" / "certificate.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {key: value}), "utf-8")
    damaged = write_manifest(copy, json.loads((copy / MANIFEST).read_text("utf-8")))
    with pytest.raises(PackageError, match=r"certificate\.json is damaged: ['a]") as said:
        bundle_hub(damaged, out)
    assert "Error" not in str(said.value)
    assert left_over(out) == []


def test_what_the_hub_gets_is_a_package_and_its_examples_run(
    certified: tuple[Path, ParityReport],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, text = card_of(ModelPackage.open(certified[0]), out)
    assert ModelPackage.open(out).verify() == []
    asked = []

    def snapshot_download(name: str) -> str:
        asked.append(name)
        return str(out)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if (
            "optimum" not in block
        ):  # which needs an older transformers: benchmarks/trials/clouds/hub.py
            exec(compile(block, "README.md", "exec"), {})
    assert asked == ["OWNER/my-model"] * 2
    written = "".join(Llama.load(out).generate("Once upon a time", max_new_tokens=32))
    assert capsys.readouterr().out.endswith(written)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("cpu", ["pip install onnxruntime-genai ", "Llama.load", "ORTModelForCausalLM"]),
        ("cuda", ["pip install onnxruntime-genai-cuda ", "Llama.load"]),
        ("webgpu", []),
        ("portable", ["ORTModelForCausalLM"]),
    ],
)
def test_a_card_shows_what_runs_its_target(
    package: Path, out: Path, tmp_path: Path, target: str, said: list[str]
) -> None:
    _, text = card_of(altered(package, tmp_path / "copy", target=target), out)
    signs = r"pip install onnxruntime-genai(?:-\w+)? |Llama\.load|ORTModelForCausalLM(?=\.)"
    assert re.findall(signs, text) == said


def test_git_keeps_large_files_apart(package: Path, out: Path) -> None:
    bundle_hub(ModelPackage.open(package), out)
    subprocess.run(["git", "init", "--quiet", str(out)], check=True)
    names = ["model.onnx", "model.onnx.data", "parity/reference.safetensors", "README.md"]
    done = subprocess.run(
        ["git", "check-attr", "filter", *names], cwd=out, capture_output=True, text=True, check=True
    )
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == [
        "lfs",
        "lfs",
        "lfs",
        "unspecified",
    ]
