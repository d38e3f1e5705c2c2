"""The shape of the source: imports run api -> exporter -> runtime -> targets, and rooms stay apart.

`python -m tests.support.import_graph` prints the figures that these tests are about.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.import_graph import FILE_LINES, FUNCTION_LINES, Source, components, report

ROOT = Path(__file__).parent.parent
SOURCE = Source(ROOT)

MAY_IMPORT = {
    "targets": {"targets"},
    "runtime": {"runtime", "targets"},
    "exporter": {"exporter", "runtime", "targets"},
}
"""House -> houses of this project that it may import. `api`, where there is one, may import all."""

LIBRARIES = {
    "targets": set[str](),
    "runtime": {"jinja2", "markupsafe", "numpy", "safetensors", "tokenizers"},
}
"""House -> libraries it may import besides the standard one. The exporter may import any."""

DOORS = {"onnxruntime": "runtime/ort.py", "onnxruntime_genai": "runtime/genai.py"}
"""Library -> the one module that imports it. It turns usage reports off, and so must come first."""

MODULE_LIBRARIES = {
    **{module: {library} for library, module in DOORS.items()},
    "targets/oms.py": {"cryptography", "model_signing"},
    "targets/pem.py": {"cryptography"},
    "targets/signature.py": {"cryptography"},
    "runtime/engine/sampling/guidance.py": {"llguidance"},
    **{  # for type checkers alone
        f"runtime/llama/{name}.py": {"typing_extensions"}
        for name in ("conversing", "dialogue", "model")
    },
    "runtime/bundles/card.py": {"huggingface_hub", "yaml"},
    "runtime/batch/lines.py": {"pyarrow"},
    "runtime/batch/ray_cluster.py": {"pyarrow", "ray"},
    "runtime/serving/replicas/ray_app.py": {"ray"},
    "runtime/placement/windows_ml.py": {"windowsml"},
}
"""Module -> libraries that it alone may import, in its functions: an extra nobody else needs."""

FOLDER_LIBRARIES = {
    "commands": {"click", "rich"},
    "serving": {
        "fastapi",
        "h11",
        "openai",
        "prometheus_client",
        "pydantic",
        "starlette",
        "uvicorn",
    },
}
"""Folder -> what modules in it may import as well. Only the command `serve` imports the second."""

MOST_LOOSE_MODULES = 3

NAMES_USED_TWICE = {
    "about.py": "what a report is about, and what a server tells about its package",
    "adapters.py": "LoRA adapters: packaging writes their files, llama swaps them",
    "awq.py": "the quantizer, and the layout of its codes in a checkpoint",
    "batch.py": "a command has the name of what it calls",
    "bench.py": "a command has the name of what it calls",
    "bundle.py": "a command has the name of what it calls",
    "export.py": "a command has the name of what it calls",
    "gptq.py": "the quantizer, and the layout of its codes in a checkpoint",
    "gguf.py": "the file format, the checkpoint in it and the tokenizer in it",
    "hub.py": "checkpoints come from the hub, bundles are made for it",
    "huggingface.py": "the checkpoint and the tokenizer of the same folder",
    "model.py": "graph builds the model, llama runs it",
    "options.py": "what the commands of a house share",
    "package.py": "targets has the format, checkpoints reads a package's weights",
    "plan.py": "a command has the name of what it calls",
    "registry.py": "the quantizers there are, and the targets there are",
    "rotary.py": "graph has the operator, measure its error",
    "validate.py": "a command has the name of what it calls",
    "tune.py": "a command has the name of what it calls",
    "verify.py": "a command has the name of what it calls",
    "windows.py": "bundles for Windows, and doctor's look at Windows",
}
"""File name -> why several folders may have it: the folder says which is which."""


def modules(house: str) -> list[Path]:
    return SOURCE.files(house)


def wrong_houses(path: Path, house: str) -> list[str]:
    ours = [name for name in SOURCE.imports(path) if name.startswith("llama_onnx.")]
    return [name for name in ours if name.split(".")[1] not in MAY_IMPORT[house]]


def wrong_libraries(path: Path, house: str) -> list[str]:
    alone = MODULE_LIBRARIES.get(path.relative_to(SOURCE.root).as_posix(), set[str]())
    allowed = LIBRARIES[house] | alone | ({"llama_onnx", "__future__"} | sys.stdlib_module_names)
    for folder in path.relative_to(SOURCE.root).parts:
        allowed = allowed | FOLDER_LIBRARIES.get(folder, set[str]())
    return [name for name in SOURCE.imports(path) if name.split(".")[0] not in allowed]


def past_the_door(path: Path) -> list[str]:
    """Libraries that `path` imports though only their door may."""
    here = path.relative_to(SOURCE.root).as_posix()
    names = (name.split(".")[0] for name in SOURCE.imports(path))
    return [name for name in names if DOORS.get(name, here) != here]


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


Plant = Callable[[dict[str, str]], None]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Writes files into a source of their own, which the guards look at instead."""

    def plant(files: dict[str, str]) -> None:
        for name, code in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        monkeypatch.setattr(sys.modules[__name__], "SOURCE", Source(tmp_path))

    return plant


def test_only_the_public_names_are_at_the_top() -> None:
    """`from llama_onnx import name` in a house would be an arrow up, to `api`."""
    assert {path.name for path in modules("api")} == {"__init__.py", "_calls.py", "_results.py"}
    houses = {"llama_onnx." + name for name in (*MAY_IMPORT, "_calls", "_results")}
    for path in modules("api"):
        ours = [name for name in SOURCE.imports(path) if name.startswith("llama_onnx")]
        assert all(".".join(name.split(".")[:2]) in houses for name in ours), path


@pytest.mark.parametrize(
    "code",
    [
        "import llama_onnx.exporter.cli",
        "from llama_onnx import Llama",
        "from llama_onnx import exporter",
        "from llama_onnx.runtime import model",
        "from ..runtime.model import Llama",
        "from .. import exporter",
        "def lazy():\n    from llama_onnx.exporter.model.config import LlamaConfig",
        "import importlib\nimportlib.import_module('llama_onnx.exporter.model.config')",
    ],
)
def test_the_guard_sees_an_arrow_that_points_up(code: str, planted: Plant) -> None:
    planted({"targets/module.py": code})
    assert wrong_houses(SOURCE.root / "targets/module.py", "targets") != []


def test_the_guard_sees_a_heavy_library(planted: Plant) -> None:
    code = "import json\nimport numpy\nimport torch.nn\nimport click"
    planted({"runtime/module.py": code})
    assert wrong_libraries(SOURCE.root / "runtime/module.py", "runtime") == ["torch.nn", "click"]


@pytest.mark.parametrize("house", MAY_IMPORT)
def test_a_runtime_library_has_one_door(house: str) -> None:
    wrong = {p.relative_to(ROOT): past_the_door(p) for p in modules(house)}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_guard_sees_who_goes_past_the_door(planted: Plant) -> None:
    code = "def lazy():\n    import onnxruntime as ort\nfrom onnxruntime_genai import Model"
    planted({"exporter/a.py": code, "runtime/ort.py": code, "runtime/genai.py": code})
    assert past_the_door(SOURCE.root / "exporter/a.py") == ["onnxruntime_genai", "onnxruntime"]
    assert past_the_door(SOURCE.root / "runtime/ort.py") == ["onnxruntime_genai"]
    assert past_the_door(SOURCE.root / "runtime/genai.py") == ["onnxruntime"]


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert SOURCE.cycles() == []


def test_no_two_folders_need_each_other() -> None:
    edges = SOURCE.folder_edges
    found = {pair: edges[pair[0]][pair[1]] for pair in SOURCE.folder_pairs()}
    assert found == {}


@pytest.mark.parametrize("house", ["exporter", "runtime"])
def test_modules_live_in_folders(house: str) -> None:
    loose = SOURCE.loose(house)
    assert len(loose) <= MOST_LOOSE_MODULES, f"move some of {loose} into folders"


def test_a_file_name_is_used_twice_only_for_a_reason() -> None:
    twice = SOURCE.names_used_twice()
    assert {name: twice[name] for name in twice.keys() - NAMES_USED_TWICE.keys()} == {}


def test_functions_and_files_are_short() -> None:
    assert SOURCE.long_functions() == [] and SOURCE.long_files() == []


def test_the_guards_see_a_circle_and_folders_that_need_each_other(planted: Plant) -> None:
    planted(
        {
            "runtime/a/one.py": "from llama_onnx.runtime.b.two import x",
            "runtime/b/two.py": "def lazy():\n    from ..c import three",
            "runtime/c/three.py": "import llama_onnx.runtime.a.one",
            "runtime/c/four.py": "from llama_onnx.runtime.loose import y",
            "runtime/loose.py": "from llama_onnx.runtime.c import five",
            "runtime/c/five.py": "",
        }
    )
    names = ("runtime.a.one", "runtime.b.two", "runtime.c.three")
    assert SOURCE.cycles() == [[f"llama_onnx.{name}" for name in names]]
    # A folder and its own subfolder are two.
    assert SOURCE.folder_pairs() == [("runtime", "runtime/c")]
    assert SOURCE.loose("runtime") == ["loose.py"]


def test_the_guards_see_names_and_lengths(planted: Plant) -> None:
    function = "def long():\n" + "    pass\n" * FUNCTION_LINES
    planted(
        {
            "exporter/x.py": function,
            "runtime/x.py": function.replace("    pass\n", "", 1),
            "targets/y.py": "#\n" * FILE_LINES,
            "benchmarks/z.py": "#\n" * (FILE_LINES + 1),
        }
    )
    assert SOURCE.names_used_twice() == {"x.py": ["exporter", "runtime"]}
    assert SOURCE.long_functions() == [("exporter/x.py: long", FUNCTION_LINES + 1)]
    assert SOURCE.long_files() == [("benchmarks/z.py", FILE_LINES + 1)]


def test_the_figures_are_printed_with_what_they_count(planted: Plant) -> None:
    planted({"runtime/a.py": "import llama_onnx.runtime.b.c", "runtime/b/c.py": "from .. import a"})
    lines = list(report(SOURCE.root))
    start = lines.index("module cycles: 1")
    assert lines[start + 1] == "    llama_onnx.runtime.a, llama_onnx.runtime.b.c"
    assert lines[start + 2 : start + 4] == [
        "folder pairs that need each other: 1",
        "    runtime <-> runtime/b",
    ]


def test_components_are_the_circles() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "f"}}
    assert sorted(map(sorted, components(edges))) == [["a", "b", "c"], ["d", "e"], ["f"]]


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
        ("llama_onnx", "torch transformers onnx onnxruntime onnxruntime_genai numpy click rich"),
        (
            "llama_onnx.runtime.llama.model",
            "torch transformers onnx onnxruntime onnxruntime_genai tokenizers click rich",
        ),
        ("llama_onnx.runtime.ort", "torch transformers onnx onnxruntime click rich"),
        ("llama_onnx.runtime.commands.bundle", "torch transformers onnx onnxruntime numpy"),
        ("llama_onnx.targets.package", "torch transformers onnx onnxruntime numpy click rich"),
        ("llama_onnx.targets.signature", "cryptography model_signing numpy click rich"),
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
        for name in SOURCE.imports(path)
        if name.startswith("tests.") and not name.startswith("tests.support.")
    }
    assert len(files) > 40
    assert shared == {}
