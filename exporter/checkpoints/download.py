"""A checkpoint from the Hugging Face hub, through huggingface_hub and into its cache.

The library draws the progress, goes on where a connection broke off, and keeps every file that
arrived whole for the next call.
"""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.checkpoints.huggingface import SINGLES, find_shards, indexed_names
from llama_onnx.targets.errors import CheckpointError, LlamaOnnxError, ResourceError, UsageError
from llama_onnx.targets.licences import file_patterns

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsFileMetadata

_SMALL_FILES = [
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "checklist.chk",
    "tokenizer_checklist.chk",
    *(f"{single}.index.json" for single in SINGLES),
    *file_patterns(),
]
_META_SHARDS = "consolidated.*.pth"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


def local_copy(source: Path | HubId) -> Path:
    """Return `source` if it is a path, or the folder it was downloaded to."""
    return source if isinstance(source, Path) else fetch(source)


def fetch(source: HubId) -> Path:
    """Download what an export of `source` needs; returns the folder in the cache.

    Safetensors are preferred to pickled weights. Raises `UsageError` when there is no such model or
    revision, `CheckpointError` when it cannot be had: gated, no network, no weights.
    """
    with _explained(source):
        folder = _fetch_small_files(source)
        if not _has_weights(folder):
            _fetch_weights(source, folder)
    return folder


def fetch_headers(source: HubId, place: Path) -> Path:
    """Like `fetch`, but of weights as safetensors the headers alone: `place` gets a folder whose
    weight files are headers and holes of the true size.

    Weights that are pickled, or in the cache already, are fetched whole, or taken from there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _explained(source):
        folder = _fetch_small_files(source)
        if _has_weights(folder):
            return folder
        try:
            found = HfApi().get_safetensors_metadata(source.repo, revision=folder.name)
        except NotASafetensorsRepoError:
            return fetch(source)
        # As in the cache, so that the copy's origin can be told by its place.
        copy = place.joinpath(*folder.parts[-3:])
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_WEIGHTS))
        for name, metadata in found.files_metadata.items():
            _write_holes(copy / name, metadata)
    return copy


def _fetch_small_files(source: HubId) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(source.repo, revision=source.revision, allow_patterns=_SMALL_FILES)
    return Path(folder)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(find_shards(folder))
    except CheckpointError:
        return False


def _fetch_weights(source: HubId, folder: Path) -> None:
    """Download the weights beside the small files in `folder`, which is named by its commit."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not (folder / "config.json").exists():
        if (folder / "params.json").exists():
            snapshot_download(source.repo, revision=folder.name, allow_patterns=[_META_SHARDS])
            return
        raise CheckpointError(
            f"{source} has no config.json and no params.json, so it is not a checkpoint that can "
            "be read; one of its GGUF files can: fetch it with "
            f"`hf download {source.repo} FILE` and give its path."
        )
    for single in SINGLES:
        index = folder / f"{single}.index.json"
        if index.exists():
            names = indexed_names(index)
            snapshot_download(source.repo, revision=folder.name, allow_patterns=names)
            return
        try:
            hf_hub_download(source.repo, single, revision=folder.name)
            return
        except RemoteEntryNotFoundError:
            continue
    raise CheckpointError(f"{source} has a config.json but no {' or '.join(SINGLES)}.")


def _write_holes(path: Path, metadata: SafetensorsFileMetadata) -> None:
    tensors = metadata.tensors
    header = json.dumps(
        {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for name, info in tensors.items()
        }
    ).encode()
    data = max((info.data_offsets[1] for info in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)


@contextmanager
def _explained(source: HubId) -> Iterator[None]:
    """Turn errors of huggingface_hub into one sentence that says what to do."""
    try:
        yield
    except LlamaOnnxError:
        raise
    # The HTTP library's own errors come through too, and which one that is depends on the version.
    except Exception as error:
        raise _explanation(source, error) from error


def _explanation(source: HubId, error: Exception) -> LlamaOnnxError:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{source} is given only to those who accepted its licence: do so at "
            f"{hub}/{source.repo}, log in by `hf auth login`, and repeat the call."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{source.repo} has no branch, tag or commit {source.revision!r}: see "
            f"{hub}/{source.repo}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UsageError(
            f"{source} is not a file or folder here, and {hub} has no such model for you: check "
            "the spelling; a private model needs `hf auth login`."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{source} is not a file or folder here, and {hub} cannot be reached "
            f"({_reason(error.__cause__ or error)}): check the connection, or give the folder of "
            "a copy."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full; free some space in {constants.HF_HUB_CACHE}, and repeat the call "
            "to go on with the download."
        )
    return CheckpointError(
        f"{source} could not be fetched whole ({_reason(error)}): repeat the call to go on."
    )


def _reason(error: BaseException) -> str:
    lines = str(error).split("\n")
    return (lines[0] or type(error).__name__).rstrip(". ")[:200]
