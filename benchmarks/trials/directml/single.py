"""Runs single-operator models on DirectML and the CPU, in the Windows Python: `single.py FOLDER`.

FOLDER has NUMBER.onnx with its inputs, NUMBER.npz. Where both have `past_key`, past and present are
one buffer on the device. Prints a JSON line for each, and writes what both providers gave to
NUMBER-expected.npz (the CPU's) and NUMBER-found.npz.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

SHARED = ("key", "value")


def main() -> None:
    """Run every model in the folder."""
    folder = Path(sys.argv[1])
    for number in range(len(list(folder.glob("*.onnx")))):
        try:
            answer = compare(folder / f"{number}.onnx")
        except Exception as error:  # onnxruntime's exceptions have no common base class
            answer = {"error": " ".join(str(error).split())[-200:]}
        print(json.dumps(answer), flush=True)


def compare(file: Path) -> dict[str, Any]:
    """Return where the nodes ran, the largest difference from the CPU, and the largest value."""
    feeds = dict(np.load(file.with_suffix(".npz")))
    _, expected = run(file, "CPUExecutionProvider", feeds)
    if "total" in feeds and expected.ndim == 4:
        # Keys in a cache with room for more, of which nothing is known.
        expected[:, :, int(feeds["total"]) :] = np.nan
    where, found = run(file, "DmlExecutionProvider", feeds)
    np.savez(file.with_name(f"{file.stem}-expected.npz"), y=expected)
    np.savez(file.with_name(f"{file.stem}-found.npz"), y=found)
    wide = expected.astype(np.float64)
    difference = float(np.nanmax(np.abs(found.astype(np.float64) - wide)))
    return {"where": where, "difference": difference, "largest": float(np.nanmax(np.abs(wide)))}


def run(file: Path, provider: str, feeds: dict[str, Any]) -> tuple[dict[str, str], Any]:
    """Return the provider of each operator, and the output `y`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen: list[Any] = [provider]
    if provider.startswith("Dml"):
        chosen = [(provider, {"device_id": "0"}), "CPUExecutionProvider"]
    session = ort.InferenceSession(str(file), options, chosen, enable_fallback=0)
    parts = session.get_provider_graph_assignment_info()
    where = {node.op_type: part.ep_name for part in parts for node in part.get_nodes()}
    outputs = {output.name for output in session.get_outputs()}
    if provider.startswith("Dml") and "present_key" in outputs:
        return where, run_in_one_buffer(session, feeds)
    return where, session.run(["y"], feeds)[0]


def run_in_one_buffer(session: ort.InferenceSession, feeds: dict[str, Any]) -> Any:
    """Return `y`, with past and present in one buffer on the device."""
    binding, kept = session.io_binding(), []
    for name in SHARED:
        buffer = ort.OrtValue.ortvalue_from_numpy(feeds[f"past_{name}"], "dml", 0)
        kept.append(buffer)
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        binding.bind_ortvalue_output(f"present_{name}", buffer)
    for name, value in feeds.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy()


if __name__ == "__main__":
    main()
