"""The folder a package is written to: `OUT.partial`, renamed to `OUT` at the end."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_onnx.exporter.packaging.journal import JOURNAL_FILE, exclusive
from llama_onnx.targets.durable import flush, flush_tree, is_full
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, UsageError
from llama_onnx.targets.listing import CALIBRATION_FOLDER, WORKING_FILES
from llama_onnx.targets.package import PARTIAL_SUFFIX, is_package, remove_working_files


@dataclass(frozen=True)
class Destination:
    """The folder `out` of the finished package, and `partial`, where it is written first.

    `resume` continues an unfinished export, `force` replaces an older package or unfinished export.
    """

    out: Path
    partial: Path
    resume: bool = False
    force: bool = False

    @classmethod
    def at(cls, out: Path, *, resume: bool = False, force: bool = False) -> Destination:
        """Choose the folders. If `out` is a link, the folder it points to is written and the link
        stays. Raises `UsageError` for a name that no package can have."""
        out = Path(os.path.realpath(out))
        if not out.name:
            raise UsageError(f"{out} cannot be a package: name a folder below it.")
        return cls(out, out.with_name(out.name + PARTIAL_SUFFIX), resume, force)

    @property
    def resuming(self) -> bool:
        """Whether there is an unfinished export to continue."""
        begun = (JOURNAL_FILE, CALIBRATION_FOLDER)
        return self.resume and any((self.partial / name).exists() for name in begun)

    def check(self, sources: Iterable[Path]) -> None:
        """Raise `UsageError` if a folder cannot be used, or `out` holds one of `sources`, or the
        other way round.

        Called before anything is read, so that a wrong name costs no time.
        """
        if self.resume and self.force:
            raise UsageError("--resume continues an export and --force starts it over: pass one.")
        for source in sources:
            real = Path(os.path.realpath(source))
            if self.out.is_relative_to(real) and self.out != real:
                raise UsageError(
                    f"{self.out} is inside the source {source}, which an export only reads: choose "
                    "another place."
                )
            if real.is_relative_to(self.out):
                raise UsageError(
                    f"{self.out} holds the source {source}, which the package would replace: "
                    "choose another name."
                )
        try:
            self._check_out()
            self._check_partial()
        except OSError as error:
            raise UsageError(f"{self.out} cannot be written: {error.strerror or error}.") from None

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield `partial`, locked for this process, and rename it to `out` when the block ends.

        When the disk fails or the process is stopped, `partial` is kept for --resume; after any
        other error it is removed, unless an unfinished export was resumed. Raises `ResourceError`
        when the disk fails, `UsageError` when another process is writing there.
        """
        resuming, ours = self.resuming, False
        try:
            _make_folder(self.partial, keep=resuming)
            with exclusive(self.partial) as unlock:
                ours = True
                yield self.partial
                # Inside the lock, so that no other process starts the export over meanwhile.
                _publish(self.partial, self.out, unlock)
        except OSError as error:
            raise _disk_error(error, self.partial) from error
        except Exception:
            if ours and not resuming:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if self.resume:
            if is_package(self.out):  # killed after the rename: only working files are left over
                remove_working_files(self.out)
            raise UsageError(f"{self.out} exists already: there is nothing to resume.")
        if not self.force:
            raise UsageError(f"{self.out} exists already: choose another name, or pass --force.")
        empty = self.out.is_dir() and not any(self.out.iterdir())
        if not (is_package(self.out) or empty):
            raise UsageError(
                f"{self.out} is not a package, so --force does not replace it: choose another name."
            )

    def _check_partial(self) -> None:
        if not self.partial.exists():
            return
        if not _is_unfinished_export(self.partial):
            raise UsageError(
                f"{self.partial} is in the way and is not an unfinished export: move it elsewhere."
            )
        if not (self.resume or self.force):
            raise UsageError(
                f"{self.partial} is an unfinished export: continue it with --resume, or start over "
                "with --force."
            )


def _is_unfinished_export(partial: Path) -> bool:
    """Return whether the folder may be deleted: it is empty, or has a journal."""
    if not partial.is_dir():
        return False
    names = {file.name for file in partial.iterdir()}
    return not names or bool(names.intersection(WORKING_FILES))


def _make_folder(partial: Path, *, keep: bool) -> None:
    try:
        if partial.exists() and not keep:
            with exclusive(partial):
                pass  # no other process is writing there
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {partial.parent}: {error.strerror or error}: choose another folder."
        ) from None


def _publish(partial: Path, out: Path, unlock: Callable[[], None]) -> None:
    """Rename the finished folder; an older package is deleted only when the new one is in place.

    Everything is on the disk before it has its name. The journal is deleted last: until the folder
    is renamed, --resume can still finish.
    """
    flush_tree(partial)
    if sys.platform == "win32":
        unlock()
    if out.exists():
        previous = Path(tempfile.mkdtemp(prefix=_previous(out), dir=out.parent))
        out.rename(previous / out.name)
        try:
            partial.rename(out)
        except OSError:
            (previous / out.name).rename(out)
            previous.rmdir()
            raise
    else:
        partial.rename(out)
    flush(out.parent)
    remove_working_files(out)
    flush(out)
    _remove_previous(out)


def _previous(out: Path) -> str:
    return f"{out.name}.previous-"


def _remove_previous(out: Path) -> None:
    """Remove the package that was replaced, and what exports that were killed just then left."""
    for folder in out.parent.iterdir():
        ours = folder.name.startswith(_previous(out)) and folder.is_dir()
        if ours and {entry.name for entry in folder.iterdir()} <= {out.name}:
            shutil.rmtree(folder, ignore_errors=True)


def _disk_error(error: OSError, partial: Path) -> LlamaOnnxError:
    kept = f"what was written is kept in {partial}: repeat the call with --resume, or delete it"
    if is_full(error):
        return ResourceError(f"the disk is full: free some space; {kept}.")
    return ResourceError(f"{error.filename or partial}: {error.strerror or error}; {kept}.")
