"""What every checkpoint format provides: config, tensors by Hugging Face name, and other files.

A format is a class that satisfies `Checkpoint`. Its tensors are lazy (`LazyTensor`), so that only a
few rows of a 70B model are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import LazyTensor
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.licences import kind_of
from llama_onnx.targets.target import FloatName

# Buffers that some tools save with the weights; they follow from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

_MAX_LICENCE_BYTES = 16 << 20


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [N, K] that its checkpoint holds as codes, which a package can keep.

    `blocks(start, stop)` returns rows `[start, stop)` as `storage` lays them out: packed codes
    [R, blocks, block bytes] uint8, scales [R, blocks] float32, zero points [R, bytes] uint8. It may
    be called from several threads. `order` [K] int64 gives the input channel of each column of the
    codes; it is None when the columns are in channel order.
    """

    name: str
    shape: tuple[int, ...]
    storage: RowBlocks
    order: npt.NDArray[np.int64] | None
    blocks: Callable[[int, int], tuple[npt.NDArray[Any], ...]]


class Checkpoint(Protocol):
    """A source model, opened but not read."""

    @property
    def path(self) -> Path:
        """Its folder or file."""
        ...

    @property
    def format(self) -> str:
        """`huggingface`, `gguf`, `meta` or `package`."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """Its architecture."""
        ...

    def names(self) -> Iterable[str]:
        """Return the Hugging Face names of all tensors."""
        ...

    def tensor(self, name: str) -> LazyTensor:
        """Return tensor `name`; raises `CheckpointError` if there is none."""
        ...

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write tokenizer.json, tokenizer_config.json and (if the model has one)
        chat_template.jinja into `folder`; returns the file names. Raises `CheckpointError` if the
        source has no usable tokenizer."""
        ...

    def licence_files(self) -> Sequence[Path]:
        """Return the license, use policy, notice and model card found with the weights."""
        ...

    def search_defaults(self) -> dict[str, Any]:
        """Return the model's sampling defaults (temperature, top_k, do_sample ...), if any."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return what identifies the source's content: file name -> size and modification time."""
        ...

    def warnings(self) -> Sequence[str]:
        """Return what an export leaves out or reads in another way than the files say, for
        people."""
        ...


@runtime_checkable
class HoldsCodes(Protocol):
    """A checkpoint that holds matrices as codes, and also returns each of them as float32 rows."""

    @property
    def native_bits(self) -> int | None:
        """The bits, 4 or 8, of the codes that a package of it has by default; None if most of its
        matrices are floats."""
        ...

    @property
    def reads_whole(self) -> bool:
        """Whether reading any rows of a matrix reads all its codes."""
        ...

    def describe(self) -> str:
        """Return a description of its quantization, for display."""
        ...

    def bits_of(self, name: str) -> int | None:
        """Return the bits per code of tensor `name`; None if it is stored as floats."""
        ...

    def obstacle(self, name: str, scales: FloatName) -> str | None:
        """Return why no package with scales of the type `scales` can keep the codes of matrix
        `name`, as a clause about several matrices; None if one can."""
        ...

    def coded(self, name: str) -> CodedMatrix:
        """Return matrix `name` as codes; raises `UnsupportedError` if a package cannot hold
        them."""
        ...


class TensorsByName:
    """`names` and `tensor` for checkpoints that keep their lazy tensors in a dictionary."""

    path: Path
    tensors: dict[str, LazyTensor]

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self.tensors.keys()

    def tensor(self, name: str) -> LazyTensor:
        """Return tensor `name`; raises `CheckpointError` if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} lacks the tensor {name}.") from None

    def warnings(self) -> Sequence[str]:
        """Return nothing: all is read as it is."""
        return ()


class OverBase:
    """What a checkpoint that changes the tensors of `base` has from it."""

    base: Checkpoint

    @property
    def path(self) -> Path:
        """The base's folder or file."""
        return self.base.path

    @property
    def format(self) -> str:
        """The base's format."""
        return self.base.format

    def names(self) -> Iterable[str]:
        """Return the names of the base's tensors."""
        return self.base.names()

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write the base's tokenizer."""
        return self.base.write_tokenizer(folder)

    def licence_files(self) -> Sequence[Path]:
        """Return the base's license files."""
        return self.base.licence_files()

    def search_defaults(self) -> dict[str, Any]:
        """Return the base's sampling defaults."""
        return self.base.search_defaults()

    def fingerprint(self) -> dict[str, str]:
        """Return what identifies the base's content."""
        return self.base.fingerprint()

    def warnings(self) -> Sequence[str]:
        """Return the base's warnings."""
        return self.base.warnings()


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with those its config requires, before any weight is read.

    Raises `CheckpointError` for a tensor that is missing or has the wrong shape, `UnsupportedError`
    for one that a plain Llama does not have (a bias, for example): leaving it out would change the
    model.
    """
    present = set(checkpoint.names())
    layers = checkpoint.config.num_hidden_layers
    if layers > len(present):  # checked before millions of names are listed
        raise CheckpointError(
            f"{checkpoint.path}: the config has {layers} layers, but there are only "
            f"{len(present)} tensors: use the config and weights of the same model."
        )
    expected = checkpoint.config.tensor_shapes()
    missing = [name for name in expected if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks the tensor {missing[0]}{more}: "
            "a file is missing, or config and weights belong to different models."
        )
    # A tied model may save its head as well; the embedding is used.
    allowed = expected.keys() | {"lm_head.weight"}
    for name in sorted(present - allowed):
        if not name.endswith(_IGNORED_SUFFIXES):
            raise UnsupportedError(
                f"{checkpoint.path} has the tensor {name}, which a plain Llama does not have; "
                "exporting without it would change the model."
            )
    for name, shape in expected.items():
        tensor = checkpoint.tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"but the config requires {list(shape)}."
            )
        if tensor.problem is not None:
            raise UnsupportedError(tensor.problem)


def find_licences(folder: Path) -> list[Path]:
    """Return the files in `folder` that have to accompany the weights; see `targets.licences`.

    Raises `CheckpointError` for one that is a link out of the folder, or too large for a text.
    """
    named = (path for path in folder.glob("*") if kind_of(path.name) and not path.is_dir())
    found = sorted(path for path in named if file_inside(folder, path.name))
    for path in found:
        if path.stat().st_size > _MAX_LICENCE_BYTES:
            raise CheckpointError(f"{path} is too large to be a license: remove it.")
    return found
