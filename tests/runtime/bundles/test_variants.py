"""Model packages of ONNX Runtime: it opens what we write, and ours come out as they went in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from filecmp import dircmp
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.targets.package import DATA_FILE, MANIFEST
from tests.support.packages import make_package

TARGETS = ("cpu", "cuda", "webgpu")

pytestmark = pytest.mark.skipif(
    not hasattr(onnxruntime, "ModelPackage"), reason="this onnxruntime has no model packages"
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model for three targets, in int4. Read only."""
    folder = tmp_path_factory.mktemp("targets ä 日本")
    for target in TARGETS:
        (folder / target).mkdir()
    return {target: make_package(folder / target, "int4", target) for target in TARGETS}


@pytest.fixture(scope="module")
def combined(packages: dict[str, Path]) -> Path:
    """All in one model package. Read only."""
    out = packages["cpu"].parents[1] / "combined"
    assert run("model-package", "make", out, *packages.values()).exit_code == 0
    return out


@pytest.fixture
def copy(combined: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(combined, tmp_path / "copy"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def extract(path: Path, out: Path, target: str = "cpu") -> Result:
    return run("model-package", "extract", path, out, "--target", target)


def stored(path: Path) -> Path:
    (data,) = path.glob(f"shared_assets/*/{DATA_FILE}")
    return data


def logits(session: Any) -> Any:
    feed: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name == "input_ids":
            feed[entry.name] = np.array([[5, 9, 17]], np.int64)
        elif entry.name == "attention_mask":
            feed[entry.name] = np.ones((1, 3), np.int64)
        else:
            shape = [1, entry.shape[1], 0, entry.shape[3]]
            feed[entry.name] = np.zeros(shape, {"tensor(float)": np.float32}[entry.type])
    return session.run(["logits"], feed)[0]


def test_onnxruntime_chooses_the_variant_and_computes_the_same(
    combined: Path, packages: dict[str, Path]
) -> None:
    options = onnxruntime.ModelPackageOptions(onnxruntime.SessionOptions())
    context = onnxruntime.ModelPackageContext(str(combined))
    assert context.get_variant_names("decoder") == list(TARGETS)
    eps = [context.get_variant_ep_name("decoder", target) for target in TARGETS]
    assert eps == ["CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider"]
    chosen = context.select_component("decoder", options)
    assert chosen.get_selected_variant_name() == "cpu"
    alone = onnxruntime.InferenceSession(
        packages["cpu"] / "model.onnx", providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(logits(chosen.create_session()), logits(alone))


def test_the_address_of_the_weights_is_onnxruntime_s(combined: Path) -> None:
    folder = stored(combined).parent
    expected = onnxruntime.ModelPackage.compute_directory_hash(str(folder))
    assert folder.name == expected.replace(":", "-")


def test_equal_tensors_are_stored_once(combined: Path, packages: dict[str, Path]) -> None:
    """Counted with the library onnx, in the packages that went in."""
    different: set[bytes] = set()
    for package in packages.values():
        for tensor in onnx.load(package / "model.onnx").graph.initializer:
            if len(tensor.raw_data) >= 1 << 10:
                different.add(tensor.raw_data)
    content = stored(combined).read_bytes()
    # The query's matrix of one target is a part of another's packed matrix.
    within = [sum(other.count(tensor) for other in different) for tensor in different]
    assert [content.count(tensor) for tensor in different] == within
    whole = sum((package / DATA_FILE).stat().st_size for package in packages.values())
    said = json.loads(
        run(
            "model-package", "make", combined.with_name("again"), *packages.values(), "--json"
        ).stdout
    )
    assert said["weight_bytes"] == whole
    assert said["stored_bytes"] == len(content) < whole


@pytest.mark.parametrize("target", TARGETS)
def test_a_package_comes_out_as_it_went_in(
    combined: Path, packages: dict[str, Path], tmp_path: Path, target: str
) -> None:
    done = extract(combined, tmp_path / "out", target)
    assert done.exit_code == 0, done.output
    compared = dircmp(packages[target], tmp_path / "out")
    assert not (compared.left_only or compared.right_only or compared.diff_files)
    for name in compared.common_files:
        assert (packages[target] / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert run("verify", tmp_path / "out", "--files-only").exit_code == 0


@pytest.mark.parametrize("command", ["verify", "inspect", "generate"])
def test_the_other_commands_say_what_it_is_and_what_to_do(combined: Path, command: str) -> None:
    done = run(command, combined, *(["hi"] if command == "generate" else []))
    assert done.exit_code == 1
    assert "is a model package of ONNX Runtime, with variants for several targets" in done.stderr
    assert "llama-onnx model-package extract" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("cpu",), "takes two packages at least"),
        (("cpu", "cpu"), "two packages are for cpu"),
    ],
)
def test_packages_that_do_not_go_together_are_a_wrong_call(
    packages: dict[str, Path], tmp_path: Path, chosen: tuple[str, ...], message: str
) -> None:
    done = run("model-package", "make", tmp_path / "out", *(packages[name] for name in chosen))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_packages_of_different_checkpoints_are_a_wrong_call(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(packages["cuda"], tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text("utf-8"))
    manifest["source"]["name"] = "another"
    (other / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    done = run("model-package", "make", tmp_path / "out", packages["cpu"], other)
    assert done.exit_code == 2
    assert "were made from different checkpoints" in done.stderr


def _flip(path: Path) -> None:
    content = bytearray(stored(path).read_bytes())
    content[100] ^= 1  # of the first tensor, which both have or the CPU's alone
    stored(path).write_bytes(content)


def _shorten(path: Path) -> None:
    stored(path).write_bytes(stored(path).read_bytes()[:5000])


def _outside(path: Path) -> None:
    file = path / "decoder" / "component.json"
    content = json.loads(file.read_text("utf-8"))
    ort = content["variants"]["cpu"]["executor_info"]["ort"]
    ort["session_options"] = dict.fromkeys(ort["session_options"], "../../secret")
    file.write_text(json.dumps(content), "utf-8")


def _link(path: Path) -> None:
    secret = path.with_name("secret")
    stored(path).rename(secret)
    next(path.glob("shared_assets/*")).joinpath(DATA_FILE).symlink_to(secret)


def _claim(path: Path) -> None:
    file = path / "decoder/cpu/manifest.json"
    content = json.loads(file.read_text("utf-8"))
    content["files"][DATA_FILE]["size"] = 1 << 44
    file.write_text(json.dumps(content), "utf-8")


def _forget(path: Path) -> None:
    file = path / "decoder" / "component.json"
    content = json.loads(file.read_text("utf-8"))
    content["variants"]["cpu"] = {"executor_info": 3}
    file.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is damaged: model.onnx.data for cpu was changed"),
        (_shorten, "is damaged: it is too short"),
        (_outside, "which is not a plain name inside it"),
        (_link, "is a link that leads out of its folder"),
        (_claim, "its weights exceed those of the model package"),
        (_forget, "it does not say where cpu's weights are"),
        (lambda path: (path / "decoder/cpu/shared.onnx").write_bytes(b"\x08"), "shared.onnx"),
        (lambda path: (path / "decoder/cpu/manifest.json").unlink(), "it has no valid manifest"),
        (
            lambda path: shutil.copyfile(
                path / "decoder/cuda/shared.onnx", path / "decoder/cpu/shared.onnx"
            ),
            "is damaged",
        ),
    ],
)
def test_a_damaged_model_package_is_one_sentence(
    copy: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(copy)
    done = extract(copy, tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_not_in_it_is_a_wrong_call(combined: Path, tmp_path: Path) -> None:
    done = extract(combined, tmp_path / "out", "directml")
    assert done.exit_code == 2
    assert "has no package for directml: it has cpu, cuda, webgpu." in done.stderr


def test_a_package_has_nothing_to_extract(packages: dict[str, Path], tmp_path: Path) -> None:
    done = extract(packages["cpu"], tmp_path / "out")
    assert done.exit_code == 1
    assert "is a package for one target already" in done.stderr
