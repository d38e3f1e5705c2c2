"""Downloads checkpoints from the Hugging Face hub into the cache of huggingface_hub.

The library shows progress, resumes interrupted downloads, and keeps every completed file for the
next call.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.checkpoints.hub_answers import checked_answers
from llama_onnx.exporter.checkpoints.weight_files import (
    SINGLES,
    find_weight_files,
    indexed_names,
)
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.targets.durable import is_full
from llama_onnx.targets.errors import CheckpointError, LlamaOnnxError, ResourceError, UsageError
from llama_onnx.targets.folder_files import is_plain_name
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
    """Return `source` if it is a path, else download it and return its folder; see `fetch`."""
    return source if isinstance(source, Path) else fetch(source)


def fetch(source: HubId) -> Path:
    """Download the files that an export of `source` needs; returns the folder in the cache.

    Prefers safetensors to pickled weights. Raises `UsageError` if there is no such model or
    revision, `CheckpointError` if it cannot be downloaded (gated, no network, no weights),
    `ResourceError` if the disk is full.
    """
    with _translated_errors(source):
        folder = _fetch_small_files(source)
        if not _has_weights(folder):
            _fetch_weights(source, folder)
    return folder


def fetch_headers(source: HubId, parent: Path) -> Path:
    """Like `fetch`, but download only the headers of safetensors files.

    Returns a folder under `parent` with sparse weight files: the headers, followed by holes of the
    true size. If the weights are already in the cache, returns that folder; if they are pickled,
    downloads them whole.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _translated_errors(source):
        folder = _fetch_small_files(source)
        if _has_weights(folder):
            return folder
        try:
            found = HfApi().get_safetensors_metadata(source.repo, revision=folder.name)
        except NotASafetensorsRepoError:
            return fetch(source)
        # The same path as in the cache, from which the copy's origin is read.
        copy = parent.joinpath(*folder.parts[-3:])
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_WEIGHTS))
        for name, metadata in found.files_metadata.items():
            if not is_plain_name(name):
                raise CheckpointError(
                    f"{source} names the file {name[:200]!r}, which is not a plain name."
                )
            _write_sparse(copy / name, metadata)
    return copy


def _fetch_small_files(source: HubId) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(source.repo, revision=source.revision, allow_patterns=_SMALL_FILES)
    return Path(folder)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(find_weight_files(folder, read_json(folder / "config.json")).files)
    except CheckpointError:
        return False


def _fetch_weights(source: HubId, folder: Path) -> None:
    """Download the weights to `folder`, which has the small files and is named after its commit."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if not (folder / "config.json").exists():
        if (folder / "params.json").exists():
            snapshot_download(source.repo, revision=folder.name, allow_patterns=[_META_SHARDS])
            return
        raise CheckpointError(
            f"{source} has no config.json and no params.json, so it cannot be exported by name: "
            f"if it has GGUF files, run `hf download {source.repo} FILE` and pass the path."
        )
    for single in SINGLES:
        try:  # first, as in transformers: an index beside it may be of older shards
            hf_hub_download(source.repo, single, revision=folder.name)
            return
        except RemoteEntryNotFoundError:
            pass
        index = folder / f"{single}.index.json"
        if index.exists():
            names = indexed_names(index)
            snapshot_download(source.repo, revision=folder.name, allow_patterns=names)
            return
    raise CheckpointError(f"{source} has a config.json but no {' or '.join(SINGLES)}.")


def _write_sparse(path: Path, metadata: SafetensorsFileMetadata) -> None:
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
def _translated_errors(source: HubId) -> Iterator[None]:
    """Check what the hub answers; turn errors of huggingface_hub into one sentence with a
    remedy."""
    try:
        with checked_answers():
            yield
    except LlamaOnnxError:
        raise
    # Errors of the HTTP library come through too; which library it is depends on the version.
    except Exception as error:
        raise _translate(source, error) from error


def _translate(source: HubId, error: Exception) -> LlamaOnnxError:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{source} is available only to users who accepted its license: do so at "
            f"{hub}/{source.repo}, log in with `hf auth login`, and repeat the call."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{source.repo} has no branch, tag or commit {source.revision!r}: see "
            f"{hub}/{source.repo}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UsageError(
            f"{source} is not a file or folder here, and {hub} shows you no such model: check the "
            "spelling, and run `hf auth login` if it is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{source} is not a file or folder here, and {hub} cannot be reached "
            f"({_reason(error.__cause__ or error)}): check the connection, or pass the folder of "
            "a local copy."
        )
    if isinstance(error, OSError) and is_full(error):
        return ResourceError(
            f"the disk is full: free some space in {constants.HF_HUB_CACHE} and repeat the call "
            "to resume the download."
        )
    return CheckpointError(
        f"{source} could not be downloaded whole ({_reason(error)}): repeat the call to resume."
    )


def _reason(error: BaseException) -> str:
    lines = str(error).split("\n")
    return (lines[0] or type(error).__name__).rstrip(". ")[:200]
