"""Settings of adapters as people find them: what PEFT loads is merged as PEFT merges it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from llama_onnx.exporter.checkpoints import adapter_config
from llama_onnx.exporter.packaging.adapters import open_kept
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError
from tests.support import tiny
from tests.support.adapters import attention, factors, write_adapter

QV = [name for layer in range(3) for name in attention(layer, "q", "v")]
ALL = [name for layer in range(3) for name in attention(layer, "q", "k", "v", "o")]


@dataclass(frozen=True)
class Case:
    """The rank of the change of each module, the settings, and a word of the warning, if any."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = tuple(QV)
    rank: int = 4
    dtype: str = "fp32"
    saved: tuple[str, ...] = ()
    warning: str = ""


CASES = {
    "names the base does not have": Case(
        {"target_modules": ["q_proj", "v_proj", "query_key_value", "dense"]},
        warning="query_key_value, dense, which the base does not have",
    ),
    "fan_in_fan_out": Case({"fan_in_fan_out": True}, warning="fan_in_fan_out"),
    "no lora_alpha": Case({"lora_alpha": None}),
    "no r": Case({"r": None}, rank=8),
    "no target_modules": Case({"target_modules": None}),
    "alpha 0": Case({"lora_alpha": 0}),
    "alpha below 1": Case({"lora_alpha": 0.5}),
    "bias that a Llama does not have": Case({"bias": "all"}),
    "bias of the changed layers": Case({"bias": "lora_only"}),
    "empty lists": Case({"modules_to_save": [], "exclude_modules": [], "target_parameters": []}),
    "empty layers_pattern": Case(
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""},
        tuple(attention(1, "q")),
    ),
    "no layers": Case({"layers_to_transform": []}),
    "a full name beside layers": Case(
        {"target_modules": [QV[0], "v_proj"], "layers_to_transform": [2]},
        (QV[0], *attention(2, "v")),
    ),
    "suffixes": Case(
        {"target_modules": ["self_attn.q_proj", "layers.0.mlp.up_proj"]},
        (
            *(name for layer in range(3) for name in attention(layer, "q")),
            "model.layers.0.mlp.up_proj",
        ),
    ),
    "a pattern with anchors": Case(
        {"target_modules": r"^model\.layers\.1\..*(q_proj|down_proj)$"},
        (*attention(1, "q"), "model.layers.1.mlp.down_proj"),
    ),
    "exclude a suffix": Case(
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        tuple(QV[1:]),
    ),
    "exclude a pattern": Case(
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}, tuple(QV[2:])
    ),
    "a rank and an alpha by pattern": Case(
        {
            "rank_pattern": {r"layers\.\d+\.self_attn\.[qv]_proj": 4},
            "r": 2,
            "alpha_pattern": {"q_proj": 3},
        }
    ),
    "all-linear in capitals": Case(
        {"target_modules": "ALL-LINEAR", "exclude_modules": r".*mlp.*"}, tuple(ALL)
    ),
    "bf16": Case(dtype="bf16"),
    "EVA": Case({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    "Gaussian": Case({"init_lora_weights": "gaussian"}),
    "not initialized": Case({"init_lora_weights": False}),
    "settings of an initialization that was not used": Case(
        {"loftq_config": {"loftq_bits": 4}, "corda_config": {}, "lora_ga_config": {}}
    ),
    "VeLoRA": Case({"velora_config": {"num_groups": 4}}),
    "settings without an effect": Case(
        {
            "inference_mode": True,
            "lora_dropout": 0.3,
            "revision": "main",
            "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
            "megatron_core": "megatron.core",
            "runtime_config": {"ephemeral_gpu_offload": False},
            "qalora_group_size": 16,
            "peft_version": "0.99.0",
        }
    ),
    "a setting of the future": Case({"some_future_key": 3}, warning="some_future_key is not a"),
    "settings of 2023": Case({"enable_lora": [True], "merge_weights": True}),
    "saved modules, one unknown": Case(
        {"modules_to_save": ["norm", "lm_head", "score"]},
        saved=("model.norm", "lm_head"),
        warning="modules_to_save names score",
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("base"))


def peft_model(source: Path, folder: Path) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def written(case: Case, folder: Path) -> Path:
    changes = factors(dict.fromkeys(case.modules, case.rank))
    other = tiny.weights(tiny.GQA, 5)
    norms = [
        f"model.layers.{i}.{n}_layernorm" for i in range(3) for n in ("input", "post_attention")
    ]
    names = (*case.saved, *(norms if "model.norm" in case.saved else ()))
    whole = {name: other[f"{name}.weight"] for name in names}
    return write_adapter(folder, changes, whole, dtype=case.dtype, **case.settings)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_weights_are_peft_s(source: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = written(case, tmp_path / "adapter")
    checkpoint = open_checkpoint(source, [folder])
    merged = peft_model(source, folder).merge_and_unload().state_dict()
    base = tiny.weights(tiny.GQA)
    changed = set()
    for tensor, original in base.items():
        expected = merged[tensor].numpy()
        found = checkpoint.tensor(tensor).rows(0, len(original))
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6, err_msg=tensor)
        if not np.array_equal(expected, original):
            changed.add(tensor.removesuffix(".weight"))
    if case.settings.get("lora_alpha") != 0:
        assert changed >= {*case.modules, *case.saved}
    assert len(checkpoint.warnings()) == bool(case.warning)
    assert case.warning in "".join(checkpoint.warnings())


def test_kept_adapters_with_quirks_give_peft_s_logits(source: Path, tmp_path: Path) -> None:
    from llama_onnx.exporter.packaging.adapters import read_parameters

    kept = {
        "a": written(CASES["fan_in_fan_out"], tmp_path / "a"),
        "b": written(CASES["names the base does not have"], tmp_path / "b"),
        "c": written(CASES["no lora_alpha"], tmp_path / "c"),
    }
    result = export_package(source, tmp_path / "out", TARGET, Options("fp32"), kept=kept)
    assert len([text for text in result.warnings if "as PEFT does" in text]) == 2
    ids = np.random.default_rng(0).integers(3, 288, 30)
    for adapter in open_kept(open_checkpoint(source), kept):
        values = read_parameters(result.package / adapter.file)
        found = GraphSession.open(result.package, values).step(ids)[0]
        with torch.inference_mode():
            model = peft_model(source, kept[adapter.name])
            expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-3


def test_null_values_are_read_as_the_defaults(source: Path, tmp_path: Path) -> None:
    """PEFT fails on some of them with an error of its own."""
    import json

    folder = written(Case(), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    keys = (
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "exclude_modules",
        "use_dora",
        "bias",
    )
    path.write_text(json.dumps(raw | dict.fromkeys(keys) | {"layers_pattern": ""}))
    plain = written(Case(), tmp_path / "plain")
    found, expected = (open_checkpoint(source, [one]) for one in (folder, plain))
    name = f"{QV[0]}.weight"
    np.testing.assert_array_equal(found.tensor(name).rows(0, 64), expected.tensor(name).rows(0, 64))


def test_no_name_that_matches_is_an_error_as_in_peft(source: Path, tmp_path: Path) -> None:
    folder = written(Case({"target_modules": ["c_attn"]}), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not target"):
        open_checkpoint(source, [folder])
    with pytest.raises(ValueError, match="not found in the base model"):
        peft_model(source, folder)


def test_every_setting_of_peft_is_decided() -> None:
    """Read, known to have no effect, or refused: a new version of PEFT shows here what it adds."""
    known = adapter_config._KNOWN.union(adapter_config._REFUSED)
    assert LoraConfig.__dataclass_fields__.keys() - known == set()
