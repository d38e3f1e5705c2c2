"""The settings of a checkpoint in compressed-tensors' format, which llm-compressor writes.

`quantization_config` in config.json has `config_groups`. Each is a scheme: how weights (and, if the
model was calibrated for it, activations) of the modules named in `targets` are quantized. A target
is the name of a module, a regular expression after "re:", or a class such as "Linear". Modules in
`ignore` are not quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.patterns import Pattern, TimeLimit
from llama_onnx.exporter.checkpoints.quantized.settings import WHOLE_ROW
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown

METHOD = "compressed-tensors"

PACKED = "pack-quantized"
"""The format with several codes in an int32."""

FORMATS = (PACKED, "int-quantized", "naive-quantized")
"""The formats that can be read. In the last two a code is an int8."""

_FLOATS = ("dense", "fakequant")  # formats of modules that are stored as floats
_REGEX = "re:"
_LINEAR = "Linear"
_MAX_TARGETS = 20_000
_BITS = (4, 8)

# Settings that change the model's results in ways that its codes do not show.
_MORE_THAN_CODES = ("transform_config", "sparsity_config", "moe_sparsity_config")


@dataclass(frozen=True)
class Scheme:
    """How a group of modules is quantized. `group_size` input channels share a scale (`WHOLE_ROW`:
    all of them). `one_scale`: the whole matrix has a single scale."""

    format: str
    bits: int
    group_size: int
    symmetric: bool
    one_scale: bool

    def describe(self) -> str:
        """Return bits, groups and symmetry, for display."""
        groups = f"groups of {self.group_size}"
        if self.group_size == WHOLE_ROW:
            groups = "one scale per matrix" if self.one_scale else "one group per row"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits}-bit, {groups}, {kind}, format {self.format}"


@dataclass(frozen=True)
class CompressedConfig:
    """The settings of a folder; `where` names their file. `schemes` has a scheme for each target,
    None for one whose weights are floats; `ignore` has targets that are not quantized. `warnings`
    say what is left out."""

    where: Path
    schemes: Mapping[str, Scheme | None]
    ignore: Sequence[str]
    warnings: tuple[str, ...]


class Targets:
    """Matches names of modules to the targets of `config`, within a limit of time for them all."""

    def __init__(self, config: CompressedConfig) -> None:
        limit = TimeLimit()

        def compiled(targets: Sequence[str]) -> dict[str, Pattern]:
            label = f"{config.where}: the target"
            return {
                target: Pattern(target.removeprefix(_REGEX), label, limit)
                for target in sorted(targets)
                if target.startswith(_REGEX)
            }

        self._config = config
        self._targets, self._ignore = compiled([*config.schemes]), compiled(config.ignore)
        self._ignored = frozenset(config.ignore)

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of the linear layer `module`; None if it is stored as floats. A name
        comes before a regular expression, and that before a class."""
        schemes = self._config.schemes
        ignored = self._ignored & {module, _LINEAR}
        if ignored or any(pattern.match(module) for pattern in self._ignore.values()):
            return None
        if module in schemes:
            return schemes[module]
        for target, pattern in self._targets.items():
            if pattern.match(module):
                return schemes[target]
        return schemes.get(_LINEAR)


def read_compressed_config(folder: Path, config: Mapping[str, Any]) -> CompressedConfig | None:
    """Return the settings of the checkpoint in `folder`, whose config.json holds `config`; None if
    it has none of compressed-tensors.

    Raises `UnsupportedError` for a format or scheme that is not supported, `CheckpointError` for an
    invalid value.
    """
    raw = config.get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        return None
    inner = raw.get("quantization_config")  # as some versions of transformers save it
    raw = {**raw, **inner} if isinstance(inner, dict) else raw
    where = folder / "config.json"
    for key in _MORE_THAN_CODES:
        value = raw.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise UnsupportedError(
                f"{where}: {key} is set, which is not supported: export the original weights."
            )
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: config_groups must be an object with schemes.")
    schemes: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        label = f"{where}: {shown(name)} in config_groups"
        if not isinstance(group, dict):
            raise UnsupportedError(
                f"{label} is not a scheme but {shown(group)}: save the model again with "
                "llm-compressor, which writes schemes out."
            )
        scheme = _scheme(group, raw.get("format"), label)
        schemes |= dict.fromkeys(_names(group.get("targets"), f"{label}: targets"), scheme)
    ignore = _names(raw.get("ignore") or [], f"{where}: ignore")
    if len(schemes) + len(ignore) > _MAX_TARGETS:
        raise CheckpointError(
            f"{where} names {len(schemes) + len(ignore):,} targets, more than {_MAX_TARGETS:,}."
        )
    return CompressedConfig(where, schemes, ignore, tuple(_warnings(raw, groups, where)))


def _scheme(group: Mapping[str, Any], default: Any, label: str) -> Scheme | None:
    weights = group.get("weights")
    kind = group.get("format") or default
    if weights is None or kind in _FLOATS:
        return None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{label}: weights must be an object, not {shown(weights)}.")
    if kind not in FORMATS or weights.get("type", "int") != "int":
        what = f"the format {shown(kind)}"
        if kind in FORMATS:
            what = f"weights of the type {shown(weights.get('type'))}"
        raise UnsupportedError(
            f"{label} has {what}, but only integers in {', '.join(FORMATS[:-1])} and "
            f"{FORMATS[-1]} can be read: export the original weights."
        )
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or bits not in _BITS:
        raise UnsupportedError(
            f"{label} has weights of {shown(bits)} bits, which are not supported, only those of 4 "
            "and 8: export the original weights."
        )
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{label}: symmetric must be true or false, not {shown(symmetric)}.")
    strategy, size = _strategy(weights, label)
    return Scheme(str(kind), bits, size, symmetric, one_scale=strategy == "tensor")


def _strategy(weights: Mapping[str, Any], label: str) -> tuple[str, int]:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == WHOLE_ROW else "group"
    if strategy in ("tensor", "channel"):
        return str(strategy), WHOLE_ROW
    if strategy != "group":
        raise UnsupportedError(
            f"{label} has the strategy {shown(strategy)}, which is not supported, only group, "
            "channel and tensor: export the original weights."
        )
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{label}: group_size must be a positive number, not {shown(size)}.")
    return "group", size


def _names(value: Any, label: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{label} must be a list of names, not {shown(value)}.")
    return value


def _warnings(
    raw: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], where: Path
) -> Iterator[str]:
    for key in ("input_activations", "output_activations"):
        if any(group.get(key) for group in groups.values()):
            yield (
                f"{where}: {key} are quantized in the source: the package has its weights, and its "
                "activations are those of the target (accuracy level, activations)."
            )
    if raw.get("kv_cache_scheme"):
        yield (
            f"{where}: kv_cache_scheme quantizes the KV cache in the source: the package has the "
            "cache of its target, which is not quantized like it."
        )
