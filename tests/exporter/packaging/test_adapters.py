"""Adapters kept beside the base: against PEFT, swapped between answers, and refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.config import MATRICES
from llama_onnx.exporter.packaging import adapters as module
from llama_onnx.exporter.packaging.adapters import named_adapters, open_kept, read_parameters
from llama_onnx.exporter.packaging.add_adapters import add_adapters
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan, require_disk
from llama_onnx.exporter.reference.walk import reference_config
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import (
    CheckpointError,
    LlamaOnnxError,
    PackageError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from llama_onnx.targets.package import ModelPackage
from tests.support import tiny
from tests.support.adapters import EMBEDDING, Array, attention, factors, write_adapter
from tests.support.faults import edit_graph, epsilon
from tests.support.packages import Stop, alter_package, decode
from tests.support.quantized import quantize_model, write
from tests.support.quantized_cases import CASES

QV = {name: 4 for layer in range(3) for name in attention(layer, "q", "v")}
ALL = {f"model.layers.{layer}.{name}": 3 for layer in range(3) for name in MATRICES}
FEW = {"model.layers.2.mlp.up_proj": 2, "model.layers.0.self_attn.k_proj": 5}
NAMES = ("qv", "alle ü", "few")
IDS = np.random.default_rng(0).integers(3, 288, 40)
MAX_ABS, RELATIVE = 1e-3, 1e-5
PROMPT = "the quick brown fox"

EXPORTS = {
    "fp32": Options("fp32"),
    "fp16": Options("fp16"),
    # fp32 activations: what is compared is the graph, not the rounding of its inputs.
    "int8": Options("int8", quantizer="rtn", accuracy_level=1),
    "int4": Options("int4", quantizer="rtn", accuracy_level=1),
    "int4 fused": Options("int4", quantizer="rtn", accuracy_level=1, fuse_gate_up=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of different ranks, scalings and targets."""
    root = tmp_path_factory.mktemp("adapters")
    few: dict[str, Any] = {
        "target_modules": ["2.mlp.up_proj", "0.self_attn.k_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"k_proj": 3},
        "r": 5,
    }
    return {
        "qv": write_adapter(root / "qv", factors(QV)),
        "alle ü": write_adapter(
            root / "alle ü", factors(ALL, seed=2), dtype="bf16", r=3, lora_alpha=2, use_rslora=True
        ),
        "few": write_adapter(root / "few", factors(FEW, seed=3), **few),
    }


@pytest.fixture(scope="module")
def kept(
    source: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A package of `EXPORTS` with all adapters beside it, made once. Read only."""
    root = tmp_path_factory.mktemp("kept")

    def make(name: str) -> Path:
        if not (root / name).exists():
            export_package(source, root / name, TARGET, EXPORTS[name], kept=folders)
        return root / name

    return make


@pytest.fixture(scope="module")
def llama(kept: Callable[[str], Path]) -> Llama:
    return Llama.load(kept("fp32"))


def peft_model(package: Path, folder: Path | None) -> Any:
    """transformers' model on the package's own weights, the adapter added by PEFT."""
    checkpoint = PackageCheckpoint.open(package)
    model: Any = transformers.LlamaForCausalLM(reference_config(checkpoint.config))
    tensors = map(checkpoint.tensor, checkpoint.names())
    model.load_state_dict({t.name: torch.from_numpy(t.rows(0, t.shape[0])) for t in tensors})
    return (PeftModel.from_pretrained(model, folder) if folder else model).eval()


def peft_logits(model: Any, ids: Array) -> Array:
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def onnx_logits(package: Path, adapter: str | None) -> Array:
    """A prefill and some steps of plain onnxruntime, the adapter activated as its API has it."""
    options, run_options = ort.SessionOptions(), ort.RunOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(package / "model.onnx"), options)
    loaded = ort.LoraAdapter()
    if adapter:
        loaded.Load(str(ModelPackage.open(package).adapter_path(adapter)))
        run_options.add_active_adapter(loaded)
    cache: Mapping[str, Array] = GraphSession(session).empty_cache()
    names, rows = [output.name for output in session.get_outputs()], []
    for start, stop in ((0, 30), (30, 31), (31, 40)):
        feeds = {"input_ids": IDS[None, start:stop], "attention_mask": np.ones((1, stop), np.int64)}
        logits, *present = session.run(names, {**feeds, **cache}, run_options)
        rows.append(logits[0])
        past = [name.replace("present.", "past_key_values.") for name in names[1:]]
        cache = dict(zip(past, present, strict=True))
    return np.concatenate(rows)


def text(llama: Llama, adapter: str | None = None) -> str:
    return "".join(llama.generate(PROMPT, max_new_tokens=24, adapter=adapter))


# --- what an active adapter computes ------------------------------------------------------


@pytest.mark.parametrize("adapter", NAMES)
@pytest.mark.parametrize("name", EXPORTS)
def test_an_active_adapter_is_what_peft_makes_of_the_same_weights(
    kept: Callable[[str], Path], folders: dict[str, Path], name: str, adapter: str
) -> None:
    package = kept(name)
    expected = peft_logits(peft_model(package, folders[adapter]), IDS)
    found = onnx_logits(package, adapter)
    assert np.abs(found - expected).max() <= MAX_ABS
    assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected)
    # The change is as large as the logits: an adapter that does nothing is not within a limit.
    assert np.abs(onnx_logits(package, None) - expected).max() > 100 * MAX_ABS


@pytest.mark.parametrize("name", EXPORTS)
def test_without_an_adapter_the_logits_are_the_plain_package_s_bit_by_bit(
    kept: Callable[[str], Path], source: Path, tmp_path: Path, name: str
) -> None:
    plain = export_package(source, tmp_path / "plain", TARGET, EXPORTS[name]).package
    np.testing.assert_array_equal(onnx_logits(kept(name), None), onnx_logits(plain, None))
    assert (kept(name) / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()


def test_merged_and_swapped_give_the_same_logits(
    kept: Callable[[str], Path], source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for adapter in NAMES:
        out = tmp_path / adapter
        export_package(source, out, TARGET, EXPORTS["fp32"], adapters=[folders[adapter]])
        difference = onnx_logits(kept("fp32"), adapter) - onnx_logits(out, None)
        assert np.abs(difference).max() <= MAX_ABS


def test_a_file_holds_peft_s_tensors_by_the_names_of_the_graph_s_inputs(
    kept: Callable[[str], Path],
) -> None:
    found = read_parameters(kept("int4") / "adapters" / "few.onnx_adapter")
    changes = factors(FEW, seed=3)
    # alpha / r is 8 / 2 and 3 / 5
    for name, scaling in zip(FEW, (4.0, 0.6), strict=True):
        a, b = changes[name]
        np.testing.assert_allclose(found.pop(f"{name}.lora_A.weight"), a * scaling, rtol=1e-6)
        np.testing.assert_array_equal(found.pop(f"{name}.lora_B.weight"), b)
    assert not found


def test_the_graph_offers_the_kinds_of_matrices_that_some_adapter_changes(
    source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    two = {name: folders[name] for name in ("qv", "few")}
    out = export_package(
        source, tmp_path / "out", TARGET, Options("int4", quantizer="rtn"), kept=two
    ).package
    assert ModelPackage.open(out).manifest["recipe"]["swappable"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
    ]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(out / "model.onnx"), options)
    optional = {value.name for value in session.get_overridable_initializers()}
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    assert optional == {
        f"model.layers.{layer}.{kind}.lora_{part}.weight"
        for layer in range(3)
        for kind in kinds
        for part in "AB"
    }


# --- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", NAMES)
def test_a_greedy_answer_is_peft_s_own(
    llama: Llama, folders: dict[str, Path], adapter: str
) -> None:
    package = llama.package.path
    model = peft_model(package, folders[adapter])
    ids = Tokenizer.from_file(str(package / "tokenizer.json")).encode(PROMPT).ids
    for _ in range(24):
        ids.append(int(peft_logits(model, np.array(ids))[-1].argmax()))
    assert text(llama, adapter) == decode(package, ids[-24:])


def test_adapters_are_swapped_from_answer_to_answer_and_taken_away_again(llama: Llama) -> None:
    base = text(llama)
    alone = {name: text(Llama.load(llama.package.path), name) for name in NAMES}
    assert len({base, *alone.values()}) == 4
    for name in (*NAMES, *reversed(NAMES)):
        assert text(llama, name) == alone[name]
        assert text(llama) == base


def test_answers_with_different_adapters_can_be_written_side_by_side(llama: Llama) -> None:
    alone = [text(llama, name) for name in (None, *NAMES)]
    running = [llama.generate(PROMPT, max_new_tokens=24, adapter=name) for name in (None, *NAMES)]
    texts = [""] * len(running)
    going = True
    while going:
        pieces = [next(answer, None) for answer in running]
        texts = [whole + (piece or "") for whole, piece in zip(texts, pieces, strict=True)]
        going = any(piece is not None for piece in pieces)
    assert texts == alone


def test_an_answer_outlives_its_model(kept: Callable[[str], Path], llama: Llama) -> None:
    answer = Llama.load(kept("fp32")).generate(PROMPT, max_new_tokens=24, adapter="qv")
    assert "".join(answer) == text(llama, "qv")


def test_a_chat_can_use_an_adapter(llama: Llama) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    plain, changed = (
        "".join(llama.chat(messages, max_new_tokens=16, adapter=name)) for name in (None, "qv")
    )
    assert plain != changed


def test_an_adapter_that_is_not_there_is_answered_with_those_that_are(
    llama: Llama, package: Path
) -> None:
    with pytest.raises(UsageError, match=r"has no adapter 'nope': it has qv, alle ü, few\."):
        llama.generate(PROMPT, adapter="nope")
    with pytest.raises(UsageError, match=r"has no adapter 'nope': it has none \(`export --keep"):
        Llama.load(package).generate(PROMPT, adapter="nope")


def test_a_damaged_adapter_is_noticed(kept: Callable[[str], Path], tmp_path: Path) -> None:
    out = alter_package(kept("fp32"), tmp_path / "out")
    file = out / "adapters" / "few.onnx_adapter"
    content = file.read_bytes()
    file.write_bytes(b"\0" * len(content))
    assert ModelPackage.open(out).verify() == ["adapters/few.onnx_adapter"]
    damaged = Llama.load(out)
    with pytest.raises(PackageError, match=r"few\.onnx_adapter: .*not appear to be a valid lora"):
        damaged.generate(PROMPT, adapter="few")
    assert text(damaged, "qv") == text(Llama.load(kept("fp32")), "qv")
    file.write_bytes(content[:-8])
    with pytest.raises(PackageError, match=r"few\.onnx_adapter is damaged: it has"):
        Llama.load(out)


# --- the command line ---------------------------------------------------------------------


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], input=stdin)


def test_export_plan_inspect_generate_and_chat(
    source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    choices = ("--adapter", folders["qv"], "--adapter", f"my own={folders['few']}")
    keep = (*choices, "--keep-adapter", "--precision", "int4")
    planned = run("plan", source, *keep)
    assert planned.exit_code == 0
    assert "adapter my own" in planned.output and "k_proj, up_proj" in planned.output
    out = tmp_path / "ö out"
    made = run("export", source, out, *keep)
    assert made.exit_code == 0, made.output
    assert "Adapters beside it: qv, my own" in made.output
    shown = json.loads(run("inspect", out, "--json").output)
    assert shown["merged_adapters"] == []
    entry = shown["adapters"]["my own"]
    assert entry["file"] == "adapters/my own.onnx_adapter" in shown["files"]
    assert (entry["rank"], entry["alpha"], entry["ranks"]) == (5, 8.0, [2, 5])
    assert (entry["targets"], entry["matrices"]) == (["k_proj", "up_proj"], 2)
    assert entry["source"]["name"] == "few"
    assert "qv: rank 4, alpha 8.0, changes q_proj, v_proj" in run("inspect", out).output
    llama = Llama.load(out)
    said = run("generate", out, PROMPT, "--adapter", "my own", "--max-new-tokens", 24)
    assert said.stdout == text(llama, "my own") + "\n" != text(llama) + "\n"
    assert "adapter my own" in said.stderr
    said = run("generate", out, PROMPT, "--adapter", "qv", "--max-new-tokens", 24, "--json")
    content = json.loads(said.stdout)
    assert (content["text"], content["adapter"]) == (text(llama, "qv"), "qv")
    talk = [{"role": "user", "content": "the fox"}]
    expected = "".join(llama.chat(talk, max_new_tokens=10, adapter="qv"))
    said = run("chat", out, "--adapter", "qv", "--max-new-tokens", 10, stdin="the fox\n")
    assert said.stdout == expected + "\n"


@pytest.mark.parametrize("verb", [("generate", PROMPT), ("chat",)])
def test_an_unknown_adapter_is_one_sentence(
    kept: Callable[[str], Path], verb: tuple[str, ...]
) -> None:
    said = run(verb[0], kept("fp32"), *verb[1:], "--adapter", "nope")
    assert (said.exit_code, said.stdout) == (2, "")
    assert said.stderr == (
        f"Error: {kept('fp32')} has no adapter 'nope': it has qv, alle ü, few.\n"
    )


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_validate_measures_the_active_adapter(
    kept: Callable[[str], Path], source: Path, folders: dict[str, Path], name: str
) -> None:
    brief = ("--reference", source, "--tokens", "4", "--prompt-tokens", "16")
    assert run("validate", kept(name), *brief).exit_code == 0
    proved = run("validate", kept(name), *brief, "--adapter", folders["alle ü"], "--json")
    assert proved.exit_code == 0, proved.output
    report = json.loads(proved.output)
    assert report["reference"] == f"{source} + {folders['alle ü']}"
    # Another adapter than the folder's is active: nothing about the graph holds any more.
    wrong = run("validate", kept(name), *brief, "--adapter", f"qv={folders['alle ü']}")
    assert wrong.exit_code == 1
    assert "failed: graph max_abs" in wrong.output
    both = ("--adapter", folders["qv"], "--adapter", folders["few"])
    said = run("validate", kept(name), *brief, *both)
    assert said.exit_code == 2 and "only one can be active" in said.output


def test_bisect_finds_the_operator_between_those_of_the_adapters(
    kept: Callable[[str], Path], source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    package = alter_package(kept("fp32"), tmp_path / "package")
    edit_graph(package, epsilon)
    brief = ("--reference", source, "--tokens", "4", "--prompt-tokens", "16", "--bisect")
    said = run("validate", package, *brief, "--json")
    assert said.exit_code == 1
    finding = json.loads(said.output)["bisect"]["finding"]
    assert (finding["layer"], finding["module"]) == ("layer 1", "post_attention_layernorm")
    said = run("validate", package, *brief, "--adapter", folders["qv"])
    assert said.exit_code == 2 and "--bisect examines only the base" in said.output


@pytest.mark.parametrize("case", ["gptq act-order", "awq"])
def test_an_adapter_beside_codes_that_are_taken_over(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """What merging would quantize a second time."""
    how, written, config = CASES[case]
    quantized = write(tmp_path / "base", quantize_model(config, **how), config=config, **written)
    with pytest.raises(UsageError, match=r"keep the adapter separate \(--keep-adapter\)"):
        export_package(
            quantized, tmp_path / "out", TARGET, Options("int4"), adapters=[folders["qv"]]
        )
    out = tmp_path / "out"
    export_package(quantized, out, TARGET, EXPORTS["int4"], kept={"qv": folders["qv"]})
    expected = peft_logits(peft_model(out, folders["qv"]), IDS)
    found = onnx_logits(out, "qv")
    assert np.abs(found - expected).max() <= MAX_ABS
    assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected)


@pytest.mark.parametrize("verb", ["export", "plan"])
def test_keeping_nothing_is_a_wrong_call(source: Path, tmp_path: Path, verb: str) -> None:
    out = [tmp_path / "out"] if verb == "export" else []
    said = run(verb, source, *out, "--keep-adapter")
    assert said.exit_code == 2
    assert "--keep-adapter needs at least one --adapter to keep." in said.output


# --- names --------------------------------------------------------------------------------


def test_names_are_the_folders_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path / "a=b")
    assert named_adapters([f"{tmp_path}/x/"]) == {"x": tmp_path / "x"}
    assert named_adapters(["."]) == {"a=b": Path()}
    assert named_adapters([f"{tmp_path}/a=b"]) == {"a=b": tmp_path / "a=b"}
    assert named_adapters(["n=x", "ü=y/z=1"]) == {"n": Path("x"), "ü": Path("y/z=1")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a/last", "b/last"], r"two adapters are called 'last': .* NAME=b/last"),
        (["x=a", "x=b"], r"two adapters are called 'x': .* NAME=b\."),
        (["x=a", "X=b"], r"the names 'x' and 'X' differ only in case"),
        (["=a"], r"'' is not a valid file name for an adapter"),
        (["a/b=a"], r"'a/b' is not a valid file name"),
        (["a\\b=a"], r"is not a valid file name"),
        (["..=a"], r"'\.\.' is not a valid file name"),
        (["x.=a"], r"'x\.' is not a valid file name"),
        (["a:b=a"], r"'a:b' is not a valid file name"),
        (["nul=a"], r"'nul' is not a valid file name"),
        (["\udcff=a"], r"is not a valid file name"),
        (["x" * 61 + "=a"], r"is not a valid file name"),
        (["Com1.x=a"], r"'Com1\.x' is not a valid file name"),
    ],
)
def test_names_that_cannot_be_files(source: Path, values: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_kept(open_checkpoint(source), named_adapters(values))


@given(st.text(max_size=12))
def test_a_name_that_is_taken_makes_one_file_in_the_folder(name: str) -> None:
    try:
        module._check_names({name: Path("x")})
    except UsageError:
        return
    file = Path("package/adapters", f"{name}.onnx_adapter")
    assert file.parent == Path("package/adapters")
    assert not set(name) & set('<>:"/\\|?*\0\n')


# --- what an export makes of them ---------------------------------------------------------


def test_a_resumed_export_has_the_same_files(
    source: Path, folders: dict[str, Path], kept: Callable[[str], Path], tmp_path: Path
) -> None:
    out, options = tmp_path / "out", EXPORTS["fp32"]
    with pytest.raises(KeyboardInterrupt):
        export_package(
            source, out, TARGET, options, kept=folders, progress=Stop(12, KeyboardInterrupt())
        )
    others = {"other": folders["qv"], **{n: folders[n] for n in NAMES[1:]}}
    for wrong in ({"qv": folders["qv"]}, others):
        with pytest.raises(UsageError, match=r"adapters.* changed since it was begun"):
            export_package(source, out, TARGET, options, kept=wrong, resume=True)
    assert export_package(source, out, TARGET, options, kept=folders, resume=True).resumed_bytes
    found, expected = (ModelPackage.open(p).manifest["files"] for p in (out, kept("fp32")))
    assert found == expected


def test_an_adapter_that_changed_is_not_resumed(
    source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "qv", factors(QV))
    out, options = tmp_path / "out", EXPORTS["fp32"]
    with pytest.raises(KeyboardInterrupt):
        export_package(
            source,
            out,
            TARGET,
            options,
            kept={"qv": folder},
            progress=Stop(12, KeyboardInterrupt()),
        )
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="adapters changed since it was begun"):
        export_package(source, out, TARGET, options, kept={"qv": folder}, resume=True)


def test_a_pickled_adapter_makes_the_same_file(
    source: Path, folders: dict[str, Path], kept: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["qv"], tmp_path / "qv"))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    out = tmp_path / "out"
    export_package(source, out, TARGET, EXPORTS["fp32"], kept={"qv": folder})
    found = read_parameters(out / "adapters" / "qv.onnx_adapter")
    expected = read_parameters(kept("fp32") / "adapters" / "qv.onnx_adapter")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    files = ModelPackage.open(out).adapters["qv"]["source"]["files"]
    assert set(files) == {"adapter_config.json", "adapter_model.bin"}


def test_licences_travel_and_the_adapter_s_is_not_the_base_s(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "base", licences=False)
    folder = write_adapter(tmp_path / "qv", factors(QV))
    (folder / "LICENSE").write_text("the adapter's", encoding="utf-8")
    out = tmp_path / "out"
    result = export_package(
        source, out, TARGET, Options("int4", quantizer="rtn"), kept={"qv": folder}
    )
    assert (out / "LICENSE").read_text(encoding="utf-8") == "the adapter's"
    assert any("base has no license file" in warning for warning in result.warnings)


def test_a_tokenizer_of_its_own_is_said_to_be_left_out(source: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "qv", factors(QV))
    tiny.write_tokenizer(folder, 288)
    options, kept = Options("int4", quantizer="rtn"), {"qv": folder}
    assert export_package(source, tmp_path / "same", TARGET, options, kept=kept).warnings == ()
    tiny.write_tokenizer(folder, 280)
    (warning,) = export_package(source, tmp_path / "other", TARGET, options, kept=kept).warnings
    assert (
        "tokenizer.json differs from the package's tokenizer" in warning and "adapter qv" in warning
    )


def test_the_plan_counts_adapters(
    source: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(source)
    plain = make_plan(checkpoint, TARGET, Options("int4"), 2)
    (one,) = open_kept(checkpoint, {"qv": folders["qv"]})
    values = [a.size + b.size for a, b in factors(QV).values()]
    assert one.nbytes == 4 * sum(values)
    planned = make_plan(checkpoint, TARGET, Options("int4"), 2, [one])
    assert planned.adapter_bytes == one.nbytes
    assert planned.data_bytes == plain.data_bytes
    more = planned.to_json()["disk_bytes"] - plain.to_json()["disk_bytes"]
    assert more == one.nbytes
    # One so large that writing it is what takes the memory.
    wide = replace(one, changes={str(i): c for i, c in enumerate(one.changes.values())})
    left = next(iter(one.changes.values())).left
    huge = replace(wide.changes["0"], left=replace(left, shape=(1 << 20, 400)))
    heavy = replace(one, changes={"x.q_proj": huge})
    grown = make_plan(checkpoint, TARGET, Options("int4"), 2, [one, heavy]).peak_memory
    assert grown - plain.peak_memory > 2 * heavy.nbytes
    free = planned.to_json()["disk_bytes"]
    for short in (0, 1):
        usage = SimpleNamespace(free=free - short)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(ResourceError) if short else nullcontext():
            require_disk(planned, tmp_path)


# --- adapters for a package that stands ---------------------------------------------------


@pytest.fixture
def half(source: Path, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A package with one adapter; its graph has a place for all of MLP and attention."""
    return export_package(
        source, tmp_path / "half", TARGET, EXPORTS["fp32"], kept={"alle ü": folders["alle ü"]}
    ).package


def test_adapters_can_be_added_and_the_rest_stays_as_it_is(
    half: Path, kept: Callable[[str], Path], source: Path, folders: dict[str, Path]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in half.iterdir() if file.is_file()}
    folder = folders["qv"]
    (folder / "README.md").write_text("a card", encoding="utf-8")
    try:
        choices = (f"qv={folder}", folders["few"], "--base", source)
        said = run("adapter", "add", half, *choices)
    finally:
        (folder / "README.md").unlink()
    assert (said.exit_code, said.output) == (
        0,
        f"{half} now also has qv, few; opened and ran a step with each.\n",
    )
    changed = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {"manifest.json"}
    package = ModelPackage.open(half)
    assert package.verify() == []
    assert (half / "MODEL_CARD-qv.md").read_text(encoding="utf-8") == "a card"
    whole = ModelPackage.open(kept("fp32"))
    assert package.adapters == whole.adapters
    files = {name: entry for name, entry in package.manifest["files"].items() if "CARD" not in name}
    assert files == whole.manifest["files"]
    for name in NAMES:
        assert text(Llama.load(half), name) == text(Llama.load(kept("fp32")), name)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("ALLE Ü=few", r"half already has an adapter 'ALLE Ü': pass another name"),
        ("wide=wide", r"the adapter was made for another base"),
        ("nan=nan", r"v_proj\.lora_B\.weight holds NaN"),
    ],
)
def test_a_package_is_as_it_was_when_an_adapter_cannot_be_added(
    half: Path,
    source: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    adapter: str,
    message: str,
) -> None:
    broken = factors(QV)
    broken[attention(1, "v")[0]][1][2, 1] = np.nan
    made = {
        "few": folders["few"],
        "wide": write_adapter(
            tmp_path / "wide", factors(QV, replace(tiny.GQA, hidden_size=128, head_dim=32))
        ),
        "nan": write_adapter(tmp_path / "nan", broken),
    }
    name, _, folder = adapter.partition("=")
    before = {file: file.read_bytes() for file in half.rglob("*") if file.is_file()}
    with pytest.raises(LlamaOnnxError, match=message):
        add_adapters(half, open_checkpoint(source), {name: made[folder]})
    # One that would do does not come in with one that does not.
    with pytest.raises(LlamaOnnxError, match=message):
        add_adapters(half, open_checkpoint(source), {"qv": folders["qv"], name: made[folder]})
    assert {file: file.read_bytes() for file in half.rglob("*") if file.is_file()} == before


def test_a_graph_without_a_place_for_an_adapter_says_so(
    package_fp32: Path, source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = alter_package(package_fp32, tmp_path / "out")
    message = r"qv changes q_proj, v_proj, which the graph of .*out cannot swap: export it"
    with pytest.raises(UsageError, match=message):
        add_adapters(out, open_checkpoint(source), {"qv": folders["qv"]})
    larger = tiny.write_huggingface(tmp_path / "larger", replace(tiny.GQA, num_hidden_layers=4))
    with pytest.raises(UsageError, match=r"was not made from .*larger: num_hidden_layers is 3"):
        add_adapters(out, open_checkpoint(larger), {"qv": folders["qv"]})


def test_added_as_json(half: Path, source: Path, folders: dict[str, Path]) -> None:
    said = run("adapter", "add", half, f"x={folders['few']}", "--base", source, "--json")
    assert (said.exit_code, json.loads(said.stdout)) == (
        0,
        {"package": str(half), "added": ["x"], "warnings": []},
    )


def test_the_old_call_names_the_new_one(half: Path, source: Path, folders: dict[str, Path]) -> None:
    before = (half / "manifest.json").read_bytes()
    said = run("export", source, half, "--adapter", folders["qv"], "--keep-adapter", "--add")
    assert said.exit_code == 2
    assert f"use `llama-onnx adapter add {half} NAME=DIR --base {source}`" in said.output
    assert (half / "manifest.json").read_bytes() == before


def test_an_adapter_can_only_be_added_to_a_package(source: Path, folders: dict[str, Path]) -> None:
    said = run("adapter", "add", source, f"x={folders['few']}", "--base", source)
    assert said.exit_code == 1 and "is not a llama-onnx package" in said.output


def test_a_full_disk_is_said_to_be_one(
    half: Path, source: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("Failed to write :100 bytes\n")

    monkeypatch.setattr(ort.AdapterFormat, "export_adapter", fail)
    with pytest.raises(ResourceError, match=r"qv\.onnx_adapter cannot be written, perhaps .* full"):
        add_adapters(half, open_checkpoint(source), {"qv": folders["qv"]})
    assert [file.name for file in (half / "adapters").iterdir()] == ["alle ü.onnx_adapter"]


# --- adapters that cannot be kept ---------------------------------------------------------


def refusal(source: Path, folder: Path, tmp_path: Path) -> LlamaOnnxError:
    """Why `folder` cannot be kept; nothing is left of the attempt."""
    out = tmp_path / "out"
    with pytest.raises(LlamaOnnxError) as caught:
        export_package(source, out, TARGET, Options("int4", quantizer="rtn"), kept={"x": folder})
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    return caught.value


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head"])
def test_a_changed_embedding_or_head_cannot_be_swapped(
    source: Path, tmp_path: Path, name: str
) -> None:
    folder = write_adapter(tmp_path / "x", factors({**QV, name: 4}))
    error = refusal(source, folder, tmp_path)
    assert isinstance(error, UnsupportedError)
    assert f"changes {name}, which cannot be swapped at run time: merge this" in str(error)


@pytest.mark.parametrize("name", ["lm_head", "model.norm", "model.layers.1.mlp.down_proj"])
def test_a_module_trained_whole_cannot_be_swapped(source: Path, tmp_path: Path, name: str) -> None:
    whole = {name: tiny.weights(tiny.GQA, seed=5)[f"{name}.weight"]}
    folder = write_adapter(tmp_path / "x", factors(QV), whole, modules_to_save=[name])
    error = refusal(source, folder, tmp_path)
    assert isinstance(error, UnsupportedError)
    assert f"replaces {name}, which cannot be swapped" in str(error)


def test_an_adapter_of_another_base(source: Path, tmp_path: Path) -> None:
    wider = replace(tiny.GQA, hidden_size=128, head_dim=32)
    folder = write_adapter(tmp_path / "x", factors(QV, wider))
    assert "the adapter was made for another base" in str(refusal(source, folder, tmp_path))


@pytest.mark.parametrize("part", [0, 1])
def test_nan_in_an_adapter_names_the_tensor(source: Path, tmp_path: Path, part: int) -> None:
    changes = factors(QV)
    name = attention(1, "v")[0]
    changes[name][part][2, 1] = np.nan
    error = refusal(source, write_adapter(tmp_path / "x", changes), tmp_path)
    assert isinstance(error, CheckpointError)
    assert f"{name}.lora_{'AB'[part]}.weight holds NaN or infinity" in str(error)


def test_an_adapter_too_large_for_its_file(
    source: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert "more than the 2 GiB that" in str(refusal(source, folders["qv"], tmp_path))


@pytest.mark.parametrize("keep", [True, False])
def test_a_package_that_holds_an_adapter_is_not_replaced_by_another(
    source: Path, package: Path, tmp_path: Path, keep: bool
) -> None:
    out = alter_package(package, tmp_path / "out")
    folder = write_adapter(out / "x", factors(QV))
    given: dict[str, Any] = {"kept": {"x": folder}} if keep else {"adapters": [folder]}
    with pytest.raises(UsageError, match=r"out holds the source .*/x, which the package would"):
        export_package(source, out, TARGET, Options("int4"), force=True, **given)
    assert (folder / "adapter_model.safetensors").exists()


def test_what_is_no_adapter(source: Path, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in str(refusal(source, tmp_path / "nope", tmp_path))
