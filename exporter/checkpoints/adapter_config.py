"""adapter_config.json as PEFT writes it: which modules an adapter changes, and by how much.

The matching rules are those of PEFT (`check_target_module_exists` and `get_pattern_key` in
https://github.com/huggingface/peft). A setting that changes the weights other than by plain LoRA is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama_onnx.exporter.checkpoints.patterns import Pattern, TimeLimit
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.model.typed_keys import MAX_NUMBER
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import printable, shown

CONFIG_FILE = "adapter_config.json"

# These leave the base unchanged; the others (PiSSA, OLoRA, LoftQ ...) move part of the base into
# the adapter, which is then wrong with the original weights.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)

# What PEFT 0.21 knows besides: read here, or without an effect on the finished adapter.
_KNOWN = frozenset(
    (
        *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias"),
        *("ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "peft_type"),
        *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "peft_version"),
        *("inference_mode", "lora_dropout", "eva_config", "loftq_config", "corda_config"),
        *("lora_ga_config", "velora_config", "megatron_core", "qalora_group_size"),
        *("runtime_config", "enable_lora", "merge_weights"),
    )
)

DEFAULT_RANK = DEFAULT_ALPHA = 8
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's values where adapter_config.json has none; the targets are those for a Llama."""

_MAX_ENTRIES = 5000  # of a list or object
_Number = TypeVar("_Number", int, float)
_Values = TypeVar("_Values", list[Any], dict[str, Any])


@dataclass(frozen=True)
class AdapterConfig:
    """A plain LoRA. Modules have their names in the base: `model.layers.0.self_attn.q_proj`.

    `where` is the path of the file. `targets` and `excluded` are names or a regular expression;
    `targets` None means every linear layer but the head. `saved` names the modules that were
    trained in full. `layers` None means all layers. `warnings` are for people.
    """

    where: Path
    base_name: str | None
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | Pattern | None
    excluded: tuple[str, ...] | Pattern
    saved: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[Pattern, ...]
    rank_pattern: Mapping[Pattern, int]
    alpha_pattern: Mapping[Pattern, float]
    keeps_tied: bool
    warnings: tuple[str, ...] = ()

    def adds_to(self, module: str) -> bool:
        """Return whether the linear layer or embedding `module` has a low-rank change."""
        if self.replaces(module) or _selects(self.excluded, module):
            return False
        if self.targets is None:
            return module not in ("lm_head", "model.embed_tokens")
        if isinstance(self.targets, tuple) and module in self.targets:
            return True  # by its full name, whatever the layers
        return _selects(self.targets, module) and self._has_layer_of(module)

    def replaces(self, module: str) -> bool:
        """Return whether `module` was trained in full."""
        return any(saves(name, module) for name in self.saved)

    def rank_of(self, module: str) -> int:
        """Return the rank of the change of `module`."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor of the change: alpha / r (Hu et al. 2021, arXiv:2106.09685, 4.1), or
        alpha / sqrt(r) if rank-stabilized (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _has_layer_of(self, module: str) -> bool:
        if self.layers is None:
            return True
        for pattern in self.layers_pattern:
            if match := pattern.match(module):
                return int(match["index"]) in self.layers
        return False


def saves(name: str, module: str) -> bool:
    """Return whether `name` in modules_to_save selects `module`: as the end of its name, or as a
    module that contains it."""
    return module.endswith(name) or f".{name}." in f".{module}."


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json in `folder`.

    Raises `CheckpointError` if it is missing or damaged, `UnsupportedError` for a method other than
    plain LoRA.
    """
    where = folder / CONFIG_FILE
    if not where.is_file():
        raise CheckpointError(_describe_missing(folder))
    raw = read_json(where)
    _refuse_methods(raw, where)
    limit = TimeLimit()
    layers = raw.get("layers_to_transform")
    base_name = raw.get("base_model_name_or_path")
    return AdapterConfig(
        where=where,
        base_name=printable(base_name[:200]) if isinstance(base_name, str) else None,
        rank=_rank(raw.get("r", DEFAULT_RANK), "r", where),
        alpha=_alpha(raw.get("lora_alpha", DEFAULT_ALPHA), "lora_alpha", where),
        rslora=bool(raw.get("use_rslora", False)),
        targets=_targets(raw.get("target_modules"), where, limit),
        excluded=_names_or_pattern(raw.get("exclude_modules"), "exclude_modules", where, limit),
        saved=_names(raw.get("modules_to_save"), "modules_to_save", where),
        layers=None if layers in (None, []) else _indices(layers, where),
        layers_pattern=_layers_patterns(raw.get("layers_pattern"), where, limit),
        rank_pattern={
            _key_pattern(key, "rank_pattern", where, limit): _rank(value, "rank_pattern", where)
            for key, value in _object(raw.get("rank_pattern"), "rank_pattern", where).items()
        },
        alpha_pattern={
            _key_pattern(key, "alpha_pattern", where, limit): _alpha(value, "alpha_pattern", where)
            for key, value in _object(raw.get("alpha_pattern"), "alpha_pattern", where).items()
        },
        keeps_tied=bool(raw.get("ensure_weight_tying", False)),
        warnings=tuple(_warnings(raw, where)),
    )


def _warnings(raw: Mapping[str, Any], where: Path) -> Iterator[str]:
    if raw.get("fan_in_fan_out"):
        yield (
            f"{where}: fan_in_fan_out is set, which does not apply to a Llama's linear layers: it "
            "is ignored, as PEFT does."
        )
    unknown = [key for key, value in raw.items() if value and key not in (*_KNOWN, *_REFUSED)]
    if unknown:
        yield (
            f"{where}: {printable(', '.join(unknown[:10]))} is not a setting of LoRA in PEFT "
            "0.21: it is ignored, as PEFT does."
        )


def _describe_missing(folder: Path) -> str:
    """Return the sentence about a folder without adapter_config.json, with what it is instead."""
    if folder.is_file():
        return f"{folder} is a file, not a folder: pass the folder that PEFT saved to --adapter."
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a model, not an adapter: pass it as SOURCE, without --adapter, if the "
            "adapter is merged into it."
        )
    return f"{folder} has no {CONFIG_FILE}: pass the folder that PEFT saved."


def _refuse_methods(raw: Mapping[str, Any], where: Path) -> None:
    method = raw.get("peft_type")
    if method != "LORA":
        raise UnsupportedError(f"{where}: peft_type is {shown(method)}; only 'LORA' can be merged.")
    for key in _REFUSED:
        if raw.get(key):
            raise UnsupportedError(
                f"{where}: {key} is set, which goes beyond plain LoRA: if PEFT can merge the "
                "adapter (merge_and_unload), export the result."
            )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, list | dict) or init not in _INITS:
        raise UnsupportedError(
            f"{where}: init_lora_weights is {shown(init)}, which also changes the base: convert "
            "the adapter to plain LoRA when saving it (path_initial_model_for_weight_conversion)."
        )


def _selects(names: tuple[str, ...] | Pattern, module: str) -> bool:
    if isinstance(names, Pattern):
        return names.fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[Pattern, _Number], module: str, default: _Number) -> _Number:
    for pattern, value in patterns.items():
        if pattern.match(module):
            return value
    return default


def _targets(value: Any, where: Path, limit: TimeLimit) -> tuple[str, ...] | Pattern | None:
    if value is None:
        return DEFAULT_TARGETS
    if isinstance(value, str) and value.lower() == "all-linear":
        return None
    return _names_or_pattern(value, "target_modules", where, limit)


def _names_or_pattern(
    value: Any, key: str, where: Path, limit: TimeLimit
) -> tuple[str, ...] | Pattern:
    if isinstance(value, str):
        return Pattern(value, f"{where}: {key}", limit)
    return _names(value, key, where)


def _names(value: Any, key: str, where: Path) -> tuple[str, ...]:
    values = value or []
    if not isinstance(values, list) or not all(v and isinstance(v, str) for v in values):
        raise CheckpointError(f"{where}: {key} must be a list of names, not {shown(value)}.")
    return tuple(_few(values, key, where))


def _layers_patterns(value: Any, where: Path, limit: TimeLimit) -> tuple[Pattern, ...]:
    names = _names([value] if value and isinstance(value, str) else value, "layers_pattern", where)
    label, form = f"{where}: layers_pattern", r"(?:^|.*?\.){}\.(?P<index>\d+)\."
    return tuple(Pattern(name, label, limit, form) for name in names or (r"[^.]*",))


def _key_pattern(text: str, key: str, where: Path, limit: TimeLimit) -> Pattern:
    return Pattern(text, f"{where}: {key}", limit, r"(.*\.)?({})$")


def _few(values: _Values, key: str, where: Path) -> _Values:
    # Each is compared with each module of the base.
    if len(values) > _MAX_ENTRIES:
        raise CheckpointError(f"{where}: {key} has {len(values):,} entries, more than a Llama has.")
    return values


def _indices(value: Any, where: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in values):
        raise CheckpointError(
            f"{where}: layers_to_transform must be layer numbers, not {shown(value)}."
        )
    return tuple(_few(values, "layers_to_transform", where))


def _object(value: Any, key: str, where: Path) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} must be an object, not {shown(value)}.")
    return _few(value or {}, key, where)


def _rank(value: Any, key: str, where: Path) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} must be a positive integer, not {shown(value)}.")
    return value


def _alpha(value: Any, key: str, where: Path) -> float:
    if type(value) not in (int, float) or abs(value) > MAX_NUMBER:
        raise CheckpointError(f"{where}: {key} must be a number, not {shown(value)}.")
    return float(value)
