"""The options of a package. Each one is defined once, here: the command line makes its options from
these fields, and tests compare the parameters of `llama_onnx.export` with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from llama_onnx.exporter.quantize.registry import QUANTIZERS
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName

if TYPE_CHECKING:
    from llama_onnx.exporter.model.recipe import CacheMode, LogitsMode

Minimize = Literal["size", "time"]

PRESET_NAMES = ("fast", "small", "default", "best", "careful")

STORAGES = ("fp32", "fp16", "bf16", "int8", "int4")


def _metadata(
    help_text: str,
    *,
    choices: Collection[str | int] = (),
    otherwise: str = "",
    number: type[int] | type[float] | None = None,
) -> dict[str, Any]:
    """Return a field's metadata, for the command line and the check in `Options`.

    `choices` are the allowed values, if they do not depend on the target. `otherwise` describes
    what None means. `number`: the type of a value, although the default is None.
    """
    return {"help": help_text, "choices": choices, "otherwise": otherwise, "number": number}


@dataclass(frozen=True)
class Options:
    """What the user chose; None means that the target or the recipe decides.

    Raises `UsageError` for a value that is not one of its field's choices.

    >>> Options(accuracy_level=3)
    Traceback (most recent call last):
    llama_onnx.targets.errors.UsageError: unknown accuracy level 3: use 1 or 4.
    """

    precision: str | None = field(
        default=None,
        metadata=_metadata(
            "How weights are stored: fp32, fp16, bf16, int8 or int4; `llama-onnx targets` lists "
            "those of each target.",
            otherwise="that of a quantized source, else the target's",
        ),
    )
    activations: FloatName | None = field(
        default=None,
        metadata=_metadata(
            "Type of the values between the operators.",
            choices=("fp32", "fp16", "bf16"),
            otherwise="that of the weights if the target computes in it, else the target's",
        ),
    )
    block_size: int = field(
        default=32,
        metadata=_metadata(
            "Values that share a scale: 32 is closer to the original, 128 is smaller and faster. "
            "Codes taken over from a quantized source keep their own block size.",
        ),
    )
    quantizer: str | None = field(
        default=None,
        metadata=_metadata(
            "How codes are chosen: rtn rounds to nearest; awq rescales channels and searches each "
            "block's range, by what the model reads from a text; gptq also lets each rounding make "
            "up for the ones before it; best also weighs each token by how much it matters. Each "
            "takes longer than the one before.",
            choices=QUANTIZERS,
            otherwise="awq for int4 where the model has a tokenizer, else rtn",
        ),
    )
    calibration: str | None = field(
        default=None,
        metadata=_metadata(
            "Text file, or JSONL of conversations, that awq, gptq and best pass through the model.",
            otherwise="a text that llama-onnx ships",
        ),
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata=_metadata(
            "How many tokens of that text are read.",
            otherwise="8192; gptq, best: at least the widest matrix's channels; awq above 2B: 4096",
            number=int,
        ),
    )
    preset: str | None = field(
        default=None,
        metadata=_metadata(
            "Sets precision, quantizer and what goes with them: fast takes the least time on a "
            "CPU with AVX512-VNNI, small is at most 4.5 bits a weight, default the quick recipe, "
            "best at most 5.3 bits, careful at most 6.3.",
            choices=PRESET_NAMES,
            otherwise="none",
        ),
    )
    budget: str | None = field(
        default=None,
        metadata=_metadata(
            "Most that the weights may take: bits per weight (4.4bpw) or a size (3.8GB). Each "
            "matrix has the bits and the block size that lose least.",
            otherwise="none",
        ),
    )
    max_kl: float | None = field(
        default=None,
        metadata=_metadata(
            "Most that the predicted mean KL divergence from the original may be; the package is "
            "as small as that allows, or as fast.",
            otherwise="none; with --minimize time, four fifths of the limit of fast",
            number=float,
        ),
    )
    minimize: Minimize | None = field(
        default=None,
        metadata=_metadata(
            "What to make as small as --max-kl allows: the package's size, or the time that its "
            "matrices take on a CPU with AVX512-VNNI.",
            choices=("size", "time"),
            otherwise="size with --max-kl",
        ),
    )
    recipe: str | None = field(
        default=None,
        metadata=_metadata(
            "JSON file that says how each matrix is stored: a package's manifest.json, or what "
            "`plan --json` prints.",
            otherwise="none",
        ),
    )
    embedding: str | None = field(
        default=None,
        metadata=_metadata(
            "How the embedding is stored.",
            choices=STORAGES,
            otherwise="int8 with int4, else the precision",
        ),
    )
    head: str | None = field(
        default=None,
        metadata=_metadata(
            "How the output head is stored.",
            choices=STORAGES,
            otherwise="that of the embedding if tied to it, else the precision",
        ),
    )
    accuracy_level: int | None = field(
        default=None,
        metadata=_metadata(
            "Arithmetic of quantized matrices: 1 in fp32, 4 in int8.",
            choices=(1, 4),
            otherwise="the target's",
        ),
    )
    fuse_gate_up: bool = field(
        default=False, metadata=_metadata("Store the MLP's gate and up projections as one matrix.")
    )
    logits: LogitsMode = field(
        default="all",
        metadata=_metadata(
            "Compute logits for all positions, or only for the last (faster prefill, no "
            "speculation).",
            choices=("all", "last"),
        ),
    )

    kv_cache: CacheMode | None = field(
        default=None,
        metadata=_metadata(
            "How keys and values are kept: int8 takes a quarter of the memory, is slower, and "
            "rounds; its scales are measured on the calibration's text.",
            choices=("int8",),
            otherwise="the type of the activations",
        ),
    )
    context: int | None = field(
        default=None,
        metadata=_metadata(
            "Positions that the package holds: its longest prompt and answer together.",
            otherwise="the model's own",
            number=int,
        ),
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), tuple(option.metadata["choices"])
            # The type too: True equals 1, and 4.0 equals 4.
            known = any(type(value) is type(choice) and value == choice for choice in choices)
            if choices and not known and value != option.default:
                *others, last = map(str, choices)
                listed = f"{', '.join(others)} or {last}" if others else last
                name = option.name.replace("_", " ")
                raise UsageError(f"unknown {name} {value!r}: use {listed}.")

    def changed(self) -> frozenset[str]:
        """Return the names of the fields whose value is not the default.

        >>> sorted(Options("fp32", block_size=64).changed())
        ['block_size', 'precision']
        """
        return frozenset(
            option.name for option in fields(self) if getattr(self, option.name) != option.default
        )
