"""Write a package's graph with its weights as ONNX Runtime packs them for this processor.

ONNX Runtime packs the weights anew at each load, and compares: what it finds in the file it maps
instead of keeping its own copy. So the load is not shorter, but the weights are pages of a file,
which the system may drop when memory is short, and which several processes share.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.tuning.tuned import PACKED_SUFFIX, Place
from llama_onnx.targets.durable import flush_tree
from llama_onnx.targets.errors import ResourceError, describe_reason
from llama_onnx.targets.package import ModelPackage

_GROWTH = 2.75
"""Most bytes of the files for each byte of the package's weights: the weights themselves, and as
packed, with scales in float32 and sums."""


def obstacle(package: ModelPackage, place: Place) -> str | None:
    """Return why the packed weights cannot be written, None if they can."""
    needed = int(package.data_path.stat().st_size * _GROWTH)
    free = shutil.disk_usage(place.folder).free
    if free > 2 * needed:
        return None
    return (
        f"{place.folder} has {free / 1e9:.1f} GB free: packed weights would take up to "
        f"{needed / 1e9:.1f} GB, and are only tried where twice as much is free"
    )


def write_packed(package: ModelPackage, place: Place) -> Path:
    """Write the packed weights of `package` to a new folder, for this user only, and return it.

    Raises `ResourceError` if they cannot be written, `PackageError` if the graph does not open.
    """
    folder = Path(tempfile.mkdtemp(suffix=PACKED_SUFFIX, dir=place.folder))
    try:
        # As the engine runs it, which cannot change a graph with packed weights.
        graph = choose_rows(package.model_path.read_bytes())
        ort.create_session(graph, settings=ort.Settings(packed=folder, weights=package.path))
        for file in folder.iterdir():
            file.chmod(0o600)
        flush_tree(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ResourceError(
                f"packed weights cannot be written to {place.folder}: {describe_reason(error)}."
            ) from None
        raise
    return folder
