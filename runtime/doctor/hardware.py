"""Judge processor, memory and disk: what this machine can hold and how fast it computes."""

from __future__ import annotations

from collections.abc import Iterator

from llama_onnx.runtime.doctor.facts import Disk, Memory, Processor
from llama_onnx.runtime.doctor.finding import Finding
from llama_onnx.runtime.doctor.int4 import judge_int4

GB = 1e9

INT4_BYTES = {"7B": 4.6e9, "13B": 8.9e9, "70B": 47.3e9}
"""Bytes of memory that a Llama 2 needs to run in int4, blocks of 32 with a float32 scale: 5.5 bits
for each parameter, which is the weights plus a tenth."""

EXPORT_MEMORY, PACKAGE_DISK, SCRATCH_DISK, FULL_DISK = 1e9, 5e9, 1e9, 1e8


def judge_processor(processor: Processor) -> Finding:
    """Name the processor and its instruction sets; `judge_int4` judges them."""
    there = [feature for feature, found in processor.features.items() if found]
    named = processor.name or "unknown"
    return Finding("processor", "ok", f"{named}: {', '.join(there)}" if there else named)


def judge_cores(processor: Processor) -> Finding:
    """Judge whether all the threads that ONNX Runtime starts can run at once."""
    usable, cores = processor.usable, processor.physical_cores
    found = f"{cores or 'unknown number of'} cores, {processor.logical} logical processors"
    if usable < processor.logical:
        found += f", {usable:g} of them allowed here"
    if cores is None or usable >= cores:
        return Finding("cores", "ok", found)
    threads = max(1, int(usable))
    return Finding(
        "cores",
        "warning",
        f"{found}: ONNX Runtime starts a thread for every core of the machine, and these wait for "
        "each other",
        f"pass `--threads {threads}`; for your own programs, with ONNX Runtime 1.32 or newer, set "
        f"`ORT_INTRA_OP_NUM_THREADS={threads}`",
    )


def judge_memory(memory: Memory | None) -> Finding:
    """Judge which size of Llama 2 the free memory can hold in int4."""
    if memory is None:
        return Finding("memory", "ok", "cannot be determined here")
    found = f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB"
    if memory.limit is not None and memory.limit < memory.total:
        found += f", the container's limit is {memory.limit / GB:.1f} GB"
    if memory.available < EXPORT_MEMORY:
        short = f"{found}: an export of any model takes about 0.7 GB, and running one takes more"
        return Finding("memory", "warning", short, "close other programs, or raise the limit")
    sizes = [size for size, needed in INT4_BYTES.items() if needed <= memory.available]
    holds = f"Llama 2 {sizes[-1]} in int4" if sizes else "smaller models than Llama 2 7B"
    return Finding("memory", "ok", f"{found}: holds {holds}")


def judge_disk(disk: Disk, platform: str) -> Finding:
    """Judge whether there is space for packages here and for scratch files in the temp folder."""
    name = "disk here" if disk.purpose == "here" else "temp folder"
    found = f"{disk.free / GB:.1f} GB free of {disk.total / GB:.1f} GB in {disk.path}"
    move = "work in a folder on another disk" if disk.purpose == "here" else _move_temp(platform)
    if not disk.writable:
        return Finding(name, "warning", f"{found}, which is not writable", move)
    if disk.free < FULL_DISK:
        return Finding(name, "trouble", f"{found}: full", f"delete files, or {move}")
    if disk.purpose == "here" and disk.free < PACKAGE_DISK:
        short = f"{found}: an int4 package of Llama 2 7B takes 4.3 GB"
        return Finding(
            name, "warning", short, f"{move}; `llama-onnx plan SOURCE` shows what an export needs"
        )
    if disk.purpose == "temp" and disk.free < SCRATCH_DISK:
        return Finding(name, "warning", f"{found}: too little for pip to unpack wheels", move)
    if platform == "win32" and disk.purpose == "temp" and not disk.path.isascii():
        letters = f"{disk.path}: libraries without support for Unicode paths fail there"
        return Finding(name, "warning", letters, _move_temp(platform))
    return Finding(name, "ok", found)


def judge_hardware(processor: Processor, memory: Memory | None, disks: tuple[Disk, ...],
                   platform: str) -> Iterator[Finding]:  # fmt: skip
    """Yield all findings about hardware."""
    yield judge_processor(processor)
    yield judge_int4(processor)
    yield judge_cores(processor)
    yield judge_memory(memory)
    yield from (judge_disk(disk, platform) for disk in disks)


def _move_temp(platform: str) -> str:
    if platform == "win32":
        return "run `setx TMP C:\\Temp` and `setx TEMP C:\\Temp`, and open a new terminal"
    return "run `export TMPDIR=FOLDER`, with a folder that has space"
