"""Budgets, presets and recipe files, in whole exports of a tiny model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner

from llama_onnx import LlamaOnnxError, export, plan
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.graph.kernel_times import KERNEL_TIMES
from llama_onnx.exporter.packaging.budget import CANDIDATES
from llama_onnx.exporter.packaging.goal import budget_bytes, goal_of
from llama_onnx.exporter.packaging.options import PRESET_NAMES, Options
from llama_onnx.exporter.packaging.presets import PRESETS, with_preset
from llama_onnx.runtime.measure.fidelity import limits_of, recipe_of
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import MODEL_FILE
from tests.support import tiny

CONFIG = replace(tiny.GQA, tie_word_embeddings=True)
PARAMETERS = CONFIG.num_parameters()
TOKENS = 1024
BUDGET = "4.6bpw"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_huggingface(tmp_path_factory.mktemp("source"), CONFIG)
    tiny.write_tokenizer(folder, CONFIG.vocab_size)
    return folder


@pytest.fixture(scope="module")
def budgeted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("budgeted") / "package"
    export(source, out, precision="int4", budget=BUDGET, calibration_tokens=TOKENS)
    return out


def manifest(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "manifest.json").read_text("utf-8"))
    return found


def data(package: Path) -> Path:
    (found,) = package.glob("*.data")
    return found


def hashes(package: Path) -> dict[str, str]:
    """Return what must not differ between two exports of one source."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in package.iterdir()
        if file.is_file()
    }


def test_the_file_is_within_the_budget_and_opens(budgeted: Path) -> None:
    assert 8 * data(budgeted).stat().st_size / PARAMETERS <= 4.6
    session = onnxruntime.InferenceSession(str(budgeted / MODEL_FILE))
    assert session.get_outputs()[0].name == "logits"
    ways = {(way["bits"], way["block_size"]) for way in manifest(budgeted)["recipe"]["chosen"]}
    assert len(ways) > 1, "the matrices differ in what a byte saves"
    assert not (budgeted / "calibration").exists()


def test_its_recipe_gives_the_same_bytes(source: Path, budgeted: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "again", recipe=str(budgeted))
    assert hashes(tmp_path / "again") == hashes(budgeted)


def test_plan_prints_the_recipe_that_export_takes(source: Path, budgeted: Path) -> None:
    arguments = f"plan {source} --precision int4 --budget {BUDGET} --calibration-tokens {TOKENS}"
    printed = CliRunner().invoke(main, [*arguments.split(), "--json"], catch_exceptions=False)
    found = json.loads(printed.stdout)
    assert found["recipe"] == manifest(budgeted)["recipe"]
    assert found["data_bytes"] == data(budgeted).stat().st_size
    matrices = found["budget"]["matrices"]
    predicted = sum(matrix["predicted_kl"] for matrix in matrices.values())
    assert predicted == pytest.approx(found["budget"]["predicted_kl"], rel=0.02)
    for matrix in matrices.values():
        for other in matrix["others"]:
            assert not (
                other["bytes"] <= matrix["bytes"] and other["predicted_kl"] < matrix["predicted_kl"]
            )
    shown = CliRunner().invoke(main, arguments.split(), catch_exceptions=False)
    assert "self_attn.qkv_proj" in shown.stdout
    assert "predicted KL divergence" in " ".join(shown.stdout.split())


def test_a_budget_nobody_can_meet_says_the_least_and_the_least_is_met(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the least that this model can be stored in is") as raised:
        export(source, tmp_path / "out", precision="int4", budget="1bpw")
    least = str(raised.value).split("stored in is ")[1].split(" ")[0]
    export(source, tmp_path / "out", precision="int4", budget=least, calibration_tokens=TOKENS)
    assert 8 * data(tmp_path / "out").stat().st_size / PARAMETERS <= float(least[:-3])
    less = f"{float(least[:-3]) - 0.01:.2f}bpw"
    with pytest.raises(UsageError, match=f"--budget {less} is too small"):
        export(source, tmp_path / "less", precision="int4", budget=less)


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "no budget": ({"budget": "small"}, "neither bits per weight, such as 4.4bpw"),
        "nothing": ({"budget": "0bpw"}, "neither bits per weight"),
        "not a number": ({"max_kl": float("nan")}, "not a number above 0"),
        "rtn": ({"budget": "4bpw", "quantizer": "rtn"}, "needs a quantizer that reads a text"),
        "int8": ({"budget": "4bpw", "precision": "int8"}, "use --precision int4"),
        "two": ({"preset": "best", "budget": "4bpw"}, "--preset best sets --budget to 5.25bpw"),
        "no text": ({"calibration": "nowhere.txt"}, r"nowhere\.txt cannot be read: No such file"),
        "a folder": ({"calibration": "/"}, "/ is not a regular file"),
        "no tokens": ({"calibration_tokens": 0}, "--calibration-tokens 0 is too few"),
        "few tokens": ({"calibration_tokens": 9}, "needs at least 1,024"),
        "small at any loss": ({"minimize": "size"}, "--minimize size needs --max-kl"),
        "fast in bytes": ({"minimize": "time", "budget": "4bpw"}, "pass only one"),
        "fast on a GPU": ({"preset": "fast", "target": "cuda"}, "not those of the target cuda"),
        "fast in fp32": ({"minimize": "time", "accuracy_level": 1}, "at accuracy level 1"),
        "fast and small": ({"preset": "fast", "minimize": "size"}, "sets --minimize to time"),
        "portable": ({"budget": "4bpw", "target": "portable"}, "which the target does not have"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused_before_anything_is_read(source: Path, tmp_path: Path, name: str) -> None:
    options, message = refusals()[name]
    with pytest.raises(LlamaOnnxError, match=message):
        export(source, tmp_path / "out", **{"precision": "int4"} | options)
    assert not list(tmp_path.iterdir())


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (
        lambda m: m["recipe"]["chosen"][0]["tensors"].append("model.layers.9.mlp.up_proj.weight"),
        "which this model does not have",
    ),
    "bits": (lambda m: m["recipe"]["chosen"][0].update(bits=3), "cannot be read"),
    "block": (lambda m: m["recipe"]["linear"].update(block_size=48), "cannot be read"),
    "quantizer": (lambda m: m["recipe"].update(quantizer="magic"), "cannot be read"),
    "no storage": (lambda m: m["recipe"].pop("head"), "cannot be read"),
    "two storages": (lambda m: m["recipe"]["head"].update(block_size=256), "in two ways"),
    "rounded to zero points": (
        lambda m: m["recipe"].update(quantizer="rtn"),
        "with zero points, but its codes are rounded to nearest",
    ),
    "scales below zero": (
        lambda m: m["recipe"]["chosen"][0].update(zero_points=False, stored_scales="uint8"),
        "such scales may be negative",
    ),
    "own text": (lambda m: m["calibration"].update(text="mine.txt"), "was calibrated on mine.txt"),
    "no recipe": (lambda m: m.pop("recipe"), "has no recipe"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_recipe_that_does_not_fit(
    source: Path, budgeted: Path, tmp_path: Path, name: str
) -> None:
    content = manifest(budgeted)
    change, message = BROKEN[name]
    change(content)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UsageError, match=message):
        plan(source, recipe=str(file))


def test_a_recipe_of_a_tied_model_does_not_fit_an_untied_one(
    budgeted: Path, tmp_path: Path
) -> None:
    """Nothing shows what an embedding of its own loses, so no zero points are chosen for it."""
    untied = tiny.write_huggingface(tmp_path / "untied", tiny.GQA)
    tiny.write_tokenizer(untied, tiny.GQA.vocab_size)
    with pytest.raises(UsageError, match=r"embed_tokens\.weight with zero points"):
        plan(untied, recipe=str(budgeted))


def test_what_a_recipe_says_cannot_be_said_again(source: Path, budgeted: Path) -> None:
    with pytest.raises(UsageError, match="leave out --block-size"):
        plan(source, recipe=str(budgeted), block_size=64)
    with pytest.raises(UsageError, match="leave them out, or the recipe"):
        plan(source, recipe=str(budgeted), budget="4bpw")
    with pytest.raises(UsageError, match="leave them out, or the recipe"):
        plan(source, recipe=str(budgeted), minimize="time")


def planned(source: Path, **options: Any) -> dict[str, Any]:
    arguments = ["--precision", "int4", "--calibration-tokens", str(TOKENS)]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    command = ["plan", str(source), *arguments, "--json"]
    printed = CliRunner().invoke(main, command, catch_exceptions=False)
    found: dict[str, Any] = json.loads(printed.stdout)
    return found


def total(found: dict[str, Any], what: str) -> int:
    return sum(matrix[what] for matrix in found["budget"]["matrices"].values())


def test_least_time_is_faster_than_least_size_at_the_same_loss(source: Path) -> None:
    fast = planned(source, max_kl=0.1, minimize="time")
    small = planned(source, max_kl=0.1, minimize="size")
    assert fast["budget"]["predicted_kl"] <= 0.1
    assert total(fast, "nanoseconds") < total(small, "nanoseconds")
    assert total(fast, "bytes") > total(small, "bytes")
    for matrix in fast["budget"]["matrices"].values():
        for other in matrix["others"]:
            slower = other["nanoseconds"] >= matrix["nanoseconds"]
            assert slower or other["predicted_kl"] > matrix["predicted_kl"]


def test_the_fast_preset_keeps_within_the_limits_it_is_held_to(
    source: Path, tmp_path: Path
) -> None:
    export(source, tmp_path / "out", preset="fast", calibration_tokens=TOKENS)
    recipe = manifest(tmp_path / "out")["recipe"]
    assert recipe["fuse_gate_up"]
    assert 128 in {way["block_size"] for way in recipe["chosen"]}
    found = planned(source, preset="fast")
    bits = 8 * found["data_bytes"] / PARAMETERS
    limits = limits_of(recipe_of(recipe, "int4", bits), PARAMETERS)
    assert limits
    assert found["budget"]["predicted_kl"] <= limits.mean_kl
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / MODEL_FILE))
    assert session.get_outputs()[0].name == "logits"


def test_a_large_model_is_allowed_less_and_a_limit_of_one_s_own_counts() -> None:
    fast = with_preset(Options(preset="fast"))
    allowed = [goal_of(fast, parameters) for parameters in (135_000_000, 7_000_000_000)]
    assert [goal.max_kl for goal in allowed if goal] == [pytest.approx(0.096), pytest.approx(0.04)]
    own = goal_of(replace(fast, max_kl=0.01), 7_000_000_000)
    assert own
    assert own.max_kl == 0.01


def test_a_head_of_one_s_own_storage_is_left_alone(tmp_path: Path) -> None:
    untied = tiny.write_huggingface(tmp_path / "untied", tiny.GQA)
    tiny.write_tokenizer(untied, tiny.GQA.vocab_size)
    free = planned(untied, preset="fast")["budget"]["matrices"]
    fixed = planned(untied, preset="fast", head="int8")["budget"]["matrices"]
    assert set(free) - set(fixed) == {"lm_head"}


def test_only_the_least_time_chooses_what_the_limits_know_it_by() -> None:
    """See `recipe_of`: matrices of 4 bits in blocks of 128 are a sign of it."""
    assert [name for name, forms in CANDIDATES.items() if (4, 128) in forms] == ["time"]


def test_every_storage_to_choose_from_has_a_time() -> None:
    assert {form for forms in CANDIDATES.values() for form in forms} <= set(KERNEL_TIMES)


def test_presets_are_options_that_exist() -> None:
    assert tuple(PRESETS) == PRESET_NAMES
    for name in PRESETS:
        found = with_preset(Options(preset=name))
        assert found.precision == "int4"
        if found.budget:
            assert budget_bytes(found.budget, PARAMETERS) > 0


def test_a_preset_meets_its_budget(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", preset="careful", calibration_tokens=TOKENS)
    bits = 8 * data(tmp_path / "out").stat().st_size / PARAMETERS
    assert 5.3 < bits <= 6.3
