"""Turn a Llama checkpoint into an ONNX package, prove it, run it.

    import llama_onnx

    llama_onnx.export("Llama-3.2-1B-Instruct", "llama-int4", precision="int4")
    llama_onnx.validate("llama-int4", "Llama-3.2-1B-Instruct", certify=True)
    model = llama_onnx.Llama.load("llama-int4")
    for piece in model.generate("The capital of France is"):
        print(piece, end="", flush=True)

The public API is the names in `__all__`, with the documented attributes and methods of the objects
they return. Everything else, every module below `llama_onnx` included, is private and can change
in any release.

Importing this package loads only the standard library. A function imports what it needs when it is
called, and raises `MissingDependencyError` with the command to run if an extra is not installed.
"""

from __future__ import annotations

import os
import sys

if sys.argv and sys.argv[0].replace("\\", "/").rpartition("/")[2].startswith("llama-onnx"):
    # The command line starts with the imports below: Ctrl-C ends it, without a traceback. Later,
    # runtime/commands/streams.py takes over.
    import signal

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from llama_onnx import _results
from llama_onnx.targets.errors import (
    BusyError,
    CheckpointError,
    ContextLengthError,
    LlamaOnnxError,
    MissingDependencyError,
    PackageError,
    ProviderError,
    ResourceError,
    SessionError,
    TooLargeError,
    UnsupportedError,
    UsageError,
)
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import Progress
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.target import FloatName

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.model import Llama

    __version__: str

__all__ = [
    "TARGETS",
    "BusyError",
    "CheckpointError",
    "ContextLengthError",
    "Llama",
    "LlamaOnnxError",
    "MissingDependencyError",
    "PackageError",
    "ProviderError",
    "ResourceError",
    "SessionError",
    "TooLargeError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "export",
    "open_package",
    "plan",
    "validate",
    "verify",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _needs(extras: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function name `extras` in its error when a library is not installed."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("llama_onnx"):
                    raise  # our own mistake, not a missing extra
                from llama_onnx.targets.extras import missing_extra

                what = f"llama_onnx.{function.__name__}()"
                raise missing_extra(what, error.name, extras) from None

        return call

    return decorate


@_needs("export,cpu")
def plan(
    checkpoint: str | os.PathLike[str],
    *,
    target: str = "cpu",
    precision: str | None = None,
    activations: FloatName | None = None,
    block_size: int = 32,
    quantizer: str | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    preset: str | None = None,
    budget: str | None = None,
    max_kl: float | None = None,
    minimize: Literal["size", "time"] | None = None,
    recipe: str | None = None,
    embedding: str | None = None,
    head: str | None = None,
    accuracy_level: int | None = None,
    fuse_gate_up: bool = False,
    logits: Literal["all", "last"] = "all",
    kv_cache: Literal["int8"] | None = None,
    context: int | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    kept_adapters: Mapping[str, str | os.PathLike[str]] | None = None,
) -> _results.Plan:
    """Return what an export would make and need. Reads headers, not weights.

    Args:
        checkpoint: Folder or .gguf file, or OWNER/NAME[@REVISION] on the Hugging Face hub.
        target: Where the package will run: a name in `TARGETS`.
        precision: One of `TARGETS[target].graph.precisions`. None: a quantized source's, or theirs.
        activations: "fp32", "fp16" or "bf16" between the operators. None: the target decides.
        block_size: Values that share one scale in a quantized matrix.
        quantizer: "rtn", "awq", "gptq" or "best". None: "awq" for int4 with a tokenizer.
        calibration: Text file, or JSONL of chats, that all but rtn read. None: a shipped text.
        calibration_tokens: How many tokens of it. None: 8192, or the widest matrix's channels.
        preset: "fast", "small", "default", "best" or "careful": a named set of options.
        budget: Most that the weights may take: "4.4bpw" (bits per weight) or "3.8GB".
        max_kl: Most that the predicted mean KL divergence from the original may be.
        minimize: What to make as small as `max_kl` allows: "size", or "time" on a CPU with VNNI.
        recipe: JSON file, or package, that says how each matrix is stored.
        embedding: How the embedding is stored. None: int8 with int4, else `precision`.
        head: How the output head is stored. None: `precision`, or like the embedding if tied.
        accuracy_level: 1 multiplies quantized matrices in fp32, 4 in int8. None: the target's.
        fuse_gate_up: Store the MLP's gate and up projections as one matrix.
        logits: Compute them for "all" positions or only for the "last".
        kv_cache: "int8" keeps keys and values in 8 bits. None: like the activations.
        context: Positions that the package holds. None: the model's own.
        adapters: PEFT folders of LoRA adapters to merge, in order.
        kept_adapters: PEFT folders by name, of adapters to keep and swap at run time.

    Returns:
        The plan: `parameters`, `data_bytes`, `peak_memory`, `bits_per_weight`, ...; sizes in bytes.

    Raises:
        UsageError, CheckpointError: An option does not fit; the checkpoint cannot be read.

    Examples:
        >>> llama_onnx.plan("tiny-llama", precision="int4").parameters
        129472
    """
    given = dict(locals())
    from llama_onnx import _calls

    return _calls.plan(**given)


@_needs("export,cpu")
def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "cpu",
    precision: str | None = None,
    activations: FloatName | None = None,
    block_size: int = 32,
    quantizer: str | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    preset: str | None = None,
    budget: str | None = None,
    max_kl: float | None = None,
    minimize: Literal["size", "time"] | None = None,
    recipe: str | None = None,
    embedding: str | None = None,
    head: str | None = None,
    accuracy_level: int | None = None,
    fuse_gate_up: bool = False,
    logits: Literal["all", "last"] = "all",
    kv_cache: Literal["int8"] | None = None,
    context: int | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    kept_adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    resume: bool = False,
    force: bool = False,
    checksum: bool = True,
    hash_source: bool = False,
    tokenizer: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> _results.ExportResult:
    """Export a checkpoint to a package. Memory use does not grow with the model.

    The arguments from `target` to `kept_adapters` are those of `plan`, which explains them.

    Args:
        checkpoint: Folder or .gguf file, or OWNER/NAME[@REVISION] on the Hugging Face hub.
        out: Folder to write. The export works in `out.partial` and renames it at the end.
        resume: Continue an interrupted export.
        force: Replace `out`, or an unfinished export of it.
        checksum: Compare the source with its checklist.chk, if it has one.
        hash_source: Read the source once more to record the sha256 of its files in the manifest.
        tokenizer: False leaves it out: the package takes ids only, and the source needs none.
        workers: Threads that convert weights. None: one for each processor.
        progress: An object with `step(what)` and `update(what, done, total, unit)`. None: silent.

    Returns:
        The result: `package` (path), `plan`, `package_bytes`, `warnings`, ...

    Raises:
        UsageError: `out` exists, the target does not support an option, or an option has no effect.
        CheckpointError: The checkpoint cannot be read, or (`UnsupportedError`) is not supported.
        ResourceError: The disk is full.

    Examples:
        >>> llama_onnx.export("tiny-llama", "tiny-int8", precision="int8").package.name
        'tiny-int8'
    """
    given = dict(locals())
    from llama_onnx import _calls

    return _calls.export(**given)


@_needs("export,cpu")
def validate(
    package: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    adapters: Sequence[str | os.PathLike[str]] = (),
    kept_adapter: tuple[str, str | os.PathLike[str]] | None = None,
    texts: Sequence[str] | None = None,
    tokens: int | None = None,
    prompt_tokens: int | None = None,
    max_kl: float | None = None,
    accept_loss: bool = False,
    thorough: bool = False,
    certify: bool = False,
    progress: Progress | None = None,
) -> _results.ParityReport:
    """Compare a package with the checkpoint it was made from, each kind of error separately.

    Args:
        package: The package's folder.
        reference: The checkpoint: a path, or OWNER/NAME[@REVISION] on the Hugging Face hub.
        adapters: PEFT folders of the LoRA adapters that were merged, in order.
        kept_adapter: Name and PEFT folder of the kept adapter to activate. None: measure the base.
        texts: Texts to measure on, at least one. None: the built-in ones.
        tokens: Greedy tokens after each prompt, at least 2. None: 64, or 16 of a model with 3
            billion parameters or more.
        prompt_tokens: Maximum tokens of a prompt, at least 1. None: 128, or 32 of such a model,
            whose first prompt still has up to 128.
        max_kl: Also fail above this mean KL divergence (nats) to the original weights.
        accept_loss: Accept a loss beyond the limits of fidelity that the package's recipe has.
        thorough: Also run past positions 2047 to 2049 and to the end of the context.
        certify: If both verdicts allow it, write the certificate that `verify` replays.
        progress: An object with `step(what)` and `update(what, done, total, unit)`. None: silent.

    Returns:
        The report. `passed` is the verdict on conversion, `fidelity` that on what rounding costs
        (`fidelity.grade`), `accepted` whether both are good enough; `to_json()` has all figures.

    Raises:
        UsageError: The package was made from another model, or cannot be measured with these
            arguments.
        PackageError: The package cannot be read or run.
        CheckpointError: The checkpoint cannot be read.

    Examples:
        >>> report = llama_onnx.validate("tiny-int4", "tiny-llama", tokens=8, prompt_tokens=16)
        >>> report.passed
        True
    """
    given = dict(locals())
    from llama_onnx import _calls

    return _calls.validate(**given)


@_needs("cpu")
def verify(
    package: str | os.PathLike[str],
    *,
    provider: str | None = None,
    key: str | os.PathLike[str] | None = None,
    name: str | None = None,
    threads: int | None = None,
    allow_fallback: bool = False,
    files_only: bool = False,
    progress: Progress | None = None,
) -> _results.VerifyReport:
    """Check every file of a package or bundle, then replay its certificate on this machine.

    Needs neither the original weights nor PyTorch.

    Args:
        package: The folder of a package or bundle.
        provider: "cpu", "cuda", "directml" or "webgpu". None: that of the package's target.
        key: File with the signer's public key (PEM): ed25519 or, for model.sig, P-256.
        name: With `key`: the signed package, or the model it was made from, must be called so.
        threads: Threads to compute with. None: the physical cores.
        allow_fallback: Let the CPU run what the provider cannot, instead of failing.
        files_only: Check only files and signature; needs no certificate.
        progress: An object with `step(what)` and `update(what, done, total, unit)`. None: silent.

    Returns:
        The report; `passed` is the verdict, `to_json()` has all figures.

    Raises:
        PackageError: The folder is not a package, or has no certificate.
        ProviderError: The provider cannot run it here.
        UsageError: `key` is not a public key, `name` comes without it, or `files_only` excludes
            another argument.

    Examples:
        >>> llama_onnx.verify("tiny-int4", files_only=True).passed
        True
    """
    given = dict(locals())
    from llama_onnx import _calls

    return _calls.verify(**given)


def open_package(path: str | os.PathLike[str]) -> ModelPackage:
    """Open a package and check that its files are there. Needs no extra.

    Args:
        path: The package's folder.

    Returns:
        The package: `target`, `precision`, `manifest`, `adapters`, ...; `verify()` hashes its
        files.

    Raises:
        PackageError: The folder is not a package, or a file is missing or has another size.

    Examples:
        >>> package = llama_onnx.open_package("tiny-int4")
        >>> package.target, package.precision, package.verify()
        ('cpu', 'int4', [])
    """
    return ModelPackage.open(os.fspath(path))


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)


# Hidden from type checkers, which read a module's __getattr__ as a promise of every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load what importing the package must not: `Llama`, which needs numpy, and the version."""
        if name == "Llama":
            from llama_onnx.runtime.llama.model import Llama

            value: Any = Llama
        elif name == "__version__":
            from importlib.metadata import version

            value = version("llama-onnx")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value
