"""What is measured: every row of the table, as data. A new one of ours is one line here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.workspace import Workspace

OURS, BUILDER, LLAMA, OPENVINO = "llama-onnx", "genai builder", "llama.cpp", "OpenVINO"

BASE = "rtn-int4"
"""The row that every other row's speed is compared with."""

C4 = "{c4}"
"""Stands for the file of the second calibration text in a row's options."""

ROOT = "{root}"
"""Stands for the workspace's folder in a row's options."""

NOT_OFFERED = 2
"""Exit status of a command whose options this version does not know."""


@dataclass(frozen=True)
class Row:
    """A way to quantize the model.

    `name` is that of its files, `options` are the arguments of its maker, `calibration` says on
    which text it was calibrated.
    """

    name: str
    group: str
    label: str
    options: tuple[str, ...] = ()
    calibration: str = ""

    @property
    def runtime(self) -> str:
        """The runtime that opens it, a module of `runtimes`."""
        return {LLAMA: "llama_cpp", OPENVINO: "openvino"}.get(self.group, "onnx")

    def path(self, work: Workspace) -> Path:
        """The folder or file that its maker writes."""
        return work.model(self.name + (".gguf" if self.group == LLAMA else ""))

    def counted(self, work: Workspace) -> list[Path]:
        """The files whose bytes count: the graph and all weights, not the tokenizer beside them.

        A GGUF file counts whole, with the tokenizer inside it.
        """
        path = self.path(work)
        if self.group == LLAMA:
            return [path]
        names = {
            OPENVINO: ("openvino_model.xml", "openvino_model.bin"),
            OURS: ("model.onnx", "model.onnx.data", "channel_scales.safetensors"),
            BUILDER: ("model.onnx", "model.onnx.data"),
        }[self.group]
        return [path / name for name in names if (path / name).exists()]

    def command(self, work: Workspace) -> list[str]:
        """The command that makes it."""
        source, out = str(work.source), str(self.path(work))
        python = str(self.python(work))
        if self.group == OURS:
            options = [option.replace(ROOT, str(work.root)) for option in self.options]
            options = [option.replace(C4, str(work.texts / "c4.txt")) for option in options]
            export = [python, "-m", "llama_onnx.exporter.cli", "export", source, out]
            return [*export, "--force", *options]
        if self.group == BUILDER:
            builder = [python, "-m", "onnxruntime_genai.models.builder", "-m", source, "-o", out]
            cache = str(work.root / "cache")
            extra = ["--extra_options", *self.options] if self.options else []
            return [*builder, "-p", "int4", "-e", "cpu", "-c", cache, *extra]
        if self.group == LLAMA:
            maker = [python, "-m", "benchmarks.quality.make.gguf_file", str(work.gguf), out]
            kind, *imatrix = self.options
            return [*maker, kind, *(["--imatrix", str(work.imatrix)] if imatrix else [])]
        maker = [python, "-m", "benchmarks.quality.make.openvino_model", source, out]
        return [*maker, *self.options, "--calibration", str(work.texts / "c4.npy")]

    def python(self, work: Workspace) -> Path:
        """The interpreter that makes and runs it."""
        if self.group == OPENVINO:
            return work.venvs / "openvino" / "bin" / "python"
        return Path(sys.executable)


PINS = {
    "openvino": (
        "torch==2.14.1",
        "torchvision==0.29.1",
        "transformers==5.5.4",
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "optimum-intel==2.2.0",
    ),
}
"""What is installed into the environment of each peer that has one."""


def _ours() -> Iterable[Row]:
    int4 = ("--precision", "int4")
    rtn = (*int4, "--quantizer", "rtn")
    yield Row(BASE, OURS, "rtn, block 32", rtn)
    yield Row("rtn-int4-b128", OURS, "rtn, block 128", (*rtn, "--block-size", "128"))
    yield Row("rtn-int8", OURS, "int8", ("--precision", "int8"))
    cache = (*int4, "--quantizer", "awq", "--kv-cache", "int8")
    yield Row("awq-kv-int8", OURS, "awq, KV cache in int8", cache, "shipped")
    awq8 = ("--precision", "int8", "--quantizer", "awq")
    yield Row("awq-int8", OURS, "int8, awq", awq8, "shipped")
    best = (*int4, "--quantizer", "best", "--budget", "7.5bpw")
    yield Row("best-7.5bpw", OURS, "best, 7.5 bits", best, "shipped")
    awq = (*int4, "--quantizer", "awq", "--block-size", "16")
    yield Row("awq-b16", OURS, "awq, block 16", awq, "shipped")
    for quantizer in ("awq", "gptq", "best"):
        options = (*int4, "--quantizer", quantizer)
        yield from _calibrated(quantizer, quantizer, options)
    yield Row("preset-fast", OURS, "preset fast", ("--preset", "fast"), "shipped")
    for preset in ("small", "default", "best", "careful"):
        yield from _calibrated(f"preset-{preset}", f"preset {preset}", ("--preset", preset))


def _calibrated(name: str, label: str, options: tuple[str, ...]) -> Iterable[Row]:
    """One of ours on the text that comes with llama-onnx, and on another."""
    yield Row(name, OURS, label, options, "shipped")
    yield Row(f"{name}-c4", OURS, label, (*options, "--calibration", C4), "c4")


def _builder() -> Iterable[Row]:
    yield Row("builder-default", BUILDER, "default")
    yield Row("builder-rtn", BUILDER, "rtn", ("algo_config=rtn",))
    yield Row("builder-k-quant", BUILDER, "k_quant", ("algo_config=k_quant",))
    yield Row("builder-k-quant-mixed", BUILDER, "k_quant mixed", ("algo_config=k_quant_mixed",))
    yield Row("builder-default-b64", BUILDER, "default, block 64", ("block_size=64",))


def _llama() -> Iterable[Row]:
    for kind in ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"):
        yield Row(kind.lower(), LLAMA, kind, (kind,))
        yield Row(f"{kind.lower()}-imatrix", LLAMA, f"{kind} imatrix", (kind, "imatrix"), "c4")


def _openvino() -> Iterable[Row]:
    awq = ("--awq", "--scale-estimation")
    sizes = (("32", "asym"), ("64", "asym"), ("64", "sym"))
    for size, mode in sizes:
        options: tuple[str, ...] = ("--bits", "4", "--group-size", size, "--mode", mode)
        label = f"int4 {mode} g{size}"
        if (size, mode) == ("64", "asym"):
            yield Row(f"openvino-{mode}-g{size}", OPENVINO, label, options)
        name = f"openvino-{mode}-g{size}-awq"
        yield Row(name, OPENVINO, f"{label}, AWQ, scales", (*options, *awq), "c4")
    yield Row("openvino-int8", OPENVINO, "int8", ("--bits", "8", "--mode", "asym"))


ROWS = {row.name: row for rows in (_ours(), _builder(), _llama(), _openvino()) for row in rows}

SETS = {
    "ours": OURS,
    "builder": BUILDER,
    "llama.cpp": LLAMA,
    "openvino": OPENVINO,
}


def choose(words: Iterable[str]) -> list[Row]:
    """Return the rows that `words` name: sets, `peers`, `all`, or single names.

    Raises `KeyError` for a word that is none of these.
    """
    chosen: dict[str, Row] = {}
    for word in words:
        if word == "all":
            found = list(ROWS.values())
        elif word == "peers":
            found = [row for row in ROWS.values() if row.group != OURS]
        elif word in SETS:
            found = [row for row in ROWS.values() if row.group == SETS[word]]
        else:
            found = [ROWS[word]]
        chosen |= {row.name: row for row in found}
    return list(chosen.values())
