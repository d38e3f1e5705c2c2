"""Cuts a piece out of a graph, with its weights and a script that shows its error."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.runtime import ort
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

Array = npt.NDArray[Any]

_MODEL, _REPRODUCE = "model.onnx", "reproduce.py"
_FILES = {_MODEL, f"{_MODEL}.data", "input.npz", "expected.npz", "found.npz", _REPRODUCE}
_INLINE_BYTES = 1 << 30  # a protobuf message is limited to 2 GiB

_SCRIPT = '''\
"""A piece of a model with a wrong result: `python reproduce.py` needs {wheel} and numpy.

Values that are NaN in expected.npz (padding, for example) are not compared.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

print({title!r})
folder = Path(__file__).parent
session = ort.InferenceSession(str(folder / "model.onnx"), providers={providers!r})
print("ran on", session.get_providers()[0])
expected, recorded = np.load(folder / "expected.npz"), np.load(folder / "found.npz")
for name in expected.files:
    (found,) = session.run([name], dict(np.load(folder / "input.npz")))
    wanted = expected[name].astype(np.float64)
    counted = ~np.isnan(wanted)
    error = np.where(counted, np.abs(found - wanted), 0)
    worst = np.unravel_index(np.nanargmax(error), error.shape)
    norm = np.sqrt(np.square(wanted[counted]).sum())
    print(f"{{name}}, {{counted.sum()}} values compared")
    print(f"relative L2         {{np.sqrt(np.square(error).sum()) / norm:.2e}}")
    print(f"largest difference  {{error[worst]:.6g}} at {{[int(i) for i in worst]}}: "
          f"{{found[worst]:.8g}} instead of {{wanted[worst]:.8g}}")
    difference = np.abs(found.astype(np.float64) - recorded[name])[counted].max()
    print(f"against found.npz   {{difference:.2g}} at most")
'''


def check_out(out: Path, package: Path) -> None:
    """Raise `UsageError` if a reproduction cannot be written to `out`."""
    if package.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} is in the package: choose another folder with --bisect-out.")
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= _FILES):
        raise UsageError(
            f"{out} exists and has other files: choose another folder with --bisect-out."
        )


def cut_out(model: ir.Model, inputs: Mapping[str, Array], output: str) -> ir.Model:
    """Return the nodes of `model` that compute `output` from `inputs`, and their weights."""
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    for value in graph.inputs:
        array = inputs[str(value.name)]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape(array.shape)
    graph.outputs[0].shape = None  # it may be that of another batch
    return ir.Model(graph, ir_version=model.ir_version, producer_name="llama-onnx")


def run_piece(piece: ir.Model, inputs: Mapping[str, Array], folder: Path) -> Array:
    """Run `piece`, whose weights are in `folder`, and return its only output."""
    proto = ir.to_proto(piece).SerializeToString()
    session = ort.create_session(proto, settings=ort.Settings(weights=folder))
    found: Array = session.run(None, dict(inputs))[0]
    return found


def write_reproduction(
    out: Path,
    piece: ir.Model,
    inputs: Mapping[str, Array],
    expected: Array,
    found: Array,
    title: str,
    provider: Provider = CPU,
) -> None:
    """Write model, arrays and script to the folder `out`, which appears complete or not at all.

    The script runs the piece on `provider`, whose result `found` is.
    """
    (value,) = piece.graph.outputs
    value.type = ir.TensorType(ir.DataType.from_numpy(found.dtype))
    value.shape = ir.Shape(found.shape)
    output = str(value.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        aside = Path(temporary, out.name)
        aside.mkdir()
        _save(piece, aside / _MODEL)
        for name, arrays in (
            ("input", dict(inputs)),
            ("expected", {output: expected}),
            ("found", {output: found}),
        ):
            np.savez(aside / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        # The title has names from the graph: as a quoted literal, they cannot become code.
        script = _SCRIPT.format(title=title, wheel=provider.wheel, providers=_chosen(provider))
        (aside / _REPRODUCE).write_text(script, "utf-8")
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)


def _chosen(provider: Provider) -> list[Any]:
    """Return the argument `providers` of a session. Nothing is left to the CPU in silence: the
    script says what ran."""
    if provider.provider_options:
        return [(provider.ort_name, dict(provider.provider_options))]
    return [provider.ort_name]


def _save(piece: ir.Model, path: Path) -> None:
    initializers = (value.const_value for value in piece.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in initializers if tensor is not None)
    if size <= _INLINE_BYTES:
        ir.external_data.load_to_model(piece)
        ir.save(piece, path)
    else:
        ir.save(piece, path, external_data=f"{path.name}.data")
