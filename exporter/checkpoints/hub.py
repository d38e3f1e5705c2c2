"""Models on the Hugging Face hub by name, and their folders in its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_./-]{1,200}"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?")


@dataclass(frozen=True)
class HubId:
    """`owner/name`, maybe with a branch, tag or commit: `owner/name@revision`."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return the id that `text` spells; None for a file's name or `./folder`."""
        match = _ID.fullmatch(text)
        if match is None or match["repo"].lower().endswith(".gguf"):
            return None
        return cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def find_source(text: str) -> Path | HubId:
    """Return the file or folder `text` if it exists, else the hub id it spells, else the path."""
    hub = HubId.parse(text)
    return hub if hub is not None and not Path(text).exists() else Path(text)


@dataclass(frozen=True)
class Origin:
    """What a folder of the hub's cache is a copy of."""

    repo: str
    commit: str


def hub_origin(path: Path) -> Origin | None:
    """Where the folder `path` came from, if it is a snapshot in a cache of huggingface_hub:
    `models--OWNER--NAME/snapshots/COMMIT`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    *_, repo, middle, commit = ("", "", "", *path.resolve().parts)
    kind, _, name = repo.partition("--")
    if (kind, middle) != ("models", "snapshots"):
        return None
    return Origin(name.replace("--", "/"), commit)


def source_name(path: Path) -> str:
    """Return the name of the folder or file `path`: `owner/name` for a snapshot of the hub, whose
    folder is named by a commit."""
    origin = hub_origin(path)
    return origin.repo if origin else path.resolve().name
