"""The arrows of docs/architecture.md: exporter -> runtime -> targets, never the other way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "targets": {"targets"},
    "runtime": {"runtime", "targets"},
    "exporter": {"exporter", "runtime", "targets"},
}
"""House -> houses of this project that it may import."""

LIBRARIES = {
    "targets": set[str](),
    "runtime": {"numpy", "onnxruntime", "onnxruntime_genai", "safetensors", "tokenizers"},
}
"""House -> libraries it may import besides the standard one. The exporter may import any."""

MODULE_LIBRARIES = {"targets/signature.py": {"cryptography"}}
"""Module -> libraries that it alone may import, in its functions: an extra nobody else needs."""

COMMAND_LIBRARIES = {"click", "rich"}
"""What modules in a `commands` folder may import as well."""


TEMPLATES = ROOT / "runtime" / "bundles" / "templates"
"""Files that bundles are filled with. They run elsewhere: here they are data."""


def modules(house: str) -> list[Path]:
    files = sorted((ROOT / house).rglob("*.py"))
    return [path for path in files if TEMPLATES not in path.parents]


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at its top or in a function; relative ones resolved."""
    package = ["llama_onnx", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def wrong_houses(path: Path, house: str) -> list[str]:
    ours = [name for name in imports(path) if name.startswith("llama_onnx.")]
    return [name for name in ours if name.split(".")[1] not in MAY_IMPORT[house]]


def wrong_libraries(path: Path, house: str) -> list[str]:
    alone = MODULE_LIBRARIES.get(path.relative_to(ROOT).as_posix(), set[str]())
    allowed = LIBRARIES[house] | alone | ({"llama_onnx", "__future__"} | sys.stdlib_module_names)
    if "commands" in path.relative_to(ROOT).parts:
        allowed = allowed | COMMAND_LIBRARIES
    return [name for name in imports(path) if name.split(".")[0] not in allowed]


@pytest.mark.parametrize("house", MAY_IMPORT)
def test_a_house_has_modules(house: str) -> None:
    assert len(modules(house)) > 3, "the tests below would hold for nothing"


@pytest.mark.parametrize("house", MAY_IMPORT)
def test_a_house_imports_only_those_below_it(house: str) -> None:
    wrong = {p.relative_to(ROOT): wrong_houses(p, house) for p in modules(house)}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("house", LIBRARIES)
def test_a_light_house_imports_only_light_libraries(house: str) -> None:
    wrong = {p.relative_to(ROOT): wrong_libraries(p, house) for p in modules(house)}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import llama_onnx.exporter.cli",
        "from llama_onnx import exporter",
        "from llama_onnx.runtime import model",
        "from ..runtime.model import Llama",
        "from .. import exporter",
        "def lazy():\n    from llama_onnx.exporter.model.config import LlamaConfig",
        "import importlib\nimportlib.import_module('llama_onnx.exporter.model.config')",
    ],
)
def test_the_guard_sees_an_arrow_that_points_up(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "targets" / "module.py"
    module.parent.mkdir()
    module.write_text(code, encoding="utf-8")
    assert wrong_houses(module, "targets") != []


def test_the_guard_sees_a_heavy_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "runtime" / "module.py"
    module.parent.mkdir()
    module.write_text("import json\nimport numpy\nimport torch.nn\nimport click", encoding="utf-8")
    assert wrong_libraries(module, "runtime") == ["torch.nn", "click"]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("llama_onnx.exporter.cli", "torch transformers onnx onnxruntime onnxruntime_genai numpy"),
        (
            "llama_onnx.exporter.parity.pytest_plugin",
            "torch transformers onnx onnxruntime onnxruntime_genai numpy click rich jinja2",
        ),
        ("llama_onnx.runtime.commands.generate", "torch transformers onnx onnxruntime_genai numpy"),
        ("llama_onnx.runtime.commands.chat", "torch transformers onnx onnxruntime_genai numpy"),
        ("llama_onnx.runtime.llama.model", "torch transformers onnx click rich"),
        ("llama_onnx.targets.package", "torch transformers onnx onnxruntime numpy click rich"),
        ("llama_onnx.targets.signature", "cryptography numpy click rich"),
    ],
)
def test_a_module_loads_without_what_it_does_not_need(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert module in loaded
    assert set(heavy.split()).isdisjoint(loaded)


def test_no_test_imports_a_test() -> None:
    """What tests share is in tests/support: a module of tests may then be moved or run alone."""
    files = list((ROOT / "tests").rglob("*.py"))
    shared = {
        path.relative_to(ROOT).as_posix(): name
        for path in files
        for name in imports(path)
        if name.startswith("tests.") and not name.startswith("tests.support.")
    }
    assert len(files) > 40
    assert shared == {}
