"""What `import llama_onnx` gives, with and without the extras."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import tomllib
from click.testing import CliRunner

import llama_onnx
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import Plan
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target

EXTRAS = (
    *("cryptography", "gguf", "huggingface_hub", "jinja2", "ml_dtypes", "onnx", "onnx_ir"),
    *("onnxruntime", "onnxruntime_genai", "onnxscript", "safetensors", "sentencepiece"),
    *("tokenizers", "torch", "transformers"),
)
"""Libraries that a bare wheel does not bring."""

CERTIFIED = Path(__file__).parents[1] / "support" / "earlier_packages" / "0.1.0-int4"


def run(code: str, *, without: tuple[str, ...] = ()) -> str:
    """What `code` prints in a process of its own, in which `without` cannot be imported."""
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    return subprocess.check_output([sys.executable, "-c", blocked + code], text=True)


def test_the_package_loads_the_standard_library_alone() -> None:
    code = "before = set(sys.modules); import llama_onnx; print(*set(sys.modules) - before)"
    loaded = {name.partition(".")[0] for name in run(code).split()}
    assert "llama_onnx" in loaded
    assert loaded <= {"llama_onnx", *sys.stdlib_module_names}


def test_all_names_are_there_without_an_extra() -> None:
    code = (
        "import llama_onnx, pydoc\n"
        "names = {name: getattr(llama_onnx, name) for name in llama_onnx.__all__}\n"
        "assert names.pop('__version__')\n"
        "print(*(pydoc.plain(pydoc.render_doc(value)) for value in names.values()))\n"
        "print(pydoc.plain(pydoc.render_doc(llama_onnx)))\n"
        "assert isinstance(llama_onnx.Llama, type)\n"
    )
    said = run(code, without=EXTRAS)
    assert "accuracy_level: 1 multiplies" in said  # of `plan`
    assert "class Llama" in said and "load(path" in said


@pytest.mark.parametrize(
    ("call", "extras"),
    [
        ("plan('tiny')", "export,cpu"),
        ("export('tiny', 'out')", "export,cpu"),
        ("validate('int4', 'tiny')", "export,cpu"),
        ("verify('certified')", "cpu"),
        ("Llama.load('int4')", "cpu"),
    ],
)
def test_a_missing_extra_is_named(call: str, extras: str, package: Path) -> None:
    call = call.replace("'int4'", repr(str(package))).replace("'certified'", repr(str(CERTIFIED)))
    code = (
        "import llama_onnx\n"
        f"try: llama_onnx.{call}\n"
        "except llama_onnx.MissingDependencyError as error: print(error)\n"
    )
    said = run(code, without=EXTRAS)
    assert f'`python -m pip install ".[{extras}]"`' in said
    assert "is not installed" in said


def test_our_own_missing_module_is_not_taken_for_an_extra() -> None:
    code = (
        "import llama_onnx\n"
        "try: llama_onnx.verify('int4')\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    broken = "llama_onnx.runtime.measure.verify"
    assert run(code, without=(broken,)).strip() == broken


@pytest.mark.parametrize("function", [llama_onnx.plan, llama_onnx.export])
def test_the_options_are_those_of_the_exporter(function: Any) -> None:
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    known = {field.name: field.default for field in fields(Options)}
    assert known.items() <= defaults.items()
    assert [name for name in defaults if name in known] == list(known)


def test_export_has_every_option_of_the_exporter() -> None:
    public, private = (
        {name: p.default for name, p in inspect.signature(function).parameters.items()}
        for function in (llama_onnx.export, export_package)
    )
    renamed = {"source": "checkpoint", "kept": "kept_adapters"}
    # `explicit` follows from the options' values here; `options` are the fields above.
    expected = {renamed.get(name, name) for name in private} - {"explicit", "options"}
    assert expected <= public.keys()
    for name in ("resume", "force", "checksum", "hash_source", "tokenizer"):
        assert public[name] is private[name]


def test_an_export_without_a_tokenizer(package: Path, tmp_path: Path) -> None:
    made = llama_onnx.export(package.parent / "checkpoint", tmp_path / "out", tokenizer=False)
    assert not llama_onnx.open_package(made.package).has_tokenizer
    assert not list(made.package.glob("tokenizer*"))
    with pytest.raises(llama_onnx.UsageError, match="has no tokenizer and takes token ids only"):
        llama_onnx.validate(made.package, package.parent / "checkpoint", texts=["the fox"])
    assert llama_onnx.open_package(package).has_tokenizer


def test_names() -> None:
    content = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert llama_onnx.__version__ == tomllib.loads(content)["project"]["version"]
    assert llama_onnx.Llama is Llama
    assert llama_onnx.TARGETS["cuda"] is get_target("cuda")
    assert dir(llama_onnx) == sorted(llama_onnx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        llama_onnx.Lama  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_public() -> None:
    def tree(kind: type[Exception]) -> set[str]:
        # Those of server and batch become responses: no caller of Python's API meets them.
        inner = (".runtime.serving.", ".runtime.batch.")
        below = [
            k for k in kind.__subclasses__() if not any(part in k.__module__ for part in inner)
        ]
        return {kind.__name__}.union(*map(tree, below))

    ours = {name for name in tree(llama_onnx.LlamaOnnxError) if not name.startswith("_")}
    assert ours == {name for name in llama_onnx.__all__ if name.endswith("Error")}


def test_export_takes_what_the_command_takes(package: Path, tmp_path: Path) -> None:
    source = package.parent / "checkpoint"
    options: dict[str, Any] = {
        "precision": "int4",
        "block_size": 64,
        "embedding": "fp16",
        "head": "int8",
        "accuracy_level": 1,
        "logits": "last",
    }
    ours = llama_onnx.export(str(source), tmp_path / "api", fuse_gate_up=True, **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments = ["export", str(source), str(tmp_path / "cli"), "--fuse-gate-up", *flags]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    recipes = [
        json.loads((tmp_path / name / "manifest.json").read_text("utf-8"))["recipe"]
        for name in ("api", "cli")
    ]
    assert recipes[0] == recipes[1]
    default = llama_onnx.open_package(package).manifest["recipe"]
    assert {key for key in default if default[key] != recipes[0][key]} >= {
        *("linear", "embedding", "head", "accuracy_level", "logits", "fuse_gate_up"),
    }
    planned = llama_onnx.plan(source, fuse_gate_up=True, **options)
    assert planned.to_json() == ours.plan.to_json()
    with pytest.raises(llama_onnx.UsageError, match="exists already"):
        llama_onnx.export(source, tmp_path / "api")


def test_a_model_opens_on_a_provider_by_name(package: Path) -> None:
    assert llama_onnx.Llama.load(package, provider="cpu").opened.provider.name == "cpu"
    with pytest.raises(llama_onnx.UsageError, match="no provider 'tpu'"):
        llama_onnx.Llama.load(package, provider="tpu")


def test_verify_refuses_what_has_no_effect(package: Path) -> None:
    assert llama_onnx.verify(package, files_only=True).passed
    for unused in ({"provider": "cpu"}, {"threads": 1}, {"allow_fallback": True}):
        with pytest.raises(llama_onnx.UsageError, match="files_only runs nothing"):
            llama_onnx.verify(package, files_only=True, **unused)


@pytest.mark.parametrize(
    ("option", "value", "use"),
    [
        ("accuracy_level", 3, "1 or 4"),
        ("accuracy_level", True, "1 or 4"),
        ("logits", "some", "all or last"),
        ("activations", "fp8", "fp32, fp16 or bf16"),
        ("quantizer", "magic", "rtn, awq, gptq or best"),
        ("embedding", "int2", "fp32, fp16, bf16, int8 or int4"),
        ("head", "int2", "fp32, fp16, bf16, int8 or int4"),
    ],
)
def test_a_value_that_the_command_refuses_is_refused(
    option: str, value: Any, use: str, package: Path, tmp_path: Path
) -> None:
    source, out = package.parent / "checkpoint", tmp_path / "out"
    said = f"^unknown {option.replace('_', ' ')} {value!r}: use {use}\\.$"
    given: dict[str, Any] = {"precision": "int4", option: value}
    with pytest.raises(llama_onnx.UsageError, match=said):
        llama_onnx.plan(source, **given)
    with pytest.raises(llama_onnx.UsageError, match=said):
        llama_onnx.export(source, out, **given)
    flags = ["--precision=int4", f"--{option.replace('_', '-')}={value}"]
    assert CliRunner().invoke(main, ["export", str(source), str(out), *flags]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("block_size", 64, "a block size applies to quantized matrices"),
        ("accuracy_level", 4, "an accuracy level applies to quantized matrices"),
    ],
)
def test_an_option_without_effect_is_refused(
    option: str, value: Any, said: str, package: Path, tmp_path: Path
) -> None:
    source, out = package.parent / "checkpoint", tmp_path / "out"
    given: dict[str, Any] = {"precision": "fp32", option: value}
    with pytest.raises(llama_onnx.UsageError, match=said):
        llama_onnx.plan(source, **given)
    with pytest.raises(llama_onnx.UsageError, match=said):
        llama_onnx.export(source, out, **given)
    flags = ["--precision=fp32", f"--{option.replace('_', '-')}={value}"]
    result = CliRunner().invoke(main, ["export", str(source), str(out), *flags])
    assert result.exit_code == 2 and said in result.output
    assert list(tmp_path.iterdir()) == []
    default = {field.name: field.default for field in fields(Options)}[option]
    usual: dict[str, Any] = {option: default}
    llama_onnx.plan(source, precision="fp32", **usual)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": 0}, "tokens is 0: use a whole number from 2 up"),
        ({"tokens": 1}, "tokens is 1: use a whole number from 2 up"),
        ({"tokens": 2.5}, "tokens is 2.5: use a whole number from 2 up"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0: use a whole number from 1 up"),
        ({"texts": []}, "texts must be a list of one or more strings"),
        ({"texts": "abc"}, "texts must be a list of one or more strings"),
        ({"texts": [b"abc"]}, "texts must be a list of one or more strings"),
    ],
)
def test_validate_refuses_what_measures_nothing(
    given: dict[str, Any], said: str, package: Path
) -> None:
    with pytest.raises(llama_onnx.UsageError, match=said):
        llama_onnx.validate(package, package.parent / "checkpoint", **given)


def test_the_least_that_can_be_measured(package: Path) -> None:
    source = package.parent / "checkpoint"
    with np.errstate(all="raise"):
        report = llama_onnx.validate(package, source, tokens=2, prompt_tokens=1, texts=["abc"])
    assert report.passed


def test_one_path_is_not_a_list_of_adapters(package: Path, tmp_path: Path) -> None:
    source = package.parent / "checkpoint"
    for path in ("dir", Path("dir")):
        given: dict[str, Any] = {"adapters": path}
        for call in (
            lambda given=given: llama_onnx.plan(source, **given),
            lambda given=given: llama_onnx.export(source, tmp_path / "out", **given),
            lambda given=given: llama_onnx.validate(package, source, **given),
        ):
            with pytest.raises(llama_onnx.UsageError, match="adapters is one path, 'dir'"):
                call()


def test_checksum_without_a_checklist(package: Path, tmp_path: Path) -> None:
    with pytest.raises(llama_onnx.UsageError, match=r"\(checksum=False in Python\)"):
        llama_onnx.export(package.parent / "checkpoint", tmp_path / "out", checksum=False)


RETURNED = {
    "export": ExportResult,
    "open_package": ModelPackage,
    "plan": Plan,
    "validate": ParityReport,
    "verify": VerifyReport,
}


def test_type_hints_can_be_read() -> None:
    assert set(RETURNED) == {name for name in llama_onnx.__all__ if name.islower()} - {
        "__version__"
    }
    for name, result in RETURNED.items():
        function = getattr(llama_onnx, name)
        hints = get_type_hints(function)
        assert hints["return"] is result
        assert hints.keys() == {*inspect.signature(function).parameters, "return"}


@pytest.mark.slow
def test_type_hints_can_be_read_in_a_new_process() -> None:
    """Where nothing has been imported yet."""
    code = (
        "import typing, llama_onnx\n"
        "for name in ('export', 'open_package', 'plan', 'validate', 'verify'):\n"
        "    print(typing.get_type_hints(getattr(llama_onnx, name))['return'].__name__)\n"
    )
    assert run(code).split() == [RETURNED[name].__name__ for name in sorted(RETURNED)]


def test_the_constructor_names_load() -> None:
    with pytest.raises(TypeError, match=r"use Llama\.load\(path\)"):
        Llama("tiny-int4")


def test_a_longer_context_than_the_package_has_is_not_used(package: Path) -> None:
    settings = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    longest = settings["model"]["context_length"]
    assert Llama.load(package, max_length=longest + 1).context_length == longest
    assert Llama.load(package, max_length=longest - 1).context_length == longest - 1
