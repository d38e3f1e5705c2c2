"""LoRA adapters, merged while streaming: against the equations, and every bad adapter by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.checkpoint import check_tensors
from llama_onnx.exporter.model.config import MATRICES, LlamaConfig
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.reference.walk import reference_config
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError, UsageError
from llama_onnx.targets.package import ModelPackage
from tests.support import adapters, tiny
from tests.support.adapters import Array, attention, factors, merged, write_adapter
from tests.support.packages import Stop

TIED = replace(tiny.GQA, tie_word_embeddings=True)
FP32 = Options("fp32")
LINEAR = [f"model.layers.{layer}.{name}" for layer in range(3) for name in MATRICES]
QV = [name for layer in range(3) for name in attention(layer, "q", "v")]
QV_RANKS = dict.fromkeys(QV, 4)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MAX_ABS, RELATIVE = 1e-3, 1e-5  # those of test_graph


@dataclass(frozen=True)
class Case:
    """Which modules change, with what rank and scaling, and how adapter_config.json says so."""

    ranks: Mapping[str, int]
    scaling: Mapping[str, float] | float
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: LlamaConfig = tiny.GQA


def _scalings(value: float, **others: float) -> dict[str, float]:
    """`value` for every linear layer but those whose last name is in `others`."""
    return {name: others.get(name.rpartition(".")[2], value) for name in LINEAR}


CASES = {
    "names": Case(QV_RANKS, 2.0),
    "rank-stabilized": Case(QV_RANKS, 4.0, {"use_rslora": True}),
    "alpha is no multiple": Case(QV_RANKS, 0.75, {"lora_alpha": 3}),
    "pattern": Case(
        dict.fromkeys([*attention(0, "q", "k"), *attention(2, "q", "k")], 4),
        2.0,
        {"target_modules": r"model\.layers\.(0|2)\.self_attn\.[qk]_proj"},
    ),
    "all-linear": Case(dict.fromkeys(LINEAR, 4), 2.0, {"target_modules": "all-linear"}),
    "full names": Case(
        {"model.layers.1.mlp.up_proj": 4}, 2.0, {"target_modules": ["1.mlp.up_proj"]}
    ),
    "excluded": Case(
        dict.fromkeys(attention(1, "q", "k", "o"), 4),
        2.0,
        {
            "target_modules": r".*layers\.1\.self_attn\..*",
            "exclude_modules": ["v_proj"],
        },
    ),
    "layers": Case(
        dict.fromkeys(attention(1, "o"), 4),
        2.0,
        {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "layers without pattern": Case(
        dict.fromkeys([*attention(0, "o"), *attention(2, "o")], 4),
        2.0,
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    ),
    "ranks and alphas of their own": Case(
        {name: 2 if "down_proj" in name else 4 for name in LINEAR},
        # down_proj: 8 / 2; k_proj: 32 / 4; the others 8 / 4
        _scalings(2.0, down_proj=4.0, k_proj=8.0),
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.k_proj": 32},
        },
    ),
    "embedding and head": Case({EMBEDDING: 4, HEAD: 4}, 2.0),
    "head of a tied model": Case({HEAD: 4}, 2.0, config=TIED),
    "embedding of a tied model": Case({EMBEDDING: 4}, 2.0, config=TIED),
}


def all_weights(config: LlamaConfig) -> dict[str, Array]:
    """The tiny weights; a tied model's head is the embedding."""
    weights = tiny.weights(config)
    return {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlamaConfig], Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {c: tiny.write_huggingface(root / str(i), c) for i, c in enumerate((tiny.GQA, TIED))}
    return made.__getitem__


@pytest.fixture(scope="module")
def source(sources: Callable[[LlamaConfig], Path]) -> Path:
    return sources(tiny.GQA)


def adapter(folder: Path, **settings: Any) -> Path:
    return write_adapter(folder, factors(QV_RANKS), **settings)


def package_weights(package: Path) -> dict[str, Array]:
    checkpoint = PackageCheckpoint.open(package)
    tensors = map(checkpoint.tensor, checkpoint.names())
    return {tensor.name: tensor.rows(0, tensor.shape[0]) for tensor in tensors}


def assert_weights(package: Path, expected: Mapping[str, Array]) -> None:
    found = package_weights(package)
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        # float32 sums of a handful of products of order one
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=4e-6, err_msg=name)


def assert_logits(package: Path, config: LlamaConfig, weights: Mapping[str, Array]) -> None:
    """The package's logits against transformers' own model on `weights`, never tied."""
    untied = replace(config, tie_word_embeddings=False)
    model: torch.nn.Module = transformers.LlamaForCausalLM(reference_config(untied))
    model.eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 40)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = GraphSession.open(package).step(ids)[0]
    assert np.abs(found - expected).max() <= MAX_ABS
    assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected)


# --- merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_those_of_the_equations(
    sources: Callable[[LlamaConfig], Path], tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    changes = factors(case.ranks, case.config)
    folder = write_adapter(tmp_path / "adapter", changes, **case.settings)
    expected = merged(all_weights(case.config), changes, case.scaling)
    out = tmp_path / "out"
    export_package(sources(case.config), out, TARGET, FP32, adapters=[folder])
    assert_weights(out, expected)
    assert_logits(out, case.config, expected)


@pytest.mark.parametrize("config", [tiny.GQA, TIED], ids=["untied", "tied"])
def test_modules_trained_whole_replace_the_base(
    sources: Callable[[LlamaConfig], Path], tmp_path: Path, config: LlamaConfig
) -> None:
    names = ["model.norm", HEAD, EMBEDDING]
    names += [f"model.layers.{i}.{n}" for i in range(3) for n in ("input_layernorm",)]
    names += [f"model.layers.{i}.post_attention_layernorm" for i in range(3)]
    other = tiny.weights(tiny.GQA, seed=5)
    whole = {name: other[f"{name}.weight"] for name in names}
    changes = factors(QV_RANKS)
    # `norm` means every module whose name ends so, as it does for PEFT.
    folder = write_adapter(
        tmp_path / "adapter", changes, whole, modules_to_save=["norm", "lm_head", "embed_tokens"]
    )
    expected = merged(all_weights(config), changes, 2.0)
    expected |= {f"{name}.weight": value for name, value in whole.items()}
    out = tmp_path / "out"
    export_package(sources(config), out, TARGET, FP32, adapters=[folder])
    assert_weights(out, expected)
    assert_logits(out, config, expected)


def test_only_the_head_of_a_tied_model_changes_and_the_embedding_stays(
    sources: Callable[[LlamaConfig], Path], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", factors({HEAD: 4}))
    checkpoint = open_checkpoint(sources(TIED), [folder])
    check_tensors(checkpoint)
    assert not checkpoint.config.tie_word_embeddings
    table = checkpoint.tensor("model.embed_tokens.weight").rows(0, 288)
    np.testing.assert_array_equal(table, all_weights(TIED)["model.embed_tokens.weight"])
    assert checkpoint.tensor("lm_head.weight").name == "lm_head.weight"
    assert not np.allclose(checkpoint.tensor("lm_head.weight").rows(0, 288), table, atol=0.1)


def test_a_tied_model_stays_tied_when_its_embedding_is_left_alone(
    sources: Callable[[LlamaConfig], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(sources(TIED), [adapter(tmp_path / "adapter")])
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in set(checkpoint.names())


def test_an_embedding_saved_unasked_is_the_base_of_its_change(source: Path, tmp_path: Path) -> None:
    """PEFT saves `base_layer.weight` beside the change of a targeted embedding."""
    table = tiny.weights(tiny.GQA, seed=7)["model.embed_tokens.weight"]
    changes = factors({EMBEDDING: 4})
    extra = {f"{adapters.PREFIX}{EMBEDDING}.base_layer.weight": table}
    folder = write_adapter(tmp_path / "adapter", changes, extra=extra)
    found = open_checkpoint(source, [folder]).tensor(f"{EMBEDDING}.weight").rows(0, 288)
    expected = merged({f"{EMBEDDING}.weight": table}, changes, 2.0)[f"{EMBEDDING}.weight"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def test_several_adapters_are_merged_in_order(source: Path, tmp_path: Path) -> None:
    first, second = factors(QV_RANKS), factors({HEAD: 2, **dict.fromkeys(QV, 2)}, seed=2)
    head = tiny.weights(tiny.GQA, seed=5)["lm_head.weight"]
    folders = [
        write_adapter(tmp_path / "a" / "last", first, {HEAD: head}, modules_to_save=["lm_head"]),
        write_adapter(tmp_path / "b" / "last", second, r=2, lora_alpha=3),
    ]
    expected = merged(all_weights(tiny.GQA) | {"lm_head.weight": head}, first, 2.0)
    expected = merged(expected, second, 1.5)
    out = tmp_path / "out"
    export_package(source, out, TARGET, FP32, adapters=folders)
    assert_weights(out, expected)
    manifest = ModelPackage.open(out).manifest
    assert manifest["source"]["adapters"] == ["last", "last"]
    files = [name for name in manifest["source"]["files"] if name.startswith("adapter ")]
    assert files == [
        f"adapter {number}/{name}"
        for number in (1, 2)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    # The other way round, the first one's head takes the place of the second one's.
    swapped = open_checkpoint(source, folders[::-1]).tensor("lm_head.weight")
    np.testing.assert_array_equal(swapped.rows(0, 288), head)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_adapters_are_merged_in_float32(
    source: Path, tmp_path: Path, dtype: str
) -> None:
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    changes = factors(QV_RANKS)
    folder = write_adapter(tmp_path / "adapter", changes, dtype=dtype)
    rounded = {module: (rounding(a, kind), rounding(b, kind)) for module, (a, b) in changes.items()}
    name = f"{QV[0]}.weight"
    expected = merged(all_weights(tiny.GQA), rounded, 2.0)[name]
    found = open_checkpoint(source, [folder]).tensor(name).rows(0, 64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


def rounding(value: Array, kind: torch.dtype) -> Array:
    rounded: Array = torch.from_numpy(value).to(kind).float().numpy()
    return rounded


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    changes = factors({EMBEDDING: 3, HEAD: 3, "model.layers.0.mlp.down_proj": 3})
    names = ["embed_tokens", "lm_head", "0.mlp.down_proj"]
    folder = write_adapter(tmp_path_factory.mktemp("mixed"), changes, r=3, target_modules=names)
    return open_checkpoint(source, [folder]), merged(all_weights(tiny.GQA), changes, 8 / 3)


@settings(deadline=None)
@given(data=st.data())
def test_any_rows(mixed: Any, data: st.DataObject) -> None:
    checkpoint, expected = mixed
    module = data.draw(st.sampled_from([EMBEDDING, HEAD, "model.layers.0.mlp.down_proj"]))
    tensor = checkpoint.tensor(f"{module}.weight")
    start = data.draw(st.integers(0, tensor.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, tensor.shape[0]))
    found = tensor.rows(start, stop)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[tensor.name][start:stop], rtol=0, atol=4e-6)


# --- what travels with an adapter ----------------------------------------------------------


def test_licences_of_base_and_adapter_travel_side_by_side(source: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "LICENSE.txt").write_text("another licence")
    (folder / "README.md").write_text("a card")
    out = export_package(source, tmp_path / "out", TARGET, FP32, adapters=[folder]).package
    assert (out / "LICENSE.txt").read_text() == "a licence"
    assert (out / "LICENSE-2.txt").read_text() == "another licence"
    assert (out / "MODEL_CARD.md").read_text() == "a card"
    assert ModelPackage.open(out).verify() == []


def test_the_tokenizer_saved_with_the_adapter_is_taken(source: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    tiny.write_tokenizer(folder, 288)
    (folder / "chat_template.jinja").write_text("the adapter's")
    written = open_checkpoint(source, [folder]).write_tokenizer(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "the adapter's"
    assert sorted(written) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


def test_without_one_the_base_s_tokenizer_is_taken(source: Path, tmp_path: Path) -> None:
    open_checkpoint(source, [adapter(tmp_path / "adapter")]).write_tokenizer(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE


# --- interruption ---------------------------------------------------------------------------


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    folders = [adapter(tmp_path / "one"), adapter(tmp_path / "two", lora_alpha=3)]
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_package(
            source, out, TARGET, FP32, adapters=folders, progress=Stop(12, KeyboardInterrupt())
        )
    return out, folders


def resume(source: Path, out: Path, folders: list[Path]) -> Any:
    return export_package(source, out, TARGET, FP32, adapters=folders, resume=True)


def test_resumed_with_the_same_adapters_gives_the_same_bytes(
    source: Path, tmp_path: Path, interrupted: tuple[Path, list[Path]]
) -> None:
    out, folders = interrupted
    assert resume(source, out, folders).resumed_bytes > 0
    whole = export_package(source, tmp_path / "whole", TARGET, FP32, adapters=folders).package
    assert (out / "model.onnx.data").read_bytes() == (whole / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("which", [0, 1])
def test_resume_refuses_an_adapter_that_changed(
    source: Path, interrupted: tuple[Path, list[Path]], file: str, which: int
) -> None:
    out, folders = interrupted
    os.utime(folders[which] / file, ns=(1, 1))
    with pytest.raises(UsageError, match="source changed since"):
        resume(source, out, folders)


def test_resume_refuses_fewer_adapters_and_another_order(
    source: Path, interrupted: tuple[Path, list[Path]]
) -> None:
    out, folders = interrupted
    for others in ([], folders[:1], folders[::-1]):
        with pytest.raises(UsageError, match="source changed since"):
            resume(source, out, others)


# --- the command line -----------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_export_plan_validate_and_inspect(source: Path, tmp_path: Path) -> None:
    folder, out = adapter(tmp_path / "my adapter"), tmp_path / "out"
    planned = run("plan", source, "--adapter", folder, "--precision", "fp32")
    assert planned.exit_code == 0 and "my adapter" in planned.output
    made = run("export", source, out, "--adapter", folder, "--precision", "fp32")
    assert made.exit_code == 0, made.output
    assert json.loads(run("inspect", out, "--json").output)["merged_adapters"] == ["my adapter"]
    brief = ("--tokens", "4", "--prompt-tokens", "16", "--json")
    proved = run("validate", out, "--reference", source, "--adapter", folder, *brief)
    assert proved.exit_code == 0, proved.output
    report = json.loads(proved.output)
    assert report["reference"] == f"{source} + {folder}"
    assert _lost(report) == 0
    # Against the bare base the same package is far off, and says so.
    bare = run("validate", out, "--reference", source, *brief)
    assert bare.exit_code == 1
    assert _lost(json.loads(bare.output)) > 1


def _lost(report: dict[str, Any]) -> float:
    entry = next(m for m in report["measurements"] if m["error"] == "quantization")
    return float(entry["figures"]["max_abs"])


@pytest.mark.parametrize("verb", ["export", "plan", "validate"])
def test_a_bad_adapter_is_one_sentence(
    source: Path, tmp_path: Path, package_fp32: Path, verb: str
) -> None:
    choices: dict[str, list[object]] = {
        "export": [source, tmp_path / "out"],
        "plan": [source],
        "validate": [package_fp32, "--reference", source],
    }
    found = run(verb, *choices[verb], "--adapter", tmp_path / "nowhere")
    assert found.exit_code == 1
    assert "has no adapter_config.json: pass the folder that PEFT saved." in found.output
    assert "Traceback" not in found.output
    assert list(tmp_path.iterdir()) == []


# --- bad adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only 'LORA'"),
        ({"peft_type": None}, r"peft_type is None; only 'LORA'"),
        ({"use_dora": True}, r"use_dora is set, which goes beyond plain LoRA"),
        ({"use_qalora": True}, r"use_qalora is set"),
        ({"lora_bias": True}, r"lora_bias is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication is set"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is set"),
        ({"target_parameters": ["a"]}, r"target_parameters is set"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4', which also changes the base"),
        ({"init_lora_weights": "loftq"}, r"init_lora_weights is 'loftq'"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(source, [adapter(tmp_path / "adapter", **settings)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r must be a positive integer, not 0"),
        ({"lora_alpha": "8"}, r"lora_alpha must be a number, not '8'"),
        ({"lora_alpha": float("nan")}, r"has NaN, which is not a JSON number"),
        ({"rank_pattern": {"q_proj": 0.5}}, r"rank_pattern must be a positive integer, not 0.5"),
        ({"rank_pattern": [4]}, r"rank_pattern must be an object, not \[4\]"),
        ({"alpha_pattern": {"(": 4}}, r"alpha_pattern '\(' is not a valid reg"),
        ({"target_modules": "(["}, r"target_modules '\(\[' is not a valid reg"),
        ({"target_modules": [3]}, r"target_modules must be a list of names, not \[3\]"),
        ({"layers_to_transform": "1"}, r"layers_to_transform must be layer numbers, not '1'"),
        # config and tensors contradict one another
        ({"r": 8}, r"q_proj has rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj has rank 4, but adapter_config.json says 2"),
        ({"target_modules": ["q_proj"]}, r"does not target model\.layers\.0\.self_attn\.v_proj"),
        ({"layers_to_transform": [0, 1]}, r"does not target model\.layers\.2\.self_attn\.q_proj"),
        (
            {"target_modules": ["q_proj", "v_proj", "k_proj"]},
            r"lacks the tensors that change model\.layers\.0\.self_attn\.k_proj",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "norm"]},
            r"'norm', but the base has no such matrix",
        ),
        ({"modules_to_save": ["score"]}, r"'score', but the base has no such module"),
        ({"modules_to_save": ["lm_head"]}, r"lacks the tensor base_model\.model\.lm_head\.weight"),
    ],
)
def test_a_config_that_is_wrong_or_contradicts_the_tensors(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(source, [adapter(tmp_path / "adapter", **settings)])
    assert not isinstance(caught.value, UnsupportedError)


Q0 = f"{adapters.PREFIX}{QV[0]}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.score.weight", r"score\.weight, which matches nothing in"),
        (f"{Q0}.lora_magnitude_vector", r"lora_magnitude_vector, which matches nothing in"),
        (f"{Q0}.lora_B.bias", r"lora_B\.bias, which matches nothing in"),
        (f"{Q0}.lora_embedding_A", r"lora_embedding_A, which matches nothing in"),
        (f"{Q0}.weight", r"q_proj\.weight, which modules_to_save .* does not name"),
        (
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
            r"layers\.3\..*, which matches nothing in .* made for another base \(somebody/",
        ),
    ],
)
def test_a_tensor_that_nothing_consumes(
    source: Path, tmp_path: Path, name: str, message: str
) -> None:
    extra = {name: np.zeros((4, 64), np.float32)}
    folder = write_adapter(tmp_path / "adapter", factors(QV_RANKS), extra=extra)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, [folder])


def test_an_adapter_of_a_wider_base(source: Path, tmp_path: Path) -> None:
    wider = replace(tiny.GQA, hidden_size=128, head_dim=32)
    folder = write_adapter(tmp_path / "adapter", factors(QV_RANKS, wider))
    message = r"q_proj of shape \[128, 128\], but the base's is \[64, 64\]: .* another base"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, [folder])


def test_an_embedding_s_change_for_another_vocabulary(source: Path, tmp_path: Path) -> None:
    larger = replace(tiny.GQA, vocab_size=320)
    folder = write_adapter(tmp_path / "adapter", factors({EMBEDDING: 4}, larger))
    with pytest.raises(CheckpointError, match=r"shape \[320, 64\], but the base's is \[288, 64\]"):
        open_checkpoint(source, [folder])


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (EMBEDDING, (290, 64), r"290 rows for model.embed_tokens, but the base 288: a resized"),
        (HEAD, (290, 64), r"290 rows for lm_head, but the base 288: a resized vocabulary"),
        (EMBEDDING, (288, 128), r"shape \[288, 128\], but the base's is \[288, 64\]"),
        ("model.layers.0.input_layernorm", (128,), r"shape \[128\], but the base's is \[64\]"),
    ],
)
def test_whole_modules_of_other_shapes(
    source: Path, tmp_path: Path, module: str, shape: tuple[int, ...], message: str
) -> None:
    whole = {module: np.ones(shape, np.float32)}
    folder = write_adapter(tmp_path / "adapter", factors(QV_RANKS), whole, modules_to_save=[module])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, [folder])


def test_a_change_that_is_no_matrix(source: Path, tmp_path: Path) -> None:
    changes = factors(QV_RANKS)
    changes[QV[0]] = (np.zeros(64, np.float32), changes[QV[0]][1])
    folder = write_adapter(tmp_path / "adapter", changes)
    with pytest.raises(CheckpointError, match=r"is damaged: the change of .*q_proj is not two mat"):
        open_checkpoint(source, [folder])


def test_ranks_of_a_and_b_that_differ(source: Path, tmp_path: Path) -> None:
    changes = factors(QV_RANKS)
    a, b = changes[QV[0]]
    folder = write_adapter(tmp_path / "adapter", {**changes, QV[0]: (a[:3], b)})
    with pytest.raises(CheckpointError, match=r"q_proj has rank 3 and 4, but .* says 4"):
        open_checkpoint(source, [folder])


def test_an_embedding_that_was_to_stay_tied(
    sources: Callable[[LlamaConfig], Path], tmp_path: Path
) -> None:
    folder = write_adapter(
        tmp_path / "adapter", factors({EMBEDDING: 4}, TIED), ensure_weight_tying=True
    )
    with pytest.raises(UnsupportedError, match="ensure_weight_tying with a changed embedding"):
        open_checkpoint(sources(TIED), [folder])
    assert not open_checkpoint(sources(tiny.GQA), [folder]).config.tie_word_embeddings


def test_an_adapter_without_anything(source: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", {})
    with pytest.raises(CheckpointError, match="changes nothing"):
        open_checkpoint(source, [folder])


def test_pickled_weights_are_merged_alike(source: Path, tmp_path: Path) -> None:
    """PEFT's older file, written by torch.save; nothing in it is run."""
    folder = adapter(tmp_path / "adapter")
    expected = open_checkpoint(source, [folder])
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(load_file(folder / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    found = open_checkpoint(source, [pickled])
    assert "adapter 1/adapter_model.bin" in found.fingerprint()
    for name in expected.names():
        there, here = (c.tensor(name).rows(0, 16) for c in (expected, found))
        assert np.array_equal(there, here), name


def test_code_in_pickled_weights_does_not_run(source: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Path("/")}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin asks for pathlib"):
        open_checkpoint(source, [folder])


def test_files_that_are_missing_or_damaged(source: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(source, [folder])
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        open_checkpoint(source, [folder])
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        open_checkpoint(source, [folder])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("part", [0, 1])
def test_nan_in_an_adapter_names_adapter_and_tensor(
    source: Path, tmp_path: Path, precision: str, part: int
) -> None:
    changes = factors(QV_RANKS)
    changes[QV[3]][part][2, 1] = np.nan
    folder = write_adapter(tmp_path / "adapter", changes)
    message = r"adapter: .* NaN or infinity in model\.layers\.1\.self_attn\.v_proj\.weight, rows"
    with pytest.raises(CheckpointError, match=message):
        export_package(source, tmp_path / "out", TARGET, Options(precision), adapters=[folder])
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_nan_in_a_module_trained_whole_names_the_adapter(source: Path, tmp_path: Path) -> None:
    head = np.full((288, 64), np.nan, np.float32)
    folder = write_adapter(tmp_path / "a", {}, {HEAD: head}, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"/a: .* NaN or infinity in lm_head\.weight"):
        export_package(source, tmp_path / "out", TARGET, FP32, adapters=[folder])


def test_nan_in_the_base_is_not_the_adapters(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights[f"{QV[3]}.weight"][2, 1] = np.nan
    source = tiny.write_huggingface(tmp_path / "base", tensors=weights)
    folder = write_adapter(tmp_path / "adapter", factors(QV_RANKS))
    with pytest.raises(
        CheckpointError, match=r"^model\.layers\.1\.self_attn\.v_proj\.weight, rows"
    ):
        export_package(source, tmp_path / "out", TARGET, FP32, adapters=[folder])
