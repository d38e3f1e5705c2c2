"""Graph error of every precision on tiny random models and on a real one: one table.

    python benchmarks/graph_error.py [MODEL.gguf ...]

The graph's error is ONNX Runtime compared with PyTorch on the same (dequantized) weights, with fp32
activations; the row "as shipped" is the same with the int8 activations that int4 and int8 packages
use by default (accuracy_level 4). The greedy column counts the continuations of 64 tokens that
equal the reference's, token for token.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.prompts import make_prompts
from llama_onnx.exporter.parity.measure.report import Greedy, Measurement, ParityReport
from llama_onnx.exporter.parity.measure.shipped import PromptSet
from llama_onnx.exporter.parity.measure.validate import validate
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.registry import get_target
from tests.support import tiny

PRECISIONS = ("fp32", "fp16", "int8", "int4")
ROW = "{:24} {:5} {:12} {:>9} {:>9} {:>9} {:>7} {:>7}"


def tiny_models(folder: Path) -> dict[str, Path]:
    models = {}
    for heads, kv_heads in (("MHA", 4), ("GQA", 2)):
        for tied in (False, True):
            config = dataclasses.replace(
                tiny.GQA, num_key_value_heads=kv_heads, tie_word_embeddings=tied
            )
            name = f"tiny {heads} {'tied' if tied else 'untied'}"
            models[name] = tiny.write_huggingface(folder / name, config)
    return models


def measure(source: Path, precision: str, folder: Path) -> ParityReport:
    out = folder / "package"
    target = get_target("cpu")
    quantizer = "rtn" if precision.startswith("int") else None
    export_package(source, out, target, Options(precision, quantizer=quantizer), force=True)
    checkpoint = open_checkpoint(source)
    prompts = make_prompts(out, checkpoint.config, tokens=64, longest=128)
    return validate(open_subject(out, checkpoint), PromptSet(prompts, 64))[0]


def show(name: str, report: ParityReport) -> None:
    measured = {(entry.error, entry.situation): entry for entry in report.measurements}
    greedy = {entry.name: entry for entry in report.greedy}
    line(name, report.precision, "prefill", measured["graph", "prefill"], greedy["graph"])
    line(name, report.precision, "decode", measured["graph", "decode"], None)
    if report.precision in ("int8", "int4"):
        line(name, report.precision, "as shipped", measured["shipped", "prefill"], None)


def line(
    name: str, precision: str, what: str, measurement: Measurement, greedy: Greedy | None
) -> None:
    figures = measurement.figures
    count = f"{greedy.identical}/{len(greedy.divergences)}" if greedy else ""
    print(
        ROW.format(
            name,
            precision,
            what,
            f"{figures.max_abs:.1e}",
            f"{figures.relative_l2:.1e}",
            f"{figures.mean_kl:.1e}",
            f"{figures.same_top1:.1%}",
            count,
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="checkpoints to measure as well")
    arguments = parser.parse_args()
    print(ROW.format("model", "", "", "max abs", "rel L2", "mean KL", "top-1", "greedy"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = tiny_models(folder) | {model.stem[:24]: model for model in arguments.models}
        missed = []
        for name, source in models.items():
            for precision in PRECISIONS:
                report = measure(source, precision, folder)
                show(name, report)
                missed += [f"{name} {precision}"] if not report.passed else []
    if missed:
        raise SystemExit(f"thresholds missed: {', '.join(missed)}")
    print("every threshold holds.")


if __name__ == "__main__":
    main()
