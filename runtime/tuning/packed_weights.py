"""Write a package's graph with its weights as ONNX Runtime packs them for this processor.

ONNX Runtime packs the weights anew at each load, and compares: what it finds in the file it maps
instead of keeping its own copy. So the load is not shorter, but the weights are pages of a file,
which the system may drop when memory is short, and which several processes share.
"""

from __future__ import annotations

from pathlib import Path

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.tuning.cache_folder import new_folder, shortage
from llama_onnx.runtime.tuning.tuned import PACKED_SUFFIX, Place
from llama_onnx.targets.package import ModelPackage

_GROWTH = 2.75
"""Most bytes of the files for each byte of the package's weights: the weights themselves, and as
packed, with scales in float32 and sums."""


def obstacle(package: ModelPackage, place: Place) -> str | None:
    """Return why the packed weights cannot be written, None if they can."""
    # Twice: the cache is not worth a full disk.
    return shortage(place.folder, 2 * int(package.data_path.stat().st_size * _GROWTH))


def write_packed(package: ModelPackage, place: Place) -> Path:
    """Write the packed weights of `package` to a new folder, for this user only, and return it.

    Raises `ResourceError` if they cannot be written, `PackageError` if the graph does not open.
    """
    with new_folder(place.folder, PACKED_SUFFIX, "packed weights") as folder:
        # As the engine runs it, which cannot change a graph with packed weights.
        graph = choose_rows(package.model_path.read_bytes())
        ort.create_session(graph, settings=ort.Settings(packed=folder, weights=package.path))
    return folder
