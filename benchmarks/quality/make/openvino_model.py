"""Convert and compress with optimum-intel and NNCF, in OpenVINO's own environment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from optimum.intel import OVModelForCausalLM

MODES = {
    ("4", "sym"): nncf.CompressWeightsMode.INT4_SYM,
    ("4", "asym"): nncf.CompressWeightsMode.INT4_ASYM,
    ("8", "sym"): nncf.CompressWeightsMode.INT8_SYM,
    ("8", "asym"): nncf.CompressWeightsMode.INT8_ASYM,
}


def main() -> None:
    """Write openvino_model.xml and .bin."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", choices=("4", "8"), required=True)
    parser.add_argument("--mode", choices=("sym", "asym"), required=True)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--awq", action="store_true")
    parser.add_argument("--scale-estimation", action="store_true")
    parser.add_argument("--calibration", type=Path, required=True)
    arguments = parser.parse_args()
    plain = arguments.out.parent / "openvino-fp32"
    if not plain.exists():
        whole = OVModelForCausalLM.from_pretrained(
            arguments.source, export=True, compile=False, load_in_8bit=False
        )
        whole.save_pretrained(plain)
    model = openvino.Core().read_model(plain / "openvino_model.xml")
    options: dict[str, Any] = {"mode": MODES[arguments.bits, arguments.mode]}
    if arguments.bits == "4":
        options |= {"group_size": arguments.group_size, "ratio": 1.0}
    if arguments.awq or arguments.scale_estimation:
        options |= {"awq": arguments.awq, "scale_estimation": arguments.scale_estimation}
        texts = np.load(arguments.calibration)
        options["dataset"] = nncf.Dataset(list(texts), lambda ids: _inputs(model, ids))
        options["subset_size"] = len(texts)
    compressed = nncf.compress_weights(model, **options)
    arguments.out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(compressed, arguments.out / "openvino_model.xml", compress_to_fp16=False)


def _inputs(model: Any, ids: Any) -> dict[str, Any]:
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    names = {name for entry in model.inputs for name in entry.names}
    return {name: value for name, value in feeds.items() if name in names}


if __name__ == "__main__":
    main()
