"""Reads a recipe back from a file: how each matrix is stored, and what chose the codes.

A recipe is what `plan --json` prints and what a package's manifest holds, under "recipe", with
"calibration" beside it. The same checkpoint, text and recipe give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import (
    BLOCK_SIZES,
    FLOAT_NAMES,
    Floats,
    RowBlocks,
    Storage,
)
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.quantize.registry import QUANTIZERS
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.strict_json import JSONError, parse_json

_BITS, _FORMS = (2, 4, 8), get_args(ScaleForm)


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe at `path` says: the storages of tensors by name, and of all others.

    `text` is the name of the file that it was calibrated on; None for the one that is shipped.
    """

    path: Path
    precision: str
    quantizer: str
    linear: Storage
    embedding: Storage
    head: Storage
    chosen: Mapping[str, RowBlocks]
    fuse_gate_up: bool
    text: str | None
    tokens: int | None

    def options(self, options: Options) -> Options:
        """Return `options` with what this recipe sets.

        Raises `UsageError` if they say otherwise, or lack the text that it was calibrated on.
        """
        given = {field.name: getattr(options, field.name) for field in fields(Options)}
        unset = {field.name: field.default for field in fields(Options)}
        sets: dict[str, Any] = {"precision": self.precision, "quantizer": self.quantizer}
        sets |= {"fuse_gate_up": self.fuse_gate_up, "calibration_tokens": self.tokens}
        for name in ("block_size", "embedding", "head", "preset"):
            if given[name] != unset[name]:
                raise UsageError(
                    f"--recipe says how each matrix is stored: leave out --{_flag(name)}."
                )
        for name, value in sets.items():
            if given[name] not in (unset[name], value):
                raise UsageError(
                    f"{self.path} sets --{_flag(name)} to {value}, not {given[name]}: leave it out."
                )
        if self.text is not None and options.calibration is None:
            raise UsageError(
                f"{self.path} was calibrated on {self.text}: pass that text with --calibration."
            )
        return replace(options, **sets)

    def applied(self, recipe: Recipe, config: LlamaConfig) -> Recipe:
        """Return `recipe` with the storages of this one.

        Raises `UsageError` if they do not fit the model or the target's operators.
        """
        known = config.tensor_shapes()
        for name in self.chosen:
            if name not in known:
                raise UsageError(
                    f"{self.path} stores {name}, which this model does not have: the recipe is of "
                    "another model."
                )
        if config.tie_word_embeddings and self.embedding != self.head:
            raise UsageError(
                f"{self.path} stores embedding and head in two ways, but this model has one matrix "
                "for both: the recipe is of another model."
            )
        for storage in (self.linear, self.embedding, self.head, *self.chosen.values()):
            self._check(storage, recipe)
        return replace(
            recipe,
            linear=self.linear,
            embedding=self.embedding,
            head=self.head,
            chosen=self.chosen,
            fuse_gate_up=self.fuse_gate_up,
        )

    def _check(self, storage: Storage, recipe: Recipe) -> None:
        if not isinstance(storage, RowBlocks):
            return
        if storage.stored_scales == "uint8" and not storage.zero_points:
            raise UsageError(
                f"{self.path} stores scales as uint8 without zero points: such scales may be "
                'negative. Set stored_scales to "fp16".'
            )
        operators = recipe.operators
        folded = storage.stored_scales != "plain"
        unfit = (
            operators.standard
            or (storage.zero_points and not operators.zero_points)
            or (storage.bits == 2 and not operators.two_bits)
            or (folded and not operators.folded_scales)
            or storage.scales != recipe.activations
        )
        if unfit:
            raise UsageError(
                f"{self.path} stores matrices in a way that the target's operators cannot read: "
                "use it with the target it was made for."
            )


def read_recipe(path: Path) -> RecipeFile:
    """Return the recipe in `path`, a JSON file or a package.

    Raises `UsageError` for a file without one.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except JSONError as error:
        raise UsageError(f"{file} {error}.") from None
    found = content.get("recipe") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UsageError(
            f"{file} has no recipe: pass a package's {MANIFEST}, or what `plan --json` prints."
        )
    calibration = content.get("calibration") or {}
    try:
        return RecipeFile(
            path=path,
            precision=_one_of(found["precision"], ("fp32", "fp16", "bf16", "int8", "int4")),
            quantizer=_one_of(found["quantizer"], tuple(QUANTIZERS)),
            linear=_storage(found["linear"]),
            embedding=_storage(found["embedding"]),
            head=_storage(found["head"]),
            chosen=_chosen(found.get("chosen", [])),
            fuse_gate_up=_one_of(found["fuse_gate_up"], (True, False)),
            text=_text(calibration.get("text")),
            tokens=_count(calibration.get("tokens")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{file} has a recipe that cannot be read ({error!r}): make it again with `plan "
            "--json`."
        ) from None


def _storage(value: Any) -> Storage:
    if "name" in value:
        return Floats(_one_of(value["name"], FLOAT_NAMES))
    return _blocks(value)


def _blocks(value: Any) -> RowBlocks:
    if value["columnwise"] or value["order"]:
        raise ValueError("codes in columns or in another order")
    return RowBlocks(
        _one_of(value["bits"], _BITS),
        _one_of(value["block_size"], BLOCK_SIZES),
        zero_points=_one_of(value["zero_points"], (True, False)),
        scales=_one_of(value["scales"], FLOAT_NAMES),
        stored_scales=_one_of(value.get("stored_scales", "plain"), _FORMS),
    )


def _chosen(value: Any) -> dict[str, RowBlocks]:
    found: dict[str, RowBlocks] = {}
    for group in value:
        storage = _blocks(group)
        found |= {_text(name) or "": storage for name in group["tensors"]}
    return found


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if not any(type(value) is type(one) and value == one for one in known):
        raise ValueError(f"{value!r} is none of {', '.join(map(str, known))}")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _count(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is not a number of tokens")
    return value
