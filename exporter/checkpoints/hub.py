"""Names of models on the Hugging Face hub, and their folders in its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llama_onnx.targets.folder_files import is_plain_name

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_./-]{1,200}"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?")


@dataclass(frozen=True)
class HubId:
    """`owner/name`, optionally with a branch, tag or commit: `owner/name@revision`."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return `text` as a hub id; None if it is not one, such as a file name or `./folder`."""
        match = _ID.fullmatch(text)
        if match is None or match["repo"].lower().endswith(".gguf"):
            return None
        if match["revision"] and not is_plain_name(match["revision"]):
            return None  # "../x" would be a file outside the cache
        return cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def find_source(text: str) -> Path | HubId:
    """Return `text` as a path if it exists or is not a valid hub id, else as a hub id."""
    hub = HubId.parse(text)
    return hub if hub is not None and not Path(text).exists() else Path(text)


@dataclass(frozen=True)
class Origin:
    """The repository and commit that a folder in the hub's cache is a copy of."""

    repo: str
    commit: str


def hub_origin(path: Path) -> Origin | None:
    """Return the origin of the folder `path` if it is a snapshot in huggingface_hub's cache, else
    None. Snapshots are at `models--OWNER--NAME/snapshots/COMMIT`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    *_, repo, middle, commit = ("", "", "", *path.resolve().parts)
    kind, _, name = repo.partition("--")
    if (kind, middle) != ("models", "snapshots"):
        return None
    return Origin(name.replace("--", "/"), commit)


def source_name(path: Path) -> str:
    """Return the name of the folder or file `path`, or `owner/name` for a snapshot in the hub's
    cache, whose folder is named after a commit."""
    origin = hub_origin(path)
    return origin.repo if origin else path.resolve().name
